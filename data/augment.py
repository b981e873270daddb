"""Multi-crop views (DINO, section 3.1): one policy, executed in two halves.

    geometry     crop_boxes, resized_crop     each image on its own, uint8 in, uint8 out
    photometry   photometric                  all crops of a batch at once, float32 out

Both halves are pure functions of a table of uniform random numbers, one row per crop, drawn once
per image by `draw`. Whoever executes them, a loader worker or a device (data/device.py), gets the same
views from the same table.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.colors import OPERATIONS, gaussian_blur, luminance, normalize, sent
from data.guided import steered
from data.stains import stain_jitter
from errors import UserError

# Columns of the table.
TRIES = 10
AREA, ASPECT, TOP, LEFT, FLIP = slice(0, TRIES), slice(TRIES, 2 * TRIES), 20, 21, 22
JITTER, FACTORS, ORDER = 23, slice(24, 28), slice(28, 32)
GRAYSCALE, BLUR, SIGMA, SOLARIZE = 32, 33, 34, 35
FIRST_NUMBERS = (
    36  # drawn first; what was added later is drawn after them, so that old seeds keep their views
)
TURN, STAINS = 36, slice(37, 43)
NUMBERS = 43
TARGET = slice(
    43, 45
)  # row and column in pixels; not drawn, and there in guided runs only (data/guided.py)

HELD = 16  # decoded images held at a time while their crops are cut
CHUNK = 1 << 18  # values jittered at a time: about 1 MB, so that the passes stay in the cache
DEVICE_CHUNK = (
    1 << 25
)  # elsewhere than on a CPU: 128 MB, to bound what the operations hold at a time


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
    saturation=0.0,
    hue=0.0,
    grayscale=0.0,
    blur=(0.5, 0.1, 0.2),
    blur_sigma=(0.1, 1.0),
    solarize=0.0,
)
POLICIES |= {
    "grey-medical": replace(
        _MEASURED, brightness=0.2, contrast=0.2
    ),  # X-ray, CT, MR; flip=0 where sides matter
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


def resized_crop(
    image: Tensor, box: Sequence[int], size: tuple[int, int], flip: bool, turns: int = 0
) -> Tensor:
    """The box (top, left, height, width) of a (C, H, W) image, resized to (C, h, w) as by `resize`,
    mirrored left to right where `flip`, then turned anticlockwise by so many times 90 degrees."""
    top, left, height, width = box
    crop = resize(
        image[:, top : top + height, left : left + width], size[::-1] if turns % 2 else size
    )
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
    them. Rows that an operation does not select cost nothing. The crops may be on a device; which rows
    are selected is known from the table without asking it.

    Args:
        crops: (n, C, h, w) uint8, or float in [0, 1] (left unchanged).
        u: (n, NUMBERS) table, on the CPU as the probabilities are.
        blur_p, solarize_p: (n,) probabilities.
        mean, std: of one or C values, for inputs in [0, 1].

    Returns:
        (n, C, h, w) float32, normalised.

    Raises:
        UserError: if mean or std fit neither one channel nor C, or stains are to be changed and C is not 3.
    """
    channels = crops.shape[1]
    for name, values in (("mean", mean), ("std", std)):
        if len(values) not in (1, channels):
            raise UserError(f"{name} has {len(values)} values for images of {channels} channels")
    x = crops.float().div_(255) if crops.dtype == torch.uint8 else crops.float().clone()
    if policy.stain > 0:
        stains = sent(u[:, STAINS], x.device)
        for rows in _chunks(torch.arange(len(x)), x):
            x[rows] = stain_jitter(x[rows], stains[rows], policy.stain)
    color_jitter(x, u, policy)
    if channels == 3:
        for rows in _chunks((u[:, GRAYSCALE] < policy.grayscale).nonzero()[:, 0], x):
            x[rows] = luminance(x[rows])
    low, high = policy.blur_sigma
    sigma = sent(low + (high - low) * u[:, SIGMA], x.device)
    for rows in _chunks((u[:, BLUR] < blur_p).nonzero()[:, 0], x):
        x[rows] = gaussian_blur(x[rows], sigma[rows])
    for rows in _chunks((u[:, SOLARIZE] < solarize_p).nonzero()[:, 0], x):
        bright = x[rows]
        x[rows] = torch.where(bright >= 0.5, 1 - bright, bright)
    return normalize(x, mean, std)


def _chunks(rows: Tensor, x: Tensor) -> Iterator[Tensor]:
    """Rows of x, a cache's worth at a time and where x is; nothing where there are none."""
    values = CHUNK if x.device.type == "cpu" else DEVICE_CHUNK
    for part in rows.split(max(1, values // x[0].numel())) if len(rows) else ():
        yield sent(part, x.device)


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
    factors = sent(torch.lerp(low.to(u), high.to(u), u[:, FACTORS]), x.device)
    # Ranks of independent uniform numbers are a uniform permutation, of any subset as well.
    order = u[rows, ORDER][:, active].argsort(1)
    for turn in order.unbind(1):
        for number, k in enumerate(active):
            for part in _chunks(rows[turn == number], x):
                x[part] = OPERATIONS[k](x[part], factors[part, k].view(-1, 1, 1, 1))


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
            raise UserError(
                f"stains (the policy histology) are those of three colours, not of {len(mean)} channels"
            )
        self.specs = [s for s in (global_spec, local_spec) if s is not None and s.count > 0]
        self.gram_spec = None if gram_size is None else replace(global_spec, size=tuple(gram_size))
        self.gram_distorted = gram_distorted
        ends = np.cumsum([0, *(spec.count for spec in self.specs)]).tolist()
        self.cuts = [
            *zip(self.specs, map(slice, ends, ends[1:]))
        ]  # kinds of crops, and their rows of a table
        if self.gram_spec is not None:
            self.cuts.append((self.gram_spec, self.cuts[0][1]))
        self.policy, self.mean, self.std = policy, tuple(mean), tuple(std)
        self.globals = global_spec.count
        self.locals = local_spec.count if local_spec is not None else 0
        self.crops = self.globals + self.locals

    def views(
        self,
        images: Iterable[Tensor],
        tables: Sequence[Tensor],
        targets: Iterable[Tensor] | None = None,
    ) -> list[Tensor]:
        """Geometry only: crops (G·B, C, H, W) and, where L > 0, (L·B, C, h, w), uint8 from uint8;
        last those for a Gram teacher, if there is one.

        Images (C, H, W) may differ in size; of an iterator, a few at a time are held in memory. `targets` (crops, 2) of
        each image, asked for after it, are places in pixels that its crops must show, NaN for none.
        """
        images, targets = iter(images), None if targets is None else iter(targets)
        crops = [[] for _ in self.cuts]  # of all images, one image after the other
        for table in torch.stack(list(tables)).split(HELD):
            held = list(islice(images, len(table)))
            if targets is not None:
                table = torch.cat([table, torch.stack(list(islice(targets, len(held))))], 2)
            for cut, (spec, rows) in zip(crops, self.cuts):
                cut += self._cut(held, table[:, rows].flatten(0, 1), spec)
        return [
            _stack([crop for view in range(spec.count) for crop in cut[view :: spec.count]])
            for (spec, _), cut in zip(self.cuts, crops)
        ]

    def _cut(self, images: list[Tensor], u: Tensor, spec: CropSpec) -> list[Tensor]:
        sizes = np.array([image.shape[-2:] for image in images]).repeat(spec.count, 0)
        places = zip(*(values.tolist() for values in self.geometry(u, sizes, spec)))
        return [
            resized_crop(images[k // spec.count], box, spec.size, *how)
            for k, (box, *how) in enumerate(places)
        ]

    def geometry(
        self, u: Tensor, sizes: np.ndarray, spec: CropSpec
    ) -> tuple[np.ndarray, Tensor, Tensor]:
        """What `resized_crop` takes: boxes (n, 4), whether to mirror (n,) and quarter turns (n,) of n crops, from their
        rows of the table and the sizes (n, 2) of their images."""
        boxes = crop_boxes(u, sizes[:, 0], sizes[:, 1], spec)
        if u.shape[1] > NUMBERS:
            boxes = steered(
                boxes, u[:, TARGET].double().numpy(), u[:, TOP : LEFT + 1].double().numpy(), sizes
            )
        turns = torch.zeros(len(u), dtype=torch.int)
        if (
            self.policy.turn > 0
        ):  # one number says whether and how far: below the probability it is uniform again
            turns = torch.where(
                u[:, TURN] < self.policy.turn, 1 + 3 * u[:, TURN] / self.policy.turn, 0
            ).int()
        return boxes, u[:, FLIP] < self.policy.flip, turns

    def __call__(
        self,
        images: Iterable[Tensor],
        tables: Sequence[Tensor],
        targets: Iterable[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Normalised float32: global crops (G·B, C, H, W), local crops (L·B, C, h, w), and those of the
        Gram teacher, in the order of the global ones; None where there are none."""
        return self.finish(self.views(images, tables, targets), torch.stack(list(tables), 1))

    def finish(self, views: list[Tensor], u: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The photometric half: of `views`, on any device, with the tables (crops, B, NUMBERS)."""
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

    def examples(
        self, images: Sequence[Tensor], seed: int, targets: Sequence[Tensor] | None = None
    ) -> list[list[Tensor]]:
        """The normalised views of each image, globals first: for pictures of what training sees. `targets` as in `views`."""
        generator = torch.Generator().manual_seed(seed)
        places = [None] * len(images) if targets is None else [[target] for target in targets]
        pairs = [
            self([image], [draw(generator, self.crops)], place)
            for image, place in zip(images, places)
        ]
        return [
            [*crops, *(() if local_crops is None else local_crops)]
            for crops, local_crops, _ in pairs
        ]

    def _photometric(self, crops: Tensor, u: Tensor, first: bool) -> Tensor:
        blur, solarize = torch.full(u.shape[:2], self.policy.blur[2]), torch.zeros(u.shape[:2])
        if first:
            blur[0], blur[1:] = self.policy.blur[0], self.policy.blur[1]
            solarize[1:] = self.policy.solarize
        return photometric(
            crops,
            u.flatten(0, 1),
            self.policy,
            blur.flatten(),
            solarize.flatten(),
            self.mean,
            self.std,
        )


def _stack(crops: list[Tensor]) -> Tensor:
    """A folder may mix 8-bit with deeper images; what is stacked has one type."""
    if len({crop.dtype for crop in crops}) > 1:
        crops = [to_unit(crop) for crop in crops]
    return torch.stack(crops)


# From a configuration.

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def multi_crop_from(
    crops, mean: Sequence[float], std: Sequence[float], sizes=None, gram=None
) -> MultiCrop:
    """A MultiCrop from an object with the attributes of the configuration's section `crops`.

    `sizes` has other global and local sizes; `gram` has a Gram teacher's `teacher_scale` and
    `distortions`, and asks for crops of its own where they differ from the student's. A policy's probabilities and strengths hold where the attribute of that name is None.

    Raises:
        ValueError: for an unknown policy.
    """
    if crops.policy not in POLICIES:
        raise UserError(f"unknown crops.policy {crops.policy!r}; choose from {', '.join(POLICIES)}")
    given = {item.name: getattr(crops, item.name, None) for item in fields(AugmentPolicy)}
    given = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in given.items()
        if value is not None
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
    return MultiCrop(
        *specs, replace(POLICIES[crops.policy], **given), mean, std, gram_size, distorted
    )


def channel_statistics(
    channels: int, mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """mean and std, one value a channel, for values in [0, 1]; in place of None ImageNet's for
    three channels, and their average for any other number."""
    pairs = ((mean, IMAGENET_MEAN), (std, IMAGENET_STD))
    return tuple(
        tuple(given)
        if given is not None
        else imagenet
        if channels == 3
        else (sum(imagenet) / 3,) * channels
        for given, imagenet in pairs
    )


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)
