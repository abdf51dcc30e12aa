"""Anti-forgetting losses for stage 3: distillation on unlabeled old classes and latent replay.

The teacher is the model that training starts from. It scores the unlabeled classes in the training images, where their
objects must not become background, and at the anchors of the replay buffer, since the shots may show none of them.
"""

from __future__ import annotations

from typing import Any

import torch

from yolo_fewshot.nn.criterion import Retention
from yolo_fewshot.nn.model import FewShotDetectionModel
from yolo_fewshot.nn.predictions import branch_predictions


class Teacher:
    """Scores the unlabeled classes in images with the model that stage 3 starts from.

    Examples:
        >>> batch["teacher"] = Teacher(model, unlabeled)(batch["img"])
    """

    def __init__(self, model: FewShotDetectionModel, unlabeled: torch.Tensor):
        """Initialize the teacher.

        Args:
            model (FewShotDetectionModel): Model, which is frozen in place.
            unlabeled (torch.Tensor): Classes to score, (S,) int64.
        """
        self.model, self.unlabeled = model.eval().requires_grad_(False), unlabeled

    @torch.no_grad()
    def __call__(self, img: torch.Tensor) -> list[torch.Tensor]:
        """Return the scores of the unlabeled classes.

        Args:
            img (torch.Tensor): Images, (B, C, H, W) float in 0..1.

        Returns:
            (list[torch.Tensor]): Of every branch, scores at the anchors, (B, A, S) float32 in 0..1.
        """
        preds = branch_predictions(self.model, img)
        return [p["scores"][:, self.unlabeled].transpose(1, 2).float().sigmoid() for p in preds]


def unlabeled_classes(nc: int, labels: list[dict[str, Any]]) -> torch.Tensor:
    """Return the classes without a label in the training images.

    Args:
        nc (int): Number of classes.
        labels (list[dict]): Labels of the images, as in `YOLODataset.labels`.

    Returns:
        (torch.Tensor): Class indices, ascending, (S,) int64.
    """
    labeled = {int(c) for x in labels for c in x["cls"].flat}
    return torch.tensor([c for c in range(nc) if c not in labeled], dtype=torch.long)


@torch.no_grad()
def replay_targets(model: FewShotDetectionModel, unlabeled: torch.Tensor) -> list[Retention]:
    """Score the unlabeled classes at the anchors of the replay buffer.

    Args:
        model (FewShotDetectionModel): Model that training starts from.
        unlabeled (torch.Tensor): Classes without a label in the training images, (S,) int64.

    Returns:
        (list[Retention]): Anchors and target scores of every branch. Anchors of classes that are labeled now are left
            out.
    """
    head, targets_of_branches = model.model[-1], []
    for i, prototypes in enumerate(head.branch_prototypes):
        empty = prototypes.frozen[:0], unlabeled[:0], unlabeled[:0]
        embeds, level, cls = model.memory[i] if model.memory else empty
        embeds, level, cls = embeds.to(prototypes.weight.device).float(), level.to(unlabeled).long(), cls.to(unlabeled)
        keep = (cls < 0) | torch.isin(cls, unlabeled)  # background, and objects of unlabeled classes
        embeds, level = embeds[keep], level[keep]
        targets = embeds.new_zeros(len(embeds), head.nc)
        for k in range(head.nl):  # at once it would take a row of each class for each anchor
            weight, bias = (x[unlabeled] for x in prototypes.rows(k))
            here = (level == k).nonzero()
            targets[here, unlabeled] = (embeds[here[:, 0]] @ weight.t() + bias).sigmoid()
        targets_of_branches.append(Retention(i, unlabeled, embeds, level, targets))
    return targets_of_branches
