"""Suggested confidence thresholds: those of maximum F1, with few false alarms in background images."""

from __future__ import annotations

import math

import torch

from yolo_fewshot.enroll.detection import CONF, Detections

FALSE_ALARMS = 0.05  # maximum expected number in a background image, of all classes together
TAIL = 10  # number of the false alarms of a class that its tail is estimated from


def thresholds(detections: Detections) -> list[float | None]:
    """Suggest a confidence threshold for every class.

    Args:
        detections (Detections): Detections of n classes in images that their classifiers were not made from.

    Returns:
        (list[float | None]): Threshold in 0..1 per class; None for a class without a true positive, unless it was
            looked for in background images.
    """
    n, suggested = len(detections.n_gt), []
    searched = detections.n_background.expand(n).tolist()
    for c, (n_gt, images) in enumerate(zip(detections.n_gt.tolist(), searched)):
        i = detections.cls == c
        conf = best_conf(detections.conf[i], detections.tp[i], n_gt)
        if images:
            alarms = detections.conf[i & detections.background]
            conf = max(conf or CONF, quiet_conf(alarms, images, FALSE_ALARMS / n))
        suggested.append(conf)
    return suggested


def quiet_conf(alarms: torch.Tensor, images: int, rate: float) -> float:
    """Return the confidence threshold at which false alarms have a rate.

    The rate is usually smaller than what so few images can show, so that it is extrapolated: the logits of the most
    confident false alarms are taken for exponentially distributed beyond a threshold (peaks over threshold, Pickands
    1975), with their mean excess as the scale.

    Args:
        alarms (torch.Tensor): Confidence of every false alarm, (M,).
        images (int): Number of images in which they were found.
        rate (float): Expected number of false alarms in an image.

    Returns:
        (float): Threshold, `CONF` to 0.999.
    """
    if len(alarms) <= rate * images:
        return CONF
    n = max(TAIL, math.ceil(rate * images)) + 1
    *peaks, base = torch.logit(alarms.double().sort(descending=True)[0][:n], eps=1e-6).tolist()
    z = base  # with a single false alarm there is no excess
    if peaks:
        z += (sum(peaks) / len(peaks) - base) * math.log(len(peaks) / images / rate)
    return min(max(CONF, round(1 / (1 + math.exp(-z)) + 5e-4, 3)), 0.999)


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
