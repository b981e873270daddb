"""Sinkhorn-Knopp and the moving centre: by hand, against the plain algorithm, and on two ranks."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from losses.centering import Centering, sinkhorn_knopp

TARGETS = {
    "sinkhorn": lambda x: sinkhorn_knopp(x, 0.1),
    "ema": lambda x: Centering(5, "ema")(x, 0.1),
    "none": lambda x: Centering(5, "none")(x, 0.1),
}


def wave(shape, offset):
    """Element n is sin(n + offset): the input of the golden numbers, which the DINOv3 code gave."""
    n = torch.arange(math.prod(shape), dtype=torch.float64)
    return torch.sin(n + offset).float().view(shape)


def noise(*shape, seed=0, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Ranks:
    """Runs a function on several ranks, one thread each, with reductions that meet at a barrier."""

    def __init__(self, world):
        self.barrier = threading.Barrier(world, timeout=10)
        self.slots = [None] * world

    def reducer(self, rank, operation):
        def reduce(tensor):
            self.slots[rank] = tensor.clone()
            self.barrier.wait()
            reduced = operation(torch.stack(self.slots))
            self.barrier.wait()
            return reduced

        return reduce

    def run(self, function, shards):
        def one(rank):
            all_reduce_sum = self.reducer(rank, lambda x: x.sum(dim=0))
            all_reduce_max = self.reducer(rank, lambda x: x.amax(dim=0))
            return function(shards[rank], all_reduce_sum, all_reduce_max)

        with ThreadPoolExecutor(len(shards)) as pool:
            return list(pool.map(one, range(len(shards))))


def test_golden_numbers_of_sinkhorn():
    """Values that the DINOv3 reference classes gave."""
    soft, sharp = (sinkhorn_knopp(wave((6, 4), 1), temp) for temp in (0.5, 0.07))
    golden = [
        (soft[0], [0.246702, 0.549460, 0.185991, 0.017847]),
        (soft[1], [0.005776, 0.043722, 0.447540, 0.502962]),
        (soft[2], [0.576657, 0.165682, 0.104716, 0.152946]),
        (soft[3], [0.080889, 0.492287, 0.392109, 0.034715]),
        (soft[4], [0.009319, 0.027604, 0.263171, 0.699906]),
        (soft[5], [0.658599, 0.236088, 0.069587, 0.035726]),
        (soft.sum(dim=0), [1.577942, 1.514841, 1.463115, 1.444102]),
        (sharp[0], [0.2616364, 0.7370057, 0.0013579, 1.6e-11]),
        (sharp.sum(dim=0), [2.261776, 1.282903, 1.121065, 1.334256]),
        (sinkhorn_knopp(wave((5, 4), 400), 0.5)[0], [0.028294, 0.051385, 0.266538, 0.653783]),
    ]
    for ours, theirs in golden:
        torch.testing.assert_close(ours, torch.tensor(theirs), rtol=1e-6, atol=1e-6)
    assert sharp[0, 3].item() == pytest.approx(1.6e-11, rel=0.05)


def test_sinkhorn_of_a_2x2_matrix_by_hand():
    """[[1, 2], [3, 4]]: columns to 1 gives [[1/4, 1/3], [3/4, 2/3]], then rows to 1."""
    logits = 0.5 * torch.tensor([[1.0, 2.0], [3.0, 4.0]]).log()
    expected = torch.tensor([[3 / 7, 4 / 7], [9 / 17, 8 / 17]])
    torch.testing.assert_close(sinkhorn_knopp(logits, 0.5, iterations=1), expected)


@pytest.mark.parametrize("iterations", [1, 3, 10])
def test_sinkhorn_equals_the_papers_scaling_of_every_entry(iterations):
    logits = noise(9, 5)
    q = (logits.double() / 0.1).exp()
    q /= q.sum()
    for _ in range(iterations):
        for k in range(5):
            q[:, k] /= q[:, k].sum() * 5
        for b in range(9):
            q[b] /= q[b].sum() * 9
    torch.testing.assert_close(sinkhorn_knopp(logits, 0.1, iterations), (q * 9).float())


def test_sinkhorn_rows_sum_to_one_and_columns_balance_after_many_iterations():
    few, many = (sinkhorn_knopp(noise(12, 4), 0.5, iterations) for iterations in (1, 100))
    for probs in (few, many):
        torch.testing.assert_close(probs.sum(dim=1), torch.ones(12))
    assert (few.sum(dim=0) - 3).abs().max() > 0.1
    torch.testing.assert_close(many.sum(dim=0), torch.full((4,), 3.0), rtol=1e-3, atol=0)


def test_rows_sum_to_one_over_many_prototypes():
    sums = sinkhorn_knopp(noise(2, 262144), 0.1).sum(dim=1)
    torch.testing.assert_close(sums, torch.ones(2), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("mode", ["ema", "sinkhorn", "none"])
def test_huge_logits_give_finite_targets(mode, dtype):
    logits = noise(32, 16, scale=1e4)
    logits[0] -= 4e4  # a row far below all others
    logits[:, 0] -= 4e4  # a prototype that no row wants
    probs = Centering(16, mode)(logits.clamp(-6e4, 6e4).to(dtype), 0.04)
    assert probs.isfinite().all()
    torch.testing.assert_close(probs.sum(dim=1), torch.ones(32))


def test_a_row_far_below_the_others_keeps_its_preference():
    """Measured from the batch's maximum alone, its exponents would all be cut to one value."""
    logits = noise(8, 4)
    logits[3] = torch.tensor([-50.0, -51.0, -52.0, -53.0])
    assert sinkhorn_knopp(logits, 0.1)[3].argsort(descending=True).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("sizes", [(4, 4), (1, 7), (8, 0), (0, 0)])
def test_sinkhorn_of_two_ranks_equals_the_joined_batch(sizes):
    logits = noise(sum(sizes), 5, scale=2.0)

    def one_rank(shard, all_reduce_sum, all_reduce_max):
        reducers = dict(all_reduce_sum=all_reduce_sum, all_reduce_max=all_reduce_max)
        return Centering(5, "sinkhorn")(shard, 0.07, **reducers)

    parts = Ranks(2).run(one_rank, logits.split(sizes))
    assert [len(part) for part in parts] == list(sizes)
    torch.testing.assert_close(torch.cat(parts), sinkhorn_knopp(logits, 0.07))


@pytest.mark.parametrize("sizes", [(4, 4), (1, 7), (8, 0), (0, 0)])
def test_the_centre_of_two_ranks_equals_that_of_the_joined_batch(sizes):
    logits = noise(sum(sizes), 5)

    def updated(shard, *reducers):
        centering = Centering(5, "ema")
        centering.center.fill_(1.0)
        centering.update(shard, *reducers[:1])
        return centering.center

    joined = updated(logits)
    for center in Ranks(2).run(updated, logits.split(sizes)):
        torch.testing.assert_close(center, joined)


def test_the_centre_follows_the_formula_and_only_when_told():
    centering = Centering(2, "ema", momentum=0.9)
    logits = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    centering(logits, 0.1)
    assert centering.center.tolist() == [0, 0]
    centering.update(logits)  # 0.1 * (2, 4)
    torch.testing.assert_close(centering.center, torch.tensor([0.2, 0.4]))
    centering.update(logits)  # 0.9 * (0.2, 0.4) + 0.1 * (2, 4)
    torch.testing.assert_close(centering.center, torch.tensor([0.38, 0.76]))
    expected = ((logits - torch.tensor([0.38, 0.76])) / 0.5).softmax(dim=-1)
    torch.testing.assert_close(centering(logits, 0.5), expected)


def test_without_any_row_the_centre_stays():
    centering = Centering(3, "ema")
    centering.update(noise(4, 3))
    before = centering.center.clone()
    centering.update(torch.zeros(0, 3))
    assert torch.equal(centering.center, before)


def test_only_ema_has_a_state():
    layouts = {mode: list(Centering(3, mode).state_dict()) for mode in ("ema", "sinkhorn", "none")}
    assert layouts == {"ema": ["center"], "sinkhorn": [], "none": []}
    for mode in ("sinkhorn", "none"):
        Centering(3, mode).update(noise(4, 3))  # nothing to move, no error


def test_centring_takes_the_iterations_it_was_given():
    logits = noise(6, 5)
    expected = sinkhorn_knopp(logits, 0.1, iterations=7)
    assert torch.equal(Centering(5, "sinkhorn", iterations=7)(logits, 0.1), expected)


def test_no_centring_is_the_softmax():
    logits = noise(4, 3)
    torch.testing.assert_close(Centering(3, "none")(logits, 0.2), (logits / 0.2).softmax(dim=-1))


def test_wrong_centring_settings_are_refused():
    with pytest.raises(ValueError, match="ema, sinkhorn, none, got 'sinkhorn_knopp'"):
        Centering(3, "sinkhorn_knopp")
    with pytest.raises(ValueError, match="at least 1 iteration, got 0"):
        sinkhorn_knopp(noise(4, 3), 0.1, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", TARGETS)
def test_targets_are_computed_in_float32(name, dtype):
    logits = noise(6, 5).to(dtype)
    expected = TARGETS[name](logits.float())
    assert TARGETS[name](logits).dtype == torch.float32
    assert torch.equal(TARGETS[name](logits), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(TARGETS[name](logits), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_centre_is_computed_in_float32_and_carries_no_gradient(dtype):
    logits = noise(300, 5, scale=10.0).to(dtype)
    expected, ours = Centering(5, "ema"), Centering(5, "ema")
    expected.update(logits.float())
    ours.update(logits.requires_grad_())
    torch.testing.assert_close(ours.center, expected.center)
    assert not ours.center.requires_grad


@pytest.mark.parametrize("name", TARGETS)
def test_targets_leave_their_logits_alone_and_carry_no_gradient(name):
    logits = noise(6, 5).requires_grad_()
    assert not TARGETS[name](logits).requires_grad
    assert torch.equal(logits, noise(6, 5))
