from copy import deepcopy

import pytest
import torch
from test_features import BASE, draw_shots, model_of

from yolo_fewshot.data.support import read_support
from yolo_fewshot.enroll import replay as module
from yolo_fewshot.enroll.features import View, extract
from yolo_fewshot.enroll.replay import add_replay, add_replay_except, fill_replay_buffer
from yolo_fewshot.nn.rows import class_rows

SIZE = 96


@pytest.fixture(scope="module")
def model():
    model = model_of()
    for i in (2, 3):  # the label files of the drawn images count four classes
        model.model[-1].set_class(i, model.model[-1].get_class(i - 2))
    model.names = {0: "cat", 1: "square", 2: "dog", 3: "disc"}
    return model


@pytest.fixture(scope="module")
def shots(tmp_path_factory):
    return read_support(draw_shots(tmp_path_factory.mktemp("shots")), BASE)


def test_the_buffer_has_anchors_of_the_images_with_their_class(model, shots):
    before = deepcopy(model.state_dict())
    ((embeds, level, cls),) = fill_replay_buffer(model, shots.labels, SIZE)
    features = extract(class_rows(model), shots, SIZE, views=[View()], max_values=0)
    known = features.anchors[0]
    assert embeds.dtype == torch.float16 and len(embeds) == len(level) == len(cls) == len(known.embeds)
    for e, lev, c in zip(embeds.float(), level.tolist(), cls.tolist()):
        i = int((known.embeds - e).abs().sum(1).argmin())
        torch.testing.assert_close(known.embeds[i], e, rtol=2e-3, atol=2e-3)
        owner = int(known.objects[i])
        assert lev == int(known.level[i]) and c == (-1 if owner < 0 else int(features.cls[owner]))
    assert {-1, 1, 3} == set(cls.tolist())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_the_buffer_is_bounded_and_deterministic_for_a_seed(model, shots, monkeypatch):
    monkeypatch.setattr(module, "MAX_ANCHORS", 8)
    monkeypatch.setattr(module, "MAX_IMAGES", 3)
    first, again, other = (fill_replay_buffer(model, shots.labels, SIZE, seed)[0] for seed in (0, 0, 1))
    assert len(first[0]) == 8 and int((first[2] < 0).sum()) == 4
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not torch.equal(first[0], other[0])


def test_replayed_anchors_are_weak_negatives_of_no_image(model, shots):
    buffer, features = fill_replay_buffer(model, shots.labels, SIZE), extract(class_rows(model), shots, SIZE)
    n, own = len(features.anchors[0].embeds), buffer[0][2] == 1
    filled = deepcopy(model)
    filled.memory = buffer
    anchors = add_replay(features, class_rows(filled), [1]).anchors[0]
    assert own.any() and len(anchors.embeds) == n + int((~own).sum())
    assert torch.equal(anchors.embeds[n:], buffer[0][0][~own].float())
    assert torch.equal(anchors.level[n:], buffer[0][1][~own].long())
    for part in (anchors.objects, anchors.image, anchors.view):
        assert (part[n:] == -1).all() and part.dtype == torch.int64
    assert (anchors.weight[n:] == 0.3).all()
    assert all(torch.equal(a[:n], b) for a, b in zip(anchors, features.anchors[0]))


def test_anchors_of_classes_are_left_out_by_name(model, shots):
    filled, features = deepcopy(model), extract(class_rows(model), shots, SIZE)
    filled.memory = fill_replay_buffer(model, shots.labels, SIZE)
    expected = add_replay(features, class_rows(filled), [1])
    found = add_replay_except(features, class_rows(filled), ["square", "none of the model"])
    assert all(torch.equal(a, b) for a, b in zip(found.anchors[0], expected.anchors[0]))


def test_without_a_replay_buffer_the_features_are_unchanged(model, shots):
    features = extract(class_rows(model), shots, SIZE)
    assert add_replay(features, class_rows(model), []) is features


def test_both_branches_of_a_dual_head_are_replayed(shots):
    model = model_of("yolo26n-fewshot.yaml")
    model.names = {0: "cat", 1: "square"}
    images = [x for x in shots.labels if not (x["cls"] > 1).any()]
    buffer = fill_replay_buffer(model, images, SIZE)
    assert len(buffer) == 2 and not torch.equal(buffer[0][0], buffer[1][0])
