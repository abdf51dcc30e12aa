"""Enrollment as in `yolo_fewshot.enroll.enroll`, but from all that the user said and from features that are kept."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torchvision.ops import box_iou

from yolo_fewshot.enroll.agreement import agreement
from yolo_fewshot.enroll.cross_validation import choose_methods
from yolo_fewshot.enroll.detection import Detections
from yolo_fewshot.enroll.enroll import compact
from yolo_fewshot.enroll.features import Anchors, Features, add_background, select
from yolo_fewshot.enroll.methods import classifiers, few_shot_method, independent_shots
from yolo_fewshot.enroll.replay import add_replay_except
from yolo_fewshot.enroll.thresholds import thresholds
from yolo_fewshot.nn.rows import ClassRows, Space
from yolo_fewshot.studio.project import IOU_SAME, LabeledImage
from yolo_fewshot.studio.scenes import Scene

REJECTED = 10.0  # weight of an anchor of what the user rejected; one of the background has 1


class Lesson(NamedTuple):
    """What there is to learn from.

    Attributes:
        features (Features): Features of all that the user said, with negatives.
        names (list[str]): Names of the n classes with a box.
        labels (torch.Tensor): Class of every object, (N,) int64 in 0..n-1, or -1 if no anchor belongs to it.
        numbers (list[int]): Number of the box of every object.
    """

    features: Features
    names: list[str]
    labels: torch.Tensor
    numbers: list[int]


class Learned(NamedTuple):
    """Classifiers of the classes that were labeled.

    Attributes:
        names (list[str]): Class names.
        shots (list[int]): Number of shots of each that count.
        methods (list[str]): Method of each.
        weights (list[tuple[torch.Tensor, torch.Tensor]]): Vectors and offsets, per branch.
        lost (list[str]): Classes of which no shot counts, since all are too small for the image size.
    """

    names: list[str]
    shots: list[int]
    methods: list[str]
    weights: list[tuple[torch.Tensor, torch.Tensor]]
    lost: list[str]


class Figures(NamedTuple):
    """How well a class was learned, by cross-validation over its shots.

    Attributes:
        suggested (float | None): Suggested confidence threshold.
        likeness (float | None): Mean similarity of its shots to each other; None with one shot, or one class.
        conf (torch.Tensor): Confidence of every detection in images that it was not learned from, (M,).
        tp (torch.Tensor): Whether it is a true positive, (M,) bool.
        n_gt (int): Number of objects there.
    """

    suggested: float | None
    likeness: float | None
    conf: torch.Tensor
    tp: torch.Tensor
    n_gt: int

    def at(self, conf: float) -> tuple[float | None, float | None]:
        """Return the expected precision and recall at a threshold, None where they are not known.

        Args:
            conf (float): Threshold.
        """
        kept = self.conf >= conf
        hits, n = int((self.tp & kept).sum()), int(kept.sum())
        return (hits / n if n and self.n_gt else None), (hits / self.n_gt if self.n_gt else None)


class Assessment(NamedTuple):
    """What cross-validation says of a lesson.

    Attributes:
        methods (dict[str, str]): Method that suits each class best.
        figures (dict[str, Figures]): How well each class was learned.
        suspects (set[int]): Numbers of the boxes that look more like another class.
    """

    methods: dict[str, str]
    figures: dict[str, Figures]
    suspects: set[int]


def gather(
    images: Sequence[LabeledImage], names: Sequence[str], shots: Sequence[Features], scenes: Mapping[str, Scene]
) -> Lesson:
    """Join the features of all that the user said.

    Args:
        images (Sequence[LabeledImage]): Images, at least one of them with a box.
        names (Sequence[str]): Class names.
        shots (Sequence[Features]): Features of each image with boxes, in the order of the images.
        scenes (Mapping[str, Scene]): Scenes of the images that are empty or have something rejected.

    Returns:
        (Lesson): What there is to learn from.
    """
    negatives = [p for p in images if p.rejected and not p.empty]
    features = _join([*shots, *(_only(scenes[p.key], _rejected(scenes[p.key], p)) for p in negatives)])
    boxes = [x for p in images for x in p.boxes]
    features = features._replace(cls=torch.tensor([names.index(x.name) for x in boxes]))
    empty = [scenes[p.key].features for p in images if p.empty]
    if empty:
        features = add_background(features, _join(empty))
    return Lesson(features, *compact(features, dict(enumerate(names))), [x.id for x in boxes])


def learn_classes(lesson: Lesson, rows: ClassRows, chosen: Mapping[str, str], own: Collection[str]) -> Learned:
    """Learn the classes that the detector was not trained on.

    Args:
        lesson (Lesson): What there is to learn from.
        rows (ClassRows): Class rows of the network.
        chosen (Mapping[str, str]): Methods by class name; other classes get that of few shots.
        own (Collection[str]): Classes that the detector was trained on.

    Returns:
        (Learned): Their classifiers.
    """
    features, names, labels, _ = lesson
    counts = torch.bincount(labels[labels >= 0], minlength=len(names))
    methods = [chosen.get(n, few_shot_method(rows.model)) for n in names]
    independent = independent_shots(features, labels, len(names), rows.per_level)
    features = add_replay_except(features, rows, names)
    weights = [classifiers(features, labels, methods, independent, i, s) for i, s in enumerate(rows.spaces())]
    new = [c for c, n in enumerate(names) if n not in own and counts[c]]
    return Learned(
        [names[c] for c in new],
        [int(counts[c]) for c in new],
        [methods[c] for c in new],
        [(vectors[new], offsets[new]) for vectors, offsets in weights],
        [n for c, n in enumerate(names) if n not in own and not counts[c]],
    )


def cross_validate(lesson: Lesson, rows: ClassRows, space: Space) -> Assessment:
    """Cross-validate over the shots.

    Args:
        lesson (Lesson): What there is to learn from.
        rows (ClassRows): Class rows of the network.
        space (Space): Embedding space of the predicting branch.

    Returns:
        (Assessment): The figures of every class, and the method that suits it best.
    """
    features, names, labels, numbers = lesson
    independent = independent_shots(features, labels, len(names), rows.per_level)
    features = add_replay_except(features, rows, names)
    first = features._replace(embeds=features.embeds[:1], anchors=features.anchors[:1])
    methods, left_out = choose_methods(
        first, labels, independent, "auto", few_shot_method(rows.model), space, nms=not rows.branches[0]
    )
    suggested, alike = thresholds(left_out), agreement(features, labels, len(names))
    figures = {
        n: Figures(suggested[c], _likeness(alike.sim_own, labels == c), *_of_class(left_out, c))
        for c, n in enumerate(names)
    }
    suspects = {numbers[i] for i in alike.suspect.nonzero()[:, 0].tolist()}
    return Assessment(dict(zip(names, methods)), figures, suspects)


def _rejected(scene: Scene, image: LabeledImage) -> torch.Tensor:
    """Return the anchors of what the user rejected, except where there is a labeled object, (A,) bool."""
    corners = torch.tensor([x.xyxy for x in image.rejected])
    chosen = (box_iou(scene.boxes, corners) >= IOU_SAME).any(1)
    if image.boxes:
        chosen &= ~(box_iou(scene.boxes, torch.tensor([x.xyxy for x in image.boxes])) >= IOU_SAME).any(1)
    return chosen


def _only(scene: Scene, chosen: torch.Tensor) -> Features:
    """Return some anchors of a scene as hard negatives, i.e. features of an image without objects."""
    anchors = [select(a, chosen) for a in scene.features.anchors]
    return scene.features._replace(anchors=[a._replace(weight=torch.full_like(a.weight, REJECTED)) for a in anchors])


def _join(parts: Sequence[Features]) -> Features:
    """Join the features of images."""
    anchors: list[list[Anchors]] = [[] for _ in parts[0].anchors]
    images: list[torch.Tensor] = []
    files: list[str] = []
    objects = 0
    for part in parts:
        for joined, a in zip(anchors, part.anchors):
            moved = torch.where(a.objects < 0, -1, a.objects + objects)
            joined.append(a._replace(objects=moved, image=a.image + len(files)))
        images.append(part.image + len(files))
        files += part.files
        objects += len(part.cls)
    return Features(
        torch.cat([x.cls for x in parts]),
        torch.cat([x.boxes for x in parts]),
        torch.cat(images),
        files,
        [torch.cat(x) for x in zip(*(p.embeds for p in parts))],
        [Anchors(*map(torch.cat, zip(*x))) for x in anchors],
        parts[0].views,
    )


def _likeness(sim_own: torch.Tensor, of_class: torch.Tensor) -> float | None:
    """Return the mean similarity of the shots of a class to each other."""
    values = sim_own[of_class]
    return None if not len(values) or bool(values.isnan().all()) else float(values.nanmean())


def _of_class(detections: Detections, c: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Return confidences, hits and number of objects of one class."""
    own = detections.cls == c
    return detections.conf[own], detections.tp[own], int(detections.n_gt[c])
