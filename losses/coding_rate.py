"""The coding-rate term: features of different images fill all directions."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def coding_rate_loss(
    features: Tensor,
    epsilon: float = 0.5,
    gather: Callable[[Tensor], Tensor] = lambda rows: rows,
) -> Tensor:
    """Minus the coding rate of features scaled to length 1 (SimDINO, arXiv 2502.10385).

    With Z the n rows of length 1, `-gamma / 2 · logdet(I + D / (n · epsilon) · Zᵀ Z)`. It is least
    where Z has all directions alike, and largest, near 0, where all rows are equal. The factor
    gamma = (n + D) / (n · D) is that of the authors' code, and so is epsilon, which the paper
    squares. Call it once per view: two views of an image must not be pushed apart.

    Args:
        features: (B, D) before the head, any float type; computed in float32.
        epsilon: > 0, the precision of the code; larger ones count weak directions less.
        gather: joins the rows of all ranks, differentiably; every rank then computes the loss of
            all rows. Micro-batches are not joined: the rate is that of each, averaged.

    Returns:
        Scalar <= 0.
    """
    with torch.autocast(features.device.type, enabled=False):
        rows = F.normalize(gather(features).float(), dim=-1)
        n, d = rows.shape
        # The smaller of Zᵀ Z and Z Zᵀ: both have the same determinant.
        gram = rows.T @ rows if d < n else rows @ rows.T
        identity = torch.eye(len(gram), device=rows.device)
        factor = torch.linalg.cholesky_ex(identity + d / (n * epsilon) * gram).L
        return -(n + d) / (n * d) * factor.diagonal().log().sum()  # log det = 2 · sum log diagonal
