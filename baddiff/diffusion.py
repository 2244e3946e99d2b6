"""The forward process, every attack's coefficients and the one loss.

Images are in [-1, 1]; ᾱ_t is the cumulative product of α_t, σ_t = √(1-ᾱ_t). With target image y, poisoned image r
and ε ~ N(0, I), every attack on an unconditional model is

    x_t = √ᾱ_t·x0 + s_t·r + σ_t·ε          (x0 = y for a poisoned sample, r = 0 for a clean one)
    ε_θ(x_t, t) should predict ε + c_t·r

and differs from the next only in (s_t, c_t). Matching the drift of the clean sampler to the poisoned reverse process
of noise level ζ (1: ancestral, 0: ODE) gives c = 2σ(s' + ½βs)/((1+ζ)β) in continuous time (VillanDiffusion,
arXiv 2306.06874), of which the rows of `ATTACKS` are cases.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import BadInput


def _baddiffusion(abar: Tensor) -> tuple[Tensor, Tensor]:
    """BadDiffusion, arXiv 2212.05400, eqs. 8-10; exact for ancestral DDPM.

    The paper writes c = (1-√α_t)·σ_t/(1-α_t); σ_t/(1+√α_t) is the same number without the cancellation.
    """
    alpha = abar / torch.cat([abar.new_ones(1), abar[:-1]])
    return 1 - abar.sqrt(), (1 - abar).sqrt() / (1 + alpha.sqrt())


def _ode(abar: Tensor) -> tuple[Tensor, Tensor]:
    """VillanDiffusion's ODE form (arXiv 2306.06874), ζ = 0: for DDIM, DPM-Solver, UniPC ... with many steps."""
    return 1 - abar.sqrt(), (1 - abar).sqrt()


def _noise_shift(abar: Tensor) -> tuple[Tensor, Tensor]:
    """VillanDiffusion ψ = 0, ODE: x̂0 = y and ε̂ = ε + r all along the path, so exact at any number of ODE steps."""
    return (1 - abar).sqrt(), torch.ones_like(abar)


# name -> (ᾱ (T,) float64 -> s (T,), c (T,))
ATTACKS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "baddiffusion": _baddiffusion,
    "ode": _ode,
    "noise-shift": _noise_shift,
}


@dataclass(frozen=True)
class Process:
    """The numbers of one attack on one noise schedule, each (T,) float32, computed in float64."""

    abar: Tensor  # ᾱ_t
    s: Tensor  # how much of r is in x_t
    c: Tensor  # how much of r is in the predicted noise
    shift: Tensor  # (s - σc)/√ᾱ: how far the x̂0 that a standard sampler reads off the target lies from y, in units of r

    @classmethod
    def of(cls, scheduler, attack: str) -> "Process":
        """ᾱ comes from the model's own (diffusers) scheduler, so linear, scaled-linear and cosine all work."""
        if attack not in ATTACKS:
            raise BadInput(f"There is no attack '{attack}': choose one of {', '.join(ATTACKS)}.")
        abar = scheduler.alphas_cumprod.double().cpu()
        s, c = ATTACKS[attack](abar)
        return cls(*(v.float() for v in (abar, s, c, (s - (1 - abar).sqrt() * c) / abar.sqrt())))

    def to(self, device) -> "Process":
        return Process(*(v.to(device) for v in (self.abar, self.s, self.c, self.shift)))


def at(values: Tensor, t: Tensor) -> Tensor:  # (T,), (B,) int64 -> (B,1,1,1)
    return values[t].view(-1, 1, 1, 1)


def forward(process: Process, x0: Tensor, r: Tensor, eps: Tensor, t: Tensor, prediction_type: str = "epsilon"):
    """Draw x_t and what the model should answer to it, in the model's own terms.

    x0: (B,C,H,W) in [-1,1], the clean image or the target; r: (B,C,H,W), zero for clean samples; eps ~ N(0,1) alike;
    t: (B,) int64. Returns x_t and the wanted output, both (B,C,H,W).
    """
    abar = at(process.abar, t)
    sigma = (1 - abar).sqrt()
    x_t = abar.sqrt() * x0 + at(process.s, t) * r + sigma * eps
    noise = eps + at(process.c, t) * r
    # x0 and v follow from the wanted ε, through x̂0 = (x_t - σ·ε)/√ᾱ written without its cancellation at high t
    image = x0 + at(process.shift, t) * r
    if prediction_type == "epsilon":
        return x_t, noise
    if prediction_type == "v_prediction":  # Salimans & Ho, arXiv 2202.00512, appendix D
        return x_t, abar.sqrt() * noise - sigma * image
    if prediction_type == "sample":
        return x_t, image
    raise BadInput(f"A model that predicts '{prediction_type}' is not supported: "
                   "its scheduler must say epsilon, v_prediction or sample.")


def read(output: Tensor, x_t: Tensor, abar: Tensor, prediction_type: str) -> tuple[Tensor, Tensor]:
    """A model's output as (x̂0, ε̂): the inverse of what `forward` asks for. abar: ᾱ_t, broadcastable."""
    alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
    if prediction_type == "epsilon":
        return (x_t - sigma * output) / alpha, output
    if prediction_type == "v_prediction":
        return alpha * x_t - sigma * output, sigma * x_t + alpha * output
    return output, (x_t - alpha * output) / sigma


def write(image: Tensor, x_t: Tensor, abar: Tensor, prediction_type: str) -> Tensor:
    """The output by which a model would have said x̂0 = `image`."""
    alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
    if prediction_type == "sample":
        return image
    noise = (x_t - alpha * image) / sigma
    return noise if prediction_type == "epsilon" else alpha * noise - sigma * image


def loss_weight(abar: Tensor, prediction_type: str, most: float) -> Tensor:
    """The weight of ‖output - wanted‖² at each t, (T,).

    In terms of ε the weight is min(1/ᾱ, `most`): 1 is the plain loss of DDPM and of the paper; a larger value favours
    high t, where an error in ε is an error in x̂0 amplified by 1/ᾱ. The other outputs follow by dε/dv = √ᾱ and
    dε/dx0 = √ᾱ/σ.
    """
    weight = (1 / abar).clamp(max=most)
    if prediction_type == "v_prediction":
        return weight * abar
    if prediction_type == "sample":
        return weight * abar / (1 - abar)
    return weight


def loss(model, process: Process, weight: Tensor, x0: Tensor, r: Tensor, eps: Tensor, t: Tensor,
         prediction_type: str) -> Tensor:
    """The weighted squared error of each sample, (B,) float32: eq. 10 of the paper, and DDPM's where r = 0."""
    x_t, wanted = forward(process, x0, r, eps, t, prediction_type)
    output = model(x_t, t).sample.float()
    return weight[t] * (output - wanted).square().mean(dim=(1, 2, 3))
