"""Duplicates, balance and retrieval on rows whose answer is known."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from errors import UserError
from evals.curation import (
    balanced,
    cap,
    default_levels,
    entropy,
    find_duplicates,
    hierarchy,
    join,
    k_means,
    nearest,
    thumbnails,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ----------------------------------------------------------------- near duplicates


def test_groups_are_those_of_a_search_through_all_pairs_for_any_block():
    rows = torch.randn(120, 6, generator=generator())
    cosines = F.normalize(rows, dim=1) @ F.normalize(rows, dim=1).T
    groups = [{i} for i in range(120)]
    for a, b in (cosines >= 0.8).triu(1).nonzero().tolist():
        merged = groups[a] | groups[b]
        for member in merged:
            groups[member] = merged
    wanted = [min(group) for group in groups]
    assert 20 < len(set(wanted)) < 110
    for block in (7, 50, 4096):
        found = find_duplicates(rows, 0.8, block=block)
        assert found.roots.tolist() == wanted
        assert found.curve[0.8] == (cosines >= 0.8).triu(1).sum()


def test_the_examples_are_near_the_threshold_on_both_sides_and_show_no_row_twice():
    rows = torch.randn(200, 6, generator=generator())
    found = find_duplicates(rows, 0.8, examples=10, block=64)
    unit = F.normalize(rows, dim=1)
    every = (unit @ unit.T).triu(1)
    near = ((every > 0.79) & (every < 0.81)).sum()
    assert 10 < near < 200 and (abs(found.similarities - 0.8) < 0.01).all()
    assert (found.similarities < 0.8).sum() == 5 == (found.similarities >= 0.8).sum()
    assert len(set(found.pairs.flatten().tolist())) == 20
    a, b = torch.from_numpy(found.pairs).T
    assert np.allclose((unit[a] * unit[b]).sum(1).numpy(), found.similarities, atol=1e-6)


def test_rows_alike_are_no_duplicates_where_the_layout_differs():
    images = torch.rand(3, 3, 32, 32, generator=generator())
    images = torch.stack([images[0], images[0] * 0.5 + 0.2, images[1], *torch.ones(2, 3, 32, 32)])
    thumbs, rows = thumbnails(images), torch.ones(5, 4)
    found = find_duplicates(rows, 0.9, thumbs=thumbs, layout=0.8)
    assert found.roots.tolist() == [0, 0, 2, 3, 3]
    assert find_duplicates(rows, 0.9).roots.tolist() == [0] * 5


def test_a_chain_of_pairs_is_one_group():
    roots = np.arange(1000)
    order = np.random.default_rng(0).permutation(999)
    join(roots, order, order + 1)
    assert (roots == 0).all()


def test_rows_that_are_not_finite_are_refused_by_number():
    rows = torch.randn(5, 3)
    rows[3, 1] = torch.nan
    with pytest.raises(UserError, match="row 3"):
        find_duplicates(rows, 0.9)


def test_the_nearest_are_those_of_a_full_sort_for_any_block():
    pool, queries = (torch.randn(n, 8, generator=generator(n)) for n in (90, 20))
    cosines = F.normalize(queries, dim=1) @ F.normalize(pool, dim=1).T
    for block in (11, 4096):
        values, rows = nearest(queries, pool, 4, block=block)
        assert torch.equal(rows, cosines.argsort(1, descending=True)[:, :4])
        assert torch.allclose(values, cosines.gather(1, rows), atol=1e-6)
    assert nearest(queries, pool[:2], 4)[1].shape == (20, 2)


# ----------------------------------------------------------------- balance


def test_shares_are_capped_as_published():
    rng = np.random.default_rng(0)
    assert cap([20000, 200, 1000, 500, 8000], 1000, rng).tolist() == [200] * 5
    assert cap([10, 3, 1, 7], 12, rng).tolist() == [4, 3, 1, 4]
    assert cap([10, 3, 1, 7], 11, rng).tolist() in ([4, 3, 1, 3], [3, 3, 1, 4])
    assert cap([2, 3], 9, rng).tolist() == [2, 3]
    for _ in range(50):
        sizes = rng.integers(0, 40, 12)
        target = int(rng.integers(0, sizes.sum() + 1))
        quotas = cap(sizes, target, rng)
        unsaturated = quotas[quotas < sizes]
        assert quotas.sum() == target and (quotas <= sizes).all()
        assert not len(unsaturated) or np.ptp(unsaturated) <= 1


def test_k_means_finds_separate_blobs_and_the_same_for_the_same_seed():
    centres = 20 * torch.randn(8, 4, generator=generator())
    points = centres.repeat(30, 1) + torch.randn(240, 4, generator=generator(1))
    _, own = k_means(points, 8, generator(2))
    assert torch.equal(own, k_means(points, 8, generator(2))[1])
    groups = own.view(30, 8)
    assert (groups == groups[0]).all() and len(set(groups[0].tolist())) == 8
    assert k_means(points[:3], 8, generator())[1].unique().numel() == 3
    assert k_means(torch.ones(9, 4), 3, generator())[0].isfinite().all()


def mixture(count: int, modes: int) -> tuple[torch.Tensor, np.ndarray]:
    """Gaussians whose sizes fall as a power of their number (Zipf, 1.5)."""
    rng = np.random.default_rng(0)
    shares = np.arange(1, modes + 1) ** -1.5
    concept = rng.choice(modes, count, p=shares / shares.sum())
    centres = rng.normal(size=(modes, 32)) * 3
    points = centres[concept] + rng.normal(size=(count, 32))
    return torch.from_numpy(points).float(), concept


def test_two_levels_flatten_what_chance_and_one_level_leave_uneven():
    points, concept = mixture(20_000, 50)

    def evenness(rows) -> float:
        shares = np.bincount(concept[rows], minlength=50) / len(rows)
        shares = shares[shares > 0]
        return float(-(shares * np.log(shares)).sum() / np.log(50))

    rng = np.random.default_rng(0)
    at_random = evenness(rng.choice(20_000, 1000, replace=False))
    one = evenness(balanced(hierarchy(points, [500], generator()), 1000, rng))
    two = balanced(hierarchy(points, [500, 50], generator(), rounds=2), 1000, rng)
    assert at_random < 0.65 and one < 0.8 and evenness(two) > 0.95
    assert len(set(two.tolist())) == 1000


def test_all_are_taken_where_the_target_is_larger():
    levels = [np.arange(40) % 7, np.arange(40) % 7 % 3]
    assert balanced(levels, 99, np.random.default_rng(0)).tolist() == list(range(40))


def test_levels_fit_the_pool():
    assert default_levels(100) == [3] and default_levels(10) == [1]
    assert default_levels(30_000) == [1000, 100]


def test_entropy_is_one_for_equal_sizes():
    assert entropy(np.arange(60) % 6) == pytest.approx(1)
    assert entropy(np.array([0] * 95 + [1, 2, 3, 4, 5])) < 0.3
