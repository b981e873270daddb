"""Windows of large images, such as satellite scenes: `tile:/path/*.tif?size=512&stride=512`.

No file is written: image i is the window (file, row, column) i. Windows that would reach beyond the
edge are shifted inside. rasterio reads a window alone, and whatever GDAL reads; where it is not
installed, tifffile reads TIFF files whole and keeps the last two.

Nodata is what the file says (GDAL_NODATA, an alpha band or mask with rasterio), or `nodata=VALUE`,
and NaN. It becomes the mean of its band, so 0 after normalisation.
"""

import contextlib
import glob
import importlib.util
import math
import re
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.images import ImageData, NoAnnotations
from data.pictures import UnreadableImage, error_text, fit_channels
from data.pixels import strided_starts, to_unit
from data.sources.tar import expand_braces
from errors import UserError
from files import expand

MOST_NODATA = 0.5  # share of a window; one with more is skipped
SAMPLES = 64  # a side of a window, to find that share; windows, to find percentiles
GDAL_NODATA = 42113  # a tag of TIFF
EXTENSIONS = (".tif", ".tiff", ".jp2", ".vrt")
Span = tuple[tuple[float, float], ...]


class Raster:
    """One large image: what its header says, and windows of it.

    Attributes:
        shape: (bands, height, width).
        dtype: of the first band, as NumPy names it.
        nodata: the value that stands for none, or None.

    Raises:
        OSError, ValueError: if it cannot be read.
    """

    def __init__(self, path: Path):
        self.path = path
        if has_rasterio():
            with open_rasterio(path) as file:
                self.shape = file.count, file.height, file.width
                self.dtype, self.nodata = file.dtypes[0], file.nodata
            return
        tifffile = _tifffile()
        with tifffile.TiffFile(path) as file:
            series = file.series[0]
            text = str(file.pages[0].tags.valueof(GDAL_NODATA, "")).strip("\0 ")
        sizes = dict(zip(series.axes, series.shape, strict=True))
        height, width = sizes.pop("Y"), sizes.pop("X")
        self.shape = math.prod(sizes.values()), height, width
        self.dtype, self.nodata = series.dtype.name, float(text) if text else None

    def read(
        self,
        bands: list[int],
        box: tuple[int, int, int, int],
        nodata: float | None = None,
        step: int = 1,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Values as stored and whether they are data, both (bands, height, width).

        Args:
            bands: counted from 1.
            box: top, left, height, width in pixels.
            nodata: in place of what the file says.
            step: only every so many pixels.
        """
        top, left, height, width = box
        valid = True
        if has_rasterio():
            from rasterio.windows import Window

            shape = len(bands), math.ceil(height / step), math.ceil(width / step)
            window = Window(left, top, width, height)
            with open_rasterio(self.path) as file:
                values = file.read(bands, window=window, out_shape=shape, masked=nodata is None)
            if nodata is None:
                values, valid = values.data, ~np.ma.getmaskarray(values)
        else:
            cut = slice(top, top + height, step), slice(left, left + width, step)
            values = _whole(self.path)[:, cut[0], cut[1]][[band - 1 for band in bands]]
            nodata = self.nodata if nodata is None else nodata
        valid = valid & ~np.isnan(values)
        return values, valid if nodata is None else valid & (values != nodata)


def has_rasterio() -> bool:
    return importlib.util.find_spec("rasterio") is not None


def open_rasterio(path: Path, *mode: str, **profile: Any) -> Any:
    """rasterio.open, without a warning where there is no georeference."""
    import rasterio

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        return rasterio.open(path, *mode, **profile)


def _tifffile() -> Any:
    try:
        import tifffile
    except ImportError as error:
        raise UserError(
            "tile: needs the package rasterio (or tifffile, for TIFF only): pip install rasterio"
        ) from error
    return tifffile


@lru_cache(maxsize=2)
def _whole(path: Path) -> np.ndarray:
    """(bands, height, width) of a TIFF."""
    with _tifffile().TiffFile(path) as file:
        axes, array = file.series[0].axes, file.series[0].asarray()
    array = np.moveaxis(array, (axes.index("Y"), axes.index("X")), (-2, -1))
    return array.reshape(-1, *array.shape[-2:])


class TileImages(ImageData):
    """Windows of rasters.

    Args:
        channels: of each image, see `fit_channels`.
        bands: counted from 1; None takes all.
        scale: text, see `parse_scale`.
        notes: kind of annotation -> one raster for each of `rasters`, of the same size.
        first: so many windows are kept.

    Attributes:
        windows: (n, 3) file, top and left.
        span: lowest and highest value of each band, or of all, that become 0 and 1, or None.
    """

    def __init__(
        self,
        rasters: list[Raster],
        channels: int | None,
        size: int,
        stride: int,
        *,
        bands: list[int] | None = None,
        scale: str | None = None,
        nodata: float | None = None,
        notes: dict[str, list[Raster]] | None = None,
        first: int | None = None,
    ):
        self.rasters, self.channels, self.size = rasters, channels, size
        self.nodata, self.notes = nodata, notes or {}
        self.bands = bands or list(range(1, rasters[0].shape[0] + 1))
        self.mean: tuple[float, ...] = (0.0,)
        for raster in rasters:
            if max(self.bands) > raster.shape[0]:
                raise UserError(
                    f"{raster.path} has {raster.shape[0]} bands, and band {max(self.bands)} is "
                    "asked for; bands= names some, counted from 1"
                )
        found, skipped = [], 0
        for number, raster in enumerate(rasters):
            for top, left, share in self._windows(raster, stride):
                skipped += share > MOST_NODATA
                if share <= MOST_NODATA:
                    found.append((number, top, left))
        if not found:
            raise UserError(f"all {skipped} windows of {rasters[0].path} ... are mostly nodata")
        self.windows = np.array(found[:first], dtype=np.int32)
        self.passed_over = []
        if skipped:
            total = skipped + len(found)
            line = f"{skipped} of {total} windows are more than half nodata and skipped"
            self.passed_over.append(f"{rasters[0].path.parent}: {line}")
        self.span = parse_scale(scale, self._percentiles) if scale else None
        if self.span and len(self.span) not in (1, len(self.bands)):
            raise UserError(
                f"scale={scale} has {len(self.span)} pairs for {len(self.bands)} bands; "
                "give one pair LOW,HIGH, or one for each band"
            )

    def _windows(self, raster: Raster, stride: int) -> list[tuple[int, int, float]]:
        """Top, left and share of nodata of each window, by a grid of SAMPLES or more a side."""
        _, height, width = raster.shape
        step, valid = max(1, self.size // SAMPLES), None
        if self.nodata is not None or raster.nodata is not None or raster.dtype[0] == "f":
            box = (0, 0, height, width)
            valid = raster.read(self.bands[:1], box, self.nodata, step)[1][0]
        found = []
        for top in strided_starts(height, self.size, stride):
            for left in strided_starts(width, self.size, stride):
                share = 0.0
                if valid is not None:
                    rows, columns = (
                        slice(start // step, (start + self.size) // step) for start in (top, left)
                    )
                    share = 1 - float(valid[rows, columns].mean())
                found.append((top, left, share))
        return found

    def _percentiles(self, low: float, high: float) -> Span:
        """Of each band over the data set, by SAMPLES windows evenly among all."""
        chosen = np.unique(np.linspace(0, len(self) - 1, SAMPLES).round().astype(int))
        values: list[Any] = []
        for index in chosen.tolist():
            stored, valid = self._read(index)
            values.append(np.where(valid, stored, np.nan).reshape(len(self.bands), -1))
        ends = np.nanpercentile(np.concatenate(values, axis=1), (low, high), axis=1)
        return tuple((float(bottom), float(top)) for bottom, top in ends.T)

    def __len__(self) -> int:
        return len(self.windows)

    def name(self, index: int) -> str:
        number, top, left = self.windows[index].tolist()
        return f"{self.rasters[number].path}[{top},{left}]"

    def files_below(self) -> list[bytes]:
        return [str(raster.path).encode("utf-8", "surrogateescape") for raster in self.rasters]

    def fill_nodata(self, mean: tuple[float, ...]) -> None:
        self.mean = tuple(mean)

    def _box(self, index: int) -> tuple[int, tuple[int, int, int, int]]:
        number, top, left = self.windows[index].tolist()
        return number, (top, left, self.size, self.size)

    def _read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        number, box = self._box(index)
        try:
            return self.rasters[number].read(self.bands, box, self.nodata)
        except (OSError, ValueError) as error:
            raise UnreadableImage(self.name(index), error_text(error)) from error

    def measured(self, index: int) -> tuple[Tensor, str, Tensor | None]:
        values, valid = self._read(index)
        stored = torch.from_numpy(np.where(valid, values, np.nan).astype(np.float64))
        stored, unit = fit_channels(stored, self.channels, self.name(index)), None
        with contextlib.suppress(UnreadableImage):
            image = self.prepare(values, valid, self.name(index), (math.nan,))
            unit = to_unit(image).double()
        return stored, values.dtype.name, unit

    def image(self, index: int) -> Tensor:
        return self.prepare(*self._read(index), self.name(index), self.mean)

    def prepare(
        self, values: np.ndarray, valid: np.ndarray, name: str, mean: tuple[float, ...]
    ) -> Tensor:
        """(channels, H, W) of values as `Raster.read` gives them: uint8 or uint16 as they are where
        there is neither scale nor nodata, else float32 in [0, 1].

        Raises:
            UnreadableImage: for values without a known range, and a wrong number of bands.
        """
        known = torch.from_numpy(valid)
        if self.span is not None:
            low, high = np.array(self.span, dtype=np.float64).T[..., None, None]
            values = ((values - low) / (high - low)).clip(0, 1).astype(np.float32)
        elif values.dtype not in (np.uint8, np.uint16):
            held = values[valid] if valid.any() else np.zeros(1)
            if values.dtype.kind != "f" or held.min() < 0 or held.max() > 1:
                raise UnreadableImage(
                    name,
                    f"values from {held.min():.9g} to {held.max():.9g} have no known range; "
                    "scale=HIGH or scale=LOW,HIGH says which become 0 to 1",
                )
            values = values.astype(np.float32)
        image = torch.from_numpy(np.ascontiguousarray(values))
        if known.all():
            return fit_channels(image, self.channels, name)
        image = fit_channels(to_unit(image).nan_to_num(), self.channels, name)
        if len(known) not in (1, len(image)):
            known = known.all(dim=0, keepdim=True)
        fill = torch.tensor(mean if len(mean) == len(image) else mean[:1])
        return torch.where(known, image, fill.view(-1, 1, 1).to(image))

    def annotations(self, index: int) -> dict:
        """`mask` (H, W), 255 where there is none; `depth` in metres, NaN where there is none, and
        at least a millimetre, because elsewhere a depth of 0 is unknown."""
        if not self.notes:
            raise NoAnnotations(f"{self.name(index)} has none; mask= and height= name their files")
        number, box = self._box(index)
        found = {}
        for kind, rasters in self.notes.items():
            values, valid = (part[0] for part in rasters[number].read([1], box))
            if kind == "depth":
                found[kind] = np.where(valid, np.maximum(values, 1e-3), np.nan).astype(np.float32)
            else:
                found[kind] = np.where(valid, values, 255).astype(np.int64)
        return found


def parse_scale(text: str, percentiles: Any) -> Span:
    """Pairs (low, high), one for all bands or one each, of "10000", "LOW,HIGH[,LOW,HIGH ...]" or
    "percentile(2,98)", for which `percentiles(2, 98)` is called.

    Raises:
        UserError: for anything else.
    """
    inner = re.fullmatch(r"percentile\((.*)\)", text)
    try:
        numbers = [float(part) for part in (inner[1] if inner else text).split(",")]
    except ValueError:
        numbers = []
    numbers = [0.0, *numbers] if len(numbers) == 1 else numbers
    pairs = list(zip(numbers[::2], numbers[1::2], strict=False))
    rising = all(low < high and math.isfinite(high - low) for low, high in pairs)
    if not pairs or len(numbers) % 2 or not rising or (inner and not 0 <= numbers[0] < 100):
        raise UserError(
            f"scale is {text!r}; it is HIGH, LOW,HIGH (for each band, if more than one) or "
            "percentile(LOW,HIGH), with LOW below HIGH"
        )
    return percentiles(*numbers[:2]) if inner else tuple(pairs)


def _find(path: str) -> list[Path]:
    """Files of a path with * and braces, or below a folder."""
    found: list[Path] = []
    for name in map(str, expand_braces(str(expand(path)))):
        if Path(name).is_dir():
            below = sorted(Path(name).rglob("*"))
            found += [file for file in below if file.suffix.lower() in EXTENSIONS]
        elif Path(name).is_file():
            found.append(Path(name))
        else:
            found += [Path(file) for file in sorted(glob.glob(name, recursive=True))]
    if not found:
        raise FileNotFoundError(f"no file {path!r}; tile: takes a file, a folder, or * and braces")
    return found


def _whole_number(text: str) -> int:
    return int(text) if text.isdecimal() and int(text) > 0 else 0


def open_tiles(
    path: str,
    channels: int | None,
    *,
    size: int = 512,
    stride: int | None = None,
    bands: str | None = None,
    scale: str | None = None,
    nodata: str | None = None,
    mask: str | None = None,
    height: str | None = None,
    first: int | None = None,
) -> TileImages:
    """Windows of `size` pixels, `stride` apart; see the grammar in data/sources/specs.py.

    Raises:
        FileNotFoundError: if no file is there.
        UserError: for a key with a wrong value, a band that is not there, or images that are all
            smaller than `size`.
    """
    chosen = [_whole_number(band) for band in bands.split(",")] if bands is not None else None
    if chosen is not None and 0 in chosen:
        raise UserError(f"bands is {bands!r}; give numbers from 1, such as bands=4,3,2")
    if stride == 0 or first == 0:
        raise UserError("stride and first are whole numbers from 1")
    try:
        empty = None if nodata is None else float(nodata)
    except ValueError as error:
        raise UserError(f"nodata is {nodata!r}; it is a number, such as 0 or -9999") from error
    files = _find(path)
    beside = {"mask": mask, "depth": height}
    notes = {kind: _find(names) for kind, names in beside.items() if names is not None}
    for kind, names in notes.items():
        if len(names) != len(files):
            raise UserError(f"{len(files)} images and {len(names)} files of {kind}; give one each")
    kept, said = [], []
    for number, file in enumerate(files):
        try:
            rasters = [
                Raster(place) for place in (file, *(names[number] for names in notes.values()))
            ]
        except UserError:
            raise
        except (OSError, ValueError, KeyError) as error:
            said.append(f"{file}: {error_text(error)}; passed over")
            continue
        shapes = [raster.shape[1:] for raster in rasters]
        if len(set(shapes)) > 1:
            raise UserError(f"{rasters[-1].path} is not of the size of {file}, {shapes[0]}")
        if min(shapes[0]) < size:
            tall, wide = shapes[0]
            said.append(f"{file}: {wide} x {tall} pixels are less than size={size}; passed over")
            continue
        kept.append(rasters)
    if not kept:
        raise UserError(f"no image for windows of {path!r}; the first, {said[0]}")
    images, *others = (list(column) for column in zip(*kept, strict=True))
    options = {"bands": chosen, "scale": scale, "nodata": empty, "first": first}
    options["notes"] = dict(zip(notes, others, strict=True))
    data = TileImages(images, channels, size, stride or size, **options)
    data.passed_over += said
    return data
