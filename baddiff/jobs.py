"""Training jobs that outlive the request that asked for them: one worker, one queue, results kept for a while.

A job belongs to whoever knows its id (an unguessable token); nobody can list the jobs of others.
"""

import atexit
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from torch import Tensor
from torch.utils._pytree import tree_map_only

from . import BadInput
from .compute import ZERO, on_gpu, return_memory, zero_gpu
from .data import EMBEDDED, load_images
from .diffusion import Process
from .models import Model, describe
from .probe import evaluate, side_by_side
from .training import Config, Diverged, Run, StepRecord
from .triggers import Trigger

CHUNK = 25.0  # seconds that a ZeroGPU Space is asked for at a time


@dataclass(frozen=True)
class Preview:
    step: int
    rows: list[Tensor]  # clean, triggered


@dataclass(frozen=True)
class Chunk:
    """The end of a stretch of training: the model so far, and what the next stretch goes on from (None: it is over)."""

    model: Model
    state: dict | None
    error: str | None


def train(base: Model, config: Config, trigger: Trigger, target: Tensor, target_name: str, data: str = EMBEDDED,
          state: dict | None = None, seconds: float = float("inf"), stopped: Callable[[], bool] = bool,
          preview_every: float = 8.0) -> Iterator[StepRecord | Preview | Chunk]:
    """Train a copy of `base` for about `seconds`, from a `state` or from the start; ends with a Chunk, all on the CPU."""
    model = base.copy()
    run = Run(model.unet, model.scheduler, load_images(data, model.size, model.channels), config, trigger, target)
    if state:
        run.restore(state)

    def now() -> Model:
        return Model(run.averaged(), model.scheduler, "a model of this session",
                     describe(run, "finetune", base.name, data, target_name), trigger, target)

    def preview(model: Model) -> Preview:
        return Preview(run.step, side_by_side(model, range(4)))

    if not state:
        yield preview(now())
    error, begun, last = None, run.seconds, time.monotonic()
    try:
        for record in run:
            yield record
            if stopped() or run.seconds - begun > seconds:
                break
            if time.monotonic() - last > preview_every:
                yield preview(now())
                last = time.monotonic()
    except Diverged as trouble:
        error = str(trouble)
    goes_on, result = not error and not stopped() and run.progress < 1, now()
    if not goes_on and run.step:
        yield preview(result)
    yield Chunk(result.to("cpu"), tree_map_only(Tensor, Tensor.cpu, run.state()) if goes_on else None, error)


train_on_zero = zero_gpu(60)(train)


@dataclass(eq=False)  # a job is itself: fields hold tensors, which do not compare
class Job:
    base: Model
    trigger: Trigger
    target: Tensor
    target_name: str
    config: Config
    owner: str  # the visitor's own token: one job at a time each
    address: str = ""  # where the request came from: a few at a time each, whatever tokens it shows
    data: str = EMBEDDED
    id: str = field(default_factory=lambda: secrets.token_urlsafe(16))
    state: str = "queued"  # queued, running, done, stopped, failed
    records: list[StepRecord] = field(default_factory=list)
    previews: list[Preview] = field(default_factory=list)
    result: Model | None = None
    error: str | None = None
    touched: float = field(default_factory=time.monotonic)
    stop: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)  # of whoever trains it at this moment
    saved: dict | None = None  # a Run's state, between two stretches

    @property
    def left(self) -> float:  # seconds of training, about
        return self.config.seconds * (1 - (self.records[-1].progress if self.records else 0))

    @property
    def over(self) -> bool:
        return self.state in ("done", "stopped", "failed")


class Trainer:
    """The one worker. `most` jobs may wait or run, one per visitor and `each_address` per address at a time.

    What is over is forgotten `keep` seconds after it was last asked for, or once `remember` newer results are there
    (each holds 17 MB); `forget` is called with its id. On a ZeroGPU Space there is no worker, since a thread of one's
    own cannot have the GPU there: the visitor's page calls `advance` again and again, and each call trains a stretch.
    """

    def __init__(self, most: int = 20, each_address: int = 4, keep: float = 3600.0, longest: float = 300.0,
                 remember: int = 20, preview_every: float = 8.0, measure: int = 64, forget=lambda job_id: None,
                 driven: bool = ZERO, chunk: float = CHUNK):
        self.most, self.each_address, self.keep, self.longest = most, each_address, keep, longest
        self.remember, self.forget = remember, forget
        self.preview_every, self.measure = preview_every, measure
        self.driven, self.chunk = driven, chunk
        self.rate = self.measuring = 0.0  # images/s and seconds, as last seen here
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
        Process.of(job.base.scheduler, job.config.attack)  # raises for an attack that there is not
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
            if not self.driven:
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

    def ahead(self, job: Job | None = None) -> tuple[int, float]:
        """How many jobs run or wait before this one (or before one queued now), and about how many seconds they take."""
        with self._condition:
            before = [j for j in self._jobs.values() if j.state == "running"] + list(self._queue)
        if job in before:
            before = before[:before.index(job)]
        return (0, 0.0) if self.driven else (len(before), sum(j.left for j in before))

    def cancel(self, job: Job) -> None:
        """Stop within one step (on ZeroGPU: one stretch), keeping the partial model; a job that waits leaves the queue."""
        job.stop.set()
        with self._condition:
            waits = job in self._queue or job.state == "queued" and self.driven
            if job in self._queue:
                self._queue.remove(job)
            if waits:
                job.state, job.error = "stopped", "Taken out of the queue before it started."

    def advance(self, job: Job) -> None:
        """Train one stretch of a job, unless somebody does already; whatever goes wrong becomes the job's error."""
        if job.over or not job.lock.acquire(blocking=False):
            return
        try:
            job.state = "running"
            self._stretch(job)
        except BadInput as error:
            job.state, job.error = "failed", str(error)
        except Exception as error:  # a job must never take the worker with it
            job.state, job.error = "failed", f"Training failed unexpectedly ({type(error).__name__}: {error})."
        finally:
            job.touched = time.monotonic()
            job.lock.release()

    def _sweep(self) -> None:
        """Forget what is over and old, or over and too much, and (driven) what nobody has come back for."""
        now = time.monotonic()
        over = sorted((j for j in self._jobs.values() if j.over or self.driven and not j.lock.locked()),
                      key=lambda j: j.touched)
        for j in over[:max(0, len(over) - self.remember)] + [j for j in over if now - j.touched > self.keep]:
            if self._jobs.pop(j.id, None):
                self.forget(j.id)

    def _work(self) -> None:
        while not self._closed:
            with self._condition:
                self._condition.wait_for(lambda: self._queue or self._closed, timeout=20)
                self._sweep()
                job = self._queue.popleft() if self._queue else None
                if job:
                    job.state = "running"  # under the lock: it is always somewhere in `ahead`
            while job and not job.over:
                self.advance(job)
            job = None
            return_memory()

    def _stretch(self, job: Job) -> None:
        task = (job.base, job.config, job.trigger, job.target, job.target_name, job.data, job.saved)
        if self.driven:
            items = train_on_zero(*task, seconds=self.chunk, preview_every=self.preview_every)
        else:
            items = train(*task, stopped=job.stop.is_set, preview_every=self.preview_every)
        for item in items:
            if isinstance(item, StepRecord):
                job.records.append(item)
                self.rate = item.rate
            elif isinstance(item, Preview):
                job.previews.append(item)
        job.saved, job.error = item.state, item.error
        if job.saved and not job.stop.is_set():
            return
        if job.records and not self._closed:
            begun = time.monotonic()
            item.model.run["note"] = job.error or ("stopped by hand" if job.stop.is_set() else None)
            job.result = item.model  # before it is measured: nothing that goes wrong there may lose it
            if job.previews[-1].step != job.records[-1].step:
                job.previews.append(Preview(job.records[-1].step, on_gpu(side_by_side, item.model, range(4))))
            job.result.run["metrics"] = on_gpu(evaluate, job.result, n=self.measure) | {
                "utility_before": self._utility(job.base)}
            self.measuring = time.monotonic() - begun
        job.saved = None
        job.state = "failed" if job.error else "stopped" if job.stop.is_set() else "done"

    def _utility(self, base: Model) -> float:
        """Of the model that a job starts from, from the same seeds; measured once."""
        if base not in self._before:
            self._before[base] = on_gpu(evaluate, base, n=self.measure)["utility"]
        return self._before[base]
