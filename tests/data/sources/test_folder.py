"""Folders, lists and tables as people have them: links, odd tables, masks, wrong marks."""

import os

import numpy as np
import pytest
from PIL import Image

from data.guided import Guidance
from data.sources.specs import open_data
from errors import UserError


def save(path, array=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((8, 6), np.uint8) if array is None else array).save(path)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "data"
    save(root / "a" / "1.png")
    save(root / "b" / "2.png")
    return root


@pytest.mark.parametrize("links", [
    {"a/back": ".."},
    {"a/back": "..", "b/back": ".."},
    {"aa": "b", "b/up": "../a", "a/far": "../.."},
    {"a/deep": "../b", "b/self": "."},
])  # fmt: skip
def test_each_folder_is_listed_once_under_its_own_path(folder, links):
    for name, target in links.items():
        os.symlink(target, folder / name)
    data = open_data(str(folder))
    assert list(data.files) == [b"a/1.png", b"b/2.png"] and data.classes == ["a", "b"]


def test_a_linked_folder_elsewhere_is_still_followed(folder, tmp_path):
    save(tmp_path / "other" / "3.png")
    os.symlink("../other", folder / "c")
    assert list(open_data(str(folder)).files) == [b"a/1.png", b"b/2.png", b"c/3.png"]


def test_unknown_extensions_are_counted(folder):
    for name in ("notes.txt", "b/x.heic", "b/y.HEIC", ".hidden", "README"):
        (folder / name).write_bytes(b"x")
    (line,) = open_data(str(folder)).passed_over
    assert "4 files" in line and "2 .heic" in line and "1 .txt" in line
    assert "1 no extension" in line


TABLES = {
    "label,file\ncat,a/1.png\ndog\n": "line 3",
    "file,label\na/1.png,cat\n\n  \nb/2.png\n": "line 5",
    "file,label\na/1.png,cat\na,b.png,dog\n": "line 3",
    'file,label\n"a/1.png,cat\n' + "b/2.png,dog\n" * 20_000: "line 2",
    'file,label\n"a/1.png,cat\nb/2.png,"dog"\n': "line 2",
    "file,label\n,cat\n": "line 2",
    "name,label\na/1.png,cat\n": "no column 'file'",
}


@pytest.mark.parametrize("text", TABLES)
@pytest.mark.parametrize("spec", ["{table}", "{root}?labels={table}"])
def test_a_wrong_line_of_a_table_is_named(folder, text, spec):
    (folder / "t.csv").write_text(text)
    with pytest.raises(UserError, match=TABLES[text]) as caught:
        open_data(spec.format(root=folder, table=folder / "t.csv"))
    assert "t.csv" in str(caught.value)


@pytest.mark.parametrize("text", [
    "file, label\na/1.png, cat\nb/2.png, dog\n",
    "\ufefffile ,label ,\n a/1.png,cat ,\nb/2.png,dog,,\n",
    '"file", "label"\r\n"a/1.png", "cat"\r\n"b/2.png", "dog"\r\n',
])  # fmt: skip
@pytest.mark.parametrize("spec", ["{table}", "{root}?labels={table}"])
def test_blanks_around_fields_do_not_count(folder, text, spec):
    (folder / "t.csv").write_text(text)
    data = open_data(spec.format(root=folder, table=folder / "t.csv"))
    assert data.classes == ["cat", "dog"] and data.labels.tolist() == [0, 1]
    assert data.image(0).shape == (3, 8, 6)


@pytest.mark.parametrize(("rows", "said"), [
    ("a/1.png,x\nb/2.jpg,y\n", "1 of 2"),
    ("a/1.png,x\nb/2.png,y\n./c.png,z\nd.png,\n", "2 of 4"),
    ("./b/2.png,x\n/a/1.png,y\n1.png,z\n", "2 of 3"),
])  # fmt: skip
def test_labels_that_match_no_image_are_counted(folder, tmp_path, rows, said):
    (tmp_path / "t.csv").write_text("file,label\n" + rows)
    (line,) = open_data(f"{folder}?labels={tmp_path}/t.csv").passed_over
    assert said in line


@pytest.mark.parametrize(("box", "words"), [
    ("0.4,0.4,0.6,0.6", "line 2, a/1.png.*shares"),
    ("1000,1000,1100,1100", "line 2, a/1.png.*outside.*6 x 8"),
    ("0,0,8,6", "outside"),
    ("-5,0,3,3", "outside"),
])  # fmt: skip
def test_boxes_outside_their_image_are_refused_by_row(folder, box, words):
    (folder / "m.csv").write_text(f"file,x0,y0,x1,y1\na/1.png,{box}\n")
    with pytest.raises(UserError, match=words):
        open_data(f"{folder}?marks=m.csv")


@pytest.mark.parametrize("shape", [(6, 8), (16, 12), (8, 7)])
def test_a_mask_of_another_size_is_refused(folder, tmp_path, shape):
    save(tmp_path / "m.png", np.ones(shape, np.uint8))
    (tmp_path / "m.csv").write_text("file,mask\na/1.png,m.png\n")
    with pytest.raises(UserError, match="m.png: a mask of .* 8 x 6"):
        open_data(f"{folder}?marks={tmp_path}/m.csv")


def test_a_wrong_mark_beyond_the_first_few_ends_guided_training(tmp_path):
    root = tmp_path / "many"
    for number in range(25):
        save(root / f"{number:02}.png")
    rows = "".join(f"{number:02}.png,1,1,3,3\n" for number in range(24))
    (root / "m.csv").write_text("file,x0,y0,x1,y1\n" + rows + "24.png,1,1,30,3\n")
    data = open_data(f"{root}?marks=m.csv")
    with pytest.raises(UserError, match="line 26, 24.png"):
        Guidance(1.0).targets(data, 24, 0, 0, 1, 3)


def test_marks_are_those_of_the_upright_image(folder):
    exif = Image.Exif()
    exif[274] = 6
    Image.new("L", (6, 8)).save(folder / "c.jpg", exif=exif)
    (folder / "m.csv").write_text("file,x0,y0,x1,y1\nc.jpg,1,1,8,6\n")
    assert open_data(f"{folder}?marks=m.csv").annotations(2)["boxes"].tolist() == [[1, 1, 8, 6]]
