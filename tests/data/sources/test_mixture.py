"""Mixtures of sources: proportions, order, and every step found on its own."""

import numpy as np
import pytest
import torch

from data.augment import POLICIES, CropSpec, MultiCrop
from data.loader import Views, make_loader
from data.sources.specs import open_data


@pytest.fixture
def mixture(tmp_path):
    (tmp_path / "mix.yaml").write_text(
        "- {data: 'scenes?size=30&resolution=32', weight: 3}\n"
        "- {data: 'scenes?size=7&resolution=32&split=val', weight: 1}\n"
        "- {data: 'scenes?size=11&resolution=32&seed=1', weight: 0, alone: 0.1}\n"
    )
    return open_data(f"mix:{tmp_path / 'mix.yaml'}")


def source_of(index: np.ndarray) -> np.ndarray:
    return np.searchsorted([30, 37], index, "right")


def test_a_mixture_is_its_sources_in_a_row(mixture):
    assert len(mixture) == 48 and len(mixture.labels) == 48
    val = open_data("scenes?size=7&resolution=32&split=val")
    assert torch.equal(mixture.image(32), val.image(2)) and mixture.name(32) == val.name(2)
    assert mixture.classes[mixture.labels[32]] == val.classes[val.labels[2]]
    assert mixture.annotations(32).keys() == val.annotations(2).keys()


def test_weights_and_steps_alone_are_met(mixture):
    sources = [source_of(mixture.step_indices(step, 8, seed=0)) for step in range(10_000)]
    alone = [set(row) == {2} for row in sources]
    assert sum(alone) == 1000 and not any(
        2 in row for row, only in zip(sources, alone, strict=True) if not only
    )
    mixed = np.concatenate([row for row, only in zip(sources, alone, strict=True) if not only])
    assert abs((mixed == 0).mean() - 0.75) < 0.001


def test_a_source_shows_all_its_images_before_one_again(mixture):
    shown = np.concatenate([mixture.step_indices(step, 8, seed=3) for step in range(300)])
    for source, length in enumerate((30, 7, 11)):
        row = shown[source_of(shown) == source]
        epochs = [
            tuple(row[start : start + length]) for start in range(0, len(row) - length, length)
        ]
        assert (
            len(epochs) > 3
            and all(len(set(epoch)) == length for epoch in epochs)
            and len(set(epochs)) > 1
        )


def test_a_mixture_is_a_function_of_step_and_seed(mixture, tmp_path):
    fresh = open_data(f"mix:{tmp_path / 'mix.yaml'}")
    whole = [
        mixture.step_indices(step, 8, seed=1).tolist() for step in range(2600)
    ]  # past a period of places
    for step in (2599, 3, 1250, 0):
        assert fresh.step_indices(step, 8, seed=1).tolist() == whole[step]
    assert fresh.step_indices(0, 8, seed=2).tolist() != whole[0]


def test_larger_batches_from_a_stage_on_go_on_in_the_stream(tmp_path):
    (tmp_path / "mix.yaml").write_text(
        "- data: 'scenes?size=30'\n- data: 'scenes?size=7'\n  weight: 0.5\n"
    )
    data = open_data(str(tmp_path / "mix.yaml"))
    before = [data.step_indices(step, 8, seed=1) for step in (100, 101)]
    assert (
        np.concatenate(before).tolist() == data.step_indices(100, 16, seed=1, shift=-800).tolist()
    )


def test_a_mixture_feeds_the_loader(mixture):
    crops = MultiCrop(
        CropSpec((16, 16), (0.4, 1.0), 1), None, POLICIES["natural"], (0.5,) * 3, (0.25,) * 3
    )
    batches = list(make_loader(mixture, [Views(crops)], stop_step=3, batch_size=4, seed=0))
    assert all(batch.global_crops.shape == (4, 3, 16, 16) for batch in batches)
