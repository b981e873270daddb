"""JPEG files decoded at the scale that is needed: libjpeg gives 1/2, 1/4 and 1/8 for less work.

    with decoded_for(lambda height, width: 5.0):
        image = data.image(index)  # a JPEG comes at a quarter of its sides

The decoder averages blocks of pixels, so what is cut from such an image differs slightly from the
same crop of the whole one.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor

if TYPE_CHECKING:  # data/augment.py reads marks, and those pictures
    from data.augment import MultiCrop

Fineness = Callable[[int, int], float]
ORIENTATION = 274  # EXIF tag; from 5 on, width and height change places
WANTED: ContextVar[Fineness | None] = ContextVar("wanted", default=None)


@contextmanager
def decoded_for(fineness: Fineness | None) -> Iterator[None]:
    """Within it, JPEG files are decoded smaller where `fineness` allows.

    Args:
        fineness: height and width in pixels, upright -> how many times finer than needed the whole
            image is. None, or less than 2: as stored.
    """
    token = WANTED.set(fineness)
    try:
        yield
    finally:
        WANTED.reset(token)


def reduce(picture: Image.Image) -> None:
    """Before its pixels are read, lets Pillow decode a JPEG smaller, see `decoded_for`."""
    fineness = WANTED.get()
    if fineness is None or not isinstance(picture, JpegImageFile):
        return
    width, height = picture.size
    turned = picture.getexif().get(ORIENTATION, 1) >= 5
    times = fineness(width, height) if turned else fineness(height, width)
    step = next((step for step in (8, 4, 2) if step <= times), 1)
    if step > 1:
        picture.draft(None, (width // step, height // step))


def crop_fineness(multi_crop: "MultiCrop", table: Tensor) -> Fineness:
    """How much finer than its crops an image is: the least over all crops and sides.

    Args:
        table: (crops, NUMBERS), see data/augment.py.
    """

    largest = max(max(spec.size) for spec, _ in multi_crop.cuts)

    def fineness(height: int, width: int) -> float:
        if min(height, width) < 2 * largest:  # no crop of it is twice as fine
            return 1.0
        least = []
        for spec, rows in multi_crop.cuts:
            u = table[rows]
            boxes, _, _ = multi_crop.geometry(u, np.array([[height, width]] * len(u)), spec)
            least.append(boxes[:, 2:].min() / max(spec.size))
        return min(least)

    return fineness
