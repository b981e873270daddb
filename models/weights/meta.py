"""Meta's files of DINO, iBOT, DINOv2 and DINOv3: names of tensors, export, preprocessing."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from models.features import Preprocessing
from models.timm_backbone import TimmBackbone
from models.weights.dialect import Dialect, has_name, same_names
from models.weights.shapes import ROTARY_NORM_EPS, released_head_dim
from models.weights.write import Converted, complete, convnext_sizes, list_losses, rename, require

# ----------------------------------------------------------------- names of tensors

# Tensors that timm names alike.
BLOCK = ["norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"]
SHARED = {
    **same_names("cls_token", "norm", *(f"blocks.#.{part}" for part in BLOCK)),
    "patch_embed": "patch_embed.proj",
}
SCALES = same_names("blocks.#.ls1", "blocks.#.ls2")
LEARNED = Dialect(
    "Meta DINO and DINOv2",
    {
        **SHARED,
        **SCALES,
        **same_names("pos_embed", "mask_token", "register_tokens", "cls_norm", "local_cls_norm"),
        **same_names("blocks.#.mlp.w12", "blocks.#.mlp.w3"),
        "blocks.#.attn.qkv.bias_mask": (),
    },
)
REGISTERS = Dialect("Meta DINOv2 with registers", LEARNED.table, interpolation="antialias")
IBOT = Dialect("Meta iBOT", {**LEARNED.table, "mask_token": "masked_embed"})
ROTARY = Dialect(
    "Meta DINOv3",
    {
        **SHARED,
        **SCALES,
        **same_names("mask_token", "cls_norm", "local_cls_norm"),
        "register_tokens": "storage_tokens",
        "rope.periods": "rope_embed.periods",
        "blocks.#.mlp.w12": ("blocks.#.mlp.w1", "blocks.#.mlp.w2"),
        "blocks.#.mlp.w3": "blocks.#.mlp.w3",
    },
    norm_eps=ROTARY_NORM_EPS,
)
_OWN_STAGE, _STAGE = "model.stages.#.blocks.#", "stages.#.#"
CONVNEXT = Dialect(
    "Meta DINOv3 ConvNeXt",
    {
        "model.stem.#": "downsample_layers.0.#",
        "model.stages.#.downsample.#": "downsample_layers.#.#",
        _OWN_STAGE: _STAGE,  # gamma
        f"{_OWN_STAGE}.conv_dw": f"{_STAGE}.dwconv",
        f"{_OWN_STAGE}.norm": f"{_STAGE}.norm",
        f"{_OWN_STAGE}.mlp.fc1": f"{_STAGE}.pwconv1",
        f"{_OWN_STAGE}.mlp.fc2": f"{_STAGE}.pwconv2",
        "model.head.norm": "norm",
    },
)


def find_dialect(tensors: Mapping[str, Any], from_timm: bool) -> Dialect | None:
    """The dialect of these names; None if they are not Meta's.

    DINO's files and timm's copies of them have the same names; `from_timm` tells them apart.
    """
    if has_name(tensors, r"^downsample_layers\.\d"):
        return CONVNEXT
    if not has_name(tensors, r"^blocks\.\d+\.attn\.qkv\."):
        return None
    if has_name(tensors, r"^storage_tokens$|^rope_embed\.|\.bias_mask$"):
        return ROTARY
    if "pos_embed" not in tensors:
        return None
    if "masked_embed" in tensors:
        return IBOT
    if "register_tokens" in tensors:
        return REGISTERS
    metas_alone = has_name(tensors, r"^mask_token$|\.mlp\.w12\.")
    if metas_alone or not (from_timm or "reg_token" in tensors):
        return LEARNED
    return None


# ----------------------------------------------------------------- export


def convert(backbone: nn.Module, preprocessing: Preprocessing) -> Converted:
    """Tensors of the authors' file; there is no config.json.

    Raises UserError if the authors' code has no such model.
    """
    no_preprocessing = "not said by the file: mean, std and sizes of the preprocessing"
    if isinstance(backbone, TimmBackbone):
        convnext_sizes(backbone)
        tensors, _ = rename(backbone.state_dict(), CONVNEXT)
        twin = {f"norms.3.{leaf}": tensors[f"norm.{leaf}"] for leaf in ("weight", "bias")}
        return tensors | twin, {}, [no_preprocessing]

    options, notes = backbone.config, []
    rotary = options["positions"] == "rope"
    require(options, "Meta's code", norm_eps=(ROTARY_NORM_EPS, 1e-6) if rotary else 1e-6)
    if rotary:
        dialect = ROTARY
        state = {name: tensor.detach() for name, tensor in backbone.state_dict().items()}
    else:
        state, _ = complete(backbone)
        dialect = REGISTERS if options["registers"] else LEARNED
        like_dino = options["layerscale"] is None and not options["registers"]
        if like_dino and "mask_token" in state:
            if state["mask_token"].any():
                dialect = IBOT
            else:
                del state["mask_token"]  # DINO's own code would not load a file with one
                notes.append("not held: mask_token, which is zeros")
    untold = _untold_options(options, dialect)
    if untold:
        notes.append(f"not said by the file: read it with ?{'&'.join(untold)}")
    tensors, dropped = rename(state, dialect)
    notes.append(no_preprocessing)
    return tensors, {}, notes + list_losses(backbone, dropped, dialect.interpolation)


def _untold_options(options: dict[str, Any], dialect: Dialect) -> list[str]:
    """option=value, for options that the file does not tell and that are not as published."""
    if options["positions"] == "rope":
        published = {"rope_normalize": "separate", "norm_eps": dialect.norm_eps}
        return [f"{name}={options[name]}" for name in published if options[name] != published[name]]
    untold = []
    dim, heads = options["embed_dim"], options["num_heads"]
    if dim != released_head_dim(dim) * heads:
        untold.append(f"num_heads={heads}")
    height, width = options["image_size"]
    if height != width:
        untold.append(f"image_size={height}x{width}")
    return untold


# ----------------------------------------------------------------- preprocessing

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# DINOv3's satellite models (SAT-493M).
SATELLITE_MEAN, SATELLITE_STD = (0.430, 0.411, 0.296), (0.213, 0.156, 0.143)


def published_preprocessing(path: Path, learned_positions: bool, in_channels: int) -> Preprocessing:
    """Of Meta's evaluation, for files that say nothing.

    Sizes: 256 then a crop of 224 (DINO, DINOv2), or 256 (DINOv3). Statistics of ImageNet, or of
    SAT-493M where `path` names it; where there are not 3 channels, their averages.
    """
    satellite = "sat493m" in path.name.lower()
    mean, std = (SATELLITE_MEAN, SATELLITE_STD) if satellite else (IMAGENET_MEAN, IMAGENET_STD)
    if in_channels != 3:
        mean = (sum(mean) / 3,) * in_channels
        std = (sum(std) / 3,) * in_channels
    side = 224 if learned_positions else 256
    return Preprocessing((side, side), 256, mean, std)
