"""Training from weights that exist: `init: MODEL` fills backbone and, where a run of ours brings them, heads."""

from pathlib import Path

from torch import nn

from models.pretrained import load_backbone, load_heads
from models.reading import load_tensors
from models.ssl_model import SSLModel

# Settings of a VisionTransformer that change no function of the weights: training only, or taken over from the weights.
FREE = {"drop_path", "drop_path_shape", "mask_token", "image_size", "interpolation", "rope_shift", "rope_jitter", "rope_rescale", "fit"}


def load_initial(spec: str | Path, channels: int) -> nn.Module:
    """The backbone of a MODEL with `channels` input channels (see `models.channels` on how they are adapted)."""
    joint = "&" if "?" in str(spec) else "?"
    return load_backbone(f"{spec}{joint}channels={channels}")


def start_from(model: SSLModel, initial: nn.Module, spec: str | Path) -> str:
    """Copies the weights of `initial` into `model`, and the heads beside them where their shapes fit.

    Returns:
        What became of the heads, in words.

    Raises:
        ValueError: if the two backbones are not the same function of their weights, with the settings that differ.
    """
    own, given = model.backbone.config, initial.config
    names = [name for name in given if name not in FREE and own.get(name) != given[name]]
    if {"layerscale"} <= set(names) and None not in (own["layerscale"], given["layerscale"]):
        names.remove("layerscale")  # an initial value, which the weights replace
    if names:
        settings = ", ".join(f"{name} {given[name]} (here {own.get(name)})" for name in names)
        raise ValueError(f"{spec} is another backbone than model: says; the weights have {settings}")
    tensors = initial.state_dict()
    if model.backbone.config.get("mask_token") is False:
        tensors.pop("mask_token", None)
    elif "mask_token" in model.backbone.state_dict():
        tensors.setdefault("mask_token", model.backbone.mask_token.detach())
    load_tensors(model.backbone, tensors, str(spec))

    heads = load_heads(spec)
    state = model.state_dict()
    wanted = [name for name in state if not name.startswith("backbone.")]
    fitting = {name: heads[name] for name in wanted if name in heads and heads[name].shape == state[name].shape}
    model.load_state_dict(fitting, strict=False)
    if not heads:
        return "the heads start at random: these weights bring none"
    return f"{len(fitting)} of {len(wanted)} head tensors come along" + ("" if len(fitting) == len(wanted) else "; the others start at random")
