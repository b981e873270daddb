"""Pictures: colours free of chance, honest patch grids, curves from whatever was logged."""

import json

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from data.augment import POLICIES, channel_statistics, multi_crop_from
from engine.config import CropsConfig
from engine.figures import (
    COLOURS,
    attention_image,
    curve_names,
    draw_curves,
    draw_report,
    foreground,
    pca_basis,
    pca_image,
    running_mean,
    to_picture,
)
from models.features import Features
from visualize import main

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def read(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def random_features(images, grid, dim=16):
    patches = torch.randn(images, grid[0] * grid[1], dim)
    return Features(patches.mean(dim=1), patches[:, :0], patches, grid)


def records(steps, **fields):
    return [{"step": step, **{key: value(step) for key, value in fields.items()}} for step in range(0, steps * 10, 10)]


# PCA.


def test_principal_components_are_the_directions_of_largest_variance_in_order():
    rotation = torch.linalg.qr(torch.randn(8, 8))[0]
    points = torch.randn(4000, 8) * torch.tensor([5.0, 3.0, 2.0, 0.1, 0.1, 0.1, 0.1, 0.1]) @ rotation + 7
    basis = pca_basis(points)
    assert torch.allclose((basis.axes.float() @ rotation.T).abs(), torch.eye(3, 8), atol=0.1)
    assert torch.allclose(basis.axes @ basis.axes.T, torch.eye(3).double(), atol=1e-9)


def test_the_basis_is_the_same_for_tokens_in_another_order_and_of_the_other_sign():
    points = torch.randn(100, 12) * torch.arange(1, 13)
    basis = pca_basis(points)
    for other in (points[torch.randperm(100)], -points):
        assert torch.allclose(pca_basis(other).axes, basis.axes, atol=1e-8)
    assert (basis.axes.gather(1, basis.axes.abs().argmax(dim=1, keepdim=True)) > 0).all()


@pytest.mark.parametrize(
    "patches, flat",
    [(torch.ones(6, 5) * 1e3, 3), (torch.randn(1, 5), 3), (torch.randn(2, 5), 2), (torch.randn(6, 2), 1)],
    ids=["constant", "one patch", "two patches", "two dimensions"],
)
def test_components_that_do_not_exist_are_grey(patches, flat):
    picture = pca_image(patches, (len(patches), 1), pca_basis(patches))
    assert picture.shape == (len(patches), 1, 3)
    assert (picture[..., 3 - flat :] == 127).all()
    assert flat == 3 or len(np.unique(picture[..., 0])) > 1


def test_a_pca_picture_lies_row_by_row_on_a_grid_that_is_not_square():
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(7.0), indexing="ij")
    patches = torch.stack([30 * rows, columns, torch.zeros(4, 7)], dim=-1).flatten(0, 1)
    picture = pca_image(patches, (4, 7), pca_basis(patches)).astype(int)
    assert picture.shape == (4, 7, 3)
    assert (np.diff(picture[..., 0], axis=0) > 0).all() and (np.diff(picture[..., 0], axis=1) == 0).all()
    assert (np.diff(picture[..., 1], axis=1) > 0).all() and (np.diff(picture[..., 1], axis=0) == 0).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_the_foreground_is_the_side_away_from_the_border(sign):
    inside = torch.zeros(6, 9, dtype=torch.bool)
    inside[2:4, 3:6] = True
    patches = torch.randn(54, 10) * 0.1
    patches[inside.flatten()] += sign * torch.arange(10)
    keep = foreground(patches, (6, 9))
    assert torch.equal(keep, inside.flatten())
    picture = pca_image(patches, (6, 9), pca_basis(patches[keep]), keep)
    assert (picture[~inside.numpy()] == 0).all() and (picture[inside.numpy()] > 0).any()


def test_patches_that_are_all_alike_are_all_foreground():
    assert foreground(torch.ones(12, 5), (3, 4)).all()


def test_attention_maps_leave_cls_and_registers_out():
    attention = torch.zeros(2, 9, 9)
    attention[1, 0, 3:] = torch.arange(6.0)
    attention[:, 0, :3] = 100
    attention[:, 1:] = 200
    maps = attention_image(attention, (2, 3), prefix=3)
    assert torch.equal(maps, torch.stack([torch.zeros(2, 3), torch.arange(6.0).view(2, 3)]))


# Images.


@pytest.mark.parametrize("channels, shown", [(1, [0, 0, 0]), (3, [0, 1, 2]), (13, [0, 1, 2])])
def test_pictures_show_the_pixels_before_normalisation(channels, shown):
    pixels = torch.randint(0, 256, (channels, 5, 4), dtype=torch.uint8)
    mean, std = torch.rand(channels), torch.rand(channels) + 0.1
    normalised = (pixels / 255 - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
    picture = to_picture(normalised, mean.tolist(), std.tolist())
    assert picture.dtype == np.uint8
    assert np.array_equal(picture, pixels[shown].permute(1, 2, 0).numpy())


def test_pictures_survive_values_out_of_range():
    image = torch.tensor([float("nan"), float("inf"), -9.0, 9.0]).view(1, 2, 2)
    assert to_picture(image, [0.5], [0.5])[..., 0].tolist() == [[0, 255], [0, 255]]


# Reports.


@pytest.mark.parametrize("count, size, grid", [(3, (16, 16), (4, 4)), (1, (16, 32), (2, 4))])
def test_a_report_has_a_row_for_every_image(tmp_path, count, size, grid):
    images = torch.randn(count, 3, *size) * 0.5
    tokens = 2 + grid[0] * grid[1]
    attention = torch.rand(count, 2, tokens, tokens).softmax(dim=-1)
    crops = [[torch.randn(3, 16, 16)] * 2 + [np.zeros((8, 8, 3), np.uint8)] * 3 for _ in range(count)]
    draw_report(
        tmp_path / "all.png",
        images,
        random_features(count, grid),
        crops,
        mean=MEAN,
        std=STD,
        attention=attention,
        title="step 7",
    )
    draw_report(tmp_path / "images.png", images, mean=MEAN, std=STD)
    everything, alone = read(tmp_path / "all.png"), read(tmp_path / "images.png")
    assert count * 144 < len(alone) < len(everything) < count * 144 + 100
    assert everything.shape[1] > alone.shape[1] + 144 * 4  # PCA, attention, two large crops, small crops
    assert everything.std() > 30 and alone.std() > 30


def test_patches_in_a_report_are_squares_of_one_colour(tmp_path):
    draw_report(
        tmp_path / "report.png", torch.zeros(1, 3, 32, 32), random_features(1, (4, 4)), mean=MEAN, std=STD, height=128
    )
    sheet = read(tmp_path / "report.png")[-140:-12, -140:-12]  # the PCA picture is the last before the margins
    blocks = sheet.reshape(4, 32, 4, 32, 3)
    assert (blocks == blocks[:, :1, :, :1]).all()
    assert len(np.unique(blocks[:, 0, :, 0].reshape(16, 3), axis=0)) == 16


def test_a_given_basis_keeps_the_colours_of_an_image_whatever_is_beside_it(tmp_path):
    features = random_features(2, (4, 4))
    basis = pca_basis(features.patches.flatten(0, 1))
    draw_report(tmp_path / "two.png", torch.zeros(2, 3, 16, 16), features, mean=MEAN, std=STD)
    alone = Features(features.cls[:1], features.registers[:1], features.patches[:1], (4, 4))
    draw_report(tmp_path / "one.png", torch.zeros(1, 3, 16, 16), alone, mean=MEAN, std=STD, basis=basis)
    one = read(tmp_path / "one.png")
    assert np.array_equal(one[:-12], read(tmp_path / "two.png")[: len(one) - 12])


# Curves.


def test_fields_are_drawn_in_one_order_and_those_without_numbers_are_not():
    run = records(
        3, lr=float, loss=float, memory_gib=float, stage=lambda step: None, **{"loss/ibot": float, "probe/knn": float}
    )
    run[0] = {"step": 0, "grad_norm": None, "loss/dino": 1.0}
    assert curve_names({"a": run, "b": [{"step": 0, "health/feature_std": 1.0}]}) == [
        "loss", "loss/dino", "loss/ibot", "probe/knn", "health/feature_std", "lr",
    ]  # fmt: skip


def test_several_runs_share_the_panels_in_their_own_colours(tmp_path):
    runs = {
        name: records(20, loss=lambda step, k=k: step * k, lr=float)
        for k, name in enumerate(("first", "second", "third"))
    }
    for count in (1, 2, 3):
        draw_curves(tmp_path / "curves.png", dict(list(runs.items())[:count]))
        sheet = read(tmp_path / "curves.png").reshape(-1, 3)
        wanted = [[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in COLOURS[:4]]
        assert [bool((sheet == colour).all(axis=1).sum() > 50) for colour in wanted] == [k < count for k in range(4)]


@pytest.mark.parametrize(
    "run",
    [
        [],
        [{"step": 0, "probe/knn": 0.1}],
        [{"step": 10, "loss": 2.0, "lr": 0.1}],
        [{"step": 0, "loss": None}, {"step": 10, "loss": 3.0, "grad_norm": None}, {"step": 20, "lr": 1e-5}],
        records(300, loss=lambda step: 1 / (step + 1), **{f"health/{name}": float for name in "abcdefgh"}),
    ],
    ids=["nothing", "step 0", "one line", "holes", "long"],
)
def test_curves_are_drawn_from_whatever_there_is(tmp_path, run):
    before = dict(matplotlib.rcParams)
    draw_curves(tmp_path / "curves.png", {"run": run})
    sheet = read(tmp_path / "curves.png")
    assert sheet.shape[0] > 300 and sheet.shape[1] > 400 and sheet.std() > 5
    assert dict(matplotlib.rcParams) == before


def test_the_running_mean_uses_fewer_values_at_the_ends():
    assert np.allclose(running_mean(np.array([1.0, 2.0, 6.0, 3.0]), 1), [1.5, 3.0, 11 / 3, 4.5])


# Crops of a configuration.


def test_crops_follow_the_policy_but_for_what_the_configuration_gives():
    crops = CropsConfig(global_size=[32, 48], global_count=3, local_size=16, local_count=2, flip=0.0, blur=[1, 0, 0.5])
    multi_crop = multi_crop_from(crops, MEAN, STD)
    natural = POLICIES["natural"]
    assert (multi_crop.policy.flip, multi_crop.policy.blur) == (0.0, (1, 0, 0.5))
    assert (multi_crop.policy.jitter, multi_crop.policy.solarize) == (natural.jitter, natural.solarize)
    global_crops, local_crops = multi_crop([torch.zeros(3, 40, 40, dtype=torch.uint8)], [torch.rand(5, 36)])
    assert global_crops.shape == (3, 3, 32, 48) and local_crops.shape == (2, 3, 16, 16)
    with pytest.raises(ValueError, match="crops_only"):
        multi_crop_from(CropsConfig(policy="unnatural"), MEAN, STD)


def test_statistics_are_those_given_or_imagenets_one_a_channel():
    assert channel_statistics(3, None, None) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    mean, std = channel_statistics(5, None, [1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == pytest.approx([0.449] * 5) and std == (1, 2, 3, 4, 5)


# The script.


@pytest.fixture
def photographs(tmp_path):
    """A landscape and a portrait, of smooth colours."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    for name, (height, width) in {"a.png": (40, 70), "b.jpg": (64, 33)}.items():
        ramp = np.linspace(0, 255, height * width * 3).reshape(height, width, 3)
        Image.fromarray(ramp.astype(np.uint8)).save(folder / name)
    return folder


def run_main(capsys, *arguments):
    main([str(argument) for argument in arguments])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    return json.loads(lines[0])


@pytest.mark.parametrize("flags", [[], ["--joint", "--foreground"]])
@pytest.mark.parametrize("model", ["random:vit_nano?patch_size=8", "pixels?patch_size=8"])
def test_pca_draws_images_of_any_aspect(tmp_path, capsys, photographs, model, flags):
    output = tmp_path / "new" / "pca.png"
    result = run_main(
        capsys,
        "pca",
        "--model",
        model,
        "--images",
        photographs,
        "scenes?size=1",
        "--size",
        "32",
        "--output",
        output,
        *flags,
    )
    assert result == {"task": "pca", "model": model, "images": 3, "size": 32, "output": str(output)}
    sheet = read(output)
    assert sheet.shape[0] > 3 * 224 and sheet.shape[1] > 2 * 224 * 7 / 4 and sheet.std() > 30


def test_crops_draws_the_views_of_a_configuration(tmp_path, capsys, photographs):
    few, many = tmp_path / "few.png", tmp_path / "many.png"
    arguments = ["crops", "--images", photographs, "--count", "2", "--output"]
    sizes = ["crops.global_size=64", "crops.local_size=32", "model.patch_size=8"]
    result = run_main(capsys, *arguments, few, *sizes, "crops.local_count=0")
    assert result == {"task": "crops", "config": None, "images": 2, "policy": "natural", "output": str(few)}
    run_main(capsys, *arguments, many, *sizes, "crops.local_count=4")
    assert read(few).shape[0] == read(many).shape[0] > 2 * 192
    assert read(few).shape[1] + 192 <= read(many).shape[1]  # two by two local crops


def test_curves_reads_run_folders(tmp_path, capsys):
    folders = [tmp_path / "one" / "run", tmp_path / "two" / "run"]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records(3, loss=float)))
    output = tmp_path / "curves.png"
    result = run_main(capsys, "curves", "--runs", *folders, "--output", output)
    assert result == {"task": "curves", "runs": [str(folder) for folder in folders], "output": str(output)}
    assert read(output).std() > 5


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["curves", "--runs", "no/such/run"], "no/such/run"),
        (["curves", "--runs", "x", "--output", "picture.jpg"], "picture.jpg.*png"),
        (["pca", "--model", "pixels", "--images", "scenes", "--size", "4"], "--size is 4.* 8 pixels"),
        (["pca", "--model", "pixels", "--images", "scenes", "--count", "0"], "--count is 0"),
        (["crops", "--images", "scenes", "crops.policy=other"], "policy.*natural"),
        (["crops", "--images", "crops.policy=natural"], "--images names 0"),
        (["crops", "--images", "no/such/image.png"], "no/such/image.png"),
    ],
)
def test_mistakes_are_said_in_one_sentence(tmp_path, arguments, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        main([arguments[0], "--output", str(tmp_path / "picture.png"), *arguments[1:]])
