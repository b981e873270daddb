"""Steps whose loss or gradient is not finite: skipped by all ranks alike, named, and after too many in a row the end."""

import torch
from torch import Tensor

from engine import distributed
from engine.cli import RunFailed
from engine.logger import notice

IN_A_ROW = 10  # ours; DINOv3's code gives up at the third
IN_A_ROW_FP16 = 40  # there each halves the scale, which begins at 2 ** 16


class FiniteSteps:
    """Decides on the device, so that the loop does not wait for it; what happened is read when the logger writes."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, device: torch.device
    ):
        self.optimizer, self.scaler = optimizer, scaler
        self.in_a_row = torch.zeros((), device=device)
        self.skipped: dict[str, Tensor] = {}  # how often each value was not finite
        self.told = 0.0

    @torch.no_grad()
    def step(self, totals: dict[str, Tensor]) -> Tensor:
        """The optimiser's step, or none on any rank where a value of `totals` (loss terms, grad_norm) is not finite.

        Returns:
            1.0 where the step was taken, 0.0 where it was skipped, on the device.
        """
        names = list(totals)
        bad = torch.stack([(~totals[name].isfinite()).float() for name in names])
        distributed.all_reduce_max(bad)
        for name, count in zip(names, bad.unbind()):
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
        self.optimizer.zero_grad()
        return 1 - skip

    def report(self, step: int) -> None:
        """Says what was skipped since the last report.

        Raises:
            RunFailed: on all ranks, after IN_A_ROW steps in a row, with fp16 IN_A_ROW_FP16.
        """
        counts = {name: float(count) for name, count in self.skipped.items() if float(count)}
        self.skipped = {}
        if not counts:
            return
        culprits = ", ".join(
            name for name in counts if name not in ("loss", "grad_norm")
        ) or ", ".join(counts)
        remedy = "lower schedule.lr.peak or schedule.teacher_temp, or set precision=fp32"
        half = self.scaler.is_enabled()
        if float(self.in_a_row) >= (IN_A_ROW_FP16 if half else IN_A_ROW):
            raise RunFailed(
                f"not finite for {int(self.in_a_row)} steps up to step {step}: {culprits}; "
                f"the last checkpoint is untouched; {remedy}"
            )
        times = int(max(counts.values()))
        if half and culprits == "grad_norm":
            notice(
                f"skipped {times} steps before step {step}, looking for the scale that fp16 gradients can bear"
            )
            return
        notice(f"skipped {times} steps before step {step}, not finite: {culprits}; {remedy}")
