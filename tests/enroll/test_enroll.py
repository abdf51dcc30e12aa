import math
from copy import deepcopy

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_features import BASE, draw_shots, image_batch, model_of
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils.nms import non_max_suppression

from yolo_fewshot import FewShotYOLO
from yolo_fewshot.data.support import Support, read_background, read_support
from yolo_fewshot.enroll import cross_validation
from yolo_fewshot.enroll import enroll as module
from yolo_fewshot.enroll.agreement import Agreement, agreement
from yolo_fewshot.enroll.cross_validation import detect_left_out
from yolo_fewshot.enroll.detection import detect
from yolo_fewshot.enroll.enroll import Shot, Shots, compact, enroll, forget
from yolo_fewshot.enroll.features import Features, View, add_background, extract
from yolo_fewshot.enroll.methods import METHODS as METHODS_TABLE
from yolo_fewshot.enroll.methods import PRIOR_STRENGTH
from yolo_fewshot.nn.model import FewShotDetectionModel
from yolo_fewshot.nn.rows import class_rows

FAMILIES = ["yolo11n-fewshot.yaml", "yolov8n-fewshot.yaml", "yolo26n-fewshot.yaml"]
METHODS = ["mean", "fit", "auto"]
SIZE = 64  # of the images, in pixels
ROWS = ("weight", "gain", "offset", "frozen")  # of the prototypes of a branch, with a row for each class


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return draw_shots(tmp_path_factory.mktemp("shots"), SIZE)


@pytest.fixture(scope="module")
def shots(file):
    """Four squares and two discs in five images."""
    return read_support(file, BASE)


def stock_model():
    """A stock model with random weights, always the same."""
    torch.manual_seed(0)
    model = DetectionModel("yolo11n.yaml", nc=2, verbose=False).eval()
    model.names, model.args = dict(BASE), {}
    return model


@pytest.fixture(scope="module")
def models():
    """A model of each family, to be copied."""
    return {cfg: model_of(cfg) for cfg in FAMILIES}


@pytest.fixture
def model(models):
    return deepcopy(models["yolo11n-fewshot.yaml"])


@torch.no_grad()
def logits(model, shots):
    """Class logits of an image, in every branch."""
    preds = model(image_batch(shots.labels[0]["im_file"], SIZE)["img"])[1]
    branches = [preds["one2many"], preds["one2one"]] if "one2many" in preds else [preds]
    return torch.stack([x["scores"][0] for x in branches])  # (branches, nc, anchors)


def state(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(model, other):
    """Whether two models or states are equal, bit by bit."""
    x, y = (m if isinstance(m, dict) else m.state_dict() for m in (model, other))
    return x.keys() == y.keys() and all(torch.equal(v, y[k]) for k, v in x.items())


def equal(x, y):
    """Whether two named tuples of tensors and numbers are equal."""
    return all(map(torch.equal, map(torch.as_tensor, x), map(torch.as_tensor, y)))


def as_base(support):
    """The same shots, with a base class's name for the discs."""
    return support._replace(names={**support.names, 0: "kitten", 3: "cat"})


# What changes, and what does not --------------------------------------------------------------------------------------


@pytest.mark.parametrize("cfg, method", [*zip(FAMILIES, METHODS), *zip(FAMILIES[1:], METHODS)])
def test_enrollment_appends_new_classes_and_changes_nothing_else(models, shots, cfg, method):
    model = deepcopy(models[cfg])
    before, base = state(model), logits(model, shots)
    result = enroll(model, shots, SIZE, method=method)
    assert list(result.classes) == ["square", "disc"] and model.enrolled == result.classes
    assert model.names == {0: "cat", 1: "dog", 2: "square", 3: "disc"}
    assert model.nc == model.model[-1].nc == model.yaml["nc"] == 4
    assert not any(m.training for m in model.modules())
    after = model.state_dict()
    assert after.keys() == before.keys()
    for k, v in after.items():
        grown = "prototypes." in k and k.endswith(ROWS)
        assert len(v) == 4 if grown else v.shape == before[k].shape
        assert torch.equal(v[:2] if grown else v, before[k]), k
    torch.testing.assert_close(logits(model, shots)[:, :2], base, rtol=0, atol=1e-5)


@pytest.mark.parametrize("cfg", FAMILIES)
def test_the_mean_prototype_is_the_mean_of_the_shots_embeddings(models, shots, cfg):
    model = deepcopy(models[cfg])
    features = extract(class_rows(model), shots, SIZE)
    enroll(model, shots, SIZE, method="mean", batch=2)
    assert len(features.embeds) == len(model.model[-1].branch_prototypes)
    for prototypes, embeds in zip(model.model[-1].branch_prototypes, features.embeds):
        for row, c in ((2, 1), (3, 3)):
            mean = embeds[features.cls == c].sum(0)
            torch.testing.assert_close(prototypes.weight[row, :, 0], mean / mean.norm(), rtol=0, atol=1e-4)
        torch.testing.assert_close(prototypes.gain, torch.ones(4))
        assert not prototypes.offset.any()


def test_the_views_may_be_given(model, shots):
    views = [View(0.5, True)]
    features = extract(class_rows(model), shots, SIZE, views=views)
    enroll(model, shots, SIZE, method="mean", views=views)
    mean = features.embeds[0][features.cls == 3].sum(0)
    torch.testing.assert_close(model.model[-1].prototypes.weight[3, :, 0], mean / mean.norm(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("cfg", FAMILIES)
def test_a_fit_has_gain_and_offset_and_separates_anchors_better_than_the_mean(models, shots, cfg):
    mean, fit = deepcopy(models[cfg]), deepcopy(models[cfg])
    features = extract(class_rows(mean), shots, SIZE)
    enroll(mean, shots, SIZE, method="mean")
    enroll(fit, shots, SIZE, method="fit")
    for b, anchors in enumerate(features.anchors):
        ours, theirs = fit.model[-1].branch_prototypes[b], mean.model[-1].branch_prototypes[b]
        assert torch.equal(ours.gain[:2], torch.ones(2)) and not ours.offset[:2].any()
        assert ((ours.gain[2:] - 1).abs() > 1e-3).all() and (ours.offset[2:].abs() > 1e-3).all()
        torch.testing.assert_close(ours.weight[2:].norm(dim=1), torch.ones(2, 1))
        assert (F.cosine_similarity(ours.weight[2:], theirs.weight[2:], dim=1) < 0.9999).all()
        for row, c in ((2, 1), (3, 3)):
            labels = torch.cat([features.cls, torch.tensor([-1])])[anchors.objects]
            target = torch.where(labels == c, anchors.weight, 0)
            losses = []
            for prototypes in (theirs, ours):
                weight, bias = (
                    torch.stack([prototypes.rows(i)[j][row] for i in range(3)])[anchors.level] for j in (0, 1)
                )
                logit = (anchors.embeds * weight).sum(1) + bias
                losses.append(F.binary_cross_entropy_with_logits(logit, target, reduction="sum").item())
            assert losses[1] < 0.9 * losses[0]


@pytest.mark.parametrize("method", METHODS)
def test_enrollment_is_deterministic(model, shots, method):
    other = deepcopy(model)
    first, second = enroll(model, shots, SIZE, method=method), enroll(other, shots, SIZE, method=method)
    assert first == second and same(model, other)


@pytest.mark.parametrize("method", ["mean", "fit"])
def test_enrolling_again_replaces_the_class(model, shots, method):
    first = enroll(model, shots, SIZE, method=method)
    before = state(model)
    for prototypes in model.model[-1].branch_prototypes:
        prototypes.weight.data[2] += 1
        prototypes.offset[3] = 5
    second = enroll(model, shots, SIZE, method=method)
    assert first == second and model.names == {0: "cat", 1: "dog", 2: "square", 3: "disc"}
    for k, v in model.state_dict().items():
        torch.testing.assert_close(v, before[k], rtol=0, atol=1e-6)


def test_classes_that_are_enrolled_one_after_the_other_are_those_enrolled_together(model, shots):
    other = deepcopy(model)
    enroll(model, shots, SIZE, method="mean")
    for c in (1, 3):
        labels = []
        for x in shots.labels:
            keep = x["cls"][:, 0] == c
            labels.append({**x, "cls": x["cls"][keep], "bboxes": x["bboxes"][keep]})
        enroll(other, shots._replace(labels=labels), SIZE, method="mean")
    assert other.names == model.names and list(other.enrolled) == ["square", "disc"]
    torch.testing.assert_close(other.model[-1].prototypes.weight, model.model[-1].prototypes.weight, rtol=0, atol=1e-4)


# Records --------------------------------------------------------------------------------------------------------------


def test_records_have_shots_method_confidence_and_replaced_classifier(model, shots):
    support = as_base(shots)
    own = model.model[-1].get_class(0)
    for method in ("mean", "fit"):
        result = enroll(model, support, SIZE, method=method)
        assert list(result.classes) == ["square", "cat"]
        assert [r["shots"] for r in result.classes.values()] == [4, 2]
        assert all(r.keys() == {"shots", "method", "conf", "replaced"} for r in result.classes.values())
        assert all(r["method"] == method for r in result.classes.values())
        assert result.classes["square"]["replaced"] is None
        for (vector, offset), (expected, zero) in zip(result.classes["cat"]["replaced"], own):
            assert torch.equal(vector, expected) and torch.equal(offset, zero)  # also when enrolled again
    assert model.names == {0: "cat", 1: "dog", 2: "square"} and model.model[-1].nc == 3


@pytest.mark.parametrize("method", ["mean", "fit"])
def test_confidences_equal_the_thresholds_of_cross_validation(model, shots, monkeypatch, method):
    asked = []
    monkeypatch.setattr(module, "thresholds", lambda found: asked.append(found) or [0.25, None])
    features = extract(class_rows(model), shots, SIZE)
    names, labels = compact(features, shots.names)
    result = enroll(model, shots, SIZE, method=method)
    found = detect_left_out(features, labels, [method] * 2, torch.tensor([4, 2]), model.model[-1].branch_prototypes[0])
    assert len(asked) == 1 and equal(asked[0], found) and len(found.conf) > 50
    assert [r["conf"] for r in result.classes.values()] == [0.25, None] and names == ["square", "disc"]


def test_shots_have_image_box_and_agreement(model, shots):
    features = extract(class_rows(model), shots, SIZE)
    names, labels = compact(features, shots.names)
    found = agreement(features, labels, 2)
    result = enroll(model, shots, SIZE, method="mean")
    assert list(result.objects) == names
    rows = {n: iter(row) for n, row in result.objects.items()}
    for i, (label, c) in enumerate((x, int(c)) for x in shots.labels for c in x["cls"].flat):
        shot, which = next(rows[shots.names[c]]), label["cls"][:, 0].tolist().index(c)
        x, y, w, h = label["bboxes"][which].tolist()
        assert shot.file == label["im_file"]
        assert shot.box == pytest.approx([x - w / 2, y - h / 2, x + w / 2, y + h / 2], abs=1e-6)
        assert (shot.sim_own, shot.sim_other) == pytest.approx(
            (found.sim_own[i].item(), found.sim_other[i].item()), abs=1e-4
        )
        assert shot.nearest == names[1 - labels[i]] and shot.suspect is bool(found.suspect[i])
    assert not any(list(row) for row in rows.values())


def test_unknown_attributes_of_a_shot_are_none(model, shots, monkeypatch):
    nan, no = float("nan"), torch.zeros(6, dtype=torch.bool)
    alone = Agreement(torch.full((6,), nan), torch.full((6,), nan), torch.full((6,), -1), no)
    monkeypatch.setattr(module, "agreement", lambda features, labels, n: alone)
    result = enroll(model, shots, SIZE, method="mean")
    assert {x[2:] for row in result.objects.values() for x in row} == {(None, None, None, False)}


def test_objects_without_an_anchor_are_no_shots(model, shots, monkeypatch):
    monkeypatch.setattr(module, "compact", lambda *args: (["square"], torch.where(compact(*args)[1] == 0, 0, -1)))
    result = enroll(model, shots, SIZE, method="mean")
    assert list(result.objects) == ["square"]
    assert [x.file for x in result.objects["square"]] == [shots.labels[i]["im_file"] for i in (0, 1, 2, 4)]


@pytest.mark.parametrize("method", METHODS)
def test_kept_classes_are_negatives_and_are_not_changed(models, shots, method):
    """The other classes come out as if all were enrolled."""
    model, every = (deepcopy(models["yolo11n-fewshot.yaml"]) for _ in range(2))
    shots, before = as_base(shots), logits(model, shots)
    expected = enroll(every, shots, SIZE, method=method)
    found = enroll(model, shots, SIZE, method=method, keep=["cat", "dog"])
    assert list(found.classes) == list(model.enrolled) == list(found.objects) == ["square"]
    assert {x.nearest for x in found.objects["square"]} == {"cat"}
    assert found.classes["square"] == expected.classes["square"] and model.names == every.names
    assert found.objects["square"] == expected.objects["square"]
    torch.testing.assert_close(logits(model, shots)[:, :2], before, rtol=0, atol=1e-5)
    for (vector, offset), (v, o) in zip(model.model[-1].get_class(2), every.model[-1].get_class(2)):
        assert torch.equal(vector, v) and torch.equal(offset, o)


def test_images_of_suspect_shots_are_named_once():
    rows = [("a", True), ("b", False), ("c", True), ("a", True)]
    objects = {"ant": [Shot(f, [0, 0, 1, 1], 0.1, 0.5, "bee", x) for f, x in rows], "bee": []}
    objects["bee"].append(Shot("d", [0, 0, 1, 1], 0.5, 0.1, "ant", False))
    assert Shots({}, objects).suspect == {"ant": ["a", "c"]}


def test_a_class_of_one_image_has_no_suggested_confidence(model, shots):
    one = shots._replace(labels=shots.labels[:1] + shots.labels[2:])
    result = enroll(model, one, SIZE)
    assert result.classes["disc"]["shots"] == 1 and result.classes["disc"]["conf"] is None


def test_detections_from_features_are_those_of_the_enrolled_model(model, shots):
    """All anchors of small images are kept; against Ultralytics' forward pass and NMS."""
    enroll(model, shots, SIZE, method="mean")
    prototypes, conf, seen = model.model[-1].branch_prototypes[0], 0.02, 0
    features = extract(class_rows(model), shots, SIZE, views=[View()])
    rows = F.normalize(prototypes.weight.detach()[..., 0], dim=1), prototypes.offset
    for i, label in enumerate(shots.labels):
        with torch.no_grad():
            preds = model(image_batch(label["im_file"], SIZE)["img"])[0]
        stock = non_max_suppression(preds, conf, 0.7, multi_label=True)[0]
        ours = detect(features, features.cls, torch.arange(5) == i, rows, prototypes, conf)
        seen += len(ours.cls)
        for c in range(4):
            expected = stock[stock[:, 5] == c, 4].sort(descending=True)[0]
            torch.testing.assert_close(ours.conf[ours.cls == c], expected, rtol=0, atol=1e-3)
    assert seen > 50


def test_replayed_anchors_are_negatives_except_those_of_enrolled_classes(models, model, shots):
    """A memory of the very anchors of the shots makes their classifiers less sure, unless it is of the class itself."""
    plain, cautious, own = (deepcopy(model) for _ in range(3))
    anchors = extract(class_rows(model), shots, SIZE).anchors[0]
    rows = anchors.objects >= 0
    parts = anchors.embeds[rows].half(), anchors.level[rows].to(torch.int16)
    for copy, c in ((cautious, 1), (own, 0)):
        copy.memory = [(*parts, torch.full((len(parts[0]),), c, dtype=torch.int16))]
    for copy in (plain, cautious, own):
        enroll(copy, as_base(shots), SIZE, method="fit")
    assert same(plain, own)
    before, after = (logits(copy, shots)[0, [0, 2]].amax(1) for copy in (plain, cautious))
    assert (after < before - 0.1).all()
    kept = deepcopy(models["yolo11n-fewshot.yaml"])
    kept.memory = own.memory
    enroll(kept, as_base(shots), SIZE, method="fit", keep=["cat"])  # cats stay, and are background to the squares
    assert (logits(kept, shots)[0, 2].amax() < logits(plain, shots)[0, 2].amax() - 0.1).all()


# Methods --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nms, branch", [(None, 0), (True, 0), (False, 1)])
def test_thresholds_are_chosen_for_the_predicting_branch(shots, monkeypatch, nms, branch):
    asked, model = [], model_of("yolo26n-fewshot.yaml")
    monkeypatch.setattr(module, "thresholds", lambda found: asked.append(found) or [None, None])
    features = extract(class_rows(model), shots, SIZE)
    labels = compact(features, shots.names)[1]
    enroll(model, shots, SIZE, method="mean", nms=nms)
    own = features._replace(anchors=features.anchors[branch:], embeds=features.embeds[branch:])
    asked_of = own, labels, ["mean"] * 2, torch.tensor([4, 2]), model.model[-1].branch_prototypes[branch]
    expected, other = (detect_left_out(*asked_of, x) for x in (nms is not False, nms is False))
    assert equal(asked[0], expected) and len(expected.conf) != len(other.conf)


def test_nms_false_changes_nothing_in_a_head_without_a_one_to_one_branch(model, shots):
    other = deepcopy(model)
    assert enroll(model, shots, SIZE, nms=False) == enroll(other, shots, SIZE) and same(model, other)


@pytest.mark.parametrize("single, method", [(None, "fit"), (PRIOR_STRENGTH, "fit"), (math.inf, "mean")])
def test_auto_enrolls_few_shots_by_the_prior_strength_of_training(model, shots, single, method):
    other = deepcopy(model)
    model.prior_strength = single
    few = shots._replace(labels=shots.labels[1:2])  # one shot of each class
    result = enroll(model, few, SIZE)
    assert [r["method"] for r in result.classes.values()] == [method] * 2
    enroll(other, few, SIZE, method=method)
    assert same(model, other)


@pytest.mark.parametrize("method, scores", [("mean", [0.1, 0.2]), ("fit", [0.2, 0.1])])
def test_auto_chooses_by_cross_validation_for_classes_of_enough_shots(model, shots, monkeypatch, method, scores):
    """The squares get what finds more of them, the discs, of which there are two, what training found best."""
    model.prior_strength, values = math.inf, iter(scores)
    monkeypatch.setattr(cross_validation, "ap50", lambda found: next(values))
    result = enroll(model, shots, SIZE)
    assert [r["method"] for r in result.classes.values()] == [method, "mean"]


def test_an_unknown_method_is_an_error(model, shots):
    with pytest.raises(ValueError, match=r"'enroll=median' is an invalid value.*auto, mean, fit"):
        enroll(model, shots, SIZE, method="median")


def test_a_class_without_an_anchor_is_an_error_and_the_model_is_not_changed(model, shots):
    before = state(model)
    twice = {**shots.labels[2], "cls": np.array([[1.0], [3.0]], dtype=np.float32)}
    twice["bboxes"] = shots.labels[2]["bboxes"].repeat(2, 0)  # all anchors of the second box belong to the first
    text = "No anchor of the model belongs to a box of disc at imgsz=64: .*/2.png: disc shares its box with square"
    with pytest.raises(ValueError, match=f"{text}.*keep one") as error:
        enroll(model, shots._replace(labels=[twice]), SIZE)
    assert "imgsz, or" not in str(error.value)  # which would not help
    assert same(model, before) and model.names == BASE and model.enrolled == {} and model.model[-1].nc == 2


def test_images_of_other_channels_are_an_error_before_extraction(model, shots, monkeypatch):
    monkeypatch.setattr(module, "extract", lambda *_: pytest.fail("began"))
    gray = FewShotDetectionModel("yolo11n-fewshot.yaml", ch=1, nc=2, verbose=False).eval()
    for network, support, text in (
        (model, shots._replace(channels=1), "channels=1, and the model takes 3. Set 'channels: 3'"),
        (gray, shots, "channels=3, and the model takes 1. Set 'channels: 1'"),
    ):
        with pytest.raises(ValueError, match=f"The images of {support.source} have {text}"):
            enroll(network, support, SIZE)


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_read_with_the_channels_of_the_model(file, tmp_path, channels):
    torch.manual_seed(0)
    network = FewShotDetectionModel("yolo11n-fewshot.yaml", ch=channels, nc=2, verbose=False)
    network.names, network.args = BASE, {}
    torch.save({"model": network, "train_args": {"imgsz": SIZE}}, tmp_path / "best.pt")
    model = FewShotYOLO(tmp_path / "best.pt")
    assert model.enroll(file, method="mean") == {"square": 4, "disc": 2}
    gray = file.with_name("gray.yaml")
    gray.write_text(file.read_text() + "channels: 1\n")
    try:
        if channels == 1:
            assert model.enroll(gray, method="mean") == {"square": 4, "disc": 2}
        else:
            with pytest.raises(ValueError, match="channels=1, and the model takes 3"):
                model.enroll(gray)
    finally:
        gray.unlink()


@pytest.fixture
def warnings(monkeypatch):
    texts = []
    monkeypatch.setattr(module.LOGGER, "warning", texts.append)
    return texts


def with_boxes(label, cls, bboxes):
    return {**label, "cls": np.array(cls, np.float32)[:, None], "bboxes": np.array(bboxes, np.float32)}


def test_shots_that_share_a_box_are_counted_and_named(model, shots, warnings):
    box = shots.labels[2]["bboxes"][0]
    near = box + np.float32([0, 0, 0.005, 0])  # not to the last digit
    labels = [*shots.labels[:2], with_boxes(shots.labels[2], [1, 3], [box, near]), *shots.labels[3:]]
    found = enroll(model, shots._replace(labels=labels), SIZE, method="mean")
    assert found.classes["square"]["shots"] + found.classes["disc"]["shots"] == 6
    (text,) = warnings
    assert text.startswith("1 of 7 shots do not count, since no anchor of the model belongs to them at imgsz=64: ")
    assert f"{shots.labels[2]['im_file']}: " in text and " shares its box with " in text and "keep one" in text
    assert "imgsz, or" not in text


def test_shots_too_small_for_an_anchor_are_counted_and_named_with_their_size(model, shots, warnings):
    with torch.no_grad():  # boxes of 10 x 10 strides, with which one of 1 x 1 pixel off their centers has no CIoU
        for box in model.model[-1].cv2:
            box[-1].weight.zero_()
            box[-1].bias.copy_(-(torch.arange(16) - 5).square().repeat(4).float())
    lost = [with_boxes(x, [1], [[6 / 64, 6 / 64, 1 / 64, 1 / 64]]) for x in shots.labels[2:4]]
    enroll(
        model, shots._replace(labels=[*shots.labels[:2], *lost, shots.labels[4]]), SIZE, method="mean", views=[View()]
    )
    (text,) = warnings
    assert text.startswith("2 of 7 shots do not count") and "Use a larger imgsz, or larger objects." in text
    assert all(f"{x['im_file']}: square (1 x 1 pixels)" in text for x in lost) and "shares" not in text


def test_no_warning_is_logged_if_every_shot_counts(model, shots, warnings):
    enroll(model, shots, SIZE, method="mean")
    assert not any("count" in x for x in warnings)


def test_a_class_to_keep_may_be_without_an_anchor(model, shots):
    other, one, rest = deepcopy(model), shots.labels[2], shots.labels[4:]
    twice = {**one, "cls": np.array([[1.0], [3.0]], dtype=np.float32)}
    twice["bboxes"] = one["bboxes"].repeat(2, 0)  # all anchors of the second box belong to the first
    shots = as_base(shots)._replace(labels=[twice, *rest])
    with pytest.raises(ValueError, match="a box of cat at"):
        enroll(deepcopy(model), shots, SIZE)
    found = enroll(model, shots, SIZE, keep=["cat"])
    assert found == enroll(other, shots._replace(labels=[one, *rest]), SIZE) and same(model, other)
    assert found.classes["square"]["shots"] == 2


def test_classes_are_numbered_by_label_index_and_objects_without_an_anchor_by_minus_one():
    cls = torch.tensor([7, 2, 7, 4, 2])
    embeds = [torch.ones(5, 3), torch.ones(5, 3)]
    embeds[0][1], embeds[1][3] = 0, 0
    features = Features(cls, torch.zeros(5, 4), torch.arange(5), list("abcde"), embeds, [], 1)
    names, labels = compact(features, {2: "two", 3: "three", 4: "four", 7: 7})
    assert names == ["two", "four", "7"] and labels.tolist() == [2, -1, 2, -1, 0]


# Forgetting -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cfg", FAMILIES)
def test_forgetting_removes_a_class_and_decreases_later_indices_by_one(models, shots, cfg):
    model = deepcopy(models[cfg])
    before = state(model)
    enroll(model, shots, SIZE)
    disc, rest = model.model[-1].get_class(3), logits(model, shots)[:, [0, 1, 3]]
    forget(model, "square")
    assert model.names == {0: "cat", 1: "dog", 2: "disc"} and list(model.enrolled) == ["disc"]
    assert model.nc == model.model[-1].nc == model.yaml["nc"] == 3
    assert model.model[-1].no == 3 + 4 * model.model[-1].reg_max
    for (x, y), (vector, offset) in zip(model.model[-1].get_class(2), disc):
        assert torch.equal(x, vector) and torch.equal(y, offset)
    torch.testing.assert_close(logits(model, shots), rest, rtol=0, atol=1e-5)
    forget(model, "disc")
    assert same(model, before) and model.names == BASE and model.enrolled == {} and model.yaml["nc"] == 2


def test_a_forgotten_class_leaves_the_replay_buffer(model, shots):
    enroll(model, shots, SIZE, method="mean")
    cls = torch.tensor([-1, 0, 1, 2, 3, 3, 2], dtype=torch.int16)
    model.memory = [(torch.arange(7)[:, None].half(), torch.zeros(7, dtype=torch.int16), cls)]
    forget(model, "square")  # class 2
    embeds, level, cls = model.memory[0]
    assert embeds[:, 0].tolist() == [0, 1, 2, 4, 5] and len(level) == 5
    assert cls.tolist() == [-1, 0, 1, 2, 2] and cls.dtype == torch.int16


def test_a_forgotten_class_can_be_enrolled_again_and_comes_last(model, shots):
    enroll(model, shots, SIZE, method="mean")
    square = model.model[-1].get_class(2)
    forget(model, "square")
    enroll(model, shots, SIZE, method="mean")
    assert model.names == {0: "cat", 1: "dog", 2: "disc", 3: "square"}
    for (x, y), (vector, offset) in zip(model.model[-1].get_class(3), square):
        torch.testing.assert_close(x, vector, rtol=0, atol=1e-6)
        assert not y and not offset


@pytest.mark.parametrize("cfg", FAMILIES)
def test_forgetting_restores_the_classifier_of_a_base_class(models, shots, cfg):
    model = deepcopy(models[cfg])
    for branch in model.model[-1].branch_prototypes:
        branch.weight.data *= torch.tensor([1.7, 0.6]).view(2, 1, 1)  # learned prototypes have any length
        branch.gain[0], branch.offset[0] = 1.3, -0.4
    before = logits(model, shots)
    for method in ("fit", "mean"):
        enroll(model, as_base(shots), SIZE, method=method)
        after = logits(model, shots)
        assert not torch.allclose(after[:, 0], before[:, 0], atol=0.1)
        torch.testing.assert_close(after[:, 1], before[:, 1], rtol=0, atol=1e-5)
    forget(model, "cat")
    assert model.names == {0: "cat", 1: "dog", 2: "square"} and model.nc == 3 and list(model.enrolled) == ["square"]
    torch.testing.assert_close(logits(model, shots)[:, :2], before, rtol=0, atol=1e-5)


def test_forgetting_a_class_that_is_not_enrolled_is_an_error(model, shots):
    with pytest.raises(ValueError, match=r"'square' was not enrolled.*No class is enrolled"):
        forget(model, "square")
    enroll(model, shots, SIZE, method="mean")
    before = state(model)
    for name in ("cat", "bird"):
        with pytest.raises(ValueError, match=f"'{name}' was not enrolled.*Enrolled are square, disc"):
            forget(model, name)
    assert same(model, before) and len(model.names) == 4
    forget(model, "square")
    with pytest.raises(ValueError, match="'square' was not enrolled"):
        forget(model, "square")


# Python interface -----------------------------------------------------------------------------------------------------


def test_python_interface_enrolls_and_predicts_with_the_new_classes(file, tmp_path):
    model = FewShotYOLO("fewshot.yaml")
    model.model.names = {**BASE, **{i: f"base{i}" for i in range(2, 80)}}
    assert model.enroll(file, imgsz=SIZE) == {"square": 4, "disc": 2}
    result = model.predict(str(file.parent / "images/0.png"), imgsz=SIZE, verbose=False)[0]
    assert len(result.names) == 82 and result.names[80] == "square"
    model.save(tmp_path / "enrolled.pt")
    assert FewShotYOLO(tmp_path / "enrolled.pt").names[81] == "disc"


def test_a_class_whose_name_the_model_has_twice_is_not_enrolled(tmp_path):
    model = FewShotDetectionModel("yolo11n-fewshot.yaml", nc=3, verbose=False).eval()
    model.names = {0: "a", 1: "b", 2: "a"}
    labels = [{"im_file": "1.png", "cls": np.zeros((1, 1), np.float32), "bboxes": np.full((1, 4), 0.5, np.float32)}]
    with pytest.raises(ValueError, match=r"Several classes of the model have the name a, so"):
        enroll(model, Support({0: "a"}, labels, False, tmp_path), SIZE)


@pytest.mark.parametrize("cfg", [FAMILIES[0], None])
def test_a_new_class_never_takes_the_place_of_one_where_a_name_is_repeated(models, shots, cfg):
    model = deepcopy(models[cfg]) if cfg else stock_model()
    model.names = {0: "cat", 1: "cat"}
    before = logits(model, shots)
    enroll(model, shots, SIZE, method="mean")
    assert model.names == {0: "cat", 1: "cat", 2: "square", 3: "disc"} and model.nc == 4
    torch.testing.assert_close(logits(model, shots)[:, :2], before, rtol=0, atol=1e-5)


# Background images ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def background(tmp_path_factory):
    """Images that the support set does not have."""
    root = tmp_path_factory.mktemp("background")
    rng = np.random.default_rng(7)
    for i in range(3):
        assert cv2.imwrite(str(root / f"{i}.png"), rng.integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8))
    return read_background(root)


def test_background_images_are_the_last_and_have_no_object(model, shots, background):
    rows = class_rows(model)
    features, plain = extract(rows, shots, SIZE), extract(rows, background, SIZE, views=[View()])
    both = add_background(features, plain)
    assert both.files == features.files + plain.files and both.n_background == 3 and len(plain.cls) == 0
    for own, other, joined in zip(features.anchors, plain.anchors, both.anchors):
        n = len(own.image)
        assert all(torch.equal(x[:n], y) for x, y in zip(joined, own))
        assert torch.equal(joined.image[n:], other.image + 5) and (joined.objects[n:] == -1).all()
        assert sorted(set(joined.image[n:].tolist())) == [5, 6, 7] and (joined.view[n:] == 0).all()
    assert torch.equal(both.cls, features.cls) and both.embeds is features.embeds


@pytest.mark.parametrize("cfg", ["yolo11n-fewshot.yaml", "stock"])
def test_background_images_lower_the_scores_in_them(models, shots, background, cfg):
    scores = []
    for given in (None, background):
        model = deepcopy(stock_model() if cfg == "stock" else models[cfg])
        result = enroll(model, shots, SIZE, method="fit", background=given)
        assert {n: x["shots"] for n, x in result.classes.items()} == {"square": 4, "disc": 2}
        with torch.no_grad():
            images = [torch.from_numpy(cv2.imread(x["im_file"])[..., ::-1].copy()) for x in background.labels]
            outputs = [model(x.permute(2, 0, 1)[None] / 255)[0][0, 4:] for x in images]
        scores.append(torch.stack(outputs)[:, -2:].amax((0, 2)))
    assert (scores[1] < scores[0]).all()


def test_a_single_shot_has_a_threshold_with_background_only(shots, background):
    one = shots._replace(labels=shots.labels[1:2])
    assert all(x["conf"] is None for x in enroll(stock_model(), one, SIZE).classes.values())
    assert all(x["conf"] > 0 for x in enroll(stock_model(), one, SIZE, background=background).classes.values())


@pytest.mark.parametrize("cfg, expected", [("yolo11n-fewshot.yaml", [5, 2]), ("stock", [4, 2])])
def test_prior_strength_is_by_shots_and_in_stock_heads_by_images(models, shots, monkeypatch, cfg, expected):
    """A second square is labeled in one of the four images of squares."""
    i = next(i for i, x in enumerate(shots.labels) if x["cls"].tolist() == [[1]])
    twice = {"cls": np.float32([[1], [1]]), "bboxes": np.float32([[0.3, 0.3, 0.4, 0.4], [0.75, 0.75, 0.4, 0.4]])}
    shots = shots._replace(labels=[{**x, **twice} if j == i else x for j, x in enumerate(shots.labels)])
    given, model = [], stock_model() if cfg == "stock" else deepcopy(models[cfg])

    def zeros(examples):
        given.append(examples.shots.tolist())
        return examples.space.zeros(len(examples.shots))

    monkeypatch.setitem(METHODS_TABLE, "fit", zeros)
    result = enroll(model, shots, SIZE, method="fit")
    assert given[-1] == expected and [x["shots"] for x in result.classes.values()] == [5, 2]
