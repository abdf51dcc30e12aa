"""Killed runs: their checkpoints can be loaded, and they resume where they stopped."""

import contextlib
import csv
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset
from ultralytics import YOLO
from ultralytics.data.build import InfiniteDataLoader
from ultralytics.models.yolo.detect import DetectionTrainer

from yolo_fewshot import FewShotTrainer
from yolo_fewshot.data.episodes import EpisodeSampler
from yolo_fewshot.train.doctor import doctor
from yolo_fewshot.train.episodic import Episodes

pytestmark = pytest.mark.slow

EPOCHS, EPISODES = 3, 2
SETTINGS = {
    "imgsz": 64, "workers": 0, "plots": False, "optimizer": "AdamW", "lr0": 0.001, "warmup_epochs": 0, "verbose": False,
    "n_way": 3, "episodes": EPISODES, "epochs": EPOCHS, "seed": 1, "exist_ok": True,
}  # fmt: skip

# Each run is killed without any clean-up: no `finally`, no `atexit`.
KILLED = """
import json, os, sys
from pathlib import Path
import ultralytics.engine.trainer as engine
from yolo_fewshot import FewShotTrainer
from yolo_fewshot.train import finish

settings = json.loads(sys.argv[1])
fsync = os.fsync
save_metrics, preprocess = engine.BaseTrainer.save_metrics, FewShotTrainer.preprocess_batch


def die_in_write(name):  # with half of the bytes on the disk
    def half(fd):
        if Path(os.readlink(f"/proc/self/fd/{fd}")).name == name:
            os.ftruncate(fd, os.fstat(fd).st_size // 2)
            os._exit(9)
        fsync(fd)

    os.fsync = half


def in_the_middle_of_writing_last():
    def save(self, metrics):
        save_metrics(self, metrics)
        if self.epoch == 1:
            die_in_write("last.pt.part")

    engine.BaseTrainer.save_metrics = save


def in_the_middle_of_writing_best():
    def save(self, metrics):
        save_metrics(self, metrics)
        self.best_fitness = self.fitness
        if self.epoch == 1:
            die_in_write("best.pt.part")

    engine.BaseTrainer.save_metrics = save


def in_the_middle_of_a_row():
    def save(self, metrics):
        if self.epoch != 1:
            return save_metrics(self, metrics)
        with open(self.csv, "a") as f:
            f.write("2,1.5,0.12")
        os._exit(9)

    engine.BaseTrainer.save_metrics = save


def at_the_end(do):  # when all epochs are trained
    original = FewShotTrainer.final_eval
    FewShotTrainer.final_eval = lambda self: (do(), original(self))


def between_stripping_last_and_best():
    strip, finish.strip = finish.strip, lambda f: strip(f) if f.name == "last.pt" else os._exit(9)


def in_the_final_validation():
    finish._validate = lambda *_: os._exit(9)


def in_the_preparation_of_enrollment():
    finish._prepare_enrollment = lambda *_: os._exit(9)


def in_the_middle_of_writing_the_final_best():
    at_the_end(lambda: die_in_write("best.pt.part"))


def between_the_final_best_and_last():
    def save(ckpt, file):
        original(ckpt, file)
        os._exit(9)

    original, finish.save_checkpoint = finish.save_checkpoint, save


def in_the_middle_of_writing_the_final_last():
    at_the_end(lambda: die_in_write("last.pt.part"))


def log(self, batch):
    batch = preprocess(self, batch)
    with open(self.save_dir / "batches.jsonl", "a") as f:
        f.write(json.dumps([self.epoch, *batch["im_file"], batch["img"].mul(255).round().long().sum().item()]) + "\\n")
    return batch


FewShotTrainer.preprocess_batch = log
for name in sys.argv[2:]:
    pid = os.fork()  # after the imports, before anything is computed
    if not pid:
        vars()[name]()
        FewShotTrainer("stage2.yaml", {**settings[name], "name": name}).train()
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9, name
"""
IN_TRAINING = ("in_the_middle_of_writing_last", "in_the_middle_of_writing_best", "in_the_middle_of_a_row")
AT_THE_END = (
    "between_stripping_last_and_best", "in_the_final_validation", "in_the_preparation_of_enrollment",
    "in_the_middle_of_writing_the_final_best", "between_the_final_best_and_last",
    "in_the_middle_of_writing_the_final_last",
)  # fmt: skip
KILLS = (*IN_TRAINING, *AT_THE_END)
LENGTH = {x: EPOCHS if x in IN_TRAINING else 1 for x in KILLS}  # in epochs


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, draw_tiny):
    """A folder with tiny models and a data set of 4 classes, 4 images of 64 px each."""
    return draw_tiny(tmp_path_factory.mktemp("tiny"), 16)


def settings(tiny, **overrides):
    paths = {"model": str(tiny / "yolo11n-tiny.yaml"), "data": str(tiny / "data.yaml"), "project": str(tiny)}
    return {**SETTINGS, **paths, **overrides}


@pytest.fixture(scope="module")
def killed(tiny):
    """The folder of the killed runs, each in a folder by its name."""
    if sys.platform != "linux":
        pytest.skip("needs fork and /proc")
    runs = {name: settings(tiny, epochs=epochs) for name, epochs in LENGTH.items()}
    argv = [sys.executable, "-c", KILLED, json.dumps(runs), *runs]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(argv, capture_output=True, text=True, cwd=tiny, env=env, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return tiny


@contextlib.contextmanager
def batches_drawn():
    """Epoch, image files and pixels of every batch, in order."""
    seen, original = [], FewShotTrainer.preprocess_batch

    def spy(self, batch):
        batch = original(self, batch)
        seen.append([self.epoch, *batch["im_file"], batch["img"].mul(255).round().long().sum().item()])
        return batch

    with pytest.MonkeyPatch.context() as m:
        m.setattr(FewShotTrainer, "preprocess_batch", spy)
        yield seen


@pytest.fixture
def drawn():
    with batches_drawn() as seen:
        yield seen


@pytest.fixture(scope="module")
def whole(tiny):
    """The trainer of an uninterrupted run, and its batches."""
    trainer = FewShotTrainer("stage2.yaml", settings(tiny, name="whole"))
    with batches_drawn() as seen:
        trainer.train()
    return trainer, seen


@pytest.fixture
def run(killed, request, tmp_path):
    """The folder of a killed run, restored after the test."""
    folder = killed / request.getfixturevalue("name")
    shutil.copytree(folder, tmp_path / "copy")
    yield folder
    shutil.rmtree(folder)
    shutil.copytree(tmp_path / "copy", folder)


@pytest.fixture
def no_new_run(monkeypatch):
    """Fail if Ultralytics starts a new run because it cannot resume a checkpoint."""
    original = FewShotTrainer.__init__

    def init(self, *args, overrides=None, **kwargs):
        assert overrides["resume"], "a new run was started"
        original(self, *args, overrides=overrides, **kwargs)

    monkeypatch.setattr(FewShotTrainer, "__init__", init)


def batches(run):
    return [json.loads(x) for x in (run / "batches.jsonl").read_text().splitlines()]


def check_finished(run, epochs=EPOCHS):
    """Check the files of a finished run."""
    for name in ("last.pt", "best.pt"):
        ckpt = torch.load(run / "weights" / name, weights_only=False)
        assert ckpt["epoch"] == -1 and ckpt["optimizer"] is None and ckpt["ema"] is None, name
        assert ckpt["model"].memory and ckpt["model"].prior_strength is not None, name
        assert all(len(x) > 0 for x in ckpt["model"].memory[0]), name
    assert len(YOLO(run / "weights/best.pt").model.names) == 4
    with open(run / "results.csv") as f:
        head, *rows = list(csv.reader(f))
    assert [x[0] for x in rows] == [str(i + 1) for i in range(epochs)]
    assert all(len(x) == len(head) and np.isfinite([float(v) for v in x]).all() for x in rows)
    assert len(set(head)) == len(head) > 20
    assert sorted(x.name for x in (run / "weights").iterdir()) == ["best.pt", "last.pt"]


@pytest.mark.parametrize("name", KILLS)
def test_every_checkpoint_of_a_killed_run_can_be_loaded(killed, name):
    files = sorted((killed / name / "weights").glob("*.pt"))
    assert [f.name for f in files] == ["best.pt", "last.pt"]
    for file in files:
        ckpt = torch.load(file, map_location="cpu", weights_only=False)
        assert (ckpt.get("ema") or ckpt["model"]) is not None
    leftovers = {x.name for x in (killed / name / "weights").iterdir()} - {"best.pt", "last.pt"}
    assert leftovers == {
        "in_the_middle_of_writing_last": {"last.pt.part"},
        "in_the_middle_of_writing_best": {"best.pt.part"},
        "in_the_middle_of_writing_the_final_best": {"best.pt.part"},
        "in_the_middle_of_writing_the_final_last": {"last.pt.part"},
    }.get(name, set())


@pytest.mark.parametrize("name", KILLS)
def test_resuming_after_a_kill(run, name, drawn, whole, no_new_run):
    assert batches(run) == whole[1][: len(batches(run))]
    YOLO(run / "weights/last.pt").train(resume=True)
    check_finished(run, LENGTH[name])
    # At most one epoch is lost, and its episodes are drawn again with the same augmentation.
    first = {"in_the_middle_of_writing_last": 1, "in_the_middle_of_a_row": 1, "in_the_middle_of_writing_best": 2}
    assert drawn == whole[1][first.get(name, EPOCHS) * EPISODES :]


@pytest.mark.parametrize("name", ["between_the_final_best_and_last"])
def test_a_run_interrupted_at_its_end_repeats_the_end_alone(run, name, drawn, monkeypatch):
    events, original = [], FewShotTrainer.run_callbacks
    monkeypatch.setattr(FewShotTrainer, "run_callbacks", lambda self, e: events.append(e) or original(self, e))
    trainer = FewShotTrainer(overrides={"resume": str(run / "weights/last.pt")})
    trainer.train()
    assert trainer.save_dir == run.resolve() and drawn == []
    assert events.count("on_train_end") == 1 and "on_train_start" not in events
    check_finished(run, LENGTH[name])


@pytest.mark.parametrize("name", ["in_the_final_validation"])
def test_loggers_find_their_attributes_when_only_the_end_is_repeated(run, name, no_new_run):
    """Read what Ultralytics' loggers read in these events."""
    model, logged = YOLO(run / "weights/last.pt"), []
    model.add_callback("on_fit_epoch_end", lambda t: logged.append({"time": t.epoch_time, **t.metrics}))
    model.add_callback("on_train_end", lambda t: logged.append({**t.label_loss_items(t.tloss), **t.lr}))
    model.train(resume=True)
    assert len(logged) == 2


@pytest.mark.parametrize("name", ["in_the_middle_of_a_row"])
def test_a_rehearsal_refuses_to_resume_and_leaves_the_run_unchanged(run, name):
    before = {x: x.read_bytes() for x in run.rglob("*") if x.is_file()}
    last = str(run / "weights/last.pt")
    with pytest.raises(ValueError, match="'resume='"):
        doctor(data=str(run.parent / "data.yaml"), model=last, resume=last, n_way=3, imgsz=64)
    assert {x: x.read_bytes() for x in run.rglob("*") if x.is_file()} == before


def test_a_finished_run_is_not_resumed(whole):
    trainer = whole[0]
    check_finished(trainer.save_dir)
    assert [x[0] for x in whole[1]] == [e for e in range(EPOCHS) for _ in range(EPISODES)]
    with pytest.raises(AssertionError, match="training to 3 epochs is finished, nothing to resume"):
        FewShotTrainer(overrides={"resume": str(trainer.last)}).train()
    check_finished(trainer.save_dir)


def resumed(tmp_path, monkeypatch, text, start_epoch, resume=True):
    """Return the files after `resume_training`, by name."""
    if text is not None:
        (tmp_path / "results.csv").write_text(text)
    trainer = FewShotTrainer.__new__(FewShotTrainer)
    trainer.args, trainer.stage = SimpleNamespace(stage=2), Episodes(trainer, {})
    trainer.resume, trainer.epochs, trainer.csv = resume, 20, tmp_path / "results.csv"
    started = []
    sampler = SimpleNamespace(restart=started.append)
    trainer.train_loader = SimpleNamespace(sampler=sampler, reset=lambda: None)
    monkeypatch.setattr(
        DetectionTrainer, "resume_training", lambda self, ckpt: setattr(self, "start_epoch", start_epoch)
    )
    trainer.resume_training({"epoch": start_epoch - 1, "optimizer": {"state": 1}})
    assert started == ([start_epoch] if resume else [])
    return {x.name: x.read_text() for x in tmp_path.iterdir()}


class Blank(Dataset):
    """Returns the draws of an episode themselves."""

    def __getitem__(self, draw):
        return draw


@pytest.mark.parametrize("started", [False, True])
def test_loader_processes_that_have_started_do_not_repeat_the_first_episodes(tmp_path, monkeypatch, started):
    """Loaders of older Ultralytics versions start when they are built."""
    labels = [{"cls": np.array([[i % 4]])} for i in range(20)]
    sampler = EpisodeSampler(labels, dict(enumerate("abcd")), n_way=2, k_shot=1, n_query=1, episodes=3, seed=5)
    loader = InfiniteDataLoader(Blank(), batch_size=4, sampler=sampler, num_workers=2, collate_fn=list)
    if started:
        next(iter(loader))
    trainer = FewShotTrainer.__new__(FewShotTrainer)
    trainer.args, trainer.stage, trainer.train_loader = SimpleNamespace(stage=2), Episodes(trainer, {}), loader
    trainer.resume, trainer.epochs, trainer.csv = True, 20, tmp_path / "results.csv"
    monkeypatch.setattr(DetectionTrainer, "resume_training", lambda self, ckpt: setattr(self, "start_epoch", 7))
    trainer.resume_training({"epoch": 6, "optimizer": {"state": 1}})
    assert next(iter(loader)) == sampler.episode(7, 0)
    loader.close()


ROWS = [f"{i},{i}.5,0.25,nan\n" for i in range(1, 13)]
HEAD = "epoch,time,train/box_loss,val/box_loss\n"


@pytest.mark.parametrize(
    ("rows", "start", "kept"),
    [
        (ROWS[:2], 2, 2),
        (ROWS[:3], 2, 2),  # killed after the row, before last.pt
        ([*ROWS[:2], "3,3.5,0.2"], 2, 2),
        ([*ROWS[:1], ROWS[1].strip()], 2, 1),  # without a line end the last number may be cut off
        ([*ROWS[:10], "1"], 10, 10),  # of 11
        (ROWS, 9, 9),
        ([], 1, 0),
    ],
)
def test_rows_of_interrupted_epochs_are_removed(tmp_path, monkeypatch, rows, start, kept):
    left = resumed(tmp_path, monkeypatch, "".join([HEAD, *rows]), start)
    assert left == {"results.csv": "".join([HEAD, *rows[:kept]])}


def test_the_results_of_a_run_that_is_not_resumed_stay(tmp_path, monkeypatch):
    text = "".join([HEAD, *ROWS])
    assert resumed(tmp_path, monkeypatch, text, 3, resume=False) == {"results.csv": text}


def test_a_run_without_results_can_be_resumed(tmp_path, monkeypatch):
    assert resumed(tmp_path, monkeypatch, None, 2) == {}


def test_a_run_whose_results_were_lost_can_be_resumed(tmp_path, monkeypatch):
    """A power cut may leave an empty file."""
    assert resumed(tmp_path, monkeypatch, "", 2) == {"results.csv": ""}


def test_other_errors_are_not_taken_for_the_end(monkeypatch):
    def fail(self):
        raise RuntimeError("broken")

    trainer = FewShotTrainer.__new__(FewShotTrainer)
    monkeypatch.setattr(DetectionTrainer, "train", fail)
    with pytest.raises(RuntimeError, match="broken"):
        trainer.train()
