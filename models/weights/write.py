"""What writers of all formats share: tensors under other names, and notes on what is lost."""

from typing import Any

import torch
from torch import Tensor

from errors import UserError
from models.timm_backbone import TimmBackbone
from models.vit import VisionTransformer
from models.weights.dialect import Dialect
from models.weights.read import kinds, own_of_fork
from models.weights.shapes import CONVNEXT_SIZES

Converted = tuple[dict[str, Tensor], dict[str, Any], list[str]]  # tensors, config.json, notes


def rename(state: dict[str, Tensor], dialect: Dialect) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors under the dialect's names, and the names of those that it does not hold.

    Raises UserError if rows that the dialect leaves out as zeros are not zeros.
    """
    renamed, dropped = {}, []
    for name, tensor in state.items():
        names = dialect.names(name)
        if names is None:
            dropped.append(name)
            continue
        for part, rows in zip(names, tensor.chunk(len(names)), strict=True):
            if part:
                renamed[part] = rows
            elif rows.any():
                raise UserError(
                    f"{name} has rows other than zeros, which {dialect.name} does not hold"
                )
    return renamed, dropped


def complete(backbone: VisionTransformer, **options: Any) -> tuple[dict[str, Tensor], list[str]]:
    """The weights with the tensors that `options` add, and a note that names these.

    Raises UserError for tensors that a fork added: no other software computes with them.

    Added tensors change nothing: LayerScales are ones; biases and mask tokens are zeros. Biases
    of keys that a mask switches off become zeros, for formats that have no such mask.
    """
    if own := own_of_fork(backbone):
        raise UserError(
            f"only our own format holds {', '.join(kinds(own))}; others would compute without it"
        )
    with torch.device("meta"):
        larger = VisionTransformer(**{**backbone.config, **options})
    state = {name: tensor.detach() for name, tensor in backbone.state_dict().items()}
    added = {name: t.shape for name, t in larger.state_dict().items() if name not in state}
    for name, shape in added.items():
        state[name] = state["cls_token"].new_full(shape, name.endswith(".gamma"))
    for name in state:
        if name.endswith(".bias_mask"):
            bias = name.removesuffix("_mask")
            state[bias] = state[bias] * state[name].to(state[bias].dtype)
    return state, [f"added without effect: {', '.join(kinds(added))}"] if added else []


def require(options: dict[str, Any], format: str, **allowed: Any) -> None:
    """Raises UserError for an option whose value the format has no place for."""
    for name, values in allowed.items():
        values = values if isinstance(values, tuple) else (values,)
        if options[name] not in values:
            wanted = " or ".join(map(str, values))
            raise UserError(
                f"{name}={options[name]} has no counterpart in {format}, which needs {wanted}"
            )


def list_losses(
    backbone: VisionTransformer, dropped: list[str], interpolation: str | None
) -> list[str]:
    """Notes on what the written files do not tell; `interpolation` is what the format does."""
    options, notes = backbone.config, []
    lost = kinds(name for name in dropped if not name.endswith(".bias_mask"))
    if "rope.periods" in lost:
        lost.remove("rope.periods")  # the format computes them
        quarter = len(backbone.rope.periods)
        exact = backbone.rope.base ** (torch.arange(quarter) / quarter)
        if not torch.allclose(backbone.rope.periods.cpu().float(), exact, rtol=1e-5, atol=0):
            notes.append(
                "its rotary periods are rounded, there they are computed exactly, so features "
                "differ slightly"
            )
    if lost:
        notes.append(f"not held: {', '.join(lost)}")
    here = options["interpolation"]
    if options["positions"] == "learned" and interpolation not in (None, here):
        notes.append(
            "at other sizes than the native one, positions are resized by "
            f"{interpolation!r} there, here by {here!r}"
        )
    if options["fit"] != "crop":
        notes.append("sides that the patch size does not divide are cropped there, here padded")
    return notes


def convnext_sizes(backbone: TimmBackbone) -> tuple[list[int], list[int]]:
    """Depths and widths.

    Raises UserError if the model differs from DINOv3's ConvNeXts in more than these.
    """
    options = backbone.config
    known = {"name", "in_channels", "depths", "dims", "drop_path_rate"}
    odd = ", ".join(sorted(set(options) - known))
    if odd:
        raise UserError(f"a ConvNeXt with {odd} has no counterpart outside timm")
    depths, dims = CONVNEXT_SIZES[options["name"].partition(".")[0]]
    return list(options.get("depths", depths)), list(options.get("dims", dims))
