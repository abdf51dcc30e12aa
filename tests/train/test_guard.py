import copy
import math
import subprocess
import sys

import pytest
import torch
from torch import nn

from yolo_fewshot.train.guard import Guard, nonfinite

pytestmark = pytest.mark.oldest

NAN, INF = float("nan"), float("inf")
ONE = torch.tensor(1.0)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    model(torch.randn(8, 4)).square().sum().backward()
    return model


def norm_of(model):
    return math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters()))


def grads_of(model):
    return [p.grad.clone() for p in model.parameters()]


def same(a, b):
    """Equal bit by bit, so that NaN equals NaN."""
    return len(a) == len(b) and all(torch.equal(x.view(torch.int32), y.view(torch.int32)) for x, y in zip(a, b))


def test_the_clip_is_on_the_gradient_of_the_loss_itself(model):
    """A loss times 8, as with a batch size of 8, is clipped at the same gradient of the loss itself."""
    raw, before = norm_of(model), grads_of(model)
    guard = Guard(model)
    assert guard.clip(max_norm=raw / 16, scale=8.0, loss=ONE) is True
    assert norm_of(model) == pytest.approx(raw / 2, rel=1e-4)
    for p, g in zip(model.parameters(), before):
        torch.testing.assert_close(p.grad, g / 2, rtol=1e-4, atol=1e-7)
    assert guard.columns() == {
        "train/grad_norm": pytest.approx(raw / 8, rel=1e-3),  # of the loss itself, before clipping
        "train/steps": 1, "train/clipped": 1, "train/skipped": 0, "train/overflows": 0,
    }  # fmt: skip


@pytest.mark.parametrize("room", [1.001, 1e6])
def test_small_gradients_stay_as_they_are(model, room):
    before, raw = grads_of(model), norm_of(model)
    guard = Guard(model)
    assert guard.clip(max_norm=raw / 8 * room, scale=8.0, loss=ONE)
    assert same(grads_of(model), before)
    assert guard.clipped == 0 and guard.norms == [pytest.approx(raw / 8, rel=1e-5)]


def test_parameters_without_a_gradient_are_skipped(model):
    model[0].weight.grad = None
    expected = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None))
    guard = Guard(model)
    assert guard.clip(1e6, 1.0, ONE) and guard.norms == [pytest.approx(expected, rel=1e-5)]
    model.zero_grad()
    assert guard.clip(1e6, 1.0, ONE) and guard.norms[1] == 0


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("where", ["gradient", "loss", "mean", "variance"])
def test_a_non_finite_value_refuses_the_step_and_changes_no_gradient(model, bad, where):
    guard, loss = Guard(model), ONE
    if where == "gradient":
        model[2].weight.grad[0, 1] = bad
    elif where == "loss":
        loss = torch.tensor(bad, requires_grad=True)
    else:
        (model[1].running_mean if where == "mean" else model[1].running_var)[-1] = bad
    before = grads_of(model)
    assert guard.clip(1e-3, 1.0, loss) is False
    assert same(grads_of(model), before)
    assert guard.norms == [] and guard.clipped == 0


def test_a_norm_beyond_float32_refuses_the_step_of_finite_gradients(model):
    for p in model.parameters():
        p.grad.fill_(2e38)
    before = grads_of(model)
    assert all(torch.isfinite(g).all() for g in before)
    guard = Guard(model)
    assert not guard.clip(5.0, 1.0, ONE)
    assert same(grads_of(model), before) and guard.norms == []


def test_opposite_infinities_do_not_cancel_out(model):
    model[0].bias.grad[0], model[2].bias.grad[0] = INF, -INF
    assert not Guard(model).clip(5.0, 1.0, ONE)


def test_a_model_without_statistics():
    model = nn.Linear(3, 1)
    model(torch.ones(2, 3)).sum().backward()
    guard, source = Guard(model), copy.deepcopy(model)
    assert guard.clip(5.0, 1.0, ONE) and not guard.clip(5.0, 1.0, torch.tensor(NAN))
    assert guard.undo(source, torch.optim.SGD(model.parameters(), lr=0.1)) == []


def test_skips_and_overflows_are_counted_separately_and_only_skips_in_a_row(model):
    guard = Guard(model)
    for overflow in (False, True, False):
        guard.skip(overflow)
    assert (guard.skipped, guard.overflows, guard.in_a_row) == (2, 1, 2)
    columns = guard.columns()
    assert columns["train/skipped"] == 2 and columns["train/overflows"] == 1 and columns["train/grad_norm"] == 0.0
    guard.reset()  # a new epoch continues steps in a row
    assert guard.columns() == dict.fromkeys(columns, 0) and guard.in_a_row == 2
    assert not guard.clip(5.0, 1.0, torch.tensor(NAN)) and guard.in_a_row == 2
    assert guard.clip(5.0, 1.0, ONE) and guard.in_a_row == 0


def test_the_norm_in_the_columns_is_the_mean_over_the_steps_that_were_taken(model):
    guard, raw = Guard(model), norm_of(model)
    assert guard.clip(1e6, 1.0, ONE)
    for p in model.parameters():
        p.grad.mul_(3)
    assert guard.clip(1e6, 1.0, ONE) and not guard.clip(1e6, 1.0, torch.tensor(INF))
    assert guard.columns()["train/grad_norm"] == pytest.approx(2 * raw, rel=1e-4)


def buffers_of(model):
    return {k: b.clone() for k, b in model.named_buffers() if b.is_floating_point()}


@pytest.mark.parametrize("taken", [False, True])
def test_undo_restores_the_statistics_of_the_last_step(model, taken):
    """At the start of training and after a step, also if the batches of several skipped steps came since."""
    guard = Guard(model)
    optimizer, source = torch.optim.SGD(model.parameters(), lr=0.1), copy.deepcopy(model)
    source[1].running_mean.fill_(7)  # undo takes weights alone from the moving average
    if taken:
        model(torch.randn(8, 4))
        assert guard.clip(5.0, 1.0, ONE)
    good = buffers_of(model)
    for batch in (torch.randn(8, 4), torch.full((8, 4), NAN)):
        model(batch)
        assert not guard.clip(5.0, 1.0, torch.tensor(NAN))
    assert all(b.isnan().all() for b in buffers_of(model).values())
    assert guard.undo(source, optimizer) == []
    assert same(list(buffers_of(model).values()), list(good.values()))
    model(torch.randn(8, 4))  # the kept statistics must not be a view of the buffers
    guard.undo(source, optimizer)
    assert same(list(buffers_of(model).values()), list(good.values()))


def test_undo_replaces_non_finite_weights_alone_and_drops_their_optimizer_state(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    guard = Guard(model)
    optimizer.step()
    source = copy.deepcopy(model)
    with torch.no_grad():
        for p in source.parameters():
            p.add_(1)
        model[0].weight[1, 2], model[2].bias[0] = NAN, INF
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    state = {k: {n: s.clone() for n, s in optimizer.state[p].items()} for k, p in model.named_parameters()}
    assert guard.undo(source, optimizer) == ["0.weight", "2.bias"]
    for k, p in model.named_parameters():
        if k in {"0.weight", "2.bias"}:
            assert torch.equal(p, dict(source.named_parameters())[k]) and p not in optimizer.state
        else:
            assert torch.equal(p, before[k])
            assert all(torch.equal(s, state[k][n]) for n, s in optimizer.state[p].items()) and optimizer.state[p]
    model(torch.randn(8, 4)).sum().backward()
    optimizer.step()  # initializes the state again
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_undo_fails_if_the_moving_average_is_not_finite_either(model):
    source, optimizer = copy.deepcopy(model), torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.no_grad():
        source[0].bias[0] = NAN  # the model's weight is finite and needs no source
        model[2].weight[0, 0] = NAN
    guard = Guard(model)
    assert guard.undo(source, optimizer) == ["2.weight"]
    with torch.no_grad():
        source[2].weight[0, 2] = INF
        model[2].weight[0, 0] = NAN
    with pytest.raises(FloatingPointError, match=r"2\.weight.*moving average.*lr0"):
        guard.undo(source, optimizer)


def test_nonfinite_returns_names_in_order():
    tensors = {"a": torch.tensor([1.0, NAN]), "b": torch.zeros(0), "c": torch.ones(2, 2), "d": torch.tensor(-INF)}
    assert nonfinite(tensors) == ["a", "d"] and nonfinite({}) == []


WORKER = """
import sys
import torch
import torch.distributed as dist
from torch import nn
from yolo_fewshot.train.guard import Guard

rank, file = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
model(torch.randn(4, 2)).square().sum().backward()
guard, answers = Guard(model), []
for loss, statistic in ((1.0, 0.0), (float("nan"), 0.0), (float("inf"), 0.0), (1.0, float("nan")), (1.0, 0.0)):
    model[1].running_mean.fill_(statistic if rank else 0.0)  # only the second process is not finite
    answers.append(guard.clip(5.0, 1.0, torch.tensor(loss if rank else 1.0)))
print("ANSWERS", answers, len(guard.norms))
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_refuse_a_step_that_is_not_finite_in_one_of_them(tmp_path):
    command = [sys.executable, "-c", WORKER]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    runs = [subprocess.Popen([*command, str(rank), str(tmp_path / "init")], **pipes) for rank in (0, 1)]
    try:
        outputs = [run.communicate(timeout=60) for run in runs]
    finally:
        for run in runs:
            run.kill()
    for out, err in outputs:
        assert out.partition("ANSWERS")[2].strip() == "[True, False, False, False, True] 2", err
