"""The Gram teacher of a stage: the network whose patch similarities the student keeps."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from engine import distributed
from engine.checkpoint import write_atomically
from engine.logger import notice
from engine.optim import span_steps
from engine.start import load_initial
from errors import UserError

if TYPE_CHECKING:
    from engine.config import GramConfig
    from engine.trainer import Trainer


class GramTeacher:
    """The Gram teacher that `loss.gram` describes (DINOv3, section 4.2).

    Everything but the weights follows from the step, so a checkpoint holds only `weights`.
    """

    def __init__(
        self,
        settings: "GramConfig",
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
            settings: of `loss.gram`.
            first, stop: the stage's steps.
            ema: the EMA teacher's backbone.
            snapshot: a frozen copy of it, as it is now.
            load: a backbone from a MODEL.
            choose: for `auto`, gives the MODEL to take at a step.
            resumed_at: the step from which a resumed run continues the stage; the weights of its
                checkpoint are loaded afterwards.

        Raises:
            UserError: if `refresh` asks for another architecture.
        """
        self.settings, self.ema, self.load, self.choose = settings, ema, load, choose
        self.start = first + span_steps(settings.start, stop - first)
        self.backbone = None
        if settings.teacher == "ema":
            self.backbone = ema
        elif settings.teacher == "init":
            self.backbone = snapshot()
        elif settings.teacher != "auto":
            self.backbone = load(settings.teacher)
        elif resumed_at is not None and resumed_at > self.start:
            self.backbone = snapshot()
        copies = settings.refresh and self.backbone is not None
        if copies and _shapes(self.backbone) != _shapes(ema):
            raise UserError(
                "loss.gram.refresh copies the teacher into the Gram teacher, "
                f"but {settings.teacher} is another architecture"
            )

    @property
    def weights(self) -> dict:
        """For the checkpoint; empty before the start, and where the EMA teacher itself is used."""
        own = self.backbone is not None and self.backbone is not self.ema
        return self.backbone.state_dict() if own else {}

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


def build_gram_teacher(trainer: "Trainer") -> GramTeacher | None:
    """The Gram teacher of the trainer's stage, where the run stands; None without the term."""
    stage, run = trainer.stage, trainer.run
    if "gram" not in stage.schedules:
        return None
    resumed = run.start_step if run.start_step > stage.first else None

    def load(spec: str) -> nn.Module:
        return trainer.place(_frozen(load_initial(spec, stage.cfg.data.channels)))

    def locality(spec: str) -> float:
        return run.outputs.locality(load(spec))

    def choose(step: int) -> str:
        run.settle()  # the newest snapshot may not be written yet
        return best_snapshot(run.folder, step, locality, run.outputs.curves)

    def find(spec: str) -> nn.Module:
        run.settle()
        whole = f"{run.folder}{spec}" if spec.startswith("@") else spec
        return load(whole)

    def snapshot() -> nn.Module:
        return trainer.place(_frozen(trainer.copies.make(everywhere=True).backbone))

    gram_teacher = GramTeacher(
        stage.cfg.loss.gram,
        stage.first,
        stage.stop,
        trainer.teacher.backbone,
        snapshot,
        find,
        choose,
        resumed,
    )
    if resumed and gram_teacher.weights:
        run.restore({"gram_teacher": gram_teacher.weights})
    return gram_teacher


def build_anchor(trainer: "Trainer") -> nn.Module | None:
    """A frozen copy of the backbone as it was when the stage began; None without the term."""
    stage, run = trainer.stage, trainer.run
    if "anchor" not in stage.schedules:
        return None
    anchor = trainer.place(_frozen(trainer.copies.make(everywhere=True).backbone))
    run.state["anchor"] = anchor.state_dict()
    if run.start_step > stage.first:
        run.restore({"anchor": run.state["anchor"]})
    return anchor


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
    """RUN@STEP of the snapshot up to `step` with the largest measure.

    The measures go to RUN/gram_choice.json and RUN/gram_choice.png.

    Raises:
        UserError: if the run keeps no snapshot yet.
    """
    names = [path.name for path in (run / "snapshots").glob("*") if path.name.isdigit()]
    kept = sorted(int(name) for name in names if int(name) <= step)
    if not kept:
        raise UserError(
            f"loss.gram.teacher: auto finds no snapshot in {run} up to step {step}; "
            "lower checkpoint.snapshot"
        )
    values = {kept_step: measure(f"{run}@{kept_step}") for kept_step in kept}
    best = max(values, key=values.get)
    measures = ", ".join(f"{kept_step}: {value:.4f}" for kept_step, value in values.items())
    notice(f"Gram teacher: the snapshot of step {best}; locality {measures}")
    if distributed.is_main():
        choice = {"step": step, "chosen": best, "locality": values}
        write_atomically(run / "gram_choice.json", json.dumps(choice))
        curve = [{"step": kept_step, "probe/locality": v} for kept_step, v in values.items()]
        curves(run / "gram_choice.png", {"snapshots": curve})
    return f"{run}@{best}"
