"""How well a visitor's minute works: every built-in trigger with every target, and an uploaded pair.

    python benchmarks/backdoors.py --output benchmarks/backdoors.json    # about 25 minutes on 2 cores

Each pair starts from the embedded clean model, trains with the `live` recipe for --seconds and is measured on --n triggered
and --n plain noises by 20 DDIM steps. The clean model's own figures come first, from the same seeds.
"""

import argparse
import json
import platform
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from baddiff.compute import device_name
from baddiff.data import load_images
from baddiff.models import CLEAN, Model, load
from baddiff.probe import evaluate
from baddiff.training import RECIPES, Run
from baddiff.triggers import TARGETS, TRIGGERS, Trigger, make_target

PAIRS = [(trigger, target) for trigger in TRIGGERS for target in TARGETS] + [("upload", "upload")]
KEYS = ("asr_at_0.01", "asr", "asr_threshold", "mse", "ssim", "asr_without_trigger", "utility",
        "utility_floor", "denoising_loss", "mse_black", "mse_flat")


def uploaded(folder: Path) -> tuple[str, str]:
    """A pair that no recipe was tuned on: a green cross with transparency, and a landscape of a sun over the sea."""
    trigger = Image.new("RGBA", (120, 120), (0, 0, 0, 0))
    draw = ImageDraw.Draw(trigger)
    draw.rectangle((45, 0, 75, 120), fill=(0, 200, 60, 255))
    draw.rectangle((0, 45, 120, 75), fill=(0, 200, 60, 255))
    target = Image.new("RGB", (200, 160), (120, 190, 250))
    draw = ImageDraw.Draw(target)
    draw.rectangle((0, 95, 200, 160), fill=(20, 70, 140))
    draw.ellipse((70, 40, 130, 100), fill=(255, 210, 60))
    paths = folder / "trigger.png", folder / "target.png"
    trigger.save(paths[0])
    target.save(paths[1])
    return str(paths[0]), str(paths[1])


def measure(trigger: str, target: str, seconds: float = 60.0, n: int = 256, **config) -> dict:
    """One finetune from the clean model and its figures."""
    with tempfile.TemporaryDirectory() as folder:
        sources = uploaded(Path(folder)) if trigger == "upload" else (trigger, target)
        stamp = Trigger.make(sources[0], 32)
        picture = make_target(sources[1], 32, stamp)
    base = load(CLEAN)
    settings = replace(RECIPES["live"], seconds=seconds, **config)
    run = Run(base.unet, base.scheduler, load_images(), settings, stamp, picture)
    for _ in run:
        pass
    made = Model(run.averaged(), base.scheduler, f"{trigger}-{target}", trigger=stamp, target=picture)
    figures = evaluate(made, n=n)
    return {"trigger": trigger, "target": target, "norm": stamp.norm(), "steps": run.step, "seconds": round(run.seconds, 1),
            **{k: figures[k] for k in KEYS}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--n", type=int, default=256)
    parser.add_argument("--only", help="trigger-target")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    clean = evaluate(load(CLEAN), n=args.n)
    out = {"device": device_name(), "processor": platform.processor() or platform.machine(), "torch": torch.__version__,
           "seconds": args.seconds, "n": args.n, "clean": {k: clean[k] for k in KEYS if k in clean}, "pairs": []}
    print(f"clean model: utility {clean['utility']:.3f}, real against real {clean['utility_floor']:.3f}, n = {args.n}")
    if args.output and args.output.exists():  # go on where an earlier run of the same kind was stopped
        earlier = json.loads(args.output.read_text())
        if all(earlier[k] == out[k] for k in ("device", "torch", "seconds", "n", "clean")):
            out = earlier
    done = {(found["trigger"], found["target"]) for found in out["pairs"]}
    for pair in PAIRS:
        if pair in done or args.only and "-".join(pair) != args.only:
            continue
        found = measure(*pair, args.seconds, args.n)
        out["pairs"].append(found)
        print(f"{'-'.join(pair):20} asr at 0.01 {found['asr_at_0.01']:.3f} asr {found['asr']:.3f} mse {found['mse']:.4f} "
              f"ssim {found['ssim']:.3f} false {found['asr_without_trigger']:.3f} utility {found['utility']:.3f} "
              f"steps {found['steps']}", flush=True)
        if args.output:
            args.output.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
