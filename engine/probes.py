"""Frozen features and the k-NN vote, shared by train.py's probe and the evaluation scripts."""

from typing import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from engine import distributed


@torch.inference_mode()
def extract_cls(
    backbone: nn.Module,
    data: Dataset,
    device: torch.device,
    *,
    batch_size: int = 64,
    workers: int = 0,
    progress: Callable[[Iterable], Iterator] = iter,
) -> tuple[Tensor, Tensor]:
    """L2-normalised CLS features of every image, in float32, whatever the training precision.

    Args:
        data: items (image (C, H, W) normalised, label, index). Ranks share the work and each gets the whole.

    Returns:
        features (n, D) and labels (n,), in the data's order, on `device`.
    """
    rank, world = distributed.rank(), distributed.world_size()
    part = Subset(data, range(rank, len(data), world))
    loader = DataLoader(part, batch_size=batch_size, num_workers=workers)
    features, labels, indices = [], [], []
    for images, label, index in progress(loader):
        features.append(F.normalize(backbone(images.to(device)).cls.float(), dim=1).cpu())
        labels.append(label)
        indices.append(index)
    gathered = distributed.gather_objects([torch.cat(column) for column in (features, labels, indices)])
    features, labels, indices = (torch.cat(column) for column in zip(*gathered))
    order = indices.argsort()
    return features[order].to(device), labels[order].to(device)


@torch.inference_mode()
def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    val_features: Tensor,
    val_labels: Tensor,
    ks: Iterable[int] = (20,),
    temperature: float = 0.07,
    chunk: int = 1024,
) -> dict[int, float]:
    """Weighted k-NN (DINO, appendix F.1): the k most similar training images vote with exp(similarity / temperature).

    Exact, and never holds more than a chunk of the similarity matrix: (`chunk`, 65,536) at a time.

    Args:
        train_features, val_features: (n, D) and (m, D), L2-normalised.
        train_labels, val_labels: (n,) and (m,), class numbers from 0; -1 = none: no vote in train, never right in val.
        ks: numbers of neighbours; a k above n counts all n.

    Returns:
        k -> top-1 accuracy as a fraction.
    """
    labelled = train_labels >= 0
    train_features, train_labels = train_features[labelled], train_labels[labelled]
    classes = int(max(train_labels.max(), val_labels.max())) + 1
    ks = sorted(set(ks))
    correct = dict.fromkeys(ks, 0)
    for begin in range(0, len(val_features), chunk):
        similarity, nearest = _nearest(val_features[begin : begin + chunk], train_features, ks[-1])
        weights = ((similarity - similarity[:, :1]) / temperature).exp()  # relative to the nearest: never overflows
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
        values, rows = (queries @ part.T).topk(min(k, len(part)), dim=1)
        rows = rows + begin
        if best is not None:
            values, rows = torch.cat([best, values], dim=1), torch.cat([best_rows, rows], dim=1)
            values, order = values.topk(min(k, values.shape[1]), dim=1)
            rows = rows.gather(1, order)
        best, best_rows = values, rows
    return best, best_rows


def knn_probe(backbone: nn.Module, train: Dataset, val: Dataset, device: torch.device, k: int = 20) -> float:
    """Top-1 accuracy of the weighted vote of the k nearest of `train` on `val`; see `extract_cls` for the items."""
    features = [extract_cls(backbone, data, device) for data in (train, val)]
    return knn_accuracy(*features[0], *features[1], ks=(k,))[k]
