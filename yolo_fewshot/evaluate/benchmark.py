"""The K-shot protocol: stock fine-tuning, enrollment, adaptation and ablations on the same draws of shots."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from ultralytics import YOLO
from ultralytics.utils import LOGGER

import yolo_fewshot
from yolo_fewshot.data.splits import shot_counts
from yolo_fewshot.evaluate import coco, provenance
from yolo_fewshot.evaluate.leakage import leakage
from yolo_fewshot.evaluate.learn import learn
from yolo_fewshot.evaluate.measure import measure, measure_start
from yolo_fewshot.evaluate.methods import ABLATIONS, check, default_methods, needs_base, parse, sees_all
from yolo_fewshot.evaluate.plan import (
    Plan,
    check_background,
    check_batch,
    check_models,
    check_queries,
    check_settings,
    describe,
    find_checkpoint,
    find_shots,
    read_data,
)
from yolo_fewshot.evaluate.published import read_published
from yolo_fewshot.evaluate.report import FILES, START, Row, Rows, add_row, read_rows, report
from yolo_fewshot.inputs import check_writable


def benchmark(
    data: str | Path,
    model: str | Path,
    stock: str | Path | None = None,
    stage1: str | Path | None = None,
    base_val: str | Path | None = None,
    published: str | Path | None = None,
    shots: str | int | Iterable[int] = (1, 3, 5, 10),
    seeds: int = 3,
    methods: str | Iterable[str] | None = None,
    out: str | Path = "benchmark",
    save: bool = False,
    **settings: Any,
) -> Path:
    """Measure methods with K shots of novel classes, over several draws of the shots.

    All arguments are checked first. Each result is written to `rows.csv` at once, and a run that is started again with
    the same `out` measures what is missing. Nothing is chosen by results, except the best stock fine-tuning.

    The novel classes are those of data.yaml that base.yaml does not have, or all if there is no base.yaml. The base
    classes are those that the model knows, on the images of `base_val` or else of data.yaml.

    Args:
        data (str | Path): Folder that `yolo-fewshot split` wrote, or one with the same kinds of data.yaml, also without
            base.yaml.
        model (str | Path): Checkpoint to start from: a stock detector such as 'yolo11n.pt', or a few-shot checkpoint.
        stock (str | Path, optional): Stock detector to fine-tune; `model`, folded if it is few-shot, if not given.
        stage1 (str | Path, optional): Few-shot checkpoint before stage 2, from which the ablations start.
        base_val (str | Path, optional): data.yaml whose val split shows classes of `model`, which are matched by name.
            Together with the novel queries these are the images of the mixed protocol.
        published (str | Path, optional): CSV file of results of others, with the columns method, shots, ap (in %),
            params_m (in millions) and source, for a table and a plot of AP against parameters.
        shots (str | int | Iterable[int]): Numbers of shots.
        seeds (int): Number of draws.
        methods (str | Iterable[str], optional): Some of `yolo_fewshot.evaluate.methods.METHODS`; those that fit model
            and data if not given. `stock-0` is `stock` with freeze=0 alone.
        out (str | Path): Folder to write.
        save (bool): Whether to keep the training runs; a folder that keeps them goes on keeping them.
        **settings (Any): Further arguments of training, `imgsz` that of `model` if not given. `epochs`, `episodes`,
            `lr0`, `lrf`, `nbs`, `optimizer`, `patience`, `val`, `warmup_bias_lr` and `warmup_epochs` go to the stage 2
            of ablations alone.

    Returns:
        (Path): The folder with `rows.csv`, `benchmark.json`, `results.md`, `results.png` and, with `published`,
            `published.png`.

    Raises:
        FileNotFoundError: If a file or a draw of shots does not exist.
        PermissionError: If `out` cannot be written.
        SyntaxError: If an argument of training is misspelled.
        TypeError: If a model is of the wrong kind, or an argument has a wrong type.
        ValueError: If an argument is invalid, or `out` has results of other data, models or settings.

    Examples:
        >>> benchmark("voc1", "best.pt", stock="stock.pt", shots=(1, 5), device=0)
        >>> benchmark("neu_det", "yolo11n.pt", base_val="coco.yaml", methods="stock,auto,graft-neck")
    """
    folder, target = Path(data).resolve(), Path(out).resolve()
    if folder.is_file():
        raise ValueError(f"'data={data}' is a file. Give its folder, data={Path(data).parent}.")
    check_out(target)
    files = {k: find_checkpoint(k, x) for k, x in zip(FILES, (model, stock, stage1)) if x is not None}
    chosen = parse(methods) if methods is not None else None
    counts = shot_counts(shots if isinstance(shots, (str, int)) else list(shots))
    if type(seeds) is not int or seeds < 1:
        raise ValueError(f"'seeds={seeds}' is an invalid value. It must be an int of at least 1, the number of draws.")
    check_settings(settings)
    others = read_published(published) if published is not None else []
    if others and not coco.available():
        raise ValueError(f"published= is compared with COCO AP. {coco.INSTALL}")
    few_shot, names = check_models(files)
    read = read_data(folder, base_val, names)
    chosen = chosen or default_methods(few_shot, read.base_yaml is not None)
    check(chosen, files["model"].name, few_shot, read.base_yaml is not None, "stage1" in files)
    check_batch(chosen, settings)
    found = find_shots(folder, counts, seeds, "novel")
    balanced = find_shots(folder, counts, seeds, "all") if any(sees_all(m) for m in chosen) else {}
    check_queries(read, found, balanced)
    if settings.get("background"):
        check_background(read, found, settings["background"])
    settings = {"imgsz": YOLO(files["model"]).overrides.get("imgsz", 640), **settings}  # which recipes would set to 640
    more = {"shots": counts, "seeds": seeds, "methods": chosen, "save": save}
    draws, based = [*found.values(), *balanced.values()], any(needs_base(m) for m in chosen)
    sums = provenance.digests(read, draws, based, settings.get("background"))
    record = provenance.provenance(read, sums, files, settings, more)
    provenance.compare(target, record)
    save = record["save"]
    record["leakage"] = leakage([x for k, x in files.items() if k != "stage1"], read.novel)
    if not coco.available():
        LOGGER.warning(coco.INSTALL)
    target.mkdir(parents=True, exist_ok=True)
    provenance.write(target, record)
    drawn, drawn_of_all = (
        {key: describe(read, target, *sources) for key, sources in x.items()} for x in (found, balanced)
    )
    plan = Plan(
        data=read,
        out=target,
        model=files["model"],
        few_shot=few_shot,
        stock=files.get("stock"),
        stage1=files.get("stage1"),
        shots=drawn,
        balanced=drawn_of_all,
        methods=tuple(chosen),
        settings=settings,
        save=save,
    )
    _do_missing(plan, record)
    report(target, record, len(read.novel), others)
    LOGGER.info(f"Results saved to {target}")
    return target


def check_out(out: Path) -> None:
    """Refuse a folder that cannot be written, or that has something else in it.

    Args:
        out (Path): Folder of the results.

    Raises:
        PermissionError: If it cannot be written.
        ValueError: If it is a file, or a folder with files and without a benchmark.json.
    """
    check_writable("out", out)
    if out.is_dir() and any(out.iterdir()) and not (out / "benchmark.json").is_file():
        raise ValueError(
            f"'out={out}' is not empty and has no benchmark.json. Name a new folder, or that of a benchmark to "
            "continue."
        )


def _run_method(plan: Plan, method: str, shots: int, seed: int) -> Row:
    """Learn by one method from one draw of shots, and return the figures by column."""
    folder = plan.out / "runs" / f"{method}_{shots}shot_seed{seed}"
    shutil.rmtree(folder, ignore_errors=True)  # left by an interrupted run
    learned = learn(plan, method, shots, seed, folder)
    meter = learned.meter
    figures = {"seconds": round(meter.seconds, 2), "ram": meter.ram, "gpu": meter.gpu}
    figures |= measure(plan, learned.file, plan.queries(shots, seed), folder)
    if not plan.save:
        shutil.rmtree(folder, ignore_errors=True)
    return figures


def _run_start(plan: Plan) -> Row:
    """Measure the base classes before anything is learned, and return the figures by column."""
    _, shots, seed = plan.tasks[0]
    folder = plan.out / "runs" / START
    figures = measure_start(plan, plan.queries(shots, seed), folder)
    if not plan.save:
        shutil.rmtree(folder, ignore_errors=True)
    return figures


def _do_missing(plan: Plan, record: dict[str, Any]) -> None:
    """Measure what is missing in `rows.csv`, and write each row at once."""
    file = plan.out / "rows.csv"
    sums = record["sha256"]
    used = {**sums, "stock": sums["stock"] or ("folded" if plan.few_shot else sums["model"])}
    fixed = {k: (x or "")[:12] for k, x in used.items()}
    tasks = [*([(START, 0, 0)] if plan.data.base else []), *plan.tasks]
    for i, (method, shots, seed) in enumerate(tasks):
        rows = read_rows(file)
        if (method, shots, seed) not in rows:
            what = "the base classes at the start" if method == START else f"{method}, {shots} shots, seed {seed}"
            LOGGER.info(f"\nBenchmark: {_progress(rows, tasks)}; now {what}")
            began = time.perf_counter()
            figures = _run_start(plan) if method == START else _run_method(plan, method, shots, seed)
            row = {"method": method, "shots": shots, "seed": seed, **figures, "wall": time.perf_counter() - began}
            add_row(file, row | fixed | {"version": yolo_fewshot.__version__})
        last = (method, seed) not in {(m, s) for m, _, s in tasks[i + 1 :]}
        if last and method in ABLATIONS and not plan.save:
            (plan.out / "runs" / f"{method}_seed{seed}.pt").unlink(missing_ok=True)
    with suppress(OSError):  # not empty if runs are kept
        (plan.out / "runs").rmdir()


def _progress(rows: Rows, tasks: list[tuple[str, int, int]]) -> str:
    """Say how many rows are done and to do, and how long these take by the mean of their methods so far."""
    left = [x for x in tasks if x not in rows]
    past: dict[str, list[float]] = {}
    for (method, _, _), row in rows.items():
        past.setdefault(method, []).append(row["wall"])
    text = f"{len(tasks) - len(left)} rows done, {len(left)} to do"
    timed = [float(np.mean(past[m])) for m, _, _ in left if m in past]
    if not timed:
        return text
    rest = f" and {len(left) - len(timed)} rows of methods without a time yet" if len(timed) < len(left) else ""
    return f"{text}, about {_duration(sum(timed))}{rest}"


def _duration(seconds: float) -> str:
    """Format a duration."""
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )
