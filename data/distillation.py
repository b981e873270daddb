"""Batches for distillation: one set of crops for several networks, and the teacher's output."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from data.loader import Batch, step_masks
from data.masking import MaskSpec
from engine import distributed

Statistics = tuple[Sequence[float], Sequence[float]]  # mean and std, one value a channel
Size = tuple[int, int]


class CropAdapter:
    """Fits the crops that were cut for all to one network: its size, its mean and std.

    Args:
        cut, own: sizes in pixels of the global and of the local crops, as cut and as this network
            takes them. Crops of other sizes (in another stage) are resized in the same proportion.
        given, wanted: statistics with which crops are normalised, and with which they should be.
    """

    def __init__(
        self,
        cut: Sequence[Size],
        own: Sequence[Size],
        given: Statistics,
        wanted: Statistics,
        device: torch.device | str = "cpu",
    ):
        self.ratios = [
            (new[0] / old[0], new[1] / old[1]) for new, old in zip(own, cut, strict=True)
        ]
        self.same = tuple(map(tuple, given)) == tuple(map(tuple, wanted))
        # x' = (x · std + mean - mean') / std', channel by channel
        pairs = (torch.tensor(pair, device=device)[..., None, None] for pair in (given, wanted))
        (mean, std), (own_mean, own_std) = pairs
        self.scale, self.shift = std / own_std, (mean - own_mean) / own_std

    def size(self, cut: Sequence[int], local: bool = False) -> Size:
        """(height, width) in pixels of what was cut at that size."""
        down, across = self.ratios[local]
        return max(1, round(cut[0] * down)), max(1, round(cut[1] * across))

    def __call__(self, crops: Tensor | None, local: bool = False) -> Tensor | None:
        """(n, C, H, W) normalised -> (n, C, h, w) normalised; None of None.

        Where nothing differs, it returns `crops` itself.
        """
        if crops is None:
            return None
        size = self.size(crops.shape[-2:], local)
        if size != tuple(crops.shape[-2:]):
            crops = F.interpolate(crops, size, mode="bicubic", antialias=True)
        return crops if self.same else crops * self.scale + self.shift


def rank_share(batch_size: int) -> range:
    """This rank's places in a batch."""
    share = batch_size // distributed.world_size()
    return range(distributed.rank() * share, (distributed.rank() + 1) * share)


@dataclass
class DistillationBatch(Batch):
    """A `Batch` with the teacher's output of its global crops, split and moved with it."""

    teacher_cls: Tensor  # (G·b, E)
    teacher_patches: Tensor  # (G·b, N, E')
    grid: Size  # (h, w) of the teacher's patches


def with_masks(
    batch: Batch, spec: MaskSpec, seed: int, step: int, places: Sequence[int], batch_size: int
) -> Batch:
    """`batch` with the masks that `StepDataset` would have drawn.

    Args:
        places: of the batch's images within the global batch of `batch_size`.
    """
    views = len(batch.global_crops) // len(batch.images)
    masks = step_masks(spec, views, batch_size, places, seed, step)
    on_device = masks.to(batch.global_crops.device, non_blocking=True)
    return replace(batch, masks=on_device, hidden=masks.sum(1).tolist())


def exchanged(batch: DistillationBatch, wanted: Sequence[range]) -> DistillationBatch:
    """The images that this rank wants of the global batch, of which each rank loaded a part.

    They come in order and are alike in size. All ranks call it. An image is sent once for every
    rank that wants it, and no rank holds the whole batch.

    Args:
        wanted: places in the global batch, of each rank.
    """
    share, rank = len(batch.images), distributed.rank()
    loaded = [range(owner * share, (owner + 1) * share) for owner in range(len(wanted))]
    sent = [_overlap(loaded[rank], places) for places in wanted]
    received = [len(_overlap(places, wanted[rank])) for places in loaded]

    def exchange(tensor: Tensor) -> Tensor:
        images = tensor.unflatten(0, (-1, share)).transpose(0, 1)  # (b, views, ...)
        first = loaded[rank].start
        parts = [images[part.start - first : part.stop - first] for part in sent]
        counts = [len(part) for part in sent]
        images = distributed.exchange_rows(torch.cat(parts), counts, received)
        return images.transpose(0, 1).flatten(0, 1)

    exchanged = batch.map(exchange)
    images = exchange(torch.tensor(batch.images, device=batch.global_crops.device)).tolist()
    return replace(exchanged, images=images)


def _overlap(first: range, second: range) -> range:
    start = max(first.start, second.start)
    return range(start, max(start, min(first.stop, second.stop)))
