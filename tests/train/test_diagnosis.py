import copy
from contextlib import nullcontext

import pytest
import torch
from test_criterion import B, make, term_of
from ultralytics.cfg import get_cfg
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import DEFAULT_CFG

from yolo_fewshot.nn.criterion import Retention, branch_losses, gain_of
from yolo_fewshot.nn.terms import EPISODE_TERMS
from yolo_fewshot.train.diagnosis import Diagnosis, describe_batch, describe_gradients, diagnose

NAN, INF = float("nan"), float("inf")
NAMES = dict(enumerate(["ant", "bee", "cat", "dog", "elk", "fox"]))
FILES = [f"{i}.png" for i in range(B)]
STOCK_TERMS = ("box_loss", "cls_loss", "dfl_loss")


@pytest.fixture
def batch(batch):
    return {k: v.clone() for k, v in batch.items()} | {"im_file": list(FILES)}


@pytest.fixture(scope="module")
def untouched():
    return make(cpe_iou=0.0)  # an untrained model's boxes fit no object


@pytest.fixture
def model(untouched):
    return copy.deepcopy(untouched)


def ask(model, batch, autocast=nullcontext, float16=False, scaled=False):
    return diagnose(model, batch, NAMES, autocast, float16, scaled)


def nothing(*tensors):
    """Zero, whose gradient with respect to the tensors is NaN."""
    return sum((x.float().sum() * 0).sqrt() for x in tensors)


def test_non_finite_weights_are_named_before_other_causes(model, batch):
    """A weight that is not finite makes all else not finite, so nothing else is blamed."""
    with torch.no_grad():
        model.model[4].cv1.conv.weight[0, 0] = NAN
        model.model[2].cv1.bn.bias[1] = -INF
    batch["img"][2, 0, 3, 4] = NAN
    found = ask(model, batch, scaled=True)
    assert found.cause == "the weights of model.2.cv1.bn.bias, model.4.cv1.conv.weight are not finite"
    assert found.certain and not found.overflow and "lr0" in found.advice
    assert set(found.terms) == {*STOCK_TERMS, *EPISODE_TERMS}


@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_bad_image_is_named(model, batch, bad):
    batch["img"][4, 2, 3, 5] = bad
    found = ask(model, batch, scaled=True)
    assert found.cause == "pixels of 4.png are not finite" and found.certain and not found.overflow


@pytest.mark.parametrize("bad", [NAN, INF, 2.5, -2.5])
@pytest.mark.parametrize("column", [0, 3])
def test_a_bad_label_is_named(model, batch, bad, column):
    batch["bboxes"][1, column] = bad  # the second object, that of the first image
    batch["bboxes"][4, column] = bad  # that of the fourth
    found = ask(model, batch)
    assert found.cause == "labels of 0.png, 3.png are not finite or lie far outside the image"
    assert found.certain and "yolo-fewshot doctor" in found.advice


def test_a_label_that_an_augmentation_moved_is_no_bad_label(model, batch):
    batch["bboxes"][0, 0], batch["bboxes"][1, 2] = -0.5, 2.0
    assert not ask(model, batch).certain


WITHOUT = "Set {} to train without, or a smaller lr0."
SMALLER = "Set a smaller lr0 or grad_clip."
TERMS = {
    "box_loss": SMALLER,
    "cls_loss": SMALLER,
    "dfl_loss": SMALLER,
    "epi_loss": SMALLER,  # cls=0 would turn off the class loss, too
    "sup_loss": WITHOUT.format("supcon=0"),
    "cpe_loss": WITHOUT.format("cpe=0"),
    "tri_loss": WITHOUT.format("triplet=0"),
}


def spoil(loss, term, monkeypatch, spoilt):
    """Give one term the value of `spoilt`, a function of what it is computed from."""
    if term == "box_loss":
        monkeypatch.setattr("ultralytics.utils.loss.bbox_iou", lambda a, b, **_: a[:, :1] * 0 + spoilt(a))
    elif term == "cls_loss":
        monkeypatch.setattr(loss, "bce", lambda scores, targets: spoilt(scores))
    elif term == "dfl_loss":
        monkeypatch.setattr(loss.clamped_dfl, "per_anchor", lambda dist, target: spoilt(dist).expand(len(target), 1))
    else:
        monkeypatch.setattr(term_of(loss, term), "forward", lambda episode: spoilt(episode.preds["embeds"]))


@pytest.mark.parametrize("term", TERMS)
def test_only_the_term_with_a_bad_gradient_is_named(model, batch, monkeypatch, term):
    spoil(branch_losses(model)[0], term, monkeypatch, nothing)
    found = ask(model, batch, scaled=True)
    assert found.terms == [term] and found.certain and not found.overflow
    assert found.cause == f"{term} is not finite for finite predictions"
    assert found.advice == TERMS[term]


@pytest.mark.parametrize("term", [*STOCK_TERMS, "sup_loss", "cpe_loss", "tri_loss"])
def test_a_gain_of_zero_is_advised_where_it_makes_the_gradient_finite(model, batch, monkeypatch, term):
    loss = branch_losses(model)[0]
    spoil(loss, term, monkeypatch, nothing)
    advised = "to train without" in ask(model, batch).advice
    monkeypatch.setattr(loss.hyp, gain_of(term, loss.hyp)[0], 0.0)
    assert (ask(model, batch).terms == []) == advised == (term not in STOCK_TERMS)


@pytest.mark.parametrize(("term", "key"), [("tea_loss", "teacher"), ("mem_loss", "memory")])
def test_a_gain_of_zero_is_advised_for_a_term_of_stage_three(batch, monkeypatch, term, key):
    model = make(stage=3)
    loss = branch_losses(model)[0]
    loss.retention = Retention(
        0, torch.tensor([1]), torch.ones(2, 128), torch.tensor([0, 1]), torch.ones(2, len(NAMES))
    )

    def distillation(logits, targets, mass, mask=None):  # only the teacher's has a mask
        return logits.sum() * 0 + (INF if (mask is None) == (term == "mem_loss") else 0)

    monkeypatch.setattr(loss, "distillation", distillation)
    found = ask(model, batch)
    assert found.terms == [term] and found.advice == WITHOUT.format(f"{key}=0")
    monkeypatch.setattr(loss.hyp, key, 0.0)
    assert ask(model, batch).terms == []


def test_the_forward_of_a_custom_term_is_named(batch, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "custom_terms.py").write_text(
        "import math\n\nfrom yolo_fewshot import EpisodeTerm\n\n\n"
        "class Bad(EpisodeTerm):\n    name, gain = 'bad_loss', 1.0\n\n"
        "    def forward(self, episode):\n        return episode.objects.sum() * math.nan\n"
    )
    found = ask(make(cpe_iou=0.0, terms="custom_terms.Bad"), batch)
    assert found.terms == ["bad_loss"]
    assert found.advice == "Check the forward of bad_loss, or set a smaller lr0 or grad_clip."


def test_a_term_of_ultralytics_has_no_forward_to_check(batch, monkeypatch):
    model = DetectionModel("yolo11n.yaml", nc=len(NAMES), verbose=False)
    model.args = get_cfg(DEFAULT_CFG)
    model.criterion = model.init_criterion()
    monkeypatch.setattr(model.criterion, "bce", lambda scores, targets: nothing(scores) + scores * INF)
    found = ask(model, batch)
    assert found.terms == ["cls_loss"] and found.advice == SMALLER


def test_terms_with_a_bad_value_are_named(model, batch, monkeypatch):
    loss = branch_losses(model)[0]
    spoil(loss, "sup_loss", monkeypatch, lambda z: z.sum() * 0 + INF)
    spoil(loss, "tri_loss", monkeypatch, lambda z: torch.tensor(NAN))  # one that has no gradient at all
    found = ask(model, batch)
    assert found.terms == ["sup_loss", "tri_loss"]
    assert found.cause == "sup_loss, tri_loss are not finite for finite predictions"
    assert found.advice == WITHOUT.format("supcon=0, triplet=0")
    spoil(loss, "box_loss", monkeypatch, nothing)
    assert ask(model, batch).advice == SMALLER  # turning off the others is not enough


@pytest.mark.parametrize("branch", [0, 1])
def test_terms_of_both_branches_of_a_dual_head_are_checked(batch, monkeypatch, branch):
    model = make("yolo26n-fewshot.yaml", cpe_iou=0.0)
    spoil(branch_losses(model)[branch], "tri_loss", monkeypatch, nothing)
    found = ask(model, batch)
    assert found.terms == ["tri_loss"]
    spoil(branch_losses(model)[1 - branch], "tri_loss", monkeypatch, nothing)
    assert ask(model, batch).terms == ["tri_loss"]  # once


def test_terms_of_stage_one_are_checked(batch, monkeypatch):
    model = make(stage=1)
    spoil(branch_losses(model)[0], "cls_loss", monkeypatch, nothing)
    assert ask(model, batch).terms == ["cls_loss"]


@pytest.mark.parametrize("index", [0, 6, 23])
def test_the_first_layer_with_a_bad_output_is_named(model, batch, index):
    def spoilt(layer, inputs, output):
        if not isinstance(output, dict):
            return output.index_fill(0, torch.tensor(0), INF)
        return {**output, "scores": output["scores"] * NAN}

    kind = type(model.model[index]).__name__
    model.model[index].register_forward_hook(spoilt)
    found = ask(model, batch, scaled=True)
    assert found.cause == f"the output of layer model.{index} ({kind}) is not finite"
    assert found.certain and not found.overflow and "lr0" in found.advice and "grad_clip" in found.advice


def test_a_gradient_that_overflows_between_the_layers_is_not_blamed_on_a_term(model, batch):
    model.model[5].register_forward_hook(lambda *a: a[-1].register_hook(lambda g: g * INF) and None)
    found = ask(model, batch, scaled=True)
    assert found.cause == "the gradient overflows on its way through the network" and found.certain
    assert found.terms == [] and not found.overflow


def test_a_batch_that_is_finite_when_run_again_is_the_scale_of_amp_or_unknown(model, batch):
    found = ask(model, batch, float16=True, scaled=True)
    assert found.overflow and not found.certain and "scale of AMP" in found.cause and found.terms == []
    for float16 in (True, False):
        found = ask(model, batch, float16=float16)
        assert not found.overflow and not found.certain and found.cause.startswith("unknown") and found.terms == []


def half():
    return torch.autocast("cpu", dtype=torch.float16)


def test_an_overflow_of_float16_alone_is_named_as_such(model, batch):
    def hot(layer, inputs, output):
        return (output.float() + 1e5).to(output.dtype) if torch.is_autocast_enabled("cpu") else output

    kind = type(model.model[6]).__name__
    handle = model.model[6].register_forward_hook(hot)
    found = ask(model, batch, half, float16=True, scaled=True)
    assert found.cause == f"float16 cannot hold what layer model.6 ({kind}) computes"
    assert "amp=bf16" in found.advice and found.certain and not found.overflow
    handle.remove()
    model.model[6].register_forward_hook(lambda *a: a[-1] * INF)
    found = ask(model, batch, half, float16=True, scaled=True)
    assert found.cause == f"the output of layer model.6 ({kind}) is not finite" and "amp" not in found.advice


def test_a_loss_that_only_float16_cannot_hold(model, batch, monkeypatch):
    def spoilt(z):
        return z.sum() * (INF if torch.is_autocast_enabled("cpu") else 0)

    spoil(branch_losses(model)[0], "cls_loss", monkeypatch, spoilt)
    found = ask(model, batch, half, float16=True)
    assert found.cause == "float16 cannot hold what the loss computes" and found.terms == ["cls_loss"]


def test_bfloat16_is_not_advised_to_use_bfloat16(model, batch):
    def hot(layer, inputs, output):
        return output * INF if torch.is_autocast_enabled("cpu") else output

    model.model[6].register_forward_hook(hot)
    found = ask(model, batch, lambda: torch.autocast("cpu", dtype=torch.bfloat16))
    assert "layer model.6" in found.cause and "lr0" in found.advice
    assert "amp=bf16" not in found.advice and "float16 cannot" not in found.cause


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory. Tried"), torch.OutOfMemoryError("Out of memory")])
def test_without_memory_to_run_the_batch_again_nothing_is_certain(model, batch, monkeypatch, error):
    def loss(*_):
        raise error

    monkeypatch.setattr(model, "loss", loss)
    found = ask(model, batch, float16=True, scaled=True)
    assert not found.certain and not found.overflow and "not enough memory" in found.cause and found.terms == []
    batch["img"][1] = NAN
    found = ask(model, batch, float16=True, scaled=True)  # this is seen without running it again
    assert found.certain and found.cause == "pixels of 1.png are not finite"


def state_of(model):
    grads = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    hooks = {k: (list(m._forward_hooks), list(m._forward_pre_hooks)) for k, m in model.named_modules()}
    losses = branch_losses(model)
    counts = [(int(x.clamped_dfl.side_clamped), int(x.clamped_dfl.mean_clamped)) for x in losses if x.clamped_dfl]
    return grads, hooks, counts, [list(x.observers) for x in losses], [x.assigner.current for x in losses]


@pytest.mark.parametrize("outcome", ["finite", "not finite", "no memory", "another error"])
def test_a_diagnosis_leaves_no_trace(batch, monkeypatch, outcome):
    model = make(cpe_iou=0.0, dfl_side_max=0.5)  # every side of every box is clamped
    model(batch)[0].sum().backward()
    model.model[3].conv.weight.grad[0, 0] = NAN
    model.model[0].conv.weight.grad = None
    loss = branch_losses(model)[0]
    loss.observers.append(watch := lambda *_: None)
    if outcome == "not finite":
        batch["img"][0] = NAN
    elif outcome != "finite":
        text = "out of memory" if outcome == "no memory" else "a bug"
        monkeypatch.setattr(term_of(loss, "tri_loss"), "forward", lambda *_: (_ for _ in ()).throw(RuntimeError(text)))
    grads, hooks, counts, watches, passes = state_of(model)
    assert counts[0][0] > 0 and watches == [[watch]] and passes == [None]
    random = torch.get_rng_state()
    if outcome == "another error":
        with pytest.raises(RuntimeError, match="a bug"):
            ask(model, batch)
    else:
        assert ask(model, batch).certain == (outcome == "not finite")
    assert torch.equal(torch.get_rng_state(), random)
    after = state_of(model)
    assert after[0].keys() == grads.keys() and "model.0.conv.weight" not in grads
    assert all(torch.equal(g.view(torch.int32), grads[k].view(torch.int32)) for k, g in after[0].items())
    assert after[1:] == (hooks, counts, watches, passes)


def test_the_first_gradient_that_is_not_finite_is_described_with_its_figures(model):
    assert describe_gradients(model) == "loss, statistics or norm of the gradient"  # none at all
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    assert describe_gradients(model) == "loss, statistics or norm of the gradient"
    model.model[2].cv1.bn.bias.grad[:4] = torch.tensor([-2.0, INF, 0, 0])
    model.model[3].conv.weight.grad[0] = NAN
    assert describe_gradients(model) == "gradient in model.2.cv1.bn.bias: min=-2, max=inf, mean=inf"


def test_an_episode_is_described_by_the_classes_it_was_drawn_for(batch):
    batch["way"] = torch.tensor([3, 1, 3, 1, 1, 3])
    assert describe_batch(batch, NAMES) == f"Episode of bee, dog: {', '.join(FILES)}."


def test_an_ordinary_batch_is_described_by_its_labels(batch):
    del batch["way"], batch["support"]
    assert describe_batch(batch, NAMES) == f"Batch of ant, bee, cat, dog: {', '.join(FILES)}."
    assert describe_batch(batch, {0: "ant", 2: "cat"}) == f"Batch of ant, 1, cat, 3: {', '.join(FILES)}."
    empty = {"cls": torch.zeros(0, 1), "im_file": ["a.png"]}
    assert describe_batch(empty, NAMES) == "Batch of no class: a.png."


def test_a_diagnosis_reads_as_sentences(model, batch, monkeypatch):
    text = str(Diagnosis("gradient in x: min=1", "Batch of ant: 0.png.", [], "this", "Do that."))
    assert text == "gradient in x: min=1. Batch of ant: 0.png. Likely cause: this. Do that."
    spoil(branch_losses(model)[0], "sup_loss", monkeypatch, nothing)
    text = str(ask(model, batch))
    assert "Loss terms not finite: sup_loss." in text and f"Episode of ant, bee: {', '.join(FILES)}." in text
    batch["img"][:] = NAN
    text = "pixels of 0.png, 1.png, 2.png, 3.png, 4.png and 1 more are not finite"
    assert ask(model, batch).cause == text
