"""files.py: YAML as users write it."""

from pathlib import Path

import pytest

from data.sources.specs import open_data
from engine.config import DistillTrainConfig, load_config
from errors import UserError

TWICE = {
    "section": ("data: {workers: 0}\nseed: 1\ndata:\n  train: scenes\n", "data", "lines 1 and 3"),
    "key": (
        "loss:\n  dino:\n    hidden: 8\n    layers: 2\n    hidden: 9\n",
        "hidden",
        "lines 3 and 5",
    ),
    "line": ("crops: {flip: 0, turn: 0, flip: 1}\n", "flip", "line 1"),
    "stage": ("stages:\n  a: {steps: 1}\n  b: {steps: 2}\n  a: {steps: 3}\n", "a", "lines 2 and 4"),
    "in a stage": ("stages:\n  a:\n    steps: 2\n    steps: 3\n", "steps", "lines 3 and 4"),
    "student": ("distill:\n  students:\n    s: {}\n    s: {share: 2}\n", "s", "lines 3 and 4"),
    "in a list": ("crops:\n  mix:\n  - share: 1\n    share: 2\n", "share", "lines 3 and 4"),
}


@pytest.mark.parametrize("text, key, lines", TWICE.values(), ids=TWICE)
def test_a_key_that_stands_twice_is_refused_with_file_and_lines(text, key, lines, tmp_path):
    below, above = tmp_path / "below.yaml", tmp_path / "above.yaml"
    below.write_text(text)
    above.write_text("base: below.yaml\n")
    for path in (below, above):
        with pytest.raises(UserError) as error:
            load_config(str(path), [], DistillTrainConfig)
        said = str(error.value)
        assert said.startswith(f"{key} stands twice in {below} ({lines}")


def test_a_key_that_stands_twice_on_the_command_line_or_in_a_mixture_is_refused(tmp_path):
    with pytest.raises(UserError, match="peak stands twice in schedule.lr=.*; join them"):
        load_config(None, ["schedule.lr={peak: 1, peak: 2}"])
    file = tmp_path / "mix.yaml"
    file.write_text("- data: scenes?size=4\n  weight: 1\n- data: scenes?size=5\n  data: scenes\n")
    with pytest.raises(UserError, match=r"data stands twice in .*mix.yaml \(lines 3 and 4\)"):
        open_data(f"mix:{file}")


def test_the_keys_of_an_anchor_may_be_overridden(tmp_path):
    file = tmp_path / "x.yaml"
    text = "schedule:\n  koleo: &a {peak: 0.5, warmup: 3}\n  gram: &b {<<: *a, peak: 0.25}\n"
    file.write_text(text + "  ibot: {<<: *b, peak: 0.75}\n")
    plans = load_config(str(file), []).schedule
    assert (plans.gram.peak, plans.gram.warmup, plans.koleo.peak) == (0.25, 3, 0.5)
    assert (plans.ibot.peak, plans.ibot.warmup) == (0.75, 3)


def test_a_layer_above_still_overrides_a_base(tmp_path):
    Path(tmp_path, "below.yaml").write_text("data: {workers: 3}\nseed: 1\n")
    Path(tmp_path, "above.yaml").write_text("base: below.yaml\ndata: {max_bad: 2}\nseed: 2\n")
    cfg = load_config(str(tmp_path / "above.yaml"), ["seed=3", "seed=4"])
    assert (cfg.seed, cfg.data.workers, cfg.data.max_bad) == (4, 3, 2)
