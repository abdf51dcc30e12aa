"""Enrollment into stock models of all families and tasks, from the support set to the results and the saved file."""

import os
import sys
from copy import deepcopy
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import ultralytics
from test_deploy import float32_openvino, run  # noqa: F401  (a fixture)
from test_deploy import same as same_detections
from test_rows import (
    DETECT,
    DUAL,
    PLACES,
    SIZE,
    TASKS,
    branches_of,
    features_and_logits,
    image_of,
    lasts,
    same,
    state,
    stock_of,
)
from ultralytics import RTDETR, YOLO, YOLOE, YOLOWorld
from ultralytics.models import yolo
from ultralytics.nn import tasks
from ultralytics.utils.nms import non_max_suppression
from ultralytics.utils.ops import xywh2xyxy

from yolo_fewshot import FewShotYOLO
from yolo_fewshot.compat import TESTED
from yolo_fewshot.data.support import read_support
from yolo_fewshot.enroll.enroll import compact, enroll
from yolo_fewshot.enroll.features import View, extract, standardize
from yolo_fewshot.enroll.methods import classifiers
from yolo_fewshot.enroll.replay import add_replay
from yolo_fewshot.nn.rows import STD_MIN, class_rows
from yolo_fewshot.nn.stem_features import draw_features
from yolo_fewshot.plots.results import FewShotPredictor, FewShotResults

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def pose(request):
    """Skip pose models with older Ultralytics, which cannot predict with one of a YAML nor read its labels as boxes."""
    older = [int(x) for x in ultralytics.__version__.split(".")[:3]] < [int(x) for x in TESTED.split(".")]
    if older and any(x in request.node.name.partition("[")[2] for x in ("pose", "keypoints")):
        pytest.skip("pose models need a newer Ultralytics")


KINDS = ("weight", "bias")
SETTINGS = {"imgsz": SIZE, "device": "cpu", "verbose": False}
KEYPOINTS = np.linspace(0.1, 0.9, 17)


def label_of(i, form):
    """The label of the square in a format; the box that encloses it is always that of the square."""
    x, y, s = (v / SIZE for v in PLACES[i])
    if form == "box":
        values = [x, y, s, s]
    elif form == "polygon":
        values = [x - s / 2, y, x - s / 4, y - s / 2, x + s / 2, y - s / 4, x, y + s / 2]
        values += [x - s / 4, y + s / 3]
    elif form == "corners":  # of a square that is turned by 45 degrees
        values = [x, y - s / 2, x + s / 2, y, x, y + s / 2, x - s / 2, y]
    else:
        values = [x, y, s, s, *(v for k in KEYPOINTS for v in (x + s * (k - 0.5), y, 2))]
    return " ".join(f"{v:.6f}" for v in values)


def draw_shots(root, form="box", names=("square", "disc"), disc=True):
    """Write four shots of a square and two of a disc, and an image without either."""
    for folder in ("images", "labels"):
        (root / folder).mkdir(parents=True)
    for i in range(len(PLACES) + 1):
        cv2.imwrite(str(root / f"images/{i}.png"), image_of(i))
        rows = [f"0 {label_of(i, form)}"] if i < len(PLACES) else []
        if disc and form == "box" and rows and i % 2 == 0:
            rows.append(f"1 {54 / SIZE} {8 / SIZE} {15 / SIZE} {15 / SIZE}")
        (root / f"labels/{i}.txt").write_text("\n".join(rows))
    names = names if disc and form == "box" else names[:1]
    text = f"train: images\nval: images\nnames: [{', '.join(names)}]\n"
    (root / "shots.yaml").write_text(text + "kpt_shape: [17, 3]\n" * (form == "keypoints"))
    return root / "shots.yaml"


@pytest.fixture(scope="module")
def shots(tmp_path_factory):
    return draw_shots(tmp_path_factory.mktemp("shots"))


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    return draw_shots(tmp_path_factory.mktemp("squares"), disc=False)


def yolo_of(cfg):
    """A wrapper of a stock network that no file holds."""
    model = FewShotYOLO(cfg)
    model.model = stock_of(cfg)
    return model


def tensor_of(i):
    return torch.from_numpy(image_of(i)[..., ::-1].copy()).permute(2, 0, 1)[None].float() / 255


@torch.no_grad()
def detections(model, img, old):
    """Detections of some classes, without a limit on their number."""
    head = model.model[-1]
    head.max_det = 100_000
    nc, rotated = head.nc, "OBB" in type(head).__name__
    found = model(img)[0]
    found = found[0] if isinstance(found, tuple) else found
    if model.end2end:
        return found[0][(found[0][:, 5] < old) & (found[0][:, 4] > 1e-4)]
    settings = {"conf_thres": 1e-4, "multi_label": True, "max_det": 100_000, "nc": nc, "rotated": rotated}
    return non_max_suppression(found, iou_thres=0.6, classes=list(range(old)), max_nms=10**6, **settings)[0]


# Old classes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cfg", DETECT + TASKS)
def test_old_classes_are_untouched_and_forgetting_gives_the_model_back(cfg, shots, tmp_path):
    wrapper = yolo_of(cfg)
    model, img = wrapper.model, tensor_of(0)
    nc, kind, head, names, no = model.model[-1].nc, type(model), model.model[-1], dict(model.names), model.model[-1].no
    before = state(model)
    logits = {b: features_and_logits(model, b, img) for b in branches_of(cfg)}
    expected = {}
    for end2end in {False, cfg.startswith(DUAL)}:
        model.end2end = end2end
        expected[end2end] = detections(model, img, nc)
        assert len(expected[end2end]) > 20
    assert wrapper.enroll(shots, imgsz=SIZE, method="mean" if "11" in cfg else "fit") == {"square": 4, "disc": 2}

    assert type(model) is kind and wrapper.model is model and model.model[-1] is head
    assert model.names == wrapper.names == {**names, nc: "square", nc + 1: "disc"}
    assert model.nc == model.yaml["nc"] == head.nc == nc + 2 and head.no == no + 2
    for branch, levels in logits.items():
        for (features, old), (after, new) in zip(levels, features_and_logits(model, branch, img)):
            assert torch.equal(features, after) and torch.equal(old, new[..., :nc])
    for end2end, rows in expected.items():
        model.end2end = end2end
        found = detections(model, img, nc)
        assert torch.equal(found, rows[: len(found)])  # without NMS there are no more detections than anchors
        assert len(found) > 0 if end2end else len(found) == len(rows)
    for k, v in model.state_dict().items():
        assert torch.equal(v[:nc] if v.shape != before[k].shape else v, before[k]), k

    wrapper.forget("square")
    assert model.names == {**names, nc: "disc"} and list(model.enrolled) == ["disc"]
    wrapper.forget("disc")
    assert same(model, before) and model.names == names and model.enrolled == {}
    assert model.nc == model.yaml["nc"] == head.nc == nc and head.no == no


@pytest.mark.parametrize("cfg", ["yolo11n.yaml", "yolo26n-pose.yaml", "yolo26n-seg.yaml"])
def test_a_known_class_is_enrolled_again_in_its_place_and_restored(cfg, tmp_path):
    known = draw_shots(tmp_path, names=("dog", "disc"))
    wrapper = yolo_of(cfg)
    model = wrapper.model
    before, nc = state(model), model.model[-1].nc
    assert wrapper.enroll(known, imgsz=SIZE, method="fit") == {"dog": 4, "disc": 2}
    assert model.nc == nc + 1 and model.names[1] == "dog" and model.names[nc] == "disc"
    assert wrapper.enroll(known, imgsz=SIZE, method="mean") == {"dog": 4, "disc": 2}  # the trained row is kept
    wrapper.forget("disc")
    others = [i for i in range(nc) if i != 1]
    ends = {f"model.{len(model.model) - 1}.{b}cv3.{i}.2.{k}" for b in branches_of(cfg) for i in range(3) for k in KINDS}
    assert all(torch.equal(v, before[k]) != (k in ends) for k, v in model.state_dict().items())
    assert all(torch.equal(model.state_dict()[k][others], before[k][others]) for k in ends)
    wrapper.forget("dog")
    assert same(model, before) and list(model.enrolled) == []


def test_names_in_another_order_stay_at_their_indices(shots):
    wrapper = yolo_of("yolo11n.yaml")
    names = dict(wrapper.model.names)
    wrapper.model.names = dict(reversed(names.items()))  # as a data.yaml may list them
    wrapper.enroll(shots, imgsz=SIZE, method="mean")
    assert list(wrapper.forget("square").forget("disc").model.names.items()) == list(names.items())
    wrapper.model.names = list(names.values())
    wrapper.enroll(shots, imgsz=SIZE, method="mean")
    assert wrapper.model.names == {**names, len(names): "square", len(names) + 1: "disc"}


def test_a_class_that_was_renamed_is_not_forgotten(shots):
    wrapper = yolo_of("yolo11n.yaml")
    wrapper.enroll(shots, imgsz=SIZE, method="mean")
    wrapper.model.names[wrapper.model.nc - 1] = "ring"
    with pytest.raises(ValueError, match=r"'disc' was renamed after its enrollment\. Give the class this name again"):
        wrapper.forget("disc")


def test_classes_are_enrolled_in_inference_mode_as_out_of_it(shots):
    models = [yolo_of("yolo11n.yaml") for _ in range(2)]
    with torch.inference_mode():
        models[0].enroll(shots, imgsz=SIZE, method="fit")
    models[1].enroll(shots, imgsz=SIZE, method="fit")
    assert same(models[0].model, models[1].model.state_dict())
    with torch.inference_mode():
        models[0].forget("square")
    assert not any(x.is_inference() for x in models[0].model.state_dict().values())


def test_a_model_of_one_class_for_all_validates_enrolled_ones_apart(shots, monkeypatch):
    wrapper, seen = yolo_of("yolo11n.yaml"), []
    monkeypatch.setattr(YOLO, "val", lambda *_, **kwargs: seen.append(kwargs.get("single_cls")))
    wrapper.overrides["single_cls"] = True  # as after training with it
    wrapper.model.names = {0: "item"}
    wrapper.val(data="shots.yaml")
    wrapper.model.names = {0: "item", 1: "square"}
    wrapper.val(data="shots.yaml")
    wrapper.val(data="shots.yaml", single_cls=True)
    assert seen == [None, False, True]


# New classes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["mean", "fit"])
@pytest.mark.parametrize("cfg", ["yolov8n.yaml", "yolov10n.yaml", "yolo26n-seg.yaml", "yolo11n-obb.yaml"])
def test_the_head_computes_the_logits_of_the_fit(cfg, method, shots):
    """Features of a hook on the last layers, standardized here, give the logits that the classifiers were fitted to."""
    wrapper = yolo_of(cfg)
    model, support = wrapper.model, read_support(shots, wrapper.names)
    rows = class_rows(deepcopy(model))
    standardize(rows, support, SIZE, 3, [View(), View(0.8)])
    features = add_replay(extract(rows, support, SIZE, batch=3, views=[View(), View(0.8)]), rows, [])
    _, labels = compact(features, support.names)
    counts = torch.bincount(labels)
    trained = features_and_logits  # of the model before it changes: the support images in the first view
    plain = torch.cat([tensor_of(i) for i in range(5)])
    seen = {b: [x[0].double().flatten(0, 1) for x in trained(model, b, plain)] for b in branches_of(cfg)}
    wrapper.ckpt = {"train_args": {}}
    nc = model.model[-1].nc
    enroll(model, support, SIZE, 2, method, [View(), View(0.8)])
    img = torch.cat([tensor_of(0), tensor_of(4)])
    for b, branch in enumerate(branches_of(cfg)):
        space = rows.spaces()[b]
        vectors, offsets = classifiers(features, labels, [method] * 2, counts, b, space)
        assert vectors.abs().max() > 0.01
        for level, (f, logits) in enumerate(features_and_logits(model, branch, img)):
            mean, std = seen[branch][level].mean(0), seen[branch][level].std(0, unbiased=False).clamp(min=STD_MIN)
            embeds = ((f.double() - mean) / std).float().flatten(0, 1)
            expected = space.logits(embeds, torch.full((len(embeds),), level), vectors, offsets)
            torch.testing.assert_close(logits[..., nc:].flatten(0, 1), expected, rtol=1e-3, atol=2e-2)


def iou_of(box, i):
    """IoU of a box with the square in an image."""
    x, y, s = PLACES[i]
    w, h = (min(box[k + 2], c + s / 2) - max(box[k], c - s / 2) for k, c in ((0, x), (1, y)))
    inside = max(w, 0) * max(h, 0)
    return inside / ((box[2] - box[0]) * (box[3] - box[1]) + s * s - inside)


@pytest.mark.parametrize("cfg", ["yolo11n.yaml", *TASKS])
def test_an_enrolled_class_comes_with_what_the_task_predicts(cfg, squares):
    wrapper = yolo_of(cfg)
    images = [image_of(i).repeat(4, 0).repeat(4, 1) for i in range(4)]  # large enough for a legend
    results = wrapper.predict(images, support=squares, enroll="fit", conf=0.002, max_det=3, **SETTINGS)
    assert wrapper.names[wrapper.model.nc - 1] == "square"
    ious = []
    for i, r in enumerate(results):
        task = cfg.removesuffix(".yaml").rpartition("-")[2]
        boxes = r.obb if task == "obb" else r.boxes
        assert isinstance(r, FewShotResults) and len(boxes) and {r.names[int(c)] for c in boxes.cls} == {"square"}
        ious.append(max(iou_of([v / 4 for v in box], i) for box in boxes.xyxy.tolist()))
        if task == "seg":
            assert len(r.masks) == len(boxes) and r.masks.data.any()
        elif task == "pose":
            assert r.keypoints.xy.shape == (len(boxes), 17, 2)
        elif task == "obb":
            assert boxes.xyxyxyxy.shape == (len(boxes), 4, 2) and r.boxes is None
        plotted = r.plot()
        solid = super(FewShotResults, r).plot()
        assert plotted.shape == solid.shape == images[i].shape
        assert np.array_equal(plotted, solid) == (task == "obb")  # else boxes are dashed, and a legend is drawn
    assert np.mean(ious) > 0.3


@pytest.mark.parametrize("cfg", ["yolov10n.yaml", "yolo26n.yaml"])
def test_each_branch_is_enrolled_with_its_own_assignment(cfg, squares):
    model = stock_of(cfg)
    rows, support = class_rows(model), read_support(squares, model.names)
    standardize(rows, support, SIZE, 16, [View()])
    features = extract(rows, support, SIZE, views=[View()])
    many, one = (torch.bincount(a.objects[a.objects >= 0], minlength=4) for a in features.anchors)
    assert one.tolist() == [1, 1, 1, 1] and all(4 <= n <= 10 for n in many)
    wrapper = yolo_of(cfg)
    wrapper.enroll(squares, imgsz=SIZE, method="fit", nms=False)
    heads = [torch.stack([m.weight[80, :, 0, 0] for m in lasts(wrapper.model, b)]) for b in ("", "one2one_")]
    assert heads[0].abs().sum() > 0 and heads[1].abs().sum() > 0 and not torch.allclose(*heads, atol=1e-2)


@pytest.mark.parametrize("cfg", ["yolov10n.yaml", "yolo26n.yaml", "yolo26n-seg.yaml"])
def test_without_nms_an_object_has_one_box(cfg, squares):
    wrapper = yolo_of(cfg)
    scores = []
    for i in range(4):
        (r,) = wrapper.predict(image_of(i), support=squares, enroll="fit", nms=False, conf=1e-3, **SETTINGS)
        here = [float(s) for s, box in zip(r.boxes.conf, r.boxes.xyxy.tolist()) if iou_of(box, i) > 0.5]
        assert r.names[int(r.boxes.cls[0])] == "square" and here
        scores.append([*sorted(here, reverse=True), 0.0])
    best, second = (np.mean([x[k] for x in scores]) for k in (0, 1))
    assert best > 2 * second


FUSED = [(cfg, x) for cfg in ("yolo26n.yaml", "yolo26n-seg.yaml", "yolo26n-pose.yaml") for x in (False, True)]


@pytest.mark.parametrize("cfg, end2end", [("yolo11n.yaml", False), *FUSED])
def test_a_fused_model_enrolls_with_what_is_left(cfg, end2end, squares):
    wrapper = yolo_of(cfg)
    wrapper.model.end2end = end2end
    wrapper.fuse(verbose=False)
    before = state(wrapper.model)
    (r,) = wrapper.predict(image_of(1), support=squares, enroll="fit", conf=1e-3, max_det=3, **SETTINGS)
    assert wrapper.model.model[-1].nc == len(wrapper.names) and r.names[int(r.boxes.cls[0])] == "square"
    assert max(iou_of(box, 1) for box in r.boxes.xyxy.tolist()) > 0.3
    wrapper.forget("square")
    assert same(wrapper.model, before)


# Labels of tasks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cfg, form",
    [
        ("yolo11n-seg.yaml", "polygon"),
        ("yolo26n-obb.yaml", "corners"),
        ("yolo11n-pose.yaml", "keypoints"),
        ("yolo26n.yaml", "polygon"),
        ("yolo11n-obb.yaml", "polygon"),
        ("yolo11n.yaml", "keypoints"),
    ],
)
def test_labels_of_a_task_are_as_good_as_boxes(cfg, form, squares, tmp_path):
    labeled = draw_shots(tmp_path, form)
    for x, (cx, cy, s) in zip(read_support(labeled, {}).labels, PLACES):
        expected = [(cx - s / 2) / SIZE, (cy - s / 2) / SIZE, (cx + s / 2) / SIZE, (cy + s / 2) / SIZE]
        assert xywh2xyxy(x["bboxes"]).tolist() == [pytest.approx(expected, abs=1e-5)]
    by_boxes, by_labels = yolo_of(cfg), yolo_of(cfg)
    by_boxes.enroll(squares, imgsz=SIZE, method="fit")
    assert by_labels.enroll(labeled, imgsz=SIZE, method="fit") == {"square": 4}
    for b in branches_of(cfg):
        for x, y in zip(lasts(by_boxes.model, b), lasts(by_labels.model, b)):
            torch.testing.assert_close(x.weight, y.weight, rtol=0, atol=1e-3)


VALIDATORS = {"seg": yolo.segment.SegmentationValidator, "obb": yolo.obb.OBBValidator, "pose": yolo.pose.PoseValidator}
FORMS = {"seg": "polygon", "obb": "corners", "pose": "keypoints", "yolo11n": "box"}


@pytest.mark.parametrize("cfg", ["yolo11n.yaml", "yolo11n-seg.yaml", "yolo26n-obb.yaml", "yolo11n-pose.yaml"])
def test_validation_matches_the_labels_by_name(cfg, tmp_path):
    """In the data the class is number 0, and in the model number nc."""
    task = cfg.removesuffix(".yaml").rpartition("-")[2]
    data, wrapper = draw_shots(tmp_path / "data", FORMS.get(task, "box"), disc=False), yolo_of(cfg)
    nc = wrapper.model.model[-1].nc
    settings = {"imgsz": SIZE, "workers": 0, "batch": 2, "rect": False, "device": "cpu", "project": str(tmp_path)}
    metrics = wrapper.val(data=data, support=data, enroll="fit", **settings)
    assert metrics.names[nc] == "square" and metrics.ap_class_index.tolist() == [nc]
    assert metrics.nt_per_class[nc] == 4 and metrics.nt_per_class.sum() == 4
    assert metrics.box.map50 > 0.3
    validator = wrapper._smart_load("validator")
    assert issubclass(validator, VALIDATORS.get(task, yolo.detect.DetectionValidator))
    predictor = wrapper._smart_load("predictor")
    assert (predictor is FewShotPredictor) == (task not in VALIDATORS)
    (folder,) = (p for p in tmp_path.iterdir() if p.name.startswith("val"))
    assert (folder / "val_batch0_labels.jpg").exists() and (folder / "support_check.png").exists()


def test_validation_refuses_labels_of_an_unknown_class(tmp_path):
    data = draw_shots(tmp_path, "keypoints")
    wrapper = yolo_of("yolo11n-pose.yaml")
    wrapper.model.enrolled = {"other": {"shots": 1, "method": "fit", "conf": None, "replaced": None}}
    with pytest.raises(ValueError, match=r"show square, which the model does not know"):
        wrapper.val(data=data, imgsz=SIZE, workers=0, plots=False, device="cpu")


# Files ----------------------------------------------------------------------------------------------------------------

CLASSES = {
    "yolo11n.yaml": tasks.DetectionModel,
    "yolo26n.yaml": tasks.DetectionModel,
    "yolo26n-seg.yaml": tasks.SegmentationModel,
    "yolo11n-obb.yaml": tasks.OBBModel,
    "yolo26n-pose.yaml": tasks.PoseModel,
}


def stock_file(cfg, root):
    """A stock checkpoint, in half precision as always."""
    model = YOLO(cfg)
    model.model = stock_of(cfg)
    model.save(root / "stock.pt")
    return root / "stock.pt"


def detected(model, **kwargs):
    found = [model.predict(image_of(i), conf=0.005, **SETTINGS, **kwargs)[0] for i in range(4)]
    return [(r.obb if r.obb is not None else r.boxes).data for r in found]


@pytest.mark.parametrize("cfg", CLASSES)
def test_a_saved_file_is_a_stock_checkpoint_that_knows_its_shots(cfg, shots, tmp_path):
    file = stock_file(cfg, tmp_path)
    model = FewShotYOLO(file)
    before = state(model.model)
    model.save(file)
    model.enroll(shots, imgsz=SIZE, method="fit")
    model.save(tmp_path / "site.pt")
    ckpt = torch.load(tmp_path / "site.pt", weights_only=False)
    assert type(ckpt["model"]) is CLASSES[cfg] and ckpt["model"].nc == model.model.nc == len(model.names)
    rows = sum(m.weight.numel() + m.bias.numel() for b in branches_of(cfg) for m in lasts(model.model, b))
    assert os.path.getsize(tmp_path / "site.pt") - os.path.getsize(file) < 4 * rows + 20_000  # the record and names
    again = YOLO(tmp_path / "site.pt")
    assert type(again) is FewShotYOLO and again.model.enrolled.keys() == {"square", "disc"}
    assert again.model.enrolled["square"]["shots"] == 4 and same(again.model, model.model.state_dict())
    assert sum(map(len, detected(model))) > 4
    assert all(map(torch.equal, detected(model), detected(again)))
    again.enroll(shots, imgsz=SIZE, method="mean")  # once more
    assert again.model.nc == model.model.nc and again.model.enrolled["disc"]["method"] == "mean"
    again.forget("square").forget("disc")
    assert same(again.model, before)
    again.save(tmp_path / "back.pt")
    assert type(YOLO(tmp_path / "back.pt")) is YOLO  # a stock model again
    assert abs(os.path.getsize(tmp_path / "back.pt") - os.path.getsize(file)) < 4_000


def test_a_half_precision_copy_gets_its_exact_weights_back(shots, tmp_path):
    model = FewShotYOLO(stock_file("yolo11n.yaml", tmp_path))
    model.enroll(shots, imgsz=SIZE, method="fit")
    model.save(tmp_path / "site.pt")
    saved = torch.load(tmp_path / "site.pt", weights_only=False)["model"].state_dict()
    wide = {k for k, v in saved.items() if v.dtype == torch.float32}
    assert wide == {f"model.23.cv3.{i}.2.{k}" for i in range(3) for k in ("weight", "bias")}


def test_a_halved_model_enrolls_with_its_rounded_weights(shots):
    models = []
    for halved in (True, False):
        model = yolo_of("yolo11n.yaml")
        model.model.half() if halved else model.model.half().float()
        model.enroll(shots, imgsz=SIZE, method="fit")
        models.append(model.model)
    assert same(models[0], models[1].state_dict())


@pytest.mark.parametrize("name", ["yolo11n.yaml", "yolo11n-seg.yaml"])
def test_training_on_starts_from_the_classes_and_drops_the_record(name, squares, tmp_path):
    model = FewShotYOLO(stock_file(name, tmp_path))
    model.enroll(squares, imgsz=SIZE, method="fit")
    model.save(tmp_path / "site.pt")
    model = YOLO(tmp_path / "site.pt")
    data = draw_shots(tmp_path / "data", "polygon", disc=False)
    settings = {"epochs": 1, "imgsz": SIZE, "batch": 4, "workers": 0, "plots": False, "val": False, "device": "cpu"}
    model.train(data=data, **settings, project=str(tmp_path), optimizer="SGD", lr0=1e-4, warmup_epochs=0)
    assert model.model.nc == 1 and list(model.names.values()) == ["square"]
    trained = YOLO(tmp_path / "train/weights/best.pt")
    assert type(trained) is YOLO and not hasattr(trained.model, "enrolled")
    assert type(trained.model) is type(stock_of(name))


ALONE = """
import importlib.abc, sys
class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "yolo_fewshot":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
import cv2, numpy as np
from ultralytics import YOLO
file, size, data, *images = sys.argv[1:]
model = YOLO(file)
found = [model.predict(cv2.imread(x), imgsz=int(size), conf=0.005, device="cpu", verbose=False)[0] for x in images]
np.savez("found.npz", *((r.boxes if r.obb is None else r.obb).data.numpy() for r in found))
print("model", type(model).__name__, type(model.model).__name__, len(model.names))
settings = {"epochs": 1, "imgsz": int(size), "batch": 4, "workers": 0, "plots": False, "device": "cpu"}
model.train(data=data, project="runs", **settings)
print("trained", type(model.model).__name__, list(model.names.values()), model.trainer.last.exists())
print("missing", [x for x in sys.modules if x.partition(".")[0] == "yolo_fewshot"])
"""


@pytest.mark.slow
@pytest.mark.parametrize("cfg, form", [("yolo26n.yaml", "box"), ("yolo11n-seg.yaml", "polygon")])
def test_a_saved_file_predicts_and_trains_where_this_package_is_missing(cfg, form, squares, tmp_path):
    model = FewShotYOLO(stock_file(cfg, tmp_path))
    model.enroll(squares, imgsz=SIZE, method="fit")
    model.save(tmp_path / "site.pt")
    data = draw_shots(tmp_path / "data", form, disc=False)
    images = [tmp_path / f"data/images/{i}.png" for i in range(4)]
    done = run(
        [sys.executable, "-c", ALONE, "site.pt", SIZE, data, *images],
        tmp_path,
        YOLO_FEWSHOT_DISABLE="1",
    )
    assert done.returncode == 0, done.stderr
    lines = [x for x in done.stdout.splitlines() if x.startswith(("model ", "trained ", "missing "))]
    kind = type(model.model).__name__
    assert lines == [f"model YOLO {kind} 81", f"trained {kind} ['square'] True", "missing []"]
    found = np.load(tmp_path / "found.npz")
    found, expected = [torch.from_numpy(found[f"arr_{i}"]) for i in range(4)], detected(model)
    assert sum(map(len, expected)) > 4
    same_detections(found, expected, boxes=1e-2, scores=1e-4)


FORMATS = {
    "torchscript": {"format": "torchscript"},
    "onnx": {"format": "onnx"},
    "onnx-nms": {"format": "onnx", "nms": True, "conf": 0.005, "iou": 0.7},
    "openvino": {"format": "openvino"},
}


@pytest.mark.slow
@pytest.mark.parametrize("cfg", ["yolo11n.yaml", "yolo26n.yaml"])
@pytest.mark.parametrize("name", FORMATS)
def test_an_exported_model_predicts_the_same(name, cfg, shots, tmp_path):
    settings = FORMATS[name]
    if settings["format"] != "torchscript":
        pytest.importorskip({"onnx": "onnxruntime"}.get(settings["format"], settings["format"]))
    model = FewShotYOLO(stock_file(cfg, tmp_path))
    path = Path(model.export(**settings, support=shots, enroll="fit", imgsz=SIZE, device="cpu"))
    exported = YOLO(path, task="detect")
    assert type(exported) is YOLO and list(model.names.values())[-2:] == ["square", "disc"]
    expected = detected(model)
    assert sum(map(len, expected)) > 8 and {80, 81} <= set(torch.cat(expected)[:, 5].int().tolist())
    same_detections(detected(exported), expected)
    assert exported.names == model.names


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, cfg, reason",
    [
        (YOLOE, "yoloe-11s.yaml", "is a YOLOE model for task 'detect'"),
        (YOLOWorld, "yolov8s-world.yaml", "is a YOLOWorld model for task 'detect'"),
        (RTDETR, "rtdetr-l.yaml", "is a RTDETR model for task 'detect'"),
        (YOLO, "yolo11n-cls.yaml", "A Classify head has no row for each class"),
    ],
)
def test_other_models_are_refused_before_the_support_set_is_read(kind, cfg, reason):
    for mode in ("predict", "val", "export"):
        with pytest.raises(TypeError) as e:
            getattr(kind(cfg), mode)(support="missing.yaml")
        text = str(e.value)
        assert reason in text and "'support=missing.yaml' needs a YOLO model for detection, segmentation, pose" in text


def test_a_custom_head_and_an_empty_one_are_refused_before_the_support_set_is_read():
    pruned, wrapper = yolo_of("yolo11n.yaml"), yolo_of("yolo26n.yaml")
    pruned.model.model[-1].cv3[1][-1] = torch.nn.Conv2d(80, 80, 3, padding=1)
    wrapper.model.model[-1].cv3 = wrapper.model.model[-1].one2one_cv3 = None
    for model, reason in ((pruned, "Layer 'model.23.cv3.1.2' of the Detect head"), (wrapper, "the unfused checkpoint")):
        for call in (
            lambda m: m.enroll("missing.yaml"),
            lambda m: m.forget("a"),
            lambda m: m.predict(image_of(0), support="missing.yaml"),
        ):
            with pytest.raises(TypeError, match=reason):
                call(model)


def test_a_stock_model_enrolls_by_the_arguments_of_ultralytics(squares, tmp_path):
    """`YOLO(...)` of a stock model takes `support=`, and is left alone without it."""
    model = YOLO(stock_file("yolo11n.yaml", tmp_path))
    assert not hasattr(model.predict(image_of(0), **SETTINGS)[0], "enrolled") and type(model) is YOLO
    (r,) = model.predict(image_of(0), support=squares, conf=0.005, **SETTINGS)
    assert type(model) is FewShotYOLO and r.enrolled == {"square": 4} and model.shots.classes["square"]["shots"] == 4
    assert all(x.sim_other is None for x in model.shots.objects["square"])


def test_a_class_is_not_found_in_features_of_ordinary_images(squares, monkeypatch):
    """Those that the statistics of the head describe, drawn with another seed than the negatives."""
    scores = []
    for n in (2000, 0):
        monkeypatch.setattr("yolo_fewshot.nn.rows.DRAWN", n)
        wrapper = yolo_of("yolo11n.yaml")
        wrapper.enroll(squares, imgsz=SIZE, method="fit")
        rng = torch.Generator().manual_seed(9)
        with torch.no_grad():
            found = [
                last(draw_features(stem[:-1], 3000, rng)[:, :, None, None])[:, -1].sigmoid()
                for stem, last in zip(wrapper.model.model[-1].cv3, lasts(wrapper.model, ""))
            ]
        scores.append(torch.cat(found).sort(0)[0][-90:].mean().item())  # the 1 % that are highest
    assert scores[0] < 0.75 * scores[1] and scores[1] > 0.01
