"""Linear probes on frozen features: a grid of softmax regressions, and logistic regression.

A row of features holds the CLS of the last blocks, first to last, then the mean patch of the last
block, each after the final norm (`describe`). A head reads the columns of its kind (`columns`), as
in the authors' code of DINO (arXiv 2104.14294, eval_linear.py) and DINOv2 (2304.07193,
dinov2/eval/linear.py).
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from engine import distributed
from errors import UserError
from evals.knn import extract_features

BLOCKS = (1, 4)
LEARNING_RATES = (  # of a batch of 256
    *(1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1),  # DINOv2's code
    *(0.2, 0.5, 1.0, 2.0, 5.0),  # up to what DINOv3's appendix D.7 sweeps
)
BATCH_SIZE = 128
MOST_STEPS, LEAST_STEPS, EPOCHS = 12_500, 1000, 10  # DINOv2's length; ours for small data
# C of DINOv2's logistic regression.
STRENGTHS = tuple((10.0 ** torch.linspace(-6, 5, 45, dtype=torch.float64)).tolist())
SEPARATED = 1e-3  # nats of loss below which the training images are told apart

Classifier = Callable[[Tensor], Tensor]  # rows (B, width) -> logits (B, classes)


@dataclass(frozen=True)
class Head:
    """One cell of the grid."""

    blocks: int  # CLS of so many last blocks, concatenated
    avgpool: bool  # with the mean patch of the last block
    lr: float  # of a batch of 256; scales linearly with the batch


def available_blocks(backbone: nn.Module, wanted: Iterable[int] = BLOCKS) -> list[int]:
    """`wanted`, at most the depth; 1 for a backbone without `intermediate` (timm, pixels)."""
    depth = backbone.depth if hasattr(backbone, "intermediate") else 1
    return sorted({min(blocks, depth) for blocks in wanted})


def describe(backbone: nn.Module, images: Tensor, blocks: int = 1) -> Tensor:
    """A row of features per image, (B, blocks · D + D') float32; D' is that of a patch."""
    layers = backbone.intermediate(images, blocks) if blocks > 1 else [backbone(images)]
    parts = [layer.cls for layer in layers] + [layers[-1].patches.mean(dim=1)]
    return torch.cat(parts, dim=1).float()


def columns(blocks: int, avgpool: bool, *, width: int, pooled: int, most: int) -> slice:
    """The part of a row that a head reads: CLS of the last `blocks`, with or without mean patch.

    A row has `width` numbers: the CLS of `most` blocks, then a mean patch of `pooled` numbers.
    """
    cls = (width - pooled) // most
    return slice((most - blocks) * cls, width if avgpool else most * cls)


class HeadGrid:
    """Softmax regressions trained side by side, each with its own inputs and learning rate.

    The optimizer is SGD with momentum 0.9. Weights start as N(0, 0.01), the same for all heads of
    a kind, biases as 0. A head that diverges does not affect the others.

    Args:
        width, pooled: of a row, see `columns`.
        batch_size: scales the learning rates by batch_size / 256.
    """

    def __init__(
        self,
        heads: Iterable[Head],
        *,
        width: int,
        pooled: int,
        classes: int,
        batch_size: int,
        device: torch.device,
        seed: int = 0,
    ):
        self.heads = list(heads)
        most = max(head.blocks for head in self.heads)
        generator = torch.Generator().manual_seed(seed)
        self.groups: list[tuple[slice, list[Head], Tensor, Tensor, Tensor]] = []
        for kind in sorted({(head.blocks, head.avgpool) for head in self.heads}):
            group = [head for head in self.heads if (head.blocks, head.avgpool) == kind]
            part = columns(*kind, width=width, pooled=pooled, most=most)
            inputs = part.stop - part.start + 1  # the last weight is the bias: its input is 1
            weight = 0.01 * torch.randn(classes, inputs, generator=generator)
            weight[:, -1] = 0
            weight = weight.repeat(len(group), 1, 1).to(device)
            rates = torch.tensor([head.lr * batch_size / 256 for head in group])
            rates = rates.view(-1, 1, 1).to(device)
            self.groups.append((part, group, weight, torch.zeros_like(weight), rates))

    @torch.no_grad()
    def step(self, rows: Tensor, labels: Tensor, share: float = 1.0) -> None:
        """Updates every head on rows (B, width) and labels (B,), at `share` of its rate."""
        target = F.one_hot(labels, self.groups[0][2].shape[1])[:, None]
        for part, _, weight, velocity, rates in self.groups:
            inputs = _with_one(rows[:, part])
            # Cross-entropy's gradient, (softmax - target)ᵀ · inputs / B, in one product.
            error = _logits(inputs, weight).softmax(-1).sub_(target).flatten(1)
            velocity.flatten(0, 1).mul_(0.9).addmm_(error.T, inputs, alpha=1 / len(rows))
            weight.addcmul_(velocity, rates, value=-share)

    def classifier(self, head: Head) -> Classifier:
        for part, group, weight, _, _ in self.groups:
            if head in group:
                return _linear(weight[group.index(head)], part)
        raise UserError(f"{head} is not in the grid")

    @torch.inference_mode()
    def accuracies(self, rows: Tensor, labels: Tensor, chunk: int = 1024) -> dict[Head, float]:
        """Top-1 of every head; 0 for one that diverged. A label of -1 is never right."""
        found = {}
        for part, group, weight, _, _ in self.groups:
            correct = torch.zeros(len(group), dtype=torch.int64, device=weight.device)
            for begin in range(0, len(rows), chunk):
                inputs = _with_one(rows[begin : begin + chunk, part].to(weight.device).float())
                truth = labels[begin : begin + chunk, None].to(weight.device)
                correct += (_logits(inputs, weight).argmax(-1) == truth).sum(0)
            correct *= weight.isfinite().all((1, 2))
            for head, count in zip(group, correct.tolist(), strict=True):
                found[head] = count / len(rows)
        return {head: found[head] for head in self.heads}


def fit_heads(grid: HeadGrid, batches: Iterable[tuple[Tensor, Tensor]], steps: int) -> None:
    """`steps` updates on batches of rows and labels; learning rates go to 0 by a cosine."""
    for step, (rows, labels) in zip(range(steps), batches, strict=False):
        grid.step(rows, labels, (1 + math.cos(math.pi * step / steps)) / 2)


def cached_batches(
    rows: Tensor, labels: Tensor, batch_size: int, device: torch.device, seed: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches, in a new order each epoch; with fewer rows, a batch holds each once."""
    generator = torch.Generator().manual_seed(seed)
    size = min(batch_size, len(rows))
    while True:
        order = torch.randperm(len(rows), generator=generator)
        for chosen in order[: len(order) // size * size].split(size):
            yield rows[chosen].to(device).float(), labels[chosen].to(device)


def default_steps(
    images: int, batch_size: int = BATCH_SIZE, epochs: int = EPOCHS, most: int | None = MOST_STEPS
) -> int:
    """The protocol's epochs, but no fewer than LEAST_STEPS updates, and no more than `most`."""
    steps = max(LEAST_STEPS, epochs * images // batch_size)
    return steps if most is None else min(steps, most)


@torch.inference_mode()
def accuracy(
    classifier: Classifier,
    rows: Tensor,
    labels: Tensor,
    allowed: Tensor | None = None,
    chunk: int = 1024,
) -> float:
    """Top-1 as a fraction; the choice is among the `allowed` classes (k,) if they are given.

    0 without rows, as ranks other than 0 have them.
    """
    correct = 0
    for begin in range(0, len(rows), chunk):
        logits = classifier(rows[begin : begin + chunk].float())
        if allowed is not None:
            allowed_logits = torch.full_like(logits, -math.inf)
            allowed_logits[:, allowed] = logits[:, allowed]
            logits = allowed_logits
        correct += int((logits.argmax(1).cpu() == labels[begin : begin + chunk].cpu()).sum())
    return correct / max(1, len(rows))


def linear_probe(
    backbone: nn.Module, train: Dataset, val: Dataset, device: torch.device, **options: Any
) -> float:
    """Top-1 on `val` of the best head on the last block, on all ranks.

    The grid is over learning rates, with and without the mean patch. For use in a training loop:
    the global random state does not change, and ranks share the forward passes.

    Args:
        train, val: items (image (C, H, W) normalised, label, index). An image of train with label
            -1 is left out; one of val is never right.
        options: of `extract_features`.
    """
    row_of = partial(describe, backbone)
    rows, labels, _ = extract_features(row_of, train, device, **options)
    val_rows, val_labels, _ = extract_features(row_of, val, device, **options)
    top1 = None
    if distributed.is_main():
        top1 = _best_head(backbone, (rows, labels), (val_rows, val_labels), device)
    return distributed.from_main(top1)


def _best_head(
    backbone: nn.Module,
    train: tuple[Tensor, Tensor],
    val: tuple[Tensor, Tensor],
    device: torch.device,
) -> float:
    rows, labels = (part[train[1] >= 0] for part in train)
    if not len(rows):
        raise UserError("no image of train that could be read has a label")
    heads = [Head(1, avgpool, lr) for avgpool in (False, True) for lr in LEARNING_RATES]
    batch_size = min(BATCH_SIZE, len(rows))
    sizes = {"width": rows.shape[1], "pooled": backbone.embed_dim, "classes": int(labels.max()) + 1}
    grid = HeadGrid(heads, **sizes, batch_size=batch_size, device=device)
    batches = cached_batches(rows, labels, batch_size, device)
    fit_heads(grid, batches, default_steps(len(rows), batch_size))
    return max(grid.accuracies(*val).values())


# Logistic regression.


class LogisticRegression:
    """Multinomial logistic regression: the minimum of Σ loss · C + ‖weights‖² / 2, in float64.

    L-BFGS, at most 1000 iterations, works on the centred rows along their principal axes, each
    scaled by about the curvature there. The minimum is the same and takes far fewer iterations:
    features of a network share most of their mean, and few axes vary.

    Args:
        rows, labels: (n, d) float64 and (n,).
    """

    CURVATURE = 0.1  # of the loss for inputs of variance 1: p (1 - p), roughly

    def __init__(self, rows: Tensor, labels: Tensor, classes: int):
        self.mean, self.labels = rows.mean(0), labels
        _, scale, axes = torch.linalg.svd(rows - self.mean, full_matrices=False)
        kept = scale > 1e-9 * scale.max()  # along the other axes nothing varies
        self.axes, self.variance = axes[kept].T, scale[kept].square() / len(rows)
        self.inputs = _with_one((rows - self.mean) @ self.axes)
        self.weight = rows.new_zeros(classes, self.inputs.shape[1])

    def fit(self, strength: float) -> Tensor:
        """(classes, d + 1) for this C. The last column is the bias, which has no penalty.

        Starts from the solution of the previous call.
        """
        # The sum is divided by n · C, so that tolerances mean the same for any data.
        penalty = 1 / (strength * len(self.labels))
        scale = 1 / _with_one(self.CURVATURE * self.variance + penalty).sqrt()
        inputs, scaled = self.inputs * scale, (self.weight / scale).requires_grad_()
        options = {"history_size": 10, "tolerance_grad": 1e-6, "tolerance_change": 1e-9}
        options |= {"max_iter": 1000, "line_search_fn": "strong_wolfe"}
        optimizer = torch.optim.LBFGS([scaled], **options)

        def objective() -> Tensor:
            optimizer.zero_grad()
            size = (scaled * scale)[:, :-1].square().sum()
            loss = F.cross_entropy(inputs @ scaled.T, self.labels) + penalty / 2 * size
            loss.backward()
            return loss

        with torch.enable_grad():
            optimizer.step(objective)
        self.weight = scaled.detach() * scale
        weight, bias = self.weight[:, :-1] @ self.axes.T, self.weight[:, -1:]
        return torch.cat([weight, bias - (weight @ self.mean)[:, None]], dim=1)


def logistic_probe(
    rows: Tensor,
    labels: Tensor,
    classes: int,
    strengths: Iterable[float] = STRENGTHS,
    seed: int = 0,
    progress: Callable[[Iterable], Iterator] = iter,
) -> tuple[Classifier, float, dict[float, float]]:
    """DINOv2's logistic regression: C is chosen on a tenth of the images, then all are fitted.

    Each C starts from the solution of the previous one. Of equal accuracies the smallest C is
    taken. Once the fitted images are told apart, a larger C would only lengthen the weights, and
    slowly: the sweep ends there (ours).

    Returns:
        The classifier, its C, and C -> top-1 on the held-out tenth.
    """
    rows, labels = rows.cpu().double(), labels.cpu()
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    held = order[: max(1, len(rows) // 10)]
    fitted = order[len(held) :] if len(rows) > 1 else order
    scores, part = {}, LogisticRegression(rows[fitted], labels[fitted], classes)
    for strength in progress(sorted(strengths)):
        weight = part.fit(strength)
        right = (_with_one(rows[held]) @ weight.T).argmax(1) == labels[held]
        scores[strength] = float(right.double().mean())
        if F.cross_entropy(_with_one(rows[fitted]) @ weight.T, labels[fitted]) < SEPARATED:
            break
    best = max(scores, key=scores.get)
    weight = LogisticRegression(rows, labels, classes).fit(best)
    return _linear(weight, slice(None)), best, scores


def _logits(inputs: Tensor, weight: Tensor) -> Tensor:
    """(B, L, classes) of L heads at once, from (B, d) and (L, classes, d)."""
    return (inputs @ weight.flatten(0, 1).T).unflatten(1, weight.shape[:2])


def _linear(weight: Tensor, part: slice) -> Classifier:
    return lambda rows: _with_one(rows[:, part].to(weight)) @ weight.T


def _with_one(rows: Tensor) -> Tensor:
    return F.pad(rows, (0, 1), value=1.0)
