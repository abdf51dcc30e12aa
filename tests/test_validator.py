import cv2
import numpy as np
import pytest
import torch
from ultralytics.models.yolo.detect import DetectionValidator

from yolo_fewshot import FewShotYOLO


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two pictures; a square and a disc in each, under two orders of the class names."""
    root = tmp_path_factory.mktemp("val")
    (root / "images").mkdir()
    for order in ("ab", "ba"):
        (root / order).mkdir()
    for i in range(2):
        picture = np.full((96, 96, 3), 200, dtype=np.uint8)
        cv2.rectangle(picture, (10, 10), (40, 40), (0, 0, 255), -1)
        cv2.circle(picture, (70, 65), 18, (255, 0, 0), -1)
        boxes = ["0.26 0.26 0.31 0.31", "0.73 0.68 0.375 0.375"]
        for order, cls in (("ab", (0, 1)), ("ba", (1, 0))):
            (root / order / "images").mkdir(exist_ok=True)
            (root / order / "labels").mkdir(exist_ok=True)
            cv2.imwrite(str(root / order / f"images/{i}.png"), picture)
            (root / order / f"labels/{i}.txt").write_text("\n".join(f"{c} {b}" for c, b in zip(cls, boxes)))
    for order, names in (("ab", "[square, disc]"), ("ba", "[disc, square]"), ("unknown", "[square, bird]")):
        folder = "ba" if order == "ba" else "ab"
        text = f"train: {root / folder}/images\nval: {root / folder}/images\nnames: {names}\n"
        (root / f"{order}.yaml").write_text(text)
    return root


@pytest.fixture(scope="module")
def model(data):
    torch.manual_seed(0)
    model = FewShotYOLO("fewshot.yaml")
    model.model.names = {i: f"base{i}" for i in range(80)}
    model.enroll(data / "ab.yaml", imgsz=96)
    return model


def true_labels(model, yaml, validator=None):
    seen = []

    class Spy(validator or model._smart_load("validator")):
        def update_metrics(self, preds, batch):
            seen.extend(batch["cls"].view(-1).tolist())
            super().update_metrics(preds, batch)

    model.val(validator=Spy, data=str(yaml), imgsz=96, workers=0, plots=False, verbose=False)
    return seen


def test_labels_are_matched_by_name(model, data):
    assert model.names[80] == "square" and model.names[81] == "disc"
    assert true_labels(model, data / "ab.yaml") == [80, 81] * 2
    assert true_labels(model, data / "ba.yaml") == [80, 81] * 2
    assert true_labels(model, data / "ba.yaml", DetectionValidator) == [1, 0] * 2  # what stock would compare with


def test_results_do_not_depend_on_the_order_of_the_data(model, data):
    a, b = (
        model.val(data=str(data / f"{o}.yaml"), imgsz=96, workers=0, plots=False).results_dict for o in ("ab", "ba")
    )
    assert a == b


def test_unknown_classes_are_an_error_that_says_what_to_do(model, data):
    with pytest.raises(ValueError, match=r"show bird, which the model does not know\. Enroll"):
        model.val(data=str(data / "unknown.yaml"), imgsz=96, workers=0, plots=False)
