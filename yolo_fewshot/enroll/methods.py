"""Enrollment methods: how the classifiers of new classes follow from their shots.

To add a method, write a function from `Examples` to vectors and offsets, list it in `METHODS`, and add its name to the
choices of the key `enroll` in `yolo_fewshot.args`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from yolo_fewshot.enroll.features import Anchors, Features, select
from yolo_fewshot.enroll.fit import fit_classes, fit_levels, fit_scale
from yolo_fewshot.nn.prototypes import class_means
from yolo_fewshot.nn.rows import LevelSpace, Space

PRIOR_STRENGTH = 3.0  # of `fit` with one shot; K shots divide it by K
MARGIN = 0.01  # AP50 by which `mean` must beat `fit` under 'auto', since known classes and fewer shots favor it


class Examples(NamedTuple):
    """What n classes are learned from, in one branch of the head.

    The logit of a class at an anchor with embedding e and level l is scale_l <e, vector> + bias_l + offset in the
    prototype space of a few-shot head, and <e, vector_l> + bias_l + offset_l in the space of a stock head.

    Attributes:
        embeds (torch.Tensor): Embeddings of the shots, as `Features.embeds`.
        labels (torch.Tensor): Class of every shot, (N,) int64 in 0..n-1.
        anchors (Anchors): Anchors of the support images and of the replay buffer, M of them.
        targets (torch.Tensor): Class of every anchor, (M,) int64 in 0..n-1, or -1 for none of these classes.
        shots (torch.Tensor): Number of shots of every class, (n,), that of images with shots in a stock head; in
            cross-validation those of all folds.
        space (Space): Embedding space of the branch.
    """

    embeds: torch.Tensor
    labels: torch.Tensor
    anchors: Anchors
    targets: torch.Tensor
    shots: torch.Tensor
    space: Space

    @property
    def means(self) -> torch.Tensor:
        """Mean embedding of every class, (n, D) float32 of unit length."""
        return class_means(self.embeds, self.labels, len(self.shots))[0]


def mean(examples: Examples) -> tuple[torch.Tensor, torch.Tensor]:
    """Take the mean embedding of the shots of a class as its prototype (Snell et al. 2017).

    A stock head has not learned the scale of its logits, so that scale and offset are fitted.

    Args:
        examples (Examples): Shots and anchors of n classes.

    Returns:
        vectors (torch.Tensor): Vectors of the classes, as in `space`.
        offsets (torch.Tensor): Offsets of the classes, as in `space`.
    """
    if isinstance(examples.space, LevelSpace):
        return fit_scale(examples.anchors, examples.targets, PRIOR_STRENGTH / examples.shots, examples.space)
    means = examples.means
    return means, means.new_zeros(len(means))


def fit(examples: Examples) -> tuple[torch.Tensor, torch.Tensor]:
    """Fit the classifiers on all anchors of the support images, with an L2 prior around the mean prototypes.

    In the space of a stock head the prior is around zero.

    Args:
        examples (Examples): Shots and anchors of n classes.

    Returns:
        vectors (torch.Tensor): Vectors of the classes, as in `space`.
        offsets (torch.Tensor): Offsets of the classes, as in `space`.
    """
    prior_strength = PRIOR_STRENGTH / examples.shots
    if isinstance(examples.space, LevelSpace):
        return fit_levels(examples.anchors, examples.targets, prior_strength, examples.space)
    return fit_classes(examples.anchors, examples.targets, examples.means, prior_strength, examples.space)


METHODS: dict[str, Callable[[Examples], tuple[torch.Tensor, torch.Tensor]]] = {"mean": mean, "fit": fit}


def few_shot_method(model: Any) -> str:
    """Return the method that classes of few shots get under 'auto': the one that was better on base classes.

    Args:
        model (nn.Module): Model; one whose training did not compare the methods gets 'fit'.
    """
    return "mean" if getattr(model, "prior_strength", None) == math.inf else "fit"


def independent_shots(features: Features, labels: torch.Tensor, n: int, per_level: bool) -> torch.Tensor:
    """Count the shots of every class, as in `Examples.shots`.

    Args:
        features (Features): Features of a support set.
        labels (torch.Tensor): Class of every object, (N,) in 0..n-1, or negative to leave it out.
        n (int): Number of classes.
        per_level (bool): Whether every level has a row of its own, as in a stock head. There the objects of a class in
            one image count once, since they resemble each other.

    Returns:
        (torch.Tensor): Number of shots of every class, (n,) int64.
    """
    shown = labels >= 0
    pairs = torch.stack([labels[shown], features.image[shown]])
    pairs = pairs.unique(dim=1) if per_level else pairs
    return torch.bincount(pairs[0], minlength=n)


def classifiers(
    features: Features,
    labels: torch.Tensor,
    methods: Sequence[str],
    shots: torch.Tensor,
    branch: int,
    space: Space,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the classifiers of the classes of a support set in one branch, each made by its method.

    Args:
        features (Features): Features of the support set.
        labels (torch.Tensor): Class of every object, (N,) in 0..n-1, or negative to leave it out.
        methods (Sequence[str]): Method of every class.
        shots (torch.Tensor): Number of shots of every class, (n,).
        branch (int): Index of the branch.
        space (Space): Embedding space of the branch.

    Returns:
        vectors (torch.Tensor): Vectors of the classes, as in `space`; zeros without an object.
        offsets (torch.Tensor): Offsets of the classes, as in `space`.
    """
    embeds, anchors, n = features.embeds[branch], features.anchors[branch], len(methods)
    labels = labels.clamp(min=-1)
    targets = torch.cat([labels, labels.new_tensor([-1])])[anchors.objects]
    keep = (anchors.objects < 0) | (targets >= 0)  # an object that is left out is not background either
    anchors, targets = select(anchors, keep), targets[keep]
    present = torch.bincount(labels[labels >= 0], minlength=n) > 0
    vectors, offsets = space.zeros(n)
    for name in dict.fromkeys(methods):
        classes = torch.tensor([m == name for m in methods]).logical_and(present).nonzero()[:, 0]
        if not len(classes):
            continue
        index = torch.full((n + 1,), -1)  # of every class among those of this method; the last entry is for none
        index[classes] = torch.arange(len(classes))
        shown = index[labels] >= 0
        examples = Examples(embeds[shown], index[labels[shown]], anchors, index[targets], shots[classes], space)
        vectors[classes], offsets[classes] = METHODS[name](examples)
    return vectors, offsets
