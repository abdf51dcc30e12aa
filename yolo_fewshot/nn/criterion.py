"""Loss of all stages: Ultralytics', with clamped DFL and episode terms in stage 2 and retention where `graft=none`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from ultralytics.utils.loss import BboxLoss, E2ELoss, v8DetectionLoss
from ultralytics.utils.tal import make_anchors

from yolo_fewshot.nn.assign import RecordingAssigner
from yolo_fewshot.nn.head import BOX_PRIOR, FewShotDetect, class_prior
from yolo_fewshot.nn.ignore import blank_ignored, outside_regions
from yolo_fewshot.nn.losses import ClampedDFLoss, DistillationLoss
from yolo_fewshot.nn.own_terms import load_terms
from yolo_fewshot.nn.passes import Pass
from yolo_fewshot.nn.prototypes import class_means, pool_objects
from yolo_fewshot.nn.terms import BUILT_IN, CPETerm, Episode, EpisodeBCE, EpisodeTerm, SupConTerm, TripletTerm

RETENTION_TERMS = {"tea_loss": "teacher", "mem_loss": "memory"}  # names of the terms, and keys of their gains


class Retention(NamedTuple):
    """Classes that one branch retains in stage 3, and their replayed anchors.

    Attributes:
        branch (int): Index of the branch.
        unlabeled (torch.Tensor): Classes of the model without a label in the training images, (S,) int64.
        embeds (torch.Tensor): Embeddings of the replayed anchors, (M, D) float32.
        level (torch.Tensor): Level of each of them, (M,) int64.
        targets (torch.Tensor): Scores of all classes, (M, nc) float32 in 0..1; 0 for classes that are labeled.
    """

    branch: int
    unlabeled: torch.Tensor
    embeds: torch.Tensor
    level: torch.Tensor
    targets: torch.Tensor


class _PerAnchorDFL(nn.Module):
    """The clamped DFL in the form that `BboxLoss` expects: one value per anchor."""

    def __init__(self, dfl: ClampedDFLoss):
        super().__init__()
        self.dfl, self.reg_max = dfl, dfl.reg_max

    def forward(self, pred_dist: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self.dfl.per_anchor(pred_dist, target)


class _AnchorIndices(tuple):
    """Indices of anchors that act as a mask, so that Ultralytics indexes without waiting for the device."""

    def nonzero(self, as_tuple: bool = True) -> _AnchorIndices:
        """Return the indices."""
        return self


class RecordingBboxLoss(BboxLoss):
    """Ultralytics' box loss that records its values in the pass; stage 2 uses the clamped DFL.

    Attributes:
        current (Pass | None): The pass of the call in progress.
    """

    current: Pass | None = None

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
        fg = _AnchorIndices(fg_mask.nonzero(as_tuple=True))
        targets = target_bboxes, target_scores, target_scores_sum
        box, dfl = super().forward(pred_dist, pred_bboxes, anchor_points, *targets, fg, *args)
        if self.clamped is not None:
            dfl = self.clamped.clamp_mean(dfl)
        if self.current is not None:
            self.current.fg, self.current.box, self.current.dfl = tuple(fg), box, dfl
        return box, dfl


class MaskedBCE(nn.BCEWithLogitsLoss):
    """Ultralytics' class loss, set to zero where the mask of the pass is False.

    Attributes:
        current (Pass | None): The pass of the call in progress.
    """

    current: Pass | None = None

    def __init__(self):
        """Initialize the loss."""
        super().__init__(reduction="none")

    def forward(self, scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the loss of every score.

        Args:
            scores (torch.Tensor): Logits, (B, A, nc).
            targets (torch.Tensor): Target scores, (B, A, nc).

        Returns:
            (torch.Tensor): (B, A, nc).
        """
        loss = super().forward(scores, targets)
        mask = None if self.current is None else self.current.class_mask()
        return loss if mask is None else loss * mask


class FewShotLoss(v8DetectionLoss):
    """Detection loss of one branch of a few-shot model.

    Stage 1 is Ultralytics' `v8DetectionLoss`. Stage 2 replaces the DFL by the clamped one and adds, for a batch that is
    an episode, the built-in terms of `yolo_fewshot.nn.terms` and those that the configuration key `terms` names. For
    other batches, as in validation, those terms are zero.

    Stage 3 adds two distillation terms for the classes without a label in the training images. At background anchors,
    their targets are the scores of a teacher instead of zero (`tea_loss`). At stored anchors of base images, they are
    replayed (`mem_loss`). Without such classes, and in validation, both terms are zero.

    Attributes:
        loss_names (tuple[str, ...]): Names of the terms.
        episode_terms (list[EpisodeTerm]): Terms of an episode, in the order of their names.
        clamped_dfl (ClampedDFLoss | None): The DFL of stage 2, with its counts of clamps.
        masked (bool): Whether batches may have ignore regions, see `MaskedDataset`; anchors inside are not background.
        trained (torch.Tensor | None): Classes whose scores are trained, (nc,) bool; None for all.
        retention (Retention | None): Classes to retain in stage 3.
        observers (list[Callable[[FewShotLoss, Pass], None]]): Functions that the next call of the loss calls after
            computing its terms, and then removes. They may call `parts` and `chance` with the pass.
    """

    loss_names: tuple[str, ...]
    assigner: RecordingAssigner

    def __init__(self, model: Any, tal_topk: int = 10, tal_topk2: int | None = None):
        """Initialize the loss.

        Args:
            model (FewShotDetectionModel): Model with the run's arguments attached as `args`.
            tal_topk (int): Anchors per object, see `TaskAlignedAssigner`.
            tal_topk2 (int, optional): Secondary top-k of one-to-one branches.
        """
        super().__init__(model, tal_topk, tal_topk2)
        h, stage = self.hyp, getattr(self.hyp, "stage", None)
        self.episodic, self.masked = stage == 2, False
        self.trained: torch.Tensor | None = None
        self.retention: Retention | None = None
        self.observers: list[Callable[[FewShotLoss, Pass], None]] = []
        self.clamped_dfl: ClampedDFLoss | None = None
        self._centers: tuple[list, torch.Tensor] = [], torch.empty(0)  # of the last image size
        if self.episodic and self.use_dfl:
            self.clamped_dfl = ClampedDFLoss(self.reg_max, h.dfl_side_max, h.dfl_mean_max, h.dfl_clamp_mode)
        self.assigner, self.bce = RecordingAssigner.like(self.assigner), MaskedBCE()
        self.bbox_loss = RecordingBboxLoss(self.reg_max, self.clamped_dfl).to(self.device)
        self.episode_terms: list[EpisodeTerm] = []
        if stage == 3 and isinstance(model.model[-1], FewShotDetect):  # a grafted copy has no old class to keep
            self.loss_names, self.distillation = (*self.loss_names, *RETENTION_TERMS), DistillationLoss()
        if self.episodic:
            self.project = model.model[-1].proj
            terms = [EpisodeBCE(), SupConTerm(h), CPETerm(h), TripletTerm(h), *load_terms(h.terms)]
            self.episode_terms = [t.to(self.device) for t in terms]
            self.loss_names = (*self.loss_names, *(t.name for t in self.episode_terms))

    def loss(self, preds: dict[str, Any], batch: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the weighted terms multiplied by the batch size, and their detached values.

        Args:
            preds (dict[str, Any]): Raw predictions of one branch, see `FewShotDetect.forward_head`.
            batch (dict[str, Any]): Labels as collated by Ultralytics; an episode also has `support` (B,) bool
                and `way` (B,), the class each image was drawn for, and may have `query` (Q,), the indices of the
                other images, which avoids a wait for the device, and `turned` (bool), whether its classes are not
                the base classes; `teacher` is the output of `Teacher` for the images.

        Returns:
            loss (torch.Tensor): In the order of `loss_names`: (3,) in stage 1, (7,) in stage 2 without custom
                terms, (5,) in stage 3.
            items (dict[str, torch.Tensor]): Weighted terms by name, not multiplied by the batch size.
        """
        this = self.begin(preds, batch)
        terms = self.terms(this)
        observers, self.observers = self.observers, []
        for observe in observers:
            observe(self, this)
        return terms * len(preds["boxes"]), dict(zip(self.loss_names, terms.detach()))

    def bbox_decode(self, anchor_points: torch.Tensor, pred_dist: torch.Tensor) -> torch.Tensor:
        """Decode the predicted boxes as Ultralytics does, but in float32: bfloat16 has eight bits for a coordinate.

        Args:
            anchor_points (torch.Tensor): Anchor centers in cells, (A, 2).
            pred_dist (torch.Tensor): Predicted distributions of the distances, (B, A, 4 * reg_max).

        Returns:
            (torch.Tensor): Boxes x1, y1, x2, y2 in cells, (B, A, 4) float32.
        """
        with torch.autocast(pred_dist.device.type, enabled=False):
            return super().bbox_decode(anchor_points.float(), pred_dist.float())

    def begin(self, preds: dict[str, Any], batch: dict[str, Any]) -> Pass:
        """Create the pass of a call of the loss.

        Args:
            preds (dict[str, Any]): As `loss` takes them.
            batch (dict[str, Any]): As `loss` takes it.

        Returns:
            (Pass): The pass, with its masks and without terms.
        """
        if not self.use_dfl:  # without DFL, distances times the stride can overflow float16
            preds = {**preds, "boxes": preds["boxes"].float()}
        this = Pass(preds, batch, trained=self.trained)
        if batch.get("turned"):  # no object is of a base class
            this.trained = torch.zeros(self.nc, dtype=torch.bool, device=self.device)
        if self.masked:
            this.batch, ignored = blank_ignored(batch)
            centers, size = self._anchor_centers(preds["feats"]), batch["img"].shape[:1:-1]
            this.keep_mask = outside_regions(ignored.to(self.device), centers, size, len(preds["boxes"]))
        if self.retention and "teacher" in batch:
            this.distilled = torch.zeros(self.nc, dtype=torch.bool, device=self.device)
            this.distilled[self.retention.unlabeled] = True
        return this

    def _anchor_centers(self, feats: list[torch.Tensor]) -> torch.Tensor:
        """Return the centers of the anchors in pixels, (A, 2), computed once per image size."""
        sizes = [(x.shape[2:], x.dtype) for x in feats]
        if sizes != self._centers[0]:  # computing them waits for the device
            anchors, stride = make_anchors(feats, self.stride, 0.5)
            self._centers = sizes, anchors * stride
        return self._centers[1]

    def _stock_terms(self, this: Pass) -> torch.Tensor:
        """Return Ultralytics' own terms of a pass, weighted, (3,); its modules record in the pass."""
        modules = self.assigner, self.bce, self.bbox_loss
        for m in modules:
            m.current = this
        try:
            return self.get_assigned_targets_and_loss(this.preds, this.batch)[1]
        finally:
            for m in modules:
                m.current = None

    def terms(self, this: Pass) -> torch.Tensor:
        """Return the weighted terms in the order of `loss_names`, and record them in the pass.

        Args:
            this (Pass): A pass that `begin` returned.

        Returns:
            (torch.Tensor): (T,).
        """
        loss = self._stock_terms(this)
        if len(loss) == len(self.loss_names):
            return loss
        with torch.autocast(this.preds["scores"].device.type, enabled=False):
            if self.episodic and "support" in this.batch and "embeds" in this.preds:
                this.added = self._weighted_episode_terms(self.episode(this))
            elif self.retention:
                this.added = self._retention_terms(this, self.retention)
        zeros = loss.new_zeros(len(self.loss_names) - len(loss))
        return torch.cat([loss, torch.stack(this.added) if this.added else zeros])

    def parts(self, this: Pass) -> dict[str, torch.Tensor]:
        """Return the terms of a pass by name, each with its own graph from the predictions.

        The gradient of an element of `terms` passes through all of them, where 0 times Inf is NaN.

        Args:
            this (Pass): A pass whose terms have been computed.

        Returns:
            (dict[str, torch.Tensor]): 0-dim weighted terms.
        """
        boxes = this.preds["boxes"].detach()
        with self.without_side_effects():
            cls = self._stock_terms(replace(this, preds={**this.preds, "boxes": boxes}))[1]
        return dict(zip(self.loss_names, [self.hyp.box * this.box, cls, self.hyp.dfl * this.dfl, *this.added]))

    @torch.no_grad()
    def chance(self, this: Pass) -> torch.Tensor:
        """Return the chance level of every term: its value for an untrained head, with the assignment of the pass.

        Boxes and scores are those at initialization, and all embeddings are equal: 4 ln(reg_max) for the DFL (less if
        the target scores of the batch sum to less than 1), the logarithm of the number of contrasts for SupCon, the
        margin for the triplet term.

        Args:
            this (Pass): A pass whose terms have been computed.

        Returns:
            (torch.Tensor): Weighted terms, as `terms` returns them.
        """
        preds, prior = this.preds, class_prior(self.nc, self.stride).to(self.device)
        sizes = [x.shape[2] * x.shape[3] for x in preds["feats"]]
        scores = torch.cat([p.expand(n) for p, n in zip(prior, sizes)]).expand(preds["scores"].shape)
        blank = {**preds, "boxes": torch.full_like(preds["boxes"], BOX_PRIOR), "scores": scores, "logit_bias": prior}
        blank |= {k: torch.zeros_like(preds[k]) for k in ("embeds", "weight", "offset") if k in preds}
        with self.without_side_effects():
            return self.terms(replace(this, preds=blank, added=[]))

    @contextlib.contextmanager
    def without_side_effects(self) -> Iterator[None]:
        """Restore the random state, the counts of clamps and the buffers of the episode terms on exit."""
        dfl, modules = self.clamped_dfl, [m for t in self.episode_terms for m in t.modules()]
        buffers = [(m, n, b, b.clone()) for m in modules for n, b in m._buffers.items() if b is not None]
        if dfl:
            counts = dfl.side_clamped, dfl.mean_clamped
        try:
            with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
                yield
        finally:
            if dfl:
                dfl.side_clamped, dfl.mean_clamped = counts
            for module, name, buffer, value in buffers:
                module._buffers[name] = buffer.copy_(value)

    def episode(self, this: Pass) -> Episode:
        """Pool the objects of an episode and compute the prototypes of its classes.

        Only objects with an anchor and classes with a support object get rows. Reading their numbers is the only wait
        for the device in the episode terms.

        Args:
            this (Pass): A pass over an episode, with its assignment.

        Returns:
            (Episode): Input of the terms.
        """
        batch, assigned, fg = this.batch, this.assigned, this.fg
        embeds = this.preds["embeds"].transpose(1, 2)
        # Objects: mean embedding of the anchors assigned to each, weighted by their target scores. Object g of image b
        # has row b * n_max + g.
        n_max = max(assigned.n_max, 1)
        gt_idx = assigned.gt_idx[fg]
        objects, _ = pool_objects(embeds, fg, gt_idx, assigned.scores[fg].sum(-1), n_max)
        y = objects.new_full((len(objects),), -1, dtype=torch.long)  # -1: padding, or an object without an anchor
        y[fg[0] * n_max + gt_idx.long()] = assigned.labels[fg].long()
        # Prototypes: class means over the support objects; in a narrow episode, of the drawn classes only.
        support = batch["support"].to(embeds.device)
        y_support = torch.where(support.repeat_interleave(n_max), y, -1)
        if not self.hyp.wide:
            drawn = (y_support[:, None] == batch["way"].to(y)[None]).any(1)
            y_support = torch.where(drawn, y_support, -1)
        prototypes, counts = class_means(objects, y_support, self.nc)
        real, ways = _indices(y >= 0, counts > 0)
        query = batch["query"] if "query" in batch else (~batch["support"]).nonzero()[:, 0]
        return Episode(
            objects[real], y[real], prototypes[ways], ways, fg, query.to(embeds.device), this.preds, batch, assigned,
            this.keep_mask, self.project, self.hyp,
        )  # fmt: skip

    def _weighted_episode_terms(self, episode: Episode) -> list[torch.Tensor]:
        """Return the weighted terms of an episode, 0-dim float32 each."""
        weighted = []
        for term in self.episode_terms:
            gain = getattr(self.hyp, term.gain) if isinstance(term.gain, str) else term.gain
            if not gain:  # 0 times a term that is not finite would not be finite
                weighted.append(_zero(episode.objects))
                continue
            value = term(episode)
            if not (isinstance(value, torch.Tensor) and value.ndim == 0):
                got = f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
                raise TypeError(f"{type(term).__name__}.forward must return a 0-dim tensor, got {got}.")
            weighted.append(gain * value.float())
        return weighted

    def _retention_terms(self, this: Pass, retention: Retention) -> list[torch.Tensor]:
        """Return the weighted terms of stage 3, 0-dim float32 each, in the order of `RETENTION_TERMS`."""
        weighted = []
        for key, term in zip(RETENTION_TERMS.values(), (self._teacher_term, self._memory_term)):
            gain = getattr(self.hyp, key)
            weighted.append(gain * term(this, retention) if gain else _zero(this.preds["scores"]))  # 0 times NaN is NaN
        return weighted

    def _teacher_term(self, this: Pass, retention: Retention) -> torch.Tensor:
        """Return the distillation loss of the unlabeled classes at background anchors, 0-dim float32."""
        scores = this.preds["scores"][:, retention.unlabeled].transpose(1, 2)
        teacher = this.batch["teacher"][retention.branch] if "teacher" in this.batch else scores.sigmoid()
        background = ~this.assigned.fg_mask[..., None]
        return self.distillation(scores, teacher, this.assigned.scores.sum(), background)

    def _memory_term(self, this: Pass, retention: Retention) -> torch.Tensor:
        """Return the distillation loss of all classes at the replayed anchors, 0-dim float32."""
        preds, level, targets = this.preds, retention.level, retention.targets
        rows = F.normalize(preds["weight"].float(), dim=1) * preds["gain"].float()[:, None]
        scale, bias = preds["logit_scale"].float()[level, None], preds["logit_bias"].float()[level, None]
        logits = retention.embeds @ rows.t() * scale + bias + preds["offset"].float()
        return self.distillation(logits, targets, targets.amax(1).sum())


def _zero(like: torch.Tensor) -> torch.Tensor:
    """Return a 0-dim float32 zero that is connected to a tensor's graph."""
    return like[:0].float().sum()


def part_gradients(part: torch.Tensor, inputs: list[torch.Tensor]) -> tuple[torch.Tensor | None, ...]:
    """Compute the gradient of one of `FewShotLoss.parts`, as in the backward pass of training.

    Args:
        part (torch.Tensor): 0-dim term; its graph stays usable.
        inputs (list[torch.Tensor]): Tensors to differentiate by.

    Returns:
        (tuple[torch.Tensor | None, ...]): A gradient for each, or None if the term does not depend on it.
    """
    if not part.requires_grad:
        return (None,) * len(inputs)
    with torch.autocast(part.device.type, enabled=False):  # autocast would cast the backward pass too
        return torch.autograd.grad(part, inputs, retain_graph=True, allow_unused=True)


def gain_of(term: str, args: Any) -> tuple[str | None, float | None]:
    """Return the configuration key of a term's gain and the gain.

    Args:
        term (str): Name of the term, with or without `_loss`.
        args (SimpleNamespace): Arguments of the run.

    Returns:
        key (str | None): Name of the key; None for a custom term whose gain is a number.
        gain (float | None): The gain; None where the run has none.
    """
    gains: dict[str, float | str] = {"box_loss": "box", "cls_loss": "cls", "dfl_loss": "dfl", "l1_loss": "dfl"}
    gains |= RETENTION_TERMS
    gains |= {t.name: t.gain for t in BUILT_IN}
    gains |= {t.name: t.gain for t in load_terms(getattr(args, "terms", None))}
    gain = gains.get(f"{term.removesuffix('_loss')}_loss")
    return (gain, getattr(args, gain, None)) if isinstance(gain, str) else (None, gain)


def branch_losses(model: Any) -> list[FewShotLoss]:
    """Return the loss of every branch of the head, the one-to-many branch first; create it if there is none.

    Args:
        model (FewShotDetectionModel): Model, not wrapped for several GPUs.

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
