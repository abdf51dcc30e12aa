"""Cross-validation over the support set."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from yolo_fewshot.enroll.detection import Detections, ap50, detect
from yolo_fewshot.enroll.features import Features, select
from yolo_fewshot.enroll.methods import MARGIN, classifiers
from yolo_fewshot.nn.rows import Space

FOLDS = 5
MIN_SHOTS = 3  # minimum shots of a class that takes part in the choice of its method


def folds(features: Features, labels: torch.Tensor) -> torch.Tensor:
    """Assign the images to folds such that the shots of every class, and the images without shots, are spread evenly.

    Args:
        features (Features): Features of a support set.
        labels (torch.Tensor): Class of every object, (N,), or negative to leave it out.

    Returns:
        (torch.Tensor): Fold of every image, (number of images,) int64.
    """
    n, fold = int(labels.max()) + 1, torch.arange(len(features.files)) % FOLDS
    filled = torch.zeros(FOLDS, n)  # weighted objects of every class in every fold
    rare = 1 / torch.bincount(labels[labels >= 0], minlength=n).clamp(min=1)  # classes of few shots weigh more
    for p in features.image.unique().tolist():
        objects = torch.bincount(labels[(features.image == p) & (labels >= 0)], minlength=n) * rare
        fold[p] = (filled @ objects + filled.sum(1) * 1e-6).argmin()
        filled[fold[p]] += objects
    return fold


def detect_left_out(
    features: Features,
    labels: torch.Tensor,
    methods: Sequence[str],
    shots: torch.Tensor,
    space: Space,
    nms: bool = True,
) -> Detections:
    """Detect in every image with classifiers made from the images of the other folds.

    Args:
        features (Features): Features of a support set, those of the predicting branch first.
        labels (torch.Tensor): Class of every object, (N,) in 0..n-1, or negative to leave it out.
        methods (Sequence[str]): Enrollment method of every class.
        shots (torch.Tensor): Number of shots of every class, (n,).
        space (Space): Embedding space of the predicting branch.
        nms (bool): Whether to apply NMS; False for the one-to-one branch.

    Returns:
        (Detections): Detections of classes that have shots outside of the fold; a class whose shots are all in one
            image counts no object, and no background image of its fold.
    """
    n = len(methods)
    if (shots < 2).all() and not features.n_background:  # nothing to learn from in the other folds
        none = torch.zeros(0)
        return Detections(none.long(), none, none.bool(), torch.zeros(n, dtype=torch.long), none.bool())
    fold, first, parts = folds(features, labels), features.anchors[0], []
    for f in fold.unique().tolist():
        rest = torch.where(fold[features.image] == f, -1, labels)
        known = torch.bincount(rest[rest >= 0], minlength=n) > 0
        others = features._replace(anchors=[select(first, (first.image < 0) | (fold[first.image] != f))])
        weights = classifiers(others, rest, methods, shots, 0, space)
        out = detect(features, labels, fold == f, weights, space, nms=nms)
        valid = known[out.cls]
        cls, conf, tp, background = (x[valid] for x in (out.cls, out.conf, out.tp, out.background))
        parts.append(Detections(cls, conf, tp, out.n_gt * known, background, out.n_background * known))
    return Detections(
        torch.cat([x.cls for x in parts]),
        torch.cat([x.conf for x in parts]),
        torch.cat([x.tp for x in parts]),
        torch.stack([x.n_gt for x in parts]).sum(0),
        torch.cat([x.background for x in parts]),
        torch.stack([x.n_background for x in parts]).sum(0),
    )


def choose_methods(
    features: Features,
    labels: torch.Tensor,
    shots: torch.Tensor,
    method: str,
    few_shot_method: str,
    space: Space,
    nms: bool = True,
) -> tuple[list[str], Detections]:
    """Choose the enrollment method of every class, and return the detections of its cross-validation.

    'auto' is 'fit' unless 'mean' has a larger AP50 by `MARGIN` in cross-validation, over the classes of at least
    `MIN_SHOTS` shots. Classes of fewer shots get `few_shot_method`.

    Args:
        features (Features): Features of a support set, those of the predicting branch first.
        labels (torch.Tensor): Class of every object, (N,) in 0..n-1, or negative to leave it out.
        shots (torch.Tensor): Number of shots of every class, (n,).
        method (str): 'auto', or the method of all classes.
        few_shot_method (str): Method under 'auto' for classes of few shots.
        space (Space): Embedding space of the predicting branch.
        nms (bool): Whether to apply NMS; False for the one-to-one branch.

    Returns:
        methods (list[str]): Method of every class.
        detections (Detections): Detections in left-out images with these methods.
    """
    scarce = shots < MIN_SHOTS
    if method != "auto" or scarce.all():
        methods = [few_shot_method if method == "auto" else method] * len(shots)
        return methods, detect_left_out(features, labels, methods, shots, space, nms)
    options = [[few_shot_method if few else m for few in scarce.tolist()] for m in ("fit", "mean")]
    detections = [detect_left_out(features, labels, methods, shots, space, nms) for methods in options]
    fit, mean = (ap50(x._replace(n_gt=x.n_gt * ~scarce)) for x in detections)
    best = int(mean > fit + MARGIN)
    return options[best], detections[best]
