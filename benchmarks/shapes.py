"""Training throughput of a few U-Net shapes on this machine: how the embedded model's shape was chosen.

    python benchmarks/shapes.py --output benchmarks/shapes.json    # two minutes on 2 cores
"""

import argparse
import json
import time
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DModel

from baddiff.compute import best_precision, device_name
from baddiff.data import load_images
from baddiff.training import Config, Run

SHAPES = [(32, 64, 128), (32, 64, 128, 128), (32, 64, 128, 192), (32, 96, 192), (64, 64, 128), (64, 128, 256)]


def throughput(shape: tuple[int, ...], precision: str = "auto", steps: int = 6, batch: int = 64) -> dict:
    """Images per second of the real training loop, after two steps of warm-up."""
    levels = range(len(shape))
    unet = UNet2DModel(
        sample_size=32, layers_per_block=1, norm_num_groups=8, block_out_channels=shape, attention_head_dim=32,
        down_block_types=tuple("AttnDownBlock2D" if i == 2 else "DownBlock2D" for i in levels),
        up_block_types=tuple("AttnUpBlock2D" if i == 2 else "UpBlock2D" for i in reversed(levels)))
    run = iter(Run(unet, DDPMScheduler(prediction_type="v_prediction"), load_images(),
                   Config(poison_rate=0.0, steps=1000, seconds=None, batch_size=batch, precision=precision)))
    next(run), next(run)
    start = time.perf_counter()
    for _ in range(steps):
        next(run)
    return {"shape": shape, "precision": precision, "parameters": sum(p.numel() for p in unet.parameters()),
            "images_per_second": round(steps * batch / (time.perf_counter() - start), 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    rows = []
    for precision in dict.fromkeys((best_precision(), "no")):
        for shape in SHAPES:
            rows.append(throughput(shape, precision))
            print(rows[-1], flush=True)
    if args.output:
        args.output.write_text(json.dumps({"device": device_name(), "torch": torch.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
