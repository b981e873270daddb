"""Folders, lists and tables as people have them: links, odd tables, masks, wrong marks."""

import os

import numpy as np
import pytest
from PIL import Image

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
