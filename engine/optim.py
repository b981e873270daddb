"""Schedules as functions of the step, parameter groups, the optimizer, gradient clipping."""

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from engine import distributed, parallel
from engine.logger import notice

if TYPE_CHECKING:
    from engine.config import OptimConfig, TrainConfig


# ----------------------------------------------------------------- schedules


def span_steps(span: int | str, total_steps: int) -> int:
    """A span in steps: a number as it is, "10%" of the run rounded to the nearest step."""
    return span if isinstance(span, int) else round(float(span.rstrip("%")) / 100 * total_steps)


def make_schedule(
    total_steps: int,
    *,
    peak: float,
    start: float | None = None,
    end: float | None = None,
    warmup: int | str = 0,
    decay: int | str | None = None,
    shape: str = "cosine",
    factor: float = 1.0,
) -> Callable[[int], float]:
    """step -> value: linear from start to peak, then to end by `shape`, then constant (DINOv3).

    The warm-up excludes its end point. The decay includes both: its last step has the value `end`.

    Args:
        peak: value after the warm-up; `start` and `end` are the peak where not given.
        warmup, decay: steps or share of the run; the default decay is all that is left.
        shape: constant (stays at the peak), linear or cosine.
        factor: multiplies peak and end, not start (the learning rate's scaling).
    """
    end = factor * (peak if end is None else end)
    peak = factor * peak
    start = peak if start is None else start
    rise = min(span_steps(warmup, total_steps), total_steps)
    left = total_steps - rise
    fall = left if decay is None else min(span_steps(decay, total_steps), left)

    def value(step: int) -> float:
        if step < rise:
            return start + (peak - start) * step / rise
        if shape == "constant":
            return peak
        if step >= rise + fall - 1:
            return end
        share = (step - rise) / (fall - 1)
        if shape == "cosine":
            share = (1 - math.cos(math.pi * share)) / 2
        return peak + (end - peak) * share

    return value


def lr_factor(scaling: str, batch_size: int) -> float:
    """Multiplies the peak and end of the learning rate.

    DINO: G/256; DINOv2: sqrt(G/1024); DINOv3: 4 sqrt(G/1024).
    """
    return {
        "none": 1.0,
        "linear_256": batch_size / 256,
        "sqrt_1024": math.sqrt(batch_size / 1024),
        "sqrt_1024_x4": 4 * math.sqrt(batch_size / 1024),
    }[scaling]


def build_schedules(cfg: "TrainConfig", total_steps: int) -> dict[str, Callable[[int], float]]:
    """step -> value of lr, weight_decay, ema_momentum, teacher_temp and each weight in use.

    A term without a weight and without a schedule is not in use, nor one whose schedule is 0.
    """
    terms = {name: settings.weight for name, settings in vars(cfg.loss).items()}
    constants = terms | {"dino_local": cfg.loss.dino.local_weight}
    schedules = {}
    for name in dict.fromkeys([*vars(cfg.schedule), *terms]):
        item = getattr(cfg.schedule, name, None)
        if item is not None and name in terms and not any((item.peak, item.start, item.end)):
            continue
        if item is not None:
            factor = lr_factor(cfg.optim.lr_scaling, cfg.batch_size) if name == "lr" else 1.0
            schedules[name] = make_schedule(total_steps, **vars(item), factor=factor)
        elif constants[name] > 0 or name not in terms:
            schedules[name] = lambda step, value=constants[name]: value
    return schedules


# ----------------------------------------------------------------- parameter groups

NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, _BatchNorm)


def layer_multiplier(name: str, depth: int, decay: float) -> float:
    """Layer-wise decay (DINOv2): decay^(depth + 1 - layer), for a parameter of the backbone.

    Tokens and patch embedding are layer 0, the final norm is the last layer.
    """
    name = name.removeprefix("backbone.").removeprefix("model.")  # of timm
    first = ("patch_embed", "cls_token", "mask_token", "pos_embed", "register", "reg_token")
    if name.startswith("blocks."):
        layer = int(name.split(".")[1]) + 1
    elif any(part in name for part in first):
        layer = 0
    else:
        layer = depth + 1
    return decay ** (depth + 1 - layer)


def is_decayed(module: nn.Module, parameter: Tensor) -> bool:
    """No weight decay on biases, norms, LayerScale and other vectors, but on tokens (as in the
    authors' code)."""
    return parameter.ndim > 1 and not isinstance(module, NORMS)


def parameter_groups(
    model: nn.Module, layer_decay: float = 1.0, patch_embed_lr: float = 1.0
) -> list[dict]:
    """Trainable parameters of `model` (backbone.*, *_head.*) by learning rate and weight decay.

    `set_rates` multiplies the schedules' values by a group's `lr_scale` and `weight_decay_scale`.
    The last layers of the heads have groups of their own, so that their rate can be 0.
    """
    depth, modules = len(parallel.blocks(model)), dict(model.named_modules())
    groups: dict[tuple, dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        scale = 1.0
        if name.startswith("backbone."):
            scale = layer_multiplier(name, depth, layer_decay)
            scale *= patch_embed_lr if "patch_embed" in name else 1.0
        key = (
            scale,
            float(is_decayed(modules[name.rpartition(".")[0]], parameter)),
            "last_layer" in name,
        )
        names = ("lr_scale", "weight_decay_scale", "is_last_layer")
        empty = {"params": [], **dict(zip(names, key, strict=True))}
        groups.setdefault(key, empty)["params"].append(parameter)
    return list(groups.values())


def make_optimizer(
    groups: list[dict], betas: Iterable[float], before: torch.optim.Optimizer | None = None
) -> torch.optim.AdamW:
    """AdamW whose state exists from the start: checkpoints of all steps hold the same tensors.

    Parameters that `before` has moments for keep them.
    """
    kind = groups[0]["params"][0].device.type
    optimizer = torch.optim.AdamW(
        groups, lr=0.0, betas=tuple(betas), weight_decay=0.0, fused=kind in ("cpu", "cuda")
    )
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if before and parameter in before.state:
                optimizer.state[parameter] = before.state[parameter]
                continue
            optimizer.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
    return optimizer


def optimizer_for(
    student: nn.Module, settings: "OptimConfig", before: torch.optim.Optimizer | None = None
) -> torch.optim.AdamW:
    """`make_optimizer` for the trainable parameters of the student.

    Says which choices by name find none of them, as under LoRA or in a model of timm.
    """
    for key in choices_without_effect(student, settings):
        notice(
            f"optim.{key} {getattr(settings, key)} has no effect: it goes by the names of "
            "parameters, and none that trains here has such a name"
        )
    groups = parameter_groups(student, settings.layer_decay, settings.patch_embed_lr)
    return make_optimizer(groups, settings.betas, before)


def choices_without_effect(student: nn.Module, settings: "OptimConfig") -> list[str]:
    """Keys that are set and choose parameters by name, of which none trains."""
    trained = [name for name, parameter in student.named_parameters() if parameter.requires_grad]
    backbone = [name.removeprefix("backbone.") for name in trained if name.startswith("backbone.")]
    depth = len(parallel.blocks(student))
    found = {
        "layer_decay": any(layer_multiplier(name, depth, 0.5) != 1 for name in backbone),
        "patch_embed_lr": any("patch_embed" in name for name in backbone),
        "freeze_last_layer": any("last_layer" in name for name in trained),
    }
    unset = {"layer_decay": (1,), "patch_embed_lr": (1,), "freeze_last_layer": (0, "0%")}
    return [key for key in found if not found[key] and getattr(settings, key) not in unset[key]]


def forget(optimizer: torch.optim.Optimizer) -> None:
    """Moments and step counts as at the start."""
    for moments in optimizer.state.values():
        torch._foreach_zero_(list(moments.values()))


def set_rates(
    optimizer: torch.optim.Optimizer, lr: float, weight_decay: float, frozen: bool = False
) -> None:
    """`frozen`: the last layers have rate 0. Their moments move all the same (DINOv2, DINOv3)."""
    for group in optimizer.param_groups:
        group["lr"] = 0.0 if frozen and group["is_last_layer"] else lr * group["lr_scale"]
        group["weight_decay"] = weight_decay * group["weight_decay_scale"]


# ----------------------------------------------------------------- gradients


def clip_gradients(model: nn.Module, max_norm: float | None, per: str) -> Tensor:
    """Scales gradients down in place.

    Args:
        max_norm: largest L2 norm; None: nothing is scaled.
        per: "module" clips each top-level sub-module (backbone, heads) alone (DINOv2, DINOv3),
            "tensor" each parameter tensor alone (DINO, iBOT).

    Returns:
        The L2 norm of all gradients before, shards of all ranks taken together.
    """
    norms = []
    for child in model.children():
        whole = [parameter.grad for parameter in child.parameters() if parameter.grad is not None]
        if not whole:
            continue
        gradients = parallel.local(whole)
        squares = torch.stack(torch._foreach_norm(gradients)).square()
        if gradients[0] is not whole[0]:  # shards; fully_shard takes all parameters of a module
            distributed.all_reduce_sum(squares)
        norms.append(squares.sum().sqrt())
        if max_norm is None:
            continue
        limits = squares.sqrt() if per == "tensor" else norms[-1].expand(len(gradients))
        scales = (max_norm / (limits + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, list(scales))
    return torch.linalg.vector_norm(torch.stack(norms))


def drop_last_layer_gradients(model: nn.Module) -> None:
    """Keeps the prototypes and their moments as they are in this step (DINO)."""
    for name, parameter in model.named_parameters():
        if "last_layer" in name:
            parameter.grad = None
