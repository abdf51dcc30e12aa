"""Training in a process of its own, so that the page goes on, and a cancel or a crash leaves everything as it was.

The process writes a line of JSON to `progress.jsonl` for every report, and `result.json` at the end.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from yolo_fewshot.files import AtomicPath

PROGRESS, RESULT, JOB, LOG = "progress.jsonl", "result.json", "job.json", "train.log"
Report = Callable[..., None]


class Progress(NamedTuple):
    """How far a training is.

    Attributes:
        done (float): Share, 0..1.
        epochs (tuple[int, ...]): Epochs that are over.
        loss (tuple[float, ...]): Mean loss in each.
        ap (tuple[float | None, ...]): AP50 on the labeled images after each, None if it was not measured.
    """

    done: float = 0.0
    epochs: tuple[int, ...] = ()
    loss: tuple[float, ...] = ()
    ap: tuple[float | None, ...] = ()


def graft(model: str, data: str, folder: str, minutes: float, imgsz: int, device: str | None, report: Report) -> str:
    """Train the neck of a detector for its new classes, for some minutes.

    Args:
        model (str): Checkpoint of the detector.
        data (str): data.yaml of the labels.
        folder (str): Folder for the run.
        minutes (float): Minutes to train.
        imgsz (int): Image size in pixels.
        device (str, optional): Device, as in Ultralytics.
        report (Report): Takes `done`, a share, or `epoch`, `loss` and `ap`.

    Returns:
        (str): Checkpoint of the trained model.
    """
    from yolo_fewshot.yolo import FewShotYOLO

    start, limit = time.monotonic(), minutes * 60
    trained: list[int] = []
    yolo = FewShotYOLO(model)

    def share(trainer: Any) -> None:
        report(done=min((time.monotonic() - start) / limit, 0.99))

    def epoch(trainer: Any) -> None:
        if trainer.epoch not in trained:  # the best model is validated once more at the end
            return
        loss = trainer.tloss
        values = loss.values() if isinstance(loss, dict) else loss
        ap = trainer.metrics.get("metrics/mAP50(B)") if trainer.metrics else None
        report(epoch=trainer.epoch + 1, loss=float(sum(values)), ap=None if ap is None else float(ap))

    yolo.add_callback("on_train_batch_end", share)
    yolo.add_callback("on_train_epoch_end", lambda trainer: trained.append(trainer.epoch))
    yolo.add_callback("on_fit_epoch_end", epoch)
    length = {"time": minutes / 60, "val": True}
    files = {"project": folder, "name": "run", "exist_ok": True, "plots": False, "workers": 0}
    yolo.train(cfg="stage3.yaml", graft="neck", data=data, imgsz=imgsz, device=device, **length, **files)
    return str(yolo.trainer.best if yolo.trainer.best.exists() else yolo.trainer.last)


class Training:
    """A training that runs.

    Attributes:
        folder (Path): Its files, which `finish` removes.

    Examples:
        >>> training = Training(folder, "yolo_fewshot.studio.training:graft", model="yolo11n.pt", data="data.yaml")
        >>> while training.running:
        ...     print(training.progress())
        >>> checkpoint = training.result()
    """

    def __init__(self, folder: Path, function: str, **arguments: Any):
        """Start the process.

        Args:
            folder (Path): Folder for its files, which is emptied.
            function (str): Module and name of the function that trains, e.g. 'yolo_fewshot.studio.training:graft'.
            **arguments (Any): Its arguments but `folder` and `report`.
        """
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.folder, self._cancelled = folder, False
        job = {"function": function, "arguments": arguments, "parent": os.getpid()}
        AtomicPath(folder / JOB).write_bytes(json.dumps(job).encode())
        with open(folder / LOG, "wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "yolo_fewshot.studio.training", str(folder)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    @property
    def running(self) -> bool:
        """Whether it still trains."""
        return self._process.poll() is None

    def progress(self) -> Progress:
        """Return how far it is."""
        done, epochs, loss, ap = 0.0, [], [], []
        try:
            lines = (self.folder / PROGRESS).read_text().splitlines()
        except OSError:
            lines = []
        for line in lines:
            try:
                x = json.loads(line)
            except ValueError:  # a line that is being written
                continue
            done = max(done, x.get("done", 0.0))
            if "epoch" in x:
                epochs.append(x["epoch"])
                loss.append(x["loss"])
                ap.append(x.get("ap"))
        return Progress(done, tuple(epochs), tuple(loss), tuple(ap))

    def cancel(self) -> None:
        """Stop the process; it has changed nothing but its own folder."""
        self._cancelled = True
        if self.running:
            self._process.terminate()
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def result(self) -> Path | None:
        """Wait for the end.

        Returns:
            (Path | None): Checkpoint of the trained model; None if it was cancelled.

        Raises:
            RuntimeError: If training failed; the text says why.
        """
        self._process.wait()
        if self._cancelled:
            return None
        try:
            result = json.loads((self.folder / RESULT).read_text())
        except (OSError, ValueError):
            log = (self.folder / LOG).read_text(errors="replace").strip().splitlines()
            result = {"error": f"The process ended with {self._process.returncode}: {' '.join(log[-3:])[-500:]}"}
        if "error" in result:
            raise RuntimeError(f"Training failed, and nothing was changed. {result['error']}")
        return Path(result["checkpoint"])

    def finish(self) -> None:
        """Remove its files."""
        self.cancel()
        shutil.rmtree(self.folder, ignore_errors=True)


def run(folder: Path) -> None:
    """Train as the job in a folder says.

    Args:
        folder (Path): Folder of a `Training`.
    """
    job = json.loads((folder / JOB).read_text())
    last = 0.0
    if hasattr(os, "nice"):
        os.nice(10)  # the page comes first

    def report(**values: Any) -> None:
        nonlocal last
        if hasattr(os, "fork") and os.getppid() != job["parent"]:
            raise SystemExit("the studio has ended")
        if "epoch" in values or time.monotonic() - last > 0.3:
            last = time.monotonic()
            with open(folder / PROGRESS, "a") as f:
                f.write(json.dumps(values) + "\n")

    module, _, name = job["function"].partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
        result = {"checkpoint": str(function(**job["arguments"], folder=str(folder), report=report))}
    except Exception as e:
        result = {"error": f"{type(e).__name__}: {e}"}
    AtomicPath(folder / RESULT).write_bytes(json.dumps(result).encode())


if __name__ == "__main__":
    run(Path(sys.argv[1]))
