import random
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import ultralytics
from PIL import Image
from ultralytics.data.dataset import YOLODataset
from ultralytics.data.utils import check_det_dataset
from ultralytics.utils.checks import check_version

from yolo_fewshot.data import checks as data_check
from yolo_fewshot.data.checks import (
    Finding,
    Split,
    check_boxes,
    check_classes,
    check_duplicates,
    check_names,
    check_shots,
    read_split,
)
from yolo_fewshot.data.episodes import EpisodeSampler

NAMES = {0: "blue", 1: "green", 2: "red"}
GOOD = "0 0.5 0.5 0.2 0.2\n"

NEWEST = check_version(ultralytics.__version__, ">=8.4.190")
reads_as_the_newest = pytest.mark.skipif(not NEWEST, reason="older Ultralytics reads these images and labels otherwise")


def scene(seed, h=64, w=64):
    """An image with as much to see as a photograph: shapes of all sizes on a gradient."""
    rng = np.random.default_rng(seed)
    image = np.linspace(rng.integers(60, 120), rng.integers(130, 200), w)[None, :, None] * np.ones((h, 1, 3))
    image = np.ascontiguousarray(image.astype(np.uint8))
    for _ in range(25):
        x, y, r = int(rng.integers(w)), int(rng.integers(h)), int(rng.integers(2, 12) * min(h, w) // 64)
        cv2.circle(image, (x, y), r, rng.integers(0, 256, 3).tolist(), -1)
    return image


def write(root, split, items, suffix="png"):
    """Write images with label texts, None for no label file, and return their files."""
    for kind in ("images", "labels"):
        (root / kind / split).mkdir(parents=True, exist_ok=True)
    files = []
    for i, (image, text) in enumerate(items):
        files.append(str(root / "images" / split / f"{i:03}.{suffix}"))
        if isinstance(image, bytes):
            Path(files[-1]).write_bytes(image)
        else:
            assert cv2.imwrite(files[-1], image)
        if text is not None:
            (root / "labels" / split / f"{i:03}.txt").write_text(text)
    return files


def read(root, split="train", **data):
    return read_split(
        {"train": str(root / "images/train"), "val": str(root / "images/val"), "names": NAMES} | data, split
    )


def split_of(cls, name="train"):
    """A split of images with the given classes, one list each, in which nothing but the classes matters."""
    boxes = [np.array([[c, 0.5, 0.5, 0.2, 0.2] for c in x], np.float32).reshape(-1, 5) for x in cls]
    files = [f"{name}{i}.png" for i in range(len(cls))]
    empty = sum(not x for x in cls)
    return Split(name, files, boxes, [(64, 64)] * len(cls), [], empty, np.zeros((len(cls), 1024), np.float16))


def test_a_clean_split_is_reported_with_its_counts(tmp_path):
    items = [(scene(0), GOOD * 1 + "1 0.3 0.3 0.1 0.1\n"), (scene(1), GOOD), (scene(2), ""), (scene(3), None)]
    files = write(tmp_path, "train", items)
    split = read(tmp_path)
    assert split.name == "train" and split.files == files and split.ignored == [] and split.unlabeled == 2
    assert split.shapes == [(64, 64)] * 4 and [len(b) for b in split.boxes] == [2, 1, 0, 0]
    assert split.details.shape == (4, 1024)
    assert check_boxes(split) == [Finding("ok", "train: 3 boxes in 4 images, 2 of these without any.")]


def test_boxes_that_reach_outside_by_more_than_a_hundredth_of_the_side(tmp_path):
    far = ["0 0.3 0.5 0.622 0.2", "0 0.7 0.5 0.622 0.2", "0 0.5 0.3 0.2 0.622", "0 0.5 0.7 0.2 0.622"]
    near = [x.replace("0.622", "0.618") for x in far]  # by 0.009
    corner = "1 0.05 0.05 0.2 0.2"  # on two sides, yet one box
    items = [(scene(0, 40, 90), "\n".join(x)) for x in (near, far, [*near, corner], ["2 0.5 0.5 1.01 1.01"])]
    files = write(tmp_path, "train", items)
    split = read(tmp_path)
    assert split.ignored == []
    text = f"train: 5 boxes reach outside the image, in {files[1]}, {files[2]}. Correct or remove them."
    assert check_boxes(split) == [Finding("warning", text)]


def test_boxes_less_than_a_pixel_wide_or_high(tmp_path):
    h, w = 100, 50
    thin, flat = f"0 0.5 0.5 {0.95 / w} 0.5", f"0 0.5 0.5 0.5 {0.95 / h}"
    fine = [f"0 0.5 0.5 {1 / w:.4f} 0.5", f"0 0.5 0.5 0.5 {1 / h:.4f}", f"0 0.3 0.3 {1 / w:.4f} {1 / h:.4f}"]
    items = [(scene(0, h, w), "\n".join(x)) for x in (fine, [thin, *fine], [flat, thin], ["1 0.5 0.5 0 0"])]
    files = write(tmp_path, "train", items)
    split = read(tmp_path)
    assert split.shapes == [(h, w)] * 4
    listed = ", ".join(files[1:])
    text = f"train: 4 boxes are less than a pixel wide or high, in {listed}. Correct or remove them."
    assert check_boxes(split) == [Finding("warning", text)]


def test_a_box_may_be_both_outside_and_empty_and_long_lists_are_cut(tmp_path):
    files = write(tmp_path, "val", [(scene(i), "0 0 0.5 0.3 0.001") for i in range(7)])
    found = check_boxes(read(tmp_path, "val"))
    listed = f"{', '.join(files[:5])} and 2 more"
    assert [f.level for f in found] == ["warning"] * 2
    assert [f.text for f in found] == [
        f"val: 7 boxes {what}, in {listed}. Correct or remove them."
        for what in ("reach outside the image", "are less than a pixel wide or high")
    ]


@reads_as_the_newest
def test_images_that_ultralytics_leaves_out_are_listed_with_the_reason(tmp_path):
    jpeg, png = (cv2.imencode(x, scene(20))[1].tobytes() for x in (".jpg", ".png"))
    items = {
        GOOD: None,
        "0 0.5 0.5 0.3 1.02": "out of bounds coordinates",
        "0 0.5 0.5 0.3 1.01": None,
        "3 0.5 0.5 0.2 0.2": "Label class 3 exceeds dataset class count 3",
        "2 0.5 0.5 0.2 0.2": None,
        "0 -0.02 0.5 0.2 0.2": "negative label values",
        "0.5 0.5 0.5 0.2 0.2": "non-integer class labels",
        "0 0.5 0.5 0.2": "labels require 5 columns",
        "a b c d e": "could not convert",
        "1 0.1 0.1 0.5 0.1 0.5 0.4 0.1 0.4": None,  # a polygon
        GOOD + GOOD: None,  # the same object twice
        "": None,
    }
    images = [(scene(i), x) for i, x in enumerate(items)]
    broken = {jpeg[: len(jpeg) // 2]: "truncated", png[:50] + png[60:]: "broken PNG", b"no image": ": ", b"": ": "}
    images += [(x, GOOD) for x in broken] + [(scene(0, 9, 64), GOOD)]
    files = write(tmp_path, "train", images)
    reasons = dict(zip(files, [*items.values(), *broken.values(), "image size (9, 64) <10 pixels"]))

    split = read(tmp_path)
    assert split.files == [f for f, reason in reasons.items() if reason is None]
    left_out = {f: reason for f, reason in reasons.items() if reason}
    assert len(split.ignored) == len(left_out) == 11
    for text, (file, reason) in zip(split.ignored, left_out.items()):
        assert text.startswith(f"{file}: ") and reason in text and text.count(file) <= 2, text
    stock = YOLODataset(img_path=str(tmp_path / "images/train"), imgsz=64, augment=False, data={"names": NAMES})
    assert split.files == stock.im_files
    for boxes, label in zip(split.boxes, stock.labels):
        np.testing.assert_array_equal(boxes, np.concatenate([label["cls"], label["bboxes"]], 1))
    assert [len(b) for b in split.boxes] == [1, 1, 1, 1, 1, 0]

    found = check_boxes(split)[0]
    assert found.level == "warning" and found.text.startswith(
        f"train: 11 images are left out by training: {files[1]}: "
    )
    assert found.text.count("; ") >= 4 and found.text.endswith(" and 6 more.")
    assert "ok" not in {f.level for f in check_boxes(split)}


@reads_as_the_newest
def test_labels_with_key_points_are_read_as_training_reads_them(tmp_path):
    files = write(tmp_path, "train", [(scene(0), "0 0.5 0.5 0.2 0.2 0.5 0.5 2 0.4 0.4 2\n")])
    data = {"names": NAMES, "kpt_shape": [2, 3]}
    stock = YOLODataset(img_path=str(tmp_path / "images/train"), imgsz=64, augment=False, data=data)
    assert stock.im_files == files
    assert read(tmp_path, kpt_shape=[2, 3]).files == files


def test_no_labels_at_all_is_an_error(tmp_path):
    items = [(scene(0), None), (scene(1), ""), (scene(2), "0 0.5 0.5 2 2")]
    files = write(tmp_path, "train", items)
    error, ignored = check_boxes(read(tmp_path))
    assert error == Finding(
        "error", "train: no labeled object in 3 images. Put label files into a folder 'labels' beside 'images'."
    )
    assert ignored.level == "warning" and f"1 images are left out by training: {files[2]}: " in ignored.text


def test_a_val_split_without_labels_is_a_warning(tmp_path):
    (finding,) = check_boxes(split_of([[], []], "val"))
    assert finding.level == "warning" and "val: no labeled object in 2 images. No mAP can be measured." in finding.text


def test_an_empty_split_is_named(tmp_path):
    with pytest.raises(ValueError, match="'train:' of data= is empty"):
        read_split({"train": None, "names": NAMES}, "train")


def test_classes_that_are_kept_out_are_not_drawn():
    split = split_of([[0], [1], [2]] * 3)
    text = "Episodes of n_way=2 k_shot=1 n_query=1 can be drawn, from 2 of 2 classes."
    assert check_shots(split, NAMES, args(), held_out=[1])[1:] == [Finding("ok", text)]
    assert check_shots(split, NAMES, args(n_way=3), held_out=[1])[1].level == "error"


def test_a_split_of_which_nothing_can_be_read(tmp_path):
    write(tmp_path, "train", [(b"no image", GOOD)])
    split = read(tmp_path)
    assert split.files == [] and split.details.shape == (0, 1024)
    assert [f.level for f in check_boxes(split)] == ["error", "warning"]
    other = split_of([[0]], "val")
    assert check_duplicates(split, other).level == check_duplicates(other, split).level == "ok"


def test_classes_without_an_image(tmp_path):
    everything = split_of([[0, 1], [2]])
    assert check_classes(everything, NAMES) == Finding("ok", "train: all 3 classes have images.")
    train, val = split_of([[1, 1], []]), split_of([[0, 1], [0]], "val")
    assert check_classes(train, NAMES) == Finding(
        "warning", "train: no image of blue, red, which training cannot learn. Label some, or drop the classes."
    )
    assert check_classes(val, NAMES) == Finding(
        "warning", "val: no image of red, whose AP is not measured. Label some, or drop the classes."
    )
    many = {i: f"c{i}" for i in range(9)}
    assert "no image of c3, c4, c5, c6, c7 and 1 more, which" in check_classes(everything, many).text


def test_names_that_several_classes_have_are_found():
    assert check_names(NAMES) == []
    (found,) = check_names({0: "red", 1: "blue", 2: "red", 3: 7, 4: "red", 5: "7"})
    assert found.level == "warning" and "red (ids 0, 2, 4), 7 (ids 3, 5). They are trained" in found.text


@pytest.mark.parametrize("size", [(64, 96), (640, 512)])
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_copies_of_other_size_quality_and_brightness_are_found(tmp_path, size, suffix):
    """Images of at least 512 px are decoded at a quarter of their size, their smaller copies in full."""
    scenes = [scene(i, *size) for i in range(12)]
    train = write(tmp_path, "train", [(x, GOOD) for x in scenes[:8]], suffix)
    dim = (scenes[5] * 0.6 + 10).astype(np.uint8)
    bright = np.clip(scenes[6] * 1.15 + 20, 0, 255).astype(np.uint8)
    small = cv2.resize(scenes[7], None, fx=0.7, fy=0.7, interpolation=cv2.INTER_AREA)
    quality = [cv2.IMWRITE_JPEG_QUALITY, 50]
    worst = cv2.imencode(".jpg", cv2.resize(dim, None, fx=0.7, fy=0.7, interpolation=cv2.INTER_AREA), quality)[1]
    copies = [scenes[2], dim, bright, small, worst.tobytes()]
    images = [scenes[8], *copies, *scenes[9:]]
    val = write(tmp_path, "val", [(x, GOOD) for x in images], suffix)
    found = check_duplicates(read(tmp_path), read(tmp_path, "val"))
    assert found.level == "warning" and found.text.startswith("5 of 9 images of val have a near-duplicate in train, ")
    pairs = [f"{val[i]} and {train[j]}" for i, j in ((1, 2), (2, 5), (3, 6))]
    assert f"{'; '.join(pairs)} and 2 more. Split by" in found.text


def test_a_split_of_images_of_another_is_named(tmp_path):
    write(tmp_path, "train", [(scene(i, 64, 96), GOOD) for i in range(4)])
    train = read(tmp_path)
    found = check_duplicates(train, train._replace(name="val", files=train.files[:3], details=train.details[:3]))
    assert found.level == "warning" and found.text.startswith(
        "3 of 3 images of val are those of train, so that results"
    )


def test_the_same_vignette_or_gradient_is_no_duplicate(tmp_path):
    y, x = np.mgrid[-1:1:64j, -1:1:64j]
    backgrounds = [220 - 80 * (x**2 + y**2), 120 + 80 * x, 40 + 50 * (x + y + 2)]
    for split, seed in (("train", 0), ("val", 1)):
        rng, images = random.Random(seed), []
        for background in backgrounds * 6:
            image = np.clip(background, 0, 255).astype(np.uint8)[..., None].repeat(3, 2)
            left, top, side = rng.randrange(40), rng.randrange(40), rng.randrange(10, 20)
            shade = (10, 250)[rng.randrange(2)]
            cv2.rectangle(image, (left, top), (left + side, top + side), (shade,) * 3, -1)
            images.append((image, GOOD))
        write(tmp_path, split, images)
    found = check_duplicates(read(tmp_path), read(tmp_path, "val"))
    assert found == Finding("ok", "No near-duplicates between train and val.")


def test_blank_images_are_no_duplicates(tmp_path):
    blank = [np.full((64, 64, 3), v, np.uint8) for v in (0, 128, 255)]
    rng = np.random.default_rng(0)
    noisy = [x // 2 + rng.integers(60, 62, x.shape, dtype=np.uint8) for x in blank]
    write(tmp_path, "train", [(x, GOOD) for x in (*blank, *noisy, scene(0))])
    write(tmp_path, "val", [(x, GOOD) for x in (*noisy, *blank)])
    train, val = read(tmp_path), read(tmp_path, "val")
    assert check_duplicates(train, val).level == check_duplicates(val, train).level == "ok"
    write(tmp_path, "val", [(x, GOOD) for x in (*blank, scene(0))])
    assert "1 of 6 images of val" in check_duplicates(train, read(tmp_path, "val")).text


@pytest.mark.parametrize(
    ("a", "b", "level"), [(20, 20, "warning"), (0.4, 20, "ok"), (20, 0.4, "ok"), (0.6, 0.6, "warning")]
)
def test_a_nearly_flat_image_is_no_duplicate(a, b, level):
    pattern = np.random.default_rng(0).normal(0, 1, (1, 1024)).astype(np.float32)
    pattern = (pattern - pattern.mean()) / pattern.std()
    a, b = (split_of([[0]], n)._replace(details=v * pattern) for n, v in (("train", a), ("val", b)))
    assert check_duplicates(a, b).level == level


def test_large_splits_are_compared_in_parts():
    details = np.random.default_rng(0).normal(0, 20, (2100, 1024)).astype(np.float16)
    a = split_of([[0]] * 50)._replace(details=details[:50])
    b = split_of([[0]] * 2050, "val")._replace(details=details[50:].copy())
    assert check_duplicates(a, b).level == "ok"
    for i, j in ((3, 7), (1030, 0), (2049, 49)):
        b.details[i] = a.details[j] * 2 + 5
    text = check_duplicates(a, b).text
    assert text.startswith("3 of 2050 images of val") and "too good: val3.png and train7.png; " in text
    assert "val1030.png and train0.png; val2049.png and train49.png. Split" in text


@pytest.mark.parametrize(("alike", "level"), [(0.80, "ok"), (0.90, "warning")])
def test_near_duplicates_by_their_similarity(alike, level):
    x, y = np.random.default_rng(0).normal(0, 20, (2, 1024))
    x, y = (v - v.mean() for v in (x, y))
    y -= x * (x @ y) / (x @ x)
    mixed = alike * x / np.linalg.norm(x) + (1 - alike**2) ** 0.5 * y / np.linalg.norm(y)
    a, b = split_of([[0]])._replace(details=x[None]), split_of([[0]], "val")._replace(details=600 * mixed[None])
    assert check_duplicates(a, b).level == level


def test_only_large_images_are_decoded_at_a_quarter_of_their_size(tmp_path, monkeypatch):
    sizes = [(512, 512), (511, 900), (900, 511)]
    write(tmp_path, "train", [(scene(i, *size), GOOD) for i, size in enumerate(sizes)])
    seen, imread = {}, data_check.imread

    def spy(file, mode):
        seen[Path(file).stem] = mode
        return imread(file, mode)

    monkeypatch.setattr(data_check, "imread", spy)
    assert read(tmp_path).shapes == sizes
    full = cv2.IMREAD_GRAYSCALE
    assert seen == {"000": cv2.IMREAD_REDUCED_GRAYSCALE_4, "001": full, "002": full}


@pytest.mark.parametrize(
    "side",
    [
        256,
        512,
    ],
)
def test_color_tiffs(tmp_path, side):
    (tmp_path / "images/train").mkdir(parents=True)
    Image.fromarray(scene(0, side, side)).save(tmp_path / "images/train/0.tif")
    assert read(tmp_path).details.astype(float).std() > 1


def test_lists_of_images_and_lists_of_folders(tmp_path):
    a = write(tmp_path, "a", [(scene(i), GOOD) for i in range(3)])
    b = write(tmp_path, "b", [(scene(3 + i), "1 0.5 0.5 0.2 0.2") for i in range(2)])
    (tmp_path / "train.txt").write_text(f"./images/a/002.png\n{b[1]}\n./images/a/000.png\n./images/a/002.png\n")
    for train, expected in (
        ("train.txt", [a[2], b[1], a[0]]),
        (["images/a", "images/b"], a + b),
        (["images/b", "train.txt"], [*b, a[2], a[0]]),
    ):
        file = tmp_path / "data.yaml"
        file.write_text(f"train: {train}\nval: images/a\nnames: [blue, green, red]\n")
        data = check_det_dataset(str(file))
        assert read_split(data, "train").files == expected
        assert read_split(data, "val").files == a
        found = check_duplicates(read_split(data, "train"), read_split(data, "val"))
        assert f"{len(set(expected) & set(a))} of 3 images of val" in found.text


@reads_as_the_newest
def test_an_image_of_a_list_that_does_not_exist_is_left_out(tmp_path):
    files = write(tmp_path, "a", [(scene(0), GOOD)])
    (tmp_path / "train.txt").write_text("./images/a/000.png\n./images/a/001.png\n")
    split = read(tmp_path, train=str(tmp_path / "train.txt"))
    assert split.files == files and len(split.ignored) == 1
    assert split.ignored[0].startswith(f"{tmp_path}/images/a/001.png: ") and "No such file" in split.ignored[0]


def args(stage=2, n_way=2, k_shot=1, n_query=1):
    return SimpleNamespace(stage=stage, n_way=n_way, k_shot=k_shot, n_query=n_query)


def test_how_many_classes_have_enough_objects():
    names = {**NAMES, 3: "black", 4: "gray"}
    # Objects of the classes: 10, 5, 3, 1, 0; images: 4, 3, 3, 1, 0.
    split = split_of([[0] * 7, [0, 1], [0, 1, 2], [0, 2], [1, 1, 1], [2, 3], []])
    found = check_shots(split, names, args())
    text = "Classes with enough labeled objects for K shots, of 5: 4 for K=1, 3 for K=3, 2 for K=5, 1 for K=10."
    assert found[0] == Finding("ok", text)
    text = "Episodes of n_way=2 k_shot=1 n_query=1 can be drawn, from 3 of 5 classes."
    assert found[1:] == [Finding("warning", text)]
    assert check_shots(split, names, args(stage=1, n_way=50)) == found[:1]


def test_episodes_can_be_drawn_of_all_classes():
    split = split_of([[0], [1], [2]] * 3)
    text = "Episodes of n_way=3 k_shot=2 n_query=4 can be drawn, from 3 of 3 classes."
    assert check_shots(split, NAMES, args(n_way=3, k_shot=2, n_query=4))[1:] == [Finding("ok", text)]


@pytest.mark.parametrize(("n_way", "k_shot"), [(4, 1), (2, 2), (1, 3)])
def test_episodes_that_cannot_be_drawn_are_an_error_with_the_message_of_the_sampler(n_way, k_shot):
    split = split_of([[0], [0], [0], [1], [1], [2], [2]])
    labels = [{"cls": b[:, :1]} for b in split.boxes]
    with pytest.raises(ValueError, match=f"'n_way={n_way}' needs {n_way} classes with at least {k_shot + 1}") as e:
        EpisodeSampler(labels, NAMES, n_way, k_shot, 1, 1)
    assert check_shots(split, NAMES, args(n_way=n_way, k_shot=k_shot))[1:] == [Finding("error", str(e.value))]


def test_without_objects_no_class_has_enough_shots():
    found = check_shots(split_of([[], []]), NAMES, args(n_way=1))
    assert "0 for K=1, 0 for K=3, 0 for K=5, 0 for K=10." in found[0].text and found[1].level == "error"
