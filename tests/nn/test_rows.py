import functools
import math
from copy import deepcopy

import cv2
import numpy as np
import pytest
import torch
from test_features import VIEWS
from torch import nn
from ultralytics import RTDETR, YOLO, YOLOE, YOLOWorld

from yolo_fewshot.enroll.enroll import forget
from yolo_fewshot.enroll.features import make_view
from yolo_fewshot.nn.model import FewShotDetectionModel
from yolo_fewshot.nn.rows import STD_MIN, FewShotRows, LevelSpace, StockRows, class_rows, enrolled_classes

pytestmark = pytest.mark.oldest

DETECT = ["yolov8n.yaml", "yolov9t.yaml", "yolov10n.yaml", "yolo11n.yaml", "yolo12n.yaml", "yolo26n.yaml"]
TASKS = [f"yolo{family}n-{task}.yaml" for family in ("11", "26") for task in ("seg", "obb", "pose")]
DUAL = ("yolov10", "yolo26")  # families with two branches
SIZE = 64
PLACES = [(20, 24, 26), (38, 30, 24), (26, 40, 28), (42, 40, 22)]  # center and side of the square in each image


def image_of(i):
    """A red square, and a blue disc in every other image, on gray noise."""
    image = np.random.default_rng(i).integers(90, 140, (SIZE, SIZE, 3)).astype(np.uint8)
    if i < len(PLACES):
        x, y, s = PLACES[i]
        cv2.rectangle(image, (x - s // 2, y - s // 2), (x + s // 2 - 1, y + s // 2 - 1), (0, 0, 255), -1)
        if i % 2 == 0:
            cv2.circle(image, (54, 8), 7, (255, 0, 0), -1)
    return image


@functools.cache
def _stock(cfg):
    torch.manual_seed(0)
    model = YOLO(cfg).model
    img = torch.from_numpy(np.stack([image_of(i)[..., ::-1] for i in range(5)])).permute(0, 3, 1, 2).float() / 255
    views = [make_view({"img": img, "bboxes": torch.zeros(0, 4)}, view, 32)["img"] for view in VIEWS[:3]]
    norms = {m: m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)}
    for m in norms:
        m.momentum = 1.0  # the statistics of these images
    with torch.no_grad():
        model.train().predict(torch.cat(views))
        for branch in ("", "one2one_"):
            for box in getattr(model.model[-1], f"{branch}cv2", None) or ():
                nn.init.normal_(box[-1].weight, std=0.02)
                if len(box[-1].bias) > 4:  # sides of three strides, varied
                    box[-1].bias.copy_(-(torch.arange(16) - 1.5).square().repeat(4))
                else:
                    box[-1].bias.fill_(1.5)
            for last in getattr(model.model[-1], f"{branch}cv3", None) or ():
                nn.init.normal_(last[-1].weight, std=0.02)
                nn.init.normal_(last[-1].bias, -8, 0.5)  # not the same for all classes
    for m, momentum in norms.items():
        m.momentum = momentum
    model.names = {0: "cat", 1: "dog", **{i: f"old{i}" for i in range(2, model.model[-1].nc)}}
    return model.eval()


def stock_of(cfg):
    """Return an untrained stock network with varied features and boxes, whose first classes are cat and dog."""
    return deepcopy(_stock(cfg))


def branches_of(cfg):
    return ["", "one2one_"] if cfg.startswith(DUAL) else [""]


def lasts(model, branch):
    """The last layers of a class branch."""
    return [stem[-1] for stem in getattr(model.model[-1], f"{branch}cv3")]


@torch.no_grad()
def features_and_logits(model, branch, img):
    """What enters the last layer of the class branch, and what leaves it, by level, as (B, H * W, channels)."""
    seen = []
    hooks = [m.register_forward_hook(lambda _, x, y: seen.append((x[0], y))) for m in lasts(model, branch)]
    model(img)
    for hook in hooks:
        hook.remove()
    return [[t.flatten(2).transpose(1, 2) for t in level] for level in seen]


def state(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(model, before):
    after = model.state_dict()
    return after.keys() == before.keys() and all(torch.equal(v, before[k]) for k, v in after.items())


def images(seed=0):
    """Batches of unequal size."""
    rng = torch.Generator().manual_seed(seed)
    return [torch.rand(*shape, generator=rng) for shape in ((3, 3, 64, 96), (1, 3, 96, 64), (2, 3, 64, 64))]


def weights_of(rows, seed=0):
    """A vector and an offset at each level, in every branch."""
    rng = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(len(s.bias), s.embed, generator=rng), torch.randn(len(s.bias), generator=rng))
        for s in rows.spaces()
    ]


# Spaces ---------------------------------------------------------------------------------------------------------------


def test_a_class_has_a_vector_and_an_offset_at_each_level():
    rng = torch.Generator().manual_seed(0)
    space = LevelSpace(torch.tensor([-4.0, -3.0, -2.0]), 5)
    vectors, offsets = torch.randn(2, 3, 5, generator=rng), torch.randn(2, 3, generator=rng)
    embeds, level = torch.randn(7, 5, generator=rng), torch.tensor([2, 0, 0, 2, 2, 0, 2])  # none of level 1
    found = space.logits(embeds, level, vectors, offsets)
    for a, at in enumerate(level.tolist()):
        for c in range(2):
            expected = float(embeds[a] @ vectors[c, at]) + [-4, -3, -2][at] + float(offsets[c, at])
            assert found[a, c].item() == pytest.approx(expected, abs=1e-5)
    zeros = space.zeros(4)
    assert [x.shape for x in zeros] == [(4, 3, 5), (4, 3)] and not any(x.any() for x in zeros)
    assert (space.logits(embeds, level, *space.zeros(1))[:, 0] == space.bias[level]).all()


@pytest.mark.parametrize("cfg", ["yolov8n.yaml", "yolo26n-seg.yaml"])
def test_the_prior_logits_are_those_of_a_new_detector_of_one_class(cfg):
    rows = class_rows(stock_of(cfg))
    for space in rows.spaces():
        expected = [math.log(5 / 1 / (640 / stride) ** 2) for stride in (8, 16, 32)]
        assert space.bias.tolist() == pytest.approx(expected, abs=1e-5)


# The interface --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cfg", DETECT + TASKS)
def test_the_embedding_is_the_standardized_input_of_the_last_layer(cfg):
    model = stock_of(cfg)
    rows, batches = class_rows(model), images()
    assert type(rows) is StockRows and rows.per_level and list(rows.branches) == branches_of(cfg)
    before = state(model)
    rows.standardize(iter(batches))
    img = images(seed=1)[1]
    with torch.no_grad():
        found = rows.predict(img)
    assert len(found) == len(rows.branches)
    for preds, branch in zip(found, rows.branches):
        every = [features_and_logits(model, branch, x) for x in batches]
        embeds, logits = [], []
        for level, (features, scores) in enumerate(features_and_logits(model, branch, img)):
            seen = np.concatenate([x[level][0].double().flatten(0, 1).numpy() for x in every])
            std = np.maximum(seen.std(0), STD_MIN)
            embeds.append((features.double().numpy() - seen.mean(0)) / std)
            logits.append(scores)
        expected = np.concatenate(embeds, 1).transpose(0, 2, 1)
        np.testing.assert_allclose(preds["embeds"].numpy(), expected, rtol=1e-3, atol=1e-3)
        assert torch.equal(preds["scores"], torch.cat(logits, 1).transpose(1, 2))
        with torch.no_grad():
            own = model(img)[1]
        own = own.get("one2one" if branch else "one2many", own)
        assert torch.equal(preds["boxes"], own["boxes"]) and all(map(torch.equal, preds["feats"], own["feats"]))
    assert same(model, before) and not any(m.training for m in model.modules())
    assert model.model[-1].nc == lasts(model, "")[0].out_channels  # of the model itself


def test_a_constant_feature_is_not_divided_by_zero():
    model = stock_of("yolo11n.yaml")
    for stem in model.model[-1].cv3:
        norm = stem[1][1].bn
        norm.weight.data[3], norm.bias.data[3] = 0, 2
    rows = class_rows(model)
    rows.standardize(images())
    with torch.no_grad():
        embeds = rows.predict(images()[0])[0]["embeds"]
    assert embeds.isfinite().all() and embeds[:, 3].abs().max() < 1e-2


@pytest.mark.parametrize("cfg", DETECT + TASKS)
def test_a_row_gives_the_logits_of_its_vector_and_leaves_the_others_alone(cfg):
    """What makes the logits of the other classes is equal bit by bit; a convolution of more channels may round."""
    model = stock_of(cfg)
    rows = class_rows(model)
    rows.standardize(images())
    nc, img, weights = model.model[-1].nc, images(seed=1)[0], weights_of(rows)
    before, old = state(model), {b: features_and_logits(model, b, img) for b in rows.branches}
    for index in (nc, 1):  # appended, and replaced
        rows.set(index, weights)
        with torch.no_grad():
            embeds = [x["embeds"] for x in rows.predict(img)]
        for b, branch in enumerate(rows.branches):
            start = 0
            for level, (features, logits) in enumerate(features_and_logits(model, branch, img)):
                e = embeds[b][..., start : start + logits.shape[1]].transpose(1, 2)
                start += logits.shape[1]
                vectors, offsets = weights[b]
                bias = math.log(5 / (640 / (8, 16, 32)[level]) ** 2)
                expected = e.double() @ vectors[level].double() + bias + offsets[level]
                torch.testing.assert_close(logits[..., index].double(), expected, rtol=1e-3, atol=1e-2)
                others = [i for i in range(nc) if i != 1]
                was, found = old[branch][level][1][..., others], logits[..., others]
                assert torch.equal(features, old[branch][level][0])
                torch.testing.assert_close(found, was, rtol=0, atol=1e-6 * was.abs().max().item())
    after = state(model)
    for k, v in after.items():
        if v.shape != before[k].shape:
            assert "cv3" in k and len(v) == nc + 1
            kept = [i for i in range(nc) if i != 1]
            assert torch.equal(v[kept], before[k][kept])
        else:
            assert torch.equal(v, before[k])
    head = model.model[-1]
    assert head.nc == nc + 1 and head.no == nc + 1 + 4 * head.reg_max


def test_rows_can_be_read_written_back_and_removed():
    model = stock_of("yolo26n.yaml")
    rows, before = class_rows(model), state(model)
    rows.standardize(images())
    kept = rows.get(5)
    assert [[x.shape for x in b] for b in kept] == [[(3, lasts(model, "")[0].in_channels), (3,)]] * 2
    rows.set(5, weights_of(rows))
    assert not same(model, before) and torch.equal(kept[1][0][2], before["model.23.one2one_cv3.2.2.weight"][5, :, 0, 0])
    rows.restore(5, kept)
    assert same(model, before)
    for seed in (1, 2):
        rows.set(79 + seed, weights_of(rows, seed))
    second = rows.get(81)
    rows.remove(80)
    assert all(torch.equal(x, y) for a, b in zip(rows.get(80), second) for x, y in zip(a, b))
    rows.remove(80)
    assert same(model, before) and model.model[-1].nc == 80
    rows.remove(3)
    assert torch.equal(
        lasts(model, "one2one_")[1].bias, before["model.23.one2one_cv3.1.2.bias"][[i for i in range(80) if i != 3]]
    )


def test_a_layer_stays_what_it_is_and_no_random_number_is_drawn():
    model = stock_of("yolo11n.yaml")
    rows, layer = class_rows(model), lasts(model, "")[0]
    rows.standardize(images())
    layer.weight.requires_grad_(False)
    layer.train()
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    rows.set(80, weights_of(rows))
    assert torch.rand(1) == expected
    assert lasts(model, "")[0] is layer and layer.out_channels == 81 and layer.training
    assert (layer.weight.requires_grad, layer.bias.requires_grad) == (False, True)
    assert layer.weight.is_leaf and layer.weight.dtype == torch.float32
    model.train()(images()[0])["scores"].mean().backward()  # it trains on
    assert layer.bias.grad.shape == (81,)


@pytest.mark.parametrize("cfg", ["yolo26n.yaml", "yolov10n.yaml", *TASKS])
@pytest.mark.parametrize("end2end", [False, True])
def test_a_fused_model_has_the_branch_that_is_left(cfg, end2end):
    model = stock_of(cfg)
    model.end2end = end2end and cfg.startswith(DUAL)
    model.fuse(verbose=False)
    rows, nc = class_rows(model), model.model[-1].nc
    assert rows.branches == ("one2one_" if model.end2end else "",)
    rows.standardize(images())
    img, weights = images()[0], weights_of(rows)
    rows.set(nc, weights)
    with torch.no_grad():
        (preds,) = rows.predict(img)
    level = torch.cat([torch.full((f.shape[2] * f.shape[3],), i) for i, f in enumerate(preds["feats"])])
    (vectors, offsets), (space,) = weights[0], rows.spaces()
    expected = space.logits(preds["embeds"][0].t(), level, vectors[None], offsets[None])[:, 0]
    torch.testing.assert_close(preds["scores"][0, nc], expected, rtol=1e-3, atol=1e-2)


def test_a_few_shot_head_has_its_prototypes():
    torch.manual_seed(0)
    model = FewShotDetectionModel("yolo26n-fewshot.yaml", nc=3, verbose=False).eval()
    rows, before = class_rows(model), state(model)
    assert type(rows) is FewShotRows and not rows.per_level and rows.branches == ("", "one2one_")
    assert rows.spaces() == list(model.model[-1].branch_prototypes) and rows.memory == [] and rows.enrolled == {}
    kept = rows.get(1)
    rows.set(1, [(torch.ones(model.model[-1].embed), torch.tensor(0.5))] * 2)
    assert not same(model, before)
    rows.restore(1, kept)
    for k, v in model.state_dict().items():
        torch.testing.assert_close(v, before[k], rtol=0, atol=1e-6)
    before = state(model)
    rows.set(3, [(torch.ones(model.model[-1].embed), torch.tensor(0.5))] * 2)
    assert model.model[-1].nc == 4
    rows.remove(3)
    assert same(model, before) and model.model[-1].nc == 3


def test_enrolled_classes_of_any_network():
    model = stock_of("yolo11n.yaml")
    assert enrolled_classes(model) == enrolled_classes(None) == enrolled_classes("best.onnx") == {}
    model.enrolled = {"scooter": {"shots": 1}}
    assert enrolled_classes(model) == class_rows(model).enrolled == {"scooter": {"shots": 1}}


def test_a_class_that_was_enrolled_before_folding_is_restored_in_the_few_shot_checkpoint():
    few_shot = FewShotDetectionModel("yolo11n-fewshot.yaml", nc=2, verbose=False)
    few_shot.names, few_shot.args = {0: "cat", 1: "dog"}, {}
    few_shot.enrolled = {"dog": {"shots": 1, "replaced": few_shot.model[-1].get_class(1)}}
    model = few_shot.fold()
    before = state(model)
    with pytest.raises(ValueError, match=r"enrolled before the model was folded.* Forget it there, then fold"):
        forget(model, "dog")
    assert same(model, before) and list(model.enrolled) == ["dog"]


# Heads without rows ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, cfg, head",
    [
        (YOLOE, "yoloe-11s.yaml", "YOLOEDetect"),
        (YOLOE, "yoloe-11s-seg.yaml", "YOLOESegment"),
        (YOLOWorld, "yolov8s-world.yaml", "WorldDetect"),
        (RTDETR, "rtdetr-l.yaml", "RTDETRDecoder"),
        (YOLO, "yolo11n-cls.yaml", "Classify"),
    ],
)
def test_other_heads_have_no_rows(kind, cfg, head):
    with pytest.raises(TypeError, match=f"A {head} head has no row for each class"):
        class_rows(kind(cfg).model)


def _kernel(stem):
    stem[-1] = nn.Conv2d(stem[-1].in_channels, 80, 3, padding=1)


def _groups(stem):
    stem[-1] = nn.Conv2d(stem[-1].in_channels, 80, 1, groups=16)


def _bias(stem):
    stem[-1] = nn.Conv2d(stem[-1].in_channels, 80, 1, bias=False)


def _classes(stem):
    stem[-1] = nn.Conv2d(stem[-1].in_channels, 60, 1)


def _activation(stem):
    stem.append(nn.SiLU())


@pytest.mark.parametrize("change", [_kernel, _groups, _bias, _classes, _activation])
def test_a_class_branch_that_ends_otherwise_is_named_with_its_layer(change):
    model = stock_of("yolo26n.yaml")
    stem = model.model[-1].one2one_cv3[1]
    change(stem)
    with pytest.raises(TypeError) as e:
        class_rows(model)
    text = str(e.value)
    assert text.startswith(f"Layer 'model.23.one2one_cv3.1.{len(stem) - 1}' of the Detect head is {stem[-1]}, and")
    assert "1x1 Conv2d of 80 classes with a bias" in text
    assert dict(model.named_modules())[f"model.23.one2one_cv3.1.{len(stem) - 1}"] is stem[-1]


def test_a_class_branch_of_another_kind_is_named_with_its_layer():
    model = stock_of("yolo11n.yaml")
    model.model[-1].cv3[2] = nn.Conv2d(256, 80, 1)
    with pytest.raises(TypeError, match=r"Layer 'model.23.cv3.2' of the Detect head is Conv2d\(256, 80, "):
        class_rows(model)


def test_levels_of_unequal_width_are_refused():
    model = stock_of("yolo11n.yaml")
    model.model[-1].cv3[2][-1] = nn.Conv2d(96, 80, 1)
    with pytest.raises(TypeError, match=r"'cv3' of the Detect head has \[80, 96\] channels.*as many at every level"):
        class_rows(model)


def test_a_head_without_a_class_branch_was_fused():
    model = stock_of("yolo26n.yaml")
    model.model[-1].cv3 = model.model[-1].one2one_cv3 = None
    with pytest.raises(TypeError, match=r"The Detect head has no class branch.*Use the unfused checkpoint"):
        class_rows(model)
