"""metrics.jsonl, the progress bar or plain lines, and notices. Only rank 0 writes."""

import contextlib
import importlib
import json
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from data.images import ImageData
from engine import distributed
from errors import UserError

_keepers: list[tuple[Path, int]] = []  # events.jsonl and the step, within `kept_notices`


def notice(text: str) -> None:
    """One line for the user, on standard error, above a progress bar if there is one."""
    if distributed.is_main():
        # Names of files may be any bytes.
        line = text.translate(ESCAPES).encode("utf-8", "backslashreplace").decode()
        tqdm.write(line, file=sys.stderr)
        for path, step in _keepers:
            keep_event(path, step, line, "warning")


@contextlib.contextmanager
def kept_notices(path: Path, step: int) -> Iterator[None]:
    """Notices within are warnings of the run: its events.jsonl keeps them, and errors, too."""
    _keepers.append((path, step))
    try:
        yield
    except Exception as error:
        keep_event(path, step, f"ended: {error}", "warning")
        raise
    finally:
        _keepers.pop()


def keep_event(path: Path, step: int, text: str, kind: str = "event") -> None:
    """Appends one JSON object to events.jsonl: step, local time, kind (event, warning), text."""
    if distributed.is_main():
        event = {"step": step, "time": time.strftime("%Y-%m-%d %H:%M:%S"), "kind": kind}
        with path.open("a") as file:
            file.write(json.dumps(event | {"text": text}) + "\n")


def say_passed_over(*sets: ImageData, said: Sequence[str] = ()) -> None:
    """What of the files of data sets is not used: each line once, without those `said` before."""
    for line in dict.fromkeys(line for data in sets for line in data.passed_over):
        if line not in said:
            notice(line)


class TensorBoardMirror:
    package = "torch.utils.tensorboard"

    def __init__(self, run: Path, start_step: int):
        from torch.utils.tensorboard import SummaryWriter

        # Hides what was written after the checkpoint: a resumed run writes it again.
        purge_step = start_step + 1 if start_step else None
        self.writer = SummaryWriter(run / "tensorboard", purge_step=purge_step)

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WandbMirror:
    package = "wandb"

    def __init__(self, run: Path, start_step: int):
        import wandb

        known = run / "wandb" / "id"  # by which wandb recognises a resumed run
        known.parent.mkdir(exist_ok=True)
        if not (start_step and known.is_file()):
            known.write_text(uuid.uuid4().hex[:12])
        try:
            self.session = wandb.init(
                project="nanodino",
                name=run.name,
                dir=run,
                id=known.read_text(),
                resume="allow",
                reinit="create_new",  # distill.py opens several sessions
            )
        except Exception as error:  # wandb has classes of its own: no account, no network
            raise UserError(
                f"mirrors: [wandb]: {error}; run `wandb login`, or set WANDB_MODE=offline"
            ) from error

    def log(self, step: int, values: dict[str, float]) -> None:
        self.session.log(values, step=step)

    def close(self) -> None:
        self.session.finish()


MIRRORS = {"tensorboard": TensorBoardMirror, "wandb": WandbMirror}


def require_mirrors(names: Sequence[str]) -> None:
    """
    Raises:
        ImportError: if a package is missing.
    """
    for name in names if distributed.is_main() else ():
        try:
            importlib.import_module(MIRRORS[name].package)
        except ImportError:
            raise UserError(
                f"mirrors: [{name}] needs the package {name}: pip install {name}"
            ) from None


class Logger:
    """Writes one JSON object a logging interval to RUN/metrics.jsonl, and shows the progress."""

    def __init__(self, run: Path, total_steps: int, start_step: int, mirrors: Sequence[str] = ()):
        self.path = run / "metrics.jsonl"
        # Several students write to one terminal.
        self.name = f"{run.name}: " if run.parent.name == "students" else ""
        self.total_steps = total_steps
        self.enter(None, 0, 0)
        self.last_step, self.last_time, self.waited = start_step, time.perf_counter(), 0.0
        self.trained_seconds, self.trained_steps, self.said = 0.0, 0, float("-inf")
        self.bar = tqdm(
            total=total_steps,
            initial=start_step,
            desc=self.name.rstrip(": ") or None,
            unit="step",
            disable=not distributed.is_main() or not sys.stderr.isatty(),
        )
        self.mirrors = []
        if distributed.is_main():
            truncate_metrics(self.path, start_step)
            self.mirrors = [MIRRORS[name](run, start_step) for name in mirrors]

    def enter(self, stage: str | None, batch_size: int, shift: int) -> None:
        """From here on, `step` updates have seen step * batch_size + shift images."""
        self.stage, self.batch_size, self.shift = stage, batch_size, shift

    def speed(self, step: int) -> dict:
        """Images per second, waiting and memory since the clock was started."""
        if step <= self.last_step:
            return {}
        seconds = max(time.perf_counter() - self.last_time, 1e-9)
        self.trained_seconds += seconds
        self.trained_steps += step - self.last_step
        return {
            "images_per_second": (step - self.last_step) * self.batch_size / seconds,
            "data_wait_fraction": min(self.waited / seconds, 1.0),
            "memory_gib": memory_gib(),
        }

    def log(self, step: int, values: dict[str, float]) -> None:
        record = {
            "step": step,
            "images_seen": step * self.batch_size + self.shift,
            "stage": self.stage,
        } | values
        if not distributed.is_main():
            return
        rounded = {name: _rounded(value) for name, value in record.items()}
        with self.path.open("a") as file:
            file.write(json.dumps(rounded) + "\n")
        numbers = {name: v for name, v in record.items() if isinstance(v, (int, float))}
        for mirror in self.mirrors:
            mirror.log(step, numbers)
        self._show(step, record, time.perf_counter())

    def restart_clock(self, step: int) -> None:
        """Speed is measured from here on (probes and pictures do not count)."""
        self.last_step, self.last_time, self.waited = step, time.perf_counter(), 0.0

    def _show(self, step: int, record: dict, now: float) -> None:
        shown = ("loss", "probe/knn", "probe/zero_shot", "images_per_second")
        names = [name for name in shown if name in record]
        shown = {name: f"{record[name]:.4g}" for name in names}
        if not self.bar.disable:
            self.bar.set_postfix(shown, refresh=False)
            self.bar.update(step - self.bar.n)
        elif now - self.said > 5 or "probe/knn" in record or step == self.total_steps:
            self.said = now
            # Without the seconds of probes and pictures.
            pace = self.trained_seconds / self.trained_steps if self.trained_steps else None
            left = None if pace is None else pace * (self.total_steps - step)
            words = "  ".join(f"{name} {value}" for name, value in shown.items())
            ending = "" if left is None else f"  {left / 60:.1f} min left"
            line = f"{self.name}step {step}/{self.total_steps}  {words}{ending}"
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        self.bar.close()
        for mirror in self.mirrors:
            mirror.close()


def _rounded(value: float | None) -> float | None:
    """Six significant digits; NaN and infinity become null, because JSON has neither."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if value - value == 0 else None
    return value


def read_metrics(path: Path) -> list[dict]:
    """The records of a metrics.jsonl; a last line cut by a kill is left out."""
    records = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


def truncate_metrics(path: Path, step: int) -> None:
    """Drops the records after `step`, because a run resumed there writes them again."""
    kept = [record for record in read_metrics(path) if record["step"] <= step] if step else []
    beside = path.with_name(path.name + ".unfinished")
    beside.write_text("".join(json.dumps(record) + "\n" for record in kept))
    beside.replace(path)


def memory_gib() -> float:
    """Peak device memory, or on the CPU this process's peak resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    status = Path("/proc/self/status")
    if status.is_file():  # unlike getrusage, it does not inherit the peak of the parent process
        lines = status.read_text().splitlines()
        peak = next(line for line in lines if line.startswith("VmHWM"))
        return int(peak.split()[1]) / 2**20
    try:
        import resource  # not on Windows
    except ImportError:
        return 0.0
    unit = 2**30 if sys.platform == "darwin" else 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


ESCAPES = str.maketrans({"\n": "\\n", "\t": "\\t", "\r": "\\r"})  # one line an image


class BadImages:
    """Counts the images that cannot be read, and lists them in RUN/bad_images.txt."""

    def __init__(self, run: Path, images: int, limit: int | None):
        self.path = run / "bad_images.txt"
        self.limit = max(10, images // 100) if limit is None else limit
        lines = []
        if self.path.is_file():
            lines = self.path.read_text(encoding="utf-8", errors="surrogateescape").split("\n")
        self.seen = dict(line.split("\t", 1) for line in lines if "\t" in line)

    def add(self, bad: list[tuple[str, str]]) -> None:
        """
        Raises:
            UserError: when more different images than the limit could not be read.
        """
        named = [(name.translate(ESCAPES), reason.translate(ESCAPES)) for name, reason in bad]
        new = {name: reason for name, reason in named if name not in self.seen}
        if not new:
            return
        self.seen |= new
        # File names may be any bytes.
        with self.path.open("a", encoding="utf-8", errors="surrogateescape") as file:
            file.writelines(f"{name}\t{reason}\n" for name, reason in new.items())
        if len(self.seen) > self.limit:
            raise UserError(
                f"{len(self.seen)} images could not be read, more than data.max_bad {self.limit}; "
                f"they are listed in {self.path}"
            )
