"""Batches of images, or of their cached tokens, for align.py."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from data.images import Chosen, ImageData
from data.loader import Batch, StepDataset
from data.sources.tables import read_csv
from engine import distributed
from engine.stages import Stage
from engine.views import loader_of, views_from
from errors import UserError


def crop_loader(
    stage: Stage, images: ImageData, first_step: int, backbone: nn.Module, device: torch.device
) -> Iterator[Batch]:
    """This rank's batches from `first_step` on: one crop an image, by the keys of `crops`."""
    cfg, wanted = stage.cfg, backbone.preprocessing
    crops = replace(cfg.crops, global_count=1, local_count=0)
    views = views_from(crops, wanted.mean, wanted.std, backbone.patch_size)
    return iter(loader_of(stage, images, views, first_step, device))


def token_loader(
    stage: Stage, images: ImageData, tokens: Tensor, first_step: int
) -> Iterator[Batch]:
    """As `crop_loader`, in the same order, with rows of `tokens` (n, 2, D) in place of crops."""
    cfg = stage.cfg
    ranks = {"rank": distributed.rank(), "world_size": distributed.world_size()}
    options = {"batch_size": cfg.batch_size, "seed": cfg.seed, "shift": stage.shift}
    order = StepDataset(images, (), **options, **ranks)
    for step in range(first_step, stage.stop):
        indices = order.indices(step)[order.block.start : order.block.stop]
        yield Batch(tokens[indices], None, None, None, [], indices.tolist(), [])


def read_tokens(folder: str, images: ImageData, width: int) -> tuple[Chosen, Tensor]:
    """The images of which `extract.py --features cls mean` wrote features, and those (n, 2, D).

    Raises:
        UserError: if the files are of other images or of another model.
    """
    path = Path(folder)
    rows = {row["name"]: int(row["row"]) for row in read_csv(path / "index.csv", ("row", "name"))}
    names = [images.name(index) for index in range(len(images))]
    found = [index for index, name in enumerate(names) if name in rows]
    if not found:
        raise UserError(
            f"align.features: {folder} has no features of {names[0]} or any other image"
        )
    parts = [np.load(path / f"{kind}.npy", mmap_mode="r") for kind in ("cls", "mean")]
    order = [rows[names[index]] for index in found]
    tokens = torch.from_numpy(np.stack([part[order] for part in parts], axis=1)).float()
    if tokens.shape[-1] != width:
        given = f"features of {tokens.shape[-1]} numbers; those of the backbone have {width}"
        raise UserError(f"{folder} has {given}")
    return Chosen(images, found), tokens
