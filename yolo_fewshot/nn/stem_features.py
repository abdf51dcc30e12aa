"""Features of ordinary images without an image: drawn from the statistics of a class stem's BatchNorm layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from ultralytics.nn.modules.conv import Conv


@torch.no_grad()
def draw_features(stem: nn.Module, n: int, generator: torch.Generator) -> torch.Tensor | None:
    """Draw outputs of a class stem as images like those that the model was trained on would give.

    Over the training images the output of a BatchNorm has the mean beta and the standard deviation |gamma| in each
    channel; Yin et al. (DeepInversion, CVPR 2020) use such statistics as a prior of images without data. Here they are
    one of features. Each channel is drawn from its normal distribution, independently. If the last layer of the stem
    is a 1x1 convolution, its inputs are drawn so and passed through it, which correlates the channels as it does.

    Args:
        stem (nn.Module): Layers of the class branch at one level before its last one, in eval mode.
        n (int): Number of anchors.
        generator (torch.Generator): Source of the random numbers, on the CPU.

    Returns:
        (torch.Tensor | None): Features, (n, D) float32 on the CPU; None for a stem that does not end with Ultralytics'
            `Conv`, or whose BatchNorm layers were fused.
    """
    convs: list[Any] = [m for m in stem.modules() if isinstance(m, Conv)]
    modules = list(stem.modules())
    last = convs[-1] if convs else None
    if last is None or not any(m is modules[-1] for m in last.modules()) or not _has_statistics(last):
        return None
    pointwise = last.conv.kernel_size == (1, 1) and last.conv.groups == 1
    if not pointwise or len(convs) < 2 or not _has_statistics(convs[-2]):
        return _draw(last, n, generator).cpu().float()
    return last(_draw(convs[-2], n, generator)[:, :, None, None])[:, :, 0, 0].cpu().float()


def _has_statistics(conv: Any) -> bool:
    """Return whether a layer still has its BatchNorm."""
    return isinstance(getattr(conv, "bn", None), nn.BatchNorm2d) and conv.bn.affine


def _draw(conv: Any, n: int, generator: torch.Generator) -> torch.Tensor:
    """Draw outputs of a layer, (n, C)."""
    mean, std = conv.bn.bias, conv.bn.weight.abs()
    return conv.act(torch.randn(n, len(mean), generator=generator).to(mean) * std + mean)
