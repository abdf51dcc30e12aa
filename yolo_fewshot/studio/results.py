"""What the studio gives away: the detector with the learned classes, also as ONNX."""

from __future__ import annotations

import os
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path

from yolo_fewshot.nn.rows import ClassRows, class_rows, enrolled_classes
from yolo_fewshot.studio.learning import Learned
from yolo_fewshot.yolo import FewShotYOLO


def with_classes(yolo: FewShotYOLO, rows: ClassRows, learned: Learned, conf: Mapping[str, float]) -> FewShotYOLO:
    """Return a copy of a detector with the learned classes.

    Args:
        yolo (FewShotYOLO): The detector.
        rows (ClassRows): Class rows of the network that the classes were learned with.
        learned (Learned): The classes.
        conf (Mapping[str, float]): Their confidence thresholds, for the record.
    """
    yolo.predictor = None  # which cannot be copied
    built = deepcopy(yolo)
    new = class_rows(built.model)
    for name in ("mean", "std"):  # the statistics of the features, where the embedding depends on them
        if hasattr(rows, name):
            setattr(new, name, getattr(rows, name))
    model = built.model
    indices, enrolled = {str(n): i for i, n in model.names.items()}, dict(enrolled_classes(model))
    for c, name in enumerate(learned.names):
        index = indices.get(name, new.head.nc)
        new.set(index, [(vectors[c], offsets[c]) for vectors, offsets in learned.weights])
        model.names[index] = name
        record = {"shots": learned.shots[c], "method": learned.methods[c], "conf": conf[name]}
        enrolled[name] = {**record, "replaced": enrolled.get(name, {}).get("replaced")}
    model.enrolled = enrolled
    model.nc = model.yaml["nc"] = new.head.nc
    return built


def export_onnx(yolo: FewShotYOLO, file: Path, imgsz: int) -> None:
    """Export a model to ONNX; nothing else is left beside the file.

    Args:
        yolo (FewShotYOLO): The model, which is not changed.
        file (Path): *.onnx file.
        imgsz (int): Image size in pixels.

    Raises:
        ImportError: If the packages that export needs are not installed.
    """
    checkpoint = file.with_name(f".{file.stem}.pt")
    yolo.save(checkpoint)
    try:
        made = FewShotYOLO(checkpoint).export(format="onnx", imgsz=imgsz, verbose=False)
        os.replace(made, os.path.realpath(file))
    finally:
        checkpoint.unlink(missing_ok=True)
