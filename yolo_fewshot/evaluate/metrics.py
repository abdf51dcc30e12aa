"""Detection metrics of base and novel classes, and their harmonic mean."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from ultralytics.utils.metrics import DetMetrics

from yolo_fewshot.files import AtomicPath

HARMONIC_MEAN = "harmonic mean"
RESULTS = ("P", "R", "mAP50", "mAP50-95")
COCO = ("COCO AP50", "COCO AP50-95")
COLUMNS = ("classes", "images", "instances", *RESULTS)
KEYS = {  # columns that have a harmonic mean, and their keys in `results_dict`
    "mAP50": "metrics/{}_mAP50(B)",
    "mAP50-95": "metrics/{}_mAP50-95(B)",
    "COCO AP50": "metrics/{}_AP50(COCO)",
    "COCO AP50-95": "metrics/{}_AP50-95(COCO)",
}


def harmonic_mean(a: float, b: float) -> float:
    """Return the harmonic mean of two values, 0 if either is 0.

    Args:
        a (float): First value, at least 0.
        b (float): Second value, at least 0.

    Returns:
        (float): 2ab / (a + b).
    """
    return 2 * a * b / (a + b) if a and b else 0.0


class FewShotMetrics(DetMetrics):
    """Ultralytics' metrics, with separate ones for base and novel classes.

    Attributes:
        novel (set[int]): Class indices of the novel classes; if empty, this is a stock `DetMetrics`.
        groups (dict[str, dict[str, float]]): Metrics of `base`, `novel` and `harmonic mean` by column, set by
            `process`. Means are over the classes with labels; a group without labels has no P, R and AP.

    Examples:
        >>> metrics = FewShotYOLO("best.pt").val(data="shots.yaml")
        >>> metrics.groups["novel"]["mAP50"], metrics.results_dict["metrics/HM_mAP50(B)"]
    """

    def __init__(self, names: dict[int, str] | None = None, novel: Iterable[int] = ()):
        """Initialize the metrics.

        Args:
            names (dict[int, str], optional): Class names.
            novel (Iterable[int]): Class indices of the novel classes.
        """
        super().__init__(names)
        self.novel = set(novel)
        self.groups: dict[str, dict[str, float]] = {}

    def process(self, *args: Any, **kwargs: Any) -> dict[str, np.ndarray]:
        """Process the statistics as Ultralytics does, then those of the groups.

        Args:
            *args (Any): Ultralytics' arguments.
            **kwargs (Any): Ultralytics' arguments.

        Returns:
            (dict[str, np.ndarray]): Concatenated statistics.
        """
        stats = super().process(*args, **kwargs)
        self.groups = {}
        if self.novel:
            novel = np.isin(self.ap_class_index, list(self.novel))
            self.groups = {"base": self._group(~novel), "novel": self._group(novel)}
            self._compare()
        return stats

    def _group(self, rows: np.ndarray) -> dict[str, float]:
        """Return the metrics of a group of the classes with labels, given as a mask (n,) bool."""
        classes = self.ap_class_index[rows]
        group = {
            "classes": len(classes),
            "images": sum(bool(np.isin(shown, classes).any()) for shown in self.stats["target_img"]),
            "instances": int(self.nt_per_class[classes].sum()),
        }
        results = [self.class_result(i) for i in np.flatnonzero(rows)]
        return {**group, **dict(zip(RESULTS, np.mean(results, axis=0).tolist() if results else ()))}

    def _compare(self) -> None:
        """Set the harmonic means of the columns that both groups have."""
        base, novel = self.groups["base"], self.groups["novel"]
        means = {k: harmonic_mean(base[k], novel[k]) for k in KEYS if k in base and k in novel}
        if means:
            self.groups[HARMONIC_MEAN] = means

    def add_coco(self, group: str, ap50: float, ap: float) -> None:
        """Add the COCO metrics of a group.

        Args:
            group (str): 'base' or 'novel'.
            ap50 (float): AP at IoU 0.5.
            ap (float): Mean of the AP at IoU 0.5 to 0.95.
        """
        self.groups[group].update(zip(COCO, (ap50, ap)))
        self._compare()

    @property
    def results_dict(self) -> dict[str, float]:
        """Ultralytics' results and, if there are novel classes, the AP of both groups and the harmonic means."""
        results = super().results_dict
        for name, group in self.groups.items():
            prefix = "HM" if name == HARMONIC_MEAN else name
            results.update({key.format(prefix): group[k] for k, key in KEYS.items() if k in group})
        return results

    def save_groups(self, file: str | Path) -> None:
        """Write the groups to a CSV file; missing values are empty cells.

        Args:
            file (str | Path): File to write.
        """
        columns = (*COLUMNS, *COCO) if any(COCO[0] in g for g in self.groups.values()) else COLUMNS
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("group", *columns))
        for name, group in self.groups.items():
            writer.writerow((name, *(round(group[k], 6) if k in group else "" for k in columns)))
        AtomicPath(file).write_bytes(text.getvalue().encode())
