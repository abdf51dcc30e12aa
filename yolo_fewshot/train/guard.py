"""The guard: keep a non-finite loss, gradient or statistic out of the weights; `guarded.py` puts it into a trainer."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn

Name = TypeVar("Name", bound=Hashable)

STOCK_CLIP = 10.0  # Ultralytics' maximum gradient norm, of the loss times batch size


class Guard:
    """Clips gradients, detects steps to skip, and undoes what the batches of a skipped step did.

    Attributes:
        norms (list[float]): Gradient norms before clipping of the steps taken since `reset`.
        clipped (int): Number of these norms above the limit.
        skipped (int): Steps skipped since `reset` because a value was not finite.
        overflows (int): Steps skipped since `reset` because a gradient times the AMP scale overflowed.
        in_a_row (int): Steps counted in `skipped` since the last step that was taken.
        total (dict[str, int]): Counts of steps, clipped, skipped and overflows before the last `reset`.
    """

    def __init__(self, model: nn.Module):
        """Initialize the counters and copy the statistics of the model.

        Args:
            model (nn.Module): Model in training, not wrapped for several GPUs.
        """
        self.parameters = dict(model.named_parameters())
        self.buffers = [b for b in model.buffers() if b.is_floating_point() and b.numel()]
        self.statistics = self._flat_buffers()
        self.in_a_row = 0
        self.norms: list[float] = []
        self.clipped = self.skipped = self.overflows = 0
        self.total = {k: 0 for k in self._counts()}

    def reset(self) -> None:
        """Set the counters of an epoch to zero."""
        self.total = {k: v + self.total[k] for k, v in self._counts().items()}
        self.norms, self.clipped, self.skipped, self.overflows = [], 0, 0, 0

    def clip(self, max_norm: float | None, scale: float, loss: torch.Tensor) -> bool:
        """Clip the gradients in place, and return whether the step may be taken.

        One number each for gradient, loss and statistics is read from the device. All processes of multi-GPU training
        return the same.

        Args:
            max_norm (float | None): Maximum norm of the gradient divided by `scale`; None for Ultralytics' limit, which
                is on the gradient itself.
            scale (float): Factor by which the loss was multiplied before the backward pass.
            loss (torch.Tensor): That loss.

        Returns:
            (bool): False if any value is not finite; the gradients then stay as they are.
        """
        grads = [p.grad for p in self.parameters.values() if p.grad is not None]
        foreach = False if loss.device.type == "npu" else None  # as Ultralytics does there
        total = torch.nn.utils.get_total_norm(grads, foreach=foreach)
        statistics = self._flat_buffers()
        largest = torch.linalg.vector_norm(statistics, math.inf) if len(statistics) else total.new_zeros(())
        values = torch.stack([total.float(), loss.detach().float(), largest.to(total.device)])
        if dist.is_available() and dist.is_initialized():  # NaN and Inf of one process reach all
            dist.all_reduce(values[1:], dist.ReduceOp.SUM)
        norm, *others = values.tolist()  # the only wait for the device
        if not all(map(math.isfinite, (norm, *others))):
            return False
        limit = STOCK_CLIP if max_norm is None else max_norm * scale
        torch.nn.utils.clip_grads_with_norm_(self.parameters.values(), limit, total, foreach=foreach)
        self.norms.append(norm / scale)
        self.clipped += norm > limit
        self.statistics, self.in_a_row = statistics, 0
        return True

    def skip(self, overflow: bool) -> None:
        """Count a skipped step.

        Args:
            overflow (bool): Whether it is an overflow of AMP, which is expected now and then.
        """
        if overflow:
            self.overflows += 1
        else:
            self.skipped += 1
            self.in_a_row += 1

    @torch.no_grad()
    def undo(self, source: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
        """Restore the statistics of the last step that was taken, and replace non-finite weights.

        Args:
            source (nn.Module): Moving average, which such weights are taken from.
            optimizer (torch.optim.Optimizer): Optimizer, whose state of such weights is dropped.

        Returns:
            (list[str]): Names of the replaced weights.

        Raises:
            FloatingPointError: If they are not finite in `source` either.
        """
        parts = self.statistics.split([b.numel() for b in self.buffers])
        for b, value in zip(self.buffers, parts):
            b.copy_(value.view_as(b))
        bad = nonfinite(self.parameters)
        averages = dict(source.named_parameters())
        for name in bad:
            if not torch.isfinite(averages[name]).all():
                raise FloatingPointError(
                    f"The weights of {name} are not finite, nor is their moving average. Start a new run with a "
                    "smaller lr0; a resumed one keeps its own."
                )
            self.parameters[name].copy_(averages[name])
            optimizer.state.pop(self.parameters[name], None)
        return bad

    def columns(self) -> dict[str, float]:
        """Return the columns for results.csv.

        Returns:
            (dict[str, float]): Mean gradient norm before clipping, and the counts of steps, clipped steps, skipped
                steps, and steps skipped for an overflow of AMP.
        """
        mean = sum(self.norms) / len(self.norms) if self.norms else 0.0
        return {"train/grad_norm": round(mean, 5), **{f"train/{k}": v for k, v in self._counts().items()}}

    def summary(self) -> str:
        """Return the counts of the whole run as a sentence."""
        return summarize({k: v + self.total[k] for k, v in self._counts().items()})

    def _counts(self) -> dict[str, int]:
        """Return the counters since `reset`."""
        steps = len(self.norms) + self.skipped + self.overflows
        return {"steps": steps, "clipped": self.clipped, "skipped": self.skipped, "overflows": self.overflows}

    def _flat_buffers(self) -> torch.Tensor:
        """Return a copy of all floating-point buffers, (N,)."""
        return torch.cat([b.reshape(-1).float() for b in self.buffers]) if self.buffers else torch.zeros(0)


def summarize(counts: Mapping[str, int]) -> str:
    """Return the counts of the steps of a run as a sentence.

    Args:
        counts (Mapping[str, int]): Numbers of `steps`, `clipped`, `skipped` and `overflows`, as in results.csv.

    Returns:
        (str): The sentence.
    """
    return (
        f"Of {counts['steps']} steps, {counts['clipped']} were clipped, {counts['overflows']} skipped for an AMP "
        f"overflow and {counts['skipped']} skipped for a NaN or Inf."
    )


def nonfinite(tensors: Mapping[Name, torch.Tensor]) -> list[Name]:
    """Return the names of the tensors that have a NaN or Inf.

    Args:
        tensors (Mapping[Hashable, torch.Tensor]): Tensors by name.

    Returns:
        (list[Hashable]): Names, in the same order.
    """
    flags = [torch.isfinite(t).all() for t in tensors.values()]
    return [k for k, ok in zip(tensors, torch.stack(flags).tolist()) if not ok] if flags else []
