import logging
import os

import cv2
import numpy as np
import pytest
import torch
from ultralytics import YOLO
from ultralytics.engine.results import Results

from yolo_fewshot import cli
from yolo_fewshot import demo as module
from yolo_fewshot.data.demo import BASE
from yolo_fewshot.data.support import read_support
from yolo_fewshot.demo import CLASS, count, find_weights, own_detector, write_scenes


@pytest.fixture
def folder(tmp_path, monkeypatch, caplog):
    """An empty working directory, whose runs are kept in it."""
    caplog.set_level(logging.INFO)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def no_training(monkeypatch):
    """Fail where the demo trains a detector of its own."""
    monkeypatch.setattr(module, "own_detector", lambda *_: pytest.fail("a detector was trained"))


def stock(file):
    """Save a stock detector that has learned nothing."""
    torch.manual_seed(0)
    YOLO("yolo11n.yaml").save(file)
    return file


@pytest.mark.slow
def test_a_checkpoint_at_hand_learns_the_class_and_finds_it(trained, folder, no_training, caplog):
    result = module.demo(str(trained[1].best), imgsz=96, project=str(folder))
    assert result.folder == folder / "demo" and result.model == trained[1].best
    assert 0 < result.found <= result.objects == 6
    assert f"'{CLASS}': {result.found} of 6 objects found in new images, {result.false} false alarms." in caplog.text
    assert caplog.text.rstrip().endswith(f"Results saved to {folder / 'demo'}")
    plot = cv2.imread(str(folder / "demo" / "demo.jpg"))
    assert plot.shape == (2 * 480, 3 * 480, 3)  # six images in two rows
    plain = np.hstack([cv2.imread(str(folder / "demo" / "images" / f"{i:03}.jpg")) for i in range(3)])
    assert (np.abs(plot[:480].astype(int) - plain).max(2) > 60).sum() > 200  # boxes and labels are drawn
    saved = YOLO(folder / "demo" / "demo.pt")
    assert list(saved.names.values()) == [*BASE, CLASS] and saved.model.enrolled[CLASS]["shots"] == 5


@pytest.mark.slow
def test_each_printed_command_works_on_the_shots_of_the_demo(trained, folder, caplog):
    module.demo(str(trained[1].best), shots=2, imgsz=96, project=str(folder))
    line = next(x.split("#")[0].split() for x in caplog.messages[-2].splitlines() if "yolo-fewshot enroll" in x)
    line = [x.replace("support=shots", f"support={folder / 'demo' / 'shots'}") for x in line]
    cli.main([*line[1:], "imgsz=96"])
    assert list(YOLO(folder / "mine.pt").model.enrolled) == [CLASS]


@pytest.mark.slow
def test_a_second_demo_keeps_the_first(trained, folder):
    first = module.demo(str(trained[1].best), shots=1, imgsz=96, project=str(folder))
    before = {f: f.read_bytes() for f in first.folder.rglob("*") if f.is_file()}
    second = module.demo(str(trained[1].best), shots=2, imgsz=96, project=str(folder))
    assert second.folder == folder / "demo-2" and before == {f: f.read_bytes() for f in before}
    assert len(list((second.folder / "shots" / "images").iterdir())) == 2


@pytest.mark.slow
def test_a_class_that_is_not_found_is_said_to_be_not_found(folder, no_training, caplog, monkeypatch):
    stock(folder / "yolo11n.pt")
    monkeypatch.setattr("yolo_fewshot.yolo.FewShotYOLO.predict", lambda self, source, **_: [
        Results(cv2.imread(str(f)), str(f), {0: CLASS}, boxes=torch.zeros(0, 6)) for f in sorted(source.iterdir())
    ])  # fmt: skip
    result = module.demo(imgsz=64, project=str(folder))
    assert (result.found, result.objects, result.false) == (0, 6, 0)
    (record,) = [x for x in caplog.records if "was not found" in x.getMessage()]
    assert record.levelname == "WARNING" and "0 of 6 objects found" in record.getMessage()
    assert (folder / "demo" / "demo.jpg").is_file()


@pytest.mark.slow
def test_without_the_weights_a_detector_is_trained_once(folder, monkeypatch, caplog):
    monkeypatch.setattr(module, "EPOCHS", 1)
    result = module.demo(project=str(folder))
    assert "yolo11n.pt cannot be downloaded" in caplog.text and "a minute or two" in caplog.text
    assert result.model == folder / "demo-detector.pt" and list(YOLO(result.model).names.values()) == list(BASE)
    assert (folder / "demo" / "demo.jpg").is_file()
    assert sorted(x.name for x in folder.iterdir()) == ["demo", "demo-detector.pt"]  # nothing is left of the training
    assert type(YOLO(result.model)) is YOLO  # a stock detector
    content = result.model.read_bytes()
    caplog.clear()
    monkeypatch.setattr(YOLO, "train", lambda *_, **__: pytest.fail("trained again"))
    assert module.demo(project=str(folder)).folder == folder / "demo-2"
    assert f"Using {result.model}" in caplog.text and result.model.read_bytes() == content


def test_an_interrupted_training_leaves_no_detector(folder, monkeypatch):
    def interrupted(self, **_):
        raise KeyboardInterrupt

    monkeypatch.setattr(YOLO, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        own_detector(folder / "demo-detector.pt")
    assert not list(folder.iterdir())


def test_a_server_out_of_reach_is_not_asked_for_the_file(folder, monkeypatch):
    monkeypatch.delenv("YOLO_OFFLINE")
    monkeypatch.setattr(module, "is_url", lambda url, check: False)
    monkeypatch.setattr(module, "attempt_download_asset", lambda *_, **__: pytest.fail("long retries"))
    assert find_weights("yolo11n.pt") is None


def test_offline_mode_does_not_touch_the_network(folder, monkeypatch):
    assert os.environ["YOLO_OFFLINE"] == "true"
    monkeypatch.setattr(module, "is_url", lambda *_, **__: pytest.fail("asked the network"))
    assert find_weights("yolo11n.pt") is None


def test_a_download_that_fails_is_not_retried(folder, monkeypatch):
    asked = []

    def fails(file, **kwargs):
        asked.append((file, kwargs))
        raise ConnectionError("reset")

    monkeypatch.delenv("YOLO_OFFLINE")
    monkeypatch.setattr(module, "is_url", lambda url, check: True)
    monkeypatch.setattr(module, "attempt_download_asset", fails)
    assert find_weights("yolo26n.pt") is None and asked == [("yolo26n.pt", {"retry": 0})]
    monkeypatch.setattr(module, "attempt_download_asset", lambda file, **_: file)
    assert str(find_weights("yolo26n.pt")) == "yolo26n.pt"


@pytest.mark.parametrize(
    ("argument", "text"),
    [
        ("model=mine.pt", "FileNotFoundError: model='mine.pt' does not exist."),
        ("model=.", "FileNotFoundError: model='.' does not exist."),
        ("shots=0", "ValueError: 'shots=0' is an invalid value. Valid 'shots' values are between 1 and 100."),
        ("shots=two", "ValueError: 'shots=two' is an invalid value."),
        ("imgsz=big", "ValueError: 'imgsz=big' is an invalid value."),
        ("device=7", "ValueError: Invalid CUDA 'device=7' requested."),
        ("shot=3", "'shot=' is not an argument of yolo-fewshot demo. Similar: shots=."),
    ],
)
def test_invalid_arguments_are_errors_before_any_work(argument, text, folder, no_training):
    with pytest.raises(SystemExit) as e:
        cli.main(["demo", argument])
    assert str(e.value.code).startswith(text) and not list(folder.iterdir())


def test_the_shots_are_a_support_set_whose_boxes_are_those_of_the_object(folder):
    boxes = write_scenes(folder / "shots", 12, seed=0, labels=True)
    support = read_support(folder / "shots")
    assert support.names == {0: CLASS} and [len(x["cls"]) for x in support.labels] == [1] * 12
    for x, box in zip(support.labels, boxes, strict=True):
        x1, y1, x2, y2 = box / 480
        assert np.allclose(x["bboxes"], [[(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1]], atol=1e-5)
    again = write_scenes(folder / "again", 3, seed=0)
    assert np.array_equal(again, boxes[:3]) and not (folder / "again" / "labels").exists()


def test_the_count_takes_boxes_of_the_class_alone():
    names = {0: "bus", 1: CLASS}
    exact, half, far = [0, 0, 10, 10], [0, 0, 10, 5.0], [20, 20, 30, 30]

    def results(*rows):
        return Results(np.zeros((40, 40, 3), np.uint8), "", names, boxes=torch.tensor(rows).float().reshape(-1, 6))

    images = [
        results([*exact, 0.9, 1], [*far, 0.8, 1]),  # found, one false alarm
        results([*exact, 0.9, 0]),  # only seen as a bus
        results([*half, 0.9, 1]),  # IoU of 0.5 is too little
        results(),
    ]
    assert count(images, [np.array(exact)] * 4) == (1, 4, 2)
