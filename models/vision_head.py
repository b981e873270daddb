"""What stands on a frozen backbone so that its vectors meet those of texts (dino.txt)."""

import torch
from torch import Tensor, nn

from models.features import Features
from models.layers import init_module
from models.text import block_options
from models.vit import Block


class VisionHead(nn.Module):
    """Transformer blocks on [CLS; registers; patches], then [CLS; mean of patches] (2412.16334).

    Without blocks, tokens are those of the backbone less their mean over the training images, over
    their spread (ours: on clip art, two images' CLS of DINOv2's ViT-S have a cosine of 0.56, most
    of it from that mean). A linear map of each token comes where the vectors of texts have another
    width. The first half of a vector is of CLS, the second of the patches.
    `config` holds the arguments.

    Args:
        width: D of the backbone's tokens.
        embed_dim: E of the vectors; 2 D needs no linear map.
        blocks, num_heads: 2 and those of the backbone in the paper.
        registers: R of the backbone; without blocks they have no part.
        drop_path: of the blocks; 0.3 in dino.txt.
    """

    def __init__(
        self,
        *,
        width: int,
        embed_dim: int,
        blocks: int = 0,
        num_heads: int = 1,
        registers: int = 0,
        drop_path: float = 0.3,
    ):
        super().__init__()
        self.config = dict(width=width, embed_dim=embed_dim, blocks=blocks, num_heads=num_heads)
        self.config |= dict(registers=registers, drop_path=drop_path)
        options = block_options(width, num_heads, ffn="swiglu64", layerscale=1e-5)
        self.blocks = nn.ModuleList(Block(options, drop_path) for _ in range(blocks))
        self.norm = nn.LayerNorm(width) if blocks else nn.Identity()
        self.projection = nn.Identity()
        if embed_dim != 2 * width:
            self.projection = nn.Linear(width, embed_dim // 2)
        self.skipped = 1 + registers if blocks else 1  # tokens before the patches
        if not blocks:
            self.register_buffer("mean", torch.zeros(2, width))  # of CLS, of patches
            self.register_buffer("rate", torch.ones(2))
        for module in self.modules():
            init_module(module)
        if embed_dim != 2 * width:
            nn.init.normal_(self.projection.weight, std=width**-0.5)

    def tokens_of(self, features: Features) -> Tensor:
        """(B, 1 + R + N, D) that `forward` takes, (B, 1 + N, D) without blocks."""
        registers = [features.registers] if len(self.blocks) else []
        return torch.cat([features.cls[:, None], *registers, features.patches], dim=1)

    @torch.no_grad()
    def standardise(self, tokens: Tensor) -> None:
        """Takes mean and spread from CLS and mean patch (n, 2, D) of the training images."""
        self.mean.copy_(tokens.mean(dim=0))
        self.rate.copy_(1 / (tokens - tokens.mean(dim=0)).std(dim=(0, 2)).clamp(min=1e-6))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 1 + R + N, D) -> vectors of images (B, E), of patches (B, N, E / 2); not normalised.

        Without blocks the mean of the patches (B, 1 + 1, D) does as well as all of them.
        """
        for block in self.blocks:
            tokens = block(tokens)
        if not len(self.blocks):
            parts = tokens.split([1, tokens.shape[1] - 1], dim=1)
            statistics = zip(parts, self.mean, self.rate, strict=True)
            tokens = torch.cat([(part - mean) * rate for part, mean, rate in statistics], dim=1)
        tokens = self.projection(self.norm(tokens))
        cls, patches = tokens[:, 0], tokens[:, self.skipped :]
        return torch.cat([cls, patches.mean(dim=1)], dim=-1), patches
