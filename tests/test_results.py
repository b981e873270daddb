"""The README's figures of the quickstart, measured again with its commands.

They are equal on the processor and the builds on which they were measured. Others change the last
bits of a step, and training makes of that what it makes of another seed. So the figures of a
trained network may differ by the spread over seeds.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import eval_dense
import eval_knn
import eval_linear
from engine.logger import read_metrics
from tests.test_scripts import readme_commands

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
UNTRAINED = 0.01  # how far a figure of pixels or random weights may lie from the printed one
KNN_DATA = ["--train", "scenes?split=train&size=2000", "--val", "scenes?split=val&size=1000"]

pytestmark = pytest.mark.slow


def row(first: str) -> list[str]:
    """The cells of the README's one table row whose first is this, without that."""
    (line,) = [line for line in README.splitlines() if line.startswith(f"| {first} |")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d+\.\d+", text)]


def spread_of_seeds() -> float:
    figures = numbers(row("540 steps, one thread, seeds 0, 1, 2")[-1])
    return max(figures) - min(figures)


def train_quickstart(folder: Path, threads: int, *overrides: str) -> Path:
    """The README's first command, without the installation, in another folder."""
    (command,) = [line for line in readme_commands() if line.startswith("pip install -r req")][:1]
    _, script, *arguments = shlex.split(command.partition("&&")[2])
    subprocess.run(
        [sys.executable, script, *arguments, *overrides, f"output_dir={folder}"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        check=True,
    )
    return folder


def probes(run: Path) -> dict[int, dict]:
    return {
        record["step"]: record
        for record in read_metrics(run / "metrics.jsonl")
        if "probe/knn" in record
    }


@pytest.fixture(scope="module")
def seed_one(tmp_path_factory) -> Path:
    return train_quickstart(tmp_path_factory.mktemp("seed") / "quickstart", 1, "seed=1")


def test_the_quickstart_ends_as_the_first_screen_says(tmp_path):
    found = probes(train_quickstart(tmp_path / "quickstart", 2))
    printed = re.findall(r"^step (\d+)/540 .*?probe/knn (\d\.\d+)", README, flags=re.M)
    assert [int(step) for step, _ in printed] == [0, 270, 540] == list(found)
    for step, accuracy in printed:
        tolerance = spread_of_seeds() if int(step) else UNTRAINED
        assert found[int(step)]["probe/knn"] == pytest.approx(float(accuracy), abs=tolerance)
    for step, loss in re.findall(r"^step (\d+)/540 .*?loss (\d\.\d+)", README, flags=re.M):
        assert found[int(step)]["loss"] == pytest.approx(float(loss), rel=0.05)
    (accuracy,) = numbers(row("540 steps, two threads, seed 0")[-1])
    assert found[540]["probe/knn"] == pytest.approx(accuracy, abs=spread_of_seeds())
    (random,) = numbers(row("Random initialisation")[-1])
    assert found[0]["probe/knn"] == pytest.approx(random, abs=UNTRAINED)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("steps", ["540", "2,700"])
def test_the_quickstart_reaches_the_accuracy_of_every_seed(steps, seed, tmp_path):
    begin = f"{steps} steps, one thread, seeds 0, 1, 2"
    accuracy = numbers(row(begin)[-1])[seed]
    total = int(steps.replace(",", ""))
    run = train_quickstart(tmp_path / "run", 1, f"seed={seed}", f"total_steps={total}")
    assert probes(run)[total]["probe/knn"] == pytest.approx(accuracy, abs=spread_of_seeds())


def test_raw_pixels_reach_the_accuracy_that_is_printed(capsys):
    eval_knn.main(["--model", "pixels", *KNN_DATA, "--k", "20"])
    (accuracy,) = numbers(row("Raw pixels")[-1])
    assert json.loads(capsys.readouterr().out)["top1"] == pytest.approx(accuracy, abs=UNTRAINED)


# For each row of the table of probes: the script, its task, the numbers of training and validation
# images, their size, the keys of the figure in the result, and its spread over seeds of training.
PROBES = {
    "k-NN, best k": (eval_knn, None, (4000, 1000), 48, "top1", 0.13),
    "Linear (DINOv2's grid)": (eval_linear, None, (4000, 1000), 48, "top1", 0.13),
    "Segmentation, linear, mIoU": (eval_dense, "segmentation", (400, 200), 48, "miou", 0.04),
    "Depth, RMSE (lower is better)": (eval_dense, "depth", (400, 200), 48, "rmse", 0.05),
    "Correspondence, recall at 0.1": (
        *(eval_dense, "correspondence", (None, 200), 96, "recall 0.1", 0.04),
    ),
    "Localization, LOST, CorLoc": (
        *(eval_dense, "localization", (None, 200), 96, "lost corloc", 0.1),
    ),
}
RANDOM = "random:vit_nano?patch_size=6&positions=rope&depth=2&image_size=48"


@pytest.mark.parametrize("column, model", [(0, None), (1, RANDOM), (2, "pixels?patch_size=6")])
@pytest.mark.parametrize("probe", PROBES)
def test_every_probe_gives_the_figure_that_is_printed(probe, column, model, request, capsys):
    script, task, (train_size, val_size), size, keys, spread = PROBES[probe]
    cells = row(probe)
    if not numbers(cells[column]):
        pytest.skip("not measured")
    arguments = [task] if task else []
    trained = model or str(request.getfixturevalue("seed_one"))
    arguments += ["--model", trained, "--val", f"scenes?split=val&size={val_size}"]
    arguments += ["--train", f"scenes?split=train&size={train_size}"] if train_size else []
    script.main([*arguments, "--size", str(size)])
    figure = json.loads(capsys.readouterr().out)
    for key in keys.split():
        figure = figure[key]
    (printed,) = numbers(cells[column])
    assert figure == pytest.approx(printed, abs=UNTRAINED if model else spread, rel=0.01)
