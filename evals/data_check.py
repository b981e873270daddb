"""What a sample of the training images says before a run (`train.py --check`)."""

import time
from collections import Counter
from dataclasses import dataclass, field
from statistics import median

import numpy as np
import torch
from torch import Tensor

from data.images import ImageData
from data.pixels import channel_statistics, full_scale, to_unit
from data.sources.specs import UnreadableImage, open_data, open_labelled
from engine.config import TrainConfig
from engine.validation import size_pair
from errors import UserError

SAMPLE, SECONDS = 2000, 15.0  # images looked at, at most so long
THUMBNAIL = 16  # pixels; copies are looked for among thumbnails of 16 x 16, grey
# As the warning before the first step (engine/health.py): a re-encoded copy stays within it.
NEAR = 0.02  # of the spread of a thumbnail
# Beyond these the normalised values are far from the 0 and 1 that weights and rates are made for.
# X-rays under ImageNet's statistics, or values divided by 255 twice, are beyond them.
MEAN_OFF, STD_RANGE = 1.5, (0.3, 3.0)
COPIES = 0.1  # share of KoLeo groups with two copies of an image (ours)


@dataclass
class Report:
    """Rows for people, numbers for programs, and warnings for both."""

    rows: list[tuple[str, str]] = field(default_factory=list)
    numbers: dict = field(default_factory=dict)
    warnings: list[dict] = field(default_factory=list)

    def row(self, name: str, text: str, **numbers: object) -> None:
        self.rows.append((name, text))
        self.numbers |= numbers

    def warn(self, keys: str, says: str, why: str, fails: bool = False) -> None:
        """
        Args:
            keys: the keys to change.
            says: the number that is wrong.
            why: it matters, in one sentence.
            fails: whether the run would fail.
        """
        self.warnings.append({"change": keys, "says": says, "why": why, "fails": fails})


def check_data(report: Report, cfg: TrainConfig, images: ImageData, koleo: bool) -> None:
    """Sizes, channels, statistics, copies and unreadable images of a sample; labels of probes."""
    for line in images.passed_over:
        if "match no image" in line:
            why = "rows that match no image are passed over, often because paths differ"
            report.warn("data.train", line, why)
    chosen = np.random.default_rng(0).permutation(len(images))[:SAMPLE].tolist()
    read, bad, thumbnails, deadline = [], [], [], time.monotonic() + SECONDS
    for index in chosen:
        try:
            image = images.image(index)
        except UnreadableImage as error:
            bad.append(str(error))
            continue
        values = to_unit(image).flatten(1).double()
        moments = torch.stack([values.mean(1), values.square().mean(1)])
        read.append((moments, tuple(image.shape[-2:]), full_scale(image), image.amax().item()))
        thumbnails.append(_thumbnail(image))
        if time.monotonic() > deadline:
            break
    if not read:
        raise UserError(f"none of {len(bad)} images of {cfg.data.train} can be read: {bad[0]}")
    _unreadable(report, cfg, len(images), len(read) + len(bad), bad)
    _sizes(report, cfg, [size for _, size, _, _ in read])
    _depth(report, cfg, images, chosen, read)
    _statistics(report, cfg, torch.stack([moments for moments, _, _, _ in read]))
    _copies(report, cfg, torch.stack(thumbnails), koleo)
    _labels(report, cfg)


def _thumbnail(image: Tensor) -> Tensor:
    grey = image.float().mean(dim=0, keepdim=True)
    return torch.nn.functional.adaptive_avg_pool2d(grey, THUMBNAIL).flatten()


def _unreadable(report: Report, cfg: TrainConfig, count: int, looked: int, bad: list) -> None:
    text = f"{count:,} ({looked:,} looked at, {len(bad)} unreadable)"
    report.row("images", text, images=count, looked_at=looked, unreadable=len(bad))
    if not bad:
        return
    limit = max(10, count // 100) if cfg.data.max_bad is None else cfg.data.max_bad
    expected = round(len(bad) / looked * count)
    says = f"{len(bad)} of {looked} images cannot be read, the first: {bad[0]}"
    why = f"a run stops above data.max_bad, here {limit}; about {expected} are to be expected"
    report.warn("data.max_bad, or repair the files of data.train", says, why, expected > limit)


def _sizes(report: Report, cfg: TrainConfig, sizes: list[tuple[int, int]]) -> None:
    short = median(min(size) for size in sizes)
    heights, widths = zip(*sizes, strict=True)
    ranges = f"{min(heights)} to {max(heights)} high, {min(widths)} to {max(widths)} wide"
    report.row("sizes", f"short side {short:g} (median); {ranges} pixels", short_side=short)
    crops, patch = cfg.crops, cfg.model.patch_size
    kinds = {"global_size": crops.global_size}
    kinds |= {"local_size": crops.local_size} if crops.local_count else {}
    for name, size in kinds.items():
        if max(size_pair(size)) > short:
            says = f"crops.{name} is {size}, the short side of the images only {short:g} pixels"
            why = "crops are enlarged, which costs time and memory and shows nothing new"
            report.warn(f"crops.{name}", says, why)
        if not cfg.model.arch.startswith("timm:") and any(s % patch for s in size_pair(size)):
            below = [side // patch * patch for side in size_pair(size)]
            says = f"crops.{name} {size} is no multiple of model.patch_size {patch}"
            report.warn(f"crops.{name}", says, f"pixels at the border are lost; {below} fits")


def _depth(
    report: Report, cfg: TrainConfig, images: ImageData, chosen: list[int], read: list
) -> None:
    """Channels as stored and bits that are used."""
    stored = Counter()
    as_stored = open_data(cfg.data.train, None)
    for index in chosen[:32]:
        try:
            stored[as_stored.image(index).shape[0]] += 1
        except (UnreadableImage, ValueError):
            continue
    scale = max(full for _, _, full, _ in read)
    highest = max(value for _, _, _, value in read)
    bits = {1: "floats", 255: "8 bits"}.get(scale, "16 bits")
    kinds = ", ".join(f"{count} with {channels}" for channels, count in sorted(stored.items()))
    report.row("channels", f"{kinds}; the model sees {cfg.data.channels}", channels=dict(stored))
    report.row("depth", f"{bits}, largest value {highest:g}", largest=highest)
    if stored and max(stored) > cfg.data.channels and cfg.data.channels != 1:
        says = f"images have {max(stored)} channels, data.channels is {cfg.data.channels}"
        report.warn("data.channels", says, "what the other channels show is dropped")
    if scale > 255 and highest < scale / 8:
        says = f"of 16 bits only values up to {highest:g} are used"
        why = "images are nearly black; a window makes the values in use 0 to 1"
        report.warn(f"data.train, with window={highest / 2:g},{highest:g}", says, why)


def _statistics(report: Report, cfg: TrainConfig, moments: Tensor) -> None:
    """
    Args:
        moments: (n, 2, C) mean and mean square of each image, in [0, 1].
    """
    mean, square = moments.mean(0)
    std = (square - mean.square()).clamp(min=0).sqrt()
    used = channel_statistics(cfg.data.channels, cfg.data.mean, cfg.data.std)
    used_mean, used_std = torch.tensor(used, dtype=mean.dtype)
    off, spread = (mean - used_mean) / used_std, std / used_std
    own = [[round(x, 3) for x in part.tolist()] for part in (mean, std)]
    text = f"mean {own[0]}, std {own[1]}; normalised {_few(off)} and {_few(spread)}"
    report.row("statistics", text, mean=own[0], std=own[1])
    if off.abs().max() > MEAN_OFF or spread.min() < STD_RANGE[0] or spread.max() > STD_RANGE[1]:
        says = f"after data.mean and data.std, images have mean {_few(off)} and std {_few(spread)}"
        why = "the network expects about 0 and 1, and learns slowly or not at all far from them"
        report.warn(f"data.mean={own[0]} data.std={own[1]}".replace(", ", ","), says, why)


def _few(values: Tensor) -> str:
    return " ".join(f"{value:.2f}" for value in values.tolist())


def _copies(report: Report, cfg: TrainConfig, thumbnails: Tensor, koleo: bool) -> None:
    """Copies in the sample, and how often a KoLeo group meets two."""
    count = len(thumbnails)
    _, sizes = torch.unique(thumbnails, dim=0, return_counts=True)
    exact = count - len(sizes)
    spread, pairs, near = thumbnails.std(dim=1), 0, 0
    for row in range(count - 1):
        apart = (thumbnails[row + 1 :] - thumbnails[row]).abs().amax(dim=1)
        same = int((apart <= NEAR * torch.maximum(spread[row + 1 :], spread[row])).sum())
        pairs, near = pairs + same, near + (same > 0)
    text = f"{exact} exact, {near} with near ones (of {count})"
    report.row("copies", text, exact_copies=exact, near_copies=near)
    group = min(cfg.loss.koleo.group, cfg.batch_size)
    chance = pairs / max(count * (count - 1) / 2, 1)  # that two images are copies
    met = 1 - (1 - min(chance, 1.0)) ** (group * (group - 1) / 2)
    says = f"{near} of {count} images looked at have a copy among the others ({exact} exact)"
    if koleo and met > COPIES:
        why = f"{met:.0%} of KoLeo's groups of {group} hold two copies, which it pushes apart"
        report.warn("data.train (curate.py dedup), or loss.koleo.weight=0", says, why)
    elif near > COPIES * count:
        why = "an epoch shows fewer different images than it has, and copies have no other target"
        report.warn("data.train (curate.py dedup)", says, why)


def _labels(report: Report, cfg: TrainConfig) -> None:
    """Probes need labels, and classes in common."""
    if not cfg.probe.every:
        return
    try:
        train, val = open_labelled(cfg.probe.train, cfg.probe.val, cfg.data.channels)
    except (UserError, OSError) as error:
        why = "the probe cannot be measured, so the run would not start"
        report.warn("probe.train, probe.val, or probe.every=0", str(error), why, True)
        return
    text = f"{len(train):,} images to learn from, {len(val):,} to measure on"
    report.row("probe", text, probe_images=[len(train), len(val)])
    if val.left_out:
        says = f"{val.left_out} images of probe.val have no class that probe.train has"
        report.warn("probe.val", says, "they are left out of every probe")
