"""Our own folders of a backbone, in and out: of backbones, and of teachers of a run.

A teacher's folder is one of Hugging Face that also holds all options of ours, where
transformers has such a model. So both transformers' AutoModel and `load_backbone` read it.
"""

import dataclasses
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from errors import UserError
from models.features import Preprocessing
from models.vit import VisionTransformer, build_backbone
from models.weights import hugging_face, processors
from models.weights.dialect import Dialect
from models.weights.files import read_json, read_weights, write_json, write_tensors
from models.weights.read import (
    WeightsFile,
    build_empty,
    check_options,
    default_tensor,
    load_tensors,
)

MODEL_TYPE = "nanodino"
# Of a teacher in Hugging Face's format: the key of our options in config.json, and the file of
# tensors for which that format has no place.
_said: set[str] = set()  # reasons why a teacher is not in Hugging Face's format, each said once
OPTIONS, EXTRA = "nanodino", "extra.safetensors"


def save_backbone(backbone: nn.Module, folder: str | Path, preprocessing: Preprocessing) -> None:
    """Writes config.json, preprocessor_config.json and model.safetensors: enough to rebuild it.

    Each file replaces the previous one at once, so a killed process leaves no half file.

    Raises:
        UserError: if `backbone` is neither a `VisionTransformer` nor a `TimmBackbone`.
    """
    if not hasattr(backbone, "config"):
        raise UserError(f"a {type(backbone).__name__} cannot be saved; it has no `config`")
    kind = "vit" if isinstance(backbone, VisionTransformer) else "timm"
    config = {"model_type": MODEL_TYPE, "architecture": {"type": kind, **backbone.config}}
    _write(Path(folder), config, backbone.state_dict(), preprocessing)


def is_own(folder: Path) -> bool:
    path = folder / "config.json"
    return path.is_file() and read_json(path).get("model_type") == MODEL_TYPE


def read_own(folder: Path, options: Mapping[str, Any]) -> nn.Module:
    """The backbone that `save_backbone` wrote; `options` win over those in the folder."""
    path = folder / "config.json"
    try:
        backbone = _build(**{**read_json(path)["architecture"], **options})
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} does not describe a backbone: {error}") from error
    load_tensors(backbone, read_weights(folder), str(folder))
    path = folder / "preprocessor_config.json"
    backbone.preprocessing = processors.read_preprocessing(read_json(path), str(path))
    return backbone


def _build(type: str, **options) -> nn.Module:
    if type == "timm":  # not on the meta device: timm's models have buffers that no file holds
        return build_backbone(f"timm:{options.pop('name')}", **options)
    if type != "vit":
        raise UserError(f"architecture.type is {type!r}; it must be vit or timm")
    return build_empty(options)


def save_teacher(backbone: nn.Module, folder: str | Path, preprocessing: Preprocessing) -> None:
    """Writes what `load_backbone` rebuilds exactly, and transformers' AutoModel if it can.

    Tensors for which transformers has no place (the mask token of a ViTModel, the norm for local
    crops) stand beside the others in extra.safetensors.
    """
    try:
        if not isinstance(backbone, VisionTransformer):
            raise UserError("timm's models are written under timm's names")
        tensors, config, _ = hugging_face.convert(backbone, preprocessing)
    except ValueError as error:
        if isinstance(backbone, VisionTransformer) and str(error) not in _said:
            _said.add(str(error))
            print(f"{folder} is written in our own format only: {error}", file=sys.stderr)
        save_backbone(backbone, folder, preprocessing)
        return
    names = hugging_face.dialect_of(config).names
    extra = {}
    for name, tensor in backbone.state_dict().items():
        held = {*(names(name) or (name,))} <= {*tensors, ""}
        default = default_tensor(backbone, name, tensor)
        if not held and (default is None or not torch.equal(default, tensor.cpu())):
            extra[name] = tensor.detach()
    config = {**config, OPTIONS: backbone.config}
    _write(Path(folder), config, tensors, preprocessing)
    if extra:
        write_tensors(Path(folder) / EXTRA, extra)


def read_teacher(file: WeightsFile, options: Mapping[str, Any]) -> VisionTransformer:
    """The backbone that `save_teacher` wrote, without what was added for transformers alone."""
    check_options(options)
    path = file.folder / EXTRA
    extra = read_weights(path) if path.is_file() else {}
    try:
        with torch.device("meta"):
            backbone = VisionTransformer(**{**file.config[OPTIONS], **options})
    except (TypeError, ValueError) as error:
        path = file.folder / "config.json"
        raise UserError(f"{path} does not describe a backbone: {error}") from error
    dialect = _with_own_names(hugging_face.dialect_of(file.config), extra)
    held = {part for name in backbone.state_dict() for part in dialect.names(name) or ()}
    tensors = {
        name: tensor
        for name, tensor in file.tensors.items()
        if name in held or not _is_neutral(name, tensor)
    }
    load_tensors(backbone, {**tensors, **extra}, str(file.path), dialect, file.notes)
    return backbone


def _with_own_names(dialect: Dialect, own: Iterable[str]) -> Dialect:
    """The dialect, except for the tensors `own`, which have our names."""
    return dataclasses.replace(dialect, table={**dialect.table, **{name: name for name in own}})


def _is_neutral(name: str, tensor: Tensor) -> bool:
    """Whether this is a LayerScale of ones, or a bias or mask token of zeros."""
    return bool((tensor == (1 if name.endswith("lambda1") else 0)).all())


def _write(
    folder: Path, config: dict, tensors: dict[str, Tensor], preprocessing: Preprocessing
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)
    path = folder / "preprocessor_config.json"
    write_json(path, processors.write_preprocessing(preprocessing))
    write_tensors(folder / "model.safetensors", tensors)
