import math
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_features import model_of

from yolo_fewshot.data.support import Support
from yolo_fewshot.enroll import calibrate as module
from yolo_fewshot.enroll.calibrate import choose_prior_strength
from yolo_fewshot.enroll.features import Anchors, Features, View
from yolo_fewshot.enroll.methods import PRIOR_STRENGTH
from yolo_fewshot.nn.head import Prototypes

INF = math.inf
COLORS = [(0, 0, 255), (255, 0, 0), (0, 255, 0), (0, 255, 255), (255, 255, 255), (0, 0, 0)]


def labels_of(split, images):
    """Labels as a `YOLODataset` holds them; each image is given by the classes that it shows, side by side."""
    found = []
    for i, classes in enumerate(images):
        boxes = [[(j + 0.5) / len(classes), 0.5 + i / 50, 0.8 / len(classes), 0.4] for j in range(len(classes))]
        found.append(
            {
                "im_file": f"{split}/{i}.png",
                "shape": (64, 64),
                "cls": np.array(classes, dtype=np.float32).reshape(-1, 1),
                "bboxes": np.array(boxes, dtype=np.float32).reshape(-1, 4),
                "segments": [],
                "keypoints": None,
                "normalized": True,
                "bbox_format": "xywh",
            }
        )
    return found


# Classes 0 to 5 are in both splits, 6 only in the first, 7 only in the second.
TRAIN = labels_of("train", [[0, 6], [1, 1], [2], [3, 0, 2], [4, 6], [5, 1, 4], [], [3], [0], [5, 2]])
VAL = labels_of("val", [[0, 7], [1, 2], [], [3, 4, 0], [5], [7], [4, 1, 1], [2, 3]])


def features_of(support):
    """Made-up features of a support set, without an anchor."""
    cls = torch.tensor([int(c) for x in support.labels for c in x["cls"].flat])
    image = torch.tensor([i for i, x in enumerate(support.labels) for _ in x["cls"]])
    none = torch.zeros(0, dtype=torch.int64)
    anchors = Anchors(torch.zeros(0, 4), none, torch.zeros(0, 4), none, torch.zeros(0), none, none)
    boxes, files = torch.zeros(len(cls), 4), [x["im_file"] for x in support.labels]
    return Features(cls, boxes, image, files, [F.normalize(torch.ones(len(cls), 4), dim=1)], [anchors], 1)


@pytest.fixture
def extracted(monkeypatch):
    """The support sets whose features are asked for, with their views; the features are made up."""
    asked = []

    def extract(rows, support, imgsz, views=None, **kwargs):
        asked.append((support, views))
        return features_of(support)

    monkeypatch.setattr(module, "extract", extract)
    monkeypatch.setattr(module, "class_rows", lambda model: model)
    return asked


class Model:
    """What calibration needs of a model whose features are made up."""

    def __init__(self):
        self.names = {i: f"class{i}" for i in range(8)}
        self.memory, self.yaml = [], {}
        self.model = [type("Head", (), {"branch_prototypes": (Prototypes(8, 4, 3),)})()]


def choose(train=TRAIN, val=VAL, **kwargs):
    return choose_prior_strength(Model(), train, val, 64, **kwargs)


def scores(monkeypatch, mean, fit):
    """Let `mean` and `fit` have these AP50, trial by trial."""
    mean, fit = iter(mean), iter(fit)
    monkeypatch.setattr(
        module, "_ap50", lambda s, q, n, method, prototypes: next(mean) if method == "mean" else next(fit)
    )


@pytest.fixture
def trials(monkeypatch):
    """Features and labels of the support and of the queries that every trial is given, with its method."""
    given = []
    monkeypatch.setattr(module, "_ap50", lambda s, q, n, method, prototypes: given.append((s, q, method)) or 0.0)
    return given


def classes_of(support):
    return {int(c) for x in support.labels for c in x["cls"].flat}


def test_shots_are_training_images_and_queries_are_validation_images(extracted):
    originals = {x["im_file"]: x for x in TRAIN + VAL}
    for seed in range(4):
        extracted.clear()
        choose(seed=seed)
        (queries, plain), (support, views) = extracted
        assert plain == [View()] and views is None and not queries.crops and not support.crops
        assert queries.names == support.names == Model().names
        assert all(x["im_file"].startswith("val") for x in queries.labels)
        assert all(x["im_file"].startswith("train") for x in support.labels)
        classes = classes_of(support)
        assert len(classes) == 3 and classes <= set(range(6)) and classes_of(queries) == classes
        for x in queries.labels + support.labels:
            original = originals[x["im_file"]]
            keep = [i for i, c in enumerate(original["cls"].flat) if int(c) in classes]
            assert keep and np.array_equal(x["cls"], original["cls"][keep])
            assert np.array_equal(x["bboxes"], original["bboxes"][keep])
        seen = {x["im_file"] for x in VAL if classes & {int(c) for c in x["cls"].flat}}
        assert {x["im_file"] for x in queries.labels} == seen  # all that show one of the classes
        assert len(queries.labels) == len(seen)
        assert len({x["im_file"] for x in support.labels}) == len(support.labels)


def test_trials_have_disjoint_shots_that_show_every_class(extracted, trials):
    train = labels_of("train", [[c, (c + i) % 4] for i in range(5) for c in range(4)])
    val = labels_of("val", [[0, 1], [2, 3]])
    choose(train, val)
    used = set()
    assert len(trials) == 2 * module.TRIALS and [method for _, _, method in trials] == ["mean", "fit"] * module.TRIALS
    for i in range(0, len(trials), 2):
        ((features, labels), queries, _), (second, same, _) = trials[i], trials[i + 1]
        assert torch.equal(labels, second[1]) and queries is same
        shown = set()
        for p in features.image[labels >= 0].unique().tolist():
            own = features.image == p
            assert (labels[own] >= 0).all()  # whole images
            new = set(labels[own].tolist()) - shown
            assert new  # an image that shows nothing new is no shot
            shown |= new
            assert p not in used
            used.add(p)
        assert shown == {0, 1}
        assert (queries[1] >= 0).all()
    assert used == set(range(len(trials[0][0][0].files)))


def test_a_trial_has_the_anchors_of_its_own_images_and_of_the_replay_buffer():
    every = features_of(Support({}, TRAIN[:5], False, Path()))
    image = torch.tensor([4, 0, 2, -1, 3, 1, -1, 2])
    parts = [
        torch.arange(8.0)[:, None],
        image * 0,
        torch.zeros(8, 4),
        image * 0,
        torch.ones(8),
        image,
        image * 0,
    ]
    features, labels = module._select_images(every._replace(anchors=[Anchors(*parts)] * 2), every.cls % 3, 2, 4)
    assert features.anchors[0].image.tolist() == [2, -1, 3, -1, 2]
    assert features.anchors[0].embeds[:, 0].tolist() == [2, 3, 4, 6, 7]
    assert labels.tolist() == [-1, -1, -1, -1, 2, 0, 0, 2, -1, -1]


def test_the_number_of_classes_and_queries_is_bounded(extracted, monkeypatch):
    monkeypatch.setattr(module, "MAX_CLASSES", 2)
    monkeypatch.setattr(module, "MAX_QUERIES", 1)
    choose()
    (queries, _), (support, _) = extracted
    assert len(queries.labels) == 1 and len(classes_of(support)) == 2


def test_draws_depend_on_the_seed_alone(extracted):
    def draws(seed):
        extracted.clear()
        torch.manual_seed(seed + 1)  # neither this nor NumPy's own state matters
        np.random.seed(seed + 2)
        choose(seed=seed)
        return [[x["im_file"] for x in support.labels] for support, _ in extracted]

    first = draws(0)
    assert first == draws(0) and first != draws(1)


def test_anchors_of_pseudo_novel_classes_are_not_replayed(extracted, monkeypatch):
    asked = []
    monkeypatch.setattr(
        module, "add_replay", lambda features, rows, own: asked.append((rows.memory, features, own)) or features
    )
    choose()
    ((memory, features, own),) = asked
    assert memory == [] and features.files[0].startswith("train") and set(own) == classes_of(extracted[1][0])


def test_labels_are_not_modified(extracted):
    before = [{**x, "cls": x["cls"].copy(), "bboxes": x["bboxes"].copy()} for x in TRAIN + VAL]
    choose()
    for x, y in zip(TRAIN + VAL, before):
        assert x.keys() == y.keys() and all(np.array_equal(x[k], y[k]) for k in ("cls", "bboxes"))


def test_the_better_prior_strength_is_chosen(extracted, monkeypatch):
    n, train = module.TRIALS, labels_of("train", [[c] for c in range(6)] * module.TRIALS)
    scores(monkeypatch, [0.5] * n, [0.4] * n)
    assert choose(train) == INF
    scores(monkeypatch, [0.4] * n, [0.5] * n)
    assert choose(train) == PRIOR_STRENGTH
    scores(monkeypatch, [0.4] * (n - 1) + [0.9], [0.45] * n)  # worse in most trials, better in the mean
    assert choose(train) == INF
    scores(monkeypatch, [0.45 + module.MARGIN / 2] * n, [0.45] * n)  # within the margin
    assert choose(train) == PRIOR_STRENGTH


def test_a_draw_that_lacks_a_class_is_no_trial(extracted, trials):
    choose(labels_of("train", [[0], [1], [0]]), labels_of("val", [[1, 0]]))
    assert len(trials) == 2  # one draw, with both methods


@pytest.mark.parametrize(
    "train, val", [([[0], [1]], [[2], [3]]), ([[0], [1]], [[0], [2]]), ([[0, 0]], [[0]]), ([[]], [[]])]
)
def test_fewer_than_two_classes_in_both_splits_extract_no_features(extracted, train, val):
    assert choose(labels_of("train", train), labels_of("val", val)) == PRIOR_STRENGTH
    assert not extracted


def test_two_classes_in_both_splits_are_enough(extracted):
    choose(labels_of("train", [[0], [1]]), labels_of("val", [[1, 0]]))
    assert len(extracted) == 2 and all(classes_of(x) == {0, 1} for x, _ in extracted)


def test_labels_are_indices_into_the_drawn_classes(extracted):
    support, labels = module._features(Model(), TRAIN[3:4], np.array([2, 0, 5, 3]), 64)
    assert support.cls.tolist() == [3, 0, 2] and labels.tolist() == [3, 1, 0]


def test_classes_are_enrolled_by_the_method_with_their_own_number_of_shots(monkeypatch):
    asked = []
    monkeypatch.setattr(module, "classifiers", lambda *args: asked.append(args))
    monkeypatch.setattr(module, "detect", lambda *args: args)
    monkeypatch.setattr(module, "ap50", lambda detections: 0.25)
    support = object(), torch.tensor([0, 2, 0, -1, 0, 2])
    queries = features_of(Support({}, VAL, False, ".")), None
    for method in ("fit", "mean"):
        assert module._ap50(support, queries, 3, method, None) == 0.25
    assert [methods for _, _, methods, *_ in asked] == [["fit"] * 3, ["mean"] * 3]
    assert all(shots.tolist() == [3, 0, 2] and branch == 0 for _, _, _, shots, branch, _ in asked)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """The training and validation images of the first four classes, drawn as rectangles of one color each."""
    root, splits = tmp_path_factory.mktemp("drawn"), []
    rng = np.random.default_rng(0)
    for split, n in (("train", 6), ("val", 5)):
        (root / split).mkdir()
        labels = labels_of(split, [[i % 4, (i + 1) % 4] for i in range(n)])
        for x in labels:
            image = rng.integers(100, 160, (64, 64, 3)).astype(np.uint8)
            for c, (cx, cy, w, h) in zip(x["cls"].flat, x["bboxes"] * 64):
                corners = [(round(float(cx + s * w / 2)), round(float(cy + s * h / 2))) for s in (-1, 1)]
                cv2.rectangle(image, *corners, COLORS[int(c)], -1)
            x["im_file"] = str(root / x["im_file"])
            cv2.imwrite(x["im_file"], image)
        splits.append(labels)
    return splits


@pytest.mark.slow
def test_the_choice_is_deterministic_and_does_not_modify_the_model(drawn, monkeypatch):
    monkeypatch.setattr(module, "TRIALS", 2)
    values, ap50 = [], module._ap50
    monkeypatch.setattr(module, "_ap50", lambda *args: values.append(ap50(*args)) or values[-1])
    model = model_of()
    for i in (2, 3):
        model.model[-1].set_class(i, model.model[-1].get_class(i - 2))
    model.names = {i: f"class{i}" for i in range(4)}
    before = {k: v.clone() for k, v in model.state_dict().items()}
    public = {
        k: v for k, v in vars(model).items() if k in {"names", "nc", "prior_strength", "enrolled", "args", "training"}
    }
    public = {k: dict(v) if isinstance(v, dict) else v for k, v in public.items()}
    first = choose_prior_strength(model, *drawn, 64)
    assert first == choose_prior_strength(model, *drawn, 64)
    assert len(values) == 8 and values[:4] == values[4:] and max(values) > 0 and values[::2] != values[1::2]
    gain = (values[0] - values[1] + values[2] - values[3]) / 2
    assert first == (INF if gain > module.MARGIN else PRIOR_STRENGTH)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(vars(model)[k] == v for k, v in public.items()) and not any(m.training for m in model.modules())
    assert not [f for f in Path(drawn[0][0]["im_file"]).parent.parent.rglob("*") if f.suffix == ".cache"]
