"""Is the run alive? Cheap measures of the targets and of the features, taken when the logger writes."""

import math

import torch
from torch import Tensor

from engine import distributed


@torch.no_grad()
def health(teacher_probs: Tensor, features: Tensor) -> dict[str, Tensor]:
    """
    Args:
        teacher_probs: (B, K) targets of one step, rows sum to 1.
        features: (B, D) the student's CLS features before the head.

    Returns:
        teacher_entropy: mean entropy of a target as a share of ln K: near 1 uniform, near 0 one-hot.
        prototype_use: exp(entropy of the mean target) / K, the share of the prototypes in use.
        feature_std: mean over dimensions of the standard deviation over images, of L2-normalised features times sqrt(D);
            1 for independent dimensions, 0 when all images look alike.
        effective_rank: exp(entropy of the singular values' shares) of the centred features (RankMe, arXiv 2210.02885), at
            most min(B - 1, D).
    """
    probs, features = teacher_probs.float(), features.float().nan_to_num()  # a dying run is told so by its loss
    log_k = math.log(max(probs.shape[1], 2))
    mean = distributed.mean_over_ranks(probs.mean(dim=0))
    normalised = torch.nn.functional.normalize(features, dim=1)
    shares = torch.linalg.svdvals(normalised - normalised.mean(dim=0))
    shares = shares / shares.sum().clamp(min=1e-12)
    return {
        "health/teacher_entropy": distributed.mean_over_ranks(_entropy(probs).mean() / log_k),
        "health/prototype_use": _entropy(mean).exp() / probs.shape[1],
        "health/feature_std": distributed.mean_over_ranks(normalised.std(dim=0).mean() * math.sqrt(features.shape[1])),
        "health/effective_rank": distributed.mean_over_ranks(_entropy(shares).exp()),
    }


def _entropy(probs: Tensor) -> Tensor:
    """In nats, over the last dimension."""
    return -torch.special.xlogy(probs, probs).sum(dim=-1)
