"""Augmentation policies for other domains than photographs."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from data import augment
from data.augment import POLICIES, CropSpec, MultiCrop, draw, resized_crop
from data.stains import ABSORPTION, stain_jitter
from tests.deep import noise


def test_a_turn_is_that_of_the_crop():
    image = torch.from_numpy(noise(3, 8, 8))
    plain = resized_crop(image, (0, 0, 8, 8), (8, 8), False)
    for turns in range(4):
        assert torch.equal(
            resized_crop(image, (0, 0, 8, 8), (8, 8), False, turns), plain.rot90(turns, (1, 2))
        )
        assert resized_crop(image, (0, 0, 6, 5), (4, 9), True, turns).shape == (3, 4, 9)


def test_turns_come_in_equal_parts():
    policy = replace(POLICIES["crops_only"], flip=0.0, rotate90=0.75)
    crops = MultiCrop(CropSpec((4, 4), (1.0, 1.0), 400), None, policy, (0.0,), (1.0,))
    image = torch.arange(16, dtype=torch.uint8).view(1, 4, 4)
    views = (
        (crops([image], [draw(torch.Generator().manual_seed(0), 400)])[0] * 255)
        .round()
        .long()[:, 0, 0, 0]
    )
    counts = torch.bincount(views, minlength=16)[
        [0, 3, 12, 15]
    ]  # by the corner that came to the top left
    assert counts.sum() == 400 and counts.min() > 70


def test_older_seeds_keep_their_views():
    table = draw(torch.Generator().manual_seed(5), 7)
    assert torch.equal(table[:, :36], torch.rand(7, 36, generator=torch.Generator().manual_seed(5)))


def test_stain_jitter_equals_a_loop_over_pixels():
    x, u = (
        torch.rand(2, 3, 3, 4, dtype=torch.float64) * 0.9 + 0.1,
        torch.rand(2, 6, dtype=torch.float64),
    )
    result = stain_jitter(x, u, 0.2)
    rows = np.array(ABSORPTION) / np.linalg.norm(ABSORPTION, axis=1, keepdims=True)
    for n in range(2):
        for place in np.ndindex(3, 4):
            dyes = np.linalg.solve(rows.T, -np.log(x[(n, slice(None), *place)].numpy()))
            for k in range(3):
                dyes[k] = dyes[k] * (0.8 + 0.4 * u[n, k].item()) - 0.2 + 0.4 * u[n, 3 + k].item()
            expected = np.exp(-(dyes @ rows)).clip(0, 1)
            assert np.allclose(result[(n, slice(None), *place)], expected, atol=1e-9)
    assert torch.allclose(stain_jitter(x, torch.full_like(u, 0.5), 0.2), x)


@pytest.mark.parametrize("name", ["grey-medical", "histology", "aerial", "microscopy"])
@pytest.mark.parametrize("channels", [1, 3, 4, 13])
def test_policies_take_any_channels_that_make_sense(name, channels):
    def views(dtype):
        image = torch.from_numpy(noise(channels, 20, 20, dtype=dtype))
        spec = CropSpec((16, 16), (0.4, 1.0), 2), CropSpec((8, 8), (0.1, 0.4), 2)
        crops = MultiCrop(*spec, POLICIES[name], (0.5,) * channels, (0.25,) * channels)
        return crops([image], [draw(torch.Generator().manual_seed(0), 4)])

    if name == "histology" and channels != 3:
        with pytest.raises(ValueError, match=f"three colours, not of {channels} channels"):
            views(np.uint8)
        return
    for dtype in (np.uint8, np.uint16):
        global_crops, local_crops, *_ = views(dtype)
        assert global_crops.shape == (2, channels, 16, 16) and local_crops.shape == (
            2,
            channels,
            8,
            8,
        )
        assert global_crops.isfinite().all() and global_crops.abs().max() <= 2 + 1e-5


def test_every_column_of_the_random_table_has_one_use_and_keeps_its_numbers():
    """Columns drawn elsewhere, or twice, would change the views of every old seed."""
    names = ("AREA", "ASPECT", "TOP", "LEFT", "FLIP", "JITTER", "FACTORS", "ORDER", "GRAYSCALE")
    names += ("BLUR", "SIGMA", "SOLARIZE", "ROTATION", "STAINS", "TARGET")
    used = []
    for name in names:
        columns = getattr(augment, name)
        whole = range(augment.NUMBERS + 2)
        used += [columns] if isinstance(columns, int) else list(whole)[columns]
    assert sorted(used) == list(range(augment.NUMBERS + 2))
    table = augment.draw(torch.Generator().manual_seed(7), 3)
    assert table.shape[1] == augment.NUMBERS
    # Of the first version that drew each column; a new block is drawn after them.
    sums = [table[:, :36].sum().item(), table[:, 36:43].sum().item()]
    assert sums == pytest.approx([54.28177, 9.13279], abs=1e-4)


def test_a_new_block_of_columns_leaves_the_numbers_of_the_others(monkeypatch):
    before = augment.draw(torch.Generator().manual_seed(7), 3)
    monkeypatch.setattr(augment, "DRAWN", (*augment.DRAWN, 4))
    after = augment.draw(torch.Generator().manual_seed(7), 3)
    assert after.shape[1] == before.shape[1] + 4
    assert torch.equal(after[:, : before.shape[1]], before)
