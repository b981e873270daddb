"""curate.py on folders of pictures: lists that train, reasons, and mistakes."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

import curate
import extract
from data.sources.specs import open_data
from errors import UserError

MODEL = ["--model", "pixels?patch_size=8", "--size", "32"]


def picture(seed: int, side: int = 64) -> Image.Image:
    cells = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize((side, side), Image.Resampling.BICUBIC)


@pytest.fixture
def folder(tmp_path):
    """Twenty different pictures in two classes, four copies, and one file that is none."""
    for number in range(20):
        (tmp_path / f"data/{number % 2}").mkdir(parents=True, exist_ok=True)
        picture(number).save(tmp_path / f"data/{number % 2}/{number:02d}.png")
    picture(0).save(tmp_path / "data/1/90 again, Ünï.jpg", quality=60)
    picture(0, 160).save(tmp_path / "data/0/91.png")
    picture(7).resize((40, 40)).save(tmp_path / "data/1/92.png")
    picture(8).save(tmp_path / "data/0/93.webp")
    (tmp_path / "data/1/94.png").write_bytes(b"")
    return tmp_path


def run(folder, capsys, *arguments: str) -> tuple[dict, list[dict], dict[str, dict]]:
    """The result, the rows of the list, and the reasons by the name of the file."""
    call = [*MODEL, "--data", str(folder / "data"), "--output", str(folder / "list.csv")]
    curate.main([arguments[0], *call, *arguments[1:]])
    result = json.loads(capsys.readouterr().out)
    with open(folder / "list.csv", newline="", encoding="utf-8") as file:
        kept = list(csv.DictReader(file))
    with open(folder / "list.reasons.csv", newline="", encoding="utf-8") as file:
        reasons = {row["file"].rpartition("/")[2]: row for row in csv.DictReader(file)}
    assert result["kept"] == len(kept) and result["n"] == len(reasons) == 24
    assert (folder / "list.png").is_file()
    return result, kept, reasons


def test_duplicates_are_kept_once_and_the_list_trains(folder, capsys):
    result, kept, reasons = run(folder, capsys, "dedup")
    assert result["kept"] == 20 and result["groups"] == 3 and result["unreadable"] == 1
    assert result["largest"] == 3 and result["pairs"]["0.9"] == 5
    for name, first in (("90 again, Ünï.jpg", "00"), ("91.png", "00"), ("92.png", "07")):
        assert reasons[name]["kept"] == "0" and reasons[name]["reason"] == "duplicate"
        assert reasons[name]["group"].endswith(f"{first}.png")
    data = open_data(f"list:{folder / 'list.csv'}")
    assert len(data) == 20 and data.classes == ["0", "1"]
    assert data[0][0].shape == (3, 64, 64) and {row["label"] for row in kept} == {"0", "1"}


def test_what_is_near_a_test_set_is_dropped_with_its_whole_group(folder, capsys):
    (folder / "test").mkdir()
    picture(0).resize((50, 50)).save(folder / "test/a.png")
    picture(99).save(folder / "test/b.png")
    result, _, reasons = run(folder, capsys, "dedup", "--against", str(folder / "test"))
    assert result["near_against"] == 3 and result["kept"] == 19
    assert (
        reasons["00.png"]["reason"] == reasons["91.png"]["reason"] == "near an image of --against"
    )


def test_features_of_extract_give_the_same_list(folder, capsys):
    _, kept, reasons = run(folder, capsys, "dedup")
    (folder / "data/1/97.png").write_bytes(b"")  # has no features
    where = folder / "features"
    extract.main([*MODEL, "--data", str(folder / "data"), "--output", str(where)])
    capsys.readouterr()
    strict = ["--threshold", "0.95"]  # colours are seen, thumbnails are not
    _, again, same = run(folder, capsys, "dedup", *strict, "--features", str(where))
    assert again == kept and same == reasons
    with pytest.raises(UserError, match="names no image"):
        (folder / "other").mkdir()
        picture(1).save(folder / "other/x.png")
        call = [*MODEL, "--data", str(folder / "other"), "--output", str(folder / "o.csv")]
        curate.main(["dedup", *call, "--features", str(where)])


def test_balance_takes_as_many_and_evens_clusters_out(folder, capsys):
    for number in range(30):  # a concept that outweighs all others
        noise = np.random.default_rng(number).normal(0, 3, (64, 64, 3))
        image = np.clip(np.asarray(picture(3)) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(image).save(folder / f"data/1/c{number}.png")
    call = [*MODEL, "--data", str(folder / "data"), "--output", str(folder / "list.csv")]
    curate.main(["balance", *call, "--target", "21", "--levels", "20"])
    result = json.loads(capsys.readouterr().out)
    assert result["kept"] == 21 and result["clusters"] == [20]
    assert result["evenness"]["after"] > 0.95 > 0.8 > result["evenness"]["before"]
    first = (folder / "list.csv").read_bytes()
    curate.main(["balance", *call, "--target", "21", "--levels", "20"])
    assert (folder / "list.csv").read_bytes() == first
    curate.main(["balance", *call, "--target", "21", "--levels", "20", "--seed", "1"])
    assert (folder / "list.csv").read_bytes() != first


def test_neighbours_of_seeds_are_kept_the_nearest_first(folder, capsys):
    (folder / "seeds").mkdir()
    for number in (0, 7):
        picture(number).save(folder / f"seeds/{number}.png")
    arguments = ["retrieve", "--seeds", str(folder / "seeds"), "--neighbours", "3"]
    result, kept, reasons = run(folder, capsys, *arguments)
    names = {row["file"].rpartition("/")[2] for row in kept}
    assert {"00.png", "90 again, Ünï.jpg", "91.png", "07.png", "92.png"} <= names
    assert result["seeds"] == 2 and len(names) <= 6
    result, kept, reasons = run(folder, capsys, *arguments, "--cap", "2")
    assert result["kept"] == 2
    assert all(float(reasons[row["file"].rpartition("/")[2]]["cosine"]) > 0.999 for row in kept)
    assert sum(row["reason"] == "beyond --cap" for row in reasons.values()) == len(names) - 2


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["dedup", "--output", "list"], "ends in .csv"),
        (["dedup", "--output", "x.csv", "--threshold", "1.5"], "threshold"),
        (["balance", "--output", "x.csv"], "needs --target"),
        (["retrieve", "--output", "x.csv"], "needs --seeds"),
        (["balance", "--output", "x.csv", "--target", "3", "--levels", "5", "9"], "largest first"),
        (["dedup", "--output", "x.csv", "--data", "scenes?size=3"], "no folder or list"),
        (["dedup", "--output", "x.csv", "--features", "nowhere"], "nowhere"),
    ],
)
def test_a_mistake_is_a_sentence_and_writes_nothing(arguments, words, folder, monkeypatch):
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    with pytest.raises((UserError, FileNotFoundError), match=words):
        curate.main([arguments[0], *MODEL, "--data", str(folder / "data"), *arguments[1:]])
    assert sorted(folder.rglob("*")) == before
