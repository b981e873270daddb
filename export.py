"""Writes weights for the software of others: Hugging Face, timm, Meta's code, ONNX.

    python export.py --model runs/quickstart --format hf --output exported/hf
    python export.py --model runs/quickstart --format timm --output exported/timm
    python export.py --model runs/quickstart --format meta --output exported/meta
    python export.py --model runs/quickstart --format onnx --output exported/onnx --dynamic-batch
    python export.py --model runs/quickstart --format hf --dtype float16 --output exported/half

README.md beside the weights is a model card and says how to read them. What a format cannot hold is
named on standard error and in the card. A model without a counterpart in a format is refused.
"""

import argparse
import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from engine.checkpoint import save_folder
from engine.cli import path_argument, print_result, run_script
from errors import UserError
from files import read_yaml_file, split_query
from models.alignment import text_files
from models.features import Preprocessing
from models.weights.load import find_weights, is_local, load_backbone
from models.weights.save import FORMATS, write_backbone

# How to read the files of a format.
USAGE = {
    "hf": 'transformers.AutoModel.from_pretrained("FOLDER")\n'
    'transformers.AutoImageProcessor.from_pretrained("FOLDER")',
    "timm": 'timm.create_model("local-dir:FOLDER", pretrained=True, num_classes=0)',
    "meta": 'torch.load("FOLDER/backbone.pth", weights_only=True)  '
    "# the state_dict of the authors' VisionTransformer",
    "own": 'models.load_backbone("FOLDER")',
    "onnx": 'onnxruntime.InferenceSession("FOLDER/model.onnx").run(None, {"images": images})  '
    "# (B, C, H, W)",
}
DINOV3 = (
    "DINOv3 License (https://ai.meta.com/resources/models-and-libraries/dinov3-license/), "
    "which binds derived weights too"
)
# Of weights that a model may have started from, by a name in a hub (regular expressions).
LICENSES = {
    r"(hf:)?facebook/dinov3-.*|timm:.*[._]dinov3[._].*": DINOV3,
    r"(hf:)?facebook/(dinov2|dino)-.*|timm:.*[._]dinov2[._].*|timm:.*\.dino": "Apache-2.0",
}
DTYPES = ("float32", "float16", "bfloat16")
UNKNOWN = "unknown; that of the named weights holds"


class Outputs(nn.Module):
    """A backbone whose tensors come as a tuple; without registers these are left out."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone
        registers = getattr(backbone, "num_registers", 0)
        self.names = ["cls", "registers", "patches"] if registers else ["cls", "patches"]

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        features = self.backbone(images)
        return tuple(getattr(features, name) for name in self.names)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    model_help = "a run folder, RUN@step, RUN@best, weights, random:vit_small ..."
    add("--model", required=True, help=model_help)
    add("--format", required=True, choices=[*FORMATS, "onnx"])
    add("--output", required=True, type=path_argument, help="folder for the files")
    dtype_help = "of the written numbers, not for onnx; loading gives float32 (float32)"
    add("--dtype", choices=DTYPES, default="float32", help=dtype_help)
    add("--size", type=int, nargs="+", help="onnx: one number, or height and width, in pixels")
    add("--opset", type=int, default=18, help="onnx: version of its operators, from 18 on")
    batch_help = "onnx: any number of images a call, not one"
    add("--dynamic-batch", action="store_true", help=batch_help)
    arguments = parser.parse_args(argv)

    spec, format, folder = arguments.model, arguments.format, arguments.output
    backbone = load_backbone(spec)
    result = {"task": "export", "model": spec, "format": format, "output": str(folder)}
    size = ()
    if format == "onnx" and arguments.dtype != "float32":
        raise UserError(f"--dtype {arguments.dtype} goes with the other formats; onnx is float32")
    store_as(backbone, getattr(torch, arguments.dtype))
    if format == "onnx":
        size = tuple(arguments.size or backbone.preprocessing.size)
        if len(size) > 2 or min(size) < 1:
            given = " ".join(map(str, size))
            raise UserError(f"--size is {given}; give one number, or height and width, in pixels")
        size = (size[0], size[-1])
    notes: list[str] = []

    def write(unfinished: Path) -> None:
        if format == "onnx":
            options = size, arguments.opset, arguments.dynamic_batch
            result.update(write_onnx(backbone, unfinished, *options))
        else:
            notes.extend(write_backbone(backbone, backbone.preprocessing, unfinished, format))
        if format in ("hf", "own"):  # eval_text.py reads such a folder
            for file in text_files(spec):
                shutil.copy(file, unfinished)
        (unfinished / "README.md").write_text(model_card(spec, format, backbone, notes))

    save_folder(folder, write)
    for note in notes:
        print(f"{folder}: {note}", file=sys.stderr)
    parameters = sum(parameter.numel() for parameter in backbone.parameters())
    files = sorted(path.name for path in folder.iterdir())
    print_result(result | {"parameters": parameters, "not_held": notes, "files": files})


def store_as(backbone: nn.Module, dtype: torch.dtype) -> None:
    """Casts the parameters. Buffers, such as periods of rotary positions, keep their digits.

    Raises:
        UserError: if a number lies beyond the largest of `dtype`.
    """
    for name, parameter in backbone.named_parameters():
        cast = parameter.data.to(dtype)
        if cast.isinf().any() and not parameter.isinf().any():
            raise UserError(
                f"{name} has numbers too large for {dtype}; --dtype bfloat16 holds them"
            )
        parameter.data = cast


def write_onnx(
    backbone: nn.Module, folder: Path, size: tuple[int, int], opset: int, dynamic_batch: bool
) -> dict[str, Any]:
    """Writes model.onnx with the outputs cls, registers (if there are any) and patches.

    Compares it with onnxruntime where that is installed.

    Raises:
        UserError: if what torch.onnx needs is not installed, the export fails, or onnxruntime
            computes something else.
    """
    for package in ("onnx", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"--format onnx needs the package {package}, which is not installed: pip install "
                "onnx onnxscript"
            )
    if opset < 18:
        raise UserError(f"--opset is {opset}; it must be at least 18")
    folder.mkdir(parents=True, exist_ok=True)
    path, model = folder / "model.onnx", Outputs(backbone).eval()
    shape = (2 if dynamic_batch else 1, backbone.in_channels, *size)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    shapes = {"images": {0: torch.export.Dim("batch")}} if dynamic_batch else None
    try:
        with torch.no_grad():
            torch.onnx.export(
                model,
                (images,),
                path,
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=shapes,
                verbose=False,
                input_names=["images"],
                output_names=model.names,
                external_data=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise UserError(f"torch.onnx cannot export this backbone: {error}") from error
    if dynamic_batch:  # compare another number of images than it was traced with
        images = torch.cat([images, images.flip(-1)])
    error = onnx_error(path, model, images)
    facts = {"size": list(size), "opset": opset, "dynamic_batch": dynamic_batch}
    return facts | {"max_error": error}


@torch.no_grad()
def onnx_error(path: Path, model: nn.Module, images: Tensor) -> float | None:
    """The largest deviation of onnxruntime's outputs, over the largest number in ours.

    None if onnxruntime is not installed.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        print(f"{path} was not compared: the package onnxruntime is not installed", file=sys.stderr)
        return None
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = session.run(None, {"images": images.numpy()})
    errors = []
    for theirs, ours in zip(found, model(images), strict=True):
        deviation = (torch.from_numpy(theirs) - ours).abs().max()
        errors.append((deviation / ours.abs().max()).item())
    error = max(errors)
    if not error < 1e-3:
        raise UserError(
            f"{path}: onnxruntime deviates from this backbone by {error:.1e} of the largest "
            "number, more than 1e-3"
        )
    return error


def model_card(spec: str, format: str, backbone: nn.Module, notes: list[str]) -> str:
    """README.md: how to read the files and prepare images, and what the weights come from."""
    recipe = run_config(spec)
    start = str(recipe.get("init") or ("none" if recipe else spec))
    data = (recipe.get("data") or {}).get("train", "unknown")
    preprocessing: Preprocessing = backbone.preprocessing
    crop = " x ".join(map(str, preprocessing.size))
    channels, scale = len(preprocessing.mean), preprocessing.scale
    facts = {
        "Exported from": f"`{spec}`",
        "Architecture": ", ".join(f"{name}={value}" for name, value in backbone.config.items()),
        "Trained on": f"`{data}`",
        "Started from": f"`{start}`",
        "Licence of the starting weights": license_of(start),
        "Images": f"{channels} channels, values from 0 to {scale:g} scaled to [0, 1]; "
        f"short side to {preprocessing.resize} pixels "
        f"({preprocessing.interpolation}), centre crop {crop}, mean {preprocessing.mean}, "
        f"std {preprocessing.std}"
        + (f"; window (centre, width) {preprocessing.window}" if preprocessing.window else "")
        + (f"; scale={preprocessing.asked_of_data()['scale']}" if preprocessing.span else ""),
        "Not held by this format": "; ".join(notes) or "nothing is lost",
    }
    if format == "hf":
        facts["Its image processor"] = processor_notes(channels, scale, preprocessing.window)
    card = ["# Vision backbone, self-supervised", "", "```python", USAGE[format], "```", ""]
    card += [f"- {title}: {text}" for title, text in facts.items()]
    if recipe:
        text = yaml.safe_dump(recipe, sort_keys=False).rstrip()
        card += ["", "Recipe:", "", "```yaml", text, "```"]
    return "\n".join(card) + "\n"


def processor_notes(channels: int, scale: float, window: tuple[float, float] | None = None) -> str:
    """What a user of AutoImageProcessor has to know beside its files."""
    text = f"for images from 0 to {scale:g}; others need `rescale_factor` = 1 / their largest value"
    if window:
        text += f"; clip values to the window (centre {window[0]:g}, width {window[1]:g}) before"
    text += "; its centre crop lies half a pixel off where the margin is odd"
    if channels not in (1, 3):
        text += '; give tensors (C, H, W) and `input_data_format="channels_first"`'
    return text


def license_of(start: str, followed: tuple[str, ...] = ()) -> str:
    """The licence of the weights that training started from, from what is known for certain.

    Names in hubs are, and what a run or a config.json says of its own start; a path says nothing.
    """
    name = split_query(start)[0]
    if name == "none" or name.startswith("random:"):
        return "no other weights, so it is yours to choose"
    for pattern, text in LICENSES.items():
        if re.fullmatch(pattern, name):
            return text
    if not is_local(name) or name in followed:
        return UNKNOWN
    try:
        recipe, path = run_config(name), find_weights(name)
    except (OSError, UserError):  # it is gone
        return UNKNOWN
    if recipe:
        return license_of(str(recipe.get("init") or "none"), (*followed, name))
    file = (path if path.is_dir() else path.parent) / "config.json"
    config = json.loads(file.read_text()) if path.is_dir() and file.is_file() else {}
    origin = str(config.get("_name_or_path", ""))
    if origin.startswith("facebook/"):
        return license_of(f"hf:{origin}")
    kind = str(config.get("model_type", ""))
    text = DINOV3 if kind.startswith("dinov3") else "Apache-2.0" if "dinov2" in kind else None
    return f"{text}, if these are Meta's weights: config.json says {kind}" if text else UNKNOWN


def run_config(spec: str) -> dict[str, Any]:
    """The configuration of the run of ours to which `spec` belongs, {} if there is none."""
    name = split_query(spec)[0]
    if not is_local(name):
        return {}
    path = find_weights(name)
    for folder in list(path.resolve().parents)[:3]:
        if (folder / "config.yaml").is_file():
            return read_yaml_file(folder / "config.yaml") or {}
    return {}


if __name__ == "__main__":
    run_script(main)
