import pytest
import torch
import torch.nn.functional as F
from test_fit import anchors_of, prototypes_of

from yolo_fewshot import args
from yolo_fewshot.enroll import methods as module
from yolo_fewshot.enroll.features import Features
from yolo_fewshot.enroll.fit import fit_classes
from yolo_fewshot.enroll.methods import METHODS, PRIOR_STRENGTH, classifiers

SHOTS = torch.tensor([2, 3, 4])


def features_of(branches=1):
    """Nine objects in three images, whose anchors and embeddings differ by branch."""
    rng = torch.Generator().manual_seed(1)
    parts, embeds = [], []
    for b in range(branches):
        anchors, objects, _ = anchors_of(n=9, own=4, seed=b)
        parts.append(anchors._replace(objects=objects))
        embeds.append(F.normalize(torch.randn(9, 12, generator=rng), dim=1))
    cls = torch.tensor([2, 0, 1, 1, 2, 0, 0, 2, 1])
    return Features(cls, torch.zeros(9, 4), torch.arange(9) // 3, ["a", "b", "c"], embeds, parts, 1)


def targets_of(features, branch=0):
    """Class of every anchor, -1 for background."""
    objects = features.anchors[branch].objects.tolist()
    return torch.tensor([int(features.cls[i]) if i >= 0 else -1 for i in objects])


def means_of(features, branch=0):
    means = torch.stack([features.embeds[branch][features.cls == c].mean(0) for c in range(3)])
    return means / means.norm(dim=1, keepdim=True)


def test_every_method_is_a_choice_of_the_key_enroll():
    assert args.ENROLL_KEYS["enroll"].choices == ("auto", *METHODS)


def test_an_added_method_makes_the_classifiers_of_its_classes(monkeypatch):
    """It gets its own classes, numbered from 0; objects of the others are background, those left out are absent."""
    features, given = features_of(), []

    def ones(examples):
        given.append(examples)
        return torch.ones(2, 12), torch.tensor([2.0, 3.0])

    monkeypatch.setitem(module.METHODS, "ones", ones)
    labels = features.cls.clone()
    labels[4] = -1  # of class 2
    vectors, offsets = classifiers(features, labels, ["ones", "mean", "ones"], SHOTS, 0, prototypes_of())
    assert torch.equal(vectors[[0, 2]], torch.ones(2, 12)) and offsets.tolist() == [2, 0, 3]
    torch.testing.assert_close(vectors[1], means_of(features)[1])
    (examples,) = given
    assert examples.labels.tolist() == [1, 0, 0, 0, 1] and examples.shots.tolist() == [2, 4]
    assert torch.equal(examples.embeds, features.embeds[0][[0, 1, 5, 6, 7]])
    anchors, expected = features.anchors[0], torch.tensor([0, -1, 1, -1])[targets_of(features)]
    kept = anchors.objects != 4
    assert torch.equal(examples.targets, expected[kept]) and not kept.all()
    assert all(torch.equal(x, y[kept]) for x, y in zip(examples.anchors, anchors))


def test_classifiers_of_mean_are_the_mean_embeddings():
    features = features_of()
    vectors, offsets = classifiers(features, features.cls, ["mean"] * 3, SHOTS, 0, prototypes_of())
    torch.testing.assert_close(vectors, means_of(features))
    assert not offsets.any()


def test_classifiers_of_a_branch_are_fitted_on_its_anchors_from_the_means_of_its_objects():
    features, prototypes = features_of(branches=2), prototypes_of()
    vectors = []
    for b in range(2):
        means = means_of(features, b)
        expected = fit_classes(features.anchors[b], targets_of(features, b), means, PRIOR_STRENGTH / SHOTS, prototypes)
        found = classifiers(features, features.cls, ["fit", "fit", "mean"], SHOTS, b, prototypes)
        torch.testing.assert_close(found[0][:2], expected[0][:2], rtol=0, atol=2e-3)
        torch.testing.assert_close(found[1][:2], expected[1][:2], rtol=0, atol=2e-2)
        torch.testing.assert_close(found[0][2], means[2])
        assert not found[1][2] and not torch.allclose(found[0][:2], means[:2], atol=1e-2)
        vectors.append(found[0])
    assert not torch.allclose(*vectors, atol=0.1)


def test_left_out_objects_are_not_in_a_mean():
    features = features_of()
    labels = torch.where(torch.arange(9) < 3, -1, features.cls)
    vectors, offsets = classifiers(features, labels, ["mean"] * 3, SHOTS, 0, prototypes_of())
    for c in range(3):
        mean = features.embeds[0][3:][features.cls[3:] == c].mean(0)
        torch.testing.assert_close(vectors[c], mean / mean.norm())
    assert not offsets.any()


@pytest.mark.parametrize("method", METHODS)
def test_a_class_without_an_object_gets_zeros(method):
    features = features_of()
    labels = torch.where(features.cls == 1, -1, features.cls)
    vectors, offsets = classifiers(features, labels, [method] * 3, torch.tensor([3, 0, 3]), 0, prototypes_of())
    assert not vectors[1].any() and not offsets[1] and vectors[[0, 2]].any(1).all()
    assert vectors.isfinite().all() and offsets.isfinite().all()
