"""A short real run on the built-in data: the losses fall, and episodes make enrolled classes easier to find."""

import csv

import pytest

from yolo_fewshot import FewShotTrainer, FewShotYOLO
from yolo_fewshot.plugin import cfg_dir

SETTINGS = {
    "imgsz": 96, "workers": 0, "plots": False, "optimizer": "AdamW", "lr0": 0.003, "warmup_epochs": 1, "val": False,
    "warmup_bias_lr": 0.0, "verbose": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("learning")
    model = (cfg_dir() / "fewshot.yaml").read_text().replace("width_multiple: 0.25", "width_multiple: 0.125")
    (root / "small.yaml").write_text(model)
    common = {**SETTINGS, "project": str(root)}
    stage1 = FewShotTrainer(
        "stage1.yaml",
        {
            **common,
            "model": str(root / "small.yaml"),
            "name": "stage1",
            "epochs": 5,
            "batch": 16,
            "nbs": 16,
            "mosaic": 0.0,
        },
    )
    stage1.train()
    stage2 = FewShotTrainer(
        "stage2.yaml",
        {**common, "model": str(stage1.best), "name": "stage2", "epochs": 5, "episodes": 40, "n_way": 8},
    )
    stage2.train()
    return stage1, stage2


def losses(trainer):
    with open(trainer.csv) as f:
        return [
            sum(float(v) for k, v in row.items() if k.startswith("train/") and "loss" in k) for row in csv.DictReader(f)
        ]


def novel_map50(trainer):
    model = FewShotYOLO(trainer.best)
    shots = model.enroll("fewshot-demo-novel.yaml", imgsz=96)
    assert shots == dict.fromkeys(shots, 5) and len(shots) == 8
    return model.val(data="fewshot-demo-novel.yaml", imgsz=96, workers=0, plots=False, verbose=False).box.map50


def test_the_losses_of_both_stages_fall(runs):
    for trainer in runs:
        values = losses(trainer)
        assert values[-1] < 0.9 * values[0], values


def test_enrolled_classes_are_found_better_after_stage_two(runs):
    before, after = (novel_map50(trainer) for trainer in runs)
    print(f"novel mAP50 {before:.3f} after stage 1, {after:.3f} after stage 2")
    assert after > before and after > 0.2
