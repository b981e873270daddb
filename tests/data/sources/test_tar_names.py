"""Members of tar shards that are no images by their name, links, and labels without an image."""

import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from data.sources.specs import open_data
from tests.data.sources.test_kinds import encoded, write_tar

PNG = encoded(np.zeros((4, 5), np.uint8))


@pytest.mark.parametrize(("members", "images", "said"), [
    (["a.png", "s.v1.0.png", "t.v1.0.png", "u.x.JPG"], 1,
     ["2 members end in .png", "1 members end in .jpg"]),
    (["a.png", "a.seg.png", "b.png", "b.cls", "c.cls"], 2, ["1 members end in .cls without"]),
    (["a.png", "b.heic", "c.txt", "d.txt"], 1, ["1 members end in .heic", "2 members end in .txt"]),
    (["a.png", "a.cls", "a.json"], 1, []),
])  # fmt: skip
def test_members_passed_over_are_counted(tmp_path, members, images, said):
    write_tar(tmp_path / "s.tar", dict.fromkeys(members, PNG))
    data = open_data(f"tar:{tmp_path}/s.tar")
    assert len(data) == images and len(data.passed_over) == len(said)
    assert all(any(words in line for line in data.passed_over) for words in said)


def test_a_shard_whose_names_all_have_a_further_dot_says_so(tmp_path):
    write_tar(tmp_path / "s.tar", {f"{k}.v1.0.jpg": PNG for k in range(3)})
    with pytest.raises(FileNotFoundError, match="3 members end in .jpg behind a further dot"):
        open_data(f"tar:{tmp_path}/s.tar")


@pytest.mark.parametrize("names", [("b.png",), ("b.png", "c/d.png"), ("a2.png", "z.PNG", "0.png")])
def test_hard_links_are_the_images_that_they_name(tmp_path, names):
    array = np.arange(20, dtype=np.uint8).reshape(4, 5)
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        member = tarfile.TarInfo("a.png")
        member.size = len(file.getvalue())
        tar.addfile(member, io.BytesIO(file.getvalue()))
        for name in names:
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.LNKTYPE, "a.png"
            tar.addfile(link)
        link = tarfile.TarInfo("y.png")
        link.type, link.linkname = tarfile.SYMTYPE, "a.png"
        tar.addfile(link)
    data = open_data(f"tar:{tmp_path}/s.tar", channels=1)
    assert [data.name(k).partition(".tar/")[2] for k in range(len(data))] == ["a.png", *names]
    assert all(np.array_equal(data.image(k)[0], array) for k in range(len(data)))
    assert data.passed_over == [
        f"tar:{tmp_path}/s.tar: 1 members are symbolic links, which are not followed"
    ]
