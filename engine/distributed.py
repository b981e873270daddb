"""The leaf that knows about ranks: process group, collectives (identities on one process), wrapping.

Nothing here is needed on one process, where no process group exists. `torchrun` sets RANK, WORLD_SIZE and LOCAL_RANK.
"""

import contextlib
import os
from functools import partial
from typing import Any, Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def choose_device(name: str) -> torch.device:
    """`auto` takes CUDA, then MPS, then the CPU.

    Raises:
        ValueError: if the device asked for is not there.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    if not available.get(name.split(":")[0], False):
        kinds = ", ".join(kind for kind, there in available.items() if there)
        raise ValueError(f"device {name} is not available here; give one of {kinds}, or auto")
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
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
    """A context for the forward passes, and the scaler that fp16 gradients need (idle otherwise)."""
    if name == "auto":
        name = "bf16" if has_fast_bf16(device) else "fp32"
    kind = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
    autocast = partial(torch.autocast, device.type, dtype=kind, enabled=kind is not None)
    return autocast, torch.amp.GradScaler(device.type, enabled=name == "fp16")


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Joins the group that torchrun announces in the environment, and leaves it at the end."""
    if "WORLD_SIZE" not in os.environ or "RANK" not in os.environ:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def active() -> bool:
    return dist.is_available() and dist.is_initialized()


def seed_step(seed: int, step: int) -> None:
    """All randomness of a step on this rank follows from (seed, step, rank): a resumed run draws what it would have."""
    torch.manual_seed((seed * 2**40 + step * 2**12 + rank()) % 2**63)


def rank() -> int:
    return dist.get_rank() if active() else 0


def world_size() -> int:
    return dist.get_world_size() if active() else 1


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    if active():
        dist.barrier()


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum over ranks, in place; the tensor is returned."""
    if active():
        dist.all_reduce(tensor)
    return tensor


def all_reduce_max(tensor: Tensor) -> Tensor:
    if active():
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


def mean_over_ranks(tensor: Tensor) -> Tensor:
    return all_reduce_sum(tensor.clone()) / world_size()


def gather_objects(item: Any) -> list[Any]:
    """Every rank's `item`, in the order of ranks."""
    if not active():
        return [item]
    items: list[Any] = [None] * world_size()
    dist.all_gather_object(items, item)
    return items


def wrap(module: nn.Module, strategy: str, device: torch.device, *, all_used: bool = True) -> nn.Module:
    """`module` made parallel from outside; itself where there is no process group.

    Args:
        strategy: "ddp" averages the gradients over ranks; "none" leaves the module as it is.
        all_used: whether every parameter takes part in every loss; where not, DDP looks for the idle ones each step.
    """
    if not active() or strategy == "none":
        return module
    devices = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(module, device_ids=devices, find_unused_parameters=not all_used)


def unwrap(module: nn.Module) -> nn.Module:
    return module.module if isinstance(module, DistributedDataParallel) else module


def accumulate(module: nn.Module, last: bool) -> contextlib.AbstractContextManager:
    """Gradients of all but the last micro batch stay on their rank."""
    return contextlib.nullcontext() if last or not hasattr(module, "no_sync") else module.no_sync()
