"""Figures of a checkpoint in both protocols: AP of novel and base classes, false alarms, and time of inference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ultralytics import YOLO

from yolo_fewshot.evaluate import coco
from yolo_fewshot.evaluate.alarms import false_alarms
from yolo_fewshot.evaluate.learn import settings_for
from yolo_fewshot.evaluate.metrics import harmonic_mean
from yolo_fewshot.evaluate.plan import Plan
from yolo_fewshot.evaluate.recorder import Recorded, mean_ap, record


def measure(plan: Plan, file: Path, queries: Path, folder: Path) -> dict[str, float]:
    """Return the figures of a checkpoint that has learned the novel classes.

    Args:
        plan (Plan): Plan.
        file (Path): Checkpoint.
        queries (Path): data.yaml whose val split has the novel queries.
        folder (Path): Folder that Ultralytics may write to.

    Returns:
        (dict[str, float]): Figures by column; those of base classes are missing if there are no images of them.
    """
    yolo, (novel, base) = YOLO(file), _ranges(plan)
    alone, ms = _record(plan, yolo, queries, folder)
    figures = dict(zip(("FSOD_nAP50", "FSOD_nAP"), mean_ap(alone, novel)))
    if coco.available():
        figures |= dict(zip(("FSOD_cAP50", "FSOD_cAP"), coco.coco_ap(alone, novel)))
    figures |= {"ms": ms, "params": sum(p.numel() for p in yolo.model.parameters()) / 1e6}
    if base:
        old = _base_images(plan, yolo, folder)
        images = [*alone, *old] if plan.data.base_val else old
        for classes, name in ((base, "b"), (novel, "n")):
            figures |= dict(zip((f"GFSOD_{name}AP50", f"GFSOD_{name}AP"), mean_ap(images, classes)))
        for suffix, mean in (("50", "HM50"), ("", "HM")):
            figures[f"GFSOD_{mean}"] = harmonic_mean(*(figures[f"GFSOD_{x}AP{suffix}"] for x in "bn"))
        ordinary = [x.file for x in old if not any(c in novel for c in x.classes)]
        keys = settings_for("predict", plan.settings)
        figures["GFSOD_alarms"] = false_alarms(yolo, ordinary, plan.data.novel, **keys)
    return figures


def measure_start(plan: Plan, queries: Path, folder: Path) -> dict[str, float]:
    """Return the AP of the base classes before anything is learned, on the images of the mixed protocol.

    Args:
        plan (Plan): Plan.
        queries (Path): data.yaml whose val split has the novel queries.
        folder (Path): Folder that Ultralytics may write to.

    Returns:
        (dict[str, float]): Figures by column.
    """
    yolo = YOLO(plan.model)
    alone, ms = _record(plan, yolo, queries, folder) if plan.data.base_val else ([], float("nan"))
    images = [*alone, *_base_images(plan, yolo, folder)]
    return {**dict(zip(("GFSOD_bAP50", "GFSOD_bAP"), mean_ap(images, _ranges(plan)[1]))), "ms": ms}


def _ranges(plan: Plan) -> tuple[range, range]:
    """Return the indices of the novel and the base classes among the measured ones."""
    n = len(plan.data.novel)
    return range(n), range(n, n + len(plan.data.base))


def _base_images(plan: Plan, yolo: YOLO, folder: Path) -> list[Recorded]:
    """Record the images of the base classes; those of a folder with base.yaml have the novel queries among them."""
    return _record(plan, yolo, plan.data.base_val or plan.data.folder / "data.yaml", folder)[0]


def _record(plan: Plan, yolo: YOLO, data: Path, folder: Path) -> tuple[list[Recorded], float]:
    """Record the val split of a data.yaml."""
    keys: dict[str, Any] = settings_for("val", plan.settings)
    return record(yolo, data, (*plan.data.novel, *plan.data.base), folder, **keys)
