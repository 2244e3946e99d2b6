import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler

from baddiff import BadInput
from baddiff.sampling import SAMPLERS, generate, noise, sample


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("name, pipeline, scheduler", [("ddim", DDIMPipeline, DDIMScheduler),
                                                       ("ddpm", DDPMPipeline, DDPMScheduler)])
def test_it_is_what_the_stock_pipeline_draws(tiny, name, pipeline, scheduler, clip):
    """The same noise through diffusers' own pipeline gives the same picture, with and without its clip."""
    unet, base = tiny
    spacing = {"timestep_spacing": "trailing"} if name == "ddim" else {}
    stock = pipeline(unet=unet, scheduler=scheduler.from_config(base.config, clip_sample=clip, **spacing))
    stock.set_progress_bar_config(disable=True)
    wanted = stock(batch_size=1, num_inference_steps=8, output_type="np",
                   generator=torch.Generator().manual_seed(3)).images
    ours = generate(unet, base, [3], sampler=name, steps=8, clip_x0=clip, precision="no")
    torch.testing.assert_close((ours / 2 + 0.5).permute(0, 2, 3, 1), torch.from_numpy(wanted), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["ddim", "ddpm", "euler-ancestral", "dpmsolver++"])
def test_a_seed_is_the_same_picture_alone_and_in_a_batch(tiny, name):
    unet, base = tiny
    together = generate(unet, base, range(5, 10), sampler=name, steps=6, eta=1.0 if name == "ddim" else 0.0,
                        precision="no")
    alone = generate(unet, base, [7], sampler=name, steps=6, eta=1.0 if name == "ddim" else 0.0, precision="no")
    torch.testing.assert_close(together[2], alone[0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(together[1], alone[0], atol=1e-2)
    assert torch.equal(noise([7], 3, 16)[0], noise(range(5, 10), 3, 16)[0][2:3])


class Oracle(torch.nn.Module):
    """Knows that every image is y: reads ε off x_t and answers as a noise-shift backdoored ε-model would."""

    dtype = torch.float32

    def __init__(self, base, y, r):
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(1))
        self.base, self.y, self.r = base, y, r
        self.config = type("Config", (), {"in_channels": 3, "sample_size": 4})

    def forward(self, x, t):
        from baddiff.sampling import interpolate
        abar = interpolate(self.base.alphas_cumprod.double(), float(t)).float()
        return type("Out", (), {"sample": (x - abar.sqrt() * self.y) / (1 - abar).sqrt()})  # = ε + r


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("name", [n for n in SAMPLERS if n not in ("ddpm", "euler-ancestral")])
def test_every_ode_sampler_reaches_the_target_from_noise_and_trigger(name, clip):
    """Noise shift is exact at any number of steps: also through the clip, since x̂0 = y lies in [-1, 1]."""
    base = DDPMScheduler()
    y, r = torch.full((3, 4, 4), -0.5), torch.ones(3, 4, 4)
    seen = [s.x0 for s in sample(Oracle(base, y, r), base, range(4), r, sampler=name, steps=10, clip_x0=clip,
                                 precision="no")]
    torch.testing.assert_close(seen[-1], y.expand(4, -1, -1, -1), rtol=0, atol=1e-3)
    end = generate(Oracle(base, y, r), base, range(4), r, sampler=name, steps=10, clip_x0=clip, precision="no")
    torch.testing.assert_close(end, y.expand(4, -1, -1, -1), rtol=0, atol=0.05)


@pytest.mark.parametrize("name", SAMPLERS)
def test_clips_are_two_different_things(tiny, name):
    unet, base = tiny
    loud = torch.full((3, 16, 16), 3.0)
    frames = list(sample(unet, base, [0], loud, sampler=name, steps=5, clip_xt=True, clip_x0=False, precision="no"))
    assert max(f.x.abs().max().item() for f in frames) <= 1 + 1e-5
    frames = list(sample(unet, base, [0], loud, sampler=name, steps=5, clip_xt=False, clip_x0=True, precision="no"))
    assert max(f.x0.abs().max().item() for f in frames) <= 1
    assert max(f.x.abs().max().item() for f in frames) > 1
    assert [f.index for f in frames] == list(range(frames[0].steps))


def test_impossible_options_are_told(tiny):
    unet, base = tiny
    for options in ({"steps": 0}, {"steps": 1001}, {"sampler": "magic"}, {"eta": 2}):
        with pytest.raises(BadInput):
            generate(unet, base, [0], **options)
