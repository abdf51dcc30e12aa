"""Raw predictions of a model in eval mode, in the form that training uses."""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from torch import nn


def branch_predictions(model: nn.Module, img: torch.Tensor) -> list[dict[str, Any]]:
    """Return the raw predictions of every branch of a few-shot model in eval mode, with embeddings.

    Args:
        model (nn.Module): Few-shot model.
        img (torch.Tensor): Images, (B, C, H, W) float in 0..1.

    Returns:
        (list[dict[str, Any]]): As `FewShotDetect.forward_head` returns them in training.
    """
    layers: Any = model.model
    shallow: Any = copy(model)
    head = copy(layers[-1])
    head.training = True  # of this copy alone: BatchNorm stays in eval mode, and other threads see no change
    shallow._modules = {**model._modules, "model": nn.Sequential(*layers[:-1], head)}
    preds = shallow.predict(img)
    return [preds["one2many"], preds["one2one"]] if "one2many" in preds else [preds]
