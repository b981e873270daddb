"""What a kept head predicts, drawn on pictures: masks, depth, boxes."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from evals.figures import draw_sheet
from evals.heads import TrainedHead
from evals.maps import Picture
from evals.photographs import Photograph

SHOWN = 0.3  # the least score of a box that is drawn
VEIL = 0.6  # share of a class's colour over the picture


def draw_predictions(
    path: Path, photographs: Iterable[Photograph], trained: TrainedHead, predict: Any = None
) -> list[dict[str, Any]]:
    """One row an image: the picture, and the prediction over it or beside it.

    Args:
        predict: in place of `trained`, such as one that goes by windows.

    Returns:
        Of each image its name and what was found: shares of classes, nearest and farthest depth in
        metres, or boxes (x1, y1, x2, y2) in pixels of the file with label and score.
    """
    draw = {"segmentation": draw_classes, "depth": draw_depth, "detection": draw_boxes}
    rows, found = [], []
    for photograph in photographs:
        image = photograph.image[None].to(next(trained.parameters()).device)
        result = (predict or trained)(image)[0]
        result = result.cpu() if isinstance(result, Tensor) else result
        picture, said = draw[trained.settings.task](photograph, result)
        rows.append([photograph.picture, picture])
        found.append({"image": photograph.name, **said})
    draw_sheet(path, rows, ["image", trained.settings.task])
    return found


def draw_classes(photograph: Photograph, scores: Tensor) -> tuple[Picture, dict[str, Any]]:
    """Classes (K, H, W) as colours, with a legend of those that cover a hundredth or more."""
    picture = photograph.picture
    scores = F.interpolate(scores[None], picture.shape[:2], mode="bilinear")[0]
    classes = scores.argmax(dim=0).numpy()
    shares = np.bincount(classes.flatten(), minlength=len(scores)) / classes.size
    colours = class_colours(len(scores))
    mixed = VEIL * colours[classes] + (1 - VEIL) * picture
    shown = {int(k): round(float(shares[k]), 3) for k in np.argsort(-shares) if shares[k] >= 0.01}
    drawn = Image.fromarray(mixed.round().astype(np.uint8))
    pen = ImageDraw.Draw(drawn)
    for row, k in enumerate(shown):
        top = 4 + 14 * row
        pen.rectangle(
            (4, top, 15, top + 11), fill=tuple(int(c) for c in colours[k]), outline="white"
        )
        pen.text((20, top), str(k), fill="white", stroke_width=2, stroke_fill="black")
    return np.asarray(drawn), {"classes": shown}


def class_colours(count: int) -> np.ndarray:
    """(count, 3) in 0 to 255: twenty colours, over and over."""
    from matplotlib import colormaps

    return 255 * np.array([colormaps["tab20"](k % 20)[:3] for k in range(count)])


def draw_depth(photograph: Photograph, depth: Tensor) -> tuple[Picture, dict[str, Any]]:
    """Depth (1, H, W) in metres, near bright and far dark, by logarithms."""
    from matplotlib import colormaps

    height, width = photograph.picture.shape[:2]
    depth = F.interpolate(depth[None], (height, width), mode="bilinear")[0, 0]
    low, high = (float(value) for value in depth.aminmax())
    log = depth.clamp(min=1e-6).log()
    share = (log - log.min()) / (log.max() - log.min()).clamp(min=1e-9)
    colours = colormaps["magma"](1 - share.numpy())[..., :3]
    drawn = Image.fromarray((255 * colours).round().astype(np.uint8))
    words = f"{low:.1f} to {high:.1f} m"
    ImageDraw.Draw(drawn).text((4, 4), words, fill="white", stroke_width=2, stroke_fill="black")
    return np.asarray(drawn), {"nearest": round(low, 3), "farthest": round(high, 3)}


def draw_boxes(photograph: Photograph, boxes: dict[str, Tensor]) -> tuple[Picture, dict[str, Any]]:
    """Boxes with a score of SHOWN or more, their class and score beside them."""
    shape = torch.tensor(photograph.image.shape[-2:]).flip(0).repeat(2)  # (w, h, w, h)
    to_picture = torch.tensor(photograph.picture.shape[:2]).flip(0).repeat(2) / shape
    to_file = torch.tensor(photograph.original).flip(0).repeat(2) / shape
    drawn = Image.fromarray(photograph.picture)
    pen, colours, said = ImageDraw.Draw(drawn), class_colours(20), []
    rows = zip(
        boxes["boxes"].cpu(), boxes["labels"].tolist(), boxes["scores"].tolist(), strict=True
    )
    for box, label, score in rows:
        if score < SHOWN:
            continue
        ink = tuple(int(c) for c in colours[label % 20])
        left, top, right, bottom = (box * to_picture).tolist()
        pen.rectangle((left, top, right, bottom), outline=ink, width=2)
        words = f"{label} {score:.2f}"
        pen.text((left + 3, top + 2), words, fill=ink, stroke_width=2, stroke_fill="black")
        corners = [round(value, 1) for value in (box * to_file).tolist()]
        said.append({"box": corners, "label": label, "score": round(score, 3)})
    return np.asarray(drawn), {"boxes": said}
