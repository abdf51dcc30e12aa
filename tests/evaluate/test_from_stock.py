"""The benchmark from stock checkpoints, with and without images of the old classes."""

import json
import logging
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from ultralytics import YOLO
from ultralytics.utils import YAML

from yolo_fewshot import FewShotYOLO
from yolo_fewshot.data.demo import BASE, NOVEL
from yolo_fewshot.evaluate import benchmark as module
from yolo_fewshot.evaluate import coco, methods
from yolo_fewshot.evaluate import learn as learning
from yolo_fewshot.evaluate.benchmark import benchmark
from yolo_fewshot.evaluate.leakage import leakage
from yolo_fewshot.evaluate.meter import Meter
from yolo_fewshot.evaluate.novel_only import novel_only
from yolo_fewshot.evaluate.recorder import Recorded, mean_ap, record
from yolo_fewshot.evaluate.report import START, read_rows

QUICK = {"imgsz": 96, "workers": 0, "shots": 1, "seeds": 1}
NAMES = [*BASE, *NOVEL]


@pytest.fixture(scope="module")
def near(part_of_demo, tmp_path_factory):
    """A folder of a few demo images with base.yaml, whose labels have the numbers of all classes."""
    root = tmp_path_factory.mktemp("near")
    novel = part_of_demo(root, train=4, val=12, novel_query=12, novel_support=12)
    YAML.save(root / "novel_1shot_seed0.yaml", novel)
    return root


@pytest.fixture(scope="module")
def far(near, tmp_path_factory):
    """The novel part of the same images as a data set of its own, without base.yaml, and with a list of shots."""
    root = tmp_path_factory.mktemp("far")
    for folder in ("novel_query", "novel_support"):
        shutil.copytree(near / "images" / folder, root / "images" / folder)
        (root / "labels" / folder).mkdir(parents=True)
        for x in (near / "labels" / folder).glob("*.txt"):
            rows = [y.split(" ", 1) for y in x.read_text().splitlines()]
            text = "".join(f"{int(c) - len(BASE)} {box}\n" for c, box in rows)
            (root / "labels" / folder / x.name).write_text(text)
    content = {"train": "images/novel_support", "val": "images/novel_query", "names": dict(enumerate(NOVEL))}
    YAML.save(root / "data.yaml", content)
    YAML.save(root / "novel_1shot.yaml", content)
    listed = [f"./images/novel_support/{i:04}.jpg\n" for i in range(12)]
    (root / "novel_1shot_seed0.txt").write_text("".join(listed))
    return root


@pytest.fixture(scope="module")
def stock(trained, tmp_path_factory):
    """A stock detector of the base classes."""
    file = tmp_path_factory.mktemp("stock") / "stock.pt"
    FewShotYOLO(trained[1].best).fold().save(file)
    return file


@pytest.fixture(scope="module")
def stranger(stock, tmp_path_factory):
    """The same detector with other class names."""
    yolo, file = YOLO(stock), tmp_path_factory.mktemp("stranger") / "stranger.pt"
    yolo.model.names = {i: f"other{i}" for i in range(len(BASE))}
    yolo.save(file)
    return file


@pytest.fixture(scope="module")
def by_hand(stock, far, near):
    """The stock detector with the novel classes enrolled, and its metrics on the novel and on all images."""
    yolo = FewShotYOLO(stock)
    yolo.enroll(far / "novel_1shot.yaml", imgsz=96, method="mean")
    keys = {"imgsz": 96, "workers": 0, "batch": 1, "plots": False}
    alone = yolo.val(data=str(far / "data.yaml"), save_json=True, **keys).groups["novel"]
    return yolo, alone, yolo.val(data=str(near / "data.yaml"), **keys).groups


@pytest.fixture
def nothing_runs(monkeypatch):
    """Fail where work starts."""
    for name in ("_run_method", "_run_start"):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("work has started"))


# End to end


def test_a_stock_checkpoint_with_base_images_of_the_users_own(stock, far, near, by_hand, tmp_path, monkeypatch):
    monkeypatch.setattr(learning, "MIN_STEPS", 1)
    monkeypatch.setattr(learning, "MIN_EPOCHS", 1)
    keys = {**QUICK, "methods": "stock-22,mean", "base_val": near / "base.yaml", "out": tmp_path / "out"}
    out = benchmark(far, stock, **keys)
    rows = read_rows(out / "rows.csv")
    assert list(rows) == [(START, 0, 0), ("stock-22", 1, 0), ("mean", 1, 0)]
    start, tuned, row = rows.values()
    yolo, alone, both = by_hand
    shutil.copytree(near / "images/novel_query", tmp_path / "images/background")  # to the old classes, without labels
    val = [str(near / "images/val"), str(tmp_path / "images/background")]
    YAML.save(tmp_path / "before.yaml", {"train": val, "val": val, "names": dict(enumerate(BASE))})
    before = YOLO(stock).val(data=str(tmp_path / "before.yaml"), imgsz=96, workers=0, batch=1, plots=False).box
    assert start["GFSOD_bAP50"] == pytest.approx(before.map50, abs=1e-5) and before.map50 > 0.1
    assert start["GFSOD_bAP"] == pytest.approx(before.map, abs=1e-5)
    expected = {
        **{"FSOD_nAP50": alone["mAP50"], "FSOD_nAP": alone["mAP50-95"]},
        **{"FSOD_cAP50": alone["COCO AP50"], "FSOD_cAP": alone["COCO AP50-95"]},
        **{f"GFSOD_{k[0]}AP50": both[k]["mAP50"] for k in ("base", "novel")},
        **{f"GFSOD_{k[0]}AP": both[k]["mAP50-95"] for k in ("base", "novel")},
        **{"GFSOD_HM50": both["harmonic mean"]["mAP50"], "GFSOD_HM": both["harmonic mean"]["mAP50-95"]},
        "params": sum(p.numel() for p in yolo.model.parameters()) / 1e6,
    }
    assert expected["FSOD_nAP50"] > 0.02 and expected["GFSOD_bAP50"] > 0.1
    assert {k: row[k] for k in expected} == pytest.approx(expected, abs=1e-4)
    limits, alarms = {n: x["conf"] or 0.25 for n, x in yolo.model.enrolled.items()}, 0
    images = sorted((near / "images/val").iterdir())
    for result in yolo.predict([str(x) for x in images], imgsz=96, conf=0.001, max_det=1000, verbose=False):
        scored = zip(result.boxes.cls.tolist(), result.boxes.conf.tolist())
        alarms += sum(s >= limits.get(yolo.names[int(c)], 2) for c, s in scored)
    assert row["GFSOD_alarms"] == pytest.approx(alarms / len(images), abs=1e-5)
    assert tuned["GFSOD_bAP50"] == tuned["GFSOD_HM50"] == 0  # a detector of the new classes alone
    assert tuned["model"] == tuned["stock"] == row["stock"] and not (out / "stock.pt").exists()
    text = (out / "results.md").read_text()
    assert f"Before learning: bAP50 {before.map50:.3f}, bAP50-95 {before.map:.3f}." in text
    assert json.loads((out / "benchmark.json").read_text())["base_val"] == str(near / "base.yaml")
    with pytest.raises(ValueError, match="results of another base_val"):
        benchmark(far, stock, **{**keys, "base_val": None})


def test_shots_that_are_measured_on_are_refused(stock, far, tmp_path, nothing_runs):
    shutil.copytree(far, tmp_path / "far")
    (tmp_path / "far/novel_1shot_seed0.txt").write_text("./images/novel_query/0003.jpg\n")
    with pytest.raises(ValueError, match=r"^1 images of the val split of .* are also shots.*: .*0003\.jpg\. Take"):
        benchmark(tmp_path / "far", stock, methods="mean", out=tmp_path / "out", **QUICK)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", ["queries", "base images", "base.yaml"])
def test_background_images_that_are_measured_on_are_refused(stock, far, near, tmp_path, nothing_runs, case):
    data, folder, base_val = {
        "queries": (far, far / "images/novel_query", None),
        "base images": (far, near / "images/val", near / "base.yaml"),
        "base.yaml": (near, near / "images/val", None),
    }[case]
    image = sorted(folder.iterdir())[0]
    (tmp_path / "background").mkdir()
    (tmp_path / "background/other.jpg").symlink_to(image.resolve())
    keys = {**QUICK, "methods": "mean", "background": str(tmp_path / "background"), "base_val": base_val}
    with pytest.raises(ValueError, match=rf"^background=.* has 1 images of the val split of .*: .*{image.name}\. Take"):
        benchmark(data, stock, out=tmp_path / "out", **keys)
    assert not (tmp_path / "out").exists()


def test_background_images_reach_every_method_that_takes_them(stock, far, near, tmp_path, monkeypatch):
    monkeypatch.setattr(learning, "MIN_STEPS", 1)
    monkeypatch.setattr(learning, "MIN_EPOCHS", 1)
    trained, train = [], learning._train
    monkeypatch.setattr(learning, "_train", lambda *a, **kw: [trained.append(kw.get("background")), train(*a, **kw)][1])
    background = str(near / "images/val")
    keys = {**QUICK, "methods": "stock-22,fit,graft-head", "background": background, "epochs": 1, "steps": 1}
    rows = read_rows(benchmark(far, stock, out=tmp_path, **keys) / "rows.csv")
    assert trained == [None, background]  # fine-tuning does not take them
    aps = []
    for images in (None, background):
        yolo = FewShotYOLO(stock)
        yolo.enroll(far / "novel_1shot.yaml", imgsz=96, method="fit", background=images)
        metrics = yolo.val(data=str(far / "data.yaml"), imgsz=96, workers=0, batch=1, plots=False)
        aps.append(metrics.groups["novel"]["mAP50"])
    assert rows["fit", 1, 0]["FSOD_nAP50"] == pytest.approx(aps[1], abs=1e-4) != pytest.approx(aps[0], abs=1e-3)


def test_without_base_images_their_figures_stay_empty(stock, far, by_hand, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_run_start", lambda _: pytest.fail("there are no base images"))
    out = benchmark(far, stock, methods="mean", out=tmp_path, **QUICK)
    rows = read_rows(out / "rows.csv")
    assert list(rows) == [("mean", 1, 0)]
    row = rows["mean", 1, 0]
    assert row["FSOD_nAP50"] == pytest.approx(by_hand[1]["mAP50"], abs=1e-5)
    assert all(np.isnan(v) for k, v in row.items() if k.startswith("GFSOD"))
    text = (out / "results.md").read_text()
    assert re.findall("^## .*$", text, re.M) == ["## FSOD: novel images alone, 8 novel classes, 1 seed."]
    assert (out / "results.png").stat().st_size > 5000


def test_base_classes_that_the_model_does_not_know_are_left_out(stranger, near, by_hand, tmp_path, caplog):
    out = benchmark(near, stranger, methods="mean", out=tmp_path, **QUICK)
    assert f"model= does not know {BASE[0]}, " in caplog.text and "only the novel classes" in caplog.text
    view = YAML.load(out / "data/novel_1shot_seed0.yaml")
    assert view["names"] == dict(enumerate(NOVEL))
    labels = [x.split() for f in (out / "data/labels/novel_1shot_seed0").iterdir() for x in f.read_text().splitlines()]
    assert {int(x[0]) for x in labels} == set(range(len(NOVEL)))
    row = read_rows(out / "rows.csv")["mean", 1, 0]
    assert row["FSOD_nAP50"] == pytest.approx(by_hand[1]["mAP50"], abs=1e-4)
    assert row["FSOD_cAP"] == pytest.approx(by_hand[1]["COCO AP50-95"], abs=1e-4)
    benchmark(near, stranger, methods="mean", out=tmp_path, **QUICK)  # the view is kept


def test_the_view_of_novel_classes_keeps_ignore_regions_and_equal_names_apart(near, tmp_path):
    for i, text in enumerate(("0 0.5 0.5 0.2 0.2\n2 0.3 0.3 0.1 0.1\n", "0 0.1 0.1 0.1 0.1\n")):
        for kind, suffix in (("images", "jpg"), ("labels", "txt"), ("ignore", "txt")):
            (tmp_path / kind / f"part{i}").mkdir(parents=True)
            if kind == "images":
                shutil.copy(near / "images/val/0000.jpg", tmp_path / kind / f"part{i}/a.jpg")
            elif kind == "labels" or i == 0:
                (tmp_path / kind / f"part{i}/a.{suffix}").write_text(text if kind == "labels" else "0.7 0.7 0.1 0.1\n")
    images = [str(tmp_path / f"images/part{i}/a.jpg") for i in range(2)]
    data = {"names": {0: "old", 1: "x", 2: "new"}, "val": images[1], "fewshot": {"ignore": "ignore", "novel": ["new"]}}
    file = novel_only(data, images, ("new",), tmp_path / "view", "shots")
    read = {k: [x.read_text() for x in sorted((tmp_path / f"view/{k}/shots").iterdir())] for k in ("labels", "ignore")}
    assert [[float(v) for v in x.split()] for x in read["labels"]] == [[0, 0.3, 0.3, 0.1, 0.1], []]
    assert read["ignore"] == ["0.7 0.7 0.1 0.1\n"] and YAML.load(file)["fewshot"] == {"ignore": "ignore"}
    assert len(list((tmp_path / "view/images/shots").iterdir())) == 2


@pytest.mark.parametrize("refused", [("symlink",), ("symlink", "link")])
def test_a_view_has_hard_links_or_copies_where_there_are_no_symbolic_links(near, tmp_path, monkeypatch, refused):
    def refuse(*_):
        raise OSError("a required privilege is not held by the client")

    for name in refused:
        monkeypatch.setattr(os, name, refuse)
    shutil.copytree(near / "images/val", tmp_path / "images")  # of the file system of the view
    images = [str(x) for x in sorted((tmp_path / "images").iterdir())]
    novel_only({"names": {0: "new"}, "val": images[1]}, images, ("new",), tmp_path / "view", "shots")
    made = sorted((tmp_path / "view/images/shots").iterdir())
    assert len(made) == len(images) == 12
    for x, image in zip(made, images):
        assert x.read_bytes() == Path(image).read_bytes() and not x.is_symlink()
        assert x.samefile(image) == ("link" not in refused)


# Methods


def test_methods_that_are_measured_if_none_are_named(stock, far, near, trained, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(module, "_do_missing", lambda plan, record: asked.append(plan.methods))
    monkeypatch.setattr(module, "report", lambda *_: None)
    benchmark(far, stock, out=tmp_path / "a", **QUICK)
    benchmark(far, trained[1].best, out=tmp_path / "b", **QUICK)
    tuned = ("stock-0", "stock-10", "stock-22", "mean", "fit", "auto")
    assert asked == [(*tuned, "graft-head", "graft-neck", "graft-all"), (*tuned, "adapt", "adapt_full")]
    assert methods.default_methods(True, True) == methods.parse(methods.DEFAULT_METHODS)


def test_grafts_pass_their_part_and_keep_the_best_checkpoint(stock, far, tmp_path, monkeypatch):
    runs, measured = [], []

    def train(start, folder, **keys):
        runs.append((start, Path(keys.pop("cfg")).name, Path(keys.pop("data")).name, keys))
        with Meter() as meter:
            pass
        return SimpleNamespace(last="last.pt", best="best.pt"), meter

    monkeypatch.setattr(learning, "_train", train)
    monkeypatch.setattr(module, "measure", lambda plan, file, queries, folder: measured.append((file, queries)) or {})
    benchmark(far, stock, methods="graft-head,graft-neck,graft-all", out=tmp_path, steps=7, **QUICK)
    keys = {"imgsz": 96, "workers": 0, "steps": 7, "plots": False, "verbose": False, "seed": 0}
    assert runs == [
        (stock, "stage3.yaml", "novel_1shot_seed0.yaml", {**keys, "graft": part}) for part in ("head", "neck", "all")
    ]
    assert measured == [(Path("best.pt"), far / "data.yaml")] * 3


def test_a_graft_end_to_end(stock, far, near, tmp_path):
    keys = {**QUICK, "methods": "graft-neck", "steps": 2, "base_val": near / "base.yaml"}
    out = benchmark(far, stock, out=tmp_path, **keys)
    row = read_rows(out / "rows.csv")["graft-neck", 1, 0]
    assert row["GFSOD_bAP50"] > 0.1 and row["FSOD_nAP50"] >= 0 and row["seconds"] > 0


# Errors


@pytest.mark.parametrize(
    "change, error, text",
    [
        (
            {"methods": "mean,adapt,two_way"},
            ValueError,
            r"^adapt, two_way of 'methods=' need a few-shot checkpoint, and ",
        ),
        ({"methods": "no_episodes"}, ValueError, "need a few-shot checkpoint"),
        (
            {"methods": "stock_all"},
            ValueError,
            r"^stock_all-0, .* need images of base classes: data= with a base\.yaml",
        ),
        ({"model": "x.onnx"}, TypeError, r"^model=x\.onnx is not a \*\.pt checkpoint"),
        ({"base_val": "none.yaml"}, FileNotFoundError, r"none\.yaml does not exist"),
        ({"seeds": 2}, FileNotFoundError, r"no novel_1shot_seed1\.yaml\. It has novel_1shot_seed0: set shots="),
    ],
)
def test_what_a_stock_checkpoint_cannot_do(stock, far, tmp_path, nothing_runs, monkeypatch, change, error, text):
    monkeypatch.chdir(tmp_path)
    Path("x.onnx").touch()
    keys = {"data": far, "model": stock, "methods": "mean", "out": "out", **QUICK, **change}
    with pytest.raises(error, match=text):
        benchmark(**keys)
    assert not Path("out").exists()


def test_models_of_other_tasks(far, tmp_path, nothing_runs):
    YOLO("yolo11n-seg.yaml").save(tmp_path / "seg.pt")
    with pytest.raises(TypeError, match=r"model=.*seg\.pt is a model for task 'segment'\. It must be a detector"):
        benchmark(far, tmp_path / "seg.pt", methods="mean", out=tmp_path / "out", **QUICK)


@pytest.mark.parametrize(
    "names, text",
    [
        ([NOVEL[0], *BASE[1:]], rf"labels {NOVEL[0]}, a novel class of data=\. If it is another class, rename it"),
        (
            [f"x{i}" for i in range(len(BASE))],
            r"labels no class of model=: classes are matched by name, and it labels x",
        ),
        ([BASE[1], *BASE[1:]], rf"Several classes of base_val=.* have the name {BASE[1]}\. Rename them"),
    ],
)
def test_base_images_that_do_not_fit(stock, far, near, tmp_path, nothing_runs, names, text):
    shutil.copytree(near / "images/val", tmp_path / "images/val")
    shutil.copytree(near / "labels/val", tmp_path / "labels/val")
    (tmp_path / "labels/val/0000.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    file = tmp_path / "own.yaml"
    YAML.save(file, {"train": "images/val", "val": "images/val", "names": dict(enumerate(names))})
    with pytest.raises(ValueError, match=text):
        benchmark(far, stock, methods="mean", base_val=file, out=tmp_path / "out", **QUICK)
    assert not (tmp_path / "out").exists()


def test_data_without_labeled_queries(stock, far, tmp_path, nothing_runs):
    shutil.copytree(far, tmp_path / "far")
    for x in (tmp_path / "far/labels/novel_query").glob("*.txt"):
        x.write_text("")
    with pytest.raises(ValueError, match=r"No image of the val split of .*data\.yaml has a label of a novel class"):
        benchmark(tmp_path / "far", stock, methods="mean", out=tmp_path / "out", **QUICK)


def test_rows_with_other_columns_are_kept_and_refused(stock, far, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_run_method", lambda *_: {"FSOD_nAP50": 0.5})
    keys = {**QUICK, "methods": "mean", "out": tmp_path}
    benchmark(far, stock, **keys)
    old = (tmp_path / "rows.csv").read_text().replace("FSOD_cAP50,", "")
    (tmp_path / "rows.csv").write_text(old)
    with pytest.raises(ValueError, match=r"rows\.csv has the columns of another version"):
        benchmark(far, stock, **keys)
    assert (tmp_path / "rows.csv").read_text() == old


def test_results_of_other_labels_are_kept_and_refused(stock, far, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_run_method", lambda *_: {"FSOD_nAP50": 0.5})
    shutil.copytree(far, tmp_path / "far")
    keys = {**QUICK, "methods": "mean", "out": tmp_path / "out"}
    benchmark(tmp_path / "far", stock, **keys)
    rows = (tmp_path / "out/rows.csv").read_text()
    assert rows.splitlines()[1].startswith("mean,1,0,0.5,")
    (tmp_path / "far/labels/novel_query/0003.txt").write_text("")
    with pytest.raises(ValueError, match=r"other images, labels or files of data\.yaml, novel_1shot_seed0\. Set"):
        benchmark(tmp_path / "far", stock, **{**keys, "methods": "mean,fit"})
    assert (tmp_path / "out/rows.csv").read_text() == rows


# Parts


def test_what_is_left_is_said(stock, far, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(module, "_run_method", lambda *_: {"FSOD_nAP50": 0.5})
    benchmark(far, stock, methods="mean,fit", out=tmp_path, **QUICK)
    assert "Benchmark: 0 rows done, 2 to do; now mean, 1 shots, seed 0" in caplog.text
    assert "Benchmark: 1 rows done, 1 to do; now fit, 1 shots, seed 0" in caplog.text
    rows = {("mean", 1, 0): {"wall": 10.0}, ("mean", 1, 1): {"wall": 20.0}, ("fit", 1, 0): {"wall": 45.0}}
    tasks = [(m, 1, s) for s in range(4) for m in ("mean", "fit", "auto")]
    unknown = "and 4 rows of methods without a time yet"
    assert module._progress(rows, tasks) == f"3 rows done, 9 to do, about {(2 * 15 + 3 * 45) / 60:.0f} min {unknown}"
    assert module._progress(rows, tasks[:4]) == "3 rows done, 1 to do"
    assert (
        module._progress(rows | {("auto", 1, 0): {"wall": 7200.0}}, tasks[-1:]) == "0 rows done, 1 to do, about 2.0 h"
    )


def test_a_missing_faster_coco_eval_is_one_warning(stock, far, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(coco, "available", lambda: False)
    out = benchmark(far, stock, methods="mean", out=tmp_path, **QUICK)
    assert caplog.text.count("pip install 'yolo-fewshot[benchmark]'") == 1
    row = read_rows(out / "rows.csv")["mean", 1, 0]
    assert np.isnan(row["FSOD_cAP"]) and np.isnan(row["FSOD_cAP50"]) and row["FSOD_nAP50"] > 0


def test_leakage_of_stock_checkpoints(stock, tmp_path, caplog):
    yolo = YOLO(stock)
    yolo.ckpt = {"train_args": {"model": "yolo11n.pt", "pretrained": True}}  # gone, but known to be COCO's
    yolo.save(tmp_path / "tuned.pt")
    novel = ("Traffic_Light", "hot-dog", "gear wheel", BASE[0].upper(), "persons")
    assert leakage([tmp_path / "tuned.pt"], novel) == ["Traffic_Light", "hot-dog", BASE[0].upper()]
    assert "LEAKAGE: the starting checkpoint was trained on Traffic_Light, hot-dog" in caplog.text
    yolo.ckpt = {"train_args": {"model": "mine.pt"}}
    yolo.save(tmp_path / "tuned.pt")
    assert leakage([tmp_path / "tuned.pt"], ("hot dog",)) == []
    assert "The leakage audit lacks mine.pt, which the checkpoints were trained from" in caplog.text


def test_on_a_cpu_images_are_validated_one_by_one(by_hand, far, tmp_path, monkeypatch):
    seen, val = [], FewShotYOLO.val
    monkeypatch.setattr(FewShotYOLO, "val", lambda self, **keys: seen.append(keys) or val(self, **keys))
    images, ms = record(by_hand[0], far / "data.yaml", tuple(NOVEL), tmp_path, imgsz=96, workers=0, device="cpu")
    assert seen[0]["batch"] == 1 and len(images) == 12 and ms > 0
    assert all(x.shape == images[0].shape and len(x.found) == len(x.scores) == len(x.hits) for x in images)
    rows = [y.split() for y in (far / "labels/novel_query/0003.txt").read_text().splitlines()]
    image = next(x for x in images if x.file.endswith("0003.jpg"))
    h, w = image.shape
    for (c, *box), xyxy, k in zip(rows, image.boxes, image.classes):
        x, y, bw, bh = (float(v) for v in box)
        corners = [(x - bw / 2) * w, (y - bh / 2) * h, (x + bw / 2) * w, (y + bh / 2) * h]
        assert int(c) == k and xyxy == pytest.approx(corners, abs=0.05)


def seen(labels, detections):
    """An image with labels (class, x) and detections (class, x, score); all boxes are squares of 10 px."""
    boxes = np.array([[x, 0, x + 10, 10] for _, x in labels], np.float32).reshape(-1, 4)
    found = np.array([[x, 0, x + 10, 10] for _, x, _ in detections], np.float32).reshape(-1, 4)
    hits = np.array([[(c, x) in labels] * 10 for c, x, _ in detections], bool).reshape(-1, 10)
    classes = [np.array([x[0] for x in rows], int) for rows in (labels, detections)]
    return Recorded(
        "a.jpg", (500, 5000), boxes, classes[0], found, classes[1], np.array([x[2] for x in detections]), hits
    )


def test_average_precision_by_hand():
    pytest.importorskip("faster_coco_eval")
    images = [seen([(0, 0), (1, 50), (2, 90)], [(0, 0, 0.9), (2, 90, 0.8)]), seen([(0, 20)], [(0, 20, 0.7)])]
    assert mean_ap(images, range(2)) == pytest.approx((0.4975, 0.4975), abs=3e-3)  # class 1 is missed
    assert coco.coco_ap(images, range(2)) == pytest.approx((0.5, 0.5), abs=1e-6)
    assert coco.coco_ap(images, range(2, 4)) == pytest.approx((1.0, 1.0), abs=1e-6)
    assert np.isnan(coco.coco_ap(images, range(3, 5))).all() and np.isnan(mean_ap(images, range(3, 5))).all()
    assert coco.coco_ap([seen([(0, 0)], [(2, 0, 0.5)])], range(1)) == (0, 0)
    wrong = [(0, 20 * i + 100, 0.9) for i in range(100)]  # more than the 100 detections that COCO counts
    assert coco.coco_ap([seen([(0, 0)], [*wrong, (0, 0, 0.1)])], range(1)) == pytest.approx((0, 0), abs=1e-6)
    assert coco.coco_ap([seen([(0, 0)], [*wrong[:99], (0, 0, 0.1)])], range(1))[0] == pytest.approx(0.01, abs=1e-6)


def test_the_meter_takes_the_peak_until_the_last_mark():
    with Meter() as idle:
        pass
    assert idle.seconds > 0 and idle.ram > 10
    with Meter() as meter:
        block = np.ones(2**24)  # 128 MiB
        meter.mark()
        del block
        seconds = meter.seconds
        later = np.ones(2**26)
        del later
    assert meter.seconds == seconds and idle.ram + 120 < meter.ram < idle.ram + 400
