"""Images out of Python: arrays in one .npz file, and one's own Dataset."""

import importlib
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from data.images import ImageData, choose_split, number_classes
from data.pictures import (
    UnreadableImage,
    Window,
    array_to_tensor,
    error_text,
    finish,
    picture_to_tensor,
)
from errors import UserError
from files import expand


class ArrayImages(ImageData):
    """Images in one array.

    Args:
        pixels: (n, H, W), (n, H, W, C) or (n, C, H, W); see `array_to_tensor`.
        labels: see `class_ids`.

    Raises:
        UserError: if the pixels are no images, or there is not one label an image.
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
        if pixels.ndim not in (3, 4):
            raise UserError(
                f"{title}: images of shape {pixels.shape}; an array of images has the shape "
                "(n, H, W), (n, H, W, C) or (n, C, H, W)"
            )
        self.pixels, self.title, self.channels, self.window = pixels[:size], title, channels, window
        if labels is not None:
            self.labels, self.classes, self.passed_over = class_ids(labels, len(pixels), title)
            self.labels = None if self.labels is None else self.labels[:size]

    def __len__(self) -> int:
        return len(self.pixels)

    def image(self, index: int) -> Tensor:
        try:
            image = array_to_tensor(self.pixels[index], self.channels)
        except ValueError as error:
            raise UnreadableImage(self.name(index), error_text(error)) from error
        return finish(image, self.name(index), self.channels, self.window)


def class_ids(
    values, count: int, title: str
) -> tuple[np.ndarray | None, list[str] | None, list[str]]:
    """Labels of `count` images in any of the usual forms.

    Args:
        values: (n,) or (n, 1) numbers or names, or (n, K) with a single 1 in each row.

    Returns:
        (n,) int64 ids, negative where there is no label, or None; names of classes, or None; and
        what was passed over: values that are no classes, several classes an image.

    Raises:
        UserError: for another number of labels.
    """
    values = np.asarray(values)
    if values.ndim == 0 or len(values) != count:
        given = "one value" if values.ndim == 0 else f"{len(values)}"
        raise UserError(f"{title}: {given} for the labels of {count} images; each needs one")
    if values.ndim > 1 and values.size == count:
        values = values.reshape(count)
    if values.dtype.kind == "O" and all(isinstance(value, str) for value in values.flat):
        values = values.astype(str)
    if values.ndim == 1 and values.dtype.kind in "SU":
        names = [v.decode("utf-8", "replace") if isinstance(v, bytes) else str(v) for v in values]
        return *number_classes([name or None for name in names]), []
    if values.dtype.kind not in "buif" or not (values == np.round(values)).all():
        kind = f"labels of {values.dtype} such as {values.flat[0]!r}"
        return None, None, [f"{title}: {kind} are no classes and passed over"]
    if values.ndim == 2 and ((values == 0) | (values == 1)).all() and (values.sum(1) == 1).all():
        values = values.argmax(1)
    if values.ndim > 1:
        shape = "x".join(map(str, values.shape[1:]))
        return None, None, [f"{title}: labels with {shape} values an image passed over"]
    return np.maximum(values.astype(np.int64), -1), None, []


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
    file = expand(path)
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

    An item may also be a list that begins with an image, or a dictionary with "image". An image is
    a PIL image, an array or a (C, H, W) tensor. Labels are those of an attribute
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
        self._take_labels()

    def _take_labels(self) -> None:
        for name in ("targets", "labels"):
            values = getattr(self.dataset, name, None)
            if values is None or callable(values):
                continue
            title = f"{self.title} ({name})"
            try:
                found = class_ids(values, len(self.dataset), title)
            except ValueError as error:  # it may be something else of that name
                found = None, None, [f"{error_text(error)}; passed over"]
            self.labels, self.classes, self.passed_over = found
            if self.labels is not None:
                self.labels = self.labels[: self.length]
                self.classes = self.classes or getattr(self.dataset, "classes", None)
                return

    def __len__(self) -> int:
        return self.length

    def image(self, index: int) -> Tensor:
        try:
            image = self._image_of(self.dataset[index], index)
        except UnreadableImage:
            raise
        except OSError as error:
            # A file of the Dataset. Anything else is a mistake in its code and must show.
            raise UnreadableImage(self.name(index), error_text(error)) from error
        return finish(image, self.name(index), self.channels, self.window)

    def _image_of(self, item, index: int) -> Tensor:
        given = type(item).__name__
        if isinstance(item, dict):
            given += f" with the keys {', '.join(map(str, item))}"
            item = item.get("image")
        elif isinstance(item, (tuple, list)) and item and not np.isscalar(item[0]):
            item = item[0]
        try:
            return _to_tensor(item, self.channels)
        except (UserError, TypeError, ValueError) as error:
            raise UserError(
                f"{self.name(index)} is a {given}: {error_text(error)}; an item is an image, a "
                'tuple that begins with one, or a dictionary with "image"'
            ) from error


def _to_tensor(item, channels: int | None) -> Tensor:
    if isinstance(item, Tensor):
        if item.ndim not in (2, 3):
            raise UserError(f"a tensor of shape {tuple(item.shape)} is no image")
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
