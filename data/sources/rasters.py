"""Large images in files: headers, and windows read alone.

rasterio reads whatever GDAL reads. Where it is not installed, tifffile reads TIFF files whole, and
the last two are kept.
"""

import importlib.util
import math
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from errors import UserError

GDAL_NODATA = 42113  # a tag of TIFF
Box = tuple[int, int, int, int]  # top, left, height, width in pixels


class Raster:
    """One large image.

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
        else:
            with require_tifffile().TiffFile(path) as file:
                text = str(file.pages[0].tags.valueof(GDAL_NODATA, "")).strip("\0 ")
            whole = _read_whole(path)
            self.shape, self.dtype = whole.shape, whole.dtype.name
            self.nodata = float(text) if text else None

    def read(
        self, bands: list[int], box: Box, nodata: float | None = None, step: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        """Values as stored and whether they are data, both (bands, height, width).

        Args:
            bands: counted from 1.
            nodata: in place of what the file says: its value, and with rasterio its mask too.
            step: only every so many pixels.
        """
        top, left, height, width = box
        valid = True
        if has_rasterio():
            shape = len(bands), math.ceil(height / step), math.ceil(width / step)
            part = (top, top + height), (left, left + width)
            with open_rasterio(self.path) as file:
                values = file.read(bands, window=part, out_shape=shape, masked=nodata is None)
            if nodata is None:
                values, valid = values.data, ~np.ma.getmaskarray(values)
        else:
            whole = _read_whole(self.path)[:, top : top + height : step, left : left + width : step]
            values = whole[[band - 1 for band in bands]]
            nodata = self.nodata if nodata is None else nodata
        valid = valid & ~np.isnan(values)
        return values, valid if nodata is None else valid & (values != nodata)


@lru_cache
def has_rasterio() -> bool:
    return importlib.util.find_spec("rasterio") is not None


def open_rasterio(path: Path, *mode: str, **profile: Any) -> Any:
    """`rasterio.open`, without its warning where there are no coordinates."""
    import rasterio

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        return rasterio.open(path, *mode, **profile)


def require_tifffile() -> Any:
    try:
        import tifffile
    except ImportError as error:
        raise UserError(
            "tile: needs the package rasterio (or tifffile, for TIFF only): pip install rasterio"
        ) from error
    return tifffile


@lru_cache(maxsize=2)
def _read_whole(path: Path) -> np.ndarray:
    """(bands, height, width) of a TIFF."""
    with require_tifffile().TiffFile(path) as file:
        axes, array = file.series[0].axes, file.series[0].asarray()
    array = np.moveaxis(array, (axes.index("Y"), axes.index("X")), (-2, -1))
    return array.reshape(-1, *array.shape[-2:])
