"""Images of one channel, from training to prediction; all other tests use color images."""

import cv2
import numpy as np
import pytest
import torch
from ultralytics import YOLO
from ultralytics.utils import YAML

from yolo_fewshot import FewShotTrainer, FewShotYOLO
from yolo_fewshot.enroll.replay import base_support
from yolo_fewshot.pseudo_labels import pseudo_label

FEW = {"epochs": 1, "imgsz": 64, "workers": 0, "warmup_epochs": 0, "optimizer": "AdamW"}


@pytest.fixture(scope="module")
def gray(tmp_path_factory, draw_tiny):
    """A folder with tiny models and a data set of gray images."""
    root = draw_tiny(tmp_path_factory.mktemp("gray"), 12)
    for file in root.rglob("*.png"):
        assert cv2.imwrite(str(file), cv2.imread(str(file), cv2.IMREAD_GRAYSCALE))
    YAML.save(root / "data.yaml", {**YAML.load(root / "data.yaml"), "channels": 1})
    return root


@pytest.fixture(scope="module")
def stages(gray):
    """The trainers of stages 1 and 2 after one full epoch each, with all plots."""
    common = {**FEW, "data": str(gray / "data.yaml"), "project": str(gray), "plots": True}
    first = FewShotTrainer("stage1.yaml", {**common, "model": str(gray / "yolo11n-tiny.yaml"), "name": "one"})
    first.train()
    second = {"model": str(first.best), "name": "two", "n_way": 3, "k_shot": 1, "n_query": 1, "episodes": 4}
    second = FewShotTrainer("stage2.yaml", {**common, **second})
    second.train()
    return first, second


def test_both_stages_finish(stages):
    for trainer in stages:
        for file in (trainer.best, trainer.last):
            ckpt = torch.load(file, weights_only=False)
            assert ckpt["epoch"] == -1  # stripped
            assert ckpt["model"].prior_strength is not None  # prepared for enrollment
            assert ckpt["model"].yaml["channels"] == 1 and len(ckpt["model"].memory[0][0]) > 0
        assert (trainer.save_dir / "embedding.png").exists() and (trainer.save_dir / "losses.png").exists()


def test_the_episodes_are_plotted_in_gray(stages):
    files = sorted(stages[1].save_dir.glob("*episode*.jpg"))
    assert {"episode0.jpg", "val_episode0.jpg"} <= {x.name for x in files}
    for file in files:
        low, high = np.percentile(np.ptp(cv2.imread(str(file)).astype(int), axis=2), (50, 100))
        assert low < 8 and high > 60  # gray images, boxes in color


def test_the_best_model_validates_enrolls_and_predicts(stages, gray, tmp_path):
    model = FewShotYOLO(stages[1].best)
    keys = {"imgsz": 64, "project": str(tmp_path), "verbose": False}
    metrics = model.val(data=str(gray / "data.yaml"), workers=0, name="val", plots=True, **keys)
    assert np.isfinite(metrics.box.map50) and (metrics.save_dir / "val_batch0_pred.jpg").exists()
    novel = YAML.load(gray / "data.yaml") | {"names": [f"new {i}" for i in range(4)]}
    YAML.save(gray / "novel.yaml", novel)
    found = model.predict(
        str(gray / "images/val/00.png"), support=str(gray / "novel.yaml"), save=True, conf=0.0, name="predict", **keys
    )
    assert len(model.names) == 8 and found[0].orig_img.shape == (64, 64, 1)
    assert (tmp_path / "predict/support_check.png").exists() and (tmp_path / "predict/00.jpg").exists()
    model.save(tmp_path / "saved.pt")
    again = YOLO(tmp_path / "saved.pt").predict(str(gray / "images/val/00.png"), imgsz=64, conf=0.0, verbose=False)
    np.testing.assert_allclose(again[0].boxes.conf, found[0].boxes.conf, atol=1e-4)


def test_unlabeled_gray_images_get_labels(stages, gray, tmp_path):
    (tmp_path / "unlabeled").mkdir()
    for i in range(3):
        image = np.random.default_rng(i).integers(0, 256, (64, 64), np.uint8)
        assert cv2.imwrite(str(tmp_path / "unlabeled" / f"{i}.png"), image)
    data = pseudo_label(
        stages[1].best, gray / "data.yaml", tmp_path / "unlabeled", tmp_path / "more", conf=1e-6, imgsz=64
    )
    assert YAML.load(data)["channels"] == 1 and len(list((tmp_path / "more" / "labels").iterdir())) == 3
    assert cv2.imread(str(tmp_path / "more" / "check" / "0.jpg")).shape == (64, 64, 3)


@pytest.mark.parametrize("graft", ["none", "neck"])
def test_stage_three_learns_gray_shots_beside_gray_base_images(stages, gray, graft):
    YAML.save(gray / "shots.yaml", YAML.load(gray / "data.yaml") | {"names": ["w", "x", "y", "z"]})
    replay = {"base_replay": str(gray / "data.yaml"), "steps": 2, "batch": 4, "graft": graft}
    keys = {**FEW, "data": str(gray / "shots.yaml"), "project": str(gray), "name": "three", "model": stages[1].best}
    trainer = FewShotTrainer("stage3.yaml", {**keys, **replay})
    trainer.train()
    model = torch.load(trainer.best, weights_only=False)["model"]
    assert list(model.names.values())[4:] == ["w", "x", "y", "z"] and model.yaml["channels"] == 1


@pytest.mark.parametrize(("yaml", "channels"), [({"channels": 1}, 1), ({"channels": 6}, 6), ({}, 3)])
def test_base_images_have_the_channels_of_the_model(yaml, channels):
    model = torch.nn.Module()
    model.yaml, model.names = yaml, {0: "a"}
    assert base_support(model, []).channels == channels
