"""Two ranks give the losses of one process: every kind of training, under ddp and fsdp."""

import itertools
import json
from pathlib import Path

import pytest

import distill
import train
from tests.conftest import TINY
from tests.processes import run_process
from tests.test_train import losses

# Drop path and rotary augmentation draw by rank, so they are off.
SAME = [*TINY, "schedule.lr=1e-3", "checkpoint.every=1000", "loss.koleo.weight=0"]
GRAM = ["loss.gram.weight=1", "loss.gram.teacher=ema", "loss.gram.teacher_scale=2"]
TEACHER = "random:vit_nano?embed_dim=48&depth=2&num_heads=2&patch_size=8"


def losses_of(runs: dict[str, list[str]], folder: Path, script: str, ranks: int) -> dict:
    """The losses of each run, by its name; all run on the same ranks, one after another."""
    commands = [[*keys, f"output_dir={folder / name}"] for name, keys in runs.items()]
    if ranks == 1:
        for command in commands:
            {"train": train, "distill": distill}[script].main(command)
    else:
        given = {"RUNS": json.dumps(commands), "SCRIPT": script}
        done = run_process("tests/many_runs.py", ranks=ranks, **given)
        assert done.returncode == 0, done.stderr[-3000:]
    student = "students/small" if script == "distill" else ""
    return {name: losses(folder / name / student) for name in runs}


def assert_equal(runs: dict[str, list[str]], folder: Path, script: str, steps: int) -> None:
    one, two = (losses_of(runs, folder / f"{ranks}", script, ranks) for ranks in (1, 2))
    for name in runs:
        assert len(one[name]) == steps, name
        assert two[name] == pytest.approx(one[name], rel=1e-5), name


def test_ranks_train_whatever_parameters_take_part(tmp_path):
    """DDP waits for the gradients of all parameters: also of those that no term needs."""
    choices = {
        "untied": ["model.untie_cls_norm=true", "model.untie_local_cls_norm=true"],
        "alone": ["crops.local_count=0"],
        "dino": ["loss.ibot.weight=0"],
        "gram": GRAM,
    }
    runs = {}
    for chosen in itertools.product((False, True), repeat=len(choices)):
        names = [name for name, yes in zip(choices, chosen, strict=True) if yes]
        runs["-".join(names) or "plain"] = sum((choices[name] for name in names), [])
    own_head = ["loss.dino.weight=0", "loss.ibot.prototypes=64"]
    runs["ibot"] = own_head
    runs["ibot-gram-later"] = [*own_head, "model.untie_cls_norm=true", *GRAM, "loss.gram.start=1"]
    runs["one-global"] = ["crops.global_count=1", "loss.ibot.weight=0", *choices["untied"]]
    runs["fsdp"] = ["strategy=fsdp", "loss.ibot.weight=0", *choices["untied"], *choices["alone"]]
    runs["micro"] = [*own_head, *choices["untied"], "micro_batch_size=2"]
    runs = {name: [*SAME, "total_steps=3", *keys] for name, keys in runs.items()}
    assert_equal(runs, tmp_path, "train", 3)


def test_ranks_distil_whatever_parameters_take_part(tmp_path):
    base = [*SAME, "total_steps=3", f"distill.teacher={TEACHER}", "loss.ibot.weight=0"]
    untied = ["model.untie_cls_norm=true", "model.untie_local_cls_norm=true"]
    runs = {
        "both": [],
        "cls": ["distill.patch_weight=0", *untied],
        "patches": ["distill.cls_weight=0", *untied],
    }
    small = "distill.students.small.model.embed_dim=32"
    runs = {name: [*base, small, *keys] for name, keys in runs.items()}
    assert_equal(runs, tmp_path, "distill", 3)


QUICK = {
    "ddp": [],
    "fsdp": ["strategy=fsdp"],
    "ddp-checkpointing": ["checkpointing=full"],
    "fsdp-checkpointing": ["checkpointing=full", "strategy=fsdp"],
    "ddp-gram": [*GRAM, "loss.gram.start=5"],
    "fsdp-gram": [*GRAM, "loss.gram.start=5", "strategy=fsdp"],
    "ddp-micro": ["micro_batch_size=4", "loss.koleo.group=4"],
    "ddp-lora": ["init=random:vit_nano?patch_size=6&depth=2&positions=rope", "tune.mode=lora"],
}
DISTILLED = {
    "ddp": [],
    "fsdp": ["strategy=fsdp"],
    "ddp-checkpointing": ["checkpointing=full"],
}


@pytest.mark.slow
def test_the_first_twenty_losses_of_the_quickstart_are_those_of_one_process(tmp_path):
    base = ["device=cpu", "precision=fp32", "total_steps=20", "log_every=1", "probe.every=0"]
    for script, kinds in (("train", QUICK), ("distill", DISTILLED)):
        common = ["--config", "configs/quickstart.yaml", *base]
        if script == "distill":
            teacher = f"distill.teacher={TEACHER.replace('patch_size=8', 'patch_size=6')}"
            common = [*common, teacher, "distill.students.small.model.embed_dim=64"]
        runs = {name: [*common, *keys] for name, keys in kinds.items()}
        assert_equal(runs, tmp_path / script, script, 20)
