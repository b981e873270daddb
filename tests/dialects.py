"""Models of transformers and timm with weights that make attention and positions matter, and Meta's files made from them."""

import os

import torch
from torch import Tensor, nn

from models.features import Features

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test of ours may reach for the network

SIZES = {
    "nano": dict(hidden_size=128, num_hidden_layers=2, num_attention_heads=2),  # heads of 64, as Meta's files imply
    "S": dict(hidden_size=384, num_hidden_layers=12, num_attention_heads=6),
    "B": dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12),
    "L": dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16),
}
CONVNEXT = {
    "nano": dict(depths=[1, 1, 2, 1], hidden_sizes=[8, 16, 24, 32]),
    "T": dict(depths=[3, 3, 9, 3], hidden_sizes=[96, 192, 384, 768]),
    "S": dict(depths=[3, 3, 27, 3], hidden_sizes=[96, 192, 384, 768]),
    "B": dict(depths=[3, 3, 27, 3], hidden_sizes=[128, 256, 512, 1024]),
    "L": dict(depths=[3, 3, 27, 3], hidden_sizes=[192, 384, 768, 1536]),
}
SEVEN_BILLION = dict(query_bias=False, value_bias=False, use_gated_mlp=True, hidden_act="silu")
HF_CLASSES = ["ViTModel", "Dinov2Model", "Dinov2WithRegistersModel", "DINOv3ViTModel", "DINOv3ConvNextModel"]


@torch.no_grad()
def draw(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights N(0, 1/fan_in), norms and LayerScale near 1, tokens and positions of order 1, biases of order 0.1."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in sorted(model.named_parameters()):
        noise = torch.randn(tensor.shape, generator=generator)
        scale = any(part in name for part in ("gamma", "lambda1", ".ls")) or tensor.ndim == 1 and "weight" in name
        if scale:
            tensor.copy_(1 + 0.1 * noise)
        elif "token" in name or "pos" in name:
            tensor.copy_(0.5 * noise)
        elif tensor.ndim > 1:
            tensor.copy_(noise * tensor[0].numel() ** -0.5)
        else:
            tensor.copy_(0.1 * noise)
    return model.eval()


def hugging_face(name: str, size: str, **options) -> nn.Module:
    """One of `HF_CLASSES` with official fields, at 4 × 4 patches unless `image_size` says otherwise."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    patch = 14 if name.startswith("Dinov2") else 16
    fields = {"patch_size": patch, "image_size": 4 * patch}
    if name == "DINOv3ConvNextModel":
        fields = CONVNEXT[size]
    else:
        fields |= SIZES[size]
        if not name.startswith("Dinov2"):
            fields["intermediate_size"] = 4 * fields["hidden_size"]
    if name == "ViTModel":
        fields["layer_norm_eps"] = 1e-6
    if name == "DINOv3ViTModel":
        fields["num_register_tokens"] = 4
    model_class = getattr(transformers, name)
    return draw(model_class(model_class.config_class(**{**fields, **options})))


def hf_tokens(model: nn.Module, images: Tensor) -> Tensor:
    options = {"interpolate_pos_encoding": True} if type(model).__name__ == "ViTModel" else {}
    with torch.no_grad():
        return model(images, **options).last_hidden_state


def tokens(features: Features) -> Tensor:
    """(B, 1 + R + N, D) in the order of the authors."""
    return torch.cat([features.cls[:, None], features.registers, features.patches], dim=1)


@torch.no_grad()
def deviation(backbone: nn.Module, reference: Tensor, images: Tensor) -> float:
    """Of every token of `backbone` from `reference`, over the largest number in it."""
    found = tokens(backbone(images))
    assert found.shape == reference.shape
    return ((found - reference).abs().max() / reference.abs().max()).item()
