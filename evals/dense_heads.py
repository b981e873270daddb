"""Training and measuring the heads of evals/heads.py that are not linear, for eval_dense.py."""

import argparse
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from engine import distributed
from errors import UserError
from evals.canopy import CanopyErrors
from evals.dense import FrozenPatches, Recipe, largest_class
from evals.depth import depth_errors, depth_range, depth_summary, is_depth, mean_errors
from evals.detection import mean_average_precision, scaled
from evals.heads import (
    ChosenBlocks,
    HeadSettings,
    LinearMaps,
    TrainedHead,
    fingerprint,
    save_head,
    train_head,
)
from evals.patches import CLASSES, confusion, extract_patches, mean_iou
from evals.photographs import read_photographs
from evals.predictions import draw_predictions
from evals.reading import in_order

# Rates and lengths are ours, for the small heads and short runs here.
MASK = Recipe((5e-4,), 0.05, (0.9, 0.999), 0.05, 1e-2, 0.0, 32, 40_000, clip=1.0, batch_size=8)
DPT = Recipe((1e-3,), 1e-2, (0.9, 0.999), 0.05, 1e-2, 0.0, 25, 38_400, clip=1.0, batch_size=8)
BOXES = Recipe((1e-3,), 1e-2, (0.9, 0.999), 0.1, 1e-2, 0.0, 25, 40_000, clip=1.0, batch_size=8)
RECIPES = {
    ("segmentation", "mask"): MASK,
    ("depth", "dpt"): DPT,
    ("detection", "fcos"): BOXES,
    ("detection", "linear"): BOXES,
}
MAPS = {"segmentation": 4, "depth": 4, "detection": 1}  # that these heads take
CACHE = 4 * 2**30  # bytes of maps that are kept
PICTURES = 4  # of --val that --output shows


def fit(
    backbone: nn.Module,
    train: Dataset,
    flags: argparse.Namespace,
    device: torch.device,
    summary: Callable[[Any], Any],
    options_of: Callable[[Sequence[Any]], dict[str, Any]],
    **loading: Any,
) -> tuple[TrainedHead, int]:
    """The trained head of --head, and its steps.

    Args:
        train: items (image, target, index).
        summary: of a target; `options_of` makes the head's options of all of them.
    """
    blocks, maps = flags.layers, MAPS[flags.task]
    if blocks is None and maps == 1 and hasattr(backbone, "intermediate"):
        blocks = [len(backbone.blocks) - 1]
    windowed = ChosenBlocks(backbone, blocks)
    limit = CACHE if flags.cache == "auto" else 0
    patches = FrozenPatches(windowed, train, device, summary, limit=limit, **loading)
    recipe = RECIPES[flags.task, flags.head]
    if flags.lr:
        recipe = Recipe(**{**vars(recipe), "lrs": tuple(flags.lr)})
    steps = flags.steps or recipe.steps(len(patches.indices))
    settings = head_settings(backbone, windowed, patches.dim, flags, maps)
    settings.options = options_of(patches.summaries)
    for name in ("width", "queries"):
        if getattr(flags, name, None) is not None:
            settings.options[name] = getattr(flags, name)
    settings.training |= {"steps": steps, "lr": recipe.lrs[0]}
    trained = TrainedHead(backbone, settings.build(flags.seed).to(device), settings)
    options = {"folder": flags.output, "minutes": flags.minutes or math.inf, "seed": flags.seed}
    train_head(trained, patches, recipe, steps=steps, **options)
    draw_kept(trained, flags)
    return trained, steps


def head_settings(
    backbone: nn.Module, windowed: ChosenBlocks, dim: int, flags: argparse.Namespace, maps: int
) -> HeadSettings:
    """Of the flags of eval_dense.py, without the head's own options; `dim` is ΣD."""
    count = len(windowed.blocks)
    return HeadSettings(
        flags.task,
        flags.head,
        flags.model,
        {},
        [dim // count] * count,
        max(count, maps),
        list(windowed.blocks),
        backbone.patch_size,
        list(flags.size or [min(backbone.preprocessing.size)]),
        fingerprint(backbone),
        {"train": flags.train, "seed": flags.seed},
    )


def keep_linear(
    backbone: nn.Module, flags: argparse.Namespace, head: nn.Module, options: dict[str, Any]
) -> TrainedHead:
    """The best linear head, kept in --output."""
    last = flags.layers
    windowed = ChosenBlocks(backbone, range(len(backbone.blocks))[-last:] if last > 1 else None)
    windowed.blocks = windowed.blocks[-last:]
    dim = head.linear.in_features
    settings = head_settings(backbone, windowed, dim, flags, len(windowed.blocks))
    settings.options = options
    maps = LinearMaps(settings.dims, backbone.patch_size, **options)
    maps.head = head
    trained = TrainedHead(backbone, maps, settings)
    if distributed.is_main():
        save_head(flags.output, trained)
    draw_kept(trained, flags)
    return trained


def draw_kept(trained: TrainedHead, flags: argparse.Namespace) -> None:
    """predictions.png in --output: what the head says of the first images of --val."""
    if flags.output is None or not distributed.is_main():
        return
    size = min(trained.settings.size)
    photographs = read_photographs([flags.val], PICTURES, trained.backbone, size)
    draw_predictions(flags.output / "predictions.png", photographs, trained)


def mask_options(summaries: Sequence[int]) -> dict[str, Any]:
    classes = max(summaries) + 1
    if classes < 1:
        raise UserError("no pixel of the training masks has a class")
    return {"classes": classes}


def mask_head_segmentation(
    backbone: nn.Module,
    train: Dataset,
    val: Dataset,
    flags: argparse.Namespace,
    device: torch.device,
    **loading: Any,
) -> tuple[dict[str, Any], TrainedHead]:
    """mIoU of a mask head, measured at the masks' full size.

    Args:
        train, val: items (image, mask, index); 255 is left out.
        flags: of eval_dense.py.
    """
    trained, steps = fit(backbone, train, flags, device, largest_class, mask_options, **loading)
    counts = torch.zeros(CLASSES, CLASSES, dtype=torch.long, device=device)
    for _, mask, scores in predictions(trained, val, device, **loading):
        counts += confusion(scores.argmax(dim=0), mask)
    counts = distributed.all_reduce_sum(counts)
    miou, each = mean_iou(counts)
    accuracy = float(counts.diag().sum() / counts.sum())
    result = {"miou": miou, "pixel_accuracy": accuracy, "iou": each, "steps": steps}
    return result, trained


def dpt_depth(
    backbone: nn.Module,
    train: Dataset,
    val: Dataset,
    flags: argparse.Namespace,
    device: torch.device,
    **loading: Any,
) -> tuple[dict[str, Any], TrainedHead]:
    """The errors of a DPT head, see `depth_errors`, measured at the full size of the depth maps.

    Args:
        train, val: items (image, depth (H', W') in metres, index); 0 is left out.
        flags: of eval_dense.py.
    """

    def options_of(summaries: Sequence) -> dict[str, Any]:
        low, high, _ = depth_range(summaries, flags.span)
        return {"low": low, "high": high, "bins": flags.bins}

    trained, steps = fit(backbone, train, flags, device, depth_summary, options_of, **loading)
    found, sums = [], CanopyErrors()
    for index, depth, guess in predictions(trained, val, device, **loading):
        if is_depth(depth).any():
            sums.add(guess[0], depth)
            found.append((index, depth_errors(guess[0], depth, flags.align)))
    span = [trained.settings.options[name] for name in ("low", "high")]
    canopy = {"canopy": sums.result()} if flags.canopy else {}
    return mean_errors(in_order(found)) | canopy | {"span": span, "steps": steps}, trained


def detect(
    backbone: nn.Module,
    train: Dataset,
    val: Dataset,
    flags: argparse.Namespace,
    device: torch.device,
    **loading: Any,
) -> tuple[dict[str, Any], TrainedHead]:
    """mAP of boxes by a head of `DetectionHead`, measured in pixels of the stored image.

    Args:
        train, val: items (image, {"boxes" (m, 4), "box_labels" (m,), "shape" (2,)}, index).
        flags: of eval_dense.py.
    """

    def options_of(summaries: Sequence[int]) -> dict[str, Any]:
        if max(summaries) < 0:
            raise UserError("no image of --train has a box")
        return {"classes": max(summaries) + 1, "linear": flags.head == "linear"}

    trained, steps = fit(backbone, train, flags, device, largest_label, options_of, **loading)
    found = [
        (index, ({name: value.cpu() for name, value in boxes.items()}, scaled(notes, size)))
        for index, notes, boxes in predictions(trained, val, device, **loading)
        for size in [notes["shape"].tolist()]
    ]
    found = in_order(found)
    scores = mean_average_precision([guess for guess, _ in found], [truth for _, truth in found])
    boxes = sum(len(truth["boxes"]) for _, truth in found)
    return scores | {"boxes": boxes, "steps": steps}, trained


def largest_label(notes: dict[str, Tensor]) -> int:
    labels = notes["box_labels"]
    return int(labels.max()) if len(labels) else -1


@torch.inference_mode()
def predictions(trained: TrainedHead, data: Dataset, device: torch.device, **loading: Any) -> Any:
    """Index, target and prediction at the target's full size of this rank's images.

    Predictions are (K, H, W) or a dictionary of boxes.
    """
    for item in extract_patches(trained.windowed, data, device, **loading):
        target = item.target
        if isinstance(target, Tensor):
            target = target.to(device)
        size = target["shape"].tolist() if isinstance(target, dict) else target.shape
        maps, cls = trained.read(item.tokens[None], item.grid)
        yield item.index, target, trained.head.predict(maps, cls, size)[0]
