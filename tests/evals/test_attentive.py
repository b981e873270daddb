"""The attentive probe: what pools patches, and what `eval_linear.py --pool attention` does."""

import json

import pytest
import torch

import eval_linear
from errors import UserError
from evals.attentive import AttentiveGrid, AttentiveHead, AttentivePool, describe_tokens
from models import load_backbone

CPU = torch.device("cpu")


def tokens(count: int = 6, dim: int = 24) -> torch.Tensor:
    return torch.randn(3, count, dim, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_the_order_of_patches_does_not_matter():
    pool, x = AttentivePool(24, 5), tokens()
    order = torch.randperm(6, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(pool(x), pool(x[:, order]), atol=1e-6)


@torch.no_grad()
def test_a_query_of_zeros_is_the_mean_of_the_values():
    pool, x = AttentivePool(24, 5), tokens()
    pool.query.zero_()
    values = pool.kv(pool.norm(pool.reduce(x)))[..., 512:]
    assert torch.allclose(pool.pool(x), values.mean(1), atol=1e-6)


def test_tokens_are_the_patches_of_the_last_blocks_side_by_side():
    backbone = load_backbone("random:vit_nano?depth=3&patch_size=8&image_size=32")
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        rows = describe_tokens(backbone, images, 2)
        last, before = backbone(images).patches, backbone.intermediate(images, 2)[0].patches
    assert torch.equal(rows.unflatten(1, (16, -1)), torch.cat([before, last], dim=-1))


def test_one_small_patch_decides_and_a_head_that_diverges_harms_no_other():
    """The class is the sign of one patch of sixteen, whose place changes: the mean hides it."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(512) % 2
    x = torch.randn(512, 16, 8, generator=generator)
    place = torch.randint(16, (512,), generator=generator)
    x[torch.arange(512), place] = 0
    x[torch.arange(512), place, 0] = 6.0
    x[torch.arange(512), place, 1] = 4.0 * (2 * labels - 1).float()
    rows = x.flatten(1)
    heads = [AttentiveHead(1, 3e-3), AttentiveHead(1, 1e30)]
    grid = AttentiveGrid(heads, dim=8, classes=2, batch_size=256, device=CPU)
    for step in range(60):
        part = slice(64 * (step % 6), 64 * (step % 6) + 64)
        grid.step(rows[part], labels[part])
    found = grid.accuracies(rows[384:], labels[384:])
    assert found[heads[0]] > 0.9 and found[heads[1]] == 0


def call(*more: str) -> list[str]:
    data = ["--train", "scenes?size=40", "--val", "scenes?split=val&size=20"]
    model = "random:vit_nano?depth=2&patch_size=8&image_size=32"
    return ["--model", model, "--pool", "attention", "--steps", "3", *data, *more]


def test_the_script_reports_every_rate_and_further_sets(capsys):
    eval_linear.main(call("--also", "scenes?split=val&size=15"))
    result = json.loads(capsys.readouterr().out)
    assert result["protocol"] == "attentive" and result["steps"] == 3
    assert result["best"]["blocks"] == 2 and len(result["grid"]) == 5
    assert result["also"]["scenes?split=val&size=15"]["n"] == 15
    again = result["top1"], result["grid"]
    eval_linear.main(call("--also", "scenes?split=val&size=15"))
    result = json.loads(capsys.readouterr().out)
    assert again == (result["top1"], result["grid"])


def test_random_crops_train_it_too(capsys):
    eval_linear.main(call("--stream", "--lr", "0.01"))
    assert len(json.loads(capsys.readouterr().out)["grid"]) == 1


def test_another_protocol_beside_it_is_refused():
    with pytest.raises(UserError, match="--pool attention"):
        eval_linear.main(call("--protocol", "logreg"))
