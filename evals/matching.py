"""Matching patches of two images, and labels propagated along a clip; nothing is trained."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine import distributed
from errors import UserError
from evals.patches import tokens_of, upsample
from evals.reading import in_order

Grid = tuple[int, int]  # (h, w) in patches

# Correspondence.


def match_points(
    tokens_a: Tensor, grid_a: Grid, tokens_b: Tensor, grid_b: Grid, points: Tensor
) -> Tensor:
    """Points of image a found in image b: the centre of the patch with the most similar token.

    Args:
        tokens_a, tokens_b: (N, D) of the two images.
        points: (P, 2) x, y in a, as shares of its width and height; tokens between patch centres
            are interpolated bilinearly.

    Returns:
        (P, 2) x, y in b, as shares of its width and height.
    """
    maps = F.normalize(tokens_a, dim=1).T.unflatten(1, grid_a)[None]
    places = (2 * points - 1).to(maps)[None, None]
    found = F.grid_sample(maps, places, padding_mode="border", align_corners=False)
    queries = found[0, :, 0].T  # (P, D)
    similarity = F.normalize(queries, dim=1) @ F.normalize(tokens_b, dim=1).T
    return patch_centres(grid_b).to(maps)[similarity.argmax(dim=1)]


def patch_centres(grid: Grid) -> Tensor:
    """(N, 2) x, y of the patches' centres, as shares of width and height."""
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    x, y = (columns.flatten() + 0.5) / grid[1], (rows.flatten() + 0.5) / grid[0]
    return torch.stack([x, y], dim=1)


def to_centres(points: Tensor, grid: Grid) -> Tensor:
    """The centre of the patch that each point lies in: about the best that patches can give."""
    size = torch.tensor([grid[1], grid[0]])
    return ((points * size).floor().clamp(min=0).minimum(size - 1) + 0.5) / size


def recall_at(distances: Tensor, thresholds: Sequence[float]) -> dict[str, float]:
    """Share of distances of at most each threshold."""
    return {f"{limit:g}": float((distances <= limit).double().mean()) for limit in thresholds}


def point_errors(
    image_a: tuple[Tensor, Grid],
    image_b: tuple[Tensor, Grid],
    points_a: Tensor,
    points_b: Tensor,
    shape: tuple[int, int],
    unit: Any,
) -> dict[str, Tensor]:
    """Distances (P,) in b between the true points and guesses: the match and two baselines.

    Args:
        image_a, image_b: tokens and grid.
        points_a, points_b: (P, 2) as shares of width and height.
        shape: (height, width) of b in pixels.
        unit: pixels that count as a distance of 1.
    """
    guesses = {
        "recall": match_points(*image_a, *image_b, points_a).cpu(),
        "limit": to_centres(points_b, image_b[1]),
        "same_place": points_a,
    }
    pixels = torch.tensor([shape[1], shape[0]])
    return {
        name: ((guess - points_b) * pixels).norm(dim=1) / unit for name, guess in guesses.items()
    }


def recalls(errors: Sequence[dict[str, Tensor]], thresholds: Sequence[float]) -> dict[str, Any]:
    """Recall of each guess of `point_errors` over all pairs of images, and the number of points."""
    whole = {name: torch.cat([pair[name] for pair in errors]) for name in errors[0]}
    result = {name: recall_at(distances, thresholds) for name, distances in whole.items()}
    return result | {"n_points": len(whole["recall"])}


@torch.inference_mode()
def match_views(
    backbone: nn.Module,
    views: Iterable[tuple[Tensor, Tensor, Tensor, Tensor, Tensor, tuple[int, int]]],
    device: torch.device,
    thresholds: Sequence[float] = (0.05, 0.1, 0.2),
) -> dict[str, Any]:
    """Recall of points of one view found in the other (like Probe3D and NAVI, but in 2-D).

    Args:
        views: (image_a, image_b) normalised (C, h, w), points_a and points_b (P, 2) as shares of
            width and height, visible (P,) bool, and the (height, width) in pixels of view b. Ranks
            share them.
        thresholds: distances in b as shares of its longer side.

    Returns:
        {"recall": {threshold: share}, "limit": of points moved to their patch's centre,
        "same_place": of the guess that nothing moves, "n_points"}.

    Raises:
        UserError: if no point is visible in both views.
    """
    errors = []
    for image_a, image_b, points_a, points_b, visible, shape in views:
        if visible.any():
            found = tokens_of(backbone, [image_a.to(device), image_b.to(device)])
            points = points_a[visible], points_b[visible]
            errors.append(point_errors(*found, *points, shape, max(shape)))
    errors = sum(distributed.gather_objects(errors), [])
    if not errors:
        raise UserError("no point is visible in both views")
    return recalls(errors, thresholds)


@torch.inference_mode()
def match_keypoints(
    items: Sequence[tuple[Tensor, Grid, Tensor, tuple[int, int]]],
    labels: Sequence[int],
    thresholds: Sequence[float] = (0.05, 0.1, 0.2),
    pairs: int = 2000,
) -> dict[str, Any] | None:
    """Keypoints found on another object of the class (PCK of SPair-71k, over all keypoints).

    Args:
        items: (tokens (N, D), grid, keypoints (K, 3) x, y, visible as shares of width and height,
            (height, width) in pixels) of each image.
        labels: class of each; -1 takes no part.
        thresholds: distances as shares of the longer side of the box around the keypoints in the
            second image.
        pairs: at most so many pairs of images of one class.

    Returns:
        {"recall", "limit", "same_place", "n_points", "n_pairs"} as of `match_views`; None where no
        class has two images.
    """
    errors = []
    for a, b in same_class_pairs(labels, pairs):
        (*image_a, keys_a, _), (*image_b, keys_b, shape) = items[a], items[b]
        visible = (keys_a[:, 2] > 0) & (keys_b[:, 2] > 0)
        if not visible.any():
            continue
        box = keys_b[:, :2].amax(dim=0) - keys_b[:, :2].amin(dim=0)
        side = (box * torch.tensor([shape[1], shape[0]])).max().clamp(min=1.0)
        points = keys_a[visible, :2], keys_b[visible, :2]
        errors.append(point_errors(image_a, image_b, *points, shape, side))
    if not errors:
        return None
    return recalls(errors, thresholds) | {"n_pairs": len(errors)}


def same_class_pairs(labels: Sequence[int], pairs: int) -> list[tuple[int, int]]:
    """Ordered pairs: each image with the next of its class, then with the one after, and so on."""
    members: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        if label >= 0:
            members.setdefault(int(label), []).append(index)
    longest = max(map(len, members.values()), default=0)
    found = []
    for step in range(1, longest):
        for group in members.values():
            if step < len(group):
                found += [(group[k], group[(k + step) % len(group)]) for k in range(len(group))]
        if len(found) >= pairs:
            break
    return found[:pairs]


# Tracking.


def propagate(
    tokens: Sequence[Tensor],
    grid: Grid,
    first: Tensor,
    *,
    context: int = 7,
    radius: float = 12.0,
    top: int = 5,
    temperature: float = 0.1,
) -> Tensor:
    """Soft labels of the first frame propagated through a clip (DINO, arXiv 2104.14294; DAVIS).

    Each patch takes the labels of the `top` most similar patches among the first frame and the last
    `context` frames, weighted by exp(cosine / temperature), within `radius` patches of its place (a
    circle, as in DINOv3; DINO takes a square).

    Args:
        tokens: (N, D) of each of the T frames.
        first: (N, K) labels of the first frame's patches.

    Returns:
        (T, N, K); the first is `first`.
    """
    units = [F.normalize(one, dim=1) for one in tokens]
    places = patch_centres(grid).to(units[0]) * units[0].new_tensor([grid[1], grid[0]])
    labels = [first]
    for frame in range(1, len(units)):
        sources = [0, *range(max(1, frame - context), frame)]
        known = torch.cat([labels[k] for k in sources])
        candidates = torch.cat([units[k] for k in sources])
        rows = max(1, 2**27 // len(candidates))  # similarities of half a gigabyte at a time
        found = []
        for queries, here in zip(units[frame].split(rows), places.split(rows), strict=True):
            outside = (torch.cdist(here, places) > radius).repeat(1, len(sources))
            cosines = (queries @ candidates.T).masked_fill_(outside, -math.inf)
            values, chosen = cosines.topk(min(top, len(candidates)), dim=1)
            weights = (values / temperature).softmax(dim=1)
            found.append(torch.einsum("nk,nkc->nc", weights, known[chosen]))
        labels.append(torch.cat(found))
    return torch.stack(labels)


def to_objects(labels: Tensor, grid: Grid, size: Sequence[int]) -> Tensor:
    """(N, K) soft labels of a frame -> (H, W) object numbers, 0 the background.

    Enlarged bilinearly. Each object's map is scaled to [0, 1] before the largest is taken, as the
    authors of DINO do.
    """
    maps = upsample(labels.T.unflatten(1, grid), size)
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return torch.where(high > 0, (maps - low) / (high - low).clamp(min=1e-12), maps).argmax(dim=0)


@torch.inference_mode()
def track(
    backbone: nn.Module,
    clips: Iterable[tuple[int, list[Tensor], Tensor]],
    device: torch.device,
    *,
    radius: float | None = None,
    **options: Any,
) -> dict[str, Any]:
    """J and F of label propagation, means over frames, then over objects (DAVIS-2017).

    The first frame is given and the last is not counted, as in DAVIS; of two frames, the last is.

    Args:
        clips: number, frames, normalised (C, h, w) of one size, and their instances (T, H, W), 0
            is the background. Ranks share them.
        radius: in patches; None is 0.4 of the grid's short side, which is DINOv3's 12 at 480 pixels
            and patches of 16.
        options: of `propagate`.

    Returns:
        {"jf": mean of J and F, "j", "f", "limit": the same for the truth pooled to the patch grid,
        "static": for the first frame's mask throughout, "n_objects"}.

    Raises:
        UserError: if a clip has one frame, or no first frame has an object.
    """
    scored: list[tuple[int, dict[str, list[tuple[float, float]]]]] = []
    for number, frames, instances in clips:
        if len(frames) < 2:
            raise UserError(
                "a clip has one frame; tracking needs at least two (frames=8 of `scenes`)"
            )
        objects = [number for number in torch.unique(instances[0]).tolist() if number > 0]
        if not objects:
            continue
        found = [tokens_of(backbone, [frame.to(device)])[0] for frame in frames]
        tokens, grid = [tokens for tokens, _ in found], found[0][1]
        pooled = [pool_instances(one.to(device), [0, *objects], grid) for one in instances]
        reach = 0.4 * min(grid) if radius is None else radius
        soft = propagate(tokens, grid, pooled[0], radius=reach, **options)
        counted = slice(1, max(2, len(frames) - 1))
        truth = instances[counted]
        static = [pooled[0]] * len(truth)
        guesses = {"found": soft[counted], "limit": pooled[counted], "static": static}
        scores = {}
        for name, guess in guesses.items():
            masks = [to_objects(labels, grid, instances.shape[1:]).cpu() for labels in guess]
            scores[name] = score_objects(masks, truth, objects)
        scored.append((number, scores))
    clips_in_order = in_order(scored)
    if not clips_in_order:
        raise UserError("no clip has an object in its first frame")
    means = {}
    for name in ("found", "limit", "static"):
        rows = [row for scores in clips_in_order for row in scores[name]]
        means[name] = [_mean(column) for column in zip(*rows, strict=True)]
    j, f = means["found"]
    baselines = {name: sum(means[name]) / 2 for name in ("limit", "static")}
    return {"jf": (j + f) / 2, "j": j, "f": f, **baselines, "n_objects": len(rows)}


def score_objects(
    masks: Sequence[Tensor], truth: Tensor, objects: Sequence[int]
) -> list[tuple[float, float]]:
    """J and F of each object, means over the frames.

    Args:
        masks: (H, W) of each of T frames; k is the object that `objects` lists at place k from 1.
        truth: (T, H, W), the numbers of `objects`.
    """
    scores = []
    for k, number in enumerate(objects, start=1):
        pairs = [(mask == k, true == number) for mask, true in zip(masks, truth, strict=True)]
        j = _mean([region_j(*pair) for pair in pairs])
        scores.append((j, _mean([boundary_f(*pair) for pair in pairs])))
    return scores


def pool_instances(instance: Tensor, objects: Sequence[int], grid: Grid) -> Tensor:
    """(H, W) -> (N, K): the share of each patch that each object covers."""
    maps = torch.stack([(instance == number).float() for number in objects])
    return F.adaptive_avg_pool2d(maps, grid).flatten(1).T


def region_j(guess: Tensor, truth: Tensor) -> float:
    """Intersection over union of two bool masks; 1 where both are empty."""
    union = float((guess | truth).sum())
    return float((guess & truth).sum()) / union if union else 1.0


def boundary_f(guess: Tensor, truth: Tensor, tolerance: float = 0.008) -> float:
    """F-measure of the boundaries of two bool masks (H, W); 1 where both are empty.

    Pixels match within `tolerance` of the image's diagonal, rounded up to whole pixels.
    """
    radius = math.ceil(tolerance * math.hypot(*truth.shape))
    guess, truth = boundary(guess), boundary(truth)
    if not guess.any() or not truth.any():
        return float(guess.any() == truth.any())
    precision = float(dilate(truth, radius)[guess].double().mean())
    recall = float(dilate(guess, radius)[truth].double().mean())
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def boundary(mask: Tensor) -> Tensor:
    """Pixels that differ from the one to the right, below, or below to the right."""
    wide = F.pad(mask[None, None].float(), (0, 1, 0, 1), mode="replicate")[0, 0].bool()
    return (mask != wide[:-1, 1:]) | (mask != wide[1:, :-1]) | (mask != wide[1:, 1:])


def dilate(mask: Tensor, radius: int) -> Tensor:
    """Pixels within `radius` of one of the mask."""
    steps = torch.arange(-radius, radius + 1)
    disk = (steps[:, None] ** 2 + steps**2 <= radius**2).float()
    return F.conv2d(mask[None, None].float(), disk[None, None], padding=radius)[0, 0] > 0


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
