"""Sheets of photographs beside maps of their tokens: components, attention, similarity.

Photographs come one at a time (evals/photographs.py), so that only pictures and tokens are kept.
`tokens_of` in the arguments is image (C, h, w) -> tokens (N, D) and their grid (h, w).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.logger import notice
from errors import UserError
from evals.figures import draw_groups, draw_sheet, enlarge, mark, pack
from evals.maps import (
    PCABasis,
    Picture,
    attention_image,
    cosine_maps,
    foreground,
    heat_picture,
    load_basis,
    pca_basis,
    pca_image,
    prefix_attention,
    save_basis,
)
from evals.patches import patch_tokens
from evals.photographs import Photograph, patch_at

Tokens = Callable[[Tensor], tuple[Tensor, tuple[int, int]]]


def draw_components(
    path: Path,
    photographs: Iterable[Photograph],
    tokens_of: Tokens,
    *,
    joint: bool = False,
    basis: Path | None = None,
    cut_background: bool = False,
) -> int:
    """Principal components of patch tokens as colours. Returns the number of images.

    Args:
        joint: one basis for all images.
        basis: file of the basis; written if it does not exist.
        cut_background: background patches are black, see `foreground`.
    """
    pictures, tokens, grids = [], [], []
    for photograph in photographs:
        patches, grid = tokens_of(photograph.image)
        pictures.append(photograph.picture)
        tokens.append(patches)
        grids.append(grid)
    keeps = [torch.ones(len(patches), dtype=torch.bool) for patches in tokens]
    if cut_background:
        keeps = [foreground(*image) for image in zip(tokens, grids, strict=True)]
    kept = [patches[keep] for patches, keep in zip(tokens, keeps, strict=True)]
    bases = choose_bases(kept, joint, basis)
    groups = []
    for picture, *image in zip(pictures, tokens, grids, bases, keeps, strict=True):
        groups.append([picture, enlarge(pca_image(*image), len(picture), smooth=False)])
    draw_groups(path, groups, ["image", "PCA of patches"])
    return len(groups)


def choose_bases(tokens: list[Tensor], joint: bool, path: Path | None) -> list[PCABasis]:
    """A basis for each image's tokens (n, D): its own, that of all images, or that of the file.

    Raises:
        UserError: if the file was made from tokens of another width.
    """
    if path is None and not joint:
        return [pca_basis(patches) for patches in tokens]
    if path is not None and path.exists():
        basis, width = load_basis(path), tokens[0].shape[1]
        if len(basis.mean) != width:
            raise UserError(
                f"{path} was made from tokens of {len(basis.mean)} numbers; "
                f"those of this model have {width}"
            )
    else:
        basis = pca_basis(torch.cat(tokens))
        if path is not None:
            save_basis(path, basis)
            notice(f"colours of these images written to {path}")
    return [basis] * len(tokens)


def draw_attention(
    path: Path,
    photographs: Iterable[Photograph],
    backbone: nn.Module,
    device: torch.device,
    layer: int = -1,
) -> dict:
    """Attention of CLS, of each head and their mean, and of each register, in one block.

    Returns:
        {"images", "heads", "cls_attends_to": mean share of CLS, registers and patches}.
    """
    rows, shares = [], []
    for photograph in photographs:
        image, height = photograph.image[None].to(device), len(photograph.picture)
        weights, features = prefix_attention(backbone, image, layer)
        weights, prefix = weights[0].cpu(), weights.shape[2]
        cls, *registers = (
            attention_image(weights, features.grid, prefix, row) for row in range(prefix)
        )
        cells = [[cls.mean(dim=0)], cls]
        if registers:
            cells.append([maps.mean(dim=0) for maps in registers])
        rows.append([photograph.picture, *(pack_maps(maps, height) for maps in cells)])
        parts = weights[:, 0].tensor_split([1, prefix], dim=1)
        shares.append([part.sum(dim=1).mean() for part in parts])
    heads = len(cls)
    headings = ["image", f"CLS, mean of {heads} heads", "CLS, each head"]
    headings.append("each register, mean of heads")
    draw_sheet(path, rows, headings[: len(rows[0])])
    shares = torch.tensor(shares).mean(dim=0).tolist()
    names = ("cls", "registers", "patches")
    attended = {name: round(share, 4) for name, share in zip(names, shares, strict=True)}
    return {"images": len(rows), "heads": heads, "cls_attends_to": attended}


def pack_maps(maps: Sequence[Tensor], height: int) -> Picture:
    """Maps (h, w) of one image, each with its own range of colours, in one picture."""
    pictures = [heat_picture(values) for values in maps]
    return pack(pictures, math.isqrt(len(maps)), height, smooth=False)


def draw_similarity(
    path: Path,
    photographs: Iterable[Photograph],
    tokens_of: Tokens,
    *,
    size: int,
    patch_size: int,
    points: Sequence[str] | None = None,
    across: bool = False,
) -> dict:
    """Cosine of all patches with the patch at each point; by default at the centre.

    Args:
        size: short side in pixels of the fitted images.
        points: "X,Y" in pixels of the original images.
        across: the points of the first image are compared with all images.

    Returns:
        {"images", "cosine": [least, largest]}.
    """
    queries, groups, values = None, [], []
    places_wanted = [None] if points is None else [parse_point(text) for text in points]
    for name, original, image, picture in photographs:
        patches, grid = tokens_of(image)
        places = []
        if queries is None or not across:
            cells = [
                patch_at(point, name, original, size, grid, patch_size) for point in places_wanted
            ]
            queries = patches[[row * grid[1] + column for row, column in cells]]
            down, right = len(picture) / grid[0], picture.shape[1] / grid[1]
            places = [((column + 0.5) * right, (row + 0.5) * down) for row, column in cells]
        group = [mark(picture, places)]
        for number, cosines in enumerate(cosine_maps(queries, patches)):
            values += [cosines.min(), cosines.max()]
            heat = enlarge(heat_picture(cosines.view(grid)), len(picture), smooth=False)
            group.append(mark(heat, places[number : number + 1], first=number))
        groups.append(group)
    names = ["similarity to the centre"] if points is None else [f"to {text}" for text in points]
    draw_groups(path, groups, ["image", *names])
    span = [round(float(value), 4) for value in (min(values), max(values))]
    return {"images": len(groups), "cosine": span}


def parse_point(text: str) -> tuple[float, float]:
    try:
        x, y = (float(part) for part in text.split(","))
    except ValueError as error:
        raise UserError(
            f"--points has {text!r}; give X,Y in pixels of the original image, such as 120,80"
        ) from error
    return x, y


def draw_queries(
    path: Path,
    photographs: Iterable[Photograph],
    model: Any,
    queries: Sequence[str],
    window: int | None = None,
) -> dict:
    """Cosine of all patches with texts, one map a text; the colours of an image share one range.

    Args:
        model: a `TextModel`; its own half of a text's vector meets the patches.

    Returns:
        {"images", "cosine": [least, largest]}.
    """
    vectors, groups, values = model.encode_texts(list(queries), "patches").cpu(), [], []
    device = next(model.parameters()).device
    for photograph in photographs:
        patches, grid = patch_tokens(model, photograph.image, device, window)
        cosines = cosine_maps(vectors, patches)
        values += [cosines.min(), cosines.max()]
        together = heat_picture(cosines.view(-1, grid[1]))  # all maps, one below the other
        heats = together.reshape(len(queries), *grid, 3)
        height = len(photograph.picture)
        heats = [enlarge(heat, height, smooth=False) for heat in heats]
        groups.append([photograph.picture, *heats])
    draw_groups(path, groups, ["image", *queries])
    span = [round(float(value), 4) for value in (min(values), max(values))]
    return {"images": len(groups), "cosine": span}
