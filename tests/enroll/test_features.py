from functools import partial
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from ultralytics.utils.loss import E2ELoss, v8DetectionLoss
from ultralytics.utils.ops import xywh2xyxy

from yolo_fewshot.data.support import read_support
from yolo_fewshot.enroll import features as module
from yolo_fewshot.enroll.features import View, extract, make_view, support_views
from yolo_fewshot.nn.model import FewShotDetectionModel
from yolo_fewshot.nn.predictions import branch_predictions
from yolo_fewshot.nn.rows import class_rows

BASE = {0: "cat", 1: "dog"}  # classes of the model
NAMES = {0: "cat", 1: "square", 2: "dog", 3: "disc"}  # of the label files
VIEWS = [View(), View(1.0, True, 1.2), View(0.8, False, 0.8), View(1.25)]


def draw(i, size=96):
    """Draw one of five images, and return it with the rows of its label file."""
    height, rows = size // 2 if i == 4 else size, []
    rng = np.random.default_rng(i)
    image = rng.integers(100, 200, (height // 8, size // 8, 3)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
    if i in {0, 1}:
        cv2.circle(image, (size * 3 // 4, size * 2 // 3), size // 6, (255, 60 * i, 0), -1)
        rows.append(f"3 {3 / 4} {2 / 3} {1 / 3} {1 / 3}")
    if i != 3:
        x, y, w, h = size // 4 + 4 * i, size // 4, size // 3, size // 4 + 2 * i
        cv2.rectangle(image, (x - w // 2, y - h // 2), (x + w // 2, y + h // 2), (0, 40 * i, 255), -1)
        rows.append(f"1 {x / size} {y / height} {w / size} {h / height}")
    return image, rows


def draw_shots(root, size=96):
    """Draw five images and return their data.yaml.

    A square (class 1) is in all but the fourth, which is empty, a disc (class 3), named first, in the first two; the
    last image is only half as high.
    """
    (root / "images").mkdir()
    (root / "labels").mkdir()
    for i in range(5):
        image, rows = draw(i, size)
        cv2.imwrite(str(root / f"images/{i}.png"), image)
        (root / f"labels/{i}.txt").write_text("\n".join(rows))
    lines = "\n".join(f"  {i}: {n}" for i, n in NAMES.items())
    (root / "shots.yaml").write_text(f"train: images\nval: images\nnames:\n{lines}\n")
    return root / "shots.yaml"


def model_of(cfg="yolo11n-fewshot.yaml", **args):
    """Return an untrained model of two classes with varied embeddings and boxes, which a fresh one lacks."""
    torch.manual_seed(0)
    model = FewShotDetectionModel(cfg, nc=2, verbose=False)
    model.names = dict(BASE)
    model.args = args  # as loading a checkpoint sets it
    img = torch.from_numpy(np.stack([draw(i)[0][..., ::-1] for i in range(4)])).permute(0, 3, 1, 2).float() / 255
    views = [make_view({"img": img, "bboxes": torch.zeros(0, 4)}, view, 32)["img"] for view in (*VIEWS[:3], View(0.4))]
    norms = {m: m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)}
    for m in norms:
        m.momentum = 1.0  # the statistics of these images
    with torch.no_grad():
        model.predict(torch.cat(views))
        for branch, prototypes in zip(model.model[-1].branches, model.model[-1].branch_prototypes):
            for box in getattr(model.model[-1], f"{branch}cv2"):
                nn.init.normal_(box[-1].weight, std=0.1)
                if len(box[-1].bias) > 4:  # sides of about four strides, as without DFL
                    box[-1].bias.copy_(-(torch.arange(16) - 2).square().repeat(4) / 2)
            prototypes.logit_scale.copy_(torch.tensor([0.6, 0.8, 1.0]))
            prototypes.bias.copy_(torch.tensor([-4.0, -3.5, -3.0]))
    for m, momentum in norms.items():
        m.momentum = momentum
    return model.eval()


@pytest.fixture(scope="module")
def shots(tmp_path_factory):
    return read_support(draw_shots(tmp_path_factory.mktemp("shots")), BASE)


# Views ----------------------------------------------------------------------------------------------------------------


def red_boxes(img):
    """Where the red of every image is, as x1, y1, x2, y2 in pixels."""
    found = []
    for x in img:
        red = x[0] - x[1]
        ys, xs = (red > red.max() / 2).nonzero(as_tuple=True)
        found.append([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
    return torch.tensor(found).float()


def red_batch(h=96, w=160):
    """Two gray images with a red rectangle each, off center."""
    img = torch.full((2, 3, h, w), 0.3)
    corners = torch.tensor([[8, 16, 48, 40], [100, 50, 140, 90]])
    for image, (x1, y1, x2, y2) in zip(img, corners):
        image[:, y1:y2, x1:x2] = torch.tensor([0.8, 0, 0])[:, None, None]
    x1, y1, x2, y2 = (corners / torch.tensor([w, h, w, h])).T
    boxes = torch.stack([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1], 1)
    return {"img": img, "bboxes": boxes, "cls": torch.tensor([[1.0], [0.0]]), "batch_idx": torch.tensor([0.0, 1.0])}


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.25, 0.35, 0.5, 0.8, 1.1, 1.25, 2.0])
def test_the_boxes_of_every_view_cover_the_same_objects(scale, flip):
    batch = red_batch()
    shown = make_view(batch, View(scale, flip, 0.9), 32)
    height, width = shown["img"].shape[2:]
    boxes = xywh2xyxy(shown["bboxes"]) * torch.tensor([width, height, width, height])
    torch.testing.assert_close(boxes, red_boxes(shown["img"]), rtol=0, atol=1)
    sides = (boxes[:, 2:] - boxes[:, :2]) / scale
    torch.testing.assert_close(sides, torch.tensor([[40.0, 24.0], [40.0, 40.0]]), rtol=0.03, atol=0)


def test_a_flipped_view_is_the_flipped_image():
    batch = red_batch()
    assert torch.equal(make_view(batch, View(flip=True), 32)["img"], batch["img"].flip(3))


def test_a_smaller_view_is_centered_on_gray():
    img = make_view({**red_batch(), "img": torch.ones(1, 3, 96, 160)}, View(0.5), 32)["img"]
    assert img.shape == (1, 3, 96, 160)
    expected = torch.full_like(img, 114 / 255)
    expected[:, :, 24:72, 40:120] = 1
    torch.testing.assert_close(img, expected)


def test_a_larger_view_is_at_the_top_left_of_a_canvas_that_fits_the_stride():
    img = make_view({**red_batch(), "img": torch.ones(1, 3, 96, 160)}, View(1.25), 32)["img"]
    expected = torch.full((1, 3, 128, 224), 114 / 255)
    expected[:, :, :120, :200] = 1
    torch.testing.assert_close(img, expected)
    assert make_view(red_batch(), View(1.25), 64)["img"].shape[2:] == (128, 256)
    assert make_view(red_batch(), View(2.0), 32)["img"].shape[2:] == (192, 320)  # nothing to add


def test_brightness_is_a_factor_and_saturates():
    batch = red_batch()
    for gain in (0.8, 1.2, 2.0):
        shown = make_view(batch, View(gain=gain), 32)["img"]
        torch.testing.assert_close(shown, (batch["img"] * gain).clamp(max=1))
    assert make_view(batch, View(gain=2.0), 32)["img"].max() == 1


@pytest.mark.parametrize("view", [View(), View(1.0, True, 1.2), View(0.5, True), View(1.25, True, 0.8)])
def test_a_view_does_not_modify_the_batch(view):
    batch, before = red_batch(), red_batch()
    shown = make_view(batch, view, 32)
    assert all(torch.equal(batch[k], v) for k, v in before.items())
    assert shown["cls"] is batch["cls"] and shown["batch_idx"] is batch["batch_idx"]


@pytest.mark.parametrize("crops", [False, True])
def test_views_are_flipped_and_brightened_only_as_in_training(crops):
    for args in ({}, {"fliplr": 0.0, "hsv_v": 0.0}):
        assert not any(v.flip or v.gain != 1 for v in support_views(args, crops))
    mirrored = support_views({"fliplr": 0.5}, crops)
    assert any(v.flip for v in mirrored) and all(v.gain == 1 for v in mirrored)
    lit = support_views({"hsv_v": 0.4}, crops)
    assert not any(v.flip for v in lit)
    assert min(v.gain for v in lit) < 1 < max(v.gain for v in lit)


def test_the_plain_view_comes_first_and_crops_are_scaled_down():
    args = {"fliplr": 0.5, "hsv_v": 0.4}
    views = support_views(args, crops=False)
    assert views[0] == View() and min(v.scale for v in views) < 1 < max(v.scale for v in views)
    # Levels are an octave apart: with rows of their own they must see an object at its half and its double size.
    wide = support_views(args, crops=False, per_level=True)
    assert wide[: len(views)] == views and {v.scale for v in wide} == {0.5, 0.8, 1.0, 1.25, 2.0}
    crops = support_views(args, crops=True)
    assert crops[0] == View(crops[0].scale) and all(v.scale <= 0.5 for v in crops)


# Features of images -------------------------------------------------------------------------------------------------


def image_batch(file, size=96):
    """An image in the middle of a gray square, with its labels."""
    image = cv2.imread(str(file))[..., ::-1].copy()
    height = len(image)
    top = (size - height) // 2
    square = np.full((size, size, 3), 114, dtype=np.uint8)
    square[top : top + height] = image
    label = Path(str(file).replace("images", "labels")).with_suffix(".txt")
    rows = torch.tensor([[float(x) for x in row.split()] for row in label.read_text().splitlines()]).view(-1, 5)
    rows[:, 2], rows[:, 4] = (rows[:, 2] * height + top) / size, rows[:, 4] * height / size
    return {
        "img": torch.from_numpy(square).permute(2, 0, 1)[None].float() / 255,
        "cls": rows[:, :1],
        "bboxes": rows[:, 1:],
        "batch_idx": torch.zeros(len(rows)),
    }


def assigned_by_loss(model):
    """Of every branch, a function that assigns as the branch's own loss does where every class is certain."""
    loss = E2ELoss(model) if len(model.model[-1].branches) > 1 else v8DetectionLoss(model)
    losses = [loss.one2many, loss.one2one] if len(model.model[-1].branches) > 1 else [loss]

    def assign(loss, pred, shown):
        found, recorded = loss.assigner.forward, {}
        sure = {**pred, "scores": torch.full_like(pred["scores"], 20.0)}
        loss.hyp = SimpleNamespace(box=0, cls=0, dfl=0)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                loss.assigner,
                "forward",
                lambda s, b, *x: recorded.update(boxes=b, out=found(s, b, *x)) or recorded["out"],
            )
            loss.get_assigned_targets_and_loss(sure, {**shown, "cls": torch.zeros_like(shown["cls"])})
        _, _, scores, mask, index = recorded["out"]
        fg = mask.nonzero(as_tuple=True)
        return fg, index[fg], scores[fg].amax(1), None, recorded["boxes"]

    return [partial(assign, x) for x in losses]


@torch.no_grad()
def one_by_one(model, support, views):
    """Objects' embeddings and all anchors, from one forward pass for every image and view, with loops."""
    head, assign = model.model[-1], assigned_by_loss(model)
    embeds, anchors, n = [[] for _ in head.branches], [{} for _ in head.branches], 0
    for p, label in enumerate(support.labels):
        batch = image_batch(label["im_file"])
        sums = [torch.zeros(len(batch["cls"]), head.embed) for _ in head.branches]
        for v, view in enumerate(views):
            shown = make_view(batch, view, 32)
            head.training = True
            preds = model(shown["img"])
            head.training = False
            for b, pred in enumerate([preds["one2many"], preds["one2one"]] if "one2many" in preds else [preds]):
                e, side = pred["embeds"][0].T, shown["img"].shape[2]
                level = [i for i, s in enumerate((8, 16, 32)) for _ in range((side // s) ** 2)]
                fg, gt_idx, weight, _, boxes = assign[b](pred, shown)
                owner, weights = torch.full((len(e),), -1), torch.zeros(len(e))
                for a, g, w in zip(fg[1].tolist(), gt_idx.long().tolist(), weight):
                    owner[a], weights[a] = n + g, w
                for g in range(len(batch["cls"])):
                    parts = sum(e[a] * max(weights[a], 1e-3) for a in range(len(e)) if owner[a] == n + g)
                    sums[b][g] += parts / parts.norm()
                anchors[b][p, v] = (e, torch.tensor(level), boxes[0], owner, weights)
        for b, total in enumerate(sums):
            embeds[b].append(total / len(views))
        n += len(batch["cls"])
    return [F.normalize(torch.cat(e), dim=1) for e in embeds], anchors


@pytest.fixture(scope="module", params=["yolo11n-fewshot.yaml", "yolo26n-fewshot.yaml"])
def extracted(request, shots):
    """A model, its features of the shots, and what loops find."""
    model = model_of(request.param, fliplr=0.5, hsv_v=0.4)
    return model, extract(class_rows(model), shots, 96, batch=2), one_by_one(model, shots, VIEWS)


def test_objects_are_listed_by_image(extracted, shots):
    features = extracted[1]
    assert features.cls.tolist() == [3, 1, 3, 1, 1, 1] and features.image.tolist() == [0, 0, 1, 1, 2, 4]
    assert [Path(f).name for f in features.files] == ["0.png", "1.png", "2.png", "3.png", "4.png"]
    assert features.views == len(VIEWS)
    boxes = torch.cat([xywh2xyxy(image_batch(x["im_file"])["bboxes"]) * 96 for x in shots.labels])
    torch.testing.assert_close(features.boxes, boxes, rtol=0, atol=0.01)


def test_embeddings_of_objects_are_means_over_anchors_and_views(extracted):
    _, features, (embeds, _) = extracted
    assert len(features.embeds) == len(embeds)
    for found, expected in zip(features.embeds, embeds):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(found.norm(dim=1), torch.ones(6))
        assert (found @ found.T).fill_diagonal_(0).max() < 0.999  # else the comparison would say little


def test_a_dual_head_has_features_of_two_branches(extracted):
    model, features, _ = extracted
    assert len(features.embeds) == len(features.anchors) == len(model.model[-1].branches)
    if len(features.embeds) == 2:
        assert not torch.allclose(features.embeds[0], features.embeds[1], atol=0.1)


def test_an_object_has_as_many_anchors_as_training_gives_it_in_the_branch(extracted):
    _, features, _ = extracted
    most = []
    for anchors in features.anchors:
        own = anchors.objects >= 0
        most.append(
            torch.stack([anchors.objects[own], anchors.view[own]]).unique(dim=1, return_counts=True)[1].max().item()
        )
    assert most == [10, 1][: len(most)]


def test_every_anchor_of_an_object_is_kept(extracted):
    _, features, (_, naive) = extracted
    for anchors, expected in zip(features.anchors, naive):
        seen = 0
        for (p, v), (e, level, boxes, owner, weights) in expected.items():
            mask = (anchors.image == p) & (anchors.view == v) & (anchors.objects >= 0)
            own = owner >= 0
            assert torch.equal(anchors.objects[mask], owner[own]) and torch.equal(anchors.level[mask], level[own])
            torch.testing.assert_close(anchors.embeds[mask], e[own], rtol=0, atol=5e-3)
            torch.testing.assert_close(anchors.boxes[mask], boxes[own], rtol=1e-4, atol=1e-2)
            torch.testing.assert_close(anchors.weight[mask], weights[own], rtol=1e-3, atol=1e-4)
            seen += int(mask.sum())
        assert seen == (anchors.objects >= 0).sum() > 20
        assert (anchors.weight[anchors.objects < 0] == 1).all()


def test_all_anchors_of_a_small_image_are_kept_in_the_plain_view(extracted):
    _, features, (_, naive) = extracted
    for anchors, expected in zip(features.anchors, naive):
        for p in range(5):  # image 3 has no object
            e, level, boxes, owner, _ = expected[p, 0]
            mask = (anchors.image == p) & (anchors.view == 0)
            torch.testing.assert_close(anchors.embeds[mask], e, rtol=0, atol=5e-3)
            torch.testing.assert_close(anchors.boxes[mask], boxes, rtol=1e-4, atol=1e-2)
            assert torch.equal(anchors.level[mask], level) and torch.equal(anchors.objects[mask], owner)


def test_max_values_bounds_the_anchors_and_the_hardest_are_kept(shots):
    model, keep = model_of(), 80
    every = extract(class_rows(model), shots, 96, views=[View()])
    few = extract(class_rows(model), shots, 96, views=[View()], max_values=128 * keep * len(shots.labels))
    scores = torch.stack([model.model[-1].branch_prototypes[0].rows(i)[0] for i in range(3)])
    biases = torch.stack([model.model[-1].branch_prototypes[0].rows(i)[1] for i in range(3)])
    full, kept = every.anchors[0], few.anchors[0]
    assert len(full.embeds) == 5 * 189 and (full.objects >= 0).sum() == (kept.objects >= 0).sum()
    for p in range(5):
        own, others = ((full.image == p) & mask for mask in (full.objects >= 0, full.objects < 0))
        found = kept.embeds[(kept.image == p) & (kept.objects < 0)]
        assert keep / 4 < len(found) <= keep
        candidates = full.embeds[others]
        logits = torch.einsum("ad,acd->ac", candidates, scores[full.level[others]]) + biases[full.level[others]]
        objects = every.embeds[0][every.image == p]
        like = (F.normalize(candidates, dim=1) @ objects.T).amax(1) if len(objects) else torch.zeros(0)
        sure = keep // 2 - int(own.sum())  # of each kind, whether or not the anchors of objects count
        for value in (logits.amax(1), like):
            hardest = candidates[value.argsort(descending=True)[:sure]]
            assert (hardest[:, None] == found).all(2).any(1).all()


def test_of_images_without_objects_the_anchors_like_given_objects_are_kept(shots):
    model, keep = model_of(), 40
    plain = shots._replace(labels=[x for x in shots.labels if not len(x["cls"])])
    every = extract(class_rows(model), plain, 96, views=[View()]).anchors[0]
    target = every.embeds[100]  # neither among the last anchors nor the surest of a trained class
    like = [F.normalize(target, dim=0)[None]]
    settings = {"views": [View()], "max_values": 128 * keep * len(plain.labels)}
    for given, expected in ((like, True), (None, False)):
        kept = extract(class_rows(model), plain, 96, like=given, **settings).anchors[0].embeds
        assert (kept == target).all(1).any() == expected and len(kept) < len(every.embeds)
    weights, biases = (torch.stack(x) for x in zip(*map(model.model[-1].branch_prototypes[0].rows, range(3))))
    logits = torch.einsum("ad,acd->ac", every.embeds, weights[every.level]) + biases[every.level]
    assert (kept == every.embeds[logits.amax(1).argmax()]).all(1).any()


def test_a_minimum_of_anchors_is_kept_of_a_large_support_set(shots):
    features = extract(class_rows(model_of()), shots, 96, views=[View()], max_values=1)
    counts = torch.bincount(features.anchors[0].image[features.anchors[0].objects < 0], minlength=5)
    assert (counts >= 8).all() and (counts <= 32).all()


def test_features_are_independent_of_batch_size_and_order_of_images(shots):
    model = model_of()
    one = extract(class_rows(model), shots, 96, batch=1)
    turned = extract(class_rows(model), shots._replace(labels=shots.labels[::-1]), 96, batch=3)
    objects = torch.tensor([5, 4, 2, 3, 0, 1])  # of the turned support set, in its order
    assert turned.files == one.files[::-1] and torch.equal(turned.cls, one.cls[objects])
    assert torch.equal(turned.image, 4 - one.image[objects])
    torch.testing.assert_close(turned.embeds[0], one.embeds[0][objects], rtol=0, atol=1e-4)
    torch.testing.assert_close(turned.boxes, one.boxes[objects])
    x, y = one.anchors[0], turned.anchors[0]
    for p in range(5):
        a, b = (x.image == p) & (x.objects >= 0), (y.image == 4 - p) & (y.objects >= 0)
        assert torch.equal(x.objects[a], objects[y.objects[b]]) and torch.equal(x.view[a], y.view[b])
        torch.testing.assert_close(x.embeds[a], y.embeds[b], rtol=0, atol=5e-3)


def test_extraction_is_deterministic_and_does_not_modify_the_model(shots):
    model = model_of("yolo26n-fewshot.yaml", fliplr=0.5)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    first, second = extract(class_rows(model), shots, 96, batch=2), extract(class_rows(model), shots, 96, batch=2)
    for x, y in zip([*first.anchors, first.embeds], [*second.anchors, second.embeds]):
        assert all(map(torch.equal, x, y))
    assert torch.equal(first.boxes, second.boxes)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m.training for m in model.modules())
    assert not any(x.requires_grad for x in (*first.embeds, *first.anchors[0]))


@pytest.mark.parametrize("cfg", ["yolo11n-fewshot.yaml", "yolo26n-fewshot.yaml"])
@torch.no_grad()
def test_the_model_stays_in_eval_mode(cfg):
    """Else a thread that predicts meanwhile would get what only training wants."""
    model, img, seen = model_of(cfg), torch.rand(1, 3, 64, 64), []
    handles = [
        m.register_forward_pre_hook(lambda *_: seen.append(any(x.training for x in model.modules())))
        for m in model.modules()
    ]
    expected = model(img)[1]
    found = branch_predictions(model, img)
    for handle in handles:  # all models share the activation
        handle.remove()
    assert len(seen) > 100 and not any(seen)
    for ours, stock in zip(found, [expected["one2many"], expected["one2one"]] if len(found) > 1 else [expected]):
        assert torch.equal(ours["scores"], stock["scores"]) and torch.equal(ours["boxes"], stock["boxes"])
        assert ours["embeds"].shape == (1, model.model[-1].embed, 84)


def test_an_object_whose_anchors_all_belong_to_another_has_no_embedding(tmp_path):
    support = read_support(draw_shots(tmp_path), BASE)
    twice = {**support.labels[2], "cls": np.array([[1.0], [3.0]], dtype=np.float32)}
    twice["bboxes"] = support.labels[2]["bboxes"].repeat(2, 0)
    features = extract(class_rows(model_of()), support._replace(labels=[twice]), 96)
    assert features.embeds[0][0].any() and not features.embeds[0][1].any()
    assert set(features.anchors[0].objects.tolist()) == {-1, 0}


def test_views_follow_the_arguments_of_training_unless_given(shots, monkeypatch):
    asked = []
    monkeypatch.setattr(
        module, "make_view", lambda batch, view, stride: asked.append(view) or make_view(batch, view, stride)
    )
    one = shots._replace(labels=shots.labels[:1])
    model = model_of(fliplr=0.5, hsv_v=0.4)
    extract(class_rows(model), one, 96)
    assert asked == VIEWS
    asked.clear()
    extract(class_rows(model), one, 96, views=[View(0.5)])
    assert asked == [View(0.5)]


def test_crops_are_centered(tmp_path):
    for i, name in enumerate(("square", "wheel")):
        (tmp_path / name).mkdir()
        image = np.full((60, 60, 3), 90 * i, dtype=np.uint8)
        cv2.imwrite(str(tmp_path / name / "1.png"), image)
    support = read_support(tmp_path)
    features = extract(class_rows(model_of()), support, 96)
    views = support_views({}, crops=True)
    side = round(96 * views[0].scale)
    start = (96 - side) // 2
    expected = torch.tensor([[start, start, start + side, start + side]] * 2).float()
    torch.testing.assert_close(features.boxes, expected, rtol=0, atol=0.01)
    assert features.views == len(views) and features.cls.tolist() == [0, 1] and features.embeds[0].any(1).all()


def test_anchors_in_ignore_regions_are_not_kept_and_the_others_are_equal(tmp_path):
    file = draw_shots(tmp_path)
    (tmp_path / "ignore").mkdir()
    (tmp_path / "ignore/0.txt").write_text("0.25 0.75 0.4 0.4\n0.75 0.2 0.4 0.3\n")
    file.write_text(file.read_text() + "fewshot: {ignore: ignore}\n")
    support, model = read_support(file, BASE), model_of()
    assert support.ignore == "ignore"
    ours, every = (
        extract(class_rows(model), x, 96, views=[View(), View(flip=True)])
        for x in (support, support._replace(ignore=""))
    )
    assert torch.equal(ours.cls, every.cls) and torch.equal(ours.boxes, every.boxes)
    torch.testing.assert_close(ours.embeds[0], every.embeds[0])
    a, b = ours.anchors[0], every.anchors[0]
    assert (a.objects >= 0).sum() == (b.objects >= 0).sum() > 0
    per_image = [torch.bincount(x.image[x.objects < 0], minlength=5) for x in (a, b)]
    assert per_image[0][0] < per_image[1][0] and torch.equal(per_image[0][1:], per_image[1][1:])
    # Centers of the anchors of the first image, by hand; the boxes do not touch its objects.
    kept = {tuple(x.tolist()) for x in a.embeds[(a.image == 0) & (a.objects < 0)]}
    dropped = [x for x in b.embeds[(b.image == 0) & (b.objects < 0)] if tuple(x.tolist()) not in kept]
    inside = 0
    for stride in (8, 16, 32):
        centers = (torch.arange(96 // stride) + 0.5) * stride / 96
        for x, y in torch.cartesian_prod(centers, centers).tolist():
            inside += (0.05 < x < 0.45 and 0.55 < y < 0.95) or (0.55 < x < 0.95 and 0.05 < y < 0.35)
    assert len(dropped) == 2 * inside > 40  # two views
