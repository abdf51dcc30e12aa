"""Published results beside ours: AP at a number of shots against the parameters of the model."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ultralytics.utils import plt_settings

from yolo_fewshot.errors import few

COLUMNS = ("method", "shots", "ap", "params_m", "source")


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
        for results, style in ((published, {"color": "0.5", "marker": "o"}), (ours, {"color": "C0", "marker": "s"})):
            for x in (x for x in results if x.shots == k):
                ax.errorbar(x.params_m, x.ap, x.half or 0, capsize=3, **style)
                ax.annotate(x.method, (x.params_m, x.ap), (5, 3), textcoords="offset points", fontsize=7)
        ax.set(title=f"{k} shots", xlabel="parameters, millions", ylabel="COCO AP, %", xscale="log", ylim=(0, None))
    fig.savefig(file, dpi=200)
    plt.close(fig)
