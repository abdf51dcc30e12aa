"""Enrollment methods: how the classifiers of new classes follow from their shots.

To add a method, write a function from `Examples` to vectors and offsets, list it in `METHODS`, and add its name to the
choices of the key `enroll` in `yolo_fewshot.args`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from yolo_fewshot.enroll.features import Anchors, Features, select
from yolo_fewshot.enroll.fit import fit_classes
from yolo_fewshot.nn.head import Prototypes
from yolo_fewshot.nn.prototypes import class_means

PRIOR_STRENGTH = 3.0  # of `fit` with one shot; K shots divide it by K
MARGIN = 0.01  # AP50 by which `mean` must beat `fit` under 'auto', since known classes and fewer shots favor it


class Examples(NamedTuple):
    """What n classes are learned from, in one branch of the head.

    The logit of a class at an anchor with embedding e and level l is scale_l <e, vector> + bias_l + offset.

    Attributes:
        embeds (torch.Tensor): Embeddings of the shots, (N, D) float32 of unit length.
        labels (torch.Tensor): Class of every shot, (N,) int64 in 0..n-1.
        anchors (Anchors): Anchors of the support images and of the replay buffer, M of them.
        targets (torch.Tensor): Class of every anchor, (M,) int64 in 0..n-1, or -1 for none of these classes.
        shots (torch.Tensor): Number of shots of every class, (n,); in cross-validation those of all folds.
        prototypes (Prototypes): Level scales and biases of the branch.
    """

    embeds: torch.Tensor
    labels: torch.Tensor
    anchors: Anchors
    targets: torch.Tensor
    shots: torch.Tensor
    prototypes: Prototypes

    @property
    def means(self) -> torch.Tensor:
        """Mean embedding of every class, (n, D) float32 of unit length."""
        return class_means(self.embeds, self.labels, len(self.shots))[0]


def mean(examples: Examples) -> tuple[torch.Tensor, torch.Tensor]:
    """Take the mean embedding of the shots of a class as its prototype (Snell et al. 2017).

    Args:
        examples (Examples): Shots and anchors of n classes.

    Returns:
        vectors (torch.Tensor): (n, D) float32.
        offsets (torch.Tensor): (n,) float32.
    """
    means = examples.means
    return means, means.new_zeros(len(means))


def fit(examples: Examples) -> tuple[torch.Tensor, torch.Tensor]:
    """Fit the classifiers on all anchors of the support images, with an L2 prior around the mean prototypes.

    Args:
        examples (Examples): Shots and anchors of n classes.

    Returns:
        vectors (torch.Tensor): (n, D) float32.
        offsets (torch.Tensor): (n,) float32.
    """
    prior_strength = PRIOR_STRENGTH / examples.shots
    return fit_classes(examples.anchors, examples.targets, examples.means, prior_strength, examples.prototypes)


METHODS: dict[str, Callable[[Examples], tuple[torch.Tensor, torch.Tensor]]] = {"mean": mean, "fit": fit}


def classifiers(
    features: Features,
    labels: torch.Tensor,
    methods: Sequence[str],
    shots: torch.Tensor,
    branch: int,
    prototypes: Prototypes,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the classifiers of the classes of a support set in one branch, each made by its method.

    Args:
        features (Features): Features of the support set.
        labels (torch.Tensor): Class of every object, (N,) in 0..n-1, or negative to leave it out.
        methods (Sequence[str]): Method of every class.
        shots (torch.Tensor): Number of shots of every class, (n,).
        branch (int): Index of the branch.
        prototypes (Prototypes): Level scales and biases of the branch.

    Returns:
        vectors (torch.Tensor): Prototype times gain of every class, (n, D) float32; zeros without an object.
        offsets (torch.Tensor): Offset of every class, (n,) float32.
    """
    embeds, anchors, n = features.embeds[branch], features.anchors[branch], len(methods)
    labels = labels.clamp(min=-1)
    targets = torch.cat([labels, labels.new_tensor([-1])])[anchors.objects]
    keep = (anchors.objects < 0) | (targets >= 0)  # an object that is left out is not background either
    anchors, targets = select(anchors, keep), targets[keep]
    present = torch.bincount(labels[labels >= 0], minlength=n) > 0
    vectors, offsets = embeds.new_zeros(n, embeds.shape[1]), embeds.new_zeros(n)
    for name in dict.fromkeys(methods):
        classes = torch.tensor([m == name for m in methods]).logical_and(present).nonzero()[:, 0]
        if not len(classes):
            continue
        index = torch.full((n + 1,), -1)  # of every class among those of this method; the last entry is for none
        index[classes] = torch.arange(len(classes))
        shown = index[labels] >= 0
        examples = Examples(embeds[shown], index[labels[shown]], anchors, index[targets], shots[classes], prototypes)
        vectors[classes], offsets[classes] = METHODS[name](examples)
    return vectors, offsets
