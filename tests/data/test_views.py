"""Views and masks: the geometric and the photometric half of the augmentation, block masks."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as V

from data import augment
from data.augment import POLICIES, AugmentPolicy, CropSpec, MultiCrop, crop_boxes, draw, photometric
from data.masking import block_mask, draw_masks
from engine.config import load_config
from engine.optim import build_schedules
from engine.stages import plan_stages
from engine.views import stage_loader
from evals.photographs import load_images
from evals.views import hide_in_crops, make_views

PLAIN = AugmentPolicy(flip=0, jitter=0, grayscale=0, blur=(0, 0, 0), solarize=0)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, generator=seeded(seed), dtype=torch.uint8)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def multi_crop(channels=3, policy=POLICIES["natural"], local_count=3) -> MultiCrop:
    return MultiCrop(
        CropSpec((16, 24), (0.4, 1.0), 2),
        CropSpec((8, 12), (0.05, 0.4), local_count),
        policy,
        (0.5,) * channels,
        (0.25,) * channels,
    )


@pytest.mark.parametrize("channels", [1, 3, 4, 13])
def test_crops_have_the_asked_counts_and_sizes(channels):
    images = [noise(channels, *size) for size in ((50, 97), (1, 1), (20, 3))]
    tables = [draw(seeded(k), 5) for k in range(3)]
    crops = multi_crop(channels)
    global_views, local_views = crops.views(images, tables)
    assert global_views.shape == (6, channels, 16, 24) and global_views.dtype == torch.uint8
    assert local_views.shape == (9, channels, 8, 12)
    global_crops, local_crops, _ = crops(iter(images), tables)
    assert global_crops.shape == (6, channels, 16, 24) and local_crops.shape == (9, channels, 8, 12)
    assert global_crops.isfinite().all() and local_crops.dtype == torch.float32
    assert multi_crop(channels, local_count=0)(images, [t[:2] for t in tables])[1] is None


def test_crops_are_crop_major_and_a_function_of_image_and_table():
    images = [noise(3, 40, 30, seed=k) for k in range(3)]
    tables = [draw(seeded(k), 5) for k in range(3)]
    together = multi_crop()(images, tables)
    for k in range(3):
        alone = multi_crop()(images[k : k + 1], tables[k : k + 1])
        for joint, single in zip(together[:2], alone[:2], strict=True):
            assert torch.equal(joint[k::3], single)


@pytest.mark.parametrize(
    "size, scale",
    [
        ((60, 100), (0.08, 1.0)),
        ((30, 200), (0.4, 1.0)),
        ((28, 28), (0.05, 0.4)),
        ((200, 20), (0.3, 1.0)),
    ],
)
def test_boxes_are_distributed_as_random_resized_crop(size, scale):
    n = 2000
    torch.manual_seed(0)
    image = torch.empty(1, *size)
    boxes = [v2.RandomResizedCrop(8, scale).make_params([image]) for _ in range(n)]
    theirs = np.array([[box[k] for k in ("top", "left", "height", "width")] for box in boxes])
    ours = crop_boxes(draw(seeded(1), n), *size, CropSpec((8, 8), scale, n))
    assert (ours >= 0).all() and (ours[:, :2] + ours[:, 2:] <= size).all()
    room = np.array(size) - ours[:, 2:]
    free = (room > 4).all(1)  # enough of it on both axes: then one says nothing about the other
    if free.sum() > n / 2:
        assert abs(np.corrcoef((ours[free, :2] / room[free]).T)[0, 1]) < 0.1
    measures = [
        lambda b: b[:, 2] * b[:, 3],
        lambda b: b[:, 3] / b[:, 2],
        lambda b: b[:, 0],
        lambda b: b[:, 1],
    ]
    for measure in measures:
        a, b = np.sort(measure(ours)), np.sort(measure(theirs))
        at = np.concatenate([a, b])
        gap = np.searchsorted(a, at, "right") / n - np.searchsorted(b, at, "right") / n
        assert np.abs(gap).max() < 1.63 * (2 / n) ** 0.5  # Kolmogorov-Smirnov, 1 %


def test_boxes_of_a_batch_equal_those_of_each_image():
    u, spec = draw(seeded(0), 50), CropSpec((8, 8), (0.1, 1.0), 1)
    sizes = np.random.default_rng(0).integers(1, 90, (50, 2))
    together = crop_boxes(u, sizes[:, 0], sizes[:, 1], spec)
    alone = [crop_boxes(u[k : k + 1], *sizes[k].tolist(), spec)[0] for k in range(50)]
    assert np.array_equal(together, alone)


def test_flip_mirrors_a_crop():
    image, box = noise(3, 30, 40), (3, 4, 20, 25)
    crop = augment.resized_crop(image, box, (8, 12), False)
    assert torch.equal(augment.resized_crop(image, box, (8, 12), True), crop.flip(-1))
    assert torch.equal(augment.resized_crop(image, box, (20, 25), False), image[:, 3:23, 4:29])


def one_by_one(image: Tensor, u: Tensor, policy: AugmentPolicy, blur_p: float, solarize_p: float):
    """The same views, an image at a time, by torchvision's functions."""

    def between(low, high, t):
        return low + (high - low) * t.item()

    strengths = (policy.brightness, policy.contrast, policy.saturation)
    *numbers, last = u[augment.FACTORS]
    factors = [between(1 - s, 1 + s, t) for s, t in zip(strengths, numbers, strict=True)]
    factors.append(between(-policy.hue, policy.hue, last))
    functions = (V.adjust_brightness, V.adjust_contrast, V.adjust_saturation, V.adjust_hue)
    if u[augment.JITTER] < policy.jitter:
        for k in u[augment.ORDER].argsort().tolist():
            if k < 2 or len(image) == 3:
                image = functions[k](image, factors[k])
    if u[augment.GRAYSCALE] < policy.grayscale and len(image) == 3:
        image = V.rgb_to_grayscale(image, 3)
    if u[augment.BLUR] < blur_p:
        image = V.gaussian_blur(image, [9, 9], [between(*policy.blur_sigma, u[augment.SIGMA])] * 2)
    return V.solarize(image, 0.5) if u[augment.SOLARIZE] < solarize_p else image


SINGLE = {
    "brightness": dict(jitter=1.0, brightness=0.4),
    "contrast": dict(jitter=1.0, contrast=0.4),
    "saturation": dict(jitter=1.0, saturation=0.8),
    "hue": dict(jitter=1.0, hue=0.5),
    "grayscale": dict(grayscale=1.0),
    "blur": dict(blur=(1.0, 1.0, 1.0)),
    "solarize": dict(solarize=1.0),
    "all": dict(
        jitter=0.8,
        brightness=0.4,
        contrast=0.4,
        saturation=0.2,
        hue=0.1,
        grayscale=0.2,
        blur=(0.5, 0.5, 0.5),
        solarize=0.3,
    ),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("operation", SINGLE)
def test_photometry_equals_torchvision_image_by_image(operation, channels):
    nothing = dict(
        flip=0,
        jitter=0,
        brightness=0,
        contrast=0,
        saturation=0,
        hue=0,
        grayscale=0,
        blur=(0, 0, 0),
        solarize=0,
    )
    policy = AugmentPolicy(**(nothing | SINGLE[operation]))
    n = 40 if operation == "all" else 6
    crops, u = noise(n, channels, 12, 17), draw(seeded(5), n)
    ours = photometric(
        crops,
        u,
        policy,
        torch.full((n,), policy.blur[0]),
        torch.full((n,), policy.solarize),
        [0.3] * channels,
        [0.2],
    )
    expected = torch.stack(
        [
            one_by_one(crop / 255, row, policy, policy.blur[0], policy.solarize)
            for crop, row in zip(crops, u, strict=True)
        ]
    )
    # Solarisation jumps at 0.5: a pixel there may fall on either side.
    close = (ours * 0.2 + 0.3 - expected).abs() < 2e-4
    assert close.float().mean() > (0.9999 if operation == "all" else 0.999999)
    if channels == 3 or operation in ("brightness", "contrast", "blur", "solarize"):
        assert (expected - crops / 255).abs().max() > 0.05  # it did something


def test_photometry_leaves_its_input_alone_and_skips_colour_without_colours():
    crops, u = torch.rand(8, 4, 9, 9, generator=seeded(0)), draw(seeded(1), 8)
    before, zeros = crops.clone(), torch.zeros(8)
    policy = AugmentPolicy(jitter=1.0, brightness=0, contrast=0, grayscale=1.0)
    assert torch.equal(photometric(crops, u, policy, zeros, zeros, [0.0], [1.0]), before)
    photometric(crops, u, POLICIES["natural"], zeros + 1, zeros + 1, [0.0], [1.0])
    assert torch.equal(crops, before)
    with pytest.raises(ValueError, match="mean has 3 values for images of 4 channels"):
        photometric(crops, u, policy, zeros, zeros, [0.5] * 3, [1.0])


def test_blur_and_solarisation_differ_between_views():
    images, tables = [noise(3, 40, 40)], [draw(seeded(0), 5)]

    def changed(**options):
        plain, other = (
            multi_crop(policy=policy)(images, tables)[:2]
            for policy in (PLAIN, replace(PLAIN, **options))
        )
        return [
            not torch.equal(a, b)
            for pair in zip(plain, other, strict=True)
            for a, b in zip(*pair, strict=False)
        ]

    assert changed(solarize=1.0) == [False, True, False, False, False]
    assert changed(blur=(1.0, 0.0, 0.0)) == [True, False, False, False, False]
    assert changed(blur=(0.0, 1.0, 0.0)) == [False, True, False, False, False]
    assert changed(blur=(0.0, 0.0, 1.0)) == [False, False, True, True, True]
    assert POLICIES["natural_released_v2"].blur == (0.0, 0.9, 0.5)


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (4, 9)])
def test_blur_works_on_crops_smaller_than_its_kernel(size):
    blurred = augment.gaussian_blur(torch.ones(2, 3, *size), torch.tensor([0.1, 2.0]))
    assert torch.allclose(blurred, torch.ones(2, 3, *size))


# Masks


@pytest.mark.parametrize("grid", [(14, 14), (4, 10), (7, 3), (2, 2), (1, 5)])
def test_block_masks_hide_exactly_the_count(grid):
    total = grid[0] * grid[1]
    for count in range(total + 1):
        rng = np.random.default_rng(count)
        assert block_mask(grid, count, rng).sum() == count
        assert block_mask(grid, count, rng, fill=False).sum() <= count
    with pytest.raises(ValueError, match=f"cannot hide {total + 1} patches"):
        block_mask(grid, total + 1, rng)


@pytest.mark.parametrize("ratio", [(0.1, 0.5), (0.6, 0.9)])
def test_masks_of_a_run_are_filled_or_short_as_the_key_says(ratio, tiny):
    """In training and in `visualize.py masks`; DINOv2 leaves masks short, DINOv3 fills them."""
    keys = ["crops.global_size=48", "model.patch_size=6", f"loss.ibot.mask_ratio={list(ratio)}"]
    keys += ["loss.ibot.mask_probability=1"]
    wanted = [int(64 * edge) for edge in np.linspace(*ratio, 17)[1:]]  # of 16 crops
    drawn = {}
    for fill in ("true", "false"):
        cfg = load_config(None, [*tiny, *keys, f"loss.ibot.mask_fill={fill}"])
        (stage,) = plan_stages(cfg, 4, build_schedules)
        batch = next(iter(stage_loader(stage, 0, 6, torch.device("cpu"))))
        views = make_views(cfg, list(load_images(["scenes?size=8"], 3, 8)))
        drawn[fill] = [
            sorted(m.flatten(1).sum(1).tolist())
            for m in (batch.masks, hide_in_crops(cfg, views)[1])
        ]
    assert drawn["true"] == [wanted, wanted]
    for counts in drawn["false"]:
        assert counts != wanted
        assert all(short <= full for short, full in zip(counts, wanted, strict=True))


def test_masks_are_blocks_not_noise():
    rng = np.random.default_rng(0)
    masks = np.stack([block_mask((14, 14), 60, rng) for _ in range(50)])
    scattered = rng.permuted(masks.reshape(50, -1), axis=1).reshape(masks.shape)
    borders = [np.abs(np.diff(m.astype(int), axis=2)).mean() for m in (masks, scattered)]
    assert borders[0] < 0.6 * borders[1]
    assert masks.any(0).all()  # every patch has its turn


def test_mask_counts_are_those_of_dinov3():
    masks = draw_masks(4, (16, 16), 0.5, (0.1, 0.5), (0, 0))
    assert masks.shape == (4, 256) and sorted(masks.sum(1).tolist()) == [0, 0, 76, 128]
    steps = [draw_masks(4, (16, 16), 0.5, (0.1, 0.5), (0, step)) for step in range(30)]
    assert {masks[0].sum().item() for masks in steps} == {0, 76, 128}  # shuffled over the crops
    assert not draw_masks(5, (4, 6), 0.0, (0.1, 0.5), (0, 0)).any()
    assert draw_masks(1, (4, 6), 1.0, (0.1, 0.5), (0, 0)).sum() == 12


def test_masks_of_some_crops_are_those_of_the_whole_batch():
    masks = draw_masks(8, (4, 6), 0.75, (0.2, 0.6), (1, 2))
    for rows in (slice(2, 5), range(3, 8), [1, 5]):
        part = draw_masks(8, (4, 6), 0.75, (0.2, 0.6), (1, 2), rows)
        assert torch.equal(part, masks[list(rows) if isinstance(rows, range) else rows])
