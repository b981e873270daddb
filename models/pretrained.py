"""Backbones from and to disk: `load_backbone(MODEL)` and `save_backbone`.

MODEL is one of: a folder written by `save_backbone`; a run folder (its newest teacher), RUN@STEP,
RUN@best; timm:NAME; random:vit_small?patch_size=16&seed=0; pixels?patch_size=8.
"""

import inspect
import json
import os
import re
import sys
from pathlib import Path
from typing import Any, Callable
from urllib.parse import parse_qsl

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.features import Preprocessing
from models.pixels import PixelBackbone
from models.vit import VisionTransformer, build_backbone

ALLOWED = (
    "a folder with config.json, a run folder, RUN@STEP, RUN@best, timm:NAME, "
    "random:NAME?option=value and pixels?patch_size=8"
)
MODEL_TYPE = "nanodino"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}  # PIL's numbers
NAMES_SHOWN = 8  # of missing or unexpected tensors; a wrong file has hundreds


# ----------------------------------------------------------------- load


def load_backbone(spec: str | Path) -> nn.Module:
    """The backbone that `spec` names, in eval mode on the CPU, with its `preprocessing`.

    Prints how many of the backbone's tensors the file holds to standard error.

    Raises:
        FileNotFoundError: if there is no such folder, snapshot or file.
        ValueError: if the spec is not understood, or the weights do not cover the backbone exactly.
    """
    name, _, query = str(spec).partition("?")
    if name.startswith("random:"):
        backbone = _random_backbone(name.removeprefix("random:"), _parse_options(query))
    elif name.startswith("timm:"):
        backbone = build_backbone(name, **{"pretrained": True, **_parse_options(query)})
        backbone.preprocessing = backbone.native_preprocessing
        count = len(backbone.state_dict())
        _report(name, count, count)  # timm loads strictly, so all or none
    elif name == "pixels":
        backbone = _pixel_backbone(_parse_options(query))
    else:
        folder = find_folder(str(spec))
        backbone = READERS[_model_type(folder)](folder)
        backbone.preprocessing = read_preprocessing(folder)
    return backbone.eval()


def find_folder(spec: str) -> Path:
    """The folder with the config.json that a path, a run folder, RUN@STEP or RUN@best stands for.

    Raises:
        FileNotFoundError: if there is none, with what is there.
    """
    path = Path(spec).expanduser()
    if not path.exists() and "@" in path.name:
        run, _, mark = str(path).rpartition("@")
        path = _kept_folder(Path(run), mark)
    if (path / "teacher").is_dir():
        path = path / "teacher"
    if not (path / "config.json").is_file():
        found = "has neither config.json nor teacher/" if path.is_dir() else "is not a folder"
        raise FileNotFoundError(f"model {spec!r}: {path} {found}; allowed are {ALLOWED}")
    return path


def _read_own(folder: Path) -> nn.Module:
    path = folder / "config.json"
    try:
        backbone = _build_empty(**_read_json(path)["architecture"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not describe a backbone: {error}") from error
    load_tensors(backbone, _read_tensors(folder / "model.safetensors"), str(folder))
    return backbone


def _build_empty(type: str, **options) -> nn.Module:
    if type == "timm":  # for real: timm's models have buffers that no file holds
        return build_backbone(f"timm:{options.pop('name')}", **options)
    if type != "vit":
        raise ValueError(f"architecture.type is {type!r}; it must be vit or timm")
    with torch.device("meta"):  # the file has every tensor, and drawing billions first is slow
        return VisionTransformer(**options)


# ----------------------------------------------------------------- save


def save_backbone(backbone: nn.Module, folder: str | Path, preprocessing: Preprocessing) -> None:
    """Writes config.json, preprocessor_config.json and model.safetensors: enough to rebuild it.

    Each file replaces the previous one at once, so a killed process leaves no half file.

    Raises:
        ValueError: if `backbone` is neither a `VisionTransformer` nor a `TimmBackbone`.
    """
    if not hasattr(backbone, "config"):
        raise ValueError(f"a {type(backbone).__name__} cannot be saved; it has no `config`")
    kind = "vit" if isinstance(backbone, VisionTransformer) else "timm"
    config = {"model_type": MODEL_TYPE, "architecture": {"type": kind, **backbone.config}}
    tensors = backbone.state_dict().items()
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", config)
    _write_json(folder / "preprocessor_config.json", _processor_config(preprocessing))
    weights = folder / "model.safetensors"
    _replace(weights, lambda scratch: save_file(state, scratch, metadata={"format": "pt"}))


# ----------------------------------------------------------------- specs


def _random_backbone(arch: str, options: dict[str, Any]) -> nn.Module:
    """Untrained weights of `seed`; the caller's random state is neither used nor moved."""
    seed = options.pop("seed", 0)
    if not isinstance(seed, int):
        raise ValueError(f"seed is {seed!r}; it must be a whole number")
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            backbone = build_backbone(arch, **options)
    except TypeError as error:
        raise ValueError(f"random:{arch} cannot be built from its options: {error}") from error
    if not isinstance(backbone, VisionTransformer):
        backbone.preprocessing = backbone.native_preprocessing
        return backbone
    height, width = backbone.config["image_size"]
    mean, std = IMAGENET_MEAN, IMAGENET_STD
    if backbone.in_channels != 3:  # ours: [0, 1] becomes [-2, 2], about what it is for ImageNet
        mean, std = (0.5,) * backbone.in_channels, (0.25,) * backbone.in_channels
    backbone.preprocessing = Preprocessing((height, width), max(height, width), mean, std)
    return backbone


def _pixel_backbone(options: dict[str, Any]) -> PixelBackbone:
    known = inspect.signature(PixelBackbone).parameters
    for name, value in options.items():
        if name not in known or not isinstance(value, int) or value < 1:
            allowed = ", ".join(known)
            raise ValueError(f"pixels was given {name}={value}; it takes numbers for {allowed}")
    return PixelBackbone(**options)


def _parse_options(query: str) -> dict[str, Any]:
    """{"a": 1, "b": True, "c": [64, 96], "d": "rope"} for "a=1&b=true&c=64x96&d=rope"."""
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True) if query else []
    except ValueError as error:
        raise ValueError(f"{query!r} is not of the form option=value&option=value") from error
    return {name: _parse_value(text) for name, text in pairs}


def _parse_value(text: str) -> Any:
    if re.fullmatch(r"\d+x\d+", text):
        return [int(side) for side in text.split("x")]
    try:
        return json.loads({"None": "null"}.get(text, text.lower()))
    except json.JSONDecodeError:
        return text


def _kept_folder(run: Path, mark: str) -> Path:
    """RUN/best, or the snapshot of a step."""
    if not run.is_dir():
        raise FileNotFoundError(f"model {run}@{mark}: there is no run folder {run}")
    if mark == "best":
        if not (run / "best").is_dir():
            raise FileNotFoundError(f"run {run} has no best/, which a run with probes keeps")
        return run / "best"
    steps = {int(path.name): path for path in (run / "snapshots").glob("*") if path.name.isdigit()}
    if not mark.isdigit() or int(mark) not in steps:
        kept = ", ".join(map(str, sorted(steps))) or "none (checkpoint.snapshot sets how often)"
        raise FileNotFoundError(f"run {run} has no snapshot {mark!r}; kept are {kept}")
    return steps[int(mark)]
