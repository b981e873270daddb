"""Ranking against loops over images, whitening, and retrieval and copy detection end to end."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import eval_knn
from data.corruptions import Copies
from data.evaluation import EvalDataset
from data.sources.specs import open_data
from evals.knn import average_precision, retrieval_map, whitening

MODEL = "pixels?patch_size=8&image_size=32"
DATA = ["--train", "scenes?size=60", "--val", "scenes?split=val&size=20"]


def precision_by_loops(similarity, relevant, ignored):
    order = sorted(
        (k for k in range(len(similarity)) if not ignored[k]), key=lambda k: -similarity[k]
    )
    wanted = sum(relevant[k] for k in order)
    found, area = 0, 0.0
    for rank, k in enumerate(order):
        if relevant[k]:
            before = found / rank if rank else 1.0
            found += 1
            area += (before + found / (rank + 1)) / 2 / wanted
    return area if wanted else math.nan


def ranking(queries=9, size=30):
    generator = torch.Generator().manual_seed(0)
    similarity = torch.rand(queries, size, generator=generator)
    relevant, ignored = (torch.rand(queries, size, generator=generator) < 0.3 for _ in range(2))
    relevant[4] = False
    return similarity, relevant, ignored


def test_average_precision_equals_a_loop_over_the_ranking():
    similarity, relevant, ignored = ranking()
    for drop in (ignored, torch.zeros_like(ignored)):
        expected = [
            precision_by_loops(*(column.tolist() for column in row))
            for row in zip(similarity, relevant, drop, strict=True)
        ]
        found = average_precision(similarity, relevant, drop)
        torch.testing.assert_close(found, torch.tensor(expected, dtype=found.dtype), equal_nan=True)
        assert found[4].isnan()


def test_average_precision_by_hand():
    similarity = torch.tensor([[0.9, 0.8, 0.7]])
    # One relevant image at rank 1: precision 0 before it, 1/2 with it.
    assert average_precision(
        similarity, torch.tensor([[False, True, False]])
    ).item() == pytest.approx(0.25)
    assert average_precision(similarity, torch.tensor([[True, True, False]])).item() == 1


def test_the_mean_is_over_queries_with_something_to_find_whatever_the_chunks():
    similarity, relevant, ignored = ranking()
    queries, database = similarity, torch.eye(30)  # the product is the similarity

    def judge(rows):
        return relevant[rows.start : rows.stop], ignored[rows.start : rows.stop]

    scores = average_precision(similarity, relevant, ignored)
    for cells in (1, 70, 1 << 20):
        found = retrieval_map(queries, database, judge, cells=cells)
        assert found == {"map": pytest.approx(float(scores[~scores.isnan()].mean())), "queries": 8}
    assert retrieval_map(queries[4:5], database, lambda rows: (relevant[4:5], ignored[4:5])) == {
        "map": 0.0,
        "queries": 0,
    }


def test_whitening_makes_features_uncorrelated_and_keeps_out_what_does_not_vary():
    generator = torch.Generator().manual_seed(0)
    features = (
        torch.randn(500, 4, generator=generator) @ torch.randn(4, 6, generator=generator) + 5
    )  # rank 4
    white = whitening(features)(features)
    assert white.shape == (500, 4)
    torch.testing.assert_close(white.norm(dim=1), torch.ones(500))
    centred = (features - features.mean(0)).double()
    values, axes = torch.linalg.eigh(centred.T @ centred / 500)
    naive = F.normalize(centred @ axes[:, 2:] / values[2:].sqrt(), dim=1)
    torch.testing.assert_close(
        (white @ white.T).double(), naive @ naive.T, atol=1e-4, rtol=0
    )  # same up to turns


# ----------------------------------------------------------------- the script


def run(capsys, *arguments, data=DATA) -> dict:
    eval_knn.main(["--model", MODEL, "--device", "cpu", *data, *arguments])
    return json.loads(capsys.readouterr().out)


def map_of_pixels(train: str, val: str, itself: bool) -> float:
    """By loops; `itself`: image k of val is image k of train, and not to be found."""
    sides = [EvalDataset(open_data(spec), 32, (32, 32), (0.0,), (1.0,)) for spec in (train, val)]
    pixels = [
        [F.normalize(item[0].flatten(), dim=0) for item in map(side.__getitem__, range(len(side)))]
        for side in sides
    ]
    labels = sides[0].data.labels
    scores = []
    for number, (query, truth) in enumerate(zip(pixels[1], sides[1].data.labels, strict=True)):
        ignored = [itself and k == number for k in range(len(labels))]
        scores.append(
            precision_by_loops(
                [float(query @ d) for d in pixels[0]], [k == truth for k in labels], ignored
            )
        )
    return pytest.approx(np.nanmean(scores), abs=1e-5)


def test_retrieval_by_class_equals_loops_over_pixels(capsys):
    result = run(capsys, "--retrieval")
    assert result["task"] == "knn" and "top1" in result
    assert result["retrieval"] == {"map": map_of_pixels(*DATA[1::2], itself=False), "queries": 20}


def test_an_image_is_not_looked_for_in_itself(capsys):
    spec = "scenes?size=40"
    result = run(capsys, "--retrieval", "--k", "1", data=["--train", spec, "--val", spec])
    assert result["retrieval"]["map"] == map_of_pixels(spec, spec, itself=True)
    assert result["retrieval"]["map"] != map_of_pixels(spec, spec, itself=False)
    assert result["top1"] == 1  # k-NN is as before


def test_without_the_new_flags_the_result_is_as_before(capsys):
    assert run(capsys, "--k", "5").keys() == {
        "task",
        "model",
        "k",
        "top1",
        "n_train",
        "n_val",
        "left_out",
        "unreadable",
        "seconds",
    }


def test_perfect_and_blind_features_bound_copy_detection(capsys, monkeypatch):
    edited = run(capsys, "--copies", "--k", "5")["copies"]
    assert edited["database"] == 80 and edited["queries"] == 20
    assert edited["top1"] <= edited["map"] < 1
    monkeypatch.setattr(eval_knn, "Copies", lambda items: items)  # a copy that is the original
    assert run(capsys, "--copies")["copies"] == {"map": 1, "queries": 20, "top1": 1, "database": 80}
    blind = torch.Generator().manual_seed(0)

    def noise(backbone, images):
        return F.normalize(torch.randn(len(images), 16, generator=blind), dim=1)

    monkeypatch.setattr(eval_knn, "copy_features", noise)
    assert run(capsys, "--copies")["copies"]["map"] < 0.2


def test_copies_are_edited_and_the_same_on_every_call():
    items = EvalDataset(open_data("scenes?size=3"), 32, (32, 32), (0.5,), (0.25,))
    copies = Copies(items)
    assert len(copies) == 3 and torch.equal(copies[1][0], copies[1][0])
    assert copies[2][1:] == items[2][1:]
    for (copy, _, _), (image, _, _) in zip(
        map(copies.__getitem__, range(3)), map(items.__getitem__, range(3)), strict=True
    ):
        assert copy.shape == image.shape and (copy - image).abs().mean() > 0.1


def test_copies_and_whitening_need_no_labels(capsys, images):
    data = ["--train", str(images), "--val", str(images)]
    result = run(capsys, "--copies", "--whiten", str(images), data=data)
    assert result["task"] == "retrieval" and result["copies"]["queries"] == 12
    assert "top1" not in result
    with pytest.raises(ValueError, match="has no labels"):
        run(capsys, "--retrieval", data=data)


def test_several_scales_are_averaged(capsys):
    flags = ["--k", "1", "--retrieval"]
    alone, several = (run(capsys, *flags, *scales) for scales in ([], ["--scales", "1", "0.5"]))
    assert alone["retrieval"]["map"] != several["retrieval"]["map"]


@pytest.fixture
def landmarks(tmp_path):
    """A flat folder of 12 images as database, two queries, and what each should find."""
    rng = np.random.default_rng(0)
    for part, count in (("queries", 2), ("base", 12)):
        (tmp_path / part).mkdir()
        for k in range(count):
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(
                tmp_path / part / f"{part}{k}.png"
            )
    entries = [
        {"easy": ["base0", "base1.png"], "hard": ["base2"], "junk": ["base3", "base4"]},
        {"easy": ["base5"], "junk": []},
    ]
    truth = tmp_path / "truth.json"
    truth.write_text(json.dumps({f"queries{k}": entry for k, entry in enumerate(entries)}))
    return tmp_path, truth


def test_landmarks_are_ranked_as_their_ground_truth_says(capsys, landmarks):
    folder, truth = landmarks
    data = ["--train", str(folder / "base"), "--val", str(folder / "queries")]
    found = run(capsys, "--retrieval", "--truth", str(truth), data=data)["retrieval"]

    base, queries = (open_data(str(folder / part)) for part in ("base", "queries"))
    number = {base.name(k).split("base")[-1].split(".")[0]: k for k in range(12)}
    pixels = [
        [F.normalize(data.image(k).float().flatten() / 255, dim=0) for k in range(len(data))]
        for data in (base, queries)
    ]
    similarity = [[float(q @ d) for d in pixels[0]] for q in pixels[1]]

    def precision(query, relevant, ignored):
        masks = (
            [k in {number[n] for n in names} for k in range(12)] for names in (relevant, ignored)
        )
        return precision_by_loops(similarity[query], *masks)

    medium = [precision(0, "012", "34"), precision(1, "5", "")]
    assert found["medium"] == {"map": pytest.approx(sum(medium) / 2, abs=1e-5), "queries": 2}
    assert found["hard"] == {
        "map": pytest.approx(precision(0, "2", "0134"), abs=1e-5),
        "queries": 1,
    }


@pytest.mark.parametrize(
    "text, words",
    [
        ("[1]", "easy"),
        ('{"queries0": {"easy": ["base99"]}}', "base99"),
        ('{"other": {"easy": []}}', "no query"),
    ],
)
def test_a_ground_truth_that_fits_nothing_is_refused(capsys, landmarks, text, words):
    folder, truth = landmarks
    truth.write_text(text)
    data = ["--train", str(folder / "base"), "--val", str(folder / "queries")]
    with pytest.raises(ValueError, match=words):
        run(capsys, "--retrieval", "--truth", str(truth), data=data)


@pytest.mark.parametrize(
    "flags, words", [(["--truth", "x.json"], "--retrieval"), (["--scales", "0"], "--scales")]
)
def test_flags_that_do_nothing_are_refused(capsys, flags, words):
    with pytest.raises(ValueError, match=words):
        run(capsys, *flags)
