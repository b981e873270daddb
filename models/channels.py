"""`adapt_channels`: a trained backbone for another number of input channels."""

import dataclasses

import torch
from torch import Tensor, nn

from errors import UserError
from models.features import Preprocessing


@torch.no_grad()
def adapt_channels(backbone: nn.Module, channels: int) -> nn.Module:
    """Changes the first convolution of `backbone`, in place, to take `channels`; returns it.

    Every new filter is the sum of the C old ones over `channels`. So a grey image, repeated for
    each channel, gives what it gave before.

    If the backbone has a `preprocessing`, that holds for images before each model's own
    normalisation. For this, filters and bias are first rewritten for one mean and one std on all
    channels, the averages of the old ones, which changes nothing for any image. These become the
    statistics of every new channel.

    Raises:
        UserError: if `channels` is below 1, or the first convolution pads or has no bias.
    """
    if not isinstance(channels, int) or isinstance(channels, bool) or channels < 1:
        raise UserError(f"channels is {channels!r}; it must be a whole number from 1 on")
    if channels == backbone.in_channels:
        return backbone
    conv = _first_convolution(backbone)
    preprocessing = getattr(backbone, "preprocessing", None)
    weight, bias = conv.weight, conv.bias
    if preprocessing is not None:
        weight, bias, mean, std = _with_equal_statistics(weight, bias, preprocessing)
        statistics = {"mean": (mean,) * channels, "std": (std,) * channels}
        backbone.preprocessing = dataclasses.replace(preprocessing, **statistics)
    shared = weight.double().sum(1, keepdim=True) / channels
    filters = shared.expand(-1, channels, -1, -1).to(conv.weight.dtype).contiguous()
    conv.weight = nn.Parameter(filters, conv.weight.requires_grad)
    conv.bias = nn.Parameter(bias.to(conv.bias.dtype), conv.bias.requires_grad)
    conv.in_channels = backbone.in_channels = channels
    backbone.config["in_channels"] = channels
    return backbone


def _with_equal_statistics(
    weight: Tensor, bias: Tensor, preprocessing: Preprocessing
) -> tuple[Tensor, Tensor, float, float]:
    """Filters and bias in float64 for images normalised with one mean and one std, and these."""
    means = torch.tensor(preprocessing.mean, dtype=torch.float64)
    stds = torch.tensor(preprocessing.std, dtype=torch.float64)
    mean, std = _average(means), _average(stds)
    per_channel = weight.double() * (std / stds).to(weight.device)[:, None, None]
    shift = per_channel.sum((2, 3)) @ ((means - mean) / std).to(weight.device)
    return per_channel, bias.double() - shift, mean, std


def _average(values: Tensor) -> float:
    """The mean, without rounding where all values are equal."""
    return values.mean().item() if len(values.unique()) > 1 else values[0].item()


def _first_convolution(backbone: nn.Module) -> nn.Conv2d:
    conv = getattr(backbone, "patch_embed", None)
    if conv is None and hasattr(backbone, "model"):
        name = getattr(backbone.model, "pretrained_cfg", {}).get("first_conv")
        conv = backbone.model.get_submodule(name) if isinstance(name, str) else None
    usable = isinstance(conv, nn.Conv2d) and conv.bias is not None and conv.groups == 1
    if not usable or conv.padding not in ((0, 0), "valid"):
        raise UserError(
            f"the channels of a {type(backbone).__name__} without a first convolution that has a "
            "bias and no padding cannot be adapted; of timm's models, take timm:NAME?in_channels="
        )
    return conv
