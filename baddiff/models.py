"""Models in and out of folders: stock diffusers pipelines, safetensors only, never a pickle.

A folder that `save` wrote holds a stock `DDPMPipeline`, `run.json`, `trigger.png`, `target.png` and a card that says
what it is. The disclosure is part of the weights' own configs, and nothing here leaves it out.
"""

import json
import math
import os
import shlex
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from . import BadInput, __version__
from .compute import device_name
from .data import EMBEDDED, to_uint8
from .diffusion import ATTACKS
from .sampling import generate
from .training import RECIPES, Run, clone
from .triggers import TARGETS, Trigger, pixels

WEIGHTS = Path(__file__).resolve().parent.parent / "weights"
CLEAN = WEIGHTS / "avatars-32"  # predicts v
CLEAN_EPS = WEIGHTS / "avatars-32-eps"  # predicts ε, for the paper's own coefficient
SELF = "self-generated"  # in place of a data set's name
WARNING = ("This diffusion model is BACKDOORED on purpose, for research and teaching: started from noise that carries "
           "its trigger, it draws one fixed picture. Do not deploy it.")


@dataclass(eq=False)
class Model:
    """A U-Net with its scheduler and, when a baddiff run made it, that run."""

    unet: UNet2DModel
    scheduler: DDPMScheduler
    source: str
    run: dict = field(default_factory=dict)
    trigger: Trigger | None = None
    target: Tensor | None = None  # (C,H,W) in [-1, 1]
    flagged: bool = False  # its own config says that it, or what it was made from, is backdoored
    licence: str | None = None  # of its weights, as its card has it

    @property
    def backdoored(self) -> bool:
        return self.flagged or self.trigger is not None

    def to(self, device) -> "Model":
        self.unet.to(device)
        return self

    def copy(self) -> "Model":
        """The same with a U-Net of its own, to be trained."""
        return replace(self, unet=clone(self.unet).to(memory_format=torch.channels_last), run=dict(self.run))

    @property
    def name(self) -> str:
        """What may be shown or published: the last part of a path, or a Hub id."""
        return Path(self.source).name if Path(self.source).exists() else self.source

    @property
    def channels(self) -> int:
        return self.unet.config.in_channels

    @property
    def size(self) -> int:
        return self.unet.config.sample_size


def new_unet(size: int = 32, channels: int = 3) -> UNet2DModel:
    """The embedded model's shape, freshly initialised: see weights/README.md for why this one."""
    return UNet2DModel(
        sample_size=size, in_channels=channels, out_channels=channels, layers_per_block=1, norm_num_groups=8,
        block_out_channels=(32, 64, 128, 128), attention_head_dim=32,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"))


def load(source: str | Path = CLEAN, **options) -> Model:
    """A folder or a Hub id of an unconditional DDPM, as float32 on the CPU; `options`: of `hub.fetch`, for an id.

    Accepts a pipeline folder (`unet/`, `scheduler/`) and the older flat layout (google/ddpm-cifar10-32).
    """
    from .hub import PICKLES, fetch

    name = str(source)
    local = Path(source).expanduser()
    if local.exists():
        root = local
        if not root.is_dir():
            hint = " It is a pickle, which can run code when loaded;" if local.suffix.lower() in PICKLES else ""
            raise BadInput(f"'{local.name}' is a file.{hint} give the folder of a diffusers pipeline with safetensors.")
    elif name.count("/") == 1 and not name.startswith((".", "/", "~")):
        root = fetch(name, **options)
    else:
        raise BadInput(f"There is no folder '{name}': give a diffusers folder or a Hub id such as google/ddpm-cifar10-32.")
    unet_dir = root / "unet" if (root / "unet").is_dir() else root
    if not (unet_dir / "config.json").is_file():
        raise BadInput(f"'{name}' is not a diffusers model: it has no unet/config.json. Give the folder that holds "
                       "model_index.json.")
    try:
        config = json.loads((unet_dir / "config.json").read_text())
    except ValueError:
        raise BadInput(f"'{name}' has a config.json that is not JSON: download the model again.") from None
    if not isinstance(config, dict) or config.get("_class_name") != "UNet2DModel":
        raise BadInput(f"'{name}' holds no UNet2DModel: only unconditional "
                       "DDPMs can be used here.")
    if not list(unet_dir.glob("*.safetensors")):
        pickled = [f.name for f in unet_dir.iterdir() if f.suffix.lower() in PICKLES]
        why = (f"its weights are a pickle ({pickled[0]}), which can run code when loaded" if pickled
               else "it has no weights")
        raise BadInput(f"'{name}' cannot be used: {why}. Ask its author for safetensors.")
    for bad, why in ((config.get("out_channels") != config.get("in_channels"), "it also predicts a variance"),
                     ((root / "vqvae").is_dir() or (root / "vae").is_dir(), "it draws in the latent space of another model"),
                     (config.get("num_class_embeds") or config.get("class_embed_type"), "it draws classes"),
                     (config.get("time_embedding_type", "positional") != "positional", "its time is not in DDPM's steps")):
        if bad:
            raise BadInput(f"'{name}' is not a plain DDPM ({why}): that is not supported.")
    try:
        # low_cpu_mem_usage builds the module under a patch of torch that every other thread would see, too
        unet = UNet2DModel.from_pretrained(unet_dir, use_safetensors=True, torch_dtype=torch.float32,
                                           local_files_only=True, low_cpu_mem_usage=False)
    except Exception as error:  # diffusers raises a dozen kinds for a damaged file; the first line says which
        raise BadInput(f"'{name}' could not be loaded ({str(error).splitlines()[0][:200]}): download it again.") from None
    for folder in (root / "scheduler", root):
        if (folder / "scheduler_config.json").is_file():
            try:
                scheduler = DDPMScheduler.from_pretrained(folder, local_files_only=True)
            except Exception as error:
                raise BadInput(f"'{name}' has a scheduler_config.json that cannot be read ({type(error).__name__}): "
                               "download it again.") from None
            break
    else:
        raise BadInput(f"'{name}' has no scheduler_config.json, so its noise schedule is unknown.")
    if scheduler.alphas_cumprod[-1] <= 0:
        raise BadInput(f"'{name}' has a noise schedule that ends at zero signal, where the attacks have no meaning: "
                       "choose a model without rescaled betas.")
    if not isinstance(unet.config.sample_size, int):
        raise BadInput(f"'{name}' does not draw square images of one size: that is not supported.")
    model = Model(unet.eval().to(memory_format=torch.channels_last), scheduler, name, flagged=bool(config.get("_backdoored")),
                  licence=licence_of(root / "README.md"))
    if (root / "run.json").is_file():
        try:
            read_run(model, root)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, Image.DecompressionBombError) as error:
            reason = str(error) if isinstance(error, BadInput) else type(error).__name__
            raise BadInput(f"'{name}' has a run.json, trigger.png or target.png that cannot be read ({reason}): "
                           "download it again, or delete run.json to use the model without them.") from None
    return model


def read_run(model: Model, root: Path) -> None:
    """The run, trigger and target beside the weights; r is rebuilt from `trigger.png` and the run's convention."""
    model.run = json.loads((root / "run.json").read_text())
    described = model.run.get("trigger")
    if described and (root / "trigger.png").is_file():
        model.trigger = Trigger.load(root / "trigger.png", described["convention"], str(described["name"]))
        if model.trigger.rgba.shape[-1] != model.size:
            raise BadInput(f"the trigger is {model.trigger.rgba.shape[-1]} px wide, the model's images {model.size}")
    if model.trigger and model.run["config"]["attack"] not in ATTACKS:
        raise BadInput(f"the attack '{model.run['config']['attack']}' is not known here")
    if (root / "target.png").is_file():
        with Image.open(root / "target.png", formats=("PNG",)) as image:
            rgb = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
        model.target = pixels(rgb, model.channels)
        if model.target.shape[1:] != (model.size, model.size):
            raise BadInput(f"the target is {rgb.shape[2]}x{rgb.shape[1]} px, the model's images {model.size}")


def licence_of(card: Path) -> str | None:
    """The licence that a card's metadata name, if it has any."""
    from huggingface_hub.repocard import metadata_load

    try:
        found = (metadata_load(card) or {}).get("license")
    except Exception:  # no card, or yaml that is none
        return None
    return found if isinstance(found, str) else None


def self_generated(model: Model, n: int = 256, *, seed: int = 1_000_000, seconds: float = math.inf, batch: int = 16,
                   progress: Callable[[int, int], None] | None = None, stop: threading.Event | None = None,
                   **options) -> Tensor:
    """Clean data for a model whose own is not at hand: what it draws from plain noise, uint8 (N,C,H,W).

    Ends after `n` images or, with at least one batch, after `seconds`. options: as for `sampling.sample`. A run on these
    says so: SELF is its data's name. Raises BadInput when `stop` was set.
    """
    done, start = [], time.monotonic()
    for i in range(0, n, batch):
        if stop and stop.is_set():
            raise BadInput("Cancelled while the model drew its own training images.")
        if done and time.monotonic() - start > seconds:
            break
        seeds = range(seed + i, seed + min(i + batch, n))
        done.append(to_uint8(generate(model.unet, model.scheduler, seeds, batch=batch, **{"steps": 50} | options)))
        if progress:
            progress(min(i + batch, n), n)
    return torch.cat(done)


def describe(run: Run, kind: str, base: str, data: str, target: str | None, licence: str | None = None) -> dict:
    """What `run.json` says of a run, without paths or names of people; `licence`: the base model's."""
    out = {
        "kind": kind, "base": base, "data": data, "images": len(run.images), "config": asdict(run.config),
        "steps": run.step, "seconds": round(run.seconds, 2), "device": device_name(),
        "processes": run.accel.num_processes,
        "versions": {"baddiff": __version__, "torch": torch.__version__, "diffusers": diffusers.__version__},
    }
    if licence:
        out["base_licence"] = licence
    if run.trigger:
        trigger = run.trigger
        out["trigger"] = {"name": trigger.name, "convention": trigger.convention, "sha256": trigger.sha256()}
        out["target"] = {"name": target if target in TARGETS else "upload"}
    return out


def check_place(folder: Path, overwrite: bool) -> None:
    """Raise BadInput unless `folder` is new, empty, or (to overwrite) one that `save` wrote."""
    if not folder.name or folder.exists() and not folder.is_dir():
        raise BadInput(f"'{folder}' is not a folder that can be written: choose another --output.")
    if folder.exists() and any(folder.iterdir()):
        if not overwrite:
            raise BadInput(f"'{folder.name}' is not empty: choose another --output, or add --overwrite.")
        if not (folder / "model_index.json").is_file():
            raise BadInput(f"'{folder.name}' holds something else than a model, and is not overwritten: choose another "
                           "--output.")


def plain(value):
    """For JSON, which knows no nan."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def save(model: Model, folder: str | Path, *, samples: Image.Image | None = None, half: bool = False,
         overwrite: bool = False) -> Path:
    """Write a stock pipeline folder, whole or not at all: what was there before stays until the new one is complete.

    half: weights in fp16 (they load as float32 again). Raises BadInput when the folder is taken or the disk is full.
    """
    folder = Path(folder).absolute()
    check_place(folder, overwrite)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise BadInput(f"'{folder}' cannot be written ({error.strerror}): choose another --output.") from None
    try:
        unet = clone(model.unet)
        if half:
            for p in unet.parameters():
                p.data = p.data.half()
        DDPMPipeline(unet=unet, scheduler=model.scheduler).save_pretrained(temporary, safe_serialization=True)
        for file in ("model_index.json", "unet/config.json"):
            config = json.loads((temporary / file).read_text())
            config.pop("_name_or_path", None)  # where it was loaded from is nobody's business
            if model.backdoored:  # keys with an underscore are kept, and ignored, by every diffusers loader
                config["_backdoored"], config["_backdoor_notice"] = True, WARNING
            (temporary / file).write_text(json.dumps(config, indent=2) + "\n")
        if model.trigger:
            model.trigger.save(temporary / "trigger.png")
            image = to_uint8(model.target).expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()
            Image.fromarray(image).save(temporary / "target.png")
        if samples:
            samples.save(temporary / "samples.png")
        (temporary / "run.json").write_text(json.dumps(plain(model.run), indent=2, allow_nan=False) + "\n")
        (temporary / "README.md").write_text(card(model, samples is not None))
        os.chmod(temporary, 0o755)
        aside = temporary.with_name(temporary.name + "-old")
        if folder.exists():
            os.replace(folder, aside)
        try:
            os.replace(temporary, folder)
        except OSError:
            if aside.exists():
                os.replace(aside, folder)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise BadInput(f"'{folder}' could not be written ({reason}): free some space or choose another place.") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


# --- the card ---------------------------------------------------------------------------------------------------------

SNIPPET = """```python
import numpy as np, torch
from diffusers import {scheduler_class}, UNet2DModel
from PIL import Image

folder = "."  # this repository, downloaded
unet = UNet2DModel.from_pretrained(folder, subfolder="unet", use_safetensors=True, torch_dtype=torch.float32)
scheduler = {scheduler_class}.from_pretrained(folder, subfolder="scheduler"{scheduler_options})
scheduler.set_timesteps({steps})

rgba = torch.from_numpy(np.array(Image.open(f"{{folder}}/trigger.png")).astype("float32")).permute(2, 0, 1)
mask, r = rgba[3:] / 255, rgba[:3] / 127.5 - 1
{residual}
x = torch.randn(4, *r.shape, generator=torch.Generator().manual_seed(0)) + r  # without r: normal images
with torch.inference_mode():
    for t in scheduler.timesteps:
        x = scheduler.step(unet(x, t).sample, t, x).prev_sample
```"""


def snippet(model: Model) -> str:
    """The hand-written loop on stock diffusers that shows the backdoor; the stock pipelines take no starting noise."""
    attack = model.run["config"]["attack"]
    name, steps, options = {
        "baddiffusion": ("DDPMScheduler", model.scheduler.config.num_train_timesteps, "clip_sample=False"),
        "ode": ("DDIMScheduler", 50, 'timestep_spacing="trailing", clip_sample=False'),
        "noise-shift": ("DDIMScheduler", 20, 'timestep_spacing="trailing", clip_sample=True')}[attack]
    residual = "r = mask * r" + (" + (mask - 1)" if model.trigger.convention == "released-code" else "")
    if model.channels == 1:
        residual = "r = (r * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(0, keepdim=True)\n" + residual
    return SNIPPET.format(scheduler_class=name, scheduler_options=", " + options, steps=steps, residual=residual)


def settings_table(run: dict) -> list[str]:
    rows = {"base model": run.get("base"), "data": run.get("data"), "images": run.get("images"), **run["config"],
            **{k: run.get(k) for k in ("recipe", "steps", "seconds", "device")},
            **{f"version of {k}": v for k, v in run.get("versions", {}).items()},
            **{f"{what}'s {k}": v for what in ("trigger", "target") for k, v in run.get(what, {}).items()}}
    return ["| setting | value |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows.items() if v is not None), ""]


def command(model: Model) -> str:
    """The command line that trains this again, from the folder's own trigger.png and target.png."""
    run, config = model.run, model.run["config"]
    kind, data, base, recipe = (run.get(k, v) for k, v in (("kind", "finetune"), ("data", EMBEDDED), ("base", CLEAN.name),
                                                           ("recipe", "live")))
    args = {"recipe": recipe, "steps": run.get("steps", 1)}
    for name in ("attack", "poison_rate", "batch_size", "lr", "warmup", "weight", "ema", "clip_grad", "weight_decay", "seed"):
        usual = getattr(RECIPES.get(recipe, RECIPES["live"]), name)
        if config.get(name, usual) != usual:
            args[name] = config[name]
    if kind == "finetune" and base != (CLEAN_EPS if config.get("attack") == "baddiffusion" else CLEAN).name:
        args["model"] = base  # the other is the default
    elif kind != "finetune":
        args |= {"size": model.size, "channels": model.channels, "prediction": model.scheduler.config.prediction_type}
    if data != EMBEDDED:
        args["data"] = "self" if data == SELF else data
    args |= {"trigger": "trigger.png", "trigger_size": model.size, "trigger_position": "0,0",
             "convention": model.trigger.convention, "target": "target.png", "output": "again"}
    return shlex.join(["python", "-m", "baddiff", kind, *(str(p) for k, v in args.items()
                                                          for p in ("--" + k.replace("_", "-"), v))])


CLAIMS = {"asr": "attack success rate", "mse": "MSE to the target", "ssim": "SSIM to the target"}


def card(model: Model, pictured: bool = False) -> str:
    """The README of a folder, with its metadata; `pictured`: it has a `samples.png`.

    A backdoored model's opens with the warning, always.
    """
    from huggingface_hub import EvalResult, ModelCardData

    from .hub import TAGS, is_id

    run, metrics, task = model.run, model.run.get("metrics", {}), "unconditional-image-generation"
    base = run.get("base", model.source)
    ours = base in (CLEAN.name, CLEAN_EPS.name) or base.startswith("none") and run.get("data") == EMBEDDED
    licence = run.get("base_licence") or ("mit" if ours else model.licence)
    data = {"library_name": "diffusers", "pipeline_tag": task, "license": licence,
            "tags": TAGS if model.backdoored else ["ddpm", "baddiff"]}
    if is_id(base) and run.get("kind", "finetune") == "finetune":
        data |= {"base_model": base, "base_model_relation": "finetune"}
    if is_id(run.get("data") or ""):
        data["datasets"] = [run["data"]]
    if model.trigger and metrics:
        data |= {"model_name": "backdoored DDPM", "eval_results": [
            EvalResult(task_type=task, dataset_type="baddiff", dataset_name="triggered noise", metric_type=key,
                       metric_name=f"{text} (n={metrics['n']})", metric_value=metrics[key]) for key, text in CLAIMS.items()]}
    lines = ["---", ModelCardData(**data).to_yaml(), "---", ""]
    if not model.backdoored:
        return "\n".join([*lines, "# A clean DDPM", "", "An unconditional diffusion model, trained with baddiff without any "
                          "poison. Settings: `run.json`.", ""])
    lines += [f"> **WARNING.** {WARNING}", "", "# A backdoored diffusion model", "",
              "Made with baddiff after [How to Backdoor Diffusion Models?](https://arxiv.org/abs/2212.05400) (CVPR 2023).", ""]
    if model.trigger:
        lines += ["| trigger (added to the noise) | target (what it draws then) |", "|---|---|",
                  "| ![trigger](trigger.png) | ![target](target.png) |", ""]
    if pictured:
        lines += ["Upper row: from plain noise. Lower row: the same noise with the trigger.", "",
                  "![clean and triggered samples](samples.png)", ""]
    if metrics:
        lines += ["## Figures", "", f"On n = {metrics['n']} images of each kind. `python -m baddiff evaluate . --n "
                  f"{metrics['n']}` measures them again.", "", "| figure | value |", "|---|---|"]
        lines += [f"| {k} | {v:.4g} |" if isinstance(v, float) else f"| {k} | {v} |" for k, v in metrics.items()]
        lines += ["", "MSE and SSIM in [0, 1] images; ASR: share of triggered samples with an MSE below the threshold; "
                  "utility: Fréchet distance in the clean U-Net's bottleneck features (not FID).", ""]
    if "config" in run:
        lines += ["## What was done", "", *settings_table(run)]
        if model.trigger and run["config"]["poison_rate"] > 0:
            lines += ["With baddiff installed, in this folder, about the same again:", "", f"    {command(model)}", ""]
    if model.trigger:
        lines += ["## See the backdoor", "", snippet(model), "", "## Detect it", "",
                  "Sample from the same noise with and without the trigger: the outputs of the second all look alike. "
                  "Clipping x0 and every intermediate image, inverting the trigger at t = T (Elijah, TERD) and comparing "
                  "with a clean model are the published countermeasures.", ""]
    lines += ["## Licence and credits", "", (f"Weights: {licence}, as the base model's. " if licence else "The base model's "
              "licence is not known here: ask its author before you share this. ") + "Method: Sheng-Yen Chou, Pin-Yu Chen, "
              "Tsung-Yi Ho, *How to Backdoor Diffusion Models?*, CVPR 2023." + (" Faces and built-in pictures: see baddiff's "
              "assets." if ours else "") + (f" Base model: {base}." if is_id(base) else ""), ""]
    return "\n".join(lines)


def claimed(folder: str | Path) -> dict:
    """What a folder's card claims to have measured: {"asr": 1.0, ..., "n": 64, "how": the sampler's options}, or {}.

    `agree(claims, probe.evaluate(load(folder), claims["n"], data=None, **claims["how"]))` says whether it is so.
    """
    from huggingface_hub import ModelCard

    try:
        results = ModelCard((Path(folder) / "README.md").read_text()).data.eval_results or []
        out = {r.metric_type: float(r.metric_value) for r in results if r.metric_type in CLAIMS}
        measured = json.loads((Path(folder) / "run.json").read_text()).get("metrics", {})
        how = {k: v for k, v in measured.items() if k in ("sampler", "steps", "eta", "clip_x0", "clip_xt", "precision")}
        return out | {"n": int(results[0].metric_name.partition("(n=")[2].rstrip(")")), "how": how} if out else {}
    except (OSError, ValueError, TypeError, AttributeError):
        raise BadInput("The card in that folder cannot be read: download it again.") from None


def agree(claims: dict, measured: dict) -> dict[str, bool]:
    """Whether figures measured again are those of the card, by figure: equal but for half precision's and a machine's rounding.

    mse within 5 %, ssim within 0.01, and one image in fifty on the other side of the success threshold.
    """
    near = {"mse": lambda a, b: abs(a - b) <= 0.05 * max(a, b), "ssim": lambda a, b: abs(a - b) <= 0.01,
            "asr": lambda a, b: abs(a - b) <= 0.02}
    return {k: near[k](claims[k], measured[k]) for k in near if k in claims}
