from types import SimpleNamespace

import pytest
import torch

from yolo_fewshot.evaluate import recorder
from yolo_fewshot.evaluate.report import NOTES


@pytest.mark.parametrize("device, batch", [("cpu", 1), ("mps", 1), ("cuda", 32)])
def test_batches_are_for_cuda_alone(monkeypatch, tmp_path, device, batch):
    """Elsewhere Ultralytics' NMS may take longer than its time limit for a batch."""
    seen = []

    def val(validator, **keys):
        seen.append(keys["batch"])
        validator()

    monkeypatch.setattr(recorder, "select_device", lambda *_, **__: torch.device(device))
    monkeypatch.setattr(recorder, "Recorder", lambda _: SimpleNamespace(images=["a"], speed={"inference": 2.0}))
    assert recorder.record(SimpleNamespace(val=val), "data.yaml", ("dog",), tmp_path) == (["a"], 2.0)
    assert seen == [batch] and "in batches of 32 on a CUDA GPU, one by one elsewhere" in NOTES
