"""Parallel models: DDP, FSDP, recomputed activations and compiled blocks, the same names in all."""

import contextlib
import copy
from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from engine.distributed import active, current_group, low_precision, world_size


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


def sharding_precision(name: str, device: torch.device) -> MixedPrecisionPolicy:
    """FSDP gathers parameters in bf16 where a GPU computes in it; gradients are float32."""
    if device.type == "cuda" and low_precision(name, device) == torch.bfloat16:
        return MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    return MixedPrecisionPolicy()


def shard(module: nn.Module, strategy: str, device: torch.device, precision: str) -> nn.Module:
    """With strategy "fsdp", each rank holds a shard of the parameters; otherwise nothing happens.

    Blocks, heads and the rest are gathered when they run, on CUDA in bf16. Gradients are reduced in
    float32.
    """
    if strategy != "fsdp" or not active():
        return module
    group = current_group()
    if group is None:
        mesh = init_device_mesh(device.type, (world_size(),))
    else:
        mesh = DeviceMesh.from_group(group, device.type)
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
        module,
        device_ids=devices,
        process_group=current_group(),
        find_unused_parameters=not all_used,
    )


def unwrap(module: nn.Module) -> nn.Module:
    return module.module if isinstance(module, DistributedDataParallel) else module


def accumulate(module: nn.Module, last: bool) -> contextlib.AbstractContextManager:
    """Gradients of all but the last micro batch stay on their rank."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(last)
    return contextlib.nullcontext() if last or not hasattr(module, "no_sync") else module.no_sync()
