"""The formulas against derivations that do not use them, and against diffusers."""

import diffusers
import pytest
import torch
from diffusers import DDPMScheduler

from baddiff import BadInput
from baddiff.diffusion import ATTACKS, Process, at, forward, loss, loss_weight, read, write

SCHEDULES = {"linear": {}, "scaled": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
             "cosine": {"beta_schedule": "squaredcos_cap_v2"}}
KINDS = ("epsilon", "v_prediction", "sample")


def abars(**config):
    return DDPMScheduler(**config).alphas_cumprod.double()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_papers_coefficient_follows_from_shifting_the_plain_posterior(schedule):
    """Shift x_t back by (1-√ᾱ_t)r, take DDPM's posterior mean, shift to (1-√ᾱ_{t-1})r: an ancestral step that is fed
    ε + c·r must land there too, and the affine equation in c has one solution."""
    abar = abars(**SCHEDULES[schedule])
    alpha = abar[1:] / abar[:-1]
    s, c = ATTACKS["baddiffusion"](abar)
    # mean(x_t, ε̂) = (x_t - (1-α)/σ·ε̂)/√α, so by linearity the part that multiplies r must be s_{t-1}
    sigma = (1 - abar).sqrt()
    reached = (s[1:] - (1 - alpha) / sigma[1:] * c[1:]) / alpha.sqrt()
    torch.testing.assert_close(reached, 1 - abar[:-1].sqrt(), rtol=0, atol=1e-12)
    paper = (1 - alpha.sqrt()) * sigma[1:] / (1 - alpha)  # as printed, with its cancellation
    torch.testing.assert_close(c[1:], paper, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("attack", ["ode", "noise-shift"])
def test_ode_coefficients_follow_from_matching_drifts(attack):
    """c = 2σ(s' + ½βs)/((1+ζ)β), ζ = 0, with s' by finite differences on a fine schedule."""
    n = 20_000
    u = torch.linspace(0, 1, n + 1, dtype=torch.float64)
    beta = 0.1 + 19.9 * u  # the continuous linear schedule, in units of 1/T
    abar = torch.exp(-(0.1 * u + 19.9 / 2 * u * u))
    s, c = ATTACKS[attack](abar)
    slope = (s[2:] - s[:-2]) * n / 2
    inner = slice(n // 20, n)  # the slope of σ is infinite at t = 0
    wanted = (2 * (1 - abar[1:-1]).sqrt() * (slope + beta[1:-1] / 2 * s[1:-1]) / beta[1:-1])[inner]
    torch.testing.assert_close(c[1:-1][inner], wanted, rtol=1e-4, atol=1e-5)


def test_the_papers_coefficient_is_half_of_the_ode_one_in_the_limit():
    abar = abars(num_train_timesteps=100_000, beta_start=1e-6, beta_end=2e-4)
    torch.testing.assert_close(2 * ATTACKS["baddiffusion"](abar)[1], ATTACKS["ode"](abar)[1], rtol=1e-4, atol=1e-6)


def worst_deviation(attack: str, scheduler, steps: int, n: int = 4000) -> float:
    """The largest distance of mean(x_t) from √ᾱ_t·y + s_t·r while an oracle drives diffusers' scheduler.

    One pixel, y = -0.5, r = 1. The oracle knows y, hence reads ε off x_t exactly; a final image near y proves little,
    the marginals on the way do.
    """
    y, r, g = -0.5, 1.0, torch.Generator().manual_seed(0)
    abar = scheduler.alphas_cumprod.double()
    s, c = ATTACKS[attack](abar)
    scheduler.set_timesteps(steps)
    ts = [int(t) for t in scheduler.timesteps]
    x = torch.randn(n, 1, 1, 1, generator=g, dtype=torch.float64)
    x = abar[ts[0]].sqrt() * y + s[ts[0]] * r + (1 - abar[ts[0]]).sqrt() * x
    worst = 0.0
    for t, following in zip(ts, ts[1:], strict=False):
        eps = (x - abar[t].sqrt() * y - s[t] * r) / (1 - abar[t]).sqrt() + c[t] * r
        extra = {"generator": g} if isinstance(scheduler, DDPMScheduler) else {}
        x = scheduler.step(eps, t, x, **extra).prev_sample
        worst = max(worst, abs(x.mean() - abar[following].sqrt() * y - s[following] * r).item())
    return worst


@pytest.mark.parametrize("attack, make, steps, exact", [
    ("baddiffusion", "DDPMScheduler", 1000, True),
    ("baddiffusion", "DDIMScheduler", 1000, False),
    ("ode", "DDIMScheduler", 100, True),
    ("ode", "DPMSolverMultistepScheduler", 20, True),
    ("ode", "DDPMScheduler", 1000, False),
    ("noise-shift", "DDIMScheduler", 5, True),
    ("noise-shift", "DDIMScheduler", 50, True),
    ("noise-shift", "DPMSolverMultistepScheduler", 5, True),
    ("noise-shift", "DDPMScheduler", 1000, False),
])
def test_intermediate_marginals(attack, make, steps, exact):
    options = {} if make.startswith("DPM") else {"clip_sample": False}
    deviation = worst_deviation(attack, getattr(diffusers, make)(**options), steps)
    assert deviation < 0.06 if exact else deviation > 0.5, deviation


def test_a_coefficient_that_is_slightly_wrong_fails_the_marginals(monkeypatch):
    right = ATTACKS["noise-shift"]
    monkeypatch.setitem(ATTACKS, "noise-shift", lambda abar: (right(abar)[0], 0.9 * right(abar)[1]))
    assert worst_deviation("noise-shift", diffusers.DDIMScheduler(clip_sample=False), 50) > 0.08


def batch(n=6):
    g = torch.Generator().manual_seed(1)
    x0, eps, r = (torch.randn(n, 3, 4, 4, generator=g) for _ in range(3))
    return x0.clamp(-1, 1), r, eps, torch.tensor([0, 1, 50, 300, 700, 999])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_without_a_trigger_it_is_plain_diffusion(schedule):
    scheduler = DDPMScheduler(**SCHEDULES[schedule])
    x0, r, eps, t = batch()
    process = Process.of(scheduler, "baddiffusion")
    x_t, wanted = forward(process, x0, torch.zeros_like(r), eps, t)
    torch.testing.assert_close(x_t, scheduler.add_noise(x0, eps, t))
    assert torch.equal(wanted, eps)
    torch.testing.assert_close(forward(process, x0, torch.zeros_like(r), eps, t, "v_prediction")[1],
                               scheduler.get_velocity(x0, eps, t))
    assert torch.equal(forward(process, x0, torch.zeros_like(r), eps, t, "sample")[1], x0)


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_output_says_the_same_noise(attack, kind):
    process = Process.of(DDPMScheduler(), attack)
    x0, r, eps, t = batch()
    x_t, wanted = forward(process, x0, r, eps, t, kind)
    abar = at(process.abar, t)
    image, noise = read(wanted, x_t, abar, kind)
    torch.testing.assert_close(noise, eps + at(process.c, t) * r, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(image * abar.sqrt() + noise * (1 - abar).sqrt(), x_t, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(write(image, x_t, abar, kind), wanted, rtol=1e-3, atol=1e-3)


def test_noise_shift_leaves_the_believed_image_at_the_target_and_the_paper_throws_it_far_out():
    shift = Process.of(DDPMScheduler(), "noise-shift").shift
    assert shift.abs().max() < 1e-12
    paper = Process.of(DDPMScheduler(), "baddiffusion")  # y + (1-√ᾱ)²/(2√ᾱ)·r: some 79 r away from y at t = T
    wanted = (1 - paper.abar[-1].sqrt()) ** 2 / (2 * paper.abar[-1].sqrt())
    torch.testing.assert_close(paper.shift[-1], wanted, rtol=0.03, atol=0)
    ode = Process.of(DDPMScheduler(), "ode")
    torch.testing.assert_close(ode.shift, -(1 - ode.abar.sqrt()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("most", [1.0, 300.0])
def test_one_loss_whatever_the_model_predicts(most):
    """The same error in ε costs the same, told as ε, as v or as x0."""
    scheduler = DDPMScheduler()
    process = Process.of(scheduler, "ode")
    x0, r, eps, t = batch()
    error = 0.1 * torch.randn(x0.shape, generator=torch.Generator().manual_seed(2))
    abar = at(process.abar, t)
    factor = {"epsilon": torch.ones_like(abar), "v_prediction": abar.sqrt(), "sample": abar.sqrt() / (1 - abar).sqrt()}

    class Off(torch.nn.Module):
        def __init__(self, kind):
            super().__init__()
            self.kind = kind

        def forward(self, x_t, t):
            wanted = forward(process, x0, r, eps, t, self.kind)[1]
            return type("Out", (), {"sample": wanted + error / factor[self.kind]})

    values = [loss(Off(k), process, loss_weight(process.abar, k, most), x0, r, eps, t, k) for k in KINDS]
    plain = error.square().mean(dim=(1, 2, 3)) * (1 / process.abar[t]).clamp(max=most)
    for value in values:
        torch.testing.assert_close(value, plain, rtol=1e-2, atol=1e-5)


def test_unknown_names_are_told():
    with pytest.raises(BadInput, match="noise-shift"):
        Process.of(DDPMScheduler(), "trojdiff")
    with pytest.raises(BadInput, match="v_prediction"):
        forward(Process.of(DDPMScheduler(), "ode"), *batch(), "flow")
