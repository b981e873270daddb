"""engine.config and engine.settings: what users type, and what they are told."""

import subprocess
import sys
from pathlib import Path

import pytest

import distill
import train
from engine.align_config import AlignTrainConfig
from engine.config import Schedule, TrainConfig, load_config
from engine.distill_config import DistillTrainConfig
from engine.keys import sections, type_in_words
from engine.settings import all_keys, changed_keys, convert, to_dict, to_yaml
from errors import UserError

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_configuration_loads_and_opens_with_a_command(path):
    kinds = {"distill": DistillTrainConfig, "align": AlignTrainConfig}
    cfg = load_config(path.name, [], kinds.get(path.name.partition("_")[0], TrainConfig))
    assert cfg.output_dir.startswith("runs/")
    header = path.read_text().split("\n\n")[0]
    assert (
        header.startswith("#")
        and f"--config configs/{path.name}" in header
        or f"--config {path.name}" in header
    )
    assert max(map(len, path.read_text().splitlines())) <= 100


def test_the_last_override_wins_over_file_and_base(tmp_path):
    (tmp_path / "below.yaml").write_text(
        "batch_size: 8\nloss: {ibot: {weight: 1.0}}\nschedule: {lr: {peak: 1e-3, warmup: 10}}\n"
    )
    (tmp_path / "above.yaml").write_text(
        "base: below.yaml\nbatch_size: 16\nschedule: {lr: {warmup: 5%}}\n"
    )
    cfg = load_config(str(tmp_path / "above.yaml"), ["batch_size=32", "batch_size=64"])
    assert (cfg.batch_size, cfg.loss.ibot.weight) == (64, 1.0)
    assert cfg.schedule.lr == Schedule(peak=1e-3, start=0.0, end=1e-6, warmup="5%")


def test_numbers_that_yaml_reads_as_text_become_numbers(tmp_path):
    (tmp_path / "x.yaml").write_text(
        "schedule: {lr: {peak: 1e-3}}\nbatch_size: '32'\nprecision: fp32\n"
    )
    cfg = load_config(str(tmp_path / "x.yaml"), ["model.layerscale=1e-5"])
    assert (cfg.schedule.lr.peak, cfg.batch_size, cfg.model.layerscale) == (1e-3, 32, 1e-5)


def test_a_length_on_the_command_line_replaces_the_one_of_the_file(tmp_path):
    (tmp_path / "x.yaml").write_text("epochs: 100\n")
    cfg = load_config(str(tmp_path / "x.yaml"), ["total_steps=7"])
    assert (cfg.total_steps, cfg.epochs) == (7, None)


def test_a_schedule_given_as_a_number_is_constant_and_can_be_refined():
    assert load_config(None, ["schedule.ema_momentum=0.99"]).schedule.ema_momentum == Schedule(
        0.99, shape="constant"
    )
    refined = load_config(None, ["schedule.lr=0.5", "schedule.lr.warmup=4"]).schedule.lr
    assert refined == Schedule(peak=0.5, warmup=4, shape="constant")


@pytest.mark.parametrize(
    "override, words",
    [
        ("loss.dino.student_tmp=1", "did you mean loss.dino.student_temp"),
        ("scheduel.lr=1", "did you mean schedule"),
        ("patch_size=8", "did you mean model.patch_size"),
        ("batch_size=1.5", "whole number"),
        ("batch_size=-1", "at least 1"),
        ("batch_size=", "whole number"),
        ("schedule.lr.peak=.nan", "must be a number"),
        ("schedule.lr.warmup=10pct", "10%"),
        ("schedule.teacher_temp.peak=0", "more than 0"),
        ("crops.global_scale=[0.5, 0.2]", "within (0, 1]"),
        ("crops.global_scale=0.5", "list"),
        ("crops.local_size=8", "smaller than model.patch_size"),
        ("model.positions=sine", "learned, rope"),
        ("data=folder:/x", "section"),
        ("probe.every=5", "probe.train"),
        ("loss.dino.weight=0", "nothing to learn"),
        ("overwrite=maybe", "true or false"),
        ("no-equals-sign", "key=value"),
        ("data.mean=[0.5]", "3 values"),
        ("optim.betas=[0.9, 1.0]", "[0, 1)"),
        ("schedule.weight_decay={peak: 0.1, end: 0.2, shape: constant}", "constant"),
    ],
)
def test_a_mistake_is_one_sentence_that_names_key_and_choices(override, words):
    with pytest.raises(UserError) as error:
        load_config(None, [override])
    message = str(error.value)
    assert words in message and "\n" not in message


def test_a_missing_configuration_lists_the_shipped_ones(tmp_path):
    with pytest.raises(match="quickstart.yaml"):
        load_config("no_such.yaml", [])
    (tmp_path / "bad.yaml").write_text("a: [1\n")
    with pytest.raises(match="not valid YAML"):
        load_config(str(tmp_path / "bad.yaml"), [])


def test_the_resolved_configuration_reads_back_as_itself(tmp_path):
    cfg = load_config(
        None,
        [
            "data.train=folder:/x?labels=y.csv",
            "crops.global_size=[32, 64]",
            "schedule.ibot=0.5",
            "epochs=3",
        ],
    )
    (tmp_path / "config.yaml").write_text(to_yaml(cfg, "a header\nof two lines"))
    again = load_config(str(tmp_path / "config.yaml"), [])
    assert (
        to_dict(again) == to_dict(cfg)
        and load_config(str(tmp_path / "config.yaml"), []).epochs == 3
    )


def test_only_keys_that_matter_to_the_result_count_as_changes():
    before = load_config(None, ["total_steps=5"])
    after = load_config(
        None,
        [
            "total_steps=9",
            "data.workers=3",
            "log_every=1",
            "loss.dino.prototypes=32",
            "probe.every=0",
        ],
    )
    assert changed_keys(before, after) == ["loss.dino.prototypes (65536 -> 32)"]


def test_every_key_can_be_set_on_the_command_line():
    keys = all_keys(TrainConfig)
    assert (
        "schedule.lr.peak" in keys
        and "loss.ibot.mask_ratio" in keys
        and len(keys) == len(set(keys))
    )


def test_a_key_within_a_stage_leaves_the_length_alone_and_steps_of_stages_replace_it():
    stages = "stages={a: {steps: 3}, b: {steps: 5}}"
    assert (
        load_config(None, [stages, "total_steps=80", "stages.a.schedule.lr=1e-4"]).total_steps == 80
    )
    assert load_config(None, ["total_steps=80", stages]).total_steps is None


ROWS = [key for section in sections(DistillTrainConfig) for key in section.keys]


@pytest.mark.parametrize("key", ROWS, ids=lambda key: key.name)
def test_every_key_has_a_sentence_and_every_quantity_a_unit(key):
    assert key.sentence.endswith(".") and not key.sentence.startswith("It must")
    assert key.unit or not {"int", "float"} & set(key.type.split())


def test_every_key_is_in_the_table():
    names = {key.name for key in ROWS} | {section.name for section in sections(DistillTrainConfig)}
    assert set(all_keys(DistillTrainConfig)) <= names | {"loss"}


def printed(main, arguments: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert not exit.value.code
    return capsys.readouterr().out


def test_the_page_of_the_configuration_is_what_the_program_prints(capsys):
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert printed(distill.main, ["--keys", "--markdown"], capsys) == page


def test_the_order_of_a_union_does_not_matter(capsys):
    assert type_in_words(str | int | None) == type_in_words(int | str | None) == "int | text | null"
    assert convert("10", str | int, "key") == convert("10", int | str, "key") == 10


def test_keys_are_printed_for_a_terminal_of_100_columns(capsys):
    everything = printed(train.main, ["--keys"], capsys)
    assert max(map(len, everything.splitlines())) <= 100
    assert "crops.mix[].share" in everything and "distill.teacher" not in everything
    section = printed(train.main, ["--keys", "loss.dino"], capsys)
    assert "loss.dino.prototypes" in section and "65536" in section and "loss.ibot" not in section
    assert "loss.gram.start" in printed(train.main, ["--keys", "loss"], capsys)
    assert "schedule.gram.warmup" in printed(train.main, ["--keys", "schedule.gram"], capsys)
    assert "steps" in printed(train.main, ["--keys", "log_every"], capsys)
    assert "distill.match" in printed(distill.main, ["--keys", "distill"], capsys)


def test_a_section_that_does_not_exist_is_one_sentence_with_the_nearest():
    with pytest.raises(UserError, match="unknown key loss.dinno; did you mean loss.dino"):
        train.main(["--keys", "loss.dinno"])
    command = [sys.executable, "train.py", "--keys", "optim.beta"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "optim.betas" in done.stderr


@pytest.mark.parametrize(
    "override, words",
    [
        ("hang_timeout=0", "hang_timeout is 0.0; it must be more than 0"),
        ("crops.flip=2", "crops.flip is 2.0; it must be in [0, 1], or null"),
        ("crops.blur=[0.5, 2, 0]", "it must be 3 numbers in [0, 1]"),
        ("crops.mix=[{share: 0}]", "crops.mix.share is 0.0"),
        ("loss.ibot.mask_ratio=[0.5, 1]", "[low, high] within [0, 1)"),
        ("loss.koleo.group=1", "at least 2"),
        ("seed=-1", "in [0, 2^63)"),
        ("data.std=[0, 1, 1]", "data.std is [0.0, 1.0, 1.0]; it must be more than 0"),
        ("stages={a: {steps: 1, batch_size: 0}}", "stages.a: batch_size is 0"),
    ],
)
def test_the_rule_of_a_key_is_said_with_the_value(override, words):
    with pytest.raises(UserError) as error:
        load_config(None, [override])
    assert words in str(error.value)
