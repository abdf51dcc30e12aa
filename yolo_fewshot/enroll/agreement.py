"""Agreement of the shots of a class, to find wrong labels."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from yolo_fewshot.enroll.features import Features
from yolo_fewshot.nn.prototypes import class_means

MIN_SHOTS = 3  # minimum shots of a class to judge them


class Agreement(NamedTuple):
    """Similarity of objects to their own and to other classes, as cosines of centered embeddings, see `agreement`.

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
    subtracted. Where levels have embeddings of their own, it is the mean of the cosines at the levels where both have
    an anchor, weighted by the share of the object at a level.

    An object is suspect if it is more similar to another class than to the rest of its own, and its similarity to its
    own is less than half the median of its class. Classes of fewer than `MIN_SHOTS` objects are not judged, nor is a
    single class.

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
    counts = torch.bincount(labels[labels >= 0], minlength=n)
    present = counts > 0
    if present.sum() < 2:
        return result
    parts = features.embeds[0].shape[1] // features.anchors[0].embeds.shape[1]
    centered, shares = zip(*(_centered(x, labels, present) for x in features.embeds[0].chunk(parts, dim=1)))
    embeds, share = torch.stack(centered, 1), torch.stack(shares, 1)  # (N, parts, D) of unit length and (N, parts)
    sums = torch.einsum("nc,npd->cpd", F.one_hot(labels + 1, n + 1)[:, 1:].to(embeds), embeds * share[..., None])
    for c in present.nonzero()[:, 0].tolist():
        members = (labels == c).nonzero()[:, 0]
        excluded = ~present | (torch.arange(n) == c)
        others = _similarity(embeds[members], share[members], sums[None]).masked_fill(excluded, torch.nan)
        sim_other, nearest = others.nan_to_num(-torch.inf).max(1)
        comparable = sim_other > -torch.inf
        result.sim_other[members[comparable]] = sim_other[comparable]
        result.nearest[members[comparable]] = nearest[comparable]
        if counts[c] > 1:
            rest = sums[c] - embeds[members] * share[members, :, None]
            sim_own = _similarity(embeds[members], share[members], rest[:, None])[:, 0]
            result.sim_own[members] = sim_own
            dissimilar = (sim_own < sim_other) & (sim_own < sim_own.nanmedian() / 2)
            result.suspect[members] = (counts[c] >= MIN_SHOTS) & dissimilar
    return result


def _centered(embeds: torch.Tensor, labels: torch.Tensor, present: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Subtract the mean of the class means from embeddings.

    Args:
        embeds (torch.Tensor): Embeddings at one level, or at all of them, (N, D); rows of zeros without an anchor.
        labels (torch.Tensor): Class of every object, (N,), or negative to leave it out.
        present (torch.Tensor): Classes with an object, (n,) bool.

    Returns:
        centered (torch.Tensor): (N, D) of unit length; rows of zeros without an anchor.
        share (torch.Tensor): Length of the embeddings, i.e. the share of the object at the level, (N,).
    """
    share = embeds.norm(dim=1)
    unit, here = F.normalize(embeds, dim=1), share > 0
    means, counts = class_means(unit, torch.where(here, labels, -1), len(present))
    center = means[counts > 0].mean(0) if (counts > 0).any() else means.new_zeros(means.shape[1])
    return F.normalize(unit - center, dim=1) * here[:, None], share


def _similarity(embeds: torch.Tensor, share: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
    """Compare objects with sums of others, level by level.

    Args:
        embeds (torch.Tensor): Centered embeddings of unit length, (N, parts, D).
        share (torch.Tensor): Share of each object at each level, (N, parts).
        sums (torch.Tensor): Sums of others, (1 or N, n, parts, D); zeros at a level without one.

    Returns:
        (torch.Tensor): Mean cosine over the levels, (N, n); NaN where no level is shared.
    """
    cosine = (embeds[:, None] * F.normalize(sums, dim=3)).sum(3)
    weight = share[:, None] * (sums.norm(dim=3) > 1e-6)
    return (cosine * weight).sum(2) / weight.sum(2)
