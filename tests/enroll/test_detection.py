import pytest
import torch
import torch.nn.functional as F

from yolo_fewshot.enroll.detection import Detections, ap50, detect
from yolo_fewshot.enroll.features import Anchors, Features, select
from yolo_fewshot.nn.head import Prototypes

D = 6
EVERY = torch.ones(100, dtype=torch.bool)


def prototypes_of():
    """Level scales and biases of three levels."""
    prototypes = Prototypes(1, D, 3)
    prototypes.logit_scale.data[:] = torch.tensor([1.0, 1.5, 2.0])
    prototypes.bias.data[:] = torch.tensor([-1.0, -0.5, 0.0])
    return prototypes


@pytest.fixture
def prototypes():
    return prototypes_of()


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


WEIGHTS = (torch.eye(3, D) * 1.2, torch.tensor([-0.5, 0.0, 0.3]))


def iou(a, b):
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inter = max(w, 0) * max(h, 0)
    return inter / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter)


def detect_by_loops(features, labels, images, weights, prototypes, conf):
    """Detections (class, confidence, tp) in descending order of confidence, and objects of every class."""
    anchors, found = features.anchors[0], []
    for p in range(len(features.files)):
        for c in range(len(weights[0])) if images[p] else ():
            scored = []
            for a in range(len(anchors.embeds)):
                if anchors.image[a] == p and anchors.view[a] == 0:
                    level = anchors.level[a]
                    logit = (
                        prototypes.logit_scale[level] * (anchors.embeds[a] @ weights[0][c])
                        + prototypes.bias[level]
                        + weights[1][c]
                    )
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
                tp = best is not None and iou(box, features.boxes[best].tolist()) >= 0.5
                if tp:
                    left.remove(best)
                found.append((c, score, tp))
    n_gt = [0] * len(weights[0])
    for c, p in zip(labels.tolist(), features.image.tolist()):
        if c >= 0 and images[p]:
            n_gt[c] += 1
    return sorted(found, key=lambda x: -x[1]), n_gt


@pytest.mark.parametrize("seed", range(4))
def test_detections_equal_loops(prototypes, seed):
    features = scene(seed)
    labels = torch.where(torch.arange(len(features.cls)) % 5 == 4, -1, features.cls)
    images = torch.arange(8) % 4 != 2
    out = detect(features, labels, images, WEIGHTS, prototypes, conf=0.2)
    expected, n_gt = detect_by_loops(features, labels, images, WEIGHTS, prototypes, 0.2)
    assert out.cls.tolist() == [c for c, _, _ in expected] and out.tp.tolist() == [h for _, _, h in expected]
    assert out.conf.tolist() == pytest.approx([s for _, s, _ in expected], abs=1e-5)
    assert out.n_gt.tolist() == n_gt
    assert 0 < out.tp.sum() < len(out.tp)


def one_object(*anchors):
    return features_of(
        [(0, 0, [10, 10, 30, 30])], [(0, view, 0, box, strength * torch.eye(D)[0]) for box, view, strength in anchors]
    )


def true_positives(features, prototypes, **kwargs):
    out = detect(
        features, features.cls, EVERY[: len(features.files)], (torch.eye(1, D), torch.zeros(1)), prototypes, **kwargs
    )
    assert len(out.conf) == len(out.tp) == len(out.cls)
    return out.tp.tolist()


def test_of_two_detections_of_an_object_only_the_more_confident_is_a_true_positive(prototypes):
    wide, narrow = [10, 10, 36, 30], [10, 10, 30, 24]  # IoU of 0.77 and 0.7 with the object, and 0.54 with each other
    assert true_positives(one_object((wide, 0, 2), (narrow, 0, 3)), prototypes) == [True, False]
    assert true_positives(one_object((wide, 0, 2), (wide, 0, 3)), prototypes) == [True]  # one left by NMS


def test_a_detection_below_the_iou_threshold_is_a_false_positive(prototypes):
    assert true_positives(one_object(([10, 10, 30, 19], 0, 2)), prototypes) == [False]  # IoU of 0.45
    assert true_positives(one_object(([10, 10, 30, 21], 0, 2)), prototypes) == [True]  # 0.55


def test_only_the_plain_view_and_confident_anchors_count(prototypes):
    box = [10, 10, 30, 30]
    assert true_positives(one_object((box, 1, 2)), prototypes) == []
    score = torch.tensor(2.0 - 1.0).sigmoid().item()
    assert true_positives(one_object((box, 0, 2)), prototypes, conf=score - 0.01) == [True]
    assert true_positives(one_object((box, 0, 2)), prototypes, conf=score + 0.01) == []
    assert true_positives(one_object((box, 0, -4)), prototypes) == []  # a confidence of 0.007


def test_detections_match_the_object_of_maximum_iou(prototypes):
    near, far = [10, 10, 30, 30], [10, 14, 30, 34]
    features = features_of(
        [(0, 0, far), (0, 0, near)],
        [(0, 0, 0, near, 3 * torch.eye(D)[0]), (0, 0, 0, [10, 15, 30, 35], 2 * torch.eye(D)[0])],
    )
    assert true_positives(features, prototypes) == [True, True]


def test_detections_do_not_match_objects_of_another_image_or_class(prototypes):
    box, weights = [10, 10, 30, 30], (torch.eye(2, D), torch.zeros(2))
    features = features_of([(0, 0, box), (1, 1, box)], [(p, 0, 0, box, 4 * torch.eye(D)[0]) for p in (0, 1)])
    out = detect(features, features.cls, EVERY[:2], weights, prototypes, conf=0.5)
    assert out.cls.tolist() == [0, 0] and sorted(out.tp.tolist()) == [False, True] and out.n_gt.tolist() == [1, 1]


def test_select_keeps_all_attributes_of_anchors():
    anchors = scene().anchors[0]
    part = select(anchors, anchors.image == 3)
    index = [i for i, p in enumerate(anchors.image.tolist()) if p == 3]
    assert all(torch.equal(x, y[index]) for x, y in zip(part, anchors)) and len(index) > 3


# AP50 -----------------------------------------------------------------------------------------------------------------


def area_under_curve(conf, tp, n_gt):
    """Area under the precision that is reached at least at every recall, as in the COCO protocol but exact."""
    order = conf.argsort(descending=True)
    hits = tp[order].cumsum(0)
    precision, recall = (hits / torch.arange(1, len(hits) + 1)).tolist(), (hits / n_gt).tolist()
    area = 0.0
    for i, r in enumerate(recall):
        area += (r - (recall[i - 1] if i else 0)) * max(precision[i:])
    return area


def test_ap50_is_the_mean_area_under_the_curves_of_the_classes_that_have_objects():
    torch.manual_seed(0)
    cls, conf = torch.randint(0, 4, (200,)), torch.rand(200)
    tp = (torch.rand(200) < conf) & (cls < 3)
    n_gt = torch.tensor([30, 60, 0, 20, 0])
    areas = [area_under_curve(conf[cls == c], tp[cls == c], n_gt[c]) for c in (0, 1, 3)]
    assert areas[2] == 0 < areas[1] < areas[0] < 1
    assert ap50(Detections(cls, conf, tp, n_gt)) == pytest.approx(sum(areas) / 3, abs=0.01)


def test_ap50_without_a_true_positive_or_an_object_is_zero():
    one, yes = torch.ones(1), torch.tensor([True])
    none = torch.zeros(0, dtype=torch.int64)
    assert ap50(Detections(none, none.float(), none.bool(), torch.tensor([4]))) == 0  # no detection at all
    assert ap50(Detections(none.new_zeros(1), one, ~yes, torch.tensor([4]))) == 0
    assert ap50(Detections(none.new_zeros(1), one, yes, torch.tensor([0]))) == 0
