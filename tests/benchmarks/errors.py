"""What keeps a detector from a higher AP50: the AP50 that it would have without errors of one kind.

    python tests/benchmarks/errors.py model=site-a.pt data=novel_5shot.yaml imgsz=160

After Bolya et al. 2020, "TIDE: A General Toolbox for Identifying Object Detection Errors", arXiv:2008.08115. Works for
stock and few-shot detectors alike, on the val split. Classes go by name.
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

NEAR, TRUE = 0.1, 0.5  # IoU of a detection that is meant for an object, and of one that finds it


class Image(NamedTuple):
    """Detections in a image, the most confident first, and its objects.

    Attributes:
        cls (np.ndarray): Class of every detection, (M,).
        conf (np.ndarray): Confidence, (M,).
        iou (np.ndarray): IoU with every object, (M, N).
        truth (np.ndarray): Class of every object, (N,).
    """

    cls: np.ndarray
    conf: np.ndarray
    iou: np.ndarray
    truth: np.ndarray

    def keep(self, rows: np.ndarray) -> Image:
        """Return the image with some of its detections."""
        return self._replace(cls=self.cls[rows], conf=self.conf[rows], iou=self.iou[rows])

    @property
    def own(self) -> np.ndarray:
        """IoU of every detection with the objects of its class, 0 elsewhere, (M, N)."""
        return self.iou * (self.cls[:, None] == self.truth)


def look(weights: str, data: str, imgsz: int) -> list[Image]:
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


def claim(image: Image) -> np.ndarray:
    """Return the object that every detection finds, -1 for none, (M,): the best that no better detection has found."""
    own, found = image.own, np.full(len(image.cls), -1)
    for i in range(len(own)):
        if own.shape[1] and own[i].max() >= TRUE:
            found[i] = own[i].argmax()
            own[:, found[i]] = 0
    return found


def ap50(images: list[Image]) -> float:
    """Return the mean AP50 of the classes that have objects."""
    hits = np.concatenate([claim(p) >= 0 for p in images])
    parts = (np.concatenate([getattr(p, k) for p in images]) for k in ("conf", "cls", "truth"))
    return float(ap_per_class(hits[:, None], *parts)[5].mean())


def right_classes(p: Image) -> Image:
    """Give detections the class of the object that they find, and keep the most confident one of each object."""
    best = p.iou.argmax(1) if p.iou.size else np.zeros(len(p.cls), int)
    finds = p.iou[np.arange(len(best)), best] >= TRUE if p.iou.size else np.zeros(len(best), bool)
    first = np.zeros(len(best), bool)
    first[[int(np.flatnonzero(finds & (best == o))[0]) for o in np.unique(best[finds])]] = True
    cls = np.where(finds, p.truth[best], p.cls) if p.iou.size else p.cls
    return p._replace(cls=cls).keep(first | ~finds)


def right_boxes(p: Image) -> Image:
    """Move detections that lie near an object of their class onto it."""
    return p._replace(iou=np.where(p.own >= NEAR, 1.0, p.iou))


def no_confusion(p: Image) -> Image:
    """Leave out detections that find an object of another class, and none of their own."""
    return p.keep((p.own >= TRUE).any(1) | ~(p.iou >= TRUE).any(1))


def no_background(p: Image) -> Image:
    """Leave out detections that lie near no object."""
    return p.keep((p.iou >= NEAR).any(1))


def none_missed(p: Image) -> Image:
    """Leave out the objects that no detection of their class finds."""
    found = (p.own >= TRUE).any(0)
    return p._replace(iou=p.iou[:, found], truth=p.truth[found])


def main(model: str, data: str, imgsz: str = "640") -> None:
    """Print the figures."""
    images = look(model, data, int(imgsz))
    hit = [(p.iou >= TRUE) for p in images]
    found = sum(int(h.any(0).sum()) for h in hit)
    right = sum(
        int((p.cls[h[:, o].argmax()] == p.truth[o]) & h[:, o].any())
        for p, h in zip(images, hit)
        for o in range(len(p.truth))
    )
    print(f"{Path(model).name}: AP50 {ap50(images):.3f}")
    print(f"  objects found by a box of any class: {found / sum(len(p.truth) for p in images):.3f}")
    print(f"  of these, by one whose best class is right: {right / max(found, 1):.3f}")
    for change in (right_classes, no_confusion, no_background, right_boxes, none_missed):
        print(f"  AP50 with {change.__name__.replace('_', ' ')}: {ap50([change(p) for p in images]):.3f}")


if __name__ == "__main__":
    main(**dict(x.split("=", 1) for x in sys.argv[1:]))
