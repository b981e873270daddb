"""Patch tokens of a frozen backbone, and two quick measures: k-NN segmentation and locality."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from data.pictures import UnreadableImage
from data.pixels import strided_starts
from engine import distributed
from errors import UserError
from evals.reading import Readable, in_order, note_unreadable, read_batches

IGNORE = 255  # in masks of bytes: counts neither for nor against
CLASSES = 256  # that masks may hold; no rank knows beforehand which occur


class Patches(NamedTuple):
    """Patch tokens of one image, and its annotation."""

    tokens: Tensor  # (N, D) float32, row by row
    grid: tuple[int, int]  # (h, w), h · w = N
    target: Any  # the second part of the data's item
    index: int  # of the image in the data


@torch.no_grad()
def extract_patches(
    backbone: nn.Module,
    data: Dataset,
    device: torch.device,
    *,
    spare: Tensor | None = None,
    **options: Any,
) -> Iterator[Patches]:
    """Patch tokens image by image, in the data's order; ranks share the images.

    Args:
        data: items (image (C, H, W) normalised, target, index in the data).
        spare: as in `extract_features`.
        options: of `read_batches`.
    """
    for items in read_batches(data, collate=list, **options):
        found = tokens_of(backbone, [image.to(device) for image, _, _ in items or ()], spare)
        for (tokens, grid), (_, target, index) in zip(found, items or (), strict=True):
            yield Patches(tokens, grid, target, index)


@torch.no_grad()
def tokens_of(
    backbone: nn.Module, images: Sequence[Tensor], spare: Tensor | None = None
) -> list[tuple[Tensor, tuple[int, int]]]:
    """(N, D) float32 and the grid of each image (C, H, W); one forward pass for each shape.

    With a `spare` image all ranks run the model equally often.
    """
    results: list = [None] * len(images)
    shapes = dict.fromkeys(image.shape for image in images)
    if spare is not None:
        for _ in range(max(distributed.gather_objects(len(shapes))) - len(shapes)):
            backbone(spare)
    for shape in shapes:
        chosen = [k for k, image in enumerate(images) if image.shape == shape]
        features = backbone(torch.stack([images[k] for k in chosen]))
        for k, tokens in zip(chosen, features.patches.float(), strict=True):
            results[k] = tokens, tuple(features.grid)
    return results


def patch_tokens(
    backbone: nn.Module, image: Tensor, device: torch.device, window: int | None = None
) -> tuple[Tensor, tuple[int, int]]:
    """Patch tokens (N, D), float32 on the CPU, and their grid (h, w) of one image (C, H, W).

    Args:
        window: side in pixels of the squares that the model gets, see `Sliding`. The cost of
            attention then grows with the image's area, not with its square.
    """
    if window is not None:
        backbone = Sliding(backbone, window, window_starts)
    tokens, grid = tokens_of(backbone, [image.to(device)])[0]
    return tokens.cpu(), grid


class LastLayers(nn.Module):
    """A backbone whose patches are those of its last `count` blocks, concatenated in D.

    Each block's patches pass the final norm.

    Raises:
        UserError: if the backbone has no `intermediate` or fewer blocks.
    """

    def __init__(self, backbone: nn.Module, count: int):
        super().__init__()
        if count < 1 or (count > 1 and not hasattr(backbone, "intermediate")):
            raise UserError(f"layers is {count}; this backbone gives its last layer only")
        self.backbone, self.count, self.patch_size = backbone, count, backbone.patch_size

    def forward(self, images: Tensor) -> Any:
        blocks = self.backbone.intermediate(images, self.count)
        return replace(blocks[-1], patches=torch.cat([block.patches for block in blocks], dim=-1))


class Sliding(nn.Module):
    """A backbone that gets an image in overlapping windows; patches in several are averaged.

    Under a linear head this is the sliding inference of segmentation papers.

    Args:
        window: side in pixels; the stride is two thirds, as the published 341 of 512.
        starts: length and side in patches -> where windows begin, in place of that stride.

    Raises:
        UserError: if the window is smaller than a patch.
    """

    def __init__(
        self,
        backbone: nn.Module,
        window: int,
        starts: Callable[[int, int], list[int]] | None = None,
    ):
        super().__init__()
        p = backbone.patch_size
        if window < p:
            raise UserError(f"--window is {window}, smaller than a patch of {p} pixels")
        self.backbone, self.patch_size, self.side = backbone, p, window // p
        self.starts = starts or partial(strided_starts, stride=max(1, round(window * 2 / 3 / p)))

    def forward(self, images: Tensor) -> Any:
        p, side = self.patch_size, self.side
        grid = images.shape[-2] // p, images.shape[-1] // p
        total, count = None, images.new_zeros(1, 1, *grid)
        for top in self.starts(grid[0], side):
            for left in self.starts(grid[1], side):
                rows = slice(top * p, (top + side) * p)
                columns = slice(left * p, (left + side) * p)
                features = self.backbone(images[..., rows, columns])
                maps = features.patches.float().mT.unflatten(2, features.grid)
                if total is None:
                    total = maps.new_zeros(*maps.shape[:2], *grid)
                total[..., top : top + side, left : left + side] += maps
                count[..., top : top + side, left : left + side] += 1
        return replace(features, patches=(total / count).flatten(2).mT, grid=grid)


def window_starts(length: int, side: int) -> list[int]:
    """The same, evenly spaced, with at least a quarter of each window in the next."""
    if length <= side:
        return [0]
    steps = math.ceil((length - side) / max(1, side * 3 // 4))
    return [round(step * (length - side) / steps) for step in range(steps + 1)]


def class_shares(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """How many pixels of each class lie in each patch: (H, W) class numbers -> (N, K) counts.

    K is the largest class in the mask plus one; pixels of IGNORE and below 0 are not counted. A
    pixel belongs to the patch that its centre lies in.
    """
    sizes = zip(mask.shape, grid, strict=True)
    rows, columns = (_cells(side, count, mask.device) for side, count in sizes)
    cell = rows[:, None] * grid[1] + columns
    mask = mask.long()
    known = (mask >= 0) & (mask != IGNORE)
    classes = int(mask[known].max()) + 1 if known.any() else 1
    cells = grid[0] * grid[1]
    counts = torch.bincount((cell * classes + mask)[known], minlength=cells * classes)
    return counts.view(cells, classes).float()


def _cells(side: int, count: int, device: torch.device) -> Tensor:
    return (2 * torch.arange(side, device=device) + 1) * count // (2 * side)


def upsample(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear, (K, h, w) -> (K, H, W)."""
    return F.interpolate(maps[None], tuple(size), mode="bilinear", align_corners=False)[0]


def pooled_classes(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """(H, W): classes by the true shares of each patch, enlarged like a prediction."""
    return upsample(class_shares(mask, grid).T.unflatten(1, grid), mask.shape).argmax(dim=0)


def confusion(prediction: Tensor, mask: Tensor) -> Tensor:
    """(CLASSES, CLASSES) pixel counts: true classes in rows, predicted ones in columns.

    Pixels of IGNORE and below 0 are left out.

    Raises:
        UserError: if a class is too large.
    """
    mask, prediction = mask.long().flatten(), prediction.long().flatten()
    known = (mask >= 0) & (mask != IGNORE)
    largest = int(mask[known].max()) if known.any() else 0
    if largest >= CLASSES:
        raise UserError(
            f"a mask holds class {largest}; classes go from 0 to 254, and 255 is not counted"
        )
    pairs = mask[known] * CLASSES + prediction[known]
    return torch.bincount(pairs, minlength=CLASSES**2).view(CLASSES, CLASSES)


def mean_iou(counts: Tensor) -> tuple[float, list[float | None]]:
    """mIoU over all pixels of a data set, and the IoU of each class up to the last that occurs.

    A class that neither occurs nor is predicted is None and does not count.

    Raises:
        UserError: if nothing was counted.
    """
    counts = counts.cpu().double()
    right = counts.diag()
    union = counts.sum(0) + counts.sum(1) - right
    each = [float(r / u) if u > 0 else None for r, u in zip(right, union, strict=True)]
    known = [value for value in each if value is not None]
    if not known:
        raise UserError("no pixel of the masks has a class: all are to be ignored")
    last = max(index for index, value in enumerate(each) if value is not None)
    return sum(known) / len(known), each[: last + 1]


class PatchBank(NamedTuple):
    """Labelled patches that vote."""

    features: Tensor  # (n, D), L2-normalised
    shares: Tensor  # (n, K) shares of the classes in each patch; rows sum to 1


def label_patches(items: Iterable[Patches], per_image: int) -> list[tuple[int, PatchBank]]:
    """The index and the bank of each image, on the host.

    A bank holds at most `per_image` labelled patches, drawn by the image's index.
    """
    banks = []
    for item in items:
        counts = class_shares(item.target.to(item.tokens.device), item.grid)
        known = counts.sum(dim=1).nonzero()[:, 0].cpu()
        order = torch.randperm(len(known), generator=torch.Generator().manual_seed(int(item.index)))
        chosen = known[order[:per_image]].to(item.tokens.device)
        if len(chosen):
            shares = F.normalize(counts[chosen], p=1.0, dim=1)
            bank = PatchBank(F.normalize(item.tokens[chosen], dim=1).cpu(), shares.cpu())
            banks.append((int(item.index), bank))
    return banks


def merge_banks(banks: Sequence[PatchBank]) -> PatchBank:
    """One bank of several, which may hold different numbers of classes.

    Raises:
        UserError: if there is none.
    """
    if not banks:
        raise UserError("no pixel of the training masks has a class")
    classes = max(bank.shares.shape[1] for bank in banks)
    shares = [F.pad(bank.shares, (0, classes - bank.shares.shape[1])) for bank in banks]
    return PatchBank(torch.cat([bank.features for bank in banks]), torch.cat(shares))


@torch.inference_mode()
def vote(
    tokens: Tensor, bank: PatchBank, k: int = 30, temperature: float = 0.07, chunk: int = 1024
) -> Tensor:
    """(N, K) class probabilities: shares of the k most similar patches, by softmax(cosine / T)."""
    votes = []
    for part in F.normalize(tokens, dim=1).split(chunk):
        similarity, nearest = (part @ bank.features.T).topk(min(k, len(bank.features)), dim=1)
        weights = (similarity / temperature).softmax(dim=1)
        votes.append(torch.einsum("nk,nkc->nc", weights, bank.shares[nearest]))
    return torch.cat(votes)


def patch_knn_segmentation(
    backbone: nn.Module,
    train: Dataset,
    val: Dataset,
    device: torch.device,
    *,
    k: int = 30,
    temperature: float = 0.07,
    bank: int = 16384,
    **options: Any,
) -> dict[str, Any]:
    """Segmentation without training (ours): each patch takes a vote of similar labelled patches.

    The votes are enlarged bilinearly and compared at the masks' full size. Ranks share the images
    and each gets the whole result.

    Args:
        train, val: items (image (C, H, W) normalised, mask (H', W') class numbers, index), such as
            `data.annotated.Annotated`.
        bank: labelled patches to keep in all, the same number of each image.
        options: of `extract_patches`.

    Returns:
        {"miou", "iou": [each class, None where it does not occur], "limit": mIoU of the truth
        pooled to the patch grid, "n_patches": of the bank}.

    Raises:
        UserError: if there is no labelled pixel.
    """
    items = extract_patches(backbone, train, device, **options)
    whole = merge_banks(in_order(label_patches(items, max(1, bank // len(train)))))
    whole = PatchBank(*(tensor.to(device) for tensor in whole))
    counts, limit = torch.zeros(2, CLASSES, CLASSES, dtype=torch.long, device=device)
    for item in extract_patches(backbone, val, device, **options):
        votes = vote(item.tokens, whole, k, temperature)
        prediction = upsample(votes.T.unflatten(1, item.grid), item.target.shape).argmax(dim=0)
        mask = item.target.to(device)
        counts += confusion(prediction, mask)
        limit += confusion(pooled_classes(mask, item.grid), mask)
    best, _ = mean_iou(distributed.all_reduce_sum(limit))
    miou, each = mean_iou(distributed.all_reduce_sum(counts))
    return {"miou": miou, "iou": each, "limit": best, "n_patches": len(whole.features)}


@torch.no_grad()
def patch_locality(features: Any, anchors: int = 64) -> float:
    """How cleanly patch similarity tells near from far, without labels: 0.5 is chance, 1 the best.

    For an anchor patch, the probability that one of its up to eight neighbours is more similar to
    it than a patch at least half the grid away: the area under the ROC curve, averaged over anchors
    and images. Similarity is the cosine after the image's mean token is subtracted, because a part
    that all tokens share carries no position.

    Ours. The measure uses ranks only, so neither the scale nor the spread of similarities counts.
    It falls when similarity maps get noisy, as dense features do in long training (DINOv3, arXiv
    2508.10104). Of twelve such measures it followed mIoU of patch k-NN best, over 41 trained,
    untrained and noised models on `scenes` (rank correlation 0.73). Features of positions alone
    score well too: compare models of one architecture and one run.

    Args:
        features: with `patches` (B, N, D) and `grid`, such as a backbone's output.
        anchors: at most so many patches an image, evenly spaced.

    Raises:
        UserError: if the longer side of the grid has fewer than 3 patches.
    """
    (h, w), tokens = features.grid, features.patches.float()
    if max(h, w) < 3:
        raise UserError(f"a grid of {h} x {w} patches has no far ones; take larger images")
    tokens = F.normalize(tokens - tokens.mean(dim=1, keepdim=True), dim=-1)
    rows, columns = torch.arange(h * w) // w, torch.arange(h * w) % w
    chosen = torch.linspace(0, h * w - 1, min(anchors, h * w)).round().long()
    down, right = (rows[chosen, None] - rows).abs(), (columns[chosen, None] - columns).abs()
    steps = torch.maximum(down, right)
    near, far = steps == 1, steps >= max(2, max(h, w) // 2)
    total = 0.0
    for image in tokens:
        similarity = (image[chosen.to(image.device)] @ image.T).cpu()
        anchored = zip(similarity, near, far, strict=True)
        total += sum(_wins(row[close], row[apart]) for row, close, apart in anchored)
    return total / (len(tokens) * len(chosen))


def _wins(higher: Tensor, lower: Tensor) -> float:
    """Share of pairs in which the first is larger; a tie is half."""
    difference = higher[:, None] - lower
    return float((difference > 0).float().mean() + 0.5 * (difference == 0).float().mean())


@torch.no_grad()
def mean_locality(
    backbone: nn.Module,
    data: Dataset,
    device: torch.device,
    images: int = 64,
    *,
    unreadable: dict[str, str] | None = None,
) -> float:
    """`patch_locality` over the first `images` of items that begin with a normalised image.

    What cannot be read is passed over, see `read_batches`.
    """
    values, errors = [], []
    for index in range(len(data)):
        item = Readable(data)[index]
        if isinstance(item, UnreadableImage):
            errors.append(item)
            continue
        values.append(patch_locality(backbone(item[0][None].to(device))))
        if len(values) == images:
            break
    note_unreadable(errors, {} if unreadable is None else unreadable, len(data))
    return sum(values) / len(values)
