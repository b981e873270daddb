"""The small class behind every kind of data, and labels from names."""

import hashlib
import os
from collections.abc import Sequence

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from data.pictures import UnreadableImage
from data.pixels import to_unit
from errors import UserError

# What a data set may call the split that is asked for, best first.
SPLITS = {
    "train": ("train", "trainval"),
    "val": ("val", "valid", "validation", "test"),
    "test": ("test",),
}


class NoAnnotations(UserError):
    """This kind of data has none, which in a mixture of sources is no mistake."""


class ImageData(Dataset):
    """Images with or without labels; item i is (image, label or -1).

    A kind of data is a subclass with `__len__`, `image` and a `title` or a `name` of its own.

    Attributes:
        labels: (n,) int64, -1 where an image has none, or None.
        classes: their names, or None.
        passed_over: a sentence with counts for each kind of thing that is not used.
        left_out: images that a probe cannot use, see `known_images` of data/sources/specs.py.
        window: centre and width of the values that become 0 to 1, or None.
        span: lowest and highest value of each band, or of all, that become 0 and 1; None: what the
            type of the files says, or `window`.
        origin: what a spec says of its images, but for where they lie.
        captioned: (n,) bool, which images have captions, or None where none has.
    """

    title: str
    labels: np.ndarray | None = None
    classes: list[str] | None = None
    passed_over: list[str] | tuple = ()
    left_out: int = 0
    window: tuple[float, float] | None = None
    span: tuple[tuple[float, float], ...] | None = None
    origin: str = ""
    captioned: np.ndarray | None = None

    def __len__(self) -> int:
        raise NotImplementedError

    def image(self, index: int) -> Tensor:
        """(C, H, W) uint8, uint16 or float32 in [0, 1]; raises UnreadableImage."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        """Where the image comes from, such as its path."""
        return f"{self.title}/{index}"

    def annotations(self, index: int) -> dict:
        """Boxes, masks, depth or keypoints, of the kinds of data that have them."""
        raise NoAnnotations(f"{self.name(index)} has no annotations beyond its class; `scenes` has")

    def measured(self, index: int) -> tuple[Tensor, str, Tensor | None]:
        """Values as stored and their type, and in [0, 1] or None where their range is not known.

        Values are (C, H, W) float64, NaN for nodata.
        """
        image = self.image(index)
        return image.double(), str(image.dtype).removeprefix("torch."), to_unit(image).double()

    def fill_nodata(self, mean: Sequence[float]) -> None:
        """Pixels without data are to become `mean`, in [0, 1], where the data has such."""

    def captions(self, index: int) -> list[str]:
        """What is said of the image; empty where nothing is."""
        return []

    def files_below(self) -> list[bytes]:
        """Names of all images relative to where they lie, of the kinds of data that have them."""
        return []

    def fingerprint(self) -> str:
        """A hash of `origin` and the names. No pixel is read."""
        names = self.files_below()
        # What all names begin with is where they lie, as in a list of absolute paths.
        start = os.path.commonprefix([min(names), max(names)]) if names else b""
        start = start.rpartition(b"/")[0]
        found = hashlib.sha256(self.origin.encode("utf-8", "surrogateescape"))
        found.update(b"\n".join(name[len(start) :] for name in names))
        return found.hexdigest()[:16]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.image(index), -1 if self.labels is None else int(self.labels[index])


class Chosen(ImageData):
    """Some images of a data set."""

    def __init__(self, data: ImageData, rows: Sequence[int]):
        self.data, self.rows = data, np.asarray(rows, dtype=np.int64)
        self.labels = None if data.labels is None else data.labels[self.rows]
        self.classes, self.passed_over = data.classes, data.passed_over
        self.captioned = None if data.captioned is None else data.captioned[self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def image(self, index: int) -> Tensor:
        return self.data.image(int(self.rows[index]))

    def name(self, index: int) -> str:
        return self.data.name(int(self.rows[index]))

    def annotations(self, index: int) -> dict:
        return self.data.annotations(int(self.rows[index]))

    def measured(self, index: int) -> tuple[Tensor, str, Tensor | None]:
        return self.data.measured(int(self.rows[index]))

    def fill_nodata(self, mean: Sequence[float]) -> None:
        self.data.fill_nodata(mean)

    def captions(self, index: int) -> list[str]:
        return self.data.captions(int(self.rows[index]))

    def files_below(self) -> list[bytes]:
        names = self.data.files_below()
        return [names[row] for row in self.rows] if names else []


def first_annotations(data: ImageData) -> dict:
    """Those of the first image that has some which can be read; empty where none has."""
    for index in range(len(data)):
        try:
            notes = data.annotations(index)
        except UnreadableImage:
            continue
        except NoAnnotations:
            break
        if notes:
            return notes
    return {}


def number_classes(names: list[str | None]) -> tuple[np.ndarray | None, list[str] | None]:
    """(labels, classes) of one class name an image, None where it has none.

    Classes that are numbers sort as numbers.
    """
    known = {name for name in names if name is not None}
    if not known:
        return None, None
    classes = sorted(known, key=int if all(name.isdecimal() for name in known) else None)
    ids = {name: k for k, name in enumerate(classes)}
    return np.array([ids.get(name, -1) for name in names], dtype=np.int64), classes


def class_names(data: ImageData) -> list[str]:
    """Of a data set with labels; numbers where the classes have no names."""
    return data.classes or [str(k) for k in range(int(data.labels.max()) + 1)]


def choose_split(split: str | None, available, title: str) -> str:
    """The name that a data set gives to `split`.

    Raises:
        UserError: if there is none, or `split` is None.
    """
    for name in SPLITS.get(split, (split,)):
        if name in available:
            return name
    given = "needs a split" if split is None else f"has no split {split!r}"
    raise UserError(f"{title} {given}; split= is one of {', '.join(available)}")
