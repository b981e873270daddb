"""Segmentation and depth from frozen patches by a linear head, as DINOv2 and DINOv3 measure them.

One head a learning rate, all trained in one pass; the best on `val` is reported with the whole grid. Where the
published protocols draw random crops, whole images are used, so that a frozen backbone need see each image only once.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from errors import UserError
from evals.patches import (
    CLASSES,
    IGNORE,
    Patches,
    confusion,
    extract_patches,
    mean_iou,
    pooled_classes,
    upsample,
)


@dataclass(frozen=True)
class Recipe:
    """How a head is trained: AdamW, linear warm-up, then cosine."""

    lrs: tuple[float, ...]
    weight_decay: float
    betas: tuple[float, float]
    warmup: float  # share of the steps
    start: float  # of the peak, at step 0
    end: float  # of the peak, after the last step
    epochs: float  # as published, before `steps` bounds it
    longest: int  # steps as published
    clip: float = math.inf
    batch_size: int = 16
    points: int = 1024  # random pixels of an image that enter the loss of a step
    shortest: int = 300  # steps; ours, for small data

    def steps(self, images: int) -> int:
        return min(self.longest, max(self.shortest, round(self.epochs * images / self.batch_size)))


# DINOv3's files for ADE20k and NYUv2. Published are lr 1e-3 (swept from 1e-4) and 3e-4; the larger ones are ours, for
# short runs.
SEGMENTATION = Recipe(
    (1e-3, 1e-2), 1e-3, (0.9, 0.999), 0.0375, 1e-6, 0.0, epochs=32, longest=40_000
)
DEPTH = Recipe(
    (3e-4, 3e-2, 3e-1), 1e-4, (0.9, 0.99), 1 / 3, 0.04, 1e-3, epochs=25, longest=38_400, clip=35.0
)


class FrozenPatches:
    """Patch tokens of a data set: seen once and kept, or computed anew at each draw where they do not fit.

    Args:
        summary: of each target, kept in `summaries` in the data's order.
        limit: bytes of memory for the tokens.
        options: of `extract_patches`, its batch size excepted.
    """

    def __init__(
        self,
        backbone: nn.Module,
        data: Dataset,
        device: torch.device,
        summary: Callable[[Tensor], Any],
        *,
        batch_size: int = 64,
        limit: int = 4 * 2**30,
        **options: Any,
    ):
        self.data, self.extract = data, partial(extract_patches, backbone, device=device, **options)
        self.kept: list[Patches] | None = []
        self.summaries, used = [], 0
        for item in self.extract(data, batch_size=batch_size):
            self.dim = item.tokens.shape[1]
            self.summaries.append(summary(item.target))
            used += item.tokens.nbytes
            if used > limit:
                self.kept = None
            if self.kept is not None:
                self.kept.append(item._replace(tokens=item.tokens.cpu()))

    def draws(self, steps: int, batch_size: int, seed: int) -> Iterator[list[Patches]]:
        """`steps` batches, epoch after epoch in a new order; the last images of an epoch join the next one's first."""
        generator = torch.Generator().manual_seed(seed)
        count = steps * batch_size
        epochs = [
            torch.randperm(len(self.data), generator=generator)
            for _ in range(-(-count // len(self.data)))
        ]
        order = torch.cat(epochs)[:count].tolist()
        if self.kept is None:
            items = self.extract(Subset(self.data, order), batch_size=batch_size)
        else:
            items = (self.kept[index] for index in order)
        for _ in range(steps):
            yield list(islice(items, batch_size))


class LinearHead(nn.Module):
    """Dropout, batch norm, linear: (n, D) tokens -> (n, K).

    DINOv3's dropout takes whole channels of an image, ours single numbers.
    """

    def __init__(self, dim: int, outputs: int, dropout: float = 0.0):
        super().__init__()
        self.norm = nn.BatchNorm1d(dim)
        self.linear = nn.Linear(dim, outputs)
        self.dropout = nn.Dropout(dropout)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.linear(self.norm(self.dropout(tokens)))


class DepthHead(LinearHead):
    """(n, D) tokens -> (n, 1) metres: bins spaced evenly from `low` to `high`, weighted by ReLU(score) + 0.1."""

    def __init__(self, dim: int, low: float, high: float, bins: int = 256):
        super().__init__(dim, bins)
        self.register_buffer("centres", torch.linspace(low, high, bins))

    def forward(self, tokens: Tensor) -> Tensor:
        weights = super().forward(tokens).relu() + 0.1
        return (weights / weights.sum(dim=1, keepdim=True)) @ self.centres[:, None]


def train_heads(
    patches: FrozenPatches,
    build: Callable[[], nn.Module],
    loss: Callable[[Tensor, Tensor, float], Tensor],
    recipe: Recipe,
    device: torch.device,
    steps: int | None = None,
    seed: int = 0,
    progress: Callable[[Iterable], Iterator] = iter,
) -> dict[float, nn.Module]:
    """One trained head for each learning rate, in eval mode; all see the same batches and pixels.

    Scores are enlarged bilinearly to the target's full size, of which `recipe.points` random pixels enter the loss.

    Args:
        loss: of values (P, K) and targets (P,) of all the batch's pixels, and the share of the training that is done.
    """
    steps = recipe.steps(len(patches.data)) if steps is None else steps
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        heads = {lr: build().to(device) for lr in recipe.lrs}
        optimizers = {
            lr: torch.optim.AdamW(
                head.parameters(), lr, recipe.betas, weight_decay=recipe.weight_decay
            )
            for lr, head in heads.items()
        }
        for step, batch in enumerate(progress(patches.draws(steps, recipe.batch_size, seed))):
            tokens = torch.cat([item.tokens for item in batch]).to(device)
            pixels = [torch.randint(item.target.numel(), (recipe.points,)) for item in batch]
            targets = torch.cat(
                [item.target.flatten()[chosen] for item, chosen in zip(batch, pixels)]
            ).to(device)
            for lr, head in heads.items():
                parts = head(tokens).split([len(item.tokens) for item in batch])
                values = at_pixels(parts, batch, pixels)
                optimizers[lr].param_groups[0]["lr"] = lr * schedule(step / steps, recipe)
                optimizers[lr].zero_grad()
                loss(values, targets, step / steps).backward()
                nn.utils.clip_grad_norm_(head.parameters(), recipe.clip)
                optimizers[lr].step()
    return {lr: head.eval() for lr, head in heads.items()}


def schedule(done: float, recipe: Recipe) -> float:
    """Factor of the peak learning rate when that share of the steps is done."""
    if done < recipe.warmup:
        return recipe.start + (1 - recipe.start) * done / recipe.warmup
    rest = (done - recipe.warmup) / (1 - recipe.warmup)
    return recipe.end + (1 - recipe.end) * 0.5 * (1 + math.cos(math.pi * rest))


def at_pixels(
    values: Sequence[Tensor], batch: Sequence[Patches], pixels: Sequence[Tensor]
) -> Tensor:
    """(N, K) of each image's patches -> (P, K) at the P pixels of each target, one image after the other.

    Exactly what `upsample` gives there, without the pixels between.
    """
    results: list = [None] * len(batch)
    shapes = [(item.grid, item.target.shape) for item in batch]
    for grid, (height, width) in dict.fromkeys(shapes):  # images of one shape together
        alike = [k for k, shape in enumerate(shapes) if shape == (grid, (height, width))]
        chosen = torch.stack([pixels[k] for k in alike])
        rows, columns = chosen // width, chosen % width
        places = torch.stack([(2 * columns + 1) / width - 1, (2 * rows + 1) / height - 1], dim=-1)
        maps = torch.stack([values[k] for k in alike]).mT.unflatten(2, grid)
        found = F.grid_sample(
            maps, places[:, None].to(maps), padding_mode="border", align_corners=False
        )
        for k, of_one in zip(alike, found):
            results[k] = of_one[:, 0].T
    return torch.cat(results)


def predict(
    head: Callable[[Tensor], Tensor],
    variants: Sequence[Patches],
    flips: Sequence[bool],
    activation: Callable,
) -> Tensor:
    """(K, H, W) at the target's size: the mean over one image's variants (sizes, mirrored) of the activated scores."""
    total = 0.0
    for item, flip in zip(variants, flips):
        maps = head(item.tokens).T.unflatten(1, item.grid)
        maps = activation(upsample(maps.flip(-1) if flip else maps, item.target.shape))
        total = total + maps
    return total / len(variants)


@torch.inference_mode()
def linear_segmentation(
    backbone: nn.Module,
    train: Dataset,
    vals: Sequence[Dataset],
    device: torch.device,
    *,
    recipe: Recipe = SEGMENTATION,
    steps: int | None = None,
    seed: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """mIoU of batch norm + linear on frozen patches (DINOv2, arXiv 2304.07193; DINOv3, arXiv 2508.10104).

    Args:
        train: items (image (C, H, W) normalised, mask (H', W') class numbers, index); 255 is left out.
        vals: the same images at one or several sizes, or mirrored where `flip` is set; class probabilities are
            averaged.
        options: batch_size, workers and progress of `extract_patches`.

    Returns:
        {"miou", "pixel_accuracy", "iou": [each class], "lr": {rate: miou}, "limit": mIoU of the truth pooled to the
        patch grid, "steps"}.

    Raises:
        UserError: if no pixel has a class.
    """
    patches = FrozenPatches(backbone, train, device, largest_class, **options)
    classes = max(patches.summaries) + 1
    if classes < 1:
        raise UserError("no pixel of the training masks has a class")
    steps = recipe.steps(len(train)) if steps is None else steps
    with torch.inference_mode(False):
        build = partial(LinearHead, patches.dim, classes, dropout=0.1)
        heads = train_heads(
            patches,
            build,
            segmentation_loss,
            recipe,
            device,
            steps,
            seed,
            options.get("progress", iter),
        )
    # A class of val that train lacks is never said, but counts.
    counts = {
        name: torch.zeros(CLASSES, CLASSES, dtype=torch.long, device=device)
        for name in (*heads, "limit")
    }
    activation = partial(torch.softmax, dim=0) if len(vals) > 1 else torch.clone
    for variants in zip(*(extract_patches(backbone, val, device, **options) for val in vals)):
        mask = variants[0].target.to(device)
        for lr, head in heads.items():
            scores = predict(head, variants, [val.flip for val in vals], activation)
            counts[lr] += confusion(scores.argmax(dim=0), mask)
        counts["limit"] += confusion(pooled_classes(mask, variants[0].grid), mask)
    grid = {lr: mean_iou(counts[lr]) for lr in heads}
    best = max(grid, key=lambda lr: grid[lr][0])
    accuracy = float(counts[best].diag().sum() / counts[best].sum())
    result = {"miou": grid[best][0], "pixel_accuracy": accuracy, "iou": grid[best][1]}
    result["lr"] = {f"{lr:g}": value for lr, (value, _) in grid.items()}
    return result | {"limit": mean_iou(counts["limit"])[0], "steps": steps}


def segmentation_loss(scores: Tensor, classes: Tensor, done: float) -> Tensor:
    classes = classes.long()
    known = (classes >= 0) & (classes != IGNORE)
    return F.cross_entropy(scores[known], classes[known]) if known.any() else 0.0 * scores.sum()


def largest_class(mask: Tensor) -> int:
    known = mask[(mask >= 0) & (mask != IGNORE)]
    return int(known.max()) if len(known) else -1


@torch.inference_mode()
def linear_depth(
    backbone: nn.Module,
    train: Dataset,
    vals: Sequence[Dataset],
    device: torch.device,
    *,
    span: tuple[float, float] | None = None,
    recipe: Recipe = DEPTH,
    steps: int | None = None,
    seed: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """RMSE and delta1 of batch norm + linear into 256 depth bins on frozen patches (DINOv3, arXiv 2508.10104).

    Both are means over pixels, then over images. Pixels whose depth is not above 0, or not finite, are left out.

    Args:
        train, vals: as in `linear_segmentation`, with depth (H', W') in metres for the mask.
        span: depth of the first and last bin in metres; None takes the range of train.

    Returns:
        {"rmse": metres, lower is better, "delta1": share of pixels within a factor of 1.25, "lr": {rate: rmse},
        "limit": {"rmse", "delta1"} of the truth pooled to the patch grid, "constant": RMSE of train's mean depth,
        "span", "steps"}.

    Raises:
        UserError: if no pixel has a depth.
    """
    patches = FrozenPatches(backbone, train, device, depth_summary, **options)
    known = [summary for summary in patches.summaries if summary is not None]
    if not known:
        raise UserError("no pixel of the training depth is above 0")
    lows, highs, means = zip(*known)
    low, high = span or (min(lows), max(highs))
    steps = recipe.steps(len(train)) if steps is None else steps
    with torch.inference_mode(False):
        build = partial(DepthHead, patches.dim, low, high)
        loss = partial(sig_loss, begin=min(0.1, 100 / steps))
        heads = train_heads(
            patches, build, loss, recipe, device, steps, seed, options.get("progress", iter)
        )
    scores: dict[Any, list] = {name: [] for name in (*heads, "limit", "constant")}
    for variants in zip(*(extract_patches(backbone, val, device, **options) for val in vals)):
        depth = variants[0].target.to(device)
        if not is_depth(depth).any():
            continue
        for lr, head in heads.items():
            said = predict(head, variants, [val.flip for val in vals], torch.clone)[0].clamp(
                low, high
            )
            scores[lr].append(depth_errors(said, depth))
        scores["limit"].append(depth_errors(pooled_depth(depth, variants[0].grid), depth))
        scores["constant"].append(
            depth_errors(torch.full_like(depth, sum(means) / len(means)), depth)
        )
    if not scores["limit"]:
        raise UserError("no pixel of the validation depth is above 0")
    rmse, delta = (
        {name: sum(one[k] for one in rows) / len(rows) for name, rows in scores.items()}
        for k in (0, 1)
    )
    best = min(heads, key=lambda lr: rmse[lr])
    result = {
        "rmse": rmse[best],
        "delta1": delta[best],
        "lr": {f"{lr:g}": rmse[lr] for lr in heads},
    }
    result |= {
        "limit": {"rmse": rmse["limit"], "delta1": delta["limit"]},
        "constant": rmse["constant"],
    }
    return result | {"span": [low, high], "steps": steps}


def is_depth(depth: Tensor) -> Tensor:
    return depth.isfinite() & (depth > 0)


def depth_summary(depth: Tensor) -> tuple[float, float, float] | None:
    """Least, largest and mean depth; None where there is none."""
    known = depth[is_depth(depth)].float()
    return (float(known.min()), float(known.max()), float(known.mean())) if len(known) else None


def sig_loss(
    values: Tensor, depth: Tensor, done: float, begin: float = 0.0, eps: float = 1e-3
) -> Tensor:
    """√(Var(g) + 0.15 mean(g)²) with g = log(predicted + ε) − log(true + ε), in DINOv3's file without Var(g) at first.

    Args:
        values, depth: (P, 1) and (P,) in metres.
        done, begin: share of the training that is done, and that Var(g) joins at.
    """
    known = is_depth(depth)
    if known.sum() < 2:
        return 0.0 * values.sum()
    g = (values[known, 0] + eps).log() - (depth[known].float() + eps).log()
    spread = g.var() if done >= begin else 0.0
    return (spread + 0.15 * g.mean().square()).clamp(min=1e-12).sqrt()


def depth_errors(said: Tensor, depth: Tensor) -> tuple[float, float]:
    """RMSE in metres and delta1 of one image (H, W)."""
    known = is_depth(depth)
    said, depth = said[known].cpu().double(), depth[known].cpu().double()
    rmse = (said - depth).square().mean().sqrt()
    within = torch.maximum(said / depth, depth / said) < 1.25
    return float(rmse), float(within.double().mean())


def pooled_depth(depth: Tensor, grid: tuple[int, int]) -> Tensor:
    """(H, W): the geometric mean depth of each patch, for the loss is one of logarithms, enlarged like a prediction.

    Patches without depth take the image's mean.
    """
    known = is_depth(depth)
    value = torch.where(known, depth.float().clamp(min=1e-6).log(), 0.0)
    total, count = (F.adaptive_avg_pool2d(item[None].float(), grid) for item in (value, known))
    mean = torch.where(count > 0, total / count.clamp(min=1e-9), value.sum() / known.sum())
    return upsample(mean.exp(), depth.shape)[0]
