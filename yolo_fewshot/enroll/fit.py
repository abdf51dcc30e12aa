"""Logistic regression with an L2 prior: the objective of the enrollment methods."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from yolo_fewshot.enroll.features import Anchors, select
from yolo_fewshot.nn.head import Prototypes
from yolo_fewshot.nn.rows import LevelSpace

MAX_NEGATIVES = 20_000  # maximum number of anchors without an object of the classes in a fit
CLASSES_AT_ONCE = 64  # fitted at once, which bounds the memory
MAX_ITERATIONS, PILOT_ITERATIONS = 100, 30  # of L-BFGS, for a fit and for the pilot fit that ranks its negatives
MIN_MASS = 1e-3  # minimum sum of the targets of a class


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
    for classes in torch.arange(len(means)).split(CLASSES_AT_ONCE):
        index = torch.full((len(means) + 1,), -1)
        index[classes] = torch.arange(len(classes))
        rows = _hardest(anchors.embeds @ means[classes].t(), scale, bias, index[targets])
        y, w = _terms(select(anchors, rows), index[targets[rows]], len(classes))
        x, b = anchors.embeds[rows] * scale[rows, None], bias[rows]
        vectors[classes], offsets[classes] = _minimize(x, b, y, w, means[classes], prior_strength[classes])
    return vectors, offsets


def fit_levels(
    anchors: Anchors, targets: torch.Tensor, prior_strength: torch.Tensor, space: LevelSpace
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fit the classifiers of some classes with a vector and an offset at each level, with an L2 prior around zero.

    The objective is that of `fit_classes` with a prior mean of zero, and vectors v_l and offsets o_l at each level l.
    The prior logits b_l are those of a detector at the start of training. A level without a shot of a class keeps a
    low score there, since all its anchors are negatives. Of more than `MAX_NEGATIVES` negatives at a level the sum has
    the hardest half of that number and a share of the others, which is weighted to stand for all of them.

    Args:
        anchors (Anchors): Anchors of the support set, M of them.
        targets (torch.Tensor): Class of every anchor, (M,) int64 in 0..n-1, or negative for none of them.
        prior_strength (torch.Tensor): Prior strength of every class, (n,) float32, finite and greater than 0.
        space (LevelSpace): Embedding space of the branch.

    Returns:
        vectors (torch.Tensor): v_l of every class, (n, nl, D) float32.
        offsets (torch.Tensor): o_l of every class, (n, nl) float32.
    """
    n = len(prior_strength)
    vectors, offsets = space.zeros(n)
    mass = _mass(anchors, targets, n)
    for level, prior in enumerate(space.bias):
        at_level = (anchors.level == level).nonzero()[:, 0]
        of_level, target_of_level = select(anchors, at_level), targets[at_level]
        for classes in torch.arange(n).split(CLASSES_AT_ONCE):
            index = torch.full((n + 1,), -1)
            index[classes] = torch.arange(len(classes))
            target = index[target_of_level]
            start, strength = vectors[classes, level], prior_strength[classes]
            v, o = start, offsets[classes, level]
            for pilot in (True, False):  # the pilot ranks the negatives of the fit
                rows, share = _subsample(target) if pilot else _hardest_first(of_level.embeds @ v.t() + o, target)
                y, w = _terms(select(of_level, rows), target[rows], len(classes))
                x, b = of_level.embeds[rows], prior.expand(len(rows))
                iterations = PILOT_ITERATIONS if pilot else MAX_ITERATIONS
                v, o = _minimize(x, b, y, w * share, start, strength, mass[classes], iterations)
            vectors[classes, level], offsets[classes, level] = v, o
    return vectors, offsets


def fit_scale(
    anchors: Anchors, targets: torch.Tensor, prior_strength: torch.Tensor, space: LevelSpace
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fit the classifiers of some classes along their mean embeddings: only scale and offset are free.

    The vectors are those of `fit_levels` in the limit of an infinite prior strength, i.e. proportional to the weighted
    mean of the embeddings of the anchors of a class at each level.

    Args:
        anchors (Anchors): Anchors of the support set, M of them.
        targets (torch.Tensor): Class of every anchor, (M,) int64 in 0..n-1, or negative for none of them.
        prior_strength (torch.Tensor): Prior strength of every class, (n,) float32, finite and greater than 0.
        space (LevelSpace): Embedding space of the branch.

    Returns:
        vectors (torch.Tensor): (n, nl, D) float32.
        offsets (torch.Tensor): (n, nl) float32, the same at all levels.
    """
    n = len(prior_strength)
    vectors, offsets = space.zeros(n)
    positive = targets >= 0
    weighted = anchors.embeds[positive] * anchors.weight[positive, None]
    vectors.view(-1, space.embed).index_add_(0, targets[positive] * len(space.bias) + anchors.level[positive], weighted)
    vectors /= vectors.flatten(1).norm(dim=1).clamp(min=1e-12)[:, None, None]
    mass, prior = _mass(anchors, targets, n), space.bias[anchors.level]
    for c in range(n):
        x = space.logits(anchors.embeds, anchors.level, vectors[c : c + 1], offsets[c : c + 1]) - prior[:, None]
        target = torch.where(targets == c, 0, -1)
        rows, share = _subsample(target)
        y, w = _terms(select(anchors, rows), target[rows], 1)
        zero, one = torch.zeros(1, 1), slice(c, c + 1)
        scale, offset = _minimize(x[rows], prior[rows], y, w * share, zero, prior_strength[one], mass[one])
        vectors[c] *= scale[0, 0]
        offsets[c] = offset[0]
    return vectors, offsets


def _terms(anchors: Anchors, target: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the target scores (M, n) and the weights (M,) of M anchors in the objective of n classes."""
    y = F.one_hot(target + 1, n + 1)[:, 1:] * anchors.weight[:, None]
    return y, torch.where(anchors.objects < 0, anchors.weight, 1.0)


def _mass(anchors: Anchors, targets: torch.Tensor, n: int) -> torch.Tensor:
    """Return the sum of the targets of every class, (n,)."""
    positive = targets >= 0
    return torch.zeros(n).index_add(0, targets[positive], anchors.weight[positive]).clamp(min=MIN_MASS)


def _subsample(target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return all positives and every k-th negative, at most `MAX_NEGATIVES`, and their weights, 1 and k."""
    positive = target >= 0
    negatives = (~positive).nonzero()[:, 0]
    step = max(-(-len(negatives) // MAX_NEGATIVES), 1)
    rows = torch.cat([positive.nonzero()[:, 0], negatives[::step]])
    return rows, torch.where(positive[rows], 1.0, float(step))


def _hardest_first(logits: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return all positives, the negatives of the maximum logits, and every k-th of the others, which weighs k.

    Each half of the negatives is at most half of `MAX_NEGATIVES`. Without the others a fit would be free to score easy
    background high where dozens of objects leave as many hard negatives.
    """
    positive = target >= 0
    negatives = (~positive).nonzero()[:, 0]
    negatives = negatives[logits[negatives].amax(1).argsort(descending=True, stable=True)]
    hard, others = negatives.tensor_split([MAX_NEGATIVES // 2])
    step = max(-(-len(others) // (MAX_NEGATIVES // 2)), 1)
    rows = torch.cat([positive.nonzero()[:, 0], hard, others[::step]])
    share = torch.ones(len(rows))
    share[len(rows) - len(others[::step]) :] = step
    return rows, share


def _hardest(cosine: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the indices of all anchors of the classes and of the negatives with the maximum logits, ascending."""
    logit = (cosine * scale[:, None]).amax(1) + bias
    positive = target >= 0
    hard = torch.where(positive, float("inf"), logit).topk(min(len(logit), MAX_NEGATIVES + int(positive.sum())))[1]
    return hard.sort()[0]


@torch.enable_grad()
def _minimize(
    x: torch.Tensor,
    bias: torch.Tensor,
    y: torch.Tensor,
    weight: torch.Tensor,
    means: torch.Tensor,
    prior_strength: torch.Tensor,
    mass: torch.Tensor | None = None,
    iterations: int = MAX_ITERATIONS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Minimize the objective of `fit_classes` by L-BFGS; the minimum of a class does not depend on the others."""
    vectors, offsets = means.clone().requires_grad_(), torch.zeros(len(means), requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [vectors, offsets], max_iter=iterations, history_size=20, tolerance_change=1e-7, line_search_fn="strong_wolfe"
    )
    mass = y.sum(0).clamp(min=MIN_MASS) if mass is None else mass

    def objective() -> torch.Tensor:
        optimizer.zero_grad()
        logits = x @ vectors.t() + bias[:, None] + offsets
        bce = weight @ F.binary_cross_entropy_with_logits(logits, y, reduction="none") / mass
        loss = (bce + prior_strength * ((vectors - means).square().sum(1) + offsets.square() / 100)).sum()
        loss.backward()
        return loss

    try:
        optimizer.step(objective)
    except RuntimeError as e:
        if "overflow" not in str(e):
            raise
    found, offset = vectors.detach(), offsets.detach()
    good = found.isfinite().all(1) & offset.isfinite()  # not where a training diverged to numbers beyond float32
    return torch.where(good[:, None], found, means), torch.where(good, offset, 0.0)
