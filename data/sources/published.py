"""Published data sets: any torchvision.datasets class, and the Hugging Face hub."""

import inspect
import io
import re
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torchvision.datasets
from torch import Tensor
from torch.utils.data import Dataset

from data.captions import clean_caption, say_captions
from data.images import SPLITS, ImageData, choose_split
from data.pictures import (
    UnreadableImage,
    Window,
    error_text,
    finish,
    picture_to_tensor,
    read_image,
    read_open_file,
)
from errors import UserError
from files import expand


class TorchvisionImages(ImageData):
    """A torchvision data set. One that holds its images as an array is read without going through
    PIL, which is most of the cost of a 28-pixel image."""

    def __init__(
        self,
        dataset: Dataset,
        title: str,
        channels: int | None = 3,
        size: int | None = None,
        window: Window | None = None,
    ):
        self.title, self.channels, self.window = title, channels, window
        self.pixels = _pixels_of(dataset)
        self.dataset = dataset if self.pixels is None else None
        self.length = len(dataset) if size is None else min(size, len(dataset))
        labels = labels_of(dataset)
        if labels is not None:
            self.labels = labels[: self.length]
            classes = getattr(dataset, "classes", None)
            if classes is not None:
                self.classes = [c if isinstance(c, str) else ", ".join(c) for c in classes]

    def __len__(self) -> int:
        return self.length

    def image(self, index: int) -> Tensor:
        if self.pixels is not None:
            return finish(self.pixels[index], self.name(index), self.channels, self.window)
        try:
            picture = self.dataset[index][0]
        except Exception as error:  # whatever a decoder makes of broken bytes
            raise UnreadableImage(self.name(index), error_text(error)) from error
        image = picture_to_tensor(picture, self.channels)
        return finish(image, self.name(index), self.channels, self.window)


def open_torchvision(
    kind: str,
    path: str,
    channels: int | None,
    *,
    split: str | None = None,
    size: int | None = None,
    download: bool = False,
    window: Window | None = None,
) -> TorchvisionImages:
    """`kind` is a name of `torchvision_classes`, `path` its folder."""
    dataset = _construct(kind, expand(path), split, download)
    title = f"{kind}/{split}" if split else kind
    return TorchvisionImages(dataset, title, channels, size, window)


def torchvision_classes() -> dict[str, type]:
    """Classes that open with a folder and at most a split, by snake-case name."""
    classes = {}
    for name in torchvision.datasets.__all__:
        cls = getattr(torchvision.datasets, name)
        parameters = inspect.signature(cls).parameters.values()
        needed = {p.name for p in parameters if p.default is p.empty and p.kind != p.VAR_KEYWORD}
        if "root" in needed and needed <= {"root", "split"}:
            snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name)
            classes[snake.lower()] = cls
    return classes


def _construct(kind: str, root: Path, split: str | None, download: bool) -> Dataset:
    cls = torchvision_classes()[kind]
    parameters = inspect.signature(cls).parameters
    if download and "download" not in parameters:
        raise UserError(f"{kind} cannot be downloaded by torchvision; fetch it by hand")
    # Said even where it is False: two of the classes would download by default.
    options = {"download": download} if "download" in parameters else {}
    refused = None
    for choice in _split_choices(kind, parameters, split):
        try:
            return cls(str(root), **choice, **options)
        except ValueError as error:
            refused = error  # an unknown split
        except (RuntimeError, OSError, ImportError) as error:
            if download or not re.search("not found|no such file", str(error), re.IGNORECASE):
                raise UserError(f"cannot open {kind}:{root}: {error_text(error)}") from error
            hint = "; add download=1 to fetch it" if "download" in parameters else ""
            raise FileNotFoundError(f"no {cls.__name__} data in {str(root)!r}{hint}") from error
    raise UserError(f"{kind}: {error_text(refused)}") from refused


def _split_choices(kind: str, parameters, split: str | None) -> list[dict]:
    """Constructor arguments that mean that split, in the order to try them."""
    if split is None:
        if parameters.get("split") is not None and parameters["split"].default is inspect._empty:
            raise UserError(f"{kind} needs a split: {kind}:DIR?split=NAME")
        return [{}]
    if "split" in parameters:
        return [{"split": name} for name in SPLITS.get(split, (split,))]
    if "train" in parameters:
        if split not in SPLITS:
            raise UserError(f"{kind} has no split {split!r}; choose from {', '.join(SPLITS)}")
        return [{"train": split == "train"}]
    raise UserError(f"{kind} has no splits; leave split={split} out")


def _pixels_of(dataset: Dataset) -> Tensor | None:
    """(n, C, H, W) uint8 of a data set that holds its images in memory, else None."""
    data = getattr(dataset, "data", None)
    if not isinstance(data, (np.ndarray, Tensor)) or len(data) != len(dataset):
        return None
    pixels = torch.as_tensor(data)
    if pixels.dtype != torch.uint8:
        return None
    if pixels.ndim == 3:
        return pixels[:, None]
    if pixels.ndim == 4 and pixels.shape[-1] in (1, 3):
        return pixels.permute(0, 3, 1, 2)
    return pixels if pixels.ndim == 4 and pixels.shape[1] in (1, 3) else None


def labels_of(dataset: Dataset) -> np.ndarray | None:
    """(n,) int64 class ids, from whichever attribute the class keeps them in; else None."""
    for name in ("targets", "labels", "_labels", "y", "_samples"):
        values = getattr(dataset, name, None)
        if values is None or len(values) != len(dataset):
            continue
        if name == "_samples":  # pairs of a path and a label
            values = [sample[1] for sample in values]
        labels = np.asarray(values)
        if labels.ndim == 1 and labels.dtype.kind in "iu" and (labels >= 0).any():
            return labels.astype(np.int64)
    return None


class HubImages(ImageData):
    """A data set of the package `datasets`. Images are decoded here: none loses bits, and a broken
    one does not end the run.

    Args:
        dataset: with a column of images.
        reading: keywords of `read_image`.
        image, label: columns; None: the first of images, the first of class labels.
        caption: column of a text, or a list of texts.

    Raises:
        UserError: if there is no such column.
    """

    def __init__(
        self,
        dataset,
        title: str,
        reading: dict,
        image: str | None = None,
        label: str | None = None,
        size: int | None = None,
        caption: str | None = None,
    ):
        import datasets

        self.title, self.reading = title, reading
        features = dataset.features
        self.column = image or _first_column(features, datasets.Image)
        label = label or _first_column(features, datasets.ClassLabel)
        for name, key in ((self.column, "image"), (label, "label"), (caption, "caption")):
            if (name is None and key == "image") or (name is not None and name not in features):
                raise UserError(
                    f"{title} has no column {name or 'of images'}; "
                    f"{key}=NAME is one of {', '.join(features)}"
                )
        self.dataset = dataset.select(range(min(size or len(dataset), len(dataset))))
        if label is not None:
            ids = [-1 if k is None else k for k in self.dataset[label]]
            self.labels = np.array(ids, dtype=np.int64)
            self.classes = getattr(features[label], "names", None)
        if caption is not None:
            self._take_captions(caption)
        if isinstance(features[self.column], datasets.Image):
            self.dataset = self.dataset.cast_column(self.column, datasets.Image(decode=False))

    def _take_captions(self, column: str) -> None:
        passed, self.texts = Counter(), []
        for value in self.dataset[column]:
            values = value if isinstance(value, list) else [value]
            self.texts.append([text for text in (clean_caption(v, passed) for v in values) if text])
        self.captioned = np.array([bool(texts) for texts in self.texts])
        self.passed_over = say_captions(passed, self.title)

    def captions(self, index: int) -> list[str]:
        return [] if self.captioned is None else self.texts[index]

    def __len__(self) -> int:
        return len(self.dataset)

    def image(self, index: int) -> Tensor:
        stored = self.dataset[index][self.column]
        stored = stored if isinstance(stored, dict) else {"bytes": stored}
        if isinstance(stored.get("bytes"), bytes):
            return read_open_file(io.BytesIO(stored["bytes"]), self.name(index), **self.reading)
        if not stored.get("path"):
            raise UnreadableImage(self.name(index), "the row holds no image")
        return read_image(stored["path"], **self.reading)


def _first_column(features: dict, kind: type) -> str | None:
    return next((name for name, feature in features.items() if isinstance(feature, kind)), None)


def open_hub(
    path: str,
    channels: int | None,
    *,
    split: str | None = None,
    size: int | None = None,
    config: str | None = None,
    image: str | None = None,
    label: str | None = None,
    caption: str | None = None,
    window: Window | None = None,
    page: int | None = None,
) -> HubImages:
    """`org/name` on the hub, or a folder: one that `save_to_disk` wrote, or one in a hub layout."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            "data of the kind hf needs the package datasets: pip install datasets"
        ) from error
    title = f"hf:{path}"
    place = expand(path)
    saved = any((place / name).is_file() for name in ("state.json", "dataset_dict.json"))
    try:
        if saved:
            found = datasets.load_from_disk(str(place))
        else:
            found = datasets.load_dataset(str(place) if place.exists() else path, config)
    except Exception as error:  # of the network, of the hub, of files
        raise UserError(f"cannot open {title}: {error_text(error)}") from error
    if isinstance(found, dict):
        found = found[choose_split(split, found, title)]
    elif split is not None:
        raise UserError(f"{title} has no splits; leave split={split} out")
    reading = {"channels": channels, "window": window, "page": page}
    title = f"{title}/{split}" if split else title
    return HubImages(found, title, reading, image, label, size, caption)
