"""Backbones that know the truth, or nothing: the bounds of every dense probe."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.annotated import Annotated
from data.images import ImageData
from data.scenes.scenes import Scenes
from models.features import Features, Preprocessing

PATCH = 8


class Painted(ImageData):
    """Scenes whose pictures are their own annotation, so that an oracle can read it off."""

    def __init__(self, kind: str, split: str = "val", size: int = 30, frames: int = 1):
        self.kind, self.scenes = kind, Scenes(split, size, frames=frames)
        self.labels, self.classes = self.scenes.labels, self.scenes.classes

    def __len__(self) -> int:
        return len(self.scenes)

    def image(self, index: int) -> Tensor:
        return paint(self.annotations(index)[self.kind])

    def name(self, index: int) -> str:
        return self.scenes.name(index)

    def annotations(self, index: int) -> dict:
        return self.scenes.annotations(index)

    def clip(self, index: int) -> tuple[Tensor, np.ndarray]:
        _, instances = self.scenes.clip(index)
        return torch.stack([paint(one) for one in instances]), instances


def paint(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.astype(np.float32)).expand(3, -1, -1)


def painted(kind: str, split: str, size: int = 30, target=None) -> Annotated:
    """Pictures of `kind` with their annotation, read once."""
    return Listed(
        Annotated(Painted(kind, split, size), target or kind, 64, PATCH, (0.0,) * 3, (1.0,) * 3)
    )


class Listed(list):
    """Items of a data set in memory, for what is drawn several times."""

    flip = False


class Oracle(nn.Module):
    """Patch features are `maps` (H, W) -> (K, H, W) of the painted truth, pooled to the grid; with
    None noise of its own.
    """

    in_channels, patch_size, embed_dim = 3, PATCH, 16
    preprocessing = Preprocessing((64, 64), 64, (0.0,) * 3, (1.0,) * 3)

    def __init__(self, maps: Callable[[Tensor], Tensor] | None):
        super().__init__()
        self.maps, self.generator = maps, torch.Generator().manual_seed(0)

    def forward(self, images: Tensor) -> Features:
        grid = images.shape[-2] // PATCH, images.shape[-1] // PATCH
        if self.maps is None:
            patches = torch.randn(
                len(images), grid[0] * grid[1], self.embed_dim, generator=self.generator
            )
        else:
            maps = torch.stack([self.maps(image[0]) for image in images])
            patches = F.adaptive_avg_pool2d(maps, grid).flatten(2).mT
        return Features(patches.mean(dim=1), patches[:, :0], patches, grid)


def class_maps(mask: Tensor) -> Tensor:
    return F.one_hot(mask.long(), 11).permute(2, 0, 1).float()


def depth_maps(depth: Tensor) -> Tensor:
    """Pooled depth as weights of the two nearest of 64 marks: linear in it, and no function of it
    is out of a head's reach.
    """
    depth = F.avg_pool2d(depth.log()[None], PATCH).exp()
    marks = torch.linspace(0.5, 14, 64)[:, None, None]
    return (1 - (depth - marks).abs() / (marks[1] - marks[0])).clamp(min=0)
