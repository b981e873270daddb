"""Low-rank adapters (LoRA, arXiv 2106.09685), freezing, and sharing of frozen weights.

A linear layer y = W x + b becomes y = W x + b + alpha / rank · B A x, in which only A (rank, in)
and B (out, rank) train. B starts at 0, so nothing changes at first. The layers stay in place and
keep their names: W is still `....qkv.weight`, its adapters are `....qkv.lora_q.a`, `.b` and so on.
"""

import copy
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import UserError
from models.checks import check_choice
from models.layers import KeyMaskedLinear

MODES = ("full", "lora", "partial")
# Layers that fuse several in one matrix, by the last part of their names. Each takes an equal
# share of the rows and has an adapter of its own.
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
        # ±1/√in, as in the authors' code; the paper says Gaussian.
        nn.init.kaiming_uniform_(self.a, a=5**0.5)
        nn.init.zeros_(self.b)

    def product(self) -> Tensor:
        """alpha / rank · B A (rows, in) in float64."""
        return self.scale * self.b.double() @ self.a.double()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x (..., in), y (..., rows) -> y + alpha / rank · B (A dropout(x))."""
        inner = F.linear(F.dropout(x, self.dropout, self.training), self.a)
        total = torch.addmm(y.flatten(0, -2), inner.flatten(0, -2), self.b.mT, alpha=self.scale)
        return total.unflatten(0, y.shape[:-1])


class FrozenLinear(nn.Linear):
    """A linear layer whose own weights do not train, with an `Adapter` for each part, or none."""

    # Names of the adapters, in the order of the rows; one where the layer is not fused.
    parts: tuple[str, ...] = ("lora",)

    @property
    def acting_bias(self) -> Tensor | None:
        return self.bias

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            # Once: each adapter would keep a cast of its own.
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y = frozen_linear(x, self.weight, self.acting_bias)
        adapters = self.adapters()
        if not any(adapters):
            return y
        rows = list(y.chunk(len(adapters), dim=-1))
        for index, adapter in enumerate(adapters):
            if adapter is not None:
                rows[index] = adapter(x, rows[index])
        return rows[0] if len(rows) == 1 else torch.cat(rows, dim=-1)

    def adapters(self) -> list[Adapter | None]:
        """One for each part, None where a part has none."""
        return [getattr(self, part, None) for part in self.parts]


class FrozenKeyMaskedLinear(FrozenLinear, KeyMaskedLinear):
    """The same without key bias."""

    @property
    def acting_bias(self) -> Tensor:
        return self.bias * self.bias_mask


# A layer changes its class and stays the same object. So names, hooks, device and references of
# the optimizer hold.
FROZEN = {nn.Linear: FrozenLinear, KeyMaskedLinear: FrozenKeyMaskedLinear}
PLAIN = {frozen: plain for plain, frozen in FROZEN.items()}


class _Recast(torch.autograd.Function):
    """A linear layer that casts its weight again in the backward pass.

    Autocast keeps one cast of a weight that trains. Of a frozen weight it makes a new one in every
    call, and the graph holds them all: 1.1 GiB for ViT-L and the two calls of a step.
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
    """Sets what trains, in place; returns the backbone. Existing adapters are merged first.

    A target is one or more neighbouring parts of a dotted name, with `*`, `?` and `[...]` as in the
    shell: "norm", "blocks.11", "attn.proj", "blocks.1[01].mlp", "bias". Frozen batch norms also
    keep their running statistics.

    Args:
        mode: "full": everything; "lora": adapters only, see `apply_lora`; "partial": parameters
            that `targets` name, by default none.

    Raises:
        UserError: for another mode, targets of "full", or a target that names nothing.
    """
    check_choice("tune.mode", mode, MODES)
    if mode == "full" and targets:
        raise UserError(
            f"tune.targets {', '.join(targets)} with tune.mode full, where everything trains; give "
            "lora or partial"
        )
    merge(backbone).requires_grad_(mode == "full")
    if mode == "lora":
        apply_lora(backbone, targets or DEFAULT_TARGETS, rank, alpha, dropout)
    if mode == "partial":
        parameters = dict(backbone.named_parameters())
        for name in _find_named(targets, {name: [name] for name in parameters}, "parameter"):
            parameters[name].requires_grad_(True)
    for module in backbone.modules():
        own = module.parameters(recurse=False)
        trains = mode == "full" or any(parameter.requires_grad for parameter in own)
        if isinstance(module, BATCH_NORMS):
            module.train(backbone.training and trains)
        if type(module) in FROZEN and not trains:
            module.__class__ = FROZEN[type(module)]
    return backbone


def apply_lora(
    backbone: nn.Module, targets: Sequence[str], rank: int, alpha: float, dropout: float = 0.0
) -> nn.Module:
    """Freezes `backbone` and adapts the linear layers that `targets` name, in place; returns it.

    Fused layers take one adapter for each part: "q", "k", "v" of `qkv`, and "w1", "w2" of `w12`
    (the gate and the other half of a SwiGLU). Their own names stand for all parts. An adapter has
    rank · (in + out) parameters.

    Args:
        targets: as in `freeze_for`, e.g. ["q", "v"], ["qkv", "fc1"], ["blocks.1*.attn.v"].
        alpha: over `rank`, the factor of the adapters.
        dropout: in [0, 1), of the adapters' inputs.

    Raises:
        UserError: for a number out of range, or a target that names no linear layer.
    """
    if not isinstance(rank, int) or rank < 1:
        raise UserError(f"the rank of adapters is {rank!r}; it must be a whole number from 1 on")
    if alpha <= 0 or not 0 <= dropout < 1:
        raise UserError(
            f"alpha {alpha} and dropout {dropout} of adapters; "
            "alpha must be above 0 and dropout in [0, 1)"
        )
    backbone.requires_grad_(False)
    for path, part in _find_named(targets, _adaptable(merge(backbone)), "linear layer"):
        layer = backbone.get_submodule(path)
        parent, _, own = path.rpartition(".")
        if type(layer) in FROZEN:  # still plain: this is the first of its parts
            layer.__class__ = FROZEN[type(layer)]
            layer.parts = tuple(f"lora_{name}" for name in FUSED.get(own, ())) or ("lora",)
        rows = layer.out_features // len(layer.parts)
        name = f"lora_{part}" if part else "lora"
        layer.add_module(name, Adapter(layer.weight, rows, rank, alpha, dropout))
        attention = backbone.get_submodule(parent)
        if hasattr(attention, "qkv_bias_separate"):
            # Otherwise timm's EVA, BEiT and Swin v2 read qkv.weight without calling the layer.
            attention.qkv_bias_separate = True
    return backbone


def _adaptable(backbone: nn.Module) -> dict[tuple[str, str], list[str]]:
    """(path of the layer, part or "") -> the names by which it can be targeted."""
    found = {}
    for path, layer in backbone.named_modules():
        # No subclasses: others may read their weights, as nn.MultiheadAttention does.
        if type(layer) not in FROZEN:
            continue
        parent, dot, own = path.rpartition(".")
        for part in FUSED.get(own, [""]):
            found[path, part] = [path, f"{parent}{dot}{part}"] if part else [path]
    return found


def _find_named(targets: Sequence[str], names: dict, kind: str) -> list:
    """The keys of `names` of which a target names one of the names, in their order."""
    everything = [name for own in names.values() for name in own]
    for target in targets:
        if not any(_matches(target, name) for name in everything):
            parts = [part for name in everything for part in name.split(".") if not part.isdigit()]
            known = ", ".join(dict.fromkeys(parts)) or "none"
            raise UserError(
                f"no {kind} of the backbone is named {target!r}; parts of their names are {known}"
            )
    named = {name for name in everything if any(_matches(target, name) for target in targets)}
    return [key for key, own in names.items() if not named.isdisjoint(own)]


def _matches(target: str, name: str) -> bool:
    wanted, parts = target.split("."), name.split(".")
    for start in range(len(parts) - len(wanted) + 1):
        if all(map(fnmatchcase, parts[start : start + len(wanted)], wanted)):
            return True
    return False


# ----------------------------------------------------------------- sharing and merging


def copy_sharing(module: nn.Module, shared: Iterable[nn.Parameter]) -> nn.Module:
    """A deep copy, except for the parameters `shared`, which are the same objects in both."""
    return copy.deepcopy(module, {id(parameter): parameter for parameter in shared})


def copy_sharing_frozen(student: nn.Module) -> nn.Module:
    """A teacher: its frozen parameters are the student's own, everything else is copied.

    Nothing frozen is held twice, not even for a moment. After another `freeze_for` of the student,
    see `share_frozen`.
    """
    frozen = [parameter for parameter in student.parameters() if not parameter.requires_grad]
    return copy_sharing(student, frozen)


def share_frozen(teacher: nn.Module, student: nn.Module) -> nn.Module:
    """A new teacher for a student of which other parts train than before.

    Where the student trains, the values are those of `teacher` (of new adapters the student's).
    Where it is frozen, they are the student's. `teacher` is merged and of no use afterwards.
    """
    averages = merge(teacher).state_dict()
    trained = {name for name, p in student.named_parameters() if p.requires_grad}
    averages = {name: tensor for name, tensor in averages.items() if name in trained}
    renewed = copy_sharing_frozen(student)
    renewed.load_state_dict(averages, strict=False)
    return renewed.requires_grad_(False).eval()


@torch.no_grad()
def merge(backbone: nn.Module) -> nn.Module:
    """Adds the adapters to the weights and removes them, in place; returns the plain backbone.

    The sums are new tensors, so a teacher that shares the frozen weights keeps its own.
    """
    for layer in [module for module in backbone.modules() if isinstance(module, FrozenLinear)]:
        adapters = layer.adapters()
        if any(adapters):
            rows = list(layer.weight.double().chunk(len(adapters)))
            for index, adapter in enumerate(adapters):
                if adapter is not None:
                    rows[index] = rows[index] + adapter.product()
                    delattr(layer, layer.parts[index])
            merged = torch.cat(rows).to(layer.weight.dtype)
            layer.weight = nn.Parameter(merged, layer.weight.requires_grad)
        vars(layer).pop("parts", None)
        layer.__class__ = PLAIN[type(layer)]
    return backbone


def merged_copy(backbone: nn.Module) -> nn.Module:
    """A plain backbone with the adapters merged, for export; it shares all other weights."""
    return merge(copy_sharing(backbone, backbone.parameters()))


def tune(student: nn.Module, teacher: nn.Module, seed: int, mode: str, **options) -> None:
    """`freeze_for` of `student.backbone`; `teacher.backbone` shares what is frozen.

    Args:
        seed: of the adapters' first values, the same on every rank and after every resume.
    """
    if mode == "full" and all(parameter.requires_grad for parameter in student.parameters()):
        return
    torch.manual_seed(seed)
    freeze_for(student.backbone, mode, **options)
    teacher.backbone = share_frozen(teacher.backbone, student.backbone)
