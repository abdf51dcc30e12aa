import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from yolo_fewshot.enroll import fit as module
from yolo_fewshot.enroll.features import Anchors, Features
from yolo_fewshot.enroll.fit import classifiers, fit_classes
from yolo_fewshot.nn.head import Prototypes

INF = float("inf")


def bank_of(d=12):
    bank = Prototypes(1, d, 3)
    bank.logit_scale.data[:] = torch.tensor([0.7, 1.0, 1.4])
    bank.bias.data[:] = torch.tensor([-4.0, -3.0, -2.5])
    return bank


def anchors_of(n=3, own=15, others=300, d=12, seed=0):
    """Anchors of n classes, which lie about a direction of their own, with those of no class in between.

    A third of the latter count less than the others do.
    """
    rng = torch.Generator().manual_seed(seed)
    targets = torch.cat([torch.arange(n).repeat(own), torch.full((others,), -1)])
    targets = targets[torch.randperm(len(targets), generator=rng)]
    prototypes = F.normalize(torch.randn(n, d, generator=rng), dim=1)
    embeds = torch.randn(len(targets), d, generator=rng)
    embeds[targets >= 0] += 2 * prototypes[targets[targets >= 0]]
    less = torch.where(torch.rand(len(targets), generator=rng) < 1 / 3, 0.3, 1.0)
    weight = torch.where(targets >= 0, torch.rand(len(targets), generator=rng), less)
    level = torch.randint(0, 3, (len(targets),), generator=rng)
    none = torch.zeros(len(targets), dtype=torch.int64)
    return Anchors(embeds, level, torch.zeros(len(targets), 4), targets, weight, none, none), targets, prototypes


def objective(v, o, anchors, targets, c, prototype, prior_strength, bank):
    """Objective of one class as `fit_classes` states it, with gradient and Hessian, in float64."""
    s, b = (x.detach().double().numpy()[anchors.level.numpy()] for x in (bank.logit_scale, bank.bias))
    e, p = anchors.embeds.double().numpy(), prototype.double().numpy()
    t = np.where(targets.numpy() == c, anchors.weight.double().numpy(), 0)
    w = np.where(anchors.objects.numpy() < 0, anchors.weight.double().numpy(), 1)
    z = s * (e @ v) + b + o
    bce = w * (np.logaddexp(0, z) - t * z)
    sigmoid, x = 1 / (1 + np.exp(-z)), np.concatenate([s[:, None] * e, np.ones((len(e), 1))], 1)
    prior = prior_strength * np.r_[np.ones(len(v)), 0.01]
    off = np.r_[v - p, o]
    value = bce.sum() / t.sum() + (prior * off**2).sum()
    gradient = x.T @ (w * (sigmoid - t)) / t.sum() + 2 * prior * off
    hessian = (x.T * (w * sigmoid * (1 - sigmoid))) @ x / t.sum() + 2 * np.diag(prior)
    return value, gradient, hessian


def newton(*args):
    """Minimize the objective of one class by Newton's method with halved steps."""
    x = np.r_[args[3].double().numpy(), 0]
    for _ in range(100):
        value, gradient, hessian = objective(x[:-1], x[-1], *args)
        step, size = np.linalg.solve(hessian, gradient), 1.0
        while size > 1e-9 and objective((x - size * step)[:-1], (x - size * step)[-1], *args)[0] > value:
            size /= 2
        x = x - size * step
    assert np.abs(gradient).max() < 1e-6
    return x[:-1], x[-1]


def bce(vectors, offsets, anchors, targets, c, prototypes, bank):
    return objective(vectors[c].double().numpy(), float(offsets[c]), anchors, targets, c, prototypes[c], 0.0, bank)[0]


@pytest.mark.parametrize("prior_strength", [0.03, 0.6, 3.0, 100.0])
def test_a_fit_is_the_minimum_of_the_stated_objective(prior_strength):
    (anchors, targets, prototypes), bank = anchors_of(), bank_of()
    vectors, offsets = fit_classes(anchors, targets, prototypes, torch.full((3,), prior_strength), bank)
    for c in range(3):
        args = (anchors, targets, c, prototypes[c], prior_strength, bank)
        v, o = newton(*args)
        least = objective(v, o, *args)[0]
        found = objective(vectors[c].double().numpy(), float(offsets[c]), *args)[0]
        assert least - 1e-9 < found < least + 1e-4 * abs(least)
        torch.testing.assert_close(vectors[c], torch.tensor(v).float(), rtol=0, atol=5e-3)
        assert offsets[c].item() == pytest.approx(o, abs=3e-2)
        assert np.abs(v - prototypes[c].numpy()).max() > (
            1e-2 if prior_strength < 10 else 0
        )  # the prototype is not the minimum


def test_an_infinite_pull_gives_the_prototype():
    (anchors, targets, prototypes), bank = anchors_of(), bank_of()
    vectors, offsets = fit_classes(anchors, targets, prototypes, torch.full((3,), INF), bank)
    assert torch.equal(vectors, prototypes) and not offsets.any()


def test_the_smaller_the_pull_the_closer_the_fit_and_the_farther_the_prototype():
    (anchors, targets, prototypes), bank = anchors_of(), bank_of()
    losses, ways = [], []
    for prior_strength in (1e6, 100.0, 3.0, 0.1):
        vectors, offsets = fit_classes(anchors, targets, prototypes, torch.full((3,), prior_strength), bank)
        losses.append([bce(vectors, offsets, anchors, targets, c, prototypes, bank) for c in range(3)])
        ways.append((vectors - prototypes).norm(dim=1).tolist())
    assert (np.diff(losses, axis=0) < 0).all() and (np.diff(ways, axis=0) > 0).all()
    assert max(ways[0]) < 1e-3


def test_classes_do_not_influence_each_other():
    (anchors, targets, prototypes), bank = anchors_of(), bank_of()
    prior_strength = torch.tensor([3.0, 0.5, 1.0])
    vectors, offsets = fit_classes(anchors, targets, prototypes, prior_strength, bank)
    for c in range(3):
        alone = torch.where(targets == c, 0, -1)
        v, o = fit_classes(anchors, alone, prototypes[c : c + 1], prior_strength[c : c + 1], bank)
        torch.testing.assert_close(vectors[c], v[0], rtol=0, atol=2e-3)
        torch.testing.assert_close(offsets[c], o[0], rtol=0, atol=2e-2)


def test_many_classes_are_fitted_in_parts(monkeypatch):
    (anchors, targets, prototypes), bank = anchors_of(n=5), bank_of()
    prior_strength = torch.tensor([3.0, 0.5, 1.0, 2.0, 0.7])
    expected = fit_classes(anchors, targets, prototypes, prior_strength, bank)
    sizes, minimize = [], module._minimize
    monkeypatch.setattr(module, "CLASSES", 2)
    monkeypatch.setattr(module, "_minimize", lambda *args: sizes.append(args[2].shape[1]) or minimize(*args))
    vectors, offsets = fit_classes(anchors, targets, prototypes, prior_strength, bank)
    assert sizes == [2, 2, 1]
    torch.testing.assert_close(vectors, expected[0], rtol=0, atol=2e-3)
    torch.testing.assert_close(offsets, expected[1], rtol=0, atol=2e-2)


def test_infinite_and_finite_pulls_mix():
    (anchors, targets, prototypes), bank = anchors_of(n=4), bank_of()
    prior_strength = torch.tensor([INF, 1.0, INF, 2.0])
    vectors, offsets = fit_classes(anchors, targets, prototypes, prior_strength, bank)
    assert torch.equal(vectors[[0, 2]], prototypes[[0, 2]]) and not offsets[[0, 2]].any()
    finite = fit_classes(anchors, targets, prototypes, torch.tensor([5.0, 1.0, 5.0, 2.0]), bank)
    torch.testing.assert_close(vectors[[1, 3]], finite[0][[1, 3]], rtol=0, atol=2e-3)
    torch.testing.assert_close(offsets[[1, 3]], finite[1][[1, 3]], rtol=0, atol=2e-2)


def test_of_many_negatives_the_hardest_are_used_and_all_positives(monkeypatch):
    (anchors, targets, prototypes), bank = anchors_of(), bank_of()
    prior_strength = torch.full((3,), 0.5)
    monkeypatch.setattr(module, "NEGATIVES", 40)
    found = fit_classes(anchors, targets, prototypes, prior_strength, bank)
    hardness = []
    for e, level in zip(anchors.embeds, anchors.level):
        hardness.append(
            max(bank.logit_scale[level].item() * (e @ p).item() + bank.bias[level].item() for p in prototypes)
        )
    negatives = [i for i in range(len(targets)) if targets[i] < 0]
    chosen = sorted(negatives, key=lambda i: -hardness[i])[:40] + (targets >= 0).nonzero()[:, 0].tolist()
    monkeypatch.setattr(module, "NEGATIVES", 10_000)
    part = Anchors(*(x[sorted(chosen)] for x in anchors))
    expected = fit_classes(part, targets[sorted(chosen)], prototypes, prior_strength, bank)
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-5)
    every = fit_classes(anchors, targets, prototypes, prior_strength, bank)
    assert not torch.allclose(found[1], every[1], atol=0.1)


def test_weights_of_almost_zero_do_not_outweigh_the_pull():
    (anchors, targets, prototypes), bank = anchors_of(), bank_of()
    faint = anchors._replace(weight=torch.where(targets < 0, anchors.weight, anchors.weight * 1e-15))
    for prior_strength, far in ((3.0, 100), (1e7, 0.1)):
        vectors, offsets = fit_classes(faint, targets, prototypes, torch.full((3,), prior_strength), bank)
        assert (vectors - prototypes).norm(dim=1).max() < far and offsets.isfinite().all()


def test_a_fit_leaves_its_arguments_as_they_are_and_needs_no_gradients():
    (anchors, targets, prototypes), bank = anchors_of(), bank_of()
    before = [x.clone() for x in (*anchors, targets, prototypes, bank.logit_scale, bank.bias)]
    with torch.no_grad():
        first = fit_classes(anchors, targets, prototypes, torch.ones(3), bank)
    second = fit_classes(anchors, targets, prototypes, torch.ones(3), bank)
    assert all(map(torch.equal, first, second)) and not any(x.requires_grad for x in first)
    assert all(map(torch.equal, before, (*anchors, targets, prototypes, bank.logit_scale, bank.bias)))
    assert bank.logit_scale.grad is None and bank.bias.grad is None


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


def test_classifiers_of_a_branch_are_fitted_on_its_anchors_from_the_means_of_its_objects():
    features, bank, prior_strength = features_of(branches=2), bank_of(), torch.tensor([0.5, 1.0, INF])
    outcomes = []
    for b in range(2):
        anchors = features.anchors[b]
        targets = torch.tensor([int(features.cls[i]) if i >= 0 else -1 for i in anchors.objects.tolist()])
        means = torch.stack([features.embeds[b][features.cls == c].mean(0) for c in range(3)])
        means = means / means.norm(dim=1, keepdim=True)
        expected = fit_classes(anchors, targets, means, prior_strength, bank)
        found = classifiers(features, features.cls, prior_strength, b, bank)
        torch.testing.assert_close(found[0], expected[0], rtol=0, atol=2e-3)
        torch.testing.assert_close(found[1], expected[1], rtol=0, atol=2e-2)
        torch.testing.assert_close(found[0][2], means[2])
        outcomes.append(found[0])
    assert not torch.allclose(*outcomes, atol=0.1)


def test_objects_that_are_left_out_have_no_part_in_a_mean():
    features, bank = features_of(), bank_of()
    labels = torch.where(torch.arange(9) < 3, -1, features.cls)
    vectors, offsets = classifiers(features, labels, torch.full((3,), INF), 0, bank)
    for c in range(3):
        mean = features.embeds[0][3:][features.cls[3:] == c].mean(0)
        torch.testing.assert_close(vectors[c], mean / mean.norm())
    assert not offsets.any()


def test_the_offset_follows_how_rare_a_class_is_among_the_anchors():
    """With embeddings of zero only the offset is left to fit, and its minimum has a closed form without a prior."""
    anchors, targets, prototypes = anchors_of(n=1, own=50, others=150)
    anchors = anchors._replace(
        embeds=torch.zeros_like(anchors.embeds),
        weight=torch.where(targets >= 0, 0.8, 0.5),
        level=torch.zeros_like(anchors.level),
    )
    vectors, offsets = fit_classes(anchors, targets, prototypes, torch.tensor([1e-5]), bank_of())
    rate = 0.8 * 50 / (50 + 0.5 * 150)
    assert offsets.item() == pytest.approx(math.log(rate / (1 - rate)) + 4.0, abs=1e-2)
    torch.testing.assert_close(vectors, prototypes, rtol=0, atol=1e-3)
