"""Images of any size for pictures: read, fitted to whole patches, normalised."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

from torch import Tensor, nn

from data.images import ImageData
from data.pictures import UnreadableImage
from data.pixels import normalize, resize, to_unit
from data.sources.specs import open_data
from engine.logger import notice
from errors import UserError
from evals.figures import enlarge
from evals.maps import Picture, to_picture

LONGEST = 16  # times the short side: a strip of one pixel by thousands would become millions


class Photograph(NamedTuple):
    """One image, as the model gets it and as it is drawn."""

    name: str
    original: tuple[int, int]  # (height, width) in pixels of the file
    image: Tensor  # (C, h, w), normalised, sides in whole patches
    picture: Picture


def load_images(
    specs: Sequence[str],
    channels: int,
    count: int,
    prepare: Callable[[ImageData], Callable] = lambda data: data.image,
) -> Iterator[tuple[str, ImageData, int, Tensor]]:
    """Spec, data, index and image of the first `count` of each spec.

    An image that cannot be read is named and left out.

    Args:
        prepare: data -> function from index to image; by default (channels, H, W) as stored.

    Raises:
        UserError: if there is nothing to read, or nothing can be read.
    """
    if count < 1 or not specs:
        raise UserError(
            f"--count is {count} and --images names {len(specs)}; give at least 1 of both"
        )
    found, reason = 0, None
    for spec, data in [(spec, open_data(spec, channels)) for spec in specs]:
        image_at = prepare(data)
        for index in range(min(count, len(data))):
            try:
                image = image_at(index)
            except UnreadableImage as error:
                reason = error
                notice(f"left out: {error}")
                continue
            found += 1
            yield spec, data, index, image
    if not found:
        names = " ".join(specs)
        raise UserError(f"none of the images of {names} could be read; the last: {reason}")


def read_photographs(
    specs: Sequence[str], count: int, backbone: nn.Module, size: int, height: int = 224
) -> Iterator[Photograph]:
    """One photograph at a time, its short side `size` pixels for the model.

    Pictures are `height` pixels high, or four a patch where that is more. An image that is too long
    to draw is named and left out.
    """
    wanted = backbone.preprocessing
    height = max(height, 4 * (size // backbone.patch_size))
    prepare = partial(drawable, mean=wanted.mean)
    for _, data, index, image in load_images(specs, len(wanted.mean), count, prepare):
        name, original = data.name(index), tuple(image.shape[-2:])
        image = fit(image, size, backbone.patch_size, wanted.interpolation)
        image = normalized(image, wanted.mean, wanted.std)
        picture = enlarge(to_picture(image, wanted.mean, wanted.std), height)
        yield Photograph(name, original, image, picture)


def drawable(data: ImageData, mean: Sequence[float]) -> Callable[[int], Tensor]:
    """Index to image as stored, `mean` for nodata; UnreadableImage for one that is longer than
    1 : LONGEST."""
    data.fill_nodata(mean)

    def image_at(index: int) -> Tensor:
        image = data.image(index)
        height, width = image.shape[-2:]
        if max(height, width) > LONGEST * min(height, width):
            reason = f"{width} x {height} pixels; the longest that is drawn is 1 : {LONGEST}"
            raise UnreadableImage(data.name(index), reason)
        return image

    return image_at


def normalized(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """A normalised copy of an image as stored."""
    # `to_unit` returns a float image itself, and `normalize` works in place.
    unit = to_unit(image).clone() if image.is_floating_point() else to_unit(image)
    return normalize(unit, mean, std)


def fit(image: Tensor, size: int, patch_size: int, interpolation: str) -> Tensor:
    """Short side to `size` pixels in the same aspect, then the centre that whole patches cover.

    The model would cut or pad the rest itself; cutting it here makes picture and patch grid agree.
    """
    resized, kept = fitted_size(tuple(image.shape[-2:]), size, patch_size)
    top, left = (resized[0] - kept[0]) // 2, (resized[1] - kept[1]) // 2
    return resize(image, resized, interpolation)[:, top : top + kept[0], left : left + kept[1]]


def fitted_size(
    original: tuple[int, int], size: int, patch_size: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """(H, W) after resizing, and after cutting to whole patches."""
    resized = tuple(round(side * size / min(original)) for side in original)
    return resized, tuple(side // patch_size * patch_size for side in resized)


def patch_at(
    point: tuple[float, float] | None,
    name: str,
    original: tuple[int, int],
    size: int,
    grid: tuple[int, int],
    patch_size: int,
) -> tuple[int, int]:
    """Row and column of the patch at a point (x, y) of the original (H, W); None is the centre.

    A point in the rim that `fit` cuts off takes the nearest patch.

    Raises:
        UserError: if the point lies outside the image.
    """
    height, width = original
    x, y = (width / 2, height / 2) if point is None else point
    if not (0 <= x < width and 0 <= y < height):
        raise UserError(
            f"the point {x:g},{y:g} is outside of {name}, which is {width} x {height} pixels"
        )
    resized, kept = fitted_size(original, size, patch_size)
    place = []
    for axis, coordinate in enumerate((y, x)):
        cut = (resized[axis] - kept[axis]) // 2
        patch = int((coordinate * resized[axis] / original[axis] - cut) // patch_size)
        place.append(min(max(patch, 0), grid[axis] - 1))
    return place[0], place[1]
