"""Devices and ranks: process group, collectives (identities on one process).

On one process no process group exists. `torchrun` sets RANK, WORLD_SIZE and LOCAL_RANK; under
`srun` and `mpirun` they are taken from the variables of these.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from engine.launch import read_launch
from errors import UserError

# Words in gloo's errors when a rank is lost.
LOST = ("imed out", "Connection closed", "Connection reset", "Connection refused", "Broken pipe")
GIVING_UP = 3.0  # seconds within which all ranks give up that wait for the same one


class RankLost(RuntimeError):
    """Another rank died or hangs. The message names it as far as this rank can tell."""


def choose_device(name: str) -> torch.device:
    """`auto` takes CUDA, then MPS, then the CPU.

    Raises:
        UserError: if the device asked for is not there.
    """
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    if not available.get(name.split(":")[0], False):
        kinds = ", ".join(kind for kind, there in available.items() if there)
        raise UserError(f"device {name} is not available here; give one of {kinds}, or auto")
    launch = read_launch(os.environ)
    if name == "cuda" and launch:
        # With --gpus-per-task a process sees its own GPU only, which is number 0 there.
        alone = torch.cuda.device_count() == 1
        return torch.device("cuda", 0 if alone else int(launch["LOCAL_RANK"]))
    return torch.device(name)


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bf16 matrix products are faster than float32 ones here."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # of recent versions
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return False


def choose_precision(name: str, device: torch.device) -> tuple[Callable, torch.amp.GradScaler]:
    """A context for the forward passes, and the scaler of fp16 gradients (idle otherwise)."""
    kind = low_precision(name, device)
    autocast = partial(torch.autocast, device.type, dtype=kind, enabled=kind is not None)
    return autocast, torch.amp.GradScaler(device.type, enabled=name == "fp16")


def low_precision(name: str, device: torch.device) -> torch.dtype | None:
    """The number format of matrix products under `precision`; None: float32."""
    if name == "auto":
        name = "bf16" if has_fast_bf16(device) else "fp32"
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


@contextlib.contextmanager
def process_group(device: torch.device, timeout: float = 600.0) -> Iterator[None]:
    """Joins the group that a launcher announces (`read_launch`), and leaves it at the end.

    Args:
        timeout: seconds after which ranks that wait for another give it up, and the run ends.
    """
    launch = read_launch(os.environ)
    if not launch:
        yield
        return
    os.environ.update(launch)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # Checkpoints are written through gloo.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    limit = timedelta(seconds=timeout)
    store, number, size = next(dist.rendezvous("env://", timeout=limit))
    dist.init_process_group(backend, store=store, rank=number, world_size=size, timeout=limit)
    try:
        yield
    except RuntimeError as error:
        of_torch = type(error) is RuntimeError or isinstance(error, dist.DistError)
        if not of_torch or not any(words in str(error) for words in LOST):
            raise
        who = _who_is_lost(store, number, size, timeout)
        raise RankLost(f"{who}; the last checkpoint is untouched") from error
    finally:
        dist.destroy_process_group()


def _who_is_lost(store: dist.Store, number: int, size: int, timeout: float) -> str:
    """Each rank that gives up leaves its number in the store; the lost ranks do not."""
    try:
        store.set(f"gave_up/{number}", "")
        time.sleep(GIVING_UP * (1 + (number == 0)))  # under srun the store lives in rank 0
        lost = [str(other) for other in range(size) if not store.check([f"gave_up/{other}"])]
    except RuntimeError:  # the store was on a machine that is gone
        lost = ["0"]
    who = f"rank{'s' * (len(lost) > 1)} {', '.join(lost)} of {size}"
    who = who if lost else "a connection between ranks"
    return f"{who} ended, or did not answer for {timeout:g} seconds (hang_timeout)"


def check_strategy(strategy: str) -> None:
    """
    Raises:
        UserError: for "none" with several processes, which would train a model each.
    """
    if strategy == "none" and world_size() > 1:
        raise UserError(
            f"strategy is none, but a launcher started {world_size()} processes, which would train "
            "as many models in one folder; give strategy=ddp or fsdp, or start one process"
        )


def runs_alone(strategy: str) -> bool:
    """Whether one process runs where the user probably wanted several: fsdp, or several GPUs."""
    return not active() and (strategy == "fsdp" or torch.cuda.device_count() > 1)


def active() -> bool:
    return dist.is_available() and dist.is_initialized()


_group: Any = None  # the ranks on which all functions below act; None: all of them


@contextlib.contextmanager
def within(group: Any) -> Iterator[None]:
    """Inside, all functions of this module act on the ranks of `group`; None: on all ranks."""
    global _group
    before, _group = _group, group
    try:
        yield
    finally:
        _group = before


def split_ranks(parts: Sequence[Sequence[int]]) -> Any:
    """This rank's group, of one group for each part. All ranks call it, with the same parts."""
    groups = [dist.new_group(list(part)) for part in parts]
    return next(group for group, part in zip(groups, parts, strict=True) if rank() in part)


def twin_group(backend: str) -> Any:
    """Another group of the same ranks, for messages that must not mix; None on one process."""
    if not active():
        return None
    ranks = None if _group is None else dist.get_process_group_ranks(_group)
    return dist.new_group(ranks, backend=backend, use_local_synchronization=ranks is not None)


def current_group() -> Any:
    """The group of `within`, or None; for the functions of torch.distributed."""
    return _group


def seed_step(seed: int, step: int) -> None:
    """Seeds PyTorch for a step on this rank, by the same number in a resumed run.

    The numbers are hashed, because the generator of a CPU reads only the lowest 32 bits of a seed.
    """
    hashed = np.random.SeedSequence([seed, step, rank()]).generate_state(1, np.uint64)
    torch.manual_seed(int(hashed[0]))


def rank() -> int:
    return dist.get_rank(_group) if active() else 0


def world_size() -> int:
    return dist.get_world_size(_group) if active() else 1


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    if active():
        dist.barrier(_group)


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum over ranks, in place; the tensor is returned."""
    if active():
        dist.all_reduce(tensor, group=_group)
    return tensor


def all_reduce_max(tensor: Tensor) -> Tensor:
    if active():
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=_group)
    return tensor


def mean_over_ranks(tensor: Tensor) -> Tensor:
    return all_reduce_sum(tensor.clone()) / world_size()


def gather_objects(item: Any) -> list[Any]:
    """Every rank's `item`, in the order of ranks."""
    if not active():
        return [item]
    items: list[Any] = [None] * world_size()
    dist.all_gather_object(items, item, group=_group)
    return items


def gather_to_main(item: Any) -> list[Any]:
    """Every rank's `item` on rank 0, in the order of ranks; nothing on the others."""
    if not active():
        return [item]
    items: list[Any] | None = [None] * world_size() if is_main() else None
    main = 0 if _group is None else dist.get_global_rank(_group, 0)
    dist.gather_object(item, items, main, group=_group)
    return items or []


def from_main(item: Any) -> Any:
    """Rank 0's `item`, on every rank."""
    return gather_objects(item if is_main() else None)[0]


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(world_size())]
        dist.all_gather(parts, rows.contiguous(), group=_group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = all_reduce_sum(gradient.contiguous())
        return gradient.chunk(world_size())[rank()]


def gather_rows(rows: Tensor) -> Tensor:
    """(n, D) of each rank, the same n, joined in the order of ranks.

    The gradients of all ranks are summed and go back to the rank of each row. This is right for a
    loss that every rank computes from all rows, and whose gradients are averaged afterwards.
    """
    return _GatherRows.apply(rows) if active() else rows


def exchange_rows(rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
    """Sends rows to other ranks; without gradient.

    Args:
        rows: in the order of the ranks that they go to.
        sent: how many go to each rank.
        received: how many come from each rank; they are returned in the order of the ranks.
    """
    if not active():
        return rows
    arrived = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(arrived, rows.contiguous(), list(received), list(sent), group=_group)
    return arrived


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether it is true on any rank; all ranks get the same answer."""
    return bool(all_reduce_max(torch.tensor(float(flag), device=device))) if active() else flag
