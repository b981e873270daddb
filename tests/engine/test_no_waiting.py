"""The step asks no tensor for its values, so the host never waits for the device."""

import contextlib

import pytest
import torch
from torch._subclasses import FakeTensorMode

import train
from engine.config import load_config
from engine.optim import build_schedules
from engine.stages import plan_stages
from engine.start import build_student
from engine.trainer import Trainer
from engine.views import stage_loader
from losses.centering import build_centering
from tests.conftest import TINY

KINDS = {
    "dinov2": ["loss.ibot.prototypes=16"],
    "dinov3": [
        *("model.positions=rope", "model.registers=2", "model.rope_rescale=1.5"),
        *("loss.gram.weight=1", "loss.gram.teacher=ema", "loss.gram.teacher_scale=2"),
        *("model.untie_cls_norm=true", "model.untie_local_cls_norm=true", "model.drop_path=0.2"),
    ],
    "beyond": ["loss.coding_rate.weight=1", "loss.anchor.weight=1", "init=random:vit_nano?depth=2"],
    "dino": ["loss.ibot.weight=0", "loss.dino.centering=ema", "loss.dino.last_layer=weight_norm"],
    "ibot": ["loss.ibot.centering=ema", "optim.clip_per=tensor", "optim.freeze_last_layer=2"],
    "micro": ["micro_batch_size=4", "loss.dino.centering=sinkhorn"],
}


def step_of(overrides, mode):
    """One step of training on the batch that the loader gives; the losses of its terms."""
    cfg = load_config(None, [*TINY, "optim.clip_grad=1", *overrides])
    (stage,) = plan_stages(cfg, 4, build_schedules)
    loaded = next(iter(stage_loader(stage, 1, 8, torch.device("cpu"))))
    with mode:
        torch.manual_seed(0)
        terms = set(stage.schedules)
        student = build_student(cfg, "ibot" in terms, None)
        centering = build_centering(cfg.loss, terms)
        trainer = Trainer(cfg, student, centering, [stage], torch.device("cpu"))
        update = trainer.optimization_step(stage)
        batch = loaded.map(mode.from_tensor) if isinstance(mode, FakeTensorMode) else loaded
        frozen = [
            trainer.teacher.backbone if name in terms else None for name in ("gram", "anchor")
        ]
        train.train_step(update, 1, batch, trainer.centering, frozen, cfg.loss, stage.now(1))
        return update.totals


@pytest.mark.parametrize("kind", KINDS)
def test_no_part_of_a_step_waits_for_a_value(kind, monkeypatch):
    """Fake tensors have shapes and no values: `.item()`, `nonzero` and boolean indexing raise."""
    real = step_of(KINDS[kind], contextlib.nullcontext())
    # Setting up looks at values, moves and copies weights; the step is what counts.
    monkeypatch.setattr(FakeTensorMode, "__deepcopy__", lambda mode, _: mode, raising=False)
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, *_: module)
    monkeypatch.setattr(torch.nn.init, "trunc_normal_", lambda tensor, **_: tensor)
    assert step_of(KINDS[kind], FakeTensorMode()).keys() == real.keys()
