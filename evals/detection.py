"""Boxes from a frozen backbone's last map: torchvision's FCOS on a simple feature pyramid.

FCOS, Tian et al., arXiv 1904.01355; the pyramid is ViTDet's, Li et al., arXiv 2203.16527.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.fcos import FCOS, FCOSHead

from errors import UserError

CONVOLUTIONS = 2  # before the scores of a level; FCOS has 4
# For mAP: faint boxes count too.
SCORE, OVERLAP, BOXES = 0.05, 0.6, 100


class Pyramid(nn.Module):
    """A map (B, D, h, w) -> maps (B, width, ·, ·) of twice, once and half its sides.

    ViTDet has one of four times too; twice is FCOS's finest, 8 pixels of patches of 16.

    Attributes:
        out_channels: width, which FCOS asks for.
    """

    def __init__(self, dim: int, width: int):
        super().__init__()
        self.out_channels = width
        self.norm = nn.BatchNorm2d(dim)
        self.reduce = nn.Conv2d(dim, width, 1)
        double = nn.ConvTranspose2d(width, width, 2, 2)
        halve = nn.MaxPool2d(2, ceil_mode=True)
        self.scales = nn.ModuleList([double, nn.Identity(), halve])
        self.smooth = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(8, width))
            for _ in self.scales
        )

    def forward(self, maps: Tensor) -> list[Tensor]:
        maps = self.reduce(self.norm(maps))
        levels = zip(self.scales, self.smooth, strict=True)
        return [smooth(scale(maps)) for scale, smooth in levels]


class OneLevel(nn.Module):
    """The map itself, each channel at mean 0 and variance 1."""

    def __init__(self, dim: int):
        super().__init__()
        self.out_channels, self.norm = dim, nn.BatchNorm2d(dim)

    def forward(self, maps: Tensor) -> list[Tensor]:
        return [self.norm(maps)]


class DetectionHead(nn.Module):
    """A head of evals/heads.py for boxes, x0, y0, x1, y1 in pixels; it takes the last map.

    Its targets are annotations with `boxes`, `box_labels` and `shape`, of which `scaled` makes what
    FCOS takes.

    Args:
        linear: no pyramid and no hidden layers: scores and distances to the four sides are linear
            in the 3 x 3 patches around a place.
    """

    def __init__(
        self,
        dims: Sequence[int],
        patch_size: int,
        *,
        classes: int,
        linear: bool = False,
        width: int = 64,
    ):
        super().__init__()
        backbone = OneLevel(dims[-1]) if linear else Pyramid(dims[-1], width)
        self.fcos = FCOS(
            backbone,
            classes,
            head=FCOSHead(
                backbone.out_channels, 1, classes, num_convs=0 if linear else CONVOLUTIONS
            ),
            score_thresh=SCORE,
            nms_thresh=OVERLAP,
            detections_per_img=BOXES,
        )

    def outputs(
        self, maps: Sequence[Tensor], size: Sequence[int]
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        """FCOS's scores and distances at all places, and the places of each level."""
        levels = self.fcos.backbone(maps[-1])
        return self.fcos.head(levels), [places(level, size) for level in levels]

    def loss(
        self,
        maps: Sequence[Tensor],
        cls: Sequence[Tensor],
        targets: Sequence[dict[str, Tensor]],
        size: Sequence[int],
    ) -> Tensor:
        """FCOS's: focal loss of the classes, GIoU of the boxes, centredness."""
        found, levels = self.outputs(maps, size)
        counts = [len(level) for level in levels]
        anchors = [torch.cat(levels)] * len(targets)
        truth = [scaled(notes, size) for notes in targets]
        return sum(self.fcos.compute_loss(truth, found, anchors, counts).values())

    def predict(
        self, maps: Sequence[Tensor], cls: Sequence[Tensor], size: Sequence[int]
    ) -> list[dict[str, Tensor]]:
        """`boxes` in pixels of `size`, `labels` and `scores` of each image, the best first."""
        found, levels = self.outputs(maps, size)
        counts = [len(level) for level in levels]
        parts = {name: list(values.split(counts, dim=1)) for name, values in found.items()}
        images = len(maps[-1])
        sizes = [tuple(size)] * images
        return self.fcos.postprocess_detections(parts, [levels] * images, sizes)


def places(level: Tensor, size: Sequence[int]) -> Tensor:
    """(h·w, 4): at each place of a map (B, D, h, w) a box one stride wide, as FCOS's anchors.

    torchvision's own generator rounds the stride to whole pixels, which 14 / 4 is not.
    """
    steps = [side / count for side, count in zip(size, level.shape[-2:], strict=True)]
    rows, columns = (
        (torch.arange(count, device=level.device) + 0.5) * step
        for count, step in zip(level.shape[-2:], steps, strict=True)
    )
    y, x = (part.flatten() for part in torch.meshgrid(rows, columns, indexing="ij"))
    half_y, half_x = steps[0] / 2, steps[1] / 2
    return torch.stack([x - half_x, y - half_y, x + half_x, y + half_y], dim=1)


def scaled(notes: dict[str, Tensor], size: Sequence[int]) -> dict[str, Tensor]:
    """Annotations of an image -> `boxes` in pixels of `size` (H, W) and `labels`."""
    height, width = notes["shape"].tolist()
    factor = torch.tensor([size[1] / width, size[0] / height] * 2)
    boxes = notes["boxes"].reshape(-1, 4) * factor.to(notes["boxes"])
    return {"boxes": boxes, "labels": notes["box_labels"].long()}


def mean_average_precision(
    found: Sequence[dict[str, Tensor]], truth: Sequence[dict[str, Tensor]]
) -> dict[str, Any]:
    """COCO's mAP over overlaps of 0.5 to 0.95, `ap50` and `ap75`, by torchmetrics.

    Raises:
        UserError: if torchmetrics or pycocotools is not installed.
    """
    try:
        from torchmetrics.detection import MeanAveragePrecision

        metric = MeanAveragePrecision()
    except (ImportError, ModuleNotFoundError) as error:
        raise UserError(
            "mAP needs two more packages: pip install torchmetrics pycocotools"
        ) from error
    metric.update(list(found), list(truth))
    values = metric.compute()
    return {name: float(values[key]) for name, key in METRICS.items()}


METRICS = {"map": "map", "ap50": "map_50", "ap75": "map_75"}
