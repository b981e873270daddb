"""The DINO term: crops of one image agree on how they spread over the prototypes."""

import torch
from torch import Tensor

from losses.cross_entropy import soft_cross_entropy


def dino_loss(
    student_logits: Tensor,
    teacher_probs: Tensor,
    student_temp: float,
    *,
    ignore_diagonal: bool = True,
) -> Tensor:
    """Cross-entropy between different crops of an image (DINO, arXiv 2104.14294, Eq. 3).

    The same as, for every pair of crops s, t with s != t, and for every image b:
    `-(teacher_probs[t, b] * log_softmax(student_logits[s, b] / student_temp)).sum()`.
    The paper sums over pairs, we average.

    Args:
        student_logits: (S, B, K) head outputs, any float type; computed in float32.
        teacher_probs: (T, B, K) centred and sharpened targets; rows sum to 1. Gets no gradient.
        student_temp: softmax temperature, > 0.
        ignore_diagonal: drop the pairs s == t. Right when both count the same views (global
            crops); set it to False when the student's crops are others (local crops).

    Returns:
        Scalar in nats, averaged over the pairs, then over images.
        Local to this rank: with equal batches, averaging ranks gives the global loss.

    Raises:
        ValueError: if there is no pair, or if B or K differ.
    """
    if student_logits.shape[1:] != teacher_probs.shape[1:]:
        raise ValueError(
            f"student_logits {tuple(student_logits.shape)} and teacher_probs "
            f"{tuple(teacher_probs.shape)} must have the same images and prototypes"
        )
    S, T, B = len(student_logits), len(teacher_probs), student_logits.shape[1]
    pairs = S * T - (min(S, T) if ignore_diagonal else 0)
    if pairs * B == 0:
        raise ValueError(
            f"the DINO loss needs two different crops of an image, got {S} student crops "
            f"and {T} teacher crops of {B} images"
        )
    teacher_probs = teacher_probs.detach().float()
    targets = teacher_probs.sum(0)  # (B, K), of all pairs of a student's crop at once
    if ignore_diagonal:
        others = [[t for t in range(T) if t != s] for s in range(S)]
        targets = torch.stack([teacher_probs[chosen].sum(0) for chosen in others])
    return soft_cross_entropy(student_logits, targets, student_temp).sum() / (pairs * B)


def multicrop_dino_loss(
    global_logits: Tensor,
    local_logits: Tensor | None,
    teacher_probs: Tensor,
    student_temp: float,
    local_weight: float = 1.0,
) -> Tensor:
    """Global and local DINO terms, each weighted by its share of the pairs (DINOv2, DINOv3 code).

    With two global crops the shares are 2/(2 + 2L) and 2L/(2 + 2L). At `local_weight` 1 this is
    the mean over all pairs of different crops, which is the loss of DINO's first version.

    Args:
        global_logits: (G, B, K) student head outputs of the global crops.
        local_logits: (L, B, K) of the local crops; None or L = 0 if there are none.
        teacher_probs: (G, B, K) targets from the same global crops, in the same order.
        student_temp: softmax temperature, > 0.
        local_weight: factor on the local term; DINOv3 lowers it from 1 to 0.5. It is not
            normalised away: a lower weight gives a lower loss.

    Returns:
        Scalar in nats; see `dino_loss`.

    Raises:
        ValueError: if there is no pair of different crops, or if shapes differ.
    """
    if global_logits.shape != teacher_probs.shape:
        raise ValueError(
            f"global_logits {tuple(global_logits.shape)} and teacher_probs "
            f"{tuple(teacher_probs.shape)} must come from the same global crops"
        )
    G = len(global_logits)
    L = 0 if local_logits is None else len(local_logits)
    if L == 0:
        return dino_loss(global_logits, teacher_probs, student_temp)
    local = dino_loss(local_logits, teacher_probs, student_temp, ignore_diagonal=False)
    # A single global crop has no other global crop to agree with: all pairs are local.
    global_pairs, local_pairs = G * (G - 1), G * L
    loss = local_weight * local_pairs / (global_pairs + local_pairs) * local
    if global_pairs > 0:
        share = global_pairs / (global_pairs + local_pairs)
        loss = loss + share * dino_loss(global_logits, teacher_probs, student_temp)
    return loss
