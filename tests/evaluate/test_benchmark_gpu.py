"""The benchmark for a GPU, on the CPU: that it measures what it says, not how fast anything is."""

import contextlib
import importlib
import math
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.utils import LOGGER

from yolo_fewshot import FewShotTrainer

pytestmark = pytest.mark.slow

TINY = {"imgsz": "32", "steps": "2", "batch": "4", "classes": "4", "device": "cpu", "workers": "0"}


@pytest.fixture(scope="module")
def gpu():
    with pytest.MonkeyPatch.context() as m:
        m.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
        yield importlib.import_module("gpu")


@pytest.fixture(scope="module")
def models(draw_tiny, tmp_path_factory):
    root = draw_tiny(tmp_path_factory.mktemp("models"), 1)
    return [str(root / f"{family}n-tiny") for family in ("yolo11", "yolo26")]


@pytest.fixture
def settings(gpu, models, tmp_path):
    s = gpu.Settings(models[:1], 32, 2, 4, 4, torch.device("cpu"), 0, tmp_path / "data", time.perf_counter() + 100)
    gpu.draw(s)
    return s


def rows_of(file):
    """The rows of the table, by measurement and model."""
    header, _, *lines = [x for x in file.read_text().splitlines() if x.startswith("|")]
    split = [[c.strip() for c in x.strip("|").split("|")] for x in (header, *lines)]
    assert {len(x) for x in split} == {len(split[0])}
    return {(x[0], x[1]): dict(zip(split[0], x)) for x in split[1:]}


def test_every_row_is_measured_or_has_a_reason(gpu, models, tmp_path, monkeypatch, capsys):
    level = LOGGER.level
    monkeypatch.setitem(sys.modules, "polars", None)  # not needed
    given = {**TINY, "model": ",".join(models), "out": str(tmp_path / "gpu.md")}
    enroll = gpu.enroll
    monkeypatch.setattr(gpu, "enroll", lambda *_: 1 / 0)
    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", lambda: "c++")  # which need not be there
    with torch.compiler.set_stance("force_eager"):  # compiling takes minutes
        gpu.main(**given)
    assert gpu.enroll is not enroll and LOGGER.level == level
    rows = rows_of(tmp_path / "gpu.md")
    names = [Path(x).name for x in models]
    each = ["stock", "stage 1", "stage 2", "stage 3", "inference, stock", "inference, folded few-shot"]
    once = [
        "stage 2, long, float16", "stage 2, long, bfloat16", "enrollment, 4 classes x 5 shots",
        "stage 2, channels_last=False", "stage 2, amp=False", "stock, compile=True", "stage 2, compile=True",
    ]  # fmt: skip
    assert rows.keys() == {*((k, n) for k in each for n in names), *((k, names[0]) for k in once)}
    failed = {k: x["note"] for (k, _), x in rows.items() if x["note"].startswith("failed")}
    assert failed.pop("enrollment, 4 classes x 5 shots") == "failed, ZeroDivisionError: division by zero"
    assert "bfloat16 autocast requires CUDA" in failed.pop("stage 2, long, bfloat16") and not failed
    for (name, _), row in rows.items():
        if row["note"].startswith("failed"):
            assert {row[k] for k in ("steps", "steps/s", "s a step", "x stock", "loader")} == {"-"}
            continue
        assert row["precision"] == "float32" and row["steps"] == ("8" if "long" in name else "2")
        assert all(0 < float(row[k]) < math.inf for k in ("steps/s", "s a step", "x stock"))
        assert (row["GPU"], row["GiB"]) == ("-", "-")
        if "inference" not in name:
            assert 0 <= int(row["loader"].removesuffix(" %").removesuffix("%")) < 100
            assert ("stock" in name) == (row["overflows"] == "-") and row["skipped"] in ("0", "-")
    assert all(float(rows[k, n]["x stock"]) == 1 for k in ("stock", "inference, stock") for n in names)
    assert capsys.readouterr().out.strip() == (tmp_path / "gpu.md").read_text().strip()


def test_enrollment_is_that_of_all_classes(gpu, settings, models):
    (row,) = gpu.enroll(settings, models[0])
    assert 0 < row["s a step"] < math.inf and row["steps/s"] == pytest.approx(1 / row["s a step"])
    shots = gpu.read_support(settings.folder / "shots.yaml")
    assert len(shots.labels) == 20 and sorted(shots.class_names) == [f"new{i}" for i in range(4)]


@pytest.mark.parametrize("stage", range(4))
def test_the_steps_are_those_of_the_trainers(gpu, settings, models, monkeypatch, stage):
    """Of as many images each, with a step of the optimizer for every batch."""
    seen, cls = [], FewShotTrainer if stage else DetectionTrainer
    step = cls.optimizer_step
    monkeypatch.setattr(cls, "optimizer_step", lambda self: seen.append((self, len(self._seen))) or step(self))
    load = cls.preprocess_batch
    monkeypatch.setattr(
        cls, "preprocess_batch", lambda self, batch: setattr(self, "_seen", batch["im_file"]) or load(self, batch)
    )
    with gpu.quiet():
        (row,) = gpu.train(settings, models[0], stage, 2)
    trainer = seen[0][0]
    assert row["steps"] == 2 and [n for _, n in seen] == [4] * 4 and type(trainer) is cls  # two of them warm up
    if stage:
        assert trainer.args.stage == stage and trainer.guard.columns()["train/steps"] == 4
    assert not any((trainer.save_dir / "weights").glob("*.pt")) or stage == 3  # which writes what it starts from


def test_waiting_for_images_is_not_counted_as_computation(gpu, monkeypatch):
    clock = iter([10.0, 12.0, 15.0, 16.0, 18.0, 25.0, 28.0])  # an epoch starts, then loaded and done of each step
    monkeypatch.setattr(gpu.time, "perf_counter", lambda: next(clock))
    trainer = SimpleNamespace(batch_size=4, add_callback=lambda *_: None)
    watch = gpu.Watch(trainer, gpu.Monitor(torch.device("cpu")), 2, 1, math.inf)
    watch.on_train_epoch_start(trainer)
    for i in range(3):
        watch.on_train_batch_start(trainer)
        if i < 2:
            watch.on_train_batch_end(trainer)
    with pytest.raises(gpu.Enough):
        watch.on_train_batch_end(trainer)
    assert (watch.first, watch.waits, watch.works) == (5.0, [1.0, 7.0], [2.0, 3.0])
    trainer.batch_size = 2
    with pytest.raises(MemoryError, match="batch=4 does not fit"):
        watch.on_train_batch_start(trainer)


def test_measurements_without_time_left_are_skipped_and_listed(gpu, models, tmp_path):
    gpu.main(**{**TINY, "model": models[0], "minutes": "0", "out": str(tmp_path / "gpu.md")})
    rows = rows_of(tmp_path / "gpu.md")
    assert len(rows) == 13 and {x["note"] for x in rows.values()} == {"left out, no time"}


@pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="Windows")
def test_a_measurement_that_takes_too_long_is_interrupted(gpu, settings, monkeypatch):
    def endless():
        while True:
            with contextlib.suppress(Exception):  # as libraries do
                time.perf_counter()

    monkeypatch.setattr(gpu, "GRACE", 0)
    task = gpu.Task([("a", "m"), ("b", "m")], ("a", "m"), endless)
    soon = settings._replace(end=time.perf_counter() + 0.1)
    assert gpu.measure(task, soon) == [{"note": "interrupted, no time"}] * 2
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("pynvml", "smi", "expected"), [(lambda _: 83, None, 83.0), (None, "71\n", 71.0), (None, "[N/A]\n", None)]
)
def test_the_utilization_comes_from_pynvml_or_nvidia_smi(gpu, monkeypatch, pynvml, smi, expected):
    def missing(_):
        raise ModuleNotFoundError("pynvml")

    asked = []
    monkeypatch.setattr(torch.cuda, "utilization", pynvml or missing)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="abc"))
    monkeypatch.setattr(gpu.subprocess, "run", lambda q, **_: asked.append(q) or SimpleNamespace(stdout=smi))
    assert gpu.utilization(torch.device("cuda", 1)) == expected
    assert all("--id=GPU-abc" in q for q in asked) and len(asked) == (pynvml is None)


def test_memory_and_utilization_of_a_gpu_are_those_since_the_start(gpu, monkeypatch):
    calls, sampled, values = [], threading.Event(), iter([40.0, 80.0])

    def utilization(device):
        value = next(values, None)
        if value is None:
            sampled.set()
        return value

    monkeypatch.setattr(gpu, "utilization", utilization)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda d: calls.append(("reset", d)))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda d: 3 * 2**30)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda d: calls.append(("wait", d)))
    device = torch.device("cuda", 1)
    monitor = gpu.Monitor(device)
    assert not calls
    monitor.start()
    assert monitor.sync() <= time.perf_counter() and calls == [("reset", device), ("wait", device)]
    assert sampled.wait(30)
    assert monitor.figures() == {"GPU": "60 %", "GiB": 3.0} and not monitor.thread.is_alive()


@pytest.mark.parametrize("batch", ["2", "5", "32"])
def test_batches_that_are_no_episode_are_an_error(gpu, tmp_path, batch):
    with pytest.raises(ValueError, match=f"'batch={batch}' is an invalid value. It must be even, at least 4"):
        gpu.main(**{**TINY, "batch": batch, "out": str(tmp_path / "gpu.md")})
