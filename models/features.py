"""What every backbone returns, and how images must be prepared for it."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Features:
    """A backbone's view of B images, everything after its final norm.

    Attributes:
        cls: (B, D) one vector an image.
        registers: (B, R, D), R = 0 where the backbone has none.
        patches: (B, N, D), row-major over the grid.
        grid: (h, w) with h · w = N.
    """

    cls: Tensor
    registers: Tensor
    patches: Tensor
    grid: tuple[int, int]


# FSDP and the exporters look for tensors inside outputs; without this they would not see these.
torch.export.register_dataclass(Features)


@dataclass(frozen=True)
class Preprocessing:
    """From an image with values in [0, 1] to a backbone's input: resize, centre crop, normalise.

    Attributes:
        size: (height, width) in pixels of the centre crop.
        resize: short side in pixels before the crop.
        mean, std: one number a channel, for values in [0, 1].
        interpolation: nearest, lanczos, bilinear or bicubic.
    """

    size: tuple[int, int]
    resize: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
