import copy
import csv
import inspect
import logging
import re
import shutil
import threading
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from ultralytics import YOLO
from ultralytics.nn.modules.head import Detect
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import YAML

from yolo_fewshot import FewShotYOLO, files
from yolo_fewshot.data.demo import BASE, NOVEL, SIZE, draw_glyph, draw_scene
from yolo_fewshot.enroll import enroll as enrollment
from yolo_fewshot.enroll import features
from yolo_fewshot.nn.model import FewShotDetectionModel

SHOTS = "fewshot-demo-novel.yaml"
ALL = [*BASE, *NOVEL]


@pytest.fixture
def model(trained):
    return FewShotYOLO(trained[1].best)


@pytest.fixture(scope="module")
def queries(demo):
    return sorted((demo / "images/novel_query").glob("*.jpg"))[:8]


@pytest.fixture(scope="module")
def tensor(queries):
    """The queries as the network takes them."""
    images = [cv2.resize(cv2.imread(str(f)), (96, 96))[..., ::-1].copy() for f in queries]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Two images each of an hourglass and of a star, as a data.yaml."""
    return scenes(tmp_path_factory.mktemp("few"), [("hourglass", 0)] * 2 + [("star", 1)] * 2, ["hourglass", "star"])


def scenes(root, objects, names, file="shots.yaml"):
    """Write an image for every (glyph, class index), with its label, and return the data.yaml."""
    rng = np.random.default_rng(0)
    for folder in ("images", "labels"):
        (root / folder).mkdir(parents=True)
    for i, (glyph, c) in enumerate(objects):
        image, boxes = draw_scene([glyph], rng)
        x1, y1, x2, y2 = boxes[0] / SIZE
        assert cv2.imwrite(str(root / f"images/{i:02}.png"), image)
        (root / f"labels/{i:02}.txt").write_text(f"{c} {(x1 + x2) / 2} {(y1 + y2) / 2} {x2 - x1} {y2 - y1}\n")
    YAML.save(root / file, {"path": str(root), "train": "images", "names": names})
    return root / file


def crops(demo, root):
    """Cut the five shots of every novel class out of their images."""
    for image in (demo / "novel_5shot.txt").read_text().split():
        pixels = cv2.imread(str(demo / image))
        rows = (demo / image.replace("images", "labels")).with_suffix(".txt").read_text().splitlines()
        for i, row in enumerate(rows):
            c, x, y, w, h = map(float, row.split())
            x1, y1, x2, y2 = (round(v * SIZE) for v in (x - w / 2, y - h / 2, x + w / 2, y + h / 2))
            file = root / ALL[int(c)] / f"{Path(image).stem}-{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            assert cv2.imwrite(str(file), pixels[y1:y2, x1:x2])
    return root


def predict(model, source, **kwargs):
    results = model.predict(source, **{"imgsz": 96, "conf": 0.05, "verbose": False, **kwargs})
    return [r.boxes.data for r in results]


def logits(model, tensor):
    """Raw class logits of the network, (B, nc, A)."""
    network = model.model.eval()
    with torch.no_grad():
        return network(tensor)[1]["scores"]


def classifiers(model):
    """What the model knows of every class, by name."""
    head = model.model.model[-1]
    return {name: head.get_class(i) for i, name in model.names.items()}


def equal(a, b):
    return all(torch.equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True))


def novel_map50(model):
    return model.val(data=SHOTS, imgsz=96, workers=0, plots=False, verbose=False).box.map50


@pytest.fixture
def calls(monkeypatch):
    """The (support set, imgsz, method) of every enrollment."""
    seen, stock = [], enrollment.enroll

    def enroll(*args, **kwargs):
        given = inspect.signature(stock).bind(*args, **kwargs).arguments
        seen.append((given["support"].source.name, given["imgsz"], given["method"]))
        return stock(*args, **kwargs)

    monkeypatch.setattr(enrollment, "enroll", enroll)
    return seen


# Which class a model gets ---------------------------------------------------------------------------------------------


def test_a_few_shot_checkpoint_is_a_few_shot_yolo_and_a_folded_one_holds_a_stock_network(enrolled, queries, tmp_path):
    model = YOLO(enrolled)
    assert type(model) is FewShotYOLO and type(model.model) is FewShotDetectionModel
    before = predict(model, queries)
    assert sum(map(len, before)) > 20 and {int(c) for x in before for c in x[:, 5]} & set(range(24, 32))
    assert model.fold() is model and type(model.model) is DetectionModel and type(model.model.model[-1]) is Detect
    for a, b in zip(before, predict(model, queries), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    model.save(tmp_path / "folded.pt")
    folded = YOLO(tmp_path / "folded.pt")
    assert type(folded) is FewShotYOLO and type(folded.model) is DetectionModel and list(folded.names.values()) == ALL
    assert tuple(folded.model.enrolled) == NOVEL
    for a, b in zip(before, predict(folded, queries), strict=True):
        torch.testing.assert_close(a[:, 4:], b[:, 4:], rtol=0, atol=1e-4)
        torch.testing.assert_close(a, b, rtol=0, atol=1e-3)


def test_a_yaml_and_a_stock_model():
    assert type(YOLO("yolo11n-fewshot.yaml", verbose=False)) is FewShotYOLO
    assert type(YOLO("yolo11n.yaml", verbose=False)) is YOLO


# Enrollment -------------------------------------------------------------------------------------------------------


def test_a_yaml_and_a_list_enroll_the_same(model, demo, tmp_path):
    assert model.enroll(SHOTS, method="mean") == dict.fromkeys(NOVEL, 5)
    assert list(model.names.values()) == ALL and model.model.nc == model.model.yaml["nc"] == 32
    for image in (demo / "novel_5shot.txt").read_text().split():
        for file in (image, image.replace("images", "labels").replace(".jpg", ".txt")):
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(demo / file, tmp_path / file)
    (tmp_path / "list.txt").write_text((demo / "novel_5shot.txt").read_text())
    (tmp_path / "classes.txt").write_text("\n".join(ALL))
    expected = classifiers(model)
    other = FewShotYOLO(model.ckpt_path)
    assert other.enroll(str(tmp_path / "list.txt"), method="mean") == dict.fromkeys(NOVEL, 5)
    assert all(equal(v, expected[k]) for k, v in classifiers(other).items()) and other.names == model.names


def test_crops_enroll_about_as_well_as_labeled_images(model, demo, tmp_path):
    assert model.enroll(crops(demo, tmp_path / "crops")) == dict.fromkeys(sorted(NOVEL), 5)
    assert list(model.names.values()) == [*BASE, *sorted(NOVEL)]
    ap = novel_map50(model)
    print(f"novel mAP50 {ap:.3f} from crops")
    assert ap > 0.25


def test_each_method_does_what_it_says(model):
    found = {}
    for method in ("mean", "fit", "auto"):
        other = copy.deepcopy(model)
        other.enroll(SHOTS, method=method)
        bank = other.model.model[-1].prototypes
        gain, offset = bank.gain[24:], bank.offset[24:]
        used = [x["method"] for x in other.model.enrolled.values()]
        if method == "mean":
            assert (gain - 1).abs().max() < 1e-5 and not offset.any() and set(used) == {"mean"}
        elif method == "fit":
            assert (gain != 1).all() and offset.all() and set(used) == {"fit"}
        found[method] = classifiers(other)
        assert bank.gain[:24].eq(1).all() and not bank.offset[:24].any()
    assert not any(equal(found["mean"][n], found["fit"][n]) for n in NOVEL)
    assert all(equal(found["auto"][n], found[used[i]][n]) for i, n in enumerate(NOVEL))


def test_enrollment_changes_no_weight_and_no_logit_of_a_trained_class(model, tensor):
    before = {k: v.clone() for k, v in model.model.state_dict().items()}
    scores = logits(model, tensor)
    model.enroll(SHOTS)
    after = model.model.state_dict()
    assert before.keys() == after.keys()
    grown = {k for k in before if before[k].shape != after[k].shape}
    assert grown == {f"model.23.prototypes.{x}" for x in ("weight", "gain", "offset", "frozen")}
    assert all(torch.equal(before[k], after[k][: len(before[k])] if k in grown else after[k]) for k in before)
    new = logits(model, tensor)
    assert new.shape[1] == 32 and scores.std() > 1
    torch.testing.assert_close(new[:, :24], scores, rtol=0, atol=1e-4)
    assert not model.model.training and next(model.model.parameters()).device.type == "cpu"


def test_a_network_in_training_mode_enrolls_the_same(model, few):
    expected = copy.deepcopy(model)
    expected.enroll(few, method="mean")
    model.model.train()  # as after YOLO("fewshot.yaml").load("best.pt")
    model.enroll(few, method="mean")
    a, b = model.model.state_dict(), expected.model.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in b)  # the statistics of BatchNorm among them


def test_enrolling_again_replaces_and_adds_nothing(model, few):
    model.enroll(SHOTS, method="mean")
    first = classifiers(model)
    model.enroll(few)
    second = classifiers(model)
    assert list(second) == ALL and model.model.enrolled["hourglass"]["shots"] == 2
    assert {n for n in ALL if not equal(first[n], second[n])} == {"hourglass", "star"}
    assert list(model.model.enrolled) == [*NOVEL, "star"]


def test_enrollment_looks_at_mirrored_images_where_training_did(model, few, monkeypatch):
    seen, stock = [], features.make_view
    monkeypatch.setattr(
        features, "make_view", lambda batch, view, stride: seen.append(view) or stock(batch, view, stride)
    )
    model.enroll(few)
    assert model.ckpt["train_args"]["fliplr"] > 0 and model.ckpt["train_args"]["hsv_v"] > 0
    assert {v.flip for v in seen} == {True, False} and {v.gain for v in seen} == {0.8, 1.0, 1.2}
    seen.clear()
    model.ckpt["train_args"].update(fliplr=0.0, hsv_v=0.0)
    torch.save(model.ckpt, few.parent / "unflipped.pt")
    FewShotYOLO(few.parent / "unflipped.pt").enroll(few)
    assert {v.flip for v in seen} == {False} and {v.gain for v in seen} == {1.0}


def test_images_have_the_size_of_training_if_none_is_given(model, few, calls):
    model.enroll(few)
    model.enroll(few, imgsz=128, method="fit")
    model.predict(np.zeros((96, 96, 3), np.uint8), support=few, imgsz=(96, 160), verbose=False)
    model.predict(np.zeros((96, 96, 3), np.uint8), support=few, enroll="mean", verbose=False)
    assert [c[1:] for c in calls] == [(96, "auto"), (128, "fit"), (160, "auto"), (96, "mean")]


def test_devices_in_every_form_of_ultralytics(model, few):
    for device in (None, "", "cpu", ["cpu"], torch.device("cpu")):
        assert model.enroll(few, device=device, method="mean") == {"hourglass": 2, "star": 2}


@pytest.fixture
def selected(monkeypatch):
    """The devices that were asked for; each is the CPU."""
    seen = []

    def select(device, **_):
        seen.append(device)
        return torch.device("cpu")

    monkeypatch.setattr("yolo_fewshot.yolo.select_device", select)
    return seen


def test_classes_are_enrolled_where_ultralytics_predicts(model, few, queries, selected):
    model.enroll(few, method="mean")
    predict(model, queries[:1], support=few, enroll="mean")
    predict(model, queries[:1], support=few, enroll="fit", device="cpu")
    model.overrides["device"] = ["cpu"]
    predict(model, queries[:1], support=few, enroll="mean")
    assert selected == ["", "", "cpu", ["cpu"]]  # "" is the current GPU, if there is one


def test_classes_are_enrolled_where_the_user_has_moved_the_model(model, few, selected, monkeypatch):
    devices = []
    monkeypatch.setattr(
        enrollment, "enroll", lambda network, *_: devices.append(next(network.parameters()).device) or 1 / 0
    )
    model.to("meta")
    with pytest.raises(ZeroDivisionError):
        model.enroll(few)
    assert devices == [torch.device("meta")] and not selected


def test_the_batch_size_of_the_user_is_that_of_enrollment(model, few, both, queries, monkeypatch):
    stock, sizes = enrollment.enroll, []

    def enroll(*args):
        sizes.append(inspect.signature(stock).bind(*args).arguments["batch"])
        return stock(*args)

    monkeypatch.setattr(enrollment, "enroll", enroll)
    image = np.zeros((96, 96, 3), np.uint8)
    for mode, given in (
        (model.predict, {}),
        (model.predict, {"batch": 3}),
        (model.track, {}),
        (model.track, {"batch": 2}),
    ):
        model._changed()
        mode(image, support=few, enroll="mean", verbose=False, **given)
    model.val(data=both, support=SHOTS, enroll="mean", imgsz=96, batch=5, workers=0, plots=False, verbose=False)
    assert sizes == [16, 3, 16, 2, 5]


def test_a_support_set_of_a_few_hundred_small_images(model, tmp_path):
    rng = np.random.default_rng(0)
    for name in ("hourglass", "umbrella", "hash"):
        (tmp_path / name).mkdir()
        for i in range(70):
            ink = draw_glyph(name, int(rng.integers(24, 44)), rng)
            image = 200 - ink[..., None] * rng.integers(100, 200, 3)
            assert cv2.imwrite(str(tmp_path / name / f"{i}.png"), image.astype(np.uint8))
    assert model.enroll(tmp_path, imgsz=64, batch=64) == {"hash": 70, "hourglass": 70, "umbrella": 70}
    assert all(x["conf"] is not None for x in model.model.enrolled.values())


# What is logged -------------------------------------------------------------------------------------------------------


def table(caplog):
    """The rows of the last table of enrolled classes."""
    text = next(r.message for r in reversed(caplog.records) if "Enrolled class" in r.message)
    header, *rows = text.splitlines()
    assert header.split() == ["Enrolled", "class", "Shots", "Method", "Conf"]
    assert all(len(row) == len(header) for row in rows)
    return [row.split() for row in rows]


def warnings(caplog):
    return [r.message for r in caplog.records if r.levelno == logging.WARNING]


def test_the_table_shows_shots_method_and_threshold(model, caplog, tmp_path):
    model.enroll(SHOTS, method="mean")
    rows = table(caplog)
    assert [r[:3] for r in rows] == [[name, "5", "mean"] for name in NOVEL]
    for name, *_, conf in rows:
        assert float(conf) == model.model.enrolled[name]["conf"] and 0 < float(conf) < 1
    model.enroll(scenes(tmp_path / "one", [("clover", 0)], ["clover"]), method="fit")
    assert table(caplog) == [["clover", "1", "fit", "-"]]


def test_an_enrolled_model_shows_its_table_before_it_predicts(enrolled, queries, caplog):
    model = FewShotYOLO(enrolled)
    predict(model, queries[:1])
    assert "Enrolled class" not in caplog.text  # not verbose
    model = FewShotYOLO(enrolled)
    predict(model, queries[:1], verbose=True)
    assert [r[0] for r in table(caplog)] == list(NOVEL)
    caplog.clear()
    predict(model, queries[:1], verbose=True)  # once is enough
    assert "Enrolled class" not in caplog.text


def test_a_trained_class_that_is_enrolled_anew_is_named(model, few, caplog):
    model.enroll(few)
    (text,) = warnings(caplog)
    assert "star: trained classes, which are enrolled again" in text and "hourglass" not in text
    caplog.clear()
    model.enroll(few)  # by now it is an enrolled class
    assert not warnings(caplog)


def test_a_trained_class_that_is_labeled_beside_a_new_one_stays_as_it_is(model, tmp_path, tensor, caplog):
    shots, before = scenes(tmp_path, [("hourglass", 0)] * 3, ["hourglass", "star"]), logits(model, tensor)
    for i in range(3):  # the image shows no star, but its labels say so
        with open(tmp_path / f"labels/{i:02}.txt", "a") as f:
            f.write("1 0.1 0.1 0.2 0.2\n")
    for _ in range(2):  # the second time hourglass is known, too
        caplog.clear()
        assert model.enroll(shots) == {"hourglass": 3}
        assert "star: trained classes, which are kept unchanged" in caplog.text
        assert not any("enrolled again" in text for text in warnings(caplog))
        torch.testing.assert_close(logits(model, tensor)[:, :24], before, rtol=0, atol=1e-4)
        assert list(model.model.enrolled) == ["hourglass"]


def label_beside(root, images, c):
    """Label another class in some images, which do not show it."""
    for i in images:
        with open(root / f"labels/{i:02}.txt", "a") as f:
            f.write(f"{c} 0.1 0.1 0.2 0.2\n")


@pytest.fixture
def later(tmp_path):
    """Three images of clovers, a new class, which label an hourglass, too; and one image of an hourglass alone."""
    names = ["clover", "hourglass", "star"]
    shots = scenes(tmp_path / "later", [("clover", 0)] * 3 + [("hourglass", 1)], names)
    label_beside(shots.parent, range(3), 1)
    return shots


def without(shots, image):
    """Take an image out of a support set."""
    (shots.parent / f"images/{image:02}.png").unlink()
    return shots


def test_an_enrolled_class_that_is_labeled_beside_a_new_one_stays_as_it_is(model, few, later, tensor, caplog):
    model.enroll(few)
    before, record = logits(model, tensor), dict(model.model.enrolled["hourglass"])
    assert model.enroll(without(later, 3)) == {"clover": 3}
    assert "hourglass: already enrolled classes, which are kept unchanged" in caplog.text
    torch.testing.assert_close(logits(model, tensor)[:, :25], before, rtol=0, atol=1e-4)
    assert model.model.enrolled["hourglass"] == record and list(model.model.enrolled) == ["hourglass", "star", "clover"]


def test_its_objects_there_are_negatives(model, few, later):
    model.enroll(few)
    other = copy.deepcopy(model)
    model.enroll(without(later, 3), method="fit")
    for file in (later.parent / "labels").glob("*.txt"):
        file.write_text(file.read_text().splitlines()[0])
    other.enroll(later, method="fit")  # the same images, where that place is background
    a, b = (classifiers(m)["clover"] for m in (model, other))
    assert not equal(a, b)
    names, cls = [], []
    for m in (model, other):
        names.append(list(m.names.values()))
        cls.append(m.model.enrolled["clover"]["shots"])
    assert names[0] == names[1] and cls == [3, 3]


@pytest.mark.parametrize("form", ["yaml", "list", "predict", "export"])
def test_an_enrolled_class_with_an_image_of_its_own_is_enrolled_anew(
    model, few, later, queries, caplog, monkeypatch, form
):
    model.enroll(few)
    before = classifiers(model)
    support = later
    if form == "list":
        support = later.parent / "list.txt"
        (later.parent / "classes.txt").write_text("clover\nhourglass\nstar")
        support.write_text("\n".join(f"./images/{i:02}.png" for i in range(4)))
    if form == "predict":
        predict(model, queries[:1], support=support)
    elif form == "export":
        monkeypatch.setattr("ultralytics.engine.model.Model.export", lambda self, **kwargs: "a.onnx")
        model.export(support=support, imgsz=96)
    else:
        assert model.enroll(support) == {"clover": 3, "hourglass": 4}
    assert "hourglass: already enrolled classes, which are enrolled again" in caplog.text
    after = classifiers(model)
    assert [n for n in before if not equal(before[n], after[n])] == ["hourglass"]
    assert model.model.enrolled["hourglass"]["shots"] == 4


def test_crops_of_an_enrolled_class_enroll_it_anew(model, demo, tmp_path):
    root = crops(demo, tmp_path / "crops")
    model.enroll(root, method="mean")
    shutil.rmtree(root / "umbrella")
    model.forget("umbrella")
    expected = {n: 5 for n in sorted(NOVEL) if n != "umbrella"}
    assert model.enroll(root, method="mean") == expected


def test_a_trained_class_beside_an_enrolled_one_stays_as_it_is(model, few, later, tensor):
    model.enroll(few, method="mean")
    model.forget("star")
    before = logits(model, tensor)
    label_beside(later.parent, [3], 2)
    assert model.enroll(later) == {"clover": 3, "hourglass": 4}  # not star, which only images of hourglasses label
    torch.testing.assert_close(logits(model, tensor)[:, :24], before[:, :24], rtol=0, atol=1e-4)


def test_new_classes_are_not_said_to_be_enrolled_anew(model, caplog):
    model.enroll(SHOTS, method="mean")
    assert not any("again" in text for text in warnings(caplog))


def test_a_suspect_shot_is_named(model, few, caplog, monkeypatch):
    seen = []

    def agreement(features, labels, n):
        seen.append((labels.tolist(), n))
        return stock(features, labels, n)._replace(suspect=labels == 1)

    stock = enrollment.agreement
    monkeypatch.setattr(enrollment, "agreement", agreement)
    model.enroll(few)
    assert seen == [([0, 0, 1, 1], 2)]  # once
    a, b = (few.parent / f"images/{i}.png" for i in ("02", "03"))
    assert f"star: check {a}, {b}, which look more like another class" in warnings(caplog)[-1]
    assert model.shots.suspect == {"star": [str(a), str(b)]}


# The image of the shots ---------------------------------------------------------------------------------------------


def test_enrolling_draws_the_shots_only_where_it_is_told(model, few, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    model.enroll(few, method="mean")
    assert not any(tmp_path.iterdir()) and "Plotting" not in caplog.text
    assert model.enroll(few, method="mean", plot="a/check.png") == {"hourglass": 2, "star": 2}
    height, width, _ = cv2.imread("a/check.png").shape
    assert height > 250 and width > 400 and "Plotting support set to a/check.png... " in caplog.text
    monkeypatch.setattr("yolo_fewshot.plots.support.imread", lambda _: 1 / 0)
    assert model.enroll(few, method="mean", plot=tmp_path / "b.png") == {"hourglass": 2, "star": 2}
    assert "Plotting error" in warnings(caplog)[-1] and not (tmp_path / "b.png").exists()
    assert list(model.model.enrolled) == ["hourglass", "star"]


def test_predictions_that_are_saved_have_the_shots_beside_them_once(model, few, queries, tmp_path, caplog, monkeypatch):
    def drawn(name, **kwargs):
        predict(model, queries[:1], support=few, enroll="mean", project=str(tmp_path), name=name, **kwargs)
        return (tmp_path / name / "support_check.png").exists()

    monkeypatch.setattr("ultralytics.engine.model.Model.export", lambda self, **kwargs: "a.onnx")
    assert model.export(support=few, enroll="mean", imgsz=96) == "a.onnx" and "Plotting" not in caplog.text
    assert not drawn("not saved") and not (tmp_path / "not saved").exists()
    assert drawn("saved", save=True)
    assert f"Plotting support set to {tmp_path / 'saved/support_check.png'}... " in caplog.text
    assert not drawn("again", save=True) and (tmp_path / "again").exists()  # it was not enrolled again
    model.forget("hourglass")
    assert drawn("anew", save_txt=True)
    model.forget("hourglass")
    where = {"project": str(tmp_path), "name": "stream", "save": True, "imgsz": 96, "verbose": False}
    results = model.predict(queries[:1], support=few, enroll="mean", stream=True, **where)
    assert (tmp_path / "stream/support_check.png").exists() and len(list(results)) == 1
    assert sorted(x.name for x in (tmp_path / "stream").iterdir()) == [queries[0].name, "support_check.png"]
    assert caplog.text.count("Plotting support set") == 3


# Forgetting -----------------------------------------------------------------------------------------------------------


def test_forgetting_every_class_gives_the_old_model_back(model, queries):
    before, weights = predict(model, queries), {k: v.clone() for k, v in model.model.state_dict().items()}
    model.enroll(SHOTS, method="mean")
    predict(model, queries)
    for name in NOVEL:
        assert model.forget(name) is model
    after = model.model.state_dict()
    assert all(torch.equal(weights[k], after[k]) for k in weights) and weights.keys() == after.keys()
    assert list(model.names.values()) == list(BASE) and model.model.nc == model.model.yaml["nc"] == 24
    assert model.model.enrolled == {} and model.model.model[-1].nc == 24
    assert all(torch.equal(a, b) for a, b in zip(before, predict(model, queries), strict=True))


def test_classes_after_a_forgotten_one_move_up(model, tensor):
    model.enroll(SHOTS, method="mean")
    before = logits(model, tensor)
    model.forget("umbrella")
    left = [i for i, n in enumerate(ALL) if n != "umbrella"]
    assert list(model.names.items()) == list(enumerate(ALL[i] for i in left))
    torch.testing.assert_close(logits(model, tensor), before[:, left], rtol=0, atol=1e-4)
    assert list(model.model.enrolled) == [n for n in NOVEL if n != "umbrella"]
    model.enroll(SHOTS, method="mean")  # it comes back, behind the others
    assert list(model.names.values()) == [*(ALL[i] for i in left), "umbrella"]


def test_a_trained_class_gets_its_own_classifier_back(model, few, tensor):
    before = logits(model, tensor)
    star = BASE.index("star")
    model.enroll(few)
    first = logits(model, tensor)
    assert (first[:, star] - before[:, star]).abs().max() > 0.1
    model.enroll(few, method="mean")  # twice: what it was trained with must not be lost
    model.forget("star")
    torch.testing.assert_close(logits(model, tensor)[:, :24], before, rtol=1e-4, atol=1e-4)
    assert list(model.names.values()) == [*BASE, "hourglass"] and list(model.model.enrolled) == ["hourglass"]


def test_only_enrolled_classes_are_forgotten(model, few):
    with pytest.raises(ValueError, match=r"'star' was not enrolled, .* No class is enrolled\."):
        model.forget("star")
    model.enroll(few)
    model.forget("star")
    for name in ("star", "unicorn"):
        with pytest.raises(ValueError, match=rf"'{name}' was not enrolled, .* Enrolled are hourglass\."):
            model.forget(name)


# Saving ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["mean", "fit"])
def test_a_saved_model_predicts_the_same(model, queries, tmp_path, method):
    model.enroll(SHOTS, method=method)
    before = predict(model, queries)
    assert {int(c) for x in before for c in x[:, 5]} & set(range(24, 32))
    model.save(tmp_path / "site.pt")
    again = YOLO(tmp_path / "site.pt")
    for a, b in zip(before, predict(again, queries), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    assert all(equal(v, classifiers(again)[k]) for k, v in classifiers(model).items())
    assert (
        again.names == model.names and again.model.memory and again.model.prior_strength == model.model.prior_strength
    )
    assert again.model.enrolled == model.model.enrolled and again.ckpt["train_args"] == model.ckpt["train_args"]
    again.forget("hourglass")
    assert "hourglass" in model.names.values()


def test_a_trained_class_can_be_forgotten_after_saving(model, few, tensor, tmp_path):
    before = logits(model, tensor)
    model.enroll(few)
    model.save(tmp_path / "site.pt")
    again = YOLO(tmp_path / "site.pt").forget("star")
    torch.testing.assert_close(logits(again, tensor)[:, :24], before, rtol=1e-4, atol=1e-4)


def test_saving_leaves_the_model_as_it_is(model, few, tmp_path):
    model.enroll(few)
    before = {k: v.clone() for k, v in model.model.state_dict().items()}
    model.save(tmp_path / "site.pt")
    after = model.model.state_dict()
    assert all(torch.equal(before[k], after[k]) and before[k].dtype == after[k].dtype for k in before)


@pytest.mark.parametrize("where", ["replace", "fsync"])
def test_a_failing_write_leaves_the_old_file(model, tmp_path, monkeypatch, where):
    def fail(*args):
        raise OSError("disk full")

    (tmp_path / "site.pt").write_bytes(b"old")
    monkeypatch.setattr(files.os, where, fail)
    with pytest.raises(OSError, match="disk full"):
        model.save(tmp_path / "site.pt")
    assert [x.name for x in tmp_path.iterdir()] == ["site.pt"]
    assert (tmp_path / "site.pt").read_bytes() == b"old"
    monkeypatch.undo()
    model.save(tmp_path / "site.pt")
    assert type(YOLO(tmp_path / "site.pt")) is FewShotYOLO


# Errors ---------------------------------------------------------------------------------------------------------------


def test_models_without_a_row_for_each_class_are_refused(few, tmp_path):
    YOLO("yolo11n-cls.yaml").save(tmp_path / "classify.pt")
    model = FewShotYOLO(tmp_path / "classify.pt")
    for call, what in ((lambda: model.enroll(few), "enroll"), (lambda: model.forget("a"), "forget")):
        with pytest.raises(TypeError, match=rf"Classify head has no row for each class. {what}\(\) needs a"):
            call()
    for mode in ("predict", "track", "val", "export"):
        for wrapper in (model, YOLO(tmp_path / "classify.pt")):
            with pytest.raises(TypeError, match=r"no row for each class. 'support=.*shots.yaml' needs a YOLO model"):
                getattr(wrapper, mode)(support=few)


def test_only_a_few_shot_model_is_folded(tmp_path):
    YOLO("yolo11n.yaml").save(tmp_path / "stock.pt")
    with pytest.raises(TypeError, match=r"stock\.pt' has no few-shot head, so that there is nothing to fold"):
        FewShotYOLO(tmp_path / "stock.pt").fold()


def test_a_folded_model_enrolls_on_as_a_stock_one(enrolled, few, queries, tmp_path):
    folded = FewShotYOLO(enrolled).fold()
    before = {k: v.clone() for k, v in folded.model.state_dict().items()}
    assert folded.enroll(few, method="fit") == {"hourglass": 2, "star": 2}  # an enrolled class, and a trained one
    assert list(folded.names.values()) == ALL and folded.model.enrolled["hourglass"]["shots"] == 2
    star, hourglass = ALL.index("star"), ALL.index("hourglass")
    others = [i for i in range(len(ALL)) if i not in {star, hourglass}]
    for i in range(3):
        for k in ("weight", "bias"):
            name = f"model.23.cv3.{i}.2.{k}"
            assert torch.equal(folded.model.state_dict()[name][others], before.pop(name)[others])
    assert before and all(torch.equal(folded.model.state_dict()[k], v) for k, v in before.items())
    folded.save(tmp_path / "folded.pt")
    again = YOLO(tmp_path / "folded.pt")
    assert type(again) is FewShotYOLO and type(again.model) is DetectionModel
    for a, b in zip(predict(folded, queries), predict(again, queries), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-2)
    again.forget("star")
    assert list(again.names.values()) == ALL  # its trained row is back
    again.forget("hourglass")
    assert list(again.names.values()) == [n for n in ALL if n != "hourglass"]


def test_an_unknown_method_is_refused_before_anything_else(model):
    for call in (
        lambda: model.enroll("missing.yaml", method="median"),
        lambda: model.predict(support="missing.yaml", enroll="median"),
    ):
        with pytest.raises(
            ValueError, match=re.escape("'enroll=median' is an invalid value. Valid 'enroll' values are")
        ):
            call()


def test_a_failing_enrollment_leaves_the_model_as_it_is(model, few, queries, monkeypatch):
    before, names = {k: v.clone() for k, v in model.model.state_dict().items()}, dict(model.names)
    with pytest.raises(FileNotFoundError, match=r"support='missing.yaml' does not exist"):
        model.predict(queries, support="missing.yaml")
    monkeypatch.setattr(enrollment, "thresholds", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.predict(queries, support=few)
    after = model.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert model.names == names and not model.model.enrolled and not model.model.training
    monkeypatch.undo()
    model.predict(queries[:1], support=few, verbose=False)  # it is not taken for done
    assert list(model.model.enrolled) == ["hourglass", "star"]


# support= with the modes ----------------------------------------------------------------------------------------------


def test_predicting_with_a_support_set_is_enrolling_and_predicting(model, enrolled, queries):
    expected = predict(FewShotYOLO(enrolled), queries)
    assert {int(c) for x in expected for c in x[:, 5]} & set(range(24, 32))
    predict(model, queries)  # what this leaves behind must not be used any more
    for a, b in zip(expected, predict(model, queries, support=SHOTS), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    for call in (model, lambda *a, **k: list(model.predict(*a, **k, stream=True))):
        other = call(queries, support=SHOTS, imgsz=96, conf=0.05, verbose=False)
        assert all(torch.equal(a, r.boxes.data) for a, r in zip(predict(model, queries), other, strict=True))


def test_the_same_support_set_is_enrolled_once_in_a_row(model, few, queries, calls, tmp_path):
    other = shutil.copytree(few.parent, tmp_path / "other") / "other.yaml"
    YAML.save(other, {"train": "images", "names": ["umbrella", "flag"]})
    (other.parent / few.name).unlink()
    predict(model, queries[:1], support=few)
    predictor = model.predictor
    predict(model, queries[:1], support=few)
    assert model.predictor is predictor and len(calls) == 1
    predict(model, queries[:1], support=other)
    assert model.predictor is not predictor and list(model.names.values()) == [*BASE, "hourglass", "umbrella", "flag"]
    for settings in ({}, {"imgsz": 64}, {"imgsz": 64, "enroll": "mean"}, {"imgsz": 64, "enroll": "mean"}):
        predict(model, queries[:1], support=few, **settings)
    assert calls == [
        ("shots.yaml", 96, "auto"),
        ("other.yaml", 96, "auto"),
        ("shots.yaml", 96, "auto"),
        ("shots.yaml", 64, "auto"),
        ("shots.yaml", 64, "mean"),
    ]


def test_a_support_set_is_enrolled_again_after_its_labels_were_corrected(model, few, queries, calls, tmp_path):
    shots = shutil.copytree(few.parent, tmp_path / "shots") / few.name
    YAML.save(shots, {"train": "images", "names": ["hourglass", "star"]})
    predict(model, queries[:1], support=shots, enroll="mean")
    first = classifiers(model)["hourglass"]
    wrong = shots.parent / "labels/03.txt"  # a star
    wrong.write_text("0" + wrong.read_text()[1:])
    predict(model, queries[:1], support=shots, enroll="mean")
    assert len(calls) == 2 and model.model.enrolled["hourglass"]["shots"] == 3
    assert not equal(classifiers(model)["hourglass"], first)


def test_a_support_set_is_enrolled_again_after_crops_were_added(model, demo, queries, calls, tmp_path):
    root = crops(demo, tmp_path / "crops")
    removed = {f: f.read_bytes() for f in sorted((root / "umbrella").iterdir())[2:]}
    for f in removed:
        f.unlink()
    predict(model, queries[:1], support=root, enroll="mean")
    for f, data in removed.items():
        f.write_bytes(data)
    for _ in range(2):
        predict(model, queries[:1], support=root, enroll="mean")
    assert len(calls) == 2 and model.model.enrolled["umbrella"]["shots"] == 5


def test_a_support_set_is_enrolled_again_after_its_class_was_forgotten(model, few, queries):
    predict(model, queries[:1], support=few)
    model.forget("hourglass")
    predict(model, queries[:1], support=few)
    assert "hourglass" in model.names.values()


def test_a_support_set_is_enrolled_again_after_another_one(model, few, queries, tmp_path):
    predict(model, queries[:1], support=few, enroll="mean")
    first = classifiers(model)["hourglass"]
    model.enroll(scenes(tmp_path / "other", [("umbrella", 0)] * 2, ["hourglass"]), method="mean")
    assert not equal(classifiers(model)["hourglass"], first)
    predict(model, queries[:1], support=few, enroll="mean")
    assert equal(classifiers(model)["hourglass"], first)


def test_a_support_set_is_enrolled_again_for_another_network(model, few, queries):
    predict(model, queries[:1], support=few)
    model.model, model.predictor = FewShotYOLO(model.ckpt_path).model, None  # as training leaves it
    predict(model, queries[:1], support=few)
    assert list(model.model.enrolled) == ["hourglass", "star"]


@pytest.mark.parametrize("change", ["load", "reset_weights", "train"])
def test_a_support_set_is_enrolled_again_after_the_weights_have_changed(
    model, few, queries, calls, monkeypatch, change
):
    others = []

    def train(self, trainer=None, **kwargs):
        others.append(threading.Thread(target=self.forget, args=("star",), daemon=True))
        others[0].start()
        others[0].join(60)
        assert not others[0].is_alive()  # it did not have to wait for the end of the training

    monkeypatch.setattr("ultralytics.engine.model.Model.train", train)
    predict(model, queries[:1], support=few)
    before = model.model
    assert model.shots is not None
    result = getattr(model, change)(*[model.ckpt_path] * (change == "load"))
    assert result is (None if change == "train" else model) and model.model is before and model.shots is None
    predict(model, queries[:1], support=few)
    assert len(calls) == 2 and model.shots is not None


def test_without_a_support_set_nothing_is_enrolled(model, queries, calls):
    predict(model, queries[:1])
    predict(model, queries[:1], support=None, enroll=None)
    assert not calls and list(model.names.values()) == list(BASE)


def test_tracking_with_a_support_set_frame_by_frame(model, queries, calls, tmp_path, caplog):
    from ultralytics.utils import ROOT

    pytest.importorskip("lap")
    thresholds = {"track_high_thresh": 0.05, "track_low_thresh": 0.01, "new_track_thresh": 0.05, "fuse_score": False}
    YAML.save(tmp_path / "tracker.yaml", {**YAML.load(ROOT / "cfg/trackers/bytetrack.yaml"), **thresholds})
    settings = {"imgsz": 96, "conf": 0.05, "tracker": tmp_path / "tracker.yaml", "verbose": False}
    settings |= {"save": True, "project": str(tmp_path), "name": "run"}
    ids = []
    for _ in range(3):
        (result,) = model.track(queries[0], support=SHOTS, persist=True, **settings)
        assert result.boxes.is_track and {result.names[int(c)] for c in result.boxes.cls} & set(NOVEL)
        ids.append(sorted(result.boxes.id.tolist()))
    assert calls == [(SHOTS, 96, "auto")] and ids[0] == ids[1] == ids[2]
    assert caplog.text.count("Plotting support set") == len(list(tmp_path.rglob("support_check.png"))) == 1


@pytest.fixture(scope="module")
def both(demo, tmp_path_factory):
    """Images of base classes and of novel ones to validate on."""
    root = tmp_path_factory.mktemp("both")
    images = [x for split in ("val", "novel_query") for x in sorted((demo / "images" / split).glob("*.jpg"))[:12]]
    (root / "val.txt").write_text("\n".join(map(str, images)))
    YAML.save(root / "data.yaml", {"train": "val.txt", "val": "val.txt", "names": ALL, "path": str(root)})
    return root / "data.yaml"


def test_validating_with_a_support_set_gives_base_and_novel_results(model, both, calls, tmp_path):
    settings = {"imgsz": 96, "workers": 0, "plots": False, "verbose": False, "project": str(tmp_path), "exist_ok": True}
    metrics = model.val(data=both, support=SHOTS, enroll="fit", name="v", **settings)
    with open(tmp_path / "v/base_novel.csv") as f:
        rows = {x["group"]: x for x in csv.DictReader(f)}
    assert list(rows) == ["base", "novel", "harmonic mean"]
    assert [int(rows[g]["images"]) for g in ("base", "novel")] == [12, 12] and int(rows["novel"]["classes"]) == 8
    base, novel, mean = (float(rows[g]["mAP50"]) for g in rows)
    assert 0.15 < novel < 1 and 0.15 < base < 1 and mean == pytest.approx(2 * base * novel / (base + novel), abs=1e-5)
    assert metrics.groups["novel"]["mAP50"] == pytest.approx(novel, abs=1e-6)
    again = model.val(data=both, support=SHOTS, enroll="fit", name="w", **{**settings, "plots": True})
    assert calls == [(SHOTS, 96, "fit")] and again.groups == metrics.groups
    assert [x.parent.name for x in tmp_path.rglob("support_check.png")] == ["w"]


def test_models_that_ultralytics_turns_into_others_are_refused():
    with pytest.raises(
        TypeError, match=r"model='yoloe-11s.yaml' is a YOLOE model for task .*FewShotYOLO needs a YOLO model"
    ):
        FewShotYOLO("yoloe-11s.yaml")
