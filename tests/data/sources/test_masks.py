"""Masks of one's own files: classes for probes, marks for crops, no images."""

import json

import numpy as np
import pytest
from PIL import Image

import eval_dense
from data.annotated import Annotated
from data.guided import marked_points
from data.sources.specs import open_data
from errors import UserError
from evals.reading import read_batches

CLASSES = np.repeat(np.array([[0, 1, 2, 7, 255, 0]], np.uint8), 8, 0)


@pytest.fixture
def folder(tmp_path):
    for name in ("1.png", "2.png"):
        Image.fromarray(np.zeros((8, 6), np.uint8)).save(tmp_path / name)
    (tmp_path / "masks").mkdir()
    (tmp_path / "m.csv").write_text("file,mask\n1.png,masks/1.png\n2.png,./masks/../masks/2.png\n")
    return tmp_path


def palette() -> Image.Image:
    picture = Image.fromarray(CLASSES, "P")
    picture.putpalette([k * 37 % 256 for k in range(768)])
    return picture


@pytest.mark.parametrize("mask", [
    Image.fromarray(CLASSES), palette(), Image.fromarray(np.stack([CLASSES] * 3, 2)),
    Image.fromarray(CLASSES.astype(np.uint16)),
])  # fmt: skip
def test_probes_see_the_classes_and_crops_what_is_not_background(folder, mask):
    for name in ("1.png", "2.png"):
        mask.save(folder / "masks" / name)
    data = open_data(f"{folder}?marks=m.csv")
    assert list(data.files) == [b"1.png", b"2.png"]
    _, seen, _ = Annotated(data, "mask", 8, 1, (0.5,), (0.5,))[1]
    assert np.array_equal(seen.numpy(), CLASSES)
    points = marked_points(data.annotations(0), np.random.default_rng(0).random((50, 3)))
    assert ((points[:, 1] >= 1) & (points[:, 1] < 4)).all()


def test_of_a_mask_of_0_and_255_the_255_is_marked(folder):
    points = marked_points({"mask": CLASSES // 255 * 255}, np.random.default_rng(0).random((9, 3)))
    assert (points[:, 1] // 1 == 4).all()


def test_a_coloured_mask_is_refused(folder):
    colours = np.zeros((8, 6, 3), np.uint8)
    colours[..., 1] = 200
    for name in ("1.png", "2.png"):
        Image.fromarray(colours).save(folder / "masks" / name)
    with pytest.raises(UserError, match="coloured"):
        open_data(f"{folder}?marks=m.csv")


def test_images_without_a_row_are_left_out_and_counted(folder, capsys):
    for name in ("3.png", "0.png"):  # of which one is the first
        Image.fromarray(np.full((8, 6), 9, np.uint8)).save(folder / name)
    for name in ("1.png", "2.png"):
        Image.fromarray(CLASSES).save(folder / "masks" / name)
    data = Annotated(open_data(f"{folder}?marks=m.csv"), "mask", 8, 1, (0.5,), (0.5,))
    unreadable = {}
    found = list(read_batches(data, 4, collate=list, unreadable=unreadable))
    assert [index for _, _, index in found[0]] == [1, 2]
    assert len(unreadable) == 2 and "0.png: comes without mask" in capsys.readouterr().err


def test_localization_leaves_out_images_without_a_box(folder, capsys):
    (folder / "m.csv").write_text("file,x0,y0,x1,y1\n2.png,1,1,5,6\n")
    data = f"{folder}?marks=m.csv"
    command = ["localization", "--model", "pixels?patch_size=2", "--val", data]
    eval_dense.main(command)
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert result["n_images"] == 1 and result["unreadable"] == 1
    assert "1.png: comes without boxes" in err
