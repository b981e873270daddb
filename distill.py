"""Distillation: a frozen teacher, of any architecture, and one student or many, in one run.

    python distill.py --config configs/distill_quickstart.yaml    # laptop CPU, minutes
    torchrun --nproc_per_node 8 distill.py --config distill_dinov3_family.yaml \
        data.train=/my/images

Each step:
    1. The teacher sees the global crops, once for all students.
    2. Each student sees every crop, nothing hidden, at its own size and with its own mean and std.
    3. The loss is that of train.py on the teacher's prototypes; for a teacher without heads, the
       student's features match the teacher's.
    4. The student follows the gradient.
    5. Its average follows the student: this is what is exported.

On one device students take turns within the step. Of several ranks each student has its own
(`share`), and all do the teacher's work. output_dir/students/NAME is a folder as train.py writes
it. The same command resumes a run.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from data.distillation import CropAdapter, DistillationBatch, exchanged, rank_share
from data.loader import Batch
from data.sources.specs import ImageData, open_data
from engine import distributed
from engine.cli import config_parser, run_script
from engine.config import load_config
from engine.distill_config import DistillTrainConfig
from engine.lengths import length_in_steps
from engine.logger import say_passed_over
from engine.optim import build_schedules
from engine.parallel import place
from engine.stages import Stage, plan_stages
from engine.student_run import StopRequest, StudentRun, end_step, write_config
from engine.students import (
    check_stages,
    divide_ranks,
    loaded_stage,
    open_teacher,
    student_configs,
    teacher_crop_adapter,
    uses_heads,
)
from engine.views import stage_loader
from evals.inloop import teacher_outputs
from losses.centering import build_centering
from losses.distill import matching_losses, matching_targets
from losses.gram import on_grid
from models.distill import Teacher
from train import Targets, balance, compute_losses


def main(argv: list[str] | None = None) -> None:
    arguments = config_parser(__doc__, DistillTrainConfig).parse_args(argv)
    cfg = load_config(arguments.config, arguments.overrides, DistillTrainConfig)
    device = distributed.choose_device(cfg.device)
    with distributed.process_group(device, cfg.hang_timeout):
        distill(cfg, device)


def distill(cfg: DistillTrainConfig, device: torch.device) -> None:
    entries = student_configs(cfg)
    teacher = open_teacher(cfg)
    teacher.backbone = place(teacher.backbone, cfg.strategy, device, cfg.precision)
    teacher.to(device)
    heads = uses_heads(cfg, teacher)
    images = open_data(cfg.data.train, cfg.data.channels)
    say_passed_over(images)
    stages = plan_stages(cfg, length_in_steps(cfg, len(images)), build_schedules)
    check_stages(stages, distributed.world_size())
    adapt = teacher_crop_adapter(cfg, teacher, device)

    layout = divide_ranks(entries, distributed.world_size())
    group = distributed.split_ranks(list(layout.values())) if layout else None
    mine = [entry for entry in entries if not layout or distributed.rank() in layout[entry.name]]
    with distributed.within(group):
        students = [StudentRun(entry, cfg, stages, teacher, heads, device) for entry in mine]
    write_config(cfg, entries, layout, images)
    with distributed.within(group):
        students = [student for student in students if begins(student, images)]
    starts = [student.run.start_step for student in students]
    first_step = min(distributed.gather_objects(min(starts, default=stages[-1].stop)))
    stop = StopRequest(cfg.time_limit, stages[-1].stop, device)
    for number, stage in enumerate(stages):
        if first_step < stage.stop:
            with distributed.within(group):
                active = [student for student in students if student.enters(number)]
            teach = partial(
                with_teacher_features, teacher, heads, adapt, stage.cfg.micro_batch_size
            )
            first = max(first_step, stage.first)
            distill_stage(loaded_stage(stage, heads), first, teach, active, group, stop, device)


def begins(student: StudentRun, images: ImageData) -> bool:
    """Makes or resumes a student's run; False if there is nothing left to do."""
    if not student.run.open():
        return False
    cfg = student.cfg
    student.build(build_centering(cfg.loss, student.terms) if student.heads else nn.ModuleDict())
    outputs = teacher_outputs(cfg, images, student.trainer.teacher, student.device)
    student.trainer.start(student.run, images, outputs)
    return True


def distill_stage(
    stage: Stage,
    first_step: int,
    teach: Callable[[Batch], DistillationBatch],
    students: list[StudentRun],
    group: Any,
    stop: StopRequest,
    device: torch.device,
) -> None:
    """The steps of one stage, for the students of this rank.

    After a kill, a student that is ahead waits for the others.
    """
    cfg = stage.cfg
    autocast, _ = distributed.choose_precision(cfg.precision, device)
    with distributed.within(group):
        places = rank_share(cfg.batch_size)
    wanted = distributed.gather_objects(places)
    since = time.perf_counter()
    for step, batch in enumerate(stage_loader(stage, first_step, 1, device), first_step):
        waited = time.perf_counter() - since

        # 1. The teacher sees the global crops, once for all students; each rank shows it its share.
        with autocast():
            seen = teach(batch.to(device, non_blocking=True))
        seen = seen if group is None else exchanged(seen, wanted)
        stopping = stop.asked(step + 1)

        # 2. to 5. are the students' own.
        with distributed.within(group):
            turns = [student for student in students if step >= student.run.start_step]
            done = [(student.run, student_step(student, step, seen, places)) for student in turns]
            end_step(step + 1, done, batch.bad, waited, stopping)
        since = time.perf_counter()


# ----------------------------------------------------------------- the method


def student_step(
    student: StudentRun, step: int, batch: DistillationBatch, places: range
) -> Callable[[], dict]:
    """One step of a student, on what the teacher said; returns what computes the values to log."""
    update, now = student.update, student.stage.now(step)
    loss = student.stage.cfg.loss
    distributed.seed_step(student.cfg.seed, step)
    batch, grid = student.own_view(step, batch, places)
    micro_batches = batch.split(update.micro_batch)
    with update.forward("teacher"):
        if student.heads:
            targets = head_targets(
                student.teacher, micro_batches, student.trainer.centering, now["teacher_temp"], grid
            )
        else:
            cls = [crops.teacher_cls for crops in micro_batches]
            patches = [on_grid(crops.teacher_patches, crops.grid, grid) for crops in micro_batches]
            targets = matching_targets(cls, patches, distributed.all_reduce_sum)

    for crops, target in update.micro_batches(micro_batches, targets):
        # 2. The student sees every crop, nothing hidden: masks say which patches are compared.
        with update.forward("forward"):
            out = update.student(crops.global_crops, crops.local_crops, None, crops.masked())

        # 3. The loss is a weighted sum of the terms.
        losses = compute_losses(out, target, crops, loss, now)
        if not student.heads:
            losses |= matching_losses(out.matched_cls, out.matched_patches, target, now)
        update.backward(losses, now)

    # 4. The student follows the gradient.
    update.apply_gradients(step, now["lr"], now["weight_decay"])

    # 5. Its average follows the student.
    update.update_teacher(now["ema_momentum"])
    target_rows = target.in_use(now) if student.heads else target.cls
    cls = out.cls.unflatten(0, (-1, len(crops.images)))
    return partial(student.measures, step + 1, target_rows, cls, out.patches, now)


@torch.no_grad()
def with_teacher_features(
    teacher: Teacher, heads: bool, adapt: CropAdapter, micro_batch: int | None, batch: Batch
) -> DistillationBatch:
    """The batch with the teacher's features of its global crops, computed in micro batches."""
    views = len(batch.global_crops) // len(batch.images)
    parts = adapt(batch.global_crops).split((micro_batch or len(batch.images)) * views)
    seen = [teacher(part, heads) for part in parts]
    return DistillationBatch(
        **vars(batch),
        teacher_cls=torch.cat([part.cls for part in seen]),
        teacher_patches=torch.cat([part.patches for part in seen]),
        grid=seen[0].grid,
    )


@torch.no_grad()
def head_targets(
    teacher: Teacher,
    micro_batches: list[DistillationBatch],
    centering: nn.ModuleDict,
    teacher_temp: float,
    grid: tuple[int, int],
) -> list[Targets]:
    """As `teacher_targets` of train.py, from the teacher's features on the student's grid."""
    logits = [teacher.dino_head.prototypes(crops.teacher_cls) for crops in micro_batches]
    dino = balance(centering["dino"], logits, teacher_temp)
    ibot = [None] * len(dino)
    if "ibot" in centering and micro_batches[0].masks is not None:
        rows = [
            on_grid(crops.teacher_patches, crops.grid, grid).flatten(0, 1)[crops.masked()]
            for crops in micro_batches
        ]
        logits = [teacher.patch_head.prototypes(F.normalize(part, dim=-1)) for part in rows]
        ibot = balance(centering["ibot"], logits, teacher_temp)
    targets = []
    for crops, probs, patches in zip(micro_batches, dino, ibot, strict=True):
        probs = probs.unflatten(0, (-1, len(crops.images)))  # (G·B, K) -> (G, B, K)
        targets.append(Targets(probs, patches, None))
    return targets


if __name__ == "__main__":
    run_script(main)
