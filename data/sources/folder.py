"""Image files in a folder or named by a list."""

import contextlib
import itertools
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from torch import Tensor

from data.captions import clean_caption, say_captions
from data.guided import Marks, read_coco
from data.images import SPLITS, ImageData, number_classes
from data.pictures import EXTENSIONS, UnreadableImage, Window, image_size, read_image
from data.sources.tables import open_text, read_csv
from errors import UserError
from files import expand, expand_listed

CHECKED = 20  # marked images whose marks are checked at the start


class FileImages(ImageData):
    """Image files.

    Args:
        names: class names, or None where there is none.
        reading: keywords of `read_image`.
        size: first so many.
        marks: boxes or masks of some of the files.
        captions: of each file, or None.
    """

    def __init__(
        self,
        root: Path,
        files: list[str],
        names: list[str | None] | None,
        reading: dict,
        size: int | None = None,
        marks: Marks | None = None,
        captions: list[list[str]] | None = None,
    ):
        self.root, self.reading, self.marks = root, reading, marks
        self.passed_over = []
        # Bytes in one array: a list of strings would be copied into every worker as it is read.
        self.files = np.array([os.fsencode(file) for file in files[:size]])
        if names is not None:
            # Of all files: the first few must number their classes as all of them do.
            labels, self.classes = number_classes(names)
            self.labels = None if labels is None else labels[:size]
        if captions is not None:
            self.texts = captions[:size]
            self.captioned = np.array([bool(texts) for texts in self.texts])
        if marks is not None:
            self._check_marks()

    def captions(self, index: int) -> list[str]:
        return [] if self.captioned is None else self.texts[index]

    def __len__(self) -> int:
        return len(self.files)

    def image(self, index: int) -> Tensor:
        return read_image(self.name(index), **self.reading)

    def name(self, index: int) -> str:
        return str(self.root / os.fsdecode(self.files[index]))

    def files_below(self) -> list[bytes]:
        return self.files.tolist()

    def annotations(self, index: int) -> dict:
        if self.marks is None:
            return super().annotations(index)
        file = os.fsdecode(self.files[index])
        if file not in self.marks:
            return self.marks.of(file)
        try:
            size = image_size(self.name(index), **self.reading)
        except UnreadableImage:
            size = None
        return self.marks.of(file, size)

    def _check_marks(self) -> None:
        """Of the first few marked images; of the others when they are used."""
        files = map(os.fsdecode, self.files)
        marked = (index for index, file in enumerate(files) if file in self.marks)
        for index in itertools.islice(marked, CHECKED):
            with contextlib.suppress(UnreadableImage):
                self.annotations(index)


def open_folder(
    path: str,
    channels: int | None,
    *,
    split: str | None = None,
    size: int | None = None,
    labels: str | None = None,
    marks: str | None = None,
    window: Window | None = None,
    page: int | None = None,
) -> FileImages:
    """All images below a folder; see the grammar in data/sources/specs.py."""
    root = expand(path)
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {str(root)!r}")
    if split is not None:
        root = _split_folder(root, split)
    unknown = Counter()
    files = sorted(_walk(root, unknown))
    marked = _read_marks(root, marks, files)
    if marked is not None:
        masks = marked.mask_files(root)
        files = [file for file in files if file not in masks]
    if not files:
        extensions = " ".join(sorted(EXTENSIONS))
        raise FileNotFoundError(f"no image in {str(root)!r}; extensions are {extensions}")
    said = []
    if labels is None:
        names = [file.partition("/")[0] if "/" in file else None for file in files]
    else:
        names, said = _read_labels(root, labels, files)
    reading = {"channels": channels, "window": window, "page": page}
    data = FileImages(root, files, names, reading, size, marked)
    data.passed_over += said
    data.passed_over += _unmatched_marks(marks, marked, files)
    if unknown:
        kinds = ", ".join(f"{count} {name}" for name, count in sorted(unknown.items()))
        data.passed_over.append(
            f"{root}: {sum(unknown.values())} files of unknown extensions passed over ({kinds})"
        )
    return data


def _read_labels(root: Path, given: str, files: list[str]) -> tuple[list[str | None], list[str]]:
    """The class names of the files, and what of the table is not used."""
    rows = read_csv(_beside(root, given), ("file", "label"))
    label_of = {Path(row["file"]).as_posix(): row["label"].strip() or None for row in rows}
    names = [label_of.get(file) for file in files]
    if not any(names):
        raise UserError(
            f"{given!r} names no image of {str(root)!r}; "
            "its column file holds paths relative to that folder"
        )
    return names, _unmatched(given, "labels", label_of.keys() - set(files), len(label_of))


def _unmatched(given: str, what: str, left: set[str], count: int) -> list[str]:
    if not left:
        return []
    return [f"{given}: {len(left)} of {count} {what} match no image, such as {min(left)}"]


def _unmatched_marks(given: str | None, marks: Marks | None, files: list[str]) -> list[str]:
    if marks is None:
        return []
    named = {*marks.masks, *marks.boxes}
    return _unmatched(given, "marked files", named - set(files), len(named))


def _split_folder(root: Path, split: str) -> Path:
    for name in SPLITS.get(split, (split,)):
        if (root / name).is_dir():
            return root / name
    raise FileNotFoundError(f"no folder {split!r} in {str(root)!r} for split={split}")


def open_list(
    path: str,
    channels: int | None,
    *,
    size: int | None = None,
    marks: str | None = None,
    window: Window | None = None,
    page: int | None = None,
) -> FileImages:
    """The images that a .txt or .csv names, or the one image at that path."""
    file = expand(path)
    extension = file.suffix.lower()
    names = captions = None
    said = []
    if extension in EXTENSIONS:
        files = [file.name]
    elif extension == ".csv":
        rows = read_csv(file, ("file",))
        if rows and "caption" in rows[0]:
            rows, captions, said = _join_captions(rows, path)
        files = [expand_listed(row["file"]) for row in rows]
        names = [row.get("label", "").strip() or None for row in rows]
    elif extension == ".txt":
        with open_text(file) as opened:
            lines = opened.read().splitlines()
        files = [expand_listed(line.strip()) for line in lines if line.strip()]
    else:
        raise UserError(f"{str(file)!r} is no list of images: a list ends in .txt or .csv")
    if not files:
        raise FileNotFoundError(f"{str(file)!r} lists no image")
    root = file.parent
    reading = {"channels": channels, "window": window, "page": page}
    marked = _read_marks(root, marks, files)
    data = FileImages(root, files, names, reading, size, marked, captions)
    data.passed_over += said + _unmatched_marks(marks, marked, files)
    return data


def _join_captions(rows: list[dict], title: str) -> tuple[list[dict], list[list[str]], list[str]]:
    """The first row of each file, the captions of all its rows, and what was passed over."""
    passed, first, captions = Counter(), {}, {}
    for row in rows:
        first.setdefault(row["file"], row)
        texts = captions.setdefault(row["file"], [])
        if text := clean_caption(row["caption"], passed):
            texts.append(text)
    return list(first.values()), list(captions.values()), say_captions(passed, title)


def _beside(root: Path, given: str) -> Path:
    path = expand(given)
    return path if path.exists() else root / path


def _read_marks(root: Path, given: str | None, files: list[str]) -> Marks | None:
    if given is None:
        return None
    path = _beside(root, given)
    coco = path.suffix == ".json"
    rows = [] if coco else read_csv(path, ("file",))
    try:
        marks = read_coco(path) if coco else Marks(rows, path.parent)
    except UserError as error:
        raise UserError(f"{given}: {error}") from error
    if not any(file in marks for file in files):
        raise UserError(
            f"{given!r} marks no image of {str(root)!r}; its column file holds paths as in the data"
        )
    return marks


def _walk(root: Path, unknown: Counter) -> Iterator[str]:
    """Paths relative to root, with forward slashes; hidden files and folders are passed over.

    Each folder is listed once, under its own path rather than that of a link to it: a link to a
    parent would have no end. Extensions of other files are counted in `unknown`.
    """
    seen, waiting = set(), [root]
    while waiting:
        links = []
        for start in waiting:
            yield from _walk_without_links(root, start, seen, links, unknown)
        waiting = sorted(links)


def _walk_without_links(
    root: Path, start: Path, seen: set, links: list[Path], unknown: Counter
) -> Iterator[str]:
    for folder, below, files in os.walk(start):
        stat = os.stat(folder)
        if (stat.st_dev, stat.st_ino) in seen:
            below.clear()
            continue
        seen.add((stat.st_dev, stat.st_ino))
        below[:] = sorted(name for name in below if not name.startswith("."))
        paths = [Path(folder, name) for name in below]
        links += [path for path in paths if path.is_symlink()]
        relative = Path(folder).relative_to(root)
        for file in files:
            extension = os.path.splitext(file)[1].lower()
            if file.startswith("."):
                continue
            if extension in EXTENSIONS:
                yield (relative / file).as_posix()
            else:
                unknown[extension or "no extension"] += 1
