"""The guard: quality lost against step 0 is noticed, a destructive run is stopped, and the best
weights are there.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import distill
import train
from engine.cli import RunFailed, run_script
from engine.config import load_config
from engine.guard import Guard, build_guard
from models.weights.load import load_backbone
from tests.conftest import TINY
from tests.test_train import metrics

BEST = Path("runs/x/best")
RUINOUS = [
    "schedule.lr=3.0",
    "optim.clip_grad=null",
    "schedule.ema_momentum=0.0",
    "loss.koleo.weight=0",
    "health.on_collapse=warn",
]


@pytest.fixture(scope="module")
def colours(tmp_path_factory) -> Path:
    """Four classes of noise of a faint colour in any light: a tiny network tells them apart, a
    ruined one does not.
    """
    rng = np.random.default_rng(0)
    centres = 128 + 25 * np.array([[1, -1, 0], [-1, 1, 0], [0, -1, 1], [1, 1, -2]])
    arrays = {}
    for split, count in (("train", 160), ("val", 80)):
        labels = np.arange(count) % 4
        pixels = (
            centres[labels][:, None, None]
            + rng.integers(-60, 60, (count, 1, 1, 1))
            + rng.integers(-50, 50, (count, 32, 32, 3))
        )
        arrays |= {
            f"{split}_images": pixels.clip(0, 255).astype(np.uint8),
            f"{split}_labels": labels,
        }
    path = tmp_path_factory.mktemp("colours") / "colours.npz"
    np.savez(path, **arrays)
    return path


@pytest.fixture(scope="module")
def probed(colours) -> list[str]:
    splits = [
        f"data.train={colours}?split=train",
        f"probe.train={colours}?split=train",
        f"probe.val={colours}?split=val",
    ]
    mild = ["crops.jitter=0", "crops.grayscale=0", "crops.solarize=0", "crops.local_count=0"]
    return [*TINY, *splits, *mild, "probe.every=2"]


@pytest.fixture(scope="module")
def trained(probed, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("trained") / "run"
    train.main([*probed, "total_steps=6", "checkpoint.every=6", f"output_dir={run}"])
    return run


def values_of(run: Path) -> dict[int, float]:
    return {record["step"]: record["probe/knn"] for record in metrics(run) if "probe/knn" in record}


def same_weights(first: Path, second: Path) -> bool:
    theirs = load_backbone(second).state_dict()
    return all(
        torch.equal(value, theirs[name])
        for name, value in load_backbone(first).state_dict().items()
    )


def test_a_destructive_run_is_stopped_and_best_equals_the_initial_weights(
    probed, trained, tmp_path, capsys
):
    run = tmp_path / "run"
    with pytest.raises(SystemExit) as error:
        run_script(
            lambda _: train.main(
                [
                    *probed,
                    f"init={trained}",
                    *RUINOUS,
                    "guard.action=stop",
                    "total_steps=40",
                    "checkpoint.every=2",
                    f"output_dir={run}",
                ]
            )
        )
    values, last = values_of(run), capsys.readouterr().err.strip().splitlines()[-1]
    step = max(values)
    assert error.value.code == 1 and step < 40
    assert (
        values[0] > 0.9
        and values[step] < values[0] - 0.02
        and all(values[k] >= values[0] - 0.02 for k in values if k < step)
    )
    for word in (
        f"{values[0]:.3f}",
        f"{values[step]:.3f}",
        f"step {step}",
        str(run / "best"),
        "tune.mode=lora",
    ):
        assert word in last
    assert (
        same_weights(run / "best", trained / "teacher")
        and load_backbone(f"{run}@best").config == load_backbone(trained).config
    )


def test_a_warning_comes_once_and_the_run_goes_on_to_its_end(probed, trained, tmp_path, capsys):
    run = tmp_path / "run"
    train.main(
        [*probed, f"init={trained}", *RUINOUS, "total_steps=8", f"output_dir={run}"]
    )  # warn is the default with init
    values = values_of(run)
    assert sum(value < values[0] - 0.02 for value in values.values()) > 1 and max(values) == 8
    assert capsys.readouterr().err.count("guard:") == 1 and same_weights(
        run / "best", trained / "teacher"
    )


def test_a_run_that_goes_on_is_compared_with_its_own_step_0(probed, trained, tmp_path):
    settings = [
        *probed,
        f"init={trained}",
        *RUINOUS,
        "schedule.weight_decay=0",
        "schedule.teacher_temp=0.05",
        f"output_dir={tmp_path / 'run'}",
    ]
    train.main([*settings, "total_steps=4", "guard.tolerance=1"])
    with pytest.raises(RunFailed, match=r"at step 6, more than 0.02 below the [01]\.\d+ of step 0"):
        train.main([*settings, "total_steps=8", "guard.action=stop"])


def test_a_student_that_loses_what_it_began_with_is_stopped(probed, trained, tmp_path):
    student = f"distill.students.own={{init: {trained}, guard: {{action: stop}}}}"
    settings = [*probed, *RUINOUS, f"distill.teacher={trained}", student, "total_steps=40"]
    with pytest.raises(
        RunFailed,
        match=r"guard: probe/knn is .* of step 0; .*/students/own/best holds the best weights",
    ):
        distill.main([*settings, f"output_dir={tmp_path / 'run'}"])
    assert same_weights(tmp_path / "run/students/own/best", trained / "teacher")


def test_without_weights_to_lose_there_is_no_guard(probed, tmp_path, capsys):
    train.main([*probed, *RUINOUS, f"output_dir={tmp_path / 'run'}"])
    assert "guard:" not in capsys.readouterr().err


# ----------------------------------------------------------------- the rule


def look(guard: Guard, *values) -> list:
    return [
        guard.look(step, {} if value is None else {guard.key: value}, BEST)
        for step, value in enumerate(values)
    ]


def test_what_counts_is_a_fall_below_step_0_beyond_the_tolerance():
    assert (
        look(Guard(action="warn"), 0.5, 0.9, None, 0.5, 0.48) == [None] * 5
    )  # from 0.9 to 0.5 is no loss against step 0
    said = look(Guard(action="warn"), 0.5, 0.479, 0.1, 0.6)
    assert (
        "0.479 at step 1" in said[1] and "0.500 of step 0" in said[1] and said[2:] == [None, None]
    )
    assert look(Guard("linear", 0.0, "warn"), 0.5, 0.4999)[1] is not None
    assert (
        look(Guard("linear", 0.2, "warn"), 0.5, 0.31)
        == look(Guard(action=None), 0.5, 0.0)
        == [None, None]
    )
    with pytest.raises(RunFailed):
        look(Guard(action="stop"), 0.5, float("nan"))


def test_stop_ends_the_run_however_often_it_was_said():
    guard = Guard(action="stop")
    assert (
        guard.recall(
            [
                {"step": 0, "probe/knn": 0.5},
                {"step": 1},
                {"step": 2, "probe/knn": 0.3},
                {"step": 4, "probe/knn": None},
            ]
        )
        == 0.5
    )
    with pytest.raises(RunFailed, match="0.400 at step 6, more than 0.02 below the 0.500"):
        guard.look(6, {"probe/knn": 0.4}, BEST)
    quiet = Guard(action="warn")
    quiet.recall([{"step": 0, "probe/knn": 0.5}, {"step": 2, "probe/knn": 0.3}])
    assert quiet.look(6, {"probe/knn": 0.4}, BEST) is None


def test_nothing_to_compare_with_is_said(capsys):
    assert Guard(action="warn").recall([{"step": 4, "probe/knn": 0.7}]) == 0.7
    assert "no probe/knn of step 0" in capsys.readouterr().err
    with pytest.raises(ValueError, match="gave no probe/miou"):
        Guard("miou", action="stop").look(0, {"probe/knn": 0.5}, BEST)


def test_the_guard_of_a_configuration():
    probe = ["probe.every=5", "probe.train=scenes", "probe.val=scenes?split=val"]

    def acts(*keys: str) -> str | None:
        return build_guard(load_config(None, [*probe, *keys])).action

    assert [
        acts(),
        acts("init=x"),
        acts("init=x", "guard.action=stop"),
        acts("guard.action=warn"),
    ] == [
        None,
        "warn",
        "stop",
        "warn",
    ]
    assert acts("init=x", "probe.every=0") is None
    for keys, words in (
        (["guard.action=stop"], "set probe.every"),
        ([*probe, "guard.action=stop", "guard.probe=linear"], "probe.linear"),
        ([*probe, "guard.probe=patches"], "knn, linear, miou"),
        (["guard.tolerance=-0.1"], "non-negative"),
    ):
        with pytest.raises(match=words):
            load_config(None, keys)


def test_best_follows_the_probe_that_is_guarded(probed, trained, tmp_path):
    run = tmp_path / "run"
    train.main(
        [
            *probed,
            f"init={trained}",
            "total_steps=2",
            "probe.knn=false",
            "probe.linear=true",
            "guard.probe=linear",
            f"output_dir={run}",
        ]
    )
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert "probe/linear" in records[0] and (run / "best" / "model.safetensors").exists()
