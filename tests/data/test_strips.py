"""Long thin images cost no more than their crop."""

import numpy as np
import pytest
import torch

from data import evaluation as loader
from data.annotated import Annotated
from data.evaluation import EvalDataset
from data.images import ImageData
from data.pictures import UnreadableImage


class One(ImageData):
    title = "one"

    def __init__(self, image):
        self.picture = image

    def __len__(self):
        return 1

    def image(self, index):
        return self.picture


def strip(height: int, width: int, dtype=torch.uint8) -> One:
    rng = np.random.default_rng(0)
    high = 255 if dtype == torch.uint8 else 65535
    return One(torch.from_numpy(rng.integers(0, high, (3, height, width))).to(dtype))


@pytest.mark.parametrize("shape", [(1, 700), (900, 3), (7, 1111), (40, 3000), (2500, 33), (2, 99)])
@pytest.mark.parametrize("mode", ["bicubic", "bilinear", "nearest"])
def test_the_crop_of_a_strip_is_that_of_the_whole(shape, mode, monkeypatch):
    data = strip(*shape, torch.uint16)
    items = EvalDataset(data, 20, (16, 18), (0.0,), (1.0,), mode)
    short, _, _ = items[0]
    monkeypatch.setattr(loader, "STRIP", float("inf"))
    whole, _, _ = items[0]
    assert short.shape == whole.shape == (3, 16, 18)
    assert torch.allclose(short, whole, atol=2e-3)


@pytest.mark.parametrize("shape", [(1, 50_000), (50_000, 2), (3, 80_000)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16])
def test_a_strip_is_never_resized_whole(shape, dtype, monkeypatch):
    sizes = []
    resize = loader.resize

    def watched(image, size, mode):
        sizes.append(size)
        return resize(image, size, mode)

    monkeypatch.setattr(loader, "resize", watched)
    crop, _, _ = EvalDataset(strip(*shape, dtype), 256, (224, 224), (0.5,), (0.25,))[0]
    assert crop.shape == (3, 224, 224) and max(sizes[0]) <= 256 * 14


@pytest.mark.parametrize("shape", [(1, 5000), (50_000, 2), (16, 200_000)])
def test_dense_features_of_a_strip_are_refused_before_they_cost_memory(shape):
    items = Annotated(strip(*shape), (), 256, 16, (0.5,), (0.25,))
    with pytest.raises(UnreadableImage, match="more than 65536 patches"):
        items[0]
