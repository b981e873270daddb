"""Every kind of data behind one small class: `open_data("folder:/images?size=1000")`.

A spec is `kind[:path][?key=value&...]`; the kind may be left out for a folder or file that exists.

    folder:DIR                  all images below DIR; class = first sub-folder, or labels=FILE.csv
                                (columns file, label); split=NAME takes the sub-folder of that name
    list:FILE.txt, FILE.csv     a path a line, or columns file and label; relative to the list
    fashion_mnist:DIR, ...      any torchvision.datasets class in snake case, split=, download=1
    scenes                      generated: split=, seed=, resolution=, frames=

`size=N` keeps the first N images of any of them.
"""

import csv
import difflib
import inspect
import os
import re
from pathlib import Path

import numpy as np
import torch
import torchvision.datasets
from torch import Tensor
from torch.utils.data import Dataset

from data.pictures import EXTENSIONS, UnreadableImage, error_text, fit_channels, picture_to_tensor, read_image

KEYS = {
    "folder": ("split", "size", "labels"),
    "list": ("size",),
    "scenes": ("split", "size", "seed", "resolution", "frames"),
}
TORCHVISION_KEYS = ("split", "size", "download")
# What a data set may call the split that is asked for, best first.
SPLITS = {"train": ("train", "trainval"), "val": ("val", "valid", "validation", "test"), "test": ("test",)}


class ImageData(Dataset):
    """Images with or without labels; item i is (image, label or -1).

    `labels` is (n,) int64, -1 where an image has none, or None; `classes` are their names or None.
    """

    labels: np.ndarray | None = None
    classes: list[str] | None = None

    def __len__(self) -> int:
        raise NotImplementedError

    def image(self, index: int) -> Tensor:
        """(C, H, W) in the stored type, mostly uint8; raises UnreadableImage."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        """Where the image comes from, such as its path."""
        raise NotImplementedError

    def annotations(self, index: int) -> dict:
        """Boxes, masks, depth or keypoints, of the kinds of data that have them."""
        raise ValueError(f"{self.name(index)} has no annotations beyond its class; `scenes` has")

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.image(index), -1 if self.labels is None else int(self.labels[index])


class FileImages(ImageData):
    """Image files; `names` are class names, or None where there is none."""

    def __init__(
        self,
        root: Path,
        files: list[str],
        names: list[str | None] | None = None,
        channels: int | None = 3,
        size: int | None = None,
    ):
        self.root, self.channels = root, channels
        # Bytes in one array: a list of strings would be copied into every worker as it is read.
        self.files = np.array([os.fsencode(file) for file in files[:size]])
        if names is not None and any(name is not None for name in names):
            known = {name for name in names if name is not None}
            by_number = all(name.isdecimal() for name in known)
            self.classes = sorted(known, key=int if by_number else None)
            ids = {name: k for k, name in enumerate(self.classes)}
            self.labels = np.array([ids.get(name, -1) for name in names[:size]], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.files)

    def image(self, index: int) -> Tensor:
        return read_image(self.name(index), self.channels)

    def name(self, index: int) -> str:
        return str(self.root / os.fsdecode(self.files[index]))


class TorchvisionImages(ImageData):
    """A torchvision data set. One that holds its images as an array is read without going through
    PIL, which is most of the cost of a 28-pixel image."""

    def __init__(self, dataset: Dataset, name: str, channels: int | None = 3, size: int | None = None):
        self.title, self.channels = name, channels
        self.pixels = _pixels_of(dataset)
        self.dataset = dataset if self.pixels is None else None
        self.length = len(dataset) if size is None else min(size, len(dataset))
        labels = _labels_of(dataset)
        if labels is not None:
            self.labels = labels[: self.length]
            classes = getattr(dataset, "classes", None)
            if classes is not None:
                self.classes = [c if isinstance(c, str) else ", ".join(c) for c in classes]

    def __len__(self) -> int:
        return self.length

    def image(self, index: int) -> Tensor:
        if self.pixels is not None:
            return fit_channels(self.pixels[index], self.channels, self.name(index))
        try:
            picture = self.dataset[index][0]
        except Exception as error:  # whatever a decoder makes of broken bytes
            raise UnreadableImage(self.name(index), error_text(error)) from error
        return fit_channels(picture_to_tensor(picture, self.channels), self.channels, self.name(index))

    def name(self, index: int) -> str:
        return f"{self.title}/{index}"


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


def open_data(spec: str, channels: int | None = 3) -> ImageData:
    """The data that a spec names (grammar at the top of this file).

    Args:
        channels: of every image. Grey is repeated to 3, colour is reduced to its luminance for 1,
            transparency is dropped for both; None keeps what each file has.

    Raises:
        ValueError: for an unknown kind, key or value.
        FileNotFoundError: where there is no such folder or file, or no image in it.
    """
    kind, path, options = _parse(str(spec))
    size = options.get("size")
    if kind == "scenes":
        from data.scenes import Scenes  # generated data; nothing else needs its renderer

        scenes = Scenes(**options)
        return scenes if channels in (None, 3) else Recolored(scenes, channels)
    if not path:
        raise ValueError(f"{kind!r} needs a path: {kind}:PATH")
    place = Path(path).expanduser()
    if kind == "folder":
        return _open_folder(place, channels, **options)
    if kind == "list":
        return _open_list(place, channels, size)
    split = options.get("split")
    dataset = _open_torchvision(kind, place, split, options.get("download", False))
    return TorchvisionImages(dataset, f"{kind}/{split}" if split else kind, channels, size)


def match_classes(train: ImageData, val: ImageData) -> np.ndarray | None:
    """Labels of `val` as class ids of `train`, matched by name.

    Returns:
        (n,) int64, -1 for images without a class of `train`; None where either has no labels.

    Raises:
        ValueError: if they have no class in common.
    """
    if train.labels is None or val.labels is None:
        return None
    ids = {name: k for k, name in enumerate(_class_names(train))}
    names = _class_names(val)
    if not ids.keys() & names:
        raise ValueError(
            f"no class in common: train has {', '.join(list(ids)[:5])} ..., val has {', '.join(names[:5])} ..."
        )
    table = np.array([ids.get(name, -1) for name in names] + [-1])  # the last serves label -1
    return table[val.labels]


def open_labelled(train: str, val: str, channels: int | None = 3) -> tuple[ImageData, ImageData]:
    """Two data sets for a probe; labels of both are class ids of `train`, matched by name.

    Raises:
        ValueError: if one has no labels, or they have no class in common.
    """
    both = open_data(train, channels), open_data(val, channels)
    for spec, data in zip((train, val), both):
        if data.labels is None:
            raise ValueError(
                f"{spec} has no labels; a probe needs folders named by class, labels=FILE.csv, or a labelled data set"
            )
    both[1].labels = match_classes(*both)
    return both


def _class_names(data: ImageData) -> list[str]:
    return data.classes or [str(k) for k in range(int(data.labels.max()) + 1)]


def _parse(spec: str) -> tuple[str, str, dict]:
    """(kind, path, options) of a spec, checked against what the kind takes."""
    body, _, query = (spec, "", "") if Path(spec).expanduser().exists() else spec.partition("?")
    place = Path(body).expanduser()
    if body not in KEYS and place.exists():
        kind, path = "folder" if place.is_dir() else "list", body
    else:
        kind, colon, path = body.partition(":")
        kind = _known_kind(kind, spec, bool(colon))
    allowed = KEYS.get(kind, TORCHVISION_KEYS)
    options = {}
    for item in filter(None, query.split("&")):
        key, _, value = item.partition("=")
        if key not in allowed:
            raise ValueError(
                f"unknown key {key!r} in {spec!r}{_nearest(key, allowed)}; {kind} takes {', '.join(allowed)}"
            )
        options[key] = _value(key, value, spec)
    return kind, path, options


def _known_kind(kind: str, spec: str, colon: bool) -> str:
    known = {*KEYS, *_torchvision_classes()}
    # Underscores do not matter: imagenet is image_net.
    for name in known:
        if name.replace("_", "") == kind.replace("_", "").lower():
            return name
    nearest = _nearest(kind, known)
    kinds = f"{', '.join(KEYS)}, or a torchvision.datasets class in snake case such as cifar10, fashion_mnist, stl10"
    if (colon and len(kind) > 1 and os.sep not in kind) or nearest:
        raise ValueError(f"unknown kind {kind!r} in {spec!r}{nearest}; kinds are {kinds}")
    raise FileNotFoundError(f"no folder or file {spec.partition('?')[0]!r}; other kinds of data are {kinds}")


def _nearest(given: str, allowed) -> str:
    close = difflib.get_close_matches(given, sorted(allowed), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _value(key: str, text: str, spec: str) -> str | int | bool:
    if key in ("split", "labels"):
        return text
    if key == "download":
        if text not in ("0", "1"):
            raise ValueError(f"download is 0 or 1 in {spec!r}, not {text!r}")
        return text == "1"
    if not text.isdecimal() or (key == "size" and int(text) == 0):
        raise ValueError(f"{key} must be a whole number in {spec!r}, not {text!r}")
    return int(text)


def _open_folder(
    root: Path, channels: int | None, split: str | None = None, size: int | None = None, labels: str | None = None
) -> FileImages:
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {str(root)!r}")
    if split is not None:
        folders = [root / name for name in SPLITS.get(split, (split,))]
        below = root
        root = next((folder for folder in folders if folder.is_dir()), None)
        if root is None:
            raise FileNotFoundError(f"no folder {split!r} in {str(below)!r} for split={split}")
    files = sorted(_walk(root))
    if not files:
        raise FileNotFoundError(f"no image in {str(root)!r}; extensions are {' '.join(sorted(EXTENSIONS))}")
    if labels is None:
        names = [file.partition("/")[0] if "/" in file else None for file in files]
    else:
        given = Path(labels).expanduser()
        rows = _read_csv(given if given.exists() else root / given, ("file", "label"))
        label_of = {Path(row["file"]).as_posix(): row["label"] or None for row in rows}
        names = [label_of.get(file) for file in files]
        if not any(names):
            raise ValueError(
                f"{labels!r} names no image of {str(root)!r}; its column file holds paths relative to that folder"
            )
    return FileImages(root, files, names, channels, size)


def _walk(root: Path):
    """Paths relative to root, with forward slashes; hidden files and folders are passed over."""
    for folder, below, files in os.walk(root, followlinks=True):
        below[:] = [name for name in below if not name.startswith(".")]
        relative = Path(folder).relative_to(root)
        for file in files:
            if os.path.splitext(file)[1].lower() in EXTENSIONS and not file.startswith("."):
                yield (relative / file).as_posix()


def _open_list(path: Path, channels: int | None, size: int | None) -> FileImages:
    names = None
    if path.suffix.lower() in EXTENSIONS:
        files = [path.name]
    elif path.suffix.lower() == ".csv":
        rows = _read_csv(path, ("file",))
        files = [row["file"] for row in rows]
        names = [row.get("label") or None for row in rows]
    elif path.suffix.lower() == ".txt":
        lines = _open_text(path).read().splitlines()
        files = [line.strip() for line in lines if line.strip()]
    else:
        raise ValueError(f"{str(path)!r} is no list of images: a list ends in .txt or .csv")
    if not files:
        raise FileNotFoundError(f"{str(path)!r} lists no image")
    return FileImages(path.parent, files, names, channels, size)


def _open_text(path: Path):
    if not path.is_file():
        raise FileNotFoundError(f"no file {str(path)!r}")
    # utf-8-sig: spreadsheets write a byte order mark; surrogateescape: file names may be any bytes.
    return open(path, encoding="utf-8-sig", errors="surrogateescape", newline="")


def _read_csv(path: Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    with _open_text(path) as file:
        reader = csv.DictReader(file)
        missing = [name for name in columns if name not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(
                f"{str(path)!r} has no column {missing[0]!r}; its first line must name the columns {', '.join(columns)}"
            )
        return list(reader)


def _torchvision_classes() -> dict[str, type]:
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


def _open_torchvision(kind: str, root: Path, split: str | None, download: bool) -> Dataset:
    cls = _torchvision_classes()[kind]
    parameters = inspect.signature(cls).parameters
    if download and "download" not in parameters:
        raise ValueError(f"{kind} cannot be downloaded by torchvision; fetch it by hand")
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
                raise ValueError(f"cannot open {kind}:{root}: {error_text(error)}") from error
            hint = "; add download=1 to fetch it" if "download" in parameters else ""
            raise FileNotFoundError(f"no {cls.__name__} data in {str(root)!r}{hint}") from error
    raise ValueError(f"{kind}: {error_text(refused)}") from refused


def _split_choices(kind: str, parameters, split: str | None) -> list[dict]:
    """Constructor arguments that mean that split, in the order to try them."""
    if split is None:
        if parameters.get("split") is not None and parameters["split"].default is inspect._empty:
            raise ValueError(f"{kind} needs a split: {kind}:DIR?split=NAME")
        return [{}]
    if "split" in parameters:
        return [{"split": name} for name in SPLITS.get(split, (split,))]
    if "train" in parameters:
        if split not in SPLITS:
            raise ValueError(f"{kind} has no split {split!r}; choose from {', '.join(SPLITS)}")
        return [{"train": split == "train"}]
    raise ValueError(f"{kind} has no splits; leave split={split} out")


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


def _labels_of(dataset: Dataset) -> np.ndarray | None:
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
