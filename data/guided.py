"""Label-guided crops (DINO-MX, arXiv 2511.01610; DINO-LG, arXiv 2411.07976).

Marks (boxes or masks of a few images or of all) say where to cut; no label enters the loss. With a
set probability a local crop, by choice a global one too, is moved to where it shows a marked place.
Its size, mirroring and colours stay as drawn, as do all crops of images without a mark. The papers
give neither the probability nor how a crop lies around the mark: that is ours.
"""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.images import ImageData, NoAnnotations, first_annotations
from data.pictures import read_image
from data.sources.tables import LINE
from errors import UserError
from files import expand_listed

# Purposes of random numbers; those below are the loader's and the mixture's.
GUIDES, MARKED = range(24, 26)
BOX = ("x0", "y0", "x1", "y1")


@dataclass(frozen=True)
class Guidance:
    """How often crops follow marks.

    Args:
        probability: of a crop to follow a mark, where its image has one.
        global_crops: whether that holds for the global crops too.
        share: of the images, whose marks are used; always the same ones.
    """

    probability: float
    global_crops: bool = False
    share: float = 1.0

    def targets(
        self, data: ImageData, index: int, position: int, seed: int, global_count: int, count: int
    ) -> Tensor:
        """Places that the crops of an image must show.

        A function of image, position in the stream, and seed.

        Args:
            data: with `annotations(index)`.
            global_count: of the `count` crops, those that come first.

        Returns:
            (count, 2) float32 row and column in pixels of the image; NaN for the crops that stay
            where they are.
        """
        u = np.random.default_rng([seed, GUIDES, position]).random((count, 4))
        follow = u[:, 0] < self.probability
        if not self.global_crops:
            follow[:global_count] = False
        points = np.full((count, 2), np.nan, dtype=np.float32)
        if follow.any() and self._uses(index, seed):
            points[follow] = marked_points(annotations_of(data, index), u[follow, 1:])
        return torch.from_numpy(points)

    def _uses(self, index: int, seed: int) -> bool:
        drawn = np.random.SeedSequence([seed, MARKED, index]).generate_state(1)[0] / 2**32
        return drawn < self.share


def marked_points(notes: dict, u: np.ndarray) -> np.ndarray:
    """Random places within marks.

    They are uniform in a box drawn uniformly, so that small things count as much as large ones.
    Without boxes they are uniform over the pixels of the mask that are neither 0 nor 255
    (background, unknown).

    Args:
        notes: `boxes` (m, 4) x0, y0, x1, y1 or `mask` (H, W), in pixels of the image; or neither.
        u: (n, 3) uniform in [0, 1).

    Returns:
        (n, 2) row and column; NaN where there is no mark.
    """
    boxes = np.asarray(notes.get("boxes", ()), dtype=np.float64).reshape(-1, 4)
    if len(boxes):
        chosen = boxes[(u[:, 0] * len(boxes)).astype(int)]
        low, high = chosen[:, 1::-1], chosen[:, :1:-1]
        return low + u[:, 1:] * (high - low)
    mask = np.asarray(notes.get("mask", np.zeros((1, 1))))
    pixels = np.flatnonzero((mask > 0) & (mask != 255))
    if not len(pixels):  # a mask of 0 and 255 alone: 255 is the mark
        pixels = np.flatnonzero(mask > 0)
    if not len(pixels):
        return np.full((len(u), 2), np.nan)
    chosen = pixels[(u[:, 0] * len(pixels)).astype(int)]
    return np.stack(np.divmod(chosen, mask.shape[1]), 1) + u[:, 1:]


def has_marks(data: ImageData, index: int) -> bool:
    """Whether an image has a box, or a mask with a marked pixel."""
    return not np.isnan(marked_points(annotations_of(data, index), np.zeros((1, 3)))).any()


def move_to_points(
    boxes: np.ndarray, points: np.ndarray, u: np.ndarray, sizes: np.ndarray
) -> np.ndarray:
    """Moves crops, inside their images, to where they contain their points.

    Each point lies in the middle half of its crop, at random, unless the image's border forbids
    it: a model must not learn that what matters is in the centre.

    Args:
        boxes: (n, 4) int64 top, left, height, width in pixels.
        points: (n, 2) row and column; NaN leaves a box as it is.
        u: (n, 2) uniform in [0, 1): down and across.
        sizes: (n, 2) height and width of the images.
    """
    extent, pixel = boxes[:, 2:], np.clip(np.floor(points), 0, sizes - 1)
    corner = np.clip(np.rint(points - extent * (0.25 + 0.5 * u)), pixel - extent + 1, pixel)
    corner = np.clip(corner, 0, sizes - extent)
    corner = np.where(np.isnan(points), boxes[:, :2], np.nan_to_num(corner).astype(np.int64))
    return np.concatenate([corner, extent], 1)


# ----------------------------------------------------------------- where marks come from


def annotations_of(data: ImageData, index: int) -> dict:
    """Empty where this image has none, which in a mixture of sources is no mistake."""
    try:
        return data.annotations(index)
    except NoAnnotations:
        return {}


def require_marks(data: ImageData, spec: str) -> None:
    """
    Raises:
        UserError: if no source of the data has boxes or masks.
    """
    for source in getattr(data, "sources", [data]):
        if {"boxes", "mask"} & first_annotations(source).keys():
            return
    raise UserError(
        f"crops.guided is set, but {spec} has neither boxes nor masks; "
        f"give a folder or list ?marks=FILE.csv with the columns file, {', '.join(BOX)} "
        "or file, mask"
    )


class Marks:
    """Marks of files, from the rows of a CSV file.

    A row is a box (`file, x0, y0, x1, y1` in pixels, and `label` if there are several classes) or a
    mask (`file, mask`: the path of a picture of the image's size that holds classes; 0 is
    background, 255 unknown). Crops are guided to what is not 0.

    Args:
        folder: of the CSV file; paths of masks are relative to it.
        classes: names in the order of their numbers; None takes those of the column label, sorted.

    Raises:
        UserError: for columns or values that say neither.
    """

    def __init__(
        self, rows: Iterable[dict[str, str]], folder: Path, classes: Sequence[str] | None = None
    ):
        self.folder, self.masks, self.boxes, self.lines = folder, {}, {}, {}
        self.labels: dict[str, list[str]] = {}
        for row in rows:
            file = Path(expand_listed(row["file"])).as_posix()
            if row.get("mask"):
                self.masks[file] = expand_listed(row["mask"])
            else:
                self.boxes.setdefault(file, []).append(_box(row))
                self.lines.setdefault(file, []).append(row.get(LINE, "?"))
                self.labels.setdefault(file, []).append(row.get("label") or "object")
        named = {label for labels in self.labels.values() for label in labels}
        self.classes = sorted(named) if classes is None else list(classes)
        if self.boxes and all(max(box) <= 1 for boxes in self.boxes.values() for box in boxes):
            file, boxes = next(iter(self.boxes.items()))
            raise UserError(
                f"line {self.lines[file][0]}, {file}: the box {boxes[0]}, as all boxes, lies in "
                "[0, 1]; are these shares? Marks are in pixels of the image"
            )

    def mask_files(self, root: Path) -> set[str]:
        """The masks, relative to a folder of images, that are not themselves marked."""
        root, folder = os.path.realpath(root), os.path.realpath(self.folder)
        paths = (os.path.relpath(os.path.join(folder, mask), root) for mask in self.masks.values())
        return {path for path in (Path(path).as_posix() for path in paths) if path not in self}

    def __contains__(self, file: str) -> bool:
        return file in self.masks or file in self.boxes

    def of(self, file: str, size: tuple[int, int] | None = None) -> dict[str, np.ndarray]:
        """`mask` (H, W) of classes, 255 unknown, or `boxes` (m, 4) float32 and `box_labels` (m,)
        int64; empty without marks.

        Args:
            size: height and width in pixels of the image, which the marks must fit.

        Raises:
            UserError: if they do not.
        """
        if file in self.masks:
            mask = read_mask(self.folder / self.masks[file])
            if size is not None and tuple(mask.shape) != tuple(size):
                raise UserError(
                    f"{self.masks[file]}: a mask of {mask.shape[0]} x {mask.shape[1]} pixels, "
                    f"its image {file} has {size[0]} x {size[1]}"
                )
            return {"mask": mask}
        if file not in self.boxes:
            return {}
        boxes = np.array(self.boxes[file], dtype=np.float32)
        if size is not None:
            self._require_inside(file, boxes, size)
        labels = [self.classes.index(label) for label in self.labels[file]]
        return {"boxes": boxes, "box_labels": np.array(labels, dtype=np.int64)}

    def _require_inside(self, file: str, boxes: np.ndarray, size: tuple[int, int]) -> None:
        height, width = size
        # A pixel beyond the border is rounding; annotation tools write it.
        inside = (boxes >= -1) & (boxes <= np.array([width, height, width, height]) + 1)
        for box, line, fits in zip(boxes, self.lines[file], inside.all(1), strict=True):
            if not fits:
                raise UserError(
                    f"line {line}, {file}: the box {box.tolist()} lies outside its image of "
                    f"{width} x {height} pixels (x, y)"
                )


def read_coco(path: Path) -> Marks:
    """The boxes of a COCO file of instances; crowds and boxes without extent are left out.

    Raises:
        UserError: if it is no such file.
    """
    try:
        held = json.loads(path.read_text())
        files = {image["id"]: image["file_name"] for image in held["images"]}
        names = {one["id"]: one["name"] for one in held["categories"]}
        rows = []
        for number, one in enumerate(held["annotations"], start=1):
            x, y, width, height = one["bbox"]
            if min(width, height) > 0 and not one.get("iscrowd", 0):
                box = dict(zip(BOX, (x, y, x + width, y + height), strict=True))
                row = {"file": files[one["image_id"]], "label": names[one["category_id"]]}
                rows.append(row | box | {LINE: f"{number} of the annotations"})
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            "this is no COCO file of instances with images, categories and annotations with bbox "
            f"({error!r})"
        ) from error
    return Marks(rows, path.parent, list(names.values()))


def read_mask(path: Path) -> np.ndarray:
    """(H, W) uint8 or int32, the numbers that the file stores: of a palette, not its colours.

    Raises:
        UnreadableImage: if it cannot be decoded.
        UserError: if it is coloured.
    """
    try:
        with Image.open(path) as picture:
            if picture.mode == "P":
                return np.array(picture)
    except (OSError, SyntaxError):  # no picture, or none that Pillow reads
        pass
    image = read_image(path, None)
    if len(image) > 1 and not (image[1:3] == image[:1]).all():
        raise UserError(f"{path} is coloured; a mask holds the number of a class in each pixel")
    mask = image[0].numpy()
    return mask if mask.dtype == np.uint8 else mask.astype(np.int32)


def _box(row: dict[str, str]) -> list[float]:
    try:
        box = [float(row[name]) for name in BOX]
    except (KeyError, TypeError, ValueError):
        box = []
    if not box or not (np.isfinite(box).all() and box[0] < box[2] and box[1] < box[3]):
        raise UserError(
            f"{row} marks nothing; "
            f"give {', '.join(BOX)} in pixels with x0 < x1 and y0 < y1, or mask"
        )
    return box
