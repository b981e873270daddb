"""Every script as a user calls it: its --help, the commands of its docstring, one line of JSON, one
sentence for a mistake.
"""

import json
import re
import shlex
from pathlib import Path

import pytest

import eval_knn
import train
from tests.processes import LIBRARY, run_process

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(path.name for path in ROOT.glob("*.py") if path.stem not in LIBRARY)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_says_what_it_does_and_shows_a_command(script):
    done = run_process(script, "--help")
    assert done.returncode == 0 and f"{script} " in done.stdout and not done.stderr
    assert re.search(rf"(python|torchrun)\s.*{script}", done.stdout)


def readme_commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [
        line.split("  #")[0].strip() for line in lines if line.strip() and not line.startswith("#")
    ]


def test_readme_names_only_scripts_and_configurations_that_exist():
    for command in readme_commands():
        for word in shlex.split(command):
            if word.endswith((".py", ".yaml")) and "/" not in word.removeprefix("configs/"):
                name = word.removeprefix("configs/")
                assert (ROOT / name).exists() or (ROOT / "configs" / name).exists(), command


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    from tests.conftest import TINY

    folder = tmp_path_factory.mktemp("runs") / "run"
    probes = ["probe.every=4", "probe.train=scenes?size=60", "probe.val=scenes?split=val&size=30"]
    train.main([*TINY, *probes, f"output_dir={folder}"])
    return folder


DATA = ["--train", "scenes?size=60", "--val", "scenes?split=val&size=30"]


def test_knn_ends_with_one_line_of_json(run, tmp_path, capsys):
    eval_knn.main(["--model", str(run), *DATA, "--k", "5", "20", "--output", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    assert (
        len(lines) == 1
        and result["task"] == "knn"
        and result["n_train"] == 60
        and result["n_val"] == 30
    )
    assert result["k"].keys() == {"5", "20"} and result["top1"] == max(result["k"].values())
    assert json.loads((tmp_path / "knn.json").read_text()) == result


def test_knn_in_the_loop_equals_knn_on_the_export_exactly(run, capsys):
    eval_knn.main(["--model", str(run), *DATA, "--k", "20"])
    in_loop = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1][
        "probe/knn"
    ]
    assert json.loads(capsys.readouterr().out)["top1"] == pytest.approx(in_loop, abs=1e-6)


@pytest.mark.parametrize(
    "model", ["pixels?patch_size=8", "random:vit_nano?patch_size=8&image_size=32"]
)
def test_baselines_are_models_too(model, capsys):
    eval_knn.main(["--model", model, *DATA, "--k", "20", "--size", "32"])
    assert 0 <= json.loads(capsys.readouterr().out)["top1"] <= 1


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--model", "no/such/run"], "no/such/run"),
        (["--model", "random:vit_smal"], "vit_small"),
        (["--model", "pixels", "--k", "0"], "--k"),
        (["--model", "pixels", "--train", "folder:/nowhere"], "/nowhere"),
        (["--model", "pixels", "--size", "8", "8", "8"], "--size"),
        (["--model", "pixels", "--device", "tpu"], "tpu"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_two(arguments, words):
    done = run_process("eval_knn.py", *DATA, *arguments)
    assert (
        done.returncode == 2
        and words in done.stderr
        and "Traceback" not in done.stderr
        and not done.stdout
    )
