"""Windows of large images, such as satellite scenes: `tile:/path/*.tif?size=512&stride=512`.

Image i is the window (file, row, column) i; no file is written. Windows that would reach beyond the
edge are shifted inside. Nodata is what the file says or `nodata=VALUE`, and NaN; it becomes the
mean of its band, so 0 after normalisation.
"""

import contextlib
import glob
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.images import ImageData, NoAnnotations
from data.pictures import UnreadableImage, error_text, fit_channels
from data.pixels import strided_starts, to_unit
from data.sources.rasters import Raster, has_rasterio, require_tifffile
from data.sources.tar import expand_braces
from errors import UserError
from files import expand

MOST_NODATA = 0.5  # share of a window; one with more is skipped
SAMPLES = 64  # pixels a side of a window, to find that share; windows, to find percentiles
EXTENSIONS = (".tif", ".tiff", ".jp2", ".vrt")
Span = tuple[tuple[float, float], ...]


class TileImages(ImageData):
    """Windows of rasters.

    Args:
        channels: of each image, see `fit_channels`.
        bands: counted from 1; None takes all.
        scale: text, see `parse_scale`.
        notes: kind of annotation -> a raster of the same size for each of `rasters`.
        first: so many windows are kept.

    Attributes:
        windows: (n, 3) file, top and left.
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
        self.nodata, self.notes, self.mean = nodata, notes or {}, (0.0,)
        self.bands = bands or list(range(1, rasters[0].shape[0] + 1))
        for raster in rasters:
            if max(self.bands) > raster.shape[0]:
                raise UserError(
                    f"{raster.path} has {raster.shape[0]} bands, and band {max(self.bands)} is "
                    "asked for; bands= names some, counted from 1"
                )
        windows = [
            (number, top, left, self._missing(raster, valid, top, left))
            for number, raster in enumerate(rasters)
            for valid in [self._valid(raster)]
            for top in strided_starts(raster.shape[1], size, stride)
            for left in strided_starts(raster.shape[2], size, stride)
        ]
        kept = [place for *place, missing in windows if missing <= MOST_NODATA]
        if not kept:
            raise UserError(f"all windows of {rasters[0].path} and others are mostly nodata")
        self.windows = np.array(kept[:first], dtype=np.int32)
        if skipped := len(windows) - len(kept):
            line = f"{skipped} of {len(windows)} windows are more than half nodata and skipped"
            self.passed_over = [f"{rasters[0].path.parent}: {line}"]
        self.span = parse_scale(scale, self._percentiles) if scale else None
        if self.span and len(self.span) not in (1, len(self.bands)):
            raise UserError(
                f"scale={scale} has {len(self.span)} pairs for {len(self.bands)} bands; "
                "give one pair LOW,HIGH, or one for each band"
            )

    def _valid(self, raster: Raster) -> np.ndarray | None:
        """Whether pixels of the first band are data, SAMPLES or more a window's side."""
        if self.nodata is None and raster.nodata is None and not raster.dtype.startswith("float"):
            return None
        whole = 0, 0, *raster.shape[1:]
        return raster.read(self.bands[:1], whole, self.nodata, max(1, self.size // SAMPLES))[1][0]

    def _missing(self, raster: Raster, valid: np.ndarray | None, top: int, left: int) -> float:
        """The share of nodata in a window."""
        if valid is None:
            return 0.0
        step = max(1, self.size // SAMPLES)
        rows, columns = (slice(start // step, (start + self.size) // step) for start in (top, left))
        return 1 - float(valid[rows, columns].mean())

    def _percentiles(self, low: float, high: float) -> Span:
        """Of each band over the data set, by SAMPLES windows evenly among all."""
        chosen = np.unique(np.linspace(0, len(self) - 1, SAMPLES).round().astype(int))
        read = [self._read(index) for index in chosen.tolist()]
        values = [np.where(valid, stored, np.nan) for stored, valid in read]
        values = np.concatenate([of_one.reshape(len(self.bands), -1) for of_one in values], axis=1)
        return tuple(map(tuple, np.nanpercentile(values, (low, high), axis=1).T.tolist()))

    def __len__(self) -> int:
        return len(self.windows)

    def name(self, index: int) -> str:
        number, top, left = self.windows[index].tolist()
        return f"{self.rasters[number].path}[{top},{left}]"

    def files_below(self) -> list[bytes]:
        return [str(raster.path).encode("utf-8", "surrogateescape") for raster in self.rasters]

    def fill_nodata(self, mean: Sequence[float]) -> None:
        self.mean = tuple(mean)

    def _read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        number, top, left = self.windows[index].tolist()
        try:
            box = top, left, self.size, self.size
            return self.rasters[number].read(self.bands, box, self.nodata)
        except (OSError, ValueError) as error:
            raise UnreadableImage(self.name(index), error_text(error)) from error

    def image(self, index: int) -> Tensor:
        return self.prepare(*self._read(index), self.name(index), self.mean)

    def measured(self, index: int) -> tuple[Tensor, str, Tensor | None]:
        (values, valid), name, unit = self._read(index), self.name(index), None
        stored = torch.from_numpy(np.where(valid, values, np.nan).astype(np.float64))
        with contextlib.suppress(UnreadableImage):
            unit = to_unit(self.prepare(values, valid, name, (math.nan,))).double()
        return fit_channels(stored, self.channels, name), values.dtype.name, unit

    def prepare(
        self, values: np.ndarray, valid: np.ndarray, name: str, mean: Sequence[float]
    ) -> Tensor:
        """(channels, H, W) of what `Raster.read` gives: uint8 or uint16 where there is neither
        scale nor nodata, else float32 in [0, 1], `mean` where there is nodata.

        Raises:
            UnreadableImage: for values without a known range, and a wrong number of bands.
        """
        known = torch.from_numpy(valid)
        if self.span is not None:
            low, high = np.array(self.span).T[..., None, None]
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
        fill = torch.tensor(mean if len(mean) == len(image) else mean[:1]).view(-1, 1, 1)
        return torch.where(known, image, fill.to(image))

    def annotations(self, index: int) -> dict:
        """`mask` (H, W), 255 where there is none; `depth` in metres, NaN where there is none, and
        at least a millimetre, because elsewhere a depth of 0 is unknown."""
        if not self.notes:
            raise NoAnnotations(f"{self.name(index)} has none; mask= and height= name their files")
        number, top, left = self.windows[index].tolist()
        found = {}
        for kind, rasters in self.notes.items():
            box = top, left, self.size, self.size
            values, valid = (part[0] for part in rasters[number].read([1], box))
            if kind == "depth":
                found[kind] = np.where(valid, np.maximum(values, 1e-3), np.nan).astype(np.float32)
            else:
                found[kind] = np.where(valid, values, 255).astype(np.int64)
        return found


def parse_scale(text: str, percentiles: Callable[[float, float], Span]) -> Span:
    """Pairs (low, high), one for all bands or one each, of "10000", "LOW,HIGH[,LOW,HIGH ...]" or
    "percentile(2,98)", for which `percentiles(2, 98)` is called.

    Raises:
        UserError: for anything else.
    """
    inner = re.fullmatch(r"percentile\((.*)\)", text)
    numbers: list[float] = []
    with contextlib.suppress(ValueError):
        numbers = [float(part) for part in (inner[1] if inner else text).split(",")]
    numbers = [0.0, *numbers] if len(numbers) == 1 else numbers
    pairs = tuple(zip(numbers[::2], numbers[1::2], strict=False))
    rising = all(low < high and math.isfinite(high - low) for low, high in pairs)
    within = not inner or (len(pairs) == 1 and numbers[0] >= 0 and numbers[1] <= 100)
    if not pairs or len(numbers) % 2 or not rising or not within:
        raise UserError(
            f"scale is {text!r}; it is HIGH, LOW,HIGH (for each band, if more than one) or "
            "percentile(LOW,HIGH), with LOW below HIGH"
        )
    return percentiles(*pairs[0]) if inner else pairs


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
    """Windows of `size` pixels, `stride` apart; see docs/data.md.

    Raises:
        FileNotFoundError: if no file is there.
        UserError: for a key with a wrong value, a band that is not there, or images that are all
            smaller than `size`.
    """
    if bands is not None and not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", bands):
        raise UserError(f"bands is {bands!r}; give numbers from 1, such as bands=4,3,2")
    chosen = [int(band) for band in bands.split(",")] if bands is not None else None
    try:
        empty = None if nodata is None else float(nodata)
    except ValueError as error:
        raise UserError(f"nodata is {nodata!r}; it is a number, such as 0 or -9999") from error
    if not has_rasterio():
        require_tifffile()
    sources = {"image": _find(path)}
    for kind, given in (("mask", mask), ("depth", height)):
        if given is not None:
            sources[kind] = _find(given)
    counts = {kind: len(files) for kind, files in sources.items()}
    if len(set(counts.values())) > 1:
        raise UserError(f"mask= and height= take one file an image; there are {counts}")
    kept, said = [], []
    for files in zip(*sources.values(), strict=True):
        try:
            rasters = [Raster(file) for file in files]
        except Exception as error:  # decoders raise anything at broken bytes
            said.append(f"{files[0]}: {error_text(error)}; passed over")
            continue
        tall, wide = rasters[0].shape[1:]
        if any(raster.shape[1:] != (tall, wide) for raster in rasters):
            raise UserError(f"{files[-1]} is not of the size of {files[0]}, {wide} x {tall} pixels")
        if min(tall, wide) < size:
            said.append(f"{files[0]}: {wide} x {tall} pixels, smaller than size={size}")
        else:
            kept.append(rasters)
    if not kept:
        raise UserError(f"no windows in {path!r}; the first image, {said[0]}")
    columns = dict(zip(sources, map(list, zip(*kept, strict=True)), strict=True))
    options = {"bands": chosen, "scale": scale, "nodata": empty, "first": first}
    images = columns.pop("image")
    data = TileImages(images, channels, size, stride or size, notes=columns, **options)
    data.passed_over = [*data.passed_over, *said]
    return data


def _find(path: str) -> list[Path]:
    """Files of a path with * and braces, or below a folder."""
    found: list[Path] = []
    for place in expand_braces(str(expand(path))):
        if place.is_dir():
            below = sorted(place.rglob("*"))
            found += [file for file in below if file.suffix.lower() in EXTENSIONS]
        else:
            here = [str(place)] if place.is_file() else glob.glob(str(place), recursive=True)
            found += [Path(file) for file in sorted(here)]
    if not found:
        raise FileNotFoundError(f"no file {path!r}; tile: takes a file, a folder, or * and braces")
    return found
