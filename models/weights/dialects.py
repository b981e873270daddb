"""Tensor names of the released vision transformers against ours: Meta, Hugging Face and timm.

A dialect is a table from our names to its own. `#` stands for a number; several names hold the rows of one tensor of ours one
after the other, and an empty name stands for rows of zeros that the dialect leaves out. A name that the table lacks is not
held by the dialect. Both directions, reading and writing, go by the same table.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

Names = tuple[str, ...]


@dataclass(frozen=True)
class Dialect:
    """How one family of files calls our tensors, and what it fixes without saying so.

    Attributes:
        name: for messages.
        table: our name, or our name without its last part, -> theirs.
        interpolation: of learned positions where nothing says otherwise.
        norm_eps: the same for the norms.
    """

    name: str
    table: Mapping[str, str | Names] = field(repr=False)
    interpolation: str = "offset"
    norm_eps: float = 1e-6

    def names(self, own: str) -> Names | None:
        """Theirs for one of our names, with its numbers; None if they do not hold it."""
        numbers = re.findall(r"(?<=\.)\d+(?=\.)", own)
        generic = re.sub(r"(?<=\.)\d+(?=\.)", "#", own)
        if not self.table:
            return (own,)
        stem, dot, leaf = generic.rpartition(".")
        if generic in self.table:
            found = self.table[generic]
        elif stem in self.table:
            found = _as_tuple(self.table[stem])
            found = tuple(name + dot + leaf if name else "" for name in found)
        else:
            return None
        return tuple(_fill(name, numbers) for name in _as_tuple(found)) or None

    def find(self, own: str, tensors: Iterable[str]) -> dict[int, str]:
        """Those of `tensors` that are (the first rows of) `own`, in which `#` is any number, by that number; 0 if none."""
        probe = self.names(own.replace("#", "987654"))
        if probe is None:
            return {}
        pattern = re.compile(re.escape(probe[0]).replace("987654", r"(\d+)"))
        hits = ((pattern.fullmatch(name), name) for name in tensors)
        return {int(hit[1]) if pattern.groups else 0: name for hit, name in hits if hit}


def _as_tuple(value: str | Names) -> Names:
    return (value,) if isinstance(value, str) else value


def _fill(template: str, numbers: list[str]) -> str:
    for number in numbers:
        template = template.replace("#", number, 1)
    return template


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


# ----------------------------------------------------------------- Meta and timm

_BLOCK = [
    f"blocks.#.{part}" for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
]
_SHARED = _same("cls_token", "norm", *_BLOCK) | {"patch_embed": "patch_embed.proj"}
_SCALES = _same("blocks.#.ls1", "blocks.#.ls2")
_NO_MASK = {"blocks.#.attn.qkv.bias_mask": ()}
_FUSED_GATE = _same("blocks.#.mlp.w12", "blocks.#.mlp.w3")

OWN = Dialect("own", {})
META_LEARNED = Dialect(
    "Meta DINO and DINOv2",
    {
        **(_SHARED | _SCALES | _NO_MASK | _FUSED_GATE),
        **_same("pos_embed", "mask_token", "register_tokens", "cls_norm", "local_cls_norm"),
    },
)
META_REGISTERS = Dialect(
    "Meta DINOv2 with registers", META_LEARNED.table, interpolation="antialias"
)
META_IBOT = Dialect("Meta iBOT", {**META_LEARNED.table, "mask_token": "masked_embed"})
META_ROTARY = Dialect(
    "Meta DINOv3",
    _SHARED
    | _SCALES
    | _same("mask_token", "cls_norm", "local_cls_norm")
    | {
        "register_tokens": "storage_tokens",
        "rope.periods": "rope_embed.periods",
        "blocks.#.mlp.w12": ("blocks.#.mlp.w1", "blocks.#.mlp.w2"),
        "blocks.#.mlp.w3": "blocks.#.mlp.w3",
    },
    norm_eps=1e-5,
)
_TIMM = _SHARED | _NO_MASK | {"register_tokens": "reg_token", "pos_embed": "pos_embed"}
TIMM_LEARNED = Dialect("timm vit", _TIMM | _SCALES, interpolation="antialias")
TIMM_GATED = Dialect(
    "timm vit, gated",
    {name: theirs for name, theirs in TIMM_LEARNED.table.items() if ".mlp." not in name}
    | {"blocks.#.mlp.w12": "blocks.#.mlp.fc1", "blocks.#.mlp.w3": "blocks.#.mlp.fc2"},
    interpolation="antialias",
)
_EVA_KEY_BIAS = _TIMM | {
    "blocks.#.ls1.gamma": "blocks.#.gamma_1",
    "blocks.#.ls2.gamma": "blocks.#.gamma_2",
}
_EVA = _EVA_KEY_BIAS | {
    "blocks.#.attn.qkv.bias": ("blocks.#.attn.q_bias", "", "blocks.#.attn.v_bias")
}
_EVA_GATE = {
    "blocks.#.mlp.w12": ("blocks.#.mlp.fc1_g", "blocks.#.mlp.fc1_x"),
    "blocks.#.mlp.w3": "blocks.#.mlp.fc2",
}


def timm_rotary(gated: bool, key_bias: bool) -> Dialect:
    """timm's DINOv3; with a bias of the keys it is the `attn_type` "rope" of timm."""
    table = _EVA_KEY_BIAS if key_bias else _EVA
    if gated:
        table = {name: theirs for name, theirs in table.items() if ".mlp." not in name} | _EVA_GATE
    return Dialect(
        "timm eva" + ", gated" * gated + " with key bias" * key_bias, table, norm_eps=1e-5
    )


# ----------------------------------------------------------------- Hugging Face

_HF = {
    "cls_token": "embeddings.cls_token",
    "mask_token": "embeddings.mask_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed": "embeddings.patch_embeddings.projection",
    "blocks.#.attn.qkv": tuple(
        f"encoder.layer.#.attention.attention.{third}" for third in ("query", "key", "value")
    ),
    "blocks.#.attn.qkv.bias_mask": (),
    "blocks.#.attn.proj": "encoder.layer.#.attention.output.dense",
    "norm": "layernorm",
}
HF_VIT = Dialect(
    "Hugging Face ViTModel",
    _HF
    | {
        "blocks.#.norm1": "encoder.layer.#.layernorm_before",
        "blocks.#.norm2": "encoder.layer.#.layernorm_after",
        "blocks.#.mlp.fc1": "encoder.layer.#.intermediate.dense",
        "blocks.#.mlp.fc2": "encoder.layer.#.output.dense",
    },
    interpolation="size",
)
_HF_DINOV2 = _HF | {
    "register_tokens": "embeddings.register_tokens",
    "blocks.#.mlp.w12": "encoder.layer.#.mlp.weights_in",
    "blocks.#.mlp.w3": "encoder.layer.#.mlp.weights_out",
    "blocks.#.ls1.gamma": "encoder.layer.#.layer_scale1.lambda1",
    "blocks.#.ls2.gamma": "encoder.layer.#.layer_scale2.lambda1",
    **{
        f"blocks.#.{part}": f"encoder.layer.#.{part}"
        for part in ("norm1", "norm2", "mlp.fc1", "mlp.fc2")
    },
}
HF_DINOV2 = Dialect("Hugging Face Dinov2Model", _HF_DINOV2, interpolation="size")
HF_REGISTERS = Dialect(
    "Hugging Face Dinov2WithRegistersModel", _HF_DINOV2, interpolation="antialias"
)
_HF_DINOV3 = {
    "cls_token": "embeddings.cls_token",
    "mask_token": "embeddings.mask_token",
    "register_tokens": "embeddings.register_tokens",
    "patch_embed": "embeddings.patch_embeddings",
    "blocks.#.attn.qkv": tuple(f"layer.#.attention.{third}_proj" for third in "qkv"),
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
}
HF_DINOV3_KEY_BIAS = Dialect("Hugging Face DINOv3ViTModel with key bias", _HF_DINOV3, norm_eps=1e-5)
HF_DINOV3 = Dialect(
    "Hugging Face DINOv3ViTModel",
    _HF_DINOV3
    | {
        "blocks.#.attn.qkv.bias": (
            "layer.#.attention.q_proj.bias",
            "",
            "layer.#.attention.v_proj.bias",
        )
    },
    norm_eps=1e-5,
)

# ----------------------------------------------------------------- ConvNeXt: ours are timm's, below `model.`

_STAGE = "model.stages.#.blocks.#"
_TIMM_CONVNEXT = ["model.stem.#", "model.stages.#.downsample.#", "model.head.norm"]
_TIMM_CONVNEXT += [f"{_STAGE}{part}" for part in ("", ".conv_dw", ".norm", ".mlp.fc1", ".mlp.fc2")]
TIMM_CONVNEXT = Dialect(
    "timm convnext", {name: name.removeprefix("model.") for name in _TIMM_CONVNEXT}
)
META_CONVNEXT = Dialect(
    "Meta DINOv3 ConvNeXt",
    {
        "model.stem.#": "downsample_layers.0.#",
        "model.stages.#.downsample.#": "downsample_layers.#.#",
        _STAGE: "stages.#.#",  # gamma
        f"{_STAGE}.conv_dw": "stages.#.#.dwconv",
        f"{_STAGE}.norm": "stages.#.#.norm",
        f"{_STAGE}.mlp.fc1": "stages.#.#.pwconv1",
        f"{_STAGE}.mlp.fc2": "stages.#.#.pwconv2",
        "model.head.norm": "norm",
    },
)
HF_CONVNEXT = Dialect(
    "Hugging Face DINOv3ConvNextModel",
    {
        "model.stem.#": "stages.0.downsample_layers.#",
        "model.stages.#.downsample.#": "stages.#.downsample_layers.#",
        _STAGE: "stages.#.layers.#",  # gamma
        f"{_STAGE}.conv_dw": "stages.#.layers.#.depthwise_conv",
        f"{_STAGE}.norm": "stages.#.layers.#.layer_norm",
        f"{_STAGE}.mlp.fc1": "stages.#.layers.#.pointwise_conv1",
        f"{_STAGE}.mlp.fc2": "stages.#.layers.#.pointwise_conv2",
        "model.head.norm": "layer_norm",
    },
)
CONVNEXTS = (TIMM_CONVNEXT, META_CONVNEXT, HF_CONVNEXT)

HUGGING_FACE = {
    "vit": HF_VIT,
    "dinov2": HF_DINOV2,
    "dinov2_with_registers": HF_REGISTERS,
    "dinov3_vit": HF_DINOV3,
    "dinov3_convnext": HF_CONVNEXT,
}  # by the model_type of config.json

# ----------------------------------------------------------------- which one a file is in

_ROOTS = r"cls_token$|pos_embed$|patch_embed\.|blocks\.\d|embeddings\.|encoder\.layer\.\d|layer\.\d"
_ROOTS += r"|stages\.\d|stem\.\d|downsample_layers\.\d"


def strip(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The backbone's tensors without their common prefix and without block chunks, and the names of the rest.

    `module.backbone.blocks.2.7.norm1.weight` becomes `blocks.7.norm1.weight`; heads beside the backbone are the rest.
    """
    # Some versions of transformers put one more module around the blocks than around the rest.
    tensors = {re.sub(r"^model\.(layer|stages)\.", r"\1.", name): t for name, t in tensors.items()}
    hits = (re.match(rf"((?:\w+\.)*?)(?:{_ROOTS})", name) for name in tensors)
    prefixes = Counter(hit[1] for hit in hits if hit)
    prefix = prefixes.most_common(1)[0][0] if prefixes else ""
    inside = {
        name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)
    }
    inside = {
        re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name): t for name, t in inside.items()
    }
    return inside, [name for name in tensors if not name.startswith(prefix)]


def find_dialect(tensors: Mapping[str, Any], from_timm: bool) -> Dialect | None:
    """The dialect that the names are in, or None.

    DINO v1 files and timm's copies of them have the same names; `from_timm` decides between the two.
    """

    def has(pattern: str) -> bool:
        return any(re.search(pattern, name) for name in tensors)

    learned = "pos_embed" in tensors
    if "patch_embed.weight" in tensors:
        return OWN
    if has(r"^layer\.\d|^embeddings\.patch_embeddings\.(weight|bias)$"):
        return HF_DINOV3_KEY_BIAS if has(r"attention\.k_proj\.bias$") else HF_DINOV3
    if has(r"^encoder\.layer\.\d+\.(layernorm_before|intermediate)\."):
        return HF_VIT
    if has(r"^encoder\.layer\.\d"):
        return HF_REGISTERS if "embeddings.register_tokens" in tensors else HF_DINOV2
    if has(r"^stages\.\d+\.layers\.\d"):
        return HF_CONVNEXT
    if has(r"^downsample_layers\.\d"):
        return META_CONVNEXT
    if has(r"^stages\.\d+\.blocks\.\d+\.conv_dw\."):
        return TIMM_CONVNEXT
    if not has(r"^blocks\.\d+\.attn\.qkv\."):
        return None
    if has(r"^storage_tokens$|^rope_embed\.|\.bias_mask$"):
        return META_ROTARY
    if not learned:
        return timm_rotary(gated=has(r"\.mlp\.fc1_g\."), key_bias=has(r"\.attn\.qkv\.bias$"))
    if "masked_embed" in tensors:
        return META_IBOT
    if "register_tokens" in tensors:
        return META_REGISTERS
    if not from_timm and "reg_token" not in tensors or has(r"^mask_token$|\.mlp\.w12\."):
        return META_LEARNED
    return TIMM_GATED if _packs_a_gate(tensors) else TIMM_LEARNED


def _packs_a_gate(tensors: Mapping[str, Any]) -> bool:
    up, down = (tensors.get(f"blocks.0.mlp.{name}.weight") for name in ("fc1", "fc2"))
    return up is not None and down is not None and len(up) == 2 * down.shape[1]
