"""Weights of the terms: constant or scheduled, in stages, in the log; what tunes and what moves."""

import copy
import dataclasses

import pytest
import torch
import yaml
from torch import nn

import distill
import train
from data.loader import Batch
from engine.config import load_config
from engine.distill_config import DistillTrainConfig
from engine.logger import read_metrics
from engine.optim import build_schedules, optimizer_for
from engine.settings import load_saved
from engine.stages import stage_configs
from engine.start import build_student
from engine.students import student_configs
from errors import UserError
from models.lora import freeze_for
from models.ssl_model import update_ema
from tests.conftest import of_timm

PAIRS = {
    "schedule.dino": "loss.dino.weight",
    "schedule.dino_local": "loss.dino.local_weight",
    "schedule.ibot": "loss.ibot.weight",
    "schedule.koleo": "loss.koleo.weight",
    "schedule.gram": "loss.gram.weight",
}


def nested(path: str, value: float) -> dict:
    for key in reversed(path.split(".")):
        value = {key: value}
    return value


@pytest.mark.parametrize("value", [0.0, 0.5])
@pytest.mark.parametrize("schedule, weight", PAIRS.items())
def test_a_weight_and_a_schedule_in_one_place_are_refused(schedule, weight, value, tmp_path):
    said = rf"{schedule} and {weight} {value} are both given"
    given = [f"{weight}={value}", f"{schedule}=0.25"]
    for order in (given, given[::-1]):
        with pytest.raises(UserError, match=said):
            load_config(None, order)
    both = nested(schedule, 0.25) | nested(weight, value)
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(both))
    with pytest.raises(UserError, match=said):
        load_config(str(tmp_path / "x.yaml"), [])
    (tmp_path / "x.yaml").write_text(yaml.safe_dump({"stages": {"a": {"steps": 2} | both}}))
    with pytest.raises(UserError, match=f"stages.a: {said}"):
        load_config(str(tmp_path / "x.yaml"), [])
    (tmp_path / "x.yaml").write_text(yaml.safe_dump({"distill": {"students": {"s": both}}}))
    with pytest.raises(UserError, match=f"distill.students.s: {said}"):
        load_config(str(tmp_path / "x.yaml"), [], DistillTrainConfig)


@pytest.mark.parametrize("value", [0.0, 0.5])
@pytest.mark.parametrize("schedule, weight", PAIRS.items())
def test_of_a_weight_and_a_schedule_in_two_places_the_later_holds_and_it_is_said(
    schedule, weight, value, tmp_path, capsys
):
    term = schedule.removeprefix("schedule.")
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(nested(schedule, 0.25)))
    if weight == "loss.dino.weight":  # something must be learned
        (tmp_path / "x.yaml").write_text(
            yaml.safe_dump(nested(schedule, 0.25) | {"loss": {"ibot": {"weight": 1.0}}})
        )
    schedules = build_schedules(load_config(str(tmp_path / "x.yaml"), [f"{weight}={value}"]), 10)
    assert schedules[term](5) == value if value or term == "dino_local" else term not in schedules
    assert f"{weight} {value} replaces what stands below it: {schedule}" in capsys.readouterr().err
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(nested(weight, value)))
    schedules = build_schedules(load_config(str(tmp_path / "x.yaml"), [f"{schedule}=0.25"]), 10)
    assert schedules[term](5) == 0.25
    assert f"replaces what stands below it: {weight} {value}" in capsys.readouterr().err


def test_a_stage_and_a_student_may_switch_a_scheduled_term_off(capsys):
    stages = "stages={a: {steps: 1}, b: {steps: 1, loss: {ibot: {weight: 0}}}}"
    first, second = (
        build_schedules(stage, 1)
        for _, _, stage in stage_configs(load_config(None, ["schedule.ibot=0.5", stages]))
    )
    assert "ibot" in first and "ibot" not in second
    assert "stages.b: loss.ibot.weight 0" in capsys.readouterr().err
    call = ["schedule.ibot=0.5", "distill.students.s.loss.ibot.weight=0"]
    (student,) = student_configs(load_config(None, call, DistillTrainConfig))
    assert "ibot" not in build_schedules(student.cfg, 1)


def test_a_schedule_that_is_zero_throughout_is_no_term():
    schedules = build_schedules(load_config(None, ["schedule.ibot=0"]), 10)
    assert "ibot" not in schedules
    later = "schedule.ibot={start: 0, peak: 0.0, end: 1.0, shape: linear}"
    assert "ibot" in build_schedules(load_config(None, [later]), 10)


def test_a_run_with_a_schedule_is_described_once_and_old_ones_go_on(tiny, tmp_path):
    call = [part for part in tiny if not part.startswith("loss.koleo.weight")]
    call += ["schedule.koleo={start: 0.5, peak: 0.25, warmup: 2}", "total_steps=2"]
    train.main(call)
    file = tmp_path / "run/config.yaml"
    values = yaml.safe_load(file.read_text())
    assert "weight" not in values["loss"]["koleo"] and values["loss"]["dino"]["weight"] == 1
    assert load_config(str(file), []).schedule == load_saved(file, train.TrainConfig).schedule
    values["loss"]["koleo"]["weight"] = 2.0  # as earlier versions did
    file.write_text(yaml.safe_dump(values))
    train.main([*call, "total_steps=3"])
    records = read_metrics(tmp_path / "run/metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3]


# ----------------------------------------------------------------- the log


def test_the_weight_of_every_term_that_is_computed_is_logged(tiny, tmp_path):
    call = [part for part in tiny if not part.startswith("loss.koleo.weight")]
    koleo = "schedule.koleo={start: 1.0, peak: 0.2, warmup: 4, shape: constant}"
    train.main([*call, koleo, "loss.gram.weight=0.75", "loss.gram.start=2"])
    for number, record in enumerate(read_metrics(tmp_path / "run/metrics.jsonl")):
        terms = {"dino": 1.0, "dino_local": 1.0, "ibot": 1.0, "koleo": 1.0 - 0.2 * number}
        terms |= {"gram": 0.75} if number >= 2 else {}
        found = {name: value for name, value in record.items() if name.startswith("weight/")}
        assert found == pytest.approx({f"weight/{name}": value for name, value in terms.items()})
        total = sum(terms[name] * record[f"loss/{name}"] for name in terms if name != "dino_local")
        assert record["loss"] == pytest.approx(total, rel=1e-4)


def test_the_weights_of_features_are_logged_too(tiny, tmp_path):
    train.main([*tiny, f"output_dir={tmp_path / 'teacher'}", "total_steps=1"])
    call = [f"distill.teacher={tmp_path / 'teacher'}", "distill.match=features"]
    call += ["distill.patch_weight=0.5", "distill.students.a={}", "loss.koleo.weight=0"]
    distill.main([*tiny, *call, "total_steps=1"])
    (record,) = read_metrics(tmp_path / "run/students/a/metrics.jsonl")
    assert (record["weight/cls"], record["weight/patches"]) == (1.0, 0.5)
    assert "weight/dino" not in record


# ----------------------------------------------------------------- stages


@pytest.mark.parametrize("head", [[], ["loss.ibot.prototypes=16"]], ids=["shared", "own head"])
@pytest.mark.parametrize("term", ["ibot", "dino", "koleo", "gram", "coding_rate", "anchor"])
@pytest.mark.parametrize("on_first", [True, False])
def test_a_term_may_be_on_in_one_stage_and_off_in_another(term, on_first, head, tiny, tmp_path):
    values = [1, 0] if on_first else [0, 1]
    stages = {
        name: {"steps": 2, "loss": {term: {"weight": value}}}
        for name, value in zip("ab", values, strict=True)
    }
    call = [*tiny, *head, "total_steps=null", "checkpoint.every=1", "checkpoint.keep=9"]
    call += [f"stages={yaml.safe_dump(stages)}".strip()]
    if term == "anchor":
        call.append("init=random:vit_nano?embed_dim=32&depth=2&num_heads=2&patch_size=8")
    train.main(call)
    records = read_metrics(tmp_path / "run/metrics.jsonl")
    assert [f"loss/{term}" in record for record in records] == [
        bool(value) for value in values for _ in range(2)
    ]
    # Killed before the end of each stage, it ends with the same numbers.
    for step in (3, 1):
        (tmp_path / "run/checkpoints/latest").write_text(str(step))
        train.main(call)
        again = read_metrics(tmp_path / "run/metrics.jsonl")
        assert [record["loss"] for record in again] == [record["loss"] for record in records]


@pytest.mark.parametrize(
    "override",
    ["loss.dino.weight", "loss.dino.local_weight", "loss.ibot.weight", "loss.koleo.weight"]
    + ["loss.gram.weight", "schedule.dino", "schedule.koleo", "schedule.dino_local"]
    + ["distill.cls_weight", "distill.patch_weight"],
)
def test_a_negative_weight_is_refused(override):
    with pytest.raises(UserError, match=f"{override}.* is -0.5; it must be non-negative"):
        load_config(None, [f"{override}=-0.5"], DistillTrainConfig)


# ----------------------------------------------------------------- what trains


@pytest.mark.parametrize(
    "given, words",
    [
        (["tune.targets=[q]"], r"tune.targets is \['q'\], which tune.mode full does not read"),
        (["tune.rank=4"], "tune.rank is 4"),
        (["tune.alpha=4"], "tune.alpha is 4"),
        (["tune.dropout=0.5"], "tune.dropout is 0.5"),
        (["tune.mode=partial", "tune.rank=4"], "which tune.mode partial does not read"),
        (["stages={a: {steps: 1, tune: {targets: [norm]}}}"], "stages.a: tune.targets"),
    ],
)
def test_keys_of_tuning_without_their_mode_are_refused(given, words):
    with pytest.raises(UserError, match=words):
        load_config(None, given)


def test_a_stage_may_tune_in_another_way(capsys):
    call = ["tune.mode=lora", "tune.rank=4", "stages.a={steps: 1, tune: {mode: partial}}"]
    a, b = (stage for _, _, stage in stage_configs(load_config(None, [*call, "stages.b.steps=1"])))
    assert (a.tune.mode, a.tune.rank, b.tune.mode, b.tune.rank) == ("partial", 8, "lora", 4)
    assert "stages.a: tune.mode partial replaces" in capsys.readouterr().err


CHOICES = ["optim.layer_decay=0.9", "optim.patch_embed_lr=0.2"]


def optimizer(call: list[str], capsys) -> str:
    """What the optimizer of a configuration says."""
    cfg = load_config(None, call)
    student = build_student(cfg, "ibot" in build_schedules(cfg, 4))
    freeze_for(student.backbone, **vars(cfg.tune))
    capsys.readouterr()
    optimizer_for(student, cfg.optim)
    return capsys.readouterr().err


def test_a_choice_by_name_that_finds_nothing_says_so(tiny, capsys):
    assert not optimizer([*tiny, *CHOICES], capsys)
    said = optimizer([*tiny, *CHOICES, "tune.mode=lora"], capsys)
    assert "optim.patch_embed_lr 0.2 has no effect" in said and "layer_decay" not in said
    said = optimizer([*tiny, *CHOICES, "tune.mode=partial"], capsys)
    assert "optim.patch_embed_lr 0.2 has no" in said and "optim.layer_decay 0.9 has no" in said
    assert not optimizer([*tiny, "tune.mode=lora"], capsys)
    said = optimizer([*of_timm(tiny, "test_resnet"), *CHOICES, "loss.ibot.weight=0"], capsys)
    assert "optim.patch_embed_lr" in said and "optim.layer_decay 0.9 has no effect" in said


def test_a_last_layer_to_freeze_that_is_not_there_is_said(tiny, tmp_path, capsys):
    train.main([*tiny, f"output_dir={tmp_path / 'teacher'}", "total_steps=1"])
    call = [f"distill.teacher={tmp_path / 'teacher'}", "distill.match=features"]
    call += ["distill.students.a={}", "loss.koleo.weight=0", "optim.freeze_last_layer=1"]
    distill.main([*tiny, *call, "total_steps=1"])
    assert "optim.freeze_last_layer 1 has no effect" in capsys.readouterr().err


def test_teacher_and_student_of_other_parameters_are_no_average():
    student = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    teacher = copy.deepcopy(student)
    student.append(nn.Linear(2, 2))
    with pytest.raises(ValueError):
        update_ema(teacher, student, 0.5)
    with pytest.raises(ValueError):
        update_ema(student, teacher, 0.5)


def test_fields_of_a_batch_that_are_no_tensors_are_split_with_the_images():
    @dataclasses.dataclass
    class Forked(Batch):
        captions: list[str] = dataclasses.field(default_factory=list)

    batch = Forked(
        torch.arange(6.0).reshape(6, 1, 1, 1), None, None, None, [], [7, 8, 9], [("x", "y")],
        ["a", "b", "c"]
    )  # fmt: skip
    first, second = batch.split(2)
    assert (first.captions, second.captions) == (["a", "b"], ["c"])
    assert first.bad == [("x", "y")] and second.bad == []
    assert first.global_crops.flatten().tolist() == [0, 1, 3, 4]
