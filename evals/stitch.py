"""One map of a large image, from overlapping windows with soft edges; also as a GeoTIFF."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from data.pixels import resize, strided_starts
from data.sources.rasters import Box, has_rasterio, open_rasterio
from data.sources.tiles import TileImages
from errors import UserError
from evals.heads import TrainedHead
from evals.maps import to_picture
from evals.photographs import Photograph, normalized

BORDER = 16  # a window's side over the width of the border that is dropped
LONGEST = 1024  # pixels of the picture of a map
NO_CLASS = 255


def blend_weights(length: int, side: int, stride: int) -> tuple[list[int], list[Tensor]]:
    """Where windows of `side` begin along `length`, and the weights (side,) of their pixels.

    Weights fall by cos² from the middle of a window to 0 at a border of side / 16, except towards
    the ends, where there is no other window. At every pixel they add up to 1. (ours)

    Raises:
        UserError: if windows so far apart do not cover the length without their borders.
    """
    border = side // BORDER
    if stride > side - 2 * border:
        raise UserError(
            f"windows of {side} pixels lie {stride} apart; without their borders of {border} they "
            f"cover the image only up to {side - 2 * border}"
        )
    starts = strided_starts(length, side, stride)
    rise = (torch.arange(side, dtype=torch.float64) + 0.5 - border) / (side / 2 - border)
    weights, total = [], torch.zeros(length, dtype=torch.float64)
    for start in starts:
        before = torch.ones_like(rise) if start == 0 else rise
        after = torch.ones_like(rise) if start + side == length else rise.flip(0)
        weight = torch.sin(math.pi / 2 * torch.minimum(before, after).clamp(0, 1)).square()
        total[start : start + side] += weight
        weights.append(weight)
    pairs = zip(starts, weights, strict=True)
    return starts, [(weight / total[start : start + side]).float() for start, weight in pairs]


def stitch_rows(
    predict: Callable[[Tensor], Tensor],
    read: Callable[[Box], Tensor],
    size: tuple[int, int],
    window: int,
    stride: int | None = None,
    batch_size: int = 8,
) -> Iterator[tuple[int, Tensor]]:
    """The finished rows of one map, from the top: number of the first, and (K, rows, W) on the CPU.

    Only the rows of one window are in memory.

    Args:
        predict: (B, C, h, w) -> (B, K, height, width) of the windows' boxes.
        read: box -> (C, h, w).
        size: (H, W) of the image in pixels.
        window: side in pixels; of a smaller image, its own side.
        stride: pixels from one window to the next; by default half a window.

    Raises:
        UserError: see `blend_weights`.
    """
    sides = [min(window, length) for length in size]
    steps = [max(1, side // 2) if stride is None else stride for side in sides]
    (tops, down), (lefts, across) = map(blend_weights, size, sides, steps)
    rows = None
    for top, vertical, following in zip(tops, down, [*tops[1:], size[0]], strict=True):
        for first in range(0, len(lefts), batch_size):
            part = slice(first, first + batch_size)
            images = torch.stack([read((top, left, *sides)) for left in lefts[part]])
            for left, horizontal, found in zip(
                lefts[part], across[part], predict(images).float().cpu(), strict=True
            ):
                if rows is None:
                    rows = found.new_zeros(len(found), sides[0], size[1])
                weighted = found * (vertical[:, None] * horizontal)
                rows[..., left : left + sides[1]] += weighted
        done = following - top
        yield top, rows[:, :done].clone()
        rows = torch.cat([rows[:, done:], torch.zeros_like(rows[:, :done])], dim=1)


def stitch(
    predict: Callable[[Tensor], Tensor], image: Tensor, window: int, stride: int | None = None
) -> Tensor:
    """The map (K, H, W) of an image (C, H, W); arguments as of `stitch_rows`."""

    def read(box: Box) -> Tensor:
        top, left, height, width = box
        return image[:, top : top + height, left : left + width]

    rows = stitch_rows(predict, read, tuple(image.shape[-2:]), window, stride)
    return torch.cat([part for _, part in rows], dim=1)


@torch.inference_mode()
def write_geotiff(
    path: Path, data: TileImages, trained: TrainedHead, window: int, size: int
) -> tuple[Photograph, Tensor]:
    """Classes (bytes, 255 where the image has no data) or depth (float32, NaN) of one raster, with
    its coordinates.

    Args:
        window: side in pixels of the file; each window is brought to `size`² for the model.

    Returns:
        The raster and its map (K, h, w), both of LONGEST pixels a side or less, for a picture.

    Raises:
        UserError: without rasterio, for several rasters, and for one without coordinates.
    """
    if not has_rasterio():
        raise UserError("--geotiff needs the package rasterio: pip install rasterio")
    if len(data.rasters) > 1:
        raise UserError(f"--geotiff writes one map, and --images names {len(data.rasters)} files")
    raster, wanted = data.rasters[0], trained.backbone.preprocessing
    with open_rasterio(raster.path) as file:
        crs, transform = file.crs, file.transform
    if crs is None:
        raise UserError(f"{raster.path} has no coordinates for --geotiff to keep; leave that out")
    patch, device = trained.settings.patch_size, next(trained.parameters()).device
    side, shape = max(1, size // patch) * patch, raster.shape[1:]

    def read(box: Box, step: int = 1, brought_to: tuple[int, int] | None = None) -> Tensor:
        values = raster.read(data.bands, box, data.nodata, step)
        image = data.prepare(*values, str(raster.path), wanted.mean)
        image = image if brought_to is None else resize(image, brought_to, wanted.interpolation)
        return normalized(image, wanted.mean, wanted.std)

    sides = [min(window, *shape)] * 2
    step = math.ceil(max(shape) / LONGEST)
    classes, small = trained.settings.task == "segmentation", []
    kind, empty = ("uint8", NO_CLASS) if classes else ("float32", math.nan)
    profile = {"driver": "GTiff", "count": 1, "dtype": kind, "nodata": empty, "crs": crs}
    profile |= {"height": shape[0], "width": shape[1], "transform": transform}
    profile |= {"compress": "deflate", "bigtiff": "if_safer"}
    with open_rasterio(path, "w", **profile) as file:
        windows = partial(read, brought_to=(side, side))
        rows = stitch_rows(lambda x: trained(x.to(device), sides), windows, shape, sides[0])
        for top, scores in rows:
            box = top, 0, scores.shape[1], shape[1]
            known = raster.read(data.bands, box, data.nodata)[1].any(0)
            values = (scores.argmax(dim=0) if classes else scores[0]).numpy().astype(kind)
            values[~known] = empty
            file.write(values[None], window=((top, top + len(values)), (0, shape[1])))
            small.append(scores[:, -top % step :: step, ::step])
    image = read((0, 0, *shape), step)
    picture = to_picture(image, wanted.mean, wanted.std)
    return Photograph(str(raster.path), shape, image, picture), torch.cat(small, dim=1)
