"""Every kind of data behind one small class: `open_data("folder:/images?size=1000")`.

A spec is `kind[:path][?key=value&...]`; the kind may be left out for a folder or file that exists.

    folder:DIR                  all images below DIR; class = first sub-folder, or labels=FILE.csv
                                (columns file, label); split=NAME takes the sub-folder of that name;
                                marks=FILE.csv or a COCO .json: boxes, masks (data/guided.py)
    list:FILE.txt, FILE.csv     paths, or columns file and label, relative to the list; marks=; a
                                column caption, of which a file may have several rows
    tar:DIR/{0000..0127}.tar    WebDataset shards; class from the .cls or .json beside an image,
                                caption from the .txt
    npz:FILE.npz                MedMNIST's layout, split=
    hf:ORG/NAME or hf:DIR       Hugging Face hub (package datasets); split= config= image= label=
                                caption=
    python:MODULE:CALLABLE      one's own Dataset; all further keys go to the callable, as text
    fashion_mnist:DIR, ...      any torchvision.datasets class in snake case, split=, download=1
    tile:DIR/*.tif              windows of large images: size= (pixels) stride= bands= scale=
                                nodata= first= mask= height= (data/sources/tiles.py)
    mix:FILE.yaml               several of these with weights: data/sources/mixture.py
    scenes                      generated: split=, seed=, resolution=, frames=, distractors=

`size=N` keeps the first N images of any but mix and tile; `window=CENTRE,WIDTH` makes these values
of the files (Hounsfield units in CT) the range 0 to 1; `page=K` takes page K of every TIFF, from 0.

To add a kind of data, write one file beside this one with a function that returns an `ImageData`,

    def open_mine(path: str, channels: int | None, *, size: int | None = None) -> ImageData

and add its line to KINDS. The keyword arguments are the keys of the spec; an annotation of str,
int, bool or Window says how their text is read.
"""

import difflib
import inspect
import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from data.images import Chosen, ImageData, class_names
from data.pictures import UnreadableImage, Window
from data.scenes.scenes import open_scenes
from data.sources.arrays import is_npz_of_images, open_npz, open_python
from data.sources.folder import open_folder, open_list
from data.sources.mixture import Mixture, read_mixture
from data.sources.published import open_hub, open_torchvision, torchvision_classes
from data.sources.tar import open_tar
from data.sources.tiles import open_tiles
from errors import UserError
from files import expand, split_query

__all__ = [
    "ImageData",
    "UnreadableImage",
    "known_images",
    "match_classes",
    "open_data",
    "open_labelled",
    "open_with_labels",
]


def open_data(spec: str, channels: int | None = 3, base: Path = Path()) -> ImageData:
    """The data that a spec names (grammar at the top of this file).

    Args:
        base: the folder that relative paths start from.
        channels: of every image. Grey is repeated to 3, colour is reduced to its luminance for 1,
            transparency is dropped for both; None keeps what each file has.

    Raises:
        UserError: for an unknown kind, key or value, or a package that is not installed.
        FileNotFoundError: where there is no such folder or file, or no image in it.
    """
    kind, path, options = _parse(str(spec), base)
    if not path and kind != "scenes":
        raise UserError(f"{kind!r} needs a path: {kind}:PATH")
    data = _opener(kind)(path, channels, **options)
    data.origin = _origin(kind, path, options)
    data.window = options.get("window")
    return data


def _origin(kind: str, path: str, options: dict) -> str:
    """What a spec says of its images, but for where they lie and what their names say already."""
    parameters = inspect.signature(_opener(kind)).parameters
    left_out = {"labels", "download"} | ({"split"} if kind in NAMED else set())
    left_out |= set() if kind == "tile" else {"size"}  # of tile, the size of windows
    said = {}
    for key, value in sorted(options.items()):
        usual = key in parameters and parameters[key].default == value
        if key not in left_out and not usual:
            said[key] = Path(value).name if isinstance(value, str) else value
    if kind in NAMED:
        return f"tile?{said}" if kind == "tile" else repr(said)
    if kind in KINDS:
        return f"{kind}:{Path(path).name if expand(path).exists() else path}?{said}"
    return f"{kind}?{said}"


def _open_mixture(path: str, channels: int | None) -> Mixture:
    file = expand(path)
    items = read_mixture(file)
    sources = []
    for spec, _, _ in items:
        if _parse(spec, file.parent)[0] == "mix":
            raise UserError(f"{spec!r} in {str(file)!r} is itself a mixture; name its sources here")
        sources.append(open_data(spec, channels, file.parent))
    try:
        return Mixture(
            sources, [weight for _, weight, _ in items], [alone for _, _, alone in items]
        )
    except UserError as error:
        raise UserError(f"{str(file)!r}: {error}") from error


KINDS = {
    "folder": open_folder,
    "list": open_list,
    "tar": open_tar,
    "npz": open_npz,
    "hf": open_hub,
    "python": open_python,
    "tile": open_tiles,
    "mix": _open_mixture,
    "scenes": open_scenes,
}
TABLES = ("labels", "marks")  # keys that name a file
NAMED = ("folder", "list", "tar", "tile")  # kinds whose images have names
# The kind of a file that exists, by its extension; otherwise it is a list.
KIND_OF_EXTENSION = {".tar": "tar", ".yaml": "mix", ".yml": "mix"}


def _opener(kind: str) -> Callable[..., ImageData]:
    return KINDS.get(kind) or partial(open_torchvision, kind)


def _parse(spec: str, base: Path = Path()) -> tuple[str, str, dict]:
    """(kind, path, options) of a spec, checked against what the kind takes."""
    body, query = split_query(spec, base)
    place = base / expand(body)
    if body not in KINDS and place.exists():
        kind, path = _kind_of_file(place), str(place)
    else:
        kind, colon, path = body.partition(":")
        kind = _known_kind(kind, spec, bool(colon))
        path = _from(base, kind, path)
    parameters = inspect.signature(_opener(kind)).parameters.values()
    allowed = {p.name: p.annotation for p in parameters if p.kind == p.KEYWORD_ONLY}
    takes_any = any(p.kind == p.VAR_KEYWORD for p in parameters)
    options = {}
    for item in filter(None, query.split("&")):
        key, _, text = item.partition("=")
        if key in allowed:
            options[key] = _value(key, text, allowed[key], spec)
            if key in TABLES and (base / expand(text)).exists():
                options[key] = str(base / expand(text))
        elif takes_any:
            options[key] = text
        else:
            takes = f"takes {', '.join(allowed)}" if allowed else "takes no keys"
            raise UserError(
                f"unknown key {key!r} in {spec!r}{_nearest(key, allowed)}; {kind} {takes}"
            )
    return kind, path, options


def _from(base: Path, kind: str, path: str) -> str:
    """The path of a kind, from `base`; a name in a hub or of a module stays as it is."""
    if not path or kind in ("python", "scenes"):
        return path
    if kind == "hf" and not (base / expand(path)).exists():
        return path
    return str(base / expand(path))


def _kind_of_file(place: Path) -> str:
    if place.is_dir():
        return "folder"
    if place.suffix.lower() == ".npz" and is_npz_of_images(place):
        return "npz"
    return KIND_OF_EXTENSION.get(place.suffix.lower(), "list")


def _known_kind(kind: str, spec: str, colon: bool) -> str:
    known = {*KINDS, *torchvision_classes()}
    # Underscores do not matter: imagenet is image_net.
    for name in known:
        if name.replace("_", "") == kind.replace("_", "").lower():
            return name
    nearest = _nearest(kind, known)
    kinds = (
        f"{', '.join(KINDS)}, or a torchvision.datasets class in snake case "
        "such as cifar10, fashion_mnist, stl10"
    )
    if (colon and len(kind) > 1 and os.sep not in kind) or nearest:
        raise UserError(f"unknown kind {kind!r} in {spec!r}{nearest}; kinds are {kinds}")
    raise FileNotFoundError(
        f"no folder or file {split_query(spec)[0]!r}; other kinds of data are {kinds}"
    )


def _nearest(given: str, allowed) -> str:
    close = difflib.get_close_matches(given, sorted(allowed), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _value(key: str, text: str, kind: type, spec: str) -> str | int | bool | Window:
    """The text of a key as the annotation of its argument says."""
    if kind in (str, str | None):
        return text
    if kind == Window | None:
        return _window(text, spec)
    if kind is bool:
        if text not in ("0", "1"):
            raise UserError(f"{key} is 0 or 1 in {spec!r}, not {text!r}")
        return text == "1"
    if not text.isdecimal() or (key in ("size", "stride", "first") and int(text) == 0):
        raise UserError(f"{key} must be a whole number in {spec!r}, not {text!r}")
    return int(text)


def _window(text: str, spec: str) -> Window:
    try:
        centre, width = (float(part) for part in text.split(","))
    except ValueError:
        centre, width = math.nan, math.nan
    if not (math.isfinite(centre) and math.isfinite(width) and width > 0):
        raise UserError(
            f"window is CENTRE,WIDTH with a positive width in {spec!r}, such as 40,400; "
            f"not {text!r}"
        )
    return centre, width


def match_classes(train: ImageData, val: ImageData) -> np.ndarray | None:
    """Labels of `val` as class ids of `train`, matched by name.

    Returns:
        (n,) int64, -1 for images of a class of which `train` has no image; None where either has
        no labels.

    Raises:
        UserError: if they have no class in common.
    """
    if train.labels is None or val.labels is None:
        return None
    known, names = class_names(train), class_names(val)
    ids = {known[k]: k for k in np.unique(train.labels[train.labels >= 0])}
    table = np.array([ids.get(name, -1) for name in names] + [-1])  # the last serves label -1
    labels = table[val.labels]
    if not (labels >= 0).any():
        first, second = ", ".join(list(ids)[:5]), ", ".join(names[:5])
        raise UserError(f"no class in common: train has {first} ..., val has {second} ...")
    return labels


def known_images(train: ImageData, data: ImageData, spec: str) -> Chosen:
    """The images of `data` of a class of `train`, whose ids are their labels.

    `left_out` is the number of the others; a line of `passed_over` says what they are.

    Args:
        spec: what `data` was opened with.

    Raises:
        UserError: if they have no class in common.
    """
    labels = match_classes(train, data)
    chosen = Chosen(data, np.flatnonzero(labels >= 0))
    chosen.labels, chosen.classes = labels[chosen.rows], train.classes
    chosen.left_out = len(data) - len(chosen)
    if chosen.left_out:
        line = f"{spec}: {chosen.left_out} of {len(data)} images left out: "
        chosen.passed_over = [*data.passed_over, line + _why_left_out(data, labels)]
    return chosen


def _why_left_out(data: ImageData, labels: np.ndarray, most: int = 10) -> str:
    """How many of the images with `labels` -1 have none, and the classes of the others."""
    unlabelled, unknown = data.labels < 0, (labels < 0) & (data.labels >= 0)
    reasons = [f"{unlabelled.sum()} without a label"] if unlabelled.any() else []
    if unknown.any():
        names = [class_names(data)[k] for k in np.unique(data.labels[unknown])]
        listed = ", ".join(names[:most]) + (", ..." if len(names) > most else "")
        reasons.append(f"{unknown.sum()} of classes that train lacks ({listed})")
    return ", ".join(reasons)


LABELS_OF_KINDS = {
    "folder": "folders named by class, or labels=FILE.csv",
    "list": "a .csv with the columns file and label",
    "tar": "a .cls or .json with the class beside each image",
    "npz": "one class an image in an array called labels, or SPLIT_labels",
    "python": "one class an image in an attribute targets or labels of the Dataset",
    "hf": "label=COLUMN",
}


def _labels_of_kind(spec: str) -> str:
    return LABELS_OF_KINDS.get(_parse(spec)[0], "a labelled data set")


def open_with_labels(spec: str, channels: int | None = 3) -> ImageData:
    """The data of a spec, at least one of whose images has a label.

    Raises:
        UserError: if none has.
    """
    data = open_data(spec, channels)
    if data.labels is None or not (data.labels >= 0).any():
        found = "".join(f" ({line})" for line in data.passed_over)
        raise UserError(f"{spec} has no labels; a probe needs {_labels_of_kind(spec)}{found}")
    held, classes = len(np.unique(data.labels[data.labels >= 0])), len(class_names(data))
    if held < classes and "size" in _parse(spec)[2]:
        line = f"{spec}: the first {len(data)} images are of {held} of {classes} classes"
        data.passed_over = [*data.passed_over, line]
    return data


def open_labelled(train: str, val: str, channels: int | None = 3) -> tuple[ImageData, Chosen]:
    """Two data sets for a probe, of `val` the `known_images`.

    Raises:
        UserError: if one has no labels, or they have no class in common.
    """
    first, second = open_with_labels(train, channels), open_with_labels(val, channels)
    return first, known_images(first, second, val)
