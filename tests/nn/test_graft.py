from copy import deepcopy

import pytest
import torch
from torch import nn
from ultralytics import YOLO
from ultralytics.nn.tasks import DetectionModel, OBBModel

from yolo_fewshot.args import KEYS
from yolo_fewshot.enroll.enroll import forget
from yolo_fewshot.nn.graft import (
    check_graftable,
    drop_unused_levels,
    fuse_shared,
    level_groups,
    new_graft,
    old_graft,
    unite,
)
from yolo_fewshot.nn.rows import StockRows

pytestmark = pytest.mark.oldest

PARTS = [x for x in KEYS["graft"].choices if x != "none"]
FAMILIES = ("yolo11n.yaml", "yolov8n.yaml", "yolov9t.yaml", "yolov10n.yaml", "yolo12n.yaml", "yolo26n.yaml")


def network(cfg: str = "yolo11n.yaml", nc: int = 4) -> DetectionModel:
    """A detector with random weights and statistics, and scores that are not all alike."""
    torch.manual_seed(0)
    model = DetectionModel(cfg, nc=nc, verbose=False).eval()
    for name, x in model.named_buffers():
        if name.endswith("running_mean"):
            x.normal_(0, 0.1)
    model.names = {i: f"old{i}" for i in range(nc)}
    return model


def raw(model: nn.Module) -> list[dict]:
    """Raw predictions of every branch."""
    torch.manual_seed(1)
    with torch.no_grad():
        preds = model(torch.rand(2, 3, 64, 96))[1]
    return [preds["one2many"], preds["one2one"]] if "one2many" in preds else [preds]


def assert_same(a: torch.Tensor, b: torch.Tensor) -> None:
    """A device may sum the channels of a conv in another order for another number of rows."""
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def shaken(model: nn.Module) -> nn.Module:
    """The copy after some training: its own layers have moved."""
    shared = model.graft["shared"]
    for i, layer in enumerate(model.model):
        if i not in shared:
            for p in layer.parameters():
                p.data += 0.01 * torch.randn_like(p)
    return model.eval()


@pytest.fixture(scope="module")
def detector():
    return network()


@pytest.mark.parametrize("cfg", FAMILIES)
@pytest.mark.parametrize("part", PARTS)
def test_old_levels_keep_their_outputs_and_new_ones_have_those_of_the_copy(cfg, part):
    model = network(cfg)
    copy = shaken(new_graft(model, ["cat", "dog"], part))
    grafted = unite(copy).eval()
    assert type(grafted) is DetectionModel and grafted.names == {**model.names, 4: "cat", 5: "dog"}
    assert grafted.nc == grafted.model[-1].nc == grafted.yaml["nc"] == 6 and grafted.stride.tolist() == [8, 16, 32] * 2
    for old, new, both in zip(raw(model), raw(copy), raw(grafted)):
        n = old["scores"].shape[2]
        assert torch.equal(both["boxes"][:, :, :n], old["boxes"])
        assert_same(both["scores"][:, :4, :n], old["scores"])
        assert torch.equal(both["boxes"][:, :, n:], new["boxes"])
        assert_same(both["scores"][:, 4:, n:], new["scores"])
        kept = grafted.model[-1].cv3[1][-1].weight[:4], model.model[-1].cv3[1][-1].weight
        assert torch.equal(*kept)
        assert (both["scores"][:, 4:, :n] == -30).all() and (both["scores"][:, :4, n:] == -30).all()


@pytest.mark.parametrize("cfg", FAMILIES)
@pytest.mark.parametrize("part", PARTS)
def test_stock_ultralytics_builds_the_same_layers_from_the_yaml(cfg, part):
    grafted = unite(new_graft(network(cfg), ["cat"], part))
    built = DetectionModel(deepcopy(grafted.yaml), verbose=False)
    assert [type(m) for m in built.model] == [type(m) for m in grafted.model]
    assert [(m.i, m.f) for m in built.model] == [(m.i, m.f) for m in grafted.model] and sorted(
        {*built.save}
    ) == grafted.save
    assert built.state_dict().keys() == grafted.state_dict().keys()
    width = {k: v.shape for k, v in grafted.state_dict().items() if ".cv3." not in k and "one2one_cv3" not in k}
    assert {k: v.shape for k, v in built.state_dict().items() if k in width} == width  # class stems depend on nc


@pytest.mark.parametrize("order", [lambda x: dict(reversed(x.items())), lambda x: list(x.values())])
def test_old_classes_keep_their_indices_whatever_the_order_of_their_names(detector, order):
    model = deepcopy(detector)
    model.names = order(detector.names)
    assert unite(new_graft(model, ["cat"], "neck")).names == {**detector.names, 4: "cat"}


def test_class_weights_of_the_old_classes_go(detector):
    model = deepcopy(detector)
    model.class_weights = torch.ones(4)  # which Ultralytics leaves in a checkpoint of cls_pw=
    copy = new_graft(model, ["cat"], "neck")
    assert not hasattr(copy, "class_weights") and not hasattr(unite(copy), "class_weights")


@pytest.mark.parametrize("part", PARTS)
def test_a_grafted_checkpoint_has_the_names_of_its_layers_and_loads_with_the_restricted_loader(
    detector, part, tmp_path, monkeypatch
):
    grafted = unite(new_graft(detector, ["cat"], part))
    types = [m.type for m in grafted.model]
    assert types == [f"{type(m).__module__}.{type(m).__name__}" for m in grafted.model]
    assert (types[0] == "torch.nn.modules.linear.Identity") == (part == "all")
    torch.save({"model": grafted, "train_args": {}}, tmp_path / "grafted.pt")
    monkeypatch.setattr("ultralytics.nn.tasks.SAFE_LOAD", True)  # as ULTRALYTICS_SAFE_LOAD=1
    assert [m.type for m in YOLO(tmp_path / "grafted.pt").model.model] == types


def test_a_copy_starts_with_the_weights_of_the_detector_and_fresh_rows():
    detector = network(nc=80)
    copy = new_graft(detector, ["cat", "dog"], "neck")
    state, rows = detector.state_dict(), [f"model.23.cv3.{i}.2.{k}" for i in range(3) for k in ("weight", "bias")]
    for name, x in copy.state_dict().items():
        assert torch.equal(x, state[name]) == (name not in rows), name
    assert copy.model[-1].cv3[0][-1].weight.shape[:2] == (2, 80)  # the width of the detector's stems
    # 5 objects among the anchors of an image of 640 x 640, shared by 2 classes
    assert copy.model[-1].cv3[2][-1].bias.sigmoid().tolist() == pytest.approx([5 / 2 / 400] * 2, rel=0.01)
    assert all(p.requires_grad for p in copy.parameters() if p.ndim == 4)


@pytest.mark.parametrize(("part", "shared"), [("head", range(23)), ("neck", range(10)), ("all", [])])
def test_what_is_shared(detector, part, shared):
    copy = new_graft(detector, ["cat"], part)
    assert copy.graft["shared"] == list(shared)
    grafted = unite(copy)
    own = sum(p.numel() for i, m in enumerate(copy.model) if i not in shared for p in m.parameters())
    # a row of each of the 3 levels is appended to the old head, 4 are put before the new one
    rows = 3 * (64 + 1) * (1 + 4)
    total = sum(p.numel() for p in detector.parameters())
    assert sum(p.numel() for p in grafted.parameters()) == total + own + rows - 16  # of the DFL, which all levels share


@pytest.mark.parametrize(("cfg", "shared"), [(f, 9 if "12" in f else 10) for f in FAMILIES])
def test_what_follows_sppf_in_the_backbone_is_copied_with_the_neck(cfg, shared):
    model = network(cfg)
    assert new_graft(model, ["cat"], "neck").graft["shared"] == list(range(shared))
    own = [type(m).__name__ for m in model.model[shared : len(model.yaml["backbone"])]]
    assert own == {"yolo11n.yaml": ["C2PSA"], "yolov10n.yaml": ["PSA"], "yolo26n.yaml": ["C2PSA"]}.get(cfg, [])


@pytest.mark.parametrize("cfg", FAMILIES)
@pytest.mark.parametrize("part", PARTS)
def test_a_copy_with_fused_shared_layers_predicts_and_is_grafted_as_before(cfg, part):
    model = network(cfg)
    copy = shaken(new_graft(model, ["cat"], part))
    fused = deepcopy(copy)
    fuse_shared(fused)
    for a, b in zip(raw(copy), raw(fused.eval())):
        for k in ("boxes", "scores"):
            torch.testing.assert_close(a[k], b[k], rtol=1e-3, atol=1e-3)
    norms = [sum(isinstance(x, nn.BatchNorm2d) for x in m.modules()) for m in (copy, fused)]
    assert norms[1] < norms[0] or part == "all"
    before, after = unite(copy).state_dict(), unite(fused).state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def test_the_detector_is_not_changed(detector):
    before = deepcopy(detector.state_dict())
    unite(shaken(new_graft(detector, ["cat"], "all")))
    assert all(torch.equal(x, before[k]) for k, x in detector.state_dict().items())
    assert detector.model[-1].nl == 3 and len(detector.names) == 4 and type(detector) is DetectionModel


@pytest.mark.parametrize("first", PARTS)
@pytest.mark.parametrize("second", PARTS)
def test_a_second_graft_reads_the_original_layers_and_keeps_the_first(detector, first, second):
    once = unite(shaken(new_graft(detector, ["cat", "dog"], first))).eval()
    copy = shaken(new_graft(once, ["hat"], second))
    twice = unite(copy).eval()
    assert [(g.levels, g.classes) for g in level_groups(twice)] == [
        ([0, 1, 2], [0, 1, 2, 3]),
        ([3, 4, 5], [4, 5]),
        ([6, 7, 8], [6]),
    ]
    before, after, new = raw(once)[0], raw(twice)[0], raw(copy)[0]
    n = before["scores"].shape[2]
    assert_same(after["scores"][:, :6, :n], before["scores"])
    assert_same(after["scores"][:, 6:, n:], new["scores"])
    assert torch.equal(after["boxes"], torch.cat([before["boxes"], new["boxes"]], 2))


@pytest.mark.parametrize("part", PARTS)
def test_training_a_copy_further_changes_its_levels_alone(detector, part):
    once = unite(shaken(new_graft(detector, ["cat", "dog"], part)))
    twice = unite(shaken(new_graft(once, ["hat"], "neck"))).eval()
    group = level_groups(twice)[1]
    copy = old_graft(twice, group)
    assert list(copy.names.values()) == ["cat", "dog"]
    same = raw(unite(copy).eval())[0]
    assert all(torch.equal(same[k], raw(twice)[0][k]) for k in ("boxes", "scores"))
    again = unite(shaken(copy)).eval()
    assert again.names == twice.names and [g.classes for g in level_groups(again)] == [[0, 1, 2, 3], [4, 5], [6]]
    before, after, new = raw(twice)[0]["scores"], raw(again)[0]["scores"], raw(copy)[0]["scores"]
    n = new.shape[2]
    assert torch.equal(after[..., :n], before[..., :n]) and torch.equal(after[..., 2 * n :], before[..., 2 * n :])
    assert_same(after[:, 4:6, n : 2 * n], new)
    assert not torch.allclose(new, before[:, 4:6, n : 2 * n], atol=1e-3)


def test_a_further_graft_shares_what_other_levels_read(detector):
    once = unite(new_graft(detector, ["cat"], "neck"))
    copy = old_graft(once, level_groups(once)[1])
    assert copy.graft["shared"] == list(range(10)) and copy.graft["layers"][10:-1] == list(range(23, 36))


@pytest.mark.parametrize("part", PARTS)
def test_forgetting_a_class_removes_the_layers_that_no_class_uses(detector, part):
    grafted = unite(shaken(new_graft(detector, ["cat", "dog"], part))).eval()
    grafted.enrolled = {n: {"shots": 1, "method": "graft", "conf": None, "replaced": None} for n in ("cat", "dog")}
    forget(grafted, "cat")
    assert grafted.model[-1].nl == 6 and list(grafted.names.values())[4:] == ["dog"]
    forget(grafted, "dog")
    assert grafted.model[-1].nl == 3 and grafted.names == detector.names
    for a, b in zip(raw(grafted), raw(detector)):
        assert torch.equal(a["boxes"], b["boxes"]) and torch.equal(a["scores"], b["scores"])
    entry = int(part == "all")  # the image keeps its name
    assert len(grafted.model) == len(detector.model) + entry
    assert DetectionModel(deepcopy(grafted.yaml), verbose=False).state_dict().keys() == grafted.state_dict().keys()


@pytest.mark.parametrize("cfg", ["yolo11n.yaml", "yolo26n.yaml"])
def test_an_old_class_that_was_enrolled_again_is_forgotten_whatever_was_grafted_since(cfg):
    detector = network(cfg)
    source, record = deepcopy(detector), {"shots": 1, "method": "fit", "conf": None}
    trained = StockRows(source).get(1)
    StockRows(source).restore(1, [(w + 1, b + 1) for w, b in trained])
    grafted = unite(shaken(new_graft(source, ["cat"], "neck"))).eval()
    grafted.enrolled = {"old1": record | {"replaced": trained}, "cat": record | {"replaced": None}}
    forget(grafted, "old1")
    assert [(g.levels, g.classes) for g in level_groups(grafted)] == [([0, 1, 2], [0, 1, 2, 3]), ([3, 4, 5], [4])]
    forget(grafted, "cat")
    for a, b in zip(raw(grafted), raw(detector)):
        assert torch.equal(a["boxes"], b["boxes"]) and torch.equal(a["scores"], b["scores"])


def test_forgetting_an_old_class_removes_levels_where_only_it_was_on(detector):
    grafted = unite(shaken(new_graft(detector, ["cat"], "neck"))).eval()
    rows, record = StockRows(grafted), {"shots": 1, "method": "fit", "conf": None}
    grafted.enrolled = {"old1": record | {"replaced": rows.get(1)}, "cat": record | {"replaced": None}}
    rows.restore(1, [(w + 1, b.clamp(min=-5)) for w, b in rows.get(1)])  # enrolled: on at every level
    forget(grafted, "cat")
    assert grafted.model[-1].nl == 6
    forget(grafted, "old1")
    assert grafted.model[-1].nl == 3 and len(grafted.model) == 24
    for a, b in zip(raw(grafted), raw(detector)):
        assert torch.equal(a["boxes"], b["boxes"]) and torch.equal(a["scores"], b["scores"])


def test_levels_of_a_detector_without_grafts_stay(detector):
    model = deepcopy(detector)
    drop_unused_levels(model)
    assert model.model is not None and model.model[-1].nl == 3 and len(model.model) == 24
    assert [(g.levels, g.classes) for g in level_groups(model)] == [([0, 1, 2], [0, 1, 2, 3])]


def test_a_head_of_another_task_cannot_be_grafted_onto():
    model = OBBModel("yolo11n-obb.yaml", nc=3, verbose=False)
    with pytest.raises(TypeError, match=r"A OBB\d* head cannot be grafted onto, only one that detects boxes"):
        check_graftable(model)


def test_layers_that_the_yaml_does_not_describe_are_an_error(detector):
    model = deepcopy(detector)
    model.yaml["head"] = model.yaml["head"][1:]
    with pytest.raises(TypeError, match="has 24 layers, and its YAML describes 23"):
        new_graft(model, ["cat"], "neck")


def test_a_saved_graft_is_a_stock_checkpoint(detector, tmp_path):
    grafted = unite(new_graft(detector, ["cat"], "neck")).eval()
    yolo = YOLO("yolo11n.yaml")
    yolo.model = grafted
    yolo.save(tmp_path / "grafted.pt")
    assert b"yolo_fewshot" not in (tmp_path / "grafted.pt").read_bytes()
    again = YOLO(tmp_path / "grafted.pt").model
    assert again.names == grafted.names and again.model[-1].nl == 6
