"""Which images of a pool to keep: near duplicates, balance over concepts, neighbours of a seed set.

Rows of features in, row numbers out. Duplicates and retrieval as in DINOv2 (arXiv 2304.07193,
section 3), balance by hierarchical k-means as in Vo et al. (2405.15613) and DINOv3.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from errors import UserError

BLOCK = 4096  # rows on either side of one product of similarities
STEPS = np.arange(-4, 5) * 0.025  # from the threshold, of the curve of pairs
UPDATES, ROUNDS = 50, 10  # of k-means; of resampling
FLAT = 0.002  # standard deviation of grey values below which thumbnails count as flat
LEAST_CENTRES = 50  # a level with fewer would not balance anything

Progress = Callable[[Iterable], Iterator]


def check_rows(rows: Tensor) -> Tensor:
    """(n, D) float32.

    Raises:
        UserError: if a number is not finite.
    """
    bad = (~rows.isfinite().all(1)).nonzero()[:, 0].tolist()
    if bad:
        raise UserError(f"the features of row {bad[0]} are not finite, with {len(bad)} rows in all")
    return rows.float()


# ----------------------------------------------------------------- near duplicates


@dataclass
class Duplicates:
    """Groups of rows that are joined by similar pairs.

    Attributes:
        roots: (n,) the smallest row of each row's group.
        pairs: (m, 2) some pairs, most of them near the threshold.
        similarities: (m,) theirs.
        curve: similarity -> pairs that are at least so similar.
    """

    roots: np.ndarray
    pairs: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.int64))
    similarities: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    curve: dict[float, int] = field(default_factory=dict)


def thumbnails(images: Tensor) -> Tensor:
    """(B, C, H, W) in [0, 1] -> (B, 257) whose cosine compares the layout of light and dark.

    16 x 16 grey pixels without their mean. The last number makes flat images alike.
    """
    grey = F.adaptive_avg_pool2d(images.float().mean(1, keepdim=True), 16).flatten(1)
    return F.pad(grey - grey.mean(1, keepdim=True), (0, 1), value=16 * FLAT)


def find_duplicates(
    rows: Tensor,
    threshold: float,
    *,
    thumbs: Tensor | None = None,
    layout: float = 0.0,
    examples: int = 12,
    block: int = BLOCK,
    progress: Progress = iter,
) -> Duplicates:
    """Groups of rows whose cosine reaches the threshold, directly or over others; exact.

    Memory holds `block` squared similarities at a time. The result does not depend on `block`.

    Args:
        thumbs: of `thumbnails`; their cosine must reach `layout` as well.
        examples: pairs that are kept, half above the threshold and half below, the nearest to it;
            a row stands in one of them only.
    """
    rows = F.normalize(check_rows(rows), dim=1)
    thumbs = None if thumbs is None else F.normalize(thumbs, dim=1)
    found = Duplicates(np.arange(len(rows)))
    steps = (threshold + STEPS).round(4)
    steps = steps[(steps > 0) & (steps < 1)] if threshold < 1 else np.array([1.0])
    counts = np.zeros(len(steps), np.int64)
    starts = range(0, len(rows), block)
    kept: list[tuple[float, int, int]] = []
    for first, second in progress([(i, j) for i in starts for j in starts if i <= j]):
        cosines = rows[first : first + block] @ rows[second : second + block].T
        near = cosines >= float(steps[0])
        if thumbs is not None:
            near &= thumbs[first : first + block] @ thumbs[second : second + block].T >= layout
        if first == second:
            near = near.triu(1)
        a, b = near.nonzero(as_tuple=True)
        values = cosines[a, b].cpu().numpy()
        a, b = (a + first).cpu().numpy(), (b + second).cpu().numpy()
        counts += (values[:, None] >= steps).sum(0)
        similar = values >= threshold
        join(found.roots, a[similar], b[similar])
        # More than are shown, for images that stand in many pairs are shown once.
        kept = _nearest(kept, zip(values, a, b, strict=True), threshold, 8 * examples)
    kept = _varied(kept, threshold, examples)
    found.pairs = np.array([pair[1:] for pair in kept], np.int64).reshape(-1, 2)
    found.similarities = np.array([pair[0] for pair in kept], np.float32)
    found.curve = dict(zip(steps.tolist(), counts.tolist(), strict=True))
    return found


def _nearest(kept: list, further: Iterable, threshold: float, count: int) -> list:
    """`count` pairs, half of them above the threshold where there are so many, by similarity."""
    every = sorted([*kept, *((float(s), int(a), int(b)) for s, a, b in further)])
    split = sum(pair[0] < threshold for pair in every)
    return every[max(0, split - count // 2) : split + count // 2]


def _varied(pairs: list, threshold: float, count: int) -> list:
    """As `_nearest`, each row in one pair only."""
    used, sides = set(), {True: [], False: []}
    for pair in sorted(pairs, key=lambda pair: abs(pair[0] - threshold)):
        side = sides[pair[0] >= threshold]
        if len(side) < count // 2 and not used & set(pair[1:]):
            side.append(pair)
            used |= set(pair[1:])
    return sorted([*sides[False], *sides[True]])


def join(roots: np.ndarray, a: np.ndarray, b: np.ndarray) -> None:
    """Joins the groups of a[i] and b[i], in place; a group's root is its smallest member."""
    while True:
        low, high = np.minimum(roots[a], roots[b]), np.maximum(roots[a], roots[b])
        apart = low != high
        if not apart.any():
            return
        a, b = a[apart], b[apart]
        np.minimum.at(roots, high[apart], low[apart])
        while not np.array_equal(roots[roots], roots):
            roots[:] = roots[roots]


def nearest(
    queries: Tensor, pool: Tensor, k: int, *, block: int = BLOCK, progress: Progress = iter
) -> tuple[Tensor, Tensor]:
    """Cosines and rows of the k nearest of the pool, (q, k) each, the nearest first."""
    queries, pool = (F.normalize(check_rows(rows), dim=1) for rows in (queries, pool))
    k = min(k, len(pool))
    values, indices = [], []
    for part in progress(queries.split(block)):
        best = part.new_empty(len(part), 0)
        where = torch.empty(len(part), 0, dtype=torch.int64, device=part.device)
        for start in range(0, len(pool), block):
            cosines = part @ pool[start : start + block].T
            rows = torch.arange(start, start + cosines.shape[1], device=part.device)
            best = torch.cat([best, cosines], 1)
            where = torch.cat([where, rows.expand_as(cosines)], 1)
            best, order = best.topk(min(k, best.shape[1]), dim=1)
            where = where.gather(1, order)
        values.append(best)
        indices.append(where)
    return torch.cat(values), torch.cat(indices)


# ----------------------------------------------------------------- balance


def k_means(
    points: Tensor, k: int, generator: torch.Generator, updates: int = UPDATES
) -> tuple[Tensor, Tensor]:
    """Centres (k, D) and the nearest of them of each point (n,), by k-means++ and Lloyd's updates.

    Sums are float64. A centre without points stays where it is. It ends early once nothing moves.
    """
    k = min(k, len(points))
    centres = _plus_plus(points, k, generator)
    nearest_centre = assign(points, centres)
    for _ in range(updates):
        sums = torch.zeros(k, points.shape[1], dtype=torch.float64)
        sums.index_add_(0, nearest_centre, points.double())
        sizes = torch.bincount(nearest_centre, minlength=k)[:, None]
        moved = (sums / sizes.clamp(min=1)).to(points.dtype)
        centres = torch.where(sizes > 0, moved, centres)
        before, nearest_centre = nearest_centre, assign(points, centres)
        if torch.equal(before, nearest_centre):
            break
    return centres, nearest_centre


def _plus_plus(points: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """k-means++ with 2 + ln k tries a centre (greedy), on at most 50 points a centre."""
    if len(points) > 50 * k:
        points = points[torch.randperm(len(points), generator=generator)[: 50 * k]]
    tries = 2 + int(math.log(k))
    chosen = torch.randint(len(points), (1,), generator=generator)
    distances = _squared(points, points[chosen])[:, 0]
    for _ in range(k - 1):
        weights = distances.double().cumsum(0)
        if weights[-1] == 0:  # all other points stand on centres
            drawn = torch.randint(len(points), (1,), generator=generator)
        else:
            at = torch.rand(tries, generator=generator, dtype=torch.float64) * weights[-1]
            drawn = torch.searchsorted(weights, at).clamp(max=len(points) - 1)
        candidates = torch.minimum(_squared(points, points[drawn]), distances[:, None])
        best = candidates.sum(0).argmin()
        chosen = torch.cat([chosen, drawn[best : best + 1]])
        distances = candidates[:, best]
    return points[chosen]


def _squared(points: Tensor, centres: Tensor) -> Tensor:
    """Squared distances (n, k), never below 0."""
    norms = points.square().sum(1, keepdim=True) + centres.square().sum(1)
    return (norms - 2 * points @ centres.T).clamp(min=0)


def assign(points: Tensor, centres: Tensor, block: int = BLOCK) -> Tensor:
    """The nearest centre of each point, (n,)."""
    return torch.cat([_squared(part, centres).argmin(1) for part in points.split(block)])


def hierarchy(
    points: Tensor,
    levels: Sequence[int],
    generator: torch.Generator,
    rounds: int = ROUNDS,
    progress: Progress = iter,
) -> list[np.ndarray]:
    """The cluster of each point on each level, (n,) each, finest first.

    A level clusters the centres of the one below. Resampling, from the second level on: the points
    of a level nearest to their centres, about half a mean cluster of them each, are clustered anew.
    """
    points, below, found = check_rows(points), None, []
    for number, k in enumerate(progress(levels)):
        centres, own = k_means(points, k, generator)
        for _ in range(rounds if number else 0):
            taken = _nearest_of_each(
                points, centres, own, max(1, len(points) // (2 * len(centres)))
            )
            centres, _ = k_means(points[taken], k, generator)
            own = assign(points, centres)
        used, own = torch.unique(own, return_inverse=True)  # without clusters that hold nothing
        points, below = centres[used], own if below is None else own[below]
        found.append(below.numpy())
    return found


def _nearest_of_each(points: Tensor, centres: Tensor, own: Tensor, count: int) -> Tensor:
    """Rows of the `count` points nearest to their centre, of each cluster."""
    distances = (points - centres[own]).square().sum(1)
    order = distances.argsort(stable=True)
    order = order[own[order].argsort(stable=True)]
    sizes = torch.bincount(own, minlength=len(centres))
    rank = torch.arange(len(points)) - (sizes.cumsum(0) - sizes)[own[order]]
    return order[rank < count]


def default_levels(count: int) -> list[int]:
    """Ours, for small pools: a centre for 30 points, then a tenth each, down to LEAST_CENTRES."""
    levels = [max(1, count // 30)]
    while count >= 5000 and levels[-1] // 10 >= LEAST_CENTRES:
        levels.append(levels[-1] // 10)
    return levels


def cap(sizes: Sequence[int], target: int, rng: np.random.Generator) -> np.ndarray:
    """How many to take of each: all up to the largest equal share that fits, with the rest by lot.

    The sum is the smaller of `target` and the sum of the sizes.
    """
    sizes = np.asarray(sizes, np.int64)
    if sizes.sum() <= target:
        return sizes.copy()
    low, high = 0, int(sizes.max())
    while low < high:
        middle = (low + high + 1) // 2
        if np.minimum(sizes, middle).sum() <= target:
            low = middle
        else:
            high = middle - 1
    quotas = np.minimum(sizes, low)
    larger = np.flatnonzero(sizes > low)
    quotas[rng.choice(larger, target - quotas.sum(), replace=False)] += 1
    return quotas


def balanced(levels: Sequence[np.ndarray], target: int, rng: np.random.Generator) -> np.ndarray:
    """`target` rows, as evenly as possible from the clusters of the coarsest level, then within."""

    def draw(rows: np.ndarray, level: int, count: int) -> np.ndarray:
        if level < 0:
            return rng.choice(rows, count, replace=False)
        clusters, own = np.unique(levels[level][rows], return_inverse=True)
        quotas = cap(np.bincount(own, minlength=len(clusters)), count, rng)
        order = np.argsort(own, kind="stable")
        parts = np.split(rows[order], np.cumsum(np.bincount(own))[:-1])
        taken = [draw(part, level - 1, q) for part, q in zip(parts, quotas, strict=True)]
        return np.concatenate(taken)

    rows = np.arange(len(levels[0]))
    return np.sort(draw(rows, len(levels) - 1, min(target, len(rows))))


def entropy(clusters: np.ndarray) -> float:
    """Of the sizes of clusters, as a share of the largest possible; 1: all are of one size."""
    shares = np.bincount(clusters)[np.unique(clusters)] / len(clusters)
    return float(-(shares * np.log(shares)).sum() / math.log(max(2, len(shares))))
