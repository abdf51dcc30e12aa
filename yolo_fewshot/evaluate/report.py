"""Rows of a benchmark, their tables, and the plot of AP against the number of shots."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from ultralytics.utils import LOGGER, plt_settings

from yolo_fewshot.evaluate.leakage import LEAKAGE
from yolo_fewshot.evaluate.methods import is_stock
from yolo_fewshot.evaluate.published import Result, format_published, plot_published
from yolo_fewshot.files import AtomicPath

BASELINE = "best stock"  # of both and all `freeze`, by the main metric of the protocol
START = "start"  # row of the checkpoint before anything is learned
FIGURES = {
    "FSOD": ("FSOD_nAP50", "FSOD_nAP", "FSOD_cAP50", "FSOD_cAP"),
    "G-FSOD": (
        "GFSOD_bAP50", "GFSOD_nAP50", "GFSOD_HM50", "GFSOD_bAP", "GFSOD_nAP", "GFSOD_HM", "GFSOD_alarms",
    ),
}  # fmt: skip
MAIN = {"FSOD": "FSOD_nAP50", "G-FSOD": "GFSOD_HM50"}  # the metric by which methods are compared
TIE = {"FSOD": "FSOD_nAP", "G-FSOD": "GFSOD_nAP50"}  # where that is equal, as with all old classes forgotten
TITLES = {  # of columns, others are named without the protocol
    "FSOD_nAP": "nAP50-95",
    "FSOD_cAP50": "COCO nAP50",
    "FSOD_cAP": "COCO nAP",
    "GFSOD_bAP": "bAP50-95",
    "GFSOD_nAP": "nAP50-95",
    "GFSOD_HM": "HM50-95",
    "GFSOD_alarms": "false alarms",
}
COSTS = {"seconds": "seconds", "ms": "ms per image", "ram": "RAM, MiB", "gpu": "GPU, MiB", "params": "parameters, M"}
FILES = ("model", "stock", "stage1")
OFFSET = 0.01  # distance between the methods' error bars, relative to the largest number of shots
NUMBERS = (*FIGURES["FSOD"], *FIGURES["G-FSOD"], *COSTS, "wall")
COLUMNS = ("method", "shots", "seed", *NUMBERS, *FILES, "version")
NOTES = (
    "nAP and bAP are Ultralytics' mAP of the novel and the base classes, HM their harmonic mean; COCO nAP is "
    "faster-coco-eval's (101 points, 100 detections per image). False alarms are detections of novel classes per image "
    "without them, above the suggested thresholds (0.25 without one). Seconds and memory are those of learning: RAM is "
    "the peak of the whole process (interpreter, libraries and what earlier rows left included, loader processes not), "
    "GPU that of tensors. Milliseconds are those of the network per image, without reading and NMS: in batches of 32 "
    "on a CUDA GPU, one by one elsewhere."
)
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
        (Rows): The rows by method, number of shots and seed; an empty cell of a figure is NaN.
    """
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    table = csv.DictReader(io.StringIO(text))
    rows: list[Row] = [{k: float(v or "nan") if k in NUMBERS else v for k, v in x.items()} for x in table]
    return {(x["method"], int(x["shots"]), int(x["seed"])): x for x in rows}


def add_row(file: Path, row: Row) -> None:
    """Add a row to a CSV file atomically, so that the file never has a partial row.

    Args:
        file (Path): The file.
        row (Row): Values by column; NaN becomes an empty cell.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    old = file.read_bytes() if file.is_file() else b""
    if not old:
        writer.writeheader()
    rounded = {k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()}
    writer.writerow({k: v for k, v in rounded.items() if v == v})
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
    stock, best = [m for m in methods if is_stock(m)], {}
    for k in counts if stock else ():
        sums = {m: [sum(rows[m, k, s][x[kind]] for s in range(seeds)) for x in (MAIN, TIE)] for m in stock}
        best[k] = max(sums, key=lambda m: sums[m])
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
    main = _title(MAIN[kind])
    listed = [rows[m, k, s] for m, k, s in product(methods, counts, range(seeds))]
    costs = [c for c in (COSTS if kind == "FSOD" else ("seconds",)) if any(x[c] == x[c] for x in listed)]
    titles = [*map(_title, FIGURES[kind]), f"{main} minus that of {reference or BASELINE}", *(COSTS[c] for c in costs)]
    lines = [f"| shots | method | {' | '.join(titles)} |", f"|{'---|' * (len(titles) + 2)}"]
    for k, method in product(counts, methods):
        of = {c: [rows[method, k, s][c] for s in range(seeds)] for c in (*FIGURES[kind], *costs)}
        cells = [_text(interval(of[c])) for c in FIGURES[kind]]
        difference = ""
        if method == BASELINE:
            difference = best[k].replace("-", ", freeze=")
        elif reference and method != reference:
            pairs = zip(of[MAIN[kind]], (rows[reference, k, s][MAIN[kind]] for s in range(seeds)))
            difference = _text(interval(a - b for a, b in pairs), "+")
        cells += [difference, *(_cost(np.mean(of[c])) for c in costs)]
        lines.append(f"| {k} | {method} | {' | '.join(cells)} |")
    return lines


def _title(column: str) -> str:
    """Return the title of a column in a table."""
    return TITLES.get(column, re.sub(r"^\w+_", "", column))


def _cost(value: float) -> str:
    """Format the mean of a cost."""
    return f"{value:.1f}" if value == value else ""


def _text(figures: tuple[float, float | None], sign: str = "") -> str:
    """Format a mean with its interval; nothing if it is NaN."""
    mean, half = figures
    if mean != mean:
        return ""
    return f"{mean:{sign}.3f}" + ("" if half is None else f" ± {half:.3f}")


def report(out: Path, record: dict[str, Any], novel: int, published: Sequence[Result] = ()) -> None:
    """Write and log the tables, and draw the plot.

    Args:
        out (Path): Folder of the results.
        record (dict[str, Any]): Arguments and environment of the run, as in benchmark.json.
        novel (int): Number of novel classes.
        published (Sequence[Result]): Results of others.
    """
    counts, seeds, methods = record["shots"], record["seeds"], record["methods"]
    read, tables = read_rows(out / "rows.csv"), {}
    leakage = f" {LEAKAGE} {', '.join(record['leakage'])}" if record["leakage"] else ""
    lines, start = [], read.get((START, 0, 0))
    protocols = {"FSOD": "novel images alone", **({"G-FSOD": "base and novel images together"} if start else {})}
    for kind, what in protocols.items():
        title = f"{kind}: {what}, {novel} novel classes, {seeds} seed{'s' * (seeds > 1)}."
        tables[kind], best = with_baseline(read, methods, counts, seeds, kind)
        listed = [BASELINE] * bool(best) + methods
        lines += [f"## {title}{leakage}", ""]
        if kind == "G-FSOD" and start:
            before = [f"{_title(c)} {_text((start[c], None))}" for c in ("GFSOD_bAP50", "GFSOD_bAP")]
            lines += [f"Before learning: {', '.join(before)}.", ""]
        lines += [*format_table(kind, tables[kind], listed, counts, seeds, best), ""]
    if published:
        lines += ["## Published", "", *format_published(published), ""]
        plot_published(_own_results(tables["FSOD"], methods, counts, seeds), published, out / "published.png")
    lines += [NOTES, ""]
    if seeds > 1:
        lines += ["Means over the seeds, ± the half-width of the 95 % Student-t interval; differences are paired.", ""]
    lines += [f"    {record['command']}", ""]
    lines += [", ".join(f"{k} {v}" for x in ("versions", "machine") for k, v in record[x].items() if v)]
    AtomicPath(out / "results.md").write_bytes("\n".join([*lines, ""]).encode())
    LOGGER.info("\n" + "\n".join(lines))
    shown = [m for m in listed if not is_stock(m)]
    _plot(tables, shown, counts, seeds, leakage.strip(), out / "results.png")


def _own_results(rows: Rows, methods: list[str], counts: list[int], seeds: int) -> list[Result]:
    """Return the COCO AP of each method and number of shots in %."""
    results = []
    for k, m in product(counts, methods):
        mean, half = interval(100 * rows[m, k, s]["FSOD_cAP"] for s in range(seeds))
        results.append(Result(m, k, mean, rows[m, k, 0]["params"], "", half))
    return results


@plt_settings()
def _plot(tables: dict[str, Rows], methods: list[str], counts: list[int], seeds: int, title: str, file: Path) -> None:
    """Plot AP50 against the number of shots."""
    import matplotlib.pyplot as plt  # as Ultralytics does, where it is needed

    fig, grid = plt.subplots(1, len(tables), figsize=(5.5 * len(tables), 4.5), layout="constrained", squeeze=False)
    axes = grid[0]
    labels = {"FSOD": "nAP50, novel images alone", "G-FSOD": "harmonic mean of bAP50 and nAP50"}
    for ax, kind in zip(axes, tables):
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
        ax.set(title=kind, xlabel="shots", ylabel=labels[kind], xticks=counts, ylim=(0, None))
    axes[0].legend(fontsize=8)
    fig.suptitle(title)
    fig.savefig(file, dpi=200)
    plt.close(fig)
