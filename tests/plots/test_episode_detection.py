from pathlib import Path

import pytest
import torch
from ultralytics.utils.nms import non_max_suppression

from yolo_fewshot import FewShotYOLO
from yolo_fewshot.data.episodes import EpisodicDataset
from yolo_fewshot.data.support import SupportDataset, read_support
from yolo_fewshot.enroll.enroll import enroll
from yolo_fewshot.enroll.features import View
from yolo_fewshot.plots.episode_detection import detect_queries

QUERIES = 4


@pytest.fixture(scope="module")
def asked(trained, demo):
    """A model in which the novel classes of the demo data are enrolled by mean, and an episode of the same shots."""
    model = FewShotYOLO(trained[1].best).model.float().eval()
    shots = read_support("fewshot-demo-novel.yaml", model.names)
    enroll(model, shots, 96, method="mean", views=[View()])
    files = sorted((Path(demo) / "images/novel_query").iterdir())[:QUERIES]
    labels = [*shots.labels, *({**x, "im_file": str(f)} for x, f in zip(shots.labels, files))]
    dataset = SupportDataset(shots._replace(labels=labels), 96)
    draws = [{**dataset[i], "way": 24, "turned": False, "support": i < len(shots.labels)} for i in range(len(labels))]
    batch = EpisodicDataset.collate_fn(draws)
    return model, {**batch, "img": batch["img"].float() / 255}


def test_detections_are_those_of_a_model_with_the_mean_prototypes(asked):
    model, batch = asked
    found = detect_queries(model, batch, conf=0.05, iou=0.6)
    with torch.no_grad():
        expected = model(batch["img"][-QUERIES:])[0]
    rows = torch.cat([expected[:, :4], expected[:, 4 + 24 :]], 1)
    expected = non_max_suppression(rows, 0.05, 0.6)
    assert len(found) == QUERIES and sum(map(len, found)) > 4
    for a, b in zip(found, expected):
        b[:, 5] += 24
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_classes_without_support_objects_are_not_found(asked):
    model, batch = asked
    batch = {**batch, "support": batch["support"] & (torch.arange(len(batch["support"])) < 2)}
    shown = set(batch["cls"][batch["batch_idx"] < 2, 0].int().tolist())
    found = detect_queries(model, batch, conf=0.01)
    assert len(found) == len(batch["support"]) - 2 and 0 < len(shown) < 8
    assert {int(c) for x in found for c in x[:, 5]} == shown


def test_the_model_is_left_as_it_was(asked):
    model, batch = asked
    before = {k: v.clone() for k, v in model.state_dict().items()}
    detect_queries(model, batch)
    assert not model.training and not model.model[-1].training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
