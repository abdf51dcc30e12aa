"""The guard in the trainers of all tasks: runs equal stock runs, except for non-finite steps."""

import csv
import logging
import random
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from ultralytics import YOLO
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.models.yolo.pose import PoseTrainer
from ultralytics.nn.tasks import yaml_model_load
from ultralytics.utils import DEFAULT_CFG_PATH, YAML
from ultralytics.utils.loss import v8DetectionLoss

from yolo_fewshot.train.guarded import GuardedTrainer, guarded

pytestmark = [pytest.mark.oldest, pytest.mark.slow]

TASKS = {
    "detect": "yolo11n.yaml",
    "segment": "yolo11n-seg.yaml",
    "pose": "yolo11n-pose.yaml",
    "obb": "yolo11n-obb.yaml",
    "classify": "yolo11n-cls.yaml",
}
QUICK = {
    "epochs": 2, "imgsz": 32, "batch": 4, "nbs": 8, "workers": 0, "optimizer": "SGD", "lr0": 0.01, "warmup_epochs": 0,
    "plots": False, "val": False, "verbose": False, "exist_ok": True, "pretrained": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of runs and tiny models, and a tiny data set for each task."""
    root, rng, found = tmp_path_factory.mktemp("tasks"), np.random.default_rng(0), {}
    for task, model in TASKS.items():
        stock = yaml_model_load(model)
        YAML.save(root / model, {**stock, "scales": {"n": [0.5, 0.125, 1024]}})
        kind = root / task
        for split in ("train", "val"):
            for i in range(8):
                image = np.full((32, 32, 3), 200, np.uint8)
                x, y, c = *rng.integers(2, 14, 2).tolist(), i % 2
                cv2.rectangle(image, (x, y), (x + 14, y + 14), (255, 0, 0) if c else (0, 0, 255), -1)
                folder = kind / split / str(c) if task == "classify" else kind / "images" / split
                folder.mkdir(parents=True, exist_ok=True)
                cv2.imwrite(str(folder / f"{i}.png"), image)
                box = [(x + 7) / 32, (y + 7) / 32, 14 / 32, 14 / 32]
                corners = [v / 32 for v in (x, y, x + 14, y, x + 14, y + 14, x, y + 14)]
                row = {"detect": box, "segment": corners, "obb": corners, "pose": [*box, *corners]}.get(task)
                if row:
                    label = kind / "labels" / split / f"{i}.txt"
                    label.parent.mkdir(parents=True, exist_ok=True)
                    label.write_text(" ".join(map(str, [c, *row])) + "\n")
        splits = {"path": str(kind), "train": "images/train", "val": "images/val"}
        YAML.save(kind / "data.yaml", {**splits, "names": ["red", "blue"], "kpt_shape": [4, 2]})
        found[task] = str(kind if task == "classify" else kind / "data.yaml")
    return root, found


def train(data, task, name, **settings):
    """Train; returns the trainer, the losses of every batch, and the random states at the end."""
    root, files = data
    losses = []
    model = YOLO(root / TASKS[task])
    model.add_callback("on_train_batch_end", lambda t: losses.append({k: float(v) for k, v in t.loss_items.items()}))
    model.train(data=files[task], project=str(root), name=name, **{**QUICK, **settings})
    state = (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()[1])
    return model.trainer, losses, state


def rows(folder: Path):
    """The results without the time."""
    with open(folder / "results.csv") as f:
        return [{k: v for k, v in row.items() if k != "time"} for row in csv.DictReader(f)]


def files(folder: Path):
    return sorted(str(x.relative_to(folder)) for x in folder.rglob("*"))


@pytest.mark.parametrize("task", TASKS)
def test_a_guarded_run_is_the_stock_run_step_by_step(data, task):
    """So are runs with `grad_clip` at Ultralytics' limit, 10 for the scaled loss, which clips some steps."""
    scale = 2.0 * (1 if task == "classify" else 4)  # accumulated batches, times images if the loss is not a mean
    plain, losses, state = train(data, task, f"{task}-plain")
    assert len(losses) == 4 and not isinstance(plain, GuardedTrainer)
    weights = torch.load(plain.last, weights_only=False)["model"].state_dict()
    for name, settings in {"skip": {"nonfinite": "skip"}, "clip": {"grad_clip": 10 / scale}}.items():
        trainer, found, end = train(data, task, f"{task}-{name}", **settings)
        assert type(trainer).__bases__ == (GuardedTrainer, type(plain))
        assert found == losses and end == state
        assert rows(trainer.save_dir) == rows(plain.save_dir) and files(trainer.save_dir) == files(plain.save_dir)
        ours = torch.load(trainer.last, weights_only=False)["model"]
        assert type(ours).__module__.startswith("ultralytics.")
        assert all(torch.equal(v, weights[k]) for k, v in ours.state_dict().items())


def test_ultralytics_may_preprocess_batches_before_it_accumulates_any(monkeypatch):
    """As it does to calibrate a network for quantize=8."""
    monkeypatch.setattr(PoseTrainer, "preprocess_batch", lambda self, batch: batch)
    trainer = object.__new__(guarded(PoseTrainer))
    assert trainer.preprocess_batch({"img": 1}) == {"img": 1}


@pytest.mark.parametrize("given", [{}, {"grad_clip": 5.0}])
def test_the_files_of_a_run_without_a_stage_have_only_the_keys_of_ours_that_are_set(data, given):
    trainer, _, _ = train(data, "detect", "keys", **given)
    stock = set(YAML.load(DEFAULT_CFG_PATH)) | {"save_dir"}
    saved = {"args.yaml": YAML.load(trainer.save_dir / "args.yaml")}
    for file in (trainer.last, trainer.best):
        saved[file.name] = torch.load(file, weights_only=False)["train_args"]
    for file, args in saved.items():
        assert set(args) - stock == set(given) and {k: args[k] for k in given} == given, file
    assert len(saved["args.yaml"]) == len(stock) + len(given)  # all others are there


@pytest.mark.parametrize("task", TASKS)
def test_a_step_that_is_not_finite_is_skipped_and_explained(data, task, caplog, monkeypatch):
    """The third of four batches, the first of the second step, has an image with NaN."""
    seen, model_train = [], BaseTrainer._model_train

    def poison(trainer):
        model_train(trainer)
        preprocess, trainer.preprocess_batch = type(trainer).preprocess_batch, lambda b: spoilt(preprocess(trainer, b))

    def spoilt(batch):
        seen.append(1)
        if len(seen) == 3:
            batch["img"][1] = float("nan")
        return batch

    monkeypatch.setattr(BaseTrainer, "_model_train", poison)
    logging.getLogger("ultralytics").addHandler(caplog.handler)
    try:
        trainer, _, _ = train(data, task, f"{task}-nan", nonfinite="skip", seed=1)
    finally:
        logging.getLogger("ultralytics").removeHandler(caplog.handler)
    assert len(seen) == 4
    text = next(x for x in caplog.text.splitlines() if "Skipping this optimizer step" in x)
    assert ("image " if task == "classify" else ".png") in text and "(1 in this epoch, 1 in a row)" in text
    assert "blue" in text or "red" in text or task == "classify"
    assert "Of 2 steps" in caplog.text and "1 skipped for a NaN or Inf." in caplog.text
    final = torch.load(trainer.last, weights_only=False)["model"].state_dict()
    assert all(torch.isfinite(v).all() for v in final.values())
    assert [x["epoch"] for x in rows(trainer.save_dir)] == ["1", "2"]


def test_raise_stops_a_stock_training_at_once_and_names_the_images(data, monkeypatch):
    stock = v8DetectionLoss.loss
    monkeypatch.setattr(v8DetectionLoss, "loss", lambda *a: (stock(*a)[0] * float("nan"), {}))
    with pytest.raises(FloatingPointError, match=r"\.png.*Training stops because of nonfinite=raise"):
        train(data, "detect", "raise", nonfinite="raise")


@pytest.mark.parametrize("task", ["detect", "classify"])
def test_the_clip_is_on_the_loss_itself(data, task):
    """An SGD step moves by at most lr0 times `grad_clip` times the scale of the loss."""
    root, sources = data
    steps, limit, lr = [], 0.01, 0.01

    def begin(trainer):
        before = [p.detach().clone() for p in trainer.model.parameters()]

        def moved(*_):
            now = [p.detach().clone() for p in trainer.model.parameters()]
            steps.append(float(torch.nn.utils.get_total_norm([a - b for a, b in zip(now, before)])))
            before[:] = now

        trainer.optimizer.register_step_post_hook(moved)

    model = YOLO(root / TASKS[task])
    model.add_callback("on_train_start", begin)
    settings = {**QUICK, "momentum": 0.0, "warmup_momentum": 0.0, "weight_decay": 0.0, "lr0": lr, "lrf": 1.0}
    model.train(data=sources[task], project=str(root), name=f"clip-{task}", grad_clip=limit, **settings)
    expected = lr * limit * 2 * (1 if task == "classify" else 4)
    assert len(steps) == 2 and steps == pytest.approx([expected] * 2, rel=1e-3)


def test_a_trainer_gets_the_guard_once():
    once = guarded(PoseTrainer)
    assert guarded(once) is once and once.__name__ == "GuardedPoseTrainer" and issubclass(once, PoseTrainer)
