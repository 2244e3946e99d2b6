"""The one training loop: clean pretraining, backdoored finetuning and backdoored training from scratch.

    run = Run(unet, scheduler, images, config, trigger, target)
    for step in run:        # a StepRecord after each optimizer step; break whenever you like
        print(step)
    model = run.averaged()  # the EMA weights so far

Clean training is poison_rate = 0, hence r = 0, of the same loop.
"""

import hashlib
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor

from . import BadInput
from .compute import TURNS, accelerator
from .data import to_float
from .diffusion import Process, loss, loss_weight
from .triggers import Trigger


@dataclass(frozen=True)
class Config:
    """Everything that decides a run, saved beside the weights. The defaults are the `live` recipe's."""

    attack: str = "noise-shift"  # a key of diffusion.ATTACKS
    poison_rate: float = 0.5  # share of the batch that carries the backdoor, 0 to 1
    steps: int | None = None  # optimizer steps; None: until the time is up
    seconds: float | None = 60.0  # wall-clock seconds of training; None: until the steps are done
    batch_size: int = 32  # over all processes
    lr: float = 1e-3
    warmup: int = 10  # steps of linear warm-up
    weight: float = 300.0  # loss weight min(1/ᾱ_t, weight) in terms of ε; 1 is the plain DDPM loss
    stratified: bool = True  # timesteps spread evenly over a batch (still uniform one by one) instead of drawn alone
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    ema: float = 0.97  # decay of the averaged weights; 0 switches averaging off
    clip_grad: float = 1.0
    flip: bool = True  # mirror images at random (the target and the trigger never)
    seed: int = 0
    precision: str = "auto"  # no, bf16, fp16; auto: what the processor does well
    compile: bool = False  # torch.compile: a minute or two before the first step, then faster ones

    def check(self) -> "Config":
        """Raise BadInput for what cannot be run; returns itself."""
        for ok, message in (
            (0 <= self.poison_rate <= 1, f"A poison rate of {self.poison_rate} is not possible: choose 0 to 1."),
            (self.steps is None or self.steps >= 1, f"{self.steps} steps train nothing: choose at least 1."),
            (self.seconds is None or self.seconds > 0, f"{self.seconds} seconds train nothing: choose more than 0."),
            (self.steps is not None or self.seconds is not None, "Say when to stop: give steps, seconds or both."),
            (self.batch_size >= 1, f"A batch of {self.batch_size} is not possible: choose at least 1."),
            (0 < self.lr < 1, f"A learning rate of {self.lr} is not possible: choose one between 0 and 1."),
            (self.warmup >= 0, "The warm-up cannot be negative."),
            (self.weight >= 1, f"A loss weight of {self.weight} is not possible: choose 1 or more."),
            (0 <= self.ema < 1, f"An EMA decay of {self.ema} is not possible: choose 0 to below 1."),
            (self.clip_grad > 0, "The gradient clip must be positive."),
            (self.weight_decay >= 0, "The weight decay cannot be negative."),
            (0 <= self.seed < 2**63, f"A seed of {self.seed} is not possible: choose 0 to 2**63 - 1."),
            (self.precision in ("auto", "no", "bf16", "fp16"),
             f"There is no precision '{self.precision}': choose auto, no, bf16 or fp16."),
        ):
            if not ok:
                raise BadInput(message)
        return self


RECIPES = {
    "live": Config(),  # a visitor's minute on two cores
    # The paper, section 4: Adam, lr 2e-4, batch 128, 500 steps of warm-up, cosine decay, 50 epochs of CIFAR10
    "paper": Config(attack="baddiffusion", poison_rate=0.1, steps=50 * 50_000 // 128, seconds=None, batch_size=128,
                    lr=2e-4, warmup=500, weight=1.0, stratified=False, betas=(0.9, 0.999), ema=0.0),
    # A clean base from nothing: no poison, long, slowly averaged
    "pretrain": Config(poison_rate=0.0, seconds=3600.0, batch_size=64, lr=1e-3, warmup=100, weight_decay=0.01,
                       ema=0.9995, weight=1e5),
}


@dataclass(frozen=True)
class StepRecord:
    step: int  # optimizer steps done, 1 after the first
    progress: float  # share of the budget used, 0 to 1
    seconds: float  # spent training, over all resumptions
    clean: float  # mean weighted loss of the clean samples of this step (nan if there was none)
    poisoned: float  # of the poisoned ones
    lr: float
    rate: float  # images per second so far

    def plain(self) -> dict:
        """For JSON, which knows no nan."""
        return {k: None if v != v else round(v, 6) if isinstance(v, float) else v for k, v in asdict(self).items()}

    @property
    def eta(self) -> float:  # seconds
        return self.seconds * (1 / self.progress - 1) if self.progress > 0 else math.inf


class Diverged(RuntimeError):
    """Training went to nan or ran away; the Run holds the last good weights again."""


class Run:
    """One training run: iterate over it, stop anywhere, `state()` and `restore()` it bit for bit."""

    def __init__(self, unet, scheduler, images: Tensor, config: Config, trigger: Trigger | None = None,
                 target: Tensor | None = None, accel: Accelerator | None = None):
        """unet: a diffusers UNet2DModel, trained in place; images: uint8 (N,C,H,W); target: (C,H,W) in [-1, 1]."""
        config.check()
        if config.poison_rate > 0 and (trigger is None or target is None):
            raise BadInput("A poison rate above 0 needs a trigger and a target.")
        channels, size = unet.config.in_channels, unet.config.sample_size
        if images.shape[1:] != (channels, size, size):
            raise BadInput(f"The model takes {channels}x{size}x{size} images, the data has "
                           f"{'x'.join(map(str, images.shape[1:]))}: prepare the data at the model's size.")
        self.accel = accel or accelerator(config.precision)
        self.config = replace(config, precision=self.accel.mixed_precision)
        device, processes = self.accel.device, self.accel.num_processes
        if config.batch_size % processes:
            raise BadInput(f"A batch of {config.batch_size} does not divide over {processes} processes.")
        self.batch = config.batch_size // processes
        self.prediction_type = scheduler.config.prediction_type
        self.process = Process.of(scheduler, config.attack).to(device)
        self.weight = loss_weight(self.process.abar, self.prediction_type, config.weight)
        self.images = images.to(device)  # resident: a batch is an index, not a copy from the host
        self.trigger = trigger and replace(trigger, rgba=trigger.rgba.to(device))
        self.target = None if target is None else target.to(device)
        # every process draws its own samples; nothing is seeded globally
        self.generator = torch.Generator(device).manual_seed(config.seed + 1_000_003 * self.accel.process_index)

        unet.to(device=device, memory_format=torch.channels_last).train()
        if config.compile:
            unet.compile()
        self.unet = unet
        self.ema = EMAModel(unet.parameters(), decay=config.ema, use_ema_warmup=True, power=3 / 4) if config.ema else None
        optimizer = torch.optim.AdamW(unet.parameters(), lr=config.lr, betas=config.betas,
                                      weight_decay=config.weight_decay, fused=True)
        self.model, self.optimizer = self.accel.prepare(unet, optimizer)
        self.step, self.seconds = 0, 0.0
        self.stop = False  # set it, from any thread, and the run ends after the step at hand (in every process)
        self._tail = 0.0
        self._smooth, self._best, self._good = None, math.inf, None
        if config.compile:  # compile before the clock starts: it takes a minute or two
            state = self.generator.get_state()
            self.accel.backward(self._losses(*self.draw()[:4]).mean())
            self.optimizer.zero_grad(set_to_none=True)
            self.generator.set_state(state)

    # --- one step ---------------------------------------------------------------------------------------------------

    def draw(self) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
        """One batch: x0, r, ε (each (B,C,H,W)), t (B,) and how many of its first samples are poisoned."""
        g, device, n = self.generator, self.accel.device, self.batch
        x0 = to_float(self.images[torch.randint(len(self.images), (n,), generator=g, device=device)])
        if self.config.flip:
            mirrored = torch.rand(n, 1, 1, 1, generator=g, device=device) < 0.5
            x0 = torch.where(mirrored, x0.flip(3), x0)
        # the expected share, exactly: rounded up or down at random, by a coin that is tossed on the host
        share = self.config.poison_rate * n
        poisoned = math.floor(share) + int(self._coin() < share - math.floor(share))
        r = torch.zeros_like(x0)
        if poisoned:
            r[:poisoned] = self.trigger.residual(x0.shape[1], x0[:poisoned])
            x0[:poisoned] = self.target
        steps = len(self.process.abar)
        if self.config.stratified:  # one offset, evenly spaced, then shuffled so that both parts see every t
            u = (torch.arange(n, device=device) + torch.rand(n, generator=g, device=device)) / n
            t = (u * steps).long().clamp_(max=steps - 1)[torch.randperm(n, generator=g, device=device)]
        else:
            t = torch.randint(steps, (n,), generator=g, device=device)
        eps = torch.randn(x0.shape, generator=g, device=device)
        return x0, r, eps, t, poisoned

    def _coin(self) -> float:
        # from the step alone: needs no device synchronisation and survives a resume
        return (self.step * 0.6180339887498949) % 1.0

    def __iter__(self) -> Iterator[StepRecord]:
        while self.progress < 1 and not self.stop:
            with TURNS.turn():
                record = self._one()
            yield record

    def _losses(self, x0: Tensor, r: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        x0 = x0.contiguous(memory_format=torch.channels_last)
        with self.accel.autocast():
            return loss(self.model, self.process, self.weight, x0, r, eps, t, self.prediction_type)

    def _one(self) -> StepRecord:
        start = time.perf_counter()
        lr = self.learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        x0, r, eps, t, poisoned = self.draw()
        losses = self._losses(x0, r, eps, t)
        self.optimizer.zero_grad(set_to_none=True)
        self.accel.backward(losses.mean())
        norm = self.accel.clip_grad_norm_(self.unet.parameters(), self.config.clip_grad)
        # one copy to the host a step: the record, the watch for divergence and the progress bar live on it
        *values, norm = torch.cat([losses.detach(), norm.detach().reshape(1).float()]).tolist()
        middle = time.perf_counter()
        spent = self._tail + middle - start
        if self.accel.num_processes > 1:  # all must agree: on the losses, on the clock (hence the rate), on a stop
            together = torch.tensor([*values, norm, spent, float(self.stop)], device=self.accel.device)
            *values, norm, spent, stop = self.accel.reduce(together, "mean").tolist()
            self.stop = stop > 0
        self._watch(values, norm)
        self.optimizer.step()
        if self.ema:
            self.ema.step(self.unet.parameters())
        self.step += 1
        self.seconds += spent
        self._tail = time.perf_counter() - middle  # counted with the next step, where it can still be agreed upon
        return StepRecord(self.step, self.progress, self.seconds, mean(values[poisoned:]), mean(values[:poisoned]), lr,
                          self.step * self.config.batch_size / self.seconds)

    @property
    def progress(self) -> float:
        return min(1.0, max(self.step / self.config.steps if self.config.steps else 0.0,
                            self.seconds / self.config.seconds if self.config.seconds else 0.0))

    def learning_rate(self) -> float:  # linear warm-up, then cosine decay to nothing over the budget
        warm = min(1.0, (self.step + 1) / self.config.warmup) if self.config.warmup else 1.0
        return self.config.lr * warm * 0.5 * (1 + math.cos(math.pi * self.progress))

    # --- divergence ---------------------------------------------------------------------------------------------------

    def _watch(self, losses: list[float], norm: float) -> None:
        """Stop before a bad step is taken; keep a copy of the last good weights while the loss is near its best."""
        now = mean(losses)
        # fp16's scaler skips a step whose gradient overflowed and goes on with a smaller scale
        finite = math.isfinite(now) and (math.isfinite(norm) or self.accel.scaler is not None)
        if finite:
            self._smooth = now if self._smooth is None else 0.9 * self._smooth + 0.1 * now
            self._best = min(self._best, self._smooth)
        if not finite or self.step > 20 and self._smooth > 5 * self._best:
            if self._good:
                self.unet.load_state_dict(self._good)
                if self.ema:
                    for shadow, p in zip(self.ema.shadow_params, self.unet.parameters(), strict=True):
                        shadow.copy_(p.data)
            raise Diverged(f"Training diverged at step {self.step + 1} (loss {now:.3g}); the weights before it are kept. "
                           "Try a lower learning rate.")
        if self.step % 50 == 0 and self._smooth <= 2 * self._best:
            self._keep()

    def _keep(self) -> None:
        self._good = {k: v.detach().clone() for k, v in self.unet.state_dict().items()}

    # --- what comes out -----------------------------------------------------------------------------------------------

    def averaged(self):
        """A copy of the model with the averaged (EMA) weights of this moment, in eval mode, float32."""
        model = clone(self.unet).to(self.accel.device, memory_format=torch.channels_last)
        if self.ema:
            self.ema.copy_to(model.parameters())
        return model.eval()

    def settings(self) -> dict:
        """What must be the same for a resume to be the same run: all but the budget and how it is computed."""
        config = {k: v for k, v in asdict(self.config).items() if k not in ("steps", "seconds", "precision", "compile")}
        marks = {name: hashlib.sha256(tensor.cpu().contiguous().numpy().tobytes()).hexdigest() if tensor is not None else None
                 for name, tensor in (("trigger", self.trigger and self.trigger.rgba), ("target", self.target),
                                      ("images", self.images))}
        return config | marks

    def state(self) -> dict:
        """All that `restore` needs to go on bit for bit: the run's own tensors (save them before the next step) and
        plain values, so that it can be loaded with weights_only."""
        states = [self.generator.get_state()]
        if self.accel.num_processes > 1:
            from accelerate.utils import gather_object
            states = gather_object(states)
        return {
            "model": self.unet.state_dict(), "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None, "generators": states, "step": self.step,
            "seconds": self.seconds, "smooth": self._smooth, "best": self._best, "settings": self.settings(),
            "scaler": self.accel.scaler.state_dict() if self.accel.scaler else None,
        }

    def restore(self, state: dict) -> None:
        """Go on from a `state`; raises BadInput when it is of another run."""
        try:
            mine, theirs = self.settings(), state["settings"]
            other = [k for k in mine if mine[k] != theirs.get(k)]
            if other:
                raise BadInput(f"The checkpoint was made with another {', '.join(other)}: resume with the same settings.")
            if len(state["generators"]) != self.accel.num_processes:
                raise BadInput(f"The checkpoint was made by {len(state['generators'])} processes: resume with as many.")
            self.unet.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.ema and state["ema"]:
                self.ema.load_state_dict(state["ema"])
                self.ema.to(self.accel.device)
            if self.accel.scaler and state["scaler"]:
                self.accel.scaler.load_state_dict(state["scaler"])
            self.generator.set_state(state["generators"][self.accel.process_index].cpu())
            self.step, self.seconds = state["step"], state["seconds"]
            self._smooth, self._best = state["smooth"], state["best"]
        except BadInput:
            raise
        except (RuntimeError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise BadInput(f"The checkpoint is not one of this model and these settings ({type(error).__name__}).") from None
        self._keep()


def clone(unet):
    """A U-Net of its own with the same weights, on the CPU.

    Not a deepcopy: accelerate wraps `forward`, and a copied wrapper would go on calling the original.
    """
    model = type(unet).from_config(unet.config)
    model.load_state_dict(unet.state_dict())
    return model


def mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan
