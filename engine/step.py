"""One optimisation step, the same for every script: micro batches, mixed precision, clipping, EMA.

A step whose loss or gradient is not finite is skipped by all ranks alike. The log names it, and
after too many in a row the run ends.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from data.loader import Batch
from engine import distributed, optim, parallel
from engine.cli import RunFailed
from engine.logger import notice
from models.ssl_model import update_ema

if TYPE_CHECKING:
    from engine.config import OptimConfig

IN_A_ROW = 10  # ours; DINOv3's code gives up at the third
IN_A_ROW_FP16 = 40  # there each halves the scale, which begins at 2 ** 16
RATES = ("lr", "weight_decay", "ema_momentum", "teacher_temp")
REMEDY = "lower schedule.lr.peak or schedule.teacher_temp, or set precision=fp32"


class OptimizationStep:
    """Updates the student, the optimizer and the EMA teacher in each step of one stage.

    The caller goes through `micro_batches`, computes the losses of each and hands them to
    `backward`; then it calls `apply_gradients` and `update_teacher`.

    Args:
        student: as `parallel.wrap` returns it.
        teacher: follows the student by EMA.
        optimizer: of the student's parameters (`optim.make_optimizer`).
        precision: autocast and loss scaler, from `distributed.choose_precision`.
        settings: its `clip_grad` and `clip_per` are read.
        micro_batch: images that go through the student at once.
        frozen_until: step of the run before which the last layers of the heads do not move.
            Their gradients count in the norm that is clipped, as in the authors' code.

    Attributes:
        mark: called with a phase's name when the phase ends: forward passes by the name that the
            caller gives, "loss", "backward", "optimizer", "ema".
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        optimizer: torch.optim.Optimizer,
        precision: tuple[Callable, torch.amp.GradScaler],
        settings: OptimConfig,
        *,
        micro_batch: int,
        frozen_until: int = 0,
    ):
        self.student, self.teacher, self.optimizer = student, teacher, optimizer
        self.model = parallel.unwrap(student)
        self.autocast, self.scaler = precision
        self.clip_grad, self.clip_per = settings.clip_grad, settings.clip_per
        self.micro_batch, self.frozen_until = micro_batch, frozen_until
        self.mark: Callable[[str], None] = lambda phase: None
        self.share = 1.0  # of the batch's images in the current micro batch
        self.syncs = False  # whether ranks average their gradients in this micro batch
        self.unreached: dict[tuple[str, ...], list[nn.Parameter]] = {}  # by the terms in use
        self.totals: dict[str, Tensor] = {}  # loss terms of this rank's batch, and grad_norm
        self.skipped: dict[str, Tensor] = {}  # how often each value was not finite
        self.in_a_row: Tensor | float = 0.0

    @contextlib.contextmanager
    def forward(self, phase: str) -> Iterator[None]:
        """A forward pass in the run's precision."""
        with self.autocast():
            yield
        self.mark(phase)

    def micro_batches(self, parts: list[Batch], targets: list) -> Iterator[tuple]:
        """Yields each micro batch with its targets; gradients add up to those of the whole batch.

        Ranks average them in the backward pass of the last one.
        """
        self.totals = {}
        images = sum(len(part.images) for part in parts)
        for number, (part, target) in enumerate(zip(parts, targets, strict=True), 1):
            self.share = len(part.images) / images
            self.syncs = number == len(parts)
            with parallel.accumulate(self.student, last=self.syncs):
                yield part, target

    def backward(self, losses: dict[str, Tensor], weights: Mapping[str, float]) -> None:
        """Gradients of the weighted sum of the terms of one micro batch."""
        losses["loss"] = sum(weights[name] * value for name, value in losses.items())
        self.mark("loss")
        unreached = self._unreached(losses)
        zero = sum(0.0 * parameter.flatten()[0] for parameter in unreached)
        self.scaler.scale(self.share * losses["loss"] + zero).backward()
        for parameter in unreached:  # as on one process: no decay, no momentum
            parameter.grad = None
        self.mark("backward")
        for name, value in losses.items():
            self.totals[name] = self.totals.get(name, 0.0) + self.share * value.detach()

    def _unreached(self, losses: dict[str, Tensor]) -> list[nn.Parameter]:
        """Parameters that no term needs. DDP waits for a gradient of theirs all the same."""
        if self.student is self.model or not self.syncs:
            return []
        terms = tuple(losses)
        if terms not in self.unreached:
            self.unreached[terms] = parallel.unreached(self.model, losses["loss"])
        return self.unreached[terms]

    def apply_gradients(self, step: int, lr: float, weight_decay: float) -> None:
        """Clips the gradients and moves the student, unless a value is not finite on any rank."""
        self.scaler.unscale_(self.optimizer)
        norm = optim.clip_gradients(self.model, self.clip_grad, self.clip_per)
        self.totals["grad_norm"] = norm
        frozen = step < self.frozen_until
        if frozen and self.clip_per == "tensor":  # the recipe of DINO and iBOT
            optim.drop_last_layer_gradients(self.model)
        optim.set_rates(self.optimizer, lr, weight_decay, frozen)
        self._step_if_finite()
        self.optimizer.zero_grad()
        self.mark("optimizer")

    def update_teacher(self, ema_momentum: float) -> None:
        update_ema(self.teacher, self.model, ema_momentum, parallel.local)
        self.mark("ema")

    @torch.no_grad()
    def _step_if_finite(self) -> None:
        """Decides on the device, so the loop does not wait. `metrics` reads the result later."""
        names = list(self.totals)
        bad = torch.stack([(~self.totals[name].isfinite()).float() for name in names])
        distributed.all_reduce_max(bad)
        for name, count in zip(names, bad.unbind(), strict=True):
            self.skipped[name] = self.skipped.get(name, 0.0) + count
        skip = bad.amax()
        self.in_a_row = (self.in_a_row + 1) * skip
        if self.scaler.is_enabled():  # fp16: the scaler looks for itself, and lowers its factor
            self.scaler.step(self.optimizer)
            self.scaler.update()
        elif self.optimizer.defaults.get("fused"):
            self.optimizer.grad_scale, self.optimizer.found_inf = None, skip
            self.optimizer.step()
        elif not skip:
            self.optimizer.step()

    def metrics(self, step: int, now: Mapping[str, float]) -> dict:
        """Values by their names in metrics.jsonl; losses are means over the ranks.

        Says which steps were skipped since the last call.

        Args:
            step: number of the steps done.
            now: the scheduled values of the last one.

        Raises:
            RunFailed: on all ranks, after IN_A_ROW skipped steps in a row, with fp16 IN_A_ROW_FP16.
        """
        self._report_skipped(step)
        values = {}
        for name, value in self.totals.items():
            if name != "grad_norm":
                key = name if name == "loss" else f"loss/{name}"
                values[key] = distributed.mean_over_ranks(value)
        # Of the terms that were computed; dino_local belongs to dino.
        terms = [name for name in now if name.removesuffix("_local") in self.totals]
        values |= {f"weight/{name}": now[name] for name in terms}
        rates = {name: now[name] for name in RATES if name in now}
        return values | rates | {"grad_norm": self.totals["grad_norm"]}

    def _report_skipped(self, step: int) -> None:
        counts = {name: float(count) for name, count in self.skipped.items() if float(count)}
        self.skipped = {}
        if not counts:
            return
        terms = [name for name in counts if name not in ("loss", "grad_norm")]
        culprits = ", ".join(terms or counts)
        half = self.scaler.is_enabled()
        if float(self.in_a_row) >= (IN_A_ROW_FP16 if half else IN_A_ROW):
            raise RunFailed(
                f"not finite for {int(self.in_a_row)} steps up to step {step}: {culprits}; "
                f"the last checkpoint is untouched; {REMEDY}"
            )
        skipped = f"skipped {int(max(counts.values()))} steps before step {step}"
        if half and culprits == "grad_norm":
            notice(f"{skipped}, while fp16 lowers its loss scale until gradients are finite")
        else:
            notice(f"{skipped}, not finite: {culprits}; {REMEDY}")
