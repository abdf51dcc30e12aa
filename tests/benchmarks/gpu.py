"""Measure training, inference and enrollment on a GPU, in one command and within `minutes`; writes one table.

    python tests/benchmarks/gpu.py out=gpu.md
    python tests/benchmarks/gpu.py model=yolo11n imgsz=64 steps=2 batch=4 classes=4 device=cpu

Training uses the trainers themselves with their loaders, AMP, clip, optimizer and moving average, on random images,
and stops before the end of an epoch; every batch is an optimizer step. The most important measurements come first, and
the table is written after each. A row of a failed measurement names the error, and the other rows say that time was
up. Needs neither network nor polars. `model=` may also be a model YAML without its suffix, e.g. model=my/yolo11n-own.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

os.environ.setdefault("YOLO_OFFLINE", "true")  # before Ultralytics is imported

import cv2
import numpy as np
import torch
import ultralytics
from training import seconds
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import LOGGER, YAML
from ultralytics.utils.torch_utils import get_cpu_info, select_device, unset_deterministic

import yolo_fewshot
from yolo_fewshot import FewShotTrainer, FewShotYOLO
from yolo_fewshot.data.support import read_support
from yolo_fewshot.enroll.replay import fill_replay_buffer
from yolo_fewshot.files import save_checkpoint
from yolo_fewshot.nn.model import FewShotDetectionModel
from yolo_fewshot.paths import cfg_dir

WARM_UP = 10  # maximum number of steps before the timed ones
LONG = 4  # multiple of the steps when skipped steps of AMP are counted
SHOTS, FEW = 5, 10  # shots per class, and maximum number of classes in stage 3
GRACE = 45  # seconds after the end of the time until a measurement is interrupted
STAGES = ("stock", "stage 1", "stage 2", "stage 3")
COLUMNS = (
    "measurement", "model", "precision", "steps", "steps/s", "s a step", "x stock", "loader", "GPU", "GiB", "overflows",
    "skipped", "note",
)  # fmt: skip
EXPLAINED = """
- `steps/s`: with the wait for the loader. `s a step`: median without it. `x stock`: its ratio to the model's stock row.
- `loader`: share of the time that is spent waiting for images. `GPU`: mean utilization. `GiB`: most memory of tensors.
- `overflows`, `skipped`: steps not taken, for the scale of float16 and for other values that are not finite, warm-up
  included. A step of inference is one forward pass of a batch; enrollment is one step of all shots.
"""


class Enough(Exception):
    """Ends a training run whose steps are measured."""


class TimeUp(BaseException):
    """Interrupts a measurement that takes too long; `except Exception` does not catch it."""


class Settings(NamedTuple):
    """Settings of all measurements.

    Attributes:
        models (list[str]): Stock models, by the names of their YAMLs without the suffix.
        imgsz (int): Image size in pixels.
        steps (int): Steps that are timed.
        batch (int): Images in a batch, an even number.
        classes (int): Base classes, and classes to enroll.
        device (torch.device): Device.
        workers (int): Loader processes.
        folder (Path): Folder for data and runs.
        end (float): End of the time, by `time.perf_counter`.
    """

    models: list[str]
    imgsz: int
    steps: int
    batch: int
    classes: int
    device: torch.device
    workers: int
    folder: Path
    end: float


class Task(NamedTuple):
    """A measurement.

    Attributes:
        rows (list[tuple[str, str]]): Its rows: names of the measurement and of the model.
        stock (tuple[str, str]): Row that these are compared with.
        measure (Callable): Returns the figures of each row, by column.
    """

    rows: list[tuple[str, str]]
    stock: tuple[str, str]
    measure: Callable[[], list[dict[str, Any]]]


# Data


def draw(s: Settings) -> None:
    """Write images and a data.yaml each for base classes, shots to enroll, and shots of stage 3."""
    rng = np.random.default_rng(0)
    counts = {"base": max(3 * s.classes, 2 * s.batch), "new": SHOTS * s.classes}
    lists = {}
    for kind, count in counts.items():
        for part in ("images", "labels"):
            (s.folder / part / kind).mkdir(parents=True)
        lists[kind] = [str(s.folder / f"images/{kind}/{i:05}.jpg") for i in range(count)]
        for i, file in enumerate(lists[kind]):
            image = rng.integers(0, 256, (-(-s.imgsz // 8),) * 2 + (3,), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
            image = np.ascontiguousarray(image[: s.imgsz, : s.imgsz])
            lines = []
            for j in range(4 if kind == "base" else 1):  # each image shows one class
                c = (4 * i + j) % s.classes if kind == "base" else i // SHOTS
                side, (x, y) = rng.uniform(0.2, 0.4), rng.uniform(0.2, 0.8, 2)
                corners = [(round(v * s.imgsz) for v in (x + d, y + d)) for d in (-side / 2, side / 2)]
                cv2.rectangle(image, *map(tuple, corners), np.random.default_rng(c).integers(0, 256, 3).tolist(), -1)
                lines.append(f"{c} {x:.4f} {y:.4f} {side:.4f} {side:.4f}\n")
            cv2.imwrite(file, image)
            (s.folder / f"labels/{kind}/{i:05}.txt").write_text("".join(lines))
    few = min(FEW, s.classes)
    repeats = -(-(s.steps + WARM_UP) * s.batch // counts["base"])  # all steps are in one epoch
    for name, kind, classes, files in (
        ("base", "base", s.classes, lists["base"]),
        ("long", "base", s.classes, lists["base"] * repeats),
        ("shots", "new", s.classes, lists["new"]),
        ("few", "new", few, lists["new"][: SHOTS * few]),
    ):
        (s.folder / f"{name}.txt").write_text("\n".join(files))
        names = {i: f"{kind}{i}" for i in range(classes)}
        content = {"path": str(s.folder), "train": f"{name}.txt", "val": f"{name}.txt", "names": names}
        YAML.save(s.folder / f"{name}.yaml", content)


def start(s: Settings, model: str) -> Path:
    """Return the checkpoint of a few-shot model of the base classes with a replay buffer, built on first use."""
    file = s.folder / f"{Path(model).name}.pt"
    if not file.exists():
        net = FewShotDetectionModel(f"{model}.yaml", nc=s.classes, verbose=False).eval()
        net.names, net.args = {i: f"base{i}" for i in range(s.classes)}, {}
        net.memory = fill_replay_buffer(net.to(s.device), read_support(s.folder / "base.yaml").labels, s.imgsz)
        save_checkpoint({"model": net.cpu(), "train_args": {"imgsz": s.imgsz, "task": "detect"}}, file)
    return file


# Measurements


def utilization(device: torch.device) -> float | None:
    """Return the utilization of a GPU in percent; None without pynvml and nvidia-smi."""
    with contextlib.suppress(Exception):
        return float(torch.cuda.utilization(device))
    with contextlib.suppress(Exception):
        query = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
        query.append(f"--id=GPU-{torch.cuda.get_device_properties(device).uuid}")
        return float(subprocess.run(query, check=True, capture_output=True, text=True, timeout=5).stdout)
    return None


class Monitor:
    """Samples memory and utilization of a GPU between `start` and `figures`; reports nothing on a CPU."""

    def __init__(self, device: torch.device):
        self.device, self.cuda, self.seen, self.over = device, device.type == "cuda", [], threading.Event()
        self.thread = threading.Thread(target=self._sample, daemon=True)

    def start(self) -> None:
        """Start sampling."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
            self.thread.start()

    def _sample(self) -> None:
        """Take a sample every fifth of a second."""
        while not self.over.wait(0.2) and (value := utilization(self.device)) is not None:
            self.seen.append(value)

    def stop(self) -> None:
        """Stop sampling."""
        self.over.set()
        if self.thread.is_alive():
            self.thread.join(timeout=10)

    def figures(self) -> dict[str, Any]:
        """Stop sampling, and return peak memory and mean utilization."""
        self.stop()
        figures = {"GPU": f"{statistics.mean(self.seen):.0f} %"} if self.seen else {}
        return figures | ({"GiB": torch.cuda.max_memory_allocated(self.device) / 2**30} if self.cuda else {})

    def sync(self) -> float:
        """Wait for the GPU, and return the time."""
        if self.cuda:
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


class Watch:
    """Callbacks of a trainer that time its steps, and end it after some.

    Attributes:
        waits (list[float]): Seconds that each timed step has waited for its images.
        works (list[float]): Seconds of the rest of it.
        first (float): Seconds of the first step, which is not timed.
    """

    def __init__(self, trainer: DetectionTrainer, monitor: Monitor, steps: int, warm_up: int, end: float):
        self.monitor, self.left, self.warm_up, self.end = monitor, steps, warm_up, end
        self.batch, self.waits, self.works, self.first = trainer.batch_size, [], [], 0.0
        for event in ("on_train_epoch_start", "on_train_batch_start", "on_train_batch_end"):
            trainer.add_callback(event, getattr(self, event))

    def on_train_epoch_start(self, trainer: DetectionTrainer) -> None:
        """Start the clock."""
        self.last = self.monitor.sync()

    def on_train_batch_start(self, trainer: DetectionTrainer) -> None:
        """Record the time when the batch is loaded."""
        if trainer.batch_size != self.batch:  # Ultralytics halves it until it fits
            raise MemoryError(f"batch={self.batch} does not fit into the memory")
        self.loaded = time.perf_counter()

    def on_train_batch_end(self, trainer: DetectionTrainer) -> None:
        """Record the time when the step is done, and end the run after the last step."""
        now = self.monitor.sync()
        if self.warm_up:
            self.first = self.first or now - self.last
            self.warm_up -= 1
            if not self.warm_up:
                self.monitor.start()
        else:
            self.waits.append(self.loaded - self.last)
            self.works.append(now - self.loaded)
            self.left -= 1
            if not self.left or now > self.end:
                raise Enough
        self.last = now


def train(s: Settings, model: str, stage: int, steps: int, **keys: Any) -> list[dict[str, Any]]:
    """Time steps of a trainer; stage 0 is stock."""
    warm_up = min(WARM_UP, steps)
    total = warm_up + steps
    overrides = {
        "model": f"{model}.yaml", "imgsz": s.imgsz, "batch": s.batch, "workers": s.workers, "epochs": 2, "val": False,
        "device": str(s.device.index) if s.device.type == "cuda" else "cpu", "plots": False, "save": False,
        "verbose": False, "project": str(s.folder / "runs"), "name": "run", "exist_ok": True, "close_mosaic": 0,
    }  # fmt: skip
    if stage < 2:  # Ultralytics' defaults accumulate batches there
        overrides |= {"data": str(s.folder / "long.yaml"), "nbs": s.batch, "optimizer": "AdamW"}
    elif stage == 2:
        overrides |= {"data": str(s.folder / "base.yaml"), "n_way": s.batch // 2, "k_shot": 1, "n_query": 1}
        overrides |= {"episodes": total, "supcon": 1.2, "cpe": 0.6, "triplet": 0.3}  # all terms
    else:
        overrides |= {"data": str(s.folder / "few.yaml"), "base_replay": str(s.folder / "base.yaml")}
        overrides |= {"model": str(start(s, model)), "graft": "none", "steps": total, "epochs": 1}
    overrides |= keys
    monitor, trainer = Monitor(s.device), None
    try:
        if stage:
            trainer = FewShotTrainer(str(cfg_dir() / f"stage{stage}.yaml"), overrides)
        else:
            trainer = DetectionTrainer(overrides=overrides)
        watch = Watch(trainer, monitor, steps, warm_up, s.end)
        try:
            trainer.train()
            raise RuntimeError("training came to its end before it was measured")
        except Enough:
            pass
        if keys.get("compile") and not hasattr(trainer.model, "_orig_mod"):
            raise RuntimeError("torch.compile is not available here")
        figures = {
            "precision": ("bfloat16" if trainer.args.amp == "bf16" else "float16") if trainer.amp else "float32",
            "steps": len(watch.works),
            "steps/s": len(watch.works) / (sum(watch.waits) + sum(watch.works)),
            "s a step": statistics.median(watch.works),
            "loader": f"{sum(watch.waits) / (sum(watch.waits) + sum(watch.works)):.0%}",
            **monitor.figures(),
        }
        if stage:
            figures |= {"overflows": trainer.guard.overflows, "skipped": trainer.guard.skipped}
        if keys.get("compile"):
            figures["note"] = f"first step {watch.first:.3g} s"
        return [figures]
    finally:
        monitor.stop()
        for name in ("train_loader", "test_loader"):
            if hasattr(loader := getattr(trainer, name, None), "close"):
                loader.close()
        unset_deterministic()


@torch.inference_mode()
def infer(s: Settings, model: str) -> list[dict[str, Any]]:
    """Time alternating forward passes of a stock and a folded few-shot model; in half precision on a GPU."""
    dtype = torch.float16 if s.device.type == "cuda" else torch.float32
    nets = [c(f"{model}.yaml", nc=s.classes, verbose=False).eval() for c in (DetectionModel, FewShotDetectionModel)]
    nets = [x.fuse(verbose=False).to(s.device, dtype) for x in nets]
    images, times = torch.rand(s.batch, 3, s.imgsz, s.imgsz, device=s.device, dtype=dtype), ([], [])
    for i in range(WARM_UP + s.steps):
        for net, row in zip(nets, times):
            took = seconds(lambda net=net: net(images), s.device.type)
            if i >= WARM_UP:
                row.append(took)
    name = str(dtype).removeprefix("torch.")
    return [
        {"precision": name, "steps": len(x), "steps/s": len(x) / sum(x), "s a step": statistics.median(x)}
        for x in times
    ]


def enroll(s: Settings, model: str) -> list[dict[str, Any]]:
    """Time the enrollment of all classes, including the reading of the images."""
    yolo, monitor = FewShotYOLO(start(s, model)), Monitor(s.device)
    try:
        monitor.start()
        began = monitor.sync()
        yolo.enroll(s.folder / "shots.yaml", imgsz=s.imgsz, batch=s.batch, device=str(s.device))
        took = monitor.sync() - began
        return [{"precision": "float32", "steps": 1, "steps/s": 1 / took, "s a step": took, **monitor.figures()}]
    finally:
        monitor.stop()


# All measurements


def plan(s: Settings) -> list[Task]:
    """Return the measurements, the most important ones first."""

    def of_stages(model: str) -> list[Task]:
        return [
            Task([(name, model)], ("stock", model), partial(train, s, model, stage, s.steps))
            for stage, name in enumerate(STAGES)
        ]

    def varied(stage: int, name: str, steps: int = s.steps, **keys: Any) -> Task:
        row = (f"{STAGES[stage]}, {name}", first)
        return Task([row], ("stock", first), partial(train, s, first, stage, steps, **keys))

    def inference(model: str) -> Task:
        rows = [(f"inference, {what}", model) for what in ("stock", "folded few-shot")]
        return Task(rows, rows[0], partial(infer, s, model))

    first, *others = s.models
    enrollment = f"enrollment, {s.classes} classes x {SHOTS} shots"
    return [
        *of_stages(first),
        varied(2, "long, float16", LONG * s.steps, amp=True),
        varied(2, "long, bfloat16", LONG * s.steps, amp="bf16"),
        inference(first),
        Task([(enrollment, first)], ("stock", "none"), partial(enroll, s, first)),
        *(task for model in others for task in (*of_stages(model), inference(model))),
        varied(2, "channels_last=False", channels_last=False),
        varied(2, "amp=False", amp=False),
        varied(0, "compile=True", compile=True),
        varied(2, "compile=True", compile=True),
    ]


def table(s: Settings, tasks: list[Task], found: dict[tuple[str, str], dict[str, Any]]) -> str:
    """Return the table; rows without a measurement give the reason."""
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    for task in tasks:
        for row in task.rows:
            figures = {
                "measurement": row[0],
                "model": Path(row[1]).name,
                **found.get(row, {"note": "not yet measured"}),
            }
            base = found.get(task.stock, {}).get("s a step")
            if base and "s a step" in figures:
                figures["x stock"] = figures["s a step"] / base
            cells = [figures.get(k, "" if k == "note" else "-") for k in COLUMNS]
            lines.append(f"| {' | '.join(f'{x:.4g}' if isinstance(x, float) else str(x) for x in cells)} |")
    device = torch.cuda.get_device_name(s.device) if s.device.type == "cuda" else get_cpu_info()
    versions = (
        f"yolo_fewshot {yolo_fewshot.__version__}, ultralytics {ultralytics.__version__}, torch {torch.__version__}"
    )
    how = f"Images of {s.imgsz} px, {s.batch} a batch, {s.workers} loader processes."
    return "\n".join([f"{device}; {versions}; {date.today()}. {how}", "", *lines, EXPLAINED])


@contextlib.contextmanager
def time_limit(moment: float) -> Iterator[None]:
    """Interrupt the block at a given time, if the system supports it."""
    if not hasattr(signal, "SIGALRM"):
        yield
        return

    def interrupt(*_: Any) -> None:
        raise TimeUp

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, max(moment - time.perf_counter(), 1))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def on_gpu(model: torch.nn.Module) -> bool:
    """Return whether to use AMP, without Ultralytics' check, which downloads a model."""
    return next(model.parameters()).device.type == "cuda"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep Ultralytics from logging and from downloading a model or a font."""
    level = LOGGER.level
    LOGGER.setLevel("ERROR")
    try:
        with (
            mock.patch("ultralytics.engine.trainer.check_amp", on_gpu),
            mock.patch("ultralytics.data.utils.check_font"),
            mock.patch("ultralytics.utils.callbacks.add_integration_callbacks"),
        ):
            yield
    finally:
        LOGGER.setLevel(level)


def measure(task: Task, s: Settings) -> list[dict[str, Any]]:
    """Return the figures of a measurement, or the reason for their absence."""
    if time.perf_counter() > s.end:
        return [{"note": "left out, no time"}] * len(task.rows)
    try:
        with time_limit(s.end + GRACE):
            return task.measure()
    except TimeUp:
        note = "interrupted, no time"
    except Exception as e:
        note = f"failed, {type(e).__name__}: {' '.join(str(e).split())[:200]}".replace("|", "/")
    finally:
        torch.compiler.reset()
        gc.collect()
        if s.device.type == "cuda":
            torch.cuda.empty_cache()
    return [{"note": note}] * len(task.rows)


def main(
    model: str = "yolo11n,yolo11m",
    imgsz: str = "640",
    device: str = "0",
    steps: str = "50",
    batch: str = "16",
    classes: str = "100",
    workers: str = "8",
    minutes: str = "8",
    out: str = "gpu.md",
) -> None:
    """Run all measurements, write the table to a file, and print it."""
    end = time.perf_counter() + 60 * float(minutes)
    if int(batch) < 4 or int(batch) % 2 or int(batch) // 2 > int(classes):
        raise ValueError(f"'batch={batch}' is an invalid value. It must be even, at least 4 and at most 2 x classes.")
    where = select_device(device, verbose=False)
    where = torch.device("cuda", where.index or 0) if where.type == "cuda" else where
    with tempfile.TemporaryDirectory() as folder, quiet():
        numbers = int(imgsz), int(steps), int(batch), int(classes)
        s = Settings(model.split(","), *numbers, where, int(workers), Path(folder), end)
        draw(s)
        tasks, found = plan(s), {}
        for task in tasks:
            found |= zip(task.rows, measure(task, s))
            Path(out).write_text(table(s, tasks, found))
            shown = {name: found[name, of] for name, of in task.rows}
            print(f"{task.rows[0][1]}: {shown}", file=sys.stderr, flush=True)
    print(Path(out).read_text())


if __name__ == "__main__":
    main(**dict(x.split("=", 1) for x in sys.argv[1:]))
