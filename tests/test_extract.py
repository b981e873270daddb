"""extract.py: every row is the model's own feature of the image that the index names."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import extract
from data.evaluation import EvalDataset
from data.sources.specs import open_data
from engine.cli import preparation
from errors import UserError
from extract import main
from models import load_backbone
from models.weights.save import save_backbone
from tests.processes import run_process

MODEL = "random:vit_nano?embed_dim=32&depth=2&num_heads=2&patch_size=8&image_size=32"


def run(capsys, output, *arguments, model=MODEL):
    main(
        [
            str(argument)
            for argument in ["--model", model, "--output", output, "--device", "cpu", *arguments]
        ]
    )
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    result = json.loads(lines[0])
    assert json.loads((output / "extract.json").read_text()) == result
    assert result["task"] == "extract"
    arrays = {kind: np.load(output / f"{kind}.npy", mmap_mode="r") for kind in result["features"]}
    assert {kind: list(array.shape) for kind, array in arrays.items()} == result["features"]
    with (output / "index.csv").open(newline="") as file:
        index = list(csv.DictReader(file))
    assert [int(line["row"]) for line in index] == list(range(result["n"]))
    assert not list(output.glob("*.part"))
    return result, arrays, index


def features_of(spec, model=MODEL):
    """One image at a time, straight from the model."""
    backbone = load_backbone(model)
    items = EvalDataset(
        open_data(spec, backbone.in_channels), **preparation(backbone.preprocessing, None, None)
    )
    with torch.no_grad():
        return [backbone(items[i][0][None]) for i in range(len(items))]


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("float16", 2e-3)])
@pytest.mark.parametrize("workers", [0, 2])
def test_rows_are_the_models_features_whatever_the_batch(
    tmp_path, capsys, dtype, tolerance, workers
):
    spec = "scenes?size=7"
    flags = [
        "--features",
        "cls",
        "mean",
        "patches",
        "--dtype",
        dtype,
        "--batch-size",
        3,
        "--workers",
        workers,
    ]
    result, arrays, index = run(capsys, tmp_path, "--data", spec, *flags)
    assert result["features"] == {"cls": [7, 32], "mean": [7, 32], "patches": [7, 16, 32]}
    assert result["grid"] == [4, 4]
    data = open_data(spec)
    for row, features in enumerate(features_of(spec)):
        assert all(array.dtype == dtype for array in arrays.values())
        for kind, value in [
            ("cls", features.cls),
            ("mean", features.patches.mean(1)),
            ("patches", features.patches),
        ]:
            assert np.allclose(arrays[kind][row], value[0], atol=tolerance)
        label = int(data.labels[row])
        assert index[row] == {
            "row": str(row),
            "name": data.name(row),
            "label": str(label),
            "class": data.classes[label],
        }


def test_images_that_cannot_be_read_have_no_row_and_are_listed(tmp_path, capsys, images):
    for name in ("0a.png", "5a.png", "zz.png"):
        (images / name).write_bytes(b"not a picture")
    output = tmp_path / "features"
    result, arrays, index = run(
        capsys, output, "--data", images, "--features", "mean", "--batch-size", 4
    )
    assert result["n"] == 12 and result["unreadable"] == 3 and arrays["mean"].shape == (12, 32)
    assert [Path(line["name"]).name for line in index] == sorted(
        f"{number}.png" for number in range(12)
    )
    assert all((line["label"], line["class"]) == ("-1", "") for line in index)
    listed = (output / "bad_images.txt").read_text().splitlines()
    assert [Path(line.partition(":")[0]).name for line in listed] == ["0a.png", "5a.png", "zz.png"]
    for name in ("0a.png", "5a.png", "zz.png"):
        (images / name).unlink()
    for row, features in enumerate(features_of(images)):
        assert np.allclose(arrays["mean"][row], features.patches[0].mean(0), atol=1e-5)
    assert run(capsys, output, "--data", images)[0]["unreadable"] == 0
    assert not (output / "bad_images.txt").exists()


@pytest.mark.parametrize("channels", [1, 6])
def test_one_image_of_any_channels_and_aspect_by_any_model(tmp_path, capsys, channels):
    pixels = np.random.default_rng(0).integers(0, 256, (1, 20, 47, channels), dtype=np.uint8)
    np.savez(tmp_path / "one.npz", train_images=pixels)
    data = [
        "--data",
        f"{tmp_path / 'one.npz'}?split=train",
        "--size",
        "16",
        "40",
        "--features",
        "cls",
        "patches",
    ]
    result, _, _ = run(capsys, tmp_path, *data, model=f"{MODEL}&in_channels={channels}")
    assert result["features"] == {"cls": [1, 32], "patches": [1, 10, 32]}
    assert result["grid"] == [2, 5]
    model = f"pixels?patch_size=8&image_size=16&in_channels={channels}"
    result, _, _ = run(capsys, tmp_path, *data, model=model)
    assert result["features"] == {"cls": [1, channels * 256], "patches": [1, 10, channels * 64]}


def test_classes_of_folders_stand_in_the_index(tmp_path, capsys, images):
    for name in ("cat", "dog"):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", (40, 40)).save(tmp_path / "data" / name / "a, b.png")
    _, _, index = run(capsys, tmp_path, "--data", tmp_path / "data")
    assert [(line["label"], line["class"]) for line in index] == [("0", "cat"), ("1", "dog")]
    assert all(line["name"].endswith("a, b.png") for line in index)


def test_features_beyond_float16_are_refused(tmp_path):
    backbone = load_backbone(MODEL)
    torch.nn.init.constant_(backbone.norm.bias, 1e5)
    save_backbone(backbone, tmp_path / "model", backbone.preprocessing)
    arguments = [
        "--model",
        str(tmp_path / "model"),
        "--data",
        "scenes?size=2",
        "--output",
        str(tmp_path / "out"),
    ]
    main([*arguments, "--device", "cpu"])
    with pytest.raises(ValueError, match="cls features are not finite in float16"):
        main([*arguments, "--device", "cpu", "--dtype", "float16"])


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--data", "scenes?size=2"], "--output is missing"),
        (["--data", "folder:/nowhere", "--output", "OUT"], "/nowhere"),
        (["--data", "scenes", "--output", "OUT", "--batch-size", "0"], "--batch-size is 0"),
        (["--data", "scenes", "--output", "OUT", "--features", "all"], "patches"),
        (["--data", "BROKEN", "--output", "OUT"], "none of the 1 images"),
        (["--data", "scenes", "--output", "BROKEN/x.png"], "x.png"),
    ],
)
def test_mistakes_are_said_in_one_sentence(tmp_path, arguments, words, capsys):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "x.png").write_bytes(b"not a picture")
    named = {
        "OUT": tmp_path / "out",
        "BROKEN": tmp_path / "broken",
        "BROKEN/x.png": tmp_path / "broken" / "x.png",
    }
    arguments = [str(named.get(word, word)) for word in arguments]
    with pytest.raises((ValueError, OSError, SystemExit)) as error:
        main(["--model", MODEL, "--device", "cpu", *arguments])
    assert words in f"{error.value} {capsys.readouterr().err}"


def test_a_mistake_ends_with_status_two(tmp_path):
    arguments = ["--model", MODEL, "--data", "scenes", "--batch-size", "0"]
    done = run_process("extract.py", *arguments, "--output", str(tmp_path))
    assert (
        done.returncode == 2
        and done.stderr.startswith("error: --batch-size is 0")
        and not done.stdout
    )


# ----------------------------------------------------------------- what an earlier call left


def written(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def extract_scenes(output, size, *kinds, model="random:vit_nano?depth=1&patch_size=8"):
    arguments = ["--model", model, "--data", f"scenes?size={size}", "--size", "32"]
    extract.main([*arguments, "--output", str(output), "--features", *kinds])


def test_a_further_call_leaves_no_arrays_of_the_earlier_one(tmp_path):
    extract_scenes(tmp_path, 24, "cls", "patches")
    extract_scenes(tmp_path, 3, "cls")
    assert sorted(written(tmp_path)) == ["cls.npy", "extract.json", "index.csv"]
    assert len(np.load(tmp_path / "cls.npy")) == 3


def test_a_call_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    extract_scenes(tmp_path, 4, "cls")
    before = written(tmp_path)
    append = extract.Writer.append

    def full(self, values):
        append(self, values)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(extract.Writer, "append", full)
    with pytest.raises(OSError, match="No space left"):
        extract_scenes(tmp_path, 5, "patches", "cls")
    assert written(tmp_path) == before


def test_arrays_of_other_programs_are_not_replaced(tmp_path):
    np.save(tmp_path / "cls.npy", np.zeros(3))
    before = written(tmp_path)
    with pytest.raises(UserError, match=r"holds cls\.npy, but no index\.csv"):
        extract_scenes(tmp_path, 4, "cls")
    assert written(tmp_path) == before
