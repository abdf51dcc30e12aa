import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from ultralytics.utils.loss import E2ELoss, v8DetectionLoss

from yolo_fewshot import args as table
from yolo_fewshot.criterion import EPISODE_TERMS, FewShotLoss, balanced_sample
from yolo_fewshot.losses import SupConLoss, TripletLoss
from yolo_fewshot.model import FewShotDetectionModel

NC, B = 6, 6


def run_args(stage=2, **values):
    defaults = table.resolve({"stage": stage, **values})
    return SimpleNamespace(**{"box": 7.5, "cls": 0.5, "dfl": 0.15, "epochs": 2, **defaults, **values})


def make(cfg="yolo11n-fewshot.yaml", **values):
    torch.manual_seed(0)
    model = FewShotDetectionModel(cfg, nc=NC, verbose=False)
    model.args = run_args(**values)
    return model.train()


@pytest.fixture(scope="module")
def batch():
    """An episode of 2 ways: classes 0 and 1 were drawn, 2 and 3 happen to be in the pictures too."""
    g = torch.Generator().manual_seed(0)
    per_picture = [[0, 2], [1], [0], [1, 3], [1, 2], [0, 3]]
    cls = torch.tensor([c for p in per_picture for c in p]).float()[:, None]
    index = torch.tensor([i for i, p in enumerate(per_picture) for _ in p]).float()
    place = torch.tensor([j for p in per_picture for j, _ in enumerate(p)])
    centre = torch.where(place[:, None] == 0, torch.tensor([[0.3, 0.3]]), torch.tensor([[0.7, 0.7]]))
    size = 0.3 + 0.1 * torch.rand(len(cls), 2, generator=g)
    return {
        "img": torch.rand(B, 3, 96, 96, generator=g),
        "cls": cls,
        "bboxes": torch.cat([centre, size], 1),
        "batch_idx": index,
        "support": torch.tensor([True] * 2 + [False] * 4),
        "way": torch.tensor([0, 1, 0, 1, 1, 0]),
    }


def preds_of(model, batch):
    preds = model(batch["img"])
    return preds.get("one2many", preds)


def test_stage_one_is_ultralytics_own_loss(batch):
    model = make(stage=1)
    preds = preds_of(model, batch)
    ours, theirs = FewShotLoss(model), v8DetectionLoss(model)
    a, b = ours(preds, batch), theirs(preds, batch)
    assert torch.equal(a[0], b[0]) and a[1].keys() == b[1].keys()


def test_stage_two_keeps_ultralytics_box_and_class_terms(batch):
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


def naive_terms(model, preds, batch, criterion):
    """Episode terms written with loops over pictures, objects, classes and anchors, from one fresh assignment."""
    h, head = model.args, model.model[-1]
    criterion.get_assigned_targets_and_loss(preds, batch)
    labels, _, scores, fg, gt_idx = criterion.assigner.assigned
    e = preds["embeds"].transpose(1, 2)
    objects = []  # (embedding, class, picture)
    for b in range(B):
        for g in range(criterion.assigner.n_max_boxes):
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
                bank = head.prototypes
                logits = torch.stack([bank.logit_scale[i] * (e[b, a] @ p) + bank.bias[i] for a, i in enumerate(level)])
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
    assert ways == ([0, 1, 2] if wide else [0, 1])  # class 3 is in query pictures only
    _, items = criterion(preds, batch)
    torch.testing.assert_close(items["epi_loss"], epi.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(items["sup_loss"], supcon.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(items["tri_loss"], triplet.detach(), rtol=1e-4, atol=1e-4)


def test_a_query_is_judged_by_prototypes_of_other_pictures_only(batch):
    model = make()
    preds = preds_of(model, batch)
    criterion = FewShotLoss(model)
    criterion.get_assigned_targets_and_loss(preds, batch)
    moved = {**preds, "embeds": preds["embeds"].detach().clone()}
    moved["embeds"][2:] += 100 * torch.randn_like(moved["embeds"][2:])  # query embeddings change, prototypes do not

    def prototypes_with(p):
        seen = {}

        def spy(preds_, query, targets, prototypes, ways):
            seen["p"] = prototypes
            return query.sum() * 0

        criterion.episode_loss = spy
        criterion.episode_terms(p, batch)
        return seen["p"]

    torch.testing.assert_close(prototypes_with(preds), prototypes_with(moved))


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


def test_gains_scale_their_terms_and_zero_switches_off(batch):
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


def test_both_branches_of_a_dual_head_have_their_own_episode(batch):
    model = make("yolo26n-fewshot.yaml")
    criterion = model.init_criterion()
    assert isinstance(criterion, E2ELoss)
    preds = model(batch["img"])
    seen = []
    for name in ("one2many", "one2one"):
        seen.append(getattr(criterion, name).loss(preds[name], batch)[1]["epi_loss"])
    assert seen[0] != seen[1]


def test_autocast_changes_the_terms_little(batch):
    model = make()
    model.model[-1].prototypes.bias.data += 5
    full = FewShotLoss(model)(preds_of(model, batch), batch)[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, low = FewShotLoss(model)(preds_of(model, batch), batch)
    assert torch.isfinite(loss).all()
    for k in EPISODE_TERMS:
        assert low[k].dtype == torch.float32
    torch.testing.assert_close(low["sup_loss"], full["sup_loss"], rtol=0.1, atol=0.1)


def test_balanced_sample_gives_classes_equal_shares():
    torch.manual_seed(0)
    labels = torch.tensor([0] * 500 + [1] * 20 + [2] * 5)[torch.randperm(525)]
    chosen = balanced_sample(labels, 60)
    counts = torch.bincount(labels[chosen]).tolist()
    assert counts == [35, 20, 5] and len(set(chosen.tolist())) == 60
    assert torch.equal(balanced_sample(labels[:10], 60), torch.arange(10))
    assert torch.bincount(labels[balanced_sample(labels, 9)]).tolist() == [3, 3, 3]
