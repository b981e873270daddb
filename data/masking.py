"""Block masks for the masked patch loss: BEiT's blocks, as iBOT, DINOv2 and DINOv3 use them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from errors import UserError

MIN_BLOCK = 4  # patches
MAX_SHARE = 0.5  # of the grid, largest block
ASPECT = (0.3, 1 / 0.3)  # block height / width
TRIES = 10


@dataclass(frozen=True)
class MaskSpec:
    """Which crops are masked, and how much of them."""

    grid: tuple[int, int]  # patches (h, w) of a global crop
    probability: float = 0.5  # share of the global crops that get a mask
    ratio: tuple[float, float] = (0.1, 0.5)  # share of patches, spread evenly over those crops
    fill: bool = True  # exactly that many (DINOv3); False leaves masks a little short (DINOv2)


def block_mask(
    grid: tuple[int, int], count: int, rng: np.random.Generator, fill: bool = True
) -> np.ndarray:
    """Rectangles at random places until `count` patches are hidden.

    Args:
        grid: (h, w) in patches.
        count: patches to hide, 0 to h·w.
        fill: complete with single patches where no further block fits; else up to `count` hidden.

    Returns:
        (h, w) bool, True = hidden.

    Raises:
        UserError: if the grid has fewer than `count` patches.
    """
    height, width = grid
    if not 0 <= count <= height * width:
        raise UserError(f"cannot hide {count} patches of a {height}x{width} grid")
    mask = np.zeros(grid, dtype=bool)
    hidden = 0
    while hidden < count:
        new = _add_block(mask, min(count - hidden, MAX_SHARE * height * width), rng)
        if not new:
            break
        hidden += new
    if fill and hidden < count:
        free = np.flatnonzero(~mask)
        mask.flat[rng.permutation(free)[: count - hidden]] = True
    return mask


def _add_block(mask: np.ndarray, limit: float, rng: np.random.Generator) -> int:
    """Hide one more block of 1 to `limit` new patches; returns how many, 0 if ten tries failed."""
    height, width = mask.shape
    low, high = map(math.log, ASPECT)
    # All numbers of the ten tries in one call: a call costs more than the numbers.
    for area, aspect, top, left in rng.random((TRIES, 4)).tolist():
        area = MIN_BLOCK + (limit - MIN_BLOCK) * area
        aspect = math.exp(low + (high - low) * aspect)
        h, w = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if h >= height or w >= width:
            continue
        top, left = int(top * (height - h + 1)), int(left * (width - w + 1))
        block = mask[top : top + h, left : left + w]
        new = h * w - np.count_nonzero(block)
        if 0 < new <= limit:
            block[:] = True
            return new
    return 0


def draw_masks(
    crops: int,
    grid: tuple[int, int],
    probability: float,
    ratio: tuple[float, float],
    seed_key: Sequence[int],
    rows: Sequence[int] | slice = slice(None),
    fill: bool = True,
) -> Tensor:
    """Masks of some of the G·B global crops of a batch.

    int(crops · probability) of them get a mask, of int(N · edge) patches with the edges evenly
    spaced over `ratio` (DINOv3's collation); which crop gets which is shuffled over the batch, so
    the views of an image are masked independently. Every crop has its own generator: a rank that
    asks for its rows gets those of the whole batch.

    Args:
        crops: G·B, of all ranks together.
        grid, probability, ratio, fill: as in `MaskSpec`.
        seed_key: non-negative integers that name the batch, such as (seed, step).
        rows: which crops to return; all by default.

    Returns:
        (rows, N) bool, True = hidden from the student.
    """
    patches, masked = grid[0] * grid[1], int(crops * probability)
    counts = np.zeros(crops, dtype=np.int64)
    counts[:masked] = patches * np.linspace(*ratio, masked + 1)[1:]
    counts = np.random.default_rng([*seed_key, 0]).permutation(counts)
    chosen = np.arange(crops)[rows]
    masks = np.zeros((len(chosen), patches), dtype=bool)
    for mask, crop in zip(masks, chosen.tolist(), strict=True):
        if counts[crop]:
            rng = np.random.default_rng([*seed_key, 1, crop])
            mask[:] = block_mask(grid, counts[crop], rng, fill).ravel()
    return torch.from_numpy(masks)
