import pytest
import torch
from test_detection import EVERY, WEIGHTS, D, detect_by_loops, features_of, prototypes_of, scene

from yolo_fewshot.enroll import cross_validation as module
from yolo_fewshot.enroll.cross_validation import choose_methods, detect_left_out, folds
from yolo_fewshot.enroll.detection import Detections, ap50, detect
from yolo_fewshot.enroll.features import Anchors
from yolo_fewshot.enroll.thresholds import thresholds

SHOTS = torch.tensor([5, 2, 3])


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


def test_folds_balance_classes_before_the_number_of_objects():
    box = [0, 0, 9, 9]
    objects = [(0, 0, box)] + [(1, p, box) for p in (1, 2, 3, 4) for _ in range(3)] + [(0, 5, box)]
    features = features_of(objects)
    fold = folds(features, features.cls)
    assert fold[5] != fold[0]  # which holds the fewest objects


def test_shots_of_images_with_several_classes_are_spread():
    """Each of five images shows both classes, the sixth, a seventh and an empty one only one or none."""
    box = [0, 0, 9, 9]
    objects = [(c, p, box) for p in range(5) for c in (0, 1)] + [(0, 5, box), (1, 6, box)]
    features = features_of(objects, [(7, 0, 0, box, torch.zeros(D))])
    fold = folds(features, features.cls)
    assert sorted(fold[:5].tolist()) == [0, 1, 2, 3, 4] and len(fold) == 8
    assert fold[5] != fold[6]


def test_left_out_objects_do_not_count_in_a_fold():
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


def test_left_out_detections_of_constant_classifiers_equal_detections_in_all_images(prototypes, monkeypatch):
    features, labels = labeled_scene()
    monkeypatch.setattr(module, "classifiers", lambda *args: WEIGHTS)
    found = detect_left_out(features, labels, ["fit"] * 3, SHOTS, prototypes)
    detections, n_gt = detect_by_loops(features, labels, EVERY[:12], WEIGHTS, prototypes, 0.01)
    for c in range(2):
        conf, tp = by_class(detections, c)
        ours = by_class(zip(found.cls.tolist(), found.conf.tolist(), found.tp.tolist()), c)
        assert ours[0] == pytest.approx(conf, abs=1e-5) and ours[1] == tp and any(tp)
    assert found.n_gt.tolist() == [*n_gt[:2], 0]  # all shots of the last class are in one image
    assert not found.tp[found.cls == 2].any()


def test_classifiers_of_an_image_are_made_without_its_fold(prototypes, monkeypatch):
    features, labels = labeled_scene()
    fitted, judged, methods = [], [], ["fit", "mean", "fit"]

    def fit(part, seen, *args):
        fitted.append((part, seen, args))
        return classifiers(part, seen, *args)

    def look(part, truth, images, *args, **kwargs):
        judged.append((truth, images))
        return find(part, truth, images, *args, **kwargs)

    classifiers, find = module.classifiers, module.detect
    monkeypatch.setattr(module, "classifiers", fit)
    monkeypatch.setattr(module, "detect", look)
    detect_left_out(features, labels, methods, SHOTS, prototypes)
    assert len(fitted) == len(judged) == 5
    assert torch.equal(sum(images.int() for _, images in judged), torch.ones(12, dtype=torch.int32))
    for (part, seen, args), (truth, images) in zip(fitted, judged):
        out = images[features.image]
        assert (seen[out] == -1).all() and torch.equal(seen[~out], labels[~out]) and torch.equal(truth, labels)
        assert not images[part.anchors[0].image].any()
        assert len(part.anchors[0].image) == (~images[features.anchors[0].image]).sum()
        assert args[0] is methods and args[1] is SHOTS and args[2] == 0 and args[3] is prototypes
    assert set(features.anchors[0].image.tolist()) == set(range(12))  # the features themselves stay complete


def test_replayed_anchors_are_in_every_fit_and_are_never_detected(prototypes, monkeypatch):
    """Those of the replay buffer have the image and view -1."""
    features, labels = labeled_scene()
    expected = detect_by_loops(features, labels, EVERY[:12], WEIGHTS, prototypes, 0.01)[0]
    first = features.anchors[0]
    elsewhere = torch.full((40,), -1)
    extra = Anchors(*(x[:40] for x in first[:3]), elsewhere, torch.ones(40), elsewhere, elsewhere)
    features = features._replace(anchors=[Anchors(*map(torch.cat, zip(first, extra)))])
    given = []
    monkeypatch.setattr(module, "classifiers", lambda part, *args: given.append(part.anchors[0]) or WEIGHTS)
    assert len(detect(features, labels, EVERY[:12], WEIGHTS, prototypes).conf) == len(expected) > 20
    found = detect_left_out(features, labels, ["fit"] * 3, SHOTS, prototypes)
    assert (found.cls < 2).sum() == sum(c < 2 for c, _, _ in expected)
    assert len(given) == 5 and all((x.image < 0).sum() == 40 for x in given)


def test_only_background_images_that_a_class_was_looked_for_in_count(prototypes, monkeypatch):
    """Class 0 has its shot in one of five images with class 1; two of the ten background images are in its fold."""
    box, axes = [10, 10, 30, 30], torch.eye(D)
    objects = [(1, i, box) for i in range(5)] + [(0, 2, [50, 50, 70, 70])]
    anchors = [(p, 0, 0, box, 3 * axes[0] + 2 * axes[1]) for p in range(5, 15)]
    features = features_of(objects, anchors)._replace(n_background=10)
    weights = (torch.eye(2, D), torch.zeros(2))
    monkeypatch.setattr(module, "classifiers", lambda *args: weights)
    found = detect_left_out(features, features.cls, ["mean"] * 2, torch.tensor([1, 5]), prototypes)
    alarms = torch.bincount(found.cls[found.background], minlength=2)
    assert found.n_background.tolist() == alarms.tolist() == [8, 10]  # one of each class in each image
    everywhere = detect(features, features.cls, EVERY[:15], weights, prototypes)
    assert everywhere.n_background.expand(2).tolist() == [10, 10]


def test_separable_classes_get_a_threshold_between_true_and_false_positives(prototypes):
    """Shots along two axes, and weaker anchors beside them: the means of the other shots tell them apart."""
    box, beside, axes = [10, 10, 30, 30], [50, 50, 70, 70], torch.eye(D)
    objects = [(i % 2, i, box) for i in range(10)]
    anchors = [(i, 0, 0, box, 4 * axes[i % 2], i) for i in range(10)]
    anchors += [(i, 0, 0, beside, 1.5 * axes[i % 2]) for i in range(10)]
    features = features_of(objects, anchors, torch.stack([axes[i % 2] for i in range(10)]))
    found = detect_left_out(features, features.cls, ["mean"] * 2, torch.tensor([5, 5]), prototypes)
    high, low = (torch.tensor(x - 1.0).sigmoid().item() for x in (4.0, 1.5))
    assert thresholds(found) == [pytest.approx((high + low) / 2, abs=1e-3)] * 2
    assert found.n_gt.tolist() == [5, 5] and ap50(found) > 0.99


# Choice of the methods ------------------------------------------------------------------------------------------------


@pytest.fixture
def left_out(monkeypatch):
    """Let cross-validation of `fit` and `mean` find these objects of three classes; yields the methods looked at."""
    asked, n_tp = [], {}

    def detect(features, labels, methods, shots, prototypes, nms):
        asked.append(methods)
        cls = torch.arange(3).repeat_interleave(shots)
        tp = torch.cat([torch.arange(k) < n for k, n in zip(shots.tolist(), n_tp[methods[0]])])
        return Detections(cls, torch.linspace(0.9, 0.5, len(cls)), tp, shots)

    monkeypatch.setattr(module, "detect_left_out", detect)
    return asked, n_tp


def choice(method, few_shot_method="fit", shots=SHOTS):
    methods, detections = choose_methods(None, None, shots, method, few_shot_method, None)
    return methods, detections.tp.sum().item()


def test_methods_other_than_auto_do_not_compare(left_out):
    asked, n_tp = left_out
    n_tp.update(mean=[1, 1, 1], fit=[4, 0, 0])
    assert choice("mean") == (["mean"] * 3, 3)
    assert choice("fit", few_shot_method="mean") == (["fit"] * 3, 4)
    assert len(asked) == 2


def test_auto_does_not_compare_where_all_classes_have_few_shots(left_out):
    asked, n_tp = left_out
    n_tp.update(mean=[1, 1, 1], fit=[2, 0, 0])
    for method in ("fit", "mean"):
        assert choice("auto", method, torch.tensor([2, 1, 2]))[0] == [method] * 3
    assert len(asked) == 2


@pytest.mark.parametrize(
    "mean, fit, best",
    [([5, 0, 3], [2, 2, 3], "mean"), ([2, 2, 3], [5, 0, 3], "fit"), ([3, 0, 2], [3, 2, 2], "fit")],
)
def test_auto_chooses_the_method_of_larger_ap50_on_classes_of_enough_shots(left_out, mean, fit, best):
    left_out[1].update(mean=mean, fit=fit)
    for few_shot_method in ("fit", "mean"):
        tp = sum(mean if best == "mean" else fit)
        assert choice("auto", few_shot_method) == ([best, few_shot_method, best], tp)
