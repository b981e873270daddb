"""Devices and ranks: process group, collectives (identities on one process), parallel models.

On one process no process group exists. `torchrun` sets RANK, WORLD_SIZE and LOCAL_RANK; under
`srun` and `mpirun` they are taken from the variables of these.
"""

import contextlib
import copy
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

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


def sharding_precision(name: str, device: torch.device) -> MixedPrecisionPolicy:
    """FSDP gathers parameters in bf16 where a GPU computes in it; gradients are float32."""
    if device.type == "cuda" and low_precision(name, device) == torch.bfloat16:
        return MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    return MixedPrecisionPolicy()


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


# ----------------------------------------------------------------- parallel models


def prepare(module: nn.Module, checkpointing: str, compiled: bool) -> None:
    """Recomputes activations in the backward pass, and compiles, block by block.

    Names of parameters stay as they are.

    Args:
        checkpointing: "none", "blocks" (of the backbone) or "full" (the heads as well).
        compiled: whether torch.compile is used; where it fails, the block runs as it is.
    """
    blocks = _blocks(module)
    heads = [child for name, child in module.named_children() if name != "backbone"]
    for part in {"none": [], "blocks": blocks, "full": [*blocks, *heads]}[checkpointing]:
        part.forward = partial(checkpoint, part.forward, use_reentrant=False)
    if compiled:
        torch._dynamo.config.suppress_errors = True
        for block in blocks:
            block.compile()


def shard(module: nn.Module, strategy: str, device: torch.device, precision: str) -> nn.Module:
    """With strategy "fsdp", each rank holds a shard of the parameters; otherwise nothing happens.

    Blocks, heads and the rest are gathered when they run, on CUDA in bf16. Gradients are reduced in
    float32.
    """
    if strategy != "fsdp" or not active():
        return module
    if _group is None:
        mesh = init_device_mesh(device.type, (world_size(),))
    else:
        mesh = DeviceMesh.from_group(_group, device.type)
    policy = sharding_precision(precision, device)
    # Each child is a part: the backbone also runs alone, as a Gram teacher.
    parts = list(module.children()) if hasattr(module, "backbone") else []
    for part in [*_blocks(module), *parts, module]:
        # Resharded right after use: the teacher must not run on weights before its last update.
        fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    return module


def _blocks(module: nn.Module) -> list[nn.Module]:
    backbone = getattr(module, "backbone", module)
    timm_model = getattr(backbone, "model", None)
    return list(getattr(backbone, "blocks", getattr(timm_model, "blocks", [])))


class UnshardedTeacher:
    """A full copy of the teacher, for probes, exports and pictures.

    It is made before the teacher is sharded. `module` is the copy, or the teacher itself where
    nothing is sharded. `refresh` fills the copy; all ranks call it together.
    """

    def __init__(self, module: nn.Module, strategy: str, device: torch.device, precision: str):
        self.source, self.sharded = module, strategy == "fsdp" and active()
        self.module = copy.deepcopy(module) if self.sharded else module
        # Shards any module as the teacher is sharded.
        self.place = partial(shard, strategy=strategy, device=device, precision=precision)

    def refresh(self) -> None:
        if self.sharded:
            state = self.source.state_dict()
            self.module.load_state_dict({name: gathered(state[name]) for name in state})


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """This rank's shards, as plain tensors that share their storage; whole tensors as they are."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def wrap(
    module: nn.Module, strategy: str, device: torch.device, *, all_used: bool = True
) -> nn.Module:
    """`module` made parallel; itself without a process group, or where it is sharded.

    Args:
        strategy: "ddp" averages the gradients over ranks; "none" leaves the module as it is.
        all_used: whether every parameter takes part in every loss; where not, DDP looks for the
            unused ones in each step.
    """
    if not active() or strategy != "ddp":
        return module
    devices = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(
        module, device_ids=devices, process_group=_group, find_unused_parameters=not all_used
    )


def unwrap(module: nn.Module) -> nn.Module:
    return module.module if isinstance(module, DistributedDataParallel) else module


def accumulate(module: nn.Module, last: bool) -> contextlib.AbstractContextManager:
    """Gradients of all but the last micro batch stay on their rank."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(last)
    return contextlib.nullcontext() if last or not hasattr(module, "no_sync") else module.no_sync()
