"""Memory of a GPU in training, computed from a configuration: nothing is allocated.

Bytes, with P parameters of the student, N GPUs that share its weights (FSDP), b = batch_size / N
images a GPU (at most micro_batch_size at a time), low = 2 under bf16 or fp16 and 4 under float32:

    parameters       4 P / N           float32
    gradients        4 P / N           float32
    optimizer        8 P / N           AdamW's two moments
    teacher          4 P / N           and as much of the backbone again for a Gram teacher, an
                                       anchor
    gathered         low (2 U + P if N = 1)   the largest unit U that FSDP gathers (block or head),
                                       and the next; alone, the low-precision copies that autocast
                                       makes of all weights
    activations      tokens · depth · per token, see `block_bytes`; with checkpointing
                                       tokens · depth · 4 D, and one block
    heads            rows · (MLP + K · 2 low) + teacher's rows · 4 K + prototypes that are
                                       normalised each step

The total counts the larger of gradients and of activations with heads, because gradients come as
activations go; with several micro batches a step it counts both. Not counted: the CUDA context
(about 0.5 GiB), buffers of NCCL, fragments.
"""

import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from engine.config import TrainConfig
from engine.validation import size_pair
from errors import UserError

GIB = 2**30


def memory_table(
    cfg: TrainConfig,
    terms: Iterable[str],
    student: nn.Module,
    gpus: list[int],
    device: str = "cuda",
) -> tuple[dict, list[dict]]:
    """Parameter counts, and one row for each number of GPUs.

    Args:
        cfg: of one stage.
        terms: the losses in use.
        student: backbone and heads, on the meta device if it would not fit.
        device: "cpu" counts the attention weights that the CPU's bf16 path keeps.

    Returns:
        Counts by the names of the student's modules and "all"; rows with the GiB of each part, in
        total, and in total with checkpointing.

    Raises:
        UserError: for a number of GPUs that does not divide the batch, and for other backbones
            than a VisionTransformer.
    """
    if cfg.model.arch.startswith("timm:"):
        raise UserError(
            f"the memory of {cfg.model.arch} is not known; give a preset of models/vit.py"
        )
    terms = set(terms)
    counts = {name: _count(child) for name, child in student.named_children()}
    rows = [_row(cfg, terms, student, number, device) for number in gpus]
    return counts | {"all": _count(student)}, rows


def _row(cfg: TrainConfig, terms: set[str], student: nn.Module, gpus: int, device: str) -> dict:
    if gpus < 1 or cfg.batch_size % gpus:
        raise UserError(f"batch_size {cfg.batch_size} cannot be shared by {gpus} GPUs")
    images = min(cfg.batch_size // gpus, cfg.micro_batch_size or cfg.batch_size)
    low = 4 if cfg.precision == "fp32" else 2
    parameters = _count(student)
    own_gram = "gram" in terms and cfg.loss.gram.teacher != "ema"
    frozen = _count(student.backbone) * (own_gram + ("anchor" in terms))
    copies = low * parameters if low < 4 else 0
    unit = max(_count(part) for part in _units(student))
    parts = {
        "parameters": 4 * parameters / gpus,
        "gradients": 4 * parameters / gpus,
        "optimizer": 8 * parameters / gpus,
        "teacher": 4 * parameters / gpus,
        "gram_teacher": 4 * frozen / gpus,
        "gathered": 2 * low * unit if gpus > 1 else copies,
    }
    weights = device == "cpu" and low == 2
    kept, recomputed = activation_bytes(cfg, student.backbone, images, low, weights)
    held = sum(parts.values()) - parts["gradients"]
    parts |= {"activations": kept, "activations_checkpointed": recomputed}
    parts["heads"] = head_bytes(cfg, terms, student, images, low)
    several = images * gpus < cfg.batch_size  # micro batches
    for name, activations in (("total", kept), ("total_checkpointed", recomputed)):
        passing = activations + parts["heads"], parts["gradients"]
        parts[name] = held + (sum(passing) if several else max(passing))
    gib = {name: round(value / GIB, 3) for name, value in parts.items()}
    return {"gpus": gpus, "images": images} | gib


def block_bytes(backbone: nn.Module, low: int, tokens: int, weights: bool) -> float:
    """What one block keeps for its backward pass, per token of D dimensions.

    8 D: the residual stream in float32 before both norms. low · D each: the normed inputs of the
    two halves (2), queries, keys and values (3), attention's output (1), LayerScale's inputs (2).
    low each: the MLP's hidden layer before and after GELU, or a gated net's two inputs, gate and
    product. `weights`: attention weights of `tokens` a head, which a fused kernel does not keep.
    """
    config, dim, mlp = backbone.config, backbone.embed_dim, backbone.blocks[0].mlp
    hidden = 2 * mlp.fc1.out_features if config["ffn"] == "mlp" else 4 * mlp.w3.in_features
    wide = 6 + 2 * (config["layerscale"] is not None)
    return 8 * dim + low * (wide * dim + hidden + weights * tokens * backbone.num_heads)


def activation_bytes(
    cfg: TrainConfig, backbone: nn.Module, images: int, low: int, weights: bool
) -> tuple[float, float]:
    """Of all crops, with their pixels and final norm: (kept, kept with checkpointing of blocks)."""
    kept = recomputed = block = 0.0
    crops = cfg.crops
    kinds = (crops.global_count, crops.global_size), (crops.local_count, crops.local_size)
    for count, size in kinds:
        height, width = size_pair(size)
        tokens = 1 + backbone.num_registers + _patches(backbone, size)
        rows = count * images * tokens
        per_token = block_bytes(backbone, low, tokens, weights)
        pixels = count * images * (4 + low) * cfg.data.channels * height * width
        ends = pixels + rows * 12 * backbone.embed_dim
        kept += ends + rows * backbone.depth * per_token
        recomputed += ends + rows * backbone.depth * 4 * backbone.embed_dim
        block = max(block, rows * per_token)
    return kept, recomputed + block


def head_bytes(
    cfg: TrainConfig, terms: set[str], student: nn.Module, images: int, low: int
) -> float:
    """Projection heads, logits, targets and their gradients at the start of the backward pass."""
    crops, loss = cfg.crops, cfg.loss
    teacher_rows = crops.global_count * images
    patches = teacher_rows * _patches(student.backbone, crops.global_size)
    masked = patches * loss.ibot.mask_probability * sum(loss.ibot.mask_ratio) / 2
    student_rows = (crops.global_count + crops.local_count) * images
    rows = {"dino": (student_rows, teacher_rows, student.dino_head, loss.dino)}
    if "ibot" in terms and student.ibot_head is None:
        rows["ibot"] = (masked, masked, student.dino_head, loss.dino)
    elif "ibot" in terms:
        rows["ibot"] = (masked, masked, student.ibot_head, loss.ibot)
    total = 0.0
    for name, (own, teacher, head, settings) in rows.items():
        hidden = 2 * settings.hidden * (settings.layers - 1) + 6 * settings.bottleneck
        total += own * low * (hidden + 2 * settings.prototypes) + teacher * 4 * settings.prototypes
        if loss.dino.last_layer != "plain" and (name == "dino" or student.ibot_head is not None):
            total += low * head.last_layer.weight_v.numel()  # the rows in effect
    return total


def _units(student: nn.Module) -> list[nn.Module]:
    """What is gathered at a time: blocks, heads."""
    heads = [child for name, child in student.named_children() if name != "backbone"]
    return [*student.backbone.blocks, *heads]


def _patches(backbone: nn.Module, size: int | list[int]) -> int:
    """Of a crop of that size."""
    height, width = size_pair(size)
    return (height // backbone.patch_size) * (width // backbone.patch_size)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def as_table(rows: list[dict]) -> str:
    """One line a row under their keys, in columns."""
    lines = [list(rows[0])]
    lines += [[str(value) for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        line[:] = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
    return "\n".join("  ".join(line) for line in lines)


# ----------------------------------------------------------------- measured


def forget_peak() -> None:
    """Restarts the peak memory, on CUDA and Linux; elsewhere it is that of the whole process."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")
