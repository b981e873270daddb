"""The run of each student of a distillation: set-up, its crops, the end of a step."""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.distillation import DistillationBatch, with_masks
from data.masking import MaskSpec
from data.sources.specs import ImageData
from engine import distributed
from engine.checkpoint import latest_step, write_atomically
from engine.cli import StoppedEarly
from engine.distill_config import DistillTrainConfig
from engine.health import health, warn_of_same_pictures
from engine.logger import notice
from engine.optim import build_schedules
from engine.resume import check_images
from engine.run import Run, note_stop_signals
from engine.settings import provenance, refuse_changes, to_yaml
from engine.stages import Stage, plan_stages
from engine.start import build_student, check_batches, load_init
from engine.students import Entry, check_prototypes, matching_schedules, patch_grid
from engine.trainer import Trainer
from engine.validation import size_pair
from engine.views import crop_adapter
from errors import UserError
from models.distill import MatchingStudent, Teacher
from models.ssl_model import count_parameters

# Measures that mean nothing where the targets are features.
OF_PROTOTYPES = ("health/teacher", "health/prototype", "health/top")


class StudentRun:
    """A run like that of train.py, for one student of a distillation.

    `build` makes the networks, `enters` begins each stage.

    Args:
        base: the configuration of the whole distillation.
        stages: of that configuration.
        heads: whether the student learns from the teacher's prototypes, or matches its features.

    Raises:
        UserError: if the student's configuration does not fit the teacher or the stages.
    """

    def __init__(
        self,
        entry: Entry,
        base: DistillTrainConfig,
        stages: list[Stage],
        teacher: Teacher,
        heads: bool,
        device: torch.device,
    ):
        self.name, self.base, self.base_stages = entry.name, base, stages
        self.teacher, self.heads, self.device = teacher, heads, device
        self.cfg, self.initial = load_init(entry.cfg)
        schedules = build_schedules if heads else matching_schedules
        self.stages = plan_stages(self.cfg, stages[-1].stop, schedules)
        if [stage.stop for stage in self.stages] != [stage.stop for stage in stages]:
            raise UserError(
                f"distill.students.{self.name}.stages are other stages than those of the run"
            )
        self.terms = {name for stage in self.stages for name in stage.schedules}
        if heads:
            check_prototypes(self.name, self.cfg, self.terms, teacher)
        check_batches(self.stages)
        self.run = Run(self.cfg, self.stages, device)

    def build(self, centering: nn.ModuleDict) -> None:
        """Makes the networks, from the student's own seed."""
        cfg = self.cfg
        torch.manual_seed(cfg.seed)
        model = build_student(cfg, self.heads and "ibot" in self.terms, self.initial)
        self.initial = None  # a whole network
        if not self.heads:
            model = MatchingStudent(model.backbone, self.teacher.backbone.embed_dim)
        notice(f"{self.name}, {cfg.model.arch}: {count_parameters(model.backbone):,} parameters")
        self.trainer = Trainer(cfg, model, centering, self.stages, self.device, self.run.start_step)
        sizes = {name: getattr(cfg.crops, name) for name in ("global_size", "local_size")}
        self.adapt = crop_adapter(self.base, cfg.data, self.device, **sizes)
        backbone, where = self.trainer.teacher.backbone, f"distill.students.{self.name}"
        self.grids = {
            size: patch_grid(backbone, size, self.device, where)
            for size in sorted(self._crop_sizes())  # the same order on all ranks
        }

    def _crop_sizes(self) -> set[tuple[int, int]]:
        """Sizes of all crops that the student sees in any stage."""
        sizes = set()
        for stage in self.base_stages:
            for cut in stage.cfg.crops.mix or [stage.cfg.crops]:
                sizes.add(self.adapt.size(size_pair(cut.global_size)))
                if self.heads and self.cfg.crops.local_count:
                    sizes.add(self.adapt.size(size_pair(cut.local_size), local=True))
        return sizes

    def enters(self, number: int) -> bool:
        """Begins a stage, or goes on within it; False if the student is past it."""
        stage = self.stages[number]
        if self.run.start_step >= stage.stop:
            return False
        self.stage = stage
        first_step, self.update = self.trainer.enter(stage)
        self.run.logger.restart_clock(first_step)
        return True

    def own_view(
        self, step: int, batch: DistillationBatch, places: range
    ) -> tuple[DistillationBatch, tuple[int, int]]:
        """The batch at the student's sizes, mean and std, with masks for iBOT; and its patch grid.

        Args:
            places: of the batch's images within the batch of all ranks.
        """
        batch = replace(
            batch,
            global_crops=self.adapt(batch.global_crops),
            local_crops=self.adapt(batch.local_crops, local=True),
        )
        grid, cfg = self.grids[tuple(batch.global_crops.shape[-2:])], self.stage.cfg
        if self.heads and "ibot" in self.stage.schedules:
            ibot = cfg.loss.ibot
            spec = MaskSpec(grid, ibot.mask_probability, ibot.mask_ratio, ibot.mask_fill)
            batch = with_masks(batch, spec, cfg.seed, step, places, cfg.batch_size)
        return batch, grid

    def measures(
        self, done: int, targets: Tensor, cls: Tensor, patches: Tensor, now: Mapping[str, float]
    ) -> dict:
        """What metrics.jsonl records of a step, after `done` steps.

        Args:
            targets: (..., K) probabilities of the prototypes, or (..., D') features to match.
            cls: (G, B, D) of the student.
            patches: (G·B, N, D) of the student.
            now: the scheduled values of the step.
        """
        metrics = self.update.metrics(done, now)
        if self.heads:
            return metrics | health(targets, cls, patches)
        measured = health(targets.softmax(-1), cls, patches)
        names = [name for name in measured if not name.startswith(OF_PROTOTYPES)]
        return metrics | {name: measured[name] for name in names}


def write_config(
    cfg: DistillTrainConfig,
    entries: list[Entry],
    layout: dict[str, range] | None,
    images: ImageData,
) -> None:
    """Writes config.yaml of the whole distillation; warns about data that cannot be learned from.

    Raises:
        UserError: if the distillation has begun and a key has changed that its result depends on.
    """
    folder = Path(cfg.output_dir)
    begun = any(latest_step(Path(entry.cfg.output_dir)) for entry in entries)
    if begun and not cfg.overwrite and (folder / "config.yaml").is_file():
        refuse_changes(cfg, folder / "config.yaml")
    for entry in entries:
        check_images(entry.cfg, images)
    distributed.barrier()
    if distributed.is_main():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "config.yaml", to_yaml(cfg, provenance()))
    if not begun:
        warn_of_same_pictures(images, cfg.health.on_collapse)
    if layout:
        parts = [f"{name}: ranks {r.start} to {r.stop - 1}" for name, r in layout.items()]
        notice(", ".join(parts))


class StopRequest:
    """A signal or the time limit, noticed by all ranks of all students after the same step."""

    def __init__(self, hours: float | None, total_steps: int, device: torch.device):
        self.total_steps = total_steps
        self.deadline = float("inf") if hours is None else time.monotonic() + 3600 * hours
        self.device = device
        self.signalled = False
        note_stop_signals(self._note)

    def _note(self, number: int, frame: Any) -> None:
        self.signalled = True

    def asked(self, step: int) -> bool:
        """Whether to stop after this step; ranks agree every tenth, because they wait for it."""
        if step >= self.total_steps:
            return False
        wanted = self.signalled or time.monotonic() > self.deadline
        if not distributed.active():
            return wanted
        return step % 10 == 0 and distributed.any_rank(wanted, self.device)


def end_step(
    step: int,
    done: list[tuple[Run, Callable[[], dict]]],
    bad: list[tuple[str, str]],
    waited: float,
    stopping: bool,
) -> None:
    """Ends a step for the students of this rank: logs, probes and saves where due.

    Args:
        step: how many updates are done.
        done: the run of each student, and the function that computes what is logged.
        bad: images that could not be read.
        waited: seconds for the batch.

    Raises:
        StoppedEarly: if `stopping`, once all have saved.
    """
    stopped = None
    if stopping:
        stopped = StoppedEarly("stopped with the other students; the same command goes on")
    for run, logged in done:
        run.bad_images.add(bad)
        run.logger.waited += waited
        run.deadline = float("-inf") if stopping else float("inf")
        since = time.perf_counter()
        try:
            run.step_done(step, logged)
        except StoppedEarly as error:
            stopped = error
        for other, _ in done:  # probes and pictures of one do not count as the time of another
            other.logger.last_time += 0.0 if other is run else time.perf_counter() - since
    if stopped:
        raise stopped
