"""Operations on pixels: range, size, colours and blur.

The colour operations and the blur work in place on float batches (n, C, h, w) in [0, 1]; each row
has a strength of its own.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2.functional import rgb_to_grayscale

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BLUR_RADIUS = 4  # pixels; kernel 9 as in DINOv2 and DINOv3


def send(host: Tensor, device: torch.device) -> Tensor:
    """A small CPU tensor on a device.

    To a GPU it goes from pinned memory: a plain copy would wait for the GPU's queued work.
    """
    if device.type != "cuda":
        return host.to(device)
    return host.contiguous().pin_memory().to(device, non_blocking=True)


def resize(image: Tensor, size: tuple[int, int], mode: str = "bicubic") -> Tensor:
    """Antialiased resize of (C, H, W) to `size` (h, w).

    Returns uint8 from uint8, else float32 in [0, 1] (see `to_unit`): bicubic overshoot is clamped.
    """
    coarse = image.dtype == torch.uint8
    image = image if coarse else to_unit(image)
    if image.shape[-2:] == size:
        return image
    options = {"antialias": True} if mode in ("bilinear", "bicubic") else {}
    resized = F.interpolate(image[None], size, mode=mode, **options)[0]
    return resized if coarse else resized.clamp_(0, 1)


Sizes = tuple[int, int]


def strided_starts(length: int, side: int, stride: int) -> list[int]:
    """Where windows of `side` begin that cover `length`, `stride` apart, the last at the end."""
    last = max(0, length - side)
    return [*range(0, last, stride), last]


def cut_strip(
    image: Tensor, target: Sizes, corner: Sizes, size: Sizes
) -> tuple[Tensor, Sizes, Sizes]:
    """The part of a long image around its centre crop: a strip that is resized whole would fill the
    memory.

    The part has the image's centre, and ends where whole pixels before and after resizing meet, so
    its pixels become what they become within the whole.

    Args:
        target: (h, w) in pixels that the whole image would be resized to.
        corner: top and left of the centre crop in it.
        size: (h, w) of the crop.

    Returns:
        The part, the size in pixels to resize it to, and the crop's corner in that.
    """
    axis = int(image.shape[-1] > image.shape[-2])
    length, side, goal = image.shape[-2 + axis], image.shape[-1 - axis], target[axis]
    ratio = goal / length
    reach = 3 * max(1, 1 / ratio)  # of a filter, which ends two pixels of the coarser grid away
    most = int((length - size[axis] / ratio) / 2 - reach)
    if most <= 0:
        return image, target, corner
    cuts = range(max(0, most - 2 * side), most + 1)
    cut = min(cuts, key=lambda cut: abs(cut * ratio - round(cut * ratio)))
    less = round(cut * ratio)
    target, corner = list(target), list(corner)
    target[axis] -= 2 * less
    corner[axis] -= less
    return image.narrow(-2 + axis, cut, length - 2 * cut), tuple(target), tuple(corner)


def to_unit(image: Tensor) -> Tensor:
    """float32 in [0, 1] from uint8 or uint16; a float image is taken to be in that range."""
    if image.is_floating_point():
        return image.float()
    return image.float().div_(full_scale(image))


def full_scale(image: Tensor) -> int:
    """The value of an image that becomes 1."""
    return 1 if image.is_floating_point() else torch.iinfo(image.dtype).max


def normalize(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(x - mean) / std per channel of (..., C, H, W), in place."""
    mean = send(torch.tensor(mean, dtype=x.dtype).view(-1, 1, 1), x.device)
    std = send(torch.tensor(std, dtype=x.dtype).view(-1, 1, 1), x.device)
    return x.sub_(mean).div_(std)


def _brightness(x: Tensor, factor: Tensor) -> Tensor:
    return x.mul_(factor).clamp_(0, 1)


def _contrast(x: Tensor, factor: Tensor) -> Tensor:
    # Without colours, each channel keeps its own mean: bands of a satellite differ in range. Two
    # means in a row, because one reduction to a single number depends on the count of threads.
    gray = rgb_to_grayscale(x) if x.shape[1] == 3 else x
    mean = gray.mean(-1, keepdim=True).mean(-2, keepdim=True)
    return x.mul_(factor).add_(mean.mul_(1 - factor)).clamp_(0, 1)


def _saturation(x: Tensor, factor: Tensor) -> Tensor:
    gray = rgb_to_grayscale(x)
    return x.mul_(factor).add_(gray.mul_(1 - factor)).clamp_(0, 1)


def _hue(x: Tensor, turns: Tensor) -> Tensor:
    """Shift the hue in HSV, in sixths of a turn; value and chroma stay."""
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


def channel_statistics(
    channels: int, mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """mean and std, one value a channel, for values in [0, 1]; in place of None ImageNet's for
    three channels, and their average for any other number."""
    statistics = []
    for given, imagenet in ((mean, IMAGENET_MEAN), (std, IMAGENET_STD)):
        if given is None:
            given = imagenet if channels == 3 else (sum(imagenet) / 3,) * channels
        statistics.append(tuple(given))
    return tuple(statistics)
