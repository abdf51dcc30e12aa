"""Memory of the base images: anchors that a new class must not take for its own, kept with the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from yolo_fewshot.data.support import Support
from yolo_fewshot.enroll.features import Anchors, Features, View, extract

IMAGES = 200  # looked at
ROWS = 4096  # anchors kept, about 1 MB with D = 128
WEIGHT = 0.3  # of one of them in a fit, beside 1 of an anchor of the support images

# Of each branch: embeddings (M, D) float16, levels (M,) and classes (M,) int16, -1 for background.
Memory = list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def base_support(model: nn.Module, labels: list[dict[str, Any]]) -> Support:
    """Return images that a model was trained on, or others like them, as a support set.

    Args:
        model (nn.Module): Few-shot model, whose classes the labels count.
        labels (list[dict[str, Any]]): Labels of the images, as in `YOLODataset.labels`.

    Returns:
        (Support): The support set, with as many channels as the model takes.
    """
    labels = [{**x, "segments": []} for x in labels]
    return Support(dict(model.names), labels, False, Path("base"), model.yaml.get("channels", 3))


def remember(model: nn.Module, train: list[dict[str, Any]], imgsz: int, seed: int = 0) -> Memory:
    """Keep anchors of training images: of objects, and background that looks most like an object. Deterministic.

    Args:
        model (nn.Module): Few-shot model in eval mode, left as it is.
        train (list[dict[str, Any]]): Labels of the training images, as in `YOLODataset.labels`.
        imgsz (int): Image size in pixels.
        seed (int): Seed of the choice.

    Returns:
        (Memory): The anchors, on the CPU.
    """
    rng = np.random.default_rng(seed)
    support = base_support(model, [train[i] for i in np.sort(rng.permutation(len(train))[:IMAGES])])
    features = extract(model, support, imgsz, views=[View()], rows=0, desc="Remembering base images")
    memory = []
    for anchors in features.anchors:
        chosen = []
        for rows in ((anchors.objects >= 0).nonzero()[:, 0], (anchors.objects < 0).nonzero()[:, 0]):
            chosen.append(rows[torch.from_numpy(rng.permutation(len(rows))[: ROWS // 2])])
        rows = torch.cat(chosen).sort()[0]
        cls = torch.cat([features.cls, features.cls.new_tensor([-1])])[anchors.objects[rows]]
        memory.append((anchors.embeds[rows].half(), anchors.level[rows].to(torch.int16), cls.to(torch.int16)))
    return memory


def recall(memory: Memory, features: Features, own: list[int]) -> Features:
    """Add the remembered anchors to the features of a support set, as anchors of no object and no image.

    Args:
        memory (Memory): Memory of the model; may be empty.
        features (Features): Features of a support set.
        own (list[int]): The model's indices of classes that the support set shows, whose anchors are left out.

    Returns:
        (Features): The features.
    """
    joined = []
    for anchors, (embeds, level, cls) in zip(features.anchors, memory):
        keep = ~torch.isin(cls, torch.tensor(own, dtype=cls.dtype))
        n = int(keep.sum())
        none, weight = torch.full((n,), -1), torch.full((n,), WEIGHT)
        extra = Anchors(embeds[keep].float(), level[keep].long(), torch.zeros(n, 4), none, weight, none, none)
        joined.append(Anchors(*map(torch.cat, zip(anchors, extra))))
    return features._replace(anchors=joined) if memory else features
