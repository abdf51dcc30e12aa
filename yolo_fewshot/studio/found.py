"""What is found in an image, by the learned classes or by a model, and how sure that is."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torchvision.ops import batched_nms

from yolo_fewshot.enroll.detection import IOU_NMS
from yolo_fewshot.nn.rows import ClassRows
from yolo_fewshot.studio.learning import Learned
from yolo_fewshot.studio.project import IOU_SAME, LabeledImage, iou
from yolo_fewshot.studio.scenes import Scene
from yolo_fewshot.yolo import FewShotYOLO

CONF = 0.25  # threshold of a class without a better one, as in Ultralytics
CONF_MIN = 0.02  # of what is kept, so that a threshold can be lowered
MAX_FOUND = 100  # in an image


class Found(NamedTuple):
    """A detection.

    Attributes:
        name (str): Class name.
        conf (float): Confidence.
        xyxy (tuple[float, float, float, float]): Corners in 0..1.
        known (bool): Whether it is of the detector's own classes.
    """

    name: str
    conf: float
    xyxy: tuple[float, float, float, float]
    known: bool


def find(scene: Scene, learned: Learned | None, rows: ClassRows) -> list[Found]:
    """Find the learned classes in a scene.

    Args:
        scene (Scene): What the network has seen in the image.
        learned (Learned, optional): The classes, None if there are none.
        rows (ClassRows): Class rows of the network.

    Returns:
        (list[Found]): The detections, the most certain first; without thresholds.
    """
    if learned is None or not learned.names:
        return []
    anchors, space = scene.features.anchors[0], rows.spaces()[0]
    scores, cls = space.logits(anchors.embeds, anchors.level, *learned.weights[0]).sigmoid().max(1)
    a = ((scores > CONF_MIN) & (scores >= scene.rival)).nonzero()[:, 0]  # as in Ultralytics, the best class alone
    conf, c, boxes = scores[a], cls[a], scene.boxes[a]
    # The one-to-one branch has no double detections.
    best = conf.argsort(descending=True) if rows.branches[0] else batched_nms(anchors.boxes[a], conf, c, IOU_NMS)
    best = best[:MAX_FOUND]
    found = zip(c[best].tolist(), conf[best].tolist(), boxes[best].tolist())
    return [Found(learned.names[i], p, tuple(b), False) for i, p, b in found]


def found_by(yolo: FewShotYOLO, file: Path, imgsz: int, device: torch.device, new: Collection[str]) -> list[Found]:
    """Return what a model finds in an image.

    Args:
        yolo (FewShotYOLO): The model.
        file (Path): The image.
        imgsz (int): Image size in pixels.
        device (torch.device): Device.
        new (Collection[str]): Classes that are not its own.
    """
    result = yolo.predict(
        str(file), imgsz=imgsz, conf=0.05, device=device, verbose=False, save=False, max_det=MAX_FOUND
    )[0]
    boxes = result.boxes if result.obb is None else result.obb
    corners = boxes.xyxy.cpu() / torch.tensor(result.orig_shape[::-1]).repeat(2)
    names = [str(result.names[int(c)]) for c in boxes.cls.tolist()]
    rows = zip(names, boxes.conf.tolist(), corners.clamp(0, 1).tolist())
    return [Found(n, c, tuple(b), n not in new) for n, c, b in rows]


def as_sure_as_of_shots(found: Mapping[str, list[Found]], images: Iterable[LabeledImage]) -> dict[str, float]:
    """Return half the median confidence of the shots of every class, at most Ultralytics' default threshold.

    Args:
        found (Mapping[str, list[Found]]): What is found, by image.
        images (Iterable[LabeledImage]): Images with the shots.
    """
    sure: dict[str, list[float]] = {}
    for image in images:
        for box in list(image.boxes):
            same = [x for x in found.get(image.key, []) if x.name == box.name]
            same = [x for x in same if iou(x.xyxy, box.xyxy) >= IOU_SAME]
            sure.setdefault(box.name, []).append(max((x.conf for x in same), default=0.0))
    return {n: round(min(max(float(np.median(x)) / 2, 2 * CONF_MIN), CONF), 3) for n, x in sure.items()}


def uncertainty(conf: float, threshold: float) -> float:
    """Return 1 for a confidence at the threshold, down to 0 for one that leaves no doubt.

    Args:
        conf (float): Confidence.
        threshold (float): Threshold of the class.
    """
    conf, threshold = (min(max(x, 1e-4), 1 - 1e-4) for x in (conf, threshold))
    odds = conf / (1 - conf) * (1 - threshold) / threshold
    return 1 - abs(odds - 1) / (odds + 1)
