"""Folders, lists and tables as people have them: links, odd tables, masks, wrong marks."""

import os

import numpy as np
import pytest
from PIL import Image

from data.sources.specs import open_data


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
