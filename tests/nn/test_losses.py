"""Tests of `yolo_fewshot.nn.losses` against plain loops in float64, published libraries and hand-worked values."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from yolo_fewshot.nn.losses import ClampedDFLoss, CPELoss, DistillationLoss, SupConLoss, TripletLoss

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
UNIT = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [-0.6, 0.8]])
UNIT_LABELS = torch.tensor([0, 0, 1, 1])
HALF_MAX = 65504.0


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Handing these tiny tensors to several threads takes longer than computing them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Plain loops over Python floats: the independent reference.


def dot(a: list[float], b: list[float]) -> float:
    """Dot product of two rows."""
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def unit(row: list[float]) -> list[float]:
    """Row over its norm, or the row itself if it is zero."""
    norm = math.sqrt(dot(row, row))
    return [x / norm for x in row] if norm else row


def anchor_losses(rows: list[list[float]], labels: list[int], t: float) -> list[float | None]:
    """Supervised contrastive loss per row, None for a row without positives."""
    out: list[float | None] = []
    for i in range(len(rows)):
        others = [k for k in range(len(rows)) if k != i]
        positives = [k for k in others if labels[k] == labels[i]]
        if not positives:
            out.append(None)
            continue
        top = max(dot(rows[i], rows[k]) / t for k in others)
        total = math.fsum(math.exp(dot(rows[i], rows[k]) / t - top) for k in others)
        terms = [top + math.log(total) - dot(rows[i], rows[p]) / t for p in positives]
        out.append(math.fsum(terms) / len(terms))
    return out


def naive_supcon(x: Tensor, labels: Tensor, t: float = 0.1) -> float:
    """Loop form of SupConLoss."""
    found = [v for v in anchor_losses([unit(r) for r in x.tolist()], labels.tolist(), t) if v is not None]
    return math.fsum(found) / len(found) if found else 0.0


def naive_cpe(
    x: Tensor,
    labels: Tensor,
    ious: Tensor,
    t: float = 0.2,
    threshold: float = 0.5,
    reweight: str = "none",
    normalize: bool = True,
) -> float:
    """Loop form of CPELoss."""
    rows = [unit(r) for r in x.tolist()] if normalize else x.tolist()
    total, foreground = 0.0, 0
    for value, y, u in zip(anchor_losses(rows, labels.tolist(), t), labels.tolist(), ious.tolist(), strict=True):
        if y == -1:
            continue
        foreground += 1
        if u >= threshold and value is not None:
            total += value * {"none": 1.0, "linear": u, "exp": math.exp(u) - 1}[reweight]
    return total / foreground if foreground else 0.0


def naive_triplet(
    x: Tensor,
    labels: Tensor,
    prototypes: Tensor | None = None,
    margin: float = 0.3,
    distance: str = "cosine",
    soft: bool = False,
) -> float:
    """Loop form of TripletLoss."""
    rows, y = x.tolist(), labels.tolist()

    def far(a: list[float], b: list[float]) -> float:
        return 1 - dot(unit(a), unit(b)) if distance == "cosine" else math.dist(a, b)

    found = []
    for i, row in enumerate(rows):
        if prototypes is None:
            positive = [far(row, r) for k, r in enumerate(rows) if k != i and y[k] == y[i]]
            negative = [far(row, r) for k, r in enumerate(rows) if y[k] != y[i]]
        else:
            present = [(c, p) for c, p in enumerate(prototypes.tolist()) if any(p)]
            positive = [far(row, p) for c, p in present if c == y[i]]
            negative = [far(row, p) for c, p in present if c != y[i]]
        if positive and negative:
            gap = max(positive) - min(negative)
            found.append(math.log1p(math.exp(gap)) if soft else max(0.0, margin + gap))
    return math.fsum(found) / len(found) if found else 0.0


def naive_sides(logits: Tensor, target: Tensor) -> list[float]:
    """Unclamped DFL of each side."""
    out = []
    for row, t in zip(logits.tolist(), target.reshape(-1).tolist(), strict=True):
        t = min(max(t, 0.0), len(row) - 1.01)
        left = math.floor(t)
        top = max(row)
        log_total = top + math.log(math.fsum(math.exp(v - top) for v in row))
        out.append((left + 1 - t) * (log_total - row[left]) + (t - left) * (log_total - row[left + 1]))
    return out


def naive_dfl(
    logits: Tensor, target: Tensor, weight: Tensor | None = None, side_max: float = 20.0, mean_max: float = 15.0
) -> float:
    """Loop form of ClampedDFLoss."""
    sides = [min(s, side_max) for s in naive_sides(logits, target)]
    anchors = [math.fsum(sides[i : i + 4]) for i in range(0, len(sides), 4)]
    weights = [1.0] * len(anchors) if weight is None else weight.tolist()
    total = math.fsum(weights)
    return min(math.fsum(w * a for w, a in zip(weights, anchors, strict=True)) / total, mean_max) if total else 0.0


def numeric_grad(function: Callable[[Tensor], float], x: Tensor, step: float = 1e-6) -> Tensor:
    """Central differences of a float64 function, entry by entry."""
    x = x.detach().double().clone()
    grad = torch.zeros_like(x)
    for i in range(x.numel()):
        value = x.view(-1)[i].item()
        x.view(-1)[i] = value + step
        above = function(x)
        x.view(-1)[i] = value - step
        grad.view(-1)[i] = (above - function(x)) / (2 * step)
        x.view(-1)[i] = value
    return grad


def batch(n: int = 12, dim: int = 5, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Random rows, labels in -1..2 (the class 7 once, so one row has no positive) and IoUs on both sides of 0.5."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, dim, generator=g) * torch.linspace(0.5, 3, n)[:, None]
    labels = torch.randint(-1, 3, (n,), generator=g)
    labels[:5] = torch.tensor([7, 0, 0, 1, 1])
    ious = torch.rand(n, generator=g)
    ious[:4] = torch.tensor([0.9, 0.8, 0.1, 0.7])
    return x, labels, ious


def run(loss: Callable[..., Tensor], x: Tensor, *args: Tensor, autocast: bool = False) -> tuple[Tensor, Tensor]:
    """Value and gradient with respect to `x`, checked to be a connected, finite float32 scalar."""
    x = x.detach().clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        value = loss(x, *args)
    assert value.dtype == torch.float32 and value.shape == () and value.requires_grad
    value.backward()
    assert x.grad is not None and x.grad.shape == x.shape
    assert torch.isfinite(value) and torch.isfinite(x.grad).all()
    return value.detach(), x.grad


EMBEDDING_CASES = {
    "supcon": (SupConLoss(0.1), lambda x, y, u: naive_supcon(x, y, 0.1)),
    "supcon-0.5": (SupConLoss(0.5), lambda x, y, u: naive_supcon(x, y, 0.5)),
    "cpe": (CPELoss(), naive_cpe),
    "cpe-linear": (CPELoss(0.3, 0.6, "linear"), lambda x, y, u: naive_cpe(x, y, u, 0.3, 0.6, "linear")),
    "cpe-exp": (CPELoss(0.2, 0.0, "exp"), lambda x, y, u: naive_cpe(x, y, u, 0.2, 0.0, "exp")),
    "cpe-raw": (CPELoss(normalize=False), lambda x, y, u: naive_cpe(x, y, u, normalize=False)),
    "triplet": (TripletLoss(), lambda x, y, u: naive_triplet(x, y)),
    "triplet-soft": (TripletLoss(soft=True), lambda x, y, u: naive_triplet(x, y, soft=True)),
    "triplet-l2": (
        TripletLoss(1.0, "euclidean"),
        lambda x, y, u: naive_triplet(x, y, margin=1.0, distance="euclidean"),
    ),
    "triplet-l2-soft": (
        TripletLoss(distance="euclidean", soft=True),
        lambda x, y, u: naive_triplet(x, y, distance="euclidean", soft=True),
    ),
}


def call(loss: nn.Module, x: Tensor, labels: Tensor, ious: Tensor, autocast: bool = False) -> tuple[Tensor, Tensor]:
    """`run` an embedding loss, with the IoUs only where the loss takes them."""
    args = (labels, ious) if isinstance(loss, CPELoss) else (labels,)
    return run(loss, x, *args, autocast=autocast)


@pytest.fixture(params=EMBEDDING_CASES)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Callable[[Tensor, Tensor, Tensor], float]]:
    """An embedding loss and its loop form."""
    return EMBEDDING_CASES[request.param]


# All embedding losses.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(3))
def test_embedding_loss_equals_loops(case, dtype, seed):
    loss, naive = case
    x, labels, ious = batch(seed=seed)
    x, ious = x.to(dtype), ious.to(dtype)
    expected = naive(x.double(), labels, ious.double())
    assert expected > 0.01
    assert call(loss, x, labels, ious)[0].item() == pytest.approx(expected, rel=2e-5)


def test_embedding_gradient_equals_finite_differences(case):
    loss, naive = case
    x, labels, ious = batch(n=7, dim=3, seed=5)
    expected = numeric_grad(lambda v: naive(v, labels, ious), x)
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(call(loss, x, labels, ious)[1].double(), expected, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "labels", [[], [0], [0, 1, 2, 3], [-1, 5, 6, 7]], ids=["empty", "one", "all-different", "with-background"]
)
def test_loss_without_comparisons_is_zero_and_connected_to_the_graph(case, dtype, labels):
    x = batch()[0][: len(labels)].to(dtype)
    value, grad = call(case[0], x, torch.tensor(labels, dtype=torch.long), torch.ones(len(labels)))
    assert value == 0 and not grad.any()


def test_loss_of_a_single_class_equals_loops(case):
    loss, naive = case
    x, _, ious = batch()
    labels = torch.zeros(len(x), dtype=torch.long)
    value, _ = call(loss, x, labels, ious)
    assert value.item() == pytest.approx(naive(x.double(), labels, ious), rel=1e-5)
    assert (value == 0) == isinstance(loss, TripletLoss)


def test_loss_is_independent_of_the_order_of_rows(case):
    loss, _ = case
    x, labels, ious = batch(seed=2)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    value, grad = call(loss, x, labels, ious)
    value2, grad2 = call(loss, x[order], labels[order], ious[order])
    torch.testing.assert_close(value2, value)
    torch.testing.assert_close(grad2, grad[order], rtol=1e-4, atol=1e-5)


def test_loss_is_independent_of_class_numbers(case):
    x, labels, ious = batch()
    renamed = torch.where(labels >= 0, 100 - labels, labels)
    assert torch.equal(call(case[0], x, labels, ious)[0], call(case[0], x, renamed, ious)[0])


def test_loss_of_duplicated_rows_equals_loops(case):
    loss, naive = case
    x, labels, ious = (torch.cat((v, v)) for v in batch(n=6))
    value, _ = call(loss, x, labels, ious)
    assert value.item() == pytest.approx(naive(x.double(), labels, ious), rel=2e-5, abs=1e-5)


def test_loss_of_identical_rows_equals_loops(case):
    loss, naive = case
    x, labels, ious = torch.ones(6, 3), torch.tensor([0, 0, 0, 1, 1, 1]), torch.ones(6)
    value, _ = call(loss, x, labels, ious)
    assert value.item() == pytest.approx(naive(x.double(), labels, ious), rel=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_loss_of_zero_vectors_equals_loops(case, dtype):
    loss, naive = case
    x, labels, ious = batch()
    x, ious = x.to(dtype), ious.to(dtype)
    x[1] = x[4] = 0
    value, grad = call(loss, x, labels, ious)
    assert value.item() == pytest.approx(naive(x.double(), labels, ious.double()), rel=2e-5)
    if getattr(loss, "normalize", True) and getattr(loss, "distance", "cosine") == "cosine":
        assert not grad[[1, 4]].any() and grad[2].any()
    call(loss, torch.zeros_like(x), labels, ious)


@pytest.mark.parametrize("scale", [6e-8, 1e-5, 1e-3, 1.0, HALF_MAX])
@pytest.mark.parametrize("dim", [1, 4, 256])
def test_loss_of_float16_extremes_is_finite(case, scale, dim):
    g = torch.Generator().manual_seed(dim)
    _, labels, ious = batch(n=10)
    signs = torch.randint(0, 2, (10, dim), generator=g) * 2.0 - 1
    call(case[0], (signs * scale).half(), labels, ious)
    mixed = signs * torch.tensor([6e-8, HALF_MAX, 0.0, 1.0, HALF_MAX, -HALF_MAX, 1e-4, 3.0, 1e-3, 6e-8])[:, None]
    call(case[0], (mixed * scale).clamp(-HALF_MAX, HALF_MAX).half(), labels, ious)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-40, 1e-30, 1e-12, 1e30, 3.3e38])
def test_loss_of_float32_extremes_is_finite(case, dtype, size):
    x, labels, ious = batch()
    x = x / x.abs().max() * size
    call(case[0], x.to(dtype), labels, ious)
    x[::2] = 1.0
    call(case[0], x.to(dtype), labels, ious)
    call(case[0], torch.full_like(x, size).to(dtype), labels, ious)


@pytest.mark.parametrize("size", [1e-10, 1e30])
def test_cosine_losses_ignore_the_scale(size):
    x, labels, ious = batch()
    for name in ("supcon", "cpe", "triplet"):
        loss = EMBEDDING_CASES[name][0]
        torch.testing.assert_close(call(loss, x * size, labels, ious)[0], call(loss, x, labels, ious)[0])


def test_autocast_changes_nothing(case):
    loss, _ = case
    x, labels, ious = batch()
    expected = call(loss, x, labels, ious)
    value = call(loss, x, labels, ious, autocast=True)
    assert torch.equal(value[0], expected[0]) and torch.equal(value[1], expected[1])


def test_inputs_are_not_modified(case):
    inputs = batch()
    before = [v.clone() for v in inputs]
    args = inputs if isinstance(case[0], CPELoss) else inputs[:2]
    case[0](*args)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


def test_no_operation_reads_values_from_the_device(case):
    from torch._subclasses.fake_tensor import FakeTensorMode

    # Tensors without values: reading one, or indexing by a mask, raises.
    with FakeTensorMode(allow_non_fake_inputs=True):
        x, labels, ious = torch.empty(6, 3), torch.empty(6, dtype=torch.long), torch.empty(6)
        args = (x, labels, ious) if isinstance(case[0], CPELoss) else (x, labels)
        assert case[0](*args).shape == ()
        if isinstance(case[0], TripletLoss):
            assert case[0](x, labels, torch.empty(4, 3)).shape == ()
        dfl = ClampedDFLoss(mode="rescale")
        assert dfl(torch.empty(8, 16), torch.empty(2, 4), torch.empty(2)).shape == ()


def test_embedding_shapes_are_checked(case):
    x, labels, ious = batch()
    with pytest.raises(ValueError, match=r"labels must have shape \(12,\)"):
        call(case[0], x, labels[:-1], ious)
    with pytest.raises(ValueError, match=r"\(N, D\)"):
        call(case[0], x[0], labels, ious)
    if isinstance(case[0], CPELoss):
        with pytest.raises(ValueError, match="ious"):
            call(case[0], x, labels, ious[:, None])


# SupConLoss.


@pytest.mark.parametrize(("temperature", "expected"), [(0.07, 0.027933), (0.1, 0.063780), (0.2, 0.172804)])
def test_supcon_equals_golden_values(temperature, expected):
    value, _ = run(SupConLoss(temperature), UNIT, UNIT_LABELS)
    assert value.item() == pytest.approx(expected, abs=1e-6)
    assert naive_supcon(UNIT.double(), UNIT_LABELS, temperature) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_supcon_equals_pytorch_metric_learning(seed):
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    x, labels, _ = batch(n=20, dim=8, seed=seed)
    value, grad = run(SupConLoss(0.2), x, labels)
    expected, expected_grad = run(losses.SupConLoss(0.2), x, labels)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-6)


def test_supcon_rows_without_positive_are_not_averaged():
    # Identical rows: each of the two anchors has two equal candidates, so it costs ln 2; the third row is no anchor.
    value, _ = run(SupConLoss(), torch.ones(3, 2), torch.tensor([0, 0, 1]))
    assert value.item() == pytest.approx(math.log(2), rel=1e-6)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
@pytest.mark.parametrize("loss", [SupConLoss, CPELoss])
def test_temperature_must_be_positive(loss, temperature):
    with pytest.raises(ValueError, match="temperature must be > 0"):
        loss(temperature=temperature)


# CPELoss.

CPE_ROWS = torch.tensor([[1.0, 0, 1, 1], [1, 1, 1, 1]]).repeat(2, 1)
CPE_LABELS = torch.tensor([0, 1, 0, 1])


def cpe_golden(iou: float, reweight: str = "none", threshold: float = 0.8) -> float:
    """Loss of the four golden rows at one common IoU."""
    loss = CPELoss(0.2, threshold, reweight, normalize=False)
    return run(loss, CPE_ROWS, CPE_LABELS, torch.full((4,), iou))[0].item()


def test_cpe_equals_golden_values():
    assert cpe_golden(0.9) == pytest.approx(0.5560, abs=5e-5)
    assert cpe_golden(0.9) == pytest.approx((math.log(3) + math.log1p(2 * math.exp(-5))) / 2, rel=1e-6)
    assert cpe_golden(0.7) == 0


def test_cpe_gate_includes_the_threshold():
    assert cpe_golden(0.75, threshold=0.75) == cpe_golden(0.9) > 0
    assert cpe_golden(1.0, threshold=1.0) == cpe_golden(0.9)
    assert cpe_golden(0.0, threshold=0.0) == cpe_golden(0.9)


def test_cpe_weights_equal_their_formulas():
    base = cpe_golden(0.9)
    assert cpe_golden(0.9, "linear") == pytest.approx(0.9 * base, rel=1e-6)
    assert cpe_golden(0.9, "exp") == pytest.approx((math.exp(0.9) - 1) * base, rel=1e-6)


def test_cpe_mean_is_over_foreground_rows():
    loss = CPELoss()
    x, y, u = torch.ones(4, 2), torch.tensor([0, 0, 0, 0]), torch.tensor([0.9, 0.9, 0.1, 0.1])
    # Two of four foreground rows pass the gate, each at ln 3.
    assert run(loss, x, y, u)[0].item() == pytest.approx(math.log(3) / 2, rel=1e-6)
    # Background is not counted by the mean, and stays in the denominators.
    y = torch.tensor([0, 0, -1, -1])
    assert run(loss, x, y, torch.ones(4))[0].item() == pytest.approx(math.log(3), rel=1e-6)
    # A row without positives is counted.
    y = torch.tensor([0, 0, -1, 3])
    assert run(loss, x, y, torch.ones(4))[0].item() == pytest.approx(math.log(3) * 2 / 3, rel=1e-6)


def test_cpe_low_iou_rows_stay_positives():
    x = torch.tensor([[1.0, 0], [0, 1], [0.6, 0.8]])
    y, u = torch.tensor([0, 0, 1]), torch.tensor([0.9, 0.1, 0.9])
    value, grad = run(CPELoss(1.0), x, y, u)
    assert value.item() == pytest.approx(math.log(1 + math.exp(0.6)) / 3, rel=1e-6)
    assert grad[1].any() and grad[2].any()


@pytest.mark.parametrize("reweight", ["none", "linear", "exp"])
def test_cpe_masked_rows_are_as_if_left_out(reweight):
    loss, (x, y, u), g = CPELoss(0.3, 0.4, reweight), batch(), torch.Generator().manual_seed(1)
    counted = torch.rand(len(y), generator=g) < 0.6
    value, grad = run(loss, x, y, u, counted)
    expected, partial = run(loss, x[counted], y[counted], u[counted])
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(grad[counted], partial)
    assert 2 < counted.sum() < len(y) and expected > 0 and not grad[~counted].any()
    assert torch.equal(run(loss, x, y, u, torch.ones_like(counted))[0], run(loss, x, y, u)[0])
    nothing = run(loss, x, y, u, torch.zeros_like(counted))
    assert nothing[0] == 0 and not nothing[1].any()
    with pytest.raises(ValueError, match="mask must have shape"):
        loss(x, y, u, counted[1:])


def test_cpe_of_background_alone_is_zero():
    value, grad = run(CPELoss(), UNIT, torch.full((4,), -1), torch.ones(4))
    assert value == 0 and not grad.any()


def test_cpe_ious_out_of_range_are_clipped():
    loss = CPELoss(reweight="exp")
    x, y, _ = batch()
    assert torch.equal(loss(x, y, torch.full((12,), HALF_MAX)), loss(x, y, torch.ones(12)))


def test_cpe_arguments_are_checked():
    for threshold in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="iou_threshold"):
            CPELoss(iou_threshold=threshold)
    with pytest.raises(ValueError, match="'none', 'linear', 'exp'"):
        CPELoss(reweight="square")


# TripletLoss.


def test_triplet_equals_golden_values():
    assert run(TripletLoss(0.3), UNIT, UNIT_LABELS)[0].item() == pytest.approx(0.05, abs=1e-6)
    soft = TripletLoss(distance="euclidean", soft=True)
    assert run(soft, UNIT, UNIT_LABELS)[0].item() == pytest.approx(0.473754, abs=1e-6)


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("seed", range(2))
def test_triplet_equals_pytorch_metric_learning(distance, soft, seed):
    pytest.importorskip("pytorch_metric_learning")
    from pytorch_metric_learning import distances, losses, miners, reducers

    kind = distances.CosineSimilarity() if distance == "cosine" else distances.LpDistance(normalize_embeddings=False)
    miner = miners.BatchHardMiner(distance=kind)
    oracle = losses.TripletMarginLoss(
        0.0 if soft else 0.4, distance=kind, smooth_loss=soft, reducer=reducers.MeanReducer()
    )
    x, labels, _ = batch(n=20, dim=8, seed=seed)
    value, grad = run(TripletLoss(0.4, distance, soft), x, labels)
    leaf = x.clone().requires_grad_()
    expected = oracle(leaf, labels, miner(leaf, labels))
    expected.backward()
    torch.testing.assert_close(value, expected.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grad, leaf.grad, rtol=1e-3, atol=1e-5)


def test_triplet_soft_ignores_the_margin():
    x, labels, _ = batch()
    assert torch.equal(TripletLoss(0.0, soft=True)(x, labels), TripletLoss(9.0, soft=True)(x, labels))


def test_triplet_counts_easy_anchors():
    # On a line, only the rows at 3 and 4 are within the margin of 2: their hinges are 2 + 1 - 1 and 2 + 1 - 2.
    x = torch.tensor([[4.0], [5.0], [2.0], [3.0], [100.0]])
    labels = torch.tensor([1, 1, 0, 0, 5])
    value, _ = run(TripletLoss(1.0, "euclidean"), x, labels)
    assert value.item() == pytest.approx((1 + 0 + 0 + 1) / 4)


def test_triplet_euclidean_is_exact_far_from_the_origin():
    x, labels, _ = batch()
    x = (x * 64).round() / 64 + 4096
    value, _ = run(TripletLoss(1.0, "euclidean"), x, labels)
    expected = naive_triplet(x.double(), labels, margin=1.0, distance="euclidean")
    assert value.item() == pytest.approx(expected, rel=1e-5)


PROTOTYPES = torch.tensor([[1.0, 0.0, 0.2], [0.3, 1.0, 0.0], [0.0, 0.0, 0.0], [-1.0, 0.4, 2.0]])
PROTOTYPE_LABELS = torch.tensor([0, 1, 3, 2, 0, -1, 9, 3])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
@pytest.mark.parametrize("soft", [False, True])
def test_prototypes_equal_loops(dtype, distance, soft):
    x = batch(n=8, dim=3)[0].to(dtype)
    prototypes = PROTOTYPES.to(dtype)
    loss = TripletLoss(0.5, distance, soft)
    value, grad = run(loss, x, PROTOTYPE_LABELS, prototypes)

    def naive(v: Tensor) -> float:
        return naive_triplet(v, PROTOTYPE_LABELS, prototypes.double(), 0.5, distance, soft)

    assert value.item() == pytest.approx(naive(x.double()), rel=2e-5) and value > 0.01
    # Rows of the absent class, or of no class, are ignored.
    assert not grad[[3, 5, 6]].any()
    if dtype == torch.float32:
        torch.testing.assert_close(grad.double(), numeric_grad(naive, x), rtol=1e-3, atol=1e-5)


def test_prototypes_need_another_class():
    loss = TripletLoss()
    x, labels = torch.ones(2, 3), torch.tensor([0, 0])
    for prototypes in (torch.empty(0, 3), torch.zeros(3, 3), PROTOTYPES[:1], PROTOTYPES[[0, 2]], PROTOTYPES[[2, 0]]):
        value, grad = run(loss, x, labels, prototypes)
        assert value == 0 and not grad.any()


def test_prototypes_pass_gradients():
    x = batch(n=8, dim=3)[0]
    prototypes = PROTOTYPES.clone().requires_grad_()
    TripletLoss(0.5)(x, PROTOTYPE_LABELS, prototypes).backward()
    assert prototypes.grad[0].any() and not prototypes.grad[2].any()


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_prototypes_equal_to_the_embedding(distance):
    run(TripletLoss(0.3, distance), PROTOTYPES[:2], torch.tensor([0, 1]), PROTOTYPES)
    value, _ = run(TripletLoss(0.3, distance), torch.ones(1, 2), torch.tensor([0]), torch.ones(2, 2))
    assert value.item() == pytest.approx(0.3, abs=1e-6)


def test_triplet_arguments_are_checked():
    with pytest.raises(ValueError, match="'cosine', 'euclidean'"):
        TripletLoss(distance="l1")
    for margin in (-0.1, math.nan):
        with pytest.raises(ValueError, match="margin"):
            TripletLoss(margin=margin)
    with pytest.raises(ValueError, match=r"prototypes must have shape \(C, 2\)"):
        TripletLoss()(UNIT, UNIT_LABELS, torch.ones(3, 4))


# ClampedDFLoss.


def boxes(anchors: int = 6, std: float = 1.0, seed: int = 0, reg_max: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """Random logits, targets on both sides of the valid range, and weights, one of them zero."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(anchors * 4, reg_max, generator=g) * std
    target = torch.rand(anchors, 4, generator=g) * (reg_max + 2) - 1
    weight = torch.rand(anchors, generator=g)
    weight[0] = 0
    target[-1, :2] = torch.tensor([-0.7, reg_max + 0.5])
    return logits, target, weight


@pytest.mark.parametrize("mode", ["hard", "rescale"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("std", [1.0, 10.0, 40.0])
@pytest.mark.parametrize("reg_max", [2, 16])
@pytest.mark.parametrize("weighted", [False, True])
def test_dfl_equals_loops(mode, dtype, std, reg_max, weighted):
    logits, target, weight = (v.to(dtype) for v in boxes(std=std, reg_max=reg_max))
    args = (target, weight) if weighted else (target,)
    expected = [v.double() for v in (logits, *args)]
    value, _ = run(ClampedDFLoss(reg_max, mode=mode), logits, *args)
    assert value.item() == pytest.approx(naive_dfl(*expected), rel=2e-5)
    value, _ = run(ClampedDFLoss(reg_max, 9.0, 1e6, mode), logits, *args)
    assert value.item() == pytest.approx(naive_dfl(*expected, side_max=9.0, mean_max=1e6), rel=2e-5)


@pytest.mark.parametrize("side_max", [1e6, 3.0])
def test_dfl_gradient_equals_finite_differences(side_max):
    logits, target, weight = boxes(anchors=3, std=1.5)
    sides = naive_sides(logits, target)
    assert min(sides) < 3 < max(sides)
    expected = numeric_grad(lambda v: naive_dfl(v, target, weight, side_max, 1e6), logits)
    _, grad = run(ClampedDFLoss(side_max=side_max, mean_max=1e6), logits, target, weight)
    torch.testing.assert_close(grad.double(), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("mode", ["hard", "rescale"])
def test_dfl_of_uniform_logits(mode):
    loss = ClampedDFLoss(mode=mode)
    value, _ = run(loss, torch.zeros(20, 16), torch.rand(5, 4) * 15)
    assert value.item() == pytest.approx(4 * math.log(16), rel=1e-6)
    assert value.item() == pytest.approx(11.0904, abs=5e-5)
    assert int(loss.side_clamped) == int(loss.mean_clamped) == 0


@pytest.mark.parametrize("mode", ["hard", "rescale"])
def test_dfl_equals_ultralytics_when_nothing_clamps(mode):
    oracle = pytest.importorskip("ultralytics.utils.loss").DFLoss(16)
    logits, target, _ = boxes(std=0.5)
    value, grad = run(ClampedDFLoss(mode=mode), logits, target)
    leaf = logits.clone().requires_grad_()
    expected = 4 * oracle(leaf, target.clone()).mean()
    expected.backward()
    assert value < 15
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(grad, leaf.grad)


def test_dfl_target_is_not_modified():
    logits, target, weight = boxes()
    before = target.clone()
    run(ClampedDFLoss(), logits, target, weight)
    assert target.min() < 0 and target.max() > 15 and torch.equal(target, before)


def test_dfl_targets_out_of_range():
    logits = boxes(anchors=1)[0]
    loss = ClampedDFLoss()
    below, above = torch.full((1, 4), -HALF_MAX), torch.full((1, 4), HALF_MAX)
    torch.testing.assert_close(loss(logits, below), loss(logits, torch.zeros(1, 4)))
    torch.testing.assert_close(loss(logits, above), loss(logits, torch.full((1, 4), 14.99)))


def test_dfl_weights():
    logits, target, _ = boxes(anchors=3, std=0.5)
    loss = ClampedDFLoss()
    rows = loss.per_anchor(logits, target)
    assert rows.shape == (3, 1) and rows.dtype == torch.float32
    weight = torch.tensor([1.0, 0.0, 3.0])
    expected = (rows[0, 0] + 3 * rows[2, 0]) / 4
    torch.testing.assert_close(loss(logits, target, weight), expected)
    torch.testing.assert_close(loss(logits, target, weight * 1e-3), expected)
    torch.testing.assert_close(loss(logits, target), rows.mean())
    torch.testing.assert_close(loss(logits, target, torch.ones(3)), rows.mean())
    _, grad = run(loss, logits, target, weight)
    assert not grad[4:8].any() and grad[:4].any() and grad[8:].any()


@pytest.mark.parametrize("mode", ["hard", "rescale"])
def test_dfl_without_anchors_is_zero_and_connected_to_the_graph(mode):
    loss = ClampedDFLoss(mode=mode)
    logits, target, _ = boxes(std=50.0)
    for args in ((target, torch.zeros(6)), (target, torch.zeros(6, dtype=torch.half))):
        value, grad = run(loss, logits, *args)
        assert value == 0 and not grad.any()
    for args in ((), (torch.empty(0),)):
        assert run(loss, torch.empty(0, 16), torch.empty(0, 4), *args)[0] == 0


def wrong(confidence: float, anchors: int = 2) -> tuple[Tensor, Tensor]:
    """Logits sure of bin 0 by `confidence`, and targets around bin 9.25: a side costs about `confidence`."""
    logits = torch.zeros(anchors * 4, 16)
    logits[:, 0] = confidence
    return logits, torch.full((anchors, 4), 9.25)


def test_dfl_hard_mean_clamp():
    loss = ClampedDFLoss()
    value, grad = run(loss, *wrong(10.0))
    assert value == 15 and not grad.any()
    assert (int(loss.side_clamped), int(loss.mean_clamped)) == (0, 1)


def test_dfl_rescaled_mean_clamp():
    logits, target = wrong(10.0)
    loss = ClampedDFLoss(mode="rescale")
    value, grad = run(loss, logits, target)
    free, free_grad = run(ClampedDFLoss(mean_max=1e6), logits, target)
    assert value == 15 and free > 39
    assert int(loss.mean_clamped) == 1
    torch.testing.assert_close(grad, free_grad * 15 / free)
    assert grad.abs().max() > 0.01


@pytest.mark.parametrize("mode", ["hard", "rescale"])
def test_dfl_side_clamp(mode):
    logits, target = wrong(30.0, anchors=1)
    logits[1:, 0] = 1.0
    loss = ClampedDFLoss(mean_max=1e6, mode=mode)
    value, grad = run(loss, logits, target)
    free, free_grad = run(ClampedDFLoss(side_max=1e6, mean_max=1e6), logits, target)
    sides = naive_sides(logits.double(), target.double())
    assert value.item() == pytest.approx(20 + sum(sides[1:]), rel=1e-6) and free > value + 9
    assert int(loss.side_clamped) == 1
    torch.testing.assert_close(grad[1:], free_grad[1:])
    torch.testing.assert_close(grad[0], free_grad[0] * (0 if mode == "hard" else 20 / sides[0]))


@pytest.mark.parametrize("seed", range(5))
def test_dfl_modes_have_the_same_value(seed):
    logits, target, weight = boxes(std=30.0, seed=seed)
    hard, rescale = ClampedDFLoss(), ClampedDFLoss(mode="rescale")
    assert torch.equal(hard.per_anchor(logits, target), rescale.per_anchor(logits, target))
    assert torch.equal(hard(logits, target, weight), rescale(logits, target, weight))


@pytest.mark.parametrize("mode", ["hard", "rescale"])
def test_dfl_counts(mode):
    loss = ClampedDFLoss(mode=mode)
    assert int(loss.side_clamped) == int(loss.mean_clamped) == 0
    logits, target = wrong(30.0)
    logits[5] = 0
    leaf = logits.requires_grad_()
    loss(leaf, target)
    loss(leaf, target)
    assert (int(loss.side_clamped), int(loss.mean_clamped)) == (14, 2)
    for count in (loss.side_clamped, loss.mean_clamped):
        assert count.shape == () and not count.requires_grad
    loss.per_anchor(leaf, target)
    assert (int(loss.side_clamped), int(loss.mean_clamped)) == (21, 2)
    loss.clamp_mean(torch.tensor(15.0))
    loss.clamp_mean(torch.tensor(15.5))
    assert (int(loss.side_clamped), int(loss.mean_clamped)) == (21, 3)
    assert int(copy.deepcopy(loss).side_clamped) == 21
    loss.reset_counts()
    assert int(loss.side_clamped) == int(loss.mean_clamped) == 0


def test_dfl_clamp_mean():
    for mode, slope in (("hard", 0.0), ("rescale", 15 / 60)):
        loss = ClampedDFLoss(mode=mode)
        assert run(loss.clamp_mean, torch.tensor(60.0)) == (15, pytest.approx(slope))
        assert run(loss.clamp_mean, torch.tensor(3.0)) == (3, 1)
        assert run(loss.clamp_mean, torch.tensor(0.0))[0] == 0
        assert loss.clamp_mean(torch.tensor(60.0).half()).dtype == torch.float32


@pytest.mark.parametrize("mode", ["hard", "rescale"])
@pytest.mark.parametrize(
    ("dtype", "size"),
    [(torch.float16, HALF_MAX), (torch.bfloat16, 3.3e38), (torch.float32, 1e30), (torch.float32, 3.4e38)],
)
def test_dfl_of_extremes_is_finite(mode, dtype, size):
    signs = torch.randint(0, 2, (24, 16), generator=torch.Generator().manual_seed(1)) * 2.0 - 1
    logits = (signs * size).to(dtype)
    logits[:4] = size
    logits[4:8] = -size
    logits[8:12] = 0
    _, target, weight = boxes()
    target = target.round()
    for w in (None, weight, weight * HALF_MAX):
        value, _ = run(ClampedDFLoss(mode=mode), logits, target.to(dtype), w)
        assert value == 15
    value, _ = run(ClampedDFLoss(mode=mode), logits[:12], target[:3].to(dtype))
    assert value.item() == pytest.approx(4 * math.log(16), rel=1e-6)
    run(ClampedDFLoss(side_max=1e6, mean_max=1e6, mode=mode), logits, target)


@pytest.mark.parametrize("mode", ["hard", "rescale"])
def test_dfl_in_autocast(mode):
    logits, target, weight = boxes()
    loss = ClampedDFLoss(mode=mode)
    value, grad = run(loss, logits, target, weight)
    value2, grad2 = run(loss, logits, target, weight, autocast=True)
    assert torch.equal(value, value2) and torch.equal(grad, grad2)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("std", [0.05, 1.0, 10.0])
@pytest.mark.parametrize("mode", ["hard", "rescale"])
def test_dfl_of_an_untrained_head_is_bounded(seed, std, mode):
    """A head on random features: near 4 ln 16 for small logits, never above 15, gradients clippable to norm 5."""
    g = torch.Generator().manual_seed(seed)
    features = torch.randn(256, 8, generator=g) * 20
    head = nn.Linear(8, 16, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.randn(16, 8, generator=g) * std / (20 * math.sqrt(8)))
    target = torch.rand(64, 4, generator=g) * 15
    value = ClampedDFLoss(mode=mode)(head(features), target)
    value.backward()
    assert torch.isfinite(value) and 0 < value <= 15
    if std < 0.1:
        assert value.item() == pytest.approx(4 * math.log(16), abs=0.1)
    before = nn.utils.clip_grad_norm_(head.parameters(), 5.0)
    assert torch.isfinite(before) and head.weight.grad.norm() <= 5 + 1e-4
    if mode == "hard" and std == 10:
        assert value == 15 and before == 0
    elif std >= 1:
        assert before > 5


def test_dfl_arguments_are_checked():
    with pytest.raises(ValueError, match="'hard', 'rescale'"):
        ClampedDFLoss(mode="soft")
    with pytest.raises(ValueError, match="reg_max"):
        ClampedDFLoss(reg_max=1)
    for name in ("side_max", "mean_max"):
        for limit in (0.0, -1.0, math.nan):
            with pytest.raises(ValueError, match=name):
                ClampedDFLoss(**{name: limit})
    logits, target, weight = boxes()
    loss = ClampedDFLoss()
    for args, name in (
        ((logits[:-1], target), "pred_dist"),
        ((logits[:, :-1], target), "pred_dist"),
        ((logits, target[:, :3]), "target"),
        ((logits, target, weight[:, None]), "weight"),
    ):
        with pytest.raises(ValueError, match=name):
            loss(*args)


# DistillationLoss


def scores(dtype: torch.dtype = torch.float32, std: float = 2.0) -> tuple[Tensor, Tensor]:
    """Logits of a student and scores of a teacher, (5, 3)."""
    g = torch.Generator().manual_seed(3)
    return (torch.randn(5, 3, generator=g) * std).to(dtype), torch.rand(5, 3, generator=g)


@pytest.mark.parametrize("dtype", DTYPES)
def test_distillation_equals_the_divergence_of_bernoulli_variables(dtype):
    logits, targets = scores(dtype)
    value, grad = run(DistillationLoss(), logits, targets, torch.tensor(4.0))
    student = torch.distributions.Bernoulli(logits=logits.double())
    expected = torch.distributions.kl_divergence(torch.distributions.Bernoulli(targets.double()), student).sum() / 4
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(grad.float(), (logits.float().sigmoid() - targets) / 4, rtol=1e-2, atol=1e-3)


def test_distillation_is_zero_where_student_and_teacher_agree():
    logits, _ = scores()
    value, grad = run(DistillationLoss(), logits, logits.sigmoid(), torch.tensor(1.0))
    assert abs(value.item()) < 1e-5 and grad.abs().max() < 1e-6
    hard = torch.tensor([[1.0, 0.0]])  # teachers without a doubt
    value, _ = run(DistillationLoss(), torch.tensor([[2.0, -1.0]]), hard, torch.tensor(1.0))
    assert value.item() == pytest.approx(math.log1p(math.exp(-2)) + math.log1p(math.exp(-1)), rel=1e-6)


def test_distillation_includes_masked_logits_only():
    logits, targets = scores()
    counted = torch.tensor([True, False, True, False, False])
    value, grad = run(DistillationLoss(), logits, targets, torch.tensor(2.0), counted[:, None])
    expected, part = run(DistillationLoss(), logits[counted], targets[counted], torch.tensor(2.0))
    torch.testing.assert_close(value, expected)
    assert torch.equal(grad[counted], part) and not grad[~counted].any()


def test_distillation_never_divides_by_less_than_one():
    logits, targets = scores()
    one, _ = run(DistillationLoss(), logits, targets, torch.tensor(1.0))
    assert torch.equal(run(DistillationLoss(), logits, targets, torch.tensor(0.0))[0], one)


def test_distillation_without_logits_is_zero_and_connected_to_the_graph():
    value, grad = run(DistillationLoss(), torch.zeros(0, 3), torch.zeros(0, 3), torch.tensor(0.0))
    assert value == 0 and grad.shape == (0, 3)
    value, grad = run(DistillationLoss(), *scores(), torch.tensor(1.0), torch.tensor(False))
    assert value == 0 and not grad.any()


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float16, HALF_MAX), (torch.float32, 3.3e38), (torch.float32, 1e-40)]
)
def test_distillation_of_extremes_is_finite(dtype, size):
    logits = (torch.tensor([[1.0, -1.0], [-1.0, 1.0]]) * size).to(dtype)
    for targets in (torch.eye(2), 1 - torch.eye(2), torch.tensor([[-0.1, 1.1], [0.5, 1e-40]])):
        value, grad = run(DistillationLoss(), logits, targets, torch.tensor(1.0))
        assert torch.isfinite(value) and torch.isfinite(grad).all()


def test_distillation_needs_one_target_for_each_logit():
    with pytest.raises(ValueError, match=r"logits \(2, 3\) and targets \(3, 2\) must have the same shape"):
        DistillationLoss()(torch.zeros(2, 3), torch.zeros(3, 2), torch.tensor(1.0))
