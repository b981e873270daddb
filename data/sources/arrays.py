"""Images out of Python: arrays in one .npz file, and one's own Dataset."""

import importlib
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from data.images import ImageData, choose_split
from data.pictures import (
    UnreadableImage,
    Window,
    array_to_tensor,
    error_text,
    finish,
    picture_to_tensor,
)
from data.sources.published import labels_of
from errors import UserError


class ArrayImages(ImageData):
    """Images in one array.

    Args:
        pixels: (n, H, W), (n, H, W, C) or (n, C, H, W); see `array_to_tensor`.
        labels: (n,) or (n, 1) class ids; several columns (more than one class an image) are
            ignored.
    """

    def __init__(
        self,
        pixels: np.ndarray,
        labels: np.ndarray | None,
        title: str,
        channels: int | None = 3,
        window: Window | None = None,
        size: int | None = None,
    ):
        self.pixels, self.title, self.channels, self.window = pixels[:size], title, channels, window
        if labels is not None and labels.dtype.kind in "iu" and labels.size == len(labels):
            self.labels = labels.reshape(-1)[:size].astype(np.int64)

    def __len__(self) -> int:
        return len(self.pixels)

    def image(self, index: int) -> Tensor:
        try:
            image = array_to_tensor(self.pixels[index], self.channels)
        except ValueError as error:
            raise UnreadableImage(self.name(index), error_text(error)) from error
        return finish(image, self.name(index), self.channels, self.window)


def is_npz_of_images(path: Path) -> bool:
    """Whether a file holds many images, as MedMNIST's do, and not one."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("images.npy") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def open_npz(
    path: str,
    channels: int | None,
    *,
    split: str | None = None,
    size: int | None = None,
    window: Window | None = None,
) -> ArrayImages:
    """MedMNIST's layout: train_images, train_labels, val_images, ...; or images and labels.

    The arrays are held in memory.

    Raises:
        FileNotFoundError: if there is no such file.
        UserError: if it holds no such split.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"no file {str(file)!r}")
    try:
        with np.load(file) as arrays:
            prefix = _split_prefix(arrays, split, file)
            pixels, labels = arrays[f"{prefix}images"], arrays.get(f"{prefix}labels")
    except UserError:
        raise
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read {str(file)!r}: {error_text(error)}") from error
    title = f"npz:{file}/{split}" if split else f"npz:{file}"
    return ArrayImages(pixels, labels, title, channels, window, size)


def _split_prefix(arrays, split: str | None, file: Path) -> str:
    """What the names of a split's arrays begin with."""
    if split is None and "images" in arrays:
        return ""
    splits = [name.removesuffix("_images") for name in arrays if name.endswith("_images")]
    if splits:
        return choose_split(split, splits, repr(str(file))) + "_"
    given = "needs a split" if split is None else f"has no split {split!r}"
    raise UserError(f"{str(file)!r} {given}; it holds {', '.join(arrays)}")


class PythonImages(ImageData):
    """One's own Dataset. Items are an image, or a tuple that begins with one.

    An image is a PIL image, an array or a (C, H, W) tensor. Labels are those of an attribute
    `targets` or `labels`, class names those of `classes`.
    """

    def __init__(
        self,
        dataset,
        title: str,
        channels: int | None = 3,
        window: Window | None = None,
        size: int | None = None,
    ):
        self.dataset, self.title, self.channels, self.window = dataset, title, channels, window
        self.length = min(size or len(dataset), len(dataset))
        labels = labels_of(dataset)
        self.labels = None if labels is None else labels[: self.length]
        self.classes = getattr(dataset, "classes", None)

    def __len__(self) -> int:
        return self.length

    def image(self, index: int) -> Tensor:
        try:
            item = self.dataset[index]
            item = item[0] if isinstance(item, tuple) else item
            image = _to_tensor(item, self.channels)
        except UnreadableImage:
            raise
        except OSError as error:
            # A file of the Dataset. Anything else is a mistake in its code and must show.
            raise UnreadableImage(self.name(index), error_text(error)) from error
        return finish(image, self.name(index), self.channels, self.window)


def _to_tensor(item, channels: int | None) -> Tensor:
    if isinstance(item, Tensor):
        return item if item.ndim == 3 else item[None]
    if isinstance(item, Image.Image):
        return picture_to_tensor(item, channels)
    return array_to_tensor(np.asarray(item), channels)


def open_python(
    path: str,
    channels: int | None,
    *,
    size: int | None = None,
    window: Window | None = None,
    **arguments: str,
) -> PythonImages:
    """`package.module:callable`, called with the remaining keys of the spec, as text.

    Raises:
        UserError: if there is no such callable, or it gives nothing that has a length and items.
    """
    title = f"python:{path}"
    module, _, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{title} names no package.module:callable: {error_text(error)}") from error
    try:
        dataset = function(**arguments)
    except TypeError as error:
        given = ", ".join(arguments) or "no arguments"
        raise UserError(f"{title} does not take {given}: {error_text(error)}") from error
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        kind = type(dataset).__name__
        raise UserError(f"{title} gave a {kind}; a Dataset has a length and items by number")
    return PythonImages(dataset, title, channels, window, size)
