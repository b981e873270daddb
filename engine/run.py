"""The life of a run: its folder opened or gone on with, steps timed and logged, the teacher probed, saved and drawn.

What to probe, save and draw is handed in as functions, so that one student of many is a run like any other.
"""

import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine import checkpoint, distributed
from engine.checkpoint import CheckpointWriter
from engine.cli import StoppedEarly
from engine.guard import Guard
from engine.health import CollapseWatch
from engine.logger import BadImages, Logger, notice, read_metrics, require_mirrors
from errors import UserError

LEFT_BY_A_RUN = (
    "config.yaml",
    "metrics.jsonl",
    "checkpoints",
    "snapshots",
    "teacher",
    "best",
    "curves.png",
    "report.png",
    "bad_images.txt",
    "tensorboard",
    "wandb",
    "gram_choice.json",
    "gram_choice.png",
)


@dataclass(frozen=True)
class Cadence:
    """How often, in steps; 0 = never."""

    log: int
    probe: int
    every: int  # checkpoints
    snapshot: int  # teachers kept for good
    keep: int  # checkpoints on disk


class Run:
    """One output folder over one length. `start_step` is 0 or where the newest checkpoint stands.

    At the end of each of several stages, everything is saved and the teacher is kept for good.
    """

    def __init__(
        self,
        folder: Path,
        stage_ends: list[int],
        cadence: Cadence,
        device: torch.device,
        hours: float | None = None,
        mirrors: Sequence[str] = (),
    ):
        self.folder, self.stage_ends, self.total_steps, self.cadence = (
            folder,
            stage_ends,
            stage_ends[-1],
            cadence,
        )
        self.device, self.mirrors = device, mirrors
        require_mirrors(mirrors)  # before anything is made or removed
        self.start_step = 0
        self.writer = CheckpointWriter(folder, cadence.keep)
        self.deadline = math.inf if hours is None else time.monotonic() + 3600 * hours
        self.signal: int | None = None

    def open(self, config: str, check: Callable[[Path], None], overwrite: bool) -> bool:
        """Makes or re-opens the folder; False if there is nothing left to do.

        Args:
            config: the resolved configuration's text, written as config.yaml.
            check: raises ValueError if the config.yaml of the run so far forbids going on.
            overwrite: removes what an earlier run left, and nothing else.
        """
        if self.folder.is_file():
            raise UserError(f"output_dir {self.folder} is a file; give a folder")
        if overwrite and distributed.is_main():
            for name in LEFT_BY_A_RUN:
                path = self.folder / name
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        distributed.barrier()
        self.start_step = checkpoint.latest_step(self.folder) or 0
        if self.start_step:
            check(self.folder / "config.yaml")
        if self.start_step >= self.total_steps:
            notice(
                f"{self.folder} is finished: {self.start_step} of {self.total_steps} steps are done. A larger total_steps "
                "prolongs the run, overwrite=true starts afresh."
            )
            return False
        if distributed.is_main():
            self.folder.mkdir(parents=True, exist_ok=True)
            checkpoint.write_atomically(self.folder / "config.yaml", config)
        if self.start_step:
            notice(f"{self.folder}: going on from step {self.start_step}")
        return True

    def start(
        self,
        state: dict,
        *,
        bad_images: BadImages,
        export: Callable[[], Callable[[Path], None]],
        report: Callable[[], Callable[[Path], None]],
        probe: Callable[[], dict[str, float]] | None,
        locality: Callable[[nn.Module], float],
        curves: Callable[[Path, dict[str, list[dict]]], None],
        refresh: Callable[[], None],
        watch: CollapseWatch,
        guard: Guard | None = None,
    ) -> None:
        """Loads the checkpoint, if there is one, into `state`.

        Args:
            state: live tensors of the training state (engine.checkpoint.training_state).
            bad_images: the count of what could not be read.
            export: takes the teacher's weights to the host, and returns what writes them into a folder.
            report: takes some of the teacher's features, and returns what draws them into a PNG.
            probe: measures the teacher, on all ranks together.
            locality: measures the patches of any backbone without labels.
            curves: draws the records of some runs, by their names, into a PNG.
            refresh: gathers the teacher where it is sharded; called by all ranks before any of these.
            watch: says when what is logged looks like collapse.
            guard: says when a probe has fallen below step 0, and which one makes weights the best.
        """
        self.state, self.export, self.report, self.curves = state, export, report, curves
        self.probe, self.locality = probe, locality
        self.refresh, self.watch, self.guard = refresh, watch, guard or Guard()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, getattr(signal, "SIGUSR1", signal.SIGTERM)):
                signal.signal(number, self._note_signal)
        self.restore(state)
        self.logger = Logger(self.folder, self.total_steps, self.start_step, self.mirrors)
        self.bad_images = bad_images
        self.best = self.guard.recall(read_metrics(self.folder / "metrics.jsonl"))

    def enter(self, stage: Any) -> int:
        """Begins a stage (engine.stages) or goes on within it; probes at step 0. Returns the step to go on from."""
        step = max(self.start_step, stage.first)
        self.settle()  # the stage may start from what the one before wrote
        self.logger.enter(stage.name, stage.cfg.batch_size, stage.shift)
        if step == 0 and self._due(0, self.cadence.probe):
            self._log(0, {})
        if stage.name:
            notice(f"stage {stage.name}: steps {stage.first} to {stage.stop}")
        return step

    def steps(self, loader: Iterable, first: int) -> Iterator[tuple[int, Any]]:
        """(step, batch) from `first` on, with the wait for data timed and unreadable images counted."""
        self.logger.restart_clock(first)
        waiting_since = time.perf_counter()
        for step, batch in enumerate(loader, first):
            self.logger.waited += time.perf_counter() - waiting_since
            self.bad_images.add(batch.bad)
            yield step, batch
            waiting_since = time.perf_counter()

    def step_done(self, step: int, metrics: Callable[[], dict]) -> None:
        """Logs, probes and saves where due. `step` counts the updates done; `metrics` is only called to be logged.

        Raises:
            StoppedEarly: after a signal or the time limit, once everything is saved.
        """
        last = step in self.stage_ends
        stopped = self._asked_to_stop(step)
        if last or self._due(step, self.cadence.log) or self._due(step, self.cadence.probe):
            self._log(step, metrics())
        self.writer.poll()
        if last or stopped or self._due(step, self.cadence.every):
            self._save(step)
            self.logger.restart_clock(step)
        elif self._due(step, self.cadence.snapshot):
            self.refresh()
            if distributed.is_main():
                self.writer.also(
                    partial(checkpoint.save_folder, self._snapshot(step), self.export())
                )
        if step == self.total_steps or stopped:
            self.writer.finish()
            self.logger.close()
        if stopped and step < self.total_steps:
            raise StoppedEarly(
                f"{self.folder}: stopped at step {step} of {self.total_steps} {stopped}; the same command goes on"
            )

    def _note_signal(self, number: int, frame: Any) -> None:
        self.signal = number

    def _asked_to_stop(self, step: int) -> str:
        """Why to stop after this step, or nothing; ranks agree every tenth step, for it costs them a wait."""
        why = f"by {signal.Signals(self.signal).name}" if self.signal else ""
        why = "at the time limit" if time.monotonic() > self.deadline else why
        if not distributed.active():
            return why
        if step % 10 or not distributed.any_rank(bool(why), self.device):
            return ""
        return why or "with another rank"

    def settle(self) -> None:
        """All that was to be written is there, for every rank to read."""
        self.writer.finish()
        distributed.barrier()

    def restore(self, state: dict) -> None:
        """Fills live tensors with what the checkpoint holds under the same names, where the run goes on from one."""
        if self.start_step:
            checkpoint.load_checkpoint(self.folder, self.start_step, state)

    def _due(self, step: int, every: int) -> bool:
        return every > 0 and step % every == 0

    def _log(self, step: int, values: dict) -> None:
        values = {name: float(value) for name, value in values.items()}
        warning = self.watch.look(step, values)
        if warning:
            notice(warning)
        values |= self.logger.speed(step)
        if self.probe and (self._due(step, self.cadence.probe) or step in self.stage_ends):
            self.refresh()
            values |= self.probe()
        self.logger.log(step, values)
        if values.get(self.guard.key, -math.inf) > self.best:
            self.best = values[self.guard.key]
            self._on_main(lambda: checkpoint.save_folder(self.folder / "best", self.export()))
        if warning := self.guard.look(step, values, self.folder / "best"):
            notice(warning)
        self.logger.restart_clock(step)

    def _save(self, step: int) -> None:
        """The step waits for copies only; a thread writes and draws, and the checkpoint counts once all is there."""
        self.refresh()
        self.writer.save(step, self.state)
        if not distributed.is_main():
            return
        export, report, records = (
            self.export(),
            self.report(),
            read_metrics(self.folder / "metrics.jsonl"),
        )
        folders = [self.folder / "teacher"]
        if self._due(step, self.cadence.snapshot) or (
            step in self.stage_ends and len(self.stage_ends) > 1
        ):
            folders.append(self._snapshot(step))

        def write() -> None:
            for folder in folders:
                checkpoint.save_folder(folder, export)
            self.curves(self.folder / "curves.png", {self.folder.name: records})
            report(self.folder / "report.png")

        self.writer.also(write)

    def _snapshot(self, step: int) -> Path:
        return self.folder / "snapshots" / str(step)

    def _on_main(self, work: Callable[[], None]) -> None:
        if distributed.is_main():
            work()
        distributed.barrier()
