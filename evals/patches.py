"""Patch tokens of a frozen backbone, and two quick measures of them: k-NN segmentation and locality."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from engine import distributed
from errors import UserError

IGNORE = 255  # in masks of bytes: counts neither for nor against
CLASSES = 256  # that masks may hold, in all; no rank knows beforehand which occur


class Patches(NamedTuple):
    """What the backbone makes of one image, and what is known of it."""

    tokens: Tensor  # (N, D) float32, row by row
    grid: tuple[int, int]  # (h, w), h · w = N
    target: Any  # whatever the data gives beside the image
    index: int  # of the image in the data


@torch.inference_mode()
def extract_patches(
    backbone: nn.Module,
    data: Dataset,
    device: torch.device,
    *,
    batch_size: int = 64,
    workers: int = 0,
    progress: Callable[[Iterable], Iterator] = iter,
) -> Iterator[Patches]:
    """Patch tokens image by image, in the data's order; images of different sizes are welcome.

    Args:
        data: items (image (C, H, W) normalised, target, index).
    """
    # A generator of its own: the loader would take its seed from torch's global random state.
    generator = torch.Generator().manual_seed(0)
    loader = DataLoader(
        data, batch_size=batch_size, num_workers=workers, collate_fn=list, generator=generator
    )
    for items in progress(loader):
        found = tokens_of(backbone, [image.to(device) for image, _, _ in items])
        for (tokens, grid), (_, target, index) in zip(found, items):
            yield Patches(tokens, grid, target, index)


@torch.inference_mode()
def tokens_of(
    backbone: nn.Module, images: Sequence[Tensor]
) -> list[tuple[Tensor, tuple[int, int]]]:
    """(N, D) float32 and the grid of each image (C, H, W); those of one shape share a forward pass."""
    results: list = [None] * len(images)
    for shape in dict.fromkeys(image.shape for image in images):
        chosen = [k for k, image in enumerate(images) if image.shape == shape]
        features = backbone(torch.stack([images[k] for k in chosen]))
        for k, tokens in zip(chosen, features.patches.float()):
            results[k] = tokens, tuple(features.grid)
    return results


class LastLayers(nn.Module):
    """A backbone whose patches are those of its last `count` blocks, each through the final norm, side by side in D.

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
    """A backbone that sees an image through overlapping windows; where they overlap, patches are averaged.

    Under a linear head that is the sliding inference of segmentation papers, for the mean of scores is the score of the
    mean.

    Args:
        window: side in pixels; the published 512 goes with a stride of 341, so the stride is two thirds.

    Raises:
        UserError: if the window is smaller than a patch.
    """

    def __init__(self, backbone: nn.Module, window: int):
        super().__init__()
        p = backbone.patch_size
        if window < p:
            raise UserError(f"a window of {window} pixels is smaller than a patch of {p}")
        self.backbone, self.patch_size = backbone, p
        self.window, self.stride = window // p * p, max(1, round(window * 2 / 3 / p)) * p

    def forward(self, images: Tensor) -> Any:
        p, (height, width) = self.patch_size, images.shape[-2:]
        grid, total = (height // p, width // p), None
        count = images.new_zeros(1, 1, *grid)
        for top in self._starts(grid[0] * p):
            for left in self._starts(grid[1] * p):
                features = self.backbone(
                    images[..., top : top + self.window, left : left + self.window]
                )
                maps = features.patches.float().mT.unflatten(2, features.grid)
                if total is None:
                    total = maps.new_zeros(*maps.shape[:2], *grid)
                place = (
                    ...,
                    slice(top // p, top // p + maps.shape[2]),
                    slice(left // p, left // p + maps.shape[3]),
                )
                total[place] += maps
                count[place] += 1
        return replace(features, patches=(total / count).flatten(2).mT, grid=grid)

    def _starts(self, side: int) -> list[int]:
        last = max(0, side - self.window)
        return [*range(0, last, self.stride), last]


def class_shares(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """How many pixels of each class lie in each patch: (H, W) class numbers -> (N, K) counts.

    K is the largest class in the mask plus one; pixels of IGNORE and below 0 are not counted. A pixel belongs to the
    patch that its centre lies in.
    """
    rows, columns = (_cells(side, count, mask.device) for side, count in zip(mask.shape, grid))
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
    """(H, W): what the true class shares of each patch say when they are enlarged like a prediction."""
    return upsample(class_shares(mask, grid).T.unflatten(1, grid), mask.shape).argmax(dim=0)


def confusion(prediction: Tensor, mask: Tensor) -> Tensor:
    """(CLASSES, CLASSES) pixel counts, rows what is there, columns what was said; IGNORE and below 0 left out.

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
    """mIoU over all pixels of a data set at once, and the IoU of each class up to the last that occurs.

    A class that is neither there nor said is None and does not count.

    Raises:
        UserError: if nothing was counted.
    """
    counts = counts.cpu().double()
    right = counts.diag()
    union = counts.sum(0) + counts.sum(1) - right
    each = [float(r / u) if u > 0 else None for r, u in zip(right, union)]
    known = [value for value in each if value is not None]
    if not known:
        raise UserError("no pixel of the masks has a class: all are to be ignored")
    last = max(index for index, value in enumerate(each) if value is not None)
    return sum(known) / len(known), each[: last + 1]


class PatchBank(NamedTuple):
    """Labelled patches that vote."""

    features: Tensor  # (n, D), L2-normalised
    shares: Tensor  # (n, K) shares of the classes in each patch; rows sum to 1


def label_patches(items: Iterable[Patches], per_image: int) -> list[PatchBank]:
    """One bank an image: at most `per_image` patches with a class, drawn by the image's index alone."""
    banks = []
    for item in items:
        counts = class_shares(item.target.to(item.tokens.device), item.grid)
        known = counts.sum(dim=1).nonzero()[:, 0].cpu()
        order = torch.randperm(len(known), generator=torch.Generator().manual_seed(int(item.index)))
        chosen = known[order[:per_image]].to(item.tokens.device)
        if len(chosen):
            banks.append(
                PatchBank(
                    F.normalize(item.tokens[chosen], dim=1),
                    F.normalize(counts[chosen], p=1.0, dim=1),
                )
            )
    return banks


def merge_banks(banks: Sequence[PatchBank]) -> PatchBank:
    """One bank of several, which may know of different numbers of classes.

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
    """(N, K) class probabilities: the k most similar patches give their shares, weighted by softmax(cosine / T)."""
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
    batch_size: int = 64,
    workers: int = 0,
    progress: Callable[[Iterable], Iterator] = iter,
) -> dict[str, Any]:
    """Segmentation without training: each patch asks the most similar labelled patches (ours, after k-NN on CLS).

    The votes are enlarged bilinearly and compared at the masks' full size. Ranks share the images and each gets the
    whole result, whatever their number; the caller's random state is neither used nor moved.

    Args:
        train, val: items (image (C, H, W) normalised, mask (H', W') class numbers, index), such as
            `data.annotated.Annotated`.
        bank: labelled patches to keep in all, the same number of each image.

    Returns:
        {"miou", "iou": [each class, None where it does not occur], "limit": mIoU of the truth pooled to the patch grid,
        "n_patches": of the bank}.

    Raises:
        UserError: if there is no labelled pixel.
    """
    options = {"batch_size": batch_size, "workers": workers, "progress": progress}
    rank, world = distributed.rank(), distributed.world_size()
    part = Subset(train, range(rank, len(train), world))
    mine = label_patches(
        extract_patches(backbone, part, device, **options), max(1, bank // len(train))
    )
    mine = [PatchBank(*(tensor.cpu() for tensor in one)) for one in mine]
    whole = merge_banks(sum(distributed.gather_objects(mine), []))
    whole = PatchBank(*(tensor.to(device) for tensor in whole))
    counts, limit = torch.zeros(2, CLASSES, CLASSES, dtype=torch.long, device=device)
    for item in extract_patches(
        backbone, Subset(val, range(rank, len(val), world)), device, **options
    ):
        votes = vote(item.tokens, whole, k, temperature)
        prediction = upsample(votes.T.unflatten(1, item.grid), item.target.shape).argmax(dim=0)
        mask = item.target.to(device)
        counts += confusion(prediction, mask)
        limit += confusion(pooled_classes(mask, item.grid), mask)
    best, _ = mean_iou(distributed.all_reduce_sum(limit))
    miou, each = mean_iou(distributed.all_reduce_sum(counts))
    return {"miou": miou, "iou": each, "limit": best, "n_patches": len(whole.features)}


@torch.inference_mode()
def patch_locality(features: Any, anchors: int = 64) -> float:
    """How cleanly patch similarity tells near from far, without labels: 0.5 is chance, 1 the best.

    For an anchor patch, the probability that one of its up to eight neighbours is more similar to it than a patch at
    least half the grid away: the area under the ROC curve, averaged over anchors and images. Similarity is the cosine
    after the image's mean token is taken away, for a part that all tokens share says nothing about where things are.

    Ours. It goes by ranks, so neither the scale nor the spread of similarities counts, and it falls when similarity
    maps get noisy, which is how dense features degrade in long training (DINOv3, arXiv 2508.10104). Of twelve such
    measures it followed mIoU of patch k-NN best, over 41 trained, untrained and noised models on `scenes` (rank
    correlation 0.73). It cannot tell features of positions alone from good ones: compare models of one architecture and
    one run.

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
    steps = torch.maximum(
        (rows[chosen, None] - rows).abs(), (columns[chosen, None] - columns).abs()
    )
    near, far = steps == 1, steps >= max(2, max(h, w) // 2)
    total = 0.0
    for image in tokens:
        similarity = (image[chosen.to(image.device)] @ image.T).cpu()
        total += sum(
            _wins(row[close], row[apart]) for row, close, apart in zip(similarity, near, far)
        )
    return total / (len(tokens) * len(chosen))


def _wins(higher: Tensor, lower: Tensor) -> float:
    """Share of pairs in which the first is larger; a tie is half."""
    difference = higher[:, None] - lower
    return float((difference > 0).float().mean() + 0.5 * (difference == 0).float().mean())


def mean_locality(
    backbone: nn.Module, data: Dataset, device: torch.device, images: int = 64
) -> float:
    """`patch_locality` over the first `images` of the data: items begin with a normalised image, of any size."""
    values = []
    with torch.inference_mode():
        for index in range(min(images, len(data))):
            values.append(patch_locality(backbone(data[index][0][None].to(device))))
    return sum(values) / len(values)
