"""Names of files that are no text, or that would break a table's lines."""

import os

import pytest

from engine.logger import BadImages

NAMES = [b"caf\xe9.png", b"a\nb.png", b"a\tb\r.png", "Ünï\u2028x.png".encode()]


@pytest.mark.parametrize("name", NAMES)
def test_an_unreadable_image_of_any_name_is_listed_once(tmp_path, name):
    bad = [(os.fsdecode(b"/data/" + name), "no image"), ("/data/other.png", "empty file")]
    BadImages(tmp_path, 10, None).add(bad)
    again = BadImages(tmp_path, 10, None)
    again.add(bad)
    lines = (tmp_path / "bad_images.txt").read_bytes().split(b"\n")
    assert len(lines) == 3 and len(again.seen) == 2
    escaped = name.replace(b"\n", b"\\n").replace(b"\t", b"\\t").replace(b"\r", b"\\r")
    assert lines[0] == b"/data/" + escaped + b"\tno image"
