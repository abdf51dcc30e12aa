import math
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from ultralytics.nn.modules.head import Detect, Segment
from ultralytics.nn.tasks import DetectionModel

from yolo_fewshot.head import FewShotDetect
from yolo_fewshot.model import FewShotDetectionModel

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
        for bank in head.banks:
            bank.weight.mul_(torch.rand(7, 1, 1) + 0.5)  # their length must not matter
            bank.logit_scale.copy_(torch.tensor([0.5, 1.0, 2.0]))
            bank.bias.copy_(torch.tensor([-1.0, -2.0, -3.0]))
        branches = raw(model, x)
    assert len(branches) == len(head.branches) == (2 if head.reg_max == 1 else 1)
    for bank, preds in zip(head.banks, branches):
        sizes = [f.shape[2] * f.shape[3] for f in preds["feats"]]
        assert sum(sizes) == preds["embeds"].shape[2] and preds["embeds"].shape[1] == 128
        a = 0
        for level, n in enumerate(sizes):
            for c in range(7):
                p = bank.weight[c, :, 0] / bank.weight[c, :, 0].norm()
                e = preds["embeds"][:, :, a : a + n]
                expected = bank.logit_scale[level] * torch.einsum("bdn,d->bn", e, p) + bank.bias[level]
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
        for bank in fresh.model[-1].banks:
            for i, s in enumerate((8, 16, 32)):
                assert bank.bias[i].item() == pytest.approx(math.log(5 / 7 / (640 / s) ** 2), abs=1e-4)
        with torch.no_grad():
            p = raw(fresh, torch.rand(1, 3, 64, 64))[0]["scores"].sigmoid()
        assert p.max() < 0.1 and p.mean() < 0.02


def test_inference_output_has_the_shape_of_stock(model):
    stock = DetectionModel({**model.yaml, "fewshot": None}, nc=7, verbose=False).eval()
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        ours, theirs = model.eval()(x), stock(x)
    assert ours[0].shape == theirs[0].shape
    assert ours[1].keys() == theirs[1].keys()  # the embeddings are for training only


def test_fusing_changes_no_prediction(model):
    fused, x = deepcopy(model).eval(), torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        before = fused(x)[0]
        fused.fuse(verbose=False)
        after = fused(x)[0]
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in fused.model[-1].modules())
    torch.testing.assert_close(before, after, rtol=1e-3, atol=1e-3)


def test_upgrade_keeps_box_branch_and_stems():
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


def test_other_heads_and_fused_heads_are_refused():
    with pytest.raises(TypeError, match="Segment head cannot become"):
        FewShotDetect.upgrade(Segment(nc=3, ch=(16, 32, 64)))
    stock = DetectionModel("yolo26n.yaml", nc=5, verbose=False).eval()
    stock.end2end = True
    stock.fuse(verbose=False)
    with pytest.raises(TypeError, match="fused"):
        FewShotDetect.upgrade(stock.model[-1])


def test_prototypes_are_no_matrix_for_muon(model):
    assert all(bank.weight.ndim == 3 for bank in model.model[-1].banks)


def test_set_prototype_appends_or_replaces_one_row_only(model):
    changed = deepcopy(model)
    head, x = changed.model[-1], torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        before = raw(changed, x)
        old = [b.weight.detach().clone() for b in head.banks]
        rows = [torch.randn(128) for _ in head.banks]
        head.set_prototype(7, rows)
        head.set_prototype(3, rows)
        after = raw(changed, x)
    assert head.nc == 8 and head.no == 8 + 4 * head.reg_max
    for bank, w, row, b, a in zip(head.banks, old, rows, before, after):
        others = [0, 1, 2, 4, 5, 6]
        assert torch.equal(bank.weight[others], w[others])
        torch.testing.assert_close(bank.weight[[3, 7], :, 0], torch.stack([row, row]))
        torch.testing.assert_close(a["scores"][:, others], b["scores"][:, others], rtol=1e-5, atol=1e-5)
        assert a["scores"].shape[1] == 8 and bank.frozen.shape == (8, 128)
    with pytest.raises(IndexError, match="gap"):
        head.set_prototype(10, rows)


def test_freezing_keeps_unit_copies_that_training_does_not_move(model):
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
