"""The full path on the built-in data: base training, episodes, enrollment, grafting, ONNX.

    python examples/full_path.py

It takes about eight minutes on two CPU cores. For your own data, give its base.yaml and the data.yaml of the shots (see
my_data.py).
"""

from __future__ import annotations

import sys
from typing import Any

from ultralytics import YOLO

from yolo_fewshot import FewShotYOLO


def main(base: str = "fewshot-demo.yaml", novel: str = "fewshot-demo-novel.yaml", **settings: Any) -> dict[str, float]:
    """Train, enroll, graft and export, and measure after each step.

    Args:
        base (str): data.yaml of the base classes.
        novel (str): data.yaml whose train split holds the shots of the novel classes.
        **settings (Any): Further arguments of every training.

    Returns:
        (dict[str, float]): mAP50 of the novel classes on the val split of `novel` after each step.
    """
    common = {"imgsz": 128, "plots": False, **settings}
    stages = {"lr0": 0.002, "optimizer": "AdamW", "val": False, "warmup_bias_lr": 0.0}
    map50s = {}

    # 1: ordinary detection training of the few-shot head.
    model = YOLO("fewshot.yaml")
    model.train(data=base, **{"cfg": "stage1.yaml", "epochs": 8, **stages, **common})
    map50s["base training, enrolled"] = measure(str(model.trainer.best), novel)

    # 2: episodes. They train the embedding to separate classes that it has never seen.
    model = YOLO(model.trainer.best)
    model.train(data=base, **{"cfg": "stage2.yaml", "epochs": 8, "episodes": 60, "lrf": 0.05, **stages, **common})
    few_shot = str(model.trainer.best)
    map50s["episodes, enrolled"] = measure(few_shot, novel)

    # 3: layers of their own for the novel classes, trained on the shots. The result is a stock model of all classes.
    model = FewShotYOLO(few_shot)
    model.train(data=novel, **{"cfg": "stage3.yaml", **common})
    grafted = FewShotYOLO(model.trainer.best)
    map50s["grafted"] = grafted.val(data=novel, plots=False).box.map50

    # An ordinary ONNX file; serve_onnx.py runs it.
    file = grafted.export(format="onnx")
    map50s["grafted, ONNX"] = YOLO(file, task="detect").val(data=novel, plots=False).box.map50
    for step, map50 in map50s.items():
        print(f"{step:<26}novel mAP50 {map50:.3f}")
    print(f"The model for deployment is {file}")
    return map50s


def measure(weights: str, novel: str) -> float:
    """Return the mAP50 of the novel classes, enrolled for this measurement only."""
    return FewShotYOLO(weights).val(data=novel, support=novel, plots=False).box.map50


if __name__ == "__main__":
    main(*sys.argv[1:])
