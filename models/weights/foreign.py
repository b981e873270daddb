"""A file or folder of weights in anybody's format -> a backbone with its `preprocessing`."""

import dataclasses
import re
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from errors import UserError
from models.features import Preprocessing
from models.timm_backbone import TimmBackbone
from models.vit import VisionTransformer
from models.weights import hugging_face, meta, own, processors, timm
from models.weights.dialect import OWN, Dialect
from models.weights.files import WEIGHT_FILES, read_json, read_weights
from models.weights.read import WeightsFile, build_empty, check_options, load_tensors, shorten
from models.weights.shapes import CONVNEXT_SIZES, convnext_options, vit_options

KNOWN = "Meta's DINO, DINOv2 and DINOv3, Hugging Face's and timm's copies of them, and our own"
CONVNEXTS = (timm.CONVNEXT, meta.CONVNEXT, hugging_face.CONVNEXT)
TEACHER = r"(?i)teacher|(?<![a-z])(ema|momentum|target|averaged?|avg)(?![a-z])"
ROOTS = r"cls_token$|pos_embed$|patch_embed\.|blocks\.\d|embeddings\.|encoder\.layer\.\d|layer\.\d"
ROOTS += r"|stages\.\d|stem\.\d|downsample_layers\.\d"


def read_backbone(path: Path, options: Mapping[str, Any]) -> nn.Module:
    """The backbone in a file or folder, whose format is found from its names and config.json.

    Args:
        options: of `VisionTransformer`; they win over what the files say.

    Raises:
        FileNotFoundError: if a file is missing.
        UserError: if the dialect is unknown, or the tensors do not cover the model exactly.
    """
    file = _open(path)
    if own.OPTIONS in file.config:
        backbone = own.read_teacher(file, options)
    elif file.timm_name and not timm.is_like_ours(file.timm_name, file.timm_arguments):
        backbone = _read_timm(file, options)
    elif (dialect := _dialect_of(file)) in CONVNEXTS:
        backbone = _read_convnext(file, dialect, options)
    else:
        backbone = _read_vit(file, dialect, options)
    backbone.preprocessing = _read_preprocessing(file, backbone)
    return backbone


def _open(path: Path) -> WeightsFile:
    folder = path if path.is_dir() else path.parent
    # A config.json belongs to a file only if the file has the usual name of weights in a folder.
    beside = path.is_dir() or path.name in WEIGHT_FILES
    config_file = folder / "config.json"
    config = read_json(config_file) if beside and config_file.is_file() else {}
    kind = config.get("model_type")
    of_timm = not kind and "architecture" in config
    if config and kind not in hugging_face.DIALECTS and not of_timm:
        readable = ", ".join((own.MODEL_TYPE, *hugging_face.DIALECTS))
        raise UserError(
            f"{config_file} has model_type {kind!r}; readable are {readable} and timm's"
        )
    tensors = {name: tensor for name, tensor in read_weights(path).items() if tensor.numel()}
    tensors, aside = strip(tensors, str(path))
    return WeightsFile(path, tensors, aside, config)


def strip(tensors: dict[str, Tensor], source: str) -> tuple[dict[str, Tensor], list[str]]:
    """The backbone's tensors without their common prefix, and the names of the other tensors.

    Of several networks alike the teacher is taken, and said on standard error.

    `module.backbone.blocks.2.7.norm1.weight`, a block in a chunk of blocks, becomes
    `blocks.7.norm1.weight`. Heads beside the backbone are among the others.
    """
    # Some versions of transformers put one more module around the blocks than around the rest.
    tensors = {re.sub(r"^model\.(layer|stages)\.", r"\1.", name): t for name, t in tensors.items()}
    hits = (re.match(rf"((?:\w+\.)*?)(?:{ROOTS})", name) for name in tensors)
    prefixes = Counter(hit[1] for hit in hits if hit)
    prefix = _choose(prefixes, source)
    inside, aside = {}, []
    for name, tensor in tensors.items():
        if name.startswith(prefix):
            name = name.removeprefix(prefix)
            inside[re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name)] = tensor
        else:
            aside.append(name)
    return inside, aside


def _choose(prefixes: Counter, source: str) -> str:
    """The prefix of the most tensors; of networks alike that of the teacher."""
    if not prefixes:
        return ""
    most = max(prefixes.values())
    alike = [prefix for prefix, count in prefixes.items() if count >= 0.9 * most]
    teachers = [prefix for prefix in alike if re.search(TEACHER, prefix)]
    chosen = max(teachers or alike, key=prefixes.__getitem__)
    if len(alike) > 1:
        others = ", ".join(prefix or "(no prefix)" for prefix in alike if prefix != chosen)
        _warn(f"{source} holds several networks: {chosen or '(no prefix)'} is taken, not {others}")
    return chosen


def find_dialect(tensors: Mapping[str, Any], from_timm: bool) -> Dialect | None:
    """The dialect that the names are in, or None; for `from_timm` see `meta.find_dialect`."""
    if "patch_embed.weight" in tensors:
        return OWN
    return (
        hugging_face.find_dialect(tensors)
        or meta.find_dialect(tensors, from_timm)
        or timm.find_dialect(tensors)
    )


def _dialect_of(file: WeightsFile) -> Dialect:
    if file.kind in hugging_face.DIALECTS:
        return hugging_face.dialect_of(file.config)
    if file.timm_name in CONVNEXT_SIZES:
        return timm.CONVNEXT
    if file.timm_name:
        return timm.read_options(file.timm_name, file.timm_arguments)[1]
    dialect = find_dialect(file.tensors, from_timm=file.path.suffix == ".safetensors")
    if dialect is None:
        shown = shorten(sorted(file.tensors)) or "none"
        raise UserError(
            f"{file.path} is in no dialect that we know ({KNOWN}); its tensors are {shown}"
        )
    return dialect


def _read_vit(file: WeightsFile, dialect: Dialect, options: Mapping[str, Any]) -> VisionTransformer:
    check_options(options)
    tensors, notes = timm.add_cls_position(file.tensors), file.notes
    if tensors is not file.tensors:
        notes.append("the position of the CLS token is part of that token")
    if file.kind in hugging_face.DIALECTS:
        found = hugging_face.read_options(file.config, dialect)
    elif file.timm_name:
        found, _ = timm.read_options(file.timm_name, file.timm_arguments)
    else:
        found = vit_options(tensors, dialect, options)
    backbone = build_empty({**found, **options})
    load_tensors(backbone, tensors, str(file.path), dialect, notes)
    return backbone


def _read_convnext(file: WeightsFile, dialect: Dialect, options: Mapping[str, Any]) -> TimmBackbone:
    if options:
        raise UserError(
            f"{file.path} holds a ConvNeXt, which has no option {', '.join(options)}; it takes "
            "channels"
        )
    if file.timm_name:
        arguments = {**(file.config.get("model_args") or {}), "name": file.timm_name}
        arguments.pop("num_classes", None)
        arguments["in_channels"] = arguments.pop("in_chans", 3)
    elif file.kind:
        arguments = hugging_face.read_convnext(file.config, file.tensors)
    else:
        arguments = convnext_options(file.tensors, dialect)
    backbone = TimmBackbone(**arguments)
    load_tensors(backbone, file.tensors, str(file.path), dialect, file.notes)
    return backbone


def _read_timm(file: WeightsFile, options: Mapping[str, Any]) -> TimmBackbone:
    """A model of timm that no model of ours equals."""
    name, arguments = file.timm_name, file.timm_arguments
    if options:
        raise UserError(
            f"{file.path} holds timm's {name}, which has no option {', '.join(options)}; it takes "
            "channels"
        )
    input_size = file.config.get("pretrained_cfg", {}).get("input_size", [3])
    channels = arguments.pop("in_chans", input_size[0])
    backbone = TimmBackbone(name, in_channels=channels, **arguments)
    tensors = {f"model.{key}": tensor for key, tensor in read_weights(file.path).items()}
    load_tensors(backbone, tensors, str(file.path))
    return backbone


def _read_preprocessing(file: WeightsFile, backbone: nn.Module) -> Preprocessing:
    """As the files say, else as published; one mean and std for each channel of the backbone."""
    channels = backbone.in_channels
    learned = isinstance(backbone, VisionTransformer) and backbone.pos_embed is not None
    found = published = meta.published_preprocessing(file.path, learned, channels)
    path = file.folder / "preprocessor_config.json"
    if file.timm_name:
        values = file.config.get("pretrained_cfg") or {}
        found = timm.read_preprocessing(values, str(file.folder / "config.json"))
    elif file.kind and path.is_file():
        found = processors.read_preprocessing(read_json(path), str(path))
    elif file.kind:
        _warn(f"{path} is missing; images are prepared as published for such models")
    if len(found.mean) != channels or len(found.std) != channels:
        count = len(found.mean)
        _warn(f"{file.path}: statistics of {count} channels are averaged for {channels}")
        mean = (sum(found.mean) / len(found.mean),) * channels
        std = (sum(found.std) / len(found.std),) * channels
        found = dataclasses.replace(found, mean=mean, std=std)
    if "sat493m" in file.path.name.lower() and found.mean != published.mean:
        _warn(
            f"{file.path} is named after SAT-493M, but its statistics are others: {found.mean}, "
            f"{found.std}"
        )
    return found


def _warn(text: str) -> None:
    print(text, file=sys.stderr)
