"""Batches of a data set for a frozen model: ranks share them, what cannot be read is left out.

A batch begins at a multiple of the batch size, on any number of ranks. So every image is computed
in the same batch as on one rank, and has the same features to the last digit.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from data.images import ImageData
from data.pictures import UnreadableImage
from engine import distributed
from engine.logger import notice
from errors import UserError


class Readable(Dataset):
    """The items of a data set; in place of one that cannot be read, its `UnreadableImage`."""

    def __init__(self, data: Dataset):
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.data[index]
        except UnreadableImage as error:
            return error


class Made(Dataset):
    """Item i is `make(i)`, such as a pair or a clip of a data set."""

    def __init__(self, data: ImageData, make: Callable[[int], tuple]):
        self.data, self.make = data, make

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple:
        return self.make(index)


def read_batches(
    data: Dataset,
    batch_size: int = 64,
    *,
    workers: int = 0,
    collate: Callable[[list], Any] = default_collate,
    unreadable: dict[str, str] | None = None,
    shared: bool = True,
    progress: Callable[[Iterable], Iterator] = iter,
) -> Iterator[Any]:
    """This rank's batches, in order; on every rank as many. None stands for a batch without images.

    The global random state is neither read nor changed.

    Args:
        data: items, or UnreadableImage from what cannot be read.
        collate: items -> a batch; it runs in the loader's process.
        unreadable: name -> reason of the images left out so far; takes further ones. Each is named
            once on standard error.
        shared: whether ranks share the batches; all of them then call this together.

    Raises:
        UserError: at the end, if no item could be read on any rank.
    """
    rank, world = (distributed.rank(), distributed.world_size()) if shared else (0, 1)
    starts = range(0, len(data), batch_size)
    mine = [range(start, min(start + batch_size, len(data))) for start in starts[rank::world]]
    mine += [range(0)] * (math.ceil(len(starts) / world) - len(mine))
    loader = DataLoader(
        Readable(data),
        batch_sampler=mine,
        num_workers=workers,
        collate_fn=partial(_collate, collate),
        # The loader would take its seed from torch's global random state.
        generator=torch.Generator().manual_seed(0),
    )
    errors = []
    for batch, bad in progress(loader):
        errors += bad
        yield batch
    parts = distributed.gather_objects(errors) if shared else [errors]
    note_unreadable(sum(parts, []), {} if unreadable is None else unreadable, len(data))


def _collate(collate: Callable[[list], Any], items: list) -> tuple[Any, list[UnreadableImage]]:
    good = [item for item in items if not isinstance(item, UnreadableImage)]
    bad = [item for item in items if isinstance(item, UnreadableImage)]
    return collate(good) if good else None, bad


def note_unreadable(
    errors: list[UnreadableImage], seen: dict[str, str], images: int | None = None
) -> None:
    """Names each image that is not in `seen` and adds it.

    Raises:
        UserError: if there are errors of all `images`, where that is not None.
    """
    for error in errors:
        if error.name not in seen:
            seen[error.name] = error.reason
            notice(f"left out: {error}")
    if errors and len(errors) == images:
        raise UserError(f"none of the {images} images could be read; one of them: {errors[0]}")


def first_readable(data: ImageData, count: int, indices: Iterable[int] | None = None) -> list[int]:
    """Indices of the first `count` images that can be read, fewer where there are not so many.

    Args:
        indices: to try, in order; all by default.
    """
    found = []
    for index in range(len(data)) if indices is None else indices:
        if len(found) == count:
            break
        try:
            data.image(index)
        except UnreadableImage:
            continue
        found.append(index)
    return found


def in_order(
    pairs: list[tuple[int, Any]],
    gather: Callable[[list], list[list]] = distributed.gather_objects,
) -> list[Any]:
    """The values of (number, value) of all ranks, by number."""
    whole = sum(gather(pairs), [])
    return [value for _, value in sorted(whole, key=lambda pair: pair[0])]
