"""The `fit` enrollment: classifiers of new classes, fitted on the anchors of their support images."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from yolo_fewshot.enroll.features import Anchors, Features, select
from yolo_fewshot.nn.head import Prototypes
from yolo_fewshot.nn.prototypes import class_means

PRIOR_STRENGTH = 3.0  # of one shot; K shots prior strength K times less
MARGIN = 0.01  # AP50 by which `mean` must beat a fit: known classes and fewer shots, as in the comparisons, favor it
NEGATIVES = 20_000  # anchors without an object of the classes, the hardest, that a fit uses
CLASSES = 64  # classes fitted together, which bounds the memory


def classifiers(
    features: Features, labels: torch.Tensor, prior_strength: torch.Tensor, branch: int, bank: Prototypes
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the classifiers of the classes of a support set in one branch.

    Args:
        features (Features): Features of the support set.
        labels (torch.Tensor): Class of every object, (N,) in 0..n-1, or negative for one to leave out.
        prior_strength (torch.Tensor): Of every class, (n,) float32; infinite for the mean prototype itself.
        branch (int): Index of the branch.
        bank (Prototypes): Prototypes of the branch.

    Returns:
        vectors (torch.Tensor): Prototype times gain of every class, (n, D) float32.
        offsets (torch.Tensor): Offset of every class, (n,) float32.
    """
    anchors = features.anchors[branch]
    targets = torch.cat([labels, labels.new_tensor([-1])])[anchors.objects].clamp(min=-1)
    keep = (anchors.objects < 0) | (targets >= 0)  # an object that is left out is no background either
    return fit_classes(
        select(anchors, keep),
        targets[keep],
        class_means(features.embeds[branch], labels, len(prior_strength))[0],
        prior_strength,
        bank,
    )


def fit_classes(
    anchors: Anchors, targets: torch.Tensor, prototypes: torch.Tensor, prior_strength: torch.Tensor, bank: Prototypes
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fit the classifiers of some classes by convex logistic regression with an L2 prior around their prototypes.

    Class by class, over the anchors a with embedding e_a, level l_a and target t_ac (the IoU-based weight of an anchor
    of the class, else 0), minimizes over the vector v and the offset o

        sum_a w_a BCE(s_l <e_a, v> + b_l + o, t_ac) / sum_a t_ac  +  prior strength (|v - p_c|^2 + o^2 / 100),

    where w_a is 1, or the weight of an anchor of no object. It is the class term of Ultralytics' detection loss with a
    Gaussian prior. An infinite prior strength gives the prototype.

    Args:
        anchors (Anchors): Anchors of the support set, M of them.
        targets (torch.Tensor): Class of every anchor, (M,) int64 in 0..n-1, or negative for none of them.
        prototypes (torch.Tensor): Mean prototypes of the classes, (n, D) float32 of unit length.
        prior_strength (torch.Tensor): Prior strength of every class, (n,) float32, greater than 0.
        bank (Prototypes): Level scales and biases of the branch.

    Returns:
        vectors (torch.Tensor): v of every class, (n, D) float32.
        offsets (torch.Tensor): o of every class, (n,) float32.
    """
    vectors, offsets = prototypes.clone(), prototypes.new_zeros(len(prototypes))
    scale, bias = (x.detach().float().cpu()[anchors.level] for x in (bank.logit_scale, bank.bias))
    free = (~prior_strength.isinf()).nonzero()[:, 0]
    for classes in free.split(CLASSES) if len(free) else ():
        index = torch.full((len(prototypes) + 1,), -1)
        index[classes] = torch.arange(len(classes))
        rows = _hardest(anchors.embeds @ prototypes[classes].t(), scale, bias, index[targets])
        y = F.one_hot(index[targets[rows]] + 1, len(classes) + 1)[:, 1:] * anchors.weight[rows, None]
        w = torch.where(anchors.objects[rows] < 0, anchors.weight[rows], 1.0)
        x, b = anchors.embeds[rows] * scale[rows, None], bias[rows]
        vectors[classes], offsets[classes] = _minimize(x, b, y, w, prototypes[classes], prior_strength[classes])
    return vectors, offsets


def _hardest(cosine: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the rows of all anchors of the classes and of the negatives with the maximum logits."""
    logit = (cosine * scale[:, None]).amax(1) + bias
    positive = target >= 0
    hard = torch.where(positive, float("inf"), logit).topk(min(len(logit), NEGATIVES + int(positive.sum())))[1]
    return hard.sort()[0]


@torch.enable_grad()
def _minimize(
    x: torch.Tensor,
    bias: torch.Tensor,
    y: torch.Tensor,
    weight: torch.Tensor,
    prototypes: torch.Tensor,
    prior_strength: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Minimize the objective of `fit_classes` by L-BFGS; the classes do not influence each other's minimum."""
    vectors, offsets = prototypes.clone().requires_grad_(), torch.zeros(len(prototypes), requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [vectors, offsets], max_iter=100, history_size=20, tolerance_change=1e-7, line_search_fn="strong_wolfe"
    )
    mass = y.sum(0).clamp(min=1e-3)

    def objective() -> torch.Tensor:
        optimizer.zero_grad()
        logits = x @ vectors.t() + bias[:, None] + offsets
        bce = weight @ F.binary_cross_entropy_with_logits(logits, y, reduction="none") / mass
        loss = (bce + prior_strength * ((vectors - prototypes).square().sum(1) + offsets.square() / 100)).sum()
        loss.backward()
        return loss

    optimizer.step(objective)
    return vectors.detach(), offsets.detach()
