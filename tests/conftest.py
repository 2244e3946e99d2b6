import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the suite needs no network, and says so

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel

from baddiff.training import Config
from baddiff.triggers import Trigger, make_target


@pytest.fixture
def tiny():
    """A U-Net that trains in milliseconds, with a schedule of its own: (unet, scheduler) at 16 px, 3 channels."""
    torch.manual_seed(0)
    unet = UNet2DModel(sample_size=16, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
                       down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, attention_head_dim=8)
    return unet, DDPMScheduler(prediction_type="v_prediction")


@pytest.fixture
def images():
    return torch.randint(0, 256, (64, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.fixture
def trigger():
    return Trigger.make("box", 16)


@pytest.fixture
def target(trigger):
    return make_target("cat", 16, trigger)


@pytest.fixture
def config():
    return Config(steps=6, seconds=None, batch_size=8, warmup=2, precision="no")
