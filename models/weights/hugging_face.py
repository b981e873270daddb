"""Hugging Face's folders, in and out: tensors, config.json and preprocessor_config.json."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from errors import UserError
from models.checks import check_choice
from models.features import Preprocessing
from models.timm_backbone import TimmBackbone
from models.vit import VisionTransformer
from models.weights import shapes
from models.weights.dialect import Dialect, has_name
from models.weights.write import Converted, complete, convnext_sizes, list_losses, rename, require

# ----------------------------------------------------------------- names of tensors

_LAYER = "encoder.layer.#"
_QKV = [f"{_LAYER}.attention.attention.{part}" for part in ("query", "key", "value")]
_LEARNED = {
    "cls_token": "embeddings.cls_token",
    "mask_token": "embeddings.mask_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed": "embeddings.patch_embeddings.projection",
    "blocks.#.attn.qkv": tuple(_QKV),
    "blocks.#.attn.qkv.bias_mask": (),
    "blocks.#.attn.proj": f"{_LAYER}.attention.output.dense",
    "norm": "layernorm",
}
VIT = Dialect(
    "Hugging Face ViTModel",
    {
        **_LEARNED,
        "blocks.#.norm1": f"{_LAYER}.layernorm_before",
        "blocks.#.norm2": f"{_LAYER}.layernorm_after",
        "blocks.#.mlp.fc1": f"{_LAYER}.intermediate.dense",
        "blocks.#.mlp.fc2": f"{_LAYER}.output.dense",
    },
    interpolation="size",
)
_DINOV2_PARTS = ("norm1", "norm2", "mlp.fc1", "mlp.fc2")
DINOV2 = Dialect(
    "Hugging Face Dinov2Model",
    {
        **_LEARNED,
        "register_tokens": "embeddings.register_tokens",
        **{f"blocks.#.{part}": f"{_LAYER}.{part}" for part in _DINOV2_PARTS},
        "blocks.#.mlp.w12": f"{_LAYER}.mlp.weights_in",
        "blocks.#.mlp.w3": f"{_LAYER}.mlp.weights_out",
        "blocks.#.ls1.gamma": f"{_LAYER}.layer_scale1.lambda1",
        "blocks.#.ls2.gamma": f"{_LAYER}.layer_scale2.lambda1",
    },
    interpolation="size",
)
REGISTERS = Dialect(
    "Hugging Face Dinov2WithRegistersModel", DINOV2.table, interpolation="antialias"
)
_Q, _K, _V = (f"layer.#.attention.{part}_proj" for part in "qkv")
DINOV3_KEY_BIAS = Dialect(
    "Hugging Face DINOv3ViTModel with key bias",
    {
        "cls_token": "embeddings.cls_token",
        "mask_token": "embeddings.mask_token",
        "register_tokens": "embeddings.register_tokens",
        "patch_embed": "embeddings.patch_embeddings",
        "blocks.#.attn.qkv": (_Q, _K, _V),
        "blocks.#.attn.qkv.bias_mask": (),
        "blocks.#.attn.proj": "layer.#.attention.o_proj",
        "blocks.#.mlp.fc1": "layer.#.mlp.up_proj",
        "blocks.#.mlp.fc2": "layer.#.mlp.down_proj",
        "blocks.#.mlp.w12": ("layer.#.mlp.gate_proj", "layer.#.mlp.up_proj"),
        "blocks.#.mlp.w3": "layer.#.mlp.down_proj",
        "blocks.#.ls1.gamma": "layer.#.layer_scale1.lambda1",
        "blocks.#.ls2.gamma": "layer.#.layer_scale2.lambda1",
        "blocks.#.norm1": "layer.#.norm1",
        "blocks.#.norm2": "layer.#.norm2",
        "norm": "norm",
    },
    norm_eps=shapes.ROTARY_NORM_EPS,
)
DINOV3 = Dialect(
    "Hugging Face DINOv3ViTModel",
    {**DINOV3_KEY_BIAS.table, "blocks.#.attn.qkv.bias": (f"{_Q}.bias", "", f"{_V}.bias")},
    norm_eps=shapes.ROTARY_NORM_EPS,
)
_OWN_STAGE, _STAGE = "model.stages.#.blocks.#", "stages.#.layers.#"
CONVNEXT = Dialect(
    "Hugging Face DINOv3ConvNextModel",
    {
        "model.stem.#": "stages.0.downsample_layers.#",
        "model.stages.#.downsample.#": "stages.#.downsample_layers.#",
        _OWN_STAGE: _STAGE,  # gamma
        f"{_OWN_STAGE}.conv_dw": f"{_STAGE}.depthwise_conv",
        f"{_OWN_STAGE}.norm": f"{_STAGE}.layer_norm",
        f"{_OWN_STAGE}.mlp.fc1": f"{_STAGE}.pointwise_conv1",
        f"{_OWN_STAGE}.mlp.fc2": f"{_STAGE}.pointwise_conv2",
        "model.head.norm": "layer_norm",
    },
)
DIALECTS = {
    "vit": VIT,
    "dinov2": DINOV2,
    "dinov2_with_registers": REGISTERS,
    "dinov3_vit": DINOV3,
    "dinov3_convnext": CONVNEXT,
}  # by the model_type of config.json


def dialect_of(config: Mapping[str, Any]) -> Dialect:
    kind = config["model_type"]
    if kind == "dinov3_vit" and config.get("key_bias", False):
        return DINOV3_KEY_BIAS
    return DIALECTS[kind]


def find_dialect(tensors: Mapping[str, Any]) -> Dialect | None:
    """The dialect of these names; None if they are not Hugging Face's."""
    if has_name(tensors, r"^layer\.\d|^embeddings\.patch_embeddings\.(weight|bias)$"):
        key_bias = has_name(tensors, r"attention\.k_proj\.bias$")
        return DINOV3_KEY_BIAS if key_bias else DINOV3
    if has_name(tensors, r"^encoder\.layer\.\d+\.(layernorm_before|intermediate)\."):
        return VIT
    if has_name(tensors, r"^encoder\.layer\.\d"):
        return REGISTERS if "embeddings.register_tokens" in tensors else DINOV2
    return CONVNEXT if has_name(tensors, r"^stages\.\d+\.layers\.\d") else None


# ----------------------------------------------------------------- config.json

# Our option -> the field of config.json.
FIELDS = {
    "embed_dim": "hidden_size",
    "depth": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "patch_size": "patch_size",
    "in_channels": "num_channels",
    "norm_eps": "layer_norm_eps",
}
REQUIRED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size")
MORE_FIELDS = {"drop_path": "drop_path_rate", "registers": "num_register_tokens"}
ROTARY_FIELDS = {
    "proj_bias": "proj_bias",
    "ffn_bias": "mlp_bias",
    "rope_base": "rope_theta",
    "rope_shift": "pos_embed_shift",
    "rope_jitter": "pos_embed_jitter",
    "rope_rescale": "pos_embed_rescale",
}


def read_options(config: Mapping[str, Any], dialect: Dialect) -> dict[str, Any]:
    """Arguments of `VisionTransformer` for the ViT of this config.json.

    Raises UserError if a field is missing, or asks for what our model does not do.
    """
    kind = config["model_type"]
    gated = bool(config.get("use_gated_mlp", config.get("use_swiglu_ffn", False)))
    activation = config.get("hidden_act", "gelu")
    check_choice("hidden_act", activation, ("silu", "gelu") if gated else ("gelu",))
    for field in REQUIRED:
        if field not in config:
            raise UserError(f"config.json of a {kind} model has no {field!r}")
    options = {
        "image_size": config.get("image_size", 224),
        "norm_eps": dialect.norm_eps,
        "interpolation": dialect.interpolation,
        "layerscale": None if kind == "vit" else config.get("layerscale_value", 1.0),
        **_from_fields(config, FIELDS | MORE_FIELDS),
    }
    if not isinstance(options["patch_size"], int):
        options["patch_size"] = options["patch_size"][0]
    if "intermediate_size" in config:
        hidden = config["intermediate_size"]
    else:
        hidden = _dinov2_width(config["hidden_size"], config.get("mlp_ratio", 4), gated)
    options |= shapes.ffn_options(config["hidden_size"], hidden, gated)
    if kind != "dinov3_vit":
        return options | {"positions": "learned", "qkv_bias": config.get("qkv_bias", True)}
    bias = config.get("query_bias", True)
    if bias != config.get("value_bias", True):
        raise UserError(
            "config.json gives only one of queries and values a bias, which no model of ours has"
        )
    options |= {"positions": "rope", "qkv_bias": bias, "rope_rescale": 2.0}
    options |= _from_fields(config, ROTARY_FIELDS)
    options["mask_k_bias"] = bias and dialect is not DINOV3_KEY_BIAS
    options["rope_base"] = float(options.get("rope_base", 100.0))
    return options


def _from_fields(config: Mapping[str, Any], fields: Mapping[str, str]) -> dict[str, Any]:
    return {own: config[theirs] for own, theirs in fields.items() if theirs in config}


def _to_fields(options: Mapping[str, Any], fields: Mapping[str, str]) -> dict[str, Any]:
    return {theirs: options[own] for own, theirs in fields.items()}


def _dinov2_width(dim: int, ratio: float, gated: bool) -> int:
    """The hidden width that Dinov2Model computes from its mlp_ratio."""
    hidden = int(dim * ratio)
    return (int(hidden * 2 / 3) + 7) // 8 * 8 if gated else hidden


def read_convnext(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of `TimmBackbone`, by the shapes where config.json does not tell them.

    Raises UserError if the model does what timm's does not, or a tensor that is needed is missing.
    """
    if "hidden_sizes" not in config:
        return shapes.convnext_options(tensors, CONVNEXT)
    if config.get("layer_norm_eps", 1e-6) != 1e-6 or config.get("hidden_act", "gelu") != "gelu":
        raise UserError(
            "config.json asks for layer_norm_eps or hidden_act other than 1e-6 and gelu, which "
            "ConvNeXt has"
        )
    size = shapes.convnext_size(config.get("depths", (3, 3, 9, 3)), config["hidden_sizes"])
    return {**size, "in_channels": config.get("num_channels", 3)}


# ----------------------------------------------------------------- export


def convert(backbone: nn.Module, preprocessing: Preprocessing) -> Converted:
    """Tensors and config.json for transformers' AutoModel.

    Raises UserError if transformers has no such model.
    """
    if isinstance(backbone, TimmBackbone):
        tensors, config, notes = _convert_convnext(backbone, preprocessing)
    else:
        require(backbone.config, "Hugging Face", untie_cls_norm=False)
        rotary = backbone.config["positions"] == "rope"
        converted = _convert_rotary(backbone) if rotary else _convert_learned(backbone)
        tensors, config, notes = converted
    stored = next(backbone.parameters()).dtype
    return tensors, {**config, "torch_dtype": str(stored).removeprefix("torch.")}, notes


def _convert_learned(backbone: VisionTransformer) -> Converted:
    options = backbone.config
    height, width = backbone.native_grid
    if height != width:
        raise UserError(
            f"positions of a {height} x {width} grid have no counterpart in Hugging Face, which "
            "needs a square"
        )
    registers, scale = options["registers"], options["layerscale"]
    hidden, gated = shapes.hidden_width(backbone.blocks[0].mlp), options["ffn"] != "mlp"
    biases = {"proj_bias": True, "ffn_bias": True}
    config = {
        **_to_fields(options, FIELDS),
        "image_size": height * options["patch_size"],
        "hidden_act": "gelu",
        "qkv_bias": options["qkv_bias"],
    }
    if not gated and not registers and scale is None:
        dialect, kind, name = VIT, "vit", "ViTModel"
        state, notes = complete(backbone, **biases)
        if state.pop("mask_token", None) is not None:
            notes.append("not held: mask_token")
        config["intermediate_size"] = hidden
    else:
        scale = 1.0 if scale is None else scale
        config["mlp_ratio"] = _dinov2_ratio(options["embed_dim"], hidden, gated)
        config["use_swiglu_ffn"] = gated
        config["layerscale_value"] = scale
        config["drop_path_rate"] = options["drop_path"]
        if registers:
            dialect, kind, name = REGISTERS, "dinov2_with_registers", "Dinov2WithRegistersModel"
            state, notes = complete(backbone, **biases, layerscale=scale, mask_token=True)
            config["num_register_tokens"] = registers
        else:
            dialect, kind, name = DINOV2, "dinov2", "Dinov2Model"
            state, notes = complete(backbone, **biases, layerscale=scale)
            config["use_mask_token"] = "mask_token" in state
    tensors, dropped = rename(state, dialect)
    notes += list_losses(backbone, dropped, dialect.interpolation)
    return tensors, {"architectures": [name], "model_type": kind, **config}, notes


def _dinov2_ratio(dim: int, hidden: int, gated: bool) -> int:
    """The whole `mlp_ratio` from which transformers computes this hidden width."""
    for ratio in range(1, 2 * hidden // dim + 3):
        if _dinov2_width(dim, ratio, gated) == hidden:
            return ratio
    raise UserError(
        f"feed-forward nets {hidden} wide have no counterpart in Dinov2Model, whose mlp_ratio is "
        "a whole number"
    )


def _convert_rotary(backbone: VisionTransformer) -> Converted:
    options = backbone.config
    require(options, "Hugging Face", rope_normalize="separate")
    scale = 1.0 if options["layerscale"] is None else options["layerscale"]
    state, notes = complete(backbone, layerscale=scale, mask_token=True)
    key_bias = options["qkv_bias"] and not options["mask_k_bias"]
    tensors, dropped = rename(state, DINOV3_KEY_BIAS if key_bias else DINOV3)
    tensors["embeddings.mask_token"] = tensors["embeddings.mask_token"][None]
    tensors.setdefault("embeddings.register_tokens", torch.empty(1, 0, options["embed_dim"]))
    gated = options["ffn"] != "mlp"
    config = {
        "architectures": ["DINOv3ViTModel"],
        "model_type": "dinov3_vit",
        **_to_fields(options, FIELDS | MORE_FIELDS | ROTARY_FIELDS),
        "intermediate_size": shapes.hidden_width(backbone.blocks[0].mlp),
        "hidden_act": "silu" if gated else "gelu",
        "use_gated_mlp": gated,
        "image_size": max(options["image_size"]),
        "query_bias": options["qkv_bias"],
        "key_bias": key_bias,
        "value_bias": options["qkv_bias"],
        "layerscale_value": scale,
    }
    return tensors, config, notes + list_losses(backbone, dropped, None)


def _convert_convnext(backbone: TimmBackbone, preprocessing: Preprocessing) -> Converted:
    depths, dims = convnext_sizes(backbone)
    tensors, _ = rename(backbone.state_dict(), CONVNEXT)
    config = {
        "architectures": ["DINOv3ConvNextModel"],
        "model_type": "dinov3_convnext",
        "depths": depths,
        "hidden_sizes": dims,
        "num_channels": backbone.in_channels,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "image_size": max(preprocessing.size),
    }
    return tensors, config, []


# ----------------------------------------------------------------- preprocessor_config.json
