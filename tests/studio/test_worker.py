"""Work in the background: the thread that learns, and the process that trains."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from yolo_fewshot.studio.training import PROGRESS, Progress, Training, graft
from yolo_fewshot.studio.worker import Worker

WAIT = 60  # seconds until a test gives up


@pytest.fixture
def worker():
    """A function that makes workers, which are closed at the end."""
    made = []

    def make(tasks):
        made.append(Worker(tasks, errors.append))
        return made[-1]

    errors = make.errors = []
    yield make
    for x in made:
        x.close()


def test_the_most_urgent_task_comes_first_and_once(worker):
    done, start = [], threading.Event()
    tasks = {n: lambda n=n: done.append(n) for n in ("learn", "refresh")}
    work = worker({**tasks, "hold": lambda: start.wait(WAIT) and None})
    work.ask("hold")
    while work.busy != "hold":
        time.sleep(0.001)
    for _ in range(5):
        work.ask("refresh")
        work.ask("learn")
    assert not work.idle
    start.set()
    assert work.wait(WAIT) and done == ["learn", "refresh"] and work.idle


def test_a_task_that_has_more_to_do_lets_others_pass(worker):
    done = []

    def slow():
        done.append("slow")
        if len(done) == 1:
            work.ask("urgent")
        return len(done) < 4

    work = worker({"urgent": lambda: done.append("urgent"), "slow": slow})
    work.ask("slow")
    assert work.wait(WAIT) and done == ["slow", "urgent", "slow", "slow"]


def test_an_error_is_told_and_the_worker_goes_on(worker):
    done = []
    work = worker({"bad": lambda: 1 / 0, "good": lambda: done.append(1)})
    work.ask("bad")
    assert work.wait(WAIT) and worker.errors == ["division by zero"]
    work.ask("good")
    assert work.wait(WAIT) and done == [1]


# Stand-ins for what trains; they run in the process.


def quick(model, folder, report):
    report(done=0.5)
    for i in range(3):
        report(epoch=i + 1, loss=3.0 - i, ap=None if i == 0 else i / 4)
    file = Path(folder) / "best.pt"
    file.write_text(model)
    return file


def failing(folder, report):
    raise ValueError("no memory")


def dying(folder, report):
    print("killed by the system", flush=True)
    os._exit(9)


def endless(folder, report):
    while True:
        report(epoch=1, loss=1.0, ap=None)
        time.sleep(0.01)


@pytest.fixture
def train(tmp_path, monkeypatch):
    """A function that starts a training."""
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    started = []

    def start(name, **arguments):
        started.append(Training(tmp_path / "train", f"test_worker:{name}", **arguments))
        return started[-1]

    yield start
    for x in started:
        x.finish()


def test_a_training_reports_and_returns_its_checkpoint(train):
    training = train("quick", model="yolo.pt")
    assert training.result().read_text() == "yolo.pt" and not training.running
    assert training.progress() == Progress(0.5, (1, 2, 3), (3.0, 2.0, 1.0), (None, 0.25, 0.5))
    training.finish()
    assert not training.folder.exists()


@pytest.mark.parametrize("name, words", [("failing", "ValueError: no memory"), ("dying", "killed by the system")])
def test_a_training_that_fails_says_why(name, words, train):
    with pytest.raises(RuntimeError, match=f"nothing was changed.*{words}"):
        train(name).result()


def test_a_cancelled_training_has_no_result(train):
    training = train("endless")
    until = time.monotonic() + WAIT
    while not training.progress().epochs and time.monotonic() < until:
        time.sleep(0.05)
    assert training.running and training.progress().epochs
    training.cancel()
    assert not training.running and training.result() is None


def test_a_half_written_line_is_left_out(train):
    training = train("quick", model="yolo.pt")
    training.result()
    with open(training.folder / PROGRESS, "a") as f:
        f.write('{"epoch": 4, "lo')
    assert training.progress().epochs == (1, 2, 3)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes of Windows do not get another parent")
def test_a_training_ends_with_the_studio(tmp_path):
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "from yolo_fewshot.studio.training import Training\n"
        "t = Training(Path(sys.argv[2]), 'test_worker:endless')\n"
        "print(t._process.pid, flush=True); time.sleep(600)"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path / "train")]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as parent:
        child = int(parent.stdout.readline())
        until = time.monotonic() + WAIT
        while not (tmp_path / "train" / PROGRESS).exists() and time.monotonic() < until:
            time.sleep(0.05)
        assert json.loads((tmp_path / "train" / PROGRESS).read_text().splitlines()[0])["epoch"] == 1
        parent.send_signal(signal.SIGKILL)
    while _alive(child) and time.monotonic() < until:
        time.sleep(0.05)
    assert not _alive(child)


class Trained:
    """What `graft` trains with: three epochs of two batches, and the validation of the best model."""

    def __init__(self, model):
        self.model, self.callbacks = model, {}
        Trained.last = self

    def add_callback(self, event, function):
        self.callbacks[event] = function

    def train(self, **kwargs):
        self.kwargs, folder = kwargs, Path(kwargs["project"]) / "run" / "weights"
        best, last = folder / "best.pt", folder / "last.pt"
        self.trainer = trainer = SimpleNamespace(best=best, last=last, metrics={}, tloss={})
        for trainer.epoch in range(3):
            for _ in range(2):
                self.callbacks["on_train_batch_end"](trainer)
            trainer.tloss = {"box_loss": torch.tensor(1.0), "cls_loss": torch.tensor(2.0 - trainer.epoch)}
            self.callbacks["on_train_epoch_end"](trainer)
            trainer.metrics = {"metrics/mAP50(B)": trainer.epoch / 4} if trainer.epoch else {}
            self.callbacks["on_fit_epoch_end"](trainer)
        trainer.epoch += 1
        self.callbacks["on_fit_epoch_end"](trainer)


def test_grafting_reports_every_epoch_once(monkeypatch, tmp_path):
    monkeypatch.setattr("yolo_fewshot.yolo.FewShotYOLO", Trained)
    reports = []
    file = graft("yolo.pt", "data.yaml", str(tmp_path), 3, 320, "0", lambda **x: reports.append(x))
    assert file == str(tmp_path / "run" / "weights" / "last.pt") and Trained.last.model == "yolo.pt"
    assert [x for x in reports if "epoch" in x] == [
        {"epoch": 1, "loss": 3.0, "ap": None},
        {"epoch": 2, "loss": 2.0, "ap": 0.25},
        {"epoch": 3, "loss": 1.0, "ap": 0.5},
    ]
    assert all(0 <= x["done"] < 1 for x in reports if "done" in x) and len(reports) == 9
    asked = {k: Trained.last.kwargs[k] for k in ("cfg", "graft", "data", "imgsz", "device", "time")}
    assert asked == {
        "cfg": "stage3.yaml", "graft": "neck", "data": "data.yaml", "imgsz": 320, "device": "0", "time": 0.05
    }  # fmt: skip
    (tmp_path / "run" / "weights").mkdir(parents=True)
    (tmp_path / "run" / "weights" / "best.pt").touch()
    assert graft("yolo.pt", "data.yaml", str(tmp_path), 3, 320, None, lambda **_: None).endswith("best.pt")


def _alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
