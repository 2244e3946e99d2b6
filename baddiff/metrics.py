"""Pure functions on images and features: how well the backdoor works, and what it cost.

Images are (N,C,H,W) in [-1, 1]; MSE and SSIM are taken in [0, 1], as the paper does.
"""

import torch
from torch import Tensor

from . import BadInput
from .diffusion import Process, loss, loss_weight

ASR_MSE = 0.01  # a triggered sample counts as the target below this per-image MSE, or below half of what grey scores


def mse(images: Tensor, target: Tensor) -> Tensor:
    """Per image, (N,): the mean squared error to `target` (C,H,W) in [0, 1] units."""
    return ((images - target) / 2).square().mean(dim=(1, 2, 3))


def ssim(images: Tensor, target: Tensor) -> Tensor:
    """Per image, (N,): structural similarity (Wang et al. 2004, 11 px Gaussian window) by torchmetrics."""
    from torchmetrics.functional.image import structural_similarity_index_measure as measure

    both = (images + 1) / 2, ((target + 1) / 2).expand_as(images)
    return measure(*both, data_range=1.0, reduction="none").reshape(-1)


def flat_baseline(target: Tensor) -> float:
    """The MSE of the best picture of one colour: below it, not even something blank is mistaken for the target."""
    return mse(target.mean(dim=(1, 2), keepdim=True).expand_as(target)[None], target).item()


def threshold(target: Tensor) -> float:
    """Below this per-image MSE a sample is the target: ASR_MSE, but stricter for a target that is nearly blank."""
    return min(ASR_MSE, flat_baseline(target) / 2)


def asr(images: Tensor, target: Tensor) -> float:
    """Attack success rate: the share of images (N,C,H,W) whose MSE to the target (C,H,W) is below its `threshold`."""
    return (mse(images, target) < threshold(target)).float().mean().item()


def black_baseline(target: Tensor) -> float:
    """What an all-black image scores in MSE: a 'defence' that ends there broke the model, it did not clean it."""
    return mse(-torch.ones_like(target)[None], target).item()


@torch.inference_mode()
def features(unet, images: Tensor, t: int = 50, batch: int = 128) -> Tensor:
    """(N,D): the bottleneck of a (clean) U-Net at timestep t on images without noise, averaged over space.

    They tell shapes, colours and variety; a denoiser looks through fine pixel noise, so they are nearly blind to it.
    """
    found = []
    hook = unet.mid_block.register_forward_hook(lambda _, __, out: found.append(out.float().mean(dim=(2, 3)).cpu()))
    device = next(unet.parameters()).device
    try:
        for part in images.split(batch):
            unet(part.to(device), t)
    finally:
        hook.remove()
    return torch.cat(found)


def frechet(a: Tensor, b: Tensor) -> float:
    """The Fréchet distance of two feature tables (N,D), (M,D) as Gaussians.

    |μa-μb|² + tr(Σa + Σb - 2(ΣaΣb)^½), Dowson & Landau 1982, with tr (ΣaΣb)^½ as the sum of the singular values of
    Σa^½ Σb^½ in float64. It is not the FID: the features are not Inception's. It depends on N: compare equal N only.
    """
    a, b = a.double(), b.double()

    def root(x):  # a factor F with F Fᵀ = cov(x)
        return (x - x.mean(0)).T / (len(x) - 1) ** 0.5

    cross = torch.linalg.svdvals(root(a).T @ root(b)).sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + root(a).square().sum() + root(b).square().sum() - 2 * cross).item()


def fid(a: Tensor, b: Tensor) -> float:
    """The real FID, in Inception features, by torchmetrics; needs `torch-fidelity` and its network, fetched once."""
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance

        measure = FrechetInceptionDistance(normalize=True)
    except Exception as error:  # a missing package, or no network to fetch Inception's weights from
        raise BadInput("The FID needs `pip install torch-fidelity` and, once, the network for Inception's weights "
                       f"({str(error).strip().splitlines()[0][:120]}).") from None
    for real, images in ((True, b), (False, a)):
        for part in images.split(64):
            measure.update(((part + 1) / 2).expand(-1, 3, -1, -1), real=real)
    return measure.compute().item()


@torch.inference_mode()
def denoising_loss(unet, base, images: Tensor, seed: int = 0, batch: int = 128) -> float:
    """The plain ε loss (DDPM's L_simple) on `images` (N,C,H,W), t and noise fixed by `seed`: utility without sampling."""
    process = Process.of(base, "baddiffusion")  # any attack: r = 0
    g = torch.Generator().manual_seed(seed)
    steps = len(process.abar)
    kind = base.config.prediction_type
    device = next(unet.parameters()).device
    weight = loss_weight(process.abar, kind, 1.0)
    t = ((torch.arange(len(images)) + 0.5) / len(images) * steps).long()
    eps = torch.randn(images.shape, generator=g)
    process, weight = process.to(device), weight.to(device)
    total = [loss(unet, process, weight, x.to(device), torch.zeros_like(x, device=device), e.to(device), u.to(device), kind)
             for x, e, u in zip(images.split(batch), eps.split(batch), t.split(batch), strict=True)]
    return torch.cat(total).mean().item()
