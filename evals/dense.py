"""Linear heads on frozen patches, and segmentation by them, as DINOv2 and DINOv3 measure it.

One pass trains a head for each learning rate; the best on `val` is reported with the whole grid.
Where the published protocols draw random crops, whole images are used (ours): the frozen backbone
then computes each image only once.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from engine import distributed
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
from evals.reading import in_order


@dataclass(frozen=True)
class Recipe:
    """How a head is trained: AdamW, linear warm-up, then cosine."""

    lrs: tuple[float, ...]
    weight_decay: float
    betas: tuple[float, float]
    warmup: float  # share of the steps
    start: float  # share of the peak at step 0
    end: float  # share of the peak after the last step
    epochs: float  # as published, before `steps` bounds it
    longest: int  # steps as published
    clip: float = math.inf
    batch_size: int = 16
    points: int = 1024  # random pixels of an image that enter the loss of a step
    shortest: int = 300  # steps; ours, for small data

    def steps(self, images: int) -> int:
        return min(self.longest, max(self.shortest, round(self.epochs * images / self.batch_size)))


# DINOv3's file for ADE20k. Published is 1e-3, swept from 1e-4; 1e-2 is ours, for short runs.
SEGMENTATION = Recipe(
    (1e-3, 1e-2), 1e-3, (0.9, 0.999), 0.0375, 1e-6, 0.0, epochs=32, longest=40_000
)


class FrozenPatches:
    """Patch tokens of a data set: computed once and kept, or at each draw if they do not fit.

    Ranks share the work. Rank 0 keeps the tokens and draws.

    Args:
        summary: computed of each target; `summaries` holds them, in the data's order, of the
            images that could be read, whose indices are `indices`.
        limit: bytes of memory for the tokens.
        options: of `extract_patches`.
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
        self.data, self.device = data, device
        self.progress = options.get("progress", iter)
        self.extract = partial(extract_patches, backbone, device=device, **options)
        kept: list[tuple[int, Patches]] | None = []
        summaries, used, dim = [], 0, 0
        for item in self.extract(data, batch_size=batch_size):
            dim = item.tokens.shape[1]
            summaries.append((item.index, (item.index, summary(item.target))))
            used += item.tokens.nbytes
            if used > limit:
                kept = None
            if kept is not None:
                kept.append((item.index, item._replace(tokens=item.tokens.cpu())))
        self.indices, self.summaries = zip(*in_order(summaries), strict=True)
        totals = distributed.gather_objects((used, dim))
        self.dim = max(dim for _, dim in totals)
        fits = sum(used for used, _ in totals) <= limit
        self.kept = in_order(kept, distributed.gather_to_main) if fits else None

    def draws(
        self, steps: int, batch_size: int, seed: int, first: int = 0
    ) -> Iterator[list[Patches]]:
        """Batches `first` to `steps`, epoch after epoch in a new order; one may span two epochs."""
        generator = torch.Generator().manual_seed(seed)
        images, count = len(self.indices), steps * batch_size
        epochs = range(math.ceil(count / images))
        order = torch.cat([torch.randperm(images, generator=generator) for _ in epochs])
        order = order[first * batch_size : count].tolist()
        if self.kept is None:
            drawn = Subset(self.data, [self.indices[number] for number in order])
            items = self.extract(drawn, batch_size=batch_size, shared=False)
        else:
            items = (self.kept[number] for number in order)
        for _ in range(steps - first):
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


@torch.inference_mode(False)
def train_heads(
    patches: FrozenPatches,
    build: Callable[[], nn.Module],
    loss: Callable[[Tensor, Tensor, float], Tensor],
    recipe: Recipe,
    steps: int,
    seed: int,
) -> dict[float, nn.Module]:
    """One trained head for each learning rate, in eval mode; all get the same batches and pixels.

    Rank 0 trains them for all ranks.

    Scores are enlarged bilinearly to the target's full size. Of each image `recipe.points` random
    pixels enter the loss.

    Args:
        loss: of values (P, K) and targets (P,) of all the batch's pixels, and the share of the
            training that is done.
    """
    heads, device = None, patches.device
    if distributed.is_main():
        heads = _fit_heads(patches, build, loss, recipe, steps, seed)
    heads = distributed.from_main(heads)
    return {lr: head.to(device) for lr, head in heads.items()}


def _fit_heads(
    patches: FrozenPatches,
    build: Callable[[], nn.Module],
    loss: Callable[[Tensor, Tensor, float], Tensor],
    recipe: Recipe,
    steps: int,
    seed: int,
) -> dict[float, nn.Module]:
    """As `train_heads`, on the host."""
    device = patches.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        heads = {lr: build().to(device) for lr in recipe.lrs}
        settings = {"betas": recipe.betas, "weight_decay": recipe.weight_decay}
        optimizers = {
            lr: torch.optim.AdamW(head.parameters(), lr, **settings) for lr, head in heads.items()
        }
        batches = patches.draws(steps, recipe.batch_size, seed)
        for step, batch in enumerate(patches.progress(batches)):
            tokens = torch.cat([item.tokens for item in batch]).to(device)
            pixels = [torch.randint(item.target.numel(), (recipe.points,)) for item in batch]
            flat = [item.target.flatten() for item in batch]
            targets = [of_image[chosen] for of_image, chosen in zip(flat, pixels, strict=True)]
            targets = torch.cat(targets).to(device)
            for lr, head in heads.items():
                parts = head(tokens).split([len(item.tokens) for item in batch])
                values = at_pixels(parts, batch, pixels)
                optimizers[lr].param_groups[0]["lr"] = lr * schedule(step / steps, recipe)
                optimizers[lr].zero_grad()
                loss(values, targets, step / steps).backward()
                nn.utils.clip_grad_norm_(head.parameters(), recipe.clip)
                optimizers[lr].step()
    return {lr: head.eval().cpu() for lr, head in heads.items()}


def schedule(done: float, recipe: Recipe) -> float:
    """Factor of the peak learning rate when the share `done` of the steps is done."""
    if done < recipe.warmup:
        return recipe.start + (1 - recipe.start) * done / recipe.warmup
    rest = (done - recipe.warmup) / (1 - recipe.warmup)
    return recipe.end + (1 - recipe.end) * 0.5 * (1 + math.cos(math.pi * rest))


def at_pixels(
    values: Sequence[Tensor], batch: Sequence[Patches], pixels: Sequence[Tensor]
) -> Tensor:
    """(N, K) of each image's patches -> (P, K) at P pixels of each target, image after image.

    Equal to `upsample` at those pixels; the pixels between are not computed.
    """
    results: list = [None] * len(batch)
    shapes = [(item.grid, item.target.shape) for item in batch]
    for grid, (height, width) in dict.fromkeys(shapes):  # images of one shape together
        alike = [k for k, shape in enumerate(shapes) if shape == (grid, (height, width))]
        chosen = torch.stack([pixels[k] for k in alike])
        rows, columns = chosen // width, chosen % width
        places = torch.stack([(2 * columns + 1) / width - 1, (2 * rows + 1) / height - 1], dim=-1)
        maps = torch.stack([values[k] for k in alike]).mT.unflatten(2, grid)
        options = {"padding_mode": "border", "align_corners": False}
        found = F.grid_sample(maps, places[:, None].to(maps), **options)
        for k, of_one in zip(alike, found, strict=True):
            results[k] = of_one[:, 0].T
    return torch.cat(results)


def predict(
    head: Callable[[Tensor], Tensor],
    variants: Sequence[Patches],
    flips: Sequence[bool],
    activation: Callable,
) -> Tensor:
    """(K, H, W) at the target's size: the mean of the activated scores over an image's variants.

    Args:
        variants: patches of the image at several sizes, mirrored where its `flips` is set.
    """
    total = 0.0
    for item, flip in zip(variants, flips, strict=True):
        maps = head(item.tokens).T.unflatten(1, item.grid)
        total = total + activation(upsample(maps.flip(-1) if flip else maps, item.target.shape))
    return total / len(variants)


@torch.inference_mode()
def linear_segmentation(
    backbone: nn.Module,
    train: Dataset,
    vals: Sequence[Dataset],
    device: torch.device,
    *,
    keep: Callable[[nn.Module, dict], None] | None = None,
    recipe: Recipe = SEGMENTATION,
    steps: int | None = None,
    seed: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """mIoU of a linear head on frozen patches (DINOv2, arXiv 2304.07193; DINOv3, 2508.10104).

    Args:
        train: items (image (C, H, W) normalised, mask (H', W') class numbers, index); 255 is left
            out.
        vals: the same images at one or several sizes, or mirrored where `flip` is set; class
            probabilities are averaged.
        keep: called with the best head and its options besides the width.
        options: of `extract_patches`.

    Returns:
        {"miou", "pixel_accuracy", "iou": [each class], "lr": {rate: miou}, "limit": mIoU of the
        truth pooled to the patch grid, "steps"}.

    Raises:
        UserError: if no pixel has a class.
    """
    patches = FrozenPatches(backbone, train, device, largest_class, **options)
    classes = max(patches.summaries) + 1
    if classes < 1:
        raise UserError("no pixel of the training masks has a class")
    steps = recipe.steps(len(patches.indices)) if steps is None else steps
    build = partial(LinearHead, patches.dim, classes, dropout=0.1)
    heads = train_heads(patches, build, segmentation_loss, recipe, steps, seed)
    # No head predicts a class of val that train lacks, but that class counts.
    blank = torch.zeros(CLASSES, CLASSES, dtype=torch.long, device=device)
    counts = {name: blank.clone() for name in (*heads, "limit")}
    activation = partial(torch.softmax, dim=0) if len(vals) > 1 else torch.clone
    flips = [val.flip for val in vals]
    streams = [extract_patches(backbone, val, device, **options) for val in vals]
    for variants in zip(*streams, strict=True):
        mask = variants[0].target.to(device)
        for lr, head in heads.items():
            scores = predict(head, variants, flips, activation)
            counts[lr] += confusion(scores.argmax(dim=0), mask)
        counts["limit"] += confusion(pooled_classes(mask, variants[0].grid), mask)
    counts = {name: distributed.all_reduce_sum(count) for name, count in counts.items()}
    scores = {name: mean_iou(count) for name, count in counts.items()}
    best = max(heads, key=lambda lr: scores[lr][0])
    if keep is not None:
        keep(heads[best], {"classes": classes})
    accuracy = float(counts[best].diag().sum() / counts[best].sum())
    result = {"miou": scores[best][0], "pixel_accuracy": accuracy, "iou": scores[best][1]}
    result["lr"] = {f"{lr:g}": scores[lr][0] for lr in heads}
    return result | {"limit": scores["limit"][0], "steps": steps}


def segmentation_loss(scores: Tensor, classes: Tensor, done: float) -> Tensor:
    classes = classes.long()
    known = (classes >= 0) & (classes != IGNORE)
    return F.cross_entropy(scores[known], classes[known]) if known.any() else 0.0 * scores.sum()


def largest_class(mask: Tensor) -> int:
    known = mask[(mask >= 0) & (mask != IGNORE)]
    return int(known.max()) if len(known) else -1
