"""Errors of canopy heights, as high-resolution canopy maps are measured (Tolan et al., 2024)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from engine import distributed

BLOCK, EDGE = 50, 3  # pixels: side of a block, and rows and columns before the first one


class CanopyErrors:
    """MAE, RMSE, R², block R² and bias over all pixels of a data set, not means of images.

    Blocks begin after EDGE rows and columns. Of pixels without height, which the authors' data has
    not, a block may have half (ours); means are over the others.
    """

    def __init__(self) -> None:
        self.sums = torch.zeros(2, 6, dtype=torch.float64)  # of pixels and of blocks

    def add(self, guess: Tensor, height: Tensor) -> None:
        """One image: (H, W) metres both; a guess below 0 counts as 0."""
        guess, height = guess.clamp(min=0).double().cpu(), height.double().cpu()
        known = height.isfinite() & (height > 0)
        self.sums[0] += _sums(guess[known], height[known])
        maps = torch.stack([guess * known, torch.where(known, height, 0.0), known.double()])
        maps = maps[:, EDGE:, EDGE:]
        if min(maps.shape[1:]) >= BLOCK:
            guesses, heights, share = F.avg_pool2d(maps, BLOCK).flatten(1)
            kept = share >= 0.5
            self.sums[1] += _sums(guesses[kept] / share[kept], heights[kept] / share[kept])

    def result(self) -> dict[str, float | None]:
        """ "mae", "rmse" and "bias" (predicted − true) in metres, "r2" and "block_r2"; of all ranks
        together. None where there is no block, or where all heights are equal."""
        sums = sum(distributed.gather_objects(self.sums))
        count, _, _, error, absolute, square = sums[0].tolist()
        means = {"mae": absolute / count, "rmse": (square / count) ** 0.5, "bias": error / count}
        return means | {"r2": _r2(sums[0]), "block_r2": _r2(sums[1])}


def _sums(guess: Tensor, truth: Tensor) -> Tensor:
    error = guess - truth
    columns = torch.ones_like(truth), truth, truth.square(), error, error.abs(), error.square()
    return torch.stack([column.sum() for column in columns])


def _r2(sums: Tensor) -> float | None:
    """1 − Σ(error²) / Σ((truth − its mean)²)."""
    count, total, squares, _, _, errors = sums.tolist()
    spread = squares - total**2 / max(count, 1)
    return 1 - errors / spread if spread > 1e-9 * max(squares, 1e-12) else None
