"""The parts of the MFU: operations of a step, and how many a device can do in a second."""

import time
from collections.abc import Iterable

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

# Dense operations a second in bf16 (fp16 where there is no bf16) and float32, from the vendors'
# data sheets. The first name that is part of the device's counts.
GPUS = {
    "B200": (2250e12, 75e12),
    "GH200": (989e12, 67e12),
    "H200": (989e12, 67e12),
    "H100 PCIe": (756e12, 51e12),
    "H100 NVL": (835e12, 60e12),
    "H100": (989e12, 67e12),
    "A100": (312e12, 19.5e12),
    "L40S": (362e12, 91.6e12),
    "A10G": (70e12, 35e12),
    "A10": (125e12, 31.2e12),
    "L4": (121e12, 30.3e12),
    "RTX 5090": (209.5e12, 104.8e12),
    "RTX 4090": (165.2e12, 82.6e12),
    "RTX 3090": (71e12, 35.6e12),
    "V100": (125e12, 15.7e12),
    "T4": (65e12, 8.1e12),
}


def peak_flops(device: torch.device, kind: torch.dtype) -> tuple[float, str]:
    """(operations a second, where the number is from) of products of matrices of `kind`.

    Of known GPUs it is the data sheet's, elsewhere that of the fastest of some large products.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = next((peaks for part, peaks in GPUS.items() if part in name), None)
        if known is not None:
            return known[kind == torch.float32], f"data sheet of {name}"
    return _fastest_product(device, kind), f"products of {SIDE} x {SIDE} matrices"


SIDE = 2048


def _fastest_product(device: torch.device, kind: torch.dtype, trials: int = 7) -> float:
    left, right = (torch.randn(SIDE, SIDE, device=device).to(kind) for _ in range(2))
    seconds = []
    for _ in range(trials):
        synchronize(device)
        start = time.perf_counter()
        left @ right
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * SIDE**3 / min(seconds)


def machine(device: torch.device) -> dict:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


def product_type(device: torch.device) -> torch.dtype:
    """Of matrix products, under the current autocast."""
    low = torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if low else torch.float32


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what it was given."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


class FlopClock:
    """Floating-point operations of matrix products, convolutions and attention, by phase.

    `mark(name)` adds what was counted since the last mark to `name`. Forward and backward passes
    count; a multiplication and an addition count as two.

    Args:
        again: modules whose forward pass is computed again in the backward pass (checkpointing).
            The phase "backward" does not count it, because the model does not need it.
    """

    def __init__(self, again: Iterable[nn.Module] = ()):
        self.counter = FlopCounterMode(display=False, custom_mapping=_fused_attention())
        self.done, self.phases = 0, {}
        self.again, self.twice = list(again), 0

    def __enter__(self) -> "FlopClock":
        self.counter.__enter__()
        # Hooks run where a module is called, not where checkpointing computes it again.
        self.hooks = []
        for module in self.again:
            self.hooks.append(module.register_forward_pre_hook(lambda *_: self._count(-1)))
            self.hooks.append(module.register_forward_hook(lambda *_: self._count(1)))
        return self

    def __exit__(self, *error) -> None:
        self.counter.__exit__(*error)
        for hook in self.hooks:
            hook.remove()
        if self.twice:
            self.phases["backward"] -= self.twice

    def _count(self, sign: int) -> None:
        self.twice += sign * self.counter.get_total_flops()

    def mark(self, name: str) -> None:
        total = self.counter.get_total_flops()
        self.phases[name] = self.phases.get(name, 0) + total - self.done
        self.done = total


def _fused_attention() -> dict:
    """Formulas for every operator of fused attention, under the names of any release of torch.

    torch's own table leaves out the CPU's operator, which some releases split into matrix products
    before they are counted and others (torch 2.14) do not; for GPUs it counts the scores that the
    backward pass computes again, which the model does not need.
    """
    formulas = {}
    for name in torch._C._dispatch_get_all_op_names():
        operator = name.removeprefix("aten::").partition(".")[0]
        if name.startswith("aten::_scaled_dot_product_") and "attention_math" not in operator:
            backward = operator.endswith("_backward")
            formulas[getattr(torch.ops.aten, operator)] = (
                _attention_backward if backward else _attention_forward
            )
    return formulas


def _attention_forward(query: torch.Size, key: torch.Size, value: torch.Size, *_, **__) -> int:
    """Of q kᵀ and of its product with v; the arguments are shapes (B, heads, T, d)."""
    batch, heads, queries, width = query
    return 2 * batch * heads * queries * key[2] * (width + value[3])


def _attention_backward(
    grad: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *_, **__
) -> int:
    """Of two products for each of the forward pass."""
    return 2 * _attention_forward(query, key, value)
