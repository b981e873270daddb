"""Mask2Former's loss (arXiv 2112.01527): queries are matched to masks, then told class and mask.

2 · cross-entropy of classes, 5 · binary cross-entropy and 5 · dice of masks at points. It equals
the loss of `transformers` on the same points.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

CLASS, BCE, DICE = 2.0, 5.0, 5.0
NO_OBJECT = 0.1  # weight of queries without a mask
OVERSAMPLE, IMPORTANT = 3, 0.75  # points drawn for one kept, share of kept ones by uncertainty
IGNORE = 255


def mask_loss(
    classes: Tensor,
    masks: Tensor,
    targets: Sequence[Tensor],
    points: int,
    draw: Callable[..., Tensor] = torch.rand,
    by_class: bool = False,
) -> Tensor:
    """The mean over the batch's masks.

    Args:
        classes: (B, Q, K + 1) scores, the last one of "no object".
        masks: (B, Q, h, w) scores.
        targets: class numbers (H, W); negative ones and 255 belong to no mask.
        points: of a mask that enter the loss.
        draw: shape -> uniform numbers in [0, 1); points (x, y) as shares of width and height.
        by_class: query k takes class k (MaskFormer's fixed matching), else each class the query
            that costs least.
    """
    empty = classes.shape[-1] - 1
    truth = torch.full(classes.shape[:2], empty, device=classes.device)
    chosen_masks, chosen_truth = [], []
    for b, target in enumerate(targets):
        target = target.to(classes.device).long()
        present = target[(target >= 0) & (target != IGNORE)].unique()
        if not len(present):
            continue
        of_classes = (target == present[:, None, None]).float()
        queries = present
        if not by_class:
            places = draw((1, points, 2), device=classes.device)
            costs = match_costs(classes[b], masks[b], present, of_classes, places)
            _, columns = assign(costs.T.cpu().numpy())  # masks are fewer than queries
            queries = torch.as_tensor(columns, device=classes.device)
        truth[b, queries] = present
        chosen_masks.append(masks[b, queries])
        chosen_truth.append(of_classes)
    weight = torch.ones(empty + 1, device=classes.device)
    weight[empty] = NO_OBJECT
    total = CLASS * F.cross_entropy(classes.mT, truth, weight)
    count = max(1, sum(map(len, chosen_masks)))
    if chosen_masks:
        scores = torch.cat(chosen_masks)[:, None]
        places = uncertain_points(scores.detach(), points, draw)
        guess = at_points(scores, places)[:, 0]
        sizes = [len(part) for part in chosen_masks]
        parts = zip(chosen_truth, places.split(sizes), strict=True)
        wanted = torch.cat([at_points(part[:, None], where)[:, 0] for part, where in parts])
        bce = F.binary_cross_entropy_with_logits(guess, wanted, reduction="none").mean(1).sum()
        total = total + (BCE * bce + DICE * dice(guess.sigmoid(), wanted).sum()) / count
    return total


@torch.no_grad()
def match_costs(
    classes: Tensor, masks: Tensor, present: Tensor, truth: Tensor, places: Tensor
) -> Tensor:
    """(Q, T): what it costs to give each of T masks (T, H, W) to each query of one image."""
    named = classes.softmax(dim=-1)[:, present]
    places = places.expand(max(len(masks), len(truth)), -1, -1)
    guess = at_points(masks[:, None], places[: len(masks)])[:, 0]
    wanted = at_points(truth[:, None], places[: len(truth)])[:, 0]
    # softplus(-x) is the loss where the mask is, softplus(x) where it is not.
    inside, outside = F.softplus(-guess), F.softplus(guess)
    bce = (inside @ wanted.T + outside @ (1 - wanted).T) / guess.shape[1]
    p = guess.sigmoid()
    overlap = 1 - (2 * p @ wanted.T + 1) / (p.sum(1)[:, None] + wanted.sum(1) + 1)
    return (BCE * bce + DICE * overlap - CLASS * named).nan_to_num(1e10).clamp(-1e10, 1e10)


def dice(p: Tensor, wanted: Tensor) -> Tensor:
    """(T,) of probabilities and truth (T, P)."""
    return 1 - (2 * (p * wanted).sum(1) + 1) / (p.sum(1) + wanted.sum(1) + 1)


def at_points(maps: Tensor, places: Tensor) -> Tensor:
    """(T, 1, H, W) at places (T, P, 2) -> (T, 1, P), bilinear; outside the map is 0."""
    grid = 2 * places[:, :, None] - 1
    return F.grid_sample(maps, grid, align_corners=False)[..., 0]


@torch.no_grad()
def uncertain_points(scores: Tensor, count: int, draw: Callable[..., Tensor]) -> Tensor:
    """(T, count, 2): of many drawn points those where the score is nearest 0, and a few at random.

    PointRend, arXiv 1912.08193.
    """
    drawn = draw((len(scores), count * OVERSAMPLE, 2), device=scores.device)
    doubt = -at_points(scores, drawn)[:, 0].abs()
    certain = int(IMPORTANT * count)
    kept = doubt.topk(certain, dim=1).indices
    chosen = drawn.gather(1, kept[..., None].expand(-1, -1, 2))
    return torch.cat([chosen, draw((len(scores), count - certain, 2), device=scores.device)], dim=1)


def assign(costs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The cheapest assignment of each row of (R, C) to a column of its own, R <= C.

    Shortest augmenting paths (Jonker and Volgenant 1987), R² steps over C columns.

    Returns:
        Row and column numbers, each (R,).

    Raises:
        ValueError: if there are more rows than columns.
    """
    rows, columns = costs.shape
    if rows > columns:
        raise ValueError(f"{rows} rows need as many columns; there are {columns}")
    # Column 0 is a root without cost; owner[j] is the row of column j, 0 for none.
    padded = np.zeros((rows + 1, columns + 1))
    padded[1:, 1:] = costs
    of_row, of_column = np.zeros(rows + 1), np.zeros(columns + 1)
    owner = np.zeros(columns + 1, int)
    for row in range(1, rows + 1):
        owner[0], column = row, 0
        least, before = np.full(columns + 1, np.inf), np.zeros(columns + 1, int)
        visited = np.zeros(columns + 1, bool)
        while owner[column]:
            visited[column] = True
            reduced = padded[owner[column]] - of_row[owner[column]] - of_column
            closer = ~visited & (reduced < least)
            least[closer], before[closer] = reduced[closer], column
            column = int(np.where(visited, np.inf, least).argmin())
            step = least[column]
            of_row[owner[visited]] += step
            of_column[visited] -= step
            least[~visited] -= step
        while column:
            owner[column], column = owner[before[column]], before[column]
    found = owner[1:].nonzero()[0]
    order = np.argsort(owner[1:][found])
    return np.arange(rows), found[order]
