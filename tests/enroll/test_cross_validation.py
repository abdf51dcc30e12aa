import pytest
import torch
from test_detection import EVERY, WEIGHTS, D, detect_by_loops, features_of, prototypes_of, scene

from yolo_fewshot.enroll import cross_validation as module
from yolo_fewshot.enroll.cross_validation import detect_left_out, folds
from yolo_fewshot.enroll.detection import ap50, detect
from yolo_fewshot.enroll.features import Anchors
from yolo_fewshot.enroll.thresholds import thresholds


@pytest.fixture
def prototypes():
    return prototypes_of()


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


def test_the_classes_of_an_image_decide_its_fold_and_not_how_full_it_is():
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


# Images that are left out -------------------------------------------------------------------------------------------


def labeled_scene():
    """A scene of many images, and labels, of which class 2 is in one image only."""
    features = scene(seed=5, n=12)
    rare = features.image[features.cls == 2][0]
    return features, torch.where((features.cls == 2) & (features.image != rare), -1, features.cls)


def by_class(detections, c):
    """Confidences and true positives of a class, the most confident first."""
    rows = sorted(((s, h) for k, s, h in detections if k == c), reverse=True)
    return [s for s, _ in rows], [h for _, h in rows]


def test_left_out_detections_of_the_same_classifiers_are_those_of_one_pass(prototypes, monkeypatch):
    features, labels = labeled_scene()
    monkeypatch.setattr(module, "classifiers", lambda *args: WEIGHTS)
    found = detect_left_out(features, labels, torch.ones(3), prototypes)
    detections, n_gt = detect_by_loops(features, labels, EVERY[:12], WEIGHTS, prototypes, 0.01)
    for c in range(2):
        conf, tp = by_class(detections, c)
        ours = by_class(zip(found.cls.tolist(), found.conf.tolist(), found.tp.tolist()), c)
        assert ours[0] == pytest.approx(conf, abs=1e-5) and ours[1] == tp and any(tp)
    assert found.n_gt.tolist() == [*n_gt[:2], 0]  # all shots of the last class are in one image
    assert not found.tp[found.cls == 2].any()


def test_an_image_is_judged_by_classifiers_that_never_saw_it(prototypes, monkeypatch):
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
    detect_left_out(features, labels, prior_strength, prototypes)
    assert len(fitted) == len(judged) == 5
    assert torch.equal(sum(images.int() for _, images in judged), torch.ones(12, dtype=torch.int32))
    for (part, seen, args), (truth, images) in zip(fitted, judged):
        out = images[features.image]
        assert (seen[out] == -1).all() and torch.equal(seen[~out], labels[~out]) and torch.equal(truth, labels)
        assert not images[part.anchors[0].image].any()
        assert len(part.anchors[0].image) == (~images[features.anchors[0].image]).sum()
        assert args[1] == 0 and args[2] is prototypes
    assert set(features.anchors[0].image.tolist()) == set(range(12))  # the features themselves stay complete


def test_anchors_of_other_images_serve_every_fit_and_are_never_detected(prototypes, monkeypatch):
    """Those that a model remembers have the image and view -1."""
    features, labels = labeled_scene()
    expected = detect_by_loops(features, labels, EVERY[:12], WEIGHTS, prototypes, 0.01)[0]
    first = features.anchors[0]
    elsewhere = torch.full((40,), -1)
    extra = Anchors(*(x[:40] for x in first[:3]), elsewhere, torch.ones(40), elsewhere, elsewhere)
    features = features._replace(anchors=[Anchors(*map(torch.cat, zip(first, extra)))])
    given = []
    monkeypatch.setattr(module, "classifiers", lambda part, *args: given.append(part.anchors[0]) or WEIGHTS)
    assert len(detect(features, labels, EVERY[:12], WEIGHTS, prototypes).conf) == len(expected) > 20
    found = detect_left_out(features, labels, torch.ones(3), prototypes)
    assert (found.cls < 2).sum() == sum(c < 2 for c, _, _ in expected)
    assert len(given) == 5 and all((x.image < 0).sum() == 40 for x in given)


def test_separable_classes_are_found_and_get_a_threshold_between_true_and_false_positives(prototypes):
    """Shots along two axes, and weaker anchors beside them: the means of the other shots tell them apart."""
    box, beside, axes = [10, 10, 30, 30], [50, 50, 70, 70], torch.eye(D)
    objects = [(i % 2, i, box) for i in range(10)]
    anchors = [(i, 0, 0, box, 4 * axes[i % 2], i) for i in range(10)]
    anchors += [(i, 0, 0, beside, 1.5 * axes[i % 2]) for i in range(10)]
    features = features_of(objects, anchors, torch.stack([axes[i % 2] for i in range(10)]))
    found = detect_left_out(features, features.cls, torch.full((2,), float("inf")), prototypes)
    high, low = (torch.tensor(x - 1.0).sigmoid().item() for x in (4.0, 1.5))
    assert thresholds(found) == [pytest.approx((high + low) / 2, abs=1e-3)] * 2
    assert found.n_gt.tolist() == [5, 5] and ap50(found) > 0.99
