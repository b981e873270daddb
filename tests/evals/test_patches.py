"""Patch k-NN segmentation and locality against plain loops, and between their bounds."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data.annotated import Annotated
from data.sources.specs import open_data
from evals.patches import (
    PatchBank,
    class_shares,
    confusion,
    extract_patches,
    mean_iou,
    mean_locality,
    patch_knn_segmentation,
    patch_locality,
    vote,
)  # fmt: skip
from models.features import Features
from models.weights.load import load_backbone
from tests.oracles import Oracle, class_maps, painted

CPU = torch.device("cpu")


def test_shares_of_classes_equal_a_loop_over_pixels():
    mask = torch.randint(0, 4, (13, 22), generator=torch.Generator().manual_seed(0))
    mask[3:5, 4:9] = 255
    expected = torch.zeros(15, 4)
    for y in range(13):
        for x in range(22):
            if mask[y, x] != 255:
                expected[int((y + 0.5) / 13 * 3) * 5 + int((x + 0.5) / 22 * 5), mask[y, x]] += 1
    assert torch.equal(class_shares(mask.byte(), (3, 5)), expected)


def test_miou_equals_a_loop_over_classes_and_leaves_ignored_pixels_out():
    generator = torch.Generator().manual_seed(1)
    mask, said = (torch.randint(0, 3, (9, 11), generator=generator) for _ in range(2))
    mask[:2] = 255
    mean, each = mean_iou(confusion(said, mask))
    for c in range(3):
        both = sum(
            a == c and b == c for a, b in zip(mask[2:].flatten(), said[2:].flatten(), strict=True)
        )
        either = sum(
            a == c or b == c for a, b in zip(mask[2:].flatten(), said[2:].flatten(), strict=True)
        )
        assert each[c] == pytest.approx(float(both) / float(either))
    assert len(each) == 3 and mean == pytest.approx(sum(each[:3]) / 3)


def test_only_ignored_pixels_are_refused():
    with pytest.raises(ValueError, match="ignored"):
        mean_iou(confusion(torch.zeros(4, 4), torch.full((4, 4), 255)))


def test_votes_equal_a_loop_over_patches():
    generator = torch.Generator().manual_seed(2)
    features = F.normalize(torch.randn(20, 6, generator=generator), dim=1)
    shares = torch.rand(20, 3, generator=generator)
    queries = torch.randn(7, 6, generator=generator)
    found = vote(queries, PatchBank(features, shares), k=5, temperature=0.3, chunk=3)
    for query, votes in zip(queries, found, strict=True):
        ranked = sorted(
            ((float(F.cosine_similarity(query, item, dim=0)), i) for i, item in enumerate(features))
        )[-5:]
        weights = [math.exp(similarity / 0.3) for similarity, _ in ranked]
        expected = sum(
            weight * shares[i] for weight, (_, i) in zip(weights, ranked, strict=True)
        ) / sum(weights)
        torch.testing.assert_close(votes, expected)


def test_images_of_several_sizes_keep_their_order_and_do_not_mix():
    backbone = load_backbone("random:vit_nano?patch_size=8&image_size=32&depth=2")
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(3, 32 + 8 * (i % 3), 32, generator=generator) for i in range(7)]
    found = list(
        extract_patches(
            backbone, [(image, i, i) for i, image in enumerate(images)], CPU, batch_size=4
        )
    )
    assert [item.index for item in found] == list(range(7)) and found[1].grid == (5, 4)
    for item, image in zip(found, images, strict=True):
        torch.testing.assert_close(
            item.tokens, backbone(image[None]).patches[0].detach(), atol=1e-5, rtol=1e-4
        )


def test_perfect_features_reach_what_pooled_ground_truth_reaches_and_chance_features_do_not():
    train, val = painted("mask", "train", 100), painted("mask", "val")
    perfect = patch_knn_segmentation(Oracle(class_maps), train, val, CPU)
    counts = 0
    for _, mask, _ in val:
        maps = F.interpolate(F.avg_pool2d(class_maps(mask), 8)[None], mask.shape, mode="bilinear")
        counts = counts + confusion(maps[0].argmax(0), mask)
    assert perfect["limit"] == pytest.approx(mean_iou(counts)[0])
    assert perfect["miou"] >= 0.99 * perfect["limit"] > 0.6
    # All background is 0.07.
    assert patch_knn_segmentation(Oracle(None), train, val, CPU)["miou"] < 0.1


def test_patch_knn_leaves_random_state_alone_and_repeats():
    backbone = load_backbone("random:vit_nano?patch_size=8&image_size=32&depth=2")
    data = Annotated(open_data("scenes?size=6"), "mask", 32, 8, (0.5,) * 3, (0.5,) * 3)
    state = torch.get_rng_state()
    first, second = (patch_knn_segmentation(backbone, data, data, CPU, bank=60) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state) and first == second
    assert first["n_patches"] == 60


def smooth(noise: float = 0.0, count: int = 4, side: int = 8) -> Features:
    generator = torch.Generator().manual_seed(0)
    maps = F.interpolate(
        torch.randn(count, 16, 3, 3, generator=generator), (side, side), mode="bicubic"
    )
    maps = maps + noise * torch.randn(maps.shape, generator=generator)
    tokens = maps.flatten(2).mT
    return Features(tokens[:, 0], tokens[:, :0], tokens, (side, side))


def test_locality_is_high_for_smooth_maps_and_falls_with_noise_to_a_half():
    values = [patch_locality(smooth(noise)) for noise in (0.0, 0.5, 1.5, 50.0)]
    assert values[0] > 0.9 and values == sorted(values, reverse=True)
    assert abs(values[-1] - 0.5) < 0.05


def test_locality_equals_a_loop_over_pairs_and_ignores_a_part_common_to_all_tokens():
    features = smooth(0.5, count=1, side=5)
    tokens = features.patches[0] - features.patches[0].mean(dim=0)
    total, place = 0.0, [(i // 5, i % 5) for i in range(25)]
    for a in range(25):
        distance = [max(abs(place[a][0] - y), abs(place[a][1] - x)) for y, x in place]
        cosine = [float(F.cosine_similarity(tokens[a], token, dim=0)) for token in tokens]
        pairs = [
            (n, f) for n in range(25) for f in range(25) if distance[n] == 1 and distance[f] >= 2
        ]
        total += sum(cosine[n] > cosine[f] for n, f in pairs) / len(pairs) / 25
    assert patch_locality(features) == pytest.approx(total, abs=1e-3)
    shifted = Features(features.cls, features.registers, features.patches + 3.0, features.grid)
    assert patch_locality(shifted) == pytest.approx(patch_locality(features), abs=1e-3)


def test_tokens_that_are_all_alike_are_at_chance():
    alike = Features(torch.ones(2, 4), torch.ones(2, 0, 4), torch.ones(2, 16, 4), (4, 4))
    assert patch_locality(alike) == 0.5


def test_a_grid_without_far_patches_is_refused():
    with pytest.raises(ValueError, match="2 x 2"):
        patch_locality(Features(torch.ones(1, 4), torch.ones(1, 0, 4), torch.ones(1, 4, 4), (2, 2)))


def test_locality_averages_over_images_of_a_data_set():
    backbone = load_backbone("pixels?patch_size=8")
    data = Annotated(open_data("scenes?size=3"), "mask", 64, 8, (0.5,) * 3, (0.5,) * 3)
    single = [patch_locality(backbone(data[i][0][None])) for i in range(3)]
    assert mean_locality(backbone, data, CPU) == pytest.approx(np.mean(single))


def test_annotations_that_are_missing_are_named(images):
    with pytest.raises(ValueError, match="no annotations"):
        Annotated(open_data(f"folder:{images}"), "mask", 32, 8, (0.5,) * 3, (0.5,) * 3)
    with pytest.raises(ValueError, match="no roads; it has boxes"):
        Annotated(open_data("scenes?size=3"), "roads", 32, 8, (0.5,) * 3, (0.5,) * 3)
