"""Logistic regression with an L2 prior: the objective of the enrollment method `fit`."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from yolo_fewshot.enroll.features import Anchors
from yolo_fewshot.nn.head import Prototypes

NEGATIVES = 20_000  # maximum number of anchors without an object of the classes, the hardest ones
CLASSES = 64  # fitted at once, which bounds the memory


def fit_classes(
    anchors: Anchors,
    targets: torch.Tensor,
    means: torch.Tensor,
    prior_strength: torch.Tensor,
    prototypes: Prototypes,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fit the classifiers of some classes by convex logistic regression with an L2 prior around their mean prototypes.

    For each class c, over the anchors a with embedding e_a, level l_a and target t_ac (the IoU-based weight of an
    anchor of the class, else 0), minimize over the vector v and the offset o

        sum_a w_a BCE(s_l <e_a, v> + b_l + o, t_ac) / sum_a t_ac  +  prior strength (|v - p_c|^2 + o^2 / 100),

    where p_c is the mean prototype and w_a is 1, or the weight of an anchor of no object. This is the class term of
    Ultralytics' detection loss with a Gaussian prior, whose standard deviation is ten times larger for o than for v.

    Args:
        anchors (Anchors): Anchors of the support set, M of them.
        targets (torch.Tensor): Class of every anchor, (M,) int64 in 0..n-1, or negative for none of them.
        means (torch.Tensor): Mean prototypes of the classes, (n, D) float32 of unit length.
        prior_strength (torch.Tensor): Prior strength of every class, (n,) float32, finite and greater than 0.
        prototypes (Prototypes): Level scales s_l and biases b_l of the branch.

    Returns:
        vectors (torch.Tensor): v of every class, (n, D) float32.
        offsets (torch.Tensor): o of every class, (n,) float32.
    """
    vectors, offsets = means.clone(), means.new_zeros(len(means))
    scale, bias = (x.detach().float().cpu()[anchors.level] for x in (prototypes.logit_scale, prototypes.bias))
    for classes in torch.arange(len(means)).split(CLASSES):
        index = torch.full((len(means) + 1,), -1)
        index[classes] = torch.arange(len(classes))
        rows = _hardest(anchors.embeds @ means[classes].t(), scale, bias, index[targets])
        y = F.one_hot(index[targets[rows]] + 1, len(classes) + 1)[:, 1:] * anchors.weight[rows, None]
        w = torch.where(anchors.objects[rows] < 0, anchors.weight[rows], 1.0)
        x, b = anchors.embeds[rows] * scale[rows, None], bias[rows]
        vectors[classes], offsets[classes] = _minimize(x, b, y, w, means[classes], prior_strength[classes])
    return vectors, offsets


def _hardest(cosine: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the indices of all anchors of the classes and of the negatives with the maximum logits, ascending."""
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
    means: torch.Tensor,
    prior_strength: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Minimize the objective of `fit_classes` by L-BFGS; the minimum of a class does not depend on the others."""
    vectors, offsets = means.clone().requires_grad_(), torch.zeros(len(means), requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [vectors, offsets], max_iter=100, history_size=20, tolerance_change=1e-7, line_search_fn="strong_wolfe"
    )
    mass = y.sum(0).clamp(min=1e-3)

    def objective() -> torch.Tensor:
        optimizer.zero_grad()
        logits = x @ vectors.t() + bias[:, None] + offsets
        bce = weight @ F.binary_cross_entropy_with_logits(logits, y, reduction="none") / mass
        loss = (bce + prior_strength * ((vectors - means).square().sum(1) + offsets.square() / 100)).sum()
        loss.backward()
        return loss

    optimizer.step(objective)
    return vectors.detach(), offsets.detach()
