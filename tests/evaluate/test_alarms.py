import itertools
import math
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionPredictor
from ultralytics.utils import nms

from yolo_fewshot.evaluate.alarms import false_alarms


@pytest.fixture(scope="module")
def detector(tmp_path_factory, draw_tiny):
    """An untrained model that finds something in every image."""
    torch.manual_seed(0)
    yolo = YOLO(draw_tiny(tmp_path_factory.mktemp("alarms"), 1) / "yolo11n-tiny.yaml")
    yolo.model.model[-1].prototypes.bias.data[:] = 1.0  # which is the logit of all, and the first class wins
    yolo.model.names = {i: f"c{i}" for i in range(yolo.model.model[-1].nc)}
    return yolo


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Images of several sizes."""
    root, rng, files = tmp_path_factory.mktemp("plain"), np.random.default_rng(0), []
    for i, size in enumerate([(64, 64), (64, 48), (40, 64), (50, 50)]):
        files.append(str(root / f"{i}.png"))
        cv2.imwrite(files[-1], rng.integers(0, 256, (*size, 3), dtype=np.uint8))
    return files


@pytest.fixture
def batches(monkeypatch):
    """Sizes of the batches that are predicted."""
    sizes, inference = [], DetectionPredictor.inference

    def spy(self, im, *args, **kwargs):
        sizes.append(len(im))
        return inference(self, im, *args, **kwargs)

    monkeypatch.setattr(DetectionPredictor, "inference", spy)
    return sizes


def test_one_image_is_held_at_a_time_and_a_slow_machine_loses_no_alarm(detector, images, batches, monkeypatch):
    """The count is that of Ultralytics for all images at once, whose NMS has a time limit for a batch."""
    results = detector.predict(images, imgsz=64, conf=0.5, max_det=1000, verbose=False)
    found = [len(x.boxes) for x in results]
    assert batches == [4] and min(found) > 1
    batches.clear()
    clock = itertools.count(0, 60)
    monkeypatch.setattr(nms, "time", SimpleNamespace(time=lambda: next(clock)))
    assert false_alarms(detector, images, ("c0",), imgsz=64) == sum(found) / 4
    assert batches == [1] * 4
    detector.model.enrolled = {"c0": {"conf": 0.8}}  # above the confidence of all
    assert false_alarms(detector, images, ("c0", "c1"), imgsz=64) == 0


def test_without_images_there_is_no_rate(detector):
    assert math.isnan(false_alarms(detector, [], ("c0",)))
