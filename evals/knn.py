"""Features of frozen models, their weighted k-NN vote, and rankings by similarity."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from engine import distributed
from errors import UserError
from evals.reading import read_batches


class FeatureRows(NamedTuple):
    """Features of the images that could be read, in the data's order, on the host."""

    features: Tensor  # (n, ...)
    labels: Tensor  # (n,)
    images: Tensor  # (n,) indices into the data


def extract_features(
    describe: Callable[[Tensor], Tensor],
    data: Dataset,
    device: torch.device,
    *,
    dtype: torch.dtype = torch.float32,
    spare: Tensor | None = None,
    **options: Any,
) -> FeatureRows:
    """Features of every image by `describe`. Ranks share the work; the others than 0 get no rows.

    The global random state is neither read nor changed.

    Args:
        describe: normalised images (B, C, H, W) on `device` -> features (B, ...).
        data: items (image (C, H, W) normalised, label, index in the data).
        dtype: of the features that are kept.
        spare: an image (1, C, H, W), where the model is sharded: a rank without images passes it,
            since all ranks must run the model together.
        options: batch_size, workers, unreadable and progress of `read_batches`.

    Raises:
        UserError: if no image can be read.
    """
    features, labels = None, torch.empty(len(data), dtype=torch.int64)
    read = torch.zeros(len(data), dtype=torch.bool)
    for batch in read_batches(data, **options):
        if batch is None:
            if spare is not None:
                with torch.no_grad():
                    describe(spare)
            continue
        images, label, index = batch
        with torch.no_grad():
            values = describe(images.to(device)).to("cpu", dtype)
        if features is None:  # filled in place: a list of batches would have to be copied
            features = torch.empty(len(data), *values.shape[1:], dtype=dtype)
        features[index], labels[index], read[index] = values, label, True
    return _join_ranks(features, labels, read)


def _join_ranks(features: Tensor | None, labels: Tensor, read: Tensor) -> FeatureRows:
    """The rows that `read` marks, of all ranks, on rank 0."""
    part, main = None, distributed.is_main()
    if features is not None and not main:
        part = read.nonzero()[:, 0], features[read], labels[read]
    parts = [part for part in distributed.gather_to_main(part) if part is not None]
    if not main:
        return FeatureRows(torch.empty(0), labels[:0], labels[:0])
    for rows, values, truth in parts:
        if features is None:
            features = values.new_empty(len(read), *values.shape[1:])
        features[rows], labels[rows], read[rows] = values, truth, True
    if not read.all():
        features, labels = features[read], labels[read]
    return FeatureRows(features, labels, read.nonzero()[:, 0])


def cls_features(backbone: nn.Module, images: Tensor, scales: Sequence[float] = (1.0,)) -> Tensor:
    """L2-normalised CLS (B, D) float32; of several scales of the images the mean, normalised."""
    found = []
    for scale in scales:
        view = images
        if scale != 1:
            view = F.interpolate(images, scale_factor=scale, mode="bilinear")
        found.append(backbone(view).cls.float())
    return F.normalize(torch.stack(found).mean(0), dim=1)


def extract_cls(
    backbone: nn.Module, data: Dataset, device: torch.device, **options: Any
) -> tuple[Tensor, Tensor]:
    """L2-normalised CLS features (n, D) and labels (n,) of every image, on `device`.

    Float32, whatever the training precision; on rank 0, see `extract_features`.
    """
    found = extract_features(partial(cls_features, backbone), data, device, **options)
    return found.features.to(device), found.labels.to(device)


@torch.inference_mode()
def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    val_features: Tensor,
    val_labels: Tensor,
    ks: Iterable[int] = (20,),
    temperature: float = 0.07,
    chunk: int = 2048,
) -> dict[int, float]:
    """Weighted k-NN (DINO, arXiv 2104.14294, appendix F.1), exact.

    The k most similar training images vote with exp(similarity / temperature). Memory holds
    (`chunk`, 65,536) similarities at a time.

    Args:
        train_features, val_features: (n, D) and (m, D), L2-normalised.
        train_labels, val_labels: (n,) and (m,), class numbers from 0. An image of train with
            label -1 does not vote; one of val is never right.
        ks: numbers of neighbours; a k above n counts all n.

    Returns:
        k -> top-1 accuracy as a fraction.

    Raises:
        UserError: if no image of train has a label.
    """
    labelled = train_labels >= 0
    if not labelled.any():
        raise UserError("no image of train that could be read has a label")
    train_features, train_labels = train_features[labelled], train_labels[labelled]
    classes = int(max(train_labels.max(), val_labels.max())) + 1
    ks = sorted(set(ks))
    correct = dict.fromkeys(ks, 0)
    for begin in range(0, len(val_features), chunk):
        similarity, nearest = _nearest(val_features[begin : begin + chunk], train_features, ks[-1])
        # Relative to the nearest, so that exp never overflows.
        weights = ((similarity - similarity[:, :1]) / temperature).exp()
        votes = weights.new_zeros(len(weights), classes)
        truth, counted = val_labels[begin : begin + chunk], 0
        for k in ks:
            votes.scatter_add_(1, train_labels[nearest[:, counted:k]], weights[:, counted:k])
            correct[k] += int((votes.argmax(dim=1) == truth).sum())
            counted = k
    return {k: count / len(val_features) for k, count in correct.items()}


def _nearest(queries: Tensor, train: Tensor, k: int, block: int = 65536) -> tuple[Tensor, Tensor]:
    """The k largest dot products of each query and their rows in `train`, largest first."""
    best = best_rows = None
    for begin in range(0, len(train), block):
        part = train[begin : begin + block]
        values, rows = _largest(queries @ part.T, min(k, len(part)))
        rows = rows + begin
        if best is not None:
            values, rows = torch.cat([best, values], dim=1), torch.cat([best_rows, rows], dim=1)
            values, order = values.topk(min(k, values.shape[1]), dim=1)
            rows = rows.gather(1, order)
        best, best_rows = values, rows
    return best, best_rows


def _largest(scores: Tensor, k: int, group: int = 64) -> tuple[Tensor, Tensor]:
    """`scores.topk(k, dim=1)`, several times faster over many columns.

    The k largest lie in the k groups of columns with the largest maxima, or in the columns left
    over.
    """
    rows, whole = len(scores), scores.shape[1] // group * group
    if k * group >= whole:
        return scores.topk(k, dim=1)
    maxima = scores[:, :whole].unflatten(1, (-1, group)).amax(-1)
    chosen = maxima.topk(k, dim=1, sorted=False).indices
    columns = (chosen[..., None] * group + torch.arange(group, device=scores.device)).flatten(1)
    rest = torch.arange(whole, scores.shape[1], device=scores.device).expand(rows, -1)
    columns = torch.cat([columns, rest], dim=1)
    values, order = scores.gather(1, columns).topk(k, dim=1)
    return values, columns.gather(1, order)


@torch.inference_mode()
def average_precision(
    similarity: Tensor, relevant: Tensor, ignored: Tensor | None = None
) -> Tensor:
    """Area under each query's precision-recall curve by trapezoids.

    As in the evaluation of Holidays, Copydays and the revisited Oxford and Paris.

    Args:
        similarity: (Q, n) of queries to the database.
        relevant: (Q, n) bool, what should come first.
        ignored: (Q, n) bool, taken out of the ranking.

    Returns:
        (Q,) in [0, 1]; NaN where nothing is relevant.
    """
    if ignored is not None:  # moved behind everything, where they change no rank that counts
        similarity = similarity.masked_fill(ignored, -float("inf"))
        relevant = relevant & ~ignored
    hits = relevant.gather(1, similarity.argsort(dim=1, descending=True, stable=True)).double()
    found, rank = hits.cumsum(1), torch.arange(hits.shape[1], device=hits.device)
    before = torch.where(rank == 0, 1.0, (found - 1) / rank.clamp(min=1))
    after = found / (rank + 1)
    return (hits * (before + after) / 2).sum(1) / hits.sum(1)


@torch.inference_mode()
def retrieval_map(
    queries: Tensor,
    database: Tensor,
    judge: Callable[[range], tuple[Tensor, Tensor]],
    cells: int = 1 << 22,
) -> dict[str, float]:
    """Mean average precision of the ranking by cosine, of the queries that have something to find.

    Args:
        queries, database: (Q, D) and (n, D), L2-normalised.
        judge: rows of queries -> relevant and ignored, (rows, n) bool; see `average_precision`.
        cells: similarities held at a time.

    Returns:
        map: in [0, 1]; queries: how many count. Both 0 where none does.
    """
    scores, chunk = [], max(1, cells // len(database))
    for begin in range(0, len(queries), chunk):
        rows = range(begin, min(begin + chunk, len(queries)))
        relevant, ignored = (mask.to(queries.device) for mask in judge(rows))
        scores.append(average_precision(queries[begin : rows.stop] @ database.T, relevant, ignored))
    scores = torch.cat(scores)
    scores = scores[~scores.isnan()]
    return {"map": float(scores.mean()) if len(scores) else 0.0, "queries": len(scores)}


def whitening(features: Tensor) -> Callable[[Tensor], Tensor]:
    """PCA whitening learned on (n, D), followed by L2 normalisation (DINO's copy detection).

    Directions in which `features` do not vary are left out.
    """
    mean = features.mean(0)
    _, scale, axes = torch.linalg.svd(features.double() - mean.double(), full_matrices=False)
    kept = scale > 1e-5 * scale[0]
    turn = (axes[kept] / scale[kept, None] * len(features) ** 0.5).T.to(features.dtype)
    return lambda rows: F.normalize((rows - mean) @ turn, dim=1)


def knn_probe(
    backbone: nn.Module,
    train: Dataset,
    val: Dataset,
    device: torch.device,
    k: int = 20,
    **options: Any,
) -> float:
    """Top-1 accuracy on `val` by the k nearest of `train`, on all ranks.

    For the items and options see `extract_features`.
    """
    sets = [extract_cls(backbone, data, device, **options) for data in (train, val)]
    score = knn_accuracy(*sets[0], *sets[1], ks=(k,))[k] if distributed.is_main() else None
    return distributed.from_main(score)
