"""Two ranks give the JSON of one process, to the last digit."""

import json
import os

import numpy as np
import pytest

from engine.launch import loader_workers, ranks_here
from tests.evals.test_reading import break_image, labelled, marked  # noqa: F401
from tests.processes import run_process

MODEL = "random:vit_nano?embed_dim=32&depth=2&num_heads=2&patch_size=8&image_size=16"
SCENES = ["--train", "scenes?size=11", "--val", "scenes?split=val&size=10&frames=2"]
TRAINED = ["--steps", "3", "--lr", "0.01", "0.1"]
CASES = {
    "knn": ["eval_knn.py", "--k", "1", "5", "--retrieval", "--copies", "--whiten", "FOLDER"],
    "linear": ["eval_linear.py", *TRAINED, "--also", "FOLDER", "--corruptions"],
    "stream": ["eval_linear.py", *TRAINED, "--stream"],
    "logreg": ["eval_linear.py", "--protocol", "logreg"],
    "masks": ["eval_dense.py", "segmentation", *TRAINED],
    "scenes masks": ["eval_dense.py", "segmentation", "--multi-scale", *TRAINED],
    "patches": ["eval_dense.py", "segmentation", "--head", "knn"],
    "mask head": ["eval_dense.py", "segmentation", "--head", "mask", "--steps", "3"],
    "dpt": ["eval_dense.py", "depth", "--head", "dpt", "--steps", "3"],
    "depth": ["eval_dense.py", "depth", *TRAINED],
    "correspondence": ["eval_dense.py", "correspondence"],
    "tracking": ["eval_dense.py", "tracking"],
    "localization": ["eval_dense.py", "localization"],
}


SLOW = ("stream", "mask head", "dpt", "logreg", "scenes masks", "correspondence", "localization")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] * (case in SLOW)) for case in CASES]
)
def test_two_ranks_give_the_result_of_one(labelled, marked, case):  # noqa: F811
    script, *flags = CASES[case]
    data = SCENES
    if script != "eval_dense.py":
        break_image(labelled / "val" / "class1" / "a.png", "cut")
        data = ["--train", str(labelled / "train"), "--val", str(labelled / "val")]
    elif case in ("masks", "patches", "localization"):
        (marked / "2.png").write_bytes(b"")
        data = ["--train", f"{marked}?marks=marks.csv", "--val", f"{marked}?marks=marks.csv"]
    flags = [str(labelled / "val") if flag == "FOLDER" else flag for flag in flags]
    shared = ["--model", MODEL, "--device", "cpu", "--batch-size", "4"]
    one, two = (run_process(script, *flags, *data, *shared, ranks=ranks) for ranks in (1, 2))
    results = []
    for done in (one, two):
        assert done.returncode == 0, done.stderr
        results.append(json.loads(done.stdout))
        del results[-1]["seconds"]
    assert results[0] == results[1] and (data is SCENES or results[0]["unreadable"] == 1)
    assert two.stderr == one.stderr


def test_two_ranks_extract_the_rows_of_one(labelled, tmp_path):  # noqa: F811
    break_image(labelled / "val" / "class0" / "000.png", "cut")
    arrays = []
    for ranks in (1, 2):
        output = tmp_path / f"out{ranks}"
        flags = ["--data", str(labelled / "val"), "--output", str(output), "--batch-size", "5"]
        features = ["--features", "cls", "patches", "--device", "cpu"]
        done = run_process("extract.py", "--model", MODEL, *flags, *features, ranks=ranks)
        assert done.returncode == 0, done.stderr
        found = {path.name: path.read_bytes() for path in output.iterdir()}
        assert json.loads(found.pop("extract.json"))["n"] == 12
        assert not [name for name in found if name.endswith((".part", ".short"))]
        arrays.append(found)
    assert arrays[0] == arrays[1] and len(arrays[0]) == 4
    assert np.isfinite(np.load(tmp_path / "out2" / "cls.npy")).all()


def test_a_mistake_on_two_ranks_is_a_sentence(labelled):  # noqa: F811
    for path in (labelled / "val").rglob("*.png"):
        path.write_bytes(b"")
    data = ["--train", str(labelled / "train"), "--val", str(labelled / "val")]
    done = run_process("eval_knn.py", "--model", MODEL, "--device", "cpu", *data, ranks=2)
    assert done.returncode == 2 and "none of the 12 images could be read" in done.stderr
    assert "Traceback" not in done.stderr and not done.stdout


@pytest.mark.parametrize(
    "environment, ranks, here",
    [
        ({}, 1, 1),
        ({}, 4, 4),
        ({"LOCAL_WORLD_SIZE": "8"}, 32, 8),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, 8, 2),
        ({"LOCAL_WORLD_SIZE": "8"}, 1, 1),
    ],
)
def test_a_rank_takes_its_share_of_one_machine(environment, ranks, here, monkeypatch):
    assert ranks_here(environment, ranks) == here
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(16), raising=False)
    assert loader_workers(None, "cuda", ranks, environment) == 16 // here
    assert loader_workers(3, "cuda", ranks, environment) == 3
    assert loader_workers(None, "cpu", ranks, environment) == 0
