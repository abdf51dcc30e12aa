"""Cross-validation over the support set."""

from __future__ import annotations

import torch

from yolo_fewshot.enroll.detection import Detections, detect
from yolo_fewshot.enroll.features import Features, select
from yolo_fewshot.enroll.fit import classifiers
from yolo_fewshot.nn.head import Prototypes

FOLDS = 5


def folds(features: Features, labels: torch.Tensor) -> torch.Tensor:
    """Assign the images to folds so that the shots of every class are spread over the folds.

    Args:
        features (Features): Features of a support set.
        labels (torch.Tensor): Class of every object, (N,), or negative to leave it out.

    Returns:
        (torch.Tensor): Fold of every image, (number of images,) int64.
    """
    n, fold = int(labels.max()) + 1, torch.zeros(len(features.files), dtype=torch.int64)
    held = torch.zeros(FOLDS, n)  # weighted objects of every class in every fold
    rare = 1 / torch.bincount(labels[labels >= 0], minlength=n).clamp(min=1)  # classes of few shots weigh more
    for p in features.image.unique().tolist():
        objects = torch.bincount(labels[(features.image == p) & (labels >= 0)], minlength=n) * rare
        fold[p] = (held @ objects + held.sum(1) * 1e-6).argmin()
        held[fold[p]] += objects
    return fold


def detect_left_out(
    features: Features, labels: torch.Tensor, prior_strength: torch.Tensor, prototypes: Prototypes, nms: bool = True
) -> Detections:
    """Detect in every image with classifiers made from the images of the other folds.

    Args:
        features (Features): Features of a support set, those of the predicting branch first.
        labels (torch.Tensor): Class of every object, (N,) in 0..n-1, or negative to leave it out.
        prior_strength (torch.Tensor): Prior strength of every class, (n,) float32.
        prototypes (Prototypes): Level scales and biases of the predicting branch.
        nms (bool): Whether to apply NMS; False for the one-to-one branch.

    Returns:
        (Detections): Detections of classes that have shots outside of the fold; a class whose shots are all in one
            image counts no object.
    """
    fold, first, parts = folds(features, labels), features.anchors[0], []
    for f in fold[features.image].unique().tolist():
        rest = torch.where(fold[features.image] == f, -1, labels)
        known = torch.bincount(rest[rest >= 0], minlength=len(prior_strength)) > 0
        others = features._replace(anchors=[select(first, (first.image < 0) | (fold[first.image] != f))])
        weights = classifiers(others, rest, torch.where(known, prior_strength, torch.inf), 0, prototypes)
        out = detect(features, labels, fold == f, weights, prototypes, nms=nms)
        parts.append((*(x[known[out.cls]] for x in out[:3]), out.n_gt * known))
    cls, conf, tp, n_gt = zip(*parts)
    return Detections(torch.cat(cls), torch.cat(conf), torch.cat(tp), torch.stack(n_gt).sum(0))
