import logging

import pytest
import torch
from torch import nn

from yolo_fewshot.guard import Guard, describe_nonfinite


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1))
    model(torch.randn(8, 4)).sum().backward()
    return model


def norm_of(model):
    return torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()


def test_the_clip_is_on_the_gradient_of_the_loss_itself(model):
    """A loss multiplied by 8 before the backward pass, as by a batch size, is clipped where the bare loss would be."""
    raw = norm_of(model)
    guard = Guard()
    assert guard.clip(model, max_norm=raw / 16, scale=8.0, loss=torch.tensor(1.0))
    assert norm_of(model) == pytest.approx(raw / 2, rel=1e-4)
    assert guard.columns() == {"train/grad_norm": pytest.approx(raw / 8, rel=1e-3), "train/skipped": 0}


def test_small_gradients_are_left_alone(model):
    before = [p.grad.clone() for p in model.parameters()]
    assert Guard().clip(model, max_norm=1e6, scale=1.0, loss=torch.tensor(1.0))
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_non_finite_gradient_is_skipped_counted_and_named(model, bad, caplog):
    guard = Guard()
    model[1].weight.grad[0, 1] = bad
    logging.getLogger("ultralytics").addHandler(caplog.handler)
    try:
        assert not guard.clip(model, 5.0, 1.0, torch.tensor(1.0))
    finally:
        logging.getLogger("ultralytics").removeHandler(caplog.handler)
    assert guard.skipped == 1 and guard.norms == []
    assert "1.weight" in caplog.text and "min=" in caplog.text and "mean=" in caplog.text


def test_a_non_finite_loss_is_skipped(model):
    assert not Guard().clip(model, 5.0, 1.0, torch.tensor(float("nan")))


def test_counters_start_anew_each_epoch(model):
    guard = Guard()
    guard.clip(model, 5.0, 1.0, torch.tensor(float("nan")))
    guard.reset()
    assert guard.columns() == {"train/grad_norm": 0.0, "train/skipped": 0}


def test_the_first_bad_parameter_is_described(model):
    model[0].weight.grad[:] = torch.tensor([1.0, 2.0, float("inf"), 4.0])
    assert describe_nonfinite(model.named_parameters()).startswith("gradient in 0.weight: min=1, max=inf")
    model[0].weight.grad.zero_()
    assert describe_nonfinite(model.named_parameters()) == ""
