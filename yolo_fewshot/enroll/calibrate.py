"""How `auto` enrolls from a single shot, chosen on base classes that play novel ones."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import nn

from yolo_fewshot.enroll.detection import ap50, detect
from yolo_fewshot.enroll.features import Features, View, extract, select
from yolo_fewshot.enroll.fit import MARGIN, PRIOR_STRENGTH, classifiers
from yolo_fewshot.enroll.replay import base_support, recall

TRIALS = 3  # draws of shots
CLASSES = 20  # that play novel ones, at most, and at most half of all
QUERIES = 100  # images to detect them in, at most


def choose_prior_strength(
    model: nn.Module, train: list[dict[str, Any]], val: list[dict[str, Any]], imgsz: int, seed: int = 0
) -> float:
    """Choose how to enroll from one shot, by the AP50 of base classes that are enrolled from one like novel ones.

    Their shots come from training images, and they are looked for in validation images. Deterministic.

    Args:
        model (nn.Module): Few-shot model in eval mode, left as it is.
        train (list[dict[str, Any]]): Labels of the training images, as in `YOLODataset.labels`.
        val (list[dict[str, Any]]): Labels of the validation images, with the same class indices.
        imgsz (int): Image size in pixels.
        seed (int): Seed of the draws.

    Returns:
        (float): `PRIOR_STRENGTH`, or infinity if the mean prototype itself is better; `PRIOR_STRENGTH` too where fewer
            than two classes are in both splits.
    """
    rng = np.random.default_rng(seed)
    seen = [np.unique(np.concatenate([x["cls"].reshape(-1) for x in labels] or [[]])) for labels in (train, val)]
    able = np.intersect1d(*seen).astype(int)
    if len(able) < 2:
        return PRIOR_STRENGTH
    classes = rng.permutation(able)[: min(CLASSES, max(len(able) // 2, 2))]
    queries = _features(model, _images(val, classes, rng)[:QUERIES], classes, imgsz, [View()])
    images, drawn, ends = _images(train, classes, rng), [], [0]
    for _ in range(TRIALS):
        shots = _draw(images, classes)
        if len(np.unique(np.concatenate([x["cls"].reshape(-1) for x in shots] or [[]]))) < len(classes):
            break  # the images do not suffice for another draw
        images = [x for x in images if not any(x is y for y in shots)]
        drawn += shots
        ends.append(len(drawn))
    if not drawn:
        return PRIOR_STRENGTH
    features, labels = _features(model, drawn, classes, imgsz)
    gains = []
    for low, high in zip(ends[:-1], ends[1:]):
        support = _only(features, labels, low, high)
        mean, fit = (
            _ap50(support, queries, len(classes), p, model.model[-1].banks[0]) for p in (math.inf, PRIOR_STRENGTH)
        )
        gains.append(mean - fit)
    return math.inf if np.mean(gains) > MARGIN else PRIOR_STRENGTH


def _images(labels: list[dict[str, Any]], classes: np.ndarray, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Return the images that show one of the classes, in random order, labeled with these classes alone."""
    found = []
    for i in rng.permutation(len(labels)):
        keep = np.isin(labels[i]["cls"].reshape(-1), classes)
        if keep.any():
            found.append({**labels[i], "cls": labels[i]["cls"][keep], "bboxes": labels[i]["bboxes"][keep]})
    return found


def _draw(images: list[dict[str, Any]], classes: np.ndarray) -> list[dict[str, Any]]:
    """Return images that together show every class."""
    missing, drawn = set(classes.tolist()), []
    for image in images:
        shown = set(image["cls"].reshape(-1).astype(int).tolist())
        if missing & shown:
            drawn.append(image)
            missing -= shown
    return drawn


def _features(
    model: nn.Module, images: list[dict[str, Any]], classes: np.ndarray, imgsz: int, views: list[View] | None = None
) -> tuple[Features, torch.Tensor]:
    """Return the features of images, and the class of every object as its place among the classes."""
    features = extract(model, base_support(model, images), imgsz, views=views, desc="Calibrating")
    place = {c: i for i, c in enumerate(classes.tolist())}
    valid = features.embeds[0].any(1) if views is None else torch.ones(len(features.cls), dtype=torch.bool)
    features = recall(model.memory, features, classes.tolist()) if views is None else features
    return features, torch.where(valid, torch.tensor([place[c] for c in features.cls.tolist()]), -1)


def _only(features: Features, labels: torch.Tensor, low: int, high: int) -> tuple[Features, torch.Tensor]:
    """Return the part of some features and labels that images low to high - 1 and the memory have."""
    anchors, shown = features.anchors[0], (features.image >= low) & (features.image < high)
    part = select(anchors, (anchors.image < 0) | (anchors.image >= low) & (anchors.image < high))
    return features._replace(anchors=[part]), torch.where(shown, labels, -1)


def _ap50(support: tuple, queries: tuple, n: int, prior_strength: float, bank: nn.Module) -> float:
    """Return the mean AP50 of classes enrolled from a support set."""
    counts = torch.bincount(support[1][support[1] >= 0], minlength=n)
    rows = classifiers(*support, torch.where(counts > 0, prior_strength / counts, torch.inf), 0, bank)
    every = torch.ones(len(queries[0].files), dtype=torch.bool)
    return ap50(detect(*queries, every, rows, bank))
