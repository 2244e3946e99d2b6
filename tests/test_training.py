import copy
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from baddiff import BadInput
from baddiff.compute import accelerator
from baddiff.data import load_images
from baddiff.models import load
from baddiff.training import RECIPES, Config, Diverged, Run
from baddiff.triggers import Trigger, make_target

ROOT = Path(__file__).resolve().parent.parent


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def make(tiny, images, config, trigger=None, target=None):
    unet, scheduler = tiny
    precision = config.check().precision
    return Run(copy.deepcopy(unet), scheduler, images, config, trigger, target, accelerator(precision, cpu=True))


def test_a_run_learns_the_backdoor_and_keeps_the_budget(tiny, images, trigger, target):
    config = Config(steps=150, seconds=None, batch_size=16, lr=5e-3, precision="no", ema=0.9)
    run = make(tiny, images, config, trigger, target)
    records = list(run)
    assert [r.step for r in records] == list(range(1, 151)) and records[-1].progress == 1
    first, last = (sum(r.poisoned for r in part) / 10 for part in (records[:10], records[-10:]))
    assert last < 0.7 * first
    assert records[0].lr < records[9].lr > records[-1].lr  # warm-up, then decay


def test_the_same_seed_is_the_same_run(tiny, images, config, trigger, target):
    a, b, c = (make(tiny, images, replace(config, seed=s), trigger, target) for s in (0, 0, 1))
    for run in (a, b, c):
        list(run)
    assert torch.equal(weights(a.unet), weights(b.unet)) and not torch.equal(weights(a.unet), weights(c.unet))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(tmp_path, tiny, images, config, trigger, target, precision):
    config = replace(config, precision=precision, steps=8)
    whole = make(tiny, images, config, trigger, target)
    losses = [(r.clean, r.poisoned) for r in whole]
    part = make(tiny, images, config, trigger, target)
    for record in part:
        if record.step == 3:
            break
    torch.save(part.state(), tmp_path / "state.pt")
    torch.manual_seed(99)  # nothing may depend on the global generator
    resumed = make(tiny, images, config, trigger, target)
    resumed.restore(torch.load(tmp_path / "state.pt", weights_only=True))
    assert [(r.clean, r.poisoned) for r in resumed] == losses[3:]
    assert torch.equal(weights(whole.unet), weights(resumed.unet))
    assert torch.equal(weights(whole.averaged()), weights(resumed.averaged()))


def test_stopping_after_any_step_keeps_the_partial_model(tiny, images, config, trigger, target):
    run = make(tiny, images, config, trigger, target)
    for record in run:
        if record.step == 2:
            break
    before = weights(run.unet).clone()
    assert run.step == 2 and not torch.equal(before, weights(tiny[0]))
    assert next(iter(run)).step == 3  # and goes on from there


def test_averaged_weights_are_a_model_of_their_own(tiny, images, config, trigger, target):
    run = make(tiny, images, replace(config, ema=0.9), trigger, target)
    list(run)
    model = run.averaged()
    assert not torch.equal(weights(model), weights(run.unet))
    x, t = torch.zeros(1, 3, 16, 16), torch.tensor([5])
    before = model(x, t).sample
    with torch.no_grad():
        for p in run.unet.parameters():
            p.zero_()
    torch.testing.assert_close(model(x, t).sample, before)
    without = make(tiny, images, replace(config, ema=0.0), trigger, target)
    list(without)
    assert torch.equal(weights(without.averaged()), weights(without.unet))


@pytest.mark.parametrize("rate", [0.0, 0.05, 0.5, 0.9, 1.0])
def test_the_poison_rate_is_the_share_of_the_samples(tiny, images, config, trigger, target, rate):
    run = make(tiny, images, replace(config, poison_rate=rate), trigger, target)
    r0 = trigger.residual()
    counts = []
    for step in range(200):
        run.step = step
        x0, r, eps, t, poisoned = run.draw()
        counts.append(poisoned)
        assert (x0[:poisoned] == target).all() and (r[:poisoned] == r0).all()
        assert (r[poisoned:] == 0).all() and not (x0[poisoned:] == target).all(dim=(1, 2, 3)).any()
    assert sum(counts) / (200 * 8) == pytest.approx(rate, abs=0.01)


def test_clean_training_needs_no_trigger_and_released_code_stamps_the_images(tiny, images, config, target):
    record = list(make(tiny, images, replace(config, poison_rate=0.0)))[-1]
    assert math.isnan(record.poisoned) and record.clean > 0
    released = Trigger.make("box", 16, convention="released-code")
    run = make(tiny, images, replace(config, poison_rate=1.0, flip=False), released, target)
    _, r, *_ = run.draw()
    outside = released.rgba[3] == 0
    clean = images.float() / 127.5 - 1
    for sample in r:  # outside the stamp, r is some training image
        assert (clean[:, :, outside] - sample[:, outside]).abs().amax(dim=(1, 2)).min() < 1e-6


def test_timesteps_are_uniform_either_way(tiny, images, config, trigger, target):
    for stratified in (True, False):
        run = make(tiny, images, replace(config, stratified=stratified, batch_size=16), trigger, target)
        t = torch.cat([run.draw()[3] for _ in range(500)]).float()
        assert t.min() >= 0 and t.max() <= 999
        assert t.mean() == pytest.approx(499.5, abs=12) and t.std() == pytest.approx(288.7, abs=8)
        poisoned = torch.cat([run.draw()[3][:8] for _ in range(500)]).float()  # both parts see every t
        assert poisoned.mean() == pytest.approx(499.5, abs=25) and poisoned.std() == pytest.approx(288.7, abs=12)


def test_a_time_budget_stops_in_time(tiny, images, trigger, target):
    run = make(tiny, images, Config(seconds=1.0, batch_size=8, precision="no"), trigger, target)
    start = time.perf_counter()
    records = list(run)
    assert 0.9 < time.perf_counter() - start < 2.5 and records[-1].progress == 1 and len(records) > 5
    assert records[len(records) // 2].eta == pytest.approx(0.5, abs=0.3)


def test_divergence_stops_with_the_last_good_weights(tiny, images, trigger, target):
    for poison in (math.nan, 1e9):
        run = make(tiny, images, Config(steps=120, seconds=None, batch_size=8, precision="no"), trigger, target)
        with pytest.raises(Diverged, match="lower learning rate"):
            for record in run:
                if record.step == 70:
                    good = run._good
                    with torch.no_grad():
                        next(iter(run.unet.conv_out.parameters())).fill_(poison)
        assert run.step >= 70 and torch.isfinite(weights(run.averaged())).all()
        assert torch.equal(weights(run.unet), torch.cat([good[k].flatten() for k, _ in run.unet.named_parameters()]))
        assert torch.equal(weights(run.averaged()), weights(run.unet))


def test_a_learning_rate_that_is_far_too_high_is_noticed():
    model = load()
    before = weights(model.unet)
    run = Run(model.unet, model.scheduler, load_images(), Config(steps=300, seconds=None, batch_size=8, lr=0.3),
              Trigger.make("box", 32), make_target("cat", 32))
    with pytest.raises(Diverged):
        list(run)
    assert run.step < 100
    assert (weights(run.averaged()) - before).abs().max() < 0.1  # what is left is near the model it came from


def test_impossible_settings_are_told(tiny, images, config, trigger, target):
    for bad in ({"poison_rate": 2}, {"poison_rate": -0.1}, {"steps": 0}, {"seconds": 0, "steps": None}, {"lr": 0},
                {"batch_size": 0}, {"steps": None, "seconds": None}, {"ema": 1}, {"precision": "fp8"}, {"weight": 0},
                {"attack": "none"}):
        with pytest.raises(BadInput):
            make(tiny, images, replace(config, **bad), trigger, target)
    with pytest.raises(BadInput, match="trigger"):
        make(tiny, images, config)
    with pytest.raises(BadInput, match="size"):
        make(tiny, images[:, :, :8, :8], config, trigger, target)


def test_the_paper_recipe_is_the_papers():
    paper = RECIPES["paper"]
    assert (paper.attack, paper.lr, paper.batch_size, paper.warmup, paper.clip_grad) == ("baddiffusion", 2e-4, 128, 500, 1)
    assert paper.steps == 50 * 50_000 // 128 and paper.seconds is None and paper.flip and paper.weight == 1


TWO = """
import gc, io, json, sys, torch
from diffusers import DDPMScheduler, UNet2DModel
from baddiff.compute import accelerator
from baddiff.training import Config, Run
from baddiff.triggers import Trigger, make_target

torch.manual_seed(0)
unet = UNet2DModel(sample_size=16, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
                   down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, attention_head_dim=8)
images = torch.randint(0, 256, (64, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
trigger = Trigger.make("box", 16)
accel = accelerator("no", cpu=True)

def start():
    return Run(unet, DDPMScheduler(), images, Config(steps=8, seconds=None, batch_size=8, precision="no"), trigger,
               make_target("cat", 16, trigger), accel)

run = start()
out = []
for record in run:
    out.append([record.clean, record.poisoned])
    if record.step == 4:
        buffer = io.BytesIO()
        torch.save(run.state(), buffer)
resumed = start()
buffer.seek(0)
resumed.restore(torch.load(buffer, weights_only=True))
again = [[r.clean, r.poisoned] for r in resumed]
total = accel.gather(torch.cat([p.detach().flatten() for p in run.unet.parameters()]).double().sum().reshape(1))
mine = accel.gather(run.draw()[2].double().sum().reshape(1))  # every process draws its own noise
if accel.is_main_process:
    print(json.dumps({"n": accel.num_processes, "losses": out, "again": again, "sums": total.tolist(),
                      "noise": mine.tolist()}), flush=True)
del run, resumed  # their reducers hold threads of the process group: with them alive its end aborts, one time in ten
gc.collect()
accel.wait_for_everyone()  # nobody leaves while another still talks to it
accel.end_training()
"""


def test_two_processes_train_one_model(tmp_path):
    """Two CPU processes (gloo): equal weights, reduced losses, own samples, exact resume."""
    script = tmp_path / "two.py"
    script.write_text(TWO)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)],
        capture_output=True, text=True, timeout=240,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    out = json.loads(done.stdout.strip().splitlines()[-1])
    assert out["n"] == 2 and len(out["losses"]) == 8
    assert out["sums"][0] == out["sums"][1]
    assert out["noise"][0] != out["noise"][1]
    assert out["again"] == out["losses"][4:]
