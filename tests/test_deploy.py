"""What leaves the project: exported models and folded checkpoints, in this process, in others, and by `yolo`."""

import contextlib
import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou
from ultralytics import YOLO
from ultralytics.nn.modules.head import Detect
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import ROOT, YAML

from yolo_fewshot import FewShotYOLO
from yolo_fewshot.data.demo import BASE, NOVEL
from yolo_fewshot.nn.model import FewShotDetectionModel

pytestmark = pytest.mark.slow

IMGSZ = 96


@pytest.fixture(scope="module")
def images(demo):
    """Images of novel classes and of base classes."""
    return [*sorted((demo / "images/novel_query").glob("*.jpg"))[:6], *sorted((demo / "images/val").glob("*.jpg"))[:4]]


def predict(model, images, **kwargs):
    """Boxes, confidence and class of the detections of every image."""
    settings = {"imgsz": IMGSZ, "verbose": False, "device": "cpu", **kwargs}
    results = [
        model.predict(x, **settings)[0] for x in images
    ]  # older Ultralytics gives an export all of a list at once
    return [r.boxes.data.float().cpu() for r in results]


@pytest.fixture(scope="module")
def conf(enrolled, images):
    """A confidence threshold to which no score is near, so that rounding changes no number of detections."""
    scores = torch.cat(predict(FewShotYOLO(enrolled), images, conf=0.05))[:, 4]
    scores = scores[scores < 0.15].sort()[0]
    gap = scores.diff()
    return round(float(scores[gap.argmax()] + gap.max() / 2), 4)


@pytest.fixture(scope="module")
def expected(enrolled, images, conf):
    """What the few-shot model itself predicts."""
    found = predict(FewShotYOLO(enrolled), images, conf=conf)
    classes = torch.cat(found)[:, 5]
    assert sum(len(x) > 0 for x in found) >= 8 and (classes < 24).sum() >= 5 and (classes >= 24).sum() >= 15
    return found


def same(found, expected, boxes=0.5, scores=1e-3):
    """Whether two predictions have the same detections; those that are equally confident may come in any order."""
    assert [len(x) for x in found] == [len(x) for x in expected]
    contains(found, expected, boxes, scores)


def contains(found, expected, boxes=0.5, scores=1e-3):
    """Whether all expected detections were found, each by one of its own."""
    for a, b in zip(found, expected):
        free = torch.ones(len(a), dtype=torch.bool)
        for row in b:
            fits = (a[:, :4] - row[:4]).abs().amax(1).le(boxes) & (a[:, 4] - row[4]).abs().le(scores)
            fits &= (a[:, 5] == row[5]) & free
            assert fits.any(), f"no detection like {row} in {a}"
            free[fits.nonzero()[0]] = False


def certain(found, conf, iou=0.7, margin=0.03):
    """Detections without those of which rounding decides whether they pass the confidence threshold and NMS."""
    kept = []
    for x in found:
        near = (box_iou(x[:, :4], x[:, :4]) - iou).abs() < margin
        near &= (x[:, None, 5] == x[None, :, 5]) & (x[:, None, 4] < x[None, :, 4])
        kept.append(x[~near.any(1) & (x[:, 4] > conf + 0.01)])
    return kept


FORMATS = {
    "torchscript": {"format": "torchscript"},
    "onnx": {"format": "onnx"},
    "onnx-nms": {"format": "onnx", "nms": True, "iou": 0.7},
    "onnx-fp16": {"format": "onnx", "quantize": 16},
    "openvino": {"format": "openvino"},
}


@pytest.fixture(scope="module", params=FORMATS)
def exported(request, enrolled, conf, tmp_path_factory):
    """The name of an export, the file, and the model that it was made from."""
    settings = FORMATS[request.param]
    if settings["format"] != "torchscript":
        pytest.importorskip({"onnx": "onnxruntime"}.get(settings["format"], settings["format"]))
    file = tmp_path_factory.mktemp("export") / "site.pt"
    shutil.copy(enrolled, file)
    model = FewShotYOLO(file)
    nms = {"conf": conf} if "nms" in settings else {}
    return request.param, Path(model.export(**settings, **nms, imgsz=IMGSZ, device="cpu")), model


@pytest.fixture(autouse=True)
def float32_openvino(monkeypatch):
    """OpenVINO computes in bfloat16 where the processor can; that is not what is tested here."""
    with contextlib.suppress(ImportError):
        import openvino

        stock = openvino.Core.compile_model

        def compile_model(self, model, device_name="CPU", config=None):
            return stock(self, model, device_name, {**(config or {}), "INFERENCE_PRECISION_HINT": "f32"})

        monkeypatch.setattr(openvino.Core, "compile_model", compile_model)


def test_an_exported_model_predicts_the_same(exported, images, expected, conf):
    name, path, _ = exported
    model = YOLO(path, task="detect")
    assert type(model) is YOLO
    found = predict(model, images, conf=conf)
    if "fp16" in name:
        assert sum(map(len, certain(expected, conf))) > 20
        contains(found, certain(expected, conf), scores=5e-3)
        contains(expected, certain(found, conf), scores=5e-3)
    else:
        same(found, expected)


def metadata(path):
    """What an exported model says of itself."""
    if path.is_dir():
        return YAML.load(path / "metadata.yaml")
    if path.suffix == ".torchscript":
        extra = {"config.txt": ""}
        torch.jit.load(path, _extra_files=extra)
        return json.loads(extra["config.txt"])
    import onnx

    return {x.key: x.value for x in onnx.load(path).metadata_props}


def test_an_exported_model_is_a_stock_detector_that_knows_the_new_names(exported, images, conf):
    _, path, _ = exported
    model = YOLO(path, task="detect")
    found = torch.cat(predict(model, images, conf=conf))
    assert list(model.names.values()) == [*BASE, *NOVEL]
    assert {model.names[int(c)] for c in found[:, 5]} & set(NOVEL)
    assert metadata(path)["head"] == "Detect" and metadata(path)["task"] == "detect"
    for file in path.rglob("*") if path.is_dir() else (path,):
        assert b"yolo_fewshot" not in file.read_bytes() and b"rototypes" not in file.read_bytes()


def test_exporting_leaves_the_model_as_it_is(exported, enrolled, images, expected, conf):
    _, _, model = exported
    assert type(model.model) is FewShotDetectionModel and not model.model.is_fused()
    before, after = FewShotYOLO(enrolled).model.state_dict(), model.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    same(predict(model, images, conf=conf), expected, boxes=0, scores=0)


def test_a_dynamic_export_takes_other_sizes_and_batches(enrolled, images, expected, conf, tmp_path):
    pytest.importorskip("onnxruntime")
    shutil.copy(enrolled, tmp_path / "site.pt")
    model = FewShotYOLO(tmp_path / "site.pt")
    exported = YOLO(model.export(format="onnx", dynamic=True, imgsz=IMGSZ), task="detect")
    same(predict(exported, images, conf=conf), expected)
    settings = {"imgsz": 128, "conf": 0.2, "batch": 3}
    expected = predict(model, images, **settings)
    assert sum(map(len, expected)) > 10
    same(predict(exported, images, **settings), expected)


def test_a_failing_export_gives_the_model_back(enrolled):
    model = FewShotYOLO(enrolled)
    network = model.model
    with pytest.raises(ValueError, match="Invalid export format"):
        model.export(format="zzzzzz")
    assert model.model is network


def test_a_model_is_enrolled_and_exported_in_one_call(trained, enrolled, tmp_path):
    pytest.importorskip("onnxruntime")
    shutil.copy(trained[1].best, tmp_path / "best.pt")
    model = FewShotYOLO(tmp_path / "best.pt")
    path = Path(model.export(format="onnx", support="fewshot-demo-novel.yaml", enroll="mean", imgsz=IMGSZ))
    assert path == tmp_path / "best.onnx" and list(YOLO(path, task="detect").names.values()) == [*BASE, *NOVEL]
    assert {x["method"] for x in model.model.enrolled.values()} == {"mean"} and len(model.model.enrolled) == 8
    with pytest.raises(TypeError, match=r"is an exported model .* Enroll, then export"):
        YOLO(path, task="detect").predict(np.zeros((96, 96, 3), np.uint8), support="fewshot-demo-novel.yaml")


# Other processes ------------------------------------------------------------------------------------------------------

ALONE = """
import importlib.abc, sys
class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "yolo_fewshot":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
import numpy as np
from ultralytics import YOLO
model = YOLO("folded.pt")
results = model.predict(sys.argv[3:], imgsz=int(sys.argv[1]), conf=float(sys.argv[2]), device="cpu", verbose=False)
np.savez("found.npz", *(r.boxes.data.numpy() for r in results))
network = model.model
print(type(model).__name__, type(network).__name__, type(network.model[-1]).__name__, ",".join(model.names.values()))
try:
    import yolo_fewshot
except ModuleNotFoundError:
    print("missing", [x for x in sys.modules if x.partition(".")[0] == "yolo_fewshot"])
"""


def run(command, cwd, **env):
    """Run a command without the environment's PYTHONPATH and the like."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")} | {"OMP_NUM_THREADS": "1", **env}
    return subprocess.run(
        [str(c) for c in command], cwd=cwd, env=variables, capture_output=True, text=True, timeout=400
    )


def test_a_folded_model_predicts_the_same_where_this_package_is_missing(enrolled, images, expected, conf, tmp_path):
    model = FewShotYOLO(enrolled).fold()
    assert type(model.model) is DetectionModel and type(model.model.model[-1]) is Detect
    model.save(tmp_path / "folded.pt")
    done = run(
        [sys.executable, "-c", ALONE, IMGSZ, conf, *images],
        tmp_path,
        YOLO_FEWSHOT_DISABLE="1",
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.strip().splitlines()[-2:]
    assert first == f"YOLO DetectionModel Detect {','.join((*BASE, *NOVEL))}" and second == "missing []"
    found = np.load(tmp_path / "found.npz")
    found = [torch.from_numpy(found[f"arr_{i}"]) for i in range(len(expected))]
    same(found, expected, boxes=2e-3, scores=1e-4)


@pytest.fixture(scope="module")
def site(trained, images, demo, tmp_path_factory):
    """A folder with a checkpoint, a support set, data to validate on, images, and a stock model."""
    root = tmp_path_factory.mktemp("site")
    shutil.copy(trained[1].best, root / "best.pt")
    (root / "val.txt").write_text("\n".join(map(str, images)))
    names = dict(enumerate((*BASE, *NOVEL)))
    YAML.save(root / "shots.yaml", {"path": str(demo), "train": "novel_5shot.txt", "names": names})
    YAML.save(root / "all.yaml", {"path": str(root), "train": "val.txt", "val": "val.txt", "names": names})
    (root / "frames").mkdir()
    for i in range(3):  # nothing moves
        shutil.copy(images[0], root / f"frames/{i}.jpg")
    thresholds = {"track_high_thresh": 0.02, "track_low_thresh": 0.01, "new_track_thresh": 0.02, "fuse_score": False}
    YAML.save(root / "tracker.yaml", {**YAML.load(ROOT / "cfg/trackers/bytetrack.yaml"), **thresholds})
    stock = YOLO("yolo11n.yaml")
    stock.model.names.update(enumerate(BASE))
    stock.save(root / "stock.pt")
    return root


def yolo(site, *args):
    """Run the `yolo` command, and return all that it printed."""
    script = Path(sys.executable).with_name("yolo.exe" if os.name == "nt" else "yolo")
    settings = () if args[0] == "export" else (f"project={site}/runs", "exist_ok=True")
    done = run([script, *args, f"imgsz={IMGSZ}", "device=cpu", *settings], site)
    return done.returncode, done.stdout + done.stderr


def names_found(text, image):
    """The class names in the line of an image."""
    (line,) = (x for x in text.splitlines() if image in x and x.startswith(("image ", "video ")))
    return {name for name in (*BASE, *NOVEL) if f" {name}" in line}


def test_yolo_predicts_with_a_support_set(site, enrolled, conf):
    code, text = yolo(site, "predict", "model=best.pt", "source=frames", "support=shots.yaml", f"conf={conf}", "name=p")
    assert code == 0, text
    for name in NOVEL:
        assert f"{name:>22}{5:>11}{'fit':>11}" in text
    expected = FewShotYOLO(enrolled).predict(site / "frames/0.jpg", imgsz=IMGSZ, conf=conf, verbose=False)[0]
    assert names_found(text, "0.jpg") == {expected.names[int(c)] for c in expected.boxes.cls} and len(expected)
    assert len(list((site / "runs/p").glob("*.jpg"))) == 3


def test_yolo_tracks_with_a_support_set(site):
    args = ("model=best.pt", "source=frames", "support=shots.yaml", "enroll=mean", "save_txt=True", "name=t")
    args = (*args, "tracker=tracker.yaml")
    code, text = yolo(site, "track", *args, "conf=0.01")  # means alone score low with this weak model
    assert code == 0, text
    assert f"{NOVEL[0]:>22}{5:>11}{'mean':>11}" in text
    lines = [x.split() for f in sorted((site / "runs/t/labels").glob("*.txt")) for x in f.read_text().splitlines()]
    assert lines and all(len(x) == 6 for x in lines) and {int(x[0]) for x in lines} & set(range(24, 32))


def test_yolo_validates_with_a_support_set(site):
    code, text = yolo(site, "val", "model=best.pt", "data=all.yaml", "support=shots.yaml", "name=v", "plots=False")
    assert code == 0, text
    with open(site / "runs/v/base_novel.csv") as f:
        rows = {x["group"]: x for x in csv.DictReader(f)}
    assert list(rows) == ["base", "novel", "harmonic mean"]
    assert int(rows["base"]["images"]) == 4 and int(rows["novel"]["images"]) == 6
    assert 0.1 < float(rows["novel"]["mAP50"]) <= 1 and 0.1 < float(rows["base"]["mAP50"]) <= 1


def test_yolo_exports_with_a_support_set(site):
    pytest.importorskip("onnxruntime")
    code, text = yolo(site, "export", "model=best.pt", "format=onnx", "support=shots.yaml")
    assert code == 0, text
    code, text = yolo(site, "predict", "model=best.onnx", "source=frames", "conf=0.02", "name=o")
    assert code == 0, text
    assert names_found(text, "0.jpg") & set(NOVEL)


def test_yolo_enrolls_into_a_stock_model(site):
    args = ("model=stock.pt", "support=shots.yaml", "enroll=fit")
    code, text = yolo(site, "predict", *args, "source=frames", "name=s")
    assert code == 0, text
    for name in NOVEL:
        assert f"{name:>22}{5:>11}{'fit':>11}" in text
    assert (site / "runs/s/support_check.png").exists()


def test_yolo_refuses_a_support_set_for_a_model_without_class_rows(site):
    YOLO("yolo11n-cls.yaml").save(site / "classify.pt")
    code, text = yolo(site, "predict", "model=classify.pt", "source=frames", "support=shots.yaml", "name=c")
    assert code != 0
    last = text.strip().splitlines()[-1]
    assert last.startswith(
        "TypeError: model='classify.pt': A Classify head has no row for each class. 'support=shots.yaml' needs a YOLO"
    )
    assert not (site / "runs/c").exists()
