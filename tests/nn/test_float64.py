"""Apple GPUs have no float64: nothing that a user does may ask a device for it."""

from copy import deepcopy

import pytest
import torch
from standin import DEVICE, Device, OnDevice, to_device
from test_criterion import make
from test_features import BASE, draw_shots, model_of

from yolo_fewshot.data.support import read_support
from yolo_fewshot.enroll import features
from yolo_fewshot.enroll.enroll import enroll
from yolo_fewshot.enroll.features import View
from yolo_fewshot.nn.criterion import branch_losses
from yolo_fewshot.train.guard import Guard
from yolo_fewshot.train.monitor import LossMonitor
from yolo_fewshot.train.retention import Teacher, replay_targets

pytestmark = pytest.mark.slow

FAMILIES = ["yolo11n-fewshot.yaml", "yolo26n-fewshot.yaml"]
OFF = torch.amp.GradScaler("cpu", enabled=False)
DOUBLE = {torch.float64}


@pytest.fixture
def device():
    with Device(refused=DOUBLE) as device:
        yield device


@pytest.mark.parametrize(
    "make_double",
    [
        lambda x: x.double(),
        lambda x: x.to(torch.float64),
        lambda x: torch.zeros(2, dtype=torch.float64, device=x.device),
        lambda x: torch.zeros(2, dtype=torch.float64).to(x.device),
        lambda x: torch.tensor([1.0], dtype=torch.float64, device=x.device),
        lambda x: x.sum(dtype=torch.float64),
    ],
)
def test_stand_in_rejects_float64_as_apple_gpus_do(device, make_double):
    with pytest.raises(TypeError, match="float64"):
        make_double(torch.ones(2, device=DEVICE))


def test_stand_in_allows_float64_on_the_cpu_and_equals_it(device):
    x = torch.tensor([3.0, 4.0], device=DEVICE)
    assert x.cpu().double().tolist() == [3, 4] and torch.ones(2, dtype=torch.float64).sum() == 2
    assert x.norm().item() == 5 and isinstance(x.norm(), OnDevice)
    with pytest.raises(RuntimeError, match="two devices"):
        x + torch.ones(2)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("cfg", FAMILIES)
def test_training_needs_no_float64_on_the_device(device, batch, cfg, stage):
    model, doctor = to_device(make(cfg, stage=stage)), LossMonitor(1)
    batch = to_device(batch)
    if stage == 3:
        start, silent = deepcopy(model), torch.tensor([4, 5], device=DEVICE)
        for loss, retained in zip(branch_losses(model), replay_targets(start, silent)):
            loss.retention = retained
        batch["teacher"] = Teacher(start, silent)(batch["img"])
    guard = Guard(model)
    doctor.begin_batch(model, OFF)
    loss = model(batch)[0].sum()
    loss.backward()
    assert guard.clip(10.0, 1.0, loss)
    assert doctor.columns()["grad/cls"] > 0 and guard.columns()["train/grad_norm"] > 0


@pytest.mark.parametrize("cfg", FAMILIES)
def test_prediction_with_a_folded_head_needs_no_float64_on_the_device(device, batch, cfg):
    model = make(cfg).eval()
    with torch.no_grad():
        expected = model(batch["img"])[0]
        folded = to_device(model).fold()
        found = folded(to_device(batch["img"]))[0]
        assert all(p.device == DEVICE and p.dtype == torch.float32 for p in folded.parameters())
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-3)
        assert model.fuse(verbose=False)(to_device(batch["img"]))[0].device == DEVICE


@pytest.mark.parametrize("method", ["mean", "fit"])
@pytest.mark.parametrize("cfg", FAMILIES)
def test_enrollment_needs_no_float64_on_the_device(device, tmp_path, monkeypatch, cfg, method):
    build = features.build_dataloader  # of Ultralytics, which asks PyTorch about the device by its name
    monkeypatch.setattr(
        features, "build_dataloader", lambda *a, device, **k: build(*a, device=torch.device("cpu"), **k)
    )
    support = read_support(draw_shots(tmp_path, 64), BASE)
    model = model_of(cfg)
    here = deepcopy(model)
    to_device(model)
    for m in (model, here):
        assert set(enroll(m, support, 64, method=method, views=[View()]).classes) == {"square", "disc"}
    for a, b in zip(model.model[-1].branch_prototypes, here.model[-1].branch_prototypes):
        torch.testing.assert_close(a.weight.cpu(), b.weight, rtol=1e-3, atol=1e-3)
