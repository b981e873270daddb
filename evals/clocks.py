"""Clocks for the phases of a step, on the device and in the loader, and the profiler's trace."""

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.augment import MultiCrop
from data.loader import StepDataset
from evals.flops import synchronize


class Clock:
    """Times the phases of steps; `mark(name)` ends a phase.

    On CUDA it records events in the device's stream and does not stop the device: a phase without
    work for the device is the time that the device was idle. Elsewhere it reads the wall clock,
    after the device has finished.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.steps: list[list[tuple[str, Any]]] = []
        self.start()

    def start(self) -> None:
        """Begins a step."""
        self.steps.append([("start", self._now())])

    def mark(self, name: str) -> None:
        self.steps[-1].append((name, self._now()))

    def milliseconds(self) -> dict[str, list[float]]:
        """Per phase, one value a step; call it when the device is done."""
        found = defaultdict(list)
        for marks in self.steps:
            sums = defaultdict(float)
            for (_, earlier), (name, later) in zip(marks, marks[1:], strict=False):
                sums[name] += self._between(earlier, later)
            for name, value in sums.items():
                found[name].append(value)
        return found

    def _between(self, earlier: Any, later: Any) -> float:
        if self.device.type == "cuda":
            return earlier.elapsed_time(later)
        return 1e3 * (later - earlier)

    def _now(self) -> Any:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event
        synchronize(self.device)
        return time.perf_counter()


class TimedCrops:
    """A MultiCrop that adds up its seconds, without those in which images are read."""

    def __init__(self, crops: MultiCrop):
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


def time_crops(dataset: StepDataset) -> list[TimedCrops]:
    """Puts a TimedCrops in place of each MultiCrop of a data set that crops in this process.

    A mixture of sizes has several.
    """
    timed = [TimedCrops(views.multi_crop) for views in dataset.views]
    pairs = zip(dataset.views, timed, strict=True)
    dataset.views = tuple(replace(views, multi_crop=crops) for views, crops in pairs)
    return timed


def profile(run: Callable[[], None], times: int, device: torch.device, path: Path) -> None:
    """Writes a trace of so many runs to `path`, and prints a table on standard error."""
    cuda = device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if cuda else []
    with torch.profiler.profile(activities=activities, record_shapes=True) as trace:
        for _ in range(times):
            run()
        synchronize(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    trace.export_chrome_trace(str(path))
    kind = "self_cuda_time_total" if cuda else "self_cpu_time_total"
    averages = trace.key_averages()
    print(averages.table(sort_by=kind, row_limit=20, max_name_column_width=60), file=sys.stderr)
