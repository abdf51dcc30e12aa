"""What keeps old classes in stage 3: those that no image labels are taught by the model that training started from.

That model looks at the images of the shots, where they must not be taken for absent, and at the memory of the base
data, of which the shots may show nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from yolo_fewshot.nn.criterion import Retention
from yolo_fewshot.nn.predictions import branch_predictions


class Teacher:
    """The model that stage 3 starts from, asked for scores of the silent classes.

    Examples:
        >>> batch["teacher"] = Teacher(model, silent)(batch["img"])
    """

    def __init__(self, model: nn.Module, silent: torch.Tensor):
        """Initialize the teacher.

        Args:
            model (nn.Module): Few-shot model, which is taken over.
            silent (torch.Tensor): Classes to ask for, (S,) int64.
        """
        self.model, self.silent = model.eval().requires_grad_(False), silent

    @torch.no_grad()
    def __call__(self, img: torch.Tensor) -> list[torch.Tensor]:
        """Return the scores of the silent classes.

        Args:
            img (torch.Tensor): Images, (B, C, H, W) float in 0..1.

        Returns:
            (list[torch.Tensor]): Of every branch, scores at the anchors, (B, A, S) float32 in 0..1.
        """
        preds = branch_predictions(self.model, img)
        return [p["scores"][:, self.silent].transpose(1, 2).float().sigmoid() for p in preds]


def silent_classes(classes: int, labels: list[dict[str, Any]]) -> torch.Tensor:
    """Return the classes that no image has a label of.

    Args:
        classes (int): Number of classes.
        labels (list[dict]): Labels of the images, as in `YOLODataset.labels`.

    Returns:
        (torch.Tensor): Class indices, ascending, (S,) int64.
    """
    shown = {int(c) for x in labels for c in x["cls"].flat}
    return torch.tensor([c for c in range(classes) if c not in shown], dtype=torch.long)


@torch.no_grad()
def retain(model: nn.Module, silent: torch.Tensor) -> list[Retention]:
    """Return what a model knows of the silent classes.

    Args:
        model (nn.Module): Few-shot model as training starts from it.
        silent (torch.Tensor): Classes without a label in the training images, (S,) int64.

    Returns:
        (list[Retention]): Of every branch. Remembered anchors of classes that are labeled now are left out.
    """
    head, found = model.model[-1], []
    for i, bank in enumerate(head.banks):
        embeds, level, cls = model.memory[i] if model.memory else (bank.frozen[:0], silent[:0], silent[:0])
        embeds, level, cls = embeds.to(bank.weight.device).float(), level.to(silent).long(), cls.to(silent)
        keep = (cls < 0) | torch.isin(cls, silent)
        embeds, level = embeds[keep], level[keep]
        weights, biases = (torch.stack(x) for x in zip(*map(bank.rows, range(head.nl))))
        scores = (torch.einsum("md,mcd->mc", embeds, weights[level]) + biases[level]).sigmoid()
        targets = torch.zeros_like(scores)
        targets[:, silent] = scores[:, silent]
        found.append(Retention(i, silent, embeds, level, targets))
    return found
