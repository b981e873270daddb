"""Backbones from and to disk: `load_backbone(MODEL)` and `save_backbone`.

MODEL is one of: a run folder (its newest teacher), RUN@STEP, RUN@best; a folder or file of weights in any dialect (own, Meta's
`.pth`, Hugging Face, timm), which is found from the names of its tensors and its config.json; hf:org/name; timm:NAME;
random:vit_small?patch_size=16&seed=0; pixels?patch_size=8. A query such as `?channels=1` or `?interpolation=offset` sets the
number of input channels and options of `VisionTransformer` that weights do not fix.
"""

import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import huggingface_hub
import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from torch import Tensor, nn

from errors import UserError
from models.channels import adapt_channels
from models.features import Preprocessing
from models.pixels import PixelBackbone
from models.preprocessing import IMAGENET_MEAN, IMAGENET_STD, from_hugging_face, to_hugging_face
from models.vit import VisionTransformer, build_backbone
from models.weights.files import WEIGHT_FILES, read_json, read_weights, write_json, write_tensors
from models.weights.read import check_options, load_tensors, read_backbone

ALLOWED = (
    "a run folder, RUN@STEP, RUN@best, a folder or file of weights, hf:org/name, timm:NAME, "
    "random:NAME?option=value and pixels?patch_size=8"
)
MODEL_TYPE = "nanodino"


def load_backbone(spec: str | Path) -> nn.Module:
    """The backbone that `spec` names, in eval mode on the CPU, with its `preprocessing`.

    Prints how many of the backbone's tensors the file holds to standard error.

    Raises:
        FileNotFoundError: if there is no such folder, snapshot or file.
        UserError: if the spec is not understood, or the weights do not cover the backbone exactly.
    """
    name, _, query = str(spec).partition("?")
    options = _parse_options(query)
    if name == "pixels":
        return _pixel_backbone(options).eval()
    channels = options.pop("channels", None)
    if name.startswith("random:"):
        backbone = _random_backbone(name.removeprefix("random:"), options)
    elif name.startswith("timm:"):
        backbone = build_backbone(name, **{"pretrained": True, **options})
        backbone.preprocessing = backbone.native_preprocessing
        count = len(backbone.state_dict())
        print(
            f"{name}: matched {count} / {count} tensors", file=sys.stderr
        )  # timm loads all or none
    else:
        path = find_weights(name)
        own = path.is_dir() and _is_own(path) or path.name in WEIGHT_FILES and _is_own(path.parent)
        backbone = (
            _read_own(path if path.is_dir() else path.parent, options)
            if own
            else read_backbone(path, options)
        )
    if channels is not None:
        adapt_channels(backbone, channels)
    return backbone.eval()


def load_heads(spec: str | Path) -> dict[str, Tensor]:
    """The projection heads beside the backbone of a run of ours, by their names in `SSLModel`; {} where there are none.

    Raises:
        FileNotFoundError: if there is no such folder or file.
        UserError: if the file is damaged.
    """
    name = str(spec).partition("?")[0]
    if name == "pixels" or name.startswith(("random:", "timm:", "hf:")):
        return {}
    path = find_weights(name)
    path = (path if path.is_dir() else path.parent) / "heads.safetensors"
    return read_weights(path) if path.is_file() else {}


def find_weights(spec: str) -> Path:
    """The file, or the folder with config.json and weights, that a path, a run folder, RUN@STEP, RUN@best or hf:org/name
    stands for.

    Raises:
        FileNotFoundError: if there is none, with what is there.
    """
    if spec.startswith("hf:"):
        return _fetch(spec.removeprefix("hf:"))
    path = Path(spec).expanduser()
    if not path.exists() and "@" in path.name:
        run, _, mark = str(path).rpartition("@")
        path = _kept_folder(Path(run), mark)
    if (path / "teacher").is_dir():
        path = path / "teacher"
    suffixes = {file.suffix for file in path.glob("*")} if path.is_dir() else set()
    if (
        not path.is_file()
        and not (path / "config.json").is_file()
        and not suffixes & {".safetensors", ".pth", ".pt"}
    ):
        found = (
            "has neither config.json nor teacher/ nor weights"
            if path.is_dir()
            else "does not exist"
        )
        raise FileNotFoundError(f"model {spec!r}: {path} {found}; allowed are {ALLOWED}")
    return path


def save_backbone(backbone: nn.Module, folder: str | Path, preprocessing: Preprocessing) -> None:
    """Writes config.json, preprocessor_config.json and model.safetensors: enough to rebuild it.

    Each file replaces the previous one at once, so a killed process leaves no half file.

    Raises:
        UserError: if `backbone` is neither a `VisionTransformer` nor a `TimmBackbone`.
    """
    if not hasattr(backbone, "config"):
        raise UserError(f"a {type(backbone).__name__} cannot be saved; it has no `config`")
    kind = "vit" if isinstance(backbone, VisionTransformer) else "timm"
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(
        folder / "config.json",
        {"model_type": MODEL_TYPE, "architecture": {"type": kind, **backbone.config}},
    )
    write_json(folder / "preprocessor_config.json", to_hugging_face(preprocessing))
    write_tensors(folder / "model.safetensors", backbone.state_dict())


# ----------------------------------------------------------------- kinds of specs


def _is_own(folder: Path) -> bool:
    path = folder / "config.json"
    return path.is_file() and read_json(path).get("model_type") == MODEL_TYPE


def _read_own(folder: Path, options: dict[str, Any]) -> nn.Module:
    path = folder / "config.json"
    try:
        backbone = _build_empty(**{**read_json(path)["architecture"], **options})
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} does not describe a backbone: {error}") from error
    load_tensors(backbone, read_weights(folder), str(folder))
    path = folder / "preprocessor_config.json"
    backbone.preprocessing = from_hugging_face(read_json(path), str(path))
    return backbone


def _build_empty(type: str, **options) -> nn.Module:
    if type == "timm":  # for real: timm's models have buffers that no file holds
        return build_backbone(f"timm:{options.pop('name')}", **options)
    if type != "vit":
        raise UserError(f"architecture.type is {type!r}; it must be vit or timm")
    check_options(options)
    with torch.device("meta"):  # the file has every tensor, and drawing billions first is slow
        return VisionTransformer(**options)


def _fetch(name: str) -> Path:
    """A snapshot of a Hugging Face repository, from the cache where it is there."""
    try:
        folder = Path(
            huggingface_hub.snapshot_download(name, allow_patterns=["*.json", "*.safetensors"])
        )
        if not any(folder.glob("*.safetensors")):
            folder = Path(
                huggingface_hub.snapshot_download(name, allow_patterns=["*.json", "*.bin", "*.pth"])
            )
        return folder
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        reason = str(error).partition("\n")[0]
        raise FileNotFoundError(
            f"hf:{name} could not be fetched ({reason}); offline, name a folder with its files"
        ) from error


def _random_backbone(arch: str, options: dict[str, Any]) -> nn.Module:
    """Untrained weights of `seed`; the caller's random state is neither used nor moved."""
    seed = options.pop("seed", 0)
    if not isinstance(seed, int):
        raise UserError(f"seed is {seed!r}; it must be a whole number")
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            backbone = build_backbone(arch, **options)
    except TypeError as error:
        raise UserError(f"random:{arch} cannot be built from its options: {error}") from error
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
            raise UserError(f"pixels was given {name}={value}; it takes numbers for {allowed}")
    return PixelBackbone(**options)


def _parse_options(query: str) -> dict[str, Any]:
    """{"a": 1, "b": True, "c": [64, 96], "d": "rope"} for "a=1&b=true&c=64x96&d=rope"."""
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True) if query else []
    except ValueError as error:
        raise UserError(f"{query!r} is not of the form option=value&option=value") from error
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
