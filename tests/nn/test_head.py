import math
import pickle
import pickletools
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from ultralytics.nn.modules.head import Detect, Segment
from ultralytics.nn.tasks import DetectionModel, yaml_model_load

from yolo_fewshot.nn.head import FewShotDetect
from yolo_fewshot.nn.model import FewShotDetectionModel

FAMILIES = ["yolo11n-fewshot.yaml", "yolov8n-fewshot.yaml", "yolo26n-fewshot.yaml"]


@pytest.fixture(params=FAMILIES, scope="module")
def model(request):
    torch.manual_seed(0)
    return FewShotDetectionModel(request.param, nc=7, verbose=False)


def raw(model, x, training=True):
    """Predictions of every branch."""
    model.eval()
    model.model[-1].training = training
    preds = model(x) if training else model(x)[1]
    model.model[-1].training = False
    return (preds["one2many"], preds["one2one"]) if "one2many" in preds else (preds,)


def test_logits_are_scaled_products_with_unit_prototypes(model):
    model = deepcopy(model)
    head, x = model.model[-1], torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        for prototypes in head.branch_prototypes:
            prototypes.weight.mul_(torch.rand(7, 1, 1) + 0.5)  # their length must not matter
            prototypes.logit_scale.copy_(torch.tensor([0.5, 1.0, 2.0]))
            prototypes.bias.copy_(torch.tensor([-1.0, -2.0, -3.0]))
        branches = raw(model, x)
    assert len(branches) == len(head.branches) == (2 if head.reg_max == 1 else 1)
    for prototypes, preds in zip(head.branch_prototypes, branches):
        sizes = [f.shape[2] * f.shape[3] for f in preds["feats"]]
        assert sum(sizes) == preds["embeds"].shape[2] and preds["embeds"].shape[1] == 128
        a = 0
        for level, n in enumerate(sizes):
            for c in range(7):
                p = prototypes.weight[c, :, 0] / prototypes.weight[c, :, 0].norm()
                e = preds["embeds"][:, :, a : a + n]
                expected = prototypes.logit_scale[level] * torch.einsum("bdn,d->bn", e, p) + prototypes.bias[level]
                torch.testing.assert_close(preds["scores"][:, c, a : a + n], expected, rtol=1e-4, atol=1e-4)
            a += n


def test_embedding_is_linear_in_the_stems_features(model):
    embedding = model.model[-1].cv3[0][-1].eval()
    x, y = torch.randn(2, 1, embedding.in_channels, 4, 4).unbind(0)
    zero = embedding(torch.zeros_like(x))
    torch.testing.assert_close(embedding(x + y) - zero, embedding(x) + embedding(y) - 2 * zero, rtol=1e-4, atol=1e-4)


def test_every_anchor_starts_near_the_focal_prior():
    torch.manual_seed(0)
    for family in FAMILIES:
        fresh = FewShotDetectionModel(family, nc=7, verbose=False)
        for prototypes in fresh.model[-1].branch_prototypes:
            for i, s in enumerate((8, 16, 32)):
                assert prototypes.bias[i].item() == pytest.approx(math.log(5 / 7 / (640 / s) ** 2), abs=1e-4)
        with torch.no_grad():
            p = raw(fresh, torch.rand(1, 3, 64, 64))[0]["scores"].sigmoid()
        assert p.max() < 0.1 and p.mean() < 0.02


def test_inference_output_has_the_shape_of_a_stock_head(model):
    stock = DetectionModel({**model.yaml, "fewshot": None}, nc=7, verbose=False).eval()
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        ours, theirs = model.eval()(x), stock(x)
    assert ours[0].shape == theirs[0].shape
    assert ours[1].keys() == theirs[1].keys()  # the embeddings are for training only


def test_upgrade_keeps_box_branch_and_class_stems():
    stock = DetectionModel("yolo11n.yaml", nc=5, verbose=False)
    before = {k: v.clone() for k, v in stock.model[-1].state_dict().items()}
    stride, f = stock.model[-1].stride.clone(), stock.model[-1].f
    head = FewShotDetect.upgrade(stock.model[-1], embed=32, proj=16)
    after = head.state_dict()
    kept = [k for k in before if not any(k.startswith(f"cv3.{i}.2.") for i in range(3))]
    assert len(kept) > 20 and all(torch.equal(before[k], after[k]) for k in kept)
    assert torch.equal(head.stride, stride) and head.f == f and isinstance(head, Detect)
    assert head.prototypes.weight.shape == (5, 32, 1) and head.proj(torch.zeros(2, 32)).shape == (2, 16)
    torch.testing.assert_close(head.prototypes.weight.norm(dim=1), torch.ones(5, 1))


def test_without_projection_the_embedding_itself_is_used():
    head = FewShotDetect.upgrade(DetectionModel("yolo11n.yaml", nc=5, verbose=False).model[-1], embed=32, proj=0)
    x = torch.randn(3, 32)
    assert torch.equal(head.proj(x), x)


def test_other_heads_and_fused_heads_raise_an_error():
    with pytest.raises(TypeError, match="Segment head cannot become"):
        FewShotDetect.upgrade(Segment(nc=3, ch=(16, 32, 64)))
    stock = DetectionModel("yolo26n.yaml", nc=5, verbose=False).eval()
    stock.end2end = True
    stock.fuse(verbose=False)
    with pytest.raises(TypeError, match="fused"):
        FewShotDetect.upgrade(stock.model[-1])


def test_prototypes_have_three_axes_so_that_muon_skips_them(model):
    assert all(prototypes.weight.ndim == 3 for prototypes in model.model[-1].branch_prototypes)


def randomize(model, seed):
    """Give the head what training and enrollment may leave in it: BatchNorm statistics, scales, biases, gains, offsets.

    Whether a level's logits come from its own scale and bias, and a class's from its own gain and offset, then shows.
    """
    g = torch.Generator().manual_seed(seed)

    def uniform(x, low, high):
        x.data.copy_(torch.rand(x.shape, generator=g) * (high - low) + low)

    head = model.model[-1]
    for bn in (m for m in head.modules() if isinstance(m, nn.BatchNorm2d)):
        for x, low, high in (
            (bn.running_mean, -1, 1),
            (bn.running_var, 0.2, 3),
            (bn.weight, -1.5, 1.5),
            (bn.bias, -1, 1),
        ):
            uniform(x, low, high)
    for prototypes in head.branch_prototypes:
        prototypes.weight.data.copy_(torch.randn(prototypes.weight.shape, generator=g) * 2)
        for x, low, high in (
            (prototypes.logit_scale, 0.1, 2),
            (prototypes.bias, -8, 1),
            (prototypes.gain, 0.2, 3),
            (prototypes.offset, -3, 3),
        ):
            uniform(x, low, high)
    return model.eval()


def build(family, nc, embed, seed):
    torch.manual_seed(seed)
    return randomize(
        FewShotDetectionModel(
            {**yaml_model_load(family), "fewshot": {"embed": embed, "proj": 8}}, nc=nc, verbose=False
        ),
        seed,
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("nc", "embed"), [(1, 8), (7, 128), (90, 8), (90, 128)])
def test_a_folded_model_predicts_the_same(family, nc, embed):
    for seed in range(3):
        model = build(family, nc, embed, seed)
        folded, x = model.fold(), torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            ours, theirs = raw(model, x, False), raw(folded, x, False)
            assert len(ours) == len(theirs) == (2 if "26" in family else 1)
            for a, b in zip(ours, theirs):
                spread = a["scores"].std().item()
                assert a["scores"].shape == (2, nc, 126) and spread > 0.1
                assert (a["scores"] - b["scores"]).abs().max() <= 1e-5 * max(spread, a["scores"].abs().max())
                decoded = [m.model[-1]._inference(p) for m, p in ((model, a), (folded, b))]
                assert (decoded[0] - decoded[1]).abs().max() <= 1e-4
            assert (model(x)[0] - folded(x)[0]).abs().max() <= 1e-4


def test_folding_a_nearly_dead_channel_loses_no_precision():
    model = build(FAMILIES[0], 3, 8, 0)
    for stem in model.model[-1].cv3:
        stem[-1].bn.running_var[0] = 1e-6  # so that its factor is about 300
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        a, b = raw(model, x, False)[0]["scores"], raw(model.fold(), x, False)[0]["scores"]
    assert (a - b).abs().max() <= 1e-5 * a.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folded_model_is_a_stock_model(family):
    model = build(family, 5, 16, 0)
    folded = model.fold()
    stock = DetectionModel(family, nc=5, verbose=False)
    head = folded.model[-1]
    assert type(folded) is DetectionModel and type(head) is Detect and head.type == stock.model[-1].type
    ours, theirs = folded.state_dict(), stock.state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    assert {k: v.dtype for k, v in ours.items()} == {k: v.dtype for k, v in theirs.items()}
    assert head.np == sum(x.numel() for x in stock.model[-1].parameters())
    assert set(vars(head)) <= set(vars(stock.model[-1])) and set(head._modules) == set(stock.model[-1]._modules)
    assert {type(m) for m in folded.modules()} == {type(m) for m in stock.modules()}
    assert "fewshot" not in folded.yaml


def test_a_folded_model_unpickles_without_this_package():
    for family in FAMILIES:
        data = pickle.dumps(build(family, 3, 8, 0).fold())
        strings = {arg for _, arg, _ in pickletools.genops(data) if isinstance(arg, str)}
        assert any("ultralytics.nn.modules.head" in x for x in strings)
        assert not [x for x in strings if "yolo_fewshot" in x or "Prototypes" in x]


def test_fusing_gives_a_folded_model_and_leaves_the_few_shot_model(model):
    model, x = randomize(deepcopy(model), 3), torch.rand(1, 3, 64, 64)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fused = model.fuse(verbose=False)
    assert type(fused) is DetectionModel and type(fused.model[-1]) is Detect and fused.is_fused()
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
    assert type(model.model[-1]) is FewShotDetect and not model.is_fused()
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    with torch.no_grad():
        torch.testing.assert_close(model(x)[0], fused(x)[0], rtol=1e-3, atol=1e-3)


def test_set_class_appends_or_replaces_one_row_only(model):
    changed = randomize(deepcopy(model), 1)
    head, x = changed.model[-1], torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        before = raw(changed, x)
        old = [{k: v.clone() for k, v in b.state_dict().items()} for b in head.branch_prototypes]
        rows = [(torch.randn(128) * 3, torch.tensor(float(i) - 2)) for i, _ in enumerate(head.branch_prototypes)]
        head.set_class(7, rows)
        head.set_class(3, rows)
        after = raw(changed, x)
    assert head.nc == 8 and head.no == 8 + 4 * head.reg_max
    others = [0, 1, 2, 4, 5, 6]
    for prototypes, was, (vector, offset), b, a in zip(head.branch_prototypes, old, rows, before, after):
        now = prototypes.state_dict()
        assert (
            isinstance(prototypes.weight, nn.Parameter) and prototypes.weight.requires_grad and now.keys() == was.keys()
        )
        for name in ("weight", "gain", "offset", "frozen"):
            assert torch.equal(now[name][others], was[name][others]) and len(now[name]) == 8
        assert torch.equal(now["logit_scale"], was["logit_scale"]) and torch.equal(now["bias"], was["bias"])
        unit = vector / vector.norm()
        torch.testing.assert_close(prototypes.weight[[3, 7], :, 0], torch.stack([unit, unit]))
        torch.testing.assert_close(prototypes.gain[[3, 7]], vector.norm().expand(2))
        assert prototypes.offset[[3, 7]].tolist() == [offset, offset]
        torch.testing.assert_close(a["scores"][:, others], b["scores"][:, others], rtol=1e-5, atol=1e-5)
        n = 0
        for level, f in enumerate(a["feats"]):  # the logit is s <e, v> + b + o
            e, n = a["embeds"][:, :, n : n + f[0, 0].numel()], n + f[0, 0].numel()
            expected = (
                prototypes.logit_scale[level] * torch.einsum("bdn,d->bn", e, vector) + prototypes.bias[level] + offset
            )
            torch.testing.assert_close(a["scores"][:, 7, n - e.shape[2] : n], expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(IndexError, match="gap"):
        head.set_class(9, rows)


def test_get_class_returns_what_set_class_sets(model):
    head = randomize(deepcopy(model), 2).model[-1]
    rows = [(torch.randn(128) * 2, torch.tensor(0.5)) for _ in head.branch_prototypes]
    head.set_class(4, rows)
    for (vector, offset), (v, o) in zip(rows, head.get_class(4), strict=True):
        torch.testing.assert_close(v, vector)
        assert o == offset
    taken = head.get_class(4)
    for prototypes in head.branch_prototypes:  # what was taken does not change with the head
        prototypes.offset += 1
    assert [o for _, o in taken] == [0.5] * len(head.branch_prototypes)
    kept = [(w.clone(), b.clone()) for prototypes in head.branch_prototypes for w, b in [prototypes.rows(1)]]
    taken = head.get_class(4), head.get_class(6)
    head.set_class(4, taken[1])
    head.set_class(6, taken[0])  # what was taken does not change with the head
    for prototypes, (vector, offset) in zip(head.branch_prototypes, taken[0]):
        torch.testing.assert_close(prototypes.weight[6, :, 0] * prototypes.gain[6], vector)
        assert prototypes.offset[6] == offset
    head.set_class(4, taken[0])
    head.set_class(6, taken[1])
    for (w, b), prototypes in zip(kept, head.branch_prototypes):
        torch.testing.assert_close(prototypes.rows(1)[0], w, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(prototypes.rows(1)[1], b)


def test_remove_class_decreases_later_indices_by_one(model):
    changed = randomize(deepcopy(model), 4)
    head, x = changed.model[-1], torch.rand(1, 3, 64, 64)
    head.freeze_prototypes(list(range(7)))
    with torch.no_grad():
        before = raw(changed, x)
        old = [{k: v.clone() for k, v in b.state_dict().items()} for b in head.branch_prototypes]
        head.remove_class(2)
        after, decoded = raw(changed, x), changed(x)[0]
    assert head.nc == 6 and head.no == 6 + 4 * head.reg_max and decoded.shape[1] == 4 + 6
    left = [0, 1, 3, 4, 5, 6]
    for prototypes, was, b, a in zip(head.branch_prototypes, old, before, after):
        for name in ("weight", "gain", "offset", "frozen"):
            assert torch.equal(prototypes.state_dict()[name], was[name][left])
        torch.testing.assert_close(a["scores"], b["scores"][:, left], rtol=1e-5, atol=1e-5)


def test_an_appended_class_has_no_frozen_prototype(model):
    head = deepcopy(model).model[-1]
    head.freeze_prototypes(list(range(7)))
    head.set_class(2, head.get_class(3))
    head.set_class(7, head.get_class(3))
    for prototypes in head.branch_prototypes:
        assert prototypes.frozen.any(1).tolist() == [True] * 7 + [False] and not torch.equal(
            prototypes.frozen[2], prototypes.frozen[3]
        )


def test_frozen_prototypes_are_unit_copies_that_training_does_not_change(model):
    head = deepcopy(model).model[-1]
    assert not head.prototypes.frozen.any()
    head.freeze_prototypes(list(range(7)))
    torch.testing.assert_close(head.prototypes.frozen, F.normalize(head.prototypes.weight[..., 0], dim=1).detach())
    kept = head.prototypes.frozen.clone()
    head.prototypes.weight.data += 1
    assert torch.equal(head.prototypes.frozen, kept)
    head.freeze_prototypes([1, 4])
    assert head.prototypes.frozen.any(1).nonzero()[:, 0].tolist() == [1, 4]
    assert "prototypes.frozen" in head.state_dict() and kept.dtype == torch.float32


def test_bias_init_restores_the_prior(model):
    head = deepcopy(model).model[-1]
    expected = head.prototypes.bias.clone()
    head.prototypes.bias.data += 1
    head.cv2[0][-1].bias.data += 1
    head.bias_init()
    assert torch.equal(head.prototypes.bias, expected) and (head.cv2[0][-1].bias == 2).all()
