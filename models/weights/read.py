"""Weights of any dialect into a backbone of ours, every tensor accounted for."""

import dataclasses
import inspect
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from errors import UserError
from models import architecture, preprocessing
from models.convnext import SIZES, convnext_options
from models.features import Preprocessing
from models.layers import KeyMaskedLinear
from models.rope import RotaryPositions
from models.timm_backbone import TimmBackbone
from models.vit import VisionTransformer
from models.weights.dialects import (
    CONVNEXTS,
    HF_DINOV3_KEY_BIAS,
    HUGGING_FACE,
    OWN,
    TIMM_CONVNEXT,
    Dialect,
    find_dialect,
    strip,
)
from models.weights.files import WEIGHT_FILES, read_json, read_weights

KNOWN = "Meta's DINO, DINOv2 and DINOv3, Hugging Face's and timm's copies of them, and our own"
# What stands beside a backbone in a file and is no part of it: heads, and DINOv3's second copy of ConvNeXt's last norm.
ASIDE = (
    r"(model\.)?(\w*head(_dist)?s?|classifier|pooler|fc)\.|norms\.3\.|(embeddings\.)?mask_token$"
)
# A teacher of ours in Hugging Face's format: our options in its config.json, and the tensors that format has no place for.
RECORD, EXTRA = "nanodino", "extra.safetensors"
NAMES_SHOWN = 8  # of missing or unexpected tensors; a wrong file has hundreds


@dataclass
class WeightsFile:
    """A file or folder of weights: tensors below their common prefix, the names beside it, config.json ({} if none)."""

    path: Path
    tensors: dict[str, Tensor]
    aside: list[str]
    config: dict[str, Any]

    @property
    def notes(self) -> list[str]:
        return [f"left aside: {_shorten(self.aside)}"] if self.aside else []

    @property
    def folder(self) -> Path:
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def kind(self) -> str | None:
        return self.config.get("model_type")

    @property
    def timm_name(self) -> str | None:
        """The architecture, if this is a folder of timm."""
        name = self.config.get("architecture")
        return name.partition(".")[0] if isinstance(name, str) and self.kind is None else None

    @property
    def timm_arguments(self) -> dict[str, Any]:
        arguments = self.config.get("model_args") or {}
        return {
            name: value
            for name, value in arguments.items()
            if name not in ("num_classes", "global_pool")
        }


def read_backbone(path: Path, options: Mapping[str, Any]) -> nn.Module:
    """The backbone in a file or folder of a foreign dialect, with its `preprocessing`.

    `options` of `VisionTransformer` win over what the files say.

    Raises:
        FileNotFoundError: if a file is missing.
        UserError: if the dialect is unknown, or the tensors do not cover the model exactly.
    """
    opened = _open(path)
    if RECORD in opened.config:
        backbone = _recorded(opened, options)
    elif opened.timm_name and not _like_ours(opened):
        backbone = _timm_model(opened, options)
    elif (dialect := _dialect(opened)) in CONVNEXTS:
        backbone = _convnext(opened, dialect, options)
    else:
        backbone = _vision_transformer(opened, dialect, options)
    backbone.preprocessing = _preprocessing(opened, backbone)
    return backbone


def load_tensors(
    backbone: nn.Module,
    tensors: Mapping[str, Tensor],
    source: str,
    dialect: Dialect = OWN,
    notes: Iterable[str] = (),
) -> None:
    """Gives `backbone`, which may be on the meta device, copies of `tensors` in its own types.

    Prints to standard error how many of its tensors `source`, as messages call it, holds, what was left aside, and `notes`.

    Raises:
        ValueError: unless names and shapes are the same on both sides, with those that differ and the likely cause.
    """
    own = backbone.state_dict()
    state, missing, misshapen, used, defaults = {}, [], {}, set(), []
    for name, wanted in own.items():
        names = dialect.names(name) or ()
        used.update(names)
        absent = [part for part in names if part and part not in tensors]
        if (
            dialect is not OWN
            and len(absent) == len(names)
            and (default := default_tensor(backbone, name, wanted)) is not None
        ):
            state[name] = default
            defaults.append(name)
            continue
        missing += absent if names else [name]
        shape = (
            list(wanted.shape)
            if len(names) < 2
            else [wanted.shape[0] // len(names), *wanted.shape[1:]]
        )
        wrong = [
            part
            for part in names
            if part in tensors and _without_ones(tensors[part].shape) != _without_ones(shape)
        ]
        misshapen |= {part: (name, list(tensors[part].shape), shape) for part in wrong}
        if names and not absent and not wrong:
            state[name] = _join(
                [tensors[part] if part else torch.zeros(shape) for part in names], wanted
            )

    unused = [name for name in tensors if name not in used]
    aside = [name for name in unused if re.match(ASIDE, name)]
    unexpected = [name for name in unused if name not in aside]
    notes = [
        *notes,
        *(["the mask token, which it lacks, starts at zeros"] if "mask_token" in defaults else []),
    ]
    notes += [f"left aside: {_shorten(aside)}"] if aside else []
    report = f"{source}: matched {len(state) - len(defaults)} / {len(own) - len(defaults)} tensors"
    print("; ".join([report, *notes]), file=sys.stderr)
    if missing or unexpected or misshapen:
        shapes = [
            f"{part} {found} instead of {needed}" for part, (_, found, needed) in misshapen.items()
        ]
        groups = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
        faults = "; ".join(
            f"{title}: {_shorten(names)}" for title, names in groups.items() if names
        )
        cause = _likely_cause(misshapen, missing, unexpected)
        raise UserError(f"{source} does not hold the weights of this backbone; {faults}{cause}")
    # Into the parameters that there are: an optimizer may hold them. Those on the meta device hold nothing and are replaced.
    backbone.load_state_dict(state, assign=any(tensor.is_meta for tensor in own.values()))


def _join(parts: list[Tensor], wanted: Tensor) -> Tensor:
    """One tensor of ours from its rows."""
    joined = parts[0] if len(parts) == 1 else torch.cat(parts)
    return joined.reshape(wanted.shape).to(wanted.dtype, copy=True).contiguous()


def default_tensor(backbone: nn.Module, name: str, wanted: Tensor) -> Tensor | None:
    """A tensor that dialects may leave out, because it follows from the architecture or is for training only."""
    if name.endswith(".bias_mask"):
        linear = KeyMaskedLinear(1, len(wanted))
        linear.reset_mask()
        return linear.bias_mask
    if name == "rope.periods":
        return RotaryPositions(4 * len(wanted), backbone.config["rope_base"]).periods
    return torch.zeros(wanted.shape) if name == "mask_token" else None


def _likely_cause(
    misshapen: Mapping[str, tuple[str, list[int], list[int]]],
    missing: list[str],
    unexpected: list[str],
) -> str:
    by_own = {name: (found, needed) for name, found, needed in misshapen.values()}
    for name in ("patch_embed.weight", "model.stem.0.weight"):
        if name in by_own:
            (width, channels, *patch), (own_width, own_channels, *own_patch) = by_own[name]
            if width != own_width:
                return f"; likely cause: another arch, {width} wide instead of {own_width}"
            if channels != own_channels:
                return f"; likely cause: {channels} input channels instead of {own_channels}"
            return f"; likely cause: patch size {patch[0]} instead of {own_patch[0]}"
    if "pos_embed" in by_own:
        found, needed = by_own["pos_embed"]
        return f"; likely cause: another image_size or patch_size, {found[1]} positions instead of {needed[1]}"
    if misshapen:
        return "; likely cause: another arch"
    blocks = [
        {name.rpartition(".norm1.")[0] for name in names if ".norm1." in name}
        for names in (missing, unexpected)
    ]
    if any(blocks):
        return f"; likely cause: another depth, {len(blocks[0])} blocks too few and {len(blocks[1])} too many"
    if missing and unexpected:
        return "; likely cause: another kind of model"
    return "; likely cause: the file was changed or not written to its end" if missing else ""


def _without_ones(shape: Iterable[int]) -> list[int]:
    """Dialects differ in leading ones: (1, D) and (1, 1, D) are the same token."""
    return [side for side in shape if side != 1]


def _shorten(names: list[str]) -> str:
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more


# ----------------------------------------------------------------- which model


def _open(path: Path) -> WeightsFile:
    folder = path if path.is_dir() else path.parent
    # The config beside a file is that file's if the file is called as such folders call their weights.
    beside = path.is_dir() or path.name in WEIGHT_FILES
    config = (
        read_json(folder / "config.json") if beside and (folder / "config.json").is_file() else {}
    )
    if (
        config
        and config.get("model_type") not in HUGGING_FACE
        and (config.get("model_type") or "architecture" not in config)
    ):
        readable = ", ".join(("nanodino", *HUGGING_FACE))
        raise UserError(
            f"{folder / 'config.json'} has model_type {config.get('model_type')!r}; readable are {readable} and timm's"
        )
    tensors, aside = strip(
        {name: tensor for name, tensor in read_weights(path).items() if tensor.numel()}
    )
    return WeightsFile(path, tensors, aside, config)


def _dialect(opened: WeightsFile) -> Dialect:
    if opened.kind in HUGGING_FACE:
        return record_dialect(opened.config, ())
    if opened.timm_name:
        return (
            TIMM_CONVNEXT
            if opened.timm_name in SIZES
            else architecture.from_timm(opened.timm_name, opened.timm_arguments)[1]
        )
    dialect = find_dialect(opened.tensors, from_timm=opened.path.suffix == ".safetensors")
    if dialect is None:
        shown = _shorten(sorted(opened.tensors)) or "none"
        raise UserError(
            f"{opened.path} is in no dialect that we know ({KNOWN}); its tensors are {shown}"
        )
    return dialect


def _vision_transformer(
    opened: WeightsFile, dialect: Dialect, options: Mapping[str, Any]
) -> VisionTransformer:
    check_options(options)
    tensors, config, notes = opened.tensors, opened.config, opened.notes
    if "reg_token" in tensors and "pos_embed" in tensors:
        positions = tensors["pos_embed"]
        tensors["pos_embed"] = torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)
        notes.append("the position of the CLS token is part of that token")
    if opened.kind in HUGGING_FACE:
        found = architecture.from_hugging_face(config, dialect)
    elif opened.timm_name:
        found, _ = architecture.from_timm(opened.timm_name, opened.timm_arguments)
    else:
        found = architecture.from_shapes(tensors, dialect, options)
    with torch.device("meta"):  # the file has every tensor, and drawing billions first is slow
        backbone = VisionTransformer(**{**found, **options})
    load_tensors(backbone, tensors, str(opened.path), dialect, notes)
    return backbone


def _recorded(opened: WeightsFile, options: Mapping[str, Any]) -> VisionTransformer:
    """A teacher of ours, whose config.json says our options; what was added for transformers without effect is left out."""
    check_options(options)
    path = opened.folder / EXTRA
    extra = read_weights(path) if path.is_file() else {}
    try:
        with torch.device("meta"):
            backbone = VisionTransformer(**{**opened.config[RECORD], **options})
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{opened.folder / 'config.json'} does not describe a backbone: {error}"
        ) from error
    dialect = record_dialect(opened.config, extra)
    held = {part for name in backbone.state_dict() for part in dialect.names(name) or ()}
    tensors = {
        name: tensor
        for name, tensor in opened.tensors.items()
        if name in held or not _neutral(name, tensor)
    }
    load_tensors(backbone, {**tensors, **extra}, str(opened.path), dialect, opened.notes)
    return backbone


def record_dialect(config: Mapping[str, Any], extra: Iterable[str]) -> Dialect:
    """Hugging Face's names of the model in `config`, with those of `extra` as they are."""
    key_bias = config["model_type"] == "dinov3_vit" and config.get("key_bias", False)
    dialect = HF_DINOV3_KEY_BIAS if key_bias else HUGGING_FACE[config["model_type"]]
    own_names = {name: name for name in extra}
    return (
        dataclasses.replace(dialect, table={**dialect.table, **own_names}) if own_names else dialect
    )


def _neutral(name: str, tensor: Tensor) -> bool:
    """A LayerScale of ones, or a bias or mask token of zeros."""
    return bool((tensor == (1 if name.endswith("lambda1") else 0)).all())


def _convnext(opened: WeightsFile, dialect: Dialect, options: Mapping[str, Any]) -> TimmBackbone:
    if options:
        raise UserError(
            f"{opened.path} holds a ConvNeXt, which has no option {', '.join(options)}; it takes channels"
        )
    backbone = TimmBackbone(**convnext_options(opened.tensors, dialect, opened.config))
    load_tensors(backbone, opened.tensors, str(opened.path), dialect, opened.notes)
    return backbone


def _timm_model(opened: WeightsFile, options: Mapping[str, Any]) -> TimmBackbone:
    """A model of timm that is not built like ours stays timm's."""
    name, arguments = opened.timm_name, opened.timm_arguments
    if options:
        raise UserError(
            f"{opened.path} holds timm's {name}, which has no option {', '.join(options)}; it takes channels"
        )
    channels = arguments.pop(
        "in_chans", opened.config.get("pretrained_cfg", {}).get("input_size", [3])[0]
    )
    backbone = TimmBackbone(name, in_channels=channels, **arguments)
    tensors = {f"model.{key}": tensor for key, tensor in read_weights(opened.path).items()}
    load_tensors(backbone, tensors, str(opened.path))
    return backbone


def _like_ours(opened: WeightsFile) -> bool:
    if opened.timm_name in SIZES:
        return opened.timm_arguments.keys() <= {"depths", "dims", "in_chans"}
    return architecture.like_ours(opened.timm_name, opened.timm_arguments)


def check_options(options: Mapping[str, Any]) -> None:
    """Raises ValueError for an option that `VisionTransformer` lacks."""
    known = list(inspect.signature(VisionTransformer).parameters)
    unknown = ", ".join(sorted(set(options) - set(known)))
    if unknown:
        raise UserError(f"unknown option {unknown}; known are channels, {', '.join(known)}")


def _preprocessing(opened: WeightsFile, backbone: nn.Module) -> Preprocessing:
    """As the files say, else as published; one mean and std for each channel of the backbone."""
    path = opened.folder / "preprocessor_config.json"
    learned = isinstance(backbone, VisionTransformer) and backbone.pos_embed is not None
    published = preprocessing.as_published(opened.path, learned, backbone.in_channels)
    if opened.timm_name:
        found = preprocessing.from_timm(
            opened.config.get("pretrained_cfg") or {}, str(opened.folder / "config.json")
        )
    elif opened.kind in HUGGING_FACE and path.is_file():
        found = preprocessing.from_hugging_face(read_json(path), str(path))
    else:
        found = published
        if opened.kind in HUGGING_FACE:
            print(
                f"{path} is missing; images are prepared as published for such models",
                file=sys.stderr,
            )
    if len(found.mean) != backbone.in_channels or len(found.std) != backbone.in_channels:
        print(
            f"{opened.path}: statistics of {len(found.mean)} channels are averaged for {backbone.in_channels}",
            file=sys.stderr,
        )
        mean, std = (
            (sum(values) / len(values),) * backbone.in_channels
            for values in (found.mean, found.std)
        )
        found = dataclasses.replace(found, mean=mean, std=std)
    if "sat493m" in opened.path.name.lower() and found.mean != published.mean:
        print(
            f"{opened.path} is named after SAT-493M, but its statistics are others: {found.mean}, {found.std}",
            file=sys.stderr,
        )
    return found
