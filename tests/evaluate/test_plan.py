import shutil

import pytest
from ultralytics.utils import YAML, checks

from yolo_fewshot import files
from yolo_fewshot.data.splits import split
from yolo_fewshot.evaluate import plan
from yolo_fewshot.evaluate.learn import settings_for


def check(folder, base_val=None, known=None, seeds=2, balanced=False):
    """Check the data of a benchmark with one shot."""
    data = plan.read_data(folder, base_val, known or {})
    draws = [plan.find_shots(folder, [1], seeds, kind) for kind in ("novel", "all")[: 1 + balanced]]
    plan.check_queries(data, draws[0], draws[1] if balanced else {})
    return data


# Shots that are measured on


@pytest.mark.parametrize("case", ["a listed query", "a link to a query", "a copy", "the train split", "a base image"])
def test_shots_that_are_measured_on_are_refused(hand_made, case):
    check(hand_made, hand_made / "old.yaml", {0: "cat"})
    file, image, count = hand_made / "data.yaml", "query/1.bmp", 1
    shot = hand_made / "images/shots/1.bmp"
    if case == "a listed query":
        (hand_made / "novel_1shot_seed1.txt").write_text("./images/query/1.bmp\n")
    elif case == "the train split":
        image, count = "shots/0.bmp", 2
        YAML.save(file, {**YAML.load(file), "val": "images/shots"})
    else:
        image, file = ("old/1.bmp", hand_made / "old.yaml") if case == "a base image" else (image, file)
        shot.unlink()
        if case == "a copy":
            shutil.copy(hand_made / "images" / image, shot)
        else:
            shot.symlink_to(hand_made / "images" / image)
    with pytest.raises(
        ValueError, match=rf"^{count} images of the val split of {file}, which .* are also shots.*{image}"
    ):
        check(hand_made, hand_made / "old.yaml", {0: "cat"})


def test_shots_of_all_classes_that_are_measured_on_are_refused(hand_made):
    YAML.save(hand_made / "all_1shot_seed0.yaml", YAML.load(hand_made / "data.yaml") | {"train": "images/query"})
    check(hand_made, seeds=1)
    with pytest.raises(ValueError, match=r"^2 images of the val split of .* are also shots"):
        check(hand_made, seeds=1, balanced=True)


def test_only_files_of_the_same_size_are_read(hand_made, monkeypatch):
    read, sha256 = [], files.sha256
    monkeypatch.setattr(files, "sha256", lambda x: read.append(x.name) or sha256(x))
    with open(hand_made / "images/query/1.bmp", "ab") as f:
        f.write(b"longer")
    check(hand_made, seeds=1)
    assert read == ["0.bmp", "0.bmp"]  # the shot and the other query


def test_a_split_is_accepted_also_if_train_images_are_val_images(draw_tiny, tmp_path):
    data = draw_tiny(tmp_path / "tiny", 8)
    for kind, suffix in (("images", "png"), ("labels", "txt")):
        for i in range(4):
            shutil.copy(data / kind / f"val/0{i}.{suffix}", data / kind / f"train/copy{i}.{suffix}")
    out = split(data / "data.yaml", "black", tmp_path / "out", shots=1, seeds=2)
    assert check(out, None, {0: "blue", 1: "green", 2: "red"}, balanced=True).base == ("blue", "green", "red")
    narrowed = check(out, out / "base.yaml", {0: "blue"})
    assert narrowed.narrowed and narrowed.base == ("blue",)


# Class names and settings


def test_class_names_of_a_checkpoint_may_be_numbers(hand_made, caplog):
    YAML.save(hand_made / "old.yaml", {"train": "images/old", "val": "images/old", "names": {0: 7}})
    assert check(hand_made, hand_made / "old.yaml", {0: 7}).base == ("7",)
    YAML.save(hand_made / "base.yaml", YAML.load(hand_made / "old.yaml"))
    for name in ("data", "novel_1shot"):
        YAML.save(hand_made / f"{name}.yaml", YAML.load(hand_made / f"{name}.yaml") | {"names": {0: "dog", 1: 7}})
    data = check(hand_made, None, {0: 7})
    assert data.base == ("7",) and data.base_yaml and not data.narrowed and "does not know" not in caplog.text
    with pytest.raises(ValueError, match=r"^Several classes of model= have the name 7, which"):
        check(hand_made, None, {0: 7, 1: "7"})


@pytest.mark.parametrize(
    "settings, text",
    [
        ({"quantize": 8}, r"^'quantize=8' is an invalid value\. It must be 16 or 32 here"),
        ({"int8": True}, r"^'quantize=8' is an invalid value\. It must be 16 or 32 here"),
        ({"quantize": "w8a16"}, r"^'quantize=w8a16' is an invalid value\. It must be 16 or 32 here"),
        ({"augment": True}, r"^augment= cannot be set"),
        ({"fraction": 0.5, "classes": [0]}, r"^classes=, fraction= cannot be set"),
        ({"single_cls": True, "distill_model": "x.pt"}, r"^distill_model=, single_cls= cannot be set"),
    ],
)
def test_what_measuring_cannot_do_is_refused(settings, text):
    with pytest.raises(ValueError, match=text):
        plan.check_settings(settings)


@pytest.mark.parametrize(
    "methods, background, refused",
    [
        (["graft-neck"], True, True),
        (["graft-neck"], False, False),
        (["stock-0", "auto"], True, False),
        (["mean", "replay"], False, True),
    ],
)
def test_a_batch_without_room_for_other_images_is_refused(methods, background, refused):
    settings = {"background": "street"} if background else {}
    plan.check_batch(methods, settings | {"batch": 2})
    plan.check_batch(methods, settings)
    if refused:
        with pytest.raises(
            ValueError, match=rf"^'batch=1' has no room for .* of {methods[-1]}, .*\. Set batch=2 or more"
        ):
            plan.check_batch(methods, settings | {"batch": 1})
    else:
        plan.check_batch(methods, settings | {"batch": 1})


def test_a_batch_with_fewer_images_than_gpus_is_refused():
    plan.check_batch(["stock-0", "auto"], {"batch": 1, "device": "0,1"})
    with pytest.raises(ValueError, match=r"^'batch=1' has fewer images than there are GPUs\. Set batch=2 or more"):
        plan.check_batch(["graft-neck"], {"batch": 1, "device": "0,1"})
    with pytest.raises(ValueError, match=r"^'batch=3' has no room for .* of graft-neck, .*\. Set batch=4 or more"):
        plan.check_batch(["graft-neck"], {"batch": 3, "device": "0,1", "background": "street"})


def test_base_val_may_be_one_of_ultralytics_own(hand_made, tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "ROOT", hand_made)
    monkeypatch.chdir(tmp_path)
    assert check(hand_made, "old.yaml", {0: "cat"}).base_val == hand_made / "old.yaml"


@pytest.mark.parametrize(
    "given, expected", [({"half": True}, 16), ({"quantize": 32}, 32), ({"quantize": "fp16"}, "fp16")]
)
def test_the_precision_reaches_validation(given, expected):
    plan.check_settings(given)
    assert settings_for("val", given) == settings_for("predict", given) == {"quantize": expected}
