"""Features drawn from BatchNorm statistics have the moments that these statistics state."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from test_rows import DETECT, images, stock_of
from torch import nn
from ultralytics.nn.modules.conv import Conv

from yolo_fewshot.nn.rows import DRAWN, DRAWN_MAX, class_rows
from yolo_fewshot.nn.stem_features import draw_features

pytestmark = pytest.mark.oldest
N = 40_000


def silu(x):
    return x / (1 + np.exp(-x))


def vary(conv, seed):
    """Give a layer's BatchNorm scales of both signs, shifts and statistics."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        conv.bn.weight.copy_(torch.randn(conv.bn.num_features, generator=rng))
        conv.bn.bias.copy_(torch.randn(conv.bn.num_features, generator=rng))
        conv.bn.running_mean.copy_(torch.randn(conv.bn.num_features, generator=rng))
        conv.bn.running_var.copy_(torch.rand(conv.bn.num_features, generator=rng) + 0.5)
    return conv


def drawn(stem, n=N, seed=0):
    return draw_features(stem.eval(), n, torch.Generator().manual_seed(seed))


def moments(conv):
    """Mean and variance of the SiLU of a normal variable for each channel, by numerical integration."""
    z = np.linspace(-8, 8, 4001)
    density = np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi) * (z[1] - z[0])
    values = silu(conv.bn.bias.detach().numpy()[:, None] + conv.bn.weight.detach().numpy()[:, None] * z)
    mean = (values * density).sum(1)
    return mean, (values**2 * density).sum(1) - mean**2


def test_outputs_of_a_wide_convolution_have_its_moments_and_are_independent():
    stem = nn.Sequential(Conv(3, 4, 3), vary(Conv(4, 5, 3), 1))
    features = drawn(stem).numpy()
    mean, var = moments(stem[1])
    assert features.shape == (N, 5) and features.dtype == np.float32
    np.testing.assert_allclose(features.mean(0), mean, atol=0.03)
    np.testing.assert_allclose(features.var(0), var, rtol=0.06, atol=1e-3)
    correlation = np.corrcoef(features.T) - np.eye(5)
    assert np.abs(correlation).max() < 0.03


def test_a_pointwise_convolution_correlates_the_channels_that_are_drawn_before_it():
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Sequential(vary(Conv(4, 4, 3, g=4), 1), vary(Conv(4, 6, 1), 2)))
    last = stem[0][1]
    last.act = nn.Identity()  # so that the moments of its outputs have a closed form
    mean, var = moments(stem[0][0])
    weight = last.conv.weight.detach().numpy()[:, :, 0, 0]
    gain = (last.bn.weight / (last.bn.running_var + last.bn.eps).sqrt()).detach().numpy()
    expected = gain * (weight @ mean - last.bn.running_mean.numpy()) + last.bn.bias.detach().numpy()
    covariance = gain[:, None] * (weight * var @ weight.T) * gain
    features = drawn(stem).numpy()
    np.testing.assert_allclose(features.mean(0), expected, atol=0.03)
    np.testing.assert_allclose(np.cov(features.T), covariance, atol=0.05 * np.abs(covariance).max())
    assert np.abs(covariance - np.diag(np.diag(covariance))).max() > 0.2 * np.abs(covariance).max()


def test_draws_follow_the_generator_and_leave_the_global_one_alone():
    stem = nn.Sequential(vary(Conv(3, 4, 3), 1))
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, second, other = drawn(stem, 9), drawn(stem, 9), drawn(stem, 9, 1)
    assert torch.rand(1) == expected
    assert torch.equal(first, second) and not torch.equal(first, other) and not first.requires_grad


@pytest.mark.parametrize(
    "stem",
    [
        nn.Sequential(),
        nn.Sequential(nn.Conv2d(3, 4, 1)),
        nn.Sequential(Conv(3, 4, 1), nn.ReLU()),  # what follows the BatchNorm is not known
        nn.Sequential(Conv(3, 4, 1), nn.Conv2d(4, 4, 1)),
    ],
)
def test_other_stems_have_no_statistics(stem):
    assert drawn(stem, 3) is None


@pytest.mark.parametrize("cfg", DETECT)
def test_the_rows_of_every_family_have_a_memory_in_their_own_space(cfg):
    model = stock_of(cfg)
    rows = class_rows(model)
    assert rows.memory == []
    rows.standardize(images())
    memory, levels = rows.memory, model.model[-1].nl
    assert len(memory) == len(rows.branches) and len(memory[0][0]) == levels * DRAWN
    for (embeds, level, cls), space, mean, std in zip(memory, rows.spaces(), rows.mean, rows.std):
        assert embeds.shape == (len(level), space.embed) and (cls == -1).all() and embeds.isfinite().all()
        assert level.bincount().tolist() == [DRAWN] * levels
        e = embeds[level == 1].double()
        raw, rounding = e * std[1] + mean[1], 1e-3 * e.abs() * std[1]
        assert (raw > -0.28 - rounding).all() and raw.std() > 0  # outputs of a SiLU
    assert all(map(torch.equal, memory[0], rows.memory[0]))


def test_a_feature_that_the_support_images_do_not_vary_in_stays_finite():
    rows = class_rows(deepcopy(stock_of("yolov8n.yaml")))
    rows.standardize(images())
    rows.std = [x * 1e-9 for x in rows.std]
    embeds = rows.memory[0][0]
    assert embeds.isfinite().all() and embeds.abs().max() == DRAWN_MAX


def test_a_fused_head_has_no_memory():
    model = deepcopy(stock_of("yolo11n.yaml"))
    model.fuse(verbose=False)
    rows = class_rows(model)
    rows.standardize(images())
    assert rows.memory == []
