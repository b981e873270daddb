"""What is measured and drawn of the teacher while it trains."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from evals.figures import draw_report
from evals.knn import knn_probe
from evals.linear import linear_probe
from evals.maps import prefix_attention
from evals.patches import mean_locality, patch_knn_segmentation


def probe_teacher(
    which: Any,
    backbone: nn.Module,
    train: Dataset,
    val: Dataset,
    masks: Sequence[Dataset] | None,
    device: torch.device,
) -> dict[str, float]:
    """Fields of metrics.jsonl, as the section `probe` of the configuration asks. All ranks together; the run's randomness is
    neither used nor moved.

    Args:
        train, val: items (image normalised, label, index).
        masks: the same images with masks, or None where there are none.
    """
    values = {}
    if which.knn:
        values["probe/knn"] = knn_probe(backbone, train, val, device)
    if which.linear:
        values["probe/linear"] = linear_probe(backbone, train, val, device)
    if which.patches:
        values["probe/locality"] = mean_locality(backbone, val, device)
        if masks:
            values["probe/miou"] = patch_knn_segmentation(backbone, *masks, device)["miou"]
    return values


@torch.inference_mode()
def report_teacher(
    title: str, backbone: nn.Module, images: Tensor, crops: Sequence, **statistics: Sequence[float]
) -> Callable[[Path], None]:
    """What draws report.png: PCA of the patches, attention where there is any, and what the crops of these images look like.

    Args:
        images: (n, C, H, W) normalised, with the `statistics` mean and std.
    """
    attention = prefix_attention(backbone, images)[0] if hasattr(backbone, "attention") else None
    return partial(
        draw_report,
        images=images,
        features=backbone(images),
        crops=crops,
        attention=attention,
        title=title,
        **statistics,
    )
