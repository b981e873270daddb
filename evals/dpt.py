"""The DPT head: depth from the maps of four blocks of a frozen backbone (DINOv3, depth head).

Dense Prediction Transformer, Ranftl et al., arXiv 2103.13413; bins and losses as in DINOv3's
eval/depth. Its neck computes what `transformers.DPTNeck` computes on the same weights.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import UserError
from evals.depth import is_depth, sig_loss

SCALES = (4.0, 2.0, 1.0, 0.5)  # of the four maps against the patch grid, the shallowest first
STRIDES = (1, 2, 4, 6)  # of the gradient loss, in pixels
BINS = ("linear", "log", "mixed")
GRADIENT = 0.5  # weight of the gradient loss


class Residual(nn.Module):
    """x + conv(ReLU(conv(ReLU(x))))."""

    def __init__(self, width: int):
        super().__init__()
        self.convolution1 = nn.Conv2d(width, width, 3, padding=1)
        self.convolution2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.convolution2(F.relu(self.convolution1(F.relu(x))))


class Fusion(nn.Module):
    """The deeper map, with a shallower one added, at twice its size."""

    def __init__(self, width: int):
        super().__init__()
        self.skip, self.merge = Residual(width), Residual(width)
        self.projection = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if skip is not None:
            if skip.shape != x.shape:
                skip = F.interpolate(skip, x.shape[-2:], mode="bilinear", align_corners=False)
            x = x + self.skip(skip)
        return self.projection(double(self.merge(x)))


def double(maps: Tensor) -> Tensor:
    return F.interpolate(maps, scale_factor=2, mode="bilinear", align_corners=True)


class Reassemble(nn.Module):
    """A map of patches (B, D, h, w), and its CLS (B, D), at `scale` times the grid.

    Args:
        readout: "ignore" CLS, or "project" both onto the patches.
    """

    def __init__(self, dim: int, channels: int, scale: float, readout: str = "ignore"):
        super().__init__()
        self.read = nn.Linear(2 * dim, dim) if readout == "project" else None
        self.projection = nn.Conv2d(dim, channels, 1)
        factor = round(scale if scale >= 1 else 1 / scale)
        if scale > 1:
            self.resize: nn.Module = nn.ConvTranspose2d(channels, channels, factor, factor)
        elif scale < 1:
            self.resize = nn.Conv2d(channels, channels, 3, factor, padding=1)
        else:
            self.resize = nn.Identity()

    def forward(self, maps: Tensor, cls: Tensor | None = None) -> Tensor:
        if self.read is not None:
            tokens = maps.flatten(2).mT
            both = torch.cat([tokens, cls[:, None].expand_as(tokens)], dim=-1)
            maps = F.gelu(self.read(both)).mT.unflatten(2, maps.shape[-2:])
        return self.resize(self.projection(maps))


class Neck(nn.Module):
    """Four maps (B, D, h, w), the shallowest block's first -> one map (B, width, 8·h, 8·w).

    Args:
        dims: D of each map.
        channels: of each map after its reassembly.
    """

    def __init__(self, dims: Sequence[int], channels: Sequence[int], width: int, readout: str):
        super().__init__()
        levels = zip(dims, channels, SCALES, strict=True)
        self.reassemble = nn.ModuleList(Reassemble(*level, readout) for level in levels)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(count, width, 3, padding=1, bias=False) for count in channels
        )
        self.fusions = nn.ModuleList(Fusion(width) for _ in channels)  # the deepest first

    def forward(self, maps: Sequence[Tensor], cls: Sequence[Tensor | None]) -> Tensor:
        levels = zip(self.reassemble, self.convolutions, maps, cls, strict=True)
        deepest_first = [convolve(part(*pair)) for part, convolve, *pair in levels][::-1]
        x = self.fusions[0](deepest_first[0])
        for fusion, skip in zip(self.fusions[1:], deepest_first[1:], strict=True):
            x = fusion(x, skip)
        return x


def depth_bins(kind: str, low: float, high: float, count: int = 256) -> Tensor:
    """(count,) depths from `low` to `high` in metres: evenly spaced, in logarithms, or "mixed".

    Mixed bins go from logarithmic ones at the near end to even ones at the far end (CHMv2, arXiv
    2603.06382).
    """
    if kind not in BINS:
        raise UserError(f"--bins is {kind!r}; allowed are {', '.join(BINS)}")
    even = torch.linspace(low, high, count)
    if kind == "linear":
        return even
    if low <= 0:
        raise UserError(f"--bins {kind} needs depths above 0; --span begins at {low:g}")
    logarithmic = torch.logspace(*torch.tensor([low, high]).log10().tolist(), count)
    share = torch.linspace(1, 0, count) if kind == "mixed" else 1.0
    return share * logarithmic + (1 - share) * even


def expected_depth(scores: Tensor, centres: Tensor) -> Tensor:
    """(B, bins, H, W) -> (B, 1, H, W): the mean of the bins, weighted by ReLU(score) + 0.1."""
    weights = scores.relu()
    both = torch.stack([centres, torch.ones_like(centres)])
    total, weight = F.conv2d(weights, both[..., None, None]).split(1, dim=1)
    return (total + 0.1 * centres.sum()) / (weight + 0.1 * len(centres))


def gradient_loss(guess: Tensor, depth: Tensor) -> Tensor:
    """|e(x) − e(x + 2)| of the error e of log depth, over every 1st, 2nd, 4th and 6th pixel.

    Args:
        guess, depth: (B, H, W) in metres; pixels without depth do not count.
    """
    known = is_depth(depth)
    error = torch.where(known, guess.clamp(min=1e-3).log() - depth.clamp(min=1e-3).log(), 0.0)
    total = 0.0 * guess.sum()
    for stride in STRIDES:
        part, there = error[:, ::stride, ::stride], known[:, ::stride, ::stride]
        for axis in (1, 2):
            length = part.shape[axis] - 2
            if length < 1:
                continue
            step = (part.narrow(axis, 2, length) - part.narrow(axis, 0, length)).abs()
            both = there.narrow(axis, 2, length) & there.narrow(axis, 0, length)
            total = total + (step * both).sum() / there.sum().clamp(min=1)
    return total


class DPTHead(nn.Module):
    """Depth in metres from the maps of four blocks.

    Scores are at 8 times the patch grid; the published head doubles once more, for four times the
    work.

    Args:
        dims: channels of each map.
        low, high: of the bins in metres.
        bins: "linear", "log" or "mixed".
        width: channels of the fused map; DINOv3 took 512 for 7 B.
        readout: of CLS, "ignore" or "project".
    """

    def __init__(
        self,
        dims: Sequence[int],
        patch_size: int,
        *,
        low: float,
        high: float,
        bins: str = "linear",
        width: int = 64,
        readout: str = "ignore",
    ):
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(dim) for dim in dims)
        self.neck = Neck(dims, [width // 2, width, 2 * width, 4 * width], width, readout)
        self.reduce = nn.Conv2d(width, width // 2, 3, padding=1)
        self.last = nn.Conv2d(width // 2, 32, 3, padding=1)
        self.score = nn.Conv2d(32, 256, 1)
        self.register_buffer("centres", depth_bins(bins, low, high), persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.score.weight, std=0.01)

    def predict(self, maps: Sequence[Tensor], cls: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """(B, 1, H, W) metres at `size`."""
        maps = [norm(part) for norm, part in zip(self.norms, maps, strict=True)]
        x = self.reduce(self.neck(maps, cls))
        depth = expected_depth(self.score(F.relu(self.last(x))).float(), self.centres)
        return F.interpolate(depth, tuple(size), mode="bilinear", align_corners=False)

    def loss(
        self,
        maps: Sequence[Tensor],
        cls: Sequence[Tensor],
        targets: Sequence[Tensor],
        size: Sequence[int],
    ) -> Tensor:
        """SILog and half the gradient loss; the targets are depth maps (H, W) of one size."""
        depth = torch.stack(list(targets)).float()
        guess = self.predict(maps, cls, depth.shape[-2:])[:, 0]
        silog = partial(sig_loss, done=1.0)
        return silog(guess.reshape(-1, 1), depth.flatten()) + GRADIENT * gradient_loss(guess, depth)
