"""Nearest patches between two images, and labels carried along the frames of a clip: nothing is trained."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import UserError
from evals.patches import tokens_of, upsample

# Correspondence.


def match_points(
    tokens_a: Tensor,
    grid_a: tuple[int, int],
    tokens_b: Tensor,
    grid_b: tuple[int, int],
    points: Tensor,
) -> Tensor:
    """Where points of image a are in image b: the centre of the patch whose token has the largest cosine.

    Args:
        tokens_a, tokens_b: (N, D) of the two images.
        points: (P, 2) x, y in a, as shares of its width and height; tokens between patch centres are interpolated
            bilinearly.

    Returns:
        (P, 2) x, y in b, as shares of its width and height.
    """
    maps = F.normalize(tokens_a, dim=1).T.unflatten(1, grid_a)[None]
    places = (2 * points - 1).to(maps)[None, None]
    queries = F.grid_sample(maps, places, padding_mode="border", align_corners=False)[
        0, :, 0
    ].T  # (P, D)
    similarity = F.normalize(queries, dim=1) @ F.normalize(tokens_b, dim=1).T
    return patch_centres(grid_b).to(maps)[similarity.argmax(dim=1)]


def patch_centres(grid: tuple[int, int]) -> Tensor:
    """(N, 2) x, y of the patches' centres, as shares of width and height."""
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    return torch.stack(
        [(columns.flatten() + 0.5) / grid[1], (rows.flatten() + 0.5) / grid[0]], dim=1
    )


def to_centres(points: Tensor, grid: tuple[int, int]) -> Tensor:
    """The centre of the patch that each point lies in: as near as a matcher of patches can come, or nearly so."""
    size = torch.tensor([grid[1], grid[0]])
    return ((points * size).floor().clamp(min=0).minimum(size - 1) + 0.5) / size


def recall_at(distances: Tensor, thresholds: Sequence[float]) -> dict[str, float]:
    """Share of distances of at most each threshold."""
    return {
        f"{threshold:g}": float((distances <= threshold).double().mean())
        for threshold in thresholds
    }


@torch.inference_mode()
def match_views(
    backbone: nn.Module,
    views: Iterable[tuple[Tensor, Tensor, Tensor, Tensor, Tensor, tuple[int, int]]],
    device: torch.device,
    thresholds: Sequence[float] = (0.05, 0.1, 0.2),
) -> dict[str, Any]:
    """Dense matching: recall of points of one view found in the other (in the manner of Probe3D and NAVI, but in 2-D).

    Args:
        views: (image_a, image_b) normalised (C, h, w), points_a and points_b (P, 2) as shares of width and height,
            visible (P,) bool, and the (height, width) in pixels of view b.
        thresholds: distances in b as shares of its longer side.

    Returns:
        {"recall": {threshold: share}, "limit": of points moved to their patch's centre, "same_place": of the guess that
        nothing moves, "n_points"}.

    Raises:
        UserError: if no point is visible in both views.
    """
    errors: dict[str, list[Tensor]] = {"recall": [], "limit": [], "same_place": []}
    for image_a, image_b, points_a, points_b, visible, shape in views:
        if not visible.any():
            continue
        points_a, points_b = points_a[visible], points_b[visible]
        (tokens_a, grid_a), (tokens_b, grid_b) = tokens_of(
            backbone, [image_a.to(device), image_b.to(device)]
        )
        guesses = {
            "recall": match_points(tokens_a, grid_a, tokens_b, grid_b, points_a).cpu(),
            "limit": to_centres(points_b, grid_b),
            "same_place": points_a,
        }
        for name, guess in guesses.items():
            errors[name].append(_distances(guess, points_b, shape) / max(shape))
    if not errors["recall"]:
        raise UserError("no point is visible in both views")
    result: dict[str, Any] = {
        name: recall_at(torch.cat(found), thresholds) for name, found in errors.items()
    }
    return result | {"n_points": sum(map(len, errors["recall"]))}


def _distances(guess: Tensor, points: Tensor, shape: tuple[int, int]) -> Tensor:
    """(P,) in pixels of an image of that (height, width)."""
    return ((guess - points) * torch.tensor([shape[1], shape[0]])).norm(dim=1)


@torch.inference_mode()
def match_keypoints(
    items: Sequence[tuple[Tensor, tuple[int, int], Tensor, tuple[int, int]]],
    labels: Sequence[int],
    thresholds: Sequence[float] = (0.05, 0.1, 0.2),
    pairs: int = 2000,
) -> dict[str, Any] | None:
    """Keypoints of an object found on another object of its class (SPair-71k: PCK, here a share of all keypoints).

    Args:
        items: (tokens (N, D), grid, keypoints (K, 3) x, y, visible as shares of width and height, (height, width) in
            pixels) of each image.
        labels: class of each; -1 takes no part.
        thresholds: distances as shares of the longer side of the box around the keypoints in the second image.
        pairs: at most so many pairs of images of one class, each image with the ones that follow it.

    Returns:
        {"recall", "limit", "same_place", "n_points", "n_pairs"} as of `match_views`; None where no class has two
        images.
    """
    errors: dict[str, list[Tensor]] = {"recall": [], "limit": [], "same_place": []}
    count = 0
    for a, b in same_class_pairs(labels, pairs):
        (tokens_a, grid_a, keys_a, _), (tokens_b, grid_b, keys_b, shape) = items[a], items[b]
        seen = (keys_a[:, 2] > 0) & (keys_b[:, 2] > 0)
        if not seen.any():
            continue
        count += 1
        here, there = keys_a[seen, :2], keys_b[seen, :2]
        extent = (keys_b[:, :2].amax(dim=0) - keys_b[:, :2].amin(dim=0)) * torch.tensor(
            [shape[1], shape[0]]
        )
        found = match_points(tokens_a, grid_a, tokens_b, grid_b, here).cpu()
        guesses = {"recall": found, "limit": to_centres(there, grid_b), "same_place": here}
        for name, guess in guesses.items():
            errors[name].append(_distances(guess, there, shape) / extent.max().clamp(min=1.0))
    if not count:
        return None
    result: dict[str, Any] = {
        name: recall_at(torch.cat(found), thresholds) for name, found in errors.items()
    }
    return result | {"n_points": sum(map(len, errors["recall"])), "n_pairs": count}


def same_class_pairs(labels: Sequence[int], pairs: int) -> list[tuple[int, int]]:
    """Ordered pairs: each image with the next of its class, then with the one after that, until there are enough."""
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
    grid: tuple[int, int],
    first: Tensor,
    *,
    context: int = 7,
    radius: float = 12.0,
    top: int = 5,
    temperature: float = 0.1,
) -> Tensor:
    """Soft labels of the first frame carried through a clip (DINO, arXiv 2104.14294; DAVIS-2017 protocol).

    Each patch takes the labels of the `top` most similar patches among the first frame and the last `context` frames,
    weighted by exp(cosine / temperature), within `radius` patches of its place (a circle, as in DINOv3; DINO takes a
    square).

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
        known, candidates = (
            torch.cat([labels[k] for k in sources]),
            torch.cat([units[k] for k in sources]),
        )
        rows = max(1, 2**27 // len(candidates))  # similarities of half a gigabyte at a time
        carried = []
        for queries, here in zip(units[frame].split(rows), places.split(rows)):
            outside = (torch.cdist(here, places) > radius).repeat(1, len(sources))
            cosines = (queries @ candidates.T).masked_fill_(outside, -math.inf)
            values, chosen = cosines.topk(min(top, len(candidates)), dim=1)
            weights = (values / temperature).softmax(dim=1)
            carried.append(torch.einsum("nk,nkc->nc", weights, known[chosen]))
        labels.append(torch.cat(carried))
    return torch.stack(labels)


def to_objects(labels: Tensor, grid: tuple[int, int], size: Sequence[int]) -> Tensor:
    """(N, K) soft labels of a frame -> (H, W) object numbers, 0 the background.

    Enlarged bilinearly; each object's map is stretched to [0, 1] before the largest counts, as the authors of DINO do.
    """
    maps = upsample(labels.T.unflatten(1, grid), size)
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return torch.where(high > 0, (maps - low) / (high - low).clamp(min=1e-12), maps).argmax(dim=0)


@torch.inference_mode()
def track(
    backbone: nn.Module,
    clips: Iterable[tuple[list[Tensor], Tensor]],
    device: torch.device,
    *,
    context: int = 7,
    radius: float | None = None,
    top: int = 5,
    temperature: float = 0.1,
) -> dict[str, Any]:
    """J and F of label propagation, each the mean over objects of the mean over frames (DAVIS-2017).

    The first frame is given and the last is not counted, as in DAVIS; of two frames, the last is.

    Args:
        clips: frames, normalised (C, h, w) of one size, and their instances (T, H, W), 0 = background.
        radius: in patches; None is 0.4 of the grid's short side, which is DINOv3's 12 at 480 pixels and patches of 16.

    Returns:
        {"jf": mean of J and F, "j", "f", "limit": the same for the truth pooled to the patch grid, "static": for the
        first frame's mask throughout, "n_objects"}.

    Raises:
        UserError: if a clip has one frame, or no first frame has an object.
    """
    scores: dict[str, list[tuple[float, float]]] = {"found": [], "limit": [], "static": []}
    for frames, instances in clips:
        if len(frames) < 2:
            raise UserError(
                "a clip has one frame; tracking needs at least two (frames=8 of `scenes`)"
            )
        found = [tokens_of(backbone, [frame.to(device)])[0] for frame in frames]
        grid, objects = found[0][1], torch.unique(instances[0]).tolist()
        objects = [number for number in objects if number > 0]
        if not objects:
            continue
        pooled = [pool_instances(one.to(device), [0, *objects], grid) for one in instances]
        reach = 0.4 * min(grid) if radius is None else radius
        tokens = [one for one, _ in found]
        soft = propagate(
            tokens, grid, pooled[0], context=context, radius=reach, top=top, temperature=temperature
        )
        last = max(2, len(frames) - 1)
        said = {
            "found": [
                to_objects(labels, grid, instances.shape[1:]).cpu() for labels in soft[1:last]
            ],
            "limit": [
                to_objects(labels, grid, instances.shape[1:]).cpu() for labels in pooled[1:last]
            ],
            "static": [to_objects(pooled[0], grid, instances.shape[1:]).cpu()] * (last - 1),
        }
        for name, masks in said.items():
            for number, object_ in enumerate(objects, start=1):
                pairs = [
                    (mask == number, truth == object_)
                    for mask, truth in zip(masks, instances[1:last])
                ]
                scores[name].append(
                    (
                        _mean(region_j(*pair) for pair in pairs),
                        _mean(boundary_f(*pair) for pair in pairs),
                    )
                )
    if not scores["found"]:
        raise UserError("no clip has an object in its first frame")
    means = {
        name: (_mean(j for j, _ in rows), _mean(f for _, f in rows))
        for name, rows in scores.items()
    }
    j, f = means["found"]
    baselines = {name: sum(means[name]) / 2 for name in ("limit", "static")}
    return {"jf": (j + f) / 2, "j": j, "f": f, **baselines, "n_objects": len(scores["found"])}


def pool_instances(instance: Tensor, objects: Sequence[int], grid: tuple[int, int]) -> Tensor:
    """(H, W) -> (N, K): the share of each patch that each object covers."""
    maps = torch.stack([(instance == number).float() for number in objects])
    return F.adaptive_avg_pool2d(maps, grid).flatten(1).T


def region_j(said: Tensor, truth: Tensor) -> float:
    """Intersection over union of two bool masks; 1 where both are empty."""
    union = float((said | truth).sum())
    return float((said & truth).sum()) / union if union else 1.0


def boundary_f(said: Tensor, truth: Tensor, tolerance: float = 0.008) -> float:
    """F-measure of the boundaries of two bool masks (H, W); 1 where both are empty.

    Pixels match within `tolerance` of the image's diagonal, rounded up to whole pixels.
    """
    radius = math.ceil(tolerance * math.hypot(*truth.shape))
    said, truth = boundary(said), boundary(truth)
    if not said.any() or not truth.any():
        return float(said.any() == truth.any())
    precision = float(dilate(truth, radius)[said].double().mean())
    recall = float(dilate(said, radius)[truth].double().mean())
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


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)
