"""Where a step's time and memory go: phases, images a second, MFU; variants side by side.

    python bench.py --config configs/quickstart.yaml
    python bench.py --config configs/quickstart.yaml --compare precision=fp32 "precision=bf16,data.workers=1"
    python bench.py --config configs/quickstart.yaml --profile trace.json             # for chrome://tracing or Perfetto
    python bench.py --config configs/dinov3_vit7b16.yaml micro_batch_size=16 --memory --gpus 8 32 128 256   # computed only
    python bench.py --config configs/distill_quickstart.yaml       # what students together cost, and each alone

One process measures the step of train.py, or of distill.py where the configuration has a teacher, end to end, on the
configuration's own data. Nothing is written but what is asked for.
"""

import argparse
import re
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import set_checkpoint_early_stop

import distill
from data.loader import Batch
from data.sources.specs import open_data
from engine import distributed, optim
from engine.cli import config_parser, print_result, run_script
from engine.config import (
    DistillTrainConfig,
    TrainConfig,
    load_config,
    micro_batch_size,
    with_statistics,
)
from engine.logger import memory_gib
from engine.settings import find_config, read_yaml
from engine.stages import Stage, plan_stages
from engine.start import build_student, load_initial
from engine.students import student_configs, uses_heads, what_is_cut
from engine.views import stage_loader
from errors import UserError
from evals.flops import FlopClock, peak_flops, synchronize
from evals.memory import forget_peak, memory_table
from losses.centering import build_centering
from models.lora import tune
from models.ssl_model import make_teacher, update_ema
from train import compute_losses, teacher_targets

PHASES = ("data_wait", "augmentation", "teacher", "forward", "loss", "backward", "optimizer", "ema")
STEPS = (
    10**6
)  # a length for configurations without stages: the steps measured are in its middle, where nothing is frozen
ROUNDS = 5  # medians are over so many turns of the variants


def main(argv: list[str] | None = None) -> None:
    arguments = parser().parse_intermixed_args(argv)
    for name, least in (("steps", 1), ("warmup", 1)):
        if getattr(arguments, name) < least:
            raise UserError(f"--{name} is {getattr(arguments, name)}; it must be at least {least}")
    if arguments.config and any(
        "distill" in layer for layer in read_yaml(find_config(arguments.config))
    ):
        measure_students(arguments)
        return
    changes = {"": []} | {change: split_changes(change) for change in arguments.compare or []}
    configs = {
        change: load_config(arguments.config, [*arguments.overrides, *keys])
        for change, keys in changes.items()
    }
    if arguments.memory:
        show_memory(configs[""], arguments)
        return
    start = time.perf_counter()
    device = distributed.choose_device(configs[""].device)
    forget_peak()
    before = memory_gib()
    workloads = {
        change: Workload(cfg, chosen_stage(cfg, arguments.stage), device)
        for change, cfg in configs.items()
    }
    for workload in workloads.values():
        workload.warm_up(arguments.warmup)
    rounds = min(ROUNDS, arguments.steps)
    for _ in range(rounds):
        for workload in workloads.values():
            workload.measure(-(-arguments.steps // rounds), alone=len(workloads) == 1)
    results = [{"change": change} | workload.result() for change, workload in workloads.items()]
    memory = {"memory_gib": round(memory_gib(), 3), "memory_before_gib": round(before, 3)}
    if arguments.profile:
        workloads[""].profile(arguments.profile)
    whole = {
        "task": "bench",
        "config": arguments.config,
        "overrides": arguments.overrides,
    } | machine(device)
    whole |= {key: value for key, value in results[0].items() if key != "change"} | memory
    if len(results) > 1:
        base = results[0]["images_per_second"]
        whole["variants"] = [
            r | {"speedup": round(r["images_per_second"] / base, 3)} for r in results
        ]
    show(results)
    print_result(whole | {"seconds": round(time.perf_counter() - start, 1)}, arguments.output)


def parser() -> argparse.ArgumentParser:
    flags = config_parser(__doc__)
    flags.add_argument("--steps", type=int, default=20, help="steps to measure, of each variant")
    flags.add_argument("--warmup", type=int, default=3, help="steps before them")
    flags.add_argument("--stage", help="of a configuration with stages; by default the first")
    flags.add_argument(
        "--compare",
        nargs="+",
        metavar="key=value,...",
        help="variants that take turns with the configuration as it is",
    )
    flags.add_argument(
        "--profile",
        type=Path,
        metavar="FILE",
        help="trace of two further steps, and a table on standard error",
    )
    flags.add_argument(
        "--memory", action="store_true", help="memory a GPU, computed for --gpus; runs nothing"
    )
    flags.add_argument(
        "--gpus",
        type=int,
        nargs="+",
        default=[1],
        help="how many GPUs share the batch and the weights",
    )
    flags.add_argument("--output", type=Path, help="folder for the result as JSON")
    return flags


def split_changes(text: str) -> list[str]:
    """ "a=1,b=[2,3]" -> ["a=1", "b=[2,3]"]"""
    return re.split(r",(?=[\w.]+=)", text)


def chosen_stage(cfg: TrainConfig, name: str | None) -> Stage:
    """
    Raises:
        UserError: if there is no stage of that name.
    """
    stages = {
        stage.name: stage
        for stage in plan_stages(cfg, None if cfg.stages else STEPS, optim.build_schedules)
    }
    if name is not None and name not in stages:
        raise UserError(
            f"--stage is {name}; this configuration has {', '.join(map(str, cfg.stages or ['no stages']))}"
        )
    return stages[name] if name else next(iter(stages.values()))


# ----------------------------------------------------------------- one configuration


class Workload:
    """Everything that a step of train.py needs, and the step cut into phases."""

    def __init__(self, cfg: TrainConfig, stage: Stage, device: torch.device):
        initial = load_initial(cfg.init, cfg.data.channels) if cfg.init else None
        if initial is not None:
            stage = replace(stage, cfg=with_statistics(stage.cfg, initial.preprocessing))
        self.cfg, self.stage, self.device = stage.cfg, stage, device
        self.middle = (stage.first + stage.stop) // 2
        torch.manual_seed(cfg.seed)
        terms = set(stage.schedules)
        self.student = build_student(stage.cfg, "ibot" in terms, initial).to(device)
        self.teacher = make_teacher(self.student)
        tune(self.student, self.teacher, cfg.seed, **vars(stage.cfg.tune))
        self.anchor = None
        if "gram" in terms:
            ema = stage.cfg.loss.gram.teacher == "ema"
            self.anchor = self.teacher.backbone if ema else make_teacher(self.student).backbone
        self.centering = build_centering(stage.cfg.loss, terms).to(device)
        self.optimizer = optim.optimizer_for(self.student, stage.cfg.optim)
        self.autocast, self.scaler = distributed.choose_precision(stage.cfg.precision, device)
        self.micro_batch = micro_batch_size(stage.cfg, 1, "koleo" in terms)
        loader = stage_loader(
            replace(stage, stop=stage.stop + STEPS),
            self.middle,
            self.student.backbone.patch_size,
            device,
        )
        self.on_device = loader.dataset.on_device
        self.crops = (
            time_crops(loader.dataset) if loader.num_workers == 0 and not self.on_device else None
        )
        self.buffered = loader.num_workers * (loader.prefetch_factor or 0)  # batches
        self.batches = iter(loader)
        self.rounds: list[float] = []  # ms a step
        self.phases: dict[str, list[float]] = defaultdict(list)  # ms, one value a step

    def next_batch(self) -> Batch:
        return next(self.batches).to(self.device, non_blocking=True)

    def step(self, clock: Any) -> None:
        batch = next(self.batches)
        clock.mark("data_wait")
        batch = batch.to(self.device, non_blocking=True)
        clock.mark("augmentation" if self.on_device else "data_wait")
        self.train_on(batch, clock)

    def train_on(self, batch: Batch, clock: Any) -> None:
        """As in train.py; `clock.mark(name)` ends a phase."""
        now, cfg, micro_batches = (
            self.stage.now(self.middle),
            self.cfg,
            batch.split(self.micro_batch),
        )
        with self.autocast():
            targets = teacher_targets(
                self.teacher, micro_batches, self.centering, now["teacher_temp"], self.anchor
            )
        clock.mark("teacher")
        for crops, target in zip(micro_batches, targets):
            with self.autocast():
                out = self.student(crops.global_crops, crops.local_crops, crops.masks)
            clock.mark("forward")
            losses = compute_losses(out, target, crops, cfg.loss, now)
            loss = sum(now[name] * value for name, value in losses.items())
            clock.mark("loss")
            self.scaler.scale(loss * (len(crops.images) / len(batch.images))).backward()
            clock.mark("backward")
        self.scaler.unscale_(self.optimizer)
        optim.clip_gradients(self.student, cfg.optim.clip_grad, cfg.optim.clip_per)
        optim.set_rates(self.optimizer, now["lr"], now["weight_decay"])
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        clock.mark("optimizer")
        update_ema(self.teacher, self.student, now["ema_momentum"])
        clock.mark("ema")

    def warm_up(self, steps: int) -> None:
        """Counts the operations in the first step, in which nothing is compiled."""
        compiled = self.device.type == "cuda" if self.cfg.compile is None else self.cfg.compile
        distributed.prepare(self.student, self.cfg.checkpointing, compiled)
        again = [module for module in self.student.modules() if "forward" in vars(module)]
        batch = self.next_batch()
        with (
            torch.compiler.set_stance("force_eager"),
            set_checkpoint_early_stop(False),
            FlopClock(again) as counted,
        ):
            self.train_on(batch, counted)
        forget_peak()  # counting holds on to more
        self.flops = counted.phases
        for _ in range(steps - 1):
            self.step(Clock(self.device))

    def measure(self, steps: int, alone: bool) -> None:
        """One round. Batches that loader workers made while another variant had its turn do not count."""
        for _ in range(0 if alone else self.buffered):
            self.next_batch()
        clock = Clock(self.device)
        synchronize(self.device)
        start = time.perf_counter()
        for _ in range(steps):
            if self.crops:
                self.crops.seconds = 0.0
            clock.start()
            self.step(clock)
            if self.crops:
                self.phases["augmentation"].append(1e3 * self.crops.seconds)
        synchronize(self.device)
        self.rounds.append(1e3 * (time.perf_counter() - start) / steps)
        for name, values in clock.milliseconds().items():
            self.phases[name] += values

    def result(self) -> dict:
        step_ms = median(self.rounds)
        phases = {name: median(self.phases[name]) for name in PHASES if name in self.phases}
        made_here = phases["augmentation"] if self.crops else 0.0
        phases["data_wait"] = max(phases["data_wait"] - made_here, 0.0)  # which is part of it
        with self.autocast():
            low = torch.is_autocast_enabled(self.device.type)
            kind = torch.get_autocast_dtype(self.device.type) if low else torch.float32
        peak, source = peak_flops(self.device, kind)
        flops = sum(self.flops.values())
        return {
            "precision": str(kind).removeprefix("torch."),
            "batch_size": self.cfg.batch_size,
            "images_per_second": round(1e3 * self.cfg.batch_size / step_ms, 2),
            "step_ms": round(step_ms, 2),
            "step_ms_spread": [round(min(self.rounds), 2), round(max(self.rounds), 2)],
            "phases_ms": {name: round(value, 2) for name, value in phases.items()},
            "data_wait_fraction": round((phases["data_wait"] + made_here) / step_ms, 4),
            "gflop": {name: round(value / 1e9, 3) for name, value in self.flops.items() if value},
            "gflop_per_step": round(flops / 1e9, 3),
            "peak_tflops": round(peak / 1e12, 3),
            "peak_from": source,
            "mfu": round(flops / (step_ms / 1e3) / peak, 4),
        }

    def profile(self, path: Path) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        activities += [torch.profiler.ProfilerActivity.CUDA] if self.device.type == "cuda" else []
        with torch.profiler.profile(activities=activities, record_shapes=True) as trace:
            for _ in range(2):
                self.step(Clock(self.device))
            synchronize(self.device)
        path.parent.mkdir(parents=True, exist_ok=True)
        trace.export_chrome_trace(str(path))
        kind = "self_cuda_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
        print(
            trace.key_averages().table(sort_by=kind, row_limit=20, max_name_column_width=60),
            file=sys.stderr,
        )


# ----------------------------------------------------------------- students


def measure_students(arguments: argparse.Namespace) -> None:
    """The step of all students together, and in turns with it that of each alone; `cost` is the first over the batch and the
    teacher's look at it once, and each student's own part.

    Raises:
        ValueError: for flags that have no meaning here.
    """
    if arguments.compare or arguments.profile or arguments.memory or arguments.stage:
        raise UserError(
            "of a distillation only the steps are measured: leave --compare, --profile, --memory and --stage out"
        )
    start, cfg = (
        time.perf_counter(),
        load_config(arguments.config, arguments.overrides, DistillTrainConfig),
    )
    device, names = (
        distributed.choose_device(cfg.device),
        [entry.name for entry in student_configs(cfg)],
    )
    with tempfile.TemporaryDirectory() as folder:
        together = Students(cfg, names, Path(folder) / "all", device)
        alone = {name: Students(cfg, [name], Path(folder) / name, device) for name in names}
        for students in (together, *alone.values()):
            students.measure(arguments.warmup)
            students.shared.clear(), students.own.clear()
        rounds = min(ROUNDS, arguments.steps)
        for _ in range(rounds):
            for students in (together, *alone.values()):
                students.measure(-(-arguments.steps // rounds))
    shared = median(value for students in alone.values() for value in students.shared)
    own = {name: median(students.own) for name, students in alone.items()}
    step = median(map(sum, zip(together.shared, together.own)))
    cost = step / (shared + sum(own.values()))
    rounded = {
        "step_ms": round(step, 2),
        "shared_ms": round(shared, 2),
        "own_ms": {n: round(v, 2) for n, v in own.items()},
    }
    parts = " + ".join(
        f"{name} {value:.1f}" for name, value in {"batch and teacher": shared, **own}.items()
    )
    print(f"together {step:.1f} ms a step, {cost:.3f} times ({parts})", file=sys.stderr)
    whole = (
        {"task": "bench", "config": arguments.config, "overrides": arguments.overrides}
        | machine(device)
        | rounded
    )
    whole |= {"cost": round(cost, 4), "seconds": round(time.perf_counter() - start, 1)}
    print_result(whole, arguments.output)


class Students:
    """The step of distill.py with these students, in milliseconds: what they share (the batch, and the teacher's look at
    it), and what is their own."""

    def __init__(
        self, cfg: DistillTrainConfig, names: list[str], folder: Path, device: torch.device
    ):
        students = {
            name: keys if name in names else None for name, keys in cfg.distill.students.items()
        }
        cfg = replace(
            cfg,
            output_dir=str(folder),
            distill=replace(cfg.distill, students=students),
            probe=replace(cfg.probe, every=0),
        )
        self.device, self.shared, self.own = device, [], []
        teacher = distill.open_teacher(cfg).to(device)
        heads = uses_heads(cfg, teacher)
        self.autocast, _ = distributed.choose_precision(cfg.precision, device)
        look = distill.teacher_crop_adapter(cfg, teacher, device)
        self.teach = partial(
            distill.with_teacher_features, teacher, heads, look, cfg.micro_batch_size
        )
        stages = plan_stages(cfg, None if cfg.stages else STEPS, optim.build_schedules)
        images = open_data(cfg.data.train, cfg.data.channels)
        entries = student_configs(cfg)
        self.students = [
            distill.Student(entry, cfg, stages, teacher, heads, device) for entry in entries
        ]
        for student in self.students:
            student.begins(images), student.enters(0)
        self.middle = (stages[0].first + stages[0].stop) // 2
        loader = stage_loader(what_is_cut(stages[0], heads), self.middle, 1, device)
        self.buffered = loader.num_workers * (loader.prefetch_factor or 0)
        self.batches = iter(loader)

    def measure(self, steps: int) -> None:
        """Batches that loader workers made while others had their turn do not count."""
        for _ in range(self.buffered):
            next(self.batches)
        for _ in range(steps):
            times = [self._now()]
            with self.autocast():
                seen = self.teach(next(self.batches).to(self.device, non_blocking=True))
            times.append(self._now())
            for student in self.students:
                student.step(self.middle, seen, range(len(seen.images)))
            times.append(self._now())
            self.shared.append(1e3 * (times[1] - times[0]))
            self.own.append(1e3 * (times[2] - times[1]))

    def _now(self) -> float:
        synchronize(self.device)
        return time.perf_counter()


class Clock:
    """Time of phases without stopping the device: on CUDA by events in its stream, where a phase without work for the device
    is the time that it stood idle; elsewhere by the wall clock, which other devices are waited for."""

    def __init__(self, device: torch.device):
        self.device = device
        self.steps: list[list[tuple[str, Any]]] = []
        self.start()

    def start(self) -> None:
        self.steps.append([("start", self._now())])

    def mark(self, name: str) -> None:
        self.steps[-1].append((name, self._now()))

    def milliseconds(self) -> dict[str, list[float]]:
        """Per phase, one value a step; call it when the device is done."""
        found = defaultdict(list)
        for marks in self.steps:
            sums = defaultdict(float)
            for (_, earlier), (name, later) in zip(marks, marks[1:]):
                sums[name] += (
                    earlier.elapsed_time(later)
                    if self.device.type == "cuda"
                    else 1e3 * (later - earlier)
                )
            for name, value in sums.items():
                found[name].append(value)
        return found

    def _now(self) -> Any:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event
        synchronize(self.device)
        return time.perf_counter()


class TimedCrops:
    """A MultiCrop that adds up its seconds, without those in which it waits for images to be read."""

    def __init__(self, crops: Any):
        self.timed, self.seconds = crops, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.timed, name)

    def __call__(self, images: Iterable[Tensor], *tables: Any) -> Any:
        start = time.perf_counter()
        made = self.timed(self._read(images), *tables)
        self.seconds += time.perf_counter() - start
        return made

    def _read(self, images: Iterable[Tensor]) -> Iterable[Tensor]:
        images = iter(images)
        while True:
            start = time.perf_counter()
            image = next(images, None)
            self.seconds -= time.perf_counter() - start
            if image is None:
                return
            yield image


def time_crops(dataset: Any) -> TimedCrops:
    """Replaces what makes the crops in this process by its timed likeness; all sizes of a mixture share one clock."""
    timed = [TimedCrops(views.multi_crop) for views in dataset.views]
    dataset.views = tuple(
        replace(views, multi_crop=crops) for views, crops in zip(dataset.views, timed)
    )
    return timed[0]


# ----------------------------------------------------------------- what comes out


def machine(device: torch.device) -> dict:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


def show(results: list[dict]) -> None:
    """A table for people, on standard error."""
    for result in results:
        phases = "  ".join(f"{name} {value:.1f}" for name, value in result["phases_ms"].items())
        print(
            f"{result['change'] or 'as configured'}: {result['images_per_second']} images/s, {result['step_ms']} ms a step "
            f"({phases}), {result['gflop_per_step']} GFLOP, MFU {result['mfu']:.1%} of {result['peak_tflops']} TFLOP/s "
            f"({result['peak_from']})",
            file=sys.stderr,
        )


def show_memory(cfg: TrainConfig, arguments: argparse.Namespace) -> None:
    stage = chosen_stage(cfg, arguments.stage)
    with torch.device("meta"):
        student = build_student(stage.cfg, "ibot" in stage.schedules)
    kind = "cpu" if cfg.device == "cpu" else "cuda"
    parameters, rows = memory_table(stage.cfg, set(stage.schedules), student, arguments.gpus, kind)
    names = list(rows[0])
    lines = [names] + [[str(row[name]) for name in names] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths)), file=sys.stderr)
    result = {
        "task": "memory",
        "config": arguments.config,
        "stage": stage.name,
        "parameters": parameters,
        "rows": rows,
    }
    print_result(result, arguments.output)


if __name__ == "__main__":
    run_script(main)
