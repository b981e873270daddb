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
NEAR = 0.02  # of the spread of a 16 x 16 grey thumbnail, as in engine/health.py: re-encoded copies
COPIES = 0.1  # share of KoLeo's groups that hold two copies, or of images that have one (ours)
# Normalised values beyond these are far from the 0 and 1 that rates are made for: X-rays under
# ImageNet's statistics are, and values divided by 255 twice (facebookresearch/dinov2 issue 223).
MEAN_OFF, STD_RANGE = 1.5, (0.3, 3.0)


@dataclass
class Report:
    """Rows for people, numbers for programs, warnings for both."""

    rows: list[tuple[str, str]] = field(default_factory=list)
    numbers: dict = field(default_factory=dict)
    warnings: list[dict] = field(default_factory=list)

    def row(self, name: str, text: str, **numbers: object) -> None:
        self.rows.append((name, text))
        self.numbers |= numbers

    def warn(self, change: str, says: str, why: str, fails: bool = False) -> None:
        """`change`: the keys; `says`: the number; `why` it matters; `fails`: the run would fail."""
        self.warnings.append({"change": change, "says": says, "why": why, "fails": fails})


def check_data(report: Report, cfg: TrainConfig, images: ImageData, koleo: bool) -> None:
    """Sizes, channels, statistics, copies and unreadable images of a sample; labels of probes.

    Raises:
        UserError: if no image can be read.
    """
    for line in (line for line in images.passed_over if "match no image" in line):
        report.warn("data.train", line, "labels without an image are not used; do paths differ?")
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
        grey = image.float().mean(dim=0, keepdim=True)
        thumbnails.append(torch.nn.functional.adaptive_avg_pool2d(grey, 16).flatten())
        if time.monotonic() > deadline:
            break
    if not read:
        raise UserError(f"none of {len(bad)} images of {cfg.data.train} can be read: {bad[0]}")
    moments, sizes, scales, highest = zip(*read, strict=True)
    _unreadable(report, cfg, len(images), len(read) + len(bad), bad)
    _sizes(report, cfg, sizes)
    _channels(report, cfg, chosen[:32], max(scales), max(highest))
    _statistics(report, cfg, *torch.stack(moments).mean(0))
    _copies(report, cfg, torch.stack(thumbnails), koleo)
    if cfg.probe.every:
        _labels(report, cfg)


def _unreadable(report: Report, cfg: TrainConfig, count: int, looked: int, bad: list[str]) -> None:
    text = f"{count:,} ({looked:,} looked at, {len(bad)} unreadable)"
    report.row("images", text, images=count, looked_at=looked, unreadable=len(bad))
    if bad:
        limit = max(10, count // 100) if cfg.data.max_bad is None else cfg.data.max_bad
        expected = round(len(bad) / looked * count)
        says = f"{len(bad)} of {looked} images cannot be read, the first: {bad[0]}"
        why = f"a run stops above {limit} (data.max_bad), and about {expected} are to be expected"
        report.warn("data.max_bad, or repair the files", says, why, expected > limit)


def _sizes(report: Report, cfg: TrainConfig, sizes: tuple[tuple[int, int], ...]) -> None:
    short, (heights, widths) = median(map(min, sizes)), zip(*sizes, strict=True)
    ranges = f"{min(heights)} to {max(heights)} high, {min(widths)} to {max(widths)} wide"
    report.row("sizes", f"short side {short:g} (median); {ranges} pixels", short_side=short)
    for name in ("global_size", "local_size")[: 2 if cfg.crops.local_count else 1]:
        size, patch = size_pair(getattr(cfg.crops, name)), cfg.model.patch_size
        if max(size) > short:
            says = f"crops.{name} is {max(size)}, the short side of the images {short:g} pixels"
            why = "crops are enlarged, which costs time and memory and shows nothing new"
            report.warn(f"crops.{name}", says, why)
        if not cfg.model.arch.startswith("timm:") and any(side % patch for side in size):
            says = f"crops.{name} {max(size)} is no multiple of model.patch_size {patch}"
            fits = f"{max(size) // patch * patch} and {-(-max(size) // patch) * patch} fit"
            report.warn(f"crops.{name}", says, f"pixels at the border are lost; {fits}")


def _channels(
    report: Report, cfg: TrainConfig, chosen: list[int], scale: int, highest: float
) -> None:
    """Channels as stored, and the bits in use."""
    stored, as_stored = Counter(), open_data(cfg.data.train, None)
    for index in chosen:
        try:
            stored[as_stored.image(index).shape[0]] += 1
        except UnreadableImage:
            continue
    kinds = ", ".join(f"{count} images with {kind}" for kind, count in sorted(stored.items()))
    depth = {1: "floats", 255: "8 bits"}.get(scale, "16 bits")
    text = f"{kinds}; the model sees {cfg.data.channels}; {depth}, largest value {highest:g}"
    report.row("channels", text, channels=dict(stored), depth=depth, largest=highest)
    if max(stored, default=0) > cfg.data.channels > 1:
        says = f"images have {max(stored)} channels, data.channels is {cfg.data.channels}"
        report.warn("data.channels", says, "what the other channels show is dropped")
    if scale > 255 and highest < scale / 8:  # such as 12 bits in files of 16
        says = f"of 16 bits only values up to {highest:g} are used"
        window = f"data.train, with window={highest / 2:g},{highest:g}"
        report.warn(window, says, "images are nearly black; a window makes these values 0 to 1")


def _statistics(report: Report, cfg: TrainConfig, mean: Tensor, square: Tensor) -> None:
    """`mean` and mean `square`: (C,), of values in [0, 1]."""
    std = (square - mean.square()).clamp(min=0).sqrt()
    used = channel_statistics(cfg.data.channels, cfg.data.mean, cfg.data.std)
    used_mean, used_std = torch.tensor(used, dtype=mean.dtype)
    off, spread = (mean - used_mean) / used_std, std / used_std
    own = [",".join(f"{x:.3f}" for x in part.tolist()) for part in (mean, std)]
    few = ["/".join(f"{x:.2f}" for x in part.tolist()) for part in (off, spread)]
    text = f"mean {own[0]}, std {own[1]}; as the model sees them {few[0]} and {few[1]}"
    report.row("statistics", text, mean=mean.tolist(), std=std.tolist())
    if off.abs().max() > MEAN_OFF or spread.min() < STD_RANGE[0] or spread.max() > STD_RANGE[1]:
        says = f"after data.mean and data.std, images have mean {few[0]} and std {few[1]}"
        why = "a network expects about 0 and 1, and learns slowly or not at all far from them"
        report.warn(f"data.mean=[{own[0]}] data.std=[{own[1]}]", says, why)


def _copies(report: Report, cfg: TrainConfig, thumbnails: Tensor, koleo: bool) -> None:
    """Copies in the sample, and how often a KoLeo group meets two."""
    count, spread = len(thumbnails), thumbnails.std(dim=1)
    exact = count - len(torch.unique(thumbnails, dim=0))
    partners = torch.zeros(count)  # how many copies each image has
    for row in range(count):
        apart = (thumbnails - thumbnails[row]).abs().amax(dim=1)
        partners[row] = (apart <= NEAR * torch.maximum(spread, spread[row])).sum() - 1
    near = int((partners > 0).sum())
    text = f"{near} of {count} images have one, exact or nearly so; {exact} could be left out"
    report.row("copies", text, images_with_copies=near, exact_copies=exact)
    group = min(cfg.loss.koleo.group, cfg.batch_size)
    chance = float(partners.sum()) / max(count * (count - 1), 1)  # that two images are copies
    met = 1 - (1 - chance) ** (group * (group - 1) / 2)
    says = f"{near} of {count} images looked at have a copy among the others"
    if koleo and met > COPIES:
        why = f"{met:.0%} of KoLeo's groups of {group} hold two copies, which it cannot push apart"
        report.warn("data.train (curate.py dedup), or loss.koleo.weight=0", says, why)
    elif near > COPIES * count:
        why = "an epoch shows fewer different images than it seems, and some far more often"
        report.warn("data.train (curate.py dedup)", says, why)


def _labels(report: Report, cfg: TrainConfig) -> None:
    """Probes need labels, and classes in common."""
    try:
        train, val = open_labelled(cfg.probe.train, cfg.probe.val, cfg.data.channels)
    except (UserError, OSError) as error:
        why = "the probe cannot be measured, so the run does not start"
        report.warn("probe.train, probe.val, or probe.every=0", str(error), why, True)
        return
    text = f"{len(train):,} images to learn from, {len(val):,} to measure on"
    report.row("probe", text, probe_images=[len(train), len(val)])
    if val.left_out:
        says = f"{val.left_out} images of probe.val have no class that probe.train has"
        report.warn("probe.val", says, "they are left out of every probe")
