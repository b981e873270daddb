"""`load_backbone(MODEL)`: backbones from disk, from hubs, or untrained.

MODEL is one of
- a run folder (its newest teacher), RUN@STEP, RUN@best;
- a folder or file of weights in any dialect (ours, Meta's `.pth`, Hugging Face's, timm's), which is
  found from the names of its tensors and its config.json;
- hf:org/name; timm:NAME; random:vit_small?patch_size=16&seed=0; pixels?patch_size=8.
A query such as `?channels=1` or `?interpolation=offset` sets the number of input channels (with
`&inflate=mean|repeat|zero` for more of them: models/channels.py), and options of
`VisionTransformer` that weights do not fix.
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
from files import expand, split_query
from models.channels import adapt_channels
from models.features import Preprocessing
from models.pixels import PixelBackbone
from models.vit import VisionTransformer, build_backbone
from models.weights.files import WEIGHT_FILES, read_weights
from models.weights.foreign import read_backbone
from models.weights.meta import IMAGENET_MEAN, IMAGENET_STD
from models.weights.own import is_own, read_own

ALLOWED = (
    "a run folder, RUN@STEP, RUN@best, a folder or file of weights, hf:org/name, timm:NAME, "
    "random:NAME?option=value and pixels?patch_size=8"
)


def load_backbone(spec: str | Path) -> nn.Module:
    """The backbone that `spec` names, in eval mode on the CPU, with its `preprocessing`.

    Prints to standard error how many of the backbone's tensors the file holds.

    Raises:
        FileNotFoundError: if there is no such folder, snapshot or file.
        UserError: if the spec is not understood, or the weights do not cover the backbone exactly.
    """
    name, query = split_query(str(spec))
    options = _parse_options(query)
    if name == "pixels":
        return _pixel_backbone(options).eval()
    channels, inflate = options.pop("channels", None), options.pop("inflate", None)
    if name.startswith("random:"):
        backbone = _random_backbone(name.removeprefix("random:"), options)
    elif name.startswith("timm:"):
        backbone = build_backbone(name, **{"pretrained": True, **options})
        backbone.preprocessing = backbone.native_preprocessing
        count = len(backbone.state_dict())  # timm loads all or none
        print(f"{name}: matched {count} / {count} tensors", file=sys.stderr)
    else:
        backbone = _read_path(find_weights(name), options)
    if channels is not None or inflate is not None:
        adapt_channels(backbone, backbone.in_channels if channels is None else channels, inflate)
    return backbone.eval()


def load_heads(spec: str | Path) -> dict[str, Tensor]:
    """The projection heads of a run of ours, by their names in `SSLModel`; {} if there are none.

    Raises:
        FileNotFoundError: if there is no such folder or file.
        UserError: if the file is damaged.
    """
    name = split_query(str(spec))[0]
    if not is_local(name):
        return {}
    path = find_weights(name)
    path = (path if path.is_dir() else path.parent) / "heads.safetensors"
    return read_weights(path) if path.is_file() else {}


def is_local(name: str) -> bool:
    """Whether a MODEL, without its query, names a file or folder on this machine."""
    return name != "pixels" and not name.startswith(("random:", "timm:", "hf:"))


def find_weights(spec: str) -> Path:
    """The file of weights, or the folder with config.json and weights, that a MODEL stands for.

    Raises:
        FileNotFoundError: if there is none, with what is there.
    """
    if spec.startswith("hf:"):
        return _fetch(spec.removeprefix("hf:"))
    path = expand(spec)
    if not path.exists() and "@" in path.name:
        run, _, mark = str(path).rpartition("@")
        path = _kept_folder(Path(run), mark)
    if (path / "teacher").is_dir():
        path = path / "teacher"
    if path.is_file() or (path / "config.json").is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"model {spec!r}: {path} does not exist; allowed are {ALLOWED}")
    if {file.suffix for file in path.glob("*")} & {".safetensors", ".pth", ".pt"}:
        return path
    raise FileNotFoundError(
        f"model {spec!r}: {path} has neither config.json nor teacher/ nor weights; allowed are "
        f"{ALLOWED}"
    )


def _read_path(path: Path, options: dict[str, Any]) -> nn.Module:
    if path.is_dir() and is_own(path):
        return read_own(path, options)
    if path.name in WEIGHT_FILES and is_own(path.parent):
        return read_own(path.parent, options)
    return read_backbone(path, options)


def _fetch(name: str) -> Path:
    """A snapshot of a Hugging Face repository, from the cache where it is there."""
    try:
        for patterns in (["*.json", "*.safetensors"], ["*.json", "*.bin", "*.pth"]):
            folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
            if any(folder.glob("*.safetensors")):
                break
        return folder
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        reason = str(error).partition("\n")[0]
        raise FileNotFoundError(
            f"hf:{name} could not be fetched ({reason}); offline, name a folder with its files"
        ) from error


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


# ----------------------------------------------------------------- without weights


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


# ----------------------------------------------------------------- the query


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
