"""Sheets of pictures as PNG files.

Patch grids are enlarged without smoothing, so that one square is one token; photographs are
resampled smoothly.
"""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from evals.maps import (
    PCABasis,
    Picture,
    attention_image,
    heat_picture,
    pca_basis,
    pca_image,
    to_picture,
)

GAP = 6  # pixels between the pictures of a sheet
COLOURS = ("#2563a8", "#d9711c", "#2e8b57", "#b0357a", "#6a4fb0", "#8a6d3b", "#3aa0b5", "#666666")
RINGS = ("#ffffff", *COLOURS)


def enlarge(picture: Picture, height: int, smooth: bool = True) -> Picture:
    """To that height in the same aspect; `smooth=False` repeats pixels."""
    width = max(1, round(picture.shape[1] * height / picture.shape[0]))
    filter = Image.LANCZOS if smooth else Image.NEAREST
    return np.asarray(Image.fromarray(picture).resize((width, height), filter))


def mark(
    picture: Picture, places: Sequence[tuple[float, float]], first: int = 0, radius: int = 7
) -> Picture:
    """With a ring around each place (x, y) in pixels, in the colours of RINGS from `first` on."""
    image = Image.fromarray(picture)
    draw = ImageDraw.Draw(image)
    for number, (x, y) in enumerate(places, first):
        rings = (radius + 1, 5, "#000000"), (radius, 3, RINGS[number % len(RINGS)])
        for size, line, ink in rings:
            draw.ellipse((x - size, y - size, x + size, y + size), outline=ink, width=line)
    return np.asarray(image)


def pack(pictures: Sequence[Picture], rows: int, height: int, smooth: bool = True) -> Picture:
    """Pictures of one size in reading order, in rows that together are `height` pixels high."""
    rows = min(rows, len(pictures))
    each = max(1, (height - GAP * (rows - 1)) // rows)
    pictures = [enlarge(picture, each, smooth) for picture in pictures]
    (h, w), columns = pictures[0].shape[:2], math.ceil(len(pictures) / rows)
    canvas = np.full((height, columns * (w + GAP) - GAP, 3), 255, np.uint8)
    for number, picture in enumerate(pictures):
        y, x = (number // columns) * (h + GAP), (number % columns) * (w + GAP)
        canvas[y : y + h, x : x + w] = picture
    return canvas


def draw_sheet(
    path: Path, rows: Sequence[Sequence[Picture]], headings: Sequence[str], title: str = ""
) -> None:
    """A table on white: columns as wide as their widest, rows as high as their highest picture.

    A JPEG file where the path ends in .jpg, else PNG.
    """
    from matplotlib import get_data_path

    font_file = Path(get_data_path()) / "fonts/ttf/DejaVuSans.ttf"
    font, title_font = (ImageFont.truetype(str(font_file), size) for size in (13, 16))
    widths = [math.ceil(font.getlength(text)) for text in headings]
    for row in rows:
        for column, cell in enumerate(row):
            widths[column] = max(widths[column], cell.shape[1])
    heights = [max(cell.shape[0] for cell in row) for row in rows]
    top = 2 * GAP + (30 if title else 0) + (22 if any(headings) else 0)
    lefts = [2 * GAP + sum(widths[:i]) + 2 * GAP * i for i in range(len(widths))]
    size = max(lefts[-1] + widths[-1], math.ceil(2 * GAP + title_font.getlength(title))) + 2 * GAP
    canvas = Image.new("RGB", (size, top + sum(heights) + GAP * len(heights) + GAP), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((2 * GAP, 2 * GAP), title, fill="#222222", font=title_font)
    for left, heading in zip(lefts, headings, strict=True):
        draw.text((left, top - 22), heading, fill="#555555", font=font)
    for row, height in zip(rows, heights, strict=True):
        for left, cell in zip(lefts, row, strict=False):  # the last row may be shorter
            canvas.paste(Image.fromarray(cell), (left, top))
        top += height + GAP
    canvas.save(path, format="JPEG" if path.suffix == ".jpg" else "PNG")


def draw_groups(path: Path, groups: Sequence[Sequence[Picture]], headings: Sequence[str]) -> None:
    """A group of cells an image, as many groups side by side as make the sheet about square."""
    across = max(1, round(math.sqrt(len(groups) / len(headings))))
    rows = [list(itertools.chain(*groups[i : i + across])) for i in range(0, len(groups), across)]
    draw_sheet(path, rows, [*headings] * min(across, len(groups)))


def draw_report(
    path: Path,
    images: Sequence[Tensor | Picture],
    features: Any = None,
    crops: Sequence[Sequence[Tensor | Picture]] = (),
    *,
    mean: Sequence[float],
    std: Sequence[float],
    attention: Tensor | None = None,
    title: str = "",
    basis: PCABasis | None = None,
    height: int = 144,
) -> None:
    """One row an image: image, PCA of its patch tokens, CLS attention, its crops.

    Args:
        images: n of (C, H, W), normalised with mean and std, or pictures.
        features: `Features` of the images; None leaves PCA and attention out.
        crops: those of each image, normalised or pictures; crops of one size stand together,
            smaller sizes in several rows.
        attention: (n, heads, rows, T) whose first row is that of CLS, drawn as the mean over heads;
            None leaves it out.
        basis: of the colours; by default that of all images, so that colours compare.
        height: of a row, in pixels.
    """
    rows = [[enlarge(_picture(image, mean, std), height)] for image in images]
    headings = ["image"]
    if features is not None:
        basis = basis or pca_basis(features.patches.flatten(0, 1))
        headings.append("PCA of patches")
        for row, patches in zip(rows, features.patches, strict=True):
            row.append(enlarge(pca_image(patches, features.grid, basis), height, smooth=False))
    if features is not None and attention is not None:
        headings.append("CLS attention")
        prefix = attention.shape[-1] - features.patches.shape[1]
        for row, maps in zip(rows, attention, strict=True):
            heat = heat_picture(attention_image(maps.float(), features.grid, prefix).mean(dim=0))
            row.append(enlarge(heat, height, smooth=False))
    for row, views in zip(rows, crops, strict=False):  # there may be no crops
        row += crop_cells([_picture(view, mean, std) for view in views], height)
    if len(crops):
        headings += _crop_headings(crops[0])
    draw_sheet(path, rows, headings, title)


def _picture(image: Tensor | Picture, mean: Sequence[float], std: Sequence[float]) -> Picture:
    return to_picture(image, mean, std) if isinstance(image, Tensor) else image


def crop_cells(pictures: Sequence[Picture], height: int) -> list[Picture]:
    """Crops of one size together, smaller ones in several lines, all `height` pixels high."""
    groups = [list(group) for _, group in itertools.groupby(pictures, key=np.shape)]
    largest = max((len(picture) for picture in pictures), default=0)
    return [pack(group, max(1, round(largest / len(group[0]))), height) for group in groups]


def _crop_headings(views: Sequence[Tensor | Picture]) -> list[str]:
    shapes = (view.shape[-2:] if isinstance(view, Tensor) else view.shape[:2] for view in views)
    groups = [(shape, len(list(group))) for shape, group in itertools.groupby(shapes)]
    return [f"{n} crops, {h} px" if h == w else f"{n} crops, {h} × {w} px" for (h, w), n in groups]
