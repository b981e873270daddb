"""Checkpoints and weights in a run folder. A crash never leaves half a file.

checkpoints/<step>/   training state, PyTorch's distributed format (any number of ranks may read it)
checkpoints/latest    a text file with the newest complete step
teacher/ snapshots/<step>/ best/    backbone as a folder that load_backbone opens, heads beside it
"""

import os
import pickle
import shutil
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from engine import distributed, parallel
from engine.cli import RunFailed
from engine.parallel import unwrap


def training_state(
    student: nn.Module,
    teacher: nn.Module,
    centering: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> dict:
    """State that resuming needs, as the tensors in use: loading writes into them.

    Random numbers need no state, because each step is seeded anew (`distributed.seed_step`).
    """
    student, moments = unwrap(student), {}
    weights = teacher.state_dict()
    for name, parameter in student.named_parameters():
        if parameter in optimizer.state:
            moments[name] = optimizer.state[parameter]
        if not parameter.requires_grad:  # the teacher's is the same tensor
            weights.pop(name, None)
    state = {
        "student": student.state_dict(),
        "teacher": weights,
        "centering": centering.state_dict(),
        "optimizer": moments,
    }
    return state | ({"scaler": scaler} if scaler.is_enabled() else {})


def checkpoint_steps(run: Path) -> list[int]:
    """Steps of the run's checkpoints up to the one in `latest`, ascending, whole or damaged."""
    folder = run / "checkpoints"
    steps = [int(path.name) for path in folder.glob("*") if path.name.isdigit()]
    pointer = folder / "latest"
    newest = pointer.read_text().strip() if pointer.is_file() else ""
    limit = int(newest) if newest.isdigit() else max(steps, default=0)  # empty after a power cut
    return sorted(step for step in steps if step <= limit)


def latest_step(run: Path) -> int | None:
    """The step of the newest checkpoint whose files are whole, or None."""
    steps = reversed(checkpoint_steps(run))
    return next((step for step in steps if not damage(run / "checkpoints" / str(step))), None)


def damage(checkpoint: Path) -> str:
    """What is missing of a checkpoint's files; nothing where each has its full length."""
    try:
        parts = dcp.FileSystemReader(checkpoint).read_metadata().storage_data.values()
        ends = Counter()
        for part in parts:
            ends[part.relative_path] = max(ends[part.relative_path], part.offset + part.length)
        for name, end in ends.items():
            if (size := (checkpoint / name).stat().st_size) < end:
                return f"{name} has {size} of {end} bytes"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except Exception as error:  # unpickling damaged bytes raises anything
        return f".metadata cannot be read ({type(error).__name__})"
    return ""


def load_checkpoint(run: Path, step: int, state: dict) -> None:
    """Fills the tensors of `state` in place, whatever ranks and strategy wrote the checkpoint.

    Checkpoints of an earlier version have no state of the scaler; then the scaler stays as it is.

    Raises:
        RunFailed: if it cannot be read, although its files are whole.
    """
    folder, group = run / "checkpoints" / str(step), distributed.current_group()
    if "scaler" in state:
        held = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
        kept = any(name.startswith("scaler.") for name in held)
        state = {name: part for name, part in state.items() if kept or name != "scaler"}
    try:
        dcp.load(state, checkpoint_id=folder, process_group=group, no_dist=not distributed.active())
    except Exception as error:
        if not isinstance(error, (CheckpointException, EOFError, pickle.UnpicklingError, OSError)):
            raise
        before = [known for known in checkpoint_steps(run) if known < step]
        remedy = f"write {before[-1]} into {folder.parent / 'latest'}" if before else "start afresh"
        raise RunFailed(
            f"{folder} cannot be read ({type(error).__name__}); to go on without it, {remedy}"
        ) from error


class CheckpointWriter:
    """Writes each checkpoint into a folder beside the last one, then renames the folder.

    So a kill leaves the last checkpoint intact. `save` copies the state to the host, and a thread
    writes it while training goes on; `also` gives the thread more to write. `finish` publishes the
    checkpoint. The next `save`, a `poll` after the writing and the end of the run call `finish`.
    """

    def __init__(self, run: Path, keep: int):
        self.run, self.folder, self.keep = run, run / "checkpoints", keep
        self.future, self.step = None, None
        self.pool, self.others = ThreadPoolExecutor(1), []
        # A single process has no process group, as this warning says.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        # A group of its own: a thread writes, and its messages must not mix with those of steps.
        self.group = distributed.twin_group("gloo")

    def save(self, step: int, state: dict) -> None:
        """
        Raises:
            RunFailed: if a weight is not finite, or the disk is full; the one before stays.
        """
        self.finish()
        _refuse_non_finite(state["student"], step)
        unfinished = self.folder / f"{step}.unfinished"
        if distributed.is_main():
            shutil.rmtree(unfinished, ignore_errors=True)
            self.folder.mkdir(parents=True, exist_ok=True)
        distributed.barrier()
        self.future = dcp.async_save(state, checkpoint_id=unfinished, process_group=self.group)
        self.step = step

    def also(self, write: Callable[[], None]) -> None:
        """Lets a thread call `write`; `finish` publishes the checkpoint only after that."""
        self.others.append(self.pool.submit(write))

    def poll(self) -> None:
        """Publishes a written checkpoint; on one process only, since ranks would have to agree."""
        writing = [*self.others, *([self.future] if self.future else [])]
        if writing and all(part.done() for part in writing) and not distributed.active():
            self.finish()

    def finish(self) -> None:
        """Waits for the writing, and makes this the newest checkpoint. All ranks call it together.

        Raises:
            RunFailed: if something could not be written.
        """
        others, self.others = self.others, []
        wait(others)
        if self.future is None:
            for other in others:
                other.result()
            return
        future, step, self.future = self.future, self.step, None
        try:
            future.result()
            for other in others:
                other.result()
            if distributed.is_main():
                self._publish(step)
        except (OSError, CheckpointException, RuntimeError) as error:
            shutil.rmtree(self.folder / f"{step}.unfinished", ignore_errors=True)
            if isinstance(error, RunFailed):
                raise
            reason, before = " ".join(str(error).split())[-300:], latest_step(self.run)
            kept = (
                f"The one before, of step {before}, is untouched" if before else "None was before"
            )
            raise RunFailed(
                f"the checkpoint of step {step} could not be written ({reason}); is the disk full? "
                f"{kept}: make room and start again"
            ) from error
        distributed.barrier()

    def _publish(self, step: int) -> None:
        shutil.rmtree(self.folder / str(step), ignore_errors=True)
        os.replace(self.folder / f"{step}.unfinished", self.folder / str(step))
        write_atomically(self.folder / "latest", str(step))
        _prune(self.folder, self.keep)


def _refuse_non_finite(weights: dict, step: int) -> None:
    shards = parallel.local(weights.values())
    tensors = [tensor for tensor in shards if tensor.is_floating_point()]
    bad = not torch.isfinite(sum(tensor.float().sum() for tensor in tensors))
    if distributed.any_rank(bad, tensors[0].device):
        raise RunFailed(
            f"weights are not finite at step {step}, nothing was saved; lower schedule.lr.peak or "
            "schedule.teacher_temp, or set precision=fp32"
        )


def _prune(folder: Path, keep: int) -> None:
    for old in checkpoint_steps(folder.parent)[:-keep]:
        shutil.rmtree(folder / str(old))


def write_atomically(path: Path, text: str) -> None:
    beside = path.with_name(path.name + ".unfinished")
    with open(beside, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())  # or a power cut leaves an empty file of this name
    os.replace(beside, path)


def save_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` fill a folder beside this one, then renames the files: readers find no half.

    Raises:
        RunFailed: if the disk is full; what stood there before stays.
    """
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        write(unfinished)
    except Exception as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        # SafetensorError is no OSError.
        if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
            raise RunFailed(
                f"{folder} could not be written ({error}); is the disk full? "
                "What stood there is untouched"
            ) from error
        raise
    folder.mkdir(parents=True, exist_ok=True)
    for file in unfinished.iterdir():
        os.replace(file, folder / file.name)
    unfinished.rmdir()
