"""Training from weights that exist: `init: MODEL` fills backbone and, where a run of ours brings them, heads."""

import sys
from pathlib import Path
from typing import Any

from torch import nn

from errors import UserError
from models.ssl_model import SSLModel, build_ssl_model
from models.vit import build_backbone
from models.weights.load import load_backbone, load_heads
from models.weights.read import load_tensors

# Settings of a VisionTransformer that change no function of the weights: training only, or taken over from the weights.
FREE = {
    "drop_path",
    "drop_path_shape",
    "mask_token",
    "image_size",
    "interpolation",
    "rope_shift",
    "rope_jitter",
    "rope_rescale",
    "fit",
}


def load_initial(spec: str | Path, channels: int) -> nn.Module:
    """The backbone of a MODEL with `channels` input channels (see `models.channels` on how they are adapted)."""
    joint = "&" if "?" in str(spec) else "?"
    return load_backbone(f"{spec}{joint}channels={channels}")


def build_student(cfg: Any, masked: bool, initial: nn.Module | None = None) -> SSLModel:
    """Backbone and heads as a training configuration says, with the weights of `initial`.

    Args:
        cfg: with the sections `model`, `loss`, `data.channels` and `crops.global_size`, and the spec `init`.
        masked: whether patches are hidden in any step, for which there is a mask token.
    """
    options = {
        name: value
        for name, value in vars(cfg.model).items()
        if name != "arch" and value is not None
    }
    options["in_channels"] = cfg.data.channels
    if cfg.model.arch.startswith("timm:"):
        backbone = build_backbone(cfg.model.arch, in_channels=cfg.data.channels)
    else:
        grid = {"image_size": cfg.crops.global_size}  # for which learned positions are made
        if initial is not None:
            grid = {
                name: initial.config[name]
                for name in ("image_size", "interpolation")
                if name in initial.config
            }
        backbone = build_backbone(cfg.model.arch, **options, **grid, mask_token=masked)
    dino, ibot = cfg.loss.dino, cfg.loss.ibot
    own_ibot_head = masked and ibot.prototypes is not None
    model = build_ssl_model(backbone, dino, ibot if own_ibot_head else None, dino.last_layer)
    if initial is not None:
        start_from(model, initial, cfg.init)
    return model


def start_from(model: SSLModel, initial: nn.Module, spec: str | Path) -> None:
    """Copies the weights of `initial` into `model`, and the heads beside them where their shapes fit; says so on standard
    error.

    Raises:
        UserError: if the two backbones are not the same function of their weights, with the settings that differ.
    """
    own, given = model.backbone.config, initial.config
    names = [name for name in given if name not in FREE and own.get(name) != given[name]]
    if {"layerscale"} <= set(names) and None not in (own["layerscale"], given["layerscale"]):
        names.remove("layerscale")  # an initial value, which the weights replace
    if names:
        settings = ", ".join(f"{name} {given[name]} (here {own.get(name)})" for name in names)
        raise UserError(f"{spec} is another backbone than model: says; the weights have {settings}")
    tensors = initial.state_dict()
    if model.backbone.config.get("mask_token") is False:
        tensors.pop("mask_token", None)
    elif "mask_token" in model.backbone.state_dict():
        tensors.setdefault("mask_token", model.backbone.mask_token.detach())
    load_tensors(model.backbone, tensors, str(spec))

    heads = load_heads(spec)
    state = model.state_dict()
    wanted = [name for name in state if not name.startswith("backbone.")]
    fitting = {
        name: heads[name]
        for name in wanted
        if name in heads and heads[name].shape == state[name].shape
    }
    model.load_state_dict(fitting, strict=False)
    said = (
        f"{len(fitting)} of {len(wanted)} head tensors come along"
        + "; the others start at random" * (len(fitting) < len(wanted))
    )
    print(
        f"{spec}: {said if heads else 'the heads start at random: these weights bring none'}",
        file=sys.stderr,
    )
