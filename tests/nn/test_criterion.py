import gc
import math
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from ultralytics.utils.loss import BboxLoss, E2ELoss, v8DetectionLoss
from ultralytics.utils.metrics import bbox_iou

from yolo_fewshot import args as table
from yolo_fewshot.nn.criterion import RETENTION_TERMS, FewShotLoss, Retention, branch_losses, gain_of
from yolo_fewshot.nn.losses import SupConLoss, TripletLoss
from yolo_fewshot.nn.model import FewShotDetectionModel
from yolo_fewshot.nn.terms import EPISODE_TERMS, EpisodeTerm, balanced_sample

pytestmark = pytest.mark.oldest

NC, B = 6, 6


GAINS = {"supcon": 1.2, "cpe": 0.6, "triplet": 0.3}


def run_args(stage=2, **values):
    values = {**(GAINS if stage == 2 else {}), **values}
    defaults = table.resolve({"stage": stage, **values})
    return SimpleNamespace(**{"box": 7.5, "cls": 0.5, "dfl": 0.15, "epochs": 2, **defaults, **values})


def make(cfg="yolo11n-fewshot.yaml", **values):
    torch.manual_seed(0)
    model = FewShotDetectionModel(cfg, nc=NC, verbose=False)
    model.args = run_args(**values)
    return model.train()


def preds_of(model, batch):
    preds = model(batch["img"])
    return preds.get("one2many", preds)


def run(loss, preds, batch):
    """A pass of a loss, and its terms."""
    this = loss.begin(preds, batch)
    return this, loss.terms(this)


def term_of(loss, name):
    """One of the terms of an episode."""
    return next(t for t in loss.episode_terms if t.name == name)


def test_stage_one_equals_the_loss_of_ultralytics(batch):
    model = make(stage=1)
    preds = preds_of(model, batch)
    ours, theirs = FewShotLoss(model), v8DetectionLoss(model)
    a, b = ours(preds, batch), theirs(preds, batch)
    assert torch.equal(a[0], b[0]) and a[1].keys() == b[1].keys()


def test_stage_two_has_the_box_and_class_terms_of_ultralytics(batch):
    model = make()
    preds = preds_of(model, batch)
    ours, theirs = FewShotLoss(model)(preds, batch), v8DetectionLoss(model)(preds, batch)
    torch.testing.assert_close(ours[0][:2], theirs[0][:2])
    torch.testing.assert_close(ours[0][2], theirs[0][2] * 4)  # four sides summed instead of their mean
    assert tuple(ours[1]) == ("box_loss", "cls_loss", "dfl_loss", *EPISODE_TERMS)
    torch.testing.assert_close(torch.stack(list(ours[1].values())) * B, ours[0].detach())
    assert all(len(k) <= 10 for k in ours[1])  # what fits into a column of the progress bar


def test_names_are_the_same_with_and_without_an_episode(batch):
    model = make(cpe_iou=0.0)  # an untrained model's boxes fit no object
    criterion = FewShotLoss(model)
    episode = criterion(preds_of(model, batch), batch)[1]
    plain = {k: v for k, v in batch.items() if k not in {"support", "way"}}
    model.eval()
    with torch.no_grad():
        validation = criterion(model(batch["img"]), plain)[1]
    assert list(episode) == list(validation)
    assert all(episode[k] > 0 for k in EPISODE_TERMS) and not any(validation[k] for k in EPISODE_TERMS)


class OwnTerm(EpisodeTerm):
    name, gain = "own_loss", 2

    def forward(self, episode):
        self.episode = episode
        return episode.prototypes.square().sum()


def test_a_custom_term_is_added(batch):
    model = make()
    preds = preds_of(model, batch)
    ours = FewShotLoss(model)(preds, batch)
    model.args.terms = "test_criterion.OwnTerm"
    own = (criterion := FewShotLoss(model))(preds, batch)
    assert list(own[1]) == [*ours[1], "own_loss"]
    torch.testing.assert_close(own[0][:7], ours[0])
    episode = term_of(criterion, "own_loss").episode
    objects, y, prototypes, ways = episode[:4]
    assert episode.query.tolist() == [2, 3, 4, 5] and episode.args is model.args
    assert own[1]["own_loss"].item() == pytest.approx(2 * len(ways), abs=1e-4)  # the prototypes are unit vectors
    assert ways.tolist() == [0, 1, 2] and sorted(y.tolist()) == [0, 0, 0, 1, 1, 1, 2, 2, 3, 3]
    support = [(0, 0), (2, 0), (1, 1)]  # class and image of the objects in the support images
    order = [int(i) for i in batch["batch_idx"]]
    found = [o for o, i in zip(objects, order) if i < 2]
    for (c, _), embed in zip(support, found):  # one object each, so it is the prototype
        torch.testing.assert_close(prototypes[ways.tolist().index(c)], embed)
    plain = {k: v for k, v in batch.items() if k not in {"support", "way"}}
    assert criterion(preds, plain)[1]["own_loss"] == 0


def naive_terms(model, preds, batch, criterion):
    """Episode terms written with loops over images, objects, classes and anchors, from one fresh assignment."""
    h, head = model.args, model.model[-1]
    assigned = run(criterion, preds, batch)[0].assignment
    labels, _, scores, fg, gt_idx = assigned[:5]
    e = preds["embeds"].transpose(1, 2)
    objects = []  # (embedding, class, image)
    for b in range(B):
        for g in range(assigned.n_max):
            anchors = [a for a in range(e.shape[1]) if fg[b, a] and gt_idx[b, a] == g]
            if anchors:
                pooled = sum(max(float(scores[b, a].sum()), 1e-3) * e[b, a] for a in anchors)
                objects.append((pooled / pooled.norm(), int(labels[b, anchors[0]]), b))
    ways, prototypes = [], []
    for c in range(NC):
        shots = [z for z, y, b in objects if y == c and batch["support"][b]]
        if shots and (h.wide or any(c == int(w) for w in batch["way"])):
            mean = sum(shots) / len(shots)
            ways.append(c)
            prototypes.append(mean / mean.norm())
    level = [i for i, f in enumerate(preds["feats"]) for _ in range(f.shape[2] * f.shape[3])]
    total, norm = 0, 0
    for b in range(B):
        if not batch["support"][b]:
            for c, p in zip(ways, prototypes):
                branch = head.prototypes
                logits = torch.stack(
                    [branch.logit_scale[i] * (e[b, a] @ p) + branch.bias[i] for a, i in enumerate(level)]
                )
                total = total + F.binary_cross_entropy_with_logits(logits, scores[b, :, c], reduction="sum")
                norm += float(scores[b, :, c].sum())
    z = torch.stack([z for z, _, _ in objects])
    y = torch.tensor([y for _, y, _ in objects])
    views, view_labels = torch.cat([z, torch.stack(prototypes)]), torch.cat([y, torch.tensor(ways)])
    supcon = SupConLoss(h.supcon_tau)(head.proj(views), view_labels)
    frozen = head.prototypes.frozen
    triplet = TripletLoss(h.triplet_margin)(z, y, frozen if frozen.any() else None)
    return h.cls * total / max(norm, 1), h.supcon * supcon, h.triplet * triplet, ways


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_episode_terms_equal_a_naive_computation(batch, wide, frozen):
    model = make(wide=wide)
    with torch.no_grad():
        model.model[-1].prototypes.bias.add_(5)
        model.model[-1].prototypes.logit_scale.copy_(torch.tensor([0.5, 1.0, 1.5]))
    if frozen:
        model.model[-1].freeze_prototypes(list(range(NC)))
    criterion = FewShotLoss(model)
    preds = preds_of(model, batch)
    epi, supcon, triplet, ways = naive_terms(model, preds, batch, criterion)
    assert ways == ([0, 1, 2] if wide else [0, 1])  # class 3 is in query images only
    _, items = criterion(preds, batch)
    torch.testing.assert_close(items["epi_loss"], epi.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(items["sup_loss"], supcon.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(items["tri_loss"], triplet.detach(), rtol=1e-4, atol=1e-4)


def test_a_turned_episode_trains_no_base_row_and_compares_its_objects_with_each_other(batch):
    model = make(cpe_iou=0.0)
    model.model[-1].freeze_prototypes(list(range(NC)))
    preds = preds_of(model, batch)
    plain = FewShotLoss(model)(preds, batch)[1]
    loss, turned = FewShotLoss(model)(preds, {**batch, "turned": True})
    assert turned["cls_loss"] == 0 < plain["cls_loss"]
    same = {"box_loss", "dfl_loss", "epi_loss", "sup_loss"}
    assert {k: turned[k] for k in same} == {k: plain[k] for k in same}
    model.model[-1].prototypes.frozen.zero_()
    assert turned["tri_loss"] == FewShotLoss(model)(preds, batch)[1]["tri_loss"] != plain["tri_loss"]
    head = model.model[-1].prototypes
    rows = torch.autograd.grad(loss[1], head.weight, retain_graph=True, allow_unused=True)[0]
    assert rows is None or not rows.any()
    assert FewShotLoss(model)(preds, {**batch, "turned": False})[1]["cls_loss"] == plain["cls_loss"]


def test_query_logits_use_prototypes_of_other_images_only(batch):
    model = make()
    preds = preds_of(model, batch)
    criterion = FewShotLoss(model)
    this = run(criterion, preds, batch)[0]
    moved = {**preds, "embeds": preds["embeds"].detach().clone()}
    moved["embeds"][2:] += 100 * torch.randn_like(moved["embeds"][2:])  # query embeddings change, prototypes do not

    prototypes = [criterion.episode(this).prototypes]
    this.preds = moved
    prototypes.append(criterion.episode(this).prototypes)
    torch.testing.assert_close(*prototypes)


@pytest.mark.parametrize("cfg", ["yolo11n-fewshot.yaml", "yolov8n-fewshot.yaml", "yolo26n-fewshot.yaml"])
def test_gradients_are_finite_and_reach_every_part(batch, cfg):
    model = make(cfg, cpe_iou=0.0)
    model.model[-1].freeze_prototypes(list(range(NC)))
    loss, items = model(batch)
    loss.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    idle = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert all(".dfl." in n or n.endswith(".bias") or "cv2." in n for n in idle), (
        idle
    )  # no object is large enough for P5
    third = "l1_loss" if "26" in cfg else "dfl_loss"
    assert tuple(items) == ("box_loss", "cls_loss", third, *EPISODE_TERMS)


@pytest.mark.parametrize("cfg", ["yolo11n-fewshot.yaml", "yolo26n-fewshot.yaml"])
def test_batches_without_objects_or_without_support_are_finite(batch, cfg):
    model = make(cfg)
    empty = {**batch, "cls": torch.zeros(0, 1), "bboxes": torch.zeros(0, 4), "batch_idx": torch.zeros(0)}
    no_support = {**batch, "support": torch.zeros(B, dtype=torch.bool)}
    no_query = {**batch, "support": torch.ones(B, dtype=torch.bool)}
    for b in (empty, no_support, no_query):
        model.zero_grad()
        loss, items = model(b)
        loss.sum().backward()
        assert torch.isfinite(loss).all() and len(items) == 7
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_gains_scale_their_terms_and_zero_turns_them_off(batch):
    def items(**values):
        model = make(cpe_iou=0.0, **values)
        torch.manual_seed(1)
        return FewShotLoss(model)(preds_of(model, batch), batch)[1]

    base, other = items(), items(supcon=0.0, cpe=1.2, triplet=0.6)
    assert other["sup_loss"] == 0
    torch.testing.assert_close(other["cpe_loss"], 2 * base["cpe_loss"])
    torch.testing.assert_close(other["tri_loss"], 2 * base["tri_loss"])
    torch.testing.assert_close(other["epi_loss"], base["epi_loss"])


def test_the_dfl_of_an_untrained_model_is_four_ln_sixteen_and_is_clamped(batch):
    model = make(dfl=1.0)
    for box in model.model[-1].cv2:
        box[-1].weight.data.zero_()
        box[-1].bias.data.zero_()
    preds = preds_of(model, batch)
    uniform = FewShotLoss(model)(preds, batch)[1]["dfl_loss"]
    assert uniform.item() == pytest.approx(4 * math.log(16), rel=1e-4)
    model.args.dfl_mean_max = 2.0
    assert FewShotLoss(model)(preds, batch)[1]["dfl_loss"].item() == pytest.approx(2.0)
    model.args.dfl_mean_max, model.args.dfl_side_max = 15.0, 1.0
    assert FewShotLoss(model)(preds, batch)[1]["dfl_loss"].item() == pytest.approx(4.0)


def test_each_branch_of_a_dual_head_has_its_own_episode(batch):
    model = make("yolo26n-fewshot.yaml")
    criterion = model.init_criterion()
    assert isinstance(criterion, E2ELoss)
    preds = model(batch["img"])
    seen = []
    for name in ("one2many", "one2one"):
        seen.append(getattr(criterion, name).loss(preds[name], batch)[1]["epi_loss"])
    assert seen[0] != seen[1]


def test_terms_under_autocast_are_close_to_those_in_float32(batch):
    model = make()
    model.model[-1].prototypes.bias.data += 5
    full = FewShotLoss(model)(preds_of(model, batch), batch)[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, low = FewShotLoss(model)(preds_of(model, batch), batch)
    assert torch.isfinite(loss).all()
    for k in EPISODE_TERMS:
        assert low[k].dtype == torch.float32
    torch.testing.assert_close(low["sup_loss"], full["sup_loss"], rtol=0.1, atol=0.1)


def test_boxes_are_decoded_in_float32_under_autocast():
    """In bfloat16 an IoU of an exact box with itself would be down to 0.71 in an image of 640 px."""
    loss, centers = FewShotLoss(make()), torch.rand(50, 2, generator=torch.Generator().manual_seed(0)) * 80
    dist = torch.randn(1, 50, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    expected = loss.bbox_decode(centers.bfloat16().float(), dist.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        boxes = loss.bbox_decode(centers.bfloat16(), dist)
    assert boxes.dtype == torch.float32
    torch.testing.assert_close(boxes, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("cfg", ["yolo11n-fewshot.yaml", "yolo26n-fewshot.yaml"])
def test_channels_last_gives_the_same_loss_and_gradient(cfg, batch):
    found = []
    for memory_format in (torch.contiguous_format, torch.channels_last):  # the latter is Ultralytics' choice on CUDA
        model = make(cfg).to(memory_format=memory_format)
        torch.manual_seed(0)
        loss, items = model.loss({**batch, "img": batch["img"].to(memory_format=memory_format)})
        loss.sum().backward()
        grads = [p.grad for k, p in model.named_parameters() if "cv3" in k and p.grad is not None]
        found.append((torch.stack(list(items.values())), torch.stack([g.norm() for g in grads])))
    assert all(torch.isfinite(x).all() for row in found for x in row) and len(found[0][1]) > 10
    for plain, last in zip(*found):
        torch.testing.assert_close(plain, last, rtol=1e-3, atol=1e-4)


def test_balanced_sample_gives_classes_equal_shares():
    torch.manual_seed(0)
    labels = torch.tensor([0] * 500 + [1] * 20 + [2] * 5)[torch.randperm(525)]
    chosen = balanced_sample(labels, 60)
    counts = torch.bincount(labels[chosen]).tolist()
    assert counts == [35, 20, 5] and len(set(chosen.tolist())) == 60
    assert torch.equal(balanced_sample(labels[:10], 60), torch.arange(10))
    assert torch.bincount(labels[balanced_sample(labels, 9)]).tolist() == [3, 3, 3]


OUTPUTS = ("boxes", "scores", "embeds")
NO_OBJECTS = {"cls": torch.zeros(0, 1), "bboxes": torch.zeros(0, 4), "batch_idx": torch.zeros(0)}


def gradients(value, inputs):
    """Gradients, zero where there is no path."""
    grads = torch.autograd.grad(value, inputs, retain_graph=True, allow_unused=True) if value.requires_grad else ()
    grads = grads or [None] * len(inputs)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, grads)]


def branches(model, batch):
    """The losses of a model with the predictions of their branches."""
    preds = model(batch["img"])
    return list(zip(branch_losses(model), [preds["one2many"], preds["one2one"]] if "one2many" in preds else [preds]))


@pytest.mark.parametrize(
    ("cfg", "stage"), [("yolo11n-fewshot.yaml", 1), ("yolo11n-fewshot.yaml", 2), ("yolo26n-fewshot.yaml", 2)]
)
def test_parts_have_the_values_and_gradients_of_the_terms(batch, cfg, stage):
    model = make(cfg, stage=stage, **({"cpe_iou": 0.0} if stage == 2 else {}))
    for loss, preds in branches(model, batch):
        torch.manual_seed(2)
        this, terms = run(loss, preds, batch)
        parts = loss.parts(this)
        assert tuple(parts) == loss.loss_names and len(terms) == len(parts)
        inputs = [preds[k] for k in OUTPUTS if k in preds]
        for term, (name, part) in zip(terms, parts.items()):
            assert part.ndim == 0 and torch.equal(part, term), name
            expected, ours = gradients(term, inputs), gradients(part, inputs)
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-8)
            assert any(g.any() for g in ours), name


def test_parts_of_a_batch_without_an_episode_are_stock_terms_only(batch):
    model = make()
    plain = {k: v for k, v in batch.items() if k not in {"support", "way"}}
    loss, preds = branches(model, plain)[0]
    this, terms = run(loss, preds, plain)
    parts = loss.parts(this)
    assert tuple(parts) == ("box_loss", "cls_loss", "dfl_loss") and not terms[3:].any()
    assert torch.equal(torch.stack(list(parts.values())), terms[:3])


BAD = {
    "box_loss": lambda m, loss, bad: m.setattr("yolo_fewshot.nn.criterion.BboxLoss.forward", _bad_box(bad)),
    "cls_loss": lambda m, loss, bad: m.setattr(loss, "bce", lambda scores, _: bad(scores)),
    "dfl_loss": lambda m, loss, bad: m.setattr(
        loss.clamped_dfl, "per_anchor", lambda dist, target: bad(dist).expand(len(target), 1)
    ),
    **{t: lambda m, loss, bad, t=t: m.setattr(term_of(loss, t), "forward", lambda e: bad(e.objects)) for t in (
        "sup_loss", "tri_loss")},
    **{t: lambda m, loss, bad, t=t: m.setattr(term_of(loss, t), "forward", lambda e: bad(e.preds["embeds"])) for t in (
        "epi_loss", "cpe_loss")},
}  # fmt: skip


def _bad_box(bad):
    stock = BboxLoss.forward

    def forward(self, pred_dist, pred_bboxes, *args):
        box, dfl = stock(self, pred_dist, pred_bboxes, *args)
        return box.detach() + bad(pred_bboxes), dfl

    return forward


@pytest.mark.parametrize("term", BAD)
def test_a_nan_gradient_of_one_part_does_not_reach_the_others(batch, monkeypatch, term):
    model = make(cpe_iou=0.0)
    loss, preds = branches(model, batch)[0]
    BAD[term](monkeypatch, loss, lambda x: (x.sum() * 0).sqrt())  # a value of zero with a NaN gradient
    this, terms = run(loss, preds, batch)
    parts = loss.parts(this)
    assert torch.isfinite(terms).all()
    inputs = [preds[k] for k in OUTPUTS]
    nan = [k for k, part in parts.items() if any(g.isnan().any() for g in gradients(part, inputs))]
    assert nan == [term]


def test_parts_include_their_gains(batch):
    def parts(**values):
        model = make(cpe_iou=0.0, **values)
        loss, preds = branches(model, batch)[0]
        torch.manual_seed(1)
        return loss.parts(run(loss, preds, batch)[0])

    gains = {"box": 7.5, "cls": 0.5, "dfl": 0.15, "supcon": 1.2, "cpe": 0.6, "triplet": 0.3}
    one, three = parts(**gains), parts(**{k: 3 * v for k, v in gains.items()})
    for k, v in one.items():
        torch.testing.assert_close(three[k], 3 * v)


def test_observers_are_called_once_with_the_terms_and_then_removed(batch):
    model = make()
    loss, preds = branches(model, batch)[0]
    seen, passes = [], []
    loss.observers.append(lambda *args: seen.append((*args, loss.parts(args[1]))))
    loss.observers.append(lambda _, this: passes.append(weakref.ref(this)))
    items = loss(preds, batch)[1]
    assert len(seen) == len(passes) == 1 and loss.observers == []
    assert seen[0][0] is loss and seen[0][1].preds is preds and seen[0][1].batch is batch
    assert all(torch.equal(items[k], v) for k, v in seen[0][2].items())
    seen.clear()
    gc.collect()
    assert passes[0]() is None
    loss(preds, batch)
    assert len(seen) == 0 and len(passes) == 1


def test_a_failed_call_leaves_no_pass_behind(batch, monkeypatch):
    model = make()
    loss, preds = branches(model, batch)[0]
    expected = loss(preds, batch)[1]
    with monkeypatch.context() as m:
        m.setattr(loss, "bbox_decode", lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory")))
        with pytest.raises(RuntimeError, match="out of memory"):
            loss(preds, {**batch, **NO_OBJECTS})
    assert loss.assigner.current is loss.bce.current is loss.bbox_loss.current is None
    assert torch.equal(loss(preds, batch)[1]["cls_loss"], expected["cls_loss"])


@pytest.mark.parametrize("cfg", ["yolo11n-fewshot.yaml", "yolo26n-fewshot.yaml"])
def test_box_loss_records_the_values_of_ultralytics_box_loss(batch, cfg):
    model = make(cfg, stage=1)
    for loss, preds in branches(model, batch):
        stock = v8DetectionLoss(model, loss.assigner.topk, loss.assigner.topk2)
        kept = []
        forward = stock.bbox_loss.forward
        stock.bbox_loss.forward = lambda *a, f=forward, kept=kept: kept.append(f(*a)) or kept[-1]
        stock(preds, batch)
        this, terms = run(loss, preds, batch)
        assert torch.equal(this.box, kept[0][0]) and torch.equal(this.dfl, kept[0][1])
        torch.testing.assert_close(terms[[0, 2]], torch.stack(kept[0]) * torch.tensor([7.5, 0.15]))


def test_gain_of_returns_key_and_gain_of_every_term():
    names, args = ("box", "cls", "dfl", "l1", "epi", "sup", "cpe", "tri"), run_args(terms="test_criterion.OwnTerm")
    keys = ["box", "cls", "dfl", "dfl", "cls", "supcon", "cpe", "triplet"]
    assert [gain_of(n, args) for n in names] == [(k, getattr(args, k)) for k in keys]
    assert [gain_of(f"{n}_loss", args) for n in names] == [gain_of(n, args) for n in names]
    assert gain_of("own", args) == gain_of("own_loss", args) == (None, 2)
    assert gain_of("steps", args) == (None, None)  # a key, but no term


def test_branch_losses_are_those_that_the_model_uses(batch):
    single, dual = make(), make("yolo26n-fewshot.yaml")
    assert branch_losses(single) == branch_losses(single) == [single.criterion]
    assert branch_losses(dual) == [dual.criterion.one2many, dual.criterion.one2one]
    used = single.criterion
    single.loss(batch)
    assert single.criterion is used


# Chance levels: closed forms, loops over the assignment, and a head that is untrained.


def assigned_of(loss, preds, batch):
    """What the assignment of a batch is, with the level of every anchor and its center in pixels."""
    this, _ = run(loss, preds, batch)
    labels, boxes, scores, fg, gt_idx = this.assignment[:5]
    level, center = [], []
    for i, f in enumerate(preds["feats"]):
        for y in range(f.shape[2]):
            for x in range(f.shape[3]):
                level.append(i)
                center.append([(x + 0.5) * 8 * 2**i, (y + 0.5) * 8 * 2**i])
    return this, labels, boxes, scores, fg, gt_idx, torch.tensor(level), torch.tensor(center)


def objects_of(fg, gt_idx, labels):
    """Class and image of every object that has an anchor."""
    found = {(b, int(gt_idx[b, a])): int(labels[b, a]) for b, a in fg.nonzero().tolist()}
    return [(c, b) for (b, _), c in found.items()]


def trained(**values):
    """A model whose head is far from its initialization."""
    model = make(values.pop("cfg", "yolo11n-fewshot.yaml"), **values)
    g = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for prototypes in model.model[-1].branch_prototypes:
            prototypes.bias.copy_(torch.tensor([-1.0, 0.5, 2.0]))
            prototypes.logit_scale.copy_(torch.tensor([0.5, 1.0, 1.5]))
        for name, p in model.model[-1].named_parameters():
            if "cv2" in name and name.endswith("bias"):
                p.add_(torch.rand(p.shape, generator=g))
    return model


def priors(level):
    """Logit of every anchor for about 5 objects of NC classes in an image of 640 x 640."""
    return torch.tensor([math.log(5 / NC / (640 / (8 * 2**i)) ** 2) for i in level.tolist()])


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_chance_levels_equal_closed_forms(batch, wide, frozen):
    model = trained(wide=wide, cpe_iou=0.0)
    if frozen:
        model.model[-1].freeze_prototypes(list(range(NC)))
    loss, preds = branches(model, batch)[0]
    this, labels, boxes, scores, fg, gt_idx, level, center = assigned_of(loss, preds, batch)
    assert scores.sum() > 1 and fg.sum() <= 512
    torch.manual_seed(3)
    chance = dict(zip(loss.loss_names, loss.chance(this).tolist()))

    assert chance["dfl_loss"] == pytest.approx(0.15 * 4 * math.log(16), rel=1e-5)
    assert chance["tri_loss"] == pytest.approx(0.3 * 0.3, rel=1e-5)
    objects = objects_of(fg, gt_idx, labels)
    ways = sorted({c for c, b in objects if batch["support"][b] and (wide or c in {0, 1})})
    assert ways == ([0, 1, 2] if wide else [0, 1])
    assert len(objects) == len(batch["cls"])
    n = len(objects) + len(ways)
    assert chance["sup_loss"] == pytest.approx(1.2 * math.log(n - 1), rel=1e-5)
    torch.manual_seed(3)  # the sample of background is random
    background = sum(not fg[i // fg.shape[1], i % fg.shape[1]] for i in torch.randint(fg.numel(), (128,)).tolist())
    assert chance["cpe_loss"] == pytest.approx(0.6 * math.log(int(fg.sum()) + background - 1), rel=1e-5)

    prior = priors(level)
    every = [scores[b, :, c] for b in range(B) for c in range(NC)]
    cls = sum(F.binary_cross_entropy_with_logits(prior, t, reduction="sum") for t in every)
    assert chance["cls_loss"] == pytest.approx(0.5 * float(cls / scores.sum()), rel=1e-5)
    query = [scores[b, :, c] for b in range(B) for c in ways if not batch["support"][b]]
    epi = sum(F.binary_cross_entropy_with_logits(prior, t, reduction="sum") for t in query)
    assert chance["epi_loss"] == pytest.approx(0.5 * float(epi / max(sum(t.sum() for t in query), 1)), rel=1e-5)

    box = 0
    for b, a in fg.nonzero().tolist():  # uniform over 16 bins: 7.5 strides to every side
        reach = 7.5 * 8 * 2 ** int(level[a])
        prior_box = torch.cat([center[a] - reach, center[a] + reach])
        box += float((1 - bbox_iou(prior_box, boxes[b, a], xywh=False, CIoU=True)) * scores[b, a].sum())
    assert chance["box_loss"] == pytest.approx(7.5 * box / float(scores.sum()), rel=1e-4)


def test_chance_levels_without_dfl(batch):
    model = trained(cfg="yolo26n-fewshot.yaml")
    for loss, preds in branches(model, batch):
        this, _, boxes, scores, fg, _, level, center = assigned_of(loss, preds, batch)
        chance = dict(zip(loss.loss_names, loss.chance(this).tolist()))
        box = l1 = 0
        for b, a in fg.nonzero().tolist():
            stride, weight = 8 * 2 ** int(level[a]), float(scores[b, a].sum())
            prior_box = torch.cat([center[a] - 2 * stride, center[a] + 2 * stride])  # the bias is 2
            box += float(1 - bbox_iou(prior_box, boxes[b, a], xywh=False, CIoU=True)) * weight
            l1 += float((prior_box - boxes[b, a]).abs().mean()) / 96 * weight
        norm = max(float(scores.sum()), 1)
        assert chance["box_loss"] == pytest.approx(7.5 * box / norm, rel=1e-4)
        assert chance["l1_loss"] == pytest.approx(0.15 * l1 / norm, rel=1e-4)


def test_the_chance_level_of_a_soft_triplet_is_ln_two(batch):
    loss, preds = branches(trained(triplet_soft=True), batch)[0]
    this, _ = run(loss, preds, batch)
    assert float(loss.chance(this)[-1]) == pytest.approx(0.3 * math.log(2), rel=1e-5)


def test_chance_levels_of_stage_one(batch):
    loss, preds = branches(make(stage=1), batch)[0]
    chance = loss.chance(run(loss, preds, batch)[0])
    assert len(chance) == 3 and float(chance[2]) == pytest.approx(0.15 * math.log(16), rel=1e-5)  # mean of four sides


def test_an_untrained_head_is_at_chance(batch):
    model = make()
    with torch.no_grad():
        for box in model.model[-1].cv2:
            box[-1].weight.zero_()
        model.model[-1].prototypes.logit_scale.zero_()
    loss, preds = branches(model, batch)[0]
    this, terms = run(loss, preds, batch)
    assert (terms[:4] > 0).all()
    torch.testing.assert_close(loss.chance(this)[:4], terms[:4].detach(), rtol=1e-5, atol=1e-6)


def test_chance_levels_depend_on_the_assignment_alone(batch):
    loss, preds = branches(trained(cpe_iou=0.0), batch)[0]
    this, _ = run(loss, preds, batch)
    torch.manual_seed(4)
    chance = loss.chance(this)
    other = {k: torch.randn_like(preds[k]) * 9 for k in OUTPUTS} | {"logit_bias": torch.tensor([4.0, -4.0, 1.0])}
    torch.manual_seed(4)
    this.preds = {**preds, **other}
    assert torch.equal(loss.chance(this), chance) and torch.isfinite(chance).all()
    assert not chance.requires_grad


@pytest.mark.parametrize("cfg", ["yolo11n-fewshot.yaml", "yolo26n-fewshot.yaml"])
def test_parts_and_chance_keep_random_state_and_clamp_counts(batch, cfg):
    model = make(cfg, dfl_side_max=0.5, dfl_mean_max=0.5)  # below ln 16: all is clamped
    for loss, preds in branches(model, batch):
        this, _ = run(loss, preds, batch)
        dfl = loss.clamped_dfl
        counts = [int(dfl.side_clamped), int(dfl.mean_clamped)] if dfl else []
        assert all(counts)
        random = torch.get_rng_state()
        loss.parts(this)
        loss.chance(this)
        assert torch.equal(torch.get_rng_state(), random)
        assert counts == ([int(dfl.side_clamped), int(dfl.mean_clamped)] if dfl else [])
        with pytest.raises(KeyError), loss.without_side_effects():
            torch.rand(1)
            raise KeyError
        assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("cfg", ["yolo11n-fewshot.yaml", "yolo26n-fewshot.yaml"])
def test_parts_and_chance_of_a_batch_without_objects(batch, cfg):
    empty = {**batch, **NO_OBJECTS}
    for loss, preds in branches(make(cfg), empty):
        this, terms = run(loss, preds, empty)
        assert torch.equal(torch.stack(list(loss.parts(this).values())), terms)
        chance = loss.chance(this)
        assert chance[1] > 0 and not chance[[0, *range(2, 7)]].any()


def extreme(model, fills):
    """Predictions of float16 at the ends of its range, as float16 feature maps give them."""
    g = torch.Generator().manual_seed(0)
    head = model.model[-1]
    sizes = {"boxes": 4 * head.reg_max, "scores": NC, "embeds": head.embed}
    feats = [torch.zeros(B, 8, s, s, dtype=torch.float16) for s in (12, 6, 3)]
    a = sum(f.shape[2] * f.shape[3] for f in feats)
    signs = {"+": torch.ones, "-": lambda *s: -torch.ones(*s), "±": lambda *s: torch.randint(2, s, generator=g) * 2 - 1}
    preds = {
        k: (signs[s](B, c, a) * 65504.0).half().requires_grad_() for (k, c), s in zip(sizes.items(), fills, strict=True)
    }
    prototypes = head.prototypes
    levels = {"logit_scale": prototypes.logit_scale, "logit_bias": prototypes.bias, "frozen": prototypes.frozen}
    return {**preds, **levels, "feats": feats}


@pytest.mark.parametrize("objects", [True, False])
@pytest.mark.parametrize("fills", ["+++", "---", "±+±", "-±+", "±±±"])
def test_every_term_is_finite_at_the_limits_of_float16(batch, fills, objects):
    check_extremes(batch, "yolo11n-fewshot.yaml", fills, objects)


def test_every_term_is_finite_at_the_limits_of_float16_without_dfl(batch):
    check_extremes(batch, "yolo26n-fewshot.yaml", "±+±", True)


def check_extremes(batch, cfg, fills, objects):
    model = make(cfg, cpe_iou=0.0)
    if fills == "±±±":
        model.model[-1].freeze_prototypes(list(range(NC)))
    batch = batch if objects else {**batch, **NO_OBJECTS}
    loss, preds = FewShotLoss(model), extreme(model, fills)
    with torch.autocast("cpu", dtype=torch.float16):
        this, terms = run(loss, preds, batch)
        if objects and "+" in fills[:2]:
            assert this.assignment.fg_mask.any()
        parts = loss.parts(this)
        chance = loss.chance(this)
    assert torch.isfinite(terms).all() and torch.isfinite(chance).all()
    assert terms.dtype == torch.float32
    inputs = [preds[k] for k in OUTPUTS] + [p for p in model.model[-1].parameters() if p.requires_grad]
    for name, value in {**parts, "sum": terms.sum()}.items():
        assert all(torch.isfinite(g).all() for g in gradients(value, inputs)), name


def test_a_model_in_half_precision_has_finite_terms_and_gradients(batch):
    model = make(cpe_iou=0.0)
    with torch.autocast("cpu", dtype=torch.float16):
        loss, items = model(batch)
    loss.sum().backward()
    assert all(torch.isfinite(v) for v in items.values())
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


# Stage 3


def test_stage_three_equals_the_loss_of_ultralytics_if_every_class_has_labels(batch):
    model = make(stage=3)
    preds = preds_of(model, batch)
    ours, theirs = FewShotLoss(model)(preds, batch), v8DetectionLoss(model)(preds, batch)
    assert torch.equal(ours[0][:3], theirs[0]) and not ours[0][3:].any()
    assert tuple(ours[1]) == ("box_loss", "cls_loss", "dfl_loss", *RETENTION_TERMS)
    assert [gain_of(k, model.args) for k in RETENTION_TERMS] == [("teacher", 0.5), ("memory", 0.5)]


def retaining(batch, cfg="yolo11n-fewshot.yaml", silent=(4, 1), **values):
    """The losses of stage 3 with classes to retain, their predictions, and the batch with a teacher's scores."""
    model, g = trained(cfg=cfg, stage=3, **values), torch.Generator().manual_seed(11)
    found, teacher = branches(model, batch), []
    for i, ((loss, preds), prototypes) in enumerate(zip(found, model.model[-1].branch_prototypes)):
        with torch.no_grad():
            prototypes.gain.copy_(torch.rand(NC, generator=g) + 0.5)
            prototypes.offset.copy_(torch.randn(NC, generator=g))
        level, targets = torch.tensor([0, 2, 1, 1]), torch.rand(4, NC, generator=g)
        embeds = torch.randn(4, model.model[-1].embed, generator=g)
        loss.retention = Retention(i, torch.tensor(silent), embeds, level, targets)
        teacher.append(torch.rand(*preds["scores"].transpose(1, 2).shape[:2], len(silent), generator=g))
    found = branches(model, batch)  # anew, with those gains and offsets
    return model, found, {**batch, "teacher": teacher}


@pytest.mark.parametrize("cfg", ["yolo11n-fewshot.yaml", "yolo26n-fewshot.yaml"])
def test_retention_terms_equal_loops(batch, cfg):
    model, found, taught = retaining(batch, cfg, teacher=0.7, memory=0.3)
    for i, ((loss, preds), prototypes) in enumerate(zip(found, model.model[-1].branch_prototypes)):
        _, _, scores, fg, _ = run(loss, preds, batch)[0].assignment[:5]
        x, cls, tea = preds["scores"].detach().double(), 0.0, 0.0
        for b in range(B):
            for a in range(x.shape[2]):
                for c in range(NC):
                    if c in {1, 4} and not fg[b, a]:
                        t, p = taught["teacher"][i][b, a, [4, 1].index(c)].double(), x[b, c, a].sigmoid()
                        tea += float(t * (t / p).log() + (1 - t) * ((1 - t) / (1 - p)).log())
                    else:
                        cls += float(F.binary_cross_entropy_with_logits(x[b, c, a], scores[b, a, c].double()))
        mass = max(float(scores.sum()), 1)
        _, _, embeds, level, targets = loss.retention
        mem = 0.0
        for m in range(4):
            for c in range(NC):
                p, s, o = (
                    x.detach()[i]
                    for x, i in (
                        (prototypes.weight[..., 0], c),
                        (prototypes.logit_scale, level[m]),
                        (prototypes.bias, level[m]),
                    )
                )
                z = (s * prototypes.gain[c] * (embeds[m] @ p / p.norm()) + o + prototypes.offset[c]).double()
                t, q = targets[m, c].double(), z.sigmoid()
                mem += float(t * (t / q).log() + (1 - t) * ((1 - t) / (1 - q)).log())
        mem /= max(float(targets.amax(1).sum()), 1)
        items = loss(preds, taught)[1]
        assert items["cls_loss"].item() == pytest.approx(0.5 * cls / mass, rel=1e-4)
        assert items["tea_loss"].item() == pytest.approx(0.7 * tea / mass, rel=1e-4)
        assert items["mem_loss"].item() == pytest.approx(0.3 * mem, rel=1e-4)
        plain = v8DetectionLoss(model, loss.assigner.topk, loss.assigner.topk2)(preds, batch)[1]
        for k in set(plain) - {"cls_loss"}:
            torch.testing.assert_close(items[k], plain[k])


def test_a_student_that_equals_its_teacher_gets_no_gradient(batch):
    _, [(loss, preds)], taught = retaining(batch)
    preds = {**preds, "scores": preds["scores"].detach().requires_grad_()}
    taught["teacher"] = [preds["scores"][:, [4, 1]].transpose(1, 2).detach().sigmoid()]
    terms = loss.loss(preds, taught)[0]
    (grad,) = torch.autograd.grad(terms.sum(), preds["scores"])
    background = ~run(loss, preds, batch)[0].assignment.fg_mask
    assert abs(float(terms[3].detach())) < 1e-4 and background.any()
    assert grad[:, [4, 1]].transpose(1, 2)[background].abs().max() < 1e-6
    rest = grad[:, [0, 2, 3, 5]].transpose(1, 2)
    assert rest[background].abs().min() > 1e-6


def test_without_a_teacher_old_classes_are_background_and_replayed(batch):
    _, [(loss, preds)], taught = retaining(batch)
    plain = loss.loss(preds, batch)[1]
    assert plain["tea_loss"].abs() < 1e-4 and plain["mem_loss"] > 0
    assert plain["cls_loss"] > loss.loss(preds, taught)[1]["cls_loss"]
    loss.retention = None
    items = loss.loss(preds, taught)[1]
    assert torch.equal(items["cls_loss"], plain["cls_loss"]) and not items["tea_loss"] and not items["mem_loss"]


def test_parts_and_chance_of_stage_three(batch):
    _, found, taught = retaining(batch)
    seen = []
    for loss, preds in found:
        loss.observers.append(lambda loss, this: seen.extend([loss.parts(this), loss.chance(this)]))
        items = loss.loss(preds, taught)[1]
        parts, chance = seen
        torch.testing.assert_close({k: v.detach() for k, v in parts.items()}, items)
        assert all(p.requires_grad for p in parts.values())
        level, targets = loss.retention[3:]
        z = torch.tensor([math.log(5 / NC / (640 / (8 * 2 ** int(i))) ** 2) for i in level])[:, None]
        bce = F.binary_cross_entropy_with_logits(z.expand(4, NC), targets, reduction="sum")
        entropy = torch.distributions.Bernoulli(targets).entropy().sum()
        assert chance[4].item() == pytest.approx(0.5 * float(bce - entropy) / float(targets.amax(1).sum()), rel=1e-4)
        assert chance[3] > items["tea_loss"]


@pytest.mark.parametrize(("gain", "term", "bad"), [("teacher", "tea_loss", "scores"), ("memory", "mem_loss", "weight")])
def test_a_retention_term_with_a_gain_of_zero_is_not_computed(batch, gain, term, bad):
    kept = {}
    for value in (0.0, 0.5):
        _, [(loss, preds)], _ = retaining(batch, **{gain: value})
        preds = {**preds, bad: preds[bad].detach() * torch.nan}
        kept[value] = loss.loss(preds, batch)[1][term]
    assert kept[0.0] == 0 and kept[0.5].isnan()


def test_retention_terms_with_a_gain_of_zero_are_connected_to_the_predictions(batch):
    _, [(loss, preds)], taught = retaining(batch, teacher=0.0, memory=0.0)
    terms = loss.loss(preds, taught)[0][3:]
    (grad,) = torch.autograd.grad(terms.sum(), preds["scores"])
    assert terms.tolist() == [0, 0] and not grad.any()
