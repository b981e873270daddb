"""transformers' image processor of an export makes the pixels that our own reader makes."""

import json

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

import export
import extract
import train
from data.evaluation import EvalDataset
from data.sources.specs import open_data
from errors import UserError
from export import model_card
from models.features import Preprocessing
from models.vit import VisionTransformer
from models.weights.load import load_backbone
from models.weights.processors import read_preprocessing, write_preprocessing
from models.weights.save import write_backbone

SMALL = {"embed_dim": 32, "depth": 1, "num_heads": 2, "patch_size": 8, "image_size": 32}
KINDS = {np.uint8: 255, np.uint16: 65535, np.float32: 1}


def stored(folder, channels, dtype):
    """Images (C, 40, 60) in an array file, and what our reader makes of them."""
    rng = np.random.default_rng(0)
    # Smooth: where a filter overshoots, we clamp, and transformers does not beyond 8 bits.
    coarse = torch.from_numpy(rng.uniform(0.2, 0.8, (2, channels, 4, 6)))
    smooth = interpolate(coarse, (40, 60), mode="bilinear").permute(0, 2, 3, 1).numpy()
    images = (smooth * KINDS[dtype]).astype(dtype)
    np.savez(folder / "images.npz", images=images)
    statistics = (0.4,) * channels, (0.2,) * channels
    data = open_data(f"npz:{folder / 'images.npz'}", channels)
    ours = EvalDataset(data, resize=36, size=(32, 32), mean=statistics[0], std=statistics[1])
    pixels = torch.stack([ours[number][0] for number in range(2)])
    preprocessing = Preprocessing((32, 32), 36, *statistics, scale=float(KINDS[dtype]))
    return images, pixels, preprocessing


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 12])
def test_the_processor_of_an_export_reproduces_our_pixels(channels, dtype, tmp_path):
    transformers = pytest.importorskip("transformers")
    images, ours, preprocessing = stored(tmp_path, channels, dtype)
    backbone = VisionTransformer(**SMALL, in_channels=channels).eval()
    backbone.preprocessing = preprocessing
    write_backbone(backbone, preprocessing, tmp_path / "hf", "hf")
    card = model_card("random:x", "hf", backbone, [])
    options = {"input_data_format": "channels_first"} if channels not in (1, 3) else {}
    assert ("channels_first" in card) == bool(options) and f"from 0 to {KINDS[dtype]:g}" in card
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf")
    tensors = [torch.from_numpy(image).permute(2, 0, 1) for image in images]
    theirs = processor(images=tensors, return_tensors="pt", **options)["pixel_values"]
    # 8 bits are rounded after the resize by both, 16 by transformers only.
    atol = {np.uint8: 1e-5, np.uint16: 2 / 65535 / 0.2, np.float32: 1e-5}[dtype]
    torch.testing.assert_close(theirs, ours, rtol=0, atol=atol)
    model = transformers.AutoModel.from_pretrained(tmp_path / "hf").eval()
    with torch.inference_mode():
        cls = model(pixel_values=theirs).last_hidden_state[:, 0]
        torch.testing.assert_close(cls, backbone(ours).cls, rtol=1e-2, atol=1e-2)
    read = load_backbone(tmp_path / "hf").preprocessing
    assert (read.scale, read.size, read.resize) == (KINDS[dtype], (32, 32), 36)


@pytest.mark.parametrize("dtype", KINDS)
def test_a_run_writes_the_scale_of_its_images(dtype, tiny, tmp_path):
    stored(tmp_path, 1, dtype)
    train.main([*tiny, f"data.train=npz:{tmp_path / 'images.npz'}", "data.channels=1"])
    folder = tmp_path / "run" / "teacher"
    values = json.loads((folder / "preprocessor_config.json").read_text())
    assert values["rescale_factor"] == pytest.approx(1 / KINDS[dtype])
    assert values["do_convert_rgb"] is False
    assert load_backbone(tmp_path / "run").preprocessing.scale == KINDS[dtype]


@pytest.mark.parametrize("name, number, ours", [("lanczos", 1, "bicubic"), ("box", 4, "bilinear")])
def test_filters_that_are_not_ours_become_the_nearest_and_are_said(name, number, ours, capsys):
    values = write_preprocessing(Preprocessing((32, 32), 36, (0.5,), (0.5,)))
    found = read_preprocessing(values | {"resample": number}, "file")
    assert found.interpolation == ours and f"asks for {name}" in capsys.readouterr().err
    data = open_data("scenes?size=1")
    image = EvalDataset(
        data, resize=36, size=(32, 32), mean=(0.5,), std=(0.5,), interpolation=ours
    )[0][0]
    assert image.isfinite().all()
    with pytest.raises(UserError, match="file is no image processor"):
        read_preprocessing(values | {"resample": 17}, "file")


def test_squeezing_is_said(capsys):
    values = write_preprocessing(Preprocessing((32, 32), 32, (0.5,) * 3, (0.5,) * 3))
    read_preprocessing(values, "file")
    assert not capsys.readouterr().err
    read_preprocessing(
        {"size": {"height": 32, "width": 32}, "image_mean": [0.5], "image_std": [0.5]}, "file"
    )
    assert "squeezes images into 32 x 32 pixels" in capsys.readouterr().err


def test_a_window_travels_with_the_weights_and_is_missed(tiny, tmp_path, capsys):
    rng = np.random.default_rng(0)
    (tmp_path / "ct").mkdir()
    for number in range(12):
        values = rng.uniform(-1000, 1000, (32, 32)).astype(np.float32)
        np.save(tmp_path / "ct" / f"{number}.npy", values)
    data = f"{tmp_path / 'ct'}?window=40,400"
    train.main([*tiny, f"data.train={data}", "data.channels=1"])
    assert load_backbone(tmp_path / "run").preprocessing.window == (40, 400)
    export.main(["--model", str(tmp_path / "run"), "--format", "hf", "--output", f"{tmp_path}/hf"])
    assert load_backbone(tmp_path / "hf").preprocessing.window == (40, 400)
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "window (centre, width) (40.0, 400.0)" in card and "clip values to the window" in card
    capsys.readouterr()
    arguments = ["--model", str(tmp_path / "run"), "--output", str(tmp_path / "out")]
    extract.main([*arguments, "--data", "scenes?size=2"])
    assert "trained on images with window=40,400" in capsys.readouterr().err
    extract.main([*arguments, "--data", data])
    assert "trained on images" not in capsys.readouterr().err
