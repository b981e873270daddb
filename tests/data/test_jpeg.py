"""JPEG files decoded at the scale of their crops: the same crops, from fewer pixels."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from data.augment import POLICIES, CropSpec, MultiCrop
from data.evaluation import EvalDataset
from data.jpeg import decoded_for
from data.loader import StepDataset, Views
from data.sources.specs import open_data

MEAN, STD = (0.5,) * 3, (0.25,) * 3
SIDES = (900, 1200)


@pytest.fixture
def folder(tmp_path):
    """Smooth colours and one fine grating, as JPEG, as a JPEG on its side, and as PNG."""
    rows, columns = np.mgrid[0 : SIDES[0], 0 : SIDES[1]] / 100
    planes = [np.sin(rows), np.cos(columns + rows), np.sin(columns * rows / 40)]
    pixels = (127 + 100 * np.stack(planes, -1)).round().astype(np.uint8)
    picture = Image.fromarray(pixels)
    picture.save(tmp_path / "a.jpg", quality=95)
    turned = Image.Exif()
    turned[274] = 6
    picture.rotate(90, expand=True).save(tmp_path / "b.jpg", quality=95, exif=turned)
    picture.save(tmp_path / "c.png")
    return tmp_path


@pytest.mark.parametrize("times, step", [(1.0, 1), (1.99, 1), (2.0, 2), (3.9, 2), (4, 4), (100, 8)])
def test_only_a_jpeg_is_decoded_smaller_and_never_below_what_is_asked(folder, times, step):
    data = open_data(str(folder), 3)
    asked = []
    with decoded_for(lambda *sides: asked.append(sides) or times):
        found = [tuple(data.image(k).shape[-2:]) for k in range(3)]
    sides = tuple(-(-side // step) for side in SIDES)
    assert found == [sides, sides, SIDES]
    assert asked == [SIDES, SIDES]  # upright, from the header
    assert tuple(data.image(0).shape[-2:]) == SIDES  # outside, as stored


def test_crops_of_scaled_files_show_what_those_of_whole_files_show(folder):
    data = open_data(str(folder), 3)
    specs = CropSpec((64, 64), (0.32, 1.0), 2), CropSpec((32, 32), (0.05, 0.32), 2)
    views = [Views(MultiCrop(*specs, POLICIES["crops_only"], MEAN, STD))]
    whole, scaled = (
        StepDataset(data, views, batch_size=3, seed=0, scaled_jpeg=scaled)
        for scaled in (False, True)
    )
    sizes = []
    image = data.image
    data.image = lambda k: sizes.append(image(k)) or sizes[-1]
    for step in range(4):
        a, b = whole[step], scaled[step]
        for name in ("global_crops", "local_crops"):
            difference = (getattr(a, name) - getattr(b, name)).abs() * STD[0]
            assert difference.mean() < 0.01 and difference.max() < 0.2
    pixels = [one.shape[-1] * one.shape[-2] for one in sizes]
    assert sum(pixels) < 0.75 * len(pixels) * SIDES[0] * SIDES[1]


def test_evaluation_sees_the_same_of_scaled_files(folder):
    data = open_data(str(folder), 3)
    whole, scaled = (
        EvalDataset(data, 128, (112, 112), MEAN, STD, scaled_jpeg=scaled)
        for scaled in (False, True)
    )
    scaled = pickle.loads(pickle.dumps(scaled))  # as loader processes get it
    for k in range(3):
        (a, _, _), (b, _, _) = whole[k], scaled[k]
        assert a.shape == b.shape
        assert ((a - b).abs() * STD[0]).mean() < (0.01 if k < 2 else 1e-9)
    assert torch.equal(whole[2][0], scaled[2][0])
