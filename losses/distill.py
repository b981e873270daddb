"""Feature matching, for teachers without heads: cosines to the student's projected features."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

FLOOR = 1e-2  # of the mean variance; keeps dimensions small in which the teacher hardly varies


@torch.no_grad()
def standardize(
    parts: Sequence[Tensor], all_reduce_sum: Callable[[Tensor], Tensor] = lambda tensor: tensor
) -> list[Tensor]:
    """Each dimension with mean 0 and variance about 1 over the rows of all parts and ranks.

    Features of released models have a large mean and a few huge dimensions; either would dominate
    a cosine (ours). Statistics are those of the step's rows, however these are divided.

    Args:
        parts: (..., D) each, any float type; computed in float32.
        all_reduce_sum: sum over ranks; called twice with D + 1 and D numbers.

    Returns:
        float32, shaped as `parts`, without gradient.
    """
    rows = [part.float().flatten(0, -2) for part in parts]
    totals = sum(part.sum(0) for part in rows)
    count = totals.new_tensor([sum(len(part) for part in rows)])
    sums = all_reduce_sum(torch.cat([totals, count]))
    mean, count = sums[:-1] / sums[-1], sums[-1]
    variance = all_reduce_sum(sum((part - mean).square().sum(0) for part in rows)) / count
    scale = (variance + FLOOR * variance.mean()).clamp(min=1e-12).rsqrt()
    return [
        ((part - mean) * scale).view(whole.shape) for part, whole in zip(rows, parts, strict=True)
    ]


def matching_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of 1 - cosine of corresponding rows (UNIC, arXiv 2408.05088, without smooth L1).

    Args:
        student: (..., D) after the projection, any float type; computed in float32.
        teacher: (..., D) targets. Gets no gradient.

    Returns:
        Scalar in [0, 2]. Local to this rank: with equal batches, averaging ranks gives the global
        loss.

    Raises:
        ValueError: if the shapes differ.
    """
    if student.shape != teacher.shape:
        shapes = f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)}"
        raise ValueError(f"{shapes} must correspond row by row")
    with torch.autocast(student.device.type, enabled=False):
        return 1 - F.cosine_similarity(student.float(), teacher.detach().float(), dim=-1).mean()


@dataclass
class MatchingTargets:
    """What a student's projected features should equal, up to their length; no gradient."""

    cls: Tensor  # (G·B, D')
    patches: Tensor  # (G·B, N, D'), on the student's grid
    gram: None = None  # as in the targets of train.py: no Gram teacher


def matching_targets(
    cls: Sequence[Tensor], patches: Sequence[Tensor], all_reduce_sum: Callable[[Tensor], Tensor]
) -> list[MatchingTargets]:
    """One for each part of a batch, standardised over the whole of it; see `standardize`."""
    parts = standardize(cls, all_reduce_sum), standardize(patches, all_reduce_sum)
    return [MatchingTargets(*pair) for pair in zip(*parts, strict=True)]


def matching_losses(
    cls: Tensor, patches: Tensor, targets: MatchingTargets, weights: Mapping[str, float]
) -> dict[str, Tensor]:
    """The terms "cls" and "patches", unweighted, of those that have a weight.

    Args:
        cls: (G·B, D') projected features of the student.
        patches: (G·B, N, D') projected features of the student.
    """
    losses = {}
    if "cls" in weights:
        losses["cls"] = matching_loss(cls, targets.cls)
    if "patches" in weights:
        losses["patches"] = matching_loss(patches, targets.patches)
    return losses
