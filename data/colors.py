"""What photometry does to pixels: operations on (n, C, h, w) float batches in [0, 1], each row with a strength of its own."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

BLUR_RADIUS = 4  # pixels; kernel 9 as in DINOv2 and DINOv3


def sent(host: Tensor, device: torch.device) -> Tensor:
    """A small tensor of the host on a device. To a GPU from pinned memory: copied otherwise, it would be waited for, and
    with it everything that the GPU has still to do."""
    return (
        host.contiguous().pin_memory().to(device, non_blocking=True)
        if device.type == "cuda"
        else host.to(device)
    )


def normalize(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(x - mean) / std per channel of (..., C, H, W), in place."""
    mean, std = (
        sent(torch.tensor(values, dtype=x.dtype).view(-1, 1, 1), x.device) for values in (mean, std)
    )
    return x.sub_(mean).div_(std)


def luminance(x: Tensor) -> Tensor:
    """(n, 1, h, w) from (n, 3, h, w), ITU-R 601 weights as torchvision."""
    r, g, b = x.split(1, 1)
    return (r * 0.2989).add_(g, alpha=0.587).add_(b, alpha=0.114)


def _brightness(x: Tensor, factor: Tensor) -> Tensor:
    return x.mul_(factor).clamp_(0, 1)


def _contrast(x: Tensor, factor: Tensor) -> Tensor:
    # Without colours, each channel keeps its own mean: bands of a satellite differ in range. Two
    # means in a row, because one reduction to a single number depends on the count of threads.
    gray = luminance(x) if x.shape[1] == 3 else x
    mean = gray.mean(-1, keepdim=True).mean(-2, keepdim=True)
    return x.mul_(factor).add_(mean.mul_(1 - factor)).clamp_(0, 1)


def _saturation(x: Tensor, factor: Tensor) -> Tensor:
    gray = luminance(x)
    return x.mul_(factor).add_(gray.mul_(1 - factor)).clamp_(0, 1)


def _hue(x: Tensor, turns: Tensor) -> Tensor:
    """Shift the hue in HSV. Value and chroma stay, so only the hue, in sixths of a turn, is made."""
    r, g, b = x.unbind(1)
    low, high = x.amin(1), x.amax(1)
    chroma = high - low
    # 1 where that channel is the largest, else 0: twice as fast as comparisons and torch.where.
    is_r = (r - high).mul_(1e30).add_(1).clamp_(0, 1)
    is_g = (g - high).mul_(1e30).add_(1).clamp_(0, 1)
    hue = torch.lerp((r - g).add_(chroma, alpha=4), (b - r).add_(chroma, alpha=2), is_g)
    hue.lerp_(g - b, is_r).div_(chroma.clamp(min=1e-12)).add_(turns[:, :, 0] * 6)
    hue.sub_((hue / 6).floor_(), alpha=6)
    for channel, (peak, sign, offset) in enumerate(((3, 1, -1), (2, -1, 2), (4, -1, 2))):
        weight = (hue - peak).abs_().mul_(sign).add_(offset).clamp_(0, 1)
        x[:, channel] = weight.mul_(chroma).add_(low)
    return x


OPERATIONS = (_brightness, _contrast, _saturation, _hue)  # the columns of FACTORS and ORDER


def gaussian_blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Kernel 9, reflected borders, one sigma (n,) in pixels per row of (n, C, h, w).

    Images of fewer than five pixels a side take the largest kernel that can be reflected.
    """
    height, width = x.shape[-2:]
    radius = min(BLUR_RADIUS, height - 1, width - 1)
    distance = torch.arange(-radius, radius + 1, device=x.device)
    kernel = torch.softmax(-distance.square() / (2 * sigma[:, None].square()), 1)
    # Shifted sums: a grouped convolution compiles anew for every number of rows.
    sides = (radius, radius)
    for dim, size, pad in ((-1, width, (*sides, 0, 0)), (-2, height, (0, 0, *sides))):
        padded, x = F.pad(x, pad, mode="reflect"), torch.zeros_like(x)
        for k, weight in enumerate(kernel.unbind(1)):
            x.addcmul_(padded.narrow(dim, k, size), weight.view(-1, 1, 1, 1))
    return x
