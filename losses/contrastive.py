"""Image and text vectors of a pair agree, those of different pairs do not (CLIP, SigLIP)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK = 8192  # columns of the similarity matrix at a time; beyond, parts are computed again
Gather = Callable[[Tensor], Tensor]


def info_nce_loss(
    images: Tensor,
    texts: Tensor,
    logit_scale: Tensor,
    gather: Gather = lambda rows: rows,
    chunk: int = CHUNK,
) -> Tensor:
    """Symmetric cross-entropy of picking the right partner (CLIP, arXiv 2103.00020, Figure 3).

    With s = exp(logit_scale) and unit vectors x_i, y_i, the mean over i of
    `-(2 s x_i·y_i - log Σ_j exp(s x_i·y_j) - log Σ_j exp(s x_j·y_i)) / 2`.

    Args:
        images, texts: (b, D), row i of both is a pair; normalised here, computed in float32.
        logit_scale: one number, the log of the factor.
        gather: joins the rows of all ranks, differentiably. The loss is that of this rank's rows
            against all, so its mean over ranks is that of the joined batch, and so are gradients.
        chunk: columns of the similarity matrix that are held at a time.

    Returns:
        Scalar in nats; ln B for vectors that say nothing.

    Raises:
        ValueError: if the two are not of one shape (b, D).
    """
    with torch.autocast(images.device.type, enabled=False):
        x, y, scale = _unit_vectors(images, texts, logit_scale)
        positives = scale * (x * y).sum(-1)
        to_texts = _in_chunks(_log_sum, x, gather(y), scale, chunk)
        to_images = _in_chunks(_log_sum, y, gather(x), scale, chunk)
        rows = to_texts.logsumexp(0) + to_images.logsumexp(0) - 2 * positives
        return rows.mean() / 2


def sigmoid_loss(
    images: Tensor,
    texts: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    gather: Gather = lambda rows: rows,
    chunk: int = CHUNK,
) -> Tensor:
    """Each of the B² pairs is judged alone (SigLIP, arXiv 2303.15343, section 3.2).

    With l_ij = s x_i·y_j + bias, the mean over i of `Σ_j softplus(l_ij) - l_ii`. That is the
    paper's sum of -log sigmoid(±l_ij). Arguments as `info_nce_loss`.
    """
    with torch.autocast(images.device.type, enabled=False):
        x, y, scale = _unit_vectors(images, texts, logit_scale)
        bias = logit_bias.float().squeeze()
        positives = scale * (x * y).sum(-1) + bias
        return (
            _in_chunks(_softplus_sum, x, gather(y), scale, chunk, bias).sum(0) - positives
        ).mean()


def _unit_vectors(images: Tensor, texts: Tensor, logit_scale: Tensor) -> tuple[Tensor, ...]:
    if images.shape != texts.shape or images.ndim != 2:
        shapes = f"{tuple(images.shape)} and {tuple(texts.shape)}"
        raise ValueError(f"vectors of images and texts have the shapes {shapes}, not one (b, D)")
    x, y = (F.normalize(rows.float(), dim=-1) for rows in (images, texts))
    return x, y, logit_scale.float().squeeze().exp()


def _in_chunks(
    reduce: Callable[..., Tensor], rows: Tensor, columns: Tensor, scale: Tensor, chunk: int, *rest
) -> Tensor:
    """(parts, b): `reduce` of each part of the columns; of several, none is kept for backward."""
    parts = columns.split(chunk)
    if len(parts) == 1:
        return reduce(rows, columns, scale, *rest)[None]
    return torch.stack(
        [checkpoint(reduce, rows, part, scale, *rest, use_reentrant=False) for part in parts]
    )


def _log_sum(rows: Tensor, columns: Tensor, scale: Tensor) -> Tensor:
    return (scale * rows @ columns.T).logsumexp(-1)


def _softplus_sum(rows: Tensor, columns: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return F.softplus(scale * rows @ columns.T + bias).sum(-1)
