"""Released weights, read: what transformers and timm compute, our model computes, and no tensor is lost on the way."""

import pytest
import torch

from models import load_backbone
from tests.dialects import HF_CLASSES, deviation, hf_tokens, hugging_face

BOUND = 1e-5


def image(height: int, width: int, channels: int = 3) -> torch.Tensor:
    return torch.randn(1, channels, height, width, generator=torch.Generator().manual_seed(height + width))


def sizes_of(name: str) -> list[tuple[int, int]]:
    """Native, another square, one that is not square."""
    if name == "DINOv3ConvNextModel":
        return [(64, 64), (96, 96), (64, 96)]
    patch = 14 if name.startswith("Dinov2") else 16
    return [(4 * patch, 4 * patch), (6 * patch, 6 * patch), (3 * patch, 5 * patch)]


# ----------------------------------------------------------------- Hugging Face


@pytest.mark.parametrize("size", ["S", "B", pytest.param("L", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", HF_CLASSES)
def test_hugging_face_folders_give_the_tokens_of_transformers(name, size, tmp_path):
    pytest.importorskip("transformers")
    model = hugging_face(name, size)
    model.save_pretrained(tmp_path)
    backbone = load_backbone(tmp_path)
    for height, width in sizes_of(name):
        images = image(height, width)
        found = deviation(backbone, hf_tokens(model, images), images)
        print(name, size, height, width, found)
        assert found <= BOUND
