import copy
import csv
import itertools
import json
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from ultralytics.data.utils import check_det_dataset
from ultralytics.models.yolo.detect import DetectionValidator
from ultralytics.utils import LOGGER, YAML, nms, ops
from ultralytics.utils.metrics import DetMetrics

from yolo_fewshot import FewShotYOLO
from yolo_fewshot.evaluate.metrics import FewShotMetrics
from yolo_fewshot.evaluate.validator import FewShotValidator
from yolo_fewshot.paths import cfg_dir


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two images; a square and a disc in each, under two orders of the class names."""
    root = tmp_path_factory.mktemp("val")
    (root / "images").mkdir()
    for order in ("ab", "ba"):
        (root / order).mkdir()
    for i in range(2):
        image = np.full((96, 96, 3), 200, dtype=np.uint8)
        cv2.rectangle(image, (10, 10), (40, 40), (0, 0, 255), -1)
        cv2.circle(image, (70, 65), 18, (255, 0, 0), -1)
        boxes = ["0.26 0.26 0.31 0.31", "0.73 0.68 0.375 0.375"]
        for order, cls in (("ab", (0, 1)), ("ba", (1, 0))):
            (root / order / "images").mkdir(exist_ok=True)
            (root / order / "labels").mkdir(exist_ok=True)
            cv2.imwrite(str(root / order / f"images/{i}.png"), image)
            (root / order / f"labels/{i}.txt").write_text("\n".join(f"{c} {b}" for c, b in zip(cls, boxes)))
    for order, names in (("ab", "[square, disc]"), ("ba", "[disc, square]"), ("unknown", "[square, bird]")):
        folder = "ba" if order == "ba" else "ab"
        text = f"train: {root / folder}/images\nval: {root / folder}/images\nnames: {names}\n"
        (root / f"{order}.yaml").write_text(text)
    return root


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = FewShotYOLO("fewshot.yaml")
    head = model.model.model[-1]
    for index in (80, 81):
        head.set_class(index, head.get_class(0))
    model.model.names = {**{i: f"base{i}" for i in range(80)}, 80: "square", 81: "disc"}
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


def test_a_slow_machine_loses_no_detection(model, data, monkeypatch):
    """Ultralytics' NMS stops after some seconds for a batch; later every look at the clock is a minute later."""
    found = []

    class Spy(FewShotValidator):
        def update_metrics(self, preds, batch):
            found.append([x["conf"].tolist() for x in preds])
            super().update_metrics(preds, batch)

    clock = itertools.count(0, 60)
    for _ in range(2):
        model.val(validator=Spy, data=str(data / "ab.yaml"), imgsz=96, conf=1e-6, batch=2, workers=0, plots=False)
        monkeypatch.setattr(nms, "time", SimpleNamespace(time=lambda: next(clock)))
    assert found[0] == found[1] and [len(x) > 0 for x in found[0]] == [True, True]


def test_unknown_classes_are_an_error_that_names_the_remedy(model, data):
    with pytest.raises(ValueError, match=r"show bird, which the model does not know\. Enroll"):
        model.val(data=str(data / "unknown.yaml"), imgsz=96, workers=0, plots=False)


@pytest.fixture
def twins(model):
    """The model, whose two classes have the same name."""
    names = dict(model.names)
    model.model.names.update({80: "shape", 81: "shape"})
    yield model
    model.model.names = names


def name_them(data, tmp_path, names):
    text = (data / "ab.yaml").read_text()
    (tmp_path / "data.yaml").write_text(text[: text.index("names:")] + f"names: {names}\n")
    return tmp_path / "data.yaml"


@pytest.mark.parametrize("enrolled", [0, 1])
def test_classes_of_the_same_name_are_kept_apart_as_stock_does(twins, data, tmp_path, enrolled):
    """The labels count from 0, so that they are squares and discs only if nothing moves them."""
    twins.model.names = {0: "shape", 1: "shape", **{i: f"base{i}" for i in range(2, 82)}}
    names = [*twins.model.names.values()][: 81 + enrolled]  # or all but the last, as before an enrollment
    yaml = name_them(data, tmp_path, names)
    assert true_labels(twins, yaml) == true_labels(twins, yaml, DetectionValidator) == [0, 1] * 2


def test_names_that_leave_a_label_unclear_are_an_error_before_the_first_batch(twins, data, tmp_path):
    seen = []

    class Spy(FewShotValidator):
        def preprocess(self, batch):
            seen.append(batch)
            return super().preprocess(batch)

    for names in ("[shape, shape]", "[shape, disc]"):
        yaml = name_them(data, tmp_path, names)
        with pytest.raises(ValueError, match=r"data\.yaml' cannot be matched .* called shape, .* List all 'names:'"):
            twins.val(validator=Spy, data=str(yaml), imgsz=96, workers=0, plots=False)
    assert not seen


SHAPES = ["square", "disc", "triangle", "bar"]  # in the data; triangle and bar are novel, and no image shows a bar
KNOWN = ["bar", "triangle", "star", "disc", "square"]  # in the model
SHOWN = {"1": [0, 1, 2], "2": [0, 2, 2], "3": [1], "4": []}  # image: shapes
CENTERS = [0.2, 0.5, 0.8]


class Finder:
    """Finds every object, squares a bit low and triangles too narrow; and a disc too many in every image."""

    def preprocess(self, batch):
        self.batch = super().preprocess(batch)
        return self.batch

    def postprocess(self, preds):
        found, (h, w) = [], self.batch["img"].shape[2:]
        index = {n: i for i, n in self.names.items()}
        for i in range(len(self.batch["im_file"])):
            mine = self.batch["batch_idx"] == i
            cls, box = self.batch["cls"][mine].view(-1), self.batch["bboxes"][mine].clone()
            box[cls == index["triangle"], 2] *= 0.68
            box[cls == index["square"], 3] *= 0.88
            box = torch.cat([torch.tensor([[0.5, 0.9, 0.2, 0.1]]), box])
            cls = torch.cat([torch.tensor([float(index["disc"])]), cls])
            conf = torch.linspace(0.9, 0.6, len(cls))  # the disc too many is the surest
            bboxes = ops.xywh2xyxy(box) * torch.tensor([w, h, w, h])
            found.append({"bboxes": bboxes, "conf": conf, "cls": cls, "extra": torch.zeros(len(cls), 0)})
        return found

    def coco_evaluate(self, stats, pred_json, anno_json):
        self.predictions, self.truth = (
            json.loads(Path(x).read_text()) if isinstance(x, Path) else copy.deepcopy(x) for x in (pred_json, anno_json)
        )
        self.stats = super().coco_evaluate(stats, pred_json, anno_json)
        return self.stats


class Oracle(Finder, FewShotValidator):
    pass


class StockOracle(Finder, DetectionValidator):
    pass


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Folder with four images."""
    root = tmp_path_factory.mktemp("shapes")
    (root / "images" / "val2017").mkdir(parents=True)
    (root / "labels" / "val2017").mkdir(parents=True)
    for name, classes in SHOWN.items():
        cv2.imwrite(str(root / "images" / "val2017" / f"{name}.png"), np.full((96, 96, 3), 200, dtype=np.uint8))
        lines = [f"{c} {x} 0.5 0.25 0.4" for c, x in zip(classes, CENTERS)]
        (root / "labels" / "val2017" / f"{name}.txt").write_text("\n".join(lines))
    return root


@pytest.fixture
def write(shapes, tmp_path):
    """Return a function that writes a data.yaml for these images."""

    def written(**keys):
        images = str(shapes / "images" / "val2017")
        YAML.save(tmp_path / "data.yaml", {"train": images, "val": images, "names": SHAPES, **keys})
        return tmp_path / "data.yaml"

    return written


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    torch.manual_seed(0)
    config = tmp_path_factory.mktemp("network") / "fewshot.yaml"
    config.write_text((cfg_dir() / "fewshot.yaml").read_text().replace("nc: 80", f"nc: {len(KNOWN)}"))
    network = FewShotYOLO(config)
    network.model.names = dict(enumerate(KNOWN))
    return network


@pytest.fixture
def val(network, tmp_path, monkeypatch):
    """Return a function that validates and returns the validator; its `lines` are what was logged."""

    def run(yaml, validator=Oracle, enrolled=(), **kwargs):
        network.model.enrolled = {name: {} for name in enrolled}
        made, lines = [], []
        with monkeypatch.context() as m:
            m.setattr(LOGGER, "info", lambda text, *args: lines.append(str(text)))
            m.setattr(LOGGER, "warning", lambda text, *args: lines.append(str(text)))
            metrics = network.val(
                validator=lambda **k: made.append(validator(**k)) or made[0],
                data=str(yaml),
                imgsz=96,
                workers=0,
                plots=False,
                project=str(tmp_path / "runs"),
                **kwargs,
            )
        assert metrics is made[0].metrics and metrics.save_dir == made[0].save_dir
        made[0].lines = lines
        return made[0]

    return run


def saved(validator):
    with open(validator.save_dir / "base_novel.csv", newline="") as f:
        return {row["group"]: {k: float(v) for k, v in row.items() if k != "group" and v} for row in csv.DictReader(f)}


NOVEL = {"fewshot": {"novel": ["bar", "triangle"]}}


def test_base_and_novel_are_printed_and_saved(write, val):
    v = val(write(**NOVEL))
    assert type(v.metrics) is FewShotMetrics
    result = {KNOWN[c]: v.metrics.class_result(i) for i, c in enumerate(v.metrics.ap_class_index)}
    assert list(result) == ["triangle", "disc", "square"]
    base = [(a + b) / 2 for a, b in zip(result["disc"], result["square"])]
    novel = list(result["triangle"])
    assert 0.3 < novel[3] < base[3] < base[2] < 0.95 < novel[2] and novel[0] != pytest.approx(base[0], abs=0.01)
    mean = [2 / (1 / a + 1 / b) for a, b in zip(base, novel)][2:]

    columns = ["classes", "images", "instances", "P", "R", "mAP50", "mAP50-95"]
    rows = saved(v)
    assert list(rows) == ["base", "novel", "harmonic mean"]
    assert list(rows["base"]) == list(rows["novel"]) == columns and list(rows["harmonic mean"]) == columns[-2:]
    assert list(rows["base"].values()) == pytest.approx([2, 3, 4, *base], abs=1e-6)
    assert list(rows["novel"].values()) == pytest.approx([1, 2, 3, *novel], abs=1e-6)
    assert list(rows["harmonic mean"].values()) == pytest.approx(mean, abs=1e-6)

    row = "%22s" + "%11i" * 2 + "%11.3g" * 4  # Ultralytics' own
    table = [
        row % ("all", 4, 7, *v.metrics.mean_results()),
        row % ("triangle", 2, 3, *result["triangle"]),
        row % ("disc", 2, 2, *result["disc"]),
        row % ("square", 2, 2, *result["square"]),
        row % ("base", 3, 4, *base),
        row % ("novel", 2, 3, *novel),
        ("%22s" + " " * 44 + "%11.3g" * 2) % ("harmonic mean", *mean),
    ]
    start = v.lines.index(table[0])
    assert v.lines[start : start + 7] == table
    assert "base" not in "".join(v.lines[start + 7 :]).replace(str(v.save_dir), "")
    assert [v.metrics.results_dict[f"metrics/HM_{k}(B)"] for k in ("mAP50", "mAP50-95")] == pytest.approx(mean)
    assert not list(v.save_dir.glob("*.part"))
    assert pickle.loads(pickle.dumps(v.metrics)).groups == v.metrics.groups and "harmonic mean" in str(v.metrics)


@pytest.fixture
def matched(write, network):
    """Return a function that returns a validator that has matched its classes, without a validation."""

    def match(enrolled=(), device=None, **keys):
        network.model.enrolled = {name: {} for name in enrolled}
        v = FewShotValidator(args={"data": str(write(**keys)), "plots": False})
        v.training, v.data, v.device = False, check_det_dataset(v.args.data), device
        v.dataloader = SimpleNamespace(dataset=SimpleNamespace(labels=[{"cls": np.array([[0.0], [2.0]])}]))
        v.init_metrics(network.model)
        return v

    return match


def novel_names(validator):
    return {KNOWN[i] for i in validator.metrics.novel}


@pytest.mark.parametrize(
    ("novel", "expected"),
    [
        (["bar", "triangle"], {"bar", "triangle"}),
        ([3, 2], {"bar", "triangle"}),  # ids in the data, not in the model
        ([2, "bar"], {"bar", "triangle"}),
        (["7"], set()),  # unknown to the model
        ([4, "triangle"], {"triangle"}),
        ([], set()),
    ],
)
def test_novel_classes_of_the_data(matched, novel, expected):
    names = [*SHAPES, "7"]
    assert novel_names(matched(names=names, fewshot={"novel": novel})) == expected
    assert novel_names(matched(names=names, fewshot={"novel": novel}, enrolled=["disc"])) == expected
    assert novel_names(matched(names=names, enrolled=["disc", "gone"])) == {"disc"}


def test_a_section_of_ignore_regions_alone_names_no_novel_classes(matched):
    assert novel_names(matched(fewshot={"ignore": "ignore"}, enrolled=["disc"])) == {"disc"}


def test_a_novel_name_of_several_classes_is_an_error_and_their_ids_are_not(matched):
    names = [*SHAPES, "bar"]
    with pytest.raises(ValueError, match=r"lists bar, a name that several classes have\. Use their ids, from 0 to 4"):
        matched(names=names, fewshot={"novel": ["triangle", "bar"]})
    assert novel_names(matched(names=names, fewshot={"novel": ["triangle"]})) == {"triangle"}
    assert novel_names(matched(names=names, fewshot={"novel": [2, 4]})) == {"triangle"}  # the model has one bar


def test_the_class_indices_lie_on_the_device_before_the_first_batch(matched):
    v = matched(device=torch.device("meta"))
    assert v.class_index.device == v.device


def test_lvis_categories_follow_the_order_of_the_data(matched, tmp_path):
    (tmp_path / "lvis").mkdir()
    v = matched(val=str(tmp_path / "lvis"), names=["disc", "one", "bar", "two", "square", "triangle"])
    assert v.is_lvis and v.class_map == [3, 6, 0, 1, 5]


@pytest.mark.parametrize(
    ("section", "text"),
    [
        (["bar"], r"'fewshot: \['bar'\]' in '.*data.yaml' has no list of novel .* 'fewshot: \{novel: \[square\]\}'"),
        ({}, "has no list of novel classes"),
        ({"novel": "triangle"}, "has no list of novel classes"),
        (None, "has no list of novel classes"),
        (
            {"novel": ["triangle", "trangle"]},
            r"'fewshot: novel' in '.*' lists trangle, which is not among its classes\. Use",
        ),
        ({"novel": [4, 1, -1]}, r"lists 4, -1, .* ids from 0 to 3"),
        ({"novel": [True, 1.5, ["bar"]]}, r"lists True, 1\.5, \['bar'\], "),
    ],
)
def test_malformed_sections_are_an_error_that_names_the_remedy(matched, section, text):
    with pytest.raises(ValueError, match=text):
        matched(fewshot=section)


def test_novel_are_the_enrolled_classes(write, val):
    v = val(write(), enrolled=["triangle", "bar"])
    assert v.metrics.novel == {KNOWN.index("triangle"), KNOWN.index("bar")}
    assert saved(v)["novel"]["instances"] == 3 and saved(v)["base"]["instances"] == 4


@pytest.mark.parametrize(("keys", "kwargs"), [({}, {}), (NOVEL, {"single_cls": True})])
def test_without_novel_classes_the_output_is_ultralytics(write, val, keys, kwargs):
    v = val(write(**keys), **kwargs)
    assert list(v.metrics.results_dict) == list(DetMetrics().results_dict) and v.metrics.groups == {}
    assert list(v.save_dir.iterdir()) == []
    assert not [x for x in v.lines if x.split()[:1] in (["base"], ["novel"], ["harmonic"])]


@pytest.mark.parametrize("save_json", [False, True])
def test_in_training_nothing_changes(write, network, tmp_path, save_json):
    content = check_det_dataset(write(**NOVEL))
    model = copy.deepcopy(network.model)
    model.names, model.enrolled = dict(enumerate([*SHAPES, "star"])), {"disc": {}}
    model.loss = lambda batch, preds: (None, {"box": torch.ones(())})
    trainer = SimpleNamespace(
        device=torch.device("cpu"),
        data=content,
        amp=False,
        loss_items={"box": torch.zeros(())},
        ema=SimpleNamespace(ema=model),
        stopper=SimpleNamespace(possible_stop=False),
        epoch=0,
        epochs=2,
        world_size=1,
        label_loss_items=lambda loss, prefix: {f"{prefix}/box": loss["box"]},
    )
    results, logs = [], ([], [])
    for cls, lines in zip((Oracle, StockOracle), logs):
        args = {"imgsz": 96, "workers": 0, "plots": False, "data": content["yaml_file"], "save_json": save_json}
        v = cls(save_dir=tmp_path / cls.__name__, args=args)
        v.stride, v.data, v.device = 32, content, trainer.device
        v.dataloader = v.get_dataloader(content["val"], 4)
        with pytest.MonkeyPatch.context() as m:
            m.setattr(LOGGER, "info", lines.append)
            results.append(list(v(trainer).items()))
        assert list(v.save_dir.iterdir()) == []
    assert results[0] == results[1] and dict(results[0])["metrics/mAP50-95(B)"] > 0.3
    logs = [[x for x in lines if "DONE" not in x] for lines in logs]  # without the time it took
    assert logs[0] == logs[1] and (len(logs[0]) == 1) is not save_json


def test_labels_of_any_id_are_counted(write, val, tmp_path):
    """Ultralytics drops those whose id in the data is none of the model."""
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    cv2.imwrite(str(tmp_path / "images" / "1.png"), np.full((96, 96, 3), 200, dtype=np.uint8))
    (tmp_path / "labels" / "1.txt").write_text("7 0.2 0.5 0.25 0.4\n8 0.5 0.5 0.25 0.4\n9 0.8 0.5 0.25 0.4\n")
    names = [*"abcdef", *reversed(SHAPES)]  # 7 to 9: triangle, disc, square
    v = val(write(names=names, val=str(tmp_path / "images"), fewshot={"novel": ["triangle"]}))
    assert v.metrics.nt_per_class.tolist() == [0, 1, 0, 1, 1]
    (tmp_path / "labels" / "1.txt").write_text("5 0.2 0.5 0.25 0.4\n")
    with pytest.raises(ValueError, match="show f, which the model does not know"):
        val(write(names=names, val=str(tmp_path / "images")))


def coco_ap(v, categories):
    """AP50 and AP50-95 if the data had these categories only."""
    from faster_coco_eval import COCO, COCOeval_faster

    truth, predictions = copy.deepcopy((v.truth, v.predictions))
    truth["categories"] = [x for x in truth["categories"] if x["id"] in categories]
    truth["annotations"] = [x for x in truth["annotations"] if x["category_id"] in categories]
    truth = COCO(truth)
    found = truth.loadRes([x for x in predictions if x["category_id"] in categories])
    val = COCOeval_faster(truth, found, iouType="bbox", lvis_style=v.is_lvis, print_function=lambda _: None)
    val.run()
    return val.stats_as_dict["AP_50"], val.stats_as_dict["AP_all"]


def check_coco(v, base, novel):
    """Check all that is reported against the AP of the categories of base and novel classes alone."""
    aps = {"base": coco_ap(v, base), "novel": coco_ap(v, novel)}
    assert 0.1 < aps["novel"][1] < aps["base"][1] < aps["base"][0] < 0.9 < aps["novel"][0]
    aps["harmonic mean"] = [2 / (1 / b + 1 / n) for b, n in zip(aps["base"], aps["novel"])]
    for name, ap in aps.items():
        key = {"harmonic mean": "HM"}.get(name, name)
        for results in (v.stats, v.metrics.results_dict):
            assert [results[f"metrics/{key}_{k}(COCO)"] for k in ("AP50", "AP50-95")] == pytest.approx(ap)
        row = saved(v)[name]
        assert list(row)[-2:] == ["COCO AP50", "COCO AP50-95"]
        assert list(row.values())[-2:] == pytest.approx(ap, abs=1e-6)
        assert f"{name:>22} COCO AP50 = {ap[0]:.3f}, COCO AP50-95 = {ap[1]:.3f}" in v.lines
    assert sum("(AP) @[ IoU=0.75 " in x for x in v.lines) == 1  # only Ultralytics' own table


def test_coco_figures(write, val):
    pytest.importorskip("faster_coco_eval")
    v = val(write(**NOVEL), save_json=True)
    base, novel = ([KNOWN.index(x) + 1 for x in names] for names in (("square", "disc", "star"), ("bar", "triangle")))
    check_coco(v, base, novel)


def test_no_coco_figures_of_classes_without_labels(write, val):
    pytest.importorskip("faster_coco_eval")
    v = val(write(fewshot={"novel": ["bar"]}), save_json=True)
    keys = {f"metrics/base_{k}" for k in ("mAP50(B)", "mAP50-95(B)", "AP50(COCO)", "AP50-95(COCO)")}
    assert set(v.metrics.results_dict) - set(DetMetrics().results_dict) == keys
    assert list(saved(v)) == ["base", "novel"] and "COCO AP50" not in saved(v)["novel"]


@pytest.mark.parametrize(
    ("kind", "split", "file", "first"),
    [("coco", "val2017.txt", "instances_val2017.json", 13), ("lvis", "val.txt", "lvis_v1_val.json", 12)],
)
def test_coco_figures_of_coco_and_lvis(write, val, tmp_path, kind, split, file, first):
    """Their annotations are a file, whose category ids follow the order of the data, not of the model."""
    pytest.importorskip("faster_coco_eval")
    root = tmp_path / kind
    for folder in ("annotations", "images", "labels"):
        (root / folder).mkdir(parents=True)
    names = [*"abcdefghijk", *SHAPES]  # the shapes have the ids 11 to 14, which are categories 13 to 16 in COCO
    truth = {"images": [], "annotations": [], "categories": [{"id": c, "frequency": "f"} for c in range(1, 17)]}
    for name, classes in SHOWN.items():
        absent = {"neg_category_ids": [first + 1] * (name == "4"), "not_exhaustive_category_ids": []}
        truth["images"].append({"id": int(name), "width": 96, "height": 96, **absent})
        cv2.imwrite(str(root / "images" / f"{name}.png"), np.full((96, 96, 3), 200, dtype=np.uint8))
        lines = [f"{c + 11} {x} 0.5 0.25 0.4" for c, x in zip(classes, CENTERS)]
        (root / "labels" / f"{name}.txt").write_text("\n".join(lines))
        for c, x in zip(classes, CENTERS):
            box = {"bbox": [(x - 0.125) * 96, 0.3 * 96, 24, 0.4 * 96], "area": 24 * 0.4 * 96, "iscrowd": 0}
            number = len(truth["annotations"]) + 1
            truth["annotations"].append({"id": number, "image_id": int(name), "category_id": c + first, **box})
    (root / split).write_text("\n".join(str(root / "images" / f"{name}.png") for name in SHOWN))
    (root / "annotations" / file).write_text(json.dumps(truth))
    v = val(write(path=str(root), val=str(root / split), names=names, fewshot={"novel": ["bar", "triangle"]}))
    assert (v.is_coco, v.is_lvis) == (kind == "coco", kind == "lvis")
    square, disc, triangle, bar = range(first, first + 4)
    assert {x["category_id"] for x in v.predictions} == {square, disc, triangle}
    check_coco(v, [square, disc], [triangle, bar])
    assert v.stats["metrics/mAP50-95(B)"] == pytest.approx(coco_ap(v, [square, disc, triangle])[1])


def test_without_faster_coco_eval_the_results_are_those_without_coco(write, val, monkeypatch):
    plain = val(write(**NOVEL))
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    v = val(write(**NOVEL), save_json=True)
    assert v.metrics.results_dict == plain.metrics.results_dict and saved(v) == saved(plain)
    assert len([x for x in v.lines if "unable to run" in x]) == 1  # Ultralytics' own


def test_a_failure_of_the_coco_figures_of_base_and_novel_is_a_warning(write, val):
    pytest.importorskip("faster_coco_eval")

    class Broken(Oracle):
        def _coco_evaluate_groups(self, *args):
            raise RuntimeError("out of luck")

    v = val(write(**NOVEL), validator=Broken, save_json=True)
    assert "faster-coco-eval unable to run on base and novel classes: out of luck" in v.lines
    assert "COCO AP50" not in saved(v)["base"] and v.stats["metrics/mAP50-95(B)"] > 0.1
