"""The loss of all stages: Ultralytics' own; clamped DFL and meta-learning terms in stage 2; retention in stage 3."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from ultralytics.utils.loss import BboxLoss, E2ELoss, v8DetectionLoss
from ultralytics.utils.metrics import bbox_iou
from ultralytics.utils.tal import make_anchors

from yolo_fewshot.nn.assign import RecordingAssigner
from yolo_fewshot.nn.head import BOX_PRIOR, class_prior
from yolo_fewshot.nn.ignore import blank_ignored, outside
from yolo_fewshot.nn.losses import ClampedDFLoss, CPELoss, DistillationLoss, SupConLoss, TripletLoss
from yolo_fewshot.nn.prototypes import class_means, pool_objects

EPISODE_TERMS = ("epi_loss", "sup_loss", "cpe_loss", "tri_loss")
RETENTION_TERMS = ("tea_loss", "mem_loss")
CPE_ANCHORS = 512  # foreground anchors in the contrastive proposal encoding term, and a quarter of it of background


class Pooled(NamedTuple):
    """What an episode shows.

    Attributes:
        objects (torch.Tensor): Unit embeddings of its N objects, (N, D) float32.
        y (torch.Tensor): Their classes, (N,) int64.
        prototypes (torch.Tensor): Prototypes of its w classes, from the support images, (w, D) float32.
        ways (torch.Tensor): Their classes, (w,) int64.
        anchors (tuple[torch.Tensor, torch.Tensor]): Image and index of the M anchors assigned to objects, (M,) int64.
    """

    objects: torch.Tensor
    y: torch.Tensor
    prototypes: torch.Tensor
    ways: torch.Tensor
    anchors: tuple[torch.Tensor, torch.Tensor]


class Retained(NamedTuple):
    """What one branch must not forget.

    Attributes:
        branch (int): Index of the branch.
        silent (torch.Tensor): Classes of the model without a label in the training images, (S,) int64.
        embeds (torch.Tensor): Remembered anchors, (M, D) float32.
        level (torch.Tensor): Index of their level, (M,) int64.
        targets (torch.Tensor): Scores of all classes there, (M, nc) float32 in 0..1; 0 for classes that are labeled.
    """

    branch: int
    silent: torch.Tensor
    embeds: torch.Tensor
    level: torch.Tensor
    targets: torch.Tensor


class _PerAnchorDFL(nn.Module):
    """What `BboxLoss` expects of its DFL: one value per anchor, weighted and averaged by the caller."""

    def __init__(self, dfl: ClampedDFLoss):
        super().__init__()
        self.dfl, self.reg_max = dfl, dfl.reg_max

    def forward(self, pred_dist: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self.dfl.per_anchor(pred_dist, target)


class _Found(tuple):
    """Indices of anchors in place of a mask of them, so that they are not looked for, with a wait, again."""

    def nonzero(self, as_tuple: bool = True) -> _Found:
        """Return what Ultralytics asks of a mask."""
        return self


class RecordingBboxLoss(BboxLoss):
    """Ultralytics' box loss, in stage 2 with the clamped DFL, keeping its last values.

    Attributes:
        last (tuple[torch.Tensor, torch.Tensor]): CIoU loss and DFL as last returned.
        fg (tuple[torch.Tensor, torch.Tensor]): Image and index of the M anchors assigned to objects, (M,) int64.
    """

    def __init__(self, reg_max: int, dfl: ClampedDFLoss | None = None):
        """Initialize the loss.

        Args:
            reg_max (int): Bins per side; without DFL if 1.
            dfl (ClampedDFLoss, optional): The DFL to use instead of Ultralytics' own.
        """
        super().__init__(reg_max)
        self.clamped = dfl
        if dfl is not None:
            self.dfl_loss = _PerAnchorDFL(dfl)

    def start(self, boxes: torch.Tensor) -> None:
        """Expect no anchor, since older versions of Ultralytics do not ask for a loss of none.

        Args:
            boxes (torch.Tensor): Predictions, to which the zeros of `last` are connected.
        """
        zero = boxes[:0].float().sum()
        self.last, self.fg = (zero, zero), boxes.new_zeros(2, 0, dtype=torch.long).unbind()

    def forget(self) -> None:
        """Drop the last values, to free their memory."""
        self.last = self.fg = None

    def forward(
        self,
        pred_dist: torch.Tensor,
        pred_bboxes: torch.Tensor,
        anchor_points: torch.Tensor,
        target_bboxes: torch.Tensor,
        target_scores: torch.Tensor,
        target_scores_sum: torch.Tensor,
        fg_mask: torch.Tensor,
        *args: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return CIoU loss and DFL as Ultralytics does, with the mean of the clamped DFL clamped."""
        self.fg = _Found(fg_mask.nonzero(as_tuple=True))
        targets = target_bboxes, target_scores, target_scores_sum
        box, dfl = super().forward(pred_dist, pred_bboxes, anchor_points, *targets, self.fg, *args)
        self.last = box, dfl if self.clamped is None else self.clamped.clamp_mean(dfl)
        return self.last


class FewShotLoss(v8DetectionLoss):
    """Detection loss of one branch of a few-shot model.

    Stage 1 is Ultralytics' `v8DetectionLoss`. Stage 2 adds, for a batch that is an episode, the detection loss of the
    query images under prototypes of the support images (`epi_loss`), SupCon, CPE and triplet terms, and replaces
    the DFL by the clamped one. For other batches, as in validation, those terms are zero.

    Stage 3 adds two terms for the classes without a label in the training images: where no object is labeled, their
    scores are not pushed to zero but to those of a teacher (`tea_loss`), and they are rehearsed on remembered anchors
    (`mem_loss`). Without such classes, and in validation, both are zero.

    A term of your own goes into `episode_terms` of a subclass, its name into `episode_names`, and the subclass into
    `FewShotTrainer.loss_class`.

    Attributes:
        loss_names (tuple[str, ...]): Names of the terms.
        episode_names (tuple[str, ...]): Names of those that `episode_terms` returns.
        clamped_dfl (ClampedDFLoss | None): The DFL of stage 2, with its counts of clamps.
        masked (bool): Whether batches may have objects to ignore, see `MaskedDataset`: anchors in their boxes are no
            background.
        retained (Retained | None): What stage 3 must not forget.
        watch (Callable | None): Called with this loss, predictions and batch after the terms of a batch were computed.
    """

    episode_names: tuple[str, ...] = EPISODE_TERMS

    def __init__(self, model: nn.Module, tal_topk: int = 10, tal_topk2: int | None = None):
        """Initialize the loss.

        Args:
            model (nn.Module): Few-shot model with the run's arguments attached as `args`.
            tal_topk (int): Anchors per object, see `TaskAlignedAssigner`.
            tal_topk2 (int, optional): Secondary top-k of one-to-one branches.
        """
        self.masked, self._outside, self._centers = False, None, ([], None)
        self._anchored: bool | None = None
        self._taught: torch.Tensor | None = None
        super().__init__(model, tal_topk, tal_topk2)
        self.episodic = getattr(self.hyp, "stage", None) == 2
        self.assigner = RecordingAssigner.like(self.assigner)
        self.retained: Retained | None = None
        self.watch: Callable[[FewShotLoss, dict, dict], None] | None = None
        self.clamped_dfl: ClampedDFLoss | None = None
        h = self.hyp
        if self.episodic and self.use_dfl:
            self.clamped_dfl = ClampedDFLoss(self.reg_max, h.dfl_side_max, h.dfl_mean_max, h.dfl_clamp_mode)
        self.bbox_loss = RecordingBboxLoss(self.reg_max, self.clamped_dfl).to(self.device)
        if getattr(self.hyp, "stage", None) == 3:
            self.loss_names, self.distillation = (*self.loss_names, *RETENTION_TERMS), DistillationLoss()
        if not self.episodic:
            return
        self.loss_names = (*self.loss_names, *self.episode_names)
        self.project = model.model[-1].proj
        self.supcon = SupConLoss(h.supcon_tau)
        self.cpe = CPELoss(h.cpe_tau, h.cpe_iou, h.cpe_weight)
        self.triplet = TripletLoss(h.triplet_margin, soft=h.triplet_soft)

    def loss(
        self, preds: dict[str, torch.Tensor], batch: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the weighted terms multiplied by the batch size, and their detached values.

        Args:
            preds (dict[str, torch.Tensor]): Raw predictions of one branch, see `FewShotDetect.forward_head`.
            batch (dict[str, torch.Tensor]): Labels as collated by Ultralytics; an episode also has `support` (B,) bool
                and `way` (B,), the class each image was drawn for, and may have `query` (Q,), the indices of the
                others, which spares a wait for the device; `teacher` is what `Teacher` says of the images.

        Returns:
            loss (torch.Tensor): (3,) in stage 1, (5,) in stage 3, (7,) in stage 2 without further terms, as
                `loss_names`.
            items (dict[str, torch.Tensor]): Weighted terms by name, not multiplied by the batch size.
        """
        if self.masked:
            batch, ignored = blank_ignored(batch)
            centers, size = self._anchor_centers(preds["feats"]), batch["img"].shape[:1:-1]
            self._outside = outside(ignored.to(self.device), centers, size, len(preds["boxes"]))
        if self.retained and "teacher" in batch:
            self._taught = torch.zeros(self.nc, dtype=torch.bool, device=self.device)
            self._taught[self.retained.silent] = True
        terms = self.terms(preds, batch)
        if self.watch is not None:
            self.watch(self, preds, batch)
        self.assigner.forget()
        self.bbox_loss.forget()
        self._added = self._outside = self._taught = None
        return terms * len(preds["boxes"]), dict(zip(self.loss_names, terms.detach()))

    def get_assigned_targets_and_loss(self, preds: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> tuple:
        """Return what Ultralytics does, and record the assignment and the terms of the boxes."""
        self.bbox_loss.start(preds["boxes"])
        return super().get_assigned_targets_and_loss(preds, *args, **kwargs)

    def _anchor_centers(self, feats: list[torch.Tensor]) -> torch.Tensor:
        """Return the centers of the anchors in pixels, (A, 2); those of the last batch if it had the same size."""
        sizes = [(x.shape[2:], x.dtype) for x in feats]
        if sizes != self._centers[0]:  # making them waits for the device
            anchors, stride = make_anchors(feats, self.stride, 0.5)
            self._centers = sizes, anchors * stride
        return self._centers[1]

    @property
    def class_weights(self) -> torch.Tensor | None:
        """Factors of the class loss: Ultralytics' by class, and at background anchors 0 for what is not known there.

        That is, in boxes to ignore, and for classes that a teacher teaches.
        """
        known = None if self._outside is None else self._outside.unsqueeze(-1)
        if self._taught is not None:
            known = ~self._taught if known is None else known & ~self._taught
        if known is None:
            return self._class_weights
        counted = known | self.assigner.assigned[3].unsqueeze(-1)
        return counted if self._class_weights is None else self._class_weights * counted

    @class_weights.setter
    def class_weights(self, value: torch.Tensor | None) -> None:
        """Set the factors by class."""
        self._class_weights = value

    def terms(self, preds: dict[str, torch.Tensor], batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the weighted terms in the order of `loss_names`, see `loss`."""
        if not self.use_dfl:  # distances times the stride leave float16; with DFL they are bounded
            preds = {**preds, "boxes": preds["boxes"].float()}
        loss = self.get_assigned_targets_and_loss(preds, batch)[1]
        self._added = []
        if len(loss) == len(self.loss_names):
            return loss
        with torch.autocast(preds["scores"].device.type, enabled=False):
            if self.episodic and "support" in batch and "embeds" in preds:
                self._added = self.episode_terms(preds, batch, self.pool(preds, batch))
            elif self.retained:
                self._added = self.retention_terms(preds, batch)
        zeros = loss.new_zeros(len(self.loss_names) - len(loss))
        return torch.cat([loss, torch.stack(self._added) if self._added else zeros])

    def parts(self, preds: dict[str, torch.Tensor], batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the terms by name, each with a graph of its own up to the predictions.

        The gradient of an element of `terms` passes through all of them, where 0 times Inf is NaN.

        Args:
            preds (dict[str, torch.Tensor]): Raw predictions of one branch, from which `terms` was computed last.
            batch (dict[str, torch.Tensor]): The batch of it.

        Returns:
            (dict[str, torch.Tensor]): 0-dim weighted terms.
        """
        box, dfl = self.bbox_loss.last
        with self.aside(), self._replayed():
            cls = self.get_assigned_targets_and_loss({**preds, "boxes": preds["boxes"].detach()}, batch)[1][1]
        return dict(zip(self.loss_names, [self.hyp.box * box, cls, self.hyp.dfl * dfl, *self._added]))

    @torch.no_grad()
    def chance(self, preds: dict[str, torch.Tensor], batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return what the terms of a batch are for a head that knows nothing, with the anchors as last assigned.

        Boxes and scores are those at initialization, and all embeddings are alike: 4 ln(reg_max) for the DFL (less if
        the target scores of the batch sum to less than 1), the logarithm of the number of contrasts for SupCon, the
        margin for the triplet term.

        Args:
            preds (dict[str, torch.Tensor]): Raw predictions of one branch, from which `terms` was computed last.
            batch (dict[str, torch.Tensor]): The batch of it.

        Returns:
            (torch.Tensor): Weighted terms, as `terms` returns them.
        """
        prior = class_prior(self.nc, self.stride).to(self.device)
        sizes = [x.shape[2] * x.shape[3] for x in preds["feats"]]
        scores = torch.cat([p.expand(n) for p, n in zip(prior, sizes)]).expand(preds["scores"].shape)
        blank = {**preds, "boxes": torch.full_like(preds["boxes"], BOX_PRIOR), "scores": scores, "logit_bias": prior}
        blank |= {k: torch.zeros_like(preds[k]) for k in ("embeds", "weight", "offset") if k in preds}
        with self.aside(), self._replayed():
            return self.terms(blank, batch)

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Compute what is no part of the training: random state and counts of clamps are put back."""
        dfl = self.clamped_dfl
        counts = (dfl.side_clamped, dfl.mean_clamped) if dfl else ()
        try:
            with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
                yield
        finally:
            if dfl:
                dfl.side_clamped, dfl.mean_clamped = counts

    @contextlib.contextmanager
    def _replayed(self) -> Iterator[None]:
        """Assign the anchors as last time, whatever the predictions are."""
        self.assigner.replay = True
        try:
            yield
        finally:
            self.assigner.replay = False

    def pool(self, preds: dict[str, torch.Tensor], batch: dict[str, torch.Tensor]) -> Pooled:
        """Return the objects of an episode, and prototypes of its classes.

        There are rows of real objects and classes alone, so how many there are is read from the device, once; no other
        line of the episode terms waits for it.

        Args:
            preds (dict[str, torch.Tensor]): Raw predictions of one branch.
            batch (dict[str, torch.Tensor]): The episode.

        Returns:
            (Pooled): Objects with an anchor, in the order of the images, and the prototypes.
        """
        labels, _, target_scores, _, gt_idx = self.assigner.assigned
        embeds, fg = preds["embeds"].transpose(1, 2), self.bbox_loss.fg
        # Objects: mean embedding of the anchors assigned to each, weighted by how well they fit.
        n_max = max(self.assigner.n_max_boxes, 1)
        objects, _ = pool_objects(embeds, fg, gt_idx[fg], target_scores[fg].sum(-1), n_max)
        y = objects.new_full((len(objects),), -1, dtype=torch.long)  # -1: padding, or an object without an anchor
        y[fg[0] * n_max + gt_idx[fg].long()] = labels[fg].long()
        # Prototypes: class means over the support objects; in a narrow episode, of the drawn classes only.
        support = batch["support"].to(embeds.device)
        y_support = torch.where(support.repeat_interleave(n_max), y, -1)
        if not self.hyp.wide:
            drawn = (y_support[:, None] == batch["way"].to(y)[None]).any(1)
            y_support = torch.where(drawn, y_support, -1)
        prototypes, counts = class_means(objects, y_support, self.nc)
        real, ways = _indices(y >= 0, counts > 0)
        return Pooled(objects[real], y[real], prototypes[ways], ways, tuple(fg))

    def episode_terms(
        self, preds: dict[str, torch.Tensor], batch: dict[str, torch.Tensor], pooled: Pooled
    ) -> list[torch.Tensor]:
        """Return the weighted terms of an episode, 0-dim float32 each, in the order of `episode_names`.

        Args:
            preds (dict[str, torch.Tensor]): Raw predictions of one branch, see `FewShotDetect.forward_head`.
            batch (dict[str, torch.Tensor]): The episode.
            pooled (Pooled): Its objects and prototypes.

        Returns:
            (list[torch.Tensor]): Episode, SupCon, CPE and triplet terms.
        """
        h, (objects, y, prototypes, ways, fg) = self.hyp, pooled
        labels, target_boxes, target_scores, fg_mask, _ = self.assigner.assigned
        embeds = preds["embeds"].transpose(1, 2)
        query = batch["query"] if "query" in batch else (~batch["support"]).nonzero()[:, 0]
        query = query.to(embeds.device)
        counted = None if self._outside is None else (self._outside | fg_mask)[query].unsqueeze(-1).float()
        return [
            h.cls * self.episode_loss(preds, embeds[query], target_scores[query], prototypes, ways, counted),
            h.supcon * self.supcon_term(objects, y, prototypes, ways),
            h.cpe * self.cpe_term(embeds, fg, labels[fg].long(), target_boxes[fg]),
            h.triplet * self.triplet_term(objects, y, preds["frozen"]),
        ]

    def episode_loss(
        self,
        preds: dict[str, torch.Tensor],
        query: torch.Tensor,
        target_scores: torch.Tensor,
        prototypes: torch.Tensor,
        ways: torch.Tensor,
        counted: torch.Tensor | None,
    ) -> torch.Tensor:
        """BCE of the query images' episode logits; objects of classes that are no way are negatives."""
        sizes = [x.shape[2] * x.shape[3] for x in preds["feats"]]
        scale, bias = (
            torch.cat([v.float().expand(n) for v, n in zip(preds[k], sizes)])[None, :, None]
            for k in ("logit_scale", "logit_bias")
        )
        logits = query.float() @ prototypes.t() * scale + bias
        targets = target_scores[..., ways].float()
        loss = F.binary_cross_entropy_with_logits(logits, targets, counted, reduction="sum")
        return loss / targets.sum().clamp(min=1)

    def supcon_term(
        self, objects: torch.Tensor, y: torch.Tensor, prototypes: torch.Tensor, ways: torch.Tensor
    ) -> torch.Tensor:
        """SupCon over the objects of query and support, with the episode's prototypes as further views."""
        return self.supcon(self.project(torch.cat([objects, prototypes])), torch.cat([y, ways]))

    def cpe_term(
        self, embeds: torch.Tensor, fg: tuple[torch.Tensor, torch.Tensor], y: torch.Tensor, target_boxes: torch.Tensor
    ) -> torch.Tensor:
        """CPE over a class-balanced sample of the foreground anchors, with some background as further contrasts."""
        with torch.no_grad():
            iou = bbox_iou(self.assigner.boxes[fg].float(), target_boxes.float(), xywh=False).view(-1).clamp(0, 1)
            chosen = balanced_sample(y, CPE_ANCHORS)
            b, a = embeds.shape[:2]
            is_bg = embeds.new_ones(b * a, dtype=torch.bool)
            is_bg[fg[0] * a + fg[1]] = False
            if self._outside is not None:
                is_bg &= self._outside.view(-1)
            bg = torch.randint(b * a, (CPE_ANCHORS // 4,), device=embeds.device)
            counted = torch.cat([torch.ones_like(chosen, dtype=torch.bool), is_bg[bg]])
        rows = embeds[torch.cat([fg[0][chosen], bg // a]), torch.cat([fg[1][chosen], bg % a])]
        labels = torch.cat([y[chosen], y.new_full((len(bg),), -1)])
        ious = torch.cat([iou[chosen], iou.new_zeros(len(bg))])
        return self.cpe(self.project(rows.float()), labels, ious, counted)

    def triplet_term(self, objects: torch.Tensor, y: torch.Tensor, frozen: torch.Tensor) -> torch.Tensor:
        """Triplet of every object with the frozen prototypes; without any, batch-hard among the objects."""
        if self._anchored is None:  # which waits for the device, and does not change during a run
            self._anchored = bool(frozen.any())
        return self.triplet(objects, y, frozen.float() if self._anchored else None)

    def retention_terms(self, preds: dict[str, torch.Tensor], batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """Return the weighted terms that keep the silent classes, 0-dim float32 each, as `RETENTION_TERMS`.

        Args:
            preds (dict[str, torch.Tensor]): Raw predictions of one branch, see `FewShotDetect.forward_head`.
            batch (dict[str, torch.Tensor]): The batch, with what the teacher says of it.

        Returns:
            (list[torch.Tensor]): Teacher and memory terms.
        """
        h, (branch, silent, embeds, level, targets) = self.hyp, self.retained
        _, _, target_scores, fg_mask, _ = self.assigner.assigned
        scores = preds["scores"][:, silent].transpose(1, 2)
        teacher = batch["teacher"][branch] if "teacher" in batch else scores.sigmoid()
        taught = self.distillation(scores, teacher, target_scores.sum(), ~fg_mask[..., None])
        rows = F.normalize(preds["weight"].float(), dim=1) * preds["gain"].float()[:, None]
        scale, bias = preds["logit_scale"].float()[level, None], preds["logit_bias"].float()[level, None]
        logits = embeds @ rows.t() * scale + bias + preds["offset"].float()
        rehearsed = self.distillation(logits, targets, targets.amax(1).sum())
        return [h.teacher * taught, h.memory * rehearsed]


def part_gradients(part: torch.Tensor, inputs: list[torch.Tensor]) -> tuple[torch.Tensor | None, ...]:
    """Return the gradient of one of `FewShotLoss.parts`, as the backward pass of training has it.

    Args:
        part (torch.Tensor): 0-dim term; its graph stays usable.
        inputs (list[torch.Tensor]): Tensors to differentiate by.

    Returns:
        (tuple[torch.Tensor | None, ...]): A gradient for each, or None where the term does not depend on it.
    """
    if not part.requires_grad:
        return (None,) * len(inputs)
    with torch.autocast(part.device.type, enabled=False):  # which would also cast the backward pass
        return torch.autograd.grad(part, inputs, retain_graph=True, allow_unused=True)


def gain_key(term: str) -> str:
    """Return the configuration key of a term's gain.

    Args:
        term (str): Name of the term, with or without `_loss`.

    Returns:
        (str): Name of the key.
    """
    name = term.removesuffix("_loss")
    keys = {"l1": "dfl", "epi": "cls", "sup": "supcon", "tri": "triplet", "tea": "teacher", "mem": "memory"}
    return keys.get(name, name)


def branch_losses(model: nn.Module) -> list[FewShotLoss]:
    """Return the loss of every branch of the head, the one-to-many branch first; made now if no batch was seen yet.

    Args:
        model (nn.Module): Few-shot model, not wrapped for several GPUs.

    Returns:
        (list[FewShotLoss]): The losses that the model uses.
    """
    if getattr(model, "criterion", None) is None:
        model.criterion = model.init_criterion()
    criterion = model.criterion
    return [criterion.one2many, criterion.one2one] if isinstance(criterion, E2ELoss) else [criterion]


def _indices(*masks: torch.Tensor) -> list[torch.Tensor]:
    """Return the indices of the true entries of masks (N,), ascending, with a single wait for the device."""
    counts = torch.stack([m.sum() for m in masks]).tolist()
    return [(~m).int().argsort(stable=True)[:n] for m, n in zip(masks, counts)]


def balanced_sample(labels: torch.Tensor, n: int) -> torch.Tensor:
    """Return the indices of at most `n` entries, drawn so that the classes get as equal shares as they can.

    Args:
        labels (torch.Tensor): Class of each entry, (M,).
        n (int): Maximum number of entries.

    Returns:
        (torch.Tensor): Indices, (min(M, n),) long.
    """
    if len(labels) <= n:
        return torch.arange(len(labels), device=labels.device)
    order = torch.randperm(len(labels), device=labels.device)
    order = order[labels[order].argsort(stable=True)]  # by class, random within it
    y = labels[order]
    first = torch.searchsorted(y, y)  # where the run of the class begins
    rank = torch.arange(len(y), device=y.device) - first
    return order[rank.argsort(stable=True)[:n]]
