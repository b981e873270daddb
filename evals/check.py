"""`train.py --check`: about a minute before a run, which says what would go wrong in it.

A sample of the images, a few steps on random pixels and arithmetic. Nothing is trained, and nothing
is written to the run folder. The table is for standard error, the same as JSON for standard output.
Exit status 2 where the run would fail, else 0.
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

from data.images import ImageData
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
from evals.live_memory import StepTrial, memory_there
from evals.memory import memory_table
from models.ssl_model import count_parameters

GIB = 2**30
# Each prototype needs images to stand for: 65,536 with 4,000 to 200,000 images left the loss at its
# first value (facebookresearch/dinov2 issues 143 and 298). The rule is ours.
IMAGES_A_PROTOTYPE = 4
# Sinkhorn fills every prototype equally from one batch. DINOv3's 7B has 262,144 for 2 x 4,096 views,
# which is the most a published recipe asks of a view.
PROTOTYPES_A_VIEW = 32
# The teacher averages about 1 / (1 - m) steps; a run of fewer than three such spans ends with much
# of the first weights in it. The quickstart learns in 300 steps (tests/test_objectives.py). Ours.
SPANS, FEWEST_STEPS = 3, 300
KEEPS_UP = 0.9  # loader rate over step rate: engine/config.py asks for a data wait below 0.1
LOST_HOURS = 1.0  # of work, to a kill (ours)
TIMED_SECONDS = 10.0  # for the loader, and for the step


def check_run(config: str | None, cfg: TrainConfig, train_step: Callable) -> None:
    """Prints the table and the JSON; exits with status 2 where the run would fail.

    Args:
        config: the name of the configuration, for the result.
        train_step: of train.py.

    Raises:
        UserError, OSError: for mistakes that the run itself refuses at its start.
    """
    launch = read_launch(os.environ)
    if int(launch.get("RANK", 0)):
        return
    start, report = time.perf_counter(), Report()
    ranks = int(launch.get("WORLD_SIZE", 1))
    device = distributed.choose_device(cfg.device)
    cfg, initial = load_init(cfg)
    images = open_data(cfg.data.train, cfg.data.channels)
    stages = plan_run(cfg, images)
    folder = Path(cfg.output_dir)
    check_folder(folder, cfg.overwrite)
    if has_begun(cfg):
        settings.refuse_changes(cfg, folder / "config.yaml")
    check_gram_teachers(stages)
    stage = _heaviest(cfg, stages)
    terms = stage.schedules
    micro = micro_batch_size(stage.cfg, ranks, "koleo" in terms)
    check_data(report, stage.cfg, images, "koleo" in terms)
    trial = _memory(report, stage, train_step, device, initial, ranks, micro)
    seconds = _speed(report, stage, trial, device, ranks, micro) if trial else None
    _prototypes(report, stage, len(images))
    _lengths(report, stages, len(images), seconds)
    with torch.device("meta"):
        parameters = count_parameters(build_student(replace(cfg, init=None), "ibot" in terms))
    _disk(report, cfg, parameters, stages[-1].stop)
    _print(report, config, time.perf_counter() - start)


def _heaviest(cfg: TrainConfig, stages: list[Stage]) -> Stage:
    """The stage with the most pixels at once, with the largest sizes of `crops.mix`."""

    def pixels(stage: Stage) -> int:
        height, width = size_pair(stage.cfg.crops.global_size)
        return height * width * min(stage.cfg.micro_batch_size or 2**62, stage.cfg.batch_size)

    largest = []
    for stage in stages:
        crops = stage.cfg.crops
        sizes = max(crops.mix or [crops], key=lambda pair: size_pair(pair.global_size))
        own = {"global_size": sizes.global_size, "local_size": sizes.local_size, "mix": None}
        data = replace(stage.cfg.data, mean=cfg.data.mean, std=cfg.data.std)
        now = replace(stage.cfg, crops=replace(crops, **own), data=data)
        largest.append(replace(stage, cfg=now))
    return max(largest, key=pixels)


def _memory(
    report: Report,
    stage: Stage,
    train_step: Callable,
    device: torch.device,
    initial: nn.Module | None,
    ranks: int,
    micro: int,
) -> StepTrial | None:
    """The trial steps; None where not even the weights and moments fit."""
    cfg, terms, there = stage.cfg, stage.schedules, memory_there(device)
    keys = "batch_size, micro_batch_size, checkpointing=blocks, strategy=fsdp, the crop sizes"
    with torch.device("meta"):
        student = build_student(replace(cfg, init=None), "ibot" in terms)
    states = 16 * count_parameters(student)  # weights, gradients, two moments; the teacher's 4 more
    if 1.25 * states > 0.9 * there:
        _, (row,) = memory_table(cfg, terms, student, [ranks], device.type)
        needed = GIB * row["total" if cfg.checkpointing == "none" else "total_checkpointed"]
        text = f"{needed / GIB:.1f} GiB needed (computed, no step was run), {there / GIB:.1f} there"
        report.row("memory", text, memory_gib=needed / GIB, memory_there_gib=there / GIB)
        if needed > there:
            says = f"a process needs {needed / GIB:.1f} GiB, {there / GIB:.1f} GiB are there"
            report.warn(keys, says, "the run would end for want of memory", True)
        return None
    trial = StepTrial(stage, train_step, device, initial, ranks)
    local = cfg.batch_size // ranks
    needed = trial.peak(local, micro)
    fitting = [size for size in _micro_sizes(stage, ranks) if trial.peak(local, size) <= there]
    largest = max(fitting, default=0)
    gib = {"parameters": 4 * trial.parameters, "gradients": 4 * trial.trained}
    gib |= {"optimizer": 8 * trial.trained}
    gib["teacher"] = max(trial.held - sum(gib.values()) + gib["gradients"], 0)
    share = ranks if cfg.strategy == "fsdp" else 1
    gib = {name: size / share / GIB for name, size in gib.items()}
    gib["activations"] = needed / GIB - sum(gib.values()) + gib["gradients"]
    numbers = {"memory_gib": needed / GIB, "memory_there_gib": there / GIB, "processes": ranks}
    numbers |= {"memory_parts_gib": {name: round(size, 4) for name, size in gib.items()}}
    text = f"{needed / GIB:.2f} GiB needed, {there / GIB:.1f} there, {ranks} process(es)"
    report.row("memory", text, largest_micro_batch_size=largest, **numbers)
    parts = ", ".join(f"{name} {size:.2f}" for name, size in gib.items())
    report.row("", f"GiB: {parts} (with those gradients that live at the peak)")
    report.row("", f"micro_batch_size is {micro}; the largest that fits is {largest or 'none'}")
    if needed > there:
        says = f"a process needs {needed / GIB:.1f} GiB, {there / GIB:.1f} GiB are there"
        why = f"the run would end for want of memory; micro_batch_size={largest} would fit"
        why = why if largest else "the run would end for want of memory, at any micro_batch_size"
        report.warn(f"micro_batch_size={largest}" if largest else keys, says, why, True)
    return trial


def _micro_sizes(stage: Stage, ranks: int) -> list[int]:
    """Micro batches that divide a process's images and that KoLeo's groups divide."""
    local, sizes = stage.cfg.batch_size // ranks, []
    for size in (size for size in range(1, local + 1) if local % size == 0):
        try:
            cfg = replace(stage.cfg, micro_batch_size=size)
            sizes.append(micro_batch_size(cfg, ranks, "koleo" in stage.schedules))
        except UserError:
            continue
    return sizes


def _speed(
    report: Report, stage: Stage, trial: StepTrial, device: torch.device, ranks: int, micro: int
) -> float:
    """Seconds of a step of all ranks, from what the step and the loader manage."""
    step_rate = trial.images_a_second(micro, TIMED_SECONDS)
    few = replace(stage.cfg, batch_size=8)
    patch = trial.trainer.student.backbone.patch_size
    steps = stage_loader(replace(stage, cfg=few), stage.first, patch, device).dataset
    steps[stage.first].to(device)
    times, begin = [], time.perf_counter()
    while len(times) < 20 and time.perf_counter() - begin < TIMED_SECONDS:
        start = time.perf_counter()
        steps[stage.first + 1 + len(times)].to(device)
        times.append(time.perf_counter() - start)
    workers = loader_workers(stage.cfg.data.workers, device.type, ranks)
    alone = few.batch_size / sorted(times)[len(times) // 2]
    rate = alone * max(1, workers)
    local = stage.cfg.batch_size / ranks
    seconds = max(local / step_rate, local / rate)
    seconds = seconds if workers else local / step_rate + local / rate
    text = (
        f"step {step_rate:.1f} images/s a process; loader {rate:.1f} by {workers or 'no'} workers"
    )
    numbers = {"step_images_per_second": step_rate, "loader_images_per_second": rate}
    report.row("speed", text, step_seconds=seconds, workers=workers, **numbers)
    if rate < KEEPS_UP * step_rate:
        needed = max(1, -(-int(step_rate) // max(1, int(alone))))
        says = f"the loader gives {rate:.1f} images/s, the step takes {step_rate:.1f}"
        waits = 1 - (local / step_rate) / seconds
        why = f"the step waits for images {waits:.0%} of the time; {needed} workers would keep up"
        report.warn(f"data.workers={needed}, smaller image files, crops.local_count", says, why)
    return seconds


def _prototypes(report: Report, stage: Stage, images: int) -> None:
    loss, batch = stage.cfg.loss, stage.cfg.batch_size
    views = batch * stage.cfg.crops.global_count
    report.row(
        "prototypes", f"{loss.dino.prototypes:,} for {images:,} images, {views:,} views a step"
    )
    heads = {"dino": loss.dino.prototypes}
    if "ibot" in stage.schedules and loss.ibot.prototypes:
        heads["ibot"] = loss.ibot.prototypes
    for name, count in heads.items():
        sinkhorn = getattr(loss, name).centering == "sinkhorn" and name == "dino"
        few = max(16, images // IMAGES_A_PROTOTYPE)
        says = f"{count:,} prototypes for {images:,} images"
        why = "most prototypes never stand for an image, and the loss stays flat at ln K"
        if sinkhorn:
            few = min(few, PROTOTYPES_A_VIEW * views)
        if count > PROTOTYPES_A_VIEW * views and sinkhorn:
            says += f" and {views:,} global crops a step"
            why = f"Sinkhorn spreads each batch evenly over all prototypes; {why}"
        if count > few:
            report.warn(f"loss.{name}.prototypes={_power_of_two(few)}", says, why)


def _power_of_two(limit: int) -> int:
    return 2 ** (max(limit, 1).bit_length() - 1)


def _lengths(report: Report, stages: list[Stage], images: int, seconds: float | None) -> None:
    """Steps of the run, spans that are cut, time to the end, work that a kill loses."""
    cfg, total = stages[0].cfg, stages[-1].stop
    an_epoch = images / cfg.batch_size
    epochs = sum((stage.stop - stage.first) * stage.cfg.batch_size for stage in stages) / images
    text = f"{total:,} steps, {epochs:.3g} epochs of {an_epoch:.4g} steps"
    report.row("length", text, total_steps=total, epochs=epochs, steps_an_epoch=an_epoch)
    momentum = cfg.schedule.ema_momentum.peak
    needed = max(FEWEST_STEPS, round(SPANS / max(1 - momentum, 1e-6)))
    if total < needed:
        says = f"the run has {total} steps ({epochs:.3g} epochs of {an_epoch:.4g})"
        why = f"with schedule.ema_momentum {momentum} the teacher needs about {needed} to change"
        report.warn("total_steps (or epochs), a smaller batch_size", says, why)
    for stage in stages:
        steps = stage.stop - stage.first
        for name, item in vars(stage.cfg.schedule).items():
            for key in ("warmup", "decay") if item else ():
                span = getattr(item, key)
                if span and span_steps(span, steps) > steps:
                    says = (
                        f"schedule.{name}.{key} is {span}, the {stage.name or 'run'} {steps} steps"
                    )
                    why = "it is cut, so the schedule never comes to its end"
                    report.warn(f"schedule.{name}.{key}, as a share such as 10%", says, why)
    if seconds is None:
        return
    hours, lost = total * seconds / 3600, min(cfg.checkpoint.every, total) * seconds / 3600
    text = f"{_hours(hours)} to the end without probes; a kill loses up to {_hours(lost)}"
    report.row("time", text, hours=hours, lost_hours=lost)
    if lost > LOST_HOURS:
        says = (
            f"a kill loses up to {_hours(lost)}, the {cfg.checkpoint.every} steps of a checkpoint"
        )
        key = f"checkpoint.every={max(1, int(LOST_HOURS / lost * cfg.checkpoint.every))}"
        report.warn(key, says, "whatever was trained since the last checkpoint is done again")


def _hours(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 1 else f"{hours * 60:.1f} min"


def _disk(report: Report, cfg: TrainConfig, parameters: int, total: int) -> None:
    """Checkpoints hold student, teacher and two moments: 16 bytes a parameter. One more is written
    before the oldest goes. `teacher/`, `best/` and each snapshot hold a teacher."""
    folder = Path(cfg.output_dir).absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    kept = min(cfg.checkpoint.keep + 1, -(-total // cfg.checkpoint.every) + 1)
    every = cfg.checkpoint.snapshot
    snapshots = total // every if every else 0
    needed = 16 * parameters * kept + 4 * parameters * (3 + snapshots)
    free = shutil.disk_usage(there).free
    text = f"{needed / GIB:.2f} GiB needed ({kept} checkpoints, {snapshots} snapshots)"
    numbers = {"disk_gib": needed / GIB, "disk_free_gib": free / GIB}
    report.row("disk", f"{text}, {free / GIB:.2f} free", **numbers)
    if needed > free:
        says = f"the run writes {needed / GIB:.2f} GiB, {free / GIB:.2f} GiB are free at {there}"
        why = "the run would fail when it saves"
        report.warn("output_dir, checkpoint.keep, checkpoint.snapshot", says, why, True)


def _print(report: Report, config: str | None, seconds: float) -> None:
    for name, text in report.rows:
        print(f"{name:<11} {text}", file=sys.stderr)
    for item in report.warnings:
        kind = "error" if item["fails"] else "warning"
        print(f"{kind}: {item['says']}; {item['why']}. Change {item['change']}", file=sys.stderr)
    fails = any(item["fails"] for item in report.warnings)
    if not report.warnings:
        print("nothing to warn of", file=sys.stderr)
    result = {"task": "check", "config": config, "fails": fails, "warnings": report.warnings}
    numbers = {name: _rounded(value) for name, value in report.numbers.items()}
    print_result(result | numbers | {"seconds": round(seconds, 1)})
    if fails:
        sys.exit(MISTAKE)


def _rounded(value: object) -> object:
    return float(f"{value:.5g}") if isinstance(value, float) else value
