"""Whose an output folder is: one process owns it, and what an earlier run left is never lost."""

import contextlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from engine import distributed
from engine.checkpoint import checkpoint_steps
from engine.logger import notice
from errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

HEADER = "# commit "  # the first line of the config.yaml that a run writes
RUN_FILES = (
    *("config.yaml", "metrics.jsonl", "checkpoints", "snapshots", "teacher", "best"),
    *("curves.png", "report.png", "report.html", "report_images", "events.jsonl"),
    *("bad_images.txt", "tensorboard", "wandb"),
    *("gram_choice.json", "gram_choice.png", "students"),
)

_locks: dict[Path, Any] = {}  # open files, whose locks hold until they are closed


def own_folder(folder: Path) -> None:
    """Refuses on all ranks an output folder in which another process works, or nobody can write.

    The lock is one of POSIX: children of the process do not inherit it, and it ends with the
    process, however that ends, or with `release_folders`. A folder that is not there is not made.

    Raises:
        UserError: if another process holds it, or it cannot be written to.
    """
    refusal = None
    if distributed.is_main():
        refusal = _cannot_write(folder)
        if refusal is None and folder.is_dir() and fcntl is not None:
            refusal = _lock(folder)
    if refusal := distributed.from_main(refusal):
        raise UserError(refusal)


def release_folders() -> None:
    """Ends this process's ownership of all folders."""
    while _locks:
        _locks.popitem()[1].close()


def _cannot_write(folder: Path) -> str | None:
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        return f"output_dir {folder}: {there} is a file; give a folder"
    try:
        with tempfile.TemporaryDirectory(dir=there):
            return None
    except OSError as error:
        return f"output_dir {folder} cannot be written to: {error.strerror}"


def _lock(folder: Path) -> str | None:
    path = folder / ".lock"
    held = _locks.get(path)
    if held and path.exists() and os.path.samestat(os.fstat(held.fileno()), path.stat()):
        return None
    file = open(path, "a+")  # noqa: SIM115  closing it would end the lock
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        who = file.read().strip() or "another process"
        return f"{folder} is in use by {who}; wait for it, or give another output_dir"
    except OSError:  # a file system without locks
        return None
    file.truncate(0)
    file.write(f"process {os.getpid()}")
    file.flush()
    _locks[path] = file
    return None


def left_in(folder: Path) -> list[str]:
    """What of a run's files stands in the folder."""
    return [name for name in RUN_FILES if (folder / name).exists()]


def check_folder(folder: Path, overwrite: bool) -> None:
    """Refuses a folder whose files a new run would replace; nothing is written.

    Raises:
        UserError: if they are not a run's, or a run's without checkpoints that is not to be
            overwritten.
    """
    left = left_in(folder)
    ours = _is_ours(folder)
    if not ours and "config.yaml" in left:
        raise UserError(
            f"{folder / 'config.yaml'} was not written by a run, and would be replaced; rename it, "
            "or give another output_dir"
        )
    if overwrite and left and not ours:
        raise UserError(
            f"{folder} holds {', '.join(left)}, but no run of this program; give another output_dir"
        )
    results = [name for name in ("teacher", "best", "snapshots") if name in left]
    records = folder / "metrics.jsonl"
    if records.is_file() and records.stat().st_size:
        results.append("metrics.jsonl")
    if results and not overwrite and not checkpoint_steps(folder):
        raise UserError(
            f"{folder} holds {', '.join(results)} of a run without checkpoints to go on from; "
            "give another output_dir, or overwrite=true, which moves them aside"
        )


def _is_ours(folder: Path) -> bool:
    if (folder / "checkpoints" / "latest").is_file():
        return True
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return (folder / "config.yaml").read_text().startswith(HEADER)
    return False


def move_aside(folder: Path) -> None:
    """Moves what an earlier run left to RUN.old, RUN.old2, ...: the first name that is free."""
    left = left_in(folder)
    if not left:
        return
    number, aside = 1, Path(f"{folder}.old")
    while aside.exists():
        number += 1
        aside = Path(f"{folder}.old{number}")
    aside.mkdir()
    for name in left:
        shutil.move(folder / name, aside / name)
    notice(f"{folder}: the earlier run is now {aside}")
