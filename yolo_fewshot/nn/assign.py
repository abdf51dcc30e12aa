"""Which anchors belong to which object: Ultralytics' assignment, kept for the terms that need it again."""

from __future__ import annotations

from copy import copy
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from ultralytics.utils.loss import E2ELoss, v8DetectionLoss
from ultralytics.utils.tal import TaskAlignedAssigner


class RecordingAssigner(TaskAlignedAssigner):
    """Ultralytics' assigner, keeping its last assignment, so that the episode terms need not assign again.

    Attributes:
        boxes (torch.Tensor): Decoded boxes that were assigned, (B, A, 4) in pixels.
        assigned (tuple): What `TaskAlignedAssigner.forward` returned.
        replay (bool): Whether to return the last assignment whatever the predictions are.
    """

    replay = False

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
        """Assign as Ultralytics does."""
        if self.replay:
            return self.assigned
        self.boxes = pd_bboxes
        self.assigned = super().forward(pd_scores, pd_bboxes, *args, **kwargs)
        return self.assigned

    def forget(self) -> None:
        """Drop the last assignment, to free its memory."""
        self.boxes = self.assigned = None


class BoxAssignment(v8DetectionLoss):
    """Assignment by the IoU of the boxes alone, for classes that have no score yet.

    Examples:
        >>> fg, gt_idx, weight, n_max, boxes = BoxAssignment.of_branches(model)[0](preds, batch)
    """

    @classmethod
    def of_branches(cls, model: nn.Module) -> list[BoxAssignment]:
        """Return the assignment of every branch of a model, each with as many anchors per object as in training.

        Args:
            model (nn.Module): Few-shot model.

        Returns:
            (list[BoxAssignment]): In the order of `FewShotDetect.branches`.
        """
        if len(model.model[-1].branches) == 1:
            return [cls(model)]
        dual = E2ELoss(model, cls)
        return [dual.one2many, dual.one2one]

    def __init__(self, model: nn.Module, tal_topk: int = 10, tal_topk2: int | None = None):
        """Initialize the assignment.

        Args:
            model (nn.Module): Detection model.
            tal_topk (int): Anchors per object, see `TaskAlignedAssigner`.
            tal_topk2 (int, optional): Those of them to keep, in one-to-one branches.
        """
        super().__init__(model, tal_topk, tal_topk2)
        self.hyp = SimpleNamespace(box=0.0, cls=0.0, dfl=0.0)  # of its loss only the assignment is wanted
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
            boxes (torch.Tensor): Decoded boxes of all anchors, x1, y1, x2, y2 in pixels, (B, A, 4).
        """
        sure = {**preds, "scores": torch.full_like(preds["boxes"][:, :1], 20.0)}  # sigmoid(20) is 1
        self.get_assigned_targets_and_loss(sure, {**batch, "cls": torch.zeros_like(batch["cls"])})
        _, _, scores, fg_mask, gt_idx = self.assigner.assigned
        fg = fg_mask.nonzero(as_tuple=True)
        n_max, boxes = self.assigner.n_max_boxes, self.assigner.boxes
        self.assigner.forget()
        return fg, gt_idx[fg], scores[fg][:, 0], n_max, boxes
