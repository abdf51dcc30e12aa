"""The loss of stages 1 and 2: Ultralytics' own, and in stage 2 the clamped DFL and the meta-learning terms."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from ultralytics.utils.loss import BboxLoss, v8DetectionLoss
from ultralytics.utils.metrics import bbox_iou

from yolo_fewshot.assign import RecordingAssigner
from yolo_fewshot.losses import ClampedDFLoss, CPELoss, SupConLoss, TripletLoss
from yolo_fewshot.prototypes import class_means, pool_objects

EPISODE_TERMS = ("epi_loss", "sup_loss", "cpe_loss", "tri_loss")
CPE_ANCHORS = 512  # foreground anchors in the contrastive proposal encoding term, and a quarter of it of background


class _PerAnchorDFL(nn.Module):
    """What `BboxLoss` expects of its DFL: one value per anchor, weighted and averaged by the caller."""

    def __init__(self, dfl: ClampedDFLoss):
        super().__init__()
        self.dfl, self.reg_max = dfl, dfl.reg_max

    def forward(self, pred_dist: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self.dfl.per_anchor(pred_dist, target)


class ClampedBboxLoss(BboxLoss):
    """Ultralytics' box loss with the clamped DFL."""

    def __init__(self, dfl: ClampedDFLoss):
        """Initialize the loss.

        Args:
            dfl (ClampedDFLoss): The DFL to use.
        """
        super().__init__(dfl.reg_max)
        self.dfl_loss = _PerAnchorDFL(dfl)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return CIoU loss and DFL as Ultralytics does, with the mean of the DFL clamped."""
        box, dfl = super().forward(*args, **kwargs)
        return box, self.dfl_loss.dfl.clamp_mean(dfl)


class FewShotLoss(v8DetectionLoss):
    """Detection loss of one branch of a few-shot model.

    Stage 1 is Ultralytics' `v8DetectionLoss`. Stage 2 adds, for a batch that is an episode, the detection loss of the
    query pictures under prototypes of the support pictures (`epi_loss`), SupCon, CPE and triplet terms, and replaces
    the DFL by the clamped one. For other batches, as in validation, those terms are zero.
    """

    def __init__(self, model: nn.Module, tal_topk: int = 10, tal_topk2: int | None = None):
        """Initialize the loss.

        Args:
            model (nn.Module): Few-shot model with the run's arguments attached as `args`.
            tal_topk (int): Anchors per object, see `TaskAlignedAssigner`.
            tal_topk2 (int, optional): Secondary top-k of one-to-one branches.
        """
        super().__init__(model, tal_topk, tal_topk2)
        self.episodic = getattr(self.hyp, "stage", None) == 2
        if not self.episodic:
            return
        h = self.hyp
        self.assigner = RecordingAssigner.like(self.assigner)
        self.loss_names = (*self.loss_names, *EPISODE_TERMS)
        self.project = model.model[-1].proj
        self.supcon = SupConLoss(h.supcon_tau)
        self.cpe = CPELoss(h.cpe_tau, h.cpe_iou, h.cpe_weight)
        self.triplet = TripletLoss(h.triplet_margin, soft=h.triplet_soft)
        if self.use_dfl:
            dfl = ClampedDFLoss(self.reg_max, h.dfl_side_max, h.dfl_mean_max, h.dfl_clamp_mode)
            self.bbox_loss = ClampedBboxLoss(dfl).to(self.device)

    def loss(
        self, preds: dict[str, torch.Tensor], batch: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the weighted terms multiplied by the batch size, and their detached values.

        Args:
            preds (dict[str, torch.Tensor]): Raw predictions of one branch, see `FewShotDetect.forward_head`.
            batch (dict[str, torch.Tensor]): Labels as collated by Ultralytics; an episode also has `support` (B,) bool
                and `way` (B,), the class each picture was drawn for.

        Returns:
            loss (torch.Tensor): (3,) in stage 1, (7,) in stage 2, in the order of `loss_names`.
            items (dict[str, torch.Tensor]): Weighted terms by name, not multiplied by the batch size.
        """
        if not self.episodic:
            return super().loss(preds, batch)
        loss = self.get_assigned_targets_and_loss(preds, batch)[1]
        terms = loss.new_zeros(len(EPISODE_TERMS))
        if "support" in batch and "embeds" in preds:
            device = preds["embeds"].device.type
            with torch.autocast(device, enabled=False):
                terms = self.episode_terms(preds, batch)
        self.assigner.forget()
        loss = torch.cat([loss, terms])
        return loss * len(preds["boxes"]), dict(zip(self.loss_names, loss.detach()))

    def episode_terms(self, preds: dict[str, torch.Tensor], batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the weighted episode, SupCon, CPE and triplet terms of an episode, (4,) float32."""
        h = self.hyp
        labels, target_boxes, target_scores, fg_mask, gt_idx = self.assigner.assigned
        embeds = preds["embeds"].transpose(1, 2)
        fg = fg_mask.nonzero(as_tuple=True)
        # Objects: mean embedding of the anchors assigned to each, weighted by how well they fit.
        n_max = max(self.assigner.n_max_boxes, 1)
        objects, _ = pool_objects(embeds, fg, gt_idx[fg], target_scores[fg].sum(-1), n_max)
        y = objects.new_full((len(objects),), -1, dtype=torch.long)  # -1: padding, or an object without an anchor
        y[fg[0] * n_max + gt_idx[fg].long()] = labels[fg].long()
        # Prototypes: class means over the support objects; in a narrow episode, of the drawn classes only.
        support = batch["support"].to(embeds.device)
        y_support = torch.where(support.repeat_interleave(n_max), y, -1)
        if not h.wide:
            drawn = (y_support[:, None] == batch["way"].to(y)[None]).any(1)
            y_support = torch.where(drawn, y_support, -1)
        prototypes, counts = class_means(objects, y_support, self.nc)
        ways = counts.nonzero()[:, 0]
        return torch.stack(
            [
                h.cls * self.episode_loss(preds, embeds[~support], target_scores[~support], prototypes[ways], ways),
                h.supcon * self.supcon_term(objects, y, prototypes[ways], ways),
                h.cpe * self.cpe_term(embeds, fg, labels[fg].long(), target_boxes[fg]),
                h.triplet * self.triplet_term(objects, y, preds["frozen"]),
            ]
        )

    def episode_loss(
        self,
        preds: dict[str, torch.Tensor],
        query: torch.Tensor,
        target_scores: torch.Tensor,
        prototypes: torch.Tensor,
        ways: torch.Tensor,
    ) -> torch.Tensor:
        """BCE of the query pictures' episode logits; objects of classes that are no way are negatives."""
        sizes = [x.shape[2] * x.shape[3] for x in preds["feats"]]
        scale, bias = (
            torch.cat([v.float().expand(n) for v, n in zip(preds[k], sizes)])[None, :, None]
            for k in ("logit_scale", "logit_bias")
        )
        logits = query.float() @ prototypes.t() * scale + bias
        targets = target_scores[..., ways].float()
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / targets.sum().clamp(min=1)

    def supcon_term(
        self, objects: torch.Tensor, y: torch.Tensor, prototypes: torch.Tensor, ways: torch.Tensor
    ) -> torch.Tensor:
        """SupCon over the objects of query and support, with the episode's prototypes as further views."""
        keep = y >= 0
        return self.supcon(self.project(torch.cat([objects[keep], prototypes])), torch.cat([y[keep], ways]))

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
            bg = torch.randint(b * a, (CPE_ANCHORS // 4,), device=embeds.device)
            bg = bg[is_bg[bg]]
        rows = torch.cat([embeds[fg[0][chosen], fg[1][chosen]], embeds.reshape(b * a, -1)[bg]])
        labels = torch.cat([y[chosen], y.new_full((len(bg),), -1)])
        return self.cpe(self.project(rows.float()), labels, torch.cat([iou[chosen], iou.new_zeros(len(bg))]))

    def triplet_term(self, objects: torch.Tensor, y: torch.Tensor, frozen: torch.Tensor) -> torch.Tensor:
        """Triplet of every object with the frozen prototypes; without any, batch-hard among the objects."""
        keep = y >= 0
        return self.triplet(objects[keep], y[keep], frozen.float() if bool(frozen.any()) else None)


def balanced_sample(labels: torch.Tensor, n: int) -> torch.Tensor:
    """Return the indices of at most `n` entries, drawn so that the classes get as equal shares as they can.

    Args:
        labels (torch.Tensor): Class of each entry, (M,).
        n (int): Greatest number of entries.

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
