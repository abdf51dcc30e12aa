"""What the shots tell of themselves: each is looked at by a classifier that was made without it."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torchvision.ops import batched_nms
from ultralytics.utils.metrics import ap_per_class, bbox_iou

from yolo_fewshot.enroll.features import Features, select
from yolo_fewshot.enroll.fit import classifiers
from yolo_fewshot.nn.head import Prototypes
from yolo_fewshot.nn.prototypes import class_means

FOLDS = 5  # groups of images, of which one after the other is left out
IOU_NMS, IOU_TRUE = 0.7, 0.5  # Ultralytics' NMS threshold, and that of AP50
CONF = 0.01  # least confidence looked at
DETECTIONS = 300  # of one image, as Ultralytics' max_det
SCORES = 2**24  # computed together, which bounds the memory


class Detections(NamedTuple):
    """Detections in some images.

    Attributes:
        cls (torch.Tensor): Class, (M,) int64.
        conf (torch.Tensor): Confidence, (M,) float32.
        hit (torch.Tensor): Whether it is the most confident one that finds an object with an IoU of 0.5, (M,) bool.
        truths (torch.Tensor): Objects of every class, (n,) int64.
    """

    cls: torch.Tensor
    conf: torch.Tensor
    hit: torch.Tensor
    truths: torch.Tensor


class Agreement(NamedTuple):
    """How well objects agree with their classes, as cosines of centered embeddings.

    Attributes:
        own (torch.Tensor): Similarity to the other objects of its class, (N,) float32; NaN where there are none.
        other (torch.Tensor): Similarity to the nearest other class, (N,) float32; NaN where there is none.
        nearest (torch.Tensor): That class, (N,) int64; -1 where there is none.
        suspect (torch.Tensor): Whether the object disagrees with the rest of its class, (N,) bool.
    """

    own: torch.Tensor
    other: torch.Tensor
    nearest: torch.Tensor
    suspect: torch.Tensor


def detect(
    features: Features,
    labels: torch.Tensor,
    images: torch.Tensor,
    rows: tuple[torch.Tensor, torch.Tensor],
    bank: Prototypes,
    conf: float = CONF,
    nms: bool = True,
) -> Detections:
    """Detect with classifiers in the plain view of images, from their kept anchors.

    Args:
        features (Features): Features with the anchors of the branch that predicts in front.
        labels (torch.Tensor): Class of every object, (N,) in 0..n-1, or negative for none of them.
        images (torch.Tensor): Which images to look at, (number of images,) bool.
        rows (tuple[torch.Tensor, torch.Tensor]): Vectors (n, D) and offsets (n,) of the classifiers.
        bank (Prototypes): Level scales and biases of the branch.
        conf (float): Least confidence.
        nms (bool): Whether NMS follows; not for the one-to-one branch.

    Returns:
        (Detections): The detections, the most confident first.
    """
    anchors, (vectors, offsets), n = features.anchors[0], rows, len(rows[0])
    anchors = select(anchors, (anchors.view == 0) & images[anchors.image])
    scale, bias = (x.detach().float().cpu()[anchors.level, None] for x in (bank.logit_scale, bank.bias))
    found = []
    for part in torch.arange(len(anchors.embeds)).split(max(SCORES // n, 1)):
        scores = (scale[part] * (anchors.embeds[part] @ vectors.t()) + bias[part] + offsets).sigmoid()
        a, c = (scores > conf).nonzero(as_tuple=True)
        found.append((part[a], c, scores[a, c]))
    a, c, s = map(torch.cat, zip(*found)) if found else (torch.zeros(0, dtype=t) for t in (int, int, torch.float))
    boxes, image, kept = anchors.boxes[a], anchors.image[a], [a[:0]]
    counts = torch.bincount(image, minlength=len(images)).tolist()
    for part in image.argsort(stable=True).split(counts):  # each alone, for the cost of NMS grows with the square
        best = batched_nms(boxes[part], s[part], c[part], IOU_NMS) if nms else s[part].argsort(descending=True)
        kept.append(part[best[:DETECTIONS]])
    kept = torch.cat(kept)
    kept = kept[s[kept].argsort(descending=True, stable=True)]
    group = image * n + c
    known = (labels >= 0).nonzero()[:, 0]
    hit = _hits(boxes[kept], group[kept], features.boxes[known], features.image[known] * n + labels[known])
    shown = labels[(labels >= 0) & images[features.image]]
    return Detections(c[kept], s[kept], hit, torch.bincount(shown, minlength=n))


def _hits(boxes: torch.Tensor, group: torch.Tensor, truths: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
    """Return which detections find an object that no better one has found.

    Args:
        boxes (torch.Tensor): Boxes of the detections, the most confident first, (M, 4).
        group (torch.Tensor): Image and class of every detection as one number, (M,).
        truths (torch.Tensor): Boxes of the objects, (N, 4).
        owner (torch.Tensor): Image and class of every object likewise, (N,).

    Returns:
        (torch.Tensor): (M,) bool.
    """
    hit, (owner, order) = torch.zeros(len(boxes), dtype=torch.bool), owner.sort(stable=True)
    low, high = (torch.searchsorted(owner, group, right=side) for side in (False, True))
    near = (high > low).nonzero()[:, 0]  # detections with an object of their class in their image
    if not len(near):
        return hit
    place = low[near, None] + torch.arange(int((high - low).max()))
    valid = place < high[near, None]
    objects = order[place.clamp(max=len(order) - 1)]
    iou = bbox_iou(boxes[near, None], truths[objects], xywh=False)[..., 0] * valid
    taken = set()
    for i in (iou >= IOU_TRUE).any(1).nonzero()[:, 0].tolist():
        free = [(v, o) for v, o in zip(iou[i].tolist(), objects[i].tolist()) if v >= IOU_TRUE and o not in taken]
        if free:
            hit[near[i]] = True
            taken.add(max(free)[1])
    return hit


def folds(features: Features, labels: torch.Tensor) -> torch.Tensor:
    """Deal the images into folds so that the shots of every class are spread.

    Args:
        features (Features): Features of a support set.
        labels (torch.Tensor): Class of every object, (N,).

    Returns:
        (torch.Tensor): Fold of every image, (number of images,) int64.
    """
    n, fold = int(labels.max()) + 1, torch.zeros(len(features.files), dtype=torch.int64)
    held = torch.zeros(FOLDS, n)
    rare = 1 / torch.bincount(labels[labels >= 0], minlength=n).clamp(min=1)  # classes of few shots matter more
    for p in features.image.unique().tolist():
        shown = torch.bincount(labels[(features.image == p) & (labels >= 0)], minlength=n) * rare
        fold[p] = (held @ shown + held.sum(1) * 1e-6).argmin()
        held[fold[p]] += shown
    return fold


def detect_left_out(
    features: Features, labels: torch.Tensor, prior_strength: torch.Tensor, bank: Prototypes, nms: bool = True
) -> Detections:
    """Detect in every image with classifiers that were made without it and the others of its fold.

    Args:
        features (Features): Features of a support set, with the anchors of the branch that predicts in front.
        labels (torch.Tensor): Class of every object, (N,) in 0..n-1, or negative for one to leave out.
        prior_strength (torch.Tensor): Prior strength of every class, (n,) float32.
        bank (Prototypes): Prototypes of the branch that predicts.
        nms (bool): Whether NMS follows; not for the one-to-one branch.

    Returns:
        (Detections): Of classes that have shots outside the fold; one whose shots are all in one image has no truths.
    """
    fold, first, found = folds(features, labels), features.anchors[0], []
    for f in fold[features.image].unique().tolist():
        seen = torch.where(fold[features.image] == f, -1, labels)
        known = torch.bincount(seen[seen >= 0], minlength=len(prior_strength)) > 0
        part = features._replace(anchors=[select(first, (first.image < 0) | (fold[first.image] != f))])
        rows = classifiers(part, seen, torch.where(known, prior_strength, torch.inf), 0, bank)
        out = detect(features, labels, fold == f, rows, bank, nms=nms)
        found.append((*(x[known[out.cls]] for x in out[:3]), out.truths * known))
    cls, conf, hit, truths = zip(*found)
    return Detections(torch.cat(cls), torch.cat(conf), torch.cat(hit), torch.stack(truths).sum(0))


def ap50(found: Detections) -> float:
    """Return the mean AP50 of the classes that have objects.

    Args:
        found (Detections): Detections.

    Returns:
        (float): In 0..1.
    """
    if not (found.hit.any() and found.truths.any()):
        return 0.0
    truths = torch.arange(len(found.truths)).repeat_interleave(found.truths)
    return float(ap_per_class(*(x.numpy() for x in (found.hit[:, None], found.conf, found.cls, truths)))[5].mean())


def thresholds(found: Detections) -> list[float | None]:
    """Suggest the confidence of best F1 for every class.

    Args:
        found (Detections): Detections of n classes in images that their classifiers never saw.

    Returns:
        (list[float | None]): Of every class, in 0..1; None where nothing tells.
    """
    rows = [found.cls == c for c in range(len(found.truths))]
    return [best_conf(found.conf[r], found.hit[r], k) for r, k in zip(rows, found.truths.tolist())]


def best_conf(conf: torch.Tensor, hit: torch.Tensor, truths: int) -> float | None:
    """Return the confidence threshold of best F1.

    Args:
        conf (torch.Tensor): Confidence of every detection, (M,).
        hit (torch.Tensor): Whether it found an object, (M,) bool.
        truths (int): Number of objects.

    Returns:
        (float | None): Midway between the last detection to keep and the next one; None if there is no hit.
    """
    if not hit.any():
        return None
    conf, order = conf.sort(descending=True, stable=True)
    tp = hit[order].cumsum(0)
    f1 = 2 * tp / (torch.arange(1, len(conf) + 1) + truths)
    f1[:-1][conf[:-1] == conf[1:]] = 0  # no threshold divides a tie
    last = int(f1.argmax())
    below = conf[last + 1] if last + 1 < len(conf) else conf.new_tensor(CONF)
    return round(float((conf[last] + below) / 2), 3)


def agreement(features: Features, labels: torch.Tensor, n: int) -> Agreement:
    """Compare every object with the rest of its class and with the other classes.

    Similarity is the cosine to the mean of a class after subtracting the mean of the class means, which all objects
    share. An object is suspect if its own class, without it, is less like it than another class is, and less than half
    as like it as it is to the class's objects in the median. Classes of fewer than 3 objects are not judged, nor is a
    single class.

    Args:
        features (Features): Features of a support set.
        labels (torch.Tensor): Class of every object, (N,) in 0..n-1, or negative for one to leave out.
        n (int): Number of classes.

    Returns:
        (Agreement): The figures.
    """
    size = len(labels)
    found = Agreement(
        torch.full((size,), torch.nan),
        torch.full((size,), torch.nan),
        torch.full((size,), -1),
        torch.zeros(size, dtype=torch.bool),
    )
    means, counts = class_means(features.embeds[0], labels, n)
    present = counts > 0
    if present.sum() < 2:
        return found
    embeds = F.normalize(features.embeds[0] - means[present].mean(0), dim=1)
    means, _ = class_means(embeds, labels, n)
    sums = F.one_hot(labels + 1, n + 1)[:, 1:].to(embeds).t() @ embeds
    for c in present.nonzero()[:, 0].tolist():
        mine = (labels == c).nonzero()[:, 0]
        strange = ~present | (torch.arange(n) == c)
        other, nearest = (embeds[mine] @ means.t()).masked_fill(strange, -torch.inf).max(1)
        found.other[mine], found.nearest[mine] = other, nearest
        if counts[c] > 1:
            own = (embeds[mine] * F.normalize(sums[c] - embeds[mine], dim=1)).sum(1)
            found.own[mine] = own
            found.suspect[mine] = (counts[c] >= 3) & (own < other) & (own < own.median() / 2)
    return found
