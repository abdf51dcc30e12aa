import math

import pytest
import torch
from torch import nn
from ultralytics import YOLO
from ultralytics.utils.loss import E2ELoss, v8DetectionLoss
from ultralytics.utils.ops import xywh2xyxy, xywhr2xyxyxyxy
from ultralytics.utils.tal import TaskAlignedAssigner

from yolo_fewshot.nn.assign import BoxAssignment, RecordingAssigner
from yolo_fewshot.nn.model import FewShotDetectionModel
from yolo_fewshot.nn.passes import Pass
from yolo_fewshot.nn.rows import class_rows

pytestmark = pytest.mark.oldest

CENTERS = torch.cat(
    [
        torch.stack(torch.meshgrid(torch.arange(n) + 0.5, torch.arange(n) + 0.5, indexing="xy"), -1).view(-1, 2) * s
        for n, s in ((12, 8), (6, 16), (3, 32))
    ]
)
BOXES = torch.tensor([[0.26, 0.26, 0.31, 0.31], [0.7, 0.7, 0.4, 0.4], [0.5, 0.5, 0.6, 0.5]])


def load_batch():
    """Two objects in the first of three images, one in the last, none between."""
    torch.manual_seed(1)
    return {
        "img": torch.rand(3, 3, 96, 96),
        "cls": torch.tensor([[1.0], [3.0], [1.0]]),
        "bboxes": BOXES,
        "batch_idx": torch.tensor([0.0, 0.0, 2.0]),
    }


def model_of(cfg="yolo11n-fewshot.yaml"):
    torch.manual_seed(0)
    model = FewShotDetectionModel(cfg, nc=2, verbose=False).eval()
    model.args = {}
    for box in model.model[-1].cv2:  # a fresh model predicts one box size, and ties
        nn.init.normal_(box[-1].weight, std=30)
    return model


@torch.no_grad()
def raw(model, img):
    """Raw predictions of the first branch, and Ultralytics' own decoded boxes."""
    decoded = xywh2xyxy(model(img)[0][:, :4].transpose(1, 2))
    model.model[-1].training = True
    preds = model(img)
    model.model[-1].training = False
    return preds.get("one2many", preds), decoded


@pytest.fixture(scope="module")
def assigned():
    model, batch = model_of(), load_batch()
    preds, decoded = raw(model, batch["img"])
    return BoxAssignment(model)(preds, batch), decoded


def test_every_object_gets_anchors_inside_its_box(assigned):
    fg, gt_idx, weight, n_max, _ = assigned[0]
    assert n_max == 2 and len(fg[0]) == len(fg[1]) == len(gt_idx) == len(weight)
    assert {(int(b), int(g)) for b, g in zip(fg[0], gt_idx)} == {(0, 0), (0, 1), (2, 0)}
    box = {(0, 0): 0, (0, 1): 1, (2, 0): 2}
    for b, a, g in zip(fg[0], fg[1], gt_idx):
        x, y, w, h = BOXES[box[int(b), int(g)]] * 96
        assert abs(CENTERS[a][0] - x) <= max(w, 16) / 2 and abs(CENTERS[a][1] - y) <= max(h, 16) / 2


def test_boxes_equal_those_that_ultralytics_decodes(assigned):
    torch.testing.assert_close(assigned[0][4], assigned[1], rtol=1e-4, atol=1e-3)


def test_assignment_equals_ultralytics_if_every_class_score_is_one(assigned):
    (fg, gt_idx, weight, _, _), decoded = assigned
    gt = torch.zeros(3, 2, 4)
    gt[0], gt[2, 0] = xywh2xyxy(BOXES[:2]) * 96, xywh2xyxy(BOXES[2]) * 96
    there = torch.tensor([[1.0, 1.0], [0.0, 0.0], [1.0, 0.0]])[..., None]
    stock = TaskAlignedAssigner(topk=10, num_classes=1, alpha=0.5, beta=6.0, stride=[8, 16, 32])
    sure, cls = torch.ones(*decoded.shape[:2], 1), torch.zeros(3, 2, 1)
    _, _, scores, mask, index = stock(sure, decoded, CENTERS, cls, gt, there)
    assert torch.equal(torch.stack(fg), torch.stack(mask.nonzero(as_tuple=True)))
    assert torch.equal(gt_idx, index[mask])
    torch.testing.assert_close(weight, scores[mask][:, 0], rtol=1e-3, atol=1e-5)
    assert weight.max() <= 1 and weight.unique().numel() > 10


@pytest.mark.parametrize("cfg", ["yolo11n-fewshot.yaml", "yolo26n-fewshot.yaml"])
def test_assignment_is_independent_of_class_scores_and_labels(cfg):
    model, batch = model_of(cfg), load_batch()
    preds, _ = raw(model, batch["img"])
    first = BoxAssignment(model)(preds, batch)
    torch.manual_seed(2)
    other = {**preds, "scores": torch.randn(3, 7, len(CENTERS)) * 9}
    second = BoxAssignment(model)(other, {**batch, "cls": torch.tensor([[40.0], [0.0], [6.0]])})
    for x, y in zip((*first[0], *first[1:]), (*second[0], *second[1:])):
        assert torch.equal(torch.as_tensor(x), torch.as_tensor(y))


def test_images_without_objects_get_no_anchors():
    model, batch = model_of(), load_batch()
    preds, decoded = raw(model, batch["img"])
    empty = {k: batch[k][:0] for k in ("cls", "bboxes", "batch_idx")}
    fg, gt_idx, weight, n_max, boxes = BoxAssignment(model)(preds, empty)
    assert n_max == len(fg[0]) == len(fg[1]) == len(gt_idx) == len(weight) == 0
    torch.testing.assert_close(boxes, decoded, rtol=1e-4, atol=1e-3)


def test_predictions_and_batch_are_not_modified():
    model, batch = model_of(), load_batch()
    preds, _ = raw(model, batch["img"])
    before = {k: v.clone() for k, v in (preds | batch).items() if isinstance(v, torch.Tensor)}
    BoxAssignment(model)(preds, batch)
    assert all(torch.equal((preds | batch)[k], v) for k, v in before.items())


def test_recording_assigner_copies_settings_and_records_its_assignment():
    stock = TaskAlignedAssigner(topk=7, num_classes=5, alpha=0.3, beta=4.0, stride=[8, 16, 32], eps=1e-8, topk2=3)
    ours = RecordingAssigner.like(stock)
    names = ("topk", "topk2", "num_classes", "alpha", "beta", "stride", "stride_val", "eps")
    assert all(getattr(ours, n) == getattr(stock, n) for n in names)
    assert RecordingAssigner.like(stock, num_classes=1).num_classes == 1
    torch.manual_seed(3)
    corner = torch.rand(1, 189, 2) * 64
    given = (
        torch.rand(1, 189, 5),
        torch.cat([corner, corner + 32], 2),
        CENTERS,
        torch.tensor([[[2.0], [4.0]]]),
        torch.tensor([[[10.0, 10, 40, 40], [30, 50, 90, 90]]]),
        torch.ones(1, 2, 1),
    )
    expected = stock(*given)
    ours.current = this = Pass({"boxes": torch.zeros(1, 64, 189)}, {})
    other = (torch.rand(1, 189, 5), *given[1:])
    for found in (ours(*given), ours(*other)):  # once in a pass, whatever the predictions are
        assert all(torch.equal(x, y) for x, y in zip(expected, found, strict=True)) and found[3].any()
    assert this.assignment.decoded is given[1] and this.assignment.n_max == 2
    ours.current = None
    assert all(torch.equal(x, y) for x, y in zip(stock(*other), ours(*other), strict=True))


def test_recording_assigner_copies_settings_of_other_versions():
    class Newer(TaskAlignedAssigner):
        """With other arguments, in another order."""

        def __init__(self, *, stride, scale_by_area, **kwargs):
            super().__init__(stride=stride, **kwargs)
            self.scale_by_area = scale_by_area

    stock = Newer(stride=[4, 8], scale_by_area=0.7, topk=7, topk2=2, num_classes=5)
    ours = RecordingAssigner.like(stock, num_classes=1)
    assert type(ours) is RecordingAssigner and type(stock) is Newer and (ours.num_classes, stock.num_classes) == (1, 5)
    names = ("topk", "topk2", "alpha", "beta", "stride", "stride_val", "eps", "scale_by_area")
    assert all(getattr(ours, n) == getattr(stock, n) for n in names)


def test_assignments_have_the_settings_of_ultralytics_losses():
    single, dual = model_of(), model_of("yolo26n-fewshot.yaml")
    stock = E2ELoss(dual)
    for model, losses in ((single, [v8DetectionLoss(single)]), (dual, [stock.one2many, stock.one2one])):
        assignments = class_rows(model).assignments
        assert len(assignments) == len(losses)
        for ours, theirs in zip(assignments, losses):
            for name in ("topk", "topk2", "alpha", "beta", "stride", "eps"):
                assert getattr(ours.assigner, name) == getattr(theirs.assigner, name)
            assert ours.assigner.num_classes == 1


# Rotated boxes --------------------------------------------------------------------------------------------------------


def enclosing(center, left_top, right_bottom, angle):
    """The upright box about a rotated one, from its four corners."""
    (left, t), (r, b) = left_top, right_bottom  # distances from the center of the anchor along the turned axes
    cos, sin = math.cos(angle), math.sin(angle)
    middle = [(r - left) / 2, (b - t) / 2]
    middle = [center[0] + middle[0] * cos - middle[1] * sin, center[1] + middle[0] * sin + middle[1] * cos]
    w, h = left + r, t + b
    corners = [(x * w / 2, y * h / 2) for x in (-1, 1) for y in (-1, 1)]
    corners = [(middle[0] + x * cos - y * sin, middle[1] + x * sin + y * cos) for x, y in corners]
    xs, ys = zip(*corners)
    return [min(xs), min(ys), max(xs), max(ys)]


@pytest.mark.parametrize("cfg", ["yolo11n-obb.yaml", "yolo26n-obb.yaml"])
def test_a_rotated_box_is_compared_by_the_upright_box_about_it(cfg):
    torch.manual_seed(0)
    model = YOLO(cfg).model.eval()
    assignment = BoxAssignment(model)
    points = torch.tensor([[0.5, 0.5], [3.5, 1.5], [7.5, 6.5], [2.5, 9.5]])
    sides = torch.tensor([[2.0, 1.0, 2.0, 1.0], [1.0, 1.0, 3.0, 2.0], [0.5, 4.0, 1.5, 0.5], [1.0, 1.0, 1.0, 1.0]])
    angles = torch.tensor([[0.0, 0.7, 1.2, math.pi / 4], [math.pi / 2, -0.6, 2.2, -math.pi / 4]])[..., None]
    dist = sides if assignment.reg_max == 1 else _one_hot_bins(sides, assignment.reg_max)
    assignment.angle = angles
    found = assignment.bbox_decode(points, dist.expand(2, *dist.shape))
    for b in range(2):
        for a in range(4):
            left, top, right, bottom = sides[a].tolist()
            expected = enclosing(points[a].tolist(), (left, top), (right, bottom), angles[b, a].item())
            assert found[b, a].tolist() == pytest.approx(expected, abs=1e-3)
    assignment.angle = None
    plain = torch.cat([points - sides[:, :2], points + sides[:, 2:]], 1)
    torch.testing.assert_close(assignment.bbox_decode(points, dist[None])[0], plain, rtol=0, atol=1e-3)


def _one_hot_bins(sides, reg_max):
    """Logits of a distribution whose mean is the side: all of it at the two bins around."""
    low = sides.floor().long()
    part = torch.zeros(*sides.shape, reg_max)
    part.scatter_(2, low[..., None], (1 - (sides - low))[..., None])
    part.scatter_add_(2, low[..., None] + 1, (sides - low)[..., None])
    return part.clamp(min=1e-9).log().flatten(1)


@pytest.mark.parametrize("cfg", ["yolo11n-obb.yaml", "yolo26n-obb.yaml"])
def test_the_boxes_of_an_obb_model_enclose_those_that_ultralytics_decodes(cfg):
    torch.manual_seed(0)
    model = YOLO(cfg).model.eval()
    for box in model.model[-1].cv2:
        nn.init.normal_(box[-1].weight, std=1)
    for angle in model.model[-1].cv4:
        nn.init.normal_(angle[-1].weight, std=1)
    batch = load_batch()
    with torch.no_grad():
        decoded, preds = model(batch["img"])
        boxes = BoxAssignment(model)(preds.get("one2many", preds), batch)[4]
    x, y, w, h, angle = *decoded[:, :4].unbind(1), decoded[:, -1]
    assert angle.std() > 0.01
    corners = xywhr2xyxyxyxy(torch.stack([x, y, w, h, angle], -1))
    expected = torch.cat([corners.amin(2), corners.amax(2)], -1)
    torch.testing.assert_close(boxes, expected, rtol=1e-3, atol=1e-2)
