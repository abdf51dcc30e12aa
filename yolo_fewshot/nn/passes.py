"""State of a single call of the loss."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch


class Assignment(NamedTuple):
    """Objects that the anchors of a batch are assigned to, as `TaskAlignedAssigner` returns them, and its input.

    Attributes:
        labels (torch.Tensor): Class of the object of each anchor, (B, A).
        boxes (torch.Tensor): Its box, x1, y1, x2, y2 in pixels, (B, A, 4).
        scores (torch.Tensor): Target scores, (B, A, nc).
        fg_mask (torch.Tensor): Anchors with an object, (B, A) bool.
        gt_idx (torch.Tensor): Index of the object within its image, (B, A).
        decoded (torch.Tensor): Predicted boxes, x1, y1, x2, y2 in pixels, (B, A, 4).
        n_max (int): Objects per image, padding included.
    """

    labels: torch.Tensor
    boxes: torch.Tensor
    scores: torch.Tensor
    fg_mask: torch.Tensor
    gt_idx: torch.Tensor
    decoded: torch.Tensor
    n_max: int


@dataclass
class Pass:
    """State of one call of the loss of one branch: its input and its intermediate results.

    Attributes:
        preds (dict[str, Any]): Raw predictions of the branch, see `FewShotDetect.forward_head`.
        batch (dict[str, Any]): Labels, in which ignore regions have boxes of zeros.
        keep_mask (torch.Tensor | None): Anchors outside all ignore regions, (B, A) bool; None without ignore regions.
        distilled (torch.Tensor | None): Classes that a teacher scores, (nc,) bool; None without a teacher.
        trained (torch.Tensor | None): Classes that are trained, (nc,) bool; None for all.
        assignment (Assignment | None): Set by the first call of the assigner, and reused by later calls.
        fg (tuple[torch.Tensor, torch.Tensor]): Image and index of the M anchors assigned to objects, (M,) int64.
        box (torch.Tensor): CIoU loss without its gain.
        dfl (torch.Tensor): DFL or L1 loss without its gain.
        added (list[torch.Tensor]): Weighted terms beyond Ultralytics' own.
    """

    preds: dict[str, Any]
    batch: dict[str, Any]
    keep_mask: torch.Tensor | None = None
    distilled: torch.Tensor | None = None
    trained: torch.Tensor | None = None
    assignment: Assignment | None = None
    fg: tuple[torch.Tensor, torch.Tensor] = field(init=False)
    box: torch.Tensor = field(init=False)
    dfl: torch.Tensor = field(init=False)
    added: list[torch.Tensor] = field(default_factory=list)

    def __post_init__(self):
        """Set the box terms to zero, since Ultralytics 8.4.144 skips the box loss if no anchor is assigned."""
        boxes = self.preds["boxes"]
        self.box = self.dfl = boxes[:0].float().sum()  # connected to the predictions
        none = boxes.new_zeros(0, dtype=torch.long)
        self.fg = none, none

    @property
    def assigned(self) -> Assignment:
        """The assignment; the assigner must have been called."""
        assert self.assignment is not None, "the assigner has not been called in this pass"
        return self.assignment

    def class_mask(self) -> torch.Tensor | None:
        """Return the mask of the scores in the class loss, which broadcasts to (B, A, nc), bool; None for all scores.

        The mask excludes background anchors in ignore regions, background scores of the classes of a teacher, and all
        scores of classes that are not trained.
        """
        mask = None if self.keep_mask is None else self.keep_mask.unsqueeze(-1)
        if self.distilled is not None:
            mask = ~self.distilled if mask is None else mask & ~self.distilled
        mask = None if mask is None else mask | self.assigned.fg_mask.unsqueeze(-1)
        if self.trained is None or mask is None:
            return self.trained if mask is None else mask
        return mask & self.trained
