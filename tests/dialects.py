"""Models of transformers with weights for which attention matters, and Meta's files of them."""

import os
import re

import torch
from torch import Tensor, nn

from models.features import Features

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test of ours may reach for the network

SIZES = {
    "nano": dict(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=2
    ),  # heads of 64, as Meta's files imply
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
HF_CLASSES = [
    "ViTModel",
    "Dinov2Model",
    "Dinov2WithRegistersModel",
    "DINOv3ViTModel",
    "DINOv3ConvNextModel",
]


@torch.no_grad()
def draw(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights N(0, 1/fan_in), norms and LayerScale near 1, tokens and positions of order 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in sorted(model.named_parameters()):
        noise = torch.randn(tensor.shape, generator=generator)
        scale = (
            any(part in name for part in ("gamma", "lambda1", ".ls"))
            or tensor.ndim == 1
            and "weight" in name
        )
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
    """One of `HF_CLASSES` with official fields, for 4 × 4 patches unless `image_size` is given."""
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


# ----------------------------------------------------------------- Meta's files

# By the rules of transformers' conversion scripts.

_META_NAMES = {
    "ViTModel": [
        (r"^embeddings\.cls_token$", "cls_token"),
        (r"^embeddings\.position_embeddings$", "pos_embed"),
        (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
        (r"^encoder\.layer\.(\d+)\.layernorm_before\.", r"blocks.\1.norm1."),
        (r"^encoder\.layer\.(\d+)\.layernorm_after\.", r"blocks.\1.norm2."),
        (r"^encoder\.layer\.(\d+)\.attention\.output\.dense\.", r"blocks.\1.attn.proj."),
        (r"^encoder\.layer\.(\d+)\.intermediate\.dense\.", r"blocks.\1.mlp.fc1."),
        (r"^encoder\.layer\.(\d+)\.output\.dense\.", r"blocks.\1.mlp.fc2."),
        (r"^layernorm\.", "norm."),
    ],
    "Dinov2Model": [
        (r"^embeddings\.(cls_token|mask_token|register_tokens)$", r"\1"),
        (r"^embeddings\.position_embeddings$", "pos_embed"),
        (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
        (r"^encoder\.layer\.(\d+)\.attention\.output\.dense\.", r"blocks.\1.attn.proj."),
        (r"^encoder\.layer\.(\d+)\.layer_scale(\d)\.lambda1$", r"blocks.\1.ls\2.gamma"),
        (r"^encoder\.layer\.(\d+)\.mlp\.weights_in\.", r"blocks.\1.mlp.w12."),
        (r"^encoder\.layer\.(\d+)\.mlp\.weights_out\.", r"blocks.\1.mlp.w3."),
        (r"^encoder\.layer\.(\d+)\.(norm|mlp)", r"blocks.\1.\2"),
        (r"^layernorm\.", "norm."),
    ],
    "DINOv3ViTModel": [
        (r"^embeddings\.register_tokens$", "storage_tokens"),
        (r"^embeddings\.(cls_token|mask_token)$", r"\1"),
        (r"^embeddings\.patch_embeddings\.", "patch_embed.proj."),
        (r"^layer\.(\d+)\.attention\.o_proj\.", r"blocks.\1.attn.proj."),
        (r"^layer\.(\d+)\.layer_scale(\d)\.lambda1$", r"blocks.\1.ls\2.gamma"),
        (r"^layer\.(\d+)\.norm", r"blocks.\1.norm"),
        (r"^norm\.", "norm."),
    ],
    "DINOv3ConvNextModel": [
        (r"^stages\.(\d)\.downsample_layers\.", r"downsample_layers.\1."),
        (r"^stages\.(\d)\.layers\.(\d+)\.depthwise_conv\.", r"stages.\1.\2.dwconv."),
        (r"^stages\.(\d)\.layers\.(\d+)\.layer_norm\.", r"stages.\1.\2.norm."),
        (r"^stages\.(\d)\.layers\.(\d+)\.pointwise_conv(\d)\.", r"stages.\1.\2.pwconv\3."),
        (r"^stages\.(\d)\.layers\.(\d+)\.gamma$", r"stages.\1.\2.gamma"),
        (r"^layer_norm\.", "norm."),
    ],
}
_META_NAMES["Dinov2WithRegistersModel"] = _META_NAMES["Dinov2Model"]


def meta_file(model: nn.Module, disk: dict[str, Tensor]) -> dict[str, Tensor]:
    """The authors' file of a transformers model with the tensors `disk` on disk.

    Does not use the tables under test.
    """
    name, found, thirds = type(model).__name__, {}, {}
    for key, tensor in disk.items():
        third = re.match(
            r"(?:encoder\.)?layer\.(\d+)\.attention\.(?:attention\.)?([qkv])\w*\.(weight|bias)$",
            key,
        )
        if third:
            thirds.setdefault((third[1], third[3]), {})[third[2]] = tensor
            continue
        gate = re.match(r"layer\.(\d+)\.mlp\.(gate|up|down)_proj\.(weight|bias)$", key)
        if gate and name == "DINOv3ViTModel":
            names = (
                {"gate": "w1", "up": "w2", "down": "w3"}
                if model.config.use_gated_mlp
                else {"up": "fc1", "down": "fc2"}
            )
            found[f"blocks.{gate[1]}.mlp.{names[gate[2]]}.{gate[3]}"] = tensor
            continue
        for pattern, theirs in _META_NAMES[name]:
            if re.search(pattern, key):
                found[re.sub(pattern, theirs, key)] = tensor
                break
        else:
            assert key.startswith("pooler."), key
    for (block, leaf), parts in thirds.items():
        zeros = torch.zeros_like(parts["v"])
        found[f"blocks.{block}.attn.qkv.{leaf}"] = torch.cat(
            [parts["q"], parts.get("k", zeros), parts["v"]]
        )
        if name == "DINOv3ViTModel" and leaf == "bias":
            found[f"blocks.{block}.attn.qkv.bias_mask"] = torch.cat([zeros + 1, zeros, zeros + 1])
    if name == "DINOv3ViTModel":
        head_dim = model.config.hidden_size // model.config.num_attention_heads
        found["mask_token"] = found["mask_token"][0]
        found["rope_embed.periods"] = 100.0 ** (torch.arange(head_dim // 4) / (head_dim // 4))
    if name == "DINOv3ConvNextModel":
        found |= {f"norms.3.{leaf}": found[f"norm.{leaf}"] for leaf in ("weight", "bias")}
    return found
