"""The run folder: checkpoints written whole or not at all, the teacher's weights, going on where a run stopped.

checkpoints/<step>/   training state, PyTorch's distributed format (any number of ranks may read it)
checkpoints/latest    a text file with the newest complete step
teacher/ snapshots/<step>/ best/    backbone as a folder that load_backbone opens, heads beside it
"""

import contextlib
import os
import shutil
import warnings
from pathlib import Path
from typing import Callable, Iterator, Optional

import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from engine import distributed
from engine.cli import RunFailed
from engine.distributed import unwrap


def training_state(
    student: nn.Module, teacher: nn.Module, centering: nn.Module, optimizer: torch.optim.Optimizer
) -> dict:
    """Everything a run needs to go on, as live tensors: loading writes into them.

    Randomness needs no state: each step's is drawn from (seed, step).
    """
    student = unwrap(student)
    moments = {name: optimizer.state[p] for name, p in student.named_parameters() if p in optimizer.state}
    return {
        "student": student.state_dict(),
        "teacher": teacher.state_dict(),
        "centering": centering.state_dict(),
        "optimizer": moments,
    }


def latest_step(run: Path) -> Optional[int]:
    """The newest complete checkpoint's step, or None."""
    pointer = run / "checkpoints" / "latest"
    return int(pointer.read_text()) if pointer.is_file() else None


def load_checkpoint(run: Path, step: int, state: dict) -> None:
    """Fills `state`'s tensors in place."""
    with _quietly():
        dcp.load(state, checkpoint_id=run / "checkpoints" / str(step), no_dist=not distributed.active())


def save_checkpoint(run: Path, step: int, state: dict, keep: int) -> None:
    """Writes the state beside its place, then moves it there: a kill at any moment leaves the previous one whole.

    Raises:
        RunFailed: if a weight is not finite; the previous checkpoint stays.
    """
    _refuse_non_finite(state["student"], step)
    folder = run / "checkpoints"
    unfinished = folder / f"{step}.unfinished"
    if distributed.is_main():
        shutil.rmtree(unfinished, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
    distributed.barrier()
    with _quietly():
        dcp.save(state, checkpoint_id=unfinished, no_dist=not distributed.active())
    if distributed.is_main():
        shutil.rmtree(folder / str(step), ignore_errors=True)
        os.replace(unfinished, folder / str(step))
        write_atomically(folder / "latest", str(step))
        _prune(folder, keep)
    distributed.barrier()


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without the warning that a single process is a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _refuse_non_finite(weights: dict, step: int) -> None:
    total = sum(tensor.float().sum() for tensor in weights.values() if tensor.is_floating_point())
    if not torch.isfinite(total):
        raise RunFailed(
            f"weights are not finite at step {step}, nothing was saved; lower schedule.lr.peak or schedule.teacher_temp, "
            "or set precision=fp32"
        )


def _prune(folder: Path, keep: int) -> None:
    steps = sorted((int(path.name) for path in folder.iterdir() if path.name.isdigit()), reverse=True)
    for old in steps[keep:]:
        shutil.rmtree(folder / str(old))


def write_atomically(path: Path, text: str) -> None:
    beside = path.with_name(path.name + ".unfinished")
    beside.write_text(text)
    os.replace(beside, path)


def save_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """`write(beside)` fills a folder beside its place; then each file is replaced in one move, so readers find no half."""
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    write(unfinished)
    folder.mkdir(parents=True, exist_ok=True)
    for file in unfinished.iterdir():
        os.replace(file, folder / file.name)
    unfinished.rmdir()
