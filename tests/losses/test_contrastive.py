"""InfoNCE and the sigmoid loss against naive ones: whole, in chunks, on two ranks."""

import math

import pytest
import torch
import torch.nn.functional as F

from losses.contrastive import info_nce_loss, sigmoid_loss
from tests.processes import run_process


def batch(rows: int = 8, width: int = 5) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images, texts = torch.randn(2, rows, width, generator=generator)
    return {
        "images": images,
        "texts": texts,
        "scale": torch.tensor([math.log(1 / 0.07)]),
        "bias": torch.tensor([-3.0]),
    }


def naive_info_nce(images, texts, scale):
    logits = scale.exp() * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T
    labels = torch.arange(len(images))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def naive_sigmoid(images, texts, scale, bias):
    logits = scale.exp() * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T + bias
    signs = 2 * torch.eye(len(images)) - 1
    return -F.logsigmoid(signs * logits).sum() / len(images)


LOSSES = {
    "info_nce": (info_nce_loss, naive_info_nce, ("images", "texts", "scale")),
    "sigmoid": (sigmoid_loss, naive_sigmoid, ("images", "texts", "scale", "bias")),
}


def with_gradients(loss, inputs, **options):
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    value = loss(*inputs, **options)
    value.backward()
    return [value.detach().squeeze(), *(tensor.grad for tensor in inputs)]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("chunk", [1, 3, 8, 100])
def test_loss_and_gradients_equal_the_naive_ones_whole_and_in_chunks(name, chunk):
    loss, naive, keys = LOSSES[name]
    inputs = [batch()[key] for key in keys]
    found, wanted = with_gradients(loss, inputs, chunk=chunk), with_gradients(naive, inputs)
    for own, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-6)
    assert abs(found[0] - wanted[0]) <= 1e-6 * max(1.0, float(wanted[0]))


def test_two_ranks_give_the_loss_and_the_gradients_of_the_joined_batch(tmp_path):
    given = batch()
    torch.save(given, tmp_path / "batch.pt")
    environment = {"INPUT": str(tmp_path / "batch.pt"), "OUTPUT": str(tmp_path)}
    done = run_process("tests/contrastive_ranks.py", ranks=2, **environment)
    assert done.returncode == 0, done.stderr
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for name, (_, naive, keys) in LOSSES.items():
        wanted = with_gradients(naive, [given[key] for key in keys])
        mean, _, _, *numbers = ((a + b) / 2 for a, b in zip(*(p[name] for p in parts), strict=True))
        rows = [torch.cat([part[name][place] for part in parts]) / 2 for place in (1, 2)]
        for own, other in zip([mean, *rows, *numbers], wanted, strict=True):
            torch.testing.assert_close(own.squeeze(), other.squeeze(), rtol=1e-5, atol=1e-6)


def test_vectors_that_say_nothing_cost_ln_b_and_huge_ones_stay_finite():
    same = torch.ones(8, 5)
    scale = torch.tensor(math.log(100))
    assert info_nce_loss(same, same, scale) == pytest.approx(math.log(8), abs=1e-4)
    assert info_nce_loss(1e6 * batch()["images"], 1e6 * batch()["texts"], scale).isfinite()


def test_bf16_vectors_are_computed_in_float32_also_under_autocast():
    given = [batch()[key] for key in ("images", "texts")]
    half = [rows.bfloat16() for rows in given]
    with torch.autocast("cpu", torch.bfloat16):
        found = info_nce_loss(*half, batch()["scale"])
    wanted = naive_info_nce(*(rows.float() for rows in half), batch()["scale"])
    assert found.dtype == torch.float32 and abs(found - wanted.squeeze()) < 1e-5


def test_vectors_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\(8, 5\) and \(7, 5\)"):
        info_nce_loss(batch()["images"], batch()["texts"][:7], batch()["scale"])
