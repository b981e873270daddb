"""What each rank holds: under fsdp shards of every network, and nowhere a whole one."""

import gc
import json
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from engine import parallel
from engine.run import Run
from models.weights.load import load_backbone
from tests.conftest import TINY
from tests.processes import run_process
from tests.test_train import metrics

# Networks of every kind, probes of every kind, and fewer probe images than make a batch each.
SHARDED = [
    *TINY,
    "total_steps=3",
    "model.embed_dim=64",
    "strategy=fsdp",
    "loss.ibot.prototypes=16",
    "loss.gram.weight=1",
    "model.positions=rope",
    "init=random:vit_nano?embed_dim=64&depth=2&num_heads=2&patch_size=8&positions=rope",
    "loss.gram.teacher=init",
    "probe.every=2",
    "probe.train=scenes?size=24",
    "probe.val=scenes?size=70",
    "probe.linear=true",
]


def note_holdings() -> None:
    """Lets each rank write, after every step, how many numbers it holds of each part."""
    step_done = Run.step_done

    def noting(self, step, logged):
        gc.collect()
        state = {name: list(_tensors(part)) for name, part in self.state.items()}
        live = [thing for thing in gc.get_objects() if isinstance(thing, nn.Parameter)]
        live = [tensor for tensor in parallel.local(live) if tensor.device.type != "meta"]
        storages = {tensor.data_ptr(): tensor.untyped_storage().nbytes() for tensor in live}
        held = {
            "whole": {name: sum(t.numel() for t in part) for name, part in state.items()},
            "local": {
                name: sum(t.numel() for t in parallel.local(part)) for name, part in state.items()
            },
            "parameters": sum(storages.values()) // 4,
        }
        Path(f"{os.environ['HELD']}.{os.environ['RANK']}").write_text(json.dumps(held))
        step_done(self, step, logged)

    Run.step_done = noting


def _tensors(part):
    if isinstance(part, dict):
        for value in part.values():
            yield from _tensors(value)
    elif isinstance(part, torch.Tensor) and part.dim():
        yield part


def train_on_two_ranks(folder: Path, *overrides: str, script: str = "train.py") -> list[dict]:
    held = str(folder / "held")
    arguments = [*overrides, f"output_dir={folder / 'run'}"]
    done = run_process(script, *arguments, ranks=2, before=note_holdings, HELD=held)
    assert done.returncode == 0 and "FSDP2" not in done.stderr, done.stderr
    return [json.loads(Path(f"{held}.{rank}").read_text()) for rank in (0, 1)]


def test_each_rank_holds_its_shards_of_all_networks_and_no_whole_one(tmp_path):
    # The copy that a checkpoint's thread writes lives on rank 0's host until it is written.
    ranks = train_on_two_ranks(tmp_path, *SHARDED, "checkpoint.every=100")
    names = ("student", "teacher", "gram_teacher", "optimizer")
    for name in names:
        whole = ranks[0]["whole"][name]
        shares = [rank["local"][name] / whole for rank in ranks]
        assert sum(shares) == pytest.approx(1, abs=1e-3) and max(shares) < 0.53, (name, shares)
    networks = sum(ranks[0]["whole"][name] for name in names[:3])
    for rank in ranks:  # of all parameters that live in the process
        assert rank["parameters"] < 0.53 * networks, (rank, networks)


def test_a_sharded_teacher_is_probed_and_written_as_a_whole_one(tmp_path):
    (tmp_path / "one").mkdir()
    train_on_two_ranks(tmp_path, *SHARDED)
    train_on_two_ranks(tmp_path / "one", *SHARDED, "strategy=ddp")
    runs = [metrics(folder / "run") for folder in (tmp_path, tmp_path / "one")]
    for sharded, whole in zip(*runs, strict=True):
        assert sharded.keys() == whole.keys()
        for name in (name for name in whole if name.startswith(("loss", "probe/"))):
            assert sharded[name] == pytest.approx(whole[name], rel=1e-4), (name, whole["step"])
    folders = [tmp_path / "run" / "teacher", tmp_path / "one" / "run" / "teacher"]
    sharded, whole = (load_backbone(folder).state_dict() for folder in folders)
    for name, tensor in whole.items():
        torch.testing.assert_close(sharded[name], tensor, rtol=1e-4, atol=1e-5)


def test_the_teacher_of_a_distillation_is_sharded(tmp_path):
    teacher = "random:vit_nano?embed_dim=96&depth=4&num_heads=2&patch_size=8&positions=rope"
    ranks = train_on_two_ranks(
        tmp_path,
        *TINY,
        "strategy=fsdp",
        "checkpoint.every=100",
        f"distill.teacher={teacher}",
        "distill.students.small.model.positions=rope",
        script="distill.py",
    )
    students = ranks[0]["whole"]["student"] + ranks[0]["whole"]["teacher"]
    whole = students + sum(p.numel() for p in load_backbone(teacher).parameters())
    assert whole > 5 * students
    for rank in ranks:
        assert rank["parameters"] < 0.53 * whole, (rank, whole)
