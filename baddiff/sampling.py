"""Clean and triggered sampling of the same seeds with stock diffusers schedulers.

    for step in sample(unet, scheduler, seeds=range(8), r=trigger.residual(), steps=20):
        step.x, step.x0  # every frame; the last `x` is the result
"""

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import diffusers
import torch
from torch import Tensor

from . import BadInput
from .compute import TURNS, best_precision
from .diffusion import read, write

# name -> constructor(base config): the scheduler on the model's own noise schedule
SAMPLERS = {
    "ddim": partial(diffusers.DDIMScheduler.from_config, timestep_spacing="trailing"),
    "ddpm": partial(diffusers.DDPMScheduler.from_config, variance_type="fixed_small"),
    "dpmsolver++": partial(diffusers.DPMSolverMultistepScheduler.from_config, timestep_spacing="trailing",
                           algorithm_type="dpmsolver++"),
    "unipc": partial(diffusers.UniPCMultistepScheduler.from_config, timestep_spacing="trailing"),
    "deis": partial(diffusers.DEISMultistepScheduler.from_config, timestep_spacing="trailing"),
    "pndm": partial(diffusers.PNDMScheduler.from_config, timestep_spacing="trailing", skip_prk_steps=True),
    "heun": partial(diffusers.HeunDiscreteScheduler.from_config, timestep_spacing="trailing"),
    "euler": partial(diffusers.EulerDiscreteScheduler.from_config, timestep_spacing="trailing"),
    "euler-ancestral": partial(diffusers.EulerAncestralDiscreteScheduler.from_config, timestep_spacing="trailing"),
}
DEFAULT_SAMPLER, DEFAULT_STEPS = "ddim", 20


@dataclass(frozen=True)
class SampleStep:
    index: int  # 0 is the first denoising step
    steps: int
    t: float  # the timestep that the model was asked at
    x: Tensor  # (B,C,H,W), after the step; for variance-exploding schedulers scaled back to the model's terms
    x0: Tensor  # what the model believed the image to be at this step


def noise(seeds: Iterable[int], channels: int, size: int) -> tuple[Tensor, list[torch.Generator]]:
    """N(0, I), (B,C,H,W), image i from seeds[i] alone, with the generators that its stochastic steps go on using.

    On the CPU whatever the device, so that a seed means the same picture everywhere.
    """
    generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
    return torch.stack([torch.randn(channels, size, size, generator=g) for g in generators]), generators


def make_sampler(name: str, base, clip_x0: bool = True):
    """A diffusers scheduler by name, on the noise schedule and prediction type of `base`, the model's own scheduler."""
    if name not in SAMPLERS:
        raise BadInput(f"There is no sampler '{name}': choose one of {', '.join(SAMPLERS)}.")
    config = {k: v for k, v in base.config.items() if k in ("num_train_timesteps", "beta_start", "beta_end",
                                                            "beta_schedule", "trained_betas", "prediction_type")}
    sampler = SAMPLERS[name](config)
    if "clip_sample" in sampler.config:
        sampler.register_to_config(clip_sample=clip_x0, clip_sample_range=1.0)
    return sampler


@torch.inference_mode()
def sample(unet, base, seeds: Iterable[int], r: Tensor | None = None, *, sampler: str = DEFAULT_SAMPLER,
           steps: int = DEFAULT_STEPS, eta: float = 0.0, clip_x0: bool = True, clip_xt: bool = False,
           precision: str = "auto") -> Iterator[SampleStep]:
    """Denoise N(0, I) + r, one image a seed; r, (C,H,W) or (B,C,H,W), is the trigger's residual or None (a clean image).

    Two different clips: `clip_x0` keeps the model's belief in [-1, 1] (diffusers' clip_sample, on by default there);
    `clip_xt` clamps every x_{t-1} (the paper's defence, section 5). eta: DDIM's noise, 0 to 1. `base`: the model's own
    scheduler, for its noise schedule. Yields a SampleStep per model call; raises BadInput for impossible options.
    """
    if not 1 <= steps <= base.config.num_train_timesteps:
        raise BadInput(f"{steps} sampling steps are not possible: choose 1 to {base.config.num_train_timesteps}.")
    if not 0 <= eta <= 1:
        raise BadInput(f"An eta of {eta} is not possible: choose 0 (deterministic) to 1.")
    scheduler = make_sampler(sampler, base, clip_x0)
    start, generators = noise(seeds, unet.config.in_channels, unet.config.sample_size)
    if r is not None:
        start = start + r
    parameter = next(unet.parameters())
    device, dtype = parameter.device, parameter.dtype
    scheduler.set_timesteps(steps, device=device)
    kind = base.config.prediction_type
    extra = {}
    if sampler == "ddim":
        extra["eta"] = eta
    if sampler in ("ddim", "ddpm", "euler-ancestral"):
        extra["generator"] = generators
    if precision == "auto":
        # an ε model's rounding is amplified by 1/√ᾱ, 160 at t = T, on its way to x̂0: bf16 would show as speckle
        fast = dtype == torch.float32 and kind != "epsilon"
        precision = best_precision(device.type) if fast else "no"
    cast = nullcontext() if precision == "no" else torch.autocast(
        device.type, {"bf16": torch.bfloat16, "fp16": torch.float16}[precision])
    abars = base.alphas_cumprod.to(device)
    own_clip = clip_x0 and "clip_sample" not in scheduler.config

    x = start.to(device).contiguous(memory_format=torch.channels_last) * scheduler.init_noise_sigma
    for index, t in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(x, t)
        with cast:
            output = unet(scaled.to(dtype), t).sample
        output = output.float()
        abar = interpolate(abars, float(t))
        x0, _ = read(output, scaled, abar, kind)
        if clip_x0:
            x0 = x0.clamp(-1, 1)
            if own_clip:
                output = write(x0, scaled, abar, kind)
        try:
            x = scheduler.step(output, t, x, **extra).prev_sample
        except (ValueError, NotImplementedError):  # some schedulers cannot read a model that predicts the sample itself
            raise BadInput(f"The sampler '{sampler}' cannot drive a model that predicts '{kind}': choose ddim.") from None
        scale = exploded(scheduler)
        if clip_xt:
            x = (x / scale).clamp(-1, 1) * scale
        yield SampleStep(index, len(scheduler.timesteps), float(t), x / scale, x0)


def interpolate(abars: Tensor, t: float) -> Tensor:
    """ᾱ at a timestep that may lie between two (Euler and Heun ask there): linear in log(1/ᾱ - 1)/2 = log σ̃."""
    low = int(t)
    if low == t:
        return abars[low]
    a, b = ((1 / abars[i] - 1).log() for i in (low, min(low + 1, len(abars) - 1)))
    return 1 / ((a + (b - a) * (t - low)).exp() + 1)


def exploded(scheduler) -> float:
    """How much larger a sigma-space scheduler's x is than the model's: √(1 + σ̃²) at the step that comes next."""
    if float(scheduler.init_noise_sigma) == 1:
        return 1.0
    sigma = float(scheduler.sigmas[scheduler.step_index])
    return (1 + sigma * sigma) ** 0.5


def generate(unet, base, seeds: Iterable[int], r: Tensor | None = None, *, batch: int = 64, **options) -> Tensor:
    """The end of `sample`: (N,C,H,W) in [-1, 1] on the CPU, `batch` images at a time; r: (C,H,W) or (N,C,H,W)."""
    seeds, done = list(seeds), []
    if not seeds:
        raise BadInput("No images were asked for: choose at least 1.")
    for i in range(0, len(seeds), batch):
        part = r if r is None or r.dim() == 3 else r[i:i + batch]
        with TURNS.turn():
            *_, last = sample(unet, base, seeds[i:i + batch], part, **options)
        done.append(last.x.clamp(-1, 1).cpu())
    return torch.cat(done)
