"""Positions of patches: learned ones on other grids, and rotary ones (DINOv3)."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import UserError
from models.checks import check_choice

Rotation = tuple[Tensor, Tensor]  # sine and cosine, each (tokens, d)
# None without rotary positions; one for each group of images where groups are packed.
Rotations = Rotation | None | Sequence[Rotation | None]
NORMALIZE = ("separate", "max", "min")


def resize_positions(
    positions: Tensor, native_grid: tuple[int, int], grid: tuple[int, int], how: str
) -> Tensor:
    """Learned positions (1, 1 + N, D) of `native_grid`, CLS first, for the patches of `grid`.

    `how` is the `interpolation` of `VisionTransformer`. The native grid takes `positions` itself.
    """
    if grid == native_grid:
        return positions
    maps = positions[:, 1:].float().unflatten(1, native_grid).permute(0, 3, 1, 2)  # (1, D, h, w)
    if how == "offset":
        # The authors add 0.1 against rounding down. It moves the samples a little, so the
        # released weights need it.
        scale = [(new + 0.1) / old for new, old in zip(grid, native_grid, strict=True)]
        maps = F.interpolate(maps, scale_factor=scale, mode="bicubic")
    else:
        maps = F.interpolate(maps, size=grid, mode="bicubic", antialias=how == "antialias")
    resized = maps.flatten(2).mT.to(positions.dtype)
    return torch.cat([positions[:, :1], resized], dim=1)


class RotaryPositions(nn.Module):
    """Sine and cosine by which queries and keys of a patch are rotated.

    A head of d dimensions has d/4 periods base^(k / (d/4)), each used for y and for x, and the d/2
    angles are used for both halves of the head: quarters y | x | y | x. In training the coordinates
    may be shifted, stretched per axis (jitter) and stretched as a whole (rescale), one draw a call,
    the same for all images.
    """

    def __init__(
        self,
        head_dim: int,
        base: float = 100.0,
        normalize: str = "separate",
        shift: float | None = None,
        jitter: float | None = None,
        rescale: float | None = None,
    ):
        """
        Args:
            head_dim: d, a multiple of 4.
            normalize: coordinates are divided by the length of their own axis ("separate", which
                hides the aspect ratio), of the longer axis ("max") or of the shorter ("min").
            shift: s adds U(-s, s) to each axis.
            jitter, rescale: j >= 1 multiplies by exp(U(-ln j, ln j)), drawn for each axis or once.

        Raises:
            UserError: for another `head_dim` or `normalize`.
        """
        super().__init__()
        if head_dim % 4:
            raise UserError(
                f"rotary positions need a head dimension that 4 divides, not {head_dim}"
            )
        check_choice("rope_normalize", normalize, NORMALIZE)
        self.base = base
        self.normalize = normalize
        self.shift = shift
        self.jitter = jitter
        self.rescale = rescale
        # Persistent, because the released weights hold periods that were rounded to bfloat16.
        self.register_buffer("periods", torch.empty(head_dim // 4))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        quarter = len(self.periods)
        exponents = torch.arange(quarter, device=self.periods.device) / quarter
        self.periods.copy_(self.base**exponents)

    @property
    def augments(self) -> bool:
        """Whether the next call draws at random."""
        strengths = (self.shift, self.jitter, self.rescale)
        return self.training and any(strength is not None for strength in strengths)

    def forward(self, grid: tuple[int, int], unrotated: int = 0) -> Rotation:
        """Sine and cosine, each (unrotated + N, d) in float32, for a grid of (h, w) patches.

        The first `unrotated` tokens, CLS and registers, turn by 0. Patches follow row by row.
        """
        coordinates = self._coordinates(grid)
        if self.augments:
            coordinates = self._augment(coordinates)
        angles = 2 * math.pi * coordinates[:, :, None] / self.periods.float()  # (N, 2, d/4)
        angles = angles.flatten(1).repeat(1, 2)
        before = (0, 0, unrotated, 0)
        return F.pad(angles.sin(), before, value=0.0), F.pad(angles.cos(), before, value=1.0)

    def _coordinates(self, grid: tuple[int, int]) -> Tensor:
        """Patch centres (N, 2), y first, in (-1, 1)."""
        h, w = grid
        lengths = {"separate": (h, w), "max": (max(grid),) * 2, "min": (min(grid),) * 2}
        centres = [
            2 * (torch.arange(count, device=self.periods.device) + 0.5) / length - 1
            for count, length in zip(grid, lengths[self.normalize], strict=True)
        ]
        y, x = centres[0][:, None].expand(h, w), centres[1].expand(h, w)
        return torch.stack([y, x], dim=-1).flatten(0, 1)

    def _augment(self, coordinates: Tensor) -> Tensor:
        if self.shift is not None:
            coordinates = coordinates + coordinates.new_empty(2).uniform_(-self.shift, self.shift)
        for strength, axes in ((self.jitter, 2), (self.rescale, 1)):
            if strength is not None:
                limit = math.log(strength)
                factors = coordinates.new_empty(axes).uniform_(-limit, limit).exp()
                coordinates = coordinates * factors
        return coordinates


def rotate(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """x · cos + [-x2, x1] · sin, x1 and x2 being the halves of the last dimension.

    Computed in the type of `sin`, returned in that of `x` (..., d), against which both broadcast.
    """
    half = x.shape[-1] // 2
    sin = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)  # x is larger: the sign goes here
    wide = x.to(sin.dtype)
    return torch.addcmul(wide * cos, wide.roll(half, dims=-1), sin).to(x.dtype)
