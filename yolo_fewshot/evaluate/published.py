"""Published results beside ours: AP at a number of shots against the parameters of the model."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ultralytics.utils import plt_settings

from yolo_fewshot.errors import few

COLUMNS = ("method", "shots", "ap", "params_m", "source")
HEIGHT, LINE = 270, 9  # of a panel, and of a name in it, in points


class Result(NamedTuple):
    """A result.

    Attributes:
        method (str): Method.
        shots (int): Number of shots.
        ap (float): COCO AP in %.
        params_m (float): Parameters in millions.
        source (str): Where it is published.
        half (float | None): Half-width of the interval of `ap`.
    """

    method: str
    shots: int
    ap: float
    params_m: float
    source: str
    half: float | None = None


def read_published(file: str | Path) -> list[Result]:
    """Read published results.

    Args:
        file (str | Path): CSV file with the columns method, shots, ap (in %), params_m (in millions) and source.

    Returns:
        (list[Result]): Results.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If a column is missing, or a cell is invalid.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(
            f"published={file} does not exist. It is a CSV file with the columns {','.join(COLUMNS)}."
        )
    table = csv.DictReader(io.StringIO(Path(file).read_text(encoding="utf-8-sig")))
    missing = [c for c in COLUMNS if c not in (table.fieldnames or ())]
    if missing:
        raise ValueError(f"published={file} lacks the column {few(missing)}. It needs {','.join(COLUMNS)}.")
    results = []
    for i, row in enumerate(table):
        try:
            x = Result(row["method"], int(row["shots"]), float(row["ap"]), float(row["params_m"]), row["source"] or "")
        except (TypeError, ValueError) as e:
            raise ValueError(f"Row {i + 1} of published={file} has an invalid number: {e}.") from e
        if not (0 <= x.ap <= 100 and 0 < x.params_m < math.inf):
            raise ValueError(f"Row {i + 1} of published={file} must have ap in % and params_m above 0, in millions.")
        results.append(x)
    return results


def format_published(results: Sequence[Result]) -> list[str]:
    """Format a table.

    Args:
        results (Sequence[Result]): Published results.

    Returns:
        (list[str]): Lines of a Markdown table.
    """
    lines = ["| shots | method | COCO AP, % | parameters, M | source |", f"|{'---|' * 5}"]
    return lines + [
        f"| {x.shots} | {x.method} | {x.ap:.1f} | {x.params_m:g} | {x.source} |"
        for x in sorted(results, key=lambda x: x.shots)
    ]


@plt_settings()
def plot_published(ours: Sequence[Result], published: Sequence[Result], file: Path) -> None:
    """Plot AP against parameters, a panel for each number of shots that both have.

    Args:
        ours (Sequence[Result]): Own results.
        published (Sequence[Result]): Published results.
        file (Path): File to write; nothing is written if no number of shots is common.
    """
    import matplotlib.pyplot as plt  # as Ultralytics does, where it is needed

    counts = sorted({x.shots for x in ours} & {x.shots for x in published})
    if not counts:
        return
    fig, grid = plt.subplots(1, len(counts), figsize=(5.5 * len(counts), 4.5), layout="constrained", squeeze=False)
    for ax, k in zip(grid[0], counts):
        ax.set(title=f"{k} shots", xlabel="parameters, millions", ylabel="COCO AP, %", xscale="log")
        shown = [[x for x in results if x.shots == k] for results in (ours, published)]
        for results, style in zip(shown, ({"color": "C0", "marker": "s"}, {"color": "0.5", "marker": "o"})):
            for x in results:
                ax.errorbar(x.params_m, x.ap, x.half or 0, capsize=3, **style)
        ax.set_ylim(0, None)
        _name_points(ax, [*shown[0], *shown[1]])
    fig.savefig(file, dpi=200)
    plt.close(fig)


def _name_points(ax: Any, results: Sequence[Result]) -> None:
    """Write the method beside each point: to the left of the smallest and of large models, where there is room."""
    ax.margins(x=0.2)
    (low, high), smallest = ax.get_xlim(), min(x.params_m for x in results)
    unit = HEIGHT / ax.get_ylim()[1]
    heights: dict[tuple[bool, int], float] = {}  # of the last name on a side of models of a size
    for x in sorted(results, key=lambda x: x.ap):
        left = x.params_m > math.sqrt(low * high) or x.params_m < 1.05 * smallest
        place = left, round(4 * math.log10(x.params_m))
        heights[place] = max(x.ap * unit + 4, heights.get(place, -math.inf) + LINE)
        at = -5 if left else 5, heights[place] - x.ap * unit
        align = "right" if left else "left"
        ax.annotate(x.method, (x.params_m, x.ap), at, textcoords="offset points", fontsize=7, ha=align)
