"""Detection: places, mAP, what FCOS learns, and boxes in CSV and COCO files."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import eval_dense
from data.scenes.scenes import Scenes
from data.sources.specs import open_data
from errors import UserError
from evals.detection import DetectionHead, mean_average_precision, places

NANO = "random:vit_nano?patch_size=8&image_size=32&depth=2"


def boxes(*rows, scores=None):
    found = {"boxes": torch.tensor(rows).float().reshape(-1, 4), "labels": torch.zeros(len(rows))}
    found["labels"] = found["labels"].long()
    return found if scores is None else found | {"scores": torch.tensor(scores).float()}


def test_mean_average_precision_of_cases_worked_out_by_hand():
    pytest.importorskip("pycocotools")
    truth = [boxes((0, 0, 40, 40), (50, 50, 90, 90)), boxes((10, 10, 50, 50)), boxes()]
    perfect = [one | {"scores": torch.ones(len(one["boxes"]))} for one in truth]
    assert mean_average_precision(perfect, truth)["map"] == 1
    nothing = [boxes(scores=[])] * 3
    assert mean_average_precision(nothing, truth)["map"] == 0
    moved = [one | {"boxes": one["boxes"] + torch.tensor([9, 0, 9, 0])} for one in perfect]
    found = mean_average_precision(moved, truth)  # overlap 31 / 49: right at 0.5, 0.55 and 0.6
    assert found["ap50"] == 1 and found["ap75"] == 0
    assert found["map"] == pytest.approx(0.3)
    half = [one | {"boxes": one["boxes"] + torch.tensor([20, 0, 20, 0])} for one in perfect]
    assert mean_average_precision(half, truth)["ap50"] == 0


def test_places_tile_the_image_at_strides_that_are_no_whole_pixels():
    found = places(torch.zeros(1, 1, 4, 8), (14, 28))  # stride 3.5
    assert torch.equal(found[0], torch.tensor([0.0, 0.0, 3.5, 3.5]))
    assert torch.equal(found[-1], torch.tensor([24.5, 10.5, 28.0, 14.0]))
    middles = (found[:, :2] + found[:, 2:]) / 2
    assert torch.allclose(middles.mean(0), torch.tensor([14.0, 7.0]))


@pytest.mark.parametrize("linear", [False, True])
def test_fcos_finds_squares_on_a_map_that_shows_them_and_the_linear_head_fewer(linear):
    pytest.importorskip("pycocotools")
    random = np.random.default_rng(0)

    def squares(count):
        maps, notes = torch.zeros(count, 8, 8, 8), []
        for k in range(count):
            label, side = int(random.integers(2)), int(random.integers(2, 5))
            top, left = random.integers(0, 9 - side, 2)
            maps[k, label, top : top + side, left : left + side] = 1
            corners = 8 * torch.tensor([[left, top, left + side, top + side]]).float()
            target = {"boxes": corners, "box_labels": torch.tensor([label])}
            notes.append(target | {"shape": torch.tensor([64, 64])})
        return maps + 0.1 * torch.randn(maps.shape), notes

    torch.manual_seed(0)
    head = DetectionHead([8], 8, classes=2, linear=linear, width=32)
    optimizer = torch.optim.AdamW(head.parameters(), 5e-3)
    maps, notes = squares(64)
    for step in range(80):
        chosen = [(step * 8 + k) % 64 for k in range(8)]
        loss = head.loss([maps[chosen]], [], [notes[k] for k in chosen], (64, 64))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    maps, notes = squares(32)
    with torch.no_grad():
        found = head.eval().predict([maps], [], (64, 64))
    truth = [{"boxes": one["boxes"], "labels": one["box_labels"]} for one in notes]
    ap50 = mean_average_precision(found, truth)["ap50"]
    assert ap50 < 0.8 if linear else ap50 > 0.9


@pytest.fixture
def folder(tmp_path):
    """Ten scenes as files, their boxes as CSV and as COCO."""
    data = Scenes(size=10)
    lines, images, notes = ["file,x0,y0,x1,y1,label"], [], []
    for k in range(len(data)):
        Image.fromarray(data.image(k).permute(1, 2, 0).numpy()).save(tmp_path / f"{k}.png")
        images.append({"id": 100 + k, "file_name": f"{k}.png"})
        held = data.annotations(k)
        for box, label in zip(held["boxes"].tolist(), held["box_labels"].tolist(), strict=True):
            lines.append(",".join(map(str, [f"{k}.png", *box, label])))
            corner = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
            notes.append({"image_id": 100 + k, "category_id": 7 + label, "bbox": corner})
    notes.append(notes[0] | {"iscrowd": 1})
    names = [{"id": 7 + k, "name": str(k)} for k in range(10)]
    coco = {"images": images, "annotations": notes, "categories": names}
    (tmp_path / "boxes.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "boxes.json").write_text(json.dumps(coco))
    return tmp_path


def test_boxes_of_csv_and_coco_files_are_those_of_the_scenes(folder):
    scenes = Scenes(size=10)
    for name in ("boxes.csv", "boxes.json"):
        data = open_data(f"{folder}?marks={name}", 3)
        for k in range(10):
            held, wanted = data.annotations(k), scenes.annotations(k)
            assert np.array_equal(held["boxes"], wanted["boxes"])
            assert np.array_equal(held["box_labels"], wanted["box_labels"])


def test_a_coco_file_trains_a_detector(folder, capsys):
    pytest.importorskip("pycocotools")
    spec = f"{folder}?marks=boxes.json"
    flags = ["--workers", "0", "--steps", "3", "--size", "64"]
    eval_dense.main(["detection", "--model", NANO, "--train", spec, "--val", spec, *flags])
    result = json.loads(capsys.readouterr().out)
    assert 0 <= result["map"] <= 1 and result["boxes"] > 10


@pytest.mark.parametrize(
    "change, words",
    [
        ({"bbox": [0, 0, 900, 9]}, "outside its image"),
        ({"category_id": 99}, "COCO"),
        ({"image_id": 1}, "COCO"),
    ],
)
def test_a_wrong_coco_file_is_told_in_a_sentence(folder, change, words):
    coco = json.loads((folder / "boxes.json").read_text())
    coco["annotations"][3] |= change
    (folder / "boxes.json").write_text(json.dumps(coco))
    with pytest.raises(UserError, match=words):
        open_data(f"{folder}?marks=boxes.json", 3)


def test_classes_of_train_and_val_that_differ_are_refused(folder):
    rows = (folder / "boxes.csv").read_text().splitlines()
    (folder / "few.csv").write_text("\n".join(rows[:2]) + "\n")
    data = ["--train", f"{folder}?marks=boxes.csv", "--val", f"{folder}?marks=few.csv"]
    with pytest.raises(UserError, match="same list"):
        eval_dense.main(["detection", "--model", NANO, *data])


def test_distractors_are_in_the_picture_and_in_no_annotation():
    plain, crowded = (Scenes(size=6, distractors=count) for count in (0, 5))
    changed = 0
    for k in range(6):
        held, wanted = crowded.annotations(k), plain.annotations(k)
        assert np.array_equal(held["boxes"], wanted["boxes"])
        assert np.array_equal(held["mask"], wanted["mask"])
        differs = (crowded.image(k) != plain.image(k)).any(dim=0).numpy()
        changed += differs[wanted["mask"] == 0].mean()
    assert changed / 6 > 0.1
    crowded.pair(0), crowded.clip(0)
