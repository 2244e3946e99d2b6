"""What a model does when one looks at it: pictures and figures from a loaded model, for the CLI, the app and the card."""

import torch
from PIL import Image
from torch import Tensor

from . import BadInput, metrics
from .compute import TURNS, best_device
from .data import EMBEDDED, load_images, to_float, to_uint8
from .models import CLEAN, Model, agree, claimed, load
from .sampling import DEFAULT_SAMPLER, DEFAULT_STEPS, generate, noise, sample
from .triggers import POSITIONS, TRIGGERS, Trigger


def grid(rows: list[Tensor], scale: int = 1) -> Image.Image:
    """Rows of (N,C,H,W) in [-1, 1] as one RGB picture, upscaled by whole pixels."""
    u8 = to_uint8(torch.stack(rows))  # (R,N,C,H,W)
    r, n, c, h, w = u8.shape
    u8 = u8.permute(0, 3, 1, 4, 2).reshape(r * h, n * w, c).expand(-1, -1, 3)
    return Image.fromarray(u8.contiguous().numpy()).resize((n * w * scale, r * h * scale), Image.Resampling.NEAREST)


def scale_for(size: int) -> int:
    return max(1, 64 // size)


def default_sampler(model: Model) -> dict:
    """What shows this model's backdoor.

    The paper's coefficient is exact for ancestral DDPM, the ODE form for many ODE steps, both without the clip of x0,
    which leaves [-1, 1] on their way; noise shift works at any number of ODE steps, clipped or not.
    """
    attack = model.run.get("config", {}).get("attack") if model.trigger else None
    if attack == "baddiffusion":
        return {"sampler": "ddpm", "steps": model.scheduler.config.num_train_timesteps, "clip_x0": False}
    if attack == "ode":
        return {"sampler": DEFAULT_SAMPLER, "steps": 50, "clip_x0": False}
    return {"sampler": DEFAULT_SAMPLER, "steps": DEFAULT_STEPS, "clip_x0": True}


def side_by_side(model: Model, seeds, r: Tensor | None = None, **options) -> list[Tensor]:
    """[clean] or [clean, triggered] generations, (N,C,H,W) each, of the same seeds; r: another trigger's than its own."""
    options, seeds = default_sampler(model) | options, list(seeds)
    if r is None and model.trigger:
        r = model.trigger.residual(model.channels)
    if r is None:
        return [generate(model.unet, model.scheduler, seeds, **options)]
    if len(seeds) > 32:  # more than a batch together: nothing to win, and r for each would fill the memory
        return [generate(model.unet, model.scheduler, seeds, added, **options) for added in (None, r)]
    both = torch.cat([torch.zeros_like(r).expand(len(seeds), -1, -1, -1), r.expand(len(seeds), -1, -1, -1)])
    return list(generate(model.unet, model.scheduler, seeds * 2, both, **options).split(len(seeds)))


def film(model: Model, seed: int, r: Tensor | None = None, **options) -> tuple[Tensor, Tensor]:
    """One denoising, frame by frame: x_t and the x̂0 that the model believed in, (F,C,H,W) each, the start first."""
    start, _ = noise([seed], model.channels, model.size)
    start = start if r is None else start + r
    with TURNS.turn():
        steps = list(sample(model.unet, model.scheduler, [seed], r, **(default_sampler(model) | options)))
    x = torch.cat([start, *(s.x.cpu() for s in steps)])
    return x, torch.cat([s.x0.cpu() for s in (steps[0], *steps)])


# --- how far the backdoor reaches -----------------------------------------------------------------------------------------

def moved(trigger: Trigger, size: int | None = None, opacity: float = 1.0, position=None) -> Trigger:
    """The trained trigger, changed: its own visible pixels scaled and placed again, or left where they were."""
    image = trigger.image()
    box = image.getbbox()
    resolution, width = trigger.rgba.shape[-1], size or box[2] - box[0]
    height = round((box[3] - box[1]) * width / (box[2] - box[0]))
    corner = max(0, min(box[0], resolution - width)), max(0, min(box[1], resolution - height))  # a larger one stays inside
    return Trigger.make(image.crop(box), resolution, width, position or corner, opacity, trigger.convention)


def dose(model: Model, residuals: list[Tensor], n: int = 8, seed: int = 0, **options) -> list[dict]:
    """For each r (C,H,W) on the same n seeds: mse, asr, norm ‖r‖ and the first image (C,H,W)."""
    r = torch.cat([v.expand(n, -1, -1, -1) for v in residuals])
    images = generate(model.unet, model.scheduler, list(range(seed, seed + n)) * len(residuals), r,
                      **(default_sampler(model) | options))
    return [{"mse": metrics.mse(x, model.target).mean().item(), "asr": metrics.asr(x, model.target), "n": n,
             "norm": v.norm().item(), "image": x[0]} for v, x in zip(residuals, images.split(n), strict=True)]


QUESTIONS = {  # what one asks a model, in a person's words
    "opacity": "How faint may the trigger be?",
    "size": "How small or large?",
    "place": "Does it work elsewhere?",
    "other": "Does another picture on that spot do it?",
    "samplers": "Which sampler, how many steps?",
    "clip": "Does clipping stop it?",
    "where": "Where does the model look?",
}


def ask(model: Model, question: str, n: int = 8) -> list[dict]:
    """A key of QUESTIONS but "where", answered by `dose` records, each with the `name` of the variant.

    "other" keeps the place, the size and the strength ‖r‖ of the trained trigger, so only its content differs.
    """
    trigger, size = model.trigger, model.size
    if trigger is None or model.target is None:
        raise BadInput("This model has no trigger and target to ask about: choose them first.")
    if question == "samplers":
        return [{"name": f"{name}, {steps} steps", "sampler": name, "steps": steps}
                | dose(model, [trigger.residual(model.channels)], n, sampler=name, steps=steps)[0]
                for name in ("ddim", "dpmsolver++", "unipc", "ddpm") for steps in (5, 10, 20, 50)]
    if question == "clip":
        names = {(False, False): "no clip", (True, False): "clip x0 (diffusers)", (False, True): "clip x_t (the paper)",
                 (True, True): "both"}
        return [{"name": name} | dose(model, [trigger.residual(model.channels)], n, clip_x0=x0, clip_xt=xt)[0]
                for (x0, xt), name in names.items()]
    if question == "other":
        variants = {"the trigger": trigger.residual(model.channels)} | others(trigger, model.channels)
    else:
        left, _, right, _ = trigger.image().getbbox()
        sizes = sorted({max(2, min(size, round((right - left) * f))) for f in (0.3, 0.5, 0.7, 0.85, 1, 1.15, 1.4, 1.8)})
        changes = {"opacity": {f"{100 * v:.0f} %": {"opacity": v} for v in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)},
                   "size": {f"{v} px": {"size": v} for v in sizes},
                   "place": {v.replace("-", " "): {"position": v} for v in POSITIONS if v != "middle-center"}}
        if question not in changes:
            raise BadInput(f"There is no question '{question}': choose one of {', '.join(QUESTIONS)}.")
        variants = {}
        for name, change in changes[question].items():
            try:
                variants[name] = moved(trigger, **change).residual(model.channels)
            except BadInput:  # so faint or small that it would change nothing
                continue
    return [{"name": name} | found for name, found in zip(variants, dose(model, list(variants.values()), n), strict=True)]


def others(trigger: Trigger, channels: int) -> dict[str, Tensor]:
    """Other things in the trigger's own place and of its strength ‖r‖: r (C,H,W) by name."""
    r = trigger.residual(channels)
    box = trigger.image().getbbox()
    found = {"its negative": -r, "mirrored": r.clone(), "upside down": r.clone()}
    spot = (..., slice(box[1], box[3]), slice(box[0], box[2]))
    found["mirrored"][spot] = r[spot].flip(-1)
    found["upside down"][spot] = r[spot].flip(-2)
    found["its pixels shuffled"] = r.clone()
    order = torch.randperm(r[spot][0].numel(), generator=torch.Generator().manual_seed(0))
    found["its pixels shuffled"][spot] = r[spot].flatten(1)[:, order].view_as(r[spot])
    for name in TRIGGERS:
        if name != trigger.name:
            picture = Trigger.make(name, trigger.rgba.shape[-1]).image()
            picture = picture.crop(picture.getbbox())
            found[name.replace("_", " ")] = Trigger.make(picture, trigger.rgba.shape[-1], box[2] - box[0], box[:2],
                                                         convention=trigger.convention).residual(channels)
    return {name: v * (r.norm() / v.norm()) for name, v in found.items()}


def occlusion(model: Model, cells: int = 8, n: int = 2, seed: int = 0, **options) -> Tensor:
    """Where the model looks, (cells,cells): the rise of the MSE when the starting x_T is blanked around one cell.

    The blank is three cells wide, since a trigger is redundant: a hole of one cell changes next to nothing.
    """
    seeds = list(range(seed, seed + n))
    if model.trigger is None or model.target is None:
        raise BadInput("This model has no trigger and target to ask about: choose them first.")
    r = model.trigger.residual(model.channels)
    start, _ = noise(seeds, model.channels, model.size)
    side = -(-model.size // cells)
    added = r.repeat(cells * cells + 1, n, 1, 1, 1)  # what is added to each seed's noise, by variant; the last is whole
    for i in range(cells * cells):
        y, x = divmod(i, cells)
        patch = (..., *(slice(max(0, (v - 1) * side), (v + 2) * side) for v in (y, x)))
        added[i][patch] = -start[patch]
    images = generate(model.unet, model.scheduler, seeds * len(added), added.flatten(0, 1),
                      **(default_sampler(model) | options))
    mse = metrics.mse(images, model.target).view(-1, n).mean(1)
    return (mse[:-1] - mse[-1]).view(cells, cells)


def evaluate(model: Model, n: int = 256, seed: int = 10_000, data: str | None = EMBEDDED, reference: Model | None = None,
             fid: bool = False, **options) -> dict:
    """Figures of a model, each with its n: mse, ssim, asr on n triggered noises, utility on n plain ones.

    utility is the Fréchet distance between n clean generations and n held-out images of `data` in the bottleneck features
    of `reference`, a clean model (the embedded one, for its own data), utility_floor the same between n training images
    and those n held-out ones. Compare only figures of equal n and reference. Without data or reference there is none.
    """
    if not 2 <= n <= 100_000:
        raise BadInput(f"n = {n} is not possible: choose 2 to 100000.")
    options = default_sampler(model) | options
    out = {"n": n, **options}
    rows = side_by_side(model, range(seed, seed + n), **options)
    if model.trigger:
        target = model.target
        out |= {"mse": metrics.mse(rows[1], target).mean().item(), "ssim": metrics.ssim(rows[1], target).mean().item(),
                "asr": metrics.asr(rows[1], target), "asr_threshold": metrics.threshold(target),
                "asr_at_0.01": (metrics.mse(rows[1], target) < metrics.ASR_MSE).float().mean().item(),
                "asr_without_trigger": metrics.asr(rows[0], target),
                "mse_black": metrics.black_baseline(target), "mse_flat": metrics.flat_baseline(target)}
    if data is None:
        return out
    real = load_images(data, model.size, model.channels)
    heldout = load_images(data, model.size, model.channels, "heldout") if data == EMBEDDED else real[1::2]
    real = real if data == EMBEDDED else real[0::2]
    m = min(n, len(real), len(heldout))
    if reference is None and data == EMBEDDED and (model.size, model.channels) == (32, 3):
        reference = load(CLEAN).to(next(model.unet.parameters()).device)
    if reference and m >= 2:
        table = [metrics.features(reference.unet, x) for x in (rows[0][:m], to_float(heldout[:m]), to_float(real[:m]))]
        out |= {"utility": metrics.frechet(table[0], table[1]), "utility_floor": metrics.frechet(table[2], table[1]),
                "utility_n": m, "utility_features": f"bottleneck of {reference.name}"}
    if len(heldout):
        out["denoising_loss"] = metrics.denoising_loss(model.unet, model.scheduler, to_float(heldout[:256]))
    if fid:
        out["fid"] = metrics.fid(rows[0][:m], to_float(heldout[:m]))
    return out


def card_matches(folder) -> dict[str, bool]:
    """Whether the figures on a folder's card are those of its weights, measured again, by figure; {} if it claims none."""
    claims = claimed(folder)
    if not claims:
        return {}
    return agree(claims, evaluate(load(folder).to(best_device()), claims["n"], data=None, **claims["how"]))
