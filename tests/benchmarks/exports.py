"""Agreement of exported models with their checkpoint on real images.

    python tests/benchmarks/exports.py site-a.pt images 160

Arguments: a checkpoint, a folder of images (the first 60 are used) and the image size. Exports are written beside the
checkpoint.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from ultralytics import YOLO
from ultralytics.utils.metrics import box_iou

from yolo_fewshot import FewShotYOLO

FORMATS = {
    "torchscript": {"format": "torchscript"},
    "onnx": {"format": "onnx"},
    "onnx dynamic=True": {"format": "onnx", "dynamic": True},
    "onnx nms=True": {"format": "onnx", "nms": True, "conf": 0.25},
    "onnx quantize=16": {"format": "onnx", "quantize": 16},
    "openvino": {"format": "openvino"},
}


def detect(model: YOLO, images: list[Path], imgsz: int) -> list[torch.Tensor]:
    """Return the detections of every image, (n, 6) each."""
    return [model.predict(p, imgsz=imgsz, rect=False, verbose=False)[0].boxes.data.cpu() for p in images]


def compare(found: list[torch.Tensor], expected: list[torch.Tensor]) -> str:
    """Return how many detections agree in class and box, and the maximum difference of boxes and scores."""
    boxes = scores = agreed = 0
    for a, b in zip(found, expected):
        same = (box_iou(b[:, :4], a[:, :4]) > 0.8) & (b[:, 5:] == a[:, 5])
        for i, j in same.nonzero().tolist():
            boxes, scores = max(boxes, (b[i, :4] - a[j, :4]).abs().max()), max(scores, (b[i, 4] - a[j, 4]).abs())
        agreed += int(same.any(1).sum())
    total = [sum(map(len, x)) for x in (found, expected)]
    return f"{agreed} of {total[1]} ({total[0]} found), boxes to {boxes:.2g} px, scores to {scores:.2g}"


def main(weights: str, folder: str, imgsz: str) -> None:
    """Print the agreement of every format."""
    images, size = sorted(Path(folder).iterdir())[:60], int(imgsz)
    expected = detect(FewShotYOLO(weights), images, size)
    for name, settings in FORMATS.items():
        file = FewShotYOLO(weights).export(imgsz=size, **settings)
        print(f"{name:<20}{compare(detect(YOLO(file, task='detect'), images, size), expected)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
