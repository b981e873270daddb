"""The Gram teacher over a stage: whose patch similarities the student keeps, from when on, and when they are renewed."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from engine import distributed
from engine.checkpoint import write_atomically
from engine.distributed import UnshardedTeacher
from engine.logger import notice
from engine.optim import span_steps
from errors import UserError


class GramTeacher:
    """What `loss.gram` describes (DINOv3, section 4.2).

    Everything but the weights follows from the step, so a resumed run needs no more than `weights`.
    """

    def __init__(
        self,
        settings: Any,
        first: int,
        stop: int,
        ema: nn.Module,
        snapshot: Callable[[], nn.Module],
        load: Callable[[str], nn.Module],
        choose: Callable[[int], str],
        resumed_at: int | None = None,
    ):
        """
        Args:
            settings: the section `loss.gram`.
            first, stop: the stage's steps.
            ema: the EMA teacher's backbone.
            snapshot: a frozen copy of it, as it is now.
            load: a backbone from a MODEL.
            choose: for `auto`, the MODEL to take among what there is at a step.
            resumed_at: the step at which a run goes on within the stage; its weights are about to be loaded.

        Raises:
            UserError: if `refresh` asks for another architecture.
        """
        self.settings, self.ema, self.load, self.choose = settings, ema, load, choose
        self.start = first + span_steps(settings.start, stop - first)
        self.backbone = None
        if settings.teacher == "ema":
            self.backbone = ema
        elif (
            settings.teacher == "init"
            or settings.teacher == "auto"
            and (resumed_at or -1) > self.start
        ):
            self.backbone = snapshot()
        elif settings.teacher != "auto":
            self.backbone = load(settings.teacher)
        if (
            settings.refresh
            and self.backbone is not None
            and _shapes(self.backbone) != _shapes(ema)
        ):
            raise UserError(
                f"loss.gram.refresh copies the teacher into the Gram teacher, but {settings.teacher} is another architecture"
            )

    @property
    def weights(self) -> dict:
        """For the checkpoint: nothing where the EMA teacher itself plays the part, or before the start."""
        return (
            {} if self.backbone is None or self.backbone is self.ema else self.backbone.state_dict()
        )

    def at(self, step: int) -> nn.Module | None:
        """The network that gives the similarities in this step; None before the start."""
        if step < self.start:
            return None
        if self.backbone is None:
            self.backbone = self.load(self.choose(step))
        return self.backbone

    def follow(self, step: int) -> None:
        """Copies the EMA teacher where a refresh is due; `step` counts the updates done."""
        every, most = self.settings.refresh, self.settings.max_refreshes
        if not every or step <= self.start or (step - self.start) % every:
            return
        if most is None or (step - self.start) // every <= most:
            self.backbone.load_state_dict(self.ema.state_dict())


def build_gram_teacher(
    stage: Any, run: Any, unsharded: UnshardedTeacher, load: Callable[[str], nn.Module]
) -> GramTeacher | None:
    """The one of a stage (engine.stages) of a run (engine.run), as far as the run has come; None without the Gram term.

    Args:
        unsharded: the EMA teacher.
        load: a backbone from a MODEL.
    """
    if "gram" not in stage.schedules:
        return None
    resumed = run.start_step if run.start_step > stage.first else None

    def choose(step: int) -> str:
        run.settle()  # the newest snapshot may still be on its way
        return best_snapshot(run.folder, step, lambda spec: run.locality(load(spec)), run.curves)

    def find(spec: str) -> nn.Module:
        run.settle()
        return unsharded.place(
            _frozen(load(f"{run.folder}{spec}" if spec.startswith("@") else spec))
        )

    def snapshot() -> nn.Module:
        unsharded.refresh()
        return unsharded.place(_frozen(copy.deepcopy(unsharded.module.backbone)))

    settings, ema = stage.cfg.loss.gram, unsharded.source.backbone
    gram_teacher = GramTeacher(
        settings, stage.first, stage.stop, ema, snapshot, find, choose, resumed
    )
    if resumed and gram_teacher.weights:
        run.restore({"gram_teacher": gram_teacher.weights})
    return gram_teacher


def _frozen(backbone: nn.Module) -> nn.Module:
    return backbone.requires_grad_(False).eval()


def _shapes(backbone: nn.Module) -> dict:
    return {name: tensor.shape for name, tensor in backbone.state_dict().items()}


def best_snapshot(
    run: Path,
    step: int,
    measure: Callable[[str], float],
    curves: Callable[[Path, dict[str, list[dict]]], None],
) -> str:
    """RUN@STEP of the snapshot up to `step` with the largest measure; the curve goes to RUN/gram_choice.json and .png.

    Raises:
        UserError: if the run keeps no snapshot yet.
    """
    kept = sorted(
        int(path.name)
        for path in (run / "snapshots").glob("*")
        if path.name.isdigit() and int(path.name) <= step
    )
    if not kept:
        raise UserError(
            f"loss.gram.teacher: auto finds no snapshot in {run} up to step {step}; lower checkpoint.snapshot"
        )
    values = {kept_step: measure(f"{run}@{kept_step}") for kept_step in kept}
    best = max(values, key=values.get)
    notice(
        f"Gram teacher: the snapshot of step {best}; locality "
        + ", ".join(f"{k}: {v:.4f}" for k, v in values.items())
    )
    if distributed.is_main():
        write_atomically(
            run / "gram_choice.json", json.dumps({"step": step, "chosen": best, "locality": values})
        )
        curve = [
            {"step": kept_step, "probe/locality": value} for kept_step, value in values.items()
        ]
        curves(run / "gram_choice.png", {"snapshots": curve})
    return f"{run}@{best}"
