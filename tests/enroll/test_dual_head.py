"""Enrollment in the NMS-free branch of a dual head, on a model that really detects."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from ultralytics.utils import DEFAULT_CFG
from ultralytics.utils.metrics import box_iou
from ultralytics.utils.ops import xywh2xyxy

from yolo_fewshot import FewShotYOLO
from yolo_fewshot.data.support import SupportDataset, read_support
from yolo_fewshot.nn.model import FewShotDetectionModel

pytestmark = pytest.mark.slow

SIZE, SHOTS = 64, 16  # pixels; images with a shot, four of each class


@pytest.fixture(scope="module")
def tiny(draw_tiny, tmp_path_factory):
    root = draw_tiny(tmp_path_factory.mktemp("dual"), 32)
    shots = [str(root / f"images/train/{i:02}.png") for i in range(SHOTS)]
    (root / "shots.txt").write_text("\n".join(shots))
    return root


@pytest.fixture(scope="module")
def shots(tiny):
    return read_support(tiny / "shots.txt", dict(enumerate(["blue", "green", "red", "black"])))


@pytest.fixture(scope="module")
def checkpoint(tiny):
    """A YOLO26 of 60 steps that finds the squares in both branches."""
    torch.manual_seed(0)
    model = FewShotDetectionModel(str(tiny / "yolo26n-tiny.yaml"), nc=4, verbose=False)
    model.names = dict(enumerate(["blue", "green", "red", "black"]))
    model.args = SimpleNamespace(**vars(DEFAULT_CFG))
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = 0.3  # for so few steps
    dataset = SupportDataset(read_support(tiny / "data.yaml"), SIZE)
    batch = dataset.collate_fn([dataset[i] for i in range(len(dataset))])
    batch["img"] = batch["img"].float() / 255
    model.criterion = model.init_criterion()
    model.criterion.o2m = model.criterion.o2o = 0.5
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=60)
    model.train()
    for _ in range(60):
        optimizer.zero_grad()
        (model(batch)[0].sum() / len(dataset)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10)
        optimizer.step()
        schedule.step()
    model.eval().criterion = None
    torch.save({"model": model, "train_args": {"imgsz": SIZE}}, tiny / "dual.pt")
    return tiny / "dual.pt"


@pytest.fixture(scope="module")
def enrolled(checkpoint, tiny):
    model = FewShotYOLO(checkpoint)
    model.enroll(tiny / "shots.txt", imgsz=SIZE, method="fit")
    return model


@pytest.mark.parametrize("nms", [None, False])
def test_an_object_is_detected_once_with_and_without_nms(enrolled, shots, nms):
    files = [x["im_file"] for x in shots.labels]
    found = enrolled.predict(files, imgsz=SIZE, nms=nms, conf=0.25, verbose=False)
    assert [x.boxes.cls.tolist() for x in found] == [[float(i % 4)] for i in range(SHOTS)]
    truth = xywh2xyxy(torch.cat([torch.from_numpy(x["bboxes"]) for x in shots.labels])) * SIZE
    assert box_iou(truth, torch.cat([x.boxes.xyxy for x in found])).diagonal().min() > 0.7


@pytest.mark.parametrize("nms", [{"nms": None}, {"nms": False}, {"end2end": True}])
def test_the_thresholds_of_a_prediction_are_for_its_branch(checkpoint, tiny, nms):
    by_itself, model = FewShotYOLO(checkpoint), FewShotYOLO(checkpoint)
    by_itself.enroll(tiny / "shots.txt", imgsz=SIZE, nms=nms.get("nms", False))
    image = tiny / "images/val/00.png"
    model.predict(image, support=tiny / "shots.txt", imgsz=SIZE, verbose=False, **nms)
    conf = {k: v["conf"] for k, v in model.model.enrolled.items()}
    assert conf == {k: v["conf"] for k, v in by_itself.model.enrolled.items()}
    by_itself.enroll(tiny / "shots.txt", imgsz=SIZE, nms=None if nms.get("nms", False) is False else False)
    assert conf != {k: v["conf"] for k, v in by_itself.model.enrolled.items()}
