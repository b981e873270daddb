"""The parts of a transformer block: attention, feed-forward nets, LayerScale, DropPath."""

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


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √d) v, each (B, heads, T, d): PyTorch's `scaled_dot_product_attention`.

    On the CPU its fused kernel is slower than the plain products for short bf16 sequences: 49
    against 9 ms forward and backward for (128, 4, 65, 32), 41 against 16 ms for (16, 6, 197, 64),
    two cores, torch 2.15. So these take the products.
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[-2] <= 512:
        return torch.softmax((q @ k.mT) * q.shape[-1] ** -0.5, dim=-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v)


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
    ):
        super().__init__()
        self.num_heads = num_heads
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
        return attend(*self._heads(qkv, rotation)).transpose(1, 2).flatten(2)

    def weights(self, x: Tensor, rotation: Rotation | None = None) -> Tensor:
        """softmax(q kᵀ / √d) (B, heads, T, T) in float32, a matrix `forward` never holds."""
        q, k, _ = self._heads(self.qkv(x), rotation)
        return torch.softmax((q @ k.mT).float() * q.shape[-1] ** -0.5, dim=-1)

    def _heads(self, qkv: Tensor, rotation: Rotation | None) -> tuple[Tensor, ...]:
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
    """Adds a residual branch, in training to a random part of the batch only (DINOv2).

    Of b samples, max(⌊b (1 - rate)⌋, 1) go through the branch and get it times b over their number,
    so the expectation is the full sum; the others are not computed, which saves the time.
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
        if shapes is not None:
            return self._forward_packed(x, branch, shapes)
        subset, scale = self._draw(len(x), x.device)
        residual = branch(x.index_select(0, subset), None).to(x.dtype)
        return torch.index_add(x, 0, subset, residual, alpha=scale)

    def _forward_packed(self, x: Tensor, branch: Callable[..., Tensor], shapes: Shapes) -> Tensor:
        rows, scales, kept_shapes = [], [], []
        first = 0
        for samples, tokens in shapes:
            subset, scale = self._draw(samples, x.device)
            starts = first + tokens * subset[:, None]
            rows.append((starts + torch.arange(tokens, device=x.device)).flatten())
            scales.append(scale)
            kept_shapes.append((len(subset), tokens))
            first += samples * tokens
        residual = branch(x.index_select(0, torch.cat(rows)), kept_shapes).to(x.dtype)
        residuals = residual.split([len(group) for group in rows])
        x = x.clone()
        for group, part, scale in zip(rows, residuals, scales, strict=True):
            x.index_add_(0, group, part, alpha=scale)
        return x

    def _draw(self, samples: int, device: torch.device) -> tuple[Tensor, float]:
        """The samples that go through the branch, and the factor of their branch."""
        kept = max(int(samples * (1 - self.rate)), 1)
        return torch.randperm(samples, device=device)[:kept], samples / kept


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
