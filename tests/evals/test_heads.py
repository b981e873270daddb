"""Heads of evals/heads.py: equal to their references, trained, kept, read again and drawn."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import eval_dense
import visualize
from data.annotated import Annotated
from data.sources.specs import open_data
from engine.cli import StoppedEarly
from errors import UserError
from evals import mask_loss as losses
from evals.depth import depth_errors, sig_loss
from evals.detection import mean_average_precision, scaled
from evals.dpt import DPTHead, Neck, depth_bins, expected_depth, gradient_loss
from evals.heads import load_head
from evals.mask_head import MaskHead
from models.weights.load import load_backbone

NANO = "random:vit_nano?patch_size=8&image_size=32&depth=4"
DATA = ["--train", "scenes?size=8", "--val", "scenes?split=val&size=4", "--workers", "0"]


@pytest.mark.parametrize("readout", ["ignore", "project"])
def test_the_neck_of_dpt_equals_that_of_transformers_on_its_weights(readout):
    transformers = pytest.importorskip("transformers")
    from transformers.models.dpt.modeling_dpt import DPTNeck

    torch.manual_seed(0)
    theirs = DPTNeck(
        transformers.DPTConfig(
            hidden_size=24,
            neck_hidden_sizes=[8, 12, 16, 20],
            fusion_hidden_size=16,
            readout_type=readout,
            reassemble_factors=[4, 2, 1, 0.5],
        )
    ).eval()
    ours = Neck([24] * 4, [8, 12, 16, 20], 16, readout)
    copy_neck(theirs, ours)
    tokens = torch.randn(4, 2, 1 + 5 * 7, 24)
    with torch.no_grad():
        wanted = theirs([*tokens], patch_height=5, patch_width=7)[-1]
        maps = [part[:, 1:].mT.unflatten(2, (5, 7)) for part in tokens]
        found = ours(maps, [part[:, 0] for part in tokens])
    assert found.shape == (2, 16, 80, 112) or found.shape == wanted.shape
    assert torch.allclose(found, wanted, atol=1e-5)


def copy_neck(theirs: torch.nn.Module, ours: Neck) -> None:
    stage = theirs.reassemble_stage
    for k, (part, mine) in enumerate(zip(stage.layers, ours.reassemble, strict=True)):
        mine.projection.load_state_dict(part.projection.state_dict())
        mine.resize.load_state_dict(part.resize.state_dict())
        if mine.read is not None:
            mine.read.load_state_dict(stage.readout_projects[k][0].state_dict())
    ours.convolutions.load_state_dict(theirs.convs.state_dict())
    for part, mine in zip(theirs.fusion_stage.layers, ours.fusions, strict=True):
        mine.projection.load_state_dict(part.projection.state_dict())
        for block, of_mine in (
            (part.residual_layer1, mine.skip),
            (part.residual_layer2, mine.merge),
        ):
            of_mine.convolution1.load_state_dict(block.convolution1.state_dict())
            of_mine.convolution2.load_state_dict(block.convolution2.state_dict())


@pytest.mark.parametrize("kind", ["linear", "log", "mixed"])
def test_a_score_that_stands_out_gives_the_depth_of_its_bin(kind):
    centres = depth_bins(kind, 0.5, 80.0)
    assert centres[[0, -1]].tolist() == pytest.approx([0.5, 80.0], rel=1e-4)
    assert (centres.diff() > 0).all()
    chosen = torch.tensor([[3, 200], [255, 0]])
    scores = 1e9 * F.one_hot(chosen, 256).permute(2, 0, 1)[None].double()
    found = expected_depth(scores, centres.double())
    assert torch.allclose(found[0, 0], centres.double()[chosen], rtol=1e-5)
    steps = centres.log().diff()
    assert (steps.std() < 1e-4) == (kind == "log")


def test_the_loss_of_a_constant_factor_and_of_gradients_are_as_published():
    depth = 1 + torch.rand(2, 9, 11, generator=torch.Generator().manual_seed(0))
    factor = (sig_loss((math.exp(0.3) * depth).reshape(-1, 1), depth.flatten(), 1.0)).item()
    assert factor == pytest.approx(math.sqrt(0.15) * 0.3, rel=1e-3)  # the variance is 0
    guess = depth * (1 + torch.rand(2, 9, 11, generator=torch.Generator().manual_seed(1)))
    depth[0, 4, 5] = 0
    wanted = 0.0
    for stride in (1, 2, 4, 6):
        known, total = 0, 0.0
        for b, y, x in itertools.product(range(2), range(0, 9, stride), range(0, 11, stride)):
            if depth[b, y, x] > 0:
                known += 1
                error = (guess[b, y, x] / depth[b, y, x]).log()
                for dy, dx in ((2 * stride, 0), (0, 2 * stride)):
                    if y + dy < 9 and x + dx < 11 and depth[b, y + dy, x + dx] > 0:
                        other = (guess[b, y + dy, x + dx] / depth[b, y + dy, x + dx]).log()
                        total += float((error - other).abs())
        wanted += total / known
    assert gradient_loss(guess, depth).item() == pytest.approx(wanted, rel=1e-4)


def test_aligned_depth_has_no_error_whatever_its_scale_and_shift():
    depth = 1 + torch.rand(6, 7, generator=torch.Generator().manual_seed(0))
    errors = depth_errors(3 * depth - 2, depth, align=True)
    assert errors["rmse"] < 1e-6 and errors["delta1"] == errors["delta3"] == 1
    assert depth_errors(3 * depth - 2, depth)["rmse"] > 0.5


def test_matching_equals_the_best_of_all_assignments():
    random = np.random.default_rng(0)
    for _ in range(100):
        rows = int(random.integers(1, 6))
        costs = random.normal(size=(rows, int(random.integers(rows, 7))))
        found = costs[losses.assign(costs)].sum()
        every = itertools.permutations(range(costs.shape[1]), rows)
        assert found == pytest.approx(min(costs[range(rows), one].sum() for one in every))


def test_the_mask_loss_equals_that_of_transformers_at_the_same_points(monkeypatch):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("scipy")
    from transformers.models.mask2former import modeling_mask2former as theirs

    points, classes = 48, 5
    config = transformers.Mask2FormerConfig(
        train_num_points=points, num_labels=classes, no_object_weight=losses.NO_OBJECT
    )
    weights = {"loss_cross_entropy": 2.0, "loss_mask": 5.0, "loss_dice": 5.0}
    torch.manual_seed(0)
    scores, masks = torch.randn(2, 7, classes + 1), 3 * torch.randn(2, 7, 12, 10)
    targets = [torch.randint(0, classes, (24, 20)), torch.full((24, 20), 255)]
    targets[1][:9] = 2
    targets[1][9:12] = 4
    drawn = torch.rand(1, points, 2)

    def fixed(shape, device=None):  # all draws are of the same points
        return drawn.repeat(1, math.ceil(shape[1] / points), 1)[:, : shape[1]].expand(shape).clone()

    monkeypatch.setattr(theirs.torch, "rand", lambda *shape, device=None: fixed(shape))
    wanted = theirs.Mask2FormerLoss(config, weights)(
        masks,
        scores,
        [(one == present(one)[:, None, None]).float() for one in targets],
        [present(one) for one in targets],
    )
    total = sum(weights[name] * value for name, value in wanted.items())
    found = losses.mask_loss(scores, masks, targets, points, fixed)
    assert found.item() == pytest.approx(total.item(), rel=1e-5)


def test_a_query_for_each_class_is_the_matching_that_costs_least_where_queries_know_theirs():
    torch.manual_seed(0)
    target = torch.randint(0, 4, (20, 20))
    masks = 8.0 * F.one_hot(target, 5).permute(2, 0, 1)[None] - 4
    scores = 5.0 * torch.eye(5, 6)[None]
    drawn = torch.rand(1, 64, 2)

    def fixed(shape, device=None):
        return drawn.repeat(1, math.ceil(shape[1] / 64), 1)[:, : shape[1]].expand(shape)

    matched, by_class = (
        losses.mask_loss(scores, masks, [target], 64, fixed, by_class=by_class)
        for by_class in (False, True)
    )
    assert matched == by_class
    swapped = losses.mask_loss(scores[:, [1, 0, 2, 3, 4]], masks, [target], 64, fixed, True)
    assert swapped > by_class + 0.5


def present(target: torch.Tensor) -> torch.Tensor:
    return target[target != 255].unique()


def test_at_the_end_of_training_attention_is_masked_no_more():
    torch.manual_seed(0)
    head = MaskHead([8, 8], 8, classes=3, width=64, depth=2)
    maps = [torch.randn(2, 8, 5, 6) for _ in range(2)]
    head(maps)  # moves the batch norm's statistics, of which none are used in train mode below
    head.set_progress(1.0)
    for norm in head.laterals:
        norm.norm.eval()
    with torch.no_grad():
        trained = head(maps)[-1]
        head.set_progress(0.0)
        masked = head(maps)[-1]
        alone = head.eval()(maps)
    assert len(alone) == 1 and all(map(torch.equal, trained, alone[0]))
    assert not torch.equal(masked[1], trained[1])


@pytest.mark.slow
def test_a_mask_head_learns_eight_scenes_by_heart_and_leaves_the_backbone_alone(tmp_path, capsys):
    before = load_backbone(NANO).state_dict()
    eight = ["--train", "scenes?size=8", "--val", "scenes?size=8", "--workers", "0"]
    flags = ["--head", "mask", "--steps", "300", "--lr", "2e-3", "--size", "96"]
    out = ["--output", str(tmp_path)]
    eval_dense.main(["segmentation", "--model", NANO, *eight, *flags, *out])
    assert json.loads(capsys.readouterr().out)["miou"] > 0.95
    after = load_head(tmp_path).backbone.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_dpt_finds_planes_that_are_linear_in_a_feature():
    def planes(count, side):  # metres, of the same planes at any side
        slopes = 2 * torch.rand(count, 3, 1, 1, generator=torch.Generator().manual_seed(count)) - 1
        at = (torch.arange(side) + 0.5) / side * 2 - 1
        return 5 + 1.3 * (slopes[:, 0] + slopes[:, 1] * at[:, None] + slopes[:, 2] * at)

    torch.manual_seed(0)
    mixes = torch.randn(4, 4, 1, 1)
    head = DPTHead([4] * 4, 4, low=1, high=9, width=8)
    optimizer = torch.optim.AdamW(head.parameters(), 1e-2)
    peak = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=100)

    def maps(count):
        return [(planes(count, 6) - 5)[:, None] * mix for mix in mixes]

    features, depth = maps(64), planes(64, 24)
    for _ in range(100):
        chosen = torch.randperm(64)[:8]
        loss = head.loss(
            [part[chosen] for part in features], [None] * 4, [*depth[chosen]], (24, 24)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        peak.step()
    with torch.no_grad():
        found = head.eval().predict(maps(9), [None] * 4, (24, 24))[:, 0]
    error = (found - planes(9, 24)).square().mean().sqrt()
    assert error < 0.03 * 8 and error < 0.3 * planes(9, 24).std()


KINDS = {
    "mask": ["segmentation", "--head", "mask"],
    "matched masks": ["segmentation", "--head", "mask", "--queries", "12"],
    "dpt": ["depth", "--head", "dpt"],
    "linear masks": ["segmentation", "--layers", "2"],
    "linear depth": ["depth", "--lr", "1e-2"],
    "boxes": ["detection", "--lr", "1e-2"],
    "linear boxes": ["detection", "--head", "linear"],
}
ANNOTATED = {"segmentation": "mask", "depth": "depth", "detection": ["boxes", "box_labels"]}


@pytest.mark.parametrize("kind", KINDS)
def test_a_kept_head_predicts_what_was_measured_and_is_drawn(kind, tmp_path, capsys):
    eval_dense.main(
        [*KINDS[kind], "--model", NANO, *DATA, "--steps", "6", "--output", str(tmp_path)]
    )
    said = json.loads(capsys.readouterr().out)
    assert (tmp_path / "predictions.png").stat().st_size > 1000
    assert json.loads((tmp_path / f"{said['task']}.json").read_text()) == said
    picture = tmp_path / "p.png"
    images = ["--images", "scenes", "--count", "2", "--output", str(picture)]
    visualize.main(["predictions", "--head", str(tmp_path), *images])
    assert picture.stat().st_size > 1000
    assert len(json.loads(capsys.readouterr().out)["images"]) == 2
    trained = load_head(tmp_path)
    data = Annotated(
        open_data("scenes?split=val&size=4", 3),
        ANNOTATED[said["task"]],
        32,
        8,
        trained.backbone.preprocessing.mean,
        trained.backbone.preprocessing.std,
    )
    if said["task"] == "detection":
        size = data[0][1]["shape"].tolist()
        found = [trained(image[None], size)[0] for image, _, _ in data]
        truth = [scaled(notes, size) for _, notes, _ in data]
        measured = mean_average_precision(found, truth)
        assert {name: said[name] for name in measured} == pytest.approx(measured)
        assert said["boxes"] == sum(len(one["labels"]) for one in truth) > 0
        return
    found = [trained(image[None], target.shape)[0] for image, target, _ in data]
    if said["task"] == "segmentation":
        pixels = [
            (scores.argmax(0) == mask).float().mean()
            for scores, (_, mask, _) in zip(found, data, strict=True)
        ]
        measured = said["pixel_accuracy"]
        assert float(sum(pixels) / 4) == pytest.approx(measured, abs=1e-3)
    else:
        low, high = said["span"]
        rmse = [
            depth_errors(guess[0].clamp(low, high), depth)["rmse"]
            for guess, (_, depth, _) in zip(found, data, strict=True)
        ]
        assert sum(rmse) / 4 == pytest.approx(said["rmse"], rel=1e-4)


@pytest.mark.parametrize("cache", ["auto", "off"])
def test_training_that_ran_out_of_time_goes_on_to_the_same_weights(cache, tmp_path, capsys):
    command = [*KINDS["mask"], "--model", NANO, *DATA, "--steps", "9", "--cache", cache]
    eval_dense.main([*command, "--output", str(tmp_path / "whole")])
    out = ["--output", str(tmp_path / "parts")]
    with pytest.raises(StoppedEarly, match="goes on"):
        eval_dense.main([*command, *out, "--minutes", "1e-9"])
    assert (tmp_path / "parts" / "training.pt").exists()
    eval_dense.main([*command, *out])
    whole, parts = (
        (tmp_path / name / "head.safetensors").read_bytes() for name in ("whole", "parts")
    )
    assert whole == parts and not (tmp_path / "parts" / "training.pt").exists()
    results = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert results[0]["miou"] == results[1]["miou"]
    eval_dense.main([*command, *out])
    assert "not trained again" in capsys.readouterr().err


def test_what_does_not_fit_a_kept_head_is_told_in_a_sentence(tmp_path, capsys):
    with pytest.raises(UserError, match="no head"):
        load_head(tmp_path)
    command = [*KINDS["dpt"], "--model", NANO, *DATA, "--output", str(tmp_path)]
    eval_dense.main([*command, "--steps", "2"])
    with pytest.raises(UserError, match="other weights"):
        load_head(tmp_path, NANO + "&seed=1")
    with pytest.raises(UserError, match="another training"):
        eval_dense.main([*command, "--steps", "3"])


@pytest.mark.parametrize(
    "flags, words",
    [
        (["segmentation", "--head", "mask", "--multi-scale"], "linear"),
        (["segmentation", "--head", "mask", "--window", "16"], "whole images"),
        (["segmentation", "--head", "mask", "--lr", "1e-3", "1e-2"], "one"),
        (["segmentation", "--head", "mask", "--layers", "1", "2"], "takes 4"),
        (["segmentation", "--head", "mask", "--layers", "1", "2", "3", "9"], "blocks 0 to 3"),
        (["segmentation", "--minutes", "3"], "mask"),
        (["segmentation", "--scaled-jpeg"], "whole images"),
        (["segmentation", "--width", "64"], "mask"),
        (["segmentation", "--head", "mask", "--width", "100"], "multiple of 64"),
        (["segmentation", "--layers", "1", "2"], "last blocks"),
        (["depth", "--head", "dpt", "--minutes", "3"], "--output"),
        (["depth", "--head", "dpt", "--bins", "log", "--span", "0", "9"], "--span"),
    ],
)
def test_a_flag_that_a_head_does_not_read_is_refused(flags, words):
    with pytest.raises(UserError, match=words):
        eval_dense.main([*flags, "--model", NANO, *DATA, "--steps", "2"])
