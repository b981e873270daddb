"""Sheets of pictures, maps of images and curves over runs, as PNG files.

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
CURVES = (
    "loss", "loss/", "probe/", "health/", "grad_norm",
    "lr", "weight_decay", "ema_momentum", "teacher_temp", "images_per_second",
)  # fmt: skip
NOISY = ("loss", "health/", "grad_norm", "images_per_second")  # drawn with a running mean

# Sheets of pictures.


def enlarge(picture: Picture, height: int, smooth: bool = True) -> Picture:
    """To that height in the same aspect; `smooth=False` repeats pixels."""
    width = max(1, round(picture.shape[1] * height / picture.shape[0]))
    filter = Image.LANCZOS if smooth else Image.NEAREST
    return np.asarray(Image.fromarray(picture).resize((width, height), filter))


def mark(
    picture: Picture, places: Sequence[tuple[float, float]], first: int = 0, radius: int = 7
) -> Picture:
    """With a ring around each place (x, y) in pixels of the picture, in the colours of RINGS from number `first` on."""
    image = Image.fromarray(picture)
    draw = ImageDraw.Draw(image)
    for number, (x, y) in enumerate(places, first):
        for size, line, ink in (
            (radius + 1, 5, "#000000"),
            (radius, 3, RINGS[number % len(RINGS)]),
        ):
            draw.ellipse((x - size, y - size, x + size, y + size), outline=ink, width=line)
    return np.asarray(image)


def pack(pictures: Sequence[Picture], rows: int, height: int, smooth: bool = True) -> Picture:
    """Pictures of one size in reading order, in rows that together are `height` pixels high."""
    rows = min(rows, len(pictures))
    pictures = [
        enlarge(picture, max(1, (height - GAP * (rows - 1)) // rows), smooth)
        for picture in pictures
    ]
    (h, w), columns = pictures[0].shape[:2], math.ceil(len(pictures) / rows)
    canvas = np.full((height, columns * (w + GAP) - GAP, 3), 255, np.uint8)
    for number, picture in enumerate(pictures):
        y, x = (number // columns) * (h + GAP), (number % columns) * (w + GAP)
        canvas[y : y + h, x : x + w] = picture
    return canvas


def draw_sheet(
    path: Path, rows: Sequence[Sequence[Picture]], headings: Sequence[str], title: str = ""
) -> None:
    """A table on white: columns as wide as their widest, rows as high as their highest picture."""
    from matplotlib import get_data_path

    font_file = Path(get_data_path()) / "fonts/ttf/DejaVuSans.ttf"
    font, title_font = (ImageFont.truetype(str(font_file), size) for size in (13, 16))
    widths = [math.ceil(font.getlength(text)) for text in headings]
    for row in rows:
        widths[: len(row)] = [max(width, cell.shape[1]) for width, cell in zip(widths, row)]
    heights = [max(cell.shape[0] for cell in row) for row in rows]
    top = 2 * GAP + (30 if title else 0) + (22 if any(headings) else 0)
    lefts = [2 * GAP + sum(widths[:i]) + 2 * GAP * i for i in range(len(widths))]
    size = max(lefts[-1] + widths[-1], math.ceil(2 * GAP + title_font.getlength(title))) + 2 * GAP
    canvas = Image.new("RGB", (size, top + sum(heights) + GAP * len(heights) + GAP), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((2 * GAP, 2 * GAP), title, fill="#222222", font=title_font)
    for left, heading in zip(lefts, headings):
        draw.text((left, top - 22), heading, fill="#555555", font=font)
    for row, height in zip(rows, heights):
        for left, cell in zip(lefts, row):
            canvas.paste(Image.fromarray(cell), (left, top))
        top += height + GAP
    canvas.save(path, format="PNG")


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
        attention: (n, heads, rows, T) whose first row is that of CLS, drawn as the mean over heads; None leaves it out.
        basis: by default that of the images together, so that a colour means the same in every row.
        height: of a row, in pixels.
    """
    rows = [[enlarge(_picture(image, mean, std), height)] for image in images]
    headings = ["image"]
    if features is not None:
        basis = basis or pca_basis(features.patches.flatten(0, 1))
        headings.append("PCA of patches")
        for row, patches in zip(rows, features.patches):
            row.append(enlarge(pca_image(patches, features.grid, basis), height, smooth=False))
    if features is not None and attention is not None:
        headings.append("CLS attention")
        prefix = attention.shape[-1] - features.patches.shape[1]
        for row, maps in zip(rows, attention):
            heat = heat_picture(attention_image(maps.float(), features.grid, prefix).mean(dim=0))
            row.append(enlarge(heat, height, smooth=False))
    for row, views in zip(rows, crops):
        row += _crop_cells([_picture(view, mean, std) for view in views], height)
    if len(crops):
        headings += _crop_headings(crops[0])
    draw_sheet(path, rows, headings, title)


def _picture(image: Tensor | Picture, mean: Sequence[float], std: Sequence[float]) -> Picture:
    return to_picture(image, mean, std) if isinstance(image, Tensor) else image


def _crop_cells(pictures: Sequence[Picture], height: int) -> list[Picture]:
    groups = [list(group) for _, group in itertools.groupby(pictures, key=np.shape)]
    largest = max((len(picture) for picture in pictures), default=0)
    return [pack(group, max(1, round(largest / len(group[0]))), height) for group in groups]


def _crop_headings(views: Sequence[Tensor | Picture]) -> list[str]:
    shapes = (view.shape[-2:] if isinstance(view, Tensor) else view.shape[:2] for view in views)
    groups = [(shape, len(list(group))) for shape, group in itertools.groupby(shapes)]
    return [f"{n} crops, {h} px" if h == w else f"{n} crops, {h} × {w} px" for (h, w), n in groups]


# Images as points.


def draw_embedding(
    path: Path,
    positions: np.ndarray,
    names: Sequence[str],
    thumbnails: Sequence[Picture] = (),
    axis_labels: tuple[str, str] = ("", ""),
) -> None:
    """Images at their positions (n, 2), by thumbnails or as points, coloured by name.

    Args:
        names: of a class or a data set, one an image; "" for none, drawn in grey.
        thumbnails: one an image, framed in its colour, as large as leaves half of the sheet free; none draws points.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.offsetbox import AnnotationBbox, OffsetImage

    known = sorted(set(names) - {""})
    colour_of = {"": "#777777", **dict(zip(known, distinct_colours(len(known))))}
    inches, dpi = (9, 8), 160
    side = min(1.0, math.sqrt(0.5 * math.prod(inches) / max(1, len(names))))  # of a thumbnail
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        figure = Figure(inches, dpi=dpi, layout="constrained")
        axes = figure.add_subplot()
        for name in ["", *known]:
            chosen = np.array([other == name for other in names])
            axes.scatter(
                *positions[chosen].T, s=14, color=colour_of[name], label=name or None, linewidths=0
            )
        for place, name, picture in zip(positions, names, thumbnails):
            frame = {"edgecolor": colour_of[name], "linewidth": 1.5}
            small = OffsetImage(
                picture, zoom=72 * side / max(picture.shape[:2])
            )  # matplotlib takes 72 dots an inch
            axes.add_artist(AnnotationBbox(small, place, pad=0.05, bboxprops=frame))
        axes.margins(0.02 + (side / 10 if len(thumbnails) else 0.02))
        axes.set(xlabel=axis_labels[0], ylabel=axis_labels[1], xticks=[], yticks=[])
        if 1 < len(known) <= 40:
            figure.legend(loc="outside right upper", markerscale=2)
        figure.savefig(path, format="png")


def distinct_colours(count: int) -> list:
    """COLOURS as far as they reach, more from around the rainbow."""
    from matplotlib import colormaps

    return (
        list(COLOURS[:count])
        if count <= len(COLOURS)
        else list(colormaps["turbo"](np.linspace(0.03, 0.97, count)))
    )


# Curves.

STYLE = {
    "font.size": 8,
    "axes.linewidth": 0.6,
    "axes.edgecolor": "#888888",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "xtick.major.size": 2,
    "ytick.major.size": 2,
    "legend.frameon": False,
}


def draw_curves(path: Path, runs: dict[str, list[dict]]) -> None:
    """Losses, probes, health, schedules and speed over steps, a small panel each, runs overlaid.

    Args:
        runs: name -> records of its metrics.jsonl. Fields that are missing or null are skipped.
    """
    import matplotlib
    from matplotlib.figure import Figure

    names = curve_names(runs) or ["loss"]
    last_step = max([1, *(record["step"] for records in runs.values() for record in records)])
    columns = min(4, len(names))
    rows = math.ceil(len(names) / columns)
    with matplotlib.rc_context(STYLE):
        width, height = 0.7 + 2.5 * columns, 0.9 + 1.7 * rows  # inches
        figure = Figure(
            (width, height), dpi=160
        )  # places are given: finding them takes as long as drawing
        figure.subplots_adjust(
            0.6 / width, 0.45 / height, 1 - 0.15 / width, 1 - 0.6 / height, 0.28, 0.42
        )
        for number, name in enumerate(names):
            axes = figure.add_subplot(rows, columns, number + 1)
            _draw_panel(axes, name, runs)
            axes.set_xlim(-0.02 * last_step, 1.02 * last_step)
            if number + columns >= len(names):
                axes.set_xlabel("step", color="#555555")
        lines, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(lines, labels, loc="upper left", ncols=max(1, 2 * columns - 2))
        figure.savefig(path, format="png")


def curve_names(runs: dict[str, list[dict]]) -> list[str]:
    """The fields that any run has numbers of, in the order of CURVES."""
    records = [record for run in runs.values() for record in run]
    found = dict.fromkeys(key for record in records for key in record if record[key] is not None)
    kinds = {key: key.partition("/")[0] + "/" if "/" in key else key for key in found}
    return [key for kind in CURVES for key in found if kinds[key] == kind]


def _draw_panel(axes: Any, name: str, runs: dict[str, list[dict]]) -> None:
    from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

    axes.set_title(name.replace("_", " ").replace("/", ": "), loc="left", fontsize=8.5)
    for number, (run, records) in enumerate(runs.items()):
        known = [record for record in records if record.get(name) is not None]
        steps, values = (np.array([record[key] for record in known]) for key in ("step", name))
        line = {"color": COLOURS[number % len(COLOURS)], "linewidth": 1.2}
        line["linestyle"] = ("-", "--", ":")[number // len(COLOURS) % 3]
        if len(values) <= 1 or name.startswith("probe/"):
            line |= {"marker": "o", "markersize": 2.5}
        if len(values) >= 100 and name.startswith(NOISY):
            axes.plot(steps, values, **line | {"linewidth": 0.5, "alpha": 0.3})
            values = running_mean(values, len(values) // 50 + 1)
        axes.plot(steps, values, label=run, **line)
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10], integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g}"))


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """The mean of up to `window` values on either side; fewer at the ends."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    centre = np.arange(len(values))
    first, last = np.maximum(centre - window, 0), np.minimum(centre + window + 1, len(values))
    return (total[last] - total[first]) / (last - first)
