"""Self-supervised pre-training: DINO, iBOT, DINOv2 and DINOv3 are configurations of this one loop.

    python   train.py --config configs/quickstart.yaml                                # laptop CPU, minutes, no download
    torchrun --nproc_per_node 8 train.py --config vits.yaml data.train=/my/images     # one machine with eight GPUs

Each step:
    1. The teacher sees the global crops only and gives the targets.
    2. The student sees every crop, with patches of the global crops hidden.
    3. The loss is a weighted sum of the terms.
    4. The student follows the gradient.
    5. The teacher follows the student: teacher <- m * teacher + (1 - m) * student.

Started again with the same output_dir, a run goes on where it stopped.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from data.annotated import Annotated, has_masks
from data.augment import channel_statistics
from data.loader import Batch, EvalDataset, first_readable
from data.sources.specs import ImageData, open_data, open_labelled
from engine import checkpoint, distributed, optim
from engine.cli import config_parser, run_script
from engine.config import (
    LossConfig,
    TrainConfig,
    length_in_steps,
    load_config,
    micro_batch_size,
    with_statistics,
)
from engine.finite import FiniteSteps
from engine.gram import build_gram_teacher
from engine.guard import build_guard
from engine.health import CollapseWatch, health
from engine.logger import BadImages, notice
from engine.run import Cadence, Run
from engine.settings import provenance, refuse_changes, to_yaml
from engine.stages import Stage, plan_stages
from engine.start import build_student, load_initial, start_from
from engine.validation import size_pair
from engine.views import multi_crop_from, stage_loader
from evals.figures import draw_curves
from evals.inloop import probe_teacher, report_teacher
from evals.patches import mean_locality
from losses.centering import Centering, build_centering
from losses.dino import multicrop_dino_loss
from losses.gram import downsample_patches, gram_loss
from losses.ibot import ibot_loss
from losses.koleo import koleo_loss
from models.features import Preprocessing
from models.lora import tune
from models.ssl_model import (
    SSLModel,
    SSLOutput,
    count_parameters,
    host_copy,
    make_teacher,
    update_ema,
)
from models.weights.save import save_model


def main(argv: list[str] | None = None) -> None:
    arguments = config_parser(__doc__).parse_args(argv)
    cfg = load_config(arguments.config, arguments.overrides)
    device = distributed.choose_device(cfg.device)
    with distributed.process_group(device, cfg.hang_timeout):
        train(cfg, device)


def train(cfg: TrainConfig, device: torch.device) -> None:
    initial = load_initial(cfg.init, cfg.data.channels) if cfg.init else None
    cfg = cfg if initial is None else with_statistics(cfg, initial.preprocessing)
    images = open_data(cfg.data.train, cfg.data.channels)
    stages = plan_stages(cfg, length_in_steps(cfg, len(images)), optim.build_schedules)
    terms = {name for stage in stages for name in stage.schedules}
    for stage in stages:  # a mistake in the last one costs nothing either
        micro_batch_size(stage.cfg, distributed.world_size(), "koleo" in stage.schedules)
    cadence = Cadence(log=cfg.log_every, probe=cfg.probe.every, **vars(cfg.checkpoint))
    run = Run(
        Path(cfg.output_dir),
        [stage.stop for stage in stages],
        cadence,
        device,
        cfg.time_limit,
        cfg.mirrors,
    )
    if not run.open(to_yaml(cfg, provenance()), partial(refuse_changes, cfg), cfg.overwrite):
        return

    torch.manual_seed(cfg.seed)
    student = build_student(cfg, "ibot" in terms, initial).to(device)
    sizes = f"{count_parameters(student.backbone):,} parameters, {count_parameters(student):,} with the heads"
    notice(f"{cfg.model.arch}: {sizes}")
    teacher = make_teacher(student)
    unsharded = distributed.UnshardedTeacher(teacher, cfg.strategy, device, cfg.precision)
    distributed.prepare(
        student, cfg.checkpointing, device.type == "cuda" if cfg.compile is None else cfg.compile
    )
    unsharded.place(student), unsharded.place(teacher)
    centering = build_centering(cfg.loss, terms).to(device)
    current = [stage for stage in stages if stage.first < max(run.start_step, 1)][
        -1
    ]  # of which a checkpoint is
    tune(student, teacher, cfg.seed + current.first, **vars(current.cfg.tune))
    optimizer = optim.optimizer_for(student, cfg.optim)
    autocast, scaler = distributed.choose_precision(cfg.precision, device)
    watch = CollapseWatch(cfg.health.on_collapse)
    if run.start_step == 0 and (warning := watch.look_at(images)):
        notice(warning)
    run.start(
        checkpoint.training_state(student, teacher, centering, optimizer, scaler),
        bad_images=BadImages(run.folder, len(images), cfg.data.max_bad),
        refresh=unsharded.refresh,
        watch=watch,
        guard=build_guard(cfg),
        **teacher_outputs(cfg, images, unsharded.module, device),
    )
    for stage in stages:
        if run.start_step < stage.stop:
            if stage.cfg.tune != current.cfg.tune:
                tune(student, teacher, cfg.seed + stage.first, **vars(stage.cfg.tune))
                optimizer = optim.optimizer_for(student, cfg.optim, optimizer)
                run.state = checkpoint.training_state(
                    student, teacher, centering, optimizer, scaler
                )
            current = stage
            train_stage(
                stage, run, student, teacher, unsharded, centering, optimizer, autocast, scaler
            )


def train_stage(
    stage: Stage,
    run: Run,
    student: SSLModel,
    teacher: SSLModel,
    unsharded: distributed.UnshardedTeacher,
    centering: nn.ModuleDict,
    optimizer: torch.optim.Optimizer,
    autocast: Callable,
    scaler: torch.amp.GradScaler,
) -> None:
    """The steps of one stage; a run without `stages` has one."""
    cfg, device = stage.cfg, run.device
    first_step = run.enter(stage)
    if stage.name and cfg.init and first_step == stage.first:  # a stage's own
        start_from(student, load_initial(cfg.init, cfg.data.channels), cfg.init)
        teacher.load_state_dict(student.state_dict())
        optim.forget(optimizer)
    gram_teacher = build_gram_teacher(
        stage, run, unsharded, lambda spec: load_initial(spec, cfg.data.channels).to(device)
    )
    loader = stage_loader(stage, first_step, student.backbone.patch_size, device)
    parallel = distributed.wrap(
        student, cfg.strategy, device, all_used=student.uses_all(stage.schedules)
    )
    micro_batch = micro_batch_size(cfg, distributed.world_size(), "koleo" in stage.schedules)
    freeze_steps = optim.span_steps(cfg.optim.freeze_last_layer, stage.stop - stage.first)
    finite = FiniteSteps(optimizer, scaler, device)

    def logged() -> dict:
        finite.report(step + 1)
        probs = targets[-1].dino if "dino" in now else targets[-1].ibot
        return metrics(totals, now) | health(
            probs, out.cls.unflatten(0, (-1, len(crops.images))), out.patches
        )

    for step, batch in run.steps(loader, first_step):
        distributed.seed_step(cfg.seed, step)
        now = stage.now(step)
        anchor = gram_teacher.at(step) if gram_teacher else None
        micro_batches = batch.to(device, non_blocking=True).split(micro_batch)
        totals: dict[str, Tensor] = {}

        # 1. The teacher sees the global crops only and gives the targets, of the whole batch at once.
        with autocast():
            targets = teacher_targets(
                teacher, micro_batches, centering, now["teacher_temp"], anchor
            )

        for number, (crops, target) in enumerate(zip(micro_batches, targets), 1):
            share = len(crops.images) / len(batch.images)
            with distributed.accumulate(parallel, last=number == len(targets)):
                # 2. The student sees every crop, with patches of the global crops hidden.
                with autocast():
                    out = parallel(crops.global_crops, crops.local_crops, crops.masks)

                # 3. The loss is a weighted sum of the terms.
                losses = compute_losses(out, target, crops, cfg.loss, now)
                losses["loss"] = sum(now[name] * value for name, value in losses.items())
                scaler.scale(share * losses["loss"]).backward()
            for name, value in losses.items():
                totals[name] = totals.get(name, 0.0) + share * value.detach()

        # 4. The student follows the gradient.
        scaler.unscale_(optimizer)
        if step - stage.first < freeze_steps:
            optim.drop_last_layer_gradients(student)
        totals["grad_norm"] = optim.clip_gradients(student, cfg.optim.clip_grad, cfg.optim.clip_per)
        optim.set_rates(optimizer, now["lr"], now["weight_decay"])
        finite.step(totals)

        # 5. The teacher follows the student, and at its times the Gram teacher the teacher.
        update_ema(teacher, student, now["ema_momentum"], distributed.local)
        if gram_teacher:
            gram_teacher.follow(step + 1)
            run.state["gram_teacher"] = gram_teacher.weights
        run.step_done(step + 1, logged)
    run.state.pop("gram_teacher", None)


# ----------------------------------------------------------------- the method


@dataclass
class Targets:
    """What the student should say, without gradient: the teacher's probabilities over the prototypes, and whose patches
    its own should be similar like."""

    dino: Tensor  # (G, B, K)
    ibot: Tensor | None  # (M, K'), in the order of masks.flatten().nonzero()
    gram: Tensor | None  # (G·B, N, D'), patches of the Gram teacher


@torch.no_grad()
def teacher_targets(
    teacher: SSLModel,
    micro_batches: list[Batch],
    centering: nn.ModuleDict,
    teacher_temp: float,
    gram_teacher: nn.Module | None = None,
) -> list[Targets]:
    """One `Targets` a micro batch; centred and balanced over the whole batch and all ranks, however it is divided."""
    outs = [teacher(crops.global_crops, masks=crops.masks, hide=False) for crops in micro_batches]
    dino = balance(centering["dino"], [out.global_logits for out in outs], teacher_temp)
    ibot = [None] * len(outs)
    if "ibot" in centering:
        ibot = balance(centering["ibot"], [out.patch_logits for out in outs], teacher_temp)
    gram = [None] * len(outs)
    if gram_teacher is not None:
        gram = [
            gram_targets(gram_teacher, teacher, crops, out)
            for crops, out in zip(micro_batches, outs)
        ]
    views = [(-1, len(crops.images)) for crops in micro_batches]  # (G·B, K) -> (G, B, K)
    return [
        Targets(probs.unflatten(0, shape), *rest)
        for probs, shape, *rest in zip(dino, views, ibot, gram)
    ]


def gram_targets(
    gram_teacher: nn.Module, teacher: SSLModel, crops: Batch, out: SSLOutput
) -> Tensor:
    """(G·B, N, D') patches of the Gram teacher, from crops of its own size if it has such, on the student's grid."""
    if crops.gram_crops is None and gram_teacher is teacher.backbone:
        return out.patches
    seen = gram_teacher(crops.global_crops if crops.gram_crops is None else crops.gram_crops)
    return (
        seen.patches
        if seen.grid == out.grid
        else downsample_patches(seen.patches, seen.grid, out.grid)
    )


def balance(centering: Centering, parts: list[Tensor], teacher_temp: float) -> list[Tensor]:
    """Targets of all parts together, split again; then the centre moves."""
    logits = torch.cat(parts) if len(parts) > 1 else parts[0]
    probs = centering(logits, teacher_temp, distributed.all_reduce_sum, distributed.all_reduce_max)
    centering.update(logits, distributed.all_reduce_sum)
    return list(probs.split([len(part) for part in parts]))


def compute_losses(
    out: SSLOutput, targets: Targets, crops: Batch, cfg: LossConfig, now: dict[str, float]
) -> dict[str, Tensor]:
    """The terms in use, unweighted. A new term: a file in losses/, a weight in the configuration, a line here."""
    views = (-1, len(crops.images))  # (G·B, ...) -> (G, B, ...)
    losses = {}
    if "dino" in now:
        local_logits = None if out.local_logits is None else out.local_logits.unflatten(0, views)
        losses["dino"] = multicrop_dino_loss(
            out.global_logits.unflatten(0, views),
            local_logits,
            targets.dino,
            cfg.dino.student_temp,
            now["dino_local"],
        )
    if "ibot" in now:
        losses["ibot"] = ibot_loss(
            out.patch_logits, targets.ibot, crops.masks, cfg.ibot.student_temp
        )
    if "koleo" in now:  # per view: two views of an image must not be pushed apart
        losses["koleo"] = sum(
            koleo_loss(cls, cfg.koleo.group, distributed.gather_rows)
            for cls in out.cls.unflatten(0, views)
        )
    if targets.gram is not None:
        losses["gram"] = gram_loss(out.patches, targets.gram)
    return losses


# ----------------------------------------------------------------- what comes out


def metrics(totals: dict[str, Tensor], now: dict[str, float]) -> dict:
    """Names as in metrics.jsonl; losses are means over the ranks."""
    rates = {name: now[name] for name in ("lr", "weight_decay", "ema_momentum", "teacher_temp")}
    losses = {
        name: distributed.mean_over_ranks(value)
        for name, value in totals.items()
        if name != "grad_norm"
    }
    named = {name if name == "loss" else f"loss/{name}": value for name, value in losses.items()}
    return named | rates | {"grad_norm": totals["grad_norm"]}


def teacher_outputs(
    cfg: TrainConfig, images: ImageData, teacher: SSLModel, device: torch.device
) -> dict[str, Callable]:
    """How to export, draw and probe the teacher; see `Run.start`."""
    size = size_pair(cfg.crops.global_size)
    mean, std = channel_statistics(cfg.data.channels, cfg.data.mean, cfg.data.std)
    prepare = partial(EvalDataset, resize=max(size), size=size, mean=mean, std=std)
    probed = cfg.probe.every > 0
    train, val = (
        open_labelled(cfg.probe.train, cfg.probe.val, cfg.data.channels) if probed else (None, None)
    )
    annotated = partial(
        Annotated, kind="mask", size=size, multiple=teacher.backbone.patch_size, mean=mean, std=std
    )
    masks = (
        [annotated(data) for data in (train, val)]
        if probed and cfg.probe.patches and has_masks(train, val)
        else None
    )

    def export() -> Callable[[Path], None]:
        return partial(
            save_model, host_copy(teacher), preprocessing=Preprocessing(size, max(size), mean, std)
        )

    def report() -> Callable[[Path], None]:
        data = val if probed else images
        shown = first_readable(data, 4)
        inputs = torch.stack([prepare(data)[index][0] for index in shown]).to(device)
        crops = multi_crop_from(cfg.crops, mean, std).examples(
            [data.image(index) for index in shown], cfg.seed
        )
        return report_teacher(
            Path(cfg.output_dir).name, teacher.backbone, inputs, crops, mean=mean, std=std
        )

    def probe() -> dict[str, float]:
        return probe_teacher(
            cfg.probe, teacher.backbone, prepare(train), prepare(val), masks, device
        )

    return {
        "export": export,
        "report": report,
        "probe": probe if probed else None,
        "curves": draw_curves,
        "locality": lambda of: mean_locality(of, prepare(images), device),
    }


if __name__ == "__main__":
    run_script(main)
