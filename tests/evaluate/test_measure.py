from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from yolo_fewshot.evaluate import learn, measure
from yolo_fewshot.evaluate.plan import Data

SETTINGS = {
    **{"imgsz": 96, "device": "cpu", "workers": 0, "max_det": 50, "iou": 0.6, "conf": 0.01, "nms": False},
    **{"agnostic_nms": True, "quantize": 16, "fliplr": 0.0, "background": "images"},
}


@pytest.fixture
def plan():
    data = Data(Path("data"), ("dog",), ("cat",), None, Path("old.yaml"), False)
    return SimpleNamespace(data=data, settings=SETTINGS)


def test_settings_of_detection_reach_validation_and_false_alarms(plan, monkeypatch, tmp_path):
    validated, predicted = [], []
    monkeypatch.setattr(measure, "YOLO", lambda _: SimpleNamespace(model=torch.nn.Linear(1, 1)))
    monkeypatch.setattr(measure, "record", lambda *_, **keys: validated.append(keys) or ([], 1.0))
    monkeypatch.setattr(measure, "false_alarms", lambda *_, **keys: predicted.append(keys) or 0.5)
    monkeypatch.setattr(measure.coco, "available", lambda: False)
    assert measure.measure(plan, Path("best.pt"), Path("data.yaml"), tmp_path)["GFSOD_alarms"] == 0.5
    common = {"imgsz": 96, "device": "cpu", "iou": 0.6, "nms": False, "agnostic_nms": True, "quantize": 16}
    assert validated == [{**common, "workers": 0, "max_det": 50, "conf": 0.01}] * 2
    assert predicted == [common]


def test_enrollment_is_for_the_head_that_is_measured(plan, monkeypatch, tmp_path):
    enrolled = []
    model = SimpleNamespace(enroll=lambda *_, **keys: enrolled.append(keys), save=lambda _: None)
    monkeypatch.setattr(learn, "FewShotYOLO", lambda _: model)
    learn._enroll(plan, tmp_path / "run", Path("best.pt"), Path("shots.yaml"), "fit")
    assert enrolled == [{"imgsz": 96, "device": "cpu", "nms": False, "method": "fit", "background": "images"}]
