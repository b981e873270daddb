"""Objects found without labels, by attention, LOST and TokenCut, against boxes or masks."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from errors import UserError
from evals.patches import Patches
from evals.reading import in_order

TAUS = tuple(round(0.05 * k, 2) for k in range(9))  # TokenCut's threshold as DINOv3 sweeps it
# Of an image: its graph takes half a gigabyte in float64, its eigenvectors minutes.
MOST_PATCHES = 8192
Grid = tuple[int, int]  # (h, w) in patches
SHARES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # sides of the centred box


class Found(NamedTuple):
    """One object of a patch grid (h, w)."""

    mask: Tensor  # (h, w) bool
    peak: tuple[int, int]  # row and column of the surest patch


class Truth(NamedTuple):
    """Annotated objects of an image, at least one."""

    boxes: Tensor  # (n, 4) float x0, y0, x1, y1 in pixels
    masks: Tensor | None  # (n, H, W) bool, if the data has masks
    shape: tuple[int, int]  # (height, width) in pixels that the boxes refer to


# Three methods.


def by_attention(attention: Tensor, mass: float = 0.6) -> Found:
    """The fewest patches that hold `mass` of the attention, heads averaged (as in DINO's pictures).

    Args:
        attention: (heads, h, w) from CLS to patches.
    """
    mean = attention.float().mean(dim=0)
    values, order = mean.flatten().sort(descending=True)
    before = values.cumsum(0) - values
    mask = torch.zeros(mean.numel(), dtype=torch.bool)
    mask[order[before < mass * values.sum()].cpu()] = True
    mask[order[0]] = True  # also where CLS attends to no patch
    peak = divmod(int(order[0]), mean.shape[1])
    return Found(component(mask.view(mean.shape), peak), peak)


def by_lost(tokens: Tensor, grid: Grid) -> Found:
    """LOST (arXiv 2109.14279): the patch similar to the fewest others, and those similar to it.

    The image's mean token is subtracted first (ours): the paper uses keys, and nearly all pairs of
    output tokens are similar. The seed is expanded among the 100 patches of lowest degree, or a
    seventh of all in small grids (ours).

    Args:
        tokens: (N, D) of one image.
    """
    tokens = tokens - tokens.mean(dim=0)
    similarity = tokens @ tokens.T
    degree = (similarity > 0).sum(dim=1)
    order = degree.argsort(stable=True)
    seed = int(order[0])
    lowest = order[: min(100, max(1, round(len(order) / 7)))]
    alike = lowest[similarity[seed, lowest] > 0]
    alike = alike if len(alike) else order[:1]
    mask = similarity[:, alike].sum(dim=1) > 0
    mask[seed] = True
    peak = divmod(seed, grid[1])
    return Found(component(mask.view(grid).cpu(), peak), peak)


def by_tokencut(tokens: Tensor, grid: Grid, taus: Sequence[float] = (0.2,)) -> list[Found]:
    """TokenCut (arXiv 2202.11539): a normalised cut of the graph of similar patches for each τ.

    Edges are 1 above τ, else 1e-5. The second smallest eigenvector of (D − E) y = λ D y is split at
    its mean. The object is the largest connected part of the side with the largest entry. O(N³):
    seconds from 2,000 patches on.

    Raises:
        UserError: if there are more patches than MOST_PATCHES.
    """
    if len(tokens) > MOST_PATCHES:
        raise UserError(
            f"{len(tokens)} patches are too many for TokenCut, at most {MOST_PATCHES}; lower --size"
        )
    unit = F.normalize(tokens.double().cpu(), dim=1)
    cosines = unit @ unit.T
    results = []
    for tau in taus:
        edges = torch.where(cosines > tau, 1.0, 1e-5).double()
        scale = edges.sum(dim=1).rsqrt()
        laplacian = torch.eye(len(edges), dtype=torch.float64) - scale[:, None] * edges * scale
        vector = scale * torch.linalg.eigh(laplacian).eigenvectors[:, 1]
        surest = int(vector.abs().argmax())
        side = vector > vector.mean()
        side = side if side[surest] else ~side
        results.append(Found(largest_component(side.view(grid)), divmod(surest, grid[1])))
    return results


def component(mask: Tensor, start: tuple[int, int]) -> Tensor:
    """The part of a bool mask (h, w) that is connected to `start` by its four neighbours."""
    reached = torch.zeros_like(mask)
    reached[start] = mask[start]
    while True:
        grown = reached.clone()
        grown[1:] |= reached[:-1]
        grown[:-1] |= reached[1:]
        grown[:, 1:] |= reached[:, :-1]
        grown[:, :-1] |= reached[:, 1:]
        grown &= mask
        if torch.equal(grown, reached):
            return reached
        reached = grown


def largest_component(mask: Tensor) -> Tensor:
    best, rest = torch.zeros_like(mask), mask.clone()
    while rest.any():
        part = component(rest, divmod(int(rest.flatten().int().argmax()), mask.shape[1]))
        best = part if part.sum() > best.sum() else best
        rest &= ~part
    return best


# Scores.


def box_of(mask: Tensor, shape: tuple[int, int]) -> Tensor:
    """(4,) x0, y0, x1, y1 around a mask (h, w), in pixels of an image of (height, width)."""
    rows, columns = mask.any(dim=1).nonzero()[:, 0], mask.any(dim=0).nonzero()[:, 0]
    tall, wide = shape[0] / mask.shape[0], shape[1] / mask.shape[1]
    corners = [columns[0] * wide, rows[0] * tall, (columns[-1] + 1) * wide, (rows[-1] + 1) * tall]
    return torch.stack([torch.as_tensor(value, dtype=torch.float32) for value in corners])


def box_iou(box: Tensor, boxes: Tensor) -> Tensor:
    """(n,) intersection over union of one box (4,) with others (n, 4)."""
    low, high = torch.maximum(box[:2], boxes[:, :2]), torch.minimum(box[2:], boxes[:, 2:])
    inside = (high - low).clamp(min=0).prod(dim=1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
    return inside / ((box[2:] - box[:2]).prod() + areas - inside).clamp(min=1e-9)


def score(found: Found, truth: Truth) -> dict[str, float]:
    """CorLoc (IoU above 0.5), best IoU of box and of mask, and whether the peak hits an object."""
    overlaps = box_iou(box_of(found.mask, truth.shape), truth.boxes)
    (row, column), (h, w) = found.peak, found.mask.shape
    x, y = (column + 0.5) / w * truth.shape[1], (row + 0.5) / h * truth.shape[0]
    if truth.masks is None:
        point = torch.tensor([x, y])
        inside = ((truth.boxes[:, :2] <= point) & (point < truth.boxes[:, 2:])).all(dim=1)
        mask_iou = {}
    else:
        inside = truth.masks[:, int(y), int(x)]
        guess = F.interpolate(found.mask[None, None].float(), truth.masks.shape[1:])[0, 0].bool()
        both, either = (guess & truth.masks).sum((1, 2)), (guess | truth.masks).sum((1, 2))
        mask_iou = {"mask_iou": float((both / either.clamp(min=1)).max())}
    best = float(overlaps.max())
    result = {"corloc": float(best > 0.5), "box_iou": best, **mask_iou}
    return result | {"pointing": float(inside.any())}


def centred_scores(truth: Truth) -> dict[float, dict[str, float]]:
    """A baseline: centred boxes of several shares of height and width, their peak at the centre."""
    height, width = truth.shape
    results = {}
    for share in SHARES:
        top, left = round(height * (1 - share) / 2), round(width * (1 - share) / 2)
        mask = torch.zeros(truth.shape, dtype=torch.bool)
        mask[top : height - top, left : width - left] = True
        results[share] = score(Found(mask, (height // 2, width // 2)), truth)
    return results


def read_truth(notes: dict[str, Tensor]) -> Truth | None:
    """Objects from "boxes", "instance" or "mask"; None for an image without objects.

    In masks of classes each class is one object, and class 0 is the background.
    """
    numbers = notes.get("instance", notes.get("mask"))
    boxes, masks = notes.get("boxes"), None
    if numbers is not None:
        objects = [number for number in torch.unique(numbers).tolist() if number not in (0, 255)]
        masks = torch.stack([numbers == number for number in objects]) if objects else None
    if boxes is None and masks is not None:
        boxes = torch.stack([box_of(mask, tuple(mask.shape)) for mask in masks])
    if boxes is None or not len(boxes):
        return None
    shape = notes["shape"].tolist() if numbers is None else numbers.shape
    return Truth(boxes.float(), masks, tuple(shape))


def localize(
    items: Iterable[tuple[Patches, Tensor | None, Truth | None]], taus: Sequence[float] = TAUS
) -> dict[str, Any]:
    """Means of `score` over images, for each method and the centred boxes.

    Args:
        items: patch tokens of each image, attention of CLS to patches (heads, h, w) or None where
            the backbone has no attention, and the truth; images without objects are left out. Each
            rank gives those of its own images.

    Returns:
        {"attention": {"corloc", "box_iou", "mask_iou", "pointing"} or None, "lost": {...},
        "tokencut": {τ: {...}}, "centre": {share of the side: {...}}, "n_images"}.

    Raises:
        UserError: if no image has an object.
    """
    found: list[tuple[int, dict[Any, dict[str, float]]]] = []
    for patches, attention, truth in items:
        if truth is not None:
            found.append((patches.index, _all_scores(patches, attention, truth, taus)))
    images = in_order(found)
    if not images:
        raise UserError("no image has an object in its annotations")
    means = {
        name: {key: sum(one[name][key] for one in images) / len(images) for key in scores}
        for name, scores in images[0].items()
    }
    result: dict[str, Any] = {"attention": means.get("attention"), "lost": means["lost"]}
    for group in ("tokencut", "centre"):
        result[group] = {name[1]: value for name, value in means.items() if name[0] == group}
    return result | {"n_images": len(images)}


def _all_scores(
    patches: Patches, attention: Tensor | None, truth: Truth, taus: Sequence[float]
) -> dict[Any, dict[str, float]]:
    """`score` of one image by each method, (method, setting) where it has settings."""
    cuts = zip(taus, by_tokencut(patches.tokens, patches.grid, taus), strict=True)
    found: dict[Any, Found] = {("tokencut", f"{tau:g}"): cut for tau, cut in cuts}
    found["lost"] = by_lost(patches.tokens, patches.grid)
    if attention is not None:
        found["attention"] = by_attention(attention)
    scores = {name: score(one, truth) for name, one in found.items()}
    return scores | {("centre", f"{share:g}"): one for share, one in centred_scores(truth).items()}
