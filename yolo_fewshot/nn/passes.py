"""What one call of the loss knows, in one object that is dropped when the call ends."""

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
    """One call of the loss of one branch: its input, and what is computed on the way to the terms.

    Attributes:
        preds (dict[str, Any]): Raw predictions of the branch, see `FewShotDetect.forward_head`.
        batch (dict[str, Any]): Labels; boxes to ignore are blanked out.
        keep_mask (torch.Tensor | None): Anchors outside all boxes to ignore, (B, A) bool; None if there are no boxes.
        distilled (torch.Tensor | None): Classes that a teacher scores, (nc,) bool; None without a teacher.
        assignment (Assignment | None): Set by the assigner when it is first called; the same for the rest of the pass.
        fg (tuple[torch.Tensor, torch.Tensor]): Image and index of the M anchors assigned to objects, (M,) int64.
        box (torch.Tensor): CIoU loss without its gain.
        dfl (torch.Tensor): DFL or L1 loss without its gain.
        added (list[torch.Tensor]): Weighted terms beyond Ultralytics' own.
    """

    preds: dict[str, Any]
    batch: dict[str, Any]
    keep_mask: torch.Tensor | None = None
    distilled: torch.Tensor | None = None
    assignment: Assignment | None = None
    fg: tuple[torch.Tensor, torch.Tensor] = field(init=False)
    box: torch.Tensor = field(init=False)
    dfl: torch.Tensor = field(init=False)
    added: list[torch.Tensor] = field(default_factory=list)

    def __post_init__(self):
        """Start without an object: Ultralytics 8.4.144 does not call the box loss for a batch without anchors."""
        boxes = self.preds["boxes"]
        self.box = self.dfl = boxes[:0].float().sum()  # connected to the predictions
        none = boxes.new_zeros(0, dtype=torch.long)
        self.fg = none, none

    @property
    def assigned(self) -> Assignment:
        """The assignment, which must have been made."""
        assert self.assignment is not None, "the assigner has not been called in this pass"
        return self.assignment

    def class_mask(self) -> torch.Tensor | None:
        """Return which scores the class loss counts, (B, A or 1, nc or 1) bool; None for all of them.

        Background in boxes to ignore counts for no class, and other background not for the classes of a teacher.
        """
        mask = None if self.keep_mask is None else self.keep_mask.unsqueeze(-1)
        if self.distilled is not None:
            mask = ~self.distilled if mask is None else mask & ~self.distilled
        return None if mask is None else mask | self.assigned.fg_mask.unsqueeze(-1)
