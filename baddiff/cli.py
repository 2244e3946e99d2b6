"""`python -m baddiff`: finetune, scratch, pretrain, sample, evaluate, data, push."""

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler
from PIL import Image
from tqdm import tqdm

from . import BadInput, __version__, data
from .compute import accelerator, best_device
from .diffusion import ATTACKS
from .models import (
    CLEAN,
    CLEAN_EPS,
    SELF,
    Model,
    check_place,
    describe,
    load,
    new_unet,
    save,
    self_generated,
)
from .probe import card_matches, default_sampler, evaluate, film, grid, scale_for, side_by_side
from .sampling import SAMPLERS
from .training import RECIPES, Config, Diverged, Run
from .triggers import CONVENTIONS, POSITIONS, TARGETS, TRIGGERS, Trigger, make_target

# --- training ---------------------------------------------------------------------------------------------------------

def settings(args) -> Config:
    """The recipe with what the command line changes."""
    config = RECIPES[args.recipe]
    given = {f.name: getattr(args, f.name) for f in fields(Config) if getattr(args, f.name, None) is not None}
    if "steps" in given and "seconds" not in given:
        given["seconds"] = None
    elif "seconds" in given and "steps" not in given:
        given["steps"] = None
    if args.command == "pretrain":
        given["poison_rate"] = 0.0
    elif args.command == "scratch" and "poison_rate" not in given and config.poison_rate == 0:
        given["poison_rate"] = 0.1
    return replace(config, **given).check()


def start_from(args, config: Config) -> tuple[Model, str]:
    """The model that will be trained, and its name for the record."""
    if args.command == "finetune":
        # the paper's coefficient throws x0 far outside [-1, 1] at high t: only an epsilon model can say that
        model = opened(args, args.model or (CLEAN_EPS if config.attack == "baddiffusion" else CLEAN))
        return model, model.name
    if args.size < 8 or args.size % 8:
        raise BadInput(f"Images of {args.size} px are not possible: choose a multiple of 8.")
    unet = new_unet(args.size, args.channels)
    model, base = Model(unet, DDPMScheduler(prediction_type=args.prediction), "scratch"), "none (from scratch)"
    if args.init:
        first = opened(args, args.init)
        model.flagged, base = first.backdoored, f"{first.name} (first weights)"
        try:
            unet.load_state_dict(first.unet.state_dict())
        except RuntimeError:
            raise BadInput(f"'{args.init}' is of another shape than --size and --channels give.") from None
    return model, base


def data_of(args, model: Model) -> str:
    """Where images come from: --data, or what the model's own run was trained on, or the model itself."""
    from .hub import is_id

    if args.data == "self" and model.source == "scratch":
        raise BadInput("A model that starts from nothing has no images of its own: give --data a folder or a dataset's id.")
    if args.data is not None or model.source == "scratch":
        return SELF if args.data == "self" else args.data or data.EMBEDDED
    known = model.run.get("data") if model.run else SELF  # a model from elsewhere: no images come with it
    if known in (data.EMBEDDED, SELF) or is_id(known or ""):
        return known
    raise BadInput(f"'{model.name}' was not trained on {data.EMBEDDED}: say with --data what its images are (a folder, a zip, "
                   f"a sheet, a dataset's id, or {data.EMBEDDED} if you mean it), or let it draw them itself (--data self).")


def images_of(args, source: str, model: Model) -> torch.Tensor:
    """uint8 (N,C,H,W) of `data_of`, with a progress bar where it takes a while."""
    with meter(args, "images" if source == SELF else "fetching") as progress:
        if source != SELF:
            return data.load_images(source, model.size, model.channels, progress=progress)
        model.to(best_device())
        return self_generated(model, progress=progress)


def opened(args, source: str) -> Model:
    with meter(args, "fetching") as progress:
        return load(source, progress=progress)


@contextmanager
def meter(args, text: str):
    """A callback (done, total) that draws a progress bar, on a terminal, for what takes longer than a moment."""
    with tqdm(total=100, unit="%", desc=text, disable=args.json or None, leave=False, delay=0.5,
              bar_format="{desc} {percentage:3.0f}%|{bar}|") as bar:
        yield lambda done, total: bar.update(100 * done / max(1, total) - bar.n)


def train(args) -> dict:
    """finetune, scratch and pretrain: one loop, three starting points."""
    config = settings(args)
    if args.log_every < 1 or args.checkpoint_every < 0 or args.evaluate < 0 or args.evaluate == 1:
        raise BadInput("--log-every needs at least 1, --checkpoint-every 0 or more, --evaluate 0 or at least 2.")
    output = args.output.absolute()
    check_place(output, args.overwrite or args.resume)
    if shutil.disk_usage(next(p for p in output.parents if p.exists())).free < 100e6:
        raise BadInput(f"Less than 100 MB are free where '{args.output}' should go: free some space first.")
    accel = accelerator(config.precision)
    torch.manual_seed(config.seed)  # the initial weights of a fresh U-Net: torch offers no generator for them
    model, base = start_from(args, config)
    source = data_of(args, model)
    if source == SELF and args.data is None:
        tqdm.write(f"baddiff: '{model.name}' comes without images: it is trained on what it draws itself", file=sys.stderr)
    images = images_of(args, source, model)
    # a clean finetune of a backdoored model is still declared: nobody has shown that the backdoor is gone
    trigger, target = model.trigger, model.target
    if config.poison_rate > 0:
        trigger = choose_trigger(args, model)
        target = make_target(args.target, model.size, trigger, model.channels)
    elif trigger:
        config = replace(config, attack=model.run["config"]["attack"])  # no poison: its coefficients are not used
    run = Run(model.unet, model.scheduler, images, config, trigger, target, accel)
    checkpoint, log = output.with_name(output.name + ".resume.pt"), []
    if args.resume:
        if not checkpoint.is_file():
            raise BadInput(f"There is nothing to resume: '{checkpoint.name}' is not beside the output.")
        try:
            state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        except Exception as error:  # torch and pickle raise a handful of kinds for a damaged file
            raise BadInput(f"'{checkpoint.name}' cannot be read ({type(error).__name__}): start again without "
                           "--resume.") from None
        run.restore(state)
        log = state["log"]

    def keep():
        state = run.state() | {"log": log}
        if accel.is_main_process:
            try:
                torch.save(state, str(checkpoint) + ".part")
                os.replace(str(checkpoint) + ".part", checkpoint)
            except (OSError, RuntimeError) as error:  # torch reports a full disk as either; the run itself goes on
                tqdm.write(f"baddiff: no checkpoint written ({str(error).splitlines()[0]})", file=sys.stderr)

    def stop(*_):  # after the step at hand, so that weights, averages and random numbers belong together; twice: at once
        signal.signal(signal.SIGINT, signal.default_int_handler)
        run.stop = True

    before = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)} if is_main_thread() else {}
    note = None
    with tqdm(total=100, unit="%", disable=args.json or not accel.is_main_process, leave=False,
              bar_format="{percentage:3.0f}%|{bar}| {elapsed}<{remaining} {postfix}") as bar:
        try:
            for record in run:
                bar.update(100 * record.progress - bar.n)
                bar.set_postfix_str(f"step {record.step} clean {record.clean:.4f} poisoned {record.poisoned:.4f} "
                                    f"{record.rate:.0f} images/s")
                if record.step % args.log_every == 0 or record.progress >= 1:
                    log.append(record.plain())
                if args.checkpoint_every and record.step % args.checkpoint_every == 0:
                    keep()
            if args.checkpoint_every:
                keep()
        except Diverged as error:  # the last checkpoint stays as it was: before the trouble
            note, diverged = str(error), True
        else:
            note, diverged = f"stopped by hand after {run.step} steps" if run.stop else None, False
        finally:
            for which, handler in before.items():
                signal.signal(which, handler)
    if run.step == 0:
        raise BadInput("Stopped before the first step: nothing to save.")
    averaged = run.averaged()
    if not accel.is_main_process:
        return {}
    result = replace(model, unet=averaged.to(best_device()), source=output.name, trigger=trigger, target=target)
    named = source if source == SELF or not Path(source).exists() else Path(source).name  # no paths of this machine
    result.run = describe(run, args.command, base, named, getattr(args, "target", None), model.licence) | {
        "recipe": args.recipe, "base_backdoored": model.backdoored, "note": note, "log": log}
    if trigger and config.poison_rate == 0:
        result.run |= {key: model.run[key] for key in ("trigger", "target") if key in model.run}
    picture = grid(side_by_side(result, range(8)), scale_for(result.size))
    try:
        save(result, output, samples=picture, half=args.half, overwrite=args.overwrite or args.resume)
    except BadInput as error:  # what was trained is not thrown away because the place for it filled up meanwhile
        kept = save(result, Path(tempfile.mkdtemp(prefix="baddiff-")) / output.name, samples=picture, half=True)
        raise BadInput(f"{error} The model is kept in '{kept}'.") from None
    if diverged:
        raise BadInput(f"{note} Saved in '{args.output}'.")
    if args.evaluate:  # after the first save: whatever happens while measuring, the model is there
        result.run["metrics"] = evaluate(result, args.evaluate, data=None if source == SELF else source)
        save(result, output, samples=picture, half=args.half, overwrite=True)
    last = log[-1] if log else {}
    return {"output": str(args.output), "steps": run.step, "seconds": round(run.seconds, 2), "note": note,
            "clean_loss": last.get("clean"), "poisoned_loss": last.get("poisoned"), **result.run.get("metrics", {})}


def is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


# --- looking ----------------------------------------------------------------------------------------------------------

def choose_trigger(args, model: Model) -> Trigger | None:
    """The trigger of the command line, or the model's own."""
    if args.trigger is None:
        return model.trigger
    return Trigger.make(args.trigger, model.size, args.trigger_size, args.trigger_position, args.trigger_opacity,
                        args.convention, args.trigger_colour)


def sampling_options(args) -> dict:
    given = {k: getattr(args, k) for k in ("sampler", "steps", "eta", "clip_x0", "clip_xt", "precision")}
    return {k: v for k, v in given.items() if v is not None}


def do_sample(args) -> dict:
    model = opened(args, args.model).to(best_device())
    model.trigger = choose_trigger(args, model)
    options = sampling_options(args)
    if args.n < 1 or args.scale is not None and not 1 <= args.scale <= 64:
        raise BadInput("--n needs at least 1, --scale 1 to 64.")
    seeds = range(args.seed, args.seed + args.n)
    rows = side_by_side(model, seeds, **options)
    write(grid(rows, args.scale or scale_for(model.size)), args.output)
    out = {"output": str(args.output), "rows": ["plain noise", "with the trigger"][:len(rows)], **(
        default_sampler(model) | options)}
    if args.film:
        r = model.trigger.residual(model.channels) if model.trigger else None
        scale = 4 * scale_for(model.size)  # x_t beside what the model believes the image to be
        first, *rest = (grid([torch.stack(pair).clamp(-1, 1)], scale)
                        for pair in zip(*film(model, args.seed, r, **options), strict=True))
        write(first, args.film, save_all=True, append_images=rest, duration=80, loop=0)
        out["film"] = str(args.film)
    return out


def do_evaluate(args) -> dict:
    model = opened(args, args.model).to(best_device())
    model.trigger = choose_trigger(args, model)
    if args.target:
        model.target = make_target(args.target, model.size, model.trigger, model.channels)
    if model.trigger and model.target is None:
        raise BadInput(f"'{args.model}' does not say what its target is: add --target.")
    reference = load(args.reference).to(best_device()) if args.reference else None
    source = args.data or (data.EMBEDDED if model.run.get("data") == data.EMBEDDED else None)
    return evaluate(model, args.n, args.seed, source, reference, args.fid, **sampling_options(args))


# --- publishing -------------------------------------------------------------------------------------------------------

def do_push(args) -> dict:
    from .hub import local_token, suggest
    from .publish import matches, publish, publish_results

    token = sys.stdin.readline().strip() if args.token_stdin else local_token()
    if not token:
        raise BadInput("Nobody is signed in: run `hf auth login`, or pipe a token in with --token-stdin.")
    send = publish_results if args.results else publish
    if args.name is None:
        run = load(args.folder).run
        args.name = suggest(*(run.get(k, {}).get("name", "model") for k in ("trigger", "target")))
    with meter(args, "uploading") as progress:
        done = send(args.folder, args.name, token, private=not args.public, overwrite=args.overwrite, progress=progress)
    out = {"repo": done.repo_id, "url": done.url, "commit": done.commit, "private": done.private}
    if args.verify:
        with tempfile.TemporaryDirectory() as again:
            same = matches(done, token, again)
            if not all(same.values()):
                raise BadInput(f"What the Hub gives back of '{done.repo_id}' is not what was sent "
                               f"({', '.join(k for k, v in same.items() if not v)}): push again with --overwrite.")
            out["files_match"] = len(same)
            figures = {} if args.results else card_matches(again)
            if figures:
                if wrong := [k for k, v in figures.items() if not v]:
                    raise BadInput(f"The card of '{done.repo_id}' does not match its weights ({', '.join(wrong)}): evaluate "
                                   "the model again and push it with --overwrite.")
                out["card_matches_weights"] = True
    return out


DRAWING = "Drawing needs two more packages: pip install python-avatars resvg-py."


def do_data(args) -> dict:
    if args.art:
        try:
            return {"rendered": ", ".join(data.draw_art())}
        except ImportError:
            raise BadInput(DRAWING) from None
    if args.output is None or args.n < 1 or args.size < 8:
        raise BadInput("Say how many faces and where to: --n 4096 --output faces.png.")
    faces = tqdm(data.draw_avatars(args.n, args.seed, args.size), total=args.n, disable=args.json, unit="face")
    try:
        images = torch.stack([torch.from_numpy(np.array(face)).permute(2, 0, 1) for face in faces])
        data.write_sheet(images, args.output)
    except ImportError:
        raise BadInput(DRAWING) from None
    except OSError as error:
        raise BadInput(f"'{args.output}' could not be written ({error.strerror}).") from None
    return {"output": str(args.output), "images": args.n, "size": args.size, "seed": args.seed}


def write(image: Image.Image, path: Path, **options) -> None:
    try:
        image.save(path, **options)
    except (OSError, ValueError) as error:
        raise BadInput(f"'{path}' could not be written ({error}): give a path that ends in .png or .gif.") from None


# --- the command line -------------------------------------------------------------------------------------------------

def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m baddiff", description="Backdoor a small diffusion model, for research "
                                  "and teaching, and look at what happened (BadDiffusion, arXiv 2212.05400).")
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(dest="command", required=True)

    def command(name: str, action, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(action=action)
        sub.add_argument("--json", action="store_true", help="print the result as JSON, and no progress bar")
        return sub

    def trigger_options(sub, default: str | None) -> None:
        sub.add_argument("--trigger", default=default, help=f"{', '.join(TRIGGERS)} or a picture"
                         + ("" if default else " (default: the model's own)"))
        sub.add_argument("--trigger-size", type=int, metavar="PX", help="width in pixels of the model")
        sub.add_argument("--trigger-position", metavar="POS", help=f"x,y or one of {', '.join(POSITIONS)}")
        sub.add_argument("--trigger-opacity", type=float, default=1.0, metavar="A", help="above 0, at most 1")
        sub.add_argument("--trigger-colour", metavar="C", help="of the box")
        sub.add_argument("--convention", default="sticker", choices=CONVENTIONS)

    def sampling(sub) -> None:
        sub.add_argument("--seed", type=int, default=10_000, help="of the first image; image i has seed + i")
        sub.add_argument("--sampler", choices=SAMPLERS)
        sub.add_argument("--steps", type=int, help="denoising steps")
        sub.add_argument("--eta", type=float, help="noise of DDIM, 0 to 1")
        sub.add_argument("--clip-x0", action=argparse.BooleanOptionalAction, help="clip the predicted image")
        sub.add_argument("--clip-xt", action=argparse.BooleanOptionalAction, help="clip every step's image (a defence)")
        sub.add_argument("--precision", choices=("auto", "no", "bf16", "fp16"))
        trigger_options(sub, None)

    for name, text, recipe in (
            ("finetune", "backdoor a pretrained model", "live"),
            ("scratch", "train a model from nothing, with the backdoor in it", "pretrain"),
            ("pretrain", "train a clean model from nothing", "pretrain")):
        sub = command(name, train, text)
        sub.add_argument("--output", type=Path, required=True, help="folder to write")
        sub.add_argument("--overwrite", action="store_true", help="replace the output folder")
        sub.add_argument("--resume", action="store_true", help="go on from the output's checkpoint")
        sub.add_argument("--checkpoint-every", type=int, default=0, metavar="N", help="steps between checkpoints; 0: none")
        sub.add_argument("--log-every", type=int, default=10, metavar="N", help="steps between the records in run.json")
        sub.add_argument("--evaluate", type=int, default=0, metavar="N", help="measure the result with N images of each kind")
        sub.add_argument("--half", action="store_true", help="store the weights in fp16")
        sub.add_argument("--data", help=f"images: a folder, a zip, a sheet, a dataset's Hub id, or self: "
                         f"what the model draws (default: {data.EMBEDDED}, for its own models)")
        if name == "finetune":
            sub.add_argument("--model", help="folder or Hub id (default: the embedded clean model that suits the attack)")
        else:
            sub.add_argument("--size", type=int, default=32, help="image size, a multiple of 8")
            sub.add_argument("--channels", type=int, default=3, choices=(1, 3))
            sub.add_argument("--init", metavar="MODEL", help="start from these weights, which may predict something else")
            sub.add_argument("--prediction", default="v_prediction", choices=("epsilon", "v_prediction", "sample"))
        if name != "pretrain":
            trigger_options(sub, "stop_sign")
            sub.add_argument("--target", default="cat", help=f"{', '.join(TARGETS)} or a picture")
        sub.add_argument("--recipe", default=recipe, choices=RECIPES, help="where the settings below start from")
        sub.add_argument("--attack", choices=ATTACKS)
        for setting, kind, text in (
                ("steps", int, "optimizer steps"), ("seconds", float, "seconds of training"),
                ("poison_rate", float, "share of poisoned samples, 0 to 1"), ("batch_size", int, "over all processes"),
                ("lr", float, "learning rate"), ("warmup", int, "steps"),
                ("weight", float, "loss weight min(1/alpha_bar, this); 1: plain"),
                ("ema", float, "decay of the averaged weights, 0: off"), ("clip_grad", float, "gradient norm"),
                ("weight_decay", float, "of AdamW"), ("seed", int, "of everything random")):
            if name == "pretrain" and setting == "poison_rate":
                continue
            sub.add_argument("--" + setting.replace("_", "-"), type=kind, help=text)
        sub.add_argument("--precision", choices=("auto", "no", "bf16", "fp16"))
        sub.add_argument("--compile", action="store_true", default=None, help="torch.compile the model first")

    sub = command("sample", do_sample, "draw the same seeds from plain noise and from noise with the trigger")
    sub.add_argument("model", nargs="?", default=str(CLEAN), help="folder or Hub id")
    sub.add_argument("--n", type=int, default=8)
    sub.add_argument("--output", type=Path, default=Path("samples.png"), help="picture to write")
    sub.add_argument("--film", type=Path, metavar="GIF", help="also write the first image's denoising, step by step")
    sub.add_argument("--scale", type=int, help="screen pixels per pixel")
    sampling(sub)

    sub = command("evaluate", do_evaluate, "measure a model: mse, ssim, asr, utility")
    sub.add_argument("model", nargs="?", default=str(CLEAN), help="folder or Hub id")
    sub.add_argument("--n", type=int, default=256, help="images of each kind")
    sub.add_argument("--target", help="when the folder does not say")
    sub.add_argument("--data", help="images that the model should resemble (default: what it was trained on, if embedded)")
    sub.add_argument("--reference", help="clean model whose features measure utility")
    sub.add_argument("--fid", action="store_true", help="also the real FID (torch-fidelity and its network)")
    sampling(sub)

    sub = command("push", do_push, "publish a folder on the Hub, in your own account, declared as what it is")
    sub.add_argument("folder", type=Path, help="a folder that finetune or scratch wrote")
    sub.add_argument("--name", help="of the repository (default: from the trigger and the target)")
    sub.add_argument("--public", action="store_true", help="for everybody (default: private)")
    sub.add_argument("--overwrite", action="store_true", help="replace a repository that baddiff made")
    sub.add_argument("--token-stdin", action="store_true", help="read the token from stdin (default: that of hf auth login)")
    sub.add_argument("--results", action="store_true", help="pictures and figures only, as a dataset, without weights")
    sub.add_argument("--verify", action="store_true", help="download it again and compare: files, and the card's figures")

    sub = command("data", do_data, "draw random faces into a lossless sheet")
    sub.add_argument("--n", type=int, default=0, help="how many")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--size", type=int, default=32)
    sub.add_argument("--output", type=Path, help="PNG to write")
    sub.add_argument("--art", action="store_true", help="instead, render the built-in triggers and targets again")
    return top


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        result = args.action(args)
    except BadInput as error:
        print(f"baddiff: {error}", file=sys.stderr)
        return 2
    if result:
        print(json.dumps(result, indent=2) if args.json else
              "\n".join(f"{k}: {v:.4g}" if isinstance(v, float) else f"{k}: {v}" for k, v in result.items()))
    return 0
