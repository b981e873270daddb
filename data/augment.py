"""Multi-crop views (DINO, section 3.1): one policy, executed in two halves.

    geometry     crop_boxes, resized_crop     each image on its own, uint8 in, uint8 out
    photometry   photometric                  all crops of a batch at once, float32 out

Both halves are pure functions of a table of uniform random numbers, one row per crop, drawn once
per image by `draw`. Whoever executes them (a loader worker today, a device tomorrow) gets the same
views from the same table.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.guided import steered
from data.stains import stain_jitter

# Columns of the table.
TRIES = 10
AREA, ASPECT, TOP, LEFT, FLIP = slice(0, TRIES), slice(TRIES, 2 * TRIES), 20, 21, 22
JITTER, FACTORS, ORDER = 23, slice(24, 28), slice(28, 32)
GRAYSCALE, BLUR, SIGMA, SOLARIZE = 32, 33, 34, 35
FIRST_NUMBERS = 36  # drawn first; what was added later is drawn after them, so that old seeds keep their views
TURN, STAINS = 36, slice(37, 43)
NUMBERS = 43
TARGET = slice(43, 45)  # row and column in pixels; not drawn, and there in guided runs only (data/guided.py)

BLUR_RADIUS = 4  # pixels; kernel 9 as in DINOv2 and DINOv3
HELD = 16  # decoded images held at a time while their crops are cut
CHUNK = 1 << 18  # values jittered at a time: about 1 MB, so that the passes stay in the cache


@dataclass(frozen=True)
class CropSpec:
    """What torchvision's RandomResizedCrop takes, and how many crops of it an image gives."""

    size: tuple[int, int]  # (height, width) in pixels
    scale: tuple[float, float]  # share of the image's area
    count: int
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height


@dataclass(frozen=True)
class AugmentPolicy:
    """Probabilities and strengths; the defaults are those of DINO v1 and iBOT (main_dino.py).

    Saturation, hue and grayscale act on three channels only, the stains demand three, the rest acts on any number.
    """

    flip: float = 0.5
    jitter: float = 0.8  # probability of the four below, applied in a random order per crop
    brightness: float = 0.4  # factor from [1 - b, 1 + b]
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1  # shift from [-h, h], in turns
    grayscale: float = 0.2
    blur: tuple[float, float, float] = (1.0, 0.1, 0.5)  # first global, further globals, locals
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # pixels
    solarize: float = 0.2  # further globals only; inverts what is brighter than 0.5
    turn: float = 0.0  # probability of a turn by 90, 180 or 270 degrees; 0.75 where there is no up
    stain: float = 0.0  # strength of the jitter of histological stains: data/stains.py


# The DINOv2 and DINOv3 code inverts the blur probability (dinov3 issue 286); their released
# weights were trained that way.
POLICIES = {
    "natural": AugmentPolicy(),
    "natural_released_v2": AugmentPolicy(blur=(0.0, 0.9, 0.5)),
    "crops_only": AugmentPolicy(jitter=0.0, grayscale=0.0, blur=(0.0, 0.0, 0.0), solarize=0.0),
}
# For other domains; the strengths are ours. Intensity carries meaning: no solarisation, less blur.
_MEASURED = AugmentPolicy(
    saturation=0.0, hue=0.0, grayscale=0.0, blur=(0.5, 0.1, 0.2), blur_sigma=(0.1, 1.0), solarize=0.0
)
POLICIES |= {
    "grey-medical": replace(_MEASURED, brightness=0.2, contrast=0.2),  # X-ray, CT, MR; flip=0 where sides matter
    "histology": replace(_MEASURED, brightness=0.2, contrast=0.2, turn=0.75, stain=0.2),
    "aerial": replace(_MEASURED, saturation=0.2, hue=0.05, grayscale=0.1, turn=0.75),
    "microscopy": replace(_MEASURED, turn=0.75),
}


def draw(generator: torch.Generator, crops: int) -> Tensor:
    """(crops, NUMBERS) float32 uniform in [0, 1): all the randomness of one image's views."""
    shapes = ((crops, FIRST_NUMBERS), (crops, NUMBERS - FIRST_NUMBERS))
    return torch.cat([torch.rand(shape, generator=generator) for shape in shapes], 1)


def to_unit(image: Tensor) -> Tensor:
    """float32 in [0, 1] from uint8 or uint16; a float image is taken to be in that range."""
    if image.is_floating_point():
        return image.float()
    return image.float().div_(torch.iinfo(image.dtype).max)


def resize(image: Tensor, size: tuple[int, int], mode: str = "bicubic") -> Tensor:
    """Antialiased resize of (C, H, W) to `size` (h, w).

    Returns uint8 from uint8, else float32 in [0, 1] (see `to_unit`): bicubic overshoot is clamped.
    """
    if image.shape[-2:] == size:
        return image if image.dtype == torch.uint8 else to_unit(image)
    options = {"antialias": True} if mode in ("bilinear", "bicubic") else {}
    if image.dtype == torch.uint8:
        return F.interpolate(image[None], size, mode=mode, **options)[0]
    return F.interpolate(to_unit(image)[None], size, mode=mode, **options)[0].clamp_(0, 1)


def crop_boxes(u: Tensor, height, width, spec: CropSpec) -> np.ndarray:
    """Boxes distributed as torchvision's RandomResizedCrop.

    Ten tries of a uniform area and a log-uniform aspect; where none fits into the image, its
    centre with the nearest allowed aspect.

    Args:
        u: (n, NUMBERS) table.
        height, width: of the image in pixels, or one each per row, (n,).

    Returns:
        (n, 4) int64: top, left, height, width in pixels.
    """
    u = u.double().numpy()
    height, width = np.asarray(height), np.asarray(width)
    (low, high), (narrow, wide) = spec.scale, np.log(spec.ratio)
    area = (height * width)[..., None] * (low + (high - low) * u[:, AREA])
    aspect = np.exp(narrow + (wide - narrow) * u[:, ASPECT])
    w, h = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (w > 0) & (h > 0) & (w <= width[..., None]) & (h <= height[..., None])

    rows = np.arange(len(u))
    first = fits.argmax(1)
    found = fits[rows, first]
    # The clipped aspect leaves a square-ish image whole and trims a long one to the limit.
    whole_w = np.minimum(width, np.rint(height * spec.ratio[1]))
    whole_h = np.minimum(height, np.rint(width / spec.ratio[0]))
    w, h = np.where(found, w[rows, first], whole_w), np.where(found, h[rows, first], whole_h)
    top = np.where(found, u[:, TOP] * (height - h + 1), (height - h) // 2)
    left = np.where(found, u[:, LEFT] * (width - w + 1), (width - w) // 2)
    return np.stack([top, left, h, w], 1).astype(np.int64)


def resized_crop(image: Tensor, box: Sequence[int], size: tuple[int, int], flip: bool, turns: int = 0) -> Tensor:
    """The box (top, left, height, width) of a (C, H, W) image, resized to (C, h, w) as by `resize`,
    mirrored left to right where `flip`, then turned anticlockwise by so many times 90 degrees."""
    top, left, height, width = box
    crop = resize(image[:, top : top + height, left : left + width], size[::-1] if turns % 2 else size)
    crop = crop.flip(-1) if flip else crop
    return crop.rot90(turns, (1, 2)) if turns else crop


@torch.no_grad()
def photometric(
    crops: Tensor,
    u: Tensor,
    policy: AugmentPolicy,
    blur_p: Tensor,
    solarize_p: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    """Stains, colour jitter, grayscale, blur, solarisation, normalisation, in the order of main_dino.py.

    Each operation equals torchvision's on a float image; there is no rounding to 8 bits between
    them. Rows that an operation does not select cost nothing.

    Args:
        crops: (n, C, h, w) uint8, or float in [0, 1] (left unchanged).
        u: (n, NUMBERS) table.
        blur_p, solarize_p: (n,) probabilities.
        mean, std: of one or C values, for inputs in [0, 1].

    Returns:
        (n, C, h, w) float32, normalised.

    Raises:
        ValueError: if mean or std fit neither one channel nor C, or stains are to be changed and C is not 3.
    """
    channels = crops.shape[1]
    for name, values in (("mean", mean), ("std", std)):
        if len(values) not in (1, channels):
            raise ValueError(f"{name} has {len(values)} values for images of {channels} channels")
    x = crops.float().div_(255) if crops.dtype == torch.uint8 else crops.float().clone()
    for rows in _chunks(torch.arange(len(x)) if policy.stain > 0 else torch.empty(0), x):
        x[rows] = stain_jitter(x[rows], u[rows, STAINS], policy.stain)
    color_jitter(x, u, policy)
    if channels == 3:
        for rows in _chunks((u[:, GRAYSCALE] < policy.grayscale).nonzero()[:, 0], x):
            x[rows] = luminance(x[rows])
    low, high = policy.blur_sigma
    for rows in _chunks((u[:, BLUR] < blur_p).nonzero()[:, 0], x):
        x[rows] = gaussian_blur(x[rows], low + (high - low) * u[rows, SIGMA])
    for rows in _chunks((u[:, SOLARIZE] < solarize_p).nonzero()[:, 0], x):
        bright = x[rows]
        x[rows] = torch.where(bright >= 0.5, 1 - bright, bright)
    return normalize(x, mean, std)


def _chunks(rows: Tensor, x: Tensor) -> Sequence[Tensor]:
    """Rows of x, a cache's worth at a time; nothing where there are none."""
    return rows.split(max(1, CHUNK // x[0].numel())) if len(rows) else ()


def normalize(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(x - mean) / std per channel of (..., C, H, W), in place."""
    return x.sub_(x.new_tensor(mean).view(-1, 1, 1)).div_(x.new_tensor(std).view(-1, 1, 1))


def luminance(x: Tensor) -> Tensor:
    """(n, 1, h, w) from (n, 3, h, w), ITU-R 601 weights as torchvision."""
    r, g, b = x.split(1, 1)
    return (r * 0.2989).add_(g, alpha=0.587).add_(b, alpha=0.114)


def color_jitter(x: Tensor, u: Tensor, policy: AugmentPolicy) -> None:
    """torchvision's ColorJitter with probability `policy.jitter`, in place; each row of
    (n, C, h, w) has its own factors and its own order."""
    limits = (policy.brightness, policy.contrast, policy.saturation, policy.hue)
    active = [k for k, limit in enumerate(limits) if limit > 0 and (k < 2 or x.shape[1] == 3)]
    rows = (u[:, JITTER] < policy.jitter).nonzero()[:, 0]
    if not active or not len(rows):
        return
    low = torch.tensor([max(0.0, 1 - limit) for limit in limits[:3]] + [-policy.hue])
    high = torch.tensor([1 + limit for limit in limits[:3]] + [policy.hue])
    factors = torch.lerp(low.to(u), high.to(u), u[rows, FACTORS])
    # Ranks of independent uniform numbers are a uniform permutation, of any subset as well.
    order = u[rows, ORDER][:, active].argsort(1)
    for turn in order.unbind(1):
        for number, k in enumerate(active):
            for part in _chunks((turn == number).nonzero()[:, 0], x):
                factor = factors[part, k].view(-1, 1, 1, 1)
                x[rows[part]] = OPERATIONS[k](x[rows[part]], factor)


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


class MultiCrop:
    """G global and L local views of every image, crop-major (view 0 of all images, then view 1).

    Rows of a table: the global crops, then the local ones. `local_spec` may be None. `gram_size`
    (height, width) asks for the global crops once more in that size, for a Gram teacher, and
    `gram_distorted` for the same colours and blur on them.
    """

    def __init__(
        self,
        global_spec: CropSpec,
        local_spec: CropSpec | None,
        policy: AugmentPolicy,
        mean: Sequence[float],
        std: Sequence[float],
        gram_size: tuple[int, int] | None = None,
        gram_distorted: bool = False,
    ):
        if policy.stain > 0 and len(mean) not in (1, 3):
            raise ValueError(f"stains (the policy histology) are those of three colours, not of {len(mean)} channels")
        self.specs = [s for s in (global_spec, local_spec) if s is not None and s.count > 0]
        self.gram_spec = None if gram_size is None else replace(global_spec, size=tuple(gram_size))
        self.gram_distorted = gram_distorted
        self.policy, self.mean, self.std = policy, tuple(mean), tuple(std)
        self.globals = global_spec.count
        self.locals = local_spec.count if local_spec is not None else 0
        self.crops = self.globals + self.locals

    def views(
        self, images: Iterable[Tensor], tables: Sequence[Tensor], targets: Iterable[Tensor] | None = None
    ) -> list[Tensor]:
        """Geometry only: crops (G·B, C, H, W) and, where L > 0, (L·B, C, h, w), uint8 from uint8;
        last those for a Gram teacher, if there is one.

        Images (C, H, W) may differ in size; of an iterator, a few at a time are held in memory. `targets` (crops, 2) of
        each image, asked for after it, are places in pixels that its crops must show, NaN for none.
        """
        images, targets = iter(images), None if targets is None else iter(targets)
        specs = [*self.specs, *([] if self.gram_spec is None else [self.gram_spec])]
        crops = [[] for _ in specs]  # of all images, one image after the other
        for table in torch.stack(list(tables)).split(HELD):
            held = list(islice(images, len(table)))
            if targets is not None:
                table = torch.cat([table, torch.stack(list(islice(targets, len(held))))], 2)
            parts = list(table.split([spec.count for spec in self.specs], 1))
            for cut, u, spec in zip(crops, [*parts, parts[0]], specs):
                cut += self._cut(held, u.flatten(0, 1), spec)
        return [
            _stack([crop for view in range(spec.count) for crop in cut[view :: spec.count]])
            for spec, cut in zip(specs, crops)
        ]

    def _cut(self, images: list[Tensor], u: Tensor, spec: CropSpec) -> list[Tensor]:
        sizes = np.array([image.shape[-2:] for image in images]).repeat(spec.count, 0)
        boxes = crop_boxes(u, sizes[:, 0], sizes[:, 1], spec)
        if u.shape[1] > NUMBERS:
            boxes = steered(boxes, u[:, TARGET].double().numpy(), u[:, TOP : LEFT + 1].double().numpy(), sizes)
        flips = (u[:, FLIP] < self.policy.flip).tolist()
        turns = [0] * len(u)
        if self.policy.turn > 0:  # one number says whether and how far: below the probability it is uniform again
            turns = torch.where(u[:, TURN] < self.policy.turn, 1 + 3 * u[:, TURN] / self.policy.turn, 0).int().tolist()
        return [
            resized_crop(images[k // spec.count], box, spec.size, flip, turn)
            for k, (box, flip, turn) in enumerate(zip(boxes.tolist(), flips, turns))
        ]

    def __call__(
        self, images: Iterable[Tensor], tables: Sequence[Tensor], targets: Iterable[Tensor] | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Normalised float32: global crops (G·B, C, H, W), local crops (L·B, C, h, w), and those of the
        Gram teacher, in the order of the global ones; None where there are none."""
        views = self.views(images, tables, targets)
        u = torch.stack(list(tables), 1)  # (crops, B, NUMBERS)
        global_u, local_u = u[: self.globals], u[self.globals :]
        gram_crops = None
        if self.gram_spec is not None:
            gram_crops = views.pop()
            if self.gram_distorted:
                gram_crops = self._photometric(gram_crops, global_u, first=True)
            else:
                gram_crops = normalize(to_unit(gram_crops), self.mean, self.std)
        local_crops = self._photometric(views[1], local_u, first=False) if self.locals else None
        return self._photometric(views[0], global_u, first=True), local_crops, gram_crops

    def examples(self, images: Sequence[Tensor], seed: int) -> list[list[Tensor]]:
        """The normalised views of each image, globals first: for pictures of what training sees."""
        generator = torch.Generator().manual_seed(seed)
        pairs = [self([image], [draw(generator, self.crops)]) for image in images]
        return [[*crops, *(() if local_crops is None else local_crops)] for crops, local_crops, _ in pairs]

    def _photometric(self, crops: Tensor, u: Tensor, first: bool) -> Tensor:
        blur, solarize = torch.full(u.shape[:2], self.policy.blur[2]), torch.zeros(u.shape[:2])
        if first:
            blur[0], blur[1:] = self.policy.blur[0], self.policy.blur[1]
            solarize[1:] = self.policy.solarize
        return photometric(crops, u.flatten(0, 1), self.policy, blur.flatten(), solarize.flatten(), self.mean, self.std)


def _stack(crops: list[Tensor]) -> Tensor:
    """A folder may mix 8-bit with deeper images; what is stacked has one type."""
    if len({crop.dtype for crop in crops}) > 1:
        crops = [to_unit(crop) for crop in crops]
    return torch.stack(crops)


# From a configuration.

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def multi_crop_from(crops, mean: Sequence[float], std: Sequence[float], sizes=None, gram=None) -> MultiCrop:
    """A MultiCrop from an object with the attributes of the configuration's section `crops`.

    `sizes` has other global and local sizes; `gram` has a Gram teacher's `teacher_scale` and
    `distortions`, and asks for crops of its own where they differ from the student's. A policy's probabilities and strengths hold where the attribute of that name is None.

    Raises:
        ValueError: for an unknown policy.
    """
    if crops.policy not in POLICIES:
        raise ValueError(f"unknown crops.policy {crops.policy!r}; choose from {', '.join(POLICIES)}")
    given = {item.name: getattr(crops, item.name, None) for item in fields(AugmentPolicy)}
    given = {
        name: tuple(value) if isinstance(value, list) else value for name, value in given.items() if value is not None
    }
    sizes = crops if sizes is None else sizes
    specs = [
        CropSpec(_pair(sizes.global_size), tuple(crops.global_scale), crops.global_count),
        CropSpec(_pair(sizes.local_size), tuple(crops.local_scale), crops.local_count),
    ]
    gram_size = None
    if gram is not None and (gram.teacher_scale != 1 or not gram.distortions):
        gram_size = tuple(round(side * gram.teacher_scale) for side in specs[0].size)
    distorted = gram is not None and gram.distortions
    return MultiCrop(*specs, replace(POLICIES[crops.policy], **given), mean, std, gram_size, distorted)


def channel_statistics(
    channels: int, mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """mean and std, one value a channel, for values in [0, 1]; in place of None ImageNet's for
    three channels, and their average for any other number."""
    pairs = ((mean, IMAGENET_MEAN), (std, IMAGENET_STD))
    return tuple(
        tuple(given) if given is not None else imagenet if channels == 3 else (sum(imagenet) / 3,) * channels
        for given, imagenet in pairs
    )


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)
