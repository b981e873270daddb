"""Building a student, with new weights or with those of `init: MODEL`."""

import dataclasses
import sys
from pathlib import Path

from torch import nn

from data.images import ImageData
from engine import distributed, settings
from engine.config import TrainConfig
from engine.lengths import length_in_steps, micro_batch_size, with_statistics
from engine.logger import notice
from engine.optim import build_schedules
from engine.resume import check_images, has_begun
from engine.stages import Stage, plan_stages
from errors import UserError
from files import with_option
from models.ssl_model import SSLModel, build_ssl_model
from models.vit import build_backbone
from models.weights.load import load_backbone, load_heads
from models.weights.read import load_tensors

# Settings of a VisionTransformer that may differ from those of the weights. They matter in training
# only, or the weights bring their own.
FREE = {
    *("drop_path", "drop_path_shape", "rope_shift", "rope_jitter", "rope_rescale"),
    *("mask_token", "image_size", "interpolation", "fit"),
}


def plan_run(cfg: TrainConfig, images: ImageData) -> list[Stage]:
    """The stages of a run over a data set.

    Raises:
        UserError: if the batch of a stage cannot be divided, or the run began with other images.
            Nothing was computed or written yet.
    """
    if distributed.runs_alone(cfg.strategy):
        notice(
            f"strategy {cfg.strategy}: no launcher started several processes, so this one runs "
            "alone; torchrun --nproc_per_node N starts N"
        )
    stages = training_stages(cfg, length_in_steps(cfg, len(images)))
    check_batches(stages)
    check_images(cfg, images)
    return stages


def training_stages(cfg: TrainConfig, total_steps: int | None) -> list[Stage]:
    """As `plan_stages`, for training from one's own EMA, where iBOT hides patches.

    Raises:
        UserError: if the architecture cannot hide them.
    """
    stages = plan_stages(cfg, total_steps, build_schedules)
    hides = any("ibot" in stage.schedules for stage in stages)
    if hides and cfg.model.arch.startswith("timm:"):
        remedy = "set loss.ibot.weight=0 and leave schedule.ibot out"
        raise UserError(
            f"loss.ibot hides patches, but {cfg.model.arch} has no mask token; {remedy}"
        )
    return stages


def check_batches(stages: list[Stage]) -> None:
    """
    Raises:
        UserError: if ranks, micro batches or KoLeo groups do not divide the batch of a stage, or
            several processes would not share their work.
    """
    for stage in stages:
        distributed.check_strategy(stage.cfg.strategy)
        micro_batch_size(stage.cfg, distributed.world_size(), "koleo" in stage.schedules)


def load_init(cfg: TrainConfig) -> tuple[TrainConfig, nn.Module | None]:
    """(configuration, backbone) with mean, std and weights of `init`; None without `init`.

    A run that has begun needs `init` no more: its own teacher has the same architecture.
    """
    if not cfg.init:
        return cfg, None
    run = Path(cfg.output_dir)
    if has_begun(cfg) and (run / "teacher").is_dir():
        saved = settings.load_saved(run / "config.yaml", type(cfg)).data
        mean, std = cfg.data.mean or saved.mean, cfg.data.std or saved.std
        data = dataclasses.replace(cfg.data, mean=mean, std=std)
        return dataclasses.replace(cfg, data=data), load_initial(run / "teacher", data.channels)
    initial = load_initial(cfg.init, cfg.data.channels)
    return with_statistics(cfg, initial.preprocessing), initial


def load_initial(spec: str | Path, channels: int) -> nn.Module:
    """The backbone of a MODEL, adapted to `channels` input channels (`models.channels`)."""
    return load_backbone(with_option(str(spec), f"channels={channels}"))


def build_student(cfg: TrainConfig, masked: bool, initial: nn.Module | None = None) -> SSLModel:
    """Backbone and heads as a configuration says, with the weights of `initial`.

    Args:
        masked: whether patches are hidden in any step, for which there is a mask token.
    """
    options = {name: value for name, value in vars(cfg.model).items() if value is not None}
    arch = options.pop("arch")
    options["in_channels"] = cfg.data.channels
    if arch.startswith("timm:"):
        backbone = build_backbone(arch, in_channels=cfg.data.channels)
    else:
        options["image_size"] = cfg.crops.global_size  # the size of learned positions
        if initial is not None:
            del options["image_size"]
            for name in ("image_size", "interpolation"):
                if name in initial.config:
                    options[name] = initial.config[name]
        backbone = build_backbone(arch, **options, mask_token=masked)
    dino, ibot = cfg.loss.dino, cfg.loss.ibot
    own_ibot_head = masked and ibot.prototypes is not None
    model = build_ssl_model(backbone, dino, ibot if own_ibot_head else None, dino.last_layer)
    if initial is not None and not has_begun(cfg):
        start_from(model, initial, cfg.init)
    return model


def start_from(model: SSLModel, initial: nn.Module, spec: str | Path) -> None:
    """Copies the weights of `initial` into `model`, and the heads beside them where they fit.

    Says on standard error which heads fit.

    Raises:
        UserError: if the two backbones differ in a setting that changes what the weights compute.
    """
    own, given = model.backbone.config, initial.config
    names = [name for name in given if name not in FREE and own.get(name) != given[name]]
    if {"layerscale"} <= set(names) and None not in (own["layerscale"], given["layerscale"]):
        names.remove("layerscale")  # an initial value, which the weights replace
    if names:
        settings = ", ".join(f"{name} {given[name]} (here {own.get(name)})" for name in names)
        raise UserError(f"{spec} is not the backbone of the section model; it has {settings}")
    tensors = initial.state_dict()
    if model.backbone.config.get("mask_token") is False:
        tensors.pop("mask_token", None)
    elif "mask_token" in model.backbone.state_dict():
        tensors.setdefault("mask_token", model.backbone.mask_token.detach())
    load_tensors(model.backbone, tensors, str(spec))

    heads = load_heads(spec)
    state = model.state_dict()
    wanted = [name for name in state if not name.startswith("backbone.")]
    fitting = {
        name: heads[name]
        for name in wanted
        if name in heads and heads[name].shape == state[name].shape
    }
    model.load_state_dict(fitting, strict=False)
    said = "these weights have no heads, so the heads start at random"
    if heads:
        others = "; the others start at random" if len(fitting) < len(wanted) else ""
        said = f"{len(fitting)} of {len(wanted)} head tensors are loaded{others}"
    print(f"{spec}: {said}", file=sys.stderr)
