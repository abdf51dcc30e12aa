"""AP as COCO defines it, by faster-coco-eval: 101 recall points, at most 100 detections per image."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np

from yolo_fewshot.evaluate.recorder import Recorded

INSTALL = "COCO AP needs faster-coco-eval, without which its columns stay empty. Install it: pip install "
INSTALL += "'yolo-fewshot[benchmark]'"


def available() -> bool:
    """Return whether faster-coco-eval is installed.

    Returns:
        (bool): True if so.
    """
    return importlib.util.find_spec("faster_coco_eval") is not None


def coco_ap(images: list[Recorded], classes: range) -> tuple[float, float]:
    """Return COCO's AP50 and AP, the means over the labeled ones of some classes.

    Args:
        images (list[Recorded]): Images.
        classes (range): Classes.

    Returns:
        ap50 (float): AP at IoU 0.5; NaN if none of the classes has a label.
        ap (float): Mean of the AP at IoU 0.5 to 0.95.
    """
    from faster_coco_eval import COCO, COCOeval_faster

    labeled = sorted({int(c) for x in images for c in x.classes} & set(classes))
    if not labeled:
        return float("nan"), float("nan")
    labels, found = (
        [
            entry
            for i, x in enumerate(images)
            for entry in _entries(i, *((x.boxes, x.classes) if own else (x.found, x.found_classes)), labeled)
        ]
        for own in (True, False)
    )
    scores = [s for x in images for s, c in zip(x.scores.tolist(), x.found_classes.tolist()) if c in labeled]
    sizes = [{"id": i + 1, "height": int(x.shape[0]), "width": int(x.shape[1])} for i, x in enumerate(images)]
    truth = {
        "images": sizes,
        "annotations": [{**x, "id": i + 1, "iscrowd": 0} for i, x in enumerate(labels)],
        "categories": [{"id": c + 1, "name": str(c)} for c in labeled],
    }
    if not found:
        return 0.0, 0.0
    coco = COCO(truth)
    val = COCOeval_faster(
        coco,
        coco.loadRes([{**x, "score": s} for x, s in zip(found, scores)]),
        iouType="bbox",
        print_function=lambda *_: None,
    )
    val.evaluate()
    val.accumulate()
    val.summarize()
    return float(val.stats_as_dict["AP_50"]), float(val.stats_as_dict["AP_all"])


def _entries(image: int, boxes: np.ndarray, classes: np.ndarray, kept: list[int]) -> list[dict[str, Any]]:
    """Return the boxes x1, y1, x2, y2 of some classes in COCO's format; ids start at 1, since COCO's 0 is no match."""
    sizes = boxes[:, 2:] - boxes[:, :2]
    rows = zip(np.concatenate([boxes[:, :2], sizes], 1).tolist(), classes.tolist())
    return [{"image_id": image + 1, "category_id": c + 1, "bbox": b, "area": b[2] * b[3]} for b, c in rows if c in kept]
