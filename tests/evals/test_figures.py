"""Sheets, curves and visualize.py: honest patch grids, any logs, every task on any images."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from data.augment import POLICIES
from data.masking import draw_masks
from data.pixels import channel_statistics
from engine.config import CropsConfig
from engine.views import multi_crop_from
from evals.curves import curve_names, draw_curves, running_mean
from evals.embedding import draw_embedding
from evals.figures import COLOURS, draw_report
from evals.maps import pca_basis
from evals.photographs import fit, patch_at
from models.features import Features
from visualize import main

ROOT = Path(__file__).parents[2]
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def read(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def random_features(images, grid, dim=16):
    patches = torch.randn(images, grid[0] * grid[1], dim)
    return Features(patches.mean(dim=1), patches[:, :0], patches, grid)


def records(steps, **fields):
    return [
        {"step": step, **{key: value(step) for key, value in fields.items()}}
        for step in range(0, steps * 10, 10)
    ]


# Reports.


@pytest.mark.parametrize("count, size, grid", [(3, (16, 16), (4, 4)), (1, (16, 32), (2, 4))])
def test_a_report_has_a_row_for_every_image(tmp_path, count, size, grid):
    images = torch.randn(count, 3, *size) * 0.5
    tokens = 2 + grid[0] * grid[1]
    attention = torch.rand(count, 2, tokens, tokens).softmax(dim=-1)
    crops = [
        [torch.randn(3, 16, 16)] * 2 + [np.zeros((8, 8, 3), np.uint8)] * 3 for _ in range(count)
    ]
    options = {"mean": MEAN, "std": STD, "attention": attention, "title": "step 7"}
    draw_report(tmp_path / "all.png", images, random_features(count, grid), crops, **options)
    draw_report(tmp_path / "images.png", images, mean=MEAN, std=STD)
    everything, alone = read(tmp_path / "all.png"), read(tmp_path / "images.png")
    assert count * 144 < len(alone) < len(everything) < count * 144 + 100
    # PCA, attention, two large crops, small crops.
    assert everything.shape[1] > alone.shape[1] + 144 * 4
    assert everything.std() > 30 and alone.std() > 30


def test_patches_in_a_report_are_squares_of_one_colour(tmp_path):
    images, features = torch.zeros(1, 3, 32, 32), random_features(1, (4, 4))
    draw_report(tmp_path / "report.png", images, features, mean=MEAN, std=STD, height=128)
    # The PCA picture is the last before the margins.
    sheet = read(tmp_path / "report.png")[-140:-12, -140:-12]
    blocks = sheet.reshape(4, 32, 4, 32, 3)
    assert (blocks == blocks[:, :1, :, :1]).all()
    assert len(np.unique(blocks[:, 0, :, 0].reshape(16, 3), axis=0)) == 16


def test_a_given_basis_keeps_the_colours_of_an_image_whatever_is_beside_it(tmp_path):
    features = random_features(2, (4, 4))
    basis = pca_basis(features.patches.flatten(0, 1))
    draw_report(tmp_path / "two.png", torch.zeros(2, 3, 16, 16), features, mean=MEAN, std=STD)
    alone = Features(features.cls[:1], features.registers[:1], features.patches[:1], (4, 4))
    options = {"mean": MEAN, "std": STD, "basis": basis}
    draw_report(tmp_path / "one.png", torch.zeros(1, 3, 16, 16), alone, **options)
    one = read(tmp_path / "one.png")
    assert np.array_equal(one[:-12], read(tmp_path / "two.png")[: len(one) - 12])


# Curves.


def test_fields_are_drawn_in_one_order_and_those_without_numbers_are_not():
    fields = {"lr": float, "loss": float, "memory_gib": float, "stage": lambda step: None}
    run = records(3, **fields, **{"loss/ibot": float, "probe/knn": float})
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
        assert [bool((sheet == colour).all(axis=1).sum() > 50) for colour in wanted] == [
            k < count for k in range(4)
        ]


@pytest.mark.parametrize(
    "run",
    [
        [],
        [{"step": 0, "probe/knn": 0.1}],
        [{"step": 10, "loss": 2.0, "lr": 0.1}],
        [
            {"step": 0, "loss": None},
            {"step": 10, "loss": 3.0, "grad_norm": None},
            {"step": 20, "lr": 1e-5},
        ],
        records(
            300, loss=lambda step: 1 / (step + 1), **{f"health/{c}": float for c in "abcdefgh"}
        ),
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
    sizes = {"global_size": [32, 48], "global_count": 3, "local_size": 16, "local_count": 2}
    crops = CropsConfig(**sizes, flip=0.0, blur=[1, 0, 0.5])
    multi_crop = multi_crop_from(crops, MEAN, STD)
    natural = POLICIES["natural"]
    assert (multi_crop.policy.flip, multi_crop.policy.blur) == (0.0, (1, 0, 0.5))
    assert multi_crop.policy.jitter == natural.jitter
    assert multi_crop.policy.solarize == natural.solarize
    image = torch.zeros(3, 40, 40, dtype=torch.uint8)
    global_crops, local_crops, _ = multi_crop([image], [torch.rand(5, 36)])
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
    arguments = ["--model", model, "--images", photographs, "scenes?size=1", "--output", output]
    result = run_main(capsys, "pca", *arguments, "--size", "32", *flags)
    assert result == {"task": "pca", "model": model, "images": 3, "size": 32, "output": str(output)}
    sheet = read(output)
    assert sheet.shape[0] > 3 * 224 and sheet.shape[1] > 2 * 224 * 7 / 4 and sheet.std() > 30


TINY = "embed_dim=32&depth=2&num_heads=2&patch_size=8&image_size=32"
MODELS = {
    1: f"random:vit_nano?{TINY}&in_channels=1",
    3: f"random:vit_nano?{TINY}&registers=2",
    4: f"random:vit_nano?{TINY}&in_channels=4",
}


@pytest.fixture
def any_images(tmp_path):
    """Channels of a model -> images for it: grey, colour and transparent, wide, high and tiny."""
    folder = tmp_path / "any"
    rng = np.random.default_rng(0)
    for channels, shape in {1: (), 3: (3,), 4: (4,)}.items():
        (folder / str(channels)).mkdir(parents=True)
        for name, size in (("wide", (20, 90)), ("high", (70, 31)), ("tiny", (3, 2))):
            pixels = rng.integers(0, 256, (*size, *shape), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / str(channels) / f"{name}.png")
    return folder


@pytest.mark.parametrize("channels", MODELS)
@pytest.mark.parametrize("task", ["pca", "attention", "similarity", "embedding"])
@pytest.mark.parametrize("count", [1, 3])
def test_every_picture_takes_any_aspect_and_number_of_channels(
    tmp_path, capsys, any_images, task, channels, count
):
    output, images = tmp_path / "picture.png", any_images / str(channels)
    arguments = ["--model", MODELS[channels], "--images", images, "--count", count]
    arguments += ["--output", output]
    result = run_main(capsys, task, *arguments)
    assert result["task"] == task and result["images"] == count and result["size"] == 32
    sheet = read(output)
    assert sheet.std() > 5
    run_main(capsys, task, *arguments)
    assert np.array_equal(read(output), sheet)


@pytest.mark.parametrize("task", ["pca", "attention", "similarity", "embedding"])
def test_six_channels_are_drawn_and_three_in_their_place_refused(tmp_path, capsys, task):
    images = np.random.default_rng(0).integers(0, 256, (4, 20, 30, 6), dtype=np.uint8)
    np.savez(tmp_path / "six.npz", train_images=images, train_labels=np.arange(4) % 2)
    model, output = f"random:vit_nano?{TINY}&in_channels=6", tmp_path / "picture.png"
    arguments = [task, "--model", model, "--output", output, "--images"]
    assert run_main(capsys, *arguments, f"{tmp_path / 'six.npz'}?split=train")["images"] == 4
    assert read(tmp_path / "picture.png").std() > 5
    with pytest.raises(ValueError, match="3 channels, 6 are asked for"):
        run_main(capsys, *arguments, "scenes")


def test_attention_keeps_registers_apart(tmp_path, capsys, photographs):
    widths = {}
    for registers in (0, 1, 4):
        model = f"random:vit_nano?{TINY}&registers={registers}"
        output = tmp_path / f"{registers}.png"
        arguments = ["--model", model, "--images", photographs, "--output", output, "--layer", 0]
        result = run_main(capsys, "attention", *arguments)
        shares = result["cls_attends_to"]
        assert result["heads"] == 2 and result["layer"] == 0
        assert sum(shares.values()) == pytest.approx(1, abs=2e-4)
        assert (shares["registers"] > 0) == (registers > 0)
        widths[registers] = read(output).shape[1]
    assert widths[0] < widths[1]


@pytest.mark.parametrize(
    "height, width, size", [(100, 260, 64), (260, 100, 64), (57, 61, 90), (9, 9, 64)]
)
def test_a_point_of_the_original_is_found_in_its_patch(height, width, size):
    rng = np.random.default_rng(0)
    for _ in range(20):
        x, y = int(rng.integers(width)), int(rng.integers(height))
        image = torch.zeros(1, height, width)
        image[0, y, x] = 1
        fitted = fit(image, size, 8, "bilinear")
        grid = tuple(side // 8 for side in fitted.shape[-2:])
        row, column = patch_at((x + 0.5, y + 0.5), "image", (height, width), size, grid, 8)
        light = fitted[0].unflatten(0, (-1, 8)).unflatten(2, (-1, 8)).sum(dim=(1, 3))
        # No light: the point is in the rim.
        assert light.sum() < 1e-3 or light[row, column] > 0.3 * light.max()
    assert patch_at(None, "image", (height, width), size, grid, 8) == (grid[0] // 2, grid[1] // 2)


def test_similarity_is_to_the_points_that_were_given(tmp_path, capsys):
    """Left half red, right half blue; raw pixels."""
    pixels = np.zeros((32, 64, 3), np.uint8)
    pixels[:, :32, 0] = pixels[:, 32:, 2] = 255
    Image.fromarray(pixels).save(tmp_path / "image.png")
    for number, colour in enumerate(((250, 0, 0), (0, 0, 250))):
        Image.fromarray(np.full((32, 32, 3), colour, np.uint8)).save(
            tmp_path / f"plain{number}.png"
        )
    output = tmp_path / "similarity.png"
    arguments = ["similarity", "--model", "pixels?patch_size=8", "--size", "32", "--output", output]
    result = run_main(
        capsys, *arguments, "--images", tmp_path / "image.png", "--points", "10,10", "50,10"
    )
    assert result["cosine"] == [0.0, 1.0] and result["points"] == ["10,10", "50,10"]
    sheet = read(output)[100:-20].astype(int).sum(axis=-1)  # below the headings and the rings
    left, right = sheet[:, 492:700], sheet[:, 952:1160]  # inside of the two maps
    assert left.shape == right.shape and (left > 400).mean() > 0.9 and (right > 400).mean() < 0.1
    alone = run_main(
        capsys, *arguments, "--images", tmp_path / "plain0.png", tmp_path / "plain1.png"
    )
    across = run_main(
        capsys, *arguments, "--images", tmp_path / "plain0.png", tmp_path / "plain1.png", "--across"
    )
    assert alone["cosine"] == [1.0, 1.0] and across["cosine"] == [0.0, 1.0]


def test_a_basis_is_written_once_and_fixes_the_colours(tmp_path, capsys):
    basis, model = tmp_path / "colours.basis", MODELS[3]
    pictures = {}
    calls = [("scenes?size=3", ["--basis", basis]), ("scenes?size=1", ["--basis", basis])]
    for number, (images, flags) in enumerate([*calls, ("scenes?size=1", [])]):
        output = tmp_path / f"{number}.png"
        run_main(capsys, "pca", "--model", model, "--images", images, "--output", output, *flags)
        written = basis.read_bytes()
        pictures[number] = read(output)[34:258, 260:484]  # PCA of the first image
        assert pictures.setdefault("basis", written) == written
    assert np.array_equal(pictures[0], pictures[1]) and not np.array_equal(pictures[0], pictures[2])
    other = MODELS[3].replace("embed_dim=32", "embed_dim=64")
    with pytest.raises(ValueError, match="tokens of 32 numbers; those of .* have 64"):
        arguments = ["--images", "scenes", "--output", output, "--basis", basis]
        run_main(capsys, "pca", "--model", other, *arguments)


def test_a_window_changes_nothing_for_pixels_and_the_grid_for_no_model(
    tmp_path, capsys, photographs
):
    for model, same in (("pixels?patch_size=8", True), (MODELS[3], False)):
        sheets = []
        for flags in ([], ["--window", "24"]):
            output = tmp_path / "pca.png"
            arguments = ["--model", model, "--images", photographs, "--output", output]
            run_main(capsys, "pca", *arguments, "--size", "64", *flags)
            sheets.append(read(output).astype(int))
        assert sheets[0].shape == sheets[1].shape
        assert (abs(sheets[0] - sheets[1]).max() <= 1) == same


def test_an_embedding_colours_images_by_class_or_by_data_set(tmp_path, capsys, photographs):
    output = tmp_path / "map.png"
    arguments = ["embedding", "--model", MODELS[3], "--output", output]
    several = ["--images", "scenes", "--count", 40, "--batch-size", 16]
    assert run_main(capsys, *arguments, *several)["classes"] == 10
    points = run_main(capsys, *arguments, "--images", "scenes?size=3", photographs, "--points")
    # Three scenes of three classes, and the folder.
    assert points["images"] == 5 and points["classes"] == 4
    assert run_main(capsys, *arguments, "--images", photographs, "--size", "64")["classes"] == 0
    draw_embedding(output, np.array([[0.0, 0.0], [1.0, 1.0]]), ["a", "b"])
    sheet = read(output).reshape(-1, 3)
    for colour in COLOURS[:2]:
        assert (sheet == [int(colour[i : i + 2], 16) for i in (1, 3, 5)]).all(axis=1).sum() > 50


def test_tsne_draws_four_images_or_says_what_it_needs(tmp_path, capsys):
    arguments = ["embedding", "--method", "tsne", "--model", MODELS[3]]
    arguments += ["--output", tmp_path / "map.png", "--images"]
    if importlib.util.find_spec("sklearn") is None:
        with pytest.raises(ValueError, match="pip install scikit-learn .*--method pca"):
            run_main(capsys, *arguments, "scenes?size=4")
        return
    assert run_main(capsys, *arguments, "scenes?size=4")["method"] == "tsne"
    with pytest.raises(ValueError, match="at least 4 images, not 3"):
        run_main(capsys, *arguments, "scenes?size=3")


def test_images_that_cannot_be_read_are_named_and_left_out(tmp_path, capsys, photographs):
    (photographs / "0broken.png").write_bytes(b"not a picture")
    for task in ("pca", "embedding"):
        arguments = [task, "--model", MODELS[3], "--output", tmp_path / "picture.png", "--images"]
        main([str(argument) for argument in [*arguments, photographs]])
        captured = capsys.readouterr()
        assert json.loads(captured.out)["images"] == 2 and "0broken.png" in captured.err
        with pytest.raises(ValueError, match="none of the images of .*0broken.png could be read"):
            run_main(capsys, *arguments, photographs / "0broken.png")


@pytest.mark.parametrize("task", ["pca", "attention", "similarity"])
def test_a_strip_too_long_to_draw_is_named_and_left_out(tmp_path, capsys, photographs, task):
    Image.new("RGB", (500, 2)).save(photographs / "0strip.png")
    arguments = [
        task,
        "--model",
        MODELS[3],
        "--output",
        tmp_path / "picture.png",
        "--images",
    ]
    main([str(argument) for argument in [*arguments, photographs]])
    captured = capsys.readouterr()
    assert json.loads(captured.out)["images"] == 2
    (line,) = [line for line in captured.err.splitlines() if "0strip.png" in line]
    assert "500 x 2" in line
    with pytest.raises(ValueError, match="0strip.png.*could be read.*1 : 16"):
        run_main(capsys, *arguments, photographs / "0strip.png")


WINDOWED = "--window 512 --model random:vit_nano?embed_dim=32&depth=1&num_heads=2&patch_size=16"
LARGE = {
    "attention": ["--model", "random:vit_nano?embed_dim=16&depth=1&num_heads=2&patch_size=32"],
    "pca": WINDOWED.split(),
    "similarity": WINDOWED.split(),
}
ALL_TOKENS = {
    "attention": ["--model", "random:vit_nano?embed_dim=64&depth=2&num_heads=2&patch_size=16"]
}


@pytest.mark.parametrize(
    "calls",
    [LARGE, pytest.param(ALL_TOKENS, marks=pytest.mark.slow)],
    ids=["large", "65,537 tokens"],
)
def test_4096_pixels_need_no_matrix_of_all_pairs_of_tokens(tmp_path, calls):
    """It would take 2 GiB for the first of them, 32 for the others."""
    ramp = np.add.outer(np.arange(4096), np.arange(4096)) // 32
    Image.fromarray(ramp.astype(np.uint8)).save(tmp_path / "large.png")
    code = "import visualize\nfrom engine.logger import memory_gib\n"
    for task, arguments in calls.items():
        images = ["--images", str(tmp_path / "large.png"), "--size", "4096", "--device", "cpu"]
        output = str(tmp_path / f"{task}.png")
        code += f"visualize.main({[task, *arguments, *images, '--output', output]!r})\n"
    code += "print(memory_gib())\n"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    # GiB; PyTorch and the image itself take most of it.
    assert float(done.stdout.splitlines()[-1]) < 2.0
    assert all(read(tmp_path / f"{task}.png").shape[0] > 512 for task in calls)


def test_masks_draws_what_the_configuration_hides(tmp_path, capsys):
    arguments = ["masks", "--images", "scenes?size=3", "--output", tmp_path / "masks.png"]
    sizes = ["crops.global_size=64", "crops.local_size=32", "model.patch_size=8"]
    sizes += ["loss.ibot.weight=1", "seed=5"]
    hidden = ["loss.ibot.mask_ratio=[0.2, 0.6]", "loss.ibot.mask_probability=1"]
    result = run_main(capsys, *arguments, *sizes, *hidden)
    some = read(tmp_path / "masks.png")
    none = run_main(capsys, *arguments, *sizes, "loss.ibot.mask_probability=0")
    drawn = draw_masks(6, (8, 8), 1.0, (0.2, 0.6), (5,))
    assert result["grid"] == [8, 8] and result["masked_crops"] == 6
    assert none["masked_crops"] == none["hidden"] == 0
    assert result["hidden"] == pytest.approx(drawn.float().mean().item(), abs=1e-4)
    changed = torch.from_numpy((read(tmp_path / "masks.png") != some).any(axis=-1))
    for image, top in enumerate((34, 232, 430)):
        for view, left in enumerate((216, 414)):
            centres = changed[top : top + 192, left : left + 192][12::24, 12::24]
            assert torch.equal(centres.flatten(), drawn[view * 3 + image])


def test_crops_draws_the_views_of_a_configuration(tmp_path, capsys, photographs):
    few, many = tmp_path / "few.png", tmp_path / "many.png"
    arguments = ["crops", "--images", photographs, "--count", "2", "--output"]
    sizes = ["crops.global_size=64", "crops.local_size=32", "model.patch_size=8"]
    result = run_main(capsys, *arguments, few, *sizes, "crops.local_count=0")
    expected = {"task": "crops", "config": None, "images": 2, "policy": "natural"}
    assert result == expected | {"output": str(few)}
    run_main(capsys, *arguments, many, *sizes, "crops.local_count=4")
    assert read(few).shape[0] == read(many).shape[0] > 2 * 192
    assert read(few).shape[1] + 192 <= read(many).shape[1]  # two by two local crops


def test_curves_reads_run_folders(tmp_path, capsys):
    folders = [tmp_path / "one" / "run", tmp_path / "two" / "run"]
    for folder in folders:
        folder.mkdir(parents=True)
        lines = [json.dumps(record) + "\n" for record in records(3, loss=float)]
        (folder / "metrics.jsonl").write_text("".join(lines))
    output = tmp_path / "curves.png"
    result = run_main(capsys, "curves", "--runs", *folders, "--output", output)
    runs = [str(folder) for folder in folders]
    assert result == {"task": "curves", "runs": runs, "output": str(output)}
    assert read(output).std() > 5


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("curves --runs no/such/run", "no/such/run"),
        ("curves --runs x --output picture.jpg", "picture.jpg.*png"),
        ("pca --model pixels --images scenes --size 4", "--size is 4.* 8 pixels"),
        ("pca --model pixels --images scenes --count 0", "--count is 0"),
        ("pca --model pixels --images scenes --window 4", "--window is 4.* 8 pixels"),
        ("attention --model pixels --images scenes", "no attention"),
        (f"attention --model {MODELS[3]} --images scenes --layer 2", "--layer is 2.* 2 blocks"),
        ("similarity --model pixels --images scenes --points 3;4", "'3;4'; give X,Y"),
        (
            "similarity --model pixels --images scenes --points 3,64",
            "3,64 is outside .* 64 x 64 pixels",
        ),
        ("embedding --model pixels --images scenes --batch-size 0", "--batch-size is 0"),
        ("crops --images scenes crops.policy=other", "policy.*natural"),
        ("crops --images crops.policy=natural", "--images names 0"),
        ("crops --images no/such/image.png", "no/such/image.png"),
    ],
)
def test_mistakes_are_said_in_one_sentence(tmp_path, arguments, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        task, *words = arguments.split()
        main([task, "--output", str(tmp_path / "picture.png"), *words])


def test_a_strip_that_would_become_millions_of_pixels_is_refused(tmp_path):
    Image.fromarray(np.zeros((1, 2000), np.uint8)).save(tmp_path / "strip.png")
    with pytest.raises(ValueError, match="strip.png: 2000 x 1 pixels"):
        images, output = str(tmp_path / "strip.png"), str(tmp_path / "x.png")
        main(["pca", "--model", "pixels", "--images", images, "--output", output])
