"""Fixtures: a tiny configuration that trains in seconds, and folders of generated images."""

import os
from pathlib import Path

# Two tests run at a time, and tiny tensors gain nothing from threads. Torch reads this when it is
# imported.
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pytest
import torch
from PIL import Image

from evals import inloop

torch.set_num_threads(1)

TINY = [
    "device=cpu",
    "precision=fp32",
    "total_steps=4",
    "batch_size=8",
    "log_every=1",
    "data.train=scenes?size=40",
    "data.workers=0",
    "crops.global_size=32",
    "crops.local_size=16",
    "crops.local_count=2",
    "model.arch=vit_nano",
    "model.embed_dim=32",
    "model.depth=2",
    "model.num_heads=2",
    "model.patch_size=8",
    "loss.dino.prototypes=32",
    "loss.dino.hidden=32",
    "loss.dino.bottleneck=16",
    "loss.ibot.weight=1",
    "loss.ibot.hidden=32",
    "loss.ibot.bottleneck=16",
    "loss.koleo.weight=0.1",
    "loss.koleo.group=4",
    "checkpoint.every=2",
]


def of_timm(call: list[str], name: str) -> list[str]:
    """The overrides with a model of timm in place of the tiny ViT, whose keys it does not read."""
    kept = [part for part in call if not part.startswith("model.")]
    return [*kept, f"model.arch=timm:{name}", "crops.global_size=64", "crops.local_size=32"]


DRAWING = {name: getattr(inloop, name) for name in ("draw_curves", "report_teacher")}


@pytest.fixture(scope="session", autouse=True)
def no_pictures():
    """Runs within pytest draw nothing: pictures take two thirds of the time of a tiny run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inloop, "draw_curves", lambda path, runs: None)
        patch.setattr(inloop, "report_teacher", lambda *_, **__: None)
        yield


@pytest.fixture
def pictures(no_pictures, monkeypatch):
    """Runs of this test draw their pictures."""
    for name, function in DRAWING.items():
        monkeypatch.setattr(inloop, name, function)


@pytest.fixture
def tiny(tmp_path):
    """The overrides of a run of four steps in its own folder.

    More may be appended; the last one wins.
    """
    return [*TINY, f"output_dir={tmp_path / 'run'}"]


@pytest.fixture
def images(tmp_path) -> Path:
    """A flat folder of 12 PNGs of odd sizes, grey and colour, without labels."""
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(12):
        shape = (50, 97) if number % 3 else (33 + number, 41)
        pixels = rng.integers(0, 256, (*shape, 3) if number % 2 else shape, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder
