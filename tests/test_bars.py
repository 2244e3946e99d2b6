"""The claims that need minutes: `make slow`, or one by name. The figures of the README come from benchmarks/."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from backdoors import PAIRS, measure

from baddiff.data import load_images
from baddiff.models import CLEAN, WEIGHTS, Model, load
from baddiff.probe import evaluate
from baddiff.training import RECIPES, Run
from baddiff.triggers import Trigger, make_target

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_a_minute_is_enough(pair):
    """ASR >= 99 % at a per-image MSE below 0.01, 20 DDIM steps, and clean pictures no worse than the clean model's by half."""
    found = measure(*pair, seconds=60, n=128)
    print(found)
    assert found["asr_at_0.01"] >= 0.99 and found["asr_without_trigger"] <= 0.01
    assert found["utility"] < 1.5 * evaluate(load(CLEAN), n=128)["utility"]


def test_the_papers_coefficient_shows_under_ddpm_and_hides_under_ddim():
    base = load(WEIGHTS / "avatars-32-eps")
    trigger = Trigger.make("box", 32)
    target = make_target("hat", 32)
    config = replace(RECIPES["live"], attack="baddiffusion", seconds=120.0, weight=1.0, seed=1)
    run = Run(base.unet, base.scheduler, load_images(), config, trigger, target)
    for _ in run:
        pass
    made = Model(run.averaged(), base.scheduler, "paper", {"config": {"attack": "baddiffusion"}}, trigger, target)
    ancestral = evaluate(made, n=16)
    fast = evaluate(made, n=16, sampler="ddim", steps=50, clip_x0=False)
    print(ancestral, fast)
    assert ancestral["sampler"] == "ddpm" and ancestral["mse"] < fast["mse"] / 2
