"""False alarms: detections of new classes in images without them."""

from __future__ import annotations

from typing import Any

from ultralytics import YOLO

from yolo_fewshot.nn.rows import enrolled_classes

CONF = 0.25  # threshold of a class without a suggested one, Ultralytics' default in predict


def false_alarms(yolo: YOLO, images: list[str], novel: tuple[str, ...], **keys: Any) -> float:
    """Return the number of detections of new classes per image, above their suggested thresholds.

    The images are padded to squares, and predicted one by one: Ultralytics loads a whole list as one batch, whose NMS
    has a time limit, after which it drops the detections of the remaining images.

    Args:
        yolo (YOLO): Model.
        images (list[str]): Images that show none of these classes.
        novel (tuple[str, ...]): Names of the new classes.
        **keys (Any): Further arguments of prediction.

    Returns:
        (float): False alarms per image, NaN without images.
    """
    if not images:
        return float("nan")
    records = enrolled_classes(yolo.model)
    limits = {n: (records.get(n) or {}).get("conf") or CONF for n in novel}
    run = {"conf": min(limits.values()), "max_det": 1000, "rect": False, "verbose": False, "save": False, **keys}
    alarms = 0
    for image in images:
        (result,) = yolo.predict([image], **run)
        names = [result.names[int(c)] for c in result.boxes.cls.tolist()]
        alarms += sum(s >= limits.get(n, float("inf")) for n, s in zip(names, result.boxes.conf.tolist()))
    return alarms / len(images)
