"""The anchor term: features stay near those of the weights that training began with."""

from torch import Tensor

from losses.distill import matching_loss


def anchor_loss(
    cls: Tensor, patches: Tensor, anchor_cls: Tensor, anchor_patches: Tensor, patch_weight: float
) -> Tensor:
    """Feature preservation for continued training: 1 - cosine to the frozen initial weights.

    Unlike the Gram term it holds the features themselves, not only their similarities.

    Args:
        cls, patches: (B, D) and (B, N, D) of the student, after the final norm.
        anchor_cls, anchor_patches: of the initial weights, for the same crops. No gradient.
        patch_weight: of the patches' part relative to that of CLS.

    Returns:
        Scalar >= 0, mean over crops; 0 where all directions are equal.
    """
    return matching_loss(cls, anchor_cls) + patch_weight * matching_loss(patches, anchor_patches)
