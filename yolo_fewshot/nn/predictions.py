"""Raw predictions of a model in eval mode, in the form that training uses."""

from __future__ import annotations

from copy import copy

import torch
from torch import nn


def branch_predictions(model: nn.Module, img: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """Return the raw predictions of every branch of a few-shot model in eval mode, with embeddings.

    Args:
        model (nn.Module): Few-shot model.
        img (torch.Tensor): Images, (B, C, H, W) float in 0..1.

    Returns:
        (list[dict[str, torch.Tensor]]): As `FewShotDetect.forward_head` returns them in training.
    """
    head, shallow = copy(model.model[-1]), copy(model)
    head.training = True  # of this copy alone: BatchNorm stays in eval mode, and other threads see no change
    shallow._modules = {**model._modules, "model": nn.Sequential(*model.model[:-1], head)}
    preds = shallow.predict(img)
    return [preds["one2many"], preds["one2one"]] if "one2many" in preds else [preds]
