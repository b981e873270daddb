"""Label-guided crops: marks of some images say where crops are cut, and nothing else changes."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import train
import visualize
from data.guided import Guidance, marked_points, move_to_points
from data.images import ImageData
from data.loader import StepDataset
from data.sources.specs import open_data
from engine.config import CropsConfig
from engine.views import views_from
from tests.test_train import folder_of, losses

SPOT = (31, 74)  # row and column of the middle of the one thing to see, three pixels wide


class Spotted(ImageData):
    """Black images with one white spot; the first `marked` have a box around it."""

    def __init__(self, size: int = 64, marked: int = 64):
        self.size, self.marked = size, marked

    def __len__(self) -> int:
        return self.size

    def name(self, index: int) -> str:
        return f"spotted/{index}"

    def image(self, index: int) -> Tensor:
        image = torch.zeros(3, 60, 80, dtype=torch.uint8)
        image[:, SPOT[0] - 1 : SPOT[0] + 2, SPOT[1] - 1 : SPOT[1] + 2] = 255
        return image

    def annotations(self, index: int) -> dict:
        if index >= self.marked:
            return super().annotations(index)
        return {"boxes": np.array([[SPOT[1], SPOT[0], SPOT[1] + 1, SPOT[0] + 1]], np.float32)}


def crops_config(**keys) -> CropsConfig:
    sizes = {
        "global_size": 32,
        "local_size": 16,
        "local_count": 4,
        "local_scale": [0.1, 0.3],
        "policy": "crops_only",
    }
    return CropsConfig(**{**sizes, **keys})


def dataset(
    data, seed: int = 0, batch: int = 32, gram=None, ranks: int = 1, rank: int = 0, **keys
) -> StepDataset:
    views = views_from(crops_config(**keys), [0.0], [1.0], 8, None, gram)
    return StepDataset(data, views, batch_size=batch, seed=seed, rank=rank, world_size=ranks)


def batches(data, steps: int = 12, **keys) -> tuple[Tensor, Tensor]:
    """Global crops (n, C, H, W) and local crops of some steps."""
    found = [dataset(data, **keys)[step] for step in range(steps)]
    return torch.cat([batch.global_crops for batch in found]), torch.cat(
        [batch.local_crops for batch in found]
    )


def shows_spot(crops: Tensor) -> Tensor:
    return crops.flatten(1).amax(1) > 0.2


def test_pictures_of_crops_show_where_guided_ones_look(tmp_path, monkeypatch):
    sizes = [
        "crops.global_size=32",
        "crops.local_size=16",
        "crops.local_scale=[0.05, 0.1]",
        "crops.local_count=4",
    ]
    keys = [*sizes, "crops.policy=crops_only", "data.mean=[0, 0, 0]", "data.std=[1, 1, 1]"]
    for index in range(8):
        Image.fromarray(Spotted().image(index).permute(1, 2, 0).numpy()).save(
            tmp_path / f"{index}.png"
        )
    marks = [f"{index}.png,{SPOT[1]},{SPOT[0]},{SPOT[1] + 1},{SPOT[0] + 1}\n" for index in range(8)]
    (tmp_path / "marks.csv").write_text("file,x0,y0,x1,y1\n" + "".join(marks))
    arguments = [
        "--images",
        f"{tmp_path}?marks={tmp_path / 'marks.csv'}",
        "--output",
        str(tmp_path / "crops.png"),
    ]
    drawn = []
    monkeypatch.setattr("evals.views.draw_report", lambda *_, crops, **__: drawn.append(crops))
    for guided in (0, 1):
        visualize.main(["crops", *arguments, *keys, f"crops.guided={guided}"])
    plain, steered = (
        shows_spot(torch.stack([crop for views in crops for crop in views[2:]])) for crops in drawn
    )
    assert steered.all() and plain.float().mean() < 0.4
    assert all(
        torch.equal(*pair)
        for crops in zip(*drawn, strict=True)
        for pair in zip(crops[0][:2], crops[1][:2], strict=False)
    )  # the global ones


def test_local_crops_show_the_mark_with_the_set_probability_and_the_others_stay_as_they_were():
    plain, guided = batches(Spotted()), batches(Spotted(), guided=0.6)
    assert torch.equal(plain[0], guided[0])  # the global crops
    moved = (plain[1] != guided[1]).flatten(1).any(1)
    assert (
        shows_spot(guided[1][moved]).all() and 0.5 < moved.float().mean() < 0.6
    )  # some showed it all the same
    by_chance, n = shows_spot(plain[1]).float().mean().item(), len(plain[1])
    expected = 0.6 + 0.4 * by_chance
    assert by_chance < 0.25 and n == 1536
    assert (
        abs(shows_spot(guided[1]).float().mean().item() - expected)
        < 4 * (expected * (1 - expected) / n) ** 0.5
    )


def test_global_crops_follow_by_choice_and_those_of_a_gram_teacher_with_them():
    class Gram:
        teacher_scale, distortions = 1.0, False

    plain = dataset(Spotted(), global_scale=[0.1, 0.3])[0]
    batch = dataset(Spotted(), guided=1.0, guided_globals=True, global_scale=[0.1, 0.3], gram=Gram)[
        0
    ]
    assert shows_spot(batch.global_crops).all() and shows_spot(batch.local_crops).all()
    assert not shows_spot(plain.global_crops).all() and torch.equal(
        batch.gram_crops, batch.global_crops
    )


def test_images_without_marks_keep_their_crops():
    half = Spotted(marked=32)
    plain, guided = dataset(half, batch=64)[0], dataset(half, batch=64, guided=1.0)[0]
    marked = torch.tensor([index < 32 for index in guided.images]).repeat(4)
    assert shows_spot(guided.local_crops[marked]).all()
    assert torch.equal(guided.local_crops[~marked], plain.local_crops[~marked])


def test_a_share_of_the_images_is_looked_at_always_the_same_ones():
    data, looked_at = Spotted(), []
    for step in (0, 1, 2):  # an epoch each
        plain, guided = (
            dataset(data, batch=64)[step],
            dataset(data, batch=64, guided=1.0, guided_share=0.4)[step],
        )
        moved = (
            (plain.local_crops != guided.local_crops).flatten(1).any(1).unflatten(0, (4, 64)).any(0)
        )
        looked_at.append(
            {index for index, follows in zip(guided.images, moved.tolist(), strict=True) if follows}
        )
    assert (
        looked_at[0] == looked_at[1] == looked_at[2] and 14 <= len(looked_at[0]) <= 38
    )  # of 64; 3 deviations are 12
    assert torch.equal(batches(data, guided=1.0, guided_share=0.0)[1], batches(data)[1])


def test_guided_views_depend_on_seed_and_position_alone():
    whole = dataset(Spotted(), guided=0.5, batch=8)
    parts = [dataset(Spotted(), guided=0.5, batch=8, ranks=2, rank=rank) for rank in range(2)]
    for step in (5, 0, 3):  # in any order
        together, halves = (
            whole[step].local_crops.unflatten(0, (4, 8)),
            [part[step].local_crops for part in parts],
        )
        assert torch.equal(together, torch.cat([half.unflatten(0, (4, 4)) for half in halves], 1))
    assert not torch.equal(
        dataset(Spotted(), seed=1, guided=0.5, batch=8)[0].local_crops, whole[0].local_crops
    )


def test_the_mark_is_that_of_the_image_that_takes_the_place_of_an_unreadable_one(tmp_path):
    rows = ["file,x0,y0,x1,y1"]
    for number, column in enumerate((5, 25, 45)):
        pixels = np.zeros((50, 50), np.uint8)
        pixels[24:27, column - 1 : column + 2] = 255
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        rows.append(f"{number}.png,{column},25,{column + 1},26")
    (tmp_path / "1.png").write_bytes(b"no image")
    (tmp_path / "marks.csv").write_text("\n".join(rows))
    data = open_data(f"folder:{tmp_path}?marks=marks.csv")
    batch = dataset(data, batch=3, guided=1.0)[0]
    assert len(batch.bad) == 1 and 1 not in batch.images and shows_spot(batch.local_crops).all()


# ----------------------------------------------------------------- geometry


def test_steered_crops_contain_their_points_inside_the_image_and_keep_their_sizes():
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 90, (3000, 2))
    extent = rng.integers(1, sizes + 1)
    boxes = np.concatenate([rng.integers(0, sizes - extent + 1), extent], 1)
    points = rng.random((3000, 2)) * sizes
    points[::3] = np.nan
    moved = move_to_points(boxes, points, rng.random((3000, 2)), sizes)
    low, high = moved[:, :2], moved[:, :2] + moved[:, 2:]
    aimed = ~np.isnan(points[:, 0])
    assert (low >= 0).all() and (high <= sizes).all() and np.array_equal(moved[:, 2:], extent)
    assert (low <= points)[aimed].all() and (points < high)[aimed].all()
    assert np.array_equal(moved[~aimed], boxes[~aimed]) and aimed.sum() == 2000


def test_a_point_lies_in_the_middle_half_of_its_crop_and_not_always_in_the_centre():
    boxes, sizes = np.tile([0, 0, 40, 20], (500, 1)), np.tile([400, 400], (500, 1))
    u = np.random.default_rng(1).random((500, 2))
    moved = move_to_points(boxes, np.full((500, 2), 200.0), u, sizes)
    places = (200 - moved[:, :2]) / moved[:, 2:]
    assert (
        places.min() > 0.22 and places.max() < 0.78 and (places.std(0) > 0.1).all()
    )  # uniform: 0.144


def test_points_are_uniform_in_boxes_of_equal_chance_or_over_the_mask():
    u = np.random.default_rng(2).random((4000, 3))
    boxes = np.array([[0, 0, 1, 1], [10, 20, 110, 30]], np.float32)
    points = marked_points({"boxes": boxes, "mask": np.ones((2, 2))}, u)
    large = points[:, 0] > 5
    assert abs(large.mean() - 0.5) < 0.03 and (points[~large] <= 1).all()
    assert points[large].min(0) == pytest.approx([20, 10], abs=1) and points[large].max(
        0
    ) == pytest.approx([30, 110], abs=1)
    mask = np.zeros((6, 9), np.uint8)
    mask[2, 3:5], mask[5, 8], mask[0, 0] = 1, 7, 255  # 255: unknown
    rows, columns = np.floor(marked_points({"mask": mask}, u)).astype(int).T
    assert {(2, 3), (2, 4), (5, 8)} == set(
        zip(rows.tolist(), columns.tolist(), strict=True)
    ) and abs((rows == 2).mean() - 2 / 3) < 0.04
    for nothing in ({}, {"boxes": np.zeros((0, 4))}, {"mask": np.zeros((4, 4), np.uint8)}):
        assert np.isnan(marked_points(nothing, u)).all()


# ----------------------------------------------------------------- where marks come from


def test_a_csv_file_marks_some_files_of_a_folder_or_a_list(images, tmp_path):
    (tmp_path / "m.csv").write_text(
        "file,x0,y0,x1,y1\n3.png,1,2,10.5,20\n3.png,0,0,4,4\n7.png,5,5,9,9\n"
    )
    (images / "list.txt").write_text("7.png\n1.png\n")
    data = open_data(f"folder:{images}?marks={tmp_path / 'm.csv'}")
    boxes = {
        data.name(index).rpartition("/")[2]: data.annotations(index).get("boxes")
        for index in range(12)
    }
    assert boxes.pop("3.png").tolist() == [[1, 2, 10.5, 20], [0, 0, 4, 4]]
    assert boxes.pop("7.png").tolist() == [[5, 5, 9, 9]]
    assert set(boxes.values()) == {None}
    listed = open_data(f"list:{images / 'list.txt'}?marks={tmp_path / 'm.csv'}")
    assert listed.annotations(0)["boxes"].tolist() == [[5, 5, 9, 9]] and not listed.annotations(1)


def test_a_csv_file_may_name_masks(images, tmp_path):
    mask = np.zeros((50, 97), np.uint8)
    mask[3:9, 4:6] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    (tmp_path / "m.csv").write_text("file,mask\n1.png,mask.png\n")
    data = open_data(f"folder:{images}?marks={tmp_path / 'm.csv'}")
    notes = {data.name(index).rpartition("/")[2]: data.annotations(index) for index in range(12)}
    assert np.array_equal(notes["1.png"]["mask"], mask) and not notes["2.png"]


@pytest.mark.parametrize(
    "text, words",
    [
        ("file,x0,y0,x1,y1\n1.png,9,2,4,20\n", "x0 < x1"),
        ("file,x0,y0,x1\n1.png,1,2,4\n", "marks nothing"),
        ("file,x0,y0,x1,y1\n1.png,a,2,4,20\n", "marks nothing"),
        ("file,x0,y0,x1,y1\nother.png,1,2,4,20\n", "marks no image"),
        ("name,x0,y0,x1,y1\n1.png,1,2,4,20\n", "no column 'file'"),
    ],
)
def test_a_csv_file_that_marks_nothing_is_one_sentence(text, words, images, tmp_path):
    (tmp_path / "m.csv").write_text(text)
    with pytest.raises(ValueError, match=words):
        open_data(f"folder:{images}?marks={tmp_path / 'm.csv'}")


def test_guidance_without_any_marks_is_refused(tiny, images):
    with pytest.raises(ValueError, match="neither boxes nor masks"):
        train.main([*tiny[:-1], f"data.train={images}", "crops.guided=0.5", tiny[-1]])


def write_marks(folder, images, kind: str) -> str:
    """DATA of images of which some or none are marked; returns the spec."""
    rows = {
        "two boxes": "file,x0,y0,x1,y1\n3.png,1,2,10.5,20\n7.png,5,5,9,9\n",
        "one mask, one empty": "file,mask\n3.png,full.png\n7.png,empty.png\n",
        "every box": "file,x0,y0,x1,y1\n" + "".join(f"{k}.png,1,1,5,5\n" for k in range(12)),
    }
    if kind == "half of a mixture":
        (folder / "mix.yaml").write_text(f"[{{data: {images}}}, {{data: 'scenes?size=12'}}]")
        return f"mix:{folder / 'mix.yaml'}"
    if kind not in rows:
        return str(images)
    for name, file, value in (("full", "3.png", 1), ("empty", "7.png", 0)):
        Image.new("L", Image.open(images / file).size, value).save(folder / f"{name}.png")
    (folder / "m.csv").write_text(rows[kind])
    return f"{images}?marks={folder / 'm.csv'}"


UNMARKED = (
    "crops.guided: {} images looked at have no boxes and no masks; their crops are not guided"
)


@pytest.mark.parametrize(
    "kind, unmarked",
    [
        ("two boxes", "10 of 12"),
        ("one mask, one empty", "11 of 12"),
        ("every box", None),
        ("half of a mixture", "12 of 24"),
    ],
)
def test_training_says_once_how_many_images_guide_no_crop(
    kind, unmarked, tiny, images, tmp_path, capsys
):
    keys = [f"data.train={write_marks(tmp_path, images, kind)}", "crops.guided=0.5"]
    train.main([*tiny[:-1], *keys, tiny[-1]])
    said = capsys.readouterr().err
    assert said.count("crops.guided") == (unmarked is not None)
    assert unmarked is None or UNMARKED.format(unmarked) in said


@pytest.mark.parametrize(
    "kind, unmarked", [("none", "12 of 12"), ("two boxes", "10 of 12"), ("every box", None)]
)
def test_pictures_of_guided_crops_say_once_how_many_images_guide_none(
    kind, unmarked, images, tmp_path, capsys
):
    arguments = [
        "--images",
        write_marks(tmp_path, images, kind),
        "--output",
        f"{tmp_path / 'c.png'}",
    ]
    small = ["crops.global_size=16", "crops.local_size=16", "crops.local_count=1"]
    visualize.main(["crops", *arguments, "--count", "12", *small, "crops.guided=1"])
    said = capsys.readouterr().err
    assert said.count("crops.guided") == (unmarked is not None)
    assert unmarked is None or UNMARKED.format(unmarked) in said


# ----------------------------------------------------------------- in a run


def test_a_guided_run_learns_from_other_crops_and_goes_on_exactly(tiny, tmp_path):
    guided = [*tiny[:-1], "crops.guided=0.7", "crops.guided_share=0.5"]
    train.main(tiny)
    train.main([*guided, f"output_dir={tmp_path / 'guided'}", "data.workers=1"])
    whole = losses(tmp_path / "guided")
    assert whole[0] != losses(folder_of(tiny))[0]
    (tmp_path / "guided" / "checkpoints" / "latest").write_text(
        "2"
    )  # as a kill after step 2 leaves it
    train.main([*guided, f"output_dir={tmp_path / 'guided'}"])
    assert losses(tmp_path / "guided") == whole


def test_guidance_is_off_unless_asked_for():
    assert views_from(crops_config(), [0.0], [1.0], 8)[0].guidance is None
    assert views_from(crops_config(guided=0.3, guided_share=0.1), [0.0], [1.0], 8)[
        0
    ].guidance == Guidance(0.3, False, 0.1)
