"""Linear probes: the grid against autograd, perfect and blind features, every flag in use."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import eval_linear
from data.corruptions import CORRUPTIONS, SEVERITIES, Corrupted, corrupt
from data.evaluation import EvalDataset
from data.sources.specs import open_data
from evals.linear import (
    Head,
    HeadGrid,
    LogisticRegression,
    accuracy,
    cached_batches,
    columns,
    default_steps,
    describe,
    fit_heads,
    linear_probe,
    logistic_probe,
)
from models import load_backbone
from models.features import Features

CPU = torch.device("cpu")
MODEL = "random:vit_nano?patch_size=8&image_size=32&embed_dim=16&num_heads=2&depth=2"
TRAIN, VAL = "scenes?size=60", "scenes?split=val&size=30"


def prepared(spec: str, side: int = 16) -> EvalDataset:
    return EvalDataset(open_data(spec), side, (side, side), (0.0,), (1.0,))


class Oracle(nn.Module):
    """Gives the class of an image by its pixels; `blind` gives that of another image instead."""

    embed_dim, in_channels = 10, 3

    def __init__(self, *data: EvalDataset, blind: bool = False):
        super().__init__()
        items = [(image, label) for part in data for image, label, _ in part]
        labels = torch.tensor([label for _, label in items])
        if blind:
            labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
        self.known = {
            image.numpy().tobytes(): label
            for (image, _), label in zip(items, labels.tolist(), strict=True)
        }

    def forward(self, images):
        labels = torch.tensor([self.known[image.numpy().tobytes()] for image in images])
        cls = F.one_hot(labels, 10).float()
        return Features(cls, cls[:, :0, None], cls[:, None], (1, 1))


@pytest.fixture(scope="module")
def scenes() -> tuple[EvalDataset, EvalDataset]:
    return prepared("scenes?size=300"), prepared("scenes?split=val&size=300")


def test_perfect_features_reach_one_and_the_probe_moves_no_random_state(scenes):
    state = torch.get_rng_state()
    assert linear_probe(Oracle(*scenes), *scenes, CPU) >= 0.99
    assert torch.equal(torch.get_rng_state(), state)


def test_features_that_do_not_depend_on_the_image_stay_near_chance(scenes):
    # Ten classes; the best of 36 heads.
    assert linear_probe(Oracle(*scenes, blind=True), *scenes, CPU) < 0.2


def test_logistic_regression_has_the_same_bounds(scenes):
    found = {}
    for blind in (False, True):
        oracle = Oracle(*scenes, blind=blind)
        (rows, labels), (val_rows, val_labels) = (
            (
                torch.cat([describe(oracle, image[None]) for image, _, _ in part]),
                torch.tensor(part.data.labels),
            )
            for part in scenes
        )
        classifier, _, _ = logistic_probe(rows, labels, 10)
        found[blind] = accuracy(classifier, val_rows, val_labels)
    assert found[False] >= 0.99 and found[True] < 0.2


# ----------------------------------------------------------------- the grid


def problem(n=40, width=7, classes=3):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, width, generator=generator), torch.randint(
        classes, (n,), generator=generator
    )


def test_each_head_is_trained_as_if_alone_by_autograd_and_sgd():
    rows, labels = problem()
    heads = [
        Head(blocks, avgpool, lr)
        for blocks in (1, 2)
        for avgpool in (False, True)
        for lr in (0.5, 5.0)
    ]
    grid = HeadGrid(heads, width=7, pooled=3, classes=3, batch_size=16, device=CPU)
    # Blocks of two numbers each: columns 0-1 and 2-3, then the mean patch in 4-6.
    inputs = {
        (1, False): rows[:, 2:4],
        (1, True): rows[:, 2:7],
        (2, False): rows[:, :4],
        (2, True): rows,
    }
    alone = []
    for head in heads:
        x = inputs[head.blocks, head.avgpool]
        start = grid.classifier(head)
        linear = nn.Linear(x.shape[1], 3)
        with (
            torch.no_grad()
        ):  # the bias is what zeros give, the weights what unit vectors add to it
            linear.bias.copy_(start(torch.zeros(1, 7))[0])
            unit = torch.eye(7)[
                [k for k in range(7) if bool((x == rows[:, k : k + 1]).all(0).any())]
            ]
            linear.weight.copy_((start(unit) - linear.bias).T)
        assert linear.bias.abs().max() == 0 and 0 < linear.weight.abs().max() < 0.06
        optimizer = torch.optim.SGD(linear.parameters(), lr=head.lr * 16 / 256, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)
        for chosen in torch.arange(36).split(3):
            optimizer.zero_grad()
            F.cross_entropy(linear(x[chosen]), labels[chosen]).backward()
            optimizer.step()
            schedule.step()
        alone.append(linear(x))
    fit_heads(grid, [(rows[chosen], labels[chosen]) for chosen in torch.arange(36).split(3)], 12)
    scores = grid.accuracies(rows, labels, chunk=7)
    for head, logits in zip(heads, alone, strict=True):
        torch.testing.assert_close(grid.classifier(head)(rows), logits, atol=1e-5, rtol=1e-4)
        assert scores[head] == pytest.approx(
            sum(int(row.argmax()) == int(y) for row, y in zip(logits, labels, strict=True)) / 40
        )
    assert len(set(scores.values())) > 1


def test_a_head_that_diverges_scores_nothing_and_leaves_the_others_alone():
    rows, labels = problem()
    alone, both = (
        HeadGrid(
            [Head(1, True, lr) for lr in rates],
            width=7,
            pooled=3,
            classes=3,
            batch_size=40,
            device=CPU,
        )
        for rates in ([0.1], [0.1, 1e41])
    )
    for grid in (alone, both):
        fit_heads(grid, cached_batches(rows, labels, 40, CPU), 30)
    scores = both.accuracies(rows, labels)
    assert scores[Head(1, True, 1e41)] == 0
    assert math.isfinite(float(both.classifier(Head(1, True, 0.1))(rows).sum()))
    assert scores[Head(1, True, 0.1)] == alone.accuracies(rows, labels)[Head(1, True, 0.1)] > 0.4


def test_a_row_holds_the_cls_of_the_last_blocks_then_the_mean_patch():
    backbone, images = load_backbone(MODEL), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        row, layers = describe(backbone, images, 2), backbone.intermediate(images, 2)
    part = {"width": row.shape[1], "pooled": 16, "most": 2}
    mean = layers[1].patches.mean(1)
    torch.testing.assert_close(
        row[:, columns(2, False, **part)], torch.cat([layers[0].cls, layers[1].cls], 1)
    )
    torch.testing.assert_close(row[:, columns(1, False, **part)], layers[1].cls)
    torch.testing.assert_close(
        row[:, columns(1, True, **part)], torch.cat([layers[1].cls, mean], 1)
    )


def test_batches_show_every_row_once_an_epoch_in_an_order_of_its_own():
    rows, labels = torch.arange(12.0)[:, None], torch.arange(12)
    batches = cached_batches(rows, labels, 4, CPU, seed=1)
    epochs = [torch.cat([next(batches)[1] for _ in range(3)]) for _ in range(2)]
    assert all(sorted(epoch.tolist()) == list(range(12)) for epoch in epochs)
    assert not torch.equal(*epochs)


def test_length_follows_the_size_of_the_data_up_to_the_published_one():
    assert default_steps(4) == 1000 and default_steps(50_000) == 3906
    assert default_steps(1_281_167) == 12_500
    assert default_steps(1_281_167, 1024, 100, None) == 125_113


def test_the_choice_may_be_restricted_to_some_classes():
    logits = torch.tensor([[3.0, 2.0, 1.0], [0.0, 1.0, 2.0]])
    labels = torch.tensor([1, 1])
    assert accuracy(lambda rows: rows, logits, labels) == 0
    assert accuracy(lambda rows: rows, logits, labels, torch.tensor([1, 2])) == 0.5


# ----------------------------------------------------------------- logistic regression


@pytest.mark.parametrize("strength", [0.01, 1.0])
def test_logistic_regression_finds_the_least_of_its_objective(strength):
    rows, labels = problem(n=60)
    rows = 3 + rows.double() * torch.tensor(
        [10, 1, 1, 1, 1, 0.1, 0]
    )  # uneven, and one that says nothing
    found = LogisticRegression(rows, labels, 3).fit(strength)

    def objective(weight, bias):
        loss = sum(
            -(weight @ x + bias).log_softmax(0)[y] for x, y in zip(rows, labels, strict=True)
        )
        return strength * loss + weight.square().sum() / 2

    weight, bias = (part.clone().requires_grad_() for part in (found[:, :-1], found[:, -1]))
    least = objective(weight, bias)
    slopes = torch.autograd.grad(least, (weight, bias))
    assert max(float(slope.abs().max()) for slope in slopes) < 1e-3 * max(1.0, strength * len(rows))
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        step = 0.03 * torch.randn(found.shape, generator=generator, dtype=torch.float64)
        assert objective(found[:, :-1] + step[:, :-1], found[:, -1] + step[:, -1]) > least


def test_the_strength_is_chosen_without_the_validation_set():
    rows, labels = problem(n=100)
    rows = torch.cat([rows + 2 * F.one_hot(labels, 7), torch.randn(100, 20)], 1)
    _, best, scores = logistic_probe(rows, labels, 3, strengths=(1e-6, 1e-2, 1.0))
    assert scores.keys() == {1e-6, 1e-2, 1.0} and scores[best] == max(scores.values())
    assert scores[1e-6] < scores[best]


# ----------------------------------------------------------------- corruptions


@pytest.mark.parametrize("channels", [1, 3, 6])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_each_severity_damages_more_than_the_one_before(name, channels):
    image = open_data("scenes?size=2").image(0).float().div(255).repeat(2, 1, 1)[:channels]
    damages = []
    for severity in SEVERITIES:
        damaged = corrupt(image, name, severity, torch.Generator().manual_seed(0))
        assert damaged.shape == image.shape and damaged.min() >= 0 and damaged.max() <= 1
        damages.append(float((damaged - image).square().mean()))
    assert damages == sorted(damages) and 0 < damages[0] < damages[-1]


def test_contrast_and_noise_are_what_they_say():
    image = 0.5 + 0.05 * torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(0))
    low = corrupt(image, "contrast", 3, torch.Generator())
    torch.testing.assert_close(low.std((1, 2)), 0.2 * image.std((1, 2)))
    torch.testing.assert_close(low.mean((1, 2)), image.mean((1, 2)))
    noisy = corrupt(image, "noise", 1, torch.Generator().manual_seed(0))
    assert float((noisy - image).std()) == pytest.approx(0.08, rel=0.05)


def test_corrupted_items_are_the_same_on_every_call_and_keep_label_and_normalisation():
    items = EvalDataset(open_data("scenes?size=3"), 32, (32, 32), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    noisy = Corrupted(items, "noise", 5)
    assert torch.equal(noisy[1][0], noisy[1][0]) and noisy[1][1] == items[1][1] and len(noisy) == 3
    mild = Corrupted(items, "jpeg", 1)[2][0]
    assert float((mild - items[2][0]).abs().mean()) < 0.3
    assert not torch.equal(noisy[0][0] - items[0][0], noisy[1][0] - items[1][0])
    with pytest.raises(ValueError, match="noise, blur, contrast, jpeg"):
        corrupt(torch.zeros(3, 8, 8), "fog", 1, torch.Generator())


# ----------------------------------------------------------------- the script


def run(capsys, *arguments, model=MODEL, train=TRAIN, val=VAL) -> dict:
    eval_linear.main(
        ["--model", model, "--train", train, "--val", val, "--device", "cpu", *arguments]
    )
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    return json.loads(lines[0])


def test_a_random_vit_end_to_end_reports_the_best_with_the_whole_grid(capsys, tmp_path):
    further = "scenes?split=val&seed=1&size=20"
    result = run(
        capsys, "--steps", "20", "--output", str(tmp_path), "--corruptions", "--also", further
    )
    cells = {(cell["blocks"], cell["avgpool"], cell["lr"]) for cell in result["grid"]}
    assert result["task"] == "linear" and len(cells) == len(result["grid"]) == 2 * 2 * 18
    assert {cell["blocks"] for cell in result["grid"]} == {1, 2}  # there are no four blocks
    assert result["top1"] == max(cell["top1"] for cell in result["grid"])
    assert {**result["best"], "top1": result["top1"]} in result["grid"]
    assert result["also"][further]["n"] == 20 and 0 <= result["also"][further]["top1"] <= 1
    assert {len(result["corruptions"][name]["errors"]) for name in CORRUPTIONS} == {5}
    assert result["corruptions"]["mean_error"] == pytest.approx(
        np.mean([result["corruptions"][name]["errors"] for name in CORRUPTIONS])
    )
    assert json.loads((tmp_path / "linear.json").read_text()) == result


@pytest.mark.parametrize(
    "model", ["pixels?patch_size=8&image_size=16", "timm:resnet18?pretrained=false"]
)
def test_models_without_intermediate_blocks_use_their_last_features(capsys, model):
    result = run(capsys, "--steps", "2", "--size", "32", model=model)
    assert {cell["blocks"] for cell in result["grid"]} == {1} and len(result["grid"]) == 36


def test_the_protocol_of_dino_has_one_head_on_four_blocks_of_a_small_model(capsys):
    model = MODEL.replace("depth=2", "depth=5")
    result = run(capsys, "--protocol", "dino", "--steps", "3", model=model)
    assert result["grid"] == [{"blocks": 4, "avgpool": False, "lr": 0.001, "top1": result["top1"]}]
    wide = run(
        capsys,
        "--protocol",
        "dino",
        "--steps",
        "3",
        model="random:vit_nano?patch_size=16&image_size=32&embed_dim=768&depth=1",
    )
    assert wide["best"] == {"blocks": 1, "avgpool": True, "lr": 0.001}


def test_streamed_features_are_those_of_crops_and_the_same_for_the_same_seed(capsys):
    results = [
        run(capsys, "--stream", "--steps", "5", "--seed", seed, "--batch-size", size)
        for seed, size in ("08", "08", "18")
    ]
    for result in results:
        del result["seconds"]
    assert results[0] == results[1] != results[2]
    cached = run(capsys, "--steps", "5")
    assert cached["grid"] != results[0]["grid"]


def test_shots_take_so_many_of_each_class_and_all_of_a_rare_one():
    labels = np.array([0] * 9 + [1] * 2 + [-1] * 3 + [2] * 7)
    rows = eval_linear.training_rows(labels, 4, seed=0)
    assert np.bincount(labels[rows]).tolist() == [4, 2, 4] and len(set(rows)) == 10
    assert rows.tolist() == eval_linear.training_rows(labels, 4, seed=0).tolist()
    assert rows.tolist() != eval_linear.training_rows(labels, 4, seed=1).tolist()
    assert (
        eval_linear.training_rows(labels, None, seed=0).tolist()
        == np.flatnonzero(labels >= 0).tolist()
    )


@pytest.fixture
def folders(tmp_path) -> dict[str, Path]:
    """Grey images, `dark` and `light`; another set also has a class unknown to training."""
    rng = np.random.default_rng(0)
    sets = {
        "train": {"dark": 20, "light": 230},
        "val": {"light": 230, "dark": 20},
        "other": {"light": 230, "zebra": 128},
    }
    for part, classes in sets.items():
        for name, level in classes.items():
            (tmp_path / part / name).mkdir(parents=True)
            for k in range(2):
                pixels = rng.integers(level - 20, level + 20, (20, 25)).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / name / f"{k}.png")
    return {part: tmp_path / part for part in sets}


def test_four_grey_images_suffice_and_classes_of_further_sets_are_matched_by_name(capsys, folders):
    model = "pixels?patch_size=8&image_size=16&in_channels=1"
    for flags in ([], ["--protocol", "logreg"], ["--stream", "--steps", "30"]):
        where = {"train": str(folders["train"]), "val": str(folders["val"])}
        result = run(capsys, *flags, "--also", str(folders["other"]), model=model, **where)
        assert result["top1"] == 1 and result["n_train"] == 4
        assert any(result["best"].items() <= cell.items() for cell in result["grid"])
        assert result["also"][str(folders["other"])] == {
            "top1": 1,
            "n": 2,
            "left_out": 2,
            "classes": 1,
        }


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--protocol", "logreg", "--stream"], "logreg"),
        (["--shots", "0"], "--shots"),
        (["--lr", "0"], "--lr"),
        (["--also", "/nowhere"], "/nowhere"),
        (["--model", "no/such/run"], "no/such/run"),
    ],
)
def test_a_mistake_is_a_sentence(arguments, words):
    with pytest.raises((ValueError, OSError), match=words):
        eval_linear.main(
            ["--model", MODEL, "--train", TRAIN, "--val", VAL, "--steps", "2", *arguments]
        )


def test_images_without_classes_are_refused(images):
    with pytest.raises(ValueError, match="has no labels"):
        eval_linear.main(["--model", MODEL, "--train", str(images), "--val", VAL])
