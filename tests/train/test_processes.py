"""Training in two processes on the CPU, launched by Ultralytics as on two GPUs; see `processes/sitecustomize.py`."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from ultralytics import YOLO
from ultralytics.utils import YAML

from yolo_fewshot.train.shots import steps_for

HERE = Path(__file__).parent
QUICK = {
    "imgsz": 64, "workers": 0, "optimizer": "AdamW", "lr0": 0.001, "warmup_epochs": 0, "epochs": 2, "batch": 8,
    "nbs": 8, "verbose": False, "exist_ok": True, "amp": False, "plots": False,
}  # fmt: skip

pytestmark = pytest.mark.slow

# What a user runs. The callbacks travel to the processes by Ultralytics' own means: one notes what a process ends with,
# the other is a crash after the first epoch.
SCRIPT = """
import hashlib, json, os, shutil, sys
from pathlib import Path
from subprocess import CalledProcessError
import torch.distributed as dist
from ultralytics import YOLO
from ultralytics.utils.torch_utils import unwrap_model
import yolo_fewshot

def note(trainer):
    model = unwrap_model(trainer.model)
    state = b"".join(v.detach().cpu().numpy().tobytes() for v in model.parameters())
    about = {
        "weights": hashlib.sha256(state).hexdigest(), "epoch": trainer.epoch, "steps": len(trainer.train_loader),
        "batch": trainer.train_loader.batch_size, "skipped": trainer.guard.total["skipped"] + trainer.guard.skipped,
        "files": trainer.seen,
    }
    Path(os.environ["TWO_PROCESSES"], f"end-{os.environ['RANK']}.json").write_text(json.dumps(about))

def see(trainer):
    preprocess, trainer.seen = trainer.preprocess_batch, []
    def preprocess_batch(batch):
        trainer.seen += map(os.path.basename, batch["im_file"])
        return preprocess(batch)
    trainer.preprocess_batch = preprocess_batch

def crash(trainer):
    if trainer.epoch == 0:
        dist.barrier()  # rank 0 has saved the epoch
        os._exit(7)

def load(model):
    yolo = YOLO(model)
    yolo.add_callback("teardown", note)
    yolo.add_callback("on_train_start", see)
    return yolo

model, settings, crashes = json.loads(sys.argv[1])
yolo = load(model)
#MORE
if crashes:
    yolo.add_callback("on_fit_epoch_end", crash)
try:
    yolo.train(**settings)
except CalledProcessError:
    if not crashes:
        raise
    last = Path(settings["project"], settings["name"], "weights", "last.pt")
    shutil.copy(last, "crashed.pt")
    load(last).train(resume=True)
"""


def launch(root, model, settings, crashes=False, more=""):
    """Train in two processes, which may crash after an epoch and resume; returns what the ranks ended with.

    They end alike, and rank 0 alone writes files.
    """
    for file in [*root.glob("end-*.json"), *root.glob("writes-*.txt")]:
        file.unlink()
    paths = [HERE.parent / "processes", HERE.parents[1], HERE.parents[1] / "examples", root]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "TWO_PROCESSES": str(root)}
    arguments = json.dumps([str(model), settings, crashes])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.replace("#MORE", more), arguments],
        cwd=root, env={**env, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    # The launcher names the exit code of the first process that failed.
    expected = done.returncode == 0 and ("exitcode  : 7" in done.stderr) == crashes
    assert expected, done.stdout[-3000:] + done.stderr[:9000]
    written = set((root / "writes-1.txt").read_text().splitlines()) - {str(root / "end-1.json")}
    assert not written
    ends = [json.loads((root / f"end-{rank}.json").read_text()) for rank in (0, 1)]
    assert ends[0]["weights"] == ends[1]["weights"] and ends[0]["epoch"] == ends[1]["epoch"]
    return ends


def train_twice(root, model, name, more="", **settings):
    """Train for an epoch in two processes, crash, and resume in two processes."""
    settings = {**QUICK, "project": str(root), "name": name, **settings}
    ends = launch(root, model, settings, crashes=True, more=more)
    run = root / name
    assert torch.load(root / "crashed.pt", weights_only=False)["epoch"] == 0
    with open(run / "results.csv") as f:
        rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(f)]
    assert [x["epoch"] for x in rows] == [1, 2] and ends[0]["epoch"] == 1
    for file in ("last.pt", "best.pt"):
        assert torch.load(run / "weights" / file, weights_only=False)["optimizer"] is None  # finished
    return ends, rows


@pytest.fixture(scope="module")
def root(tmp_path_factory, draw_tiny):
    """A folder with tiny models, a data set, and shots of two of its classes and two new ones."""
    root = draw_tiny(tmp_path_factory.mktemp("two"), 32)
    stock = YAML.load(root / "yolo11n-tiny.yaml")
    del stock["fewshot"]
    YAML.save(root / "stock11n.yaml", stock)
    data = YAML.load(root / "data.yaml")
    YAML.save(root / "shots.yaml", {**data, "names": ["blue", "green", "crimson", "navy"]})
    (root / "crops" / "pink").mkdir(parents=True)
    for i in range(2):
        cv2.imwrite(str(root / f"crops/pink/{i}.png"), np.full((20, 20, 3), (200, 100 + i, 255), np.uint8))
    return root


@pytest.fixture(scope="module")
def stage1(root):
    return train_twice(root, root / "yolo11n-tiny.yaml", "stage1", data=str(root / "data.yaml"), cfg="stage1.yaml")


def test_stage_one_trains_and_resumes_in_two_processes(stage1):
    ends, rows = stage1
    assert [x["steps"] for x in ends] == [4, 4] and [x["batch"] for x in ends] == [4, 4]
    assert not set(ends[0]["files"]) & set(ends[1]["files"])  # each sees its half of the images
    assert all(x["train/steps"] == 4 and x["train/grad_norm"] > 0 for x in rows)


OWN = """
import os
from own_loss import SpreadLoss

class Faulty(SpreadLoss):
    calls = 0

    def forward(self, episode):
        Faulty.calls += 1
        bad = os.environ.get("RANK") == "1" and Faulty.calls == 3  # the second is the loss doctor's
        return super().forward(episode) * (float("nan") if bad else 1)
"""


def test_stage_two_trains_and_resumes_in_two_processes_with_a_custom_term(root, stage1):
    """In every epoch, a step is not finite in one of the two processes, and both skip it."""
    (root / "own.py").write_text(OWN)
    settings = {"cfg": "stage2.yaml", "data": str(root / "data.yaml"), "n_way": 3, "episodes": 3, "terms": "own.Faulty"}
    settings["turned"] = 0.0  # so that the first episode is measured
    ends, rows = train_twice(root, root / "stage1/weights/best.pt", "stage2", **settings)
    assert [x["steps"] for x in ends] == [3, 3] and [x["batch"] for x in ends] == [6, 6]
    assert ends[0]["files"] != ends[1]["files"]  # each draws its own episodes
    assert [x["skipped"] for x in ends] == [1, 1]
    assert all((x["train/steps"], x["train/skipped"]) == (3, 1) and x["train/epi_loss"] > 0 for x in rows)
    assert all(x["train/spr_loss"] > 0 and {"val/epi_loss", "val/spr_loss"} <= x.keys() for x in rows)


def test_stage_three_trains_and_resumes_in_two_processes(root, stage1):
    """It starts from what the model holds in memory, a class enrolled just before, which no file has."""
    settings = {"cfg": "stage3.yaml", "data": str(root / "shots.yaml"), "steps": 4, "plots": True, "val": True}
    settings["graft"] = "none"
    more = f"yolo.enroll({str(root / 'crops')!r}, imgsz=64)"
    ends, rows = train_twice(root, root / "stage1/weights/best.pt", "stage3", more, **settings)
    assert [x["steps"] for x in ends] == [2, 2] and [x["batch"] for x in ends] == [4, 4]
    assert len(set(ends[0]["files"]) | set(ends[1]["files"])) == 16  # a pass of two steps of eight images repeats none
    assert all(x["train/steps"] == 2 and x["train/tea_loss"] > 0 and x["train/mem_loss"] > 0 for x in rows)
    start, end = (
        torch.load(root / "stage3/weights" / f, weights_only=False)["model"] for f in ("enrolled.pt", "best.pt")
    )
    names = ["blue", "green", "red", "black", "pink", "crimson", "navy"]
    assert [*start.names.values()] == [*end.names.values()] == names
    assert [*start.enrolled] == [*end.enrolled] == names[4:]
    assert (root / "stage3/support_check.png").exists()


def test_grafting_trains_and_resumes_in_two_processes(root):
    """It starts from what the model holds in memory, class names that no file has."""
    YOLO(root / "stock11n.yaml").save(root / "stock.pt")
    settings = {"cfg": "stage3.yaml", "data": str(root / "shots.yaml"), "steps": 4, "val": True}
    more = "yolo.model.names = {i: f'old{i}' for i in range(80)}"
    ends, rows = train_twice(root, root / "stock.pt", "graft", more, **settings)
    assert [x["steps"] for x in ends] == [2, 2] and all(x["train/steps"] == 2 for x in rows)
    model = torch.load(root / "graft/weights/best.pt", weights_only=False)["model"]
    names = YAML.load(root / "shots.yaml")["names"]
    assert list(model.names.values()) == [*(f"old{i}" for i in range(80)), *names]
    assert model.model[-1].nl == 6 and list(model.enrolled) == names


def test_steps_of_stage_three_do_not_grow_with_the_processes():
    assert steps_for(230, 16) == steps_for(230, 8 * 2) == 863


def test_a_guarded_stock_training_in_two_processes(root):
    settings = {**QUICK, "project": str(root), "name": "stock", "epochs": 1, "grad_clip": 5.0}
    ends = launch(root, root / "stock11n.yaml", {**settings, "data": str(root / "data.yaml")})
    assert [x["skipped"] for x in ends] == [0, 0]


def test_meta_validation_in_two_processes(root, stage1):
    """One process measures; both stop at the same epoch, and best.pt is the start, since the epochs only harm."""
    settings = {**QUICK, "project": str(root), "name": "meta", "data": str(root / "data.yaml"), "cfg": "stage2.yaml"}
    settings |= {"n_way": 2, "episodes": 2, "meta_val": 0.5, "lr0": 0.5, "epochs": 4, "patience": 2}
    ends = launch(root, root / "stage1/weights/best.pt", settings, crashes=True)
    with open(root / "meta/results.csv") as f:
        rows = list(csv.DictReader(f))
    fitness = [sum(float(v) for k, v in x.items() if "meta_AP50" in k) for x in rows]
    assert [x["epoch"] for x in rows] == [str(i) for i in range(len(rows))] and ends[0]["epoch"] == len(rows) - 2
    assert max(fitness) == fitness[0]
    start, best = (torch.load(root / x / "weights/best.pt", weights_only=False)["model"] for x in ("stage1", "meta"))
    assert len(best.held_out) == 2 and not start.held_out
    known = best.state_dict()
    assert all(torch.equal(v, known[k]) for k, v in start.state_dict().items() if not k.endswith("frozen"))
