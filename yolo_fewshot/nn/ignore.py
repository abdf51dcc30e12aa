"""Ignore regions of a batch: anchors inside are excluded from positives and negatives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

IGNORED = -1.0  # class of an ignore region between loading and loss


def without_ignored(batch: dict[str, Any]) -> tuple[dict[str, Any], torch.Tensor]:
    """Separate labeled objects and ignore regions.

    Args:
        batch (dict[str, Any]): Collated batch.

    Returns:
        batch (dict[str, Any]): The batch with the labeled objects alone.
        ignored (torch.Tensor): Image index, x, y, w, h, normalized, of the ignore regions, (n, 5).
    """
    drop = batch["cls"].view(-1) == IGNORED
    ignored = torch.cat([batch["batch_idx"].view(-1, 1), batch["bboxes"]], 1)[drop]
    return {**batch, **{k: batch[k][~drop] for k in ("cls", "bboxes", "batch_idx")}}, ignored


def blank_ignored(batch: dict[str, Any]) -> tuple[dict[str, Any], torch.Tensor]:
    """Separate labeled objects and ignore regions as `without_ignored` does, without waiting for the device.

    Args:
        batch (dict[str, Any]): Collated batch.

    Returns:
        batch (dict[str, Any]): The batch in which ignore regions have boxes of zeros, which the loss takes for padding.
        ignored (torch.Tensor): Image index, x, y, w, h, normalized, of all objects, (N, 5); labeled ones have boxes
            of zeros, which contain no anchor.
    """
    drop = batch["cls"].view(-1, 1) == IGNORED
    boxes, cls = batch["bboxes"], batch["cls"]
    ignored = torch.cat([batch["batch_idx"].view(-1, 1), torch.where(drop, boxes, 0)], 1)
    return {**batch, "bboxes": torch.where(drop, 0, boxes), "cls": cls.masked_fill(drop.view_as(cls), 0)}, ignored


def outside_regions(
    ignored: torch.Tensor, anchors: torch.Tensor, size: torch.Tensor | Sequence[int], n: int
) -> torch.Tensor:
    """Find the anchors whose center is outside all ignore regions.

    Args:
        ignored (torch.Tensor): Image index, x, y, w, h, normalized, (n, 5).
        anchors (torch.Tensor): Centers in pixels, (A, 2).
        size (torch.Tensor | Sequence[int]): Width and height of the images in pixels.
        n (int): Number of images B.

    Returns:
        (torch.Tensor): (B, A) bool.
    """
    (b, *center, w, h), (width, height) = ignored.unbind(1), size  # numbers that are on the CPU need no copy
    inside = (anchors[:, 0] - center[0][:, None] * width).abs() < w[:, None] * width / 2
    inside &= (anchors[:, 1] - center[1][:, None] * height).abs() < h[:, None] * height / 2
    count = inside.new_zeros(n, len(anchors), dtype=torch.int).index_add(0, b.long(), inside.int())
    return count == 0
