"""The first evening with a folder of one's own: broken files, texts, links, masks, odd names."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import eval_dense
import eval_knn
import extract
import train
import visualize
from data import stats
from tests.evals.test_reading import break_image, colours

MODEL = "pixels?patch_size=8&image_size=16"
BROKEN = ("empty", "page", "cut")


@pytest.fixture
def folder(tmp_path) -> Path:
    """20 pictures of two classes, 3 broken, 2 texts, a link to the parent and a folder of masks."""
    root = tmp_path / "Meine Bilder ü"
    rows = ["file,mask"]
    (root / "masks").mkdir(parents=True)
    for number, picture in enumerate(colours(10, classes=2)):
        name = ("Ünï çödé", "b c")[number // 10] + f"/bild {number:02} ß.png"
        (root / name).parent.mkdir(exist_ok=True)
        picture.save(root / name)
        mask = np.zeros((20, 26), np.uint8)
        mask[:, 13:] = 1 + number // 10
        Image.fromarray(mask).save(root / "masks" / f"{number}.png")
        rows.append(f"{name},masks/{number}.png")
    for how in BROKEN:
        break_image(root / "b c" / f"z {how}.png", how)
        rows.append(f"b c/z {how}.png,masks/19.png")
    for name in ("notes.txt", "b c/readme.txt"):
        (root / name).write_text("text")
    (root / "b c" / "up").symlink_to("..")
    (root / "marks.csv").write_text("\n".join(rows), encoding="utf-8")
    return root


def run(capsys, script, *arguments) -> tuple[dict, list[str]]:
    script.main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return json.loads(said.out), said.err.splitlines()


def check_lines(root: Path, lines: list[str]) -> None:
    """One line for the texts and the table, and one for each broken image."""
    assert len([line for line in lines if "passed over" in line]) == 1
    (line,) = [line for line in lines if "passed over" in line]
    assert "3 files" in line and "2 .txt" in line
    for how in BROKEN:
        assert len([line for line in lines if str(root / "b c" / f"z {how}.png") in line]) == 1


def test_statistics_count_what_they_read(capsys, folder):
    found, lines = run(capsys, stats, f"{folder}?marks=marks.csv", "--channels", "3")
    assert found["images"] == 20 and found["bad"] == 3 and found["first_bad"]
    assert len([line for line in lines if "3 files of unknown extensions" in line]) == 1


def test_evaluations_count_and_name(capsys, tmp_path, folder):
    spec = f"{folder}?marks=marks.csv"
    where = ["--model", MODEL, "--device", "cpu"]
    found, lines = run(capsys, eval_knn, *where, "--train", spec, "--val", spec, "--k", "1")
    assert found["n_train"] == found["n_val"] == 20 and found["unreadable"] == 3
    assert found["top1"] == 1 and found["left_out"] == 0
    check_lines(folder, lines)

    found, lines = run(capsys, extract, *where, "--data", spec, "--output", tmp_path / "out")
    assert found["n"] == 20 and found["unreadable"] == 3
    assert len((tmp_path / "out" / "index.csv").read_text(encoding="utf-8").splitlines()) == 21
    check_lines(folder, lines)

    given = ["segmentation", *where, "--train", spec, "--val", spec, "--size", "16", "--steps", "4"]
    found, lines = run(capsys, eval_dense, *given)
    assert found["n_val"] == 20 and found["unreadable"] == 3 and len(found["iou"]) == 3
    check_lines(folder, lines)

    picture = tmp_path / "pca.png"
    given = ["--images", spec, "--count", "99", "--output", picture]
    found, lines = run(capsys, visualize, "pca", *where, *given)
    assert found["images"] == 20 and picture.stat().st_size > 0
    assert all(len([line for line in lines if f"z {how}.png" in line]) == 1 for how in BROKEN)


def test_training_skips_lists_and_probes(capsys, tiny, tmp_path, folder):
    spec = f"{folder}?marks=marks.csv"
    flags = [f"data.train={spec}", f"probe.train={spec}", f"probe.val={spec}", "probe.every=4"]
    train.main([*tiny, *flags, "probe.patches=true", "crops.guided=0.5"])
    check_lines(folder, [line for line in capsys.readouterr().err.splitlines() if line])
    listed = (tmp_path / "run" / "bad_images.txt").read_text(encoding="utf-8").splitlines()
    assert {os.path.basename(line.split("\t")[0]) for line in listed} == {
        f"z {how}.png" for how in BROKEN
    }
    records = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    last = json.loads(records[-1])
    assert last["step"] == 4 and last["probe/unreadable"] == 3 and last["probe/miou"] > 0
