"""The recipes for forks: each patch is applied to a copy of the program, which trains with it."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import train
from models.weights.load import load_backbone
from tests.conftest import TINY
from tests.test_pages import blocks
from tests.test_train import metrics

ROOT = Path(__file__).parent.parent
PAGES = {
    "loss": ("README.md", "uniformity"),
    "optimizer": ("docs/extend.md", "SGD"),
    "augmentation": ("docs/extend.md", "ERASE"),
    "labels": ("docs/extend.md", "class_head"),
    "block": ("docs/extend.md", "self.gate"),
}
ROOMS = ("data", "engine", "evals", "losses", "models", "configs")


@pytest.fixture
def fork(request, tmp_path):
    """A copy of the program with the patch of that name."""
    page, word = PAGES[request.param]
    (patch,) = (text for text in blocks((ROOT / page).read_text(), "diff") if word in text)
    copy = tmp_path / "fork"
    for room in ROOMS:
        shutil.copytree(ROOT / room, copy / room, ignore=shutil.ignore_patterns("__pycache__"))
    for script in ROOT.glob("*.py"):
        shutil.copy(script, copy)
    done = subprocess.run(
        ["git", "apply", "-"], cwd=copy, input=patch + "\n", text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    return copy


def train_in(fork: Path, *overrides: str) -> list[dict]:
    output = fork / f"run{len(list(fork.glob('run*')))}"
    command = [sys.executable, "train.py", *TINY, f"output_dir={output}", *overrides]
    done = subprocess.run(command, cwd=fork, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return metrics(output)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The records of the program as it is."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    train.main([*TINY, f"output_dir={folder}"])
    return metrics(folder)


@pytest.mark.parametrize("fork", ["loss"], indirect=True)
def test_a_loss_is_trained_and_logged(fork, plain):
    first = train_in(fork, "loss.uniformity.weight=1")[0]
    assert first["loss/uniformity"] < 0
    assert first["loss"] == pytest.approx(plain[0]["loss"] + first["loss/uniformity"], rel=1e-5)
    assert first["grad_norm"] != plain[0]["grad_norm"]
    assert train_in(fork)[-1]["loss"] == plain[-1]["loss"]  # off by default


@pytest.mark.parametrize("fork", ["optimizer"], indirect=True)
def test_an_optimizer_trains_and_resumes(fork, plain):
    constant = ["schedule.lr=0.05", "schedule.weight_decay=0.01", "schedule.teacher_temp=0.05"]
    constant += ["schedule.ema_momentum=0.9", "output_dir=run"]
    train_in(fork, *constant, "total_steps=2")
    resumed = subprocess.run(
        [sys.executable, "train.py", *TINY, *constant], cwd=fork, text=True, capture_output=True
    )
    assert resumed.returncode == 0 and "going on from step 2" in resumed.stderr
    whole = train_in(fork, *constant, "output_dir=whole")
    records = [json.loads(line) for line in (fork / "whole/metrics.jsonl").open()] or whole
    assert [r["loss"] for r in metrics(fork / "run")] == [r["loss"] for r in records]
    assert records[-1]["loss"] != plain[-1]["loss"]


@pytest.mark.parametrize("fork", ["augmentation"], indirect=True)
def test_an_augmentation_acts_and_leaves_old_seeds_their_views(fork, plain):
    assert train_in(fork, "crops.erase=1")[0]["loss"] != plain[0]["loss"]
    assert [record["loss"] for record in train_in(fork)] == [record["loss"] for record in plain]


@pytest.mark.parametrize("fork", ["labels"], indirect=True)
def test_a_head_learns_labels(fork):
    keys = ["loss.labels.weight=1", "loss.labels.classes=10", "micro_batch_size=4"]
    records = train_in(fork, *keys, "total_steps=40", "schedule.lr=3e-3", "checkpoint.every=100")
    values = [record["loss/labels"] for record in records]
    assert values[0] == pytest.approx(math.log(10), abs=1)
    assert sum(values[-5:]) < sum(values[:5])


@pytest.mark.parametrize("fork", ["block"], indirect=True)
def test_a_parameter_of_a_block_trains_and_is_read_back(fork, tmp_path):
    plain = tmp_path / "plain"
    train.main([*TINY, f"output_dir={plain}"])
    constant = ["schedule.lr=0.01", "schedule.ema_momentum=0.5", f"init={plain}"]
    train_in(fork, *constant, "output_dir=gated")
    code = (
        "from models.weights.load import load_backbone;"
        "print([block.attn.gate.tolist() for block in load_backbone('gated').blocks])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=fork, text=True, capture_output=True)
    gates = sum(json.loads(done.stdout), [])
    assert done.returncode == 0 and len(gates) == 4 and 0 < max(abs(g - 1) for g in gates) < 0.5
    with pytest.raises(ValueError, match="unexpected"):  # the program without gates
        load_backbone(fork / "gated")
