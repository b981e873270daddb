"""The second executor of a policy: workers send images as they are, crops are made on the device.

    pack       in a loader worker    images end to end in one buffer, and where each crop lies in it
    cut_out    on the device         all crops of a size at once, flips and turns included

A crop is Y · window · X: one matrix resizes lines, one columns. They hold the weights of F.interpolate's antialiased
bicubic mode, so that both executors give the same crops: floats to five digits, 8 bits up to one of 255 levels (rarely two). Boxes are drawn for images in their own
size; an image far larger than any crop needs is shrunk first and its boxes with it, which changes only the resampling.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import repeat

import numpy as np
import torch
from torch import Tensor

from data.augment import CropSpec, MultiCrop, resize, to_unit

SHRINK_BELOW = 0.8  # share of a side; to shrink by less costs more than it saves
BUDGET = (
    1 << 25
)  # values and weights of the windows resized at a time: about half a GB with all by-products


@dataclass
class Cut:
    """Crops of one size, in chunks: first upright ones, then those turned by a quarter, the largest windows first.

    In `lines`, output line k of a window lies at offset + (k + 1/2) · step, in its pixels; a negative step mirrors.
    """

    size: tuple[int, int]
    rows: Tensor  # (n,) int64: the place of each in the batch, crop-major
    windows: (
        Tensor  # (n, 4) int64: first pixel in the buffer, pixels a line of its image, height, width
    )
    lines: Tensor  # (n, 4) float32: offset and step, down and across
    chunks: list[
        tuple[int, int, int, int, bool]
    ]  # from, to, largest height, largest width, whether turned

    def to(self, device: torch.device, non_blocking: bool) -> "Cut":
        moved = (
            tensor.to(device, non_blocking=non_blocking)
            for tensor in (self.rows, self.windows, self.lines)
        )
        return Cut(self.size, *moved, self.chunks)

    def pin_memory(self) -> "Cut":
        return Cut(
            self.size,
            *(tensor.pin_memory() for tensor in (self.rows, self.windows, self.lines)),
            self.chunks,
        )


# ----------------------------------------------------------------- in a loader worker


def pack(
    multi_crop: MultiCrop,
    images: Iterable[Tensor],
    tables: Sequence[Tensor],
    targets: Iterable[Tensor] | None = None,
) -> tuple[Tensor, list[Cut]]:
    """Images (C, H, W), one after the other and shrunk where they can be, and what is to be cut out of them.

    Arguments are those of `MultiCrop.views`.

    Returns:
        (P, C) pixels of all images, uint8 if all are and else float32 in [0, 1]; a Cut for each of `multi_crop.cuts`.
    """
    kept, sizes, points = [], [], []
    for image, target in zip(images, repeat(None) if targets is None else targets):
        sizes.append(image.shape[-2:])
        points.append(target)
        kept.append(shrunk(image, multi_crop))
    if any(image.dtype != torch.uint8 for image in kept):
        kept = [to_unit(image) for image in kept]
    u = torch.stack(list(tables), 1)  # (crops, b, NUMBERS)
    if targets is not None:
        u = torch.cat([u, torch.stack(points, 1)], 2)
    sizes, own = np.array(sizes), np.array([image.shape[-2:] for image in kept])
    budget = BUDGET // (1 + len(kept[0]))
    cuts = [
        _cut(multi_crop, u[rows].flatten(0, 1), sizes, own, spec, budget)
        for spec, rows in multi_crop.cuts
    ]
    return torch.cat([image.permute(1, 2, 0).reshape(-1, len(image)) for image in kept]), cuts


def shrunk(image: Tensor, multi_crop: MultiCrop) -> Tensor:
    """The image (C, H, W), resized so that the smallest box drawn in it still has the pixels of its crop."""
    height, width = image.shape[-2:]
    ratio = 0.0
    for spec, _ in multi_crop.cuts:
        # A box is about as large as this, or as the image where it does not fit into a long one.
        side = min((height * width * spec.scale[0]) ** 0.5, height, width)
        ratio = max(ratio, max(spec.size) / side)
    if ratio >= SHRINK_BELOW:
        return image
    return resize(image, (max(1, round(height * ratio)), max(1, round(width * ratio))))


def _cut(
    multi_crop: MultiCrop,
    u: Tensor,
    sizes: np.ndarray,
    own: np.ndarray,
    spec: CropSpec,
    budget: int,
) -> Cut:
    """
    Args:
        u: (count·b, NUMBERS) or with targets, crop-major.
        sizes, own: (b, 2) of the images as they are and as they were packed.
        budget: pixels of the windows in a chunk.
    """
    starts = np.cumsum([0, *own.prod(1)[:-1]])
    starts, sizes, own = (np.concatenate([values] * spec.count) for values in (starts, sizes, own))
    boxes, flips, turns = (np.asarray(values) for values in multi_crop.geometry(u, sizes, spec))
    ratio = own / sizes
    corner, extent = boxes[:, :2] * ratio, boxes[:, 2:] * ratio
    first = np.minimum(
        np.floor(corner + 0.5), own - 1
    )  # pixels with their centre in the box, at least one
    window = np.maximum(np.floor(corner + extent + 0.5) - first, 1).astype(np.int64)

    turned = turns % 2 == 1
    step = extent / np.where(turned[:, None], spec.size[::-1], spec.size)
    # A turn by a quarter is an exchange of lines and columns, and one of them mirrored.
    mirrored = np.stack([turns >= 2, flips ^ ((turns == 1) | (turns == 2))], 1)
    offset = corner - first + np.where(mirrored, extent, 0)
    lines = np.stack([offset, np.where(mirrored, -step, step)], 2).reshape(-1, 4)
    start = starts + first[:, 0].astype(np.int64) * own[:, 1] + first[:, 1].astype(np.int64)
    windows = np.concatenate([np.stack([start, own[:, 1]], 1), window], 1)

    order = np.lexsort((-window.prod(1), turned))
    chunks = _chunks(window[order], turned[order], budget, max(spec.size))
    tensors = (
        torch.from_numpy(values)
        for values in (order, windows[order], lines[order].astype(np.float32))
    )
    return Cut(spec.size, *tensors, chunks)


def _chunks(
    window: np.ndarray, turned: np.ndarray, budget: int, side: int
) -> list[tuple[int, int, int, int, bool]]:
    """Neighbours whose windows, each as large as the largest, and crops of `side` pixels a side stay within a budget of
    pixels; a single one may exceed it."""
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
        crops = _resized(pixels, cut.windows[part], cut.lines[part], (height, width), size)
        out[cut.rows[part]] = crops.transpose(2, 3) if turned else crops
    return out


def _resized(
    pixels: Tensor, windows: Tensor, lines: Tensor, largest: tuple[int, int], size: tuple[int, int]
) -> Tensor:
    """(n, C, h, w) as `data.augment.resize` gives it, of windows that differ in size."""
    coarse = pixels.dtype == torch.uint8
    # Whole numbers up to 255 are exact in half precision, and so nearly are the weights.
    dtype = torch.half if coarse and pixels.device.type == "cuda" else torch.float32
    start, line, *extents = windows.unbind(1)
    # Beyond a window its last line and column, which get no weight.
    y, x = (
        torch.arange(n, device=pixels.device).minimum(e[:, None] - 1)
        for n, e in zip(largest, extents)
    )
    places = (start[:, None] + y * line[:, None])[:, :, None] + x[:, None]  # (n, height, width)
    window = pixels[places].movedim(3, 2).to(dtype)  # (n, height, C, width)
    down, across = (
        resampling(*axis.split(1, 1), extent, *sides).to(dtype)
        for axis, extent, sides in zip(lines.split(2, 1), extents, zip(size, largest))
    )
    made = torch.bmm(window.flatten(1, 2), across.transpose(1, 2))  # (n, height·C, w)
    made = (
        made.round_().clamp_(0, 255) if coarse else made
    )  # as F.interpolate does between its two passes
    made = (
        torch.bmm(down, made.view(len(windows), largest[0], -1))
        .unflatten(2, (-1, size[1]))
        .movedim(2, 1)
    )
    return made.round().clamp_(0, 255).to(torch.uint8) if coarse else made.clamp(0, 1)


def resampling(offset: Tensor, step: Tensor, extent: Tensor, lines: int, pixels: int) -> Tensor:
    """(n, lines, pixels) weights of the pixels of a window in each line that is made of it; rows sum to 1.

    Cubic convolution with a = -1/2 (Keys 1981), as wide as a line where lines are further apart than pixels: what
    F.interpolate does for mode="bicubic" and antialias=True.

    Args:
        offset, step: (n, 1) as in `Cut.lines`.
        extent: (n,) pixels of the window that count.
    """
    k, pixel = (torch.arange(n, device=offset.device) for n in (lines, pixels))
    centre = offset + (k + 0.5) * step
    distance = (pixel + 0.5 - centre[..., None]).div_(step.abs().clamp(min=1)[..., None]).abs_()
    near = (1.5 * distance - 2.5) * distance.square() + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    weights = (
        torch.where(distance < 1, near, torch.where(distance < 2, far, 0))
        * (pixel < extent[:, None])[:, None]
    )
    return weights / weights.sum(2, keepdim=True)
