"""A short run on the built-in data: the losses fall, and episodes raise the mAP of enrolled classes."""

import csv

from yolo_fewshot import FewShotYOLO


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


def test_the_losses_of_both_stages_fall(trained):
    for trainer in trained:
        values = losses(trainer)
        assert values[-1] < 0.9 * values[0], values


def test_stage_two_raises_the_map_of_enrolled_classes(trained):
    before, after = (novel_map50(trainer) for trainer in trained)
    print(f"novel mAP50 {before:.3f} after stage 1, {after:.3f} after stage 2")
    assert after > before and after > 0.2
