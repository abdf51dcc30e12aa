"""Error analysis: the AP50 of a detector with the errors of one type removed.

    python tests/benchmarks/errors.py model=site-a.pt data=novel_5shot.yaml imgsz=160

After Bolya et al. 2020, "TIDE: A General Toolbox for Identifying Object Detection Errors", arXiv:2008.08115. Works for
stock and few-shot detectors, on the val split. Classes are matched by name.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from ultralytics import YOLO
from ultralytics.data.dataset import YOLODataset
from ultralytics.data.utils import check_det_dataset
from ultralytics.utils.metrics import ap_per_class, box_iou

import yolo_fewshot  # noqa: F401  (registers the plugin)

BACKGROUND, FOREGROUND = 0.1, 0.5  # IoU thresholds of TIDE: below is background, from there on a match


class Image(NamedTuple):
    """Detections in an image, by decreasing confidence, and its objects.

    Attributes:
        cls (np.ndarray): Class of every detection, (M,).
        conf (np.ndarray): Confidence, (M,).
        iou (np.ndarray): IoU with every object, (M, N).
        gt_cls (np.ndarray): Class of every object, (N,).
    """

    cls: np.ndarray
    conf: np.ndarray
    iou: np.ndarray
    gt_cls: np.ndarray

    def select(self, keep: np.ndarray) -> Image:
        """Return the image with the detections of a mask, (M,) bool."""
        return self._replace(cls=self.cls[keep], conf=self.conf[keep], iou=self.iou[keep])

    @property
    def iou_same(self) -> np.ndarray:
        """IoU of every detection with the objects of its class, 0 for other classes, (M, N)."""
        return self.iou * (self.cls[:, None] == self.gt_cls)


def detect(weights: str, data: str, imgsz: int) -> list[Image]:
    """Detect in the val split."""
    model, described = YOLO(weights), check_det_dataset(data)
    index = {str(n): i for i, n in model.names.items()}
    number = np.array([index[str(n)] for n in described["names"].values()])
    labels = YOLODataset(img_path=described["val"], imgsz=imgsz, augment=False, data=described).labels
    images = []
    for x in labels:
        (found,) = model.predict(x["im_file"], imgsz=imgsz, conf=0.001, max_det=300, verbose=False)
        size = torch.tensor([x["shape"][1], x["shape"][0]] * 2)
        boxes = torch.from_numpy(x["bboxes"]) * size
        corners = torch.cat([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], 1)
        rows = found.boxes.data.cpu()
        iou = box_iou(rows[:, :4], corners.float()).numpy().reshape(len(rows), len(boxes))
        images.append(Image(rows[:, 5].numpy(), rows[:, 4].numpy(), iou, number[x["cls"][:, 0].astype(int)]))
    return images


def match(image: Image) -> np.ndarray:
    """Match every detection greedily to the object of highest IoU that is still free, (M,) indices, -1 for none."""
    iou, matched = image.iou_same, np.full(len(image.cls), -1)
    for i in range(len(iou)):
        if iou.shape[1] and iou[i].max() >= FOREGROUND:
            matched[i] = iou[i].argmax()
            iou[:, matched[i]] = 0
    return matched


def ap50(images: list[Image]) -> float:
    """Return the mean AP50 of the classes that have objects."""
    tp = np.concatenate([match(p) >= 0 for p in images])
    parts = (np.concatenate([getattr(p, k) for p in images]) for k in ("conf", "cls", "gt_cls"))
    return float(ap_per_class(tp[:, None], *parts)[5].mean())


def right_classes(p: Image) -> Image:
    """Correct the class of matching detections, and keep the most confident one of each object."""
    best = p.iou.argmax(1) if p.iou.size else np.zeros(len(p.cls), int)
    matches = p.iou[np.arange(len(best)), best] >= FOREGROUND if p.iou.size else np.zeros(len(best), bool)
    first = np.zeros(len(best), bool)
    first[[int(np.flatnonzero(matches & (best == o))[0]) for o in np.unique(best[matches])]] = True
    cls = np.where(matches, p.gt_cls[best], p.cls) if p.iou.size else p.cls
    return p._replace(cls=cls).select(first | ~matches)


def right_boxes(p: Image) -> Image:
    """Correct the box of detections that overlap an object of their class."""
    return p._replace(iou=np.where(p.iou_same >= BACKGROUND, 1.0, p.iou))


def no_confusion(p: Image) -> Image:
    """Remove detections that match an object of another class and none of their own."""
    return p.select((p.iou_same >= FOREGROUND).any(1) | ~(p.iou >= FOREGROUND).any(1))


def no_background(p: Image) -> Image:
    """Remove detections of background."""
    return p.select((p.iou >= BACKGROUND).any(1))


def none_missed(p: Image) -> Image:
    """Remove the objects without a matching detection of their class."""
    found = (p.iou_same >= FOREGROUND).any(0)
    return p._replace(iou=p.iou[:, found], gt_cls=p.gt_cls[found])


def main(model: str, data: str, imgsz: str = "640") -> None:
    """Print the AP50 without errors of each type."""
    images = detect(model, data, int(imgsz))
    overlaps = [(p.iou >= FOREGROUND) for p in images]
    found = sum(int(x.any(0).sum()) for x in overlaps)
    right = sum(
        int((p.cls[x[:, o].argmax()] == p.gt_cls[o]) & x[:, o].any())
        for p, x in zip(images, overlaps)
        for o in range(len(p.gt_cls))
    )
    print(f"{Path(model).name}: AP50 {ap50(images):.3f}")
    print(f"  objects found by a box of any class: {found / sum(len(p.gt_cls) for p in images):.3f}")
    print(f"  of these, with the correct class in the most confident box: {right / max(found, 1):.3f}")
    for change in (right_classes, no_confusion, no_background, right_boxes, none_missed):
        print(f"  AP50 with {change.__name__.replace('_', ' ')}: {ap50([change(p) for p in images]):.3f}")


if __name__ == "__main__":
    main(**dict(x.split("=", 1) for x in sys.argv[1:]))
