"""`adapt_channels`: a trained backbone for another number of input channels."""

import dataclasses

import torch
from torch import Tensor, nn

from errors import UserError
from models.features import Preprocessing

INFLATE = ("mean", "repeat", "zero")


@torch.no_grad()
def adapt_channels(backbone: nn.Module, channels: int, inflate: str | None = None) -> nn.Module:
    """Changes the first convolution of `backbone`, in place, to take `channels`; returns it.

    Every new filter is the sum of the C old ones over `channels`. So a grey image, repeated for
    each channel, gives what it gave before.

    If the backbone has a `preprocessing`, that holds for images before each model's own
    normalisation. For this, filters and bias are first rewritten for one mean and one std on all
    channels, the averages of the old ones, which changes nothing for any image. These become the
    statistics of every new channel.

    `inflate` makes more channels than C in another way. Only "zero" changes grey images:

        mean    the old filters, and their mean for each further channel, all times C / channels
                (FINO)
        repeat  the old filters over and over (timm), each divided by its number of copies (ours)
        zero    the old filters and statistics, and zeros: what further channels hold changes
                nothing (ours)

    Raises:
        UserError: if `channels` is below 1, the first convolution pads or has no bias, or `inflate`
            is unknown or given for fewer channels.
    """
    if not isinstance(channels, int) or isinstance(channels, bool) or channels < 1:
        raise UserError(f"channels is {channels!r}; it must be a whole number from 1 on")
    if inflate is not None and (inflate not in INFLATE or channels < backbone.in_channels):
        raise UserError(
            f"inflate is {inflate!r} for {channels} channels; it is {', '.join(INFLATE)}, and for "
            f"no fewer channels than the {backbone.in_channels} of the weights"
        )
    if channels == backbone.in_channels:
        return backbone
    conv = _first_convolution(backbone)
    preprocessing = getattr(backbone, "preprocessing", None)
    weight, bias = conv.weight, conv.bias
    if preprocessing is not None:
        equal_weight, equal_bias, mean, std = _with_equal_statistics(weight, bias, preprocessing)
        means, stds = (mean,) * channels, (std,) * channels
        if inflate == "zero":
            old = len(preprocessing.mean)
            means, stds = preprocessing.mean + means[old:], preprocessing.std + stds[old:]
        else:
            weight, bias = equal_weight, equal_bias
        backbone.preprocessing = dataclasses.replace(preprocessing, mean=means, std=stds)
    filters = _spread(weight.double(), channels, inflate).to(conv.weight.dtype).contiguous()
    conv.weight = nn.Parameter(filters, conv.weight.requires_grad)
    conv.bias = nn.Parameter(bias.to(conv.bias.dtype), conv.bias.requires_grad)
    conv.in_channels = backbone.in_channels = channels
    backbone.config["in_channels"] = channels
    return backbone


def _spread(weight: Tensor, channels: int, inflate: str | None) -> Tensor:
    """Filters (D, C, p, p) for `channels`; their sum over channels stays."""
    old = weight.shape[1]
    shared = weight.mean(1, keepdim=True)
    if inflate is None:
        return (weight.sum(1, keepdim=True) / channels).expand(-1, channels, -1, -1)
    if inflate == "repeat":
        source = torch.arange(channels) % old
        return weight[:, source] / torch.bincount(source)[source].view(-1, 1, 1).to(weight)
    further = (shared if inflate == "mean" else 0 * shared).expand(-1, channels - old, -1, -1)
    filters = torch.cat([weight, further], dim=1)
    return filters * (old / channels) if inflate == "mean" else filters


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
