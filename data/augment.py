"""Multi-crop views (DINO, section 3.1): one policy, executed in two halves.

    geometry     crop_boxes, resized_crop     each image on its own, uint8 in, uint8 out
    photometry   photometric                  all crops of a batch at once, float32 out

Both are pure functions of a table of uniform random numbers, one row per crop, drawn once per image
by `draw`. A loader worker runs them (`MultiCrop.__call__`), or the device does (data/device.py):
the same table gives the same views.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2.functional import rgb_to_grayscale, solarize

from data.guided import move_to_points
from data.pixels import OPERATIONS, gaussian_blur, normalize, resize, send, to_unit
from data.stains import require_three_channels, stain_jitter
from errors import UserError

# Columns of the table.
TRIES = 10
AREA, ASPECT, TOP, LEFT, FLIP = slice(0, TRIES), slice(TRIES, 2 * TRIES), 20, 21, 22
JITTER, FACTORS, ORDER = 23, slice(24, 28), slice(28, 32)
GRAYSCALE, BLUR, SIGMA, SOLARIZE = 32, 33, 34, 35
ROTATION, STAINS = 36, slice(37, 43)
# Blocks of columns, drawn one after another. New columns are a new block at the end: then the views
# of old seeds stay as they are.
DRAWN = (36, 7)
NUMBERS = sum(DRAWN)
# Row and column in pixels; only in guided runs, and not drawn (guided.py).
TARGET = slice(NUMBERS, NUMBERS + 2)

IMAGES_HELD = 16  # decoded images held in memory while their crops are cut
CPU_CHUNK = 1 << 18  # values of a photometric pass: about 1 MB, which stays in the cache
DEVICE_CHUNK = 1 << 25  # the same on a device: 128 MB, which bounds the memory of a pass


@dataclass(frozen=True)
class CropSpec:
    """The arguments of torchvision's RandomResizedCrop, and the number of such crops an image."""

    size: tuple[int, int]  # (height, width) in pixels
    scale: tuple[float, float]  # share of the image's area
    count: int
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height


@dataclass(frozen=True)
class AugmentPolicy:
    """Probabilities and strengths; the defaults are those of DINO v1 and iBOT (main_dino.py).

    Saturation, hue and grayscale are skipped unless images have three channels; stains need three.
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
    rotate90: float = 0.0  # probability of 90, 180 or 270 degrees; 0.75 without an up
    stain: float = 0.0  # strength of the jitter of histological stains: data/stains.py


# For other domains; the strengths are ours. Intensity carries meaning: no solarisation, less blur.
_MEASURED = AugmentPolicy(
    saturation=0.0, hue=0.0, grayscale=0.0, solarize=0.0, blur=(0.5, 0.1, 0.2), blur_sigma=(0.1, 1)
)
POLICIES = {
    "natural": AugmentPolicy(),
    # The DINOv2 and DINOv3 code inverts the blur probability (dinov3 issue 286); their released
    # weights were trained that way.
    "natural_released_v2": AugmentPolicy(blur=(0.0, 0.9, 0.5)),
    "crops_only": AugmentPolicy(jitter=0.0, grayscale=0.0, blur=(0.0, 0.0, 0.0), solarize=0.0),
    # X-ray, CT, MR; flip=0 where sides matter
    "grey-medical": replace(_MEASURED, brightness=0.2, contrast=0.2),
    "histology": replace(_MEASURED, brightness=0.2, contrast=0.2, rotate90=0.75, stain=0.2),
    "aerial": replace(_MEASURED, saturation=0.2, hue=0.05, grayscale=0.1, rotate90=0.75),
    "microscopy": replace(_MEASURED, rotate90=0.75),
}


def draw(generator: torch.Generator, crops: int) -> Tensor:
    """(crops, NUMBERS) float32 uniform in [0, 1): all the randomness of one image's views."""
    return torch.cat([torch.rand((crops, block), generator=generator) for block in DRAWN], 1)


class MultiCrop:
    """G global and L local views of every image, crop-major (view 0 of all images, then view 1).

    Rows of a table: the global crops, then the local ones.

    Args:
        local_spec: None or a count of 0 for no local crops.
        gram_size: (height, width) of a second copy of the global crops, for a Gram teacher.
        gram_distorted: whether that copy gets the same colours and blur; else it is only cut.
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
        if policy.stain > 0 and len(mean) > 1:
            require_three_channels(len(mean))
        self.policy, self.mean, self.std = policy, tuple(mean), tuple(std)
        self.gram_distorted = gram_distorted
        self.globals = global_spec.count
        self.locals = 0 if local_spec is None else local_spec.count
        self.crops = self.globals + self.locals
        global_rows, local_rows = slice(0, self.globals), slice(self.globals, self.crops)
        # The kinds of crops, each with its rows of a table.
        self.cuts = [(global_spec, global_rows)]
        if self.locals:
            self.cuts.append((local_spec, local_rows))
        self.has_gram = gram_size is not None
        if self.has_gram:
            self.cuts.append((replace(global_spec, size=tuple(gram_size)), global_rows))
        # Probabilities of each crop of an image.
        self.blur = torch.full((self.crops,), float(policy.blur[1]))
        self.blur[0] = policy.blur[0]
        self.blur[local_rows] = policy.blur[2]
        self.solarize = torch.zeros(self.crops)
        self.solarize[1 : self.globals] = policy.solarize

    def __call__(
        self,
        images: Iterable[Tensor],
        tables: Sequence[Tensor],
        targets: Iterable[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Normalised float32: global crops (G·B, C, H, W), local crops (L·B, C, h, w), and those
        of the Gram teacher, in the order of the global ones; None where there are none.

        Arguments are those of `views`.
        """
        return self.finish(self.views(images, tables, targets), torch.stack(list(tables), 1))

    def views(
        self,
        images: Iterable[Tensor],
        tables: Sequence[Tensor],
        targets: Iterable[Tensor] | None = None,
    ) -> list[Tensor]:
        """Geometry only: one tensor for each of `cuts`, crop-major, uint8 from uint8.

        Args:
            images: (C, H, W), of any sizes; of an iterator, a few at a time are held in memory.
            tables: of each image, from `draw`.
            targets: of each image, asked for after it: (crops, 2) places in pixels that its crops
                must show, NaN for none.
        """
        images = iter(images)
        targets = None if targets is None else iter(targets)
        crops = [[] for _ in self.cuts]  # of each kind, one image after the other
        for table in torch.stack(list(tables)).split(IMAGES_HELD):
            held = list(islice(images, len(table)))
            if targets is not None:
                places = torch.stack(list(islice(targets, len(held))))
                table = torch.cat([table, places], 2)
            for made, (spec, rows) in zip(crops, self.cuts, strict=True):
                made += self._cut(held, table[:, rows].flatten(0, 1), spec)
        return [
            _stack_crop_major(made, spec.count)
            for made, (spec, _) in zip(crops, self.cuts, strict=True)
        ]

    def _cut(self, images: list[Tensor], u: Tensor, spec: CropSpec) -> list[Tensor]:
        sizes = np.array([image.shape[-2:] for image in images]).repeat(spec.count, 0)
        boxes, flips, turns = (values.tolist() for values in self.geometry(u, sizes, spec))
        crops = []
        for k, box in enumerate(boxes):
            image = images[k // spec.count]
            crops.append(resized_crop(image, box, spec.size, flips[k], turns[k]))
        return crops

    def geometry(
        self, u: Tensor, sizes: np.ndarray, spec: CropSpec
    ) -> tuple[np.ndarray, Tensor, Tensor]:
        """Boxes (n, 4), whether to mirror (n,) and quarter turns (n,): arguments of `resized_crop`.

        They depend on n rows of the table and on the size of each crop's image, `sizes` (n, 2).
        """
        boxes = crop_boxes(u, sizes[:, 0], sizes[:, 1], spec)
        if u.shape[1] > NUMBERS:
            places, target = u[:, TOP : LEFT + 1].double().numpy(), u[:, TARGET].double().numpy()
            boxes = move_to_points(boxes, target, places, sizes)
        turns = torch.zeros(len(u), dtype=torch.int)
        if self.policy.rotate90 > 0:
            # One number says whether and how far: below the probability it is uniform again.
            amount = 1 + 3 * u[:, ROTATION] / self.policy.rotate90
            turns = torch.where(u[:, ROTATION] < self.policy.rotate90, amount, 0).int()
        return boxes, u[:, FLIP] < self.policy.flip, turns

    def finish(self, views: list[Tensor], u: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Photometry of `views`, on any device, with the tables (crops, B, NUMBERS) on the CPU."""
        global_rows = self.cuts[0][1]
        local_crops = self._photometric(views[1], u, self.cuts[1][1]) if self.locals else None
        gram_crops = None
        if self.has_gram and self.gram_distorted:
            gram_crops = self._photometric(views[-1], u, global_rows)
        elif self.has_gram:
            gram_crops = normalize(to_unit(views[-1]), self.mean, self.std)
        return self._photometric(views[0], u, global_rows), local_crops, gram_crops

    def _photometric(self, crops: Tensor, u: Tensor, rows: slice) -> Tensor:
        blur = self.blur[rows].repeat_interleave(u.shape[1])
        solarize = self.solarize[rows].repeat_interleave(u.shape[1])
        u = u[rows].flatten(0, 1)
        return photometric(crops, u, self.policy, blur, solarize, self.mean, self.std)


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
    """The box (top, left, height, width) of a (C, H, W) image, resized to (C, h, w) by `resize`,
    mirrored left to right where `flip`, then turned anticlockwise `turns` times by 90 degrees."""
    top, left, height, width = box
    window = image[:, top : top + height, left : left + width]
    crop = resize(window, size[::-1] if turns % 2 else size)
    crop = crop.flip(-1) if flip else crop
    return crop.rot90(turns, (1, 2)) if turns else crop


def _stack_crop_major(crops: list[Tensor], count: int) -> Tensor:
    """One tensor of `count` crops of each image, listed image by image."""
    crops = [crop for view in range(count) for crop in crops[view::count]]
    if len({crop.dtype for crop in crops}) > 1:  # a folder may mix 8-bit with deeper images
        crops = [to_unit(crop) for crop in crops]
    return torch.stack(crops)


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
    """Stains, colour jitter, grayscale, blur, solarisation, normalisation; order of main_dino.py.

    Each operation equals torchvision's on a float image; there is no rounding to 8 bits between
    them. Rows that an operation does not select cost nothing. The crops may be on a device; the
    table says which rows are selected, so nothing waits for the device.

    Args:
        crops: (n, C, h, w) uint8, or float in [0, 1] (left unchanged).
        u: (n, NUMBERS) table, on the CPU as the probabilities are.
        blur_p, solarize_p: (n,) probabilities.
        mean, std: of one or C values, for inputs in [0, 1].

    Returns:
        (n, C, h, w) float32, normalised.

    Raises:
        UserError: if mean or std fit neither one channel nor C, or stains meet other than 3.
    """
    channels = crops.shape[1]
    for name, values in (("mean", mean), ("std", std)):
        if len(values) not in (1, channels):
            raise UserError(f"{name} has {len(values)} values for images of {channels} channels")
    x = crops.float().div_(255) if crops.dtype == torch.uint8 else crops.float().clone()
    if policy.stain > 0:
        stains = send(u[:, STAINS], x.device)
        for rows in _chunks(torch.ones(len(x), dtype=torch.bool), x):
            x[rows] = stain_jitter(x[rows], stains[rows], policy.stain)
    color_jitter(x, u, policy)
    if channels == 3:
        for rows in _chunks(u[:, GRAYSCALE] < policy.grayscale, x):
            x[rows] = rgb_to_grayscale(x[rows])
    low, high = policy.blur_sigma
    sigma = send(low + (high - low) * u[:, SIGMA], x.device)
    for rows in _chunks(u[:, BLUR] < blur_p, x):
        x[rows] = gaussian_blur(x[rows], sigma[rows])
    for rows in _chunks(u[:, SOLARIZE] < solarize_p, x):
        x[rows] = solarize(x[rows], 0.5)
    return normalize(x, mean, std)


def color_jitter(x: Tensor, u: Tensor, policy: AugmentPolicy) -> None:
    """torchvision's ColorJitter with probability `policy.jitter`, in place; each row of
    (n, C, h, w) has its own factors and its own order."""
    limits = (policy.brightness, policy.contrast, policy.saturation, policy.hue)
    active = [k for k, limit in enumerate(limits) if limit > 0 and (k < 2 or x.shape[1] == 3)]
    low = torch.tensor([max(0.0, 1 - limit) for limit in limits[:3]] + [-policy.hue])
    high = torch.tensor([1 + limit for limit in limits[:3]] + [policy.hue])
    factors = send(torch.lerp(low.to(u), high.to(u), u[:, FACTORS]), x.device)
    jittered = u[:, JITTER] < policy.jitter
    # Ranks of independent uniform numbers are a uniform permutation, of any subset as well.
    order = u[:, ORDER][:, active].argsort(1)
    for chosen in order.unbind(1):
        for number, k in enumerate(active):
            for rows in _chunks(jittered & (chosen == number), x):
                x[rows] = OPERATIONS[k](x[rows], factors[rows, k].view(-1, 1, 1, 1))


def _chunks(selected: Tensor, x: Tensor) -> Iterator[Tensor]:
    """Numbers of the selected rows (n,) bool of x, as many at a time as a pass may hold, on x's
    device; nothing where none is selected."""
    rows = selected.nonzero()[:, 0]
    values = CPU_CHUNK if x.device.type == "cpu" else DEVICE_CHUNK
    if len(rows):
        for part in rows.split(max(1, values // x[0].numel())):
            yield send(part, x.device)
