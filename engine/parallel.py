"""Parallel models: DDP, FSDP, recomputed activations and compiled blocks, the same names in all."""

import contextlib
import copy
import warnings
from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from engine.distributed import active, current_group, is_main, low_precision, world_size
from models.ssl_model import host_copy, without_weights


def prepare(module: nn.Module, checkpointing: str, compiled: bool) -> None:
    """Recomputes activations in the backward pass, and compiles, block by block.

    Names of parameters stay as they are.

    Args:
        checkpointing: "none", "blocks" (of the backbone) or "full" (the heads as well).
        compiled: whether torch.compile is used; where it fails, the part runs as it is.
    """
    own = blocks(module)
    heads = [child for name, child in module.named_children() if name != "backbone"]
    for part in {"none": [], "blocks": own, "full": [*own, *heads]}[checkpointing]:
        part.forward = partial(checkpoint, part.forward, use_reentrant=False)
    if compiled:
        torch._dynamo.config.suppress_errors = True
        for block in own:
            block.compile()


def sharding_precision(name: str, device: torch.device) -> MixedPrecisionPolicy:
    """FSDP gathers parameters in bf16 where a GPU computes in it; gradients are float32."""
    if device.type == "cuda" and low_precision(name, device) == torch.bfloat16:
        return MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    return MixedPrecisionPolicy()


def is_sharded(strategy: str) -> bool:
    return strategy == "fsdp" and active()


def place(
    module: nn.Module,
    strategy: str,
    device: torch.device,
    precision: str,
    *,
    trains: bool = False,
) -> nn.Module:
    """Moves a module to the device; with strategy "fsdp" each rank holds a shard of it.

    Blocks, heads and the rest are gathered when they run, on CUDA in bf16; gradients are reduced in
    float32. Sharded from the host, no device ever holds more than its shards and one block.

    Args:
        trains: whether gradients flow back through it as a whole. If not, its backbone and heads
            also run each alone, as probes and a Gram teacher do.
    """
    if not is_sharded(strategy):
        return module.to(device)
    group = current_group()
    if group is None:
        mesh = init_device_mesh(device.type, (world_size(),))
    else:
        mesh = DeviceMesh.from_group(group, device.type)
    policy = sharding_precision(precision, device)
    # It warns of in-place operations on outputs; there are none.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    children = list(module.children()) if hasattr(module, "backbone") else []
    roots = [module] if trains or not children else []
    for part in [*blocks(module), *children, *roots]:
        # Resharded right after use: the teacher must not run on weights before its last update.
        fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    backbone = getattr(module, "backbone", module)
    for name in ("intermediate", "attention"):
        if hasattr(backbone, name):
            register_fsdp_forward_method(backbone, name)
    return module


def blocks(module: nn.Module) -> list[nn.Module]:
    """The transformer blocks of a backbone, or of what has one; [] if it has none."""
    backbone = getattr(module, "backbone", module)
    timm_model = getattr(backbone, "model", None)
    return list(getattr(backbone, "blocks", getattr(timm_model, "blocks", [])))


class HostCopies:
    """Whole copies of a module in the host's memory, to write and to draw; sharded or not.

    It is made before the module is sharded.
    """

    def __init__(self, module: nn.Module, strategy: str):
        self.module = module
        # Of a sharded module only its weights can be copied, so the rest is kept from before.
        self.skeleton = without_weights(module) if is_sharded(strategy) else None

    def make(self, everywhere: bool = False) -> nn.Module | None:
        """A copy on rank 0 or on every rank; None on the others. All ranks call it together.

        Sharded weights are gathered one after another.
        """
        keep = everywhere or is_main()
        if self.skeleton is None:
            return host_copy(self.module) if keep else None
        state = {}
        for name, tensor in self.module.state_dict().items():
            whole = gathered(tensor)
            if keep:
                state[name] = whole.to("cpu", copy=True)
        if not keep:
            return None
        copied = copy.deepcopy(self.skeleton)
        copied.load_state_dict(state, assign=True)
        return copied


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """This rank's shards, as plain tensors that share their storage; whole tensors as they are."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def wrap(module: nn.Module, strategy: str, device: torch.device) -> nn.Module:
    """`module` made parallel; itself without a process group, or where it is sharded.

    Args:
        strategy: "ddp" averages the gradients over ranks; "none" leaves the module as it is.
    """
    if not active() or strategy != "ddp":
        return module
    devices = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(module, device_ids=devices, process_group=current_group())


def unreached(module: nn.Module, loss: Tensor) -> list[nn.Parameter]:
    """Parameters that train but get no gradient from this loss."""
    seen, nodes, reached = set(), [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes.extend(following for following, _ in node.next_functions)
            if hasattr(node, "variable"):
                reached.add(node.variable)
    return [p for p in module.parameters() if p.requires_grad and p not in reached]


def unwrap(module: nn.Module) -> nn.Module:
    return module.module if isinstance(module, DistributedDataParallel) else module


def accumulate(module: nn.Module, last: bool) -> contextlib.AbstractContextManager:
    """Gradients of all but the last micro batch stay on their rank."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(last)
    return contextlib.nullcontext() if last or not hasattr(module, "no_sync") else module.no_sync()
