"""Generated scenes: what is annotated is what is drawn, and pixels do not give the class away."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from data.scenes.scenes import KEYPOINTS, PAIR_POINTS, Scenes

SCENES = range(40)


@pytest.fixture(scope="module")
def scenes():
    return Scenes("train", frames=4)


@pytest.fixture(scope="module")
def annotations(scenes):
    return [scenes.annotations(i) for i in SCENES]


def under(instance, points):
    """Instance under each point, which must be inside the image."""
    columns, rows = np.floor(points).astype(int).T
    return instance[rows, columns]


def test_a_scene_depends_on_nothing_but_seed_split_and_index(scenes):
    in_order = [scenes.image(i) for i in range(6)]
    fresh = Scenes("train", size=6)
    for i in reversed(range(6)):
        assert torch.equal(fresh.image(i), in_order[i])
    assert np.array_equal(fresh.labels, scenes.labels[:6])
    assert torch.equal(scenes.pair(3)[1], fresh.pair(3)[1])


def test_splits_and_seeds_are_different_scenes(scenes):
    for other in (Scenes("val", size=200), Scenes("train", size=200, seed=1)):
        assert not torch.equal(other.image(0), scenes.image(0))
        assert 0 < (other.labels == scenes.labels[:200]).sum() < 50


def test_images_are_uint8_and_items_carry_the_label(scenes):
    image, label = scenes[5]
    assert image.shape == (3, 64, 64) and image.dtype == torch.uint8
    assert label == scenes.labels[5] and type(label) is int
    assert scenes.name(5) == "scenes/train/5"
    assert image.float().std() > 10


def test_sizes_follow_the_split_and_iteration_ends():
    assert (len(Scenes("train")), len(Scenes("val")), len(Scenes("val", 7))) == (20_000, 4_000, 7)
    assert len(list(Scenes("val", 3))) == 3


def test_labels_are_balanced_over_ten_classes(scenes):
    counts = np.bincount(scenes.labels, minlength=10)
    assert scenes.labels.dtype == np.int64 and len(scenes.classes) == len(counts) == 10
    assert counts.min() > 1800 and counts.max() < 2200


def test_boxes_are_tight_around_the_visible_part(annotations):
    for found in annotations:
        assert found["boxes"].dtype == np.float32
        assert len(found["boxes"]) == len(found["box_labels"])
        assert found["instance"].max() == len(found["boxes"])
        for number, box in enumerate(found["boxes"], start=1):
            x0, y0, x1, y1 = box.astype(int)
            inside = found["instance"][y0:y1, x0:x1] == number
            assert inside.sum() == (found["instance"] == number).sum()
            edges = (inside[0], inside[-1], inside[:, 0], inside[:, -1])
            assert all(edge.any() for edge in edges)


def test_the_label_is_the_class_of_the_largest_nearest_object(scenes, annotations):
    for i, found in zip(SCENES, annotations, strict=True):
        instance, depth, label = found["instance"], found["depth"], scenes.labels[i]
        areas = np.bincount(instance.ravel())[1:]
        assert areas.argmax() == 0 and found["box_labels"][0] == label
        assert label not in found["box_labels"][1:]
        assert depth[instance == 1].mean() == min(
            depth[instance == k + 1].mean() for k in range(len(areas))
        )


def test_mask_depth_and_instance_tell_the_same_story(annotations):
    for found in annotations:
        classes = np.append(0, 1 + found["box_labels"])
        assert np.array_equal(found["mask"], classes[found["instance"]])
        assert found["mask"].dtype == found["instance"].dtype == np.uint8
        depth, background = found["depth"], found["instance"] == 0
        assert depth.dtype == np.float32 and depth.shape == (64, 64) and depth.min() > 0
        assert depth[background].min() > depth[~background].max()


def test_every_object_leaves_pixels_at_the_smallest_resolution():
    scenes = Scenes("val", resolution=32)
    for i in range(400):
        assert (scenes.annotations(i)["boxes"][:, 2:] > 0).all()


def test_visible_keypoints_lie_on_the_main_object(annotations):
    shares = []
    for found in annotations:
        points, visible = found["keypoints"][:, :2], found["keypoints"][:, 2]
        assert found["keypoints"].shape == (KEYPOINTS, 3)
        assert (under(found["instance"], points[visible == 1]) == 1).all()
        shares.append(visible.mean())
    assert np.mean(shares) > 0.9


def test_keypoints_keep_their_order_in_every_scene_of_a_class(scenes):
    """Up to rotation, size and place, the keypoints of one class are one figure."""
    label = scenes.labels[0]
    figures = []
    for i in np.flatnonzero(scenes.labels == label)[:5]:
        x, y = scenes.annotations(int(i))["keypoints"][:, :2].T.astype(float)
        figure = (x - x.mean()) + 1j * (y - y.mean())
        figures.append(figure / figure[0])
    np.testing.assert_allclose(figures, [figures[0]] * 5, atol=1e-3)


def test_pair_points_are_the_same_place_in_both_views(scenes, annotations):
    visible_share = []
    for i in SCENES:
        image_a, image_b, points_a, points_b, visible = scenes.pair(i)
        assert torch.equal(image_a, scenes.image(i)) and not torch.equal(image_a, image_b)
        assert points_a.shape == points_b.shape == (PAIR_POINTS, 2) and visible.dtype == bool
        owners = under(annotations[i]["instance"], points_a)
        assert (owners > 0).all()
        assert (points_b[visible] >= 0).all() and (points_b[visible] < 64).all()
        main = visible & (owners == 1)
        x = points_a[main].astype(float) @ [1, 1j]
        y = points_b[main].astype(float) @ [1, 1j]
        if len(x) > 2:  # a similarity: one complex factor and one offset
            factor, offset = np.polyfit(x, y, 1)
            np.testing.assert_allclose(factor * x + offset, y, atol=1e-2)
            assert 0.7 < abs(factor) < 1.4 and abs(np.angle(factor)) < 0.8
        visible_share.append(visible.mean())
    assert 0.8 < np.mean(visible_share) < 1


def test_luminance_around_pair_points_agrees(scenes):
    """What is drawn moves with the points: matched points correlate, others do not."""
    here, there = [], []
    for i in range(150):
        image_a, image_b, points_a, points_b, visible = scenes.pair(i)
        for image, points, values in ((image_a, points_a, here), (image_b, points_b, there)):
            grey = image.float().mean(0).numpy()
            centred = under(grey, points[visible]) - under(grey, points[visible]).mean()
            values.append(centred)
    matched = np.corrcoef(np.concatenate(here), np.concatenate(there))[0, 1]
    shuffled = np.corrcoef(np.concatenate(here), np.concatenate([np.roll(v, 1) for v in there]))[
        0, 1
    ]
    assert matched > 0.7 and matched > shuffled + 0.5


def test_clips_start_at_the_image_and_move_smoothly(scenes, annotations):
    moved = []
    for i in range(12):
        frames, instances = scenes.clip(i)
        assert frames.shape == (4, 3, 64, 64) and instances.shape == (4, 64, 64)
        assert frames.dtype == torch.uint8 and instances.dtype == np.uint8
        assert torch.equal(frames[0], scenes.image(i))
        assert np.array_equal(instances[0], annotations[i]["instance"])
        centres = np.array([np.argwhere(instance == 1).mean(axis=0) for instance in instances])
        assert np.linalg.norm(np.diff(centres, axis=0), axis=1).max() < 4
        assert np.linalg.norm(np.diff(centres, n=2, axis=0), axis=1).max() < 2
        moved.append((instances[0] != instances[-1]).any())
    assert all(moved)


def test_resolution_only_resamples_the_scene():
    small, large = Scenes("val", 3, resolution=32), Scenes("val", 3, resolution=96)
    for i in range(3):
        assert large.image(i).shape == (3, 96, 96)
        boxes = small.annotations(i)["boxes"] * 3, large.annotations(i)["boxes"]
        np.testing.assert_allclose(*boxes, atol=4)
        shrunk = F.avg_pool2d(large.image(i).float(), 3)
        assert (shrunk - small.image(i)).abs().mean() < 12


def test_raw_pixels_do_badly():
    def pixels(split, size):
        data = Scenes(split, size)
        images = torch.stack([data.image(i) for i in range(size)]).flatten(1).float()
        return F.normalize(images / 127.5 - 1, dim=1), torch.from_numpy(data.labels)

    train, train_labels = pixels("train", 1000)
    val, val_labels = pixels("val", 500)
    similarity, nearest = (val @ train.T).topk(20)
    votes = torch.zeros(500, 10)
    votes.scatter_add_(1, train_labels[nearest], (similarity / 0.07).exp())
    assert (votes.argmax(1) == val_labels).float().mean() < 0.35


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"split": "test"}, "no split 'test'; choose from train, val"),
        ({"size": 0}, "size of scenes is 0"),
        ({"seed": -1}, "seed of scenes is -1"),
        ({"resolution": 16}, "at least 32"),
        ({"frames": 1.5}, "frames of scenes is 1.5"),
    ],
)
def test_bad_arguments_are_refused_in_one_sentence(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        Scenes(**options)
