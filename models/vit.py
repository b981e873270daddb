"""Vision transformer of DINO, iBOT, DINOv2 and DINOv3, and the table of its sizes.

Read top-down: sizes, block, model; attention and the feed-forward nets are in layers.py.
The four methods differ in arguments of the model only.
"""

import inspect
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import UserError
from models import layers
from models.checks import check_images, check_masks, check_vit_options
from models.features import Features
from models.positions import RotaryPositions, Rotation, Rotations, resize_positions

Embedded = tuple[Tensor, tuple[int, int]]  # tokens (B, 1 + R + N, D), grid of the patches (h, w)

# Sizes of DINO (tiny), DINOv2 (giant) and DINOv3 (the others); vit_nano is ours, for CPUs.
# A gated net of ratio 6 is as wide as an MLP of ratio 4.
PRESETS = {
    "vit_nano": dict(embed_dim=128, depth=6, num_heads=4),
    "vit_tiny": dict(embed_dim=192, depth=12, num_heads=3),
    "vit_small": dict(embed_dim=384, depth=12, num_heads=6),
    "vit_small_plus": dict(embed_dim=384, depth=12, num_heads=6, ffn="swiglu", ffn_ratio=6.0),
    "vit_base": dict(embed_dim=768, depth=12, num_heads=12),
    "vit_large": dict(embed_dim=1024, depth=24, num_heads=16),
    "vit_large_plus": dict(embed_dim=1024, depth=24, num_heads=16, ffn="swiglu", ffn_ratio=6.0),
    "vit_so400m": dict(embed_dim=1152, depth=27, num_heads=18, ffn_ratio=3.777777778),
    "vit_huge_plus": dict(embed_dim=1280, depth=32, num_heads=20, ffn="swiglu", ffn_ratio=6.0),
    "vit_giant": dict(embed_dim=1536, depth=40, num_heads=24, ffn="swiglu"),
    "vit_7b": dict(embed_dim=4096, depth=40, num_heads=32, ffn="swiglu64", ffn_ratio=3.0),
}


class Block(nn.Module):
    """x + LayerScale(attention(norm(x))), then the same with the feed-forward net."""

    def __init__(self, options: dict, drop_path: float):
        """`options` of `VisionTransformer`; `drop_path` is this block's own rate."""
        super().__init__()
        dim, eps, scale = options["embed_dim"], options["norm_eps"], options["layerscale"]
        biases = {name: options[name] for name in ("qkv_bias", "mask_k_bias", "proj_bias")}
        self.norm1 = nn.LayerNorm(dim, eps)
        causal = options.get("causal", False)  # of text
        self.attn = layers.Attention(dim, options["num_heads"], **biases, causal=causal)
        self.ls1 = nn.Identity() if scale is None else layers.LayerScale(dim, scale)
        self.norm2 = nn.LayerNorm(dim, eps)
        self.mlp = layers.make_ffn(options["ffn"], dim, options["ffn_ratio"], options["ffn_bias"])
        self.ls2 = nn.Identity() if scale is None else layers.LayerScale(dim, scale)
        self.drop_path = layers.DropPath(drop_path)

    def forward(
        self, x: Tensor, rotation: Rotations = None, shapes: layers.Shapes | None = None
    ) -> Tensor:
        """(B, T, D) -> (B, T, D); `rotation` turns queries and keys (rotary positions).

        With `shapes`, images of several sizes are packed into x (ΣB·T, D), and there is one
        rotation for each size. Then all but attention runs once over all tokens.
        """

        def attend(kept, kept_shapes):  # annotations here would break torch.compile
            return self.ls1(self.attn(self.norm1(kept), rotation, kept_shapes))

        def feed_forward(kept, _):
            return self.ls2(self.mlp(self.norm2(kept)))

        x = self.drop_path(x, attend, shapes)
        return self.drop_path(x, feed_forward, shapes)


class VisionTransformer(nn.Module):
    """Patches, CLS and registers through a stack of blocks, with learned or rotary positions.

    `config` holds the arguments, so `VisionTransformer(**model.config)` is the same architecture.

    Args:
        embed_dim, depth, num_heads: D, blocks, and heads of D / num_heads dimensions.
        ffn: "mlp", or gated: "swiglu", "swiglu32", "swiglu64", "swiglu128" (width rounded up to a
            multiple of 8, 32, 64, 128).
        ffn_ratio: hidden width over D of the MLP; gated nets take 2/3 of it.
        patch_size: p in pixels.
        image_size: side, or (height, width), for which learned positions are made; every model
            takes any size.
        positions: "learned" (DINO, DINOv2) or "rope" (DINOv3).
        interpolation: of learned positions at other sizes, all bicubic: by the scale factor
            (target + 0.1) / native ("offset": DINO, DINOv2), to the exact size ("size"), or to that
            with "antialias" (DINOv2 with registers).
        registers: R extra tokens without position (4 in DINOv3 and in DINOv2 with registers).
        mask_token: whether patches can be hidden.
        mask_k_bias: holds the bias of the keys at 0 (DINOv3).
        layerscale: initial factor of the residual branches, None for no LayerScale.
        drop_path: rate of stochastic depth in [0, 1).
        drop_path_shape: "uniform", or "linear" from 0 in the first block to the rate in the last.
        untie_cls_norm: a separate final norm for CLS and registers.
        untie_local_cls_norm: the same for those of local crops in training (DINOv3 7B).
        rope_base, rope_normalize, rope_shift, rope_jitter, rope_rescale: see `RotaryPositions`.
        fit: where p does not divide a side, "crop" the rest or "pad" with zeros, right and bottom.

    Raises:
        UserError: for an argument out of range, with what is allowed.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        depth: int,
        num_heads: int,
        ffn: str = "mlp",
        ffn_ratio: float = 4.0,
        patch_size: int = 16,
        in_channels: int = 3,
        image_size: int | Sequence[int] = 224,
        positions: str = "learned",
        interpolation: str = "offset",
        registers: int = 0,
        mask_token: bool = True,
        qkv_bias: bool = True,
        mask_k_bias: bool = False,
        proj_bias: bool = True,
        ffn_bias: bool = True,
        layerscale: float | None = None,
        drop_path: float = 0.0,
        drop_path_shape: str = "uniform",
        norm_eps: float = 1e-6,
        untie_cls_norm: bool = False,
        untie_local_cls_norm: bool = False,
        rope_base: float = 100.0,
        rope_normalize: str = "separate",
        rope_shift: float | None = None,
        rope_jitter: float | None = None,
        rope_rescale: float | None = None,
        fit: str = "crop",
    ):
        arguments = dict(locals())
        super().__init__()
        self.config = {name: arguments[name] for name in _option_names()}
        square = isinstance(image_size, int)
        self.config["image_size"] = [image_size] * 2 if square else list(image_size)
        check_vit_options(self.config)
        self.embed_dim = embed_dim
        self.depth = depth
        self.num_heads = num_heads
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.num_registers = registers
        self.native_grid = self._grid(*self.config["image_size"])
        self._add_tokens(self.config)
        rates = [drop_path] * depth
        if drop_path_shape == "linear":
            rates = [drop_path * index / max(depth - 1, 1) for index in range(depth)]
        self.blocks = nn.ModuleList(Block(self.config, rate) for rate in rates)
        self.norm = nn.LayerNorm(embed_dim, norm_eps)
        self.cls_norm = nn.LayerNorm(embed_dim, norm_eps) if untie_cls_norm else None
        self.local_cls_norm = nn.LayerNorm(embed_dim, norm_eps) if untie_local_cls_norm else None
        self.init_weights()

    def _add_tokens(self, options: dict) -> None:
        """Patch embedding, CLS, registers, mask token and positions."""
        dim, patch_size = self.embed_dim, self.patch_size
        self.patch_embed = nn.Conv2d(self.in_channels, dim, patch_size, stride=patch_size)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.register_tokens = self.mask_token = self.pos_embed = self.rope = None
        if self.num_registers:
            self.register_tokens = nn.Parameter(torch.empty(1, self.num_registers, dim))
        if options["mask_token"]:
            self.mask_token = nn.Parameter(torch.empty(1, dim))
        if options["positions"] == "learned":
            count = self.native_grid[0] * self.native_grid[1]
            self.pos_embed = nn.Parameter(torch.empty(1, 1 + count, dim))
        else:
            names = ("base", "normalize", "shift", "jitter", "rescale")
            rope = {name: options[f"rope_{name}"] for name in names}
            self.rope = RotaryPositions(dim // self.num_heads, **rope)

    def init_weights(self) -> None:
        """Draws every parameter and sets every buffer anew.

        Also valid after `to_empty()`, for a model that was built on the meta device.
        """
        for module in self.modules():
            layers.init_module(module)
        nn.init.normal_(self.cls_token, std=0.02)
        if self.register_tokens is not None:
            nn.init.normal_(self.register_tokens, std=0.02)
        if self.mask_token is not None:
            nn.init.zeros_(self.mask_token)
        if self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(
        self,
        images: Tensor,
        masks: Tensor | None = None,
        local: bool = False,
        local_crops: Tensor | None = None,
    ) -> Features | list[Features]:
        """Features of images; with `local_crops`, of both in one pass.

        Args:
            images: (B, C, H, W) normalised floats, any size of at least one patch.
            masks: (B, N) bool, True = the mask token replaces the patch before positions are added.
            local: whether these are local crops, whose CLS may have a separate norm in training.
            local_crops: (B', C, h, w) normalised floats.

        Raises:
            UserError: if the images or the masks have another shape, or there is no mask token.
        """
        x, grid = self._embed(images, masks)  # (B, 1 + R + N, D)
        if local_crops is not None:
            return self._forward_packed((x, grid), self._embed(local_crops))
        for block, rotation in zip(self.blocks, self._rotations(grid), strict=True):
            x = block(x, rotation)
        return self._finish(x, grid, local)

    def _forward_packed(self, images: Embedded, local_crops: Embedded) -> list[Features]:
        """Features of both; all tokens run through the blocks as one (ΣB·T, D)."""
        tokens, grids = zip(images, local_crops, strict=True)
        shapes = [x.shape[:2] for x in tokens]
        rotations = zip(*map(self._rotations, grids), strict=True)
        packed = torch.cat([x.flatten(0, 1) for x in tokens])
        for block, pair in zip(self.blocks, rotations, strict=True):
            packed = block(packed, pair, shapes)
        x, local = layers.unpack(packed, shapes)
        return [self._finish(x, grids[0]), self._finish(local, grids[1], local=True)]

    def intermediate(self, images: Tensor, layers: int | Sequence[int]) -> list[Features]:
        """Features of the last `layers` blocks or of those with these indices, each normed.

        Raises:
            UserError: if there are no such blocks.
        """
        if isinstance(layers, int):
            layers = range(-layers, 0)
        wanted = [self._index(layer) for layer in layers]
        if not wanted:
            raise UserError("no block is asked for; give how many of the last ones, or indices")
        x, grid = self._embed(images)
        found = {}
        blocks = self.blocks[: max(wanted) + 1]
        for index, (block, rotation) in enumerate(zip(blocks, self._rotations(grid), strict=False)):
            x = block(x, rotation)
            if index in wanted:
                found[index] = self._finish(x, grid)
        return [found[index] for index in wanted]

    def attention(self, images: Tensor, layer: int = -1) -> Tensor:
        """softmax(q kᵀ / √d) (B, heads, T, T) of one block; rows sum to 1.

        The T = 1 + R + N tokens are CLS, registers, patches. Computed on demand: `forward` never
        holds this matrix.

        Raises:
            UserError: if there is no such block.
        """
        layer = self._index(layer)
        x, grid = self._embed(images)
        rotations = iter(self._rotations(grid))
        for block in self.blocks[:layer]:
            x = block(x, next(rotations))
        block = self.blocks[layer]
        return block.attn.weights(block.norm1(x), next(rotations))

    def _embed(self, images: Tensor, masks: Tensor | None = None) -> Embedded:
        """Tokens (B, 1 + R + N, D) in the order CLS, registers, patches, and the patches' grid."""
        smallest = 1 if self.config["fit"] == "pad" else self.patch_size
        check_images(images, self.in_channels, smallest)
        grid = self._grid(*images.shape[-2:])
        bottom = grid[0] * self.patch_size - images.shape[-2]
        right = grid[1] * self.patch_size - images.shape[-1]
        if bottom > 0 or right > 0:  # "pad"; with "crop" the convolution leaves the remainder out
            images = F.pad(images, (0, right, 0, bottom))
        patches = layers.embed_patches(self.patch_embed, images)  # (B, N, D)
        cls = self.cls_token
        if masks is not None:
            check_masks(masks, patches, self.mask_token)
            patches = torch.where(masks[..., None], self.mask_token.to(patches.dtype), patches)
        if self.pos_embed is not None:
            how = self.config["interpolation"]
            positions = resize_positions(
                self.pos_embed, self.native_grid, grid, how
            )  # (1, 1 + N, D)
            cls, patches = cls + positions[:, :1], patches + positions[:, 1:]
        prefix = [cls] if self.register_tokens is None else [cls, self.register_tokens]
        batch = patches.shape[0]  # len() would fix the batch size on export
        prefix = [token.expand(batch, -1, -1) for token in prefix]
        return torch.cat([*prefix, patches], dim=1), grid

    def _rotations(self, grid: tuple[int, int]) -> Iterable[Rotation | None]:
        """One for each block, drawn anew for each where rotary positions are augmented."""
        if self.rope is None:
            return [None] * self.depth
        unrotated = 1 + self.num_registers
        if self.rope.augments:
            return (self.rope(grid, unrotated) for _ in range(self.depth))
        return [self.rope(grid, unrotated)] * self.depth

    def _finish(self, x: Tensor, grid: tuple[int, int], local: bool = False) -> Features:
        """The final norms, and the tokens by kind."""
        counts = (1 + self.num_registers, grid[0] * grid[1])
        cls_norm = self.cls_norm
        if local and self.training and self.local_cls_norm is not None:
            cls_norm = self.local_cls_norm
        if cls_norm is None:
            first, patches = self.norm(x).split(counts, dim=1)
        else:
            first, patches = x.split(counts, dim=1)
            first, patches = cls_norm(first), self.norm(patches)
        return Features(cls=first[:, 0], registers=first[:, 1:], patches=patches, grid=grid)

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        p = self.patch_size
        spare = p - 1 if self.config["fit"] == "pad" else 0
        return (height + spare) // p, (width + spare) // p

    def _index(self, layer: int) -> int:
        if not -self.depth <= layer < self.depth:
            raise UserError(f"block {layer} is asked for; this backbone has {self.depth}")
        return layer % self.depth


def _option_names() -> list[str]:
    return list(inspect.signature(VisionTransformer).parameters)


def build_backbone(arch: str, **options) -> nn.Module:
    """A preset with options of `VisionTransformer`, or "timm:NAME" with those of `TimmBackbone`.

    Raises:
        UserError: for an unknown name or option, with the known ones.
    """
    if arch.startswith("timm:"):
        from models.timm_backbone import TimmBackbone  # here, because importing timm takes seconds

        return TimmBackbone(arch.removeprefix("timm:"), **options)
    if arch not in PRESETS:
        known = ", ".join(PRESETS)
        raise UserError(f"unknown backbone {arch!r}; known are {known} and timm:NAME")
    unknown = ", ".join(sorted(set(options) - set(_option_names())))
    if unknown:
        known = ", ".join(_option_names())
        raise UserError(f"unknown option {unknown} for {arch}; known are {known}")
    return VisionTransformer(**{**PRESETS[arch], **options})
