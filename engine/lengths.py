"""Numbers that follow from several keys: steps of a run, images of a micro batch, statistics."""

import dataclasses
import sys
from typing import TYPE_CHECKING

from errors import UserError
from models.features import Preprocessing

if TYPE_CHECKING:
    from engine.config import TrainConfig


def length_in_steps(cfg: "TrainConfig", images: int) -> int | None:
    """Optimizer steps of a run over `images` images; None where only the stages say how long."""
    if cfg.total_steps is not None:
        return cfg.total_steps
    if cfg.epochs is None and cfg.images is None:
        if cfg.stages:
            return None
        raise UserError("the length of the run is missing: give total_steps, epochs or images")
    wanted = cfg.images if cfg.images is not None else cfg.epochs * images
    return max(1, round(wanted / cfg.batch_size))


def with_statistics(cfg: "TrainConfig", preprocessing: Preprocessing) -> "TrainConfig":
    """Takes mean and std of the initial weights where none are given; warns of others."""
    mean, std = list(preprocessing.mean), list(preprocessing.std)
    data = dataclasses.replace(cfg.data, mean=cfg.data.mean or mean, std=cfg.data.std or std)
    if (data.mean, data.std) != (mean, std):
        warning = f"data.mean and data.std are not those of {cfg.init}: {mean} and {std}"
        print(f"warning: {warning}", file=sys.stderr)
    return dataclasses.replace(cfg, data=data)


def micro_batch_size(cfg: "TrainConfig", ranks: int, grouped: bool) -> int:
    """Images that go through a rank's student at once.

    With `grouped`, a KoLeo group fits into them, or it spans ranks without micro batches.
    """
    batch, group = cfg.batch_size, cfg.loss.koleo.group
    if batch % ranks:
        raise UserError(f"batch_size {batch} is not a multiple of the {ranks} processes")
    local = batch // ranks
    micro = min(cfg.micro_batch_size or local, local)
    fits = micro % group == 0 and local % micro % group == 0
    spans = micro == local and group % local == 0 and batch % group == 0
    if grouped and not fits and not spans:
        given = f"the {micro} images that go through a rank's student at once (of {local})"
        remedy = "change batch_size, micro_batch_size or loss.koleo.group"
        raise UserError(f"loss.koleo.group {group} does not divide {given}; {remedy}")
    return micro
