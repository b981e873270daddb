"""What texts can do with the vectors of images: classes, retrieval, segmentation by windows."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.sources.tables import open_text, read_csv
from errors import UserError
from evals.patches import strided_starts, upsample
from models.alignment import TextModel

# Ours; {} is the name of a class. dino.txt takes CLIP's 80.
TEMPLATES = ("{}", "a {}", "a picture of a {}")
RANKS = (1, 5, 10)  # of recall


def read_templates(choice: str | None) -> list[str]:
    """A line of a file each; `openai`: CLIP's 80, from the package open_clip_torch.

    Raises:
        UserError: if a line has no {} for the name.
    """
    if choice is None:
        return list(TEMPLATES)
    if choice == "openai":
        try:
            from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES
        except ImportError as error:
            raise UserError("--templates openai needs the package open_clip_torch") from error
        return [template("{}") for template in OPENAI_IMAGENET_TEMPLATES]
    with open_text(Path(choice)) as file:
        lines = [line.strip() for line in file if line.strip()]
    for line in lines:
        if "{}" not in line:
            raise UserError(f"{choice}: {line!r} has no {{}} for the name of the class")
    if not lines:
        raise UserError(f"{choice} holds no template")
    return lines


def read_names(path: Path | None, labels: list[str]) -> list[list[str]]:
    """The names of each class: its rows in a .csv (columns label, name), else its label in words.

    Raises:
        UserError: if the file names no class of the data.
    """
    words = [[label.replace("_", " ").replace("-", " ")] for label in labels]
    if path is None:
        return words
    given: dict[str, list[str]] = {}
    for row in read_csv(path, ("label", "name")):
        given.setdefault(row["label"].strip(), []).append(row["name"].strip())
    if not given.keys() & set(labels):
        raise UserError(f"{path} names none of the classes {', '.join(labels[:5])} ...")
    return [given.get(label, own) for label, own in zip(labels, words, strict=True)]


def top_accuracy(images: Tensor, labels: Tensor, classes: Tensor) -> dict[str, float]:
    """Shares of images whose class is the nearest, or among the five nearest.

    Args:
        images: (n, E) normalised; labels (n,); classes (K, E) normalised.
    """
    order = (images @ classes.T).topk(min(5, len(classes)), dim=1).indices
    hits = order == labels[:, None]
    return {"top1": float(hits[:, 0].double().mean()), "top5": float(hits.any(1).double().mean())}


def recall(images: Tensor, texts: Tensor, owners: Tensor) -> dict[str, dict[str, float]]:
    """Recall at 1, 5 and 10 of texts for images, and of images for texts (COCO's protocol).

    An image counts if any of its texts is among the first k. Ties go to the lower index.

    Args:
        images: (n, E), texts (m, E), both normalised.
        owners: (m,) row of the image of each text.
    """
    rows = torch.arange(len(images), device=images.device)
    owners = owners.to(images.device)
    return {
        "image_to_text": _hits(images, texts, lambda part: part[:, None] == owners, rows),
        "text_to_image": _hits(texts, images, lambda part: part[:, None] == rows, owners),
    }


def _hits(
    queries: Tensor,
    database: Tensor,
    relevant: Callable[[Tensor], Tensor],
    truth: Tensor,
    chunk: int = 512,
) -> dict[str, float]:
    found = []
    for rows, part in zip(queries.split(chunk), truth.split(chunk), strict=True):
        order = (rows @ database.T).argsort(dim=1, descending=True, stable=True)[:, : RANKS[-1]]
        found.append(relevant(part).gather(1, order))
    hits = torch.cat(found).double()
    return {str(k): float(hits[:, :k].amax(1).mean()) for k in RANKS}


def pooled_tokens(backbone: nn.Module, images: Tensor) -> Tensor:
    """CLS and mean of the patches (B, 2, D): all that a vision head without blocks needs."""
    features = backbone(images)
    return torch.stack([features.cls, features.patches.mean(dim=1)], dim=1).float()


@torch.no_grad()
def window_scores(
    model: TextModel, image: Tensor, classes: Tensor, side: int, stride: int
) -> Tensor:
    """(K, H, W): mean over windows of the softmax of cosines, without a temperature (dino.txt).

    Args:
        image: (C, H, W) normalised.
        classes: (K, E / 2) of L2 norm 1, which meet the patches.
        side, stride: of the square windows, in pixels; the last ones end where the image does.
    """
    height, width = image.shape[-2:]
    total, count = image.new_zeros(len(classes), height, width), image.new_zeros(height, width)
    for top in strided_starts(height, side, stride):
        for left in strided_starts(width, side, stride):
            place = np.s_[..., top : top + side, left : left + side]
            total[place] += softmax_map(model, image[place], classes)
            count[place] += 1
    return total / count


def softmax_map(model: TextModel, window: Tensor, classes: Tensor) -> Tensor:
    """(K, h, w) of a window (C, h, w), which is stretched to whole patches."""
    p, sides = model.patch_size, window.shape[-2:]
    whole = [max(p, round(side / p) * p) for side in sides]
    if whole != list(sides):
        window = F.interpolate(window[None], whole, mode="bilinear")[0]
    features = model(window[None])
    cosines = (features.patches[0] @ classes.T).T.unflatten(1, features.grid)
    return upsample(cosines, sides).softmax(dim=0)
