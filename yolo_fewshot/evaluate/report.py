"""Rows of a benchmark, their tables, and the plot of AP against the number of shots."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from ultralytics.utils import LOGGER, plt_settings

from yolo_fewshot.files import AtomicPath

BASELINE = "best stock"  # of both and all `freeze`, by the main metric of the protocol
FIGURES = {
    "FSOD": ("FSOD_nAP50", "FSOD_nAP"),
    "G-FSOD": ("GFSOD_bAP50", "GFSOD_nAP50", "GFSOD_HM50", "GFSOD_bAP", "GFSOD_nAP", "GFSOD_HM"),
}
MAIN = {"FSOD": "FSOD_nAP50", "G-FSOD": "GFSOD_HM50"}  # the metric by which methods are compared
FILES = ("model", "stock", "stage1")
OFFSET = 0.01  # distance between the methods' error bars, relative to the largest number of shots
LEAKAGE = "LEAKAGE: the starting checkpoint was trained on"
COLUMNS = ("method", "shots", "seed", *FIGURES["FSOD"], *FIGURES["G-FSOD"], "seconds", *FILES, "version")
# 97.5 % quantiles of Student's t for 1 to 30 degrees of freedom.
T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip

Row = dict[str, Any]
Rows = dict[tuple[str, int, int], Row]


def read_rows(file: Path) -> Rows:
    """Return the rows of a CSV file.

    Args:
        file (Path): The file, which may be missing.

    Returns:
        (Rows): The rows by method, number of shots and seed.
    """
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    numbers = {*FIGURES["FSOD"], *FIGURES["G-FSOD"], "seconds"}
    table = csv.DictReader(io.StringIO(text))
    rows: list[Row] = [{k: float(v) if k in numbers else v for k, v in x.items()} for x in table]
    return {(x["method"], int(x["shots"]), int(x["seed"])): x for x in rows}


def add_row(file: Path, row: Row) -> None:
    """Add a row to a CSV file atomically, so that the file never has a partial row.

    Args:
        file (Path): The file.
        row (Row): Values by column.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    old = file.read_bytes() if file.is_file() else b""
    if not old:
        writer.writeheader()
    writer.writerow({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()})
    AtomicPath(file).write_bytes(old + text.getvalue().encode())


def interval(values: Iterable[float]) -> tuple[float, float | None]:
    """Return a mean with its 95 % Student-t interval.

    Args:
        values (Iterable[float]): Values.

    Returns:
        mean (float): Their mean.
        half (float | None): Half-width of the interval, None for a single value.
    """
    x = np.array(list(values), float)
    if len(x) < 2:
        return float(x.mean()), None
    return float(x.mean()), float(T[min(len(x) - 1, len(T)) - 1] * x.std(ddof=1) / len(x) ** 0.5)


def with_baseline(rows: Rows, methods: list[str], counts: list[int], seeds: int, kind: str) -> tuple[Rows, dict]:
    """Add the rows of the best stock fine-tuning for each number of shots, and return which one it is.

    Args:
        rows (Rows): Rows by method, number of shots and seed.
        methods (list[str]): Methods; stock fine-tuning has its `freeze` after a hyphen.
        counts (list[int]): Numbers of shots.
        seeds (int): Number of draws.
        kind (str): Protocol, whose main metric decides.

    Returns:
        rows (Rows): The rows, with those of `BASELINE`.
        best (dict[int, str]): The best method by number of shots; empty without stock fine-tuning.
    """
    stock, best = [m for m in methods if "-" in m], {}
    for k in counts if stock else ():
        best[k] = max(stock, key=lambda m: sum(rows[m, k, s][MAIN[kind]] for s in range(seeds)))
    return {**rows, **{(BASELINE, k, s): rows[m, k, s] for k, m in best.items() for s in range(seeds)}}, best


def format_table(
    kind: str, rows: Rows, methods: list[str], counts: list[int], seeds: int, best: dict[int, str]
) -> list[str]:
    """Format the table of one protocol.

    Args:
        kind (str): Protocol.
        rows (Rows): Rows by method, number of shots and seed.
        methods (list[str]): Methods to list.
        counts (list[int]): Numbers of shots.
        seeds (int): Number of draws.
        best (dict[int, str]): The best stock fine-tuning by number of shots, see `with_baseline`.

    Returns:
        (list[str]): Lines of a Markdown table.
    """
    reference = next((m for m in (BASELINE, "full") if m in methods), None)
    titles = [re.sub(r"^\w+_", "", f) for f in FIGURES[kind]]
    titles = [x if x.endswith("50") else f"{x}50-95" for x in titles]
    main = titles[FIGURES[kind].index(MAIN[kind])]
    lines = [
        f"| shots | method | {' | '.join(titles)} | {main} minus that of {reference or BASELINE} | seconds |",
        f"|{'---|' * (len(titles) + 4)}",
    ]
    for k, method in product(counts, methods):
        of = {c: [rows[method, k, s][c] for s in range(seeds)] for c in (*FIGURES[kind], "seconds")}
        cells = [_text(interval(of[c])) for c in FIGURES[kind]]
        difference = ""
        if method == BASELINE:
            difference = best[k].replace("-", ", freeze=")
        elif reference and method != reference:
            pairs = zip(of[MAIN[kind]], (rows[reference, k, s][MAIN[kind]] for s in range(seeds)))
            difference = _text(interval(a - b for a, b in pairs), "+")
        lines.append(f"| {k} | {method} | {' | '.join(cells)} | {difference} | {np.mean(of['seconds']):.1f} |")
    return lines


def _text(figures: tuple[float, float | None], sign: str = "") -> str:
    """Format a mean with its interval."""
    mean, half = figures
    return f"{mean:{sign}.3f}" + ("" if half is None else f" ± {half:.3f}")


def report(out: Path, record: dict[str, Any], novel: int) -> None:
    """Write and log the tables, and draw the plot.

    Args:
        out (Path): Folder of the results.
        record (dict[str, Any]): Arguments and environment of the run, as in benchmark.json.
        novel (int): Number of novel classes.
    """
    counts, seeds, methods = record["shots"], record["seeds"], record["methods"]
    read, tables = read_rows(out / "rows.csv"), {}
    leakage = f" {LEAKAGE} {', '.join(record['leakage'])}" if record["leakage"] else ""
    lines = []
    for kind, what in (("FSOD", "novel images alone"), ("G-FSOD", "base and novel images together")):
        title = f"{kind}: {what}, {novel} novel classes, {seeds} seed{'s' * (seeds > 1)}."
        tables[kind], best = with_baseline(read, methods, counts, seeds, kind)
        listed = [BASELINE] * bool(best) + methods
        lines += [f"## {title}{leakage}", "", *format_table(kind, tables[kind], listed, counts, seeds, best), ""]
    if seeds > 1:
        lines += ["Means over the seeds, ± the half-width of the 95 % Student-t interval; differences are paired.", ""]
    lines += [f"    {record['command']}", ""]
    lines += [", ".join(f"{k} {v}" for x in ("versions", "machine") for k, v in record[x].items() if v)]
    AtomicPath(out / "results.md").write_bytes("\n".join([*lines, ""]).encode())
    LOGGER.info("\n" + "\n".join(lines))
    shown = [m for m in listed if "-" not in m]
    _plot(tables, shown, counts, seeds, leakage.strip(), out / "results.png")


@plt_settings()
def _plot(tables: dict[str, Rows], methods: list[str], counts: list[int], seeds: int, title: str, file: Path) -> None:
    """Plot AP50 against the number of shots."""
    import matplotlib.pyplot as plt  # as Ultralytics does, where it is needed

    fig, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    labels = {"FSOD": "nAP50, novel images alone", "G-FSOD": "harmonic mean of bAP50 and nAP50"}
    for ax, (kind, label) in zip(axes, labels.items()):
        for i, method in enumerate(methods):
            points = [interval(tables[kind][method, k, s][MAIN[kind]] for s in range(seeds)) for k in counts]
            style = {"color": "black", "linestyle": "--"} if method == BASELINE else {}
            ax.errorbar(
                np.array(counts) + OFFSET * max(counts) * (i - (len(methods) - 1) / 2),
                [m for m, _ in points],
                [h or 0 for _, h in points],
                marker=".",
                capsize=3,
                label=method,
                **style,
            )
        ax.set(title=kind, xlabel="shots", ylabel=label, xticks=counts, ylim=(0, None))
    axes[0].legend(fontsize=8)
    fig.suptitle(title)
    fig.savefig(file, dpi=200)
    plt.close(fig)
