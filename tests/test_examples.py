import runpy
import sys
from pathlib import Path

import torch
from ultralytics import YOLO
from ultralytics.data.utils import check_det_dataset

import yolo_fewshot  # noqa: F401  (registers the plugin)

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_add_classes(tmp_path, capsys, monkeypatch):
    torch.manual_seed(0)
    model = YOLO("fewshot.yaml")
    data = check_det_dataset("fewshot-demo.yaml")
    model.model.names = {i: data["names"].get(i, f"class {i}") for i in range(80)}
    model.ckpt = {"train_args": {"imgsz": 64}}
    model.save(tmp_path / "base.pt")
    monkeypatch.setattr(sys, "argv", ["add_classes.py", str(tmp_path / "base.pt"), "fewshot-demo-novel.yaml"])
    runpy.run_path(str(EXAMPLES / "add_classes.py"), run_name="__main__")
    assert "with 40 shots of 8 classes" in capsys.readouterr().out
