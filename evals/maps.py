"""Small maps of an image: principal components of patch tokens, attention, similarity.

A map has one value or one colour for each patch; evals/figures.py enlarges it. Nothing here depends
on a model's class: attention is read from the model's calls of PyTorch's own function.
"""

import zipfile
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from errors import UserError

Picture = np.ndarray  # (H, W, 3) uint8

# Attention.


class _Watch(TorchFunctionMode):
    """Keeps queries and keys of one call of `scaled_dot_product_attention`; -1 is the last."""

    def __init__(self, layer: int):
        super().__init__()
        self.layer, self.calls = layer, 0
        self.last: deque = deque(maxlen=max(1, -layer))

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence = (), kwargs: dict | None = None
    ) -> Any:
        if function is F.scaled_dot_product_attention:
            if self.layer < 0 or self.calls == self.layer:
                self.last.append(args[:2])
            self.calls += 1
        return function(*args, **(kwargs or {}))

    def kept(self) -> tuple[Tensor, Tensor]:
        if self.calls == 0:
            raise UserError("this model computes no attention that could be drawn")
        if not -self.calls <= self.layer < self.calls:
            blocks = f"{self.calls} blocks, 0 to {self.calls - 1}"
            raise UserError(f"--layer is {self.layer}; this model has {blocks}")
        return self.last[0]


@torch.inference_mode()
def prefix_attention(backbone: nn.Module, images: Tensor, layer: int = -1) -> tuple[Tensor, Any]:
    """softmax(q kᵀ / √d) of one block for CLS and registers, and the images' `Features`.

    Queries and keys are those that the model computes, ours or any other that calls PyTorch's
    attention. Only these rows are computed: memory grows with T, not with T².

    Args:
        images: (B, C, H, W), normalised.
        layer: from 0, or from the end.

    Returns:
        (B, heads, 1 + R, T) float32, T = 1 + R + N: CLS, registers, patches; rows sum to 1.

    Raises:
        UserError: if there is no such block, or its tokens are not CLS, registers and patches.
    """
    with _Watch(layer) as watch:
        features = backbone(images)
    q, k = watch.kept()
    prefix = 1 + features.registers.shape[1]
    tokens = prefix + features.patches.shape[1]
    if q.shape[-2] != tokens or k.shape[-2] != tokens:
        raise UserError(
            f"attention of this model is over {k.shape[-2]} tokens, which are not CLS, "
            f"{prefix - 1} registers and {tokens - prefix} patches"
        )
    scores = (q[:, :, :prefix] @ k.mT).float() * q.shape[-1] ** -0.5
    return scores.softmax(dim=-1), features


def attention_image(attention: Tensor, grid: tuple[int, int], prefix: int, row: int = 0) -> Tensor:
    """Attention of CLS (row 0) or a register (rows 1 to R) to the patches, of each head.

    Args:
        attention: (heads, rows, T) of one image, T = prefix + h * w; rows sum to 1.
        prefix: tokens before the patches (CLS and registers), which are left out.

    Returns:
        (heads, h, w); sums to less than 1, for CLS also attends to the prefix.
    """
    return attention[:, row, prefix:].reshape(len(attention), *grid)


def cosine_maps(queries: Tensor, patches: Tensor) -> Tensor:
    """Cosine similarity (n, N) of n queries (n, D) with patches (N, D), in [-1, 1]."""
    return F.normalize(queries.float(), dim=-1) @ F.normalize(patches.float(), dim=-1).T


# Principal components.


@dataclass
class PCABasis:
    """Directions of largest variance of tokens, and the range of each that is drawn."""

    mean: Tensor  # (D,) float64
    axes: Tensor  # (components, D), unit length; 0 where the tokens have fewer directions than that
    low: Tensor  # (components,) of the projections: drawn as 0
    high: Tensor  # drawn as 255

    def project(self, patches: Tensor) -> Tensor:
        """(n, D) to (n, components), float64 on the CPU."""
        return (patches.detach().cpu().double() - self.mean) @ self.axes.T


def pca_basis(patches: Tensor, components: int = 3) -> PCABasis:
    """Principal components of patches (n, D), of one or of several images; most variance first.

    The same tokens in any order give the same basis: the largest loading of an axis is positive.
    Colours span the 2nd to the 98th percentile, because a few outliers would leave the rest grey.
    """
    points = patches.detach().cpu().double()
    mean = points.mean(dim=0)
    centred = points - mean
    variances, axes = (item[:components] for item in _principal(centred))
    largest = axes.gather(1, axes.abs().argmax(dim=1, keepdim=True))
    # Rounding of float32 features turns a variance of 0 into this; its directions are chance.
    rounding = 1e-12 * points.square().sum(dim=1).mean()
    axes = axes * largest.sign() * (variances > rounding)[:, None]
    axes = F.pad(axes, (0, 0, 0, components - len(axes)))
    # NumPy's, because torch.quantile refuses as many tokens as many large images have.
    low, high = torch.from_numpy(np.quantile((centred @ axes.T).numpy(), [0.02, 0.98], axis=0))
    return PCABasis(mean, axes, low, high)


def _principal(centred: Tensor) -> tuple[Tensor, Tensor]:
    """Variances and directions (k, D), largest first; from the smaller side of (n, D)."""
    if len(centred) < centred.shape[1]:
        singular, axes = torch.linalg.svd(centred, full_matrices=False)[1:]
        return singular.square() / len(centred), axes
    variances, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
    return variances.flip(0), vectors.T.flip(0)


def save_basis(path: Path, basis: PCABasis) -> None:
    """Four arrays under their names, in NumPy's .npz format whatever the suffix."""
    with path.open("wb") as file:
        np.savez(file, **{name: value.numpy() for name, value in vars(basis).items()})


def load_basis(path: Path) -> PCABasis:
    """What `save_basis` wrote.

    Raises:
        UserError: if the file is something else.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            names = ("mean", "axes", "low", "high")
            return PCABasis(*(torch.from_numpy(arrays[name]) for name in names))
    except (ValueError, KeyError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is no basis that `visualize.py pca --basis` wrote") from error


def pca_image(
    patches: Tensor, grid: tuple[int, int], basis: PCABasis, keep: Tensor | None = None
) -> Picture:
    """One pixel a patch: the first three components as red, green and blue.

    Args:
        patches: (N, D) of one image; grid: (h, w), h * w = N.
        keep: (N,) bool; the others are black.

    Returns:
        (h, w, 3) uint8. A component without variance is drawn as 127, mid grey.
    """
    span = basis.high - basis.low
    scaled = (basis.project(patches) - basis.low) / torch.where(span > 0, span, 1.0)
    scaled = torch.where(span > 0, scaled.clamp(0, 1), 0.5)
    if keep is not None:
        scaled = scaled * keep.cpu()[:, None]
    return (scaled * 255).to(torch.uint8).view(*grid, -1).numpy()


def foreground(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """(N,) bool: one side of the mean along the first component, as in DINOv2's PCA pictures.

    The sign of a component means nothing; the side that touches the border of the image less is
    the foreground (ours). Where all patches are alike, all are kept.
    """
    side = pca_basis(patches, components=1).project(patches)[:, 0] > 0
    border = torch.ones(grid, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    border = border.flatten()
    keep = side if side[border].double().mean() <= 0.5 else ~side
    return keep if keep.any() else ~keep


# Values and tensors as pictures.


def heat_picture(values: Tensor) -> Picture:
    """(h, w) from its least value (dark) to its 99th percentile (bright).

    The maximum would leave the rest dark where a token or two stand out.
    """
    from matplotlib import colormaps

    values = values.detach().cpu().double().numpy()
    low, high = values.min(), np.quantile(values, 0.99)
    span = (high if high > low else values.max()) - low
    scaled = np.clip((values - low) / span, 0, 1) if span > 0 else np.zeros_like(values)
    return (colormaps["magma"](scaled)[..., :3] * 255).astype(np.uint8)


def to_picture(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Picture:
    """A normalised image (C, H, W) as (H, W, 3) uint8.

    Of 3 channels or more the first three are red, green and blue; fewer are averaged to grey.
    """
    mean, std = (torch.tensor(list(values)[:3]).float().view(-1, 1, 1) for values in (mean, std))
    pixels = image.detach()[:3].cpu().float() * std
    pixels.add_(mean)  # in place from here on: scans are large
    if len(pixels) < 3:
        pixels = pixels.mean(dim=0, keepdim=True)
    pixels = pixels.nan_to_num_(0.0).clamp_(0, 1).mul_(255).round_().to(torch.uint8)
    return pixels.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()


def hide_patches(picture: Picture, mask: Tensor) -> Picture:
    """Masked patches in blue over a dim picture; `mask` is (h, w) bool, the picture (p·h, p·w)."""
    h, w = mask.shape
    hidden = np.kron(mask.numpy(), np.ones((picture.shape[0] // h, picture.shape[1] // w), bool))
    return np.where(hidden[..., None], np.uint8([40, 80, 140]) + picture // 8, picture)
