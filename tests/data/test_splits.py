import hashlib
import json
import os
import shutil
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
from ultralytics.data.dataset import YOLODataset
from ultralytics.data.utils import check_det_dataset
from ultralytics.utils import LOGGER, ROOT, YAML

from yolo_fewshot import __version__
from yolo_fewshot.data import splits
from yolo_fewshot.data.splits import split
from yolo_fewshot.data.support import read_support
from yolo_fewshot.paths import cfg_dir

NAMES = ["ant", "bee", "cat", "dog", "elk"]
NOVEL = ["dog", "bee"]
NEW = ["ant", "cat", "elk", "dog", "bee"]
W, H = 64, 48
FOLDERS = ("a", "b", "val")  # the first two are the train split, and their images have the same names


def draw(n_classes, n=(10, 10, 12), seed=0):
    """Boxes of random images, (class, left, top, w, h) in pixels, by folder/name; some images have none."""
    rng = np.random.default_rng(seed)
    boxes = {}
    for folder, count in zip(FOLDERS, n):
        for i in range(count):
            side = rng.integers(4, 20, (rng.integers(0, 5), 2))
            corner = rng.integers(0, (W - 20, H - 20), side.shape)
            cls = rng.integers(0, n_classes, (len(side), 1))
            boxes[f"{folder}/{i:02}.png"] = np.hstack([cls, corner, side]).tolist()
    return boxes


def write_images(root, boxes):
    """Write images, each of its own."""
    rng = np.random.default_rng(0)
    for name in boxes:
        file = root / "images" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(file), rng.integers(0, 256, (H, W, 3), np.uint8))


def text_of(rows):
    """The text of a label file."""
    return "".join(
        f"{c} {(x + w / 2) / W:.6f} {(y + h / 2) / H:.6f} {w / W:.6f} {h / H:.6f}\n" for c, x, y, w, h in rows
    )


def write_yolo(root, boxes, names, **more):
    """Write a YOLO data set and return its data.yaml."""
    write_images(root, boxes)
    for name, rows in boxes.items():
        file = root / "labels" / Path(name).with_suffix(".txt")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text_of(rows))
    data = {"train": ["images/a", "images/b"], "val": "images/val", "names": dict(enumerate(names)), **more}
    YAML.save(root / "data.yaml", data)
    return root / "data.yaml"


def write_coco(root, boxes, names, ids, crowds=()):
    """Write COCO jsons of the same, in another order, and return the arguments that name them."""
    categories = [{"id": i, "name": n} for i, n in zip(ids, names)]
    for key in ("train", "val"):
        images, annotations = [], []
        for k, (name, rows) in enumerate(boxes.items()):
            if name.startswith("val") == (key == "val"):
                images.append({"id": 1000 - k, "file_name": name, "width": W, "height": H})
                for j, (c, *box) in enumerate(rows):
                    crowd = (name, j) in crowds
                    annotations.append(
                        {"image_id": 1000 - k, "category_id": ids[c], "bbox": box, "iscrowd": int(crowd)}
                    )
        content = {"images": images[::-1], "annotations": annotations[::-1], "categories": categories[::-1]}
        (root / f"{key}.json").write_text(json.dumps(content))
    return {"data": root / "train.json", "val": root / "val.json", "images": root / "images"}


def labels(out, folder, kind="labels"):
    """The lines of the label files of a folder, by the name of the image."""
    return {x.stem: x.read_text().splitlines() for x in (out / kind / folder).iterdir()}


def wanted(rows, classes):
    """The sorted lines of the objects of some classes."""
    return sorted(text_of([(NEW.index(NAMES[c]), *box) for c, *box in rows if NAMES[c] in classes]).splitlines())


def contents(out):
    """What is in every file."""
    return {str(x.relative_to(out)): x.read_bytes() for x in out.rglob("*") if x.is_file()}


@pytest.fixture(scope="module")
def boxes():
    return draw(len(NAMES))


@pytest.fixture(scope="module")
def data(boxes, tmp_path_factory):
    return write_yolo(tmp_path_factory.mktemp("data"), boxes, NAMES)


@pytest.fixture(scope="module")
def out(data, tmp_path_factory):
    target = tmp_path_factory.mktemp("out") / "split"
    assert split(data, NOVEL, target, shots=(1, 3, 5), seeds=2) == target
    return target


def stem_of(name):
    """The name of an image in the split: those of the second folder are taken."""
    return Path(name).stem + ("_2" if name.startswith("b/") else "")


def test_base_images_have_base_labels_and_ignore_every_novel_object(out, boxes):
    shown, ignored = {}, {}
    for name, rows in boxes.items():
        seen = {NAMES[c] for c, *_ in rows}
        if not name.startswith("val/") and (seen - set(NOVEL) or not seen):
            shown[stem_of(name)] = wanted(rows, NEW[:3])
            if seen & set(NOVEL):
                ignored[stem_of(name)] = [x.split(" ", 1)[1] for x in wanted(rows, NOVEL)]
    assert {k: sorted(v) for k, v in labels(out, "base_train").items()} == shown
    assert {k: sorted(v) for k, v in labels(out, "base_train", "ignore").items()} == {
        k: sorted(v) for k, v in ignored.items()
    }
    assert [] in shown.values() and 0 < len(ignored) < len(shown) < 20
    assert {x.stem for x in (out / "images/base_train").iterdir()} == shown.keys()


def test_val_images_are_base_val_and_queries(out, boxes):
    val = {Path(k).stem: v for k, v in boxes.items() if k.startswith("val/")}
    expected = {
        "base_val": {k: wanted(v, NEW[:3]) for k, v in val.items() if wanted(v, NEW[:3])},
        "query": {k: wanted(v, NEW) for k, v in val.items()},
        "novel_query": {k: wanted(v, NEW) for k, v in val.items() if wanted(v, NOVEL)},
    }
    for folder, x in expected.items():
        assert {k: sorted(v) for k, v in labels(out, folder).items()} == x
        assert {y.stem for y in (out / "images" / folder).iterdir()} == x.keys()
    novel = {
        k: sorted(y.split(" ", 1)[1] for y in wanted(v, NOVEL)) for k, v in val.items() if k in expected["base_val"]
    }
    found = {k: sorted(v) for k, v in labels(out, "base_val", "ignore").items()}
    assert found == {k: v for k, v in novel.items() if v}
    assert not labels(out, "query", "ignore") and not labels(out, "novel_query", "ignore")
    assert len(expected["novel_query"]) < len(expected["query"]) == 12


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("suffix", "classes"), [("", NOVEL), ("_all", NEW)])
def test_shots_are_exactly_k_nested_and_everything_else_is_ignored(out, boxes, seed, suffix, classes):
    rows = {stem_of(k): v for k, v in boxes.items() if not k.startswith("val/")}
    before = set()
    for k in (1, 3, 5):
        folder = f"shots/seed{seed}_{k}shot{suffix}"
        shown, ignored = labels(out, folder), labels(out, folder, "ignore")
        counts = Counter(NEW[int(x.split()[0])] for v in shown.values() for x in v)
        assert counts == dict.fromkeys(classes, k)
        for stem, lines in shown.items():
            every = [x.split(" ", 1)[1] for x in lines] + ignored.get(stem, [])
            assert sorted(every) == sorted(x.split(" ", 1)[1] for x in wanted(rows[stem], NEW)) and lines
        assert {x.stem for x in (out / "images" / folder).iterdir()} == shown.keys() >= ignored.keys()
        chosen = {(stem, x) for stem, v in shown.items() for x in v}
        assert before < chosen
        before = chosen


def test_shots_come_from_as_many_images_as_possible():
    candidates = {3: [0, 1, 2], 5: [4], 9: [1, 2]}
    drawn = splits._draw(candidates, (0, 1), 10)
    assert [{i for i, _ in drawn[:3]}, {i for i, _ in drawn[3:5]}, drawn[5][0]] == [{3, 5, 9}, {3, 9}, 3]
    assert sorted(drawn) == sorted((i, j) for i, x in candidates.items() for j in x)
    assert all(splits._draw(candidates, (0, 1), n) == drawn[:n] for n in range(7))
    many = {i: [0, 1] for i in range(50)}
    draws = [splits._draw(many, (seed, c), 10) for seed in range(3) for c in range(3)]
    assert all(len({i for i, _ in x}) == 10 for x in draws) and len({tuple(x) for x in draws}) == 9
    assert splits._draw({}, (0, 0), 3) == []


def test_no_shot_is_a_query_image_not_even_a_copy_of_one(boxes, tmp_path, caplog):
    data = write_yolo(tmp_path, boxes, NAMES)
    copied = [k for k, v in boxes.items() if not k.startswith("val/") and wanted(v, NOVEL)][:3]
    for i, name in enumerate(copied):
        shutil.copy(tmp_path / "images" / name, tmp_path / f"images/val/copy{i}.png")
    twice = next(k for k, v in boxes.items() if wanted(v, NOVEL) and wanted(v, NEW[:3]) and k not in copied)
    for kind, suffix in (("images", ".png"), ("labels", ".txt")):
        shutil.copy(tmp_path / kind / Path(twice).with_suffix(suffix), tmp_path / kind / f"b/twice{suffix}")
    out = split(data, NOVEL, tmp_path / "out", shots=[1, 3], seeds=4)
    text = "3 train images are also val images, so that they give no shots and are left out of the base images: "
    assert text in caplog.text and all(str(tmp_path / "images" / x) in caplog.text for x in copied)
    digests = [hashlib.sha256(x.read_bytes()).digest() for x in (out / "images/query").iterdir()]
    for folder in (out / "images/shots").iterdir():
        shots = [hashlib.sha256(x.read_bytes()).digest() for x in folder.iterdir()]
        assert not set(shots) & set(digests) and len(set(shots)) == len(shots)
    shown = [x.stem for x in (out / "images/base_train").iterdir()]
    assert stem_of(twice) in shown and "twice" in shown


def test_no_base_image_is_a_val_image_not_even_a_copy_of_one(boxes, tmp_path, caplog):
    data = write_yolo(tmp_path, boxes, NAMES)
    base = [k for k, v in boxes.items() if not k.startswith("val/") and (not v or wanted(v, NEW[:3]))]
    for i, name in enumerate(base[:4]):
        shutil.copy(tmp_path / "images" / name, tmp_path / f"images/val/copy{i}.png")
    out = split(data, NOVEL, tmp_path / "out", shots=1, seeds=1)
    assert "4 train images are also val images, so that they give no shots and are left out" in caplog.text
    stems = {stem_of(x) for x in base[4:]}
    assert labels(out, "base_train").keys() == {x.stem for x in (out / "images/base_train").iterdir()} == stems
    manifest = json.loads((out / "fewshot.json").read_text())
    objects = Counter(NAMES[c] for x in base[4:] for c, *_ in boxes[x] if NAMES[c] not in NOVEL)
    counts = manifest["counts"]["base_train"]
    assert counts["images"] == len(stems) and counts["objects"] == dict.fromkeys(NEW, 0) | objects
    named = {Path(x).stem for x in manifest["files"] if x.startswith("images/base_train/")}
    assert named == stems and len(base) - 4 == len(stems)


def test_without_a_base_image_that_is_no_val_image_there_is_no_split(tmp_path):
    boxes = {f"{folder}/{i}.png": [[1, 5, 5, 9, 9]] for folder in ("a", "b", "val") for i in range(3)}
    boxes["a/0.png"] = boxes["val/0.png"] = [[0, 5, 5, 9, 9]]
    data = write_yolo(tmp_path, boxes, ["cat", "dog"])
    shutil.copy(tmp_path / "images/a/0.png", tmp_path / "images/val/0.png")
    with pytest.raises(ValueError, match=r"^No train image of .*data\.yaml shows a base class"):
        split(data, "dog", tmp_path / "out", shots=1, seeds=1)
    assert not (tmp_path / "out").exists()


def test_a_seed_is_a_draw_and_the_same_one_every_time(data, out, tmp_path):
    again = split(data, NOVEL, tmp_path / "again", shots="5, 3,1,3", seeds=2)
    assert contents(again) == contents(out)
    assert labels(out, "shots/seed0_3shot") != labels(out, "shots/seed1_3shot")
    fewer = split(data, NOVEL, tmp_path / "fewer", shots=3, seeds=1)
    assert labels(fewer, "shots/seed0_3shot") == labels(out, "shots/seed0_3shot")
    assert {x.name for x in (fewer / "images/shots").iterdir()} == {"seed0_3shot", "seed0_3shot_all"}


def test_a_coco_json_gives_the_same_split(boxes, data, out, tmp_path):
    args = write_coco(tmp_path, boxes, NAMES, [3, 7, 18, 44, 90])
    coco = split(
        **args | {"images": data.parent / "images"}, novel=NOVEL, out=tmp_path / "out", shots=(1, 3, 5), seeds=2
    )
    a, b = contents(coco), contents(out)
    a_json, b_json = json.loads(a.pop("fewshot.json")), json.loads(b.pop("fewshot.json"))
    assert a == b
    more = {"val": str(args["val"]), "images": str(data.parent / "images")}
    given = {"data": str(data), "novel": NOVEL, "val": None, "images": None, "val_images": None}
    assert b_json.pop("arguments") == given
    assert a_json.pop("arguments") == given | {"data": str(args["data"])} | more
    assert a_json == b_json


def test_ignore_regions_of_the_data_stay(tmp_path):
    boxes = {
        "a/0.png": [[0, 0, 0, 10, 10]],
        "a/1.png": [[1, 20, 20, 30, 20]],
        "val/0.png": [[0, 1, 1, 9, 9], [1, 9, 9, 9, 9]],
    }
    write_images(tmp_path, boxes)
    file = write_yolo(tmp_path, boxes, ["cat", "dog"], train="images/a", fewshot={"ignore": "ignore"})
    region = "0.500000 0.500000 0.100000 0.200000"
    for name in ("a/0", "a/1", "val/0"):
        (tmp_path / "ignore" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "ignore" / f"{name}.txt").write_text(f"{region}\n")
    out = split(file, novel="cat", out=tmp_path / "out", shots=1, seeds=1)
    assert region in labels(out, "base_train", "ignore")["1"] and len(labels(out, "base_train")["1"]) == 1
    assert labels(out, "shots/seed0_1shot", "ignore")["0"] == labels(out, "query", "ignore")["0"] == [region]
    assert len(labels(out, "query")["0"]) == 2


def test_crowds_of_a_coco_json_are_ignored_and_boxes_are_clipped(tmp_path):
    boxes = {
        "a/0.png": [[0, 0, 0, 10, 10], [1, 20, 20, 30, 20]],  # a crowd of dogs
        "a/1.png": [[1, -6, 40, 16, 20], [0, 70, 10, 5, 5], [0, 5, 5, 0, 9], [0, 1, 1, 9, 9], [0, 1, 1, 9, 9]],
        "a/2.png": [[1, 4, 4, 20, 20]],  # a crowd of dogs and nothing else
        "a/3.png": [[0, 4, 4, 20, 20]],  # a crowd of cats and nothing else
        "a/4.png": [[1, 4, 4, 0.5, 20], [1, 10, 10, 20, 20]],  # one thinner than a pixel
        "val/0.png": [[0, 1, 1, 9, 9], [1, 9, 9, 9, 9], [1, 1, 9, 9, 9]],
    }
    write_images(tmp_path, boxes)
    crowds = {("a/0.png", 1), ("a/2.png", 0), ("a/3.png", 0), ("val/0.png", 2)}
    args = write_coco(tmp_path, boxes, ["cat", "dog"], [5, 9], crowds)
    out = split(**args, novel="dog", out=tmp_path / "out", shots=2, seeds=1)
    whole = text_of([(0, 1, 1, 9, 9)]).splitlines()
    assert labels(out, "base_train") == {"0": text_of([(0, 0, 0, 10, 10)]).splitlines(), "1": whole, "3": []}
    crowd, clipped, cats = (text_of([(1, *x)]).splitlines() for x in ((20, 20, 30, 20), (0, 40, 10, 8), (4, 4, 20, 20)))

    def bare(lines):
        return [x.split(" ", 1)[1] for x in lines]

    assert labels(out, "base_train", "ignore") == {"0": bare(crowd), "1": bare(clipped), "3": bare(cats)}
    assert labels(out, "shots/seed0_2shot") == {"1": clipped, "4": text_of([(1, 10, 10, 20, 20)]).splitlines()}
    thin = bare(text_of([(1, 4, 4, 0.5, 20)]).splitlines())
    assert labels(out, "shots/seed0_2shot", "ignore") == {"1": bare(whole), "4": thin}
    seen = text_of([(0, 1, 1, 9, 9), (1, 9, 9, 9, 9)]).splitlines()
    for folder in ("query", "novel_query"):
        assert labels(out, folder) == {"0": seen}
        assert labels(out, folder, "ignore") == {"0": bare(text_of([(1, 1, 9, 9, 9)]).splitlines())}
    assert len(labels(out, "base_val", "ignore")["0"]) == 2
    with pytest.raises(ValueError, match=r"1 novel classes have fewer than 3 .* dog \(2\)\. Label more, or leave them"):
        split(**args, novel="dog", out=tmp_path / "more", shots=3)


def test_images_are_links_with_names_of_their_own(tmp_path, monkeypatch):
    boxes = draw(2, (4, 4, 4), seed=1) | {"b/00_2.png": [[0, 5, 5, 9, 9]], "b/.hidden.png": [[0, 5, 5, 9, 9]]}
    boxes["a/00.png"] = boxes["b/00.png"] = [[0, 5, 5, 9, 9], [1, 5, 5, 9, 9]]
    data = write_yolo(tmp_path, boxes, ["cat", "dog"], train="list.txt")
    names = [k for k in boxes if not k.startswith("val/")]
    (tmp_path / "list.txt").write_text("".join(f"./images/{k}\n" for k in names))
    out = split(data, "dog", tmp_path / "out", shots=1, seeds=1)
    links = {os.readlink(x): x.name for x in (out / "images/base_train").iterdir()}
    assert [links[str(tmp_path / "images" / k)] for k in ("a/00.png", "b/.hidden.png", "b/00.png", "b/00_2.png")] == [
        "00.png",
        "hidden.png",
        "00_2.png",
        "00_2_2.png",
    ]


@pytest.mark.parametrize("refused", [(), ("symlink",), ("symlink", "link")])
def test_without_symbolic_links_there_are_hard_links_and_only_then_copies(data, tmp_path, monkeypatch, caplog, refused):
    def refuse(*_):
        raise OSError("a required privilege is not held by the client")

    want = contents(split(data, NOVEL, tmp_path / "linked", shots=1, seeds=1))
    for name in refused:
        monkeypatch.setattr(os, name, refuse)
    caplog.set_level("INFO", logger=LOGGER.name)
    out = split(data, NOVEL, tmp_path / "out", shots=1, seeds=1)
    assert contents(out) == want
    images = [x for x in (out / "images").rglob("*") if x.is_file()]
    originals = {x.stat().st_ino for x in (data.parent / "images").rglob("*") if x.is_file()}
    assert {x.is_symlink() for x in images} == {not refused}
    assert {x.lstat().st_ino in originals for x in images} == {refused == ("symlink",)}
    logged = [r.getMessage() for r in caplog.records if "symbolic links" in r.getMessage()]
    how = "copies" if "link" in refused else "hard links"
    assert logged == [f"The system refused symbolic links, so {len(images)} images are {how}."] * bool(refused)


def test_ultralytics_reads_the_files(out):
    for name, train, val, nc, boxes in (
        ("base", "base_train", "base_val", 3, None),
        ("data", "base_train", "query", 5, None),
        ("novel_3shot_seed1", "shots/seed1_3shot", "novel_query", 5, 6),
        ("all_3shot_seed1", "shots/seed1_3shot_all", "query", 5, 15),
    ):
        data = check_det_dataset(out / f"{name}.yaml")
        assert data["fewshot"] == {"novel": NOVEL if nc == 5 else [], "ignore": "ignore"}
        assert list(data["names"].values()) == NEW[:nc] and "path:" not in (out / f"{name}.yaml").read_text()
        assert (out / f"{name}.yaml").read_text().startswith("# ")
        for key, folder in (("train", train), ("val", val)):
            dataset = YOLODataset(data[key], data=data, imgsz=64, augment=False)
            lines = [x for v in labels(out, folder).values() for x in v]
            assert len(dataset) == len(list((out / "images" / folder).iterdir()))
            assert (
                sum(len(x["cls"]) for x in dataset.labels)
                == len(lines)
                == (boxes if key == "train" and boxes else len(lines))
            )
            assert max(x["cls"].max(initial=0) for x in dataset.labels) < nc
    for cache in (out / "labels").rglob("*.cache"):
        cache.unlink()


def test_shots_are_support_sets(out):
    for k in (1, 3, 5):
        for kind, count, known in (("novel", 2, dict(enumerate(NEW[:3]))), ("all", 5, None)):
            support = read_support(out / f"{kind}_{k}shot_seed0.yaml", known)
            counts = Counter(NEW[int(c)] for x in support.labels for c in x["cls"].flat)
            assert counts == dict.fromkeys(NEW[-count:], k) and not support.crops


def test_the_manifest(data, out):
    manifest = json.loads((out / "fewshot.json").read_text())
    files = {k: hashlib.sha256(v).hexdigest() for k, v in contents(out).items() if k != "fewshot.json"}
    assert manifest.pop("files") == files
    assert manifest.pop("arguments")["data"] == str(data)
    assert manifest.pop("version") == __version__ and manifest.pop("base") == NEW[:3]
    assert [manifest.pop(k) for k in ("novel", "seeds", "shots")] == [NOVEL, [0, 1], [1, 3, 5]]
    drawn, counts = manifest.pop("drawn"), manifest.pop("counts")
    assert not manifest
    folders = {k.split("/", 1)[1].rpartition("/")[0] for k in files if k.startswith("images/")}
    assert counts.keys() == folders
    for folder, x in counts.items():
        lines = [y for v in labels(out, folder).values() for y in v]
        assert x["images"] == len(labels(out, folder))
        assert x["ignored"] == sum(map(len, labels(out, folder, "ignore").values()))
        assert x["objects"] == dict.fromkeys(NEW, 0) | Counter(NEW[int(y.split()[0])] for y in lines)
    for seed, k in ((s, k) for s in "01" for k in "135"):
        for kind, suffix, names in (("novel", "", NOVEL), ("all", "_all", NEW)):
            shots = drawn[seed][k][kind]
            folder = f"shots/seed{seed}_{k}shot{suffix}"
            shown = [(NEW[int(y.split()[0])], stem) for stem, v in labels(out, folder).items() for y in v]
            assert list(shots) == names and all(x in files for v in shots.values() for x in v)
            assert Counter(shown) == Counter((n, Path(x).stem) for n, v in shots.items() for x in v)


def test_images_that_training_leaves_out_are_left_out(boxes, tmp_path, caplog):
    data = write_yolo(tmp_path, boxes, NAMES)
    assert cv2.imwrite(str(tmp_path / "images/a/small.png"), np.zeros((9, 20, 3), np.uint8))
    shutil.copy(tmp_path / "images/a/00.png", tmp_path / "images/val/bad.png")
    (tmp_path / "labels/val/bad.txt").write_text("9 0.5 0.5 0.1 0.1\n")
    out = split(data, NOVEL, tmp_path / "out", shots=1, seeds=1)
    assert sum(x.levelname == "WARNING" for x in caplog.records) == 1
    assert (
        f"2 images are left out, as in training: {tmp_path}/images/a/small.png: image size (9, 20) <10 pixels; "
        in caplog.text
    )
    assert f"{tmp_path}/images/val/bad.png: Label class 9 exceeds" in caplog.text
    assert not {"small", "bad"} & {x.stem for x in out.rglob("*")}


def test_a_base_class_may_have_fewer_objects_than_shots(tmp_path):
    boxes = {f"{folder}/{i}.png": [[1, 5, 5, 9, 9]] for folder in ("a", "b", "val") for i in range(3)}
    boxes["a/0.png"] = boxes["val/0.png"] = [[0, 5, 5, 9, 9], [1, 20, 20, 9, 9]]
    out = split(write_yolo(tmp_path, boxes, ["cat", "dog"]), "dog", tmp_path / "out", shots=(1, 5), seeds=1)
    counts = json.loads((out / "fewshot.json").read_text())["counts"]
    assert counts["shots/seed0_5shot_all"]["objects"] == {"cat": 1, "dog": 5}
    assert counts["base_train"] == {"images": 1, "ignored": 1, "objects": {"cat": 1, "dog": 0}}


ERRORS = {
    "unknown": ({"novel": "dgo,bee"}, ValueError, r"does not have: dgo \(similar: dog\)\. It has ant, bee"),
    "no base": ({"novel": ",".join(NAMES)}, ValueError, "names all classes of .* Leave base classes"),
    "twice": ({"novel": "dog,bee,dog"}, ValueError, "names dog more than once"),
    "none": ({"novel": " , "}, ValueError, "names no class"),
    "no file": ({"novel": "voc-split9.yaml"}, FileNotFoundError, "does not exist.* voc-split1.yaml"),
    "too few": (
        {"shots": "1,2,50"},
        ValueError,
        r"fewer than 50 .*: dog \(\d+\), bee \(\d+\)\. Label more, or set shots=1,2",
    ),
    "zero": ({"shots": (1, 0)}, ValueError, r"'shots=\(1, 0\)' is an invalid value"),
    "negative": ({"shots": -1}, ValueError, "'shots=-1' is"),
    "fraction": ({"shots": 1.5}, ValueError, "'shots=1.5' is"),
    "true": ({"shots": True}, ValueError, "'shots=True' is"),
    "no shots": ({"shots": []}, ValueError, r"'shots=\[\]' is"),
    "seeds": ({"seeds": 0}, ValueError, "'seeds=0' is an invalid value"),
    "text": ({"seeds": "many"}, ValueError, "'seeds=many' is"),
    "full": ({"out": "full"}, ValueError, "'out=.*full' exists and is not empty"),
    "a file": ({"out": "full/mine.txt"}, ValueError, "exists and is not empty"),
    "no parent": ({"out": "missing/out"}, FileNotFoundError, "Create .*missing first"),
    "json only": ({"images": "images"}, ValueError, "are for a COCO json"),
    "no data": ({"data": "none.yaml"}, FileNotFoundError, "none.yaml"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_an_error_comes_before_anything_is_written(case, data, tmp_path, monkeypatch):
    changes, error, text = ERRORS[case]
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*")), sorted(data.parent.rglob("*"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=text):
        split(**{"data": data, "novel": "dog,bee", "out": "new", "seeds": 1, "shots": 1} | changes)
    assert (sorted(tmp_path.rglob("*")), sorted(data.parent.rglob("*"))) == before


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"val": None}, ValueError, "needs all of 'train:', 'val:'"),
        ({"val": ""}, ValueError, "'val:' of .* is empty"),
        ({"val": "images/none"}, FileNotFoundError, "images/none"),
        ({"train": "images/none"}, FileNotFoundError, "'train:' of .* does not exist: .*images/none"),
        ({"train": "images/empty"}, ValueError, "No usable image in train: it lists none"),
        ({"names": ["dog", "bee", "cat", "dog", "elk"]}, ValueError, "Several classes of .* have the name dog"),
        ({"val": "images/bare"}, ValueError, "No val image of .* shows a base class"),
        ({"val": "images/base"}, ValueError, "No val image of .* shows a novel class"),
    ],
)
def test_errors_of_a_data_yaml(changes, error, text, boxes, tmp_path):
    base = {f"base/{i}.png": [[0, 5, 5, 9, 9]] for i in range(2)} | {"bare/0.png": []}
    data = YAML.load(write_yolo(tmp_path, boxes | base, NAMES)) | changes
    (tmp_path / "images/empty").mkdir()
    YAML.save(tmp_path / "data.yaml", {k: v for k, v in data.items() if v is not None})
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error, match=text):
        split(tmp_path / "data.yaml", "dog", tmp_path / "out", shots=1)
    assert sorted(tmp_path.rglob("*")) == before


def test_errors_of_a_coco_json(boxes, data, tmp_path):
    ids = [3, 7, 18, 44, 90]
    args = write_coco(tmp_path, boxes, NAMES, ids) | {"images": data.parent / "images"}

    def fails(error, text, **changes):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(error, match=text):
            split(**args | {"novel": "dog", "out": tmp_path / "out", "shots": 1} | changes)
        assert sorted(tmp_path.rglob("*")) == before

    fails(ValueError, "val= and images= must be given", val=None)
    fails(ValueError, "val= and images= must be given", images=None)
    fails(FileNotFoundError, "none.json", data=tmp_path / "none.json")
    fails(
        FileNotFoundError,
        r"12 of 12 images of .*val.json do not exist: .* and 7 more\. Correct val_images=",
        val_images=tmp_path,
    )
    fails(FileNotFoundError, r"20 of 20 images of .*train.json do not exist: .* Correct images=", images=tmp_path)
    content = json.loads((tmp_path / "val.json").read_text())
    for change, text in (
        ({"categories": [*content["categories"], {"id": 1, "name": "fox"}]}, "has categories that .* not have: fox"),
        ({"categories": [*content["categories"], {"id": 1, "name": "dog"}]}, r"Several classes of .*val\.json .* dog"),
        ({"annotations": [*content["annotations"], {"image_id": 1, "category_id": 1}]}, "is not a COCO json .*bbox"),
        ({"annotations": [{"image_id": 1, "category_id": 3, "bbox": [1, 2, 3]}]}, "is not a COCO json .*not enough"),
        ({"images": {}, "categories": 7}, "is not a COCO json of boxes: TypeError"),
    ):
        (tmp_path / "val.json").write_text(json.dumps(content | change))
        fails(ValueError, text)
    (tmp_path / "val.json").write_text("{")
    fails(ValueError, "val.json is not a COCO json of boxes: JSONDecodeError")


@pytest.mark.parametrize("name", ["_save_image", "sha256", "YAML.save", "json.dumps"])
@pytest.mark.parametrize("empty", [True, False])
def test_a_failure_in_the_middle_leaves_nothing(name, empty, data, tmp_path, monkeypatch):
    if empty:
        (tmp_path / "out").mkdir()
    before, calls = sorted(tmp_path.rglob("*")), []
    owner, _, attribute = name.rpartition(".")
    owner = getattr(splits, owner) if owner else splits
    stock = getattr(owner, attribute)

    def fail(*args, **kwargs):
        calls.append(args)
        if name != "_save_image" or len(calls) > 3:
            raise OSError("disk full")
        return stock(*args, **kwargs)

    monkeypatch.setattr(splits, "NUM_THREADS", 8)
    if name == "sha256":
        monkeypatch.setattr(splits, "sha256", lambda x: fail(x) if ".part" in str(x) else stock(x))
    else:
        monkeypatch.setattr(owner, attribute, fail)
    with pytest.raises(OSError, match="disk full"):
        split(data, NOVEL, tmp_path / "out", shots=1, seeds=1)
    assert sorted(tmp_path.rglob("*")) == before and calls
    monkeypatch.undo()
    assert split(data, NOVEL, tmp_path / "out", shots=1, seeds=1) == tmp_path / "out"
    assert sorted(x.name for x in tmp_path.iterdir()) == ["out"]


def test_a_protocol_beside_the_user_comes_first(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    YAML.save("voc-split1.yaml", {"novel": ["cat"]})
    assert splits._novel_names("voc-split1.yaml") == ["cat"]
    assert splits._novel_names(tmp_path / "voc-split1.yaml") == ["cat"]
    assert splits._novel_names("voc-split3.yaml") == ["boat", "cat", "motorbike", "sheep", "sofa"]
    assert splits._novel_names("['hot dog', bus]") == splits._novel_names(["hot dog", "bus"]) == ["hot dog", "bus"]
    assert splits._novel_names("dog, bee") == NOVEL and splits._novel_names(7) == ["7"]
    YAML.save("empty.yaml", {"names": ["cat"]})
    with pytest.raises(ValueError, match=r"'novel=empty\.yaml' has no list of novel classes"):
        split(data, "empty.yaml", "out")


@pytest.mark.parametrize(
    ("protocol", "stock", "n_novel"),
    [*((f"voc-split{i}.yaml", "VOC.yaml", 5) for i in (1, 2, 3)), ("coco-fewshot.yaml", "coco.yaml", 20)],
)
def test_protocols_have_the_class_names_of_ultralytics(protocol, stock, n_novel):
    content = YAML.load(cfg_dir() / "protocols" / protocol)
    names = list(YAML.load(ROOT / "cfg/datasets" / stock)["names"].values())
    assert content.keys() == {"novel", "base"} and len(set(content["novel"])) == n_novel == len(content["novel"])
    assert content["base"] == [n for n in names if n not in content["novel"]]
    assert sorted(content["base"] + content["novel"]) == sorted(names)


def test_the_novel_classes_of_coco_are_those_of_voc():
    spelled = {"aeroplane": "airplane", "diningtable": "dining table", "motorbike": "motorcycle", "tvmonitor": "tv"}
    spelled |= {"pottedplant": "potted plant", "sofa": "couch"}
    voc = YAML.load(ROOT / "cfg/datasets/VOC.yaml")["names"].values()
    assert sorted(splits._novel_names("coco-fewshot.yaml")) == sorted(spelled.get(n, n) for n in voc)


def of_every_class(n_classes):
    """Boxes of images with two classes each, all of which are in every folder."""
    boxes = {}
    for folder in FOLDERS:
        for i in range(n_classes):
            boxes[f"{folder}/{i:02}.png"] = [[i, 2, 2, 20, 20], [(i + 7) % n_classes, 30, 20, 20, 20]]
    return boxes


@pytest.mark.parametrize("i", [1, 2, 3])
def test_a_stand_in_of_voc_is_split_with_its_protocols(i, tmp_path):
    names = list(YAML.load(ROOT / "cfg/datasets/VOC.yaml")["names"].values())
    data = write_yolo(tmp_path, of_every_class(20), names)
    out = split(data, f"voc-split{i}.yaml", tmp_path / "out", shots=(1, 3), seeds=1)
    manifest, novel = json.loads((out / "fewshot.json").read_text()), splits._novel_names(f"voc-split{i}.yaml")
    assert manifest["novel"] == novel and manifest["base"] == [n for n in names if n not in novel]
    objects = manifest["counts"]["shots/seed0_3shot"]["objects"]
    assert objects == dict.fromkeys(manifest["base"], 0) | dict.fromkeys(novel, 3)
    assert YAML.load(out / "data.yaml")["names"] == dict(enumerate(manifest["base"] + novel))
    assert sum(manifest["counts"]["base_train"]["objects"][n] for n in novel) == 0


def test_a_stand_in_of_coco_is_split_with_its_protocol(tmp_path):
    names = list(YAML.load(ROOT / "cfg/datasets/coco.yaml")["names"].values())
    boxes = of_every_class(80)
    write_images(tmp_path, boxes)
    gaps = sorted(np.random.default_rng(0).permutation(np.arange(1, 91))[:80].tolist())
    args = write_coco(tmp_path, boxes, names, gaps)
    out = split(**args, novel="coco-fewshot.yaml", out=tmp_path / "out", shots=2, seeds=1)
    manifest = json.loads((out / "fewshot.json").read_text())
    assert len(manifest["base"]) == 60 and len(manifest["novel"]) == 20
    assert manifest["counts"]["shots/seed0_2shot_all"]["objects"] == dict.fromkeys(
        manifest["base"] + manifest["novel"], 2
    )
    assert manifest["counts"]["query"]["objects"] == dict.fromkeys(manifest["base"] + manifest["novel"], 2)
