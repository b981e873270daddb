"""Zero-shot probe, picture and export of an alignment during training."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from data.evaluation import EvalDataset
from data.images import ImageData, class_names
from data.sources.specs import open_labelled
from engine import distributed
from engine.align_config import AlignTrainConfig
from engine.cli import preparation
from engine.launch import loader_workers
from engine.logger import say_passed_over
from engine.run import TeacherOutputs
from evals.curves import draw_curves
from evals.frozen import progress_bar
from evals.knn import FeatureRows, extract_features
from evals.photographs import read_photographs
from evals.token_maps import draw_queries
from evals.zero_shot import TEMPLATES, pooled_tokens, read_names, top_accuracy
from models.alignment import Alignment, TextModel, save_alignment
from models.text import Tokenizer


def cached_tokens(
    cfg: AlignTrainConfig, backbone: nn.Module, images: ImageData, device: torch.device
) -> tuple[FeatureRows, dict[str, str]]:
    """CLS and mean of the patches (n, 2, D) of all images, on every rank; and what is unreadable.

    Images are prepared as the backbone's own preprocessing says.
    """
    unreadable: dict[str, str] = {}
    workers = loader_workers(cfg.data.workers, device.type, distributed.world_size())
    reading = {"workers": workers, "unreadable": unreadable}
    progress = progress_bar(f"features of {cfg.align.backbone}", unit="batch")
    items = EvalDataset(images, **preparation(backbone.preprocessing, None, None))
    describe = partial(pooled_tokens, backbone)
    rows = extract_features(describe, items, device, progress=progress, **reading)
    return FeatureRows(*distributed.from_main(tuple(rows))), unreadable


def alignment_outputs(
    cfg: AlignTrainConfig,
    images: ImageData,
    backbone: nn.Module,
    tokenizer: Tokenizer,
    copy_alignment: Callable[..., Alignment | None],
    device: torch.device,
) -> TeacherOutputs:
    """How to export, draw and probe the alignment of a run.

    Args:
        copy_alignment: a whole copy in the host's memory, with `everywhere=True` on every rank.
    """
    train = val = None
    if cfg.probe.every > 0:
        train, val = open_labelled(cfg.probe.train, cfg.probe.val, cfg.data.channels)
        say_passed_over(train, val, said=images.passed_over)
    cache: list[FeatureRows] = []  # of `val`, whose tokens stay the same

    def whole(alignment: Alignment) -> TextModel:
        return TextModel(backbone, alignment.to(device), tokenizer)

    def export(alignment: Alignment, folder: Path) -> None:
        spec = str(cfg.align.backbone)
        save_alignment(alignment, folder, backbone, spec, backbone.preprocessing)

    def report() -> Callable[[Alignment, Path, int], None]:
        source = cfg.probe.val if val is not None else cfg.data.train
        names = class_names(val)[:3] if val is not None else images.captions(0)[:3]
        size = min(backbone.preprocessing.size)

        def draw(alignment: Alignment, folder: Path, step: int) -> None:
            photographs = read_photographs([source], 4, backbone, size)
            draw_queries(folder / "report.png", photographs, whole(alignment), names)

        return draw

    def probe() -> dict[str, float]:
        model, value = whole(copy_alignment(everywhere=True)), None
        describe = partial(image_vectors, model)
        if not cfg.align.head_blocks:
            cache[:] = cache or [cached_tokens(cfg, backbone, val, device)[0]]
            vectors, labels = describe_tokens(model, cache[0].features.to(device)), cache[0].labels
        else:
            items = EvalDataset(val, **preparation(backbone.preprocessing, None, None))
            vectors, labels, _ = extract_features(describe, items, device)
        if distributed.is_main():
            classes = model.encode_classes(read_names(None, class_names(train)), list(TEMPLATES))
            known = labels >= 0
            value = top_accuracy(vectors.cpu()[known], labels[known], classes.cpu())["top1"]
        return {"probe/zero_shot": distributed.from_main(value)}

    return TeacherOutputs(export, report, None if val is None else probe, draw_curves)


def image_vectors(model: TextModel, images: Tensor) -> Tensor:
    """(B, E) of L2 norm 1."""
    return model(images).cls


@torch.no_grad()
def describe_tokens(model: TextModel, tokens: Tensor) -> Tensor:
    """(n, E) of L2 norm 1, of cached tokens (n, 2, D)."""
    vectors, _ = model.alignment.vision_head(tokens)
    return torch.nn.functional.normalize(vectors.float(), dim=-1)


def say_cut(tokenizer: Tokenizer, texts: list[str]) -> str | None:
    """A sentence on captions that are longer than the context, or None."""
    cut = sum(map(tokenizer.is_cut, texts))
    if not cut:
        return None
    return (
        f"{cut} of {len(texts)} captions looked at are longer than the {tokenizer.context} tokens "
        "of align.context; their ends are cut"
    )
