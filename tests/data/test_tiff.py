"""TIFF files whose 0 is white, and pages that are masks of others."""

import numpy as np
import pytest

from data.pictures import read_image

tifffile = pytest.importorskip("tifffile")


@pytest.mark.parametrize("shape", [(6, 5), (1, 9), (12, 3)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("compression", [None, "deflate"])
def test_zero_is_white_where_the_file_says_so(tmp_path, shape, dtype, compression):
    high = np.iinfo(dtype).max
    stored = np.random.default_rng(0).integers(0, high, shape).astype(dtype)
    path = tmp_path / "x.tif"
    try:
        tifffile.imwrite(path, stored, photometric="miniswhite", compression=compression)
    except (ImportError, KeyError, ValueError):
        pytest.skip("no imagecodecs")
    assert np.array_equal(read_image(path, None)[0].numpy(), high - stored)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_zero_is_white_in_grey_with_a_further_band(tmp_path, dtype):
    high = np.iinfo(dtype).max
    stored = np.random.default_rng(0).integers(0, high, (6, 5, 2)).astype(dtype)
    path = tmp_path / "x.tif"
    tifffile.imwrite(path, stored, photometric="miniswhite", planarconfig="contig",
                     extrasamples=["unspecified"])  # fmt: skip
    image = read_image(path, None).numpy()
    assert np.array_equal(image[0], high - stored[..., 0])
    assert np.array_equal(image[1], stored[..., 1])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, np.float64])
@pytest.mark.parametrize("order", ["mask last", "two pages"])
def test_pages_that_are_masks_are_no_channels(tmp_path, dtype, order):
    page = np.random.default_rng(0).random((6, 5))
    page = page.astype(dtype) if np.dtype(dtype).kind == "f" else (page * 200).astype(dtype)
    kept = {"two pages": 2}.get(order, 1)
    kinds = {"mask last": "im", "two pages": "imi"}[order]
    with tifffile.TiffWriter(tmp_path / "x.tif") as tiff:
        for kind in kinds:
            array = page if kind == "i" else np.ones((6, 5), bool)
            subfile = 0 if kind == "i" else 4
            tiff.write(array, subfiletype=subfile, photometric="minisblack", metadata=None)
    image = read_image(tmp_path / "x.tif", None)
    assert image.shape == (kept, 6, 5)
    assert np.allclose(image[0].numpy(), page)


def test_a_page_that_is_a_mask_can_still_be_asked_for(tmp_path):
    with tifffile.TiffWriter(tmp_path / "x.tif") as tiff:
        tiff.write(np.zeros((6, 5), np.uint8), metadata=None)
        tiff.write(np.ones((6, 5), bool), subfiletype=4, photometric="minisblack", metadata=None)
    assert (read_image(tmp_path / "x.tif", None, page=1) == 255).all()
