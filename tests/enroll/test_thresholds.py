import pytest
import torch

from yolo_fewshot.enroll.detection import Detections
from yolo_fewshot.enroll.thresholds import best_conf, thresholds


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


def test_the_suggested_confidence_weighs_precision_and_recall_alike():
    """F1 is 2/3 with one detection, 4/7 with two and 3/4 with all; with more objects missed the choice is the same."""
    conf, tp = torch.tensor([0.9, 0.7, 0.6, 0.5]), torch.tensor([True, False, True, True])
    assert best_conf(conf, tp, 2) == pytest.approx(0.255)
    conf, tp = torch.tensor([0.9, 0.7, 0.6, 0.5, 0.4]), torch.tensor([True, False, False, False, True])
    assert best_conf(conf, tp, 2) == pytest.approx(0.8)  # 2/3 against 4/7
    assert best_conf(conf, tp, 6) == pytest.approx(0.205)  # 2/7 against 4/11


def test_the_suggested_confidence_lies_between_what_to_keep_and_the_rest():
    conf, tp = torch.tensor([0.3, 0.9, 0.7, 0.2]), torch.tensor([False, True, True, False])
    assert best_conf(conf, tp, 2) == pytest.approx(0.5)
    assert best_conf(conf[1:3], tp[1:3], 2) == 0.355  # all are to be kept


def test_a_suggested_confidence_never_lies_within_a_tie():
    conf, tp = torch.tensor([0.9, 0.9, 0.5]), torch.tensor([True, False, False])
    assert best_conf(conf, tp, 1) == 0.7


def test_without_a_true_positive_there_is_no_suggestion():
    assert best_conf(torch.tensor([0.9, 0.4]), torch.tensor([False, False]), 3) is None
    assert best_conf(torch.zeros(0), torch.zeros(0, dtype=torch.bool), 3) is None


def test_thresholds_are_those_of_each_class():
    torch.manual_seed(0)
    cls, conf = torch.randint(0, 3, (60,)), torch.rand(60)
    tp = (torch.rand(60) < conf) & (cls != 1)
    found = thresholds(Detections(cls, conf, tp, torch.tensor([15, 9, 12, 4])))
    for c, k in ((0, 15), (2, 12)):
        assert found[c] == best_conf(conf[cls == c], tp[cls == c], k)
    assert found[1] is None and found[3] is None and found[0] != found[2]
