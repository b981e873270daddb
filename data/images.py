"""The small class behind every kind of data, and labels from names."""

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from data.pictures import fit_channels
from errors import UserError

# What a data set may call the split that is asked for, best first.
SPLITS = {
    "train": ("train", "trainval"),
    "val": ("val", "valid", "validation", "test"),
    "test": ("test",),
}


class ImageData(Dataset):
    """Images with or without labels; item i is (image, label or -1).

    `labels` is (n,) int64, -1 where an image has none, or None; `classes` are their names or None.
    """

    labels: np.ndarray | None = None
    classes: list[str] | None = None

    def __len__(self) -> int:
        raise NotImplementedError

    def image(self, index: int) -> Tensor:
        """(C, H, W) uint8, uint16 or float32 in [0, 1]; raises UnreadableImage."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        """Where the image comes from, such as its path."""
        raise NotImplementedError

    def annotations(self, index: int) -> dict:
        """Boxes, masks, depth or keypoints, of the kinds of data that have them."""
        raise UserError(f"{self.name(index)} has no annotations beyond its class; `scenes` has")

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.image(index), -1 if self.labels is None else int(self.labels[index])


class Recolored(ImageData):
    """Another data set's images with another number of channels."""

    def __init__(self, data, channels: int):
        self.data, self.channels = data, channels
        self.labels, self.classes = data.labels, data.classes

    def __len__(self) -> int:
        return len(self.data)

    def image(self, index: int) -> Tensor:
        return fit_channels(self.data.image(index), self.channels, self.name(index))

    def name(self, index: int) -> str:
        return self.data.name(index)

    def annotations(self, index: int) -> dict:
        return self.data.annotations(index)


def number_classes(names: list[str | None]) -> tuple[np.ndarray | None, list[str] | None]:
    """(labels, classes) of one class name an image, None where it has none; classes that are numbers sort as such."""
    known = {name for name in names if name is not None}
    if not known:
        return None, None
    classes = sorted(known, key=int if all(name.isdecimal() for name in known) else None)
    ids = {name: k for k, name in enumerate(classes)}
    return np.array([ids.get(name, -1) for name in names], dtype=np.int64), classes


def class_names(data: ImageData) -> list[str]:
    """Of a data set with labels; numbers where the classes have no names."""
    return data.classes or [str(k) for k in range(int(data.labels.max()) + 1)]
