"""Agreement of the shots of a class, which reveals wrong labels."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from yolo_fewshot.enroll.features import Features
from yolo_fewshot.nn.prototypes import class_means

MIN_SHOTS = 3  # of a class whose shots are judged


class Agreement(NamedTuple):
    """Similarity of objects to their own and to other classes, as cosines of centered embeddings.

    Attributes:
        sim_own (torch.Tensor): Similarity to the other objects of its class, (N,) float32; NaN where there are none.
        sim_other (torch.Tensor): Similarity to the nearest other class, (N,) float32; NaN where there is none.
        nearest (torch.Tensor): That class, (N,) int64; -1 where there is none.
        suspect (torch.Tensor): Whether the object disagrees with the rest of its class, (N,) bool.
    """

    sim_own: torch.Tensor
    sim_other: torch.Tensor
    nearest: torch.Tensor
    suspect: torch.Tensor


def agreement(features: Features, labels: torch.Tensor, n: int) -> Agreement:
    """Compare every object with the rest of its class and with the other classes.

    Similarity is the cosine to the mean of a class, after the mean of the class means, which all objects share, is
    subtracted. An object is suspect if it is more similar to another class than to the rest of its own, and its
    similarity to its own is less than half the median of its class. Classes of fewer than `MIN_SHOTS` objects are not
    judged, nor is a single class.

    Args:
        features (Features): Features of a support set.
        labels (torch.Tensor): Class of every object, (N,) in 0..n-1, or negative to leave it out.
        n (int): Number of classes.

    Returns:
        (Agreement): Similarities and suspects.
    """
    size = len(labels)
    result = Agreement(
        torch.full((size,), torch.nan),
        torch.full((size,), torch.nan),
        torch.full((size,), -1),
        torch.zeros(size, dtype=torch.bool),
    )
    means, counts = class_means(features.embeds[0], labels, n)
    present = counts > 0
    if present.sum() < 2:
        return result
    embeds = F.normalize(features.embeds[0] - means[present].mean(0), dim=1)
    means, _ = class_means(embeds, labels, n)
    sums = F.one_hot(labels + 1, n + 1)[:, 1:].to(embeds).t() @ embeds
    for c in present.nonzero()[:, 0].tolist():
        members = (labels == c).nonzero()[:, 0]
        excluded = ~present | (torch.arange(n) == c)
        sim_other, nearest = (embeds[members] @ means.t()).masked_fill(excluded, -torch.inf).max(1)
        result.sim_other[members], result.nearest[members] = sim_other, nearest
        if counts[c] > 1:
            sim_own = (embeds[members] * F.normalize(sums[c] - embeds[members], dim=1)).sum(1)
            result.sim_own[members] = sim_own
            odd = (sim_own < sim_other) & (sim_own < sim_own.median() / 2)
            result.suspect[members] = (counts[c] >= MIN_SHOTS) & odd
    return result
