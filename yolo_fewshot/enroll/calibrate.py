"""Choose the 1-shot prior strength on pseudo-novel base classes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from yolo_fewshot.enroll.detection import ap50, detect
from yolo_fewshot.enroll.features import Features, View, extract, select
from yolo_fewshot.enroll.methods import MARGIN, PRIOR_STRENGTH, classifiers
from yolo_fewshot.enroll.replay import add_replay, base_support
from yolo_fewshot.nn.rows import Space, class_rows

TRIALS = 3  # number of draws of shots
MAX_CLASSES = 20  # maximum number of pseudo-novel classes, which are at most half of all
MAX_QUERIES = 100  # maximum number of query images


def choose_prior_strength(
    model: Any, train: list[dict[str, Any]], val: list[dict[str, Any]], imgsz: int, seed: int = 0
) -> float:
    """Choose the 1-shot prior strength by the AP50 of base classes that are enrolled from one shot each.

    Shots are drawn from training images, and detected in validation images. Deterministic.

    Args:
        model (FewShotDetectionModel): Model in eval mode, left unchanged.
        train (list[dict[str, Any]]): Labels of the training images, as in `YOLODataset.labels`.
        val (list[dict[str, Any]]): Labels of the validation images, with the same class indices.
        imgsz (int): Image size in pixels.
        seed (int): Seed of the draws.

    Returns:
        (float): `PRIOR_STRENGTH`, or infinity if the method 'mean' is better; `PRIOR_STRENGTH` if fewer than two
            classes are in both splits.
    """
    rng = np.random.default_rng(seed)
    candidates = np.intersect1d(_classes(train), _classes(val))
    if len(candidates) < 2:
        return PRIOR_STRENGTH
    classes = rng.permutation(candidates)[: min(MAX_CLASSES, max(len(candidates) // 2, 2))]
    measured = _images(val, classes, rng)[:MAX_QUERIES]
    queries, files = _features(model, measured, classes, imgsz, [View()]), {x["im_file"] for x in measured}
    images, drawn, ends = [x for x in _images(train, classes, rng) if x["im_file"] not in files], [], [0]
    for _ in range(TRIALS):
        shots = _draw_shots(images, classes)
        if len(_classes(shots)) < len(classes):
            break  # too few images for another draw
        images = [x for x in images if not any(x is y for y in shots)]
        drawn += shots
        ends.append(len(drawn))
    if not drawn:
        return PRIOR_STRENGTH
    features, labels = _features(model, drawn, classes, imgsz)
    differences = []
    for low, high in zip(ends[:-1], ends[1:]):
        support = _select_images(features, labels, low, high)
        mean, fit = (
            _ap50(support, queries, len(classes), m, model.model[-1].branch_prototypes[0]) for m in ("mean", "fit")
        )
        differences.append(mean - fit)
    return math.inf if np.mean(differences) > MARGIN else PRIOR_STRENGTH


def _classes(labels: list[dict[str, Any]]) -> np.ndarray:
    """Return the classes that have an object in some images, ascending."""
    return np.unique(np.concatenate([np.zeros(0), *(x["cls"].reshape(-1) for x in labels)]).astype(int))


def _images(labels: list[dict[str, Any]], classes: np.ndarray, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Return the images that show one of the classes, in random order, with the labels of these classes only."""
    images = []
    for i in rng.permutation(len(labels)):
        keep = np.isin(labels[i]["cls"].reshape(-1), classes)
        if keep.any():
            images.append({**labels[i], "cls": labels[i]["cls"][keep], "bboxes": labels[i]["bboxes"][keep]})
    return images


def _draw_shots(images: list[dict[str, Any]], classes: np.ndarray) -> list[dict[str, Any]]:
    """Return images that together show every class."""
    missing, drawn = set(classes.tolist()), []
    for image in images:
        present = set(_classes([image]).tolist())
        if missing & present:
            drawn.append(image)
            missing -= present
    return drawn


def _features(
    model: Any, images: list[dict[str, Any]], classes: np.ndarray, imgsz: int, views: list[View] | None = None
) -> tuple[Features, torch.Tensor]:
    """Return the features of images, and the index of every object's class among the classes."""
    features = extract(class_rows(model), base_support(model, images), imgsz, views=views, desc="Calibrating")
    index = {c: i for i, c in enumerate(classes.tolist())}
    valid = features.embeds[0].any(1) if views is None else torch.ones(len(features.cls), dtype=torch.bool)
    features = add_replay(features, class_rows(model), classes.tolist()) if views is None else features
    return features, torch.where(valid, torch.tensor([index[c] for c in features.cls.tolist()]), -1)


def _select_images(features: Features, labels: torch.Tensor, low: int, high: int) -> tuple[Features, torch.Tensor]:
    """Return the features and labels of images low to high - 1, with the replay buffer."""
    anchors, inside = features.anchors[0], (features.image >= low) & (features.image < high)
    part = select(anchors, (anchors.image < 0) | (anchors.image >= low) & (anchors.image < high))
    return features._replace(anchors=[part]), torch.where(inside, labels, -1)


def _ap50(
    support: tuple[Features, torch.Tensor],
    queries: tuple[Features, torch.Tensor],
    n: int,
    method: str,
    space: Space,
) -> float:
    """Return the mean AP50 on the query images of n classes enrolled from a support set."""
    features, labels = support
    shots = torch.bincount(labels[labels >= 0], minlength=n)
    weights = classifiers(features, labels, [method] * n, shots, 0, space)
    every = torch.ones(len(queries[0].files), dtype=torch.bool)
    return ap50(detect(*queries, every, weights, space))
