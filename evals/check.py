"""`train.py --check`: a minute before a run, which says what would go wrong in it.

It looks at a sample of the images, times the loader and a few steps on random pixels, and computes
the rest. Nothing is written to the run folder. A table goes to standard error, the same as JSON to
standard output. Exit status 2 where the run would fail, else 0.
"""

import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from data.sources.specs import open_data
from engine import distributed, settings
from engine.cli import MISTAKE, print_result
from engine.config import TrainConfig
from engine.folder import check_folder
from engine.gram import check_gram_teachers
from engine.launch import loader_workers, read_launch
from engine.lengths import micro_batch_size
from engine.optim import span_steps
from engine.resume import has_begun
from engine.stages import Stage
from engine.start import build_student, load_init, plan_run
from engine.validation import size_pair
from engine.views import stage_loader
from errors import UserError
from evals.data_check import Report, check_data
from evals.live_memory import GIB, StepTrial, memory_there
from evals.memory import memory_table
from models.ssl_model import count_parameters

# 65,536 prototypes with 4,000 to 200,000 images left the loss at its first value
# (facebookresearch/dinov2 issues 143 and 298); that each needs four images is our rule.
IMAGES_A_PROTOTYPE = 4
# Sinkhorn fills all prototypes evenly from one batch. The most that a published recipe asks of a
# global crop is 32: 262,144 prototypes for 2 x 4,096 in DINOv3's 7B.
PROTOTYPES_A_VIEW = 32
# The teacher averages about 1 / (1 - ema_momentum) steps; a run of less than three such spans ends
# near its first weights. The quickstart learns in 300 steps (tests/test_objectives.py). Ours.
SPANS, FEWEST_STEPS = 3, 300
KEEPS_UP = 0.9  # loader rate over step rate: engine/config.py asks for a data wait below 0.1
LOST_HOURS = 1.0  # of work to a kill (ours)
TIMED_SECONDS = 10.0  # for the loader, and for the step


def check_run(
    config: str | None, cfg: TrainConfig, train_step: Callable, build_centering: Callable
) -> None:
    """Prints the table and the JSON; exits with status 2 where the run would fail.

    Under a launcher only rank 0 does anything.

    Args:
        config: the name of the configuration, for the result.
        train_step: of train.py.
        build_centering: of losses/centering.py.

    Raises:
        UserError, OSError: for mistakes that the run itself refuses at its start.
    """
    launch = read_launch(os.environ)
    if int(launch.get("RANK", 0)):
        return
    start, report, ranks = time.perf_counter(), Report(), int(launch.get("WORLD_SIZE", 1))
    device = distributed.choose_device(cfg.device)
    cfg, initial = load_init(cfg)
    images = open_data(cfg.data.train, cfg.data.channels)
    stages = plan_run(cfg, images)
    check_folder(Path(cfg.output_dir), cfg.overwrite)
    if has_begun(cfg):
        settings.refuse_changes(cfg, Path(cfg.output_dir) / "config.yaml")
    check_gram_teachers(stages)
    stage = _heaviest(cfg, stages)
    micro = micro_batch_size(stage.cfg, ranks, "koleo" in stage.schedules)
    check_data(report, stage.cfg, images, "koleo" in stage.schedules)
    with torch.device("meta"):
        student = build_student(replace(cfg, init=None), "ibot" in stage.schedules)
    seconds, there = None, memory_there(device)
    if 20 * count_parameters(student) < 0.9 * there:  # weights, gradients, moments, teacher
        trial = StepTrial(stage, (train_step, build_centering), device, initial, ranks)
        _memory(report, trial, there, micro)
        seconds = _speed(report, trial, micro)
    else:
        _computed_memory(report, stage, student, there, ranks, device.type)
    _prototypes(report, stage, len(images))
    _lengths(report, stages, len(images), seconds)
    _disk(report, cfg, count_parameters(student), stages[-1].stop)
    _print(report, config, time.perf_counter() - start)


def _heaviest(cfg: TrainConfig, stages: list[Stage]) -> Stage:
    """The stage with the most pixels at once, with the largest sizes of `crops.mix`."""
    largest, most = stages[0], 0
    for stage in stages:
        own, crops = stage.cfg, stage.cfg.crops
        sizes = max(crops.mix or [crops], key=lambda pair: size_pair(pair.global_size))
        sizes = {"global_size": sizes.global_size, "local_size": sizes.local_size, "mix": None}
        data = replace(own.data, mean=cfg.data.mean, std=cfg.data.std)
        height, width = size_pair(sizes["global_size"])
        pixels = height * width * min(own.micro_batch_size or own.batch_size, own.batch_size)
        if pixels > most:
            now = replace(own, crops=replace(crops, **sizes), data=data)
            largest, most = replace(stage, cfg=now), pixels
    return largest


def _memory(report: Report, trial: StepTrial, there: float, micro: int) -> None:
    local = trial.cfg.batch_size // trial.ranks
    needed, parts = trial.peak(local, micro), trial.parts()
    parts["activations"] = needed - sum(parts.values()) + parts["gradients"]
    parts = {name: round(size / GIB, 4) for name, size in parts.items()}
    largest = 0
    for size in (size for size in range(1, local + 1) if local % size == 0):
        try:
            asked = replace(trial.cfg, micro_batch_size=size, loss=trial.asked_loss)
            micro_batch_size(asked, trial.ranks, "koleo" in trial.stage.schedules)
        except UserError:  # KoLeo's groups do not divide it
            continue
        largest = size if trial.peak(local, size) <= there else largest
    numbers = {"memory_gib": needed / GIB, "memory_there_gib": there / GIB}
    numbers |= {"memory_parts_gib": parts, "largest_micro_batch_size": largest}
    text = f"{needed / GIB:.2f} GiB needed, {there / GIB:.1f} there; processes: {trial.ranks}"
    report.row("memory", text, processes=trial.ranks, **numbers)
    parts = ", ".join(f"{name} {size:.2f}" for name, size in parts.items())
    report.row("", f"{parts} (with the gradients that live at the peak)")
    report.row("", f"micro_batch_size is {micro}; the largest that fits is {largest or 'none'}")
    if needed > there:
        change = f"micro_batch_size={largest}, which fits" if largest else "the crop sizes"
        _does_not_fit(report, change, needed, there)


def _computed_memory(
    report: Report, stage: Stage, student: nn.Module, there: float, ranks: int, device: str
) -> None:
    """Of a network that is too large to be tried in this process."""
    try:
        _, (row,) = memory_table(stage.cfg, stage.schedules, student, [ranks], device)
    except UserError as error:
        report.row("memory", str(error))
        return
    needed = GIB * row["total" if stage.cfg.checkpointing == "none" else "total_checkpointed"]
    text = f"{needed / GIB:.1f} GiB needed (computed, no step was run), {there / GIB:.1f} there"
    report.row("memory", text, memory_gib=needed / GIB, memory_there_gib=there / GIB)
    if needed > there:
        _does_not_fit(report, "micro_batch_size", needed, there)


def _does_not_fit(report: Report, change: str, needed: float, there: float) -> None:
    says = f"a process needs {needed / GIB:.2f} GiB, {there / GIB:.2f} are there"
    change += "; or checkpointing=blocks, or strategy=fsdp on more GPUs"
    report.warn(change, says, "the run would end for want of memory", True)


def _speed(report: Report, trial: StepTrial, micro: int) -> float:
    """Seconds of a step, from what the step and the loader manage."""
    cfg, device, first = trial.cfg, trial.device, trial.stage.first
    step_rate = trial.images_a_second(micro, TIMED_SECONDS)
    few = replace(trial.stage, cfg=replace(cfg, batch_size=8))
    batches = stage_loader(few, first, trial.trainer.student.backbone.patch_size, device).dataset
    times, begin = [], time.perf_counter()
    while len(times) < 2 or (len(times) < 20 and time.perf_counter() - begin < TIMED_SECONDS):
        start = time.perf_counter()
        batches[first + len(times)].to(device)
        times.append(time.perf_counter() - start)
    workers = loader_workers(cfg.data.workers, device.type, trial.ranks)
    alone = 8 / min(times)
    rate, local = alone * max(1, workers), cfg.batch_size / trial.ranks
    waits, works = local / rate, local / step_rate
    seconds = max(waits, works) if workers else waits + works  # workers load beside the step
    text = f"step {step_rate:.1f} images/s a process; loader {rate:.1f}; data.workers {workers}"
    numbers = {"step_images_per_second": step_rate, "loader_images_per_second": rate}
    report.row("speed", text, step_seconds=seconds, workers=workers, **numbers)
    if rate < KEEPS_UP * step_rate:
        enough = int(step_rate / alone) + 1
        says = f"the loader gives {rate:.1f} images/s, the step takes {step_rate:.1f}"
        why = f"the step waits for images {1 - works / seconds:.0%} of the time"
        report.warn(f"data.workers={enough}, or make the image files smaller", says, why)
    return seconds


def _prototypes(report: Report, stage: Stage, images: int) -> None:
    loss, views = stage.cfg.loss, stage.cfg.batch_size * stage.cfg.crops.global_count
    heads = {"dino": loss.dino.prototypes}
    if "ibot" in stage.schedules and loss.ibot.prototypes:
        heads["ibot"] = loss.ibot.prototypes
    text = f"{heads['dino']:,} for {images:,} images, {views:,} global crops a step"
    report.row("prototypes", text, prototypes=heads)
    for name, count in heads.items():
        few = images // IMAGES_A_PROTOTYPE
        says = f"{count:,} prototypes for {images:,} images"
        why = "most of them never stand for an image, and the loss stays flat at ln K"
        if name == "dino" and loss.dino.centering == "sinkhorn" and PROTOTYPES_A_VIEW * views < few:
            few, says = PROTOTYPES_A_VIEW * views, f"{count:,} prototypes, {views:,} global crops"
            why = "Sinkhorn spreads each batch evenly over all prototypes, far more than it fills"
        if count > few:
            fitting = 2 ** (max(few, 1).bit_length() - 1)
            report.warn(f"loss.{name}.prototypes={fitting}", says, why)


def _lengths(report: Report, stages: list[Stage], images: int, seconds: float | None) -> None:
    """Steps of the run, spans that are cut, time to the end, work that a kill loses."""
    cfg, total, an_epoch = stages[0].cfg, stages[-1].stop, images / stages[0].cfg.batch_size
    epochs = sum((stage.stop - stage.first) * stage.cfg.batch_size for stage in stages) / images
    text = f"{total:,} steps, {epochs:.3g} epochs of {an_epoch:.4g} steps"
    report.row("length", text, total_steps=total, epochs=epochs, steps_an_epoch=an_epoch)
    momentum = cfg.schedule.ema_momentum.peak
    needed = max(FEWEST_STEPS, round(SPANS / max(1 - momentum, 1e-6)))
    if total < needed:
        says = f"the run has {total} steps ({epochs:.3g} epochs of {an_epoch:.4g})"
        why = f"at schedule.ema_momentum {momentum} the teacher takes about {needed} to learn"
        report.warn("total_steps, or a smaller batch_size", says, why)
    for stage in stages:
        steps = stage.stop - stage.first
        schedules = {name: item for name, item in vars(stage.cfg.schedule).items() if item}
        for name, item in schedules.items():
            if max(span_steps(span or 0, steps) for span in (item.warmup, item.decay)) > steps:
                says = f"schedule.{name} has spans longer than the {steps} steps of the run"
                why = "they are cut, so it never reaches its last value"
                report.warn(f"schedule.{name}.warmup or .decay, in %", says, why)
    if seconds is not None:
        hours, lost = (
            steps * seconds / 3600 for steps in (total, min(cfg.checkpoint.every, total))
        )
        text = f"{hours:.2f} hours to the end without probes; a kill loses up to {lost:.2f}"
        report.row("time", text, hours=hours, lost_hours=lost)
        if lost > LOST_HOURS:
            every = max(1, int(cfg.checkpoint.every * LOST_HOURS / lost))
            says = f"a kill loses up to {lost:.1f} hours"
            why = f"a checkpoint is written every {cfg.checkpoint.every} steps only"
            report.warn(f"checkpoint.every={every}", says, why)


def _disk(report: Report, cfg: TrainConfig, parameters: int, total: int) -> None:
    """A checkpoint has student, teacher and two moments; one more is written before one goes.
    `teacher`, `best` and each snapshot hold a teacher."""
    folder = Path(cfg.output_dir).absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    checkpoints = min(cfg.checkpoint.keep + 1, -(-total // cfg.checkpoint.every))
    snapshots = total // cfg.checkpoint.snapshot if cfg.checkpoint.snapshot else 0
    needed = (16 * checkpoints + 4 * (2 + snapshots)) * parameters / GIB
    free = shutil.disk_usage(there).free / GIB
    text = f"{needed:.3g} GiB for {checkpoints} checkpoints, {snapshots} snapshots; {free:.1f} free"
    report.row("disk", text, disk_gib=needed, disk_free_gib=free)
    if needed > free:
        says = f"the run writes {needed:.3g} GiB, {free:.3g} GiB are free at {there}"
        why = "the run fails when it saves to a full disk"
        report.warn("output_dir, checkpoint.keep, checkpoint.snapshot", says, why, True)


def _print(report: Report, config: str | None, seconds: float) -> None:
    lines = [f"{name:<11} {text}" for name, text in report.rows]
    for item in report.warnings:
        kind = "error" if item["fails"] else "warning"
        lines.append(f"{kind}: {item['says']}; {item['why']}. Change {item['change']}")
    print("\n".join(lines if report.warnings else [*lines, "no warnings"]), file=sys.stderr)
    fails = any(item["fails"] for item in report.warnings)
    result = {"task": "check", "config": config, "fails": fails, "warnings": report.warnings}
    print_result(result | report.numbers | {"seconds": round(seconds, 1)})
    if fails:
        sys.exit(MISTAKE)
