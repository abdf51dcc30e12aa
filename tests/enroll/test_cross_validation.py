import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from yolo_fewshot.enroll import cross_validation as module
from yolo_fewshot.enroll.cross_validation import (
    Detections,
    agreement,
    ap50,
    best_conf,
    detect,
    detect_left_out,
    folds,
    select,
    thresholds,
)
from yolo_fewshot.enroll.features import Anchors, Features
from yolo_fewshot.nn.head import Prototypes

D = 6
EVERY = torch.ones(100, dtype=torch.bool)


@pytest.fixture
def bank():
    bank = Prototypes(1, D, 3)
    bank.logit_scale.data[:] = torch.tensor([1.0, 1.5, 2.0])
    bank.bias.data[:] = torch.tensor([-1.0, -0.5, 0.0])
    return bank


def features_of(objects, anchors=(), embeds=None):
    """Features from objects (class, image, box) and anchors (image, view, level, box, embedding[, object])."""
    cls, image, boxes = zip(*objects)
    rows = [(*a, -1)[:6] for a in anchors]
    kept = Anchors(
        torch.stack([torch.as_tensor(a[4]).float() for a in rows]) if rows else torch.zeros(0, D),
        torch.tensor([a[2] for a in rows], dtype=torch.int64),
        torch.tensor([a[3] for a in rows]).float().view(-1, 4),
        torch.tensor([a[5] for a in rows], dtype=torch.int64),
        torch.tensor([0.5 if a[5] >= 0 else 1.0 for a in rows]),
        torch.tensor([a[0] for a in rows], dtype=torch.int64),
        torch.tensor([a[1] for a in rows], dtype=torch.int64),
    )
    n = 1 + max([*image, *(a[0] for a in rows)])
    embeds = F.normalize(torch.ones(len(cls), D), dim=1) if embeds is None else embeds
    files = [f"{i}.png" for i in range(n)]
    boxes = torch.tensor(boxes).float()
    return Features(torch.tensor(cls), boxes, torch.tensor(image), files, [embeds], [kept], 2)


def scene(seed=0, n=8, classes=3):
    """Images with objects of some classes, and in two views good, poor and wrong anchors about them."""
    rng = torch.Generator().manual_seed(seed)

    def rand(*size):
        return torch.rand(*size, generator=rng)

    objects, anchors = [], []
    for p in range(n):
        for _ in range(int(rand(1) * 4)):
            corner, side = rand(2) * 60, 15 + rand(2) * 25
            box = torch.cat([corner, corner + side])
            c = int(rand(1) * classes)
            for _ in range(6):
                e = 1.5 * rand(D) - 0.75
                e[c] += 2
                where = (box + (rand(4) - 0.5) * 12).tolist()
                anchors.append((p, int(rand(1) < 0.3), int(rand(1) * 3), where, e, len(objects)))
            objects.append((c, p, box.tolist()))
        for _ in range(5):
            corner = rand(2) * 60
            box = torch.cat([corner, corner + 10 + rand(2) * 30]).tolist()
            anchors.append((p, int(rand(1) < 0.3), int(rand(1) * 3), box, 2 * rand(D) - 0.8))
    return features_of(objects, anchors)


ROWS = (torch.eye(3, D) * 1.2, torch.tensor([-0.5, 0.0, 0.3]))


def iou(a, b):
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inter = max(w, 0) * max(h, 0)
    return inter / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter)


def detect_by_loops(features, labels, images, rows, bank, conf):
    """Detections (class, confidence, hit) in descending order of confidence, and objects of every class."""
    anchors, found = features.anchors[0], []
    for p in range(len(features.files)):
        for c in range(len(rows[0])) if images[p] else ():
            scored = []
            for a in range(len(anchors.embeds)):
                if anchors.image[a] == p and anchors.view[a] == 0:
                    level = anchors.level[a]
                    logit = bank.logit_scale[level] * (anchors.embeds[a] @ rows[0][c]) + bank.bias[level] + rows[1][c]
                    score = logit.sigmoid().item()
                    if score > conf:
                        scored.append((score, anchors.boxes[a].tolist()))
            kept = []
            for score, box in sorted(scored, key=lambda x: -x[0]):
                if all(iou(box, other) <= 0.7 for _, other in kept):
                    kept.append((score, box))
            left = [o for o in range(len(labels)) if features.image[o] == p and labels[o] == c]
            for score, box in kept:
                best = max(left, key=lambda o: iou(box, features.boxes[o].tolist()), default=None)
                hit = best is not None and iou(box, features.boxes[best].tolist()) >= 0.5
                if hit:
                    left.remove(best)
                found.append((c, score, hit))
    truths = [0] * len(rows[0])
    for c, p in zip(labels.tolist(), features.image.tolist()):
        if c >= 0 and images[p]:
            truths[c] += 1
    return sorted(found, key=lambda x: -x[1]), truths


# Detections -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_detections_are_those_of_loops(bank, seed):
    features = scene(seed)
    labels = torch.where(torch.arange(len(features.cls)) % 5 == 4, -1, features.cls)
    images = torch.arange(8) % 4 != 2
    out = detect(features, labels, images, ROWS, bank, conf=0.2)
    expected, truths = detect_by_loops(features, labels, images, ROWS, bank, 0.2)
    assert out.cls.tolist() == [c for c, _, _ in expected] and out.hit.tolist() == [h for _, _, h in expected]
    assert out.conf.tolist() == pytest.approx([s for _, s, _ in expected], abs=1e-5)
    assert out.truths.tolist() == truths
    assert 0 < out.hit.sum() < len(out.hit)


def one_object(*anchors):
    return features_of(
        [(0, 0, [10, 10, 30, 30])], [(0, view, 0, box, strength * torch.eye(D)[0]) for box, view, strength in anchors]
    )


def hits(features, bank, **kwargs):
    out = detect(
        features, features.cls, EVERY[: len(features.files)], (torch.eye(1, D), torch.zeros(1)), bank, **kwargs
    )
    assert len(out.conf) == len(out.hit) == len(out.cls)
    return out.hit.tolist()


def test_of_two_detections_of_an_object_only_the_more_confident_is_a_hit(bank):
    wide, narrow = [10, 10, 36, 30], [10, 10, 30, 24]  # IoU of 0.77 and 0.7 with the object, and 0.54 with each other
    assert hits(one_object((wide, 0, 2), (narrow, 0, 3)), bank) == [True, False]
    assert hits(one_object((wide, 0, 2), (wide, 0, 3)), bank) == [True]  # one left by NMS


def test_a_detection_that_overlaps_too_little_is_no_hit(bank):
    assert hits(one_object(([10, 10, 30, 19], 0, 2)), bank) == [False]  # IoU of 0.45
    assert hits(one_object(([10, 10, 30, 21], 0, 2)), bank) == [True]  # 0.55


def test_only_the_plain_view_and_confident_anchors_count(bank):
    box = [10, 10, 30, 30]
    assert hits(one_object((box, 1, 2)), bank) == []
    score = torch.tensor(2.0 - 1.0).sigmoid().item()
    assert hits(one_object((box, 0, 2)), bank, conf=score - 0.01) == [True]
    assert hits(one_object((box, 0, 2)), bank, conf=score + 0.01) == []
    assert hits(one_object((box, 0, -4)), bank) == []  # a confidence of 0.007


def test_two_objects_are_found_by_the_detections_nearest_to_them(bank):
    near, far = [10, 10, 30, 30], [10, 14, 30, 34]
    features = features_of(
        [(0, 0, far), (0, 0, near)],
        [(0, 0, 0, near, 3 * torch.eye(D)[0]), (0, 0, 0, [10, 15, 30, 35], 2 * torch.eye(D)[0])],
    )
    assert hits(features, bank) == [True, True]


def test_objects_of_another_image_or_class_are_not_found(bank):
    box, rows = [10, 10, 30, 30], (torch.eye(2, D), torch.zeros(2))
    features = features_of([(0, 0, box), (1, 1, box)], [(p, 0, 0, box, 4 * torch.eye(D)[0]) for p in (0, 1)])
    out = detect(features, features.cls, EVERY[:2], rows, bank, conf=0.5)
    assert out.cls.tolist() == [0, 0] and sorted(out.hit.tolist()) == [False, True] and out.truths.tolist() == [1, 1]


def test_selected_anchors_keep_all_their_parts():
    anchors = scene().anchors[0]
    part = select(anchors, anchors.image == 3)
    index = [i for i, p in enumerate(anchors.image.tolist()) if p == 3]
    assert all(torch.equal(x, y[index]) for x, y in zip(part, anchors)) and len(index) > 3


# Folds ----------------------------------------------------------------------------------------------------------------


def test_five_shots_in_five_images_are_in_five_folds():
    box = [0, 0, 9, 9]
    objects = [(c, 5 * c + i, box) for c in range(3) for i in range(5)]
    fold = folds(features_of(objects), torch.tensor([c for c, _, _ in objects]))
    assert fold.shape == (15,)
    for c in range(3):
        assert sorted(fold[5 * c : 5 * c + 5].tolist()) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("shots, expected", [(2, [1, 1]), (3, [1, 1, 1]), (7, [1, 1, 1, 2, 2]), (10, [2] * 5)])
def test_the_shots_of_a_class_are_spread_evenly(shots, expected):
    fold = folds(features_of([(0, i, [0, 0, 9, 9]) for i in range(shots)]), torch.zeros(shots, dtype=torch.int64))
    counts = torch.bincount(fold)
    assert sorted(counts[counts > 0].tolist()) == expected and fold.max() < 5


def test_the_classes_of_a_image_decide_its_fold_and_not_how_full_it_is():
    box = [0, 0, 9, 9]
    objects = [(0, 0, box)] + [(1, p, box) for p in (1, 2, 3, 4) for _ in range(3)] + [(0, 5, box)]
    features = features_of(objects)
    fold = folds(features, features.cls)
    assert fold[5] != fold[0]  # which holds the fewest objects


def test_images_with_several_classes_are_spread_as_well_as_they_can():
    """Each of five images shows both classes, the sixth, a seventh and an empty one only one or none."""
    box = [0, 0, 9, 9]
    objects = [(c, p, box) for p in range(5) for c in (0, 1)] + [(0, 5, box), (1, 6, box)]
    features = features_of(objects, [(7, 0, 0, box, torch.zeros(D))])
    fold = folds(features, features.cls)
    assert sorted(fold[:5].tolist()) == [0, 1, 2, 3, 4] and len(fold) == 8
    assert fold[5] != fold[6]


def test_objects_that_are_left_out_do_not_fill_a_fold():
    features = features_of([(0, i, [0, 0, 9, 9]) for i in range(6)])
    labels = torch.tensor([-1, 0, 0, 0, 0, 0])
    assert sorted(folds(features, labels)[1:].tolist()) == [0, 1, 2, 3, 4]


# Thresholds -----------------------------------------------------------------------------------------------------------


def f1(conf, hit, truths, threshold):
    kept = conf > threshold
    return 2 * int((hit & kept).sum()) / (int(kept.sum()) + truths)


@pytest.mark.parametrize("seed", range(20))
def test_the_suggested_confidence_has_the_greatest_f1(seed):
    torch.manual_seed(seed)
    n = int(torch.randint(1, 25, ()))
    conf = (torch.randperm(97)[:n] + 2) / 100
    hit = torch.rand(n) < conf
    if not hit.any():
        assert best_conf(conf, hit, 5) is None
        return
    truths = int(hit.sum()) + int(torch.randint(0, 5, ()))
    best = best_conf(conf, hit, truths)
    maximum = max(f1(conf, hit, truths, t) for t in torch.linspace(0, 1, 1001))
    assert f1(conf, hit, truths, best) == maximum


def test_the_suggested_confidence_weighs_precision_and_recall_alike():
    """F1 is 2/3 with one detection, 4/7 with two and 3/4 with all; with more objects missed the choice is the same."""
    conf, hit = torch.tensor([0.9, 0.7, 0.6, 0.5]), torch.tensor([True, False, True, True])
    assert best_conf(conf, hit, 2) == pytest.approx(0.255)
    conf, hit = torch.tensor([0.9, 0.7, 0.6, 0.5, 0.4]), torch.tensor([True, False, False, False, True])
    assert best_conf(conf, hit, 2) == pytest.approx(0.8)  # 2/3 against 4/7
    assert best_conf(conf, hit, 6) == pytest.approx(0.205)  # 2/7 against 4/11


def test_the_suggested_confidence_lies_between_what_to_keep_and_the_rest():
    conf, hit = torch.tensor([0.3, 0.9, 0.7, 0.2]), torch.tensor([False, True, True, False])
    assert best_conf(conf, hit, 2) == pytest.approx(0.5)
    assert best_conf(conf[1:3], hit[1:3], 2) == 0.355  # all are to be kept


def test_a_suggested_confidence_never_lies_within_a_tie():
    conf, hit = torch.tensor([0.9, 0.9, 0.5]), torch.tensor([True, False, False])
    assert best_conf(conf, hit, 1) == 0.7


def test_without_a_hit_there_is_no_suggestion():
    assert best_conf(torch.tensor([0.9, 0.4]), torch.tensor([False, False]), 3) is None
    assert best_conf(torch.zeros(0), torch.zeros(0, dtype=torch.bool), 3) is None


# Images that are left out -------------------------------------------------------------------------------------------


def labeled_scene():
    """A scene of many images, and labels, of which class 2 is in one image only."""
    features = scene(seed=5, n=12)
    rare = features.image[features.cls == 2][0]
    return features, torch.where((features.cls == 2) & (features.image != rare), -1, features.cls)


def by_class(detections, c):
    """Confidences and hits of a class, the most confident first."""
    rows = sorted(((s, h) for k, s, h in detections if k == c), reverse=True)
    return [s for s, _ in rows], [h for _, h in rows]


def test_left_out_detections_of_the_same_classifiers_are_those_of_one_pass(bank, monkeypatch):
    features, labels = labeled_scene()
    monkeypatch.setattr(module, "classifiers", lambda *args: ROWS)
    found = detect_left_out(features, labels, torch.ones(3), bank)
    detections, truths = detect_by_loops(features, labels, EVERY[:12], ROWS, bank, 0.01)
    for c in range(2):
        conf, hit = by_class(detections, c)
        ours = by_class(zip(found.cls.tolist(), found.conf.tolist(), found.hit.tolist()), c)
        assert ours[0] == pytest.approx(conf, abs=1e-5) and ours[1] == hit and any(hit)
    assert found.truths.tolist() == [*truths[:2], 0]  # all shots of the last class are in one image
    assert not found.hit[found.cls == 2].any()


def test_a_image_is_judged_by_classifiers_that_never_saw_it(bank, monkeypatch):
    features, labels = labeled_scene()
    fitted, judged, prior_strength = [], [], torch.tensor([3.0, 2.0, 1.0])

    def fit(part, seen, *args):
        fitted.append((part, seen, args))
        return classifiers(part, seen, *args)

    def look(part, truth, images, *args, **kwargs):
        judged.append((truth, images))
        return find(part, truth, images, *args, **kwargs)

    classifiers, find = module.classifiers, module.detect
    monkeypatch.setattr(module, "classifiers", fit)
    monkeypatch.setattr(module, "detect", look)
    detect_left_out(features, labels, prior_strength, bank)
    assert len(fitted) == len(judged) == 5
    assert torch.equal(sum(images.int() for _, images in judged), torch.ones(12, dtype=torch.int32))
    for (part, seen, args), (truth, images) in zip(fitted, judged):
        out = images[features.image]
        assert (seen[out] == -1).all() and torch.equal(seen[~out], labels[~out]) and torch.equal(truth, labels)
        assert not images[part.anchors[0].image].any()
        assert len(part.anchors[0].image) == (~images[features.anchors[0].image]).sum()
        assert args[1] == 0 and args[2] is bank
    assert set(features.anchors[0].image.tolist()) == set(range(12))  # the features themselves stay complete


def test_anchors_of_other_images_serve_every_fit_and_are_never_detected(bank, monkeypatch):
    """Those that a model remembers have the image and view -1."""
    features, labels = labeled_scene()
    expected = detect_by_loops(features, labels, EVERY[:12], ROWS, bank, 0.01)[0]
    first = features.anchors[0]
    elsewhere = torch.full((40,), -1)
    extra = Anchors(*(x[:40] for x in first[:3]), elsewhere, torch.ones(40), elsewhere, elsewhere)
    features = features._replace(anchors=[Anchors(*map(torch.cat, zip(first, extra)))])
    given = []
    monkeypatch.setattr(module, "classifiers", lambda part, *args: given.append(part.anchors[0]) or ROWS)
    assert len(detect(features, labels, EVERY[:12], ROWS, bank).conf) == len(expected) > 20
    found = detect_left_out(features, labels, torch.ones(3), bank)
    assert (found.cls < 2).sum() == sum(c < 2 for c, _, _ in expected)
    assert len(given) == 5 and all((x.image < 0).sum() == 40 for x in given)


def test_separable_classes_are_found_and_get_a_threshold_between_hits_and_misses(bank):
    """Shots along two axes, and weaker anchors beside them: the means of the other shots tell them apart."""
    box, beside, axes = [10, 10, 30, 30], [50, 50, 70, 70], torch.eye(D)
    objects = [(i % 2, i, box) for i in range(10)]
    anchors = [(i, 0, 0, box, 4 * axes[i % 2], i) for i in range(10)]
    anchors += [(i, 0, 0, beside, 1.5 * axes[i % 2]) for i in range(10)]
    features = features_of(objects, anchors, torch.stack([axes[i % 2] for i in range(10)]))
    found = detect_left_out(features, features.cls, torch.full((2,), float("inf")), bank)
    high, low = (torch.tensor(x - 1.0).sigmoid().item() for x in (4.0, 1.5))
    assert thresholds(found) == [pytest.approx((high + low) / 2, abs=1e-3)] * 2
    assert found.truths.tolist() == [5, 5] and ap50(found) > 0.99


def test_thresholds_are_those_of_each_class():
    torch.manual_seed(0)
    cls, conf = torch.randint(0, 3, (60,)), torch.rand(60)
    hit = (torch.rand(60) < conf) & (cls != 1)
    found = thresholds(Detections(cls, conf, hit, torch.tensor([15, 9, 12, 4])))
    for c, k in ((0, 15), (2, 12)):
        assert found[c] == best_conf(conf[cls == c], hit[cls == c], k)
    assert found[1] is None and found[3] is None and found[0] != found[2]


def area_under_curve(conf, hit, truths):
    """Area under the precision that is reached at least at every recall, as in the COCO protocol but exact."""
    order = conf.argsort(descending=True)
    tp = hit[order].cumsum(0)
    precision, recall = (tp / torch.arange(1, len(tp) + 1)).tolist(), (tp / truths).tolist()
    area = 0.0
    for i, r in enumerate(recall):
        area += (r - (recall[i - 1] if i else 0)) * max(precision[i:])
    return area


def test_ap50_is_the_mean_area_under_the_curves_of_the_classes_that_have_objects():
    torch.manual_seed(0)
    cls, conf = torch.randint(0, 4, (200,)), torch.rand(200)
    hit = (torch.rand(200) < conf) & (cls < 3)
    truths = torch.tensor([30, 60, 0, 20, 0])
    areas = [area_under_curve(conf[cls == c], hit[cls == c], truths[c]) for c in (0, 1, 3)]
    assert areas[2] == 0 < areas[1] < areas[0] < 1
    assert ap50(Detections(cls, conf, hit, truths)) == pytest.approx(sum(areas) / 3, abs=0.01)


def test_ap50_without_a_hit_or_an_object_is_zero():
    one, yes = torch.ones(1), torch.tensor([True])
    none = torch.zeros(0, dtype=torch.int64)
    assert ap50(Detections(none, none.float(), none.bool(), torch.tensor([4]))) == 0  # no detection at all
    assert ap50(Detections(none.new_zeros(1), one, ~yes, torch.tensor([4]))) == 0
    assert ap50(Detections(none.new_zeros(1), one, yes, torch.tensor([0]))) == 0


# Agreement ------------------------------------------------------------------------------------------------------------


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
def test_agreement_is_that_of_loops(seed):
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
    assert found.own[single].isnan().all() and not found.other[single].isnan().any()


def clouds(counts, noise=0.2, seed=0):
    """Objects of classes, one to a image, that lie about an axis each."""
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


def test_an_odd_shot_is_no_doubt_unless_it_looks_like_another_class():
    features = clouds([5, 5], noise=0.05)
    features.embeds[0][2] = torch.eye(D)[4]
    assert suspect(features, features.cls, 2) == []
    features.embeds[0][2] = F.normalize(torch.eye(D)[0] * 0.7 + torch.eye(D)[1] * 0.75, dim=0)
    assert suspect(features, features.cls, 2) == []  # more like another, but like its own too


def test_without_another_class_there_is_nothing_to_compare_with():
    features = clouds([5, 5])
    for labels, n in ((features.cls.clamp(max=0), 1), (torch.where(features.cls == 1, -1, 0), 2)):
        found = agreement(features, labels, n)
        assert found.own.isnan().all() and found.other.isnan().all()
        assert (found.nearest == -1).all() and not found.suspect.any()


def test_objects_that_are_left_out_are_neither_judged_nor_compared_with():
    features = clouds([5, 5, 5])
    labels = torch.where(features.cls == 1, -1, features.cls)
    labels[0] = -1
    features.embeds[0][1] = torch.eye(D)[1]  # like the class that is left out
    assert suspect(features, labels, 3) == []
    found = agreement(features, labels, 3)
    assert found.own[labels < 0].isnan().all() and (found.nearest[labels == 0] == 2).all()
