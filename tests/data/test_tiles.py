"""Windows of large images: `tile:`, with nodata, bands and scale; statistics of its bands."""

import json
import sys

import numpy as np
import pytest
import torch

import export
import extract
import train
from data import stats
from data.evaluation import EvalDataset
from data.sources import rasters, tiles
from data.sources.specs import UnreadableImage, open_data
from errors import UserError
from models.weights.load import load_backbone

tifffile = pytest.importorskip("tifffile")
with_rasterio = pytest.mark.skipif(not rasters.has_rasterio(), reason="no rasterio")
LIBRARIES = ["tifffile", pytest.param("rasterio", marks=with_rasterio)]


@pytest.fixture(params=LIBRARIES)
def library(request, monkeypatch):
    """Each test with both libraries."""
    for module in (rasters, tiles):
        monkeypatch.setattr(module, "has_rasterio", lambda: request.param == "rasterio")


def write(path, array: np.ndarray, nodata: float | None = None):
    """(bands, H, W) as a TIFF."""
    text = None if nodata is None else f"{nodata}"
    tags = [] if text is None else [(42113, "s", len(text) + 1, text, True)]
    planar = {"planarconfig": "separate"} if len(array) > 1 else {}
    tifffile.imwrite(path, array, photometric="minisblack", extratags=tags, **planar)
    return path


def counts(bands: int, height: int = 60, width: int = 90, high: int = 10_000) -> np.ndarray:
    return np.random.default_rng(0).integers(1, high, (bands, height, width)).astype(np.uint16)


def test_thirteen_bands_of_sixteen_bits_come_back_as_they_are(tmp_path, library):
    stored = counts(13)
    write(tmp_path / "a.tif", stored)
    data = open_data(f"tile:{tmp_path}/*.tif?size=32&stride=32", 13)
    assert len(data) == 2 * 3
    rebuilt = np.zeros_like(stored)
    for index, (_, top, left) in enumerate(data.windows.tolist()):
        image = data.image(index)
        assert image.dtype == torch.uint16
        rebuilt[:, top : top + 32, left : left + 32] = image.numpy()
    assert np.array_equal(rebuilt, stored)


def test_windows_at_the_edge_are_shifted_inside(tmp_path, library):
    write(tmp_path / "a.tif", counts(3))
    data = open_data(f"tile:{tmp_path}?size=32&stride=40")
    assert data.windows.tolist() == [[0, y, x] for y in (0, 28) for x in (0, 40, 58)]
    assert all(data.image(k).shape == (3, 32, 32) for k in range(len(data)))
    assert data.name(5) == f"{tmp_path / 'a.tif'}[28,58]"


def test_bands_count_from_one_and_scale_says_what_becomes_one(tmp_path, library):
    stored = counts(5)
    for name in "ab":
        write(tmp_path / f"{name}.tif", stored)
    data = open_data(f"tile:{tmp_path}/[ab].tif?size=60&bands=4,3,2&scale=5000")
    expected = (stored[[3, 2, 1], :60, :60] / 5000).clip(0, 1).astype(np.float32)
    assert len(data) == 4 and np.array_equal(data.image(2).numpy(), expected)
    assert data.span == ((0.0, 5000.0),)
    pairs = open_data(f"tile:{tmp_path}/a.tif?size=60&bands=1,2&scale=0,5000,1000,2000", 2)
    second = ((stored[1, :60, :60] - 1000.0) / 1000).clip(0, 1)
    assert np.allclose(pairs.image(0)[1].numpy(), second)


def test_percentiles_are_of_the_data_set_and_of_each_band(tmp_path, library):
    stored = np.stack([counts(1)[0], counts(1)[0] // 10 + 1])
    stored[:, :, :10] = 0
    write(tmp_path / "a.tif", stored, nodata=0)
    data = open_data(f"tile:{tmp_path}/a.tif?size=30&stride=30&scale=percentile(2,98)", 2)
    known = stored[:, :, 10:].reshape(2, -1)
    assert np.allclose(data.span, np.percentile(known, (2, 98), axis=1).T)


@pytest.mark.parametrize("key", ["", "&nodata=0"])
def test_nodata_is_zero_after_normalisation(tmp_path, library, key):
    stored = counts(3)
    stored[:, :20, :20] = 0
    write(tmp_path / "a.tif", stored, nodata=None if key else 0)
    data = open_data(f"tile:{tmp_path}/a.tif?size=60&stride=30&scale=10000{key}")
    items = EvalDataset(data, 60, (60, 60), (0.3, 0.4, 0.5), (0.2, 0.2, 0.2))
    image = items[0][0]
    assert torch.equal(image[:, :20, :20], torch.zeros(3, 20, 20))
    expected = (stored[:, 20:, :60] / 1e4 - np.array([0.3, 0.4, 0.5])[:, None, None]) / 0.2
    assert np.allclose(image[:, 20:].numpy(), expected, atol=1e-5)


def test_windows_that_are_mostly_nodata_are_skipped_and_counted(tmp_path, library):
    stored = counts(3, 32, 96)
    stored[:, :, :60] = 0
    write(tmp_path / "a.tif", stored, nodata=0)
    data = open_data(f"tile:{tmp_path}/a.tif?size=32&stride=32")
    assert data.windows.tolist() == [[0, 0, 64]]
    assert data.passed_over == [f"{tmp_path}: 2 of 3 windows are more than half nodata and skipped"]


@pytest.mark.parametrize("kind", [np.uint16, np.int16, np.float32])
def test_a_tile_half_nodata_has_the_statistics_of_its_other_half(tmp_path, library, kind):
    stored = counts(4, 40, 80).astype(kind)
    write(tmp_path / "half.tif", stored[:, :, 40:])
    stored[:, :, :40] = -9999 if kind != np.uint16 else 0
    write(tmp_path / "whole.tif", stored, nodata=float(stored[0, 0, 0]))
    scale = "scale=10000"
    whole = stats.collect(open_data(f"tile:{tmp_path}/whole.tif?size=40&stride=80&{scale}", 4))
    assert whole["images"] == 1  # the left window is skipped
    # One window over both halves: as if the valid half were alone.
    square = np.concatenate([stored, stored[:, ::-1]], axis=1)
    write(tmp_path / "square.tif", square, nodata=float(stored[0, 0, 0]))
    right = np.concatenate([stored[:, :, 40:], stored[:, ::-1, 40:]], axis=1)
    write(tmp_path / "right.tif", np.concatenate([right, right], axis=2))
    square = stats.collect(open_data(f"tile:{tmp_path}/square.tif?size=80&{scale}", 4))
    right = stats.collect(open_data(f"tile:{tmp_path}/right.tif?size=80&{scale}", 4))
    assert square["nodata"] == [0.5] * 4 and right["nodata"] == [0.0] * 4
    for name in ("mean", "std", "min", "max", "saturated", "unit"):
        assert square[name] == pytest.approx(right[name], abs=1e-5), name
    for share, values in square["percentiles"].items():
        assert values == pytest.approx(right["percentiles"][share], abs=2), share


def test_statistics_say_what_a_person_needs_to_choose_a_scale(tmp_path, capsys):
    stored = counts(2)
    stored[0, :30] = 9_999
    write(tmp_path / "a.tif", stored.astype(np.int16))
    stats.main([f"tile:{tmp_path}/a.tif?size=30&stride=30"])
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert result["dtype"] == {"int16": 6} and result["mean"] is None  # no range is known
    assert result["scale"] == "10000" and "scale=10000" in printed.err
    assert result["max"][0] == 9999 and result["saturated"][0] > 0.49 > result["saturated"][1]
    known = np.percentile(stored.reshape(2, -1), 50, axis=1)
    assert result["percentiles"]["50"] == pytest.approx(known.tolist(), abs=1)


@pytest.mark.parametrize(
    "query, words",
    [
        ("size=32&bands=4,3,14", "band 14"),
        ("bands=0,1,2", "from 1"),
        ("size=512", "smaller than size=512"),
        ("size=32&scale=2,1", "scale is '2,1'"),
        ("size=32&scale=1,2,3,4&bands=1,2,3", "one for each band"),
        ("size=32&nodata=none", "nodata is 'none'"),
        ("size=32&stride=0", "stride must be a whole number"),
        ("size=32&height=/nowhere/*.tif", "no file '/nowhere/*.tif'"),
        ("size=32&window=1,2", "unknown key 'window'"),
    ],
)
def test_a_mistake_in_the_spec_is_one_sentence(tmp_path, library, query, words):
    write(tmp_path / "a.tif", counts(4))
    with pytest.raises((UserError, FileNotFoundError), match=words.replace("*", r"\*")) as found:
        open_data(f"tile:{tmp_path}/a.tif?{query}")
    assert "\n" not in str(found.value)


def test_no_file_matches(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file"):
        open_data(f"tile:{tmp_path}/*.tif")


def test_neither_library(tmp_path, monkeypatch):
    write(tmp_path / "a.tif", counts(3))
    monkeypatch.setattr(tiles, "has_rasterio", lambda: False)
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(UserError, match="pip install rasterio"):
        open_data(f"tile:{tmp_path}/a.tif?size=32")


def test_values_without_a_known_range_ask_for_a_scale(tmp_path, library):
    write(tmp_path / "a.tif", counts(3).astype(np.int16))
    data = open_data(f"tile:{tmp_path}/a.tif?size=32")
    with pytest.raises(UnreadableImage, match="scale=HIGH"):
        data.image(0)


def test_a_broken_file_is_passed_over(tmp_path, library):
    write(tmp_path / "a.tif", counts(3))
    (tmp_path / "b.tif").write_bytes(b"II*\0" + bytes(20))
    data = open_data(f"tile:{tmp_path}?size=60")
    assert len(data) == 2 and "b.tif" in data.passed_over[-1]
    (tmp_path / "a.tif").unlink()
    with pytest.raises(UserError, match="no windows"):
        open_data(f"tile:{tmp_path}?size=60")


def test_masks_and_heights_are_cut_as_the_images_are(tmp_path, library):
    write(tmp_path / "a.tif", counts(3))
    heights = np.random.default_rng(1).random((1, 60, 90)).astype(np.float32) * 30
    heights[0, 5, 5], heights[0, 6, 6] = 0, -1
    write(tmp_path / "h.tif", heights, nodata=-1)
    classes = np.random.default_rng(2).integers(0, 4, (1, 60, 90)).astype(np.uint8)
    write(tmp_path / "m.tif", classes)
    notes = f"height={tmp_path}/h.tif&mask={tmp_path}/m.tif"
    data = open_data(f"tile:{tmp_path}/a.tif?size=40&stride=40&{notes}")
    found = data.annotations(0)
    assert np.isnan(found["depth"][6, 6]) and found["depth"][5, 5] == np.float32(1e-3)
    assert np.array_equal(found["mask"], classes[0, :40, :40])
    assert np.array_equal(data.annotations(4)["depth"][20:], heights[0, 40:, 40:80])


def test_what_makes_other_images_makes_another_fingerprint(tmp_path):
    write(tmp_path / "a.tif", counts(3))
    specs = ["size=32", "size=40", "size=32&stride=16", "size=32&first=2", "size=32&scale=9000"]
    prints = [open_data(f"tile:{tmp_path}/a.tif?{spec}").fingerprint() for spec in specs]
    assert len(set(prints)) == len(specs)


def test_the_scale_of_a_run_is_kept_in_it_and_in_its_exports(tmp_path, tiny, capsys):
    stored = counts(4, 64, 128)
    stored[:, :10, :10] = 0
    write(tmp_path / "a.tif", stored, nodata=0)
    data = f"tile:{tmp_path}/a.tif?size=64&stride=32&scale=percentile(2,98)"
    train.main([*tiny, f"data.train={data}", "data.channels=4", "batch_size=4", "total_steps=2"])
    run = tmp_path / "run"
    span = open_data(data, 4).span
    export.main(["--model", str(run), "--format", "hf", "--output", str(tmp_path / "hf")])
    for folder in (run, tmp_path / "hf"):
        kept = load_backbone(folder).preprocessing
        assert np.allclose(kept.span, span) and len(kept.span) == 4
    asked = kept.asked_of_data()["scale"]
    assert f"scale={asked}" in (tmp_path / "hf/README.md").read_text()
    for scale, said in ((asked, False), ("10000", True)):
        capsys.readouterr()
        other = f"tile:{tmp_path}/a.tif?size=64&scale={scale}"
        output = ["--output", str(tmp_path / "features"), "--device", "cpu", "--workers", "0"]
        extract.main(["--model", str(run), "--data", other, *output])
        assert (f"scale={asked}" in capsys.readouterr().err) == said


def test_loader_processes_read_the_same_windows(tmp_path, tiny):
    write(tmp_path / "a.tif", counts(3, 64, 128))
    key = f"data.train=tile:{tmp_path}/a.tif?size=64&stride=32&scale=10000"
    states = []
    for workers in (0, 2):
        run = tmp_path / f"run{workers}"
        options = ["batch_size=4", "total_steps=2", f"data.workers={workers}"]
        train.main([*tiny, key, *options, f"output_dir={run}"])
        states.append(load_backbone(run).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
