"""Keeps a non-finite loss or gradient out of the weights, and says where it came from."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn
from ultralytics.utils import LOGGER


class Guard:
    """Clips gradients, and tells when a step has to be skipped.

    Attributes:
        norms (list[float]): Gradient norms before clipping, of the steps taken since `reset`.
        skipped (int): Steps skipped since `reset`.
    """

    def __init__(self):
        """Initialize the counters."""
        self.reset()

    def reset(self) -> None:
        """Set the counters to zero, as at the start of an epoch."""
        self.norms: list[float] = []
        self.skipped = 0

    def clip(self, model: nn.Module, max_norm: float, scale: float, loss: torch.Tensor) -> bool:
        """Clip the gradients of a model in place, and return whether the step may be taken.

        Args:
            model (nn.Module): Model after the backward pass, gradients unscaled.
            max_norm (float): Greatest norm of the gradient divided by `scale`.
            scale (float): Factor by which the loss was multiplied before the backward pass.
            loss (torch.Tensor): That loss.

        Returns:
            (bool): False, after a warning that names the cause, if the loss or the gradient is not finite.
        """
        parameters = [p for p in model.parameters() if p.grad is not None]
        total = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        norm, value = torch.stack([total.float(), loss.detach().float().to(total.device)]).tolist()  # the only sync
        ok = math.isfinite(norm) and math.isfinite(value)
        if ok:
            torch.nn.utils.clip_grads_with_norm_(parameters, max_norm * scale, total)
            self.norms.append(norm / scale)
        else:  # gradients are as they were, so that the first bad one can be named
            self.skipped += 1
            what = describe_nonfinite(model.named_parameters()) or f"loss={value}"
            LOGGER.warning(f"Non-finite {what}. Skipping this optimizer step ({self.skipped} skipped in this epoch).")
        return ok

    def columns(self) -> dict[str, float]:
        """Return the columns for results.csv: mean norm before clipping, and the steps skipped."""
        mean = sum(self.norms) / len(self.norms) if self.norms else 0.0
        return {"train/grad_norm": round(mean, 5), "train/skipped": self.skipped}


def describe_nonfinite(parameters: Iterable[tuple[str, nn.Parameter]]) -> str:
    """Name the first parameter whose gradient has a NaN or Inf.

    Args:
        parameters (Iterable[tuple[str, nn.Parameter]]): Names and parameters.

    Returns:
        (str): Name, minimum, maximum and mean of its gradient, or "" if all are finite.
    """
    for name, p in parameters:
        if p.grad is not None and not torch.isfinite(p.grad).all():
            g = p.grad.float()
            return f"gradient in {name}: min={g.min():.4g}, max={g.max():.4g}, mean={g.mean():.4g}"
    return ""
