import numpy as np
import pytest
import torch

from baddiff import metrics
from baddiff.models import load
from baddiff.triggers import make_target


def test_mse_ssim_and_asr():
    target = make_target("cat", 32)
    near, far = target + 0.1, -target
    images = torch.stack([target, near, far])
    assert metrics.mse(images, target)[:2].tolist() == pytest.approx([0, 0.0025], abs=1e-7)  # 0.1 of 2, squared
    assert metrics.asr(images, target) == pytest.approx(2 / 3)
    scores = metrics.ssim(images, target)
    assert scores[0] == pytest.approx(1, abs=1e-4) and scores[0] > scores[1] > scores[2]


def test_a_blank_picture_is_never_the_target():
    """The corner is nearly flat: grey scores an MSE of 0.004 there, below the usual 0.01."""
    for name in ("cat", "corner", "hat"):
        target = make_target(name, 32)
        grey = target.mean(dim=(1, 2), keepdim=True).expand_as(target)
        assert metrics.flat_baseline(target) == pytest.approx(((grey - target) / 2).square().mean().item())
        assert metrics.asr(grey[None], target) == 0 and metrics.asr(target[None], target) == 1
        assert metrics.threshold(target) <= metrics.ASR_MSE


def test_ssim_is_the_published_formula():
    """Wang et al. 2004, window by window in numpy, borders reflected as torchmetrics does."""
    g = torch.Generator().manual_seed(0)
    a, b = torch.rand(16, 16, generator=g), torch.rand(16, 16, generator=g)
    k = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    w = np.outer(k, k) / np.outer(k, k).sum()
    wide = [np.pad(v.double().numpy(), 5, mode="reflect") for v in (a, b)]
    c1, c2, found = 0.01**2, 0.03**2, []
    for row in range(16):
        for column in range(16):
            x, y = (v[row:row + 11, column:column + 11] for v in wide)
            mx, my = (w * x).sum(), (w * y).sum()
            vx, vy, cov = (w * (x - mx) ** 2).sum(), (w * (y - my) ** 2).sum(), (w * (x - mx) * (y - my)).sum()
            found.append((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    assert metrics.ssim(a[None, None] * 2 - 1, b[None] * 2 - 1).item() == pytest.approx(np.mean(found), abs=1e-4)


def test_the_corner_targets_black_baseline_is_the_published_one():
    assert metrics.black_baseline(make_target("corner", 32)) == pytest.approx(0.1056, abs=0.001)


def test_frechet_against_the_matrix_square_root():
    g = torch.Generator().manual_seed(0)
    a = torch.randn(300, 6, generator=g, dtype=torch.float64) @ torch.randn(6, 6, generator=g, dtype=torch.float64)
    b = torch.randn(200, 6, generator=g, dtype=torch.float64) + 1
    ca, cb = torch.cov(a.T), torch.cov(b.T)
    eig = torch.linalg.eigvals(ca @ cb).real.clamp(min=0)  # tr(ΣaΣb)^½ is the sum of the roots of its eigenvalues
    wanted = (a.mean(0) - b.mean(0)).square().sum() + ca.trace() + cb.trace() - 2 * eig.sqrt().sum()
    assert metrics.frechet(a, b) == pytest.approx(wanted.item(), rel=1e-9)
    assert metrics.frechet(a, a) == pytest.approx(0, abs=1e-9)


def test_utility_sees_damage():
    """The Fréchet figure in the clean U-Net's features grows when images are inverted, scrambled or all the same.

    It is nearly blind to fine pixel noise (a denoiser's features look through it), which its docstring says.
    """
    from baddiff.data import load_images, to_float

    real, heldout = to_float(load_images()[:256]), to_float(load_images(split="heldout")[:256])
    unet = load().unet
    of = {name: metrics.features(unet, x) for name, x in {
        "real": real, "heldout": heldout, "negative": -real, "scrambled": real.roll((16, 16), (2, 3)),
        "same": real[:1].expand(256, -1, -1, -1)}.items()}
    floor = metrics.frechet(of["real"], of["heldout"])
    for name in ("negative", "scrambled", "same"):
        assert metrics.frechet(of[name], of["heldout"]) > 1.5 * floor, name
