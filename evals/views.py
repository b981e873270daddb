"""Pictures of what a configuration trains on: the crops of images, and the patches it hides."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from data.augment import MultiCrop, draw
from data.images import ImageData
from data.masking import draw_masks
from data.pixels import channel_statistics
from engine.config import TrainConfig
from engine.views import guidance_from, multi_crop_from, say_unmarked
from evals.figures import draw_report
from evals.maps import Picture, hide_patches, to_picture
from evals.photographs import normalized


class Views(NamedTuple):
    """Images and the views that training makes of them."""

    images: list[Tensor]  # (C, H, W) as stored
    crops: list[list[Tensor]]  # of each image, normalised, globals first
    mean: tuple[float, ...]
    std: tuple[float, ...]


def make_views(cfg: TrainConfig, loaded: Sequence[tuple[str, ImageData, int, Tensor]]) -> Views:
    """Views of images that `load_images` gave, drawn by the configuration's seed."""
    mean, std = channel_statistics(cfg.data.channels, cfg.data.mean, cfg.data.std)
    images = [image for *_, image in loaded]
    multi_crop, guidance = multi_crop_from(cfg.crops, mean, std), guidance_from(cfg.crops)
    targets = None
    if guidance is not None:
        say_unmarked((data, index) for _, data, index, _ in loaded)
        # Whether a crop follows a mark depends on the place in a run's stream; here, in this list.
        counts = multi_crop.globals, multi_crop.crops
        targets = [
            guidance.targets(data, index, place, cfg.seed, *counts)
            for place, (_, data, index, _) in enumerate(loaded)
        ]
    return Views(images, example_views(multi_crop, images, cfg.seed, targets), mean, std)


def example_views(
    multi_crop: MultiCrop,
    images: Sequence[Tensor],
    seed: int,
    targets: Sequence[Tensor] | None = None,
) -> list[list[Tensor]]:
    """The normalised views of each image, globals first; `targets` as in `MultiCrop.views`."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for k, image in enumerate(images):
        target = None if targets is None else [targets[k]]
        table = draw(generator, multi_crop.crops)
        crops, local_crops, _ = multi_crop([image], [table], target)
        examples.append([*crops, *(() if local_crops is None else local_crops)])
    return examples


def draw_views(path: Path, views: Views, crops: Sequence[Sequence[Tensor | Picture]]) -> None:
    """A row for each image, with its crops or pictures of them."""
    statistics = {"mean": views.mean, "std": views.std}
    images = [normalized(image, **statistics) for image in views.images]
    draw_report(path, images, crops=crops, height=192, **statistics)


def hide_in_crops(
    cfg: TrainConfig, views: Views, patch_size: int | None = None
) -> tuple[list[list[Picture]], Tensor]:
    """The global crops of each image with their hidden patches, and the masks (crops, h, w).

    The masks are drawn as for a batch of these images, in crop-major order.

    Args:
        patch_size: in pixels; by default the configuration's.
    """
    ibot, count, patch = cfg.loss.ibot, cfg.crops.global_count, patch_size or cfg.model.patch_size
    grid = tuple(side // patch for side in views.crops[0][0].shape[-2:])
    crops = count * len(views.images)
    given = (ibot.mask_probability, ibot.mask_ratio)
    masks = draw_masks(crops, grid, *given, (cfg.seed,), fill=ibot.mask_fill)
    masks = masks.view(count, len(views.images), *grid)
    pictures = []
    for index, of_image in enumerate(views.crops):
        whole = [crop[:, : grid[0] * patch, : grid[1] * patch] for crop in of_image[:count]]
        crops = [to_picture(crop, views.mean, views.std) for crop in whole]
        pictures.append([hide_patches(*pair) for pair in zip(crops, masks[:, index], strict=True)])
    return pictures, masks.flatten(0, 1)
