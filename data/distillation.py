"""A batch that several networks look at, each in its own way, with what the teacher said of it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from data.augment import channel_statistics
from data.loader import MASKS, Batch
from data.masking import draw_masks
from engine import distributed

Statistics = tuple[Sequence[float], Sequence[float]]  # mean and std, one value a channel
Size = tuple[int, int]


class CropAdapter:
    """How one network sees the crops that were cut for all: resized, and with its own mean and std.

    Args:
        cut, own: sizes of the global and of the local crops, in pixels; as cut and as this one sees them. Crops of
            other sizes, in another stage of the run, are resized in the same proportion.
        given, wanted: statistics with which the crops are normalised, and with which they should be.
    """

    def __init__(
        self,
        cut: Sequence[Size],
        own: Sequence[Size],
        given: Statistics,
        wanted: Statistics,
        device: torch.device | str = "cpu",
    ):
        self.ratios = [tuple(new / old for new, old in zip(*pair)) for pair in zip(own, cut)]
        self.same = tuple(map(tuple, given)) == tuple(map(tuple, wanted))
        # x' = (x · std + mean - mean') / std', channel by channel
        pairs = (torch.tensor(pair, device=device)[..., None, None] for pair in (given, wanted))
        (mean, std), (own_mean, own_std) = pairs
        self.scale, self.shift = std / own_std, (mean - own_mean) / own_std

    def size(self, cut: Sequence[int], local: bool = False) -> Size:
        """(height, width) in pixels of what was cut at that size."""
        return tuple(max(1, round(side * ratio)) for side, ratio in zip(cut, self.ratios[local]))

    def __call__(self, crops: Tensor | None, local: bool = False) -> Tensor | None:
        """(n, C, H, W) normalised -> (n, C, h, w) normalised; None of None. Where nothing differs, `crops` itself."""
        if crops is None:
            return None
        size = self.size(crops.shape[-2:], local)
        if size != tuple(crops.shape[-2:]):
            crops = F.interpolate(crops, size, mode="bicubic", antialias=True)
        return crops if self.same else crops * self.scale + self.shift


def crop_adapter(
    cut, own, channels: int, device: torch.device | str = "cpu", **sizes
) -> CropAdapter:
    """How a network sees what is cut for all.

    Args:
        cut: the configuration of the run, with the sections `crops` and `data`.
        own: an object with `mean` and `std`, None for ImageNet's.
        sizes: `global_size` or `local_size` in pixels, where this network sees others than are cut.
    """
    old = {name: getattr(cut.crops, name) for name in ("global_size", "local_size")}
    new = old | {name: size for name, size in sizes.items() if size is not None}
    pixels = ([_pair(size) for size in each.values()] for each in (old, new))
    given, wanted = (channel_statistics(channels, data.mean, data.std) for data in (cut.data, own))
    return CropAdapter(*pixels, given, wanted, device)


def _pair(size: int | Sequence[int]) -> Size:
    return (size, size) if isinstance(size, int) else tuple(size)


def rank_share(batch_size: int) -> range:
    """This rank's places in a batch."""
    share = batch_size // distributed.world_size()
    return range(distributed.rank() * share, (distributed.rank() + 1) * share)


@dataclass
class DistillationBatch(Batch):
    """A `Batch` with what the teacher said of its global crops; split and moved like the rest of it."""

    teacher_cls: Tensor  # (G·b, E)
    teacher_patches: Tensor  # (G·b, N, E')
    grid: Size  # (h, w) of the teacher's patches


def with_masks(
    batch: Batch, grid: Size, ibot, key: tuple[int, int], places: Iterable[int], batch_size: int
) -> Batch:
    """`batch` with the masks that `StepDataset` would have drawn on that grid.

    Args:
        ibot: an object with `mask_probability` and `mask_ratio`.
        key: seed and step.
        places: of the batch's images within the whole of `batch_size`.
    """
    views = len(batch.global_crops) // len(batch.images)
    rows = [view * batch_size + place for view in range(views) for place in places]
    seed, step = key
    masks = draw_masks(
        views * batch_size, grid, ibot.mask_probability, ibot.mask_ratio, (seed, MASKS, step), rows
    )
    return replace(batch, masks=masks.to(batch.global_crops.device, non_blocking=True))


def exchanged(batch: DistillationBatch, wanted: Sequence[range]) -> DistillationBatch:
    """The images that this rank wants of the whole batch, of which each rank loaded a part: in order, alike in size.

    All ranks call it; an image travels as often as ranks want it, and no rank ever holds the whole.

    Args:
        wanted: places in the whole batch, of each rank.
    """
    share, rank = len(batch.images), distributed.rank()
    loaded = [range(owner * share, (owner + 1) * share) for owner in range(len(wanted))]
    sent = [_overlap(loaded[rank], places) for places in wanted]
    received = [len(_overlap(places, wanted[rank])) for places in loaded]

    def exchange(tensor: Tensor) -> Tensor:
        images = tensor.unflatten(0, (-1, share)).transpose(0, 1)  # (b, views, ...)
        parts = [
            images[part.start - loaded[rank].start : part.stop - loaded[rank].start]
            for part in sent
        ]
        return (
            distributed.exchange_rows(torch.cat(parts), list(map(len, sent)), received)
            .transpose(0, 1)
            .flatten(0, 1)
        )

    tensors = {field.name: getattr(batch, field.name) for field in fields(batch)}
    tensors = {
        name: exchange(value) for name, value in tensors.items() if isinstance(value, Tensor)
    }
    images = exchange(torch.tensor(batch.images, device=batch.global_crops.device)).tolist()
    return replace(batch, **tensors, images=images)


def _overlap(first: range, second: range) -> range:
    start = max(first.start, second.start)
    return range(start, max(start, min(first.stop, second.stop)))
