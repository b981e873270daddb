"""One image file to one tensor, whatever its colours and its depth are stored as.

The content decides what a file is, not its name. PNG, JPEG, TIFF, WebP and the like, and NumPy
arrays (.npy, .npz): 8 bits stay 8, 16 stay 16, floats stay floats. What cannot be kept as it is
stored is refused, never rounded to 8 bits.
"""

import warnings
import zipfile
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError
from torch import Tensor

from data.jpeg import ORIENTATION, reduce
from errors import UserError

PICTURES = ".jpg .jpeg .png .bmp .gif .webp .tif .tiff .ppm .pgm"
EXTENSIONS = {*PICTURES.split(), ".npy", ".npz"}
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # and tags of TIFF 6.0:
WIDTH, HEIGHT, BITS, SAMPLES, EXTRA, FORMAT = 256, 257, 258, 277, 338, 339
SUBFILE, PHOTOMETRIC = 254, 262
MASK_PAGE, WHITE_IS_ZERO = 4, 0  # a bit of SUBFILE: pages without pixels; of PHOTOMETRIC
ALPHA = (1, 2)  # values of EXTRA: with and without premultiplied colours; anything else is a band
Window = tuple[float, float]
ROUNDING, USE_WINDOW = 1e-6, "window=centre,width says which become 0 to 1"


class UnreadableImage(OSError):
    """An image that could not be decoded: `name` and a one-line `reason`."""

    def __init__(self, name: str, reason: str = ""):
        super().__init__(f"{name}: {reason}" if reason else name)
        self.name, self.reason = name, reason

    def __reduce__(self):
        # OSError's own would pass on the message alone.
        return type(self), (self.name, self.reason)


def read_image(
    path: str | Path,
    channels: int | None = 3,
    *,
    window: Window | None = None,
    page: int | None = None,
) -> Tensor:
    """(C, H, W) uint8, uint16 or float32 in [0, 1], upright as its EXIF tag says.

    Args:
        channels, window: see `finish`.
        page: of a TIFF or frame of an animation, from 0. None: the first; all, as channels, of a
            TIFF whose pages are grey and of one size.

    Raises:
        UnreadableImage: if it cannot be decoded, cannot be brought to `channels`, or has more
            pixels than twice PIL.Image.MAX_IMAGE_PIXELS (about 180 million), which is checked
            before anything is decoded.
    """
    try:
        with open(path, "rb") as file:
            return read_open_file(file, str(path), channels, window=window, page=page)
    except UnreadableImage:
        raise
    except OSError as error:
        raise UnreadableImage(str(path), error_text(error)) from error


def image_size(path: str | Path, **reading) -> tuple[int, int]:
    """(height, width) as `read_image` gives them with `reading`, from the header where that is
    enough.

    Raises:
        UnreadableImage: if it cannot be decoded.
    """
    try:
        with Image.open(path) as picture:
            width, height = picture.size
            turned = picture.getexif().get(ORIENTATION, 1) >= 5
    except Exception:  # no picture, or one that needs another decoder
        return tuple(read_image(path, **reading).shape[-2:])
    return (width, height) if turned else (height, width)


def read_open_file(
    file: BinaryIO,
    name: str,
    channels: int | None = 3,
    *,
    window: Window | None = None,
    page: int | None = None,
) -> Tensor:
    """As `read_image`, from an open binary file or io.BytesIO; `name` is for the message."""
    try:
        image = _decode(file, channels, page)
    except UnidentifiedImageError as error:
        raise UnreadableImage(name, "no image, or of an unknown format") from error
    except Exception as error:  # decoders raise anything at broken bytes
        raise UnreadableImage(name, error_text(error)) from error
    return finish(image, name, channels, window)


def error_text(error: Exception) -> str:
    text = " ".join((getattr(error, "strerror", None) or str(error)).split())
    return text or type(error).__name__


def finish(image: Tensor, name: str, channels: int | None, window: Window | None = None) -> Tensor:
    """The output of a decoder as uint8, uint16, or float32 in [0, 1].

    Args:
        channels: grey is repeated to 3, colour is reduced to its luminance for 1; None keeps all.
        window: centre and width of the values to keep, in the file's own unit (Hounsfield in CT).
            Values are clipped to it and become 0 at its lower and 1 at its upper end; NaN is 0.

    Raises:
        UnreadableImage: without a window, for values that have no known range (wide or signed
            integers, floats outside [0, 1]) and for NaN; for channels that cannot be `channels`.
    """
    if window is not None:
        centre, width = window
        image = (image.to(torch.float64) - (centre - width / 2)) / width
        image = image.clamp_(0, 1).nan_to_num_(0.0).float()  # nodata is NaN
    elif image.is_floating_point() and not image.isfinite().all():
        raise UnreadableImage(name, f"holds NaN or infinite values; {USE_WINDOW}, and NaN 0")
    elif image.dtype == torch.bool:
        image = image.to(torch.uint8) * 255
    elif image.dtype not in (torch.uint8, torch.uint16):
        low, high = image.min().item(), image.max().item()
        if not image.is_floating_point() or low < -ROUNDING or high > 1 + ROUNDING:
            raise UnreadableImage(
                name,
                f"values from {low:.9g} to {high:.9g} are neither 8 or 16 bits without sign nor "
                f"floats from 0 to 1; {USE_WINDOW}",
            )
        image = image.float().clamp_(0, 1)
    return fit_channels(image, channels, name)


def fit_channels(image: Tensor, channels: int | None, name: str) -> Tensor:
    """Repeat grey to 3 channels, or take the luminance of 3 (ITU-R 601, as Pillow rounds it).

    Raises:
        UnreadableImage: for any other change of number.
    """
    if channels in (None, len(image)):
        return image
    if len(image) == 1 and channels == 3:
        return image.expand(3, -1, -1)
    if len(image) == 3 and channels == 1:
        weights = torch.tensor([19595, 38470, 7471]).view(3, 1, 1)
        if image.is_floating_point():
            return (image * (weights / 65536)).sum(0, keepdim=True)
        return (((image.long() * weights).sum(0, keepdim=True) + 32768) >> 16).to(image.dtype)
    raise UnreadableImage(name, f"has {len(image)} channels, {channels} are asked for")


def picture_to_tensor(picture: Image.Image, channels: int | None = None) -> Tensor:
    """(C, H, W) of a PIL image in its own colours: grey or RGB, whatever it is stored as.

    Transparency is a further channel, except where 1 or 3 channels are asked for.
    """
    if picture.mode == "F":
        array = np.array(picture)
    elif picture.mode.startswith("I"):  # 16 bits, in older versions of Pillow as 32
        array = np.array(picture)
        if array.min() >= 0 and array.max() <= 65535:
            array = array.astype(np.uint16)
    else:
        if picture.mode in ("La", "RGBa"):  # premultiplied
            picture = picture.convert(picture.mode.upper())
        colors = "L" if picture.mode in ("1", "L", "LA") else "RGB"
        clear = picture.mode in ("LA", "PA", "RGBA") or "transparency" in picture.info
        mode = colors + "A" if clear and channels not in (1, 3) else colors
        array = np.array(picture if picture.mode == mode else picture.convert(mode))
    return torch.from_numpy(array).reshape(*array.shape[:2], -1).permute(2, 0, 1)


def array_to_tensor(array: np.ndarray, channels: int | None = None) -> Tensor:
    """(C, H, W) from (H, W), (H, W, C) or (C, H, W).

    The channels are the outer axis whose length is `channels`; where that does not decide, the
    shorter of the two.

    Raises:
        UserError: for another number of axes, no values, or values that are no numbers.
    """
    if array.ndim not in (2, 3) or 0 in array.shape:
        raise UserError(
            f"an array of shape {array.shape} is no image; "
            "shapes are (H, W), (H, W, C) and (C, H, W)"
        )
    if array.dtype.kind not in "buif":
        raise UserError(f"an array of {array.dtype} is no image")
    if array.dtype.kind == "f":
        array = array.astype(np.float32)
    elif array.dtype.newbyteorder("=") not in (np.bool_, np.uint8, np.uint16):
        array = array.astype(np.int64)
    array = array.astype(array.dtype.newbyteorder("="), copy=not array.flags.writeable)
    if array.ndim == 2:
        return torch.from_numpy(array)[None]
    fits = [axis for axis in (0, 2) if array.shape[axis] == channels]
    axis = fits[0] if len(fits) == 1 else 0 if array.shape[0] < array.shape[2] else 2
    return torch.from_numpy(array).movedim(axis, 0)


def _decode(file: BinaryIO, channels: int | None, page: int | None) -> Tensor:
    start = file.read(26)
    file.seek(0)
    if not start:
        raise UserError("empty file")
    if start.startswith(b"\x93NUMPY"):
        return array_to_tensor(_read_npy(file), channels)
    if start.startswith(b"PK\x03\x04"):
        return array_to_tensor(_read_npz(file), channels)
    if start.startswith(TIFF_STARTS):
        return _read_tiff(file, channels, page)
    # Of a PNG, width, height, bit depth and colour type begin at byte 16. Pillow reads only grey
    # (0) in 16 bits.
    if start.startswith(b"\x89PNG") and start[24] == 16 and start[25] != 0:
        _refuse_huge(int.from_bytes(start[20:24], "big"), int.from_bytes(start[16:20], "big"))
        return _without_alpha(_read_deep_png(file), channels)
    with Image.open(file) as picture:
        picture.seek(page or 0)
        reduce(picture)
        ImageOps.exif_transpose(picture, in_place=True)
        return picture_to_tensor(picture, channels)


def _read_deep_png(file: BinaryIO) -> Tensor:
    # torchvision announces that its decoders will go (0.29), so nothing else may depend on them.
    try:
        from torchvision.io import decode_image
    except ImportError as error:
        raise UserError(
            "16-bit colours in a PNG need a torchvision that has io.decode_image; TIFF does not"
        ) from error
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The image decoding", DeprecationWarning)
        encoded = torch.frombuffer(bytearray(file.read()), dtype=torch.uint8)
        try:
            return decode_image(encoded, apply_exif_orientation=True)
        except RuntimeError as error:  # names a line of C++
            raise UserError("broken or truncated 16-bit PNG") from error


def _without_alpha(image: Tensor, channels: int | None) -> Tensor:
    return image[:-1] if len(image) in (2, 4) and channels in (1, 3) else image


def _refuse_huge(height: int, width: int) -> None:
    limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
    if limit and height * width > limit:
        raise UserError(
            f"{height} x {width} pixels are more than {limit} (twice PIL.Image.MAX_IMAGE_PIXELS)"
        )


# NumPy


def _read_npy(file: BinaryIO) -> np.ndarray:
    version = np.lib.format.read_magic(file)
    old = version == (1, 0)
    header = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
    shape = sorted(header(file)[0])
    if len(shape) > 1:
        _refuse_huge(*shape[-2:])
    file.seek(0)
    return np.lib.format.read_array(file, allow_pickle=False)


def _read_npz(file: BinaryIO) -> np.ndarray:
    with zipfile.ZipFile(file) as archive:
        names = [name for name in archive.namelist() if name.endswith(".npy")]
        name = names[0] if len(names) == 1 else "image.npy"
        if name not in names:
            raise UserError(
                f"holds {len(names)} arrays; an image is the only one, or the one called 'image'"
            )
        with archive.open(name) as member:
            return _read_npy(member)


# TIFF


def _read_tiff(file: BinaryIO, channels: int | None, page: int | None) -> Tensor:
    tags = _tiff_tags(file)
    _refuse_huge(tags[HEIGHT], tags[WIDTH])
    pages = _read_pages if _pillow_keeps_all(tags) else _read_pages_with_tifffile
    try:
        images = pages(file, tags, page, channels)
    except SyntaxError:  # Pillow knows no page of a mask's photometric kind
        file.seek(0)
        images = _read_pages_with_tifffile(file, tags, page, channels)
    return images[0] if len(images) == 1 else torch.cat(images)


def _tiff_tags(file: BinaryIO) -> dict:
    """Tags of the first page. Image.open would print a warning for every image of many bands."""
    start = file.read(8)
    start += file.read(8) if start[2:3] == b"+" or start[3:4] == b"+" else b""  # BigTIFF
    tags = TiffImagePlugin.ImageFileDirectory_v2(start)
    file.seek(tags.next)
    tags.load(file)
    file.seek(0)
    return tags


def _pillow_keeps_all(tags: dict) -> bool:
    """Pillow rounds 16-bit colours to 8 bits and drops bands beyond colour and transparency."""
    bits, samples, extra = tags.get(BITS, (1,)), tags.get(SAMPLES, 1), tags.get(EXTRA, ())
    kind = tags.get(FORMAT, (1,))[0]
    if samples == 1:
        return (kind == 1 and bits[0] <= 16) or (kind, bits[0]) in ((2, 16), (2, 32), (3, 32))
    alpha_at_most = len(extra) <= 1 and set(extra) <= set(ALPHA)
    return max(bits) <= 8 and kind == 1 and samples <= 4 and alpha_at_most


def _read_pages(file: BinaryIO, tags: dict, page: int | None, channels: int | None) -> list[Tensor]:
    with Image.open(file) as picture:
        kinds, shown = set(), []
        for number in range(picture.n_frames):
            picture.seek(number)
            if not picture.tag_v2.get(SUBFILE, 0) & MASK_PAGE:
                shown.append(number)
                kinds.add((picture.mode, picture.size))
        picture.seek(shown[0] if shown else 0)
        grey = picture.mode[0] in "1LIF" and picture.mode not in ("LA", "La", "LAB")
        images = []
        for number in _chosen_pages(picture.n_frames, shown, grey and len(kinds) == 1, page):
            picture.seek(number)
            deep = picture.mode.startswith("I;16")  # Pillow inverts 8 bits itself
            white_is_zero = deep and picture.tag_v2.get(PHOTOMETRIC) == WHITE_IS_ZERO
            bits = picture.tag_v2.get(BITS, (16,))[0]
            image = picture_to_tensor(ImageOps.exif_transpose(picture), channels)
            images.append(_inverted(image, bits) if white_is_zero else image)
        return images


def _read_pages_with_tifffile(
    file: BinaryIO, tags: dict, page: int | None, channels: int | None
) -> list[Tensor]:
    try:
        import tifffile
    except ImportError as error:
        raise UserError(
            "deep colours or many bands in a TIFF need the package tifffile: pip install tifffile"
        ) from error
    with tifffile.TiffFile(file) as tiff:
        subfiles = [int(kept.tags.valueof(SUBFILE, 0)) for kept in tiff.pages]
        shown = [number for number, kind in enumerate(subfiles) if not kind & MASK_PAGE]
        kinds = {(tiff.pages[number].axes, tiff.pages[number].shape) for number in shown}
        grey = len(kinds) == 1 and next(iter(kinds))[0] == "YX"
        images = []
        for number in _chosen_pages(len(tiff.pages), shown, grey, page):
            axes, array = tiff.pages[number].axes, tiff.pages[number].asarray()
            if axes not in ("YX", "YXS", "SYX"):
                raise UserError(f"has the axes {axes}; an image has height, width and bands")
            if axes == "YX":
                array = array[None]
            elif axes == "YXS":
                array = array.transpose(2, 0, 1)
            image = array_to_tensor(array, len(array))
            bits = tiff.pages[number].bitspersample
            unsigned = array.dtype.kind == "u" and bits <= 16
            if unsigned and int(tiff.pages[number].photometric) == WHITE_IS_ZERO:
                image = torch.cat([_inverted(image[:1], bits), image[1:]])
            image = _without_alpha(image, channels) if tags.get(EXTRA, (0,))[0] in ALPHA else image
            images.append(_upright(image, tags.get(ORIENTATION, 1)))
        return images


def _chosen_pages(count: int, shown: list[int], all_alike: bool, page: int | None) -> list[int]:
    """Numbers of the pages to read; those in `shown` are not masks of others."""
    if page is None:
        shown = shown or [0]
        return shown if all_alike else shown[:1]
    if page >= count:
        raise UserError(f"has no page {page}, counted from 0; there are {count}")
    return [page]


def _inverted(image: Tensor, bits: int) -> Tensor:
    """Unsigned values of so many bits, of which 0 was white."""
    if image.dtype not in (torch.uint8, torch.uint16):
        return image
    highest = 2**bits - 1
    return (highest - image.to(torch.int32)).to(image.dtype)


def _upright(image: Tensor, orientation: int) -> Tensor:
    """(C, H, W) turned as the value 1 to 8 of the TIFF and EXIF tag says."""
    image = image.transpose(1, 2) if orientation >= 5 else image
    mirrored = {2: (2,), 3: (1, 2), 4: (1,), 6: (2,), 7: (1, 2), 8: (1,)}
    return image.flip(mirrored.get(orientation, ()))
