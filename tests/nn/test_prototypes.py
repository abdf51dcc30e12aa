import pytest
import torch
import torch.nn.functional as F

from yolo_fewshot.nn.prototypes import class_means, object_index, pool_objects


def test_pooling_is_the_weighted_mean_of_an_objects_anchors():
    torch.manual_seed(0)
    embeds = torch.randn(3, 20, 8)
    fg = (torch.tensor([0, 0, 0, 2, 2]), torch.tensor([1, 5, 7, 0, 19]))
    gt_idx, weight = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([0.2, 0.6, 0.9, 0.5, 0.1])
    pooled, valid = pool_objects(embeds, fg, gt_idx, weight, n_max=2)
    assert valid.tolist() == [True, True, False, False, False, True]
    for row, parts in {0: [(0, 1, 0.2), (0, 5, 0.6)], 1: [(0, 7, 0.9)], 5: [(2, 0, 0.5), (2, 19, 0.1)]}.items():
        expected = sum(w * embeds[b, a] for b, a, w in parts)
        torch.testing.assert_close(pooled[row], expected / expected.norm())
    assert not pooled[[2, 3, 4]].any()


def test_pooling_with_weights_near_zero_has_unit_length_and_bounded_gradients():
    embeds = torch.randn(1, 5, 8, requires_grad=True)
    fg = (torch.zeros(2, dtype=torch.long), torch.tensor([1, 3]))
    pooled, valid = pool_objects(embeds, fg, torch.zeros(2, dtype=torch.long), torch.full((2,), 1e-15), 1)
    pooled[0, 0].backward()
    assert valid.all() and pooled[0].norm().item() == pytest.approx(1) and embeds.grad.norm() < 10


def test_class_means_are_unit_means_and_negative_labels_are_left_out():
    torch.manual_seed(0)
    objects, labels = F.normalize(torch.randn(6, 5), dim=1), torch.tensor([2, 0, 2, -1, 0, 2])
    prototypes, counts = class_means(objects, labels, 4)
    assert counts.tolist() == [2, 0, 3, 0]
    for c in (0, 2):
        mean = objects[labels == c].mean(0)
        torch.testing.assert_close(prototypes[c], mean / mean.norm())
    assert not prototypes[[1, 3]].any()


def test_pooling_a_batch_without_objects_returns_empty_tensors():
    none = torch.zeros(0, dtype=torch.long)
    pooled, valid = pool_objects(torch.randn(2, 5, 8), (none, none), torch.zeros(0), torch.zeros(0), 0)
    assert pooled.shape == (0, 8) and valid.shape == (0,)


def test_the_index_of_an_object_is_its_image_and_its_number_there():
    image = [0, 0, 2, 2, 2, 3, 6]
    expected = [7 * p + image[:i].count(p) for i, p in enumerate(image)]
    for batch_idx in (torch.tensor(image), torch.tensor(image).float()[:, None]):
        assert object_index(batch_idx, 7).tolist() == expected
    assert object_index(torch.zeros(0), 7).tolist() == []
