"""Suggested confidence thresholds: those of maximum F1."""

from __future__ import annotations

import torch

from yolo_fewshot.enroll.detection import CONF, Detections


def thresholds(detections: Detections) -> list[float | None]:
    """Suggest a confidence threshold for every class.

    Args:
        detections (Detections): Detections of n classes in images that their classifiers were not made from.

    Returns:
        (list[float | None]): Threshold in 0..1 per class; None for a class without a true positive.
    """
    of_class = [detections.cls == c for c in range(len(detections.n_gt))]
    return [best_conf(detections.conf[i], detections.tp[i], n) for i, n in zip(of_class, detections.n_gt.tolist())]


def best_conf(conf: torch.Tensor, tp: torch.Tensor, n_gt: int) -> float | None:
    """Return the confidence threshold of maximum F1.

    Args:
        conf (torch.Tensor): Confidence of every detection, (M,).
        tp (torch.Tensor): Whether it is a true positive, (M,) bool.
        n_gt (int): Number of objects.

    Returns:
        (float | None): Midpoint of the last detection to keep and the next one; None without a true positive.
    """
    if not tp.any():
        return None
    conf, order = conf.sort(descending=True, stable=True)
    hits = tp[order].cumsum(0)
    f1 = 2 * hits / (torch.arange(1, len(conf) + 1) + n_gt)
    f1[:-1][conf[:-1] == conf[1:]] = 0  # no threshold divides a tie
    last = int(f1.argmax())
    below = conf[last + 1] if last + 1 < len(conf) else conf.new_tensor(CONF)
    return round(float((conf[last] + below) / 2), 3)
