"""The end of a run: final checkpoints as Ultralytics makes them, and nothing replaced before all is computed."""

import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from ultralytics import YOLO
from ultralytics.utils.torch_utils import strip_optimizer

from yolo_fewshot import FewShotTrainer
from yolo_fewshot.train import finish as module
from yolo_fewshot.train.finish import strip

pytestmark = [pytest.mark.oldest, pytest.mark.slow]

SETTINGS = {
    "imgsz": 64, "workers": 0, "plots": False, "optimizer": "AdamW", "lr0": 0.001, "warmup_epochs": 0, "verbose": False,
    "n_way": 3, "episodes": 2, "epochs": 2, "exist_ok": True, "val": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, draw_tiny):
    """A folder with tiny models and a data set of 4 classes, 4 images of 64 px each."""
    return draw_tiny(tmp_path_factory.mktemp("tiny"), 16)


@pytest.fixture
def built(tiny, tmp_path):
    """A trainer of stage 2 that has not trained yet."""
    paths = {"model": str(tiny / "yolo11n-tiny.yaml"), "data": str(tiny / "data.yaml"), "project": str(tmp_path)}
    return FewShotTrainer("stage2.yaml", {**SETTINGS, **paths, "name": "run"})


@pytest.fixture
def log(caplog):
    logging.getLogger("ultralytics").addHandler(caplog.handler)
    yield caplog
    logging.getLogger("ultralytics").removeHandler(caplog.handler)


def load(file):
    return torch.load(file, map_location="cpu", weights_only=False)


def flat(x):
    """The values of a checkpoint, with the model as its state and its attributes that are saved."""
    model = x["model"]
    about = {k: getattr(model, k) for k in ("names", "args", "criterion", "yaml", "nc", "enrolled")}
    return {**x, "model": None}, model.state_dict(), about, [p.requires_grad for p in model.parameters()]


def test_a_checkpoint_is_stripped_as_by_ultralytics(built, tmp_path, monkeypatch):
    monkeypatch.setattr(FewShotTrainer, "final_eval", lambda self: None)
    built.train()
    content = built.last.read_bytes()
    ours = strip(built.last)
    assert built.last.read_bytes() == content and load(built.last)["optimizer"] is not None
    stock = strip_optimizer(built.last, s=str(tmp_path / "stripped.pt"))
    assert set(ours) == set(stock)
    (a, state, about, grads), (b, expected, known, flags) = flat(ours), flat(stock)
    assert a == b and about == known and grads == flags and not any(grads)
    assert state.keys() == expected.keys()
    assert all(v.dtype == expected[k].dtype and torch.equal(v, expected[k]) for k, v in state.items())
    torch.save(ours, tmp_path / "again.pt")  # as of a run that was interrupted after best.pt had been replaced
    assert flat(strip(tmp_path / "again.pt"))[0] == a


def test_the_end_is_logged_as_by_ultralytics(built, log):
    """The results of best.pt are those of loading it, and loggers get them at the step after the last epoch."""
    logged = []
    built.add_callback("on_fit_epoch_end", lambda t: logged.append((t.epoch, dict(t.metrics))))
    built.train()
    assert [epoch for epoch, _ in logged] == [0, 1, 2] and built.epoch == 1
    assert "fitness" not in logged[-1][1]
    text = log.text
    assert f"Validating {built.best}..." in text
    assert all(f"Optimizer stripped from {f}, " in text for f in (built.last, built.best))
    found = YOLO(built.best).val(data=built.args.data, imgsz=64, workers=0, plots=False, project=str(built.save_dir))
    for k, v in found.results_dict.items():
        if k != "fitness":
            assert np.isclose(logged[-1][1][k], v, atol=1e-6), k


def test_best_is_replaced_before_last(built, monkeypatch):
    """A run is resumed from last.pt, so an interruption between the two repeats the end."""
    replaced, replace = [], os.replace
    final = FewShotTrainer.final_eval

    def final_eval(self):
        monkeypatch.setattr(os, "replace", lambda x, y: (replaced.append(Path(y).name), replace(x, y)))
        final(self)

    monkeypatch.setattr(FewShotTrainer, "final_eval", final_eval)
    built.train()
    assert replaced == ["best.pt", "last.pt"]
    assert sorted(x.name for x in built.wdir.iterdir()) == ["best.pt", "last.pt"]


@pytest.mark.parametrize("where", ["strip", "_validate", "_prepare_enrollment", "save_checkpoint"])
@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_end_of_training_leaves_resumable_checkpoints(built, monkeypatch, where, error):
    contents = []

    def fail(*_):
        contents.extend(f.read_bytes() for f in (built.last, built.best))
        raise error

    monkeypatch.setattr(module, where, fail)
    with pytest.raises(type(error)):
        built.train()
    assert [f.read_bytes() for f in (built.last, built.best)] == contents
    assert all(load(f)["optimizer"] is not None for f in (built.last, built.best))
    assert sorted(x.name for x in built.wdir.iterdir()) == ["best.pt", "last.pt"]
