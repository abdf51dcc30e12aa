"""Serve the exported ONNX file with onnxruntime only, without this package, Ultralytics and torch.

    yolo export model=best.pt format=onnx support=shots.yaml
    python examples/serve_onnx.py best.onnx street.jpg

An export of a few-shot model is an ordinary YOLO graph. Its metadata has the class names, including the enrolled ones.
"""

from __future__ import annotations

import ast
import sys
from typing import NamedTuple

import cv2
import numpy as np
import onnxruntime


class Detection(NamedTuple):
    """One detection.

    Attributes:
        name (str): Class name.
        score (float): Confidence, 0 to 1.
        box (tuple[float, ...]): Corners x1, y1, x2, y2 in pixels of the image.
    """

    name: str
    score: float
    box: tuple[float, ...]


class Detector:
    """A YOLO detector in an ONNX file of a fixed image size, exported without `nms=`."""

    def __init__(self, file: str):
        """Load the file.

        Args:
            file (str): ONNX file.
        """
        self.session = onnxruntime.InferenceSession(file, providers=onnxruntime.get_available_providers())
        metadata = self.session.get_modelmeta().custom_metadata_map
        self.names: dict[int, str] = ast.literal_eval(metadata["names"])
        self.height, self.width = ast.literal_eval(metadata["imgsz"])
        shape = self.session.get_outputs()[0].shape
        if len(shape) != 3 or shape[1] != 4 + len(self.names):
            raise ValueError(f"{file} has an output of shape {shape}. Export it without nms=.")

    def __call__(self, image: np.ndarray, conf: float = 0.25, iou: float = 0.7) -> list[Detection]:
        """Detect objects in an image.

        Args:
            image (np.ndarray): BGR image, (h, w, 3) uint8.
            conf (float): Minimum confidence.
            iou (float): IoU above which NMS removes the weaker of two boxes of a class.

        Returns:
            (list[Detection]): Detections, the most confident first.
        """
        pixels, scale, margin = self.letterbox(image)
        rows = self.session.run(None, {self.session.get_inputs()[0].name: pixels})[0][0].T  # (anchors, 4 + classes)
        scores, classes = rows[:, 4:].max(1), rows[:, 4:].argmax(1)
        rows, scores, classes = (x[scores > conf] for x in (rows, scores, classes))
        center, size = (rows[:, :2] - margin) / scale, rows[:, 2:4] / scale
        corners = np.concatenate([center - size / 2, center + size / 2], 1)
        kept = cv2.dnn.NMSBoxesBatched(
            np.concatenate([corners[:, :2], size], 1).tolist(), scores.tolist(), classes.tolist(), conf, iou
        )
        limit = np.tile(image.shape[1::-1], 2)
        found = [
            Detection(self.names[classes[i]], float(scores[i]), tuple(corners[i].clip(0, limit).tolist())) for i in kept
        ]
        return sorted(found, key=lambda x: -x.score)

    def letterbox(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
        """Return the network input, (1, 3, H, W) float32 in 0..1 RGB, with its scale and margin in x and y."""
        h, w = image.shape[:2]
        scale = min(self.height / h, self.width / w)
        size = round(w * scale), round(h * scale)
        left, top = (round((m - s) / 2 - 0.1) for m, s in zip((self.width, self.height), size))
        canvas = np.full((self.height, self.width, 3), 114, np.uint8)
        if size != (w, h):
            image = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
        canvas[top : top + size[1], left : left + size[0]] = image
        return (
            np.ascontiguousarray(canvas[..., ::-1].transpose(2, 0, 1)[None], np.float32) / 255,
            np.divide(size, (w, h)),
            (left, top),
        )


def main(file: str, image: str, conf: str = "0.25") -> list[Detection]:
    """Print the detections in an image.

    Args:
        file (str): ONNX file.
        image (str): Image.
        conf (str): Minimum confidence.

    Returns:
        (list[Detection]): Detections.
    """
    found = Detector(file)(cv2.imread(image), float(conf))
    for name, score, box in found:
        print(f"{name:<16}{score:.3f}  " + " ".join(f"{x:.1f}" for x in box))
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
