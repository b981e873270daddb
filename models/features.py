"""What every backbone returns, and how images must be prepared for it."""

import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from errors import UserError


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
        interpolation: nearest, bilinear or bicubic; the last two antialiased.
        scale: the value in files that becomes 1: 255 for 8 bits, 65,535 for 16, 1 for floats. Our
            reader knows it from each file; other libraries have to be told.
        window: centre and width of the values that became 0 to 1 in training, or None. DATA says
            it anew for other images.
        span: lowest and highest value of each band, or of all, that became 0 and 1 in training
            (`scale=` of DATA), or None. DATA says it anew as well.
    """

    size: tuple[int, int]
    resize: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    scale: float = 255.0
    window: tuple[float, float] | None = None
    span: tuple[tuple[float, float], ...] | None = None

    def asked_of_data(self) -> dict[str, str]:
        """Keys of DATA that bring other images to the range of the training, as text."""
        asked = {}
        if self.window:
            asked["window"] = f"{self.window[0]:g},{self.window[1]:g}"
        if self.span:
            ends = [f"{end:.9g}" for pair in self.span for end in pair]
            plain = len(ends) == 2 and self.span[0][0] == 0
            asked["scale"] = ends[1] if plain else ",".join(ends)
        return asked


INTERPOLATIONS = ("nearest", "bilinear", "bicubic")
NEAREST_FILTER = {"lanczos": "bicubic", "box": "bilinear", "hamming": "bilinear"}


def read_interpolation(name: str, source: str) -> str:
    """The filter that `source` asks for, or the one of ours that comes nearest, which is said.

    Raises:
        UserError: if it is none that we know.
    """
    if name in NEAREST_FILTER:
        ours = NEAREST_FILTER[name]
        print(f"{source} asks for {name}; images are resized with {ours}", file=sys.stderr)
        return ours
    if name not in INTERPOLATIONS:
        allowed = ", ".join((*INTERPOLATIONS, *NEAREST_FILTER))
        raise UserError(f"{source} asks for interpolation {name!r}; allowed are {allowed}")
    return name
