"""Losses of the few-shot detector: a bounded box-distribution loss, three embedding losses, and distillation.

Every loss computes in float32 whatever the input dtype (also inside an autocast region), returns a 0-dim float32
tensor that stays attached to the graph, and is finite in value and gradient for finite inputs: empty batches,
batches with nothing to compare, zero vectors and values at the limits of float16 included. Selections are masks, so
that no loss waits for the device.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["CPELoss", "ClampedDFLoss", "DistillationLoss", "SupConLoss", "TripletLoss"]

_FAR = 1e38  # fills masked entries: beyond any real logit or distance, yet finite when two are added
_MAX_VALUE = 1e30  # larger magnitudes are clipped, so that sums and differences stay finite
_MAX_FEATURE = 1e3  # limit of raw features in dot products: keeps their gradient inside float16


def _full_precision(x: Tensor) -> torch.autocast:
    """Switch autocast off on the device of `x`."""
    return torch.autocast(device_type=x.device.type, enabled=False)


def _check_choice(name: str, value: str, allowed: Collection[str]) -> None:
    """Raise ValueError, naming the allowed values, unless `value` is one of them."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def _check_positive(name: str, value: float) -> None:
    """Raise ValueError unless `value` is above zero (NaN is not)."""
    if not value > 0:
        raise ValueError(f"{name} must be > 0, got {value}")


def _check_batch(embeddings: Tensor, **per_row: Tensor) -> None:
    """Raise ValueError unless `embeddings` is (N, D) and every tensor in `per_row` is (N,)."""
    if embeddings.ndim != 2:
        raise ValueError(f"embeddings must have shape (N, D), got {tuple(embeddings.shape)}")
    for name, value in per_row.items():
        if value.shape != embeddings.shape[:1]:
            raise ValueError(f"{name} must have shape ({embeddings.shape[0]},), got {tuple(value.shape)}")


def _unit(x: Tensor) -> Tensor:
    """L2-normalize rows without overflow; rows too short to have a direction become zero with zero gradient.

    Args:
        x (Tensor): Rows, shape (N, D), any float dtype.

    Returns:
        (Tensor): Unit or zero rows, shape (N, D), float32.
    """
    # The gradient grows as 1 / norm, so below this norm it would leave the range of the input dtype.
    shortest = 1e-3 if x.dtype == torch.float16 else 1e-12
    x = x.float()
    # Dividing by a constant leaves both the direction and its derivative unchanged, so no gradient is needed here.
    scale = x.detach().abs().amax(1, keepdim=True).clamp_min(1e-12)
    x = x / scale
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    keep = scale * norm > shortest
    return torch.where(keep, x / torch.where(keep, norm, 1.0), 0.0)


def _contrast(logits: Tensor, labels: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Contrast every row with its positives against all other rows.

    Args:
        logits (Tensor): Similarity over temperature, shape (N, N), float32; the diagonal is ignored.
        labels (Tensor): Class of each row, shape (N,).
        mask (Tensor | None): Rows that exist, bool (N,); all by default.

    Returns:
        (tuple[Tensor, Tensor]): Per row the mean over its positives of -log softmax, float32 (N,), zero where the row
            has no positive; and whether it has one, bool (N,).
    """
    other = ~torch.eye(len(labels), dtype=torch.bool, device=logits.device)
    if mask is not None:
        other = other & mask & mask[:, None]
    positive = (labels[:, None] == labels[None, :]) & other
    count = positive.sum(1)
    log_total = logits.masked_fill(~other, -_FAR).logsumexp(1)
    mean_positive = torch.where(positive, logits, 0.0).sum(1) / count.clamp_min(1)
    valid = count > 0
    return torch.where(valid, log_total - mean_positive, 0.0), valid


class ClampedDFLoss(nn.Module):
    """Distribution Focal Loss with an upper limit per box side and on the final mean.

    The loss of a side at distance t, between the bins l = floor(t) and r = l + 1, is
    -((r - t) log p_l + (t - l) log p_r): Li et al. 2020, "Generalized Focal Loss", eq. 6, arXiv:2006.04388. The four
    sides of an anchor are summed, so uniform logits over 16 bins give 4 ln 16 = 11.0904.

    Attributes:
        side_clamped (Tensor | int): Sides clamped since `reset_counts`; a 0-dim int64 tensor on the device of the
            last input, or 0 before any input.
        mean_clamped (Tensor | int): Means clamped since `reset_counts`, likewise.
    """

    def __init__(self, reg_max: int = 16, side_max: float = 20.0, mean_max: float = 15.0, mode: str = "hard") -> None:
        """Set the number of bins and the limits.

        Args:
            reg_max (int): Bins per side, at least 2.
            side_max (float): Upper limit of the loss of one side, above zero.
            mean_max (float): Upper limit of the mean over anchors, above zero.
            mode (str): What happens above a limit. "hard" passes no gradient; "rescale" has the same value but passes
                the gradient of the unclamped loss times limit / loss.

        Raises:
            ValueError: If `reg_max` < 2, a limit is not above zero, or `mode` is unknown.
        """
        super().__init__()
        if reg_max < 2:
            raise ValueError(f"reg_max must be >= 2, got {reg_max}")
        _check_positive("side_max", side_max)
        _check_positive("mean_max", mean_max)
        _check_choice("mode", mode, ("hard", "rescale"))
        self.reg_max = reg_max
        self.side_max = side_max
        self.mean_max = mean_max
        self.mode = mode
        self.reset_counts()

    def reset_counts(self) -> None:
        """Set both clamp counts to zero."""
        self.side_clamped: Tensor | int = 0
        self.mean_clamped: Tensor | int = 0

    def forward(self, pred_dist: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        """Return the clamped weighted mean over anchors of the clamped sides, summed per anchor.

        Args:
            pred_dist (Tensor): Bin logits, shape (M * 4, reg_max), any float dtype.
            target (Tensor): Distances in bins, shape (M, 4); left unmodified.
            weight (Tensor | None): Non-negative anchor weights, shape (M,); None weighs all anchors equally.

        Returns:
            (Tensor): 0-dim float32, at most `mean_max`; zero if the weights sum to zero or M is 0.

        Raises:
            ValueError: If the shapes do not fit.
        """
        loss = self.per_anchor(pred_dist, target).squeeze(1)
        if weight is None:
            weight = torch.ones_like(loss)
        elif weight.shape != loss.shape:
            raise ValueError(f"weight must have shape ({len(loss)},), got {tuple(weight.shape)}")
        weight = weight.float()
        total = weight.sum()
        return self.clamp_mean((loss * (weight / torch.where(total > 0, total, 1.0))).sum())

    def per_anchor(self, pred_dist: Tensor, target: Tensor) -> Tensor:
        """Return the sum of the four clamped side losses of every anchor, counting the clamped sides.

        Args:
            pred_dist (Tensor): Bin logits, shape (M * 4, reg_max), any float dtype.
            target (Tensor): Distances in bins, shape (M, 4), clamped to [0, reg_max - 1.01] in a copy.

        Returns:
            (Tensor): Shape (M, 1), float32, each at most 4 * `side_max`.

        Raises:
            ValueError: If the shapes do not fit.
        """
        if target.ndim != 2 or target.shape[1] != 4:
            raise ValueError(f"target must have shape (M, 4), got {tuple(target.shape)}")
        if pred_dist.shape != (target.numel(), self.reg_max):
            raise ValueError(
                f"pred_dist must have shape ({target.numel()}, {self.reg_max}), got {tuple(pred_dist.shape)}"
            )
        with _full_precision(pred_dist):
            position = target.float().clamp(0, self.reg_max - 1 - 0.01).reshape(-1)
            left = position.long()
            to_right = position - left
            bins = torch.stack((left, left + 1), 1)
            share = torch.stack((1 - to_right, to_right), 1)
            # A log-probability may be -inf at the end of the float32 range, and -inf times a zero share is NaN.
            log_prob = pred_dist.float().log_softmax(1).gather(1, bins).clamp_min(-_MAX_VALUE)
            side = -(log_prob * share).sum(1)
            self.side_clamped = self._count(self.side_clamped, side > self.side_max)
            return self._clamp(side, self.side_max).view(-1, 4).sum(1, keepdim=True)

    def clamp_mean(self, loss: Tensor) -> Tensor:
        """Return a mean loss limited to `mean_max`, counting it if it was above.

        Args:
            loss (Tensor): Non-negative 0-dim tensor, any float dtype.

        Returns:
            (Tensor): 0-dim float32.
        """
        loss = loss.float()
        self.mean_clamped = self._count(self.mean_clamped, loss > self.mean_max)
        return self._clamp(loss, self.mean_max)

    def _clamp(self, loss: Tensor, limit: float) -> Tensor:
        """Limit a non-negative float32 tensor of any shape, with the gradient that `mode` asks for."""
        clamped = loss.clamp(max=limit)
        if self.mode == "hard":
            return clamped
        scaled = loss * (limit / loss.detach().clamp_min(limit))
        # Adding the rounding error back makes the value equal to that of the hard clamp.
        return scaled + (clamped - scaled).detach()

    @staticmethod
    def _count(count: Tensor | int, over: Tensor) -> Tensor:
        """Add the number of true entries of `over` to `count`, on the device of `over`."""
        return over.sum() + (count.to(over.device) if isinstance(count, Tensor) else count)


class SupConLoss(nn.Module):
    """Supervised contrastive loss, the form with the sum outside the logarithm.

    An anchor i with positives P(i), the other rows of its class, has as loss the mean over p in P(i) of
    -log(exp(z_i.z_p / t) / sum_{a != i} exp(z_i.z_a / t)): Khosla et al. 2020, "Supervised Contrastive Learning",
    eq. 2 (L_out), arXiv:2004.11362. The loss is the mean over the anchors that have a positive.
    """

    def __init__(self, temperature: float = 0.1) -> None:
        """Set the temperature.

        Args:
            temperature (float): Divisor t of the cosine similarities, above zero.

        Raises:
            ValueError: If `temperature` is not above zero.
        """
        super().__init__()
        _check_positive("temperature", temperature)
        self.temperature = temperature

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Return the mean loss over the anchors that have a positive.

        Args:
            embeddings (Tensor): Rows to compare, shape (N, D), any float dtype; normalized here.
            labels (Tensor): Class of each row, shape (N,), integer.

        Returns:
            (Tensor): 0-dim float32; zero if no row has a positive.

        Raises:
            ValueError: If the shapes do not fit.
        """
        _check_batch(embeddings, labels=labels)
        with _full_precision(embeddings):
            unit = _unit(embeddings)
            loss, valid = _contrast(unit @ unit.T / self.temperature, labels)
            return loss.sum() / valid.sum().clamp_min(1)


class CPELoss(nn.Module):
    """Contrastive proposal encoding: supervised contrast between region proposals, gated and weighted by IoU.

    Sun et al. 2021, "FSCE: Few-Shot Object Detection via Contrastive Proposal Encoding", eq. 4-6, arXiv:2103.05950:
    loss = 1/N sum_i f(u_i) L_i with f(u) = [u >= iou_threshold] g(u), where L_i is the mean of
    -log(exp(z_i.z_j / t) / sum_{k != i} exp(z_i.z_k / t)) over the N_y - 1 other rows j of the class of i.

    N is that of eq. 4: all foreground rows (label other than -1), whether or not they pass the gate or have a
    positive, so a batch with few accurate proposals weighs less than under a mean over the rows that pass.
    Background rows (label -1) and rows below the gate are no anchors but stay in the denominators, and rows below the
    gate stay positives of the others.
    """

    def __init__(
        self, temperature: float = 0.2, iou_threshold: float = 0.5, reweight: str = "none", normalize: bool = True
    ) -> None:
        """Set the temperature, the gate and the weighting.

        Args:
            temperature (float): Divisor t of the similarities, above zero.
            iou_threshold (float): Lowest IoU of an anchor, in [0, 1].
            reweight (str): g(u): "none" is 1, "linear" is u, "exp" is e^u - 1.
            normalize (bool): Whether to L2-normalize the rows. Raw entries are clipped to [-1000, 1000].

        Raises:
            ValueError: If `temperature` is not above zero, `iou_threshold` is outside [0, 1], or `reweight` is
                unknown.
        """
        super().__init__()
        _check_positive("temperature", temperature)
        if not 0 <= iou_threshold <= 1:
            raise ValueError(f"iou_threshold must be in [0, 1], got {iou_threshold}")
        _check_choice("reweight", reweight, ("none", "linear", "exp"))
        self.temperature = temperature
        self.iou_threshold = iou_threshold
        self.reweight = reweight
        self.normalize = normalize

    def forward(self, embeddings: Tensor, labels: Tensor, ious: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the gated, weighted sum of the anchor losses over the number of foreground rows.

        Args:
            embeddings (Tensor): Proposal embeddings, shape (N, D), any float dtype.
            labels (Tensor): Class of each proposal, shape (N,), integer; -1 is background.
            ious (Tensor): IoU of each proposal with its object, shape (N,), any float dtype; clipped to [0, 1].
            mask (Tensor | None): Rows that exist, shape (N,), bool; the others are as if left out, but their number
                need not be known on the CPU. All by default.

        Returns:
            (Tensor): 0-dim float32; zero if no row passes the gate and has a positive.

        Raises:
            ValueError: If the shapes do not fit.
        """
        _check_batch(embeddings, labels=labels, ious=ious, **({} if mask is None else {"mask": mask}))
        with _full_precision(embeddings):
            rows = _unit(embeddings) if self.normalize else embeddings.float().clamp(-_MAX_FEATURE, _MAX_FEATURE)
            loss, _ = _contrast(rows @ rows.T / self.temperature, labels, mask)
            foreground = labels != -1 if mask is None else mask & (labels != -1)
            ious = ious.float().clamp(0, 1)
            functions: dict = {"none": torch.ones_like, "linear": torch.clone, "exp": torch.expm1}
            weight = functions[self.reweight](ious)
            weight = torch.where(foreground & (ious >= self.iou_threshold), weight, 0.0)
            return (loss * weight).sum() / foreground.sum().clamp_min(1)


class TripletLoss(nn.Module):
    """Triplet loss on the hardest positive and negative of the batch, or on class prototypes.

    The loss of an anchor is max(0, margin + d_p - d_n), or log(1 + exp(d_p - d_n)) with a soft margin; the result is
    the mean over the anchors that have both a positive and a negative, those with a loss of zero included. Hermans et
    al. 2017, "In Defense of the Triplet Loss for Person Re-Identification", eq. 5, arXiv:1703.07737.
    """

    def __init__(self, margin: float = 0.3, distance: str = "cosine", soft: bool = False) -> None:
        """Set the margin and the distance.

        Args:
            margin (float): Gap asked for between the two distances, at least zero; unused if `soft`.
            distance (str): "cosine" is one minus the cosine similarity; "euclidean" is the L2 distance between the
                embeddings as given.
            soft (bool): Whether to replace the hinge by the soft margin.

        Raises:
            ValueError: If `margin` is negative or `distance` is unknown.
        """
        super().__init__()
        if not margin >= 0:
            raise ValueError(f"margin must be >= 0, got {margin}")
        _check_choice("distance", distance, ("cosine", "euclidean"))
        self.margin = margin
        self.distance = distance
        self.soft = soft

    def forward(self, embeddings: Tensor, labels: Tensor, prototypes: Tensor | None = None) -> Tensor:
        """Return the mean loss over the anchors that have a positive and a negative.

        Without prototypes the positive is the farthest other row of the class and the negative the nearest row of
        another class. With prototypes they are the prototype of the class and the nearest prototype of another one.

        Args:
            embeddings (Tensor): Anchors, shape (N, D), any float dtype.
            labels (Tensor): Class of each anchor, shape (N,), integer. With prototypes, an index of their rows; an
                anchor whose label is out of range is ignored.
            prototypes (Tensor | None): One row per class, shape (C, D), any float dtype; a row of zeros is absent.

        Returns:
            (Tensor): 0-dim float32; zero if no anchor has both.

        Raises:
            ValueError: If the shapes do not fit.
        """
        _check_batch(embeddings, labels=labels)
        if prototypes is not None and (prototypes.ndim != 2 or prototypes.shape[1] != embeddings.shape[1]):
            raise ValueError(f"prototypes must have shape (C, {embeddings.shape[1]}), got {tuple(prototypes.shape)}")
        others = embeddings if prototypes is None else prototypes
        if 0 in (len(embeddings), len(others)):
            return (embeddings.float() * 0).sum()
        with _full_precision(embeddings):
            distance = self._distances(embeddings, others)
            if prototypes is None:
                same = labels[:, None] == labels[None, :]
                candidate = ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
            else:
                same = labels[:, None] == torch.arange(len(prototypes), device=labels.device)
                candidate = prototypes.ne(0).any(1)
            positive, negative = same & candidate, ~same & candidate
            gap = distance.masked_fill(~positive, -_FAR).amax(1) - distance.masked_fill(~negative, _FAR).amin(1)
            loss = F.softplus(gap) if self.soft else F.relu(gap + self.margin)
            valid = positive.any(1) & negative.any(1)
            return torch.where(valid, loss, 0.0).sum() / valid.sum().clamp_min(1)

    def _distances(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the float32 distances (N, C) between the rows of `a` (N, D) and `b` (C, D), both non-empty."""
        if self.distance == "cosine":
            return 1 - _unit(a) @ _unit(b).T
        a, b = (x.float().clamp(-_MAX_VALUE, _MAX_VALUE) for x in (a, b))
        # Squares overflow above about 1e19; the distance scales with its inputs, so the factor needs no gradient.
        scale = (torch.maximum(a.detach().abs().amax(), b.detach().abs().amax()) / 1e15).clamp_min(1.0)
        # The direct form is exact for close rows, and its gradient at distance zero is zero.
        return scale * torch.cdist(a / scale, b / scale, compute_mode="donot_use_mm_for_euclid_dist")


class DistillationLoss(nn.Module):
    """Divergence of class scores from those of a teacher, one Bernoulli variable per class.

    Sum over all scores t of KL(t || sigmoid(x)) for Bernoulli variables, x being the logit, divided by `mass`. Li and
    Hoiem 2016, "Learning without Forgetting", arXiv:1606.09282; for detectors Shmelkov et al. 2017, arXiv:1708.06977.

    Examples:
        >>> loss = DistillationLoss()(logits, teacher_scores, mass)
    """

    def forward(self, logits: Tensor, targets: Tensor, mass: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the loss.

        Args:
            logits (Tensor): Logits, any shape and float dtype, clipped to 1e30 in magnitude.
            targets (Tensor): Scores of the teacher, of the same shape, clamped to 0..1; without gradient.
            mass (Tensor): Divisor, 0-dim, at least 1 here.
            mask (Tensor | None): Logits to include, bool, broadcast to their shape; all by default.

        Returns:
            (Tensor): 0-dim float32, at least 0 except for rounding; 0 without logits.

        Raises:
            ValueError: If the shapes differ.
        """
        if logits.shape != targets.shape:
            raise ValueError(
                f"logits {tuple(logits.shape)} and targets {tuple(targets.shape)} must have the same shape"
            )
        with _full_precision(logits):
            x, t = logits.float().clamp(-_MAX_VALUE, _MAX_VALUE), targets.detach().float().clamp(0, 1)
            loss = F.binary_cross_entropy_with_logits(x, t, reduction="none")
            loss = loss + torch.xlogy(t, t) + torch.xlogy(1 - t, 1 - t)  # less the entropy of the targets
            if mask is not None:
                loss = torch.where(mask, loss, 0.0)
            return loss.sum() / mass.detach().float().clamp_min(1)
