"""Time and memory of a training step: phases, images a second, MFU; variants side by side.

    python bench.py --config configs/quickstart.yaml
    python bench.py --config configs/quickstart.yaml \
        --compare precision=fp32 "precision=bf16,data.workers=1"
    python bench.py --config configs/quickstart.yaml --profile trace.json    # for Perfetto
    python bench.py --config configs/dinov3_vit7b16.yaml micro_batch_size=16 \
        --memory --gpus 8 32 128 256    # computed only
    python bench.py --config configs/distill_quickstart.yaml    # students together, and each alone

One process measures the step of train.py, or of distill.py where there is a teacher, on real data.
"""

import argparse
import copy
import re
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch.utils.checkpoint import set_checkpoint_early_stop

import distill
import train
from data.loader import Batch
from data.sources.specs import open_data
from engine import distributed
from engine.cli import config_parser, path_argument, print_result, run_script
from engine.config import TrainConfig, load_config
from engine.distill_config import DistillTrainConfig
from engine.logger import memory_gib
from engine.optim import build_schedules
from engine.settings import find_config, read_yaml
from engine.stages import Stage, plan_stages
from engine.start import build_student, load_init, training_stages
from engine.student_run import StudentRun
from engine.students import (
    loaded_stage,
    open_teacher,
    student_configs,
    teacher_crop_adapter,
    uses_heads,
)
from engine.trainer import Trainer
from engine.views import stage_loader
from errors import UserError
from evals.clocks import Clock, profile, time_crops
from evals.flops import FlopClock, machine, peak_flops, product_type, synchronize
from evals.memory import as_table, forget_peak, memory_table
from losses.centering import build_centering

PHASES = ("data_wait", "augmentation", "teacher", "forward", "loss", "backward", "optimizer", "ema")
# Length of configurations without stages. The steps measured are in the middle of a stage.
STEPS = 10**6
ROUNDS = 5  # medians are over so many turns of the variants


def main(argv: list[str] | None = None) -> None:
    arguments = parser().parse_intermixed_args(argv)
    for name in ("steps", "warmup"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name} is {getattr(arguments, name)}; it must be at least 1")
    layers = read_yaml(find_config(arguments.config), TrainConfig) if arguments.config else []
    if any("distill" in layer for layer in layers):
        measure_students(arguments)
        return
    configs = {"": load_config(arguments.config, arguments.overrides)}
    for change in arguments.compare or []:
        overrides = [*arguments.overrides, *split_changes(change)]
        configs[change] = load_config(arguments.config, overrides)
    if arguments.memory:
        show_memory(configs[""], arguments)
    else:
        measure(configs, arguments)


def parser() -> argparse.ArgumentParser:
    flags = config_parser(__doc__)
    flags.add_argument("--steps", type=int, default=20, help="steps to measure, of each variant")
    flags.add_argument("--warmup", type=int, default=3, help="steps before them")
    flags.add_argument("--stage", help="of a configuration with stages; by default the first")
    changes = {"nargs": "+", "metavar": "key=value,..."}
    flags.add_argument("--compare", **changes, help="variants that take turns with the base")
    trace = "trace of two further steps, and a table on standard error"
    flags.add_argument("--profile", type=path_argument, metavar="FILE", help=trace)
    memory = "memory a GPU, computed for --gpus; runs nothing"
    flags.add_argument("--memory", action="store_true", help=memory)
    gpus = "how many GPUs share the batch and the weights"
    flags.add_argument("--gpus", type=int, nargs="+", default=[1], help=gpus)
    flags.add_argument("--output", type=path_argument, help="folder for the result as JSON")
    return flags


def split_changes(text: str) -> list[str]:
    """ "a=1,b=[2,3]" -> ["a=1", "b=[2,3]"]"""
    return re.split(r",(?=[\w.]+=)", text)


def chosen_stage(cfg: TrainConfig, name: str | None) -> Stage:
    """
    Raises:
        UserError: if there is no stage of that name.
    """
    stages = training_stages(cfg, None if cfg.stages else STEPS)
    for stage in stages:
        if name in (None, stage.name):
            return stage
    known = ", ".join(cfg.stages or ["no stages"])
    raise UserError(f"--stage is {name}; this configuration has {known}")


def measure(configs: dict[str, TrainConfig], arguments: argparse.Namespace) -> None:
    """The variants in turns; `configs` holds them by what they change, the base first."""
    start = time.perf_counter()
    device = distributed.choose_device(configs[""].device)
    forget_peak()
    before = memory_gib()
    workloads = {}
    for change, cfg in configs.items():
        workloads[change] = Workload(cfg, chosen_stage(cfg, arguments.stage), device)
    for workload in workloads.values():
        workload.warm_up(arguments.warmup)
    take_turns(list(workloads.values()), arguments.steps)
    results = {change: workload.result() for change, workload in workloads.items()}
    memory = {"memory_gib": round(memory_gib(), 3), "memory_before_gib": round(before, 3)}
    if arguments.profile:
        profile(lambda: workloads[""].step(Clock(device)), 2, device, arguments.profile)
    whole = measured_on(arguments, device) | results[""] | memory
    if len(results) > 1:
        base = results[""]["images_per_second"]
        whole["variants"] = []
        for change, result in results.items():
            speedup = round(result["images_per_second"] / base, 3)
            whole["variants"].append({"change": change} | result | {"speedup": speedup})
    show(results)
    print_result(whole | {"seconds": round(time.perf_counter() - start, 1)}, arguments.output)


def take_turns(workloads: list, steps: int) -> None:
    """Each measures so many steps or a few more, in rounds."""
    rounds = min(ROUNDS, steps)
    for _ in range(rounds):
        for workload in workloads:
            if len(workloads) > 1:
                workload.drop_buffered()
            workload.measure(-(-steps // rounds))


# ----------------------------------------------------------------- one configuration


class Workload:
    """The step of train.py under one configuration, with a clock."""

    def __init__(self, cfg: TrainConfig, stage: Stage, device: torch.device):
        cfg, initial = load_init(cfg)
        data = replace(stage.cfg.data, mean=cfg.data.mean, std=cfg.data.std)
        stage = replace(stage, cfg=replace(stage.cfg, data=data))
        self.cfg, self.stage, self.device = stage.cfg, stage, device
        self.middle = (stage.first + stage.stop) // 2
        torch.manual_seed(cfg.seed)
        student = build_student(cfg, "ibot" in stage.schedules, initial)
        centering = build_centering(stage.cfg.loss, stage.schedules)
        self.trainer = Trainer(stage.cfg, student, centering, [stage], device, stage.stop)
        self.update = self.trainer.optimization_step(stage)
        backbone, terms = self.trainer.teacher.backbone, stage.schedules
        copied = {"gram": stage.cfg.loss.gram.teacher != "ema", "anchor": True}
        frozen = {
            term: copy.deepcopy(backbone) if own else backbone for term, own in copied.items()
        }
        self.frozen = [frozen[term] if term in terms else None for term in copied]
        longer = replace(stage, stop=stage.stop + STEPS)
        loader = stage_loader(longer, self.middle, student.backbone.patch_size, device)
        self.on_device = loader.dataset.on_device
        crops_here = loader.num_workers == 0 and not self.on_device
        self.crops = time_crops(loader.dataset) if crops_here else []
        self.buffered = loader.num_workers * (loader.prefetch_factor or 0)  # batches
        self.batches = iter(loader)
        self.rounds: list[float] = []  # ms a step
        self.phases: dict[str, list[float]] = defaultdict(list)  # ms, one value a step

    def next_batch(self) -> Batch:
        return next(self.batches).to(self.device, non_blocking=True)

    def step(self, clock: Clock) -> None:
        batch = next(self.batches)
        clock.mark("data_wait")
        batch = batch.to(self.device, non_blocking=True)
        clock.mark("augmentation" if self.on_device else "data_wait")
        self.train_on(batch, clock)

    def train_on(self, batch: Batch, clock: Clock | FlopClock) -> None:
        self.update.mark = clock.mark
        distributed.seed_step(self.cfg.seed, self.middle)
        centering, loss, now = self.trainer.centering, self.cfg.loss, self.stage.now(self.middle)
        train.train_step(self.update, self.middle, batch, centering, self.frozen, loss, now)

    def warm_up(self, steps: int) -> None:
        """Counts the operations in the first step, in which nothing is compiled."""
        checkpointed = [m for m in self.trainer.student.modules() if "forward" in vars(m)]
        batch = self.next_batch()
        with (
            torch.compiler.set_stance("force_eager"),
            set_checkpoint_early_stop(False),
            FlopClock(checkpointed) as counted,
        ):
            self.train_on(batch, counted)
        forget_peak()  # counting holds on to more
        self.flops = counted.phases
        for _ in range(steps - 1):
            self.step(Clock(self.device))

    def drop_buffered(self) -> None:
        """Drops what loader workers made while another variant had its turn."""
        for _ in range(self.buffered):
            self.next_batch()

    def measure(self, steps: int) -> None:
        clock = Clock(self.device)
        synchronize(self.device)
        start = time.perf_counter()
        for _ in range(steps):
            for crops in self.crops:
                crops.seconds = 0.0
            clock.start()
            self.step(clock)
            if self.crops:
                self.phases["augmentation"].append(1e3 * sum(each.seconds for each in self.crops))
        synchronize(self.device)
        self.rounds.append(1e3 * (time.perf_counter() - start) / steps)
        for name, values in clock.milliseconds().items():
            self.phases[name] += values

    def result(self) -> dict:
        step_ms = median(self.rounds)
        phases = {name: median(self.phases[name]) for name in PHASES if name in self.phases}
        made_here = phases["augmentation"] if self.crops else 0.0
        phases["data_wait"] = max(phases["data_wait"] - made_here, 0.0)  # which is part of it
        with self.update.autocast():
            kind = product_type(self.device)
        (peak, source), flops = peak_flops(self.device, kind), sum(self.flops.values())
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


# ----------------------------------------------------------------- students


def measure_students(arguments: argparse.Namespace) -> None:
    """The step of all students together, and in turns with it that of each alone.

    `cost` is the time of the step together, over the sum of its parts: the batch and the teacher
    once, and each student's own part.

    Raises:
        UserError: for flags that have no meaning here.
    """
    if arguments.compare or arguments.profile or arguments.memory or arguments.stage:
        raise UserError(
            "of a distillation only the steps are measured: "
            "leave --compare, --profile, --memory and --stage out"
        )
    start = time.perf_counter()
    cfg = load_config(arguments.config, arguments.overrides, DistillTrainConfig)
    device = distributed.choose_device(cfg.device)
    names = [entry.name for entry in student_configs(cfg)]
    with tempfile.TemporaryDirectory() as folder:
        together = Students(cfg, names, Path(folder) / "all", device)
        alone = {name: Students(cfg, [name], Path(folder) / name, device) for name in names}
        everyone = [together, *alone.values()]
        for students in everyone:
            students.measure(arguments.warmup)
            students.shared, students.own = [], []
        take_turns(everyone, arguments.steps)
    shared = median(value for students in alone.values() for value in students.shared)
    own = {name: median(students.own) for name, students in alone.items()}
    step = median(map(sum, zip(together.shared, together.own, strict=True)))
    cost = step / (shared + sum(own.values()))
    parts = {"batch and teacher": shared} | own
    words = " + ".join(f"{name} {value:.1f}" for name, value in parts.items())
    print(f"together {step:.1f} ms a step, {cost:.3f} times ({words})", file=sys.stderr)
    whole = measured_on(arguments, device) | {
        "step_ms": round(step, 2),
        "shared_ms": round(shared, 2),
        "own_ms": {name: round(value, 2) for name, value in own.items()},
        "cost": round(cost, 4),
        "seconds": round(time.perf_counter() - start, 1),
    }
    print_result(whole, arguments.output)


class Students:
    """The step of distill.py with these students.

    Its milliseconds come in two parts: what the students share (the batch and the teacher's
    forward pass), and what is their own.
    """

    def __init__(
        self, cfg: DistillTrainConfig, names: list[str], folder: Path, device: torch.device
    ):
        given = cfg.distill.students  # a name in YAML may be a number
        chosen = {name: given[name] for name in given if str(name) in names}
        section, probe = replace(cfg.distill, students=chosen), replace(cfg.probe, every=0)
        cfg = replace(cfg, output_dir=str(folder), distill=section, probe=probe)
        self.device, self.shared, self.own = device, [], []
        teacher = open_teacher(cfg).to(device)
        heads = uses_heads(cfg, teacher)
        self.autocast, _ = distributed.choose_precision(cfg.precision, device)
        adapt = teacher_crop_adapter(cfg, teacher, device)
        self.teach = partial(
            distill.with_teacher_features, teacher, heads, adapt, cfg.micro_batch_size
        )
        stages = plan_stages(cfg, None if cfg.stages else STEPS, build_schedules)
        images = open_data(cfg.data.train, cfg.data.channels)
        self.students = [
            StudentRun(entry, cfg, stages, teacher, heads, device) for entry in student_configs(cfg)
        ]
        for student in self.students:
            distill.opens(student, images)
            student.trainer.start(student.run, images, student.outputs)
            student.enters(0)
        self.middle = (stages[0].first + stages[0].stop) // 2
        loader = stage_loader(loaded_stage(stages[0], heads), self.middle, 1, device)
        self.buffered = loader.num_workers * (loader.prefetch_factor or 0)
        self.batches = iter(loader)

    def drop_buffered(self) -> None:
        """Drops what loader workers made while others had their turn."""
        for _ in range(self.buffered):
            next(self.batches)

    def measure(self, steps: int) -> None:
        for _ in range(steps):
            start = self._now()
            with self.autocast():
                seen = self.teach(next(self.batches).to(self.device, non_blocking=True))
            taught = self._now()
            for student in self.students:
                distill.student_step(student, self.middle, seen, range(len(seen.images)))
            self.shared.append(1e3 * (taught - start))
            self.own.append(1e3 * (self._now() - taught))

    def _now(self) -> float:
        synchronize(self.device)
        return time.perf_counter()


# ----------------------------------------------------------------- results


def measured_on(arguments: argparse.Namespace, device: torch.device) -> dict:
    """What was measured, on which machine."""
    asked = {"config": arguments.config, "overrides": arguments.overrides}
    return {"task": "bench"} | asked | machine(device)


def show(results: dict[str, dict]) -> None:
    """A table for people, on standard error."""
    for change, result in results.items():
        phases = "  ".join(f"{name} {value:.1f}" for name, value in result["phases_ms"].items())
        print(
            f"{change or 'as configured'}: {result['images_per_second']} images/s, "
            f"{result['step_ms']} ms a step ({phases}), {result['gflop_per_step']} GFLOP, "
            f"MFU {result['mfu']:.1%} of {result['peak_tflops']} TFLOP/s ({result['peak_from']})",
            file=sys.stderr,
        )


def show_memory(cfg: TrainConfig, arguments: argparse.Namespace) -> None:
    stage = chosen_stage(cfg, arguments.stage)
    with torch.device("meta"):
        student = build_student(stage.cfg, "ibot" in stage.schedules)
    kind = "cpu" if cfg.device == "cpu" else "cuda"
    parameters, rows = memory_table(stage.cfg, stage.schedules, student, arguments.gpus, kind)
    print(as_table(rows), file=sys.stderr)
    asked = {"task": "memory", "config": arguments.config, "stage": stage.name}
    print_result(asked | {"parameters": parameters, "rows": rows}, arguments.output)


if __name__ == "__main__":
    run_script(main)
