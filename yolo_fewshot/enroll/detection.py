"""Detection and AP50 on the stored anchors of a support set."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torchvision.ops import batched_nms
from ultralytics.utils.metrics import ap_per_class, box_iou

from yolo_fewshot.enroll.features import Features, select
from yolo_fewshot.nn.rows import Space

IOU_NMS, IOU_TP = 0.7, 0.5  # Ultralytics' NMS threshold, and that of AP50
CONF = 0.01  # minimum confidence
MAX_DET = 300  # per image, as in Ultralytics
MAX_SCORES = 2**24  # computed at once, which bounds the memory


class Detections(NamedTuple):
    """Detections in some images.

    Attributes:
        cls (torch.Tensor): Class, (M,) int64.
        conf (torch.Tensor): Confidence, (M,) float32.
        tp (torch.Tensor): Whether it is a true positive at IoU 0.5, (M,) bool.
        n_gt (torch.Tensor): Number of objects of every class, (n,) int64.
        background (torch.Tensor): Whether the detection is in a background image, see `Features`, (M,) bool.
        n_background (torch.Tensor): Number of background images that were searched for every class, (n,) int64, or
            for all alike, ().
    """

    cls: torch.Tensor
    conf: torch.Tensor
    tp: torch.Tensor
    n_gt: torch.Tensor
    background: torch.Tensor = torch.zeros(0, dtype=torch.bool)
    n_background: torch.Tensor = torch.tensor(0)


def detect(
    features: Features,
    labels: torch.Tensor,
    images: torch.Tensor,
    weights: tuple[torch.Tensor, torch.Tensor],
    space: Space,
    conf: float = CONF,
    nms: bool = True,
) -> Detections:
    """Detect objects in the first view of images, at their stored anchors.

    Args:
        features (Features): Features, those of the predicting branch first.
        labels (torch.Tensor): Class of every object, (N,) in 0..n-1, or negative to leave it out.
        images (torch.Tensor): Images to detect in, (number of images,) bool.
        weights (tuple[torch.Tensor, torch.Tensor]): Vectors and offsets of the n classes, as in `space`.
        space (Space): Embedding space of the predicting branch.
        conf (float): Minimum confidence.
        nms (bool): Whether to apply NMS; False for the one-to-one branch.

    Returns:
        (Detections): Detections in descending order of confidence.
    """
    anchors, (vectors, offsets), n = features.anchors[0], weights, len(weights[0])
    anchors = select(anchors, (anchors.view == 0) & images[anchors.image])
    candidates = []
    for part in torch.arange(len(anchors.embeds)).split(max(MAX_SCORES // n, 1)):
        scores = space.logits(anchors.embeds[part], anchors.level[part], vectors, offsets).sigmoid()
        a, c = (scores > conf).nonzero(as_tuple=True)
        candidates.append((part[a], c, scores[a, c]))
    a, c, s = map(torch.cat, zip(*candidates))
    boxes, image = anchors.boxes[a], anchors.image[a]
    kept, matched = [a[:0]], [torch.zeros(0, dtype=torch.bool)]
    counts = torch.bincount(image, minlength=len(images)).tolist()
    for p, part in enumerate(image.argsort(stable=True).split(counts)):  # the cost of NMS is quadratic
        best = batched_nms(boxes[part], s[part], c[part], IOU_NMS) if nms else s[part].argsort(descending=True)
        part = part[best[:MAX_DET]]
        gt = (features.image == p) & (labels >= 0)
        iou = box_iou(features.boxes[gt], boxes[part]) * (labels[gt, None] == c[part])
        kept.append(part)
        matched.append(_match(iou))
    rows, tp = torch.cat(kept), torch.cat(matched)
    order = s[rows].argsort(descending=True, stable=True)
    rows = rows[order]
    n_gt = torch.bincount(labels[(labels >= 0) & images[features.image]], minlength=n)
    first = len(images) - features.n_background
    return Detections(c[rows], s[rows], tp[order], n_gt, image[rows] >= first, images[first:].sum())


def _match(iou: torch.Tensor) -> torch.Tensor:
    """Match detections to objects of one image greedily, in descending order of confidence.

    Args:
        iou (torch.Tensor): IoU of every object with every detection, 0 where the classes differ, (N, M).

    Returns:
        (torch.Tensor): True positives, (M,) bool: each takes the object of maximum IoU among those not yet taken.
    """
    iou, tp = iou.clone(), torch.zeros(iou.shape[1], dtype=torch.bool)
    for i in (iou >= IOU_TP).any(0).nonzero()[:, 0].tolist():
        value, gt = iou[:, i].max(0)
        if value >= IOU_TP:
            tp[i], iou[gt] = True, 0
    return tp


def ap50(detections: Detections) -> float:
    """Return the mean AP50 of the classes that have objects.

    Args:
        detections (Detections): Detections.

    Returns:
        (float): In 0..1.
    """
    if not (detections.tp.any() and detections.n_gt.any()):
        return 0.0
    gt = torch.arange(len(detections.n_gt)).repeat_interleave(detections.n_gt)
    tp = detections.tp[:, None].numpy()
    return float(ap_per_class(tp, detections.conf.numpy(), detections.cls.numpy(), gt.numpy())[5].mean())
