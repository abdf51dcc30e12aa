"""Replay buffer of base anchors used as negatives."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from yolo_fewshot.data.support import Support
from yolo_fewshot.enroll.features import Anchors, Features, View, extract
from yolo_fewshot.nn.rows import ClassRows, class_rows

MAX_IMAGES = 200  # maximum number of images
MAX_ANCHORS = 4096  # maximum number of anchors, about 1 MB with D = 128

# Of each branch: embeddings (M, D) float16, levels (M,) int16 and classes (M,) int16, -1 for background.
ReplayBuffer = list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def base_support(model: Any, labels: list[dict[str, Any]]) -> Support:
    """Return base images as a support set.

    Args:
        model (FewShotDetectionModel): Model with the class indices of the labels.
        labels (list[dict[str, Any]]): Labels of the images, as in `YOLODataset.labels`.

    Returns:
        (Support): The support set, with the channels of the model.
    """
    labels = [{**x, "segments": []} for x in labels]
    return Support(dict(model.names), labels, False, Path("base"), model.yaml.get("channels", 3))


def fill_replay_buffer(model: Any, train: list[dict[str, Any]], imgsz: int, seed: int = 0) -> ReplayBuffer:
    """Sample anchors of training images: half of objects, half of hard background. The sample is deterministic.

    Args:
        model (FewShotDetectionModel): Model in eval mode, left unchanged.
        train (list[dict[str, Any]]): Labels of the training images, as in `YOLODataset.labels`.
        imgsz (int): Image size in pixels.
        seed (int): Seed of the sample.

    Returns:
        (ReplayBuffer): The anchors, on the CPU.
    """
    rng = np.random.default_rng(seed)
    support = base_support(model, [train[i] for i in np.sort(rng.permutation(len(train))[:MAX_IMAGES])])
    features = extract(
        class_rows(model), support, imgsz, views=[View()], max_values=0, desc="Filling the replay buffer"
    )
    buffer = []
    for anchors in features.anchors:
        chosen = []
        for rows in ((anchors.objects >= 0).nonzero()[:, 0], (anchors.objects < 0).nonzero()[:, 0]):
            chosen.append(rows[torch.from_numpy(rng.permutation(len(rows))[: MAX_ANCHORS // 2])])
        rows = torch.cat(chosen).sort()[0]
        cls = torch.cat([features.cls, features.cls.new_tensor([-1])])[anchors.objects[rows]]
        buffer.append((anchors.embeds[rows].half(), anchors.level[rows].to(torch.int16), cls.to(torch.int16)))
    return buffer


def without_class(buffer: list, index: int) -> list:
    """Return a replay buffer without a class of the model, whose later classes decrease by one.

    Args:
        buffer (list[tuple]): Embeddings, levels and classes of the anchors, per branch.
        index (int): Class.

    Returns:
        (list[tuple]): The same without it.
    """
    left = []
    for embeds, level, cls in buffer:
        keep = cls != index
        left.append((embeds[keep], level[keep], cls[keep] - (cls[keep] > index).to(cls)))
    return left


def add_replay(features: Features, rows: ClassRows, exclude: list[int]) -> Features:
    """Add the anchors of a replay buffer to the features of a support set, as anchors of no object and no image.

    Args:
        features (Features): Features of a support set.
        rows (ClassRows): Class rows of the model, whose replay buffer may be empty.
        exclude (list[int]): Classes of the model whose anchors are left out, since the support set has objects of them.

    Returns:
        (Features): The features.
    """
    buffer, joined = rows.memory, []
    if not buffer:
        return features
    for anchors, (embeds, level, cls) in zip(features.anchors, buffer):
        keep = ~torch.isin(cls, torch.tensor(exclude, dtype=cls.dtype))
        n = int(keep.sum())
        level, none, weight = level[keep].long(), torch.full((n,), -1), torch.full((n,), rows.memory_weight)
        extra = Anchors(embeds[keep].float(), level, torch.zeros(n, 4), none, weight, none, none)
        joined.append(Anchors(*map(torch.cat, zip(anchors, extra))))
    return features._replace(anchors=joined)


def add_replay_except(features: Features, rows: ClassRows, names: Collection[str]) -> Features:
    """Add the anchors of a replay buffer, see `add_replay`, but those of some classes.

    Args:
        features (Features): Features of a support set.
        rows (ClassRows): Class rows of the model.
        names (Collection[str]): Names of the classes; those that the model does not have are ignored.

    Returns:
        (Features): The features.
    """
    indices = {str(n): i for i, n in rows.model.names.items()}
    return add_replay(features, rows, [indices[n] for n in names if n in indices])
