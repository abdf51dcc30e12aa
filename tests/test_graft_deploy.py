"""A grafted detector that has learned something: its accuracy, its exports, and where this package is missing."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_deploy import FORMATS, certain, contains, float32_openvino, predict, run, same  # noqa: F401  (a fixture)
from ultralytics import YOLO

from yolo_fewshot import FewShotYOLO
from yolo_fewshot.data.demo import BASE, NOVEL

pytestmark = pytest.mark.slow
IMGSZ, CONF = 96, 0.2
QUICK = {"imgsz": IMGSZ, "workers": 0, "plots": False, "verbose": False, "batch": 8, "exist_ok": True, "fliplr": 0.0}


@pytest.fixture(scope="module")
def folder(trained, tmp_path_factory):
    """A stock detector of the base classes, and the run that grafts the novel ones onto it."""
    root = tmp_path_factory.mktemp("graft")
    FewShotYOLO(trained[1].best).fold().save(root / "stock.pt")
    yolo = YOLO(root / "stock.pt")
    run = {**QUICK, "project": str(root), "name": "graft", "steps": 100, "epochs": 2}
    yolo.train(cfg="stage3.yaml", data="fewshot-demo-novel.yaml", **run)
    return root


@pytest.fixture(scope="module")
def grafted(folder):
    return folder / "graft/weights/best.pt"


@pytest.fixture(scope="module")
def images(demo):
    """Images of novel and of base classes."""
    return [str(x) for name in ("novel_query", "val") for x in sorted((demo / "images" / name).glob("*"))[:3]]


def val(file, data):
    """Results of a model on a data set, all classes."""
    return YOLO(file).val(data=data, imgsz=IMGSZ, plots=False, verbose=False, workers=0)


def test_new_classes_are_learned_and_old_ones_stay(folder, grafted):
    before, after = (val(x, "fewshot-demo.yaml") for x in (folder / "stock.pt", grafted))
    assert before.box.map50 > 0.3
    assert after.groups["base"]["mAP50"] == pytest.approx(before.box.map50, abs=2e-3)
    assert val(grafted, "fewshot-demo-novel.yaml").groups["novel"]["mAP50"] > 0.3


@pytest.fixture(scope="module")
def expected(grafted, images):
    """What the grafted detector predicts: detections of both groups of levels."""
    found = predict(YOLO(grafted), images, conf=CONF)
    classes = torch.cat(found)[:, 5]
    assert (classes < len(BASE)).sum() > 3 and (classes >= len(BASE)).sum() > 3
    return found


def test_the_detections_of_old_classes_are_those_of_the_detector(folder, expected, images):
    old = [x[x[:, 5] < len(BASE)] for x in expected]
    before = predict(YOLO(folder / "stock.pt"), images, conf=CONF)
    contains(before, [x[x[:, 4] > CONF + 1e-4] for x in old], boxes=1e-3, scores=1e-5)


@pytest.mark.parametrize("name", FORMATS)
def test_an_exported_graft_predicts_the_same(name, grafted, images, expected, tmp_path):
    file = tmp_path / "grafted.pt"
    file.write_bytes(grafted.read_bytes())
    settings = FORMATS[name]
    if settings["format"] != "torchscript":
        pytest.importorskip({"onnx": "onnxruntime"}.get(settings["format"], settings["format"]))
    path = Path(
        YOLO(file).export(**settings, **({"conf": CONF} if "nms" in settings else {}), imgsz=IMGSZ, device="cpu")
    )
    found = predict(YOLO(path, task="detect"), images, conf=CONF)
    assert sum(map(len, certain(expected, CONF))) > 6
    contains(found, certain(expected, CONF), scores=5e-3)
    contains(expected, certain(found, CONF), scores=5e-3)


ALONE = """
import importlib.abc, sys
class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "yolo_fewshot":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
import numpy as np
from ultralytics import YOLO
size, conf, data, *images = sys.argv[1:]
model = YOLO("grafted.pt")
found = [model.predict(x, imgsz=int(size), conf=float(conf), device="cpu", verbose=False)[0].boxes.data for x in images]
np.savez("found.npz", *(x.numpy() for x in found))
print(type(model).__name__, type(model.model).__name__, len(model.names), model.model.model[-1].nl)
model.track(images[0], imgsz=int(size), device="cpu", verbose=False)
settings = {"epochs": 1, "imgsz": int(size), "batch": 8, "workers": 0, "plots": False, "device": "cpu", "val": False}
model.train(data=data, project="runs", fraction=0.05, **settings)
print("trained", model.model.model[-1].nl, model.trainer.last.exists())
print("missing", [x for x in sys.modules if x.partition(".")[0] == "yolo_fewshot"])
"""


def test_a_graft_predicts_tracks_and_trains_where_this_package_is_missing(grafted, demo, images, expected, tmp_path):
    (tmp_path / "grafted.pt").write_bytes(grafted.read_bytes())
    names = ", ".join((*BASE, *NOVEL))
    data = f"path: {demo}\ntrain: images/train\nval: images/val\nnames: [{names}]\n"
    (tmp_path / "data.yaml").write_text(data)
    command = [sys.executable, "-c", ALONE, IMGSZ, CONF, tmp_path / "data.yaml", *images]
    done = run(command, tmp_path, YOLO_FEWSHOT_DISABLE="1")
    assert done.returncode == 0, done.stderr
    lines = [x for x in done.stdout.splitlines() if x.startswith(("YOLO ", "trained ", "missing "))]
    assert lines == [f"YOLO DetectionModel {len(BASE) + len(NOVEL)} 6", "trained 6 True", "missing []"]
    found = np.load(tmp_path / "found.npz")
    same([torch.from_numpy(found[f"arr_{i}"]) for i in range(len(images))], expected, boxes=2e-3, scores=1e-4)


def test_yolo_grafts_from_another_folder(folder, tmp_path):
    (tmp_path / "stock.pt").write_bytes((folder / "stock.pt").read_bytes())
    command = [
        "train",
        "model=stock.pt",
        "cfg=stage3.yaml",
        "graft=head",
        "steps=2",
        "epochs=1",
        "batch=2",
        "workers=0",
    ]
    yolo = Path(sys.executable).with_name("yolo")
    done = run([yolo, *command, f"imgsz={IMGSZ}", "plots=False", f"project={tmp_path}", "name=x"], tmp_path)
    assert done.returncode == 0, done.stderr
    text = done.stdout + done.stderr
    assert "23 of 24 layers are shared with the model" in text and "2 steps on 12 support images" in text
    assert len(YOLO(tmp_path / "x/weights/best.pt").names) == len(BASE) + len(NOVEL)
