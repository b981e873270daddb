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

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Callable, Iterable, Optional

import torch
from torch import Tensor, nn

from data.augment import channel_statistics, multi_crop_from
from data.datasets import ImageData, open_data, open_labelled
from data.loader import Batch, EvalDataset, first_readable, make_loader
from data.masking import MaskSpec
from engine import checkpoint, distributed, optim
from engine.cli import config_parser, run_script
from engine.config import LossConfig, TrainConfig, length_in_steps, load_config
from engine.config import micro_batch_size, schedule_names, size_pair, with_statistics
from engine.figures import draw_report
from engine.health import health
from engine.logger import BadImages, notice
from engine.probes import knn_probe
from engine.run import Cadence, Run
from engine.settings import provenance, refuse_changes, to_yaml
from losses.centering import Centering, build_centering
from losses.dino import multicrop_dino_loss
from losses.ibot import ibot_loss
from losses.koleo import koleo_loss
from models.features import Preprocessing
from models.ssl_model import SSLModel, SSLOutput, build_ssl_model, count_parameters, make_teacher, save_heads, update_ema
from models.start import load_initial, start_from
from models.vit import build_backbone
from models.writing import save_teacher


def main(argv: Optional[list[str]] = None) -> None:
    arguments = config_parser(__doc__).parse_args(argv)
    cfg = load_config(arguments.config, arguments.overrides)
    device = distributed.choose_device(cfg.device)
    with distributed.process_group(device):
        train(cfg, device)


def train(cfg: TrainConfig, device: torch.device) -> None:
    initial = load_initial(cfg.init, cfg.data.channels) if cfg.init else None
    cfg = cfg if initial is None else with_statistics(cfg, initial.preprocessing)
    images = open_data(cfg.data.train, cfg.data.channels)
    total_steps = length_in_steps(cfg, len(images))
    schedules = build_schedules(cfg, total_steps)
    micro_batch = micro_batch_size(cfg, distributed.world_size(), grouped="koleo" in schedules)
    cadence = Cadence(log=cfg.log_every, probe=cfg.probe.every, **vars(cfg.checkpoint))
    run = Run(Path(cfg.output_dir), total_steps, cfg.batch_size, cadence)
    if not run.open(to_yaml(cfg, provenance()), partial(refuse_changes, cfg), cfg.overwrite):
        return

    torch.manual_seed(cfg.seed)
    student = build_student(cfg, "ibot" in schedules, initial).to(device)
    notice(
        f"{cfg.model.arch}: {count_parameters(student.backbone):,} parameters, {count_parameters(student):,} with the heads"
    )
    teacher = make_teacher(student)
    centering = build_centering(cfg.loss, schedules).to(device)
    optimizer = optim.make_optimizer(
        optim.parameter_groups(student, cfg.optim.layer_decay, cfg.optim.patch_embed_lr), cfg.optim.betas
    )
    loader = build_loader(cfg, images, student.backbone.patch_size, schedules, run.start_step, total_steps, device)
    run.start(
        checkpoint.training_state(student, teacher, centering, optimizer),
        bad_images=BadImages(run.folder, len(images), cfg.data.max_bad),
        **teacher_outputs(cfg, images, teacher, device),
    )
    parallel = distributed.wrap(student, cfg.strategy, device, all_used="dino" in schedules)

    freeze_steps = optim.span_steps(cfg.optim.freeze_last_layer, total_steps)
    autocast, scaler = distributed.choose_precision(cfg.precision, device)
    for step, batch in run.steps(loader):
        distributed.seed_step(cfg.seed, step)
        now = {name: schedule(step) for name, schedule in schedules.items()}
        micro_batches = batch.to(device, non_blocking=True).split(micro_batch)
        totals: dict[str, Tensor] = {}

        # 1. The teacher sees the global crops only and gives the targets, of the whole batch at once.
        with autocast():
            targets = teacher_targets(teacher, micro_batches, centering, now["teacher_temp"])

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
        if step < freeze_steps:
            optim.drop_last_layer_gradients(student)
        totals["grad_norm"] = optim.clip_gradients(student, cfg.optim.clip_grad, cfg.optim.clip_per)
        optim.set_rates(optimizer, now["lr"], now["weight_decay"])
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

        # 5. The teacher follows the student.
        update_ema(teacher, student, now["ema_momentum"])
        run.step_done(step + 1, lambda: metrics(totals, now) | health(targets[-1].dino.flatten(0, 1), out.cls))


# ----------------------------------------------------------------- the method


@dataclass
class Targets:
    """What the student should say: probabilities over the prototypes, from the teacher, without gradient."""

    dino: Tensor  # (G, B, K)
    ibot: Optional[Tensor]  # (M, K'), in the order of masks.flatten().nonzero()


@torch.no_grad()
def teacher_targets(
    teacher: SSLModel, micro_batches: list[Batch], centering: nn.ModuleDict, teacher_temp: float
) -> list[Targets]:
    """One `Targets` a micro batch; centred and balanced over the whole batch and all ranks, however it is divided."""
    outs = [teacher(crops.global_crops, masks=crops.masks, hide=False) for crops in micro_batches]
    dino = balance(centering["dino"], [out.global_logits for out in outs], teacher_temp)
    ibot = [None] * len(outs)
    if "ibot" in centering:
        ibot = balance(centering["ibot"], [out.patch_logits for out in outs], teacher_temp)
    views = [(-1, len(crops.images)) for crops in micro_batches]  # (G·B, K) -> (G, B, K)
    return [Targets(probs.unflatten(0, shape), patches) for probs, patches, shape in zip(dino, ibot, views)]


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
            out.global_logits.unflatten(0, views), local_logits, targets.dino, cfg.dino.student_temp, now["dino_local"]
        )
    if "ibot" in now:
        losses["ibot"] = ibot_loss(out.patch_logits, targets.ibot, crops.masks, cfg.ibot.student_temp)
    if "koleo" in now:  # per view: two views of an image must not be pushed apart
        losses["koleo"] = sum(koleo_loss(cls, cfg.koleo.group) for cls in out.cls.unflatten(0, views))
    return losses


# ----------------------------------------------------------------- what the loop is made of


def build_schedules(cfg: TrainConfig, total_steps: int) -> dict[str, Callable[[int], float]]:
    """step -> value for lr, weight_decay, ema_momentum, teacher_temp and the weight of every term in use."""
    terms = {name: getattr(cfg.loss, name).weight for name in ("dino", "ibot", "koleo")}
    constants = terms | {"dino_local": cfg.loss.dino.local_weight}
    schedules = {}
    for name in schedule_names():
        item = getattr(cfg.schedule, name)
        if item is not None:
            factor = optim.lr_factor(cfg.optim.lr_scaling, cfg.batch_size) if name == "lr" else 1.0
            schedules[name] = optim.make_schedule(total_steps, **vars(item), factor=factor)
        elif constants[name] > 0 or name not in terms:
            schedules[name] = lambda step, value=constants[name]: value
    return schedules


def build_student(cfg: TrainConfig, masked: bool, initial: Optional[nn.Module] = None) -> SSLModel:
    """Backbone and heads as configured, with the weights of `initial`; a mask token where patches are hidden (`masked`)."""
    options = {name: value for name, value in vars(cfg.model).items() if name != "arch" and value is not None}
    options["in_channels"] = cfg.data.channels
    if cfg.model.arch.startswith("timm:"):
        backbone = build_backbone(cfg.model.arch, in_channels=cfg.data.channels)
    else:
        grid = {"image_size": cfg.crops.global_size}  # for which learned positions are made
        if initial is not None:
            grid = {name: initial.config[name] for name in ("image_size", "interpolation") if name in initial.config}
        backbone = build_backbone(cfg.model.arch, **options, **grid, mask_token=masked)
    model = build_ssl_model(backbone, cfg.loss, own_ibot_head=masked and cfg.loss.ibot.prototypes is not None)
    if initial is not None:
        notice(f"{cfg.init}: {start_from(model, initial, cfg.init)}")
    return model


def build_loader(
    cfg: TrainConfig,
    images: ImageData,
    patch_size: int,
    terms: Iterable[str],
    start_step: int,
    stop_step: int,
    device: torch.device,
) -> Iterable[Batch]:
    """This rank's batches of the steps from start to stop."""
    if len(images) < cfg.batch_size:
        notice(
            f"{cfg.data.train} has {len(images)} images, fewer than batch_size {cfg.batch_size}: they repeat after all were seen"
        )
    grid = tuple(side // patch_size for side in size_pair(cfg.crops.global_size))
    masks = MaskSpec(grid, cfg.loss.ibot.mask_probability, cfg.loss.ibot.mask_ratio) if "ibot" in terms else None
    return make_loader(
        images,
        multi_crop_from(cfg.crops, *channel_statistics(cfg.data.channels, cfg.data.mean, cfg.data.std)),
        batch_size=cfg.batch_size,
        seed=cfg.seed,
        start_step=start_step,
        stop_step=stop_step,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        workers=cfg.data.workers,
        masks=masks,
        device=device.type,
    )


# ----------------------------------------------------------------- what comes out


def metrics(totals: dict[str, Tensor], now: dict[str, float]) -> dict:
    """Names as in metrics.jsonl; losses are means over the ranks."""
    rates = {name: now[name] for name in ("lr", "weight_decay", "ema_momentum", "teacher_temp")}
    losses = {name: distributed.mean_over_ranks(value) for name, value in totals.items() if name != "grad_norm"}
    named = {name if name == "loss" else f"loss/{name}": value for name, value in losses.items()}
    return named | rates | {"grad_norm": totals["grad_norm"]}


def teacher_outputs(
    cfg: TrainConfig, images: ImageData, teacher: SSLModel, device: torch.device
) -> dict[str, Callable]:
    """How to export, draw and probe the teacher; see `Run.start`."""
    backbone, size = teacher.backbone, size_pair(cfg.crops.global_size)
    mean, std = channel_statistics(cfg.data.channels, cfg.data.mean, cfg.data.std)
    prepare = partial(EvalDataset, resize=max(size), size=size, mean=mean, std=std)
    probed = cfg.probe.every > 0 and cfg.probe.knn
    train, val = open_labelled(cfg.probe.train, cfg.probe.val, cfg.data.channels) if probed else (None, None)

    def export(folder: Path) -> None:
        save_teacher(backbone, folder, Preprocessing(size, max(size), mean, std))
        save_heads(teacher, folder)

    @torch.inference_mode()
    def report(path: Path) -> None:
        data = val if probed else images
        shown = first_readable(data, 4)
        inputs = torch.stack([prepare(data)[index][0] for index in shown]).to(device)
        crops = multi_crop_from(cfg.crops, mean, std).examples([data.image(index) for index in shown], cfg.seed)
        attention = backbone.attention(inputs) if hasattr(backbone, "attention") else None
        draw_report(
            path, inputs, backbone(inputs), crops, mean=mean, std=std, attention=attention, title=path.parent.name
        )

    def probe() -> dict[str, float]:
        return {"probe/knn": knn_probe(backbone, prepare(train), prepare(val), device)}

    return {"export": export, "report": report, "probe": probe if probed else None}


if __name__ == "__main__":
    run_script(main)
