import copy

import pytest
import torch
from ultralytics import YOLO
from ultralytics.nn.tasks import DetectionModel, SegmentationModel
from ultralytics.utils.loss import E2ELoss

from yolo_fewshot.criterion import FewShotLoss
from yolo_fewshot.model import FewShotDetectionModel

SCALES = [f"{family}{s}" for family in ("yolo11", "yolov8", "yolo26") for s in "nsmlx"]


def build(cfg="yolo11n-fewshot.yaml", nc=4, names=None, seed=0):
    torch.manual_seed(seed)
    model = FewShotDetectionModel(cfg, nc=nc, verbose=False)
    if names:
        model.names = dict(enumerate(names))
    return model


@pytest.mark.parametrize("scale", SCALES)
def test_every_scale_has_the_layers_of_its_stock_family(scale):
    """Every parameter but the class conv's has the shape that stock Ultralytics gives it."""
    from ultralytics.nn.tasks import yaml_model_load

    with torch.device("meta"):
        ours = yaml_model_load(f"{scale}-fewshot.yaml")
        stock = yaml_model_load(f"{scale}.yaml")
    for key in ("backbone", "head"):
        assert [[f, n, m, [str(x) for x in a]] for f, n, m, a in ours[key]] == [
            [f, n, m, [str(x) for x in a]] for f, n, m, a in stock[key]
        ]
    assert ours["scales"] == stock["scales"] and ours["scale"] == stock["scale"]
    assert ours.get("reg_max") == stock.get("reg_max") and ours.get("end2end") == stock.get("end2end")


def test_fewshot_yaml_is_yolo11n():
    a, b = build("fewshot.yaml").state_dict(), build("yolo11n-fewshot.yaml").state_dict()
    assert {k: v.shape for k, v in a.items()} == {k: v.shape for k, v in b.items()}


def test_plain_ultralytics_parses_our_yaml_as_a_stock_model():
    stock = DetectionModel("fewshot.yaml", nc=4, verbose=False)
    assert type(stock.model[-1]).__name__ == "Detect"


def test_stock_weights_transfer_all_but_the_class_conv():
    torch.manual_seed(1)
    stock = DetectionModel("yolo11n.yaml", nc=80, verbose=False)  # 80 classes have wider stems than 4
    model = build(nc=4)
    model.load(stock, verbose=False)
    ours, theirs = model.state_dict(), stock.float().state_dict()
    missing = [k for k in theirs if k not in ours]
    assert sorted(missing) == sorted(f"model.23.cv3.{i}.2.{p}" for i in range(3) for p in ("weight", "bias"))
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs if k in ours)
    with torch.no_grad():
        assert model.eval()(torch.rand(1, 3, 64, 64))[0].shape == (1, 8, 84)


def test_dual_heads_transfer_both_branches():
    torch.manual_seed(1)
    stock = DetectionModel("yolo26n.yaml", nc=80, verbose=False)
    model = build("yolo26n-fewshot.yaml", nc=4)
    model.load(stock, verbose=False)
    ours, theirs = model.state_dict(), stock.state_dict()
    assert any("one2one_cv3" in k for k in ours)
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs if k in ours)


def test_prototypes_follow_their_class_by_name():
    source = build(nc=4, names=["cat", "dog", "bus", "car"], seed=1)
    source.model[-1].freeze_prototypes(list(range(4)))
    for names in (["car", "cat", "tree"], ["Dog ", "bus", "cat", "car"]):  # another count, another order
        model = build(nc=len(names), names=names, seed=2)
        before = model.model[-1].prototypes.weight.detach().clone()
        model.load(source, verbose=False)
        bank, src = model.model[-1].prototypes, source.model[-1].prototypes
        for i, name in enumerate(names):
            known = [n for n in source.names.values()]
            if name.strip().lower() in known:
                j = known.index(name.strip().lower())
                assert torch.equal(bank.weight[i], src.weight[j]) and torch.equal(bank.frozen[i], src.frozen[j])
            else:
                assert not bank.frozen[i].any() and bank.weight[i].norm().item() == pytest.approx(1)
                assert not any(torch.equal(bank.weight[i], w) for w in src.weight)
        assert not torch.equal(bank.weight, before)
        assert model.transferred == [i for i, n in enumerate(names) if n.strip().lower() in source.names.values()]
        assert torch.equal(bank.logit_scale, src.logit_scale)


def test_placeholder_names_transfer_by_index():
    source, model = build(nc=4, seed=1), build(nc=4, seed=2)
    model.load(source, verbose=False)
    assert torch.equal(model.model[-1].prototypes.weight, source.model[-1].prototypes.weight)


def test_the_wrapper_builds_saves_and_loads_few_shot_models(tmp_path):
    model = YOLO("fewshot.yaml")
    assert type(model.model) is FewShotDetectionModel and model.task == "detect"
    model.save(tmp_path / "a.pt")
    again = YOLO(tmp_path / "a.pt")
    assert type(again.model) is FewShotDetectionModel
    a, b = model.model.half().state_dict(), again.model.half().state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_segmentation_weights_load_what_fits():
    model = build(nc=4)
    model.load(SegmentationModel("yolo11n-seg.yaml", nc=80, verbose=False), verbose=False)
    with torch.no_grad():
        model.eval()(torch.rand(1, 3, 64, 64))


def test_criterion_is_ours_for_every_branch():
    from types import SimpleNamespace

    for cfg, dual in (("yolo11n-fewshot.yaml", False), ("yolo26n-fewshot.yaml", True)):
        model = build(cfg)
        model.args = SimpleNamespace(epochs=1)
        criterion = model.init_criterion()
        if dual:
            assert isinstance(criterion, E2ELoss)
            assert type(criterion.one2many) is type(criterion.one2one) is FewShotLoss
        else:
            assert type(criterion) is FewShotLoss


def test_models_can_be_copied():
    model = build()
    twin = copy.deepcopy(model)
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x)[0], twin.eval()(x)[0])
