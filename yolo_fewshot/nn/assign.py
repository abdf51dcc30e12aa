"""Ultralytics' assignment of anchors to objects, recorded for the terms that need it again."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from ultralytics.utils.loss import E2ELoss, v8DetectionLoss
from ultralytics.utils.tal import TaskAlignedAssigner, dist2rbox

from yolo_fewshot.nn.passes import Assignment, Pass


class RecordingAssigner(TaskAlignedAssigner):
    """Ultralytics' assigner, which assigns once in a pass and records the result there.

    Attributes:
        current (Pass | None): The pass that is under way. Without one the assigner is Ultralytics' own.
    """

    current: Pass | None = None

    @classmethod
    def like(cls, assigner: TaskAlignedAssigner, num_classes: int | None = None) -> RecordingAssigner:
        """Return a recording assigner with the settings of another one.

        Args:
            assigner (TaskAlignedAssigner): The assigner to imitate.
            num_classes (int, optional): Class count, if another one.

        Returns:
            (RecordingAssigner): The new assigner.
        """
        recording = copy(assigner)
        recording.__class__ = cls
        recording.num_classes = num_classes or assigner.num_classes
        return recording

    def forward(self, pd_scores: torch.Tensor, pd_bboxes: torch.Tensor, *args: Any, **kwargs: Any) -> tuple:
        """Assign as Ultralytics does, or return the assignment of the pass, whatever the predictions are."""
        this = self.current
        if this is None:
            return super().forward(pd_scores, pd_bboxes, *args, **kwargs)
        if this.assignment is None:
            labels, boxes, scores, fg_mask, gt_idx = super().forward(pd_scores, pd_bboxes, *args, **kwargs)
            this.assignment = Assignment(labels, boxes, scores, fg_mask, gt_idx, pd_bboxes, self.n_max_boxes)
        return this.assignment[:5]


class BoxAssignment(v8DetectionLoss):
    """Assignment by the IoU of the boxes alone, for classes that have no score yet.

    Boxes of OBB models are compared by the upright boxes that enclose them.

    Examples:
        >>> fg, gt_idx, weight, n_max, boxes = BoxAssignment(model)(preds, batch)
    """

    assigner: RecordingAssigner
    angle: torch.Tensor | None = None  # of the predicted boxes of an OBB model, (B, A, 1)

    @classmethod
    def of_branches(cls, model: nn.Module, branches: Sequence[str]) -> list[BoxAssignment]:
        """Return the assignment of some branches of a head, each with as many anchors per object as in training.

        Args:
            model (nn.Module): Detection, segmentation, pose or OBB model.
            branches (Sequence[str]): Prefixes of the branches: '' for one-to-many, 'one2one_'.

        Returns:
            (list[BoxAssignment]): In the order of `branches`.
        """
        dual = E2ELoss(model, cls)
        return [dual.one2one if branch else dual.one2many for branch in branches]

    def __init__(self, model: nn.Module, tal_topk: int = 10, tal_topk2: int | None = None):
        """Initialize the assignment.

        Args:
            model (nn.Module): Detection, segmentation, pose or OBB model.
            tal_topk (int): Anchors per object, see `TaskAlignedAssigner`.
            tal_topk2 (int, optional): Number of them to keep, in one-to-one branches.
        """
        super().__init__(model, tal_topk, tal_topk2)
        self.hyp = SimpleNamespace(box=0.0, cls=0.0, dfl=0.0)  # the value of the loss is not used
        self.class_weights = None
        self.assigner = RecordingAssigner.like(self.assigner, num_classes=1)

    def __call__(
        self, preds: dict[str, torch.Tensor], batch: dict[str, torch.Tensor]
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor, torch.Tensor, int, torch.Tensor]:
        """Assign anchors to the labeled objects of a batch.

        Args:
            preds (dict[str, torch.Tensor]): Raw predictions of one branch.
            batch (dict[str, torch.Tensor]): Labels as collated by Ultralytics.

        Returns:
            fg (tuple[torch.Tensor, torch.Tensor]): Image and anchor index of the M assigned anchors.
            gt_idx (torch.Tensor): Index of the object within its image, (M,).
            weight (torch.Tensor): IoU-based weight of the anchor, (M,).
            n_max (int): Objects per image, padding included.
            boxes (torch.Tensor): Predicted boxes of all anchors, x1, y1, x2, y2 in pixels, (B, A, 4).
        """
        certain = {**preds, "scores": torch.full_like(preds["boxes"][:, :1], 20.0)}  # sigmoid(20) is 1
        one_class = {**batch, "cls": torch.zeros_like(batch["cls"])}
        self.assigner.current = this = Pass(certain, one_class)
        self.angle = preds["angle"].transpose(1, 2) if "angle" in preds else None
        try:
            self.get_assigned_targets_and_loss(certain, one_class)
        finally:
            self.assigner.current = None
        found = this.assigned
        image, anchor = found.fg_mask.nonzero(as_tuple=True)
        fg = image, anchor
        return fg, found.gt_idx[fg], found.scores[fg][:, 0], found.n_max, found.decoded

    def bbox_decode(self, anchor_points: torch.Tensor, pred_dist: torch.Tensor) -> torch.Tensor:
        """Decode predicted boxes; rotated ones become the upright boxes that enclose them.

        Args:
            anchor_points (torch.Tensor): Centers of the anchors in strides, (A, 2).
            pred_dist (torch.Tensor): Predicted distances to the sides, (B, A, 4 * reg_max).

        Returns:
            (torch.Tensor): x1, y1, x2, y2 in strides, (B, A, 4).
        """
        boxes = super().bbox_decode(anchor_points, pred_dist)
        if self.angle is None:
            return boxes
        sides = torch.cat([anchor_points - boxes[..., :2], boxes[..., 2:] - anchor_points], -1)
        center, size = dist2rbox(sides, self.angle, anchor_points).split(2, -1)
        half = (size * self.angle.cos().abs() + size.flip(-1) * self.angle.sin().abs()) / 2
        return torch.cat([center - half, center + half], -1)
