import os
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from ultralytics.data import utils
from ultralytics.data.build import build_dataloader
from ultralytics.data.dataset import YOLODataset
from ultralytics.utils import YAML

from yolo_fewshot.data import support as module
from yolo_fewshot.data.support import (
    Support,
    SupportDataset,
    background_fingerprint,
    fingerprint,
    incidental_classes,
    read_background,
    read_support,
    without_shots,
)

NAMES = {0: "cat", 1: "dog"}  # of the model


def image(file, h=40, w=80, seed=0):
    file.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(file), np.random.default_rng(seed).integers(0, 255, (h, w, 3), dtype=np.uint8))


def label(file, *rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(rows))


def data_yaml(file, **data):
    YAML.save(file, data)
    return file


@pytest.fixture
def root(tmp_path):
    """Images b (a bird, a cat), a (a bird) and c (background) in this order in the list; no names beside it."""
    for i, name in enumerate("abc"):
        image(tmp_path / f"images/{name}.png", seed=i)
    label(tmp_path / "labels/a.txt", "2 0.5 0.5 0.25 0.5")
    label(tmp_path / "labels/b.txt", "2 0.1 0.2 0.2 0.3", "0 0.75 0.5 0.5 1")
    label(tmp_path / "labels/c.txt")
    (tmp_path / "list.txt").write_text("./images/b.png\n./images/a.png\n\n./images/c.png\n")
    return tmp_path


@pytest.fixture
def shots(root):
    """A data.yaml of the folder, without a val split."""
    return data_yaml(root / "shots.yaml", train="images", names=["cat", "dog", "bird"])


@pytest.fixture
def warnings(monkeypatch):
    texts = []
    monkeypatch.setattr(module.LOGGER, "warning", texts.append)
    return texts


def files(support):
    return [Path(x["im_file"]).stem for x in support.labels]


def boxes(support):
    return [[[c, *b] for c, b in zip(x["cls"].flat, x["bboxes"].tolist())] for x in support.labels]


def fails(kind, *texts):
    """Return a check that an error is of a kind and that its text has these parts."""
    return pytest.raises(kind, match="(?s)" + ".*".join(map(re.escape, texts)))


# Kinds of support sets ------------------------------------------------------------------------------------------------


def test_data_yaml_with_train_and_names_only(shots):
    support = read_support(str(shots), NAMES)
    assert isinstance(support, Support) and support.source == shots
    assert support.names == {0: "cat", 1: "dog", 2: "bird"} and not support.crops and support.channels == 3
    assert files(support) == ["a", "b", "c"]
    np.testing.assert_allclose(boxes(support)[0], [[2, 0.5, 0.5, 0.25, 0.5]])
    np.testing.assert_allclose(boxes(support)[1], [[2, 0.1, 0.2, 0.2, 0.3], [0, 0.75, 0.5, 0.5, 1]], rtol=1e-6)
    assert boxes(support)[2] == []
    for x, n in zip(support.labels, (1, 2, 0)):
        assert x["cls"].shape == (n, 1) and x["bboxes"].shape == (n, 4)
        assert x["cls"].dtype == x["bboxes"].dtype == np.float32
        rest = {k: v for k, v in x.items() if k not in {"im_file", "cls", "bboxes"}}
        fixed = {"segments": [], "keypoints": None, "normalized": True, "bbox_format": "xywh"}
        assert rest == {"shape": (40, 80), **fixed}


def test_the_val_split_does_not_matter(root):
    file = data_yaml(root / "shots.yaml", train="images", val="nowhere", names=["cat", "dog", "bird"])
    assert files(read_support(file, NAMES)) == ["a", "b", "c"]


def test_train_may_list_folders_lists_and_images_and_each_is_read_once(root):
    image(root / "more[1]/deep/images/z.png")
    (root / "more[1]/deep/readme.md").write_text("images")
    (root / "one.txt").write_text("./images/c.png")
    train = ["one.txt", "more[1]", "images/b.png", "list.txt"]
    support = read_support(data_yaml(root / "shots.yaml", train=train, names=["cat", "dog", "bird"]), NAMES)
    assert files(support) == ["c", "z", "b", "a"]


@pytest.mark.parametrize(
    ("data", "cwd"),
    [
        ({"train": "images"}, "."),
        ({"train": ["images", "../data/images"]}, "."),
        ({"train": "../images"}, "."),  # leads out of the folder, where there is nothing
        ({"train": "../outside/images"}, "."),
        ({"path": "sub", "train": "images"}, "."),
        ({"path": "sub", "train": "images"}, ".."),  # not below the working directory: below the data sets
        ({"path": "{root}/sub", "train": "images"}, ".."),
        ({"path": "sets", "train": ["images"]}, "."),
        ({"train": "{root}/sub/images"}, ".."),
    ],
)
def test_paths_resolve_as_in_ultralytics(tmp_path, monkeypatch, data, cwd):
    root = tmp_path / "data"
    for folder in (root, root / "sub", tmp_path / "outside", tmp_path / "sets/sets", tmp_path / "sets/sub"):
        image(folder / "images/a.png")
        label(folder / "labels/a.txt", "0 0.5 0.5 0.5 0.5")

    def fill(x):
        return [fill(y) for y in x] if isinstance(x, list) else x.replace("{root}", str(root))

    file = data_yaml(root / "data.yaml", names=["cat"], val="images", **{k: fill(v) for k, v in data.items()})
    monkeypatch.setattr(utils, "DATASETS_DIR", tmp_path / "sets")
    monkeypatch.chdir(root / cwd)
    train = utils.check_det_dataset(file, autodownload=False, split="train")["train"]
    expected = [str(Path(x) / "a.png") for x in ([train] if isinstance(train, str) else train)]
    assert [x["im_file"] for x in read_support(file).labels] == list(dict.fromkeys(expected))


def test_channels_and_keypoints_of_a_data_yaml(root, monkeypatch):
    asked, verify = [], utils.verify_image_label
    monkeypatch.setattr(utils, "verify_image_label", lambda x: asked.append(x) or verify((*x[:5], 0, 0, x[7])))
    data = {"train": "images", "names": ["cat", "dog", "bird"], "channels": 1, "kpt_shape": [2, 3]}
    assert read_support(data_yaml(root / "shots.yaml", **data), NAMES).channels == 1
    assert min(asked) == (str(root / "images/a.png"), str(root / "labels/a.txt"), "", False, 3, 2, 3, False)


def test_keypoints_of_a_list_have_the_shape_of_the_model(root):
    """Two keypoints of two values each would be read as a polygon."""
    label(root / "labels/a.txt", "2 0.5 0.5 0.25 0.5 0.4 0.4 0.6 0.6")
    label(root / "labels/b.txt", "2 0.1 0.2 0.2 0.3 0.1 0.2 0.1 0.2")
    found = read_support(root / "list.txt", {2: "bird"}, kpt_shape=(2, 2))
    np.testing.assert_allclose(found.labels[1]["bboxes"], [[0.5, 0.5, 0.25, 0.5]])


def test_polygons_become_boxes(shots):
    label(shots.parent / "labels/a.txt", "2 0.1 0.2 0.5 0.2 0.5 0.6 0.1 0.6", "0 0.5 0.5 0.75 0.5 0.75 1")
    support = read_support(shots, NAMES)
    np.testing.assert_allclose(boxes(support)[0], [[2, 0.3, 0.4, 0.4, 0.4], [0, 0.625, 0.75, 0.25, 0.5]], rtol=1e-6)
    assert support.labels[0]["segments"] == []


def test_data_set_folder_means_its_data_yaml(shots):
    assert read_support(shots.parent, NAMES).source == shots
    other = shots.with_name(f"{shots.parent.name}.yaml")
    shots.rename(other)
    shutil.copy(other, shots.parent / "z.yaml")
    assert read_support(shots.parent, NAMES).source == other  # the one that is named like the folder
    other.rename(shots)
    with fails(ValueError, "several YAML files", f"support='{shots}'"):
        read_support(shots.parent)


def test_bare_names_resolve_as_in_ultralytics(shots, monkeypatch):
    asked = []
    monkeypatch.setattr(module.checks, "check_file", lambda *args, **kwargs: asked.append((args, kwargs)) or str(shots))
    assert read_support("shipped.yaml", NAMES).source == shots
    assert asked == [(("shipped.yaml",), {"download": False, "hard": False})]


def test_list_keeps_its_order_and_each_image_is_read_once(root, warnings):
    with open(root / "list.txt", "a") as f:
        f.write("images/a.png \n./images/../images/b.png\n")
    (root / "classes.txt").write_text("cat \ndog\nbird\n\n")
    support = read_support(root / "list.txt")
    assert files(support) == ["b", "a", "c"] and support.source == root / "list.txt"
    assert support.names == {0: "cat", 1: "dog", 2: "bird"} and not support.crops and not warnings
    np.testing.assert_allclose(boxes(support)[1], [[2, 0.5, 0.5, 0.25, 0.5]])


def test_lines_are_relative_to_the_list_or_else_to_the_working_directory(root, monkeypatch):
    image(root / "cwd/images/d.png")
    image(root / "cwd/images/a.png")
    label(root / "cwd/labels/d.txt", "1 0.5 0.5 0.5 0.5")
    monkeypatch.chdir(root / "cwd")
    (root / "list.txt").write_text(f"images/d.png\r\nimages/a.png\r\n{root}/images/b.png", encoding="utf-8-sig")
    support = read_support("../list.txt", {**NAMES, 2: "bird"})
    assert [x["im_file"] for x in support.labels] == [
        str(root / "cwd/images/d.png"), str(root / "images/a.png"), str(root / "images/b.png")
    ]  # fmt: skip
    assert [len(x) for x in boxes(support)] == [1, 1, 2]


def test_labels_are_found_from_the_folder_of_the_list(root, monkeypatch):
    """A relative path like 'images/a.png' has no '/images/' that leads to the labels."""
    monkeypatch.chdir(root)
    assert [len(x) for x in boxes(read_support("list.txt", {**NAMES, 2: "bird"}))] == [2, 1, 0]


@pytest.mark.parametrize("entry", [{"train": "list.txt"}, {"train": "x.txt", "val": ["images", "list.txt"]}])
def test_list_takes_its_names_from_the_data_yaml_beside_it(root, warnings, entry):
    (root / "a.yaml").write_text("[")
    (root / "b.yaml").write_text("train: 3")
    data_yaml(root / "c.yaml", train="other.txt", names=["x", "y", "z"])
    data_yaml(root / "d.yaml", names=["kitten", "puppy", "bird", "fish"], channels=1, **entry)
    data_yaml(root / "e.yaml", train="list.txt", names=["x", "y", "z"])
    support = read_support(root / "list.txt", NAMES)
    assert support.names == {0: "kitten", 1: "puppy", 2: "bird", 3: "fish"} and support.channels == 1 and not warnings
    (root / "classes.txt").write_text("one\ntwo\nthree")
    assert read_support(root / "list.txt", NAMES).names == {0: "one", 1: "two", 2: "three"}


def test_list_takes_its_names_from_the_only_data_yaml_beside_it(root, warnings):
    (root / "args.yaml").write_text("train: images")
    data_yaml(root / "data.yml", train="images", names=["kitten", "puppy", "chick"])
    support = read_support(root / "list.txt", NAMES)
    assert support.names == {0: "kitten", 1: "puppy", 2: "chick"} and not warnings
    before = fingerprint(root / "list.txt")
    data_yaml(root / "data.yml", train="images", names=["kitten", "puppy", "chicken"])
    assert fingerprint(root / "list.txt") != before
    data_yaml(root / "other.yaml", train="images", names=["x", "y", "z"])
    assert read_support(root / "list.txt", {**NAMES, 2: "bird"}).names == {0: "cat", 1: "dog", 2: "bird"}
    assert len(warnings) == 1 and "data.yml, other.yaml beside" in warnings[0] and "classes.txt" in warnings[0]


def test_a_folder_with_a_data_yml_is_a_data_set(root):
    data_yaml(root / "data.yml", train="images", names=["cat", "dog", "bird"])
    assert read_support(root).names == {0: "cat", 1: "dog", 2: "bird"}
    (root / "args.yaml").write_text("epochs: 3")
    assert read_support(root).names == {0: "cat", 1: "dog", 2: "bird"}


def test_list_without_names_has_the_indices_of_the_model(root, warnings):
    support = read_support(root / "list.txt", {**NAMES, 2: 7})
    assert support.names == {0: "cat", 1: "dog", 2: "7"} and not warnings
    label(root / "labels/a.txt", "90 0.5 0.5 0.25 0.5")
    support = read_support(root / "list.txt", NAMES)
    assert support.names == {0: "cat", 1: "dog", 2: "class2", 90: "class90"}
    assert len(warnings) == 1 and "class2, class90" in warnings[0]
    assert "classes.txt" in warnings[0] and "data.yaml" in warnings[0]
    assert read_support(root / "list.txt").names == {0: "class0", 2: "class2", 90: "class90"}


def test_folder_of_crops(tmp_path, monkeypatch):
    for i, name in enumerate(["fish/2.png", "fish/1.JPG", "bird/x.png", ".hidden/1.png", "bird/.2.png"]):
        image(tmp_path / name, h=30 + i, w=20)
    stock = Path.iterdir  # in the order of the file system
    monkeypatch.setattr(Path, "iterdir", lambda x: sorted(stock(x), reverse=True))
    monkeypatch.chdir(tmp_path)
    label(tmp_path / "bird/x.txt", "7 0.5 0.5 0.1 0.1")
    (tmp_path / "readme.md").write_text("crops")
    support = read_support(".", NAMES)
    assert support.crops and support.names == {0: "bird", 1: "fish"} and support.source == tmp_path
    names = ["bird/x.png", "fish/1.JPG", "fish/2.png"]
    assert [x["im_file"] for x in support.labels] == [str(tmp_path / x) for x in names]
    assert [x["shape"] for x in support.labels] == [(32, 20), (31, 20), (30, 20)]
    assert boxes(support) == [[[c, 0.5, 0.5, 1, 1]] for c in (0, 1, 1)]
    assert all(x["cls"].dtype == x["bboxes"].dtype == np.float32 for x in support.labels)
    assert all(x["cls"].shape == (1, 1) and x["bboxes"].shape == (1, 4) for x in support.labels)


@pytest.mark.parametrize("form", ["shots.yaml", "list.txt", "crops"])
def test_channels_default_to_those_of_the_model(root, shots, form):
    image(root / "crops/fish/1.png")
    assert read_support(root / form, NAMES).channels == 3 and read_support(root / form, NAMES, 1).channels == 1
    data_yaml(shots, train=["list.txt", "images"], names=["cat", "dog", "bird"], channels=4)
    assert read_support(root / form, NAMES, 1).channels == (1 if form == "crops" else 4)


# Whether it is still the same -----------------------------------------------------------------------------------------


def rewrite(file):
    """Write a file of the same size with other content, a second later."""
    found, text = file.stat(), file.read_text()
    file.write_text(text.replace("cat", "cow").replace("0.25", "0.35"))
    assert file.stat().st_size == found.st_size and file.read_text() != text
    os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns + 10**9))


CHANGES = {
    "a corrected label file": lambda root: rewrite(root / "labels/a.txt"),
    "a label file of another length with the same time": lambda root: (
        label(root / "labels/a.txt", "2 0.5 0.5 0.25 0.5", "0 0.5 0.5 0.1 0.1"),
        os.utime(root / "labels/a.txt", ns=(1, 1)),
    ),
    "a removed label file": lambda root: (root / "labels/a.txt").unlink(),
    "another image of this name": lambda root: image(root / "images/a.png", seed=9),
    "other class names": lambda root: [rewrite(root / x) for x in ("shots.yaml", "classes.txt")],
    "other boxes to ignore": lambda root: label(root / "ignore/a.txt", "0.5 0.5 0.1 0.1"),
}


@pytest.mark.parametrize("form", ["shots.yaml", "list.txt", "."])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_any_file_is_noticed(root, monkeypatch, form, change):
    data_yaml(root / "shots.yaml", train="list.txt", names=["cat", "dog", "bird"], fewshot={"ignore": "ignore"})
    if change == "other class names":
        label(root / "classes.txt", "cat", "dog", "bird")
    os.utime(root / "labels/a.txt", ns=(1, 1))
    monkeypatch.chdir(root)
    before = fingerprint(form)
    assert fingerprint(form) == before == fingerprint(root / form) and hash(before)
    CHANGES[change](root)
    assert fingerprint(form) != before


def test_added_and_removed_images_are_noticed(root, shots):
    seen = {fingerprint(shots)}
    image(root / "images/deep/d.png")
    seen.add(fingerprint(shots))
    (root / "images/c.png").unlink()
    seen.add(fingerprint(shots))
    assert len(seen) == 3


def test_added_changed_and_removed_crops_are_noticed(tmp_path):
    for name in ("fish/1.png", "fish/2.png", "bird/1.png"):
        image(tmp_path / name)
    seen = [fingerprint(tmp_path)]
    for change in (
        lambda: image(tmp_path / "bird/2.png"),
        lambda: image(tmp_path / "bird/2.png", h=50),
        lambda: (tmp_path / "fish/2.png").unlink(),
        lambda: (tmp_path / "fish").rename(tmp_path / "carp"),
    ):
        assert fingerprint(tmp_path) == seen[-1]
        change()
        seen.append(fingerprint(tmp_path))
    assert len(set(seen)) == 5


def test_no_image_and_no_label_is_read_to_notice_a_change(root, shots, monkeypatch):
    for x in ("images/a.png", "labels/a.txt"):
        (root / x).write_bytes(b"not what it should be")
    monkeypatch.setattr(module, "_verify", None)
    assert fingerprint(shots) == fingerprint(shots)


def test_a_support_set_that_is_gone_is_an_error(root, shots):
    fingerprint(shots)
    shots.unlink()
    with fails(FileNotFoundError, f"support='{shots}' does not exist"):
        fingerprint(shots)


# Classes that are not meant -------------------------------------------------------------------------------------------


def support_of(*classes):
    """A support set whose images show these class indices; 2 and the number 4 are new."""
    labels = [
        {"im_file": f"{i}.png", "cls": np.array(c, np.float32).reshape(-1, 1), "bboxes": np.full((len(c), 4), i / 10)}
        for i, c in enumerate(classes)
    ]
    return Support({0: "a", 1: "b", 2: "new", 3: "c", 4: 7}, labels, True, Path("shots"), 1)


@pytest.mark.parametrize(
    ("classes", "expected"),
    [
        ([[2, 0], [0, 4, 0]], ["a"]),
        ([[2, 0], [0]], []),  # an image of its own
        ([[2, 0], [0, 1]], []),  # one with another old class
        ([[2, 0, 1], [3, 1], []], ["a"]),
        ([[4, 1, 0]], ["b", "a"]),
        ([[2], [4]], []),
        ([[0, 1], [3]], []),
    ],
)
def test_classes_that_are_labeled_beside_others_only(classes, expected):
    assert incidental_classes(support_of(*classes), ["c", "b", "a", "unseen"]) == expected


# Errors ---------------------------------------------------------------------------------------------------------------


def test_missing_support_set(tmp_path):
    for name in ("nowhere", "nowhere.txt", "nowhere-at-all.yaml"):
        with fails(FileNotFoundError, f"support='{tmp_path / name}' does not exist", "data.yaml", ".txt", "sub-folder"):
            read_support(tmp_path / name)


def test_unknown_type(root):
    with fails(ValueError, "labels.csv' is of an unknown type", "data.yaml"):
        label(root / "labels.csv")
        read_support(root / "labels.csv")


# An image with objects ------------------------------------------------------------------------------------------------


def test_objects_of_one_image(root):
    """The image is 80 x 40 pixels; its label file is not read."""
    found = read_support(
        root / "images/b.png", NAMES, objects="traffic cone 8 4 24 20; dog,60,0,80,40;traffic cone 0 0 8 8;"
    )
    assert found.names == {0: "traffic cone", 1: "dog"} and not found.crops and files(found) == ["b"]
    (rows,) = boxes(found)
    expected = [[0, 0.2, 0.3, 0.2, 0.4], [1, 0.875, 0.5, 0.25, 1], [0, 0.05, 0.1, 0.1, 0.2]]
    np.testing.assert_allclose(rows, expected, atol=1e-6)
    assert fingerprint(root / "images/b.png") != fingerprint(root / "images/a.png")


@pytest.mark.parametrize(
    "objects, text",
    [
        (None, "is an image, and there is no objects="),
        ("", "is empty"),
        ("1 2 3 4", "'1 2 3 4' in objects= is not a class name and four numbers"),
        ("dog 1 2 3", "'dog 1 2 3' in objects= is not a class name and four numbers"),
        ("dog 1 2 3 4; cat 1 2 x 4", "'cat 1 2 x 4' in objects= is not"),
        ("dog 0.1 0.1 0.3 90", "within"),
        ("dog 30 2 20 4", "has no area: x2 must be larger than x1"),
        ("dog 3 20 20 4", "has no area: x2 must be larger than x1, and y2 than y1"),
        ("dog nan 2 20 4", "within"),
        ("dog 3 3 3.5 20", "cover less than a pixel"),
    ],
)
def test_objects_that_cannot_be_read(root, objects, text):
    with fails(ValueError, text):
        read_support(root / "images/a.png", NAMES, objects=objects)


def test_objects_need_an_image(root, shots):
    with fails(ValueError, "objects='dog 1 2 20 30' needs an image, and support="):
        read_support(shots, NAMES, objects="dog 1 2 20 30")


# Background -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["images", "list.txt", "images/a.png"])
def test_background_images_have_no_objects_whatever_their_labels(root, form):
    found = read_background(root / form)
    assert sorted(files(found)) == (["a"] if form.endswith("png") else ["a", "b", "c"])
    assert not any(len(x["cls"]) or len(x["bboxes"]) for x in found.labels)


def test_background_images_that_show_a_shot_are_left_out_by_their_content(shots, warnings, tmp_path):
    shots = read_support(shots)
    labeled = [x["im_file"] for x in shots.labels if len(x["cls"])]
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, file in enumerate([*labeled, *(x["im_file"] for x in shots.labels if not len(x["cls"]))]):
        shutil.copy(file, folder / f"{i}{Path(file).suffix}")
    background = read_background(folder)
    assert len(background.labels) == len(shots.labels) > len(labeled) > 0
    left = without_shots(background, shots.labels)
    assert [Path(x["im_file"]).stem for x in left.labels] == [str(i) for i in range(len(labeled), len(shots.labels))]
    assert f"{len(labeled)} images of background={folder} show shots, and are left out" in warnings[-1]
    assert without_shots(left, shots.labels) is left
    with pytest.raises(ValueError, match=r"All images of background=.* show shots"):
        without_shots(background._replace(labels=background.labels[: len(labeled)]), shots.labels)


def test_a_change_of_the_background_is_noticed(root):
    before = background_fingerprint(root / "images")
    assert background_fingerprint(root / "images") == before
    image(root / "images/d.png")
    assert background_fingerprint(root / "images") != before


def test_background_that_cannot_be_read(root, shots):
    with fails(FileNotFoundError, "background='nowhere' does not exist"):
        read_background("nowhere")
    for form in ("labels", "shots.yaml"):
        with fails(ValueError, "has no images. It is a folder or a .txt list"):
            read_background(root / form)
    (root / "images/a.png").write_text("no image")
    with fails(ValueError, "1 of 3 images", "a.png"):
        read_background(root / "images")


# Other support sets ---------------------------------------------------------------------------------------------------


def test_no_images(root, shots):
    (root / "list.txt").write_text("\n \n")
    with fails(ValueError, f"{root / 'list.txt'} lists no images"):
        read_support(root / "list.txt")
    (root / "empty").mkdir()
    with fails(ValueError, f"{shots} lists no images"):
        read_support(data_yaml(shots, train="empty", names=["cat"]))


def test_folders_without_classes(tmp_path):
    image(tmp_path / "loose/1.png")
    with fails(ValueError, "loose has neither a data.yaml nor sub-folders", "shots/scooter/1.jpg"):
        read_support(tmp_path / "loose")
    image(tmp_path / "set/images/1.png")
    with fails(ValueError, "set looks like a data set with labels, but has no data.yaml"):
        read_support(tmp_path / "set")
    image(tmp_path / "crops/cat/1.png")
    for i in range(7):
        (tmp_path / f"crops/empty{i}").mkdir()
    with fails(ValueError, "No images in the sub-folders empty0, ", "empty4 and 2 more of", "crops", "shots/scooter"):
        read_support(tmp_path / "crops")


def test_images_that_do_not_exist(root):
    with open(root / "list.txt", "a") as f:
        f.write("".join(f"./images/no{i}.png\n" for i in range(7)))
    with fails(FileNotFoundError, "7 of 10 images do not exist", f"{root}/images/no0.png", "no4.png and 2 more"):
        read_support(root / "list.txt", NAMES)
    with pytest.raises(FileNotFoundError) as e:
        read_support(root / "list.txt", NAMES)
    assert "no5" not in str(e.value)


def test_five_missing_images_are_all_named(root):
    (root / "list.txt").write_text("".join(f"./no{i}.png\n" for i in range(5)) + "x" * 300)
    with fails(FileNotFoundError, "no4.png and 1 more"):
        read_support(root / "list.txt")
    (root / "list.txt").write_text("".join(f"./no{i}.png\n" for i in range(5)))
    with fails(FileNotFoundError, "no4.png. Paths"):
        read_support(root / "list.txt")


def test_images_that_cannot_be_read(root, shots):
    (root / "images/b.png").write_bytes(b"not an image")
    (root / "images/c.png").write_bytes((root / "images/a.png").read_bytes()[:200])
    with pytest.raises(ValueError) as e:
        read_support(shots, NAMES)
    assert "2 of 3 images" in str(e.value) and f"{root}/images/b.png: " in str(e.value)
    assert f"{root}/images/c.png: " in str(e.value) and "ignoring" not in str(e.value)


def test_crops_that_cannot_be_read(tmp_path):
    image(tmp_path / "cat/1.png", h=8)
    image(tmp_path / "cat/2.png")
    with fails(ValueError, "1 of 2 images", "cat/1.png: image size (8, 80"):
        read_support(tmp_path)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("2 0.5 0.5 0.5", "5 columns"),
        ("2 0.5 0.5 0.5 x", "could not convert"),
        ("2 0.5 0.5 30 0.5", "non-normalized"),
        ("2 -0.5 0.5 0.3 0.5", "negative"),
        ("3 0.5 0.5 0.3 0.5", "Label class 3 exceeds dataset class count 3"),
    ],
)
def test_corrupt_labels(root, shots, row, reason):
    label(root / "labels/a.txt", "2 0.5 0.5 0.25 0.5", row)
    if "column" in reason:
        label(root / "labels/a.txt", row)
    with fails(ValueError, "1 of 3 images", f"{root}/labels/a.txt: ", reason, "Correct"):
        read_support(shots, NAMES)


def test_class_index_beyond_classes_txt(root):
    (root / "classes.txt").write_text("cat\ndog\n")
    with fails(ValueError, f"{root}/labels/b.txt: Label class 2 exceeds dataset class count 2", "; ", "labels/a.txt"):
        read_support(root / "list.txt", {**NAMES, 2: "bird"})


@pytest.mark.parametrize("form", ["shots.yaml", "list.txt"])
def test_images_without_a_label_file_are_counted_and_named(root, shots, warnings, form):
    (root / "labels/a.txt").unlink()
    support = read_support(root / form, {**NAMES, 2: "bird"})
    assert sorted(map(len, boxes(support))) == [0, 0, 2]
    (text,) = warnings
    assert text.startswith(f"1 of 3 support images have no label file and count as background: {root}/images/a.png.")
    assert f"{root}/labels/a.txt" in text and "c.png" not in text  # c has an empty one


@pytest.mark.parametrize("likely", ["labels/a.TXT", "images/a.txt", "images/a.TXT"])
def test_misplaced_label_files_are_named(root, shots, warnings, likely):
    (root / "labels/a.txt").rename(root / likely)
    (root / "labels/c.txt").unlink()
    read_support(shots, NAMES)
    (text,) = warnings
    assert text.startswith("2 of 3 support images have no label file") and "a.png" in text and "c.png" in text
    assert f"{root / likely} should be {root}/labels/a.txt." in text


def test_misplaced_label_files_are_named_where_no_image_has_a_box(root, shots, warnings):
    for name in "ab":
        (root / f"labels/{name}.txt").rename(root / f"images/{name}.txt")
    with fails(ValueError, "None of the 3 images"):
        read_support(shots, NAMES)
    assert f"{root}/images/a.txt should be {root}/labels/a.txt; {root}/images/b.txt should be" in warnings[0]


def test_empty_label_files_and_crops_are_no_reason_to_warn(root, shots, warnings, tmp_path):
    read_support(shots, NAMES)
    image(tmp_path / "crops/fish/1.png")
    read_support(tmp_path / "crops")
    assert not warnings


def test_duplicate_boxes_are_dropped_with_a_warning(root, shots, warnings):
    label(root / "labels/a.txt", *["2 0.5 0.5 0.25 0.5"] * 2)
    assert [len(x) for x in boxes(read_support(shots, NAMES))] == [1, 2, 0]
    assert warnings == [f"{root}/images/a.png: 1 duplicate labels removed"]


@pytest.mark.parametrize(
    ("row", "size"),
    [
        ("2 0.5 0.5 0 0.5", "0 x 20"),
        ("2 0.5 0.5 0.25 0", "20 x 0"),
        ("2 1.009 0.5 0.01 0.5", "0 x 20"),  # right of the image
        ("2 0.5 1.01 0.25 0.01", "20 x 0"),  # below it
        ("2 0.99 0.5 0.0123 0.5", "0.984 x 20"),  # of 80 x 40 pixels
        ("2 0.5 0.5 0.25 0.0245", "20 x 0.98"),
        ("2 1.005 0.5 0.03 0.5", "0.8 x 20"),  # wide enough, but mostly outside
        ("2 -0.005 0.5 0.03 0.5", "0.8 x 20"),
    ],
)
def test_boxes_without_area(root, shots, row, size):
    label(root / "labels/a.txt", "0 0.5 0.5 0.25 0.5", row)
    with fails(ValueError, "1 of the boxes", f"{root}/labels/a.txt: bird ({size} pixels)", "Correct"):
        read_support(shots, NAMES)


def test_boxes_of_one_pixel_are_accepted(root, shots):
    """640 pixels, written with five digits: 0.00156 of them are 0.9984 pixels."""
    image(root / "images/a.png", 640, 640)
    label(root / "labels/a.txt", "2 0.5 0.5 0.00156 0.00156")
    assert len(boxes(read_support(shots, NAMES))[0]) == 1


def test_negative_sides_that_an_old_ultralytics_accepts(root, shots, monkeypatch):
    verify = utils.verify_image_label

    def tolerant(args):
        result = list(verify(args))
        if args[0].endswith("a.png"):
            result[1][0, 3] = -0.005
        return result

    monkeypatch.setattr(utils, "verify_image_label", tolerant)
    with fails(ValueError, "labels/a.txt: bird (0 x 20 pixels)"):
        read_support(shots, NAMES)


def test_many_bad_boxes_name_five(root, shots):
    label(root / "labels/a.txt", *[f"2 0.5 0.{i} 0 0.5" for i in range(1, 8)])
    with fails(ValueError, "7 of the boxes", "and 2 more"):
        read_support(shots, NAMES)


def test_new_classes_without_a_box_are_named(root, shots, warnings):
    data_yaml(shots, train="images", names=["cat", "dog", "bird", "fish", "crab"])
    assert read_support(shots, NAMES).class_names == {"cat", "bird"}
    assert warnings.pop() == "No box for fish, crab in shots.yaml. To learn a class, label at least one object."
    read_support(shots)
    assert warnings.pop().startswith("No box for dog, fish, crab in")
    assert len(read_support(shots, {**NAMES, 5: "fish", 8: "crab"}).names) == 5
    (root / "classes.txt").write_text("cat\ndog\nbird\nfish")  # the predefined classes of a labeling tool
    assert len(read_support(root / "list.txt").names) == 4


def test_no_box_at_all(root, shots):
    (root / "labels").rename(root / "annotations")
    for support in (shots, root / "list.txt"):
        with fails(ValueError, f"None of the 3 images of {support} has a box", f"{root}/labels/"):
            read_support(support, NAMES)


def test_names_that_occur_twice(root, shots):
    data_yaml(shots, train="images", names=["bird", "dog", "bird"])
    with fails(ValueError, "Several class indices of", "have the name bird."):
        read_support(shots, NAMES)
    data_yaml(shots, train="images", names=["cat", "dog", "bird", "dog"])
    assert read_support(shots, NAMES).names[3] == "dog"  # neither of them has a box


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ({"names": ["cat"]}, "has no valid 'train:'"),
        ({"names": ["cat"], "train": {"a": 1}}, "has no valid 'train:'"),
        ({"train": "images"}, "has no valid 'names:'"),
        ({"train": "images", "names": "cat"}, "has no valid 'names:'"),
        ({"train": "images", "names": {0: "cat", 7: "dog"}}, "names in .*shots.yaml are invalid: 2-class"),
        ({"train": "images", "names": {"cat": 0}}, "names in .*shots.yaml are invalid: invalid literal"),
        ({"train": "images", "names": {-1: "cat"}}, "names in .*shots.yaml are invalid: 0"),
    ],
)
def test_invalid_data_yaml(root, data, text):
    with pytest.raises(ValueError, match=text):
        read_support(data_yaml(root / "shots.yaml", **data))


def test_empty_classes_txt(root):
    (root / "classes.txt").write_text("\n")
    with fails(ValueError, "classes.txt are invalid: 0-class"):
        read_support(root / "list.txt")


def test_missing_train_split(root, shots):
    data_yaml(shots, train=["images", "nowhere"], names=["cat"])
    with fails(FileNotFoundError, f"split of {shots} does not exist: {root}/nowhere. Correct 'train:' or 'path:'"):
        read_support(shots)


def test_a_data_set_with_a_download_script_is_generated(root, shots):
    draw = f"import shutil; shutil.copytree('{root}/images', '{root}/drawn/images')"
    draw += f"; shutil.copytree('{root}/labels', '{root}/drawn/labels')"
    data_yaml(shots, train="drawn/images", val="drawn/images", names=["cat", "dog", "fish"], download=draw)
    assert len(read_support(shots, {0: "dog"}).labels) > 1
    assert (root / "drawn/images").is_dir()


# Loading --------------------------------------------------------------------------------------------------------------


def load(dataset):
    loader = build_dataloader(dataset, batch=2, workers=0, shuffle=False, device="cpu")
    return [batch for batch, _ in zip(loader, range(len(loader)))]


@pytest.mark.parametrize("channels", [3, 1])
def test_batches_are_those_of_a_yolo_dataset(root, channels):
    file = data_yaml(root / "shots.yaml", train="images", val="images", names=["cat", "dog", "bird"], channels=channels)
    image(root / "images/b.png", 70, 50, seed=3)
    support = read_support(file, NAMES)
    dataset = SupportDataset(support, imgsz=64)
    assert not dataset.augment and not dataset.rect and dataset.labels is not support.labels
    ours = load(dataset)
    assert not [x for x in root.rglob("*") if x.suffix in {".cache", ".npy"}]  # before the other one writes its own
    data = utils.check_det_dataset(file, autodownload=False)
    theirs = load(YOLODataset(img_path=data["train"], data=data, imgsz=64, augment=False))
    assert len(ours) == len(theirs) == 2 and ours[0]["img"].shape == (2, channels, 64, 64)
    for a, b in zip(ours, theirs):
        assert a.keys() == b.keys() and a["im_file"] == b["im_file"]
        for k in ("img", "cls", "bboxes", "batch_idx"):
            assert torch.equal(a[k], b[k]), k
    assert torch.cat([x["batch_idx"] for x in ours]).tolist() == [0, 1, 1]
    assert torch.cat([x["cls"] for x in ours]).tolist() == [[2], [2], [0]]


def test_crops_load_with_the_box_around_the_image(tmp_path):
    image(tmp_path / "bird/1.png", 64, 32)
    support = read_support(tmp_path)
    before = os.listdir(tmp_path / "bird")
    (batch,) = load(SupportDataset(support, imgsz=64))
    assert batch["img"].shape == (1, 3, 64, 64) and batch["cls"].tolist() == [[0]]
    assert batch["bboxes"].tolist() == [[0.5, 0.5, 0.5, 1]]  # 32 of 64 pixels wide, padded on both sides
    assert os.listdir(tmp_path / "bird") == before
