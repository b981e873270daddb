"""Data with annotations for dense probes: whole images at the model's size, their annotations at
full size."""

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.images import ImageData, first_annotations
from data.pictures import UnreadableImage
from data.pixels import normalize, resize, to_unit
from errors import UserError

MAX_PATCHES = 2**16  # of one whole image, 4096 x 4096 pixels at 16; attention grows as its square


class Annotated(Dataset):
    """Whole images for a frozen model, each with one annotation; nothing is cut off.

    Item i is (float32 (C, h, w), annotation, i). An annotation is what `annotations(i)` holds under
    `kind`, as a tensor of its own size: a map is not resized with the image. With several kinds it
    is a dictionary; one with boxes also has `shape`, height and width of the image as stored.

    Args:
        kind: such as "mask", "instance", "depth", "keypoints", "boxes"; several of them, or ().
        size: short side in pixels of what the model sees, or (height, width) exactly.
        multiple: sides are rounded to multiples of it, so that whole patches cover the image.
        mean, std, interpolation: as in `EvalDataset`.
        ignore: this class of a "mask" becomes 255, which probes ignore; 0 where no class is 0.
        flip: images, but no annotations, are mirrored left to right.

    Raises:
        UserError: if the data has no such annotation (asked of the first image that has any).
        UnreadableImage: from an item whose image or annotation cannot be read, that has no such
            annotation, or more than MAX_PATCHES patches.
    """

    def __init__(
        self,
        data: ImageData,
        kind: str | Sequence[str],
        size: int | Sequence[int],
        multiple: int,
        mean: Sequence[float],
        std: Sequence[float],
        interpolation: str = "bicubic",
        *,
        ignore: int = 255,
        flip: bool = False,
    ):
        self.data, self.single = data, isinstance(kind, str)
        self.kinds = [kind] if self.single else list(kind)
        self.size, self.multiple, self.ignore, self.flip = size, multiple, ignore, flip
        self.mean, self.std, self.interpolation = tuple(mean), tuple(std), interpolation
        data.fill_nodata(self.mean)
        if self.kinds:
            held = first_annotations(data)
            with contextlib.suppress(UnreadableImage):
                held = held or data.annotations(0)  # which says why it has none
            missing = [kind for kind in self.kinds if kind not in held]
            if missing:
                names = ", ".join(held) or "nothing"
                raise UserError(f"{data.name(0)} has no {missing[0]}; it has {names}")

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Any, int]:
        image = self.data.image(index)
        height, width = target_size(image.shape[-2:], self.size, self.multiple)
        if height * width > MAX_PATCHES * self.multiple**2:
            before = " x ".join(map(str, image.shape[-2:]))
            raise UnreadableImage(
                self.data.name(index),
                f"{before} pixels become {height} x {width}, more than {MAX_PATCHES} patches; "
                "a strip is cut into pieces first",
            )
        try:
            notes = self.annotations(index)
            if not self.single and "boxes" in notes:
                notes["shape"] = torch.tensor(image.shape[-2:])
            return self.prepare(image), notes, index
        except UnreadableImage as error:
            if error.name == self.data.name(index):
                raise
            # of a file beside the image
            raise UnreadableImage(self.data.name(index), f"its annotation {error}") from error

    def prepare(self, image: Tensor) -> Tensor:
        """(C, H, W) in the stored type -> (C, h, w) normalised."""
        target = target_size(image.shape[-2:], self.size, self.multiple)
        image = to_unit(resize(image, target, self.interpolation)).clone()
        image = normalize(image, self.mean, self.std)
        return image.flip(-1) if self.flip else image

    def annotations(self, index: int) -> Any:
        notes = self.data.annotations(index) if self.kinds else {}
        missing = [kind for kind in self.kinds if kind not in notes]
        if missing:
            raise UnreadableImage(self.data.name(index), f"comes without {missing[0]}")
        found = {kind: torch.from_numpy(np.ascontiguousarray(notes[kind])) for kind in self.kinds}
        if self.ignore != 255 and "mask" in found:
            found["mask"] = torch.where(found["mask"] == self.ignore, 255, found["mask"])
        return found[self.kinds[0]] if self.single else found


def target_size(shape: Sequence[int], size: int | Sequence[int], multiple: int) -> tuple[int, int]:
    """(height, width), rounded to `multiple`: short side to `size` in the image's aspect, or `size`
    itself where it is two numbers."""
    wanted = [side * size / min(shape) for side in shape] if isinstance(size, int) else size
    height, width = (max(multiple, round(side / multiple) * multiple) for side in wanted)
    return height, width


def kinds_of(data: ImageData) -> list[str]:
    """Which annotations the first image has; "pair" and "clip" where the data has those."""
    found = list(first_annotations(data))
    return found + [method for method in ("pair", "clip") if hasattr(data, method)]


def pair(data: ImageData, index: int) -> tuple[Tensor, Tensor, np.ndarray, np.ndarray, np.ndarray]:
    """Two views with matching points, as `Scenes.pair` gives them.

    Raises:
        UserError: if this kind of data has no pairs.
    """
    _require(data, "pair", "pairs of views with matching points")
    return data.pair(index)


def clip(data: ImageData, index: int) -> tuple[Tensor, np.ndarray]:
    """Frames and instances, as `Scenes.clip` gives them.

    Raises:
        UserError: if this kind of data has no clips.
    """
    _require(data, "clip", "clips with instance masks")
    return data.clip(index)


def prepared_pair(images: Annotated, index: int) -> tuple:
    """A pair as `match_views` takes it, points as shares of width and height."""
    image_a, image_b, points_a, points_b, visible = pair(images.data, index)
    points = []
    for image, pixels in ((image_a, points_a), (image_b, points_b)):
        size = torch.tensor([image.shape[-1], image.shape[-2]])
        points.append(torch.as_tensor(pixels) / size)
    prepared = images.prepare(image_a), images.prepare(image_b)
    return *prepared, *points, torch.as_tensor(visible), tuple(image_b.shape[-2:])


def prepared_clip(images: Annotated, index: int) -> tuple:
    """A clip as `track` takes it."""
    frames, instances = clip(images.data, index)
    return index, [images.prepare(frame) for frame in frames], torch.as_tensor(instances)


def _require(data: ImageData, method: str, words: str) -> None:
    if not hasattr(data, method):
        raise UserError(f"{data.name(0)} comes without {words}; `scenes` has them")


def has_masks(*sets: ImageData) -> bool:
    """Whether images of all these come with segmentation masks."""
    return all("mask" in first_annotations(data) for data in sets)
