"""The iBOT term: the student guesses what the teacher sees under the mask."""

import torch
from torch import Tensor

from losses.cross_entropy import soft_cross_entropy


def ibot_loss(
    student_logits: Tensor, teacher_probs: Tensor, masks: Tensor, student_temp: float
) -> Tensor:
    """Cross-entropy on masked patches (iBOT, arXiv 2111.07832; weights as in the DINOv2 code).

    The mean over a crop's masked patches, then over ALL crops, where a crop without a mask counts
    as 0: with half of the crops masked the value is half of a mean over masked crops. Dividing
    by crops and not by M keeps ranks and micro-batches comparable, for M differs between them.

    Args:
        student_logits: (M, K) head outputs at the masked positions, in the order of
            `masks` flattened; any float type, computed in float32.
        teacher_probs: (M, K) targets at the same positions; rows sum to 1. Gets no gradient.
        masks: (G·B, N) bool, True = hidden from the student; has M entries that are True.
        student_temp: softmax temperature, > 0.

    Returns:
        Scalar in nats. M = 0 gives 0 that still has a graph, so that under DDP every rank's head
        takes part. Local to this rank: with equal batches, averaging ranks gives the global loss.

    Raises:
        ValueError: if student and teacher differ in shape.
    """
    if student_logits.shape != teacher_probs.shape:
        raise ValueError(
            f"student_logits {tuple(student_logits.shape)} and teacher_probs "
            f"{tuple(teacher_probs.shape)} must have the same shape"
        )
    cross_entropy = soft_cross_entropy(student_logits[None], teacher_probs, student_temp)[0]  # (M,)
    masked = masks.sum(dim=1)  # (G·B,)
    # The infinite weight of a crop without a mask is repeated 0 times. Naming the output size
    # spares the device a synchronisation.
    weights = torch.repeat_interleave(1.0 / masked, masked, output_size=len(student_logits))
    return (weights * cross_entropy).sum() / len(masks)
