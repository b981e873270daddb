"""Backbones to disk, in our format and in those of others: `write_backbone` and `save_model`."""

from pathlib import Path

from torch import nn

from errors import UserError
from models.features import Preprocessing
from models.lora import merged_copy
from models.ssl_model import SSLModel, save_heads
from models.timm_backbone import TimmBackbone
from models.vit import VisionTransformer
from models.weights import hugging_face, meta, processors, timm
from models.weights.files import write_json, write_tensors
from models.weights.own import save_backbone, save_teacher
from models.weights.shapes import CONVNEXT_SIZES

CONVERTERS = {"hf": hugging_face.convert, "timm": timm.convert, "meta": meta.convert}
FORMATS = ("own", *CONVERTERS)
META_FILE = "backbone.pth"


def write_backbone(
    backbone: nn.Module, preprocessing: Preprocessing, folder: str | Path, format: str
) -> list[str]:
    """Writes files that the software of that format reads; returns what the format cannot hold.

    Args:
        format: "hf": config.json, model.safetensors and preprocessor_config.json for transformers'
            AutoModel and AutoImageProcessor. "timm": config.json and model.safetensors for
            `timm.create_model("local-dir:FOLDER", pretrained=True)`. "meta": backbone.pth with
            the names of the authors' files. "own": what `load_backbone` rebuilds exactly.

    Raises:
        UserError: if the format is unknown, or has no model like this one.
    """
    if format not in FORMATS:
        raise UserError(f"format is {format!r}; it must be one of {', '.join(FORMATS)}")
    folder = Path(folder)
    if format == "own":
        save_backbone(backbone, folder, preprocessing)
        return []
    _check_counterpart(backbone, format)
    tensors, config, notes = CONVERTERS[format](backbone, preprocessing)
    folder.mkdir(parents=True, exist_ok=True)
    if format == "meta":
        write_tensors(folder / META_FILE, tensors)
        return notes
    write_json(folder / "config.json", config)
    write_tensors(folder / "model.safetensors", tensors)
    if format == "hf":
        values = processors.write_preprocessing(preprocessing)
        write_json(folder / "preprocessor_config.json", values)
    return notes


def save_model(model: SSLModel, folder: str | Path, preprocessing: Preprocessing) -> None:
    """As `save_teacher`, with adapters merged into the weights, and the heads beside them."""
    save_teacher(merged_copy(model.backbone), folder, preprocessing)
    save_heads(model, Path(folder))


def _check_counterpart(backbone: nn.Module, format: str) -> None:
    if isinstance(backbone, VisionTransformer):
        return
    if not isinstance(backbone, TimmBackbone):
        raise UserError(f"a {type(backbone).__name__} has no counterpart in the format {format}")
    name = backbone.config["name"]
    if format != "timm" and name.partition(".")[0] not in CONVNEXT_SIZES:
        raise UserError(
            f"timm:{name} has no counterpart in the format {format}; allowed are own and timm"
        )
