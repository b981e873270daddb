"""From teacher logits to targets: a moving centre or Sinkhorn-Knopp, against collapse.

Collectives are handed in: functions that take a tensor and return it reduced over all ranks. By
default there is one rank and they return what they got. All ranks call them in the same order,
also a rank without rows.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

import kernels
from losses.cross_entropy import row_chunks

Reduce = Callable[[Tensor], Tensor]

MODES = ("ema", "sinkhorn", "none")


def identity(tensor: Tensor) -> Tensor:
    """The reduction over one rank."""
    return tensor


@torch.no_grad()
def sinkhorn_knopp(
    logits: Tensor,
    temp: float,
    iterations: int = 3,
    *,
    all_reduce_sum: Reduce = identity,
    all_reduce_max: Reduce = identity,
) -> Tensor:
    """Softmax targets whose prototypes are used about equally (SwAV, arXiv 2006.09882; DINOv2).

    Starts from Q = exp(logits / temp); each iteration scales the prototypes (columns, over the
    rows of all ranks) to equal sums, then the rows to sum 1. Rows were scaled last, so prototypes
    are balanced only approximately, and with few iterations or a sharp temperature not nearly.

    All scalings together are one factor per row times one per prototype. So Q is filled once, each
    half-iteration is a matrix-vector product that only reads it, and the factors are applied at
    the end. The authors also divide by the numbers of rows and prototypes, which cancels: the
    row count of all ranks is not needed.

    Huge logits stay finite: each row's maximum is taken out before `exp` and enters as that row's
    first factor, so that exponents count from the row's own maximum, and are cut at -70.

    Args:
        logits: (B, K) of this rank, any float type; computed in float32. B may be 0 and may differ
            between ranks.
        temp: teacher temperature, > 0.
        iterations: number of iterations, at least 1.
        all_reduce_sum: sum over ranks; called `iterations` times with (K,).
        all_reduce_max: maximum over ranks; called once with a scalar.

    Returns:
        (B, K) float32 without gradient; rows sum to 1.

    Raises:
        ValueError: if iterations is below 1.
    """
    if iterations < 1:
        raise ValueError(f"Sinkhorn-Knopp needs at least 1 iteration, got {iterations}")
    with torch.autocast(logits.device.type, enabled=False):
        row_max = logits.amax(dim=1).float()  # (B,)
        batch_max = row_max.amax() if len(row_max) > 0 else row_max.new_full((), float("-inf"))
        row_scale = ((row_max - all_reduce_max(batch_max)) / temp).exp()
        scores = torch.empty_like(logits, dtype=torch.float32)
        for rows in row_chunks(logits):
            kernels.write_exponentials(scores[rows], logits[rows], row_max[rows], temp)
        prototype_scale = None
        for _ in range(iterations):
            sums = scores.new_zeros(scores.shape[1])
            for rows in row_chunks(logits):  # both halves while these rows are at hand
                if prototype_scale is not None:
                    row_scale[rows] = 1 / torch.mv(scores[rows], prototype_scale)
                sums.addmv_(scores[rows].mT, row_scale[rows])
            prototype_scale = 1 / all_reduce_sum(sums)
            prototype_scale /= prototype_scale.amax()  # a common factor, which rows take out again
        for rows in row_chunks(logits):
            kernels.scale_prototypes_then_rows(scores[rows], prototype_scale)
        return scores


class Centering(nn.Module):
    """Teacher logits to targets, the same way for the DINO and the iBOT head.

    "ema" subtracts a moving mean of the logits before the softmax (DINO, arXiv 2104.14294),
    "sinkhorn" balances the prototypes within the batch, "none" is the softmax alone. Each head has
    an instance of its own. Computing targets leaves the centre where it is: `update` moves it,
    once the targets of a step are made.

    Args:
        prototypes: K, the width of the logits.
        mode: "ema", "sinkhorn" or "none".
        momentum: m in center <- m·center + (1 - m)·mean; "ema" only.
        iterations: of Sinkhorn-Knopp; "sinkhorn" only.

    Raises:
        ValueError: if mode is unknown.
    """

    def __init__(
        self, prototypes: int, mode: str, momentum: float = 0.9, iterations: int = 3
    ) -> None:
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"centering must be one of {', '.join(MODES)}, got {mode!r}")
        self.mode = mode
        self.momentum = momentum
        self.iterations = iterations
        if mode == "ema":
            self.register_buffer("center", torch.zeros(prototypes))

    @torch.no_grad()
    def forward(
        self,
        logits: Tensor,
        temp: float,
        all_reduce_sum: Reduce = identity,
        all_reduce_max: Reduce = identity,
    ) -> Tensor:
        """(B, K) logits, any float type -> (B, K) float32 targets, no gradient; rows sum to 1."""
        if self.mode == "sinkhorn":
            reduce = {"all_reduce_sum": all_reduce_sum, "all_reduce_max": all_reduce_max}
            return sinkhorn_knopp(logits, temp, self.iterations, **reduce)
        scores = torch.empty_like(logits, dtype=torch.float32)
        for rows in row_chunks(logits):
            part = logits[rows].float()
            part = (part - self.center if self.mode == "ema" else part) / temp
            torch.softmax(part, dim=-1, out=scores[rows])
        return scores

    @torch.no_grad()
    def update(self, logits: Tensor, all_reduce_sum: Reduce = identity) -> None:
        """Move the centre towards the mean of the (B, K) logits over all rows of all ranks.

        Sum and count are reduced together. B may be 0 on a rank; without any row on any rank the
        centre stays. Does nothing, and reduces nothing, unless the mode is "ema".
        DINOv2's patch centre averages over an image's patches first; here all rows count alike.
        """
        if self.mode != "ema":
            return
        row_sum = logits.new_zeros(logits.shape[1], dtype=torch.float32)
        for rows in row_chunks(logits):
            row_sum += logits[rows].float().sum(dim=0)
        count = row_sum.new_full((1,), len(logits))
        sums = all_reduce_sum(torch.cat([row_sum, count]))
        total = sums[-1]
        mean = sums[:-1] / total.clamp(min=1)
        # A skipped step leaves the centre as it was.
        mean = torch.where(mean.isfinite().all(), mean, self.center)
        self.center.lerp_(mean, (1 - self.momentum) * (total > 0))


def build_centering(loss: Any, terms: Iterable[str]) -> nn.ModuleDict:
    """The centring of each head's targets, by the sections `dino` and `ibot` of `loss`."""
    modules = {"dino": Centering(loss.dino.prototypes, loss.dino.centering)}
    if "ibot" in terms:
        prototypes = loss.ibot.prototypes or loss.dino.prototypes
        modules["ibot"] = Centering(prototypes, loss.ibot.centering)
    return nn.ModuleDict(modules)
