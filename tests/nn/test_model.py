import copy
from types import SimpleNamespace

import pytest
import torch
from ultralytics import YOLO
from ultralytics.nn.modules.head import Detect
from ultralytics.nn.tasks import DetectionModel, SegmentationModel
from ultralytics.utils.loss import E2ELoss

from yolo_fewshot.nn.criterion import FewShotLoss
from yolo_fewshot.nn.head import FewShotDetect
from yolo_fewshot.nn.model import FewShotDetectionModel

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


def test_stock_ultralytics_parses_our_yaml_as_a_stock_model():
    stock = DetectionModel("fewshot.yaml", nc=4, verbose=False)
    assert type(stock.model[-1]).__name__ == "Detect"


def test_stock_weights_transfer_except_the_class_conv():
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
        prototypes, src = model.model[-1].prototypes, source.model[-1].prototypes
        for i, name in enumerate(names):
            known = [n for n in source.names.values()]
            if name.strip().lower() in known:
                j = known.index(name.strip().lower())
                assert torch.equal(prototypes.weight[i], src.weight[j]) and torch.equal(
                    prototypes.frozen[i], src.frozen[j]
                )
            else:
                assert not prototypes.frozen[i].any() and prototypes.weight[i].norm().item() == pytest.approx(1)
                assert not any(torch.equal(prototypes.weight[i], w) for w in src.weight)
        assert not torch.equal(prototypes.weight, before)
        assert model.transferred == [i for i, n in enumerate(names) if n.strip().lower() in source.names.values()]
        assert torch.equal(prototypes.logit_scale, src.logit_scale)


def test_nothing_of_other_classes_stays_where_no_name_is_shared():
    source = build(nc=2, names=["cat", "dog"], seed=1)
    for prototypes in source.model[-1].branch_prototypes:
        prototypes.gain[:], prototypes.offset[:], prototypes.frozen[:] = 3.0, -2.0, 1.0
    model = build(nc=2, names=["bolt", "nut"], seed=2)
    model.load(source, verbose=False)
    prototypes = model.model[-1].prototypes
    assert model.transferred == [] and prototypes.gain.tolist() == [1, 1] and prototypes.offset.tolist() == [0, 0]
    assert not prototypes.frozen.any()
    similar = torch.cosine_similarity(prototypes.weight[:, None], source.model[-1].prototypes.weight[None], dim=2)
    assert similar.abs().max() < 0.5


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


def test_every_branch_has_a_fewshot_loss():
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


def enrolled(cfg="yolo11n-fewshot.yaml", names=("cat", "dog", "bus", "car"), seed=1):
    """A model whose third class was enrolled by `fit`, and which has been trained on."""
    model = build(cfg, nc=len(names), names=list(names), seed=seed)
    model.args = SimpleNamespace(epochs=1, box=7.5, cls=0.5, dfl=1.5)
    model.criterion = model.init_criterion()
    model.criterion.last = torch.ones(1, requires_grad=True) * 2  # a result that cannot be copied
    generator = torch.Generator().manual_seed(seed)
    rows = [(torch.randn(128, generator=generator) * 2, torch.tensor(-1.5)) for _ in model.model[-1].branch_prototypes]
    model.model[-1].set_class(2, rows)
    model.enrolled = {"bus": {"shots": 5, "method": "fit", "conf": 0.3, "replaced": None}}
    model.prior_strength, model.memory = 3.0, [(torch.ones(2, 128).half(), torch.zeros(2), torch.zeros(2))]
    return model


@pytest.mark.parametrize("cfg", ["yolo11n-fewshot.yaml", "yolo26n-fewshot.yaml"])
def test_folding_and_fusing_do_not_modify_the_model(cfg):
    model = enrolled(cfg).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    parameters, criterion, yaml = dict(model.named_parameters()), model.criterion, copy.deepcopy(model.yaml)
    folded, fused = model.fold(), model.fuse(verbose=False)
    for other in (folded, fused):
        for x in other.parameters():
            x.data.fill_(7)
        other.names[0] = "horse"
        other.enrolled.clear()
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert type(model) is FewShotDetectionModel and type(model.model[-1]) is FewShotDetect and model.training
    assert {k: id(v) for k, v in parameters.items()} == {k: id(v) for k, v in model.named_parameters()}
    model.model[-1].fold()  # alone, without a copy of the model
    after = model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert model.criterion is criterion and model.yaml == yaml and model.names[0] == "cat" and "bus" in model.enrolled
    assert model.prior_strength == 3.0 and len(model.memory) == 1 and model.transferred == []


@pytest.mark.parametrize("cfg", ["yolo11n-fewshot.yaml", "yolo26n-fewshot.yaml"])
def test_a_model_can_be_trained_after_folding_it(cfg):
    model = enrolled(cfg).train()
    model.fold()
    outputs = model(torch.rand(2, 3, 64, 64))
    for preds in (outputs["one2many"], outputs["one2one"]) if "one2many" in outputs else (outputs,):
        (preds["scores"].mean() + preds["boxes"].mean() + model.model[-1].proj(preds["embeds"].mT).mean()).backward()
    dead = [k for k, v in model.named_parameters() if v.grad is None and "dfl" not in k]
    assert not dead


def test_a_folded_model_keeps_all_attributes_except_those_for_training():
    model = enrolled()
    model.task, model.pt_path = "detect", "best.pt"
    folded = model.fold()
    assert type(folded) is DetectionModel and type(folded.model[-1]) is Detect
    assert not {"criterion", "transferred", "prior_strength", "memory"} & set(vars(folded))
    for name in ("names", "args", "enrolled", "task", "pt_path", "save", "inplace"):
        assert getattr(folded, name) == getattr(model, name), name
    assert torch.equal(folded.stride, model.stride) and torch.equal(folded.model[-1].stride, model.stride)
    assert folded.yaml == {k: v for k, v in model.yaml.items() if k != "fewshot"}
    assert (folded.model[-1].f, folded.model[-1].i) == (model.model[-1].f, model.model[-1].i)
    for training in (True, False):
        assert {m.training for m in model.train(training).fold().modules() if not list(m.children())} == {training}


def test_a_folded_model_trains_and_fuses_like_a_stock_model():
    model = enrolled().eval()
    folded, x = model.fold(), torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)[0]
        fused = copy.deepcopy(folded).fuse(verbose=False)
        again = copy.deepcopy(fused).fuse(verbose=False)
        for other in (folded, fused, again, model.fuse(verbose=False)):
            torch.testing.assert_close(other(x)[0], expected, rtol=1e-4, atol=1e-4)
    assert fused.is_fused() and type(fused.model[-1]) is Detect
    folded.args = SimpleNamespace(epochs=1, box=7.5, cls=0.5, dfl=1.5, tal_topk=10)
    assert type(folded.init_criterion()).__module__ == "ultralytics.utils.loss"
    folded.train()(x)["scores"].mean().backward()
    assert folded.model[-1].cv3[0][-1].weight.grad.abs().sum() > 0


def test_a_model_without_a_criterion_folds_too():
    model = build()
    assert not hasattr(model, "criterion")
    assert type(model.fold()) is DetectionModel
    model.criterion = None
    assert type(model.fold()) is DetectionModel


@pytest.mark.parametrize("cfg", ["yolo11n-fewshot.yaml", "yolo26n-fewshot.yaml"])
def test_gain_and_offset_of_fitted_classes_transfer_by_name(cfg):
    source = enrolled(cfg)
    for names in (["bus", "tree", "cat"], ["cat", "Bus ", "dog", "tree"]):  # another count; the same, in another order
        model = build(cfg, nc=len(names), names=names, seed=2)
        for prototypes in model.model[-1].branch_prototypes:  # what must not stay
            prototypes.gain.fill_(9)
            prototypes.offset.fill_(9)
        model.load(source, verbose=False)
        for prototypes, src in zip(model.model[-1].branch_prototypes, source.model[-1].branch_prototypes):
            assert src.gain[2] > 2 and src.offset[2] == -1.5
            for i, name in enumerate(names):
                j = {"cat": 0, "dog": 1, "bus": 2}.get(name.strip().lower())
                gain, offset = (1, 0) if j is None else (src.gain[j], src.offset[j])
                assert prototypes.gain[i] == gain and prototypes.offset[i] == offset
                if j is not None:
                    for level in range(3):
                        for a, b in zip(prototypes.rows(level), src.rows(level)):
                            torch.testing.assert_close(a[i], b[j])


def test_fitted_classes_keep_gain_and_offset_in_a_checkpoint(tmp_path):
    wrapper = YOLO("fewshot.yaml")
    wrapper.model.model[-1].set_class(80, [(torch.full((128,), 0.3), torch.tensor(-1.2345678))])
    wrapper.model.names[80] = "scooter"
    wrapper.save(tmp_path / "a.pt")
    prototypes, again = wrapper.model.model[-1].prototypes, YOLO(tmp_path / "a.pt").model.model[-1].prototypes
    assert torch.equal(prototypes.gain, again.gain) and torch.equal(
        prototypes.offset, again.offset
    )  # float32, not rounded to half
    assert torch.equal(prototypes.weight, again.weight)


def test_prototypes_of_repeated_names_follow_their_index():
    source, model = build(nc=3, names=["a", "b", "a"]), build(nc=4, names=["a", "b", "a", "c"], seed=1)
    model.load(source, verbose=False)
    assert model.transferred == [0, 1, 2]
    assert torch.equal(model.model[-1].prototypes.weight[:3], source.model[-1].prototypes.weight)
