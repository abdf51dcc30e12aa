"""Enrollment: classes from a few labeled examples, without training and without touching a weight of the others."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from ultralytics.utils import LOGGER
from ultralytics.utils.metrics import bbox_iou
from ultralytics.utils.ops import xywh2xyxy

from yolo_fewshot import args as table
from yolo_fewshot.class_names import repeated
from yolo_fewshot.data.support import Support
from yolo_fewshot.enroll.agreement import agreement
from yolo_fewshot.enroll.cross_validation import detect_left_out
from yolo_fewshot.enroll.detection import Detections, ap50
from yolo_fewshot.enroll.features import Features, View, extract
from yolo_fewshot.enroll.fit import MARGIN, PRIOR_STRENGTH, classifiers
from yolo_fewshot.enroll.replay import recall
from yolo_fewshot.enroll.thresholds import thresholds
from yolo_fewshot.errors import few
from yolo_fewshot.nn.head import Prototypes

ENOUGH = 3  # shots of a class that tell which method suits it
SAME = 0.9  # IoU from which two labels share a box


class Shot(NamedTuple):
    """An object that a class was enrolled from, with the figures of `Agreement`.

    Attributes:
        file (str): Image file.
        box (list[float]): Its box, x1, y1, x2, y2 in 0..1.
        sim_own (float | None): Similarity to the other shots of its class; None where there are none.
        sim_other (float | None): Similarity to the nearest other class; None where there is none.
        nearest (str | None): Name of that class.
        suspect (bool): Whether it disagrees with the rest of its class.
    """

    file: str
    box: list[float]
    sim_own: float | None
    sim_other: float | None
    nearest: str | None
    suspect: bool


class Shots(NamedTuple):
    """Outcome of an enrollment.

    Attributes:
        classes (dict[str, dict]): By class name, what the model now knows of it: `shots`, the number of its objects;
            `method`, 'mean' or 'fit'; `conf`, the suggested confidence threshold, or None with too few shots to tell;
            `replaced`, the classifier of a base class of this name, or None.
        objects (dict[str, list[Shot]]): By class name, its shots in the order of the support set.
    """

    classes: dict[str, dict[str, Any]]
    objects: dict[str, list[Shot]]

    @property
    def suspect(self) -> dict[str, list[str]]:
        """By class name, the images of shots that disagree with the rest of the class."""
        found = {name: [x.file for x in row if x.suspect] for name, row in self.objects.items()}
        return {name: list(dict.fromkeys(files)) for name, files in found.items() if files}


def enroll(
    model: nn.Module,
    support: Support,
    imgsz: int,
    batch: int = 16,
    method: str = "auto",
    views: list[View] | None = None,
    keep: Collection[str] = (),
    nms: bool | None = None,
) -> Shots:
    """Set or append the classifiers of the classes that a support set shows; nothing else changes.

    Args:
        model (nn.Module): Few-shot model in eval mode; changed in place.
        support (Support): The support set.
        imgsz (int): Image size in pixels.
        batch (int): Images per forward pass.
        method (str): 'mean', the mean of the shots' embeddings (Snell et al. 2017); 'fit', a classifier fitted on all
            anchors of the support images with an L2 prior around that mean; or 'auto', see `choose`.
        views (list[View], optional): Views of the images, those of `support_views` if not given.
        keep (Collection[str]): Classes of the model that stay as they are. Their objects in the support images are
            negatives of the others, and help to choose the method.
        nms (bool, optional): As in prediction: where it is False, the one-to-one branch of a dual head will predict, so
            thresholds and the choice of the method are for it.

    Returns:
        (Shots): What was enrolled.

    Raises:
        ValueError: If the method is unknown, the images have other channels than those of the model, or no anchor
            belongs to any box of a class.
    """
    table.check({"enroll": method})
    channels = model.yaml.get("channels") or 3
    if support.channels != channels:
        raise ValueError(
            f"The images of {support.source} have channels={support.channels}, and the model takes {channels}. Set "
            f"'channels: {channels}' there, which loads any image so, or enroll into a model of such images."
        )
    twice = [n for n in repeated(model.names.values()) if n in support.shown and n not in keep]
    if twice:
        raise ValueError(
            f"Several classes of the model have the name {few(twice)}, so that it is not clear which one the shots "
            "are of. Give the class of the shots another name."
        )
    features = extract(model, support, imgsz, batch, views)
    names, labels = compact(features, support.names)
    counts = torch.bincount(labels[labels >= 0], minlength=len(names))
    _check_anchors(support, features, names, counts, keep, imgsz)
    head, known = model.model[-1], {str(n): i for i, n in model.names.items()}
    shown = {n: i for n, i in known.items() if n in names}
    branch = int(nms is False and len(head.banks) > 1)
    judged = recall(model.memory, features, list(shown.values()))  # none of the classes takes itself for a negative
    judged = judged._replace(embeds=judged.embeds[branch:], anchors=judged.anchors[branch:])
    prior_strength, left_out = choose(
        judged, labels, counts, method, head.banks[branch], model.prior_strength or PRIOR_STRENGTH, not branch
    )
    features = recall(model.memory, features, [i for n, i in shown.items() if n not in keep])
    rows = [classifiers(features, labels, prior_strength, i, bank) for i, bank in enumerate(head.banks)]
    conf = thresholds(left_out)
    classes = {}
    for c, name in enumerate(names):
        if name in keep:
            continue
        index = known.setdefault(name, len(known))
        before = model.enrolled.get(name, {}).get("replaced")
        if name not in model.enrolled and index < head.nc:
            before = head.get_class(index)
        head.set_class(index, [(vectors[c], offsets[c]) for vectors, offsets in rows])
        model.names[index] = name
        classes[name] = {
            "shots": int(counts[c]),
            "method": "mean" if prior_strength[c].isinf() else "fit",
            "conf": conf[c],
            "replaced": before,
        }
    model.enrolled.update(classes)
    model.nc = model.yaml["nc"] = head.nc
    objects = _objects(support, judged, labels, names)
    return Shots(classes, {name: objects[name] for name in classes})


def forget(model: nn.Module, name: str) -> None:
    """Undo the enrollment of a class: remove it, or give a base class its own classifier back.

    Args:
        model (nn.Module): Few-shot model; changed in place. Classes after a removed one move up by one index.
        name (str): Class name.

    Raises:
        ValueError: If the class was not enrolled.
    """
    if name not in model.enrolled:
        known = f"Enrolled are {', '.join(model.enrolled)}." if model.enrolled else "No class is enrolled."
        raise ValueError(f"'{name}' was not enrolled, so it cannot be forgotten. {known}")
    index = next(i for i, n in model.names.items() if str(n) == name)
    before = model.enrolled.pop(name)["replaced"]
    if before is not None:
        model.model[-1].set_class(index, before)
        return
    model.model[-1].remove_class(index)
    model.names = dict(enumerate(n for i, n in model.names.items() if i != index))
    model.nc = model.yaml["nc"] = model.model[-1].nc


def compact(features: Features, names: dict[int, str]) -> tuple[list[str], torch.Tensor]:
    """Number the classes that have a box.

    Args:
        features (Features): Features of a support set.
        names (dict[int, str]): Class names by label index.

    Returns:
        names (list[str]): Names of the n classes with a box, in the order of their label indices.
        labels (torch.Tensor): Class of every object, (N,) int64 in 0..n-1, or -1 if no anchor belongs to it.
    """
    shown, labels = features.cls.unique(return_inverse=True)
    valid = torch.stack([e.any(1) for e in features.embeds]).all(0)
    return [str(names[i]) for i in shown.tolist()], torch.where(valid, labels, -1)


def _check_anchors(
    support: Support,
    features: Features,
    names: list[str],
    counts: torch.Tensor,
    keep: Collection[str],
    imgsz: int,
) -> None:
    """Raise an error if a class has no shot with an anchor, and warn of single shots without one.

    Args:
        support (Support): Support set.
        features (Features): Its features.
        names (list[str]): Names of the n classes, as from `compact`.
        counts (torch.Tensor): Their shots with an anchor, (n,).
        keep (Collection[str]): Classes that are not enrolled.
        imgsz (int): Image size in pixels.
    """
    owner = [str(support.names[c]) for c in features.cls.tolist()]
    valid, texts, shared, small = torch.stack([e.any(1) for e in features.embeds]).all(0), [], False, False
    for i in (~valid).nonzero()[:, 0].tolist():
        if owner[i] in keep:
            continue
        same = bbox_iou(features.boxes[i], features.boxes, xywh=False)[:, 0] > SAME
        same &= features.image == features.image[i]
        same[i] = False
        if same.any():
            shared, what = True, f"{owner[i]} shares its box with {owner[int(same.nonzero()[0])]}"
        else:
            w, h = (features.boxes[i, 2:] - features.boxes[i, :2]).tolist()
            small, what = True, f"{owner[i]} ({w:.3g} x {h:.3g} pixels)"
        texts.append(f"{features.files[int(features.image[i])]}: {what}")
    if not texts:
        return
    advice = " An anchor belongs to one object only: of labels that share a box, keep one." if shared else ""
    advice += " Use a greater imgsz, or greater objects." if small else ""
    lost = [n for n, k in zip(names, counts) if not k and n not in keep]
    if lost:
        raise ValueError(
            f"No anchor of the model belongs to a box of {few(lost)} at imgsz={imgsz}: {few(texts, '; ')}.{advice}"
        )
    shots = sum(n not in keep for n in owner)
    LOGGER.warning(
        f"{len(texts)} of {shots} shots do not count, for no anchor of the model belongs to them at imgsz={imgsz}: "
        f"{few(texts, '; ')}.{advice}"
    )


def _objects(support: Support, features: Features, labels: torch.Tensor, names: list[str]) -> dict[str, list[Shot]]:
    """Return the shots of every class, as in `Shots.objects`.

    Args:
        support (Support): Support set.
        features (Features): Its features.
        labels (torch.Tensor): Class of every object, (N,) in 0..n-1, or negative for one to leave out.
        names (list[str]): Names of the n classes.
    """
    objects: dict[str, list[Shot]] = {name: [] for name in names}
    boxes = xywh2xyxy(np.concatenate([x["bboxes"] for x in support.labels])).tolist()
    figures = (x.tolist() for x in agreement(features, labels, len(names)))
    for c, p, box, own, other, nearest, suspect in zip(labels.tolist(), features.image.tolist(), boxes, *figures):
        if c >= 0:
            own, other = (None if math.isnan(x) else x for x in (own, other))
            name = None if other is None else names[nearest]
            objects[names[c]].append(Shot(features.files[p], box, own, other, name, suspect))
    return objects


def choose(
    features: Features,
    labels: torch.Tensor,
    counts: torch.Tensor,
    method: str,
    bank: Prototypes,
    single: float,
    nms: bool = True,
) -> tuple[torch.Tensor, Detections]:
    """Choose the prior strength of every class, and detect in the support images with classifiers made without them.

    The prior strength is `PRIOR_STRENGTH` over the number of shots for 'fit', and infinite for 'mean'. 'auto' fits,
    unless 'mean' finds more by `MARGIN` (AP50) in the support images with these left out, for classes of at least `ENOUGH` shots; fewer
    tell too little, so there it takes what was better on base classes enrolled from one shot when training ended.

    Args:
        features (Features): Features of a support set, with those of the branch that predicts in front.
        labels (torch.Tensor): Class of every object, (N,) in 0..n-1, or negative for one to leave out.
        counts (torch.Tensor): Shots of every class, (n,).
        method (str): 'auto', 'mean' or 'fit'.
        bank (Prototypes): Prototypes of the branch that predicts.
        single (float): Prior strength of one shot for classes of few shots under 'auto'.
        nms (bool): Whether NMS follows; not for the one-to-one branch.

    Returns:
        prior_strength (torch.Tensor): (n,) float32.
        left_out (Detections): Detections with this prior strength.
    """
    mean, fit = torch.full((len(counts),), math.inf), PRIOR_STRENGTH / counts
    if method != "auto":
        prior_strength = mean if method == "mean" else fit
        return prior_strength, detect_left_out(features, labels, prior_strength, bank, nms)
    scarce = counts < ENOUGH
    if scarce.all():
        prior_strength = single / counts
        return prior_strength, detect_left_out(features, labels, prior_strength, bank, nms)
    options = [torch.where(scarce, single / counts, p) for p in (fit, mean)]
    found = [detect_left_out(features, labels, p, bank, nms) for p in options]
    scores = [ap50(x._replace(n_gt=x.n_gt * ~scarce)) for x in found]
    best = scores[1] > scores[0] + MARGIN
    return options[best], found[best]


def log(shots: Shots) -> None:
    """Say what was enrolled, and which shots to check.

    Args:
        shots (Shots): Outcome of an enrollment.
    """
    LOGGER.info(table_of(shots.classes))
    for name, files in shots.suspect.items():
        LOGGER.warning(f"{name}: check {', '.join(files)}, which looks more like another class of the support set.")


def table_of(classes: dict[str, dict[str, Any]]) -> str:
    """Return enrolled classes as a table, in the format of Ultralytics' validation table.

    Args:
        classes (dict[str, dict]): As in `Shots.classes`.

    Returns:
        (str): One row a class: shots, method, and the suggested confidence threshold.
    """
    rows = [("Enrolled class", "Shots", "Method", "Conf")]
    rows += [(n, x["shots"], x["method"], "-" if x["conf"] is None else f"{x['conf']:g}") for n, x in classes.items()]
    return "\n".join(f"{name:>22}{shots:>11}{method:>11}{conf:>11}" for name, shots, method, conf in rows)
