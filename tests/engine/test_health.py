"""engine.health: what is measured, which runs are called collapsing and why, and which are not."""

import math

import pytest
import torch

import train
from data.images import ImageData
from data.sources.specs import open_data
from engine.cli import RunFailed
from engine.health import CollapseWatch, health, patch_similarity, same_pictures, view_match
from engine.logger import read_metrics


def test_the_measures_equal_naive_ones():
    generator = torch.Generator().manual_seed(0)
    probs = torch.rand(2, 6, 5, generator=generator).softmax(-1)
    features = torch.randn(2, 6, 4, generator=generator)
    patches = torch.randn(12, 9, 4, generator=generator)
    values = {
        name.removeprefix("health/"): float(value)
        for name, value in health(probs, features, patches).items()
    }
    rows = probs.reshape(12, 5).double()
    mean = rows.mean(dim=0)
    divergence = sum((row * (row / mean).log()).sum() for row in rows) / 12
    assert values["teacher_kl"] == pytest.approx(float(divergence), rel=1e-4)
    assert values["top_share"] == pytest.approx(float(mean.max()))
    unit = features / features.norm(dim=-1, keepdim=True)
    wins = [
        float(unit[0, i] @ unit[1, i] > unit[0, i] @ unit[1, j])
        for i in range(6)
        for j in range(6)
        if i != j
    ]
    assert values["view_match"] == pytest.approx(sum(wins) / 30)
    cosines = [
        torch.cosine_similarity(image[i], image[j], dim=0)
        for image in patches
        for i in range(9)
        for j in range(9)
        if i != j
    ]
    assert values["patch_similarity"] == pytest.approx(float(sum(cosines)) / len(cosines), abs=1e-5)


def test_views_of_an_image_match_when_they_are_equal_and_by_chance_when_all_images_are():
    unit = torch.eye(4)
    assert (
        view_match(unit, unit) == 1
        and view_match(unit[:1].expand(4, 4), unit[:1].expand(4, 4)) == 0.5
    )
    assert patch_similarity(torch.ones(2, 3, 4)) == pytest.approx(1)
    assert "health/view_match" not in health(torch.full((3, 4), 0.25), unit[:3])  # one view


ALIVE = {
    "health/teacher_kl": 0.1,
    "health/top_share": 0.05,
    "health/teacher_entropy": 0.97,
    "health/feature_std": 0.2,
}
SIGNS = {
    "one prototype takes 93%": {
        "health/top_share": 0.93,
        "health/teacher_kl": 0.0,
        "health/teacher_entropy": 0.05,
    },
    "the targets are uniform": {"health/teacher_kl": 2e-4, "health/teacher_entropy": 0.998},
    "the targets are the same for every image": {
        "health/teacher_kl": 2e-4,
        "health/teacher_entropy": 0.4,
    },
    "the features of all images are alike": {"health/feature_std": 0.002},
}


@pytest.mark.parametrize("words", SIGNS)
def test_collapse_that_lasts_is_said_once_with_its_first_step_and_what_to_try(words):
    watch = CollapseWatch("warn")
    said = [watch.look(step, ALIVE) for step in range(0, 410, 10)]
    said += [watch.look(step, ALIVE | SIGNS[words]) for step in range(410, 800, 10)]
    sentences = [(number * 10, text) for number, text in enumerate(said) if text]
    assert len(sentences) == 1
    step, text = sentences[0]
    assert (
        step == 490
        and words in text
        and "since step 410" in text
        and "usual causes" in text
        and "; try " in text
    )


def test_what_passes_says_nothing():
    watch = CollapseWatch("stop")
    for step in range(0, 1000, 10):  # moments of one prototype under a moving centre
        bad = SIGNS["one prototype takes 93%"] if step % 100 < 70 else {}
        assert watch.look(step, ALIVE | bad) is None
    nan = dict.fromkeys(ALIVE, math.nan)
    assert all(watch.look(step, nan) is None for step in range(1000, 2000, 10))
    assert all(watch.look(step, {"probe/knn": 0.5}) is None for step in range(2000, 3000, 10))


def test_looks_far_apart_need_to_be_four():
    watch = CollapseWatch("warn")
    said = [
        watch.look(step, ALIVE | SIGNS["the targets are uniform"]) for step in (100, 200, 300, 400)
    ]
    assert said[:3] == [None] * 3 and "since step 100" in said[3]


def test_stop_ends_the_run_with_the_same_sentence():
    watch = CollapseWatch("stop")
    with pytest.raises(RunFailed, match="the targets are uniform .* since step 0"):
        for step in range(0, 200, 10):
            watch.look(step, ALIVE | SIGNS["the targets are uniform"])


class Pictures(ImageData):
    def __init__(self, pictures):
        self.pictures = pictures

    def __len__(self):
        return len(self.pictures)

    def image(self, index):
        if self.pictures[index] is None:
            raise OSError("truncated")
        return self.pictures[index]


def test_a_data_set_of_one_picture_is_named_before_the_first_step():
    picture = torch.randint(
        0, 256, (3, 40, 50), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    other = torch.randint(
        0, 256, (3, 33, 33), generator=torch.Generator().manual_seed(1), dtype=torch.uint8
    )
    again = (
        (picture.float() + 0.4 * torch.randn(picture.shape)).clamp(0, 255).round().to(torch.uint8)
    )  # as re-encoded
    said = CollapseWatch("warn").look_at(Pictures([picture, again] * 50))
    assert "32 of 32 images looked at are the same picture" in said and "data.train" in said
    assert "holds one image" in CollapseWatch("warn").look_at(Pictures([picture]))
    assert same_pictures(Pictures([picture, None, other, picture])) == (3, pytest.approx(2 / 3))
    assert same_pictures(Pictures([None])) == (0, 0.0)
    with pytest.raises(RunFailed, match="same picture"):
        CollapseWatch("stop").look_at(Pictures([picture] * 10))


def test_different_pictures_of_the_same_kind_are_told_apart():
    dark = [
        torch.poisson(torch.full((1, 64, 64), 20.0), generator=torch.Generator().manual_seed(n))
        for n in range(40)
    ]
    for images in (open_data("scenes?size=40"), Pictures(dark)):
        assert CollapseWatch("stop").look_at(images) is None
        assert same_pictures(images)[1] <= 0.1


# ----------------------------------------------------------------- of whole runs

LENGTH = ["total_steps=200", "log_every=10", "checkpoint.every=1000"]
NO_CENTRING = ["loss.dino.centering=none", "loss.ibot.centering=none", *LENGTH]
FORCED = {
    "the targets are uniform": ["schedule.teacher_temp=0.5"],
    "one prototype takes": ["schedule.teacher_temp=0.02"],
    "one prototype takes 100%": ["loss.dino.prototypes=1", "schedule.teacher_temp=0.05"],
}


def alarms(run) -> list[str]:
    """What the watch says of a run that has been."""
    watch = CollapseWatch("warn")
    return [
        said
        for record in read_metrics(run / "metrics.jsonl")
        if (said := watch.look(record["step"], record))
    ]


@pytest.mark.slow
@pytest.mark.parametrize("words", FORCED)
def test_a_forced_collapse_is_named_within_two_hundred_steps(words, tiny, tmp_path):
    train.main([*tiny, *NO_CENTRING, *FORCED[words]])
    said = alarms(tmp_path / "run")
    assert len(said) == 1 and words in said[0]


@pytest.mark.slow
@pytest.mark.parametrize("centring", ["sinkhorn", "ema"])
def test_small_runs_that_live_raise_no_alarm(centring, tiny, tmp_path):
    train.main(
        [*tiny, *LENGTH, f"loss.dino.centering={centring}", f"loss.ibot.centering={centring}"]
    )
    assert alarms(tmp_path / "run") == []
