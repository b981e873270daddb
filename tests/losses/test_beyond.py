"""The coding rate and the anchor: values by hand, gradients, and what each is there to hold."""

import math

import pytest
import torch
from torch.nn.functional import normalize

import train
from losses.anchor import anchor_loss
from losses.coding_rate import coding_rate_loss
from models.weights.load import load_backbone
from tests.test_train import metrics


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("n, d", [(3, 3), (4, 8), (8, 8)])
def test_the_rate_of_orthonormal_rows_is_that_by_hand(n, d):
    """Of n orthonormal rows n eigenvalues are 1: logdet = n · log(1 + d / (n · epsilon))."""
    rows = 5.0 * torch.eye(d)[:n]
    by_hand = -(n + d) / (n * d) * n / 2 * math.log(1 + d / (n * 0.5))
    assert coding_rate_loss(rows).item() == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.parametrize("n, d", [(5, 9), (9, 5)])
def test_the_rate_is_the_log_determinant_for_few_rows_and_for_many(n, d):
    rows = normalize(noise(n, d), dim=1)
    inside = torch.eye(d, dtype=torch.float64) + d / (n * 0.2) * rows.T @ rows
    expected = -(n + d) / (n * d) * 0.5 * torch.logdet(inside)
    assert coding_rate_loss(noise(n, d), 0.2).item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_gradient_of_the_rate_is_that_of_finite_differences():
    rows, step = noise(4, 6).float().requires_grad_(), 1e-2
    coding_rate_loss(rows).backward()
    for place in ((0, 0), (1, 5), (3, 2)):
        nudge = torch.zeros_like(rows)
        nudge[place] = step
        with torch.no_grad():
            slope = (coding_rate_loss(rows + nudge) - coding_rate_loss(rows - nudge)) / (2 * step)
        assert rows.grad[place].item() == pytest.approx(slope.item(), rel=2e-2, abs=1e-5)


def test_collapse_has_the_largest_value_and_the_rate_spreads_features():
    together = coding_rate_loss(noise(1, 16).expand(32, 16))
    apart = coding_rate_loss(noise(32, 16))
    assert apart < 2 * together < 0
    rows = (0.1 * noise(32, 16) + noise(1, 16, seed=1)).float().requires_grad_()
    before = coding_rate_loss(rows).item()
    for _ in range(50):
        (gradient,) = torch.autograd.grad(coding_rate_loss(rows), rows)
        rows = (rows - 5 * gradient).detach().requires_grad_()
    assert coding_rate_loss(rows).item() < 1.5 * before


def test_two_ranks_have_the_rate_of_the_whole_batch():
    rows = noise(8, 5).float()
    joined = coding_rate_loss(rows[:4], gather=lambda part: torch.cat([part, rows[4:]]))
    assert torch.equal(joined, coding_rate_loss(rows))


def test_the_anchor_is_nothing_at_the_start_and_two_at_the_opposite():
    cls, patches = noise(3, 8), noise(3, 4, 8)
    assert anchor_loss(cls, patches, cls, 7 * patches, 1.0).item() == pytest.approx(0, abs=1e-6)
    assert anchor_loss(cls, patches, -cls, patches, 1.0).item() == pytest.approx(2)
    assert anchor_loss(cls, patches, cls, -patches, 0.25).item() == pytest.approx(0.5)
    cls.requires_grad_()
    frozen = noise(3, 8, seed=1).requires_grad_()
    anchor_loss(cls, patches, frozen, patches, 1.0).backward()
    assert cls.grad.any() and frozen.grad is None


def test_the_anchor_holds_features_through_training_and_through_a_restart(tiny, tmp_path):
    init = "random:vit_nano?embed_dim=32&depth=2&num_heads=2&patch_size=8"
    base = [*tiny, f"init={init}", "total_steps=30", "schedule.lr=3e-3", "checkpoint.every=100"]
    # Constant, because a length that grows would stretch schedules.
    base += ["schedule.ema_momentum=0.5", "schedule.teacher_temp=0.05", "schedule.weight_decay=0"]
    runs = {"free": [], "held": ["loss.anchor.weight=10"], "again": ["loss.anchor.weight=10"]}
    moved = {}
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    first = load_backbone(init)(images).cls
    for name, keys in runs.items():
        run = f"output_dir={tmp_path / name}"
        if name == "again":  # the anchor comes from the checkpoint, not from where the run stands
            train.main([*base, *keys, run, "total_steps=12"])
        train.main([*base, *keys, run])
        cosines = torch.cosine_similarity(load_backbone(tmp_path / name)(images).cls, first)
        moved[name] = 1 - cosines.mean().item()
    assert moved["held"] < 0.5 * moved["free"]
    ours, theirs = (metrics(tmp_path / name)[-1] for name in ("held", "again"))
    assert ours["loss/anchor"] == theirs["loss/anchor"] > 0


def test_the_anchor_needs_weights(tiny):
    with pytest.raises(ValueError, match="loss.anchor needs weights"):
        train.main([*tiny, "loss.anchor.weight=1"])
