"""Backbones of ours into the formats of others: Hugging Face, timm, Meta."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from errors import UserError
from models.architecture import TIMM_DINOV3, TIMM_ROPE_1E6, hidden_width
from models.convnext import SIZES
from models.features import Preprocessing
from models.lora import merged_copy
from models.preprocessing import to_hugging_face, to_timm
from models.ssl_model import SSLModel, save_heads
from models.timm_backbone import TimmBackbone
from models.vit import VisionTransformer
from models.weights import dialects
from models.weights.dialects import Dialect
from models.weights.files import write_json, write_tensors
from models.weights.load import save_backbone
from models.weights.read import EXTRA, RECORD, default_tensor, record_dialect

FORMATS = ("own", "hf", "timm", "meta")
META_FILE = "backbone.pth"


def write_backbone(
    backbone: nn.Module, preprocessing: Preprocessing, folder: str | Path, format: str
) -> list[str]:
    """Writes `backbone` into `folder` so that the software of that format opens it; returns what the format cannot hold.

    "hf": config.json, model.safetensors, preprocessor_config.json for transformers' AutoModel and AutoImageProcessor (ViTModel,
    Dinov2Model, Dinov2WithRegistersModel, DINOv3ViTModel or DINOv3ConvNextModel, by the architecture). "timm": config.json and
    model.safetensors for `timm.create_model("local-dir:FOLDER", pretrained=True)`. "meta": backbone.pth with the names of the
    authors' files. "own": what `load_backbone` rebuilds exactly.

    Raises:
        UserError: if the format is unknown, or has no model like this one.
    """
    if format not in FORMATS:
        raise UserError(f"format is {format!r}; it must be one of {', '.join(FORMATS)}")
    folder = Path(folder)
    if format == "own":
        save_backbone(backbone, folder, preprocessing)
        return []
    convert = _converter(backbone, format)
    tensors, config, notes = convert(backbone, preprocessing)
    folder.mkdir(parents=True, exist_ok=True)
    if format == "meta":
        write_tensors(folder / META_FILE, tensors)
        return notes
    write_json(folder / "config.json", config)
    write_tensors(folder / "model.safetensors", tensors)
    if format == "hf":
        write_json(folder / "preprocessor_config.json", to_hugging_face(preprocessing))
    return notes


def save_teacher(backbone: nn.Module, folder: str | Path, preprocessing: Preprocessing) -> None:
    """Writes what transformers' AutoModel opens, if it has such a model, and `load_backbone` rebuilds exactly in any case.

    config.json then says our options too (`nanodino`), and tensors that transformers has no place for (the mask token of a
    ViTModel, the norm for local crops) stand beside the others in extra.safetensors.
    """
    folder = Path(folder)
    try:
        if not isinstance(backbone, VisionTransformer):
            raise UserError("timm's models go by timm's names")
        tensors, config, _ = _vit_to_hf(backbone, preprocessing)
    except ValueError:
        return save_backbone(backbone, folder, preprocessing)
    names = record_dialect(config, ()).names
    extra = {}
    for name, tensor in backbone.state_dict().items():
        default = default_tensor(backbone, name, tensor)
        if not {*(names(name) or (name,))} <= {*tensors, ""} and (
            default is None or not torch.equal(default, tensor.cpu())
        ):
            extra[name] = tensor.detach()
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", {**config, RECORD: backbone.config})
    write_json(folder / "preprocessor_config.json", to_hugging_face(preprocessing))
    write_tensors(folder / "model.safetensors", tensors)
    if extra:
        write_tensors(folder / EXTRA, extra)


def save_model(model: SSLModel, folder: str | Path, preprocessing: Preprocessing) -> None:
    """As `save_teacher`, with adapters in the weights, and the heads beside it."""
    save_teacher(merged_copy(model.backbone), folder, preprocessing)
    save_heads(model, Path(folder))


Converted = tuple[dict[str, Tensor], dict[str, Any], list[str]]


def _converter(backbone: nn.Module, format: str) -> Callable[[nn.Module, Preprocessing], Converted]:
    if isinstance(backbone, VisionTransformer):
        return {"hf": _vit_to_hf, "timm": _vit_to_timm, "meta": _vit_to_meta}[format]
    if isinstance(backbone, TimmBackbone):
        if format == "timm":
            return _timm_to_timm
        if backbone.config["name"].partition(".")[0] in SIZES:
            return {"hf": _convnext_to_hf, "meta": _convnext_to_meta}[format]
        raise UserError(
            f"timm:{backbone.config['name']} has no counterpart in the format {format}; allowed are own and timm"
        )
    raise UserError(f"a {type(backbone).__name__} has no counterpart in the format {format}")


def rename(state: dict[str, Tensor], dialect: Dialect) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors under the dialect's names, and the names of those that it does not hold.

    Raises:
        UserError: if rows that the dialect takes for zeros are none.
    """
    renamed, dropped = {}, []
    for name, tensor in state.items():
        names = dialect.names(name)
        if names is None:
            dropped.append(name)
            continue
        for part, rows in zip(names, tensor.chunk(len(names))):
            if part:
                renamed[part] = rows
            elif rows.any():
                raise UserError(
                    f"{name} has rows other than zeros, which {dialect.name} does not hold"
                )
    return renamed, dropped


def _completed(backbone: VisionTransformer, **options: Any) -> tuple[dict[str, Tensor], list[str]]:
    """The weights with what `options` add, neutral (LayerScale of ones, biases and mask token of zeros), and what was added.

    Biases that a mask keeps from acting are zeros, for formats without the mask.
    """
    with torch.device("meta"):
        larger = VisionTransformer(**{**backbone.config, **options})
    state = {name: tensor.detach() for name, tensor in backbone.state_dict().items()}
    added = [(name, tensor) for name, tensor in larger.state_dict().items() if name not in state]
    for name, tensor in added:
        state[name] = (
            torch.ones(tensor.shape) if name.endswith(".gamma") else torch.zeros(tensor.shape)
        )
    for name in [name for name in state if name.endswith(".bias_mask")]:
        state[name.removesuffix("_mask")] = state[name.removesuffix("_mask")] * state[name]
    kinds = dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name, _ in added)
    return state, [f"added without effect: {', '.join(kinds)}"] if added else []


def _require(options: dict[str, Any], format: str, **allowed: Any) -> None:
    for name, values in allowed.items():
        values = values if isinstance(values, tuple) else (values,)
        if options[name] not in values:
            wanted = " or ".join(map(str, values))
            raise UserError(
                f"{name}={options[name]} has no counterpart in {format}, which needs {wanted}"
            )


def _losses(
    backbone: VisionTransformer, dropped: list[str], interpolation: str | None
) -> list[str]:
    """What the written files do not tell, in words."""
    options, notes = backbone.config, []
    kinds = dict.fromkeys(
        re.sub(r"\.\d+\.", ".*.", name) for name in dropped if not name.endswith(".bias_mask")
    )
    if "rope.periods" in kinds:
        quarter = len(backbone.rope.periods)
        exact = backbone.rope.base ** (torch.arange(quarter) / quarter)
        kinds.pop("rope.periods")  # computed anew
        if not torch.allclose(backbone.rope.periods.cpu().float(), exact, rtol=1e-5, atol=0):
            notes.append(
                "its rotary periods are rounded, there they are computed exactly, so features differ slightly"
            )
    if kinds:
        notes.append(f"not held: {', '.join(kinds)}")
    if (
        options["positions"] == "learned"
        and interpolation
        and options["interpolation"] != interpolation
    ):
        here = options["interpolation"]
        notes.append(
            f"at other sizes than the native one, positions are resized by {interpolation!r} there, here by {here!r}"
        )
    if options["fit"] != "crop":
        notes.append("sides that the patch size does not divide are cropped there, here padded")
    return notes


# ----------------------------------------------------------------- Hugging Face


def _vit_to_hf(backbone: VisionTransformer, preprocessing: Preprocessing) -> Converted:
    options = backbone.config
    _require(options, "Hugging Face", untie_cls_norm=False)
    if options["positions"] == "rope":
        return _dinov3_to_hf(backbone)
    height, width = backbone.native_grid
    if height != width:
        raise UserError(
            f"positions of a {height} x {width} grid have no counterpart in Hugging Face, which needs a square"
        )
    common = {
        "hidden_size": options["embed_dim"],
        "num_hidden_layers": options["depth"],
        "num_attention_heads": options["num_heads"],
        "hidden_act": "gelu",
        "image_size": height * options["patch_size"],
        "patch_size": options["patch_size"],
        "num_channels": options["in_channels"],
        "qkv_bias": options["qkv_bias"],
        "layer_norm_eps": options["norm_eps"],
    }
    hidden, gated = hidden_width(backbone.blocks[0].mlp), options["ffn"] != "mlp"
    plain = not gated and not options["registers"] and options["layerscale"] is None
    if plain:
        state, notes = _completed(backbone, proj_bias=True, ffn_bias=True)
        dialect = dialects.HF_VIT
        state.pop("mask_token", None)
        notes += ["not held: mask_token"] if backbone.mask_token is not None else []
        config = {
            "architectures": ["ViTModel"],
            "model_type": "vit",
            **common,
            "intermediate_size": hidden,
        }
    else:
        fill = {
            "proj_bias": True,
            "ffn_bias": True,
            "layerscale": 1.0 if options["layerscale"] is None else options["layerscale"],
        }
        registers = {"mask_token": True} if options["registers"] else {}
        state, notes = _completed(backbone, **fill, **registers)
        dialect = dialects.HF_REGISTERS if options["registers"] else dialects.HF_DINOV2
        kind = "Dinov2WithRegisters" if options["registers"] else "Dinov2"
        model_type = "dinov2_with_registers" if options["registers"] else "dinov2"
        config = {"architectures": [f"{kind}Model"], "model_type": model_type}
        config |= {
            **common,
            "mlp_ratio": _dinov2_ratio(options["embed_dim"], hidden, gated),
            "use_swiglu_ffn": gated,
        }
        config |= {"layerscale_value": fill["layerscale"], "drop_path_rate": options["drop_path"]}
        config |= (
            {"num_register_tokens": options["registers"]}
            if options["registers"]
            else {"use_mask_token": "mask_token" in state}
        )
    tensors, dropped = rename(state, dialect)
    return (
        tensors,
        {**config, "torch_dtype": "float32"},
        notes + _losses(backbone, dropped, dialect.interpolation),
    )


def _dinov2_ratio(dim: int, hidden: int, gated: bool) -> int:
    """The whole `mlp_ratio` from which transformers computes this hidden width."""
    for ratio in range(1, 1 + 2 * hidden // dim + 2):
        width = (int(dim * ratio * 2 / 3) + 7) // 8 * 8 if gated else dim * ratio
        if width == hidden:
            return ratio
    raise UserError(
        f"feed-forward nets {hidden} wide have no counterpart in Dinov2Model, whose mlp_ratio is a whole number"
    )


def _dinov3_to_hf(backbone: VisionTransformer) -> Converted:
    options = backbone.config
    _require(options, "Hugging Face", rope_normalize="separate")
    fill = {
        "layerscale": 1.0 if options["layerscale"] is None else options["layerscale"],
        "mask_token": True,
    }
    state, notes = _completed(backbone, **fill)
    key_bias = options["qkv_bias"] and not options["mask_k_bias"]
    tensors, dropped = rename(
        state, dialects.HF_DINOV3_KEY_BIAS if key_bias else dialects.HF_DINOV3
    )
    tensors["embeddings.mask_token"] = tensors["embeddings.mask_token"][None]
    tensors.setdefault("embeddings.register_tokens", torch.empty(1, 0, options["embed_dim"]))
    gated = options["ffn"] != "mlp"
    config = {
        "architectures": ["DINOv3ViTModel"],
        "model_type": "dinov3_vit",
        "hidden_size": options["embed_dim"],
        "intermediate_size": hidden_width(backbone.blocks[0].mlp),
        "num_hidden_layers": options["depth"],
        "num_attention_heads": options["num_heads"],
        "hidden_act": "silu" if gated else "gelu",
        "use_gated_mlp": gated,
        "image_size": max(options["image_size"]),
        "patch_size": options["patch_size"],
        "num_channels": options["in_channels"],
        "num_register_tokens": options["registers"],
        "query_bias": options["qkv_bias"],
        "key_bias": key_bias,
        "value_bias": options["qkv_bias"],
        "proj_bias": options["proj_bias"],
        "mlp_bias": options["ffn_bias"],
        "layer_norm_eps": options["norm_eps"],
        "layerscale_value": fill["layerscale"],
        "drop_path_rate": options["drop_path"],
        "rope_theta": options["rope_base"],
        "pos_embed_shift": options["rope_shift"],
        "pos_embed_jitter": options["rope_jitter"],
        "pos_embed_rescale": options["rope_rescale"],
        "torch_dtype": "float32",
    }
    return tensors, config, notes + _losses(backbone, dropped, None)


# ----------------------------------------------------------------- timm


def _vit_to_timm(backbone: VisionTransformer, preprocessing: Preprocessing) -> Converted:
    options = backbone.config
    rotary, gated = options["positions"] == "rope", options["ffn"] != "mlp"
    _require(options, "timm", untie_cls_norm=False, norm_eps=(1e-5, 1e-6) if rotary else 1e-6)
    scaled = (
        rotary or gated or options["layerscale"] is not None
    )  # timm's rotary and gated models always are
    fill = {"layerscale": options["layerscale"] or 1.0} if scaled else {}
    state, notes = _completed(backbone, proj_bias=True, ffn_bias=True, **fill)
    dim, hidden = options["embed_dim"], hidden_width(backbone.blocks[0].mlp)
    arguments = {
        "img_size": list(options["image_size"]),
        "patch_size": options["patch_size"],
        "in_chans": options["in_channels"],
        "embed_dim": dim,
        "depth": options["depth"],
        "num_heads": options["num_heads"],
        "qkv_bias": options["qkv_bias"],
        **({"init_values": fill["layerscale"]} if scaled else {}),
        "mlp_ratio": _ratio(dim, 2 * hidden if gated and not rotary else hidden),
        "dynamic_img_size": True,
    }
    size = {384: "small", 768: "base", 1024: "large"}.get(dim, "small")
    if rotary:
        _require(options, "timm", rope_normalize="separate")
        key_bias = options["qkv_bias"] and not options["mask_k_bias"]
        dialect = dialects.timm_rotary(gated, key_bias)
        name = f"vit_{size}_patch16_dinov3" + ("_qkvb" if options["qkv_bias"] else "")
        if options["norm_eps"] == 1e-6:
            name, arguments = TIMM_ROPE_1E6, arguments | TIMM_DINOV3
        arguments |= {
            "rope_temperature": options["rope_base"],
            "num_reg_tokens": options["registers"],
            "global_pool": "token",
        }
        # timm packs the gate into one matrix if it is aligned to 0.
        arguments |= {
            "swiglu_mlp": gated,
            "swiglu_align_to": 8,
            "attn_type": "rope" if key_bias else "eva",
        }
    else:
        dialect = dialects.TIMM_GATED if gated else dialects.TIMM_LEARNED
        registers = options["registers"]
        if registers:
            arguments |= {"reg_tokens": registers, "no_embed_class": True}
            state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
            state["pos_embed"] = state["pos_embed"][:, 1:]
            notes.append("the position of the CLS token is added to that token")
        family = (
            "patch16_224"
            if not scaled
            else "patch14_reg4_dinov2"
            if registers
            else "patch14_dinov2"
        )
        name = f"vit_{'giant' if gated else size}_{family}"
    tensors, dropped = rename(state, dialect)
    return (
        tensors,
        _timm_config(name, arguments, dim, preprocessing),
        notes + _losses(backbone, dropped, dialect.interpolation),
    )


def _ratio(dim: int, hidden: int) -> float:
    """From which int(dim · ratio) gives the hidden width."""
    return hidden / dim if int(dim * (hidden / dim)) == hidden else (hidden + 0.5) / dim


def _timm_config(
    name: str, arguments: dict[str, Any], features: int, preprocessing: Preprocessing
) -> dict[str, Any]:
    first_conv = "stem.0" if name in SIZES else "patch_embed.proj"
    pretrained = {
        **to_timm(preprocessing),
        "num_classes": 0,
        "pool_size": None,
        "fixed_input_size": name not in SIZES,
    }
    pretrained |= {"first_conv": first_conv, "classifier": "head.fc" if name in SIZES else "head"}
    return {
        "architecture": name,
        "num_classes": 0,
        "num_features": features,
        "model_args": arguments,
        "pretrained_cfg": pretrained,
    }


def _timm_to_timm(backbone: TimmBackbone, preprocessing: Preprocessing) -> Converted:
    arguments = {
        key: value for key, value in backbone.config.items() if key not in ("name", "in_channels")
    }
    arguments["in_chans"] = backbone.in_channels
    name = backbone.config["name"].partition(".")[0]
    config = _timm_config(name, arguments, backbone.embed_dim, preprocessing)
    known = getattr(backbone.model, "pretrained_cfg", {})
    for key in ("first_conv", "classifier", "pool_size", "fixed_input_size"):
        if key in known:
            config["pretrained_cfg"][key] = known[key]
    return (
        {name.removeprefix("model."): tensor for name, tensor in backbone.state_dict().items()},
        config,
        [],
    )


# ----------------------------------------------------------------- Meta


def _vit_to_meta(backbone: VisionTransformer, preprocessing: Preprocessing) -> Converted:
    options, notes = backbone.config, []
    state = {name: tensor.detach() for name, tensor in backbone.state_dict().items()}
    rotary, registers = options["positions"] == "rope", options["registers"]
    _require(options, "Meta's code", norm_eps=(1e-5, 1e-6) if rotary else 1e-6)
    if rotary:
        dialect = dialects.META_ROTARY
    else:
        dialect = dialects.META_REGISTERS if registers else dialects.META_LEARNED
        state, _ = _completed(backbone)
        if options["layerscale"] is None and not registers and "mask_token" in state:
            if state["mask_token"].any():
                dialect = dialects.META_IBOT
            else:
                state.pop("mask_token")  # DINO's own code would not open a file with one
                notes.append("not held: mask_token, which is zeros")
    unsaid = _unsaid(options, dialect)
    if unsaid:
        notes.append(f"not said by the file: read it with ?{'&'.join(unsaid)}")
    tensors, dropped = rename(state, dialect)
    notes.append("not said by the file: mean, std and sizes of the preprocessing")
    return tensors, {}, notes + _losses(backbone, dropped, dialect.interpolation)


def _unsaid(options: dict[str, Any], dialect: Dialect) -> list[str]:
    """Options that neither the file nor what is published tells, as a query."""
    height, width = options["image_size"]
    if options["positions"] == "rope":
        published = {"rope_normalize": "separate", "norm_eps": dialect.norm_eps}
        return [
            f"{name}={options[name]}" for name, value in published.items() if options[name] != value
        ]
    head_dim = 128 if options["embed_dim"] == 4096 else 64
    heads = (
        []
        if options["embed_dim"] == head_dim * options["num_heads"]
        else [f"num_heads={options['num_heads']}"]
    )
    return heads + ([] if height == width else [f"image_size={height}x{width}"])


# ----------------------------------------------------------------- ConvNeXt


def _convnext_to_hf(backbone: TimmBackbone, preprocessing: Preprocessing) -> Converted:
    depths, dims = _convnext_size(backbone)
    tensors, _ = rename(backbone.state_dict(), dialects.HF_CONVNEXT)
    config = {
        "architectures": ["DINOv3ConvNextModel"],
        "model_type": "dinov3_convnext",
        "depths": depths,
        "hidden_sizes": dims,
        "num_channels": backbone.in_channels,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "image_size": max(preprocessing.size),
        "torch_dtype": "float32",
    }
    return tensors, config, []


def _convnext_to_meta(backbone: TimmBackbone, preprocessing: Preprocessing) -> Converted:
    _convnext_size(backbone)
    tensors, _ = rename(backbone.state_dict(), dialects.META_CONVNEXT)
    twin = {f"norms.3.{leaf}": tensors[f"norm.{leaf}"] for leaf in ("weight", "bias")}
    return tensors | twin, {}, ["not said by the file: mean, std and sizes of the preprocessing"]


def _convnext_size(backbone: TimmBackbone) -> tuple[list[int], list[int]]:
    """Depths and widths.

    Raises:
        UserError: if the model differs from DINOv3's ConvNeXts in more than these.
    """
    name, options = backbone.config["name"].partition(".")[0], backbone.config
    odd = ", ".join(
        sorted(set(options) - {"name", "in_channels", "depths", "dims", "drop_path_rate"})
    )
    if odd:
        raise UserError(f"a ConvNeXt with {odd} has no counterpart outside timm")
    depths, dims = SIZES[name]
    return list(options.get("depths", depths)), list(options.get("dims", dims))
