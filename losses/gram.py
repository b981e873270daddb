"""The Gram term: similarities between patches stay as an earlier teacher had them."""

import torch
import torch.nn.functional as F
from torch import Tensor


def gram_loss(student_patches: Tensor, teacher_patches: Tensor) -> Tensor:
    """Mean squared difference of two cosine Gram matrices a crop (DINOv3, arXiv 2508.10104).

    The paper writes a squared Frobenius norm, the authors' code takes the mean over all entries,
    and so do we. Memory is O(B·N²): only similarities count, so D may differ between the two.

    Args:
        student_patches: (B, N, D) final-norm patch tokens; any float type, computed in float32.
        teacher_patches: (B, N, D') of the same crops from the Gram teacher. Gets no gradient.

    Returns:
        Scalar >= 0; exactly 0 when both inputs are equal.

    Raises:
        ValueError: if the patches do not correspond.
    """
    if student_patches.shape[:2] != teacher_patches.shape[:2]:
        raise ValueError(
            f"student_patches {tuple(student_patches.shape)} and teacher_patches "
            f"{tuple(teacher_patches.shape)} must have the same crops and patches; "
            f"use downsample_patches on a finer grid"
        )
    with torch.autocast(student_patches.device.type, enabled=False):
        return F.mse_loss(cosine_gram(student_patches), cosine_gram(teacher_patches.detach()))


def cosine_gram(patches: Tensor) -> Tensor:
    """Cosines between the patches of a crop: (B, N, D) -> (B, N, N)."""
    unit = F.normalize(patches.float(), dim=-1)
    return torch.bmm(unit, unit.mT)


def on_grid(patches: Tensor, grid: tuple[int, int], target_grid: tuple[int, int]) -> Tensor:
    """The patches themselves where the grids are equal, else `downsample_patches` of them."""
    return patches if grid == target_grid else downsample_patches(patches, grid, target_grid)


def downsample_patches(
    patches: Tensor, grid: tuple[int, int], target_grid: tuple[int, int]
) -> Tensor:
    """Bicubic resize of a patch grid, for a Gram teacher that saw the crop at higher resolution.

    Done before the Gram matrix normalises; no antialiasing, as in the authors' code.

    Args:
        patches: (B, N, D) tokens, row by row; any float type.
        grid: (h, w) of the tokens, h·w = N.
        target_grid: (h, w) wanted; n = h·w.

    Returns:
        (B, n, D) float32.

    Raises:
        ValueError: if N is not h·w.
    """
    if patches.shape[1] != grid[0] * grid[1]:
        raise ValueError(f"{patches.shape[1]} patches do not fill a grid of {grid[0]} x {grid[1]}")
    maps = patches.float().mT.unflatten(-1, grid)  # (B, D, h, w)
    maps = F.interpolate(
        maps, size=target_grid, mode="bicubic", align_corners=False, antialias=False
    )
    return maps.flatten(2).mT
