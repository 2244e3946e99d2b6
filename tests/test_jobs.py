"""The worker that trains for visitors, without a browser."""

import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from baddiff import BadInput
from baddiff.compute import Turns
from baddiff.jobs import Job, Trainer
from baddiff.models import CLEAN, load
from baddiff.training import Config
from baddiff.triggers import Trigger, make_target


@pytest.fixture(scope="module")
def base():
    return load(CLEAN)


def job(base, owner="a", **config):
    trigger = Trigger.make("box", 32)
    return Job(base, trigger, make_target("cat", 32, trigger), "cat",
               Config(**({"seconds": 60.0, "batch_size": 2} | config)), owner)


def wait(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "too slow"
        time.sleep(0.01)


def test_turns_are_served_in_the_order_of_asking():
    turns, seen, started = Turns(), [], []

    def ask(i):
        started.append(i)
        with turns.turn():
            seen.append(i)

    threads = []
    with turns.turn():
        for i in range(5):
            threads.append(threading.Thread(target=ask, args=(i,)))
            threads[-1].start()
            wait(lambda n=i: len(started) == n + 1)
            time.sleep(0.02)
    for thread in threads:
        thread.join()
    assert seen == [0, 1, 2, 3, 4]
    with pytest.raises(KeyError), turns.turn():
        raise KeyError
    with turns.turn():  # an error gives the turn on
        pass


def test_a_job_trains_previews_and_measures(base):
    trainer = Trainer(preview_every=0.5, measure=4)
    before = torch.cat([p.flatten() for p in base.unet.parameters()]).clone()
    j = trainer.submit(job(base, steps=6, seconds=60.0))
    wait(lambda: j.over, 60)
    assert j.state == "done" and j.error is None and len(j.records) == 6
    assert j.previews[0].step == 0 and j.previews[-1].step == 6  # the untrained model first, the result last
    assert j.result.run["metrics"]["n"] == 4 and j.result.run["kind"] == "finetune"
    assert torch.equal(before, torch.cat([p.flatten() for p in base.unet.parameters()]))  # the base is nobody's to change


def test_stop_is_within_a_step_and_keeps_the_partial_model(base):
    trainer = Trainer(measure=4)
    j = trainer.submit(job(base))
    wait(lambda: len(j.records) >= 2)
    trainer.cancel(j)
    at = len(j.records)
    wait(lambda: j.over)
    assert j.state == "stopped" and len(j.records) <= at + 1
    assert j.result.run["steps"] == len(j.records) and j.result.run["note"] == "stopped by hand"


def test_the_queue_is_fair_capped_and_can_be_left(base):
    trainer = Trainer(most=2, measure=4)
    first = trainer.submit(job(base, "a"))
    with pytest.raises(BadInput, match="already"):
        trainer.submit(job(base, "a"))
    second = trainer.submit(job(base, "b"))
    with pytest.raises(BadInput, match="waiting already"):
        trainer.submit(job(base, "c"))
    wait(lambda: first.state == "running")
    crowd = Trainer(each_address=1, measure=4)
    crowd.submit(replace(job(base, "x", steps=1), address="here"))
    with pytest.raises(BadInput, match="your network"):
        crowd.submit(replace(job(base, "y"), address="here"))
    n, seconds = trainer.ahead(second)
    assert n == 1 and 0 < seconds <= 60 and trainer.ahead(first) == (0, 0)
    trainer.cancel(second)
    assert second.state == "stopped" and second.result is None
    trainer.cancel(first)
    wait(lambda: first.over)
    trainer.submit(job(base, "a", steps=1))  # whoever is done may come again


def test_a_driven_trainer_goes_on_stretch_by_stretch(base):
    """As on ZeroGPU: no worker; whoever looks at the job drives it, and the state waits on the CPU in between."""
    trainer = Trainer(driven=True, chunk=0.0, measure=4)  # one step a stretch
    j = trainer.submit(job(base, steps=3))
    assert j.state == "queued" and trainer.ahead(j) == (0, 0)
    for done in (1, 2, 3):
        assert not j.over
        trainer.advance(j)
        assert len(j.records) == done
    assert j.state == "done" and j.result.run["steps"] == 3 and j.saved is None and j.previews[-1].step == 3
    whole = Trainer(measure=4)
    w = whole.submit(replace(job(base, steps=3), id="whole"))
    wait(lambda: w.over, 60)
    torch.testing.assert_close([r.clean for r in j.records], [r.clean for r in w.records])  # the same run
    half = trainer.submit(job(base, steps=3))
    trainer.advance(half)
    trainer.cancel(half)
    trainer.advance(half)
    assert half.state == "stopped" and half.result.run["steps"] == len(half.records) == 2


def test_impossible_jobs_are_refused_before_they_wait(base):
    trainer = Trainer(longest=100)
    for bad in ({"seconds": 101.0}, {"seconds": None, "steps": 5}, {"poison_rate": 2.0}, {"batch_size": 0}):
        with pytest.raises(BadInput):
            trainer.submit(job(base, **bad))
    assert trainer.ahead() == (0, 0)


def test_a_job_that_breaks_leaves_the_worker_alive(base, monkeypatch):
    from baddiff import jobs

    trainer = Trainer(measure=4)
    monkeypatch.setattr(jobs, "load_images", lambda *a: 1 / 0)
    broken = trainer.submit(job(base))
    wait(lambda: broken.over)
    assert broken.state == "failed" and "ZeroDivisionError" in broken.error
    monkeypatch.undo()
    good = trainer.submit(job(base, steps=1))
    wait(lambda: good.over, 60)
    assert good.state == "done"


def test_results_are_found_by_their_id_only_and_forgotten_in_time(base):
    trainer = Trainer(keep=0.2, measure=4)
    j = trainer.submit(job(base, steps=1))
    assert trainer.get("") is None and trainer.get(None) is None and trainer.get(j.id[:-1]) is None
    wait(lambda: j.over, 60)
    assert trainer.get(j.id) is j
    time.sleep(0.3)
    assert trainer.get(j.id) is None
    few = Trainer(remember=1, measure=4)
    for owner in "ab":
        last = few.submit(job(base, owner, steps=1))
        wait(lambda last=last: last.over, 60)
    few.get(None)
    assert few.get(last.id) is last and len(few._jobs) == 1


ON_A_ZERO_GPU_SPACE = """
import pickle, sys, types
calls = []

def GPU(duration):  # as the spaces package does: arguments and results travel between processes
    def decorate(task):
        def run(*args, **options):
            calls.append(task.__name__)
            args, options = pickle.loads(pickle.dumps((args, options)))
            found = task(*args, **options)
            if isinstance(found, types.GeneratorType):
                return (pickle.loads(pickle.dumps(item)) for item in found)
            return pickle.loads(pickle.dumps(found))
        return run
    return decorate

sys.modules["spaces"] = types.SimpleNamespace(GPU=GPU)
from baddiff.jobs import Job, Trainer
from baddiff.models import load
from baddiff.training import Config
from baddiff.triggers import Trigger, make_target
trigger = Trigger.make("box", 32)
trainer = Trainer(chunk=0.0, measure=4)
job = trainer.submit(Job(load(), trigger, make_target("cat", 32), "cat", Config(seconds=60.0, steps=2, batch_size=2), "a"))
while not job.over:
    trainer.advance(job)
assert job.state == "done", job.error
assert len(job.records) == 2 and job.result.run["metrics"]["n"] == 4
assert calls == ["train", "train", "on_gpu", "on_gpu"], calls  # two stretches, the figures after and before
"""


def test_a_zero_gpu_space_gets_calls_that_can_travel():
    """With a stand-in for the `spaces` package; the real one was not at hand."""
    done = subprocess.run([sys.executable, "-c", ON_A_ZERO_GPU_SPACE], env=os.environ | {"SPACES_ZERO_GPU": "true"},
                          capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stderr
