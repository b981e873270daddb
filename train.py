"""Self-supervised pre-training: DINO, iBOT, DINOv2 and DINOv3 are configurations of this one loop.

    python train.py --config configs/quickstart.yaml    # laptop CPU, minutes, no download
    torchrun --nproc_per_node 8 train.py --config vits.yaml data.train=/my/images    # eight GPUs

Each step:
    1. The teacher sees the global crops only and gives the targets.
    2. The student sees every crop, with patches of the global crops hidden.
    3. The loss is a weighted sum of the terms.
    4. The student follows the gradient.
    5. The teacher follows the student: teacher <- m * teacher + (1 - m) * student.

Started again with the same output_dir, a run goes on where it stopped.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from data.loader import Batch
from data.sources.specs import open_data
from engine import distributed
from engine.cli import config_parser, run_script
from engine.config import LossConfig, TrainConfig, load_config
from engine.gram import build_anchor, build_gram_teacher, check_gram_teachers
from engine.health import warn_of_same_pictures
from engine.logger import notice, say_passed_over
from engine.resume import say_stretched
from engine.run import Run, run_of_its_own
from engine.stages import Stage
from engine.start import build_student, load_init, plan_run
from engine.step import OptimizationStep
from engine.trainer import Trainer
from engine.views import stage_loader
from evals.check import check_run
from evals.inloop import teacher_outputs
from losses.anchor import anchor_loss
from losses.centering import Centering, build_centering
from losses.coding_rate import coding_rate_loss
from losses.dino import multicrop_dino_loss
from losses.gram import gram_loss, on_grid
from losses.ibot import ibot_loss
from losses.koleo import koleo_loss
from models.features import Features
from models.ssl_model import SSLModel, SSLOutput, count_parameters


def main(argv: list[str] | None = None) -> None:
    arguments = config_parser(__doc__, check=True).parse_args(argv)
    cfg = load_config(arguments.config, arguments.overrides)
    if arguments.check:
        return check_run(arguments.config, cfg, train_step, build_centering)
    device = distributed.choose_device(cfg.device)
    with run_of_its_own(), distributed.process_group(device, cfg.hang_timeout):
        train(cfg, device)


def train(cfg: TrainConfig, device: torch.device) -> None:
    cfg, initial = load_init(cfg)
    images = open_data(cfg.data.train, cfg.data.channels)
    say_passed_over(images)
    stages = plan_run(cfg, images)
    run = Run(cfg, stages, device, cfg.time_limit)
    if not run.open():
        return
    torch.manual_seed(cfg.seed)
    terms = {name for stage in stages for name in stage.schedules}
    student = build_student(cfg, "ibot" in terms, initial)
    del initial  # a whole network
    backbone, whole = count_parameters(student.backbone), count_parameters(student)
    notice(f"{cfg.model.arch}: {backbone:,} parameters, {whole:,} with the heads")
    centering = build_centering(cfg.loss, terms)
    trainer = Trainer(cfg, student, centering, stages, device, run.start_step)
    say_stretched(cfg, stages, run.start_step)
    if run.start_step == 0:
        warn_of_same_pictures(images, cfg.health.on_collapse)
    outputs = teacher_outputs(cfg, images, trainer.teacher, device)
    check_gram_teachers(stages)
    trainer.start(run, images, outputs)
    for stage in trainer.stages_left():
        train_stage(trainer, stage)


def train_stage(trainer: Trainer, stage: Stage) -> None:
    """The steps of one stage; a run without `stages` has one."""
    cfg, run, device = stage.cfg, trainer.run, trainer.device
    first_step, update = trainer.enter(stage)
    trainer.load_stage_init(first_step)
    gram_teacher, anchor = build_gram_teacher(trainer), build_anchor(trainer)
    loader = stage_loader(stage, first_step, trainer.student.backbone.patch_size, device)
    for step, batch in run.steps(loader, first_step):
        distributed.seed_step(cfg.seed, step)
        now = stage.now(step)
        gram = gram_teacher.at(step) if gram_teacher else None
        batch = batch.to(device, non_blocking=True)
        frozen = gram, anchor
        targets, out = train_step(update, step, batch, trainer.centering, frozen, cfg.loss, now)
        if gram_teacher:  # at its times it follows the teacher
            gram_teacher.follow(step + 1)
            run.state["gram_teacher"] = gram_teacher.weights
        run.step_done(step + 1, partial(trainer.measures, update, step + 1, targets, out, now))


# ----------------------------------------------------------------- the method


def train_step(
    update: OptimizationStep,
    step: int,
    batch: Batch,
    centering: nn.ModuleDict,
    frozen: tuple[nn.Module | None, nn.Module | None],
    loss: LossConfig,
    now: dict[str, float],
) -> tuple["Targets", SSLOutput]:
    """One step of the run; returns the targets and the student's output of its last micro batch.

    Args:
        update: holds student, teacher and optimizer; scales, adds up and clips the gradients.
        frozen: the Gram teacher and the anchor, where their terms are in use.
        now: the scheduled values of this step, and the weights of the terms in use.
    """
    micro_batches = batch.split(update.micro_batch)

    # 1. The teacher sees the global crops only and gives the targets, of the whole batch at once.
    with update.forward("teacher"):
        temp = now["teacher_temp"]
        targets = teacher_targets(update.teacher, micro_batches, centering, temp, *frozen)

    for crops, target in update.micro_batches(micro_batches, targets):
        # 2. The student sees every crop, with patches of the global crops hidden.
        with update.forward("forward"):
            out = update.student(crops.global_crops, crops.local_crops, crops.masks, crops.masked())

        # 3. The loss is a weighted sum of the terms.
        losses = compute_losses(out, target, crops, loss, now)
        update.backward(losses, now)

    # 4. The student follows the gradient.
    update.apply_gradients(step, now["lr"], now["weight_decay"])

    # 5. The teacher follows the student.
    update.update_teacher(now["ema_momentum"])
    return target, out


@dataclass
class Targets:
    """What the student should predict, without gradient."""

    dino: Tensor  # (G, B, K) probabilities over the prototypes
    ibot: Tensor | None  # (M, K') probabilities, in the order of `Batch.masked`
    gram: Tensor | None  # (G·B, N, D') patches of the Gram teacher
    anchor: Features | None = None  # of the initial weights

    def in_use(self, now: dict[str, float]) -> Tensor:
        """The probabilities that are trained on: DINO's, or iBOT's where DINO's weight is 0."""
        return self.dino if "dino" in now or self.ibot is None else self.ibot


@torch.no_grad()
def teacher_targets(
    teacher: SSLModel,
    micro_batches: list[Batch],
    centering: nn.ModuleDict,
    teacher_temp: float,
    gram_teacher: nn.Module | None = None,
    anchor: nn.Module | None = None,
) -> list[Targets]:
    """One `Targets` a micro batch, centred and balanced over the whole batch and all ranks."""
    outs = [teacher(crops.global_crops, masked=crops.masked()) for crops in micro_batches]
    dino = balance(centering["dino"], [out.global_logits for out in outs], teacher_temp)
    ibot = gram = anchors = [None] * len(outs)
    if "ibot" in centering and micro_batches[0].masks is not None:
        ibot = balance(centering["ibot"], [out.patch_logits for out in outs], teacher_temp)
    if gram_teacher is not None:
        pairs = zip(micro_batches, outs, strict=True)
        gram = [gram_targets(gram_teacher, teacher, crops, out) for crops, out in pairs]
    if anchor is not None:
        anchors = [anchor(crops.global_crops) for crops in micro_batches]
    targets = []
    for crops, probs, *rest in zip(micro_batches, dino, ibot, gram, anchors, strict=True):
        probs = probs.unflatten(0, (-1, len(crops.images)))  # (G·B, K) -> (G, B, K)
        targets.append(Targets(probs, *rest))
    return targets


def gram_targets(
    gram_teacher: nn.Module, teacher: SSLModel, crops: Batch, out: SSLOutput
) -> Tensor:
    """(G·B, N, D') patches of the Gram teacher on the student's grid.

    It sees crops of its own size, if there are any.
    """
    if crops.gram_crops is None and gram_teacher is teacher.backbone:
        return out.patches
    seen = gram_teacher(crops.global_crops if crops.gram_crops is None else crops.gram_crops)
    return on_grid(seen.patches, seen.grid, out.grid)


def balance(centering: Centering, parts: list[Tensor], teacher_temp: float) -> list[Tensor]:
    """Targets of all parts together, split again; then the centre moves."""
    logits = torch.cat(parts) if len(parts) > 1 else parts[0]
    probs = centering(logits, teacher_temp, distributed.all_reduce_sum, distributed.all_reduce_max)
    centering.update(logits, distributed.all_reduce_sum)
    return list(probs.split([len(part) for part in parts]))


def compute_losses(
    out: SSLOutput, targets: Targets, crops: Batch, loss: LossConfig, now: dict[str, float]
) -> dict[str, Tensor]:
    """The terms in use, unweighted.

    A new term: a file in losses/, a weight in the configuration, a line here.
    """
    views = (-1, len(crops.images))  # (G·B, ...) -> (G, B, ...)
    losses = {}
    if "dino" in now:
        global_logits = out.global_logits.unflatten(0, views)
        local_logits = None if out.local_logits is None else out.local_logits.unflatten(0, views)
        temp, local = loss.dino.student_temp, now["dino_local"]
        losses["dino"] = multicrop_dino_loss(global_logits, local_logits, targets.dino, temp, local)
    if "ibot" in now:
        student_temp = loss.ibot.student_temp
        losses["ibot"] = ibot_loss(out.patch_logits, targets.ibot, crops.masks, student_temp)
    each_view = out.cls.unflatten(0, views)  # two views of an image must not be pushed apart
    if "koleo" in now:
        group, gather = loss.koleo.group, distributed.gather_rows
        losses["koleo"] = sum(koleo_loss(cls, group, gather) for cls in each_view)
    if "coding_rate" in now:
        epsilon, gather = loss.coding_rate.epsilon, distributed.gather_rows
        rates = [coding_rate_loss(cls, epsilon, gather) for cls in each_view]
        losses["coding_rate"] = sum(rates) / len(rates)
    if targets.gram is not None:
        losses["gram"] = gram_loss(out.patches, targets.gram)
    if "anchor" in now:
        anchor = targets.anchor.cls, targets.anchor.patches
        losses["anchor"] = anchor_loss(out.cls, out.patches, *anchor, loss.anchor.patches)
    return losses


if __name__ == "__main__":
    run_script(main)
