"""Projection head: an MLP to a small normalised vector, compared with K prototypes (DINO)."""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import UserError
from models.checks import check_choice
from models.layers import init_module

NORM_EPS = 1e-12  # of torch.nn.functional.normalize
ROW_CHUNK = 1 << 17  # values
LAST_LAYERS = ("plain", "weight_norm", "unit_norm")


def product_type(x: Tensor) -> torch.dtype:
    """The type in which a matrix product with x runs, autocast considered."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class _NormalizedRows(torch.autograd.Function):
    """Rows of v (K, d) over their L2 norm, times g (K, 1) unless it is None, in the type wanted.

    Some rows at a time: with 65,536 prototypes, each float32 matrix in between would not fit into
    the CPU's cache.
    """

    @staticmethod
    def forward(ctx, v: Tensor, g: Tensor | None, kind: torch.dtype) -> Tensor:
        inverse = 1 / torch.linalg.vector_norm(v, dim=1, keepdim=True).clamp_(min=NORM_EPS)
        ctx.save_for_backward(v, g, inverse)
        scale = inverse if g is None else inverse * g
        rows = torch.empty_like(v, dtype=kind)
        for chosen in _row_chunks(v):
            rows[chosen] = v[chosen] * scale[chosen]
        return rows

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        v, g, inverse = ctx.saved_tensors
        scale = inverse if g is None else inverse * g
        grad_v, along = torch.empty_like(v), torch.empty_like(inverse)
        for chosen in _row_chunks(v):
            unit = v[chosen] * inverse[chosen]
            slope = grad[chosen].to(v.dtype, copy=True)
            along[chosen] = torch.linalg.vecdot(slope, unit)[:, None]
            slope.addcmul_(unit, along[chosen], value=-1)  # the norm of a row has no effect
            grad_v[chosen] = slope.mul_(scale[chosen])
        return grad_v, None if g is None else along, None


def _row_chunks(v: Tensor) -> list[slice]:
    """Slices of as many rows as stay in a CPU's cache; elsewhere one of all rows."""
    step = max(1, ROW_CHUNK // v.shape[1]) if v.device.type == "cpu" else max(1, len(v))
    return [slice(start, start + step) for start in range(0, len(v), step)]


class NormalizedLinear(nn.Module):
    """Linear layer without bias whose rows have norm 1, or a learned norm that starts at 1.

    The rows of `weight_v` start as those of `nn.Linear`, of norm 1/√3. DINO's head initialises its
    MLP with a std of 0.02 before it adds this layer. AdamW moves all entries by the same step, so
    a shorter row would turn faster.
    """

    def __init__(self, in_features: int, out_features: int, learn_norm: bool):
        super().__init__()
        self.weight_v = nn.Parameter(torch.empty(out_features, in_features))
        self.weight_g = nn.Parameter(torch.empty(out_features, 1)) if learn_norm else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = self.weight_v.shape[1] ** -0.5
        nn.init.uniform_(self.weight_v, -bound, bound)
        if self.weight_g is not None:
            nn.init.ones_(self.weight_g)

    @property
    def weight(self) -> Tensor:
        """(K, in_features), the rows that are in effect."""
        rows = F.normalize(self.weight_v, dim=1)
        return rows if self.weight_g is None else rows * self.weight_g

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, _NormalizedRows.apply(self.weight_v, self.weight_g, product_type(x)))


class ProjectionHead(nn.Module):
    """Logits over K prototypes for CLS or patch vectors.

    The last layer is "plain" (DINOv3), "weight_norm" (DINOv2: the norm of each row is learned) or
    "unit_norm" (DINO and iBOT with `norm_last_layer`: rows stay at norm 1).
    """

    def __init__(
        self,
        in_dim: int,
        prototypes: int,
        hidden: int = 2048,
        bottleneck: int = 256,
        layers: int = 3,
        last_layer: str = "plain",
    ):
        """
        Args:
            in_dim: D.
            prototypes: K.
            layers: linear layers before the prototypes, at least 1, with GELU between them.

        Raises:
            UserError: for fewer layers or another `last_layer`.
        """
        super().__init__()
        check_choice("last_layer", last_layer, LAST_LAYERS)
        if layers < 1:
            raise UserError(f"a projection head needs at least 1 layer; {layers} given")
        widths = [in_dim, *[hidden] * (layers - 1), bottleneck]
        steps: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            steps += [nn.Linear(before, after), nn.GELU()]
        self.mlp = nn.Sequential(*steps[:-1])
        if last_layer == "plain":
            self.last_layer = nn.Linear(bottleneck, prototypes, bias=False)
        else:
            learn_norm = last_layer == "weight_norm"
            self.last_layer = NormalizedLinear(bottleneck, prototypes, learn_norm)
        self.init_weights()

    def init_weights(self) -> None:
        """Draws every parameter anew; also valid after `to_empty()` from the meta device."""
        for module in self.modules():
            init_module(module)
        if isinstance(self.last_layer, NormalizedLinear):
            self.last_layer.reset_parameters()

    def bottleneck(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., bottleneck) of L2 norm 1."""
        x = self.mlp(x)
        # In float32, because the eps of 1e-12 is 0 in half precision.
        return F.normalize(x.float(), dim=-1).to(x.dtype)

    def prototypes(self, z: Tensor) -> Tensor:
        """(..., bottleneck) -> (..., K) logits."""
        return self.last_layer(z)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., K) logits."""
        return self.prototypes(self.bottleneck(x))
