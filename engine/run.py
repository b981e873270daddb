"""The folder of a run: opens or resumes it, times and logs steps, probes and saves the teacher.

The functions that probe, export and draw the teacher are given, because engine imports no evals.
"""

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine import checkpoint, distributed
from engine.checkpoint import CheckpointWriter
from engine.cli import StoppedEarly
from engine.config import TrainConfig
from engine.folder import check_folder, move_aside, own_folder, release_folders
from engine.guard import build_guard
from engine.health import CollapseWatch
from engine.logger import (
    BadImages,
    Logger,
    keep_event,
    kept_notices,
    notice,
    read_metrics,
    require_mirrors,
    truncate_metrics,
)
from engine.settings import provenance, refuse_changes, to_yaml
from engine.stages import Stage
from errors import UserError

STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)
)


def note_stop_signals(note: Callable[[int], None]) -> None:
    """Calls `note(number)` at a signal to stop; a second Ctrl-C ends the program at once.

    Only the main thread may ask for that.
    """
    interrupted = False

    def handle(number: int, frame: Any) -> None:
        nonlocal interrupted
        if number == signal.SIGINT and interrupted:
            raise KeyboardInterrupt
        if number == signal.SIGINT:
            interrupted = True
            notice("Ctrl-C: the run is saved after this step; Ctrl-C again leaves at once")
        note(number)

    if threading.current_thread() is threading.main_thread():
        for number in STOP_SIGNALS:
            signal.signal(number, handle)


@contextlib.contextmanager
def run_of_its_own() -> Iterator[None]:
    """Afterwards the process is as before: its signal handlers, and folders that it owned."""
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS} if main else {}
    try:
        yield
    finally:
        release_folders()
        for number, handler in before.items():
            signal.signal(number, handler)


class StopRequest:
    """A signal or the time limit, noticed by all ranks after the same step.

    Args:
        hours: until the time limit; None: there is none.
        total_steps: of the run; at its last step there is nothing to stop.
    """

    def __init__(self, hours: float | None, total_steps: int, device: torch.device):
        self.deadline = math.inf if hours is None else time.monotonic() + 3600 * hours
        self.total_steps, self.device = total_steps, device
        self.signal: int | None = None

    def listen(self) -> None:
        note_stop_signals(self._note)

    def _note(self, number: int) -> None:
        self.signal = number

    def why(self, step: int) -> str:
        """Why to stop after this step, or nothing.

        Ranks agree every tenth step, because they wait for each other to do so.
        """
        why = f"by {signal.Signals(self.signal).name}" if self.signal else ""
        why = "at the time limit" if time.monotonic() > self.deadline else why
        if step >= self.total_steps or not distributed.active():
            return why if step < self.total_steps else ""
        reasons = distributed.gather_objects(why) if step % 10 == 0 else []
        return next(filter(None, reasons), "")


@dataclass(frozen=True)
class TeacherOutputs:
    """Functions that export, draw and probe the teacher of a run."""

    # Writes a copy of the teacher into a folder.
    export: Callable[[nn.Module, Path], None]
    # Reads some images; returns a function that draws what a copy sees in them, into the run folder
    # as of a step.
    report: Callable[[], Callable[[nn.Module, Path, int], None]]
    # Measures the teacher, on all ranks together; None: nothing is measured.
    probe: Callable[[], dict[str, float]] | None
    # Draws the records of some runs, by their names, into a PNG.
    curves: Callable[[Path, dict[str, list[dict]]], None]
    # Measures the patches of any backbone, without labels; None: no Gram teacher asks for it.
    locality: Callable[[nn.Module], float] | None = None


class Run:
    """One run in its output folder. `start_step` is 0, or the step of the newest checkpoint.

    Where a run has several stages, the end of each saves everything and keeps a snapshot.

    Args:
        stages: of the whole run, in order.
        hours: after which the run saves and stops; None: never.
    """

    def __init__(
        self,
        cfg: TrainConfig,
        stages: list[Stage],
        device: torch.device,
        hours: float | None = None,
    ):
        self.cfg, self.folder, self.device = cfg, Path(cfg.output_dir), device
        self.events = self.folder / "events.jsonl"
        self.stage_ends = [stage.stop for stage in stages]
        self.total_steps = self.stage_ends[-1]
        require_mirrors(cfg.mirrors)  # before anything is made or removed
        self.start_step = 0
        self.writer = CheckpointWriter(self.folder, cfg.checkpoint.keep)
        self.stop = StopRequest(hours, self.total_steps, device)
        self.stopping: str | None = None  # why, where distill.py decides

    def open(self) -> bool:
        """Finds the step to go on from, and writes nothing; False if there is nothing left to do.

        Raises:
            UserError: if the folder or the run in it forbids to begin or to go on.
        """
        own_folder(self.folder)
        check_folder(self.folder, self.cfg.overwrite)
        if self.cfg.overwrite:
            return True
        self.start_step = distributed.from_main(checkpoint.latest_step(self.folder)) or 0
        steps = checkpoint.checkpoint_steps(self.folder)
        if self.start_step:
            refuse_changes(self.cfg, self.folder / "config.yaml")
        if steps and steps[-1] != self.start_step:
            newest = self.folder / "checkpoints" / str(steps[-1])
            notice(f"{newest} is damaged: {checkpoint.damage(newest)}")
            if not self.start_step:
                raise UserError(f"{newest.parent} holds no whole checkpoint; give overwrite=true")
        if self.start_step >= self.total_steps:
            notice(
                f"{self.folder} is finished: {self.start_step} of {self.total_steps} steps are "
                "done. A larger total_steps prolongs the run, overwrite=true starts afresh."
            )
            return False
        return True

    def _begin(self) -> None:
        """Makes the folder the run's own: an earlier run moves aside."""
        if distributed.is_main():
            if self.cfg.overwrite:
                move_aside(self.folder)
            self.folder.mkdir(parents=True, exist_ok=True)
        own_folder(self.folder)
        if distributed.is_main():
            text = to_yaml(self.cfg, provenance())
            checkpoint.write_atomically(self.folder / "config.yaml", text)
            truncate_metrics(self.events, self.start_step)
        begins = f"going on from step {self.start_step}" if self.start_step else "begins"
        if self.start_step:
            notice(f"{self.folder}: {begins}")
        keep_event(self.events, self.start_step, begins)
        distributed.barrier()

    def start(
        self,
        state: dict,
        outputs: TeacherOutputs,
        images: int,
        copy_teacher: Callable[[], nn.Module | None],
        watch: CollapseWatch,
    ) -> None:
        """Begins to write, and loads the checkpoint, if there is one, into `state`.

        Args:
            state: live tensors of the training state (engine.checkpoint.training_state).
            outputs: functions that export, draw and probe the teacher.
            images: how many the run trains on.
            copy_teacher: a whole copy in the host's memory, on rank 0; all ranks call it together.
            watch: warns when the logged values look like collapse.
        """
        self._begin()
        self.state, self.outputs = state, outputs
        self.copy_teacher, self.watch, self.guard = copy_teacher, watch, build_guard(self.cfg)
        self.stop.listen()
        self.restore(state)
        self.logger = Logger(self.folder, self.total_steps, self.start_step, self.cfg.mirrors)
        self.bad_images = BadImages(self.folder, images, self.cfg.data.max_bad)
        # Rank 0 has just cut this file: what the others would read of it is anybody's guess.
        log = self.folder / "metrics.jsonl"
        records = read_metrics(log) if distributed.is_main() else []
        self.best = self.guard.recall(distributed.from_main(records))

    def enter(self, stage: Stage) -> int:
        """Begins a stage or goes on within it; probes at step 0. Returns the first step."""
        for name in ("gram_teacher", "anchor"):  # of the stage before
            self.state.pop(name, None)
        step = max(self.start_step, stage.first)
        self.settle()  # the stage may start from what the one before wrote
        self.logger.enter(stage.name, stage.cfg.batch_size, stage.shift)
        if step == 0:
            if self._due(0, self.cfg.probe.every):
                with kept_notices(self.events, 0):
                    self._log(0, {})
            self._draw_beginning()
        if stage.name:
            notice(f"stage {stage.name}: steps {stage.first} to {stage.stop}")
            keep_event(self.events, step, f"stage {stage.name}: to step {stage.stop}")
        return step

    def _draw_beginning(self) -> None:
        """The pictures of step 0, with which later ones are compared."""
        teacher = self.copy_teacher()
        if distributed.is_main():
            self.writer.also(partial(self.outputs.report(), teacher, self.folder, 0))

    def steps(self, loader: Iterable, first: int) -> Iterator[tuple[int, Any]]:
        """(step, batch) from `first` on; times the wait for data and counts unreadable images."""
        self.logger.restart_clock(first)
        waiting_since = time.perf_counter()
        for step, batch in enumerate(loader, first):
            self.logger.waited += time.perf_counter() - waiting_since
            self.bad_images.add(batch.bad)
            yield step, batch
            waiting_since = time.perf_counter()

    def step_done(self, step: int, metrics: Callable[[], dict]) -> None:
        """Logs, probes and saves where due.

        Args:
            step: how many updates are done.
            metrics: called only in steps that are logged.

        Raises:
            StoppedEarly: after a signal or the time limit, once everything is saved.
        """
        last = step in self.stage_ends
        stopped = self.stop.why(step) if self.stopping is None else self.stopping
        if last or self._due(step, self.cfg.log_every) or self._due(step, self.cfg.probe.every):
            with kept_notices(self.events, step):
                self._log(step, metrics())
        self.writer.poll()
        if stopped or step == self.total_steps:
            ending = "finished" if step == self.total_steps else f"stopped {stopped}"
            keep_event(self.events, step, ending)
        if last or stopped or self._due(step, self.cfg.checkpoint.every):
            self._save(step)
            self.logger.restart_clock(step)
        elif self._due(step, self.cfg.checkpoint.snapshot):
            teacher = self.copy_teacher()
            if distributed.is_main():
                export = partial(self.outputs.export, teacher)
                self.writer.also(partial(checkpoint.save_folder, self._snapshot(step), export))
        if step == self.total_steps or stopped:
            self.writer.finish()
            self.logger.close()
        if stopped and step < self.total_steps:
            raise StoppedEarly(
                f"{self.folder}: stopped at step {step} of {self.total_steps} {stopped}; "
                "the same command goes on"
            )

    def settle(self) -> None:
        """Waits until all files are written, so that every rank can read them."""
        self.writer.finish()
        distributed.barrier()

    def restore(self, state: dict) -> None:
        """Fills live tensors from the checkpoint that the run goes on from, if there is one."""
        if self.start_step:
            checkpoint.load_checkpoint(self.folder, self.start_step, state)

    def _due(self, step: int, every: int) -> bool:
        return every > 0 and step % every == 0

    def _log(self, step: int, values: dict) -> None:
        values = {name: float(value) for name, value in values.items()}
        if warning := self.watch.look(step, values):
            notice(warning)
        values |= self.logger.speed(step)
        due = self._due(step, self.cfg.probe.every) or step in self.stage_ends
        if self.outputs.probe and due:
            values |= self.outputs.probe()
        self.logger.log(step, values)
        if values.get(self.guard.key, -math.inf) > self.best:
            self.best = values[self.guard.key]
            teacher = self.copy_teacher()
            if distributed.is_main():
                checkpoint.save_folder(self.folder / "best", partial(self.outputs.export, teacher))
            distributed.barrier()
        if warning := self.guard.look(step, values, self.folder / "best"):
            notice(warning)
        self.logger.restart_clock(step)

    def _save(self, step: int) -> None:
        """Copies the state; a thread writes and draws while training goes on.

        The checkpoint is published after everything is written.
        """
        teacher = self.copy_teacher()
        self.writer.save(step, self.state)
        if not distributed.is_main():
            return
        export, report = partial(self.outputs.export, teacher), self.outputs.report()
        records = read_metrics(self.folder / "metrics.jsonl")
        folders = [self.folder / "teacher"]
        stage_ends = step in self.stage_ends and len(self.stage_ends) > 1
        if stage_ends or self._due(step, self.cfg.checkpoint.snapshot):
            folders.append(self._snapshot(step))

        def write() -> None:
            for folder in folders:
                checkpoint.save_folder(folder, export)
            self.outputs.curves(self.folder / "curves.png", {self.folder.name: records})
            report(teacher, self.folder, step)

        self.writer.also(write)

    def _snapshot(self, step: int) -> Path:
        return self.folder / "snapshots" / str(step)
