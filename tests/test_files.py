"""files.py: paths and YAML as users write them."""

import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import yaml

import train
from data.sources.specs import open_data
from engine.cli import evaluation_parser
from engine.config import TrainConfig, load_config
from engine.distill_config import DistillTrainConfig
from engine.keys import declared_type
from engine.settings import all_keys
from errors import UserError
from export import main as export
from files import expand, split_query
from models import load_backbone

TWICE = {
    "section": ("data: {workers: 0}\nseed: 1\ndata:\n  train: scenes\n", "data", "lines 1 and 3"),
    "key": (
        "loss:\n  dino:\n    hidden: 8\n    layers: 2\n    hidden: 9\n",
        "hidden",
        "lines 3 and 5",
    ),
    "line": ("crops: {flip: 0, rotate90: 0, flip: 1}\n", "flip", "line 1"),
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


ODD = ["1.10", "2026_01_05", "0010", "12:30", "2026-01-05", "on", "runs/exp #2", "1e5", "a: b"]
ODD += ["[x]", "{x}", "'x'", "@x", "%x", "0x1F", "no", "1_000", "- x", "*x", "&x", "!x", "x:"]
TEXTS = [
    key for key in all_keys(TrainConfig) if declared_type(TrainConfig, (*key.split("."),)) is str
]


def value_of(cfg: object, key: str) -> object:
    for name in key.split("."):
        cfg = getattr(cfg, name)
    return cfg


@pytest.mark.parametrize("key", TEXTS)
def test_text_stays_text_on_the_command_line_and_in_files(key, tmp_path):
    assert {"output_dir", "data.train", "init", "probe.val", "loss.gram.teacher"} <= {*TEXTS}
    for text in ODD:
        assert value_of(load_config(None, [f"{key}={text}"]), key) == text
    for text in ("1.10", "2026_01_05", "0010", "12:30", "2026-01-05", "on", "1e5", "no"):
        below = text
        for name in reversed(key.split(".")):
            below = f"{{{name}: {below}}}"
        (tmp_path / "x.yaml").write_text(below)
        assert value_of(load_config(str(tmp_path / "x.yaml"), []), key) == text


def test_text_stays_text_in_stages_students_and_lists():
    cfg = load_config(
        None,
        ["stages={a: {steps: 2, data: {train: 0010}}, b: {steps: 3}}", "stages.b.data.train=1.10"]
        + ["distill.students.s.init=2026-01-05", "tune.targets=[12:30, on]", "tune.mode=partial"],
        DistillTrainConfig,
    )
    trains = [cfg.stages[name]["data"]["train"] for name in "ab"]
    assert trains == ["0010", "1.10"] and cfg.tune.targets == ["12:30", "on"]
    assert cfg.distill.students == {"s": {"init": "2026-01-05"}}


def test_null_is_no_text():
    for word in ("null", "~", ""):
        assert load_config("continue", [f"init={word}"]).init is None
    with pytest.raises(UserError, match="output_dir is None; it must be text"):
        load_config(None, ["output_dir="])


def test_numbers_are_those_that_were_written(tmp_path):
    assert load_config(None, ["batch_size=0016", "total_steps=1e3"]).batch_size == 16
    assert load_config(None, ["seed=9007199254740993"]).seed == 9007199254740993
    with pytest.raises(UserError, match="hang_timeout is '1:30'; it must be a number"):
        load_config(None, ["hang_timeout=1:30"])


@pytest.mark.parametrize("digits", [30, 400, 5000])
@pytest.mark.parametrize("key", ["seed", "batch_size", "schedule.lr.peak", "schedule.lr.warmup"])
def test_a_number_without_end_is_one_short_sentence(key, digits, tmp_path):
    if digits == 30 and key == "schedule.lr.peak":
        return  # a number like others
    for text in ("1" * digits, "-" + "1" * digits, "0x" + "f" * digits, f"1e{'9' * 20}"):
        with pytest.raises(UserError, match=f"{key} is .*; it must be") as error:
            load_config(None, [f"{key}={text}"])
        assert len(str(error.value)) < 350
    with pytest.raises(UserError):
        load_config(None, [f"stages={{a: {{steps: {'1' * digits}}}}}"])


# ----------------------------------------------------------------- paths


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DEEP", str(tmp_path / "deep"))
    monkeypatch.delenv("NOT_SET", raising=False)
    (tmp_path / "deep").mkdir()
    monkeypatch.chdir(tmp_path / "deep")
    return tmp_path


def test_a_home_and_variables_are_replaced_and_names_with_a_dollar_kept(home):
    assert expand("~/a") == home / "a" and expand("$DEEP/a") == expand("${DEEP}/a")
    assert expand("$DEEP/a") == home / "deep/a"
    with pytest.raises(UserError, match=r"\$\{NOT_SET\}/a: .*variable \$\{NOT_SET\} is not set"):
        expand("${NOT_SET}/a")
    Path("$NOT_SET").mkdir()
    assert (
        expand("$NOT_SET") == Path("$NOT_SET")
        and expand("~nobody_of_that_name/a").parts[0][0] == "~"
    )


@pytest.mark.parametrize("where", ["command line", "file"])
def test_paths_of_a_configuration_are_expanded(where, home, images, tiny):
    given = {"output_dir": "~/out", "data": {"train": "$DEEP/../images"}, "total_steps": 1}
    (home / "below.yaml").write_text(yaml.safe_dump(given if where == "file" else {"seed": 1}))
    (home / "x.yaml").write_text("base: $HOME/below.yaml\n")
    written = ["output_dir=~/out", "data.train=${DEEP}/../images", "total_steps=1"]
    rest = [part for part in tiny if not part.startswith(("output_dir", "data.train", "total_s"))]
    train.main(["--config", "~/x.yaml", *rest, *(written if where == "command line" else [])])
    assert (home / "out/teacher").is_dir() and not os.listdir(home / "deep")
    assert load_backbone("~/out").embed_dim == load_backbone("$HOME/out").embed_dim
    export(["--model", "$DEEP/../out", "--format", "own", "--output", str(expand("~/own"))])
    assert (home / "own/model.safetensors").is_file()


def test_paths_of_data_are_expanded(home, images):
    (home / "list.txt").write_text("~/images/0.png\n$HOME/images/1.png\nimages/2.png\n$odd.png\n")
    (home / "mix.yaml").write_text("- data: ~/images\n- {data: 'folder:$HOME/images?size=2'}\n")
    (home / "labels.csv").write_text("file,label\n0.png,a\n1.png,b\n")
    data = open_data("list:$HOME/list.txt")
    assert [len(data.image(k)) for k in range(3)] == [3, 3, 3] and data.name(3).endswith("$odd.png")
    assert len(open_data("mix:${DEEP}/../mix.yaml")) == 14
    assert len(open_data("$HOME/images")) == len(open_data("folder:~/images")) == 12
    labelled = open_data("folder:$HOME/images?labels=$HOME/labels.csv")
    assert (labelled.labels >= 0).sum() == 2
    with pytest.raises(UserError, match="NOT_SET is not set"):
        open_data("folder:$NOT_SET/images")


def test_flags_that_name_files_are_expanded(home, capsys):
    parser = evaluation_parser("")
    assert parser.parse_args(["--model", "x", "--output", "$DEEP/a"]).output == home / "deep/a"
    with pytest.raises(SystemExit):
        parser.parse_args(["--model", "x", "--output", "$NOT_SET/a"])
    assert "--output: $NOT_SET/a: the environment variable" in capsys.readouterr().err


def test_every_flag_that_names_a_file_is_expanded():
    root = Path(__file__).parents[1]
    for path in [*root.glob("*.py"), root / "engine/cli.py", root / "data/stats.py"]:
        assert "type=Path" not in path.read_text(), path.name


# ----------------------------------------------------------------- question marks


@pytest.mark.parametrize(
    "spec, wanted",
    [
        ("folder:/x?size=3", ("folder:/x", "size=3")),
        ("scenes", ("scenes", "")),
        ("scenes?split", ("scenes", "split")),
        ("tar:/what?/x-{0..3}.tar?size=3&page=1", ("tar:/what?/x-{0..3}.tar", "size=3&page=1")),
        ("/gone?/x", ("/gone?/x", "")),
        ("random:vit_nano?fit=pad", ("random:vit_nano", "fit=pad")),
        ("RUN@100?channels=1", ("RUN@100", "channels=1")),
        ("python:a:b?root=/x?&y=1", ("python:a:b", "root=/x?&y=1")),
    ],
)
def test_options_begin_behind_the_name(spec, wanted):
    assert split_query(spec) == wanted


def test_a_question_mark_in_a_name_goes_with_options(images, tmp_path, monkeypatch):
    odd = images.rename(tmp_path / "a?size=2")
    (odd / "0.png").rename(odd / "why?.png")
    (odd / "list?.txt").write_text("why?.png\n1.png\n2.png\n")
    (odd / "labels?.csv").write_text("file,label\nwhy?.png,a\n1.png,b\n")
    monkeypatch.chdir(tmp_path)
    for kind in ("", "folder:"):
        for place in (odd, "a?size=2"):
            assert len(open_data(f"{kind}{place}")) == 12
            assert len(open_data(f"{kind}{place}?size=5")) == 5
            data = open_data(f"{kind}{place}?size=7&labels={odd}/labels?.csv")
            assert len(data) == 7 and data.labels.max() >= 0
    assert len(open_data(f"list:{odd}/list?.txt?size=2")) == 2
    assert len(open_data(f"{odd}/why?.png?page=0")) == 1
    (tmp_path / "a").mkdir()
    with pytest.raises(UserError, match="unknown key 'sise'"):
        open_data(f"{odd}?sise=3")
    assert len(open_data(f"{odd}?size=2")) == 2


def test_a_question_mark_in_the_name_of_weights_goes_with_options(tiny, tmp_path):
    run = tmp_path / "run? one"
    train.main([*tiny, "total_steps=1", f"output_dir={run}"])
    assert load_backbone(run).in_channels == load_backbone(f"{run}/teacher").in_channels == 3
    assert load_backbone(f"{run}?channels=1").in_channels == 1
    train.main([*tiny, "total_steps=1", f"init={run}"])
    export(["--model", str(run), "--format", "own", "--output", str(tmp_path / "own")])
    assert "seed: 0" in (tmp_path / "own/README.md").read_text()


# ----------------------------------------------------------------- sources of mixtures


def test_sources_of_a_mixture_are_relative_to_its_file(images, tmp_path, monkeypatch):
    home, elsewhere = tmp_path / "sets", tmp_path / "elsewhere"
    home.mkdir(), elsewhere.mkdir()
    images = images.rename(home / "images")
    (home / "list.txt").write_text("images/1.png\nimages/2.png\n")
    (home / "labels.csv").write_text("file,label\n1.png,a\n2.png,b\n")
    with tarfile.open(home / "x-0.tar", "w") as shard:
        shard.add(images / "1.png", "1.png")
    np.savez(home / "x.npz", images=np.zeros((4, 8, 8, 3), np.uint8))
    sources = {
        "images": 12,
        "./images?size=3": 3,
        "folder:images?labels=labels.csv": 12,
        "list:list.txt": 2,
        "list.txt?size=1": 1,
        "tar:x-{0..0}.tar": 1,
        "npz:x.npz": 4,
        "scenes?size=5": 5,
        str(images): 12,
        "../sets/images": 12,
    }
    (elsewhere / "images").mkdir()  # what lies in the working folder is not meant
    shutil.copy(images / "0.png", elsewhere / "images")
    monkeypatch.chdir(elsewhere)
    for spec, count in sources.items():
        (home / "mix.yaml").write_text(yaml.safe_dump([{"data": spec}]))
        for path in ("../sets/mix.yaml", str(home / "mix.yaml"), "mix:../sets/mix.yaml"):
            data = open_data(path)
            assert len(data) == count and data[0][0].ndim == 3, (path, spec)
    assert open_data("../sets/mix.yaml").fingerprint()
    (home / "mix.yaml").write_text("- data: folder:nowhere\n")
    with pytest.raises(FileNotFoundError, match="sets/nowhere"):
        open_data("../sets/mix.yaml")
    (home / "mix.yaml").write_text("- data: list.txt\n- data: mix.yaml\n")
    with pytest.raises(UserError, match="is itself a mixture"):
        open_data("../sets/mix.yaml")


@pytest.mark.parametrize("weight", [".nan", ".inf", "1" * 400, "[1]", "x", "1:30"])
def test_a_weight_of_a_mixture_is_a_number(weight, tmp_path):
    (tmp_path / "mix.yaml").write_text(f"- {{data: scenes, weight: {weight}}}\n")
    with pytest.raises(UserError, match="weight and alone are numbers"):
        open_data(f"{tmp_path}/mix.yaml")
