"""How well `meta_val=` predicts novel classes: a scatter plot, and the share of pairs of models that it orders rightly.

    python tests/benchmarks/meta_val.py examples/results/meta_val/points.csv

The CSV file has a line for each model: `data`, the base and novel classes, `model`, `meta_ap50`, the AP50 of the
classes that were kept out of its training (mean of 1 and 5 shots, results.csv of the run), and `novel_map50`, that of
the novel classes (mean of the draws of 1 and 5 shots with `auto`, rows.csv of the benchmark). The plot is written
beside it. Models are compared with those of the same data only, since other classes are easier or harder.
"""

from __future__ import annotations

import csv
import sys
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt


class Point(NamedTuple):
    """A trained model.

    Attributes:
        data (str): Base and novel classes.
        model (str): How it was trained.
        meta (float): AP50 of the classes that were kept out, 0..1.
        novel (float): mAP50 of the novel classes, 0..1.
    """

    data: str
    model: str
    meta: float
    novel: float


def read(file: Path) -> list[Point]:
    """Read the points of a CSV file."""
    with open(file, encoding="utf-8") as f:
        return [Point(x["data"], x["model"], float(x["meta_ap50"]), float(x["novel_map50"])) for x in csv.DictReader(f)]


def ordered(points: list[Point]) -> tuple[int, int]:
    """Return the number of pairs of the same data that are in the same order by both figures, and of all such pairs."""
    pairs = [(a, b) for a, b in combinations(points, 2) if a.data == b.data]
    return sum((a.meta - b.meta) * (a.novel - b.novel) > 0 for a, b in pairs), len(pairs)


def plot(points: list[Point], file: Path) -> None:
    """Plot the novel classes against the kept-out ones; models after stage 1 are hollow."""
    fig, ax = plt.subplots(figsize=(9.5, 5), tight_layout=True)
    for i, data in enumerate(dict.fromkeys(p.data for p in points)):
        same = sorted((p for p in points if p.data == data), key=lambda p: p.meta)
        style = {"marker": "osD^vP*Xhp<>dH8"[i], "color": f"C{i}"}
        ax.plot([p.meta for p in same], [p.novel for p in same], lw=0.6, color=f"C{i}")
        ax.plot([], [], lw=0, **style, label="{}: {} of {}".format(data, *ordered(same)))
        for p in same:
            ax.plot(p.meta, p.novel, **style, ms=7, mfc="white" if p.model.startswith("stage 1") else f"C{i}")
    right, n = ordered(points)
    ax.set(xlabel="AP50 of the classes that meta_val keeps out", ylabel="mAP50 of the novel classes")
    ax.set_title(f"{right} of {n} pairs of models in the same order", fontsize=10)
    title = "pairs in the same order (hollow: after stage 1)"
    ax.legend(loc="upper left", bbox_to_anchor=(1.02, 1), fontsize=7, title=title, title_fontsize=7)
    ax.margins(0.12)
    fig.savefig(file, dpi=150)
    plt.close(fig)


if __name__ == "__main__":
    source = Path(sys.argv[1])
    found = read(source)
    plot(found, source.with_suffix(".png"))
    print("{} of {} pairs are in the same order.".format(*ordered(found)))
