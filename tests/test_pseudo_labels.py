"""Pseudo-labels, from detections that the tests prescribe, and from a real detector."""

import logging
import shutil
from pathlib import Path
from typing import ClassVar

import cv2
import numpy as np
import pytest
import torch
from ultralytics.data.utils import check_det_dataset
from ultralytics.engine.results import Results
from ultralytics.utils import YAML

from yolo_fewshot import pseudo_labels
from yolo_fewshot.data.demo import draw_scene
from yolo_fewshot.pseudo_labels import pseudo_label

NAMES = {0: "person", 80: "kite surfer", 81: "scooter"}  # of the model
LEFT, RIGHT, RIGHT_TOO = (0, 0, 30, 30), (50, 20, 90, 60), (52, 20, 90, 60)  # corners in images of 100 x 80 pixels
SCOOTER_LEFT, SURFER_RIGHT = "1 0.150000 0.187500 0.300000 0.375000\n", "0 0.700000 0.500000 0.400000 0.500000\n"


class Detector:
    """Finds in each image what is prescribed for the brightness of its pixels."""

    task = "detect"
    names = NAMES
    found: ClassVar[dict[int, list[tuple]]] = {}
    calls: ClassVar[list[dict]] = []

    def __init__(self, model):
        self.model = model

    def predict(self, file, **kwargs):
        self.calls.append(kwargs)
        image = cv2.imread(file)
        rows = [[*box, p, c] for box, p, c in self.found[int(image.mean())] if p >= kwargs["conf"]]
        rows = [x for x in rows if x[5] in kwargs["classes"]]
        boxes = torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)
        return [Results(image, file, NAMES, boxes)]


def write(file: Path, brightness: int) -> Path:
    """Write an image of one color."""
    file.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(file), np.full((80, 100, 3), brightness, np.uint8))
    return file


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder with a checkpoint, shots, and ten unlabeled images of brightness 10 to 100; no detections yet."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pseudo_labels, "FewShotYOLO", Detector)
    monkeypatch.setattr(Detector, "found", {10 * i: [] for i in range(1, 11)})
    monkeypatch.setattr(Detector, "calls", [])
    (tmp_path / "best.pt").touch()
    write(tmp_path / "photos" / "images" / "1.png", 255)
    write(tmp_path / "photos" / "val" / "2.png", 254)
    content = {"train": "photos/images", "val": "photos/val", "names": {0: "kite surfer", 1: "scooter"}}
    YAML.save(tmp_path / "shots.yaml", content)
    for i in range(1, 11):
        write(tmp_path / "unlabeled" / f"{i:02}.png", 10 * i)
    return tmp_path


def run(**kwargs):
    """Label with the files of the site."""
    return pseudo_label(**{"model": "best.pt", "data": "shots.yaml", "source": "unlabeled", "out": "more"} | kwargs)


def labels(root: Path) -> dict[str, str]:
    """Text of the label file of each image of the new folder."""
    assert sorted(x.stem for x in (root / "images").iterdir()) == sorted(x.stem for x in (root / "check").iterdir())
    files = sorted((root / "images").iterdir())
    return {x.name: (root / "labels" / f"{x.stem}.txt").read_text() for x in files}


def test_the_most_confident_images_of_each_class_get_labels_with_the_numbers_of_the_shots(site):
    Detector.found |= {
        10: [(LEFT, 0.6, 81)],
        20: [(LEFT, 0.7, 81)],
        30: [(LEFT, 0.8, 81)],
        40: [(RIGHT, 0.55, 80)],
        50: [(RIGHT, 0.49, 80)],
    }
    assert run(top=2) == site / "more" / "data.yaml"
    assert labels(site / "more") == {"02.png": SCOOTER_LEFT, "03.png": SCOOTER_LEFT, "04.png": SURFER_RIGHT}
    assert all(x.resolve() == site / "unlabeled" / x.name for x in (site / "more" / "images").iterdir())


def test_a_chosen_image_gets_all_its_objects_above_the_lower_confidence_and_one_class_for_each(site):
    weak = (0, 50, 20, 80)
    Detector.found |= {10: [(LEFT, 0.9, 81), (RIGHT, 0.31, 80), (RIGHT_TOO, 0.3, 81), (weak, 0.29, 80)]}
    run()
    assert labels(site / "more") == {"01.png": SCOOTER_LEFT + SURFER_RIGHT}


def test_an_image_is_not_chosen_for_the_class_that_another_box_of_the_object_is_surer_of(site):
    Detector.found |= {10: [(RIGHT, 0.7, 80), (RIGHT_TOO, 0.6, 81)], 20: [(LEFT, 0.55, 81)]}
    run(top=1)
    assert labels(site / "more") == {"01.png": SURFER_RIGHT, "02.png": SCOOTER_LEFT}


def test_a_lower_conf_chooses_and_labels_more(site):
    Detector.found |= {10: [(LEFT, 0.2, 81)], 20: [(LEFT, 0.1, 81)]}
    run(conf=0.15)
    assert labels(site / "more") == {"01.png": SCOOTER_LEFT}


def test_only_the_classes_of_the_shots_are_looked_for_with_the_settings_given(site):
    Detector.found |= {10: [(LEFT, 0.9, 81), (RIGHT, 0.9, 0)]}
    run(imgsz=96, device="cpu")
    assert labels(site / "more") == {"01.png": SCOOTER_LEFT}
    assert Detector.calls[0] == {"conf": 0.3, "classes": [80, 81], "device": "cpu", "verbose": False, "imgsz": 96}
    assert len(Detector.calls) == 10


def test_the_new_data_set_has_the_shots_and_the_new_images(site):
    Detector.found |= {10: [(LEFT, 0.9, 81)]}
    info = check_det_dataset(run())
    assert info["train"] == [str(site / "photos" / "images"), str(site / "more" / "images")]
    assert info["val"] == [str(site / "photos" / "val")] and info["names"] == {0: "kite surfer", 1: "scooter"}


def test_other_keys_of_the_shots_stay(site):
    YAML.save(
        "shots.yaml", YAML.load("shots.yaml") | {"path": str(site), "fewshot": {"ignore": "ignore"}, "channels": 3}
    )
    Detector.found |= {10: [(LEFT, 0.9, 81)]}
    content = YAML.load(run())
    assert content["fewshot"] == {"ignore": "ignore"} and content["channels"] == 3 and "path" not in content


def test_classes_that_the_shots_only_count_get_names(site, monkeypatch):
    YAML.save("shots.yaml", {"train": "photos/images", "val": "photos/val", "nc": 1})
    monkeypatch.setattr(Detector, "names", {0: "person", 1: "class_0"})
    Detector.found |= {10: [(LEFT, 0.9, 1)]}
    assert check_det_dataset(run())["names"] == {0: "class_0"}


@pytest.mark.parametrize("labeled", ["photos/images/1.png", "photos/val/2.png"])
def test_copies_of_labeled_images_are_left_out(site, labeled, caplog):
    shutil.copy(labeled, "unlabeled/copy.png")
    Detector.found |= {10: [(LEFT, 0.9, 81)], 255: [(LEFT, 0.9, 81)], 254: [(LEFT, 0.9, 81)]}
    run()
    assert list(labels(site / "more")) == ["01.png"]
    assert "1 images are also those of the data.yaml, and left out" in caplog.text and "copy.png" in caplog.text


def test_a_split_that_is_not_there_is_no_error(site):
    content = YAML.load("shots.yaml")
    YAML.save("shots.yaml", {**content, "test": "photos/test"})
    Detector.found[10] = [(LEFT, 0.9, 81)]
    run()
    assert list(labels(site / "more")) == ["01.png"]


def test_copies_of_each_other_count_once(site, caplog):
    shutil.copy("unlabeled/01.png", "unlabeled/00.png")
    Detector.found |= {10: [(LEFT, 0.9, 81)]}
    run()
    assert list(labels(site / "more")) == ["00.png"] and "left out" not in caplog.text


def test_images_of_the_same_name_have_different_ones(site):
    write(site / "unlabeled" / "sub" / "01.jpg", 20)
    Detector.found |= {10: [(LEFT, 0.9, 81)], 20: [(RIGHT, 0.9, 80)]}
    run()
    assert labels(site / "more") == {"01.png": SCOOTER_LEFT, "01_2.jpg": SURFER_RIGHT, "02.png": SURFER_RIGHT}


def test_a_class_that_the_model_does_not_know_is_named(site, caplog):
    YAML.save("shots.yaml", YAML.load("shots.yaml") | {"names": {0: "kite surfer", 1: "scooter", 2: "drone"}})
    Detector.found |= {10: [(LEFT, 0.9, 81)]}
    run()
    assert "does not know drone" in caplog.text
    YAML.save("shots.yaml", YAML.load("shots.yaml") | {"names": {0: "drone"}})
    with pytest.raises(ValueError, match=r"knows no class of shots.yaml \(drone\). Give the model that was trained on"):
        run(out="again")


def test_nothing_is_written_where_nothing_is_found(site):
    Detector.found |= {10: [(LEFT, 0.4, 81)]}
    with pytest.raises(ValueError, match=r"finds no object of kite surfer, scooter above a confidence of 0\.5 in 10"):
        run()
    assert not list(site.glob("more*"))


def test_a_failure_leaves_nothing_half_written(site, monkeypatch):
    Detector.found |= {10: [(LEFT, 0.9, 81)]}
    monkeypatch.setattr(pseudo_labels.YAML, "save", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        run()
    assert not list(site.glob("more*"))


@pytest.mark.parametrize(
    ("changed", "error", "text"),
    [
        ({"conf": 0}, ValueError, "'conf=0' is an invalid value. It must be between 0 and 1"),
        ({"conf": "high"}, ValueError, "'conf=high' is an invalid value"),
        ({"top": 0}, ValueError, "'top=0' is an invalid value. It must be an int of at least 1"),
        ({"top": 2.5}, ValueError, "'top=2.5' is an invalid value"),
        ({"model": "none.pt"}, FileNotFoundError, "'model=none.pt' does not exist"),
        ({"data": "shots.txt"}, ValueError, "'data=shots.txt' is an invalid value. It must be a *.yaml file"),
        ({"data": "none.yaml"}, FileNotFoundError, "none.yaml"),
        ({"source": "none"}, FileNotFoundError, "source='none' does not exist"),
        ({"source": "best.pt"}, ValueError, "source='best.pt' has no images"),
        ({"source": "photos"}, ValueError, "All images of source= are also those of the data.yaml"),
        ({"out": "photos"}, ValueError, "'out=photos' exists and is not empty"),
        ({"out": "no/more"}, FileNotFoundError, "'out=no/more' is in a folder that does not exist"),
    ],
)
def test_bad_input_is_named_before_any_image_is_looked_at(site, changed, error, text):
    before = sorted(site.rglob("*"))
    with pytest.raises(error) as e:
        run(**changed)
    assert text in str(e.value)
    assert Detector.calls == [] and sorted(x for x in site.rglob("*") if x.suffix != ".cache") == before


def test_a_model_of_another_task_is_refused(site, monkeypatch):
    monkeypatch.setattr(Detector, "task", "classify")
    with pytest.raises(TypeError, match=r"is a model for task 'classify'\. It must be a detector"):
        run()


def test_a_data_yaml_without_a_val_split_is_refused(site):
    YAML.save("shots.yaml", {"train": "photos/images", "names": {0: "scooter"}})
    with pytest.raises(ValueError, match="It needs all of 'train:', 'val:' and 'names:'"):
        run()


def test_a_real_detector_labels_new_scenes_of_its_classes(enrolled, demo, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    rng, truth = np.random.default_rng(3), {}
    (tmp_path / "unlabeled").mkdir()
    for i in range(12):
        image, boxes = draw_scene(["hourglass", "star"], rng)
        assert cv2.imwrite(str(tmp_path / "unlabeled" / f"{i}.png"), image)
        truth[f"{i}.txt"] = boxes[0] / 160
    file = pseudo_label(
        enrolled, "fewshot-demo-novel.yaml", tmp_path / "unlabeled", tmp_path / "more", conf=0.1, imgsz=96
    )
    hourglass = next(i for i, n in check_det_dataset(file)["names"].items() if n == "hourglass")
    right = 0
    for x in (tmp_path / "more" / "labels").iterdir():
        for line in x.read_text().splitlines():
            c, cx, cy = map(float, line.split()[:3])
            x1, y1, x2, y2 = truth[x.name]
            right += c == hourglass and x1 < cx < x2 and y1 < cy < y2
    assert right >= 3
    assert f"train again from the same model as before, with data={file}" in caplog.text
