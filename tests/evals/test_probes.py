"""The k-NN vote against a loop over images; features do not depend on the batches."""

import math

import pytest
import torch
import torch.nn.functional as F

from data.evaluation import EvalDataset
from data.sources.specs import open_data
from engine.health import health
from evals.knn import _largest, extract_cls, knn_accuracy
from models.weights.load import load_backbone


def random_problem(train=60, val=25, dim=8, classes=4):
    generator = torch.Generator().manual_seed(0)
    features = [F.normalize(torch.randn(n, dim, generator=generator), dim=1) for n in (train, val)]
    labels = [torch.randint(classes, (n,), generator=generator) for n in (train, val)]
    return features[0], labels[0], features[1], labels[1]


def vote_by_loops(train, train_labels, val, val_labels, k, temperature):
    correct = 0
    for query, truth in zip(val, val_labels, strict=True):
        similar = sorted(
            (
                (float(query @ item), int(label))
                for item, label in zip(train, train_labels, strict=True)
            ),
            reverse=True,
        )[:k]
        votes = {}
        for similarity, label in similar:
            votes[label] = votes.get(label, 0) + math.exp(similarity / temperature)
        correct += max(votes, key=votes.get) == int(truth)
    return correct / len(val)


@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_several_k_in_one_pass_equal_a_loop_over_images(temperature):
    problem = random_problem()
    ks = (1, 5, 20, 60)
    result = knn_accuracy(*problem, ks=ks, temperature=temperature, chunk=7)
    assert result == {k: pytest.approx(vote_by_loops(*problem, k, temperature)) for k in ks}
    assert len(set(result.values())) > 1  # the problem tells the ks apart


def test_the_nearest_are_found_across_blocks_of_the_training_set():
    from evals.knn import _nearest

    train, _, val, _ = random_problem(train=50)
    whole = (val @ train.T).topk(7, dim=1)
    values, rows = _nearest(val, train, 7, block=8)
    torch.testing.assert_close(values, whole.values)
    assert torch.equal(rows, whole.indices)


def test_more_neighbours_than_images_count_all_images():
    problem = random_problem(train=10)
    assert knn_accuracy(*problem, ks=(10, 500))[500] == knn_accuracy(*problem, ks=(10,))[10]


def test_a_temperature_near_zero_does_not_overflow():
    assert 0 <= knn_accuracy(*random_problem(), temperature=1e-6)[20] <= 1


def test_features_do_not_depend_on_the_batch_and_follow_the_order_of_the_data():
    backbone = load_backbone("random:vit_nano?patch_size=8&image_size=32&depth=2")
    shape = backbone.preprocessing
    data = EvalDataset(open_data("scenes?size=10"), shape.resize, shape.size, shape.mean, shape.std)
    one, labels = extract_cls(backbone, data, torch.device("cpu"), batch_size=3)
    other, _ = extract_cls(backbone, data, torch.device("cpu"), batch_size=10, workers=1)
    torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
    assert labels.tolist() == open_data("scenes?size=10").labels.tolist()
    torch.testing.assert_close(one.norm(dim=1), torch.ones(10))


def test_health_of_hand_made_targets_and_features():
    one_hot, uniform = torch.eye(4).repeat(2, 1), torch.full((8, 4), 0.25)
    collapsed = torch.zeros(8, 4).index_fill(1, torch.tensor([2]), 1.0)
    independent = torch.cat([torch.eye(4), -torch.eye(4)])
    healthy = health(one_hot, independent)
    assert healthy["health/teacher_entropy"] == pytest.approx(0, abs=1e-6)
    assert healthy["health/prototype_use"] == pytest.approx(1)
    assert healthy["health/effective_rank"] == pytest.approx(4)
    assert health(uniform, independent)["health/teacher_entropy"] == pytest.approx(1)
    dead = health(collapsed, torch.ones(8, 4))
    assert dead["health/prototype_use"] == pytest.approx(0.25)
    assert dead["health/feature_std"] == pytest.approx(0, abs=1e-6)


def test_the_largest_by_groups_are_those_of_topk():
    generator = torch.Generator().manual_seed(0)
    for columns, k in ((5000, 20), (6400, 3), (64, 1), (200, 200), (130, 2)):
        scores = torch.randn(7, columns, generator=generator)
        scores[0, :50] += 10  # many of the largest in one group
        values, rows = _largest(scores, k)
        torch.testing.assert_close(values, scores.topk(k, dim=1).values, rtol=0, atol=0)
        torch.testing.assert_close(scores.gather(1, rows), values, rtol=0, atol=0)
