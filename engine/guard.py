"""Warns or stops when a probe of the teacher falls below its value at step 0."""

import math
from collections.abc import Sequence
from pathlib import Path

from engine.cli import RunFailed
from engine.config import TrainConfig
from engine.logger import notice
from errors import UserError

REMEDIES = (
    "lower schedule.lr.peak, raise schedule.ema_momentum, let the heads warm up on a frozen "
    "backbone (configs/continue.yaml), train less (tune.mode=lora), or stay close to the initial "
    "weights (loss.gram.weight=1 loss.gram.teacher=init)"
)


class Guard:
    """Says once, or ends the run, when a probe has fallen below its value at step 0.

    Args:
        probe: the value of metrics.jsonl to compare, without `probe/`. The weights are best where
            it was highest.
        tolerance: how far it may fall, in the probe's unit: 0.02 is two points of accuracy.
        action: "warn", "stop": raises RunFailed, or None: nothing.
    """

    def __init__(self, probe: str = "knn", tolerance: float = 0.02, action: str | None = None):
        self.key, self.tolerance, self.action = f"probe/{probe}", tolerance, action
        self.initial: float | None = None
        self.said = False

    def recall(self, records: Sequence[dict]) -> float:
        """Takes over the measurements of a resumed run (metrics.jsonl), that of step 0 included.

        Returns:
            The best value, -inf where there is none.
        """
        measured = [record for record in records if record.get(self.key) is not None]
        values = {record["step"]: record[self.key] for record in measured}
        self.initial = values.get(0)
        self.said = any(self._fell(value) for value in values.values())
        if self.action and records and self.initial is None:
            notice(
                f"guard: this run has no {self.key} of step 0, so there is nothing to compare with"
            )
        return max(values.values(), default=-math.inf)

    def look(self, step: int, values: dict, best: Path) -> str | None:
        """A warning after a probe that fell too far; None otherwise, or if it was given before.

        Args:
            best: the folder of the best weights so far, including those of step 0.

        Raises:
            RunFailed: with the sentence, if the action is "stop".
            UserError: if it is to act, and the probe of step 0 does not measure its key.
        """
        if step == 0:
            self.initial = values.get(self.key)
            if self.action and self.initial is None:
                raise UserError(
                    f"guard.probe: the probe of step 0 gave no {self.key}; "
                    "choose another, or guard.action=null"
                )
        value = values.get(self.key)
        if self.action is None or value is None or not self._fell(value):
            return None
        if self.said and self.action == "warn":
            return None
        self.said = True
        sentence = (
            f"guard: {self.key} is {value:.3f} at step {step}, more than {self.tolerance:g} below "
            f"the {self.initial:.3f} of step 0; {best} holds the best weights. "
            f"What helps: {REMEDIES}"
        )
        if self.action == "stop":
            raise RunFailed(sentence)
        return sentence

    def _fell(self, value: float) -> bool:
        # `not >=`: a probe that is not a number has fallen too. 1e-9: 0.5 - 0.48 exceeds 0.02.
        return self.initial is not None and not value >= self.initial - self.tolerance - 1e-9


def build_guard(cfg: TrainConfig) -> Guard:
    """The guard of the section `guard`; without an action, it warns in a run with an `init`."""
    # Whether there are masks, for "miou", shows at step 0 only.
    measured = {"knn": cfg.probe.knn, "linear": cfg.probe.linear}.get(cfg.guard.probe, False)
    default = "warn" if cfg.init and cfg.probe.every > 0 and measured else None
    return Guard(cfg.guard.probe, cfg.guard.tolerance, cfg.guard.action or default)
