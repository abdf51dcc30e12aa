from copy import deepcopy

import numpy as np
import pytest
import torch
from test_features import model_of

from yolo_fewshot.nn.model import FewShotDetectionModel
from yolo_fewshot.train.retention import Teacher, replay_targets, unlabeled_classes


def labels_of(*classes):
    return [{"cls": np.array(c, np.float32).reshape(-1, 1)} for c in classes]


@pytest.fixture(params=["yolo11n-fewshot.yaml", "yolo26n-fewshot.yaml"])
def model(request):
    torch.manual_seed(0)
    model = FewShotDetectionModel(request.param, nc=4, verbose=False).eval()
    g = torch.Generator().manual_seed(1)
    for bank in model.model[-1].branch_prototypes:
        with torch.no_grad():
            bank.logit_scale.copy_(torch.tensor([0.6, 0.8, 1.0]))
            bank.gain.copy_(torch.rand(4, generator=g) + 0.5)
            bank.offset.copy_(torch.randn(4, generator=g))
    return model


def memory_of(model, rows=12):
    g = torch.Generator().manual_seed(2)
    size = model.model[-1].embed
    level, cls = torch.arange(rows) % 3, torch.arange(rows) % 5 - 1  # background, then classes 0 to 3
    return [(torch.randn(rows, size, generator=g).half(), level.short(), cls.short()) for _ in model.model[-1].branches]


def test_unlabeled_classes():
    assert unlabeled_classes(5, labels_of([3, 1], [], [1])).tolist() == [0, 2, 4]
    assert unlabeled_classes(2, labels_of([0], [1])).tolist() == []
    assert unlabeled_classes(3, []).tolist() == [0, 1, 2]
    assert unlabeled_classes(2, labels_of([0], [1])).dtype == torch.int64


def test_replay_targets_are_the_scores_at_the_anchors_of_the_buffer(model):
    model.memory = memory_of(model)
    unlabeled = torch.tensor([0, 2])
    for i, (bank, found) in enumerate(
        zip(model.model[-1].branch_prototypes, replay_targets(model, unlabeled), strict=True)
    ):
        assert found.branch == i and found.unlabeled is unlabeled
        rows = []
        for e, lev, c in zip(*model.memory[i]):
            if int(c) in {1, 3}:  # labeled now
                continue
            scores = torch.zeros(4)
            for k in (0, 2):
                p = bank.weight[k, :, 0] / bank.weight[k, :, 0].norm()
                logit = bank.logit_scale[lev.item()] * bank.gain[k] * (e.float() @ p)
                scores[k] = torch.sigmoid(logit + bank.bias[lev.item()] + bank.offset[k])
            rows.append((e.float(), int(lev), scores))
        assert len(rows) == 8 and not found.targets.requires_grad
        embeds, level, targets = zip(*rows)
        assert torch.equal(found.embeds, torch.stack(embeds)) and found.level.tolist() == list(level)
        torch.testing.assert_close(found.targets, torch.stack(targets).detach())


def test_a_model_without_a_replay_buffer_has_no_targets(model):
    for found in replay_targets(model, torch.tensor([1])):
        assert found.embeds.shape == (0, model.model[-1].embed)
        assert found.level.shape == (0,) and found.targets.shape == (0, 4)


def test_a_teacher_returns_the_scores_of_the_unlabeled_classes(model):
    img, unlabeled = torch.rand(2, 3, 96, 96), torch.tensor([3, 1])
    with torch.no_grad():
        preds = model(img)[1]
    expected = [preds[k]["scores"] for k in ("one2many", "one2one")] if "one2many" in preds else [preds["scores"]]
    teacher = Teacher(deepcopy(model).train(), unlabeled)
    for scores, logits in zip(teacher(img), expected, strict=True):
        assert scores.shape == (2, logits.shape[2], 2) and scores.dtype == torch.float32
        torch.testing.assert_close(scores[..., 0], torch.sigmoid(logits[:, 3]))
        torch.testing.assert_close(scores[..., 1], torch.sigmoid(logits[:, 1]))
        assert not scores.requires_grad


def test_a_teacher_never_changes():
    model = model_of().train()
    before = deepcopy(model.state_dict())
    teacher = Teacher(model, torch.tensor([0]))
    first = teacher(torch.rand(2, 3, 96, 96))
    assert not torch.equal(first[0], teacher(torch.rand(2, 3, 96, 96))[0])
    assert all(torch.equal(v, before[k]) for k, v in teacher.model.state_dict().items())  # nor its running statistics
    assert not any(p.requires_grad for p in teacher.model.parameters())
