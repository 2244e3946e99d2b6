"""What a model does when one looks at it: pictures and figures from a loaded model, for the CLI, the app and the card."""

import torch
from PIL import Image
from torch import Tensor

from . import BadInput, metrics
from .compute import TURNS
from .data import EMBEDDED, load_images, to_float, to_uint8
from .models import CLEAN, Model, load
from .sampling import DEFAULT_SAMPLER, DEFAULT_STEPS, generate, noise, sample
from .triggers import Trigger


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


def side_by_side(model: Model, seeds, **options) -> list[Tensor]:
    """[clean] or [clean, triggered] generations, (N,C,H,W) each, of the same seeds."""
    options = default_sampler(model) | options
    rows = [generate(model.unet, model.scheduler, seeds, **options)]
    if model.trigger:
        rows.append(generate(model.unet, model.scheduler, seeds, model.trigger.residual(model.channels), **options))
    return rows


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


def dose(model: Model, triggers: list[Trigger], n: int = 8, seed: int = 0, **options) -> list[dict]:
    """For each variant of the trigger: mse, asr on n seeds (the same ones) and the first image (C,H,W)."""
    r = torch.cat([t.residual(model.channels).expand(n, -1, -1, -1) for t in triggers])
    images = generate(model.unet, model.scheduler, list(range(seed, seed + n)) * len(triggers), r,
                      **(default_sampler(model) | options))
    return [{"mse": metrics.mse(x, model.target).mean().item(), "asr": metrics.asr(x, model.target), "image": x[0],
             "norm": t.norm()} for t, x in zip(triggers, images.split(n), strict=True)]


def occlusion(model: Model, cells: int = 8, n: int = 2, seed: int = 0, **options) -> Tensor:
    """Where the model looks, (cells,cells): the rise of the MSE when the starting x_T is blanked around one cell.

    The blank is three cells wide, since a trigger is redundant: a hole of one cell changes next to nothing.
    """
    seeds = list(range(seed, seed + n))
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
