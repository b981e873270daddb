"""Several students of one run: what each one's configuration is, whether it fits the teacher, which ranks are whose,
and when all stop together."""

import copy
import dataclasses
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine import distributed
from engine.checkpoint import latest_step, write_atomically
from engine.cli import StoppedEarly
from engine.health import CollapseWatch, health
from engine.logger import notice
from engine.optim import build_schedules
from engine.settings import (
    CONFIG_FOLDER,
    ONE_OF,
    build,
    changed_keys,
    merge,
    provenance,
    read_yaml,
    refuse_changes,
    to_dict,
    to_yaml,
    write_out,
)
from engine.stages import Schedules
from engine.validation import size_pair
from errors import UserError

# What a student may have of its own: what the others, who see the same images at the same steps, do not depend on.
ALLOWED = (
    "init", "micro_batch_size", "strategy", "compile", "checkpointing", "data.mean", "data.std", "crops.global_size",
    "crops.local_size", "model.", "loss.", "optim.", "schedule.", "tune.", "probe.", "health.", "guard.",
    "checkpoint.snapshot", "stages", "distill.cls_weight", "distill.patch_weight",
)  # fmt: skip


OF_PROTOTYPES = ("health/teacher", "health/prototype", "health/top")


@dataclass(frozen=True)
class Entry:
    """One of `distill.students`."""

    name: str
    cfg: Any  # its configuration, as if it were alone; output_dir is its own
    share: float  # of the ranks, relative to the others'


def student_configs(cfg: Any) -> list[Entry]:
    """The run's configuration with each student's keys laid over it; a student that is null is left out.

    Raises:
        UserError: without students, and for keys that a student cannot override.
    """
    given = {str(name): keys for name, keys in cfg.distill.students.items() if keys is not None}
    if not given:
        example = "distill.students.small.model.arch=vit_small"
        raise UserError(f"distill.students is empty; give at least one, for example {example}")
    alone = dataclasses.replace(cfg, distill=dataclasses.replace(cfg.distill, students={}))
    return [_entry(alone, name, keys) for name, keys in given.items()]


def _entry(alone: Any, name: str, keys: Any) -> Entry:
    where = f"distill.students.{name}"
    if not isinstance(keys, dict):
        raise UserError(
            f"{where} is {keys!r}; it must hold keys and values, such as {{model: {{arch: vit_small}}}}"
        )
    keys = dict(keys)
    share = keys.pop("share", 1)
    if isinstance(share, bool) or not isinstance(share, (int, float)) or share <= 0:
        raise UserError(f"{where}.share is {share!r}; it must be a number above 0")
    if not name or Path(name).name != name:
        raise UserError(f"{where}: a student's name is that of its folder")
    base = to_dict(alone)
    lengths = {
        length: base[length] for length in ONE_OF
    }  # which a student's part of a stage leaves alone
    try:
        own = build(type(alone), merge(base, write_out(type(alone), keys)) | lengths)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    for change in changed_keys(alone, own, all_fields=True):
        if not change.startswith(ALLOWED):
            raise UserError(
                f"{where} cannot change {change}; a student may change {', '.join(ALLOWED)}"
            )
    for kind in ("global_size", "local_size"):
        size, cut = getattr(own.crops, kind), getattr(alone.crops, kind)
        if any(side > whole for side, whole in zip(size_pair(size), size_pair(cut))):
            raise UserError(
                f"{where}.crops.{kind} is {size}, but crops are cut at crops.{kind} {cut} for all; raise that"
            )
    return Entry(
        name,
        dataclasses.replace(own, output_dir=str(Path(alone.output_dir) / "students" / name)),
        share,
    )


def check_run(cfg: Any, stages: list[Any], ranks: int) -> None:
    """What holds for all students.

    Raises:
        UserError: for settings that have no meaning here.
    """
    for stage in stages:
        if stage.cfg.batch_size % ranks:
            raise UserError(
                f"batch_size {stage.cfg.batch_size} is not a multiple of the {ranks} processes"
            )
        if stage.name and stage.cfg.init:
            raise UserError(
                f"stages.{stage.name}.init: stages of a distillation go on; give init to a student"
            )
        if "gram" in stage.schedules:
            raise UserError(
                "loss.gram has no part in distillation, where the teacher is frozen; leave it out"
            )


def uses_heads(cfg: Any, teacher: Any) -> bool:
    """Whether students learn from the teacher's prototypes, or else from its features.

    Raises:
        UserError: if heads are asked for and there are none.
    """
    if cfg.distill.match == "heads" and teacher.dino_head is None:
        raise UserError(
            f"distill.match is heads, but the teacher {cfg.distill.teacher} brings none (runs of train.py do); "
            "use distill.match=features"
        )
    return cfg.distill.match != "features" and teacher.dino_head is not None


def check_prototypes(name: str, cfg: Any, terms: set[str], teacher: Any) -> None:
    """Whether a student's heads have the teacher's prototypes.

    Raises:
        UserError: with what to set.
    """
    for term in {"dino", "ibot"} & terms:
        head = getattr(teacher, f"{term}_head")
        theirs = None if head is None else len(head.last_layer.weight)
        own = getattr(cfg.loss, term).prototypes
        if own != theirs:
            value = "null" if theirs is None else theirs
            raise UserError(
                f"distill.students.{name}: loss.{term}.prototypes is {own or 'null'}, but those of the teacher "
                f"{cfg.distill.teacher} are {value}; set loss.{term}.prototypes={value}, or distill.match=features"
            )


def command_that_makes(run: str) -> str:
    """ "; python train.py --config configs/X.yaml makes it" for the output_dir of a configuration of ours, else ""."""
    for path in sorted(CONFIG_FOLDER.glob("*.yaml")):
        layers = read_yaml(path)
        folders = [layer["output_dir"] for layer in layers if "output_dir" in layer]
        if folders and Path(folders[-1]) == Path(run):
            script = "distill.py" if any("distill" in layer for layer in layers) else "train.py"
            return f"; python {script} --config configs/{path.name} makes it"
    return ""


def patch_grid(
    backbone: Any, size: tuple[int, int], device: torch.device, whose: str
) -> tuple[int, int]:
    """(h, w) of the patches of crops of that size; `backbone` is in eval mode.

    Raises:
        UserError: if it does not take such crops.
    """
    try:
        with torch.no_grad():
            return tuple(backbone(torch.zeros(1, backbone.in_channels, *size, device=device)).grid)
    except (AssertionError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{whose} does not take crops of {size[0]} x {size[1]} pixels: {reason}"
        ) from None


def divide_ranks(entries: list[Entry], ranks: int) -> dict[str, range] | None:
    """Consecutive ranks for each student by its share, at least one; None where there are too few: students take turns.

    Whoever has the largest share per rank gets the next one, so shares that divide the ranks evenly are met exactly.
    Timing has no part in it: the same configuration on as many ranks gives the same layout.
    """
    if ranks < len(entries) or ranks == 1:
        return None
    counts = [1] * len(entries)
    for _ in range(ranks - len(entries)):
        wants = [entry.share / count for entry, count in zip(entries, counts)]
        counts[wants.index(max(wants))] += 1
    ends = [sum(counts[: number + 1]) for number in range(len(counts))]
    return {entry.name: range(end - count, end) for entry, end, count in zip(entries, ends, counts)}


def begin(cfg: Any, entries: list[Entry], layout: dict[str, range] | None, images: Any) -> None:
    """Writes the run's own config.yaml, once it is sure that a run that has begun may go on with it; says what to know.

    Raises:
        UserError: if a key has changed that is part of the result.
    """
    folder = Path(cfg.output_dir)
    begun = any(latest_step(Path(entry.cfg.output_dir)) for entry in entries)
    if begun and not cfg.overwrite and (folder / "config.yaml").is_file():
        refuse_changes(cfg, folder / "config.yaml")
    distributed.barrier()
    if distributed.is_main():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "config.yaml", to_yaml(cfg, provenance()))
    if not begun and (warning := CollapseWatch(cfg.health.on_collapse).look_at(images)):
        notice(warning)
    if layout:
        notice(
            ", ".join(
                f"{name}: ranks {ranks.start} to {ranks.stop - 1}" for name, ranks in layout.items()
            )
        )


def what_is_cut(stage: Any, heads: bool) -> Any:
    """For the loader: without masks, which are the students' own, and without local crops where none looks at them."""
    cfg = copy.copy(stage.cfg)
    if not heads:
        cfg.crops = copy.copy(cfg.crops)
        cfg.crops.local_count = 0
    return dataclasses.replace(stage, cfg=cfg, schedules={})


def matching_schedules(cfg: Any, total_steps: int) -> Schedules:
    """As `build_schedules`, with the terms of feature matching in place of those of the heads."""
    kept = {
        k: v
        for k, v in build_schedules(cfg, total_steps).items()
        if k not in ("dino", "dino_local", "ibot")
    }
    weights = {"cls": cfg.distill.cls_weight, "patches": cfg.distill.patch_weight}
    if max(weights.values()) <= 0:
        raise UserError(
            "distill.cls_weight and distill.patch_weight are both 0: nothing to learn from"
        )
    return kept | {
        name: (lambda step, weight=weight: weight) for name, weight in weights.items() if weight > 0
    }


def student_health(targets: Any, out: Any, images: int) -> dict[str, Tensor]:
    """Measures of a step (engine.health); of the features alone where the targets are features."""
    prototypes = getattr(targets, "dino", None)
    probs = targets.cls.softmax(-1) if prototypes is None else prototypes
    measures = health(probs, out.cls.unflatten(0, (-1, images)), out.patches)
    if prototypes is not None:
        return measures
    return {name: value for name, value in measures.items() if not name.startswith(OF_PROTOTYPES)}


class StopRequest:
    """A signal or the time limit, noticed by all ranks of all students after the same step."""

    def __init__(self, hours: float | None, total_steps: int, device: torch.device):
        self.total_steps = total_steps
        self.deadline = float("inf") if hours is None else time.monotonic() + 3600 * hours
        self.device, self.signal = device, 0
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, getattr(signal, "SIGUSR1", signal.SIGTERM)):
                signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        self.signal = number

    def asked(self, step: int) -> bool:
        """Whether to stop after this step; several ranks agree every tenth, for it costs them a wait."""
        if step >= self.total_steps:
            return False
        wanted = bool(self.signal) or time.monotonic() > self.deadline
        if not distributed.active():
            return wanted
        return step % 10 == 0 and distributed.any_rank(wanted, self.device)


def all_done(
    step: int,
    done: list[tuple[Any, Callable[[], dict]]],
    bad: list[tuple[str, str]],
    waited: float,
    stopping: bool,
) -> None:
    """The end of a step for the students of this rank: logs, probes and saves where due.

    Args:
        done: of each student its run (engine.run) and what is to be logged.
        bad: images that could not be read.
        waited: seconds for the batch.

    Raises:
        StoppedEarly: if `stopping`, once all have saved.
    """
    stopped = (
        [StoppedEarly("stopped with the other students; the same command goes on")]
        if stopping
        else []
    )
    for run, logged in done:
        run.bad_images.add(bad)
        run.logger.waited += waited
        run.deadline = float("-inf") if stopping else float("inf")
        since = time.perf_counter()
        try:
            run.step_done(step, logged)
        except StoppedEarly as error:
            stopped.append(error)
        for other, _ in done:  # probes and pictures of one do not count as the time of another
            other.logger.last_time += 0.0 if other is run else time.perf_counter() - since
    if stopped:
        raise stopped[-1]
