"""timm's folders: names of tensors, config.json with its preprocessing, in and out."""

import re
from collections.abc import Mapping
from typing import Any

import timm
import torch
from torch import Tensor, nn

from errors import UserError
from models.features import Preprocessing, read_interpolation
from models.timm_backbone import TimmBackbone
from models.weights.dialect import Dialect, has_name, replace_mlp
from models.weights.meta import IMAGENET_MEAN, IMAGENET_STD, SCALES, SHARED
from models.weights.shapes import CONVNEXT_SIZES, ROTARY_NORM_EPS, hidden_width, vit_options
from models.weights.write import Converted, complete, list_losses, rename, require

# ----------------------------------------------------------------- names of tensors

_VIT = {
    **SHARED,
    "register_tokens": "reg_token",
    "pos_embed": "pos_embed",
    "blocks.#.attn.qkv.bias_mask": (),
}
LEARNED = Dialect("timm vit", {**_VIT, **SCALES}, interpolation="antialias")
_PACKED_GATE = {"blocks.#.mlp.w12": "blocks.#.mlp.fc1", "blocks.#.mlp.w3": "blocks.#.mlp.fc2"}
GATED = Dialect(
    "timm vit, gated", replace_mlp(LEARNED.table, _PACKED_GATE), interpolation="antialias"
)
_EVA = {
    **_VIT,
    "blocks.#.ls1.gamma": "blocks.#.gamma_1",
    "blocks.#.ls2.gamma": "blocks.#.gamma_2",
}
_NO_KEY_BIAS = {"blocks.#.attn.qkv.bias": ("blocks.#.attn.q_bias", "", "blocks.#.attn.v_bias")}
_EVA_GATE = {
    "blocks.#.mlp.w12": ("blocks.#.mlp.fc1_g", "blocks.#.mlp.fc1_x"),
    "blocks.#.mlp.w3": "blocks.#.mlp.fc2",
}
_STAGE = "model.stages.#.blocks.#"
_OWN_CONVNEXT = ["model.stem.#", "model.stages.#.downsample.#", "model.head.norm", _STAGE]
_OWN_CONVNEXT += [f"{_STAGE}.{part}" for part in ("conv_dw", "norm", "mlp.fc1", "mlp.fc2")]
CONVNEXT = Dialect("timm convnext", {name: name.removeprefix("model.") for name in _OWN_CONVNEXT})


def rotary_dialect(gated: bool, key_bias: bool) -> Dialect:
    """timm's DINOv3; with a bias of the keys it is the `attn_type` "rope" of timm."""
    name = "timm eva" + ", gated" * gated + " with key bias" * key_bias
    table = _EVA if key_bias else {**_EVA, **_NO_KEY_BIAS}
    if gated:
        table = replace_mlp(table, _EVA_GATE)
    return Dialect(name, table, norm_eps=ROTARY_NORM_EPS)


def find_dialect(tensors: Mapping[str, Any]) -> Dialect | None:
    """The dialect of these names; None if they are not timm's. Meta's come first, see there."""
    if has_name(tensors, r"^stages\.\d+\.blocks\.\d+\.conv_dw\."):
        return CONVNEXT
    if not has_name(tensors, r"^blocks\.\d+\.attn\.qkv\."):
        return None
    if "pos_embed" not in tensors:
        gated, key_bias = r"\.mlp\.fc1_g\.", r"\.attn\.qkv\.bias$"
        return rotary_dialect(has_name(tensors, gated), has_name(tensors, key_bias))
    up, down = (tensors.get(f"blocks.0.mlp.{name}.weight") for name in ("fc1", "fc2"))
    gated = up is not None and down is not None and len(up) == 2 * down.shape[1]
    return GATED if gated else LEARNED


# ----------------------------------------------------------------- architecture

# timm's names of models that are built like ours; the others stay timm's.
VIT_NAMES = r"vit_\w+_patch\d+(_reg\d)?_(\d+|dinov2|dinov3(_qkvb)?)"
# timm has DINOv3's rotary positions with a norm_eps of 1e-6 only in another model of theirs, with
# these arguments.
ROTARY_1E6 = "vit_small_patch16_rope_224"
ROTARY_1E6_ARGUMENTS = {
    "rope_type": "dinov3",
    "rope_rotate_half": True,
    "rope_grid_indexing": "ij",
    "use_rot_pos_emb": True,
    "use_abs_pos_emb": False,
    "use_fc_norm": False,
}
# What shapes or `read_options` tell; a model with other arguments stays timm's.
UNDERSTOOD = {
    *("attn_type", "class_token", "depth", "drop_path_rate", "dynamic_img_size", "embed_dim"),
    *("global_pool", "img_size", "in_chans", "init_values", "mlp_ratio", "no_embed_class"),
    *("num_classes", "num_heads", "num_reg_tokens", "patch_size", "proj_bias", "qkv_bias"),
    *("reg_tokens", "rope_temperature", "swiglu_align_to", "swiglu_mlp"),
}


def is_like_ours(name: str, arguments: Mapping[str, Any]) -> bool:
    """Whether a model of ours, or a plain ConvNeXt, computes what timm's does."""
    if name in CONVNEXT_SIZES:
        return arguments.keys() <= {"depths", "dims", "in_chans"}
    for key, value in arguments.items():
        if key not in UNDERSTOOD and ROTARY_1E6_ARGUMENTS.get(key) != value:
            return False
    if name == ROTARY_1E6:
        return ROTARY_1E6_ARGUMENTS.items() <= arguments.items()
    return re.fullmatch(VIT_NAMES, name) is not None


def read_options(name: str, arguments: Mapping[str, Any]) -> tuple[dict[str, Any], Dialect]:
    """Arguments of `VisionTransformer` for the model that timm builds, and its dialect.

    Raises UserError if timm does not know the name or the arguments.
    """
    try:
        with torch.device("meta"):
            model = timm.create_model(name, **{**arguments, "num_classes": 0})
    except (RuntimeError, TypeError) as error:
        raise UserError(f"timm:{name} could not be built: {error}") from error
    tensors = add_cls_position(model.state_dict())
    dialect = find_dialect(tensors)
    given = {
        "image_size": list(model.patch_embed.img_size),
        "num_heads": model.blocks[0].attn.num_heads,
        "norm_eps": model.norm.eps,
    }
    if getattr(model, "rope", None) is not None:
        given["rope_base"] = float(model.rope.temperature)
    return vit_options(tensors, dialect, given), dialect


def add_cls_position(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """With a position of zeros for the CLS token, where timm's models with registers have none."""
    if "reg_token" not in tensors or "pos_embed" not in tensors:
        return tensors
    positions = tensors["pos_embed"]
    with_cls = torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)
    return {**tensors, "pos_embed": with_cls}


# ----------------------------------------------------------------- export


def convert(backbone: nn.Module, preprocessing: Preprocessing) -> Converted:
    """Tensors and config.json for `timm.create_model("local-dir:FOLDER", pretrained=True)`.

    Raises UserError if timm has no such model.
    """
    if isinstance(backbone, TimmBackbone):
        return _convert_timm(backbone, preprocessing)
    options = backbone.config
    rotary, gated = options["positions"] == "rope", options["ffn"] != "mlp"
    norm_eps = (ROTARY_NORM_EPS, 1e-6) if rotary else 1e-6
    require(options, "timm", untie_cls_norm=False, norm_eps=norm_eps)
    if rotary:
        require(options, "timm", rope_normalize="separate")
    # timm's rotary and gated models always have a LayerScale.
    scaled = rotary or gated or options["layerscale"] is not None
    scale = {"layerscale": options["layerscale"] or 1.0} if scaled else {}
    state, notes = complete(backbone, proj_bias=True, ffn_bias=True, **scale)
    dim, hidden = options["embed_dim"], hidden_width(backbone.blocks[0].mlp)
    arguments = {
        "img_size": list(options["image_size"]),
        "patch_size": options["patch_size"],
        "in_chans": options["in_channels"],
        "embed_dim": dim,
        "depth": options["depth"],
        "num_heads": options["num_heads"],
        "qkv_bias": options["qkv_bias"],
        **({"init_values": scale["layerscale"]} if scaled else {}),
        "mlp_ratio": _mlp_ratio(dim, 2 * hidden if gated and not rotary else hidden),
        "dynamic_img_size": True,
    }
    size = {384: "small", 768: "base", 1024: "large"}.get(dim, "small")
    if rotary:
        name, more, dialect = _describe_rotary(options, size)
    else:
        name, more, dialect = _describe_learned(options, size)
        if options["registers"]:
            state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
            state["pos_embed"] = state["pos_embed"][:, 1:]
            notes.append("the position of the CLS token is added to that token")
    tensors, dropped = rename(state, dialect)
    notes += list_losses(backbone, dropped, dialect.interpolation)
    return tensors, _config(name, arguments | more, dim, preprocessing), notes


def _describe_rotary(options: dict[str, Any], size: str) -> tuple[str, dict[str, Any], Dialect]:
    """timm's name, the arguments that only this kind has, and the dialect."""
    gated = options["ffn"] != "mlp"
    key_bias = options["qkv_bias"] and not options["mask_k_bias"]
    arguments = {
        "rope_temperature": options["rope_base"],
        "num_reg_tokens": options["registers"],
        "global_pool": "token",
        "swiglu_mlp": gated,
        "swiglu_align_to": 8,  # with 0, timm packs the gate into one matrix
        "attn_type": "rope" if key_bias else "eva",
    }
    dialect = rotary_dialect(gated, key_bias)
    if options["norm_eps"] == 1e-6:
        return ROTARY_1E6, ROTARY_1E6_ARGUMENTS | arguments, dialect
    suffix = "_qkvb" if options["qkv_bias"] else ""
    return f"vit_{size}_patch16_dinov3{suffix}", arguments, dialect


def _describe_learned(options: dict[str, Any], size: str) -> tuple[str, dict[str, Any], Dialect]:
    registers = options["registers"]
    arguments = {"reg_tokens": registers, "no_embed_class": True} if registers else {}
    family = "patch14_reg4_dinov2" if registers else "patch14_dinov2"
    if options["ffn"] != "mlp":
        return f"vit_giant_{family}", arguments, GATED
    if options["layerscale"] is None:
        family = "patch16_224"
    return f"vit_{size}_{family}", arguments, LEARNED


def _mlp_ratio(dim: int, hidden: int) -> float:
    """A ratio r with int(dim · r) = hidden."""
    ratio = hidden / dim
    return ratio if int(dim * ratio) == hidden else (hidden + 0.5) / dim


def _convert_timm(backbone: TimmBackbone, preprocessing: Preprocessing) -> Converted:
    arguments = dict(backbone.config)
    name = arguments.pop("name").partition(".")[0]
    arguments["in_chans"] = arguments.pop("in_channels")
    config = _config(name, arguments, backbone.embed_dim, preprocessing)
    known = getattr(backbone.model, "pretrained_cfg", {})
    for key in ("first_conv", "classifier", "pool_size", "fixed_input_size"):
        if key in known:
            config["pretrained_cfg"][key] = known[key]
    state = backbone.state_dict()
    return {own.removeprefix("model."): tensor for own, tensor in state.items()}, config, []


def _config(
    name: str, arguments: dict[str, Any], features: int, preprocessing: Preprocessing
) -> dict[str, Any]:
    convnext = name in CONVNEXT_SIZES
    return {
        "architecture": name,
        "num_classes": 0,
        "num_features": features,
        "model_args": arguments,
        "pretrained_cfg": {
            **write_preprocessing(preprocessing),
            "num_classes": 0,
            "pool_size": None,
            "fixed_input_size": not convnext,
            "first_conv": "stem.0" if convnext else "patch_embed.proj",
            "classifier": "head.fc" if convnext else "head",
        },
    }


# ----------------------------------------------------------------- preprocessing


def read_preprocessing(values: Mapping[str, Any], source: str) -> Preprocessing:
    """From a `pretrained_cfg`.

    Raises UserError if a value is not understood; `source` is the file's name in the message.
    """
    try:
        height, width = values.get("input_size", (3, 224, 224))[-2:]
        # Rounded down, as timm does.
        resize = int(max(height, width) / values.get("crop_pct", 0.875) + 1e-6)
        mean = tuple(map(float, values.get("mean", IMAGENET_MEAN)))
        std = tuple(map(float, values.get("std", IMAGENET_STD)))
        interpolation = read_interpolation(values.get("interpolation", "bicubic"), source)
    except (TypeError, ZeroDivisionError) as error:
        raise UserError(
            f"{source} has a pretrained_cfg that we do not understand: {error}"
        ) from error
    return Preprocessing((height, width), resize, mean, std, interpolation)


def write_preprocessing(preprocessing: Preprocessing) -> dict[str, Any]:
    height, width = preprocessing.size
    return {
        "input_size": [len(preprocessing.mean), height, width],
        "crop_pct": max(height, width) / preprocessing.resize,
        "crop_mode": "center",
        "interpolation": preprocessing.interpolation,
        "mean": list(preprocessing.mean),
        "std": list(preprocessing.std),
    }
