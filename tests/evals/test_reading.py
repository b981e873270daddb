"""Images that an evaluation cannot use: left out, counted, and named once."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import eval_dense
import eval_knn
import eval_linear
import extract
import train
from data.pictures import UnreadableImage
from data.scenes.scenes import Scenes
from errors import UserError
from evals.patches import mean_locality
from models.weights.load import load_backbone
from tests.oracles import painted

MODEL = "pixels?patch_size=8&image_size=16"
LOGREG = ["--protocol", "logreg"]
BROKEN = {"empty": b"", "page": b"<html>404</html>", "cut": None, "gone": None}


def colours(count: int, classes: int = 3, seed: int = 0) -> list[Image.Image]:
    """Noisy images, `count` of each class, in the colour of the class."""
    rng, pictures = np.random.default_rng(seed), []
    for number in range(count * classes):
        level = np.full(3, 60)
        level[number // count] = 190
        pixels = rng.normal(level, 50, (20, 26, 3)).clip(0, 255).astype(np.uint8)
        pictures.append(Image.fromarray(pixels))
    return pictures


def break_image(path: Path, how: str) -> None:
    """An unreadable file; "gone" is a link to nothing."""
    if how == "gone":
        path.symlink_to("nowhere.png")
    elif how == "cut":
        colours(1)[0].save(path)
        path.write_bytes(path.read_bytes()[:90])
    else:
        path.write_bytes(BROKEN[how])


@pytest.fixture
def labelled(tmp_path) -> Path:
    """train and val with three classes of four images in folders."""
    for seed, part in enumerate(("train", "val")):
        for number, picture in enumerate(colours(4, seed=seed)):
            folder = tmp_path / part / f"class{number // 4}"
            folder.mkdir(parents=True, exist_ok=True)
            picture.save(folder / f"{number:02}.png")
    return tmp_path


def run(capsys, script, *arguments) -> tuple[dict, str]:
    script.main([*map(str, arguments), "--device", "cpu"])
    said = capsys.readouterr()
    result = json.loads(said.out)
    del result["seconds"]
    return result, said.err


@pytest.mark.parametrize("parts", [("val",), ("train",), ("train", "val")])
@pytest.mark.parametrize(
    "script, flags",
    [
        (eval_knn, ["--k", "1", "3", "--retrieval", "--copies"]),
        (eval_knn, ["--k", "2", "--batch-size", "5", "--workers", "1"]),
        (eval_linear, [*LOGREG, "--also", "VAL"]),
        (eval_linear, ["--steps", "3", "--lr", "0.1"]),
    ],
)
def test_broken_images_change_nothing_else(capsys, labelled, script, flags, parts):
    where = ["--model", MODEL, "--train", labelled / "train", "--val", labelled / "val"]
    flags = [labelled / "val" if flag == "VAL" else flag for flag in flags]
    whole, said = run(capsys, script, *where, *flags)
    assert whole["unreadable"] == 0 and "left out" not in said
    names = []
    for part in parts:
        for how in BROKEN:
            names.append(labelled / part / "class2" / f"z_{how}.png")
            break_image(names[-1], how)
    found, said = run(capsys, script, *where, *flags)
    assert found == whole | {"unreadable": len(names)}
    lines = [line for line in said.splitlines() if line.startswith("left out: ")]
    counted = Counter(line.split(": ")[1] for line in lines)
    assert counted == {str(name): 1 for name in names}


def test_streamed_crops_and_corruptions_pass_broken_images_over(capsys, labelled):
    where = ["--model", MODEL, "--train", labelled / "train", "--val", labelled / "val"]
    for part in ("train", "val"):
        break_image(labelled / part / "class2" / "z.png", "cut")
    found, said = run(capsys, eval_linear, *where, "--steps", "2", "--stream", "--corruptions")
    assert found["unreadable"] == 2 and found["n_val"] == 12
    assert said.count("left out: ") == 2 and len(found["corruptions"]) == 5


def test_a_set_without_a_readable_image_is_one_sentence(labelled):
    for path in sorted((labelled / "val").rglob("*.png")):
        path.write_bytes(b"")
    where = ["--train", str(labelled / "train"), "--val", str(labelled / "val")]
    for script in (eval_knn, eval_linear):
        with pytest.raises(ValueError, match="none of the 12 images could be read.*val/class0/00"):
            script.main(["--model", MODEL, "--device", "cpu", *where])


@pytest.fixture
def marked(tmp_path) -> Path:
    """Six images, their halves of two classes, with masks and with boxes."""
    root = tmp_path / "marked"
    (root / ".masks").mkdir(parents=True)
    rows, boxes = ["file,mask"], ["file,x0,y0,x1,y1"]
    for number, picture in enumerate(colours(2)):
        mask = np.zeros((20, 26), np.uint8)
        mask[:, 13:] = 1 + number % 2
        picture.save(root / f"{number}.png")
        Image.fromarray(mask).save(root / ".masks" / f"{number}.png")
        rows.append(f"{number}.png,.masks/{number}.png")
        boxes.append(f"{number}.png,13,0,26,20")
    (root / "marks.csv").write_text("\n".join(rows))
    (root / "boxes.csv").write_text("\n".join(boxes))
    return root


@pytest.mark.parametrize(
    "task, marks, flags",
    [
        ("segmentation", "marks.csv", ["--steps", "2"]),
        ("segmentation", "marks.csv", ["--steps", "2", "--multi-scale"]),
        ("segmentation", "marks.csv", ["--head", "knn", "--workers", "1"]),
        ("localization", "marks.csv", []),
        ("localization", "boxes.csv", []),
    ],
)
@pytest.mark.parametrize("missing", ["0.png", "5.png", ".masks/0.png", ".masks/5.png"])
def test_dense_probes_pass_broken_images_and_masks_over(
    capsys, marked, task, marks, flags, missing
):
    spec = f"{marked}?marks={marks}"
    where = ["--model", MODEL, "--size", "16", "--train", spec, "--val", spec]
    (marked / missing).write_bytes(b"")
    found, said = run(capsys, eval_dense, task, *where, *flags)
    lost = not (missing.startswith(".masks") and marks == "boxes.csv")
    assert found["unreadable"] == lost and found["n_train"] == found["n_val"] == 6 - lost
    assert said.count("left out: ") == lost and (not lost or missing in said)


class Flaky(Scenes):
    """Scenes of which one cannot be read."""

    def _refuse(self, index: int) -> None:
        if index == 1:
            raise UnreadableImage(self.name(1), "no answer")

    def image(self, index: int):
        self._refuse(index)
        return super().image(index)

    def pair(self, index: int):
        self._refuse(index)
        return super().pair(index)

    def clip(self, index: int):
        self._refuse(index)
        return super().clip(index)


@pytest.mark.parametrize(
    "task, flags",
    [
        ("depth", ["--train", "flaky", "--steps", "2"]),
        ("correspondence", []),
        ("tracking", []),
        ("localization", []),
    ],
)
def test_pairs_clips_and_depth_pass_broken_scenes_over(capsys, monkeypatch, task, flags):
    monkeypatch.setattr(eval_dense, "open_data", lambda spec, _: Flaky("val", 4, frames=2))
    found, said = run(capsys, eval_dense, task, "--model", MODEL, "--val", "flaky", *flags)
    assert found["unreadable"] == 1 and found["n_val"] == 3
    assert said.count("left out: ") == 1 and "no answer" in said


def test_locality_takes_the_first_readable_images():
    class Items:
        def __init__(self, broken=()):
            self.broken, self.items = broken, list(painted("mask", "val", 4))

        def __len__(self):
            return len(self.items)

        def __getitem__(self, index):
            if index in self.broken:
                raise UnreadableImage(str(index), "no answer")
            return self.items[index]

    backbone, cpu = load_backbone("pixels?patch_size=8"), torch.device("cpu")
    unreadable = {}
    value = mean_locality(backbone, Items((0, 2)), cpu, images=1, unreadable=unreadable)
    whole = Items()
    whole.items = whole.items[1:2]
    assert value == mean_locality(backbone, whole, cpu) and unreadable.keys() == {"0"}
    with pytest.raises(ValueError, match="none of the 4 images"):
        mean_locality(backbone, Items(range(4)), cpu)


def test_extract_and_probes_during_training_name_broken_images(capsys, tiny, tmp_path, labelled):
    name = "z\nend\t\udcff.png"  # any bytes but / and zero are a name
    break_image(labelled / "val" / "class0" / name, "page")
    where = ["--model", MODEL, "--data", labelled / "val", "--output", tmp_path / "out"]
    found, _ = run(capsys, extract, *where)
    assert found["n"] == 12 and found["unreadable"] == 1
    listed = (tmp_path / "out" / "bad_images.txt").read_bytes().splitlines()
    assert len(listed) == 1 and b"z\\nend\\t\xff.png: " in listed[0]

    probes = ["probe.every=2", "probe.linear=true", "probe.patches=true"]
    probes += [f"probe.train={labelled}/train", f"probe.val={labelled}/val"]
    train.main([*tiny, *probes])
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if "probe/knn" in record]
    assert [record["step"] for record in records] == [0, 2, 4]
    assert all(record["probe/unreadable"] == 1 for record in records)
    assert all(0 <= record["probe/linear"] <= 1 for record in records)
    assert capsys.readouterr().err.count("left out: ") == 1


@pytest.mark.parametrize("on", ["workers", "device"])
def test_a_missing_mask_guides_nothing_and_is_listed(tiny, tmp_path, marked, on):
    (marked / ".masks" / "0.png").unlink()
    guided = [f"data.train={marked}?marks=marks.csv", "crops.guided=1", f"data.augment_on={on}"]
    train.main([*tiny, *guided])
    listed = (tmp_path / "run" / "bad_images.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in listed] == [str(marked / ".masks" / "0.png")]


# ----------------------------------------------------------------- images without a known class


def add_strays(folder: Path, unlabelled: int, unknown: int) -> None:
    """Images beside the class folders, and of two classes `ant` and `bee`, sorted first."""
    for number in range(unlabelled):
        colours(1, seed=5)[number % 3].save(folder / f"sheet{number}.png")
    for number in range(unknown):
        (folder / ("ant", "bee")[number % 2]).mkdir(exist_ok=True)
        colours(1, seed=6)[0].save(folder / ("ant", "bee")[number % 2] / f"{number}.png")


@pytest.mark.parametrize("unlabelled, unknown", [(8, 0), (0, 5), (3, 1)])
@pytest.mark.parametrize(
    "script, flags",
    [
        (eval_knn, ["--k", "3"]),
        (eval_knn, ["--k", "3", "--retrieval", "--batch-size", "5"]),
        (eval_linear, LOGREG),
        (eval_linear, ["--steps", "3", "--lr", "0.1", "--protocol", "dino"]),
    ],
)
def test_images_without_a_class_of_train_count_nowhere(
    capsys, labelled, script, flags, unlabelled, unknown
):
    where = ["--model", MODEL, "--train", labelled / "train", "--val", labelled / "val"]
    whole, said = run(capsys, script, *where, *flags)
    assert whole["left_out"] == 0 and "left out" not in said
    add_strays(labelled / "val", unlabelled, unknown)
    found, said = run(capsys, script, *where, *flags)
    assert found == whole | {"left_out": unlabelled + unknown}
    (line,) = said.splitlines()
    total = 12 + unlabelled + unknown
    assert line.startswith(f"{labelled}/val: {unlabelled + unknown} of {total} images left out: ")
    assert (f"{unlabelled} without a label" in line) == (unlabelled > 0)
    assert (f"{unknown} of classes that train lacks (ant" in line) == (unknown > 0)


def test_val_also_and_the_probes_of_a_run_agree(capsys, tiny, tmp_path, labelled):
    add_strays(labelled / "val", 8, 4)
    flags = ["--protocol", "logreg", "--also", labelled / "val"]
    where = ["--model", MODEL, "--train", labelled / "train", "--val", labelled / "val"]
    found, said = run(capsys, eval_linear, *where, *flags)
    (also,) = found["also"].values()
    assert also["top1"] == found["top1"] and also["left_out"] == found["left_out"] == 12
    assert also["n"] == found["n_val"] == 12
    probes = ["probe.every=4", "probe.linear=true", "total_steps=1", "guard.action=stop"]
    probes += [f"probe.train={labelled}/train", f"probe.val={labelled}/val"]
    train.main([*tiny, *probes, f"data.train={labelled}/train"])
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert record["probe/knn"] > 0.7 and record["probe/linear"] > 0.7  # at most 0.5 of all images
    assert capsys.readouterr().err.count("12 of 24 images left out") == 1


def test_copies_and_truth_keep_images_without_a_class(capsys, labelled):
    where = ["--model", MODEL, "--train", labelled / "train", "--val", labelled / "val"]
    add_strays(labelled / "val", 2, 1)
    found, _ = run(capsys, eval_knn, *where, "--copies", "--k", "3")
    assert found["copies"]["queries"] == 15
    assert found["n_val"] == 12 and found["left_out"] == 3


@pytest.mark.parametrize("script", [eval_knn, eval_linear, train])
def test_no_label_to_learn_from_is_one_sentence(tiny, labelled, script):
    for number in range(3):
        colours(1)[number].save(labelled / "train" / f"a{number}.png")
    spec = f"{labelled}/train?size=2"
    arguments = ["--model", MODEL, "--train", spec, "--val", f"{labelled}/val"]
    if script is train:
        arguments = [*tiny, "probe.every=4", f"probe.train={spec}", f"probe.val={labelled}/val"]
    with pytest.raises(UserError, match=r"train\?size=2 has no labels; a probe needs folders"):
        script.main(arguments)


@pytest.mark.parametrize("script", [eval_knn, eval_linear])
def test_the_only_labelled_image_is_broken(labelled, script):
    for number in range(3):
        colours(1)[number].save(labelled / "train" / f"a{number}.png")
    break_image(labelled / "train" / "class0" / "00.png", "cut")
    where = ["--train", f"{labelled}/train?size=4", "--val", f"{labelled}/val"]
    with pytest.raises(UserError, match="could be read"):
        script.main(["--model", MODEL, "--device", "cpu", *where])


@pytest.mark.parametrize("size, held", [(3, 1), (5, 2), (12, 3)])
def test_a_size_that_cuts_classes_off_says_so(capsys, labelled, size, held):
    where = ["--model", MODEL, "--val", labelled / "val"]
    found, said = run(capsys, eval_knn, *where, "--train", f"{labelled}/train?size={size}")
    cut = f"train?size={size}: the first {size} images are of {held} of 3 classes"
    assert (cut in said) == (held < 3)
    assert found["left_out"] == 4 * (3 - held) and found["n_val"] == 4 * held


@pytest.mark.parametrize("script", [eval_knn, eval_dense, extract, train])
def test_what_a_folder_holds_besides_is_one_line(capsys, tiny, tmp_path, marked, labelled, script):
    (marked / "notes.txt").write_text("x")
    with (marked / "marks.csv").open("a") as file:
        file.write("\n9.png,.masks/9.png\n8.png,.masks/8.png")
    spec = f"{marked}?marks=marks.csv"
    if script is eval_dense:
        arguments = ["localization", "--model", MODEL, "--val", spec]
    elif script is extract:
        arguments = ["--model", MODEL, "--data", spec, "--output", str(tmp_path / "out")]
    elif script is eval_knn:
        arguments = ["--model", MODEL, "--train", spec, "--val", spec, "--copies"]
    else:
        (labelled / "val" / "x.heic").write_text("x")
        probes = [f"probe.train={labelled}/train", f"probe.val={labelled}/val", "probe.every=4"]
        arguments = [*tiny, f"data.train={spec}", *probes, "crops.guided=1"]
    script.main(arguments)
    said = capsys.readouterr().err
    assert said.count("2 of 8 marked files match no image") == 1
    assert said.count("unknown extensions") == (2 if script is train else 1)


@pytest.mark.parametrize(
    "script, flags",
    [
        (eval_knn, ["--k", "1", "--copies"]),
        (eval_linear, ["--steps", "2"]),
        (eval_dense, ["localization"]),
        (extract, ["--features", "cls", "patches"]),
    ],
)
def test_forward_passes_in_bf16_are_close_to_float32(
    capsys, labelled, marked, tmp_path, script, flags
):
    model = "random:vit_nano?embed_dim=32&depth=2&num_heads=2&patch_size=8&image_size=16"
    data = ["--train", labelled / "train", "--val", labelled / "val"]
    if script is eval_dense:
        data = ["--val", f"{marked}?marks=marks.csv"]
    if script is extract:
        data = ["--data", labelled / "val"]
    found = {}
    for precision in ("auto", "fp32", "bf16"):
        where = ["--precision", precision, "--output", tmp_path / precision]
        found[precision], _ = run(capsys, script, *flags, "--model", model, *data, *where)
    assert found["auto"] == found["fp32"] and found["bf16"].keys() == found["fp32"].keys()
    if script is extract:
        exact, low = (np.load(tmp_path / name / "cls.npy") for name in ("fp32", "bf16"))
        assert 0 < np.abs(exact - low).max() < 0.1
