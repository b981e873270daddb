"""Images as points of a map: positions from CLS features, drawn as thumbnails or dots."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from errors import UserError
from evals.curves import STYLE
from evals.figures import COLOURS
from evals.maps import Picture, pca_basis

Map = tuple[np.ndarray, tuple[str, str]]  # positions (n, 2), labels of the axes


def pca_map(features: Tensor) -> Map:
    """The first two components of (n, D); the labels tell their shares of the variance."""
    positions = pca_basis(features, components=2).project(features)
    total = features.double().var(dim=0, unbiased=False).sum().clamp(min=1e-12)
    shares = (positions.var(dim=0, unbiased=False) / total).tolist()
    labels = [f"component {k}, {share:.0%} of the variance" for k, share in enumerate(shares, 1)]
    return positions.numpy(), tuple(labels)


def tsne_map(features: Tensor) -> Map:
    """scikit-learn's t-SNE of (n, D), from the first two components and seed 0.

    Raises:
        UserError: without scikit-learn, or with fewer than 4 images.
    """
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        wanted = "--method tsne needs scikit-learn: pip install scikit-learn"
        raise UserError(f"{wanted} ({error}); --method pca needs nothing") from error
    if len(features) < 4:
        raise UserError(
            f"--method tsne needs at least 4 images, not {len(features)}; "
            "--method pca takes any number"
        )
    perplexity = min(30.0, (len(features) - 1) / 3)
    model = TSNE(init="pca", perplexity=perplexity, random_state=0)
    return model.fit_transform(features.numpy()), ("", "")


def draw_embedding(
    path: Path,
    positions: np.ndarray,
    names: Sequence[str],
    thumbnails: Sequence[Picture] = (),
    axis_labels: tuple[str, str] = ("", ""),
) -> None:
    """Images at their positions (n, 2), by thumbnails or as points, coloured by name.

    Args:
        names: class or data set of each image; "" for none, drawn in grey.
        thumbnails: one for each image, framed in its colour; together they fill half of the sheet.
            Without thumbnails, points are drawn.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.offsetbox import AnnotationBbox, OffsetImage

    known = sorted(set(names) - {""})
    colours = distinct_colours(len(known))
    colour_of = {"": "#777777"} | dict(zip(known, colours, strict=True))
    inches, dpi = (9, 8), 160
    side = min(1.0, math.sqrt(0.5 * math.prod(inches) / max(1, len(names))))  # of a thumbnail
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        figure = Figure(inches, dpi=dpi, layout="constrained")
        axes = figure.add_subplot()
        for name in ["", *known]:
            chosen = np.array([other == name for other in names])
            dots = {"s": 14, "color": colour_of[name], "linewidths": 0}
            axes.scatter(*positions[chosen].T, label=name or None, **dots)
        for place, name, picture in zip(positions, names, thumbnails, strict=False):
            frame = {"edgecolor": colour_of[name], "linewidth": 1.5}
            # matplotlib takes 72 dots an inch.
            small = OffsetImage(picture, zoom=72 * side / max(picture.shape[:2]))
            axes.add_artist(AnnotationBbox(small, place, pad=0.05, bboxprops=frame))
        axes.margins(0.02 + (side / 10 if len(thumbnails) else 0.02))
        axes.set(xlabel=axis_labels[0], ylabel=axis_labels[1], xticks=[], yticks=[])
        if 1 < len(known) <= 40:
            figure.legend(loc="outside right upper", markerscale=2)
        figure.savefig(path, format="png")


def distinct_colours(count: int) -> list:
    """The first of COLOURS, or a rainbow where they are too few."""
    from matplotlib import colormaps

    if count <= len(COLOURS):
        return list(COLOURS[:count])
    return list(colormaps["turbo"](np.linspace(0.03, 0.97, count)))
