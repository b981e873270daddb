"""The architecture behind released weights: from their shapes, or from the config.json beside them."""

import re
from collections.abc import Mapping
from typing import Any

import timm
import torch
from torch import Tensor, nn

from errors import UserError
from models.features import check_choice
from models.layers import make_ffn
from models.vit import PRESETS
from models.weights.dialects import HF_DINOV3_KEY_BIAS, META_ROTARY, Dialect, find_dialect, strip

# timm's names of the models that are built like ours; others stay timm's.
TIMM_VIT = r"vit_\w+_patch\d+(_reg\d)?_(\d+|dinov2|dinov3(_qkvb)?)"
# timm's only way to DINOv3's rotary positions with a norm_eps of 1e-6: another model of theirs with these arguments.
TIMM_ROPE_1E6 = "vit_small_patch16_rope_224"
TIMM_DINOV3 = {
    **{"rope_type": "dinov3", "rope_rotate_half": True, "rope_grid_indexing": "ij"},
    **{"use_rot_pos_emb": True, "use_abs_pos_emb": False, "use_fc_norm": False},
}
# Of these, arguments that shapes (or `from_timm`) tell; a model with others stays timm's.
TIMM_ARGUMENTS = {
    *(
        "patch_size",
        "embed_dim",
        "depth",
        "num_heads",
        "mlp_ratio",
        "init_values",
        "reg_tokens",
        "no_embed_class",
    ),
    *(
        "in_chans",
        "img_size",
        "dynamic_img_size",
        "qkv_bias",
        "num_reg_tokens",
        "rope_temperature",
        "global_pool",
    ),
    *(
        "swiglu_mlp",
        "swiglu_align_to",
        "attn_type",
        "num_classes",
        "drop_path_rate",
        "proj_bias",
        "class_token",
    ),
}


def from_shapes(
    tensors: Mapping[str, Tensor], dialect: Dialect, given: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments of `VisionTransformer` that give these shapes, and those `given`.

    What shapes do not tell is as released unless it is given: head dimension 64 (128 at width 4096) if no rotary periods tell
    it, a square grid of learned positions, the dialect's interpolation and norm_eps.

    Raises:
        UserError: if the tensors that tell are missing, or the shapes are no such model's.
    """

    def shape(*names: str) -> torch.Size:
        for name in names:
            for found in dialect.find(name, tensors).values():
                return tensors[found].shape
        raise UserError(f"neither of {', '.join(names)} is among the weights ({dialect.name})")

    def holds(name: str) -> bool:
        return bool(dialect.find(name, tensors))

    dim, channels, patch_size, _ = shape("patch_embed.weight")
    options: dict[str, Any] = {"embed_dim": dim, "in_channels": channels, "patch_size": patch_size}
    options["depth"] = count_blocks(tensors, dialect)
    gated = holds("blocks.#.mlp.w3.weight")
    hidden = shape("blocks.#.mlp.w3.weight", "blocks.#.mlp.fc2.weight")[1]
    options |= ffn_options(dim, hidden, gated)
    options["registers"] = shape("register_tokens")[1] if holds("register_tokens") else 0
    options["layerscale"] = 1e-5 if holds("blocks.#.ls1.gamma") else None
    for option, stem in (
        ("qkv_bias", "attn.qkv"),
        ("proj_bias", "attn.proj"),
        ("ffn_bias", "mlp.w3" if gated else "mlp.fc2"),
    ):
        options[option] = holds(f"blocks.#.{stem}.bias")
    # timm leaves the bias of the keys out, which is what the mask does.
    options["mask_k_bias"] = options["qkv_bias"] and (
        holds("blocks.#.attn.qkv.bias_mask") or _lacks_key_bias(dialect)
    )
    options["untie_cls_norm"] = holds("cls_norm.weight")
    options["untie_local_cls_norm"] = holds("local_cls_norm.weight")
    head_dim = 128 if dim == 4096 else 64
    if holds("pos_embed"):
        side = round((shape("pos_embed")[1] - 1) ** 0.5)
        options |= {"positions": "learned", "image_size": side * patch_size}
    else:
        options["positions"] = "rope"
        if holds("rope.periods"):
            head_dim = 4 * shape("rope.periods")[0]
    if dim % head_dim and "num_heads" not in given:
        raise UserError(
            f"the weights are {dim} wide, which is no number of heads of {head_dim}; say how many with ?num_heads="
        )
    norm_eps = META_ROTARY.norm_eps if options["positions"] == "rope" else dialect.norm_eps
    options |= {
        "num_heads": dim // head_dim,
        "interpolation": dialect.interpolation,
        "norm_eps": norm_eps,
    }
    return options | dict(given)


def _lacks_key_bias(dialect: Dialect) -> bool:
    names = dialect.names("blocks.0.attn.qkv.bias")
    return names is not None and "" in names


def count_blocks(tensors: Mapping[str, Tensor], dialect: Dialect) -> int:
    """By the highest number, so that a missing block shows as missing."""
    probe = dialect.names("blocks.0.norm1.weight")[0]
    before = probe.partition(".0.")[0] + "."
    numbers = [
        name.removeprefix(before).split(".")[0] for name in tensors if name.startswith(before)
    ]
    return 1 + max((int(number) for number in numbers if number.isdigit()), default=0)


def ffn_options(dim: int, hidden: int, gated: bool) -> dict[str, Any]:
    """`ffn` and `ffn_ratio` of a feed-forward net of this hidden width.

    Raises:
        UserError: if there is none.
    """
    sizes = [
        size for size in PRESETS.values() if size["embed_dim"] == dim
    ]  # whose ratios are as published
    known = [(size.get("ffn", "mlp"), size.get("ffn_ratio", 4.0)) for size in sizes]
    found = (
        [("swiglu", 1.5 * hidden / dim)]
        if gated
        else [("mlp", hidden / dim), ("mlp", (hidden + 0.5) / dim)]
    )
    for ffn, ratio in known + found:  # a ratio may round down to one unit less
        with torch.device("meta"):
            if (ffn != "mlp") == gated and hidden_width(make_ffn(ffn, dim, ratio)) == hidden:
                return {"ffn": ffn, "ffn_ratio": ratio}
    raise UserError(f"the feed-forward nets are {hidden} wide; gated ones must be a multiple of 8")


def hidden_width(ffn: nn.Module) -> int:
    return (ffn.fc2 if hasattr(ffn, "fc2") else ffn.w3).in_features


# ----------------------------------------------------------------- Hugging Face


def from_hugging_face(config: Mapping[str, Any], dialect: Dialect) -> dict[str, Any]:
    """Arguments of `VisionTransformer` by the config.json of ViTModel, Dinov2Model, Dinov2WithRegistersModel, DINOv3ViTModel.

    Raises:
        UserError: if a field is missing, or asks for what our model does not do.
    """
    kind = config["model_type"]
    gated = bool(config.get("use_gated_mlp", config.get("use_swiglu_ffn", False)))
    activation = config.get("hidden_act", "gelu")
    check_choice("hidden_act", activation, ("silu", "gelu") if gated else ("gelu",))
    try:
        dim = config["hidden_size"]
        options = {
            "embed_dim": dim,
            "depth": config["num_hidden_layers"],
            "num_heads": config["num_attention_heads"],
            "patch_size": _side(config["patch_size"]),
            "image_size": config.get("image_size", 224),
            "in_channels": config.get("num_channels", 3),
            "norm_eps": config.get("layer_norm_eps", dialect.norm_eps),
            "layerscale": None if kind == "vit" else config.get("layerscale_value", 1.0),
            "drop_path": config.get("drop_path_rate", 0.0),
            "registers": config.get("num_register_tokens", 0),
            "interpolation": dialect.interpolation,
        }
        hidden = (
            config["intermediate_size"]
            if "intermediate_size" in config
            else _dinov2_width(config, gated)
        )
    except KeyError as error:
        raise UserError(f"config.json of a {kind} model has no {error}") from error
    options |= ffn_options(dim, hidden, gated)
    if kind != "dinov3_vit":
        return options | {"positions": "learned", "qkv_bias": config.get("qkv_bias", True)}
    if config.get("query_bias", True) != config.get("value_bias", True):
        raise UserError(
            "config.json gives only one of queries and values a bias, which no model of ours has"
        )
    bias = config.get("query_bias", True)
    return options | {
        "positions": "rope",
        "qkv_bias": bias,
        "mask_k_bias": bias and dialect is not HF_DINOV3_KEY_BIAS,
        "proj_bias": config.get("proj_bias", True),
        "ffn_bias": config.get("mlp_bias", True),
        "rope_base": float(config.get("rope_theta", 100.0)),
        "rope_shift": config.get("pos_embed_shift"),
        "rope_jitter": config.get("pos_embed_jitter"),
        "rope_rescale": config.get("pos_embed_rescale", 2.0),
    }


def _dinov2_width(config: Mapping[str, Any], gated: bool) -> int:
    hidden = int(config["hidden_size"] * config.get("mlp_ratio", 4))
    return (int(hidden * 2 / 3) + 7) // 8 * 8 if gated else hidden


def _side(size: Any) -> int:
    return size if isinstance(size, int) else size[0]


# ----------------------------------------------------------------- timm


def like_ours(name: str, arguments: Mapping[str, Any]) -> bool:
    """Whether timm builds what our `VisionTransformer` is with some arguments."""
    odd = {
        key
        for key, value in arguments.items()
        if key not in TIMM_ARGUMENTS and TIMM_DINOV3.get(key) != value
    }
    known = (
        re.fullmatch(TIMM_VIT, name)
        or name == TIMM_ROPE_1E6
        and TIMM_DINOV3.items() <= arguments.items()
    )
    return bool(known) and not odd


def from_timm(name: str, arguments: Mapping[str, Any]) -> tuple[dict[str, Any], Dialect]:
    """Arguments of `VisionTransformer` for one of timm's models as timm itself builds it, and the dialect of its names.

    Raises:
        UserError: if timm does not know the name or the arguments.
    """
    try:
        with torch.device("meta"):
            model = timm.create_model(name, **{**arguments, "num_classes": 0})
    except (RuntimeError, TypeError) as error:
        raise UserError(f"timm:{name} could not be built: {error}") from error
    tensors, _ = strip(model.state_dict())
    dialect = find_dialect(tensors, from_timm=True)
    if "reg_token" in tensors and "pos_embed" in tensors:  # no position for the CLS token
        tensors["pos_embed"] = torch.empty(1, 1 + tensors["pos_embed"].shape[1], 1, device="meta")
    given = {
        "image_size": list(model.patch_embed.img_size),
        "num_heads": model.blocks[0].attn.num_heads,
    }
    given["norm_eps"] = model.norm.eps
    if getattr(model, "rope", None) is not None:
        given["rope_base"] = float(model.rope.temperature)
    return from_shapes(tensors, dialect, given), dialect
