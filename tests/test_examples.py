import json
import runpy
import shutil
import sys
from importlib import import_module
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from ultralytics import YOLO
from ultralytics.data.utils import check_det_dataset
from ultralytics.engine.tuner import Tuner
from ultralytics.utils import ROOT, YAML

from yolo_fewshot import FewShotTrainer, FewShotYOLO

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[1] / "examples"
QUICK = {"imgsz": 64, "epochs": 1, "episodes": 2, "n_way": 2, "workers": 0}


@pytest.fixture(scope="module")
def base(draw_tiny, tmp_path_factory):
    return draw_tiny(tmp_path_factory.mktemp("base") / "data", 24)


@pytest.fixture(scope="module")
def novel(base):
    data = YAML.load(base / "data.yaml")
    folder = base.with_name("novel")
    shutil.copytree(base, folder)
    YAML.save(folder / "data.yaml", {**data, "names": ["w", "x", "y", "z"]})
    return folder


@pytest.fixture
def example(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)
    return import_module


def test_add_classes(tmp_path, capsys, monkeypatch):
    torch.manual_seed(0)
    model = YOLO("fewshot.yaml")
    data = check_det_dataset("fewshot-demo.yaml")
    model.model.names = {i: data["names"].get(i, f"class {i}") for i in range(80)}
    model.ckpt = {"train_args": {"imgsz": 64}}
    model.save(tmp_path / "base.pt")
    monkeypatch.setattr(sys, "argv", ["add_classes.py", str(tmp_path / "base.pt"), "fewshot-demo-novel.yaml"])
    runpy.run_path(str(EXAMPLES / "add_classes.py"), run_name="__main__")
    assert "with 40 shots of 8 classes" in capsys.readouterr().out


def test_the_full_path(example, base, novel, capsys, tmp_path):
    runs = {"project": str(tmp_path), "name": "run", "steps": 2}
    found = example("full_path").main(str(base / "data.yaml"), str(novel / "data.yaml"), **QUICK, **runs)
    assert list(found) == ["base training, enrolled", "episodes, enrolled", "grafted", "grafted, ONNX"]
    assert found["grafted, ONNX"] == pytest.approx(found["grafted"], abs=1e-3)
    grafted = FewShotYOLO(tmp_path / "run-3" / "weights" / "best.pt")
    assert list(grafted.names.values()) == ["blue", "green", "red", "black", "w", "x", "y", "z"]
    assert (tmp_path / "run-3" / "weights" / "best.onnx").exists()
    assert "grafted, ONNX             novel mAP50 0." in capsys.readouterr().out


def test_splits_of_yolo_folders_and_of_a_coco_json_are_the_same(example, base, tmp_path):
    my_data, data = example("my_data"), str(base / "data.yaml")
    one = my_data.main(data, "red", out=str(tmp_path / "a"))
    train, val = (my_data.to_coco(data, k, tmp_path / f"{k}.json") for k in ("train", "val"))
    keys = {"val": str(val), "images": str(base / "images/train"), "val_images": str(base / "images/val")}
    other = my_data.main(str(train), "red", out=str(tmp_path / "b"), **keys)
    for k in (1, 5):
        found = [shots(folder / f"novel_{k}shot_seed0.yaml") for folder in (one, other)]
        assert list(found[0]) == list(found[1]) and sum(map(len, found[0].values())) == k
        for name, boxes in found[0].items():
            np.testing.assert_allclose(boxes, found[1][name], atol=1e-5)


def shots(file):
    """The labels of the shots by the names of their images."""
    listed = check_det_dataset(file)["train"]
    files = sorted(x for x in Path(listed).rglob("*.*")) if Path(listed).is_dir() else Path(listed).read_text().split()
    labels = {Path(x).stem: Path(str(x).replace("/images/", "/labels/")).with_suffix(".txt") for x in files}
    return {k: np.loadtxt(x, ndmin=2) for k, x in labels.items()}


def test_a_loss_term_of_your_own(example, base, tmp_path, monkeypatch):
    keys = {**QUICK, "project": str(tmp_path), "name": "run"}
    example("own_loss").main(str(base / "yolo11n-tiny.yaml"), str(base / "data.yaml"), **keys)
    header, row = ((tmp_path / "run" / "results.csv").read_text().splitlines()[i].split(",") for i in (0, 1))
    columns = dict(zip(header, map(float, row)))
    assert 0 < columns["train/spr_loss"] <= 0.5 and columns["val/spr_loss"] == 0
    assert columns["grad/spr"] > 0
    monkeypatch.setitem(sys.modules, "own_loss", None)  # the checkpoint loads without the example
    model = torch.load(tmp_path / "run" / "weights" / "last.pt", weights_only=False)["model"]
    assert model.args["terms"] == "own_loss.SpreadLoss"


def test_tuning_starts_from_the_defaults_and_trains_with_mutated_gains(example, base, monkeypatch):
    runs, save, generator = [], Tuner._save_local_result, np.random.default_rng

    def save_result(self, result):  # before the folder of the worse run is removed
        (folder,) = result["save_dirs"].values()
        runs.append((result["hyperparameters"], YAML.load(Path(folder) / "args.yaml")))
        save(self, result)

    monkeypatch.setattr(Tuner, "_save_local_result", save_result)
    monkeypatch.setattr(np.random, "default_rng", lambda seed=2: generator(seed))
    tune_gains = example("tune_gains")
    keys = {**QUICK, "iterations": 2, "val": True}
    best = tune_gains.main(str(base / "yolo11n-tiny.yaml"), str(base / "data.yaml"), **keys)
    (first, _), (second, _) = runs
    assert first == {"supcon": 1.2, "cpe": 0.6, "triplet": 0.3, "lr0": 0.002}
    assert any(second[k] != first[k] for k in ("supcon", "cpe", "triplet"))
    for given, used in runs:
        assert {k: used[k] for k in given} == given and used["stage"] == 2
        assert all(low <= given[k] <= high for k, (low, high) in tune_gains.SPACE.items())
    assert best in (first, second)


def test_a_long_run_resumes_and_ends_once(example, base, tmp_path, monkeypatch, capsys):
    long_run, end = example("long_run"), FewShotTrainer.end_epoch

    def interrupted(self):
        if self.epoch == 1:
            raise KeyboardInterrupt
        end(self)

    given = str(base / "yolo11n-tiny.yaml"), str(base / "data.yaml")
    keys = {**QUICK, "epochs": 3, "plots": False}
    monkeypatch.setattr(FewShotTrainer, "end_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        long_run.main(*given, **keys)
    monkeypatch.setattr(FewShotTrainer, "end_epoch", end)
    best = long_run.main(*given, **keys)
    assert best == tmp_path / "long" / "stage2" / "weights" / "best.pt" and best.exists()
    rows = (best.parents[1] / "results.csv").read_text().splitlines()[1:]
    assert [int(float(x.split(",")[0])) for x in rows] == [1, 2, 3]
    written = best.stat().st_mtime_ns
    assert long_run.main(*given, **keys) == best and best.stat().st_mtime_ns == written
    assert "Done: " in capsys.readouterr().out


def test_serving_with_onnxruntime_alone(example, enrolled, demo):
    source = (EXAMPLES / "serve_onnx.py").read_text()
    assert not any(f"import {x}" in source or f"from {x}" in source for x in ("ultralytics", "torch", "yolo_fewshot"))
    file = FewShotYOLO(enrolled).export(format="onnx", imgsz=96)
    detector, yolo = example("serve_onnx").Detector(file), YOLO(file, task="detect")
    images = [cv2.imread(str(x)) for x in sorted((demo / "images" / "val").iterdir())[:3]]
    images.append(np.ascontiguousarray(images[0][:, :103]))  # margins left and right
    for image in images:
        want = yolo.predict(image, imgsz=96, conf=0.05, verbose=False)[0].boxes  # the model is weak
        found = detector(image, conf=0.05)
        assert len(found) == len(want) > 0
        assert [x.name for x in found] == [yolo.names[int(c)] for c in want.cls]
        np.testing.assert_allclose([x.score for x in found], want.conf, atol=1e-4)
        np.testing.assert_allclose(
            [x.box for x in found], want.xyxy, atol=0.5
        )  # older Ultralytics rounds margins otherwise


def test_tracking_objects_in_a_video(example, trained, tmp_path):
    thresholds = {f"{k}_thresh": 0.05 for k in ("track_high", "track_low", "new_track")}  # the model is weak
    YAML.save(tmp_path / "weak.yaml", {**YAML.load(ROOT / "cfg/trackers/bytetrack.yaml"), **thresholds})
    keys = {"imgsz": 96, "conf": 0.05, "project": str(tmp_path), "name": "run", "tracker": str(tmp_path / "weak.yaml")}
    counts = example("track_video").main(str(trained[1].best), **keys)
    assert counts and (tmp_path / "moving.mp4").exists() and list((tmp_path / "run").glob("moving.*"))
    assert set(counts) <= set(FewShotYOLO(trained[1].best).names.values()) | set(
        check_det_dataset("fewshot-demo-novel.yaml")["names"].values()
    )


SMALL = {
    "enroll": {"imgsz": 64, "epochs": 1},
    "graft": {"imgsz": 64, "epochs": 1, "steps": 2},
    "meta_train": {"imgsz": 64, "epochs": 1, "episodes": 2},
}


def cells(notebook):
    """The code cells of a notebook."""
    return [x for x in json.loads(notebook.read_text())["cells"] if x["cell_type"] == "code"]


@pytest.mark.parametrize("name", SMALL)
def test_a_notebook_runs(name, tmp_path, monkeypatch, demo):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("YOLO_VERBOSE", "")  # which a notebook sets
    train = YOLO.train
    share = {"fewshot-demo.yaml": 0.2}  # of the base images
    monkeypatch.setattr(YOLO, "train", lambda self, *a, **x: train(self, *a, **x, fraction=share.get(x["data"], 1.0)))
    code = ["".join(x["source"]) for x in cells(EXAMPLES / f"{name}.ipynb")]
    used = {"__name__": "notebook"}
    exec(code[0], used)
    assert used.keys() >= SMALL[name].keys()  # the settings are in its first cell
    used.update(SMALL[name])
    for text in code[1:]:
        exec(text, used)
    made = {"enroll": "site-a.pt", "graft": "fewshot/graft/weights/best.onnx", "meta_train": "plain.pt"}
    names = list(YOLO(tmp_path / made[name], task="detect").predict(used["images"][0], imgsz=64)[0].names.values())
    novel = check_det_dataset("fewshot-demo-novel.yaml")["names"].values()
    assert set(names) == set(novel)


def test_notebooks_have_true_outputs_and_are_small():
    there = sorted(EXAMPLES.glob("*.ipynb"))
    assert [x.stem for x in there] == sorted(SMALL)
    for file in there:
        assert file.stat().st_size < 150_000, file
        code = cells(file)
        assert [x["execution_count"] for x in code] == list(range(1, len(code) + 1)), file  # in order, all of them
        assert not any(x["output_type"] == "error" for cell in code for x in cell["outputs"]), file
        assert any("image/jpeg" in x.get("data", {}) for cell in code for x in cell["outputs"]), file
