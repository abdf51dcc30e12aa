import math

import pytest
import torch

from yolo_fewshot.enroll.detection import CONF, Detections
from yolo_fewshot.enroll.thresholds import best_conf, quiet_conf, thresholds


def f1(conf, tp, n_gt, threshold):
    kept = conf > threshold
    return 2 * int((tp & kept).sum()) / (int(kept.sum()) + n_gt)


@pytest.mark.parametrize("seed", range(20))
def test_the_suggested_confidence_has_the_maximum_f1(seed):
    torch.manual_seed(seed)
    n = int(torch.randint(1, 25, ()))
    conf = (torch.randperm(97)[:n] + 2) / 100
    tp = torch.rand(n) < conf
    if not tp.any():
        assert best_conf(conf, tp, 5) is None
        return
    n_gt = int(tp.sum()) + int(torch.randint(0, 5, ()))
    best = best_conf(conf, tp, n_gt)
    maximum = max(f1(conf, tp, n_gt, t) for t in torch.linspace(0, 1, 1001))
    assert f1(conf, tp, n_gt, best) == maximum


def test_the_suggested_confidence_weighs_precision_and_recall_equally():
    """F1 is 2/3 with one detection, 4/7 with two and 3/4 with all; with more objects missed the choice is the same."""
    conf, tp = torch.tensor([0.9, 0.7, 0.6, 0.5]), torch.tensor([True, False, True, True])
    assert best_conf(conf, tp, 2) == pytest.approx(0.255)
    conf, tp = torch.tensor([0.9, 0.7, 0.6, 0.5, 0.4]), torch.tensor([True, False, False, False, True])
    assert best_conf(conf, tp, 2) == pytest.approx(0.8)  # 2/3 against 4/7
    assert best_conf(conf, tp, 6) == pytest.approx(0.205)  # 2/7 against 4/11


def test_the_suggested_confidence_is_midway_between_kept_and_other_detections():
    conf, tp = torch.tensor([0.3, 0.9, 0.7, 0.2]), torch.tensor([False, True, True, False])
    assert best_conf(conf, tp, 2) == pytest.approx(0.5)
    assert best_conf(conf[1:3], tp[1:3], 2) == 0.355  # all are to be kept


def test_a_suggested_confidence_never_lies_within_a_tie():
    conf, tp = torch.tensor([0.9, 0.9, 0.5]), torch.tensor([True, False, False])
    assert best_conf(conf, tp, 1) == 0.7


def test_without_a_true_positive_there_is_no_suggestion():
    assert best_conf(torch.tensor([0.9, 0.4]), torch.tensor([False, False]), 3) is None
    assert best_conf(torch.zeros(0), torch.zeros(0, dtype=torch.bool), 3) is None


def test_each_class_has_its_own_threshold():
    torch.manual_seed(0)
    cls, conf = torch.randint(0, 3, (60,)), torch.rand(60)
    tp = (torch.rand(60) < conf) & (cls != 1)
    found = thresholds(Detections(cls, conf, tp, torch.tensor([15, 9, 12, 4])))
    for c, k in ((0, 15), (2, 12)):
        assert found[c] == best_conf(conf[cls == c], tp[cls == c], k)
    assert found[1] is None and found[3] is None and found[0] != found[2]


# Background images ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [1.0, 0.05, 0.005])
def test_false_alarms_have_the_rate_asked_for(rate):
    """In each of many images 20 alarms whose logits exceed -8 by an exponential of mean 1.2: the truth is known."""
    rng = torch.Generator().manual_seed(0)
    truth, found = -8 + 1.2 * math.log(20 / rate), []
    for _ in range(200):
        logits = -8 - 1.2 * torch.rand(100 * 20, generator=rng).log()
        found.append(math.log((c := quiet_conf(logits.sigmoid(), 100, rate)) / (1 - c)))
    assert torch.tensor(found).median() == pytest.approx(truth, abs=0.3)


def test_a_low_rate_of_false_alarms_needs_a_threshold_above_all_observed():
    alarms = torch.tensor([0.02, 0.11, 0.3, 0.05, 0.04])
    found = [quiet_conf(alarms, 20, rate) for rate in (0.2, 0.05, 0.01, 0.001)]
    assert found == sorted(found) and found[0] < 0.3 < found[2] < found[3] < 1


def test_the_threshold_is_above_a_single_false_alarm_and_minimal_without_any():
    assert quiet_conf(torch.zeros(0), 10, 0.05) == CONF
    assert 0.4 < quiet_conf(torch.tensor([0.4]), 10, 0.05) < 0.41


def test_thresholds_with_background_are_the_larger_of_both():
    """Class 0 has no alarm, class 1 some above its shots, class 2 was never found."""
    cls, conf = torch.tensor([0, 0, 1, 1, 1, 1]), torch.tensor([0.9, 0.2, 0.3, 0.5, 0.4, 0.35])
    tp, background = torch.tensor([1, 0, 1, 0, 0, 0]).bool(), torch.tensor([0, 0, 0, 1, 1, 1]).bool()
    found = thresholds(Detections(cls, conf, tp, torch.tensor([1, 1, 1]), background, torch.tensor(10)))
    assert found[0] == best_conf(conf[:2], tp[:2], 1) == 0.55
    assert found[1] == quiet_conf(conf[3:], 10, 0.05 / 3) > best_conf(conf[2:], tp[2:], 1)
    assert found[2] == CONF


def test_the_rate_of_a_class_is_that_of_the_images_it_was_looked_for_in():
    """Seven alarms of logit 0 and one of -1: -1 + log(7 / images / rate), where the rate is 0.05 / 3 for each class."""
    cls = torch.arange(3).repeat_interleave(8)
    conf = torch.tensor([0.0] * 7 + [-1.0]).sigmoid().repeat(3)
    nothing, searched = torch.zeros(24).bool(), torch.tensor([10, 8, 0])
    found = thresholds(Detections(cls, conf, nothing, torch.tensor([1, 1, 1]), ~nothing, searched))
    assert found[0] == pytest.approx(42 / (42 + math.e), abs=1e-3)
    assert found[1] == pytest.approx(52.5 / (52.5 + math.e), abs=1e-3)
    assert found[2] is None
