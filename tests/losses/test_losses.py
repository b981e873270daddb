"""Each loss equals a loop over crops, images and prototypes, and averages over micro-batches."""

import itertools
import math

import pytest
import torch

import losses.cross_entropy
from losses.centering import sinkhorn_knopp
from losses.cross_entropy import soft_cross_entropy
from losses.dino import dino_loss, multicrop_dino_loss
from losses.gram import downsample_patches, gram_loss
from losses.ibot import ibot_loss
from losses.koleo import koleo_loss

MASKS = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [0, 1, 1, 1], [0, 0, 0, 0]], dtype=torch.bool)


def wave(shape, offset):
    """Element n is sin(n + offset): the input of the golden numbers, which the DINOv3 code gave."""
    n = torch.arange(math.prod(shape), dtype=torch.float64)
    return torch.sin(n + offset).float().view(shape)


def noise(*shape, seed=0, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def targets(*shape, seed=1):
    return noise(*shape, seed=seed, scale=3.0).softmax(dim=-1)


def cross_entropy(teacher, student, temp):
    """One pair of rows, prototype by prototype."""
    log_sum = torch.logsumexp(student / temp, dim=0)
    return sum(-teacher[k] * (student[k] / temp - log_sum) for k in range(len(teacher)))


def assert_same_value_and_gradient(loss, reference, inputs):
    """`reference` runs in float64 and is differentiated by autograd."""
    ours, theirs = inputs.clone().requires_grad_(), inputs.double().requires_grad_()
    value, expected = loss(ours), reference(theirs)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    value.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-6)


LOSSES = {  # name: (loss of student and teacher tensors, student, teacher)
    "dino": (lambda s, t: dino_loss(s, t, 0.1), noise(3, 4, 6), targets(2, 4, 6)),
    "multicrop": (
        lambda s, t: multicrop_dino_loss(s[:2], s[2:], t, 0.1),
        noise(5, 4, 6),
        targets(2, 4, 6),
    ),
    "ibot": (lambda s, t: ibot_loss(s, t, MASKS, 0.1), noise(5, 6), targets(5, 6)),
    "koleo": (lambda s, t: koleo_loss(s), noise(256, 5), None),  # near ties: bf16 mixes them up
    "gram": (gram_loss, noise(2, 6, 8), noise(2, 6, 8, seed=1)),
}


@pytest.mark.parametrize("ignore_diagonal", [True, False])
@pytest.mark.parametrize("S, T", [(2, 2), (5, 2), (1, 3), (4, 1)])
def test_dino_equals_the_loop_over_pairs_images_and_prototypes(S, T, ignore_diagonal):
    teacher = targets(T, 3, 7)

    def loop(student):
        terms = [
            cross_entropy(teacher[t, b].double(), student[s, b], 0.1)
            for s in range(S)
            for t in range(T)
            for b in range(3)
            if not (ignore_diagonal and s == t)
        ]
        return sum(terms) / len(terms)

    def loss(student):
        return dino_loss(student, teacher, 0.1, ignore_diagonal=ignore_diagonal)

    assert_same_value_and_gradient(loss, loop, noise(S, 3, 7))


@pytest.mark.parametrize("G, L", [(2, 8), (2, 0), (3, 2), (1, 4)])
def test_multicrop_with_local_weight_1_is_the_equal_mean_over_different_crops(G, L):
    student, teacher = noise(G + L, 3, 5), targets(G, 3, 5)
    equal_mean = dino_loss(student, teacher, 0.1)
    two_terms = multicrop_dino_loss(student[:G], student[G:], teacher, 0.1)
    torch.testing.assert_close(two_terms, equal_mean)


def test_local_weight_scales_the_local_share_only():
    student, teacher = noise(2 + 8, 3, 5), targets(2, 3, 5)
    global_term = dino_loss(student[:2], teacher, 0.1)
    local_term = dino_loss(student[2:], teacher, 0.1, ignore_diagonal=False)
    loss = multicrop_dino_loss(student[:2], student[2:], teacher, 0.1, local_weight=0.5)
    torch.testing.assert_close(loss, global_term / 9 + 0.5 * local_term * 8 / 9)


def test_without_local_crops_only_the_global_pairs_count():
    student, teacher = noise(2, 3, 5), targets(2, 3, 5)
    loss = multicrop_dino_loss(student, None, teacher, 0.1)
    torch.testing.assert_close(loss, dino_loss(student, teacher, 0.1))


def test_dino_without_a_pair_of_different_crops_is_refused():
    one = noise(1, 3, 5)
    with pytest.raises(ValueError, match="two different crops"):
        dino_loss(one, one, 0.1)
    with pytest.raises(ValueError, match="two different crops"):
        multicrop_dino_loss(one, None, one, 0.1)


def test_dino_refuses_shapes_that_would_broadcast():
    with pytest.raises(ValueError, match="same images and prototypes"):
        dino_loss(noise(2, 3, 5), targets(2, 1, 5), 0.1)
    with pytest.raises(ValueError, match="same global crops"):
        multicrop_dino_loss(noise(2, 3, 5), None, targets(3, 3, 5), 0.1)


def test_ibot_equals_the_loop_over_crops_patches_and_prototypes():
    masks = torch.rand(6, 9, generator=torch.Generator().manual_seed(0)) < 0.4
    masks[2] = False
    rows = {position: row for row, position in enumerate(map(tuple, masks.nonzero().tolist()))}
    teacher = targets(len(rows), 5)

    def loop(student):
        total = 0.0
        for crop in range(6):
            masked = [n for n in range(9) if masks[crop, n]]
            for n in masked:
                row = rows[crop, n]
                total += cross_entropy(teacher[row].double(), student[row], 0.1) / len(masked)
        return total / 6

    assert_same_value_and_gradient(
        lambda student: ibot_loss(student, teacher, masks, 0.1), loop, noise(len(rows), 5)
    )


@pytest.mark.parametrize("row, weight", list(enumerate([1 / 2, 1 / 2, 1 / 3, 1 / 3, 1 / 3])))
def test_a_masked_patch_weighs_one_over_those_of_its_crop(row, weight):
    student = torch.tensor([[100.0, 0.0]]).repeat(5, 1)  # right about every patch, cross-entropy 0
    student[row] = 0.0  # undecided about this one, cross-entropy ln 2
    teacher = torch.tensor([[1.0, 0.0]]).repeat(5, 1)
    loss = ibot_loss(student, teacher, MASKS, student_temp=1.0)
    assert loss.item() == pytest.approx(weight * math.log(2) / 4)


def test_ibot_without_masked_patches_is_zero_and_still_reaches_the_head():
    head = torch.nn.Linear(3, 5)
    loss = ibot_loss(head(torch.zeros(0, 3)), torch.zeros(0, 5), torch.zeros_like(MASKS), 0.1)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(head.weight.grad, torch.zeros(5, 3))


def test_ibot_refuses_targets_of_another_shape():
    with pytest.raises(ValueError, match="same shape"):
        ibot_loss(noise(5, 4), targets(1, 4), MASKS, 0.1)


@pytest.mark.parametrize("group", [None, 8, 4, 2])
def test_koleo_equals_the_loop_over_groups_and_rows(group):
    size = group or 8

    def loop(features):
        points = features / features.norm(dim=1, keepdim=True)
        total = 0.0
        for i in range(8):
            start = i - i % size
            others = [j for j in range(start, start + size) if j != i]
            nearest = max(others, key=lambda j: (points[i] @ points[j]).item())
            total -= torch.log((points[i] - points[nearest] + 1e-8).norm() + 1e-8)
        return total / 8

    assert_same_value_and_gradient(lambda x: koleo_loss(x, group), loop, noise(8, 5))


def test_koleo_finds_the_neighbours_seen_by_eye():
    angles = torch.deg2rad(torch.tensor([0.0, 10.0, 90.0]))
    points = torch.stack([angles.cos(), angles.sin()], dim=1) * torch.tensor([[1.0], [5.0], [0.1]])
    distances = [2 * math.sin(math.radians(half)) for half in (5, 5, 40)]  # chords of 10, 10, 80
    expected = -sum(map(math.log, distances)) / 3
    assert koleo_loss(points).item() == pytest.approx(expected, rel=1e-5)


def test_koleo_of_opposite_vectors_is_minus_log_2():
    assert koleo_loss(torch.tensor([[3.0, 0.0], [-1.0, 0.0]])).item() == pytest.approx(-math.log(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_koleo_duplicates_count_but_do_not_pull(dtype):
    features = noise(1, 384).repeat(3, 1).to(dtype).requires_grad_()  # the pulls of two cancel
    loss = koleo_loss(features)
    loss.backward()
    assert loss.item() == pytest.approx(-math.log(1e-8 * math.sqrt(384) + 1e-8), rel=1e-4)
    assert torch.equal(features.grad, torch.zeros_like(features))


def test_koleo_duplicates_leave_the_gradient_of_other_rows_alone():
    row, others = noise(1, 8), noise(2, 8, seed=1)
    with_duplicates = torch.cat([row, row, others]).requires_grad_()
    koleo_loss(with_duplicates).backward()
    alone = torch.cat([row, others]).requires_grad_()
    points = torch.nn.functional.normalize(alone, dim=1)
    distances = [min((points[i] - points[j]).norm() for j in range(3) if j != i) for i in (1, 2)]
    (-sum(map(torch.log, distances)) / 4).backward()
    torch.testing.assert_close(with_duplicates.grad[2:], alone.grad[1:])


@pytest.mark.parametrize("rows, group", [(0, None), (0, 4), (1, None), (3, 1)])
def test_koleo_without_a_neighbour_is_zero_with_a_graph(rows, group):
    features = noise(rows, 4).requires_grad_()
    loss = koleo_loss(features, group)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(features.grad, torch.zeros(rows, 4))


@pytest.mark.parametrize("group", [3, 16, 0, -4])
def test_koleo_group_must_divide_the_batch(group):
    with pytest.raises(ValueError, match=f"divide the 8 rows of the batch, got {group}"):
        koleo_loss(noise(8, 4), group)


def test_gram_equals_the_loop_over_pairs_of_patches():
    teacher = noise(2, 3, 5, seed=1)

    def cosine(x, y):
        return (x @ y) / (x.norm() * y.norm())

    def loop(student):
        terms = []
        for b in range(2):
            for n, m in itertools.product(range(3), repeat=2):
                ours = cosine(student[b, n], student[b, m])
                theirs = cosine(teacher[b, n].double(), teacher[b, m].double())
                terms.append((ours - theirs) ** 2)
        return sum(terms) / len(terms)

    assert_same_value_and_gradient(
        lambda student: gram_loss(student, teacher), loop, noise(2, 3, 5)
    )


def test_gram_is_zero_for_the_teachers_own_patches_and_for_any_rotation_of_them():
    patches = noise(2, 6, 8)
    rotation = torch.linalg.qr(noise(8, 8, seed=1))[0]
    assert gram_loss(patches, patches).item() == 0
    assert gram_loss(patches @ rotation, patches).item() < 1e-10


def test_gram_compares_backbones_of_different_width():
    wider = torch.cat([noise(2, 6, 8), torch.zeros(2, 6, 4)], dim=-1)  # the same cosines
    assert gram_loss(noise(2, 6, 8), wider).item() < 1e-10


def test_gram_refuses_patches_that_do_not_correspond():
    with pytest.raises(ValueError, match="downsample_patches"):
        gram_loss(noise(2, 6, 8), noise(2, 24, 8))


def test_downsampled_patches_keep_their_place_on_the_grid():
    """A plane stays that plane, sampled at the centres of the coarser cells."""
    y, x = torch.meshgrid(torch.arange(8.0), torch.arange(12.0), indexing="ij")
    patches = torch.stack([y, x, torch.ones(8, 12)], dim=-1).view(1, 96, 3).half()
    coarse = downsample_patches(patches, (8, 12), (4, 6)).view(4, 6, 3)
    inner = coarse[1:-1, 1:-1]  # bicubic repeats the border, which bends a plane there
    torch.testing.assert_close(inner[..., 0], torch.tensor([2.5, 4.5])[:, None].expand(2, 4))
    torch.testing.assert_close(inner[..., 1], torch.tensor([2.5, 4.5, 6.5, 8.5]).expand(2, 4))
    torch.testing.assert_close(coarse[..., 2], torch.ones(4, 6))


def test_downsampling_refuses_a_grid_that_the_patches_do_not_fill():
    with pytest.raises(ValueError, match="96 patches do not fill a grid of 8 x 8"):
        downsample_patches(noise(1, 96, 3), (8, 8), (4, 4))


def test_huge_student_logits_give_finite_losses():
    student = noise(2, 5, 16, scale=1e4).requires_grad_()
    loss = dino_loss(student, targets(2, 5, 16), 0.04)
    loss = loss + ibot_loss(student[0], targets(5, 16), MASKS, 0.04)
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()


def test_golden_numbers_of_the_losses():
    """Values that the DINOv3 reference classes gave."""
    probs, student = sinkhorn_knopp(wave((6, 4), 1), 0.5).view(2, 3, 4), wave((2, 3, 4), 100)
    patch_probs = sinkhorn_knopp(wave((5, 4), 400), 0.5)
    patches = wave((2, 6, 8), 1), wave((2, 6, 8), 50)
    golden = [
        (dino_loss(student, probs, 0.1, ignore_diagonal=False), 5.662481),
        (dino_loss(student, probs, 0.1), 5.587507),
        (dino_loss(wave((4, 3, 4), 200), probs, 0.1, ignore_diagonal=False), 11.311093),
        (ibot_loss(wave((5, 4), 300), patch_probs, MASKS, 0.1), 1.897645),
        (koleo_loss(wave((5, 8), 1)), 0.159256),
        (gram_loss(*patches), 0.0140916),
    ]
    ours, theirs = zip(*golden, strict=True)
    torch.testing.assert_close(torch.stack(ours), torch.tensor(theirs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_computed_in_float32(name, dtype):
    loss, student, teacher = LOSSES[name]
    student, teacher = student.to(dtype), None if teacher is None else teacher.to(dtype)
    expected = loss(student.float(), None if teacher is None else teacher.float())
    assert loss(student, teacher).dtype == torch.float32
    assert torch.equal(loss(student, teacher), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss(student.float(), teacher), expected)


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "koleo"])
def test_no_gradient_reaches_the_teacher(name):
    loss, student, teacher = LOSSES[name]
    student, teacher = student.clone().requires_grad_(), teacher.clone().requires_grad_()
    loss(student, teacher).backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


def test_equal_micro_batches_average_to_the_whole_batch():
    """8 images at once, or 4 times 2; tensors are (crop, image, ...), so slices of dim 1."""
    student, teacher, features = noise(10, 8, 6), targets(2, 8, 6), noise(2, 8, 5)
    masks = torch.rand(2, 8, 9, generator=torch.Generator().manual_seed(0)) < 0.4
    masks[:, 2] = False
    patch_logits, patch_probs = noise(2, 8, 9, 6), targets(2, 8, 9, 6)  # used where masked

    def losses(part):
        selected = masks[:, part]
        return torch.stack(
            [
                multicrop_dino_loss(student[:2, part], student[2:, part], teacher[:, part], 0.1),
                ibot_loss(
                    patch_logits[:, part][selected],
                    patch_probs[:, part][selected],
                    selected.flatten(0, 1),
                    0.1,
                ),
                koleo_loss(features[:, part].flatten(0, 1), group=2),
            ]
        )

    micro = [losses(slice(start, start + 2)) for start in range(0, 8, 2)]
    torch.testing.assert_close(torch.stack(micro).mean(dim=0), losses(slice(0, 8)))


@pytest.mark.parametrize("shared", [False, True], ids=["targets a crop", "targets shared"])
def test_rows_at_a_time_give_the_cross_entropy_of_all_at_once(shared, monkeypatch):
    logits, probs = noise(3, 7, 11, scale=4.0), targets(7, 11) if shared else targets(3, 7, 11)
    weights = noise(3, 7, seed=2)

    def naive(rows):
        return (weights * -(probs * (rows / 0.1).log_softmax(-1)).sum(-1)).sum()

    for size in (1, 300, 1 << 20):  # a row, two rows, all
        monkeypatch.setitem(losses.cross_entropy.CHUNK, "cpu", size)
        assert_same_value_and_gradient(
            lambda rows: (weights * soft_cross_entropy(rows, probs, 0.1)).sum(), naive, logits
        )
        torch.testing.assert_close(
            sinkhorn_knopp(logits[0], 1.0),
            naive_sinkhorn(logits[0].double(), 1.0).float(),
            rtol=1e-5,
            atol=1e-7,
        )


def naive_sinkhorn(logits, temp):
    scores = (logits / temp).exp()
    for _ in range(3):
        scores = scores / scores.sum(0)
        scores = scores / scores.sum(1, keepdim=True)
    return scores
