"""Speed of few-shot and grafted models against stock ones of the same family, and of enrollment.

    python tests/benchmarks/inference.py

Forward passes of the models alternate in one run. Prints medians and ratios of medians, and FLOPs of grafted models.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import cv2
import numpy as np
import torch
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils.torch_utils import get_flops

from yolo_fewshot.data.support import read_support
from yolo_fewshot.enroll.enroll import enroll
from yolo_fewshot.nn.graft import new_graft, unite
from yolo_fewshot.nn.model import FewShotDetectionModel


def compare(runs: dict[str, Callable], repeats: int = 40) -> None:
    """Print the median time of each function, called in turn, and its ratio to the first one's."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(repeats + 5):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if i >= 5:
                times[name].append(time.perf_counter() - start)
    base = statistics.median(next(iter(times.values())))
    for name, t in times.items():
        low, high = np.quantile(t, (0.25, 0.75)) * 1e3
        m = statistics.median(t)
        print(f"  {name:<34}{m * 1e3:8.2f} ms  (quartiles {low:.2f} to {high:.2f})  ratio {m / base:.3f}")


@torch.inference_mode()
def inference(family: str, imgsz: int = 320, nc: int = 100) -> None:
    """Compare forward passes."""
    stock = DetectionModel(f"{family}.yaml", nc=nc, verbose=False).eval()
    ours = FewShotDetectionModel(f"{family}-fewshot.yaml", nc=nc, verbose=False).eval()
    models = {
        "stock, fused as in predict": deepcopy(stock).fuse(verbose=False),
        "few-shot, folded as in predict": ours.fuse(verbose=False),
        "stock, not fused": stock,
        "few-shot, neither fused nor folded": ours,
    }
    x = torch.rand(1, 3, imgsz, imgsz)
    print(f"{family}, {nc} classes, one image of {imgsz} x {imgsz}, {torch.get_num_threads()} threads")
    names = list(models)
    for pair in (names[:2], names[2:]):
        compare({name: lambda m=models[name]: m(x) for name in pair})


@torch.inference_mode()
def grafts(scale: str, time_it: bool, imgsz: int = 640) -> None:
    """Compare a detector of 80 classes with the same after seven more were grafted onto it."""
    stock = DetectionModel(f"{scale}.yaml", nc=80, verbose=False).eval()
    models = {"stock": stock}
    for part in ("head", "neck", "all"):
        models[f"graft={part}"] = unite(new_graft(stock, [f"new{i}" for i in range(7)], part)).eval()
    models = {name: m.fuse(verbose=False) for name, m in models.items()}
    flops = {name: get_flops(m, imgsz) for name, m in models.items()}
    ratios = ", ".join(f"{name} {v / flops['stock']:.2f}" for name, v in flops.items())
    print(f"{scale}, one image of {imgsz} x {imgsz}, FLOPs: {ratios}")
    if time_it:
        x = torch.rand(1, 3, imgsz, imgsz)
        compare({name: lambda m=m: m(x) for name, m in models.items()}, repeats=20)


def enrollment(classes: int = 20, shots: int = 5, imgsz: int = 320) -> None:
    """Time enrollment from images with one shot each."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name in ("images", "labels"):
            (root / name).mkdir()
        for i in range(classes * shots):
            cv2.imwrite(f"{root}/images/{i:04}.jpg", rng.integers(0, 255, (imgsz, imgsz, 3), dtype=np.uint8))
            (root / f"labels/{i:04}.txt").write_text(f"{i % classes} 0.5 0.5 {rng.uniform(0.1, 0.5):.3f} 0.3\n")
        names = "\n".join(f"  {i}: class{i}" for i in range(classes))
        (root / "shots.yaml").write_text(f"train: images\nnames:\n{names}\n")
        for method in ("mean", "fit", "auto"):
            model = FewShotDetectionModel("yolo11n-fewshot.yaml", nc=80, verbose=False).eval()
            model.names, model.args = {i: f"base{i}" for i in range(80)}, {"fliplr": 0.5, "hsv_v": 0.4}
            start = time.perf_counter()
            enroll(model, read_support(root / "shots.yaml", model.names), imgsz, method=method)
            print(f"  {method}: {classes} classes x {shots} shots, {imgsz} px: {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    torch.manual_seed(0)
    for family in ("yolo11n", "yolov8n", "yolo26n"):
        inference(family)
    for scale in ("yolo11n", "yolo11m", "yolov8n", "yolo26n"):
        grafts(scale, time_it=scale == "yolo11n")
    enrollment()
