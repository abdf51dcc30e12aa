import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from yolo_fewshot.enroll import fit as module
from yolo_fewshot.enroll.features import Anchors
from yolo_fewshot.enroll.fit import fit_classes, fit_levels, fit_scale
from yolo_fewshot.nn.head import Prototypes
from yolo_fewshot.nn.rows import LevelSpace


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


# Levels with a space of their own -------------------------------------------------------------------------------------

SPACE = LevelSpace(torch.tensor([-4.0, -3.0, -2.5]), 12)


def logistic(x, x0, features, bias, targets, weight, mass, prior):
    """Value, gradient and Hessian of a weighted logistic loss with an L2 prior around x0, in float64."""
    z = features @ x + bias
    sigmoid = 1 / (1 + np.exp(-z))
    value = (weight * (np.logaddexp(0, z) - targets * z)).sum() / mass + (prior * (x - x0) ** 2).sum()
    gradient = features.T @ (weight * (sigmoid - targets)) / mass + 2 * prior * (x - x0)
    hessian = (features.T * (weight * sigmoid * (1 - sigmoid))) @ features / mass + 2 * np.diag(prior)
    return value, gradient, hessian


def newton_logistic(features, *args):
    """Minimize it from zero, which is also the mean of the prior, by Newton's method with halved steps."""
    zero = np.zeros(features.shape[1])
    x = zero
    for _ in range(100):
        value, gradient, hessian = logistic(x, zero, features, *args)
        step, size = np.linalg.solve(hessian, gradient), 1.0
        while size > 1e-9 and logistic(x - size * step, zero, features, *args)[0] > value:
            size /= 2
        x = x - size * step
    assert np.abs(gradient).max() < 1e-6
    return x, logistic(x, zero, features, *args)[0]


def problem_of(anchors, targets, c, rows, share=1.0):
    """Embeddings, targets and weights of some anchors for one class, in float64, and the mass of the class."""
    e, w, t = (x.double().numpy() for x in (anchors.embeds, anchors.weight, (targets == c).double()))
    t = t * w
    w = np.where(anchors.objects.numpy() < 0, w, 1.0) * share
    return e[rows], t[rows], np.broadcast_to(w, t.shape)[rows], t.sum()


def newton_level(anchors, targets, c, level, prior_strength, rows=None, share=1.0):
    """Vector, offset and value of one class at one level, as `fit_levels` states the objective."""
    rows = np.flatnonzero(anchors.level.numpy() == level) if rows is None else rows
    e, t, w, mass = problem_of(anchors, targets, c, rows, share)
    features = np.concatenate([e, np.ones((len(e), 1))], 1)
    prior = prior_strength * np.r_[np.ones(e.shape[1]), 0.01]
    x, value = newton_logistic(features, float(SPACE.bias[level]), t, w, mass, prior)
    return x[:-1], x[-1], value


@pytest.mark.parametrize("prior_strength", [0.03, 0.6, 3.0, 100.0])
def test_a_fit_of_levels_is_the_minimum_of_the_stated_objective_at_each_level(prior_strength):
    anchors, targets, _ = anchors_of()
    vectors, offsets = fit_levels(anchors, targets, torch.full((3,), prior_strength), SPACE)
    assert vectors.shape == (3, 3, 12) and offsets.shape == (3, 3)
    for c in range(3):
        for level in range(3):
            v, o, least = newton_level(anchors, targets, c, level, prior_strength)
            rows = np.flatnonzero(anchors.level.numpy() == level)
            e, t, w, mass = problem_of(anchors, targets, c, rows)
            found = np.r_[vectors[c, level].double().numpy(), float(offsets[c, level])]
            features = np.concatenate([e, np.ones((len(e), 1))], 1)
            prior = prior_strength * np.r_[np.ones(12), 0.01]
            value = logistic(found, np.zeros(13), features, float(SPACE.bias[level]), t, w, mass, prior)[0]
            assert least - 1e-9 < value < least + 1e-4 * abs(least)
            torch.testing.assert_close(vectors[c, level], torch.tensor(v).float(), rtol=0, atol=1e-2)
            assert offsets[c, level].item() == pytest.approx(o, abs=5e-2)


def test_classes_of_a_fit_of_levels_do_not_influence_each_other_and_are_fitted_in_parts(monkeypatch):
    anchors, targets, _ = anchors_of(n=5)
    prior_strength = torch.tensor([3.0, 0.5, 1.0, 2.0, 0.7])
    expected = fit_levels(anchors, targets, prior_strength, SPACE)
    monkeypatch.setattr(module, "CLASSES_AT_ONCE", 2)
    found = fit_levels(anchors, targets, prior_strength, SPACE)
    alone = fit_levels(anchors, torch.where(targets == 3, 0, -1), prior_strength[3:4], SPACE)
    for x, y, z in zip(expected, found, alone):
        torch.testing.assert_close(x, y, rtol=0, atol=3e-2)
        torch.testing.assert_close(x[3:4], z, rtol=0, atol=3e-2)


def test_at_a_level_without_an_anchor_of_a_class_its_score_stays_low():
    anchors, targets, _ = anchors_of(n=2)
    targets[(targets == 1) & (anchors.level == 0)] = -1
    vectors, offsets = fit_levels(anchors, targets, torch.tensor([0.1, 0.1]), SPACE)
    at = anchors.level == 0
    logits = SPACE.logits(anchors.embeds[at], anchors.level[at], vectors, offsets)
    assert logits[:, 1].max() < -3 and logits[targets[at] == 0, 0].max() > -1
    anchors = anchors._replace(level=anchors.level.clamp(min=1))  # no anchor at all
    vectors, offsets = fit_levels(anchors, targets, torch.tensor([0.1, 0.1]), SPACE)
    assert not vectors[:, 0].any() and not offsets[:, 0].any() and vectors[:, 1].any(1).all()


def negatives_by_hand(anchors, targets, level, prior_strength, limit):
    """The anchors of a level in the fit of one class, and their weights; a fit on spread negatives ranks them."""
    rows = np.flatnonzero(anchors.level.numpy() == level)
    positive = targets.numpy()[rows] >= 0
    negatives = rows[~positive]
    step = -(-len(negatives) // limit)
    spread, share = np.r_[rows[positive], negatives[::step]], np.ones(len(targets))
    share[negatives] = step
    v, o, _ = newton_level(anchors, targets, 0, level, prior_strength, spread, share)
    ranked = negatives[np.argsort(-(anchors.embeds.double().numpy()[negatives] @ v + o))]
    others = ranked[limit // 2 :]
    step = -(-len(others) // (limit // 2))
    share = np.ones(len(targets))
    share[others[::step]] = step
    return np.r_[rows[positive], ranked[: limit // 2], others[::step]], share


def test_of_many_negatives_of_a_level_the_hardest_and_a_share_of_the_others_count(monkeypatch):
    anchors, targets, _ = anchors_of(n=1, own=30, others=600)
    prior_strength = torch.tensor([1.0])
    every = fit_levels(anchors, targets, prior_strength, SPACE)
    monkeypatch.setattr(module, "MAX_NEGATIVES", 60)  # of 200 at a level
    vectors, offsets = fit_levels(anchors, targets, prior_strength, SPACE)
    for level in range(3):
        rows, share = negatives_by_hand(anchors, targets, level, 1.0, 60)
        v, o, _ = newton_level(anchors, targets, 0, level, 1.0, rows, share)
        torch.testing.assert_close(vectors[0, level], torch.tensor(v).float(), rtol=0, atol=2e-2)
        assert offsets[0, level].item() == pytest.approx(o, abs=5e-2)
    torch.testing.assert_close(offsets, every[1], rtol=0, atol=0.4)  # an estimate of the fit on all of them
    assert not torch.equal(offsets, every[1])


@pytest.mark.parametrize("fit", [fit_levels, fit_scale])
def test_where_many_negatives_look_like_the_objects_easy_ones_still_score_low(fit, monkeypatch):
    """As in images of dozens of objects: the hardest negatives alone lie where the objects do."""
    anchors, targets, _ = anchors_of(n=1, own=60, others=3000)
    embeds, other = anchors.embeds.clone(), (targets < 0).nonzero()[:, 0]
    embeds[other] -= 2 * embeds[targets == 0].mean(0)  # easy ones lie on the other side
    embeds[other[::3]] = embeds[targets == 0].mean(0)
    anchors = anchors._replace(embeds=embeds)
    scores = []
    for limit in (10_000, 300):
        monkeypatch.setattr(module, "MAX_NEGATIVES", limit)
        vectors, offsets = fit(anchors, targets, torch.tensor([1.0]), SPACE)
        logits = SPACE.logits(embeds, anchors.level, vectors, offsets)[:, 0]
        easy = torch.ones(len(other), dtype=torch.bool)
        easy[::3] = False
        scores.append(logits[other[easy]].mean().item())
        assert logits[targets == 0].mean() > scores[-1] + 1
    assert scores[1] == pytest.approx(scores[0], abs=1.0)


@pytest.mark.parametrize("limit", [10_000, 80])
def test_a_fit_of_the_scale_is_the_minimum_along_the_mean_embedding(limit, monkeypatch):
    monkeypatch.setattr(module, "MAX_NEGATIVES", limit)
    anchors, targets, _ = anchors_of()
    strengths = torch.tensor([3.0, 0.5, 0.1])
    vectors, offsets = fit_scale(anchors, targets, strengths, SPACE)
    level, e, w = anchors.level.numpy(), anchors.embeds.double().numpy(), anchors.weight.double().numpy()
    bias = SPACE.bias.double().numpy()[level]
    for c in range(3):
        own = targets.numpy() == c
        direction = np.stack([(e * w[:, None])[own & (level == i)].sum(0) for i in range(3)])
        direction /= np.linalg.norm(direction)
        x = (e * direction[level]).sum(1)
        others, step = np.flatnonzero(~own), -(-int((~own).sum()) // limit)
        rows = np.r_[np.flatnonzero(own), others[::step]]
        _, t, weight, mass = problem_of(anchors, targets, c, rows)
        weight = weight * np.where(own[rows], 1, step)
        features = np.stack([x[rows], np.ones(len(rows))], 1)
        (scale, offset), _ = newton_logistic(
            features, bias[rows], t, weight, mass, float(strengths[c]) * np.r_[1, 0.01]
        )
        expected = torch.tensor(scale * direction).float()
        torch.testing.assert_close(vectors[c], expected, rtol=0, atol=1e-2)
        assert offsets[c].tolist() == pytest.approx([offset] * 3, abs=5e-2) and scale > 0.1


def test_the_fits_of_levels_leave_their_arguments_as_they_are():
    anchors, targets, _ = anchors_of()
    before = [x.clone() for x in (*anchors, targets)]
    for fit in (fit_levels, fit_scale):
        with torch.no_grad():
            first = fit(anchors, targets, torch.ones(3), SPACE)
        second = fit(anchors, targets, torch.ones(3), SPACE)
        assert all(map(torch.equal, first, second)) and not any(x.requires_grad for x in first)
    assert all(map(torch.equal, before, (*anchors, targets)))


def test_the_weights_of_a_class_count_at_all_levels_together():
    """With embeddings of zero the offset of a level has a closed form: the share of its anchors, without a prior."""
    anchors, targets, _ = anchors_of(n=1, own=60, others=240)
    weight = torch.where(targets >= 0, 0.8, 0.5)
    anchors = anchors._replace(embeds=torch.zeros_like(anchors.embeds), weight=weight)
    _, offsets = fit_levels(anchors, targets, torch.tensor([1e-6]), SPACE)
    for level in range(3):
        at = anchors.level == level
        positive, negative = int((at & (targets >= 0)).sum()), int((at & (targets < 0)).sum())
        rate = 0.8 * positive / (positive + 0.5 * negative)
        expected = math.log(rate / (1 - rate)) - SPACE.bias[level].item()
        assert offsets[0, level].item() == pytest.approx(expected, abs=2e-2)


@pytest.mark.parametrize("size", [1e3, 1e19, 1e30, 3e38])
def test_features_beyond_float32_leave_the_means(size):
    """As of a network whose training diverged, which must still end with a checkpoint."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(50, 8, generator=g) * size, torch.zeros(50, 2)
    y[:5, 0] = y[5:9, 1] = 1
    means = F.normalize(torch.randn(2, 8, generator=g), dim=1)
    vectors, offsets = module._minimize(x, torch.zeros(50), y, torch.ones(50), means, torch.ones(2))
    assert vectors.isfinite().all() and offsets.isfinite().all()
    assert torch.equal(vectors, means) == (size in {1e19, 3e38})
