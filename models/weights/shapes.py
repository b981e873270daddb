"""The architecture of released weights, by the shapes of their tensors."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from errors import UserError
from models.layers import make_ffn
from models.vit import PRESETS
from models.weights.dialect import Dialect

ROTARY_NORM_EPS = 1e-5  # of DINOv3's released models
# Depths and widths of timm's ConvNeXts, whose names DINOv3 took over.
CONVNEXT_SIZES = {
    "convnext_tiny": ((3, 3, 9, 3), (96, 192, 384, 768)),
    "convnext_small": ((3, 3, 27, 3), (96, 192, 384, 768)),
    "convnext_base": ((3, 3, 27, 3), (128, 256, 512, 1024)),
    "convnext_large": ((3, 3, 27, 3), (192, 384, 768, 1536)),
}


def vit_options(
    tensors: Mapping[str, Tensor], dialect: Dialect, given: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments of `VisionTransformer` that give these shapes, and those `given`.

    What shapes do not tell is as released: the head dimension where no rotary periods tell it,
    a square grid of learned positions, the dialect's interpolation and norm_eps.

    Raises UserError if a tensor that is needed is missing, or no model of ours has these shapes.
    """

    def shape(*names: str) -> torch.Size:
        for name in names:
            for found in dialect.find(name, tensors).values():
                return tensors[found].shape
        raise UserError(f"neither of {', '.join(names)} is among the weights ({dialect.name})")

    def holds(name: str) -> bool:
        return bool(dialect.find(name, tensors))

    dim, channels, patch_size, _ = shape("patch_embed.weight")
    gated = holds("blocks.#.mlp.w3.weight")
    hidden = shape("blocks.#.mlp.w3.weight", "blocks.#.mlp.fc2.weight")[1]
    options: dict[str, Any] = {
        "embed_dim": dim,
        "depth": count_blocks(tensors, dialect),
        "in_channels": channels,
        "patch_size": patch_size,
        **ffn_options(dim, hidden, gated),
        "registers": shape("register_tokens")[1] if holds("register_tokens") else 0,
        "layerscale": 1e-5 if holds("blocks.#.ls1.gamma") else None,
        "qkv_bias": holds("blocks.#.attn.qkv.bias"),
        "proj_bias": holds("blocks.#.attn.proj.bias"),
        "ffn_bias": holds(f"blocks.#.mlp.{'w3' if gated else 'fc2'}.bias"),
        "untie_cls_norm": holds("cls_norm.weight"),
        "untie_local_cls_norm": holds("local_cls_norm.weight"),
        "interpolation": dialect.interpolation,
    }
    # timm leaves the bias of the keys out; a mask has the same effect.
    lacks_key_bias = "" in (dialect.names("blocks.0.attn.qkv.bias") or ())
    masked = holds("blocks.#.attn.qkv.bias_mask") or lacks_key_bias
    options["mask_k_bias"] = options["qkv_bias"] and masked
    head_dim = released_head_dim(dim)
    if holds("pos_embed"):
        side = round((shape("pos_embed")[1] - 1) ** 0.5)
        options |= {"positions": "learned", "image_size": side * patch_size}
        options["norm_eps"] = dialect.norm_eps
    else:
        options |= {"positions": "rope", "norm_eps": ROTARY_NORM_EPS}
        if holds("rope.periods"):
            head_dim = 4 * shape("rope.periods")[0]
    if dim % head_dim and "num_heads" not in given:
        raise UserError(
            f"the weights are {dim} wide, which is no multiple of {head_dim}, the usual width of "
            "a head; give the number of heads with ?num_heads="
        )
    options["num_heads"] = dim // head_dim
    return options | dict(given)


def released_head_dim(dim: int) -> int:
    """The head dimension of released models that are `dim` wide."""
    return 128 if dim == 4096 else 64


def count_blocks(tensors: Mapping[str, Tensor], dialect: Dialect) -> int:
    """1 + the highest number of a block, so that a block that is missing is reported as such."""
    prefix = dialect.names("blocks.0.norm1.weight")[0].partition(".0.")[0] + "."
    inside = [name for name in tensors if name.startswith(prefix)]
    numbers = [name.removeprefix(prefix).split(".")[0] for name in inside]
    return 1 + max((int(number) for number in numbers if number.isdigit()), default=0)


def ffn_options(dim: int, hidden: int, gated: bool) -> dict[str, Any]:
    """`ffn` and `ffn_ratio` of a feed-forward net of this hidden width.

    Raises UserError if there is none.
    """
    # The presets' ratios are as published, so they come first. A ratio may round down by one.
    sizes = [size for size in PRESETS.values() if size["embed_dim"] == dim]
    known = [(size.get("ffn", "mlp"), size.get("ffn_ratio", 4.0)) for size in sizes]
    plain = [("mlp", hidden / dim), ("mlp", (hidden + 0.5) / dim)]
    computed = [("swiglu", 1.5 * hidden / dim)] if gated else plain
    for ffn, ratio in known + computed:
        with torch.device("meta"):
            width = hidden_width(make_ffn(ffn, dim, ratio))
        if (ffn != "mlp") == gated and width == hidden:
            return {"ffn": ffn, "ffn_ratio": ratio}
    raise UserError(f"the feed-forward nets are {hidden} wide; gated ones must be a multiple of 8")


def hidden_width(ffn: nn.Module) -> int:
    return (ffn.fc2 if hasattr(ffn, "fc2") else ffn.w3).in_features


def convnext_options(tensors: Mapping[str, Tensor], dialect: Dialect) -> dict[str, Any]:
    """Arguments of `TimmBackbone` for the ConvNeXt of these shapes.

    Raises UserError if a tensor that is needed is missing.
    """
    stem = tensors.get(dialect.names("model.stem.0.weight")[0])
    if stem is None:
        raise UserError(f"the first convolution is not among the weights ({dialect.name})")
    depths, dims = [], []
    for stage in range(4):
        scales = dialect.find(f"model.stages.{stage}.blocks.#.gamma", tensors)
        if not scales:
            raise UserError(f"stage {stage} of the ConvNeXt has no `gamma` ({dialect.name})")
        depths.append(1 + max(scales))
        dims.append(len(tensors[scales[max(scales)]]))
    return {**convnext_size(depths, dims), "in_channels": stem.shape[1]}


def convnext_size(depths: list[int], dims: list[int]) -> dict[str, Any]:
    """timm's name of this size, or of another with depths and widths of its own."""
    for name, size in CONVNEXT_SIZES.items():
        if size == (tuple(depths), tuple(dims)):
            return {"name": name}
    return {"name": "convnext_tiny", "depths": list(depths), "dims": list(dims)}
