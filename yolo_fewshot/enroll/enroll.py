"""Enrollment: new classes from a few labeled examples, without training."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, NamedTuple

import numpy as np
import torch
from ultralytics.utils import LOGGER
from ultralytics.utils.metrics import box_iou
from ultralytics.utils.ops import xywh2xyxy

from yolo_fewshot import args as keys
from yolo_fewshot.class_names import repeated
from yolo_fewshot.data.support import Support
from yolo_fewshot.enroll.agreement import agreement
from yolo_fewshot.enroll.cross_validation import choose_methods
from yolo_fewshot.enroll.features import Features, View, add_background, extract, standardize, support_views
from yolo_fewshot.enroll.methods import classifiers, few_shot_method, independent_shots
from yolo_fewshot.enroll.replay import add_replay_except, without_class
from yolo_fewshot.enroll.thresholds import thresholds
from yolo_fewshot.errors import few
from yolo_fewshot.nn.graft import drop_unused_levels
from yolo_fewshot.nn.prototypes import class_means
from yolo_fewshot.nn.rows import class_rows

IOU_SAME = 0.9  # IoU above which two labels share a box
SMALL = 16  # pixels, two cells of the finest level


class Shot(NamedTuple):
    """A labeled object that a class was enrolled from.

    Attributes:
        file (str): Image file.
        box (list[float]): x1, y1, x2, y2 in 0..1.
        sim_own (float | None): Similarity to the other shots of its class; None if there are none.
        sim_other (float | None): Similarity to the nearest other class; None if there is none.
        nearest (str | None): Name of that class.
        suspect (bool): Whether it disagrees with the rest of its class, see `agreement`.
    """

    file: str
    box: list[float]
    sim_own: float | None
    sim_other: float | None
    nearest: str | None
    suspect: bool


class Shots(NamedTuple):
    """Result of an enrollment.

    Attributes:
        classes (dict[str, dict]): Record of every enrolled class by name: `shots`, the number of its objects; `method`,
            a name of `METHODS`; `conf`, the suggested confidence threshold, or None with too few shots; `replaced`, the
            trained classifier of a base class of this name, or None.
        objects (dict[str, list[Shot]]): Shots of every enrolled class by name, in the order of the support set.
    """

    classes: dict[str, dict[str, Any]]
    objects: dict[str, list[Shot]]

    @property
    def suspect(self) -> dict[str, list[str]]:
        """Images of suspect shots by class name."""
        files = {name: [x.file for x in shots if x.suspect] for name, shots in self.objects.items()}
        return {name: list(dict.fromkeys(x)) for name, x in files.items() if x}


def enroll(
    model: Any,
    support: Support,
    imgsz: int,
    batch: int = 16,
    method: str = "auto",
    views: list[View] | None = None,
    keep: Collection[str] = (),
    nms: bool | None = None,
    background: Support | None = None,
) -> Shots:
    """Set the classifiers of the classes of a support set, and append those of new classes; nothing else changes.

    Args:
        model (nn.Module): Model in eval mode with a few-shot or a stock head, changed in place.
        support (Support): Support set.
        imgsz (int): Image size in pixels.
        batch (int): Images per forward pass.
        method (str): A name of `METHODS`, or 'auto', see `choose_methods`.
        views (list[View], optional): Views of the images, those of `support_views` if not given.
        keep (Collection[str]): Classes of the model that are not enrolled. Their objects in the support images are
            negatives of the other classes, and take part in the choice of the method.
        nms (bool, optional): As in `predict`. If it is False and the head is dual, thresholds and methods are chosen
            for the one-to-one branch. Both branches are enrolled anyway.
        background (Support, optional): Images without an object of the classes; their anchors are negatives.

    Returns:
        (Shots): Enrolled classes and their shots.

    Raises:
        ValueError: If the method is unknown, the images have other channels than the model, a name is ambiguous, or no
            anchor belongs to any box of a class.
    """
    keys.check({"enroll": method})
    rows = class_rows(model)
    _check_model(model, support, keep)
    views = views or support_views(getattr(model, "args", None) or {}, support.crops, rows.per_level)
    standardize(rows, support, imgsz, batch, views)
    features = extract(rows, support, imgsz, batch, views)
    names, labels = compact(features, support.names)
    if background:
        means = [class_means(x, labels, len(names))[0] for x in features.embeds]
        plain = extract(rows, background, imgsz, batch, [View()], desc="Background", like=means)
        features = add_background(features, plain)
    counts = torch.bincount(labels[labels >= 0], minlength=len(names))
    _check_anchors(support, features, names, counts, keep, imgsz)
    independent = independent_shots(features, labels, len(names), rows.per_level)
    indices, spaces = {str(n): i for i, n in model.names.items()}, rows.spaces()
    branch = int(nms is False and len(spaces) > 1)  # the one that predicts
    with_nms = not rows.branches[branch]
    # Every class of the support set is cross-validated, so none of them may be a negative in the replay buffer.
    replayed = add_replay_except(features, rows, names)
    replayed = replayed._replace(embeds=replayed.embeds[branch:], anchors=replayed.anchors[branch:])
    methods, left_out = choose_methods(
        replayed, labels, independent, method, few_shot_method(model), spaces[branch], nms=with_nms
    )
    conf = thresholds(left_out)
    features = add_replay_except(features, rows, [n for n in names if n not in keep])
    weights = [classifiers(features, labels, methods, independent, i, x) for i, x in enumerate(spaces)]
    enrolled, classes = rows.enrolled, {}
    for c, name in enumerate(names):
        if name in keep:
            continue
        index = indices.get(name, rows.head.nc)
        replaced = enrolled.get(name, {}).get("replaced")
        if name not in enrolled and index < rows.head.nc:
            replaced = rows.get(index)
        rows.set(index, [(vectors[c], offsets[c]) for vectors, offsets in weights])
        model.names[index] = name
        classes[name] = {"shots": int(counts[c]), "method": methods[c], "conf": conf[c], "replaced": replaced}
    model.enrolled = {**enrolled, **classes}
    model.nc = model.yaml["nc"] = rows.head.nc
    objects = _objects(support, replayed, labels, names)
    return Shots(classes, {name: objects[name] for name in classes})


def forget(model: Any, name: str) -> None:
    """Undo the enrollment of a class: remove a new class, or restore the trained classifier of a base class.

    Args:
        model (nn.Module): Model, changed in place. The indices of classes after a removed one decrease by one.
        name (str): Class name.

    Raises:
        ValueError: If the class is not enrolled.
    """
    rows = class_rows(model)
    if name not in rows.enrolled:
        known = f"Enrolled are {', '.join(rows.enrolled)}." if rows.enrolled else "No class is enrolled."
        raise ValueError(f"'{name}' was not enrolled, so it cannot be forgotten. {known}")
    index = next((i for i, n in model.names.items() if str(n) == name), None)
    if index is None:
        raise ValueError(f"'{name}' was renamed after its enrollment. Give the class this name again, then forget it.")
    replaced = rows.enrolled[name]["replaced"]
    if replaced is None:
        rows.remove(index)
        if getattr(model, "memory", None):
            model.memory = without_class(model.memory, index)
        model.names = dict(enumerate(n for i, n in model.names.items() if i != index))
        model.nc = model.yaml["nc"] = rows.head.nc
    else:
        rows.restore(index, replaced)
    if rows.per_level:
        drop_unused_levels(model)
    del model.enrolled[name]  # last: what fails keeps its record


def compact(features: Features, names: dict[int, str]) -> tuple[list[str], torch.Tensor]:
    """Number the classes that have a box.

    Args:
        features (Features): Features of a support set.
        names (dict[int, str]): Class names by label index.

    Returns:
        names (list[str]): Names of the n classes with a box, in the order of their label indices.
        labels (torch.Tensor): Class of every object, (N,) int64 in 0..n-1, or -1 if no anchor belongs to it.
    """
    indices, labels = features.cls.unique(return_inverse=True)
    return [str(names[i]) for i in indices.tolist()], torch.where(_has_anchor(features), labels, -1)


def _has_anchor(features: Features) -> torch.Tensor:
    """Return which objects have an anchor in every branch, (N,) bool."""
    return torch.stack([e.any(1) for e in features.embeds]).all(0)


def _check_model(model: Any, support: Support, keep: Collection[str]) -> None:
    """Raise an error if the support set does not fit the model, see `enroll`."""
    channels = model.yaml.get("channels") or 3
    if support.channels != channels:
        raise ValueError(
            f"The images of {support.source} have channels={support.channels}, and the model takes {channels}. Set "
            f"'channels: {channels}' there, which loads any image so, or enroll into a model of such images."
        )
    ambiguous = [n for n in repeated(model.names.values()) if n in support.class_names and n not in keep]
    if ambiguous:
        raise ValueError(
            f"Several classes of the model have the name {few(ambiguous)}, so that it is not clear which one the shots "
            "are of. Give the class of the shots another name."
        )


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
        counts (torch.Tensor): Shots of every class that have an anchor, (n,).
        keep (Collection[str]): Classes that are not enrolled.
        imgsz (int): Image size in pixels.
    """
    owner = [str(support.names[c]) for c in features.cls.tolist()]
    texts, shared, small, missed = [], False, False, False
    for i in (~_has_anchor(features)).nonzero()[:, 0].tolist():
        if owner[i] in keep:
            continue
        same = box_iou(features.boxes[i : i + 1], features.boxes)[0] > IOU_SAME
        same &= features.image == features.image[i]
        same[i] = False
        if same.any():
            shared, text = True, f"{owner[i]} shares its box with {owner[int(same.nonzero()[0])]}"
        else:
            w, h = (features.boxes[i, 2:] - features.boxes[i, :2]).tolist()
            text = f"{owner[i]} ({w:.3g} x {h:.3g} pixels)"
            small, missed = small or min(w, h) < SMALL, missed or min(w, h) >= SMALL
        texts.append(f"{features.files[int(features.image[i])]}: {text}")
    if not texts:
        return
    advice = " An anchor belongs to one object only: of labels that share a box, keep one." if shared else ""
    advice += " Use a larger imgsz, or larger objects." if small else ""
    advice += " The model proposes no box there: check that the label encloses the whole object." if missed else ""
    lost = [n for n, k in zip(names, counts) if not k and n not in keep]
    if lost:
        raise ValueError(
            f"No anchor of the model belongs to a box of {few(lost)} at imgsz={imgsz}: {few(texts, '; ')}.{advice}"
        )
    total = sum(n not in keep for n in owner)
    LOGGER.warning(
        f"{len(texts)} of {total} shots do not count, since no anchor of the model belongs to them at imgsz={imgsz}: "
        f"{few(texts, '; ')}.{advice}"
    )


def _objects(support: Support, features: Features, labels: torch.Tensor, names: list[str]) -> dict[str, list[Shot]]:
    """Return the shots of every class, as in `Shots.objects`.

    Args:
        support (Support): Support set.
        features (Features): Its features.
        labels (torch.Tensor): Class of every object, (N,) in 0..n-1, or negative to leave it out.
        names (list[str]): Names of the n classes.
    """
    objects: dict[str, list[Shot]] = {name: [] for name in names}
    boxes = xywh2xyxy(np.concatenate([x["bboxes"] for x in support.labels])).tolist()
    images, columns = features.image.tolist(), (x.tolist() for x in agreement(features, labels, len(names)))
    for c, p, box, sim_own, sim_other, nearest, suspect in zip(labels.tolist(), images, boxes, *columns):
        if c >= 0:
            sim_own, sim_other = (None if math.isnan(x) else x for x in (sim_own, sim_other))
            name = None if sim_other is None else names[nearest]
            objects[names[c]].append(Shot(features.files[p], box, sim_own, sim_other, name, suspect))
    return objects


def log_shots(shots: Shots) -> None:
    """Log the enrolled classes, and a warning for suspect shots.

    Args:
        shots (Shots): Result of an enrollment.
    """
    LOGGER.info(table_of(shots.classes))
    for name, files in shots.suspect.items():
        look = "looks" if len(files) == 1 else "look"
        LOGGER.warning(f"{name}: check {', '.join(files)}, which {look} more like another class of the support set.")


def table_of(classes: dict[str, dict[str, Any]]) -> str:
    """Return enrolled classes as a table, in the format of Ultralytics' validation table.

    Args:
        classes (dict[str, dict]): As in `Shots.classes`.

    Returns:
        (str): A row per class: shots, method, and the suggested confidence threshold.
    """
    rows = [("Enrolled class", "Shots", "Method", "Conf")]
    rows += [(n, x["shots"], x["method"], "-" if x["conf"] is None else f"{x['conf']:g}") for n, x in classes.items()]
    return "\n".join(f"{name:>22}{shots:>11}{method:>11}{conf:>11}" for name, shots, method, conf in rows)
