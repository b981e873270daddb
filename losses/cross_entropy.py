"""Cross-entropy with soft targets over many prototypes, in bounded memory."""

import torch
from torch import Tensor

import kernels

# Bytes of float32 scores held at a time: a CPU keeps them in its cache, and a device does enough
# work for one kernel launch.
CHUNK = {"cpu": 1 << 20}
LARGE_CHUNK = 1 << 28


def soft_cross_entropy(logits: Tensor, targets: Tensor, temp: float) -> Tensor:
    """-Σ_k targets · log_softmax(logits / temp), without a float32 copy of all logits.

    Scores are made float32 a few rows at a time: in the forward pass for their logsumexp, and once
    more in the backward pass, whose result has the type of the logits. Kept in between are the
    logits, the targets and one number a row.

    Args:
        logits: (S, B, K), any float type.
        targets: (B, K) for all S, or (S, B, K); float32, no gradient. Rows need not sum to 1.
        temp: softmax temperature, > 0.

    Returns:
        (S, B) float32 in nats.
    """
    with torch.autocast(logits.device.type, enabled=False):
        return _SoftCrossEntropy.apply(logits, targets.detach().float(), temp)


class _SoftCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, temp: float) -> Tensor:
        logsumexp = logits.new_empty(logits.shape[:2], dtype=torch.float32)
        dots, mass = torch.empty_like(logsumexp), targets.sum(-1)
        for rows in row_chunks(logits, dim=1):
            sums = kernels.score_sums(logits[:, rows], targets[..., rows, :], temp)
            dots[:, rows], logsumexp[:, rows] = sums
        ctx.save_for_backward(logits, targets, logsumexp, mass)
        ctx.temp = temp
        return mass * logsumexp - dots

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        logits, targets, logsumexp, mass = ctx.saved_tensors
        result = torch.empty_like(logits)
        for rows in row_chunks(logits, dim=1):
            known = targets[..., rows, :], logsumexp[:, rows], mass[..., rows], grad[:, rows]
            kernels.write_slope(result[:, rows], logits[:, rows], *known, ctx.temp)
        return result, None, None


def row_chunks(scores: Tensor, dim: int = 0) -> list[slice]:
    """Slices of a dimension of (..., K), as many rows at a time as CHUNK allows."""
    row = 4 * scores[..., 0].numel() * scores.shape[-1] // max(1, scores.shape[dim])
    step = max(1, CHUNK.get(scores.device.type, LARGE_CHUNK) // max(1, row))
    return [slice(start, start + step) for start in range(0, scores.shape[dim], step)]
