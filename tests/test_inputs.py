"""What a newcomer reads when an argument is wrong, before any work."""

import logging
import tempfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from ultralytics import YOLO

from yolo_fewshot import FewShotTrainer, FewShotYOLO, cli
from yolo_fewshot.class_names import near_duplicates
from yolo_fewshot.inputs import check_checkpoint, check_data, check_project, check_source, check_writable


@pytest.fixture(scope="module")
def files(draw_tiny, tmp_path_factory):
    """A data set, models that need no training, and files and folders of the wrong kind."""
    root = draw_tiny(tmp_path_factory.mktemp("files"), 8)
    (root / "folder.pt").mkdir()
    (root / "empty").mkdir()
    (root / "model.onnx").write_bytes(b"x")
    (root / "notes.txt").write_text("")
    (root / "empty.yaml").write_text("")
    (root / "list.yaml").write_text("- a\n- b\n")
    (root / "noval.yaml").write_text(f"path: {root}\ntrain: images/train\nnames: [blue, green, red, black]\n")
    YOLO("yolo11n.yaml").save(root / "stock.pt")
    return root


@pytest.fixture
def here(files, monkeypatch):
    """The files as working directory, and no model that learns."""
    monkeypatch.chdir(files)
    monkeypatch.setattr("yolo_fewshot.yolo.enrollment.enroll", lambda *_: pytest.fail("a class was enrolled"))
    monkeypatch.setattr(FewShotTrainer, "train", lambda *_, **__: pytest.fail("a model was trained"))
    return files


@pytest.fixture
def read_only(monkeypatch):
    """Refuse to write into the folder 'empty', as the system does to another user."""
    stock = tempfile.TemporaryFile

    def refuse(*args, dir, **kwargs):
        if Path(dir).name == "empty":
            raise PermissionError(13, "Permission denied")
        return stock(*args, dir=dir, **kwargs)

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)


MISSING = "FileNotFoundError: 'model=none.pt' does not exist. Give the path of a *.pt checkpoint"
FOLDER = "ValueError: 'model=folder.pt' is a folder. It must be a *.pt checkpoint"
FILE = "is an invalid value. {}/notes.txt is a file and not a folder."


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("enroll model=none.pt support=data.yaml save=a.pt", MISSING),
        ("enroll model=folder.pt support=data.yaml save=a.pt", FOLDER),
        ("enroll model=empty support=data.yaml save=a.pt", "ValueError: 'model=empty' is a folder."),
        ("enroll model=model.onnx support=data.yaml save=a.pt", "TypeError: model='model.onnx' is an exported model"),
        ("enroll model=stock.pt support=data.yaml save=folder.pt", "ValueError: 'save=folder.pt' is an invalid value."),
        ("enroll model=stock.pt support=data.yaml save=empty/a.pt", "PermissionError: 'save=empty/a.pt' cannot be"),
        ("doctor model=none.pt data=data.yaml", MISSING),
        ("doctor model=folder.pt data=data.yaml", FOLDER),
        ("doctor model=model.onnx data=data.yaml", "ValueError: 'model=model.onnx' is an invalid value. Training"),
        ("doctor model=stock.pt data=data.yaml cfg=empty", "ValueError: 'cfg=empty' is an invalid value."),
        ("doctor model=stock.pt data=list.yaml", "ValueError: 'list.yaml' is not a valid YAML mapping."),
        ("split data=notes.txt novel=blue out=new", "ValueError: 'data=notes.txt' is an invalid value."),
        ("split data=data.yaml novel=blue out=empty/new", "PermissionError: 'out=empty/new' cannot be written: Perm"),
        ("split data=data.yaml novel=Blue out=new", "ValueError: 'novel=' names classes that data.yaml does not have"),
        ("benchmark data=. model=stock.pt out=notes.txt", f"ValueError: 'out={{}}/notes.txt' {FILE}"),
        ("benchmark data=data.yaml model=stock.pt", "ValueError: 'data=data.yaml' is a file. Give its folder, data=."),
        ("benchmark data=. model=stock.pt out=empty/new", "PermissionError: 'out={}/empty/new' cannot be written"),
        ("benchmark data=. model=stock.pt out=images", "ValueError: 'out={}/images' is not empty and has no bench"),
        ("demo project=notes.txt/new", "ValueError: 'project="),
        ("demo model=none.pt", "FileNotFoundError: model='none.pt' does not exist."),
    ],
)
def test_a_wrong_argument_of_a_command_is_named_before_any_work(line, text, here, read_only, monkeypatch):
    monkeypatch.setattr("yolo_fewshot.demo.own_detector", lambda *_: pytest.fail("a detector was trained"))
    before = sorted(here.rglob("*"))
    argv = [x.replace("project=", f"project={here}/") for x in line.split()]
    with pytest.raises(SystemExit) as e:
        cli.main(argv)
    assert str(e.value.code).startswith(text.format(here, here))
    assert sorted(here.rglob("*")) == before


@pytest.mark.parametrize(
    ("argument", "text"),
    [
        ("model=none.pt", MISSING),
        ("model=folder.pt", FOLDER),
        ("folder=empty/new", "PermissionError: 'folder=empty/new' cannot be written: Permission denied in"),
        ("folder=notes.txt/new", f"ValueError: 'folder=notes.txt/new' {FILE}"),
        ("port=abc", "ValueError: 'port=abc' is an invalid value. It must be an int of at least 0."),
        ("frames=0", "ValueError: 'frames=0' is an invalid value. It must be an int of at least 1."),
    ],
)
def test_a_wrong_argument_of_the_studio_is_named_before_any_work(argument, text, here, read_only, monkeypatch):
    engine = pytest.importorskip("yolo_fewshot.studio.engine")
    pytest.importorskip("yolo_fewshot.studio.app")
    monkeypatch.setattr(engine, "Studio", lambda *_, **__: pytest.fail("a studio was opened"))
    argv = {"model": "stock.pt", "folder": "new", **dict([argument.split("=")])}
    with pytest.raises(SystemExit) as e:
        cli.main(["studio", *(f"{k}={v}" for k, v in argv.items())])
    assert str(e.value.code).startswith(text.format(here))


@pytest.mark.parametrize("mode", ["predict", "val"])
@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"data": "none.yaml", "source": "none"}, FileNotFoundError, "'(none.yaml|source=none)' does not exist"),
        ({"data": "list.yaml", "source": "none.jpg"}, (ValueError, FileNotFoundError), "not a valid YAML|not exist"),
        ({"project": "{}/notes.txt"}, ValueError, "notes.txt is a file and not a folder"),
        ({"project": "{}/empty"}, PermissionError, "project=.*empty' cannot be written"),
    ],
)
def test_what_a_run_needs_besides_the_shots_is_checked_before_enrollment(mode, arguments, error, text, here, read_only):
    given = {"data": "data.yaml", "source": "images/val", **{k: v.format(here) for k, v in arguments.items()}}
    given.pop("source" if mode == "val" else "data")
    with pytest.raises(error, match=text):
        getattr(YOLO("stock.pt"), mode)(support="data.yaml", imgsz=64, **given)


@pytest.mark.parametrize(("file", "text"), [("empty.yaml", "no 'train:' and no 'val:'"), ("noval.yaml", "no 'val:'")])
def test_validation_on_data_without_its_splits_is_an_error_before_enrollment(file, text, here):
    with pytest.raises(ValueError, match=f"'data={file}' has {text}"):
        YOLO("stock.pt").val(support="data.yaml", data=file)


def test_valid_data_sources_and_models_pass(here):
    for data in (None, "data.yaml", str(here), "fewshot-demo.yaml", "coco8", "data.zip"):
        check_data(data)
    images = (None, 0, "0", "rtsp://camera", "images/*/*.png", "images/val", "notes.txt", [Path("a")], np.zeros(1))
    for source in (*images, Path("images/val"), "screen"):
        check_source(source)
    for model in ("stock.pt", "yolo11n.pt", "yolo26n-seg.pt", "https://example.org/a.pt"):
        check_checkpoint(model)
    check_project({}, "detect")
    check_project({"project": "runs of mine"}, "detect")
    check_writable("save", "stock.pt", folder=False)
    check_writable("out", "new/folder")


@pytest.mark.parametrize(("imgsz", "batch"), [(0, 1), (-1, 1), (64, 0), (64, -2)])
def test_sizes_of_enrollment_must_be_positive(imgsz, batch, files):
    with pytest.raises(ValueError, match=r"'(imgsz|batch)=.*' must be >= 1"):
        FewShotYOLO(files / "stock.pt").enroll(files / "data.yaml", imgsz=imgsz, batch=batch)


@pytest.mark.parametrize("key", ["enroll", "background", "objects"])
@pytest.mark.parametrize("mode", ["predict", "val", "export"])
@pytest.mark.parametrize("kind", [YOLO, FewShotYOLO])
def test_a_key_of_enrollment_without_a_support_set_is_an_error(kind, mode, key, here):
    with pytest.raises(ValueError, match=f"'{key}=mean' needs support=, the labeled examples to enroll"):
        getattr(kind("stock.pt"), mode)(**{key: "mean"})


def test_a_key_of_training_in_another_mode_gets_a_warning(files, monkeypatch, caplog):
    monkeypatch.chdir(files)
    YOLO("stock.pt").predict("images/val/00.png", imgsz=64, supcon=1.0, n_way=2, verbose=False)
    assert "n_way=, supcon= has no effect in predict, only in train." in caplog.text
    caplog.clear()
    YOLO("stock.pt").predict("images/val/00.png", imgsz=64, verbose=False)
    assert "has no effect" not in caplog.text


def test_images_of_a_data_set_are_no_crops(files, tmp_path):
    with pytest.raises(ValueError, match=r"images has images with label files, such as .*labels.train.00.txt, but no"):
        FewShotYOLO(files / "stock.pt").enroll(files / "images", imgsz=64)
    (tmp_path / "dog").mkdir()
    assert cv2.imwrite(str(tmp_path / "dog" / "0.png"), np.zeros((32, 32, 3), np.uint8))
    (tmp_path / "dog" / "0.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    with pytest.raises(ValueError, match="has images with label files"):
        FewShotYOLO(files / "stock.pt").enroll(tmp_path, imgsz=64)
    (tmp_path / "dog" / "0.txt").unlink()
    assert FewShotYOLO(files / "stock.pt").enroll(tmp_path, imgsz=64, method="mean") == {"dog": 1}


def test_a_file_that_is_no_image_is_called_so(files, tmp_path):
    (tmp_path / "junk.jpg").write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"junk.jpg: not an image that can be read .*Correct or remove them"):
        FewShotYOLO(files / "stock.pt").enroll(tmp_path / "junk.jpg", objects="dog 1 2 20 30")


def test_names_that_differ_only_in_spelling():
    assert near_duplicates(["Fire-Hydrant", "dog"], ["fire hydrant", "dog"]) == ["'Fire-Hydrant' and 'fire hydrant'"]
    assert near_duplicates(["blue", "Blue "], ["blue", "Blue "]) == ["'blue' and 'Blue '"]
    assert near_duplicates(["dog", "dogs"], ["cat", "dog"]) == []
    assert near_duplicates([1, "2"], [1]) == []


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ("[Person, green, red, black]", "'Person' and 'person' are different classes"),
        ("[blue, 'blue ', red, black]", "'blue' and 'blue ' are different classes"),
        ("[blue, green, red, black]", None),
    ],
)
def test_enrolling_a_name_that_differs_only_in_spelling_warns(names, text, files, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    (tmp_path / "shots.yaml").write_text(f"path: {files}\ntrain: images/train\nval: images/val\nnames: {names}\n")
    model = FewShotYOLO(files / "stock.pt")
    model.model.names = {**model.model.names, 0: "person"}
    model.enroll(tmp_path / "shots.yaml", imgsz=64, method="mean")
    assert (text in caplog.text) if text else ("different classes" not in caplog.text)


def test_validating_a_class_of_another_spelling_says_so(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("upper.yaml").write_text(
        f"path: {files}\ntrain: images/train\nval: images/val\nnames: [Blue, green, red, x]\n"
    )
    with pytest.raises(ValueError, match=r"show Blue, x, which .* Correct the spelling of 'Blue' and 'blue' if they"):
        run = {"imgsz": 64, "enroll": "mean", "plots": False, "workers": 0}
        YOLO(files / "stock.pt").val(support=files / "data.yaml", data="upper.yaml", **run)


@pytest.mark.parametrize(("graft", "expected"), [(None, "none"), ("none", "none"), ("head", "head")])
def test_graft_none_means_none_on_the_command_line_too(graft, expected, files, monkeypatch):
    """`yolo train graft=none` reaches the trainer as None."""
    monkeypatch.chdir(files)
    overrides = {"model": "stock.pt", "data": "data.yaml", "graft": graft, "project": str(files / "runs")}
    trainer = FewShotTrainer("stage3.yaml", overrides)
    assert trainer.args.graft == expected
    del overrides["graft"]
    assert FewShotTrainer("stage3.yaml", overrides).args.graft == "neck"


def test_graft_none_of_the_command_line_needs_a_few_shot_model(files, monkeypatch):
    monkeypatch.chdir(files)
    run = {"cfg": "stage3.yaml", "data": "data.yaml", "imgsz": 64, "steps": 2, "batch": 2, "workers": 0}
    with pytest.raises(ValueError, match=r"'model=stock\.pt' cannot be adapted with graft=none"):
        YOLO("stock.pt").train(**run, graft=None, project=str(files / "runs"))


def test_too_few_images_for_an_episode_do_not_suggest_one_way():
    from yolo_fewshot.data.episodes import EpisodeSampler

    labels = [{"cls": np.zeros((1, 1), np.float32)}]
    with pytest.raises(ValueError, match=r"has 0\. Left out, with their images: dog \(1\)\. Label more images\.$"):
        EpisodeSampler(labels, {0: "dog"}, 2, 1, 1, 1)
