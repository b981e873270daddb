"""The networks and the optimizer of one run, from its first stage to its last."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

import kernels
from data.sources.specs import ImageData
from engine import checkpoint, distributed, optim, parallel
from engine.config import TrainConfig
from engine.health import CollapseWatch, health
from engine.lengths import micro_batch_size
from engine.resume import record_images
from engine.run import Run, TeacherOutputs
from engine.stages import Stage
from engine.start import load_initial, start_from
from engine.step import OptimizationStep
from models.lora import tune
from models.ssl_model import SSLOutput, make_teacher


class Trainer:
    """Student, EMA teacher, centring, optimizer and loss scaler of a configuration.

    Args:
        student: freshly built; it is moved to the device and made parallel.
        centering: turns the teacher's logits into targets; part of the training state.
        stages: of the run.
        start_step: the step from which the run goes on.

    Attributes:
        teacher: the EMA of the student.
        copies: whole copies of the teacher, to write and to draw.
        place: moves a network to the run's device, or shards it over the ranks.
    """

    def __init__(
        self,
        cfg: TrainConfig,
        student: nn.Module,
        centering: nn.ModuleDict,
        stages: list[Stage],
        device: torch.device,
        start_step: int = 0,
    ):
        self.cfg, self.stages, self.device = cfg, stages, device
        self.place = partial(
            parallel.place, strategy=cfg.strategy, device=device, precision=cfg.precision
        )
        teacher = make_teacher(student)
        self.copies = parallel.HostCopies(teacher, cfg.strategy)
        compiled = device.type == "cuda" if cfg.compile is None else cfg.compile
        parallel.prepare(student, cfg.checkpointing, compiled)
        parallel.prepare(teacher, "none", compiled)
        kernels.compiled = compiled
        self.student, self.teacher = self.place(student, trains=True), self.place(teacher)
        self.centering = centering.to(device)
        begun = [stage for stage in stages if stage.first < max(start_step, 1)]
        self.stage = begun[-1]  # the stage in which the checkpoint was written
        self._tune()
        self.optimizer = optim.optimizer_for(self.student, cfg.optim)
        self.precision = distributed.choose_precision(cfg.precision, device)

    def start(self, run: Run, images: ImageData, outputs: TeacherOutputs) -> None:
        """Loads the run's checkpoint, if there is one."""
        self.run = run
        watch = CollapseWatch(self.cfg.health.on_collapse)
        run.start(self._state(), outputs, len(images), self.copies.make, watch)
        if distributed.is_main():
            record_images(self.cfg, images)

    def stages_left(self) -> Iterator[Stage]:
        return (stage for stage in self.stages if self.run.start_step < stage.stop)

    def enter(self, stage: Stage) -> tuple[int, OptimizationStep]:
        """Begins or continues a stage: (its first step to do, the optimisation step)."""
        changed = stage.cfg.tune != self.stage.cfg.tune
        self.stage = stage
        if changed:
            self._tune()
            self.optimizer = optim.optimizer_for(self.student, self.cfg.optim, self.optimizer)
            self.run.state = self._state()
        return self.run.enter(stage), self.optimization_step(stage)

    def load_stage_init(self, first_step: int) -> None:
        """At the first step of a stage with an `init` of its own: takes over these weights."""
        init = self.stage.cfg.init
        if self.stage.name and init and first_step == self.stage.first:
            start_from(self.student, load_initial(init, self.stage.cfg.data.channels), init)
            self.teacher.load_state_dict(self.student.state_dict())
            optim.forget(self.optimizer)

    def optimization_step(self, stage: Stage) -> OptimizationStep:
        cfg = stage.cfg
        freeze = optim.span_steps(cfg.optim.freeze_last_layer, stage.stop - stage.first)
        return OptimizationStep(
            parallel.wrap(self.student, cfg.strategy, self.device),
            self.teacher,
            self.optimizer,
            self.precision,
            cfg.optim,
            micro_batch=micro_batch_size(cfg, distributed.world_size(), "koleo" in stage.schedules),
            frozen_until=stage.first + freeze,
        )

    def measures(
        self, update: OptimizationStep, done: int, targets: Any, out: SSLOutput, now: dict
    ) -> dict:
        """What metrics.jsonl records of a step, after `done` steps; `targets` as in train.py."""
        cls = out.cls.unflatten(0, (-1, targets.dino.shape[1]))
        return update.metrics(done, now) | health(targets.in_use(now), cls, out.patches)

    def _tune(self) -> None:
        seed = self.cfg.seed + self.stage.first
        tune(self.student, self.teacher, seed, **vars(self.stage.cfg.tune))

    def _state(self) -> dict:
        return checkpoint.training_state(
            self.student, self.teacher, self.centering, self.optimizer, self.precision[1]
        )
