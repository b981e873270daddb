"""Depth from frozen patches by a linear head, as DINOv3 measures it; training as in dense.py."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from errors import UserError
from evals.canopy import CanopyErrors
from evals.dense import FrozenPatches, LinearHead, Recipe, predict, train_heads
from evals.patches import Patches, extract_patches, upsample
from evals.reading import in_order

# DINOv3's file for NYUv2. Published is 3e-4; the larger ones are ours, for short runs.
DEPTH = Recipe(
    (3e-4, 3e-2, 3e-1), 1e-4, (0.9, 0.99), 1 / 3, 0.04, 1e-3, epochs=25, longest=38_400, clip=35.0
)


class DepthHead(LinearHead):
    """(n, D) tokens -> (n, 1) metres.

    The mean of evenly spaced bins from `low` to `high`, weighted by ReLU(score) + 0.1.
    """

    def __init__(self, dim: int, low: float, high: float, bins: int = 256):
        super().__init__(dim, bins)
        self.register_buffer("centres", torch.linspace(low, high, bins))

    def forward(self, tokens: Tensor) -> Tensor:
        weights = super().forward(tokens).relu() + 0.1
        return (weights / weights.sum(dim=1, keepdim=True)) @ self.centres[:, None]


@torch.inference_mode()
def linear_depth(
    backbone: nn.Module,
    train: Dataset,
    vals: Sequence[Dataset],
    device: torch.device,
    *,
    span: tuple[float, float] | None = None,
    align: bool = False,
    canopy: bool = False,
    keep: Callable[[nn.Module, dict], None] | None = None,
    recipe: Recipe = DEPTH,
    steps: int | None = None,
    seed: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """RMSE and delta1 of a linear head into 256 depth bins (DINOv3, arXiv 2508.10104).

    Means over pixels, then over images. Pixels of depth 0 or below, or not finite, are left out.

    Args:
        train, vals: as of `linear_segmentation`, with depth (H', W') in metres as the target.
        span: depth of the first and last bin in metres; None takes the range of train.
        align: see `depth_errors`.
        canopy: measure `CanopyErrors` as well, under "canopy".
        keep: called with the best head and its options besides the width.

    Returns:
        {what `depth_errors` measures, "lr": {rate: rmse}, "limit": {"rmse", "delta1"} of the truth
        pooled to the patch grid, "constant": RMSE of train's mean depth, "span", "steps"}.

    Raises:
        UserError: if no pixel has a depth.
    """
    patches = FrozenPatches(backbone, train, device, depth_summary, **options)
    low, high, middle = depth_range(patches.summaries, span)
    steps = recipe.steps(len(patches.indices)) if steps is None else steps
    build = partial(DepthHead, patches.dim, low, high)
    loss = partial(sig_loss, begin=min(0.1, 100 / steps))
    heads = train_heads(patches, build, loss, recipe, steps, seed)
    found, sums = [], {lr: CanopyErrors() for lr in heads}
    flips = [val.flip for val in vals]
    streams = [extract_patches(backbone, val, device, **options) for val in vals]
    for variants in zip(*streams, strict=True):
        depth = variants[0].target.to(device)
        if is_depth(depth).any():
            guesses = _guess(heads, variants, flips, (low, high))
            for lr in heads:
                sums[lr].add(guesses[lr], depth)
            constant = torch.full_like(depth, middle)
            guesses |= {"limit": pooled_depth(depth, variants[0].grid), "constant": constant}
            errors = {name: depth_errors(guess, depth, align) for name, guess in guesses.items()}
            found.append((variants[0].index, errors))
    means = _mean_of_each(in_order(found), (*heads, "limit", "constant"))
    best = min(heads, key=lambda lr: means[lr]["rmse"])
    if keep is not None:
        keep(heads[best], {"low": low, "high": high})
    result = means[best] | {"lr": {f"{lr:g}": means[lr]["rmse"] for lr in heads}}
    result["limit"] = {name: means["limit"][name] for name in ("rmse", "delta1")}
    result |= {"canopy": sums[best].result()} if canopy else {}
    return result | {"constant": means["constant"]["rmse"], "span": [low, high], "steps": steps}


def _guess(
    heads: dict, variants: Sequence[Patches], flips: Sequence[bool], span: tuple[float, float]
) -> dict[Any, Tensor]:
    """What each head says of an image, (H, W) metres within the span."""
    return {
        lr: predict(head, variants, flips, torch.clone)[0].clamp(*span)
        for lr, head in heads.items()
    }


def _mean_of_each(found: Sequence[dict], names: Sequence) -> dict[Any, dict[str, float]]:
    return {name: mean_errors([of_image[name] for of_image in found]) for name in names}


def is_depth(depth: Tensor) -> Tensor:
    return depth.isfinite() & (depth > 0)


def depth_summary(depth: Tensor) -> tuple[float, float, float] | None:
    """Least, largest and mean depth; None where there is none."""
    known = depth[is_depth(depth)].float()
    return (float(known.min()), float(known.max()), float(known.mean())) if len(known) else None


def depth_range(
    summaries: Sequence[tuple[float, float, float] | None], span: Sequence[float] | None = None
) -> tuple[float, float, float]:
    """Least and largest depth, or `span`, and the images' mean depth.

    Raises:
        UserError: if no image has depth.
    """
    known = [summary for summary in summaries if summary is not None]
    if not known:
        raise UserError("no pixel of the training depth is above 0")
    lows, highs, means = zip(*known, strict=True)
    low, high = span or (min(lows), max(highs))
    return low, high, sum(means) / len(means)


def sig_loss(
    values: Tensor, depth: Tensor, done: float, begin: float = 0.0, eps: float = 1e-3
) -> Tensor:
    """√(Var(g) + 0.15 mean(g)²) with g = log(predicted + ε) − log(true + ε).

    As in DINOv3's file, Var(g) joins only after a share of the training.

    Args:
        values, depth: (P, 1) and (P,) in metres.
        done, begin: shares of the training: what is done, and where Var(g) joins.
    """
    known = is_depth(depth)
    if known.sum() < 2:
        return 0.0 * values.sum()
    g = (values[known, 0] + eps).log() - (depth[known].float() + eps).log()
    spread = g.var() if done >= begin else 0.0
    return (spread + 0.15 * g.mean().square()).clamp(min=1e-12).sqrt()


def depth_errors(guess: Tensor, depth: Tensor, align: bool = False) -> dict[str, float]:
    """The usual measures of one image (H, W), over its pixels with depth.

    Args:
        guess: metres; it counts as at least a millimetre.
        align: by the scale and shift that fit the truth best (least squares), as for relative
            depth.

    Returns:
        "rmse" and "mae" in metres, "abs_rel", "sq_rel", "rmse_log", "log10", "silog" (times 100),
        and the shares of pixels within a factor of 1.25, 1.25² and 1.25³, "delta1" to "delta3".
    """
    known = is_depth(depth)
    guess, depth = guess[known].cpu().double(), depth[known].cpu().double()
    if align:
        design = torch.stack([guess, torch.ones_like(guess)], dim=1)
        # Of a constant guess, whose scale is free, this driver takes the shift that fits.
        guess = design @ torch.linalg.lstsq(design, depth[:, None], driver="gelsd").solution[:, 0]
    guess = guess.clamp(min=1e-3)
    difference, g = guess - depth, guess.log() - depth.log()
    worst = torch.maximum(guess / depth, depth / guess)
    errors = {
        "rmse": difference.square().mean().sqrt(),
        "mae": difference.abs().mean(),
        "abs_rel": (difference.abs() / depth).mean(),
        "sq_rel": (difference.square() / depth).mean(),
        "rmse_log": g.square().mean().sqrt(),
        "log10": g.abs().mean() / math.log(10),
        "silog": 100 * g.var(correction=0).sqrt(),
    }
    errors |= {f"delta{k}": (worst < 1.25**k).double().mean() for k in (1, 2, 3)}
    return {name: float(value) for name, value in errors.items()}


def mean_errors(found: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean over images.

    Raises:
        UserError: if there is none.
    """
    if not found:
        raise UserError("no pixel of the validation depth is above 0")
    return {name: sum(one[name] for one in found) / len(found) for name in found[0]}


def pooled_depth(depth: Tensor, grid: tuple[int, int]) -> Tensor:
    """(H, W): the geometric mean depth of each patch, enlarged like a prediction.

    Geometric, because the loss compares logarithms. Patches without depth take the image's mean.
    """
    known = is_depth(depth)
    value = torch.where(known, depth.float().clamp(min=1e-6).log(), 0.0)
    total, count = (F.adaptive_avg_pool2d(item[None].float(), grid) for item in (value, known))
    mean = torch.where(count > 0, total / count.clamp(min=1e-9), value.sum() / known.sum())
    return upsample(mean.exp(), depth.shape)[0]
