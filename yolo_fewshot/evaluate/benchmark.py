"""The K-shot protocol: stock fine-tuning, enrollment, adaptation and ablations on the same draws of shots."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import sys
import time
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import ultralytics
from ultralytics import YOLO
from ultralytics.cfg import get_cfg
from ultralytics.data.utils import check_det_dataset
from ultralytics.utils import DEFAULT_CFG_DICT, LOGGER, YAML
from ultralytics.utils.torch_utils import get_cpu_info

import yolo_fewshot
from yolo_fewshot import args as table
from yolo_fewshot.class_names import repeated
from yolo_fewshot.data.splits import shot_counts
from yolo_fewshot.data.support import list_images
from yolo_fewshot.errors import few
from yolo_fewshot.evaluate.metrics import harmonic_mean
from yolo_fewshot.evaluate.report import FIGURES, FILES, LEAKAGE, Row, add_row, read_rows, report
from yolo_fewshot.files import AtomicPath
from yolo_fewshot.nn.model import FewShotDetectionModel
from yolo_fewshot.paths import cfg_dir
from yolo_fewshot.yolo import FewShotYOLO

FREEZES = (0, 10, 22)  # of the stock fine-tuning: nothing, the backbone, or all but the head is frozen
STOCKS = ("stock", "stock_all")  # fine-tuning on the shots of the novel classes, and on shots of all classes
ALL = "_all"  # suffix of the methods that see shots of all classes
STOCK: dict[str, Any] = {
    "optimizer": "AdamW", "lr0": 0.002, "nbs": 16, "warmup_epochs": 1, "warmup_bias_lr": 0.0, "val": False,
    "save": False,
}  # fmt: skip
MIN_STEPS, MIN_EPOCHS = 300, 60  # of the stock fine-tuning
ENROLLMENTS = ("mean", "fit", "auto")
ABLATIONS: dict[str, dict[str, Any]] = {  # stage 2 again with the seed of the draw, unchanged or with one change
    "full": {},
    "minus_supcon": {"supcon": 0.0},
    "minus_cpe": {"cpe": 0.0},
    "minus_triplet": {"triplet": 0.0},
    "minus_contrast": {"supcon": 0.0, "cpe": 0.0, "triplet": 0.0},
    "two_way": {"n_way": 2, "k_shot": 4, "n_query": 4, "wide": False},
}
# Stage 3 on the shots of the novel classes, with base images, without interpolation, and on shots of all classes.
ADAPTATIONS = ("adapt", "replay", "adapt_full", "adapt_all")
DEFAULT_METHODS = (*STOCKS, *ENROLLMENTS, *ADAPTATIONS)
METHODS = (*DEFAULT_METHODS, "no_episodes", *ABLATIONS)

STAGE2_ONLY = {"epochs", "episodes", "lr0", "lrf", "val", "patience"}
VAL_KEYS = ("imgsz", "device", "workers", "max_det", "iou", "conf", "half")
OURS = {  # keys that the protocol sets
    "base_replay", "cfg", "enroll", "exist_ok", "mode", "name", "pretrained", "project", "resume", "save_dir", "seed",
    "stage", "support", "task",
}  # fmt: skip


class Plan(NamedTuple):
    """Plan of the measurements.

    Attributes:
        folder (Path): Folder of the data.
        out (Path): Folder of the results.
        model (Path): Few-shot checkpoint after stage 2.
        stock (Path | None): Stock detector.
        stage1 (Path | None): Few-shot checkpoint before stage 2.
        shots (dict[tuple[int, int], Path]): data.yaml of each number of shots and seed.
        balanced (dict[tuple[int, int], Path]): The same with as many shots of the base classes, if needed.
        methods (tuple[str, ...]): Methods, stock fine-tuning once for each `freeze`.
        novel (tuple[str, ...]): Names of the novel classes.
        settings (dict[str, Any]): Further arguments of training.
        save (bool): Whether to keep the training runs.
    """

    folder: Path
    out: Path
    model: Path
    stock: Path | None
    stage1: Path | None
    shots: dict[tuple[int, int], Path]
    balanced: dict[tuple[int, int], Path]
    methods: tuple[str, ...]
    novel: tuple[str, ...]
    settings: dict[str, Any]
    save: bool

    @property
    def tasks(self) -> list[tuple[str, int, int]]:
        """Method, number of shots and seed of each row, ordered by seed."""
        counts, seeds = ({x[i]: None for x in self.shots} for i in (0, 1))
        return [(m, k, s) for s, m, k in product(seeds, self.methods, counts)]


def benchmark(
    data: str | Path,
    model: str | Path,
    stock: str | Path | None = None,
    stage1: str | Path | None = None,
    shots: str | int | Iterable[int] = (1, 3, 5, 10),
    seeds: int = 3,
    methods: str | Iterable[str] = DEFAULT_METHODS,
    out: str | Path = "benchmark",
    save: bool = False,
    **settings: Any,
) -> Path:
    """Measure methods with K shots of novel classes, over several draws of the shots.

    All arguments are checked first. Each result is written to `rows.csv` at once, and a run that is started again with
    the same `out` measures what is missing. Nothing is chosen by results, except the best stock fine-tuning.

    Args:
        data (str | Path): Folder that `yolo-fewshot split` wrote, or one with the same kinds of data.yaml.
        model (str | Path): Few-shot checkpoint after stage 2.
        stock (str | Path, optional): Stock detector trained on the base classes, `model` folded if not given.
        stage1 (str | Path, optional): Few-shot checkpoint before stage 2, from which the ablations start.
        shots (str | int | Iterable[int]): Numbers of shots.
        seeds (int): Number of draws.
        methods (str | Iterable[str]): Some of `METHODS`; `stock-0` is `stock` with freeze=0 alone.
        out (str | Path): Folder to write.
        save (bool): Whether to keep the training runs.
        **settings (Any): Further arguments of training, `imgsz` that of `model` if not given. `epochs`, `episodes`,
            `lr0`, `lrf`, `patience` and `val` go to the stage 2 of ablations alone.

    Returns:
        (Path): The folder with `rows.csv`, `benchmark.json`, `results.md` and `results.png`.

    Raises:
        FileNotFoundError: If a file or a draw of shots does not exist.
        SyntaxError: If an argument of training is misspelled.
        TypeError: If a model is of the wrong kind, or an argument has a wrong type.
        ValueError: If an argument is invalid, or `out` has results of other models or settings.

    Examples:
        >>> benchmark("voc1", "best.pt", stock="stock.pt", shots=(1, 5), device=0)
    """
    folder, target = Path(data).resolve(), Path(out).resolve()
    files = {k: _file(k, x) for k, x in zip(FILES, (model, stock, stage1)) if x is not None}
    chosen = _methods(methods, "stage1" in files)
    counts = shot_counts(shots if isinstance(shots, (str, int)) else list(shots))
    if type(seeds) is not int or seeds < 1:
        raise ValueError(f"'seeds={seeds}' is an invalid value. It must be an int of at least 1, the number of draws.")
    _check_settings(settings)
    novel = _novel(folder)
    found = _find_shots(folder, counts, seeds, "novel")
    of_all = any(m.partition("-")[0].endswith(ALL) for m in chosen)
    balanced = _find_shots(folder, counts, seeds, "all") if of_all else {}
    _check_models(files)
    settings = {"imgsz": YOLO(files["model"]).overrides.get("imgsz", 640), **settings}  # which recipes would set to 640
    record = _record(folder, files, settings, {"shots": counts, "seeds": seeds, "methods": chosen, "save": save})
    record["leakage"] = _leakage([x for k, x in files.items() if k != "stage1"], novel)
    _compare(target, record)
    target.mkdir(parents=True, exist_ok=True)
    AtomicPath(target / "benchmark.json").write_bytes(json.dumps(record, indent=1, ensure_ascii=False).encode())
    described = [{key: _describe(target, *sources) for key, sources in x.items()} for x in (found, balanced)]
    checkpoints = files["model"], files.get("stock"), files.get("stage1")
    plan = Plan(folder, target, *checkpoints, described[0], described[1], tuple(chosen), novel, settings, save)
    _do_missing(plan, record)
    report(target, record, len(novel))
    LOGGER.info(f"Results saved to {target}")
    return target


# Checks


def _file(key: str, file: str | Path) -> Path:
    """Return the absolute path of a checkpoint, which must exist."""
    if not Path(file).is_file():
        raise FileNotFoundError(f"{key}={file} does not exist.")
    return Path(file).resolve()


def _methods(methods: str | Iterable[str], has_stage1: bool) -> list[str]:
    """Return the names of the methods without repetition, and stock fine-tuning once for each `freeze`."""
    listed = methods.split(",") if isinstance(methods, str) else methods
    chosen = list(dict.fromkeys(x for x in (str(x).strip() for x in listed) if x))
    valid = {*METHODS, *(f"{m}-{f}" for m, f in product(STOCKS, FREEZES))}
    unknown = {m: difflib.get_close_matches(m, METHODS) for m in chosen if m not in valid}
    if unknown or not chosen:
        named = [f"{m} (similar: {', '.join(x)})" if x else m for m, x in unknown.items()]
        raise ValueError(f"'methods=' names {few(named) or 'nothing'}. Valid methods are {', '.join(METHODS)}.")
    need = [m for m in chosen if m == "no_episodes" or m in ABLATIONS]
    if need and not has_stage1:
        raise ValueError(f"stage1= must be given for {', '.join(need)}: the few-shot checkpoint before stage 2.")
    every = (x for m in chosen for x in ([f"{m}-{f}" for f in FREEZES] if m in STOCKS else [m]))
    return list(dict.fromkeys(every))


def _check_settings(settings: dict[str, Any]) -> None:
    """Check the further arguments of training as Ultralytics does, and refuse those that the protocol sets."""
    taken = sorted(OURS & settings.keys())
    if taken:
        raise ValueError(f"{', '.join(f'{k}=' for k in taken)} cannot be set, because the protocol sets it.")
    table.check(vars(get_cfg({**DEFAULT_CFG_DICT, "save_dir": ""}, settings)))
    for k in ("batch", "imgsz"):
        v = settings.get(k, 1)
        if type(v) is not int or v < 1:  # no list, and no automatic batch size, which differs between methods
            raise ValueError(f"'{k}={v}' is an invalid value. It must be an int of at least 1 here.")


def _novel(folder: Path) -> tuple[str, ...]:
    """Return the names of the novel classes, those of data.yaml that are not in base.yaml."""
    for name in ("base.yaml", "data.yaml"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} does not exist. data= must be a folder of 'yolo-fewshot split'.")
    base, every = (list(check_det_dataset(folder / x)["names"].values()) for x in ("base.yaml", "data.yaml"))
    novel = tuple(str(n) for n in every if n not in base)
    if not novel or not set(base) <= set(every):
        raise ValueError(f"{folder / 'data.yaml'} must have the classes of base.yaml and novel ones.")
    twice = repeated(novel)
    if twice:  # shots are matched by name
        raise ValueError(f"Several novel classes of {folder / 'data.yaml'} have the name {few(twice)}. Rename them.")
    return novel


def _find_shots(
    folder: Path, counts: list[int], seeds: int, kind: str
) -> dict[tuple[int, int], tuple[Path, Path | None]]:
    """Return the data.yaml of each number of shots and seed, and the list that replaces its train split, if any."""
    found: dict[tuple[int, int], tuple[Path, Path | None]] = {}
    missing = []
    for k, s in product(counts, range(seeds)):
        of_seed, shared, images = (folder / f"{kind}_{k}shot{x}" for x in (f"_seed{s}.yaml", ".yaml", f"_seed{s}.txt"))
        if of_seed.is_file():
            found[k, s] = of_seed, None
        elif shared.is_file() and images.is_file():
            found[k, s] = shared, images
        else:
            missing.append(of_seed.name)
    if missing:
        there = {x.stem for x in folder.iterdir() if re.fullmatch(kind + r"_\d+shot_seed\d+\.(yaml|txt)", x.name)}
        listed = sorted(there, key=lambda x: [int(n) for n in re.findall(r"\d+", x)])
        has = f"It has {few(listed, n=20)}" if listed else "It has none"
        raise FileNotFoundError(f"{folder} has no {few(missing)}. {has}: set shots= and seeds= to match.")
    names = check_det_dataset(folder / "data.yaml")["names"]
    for file in dict.fromkeys(x for x, _ in found.values()):
        if check_det_dataset(file)["names"] != names:  # stock Ultralytics matches classes by their numbers
            raise ValueError(f"{file} must have the classes of data.yaml, in the same order.")
    return found


def _check_models(files: dict[str, Path]) -> None:
    """Check the kind of each checkpoint."""
    for key, file in files.items():
        yolo = YOLO(file)
        few_shot = isinstance(yolo.model, FewShotDetectionModel)
        if key != "stock" and not few_shot:
            raise TypeError(
                f"model='{yolo.model_name}' has no few-shot head, which yolo-fewshot benchmark needs. Train or upgrade "
                "it with cfg=stage1.yaml first."
            )
        if key == "stock" and (few_shot or yolo.task != "detect"):
            raise TypeError(f"stock={file} must be a stock detector. Without stock= it is model=, folded.")


def _leakage(files: list[Path], novel: tuple[str, ...]) -> list[str]:
    """Return the novel classes that the checkpoints, or existing ones that they were trained from, were trained on."""
    known, seen = set(), set()
    while files:
        file = files.pop().resolve()
        if file.suffix == ".pt" and file.is_file() and file not in seen:
            seen.add(file)
            yolo = YOLO(file)
            known |= {str(n).casefold() for n in yolo.names.values()}
            training = (yolo.ckpt or {}).get("train_args") or {}
            files += [Path(str(training.get(k))) for k in ("model", "pretrained")]
    names = [n for n in novel if n.casefold() in known]
    if names:
        LOGGER.warning(f"{LEAKAGE} {', '.join(names)}")
    return names


def _record(folder: Path, files: dict[str, Path], settings: Row, more: Row) -> dict[str, Any]:
    """Return the content of benchmark.json."""
    record = {
        "data": str(folder),
        "files": {k: str(files[k]) if k in files else None for k in FILES},
        "sha256": {k: hashlib.sha256(files[k].read_bytes()).hexdigest() if k in files else None for k in FILES},
        "settings": dict(sorted(settings.items())),
        **more,
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "versions": {m.__name__: m.__version__ for m in (yolo_fewshot, ultralytics, torch)},
        "machine": {
            "platform": f"{platform.platform()}, Python {platform.python_version()}",
            "processor": get_cpu_info(),
            "cores": os.cpu_count(),
            "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        },
    }
    return json.loads(json.dumps(record, default=str))


def _compare(target: Path, record: dict[str, Any]) -> None:
    """Refuse a folder that has results of other data, models or settings."""
    file = target / "benchmark.json"
    if not file.is_file():
        return
    old = json.loads(file.read_text(encoding="utf-8"))
    changed = [k for k in ("data", "settings") if old.get(k) != record[k]]
    changed += [k for k, x in record["sha256"].items() if old.get("sha256", {}).get(k) != x]
    if changed:
        raise ValueError(f"{target} has results of another {', '.join(changed)}. Set another out=, or restore them.")


def _describe(target: Path, file: Path, listed: Path | None) -> Path:
    """Return a data.yaml, written into `target` with a list as its train split if there is one."""
    if listed is None:
        return file
    read = check_det_dataset(file)
    content = {k: v for k, v in YAML.load(file).items() if k not in {"download", "test", "minival", "nc"}}
    content |= {"path": str(read["path"]), "train": str(listed), "val": read["val"], "names": read["names"]}
    YAML.save(target / f"{listed.stem}.yaml", content)
    return target / f"{listed.stem}.yaml"


# One method, number of shots and seed


def _run_method(plan: Plan, method: str, shots: int, seed: int) -> Row:
    """Train or enroll, then measure; return the metrics, and the seconds of the training or enrollment.

    The seconds of an ablation are those of the enrollment, as for the full model.
    """
    data, folder = plan.shots[shots, seed], plan.out / "runs" / f"{method}_{shots}shot_seed{seed}"
    shutil.rmtree(folder, ignore_errors=True)  # left by an interrupted run
    name, _, freeze = method.partition("-")
    train = plan.balanced[shots, seed] if name.endswith(ALL) else data
    if name in STOCKS:
        file, seconds = _fine_tune(plan, folder, train, int(freeze), seed)
    elif method in ADAPTATIONS:
        extra: dict[str, Row] = {
            "replay": {"base_replay": str(plan.folder / "base.yaml")},
            "adapt_full": {"blend": 1.0},
        }
        keys = {**_settings_for("stage3", plan.settings), **extra.get(method, {})}
        trainer, seconds = _train(plan.model, folder, cfg=_recipe(3), data=str(train), seed=seed, **keys)
        file = Path(trainer.last)
    else:
        start = (plan.stage1 if method == "no_episodes" else None) or plan.model
        start = _ablated(plan, method, seed) if method in ABLATIONS else start
        file, seconds = _enroll(plan, folder, start, data, method if method in ENROLLMENTS else "auto")
    figures = {"seconds": round(seconds, 2)}
    few_shot, every = (_measure(plan, folder, file, x) for x in (data, plan.folder / "data.yaml"))
    figures |= dict(zip(FIGURES["FSOD"], few_shot["novel"]))
    means = [harmonic_mean(b, n) for b, n in zip(every["base"], every["novel"])]
    parts = (every["base"], every["novel"], means)
    figures |= dict(zip(FIGURES["G-FSOD"], [x[i] for i in (0, 1) for x in parts]))
    if not plan.save:
        shutil.rmtree(folder, ignore_errors=True)
    return figures


def _settings_for(what: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the further arguments that apply to one kind of run."""
    if what == "val":
        return {k: v for k, v in settings.items() if k in VAL_KEYS}
    known = {
        "stock": (),
        "stage2": [k for k in table.KEYS if k not in table.ADAPTING],
        "stage3": (*table.ADAPTING, *table.EVERY_STAGE, "grad_clip"),
    }[what]
    unused = {k for k in table.KEYS if k not in known} | ({"batch"} if what == "stage2" else STAGE2_ONLY)
    return {"plots": False, "verbose": False, **{k: v for k, v in settings.items() if k not in unused}}


def _recipe(stage: int) -> str:
    """Return the recipe of a stage, that of the package even if the working directory has a file of that name."""
    return str(cfg_dir() / f"stage{stage}.yaml")


def _train(start: Path, folder: Path, **arguments: Any) -> tuple[Any, float]:
    """Train with Ultralytics, and return the trainer and the seconds until the end of the last epoch."""
    began, ends, yolo = time.perf_counter(), [], YOLO(start)
    yolo.add_callback("on_train_epoch_end", lambda _: ends.append(time.perf_counter()))
    yolo.train(project=str(folder.parent), name=folder.name, exist_ok=True, **arguments)
    return yolo.trainer, (ends or [time.perf_counter()])[-1] - began


def _fine_tune(plan: Plan, folder: Path, data: Path, freeze: int, seed: int) -> tuple[Path, float]:
    """Fine-tune the stock detector on shots, as Ultralytics does."""
    start = plan.stock or plan.out / "stock.pt"
    if not start.exists():
        FewShotYOLO(plan.model).fold().save(start)
    keys, train = _settings_for("stock", plan.settings), check_det_dataset(data)["train"]
    images = sum(len(list_images(Path(x))) for x in (train if isinstance(train, list) else [train]))
    epochs = _epochs_for(images, keys.get("batch", DEFAULT_CFG_DICT["batch"]))
    keys |= {**STOCK, "data": str(data), "freeze": freeze, "seed": seed, "epochs": epochs}
    trainer, seconds = _train(start, folder, **keys)
    return Path(trainer.last), seconds


def _epochs_for(images: int, batch: int) -> int:
    """Return the epochs of the stock fine-tuning: enough for both `MIN_STEPS` and `MIN_EPOCHS`."""
    batches, per_step = -(-images // batch), max(round(STOCK["nbs"] / batch), 1)
    return max(MIN_EPOCHS, -(-MIN_STEPS * per_step // batches))


def _ablated(plan: Plan, method: str, seed: int) -> Path:
    """Return the checkpoint of stage 2 with a change, and train it if it does not exist."""
    file = plan.out / "runs" / f"{method}_seed{seed}.pt"
    if not file.exists():  # it is written when its training has finished
        keys = {**_settings_for("stage2", plan.settings), **ABLATIONS[method], "seed": seed}
        folder = file.with_suffix("")
        shutil.rmtree(folder, ignore_errors=True)
        assert plan.stage1 is not None  # checked with the methods
        trainer, _ = _train(plan.stage1, folder, cfg=_recipe(2), data=str(plan.folder / "base.yaml"), **keys)
        shutil.copy2(Path(trainer.best), f"{file}.part")
        os.replace(f"{file}.part", file)
        if not plan.save:
            shutil.rmtree(folder, ignore_errors=True)
    return file


def _enroll(plan: Plan, folder: Path, start: Path, data: Path, method: str) -> tuple[Path, float]:
    """Enroll shots, and save the model."""
    yolo, keys = FewShotYOLO(start), _settings_for("val", plan.settings)
    began = time.perf_counter()
    yolo.enroll(data, imgsz=keys.get("imgsz"), method=method, device=keys.get("device"))
    seconds = time.perf_counter() - began
    folder.mkdir(parents=True)
    yolo.save(folder / "enrolled.pt")
    return folder / "enrolled.pt", seconds


def _measure(plan: Plan, folder: Path, file: Path, data: Path) -> dict[str, list[float]]:
    """Validate with Ultralytics, and return AP50 and AP50-95 of base and novel classes."""
    keys = {"batch": 32, "plots": False, "verbose": False, **_settings_for("val", plan.settings)}
    metrics = YOLO(file).val(data=str(data), project=str(folder), name="val", exist_ok=True, **keys)
    box, means = metrics.box, {}
    novel = np.array([str(metrics.names[int(c)]) in plan.novel for c in box.ap_class_index], bool)
    for name, rows in (("base", ~novel), ("novel", novel)):
        both = [np.asarray(box.ap50)[rows], np.asarray(box.ap)[rows]]
        means[name] = [float(x.mean()) if rows.any() else float("nan") for x in both]
    return means


# All rows


def _do_missing(plan: Plan, record: dict[str, Any]) -> None:
    """Measure what is missing in `rows.csv`, and write each row at once."""
    file, tasks = plan.out / "rows.csv", plan.tasks
    fixed = {k: (x or ("folded" if k == "stock" else ""))[:12] for k, x in record["sha256"].items()}
    for i, (method, shots, seed) in enumerate(tasks):
        if (method, shots, seed) not in read_rows(file):
            LOGGER.info(f"\nBenchmark {i + 1}/{len(tasks)}: {method}, {shots} shots, seed {seed}")
            figures = _run_method(plan, method, shots, seed)
            row = {"method": method, "shots": shots, "seed": seed, **figures, **fixed}
            add_row(file, row | {"version": yolo_fewshot.__version__})
        last = (method, seed) not in {(m, s) for m, _, s in tasks[i + 1 :]}
        if last and method in ABLATIONS and not plan.save:
            (plan.out / "runs" / f"{method}_seed{seed}.pt").unlink(missing_ok=True)
    if not plan.save:
        shutil.rmtree(plan.out / "runs", ignore_errors=True)
