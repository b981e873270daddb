"""Memory of a GPU in training, computed from a configuration: nothing is allocated.

Bytes, with P parameters of the student, N GPUs that share its weights (FSDP), b = batch_size / N images a GPU (at most
micro_batch_size at a time), low = 2 under bf16 or fp16 and 4 under float32:

    parameters       4 P / N           float32
    gradients        4 P / N           float32
    optimizer        8 P / N           AdamW's two moments
    teacher          4 P / N           and as much of the backbone again for a Gram teacher of its own
    gathered         low (2 U + P if N = 1)   the largest unit U that FSDP gathers (block or head), and the next; alone, the
                                       low-precision copies that autocast makes of all weights
    activations      tokens · depth · per token, see `block_bytes`; with checkpointing tokens · depth · 4 D, and one block
    heads            rows · (MLP + K · 2 low) + teacher's rows · 4 K + prototypes that are normalised each step

The total counts the larger of gradients and activations with heads, for the ones come as the others go; with several micro
batches a step both. Not counted: the CUDA context (about 0.5 GiB), buffers of NCCL, fragments.
"""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.validation import size_pair
from errors import UserError

GIB = 2**30


def memory_table(
    cfg: Any, terms: Iterable[str], student: nn.Module, gpus: list[int], device: str = "cuda"
) -> tuple[dict, list[dict]]:
    """Parameter counts, and one row for each number of GPUs: GiB of each part, total and total with checkpointing.

    Args:
        cfg: a training configuration (of one stage).
        terms: the losses in use.
        student: backbone and heads, on the meta device if it would not fit.
        device: "cpu" counts the attention weights that the CPU's bf16 path keeps.

    Raises:
        ValueError: for a number of GPUs that does not divide the batch, and for other backbones than a VisionTransformer.
    """
    if cfg.model.arch.startswith("timm:"):
        raise UserError(
            f"the memory of {cfg.model.arch} is not known; give a preset of models/vit.py"
        )
    terms = set(terms)
    counts = {name: _count(child) for name, child in student.named_children()}
    rows = [_row(cfg, terms, student, number, device) for number in gpus]
    return counts | {"all": _count(student)}, rows


def _row(cfg: Any, terms: set, student: nn.Module, gpus: int, device: str) -> dict:
    if gpus < 1 or cfg.batch_size % gpus:
        raise UserError(f"batch_size {cfg.batch_size} cannot be shared by {gpus} GPUs")
    images = min(cfg.batch_size // gpus, cfg.micro_batch_size or cfg.batch_size)
    low = 4 if cfg.precision == "fp32" else 2
    parameters = _count(student)
    own_gram = "gram" in terms and cfg.loss.gram.teacher != "ema"
    gram = _count(student.backbone) if own_gram else 0
    unit = max(_count(part) for part in _units(student))
    parts = {
        "parameters": 4 * parameters / gpus,
        "gradients": 4 * parameters / gpus,
        "optimizer": 8 * parameters / gpus,
        "teacher": 4 * parameters / gpus,
        "gram_teacher": 4 * gram / gpus,
        "gathered": 2 * low * unit if gpus > 1 else (low * parameters if low < 4 else 0),
    }
    kept, recomputed = activation_bytes(
        cfg, student.backbone, images, low, weights=device == "cpu" and low == 2
    )
    held = sum(parts.values()) - parts["gradients"]
    parts |= {
        "activations": kept,
        "activations_checkpointed": recomputed,
        "heads": head_bytes(cfg, terms, student, images, low),
    }
    several = images * gpus < cfg.batch_size  # micro batches
    for name, activations in (("total", kept), ("total_checkpointed", recomputed)):
        passing = activations + parts["heads"], parts["gradients"]
        parts[name] = held + (sum(passing) if several else max(passing))
    return {"gpus": gpus, "images": images} | {
        name: round(value / GIB, 3) for name, value in parts.items()
    }


def block_bytes(backbone: nn.Module, low: int, tokens: int, weights: bool) -> float:
    """What one block keeps for its backward pass, per token of D dimensions.

    8 D: the residual stream in float32 before both norms; low · D · (normed inputs of the two halves 2, queries, keys, values
    3, attention's output 1, LayerScale's inputs 2); the MLP's hidden layer before and after GELU, or a gated net's two
    inputs, gate and product. `weights`: attention weights of `tokens` a head, which a fused kernel does not keep.
    """
    config, dim = backbone.config, backbone.embed_dim
    hidden = (
        2 * backbone.blocks[0].mlp.fc1.out_features
        if config["ffn"] == "mlp"
        else 4 * backbone.blocks[0].mlp.w3.in_features
    )
    wide = 6 + 2 * (config["layerscale"] is not None)
    return 8 * dim + low * (wide * dim + hidden + weights * tokens * backbone.num_heads)


def activation_bytes(
    cfg: Any, backbone: nn.Module, images: int, low: int, weights: bool
) -> tuple[float, float]:
    """(kept, kept with checkpointing of the blocks): of global and local crops, with their pixels and final norm."""
    kept = recomputed = block = 0.0
    for kind in ("global", "local"):
        count, size = (
            getattr(cfg.crops, f"{kind}_count"),
            size_pair(getattr(cfg.crops, f"{kind}_size")),
        )
        tokens = (
            1
            + backbone.num_registers
            + (size[0] // backbone.patch_size) * (size[1] // backbone.patch_size)
        )
        rows = count * images * tokens
        per_token = block_bytes(backbone, low, tokens, weights)
        ends = (
            count * images * (4 + low) * cfg.data.channels * size[0] * size[1]
            + rows * 12 * backbone.embed_dim
        )
        kept += ends + rows * backbone.depth * per_token
        recomputed += ends + rows * backbone.depth * 4 * backbone.embed_dim
        block = max(block, rows * per_token)
    return kept, recomputed + block


def head_bytes(cfg: Any, terms: set, student: nn.Module, images: int, low: int) -> float:
    """Projection heads, logits, targets and their gradients at the start of the backward pass."""
    crops, loss = cfg.crops, cfg.loss
    height, width = size_pair(crops.global_size)
    patches = (height // student.backbone.patch_size) * (width // student.backbone.patch_size)
    masked = (
        crops.global_count
        * images
        * patches
        * loss.ibot.mask_probability
        * sum(loss.ibot.mask_ratio)
        / 2
    )
    rows = {
        "dino": (
            (crops.global_count + crops.local_count) * images,
            crops.global_count * images,
            student.dino_head,
            loss.dino,
        )
    }
    if "ibot" in terms:
        shared = student.ibot_head is None
        rows["ibot"] = (
            (masked, masked, student.dino_head, loss.dino)
            if shared
            else (masked, masked, student.ibot_head, loss.ibot)
        )
    total = 0.0
    for name, (own, teacher, head, settings) in rows.items():
        hidden = 2 * settings.hidden * (settings.layers - 1) + 6 * settings.bottleneck
        total += own * low * (hidden + 2 * settings.prototypes) + teacher * 4 * settings.prototypes
        if loss.dino.last_layer != "plain" and (name == "dino" or student.ibot_head is not None):
            total += low * head.last_layer.weight_v.numel()  # the rows in effect
    return total


def _units(student: nn.Module) -> list[nn.Module]:
    """What is gathered at a time: blocks, heads."""
    return [
        *student.backbone.blocks,
        *(child for name, child in student.named_children() if name != "backbone"),
    ]


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# ----------------------------------------------------------------- measured


def forget_peak() -> None:
    """Where the system can (CUDA, Linux); elsewhere peaks are those of the whole process."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")
