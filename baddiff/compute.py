"""The machine: which device, which precision, and whose turn it is."""

import ctypes
import os
import platform
import threading
from contextlib import contextmanager
from itertools import count

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from . import BadInput


class Turns:
    """A lock that is served in the order of asking. Not reentrant.

    Two teams of OpenMP threads on two cores slow each other down a hundredfold (oneDNN's barriers spin while the other
    team holds the core), so heavy computations take turns: a training step, a batch of somebody's pictures, the next
    step. `training.Run` and `sampling` take theirs by themselves; callers need not care.
    """

    def __init__(self):
        self._tickets, self._serving, self._condition = count(), 0, threading.Condition()

    @contextmanager
    def turn(self):
        with self._condition:
            ticket = next(self._tickets)
            self._condition.wait_for(lambda: self._serving == ticket)
        try:
            yield
        finally:
            with self._condition:
                self._serving += 1
                self._condition.notify_all()


TURNS = Turns()  # of this process
os.register_at_fork(after_in_child=TURNS.__init__)  # whoever held it stayed behind


def best_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def best_precision(device: str | None = None) -> str:
    """bf16 where the hardware multiplies it (CUDA from Ampere on; AMX or AVX512-BF16), fp16 on older CUDA, else no."""
    device = device or best_device().type
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device != "cpu":
        return "no"
    fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return "bf16" if fast else "no"


def accelerator(precision: str = "auto", cpu: bool = False) -> Accelerator:
    """An Accelerator at the precision that the processor is fast in, or at the one asked for.

    accelerate keeps one precision per process; asking for another one starts its state anew.
    """
    device = "cpu" if cpu else best_device().type
    if precision == "auto":
        precision = best_precision(device)
    if precision == "fp16" and device != "cuda":
        raise BadInput("fp16 trains on a CUDA device only: choose bf16 or no.")
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != precision:
        AcceleratorState._reset_state()
    return Accelerator(mixed_precision=precision, cpu=cpu)


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{os.cpu_count()} CPU cores ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()})"


# --- memory: glibc keeps what was freed, for every thread that ever computed: hundreds of MB after a busy hour ---------------

GLIBC = ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


def few_arenas() -> None:
    """Let all threads of this process share two pools of memory; call it before there are many."""
    if GLIBC:
        GLIBC.mallopt(-8, 2)  # M_ARENA_MAX


def return_memory() -> None:
    """Give what was freed back to the system; elsewhere than under glibc it changes nothing."""
    if GLIBC:
        GLIBC.malloc_trim(0)


# --- ZeroGPU: a Space that lends its GPU call by call, to a forked process ------------------------------------------------

ZERO = os.environ.get("SPACES_ZERO_GPU", "").lower() in ("1", "t", "true")


def zero_gpu(seconds: float):
    """Decorates what needs the GPU of a ZeroGPU Space for so long; elsewhere it changes nothing.

    Arguments, results and what a generator yields travel between processes there: tensors on the CPU, no locks.
    """
    if not ZERO:
        return lambda task: task
    import spaces

    return spaces.GPU(duration=seconds)


@zero_gpu(60)
def on_gpu(task, *args, **options):
    """task(*args), with every model among them on the best device: what all heavy looking goes through."""
    for model in args:
        if hasattr(model, "unet"):
            model.to(best_device())
    return task(*args, **options)
