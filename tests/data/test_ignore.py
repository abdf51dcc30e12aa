import csv
import random
from copy import deepcopy
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ultralytics.cfg import get_cfg
from ultralytics.data.build import build_yolo_dataset
from ultralytics.data.utils import check_det_dataset
from ultralytics.utils.loss import E2ELoss

from yolo_fewshot import FewShotTrainer
from yolo_fewshot import args as table
from yolo_fewshot.data.episodes import EpisodicDataset
from yolo_fewshot.data.ignore import MaskedDataset, has_ignored, masked
from yolo_fewshot.data.shots_and_base import ShotsAndBase
from yolo_fewshot.nn import criterion
from yolo_fewshot.nn import terms as episode_terms
from yolo_fewshot.nn.criterion import Retention, branch_losses
from yolo_fewshot.nn.ignore import IGNORED, blank_ignored, outside_regions, without_ignored
from yolo_fewshot.nn.model import FewShotDetectionModel
from yolo_fewshot.paths import cfg_dir
from yolo_fewshot.train.diagnosis import describe_batch

STILL = dict.fromkeys(("mosaic", "mixup", "fliplr", "flipud", "scale", "translate", "hsv_h", "hsv_s", "hsv_v"), 0.0)
FAMILIES = ["yolo11n-fewshot.yaml", "yolo26n-fewshot.yaml"]
NC, B, HEIGHT, WIDTH = 4, 4, 64, 96


def image(file, boxes=((8, 8, 24, 24),)):
    image = np.full((64, 64, 3), 200, np.uint8)
    for i, (x, y, w, h) in enumerate(boxes):
        cv2.rectangle(image, (x, y), (x + w, y + h), (0, 0, 255) if i else (255, 0, 0), -1)
    file.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(file), image)


def write(file, *lines):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{x}\n" for x in lines))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two data sets of the same images: `all` labels both objects, `part` says of one to ignore it."""
    root = tmp_path_factory.mktemp("masked")
    rng = np.random.default_rng(0)
    for i in range(18):
        split = "train" if i < 12 else "val"
        boxes = [(*rng.integers(2, 10, 2).tolist(), 22, 20), (*rng.integers(34, 40, 2).tolist(), 20, 22)]
        xywh = [f"{(x + w / 2) / 64} {(y + h / 2) / 64} {w / 64} {h / 64}" for x, y, w, h in boxes]
        rows = [f"{(i + j) % 2} {box}" for j, box in enumerate(xywh)]
        for kind in ("all", "part"):
            image(root / kind / f"images/{split}/{i:02}.png", boxes)
        write(root / f"all/labels/{split}/{i:02}.txt", *rows)
        part = i % 3 > 0
        write(root / f"part/labels/{split}/{i:02}.txt", *rows[: 1 if part else 2])
        if part:
            write(root / f"part/ignore/{split}/{i:02}.txt", xywh[1])
    lines = ["train: images/train", "val: images/val", "names: [blue, red]", "fewshot: {novel: [], ignore: ignore}"]
    for kind in ("all", "part"):
        write(root / kind / "data.yaml", f"path: {root / kind}", *lines[: 4 if kind == "part" else 3])
    text = (cfg_dir() / "yolo11-fewshot.yaml").read_text()
    write(root / "yolo11n-tiny.yaml", text.replace("n: [0.50, 0.25, 1024]", "n: [0.50, 0.125, 1024]"))
    return root


def load(root, mode="train", **values):
    """The data set of a folder as training builds it."""
    data = check_det_dataset(str(root / "data.yaml"))
    cfg = get_cfg(overrides={"imgsz": 64, "task": "detect", **STILL, **values})
    return masked(build_yolo_dataset(cfg, data[mode], 8, data, mode=mode), data, mode)


def items(dataset, seed=0):
    """All images, augmented with one seed."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return [dataset[i] for i in range(len(dataset))]


# Reading


def plain(tmp_path, files, ignore="ignore"):
    """A data set of some images with a label each, whose boxes to ignore are read from a folder."""
    data = {"names": {0: "a"}, "nc": 1, "channels": 3, "fewshot": {"ignore": ignore}}
    for file in files:
        image(file)
    (tmp_path / "list.txt").write_text("".join(f"{x}\n" for x in files))
    cfg = get_cfg(overrides={"imgsz": 64, "task": "detect", **STILL})
    return lambda: masked(build_yolo_dataset(cfg, str(tmp_path / "list.txt"), 8, data), data, "train")


def test_boxes_are_read_from_a_folder_beside_the_labels(tmp_path):
    build = plain(tmp_path, [tmp_path / f"images/train/{i}.png" for i in range(3)], "unlabeled")
    for i in range(3):
        write(tmp_path / f"labels/train/{i}.txt", "0 0.3 0.3 0.4 0.4")
    write(tmp_path / "unlabeled/train/0.txt", "0.5 0.6 0.25 0.125", "", "0.25 0.25 0.5 0.5")
    write(tmp_path / "unlabeled/train/1.txt", "")  # empty, and 2 has none
    write(tmp_path / "ignore/train/1.txt", "0.5 0.5 0.1 0.1")  # another folder
    dataset = build()
    assert type(dataset) is MaskedDataset
    assert list(dataset.ignored) == [str(tmp_path / "images/train/0.png")]
    boxes = dataset.ignored[str(tmp_path / "images/train/0.png")]
    assert boxes.dtype == np.float32 and boxes.tolist() == [[0.5, np.float32(0.6), 0.25, 0.125], [0.25, 0.25, 0.5, 0.5]]
    assert [len(dataset[i]["cls"]) for i in range(3)] == [3, 1, 1]


def test_the_last_folder_of_labels_in_a_path_counts(tmp_path):
    root = tmp_path / "labels/site/labels/b"
    build = plain(tmp_path, [root / "images/train/0.png"])
    write(root / "labels/train/0.txt", "0 0.3 0.3 0.4 0.4")
    write(root / "ignore/train/0.txt", "0.5 0.5 0.25 0.25")
    for wrong in ("ignore/site/labels/b/labels", "labels/site/ignore/b/labels", "ignore/site/ignore/b/ignore"):
        write(tmp_path / wrong / "train/0.txt", "0.1 0.1 0.1 0.1")
    (boxes,) = build().ignored.values()
    assert boxes.tolist() == [[0.5, 0.5, 0.25, 0.25]]


def test_images_in_a_folder_called_labels(tmp_path):
    build = plain(tmp_path, [tmp_path / "images/labels/0.png"])
    write(tmp_path / "labels/labels/0.txt", "0 0.3 0.3 0.4 0.4")
    write(tmp_path / "ignore/labels/0.txt", "0.5 0.5 0.25 0.25")
    assert len(build().ignored) == 1


def test_labels_beside_their_images_are_not_taken_for_ignore_regions(tmp_path):
    build = plain(tmp_path, [tmp_path / "photos/0.png"])
    write(tmp_path / "photos/0.txt", "0 0.3 0.3 0.4 0.4")
    assert not build().ignored


def test_a_data_set_without_such_files_has_nothing_to_ignore(tmp_path):
    build = plain(tmp_path, [tmp_path / "images/train/0.png"])
    write(tmp_path / "labels/train/0.txt", "0 0.3 0.3 0.4 0.4")
    dataset = build()
    assert dataset.ignored == {} and not has_ignored(dataset) and dataset[0]["cls"].tolist() == [[0.0]]


@pytest.mark.parametrize("line", ["0 0.5 0.5 0.1 0.1", "0.5 0.5 0.1"])
def test_malformed_lines_are_an_error_that_names_the_file(tmp_path, line):
    build = plain(tmp_path, [tmp_path / "images/train/0.png"])
    write(tmp_path / "labels/train/0.txt", "0 0.3 0.3 0.4 0.4")
    write(tmp_path / "ignore/train/0.txt", "0.5 0.5 0.1 0.1", line)
    with pytest.raises(ValueError, match=r"ignore.train.0\.txt must have lines of four numbers"):
        build()


def test_a_word_among_the_numbers_is_an_error_that_names_the_file(tmp_path):
    build = plain(tmp_path, [tmp_path / "images/train/0.png"])
    write(tmp_path / "labels/train/0.txt", "0 0.3 0.3 0.4 0.4")
    write(tmp_path / "ignore/train/0.txt", "0.5 0.5 0.1 wide")
    with pytest.raises(ValueError, match=r"0\.txt"):
        build()


@pytest.mark.parametrize("section", [None, {}, {"ignore": None}, {"novel": ["red"]}, "ignore", []])
def test_data_that_names_no_folder_are_left_alone(data, section):
    dataset = load(data / "all")
    assert masked(dataset, {"fewshot": section}, "train") is dataset
    assert masked(dataset, {}, "train") is dataset and not has_ignored(dataset)


def test_validation_images_are_not_masked(data):
    dataset = load(data / "part", "val")
    assert type(dataset) is not MaskedDataset
    assert all(IGNORED not in x["cls"] for x in items(dataset))
    assert [len(x["cls"]) for x in items(dataset)] == [len(x["cls"]) for x in dataset.labels]


def test_ignore_regions_are_found_in_nested_data_sets(data):
    clean, some = load(data / "all"), load(data / "part")
    assert has_ignored(some) and not has_ignored(clean)
    assert has_ignored(EpisodicDataset(some)) and not has_ignored(EpisodicDataset(clean))
    assert has_ignored(ShotsAndBase([clean, some])) and has_ignored(ShotsAndBase([some, clean]))
    assert not has_ignored(ShotsAndBase([clean, clean]))


# Augmentation


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"fliplr": 1.0},
        {"flipud": 1.0},
        {"scale": 0.5, "translate": 0.2},
        {"degrees": 30.0},
        {"mosaic": 1.0},
        {"mosaic": 1.0, "mixup": 1.0, "fliplr": 0.5, "scale": 0.5},
    ],
    ids=lambda x: "-".join(x) or "none",
)
def test_boxes_follow_their_image_as_labeled_ones_do(data, values):
    some, whole = items(load(data / "part", **values), 3), items(load(data / "all", **values), 3)
    for a, b in zip(some, whole):
        assert torch.equal(a["img"], b["img"]) and torch.equal(a["bboxes"], b["bboxes"])
        known = a["cls"] != IGNORED
        assert torch.equal(a["cls"][known], b["cls"][known])
    ignored = torch.cat([x["bboxes"][x["cls"].view(-1) == IGNORED] for x in some])
    assert len(ignored) > 4
    if values:  # it did move something
        rest = torch.cat([x["bboxes"][x["cls"].view(-1) == IGNORED] for x in items(load(data / "part"))])
        assert ignored.shape != rest.shape or not torch.allclose(ignored, rest)


def test_the_labels_of_a_data_set_stay_clean(data):
    dataset = load(data / "part", mosaic=1.0)
    before = deepcopy(dataset.labels)
    assert any(IGNORED in x["cls"] for x in items(dataset))
    assert len(before) == len(dataset.labels)
    for a, b in zip(before, dataset.labels):
        assert np.array_equal(a["cls"], b["cls"]) and np.array_equal(a["bboxes"], b["bboxes"])
        assert (b["cls"] >= 0).all()
    assert {k: v.tolist() for k, v in dataset.ignored.items()} == {
        k: v.tolist() for k, v in load(data / "part").ignored.items()
    }


def test_labels_with_outlines_can_be_mixed_with_ignore_regions(tmp_path):
    build = plain(tmp_path, [tmp_path / f"images/train/{i}.png" for i in range(4)])
    for i in range(4):
        write(tmp_path / f"labels/train/{i}.txt", "0 0.1 0.1 0.5 0.1 0.5 0.5 0.1 0.5")
    write(tmp_path / "ignore/train/0.txt", "0.75 0.75 0.25 0.25")
    dataset = build()
    dataset.transforms = dataset.build_transforms(get_cfg(overrides={"imgsz": 64, **STILL, "mosaic": 1.0}))
    for x in items(dataset):
        assert len(x["cls"]) == len(x["bboxes"])


@pytest.fixture
def polygons(tmp_path):
    """Two data sets of the same images with outlines: `all` labels both objects, `part` says of one to ignore it.

    The object that both label is a triangle; the last image has no label in `part`.
    """
    for i in range(4):
        for kind in ("all", "part"):
            image(tmp_path / kind / f"images/train/{i}.png", [(6 + i, 6, 20, 20), (8, 36 + i, 18, 20)])
        x, first = (6 + i) / 64, i < 3
        triangle = f"0 {x} {6 / 64} {x + 20 / 64} {6 / 64} {x} {26 / 64}"
        box = [17 / 64, (46 + i) / 64, 18 / 64, 20 / 64]
        x1, y1, x2, y2 = box[0] - box[2] / 2, box[1] - box[3] / 2, box[0] + box[2] / 2, box[1] + box[3] / 2
        write(tmp_path / f"all/labels/train/{i}.txt", triangle, f"1 {x1} {y1} {x2} {y1} {x2} {y2} {x1} {y2}")
        write(tmp_path / f"part/labels/train/{i}.txt", *[triangle] * first)
        boxes = [box] if first else [box, [(16 + i) / 64, 16 / 64, 20 / 64, 20 / 64]]
        write(tmp_path / f"part/ignore/train/{i}.txt", *(" ".join(map(str, b)) for b in boxes))
    lines = ["train: images/train", "val: images/train", "names: [blue, red]", "fewshot: {ignore: ignore}"]
    for kind in ("all", "part"):
        write(tmp_path / kind / "data.yaml", f"path: {tmp_path / kind}", *lines[: 4 if kind == "part" else 3])
    return tmp_path


@pytest.mark.parametrize("values", [{"degrees": 30.0}, {"degrees": 30.0, "fliplr": 0.5, "scale": 0.2}, {"shear": 10.0}])
def test_polygons_keep_the_boxes_of_ultralytics_beside_ignore_regions(polygons, values):
    some, whole = items(load(polygons / "part", **values), 3), items(load(polygons / "all", **values), 3)
    for a, b in zip(some[:3], whole[:3]):
        assert torch.equal(a["img"], b["img"]) and a["cls"].flatten().tolist() == [0, IGNORED]
        assert torch.equal(a["bboxes"][0], b["bboxes"][0])
        torch.testing.assert_close(a["bboxes"][1], b["bboxes"][1])  # a box, whether it is to be ignored or not
    assert some[3]["cls"].flatten().tolist() == [IGNORED] * 2


def test_pasted_copies_of_ignore_regions_are_ignored(polygons):
    values = {"copy_paste": 1.0, "copy_paste_mode": "flip"}
    some, whole = items(load(polygons / "part", **values)), items(load(polygons / "all", **values))
    plain = items(load(polygons / "part"))
    for a, b, p in zip(some[:3], whole, plain):
        assert torch.equal(a["img"], b["img"]) and torch.equal(a["bboxes"], b["bboxes"])
        assert torch.equal(a["cls"] == 0, b["cls"] == 0) and torch.equal(a["cls"] == IGNORED, b["cls"] == 1)
        mirrored = p["bboxes"] * torch.tensor([-1.0, 1, 1, 1]) + torch.tensor([1.0, 0, 0, 0])
        for c in (0, IGNORED):
            found = a["bboxes"][a["cls"].flatten() == c]
            expected = torch.cat([x[p["cls"].flatten() == c] for x in (p["bboxes"], mirrored)])
            torch.testing.assert_close(found, expected, rtol=0, atol=0.02)
    assert set(some[3]["cls"].flatten().tolist()) == {IGNORED}


@pytest.mark.parametrize("values", [{}, {"copy_paste": 1.0}, {"copy_paste": 1.0, "copy_paste_mode": "mixup"}])
def test_images_without_a_label_can_be_mixed_with_polygons(polygons, values):
    some = items(load(polygons / "part", mosaic=1.0, mixup=1.0, **values), 1)
    whole = items(load(polygons / "all", mosaic=1.0, mixup=1.0, **values), 1)
    for a, b in zip(some, whole):
        assert len(a["cls"]) == len(a["bboxes"]) > 0 and {0, IGNORED} == set(a["cls"].flatten().tolist())
        assert a["img"].shape == b["img"].shape


# Parts of a batch


def test_the_objects_of_a_batch_are_divided():
    batch = {
        "cls": torch.tensor([[2.0], [IGNORED], [0.0], [IGNORED]]),
        "bboxes": torch.arange(16.0).view(4, 4),
        "batch_idx": torch.tensor([0.0, 0.0, 1.0, 2.0]),
        "img": torch.zeros(3, 3, 8, 8),
        "im_file": ["a", "b", "c"],
    }
    before = {k: v.clone() for k, v in batch.items() if isinstance(v, torch.Tensor)}
    clean, ignored = without_ignored(batch)
    assert clean["cls"].tolist() == [[2.0], [0.0]] and clean["batch_idx"].tolist() == [0.0, 1.0]
    assert clean["bboxes"].tolist() == [[0, 1, 2, 3], [8, 9, 10, 11]]
    assert ignored.tolist() == [[0, 4, 5, 6, 7], [2, 12, 13, 14, 15]]
    assert clean["img"] is batch["img"] and clean["im_file"] is batch["im_file"]
    assert all(torch.equal(batch[k], v) for k, v in before.items())  # the trainer still plots it


def test_blanked_objects_are_padding_to_the_loss_and_ignore_regions_to_the_mask():
    batch = batch_of()
    kept, ignored = without_ignored(batch)
    blanked, every = blank_ignored(batch)
    for name, (loss, preds) in zip(FAMILIES, branches(make(FAMILIES[1], 2), batch)):
        found = []
        for x in (kept, blanked):
            this = loss.begin(preds, x)
            loss.terms(this)
            found.append(this.assignment[:4])
        fg = found[0][3]
        assert fg.any() and torch.equal(found[1][3], fg), name
        assert all(torch.equal(a[fg], b[fg]) for a, b in zip(*found)) and torch.equal(found[0][2], found[1][2])
    anchors = torch.rand(50, 2) * torch.tensor([WIDTH, HEIGHT])
    assert torch.equal(
        outside_regions(every, anchors, (WIDTH, HEIGHT), B), outside_regions(ignored, anchors, (WIDTH, HEIGHT), B)
    )
    assert IGNORED in batch["cls"] and IGNORED not in blanked["cls"] and blanked["img"] is batch["img"]


@pytest.mark.parametrize("n", [0, 1, 40])
def test_outside_equals_a_loop(n):
    g = torch.Generator().manual_seed(n)
    images, w, h = 5, 96.0, 64.0
    ignored = torch.cat([torch.randint(images - 1, (n, 1), generator=g), torch.rand(n, 4, generator=g)], 1)
    ignored[:, 3:] *= 0.4
    anchors = torch.rand(60, 2, generator=g) * torch.tensor([w, h])
    expected = torch.ones(images, 60, dtype=torch.bool)
    for b, x, y, bw, bh in ignored.tolist():
        for a, (ax, ay) in enumerate(anchors.tolist()):
            if (x - bw / 2) * w < ax < (x + bw / 2) * w and (y - bh / 2) * h < ay < (y + bh / 2) * h:
                expected[int(b), a] = False
    found = outside_regions(ignored, anchors, torch.tensor([w, h]), images)
    assert found.dtype == torch.bool and torch.equal(found, expected)
    assert bool(found[-1].all()) and (n < 40 or 20 < int((~found).sum()) < 280)


# Loss


def batch_of(ignored=True):
    """An episode whose images are wider than high; of four boxes to ignore one covers a labeled object."""
    g = torch.Generator().manual_seed(0)
    rows = [(0, 0, 0.3, 0.3), (0, 2, 0.7, 0.6), (1, 1, 0.4, 0.5), (2, 0, 0.3, 0.4), (3, 1, 0.6, 0.5), (3, 3, 0.2, 0.3)]
    rows = [(*r, 0.3, 0.4) for r in rows]
    if ignored:  # here and there among the others
        rows.insert(1, (0, IGNORED, 0.8, 0.2, 0.3, 0.3))
        rows.insert(4, (2, IGNORED, 0.35, 0.45, 0.6, 0.7))
        rows += [(2, IGNORED, 0.8, 0.8, 0.3, 0.3), (3, IGNORED, 0.85, 0.5, 0.25, 0.9)]
    rows = torch.tensor(sorted(rows, key=lambda x: x[0]), dtype=torch.float)  # by image, as they are collated
    return {
        "img": torch.rand(B, 3, HEIGHT, WIDTH, generator=g),
        "batch_idx": rows[:, 0],
        "cls": rows[:, 1:2],
        "bboxes": rows[:, 2:],
        "support": torch.tensor([True, True, False, False]),
        "way": torch.tensor([0, 1, 0, 1]),
    }


def make(cfg=FAMILIES[0], stage=1, weights=None):
    torch.manual_seed(0)
    model = FewShotDetectionModel(cfg, nc=NC, verbose=False)
    gains = {"supcon": 1.2, "cpe": 0.6, "triplet": 0.3} if stage == 2 else {}
    args = {**table.resolve({"stage": stage, **gains}), "cpe_iou": 0.0}
    model.args = SimpleNamespace(**{"box": 7.5, "cls": 0.5, "dfl": 0.15, "epochs": 2, **args})
    if weights is not None:
        model.class_weights = torch.tensor(weights)
    return model.train()


def branches(model, batch):
    """The loss and the predictions of each branch; the predictions are leaves."""
    preds = model(batch["img"])
    preds = [preds[k] for k in ("one2many", "one2one")] if "one2many" in preds else [preds]
    leaves = ("boxes", "scores", "embeds")
    preds = [{k: v.detach().clone().requires_grad_() if k in leaves else v for k, v in p.items()} for p in preds]
    model.criterion = model.init_criterion()
    assert isinstance(model.criterion, E2ELoss) == (len(preds) == 2)
    return list(zip(branch_losses(model), preds))


def naive_outside(batch, preds):
    """Which anchors are in no box to ignore, (B, A), by loops over images, levels, rows and columns."""
    result = []
    for b in range(B):
        row = []
        for i, f in enumerate(preds["feats"]):
            h, w = f.shape[2:]
            assert h * 8 * 2**i == HEIGHT and w * 8 * 2**i == WIDTH
            for y in range(h):
                for x in range(w):
                    px, py = (x + 0.5) / w, (y + 0.5) / h
                    row.append(
                        not any(
                            bool(abs(px - cx) < bw / 2 and abs(py - cy) < bh / 2)
                            for (cx, cy, bw, bh), c, j in zip(
                                batch["bboxes"].tolist(), batch["cls"].flatten(), batch["batch_idx"]
                            )
                            if c == IGNORED and j == b
                        )
                    )
        result.append(row)
    return torch.tensor(result)


def assigned(loss, preds):
    """Target scores and foreground of a batch in which nothing is to be ignored."""
    this = loss.begin(preds, batch_of(False))
    loss.terms(this)
    return this.assignment.scores, this.assignment.fg_mask


@pytest.mark.parametrize("weights", [None, [0.5, 1.0, 2.0, 0.25]])
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("cfg", FAMILIES)
def test_the_class_loss_leaves_background_in_ignore_regions_out(cfg, stage, weights):
    batch, model = batch_of(), make(cfg, stage, weights)
    for loss, preds in branches(model, batch):
        targets, fg = assigned(loss, preds)
        free = naive_outside(batch, preds)
        inside = [(fg & ~free).sum().item(), (~fg & ~free).sum().item()]
        assert inside[0] > 0 and inside[1] > 5  # objects in boxes to ignore, and background
        total = 0.0
        for b in range(B):
            for a in range(free.shape[1]):
                if fg[b, a] or free[b, a]:
                    bce = F.binary_cross_entropy_with_logits(preds["scores"][b, :, a], targets[b, a], reduction="none")
                    total += (bce * torch.tensor(weights or [1.0] * NC)).sum().item()
        loss.masked = True
        items = loss.loss(preds, batch)[1]
        assert items["cls_loss"].item() == pytest.approx(0.5 * total / max(targets.sum().item(), 1), rel=1e-4)
        loss.masked = False
        unmasked = loss.loss(preds, batch_of(False))[1]
        assert unmasked["cls_loss"] > 1.002 * items["cls_loss"]


@pytest.mark.parametrize("cfg", FAMILIES)
def test_distillation_covers_ignore_regions(cfg):
    batch, model = batch_of(), make(cfg, 3)
    found, silent = branches(model, batch), [0, 2]
    taught = {**batch, "teacher": [torch.rand(B, p["scores"].shape[2], 2) for _, p in found]}
    for i, (loss, preds) in enumerate(found):
        targets, fg = assigned(loss, preds)
        free, scores = naive_outside(batch, preds), preds["scores"].detach().transpose(1, 2)
        bce = F.binary_cross_entropy_with_logits(scores, targets, reduction="none")
        cls = bce[fg].sum() + bce[free & ~fg][:, [1, 3]].sum()  # background in those boxes counts for no class
        known, told = torch.distributions.Bernoulli(logits=scores[~fg][:, silent]), taught["teacher"][i][~fg]
        tea = torch.distributions.kl_divergence(torch.distributions.Bernoulli(told), known).sum()
        none = torch.zeros(0, dtype=torch.long)
        loss.retention = Retention(i, torch.tensor(silent), torch.zeros(0, 128), none, torch.zeros(0, NC))
        loss.masked = True
        items = loss.loss(preds, taught)[1]
        mass = max(targets.sum().item(), 1)
        assert items["cls_loss"].item() == pytest.approx(0.5 * cls.item() / mass, rel=1e-4)
        assert items["tea_loss"].item() == pytest.approx(0.5 * tea.item() / mass, rel=1e-4)
        assert items["mem_loss"] == 0


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("cfg", FAMILIES)
def test_other_terms_are_those_of_the_labeled_objects(cfg, stage):
    model = make(cfg, stage)
    for loss, preds in branches(model, batch_of()):
        plain = loss.loss(preds, batch_of(False))[1]
        loss.masked = True
        items = loss.loss(preds, batch_of())[1]
        same = set(items) - {"cls_loss", "epi_loss", "cpe_loss"}
        assert len(same) == (4 if stage == 2 else 2) and all(torch.equal(items[k], plain[k]) for k in same)
        assert all(items[k] > 0 for k in same)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("cfg", FAMILIES)
def test_gradients_are_zero_at_ignored_background_alone(cfg, stage):
    batch, model = batch_of(), make(cfg, stage)
    for loss, preds in branches(model, batch):
        fg = assigned(loss, preds)[1]
        ignored = ~naive_outside(batch, preds) & ~fg
        loss.masked = True
        torch.manual_seed(0)
        terms = loss.loss(preds, batch)[0]
        grads = torch.autograd.grad(terms.sum(), [preds["scores"], preds["embeds"]], allow_unused=True)
        assert torch.equal(grads[0].eq(0).all(1), ignored)
        assert torch.equal(grads[0].ne(0).all(1), ~ignored)
        assert (grads[1] is None) == (stage == 1)
        if stage == 2:
            still, query = grads[1].eq(0).all(1), ~batch["support"]
            assert still[ignored].all() and torch.equal(still[query], ignored[query])


@pytest.mark.parametrize("cfg", FAMILIES)
def test_the_episode_term_leaves_them_out(cfg, monkeypatch):
    batch, model = batch_of(), make(cfg, 2)
    for loss, preds in branches(model, batch):
        fg, seen = assigned(loss, preds)[1], []
        term = loss.episode_terms[0]
        monkeypatch.setattr(term, "forward", lambda e, f=term.forward, s=seen: s.append(e) or f(e))
        loss.masked = True
        value = loss.loss(preds, batch)[1]["epi_loss"].item()
        prototypes, ways, shown = seen[0].prototypes, seen[0].ways, seen[0].query
        query, targets = preds["embeds"].transpose(1, 2)[shown], seen[0].assignment.scores[shown]
        counted = (naive_outside(batch, preds) | fg)[2:]
        assert not counted.all() and ways.tolist() == [0, 1, 2]
        level = [i for i, f in enumerate(preds["feats"]) for _ in range(f.shape[2] * f.shape[3])]
        total = 0.0
        for b in range(2):
            for a in range(len(level)):
                if counted[b, a]:
                    scale, bias = preds["logit_scale"][level[a]], preds["logit_bias"][level[a]]
                    logits = scale * (prototypes @ query[b, a]) + bias
                    y = targets[b, a, ways]
                    total += F.binary_cross_entropy_with_logits(logits, y, reduction="sum").item()
        expected = 0.5 * total / max(targets[..., ways].sum().item(), 1)
        assert value == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("cfg", FAMILIES)
def test_the_background_of_the_proposal_term_leaves_them_out(cfg, monkeypatch):
    batch, model = batch_of(), make(cfg, 2)
    for loss, preds in branches(model, batch):
        fg, seen = assigned(loss, preds)[1], []
        monkeypatch.setattr(loss, "project", lambda x: x)
        monkeypatch.setattr(loss.episode_terms[1], "forward", lambda e: torch.tensor(0.0))
        monkeypatch.setattr(loss.episode_terms[2].loss, "forward", lambda *a, s=seen: s.append(a) or a[0].sum() * 0)
        loss.masked = True
        torch.manual_seed(5)
        loss.loss(preds, batch)
        torch.manual_seed(5)
        free, n = naive_outside(batch, preds), preds["embeds"].shape[2]
        drawn = torch.randint(B * n, (episode_terms.CPE_ANCHORS // 4,)).tolist()
        background = [i for i in drawn if not fg[i // n, i % n]]
        chosen = [i for i in background if free[i // n, i % n]]
        assert len(background) > len(chosen) > 10
        rows, labels, _, counted = seen[0]
        assert (labels >= 0).sum() == (counted & (labels >= 0)).sum() == fg.sum()
        expected = torch.stack([preds["embeds"][i // n, :, i % n] for i in chosen])
        assert torch.equal(rows[counted & (labels < 0)], expected)


@pytest.mark.parametrize("weights", [None, [0.5, 1.0, 2.0, 0.25]])
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("cfg", FAMILIES)
def test_a_batch_with_nothing_to_ignore_has_the_same_loss_bit_by_bit(cfg, stage, weights):
    model = make(cfg, stage, weights)
    for loss, preds in branches(model, batch_of()):
        results = []
        for loss.masked in (False, True):
            torch.manual_seed(0)
            terms = loss.loss(preds, batch_of(False))[0]
            results.append([terms, *torch.autograd.grad(terms.sum(), [preds["scores"], preds["boxes"]])])
        assert all(torch.equal(a, b) for a, b in zip(*results))


def test_an_image_with_ignore_regions_alone_has_no_gradient_there():
    batch, model = batch_of(), make()
    rows = torch.tensor([[b, IGNORED, 0.5, 0.5, 1.0, 1.0] for b in range(B)])
    batch = {**batch, "batch_idx": rows[:, 0], "cls": rows[:, 1:2], "bboxes": rows[:, 2:]}
    ((loss, preds),) = branches(model, batch)
    loss.masked = True
    terms, items = loss.loss(preds, batch)
    assert not any(items.values()) and not torch.autograd.grad(terms.sum(), preds["scores"])[0].any()


# Training


def stop_plotting(trainer):
    trainer.args.plots = trainer.validator.args.plots = False


def train(root, name, cfg, **overrides):
    """The trainer of a run, and how many anchors were inside boxes to ignore in each of its batches."""
    common = {
        "imgsz": 64, "workers": 0, "optimizer": "AdamW", "lr0": 0.001, "warmup_epochs": 0, "verbose": False,
        "model": str(root / "yolo11n-tiny.yaml"), "project": str(root), "name": name, "exist_ok": True, "val": False,
    }  # fmt: skip
    trainer = FewShotTrainer(cfg, {**common, "epochs": 2, "data": str(root / "part/data.yaml"), **overrides})
    trainer.add_callback("on_train_epoch_end", stop_plotting)  # after the batches that are wanted
    inside, original = [], criterion.outside_regions
    with pytest.MonkeyPatch.context() as m:
        m.setattr(criterion, "outside_regions", lambda *a: inside.append(int((~(x := original(*a))).sum())) or x)
        trainer.train()
    return trainer, inside


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cfg", "overrides"),
    [
        ("stage1.yaml", {"batch": 6, "nbs": 6, "plots": True, "cls_pw": 0.5}),
        ("stage2.yaml", {"n_way": 2, "episodes": 3, "plots": True, "doctor": 1}),
    ],
)
def test_a_run_with_ignore_regions(data, cfg, overrides):
    trainer, inside = train(data, cfg.removesuffix(".yaml"), cfg, **overrides)
    batches = 2 * (2 if cfg == "stage1.yaml" else 3)
    assert len(inside) == batches and all(inside)  # of the training, not of the validation
    assert all(x.masked for x in branch_losses(trainer.model))
    assert type(trainer.test_loader.dataset) is not MaskedDataset
    with open(trainer.csv) as f:
        head, *rows = list(csv.reader(f))
    assert len(rows) == 2
    for name, *values in zip(head, *rows):
        if name.startswith("train/"):
            assert np.isfinite([float(v) for v in values]).all(), name
    skipped = [float(x[head.index("train/skipped")]) for x in rows]
    assert skipped == [0, 0] and float(rows[0][head.index("train/cls_loss")]) > 0
    assert (trainer.save_dir / "train_batch0.jpg").stat().st_size > 1000
    assert trainer.best.exists()


@pytest.mark.slow
def test_a_run_with_nothing_to_ignore_is_not_masked(data):
    trainer, inside = train(data, "all", "stage1.yaml", data=str(data / "all/data.yaml"), epochs=1, plots=False)
    assert not inside and not any(x.masked for x in branch_losses(trainer.model))


def test_ignore_regions_are_no_class_of_a_batch_that_is_named():
    text = describe_batch({"cls": torch.tensor([[0.0], [IGNORED]]), "im_file": ["a.png"]}, {0: "blue"})
    assert text == "Batch of blue: a.png."
