"""From images to batches: an endless seeded stream, the same for any number of workers and ranks.

The stream of a run is a row of positions p = 0, 1, 2, ...; step s takes batch_size of them from
s · batch_size on. Position p shows image p % n of epoch p // n, each epoch in an order of its own,
and takes its random numbers from a generator seeded by (seed, p). Nothing else enters, so a run
resumes by naming a step.
"""

import itertools
import math
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.augment import MultiCrop, draw
from data.device import Cut, cut_out, pack
from data.guided import Guidance
from data.jpeg import Fineness, crop_fineness, decoded_for
from data.masking import MaskSpec, draw_masks
from data.sources.mixture import Mixture
from data.sources.specs import ImageData, UnreadableImage
from errors import UserError

# Purposes of random numbers, so that none repeats another's.
EPOCH_ORDER, VIEWS, MASKS, SIZES = range(4)


@dataclass
class Batch:
    """One rank's share of a step: b images, crops crop-major."""

    global_crops: Tensor  # (G·b, C, H, W) float32, normalised
    local_crops: Tensor | None  # (L·b, C, h, w); None when L = 0
    gram_crops: Tensor | None  # (G·b, C, H', W') for the Gram teacher; None = the global crops
    masks: Tensor | None  # (G·b, N) bool, True = hidden from the student
    hidden: list[int]  # how many are, of each crop; empty without masks
    images: list[int]  # indices into the data
    bad: list[tuple[str, str]]  # (name, reason) of those that could not be read

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        return self.map(Tensor.pin_memory)

    def split(self, micro: int) -> list["Batch"]:
        """Batches of `micro` images (the last may have fewer), crop-major again. Lists are split as
        tensors are, but for `bad`, which goes with the first."""
        parts, count = [], len(self.images)
        lists = {field.name: getattr(self, field.name) for field in fields(self)}
        lists = {name: rows for name, rows in lists.items() if isinstance(rows, list)}
        for start in range(0, count, micro):
            stop = min(start + micro, count)
            part = self.map(partial(_images_of, count, start, stop))
            own = {
                name: [row for place, row in enumerate(rows) if start <= place % count < stop]
                for name, rows in lists.items()
            }
            parts.append(replace(part, **own | {"bad": [] if start else self.bad}))
        return parts

    def masked(self) -> Tensor | None:
        """(M,) places of the hidden patches in `masks.flatten()`, in order; None without masks.

        Their number is known on the host, so nothing waits for the device.
        """
        if self.masks is None:
            return None
        order = self.masks.flatten().byte().argsort(descending=True, stable=True)
        return order[: sum(self.hidden)]

    def map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        """A batch with `function` of every tensor that is not None."""
        tensors = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                tensors[field.name] = function(value)
        return replace(self, **tensors)


def _images_of(count: int, start: int, stop: int, crops: Tensor) -> Tensor:
    """The crops of images start, ..., stop - 1 among crop-major crops of `count` images."""
    return crops.unflatten(0, (-1, count))[:, start:stop].flatten(0, 1)


@dataclass
class RawBatch:
    """Whole images and the places of their crops; `to` makes a `Batch` of it on a device."""

    pixels: Tensor  # (P, C) of all images, see data.device.pack
    cuts: list[Cut]
    tables: Tensor  # (crops, b, NUMBERS); they stay on the CPU
    multi_crop: MultiCrop
    masks: Tensor | None  # these four as in `Batch`
    hidden: list[int]
    images: list[int]
    bad: list[tuple[str, str]]

    @torch.no_grad()
    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        device = torch.device(device)
        with torch.autocast(device.type, enabled=False):  # distill.py moves its batches within one
            pixels = self.pixels.to(device, non_blocking=non_blocking)
            views = [cut_out(pixels, cut.to(device, non_blocking)) for cut in self.cuts]
            crops = self.multi_crop.finish(views, self.tables)
        masks = None if self.masks is None else self.masks.to(device, non_blocking=non_blocking)
        return Batch(*crops, masks, self.hidden, self.images, self.bad)

    def pin_memory(self) -> "RawBatch":
        masks = None if self.masks is None else self.masks.pin_memory()
        return replace(
            self,
            pixels=self.pixels.pin_memory(),
            cuts=[cut.pin_memory() for cut in self.cuts],
            masks=masks,
        )


@dataclass(frozen=True)
class Views:
    """What is made of an image, for `share` of the steps: crops, which marks may guide, and masks
    over the global crops or None."""

    multi_crop: MultiCrop
    masks: MaskSpec | None = None
    share: float = 1.0
    guidance: Guidance | None = None


class StepDataset(Dataset):
    """Item `step` is this rank's batch of that step: a contiguous block of the global batch.

    Args:
        views: of several, one is drawn for each step, the same on all ranks.
        batch_size: global, a multiple of world_size.
        shift: position of step s in the stream less s · batch_size; not 0 where earlier steps had
            another batch size.
        on_device: items are `RawBatch`, whose crops are made on the device that it is moved to.
        scaled_jpeg: JPEG files are decoded no finer than their crops need, see data/jpeg.py; not
            where marks guide the crops.

    Raises:
        UserError: if the batch cannot be shared evenly, or there is no image.
    """

    def __init__(
        self,
        data: ImageData,
        views: Sequence[Views],
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        shift: int = 0,
        on_device: bool = False,
        scaled_jpeg: bool = False,
    ):
        if batch_size < 1 or batch_size % world_size:
            raise UserError(f"batch size {batch_size} is not a multiple of {world_size} ranks")
        if len(data) == 0:
            raise UserError("the data set holds no images")
        self.data, self.views = data, tuple(views)
        if self.views:  # align.py makes its own of each image
            data.fill_nodata(self.views[0].multi_crop.mean)
        self.batch_size, self.seed, self.shift, self.on_device = batch_size, seed, shift, on_device
        self.share, self.scaled_jpeg = batch_size // world_size, scaled_jpeg
        self.block = range(rank * self.share, (rank + 1) * self.share)
        self.order = (-1, np.empty(0))  # epoch and its permutation, the last one asked for

    def indices(self, step: int) -> np.ndarray:
        """(batch_size,) image indices of the global batch."""
        if isinstance(self.data, Mixture):
            return self.data.step_indices(step, self.batch_size, self.seed, self.shift)
        start = step * self.batch_size + self.shift
        epochs, places = np.divmod(np.arange(start, start + self.batch_size), len(self.data))
        parts = [
            self._epoch_order(epoch)[places[epochs == epoch]]
            for epoch in np.unique(epochs).tolist()
        ]
        return np.concatenate(parts)

    def _epoch_order(self, epoch: int) -> np.ndarray:
        if self.order[0] != epoch:
            rng = np.random.default_rng([self.seed, EPOCH_ORDER, epoch])
            # Every worker holds one of these: four bytes an image.
            self.order = epoch, rng.permutation(np.arange(len(self.data), dtype=np.int32))
        return self.order[1]

    def __getitem__(self, step: int) -> Batch | RawBatch:
        views = self._choose_views(step)
        multi_crop = views.multi_crop
        first = step * self.batch_size + self.shift
        tables = [self._table(first + place, multi_crop.crops) for place in self.block]
        masks = None
        if views.masks is not None:
            masks = step_masks(
                views.masks, multi_crop.globals, self.batch_size, self.block, self.seed, step
            )
        hidden = [] if masks is None else masks.sum(1).tolist()
        images: list[int] = []
        bad: dict[str, str] = {}
        scaled = self.scaled_jpeg and views.guidance is None
        fineness = [crop_fineness(multi_crop, table) if scaled else None for table in tables]
        pixels = self._read(self.indices(step), images, bad, fineness)
        targets = self._targets(views, first, images, bad)
        if self.on_device:
            buffer, cuts = pack(multi_crop, pixels, tables, targets)
            u = torch.stack(tables, 1)
            return RawBatch(buffer, cuts, u, multi_crop, masks, hidden, images, list(bad.items()))
        crops = multi_crop(pixels, tables, targets)
        return Batch(*crops, masks, hidden, images, list(bad.items()))

    def _choose_views(self, step: int) -> Views:
        if len(self.views) == 1:
            return self.views[0]
        shares = np.array([views.share for views in self.views])
        rng = np.random.default_rng([self.seed, SIZES, step])
        return self.views[rng.choice(len(shares), p=shares / shares.sum())]

    def _read(
        self,
        indices: np.ndarray,
        images: list[int],
        bad: dict[str, str],
        fineness: Sequence[Fineness | None],
    ) -> Iterator[Tensor]:
        """The images of this rank's block; their indices are added to `images`, unreadable ones
        to `bad`.

        An unreadable one gives its place to the next readable one of the global batch, whichever
        rank's: that does not depend on the number of ranks.
        """
        errors: dict[int, UnreadableImage] = {}
        for place, fine in zip(self.block, fineness, strict=True):
            for further in range(len(indices)):
                index = int(indices[(place + further) % len(indices)])
                image = None if index in errors else self._try_image(index, errors, fine)
                if image is not None:
                    break
            else:
                raise UserError(
                    f"none of the {len(indices)} images of a batch could be read; "
                    f"one of them: {errors[index]}"
                )
            if error := errors.get(int(indices[place])):
                bad[error.name] = error.reason
            images.append(index)
            yield image

    def _try_image(
        self, index: int, errors: dict[int, UnreadableImage], fineness: Fineness | None
    ) -> Tensor | None:
        try:
            with decoded_for(fineness):
                return self.data.image(index)
        except UnreadableImage as error:
            errors[index] = error

    def _table(self, position: int, crops: int) -> Tensor:
        # torch seeds its CPU generator with 32 bits; hashing spreads neighbouring positions.
        hashed = np.random.SeedSequence([self.seed, VIEWS, position]).generate_state(1)
        return draw(torch.Generator().manual_seed(int(hashed[0])), crops)

    def _targets(
        self, views: Views, first: int, images: list[int], bad: dict[str, str]
    ) -> Iterator[Tensor] | None:
        """Places that the crops of each image must show. `images` fills while the images are
        read, each before its targets are asked for. Marks that cannot be read are added to `bad`
        and guide nothing."""
        if views.guidance is None:
            return None
        counts = views.multi_crop.globals, views.multi_crop.crops

        def target(number: int, place: int) -> Tensor:
            given = self.data, images[number], first + place, self.seed
            try:
                return views.guidance.targets(*given, *counts)
            except UnreadableImage as error:
                bad[error.name] = error.reason
                return torch.full((counts[1], 2), math.nan)

        return itertools.starmap(target, enumerate(self.block))


def step_masks(
    spec: MaskSpec, views: int, batch_size: int, places: Sequence[int], seed: int, step: int
) -> Tensor:
    """(views·b, N) masks of the global crops of some images of a step, crop-major.

    Args:
        views: global crops an image.
        batch_size: of all ranks together.
        places: of the b images within the global batch.
    """
    rows = [view * batch_size + place for view in range(views) for place in places]
    return draw_masks(
        views * batch_size,
        spec.grid,
        spec.probability,
        spec.ratio,
        (seed, MASKS, step),
        rows,
        spec.fill,
    )


def make_loader(
    data: ImageData,
    views: Sequence[Views],
    *,
    batch_size: int,
    seed: int,
    stop_step: int,
    start_step: int = 0,
    shift: int = 0,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    device: str = "cpu",
    on_device: bool = False,
    scaled_jpeg: bool = False,
) -> DataLoader:
    """One `Batch`, or `RawBatch` if `on_device`, per step from start_step to stop_step - 1.

    `.dataset` is the `StepDataset`; see there for the arguments that are not described here.
    A worker makes whole batches, with one thread. torch's global random state is not touched.
    """
    steps = StepDataset(
        data,
        views,
        batch_size=batch_size,
        seed=seed,
        rank=rank,
        world_size=world_size,
        shift=shift,
        on_device=on_device,
        scaled_jpeg=scaled_jpeg,
    )
    return DataLoader(
        steps,
        batch_size=None,
        sampler=range(start_step, stop_step),
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=device == "cuda",
        worker_init_fn=_ignore_interrupts,
        generator=torch.Generator().manual_seed(0),
    )


def _ignore_interrupts(worker: int) -> None:
    """A terminal sends Ctrl-C to every process; the run needs its workers to end its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
