"""The second executor of a policy: workers send whole images, the device makes the crops.

    pack       in a loader worker    images end to end in one buffer, and the place of each crop
    cut_out    on the device         all crops of a size at once, flips and turns included

A crop is Y · window · X: one matrix resizes lines, one columns. They hold the weights of
F.interpolate's antialiased bicubic mode, so both executors give the same crops: floats to five
digits, 8 bits up to one of 255 levels (rarely two). Boxes are drawn for images in their own size.
An image far larger than any crop needs is shrunk first and its boxes with it, which changes only
the resampling.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import repeat

import numpy as np
import torch
from torch import Tensor

from data.augment import CropSpec, MultiCrop
from data.pixels import resize, to_unit

SHRINK_BELOW = 0.8  # share of a side; to shrink by less costs more than it saves
BUDGET = 1 << 25  # values and weights of windows resized at a time: about half a GB in all


@dataclass
class Cut:
    """Crops of one size in chunks: first the upright ones, then those turned by a quarter, each
    with the largest windows first.

    In `lines`, output line k of a window lies at offset + (k + 1/2) · step, in its pixels; a
    negative step mirrors.
    """

    size: tuple[int, int]
    rows: Tensor  # (n,) int64: the place of each in the batch, crop-major
    windows: Tensor  # (n, 4) int64: first pixel in the buffer, pixels a line, height, width
    lines: Tensor  # (n, 4) float32: offset and step, down and across
    chunks: list[tuple[int, int, int, int, bool]]  # from, to, largest height and width, turned

    def to(self, device: torch.device, non_blocking: bool) -> "Cut":
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Cut":
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Cut":
        moved = map(function, (self.rows, self.windows, self.lines))
        return Cut(self.size, *moved, self.chunks)


# ----------------------------------------------------------------- in a loader worker


def pack(
    multi_crop: MultiCrop,
    images: Iterable[Tensor],
    tables: Sequence[Tensor],
    targets: Iterable[Tensor] | None = None,
) -> tuple[Tensor, list[Cut]]:
    """One buffer of all images, shrunk where they can be, and the crops to cut out of it.

    Arguments are those of `MultiCrop.views`.

    Returns:
        (P, C) pixels, uint8 if all images are and else float32 in [0, 1]; a Cut for each of
        `multi_crop.cuts`.
    """
    packed, sizes, points = [], [], []
    for image, target in zip(images, repeat(None) if targets is None else targets, strict=False):
        sizes.append(image.shape[-2:])
        points.append(target)
        packed.append(shrink(image, multi_crop))
    if any(image.dtype != torch.uint8 for image in packed):
        packed = [to_unit(image) for image in packed]
    u = torch.stack(list(tables), 1)  # (crops, b, NUMBERS)
    if targets is not None:
        u = torch.cat([u, torch.stack(points, 1)], 2)
    sizes = np.array(sizes)
    packed_sizes = np.array([image.shape[-2:] for image in packed])
    budget = BUDGET // (1 + len(packed[0]))
    cuts = [
        _place_crops(multi_crop, u[rows].flatten(0, 1), sizes, packed_sizes, spec, budget)
        for spec, rows in multi_crop.cuts
    ]
    return torch.cat([image.permute(1, 2, 0).reshape(-1, len(image)) for image in packed]), cuts


def shrink(image: Tensor, multi_crop: MultiCrop) -> Tensor:
    """The image (C, H, W), resized so that the smallest box in it has the pixels of its crop."""
    height, width = image.shape[-2:]
    ratio = 0.0
    for spec, _ in multi_crop.cuts:
        # A box is about as large as this, or as the image where it does not fit into a long one.
        side = min((height * width * spec.scale[0]) ** 0.5, height, width)
        ratio = max(ratio, max(spec.size) / side)
    if ratio >= SHRINK_BELOW:
        return image
    return resize(image, (max(1, round(height * ratio)), max(1, round(width * ratio))))


def _place_crops(
    multi_crop: MultiCrop,
    u: Tensor,
    sizes: np.ndarray,
    packed_sizes: np.ndarray,
    spec: CropSpec,
    budget: int,
) -> Cut:
    """
    Args:
        u: (count·b, NUMBERS) or with targets, crop-major.
        sizes, packed_sizes: (b, 2) of the images as they are and as they were packed.
        budget: pixels of the windows in a chunk.
    """
    starts = np.cumsum([0, *packed_sizes.prod(1)[:-1]])
    starts = np.tile(starts, spec.count)
    sizes, packed_sizes = np.tile(sizes, (spec.count, 1)), np.tile(packed_sizes, (spec.count, 1))
    boxes, flips, turns = (np.asarray(values) for values in multi_crop.geometry(u, sizes, spec))
    ratio = packed_sizes / sizes
    corner, extent = boxes[:, :2] * ratio, boxes[:, 2:] * ratio
    # Pixels with their centre in the box, at least one.
    first = np.minimum(np.floor(corner + 0.5), packed_sizes - 1)
    window = np.maximum(np.floor(corner + extent + 0.5) - first, 1).astype(np.int64)

    turned = turns % 2 == 1
    step = extent / np.where(turned[:, None], spec.size[::-1], spec.size)
    # A turn by a quarter is an exchange of lines and columns, and one of them mirrored.
    mirrored = np.stack([turns >= 2, flips ^ ((turns == 1) | (turns == 2))], 1)
    offset = corner - first + np.where(mirrored, extent, 0)
    lines = np.stack([offset, np.where(mirrored, -step, step)], 2).reshape(-1, 4)
    row, column = first.astype(np.int64).T
    line_length = packed_sizes[:, 1]
    places = np.stack([starts + row * line_length + column, line_length], 1)
    windows = np.concatenate([places, window], 1)

    order = np.lexsort((-window.prod(1), turned))
    return Cut(
        spec.size,
        torch.from_numpy(order),
        torch.from_numpy(windows[order]),
        torch.from_numpy(lines[order].astype(np.float32)),
        _chunks(window[order], turned[order], budget, max(spec.size)),
    )


def _chunks(
    window: np.ndarray, turned: np.ndarray, budget: int, side: int
) -> list[tuple[int, int, int, int, bool]]:
    """Neighbours whose windows, each as large as the largest, and whose crops of `side` pixels a
    side stay within a budget of pixels; a single one may exceed it."""
    chunks, start, height, width = [], 0, 0, 0
    for k, (h, w) in enumerate(window.tolist()):
        larger = max(height, h), max(width, w)
        pixels = (k + 1 - start) * max(larger[0], side) * max(larger[1], side)
        if k > start and (turned[k] != turned[start] or pixels > budget):
            chunks.append((start, k, height, width, bool(turned[start])))
            start, larger = k, (h, w)
        height, width = larger
    return [*chunks, (start, len(window), height, width, bool(turned[start]))]


# ----------------------------------------------------------------- on the device


def cut_out(pixels: Tensor, cut: Cut) -> Tensor:
    """(n, C, h, w) crops, crop-major, uint8 from uint8; nothing waits for the device.

    Args:
        pixels: (P, C) on the device of `cut`.
    """
    out = pixels.new_empty(len(cut.rows), pixels.shape[1], *cut.size)
    for start, stop, height, width, turned in cut.chunks:
        part = slice(start, stop)
        size = cut.size[::-1] if turned else cut.size
        crops = _resize_windows(pixels, cut.windows[part], cut.lines[part], (height, width), size)
        out[cut.rows[part]] = crops.transpose(2, 3) if turned else crops
    return out


def _resize_windows(
    pixels: Tensor, windows: Tensor, lines: Tensor, largest: tuple[int, int], size: tuple[int, int]
) -> Tensor:
    """(n, C, h, w) as `data.pixels.resize` gives it, of windows that differ in size."""
    coarse = pixels.dtype == torch.uint8
    # Whole numbers up to 255 are exact in half precision, and so nearly are the weights.
    dtype = torch.half if coarse and pixels.device.type == "cuda" else torch.float32
    start, line_length, height, width = windows[..., None].unbind(1)  # (n, 1) each
    # Beyond a window its last line and column, which get no weight.
    y = torch.arange(largest[0], device=pixels.device).minimum(height - 1)
    x = torch.arange(largest[1], device=pixels.device).minimum(width - 1)
    places = (start + y * line_length)[:, :, None] + x[:, None]  # (n, height, width)
    window = pixels[places].movedim(3, 2).to(dtype)  # (n, height, C, width)
    y_offset, y_step, x_offset, x_step = lines[..., None].unbind(1)
    down = resampling(y_offset, y_step, height[:, 0], size[0], largest[0]).to(dtype)
    across = resampling(x_offset, x_step, width[:, 0], size[1], largest[1]).to(dtype)
    crops = torch.bmm(window.flatten(1, 2), across.transpose(1, 2))  # (n, height·C, w)
    if coarse:
        crops = crops.round_().clamp_(0, 255)  # as F.interpolate between its two passes
    crops = torch.bmm(down, crops.view(len(windows), largest[0], -1))  # (n, h, C·w)
    crops = crops.unflatten(2, (-1, size[1])).movedim(2, 1)
    return crops.round().clamp_(0, 255).to(torch.uint8) if coarse else crops.clamp(0, 1)


def resampling(offset: Tensor, step: Tensor, extent: Tensor, lines: int, pixels: int) -> Tensor:
    """(n, lines, pixels) weights of a window's pixels in each resampled line; rows sum to 1.

    Cubic convolution with a = -1/2 (Keys 1981), as wide as a line where lines are further apart
    than pixels, as in F.interpolate with mode="bicubic" and antialias=True.

    Args:
        offset, step: (n, 1) as in `Cut.lines`.
        extent: (n,) pixels of the window that count.
    """
    line, pixel = (torch.arange(n, device=offset.device) for n in (lines, pixels))
    centre = offset + (line + 0.5) * step
    distance = (pixel + 0.5 - centre[..., None]).div_(step.abs().clamp(min=1)[..., None]).abs_()
    near = (1.5 * distance - 2.5) * distance.square() + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    weights = torch.where(distance < 1, near, torch.where(distance < 2, far, 0))
    weights = weights * (pixel < extent[:, None])[:, None]
    return weights / weights.sum(2, keepdim=True)
