import copy
import math
from types import SimpleNamespace

import pytest
import torch
from test_criterion import GAINS, NC, make
from ultralytics.utils.loss import v8DetectionLoss

from yolo_fewshot import args as table
from yolo_fewshot.nn.criterion import FewShotLoss, branch_losses
from yolo_fewshot.train.monitor import REMEDIES, LossMonitor, report

pytestmark = pytest.mark.oldest

NAN, INF = float("nan"), float("inf")
NAMES = ["box", "cls", "dfl", "epi", "sup", "cpe", "tri"]
OFF = torch.amp.GradScaler("cpu", enabled=False)


def scaler(scale):
    return SimpleNamespace(get_scale=lambda: scale)


def step(model, batch, monitor=None, seed=1, scaler=OFF):
    torch.manual_seed(seed)
    if monitor is not None:
        monitor.begin_batch(model, scaler)
    return model(batch)


def plain_norms(model, batch, seed=1):
    """Norm of the gradient of every term at the neck's output, from the loss of the first branch alone."""
    torch.manual_seed(seed)
    maps = []  # cut off, for the gradient at a map must not count what reaches it through maps computed from it
    handle = model.model[-1].register_forward_pre_hook(
        lambda _, x: maps.extend(f.detach().requires_grad_() for f in x[0]) or (maps,)
    )
    preds = model(batch["img"])
    handle.remove()
    terms = FewShotLoss(model)(preds.get("one2many", preds), batch)[0] / len(batch["img"])
    norms = []
    for term in terms:
        grads = torch.autograd.grad(term, maps, retain_graph=True)
        norms.append(math.sqrt(sum(float(g.double().square().sum()) for g in grads)))
    return norms


def hooks_of(model):
    return [h for m in model.modules() for h in (*m._forward_pre_hooks, *m._forward_hooks)]


@pytest.mark.parametrize("cfg", ["yolo11n-fewshot.yaml", "yolo26n-fewshot.yaml"])
@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_norms_are_those_of_plain_autograd(batch, cfg, scale):
    model = make(cfg, cpe_iou=0.0)
    expected = plain_norms(model, batch)
    monitor = LossMonitor(1)
    step(model, batch, monitor, scaler=scaler(scale))
    assert all(v > 0 for v in expected)
    assert monitor.norms[0].tolist() == pytest.approx(expected, rel=1e-3)
    assert monitor.terms == [n if n != "dfl" or "11" in cfg else "l1" for n in NAMES]
    columns = monitor.columns()
    assert [columns[f"grad/{t}"] for t in monitor.terms] == pytest.approx(expected, rel=1e-3)
    assert [columns[f"share/{t}"] for t in monitor.terms] == pytest.approx(
        [v / sum(expected) for v in expected], rel=1e-3
    )


def test_stage_one_is_measured_too(batch):
    model = make(stage=1)
    monitor, expected = LossMonitor(1), plain_norms(model, batch)
    step(model, batch, monitor)
    assert monitor.terms == NAMES[:3] and monitor.norms[0].tolist() == pytest.approx(expected, rel=1e-3)
    assert monitor.columns()["chance/dfl"] == pytest.approx(0.15 * math.log(16), rel=1e-4)


@pytest.mark.parametrize("cfg", ["yolo11n-fewshot.yaml", "yolo26n-fewshot.yaml"])
def test_chance_levels_are_those_of_the_branch_whose_terms_are_logged(batch, cfg):
    model = make(cfg, cpe_iou=0.0)
    monitor = LossMonitor(1)
    torch.manual_seed(1)
    monitor.begin_batch(model, OFF)
    preds = model(batch["img"])
    loss, preds = branch_losses(model)[-1], preds.get("one2one", preds)
    keep = []
    loss.observers.insert(0, lambda *_: keep.append(torch.get_rng_state()))
    model.criterion(model(batch["img"]), batch)
    this = loss.begin(preds, batch)
    loss.terms(this)
    torch.set_rng_state(keep[0])
    expected = loss.chance(this)
    torch.testing.assert_close(monitor.chance[0], expected)
    assert [monitor.columns()[f"chance/{t}"] for t in monitor.terms] == pytest.approx(expected.tolist(), rel=1e-4)


@pytest.mark.parametrize("every", [1, 2, 3])
def test_the_first_batch_of_an_epoch_and_every_so_many_later_are_measured(batch, every):
    model, monitor = make(), LossMonitor(every)
    for _ in range(2):
        monitor.reset()
        measured = []
        for i in range(5):
            before = len(monitor.norms), len(monitor.chance)
            step(model, batch, monitor)
            after = len(monitor.norms), len(monitor.chance)
            measured += [i] if after == (before[0] + 1, before[1] + 1) else []
            assert after[0] == after[1] and all(x.observers == [] for x in branch_losses(model))
            assert hooks_of(model) == []
        assert measured == list(range(0, 5, every))


@pytest.mark.parametrize("cfg", ["yolo11n-fewshot.yaml", "yolo26n-fewshot.yaml"])
def test_the_next_episode_that_is_not_turned_is_measured(batch, cfg):
    model, monitor = make(cfg, cpe_iou=0.0, turned=0.5), LossMonitor(3)
    turned = {**batch, "turned": True}
    for given, measured in ((turned, 0), (turned, 0), (batch, 1), (turned, 1), (batch, 2), (batch, 2)):
        step(model, given, monitor)
        assert len(monitor.norms) == len(monitor.chance) == measured
    columns = monitor.columns()
    assert columns["chance/cls"] > 0 and columns["grad/cls"] > 0 and hooks_of(model) == []
    monitor.reset()
    step(model, turned, monitor)
    assert set(monitor.columns()) == set(columns) and not any(monitor.columns().values())


def test_turned_episodes_are_measured_if_there_are_no_others(batch):
    model, monitor = make(cpe_iou=0.0, turned=1.0), LossMonitor(1)
    step(model, {**batch, "turned": True}, monitor)
    columns = monitor.columns()
    assert columns["chance/cls"] == columns["grad/cls"] == 0 < min(columns["chance/epi"], columns["grad/epi"])


def freeze(model, head):
    for name, p in model.model.named_parameters():
        p.requires_grad = p.requires_grad and not head and name.startswith("23.")


@pytest.mark.parametrize("head", [True, False])
def test_a_frozen_network_is_measured_at_the_inputs_of_its_head(batch, head):
    model = make(cpe_iou=0.0)
    seen = []
    handle = model.model[-1].register_forward_pre_hook(
        lambda _, x: seen.append([f.detach().requires_grad_() for f in x[0]]) or (seen[-1],)
    )
    terms = step(model, batch)[0] / len(batch["img"])
    handle.remove()
    grads = [torch.autograd.grad(t, seen[0], retain_graph=True) for t in terms]
    expected = [math.sqrt(sum(float(g.double().square().sum()) for g in gs)) for gs in grads]
    freeze(model, head)
    monitor = LossMonitor(1)
    loss, _ = step(model, batch, monitor)
    assert all(v > 0 for v in expected) and monitor.norms[0].tolist() == pytest.approx(expected, rel=1e-3)
    loss.sum().backward()
    assert all(p.requires_grad for p in model.parameters() if p.grad is not None)
    assert hooks_of(model) == []
    assert step(model, batch)[0].requires_grad is not head  # later batches are as frozen as before


def test_norms_do_not_depend_on_what_is_frozen(batch):
    monitor = LossMonitor(1)
    for frozen in (False, True):
        model = make(cpe_iou=0.0)
        if frozen:
            freeze(model, head=False)
        step(model, batch, monitor)
    torch.testing.assert_close(*monitor.norms, rtol=1e-3, atol=0)


def test_without_measurements_there_are_no_columns(batch):
    model, monitor = make(), LossMonitor(0)
    step(model, batch, monitor)
    assert monitor.columns() == {} and monitor.norms == monitor.chance == [] and hooks_of(model) == []


@pytest.mark.parametrize(
    ("cfg", "stage"), [("yolo11n-fewshot.yaml", 1), ("yolo11n-fewshot.yaml", 2), ("yolo26n-fewshot.yaml", 2)]
)
def test_training_is_the_same_bit_for_bit_with_and_without_measurements(batch, cfg, stage):
    more = {"cpe_iou": 0.0, "dfl_side_max": 2.0} if stage == 2 else {}
    bare, measured = (make(cfg, stage=stage, **more) for _ in range(2))
    monitor = LossMonitor(1)
    a, b = [], []
    for model, who, seen in ((bare, None, a), (measured, monitor, b)):
        torch.manual_seed(3)
        for _ in range(2):  # the second batch has the random state that the first one leaves
            if who:
                who.begin_batch(model, OFF)
            model.zero_grad()
            loss, items = model(batch)
            loss.sum().backward()
            counts = [x.clamped_dfl.side_clamped for x in branch_losses(model) if x.clamped_dfl]
            seen += [loss.detach(), *items.values(), *counts, torch.get_rng_state()]
            seen += [p.grad.clone() for p in model.parameters() if p.grad is not None]
            seen += [x.clone() for x in model.buffers()]
    assert len(monitor.norms) == 2 and len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))
    assert stage == 1 or "26" in cfg or int(a[8]) > 0  # sides were clamped


def test_terms_in_float32_are_measured_in_float32_under_amp(batch):
    """SupCon is computed in float32, and its gradient at the embeddings is far inside the range of float16."""
    keep = [0, 2, 3, 4]  # one object in each of four images
    small = {
        "img": batch["img"][:4], "cls": torch.tensor([[0.0], [1.0], [0.0], [1.0]]), "bboxes": batch["bboxes"][keep],
        "batch_idx": torch.arange(4.0), "support": batch["support"][:4], "way": torch.tensor([0, 1, 0, 1]),
    }  # fmt: skip
    model = make(supcon_tau=0.05)
    loss = branch_losses(model)[0]
    with torch.autocast("cpu", dtype=torch.float16):
        preds = model(small["img"])
        this = loss.begin(preds, small)
        loss.terms(this)
        part = loss.parts(this)["sup_loss"]
    grads = torch.autograd.grad(part * 65536.0, preds["feats"])
    expected = torch.nn.utils.get_total_norm([g.float() / 65536 for g in grads]).item()
    assert math.isfinite(expected)
    monitor = LossMonitor(1)
    monitor.begin_batch(model, scaler(65536.0))
    with torch.autocast("cpu", dtype=torch.float16):
        model(small)
    assert monitor.norms[0][4].item() == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("cfg", ["yolo11n-fewshot.yaml", "yolo26n-fewshot.yaml"])
def test_a_batch_that_failed_before_its_loss_is_measured_when_it_is_tried_again(batch, cfg):
    """Ultralytics starts the first epoch again with smaller batches when memory runs out."""
    model, monitor = make(cfg), LossMonitor(1)
    layer = model.model[3]
    handle = layer.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory")))
    with pytest.raises(RuntimeError, match="out of memory"):
        step(model, batch, monitor)
    handle.remove()
    monitor.reset()
    step(model, batch, monitor)
    assert len(monitor.norms) == len(monitor.chance) == 1
    assert hooks_of(model) == [] and all(x.observers == [] for x in branch_losses(model))


def measured(norms, chance, terms=("box", "cls")):
    monitor = LossMonitor(1)
    monitor.terms, monitor.norms, monitor.chance = (
        list(terms),
        [*map(torch.tensor, norms)],
        [*map(torch.tensor, chance)],
    )
    return monitor.columns()


def test_columns_are_means_over_the_measurements_of_the_epoch():
    assert measured([[1.0, 2.0], [2.0, 7.0]], [[4.0, 1.0], [5.0, 2.0]]) == {
        "grad/box": 1.5, "grad/cls": 4.5, "share/box": 0.25, "share/cls": 0.75, "chance/box": 4.5, "chance/cls": 1.5,
    }  # fmt: skip


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_measurement_that_is_not_finite_is_left_out(bad):
    good = [1.0, 3.0], [4.0, 2.0]
    expected = measured([good[0]], [good[1]])
    assert measured([good[0], [9.0, bad]], [good[1], [9.0, 9.0]]) == expected
    assert measured([[9.0, 9.0], good[0]], [[bad, 9.0], good[1]]) == expected
    assert measured([[bad, 1.0]], [[1.0, 1.0]]) == dict.fromkeys(expected, 0.0)
    assert measured([[0.0, 0.0]], [[0.0, 0.0]]) == dict.fromkeys(expected, 0.0)  # no gradient at all
    assert measured([], []) == dict.fromkeys(expected, 0.0)


def test_the_names_of_the_columns_keep_out_of_ultralytics_results_png(batch):
    monitor = LossMonitor(1)
    step(make(cpe_iou=0.0), batch, monitor)
    columns = monitor.columns()
    assert list(columns) == [f"{k}/{t}" for k in ("grad", "share", "chance") for t in NAMES]
    assert not any("loss" in k or "metric" in k for k in columns)
    assert sum(columns[f"share/{t}"] for t in NAMES) == pytest.approx(1, abs=1e-4)
    assert all(type(v) is float for v in columns.values())
    monitor.reset()
    assert set(monitor.columns().values()) == {0.0}


def row(shares=(0.4, 0.35, 0.25), values=(1.0, 1.0, 1.0), chance=(2.0, 2.0, 2.0), steps=100, **counts):
    terms = ("box", "epi", "sup")
    counts = dict.fromkeys(("clipped", "skipped", "overflows", "sides_clamped", "means_clamped"), 0) | counts
    counts["steps"] = steps
    return {
        **{f"share/{t}": v for t, v in zip(terms, shares)},
        **{f"chance/{t}": v for t, v in zip(terms, chance)},
        **{f"train/{t}_loss": v for t, v in zip(terms, values)},
        **{f"train/{k}": float(v) for k, v in counts.items()},
    }


def reported(*rows, **settings):
    args = {**table.resolve({"stage": 2, **GAINS}), "box": 7.5, "cls": 0.5, **settings}
    return report(list(rows), SimpleNamespace(**args))


def test_without_measurements_the_report_is_empty():
    assert reported() == "" and reported({"train/box_loss": 1.0, "train/clipped": 0.0}) == ""


def test_the_report_of_a_run_without_problems():
    assert reported(row(), row()) == (
        "Gradient at the neck by term: box 40%, epi 35%, sup 25%. No term is at chance. Of 200 steps, 0 were clipped, "
        "0 skipped for an AMP overflow and 0 skipped for a NaN or Inf."
    )


def test_terms_that_are_off_are_not_reported():
    assert "by term: box 50%, epi 50%. No term" in reported(row((0.5, 0.5, 0.0)), supcon=0.0)


@pytest.mark.parametrize(
    ("shares", "words"),
    [
        ((0.5, 0.3, 0.2), None),
        ((0.51, 0.29, 0.2), "box dominates; lower box=7.5 if it should not."),
        ((0.1, 0.6, 0.3), "epi dominates; lower cls=0.5 if it should not."),
        ((0.1, 0.1, 0.8), "sup dominates; lower supcon=1.2 if it should not."),
    ],
)
def test_a_term_with_more_than_half_of_the_gradient_dominates(shares, words):
    text = reported(row((0.9, 0.05, 0.05)), row(shares))  # the last epoch counts
    assert words in text if words else "dominates" not in text
    order = sorted(zip(shares, ("box", "epi", "sup")), key=lambda x: -x[0])
    assert text.startswith("Gradient at the neck by term: " + ", ".join(f"{t} {v:.0%}" for v, t in order))


def test_a_term_at_its_chance_level_is_named_with_a_remedy():
    text = reported(row(values=(9.0, 9.0, 9.0)), row(values=(1.89, 1.9, 2.5)))
    assert "box is at" not in text and "No term is at chance" not in text
    assert f"epi is at chance (1.9, chance 2): {REMEDIES['epi']}." in text
    assert f"sup is at chance (2.5, chance 2): {REMEDIES['sup']}." in text
    assert "No term is at chance." in reported(row(values=(9.0, 9.0, 9.0)), row(values=(1.89, 1.89, 1.89)))
    assert "No term is at chance." in reported(
        row(values=(0.0, 1.0, 1.0), chance=(0.0, 2.0, 2.0))
    )  # off or not measured


def test_every_term_has_a_remedy_and_a_key():
    args = SimpleNamespace(
        **table.resolve({"stage": 2, **GAINS}) | {"teacher": 1, "memory": 1}, box=7.5, cls=0.5, dfl=0.15
    )
    for term in (*NAMES, "l1", "tea", "mem"):
        only = {f"share/{term}": 1.0, f"chance/{term}": 1.0, f"train/{term}_loss": 1.0}
        for args.stage, first in ((2, "train stage 1 first"), (3, "train longer")):
            text = report([{**row(), **only}], args)
            remedy = REMEDIES[term].replace("{first}", first)
            assert f"{term} dominates" in text and f"{term} is at chance (1, chance 1): {remedy}." in text


def test_steps_are_summed_over_the_epochs():
    text = reported(row(steps=50, clipped=3, overflows=1, skipped=2), row(steps=50, clipped=4, overflows=1))
    assert "Of 100 steps, 7 were clipped, 2 skipped for an AMP overflow and 2 skipped for a NaN or Inf." in text
    assert "The warnings in the log name the cause and what to change." in text
    assert "warnings in the log" not in reported(row(clipped=3, overflows=1))


def test_clamps_are_reported_and_many_of_them_suggest_rescale():
    assert "clamped" not in reported(row())
    few = reported(row(means_clamped=1, sides_clamped=20), row(sides_clamped=3))
    assert "The DFL was clamped 1 times in its mean and on 23 sides." in few and "hard clamp" not in few
    assert "The DFL was clamped 0 times in its mean and on 3 sides." in reported(row(sides_clamped=3))
    assert "hard clamp" not in reported(row(means_clamped=1)) and "hard clamp" in reported(row(means_clamped=2))
    assert "set dfl_clamp_mode=rescale" in reported(row(means_clamped=2))
    assert "hard clamp" not in reported(row(means_clamped=90), dfl_clamp_mode="rescale")


def test_a_copy_of_a_model_in_training_is_not_measured(batch):
    """The moving average is copied from the model, and validated with a loss of its own."""
    model, monitor = make(), LossMonitor(1)
    average = copy.deepcopy(model)
    monitor.begin_batch(model, OFF)
    average.eval()(batch["img"])
    assert monitor.norms == monitor.chance == []
    model(batch)
    assert len(monitor.norms) == len(monitor.chance) == 1 and len(model.names) == NC


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("cfg", ["yolo11n-fewshot.yaml", "yolo26n-fewshot.yaml"])
def test_a_batch_to_which_no_anchor_is_assigned_is_measured(batch, cfg, stage, old, monkeypatch):
    original = v8DetectionLoss.get_assigned_targets_and_loss

    def as_of_8_4_144(self, *args, **kwargs):  # which asks for no loss of no boxes
        asked, self.bbox_loss = self.bbox_loss, lambda x, *more: (x[..., :0].sum(), 0.0)
        try:
            return original(self, *args, **kwargs)
        finally:
            self.bbox_loss = asked

    if old:
        monkeypatch.setattr(v8DetectionLoss, "get_assigned_targets_and_loss", as_of_8_4_144)
    model, monitor = make(cfg, stage=stage), LossMonitor(1)
    batch = {**batch, "cls": torch.zeros(0, 1), "bboxes": torch.zeros(0, 4), "batch_idx": torch.zeros(0)}
    loss = step(model, batch, monitor)[0]
    loss.sum().backward()
    columns = monitor.columns()
    box = [columns[f"{k}/{t}"] for k in ("grad", "share") for t in monitor.terms if t in {"box", "dfl", "l1"}]
    assert box == [0, 0, 0, 0] and columns["grad/cls"] > 0 and columns["share/cls"] == 1
