"""Memory and time of a training step, from a few small steps of it (`train.py --check`).

Every operation of a step is followed by some number of live bytes, and that number is a straight
line in the images that go through at once. So two small steps give the line of each operation, and
the highest point of all lines at the real size is the peak. Nothing is known of the architecture or
the losses, so a fork's own are counted as well. Not counted: what an operation allocates and frees
within itself, the CUDA context (about 0.5 GiB), fragments, loader processes.
"""

import copy
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data.loader import Batch
from engine.parallel import blocks
from engine.stages import Stage
from engine.start import build_student
from engine.step import OptimizationStep
from engine.trainer import Trainer
from engine.validation import size_pair
from evals.flops import synchronize
from models.ssl_model import count_parameters

GIB = 2**30
SMALL, LARGER = 2, 4  # images of the two small steps


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that exist, after every operation inside it.

    Attributes:
        now: bytes of the tensors that were made inside and still exist.
        phases: (name, bytes after each operation) of each phase that `mark` ended.
    """

    def __init__(self):
        super().__init__()
        self.now, self.known = 0, set()
        self.phases: list[tuple[str, list[int]]] = []
        self.line: list[int] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided:
                storage = tensor.untyped_storage()
                address, size = storage._cdata, storage.nbytes()
                if address not in self.known:
                    self.known.add(address)
                    self.now += size
                    weakref.finalize(storage, self._drop, address, size).atexit = False
        self.line.append(self.now)
        return out

    def _drop(self, address: int, size: int) -> None:
        self.known.discard(address)
        self.now -= size

    def mark(self, phase: str) -> None:
        self.phases.append((phase, self.line))
        self.line = []


class StepTrial:
    """Student, teacher and optimizer of a stage, for steps on random pixels; nothing is kept.

    Args:
        method: `train_step` of train.py and `build_centering` of losses/centering.py.
        initial: weights of `init`, or None.
        ranks: processes that share the batch.
    """

    def __init__(
        self,
        stage: Stage,
        method: tuple[Callable, Callable],
        device: torch.device,
        initial: nn.Module | None,
        ranks: int,
    ):
        self.asked_loss = stage.cfg.loss
        loss = replace(self.asked_loss, koleo=replace(self.asked_loss.koleo, group=SMALL))
        self.cfg = replace(stage.cfg, compile=False, loss=loss)  # compiled steps take less
        self.stage, self.device = replace(stage, cfg=self.cfg), device
        (self.train_step, build_centering), self.ranks, self.live = method, ranks, LiveBytes()
        self.lines: dict[tuple[int, int], list[tuple[str, list[int]]]] = {}
        self.seconds_an_image, terms = 0.0, stage.schedules
        with self.live:
            student = build_student(self.cfg, "ibot" in terms, initial)
            centering = build_centering(loss, terms)
            self.trainer = Trainer(self.cfg, student, centering, [self.stage], device, stage.stop)
            own = {"gram": loss.gram.teacher != "ema", "anchor": True}
            backbone = self.trainer.teacher.backbone
            copies = {term: copy.deepcopy(backbone) if own[term] else backbone for term in own}
            self.frozen = [copies[term] if term in terms else None for term in own]
        self.held = self.live.now  # bytes

    def parts(self) -> dict[str, float]:
        """Bytes of a process, all gradients counted; `teacher` with Gram teacher and anchor."""
        share = self.ranks if self.cfg.strategy == "fsdp" else 1
        student = list(self.trainer.student.parameters())
        every = 4 * sum(p.numel() for p in student)
        trained = 4 * sum(p.numel() for p in student if p.requires_grad)
        parts = {"parameters": every, "gradients": trained, "optimizer": 2 * trained}
        parts["teacher"] = max(self.held - every - 2 * trained, 0)
        return {name: size / share for name, size in parts.items()}

    def step(self, images: int, micro: int) -> float:
        """Runs one step; its seconds."""
        parts = self.trainer.student, self.trainer.teacher, self.trainer.optimizer
        precision, optim = self.trainer.precision, self.cfg.optim
        update = OptimizationStep(*parts, precision, optim, micro_batch=micro)
        update.mark = self.live.mark
        middle = (self.stage.first + self.stage.stop) // 2
        batch = self._batch(images)
        self.live.phases, self.live.line = [], []
        synchronize(self.device)
        start, now = time.perf_counter(), self.stage.now(middle)
        centering, loss = self.trainer.centering, self.cfg.loss
        self.train_step(update, middle, batch, centering, self.frozen, loss, now)
        synchronize(self.device)
        return time.perf_counter() - start

    def _batch(self, images: int) -> Batch:
        """Random crops; every global crop hides the mean number of patches, so that bytes are a
        straight line in the images."""
        crops, loss = self.cfg.crops, self.cfg.loss
        height, width = size_pair(crops.global_size)

        def pixels(count: int, sides: tuple[int, int]) -> torch.Tensor:
            return torch.randn(count, self.cfg.data.channels, *sides, device=self.device)

        local = gram = masks = None
        rows, hidden = crops.global_count * images, []
        if "ibot" in self.stage.schedules:
            patch = self.cfg.model.patch_size
            patches = (height // patch) * (width // patch)
            share = loss.ibot.mask_probability * sum(loss.ibot.mask_ratio) / 2
            hidden = [max(1, round(share * patches))] * rows
            masks = torch.arange(patches, device=self.device).expand(rows, -1) < hidden[0]
        if crops.local_count:
            local = pixels(crops.local_count * images, size_pair(crops.local_size))
        scale = loss.gram.teacher_scale
        if "gram" in self.stage.schedules and (scale != 1 or not loss.gram.distortions):
            gram = pixels(rows, (round(height * scale), round(width * scale)))
        big = pixels(rows, (height, width))
        return Batch(big, local, gram, masks, hidden, list(range(images)), [])

    def _lines(self, micro: int, parts: int) -> list[tuple[str, list[int]]]:
        if (micro, parts) not in self.lines:
            with self.live:
                seconds = self.step(micro * parts, micro)
            self.lines[micro, parts] = self.live.phases
            self.seconds_an_image = seconds / (micro * parts)
        return self.lines[micro, parts]

    def peak(self, local: int, micro: int) -> float:
        """Peak bytes of a process with `local` images, of which `micro` go through at once.

        Shared by FSDP, a process holds its part of all weights, and two whole blocks or heads. DDP
        has a second copy of the gradients.
        """
        parts = -(-local // micro)
        peak = _at(self._lines(SMALL, min(parts, 2)), self._lines(LARGER, min(parts, 2)), micro)
        if parts > 2:  # images, outputs and targets of the other parts wait
            waiting = _highest(self._lines(SMALL, 3)) - _highest(self._lines(SMALL, 2))
            peak += (parts - 2) * micro * waiting / SMALL
        if self.ranks > 1 and self.cfg.strategy == "fsdp":
            student = self.trainer.student
            units = [*blocks(student), *(part for part in student.children() if not blocks(part))]
            unit = max(map(count_parameters, units))
            return peak - self.held * (1 - 1 / self.ranks) + 8 * unit
        return peak + self.parts()["gradients"] * (self.ranks > 1)

    def images_a_second(self, micro: int, seconds: float) -> float:
        """Of steps in up to so many seconds, with up to `micro` images at once."""
        images = min(micro, int(seconds / 3 / max(self.seconds_an_image, 1e-6)))
        images = max(SMALL, images // SMALL * SMALL)
        return images / min(self.step(images, images) for _ in range(3))


def _highest(phases: list[tuple[str, list[int]]]) -> int:
    return max(max(line) for _, line in phases if line)


def _at(small: list, larger: list, images: int) -> float:
    """The highest point at `images`, of lines through two steps of SMALL and LARGER images."""
    highest = 0.0
    for (_, first), (_, second) in zip(small, larger, strict=True):
        if len(first) != len(second):  # a loop over rows; then its highest point is the line
            first, second = [max(first)], [max(second)]
        for low, high in zip(first, second, strict=True):
            highest = max(highest, low + (high - low) * (images - SMALL) / (LARGER - SMALL))
    return highest


def memory_there(device: torch.device) -> float:
    """Bytes that can still be taken: of the device, or of the host and its container."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    if device.type == "mps":
        return float(torch.mps.recommended_max_memory())
    free = float("inf")
    info = Path("/proc/meminfo")
    if info.is_file():
        line = next(line for line in info.read_text().splitlines() if "MemAvailable" in line)
        free = 1024.0 * int(line.split()[1])
    limit, used = (Path(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if limit.is_file() and used.is_file() and limit.read_text().strip().isdigit():
        free = min(free, float(limit.read_text()) - float(used.read_text()))
    return free
