"""Correspondence, tracking and localization between their bounds and against plain loops."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data.annotated import Annotated, clip, kinds_of, pair
from data.sources.specs import open_data
from evals.localization import (
    Found,
    Truth,
    box_iou,
    box_of,
    by_attention,
    by_lost,
    by_tokencut,
    component,
    largest_component,
    localize,
    read_truth,
    score,
)  # fmt: skip
from evals.matching import (
    boundary,
    boundary_f,
    dilate,
    match_keypoints,
    match_points,
    match_views,
    patch_centres,
    propagate,
    recall_at,
    region_j,
    same_class_pairs,
    to_centres,
    to_objects,
    track,
)  # fmt: skip
from evals.patches import Patches
from models.weights.load import load_backbone
from tests.oracles import PATCH, Oracle, Painted

CPU = torch.device("cpu")


def instance_maps(instance: torch.Tensor) -> torch.Tensor:
    return F.one_hot(instance.long(), 4).permute(2, 0, 1).float()


def random_masks(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        F.avg_pool2d(torch.randn(1, 26, 34, generator=generator), 5, 1)[0] > 0 for _ in range(2)
    ]


# Correspondence.


def test_a_point_goes_to_the_most_similar_patch_as_in_a_loop():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(12, 5, generator=generator), torch.randn(20, 5, generator=generator)
    places = [(0, 0), (1, 2), (2, 3)]
    points = torch.tensor([[(column + 0.5) / 4, (row + 0.5) / 3] for row, column in places])
    found = match_points(a, (3, 4), b, (4, 5), points)
    for (row, column), guess in zip(places, found, strict=True):
        best = max(
            range(20), key=lambda k: float(F.cosine_similarity(a[row * 4 + column], b[k], dim=0))
        )
        assert guess.tolist() == pytest.approx([(best % 5 + 0.5) / 5, (best // 5 + 0.5) / 4])


def test_recall_counts_distances_up_to_each_threshold():
    assert recall_at(torch.tensor([0.0, 0.1, 0.3, 0.5]), (0.1, 0.4)) == {"0.1": 0.5, "0.4": 0.75}


def shifted_views(count: int = 20):
    """Noise, the same noise rolled by whole patches, and points that moved along."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        image = torch.rand(3, 64, 96, generator=generator)
        steps = torch.randint(1, 7, (2,), generator=generator) * 8
        points = torch.rand(16, 2, generator=generator)
        # The patch's own centre: between centres tokens of noise are nobody's.
        points = to_centres(points, (8, 12))
        moved = (points + torch.tensor([steps[1] / 96, steps[0] / 64])) % 1
        visible = torch.rand(16, generator=generator) < 0.8
        yield image, image.roll(steps.tolist(), (1, 2)), points, moved, visible, (64, 96)


def test_correspondence_with_perfect_features_reaches_the_limit_and_chance_features_do_not():
    thresholds = (0.01, 0.1)
    perfect = match_views(load_backbone("pixels?patch_size=8"), shifted_views(), CPU, thresholds)
    assert perfect["recall"]["0.01"] >= 0.99 * perfect["limit"]["0.01"] == 0.99
    assert 200 < perfect["n_points"] < 320  # hidden points are left out
    chance = match_views(Oracle(None), shifted_views(), CPU, thresholds)
    assert chance["recall"]["0.1"] == pytest.approx(math.pi * (0.1 * 96) ** 2 / (64 * 96), abs=0.04)


def keypoint_items(perfect: bool):
    data, generator = open_data("scenes?split=val&size=60"), torch.Generator().manual_seed(0)
    items = []
    for index in range(len(data)):
        keys = torch.from_numpy(data.annotations(index)["keypoints"]) / torch.tensor(
            [64.0, 64.0, 1.0]
        )
        if perfect:
            near = (-(torch.cdist(patch_centres((16, 16)), keys[:, :2]) ** 2) / 0.001).exp()
            tokens = torch.cat(
                [near, torch.full((256, 1), 0.1)], dim=1
            )  # what is near no keypoint is like none
        else:
            tokens = torch.randn(256, 8, generator=generator)
        items.append((tokens, (16, 16), keys, (64, 64)))
    return items, data.labels.tolist()


def test_keypoints_with_perfect_features_reach_the_limit_and_chance_features_do_not():
    perfect = match_keypoints(*keypoint_items(True))
    assert perfect["recall"]["0.2"] >= 0.99 * perfect["limit"]["0.2"] > 0.9
    assert perfect["n_pairs"] > 100
    chance = match_keypoints(*keypoint_items(False))
    assert chance["recall"]["0.2"] < 0.1 < perfect["recall"]["0.1"]


def test_pairs_of_images_are_of_one_class_and_never_of_an_image_with_itself():
    labels = [0, 1, 0, -1, 0, 1, 2]
    found = same_class_pairs(labels, 100)
    assert sorted(found) == sorted(
        (a, b) for a in range(7) for b in range(7) if a != b and labels[a] == labels[b] >= 0
    )
    assert len(same_class_pairs(labels, 3)) == 3 and same_class_pairs([0, 1, -1], 5) == []
    assert match_keypoints([], []) is None


# Tracking.


def test_labels_are_carried_as_by_a_loop_over_patches():
    generator = torch.Generator().manual_seed(0)
    grid, frames = (3, 4), 5
    tokens = [torch.randn(12, 6, generator=generator) for _ in range(frames)]
    labels = [torch.rand(12, 2, generator=generator)]
    found = propagate(tokens, grid, labels[0], context=2, radius=1.5, top=3, temperature=0.2)
    for t in range(1, frames):
        rows = []
        for target in range(12):
            votes = []
            for source in sorted({0, *range(max(1, t - 2), t)}):
                for patch in range(12):
                    if math.hypot(target // 4 - patch // 4, target % 4 - patch % 4) <= 1.5:
                        cosine = float(
                            F.cosine_similarity(tokens[t][target], tokens[source][patch], dim=0)
                        )
                        votes.append((math.exp(cosine / 0.2), labels[source][patch]))
            best = sorted(votes, key=lambda vote: -vote[0])[:3]
            rows.append(
                sum(weight * label for weight, label in best) / sum(weight for weight, _ in best)
            )
        labels.append(torch.stack(rows))
        torch.testing.assert_close(found[t], labels[t], atol=1e-5, rtol=1e-4)


def painted_clips(size: int = 15, whole_patches: bool = False):
    """Clips of scenes, or first frames moved by whole patches, painted as their instances."""
    data = Painted("instance", size=size, frames=8)
    for index in range(size):
        frames, instances = clip(data, index)
        instances = torch.from_numpy(instances)
        if whole_patches:
            instances = torch.stack([instances[0].roll(PATCH * (t % 3), t % 2) for t in range(8)])
            frames = instances.float()[:, None].expand(-1, 3, -1, -1)
        yield index, list(frames), instances


def test_tracking_with_perfect_features_reaches_the_limit_and_chance_features_do_not():
    perfect = track(
        Oracle(instance_maps), painted_clips(whole_patches=True), CPU, temperature=0.01, radius=12
    )
    assert perfect["jf"] >= 0.99 * perfect["limit"] > 0.6
    # Where objects move by parts of a patch, shares at their rim may be new in a frame.
    perfect = track(Oracle(instance_maps), painted_clips(), CPU, temperature=0.01, radius=12)
    assert perfect["jf"] >= 0.92 * perfect["limit"] > 0.6
    assert perfect["jf"] > perfect["static"] + 0.1
    chance = track(Oracle(None), painted_clips(), CPU)
    assert chance["jf"] < perfect["static"] - 0.1
    assert chance["n_objects"] == perfect["n_objects"] > 15


def test_j_equals_a_loop_over_pixels_and_two_empty_masks_agree():
    said, truth = random_masks()
    both = sum(bool(a and b) for a, b in zip(said.flatten(), truth.flatten(), strict=True))
    either = sum(bool(a or b) for a, b in zip(said.flatten(), truth.flatten(), strict=True))
    assert region_j(said, truth) == pytest.approx(both / either)
    empty = torch.zeros(4, 4, dtype=torch.bool)
    assert region_j(empty, empty) == boundary_f(empty, empty) == 1.0
    assert boundary_f(empty, ~empty) == 1.0
    assert region_j(empty, ~empty) == 0.0 == boundary_f(empty, torch.eye(4, dtype=torch.bool))


def test_f_equals_a_loop_over_boundary_pixels():
    said, truth = random_masks(1)

    def edge(mask):
        h, w = mask.shape
        return {
            (y, x)
            for y in range(h)
            for x in range(w)
            for dy, dx in ((0, 1), (1, 0), (1, 1))
            if mask[y, x] != mask[min(y + dy, h - 1), min(x + dx, w - 1)]
        }

    tolerance = 0.05
    radius = math.ceil(tolerance * math.hypot(*truth.shape))
    a, b = edge(said), edge(truth)
    assert {tuple(place) for place in boundary(said).nonzero().tolist()} == a

    def matched(points, others):
        return sum(any(math.dist(p, q) <= radius for q in others) for p in points) / len(points)

    precision, recall = matched(a, b), matched(b, a)
    assert boundary_f(said, truth, tolerance) == pytest.approx(
        2 * precision * recall / (precision + recall)
    )
    assert boundary_f(truth, truth) == 1.0 and int(dilate(torch.eye(5) > 1, 2).sum()) == 0


def test_each_object_is_stretched_to_one_before_the_largest_counts():
    labels = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.9, 0.0], [0.9, 0.0]])
    assert to_objects(labels, (2, 2), (2, 2)).tolist() == [[0, 1], [0, 0]]


# Localization.


def test_components_are_those_of_four_neighbours():
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 1], [1, 0, 1, 1], [0, 1, 0, 0]]).bool()
    assert component(mask, (0, 3)).int().tolist() == [
        [0, 0, 0, 1],
        [0, 0, 0, 1],
        [0, 0, 1, 1],
        [0, 0, 0, 0],
    ]
    assert torch.equal(largest_component(mask), component(mask, (0, 3)))
    assert not component(mask, (0, 2)).any() and not largest_component(mask & False).any()


def test_boxes_and_their_overlap_equal_counting_pixels():
    mask = torch.zeros(4, 5, dtype=torch.bool)
    mask[1:3, 2:5] = True
    assert box_of(mask, (40, 100)).tolist() == [40, 10, 100, 30]
    boxes = torch.tensor([[1.0, 2, 6, 7], [4, 0, 9, 9], [20, 20, 21, 21]])
    box = torch.tensor([2.0, 3, 8, 6])
    for other, found in zip(boxes, box_iou(box, boxes), strict=True):
        inside = [
            (
                box[0] <= x < box[2] and box[1] <= y < box[3],
                other[0] <= x < other[2] and other[1] <= y < other[3],
            )
            for x in range(30)
            for y in range(30)
        ]
        assert float(found) == pytest.approx(
            sum(a and b for a, b in inside) / sum(a or b for a, b in inside)
        )


def test_a_score_is_the_best_over_objects_and_pointing_asks_for_the_pixel():
    masks = torch.zeros(2, 8, 8, dtype=torch.bool)
    masks[0, :4, :4], masks[1, 6:, 6:] = True, True
    truth = Truth(torch.tensor([[0.0, 0, 4, 4], [6, 6, 8, 8]]), masks, (8, 8))
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[:2, :2] = True
    assert score(Found(mask, (0, 0)), truth) == {
        "corloc": 1.0,
        "box_iou": 1.0,
        "mask_iou": 1.0,
        "pointing": 1.0,
    }
    mask[:, :2] = True
    found = score(Found(mask, (2, 0)), truth)
    # CorLoc asks for more than a half.
    assert found == {"corloc": 0.0, "box_iou": 0.5, "mask_iou": 0.5, "pointing": 0.0}
    assert "mask_iou" not in score(Found(mask, (2, 0)), truth._replace(masks=None))


def blob(grid=(6, 7)) -> tuple[torch.Tensor, torch.Tensor]:
    """An object of 2 x 3 patches on a background, with a little noise."""
    mask = torch.zeros(grid, dtype=torch.bool)
    mask[1:3, 2:5] = True
    generator = torch.Generator().manual_seed(0)
    kinds = F.one_hot(mask.flatten().long(), 8).float()
    return kinds + 0.02 * torch.randn(kinds.shape, generator=generator), mask


def test_lost_and_tokencut_find_the_only_object():
    tokens, mask = blob()
    found = by_lost(tokens, (6, 7))
    assert torch.equal(found.mask, mask) and mask[found.peak]
    for cut in by_tokencut(tokens, (6, 7), (0.2, 0.4)):
        assert torch.equal(cut.mask, mask) and mask[cut.peak]


def test_the_cut_is_the_second_generalised_eigenvector():
    tokens, _ = blob()
    tokens = tokens + 0.5 * torch.randn(tokens.shape, generator=torch.Generator().manual_seed(3))
    unit = F.normalize(tokens, dim=1).double().numpy()
    edges = np.where(unit @ unit.T > 0.3, 1.0, 1e-5)
    degree = np.diag(edges.sum(1))
    values, vectors = np.linalg.eig(
        np.linalg.inv(degree) @ (degree - edges)
    )  # (D - E) y = lambda D y
    vector = vectors[:, np.argsort(values.real)[1]].real
    side = vector > vector.mean()
    side = side if side[np.abs(vector).argmax()] else ~side
    expected = largest_component(torch.from_numpy(side).view(6, 7))
    assert torch.equal(by_tokencut(tokens, (6, 7), (0.3,))[0].mask, expected)


def test_graphs_that_would_fill_the_memory_are_refused():
    with pytest.raises(ValueError, match="8193 patches"):
        by_tokencut(torch.ones(8193, 2), (8193, 1))


def test_attention_keeps_the_fewest_patches_that_hold_the_mass():
    attention = torch.tensor([[[0.05, 0.3, 0.25], [0.2, 0.1, 0.1]]]).repeat(2, 1, 1)
    found = by_attention(attention, mass=0.6)
    assert found.peak == (0, 1) and found.mask.int().tolist() == [[0, 1, 1], [0, 0, 0]]


def localized(backbone, attends: bool, size: int = 25) -> dict:
    data = Annotated(
        Painted("instance", size=size), ("boxes", "instance"), 64, PATCH, (0.0,) * 3, (1.0,) * 3
    )

    def items():
        for index in range(size):
            image, notes, _ = data[index]
            features = backbone(image[None])
            truth = read_truth(notes)
            attention = features.patches[0, :, 1].view(1, 8, 8) if attends else None
            yield Patches(features.patches[0], features.grid, notes, index), attention, truth

    return localize(items(), taus=(0.2, 0.4))


def test_localization_by_perfect_features_reaches_the_limit_and_by_chance_the_baseline():
    limit = []
    data = Painted("instance", size=25)
    for index in range(25):  # each object, pooled: the patches of which it covers at least half
        truth = read_truth(
            {name: torch.from_numpy(value) for name, value in data.annotations(index).items()}
        )
        pooled = F.avg_pool2d(truth.masks[:1].float(), PATCH)[0] >= 0.5
        limit.append(score(Found(largest_component(pooled), (0, 0)), truth)["corloc"])
    limit = sum(limit) / len(limit)
    perfect = localized(Oracle(instance_maps), attends=True)
    best = max(one["corloc"] for one in (perfect["attention"], *perfect["tokencut"].values()))
    assert best >= 0.99 * limit > 0.8 and perfect["attention"]["pointing"] > 0.95
    chance = localized(Oracle(None), attends=False)
    centre = max(one["corloc"] for one in chance["centre"].values())
    assert chance["attention"] is None and chance["lost"]["corloc"] <= centre + 0.1
    assert all(one["corloc"] <= centre + 0.1 for one in chance["tokencut"].values())


def test_truth_comes_from_boxes_or_instances_or_classes_and_images_without_objects_are_left_out():
    mask = torch.zeros(6, 8, dtype=torch.uint8)
    assert read_truth({"mask": mask}) is None
    mask[1:3, 2:4], mask[5, 5] = 7, 255
    truth = read_truth({"mask": mask})
    assert truth.boxes.tolist() == [[2, 1, 4, 3]] and truth.masks.sum() == 4
    boxes = read_truth({"boxes": torch.tensor([[0.0, 0, 2, 2]]), "shape": torch.tensor([9, 5])})
    assert boxes.masks is None and boxes.shape == (9, 5)
    tokens, _ = blob()
    with pytest.raises(ValueError, match="no image has an object"):
        localize([(Patches(tokens, (6, 7), None, 0), None, None)])


# Data.


def test_pairs_and_clips_come_in_the_channels_asked_for(images):
    colour, grey = (open_data("scenes?size=3&frames=2", channels) for channels in (3, 1))
    assert np.array_equal(pair(grey, 1)[2], pair(colour, 1)[2])
    assert pair(grey, 1)[0].shape == (1, 64, 64) and torch.equal(pair(grey, 1)[0], grey.image(1))
    assert clip(grey, 1)[0].shape == (2, 1, 64, 64)
    assert {"pair", "clip", "mask", "keypoints"} <= set(kinds_of(grey))
    assert kinds_of(open_data(f"folder:{images}")) == []
    with pytest.raises(ValueError, match="without pairs"):
        pair(open_data(f"folder:{images}"), 0)
