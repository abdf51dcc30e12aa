import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from yolo_fewshot.enroll import fit as module
from yolo_fewshot.enroll.features import Anchors
from yolo_fewshot.enroll.fit import fit_classes
from yolo_fewshot.nn.head import Prototypes


def prototypes_of(d=12):
    prototypes = Prototypes(1, d, 3)
    prototypes.logit_scale.data[:] = torch.tensor([0.7, 1.0, 1.4])
    prototypes.bias.data[:] = torch.tensor([-4.0, -3.0, -2.5])
    return prototypes


def anchors_of(n=3, own=15, others=300, d=12, seed=0):
    """Anchors of n classes, which lie about a direction of their own, with those of no class in between.

    A third of the latter count less than the others do.
    """
    rng = torch.Generator().manual_seed(seed)
    targets = torch.cat([torch.arange(n).repeat(own), torch.full((others,), -1)])
    targets = targets[torch.randperm(len(targets), generator=rng)]
    means = F.normalize(torch.randn(n, d, generator=rng), dim=1)
    embeds = torch.randn(len(targets), d, generator=rng)
    embeds[targets >= 0] += 2 * means[targets[targets >= 0]]
    less = torch.where(torch.rand(len(targets), generator=rng) < 1 / 3, 0.3, 1.0)
    weight = torch.where(targets >= 0, torch.rand(len(targets), generator=rng), less)
    level = torch.randint(0, 3, (len(targets),), generator=rng)
    none = torch.zeros(len(targets), dtype=torch.int64)
    return Anchors(embeds, level, torch.zeros(len(targets), 4), targets, weight, none, none), targets, means


def objective(v, o, anchors, targets, c, mean, prior_strength, prototypes):
    """Objective of one class as `fit_classes` states it, with gradient and Hessian, in float64."""
    s, b = (x.detach().double().numpy()[anchors.level.numpy()] for x in (prototypes.logit_scale, prototypes.bias))
    e, p = anchors.embeds.double().numpy(), mean.double().numpy()
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


def bce(vectors, offsets, anchors, targets, c, means, prototypes):
    return objective(vectors[c].double().numpy(), float(offsets[c]), anchors, targets, c, means[c], 0.0, prototypes)[0]


@pytest.mark.parametrize("prior_strength", [0.03, 0.6, 3.0, 100.0])
def test_a_fit_is_the_minimum_of_the_stated_objective(prior_strength):
    (anchors, targets, means), prototypes = anchors_of(), prototypes_of()
    vectors, offsets = fit_classes(anchors, targets, means, torch.full((3,), prior_strength), prototypes)
    for c in range(3):
        args = (anchors, targets, c, means[c], prior_strength, prototypes)
        v, o = newton(*args)
        least = objective(v, o, *args)[0]
        found = objective(vectors[c].double().numpy(), float(offsets[c]), *args)[0]
        assert least - 1e-9 < found < least + 1e-4 * abs(least)
        torch.testing.assert_close(vectors[c], torch.tensor(v).float(), rtol=0, atol=5e-3)
        assert offsets[c].item() == pytest.approx(o, abs=3e-2)
        assert np.abs(v - means[c].numpy()).max() > (1e-2 if prior_strength < 10 else 0)  # the mean is not the minimum


def test_a_smaller_prior_strength_gives_a_closer_fit_farther_from_the_mean():
    (anchors, targets, means), prototypes = anchors_of(), prototypes_of()
    losses, ways = [], []
    for prior_strength in (1e6, 100.0, 3.0, 0.1):
        vectors, offsets = fit_classes(anchors, targets, means, torch.full((3,), prior_strength), prototypes)
        losses.append([bce(vectors, offsets, anchors, targets, c, means, prototypes) for c in range(3)])
        ways.append((vectors - means).norm(dim=1).tolist())
    assert (np.diff(losses, axis=0) < 0).all() and (np.diff(ways, axis=0) > 0).all()
    assert max(ways[0]) < 1e-3


def test_classes_do_not_influence_each_other():
    (anchors, targets, means), prototypes = anchors_of(), prototypes_of()
    prior_strength = torch.tensor([3.0, 0.5, 1.0])
    vectors, offsets = fit_classes(anchors, targets, means, prior_strength, prototypes)
    for c in range(3):
        alone = torch.where(targets == c, 0, -1)
        v, o = fit_classes(anchors, alone, means[c : c + 1], prior_strength[c : c + 1], prototypes)
        torch.testing.assert_close(vectors[c], v[0], rtol=0, atol=2e-3)
        torch.testing.assert_close(offsets[c], o[0], rtol=0, atol=2e-2)


def test_many_classes_are_fitted_in_parts(monkeypatch):
    (anchors, targets, means), prototypes = anchors_of(n=5), prototypes_of()
    prior_strength = torch.tensor([3.0, 0.5, 1.0, 2.0, 0.7])
    expected = fit_classes(anchors, targets, means, prior_strength, prototypes)
    sizes, minimize = [], module._minimize
    monkeypatch.setattr(module, "CLASSES_AT_ONCE", 2)
    monkeypatch.setattr(module, "_minimize", lambda *args: sizes.append(args[2].shape[1]) or minimize(*args))
    vectors, offsets = fit_classes(anchors, targets, means, prior_strength, prototypes)
    assert sizes == [2, 2, 1]
    torch.testing.assert_close(vectors, expected[0], rtol=0, atol=2e-3)
    torch.testing.assert_close(offsets, expected[1], rtol=0, atol=2e-2)


def test_all_positives_and_the_hardest_of_many_negatives_are_used(monkeypatch):
    (anchors, targets, means), prototypes = anchors_of(), prototypes_of()
    prior_strength = torch.full((3,), 0.5)
    monkeypatch.setattr(module, "MAX_NEGATIVES", 40)
    found = fit_classes(anchors, targets, means, prior_strength, prototypes)
    hardness = []
    for e, level in zip(anchors.embeds, anchors.level):
        hardness.append(
            max(prototypes.logit_scale[level].item() * (e @ p).item() + prototypes.bias[level].item() for p in means)
        )
    negatives = [i for i in range(len(targets)) if targets[i] < 0]
    chosen = sorted(negatives, key=lambda i: -hardness[i])[:40] + (targets >= 0).nonzero()[:, 0].tolist()
    monkeypatch.setattr(module, "MAX_NEGATIVES", 10_000)
    part = Anchors(*(x[sorted(chosen)] for x in anchors))
    expected = fit_classes(part, targets[sorted(chosen)], means, prior_strength, prototypes)
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-5)
    every = fit_classes(anchors, targets, means, prior_strength, prototypes)
    assert not torch.allclose(found[1], every[1], atol=0.1)


def test_tiny_weights_do_not_outweigh_the_prior():
    (anchors, targets, means), prototypes = anchors_of(), prototypes_of()
    faint = anchors._replace(weight=torch.where(targets < 0, anchors.weight, anchors.weight * 1e-15))
    for prior_strength, far in ((3.0, 100), (1e7, 0.1)):
        vectors, offsets = fit_classes(faint, targets, means, torch.full((3,), prior_strength), prototypes)
        assert (vectors - means).norm(dim=1).max() < far and offsets.isfinite().all()


def test_a_fit_does_not_modify_its_arguments_and_works_under_no_grad():
    (anchors, targets, means), prototypes = anchors_of(), prototypes_of()
    before = [x.clone() for x in (*anchors, targets, means, prototypes.logit_scale, prototypes.bias)]
    with torch.no_grad():
        first = fit_classes(anchors, targets, means, torch.ones(3), prototypes)
    second = fit_classes(anchors, targets, means, torch.ones(3), prototypes)
    assert all(map(torch.equal, first, second)) and not any(x.requires_grad for x in first)
    assert all(map(torch.equal, before, (*anchors, targets, means, prototypes.logit_scale, prototypes.bias)))
    assert prototypes.logit_scale.grad is None and prototypes.bias.grad is None


def test_the_offset_increases_with_the_share_of_anchors_of_a_class():
    """With embeddings of zero only the offset is left to fit, and its minimum has a closed form without a prior."""
    anchors, targets, means = anchors_of(n=1, own=50, others=150)
    anchors = anchors._replace(
        embeds=torch.zeros_like(anchors.embeds),
        weight=torch.where(targets >= 0, 0.8, 0.5),
        level=torch.zeros_like(anchors.level),
    )
    vectors, offsets = fit_classes(anchors, targets, means, torch.tensor([1e-5]), prototypes_of())
    rate = 0.8 * 50 / (50 + 0.5 * 150)
    assert offsets.item() == pytest.approx(math.log(rate / (1 - rate)) + 4.0, abs=1e-2)
    torch.testing.assert_close(vectors, means, rtol=0, atol=1e-3)
