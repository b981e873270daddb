"""DINOv3's ConvNeXts, which are timm's: which one a file holds."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from errors import UserError
from models.weights.dialects import Dialect

# Depths and widths of timm's names, which DINOv3 took over.
SIZES = {
    "convnext_tiny": ((3, 3, 9, 3), (96, 192, 384, 768)),
    "convnext_small": ((3, 3, 27, 3), (96, 192, 384, 768)),
    "convnext_base": ((3, 3, 27, 3), (128, 256, 512, 1024)),
    "convnext_large": ((3, 3, 27, 3), (192, 384, 768, 1536)),
}


def convnext_options(
    tensors: Mapping[str, Tensor], dialect: Dialect, config: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments of `TimmBackbone`, by config.json where it tells them, else by the shapes.

    Raises:
        UserError: if the tensors that tell are missing, or the model does what timm's does not.
    """
    if "architecture" in config:
        arguments = {
            key: value
            for key, value in (config.get("model_args") or {}).items()
            if key != "num_classes"
        }
        return {
            "name": config["architecture"].partition(".")[0],
            "in_channels": arguments.pop("in_chans", 3),
            **arguments,
        }
    if "hidden_sizes" in config:
        if config.get("layer_norm_eps", 1e-6) != 1e-6 or config.get("hidden_act", "gelu") != "gelu":
            raise UserError(
                "config.json asks for layer_norm_eps or hidden_act other than 1e-6 and gelu, which ConvNeXt has"
            )
        depths, dims = tuple(config.get("depths", (3, 3, 9, 3))), tuple(config["hidden_sizes"])
        return {**size_options(depths, dims), "in_channels": config.get("num_channels", 3)}
    stem = tensors.get(dialect.names("model.stem.0.weight")[0])
    if stem is None:
        raise UserError(f"the first convolution is not among the weights ({dialect.name})")
    depths, dims = [], []
    for stage in range(4):
        scales = dialect.find(f"model.stages.{stage}.blocks.#.gamma", tensors)
        if not scales:
            raise UserError(
                f"stage {stage} of the ConvNeXt has no `gamma` among the weights ({dialect.name})"
            )
        depths.append(1 + max(scales))
        dims.append(len(tensors[scales[max(scales)]]))
    return {**size_options(tuple(depths), tuple(dims)), "in_channels": stem.shape[1]}


def size_options(depths: tuple[int, ...], dims: tuple[int, ...]) -> dict[str, Any]:
    """timm's name, with depths and widths of their own where it has none for these."""
    for name, size in SIZES.items():
        if size == (depths, dims):
            return {"name": name}
    return {"name": "convnext_tiny", "depths": list(depths), "dims": list(dims)}
