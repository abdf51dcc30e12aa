"""A studio that learns by itself: what follows an action, and what a training leaves."""

import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from test_project import file_of

from yolo_fewshot.data.support import read_support
from yolo_fewshot.studio import engine
from yolo_fewshot.studio import live as module
from yolo_fewshot.studio.engine import Studio
from yolo_fewshot.studio.found import Found
from yolo_fewshot.studio.learning import Learned
from yolo_fewshot.studio.live import Live
from yolo_fewshot.studio.project import Project
from yolo_fewshot.studio.scenes import Scenes
from yolo_fewshot.studio.training import Training

WAIT = 60
BOX, OTHER = (0.1, 0.1, 0.4, 0.4), (0.5, 0.5, 0.9, 0.9)


class Detector(Studio):
    """A studio whose network is replaced by what can be counted."""

    def __init__(self, folder):
        self.project = Project(folder)
        self.project.about = {"model": "yolo.pt"}
        self.known, self.found, self.trained, self.figures = {}, {}, {}, {}
        self.suspects, self.learned, self.version, self.own = set(), None, 0, ["person"]
        self._defaults, self._fresh, self._scenes = {}, {}, Scenes(None, self.project, 64, [])
        self.calls, self.imgsz = [], 64
        self.yolo = type("Yolo", (), {"ckpt_path": None})
        self.device = torch.device("cpu")

    def learn(self):
        self.calls.append("learn")
        names = self.project.names
        self.learned = Learned(names, [1] * len(names), ["fit"] * len(names), [], []) if names else None
        self.version += 1

    def refresh(self, n=None):
        todo = [k for k in self.project.images if k not in self.found]
        self.calls.append("refresh")
        for key in todo[:n]:
            self.found[key] = []
        return n is not None and len(todo) > n

    def assess(self):
        self.calls.append("assess")
        return self.calls.count("assess") == 1

    def look(self, n=None):
        self.calls.append("look")
        return False

    def save(self, file, trained=False):
        if self.learned is None:
            raise ValueError("Nothing was learned yet.")
        Path(file).write_text("trained" if trained else "learned")


@pytest.fixture
def live(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PAUSE", 0.0)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
    opened = Live(Detector(tmp_path / "project"), trainer="test_live:quick")
    assert opened.wait(WAIT)
    opened.studio.calls.clear()
    yield opened
    opened.close()


def until(condition):
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


# Stand-ins for what trains; they run in a process of their own.


def quick(model, data, folder, minutes, imgsz, device, report):
    report(epoch=1, loss=1.0, ap=0.5)
    support = read_support(data)
    file = Path(folder) / "best.pt"
    file.write_text(
        f"{Path(model).name} {len(support.labels)} {sorted(support.class_names)} {minutes} {imgsz} {device}"
    )
    return file


def failing(model, data, folder, minutes, imgsz, device, report):
    raise MemoryError("of the device is too small")


def endless(model, data, folder, minutes, imgsz, device, report):
    (Path(folder) / "best.pt").write_text("half")
    while True:
        report(epoch=1, loss=1.0, ap=0.5)
        time.sleep(0.01)


@pytest.mark.parametrize(
    "action",
    [
        lambda x, k: x.label(k, "b", OTHER),
        lambda x, k: x.reject(k, Found("a", 0.5, OTHER, False)),
        lambda x, k: x.unlabel(k, 1),
        lambda x, k: x.forget("a"),
        lambda x, k: x.rename("a", "c"),
        lambda x, k: x.remove(k),
    ],
)
def test_every_action_is_followed_by_learning(action, live):
    key = live.add(file_of(), "a.png")
    live.label(key, "a", BOX)
    live.wait(WAIT)
    live.studio.calls.clear()
    action(live, key)
    assert live.wait(WAIT)
    assert live.studio.calls.index("learn") < live.studio.calls.index("assess")


def test_other_methods_are_learned_again(live):
    """The first assessment finds better ones."""
    live.studio.calls.clear()
    live.studio.calls.append("nothing")
    key = live.add(file_of(), "a.png")
    live.label(key, "a", BOX)
    assert live.wait(WAIT)
    assert live.studio.calls.count("learn") >= 2 and live.studio.calls.count("assess") >= 2


def test_many_images_are_read_in_parts(live):
    for i in range(2 * module.CHUNK + 1):
        live.add(file_of(seed=i), f"{i}.png")
    assert live.wait(WAIT) and len(live.studio.found) == 2 * module.CHUNK + 1


@pytest.mark.parametrize("broken", [False, True])
def test_a_folder_is_saved_once_in_a_while_and_at_the_end(broken, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "SAVE_EVERY", 3)
    (tmp_path / "in").mkdir()
    for i in range(8):
        (tmp_path / f"in/{i}.png").write_bytes(file_of(seed=i) if i < 7 or not broken else b"text")
    studio = Detector(tmp_path / "project")
    saved, save = [], Project.save
    monkeypatch.setattr(Project, "save", lambda self: saved.append(len(self.images)) or save(self))
    if broken:
        with pytest.raises(ValueError, match=r"7\.png is not an image"):
            studio.add_source(tmp_path / "in")
    else:
        assert len(studio.add_source(tmp_path / "in")) == 8
    assert saved == [1, 4, 7, 7 if broken else 8]
    studio.close()
    again = Project(tmp_path / "project")
    assert [x.name for x in again.images.values()] == [f"{i}.png" for i in range(saved[-1])]
    again.close()


def test_an_action_does_not_wait_for_the_network(live):
    hold, learn = threading.Event(), live.studio.learn
    live.studio.learn = lambda: hold.wait(WAIT) and learn()
    key = live.add(file_of(), "a.png")
    start = time.monotonic()
    for i in range(5):
        live.label(key, "a", (0.1, 0.1 + i / 10, 0.2, 0.3 + i / 10))
    assert time.monotonic() - start < WAIT / 2 and len(live.studio.project.images[key].boxes) == 5
    hold.set()
    live.studio.learn = learn
    assert live.wait(WAIT)


def labeled(live):
    key = live.add(file_of(), "a.png")
    live.label(key, "scooter", BOX)
    assert live.wait(WAIT)
    return key


def test_a_training_gives_a_model_beside_what_there_is(live):
    labeled(live)
    live.add(file_of(seed=1), "not looked at.png")
    session = (live.studio.project.folder / "session.json").read_text()
    live.train(2.5)
    until(lambda: live.training is None)
    assert live.studio.trained_file.read_text() == "yolo.pt 1 ['scooter'] 2.5 64 cpu"
    assert live.progress.epochs == (1,) and live.progress.ap == (0.5,) and not live.messages
    assert live.wait(WAIT) and "look" in live.studio.calls
    assert (live.studio.project.folder / "session.json").read_text() == session
    assert not {".train", ".train-data"} & {x.name for x in live.studio.project.folder.iterdir()}


@pytest.mark.parametrize("device", ["cuda:1", "mps"])
def test_a_training_is_on_the_device_of_the_studio(device, live):
    live.studio.device = torch.device(device)
    labeled(live)
    live.train(2.5)
    until(lambda: live.training is None)
    assert live.studio.trained_file.read_text().endswith(f" {device}")


@pytest.mark.parametrize("name", ["endless", "failing"])
def test_a_training_without_a_result_keeps_what_was_there(name, live):
    labeled(live)
    live.studio.trained_file.write_text("of an earlier training")
    before = {x: x.read_bytes() for x in live.studio.project.folder.rglob("*") if x.is_file()}
    live.trainer = f"test_live:{name}"
    live.train(5)
    if name == "endless":
        until(lambda: live.progress.epochs)
        with pytest.raises(ValueError, match="runs already"):
            live.train(5)
        live.cancel()
    until(lambda: live.training is None)
    assert {x: x.read_bytes() for x in live.studio.project.folder.rglob("*") if x.is_file()} == before
    assert [("of the device is too small" in x) for x in live.messages] == [True] * (name == "failing")


def test_labels_may_change_while_it_trains(live):
    key = labeled(live)
    live.trainer = "test_live:endless"
    live.train(5)
    until(lambda: live.progress.epochs)
    live.label(key, "lamp", OTHER)
    copied = live.studio.project.folder / ".train-data"
    assert read_support(copied / "data.yaml").class_names == {"scooter"}
    live.remove(key)
    assert read_support(copied / "data.yaml").class_names == {"scooter"}
    live.cancel()
    until(lambda: live.training is None)


def test_training_needs_a_label(live):
    with pytest.raises(ValueError, match="Draw a box first"):
        live.train(5)
    assert live.training is None
    labeled(live)
    live.studio.learned = None  # as if only classes of the detector were labeled
    with pytest.raises(ValueError, match="Only classes of the detector are labeled"):
        live.train(5)
    assert live.training is None


def test_closing_ends_a_training(live):
    labeled(live)
    live.trainer = "test_live:endless"
    live.train(5)
    until(lambda: live.progress.epochs)
    training = live.training
    live.close()
    assert not training.running
    Project(live.studio.project.folder).close()  # which another studio may open now
    live.studio.project = Project(live.studio.project.folder)


def test_results_are_written_and_outdated(live):
    live.export("checkpoint")
    until(lambda: live.exported.get("model.pt", "busy") != "busy")
    assert live.exported["model.pt"] == "Nothing was learned yet." == live.messages[-1]
    key = labeled(live)
    live.export("checkpoint")
    live.export("labels")
    assert live.wait(WAIT) and live.exported == {"model.pt": "done", "labels.zip": "done"}
    assert (live.exports / "model.pt").read_text() == "learned"
    live.set_conf("scooter", 0.5)
    assert live.exported == {"labels.zip": "done"}
    live.label(key, "scooter", OTHER)
    assert live.wait(WAIT) and not live.exported


def test_jobs_do_not_wait_for_the_check_of_what_was_learned(live, monkeypatch):
    labeled(live)
    monkeypatch.setattr(module, "PAUSE", 10 * WAIT)  # as if the user went on labeling
    live.label(next(iter(live.studio.project.images)), "lamp", OTHER)
    live.export("labels")
    until(lambda: live.exported.get("labels.zip") == "done")


def test_a_checkpoint_is_out_of_date_after_the_check_of_its_thresholds(live, monkeypatch):
    key, checked = labeled(live), threading.Event()
    monkeypatch.setattr(live.studio, "assess", lambda: not checked.wait(WAIT))
    live.label(key, "lamp", OTHER)
    until(lambda: "lamp" in live.studio.learned.names and live._front.idle and live._back.busy == "assess")
    live.exported["model.pt"] = "done"
    checked.set()
    assert live.wait(WAIT) and not live.exported


def test_what_a_full_disk_kept_from_being_saved_is_learned_and_saved_at_the_end(live, monkeypatch):
    key = labeled(live)
    version, write = live.studio.version, Project._write
    monkeypatch.setattr(Project, "_write", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space left"):
        live.label(key, "lamp", OTHER)
    assert live.wait(WAIT) and live.studio.version > version and "lamp" in live.studio.learned.names
    monkeypatch.setattr(Project, "_write", write)
    folder = live.studio.project.folder
    live.close()
    again = Project(folder)
    assert "lamp" in again.names
    live.studio.project = again


def test_a_result_is_out_of_date_also_where_learning_fails(live, monkeypatch):
    key = labeled(live)
    live.export("checkpoint")
    assert live.wait(WAIT) and live.exported == {"model.pt": "done"}
    monkeypatch.setattr(live.studio, "learn", lambda: 1 / 0)
    live.label(key, "scooter", OTHER)
    assert live.wait(WAIT) and not live.exported


def test_a_result_that_fails_does_not_keep_the_next_ones_from_being_made(live, monkeypatch):
    labeled(live)
    begun, asked = threading.Event(), threading.Event()

    def broken(file, trained=False):
        begun.set()
        assert asked.wait(WAIT)
        raise OSError("the disk is full")

    monkeypatch.setattr(live.studio, "export", broken, raising=False)
    live.export("onnx")
    assert begun.wait(WAIT)
    live.export("trained-onnx")
    live.export("labels")
    asked.set()
    assert live.wait(WAIT)
    assert live.exported == {"model.onnx": (text := "the disk is full"), "trained.onnx": text, "labels.zip": "done"}


def test_a_result_that_is_outdated_while_it_is_made_is_not_done(live, monkeypatch):
    key = labeled(live)
    save, begun, labeled_more = live.studio.save, threading.Event(), threading.Event()

    def slow(file, trained=False):
        begun.set()
        assert labeled_more.wait(WAIT)
        save(file, trained)

    monkeypatch.setattr(live.studio, "save", slow)
    live.export("checkpoint")
    assert begun.wait(WAIT)
    live.label(key, "lamp", OTHER)
    until(lambda: "lamp" in live.studio.learned.names and live._front.idle)
    assert live.exported == {"model.pt": "busy"}
    labeled_more.set()
    assert live.wait(WAIT) and not live.exported


def test_new_images_are_looked_at_by_the_trained_model(live):
    live.add(file_of(seed=1), "b.png")
    assert live.wait(WAIT) and "look" in live.studio.calls


def test_what_a_crash_left_is_removed(tmp_path):
    detector = Detector(tmp_path / "project")
    for name in (".train", ".train-data"):
        (detector.project.folder / name).mkdir()
        (detector.project.folder / name / "x").write_text("")
    (detector.project.folder / ".videoabc").write_text("")
    opened = Live(detector)
    assert not {".train", ".train-data", ".videoabc"} & {x.name for x in detector.project.folder.iterdir()}
    opened.close()


def test_a_video_is_read_in_the_background_and_removed(live):
    cv2 = pytest.importorskip("cv2")
    file = live.studio.project.folder / ".videoabc"
    video = cv2.VideoWriter(f"{file}.avi", cv2.VideoWriter_fourcc(*"MJPG"), 10, (64, 64))
    for i in range(10):
        video.write(np.full((64, 64, 3), 20 * i, np.uint8))
    video.release()
    os.replace(f"{file}.avi", file)
    live.add_video(file, "<b>film</b>.avi", 4)
    assert live.wait(WAIT) and len(live.studio.project.images) == 4 and not file.exists()
    file.write_text("not a film")
    live.add_video(file, "film.avi", 4)
    assert live.wait(WAIT) and "film.avi is not a video" in live.messages[-1] and not file.exists()


def test_a_training_that_cannot_start_is_no_training(live, monkeypatch):
    labeled(live)
    monkeypatch.setattr(Training, "__init__", lambda *_, **__: (_ for _ in ()).throw(OSError("no processes left")))
    with pytest.raises(OSError, match="no processes left"):
        live.train(5)
    assert live.training is None
