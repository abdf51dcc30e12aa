import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_detection import D, features_of

from yolo_fewshot.enroll.agreement import agreement


def unit(v):
    return v / np.linalg.norm(v)


def agreement_by_loops(embeds, labels, n):
    """Of every object the similarity to its class, to the nearest other one, that class, and whether it is suspect."""
    embeds, found = embeds.double().numpy(), [[None, None, -1, False] for _ in labels]
    members = {c: [i for i, k in enumerate(labels) if k == c] for c in range(n)}
    members = {c: rows for c, rows in members.items() if rows}
    center = np.mean([unit(sum(embeds[i] for i in rows)) for rows in members.values()], axis=0)
    centered = [unit(e - center) for e in embeds]
    for c, rows in members.items():
        for i in rows:
            rest = [centered[j] for j in rows if j != i]
            found[i][0] = float(centered[i] @ unit(sum(rest))) if rest else None
            similarity = [
                (float(centered[i] @ unit(sum(centered[j] for j in other))), k)
                for k, other in members.items()
                if k != c
            ]
            found[i][1:3] = max(similarity)
        if len(rows) >= 3:
            usual = sorted(found[i][0] for i in rows)[(len(rows) - 1) // 2]
            for i in rows:
                found[i][3] = found[i][0] < found[i][1] and found[i][0] < usual / 2
    return found


@pytest.mark.parametrize("seed", range(6))
def test_agreement_equals_loops(seed):
    features = clouds([6, 3, 2, 1, 4, 2], noise=0.4, seed=seed)
    labels = features.cls.clone()
    labels[features.cls == 5] = -1  # a class without an object, and objects without a class
    labels[[0, 7]] = torch.tensor([4, 0])
    found = agreement(features, labels, 6)
    expected = agreement_by_loops(features.embeds[0], labels.tolist(), 6)
    for figures, column in zip(found[:2], (0, 1)):
        values = [None if math.isnan(x) else x for x in figures.tolist()]
        assert values == [None if x[column] is None else pytest.approx(x[column], abs=1e-5) for x in expected]
    assert found.nearest.tolist() == [x[2] for x in expected]
    assert found.suspect.tolist() == [x[3] for x in expected] and any(found.suspect)
    single = labels == 3
    assert found.sim_own[single].isnan().all() and not found.sim_other[single].isnan().any()


def clouds(counts, noise=0.2, seed=0):
    """Objects of classes, one to an image, that lie about an axis each."""
    torch.manual_seed(seed)
    cls = torch.tensor([c for c, k in enumerate(counts) for _ in range(k)])
    embeds = F.normalize(torch.eye(D)[cls] + noise * torch.randn(len(cls), D), dim=1)
    return features_of([(int(c), i, [0, 0, 9, 9]) for i, c in enumerate(cls)], embeds=embeds)


def suspect(features, labels, n):
    """The suspect objects."""
    return agreement(features, labels, n).suspect.nonzero()[:, 0].tolist()


@pytest.mark.parametrize("seed", range(5))
def test_a_shot_with_the_label_of_another_class_is_suspect(seed):
    features = clouds([5, 5, 5], noise=0.15, seed=seed)
    assert suspect(features, features.cls, 3) == []
    swapped = features.cls.clone()
    swapped[7] = 2  # of class 1
    assert suspect(features, swapped, 3) == [7] and agreement(features, swapped, 3).nearest[7] == 1


def test_classes_of_fewer_than_three_shots_are_not_judged():
    features = clouds([5, 2, 2])
    swapped = features.cls.clone()
    swapped[[5, 7]] = torch.tensor([2, 1])  # one of either small class
    assert suspect(features, swapped, 3) == []
    features = clouds([5, 2])
    swapped = features.cls.clone()
    swapped[0] = 1  # the third of its class
    assert suspect(features, swapped, 2) == [0]


def test_an_outlier_is_suspect_only_if_it_is_similar_to_another_class():
    features = clouds([5, 5], noise=0.05)
    features.embeds[0][2] = torch.eye(D)[4]
    assert suspect(features, features.cls, 2) == []
    features.embeds[0][2] = F.normalize(torch.eye(D)[0] * 0.7 + torch.eye(D)[1] * 0.75, dim=0)
    assert suspect(features, features.cls, 2) == []  # more like another, but like its own too


def test_a_single_class_is_not_judged():
    features = clouds([5, 5])
    for labels, n in ((features.cls.clamp(max=0), 1), (torch.where(features.cls == 1, -1, 0), 2)):
        found = agreement(features, labels, n)
        assert found.sim_own.isnan().all() and found.sim_other.isnan().all()
        assert (found.nearest == -1).all() and not found.suspect.any()


def test_left_out_objects_are_neither_judged_nor_compared():
    features = clouds([5, 5, 5])
    labels = torch.where(features.cls == 1, -1, features.cls)
    labels[0] = -1
    features.embeds[0][1] = torch.eye(D)[1]  # like the class that is left out
    assert suspect(features, labels, 3) == []
    found = agreement(features, labels, 3)
    assert found.sim_own[labels < 0].isnan().all() and (found.nearest[labels == 0] == 2).all()


# Levels with a space of their own -------------------------------------------------------------------------------------

LEVELS = 3


def by_level(embeds, share):
    """Embeddings with a part for each level, of unit length, in features whose anchors have the size of a part."""
    parts = F.normalize(embeds, dim=2) * share[..., None]
    return F.normalize(parts.flatten(1), dim=1)


def levels_of(cls, embeds, share):
    features = features_of([(int(c), i, [0, 0, 9, 9]) for i, c in enumerate(cls)], embeds=by_level(embeds, share))
    anchors = [x._replace(embeds=x.embeds[:, : embeds.shape[2]]) for x in features.anchors]
    assert anchors[0].embeds.shape[1] == embeds.shape[2]
    return features._replace(anchors=anchors)


def agreement_by_levels(embeds, labels, n, parts):
    """As `agreement_by_loops`, with the mean cosine over the levels where both have an anchor."""
    size = embeds.shape[1] // parts
    pieces = embeds.double().numpy().reshape(len(embeds), parts, size)
    share = np.linalg.norm(pieces, axis=2)
    centered = np.zeros_like(pieces)
    for p in range(parts):
        here = [i for i, k in enumerate(labels) if k >= 0 and share[i, p] > 0]
        classes = {labels[i] for i in here}
        means = [unit(sum(unit(pieces[i, p]) for i in here if labels[i] == c)) for c in classes]
        for i in here:
            centered[i, p] = unit(unit(pieces[i, p]) - np.mean(means, axis=0))

    def similarity(i, others):
        found = []
        for p in range(parts):
            total = sum((centered[j, p] * share[j, p] for j in others), np.zeros(size))
            if share[i, p] > 0 and np.linalg.norm(total) > 1e-6:
                found.append((share[i, p], float(centered[i, p] @ unit(total))))
        return sum(w * x for w, x in found) / sum(w for w, _ in found) if found else None

    rows = []
    members = {c: [i for i, k in enumerate(labels) if k == c] for c in set(labels) if c >= 0}
    for i, c in enumerate(labels):
        if c < 0:
            rows.append((None, None, -1))
            continue
        own = similarity(i, [j for j in members[c] if j != i])
        others = [(similarity(i, m), k) for k, m in members.items() if k != c]
        others = [x for x in others if x[0] is not None]
        rows.append((own, *(max(others) if others else (None, -1))))
    return rows


@pytest.mark.parametrize("seed", range(6))
def test_agreement_of_levels_is_that_of_loops(seed):
    torch.manual_seed(seed)
    cls = torch.tensor([0] * 5 + [1] * 4 + [2] * 2 + [3])
    embeds = torch.eye(D)[cls][:, None] + 0.4 * torch.randn(len(cls), LEVELS, D)
    share = torch.rand(len(cls), LEVELS) * (torch.rand(len(cls), LEVELS) > 0.4)
    share[share.sum(1) == 0, 0] = 1.0
    features = levels_of(cls, embeds, share)
    found = agreement(features, cls, 4)
    expected = agreement_by_levels(features.embeds[0], cls.tolist(), 4, LEVELS)
    for figures, column in zip(found[:2], (0, 1)):
        values = [None if math.isnan(x) else x for x in figures.tolist()]
        assert values == [None if x[column] is None else pytest.approx(x[column], abs=1e-4) for x in expected]
    assert found.nearest.tolist() == [x[2] for x in expected]


def test_one_level_is_the_plain_cosine():
    features = clouds([5, 4, 3], noise=0.4)
    assert features.embeds[0].shape[1] == features.anchors[0].embeds.shape[1]
    found = agreement(features, features.cls, 3)
    for row, expected in zip(
        zip(*(x.tolist() for x in found[:2])), agreement_by_loops(features.embeds[0], features.cls, 3)
    ):
        assert row == pytest.approx(expected[:2], abs=1e-5)
    alone = torch.zeros(len(features.cls), LEVELS)
    alone[:, 1] = 1.0  # all objects at the same one of three levels
    embeds = features.embeds[0][:, None].repeat(1, LEVELS, 1)
    torch.testing.assert_close(agreement(levels_of(features.cls, embeds, alone), features.cls, 3), found)


def test_an_object_at_a_level_of_its_own_is_not_suspect():
    """No other object of its class has an anchor there, so that nothing can be said of it."""
    torch.manual_seed(0)
    cls = torch.tensor([0] * 5 + [1] * 5)
    embeds = F.normalize(torch.eye(D)[cls] + 0.1 * torch.randn(10, D), dim=1)[:, None].repeat(1, LEVELS, 1)
    share = torch.zeros(10, LEVELS)
    share[:, 0] = 1.0
    share[2] = torch.tensor([0.0, 1.0, 0.0])
    embeds[2] = torch.eye(D)[1]  # it looks like the other class, objects of which are at its level, too
    share[5:7, 1] = 0.5
    found = agreement(levels_of(cls, embeds, share), cls, 2)
    assert found.sim_own[2].isnan() and not found.sim_other[2].isnan() and found.nearest[2] == 1
    assert not found.suspect.any()
    share[2] = torch.tensor([1.0, 0.0, 0.0])  # at the level of the others of its class
    assert agreement(levels_of(cls, embeds, share), cls, 2).suspect.nonzero()[:, 0].tolist() == [2]


def test_an_object_whose_level_no_other_class_shares_has_no_nearest_class():
    cls = torch.tensor([0, 0, 0, 1, 1])
    share = torch.tensor([[1.0, 0, 0]] * 3 + [[0, 0, 1.0]] * 2)
    found = agreement(levels_of(cls, torch.rand(5, LEVELS, D), share), cls, 2)
    assert found.sim_other.isnan().all() and (found.nearest == -1).all() and not found.suspect.any()
