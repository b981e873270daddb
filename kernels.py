"""Chains of element-wise operations on scores over many prototypes, one kernel each on a GPU.

losses/ computes with them; on a CPU they run as they are written. Sums are in float32.
"""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor

compiled = False  # whether torch.compile is used on a GPU; engine/trainer.py sets it
MIN_EXPONENT = -70.0  # so that no sum is 0 and 1e8 rows, each scaled by e^70, are still finite


def fused(function: Callable) -> Callable:
    """`function`, compiled at its first call with a tensor on a GPU, where `compiled` is set.

    Its first argument is a tensor. Floats reach the kernel as tensors, so a temperature that
    changes in each step compiles nothing anew.
    """
    kernel = torch.compile(function)

    @wraps(function)
    def call(first: Tensor, *rest: Any) -> Any:
        if not (compiled and first.is_cuda):
            return function(first, *rest)
        number = partial(torch.full, (), dtype=torch.float32, device=first.device)
        return kernel(first, *[number(x) if isinstance(x, float) else x for x in rest])

    return call


# ----------------------------------------------------------------- cross-entropy


@fused
def score_sums(logits: Tensor, targets: Tensor, temp: float) -> tuple[Tensor, Tensor]:
    """Σ targets · scores and logsumexp(scores) over the last dimension; scores = logits / temp.

    Args:
        logits: (S, B, K), any float type.
        targets: (B, K) or (S, B, K) float32.
    """
    scores = _scores(logits, temp)
    return torch.linalg.vecdot(scores, targets), torch.logsumexp(scores, -1)


@fused
def write_slope(
    out: Tensor,
    logits: Tensor,
    targets: Tensor,
    logsumexp: Tensor,
    mass: Tensor,
    grad: Tensor,
    temp: float,
) -> None:
    """Writes grad · (mass · softmax(scores) - targets) / temp into `out`, shaped as `logits`.

    Args:
        logsumexp, grad: (S, B) float32.
        mass: (B,) or (S, B), the sums of the targets.
    """
    probs = _scores(logits, temp).sub_(logsumexp[..., None]).exp_()
    slope = probs.mul_(mass[..., None]).sub_(targets)  # by the scores
    out.copy_(slope.mul_((grad / temp)[..., None]))


def _scores(logits: Tensor, temp: float) -> Tensor:
    """A float32 copy, divided by the temperature."""
    return logits.to(torch.float32, copy=True).div_(temp)


# ----------------------------------------------------------------- Sinkhorn-Knopp


@fused
def write_exponentials(out: Tensor, logits: Tensor, row_max: Tensor, temp: float) -> None:
    """Writes exp((logits - row_max) / temp) into `out` (B, K) float32; row_max is (B,)."""
    torch.sub(logits, row_max[:, None], out=out)
    out.div_(temp).clamp_(min=MIN_EXPONENT).exp_()


@fused
def scale_prototypes_then_rows(scores: Tensor, prototype_scale: Tensor) -> None:
    """Multiplies (B, K) by (K,), then divides each row by its sum, in place.

    The last row factor comes from sum(): over 1e5 prototypes mv is off by 1e-4 on a CPU.
    """
    scores.mul_(prototype_scale)
    scores.div_(scores.sum(dim=1, keepdim=True))
