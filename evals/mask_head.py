"""The mask head: segmentation by queries on a frozen backbone (the plain mask decoder, PMT).

Queries pass through a few transformer blocks beside the patches; each then names a class and a mask
(PMT, tue-mps/pmt; EoMT, arXiv 2503.19108). Before each block a query attends only to the patches of
its mask so far, at first always, later less and less; at inference never.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import UserError
from evals.mask_loss import mask_loss
from models.layers import Attention, LayerScale, Mlp
from models.positions import RotaryPositions, Rotation


class Lateral(nn.Module):
    """x + MLP(x) of a normed map, times one factor a channel: (B, D, h, w) -> (B, N, D)."""

    def __init__(self, dim: int, width: int):
        super().__init__()
        self.norm = nn.BatchNorm2d(dim)
        self.project = nn.Identity() if dim == width else nn.Linear(dim, width)
        self.mlp, self.scale = Mlp(width, width // 2), LayerScale(width, 1.0)

    def forward(self, maps: Tensor) -> Tensor:
        x = self.project(self.norm(maps).flatten(2).mT)
        return self.scale(x + self.mlp(x))


class QueryBlock(nn.Module):
    """A transformer block whose queries may be kept from some patches."""

    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.mlp = Attention(width, heads), Mlp(width, hidden)
        self.ls1, self.ls2 = LayerScale(width, 1e-1), LayerScale(width, 1e-1)

    def forward(self, x: Tensor, rotation: Rotation, allowed: Tensor | None) -> Tensor:
        """x: (B, Q + N, D); allowed: (B, Q + N, Q + N) bool, None allows all."""
        q, k, v = self.attn.split_heads(self.attn.qkv(self.norm1(x)), rotation)
        mask = None if allowed is None else allowed[:, None]
        read = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.ls1(self.attn.proj(read.transpose(1, 2).flatten(2)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class Upscale(nn.Module):
    """(B, D, h, w) at twice its size: transposed convolution, GELU, depthwise convolution, norm."""

    def __init__(self, width: int):
        super().__init__()
        self.larger = nn.ConvTranspose2d(width, width, 2, 2)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.norm = nn.GroupNorm(1, width)

    def forward(self, maps: Tensor) -> Tensor:
        return F.gelu(self.norm(self.depthwise(F.gelu(self.larger(maps)))))


class MaskHead(nn.Module):
    """Class probabilities of pixels from the maps of a frozen backbone's blocks.

    Args:
        dims: channels of each map.
        classes: K, besides "no object".
        queries: Q; more than the classes that one image holds. None: one for each class, which then
            needs no matching and learns in fewer steps.
        depth, width: of the decoder's blocks; width is a multiple of 64.
        points: pixels of a mask that enter the loss; Mask2Former takes 12,544.
    """

    def __init__(
        self,
        dims: Sequence[int],
        patch_size: int,
        *,
        classes: int,
        queries: int | None = None,
        depth: int = 3,
        width: int = 256,
        points: int = 2048,
    ):
        super().__init__()
        self.classes, self.points, self.by_class = classes, points, queries is None
        queries = classes if queries is None else queries
        if queries < classes:
            raise UserError(f"--queries is {queries}, and the masks have {classes} classes")
        self.laterals = nn.ModuleList(Lateral(dim, width) for dim in dims)
        self.queries = nn.Parameter(torch.randn(queries, width))
        self.positions = RotaryPositions(64)
        self.blocks = nn.ModuleList(QueryBlock(width, width // 64, 1024) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        doublings = max(1, round(math.log2(patch_size)) - 2)
        self.upscale = nn.Sequential(*(Upscale(width) for _ in range(doublings)))
        self.name_class = nn.Linear(width, classes + 1)
        layers = [nn.Linear(width, width), nn.GELU(), nn.Linear(width, width), nn.GELU()]
        self.name_mask = nn.Sequential(*layers, nn.Linear(width, width))
        # 1 at first, 0 for the last tenth: how often a block's attention is masked.
        self.register_buffer("done", torch.zeros(()))

    def set_progress(self, done: float) -> None:
        """The share of the training that is done; masks of attention fade one block after another.

        Polynomial of power 0.9, each block in its own part of the training.
        """
        self.done.fill_(done)

    def masked_share(self, block: int) -> float:
        begin, span = 0.9 * block / len(self.blocks), 0.9 / len(self.blocks)
        return (1 - min(1.0, max(0.0, (self.done.item() - begin) / span))) ** 0.9

    def forward(self, maps: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Class scores (B, Q, K + 1) and mask scores (B, Q, h', w') before and after each block."""
        grid = tuple(maps[0].shape[-2:])
        x = sum(lateral(part) for lateral, part in zip(self.laterals, maps, strict=True))
        count = len(self.queries)
        x = torch.cat([self.queries.expand(len(x), -1, -1).to(x.dtype), x], dim=1)
        rotation = tuple(part.to(x.device) for part in self.positions(grid, unrotated=count))
        results = []
        for number, block in enumerate(self.blocks):
            share = self.masked_share(number) if self.training else 0.0
            allowed = None
            if self.training:
                results.append(self._read(x, grid))
            if share > 0:
                allowed = self._allowed(results[-1][1], grid, share)
            x = block(x, rotation, allowed)
        return [*results, self._read(x, grid)]

    def _read(self, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        queries, patches = self.norm(x).split((len(self.queries), grid[0] * grid[1]), dim=1)
        maps = self.upscale(patches.mT.unflatten(2, grid))
        masks = torch.einsum("bqd,bdhw->bqhw", self.name_mask(queries), maps)
        return self.name_class(queries).float(), masks.float()

    def _allowed(self, masks: Tensor, grid: tuple[int, int], share: float) -> Tensor:
        """Queries see patches of their masks; one with an empty mask sees all, as patches do."""
        masks = F.interpolate(masks.detach(), grid, mode="bilinear", align_corners=False)
        inside = masks.flatten(2) > 0
        drawn = torch.rand(inside.shape[:2], device=inside.device) < share
        inside = inside | (~inside.any(dim=2, keepdim=True)) | ~drawn[..., None]
        count, tokens = len(self.queries), inside.shape[1] + inside.shape[2]
        allowed = inside.new_ones(len(inside), tokens, tokens)
        allowed[:, :count, count:] = inside
        return allowed

    def predict(self, maps: Sequence[Tensor], cls: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """(B, K, H, W) at `size`: the queries' masks, weighted by their class probabilities."""
        classes, masks = self(maps)[-1]
        masks = F.interpolate(masks, tuple(size), mode="bilinear", align_corners=False)
        named = classes.softmax(dim=-1)[..., :-1]
        return torch.einsum("bqk,bqhw->bkhw", named, masks.sigmoid())

    def loss(
        self,
        maps: Sequence[Tensor],
        cls: Sequence[Tensor],
        targets: Sequence[Tensor],
        size: Sequence[int],
    ) -> Tensor:
        """The targets are masks (H, W) of class numbers; negative ones and 255 do not count."""
        options = {"points": self.points, "by_class": self.by_class}
        return sum(mask_loss(*scores, targets, **options) for scores in self(maps))
