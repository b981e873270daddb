"""The parts of a transformer block: attention, feed-forward nets, LayerScale, DropPath."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.checks import check_choice
from models.positions import RotaryPositions, Rotation, Rotations, rotate

# (B, T) of each group of images that a packed (ΣB·T, D) holds, one after the other.
Shapes = Sequence[tuple[int, int]]

# The hidden width of a gated net is rounded up to a multiple of this.
GATED_ALIGN = {"swiglu": 8, "swiglu32": 32, "swiglu64": 64, "swiglu128": 128}


class KeyMaskedLinear(nn.Linear):
    """Fused q, k, v projection without key bias, which softmax would not see (DINOv3).

    The bias keeps its third for the keys, as in the released weights; `bias_mask` is 0 there.
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features)
        self.register_buffer("bias_mask", torch.empty(out_features))
        self.reset_mask()

    def reset_mask(self) -> None:
        third = self.out_features // 3
        self.bias_mask.fill_(1.0)
        self.bias_mask[third : 2 * third] = 0.0

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias * self.bias_mask)


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """softmax(q kᵀ / √d) v, each (B, heads, T, d): PyTorch's `scaled_dot_product_attention`.

    With `causal` no token sees those behind it.

    On the CPU its fused kernel is slower than the plain products for short bf16 sequences: 49
    against 9 ms forward and backward for (128, 4, 65, 32), 41 against 16 ms for (16, 6, 197, 64),
    two cores, torch 2.15. So these take the products.
    """
    short = q.shape[-2] <= 512 and not causal
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and short:
        return torch.softmax((q @ k.mT) * q.shape[-1] ** -0.5, dim=-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def embed_patches(convolution: nn.Module, images: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, N, D): a convolution whose stride is the side of its patches.

    On a GPU as one matrix product: cuDNN took 4.6 ms of a step of ViT-S/16 of 135 ms (H200).
    """
    if type(convolution) is not nn.Conv2d or not images.is_cuda:
        return convolution(images).flatten(2).mT
    weight = convolution.weight
    p, (h, w) = weight.shape[-1], (side // weight.shape[-1] for side in images.shape[-2:])
    patches = images[..., : h * p, : w * p].unflatten(-1, (w, p)).unflatten(-3, (h, p))
    patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, N, C·p·p)
    return F.linear(patches, weight.flatten(1), convolution.bias)


class Attention(nn.Module):
    """Multi-head self-attention with one fused matrix for queries, keys and values."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        qkv_bias: bool = True,
        mask_k_bias: bool = False,
        proj_bias: bool = True,
        causal: bool = False,
    ):
        super().__init__()
        self.num_heads, self.causal = num_heads, causal
        if qkv_bias and mask_k_bias:
            self.qkv = KeyMaskedLinear(dim, 3 * dim)
        else:
            self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)

    def forward(
        self, x: Tensor, rotation: Rotations = None, shapes: Shapes | None = None
    ) -> Tensor:
        """(B, T, D) -> (B, T, D), or packed with `shapes`, see `Block`."""
        qkv = self.qkv(x)
        if shapes is None:
            return self.proj(self._attend(qkv, rotation))
        groups = zip(unpack(qkv, shapes), rotation, strict=True)
        attended = [self._attend(part, turn).flatten(0, 1) for part, turn in groups]
        return self.proj(torch.cat(attended))

    def _attend(self, qkv: Tensor, rotation: Rotation | None) -> Tensor:
        """(B, T, 3·D) -> (B, T, D), before the last projection."""
        return attend(*self.split_heads(qkv, rotation), self.causal).transpose(1, 2).flatten(2)

    def weights(self, x: Tensor, rotation: Rotation | None = None) -> Tensor:
        """softmax(q kᵀ / √d) (B, heads, T, T) in float32, a matrix `forward` never holds."""
        q, k, _ = self.split_heads(self.qkv(x), rotation)
        return torch.softmax((q @ k.mT).float() * q.shape[-1] ** -0.5, dim=-1)

    def split_heads(self, qkv: Tensor, rotation: Rotation | None) -> tuple[Tensor, ...]:
        """q, k, v, each (B, heads, T, d), of (B, T, 3·D)."""
        qkv = qkv.unflatten(-1, (3, self.num_heads, -1))  # (B, T, 3, heads, d)
        if rotation is None:
            return qkv.permute(2, 0, 3, 1, 4).unbind(0)
        sin, cos = (table[:, None, None] for table in rotation)
        # Split, not sliced: the backward of each slice would fill a whole gradient with zeros.
        qk, v = qkv.split((2, 1), dim=2)
        q, k = rotate(qk, sin, cos).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v.squeeze(2).transpose(1, 2)


def unpack(packed: Tensor, shapes: Shapes) -> list[Tensor]:
    """(ΣB·T, D) -> one (B, T, D) for each group."""
    groups = packed.split([samples * tokens for samples, tokens in shapes])
    return [group.unflatten(0, shape) for group, shape in zip(groups, shapes, strict=True)]


class Mlp(nn.Module):
    """Linear, GELU (exact), linear."""

    def __init__(self, dim: int, hidden: int, bias: bool = True):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGLU(nn.Module):
    """w3(SiLU(gate) · up); the first half of the rows of `w12` makes the gate, the other up."""

    def __init__(self, dim: int, hidden: int, bias: bool = True):
        super().__init__()
        self.w12 = nn.Linear(dim, 2 * hidden, bias=bias)
        self.w3 = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * up)


def make_ffn(kind: str, dim: int, ratio: float, bias: bool = True) -> nn.Module:
    """Feed-forward net: "mlp" of ratio · D hidden units, or gated with 2/3 of that, at equal cost.

    Raises:
        UserError: if `kind` is neither "mlp" nor a key of `GATED_ALIGN`.
    """
    check_choice("ffn", kind, ("mlp", *GATED_ALIGN))
    if kind == "mlp":
        return Mlp(dim, int(dim * ratio), bias)
    align = GATED_ALIGN[kind]
    hidden = -(-int(dim * ratio * 2 / 3) // align) * align
    return SwiGLU(dim, hidden, bias)


class LayerScale(nn.Module):
    """One learned factor a channel on the output of a residual branch (CaiT)."""

    def __init__(self, dim: int, value: float):
        super().__init__()
        self.value = value
        self.gamma = nn.Parameter(torch.full((dim,), float(value)))

    def reset_parameters(self) -> None:
        nn.init.constant_(self.gamma, self.value)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class DropPath(nn.Module):
    """Adds a residual branch to x; in training each sample skips it with probability `rate`.

    Of b samples, ⌈b (1 - rate)⌉ drawn ones go through the branch, so the others cost no time
    (DINOv2). The last of them counts so often that b (1 - rate) samples count on average. DINOv2's
    code rounds down, and drops half of 2 samples at a rate of 0.1. What counts is divided by
    1 - rate, so the expectation is the full sum.
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(
        self, x: Tensor, branch: Callable[..., Tensor], shapes: Shapes | None = None
    ) -> Tensor:
        """x + branch(x, shapes); of a packed x with `shapes`, a random part of each group."""
        if not self.training or self.rate == 0.0:
            return x + branch(x, shapes)
        rows, factors, kept_shapes = [], [], []
        first = 0
        for samples, tokens in shapes or [(len(x), 1)]:
            subset, factor = self._draw(samples, x)
            starts = first + tokens * subset[:, None]
            rows.append((starts + torch.arange(tokens, device=x.device)).flatten())
            factors.append(factor[:, None].expand(-1, tokens).flatten())
            kept_shapes.append((len(subset), tokens))
            first += samples * tokens
        rows, factors = torch.cat(rows), torch.cat(factors)
        residual = branch(x.index_select(0, rows), shapes and kept_shapes).to(x.dtype)
        return x.index_add(0, rows, residual * factors.view(-1, *[1] * (x.dim() - 1)))

    def _draw(self, samples: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """The samples that go through the branch, and the factors of their branches.

        Their number is fixed: torch.compile needs one shape, and no device has to be waited for.
        """
        expected = samples * (1 - self.rate)
        kept = max(math.ceil(expected - 1e-6), 1)
        factors = x.new_full((kept,), 1 / (1 - self.rate))
        factors[-1:] *= torch.rand(1, device=x.device) < expected - (kept - 1)
        return torch.randperm(samples, device=x.device)[:kept], factors


def init_module(module: nn.Module) -> None:
    """DINOv3's initialisation of one module, not of its children; other kinds are left alone."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    if isinstance(module, KeyMaskedLinear):
        module.reset_mask()
    if isinstance(module, nn.Conv2d):  # the patch embedding: uniform within ±1/√(C p²)
        bound = module.weight[0].numel() ** -0.5
        nn.init.uniform_(module.weight, -bound, bound)
        nn.init.uniform_(module.bias, -bound, bound)
    if isinstance(module, (nn.LayerNorm, LayerScale, RotaryPositions)):
        module.reset_parameters()
