"""Maps stitched from windows, GeoTIFF files of them, and errors of canopy heights."""

import json

import numpy as np
import pytest
import torch

import eval_dense
import visualize
from data.sources.rasters import has_rasterio, open_rasterio
from errors import UserError
from evals.canopy import CanopyErrors
from evals.heads import TrainedHead, load_head, save_head
from evals.stitch import blend_weights, stitch

needs_rasterio = pytest.mark.skipif(not has_rasterio(), reason="no rasterio")
MODEL = "random:vit_nano?patch_size=8&image_size=32"


def of_each_pixel(images):
    return torch.stack([images.sum(1).sin(), images[:, 0]], dim=1)


@pytest.mark.parametrize("stride", [None, 11, 40])
@pytest.mark.parametrize("window", [48, 64, 500])
def test_a_function_without_positions_is_stitched_to_itself(window, stride):
    image = torch.rand(3, 150, 101)
    found = stitch(of_each_pixel, image, window, stride)
    assert (found - of_each_pixel(image[None])[0]).abs().max() < 1e-5


@pytest.mark.parametrize("length, side, stride", [(100, 32, 16), (100, 32, 28), (33, 32, 5)])
def test_weights_add_up_to_one_and_leave_out_borders(length, side, stride):
    starts, weights = blend_weights(length, side, stride)
    total = torch.zeros(length)
    for start, weight in zip(starts, weights, strict=True):
        total[start : start + side] += weight
        assert weight.min() >= 0
        assert start == 0 or weight[: side // 16].max() == 0
        assert start + side == length or weight[-(side // 16) :].max() == 0
    assert torch.allclose(total, torch.ones(length))


def test_windows_too_far_apart_are_refused():
    with pytest.raises(UserError, match="only up to 56"):
        stitch(of_each_pixel, torch.rand(3, 150, 101), 64, 60)


def naive_canopy(guesses, heights):
    guesses = [guess.clamp(min=0) for guess in guesses]

    def r2(guess, truth):
        return 1 - ((guess - truth) ** 2).sum() / ((truth - truth.mean()) ** 2).sum()

    blocks = [[], []]
    for maps in zip(guesses, heights, strict=True):
        for kept, image in zip(blocks, maps, strict=True):
            for top in range(3, image.shape[0] - 49, 50):
                for left in range(3, image.shape[1] - 49, 50):
                    kept.append(image[top : top + 50, left : left + 50].mean())
    guess, truth = (torch.cat([image.flatten() for image in maps]) for maps in (guesses, heights))
    error = guess - truth
    values = {"mae": error.abs().mean(), "rmse": error.square().mean().sqrt()}
    values |= {"bias": error.mean(), "r2": r2(guess, truth)}
    return values | {"block_r2": r2(*(torch.stack(kept) for kept in blocks))}


def test_canopy_errors_equal_sums_over_all_pixels_and_blocks():
    generator = torch.Generator().manual_seed(0)
    heights, guesses, errors = [], [], CanopyErrors()
    for shape in ((120, 160), (104, 57)):
        rough = torch.rand(1, 1, 5, 6, generator=generator) * 30 + 1
        height = torch.nn.functional.interpolate(rough, shape, mode="bilinear")[0, 0]
        guess = height + 3 * torch.randn(shape, generator=generator) - 1
        errors.add(guess, height)
        heights.append(height), guesses.append(guess)
    expected = naive_canopy(guesses, heights)
    found = errors.result()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(float(value), rel=1e-4), name


def test_pixels_without_height_count_in_no_canopy_error():
    height = torch.rand(150, 150) * 20 + 1
    guess = height + torch.randn(150, 150)
    whole, holed, errors = CanopyErrors(), height.clone(), CanopyErrors()
    holed[0:3] = torch.nan
    whole.add(guess[3:], height[3:])
    errors.add(torch.where(holed.isnan(), 1e6, guess), holed)
    assert errors.sums[0].tolist() == pytest.approx(whole.sums[0].tolist())
    flat = CanopyErrors()
    flat.add(torch.ones(20, 20), torch.full((20, 20), 2.0))
    assert flat.result() == {"mae": 1, "rmse": 1, "bias": -1, "r2": None, "block_r2": None}


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """A folder with a georeferenced raster, its heights, a raster without coordinates, and a
    head."""
    from rasterio.transform import from_origin

    folder = tmp_path_factory.mktemp("scene")
    rng = np.random.default_rng(0)
    height = np.kron(rng.random((10, 12)) * 30, np.ones((16, 16))).astype(np.float32)
    image = (height * 200 + 500 * rng.random((4, 160, 192)) + 1000).astype(np.uint16)
    image[:, :40, :40] = 0
    place = {"crs": "EPSG:32633", "transform": from_origin(5e5, 5e6, 10, 10)}
    shape = {"driver": "GTiff", "height": 160, "width": 192}
    for name, array, extra in (
        ("image", image, place | {"nodata": 0}),
        ("height", height[None], place | {"nodata": -1}),
        ("nowhere", image, {}),
    ):
        options = shape | {"count": len(array), "dtype": array.dtype.name} | extra
        with open_rasterio(folder / f"{name}.tif", "w", **options) as file:
            file.write(array)
    data = f"tile:{folder}/image.tif?bands=4,3,2&scale=10000&size=64&height={folder}/height.tif"
    eval_dense.main(
        ["depth", "--model", MODEL, "--train", data, "--val", data, "--canopy", "--steps", "20"]
        + ["--size", "64", "--workers", "0", "--device", "cpu", "--output", str(folder / "head")]
    )
    return folder


@needs_rasterio
def test_depth_reports_canopy_errors(scene):
    found = json.loads((scene / "head/depth.json").read_text())
    assert found["canopy"].keys() == {"mae", "rmse", "bias", "r2", "block_r2"}
    assert found["canopy"]["rmse"] < 15


def draw(scene, images, *more):
    output = ["--output", str(scene / "out.png"), "--device", "cpu"]
    visualize.main(
        ["predictions", "--head", str(scene / "head"), "--images", images, *output, *more]
    )


@needs_rasterio
def test_a_geotiff_of_predictions_keeps_the_coordinates(scene):
    spec = f"tile:{scene}/image.tif?bands=4,3,2&scale=10000&size=64"
    draw(scene, spec, "--geotiff", str(scene / "out.tif"))
    with open_rasterio(scene / "out.tif") as found, open_rasterio(scene / "image.tif") as image:
        assert (found.crs, found.transform) == (image.crs, image.transform)
        assert found.shape == image.shape and found.dtypes == ("float32",)
        heights = found.read(1)
    assert np.isnan(heights[:40, :40]).all() and np.isfinite(heights[40:]).all()


@needs_rasterio
def test_classes_of_a_geotiff_are_bytes(scene, tmp_path):
    trained = load_head(scene / "head")
    trained.settings.task, trained.settings.options = "segmentation", {"classes": 3}
    save_head(tmp_path, TrainedHead(trained.backbone, trained.settings.build(), trained.settings))
    spec = f"tile:{scene}/image.tif?bands=4,3,2&scale=10000&size=64"
    visualize.main(
        ["predictions", "--head", str(tmp_path), "--images", spec, "--device", "cpu"]
        + ["--output", str(tmp_path / "o.png"), "--geotiff", str(tmp_path / "o.tif")]
    )
    with open_rasterio(tmp_path / "o.tif") as found:
        classes = found.read(1)
        assert found.dtypes == ("uint8",) and found.nodata == 255
    assert (classes[:40, :40] == 255).all() and classes[40:].max() < 3


@needs_rasterio
def test_pictures_are_drawn_by_windows(scene, capsys):
    for window in ("32", "400"):
        draw(scene, "scenes?size=1", "--size", "64", "--window", window)
        assert json.loads(capsys.readouterr().out)["images"][0]["farthest"] > 0


@needs_rasterio
@pytest.mark.parametrize(
    "images, more, words",
    [
        ("tile:{}/nowhere.tif?bands=1,2,3&size=64", ["--geotiff", "{}/x.tif"], "no coordinates"),
        ("tile:{}/[in]*.tif?bands=1,2,3&size=64", ["--geotiff", "{}/x.tif"], "2 files"),
        ("scenes?size=1", ["--geotiff", "{}/x.tif"], "tile:FILE.tif"),
        ("tile:{}/image.tif?bands=9&size=64", ["--geotiff", "{}/x.tif"], "band 9"),
        ("scenes?size=1", ["--window", "4"], "--window is 4"),
    ],
)
def test_a_mistake_with_windows_is_one_sentence(scene, images, more, words):
    with pytest.raises(UserError, match=words):
        draw(scene, images.format(scene), *(text.format(scene) for text in more))
