"""Weights for other software: Hugging Face, timm, Meta's code and ONNX, each with a model card.

    python export.py --model runs/quickstart --format hf --output exported/hf
    python export.py --model runs/quickstart --format timm --output exported/timm
    python export.py --model runs/quickstart --format meta --output exported/meta
    python export.py --model runs/quickstart --format onnx --output exported/onnx --dynamic-batch

What a format cannot hold is named on standard error and in the card. A model without a counterpart
in a format is refused.
"""

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from engine.cli import print_result, run_script
from errors import UserError
from models.features import Preprocessing
from models.weights.load import find_weights, load_backbone
from models.weights.save import FORMATS, write_backbone

OPENED_BY = {
    "hf": 'transformers.AutoModel.from_pretrained("FOLDER")\n'
    'transformers.AutoImageProcessor.from_pretrained("FOLDER")',
    "timm": 'timm.create_model("local-dir:FOLDER", pretrained=True, num_classes=0)',
    "meta": 'torch.load("FOLDER/backbone.pth", weights_only=True)  '
    "# the state_dict of the authors' VisionTransformer",
    "own": 'models.load_backbone("FOLDER")',
    "onnx": 'onnxruntime.InferenceSession("FOLDER/model.onnx")'
    '.run(None, {"images": images})  # (B, C, H, W)',
}
# Of the weights that a model may have started from, by what their names contain; the first that
# fits.
LICENSES = {
    "dinov3": "DINOv3 License (https://ai.meta.com/resources/models-and-libraries/"
    "dinov3-license/), which binds derived weights too",
    "dinov2": "Apache-2.0",
    "dino": "Apache-2.0",
}


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
    parser.add_argument(
        "--model",
        required=True,
        help="a run folder, RUN@step, RUN@best, weights, random:vit_small ...",
    )
    parser.add_argument("--format", required=True, choices=[*FORMATS, "onnx"])
    parser.add_argument("--output", required=True, type=Path, help="folder for the files")
    parser.add_argument(
        "--size", type=int, nargs="+", help="onnx: image in pixels, one number or height width"
    )
    parser.add_argument(
        "--opset", type=int, default=18, help="onnx: version of its operators, from 18 on"
    )
    parser.add_argument(
        "--dynamic-batch", action="store_true", help="onnx: any number of images a call, not one"
    )
    arguments = parser.parse_args(argv)

    backbone = load_backbone(arguments.model)
    preprocessing = backbone.preprocessing
    result = {
        "task": "export",
        "model": arguments.model,
        "format": arguments.format,
        "output": str(arguments.output),
    }
    if arguments.format == "onnx":
        size = tuple(arguments.size or preprocessing.size)
        if len(size) > 2 or min(size) < 1:
            raise UserError(
                f"--size is {' '.join(map(str, size))}; give one number, or height and width, in "
                "pixels"
            )
        result |= write_onnx(
            backbone,
            arguments.output,
            (size[0], size[-1]),
            arguments.opset,
            arguments.dynamic_batch,
        )
        notes = []
    else:
        notes = write_backbone(backbone, preprocessing, arguments.output, arguments.format)
    for note in notes:
        print(f"{arguments.output}: {note}", file=sys.stderr)
    (arguments.output / "README.md").write_text(
        model_card(arguments.model, arguments.format, backbone, notes)
    )
    parameters = sum(parameter.numel() for parameter in backbone.parameters())
    files = sorted(path.name for path in arguments.output.iterdir())
    print_result(result | {"parameters": parameters, "not_held": notes, "files": files})


def write_onnx(
    backbone: nn.Module, folder: Path, size: tuple[int, int], opset: int, dynamic_batch: bool
) -> dict[str, Any]:
    """model.onnx with the outputs cls, registers (if there are any) and patches; compared with
    onnxruntime where that is installed.

    Raises:
        ImportError: if what torch.onnx needs is not installed.
        UserError: if the export fails, or onnxruntime computes something else.
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
    images = torch.randn(
        2 if dynamic_batch else 1,
        backbone.in_channels,
        *size,
        generator=torch.Generator().manual_seed(0),
    )
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
    images = (
        torch.cat([images, images.flip(-1)]) if dynamic_batch else images
    )  # another number than it was traced with
    return {
        "size": list(size),
        "opset": opset,
        "dynamic_batch": dynamic_batch,
        "max_error": onnx_error(path, model, images),
    }


@torch.no_grad()
def onnx_error(path: Path, model: nn.Module, images: Tensor) -> float | None:
    """The largest deviation of onnxruntime's outputs over the largest number in ours, None if it is
    not installed.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        print(f"{path} was not compared: the package onnxruntime is not installed", file=sys.stderr)
        return None
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = session.run(None, {"images": images.numpy()})
    pairs = [
        (torch.from_numpy(theirs), ours) for theirs, ours in zip(found, model(images), strict=True)
    ]
    error = max(((theirs - ours).abs().max() / ours.abs().max()).item() for theirs, ours in pairs)
    if not error < 1e-3:
        raise UserError(
            f"{path}: onnxruntime deviates from this backbone by {error:.1e} of the largest "
            "number, more than 1e-3"
        )
    return error


def model_card(spec: str, format: str, backbone: nn.Module, notes: list[str]) -> str:
    """README.md: how to open the files, how images are prepared, what the model was trained on,
    whose weights it started from.
    """
    recipe = run_config(spec)
    start = recipe.get("init") or ("none" if recipe else spec)
    known = (text for name, text in LICENSES.items() if name in str(start).lower())
    license = next(known, "unknown; that of the named weights holds")
    if start == "none" or str(start).startswith("random:"):
        license = "no other weights, so it is yours to choose"
    data = (recipe.get("data") or {}).get("train", "unknown")
    preprocessing: Preprocessing = backbone.preprocessing
    facts = {
        "Exported from": f"`{spec}`",
        "Architecture": ", ".join(f"{name}={value}" for name, value in backbone.config.items()),
        "Trained on": f"`{data}`",
        "Started from": f"`{start}`",
        "Licence of the starting weights": license,
        "Images": f"values in [0, 1]; short side to {preprocessing.resize} pixels "
        f"({preprocessing.interpolation}), centre crop "
        f"{' x '.join(map(str, preprocessing.size))}, mean {preprocessing.mean}, std "
        f"{preprocessing.std}",
        "Not held by this format": "; ".join(notes) or "nothing is lost",
    }
    lines = [f"- {title}: {text}" for title, text in facts.items()]
    card = [
        "# Vision backbone, self-supervised",
        "",
        "```python",
        OPENED_BY[format],
        "```",
        "",
        *lines,
    ]
    if recipe:
        card += [
            "",
            "Recipe:",
            "",
            "```yaml",
            yaml.safe_dump(recipe, sort_keys=False).rstrip(),
            "```",
        ]
    return "\n".join(card) + "\n"


def run_config(spec: str) -> dict[str, Any]:
    """The configuration of the run of ours that `spec` is of, {} if it is of none."""
    name = spec.partition("?")[0]
    if name == "pixels" or name.startswith(("random:", "timm:", "hf:")):
        return {}
    path = find_weights(name)
    for folder in list(path.resolve().parents)[:3]:
        if (folder / "config.yaml").is_file():
            return yaml.safe_load((folder / "config.yaml").read_text()) or {}
    return {}


if __name__ == "__main__":
    run_script(main)
