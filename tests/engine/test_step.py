"""The one optimisation step: what micro batches, clipping and values that are not finite do."""

import copy
import math
import types
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from engine import distributed
from engine.cli import RunFailed
from engine.config import OptimConfig
from engine.optim import make_optimizer, parameter_groups
from engine.step import IN_A_ROW, IN_A_ROW_FP16, OptimizationStep

LR, MOMENTUM, CLIP = 0.1, 0.75, 0.05
NOW = {"lr": LR, "weight_decay": 0.0, "ema_momentum": MOMENTUM, "teacher_temp": 0.1}


class Student(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.backbone, self.dino_head = nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.dino_head(self.backbone(x).tanh())


class Rows(types.SimpleNamespace):
    """A batch of rows, divided like a batch of images."""

    def split(self, micro):
        starts = range(0, len(self.images), micro)
        return [Rows(x=self.x[k : k + micro], images=self.images[k : k + micro]) for k in starts]


class Head(nn.Sequential):
    def __init__(self):
        super().__init__()
        self.mlp, self.last_layer = nn.Linear(3, 3), nn.Linear(3, 2, bias=False)


class HeadedStudent(Student):
    """Its head ends in a last layer, as a projection head does."""

    def __init__(self):
        super().__init__()
        self.dino_head = Head()


def step_of(
    student, micro_batch=6, half=False, clip=CLIP, per="module", frozen_until=0
) -> OptimizationStep:
    optimizer = make_optimizer(parameter_groups(student), (0.9, 0.999))
    teacher = copy.deepcopy(student).requires_grad_(False)
    scaler = torch.amp.GradScaler("cpu", enabled=half)
    settings = OptimConfig(clip_grad=clip, clip_per=per)
    return OptimizationStep(
        *(student, teacher, optimizer, (nullcontext, scaler), settings),
        micro_batch=micro_batch,
        frozen_until=frozen_until,
    )


def take(update, batch, step=0, factor=1.0) -> None:
    parts = batch.split(update.micro_batch)
    for rows, target in update.micro_batches(parts, [None] * len(parts)):
        assert target is None
        out = update.student(rows.x)
        terms = {"square": out.square().mean(), "mean": factor * out.mean()}
        update.backward(terms, {"square": 1.0, "mean": 0.5})
    update.apply_gradients(step, LR, 0.0)
    update.update_teacher(MOMENTUM)


@pytest.fixture
def batch():
    return Rows(x=torch.randn(6, 4, generator=torch.Generator().manual_seed(1)), images=range(6))


def weights(module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


@pytest.mark.parametrize("micro_batch", [6, 4, 1])
def test_the_step_is_that_of_a_plain_loop_however_the_batch_is_divided(batch, micro_batch):
    update = step_of(Student(), micro_batch)
    plain, ema = Student(), weights(Student())
    adam = torch.optim.AdamW(plain.parameters(), lr=LR, betas=(0.9, 0.999), weight_decay=0.0)
    for step in range(3):
        take(update, batch, step)
        out = plain(batch.x)
        loss = out.square().mean() + 0.5 * out.mean()
        adam.zero_grad()
        loss.backward()
        norms = [
            nn.utils.clip_grad_norm_(part.parameters(), CLIP)
            for part in (plain.backbone, plain.dino_head)
        ]
        adam.step()
        ema = MOMENTUM * ema + (1 - MOMENTUM) * weights(plain)
        values = update.metrics(step + 1, NOW)
        assert float(values["loss"]) == pytest.approx(loss.item(), rel=1e-5)
        assert float(values["grad_norm"]) == pytest.approx(math.hypot(*norms), rel=1e-5)
        assert min(norms) > CLIP, "nothing was clipped"
    torch.testing.assert_close(weights(update.student), weights(plain), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weights(update.teacher), ema, rtol=1e-5, atol=1e-6)


def dino_step(student, optimizer, frozen) -> None:
    """main_dino.py: each tensor is clipped alone, then the last layer's gradient is dropped."""
    for parameter in student.parameters():
        parameter.grad *= (CLIP / (parameter.grad.norm() + 1e-6)).clamp(max=1)
    if frozen:
        student.dino_head.last_layer.weight.grad = None
    optimizer.step()


def dinov2_step(student, optimizer, frozen) -> None:
    """dinov2/train/train.py: each module is clipped, the last layer has a rate of 0."""
    for module in student.children():
        nn.utils.clip_grad_norm_(module.parameters(), CLIP)
    optimizer.param_groups[1]["lr"] = 0.0 if frozen else LR
    optimizer.step()


@pytest.mark.parametrize("frozen_until", [0, 1, 2, 5])
@pytest.mark.parametrize("per, authors", [("tensor", dino_step), ("module", dinov2_step)])
def test_the_last_layer_is_frozen_as_in_the_recipe_of_the_authors(
    batch, per, authors, frozen_until
):
    update = step_of(HeadedStudent(), per=per, frozen_until=frozen_until)
    plain = HeadedStudent()
    last = plain.dino_head.last_layer.weight
    groups = [[p for p in plain.parameters() if p is not last], [last]]
    adam = torch.optim.AdamW([{"params": group} for group in groups], lr=LR, weight_decay=0.0)
    for step in range(4):
        take(update, batch, step)
        adam.zero_grad()
        out = plain(batch.x)
        (out.square().mean() + 0.5 * out.mean()).backward()
        assert last.grad.norm() > CLIP, "nothing was clipped"
        authors(plain, adam, step < frozen_until)
        torch.testing.assert_close(weights(update.student), weights(plain), rtol=1e-5, atol=1e-6)
    moments = update.optimizer.state[update.student.dino_head.last_layer.weight]
    theirs = adam.state.get(last) or {"exp_avg": torch.zeros_like(last), "step": torch.tensor(0.0)}
    torch.testing.assert_close(moments["exp_avg"], theirs["exp_avg"])
    assert moments["step"] == theirs["step"] == (4 if per == "module" else max(4 - frozen_until, 0))


def test_a_step_that_is_not_finite_is_named_and_moves_nothing(batch, capsys):
    update = step_of(Student(), micro_batch=3)
    take(update, batch)
    before = weights(update.student)
    moments = copy.deepcopy(update.optimizer.state_dict()["state"])
    take(update, batch, step=1, factor=float("nan"))
    assert torch.equal(weights(update.student), before)
    for key, state in update.optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, moments[key][name]) for name, value in state.items())
    update.metrics(2, NOW)
    assert "skipped 1 steps before step 2, not finite: mean;" in capsys.readouterr().err
    take(update, batch, step=2)
    update.metrics(3, NOW)
    assert not torch.equal(weights(update.student), before) and not capsys.readouterr().err


@pytest.mark.parametrize("half, limit", [(False, IN_A_ROW), (True, IN_A_ROW_FP16)])
def test_too_many_steps_in_a_row_that_are_not_finite_end_the_run(batch, half, limit):
    """Also in fp16, where no scale of the gradients can save them."""
    update = step_of(Student(), half=half)
    message = f"not finite for {limit} steps up to step {limit}: mean;"
    with pytest.raises(RunFailed, match=message):
        for step in range(limit + 10):
            take(update, batch, step, factor=float("nan"))
            update.metrics(step + 1, NOW)
    assert weights(update.student).isfinite().all()


def test_phases_are_marked_in_their_order(batch):
    update, marks = step_of(Student(), micro_batch=3), []
    update.mark = marks.append
    with update.forward("teacher"):
        pass
    take(update, batch)
    assert marks == ["teacher", *["loss", "backward"] * 2, "optimizer", "ema"]


def drawn(monkeypatch, seed, step, rank) -> tuple:
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    distributed.seed_step(seed, step)
    return tuple(torch.rand(4).tolist())


def test_every_step_seed_and_rank_draws_its_own_numbers_and_a_resumed_run_the_same(monkeypatch):
    """A CPU's generator reads 32 bits of its seed only."""
    keys = [(0, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 5000), (1, 0, 0), (7, 0, 0), (2**62, 0, 0)]
    keys += [(0, 1 << bits, 0) for bits in (12, 16, 20, 21, 28, 31)]
    keys += [(1 << bits, 3, 0) for bits in (12, 20, 24, 31, 32, 40)]
    numbers = [drawn(monkeypatch, *key) for key in keys]
    assert len(set(numbers)) == len(keys)
    assert [drawn(monkeypatch, *key) for key in keys] == numbers
