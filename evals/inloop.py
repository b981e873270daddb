"""Probes, pictures and exports of the teacher during training."""

import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from data.annotated import Annotated, has_masks
from data.evaluation import EvalDataset
from data.pixels import channel_statistics, full_scale
from data.sources.specs import ImageData, open_labelled
from engine import distributed
from engine.config import ProbeConfig, TrainConfig
from engine.launch import loader_workers
from engine.logger import say_passed_over
from engine.parallel import is_sharded
from engine.run import TeacherOutputs
from engine.validation import size_pair
from evals.curves import draw_curves
from evals.figures import draw_report
from evals.knn import knn_probe
from evals.linear import linear_probe
from evals.maps import prefix_attention
from evals.patches import mean_locality, patch_knn_segmentation
from evals.reading import first_readable
from evals.report import write_report
from evals.report_images import ReportImages, draw_report_images, read_report_images
from models.features import Preprocessing
from models.weights.save import save_model


def teacher_outputs(
    cfg: TrainConfig, images: ImageData, teacher: nn.Module, device: torch.device
) -> TeacherOutputs:
    """How to export, draw and probe the teacher of a run on `images`.

    Args:
        teacher: as it trains; where it is sharded, its ranks probe it together.
    """
    size = size_pair(cfg.crops.global_size)
    mean, std = channel_statistics(cfg.data.channels, cfg.data.mean, cfg.data.std)
    prepare = partial(EvalDataset, resize=max(size), size=size, mean=mean, std=std)
    workers = loader_workers(cfg.data.workers, device.type, distributed.world_size())
    reading: dict[str, Any] = {"workers": workers, "unreadable": {}}
    if is_sharded(cfg.strategy):
        reading["spare"] = torch.zeros(1, cfg.data.channels, *size, device=device)
    train = val = masks = None
    if cfg.probe.every > 0:
        train, val = open_labelled(cfg.probe.train, cfg.probe.val, cfg.data.channels)
        say_passed_over(train, val, said=images.passed_over)
        shape = size, teacher.backbone.patch_size, mean, std
        if cfg.probe.patches and has_masks(train, val):
            masks = [Annotated(data, "mask", *shape) for data in (train, val)]

    @cache
    def report() -> Callable[[nn.Module, Path, int], None]:
        data = images if val is None else val
        shown = read_report_images(cfg, data, prepare(data), teacher.backbone, mean, std)
        return partial(report_teacher, shown=shown) if shown else lambda *_: None

    def probe() -> dict[str, float]:
        labelled = prepare(train), prepare(val)
        return probe_teacher(cfg.probe, teacher.backbone, *labelled, masks, device, **reading)

    locality = partial(mean_locality, data=prepare(images), device=device)
    locality = partial(locality, unreadable=reading["unreadable"])
    scale = max((full_scale(images.image(index)) for index in first_readable(images, 1)), default=1)
    if images.span and len(images.span) == 1 and images.span[0][0] == 0:
        scale = images.span[0][1]
    values = {"scale": float(scale), "window": images.window, "span": images.span}
    preprocessing = Preprocessing(size, max(size), mean, std, **values)
    export = partial(save_model, preprocessing=preprocessing)
    return TeacherOutputs(export, report, None if train is None else probe, draw_curves, locality)


@torch.compiler.set_stance("eager_on_recompile")  # images of other sizes compile nothing anew
def probe_teacher(
    which: ProbeConfig,
    backbone: nn.Module,
    train: Dataset,
    val: Dataset,
    masks: Sequence[Dataset] | None,
    device: torch.device,
    *,
    unreadable: dict[str, str],
    **options: Any,
) -> dict[str, float]:
    """Fields of metrics.jsonl; all ranks together. The run's random state stays as it is.

    Args:
        which: says what is measured.
        train, val: items (image normalised, label, index).
        masks: the same images with masks, or None where there are none.
        unreadable: of `read_batches`; how many could not be read so far is a value too.
        options: of `extract_features`.
    """
    values, reading = {}, {"unreadable": unreadable, **options}
    if which.knn:
        values["probe/knn"] = knn_probe(backbone, train, val, device, **reading)
    if which.linear:
        values["probe/linear"] = linear_probe(backbone, train, val, device, **reading)
    if which.patches:
        values["probe/locality"] = mean_locality(backbone, val, device, unreadable=unreadable)
        if masks:
            found = patch_knn_segmentation(backbone, *masks, device, **reading)
            values["probe/miou"] = found["miou"]
    if unreadable:
        values["probe/unreadable"] = len(unreadable)
    return values


@torch.inference_mode()
def report_teacher(model: nn.Module, folder: Path, step: int, shown: ReportImages) -> None:
    """Draws report.png, the pictures of a step in report_images/, and report.html.

    Attention is drawn where the backbone has any.
    """
    since = time.perf_counter()
    backbone, images = model.backbone, shown.inputs
    attention = prefix_attention(backbone, images)[0] if hasattr(backbone, "attention") else None
    features, statistics = backbone(images), {"mean": shown.mean, "std": shown.std}
    drawn = {"crops": shown.crops, "attention": attention, "title": shown.title, **statistics}
    draw_report(folder / "report.png", images=images, features=features, **drawn)
    draw_report_images(folder / "report_images", step, shown, backbone, features, attention)
    write_report(folder / "report.html", {shown.title: folder}, since)
