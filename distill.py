"""Distillation: a frozen teacher, of any architecture, and one student or many, in one run.

    python   distill.py --config configs/distill_quickstart.yaml                                  # laptop CPU, minutes
    torchrun --nproc_per_node 8 distill.py --config distill_dinov3_family.yaml data.train=/my/images

Each step:
    1. The teacher looks at the global crops, once for all students.
    2. Each student sees every crop, nothing hidden, at the size and with the mean and std that are its own.
    3. The loss is that of train.py on the teacher's prototypes; or, for a teacher without heads, features are matched.
    4. The student follows the gradient.
    5. Its average follows the student: this is what is exported.

On one device students take turns within the step; of several ranks each student has its own (`share`), and all do the
teacher's work. output_dir/students/NAME is what train.py would leave; started again, the run goes on.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.distillation import (
    CropAdapter,
    DistillationBatch,
    crop_adapter,
    exchanged,
    rank_share,
    with_masks,
)
from data.loader import Batch, stage_loader
from data.sources.specs import ImageData, open_data
from engine import checkpoint, distributed, optim
from engine.cli import config_parser, run_script
from engine.config import (
    DistillTrainConfig,
    length_in_steps,
    load_config,
    micro_batch_size,
    with_statistics,
)
from engine.finite import FiniteSteps
from engine.guard import build_guard
from engine.health import CollapseWatch
from engine.logger import BadImages, notice
from engine.run import Cadence, Run
from engine.settings import provenance, refuse_changes, to_yaml
from engine.stages import Stage, plan_stages
from engine.start import build_student, load_initial
from engine.students import (
    Entry,
    StopRequest,
    all_done,
    begin,
    check_prototypes,
    check_run,
    command_that_makes,
    divide_ranks,
    matching_schedules,
    patch_grid,
    student_configs,
    student_health,
    uses_heads,
    what_is_cut,
)
from engine.validation import size_pair
from errors import UserError
from losses.centering import build_centering
from losses.distill import matching_losses, matching_targets
from losses.gram import downsample_patches
from models.distill import MatchingStudent, Teacher, load_teacher
from models.lora import tune
from models.ssl_model import count_parameters, make_teacher, update_ema
from train import Targets, balance, compute_losses, metrics, teacher_outputs


def main(argv: list[str] | None = None) -> None:
    arguments = config_parser(__doc__, DistillTrainConfig).parse_args(argv)
    cfg = load_config(arguments.config, arguments.overrides, DistillTrainConfig)
    device = distributed.choose_device(cfg.device)
    with distributed.process_group(device, cfg.hang_timeout):
        distill(cfg, device)


def distill(cfg: DistillTrainConfig, device: torch.device) -> None:
    entries = student_configs(cfg)
    teacher = open_teacher(cfg).to(device)
    heads = uses_heads(cfg, teacher)
    images = open_data(cfg.data.train, cfg.data.channels)
    stages = plan_stages(cfg, length_in_steps(cfg, len(images)), optim.build_schedules)
    check_run(cfg, stages, distributed.world_size())
    look = teacher_crop_adapter(cfg, teacher, device)

    layout = divide_ranks(entries, distributed.world_size())
    group = distributed.split_ranks(list(layout.values())) if layout else None
    mine = [entry for entry in entries if not layout or distributed.rank() in layout[entry.name]]
    with distributed.within(group):
        students = [Student(entry, cfg, stages, teacher, heads, device) for entry in mine]
    begin(cfg, entries, layout, images)
    with distributed.within(group):
        students = [student for student in students if student.begins(images)]
    starts = [student.run.start_step for student in students]
    first_step = min(distributed.gather_objects(min(starts, default=stages[-1].stop)))
    stop = StopRequest(cfg.time_limit, stages[-1].stop, device)
    for number, stage in enumerate(stages):
        if first_step < stage.stop:
            with distributed.within(group):
                active = [student for student in students if student.enters(number)]
            teach = partial(with_teacher_features, teacher, heads, look, stage.cfg.micro_batch_size)
            first = max(first_step, stage.first)
            distill_stage(what_is_cut(stage, heads), first, teach, active, group, stop, device)


def teacher_crop_adapter(
    cfg: DistillTrainConfig, teacher: Teacher, device: torch.device
) -> CropAdapter:
    """How the teacher sees the crops: at its size, with its own mean and std. Checks that it takes them."""
    size = cfg.distill.teacher_size
    patch_grid(
        teacher.backbone,
        size_pair(size or cfg.crops.global_size),
        device,
        f"the teacher {cfg.distill.teacher}",
    )
    return crop_adapter(
        cfg, teacher.backbone.preprocessing, cfg.data.channels, device, global_size=size
    )


def distill_stage(
    stage: Stage,
    first_step: int,
    teach: Callable[[Batch], DistillationBatch],
    students: list["Student"],
    group: Any,
    stop: StopRequest,
    device: torch.device,
) -> None:
    """The steps of one stage, for the students of this rank; one that is ahead, after a kill, waits for the others."""
    cfg = stage.cfg
    autocast, _ = distributed.choose_precision(cfg.precision, device)
    with distributed.within(group):
        places = rank_share(cfg.batch_size)
    wanted = distributed.gather_objects(places)
    since = time.perf_counter()
    for step, batch in enumerate(stage_loader(stage, first_step, 1, device), first_step):
        waited = time.perf_counter() - since

        # 1. The teacher looks at the global crops, once for all students; of several ranks, each at its share.
        with autocast():
            seen = teach(batch.to(device, non_blocking=True))
        seen = seen if group is None else exchanged(seen, wanted)
        stopping = stop.asked(step + 1)

        # 2. to 5. are the students' own.
        with distributed.within(group):
            turns = [student for student in students if step >= student.run.start_step]
            done = [(student.run, student.step(step, seen, places)) for student in turns]
            all_done(step + 1, done, batch.bad, waited, stopping)
        since = time.perf_counter()


# ----------------------------------------------------------------- one student


class Student:
    """A run like that of train.py, but for where its targets come from and who calls its steps."""

    def __init__(
        self,
        entry: Entry,
        base: DistillTrainConfig,
        stages: list[Stage],
        teacher: Teacher,
        heads: bool,
        device: Any,
    ):
        """Checks everything; makes nothing yet. `stages` are those of the run's own configuration, `base`."""
        cfg, self.name = entry.cfg, entry.name
        self.base, self.teacher, self.heads, self.device = base, teacher, heads, device
        self.initial = load_initial(cfg.init, cfg.data.channels) if cfg.init else None
        self.cfg = cfg = (
            cfg if self.initial is None else with_statistics(cfg, self.initial.preprocessing)
        )
        self.stages = plan_stages(
            cfg, stages[-1].stop, optim.build_schedules if heads else matching_schedules
        )
        if [stage.stop for stage in self.stages] != [stage.stop for stage in stages]:
            raise UserError(
                f"distill.students.{self.name}.stages are other stages than those of the run"
            )
        self.cuts = [
            sizes for stage in stages for sizes in stage.cfg.crops.mix or [stage.cfg.crops]
        ]
        self.terms = {name for stage in self.stages for name in stage.schedules}
        if heads:
            check_prototypes(self.name, cfg, self.terms, teacher)
        for stage in self.stages:
            micro_batch_size(stage.cfg, distributed.world_size(), "koleo" in stage.schedules)
        cadence = Cadence(log=cfg.log_every, probe=cfg.probe.every, **vars(cfg.checkpoint))
        self.run = Run(
            Path(cfg.output_dir),
            [stage.stop for stage in stages],
            cadence,
            device,
            mirrors=cfg.mirrors,
        )

    def begins(self, images: ImageData) -> bool:
        """Makes everything, as in train.py's `train`; False if there is nothing left to do."""
        cfg, device = self.cfg, self.device
        if not self.run.open(
            to_yaml(cfg, provenance()), partial(refuse_changes, cfg), cfg.overwrite
        ):
            return False
        torch.manual_seed(cfg.seed)
        model = build_student(cfg, self.heads and "ibot" in self.terms, self.initial)
        model = (
            model
            if self.heads
            else MatchingStudent(model.backbone, self.teacher.backbone.embed_dim)
        )
        notice(f"{self.name}, {cfg.model.arch}: {count_parameters(model.backbone):,} parameters")
        self.model, self.ema = model.to(device), make_teacher(model.to(device))
        sizes = {name: getattr(cfg.crops, name) for name in ("global_size", "local_size")}
        self.sight = crop_adapter(self.base, cfg.data, cfg.data.channels, device, **sizes)
        sizes = {self.sight.size(size_pair(cut.global_size)) for cut in self.cuts}
        if self.heads and cfg.crops.local_count:
            sizes |= {self.sight.size(size_pair(cut.local_size), local=True) for cut in self.cuts}
        whose = f"distill.students.{self.name}"
        self.grids = {size: patch_grid(self.ema.backbone, size, device, whose) for size in sizes}
        unsharded = distributed.UnshardedTeacher(self.ema, cfg.strategy, device, cfg.precision)
        compiled = device.type == "cuda" if cfg.compile is None else cfg.compile
        distributed.prepare(self.model, cfg.checkpointing, compiled)
        unsharded.place(self.model), unsharded.place(self.ema)
        self.centering = (
            build_centering(cfg.loss, self.terms) if self.heads else nn.ModuleDict()
        ).to(device)
        self.stage = [stage for stage in self.stages if stage.first < max(self.run.start_step, 1)][
            -1
        ]
        tune(self.model, self.ema, cfg.seed + self.stage.first, **vars(self.stage.cfg.tune))
        self.optimizer = optim.optimizer_for(self.model, cfg.optim)
        self.autocast, self.scaler = distributed.choose_precision(cfg.precision, device)
        self.run.start(
            checkpoint.training_state(
                self.model, self.ema, self.centering, self.optimizer, self.scaler
            ),
            bad_images=BadImages(self.run.folder, len(images), cfg.data.max_bad),
            refresh=unsharded.refresh,
            watch=CollapseWatch(cfg.health.on_collapse),
            guard=build_guard(cfg),
            **teacher_outputs(cfg, images, unsharded.module, device),
        )
        return True

    def enters(self, number: int) -> bool:
        """Begins a stage, or goes on within it; False if it is behind this student."""
        stage, before = self.stages[number], self.stage
        if self.run.start_step >= stage.stop:
            return False
        cfg, run, self.stage = stage.cfg, self.run, stage
        if cfg.tune != before.cfg.tune:
            tune(self.model, self.ema, cfg.seed + stage.first, **vars(cfg.tune))
            self.optimizer = optim.optimizer_for(self.model, cfg.optim, self.optimizer)
            run.state = checkpoint.training_state(
                self.model, self.ema, self.centering, self.optimizer, self.scaler
            )
        run.logger.restart_clock(run.enter(stage))
        used = self.model.uses_all(stage.schedules)
        self.parallel = distributed.wrap(self.model, cfg.strategy, self.device, all_used=used)
        self.micro_batch = micro_batch_size(
            cfg, distributed.world_size(), "koleo" in stage.schedules
        )
        self.freeze_steps = optim.span_steps(cfg.optim.freeze_last_layer, stage.stop - stage.first)
        self.finite = FiniteSteps(self.optimizer, self.scaler, self.device)
        return True

    def step(self, step: int, batch: DistillationBatch, places: range) -> Callable[[], dict]:
        """Numbered as in train.py; the teacher has looked already. Returns what is to be logged, if it is."""
        cfg, stage, now = self.stage.cfg, self.stage, self.stage.now(step)
        distributed.seed_step(cfg.seed, step)
        crops = self.sight(batch.global_crops), self.sight(batch.local_crops, local=True)
        batch = replace(batch, global_crops=crops[0], local_crops=crops[1])
        grid = self.grids[tuple(batch.global_crops.shape[-2:])]
        if self.heads and "ibot" in now:
            batch = with_masks(batch, grid, cfg.loss.ibot, (cfg.seed, step), places, cfg.batch_size)
        micro_batches = batch.split(self.micro_batch)
        totals: dict[str, Tensor] = {}
        with self.autocast():
            if self.heads:
                targets = head_targets(
                    self.teacher, micro_batches, self.centering, now["teacher_temp"], grid
                )
            else:
                seen = (
                    [crops.teacher_cls for crops in micro_batches],
                    [on_grid(crops, grid) for crops in micro_batches],
                )
                targets = matching_targets(*seen, distributed.all_reduce_sum)

        for number, (crops, target) in enumerate(zip(micro_batches, targets), 1):
            share = len(crops.images) / len(batch.images)
            with distributed.accumulate(self.parallel, last=number == len(targets)):
                # 2. The student sees every crop, nothing hidden: the masks only say which patches are compared.
                with self.autocast():
                    out = self.parallel(
                        crops.global_crops, crops.local_crops, crops.masks, hide=False
                    )

                # 3. The loss is a weighted sum of the terms.
                losses = compute_losses(out, target, crops, cfg.loss, now) | matching_losses(
                    out, target, now
                )
                losses["loss"] = sum(now[name] * value for name, value in losses.items())
                self.scaler.scale(share * losses["loss"]).backward()
            for name, value in losses.items():
                totals[name] = totals.get(name, 0.0) + share * value.detach()

        # 4. The student follows the gradient.
        self.scaler.unscale_(self.optimizer)
        if step - stage.first < self.freeze_steps:
            optim.drop_last_layer_gradients(self.model)
        totals["grad_norm"] = optim.clip_gradients(
            self.model, cfg.optim.clip_grad, cfg.optim.clip_per
        )
        optim.set_rates(self.optimizer, now["lr"], now["weight_decay"])
        self.finite.step(totals)

        # 5. Its average follows the student.
        update_ema(self.ema, self.model, now["ema_momentum"], distributed.local)

        def logged() -> dict:
            self.finite.report(step + 1)
            return metrics(totals, now) | student_health(targets[-1], out, len(crops.images))

        return logged


# ----------------------------------------------------------------- the method


@torch.no_grad()
def with_teacher_features(
    teacher: Teacher, heads: bool, look: CropAdapter, micro_batch: int | None, batch: Batch
) -> DistillationBatch:
    """The batch with what the teacher says of its global crops, so many images at a time."""
    views = len(batch.global_crops) // len(batch.images)
    parts = look(batch.global_crops).split((micro_batch or len(batch.images)) * views)
    seen = [teacher(part, heads) for part in parts]
    cls, patches = (
        torch.cat([getattr(part, name) for part in seen]) for name in ("cls", "patches")
    )
    return DistillationBatch(
        **vars(batch), teacher_cls=cls, teacher_patches=patches, grid=seen[0].grid
    )


@torch.no_grad()
def head_targets(
    teacher: Teacher,
    micro_batches: list[DistillationBatch],
    centering: nn.ModuleDict,
    teacher_temp: float,
    grid: tuple[int, int],
) -> list[Targets]:
    """As train.py's `teacher_targets`, from what was seen; patches between the teacher's come by interpolation."""
    logits = [teacher.dino_head.prototypes(crops.teacher_cls) for crops in micro_batches]
    dino = balance(centering["dino"], logits, teacher_temp)
    ibot = [None] * len(dino)
    if "ibot" in centering and micro_batches[0].masks is not None:
        chosen = [F.normalize(on_grid(crops, grid)[crops.masks], dim=-1) for crops in micro_batches]
        ibot = balance(
            centering["ibot"],
            [teacher.patch_head.prototypes(rows) for rows in chosen],
            teacher_temp,
        )
    views = [(-1, len(crops.images)) for crops in micro_batches]  # (G·B, K) -> (G, B, K)
    return [
        Targets(probs.unflatten(0, shape), patches, None)
        for probs, shape, patches in zip(dino, views, ibot)
    ]


def on_grid(crops: DistillationBatch, grid: tuple[int, int]) -> Tensor:
    """(G·B, N, E') of the teacher's patches, where the student has its own."""
    return (
        crops.teacher_patches
        if crops.grid == grid
        else downsample_patches(crops.teacher_patches, crops.grid, grid)
    )


def open_teacher(cfg: DistillTrainConfig) -> Teacher:
    if cfg.distill.teacher is None:
        raise UserError(
            "who teaches? give distill.teacher, a MODEL: a run, released weights, timm:NAME"
        )
    try:
        return load_teacher(cfg.distill.teacher, cfg.data.channels)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}{command_that_makes(cfg.distill.teacher)}") from None


if __name__ == "__main__":
    run_script(main)
