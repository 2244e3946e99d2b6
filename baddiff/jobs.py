"""Training jobs that outlive the request that asked for them: one worker, one queue, results kept for a while.

A job belongs to whoever knows its id (an unguessable token); nobody can list the jobs of others.
"""

import atexit
import secrets
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from torch import Tensor

from . import BadInput
from .data import EMBEDDED, load_images
from .models import Model, describe
from .probe import evaluate, side_by_side
from .training import Config, Diverged, Run, StepRecord
from .triggers import Trigger


@dataclass(eq=False)  # a job is itself: fields hold tensors, which do not compare
class Job:
    base: Model
    trigger: Trigger
    target: Tensor
    target_name: str
    config: Config
    owner: str  # the visitor's own token: one job at a time each
    address: str = ""  # where the request came from: a few at a time each, whatever tokens it shows
    id: str = field(default_factory=lambda: secrets.token_urlsafe(16))
    state: str = "queued"  # queued, running, done, stopped, failed
    records: list[StepRecord] = field(default_factory=list)
    previews: list[tuple[int, list[Tensor]]] = field(default_factory=list)  # (step, [clean, triggered])
    result: Model | None = None
    error: str | None = None
    touched: float = field(default_factory=time.monotonic)
    stop: threading.Event = field(default_factory=threading.Event)

    @property
    def over(self) -> bool:
        return self.state in ("done", "stopped", "failed")


class Trainer:
    """The one worker. `most` jobs may wait or run, one per visitor and `each_address` per address at a time.

    What is over is forgotten `keep` seconds after it was last asked for, or once `remember` newer results are there
    (each holds 17 MB); `forget` is called with its id.
    """

    def __init__(self, most: int = 20, each_address: int = 4, keep: float = 3600.0, longest: float = 300.0,
                 remember: int = 20, preview_every: float = 8.0, measure: int = 64, forget=lambda job_id: None):
        self.most, self.each_address, self.keep, self.longest = most, each_address, keep, longest
        self.remember, self.forget = remember, forget
        self.preview_every, self.measure = preview_every, measure
        self._jobs: dict[str, Job] = {}
        self._before: WeakKeyDictionary[Model, float] = WeakKeyDictionary()
        self._queue: deque[Job] = deque()
        self._condition = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None
        atexit.register(self.close)  # a thread that is still in torch when the interpreter goes aborts the process

    def close(self) -> None:
        """Stop everything and wait for the step at hand."""
        with self._condition:
            self._queue.clear()
            for job in self._jobs.values():
                job.stop.set()
            thread, self._closed = self._thread, True
            self._condition.notify()
        if thread:
            thread.join(60)

    def submit(self, job: Job) -> Job:
        """Queue a job; raises BadInput when the visitor has one already or the queue is full."""
        job.config.check()
        if job.config.seconds is None or job.config.seconds > self.longest:
            raise BadInput(f"A job may train for at most {self.longest:.0f} seconds here: choose a shorter time.")
        with self._condition:
            self._sweep()
            active = [j for j in self._jobs.values() if not j.over]
            if any(j.owner == job.owner for j in active):
                raise BadInput("You already have a training waiting or running: let it end, or stop it first.")
            if job.address and sum(j.address == job.address for j in active) >= self.each_address:
                raise BadInput(f"{self.each_address} trainings from your network wait or run already: try again in a minute.")
            if len(active) >= self.most:
                raise BadInput(f"{len(active)} trainings are waiting already: try again in a few minutes.")
            self._jobs[job.id] = job
            self._queue.append(job)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="trainer", daemon=True)
                self._thread.start()
            self._condition.notify()
        return job

    def get(self, job_id: str | None) -> Job | None:
        """The job of that id, kept alive by being asked for."""
        with self._condition:
            self._sweep()
            job = self._jobs.get(job_id) if job_id else None
        if job:
            job.touched = time.monotonic()
        return job

    def ahead(self, job: Job) -> tuple[int, float]:
        """How many jobs run or wait before this one, and about how many seconds they will take."""
        if job.state != "queued":
            return 0, 0.0
        with self._condition:
            before = [j for j in self._jobs.values() if j.state == "running" and j is not job]
            for j in self._queue:
                if j is job:
                    break
                before.append(j)
        return len(before), sum(j.config.seconds * (1 - (j.records[-1].progress if j.records else 0)) for j in before)

    def waiting(self) -> tuple[int, float]:
        """`ahead` of a job that would be queued now."""
        with self._condition:
            active = [j for j in self._jobs.values() if not j.over]
        return len(active), sum(j.config.seconds * (1 - (j.records[-1].progress if j.records else 0)) for j in active)

    def cancel(self, job: Job) -> None:
        """Stop within one step, keeping the partial model; a job that still waits leaves the queue."""
        job.stop.set()
        with self._condition:
            if job in self._queue:
                self._queue.remove(job)
                job.state, job.error = "stopped", "Taken out of the queue before it started."

    def _sweep(self) -> None:  # forget what is over and old, or over and too much
        now = time.monotonic()
        over = sorted((j for j in self._jobs.values() if j.over), key=lambda j: j.touched)
        for j in over[:max(0, len(over) - self.remember)] + [j for j in over if now - j.touched > self.keep]:
            if self._jobs.pop(j.id, None):
                self.forget(j.id)

    def _work(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._queue or self._closed)
                if self._closed:
                    return
                job = self._queue.popleft()
                job.state = "running"
            try:
                self._train(job)
            except BadInput as error:
                job.state, job.error = "failed", str(error)
            except Exception as error:  # a job must never take the worker with it
                job.state, job.error = "failed", f"Training failed unexpectedly ({type(error).__name__}: {error})."
            job.touched = time.monotonic()

    def _utility(self, base: Model) -> float:
        """Of the model that a job starts from, from the same seeds; measured once."""
        if base not in self._before:
            self._before[base] = evaluate(base, n=self.measure)["utility"]
        return self._before[base]

    def _train(self, job: Job) -> None:
        base = job.base.copy()
        run = Run(base.unet, base.scheduler, load_images(EMBEDDED, base.size, base.channels), job.config, job.trigger,
                  job.target)

        def now() -> Model:  # on the CPU: results wait there
            return Model(run.averaged().cpu(), base.scheduler, "a model of this session", describe(
                run, "finetune", job.base.name, EMBEDDED, job.target_name), job.trigger, job.target)

        def preview(model: Model) -> None:
            job.previews.append((run.step, side_by_side(model, range(4))))

        preview(now())
        steps, last = iter(run), time.monotonic()
        while not job.stop.is_set():
            try:
                record = next(steps, None)
            except Diverged as error:
                job.error = str(error)
                break
            if record is None:
                break
            job.records.append(record)
            if time.monotonic() - last > self.preview_every:
                preview(now())
                last = time.monotonic()
        if run.step and not self._closed:
            result = now()
            result.run["note"] = job.error or ("stopped by hand" if job.stop.is_set() else None)
            preview(result)
            job.result = result  # before it is measured: nothing that goes wrong there may lose it
            result.run["metrics"] = evaluate(result, n=self.measure) | {"utility_before": self._utility(job.base)}
        job.state = "failed" if job.error else "stopped" if job.stop.is_set() else "done"
