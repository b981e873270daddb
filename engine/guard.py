"""Is adaptation doing harm? The probe of the teacher against what the weights could do at step 0."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.cli import RunFailed
from engine.logger import notice
from errors import UserError

REMEDIES = (
    "lower schedule.lr.peak, raise schedule.ema_momentum, let the heads warm up on a frozen backbone "
    "(configs/continue.yaml), train less (tune.mode=lora), or hold on to the initial weights "
    "(loss.gram.weight=1 loss.gram.teacher=init)"
)


class Guard:
    """Says once, or ends the run, when a probe has fallen below its value at step 0.

    Args:
        probe: whose value of metrics.jsonl counts, without `probe/`; the best weights are those where it was highest.
        tolerance: how far it may fall, in the probe's unit: 0.02 is two points of accuracy.
        action: "warn", "stop": raises RunFailed, or None: nothing.
    """

    def __init__(self, probe: str = "knn", tolerance: float = 0.02, action: str | None = None):
        self.key, self.tolerance, self.action = f"probe/{probe}", tolerance, action
        self.initial: float | None = None
        self.said = False

    def recall(self, records: Sequence[dict]) -> float:
        """Takes over what a run that goes on has measured (metrics.jsonl): it is compared with its own step 0.

        Returns:
            The best value, -inf where there is none.
        """
        values = {
            record["step"]: record[self.key]
            for record in records
            if record.get(self.key) is not None
        }
        self.initial = values.get(0)
        self.said = any(self._fell(value) for value in values.values())
        if self.action and records and self.initial is None:
            notice(
                f"guard: this run has no {self.key} of step 0, so there is nothing to compare with"
            )
        return max(values.values(), default=-math.inf)

    def look(self, step: int, values: dict, best: Path) -> str | None:
        """What is wrong after a probe, where it was not said before; None otherwise.

        Args:
            best: the folder of the best weights so far, those of step 0 among them.

        Raises:
            RunFailed: with the sentence, if the action is "stop".
            UserError: if it is to act, and the probe of step 0 does not measure its key.
        """
        if step == 0:
            self.initial = values.get(self.key)
            if self.action and self.initial is None:
                raise UserError(
                    f"guard.probe: the probe of step 0 gave no {self.key}; choose another, or guard.action=null"
                )
        value = values.get(self.key)
        if (
            self.action is None
            or value is None
            or not self._fell(value)
            or (self.said and self.action == "warn")
        ):
            return None
        self.said = True
        sentence = (
            f"guard: {self.key} is {value:.3f} at step {step}, more than {self.tolerance:g} below the "
            f"{self.initial:.3f} of step 0; {best} holds the best weights. What helps: {REMEDIES}"
        )
        if self.action == "stop":
            raise RunFailed(sentence)
        return sentence

    def _fell(self, value: float) -> bool:
        # not(...): a probe that is not a number has fallen too. The small addend: 0.5 - 0.48 is a hair above 0.02.
        return self.initial is not None and not value >= self.initial - self.tolerance - 1e-9


def build_guard(cfg: Any) -> Guard:
    """As the section `guard` says; where it does not say what to do: a warning in a run that starts from `init`."""
    measured = {
        "knn": cfg.probe.knn,
        "linear": cfg.probe.linear,
        "miou": False,
    }  # whether there are masks shows at step 0
    default = "warn" if cfg.init and cfg.probe.every > 0 and measured[cfg.guard.probe] else None
    return Guard(cfg.guard.probe, cfg.guard.tolerance, cfg.guard.action or default)
