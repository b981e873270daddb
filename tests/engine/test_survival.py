"""What ends a run, or goes beside it: memory that runs out, a loader process that dies, the scale
of fp16, mirrors.
"""

import json
import os
import re
import signal
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import get_worker_info

import train
from engine.checkpoint import CheckpointWriter, latest_step, load_checkpoint, training_state
from engine.cli import RunFailed, run_script
from engine.logger import read_metrics
from engine.optim import make_optimizer
from tests.processes import run_process
from tests.test_train import folder_of, metrics


def ending(call: list[str], capsys) -> tuple[int, list[str]]:
    """Exit status and what was said on standard error by a script that ends in an error."""
    with pytest.raises(SystemExit) as caught:
        run_script(lambda _: train.main(call))
    return caught.value.code, capsys.readouterr().err.splitlines()


# ----------------------------------------------------------------- memory

SHORT = {
    "cuda": lambda: torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total ..."
    ),
    "cublas": lambda: RuntimeError(
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
    ),
    "mps": lambda: RuntimeError("MPS backend out of memory (MPS allocated: 18.01 GB, ..."),
    "numpy": lambda: MemoryError("Unable to allocate 4.00 TiB for an array with shape ..."),
    "cpu": lambda: torch.empty(2**58, dtype=torch.uint8),  # raises by itself
    "fork": lambda: OSError(12, "Cannot allocate memory"),
}


class Scarce:
    """A data set with an image that takes more memory than there is, or kills who reads it, in the
    main process or a worker.
    """

    def __init__(self, what: str, where: str = "main"):
        self.what, self.where = what, where

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == 5 and (get_worker_info() is None) == (self.where == "main"):
            raise SHORT[self.what]() if self.what in SHORT else os.kill(os.getpid(), signal.SIGKILL)
        return torch.full((3, 40, 40), index, dtype=torch.uint8)


@pytest.mark.parametrize("what", ["cuda", "cublas", "mps", "numpy", "cpu"])
def test_out_of_memory_is_a_sentence_that_says_what_to_lower(what, tiny, capsys):
    status, said = ending(
        [*tiny, f"data.train=python:tests.engine.test_survival:Scarce?what={what}"], capsys
    )
    assert status == 2 and said[-1].startswith(
        "error: out of memory; lower batch_size or micro_batch_size"
    ), said


def test_out_of_memory_in_the_model_is_the_same_sentence(tiny, capsys, monkeypatch):
    def forward(*arguments, **options):
        raise SHORT["cuda"]()

    monkeypatch.setattr(train, "compute_losses", forward)
    status, said = ending(tiny, capsys)
    assert (
        status == 2
        and sum("error:" in line for line in said) == 1
        and "checkpointing=blocks" in said[-1]
    )


@pytest.mark.parametrize("what", ["numpy", "cpu", "cuda"])
def test_out_of_memory_in_a_worker_says_to_have_fewer(what, tiny, capsys):
    data = f"data.train=python:tests.engine.test_survival:Scarce?what={what}&where=worker"
    status, said = ending([*tiny, data, "data.workers=1"], capsys)
    assert status == 2 and said[-1].startswith(
        "error: out of memory in a loader process; lower data.workers"
    ), said


def test_a_worker_that_is_killed_is_a_sentence(tiny, capsys):
    data = "data.train=python:tests.engine.test_survival:Scarce?what=kill&where=worker"
    status, said = ending([*tiny, data, "data.workers=1"], capsys)
    assert (
        status == 1
        and "a loader process died" in said[-1]
        and "lower data.workers or batch_size" in said[-1]
    ), said
    assert not any("Traceback" in line for line in said)


def test_a_failure_of_another_kind_is_not_called_one_of_memory(capsys):
    def fails(error: Exception):
        def main(_):
            raise error

        return main

    with pytest.raises(RuntimeError, match="shape mismatch"):
        run_script(fails(RuntimeError("shape mismatch")))
    with pytest.raises(SystemExit):
        run_script(fails(RunFailed("the checkpoint could not be written (can't allocate memory)")))
    assert "the checkpoint could not be written" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        run_script(fails(SHORT["fork"]()))
    assert caught.value.code == 2 and "out of memory; lower" in capsys.readouterr().err


# ----------------------------------------------------------------- fp16


def parts() -> tuple:
    torch.manual_seed(0)
    student = nn.Linear(3, 2)
    return (
        student,
        nn.Linear(3, 2),
        nn.ModuleDict(),
        make_optimizer([{"params": list(student.parameters())}], (0.9, 0.99)),
    )


def save(run: Path, step: int, state: dict) -> None:
    writer = CheckpointWriter(run, keep=2)
    writer.save(step, state)
    writer.finish()


def test_the_scale_of_fp16_survives_a_checkpoint_and_may_be_absent_from_an_old_one(tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)
    student, *rest = parts()
    for _ in range(2):
        scaler.scale(student(torch.ones(1, 3)).sum()).backward()
        scaler.step(rest[-1])
        scaler.update()
    scaler.update(4.0)
    save(tmp_path, 1, training_state(student, *rest, scaler))
    save(tmp_path, 2, training_state(student, *rest, torch.amp.GradScaler("cpu", enabled=False)))

    other, *fresh = parts()
    resumed = torch.amp.GradScaler("cpu", growth_interval=3)
    load_checkpoint(tmp_path, 2, training_state(other, *fresh, resumed))
    assert resumed.get_scale() == 2.0**16 and torch.equal(other.weight, student.weight)
    load_checkpoint(tmp_path, 1, training_state(other, *fresh, resumed))
    assert resumed.state_dict() == scaler.state_dict() and resumed.get_scale() == 4.0
    assert resumed.state_dict()["_growth_tracker"] == 2
    load_checkpoint(
        tmp_path, 1, training_state(*parts(), torch.amp.GradScaler("cpu", enabled=False))
    )  # not asked for


def test_saving_waits_for_nothing_and_counts_only_when_all_is_written(tmp_path):
    state = training_state(*parts(), torch.amp.GradScaler("cpu", enabled=False))
    save(tmp_path, 1, state)
    written, writer = threading.Event(), CheckpointWriter(tmp_path, keep=2)
    writer.save(2, state)
    writer.also(written.wait)
    writer.future.result()
    writer.poll()
    assert latest_step(tmp_path) == 1  # the tensors are there, the pictures are not
    written.set()
    writer.finish()
    assert latest_step(tmp_path) == 2

    def fails() -> None:
        raise RunFailed("teacher could not be written (No space left on device)")

    writer.save(3, state)
    writer.also(fails)
    with pytest.raises(RunFailed, match="No space"):
        writer.finish()
    assert latest_step(tmp_path) == 2 and not (tmp_path / "checkpoints" / "3.unfinished").exists()


def test_the_newest_checkpoints_stay_and_latest_names_the_last(tmp_path):
    state = training_state(*parts(), torch.amp.GradScaler("cpu", enabled=False))
    for step in (8, 9, 10):
        save(tmp_path, step, state)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"9", "10", "latest"}
    assert latest_step(tmp_path) == 10


def test_a_resumed_run_in_fp16_goes_on_with_the_same_scale(tiny, tmp_path, capsys):
    """On the way down from 2 ** 16 each step too high is skipped: a fresh scale would skip them
    again.
    """
    constant = [
        "schedule.lr=1e-3",
        "schedule.weight_decay=0.04",
        "schedule.ema_momentum=0.9",
        "schedule.teacher_temp=0.05",
    ]
    half = [*tiny, *constant, "precision=fp16", "checkpoint.every=100"]
    train.main([*half, "total_steps=16", f"output_dir={tmp_path / 'whole'}"])
    said = capsys.readouterr().err
    assert "before step 2, while fp16 lowers" in said and "before step 16" not in said, said
    train.main([*half, "total_steps=13"])
    train.main([*half, "total_steps=16"])
    assert metrics(folder_of(tiny)) == metrics(tmp_path / "whole")


def test_fp16_on_two_ranks_is_fp16_on_one(tiny, tmp_path):
    half = [*tiny, "precision=fp16", "schedule.lr=1e-3", "total_steps=12", "checkpoint.every=100"]
    done = run_process("train.py", *half, ranks=2)
    assert done.returncode == 0, done.stderr
    train.main([*half, f"output_dir={tmp_path / 'one'}"])
    for ours, theirs in zip(metrics(folder_of(tiny)), metrics(tmp_path / "one"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=5e-3)


# ----------------------------------------------------------------- mirrors

WANDB = """
import json, pathlib

in_use = []

class Error(Exception):
    pass

class Run:
    def __init__(self, options):
        self.path = pathlib.Path(options["dir"]) / "wandb" / "logged.jsonl"
        self.path.parent.mkdir(exist_ok=True)
        in_use.append(options["id"])
        self.id = options["id"]
        self._write({"init": {name: str(value) for name, value in options.items()}})

    def log(self, data, step=None):
        self._write({"step": step, "data": data})

    def finish(self):
        in_use.remove(self.id)

    def _write(self, record):
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\\n")

def init(project=None, name=None, dir=None, id=None, resume=None, reinit=None):
    if pathlib.Path(__file__).with_name("logged_out").exists():
        raise Error("api_key not configured (no-tty)")
    if id in in_use:
        raise Error(f"run ID {id} is in use")
    given = {"project": project, "name": name, "dir": dir}
    return Run(given | {"id": id, "resume": resume, "reinit": reinit})
"""


@pytest.fixture
def wandb(tmp_path, monkeypatch) -> Path:
    """A package with the part of wandb's interface that is used; a file `logged_out` in it makes it
    refuse.
    """
    package = tmp_path / "packages" / "wandb"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(WANDB)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.syspath_prepend(package.parent)
    yield package
    sys.modules.pop("wandb", None)


def wandb_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "wandb" / "logged.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_mirror_without_its_package_is_refused_before_anything_is_made_or_removed(
    name, tiny, capsys, monkeypatch
):
    train.main([*tiny, "total_steps=2"])
    before = {path: path.stat().st_mtime_ns for path in folder_of(tiny).rglob("*")}
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, name, None)
    capsys.readouterr()
    status, said = ending([*tiny, f"mirrors=[{name}]", "overwrite=true"], capsys)
    assert status == 2 and said == [
        f"error: mirrors: [{name}] needs the package {name}: pip install {name}"
    ]
    assert before == {path: path.stat().st_mtime_ns for path in folder_of(tiny).rglob("*")}
    status, said = ending([*tiny, f"mirrors=[{name}]", f"output_dir={folder_of(tiny)}2"], capsys)
    assert status == 2 and not Path(f"{folder_of(tiny)}2").exists()


def test_wandb_gets_what_metrics_jsonl_has_and_a_resumed_run_is_the_same_one(tiny, wandb):
    train.main([*tiny, "total_steps=2", "mirrors=[wandb]"])
    train.main([*tiny, "total_steps=4", "mirrors=[wandb]"])
    first, *logged = wandb_of(folder_of(tiny))
    assert (
        first["init"]["project"] == "nanodino"
        and first["init"]["name"] == "run"
        and first["init"]["resume"] == "allow"
    )
    again = logged.pop(2)
    assert again == first and re.fullmatch("[0-9a-f]{12}", first["init"]["id"])
    for record, line in zip(logged, read_metrics(folder_of(tiny) / "metrics.jsonl"), strict=True):
        numbers = {
            name: value
            for name, value in line.items()
            if value is not None and not isinstance(value, str)
        }
        assert record["step"] == line["step"] and record["data"] == pytest.approx(numbers, rel=1e-5)
    train.main([*tiny, "total_steps=2", "mirrors=[wandb]", "overwrite=true"])
    (fresh, *rest) = wandb_of(folder_of(tiny))
    assert fresh["init"]["id"] != first["init"]["id"] and [record["step"] for record in rest] == [
        1,
        2,
    ]


def test_wandb_that_is_logged_out_says_so(tiny, wandb, capsys):
    (wandb / "logged_out").touch()
    status, said = ending([*tiny, "mirrors=[wandb]"], capsys)
    assert (
        status == 2
        and said[-1].startswith("error: mirrors: [wandb]: api_key not configured")
        and "wandb login" in said[-1]
    )
    assert not (folder_of(tiny) / "metrics.jsonl").exists() or not read_metrics(
        folder_of(tiny) / "metrics.jsonl"
    )


def test_tensorboard_gets_what_metrics_jsonl_has_and_a_resumed_run_doubles_nothing(tiny):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for steps in (3, 4):
        train.main(
            [
                *tiny,
                f"total_steps={steps}",
                "schedule.lr=1e-3",
                "mirrors=[tensorboard]",
                "checkpoint.every=3",
            ]
        )
    events = EventAccumulator(str(folder_of(tiny) / "tensorboard")).Reload()
    lines = read_metrics(folder_of(tiny) / "metrics.jsonl")
    assert {"loss", "loss/dino", "health/teacher_kl", "grad_norm", "lr"} <= set(
        events.Tags()["scalars"]
    )
    assert (
        [event.step for event in events.Scalars("loss")]
        == [1, 2, 3, 4]
        == [line["step"] for line in lines]
    )
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(
        [line["loss"] for line in lines], rel=1e-5
    )
