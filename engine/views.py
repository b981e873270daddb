"""Builds the views of an image, the batches and a network's crops from a configuration.

data/ makes the views; this file turns sections of the configuration into its arguments.
"""

import contextlib
import sys
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace

import torch
from torch.utils.data import DataLoader

from data.augment import POLICIES, CropSpec, MultiCrop
from data.distillation import CropAdapter
from data.guided import Guidance, has_marks, require_marks
from data.images import ImageData
from data.loader import Views, make_loader
from data.masking import MaskSpec
from data.pictures import UnreadableImage
from data.pixels import channel_statistics
from data.sources.specs import open_data
from engine import distributed
from engine.config import (
    CropsConfig,
    DataConfig,
    GramConfig,
    IbotConfig,
    SizeConfig,
    TrainConfig,
)
from engine.launch import loader_workers
from engine.layers import NOT_OF_POLICY
from engine.logger import notice
from engine.stages import Stage
from engine.validation import size_pair
from errors import UserError
from models.features import Preprocessing

MEASURED = ("H100",)  # GPUs of which docs/performance.md has figures for data.augment_on


def multi_crop_from(
    crops: CropsConfig,
    mean: Sequence[float],
    std: Sequence[float],
    sizes: SizeConfig | None = None,
    gram: GramConfig | None = None,
) -> MultiCrop:
    """The crops of `crops`. A key that is None takes the value of the colour policy.

    Args:
        sizes: other global and local sizes, of `crops.mix`.
        gram: asks for crops of a Gram teacher where they differ from the student's.

    Raises:
        UserError: for an unknown policy.
    """
    if crops.policy not in POLICIES:
        raise UserError(f"unknown crops.policy {crops.policy!r}; choose from {', '.join(POLICIES)}")
    changes = {}
    for name in (field.name for field in fields(crops) if field.name not in NOT_OF_POLICY):
        value = getattr(crops, name)
        if value is not None:
            changes[name] = tuple(value) if isinstance(value, list) else value
    sizes = sizes or crops
    global_size, local_size = size_pair(sizes.global_size), size_pair(sizes.local_size)
    gram_size, ratio = None, tuple(crops.ratio)
    if gram is not None and (gram.teacher_scale != 1 or not gram.distortions):
        gram_size = tuple(round(side * gram.teacher_scale) for side in global_size)
    return MultiCrop(
        CropSpec(global_size, tuple(crops.global_scale), crops.global_count, ratio),
        CropSpec(local_size, tuple(crops.local_scale), crops.local_count, ratio),
        replace(POLICIES[crops.policy], **changes),
        mean,
        std,
        gram_size,
        gram_distorted=gram is not None and gram.distortions,
    )


def guidance_from(crops: CropsConfig) -> Guidance | None:
    """The guidance of crops by marks; None where `crops.guided` is 0."""
    if crops.guided == 0:
        return None
    return Guidance(crops.guided, crops.guided_globals, crops.guided_share)


def say_unmarked(images: Iterable[tuple[ImageData, int]]) -> None:
    """Says how many of these images, each a data set and an index, have no marks to follow."""
    marked = []
    for data, index in images:
        with contextlib.suppress(UnreadableImage):  # counted when it comes up in training
            marked.append(has_marks(data, index))
    if not all(marked):
        unmarked = f"{marked.count(False)} of {len(marked)} images looked at"
        notice(f"crops.guided: {unmarked} have no boxes and no masks; their crops are not guided")


def views_from(
    crops: CropsConfig,
    mean: Sequence[float],
    std: Sequence[float],
    patch_size: int,
    ibot: IbotConfig | None = None,
    gram: GramConfig | None = None,
) -> list[Views]:
    """One `Views`, or those of `crops.mix`; without masks where `ibot` is None."""
    guidance = guidance_from(crops)
    views = []
    for sizes in crops.mix or [crops]:
        multi_crop = multi_crop_from(crops, mean, std, sizes, gram)
        masks = None
        if ibot is not None:
            grid = tuple(side // patch_size for side in size_pair(sizes.global_size))
            masks = MaskSpec(grid, ibot.mask_probability, ibot.mask_ratio, ibot.mask_fill)
        views.append(Views(multi_crop, masks, getattr(sizes, "share", 1.0), guidance))
    return views


def crops_on_device(choice: str, device: torch.device) -> bool:
    """Whether crops are made on the device: for `auto` only where both ways were measured."""
    if choice != "auto" or device.type != "cuda":
        return choice == "device"
    return any(name in torch.cuda.get_device_name(device) for name in MEASURED)


def stage_loader(
    stage: Stage, first_step: int, patch_size: int, device: torch.device
) -> DataLoader:
    """This rank's batches of a stage from `first_step` on."""
    cfg = stage.cfg
    images = open_data(cfg.data.train, cfg.data.channels)
    if cfg.crops.guided > 0:
        require_marks(images, cfg.data.train)
        if first_step == stage.first and distributed.is_main():
            say_unmarked((images, index) for index in range(0, len(images), len(images) // 32 + 1))
    if len(images) < cfg.batch_size and distributed.is_main():
        print(
            f"{cfg.data.train} has {len(images)} images, fewer than batch_size {cfg.batch_size}: "
            "they repeat after all were seen",
            file=sys.stderr,
        )
    mean, std = channel_statistics(cfg.data.channels, cfg.data.mean, cfg.data.std)
    ibot = cfg.loss.ibot if "ibot" in stage.schedules else None
    gram = cfg.loss.gram if "gram" in stage.schedules else None
    views = views_from(cfg.crops, mean, std, patch_size, ibot, gram)
    return loader_of(stage, images, views, first_step, device)


def loader_of(
    stage: Stage, images: ImageData, views: list[Views], first_step: int, device: torch.device
) -> DataLoader:
    """This rank's batches of a stage from `first_step` on, as its configuration says."""
    cfg = stage.cfg
    return make_loader(
        images,
        views,
        batch_size=cfg.batch_size,
        seed=cfg.seed,
        start_step=first_step,
        stop_step=stage.stop,
        shift=stage.shift,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        workers=loader_workers(cfg.data.workers, device.type, distributed.world_size()),
        device=device.type,
        on_device=crops_on_device(cfg.data.augment_on, device),
        scaled_jpeg=cfg.data.scaled_jpeg,
    )


def crop_adapter(
    cfg: TrainConfig,
    own: DataConfig | Preprocessing,
    device: torch.device | str = "cpu",
    global_size: int | list[int] | None = None,
    local_size: int | list[int] | None = None,
) -> CropAdapter:
    """The adapter of a network for the crops of a run.

    Args:
        own: its `mean` and `std`, None for ImageNet's.
        global_size, local_size: in pixels, where this network takes others than are cut.
    """
    crops, channels = cfg.crops, cfg.data.channels
    cut = (size_pair(crops.global_size), size_pair(crops.local_size))
    own_sizes = (
        size_pair(global_size or crops.global_size),
        size_pair(local_size or crops.local_size),
    )
    given = channel_statistics(channels, cfg.data.mean, cfg.data.std)
    wanted = channel_statistics(channels, own.mean, own.std)
    return CropAdapter(cut, own_sizes, given, wanted, device)
