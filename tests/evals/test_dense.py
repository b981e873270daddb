"""Segmentation and depth heads between their bounds, their parts, and eval_dense.py in use."""

import json
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

import eval_dense
from data.annotated import Annotated, target_size
from data.images import ImageData
from data.sources.specs import open_data
from evals.dense import (
    SEGMENTATION,
    FrozenPatches,
    Recipe,
    at_pixels,
    largest_class,
    linear_segmentation,
    predict,
    schedule,
)
from evals.depth import DEPTH, DepthHead, depth_errors, linear_depth, pooled_depth, sig_loss
from evals.patches import LastLayers, Patches, Sliding, upsample
from models.weights.load import load_backbone
from tests.oracles import Oracle, class_maps, depth_maps, painted

CPU = torch.device("cpu")
NANO = "random:vit_nano?patch_size=8&image_size=32&depth=2"
SHORT = {"steps": 120}
FAST = replace(SEGMENTATION, lrs=(3e-2,), points=256)


def test_segmentation_with_perfect_features_reaches_the_limit_and_chance_features_do_not():
    train, val = painted("mask", "train", 60), painted("mask", "val")
    perfect = linear_segmentation(Oracle(class_maps), train, [val], CPU, recipe=FAST, steps=250)
    assert perfect["miou"] >= 0.99 * perfect["limit"] > 0.6
    # All background is 0.07.
    assert linear_segmentation(Oracle(None), train, [val], CPU, recipe=FAST, **SHORT)["miou"] < 0.1


def test_depth_with_perfect_features_reaches_the_limit_and_chance_features_do_not():
    train, val = painted("depth", "train", 60), painted("depth", "val")
    recipe = replace(DEPTH, lrs=(3e-2, 1e-1), points=256)
    perfect = linear_depth(Oracle(depth_maps), train, [val], CPU, recipe=recipe, **SHORT)
    assert perfect["delta1"] >= 0.99 * perfect["limit"]["delta1"] > 0.7
    # The published loss weighs ratios, RMSE metres.
    assert perfect["rmse"] < 1.15 * perfect["limit"]["rmse"]
    chance = linear_depth(Oracle(None), train, [val], CPU, recipe=recipe, **SHORT)
    assert chance["rmse"] > 0.95 * chance["constant"] and chance["delta1"] < 0.3


def test_depth_errors_and_pooling_equal_loops_over_pixels_and_leave_unknown_depth_out():
    generator = torch.Generator().manual_seed(0)
    depth, said = (torch.rand(6, 9, generator=generator) * 5 + 0.1 for _ in range(2))
    depth[0] = 0
    depth[1, 0] = math.nan
    pairs = [
        (float(a), float(b))
        for a, b in zip(said.flatten(), depth.flatten(), strict=True)
        if float(b) > 0
    ]
    rmse = math.sqrt(sum((a - b) ** 2 for a, b in pairs) / len(pairs))
    delta = sum(max(a / b, b / a) < 1.25 for a, b in pairs) / len(pairs)
    errors = depth_errors(said, depth)
    assert (errors["rmse"], errors["delta1"]) == pytest.approx((rmse, delta), rel=1e-5)
    corner = [
        math.log(float(depth[y, x])) for y in range(2) for x in range(3) if float(depth[y, x]) > 0
    ]
    pooled = pooled_depth(depth, (3, 3))
    assert float(pooled[0, 0]) == pytest.approx(math.exp(sum(corner) / len(corner)), rel=1e-5)


def test_the_depth_loss_equals_its_formula_and_starts_without_variance():
    generator = torch.Generator().manual_seed(1)
    values, depth = (
        torch.rand(50, 1, generator=generator) + 0.5,
        torch.rand(50, generator=generator) + 0.5,
    )
    g = np.log(values[:, 0].numpy() + 1e-3) - np.log(depth.numpy() + 1e-3)
    assert float(sig_loss(values, depth, 0.5)) == pytest.approx(
        math.sqrt(g.var(ddof=1) + 0.15 * g.mean() ** 2), rel=1e-4
    )
    assert float(sig_loss(values, depth, 0.0, begin=0.1)) == pytest.approx(
        math.sqrt(0.15) * abs(g.mean()), rel=1e-3
    )


def test_depth_is_the_weighted_mean_of_its_bins():
    head = DepthHead(4, 1.0, 9.0, bins=5).eval()
    tokens = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    scores = head.linear(head.norm(tokens)).detach()
    for row, said in zip(scores, head(tokens).detach(), strict=True):
        weights = [max(0.0, float(score)) + 0.1 for score in row]
        expected = sum(
            weight * bin for weight, bin in zip(weights, (1, 3, 5, 7, 9), strict=True)
        ) / sum(weights)
        assert float(said) == pytest.approx(expected, rel=1e-5)


def test_scores_at_pixels_equal_the_enlarged_map_there():
    generator = torch.Generator().manual_seed(0)
    batch, values = [], []
    for grid, size in (((2, 3), (17, 40)), ((4, 4), (8, 8)), ((2, 3), (17, 40))):
        values.append(torch.randn(grid[0] * grid[1], 5, generator=generator))
        batch.append(Patches(values[-1], grid, torch.zeros(size), 0))
    pixels = [torch.randint(item.target.numel(), (30,), generator=generator) for item in batch]
    found = at_pixels(values, batch, pixels).split(30)
    for part, one, item, chosen in zip(found, values, batch, pixels, strict=True):
        whole = upsample(one.T.unflatten(1, item.grid), item.target.shape)
        torch.testing.assert_close(part, whole.flatten(1).T[chosen], atol=1e-5, rtol=1e-4)


def test_the_schedule_warms_up_then_falls_and_small_data_gets_few_steps():
    recipe = Recipe(
        (1.0,), 0, (0.9, 0.999), warmup=0.25, start=0.1, end=0.01, epochs=10, longest=1000
    )
    assert schedule(0, recipe) == pytest.approx(0.1)
    assert schedule(0.25, recipe) == pytest.approx(1.0)
    assert schedule(0.625, recipe) == pytest.approx(0.505)
    assert schedule(1.0, recipe) == pytest.approx(0.01)
    assert [recipe.steps(n) for n in (4, 1000, 10**6)] == [300, 625, 1000]


def test_patches_that_do_not_fit_into_memory_are_computed_anew_and_are_the_same():
    backbone = load_backbone(NANO)
    data = Annotated(open_data("scenes?size=5"), "mask", 32, 8, (0.5,) * 3, (0.5,) * 3)
    kept = FrozenPatches(backbone, data, CPU, largest_class)
    streamed = FrozenPatches(backbone, data, CPU, largest_class, limit=1)
    assert streamed.kept is None and streamed.summaries == kept.summaries
    for one, other in zip(kept.draws(4, 3, seed=0), streamed.draws(4, 3, seed=0), strict=True):
        assert [item.index for item in one] == [item.index for item in other] and len(one) == 3
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a.tokens, b.tokens, atol=1e-5, rtol=1e-4)
    drawn = [item.index for batch in kept.draws(5, 3, seed=1) for item in batch]
    assert sorted(drawn) == sorted([*range(5)] * 3)  # three whole epochs


def test_a_sliding_window_averages_what_its_windows_see():
    backbone = load_backbone(NANO)
    images = torch.randn(2, 3, 40, 56, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found = Sliding(backbone, 32)(images)
        total, count = torch.zeros(2, 5, 7, 128), torch.zeros(5, 7, 1)
        for top in (0, 1):
            for left in (0, 3):  # a stride of 24 pixels, two thirds of 32 in whole patches
                part = backbone(
                    images[..., 8 * top : 8 * top + 32, 8 * left : 8 * left + 32]
                ).patches
                total[:, top : top + 4, left : left + 4] += part.unflatten(1, (4, 4))
                count[top : top + 4, left : left + 4] += 1
        assert found.grid == (5, 7)
        torch.testing.assert_close(
            found.patches, (total / count).flatten(1, 2), atol=1e-5, rtol=1e-4
        )
        whole = Sliding(backbone, 64)(images)
        torch.testing.assert_close(whole.patches, backbone(images).patches)


def test_last_layers_stand_side_by_side():
    backbone = load_backbone(NANO)
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        found = LastLayers(backbone, 2)(images).patches
        torch.testing.assert_close(found[..., 128:], backbone(images).patches)
    assert found.shape == (2, 16, 256)
    with pytest.raises(ValueError, match="last layer only"):
        LastLayers(load_backbone("pixels"), 2)


def test_a_mirrored_variant_of_a_symmetric_image_changes_nothing_and_others_are_averaged():
    tokens = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    mirrored = tokens.view(2, 3, 4).flip(1).reshape(6, 4)
    one, two = (Patches(item, (2, 3), torch.zeros(8, 12), 0) for item in (tokens, mirrored))
    single = predict(torch.nn.Identity(), [one], [False], torch.clone)
    assert torch.equal(single, upsample(tokens.T.unflatten(1, (2, 3)), (8, 12)))
    torch.testing.assert_close(
        predict(torch.nn.Identity(), [one, two], [False, True], torch.clone), single
    )


def test_whole_images_keep_their_aspect_in_whole_patches():
    assert target_size((100, 200), 48, 8) == (48, 96)
    assert target_size((100, 130), 48, 8) == (48, 64)
    assert target_size((10, 1000), (30, 50), 16) == (32, 48)
    assert target_size((4, 4), 3, 16) == (16, 16)


def test_an_ignored_class_becomes_255_in_masks_only():
    options = ("mask", 32, 8, (0.5,) * 3, (0.5,) * 3)
    plain = Annotated(open_data("scenes?size=3"), *options)[1][1]
    ignored = Annotated(open_data("scenes?size=3"), *options, ignore=0)[1][1]
    assert torch.equal(ignored == 255, plain == 0)
    assert torch.equal(ignored[plain > 0], plain[plain > 0])


class Wide(ImageData):
    """Non-square pictures of six channels, several sizes; the left part is class 1 and bright."""

    labels = np.zeros(6, np.int64)

    def __len__(self) -> int:
        return 6

    def name(self, index: int) -> str:
        return f"wide/{index}"

    def annotations(self, index: int) -> dict:
        mask = np.zeros((40, 70 + 8 * index), np.uint8)
        mask[:, : 30 + 4 * index] = 1
        return {"mask": mask, "depth": 1.0 + 3 * mask.astype(np.float32)}

    def image(self, index: int) -> torch.Tensor:
        mask = torch.from_numpy(self.annotations(index)["mask"])
        return (mask * 150 + 50).expand(6, -1, -1).to(torch.uint8)


def test_several_sizes_aspects_and_channels_are_segmented_and_measured():
    backbone = load_backbone("random:vit_nano?patch_size=8&image_size=32&depth=1&in_channels=6")
    make = partial(Annotated, Wide(), size=32, multiple=8, mean=(0.5,) * 6, std=(0.25,) * 6)
    data = make("mask")
    result = linear_segmentation(
        backbone, data, [data, make("mask", flip=True)], CPU, recipe=FAST, steps=60
    )
    assert result["miou"] > 0.8 and len(result["iou"]) == 2
    data = make("depth")
    assert linear_depth(backbone, data, [data], CPU, steps=60)["delta1"] > 0.6


DATA = ["--train", "scenes?size=8", "--val", "scenes?split=val&size=4", "--workers", "0"]
EVERY = {
    "segmentation": ["--steps", "5"],
    "depth": ["--steps", "5", "--span", "0.1", "10"],
    "correspondence": ["--thresholds", "0.1"],
    "tracking": ["--val", "scenes?split=val&size=2&frames=3"],
    "localization": [],
}


@pytest.mark.parametrize("model", [NANO, "pixels?patch_size=8", NANO + "&in_channels=1"])
@pytest.mark.parametrize("task", EVERY)
def test_every_task_ends_with_one_line_of_json_in_colour_and_grey(task, model, tmp_path, capsys):
    eval_dense.main([task, "--model", model, *DATA, *EVERY[task], "--output", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    assert len(lines) == 1 and result["task"] == task and result["model"] == model
    assert result["n_val"] in (2, 4)
    assert json.loads((tmp_path / f"{task}.json").read_text()) == result
    measure = {"segmentation": "miou", "depth": "delta1", "tracking": "jf"}.get(task)
    assert measure is None or 0 <= result[measure] <= 1


@pytest.mark.parametrize(
    "options",
    [
        ["--multi-scale"],
        ["--window", "24"],
        ["--layers", "2"],
        ["--size", "32", "48"],
        ["--head", "knn"],
    ],
)
def test_options_of_segmentation_run_and_a_seed_repeats_the_result(options, capsys):
    steps = [] if "knn" in options else ["--steps", "3"]
    for _ in range(2):
        eval_dense.main(["segmentation", "--model", NANO, *DATA, *options, *steps])
    first, second = (
        {**json.loads(line), "seconds": 0} for line in capsys.readouterr().out.splitlines()
    )
    assert first == second


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["segmentation", "--resize", "40"], "--size"),
        (["segmentation", "--window", "0"], "--window"),
        (["segmentation", "--head", "knn", "--multi-scale"], "linear"),
        (["segmentation", "--layers", "9"], "9"),
        (["segmentation", "--window", "4"], "patch of 8"),
        (["depth", "--lr", "-1"], "--lr"),
        (["depth", "--span", "5", "2"], "smaller"),
        (["depth", "--val", "{images}"], "no annotations"),
        (["correspondence", "--val", "{images}"], "neither pairs of views nor keypoints"),
        (["tracking", "--val", "{images}"], "without clips"),
        (["tracking", "--val", "scenes?size=2"], "frames=8"),
        (["localization", "--val", "{images}"], "neither boxes nor masks"),
        (["localization", "--model", NANO + "&in_channels=6"], "3 channels, 6 are asked for"),
    ],
)
def test_mistakes_are_told_in_a_sentence(arguments, words, images):
    given = [argument.replace("{images}", f"folder:{images}") for argument in arguments[1:]]
    with pytest.raises((ValueError, OSError), match=words):
        eval_dense.main([arguments[0], "--model", NANO, *DATA, *given])


@pytest.mark.parametrize("task", ["segmentation", "depth", "correspondence", "localization"])
def test_one_image_is_enough(task, capsys):
    steps = ["--steps", "3"] if task in ("segmentation", "depth") else []
    one = ["--train", "scenes?size=1", "--val", "scenes?split=val&size=1", "--workers", "0"]
    eval_dense.main([task, "--model", NANO, *one, *steps])
    assert json.loads(capsys.readouterr().out)["n_val"] == 1
