"""kernels.py: compiled for a GPU, the losses are what they are on a CPU."""

import pytest
import torch

import kernels
from losses import centering, cross_entropy


def losses_and_targets(device="cpu", dtype=torch.float32):
    """Losses, their gradients and Sinkhorn's targets of several numbers of rows, on the CPU."""
    found = []
    for views, images in ((2, 7), (8, 7), (1, 11)):
        draw = torch.Generator().manual_seed(images)
        logits = torch.randn(views, images, 50, generator=draw).to(device, dtype).requires_grad_()
        targets = torch.rand(images, 50, generator=draw).softmax(-1).to(device)
        loss = cross_entropy.soft_cross_entropy(logits, targets, 0.1)
        loss.sum().backward()
        sinkhorn = centering.sinkhorn_knopp(logits.detach()[0], 0.04 + 0.01 * views)
        found += [loss.detach().cpu(), logits.grad.float().cpu(), sinkhorn.cpu()]
    return found


def test_each_kernel_is_one_graph_that_writes_what_the_plain_code_writes(monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK", {"cpu": 4 * 2 * 50 * 4})  # rows in several parts
    expected, seen = losses_and_targets(), []
    names = ("score_sums", "write_slope", "write_exponentials", "scale_prototypes_then_rows")
    for name in names:
        plain = getattr(kernels, name).__wrapped__
        graph = torch.compile(plain, backend="aot_eager", fullgraph=True)

        def call(*arguments, name=name, graph=graph):
            seen.append(name)
            return graph(*arguments)

        monkeypatch.setattr(kernels, name, call)
    for value, plain in zip(losses_and_targets(), expected, strict=True):
        torch.testing.assert_close(value, plain)
    assert set(seen) == set(names)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_compiled_on_a_gpu_they_equal_the_plain_code(monkeypatch, dtype):
    monkeypatch.setattr(kernels, "compiled", False)
    expected = losses_and_targets("cuda", dtype)
    monkeypatch.setattr(kernels, "compiled", True)
    for value, plain in zip(losses_and_targets("cuda", dtype), expected, strict=True):
        torch.testing.assert_close(
            value, plain, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-6
        )
