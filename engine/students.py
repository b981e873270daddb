"""The students of a distillation: their configurations, checks against the teacher, their ranks."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data.distillation import CropAdapter
from engine.distill_config import DistillTrainConfig
from engine.layers import ONE_OF, lay_over
from engine.optim import build_schedules
from engine.settings import (
    CONFIG_FOLDER,
    build,
    changed_keys,
    convert,
    read_yaml,
    to_dict,
    write_out,
)
from engine.stages import Schedules, Stage
from engine.validation import size_pair
from engine.views import crop_adapter
from errors import UserError
from models.distill import Teacher, load_teacher

# Keys that a student may override. The other keys decide images and order, which all share.
ALLOWED = (
    "init", "micro_batch_size", "strategy", "compile", "checkpointing", "data.mean", "data.std",
    "crops.global_size", "crops.local_size", "model.", "loss.", "optim.", "schedule.", "tune.",
    "probe.", "health.", "guard.", "checkpoint.snapshot", "stages", "distill.cls_weight",
    "distill.patch_weight",
)  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One of `distill.students`."""

    name: str
    cfg: DistillTrainConfig  # as if it were alone; output_dir is its own
    share: float  # of the ranks, relative to the others'


def student_configs(cfg: DistillTrainConfig) -> list[Entry]:
    """The run's configuration with the keys of each student that is not null.

    Raises:
        UserError: without students, and for keys that a student cannot override.
    """
    given = {str(name): keys for name, keys in cfg.distill.students.items() if keys is not None}
    if not given:
        example = "distill.students.small.model.arch=vit_small"
        raise UserError(f"distill.students is empty; give at least one, for example {example}")
    alone = replace(cfg, distill=replace(cfg.distill, students={}))
    return [_entry(alone, name, keys) for name, keys in given.items()]


def _entry(alone: DistillTrainConfig, name: str, keys: Any) -> Entry:
    where = f"distill.students.{name}"
    if not isinstance(keys, dict):
        raise UserError(
            f"{where} is {keys!r}; it must hold keys and values, "
            "such as {model: {arch: vit_small}}"
        )
    keys = dict(keys)
    share = keys.pop("share", 1)
    share = convert(share, float, f"{where}.share")
    if share <= 0:
        raise UserError(f"{where}.share is {share}; it must be a number above 0")
    if not name or Path(name).name != name:
        raise UserError(f"{where}: a student's name is that of its folder")
    base = to_dict(alone)
    lengths = {length: base[length] for length in ONE_OF}  # these are the run's
    try:
        own = build(type(alone), lay_over(base, write_out(type(alone), keys)) | lengths)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    for change in changed_keys(alone, own, all_fields=True):
        if not change.startswith(ALLOWED):
            allowed = ", ".join(ALLOWED)
            raise UserError(f"{where} cannot change {change}; a student may change {allowed}")
    for kind in ("global_size", "local_size"):
        size, cut = getattr(own.crops, kind), getattr(alone.crops, kind)
        sides = zip(size_pair(size), size_pair(cut), strict=True)
        if any(side > whole for side, whole in sides):
            raise UserError(
                f"{where}.crops.{kind} is {size}, but crops are cut at crops.{kind} {cut} for all; "
                "raise that"
            )
    folder = Path(alone.output_dir) / "students" / name
    return Entry(name, replace(own, output_dir=str(folder)), share)


def check_stages(stages: list[Stage], ranks: int) -> None:
    """
    Raises:
        UserError: for a batch that the ranks cannot share, and for keys without a meaning here.
    """
    for stage in stages:
        if stage.cfg.batch_size % ranks:
            batch = f"batch_size {stage.cfg.batch_size}"
            raise UserError(f"{batch} is not a multiple of the {ranks} processes")
        if stage.name and stage.cfg.init:
            raise UserError(
                f"stages.{stage.name}.init: only students have an init here; give it to a student"
            )
        for name in {"gram", "anchor"} & stage.schedules.keys():
            raise UserError(
                f"loss.{name} has no part in distillation, where the teacher is frozen; leave it "
                "out"
            )


def uses_heads(cfg: DistillTrainConfig, teacher: Teacher) -> bool:
    """Whether students learn from the teacher's prototypes; if not, from its features.

    Raises:
        UserError: if heads are asked for and there are none.
    """
    if cfg.distill.match == "heads" and teacher.dino_head is None:
        raise UserError(
            f"distill.match is heads, but the teacher {cfg.distill.teacher} has none "
            "(runs of train.py do); use distill.match=features"
        )
    return cfg.distill.match != "features" and teacher.dino_head is not None


def check_prototypes(name: str, cfg: DistillTrainConfig, terms: set[str], teacher: Teacher) -> None:
    """
    Raises:
        UserError: if a student's heads have other prototypes than the teacher's; says what to set.
    """
    for term in {"dino", "ibot"} & terms:
        head = getattr(teacher, f"{term}_head")
        theirs = None if head is None else len(head.last_layer.weight)
        own = getattr(cfg.loss, term).prototypes
        if own != theirs:
            value = "null" if theirs is None else theirs
            raise UserError(
                f"distill.students.{name}: loss.{term}.prototypes is {own or 'null'}, but those of "
                f"the teacher {cfg.distill.teacher} are {value}; "
                f"set loss.{term}.prototypes={value}, or distill.match=features"
            )


def open_teacher(cfg: DistillTrainConfig) -> Teacher:
    if cfg.distill.teacher is None:
        raise UserError(
            "there is no teacher: give distill.teacher a MODEL: a run, released weights, timm:NAME"
        )
    try:
        return load_teacher(cfg.distill.teacher, cfg.data.channels)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}{_command_that_makes(cfg.distill.teacher)}") from None


def teacher_crop_adapter(
    cfg: DistillTrainConfig, teacher: Teacher, device: torch.device
) -> CropAdapter:
    """The adapter that resizes and normalises crops for the teacher.

    Raises:
        UserError: if the teacher does not take crops of that size.
    """
    size, where = cfg.distill.teacher_size, f"the teacher {cfg.distill.teacher}"
    patch_grid(teacher.backbone, size_pair(size or cfg.crops.global_size), device, where)
    own = teacher.backbone.preprocessing
    return crop_adapter(cfg, own, device, global_size=size)


def _command_that_makes(run: str) -> str:
    """ "; python train.py --config configs/X.yaml makes it" for the output_dir of one of configs/.

    For any other folder: "".
    """
    for path in sorted(CONFIG_FOLDER.glob("*.yaml")):
        layers = read_yaml(path, DistillTrainConfig)
        folders = [layer["output_dir"] for layer in layers if "output_dir" in layer]
        if folders and Path(folders[-1]) == Path(run):
            script = "distill.py" if any("distill" in layer for layer in layers) else "train.py"
            return f"; python {script} --config configs/{path.name} makes it"
    return ""


def patch_grid(
    backbone: nn.Module, size: Sequence[int], device: torch.device, whose: str
) -> tuple[int, int]:
    """(h, w) of the patches of crops of that size; `backbone` is in eval mode.

    Raises:
        UserError: if it does not take such crops.
    """
    try:
        with torch.no_grad():
            return tuple(backbone(torch.zeros(1, backbone.in_channels, *size, device=device)).grid)
    except (AssertionError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{whose} does not take crops of {size[0]} x {size[1]} pixels: {reason}"
        ) from None


def divide_ranks(entries: list[Entry], ranks: int) -> dict[str, range] | None:
    """Consecutive ranks for each student by its share, at least one.

    The student with the largest share per rank gets the next rank, so shares that divide the ranks
    evenly are met exactly. The same configuration on as many ranks gives the same layout.

    Returns:
        None where there are too few ranks: students take turns.
    """
    if ranks < len(entries) or ranks == 1:
        return None
    counts = [1] * len(entries)
    for _ in range(ranks - len(entries)):
        wants = [entry.share / count for entry, count in zip(entries, counts, strict=True)]
        counts[wants.index(max(wants))] += 1
    layout, end = {}, 0
    for entry, count in zip(entries, counts, strict=True):
        layout[entry.name] = range(end, end + count)
        end += count
    return layout


def loaded_stage(stage: Stage, heads: bool) -> Stage:
    """The stage for the loader: without masks, which each student draws on its own grid.

    Without `heads` no student sees local crops, so none are cut.
    """
    cfg = stage.cfg
    if not heads:
        cfg = copy.copy(cfg)  # copies, because 0 local crops are not valid for every loss
        cfg.crops = copy.copy(cfg.crops)
        cfg.crops.local_count = 0
    return replace(stage, cfg=cfg, schedules={})


def matching_schedules(cfg: DistillTrainConfig, total_steps: int) -> Schedules:
    """As `build_schedules`, with the terms of feature matching in place of those of the heads."""
    schedules = build_schedules(cfg, total_steps)
    for name in ("dino", "dino_local", "ibot"):
        schedules.pop(name, None)
    weights = {"cls": cfg.distill.cls_weight, "patches": cfg.distill.patch_weight}
    if max(weights.values()) <= 0:
        raise UserError(
            "distill.cls_weight and distill.patch_weight are both 0: nothing to learn from"
        )
    for name, weight in weights.items():
        if weight > 0:
            schedules[name] = lambda step, weight=weight: weight
    return schedules
