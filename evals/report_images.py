"""Pictures for report.html: what a network sees in the same few images at several steps of a run.

RUN/report_images/ holds them: images.jpg, crops.jpg, masks.jpg, neighbours.jpg, and for each step
that is kept pca-STEP.png and attention-STEP.png, one pixel a patch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from data.images import ImageData
from engine.config import TrainConfig
from engine.views import multi_crop_from
from evals.figures import GAP, enlarge, pack
from evals.knn import cls_features
from evals.maps import Picture, attention_image, heat_picture, pca_basis, pca_image, to_picture
from evals.reading import first_readable
from evals.views import Views, example_views, hide_in_crops

SHOWN = 4  # images
GALLERY = 64  # images among which neighbours are looked for
GALLERY_VALUES = 2**24  # at most so many numbers: 64 MB
NEIGHBOURS = 5
LARGE = 100_000_000  # parameters: from here on a gallery would take a CPU too long
STEPS = 6  # of which PCA and attention are kept
SIDE = 112  # pixels of a picture


@dataclass
class ReportImages:
    """Images that a run draws at each checkpoint."""

    inputs: Tensor  # (n, C, H, W), normalised
    gallery: Tensor  # (m, C, H, W)
    crops: list[list[Tensor]]  # of each image, normalised, globals first
    masked: list[list[Picture]]  # its global crops with hidden patches; [] without masks
    mean: Sequence[float]
    std: Sequence[float]
    title: str

    def pictures(self, images: Tensor, height: int = SIDE) -> list[Picture]:
        return [enlarge(to_picture(image, self.mean, self.std), height) for image in images]


def read_report_images(
    cfg: TrainConfig,
    data: ImageData,
    prepared: Any,
    patch_size: int,
    statistics: tuple[Sequence[float], Sequence[float]],
) -> ReportImages:
    """The first readable images and a gallery spread over the data.

    Args:
        prepared: item i is (image i of `data` (C, H, W) normalised, ...).
        statistics: mean and std of the normalisation.
    """
    shown = first_readable(data, SHOWN)
    inputs = torch.stack([prepared[index][0] for index in shown])
    count = max(1, min(GALLERY, GALLERY_VALUES // inputs[0].numel()))
    spread = [index for index in range(0, len(data), -(-len(data) // count)) if index not in shown]
    chosen = first_readable(data, count, spread)
    gallery = [prepared[index][0] for index in chosen]
    views = Views([data.image(index) for index in shown], [], *statistics)
    crops = example_views(multi_crop_from(cfg.crops, *statistics), views.images, cfg.seed)
    masked = []
    if cfg.loss.ibot.weight > 0 or cfg.schedule.ibot is not None:
        masked = hide_in_crops(cfg, views._replace(crops=crops), patch_size)[0]
    gallery = torch.stack(gallery) if gallery else inputs[:0]
    return ReportImages(inputs, gallery, crops, masked, *statistics, Path(cfg.output_dir).name)


def draw_report_images(
    folder: Path,
    step: int,
    shown: ReportImages,
    backbone: nn.Module,
    features: Any,
    attention: Tensor | None,
) -> None:
    """Writes the pictures of a step, and removes those of later steps and of some in between.

    Args:
        folder: made if it is missing.
        features: `Features` of the shown images.
        attention: (n, heads, rows, T) of CLS and registers, None where there is none.
    """
    folder.mkdir(exist_ok=True)
    grid, prefix = features.grid, 1 + features.registers.shape[1]
    basis = pca_basis(features.patches.flatten(0, 1))
    maps = {"pca": [pca_image(patches, grid, basis) for patches in features.patches]}
    if attention is not None:
        images = [attention_image(one.float(), grid, prefix).mean(dim=0) for one in attention]
        maps["attention"] = [heat_picture(image) for image in images]
    for kind, pictures in maps.items():
        Image.fromarray(in_a_row(pictures, 1)).save(folder / f"{kind}-{step:09d}.png")
    forget_steps(folder, step)
    height = min(shown.inputs.shape[-2], 2 * SIDE)
    photographs = shown.pictures(shown.inputs, height)
    gap = round(height / grid[0])  # a patch, as in the maps, so that the two rows agree
    save_photographs(folder / "images.jpg", in_a_row(photographs, gap))
    views = [[to_picture(crop, shown.mean, shown.std) for crop in row] for row in shown.crops]
    save_sheet(folder / "crops.jpg", views)
    save_sheet(folder / "masks.jpg", shown.masked)
    if len(shown.gallery) and sum(weights.numel() for weights in backbone.parameters()) < LARGE:
        near = neighbours(backbone, shown.inputs, shown.gallery)
        rows = zip(shown.pictures(shown.inputs), near, strict=True)
        rows = [[picture, *shown.pictures(shown.gallery[found])] for picture, found in rows]
        save_sheet(folder / "neighbours.jpg", rows)


def neighbours(backbone: nn.Module, images: Tensor, gallery: Tensor) -> Tensor:
    """(n, k) indices of the gallery's images with the most similar CLS (cosine), nearest first."""
    parts = [cls_features(backbone, part) for part in gallery.split(8)]
    similarity = cls_features(backbone, images) @ torch.cat(parts).T
    return similarity.topk(min(NEIGHBOURS, len(gallery)), dim=1).indices


def steps_in(folder: Path) -> list[int]:
    """The steps of which pictures are kept, in order."""
    return sorted(int(path.stem.partition("-")[2]) for path in folder.glob("pca-*.png"))


def forget_steps(folder: Path, step: int) -> None:
    """Keeps the first step, the newest and STEPS - 2 in between, evenly; none after `step`."""
    kept = [known for known in steps_in(folder) if known <= step]
    while len(kept) > STEPS:
        gaps = {kept[i]: kept[i + 1] - kept[i - 1] for i in range(1, len(kept) - 1)}
        kept.remove(min(gaps, key=gaps.get))
    for known in set(steps_in(folder)) - set(kept):
        for path in folder.glob(f"*-{known:09d}.png"):
            path.unlink()


def in_a_row(pictures: Sequence[Picture], gap: int) -> Picture:
    """Pictures of one height side by side on white."""
    white = np.full((pictures[0].shape[0], gap, 3), 255, np.uint8)
    cells = [cell for picture in pictures for cell in (picture, white)]
    return np.concatenate(cells[:-1], axis=1)


def save_sheet(path: Path, rows: Sequence[Sequence[Picture]]) -> None:
    """One row an image; pictures smaller than the first stand in several lines."""
    if not rows:
        path.unlink(missing_ok=True)
        return
    lines = []
    for row in rows:
        large = [picture for picture in row if picture.shape == row[0].shape]
        small = [picture for picture in row if picture.shape != row[0].shape]
        cells = [enlarge(picture, SIDE) for picture in large]
        if small:
            cells.append(pack(small, 2, SIDE))
        lines += [in_a_row(cells, GAP)]
    white = np.full((GAP, lines[0].shape[1], 3), 255, np.uint8)
    sheet = [part for line in lines for part in (line, white)]
    save_photographs(path, np.concatenate(sheet[:-1]))


def save_photographs(path: Path, picture: Picture) -> None:
    Image.fromarray(picture).save(path, quality=88)
