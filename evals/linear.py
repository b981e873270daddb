"""Linear probes on frozen features: a grid of softmax regressions trained in one pass, and logistic regression.

A row of features holds the CLS of the last blocks, first to last, then the mean patch of the last block, each after the
final norm (`describe`). A head reads the columns of its kind (`columns`), as in the authors' code of DINO (arXiv
2104.14294, eval_linear.py) and DINOv2 (2304.07193, dinov2/eval/linear.py).
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from errors import UserError
from evals.knn import extract_features

BLOCKS = (1, 4)
# Before · batch / 256: those of DINOv2's code, then up to the 5 that DINOv3's appendix D.7 sweeps.
LEARNING_RATES = (
    1e-5,
    2e-5,
    5e-5,
    1e-4,
    2e-4,
    5e-4,
    1e-3,
    2e-3,
    5e-3,
    0.01,
    0.02,
    0.05,
    0.1,
    0.2,
    0.5,
    1.0,
    2.0,
    5.0,
)
BATCH_SIZE = 128
MOST_STEPS, LEAST_STEPS, EPOCHS = 12_500, 1000, 10  # DINOv2's length; ours for small data
STRENGTHS = tuple(
    (10.0 ** torch.linspace(-6, 5, 45, dtype=torch.float64)).tolist()
)  # C, as DINOv2's logistic regression
SEPARATED = 1e-3  # nats

Classifier = Callable[[Tensor], Tensor]  # rows (B, width) -> logits (B, classes)


@dataclass(frozen=True)
class Head:
    """One cell of the grid."""

    blocks: int  # CLS of so many last blocks, concatenated
    avgpool: bool  # with the mean patch of the last block
    lr: float  # before · batch / 256


def available_blocks(backbone: nn.Module, wanted: Iterable[int] = BLOCKS) -> list[int]:
    """What can be asked for: at most the depth; 1 where a backbone gives its last features only (timm, pixels)."""
    depth = backbone.depth if hasattr(backbone, "intermediate") else 1
    return sorted({min(blocks, depth) for blocks in wanted})


def describe(backbone: nn.Module, images: Tensor, blocks: int = 1) -> Tensor:
    """A row of features per image, (B, blocks · D + D') float32; D' is that of a patch."""
    layers = backbone.intermediate(images, blocks) if blocks > 1 else [backbone(images)]
    parts = [layer.cls for layer in layers] + [layers[-1].patches.mean(dim=1)]
    return torch.cat(parts, dim=1).float()


def columns(blocks: int, avgpool: bool, *, width: int, pooled: int, most: int) -> slice:
    """Which part of a row of `width` numbers, the mean patch being `pooled` of them, after the CLS of `most` blocks."""
    cls = (width - pooled) // most
    return slice((most - blocks) * cls, width if avgpool else most * cls)


class HeadGrid:
    """Softmax regressions trained side by side by SGD with momentum 0.9, each with its own inputs and learning rate.

    Weights start as N(0, 0.01), the same for all heads of a kind, biases as 0. No head sees another; one that diverges
    leaves the rest alone.

    Args:
        heads: of the grid.
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
        for blocks, avgpool in sorted({(head.blocks, head.avgpool) for head in self.heads}):
            group = [
                head for head in self.heads if (head.blocks, head.avgpool) == (blocks, avgpool)
            ]
            part = columns(blocks, avgpool, width=width, pooled=pooled, most=most)
            weight = 0.01 * torch.randn(
                classes, part.stop - part.start + 1, generator=generator
            ).repeat(len(group), 1, 1)
            weight[..., -1] = 0  # the bias: inputs get a 1 at the end
            rates = torch.tensor([head.lr * batch_size / 256 for head in group]).view(-1, 1, 1)
            weight, rates = weight.to(device), rates.to(device)
            self.groups.append((part, group, weight, torch.zeros_like(weight), rates))

    @torch.no_grad()
    def step(self, rows: Tensor, labels: Tensor, share: float = 1.0) -> None:
        """One update of every head on rows (B, width) and labels (B,), at `share` of its learning rate."""
        target = F.one_hot(labels, self.groups[0][2].shape[1])[:, None]
        for part, _, weight, velocity, rates in self.groups:
            inputs = _with_one(rows[:, part])
            # Cross-entropy's gradient, (softmax - target)ᵀ · inputs / B, of all heads as one product.
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
        """Top-1 of every head as a fraction; 0 for one that diverged. A label of -1 is never right."""
        found = {}
        for part, group, weight, _, _ in self.groups:
            correct = torch.zeros(len(group), dtype=torch.int64, device=weight.device)
            for begin in range(0, len(rows), chunk):
                inputs = _with_one(rows[begin : begin + chunk, part].to(weight.device).float())
                truth = labels[begin : begin + chunk, None].to(weight.device)
                correct += (_logits(inputs, weight).argmax(-1) == truth).sum(0)
            correct *= weight.isfinite().all((1, 2))
            found |= {head: count / len(rows) for head, count in zip(group, correct.tolist())}
        return {head: found[head] for head in self.heads}


def fit_heads(grid: HeadGrid, batches: Iterable[tuple[Tensor, Tensor]], steps: int) -> None:
    """`steps` updates on batches of rows and labels, learning rates going to 0 by a cosine."""
    for step, (rows, labels) in zip(range(steps), batches):
        grid.step(rows, labels, (1 + math.cos(math.pi * step / steps)) / 2)


def cached_batches(
    rows: Tensor, labels: Tensor, batch_size: int, device: torch.device, seed: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches in a new order each epoch; those of fewer rows than `batch_size` hold each once."""
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
    """Top-1 as a fraction, the choice being among the `allowed` classes (k,) where they are given."""
    correct = 0
    for begin in range(0, len(rows), chunk):
        logits = classifier(rows[begin : begin + chunk].float())
        if allowed is not None:
            out = torch.full_like(logits, -math.inf)
            out[:, allowed] = logits[:, allowed]
            logits = out
        correct += int((logits.argmax(1).cpu() == labels[begin : begin + chunk].cpu()).sum())
    return correct / len(rows)


def linear_probe(backbone: nn.Module, train: Dataset, val: Dataset, device: torch.device) -> float:
    """Top-1 on `val` of the best head on the last block: over learning rates, with and without the mean patch.

    For use in a training loop: moves no random state, and ranks share the forward passes.

    Args:
        train, val: items (image (C, H, W) normalised, label, index); a label of -1 trains nothing and is never right.
    """
    rows, labels = extract_features(lambda images: describe(backbone, images), train, device)
    rows, labels = rows[labels >= 0], labels[labels >= 0]
    val_rows, val_labels = extract_features(lambda images: describe(backbone, images), val, device)
    heads = [Head(1, avgpool, lr) for avgpool in (False, True) for lr in LEARNING_RATES]
    batch_size = min(BATCH_SIZE, len(rows))
    sizes = {"width": rows.shape[1], "pooled": backbone.embed_dim, "classes": int(labels.max()) + 1}
    grid = HeadGrid(heads, **sizes, batch_size=batch_size, device=device)
    fit_heads(
        grid, cached_batches(rows, labels, batch_size, device), default_steps(len(rows), batch_size)
    )
    return max(grid.accuracies(val_rows, val_labels).values())


# ----------------------------------------------------------------- logistic regression


class LogisticRegression:
    """Multinomial logistic regression by L-BFGS, at most 1000 iterations, float64: least Σ loss · C + ‖weights‖² / 2.

    Solved about the mean and along the principal axes of the rows, each scaled by about the curvature there. That moves
    no minimum and takes far fewer iterations: features of a network share most of their mean, and few axes vary.

    Args:
        rows, labels: (n, d) float64 and (n,).
    """

    CURVATURE = 0.1  # of the loss for inputs of variance 1: p (1 - p), roughly

    def __init__(self, rows: Tensor, labels: Tensor, classes: int):
        self.mean, self.labels = rows.mean(0), labels
        _, scale, axes = torch.linalg.svd(rows - self.mean, full_matrices=False)
        kept = scale > 1e-9 * scale.max()  # no weight can come from where nothing varies
        self.axes, self.variance = axes[kept].T, scale[kept].square() / len(rows)
        self.inputs = _with_one((rows - self.mean) @ self.axes)
        self.weight = rows.new_zeros(classes, self.inputs.shape[1])

    def fit(self, strength: float) -> Tensor:
        """(classes, d + 1) for this C, the bias, which is not drawn to 0, last; starts from the last solution."""
        penalty = 1 / (
            strength * len(self.labels)
        )  # all divided by n · C: tolerances mean the same for any data
        scale = 1 / _with_one(self.CURVATURE * self.variance + penalty).sqrt()
        inputs, scaled = self.inputs * scale, (self.weight / scale).requires_grad_()
        options = {"history_size": 10, "tolerance_grad": 1e-6, "tolerance_change": 1e-9}
        optimizer = torch.optim.LBFGS(
            [scaled], max_iter=1000, line_search_fn="strong_wolfe", **options
        )

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
    """DINOv2's logistic regression: C chosen on a tenth of the training images, then all of them fitted with it.

    Each C starts from the solution of the one before. Of equal ones the smallest C is taken. Where the fitted images
    are told apart, a larger C would only lengthen the weights, slowly: the sweep ends there (ours).

    Returns:
        The classifier, its C, and C -> top-1 on that tenth.
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
    return _linear(LogisticRegression(rows, labels, classes).fit(best), slice(None)), best, scores


def _logits(inputs: Tensor, weight: Tensor) -> Tensor:
    """(B, L, classes) of L heads at once, from (B, d) and (L, classes, d)."""
    return (inputs @ weight.flatten(0, 1).T).unflatten(1, weight.shape[:2])


def _linear(weight: Tensor, part: slice) -> Classifier:
    return lambda rows: _with_one(rows[:, part].to(weight)) @ weight.T


def _with_one(rows: Tensor) -> Tensor:
    return F.pad(rows, (0, 1), value=1.0)
