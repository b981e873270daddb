"""Low-rank adapters (LoRA, arXiv 2106.09685) and freezing: what of a backbone trains, and who shares the rest.

A linear layer y = W x + b becomes y = W x + b + alpha / rank · B A x, in which only A (rank, in) and B (out, rank)
train. B starts at 0, so nothing changes at first. The layers stay in place under their names: W is still
`....qkv.weight`, its adapters are `....qkv.lora_q.a`, `.b` and so on.
"""

import copy
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import UserError
from models.checks import check_choice
from models.layers import KeyMaskedLinear

MODES = ("full", "lora", "partial")
# Layers that are several in one matrix, by the last part of their names: equal shares of the rows, adapted one by one.
FUSED = {"qkv": ("q", "k", "v"), "w12": ("w1", "w2")}
DEFAULT_TARGETS = ("q", "v")  # as LoRA's authors, section 4.2 on
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)


class Adapter(nn.Module):
    """alpha / rank · B A x, the trained part."""

    def __init__(self, weight: Tensor, rows: int, rank: int, alpha: float, dropout: float):
        """
        Args:
            weight: (out, in) of the adapted layer, whose device and type the adapter takes.
            rows: of `weight` that are adapted: out, or the share of one of its fused parts.
        """
        super().__init__()
        self.scale, self.dropout = alpha / rank, dropout
        self.a = nn.Parameter(weight.new_empty(rank, weight.shape[1]))
        self.b = nn.Parameter(weight.new_empty(rows, rank))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(
            self.a, a=5**0.5
        )  # ±1/√in, as the authors' code; the paper says Gaussian
        nn.init.zeros_(self.b)

    def product(self) -> Tensor:
        """alpha / rank · B A (rows, in) in float64."""
        return self.scale * self.b.double() @ self.a.double()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x (..., in), y (..., rows) -> y + alpha / rank · B A dropout(x), without the matrix B A."""
        inner = F.linear(F.dropout(x, self.dropout, self.training), self.a)
        total = torch.addmm(y.flatten(0, -2), inner.flatten(0, -2), self.b.mT, alpha=self.scale)
        return total.unflatten(0, y.shape[:-1])


class FrozenLinear(nn.Linear):
    """A linear layer whose own weights do not train, with an `Adapter` for all rows, for parts of them, or none."""

    # Set by `apply_lora`. Adapters in the order of the parts they add to; one part where the layer is not fused.
    parts: tuple[str, ...] = ("lora",)

    @property
    def acting_bias(self) -> Tensor | None:
        return self.bias

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(
                torch.get_autocast_dtype(x.device.type)
            )  # once: each adapter would keep a cast of its own
        y = frozen_linear(x, self.weight, self.acting_bias)
        adapters = [getattr(self, part, None) for part in self.parts]
        if not any(adapters):
            return y
        rows = y.chunk(len(self.parts), dim=-1)
        rows = [own if adapter is None else adapter(x, own) for own, adapter in zip(rows, adapters)]
        return rows[0] if len(rows) == 1 else torch.cat(rows, dim=-1)


class FrozenKeyMaskedLinear(FrozenLinear, KeyMaskedLinear):
    """The same without key bias."""

    @property
    def acting_bias(self) -> Tensor:
        return self.bias * self.bias_mask


# A layer changes its class and stays the same object, so names, hooks, device and the optimiser's references hold.
FROZEN = {nn.Linear: FrozenLinear, KeyMaskedLinear: FrozenKeyMaskedLinear}
PLAIN = {frozen: plain for plain, frozen in FROZEN.items()}


class _Recast(torch.autograd.Function):
    """A linear layer that casts its weight again in the backward pass.

    Autocast keeps one cast of a weight that trains, but makes a new one of a frozen weight in every call, and the graph
    holds them all: 1.1 GiB for ViT-L and the two calls of a step.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return gradient @ weight.to(gradient.dtype), None, None


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` with gradient for `x` only."""
    if x.dtype != weight.dtype and x.requires_grad and torch.is_grad_enabled():
        return _Recast.apply(x, weight, bias)
    return F.linear(x, weight, bias)


# ----------------------------------------------------------------- what trains


def freeze_for(
    backbone: nn.Module,
    mode: str,
    targets: Sequence[str] = (),
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
) -> nn.Module:
    """Lets train what `mode` says, in place; returns the backbone. Adapters that it has are merged first.

    A target is one or more neighbouring parts of a dotted name, with `*`, `?` and `[...]` as in the shell: "norm",
    "blocks.11", "attn.proj", "blocks.1[01].mlp", "bias". Frozen batch norms also keep their running statistics.

    Args:
        mode: "full": everything; "lora": adapters only, see `apply_lora`; "partial": parameters that `targets` name,
            none of them by default.

    Raises:
        ValueError: for another mode, a target that names nothing, with the names there are, or targets of "full".
    """
    check_choice("tune.mode", mode, MODES)
    if mode == "full" and targets:
        raise UserError(
            f"tune.targets {', '.join(targets)} with tune.mode full, where everything trains; give lora or partial"
        )
    merge(backbone).requires_grad_(mode == "full")
    if mode == "lora":
        apply_lora(backbone, targets or DEFAULT_TARGETS, rank, alpha, dropout)
    if mode == "partial":
        parameters = dict(backbone.named_parameters())
        for name in _named(targets, {name: [name] for name in parameters}, "parameter"):
            parameters[name].requires_grad_(True)
    for module in backbone.modules():
        trains = mode == "full" or any(
            parameter.requires_grad for parameter in module.parameters(recurse=False)
        )
        if isinstance(module, BATCH_NORMS):
            module.train(backbone.training and trains)
        if type(module) in FROZEN and not trains:
            module.__class__ = FROZEN[type(module)]
    return backbone


def apply_lora(
    backbone: nn.Module, targets: Sequence[str], rank: int, alpha: float, dropout: float = 0.0
) -> nn.Module:
    """Freezes `backbone` and gives the linear layers that `targets` name adapters, in place; returns it.

    The fused layers take one adapter for each part: "q", "k", "v" of `qkv` and "w1", "w2" of `w12` (the gate and the
    other half of a SwiGLU); their own names stand for all parts. Each adapter has rank · (in + out) parameters.

    Args:
        targets: as in `freeze_for`, e.g. ["q", "v"], ["qkv", "proj", "fc1", "fc2"], ["blocks.1*.attn.v"].
        alpha: over `rank`, the factor of the adapters.
        dropout: in [0, 1), of the adapters' inputs.

    Raises:
        ValueError: for a target that names no linear layer, with the names there are, or a number out of range.
    """
    if not isinstance(rank, int) or rank < 1:
        raise UserError(f"the rank of adapters is {rank!r}; it must be a whole number from 1 on")
    if alpha <= 0 or not 0 <= dropout < 1:
        raise UserError(
            f"alpha {alpha} and dropout {dropout} of adapters; alpha must be above 0 and dropout in [0, 1)"
        )
    backbone.requires_grad_(False)
    for path, part in _named(targets, _adaptable(merge(backbone)), "linear layer"):
        layer = backbone.get_submodule(path)
        parent, _, own = path.rpartition(".")
        if type(layer) in FROZEN:  # still plain: this is the first of its parts
            layer.__class__ = FROZEN[type(layer)]
            layer.parts = (
                tuple(f"lora_{name}" for name in FUSED[own]) if own in FUSED else ("lora",)
            )
        rows = layer.out_features // len(layer.parts)
        layer.add_module(
            f"lora_{part}" if part else "lora", Adapter(layer.weight, rows, rank, alpha, dropout)
        )
        attention = backbone.get_submodule(parent)
        if hasattr(
            attention, "qkv_bias_separate"
        ):  # of timm's EVA, BEiT and Swin v2, which read qkv.weight otherwise
            attention.qkv_bias_separate = True
    return backbone


def _adaptable(backbone: nn.Module) -> dict[tuple[str, str], list[str]]:
    """(path of the layer, part or "") -> the names by which it can be targeted."""
    found = {}
    for path, layer in backbone.named_modules():
        if (
            type(layer) not in FROZEN
        ):  # not of a subclass, whose weight others may read: nn.MultiheadAttention does
            continue
        parent, dot, own = path.rpartition(".")
        for part in FUSED.get(own, [""]):
            found[path, part] = [path, f"{parent}{dot}{part}"] if part else [path]
    return found


def _named(targets: Sequence[str], names: dict, kind: str) -> Iterator:
    """The keys of `names` that a target names, in their order."""
    for target in targets:
        if not any(_matches(target, name) for own in names.values() for name in own):
            parts = [
                part
                for own in names.values()
                for name in own
                for part in name.split(".")
                if not part.isdigit()
            ]
            known = ", ".join(dict.fromkeys(parts)) or "none"
            raise UserError(
                f"no {kind} of the backbone is named {target!r}; parts of their names are {known}"
            )
    return (
        key
        for key, own in names.items()
        if any(_matches(target, name) for target in targets for name in own)
    )


def _matches(target: str, name: str) -> bool:
    wanted, parts = target.split("."), name.split(".")
    runs = (parts[start : start + len(wanted)] for start in range(len(parts) - len(wanted) + 1))
    return any(all(map(fnmatchcase, run, wanted)) for run in runs)


# ----------------------------------------------------------------- copies that share, and plain weights again


def copy_sharing(module: nn.Module, shared: Iterable[nn.Parameter]) -> nn.Module:
    """A deep copy but for the parameters `shared`, which are the same objects in both."""
    return copy.deepcopy(module, {id(parameter): parameter for parameter in shared})


def copy_sharing_frozen(student: nn.Module) -> nn.Module:
    """A teacher's copy: frozen parameters are the student's own, those that train and all buffers are copies.

    Nothing frozen is held twice, not even for a moment. After another `freeze_for` of the student, see `share_frozen`.
    """
    return copy_sharing(
        student, (parameter for parameter in student.parameters() if not parameter.requires_grad)
    )


def share_frozen(teacher: nn.Module, student: nn.Module) -> nn.Module:
    """The teacher of a student of whom other parts train than before; `teacher` itself is merged and then of no use.

    Where the student trains, the values are the teacher's own (of new adapters the student's); where it is frozen, they
    are the student's.
    """
    own, trains = (
        merge(teacher).state_dict(),
        {name for name, p in student.named_parameters() if p.requires_grad},
    )
    renewed = copy_sharing_frozen(student)
    renewed.load_state_dict(
        {name: tensor for name, tensor in own.items() if name in trains}, strict=False
    )
    return renewed.requires_grad_(False).eval()


@torch.no_grad()
def merge(backbone: nn.Module) -> nn.Module:
    """Adds the adapters to the weights and removes them, in place; returns the backbone, which is a plain one again.

    The sums are new tensors, so a teacher that shares the frozen weights keeps its own.
    """
    for layer in [module for module in backbone.modules() if isinstance(module, FrozenLinear)]:
        adapters = [getattr(layer, part, None) for part in layer.parts]
        if any(adapters):
            rows = layer.weight.double().chunk(len(adapters))
            rows = [
                own if adapter is None else own + adapter.product()
                for own, adapter in zip(rows, adapters)
            ]
            layer.weight = nn.Parameter(
                torch.cat(rows).to(layer.weight.dtype), layer.weight.requires_grad
            )
        for part, adapter in zip(layer.parts, adapters):
            if adapter is not None:
                delattr(layer, part)
        vars(layer).pop("parts", None)
        layer.__class__ = PLAIN[type(layer)]
    return backbone


def merged_copy(backbone: nn.Module) -> nn.Module:
    """A plain backbone with the adapters in its weights, for export; everything else is shared with `backbone`."""
    return merge(copy_sharing(backbone, backbone.parameters()))


def tune(student: nn.Module, teacher: nn.Module, seed: int, mode: str, **options) -> None:
    """Lets train of `student.backbone` what `freeze_for` says, and shares the rest with `teacher.backbone`.

    Args:
        seed: of the adapters' first values, the same on every rank and after every resume.
    """
    if mode == "full" and all(parameter.requires_grad for parameter in student.parameters()):
        return
    torch.manual_seed(seed)
    freeze_for(student.backbone, mode, **options)
    teacher.backbone = share_frozen(teacher.backbone, student.backbone)
