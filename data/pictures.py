"""One image file to one tensor, whatever its colours are stored as."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}


class UnreadableImage(OSError):
    """An image that could not be decoded: `name` and a one-line `reason`."""

    def __init__(self, name: str, reason: str = ""):
        super().__init__(f"{name}: {reason}" if reason else name)
        self.name, self.reason = name, reason


def read_image(path: str | Path, channels: int | None = 3) -> Tensor:
    """(C, H, W) uint8, upright as its EXIF tag says; uint16 or float32 of deeper greyscale files.

    Raises:
        UnreadableImage: if it cannot be decoded, or has more than about 180 million pixels.
        ValueError: if it cannot be brought to `channels`.
    """
    try:
        with Image.open(path) as picture:
            ImageOps.exif_transpose(picture, in_place=True)
            image = picture_to_tensor(picture, channels)
    except Exception as error:  # Pillow's decoders raise anything at broken bytes
        raise UnreadableImage(str(path), error_text(error)) from error
    return fit_channels(image, channels, str(path))


def error_text(error: Exception) -> str:
    text = " ".join((getattr(error, "strerror", None) or str(error)).split())
    return text or type(error).__name__


def picture_to_tensor(picture: Image.Image, channels: int | None = None) -> Tensor:
    """(C, H, W) of a PIL image in its own colours: grey or RGB, whatever it is stored as.

    Transparency is a further channel, except where 1 or 3 channels are asked for.
    """
    if picture.mode == "F":
        array = np.array(picture)
    elif picture.mode.startswith("I"):  # 16 bits, in older versions of Pillow as 32
        array = np.array(picture)
        if array.min() < 0 or array.max() > 65535:
            raise ValueError("more than 16 bits a pixel")
        array = array.astype(np.uint16)
    else:
        if picture.mode in ("La", "RGBa"):  # premultiplied
            picture = picture.convert(picture.mode.upper())
        colors = "L" if picture.mode in ("1", "L", "LA") else "RGB"
        clear = picture.mode in ("LA", "PA", "RGBA") or "transparency" in picture.info
        mode = colors + "A" if clear and channels not in (1, 3) else colors
        array = np.array(picture if picture.mode == mode else picture.convert(mode))
    return torch.from_numpy(array).reshape(*array.shape[:2], -1).permute(2, 0, 1)


def fit_channels(image: Tensor, channels: int | None, name: str) -> Tensor:
    """Repeat grey to 3 channels, or take the luminance of 3 (ITU-R 601, as Pillow rounds it)."""
    if channels in (None, len(image)):
        return image
    if len(image) == 1 and channels == 3:
        return image.expand(3, -1, -1)
    if len(image) == 3 and channels == 1:
        weights = torch.tensor([19595, 38470, 7471]).view(3, 1, 1)
        return (((image * weights).sum(0, keepdim=True) + 32768) >> 16).to(image.dtype)
    raise ValueError(f"{name} has {len(image)} channels, {channels} are asked for")
