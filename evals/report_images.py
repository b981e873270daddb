"""Pictures for report.html, in RUN/report_images: the same images as a network sees them over time.

images.jpg, crops.jpg, masks.jpg, neighbours.jpg, and of some steps pca-STEP.png, attention-STEP.png
with one pixel a patch.
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
from evals.figures import crop_cells, draw_sheet, enlarge
from evals.knn import cls_features
from evals.maps import Picture, attention_image, heat_picture, pca_basis, pca_image, to_picture
from evals.reading import first_readable
from evals.views import Views, example_views, hide_in_crops

SHOWN, GALLERY, NEIGHBOURS = 4, 64, 5  # images drawn; searched for neighbours; found for each
MEMORY, WORK = 2**26, 1e12  # of a gallery, at most: bytes, and operations of a forward pass
FEWEST = 8  # images in a gallery; none where that would be too much work
STEPS = 6  # whose maps are kept
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

    def pictures(self, images: Sequence[Tensor], height: int = SIDE) -> list[Picture]:
        return [enlarge(to_picture(image, self.mean, self.std), height) for image in images]


def read_report_images(
    cfg: TrainConfig, data: ImageData, prepared: Any, backbone: nn.Module, mean: Any, std: Any
) -> ReportImages | None:
    """The first readable images, and a gallery spread over the data; None where none is readable.

    Args:
        prepared: item i is (image i of `data` (C, H, W) normalised with mean and std, ...).
        backbone: its size bounds the gallery.
    """
    shown = first_readable(data, SHOWN)
    if not shown:
        return None
    inputs = torch.stack([prepared[index][0] for index in shown])
    patches = inputs[0, 0].numel() / backbone.patch_size**2
    work = 2 * patches * sum(weights.numel() for weights in backbone.parameters())
    count = int(min(GALLERY, MEMORY / inputs[0].nbytes, WORK / work if work else GALLERY))
    gallery = inputs[:0]
    if count >= FEWEST:
        spread = sorted(set(range(0, len(data), -(-len(data) // count))) - set(shown))
        found = [prepared[index][0] for index in first_readable(data, count, spread)]
        gallery = torch.stack(found) if found else gallery
    views = Views([data.image(index) for index in shown], [], mean, std)
    crops = example_views(multi_crop_from(cfg.crops, mean, std), views.images, cfg.seed)
    masks = cfg.loss.ibot.weight > 0 or cfg.schedule.ibot is not None
    masked = (
        hide_in_crops(cfg, views._replace(crops=crops), backbone.patch_size)[0] if masks else []
    )
    return ReportImages(inputs, gallery, crops, masked, mean, std, Path(cfg.output_dir).name)


def draw_report_images(
    folder: Path,
    step: int,
    shown: ReportImages,
    backbone: nn.Module,
    features: Any,
    attention: Tensor | None,
) -> None:
    """Writes the pictures of a step; removes those of later steps, and of some in between.

    Args:
        features: `Features` of the shown images.
        attention: (n, heads, rows, T) of CLS and registers, None where there is none.
    """
    folder.mkdir(exist_ok=True)
    grid, prefix = features.grid, 1 + features.registers.shape[1]
    basis = pca_basis(features.patches.flatten(0, 1))
    maps = {"pca": [pca_image(patches, grid, basis) for patches in features.patches]}
    if attention is not None:
        heads = [attention_image(weights.float(), grid, prefix) for weights in attention]
        maps["attention"] = [heat_picture(values.mean(dim=0)) for values in heads]
    for kind, pictures in maps.items():
        Image.fromarray(in_a_row(pictures, 1)).save(folder / f"{kind}-{step:09d}.png")
    forget_steps(folder, step)
    photographs = shown.pictures(shown.inputs, min(shown.inputs.shape[-2], 2 * SIDE))
    patch = max(1, round(len(photographs[0]) / grid[0]))  # a gap as wide as that of the maps
    Image.fromarray(in_a_row(photographs, patch)).save(folder / "images.jpg")
    views = [[to_picture(crop, shown.mean, shown.std) for crop in row] for row in shown.crops]
    sheets = {"crops": [crop_cells(row, SIDE) for row in views]}
    sheets["masks"] = [crop_cells(row, SIDE) for row in shown.masked]
    if len(shown.gallery):
        near = neighbours(features.cls, backbone, shown.gallery)
        images = zip(shown.inputs, shown.gallery[near], strict=True)
        sheets["neighbours"] = [shown.pictures([image, *found]) for image, found in images]
    for name, rows in sheets.items():
        if rows:
            draw_sheet(folder / f"{name}.jpg", rows, [""] * len(rows[0]))


def neighbours(cls: Tensor, backbone: nn.Module, gallery: Tensor) -> Tensor:
    """(n, k) the gallery's images with the most similar CLS (cosine) to (n, D), nearest first."""
    known = torch.cat([cls_features(backbone, part) for part in gallery.split(8)])
    return (cls.float() @ known.T).topk(min(NEIGHBOURS, len(known)), dim=1).indices


def steps_in(folder: Path) -> list[int]:
    """The steps whose maps are kept, in order."""
    return sorted(int(path.stem.partition("-")[2]) for path in folder.glob("pca-*.png"))


def forget_steps(folder: Path, step: int) -> None:
    """Keeps the first step, `step` and some in between, evenly; none after it."""
    kept = [known for known in steps_in(folder) if known <= step]
    while len(kept) > STEPS:
        gaps = [after - before for before, after in zip(kept, kept[2:], strict=False)]
        del kept[1 + gaps.index(min(gaps))]
    for known in set(steps_in(folder)) - set(kept):
        for path in folder.glob(f"*-{known:09d}.png"):
            path.unlink()


def in_a_row(pictures: Sequence[Picture], gap: int) -> Picture:
    """Pictures of one height side by side on white."""
    rim = (0, 0), (0, gap), (0, 0)
    rims = [np.pad(picture, rim, constant_values=255) for picture in pictures]
    return np.concatenate(rims, axis=1)[:, :-gap]
