"""A studio that learns by itself: every action is followed by what it changes, outside of the caller's thread."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from yolo_fewshot.studio.engine import Studio
from yolo_fewshot.studio.found import Found
from yolo_fewshot.studio.project import Box
from yolo_fewshot.studio.scenes import CHUNK
from yolo_fewshot.studio.training import Progress, Training
from yolo_fewshot.studio.worker import Worker

PAUSE = 0.7  # seconds without an action until what was learned is checked
GRAFT = "yolo_fewshot.studio.training:graft"


class Live:
    """Actions on a studio that return at once.

    Attributes:
        studio (Studio): The studio.
        messages (list[str]): Errors of work in the background, the last one last.
        training (Training | None): The training that runs.
        progress (Progress): Of the last training.
        exported (dict[str, str]): State of the files in `exports/` by name: 'busy', 'done', or what went wrong.
    """

    def __init__(self, studio: Studio, trainer: str = GRAFT):
        """Start the workers.

        Args:
            studio (Studio): The studio.
            trainer (str): Module and name of the function that trains, as `yolo_fewshot.studio.training.graft`.
        """
        self.studio, self.trainer = studio, trainer
        self.messages: list[str] = []
        self.training: Training | None = None
        self.progress = Progress()
        self.exported: dict[str, str] = {}
        self.exports = studio.project.folder / "exports"
        self._lock = threading.RLock()
        for left in (studio.project.folder / x for x in (".train", ".train-data")):  # by a crash
            shutil.rmtree(left, ignore_errors=True)
        for left in studio.project.folder.glob(".video*"):
            left.unlink(missing_ok=True)
        self._jobs: list[Callable[[], None]] = []
        self._changes: Counter[str] = Counter()  # by the stem of what they put out of date
        self._closed, self._learned = threading.Event(), 0.0  # when it learned last
        self._front = Worker({"learn": self._learn, "refresh": self._refresh}, self._failed)
        self._back = Worker({"jobs": self._do_job, "assess": self._assess, "look": self._look}, self._failed)
        self._front.ask("learn")
        self._front.ask("refresh")
        self._back.ask("look")

    @property
    def busy(self) -> str:
        """What is done in the background, for display; empty if nothing is."""
        names = {"learn": "Learning", "refresh": "Reading images", "assess": "Checking", "look": "Comparing"}
        return names.get(self._front.busy) or names.get(self._back.busy) or ("Saving" if self._back.busy else "")

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until nothing is left to do but a training.

        Args:
            timeout (float, optional): Seconds for each worker.

        Returns:
            (bool): Whether that is so.
        """
        done = self._front.wait(timeout) and self._back.wait(timeout)
        return done and self._front.wait(timeout) and self._back.wait(timeout)  # assessing may ask for learning

    def close(self) -> None:
        """End all work, and let another studio open the project."""
        self._closed.set()
        with self._lock:
            if self.training is not None:
                self.training.finish()
        self._front.close()
        self._back.close()
        self.studio.close()

    # Actions, as in `Studio`

    def add(self, data: bytes, name: str) -> str:
        """Add an image, see `Studio.add`."""
        key = self.studio.add(data, name)
        self._front.ask("refresh")
        return key

    def add_video(self, file: Path, name: str, frames: int) -> None:
        """Add frames of a video, which is removed then, see `Studio.add_video`."""

        def read() -> None:
            try:
                self.studio.add_video(file, name, frames)
            finally:
                file.unlink(missing_ok=True)
                self._front.ask("refresh")

        self._job(read)

    @contextmanager
    def _action(self) -> Iterator[None]:
        """Learn after an action, also after one that could not be saved."""
        try:
            yield
        except OSError:
            self.studio.version += 1
            self._front.ask("learn")
            raise
        self._front.ask("learn")

    def remove(self, key: str) -> None:
        """Remove an image, see `Studio.remove`."""
        with self._action():
            self.studio.remove(key)

    def label(self, key: str, name: str, xyxy: tuple[float, float, float, float], snap: bool = True) -> Box:
        """Label an object, see `Studio.label`."""
        with self._action():
            return self.studio.label(key, name, xyxy, snap)

    def reject(self, key: str, found: Found) -> None:
        """Say that a detection is wrong, see `Studio.reject`."""
        with self._action():
            self.studio.reject(key, found)

    def unlabel(self, key: str, number: int) -> None:
        """Take a label back, see `Studio.unlabel`."""
        with self._action():
            self.studio.unlabel(key, number)

    def set_empty(self, key: str, empty: bool) -> None:
        """Say that an image shows none of the classes, see `Studio.set_empty`."""
        with self._action():
            self.studio.set_empty(key, empty)

    def forget(self, name: str) -> None:
        """Remove all labels of a class, see `Studio.forget`."""
        with self._action():
            self.studio.forget(name)

    def rename(self, old: str, new: str) -> None:
        """Rename a class, see `Studio.rename`."""
        with self._action():
            self.studio.rename(old, new)
        self._outdated("trained")
        self._back.ask("look")

    def set_conf(self, name: str, conf: float | None) -> None:
        """Set the threshold of a class, see `Studio.set_conf`."""
        self.studio.set_conf(name, conf)
        self._outdated("model")

    # Training

    def train(self, minutes: float) -> None:
        """Train for some minutes, in a process of its own.

        Args:
            minutes (float): Minutes.

        Raises:
            ValueError: If nothing is labeled, or a training runs.
        """
        with self._lock:
            if self.training is not None:
                raise ValueError("A training runs already. Cancel it first.")
            studio = self.studio
            if studio.learned is None or not studio.learned.names:
                if studio.project.names:
                    raise ValueError("Only classes of the detector are labeled. Label a new one, or rename one.")
                raise ValueError("Nothing is labeled yet. Draw a box first.")
            folder, self.progress = studio.project.folder / ".train", Progress()
            data = folder.with_name(".train-data")
            self._copy(data)
            self.training = Training(
                folder,
                self.trainer,
                model=os.path.abspath(str(studio.yolo.ckpt_path or studio.project.about["model"])),
                data=str(data / "data.yaml"),
                minutes=minutes,
                imgsz=studio.imgsz,
                device=str(studio.device),
            )
        threading.Thread(target=self._follow, args=(self.training, data), daemon=True).start()
        studio.version += 1

    def cancel(self) -> None:
        """Stop the training; everything stays as it was before it."""
        with self._lock:
            if self.training is not None:
                self.training.cancel()

    # Results

    def export(self, kind: str) -> None:
        """Write a result into `exports/`; `exported` says when it is done.

        Args:
            kind (str): 'checkpoint', 'trained', 'onnx', 'trained-onnx' or 'labels'.
        """
        trained = kind.startswith("trained")
        name = "labels.zip" if kind == "labels" else ("trained" if trained else "model")
        name += "" if kind == "labels" else ".onnx" if kind.endswith("onnx") else ".pt"
        self.exported[name] = "busy"
        self.studio.version += 1

        def write() -> None:
            stem = name.partition(".")[0]
            changes = self._changes[stem]
            try:
                self.exports.mkdir(exist_ok=True)
                if kind == "labels":
                    self.studio.export_labels(self.exports / name)
                elif kind.endswith("onnx"):
                    self.studio.export(self.exports / name, trained)
                else:
                    self.studio.save(self.exports / name, trained)
                self.exported[name] = "done"
                if self._changes[stem] != changes:  # meanwhile
                    self._outdated(stem)
            except Exception as e:
                self.exported[name] = str(e)
                raise
            finally:
                self.studio.version += 1

        self._job(write)

    # Parts

    def _job(self, job: Callable[[], None]) -> None:
        """Have something done after what was asked for before."""
        self._jobs.append(job)
        self._back.ask("jobs")

    def _do_job(self) -> None:
        """Do the first of the jobs, if there is one, and ask for the next one even if it fails."""
        try:
            if self._jobs:
                self._jobs.pop(0)()
        finally:
            if self._jobs:
                self._back.ask("jobs")

    def _learn(self) -> None:
        """Learn, then look through the other images and check what was learned."""
        try:
            self.studio.learn()
        finally:
            self._outdated("model", "labels")
        self._learned = time.monotonic()
        self._front.ask("refresh")
        self._back.ask("assess")

    def _refresh(self) -> bool:
        """Look through some images."""
        learned = self.studio.learned
        more = self.studio.refresh(CHUNK)
        if self.studio.learned is not learned:
            self._outdated("model")
        if not more:
            self._back.ask("look")
        return more

    def _assess(self) -> bool:
        """Check what was learned, once the user pauses: it takes longer than learning, which it would slow down.

        Returns:
            (bool): Whether it has to be done later, since there are jobs to do first.
        """
        while not self._closed.wait(0.05) and (time.monotonic() - self._learned < PAUSE or not self._front.idle):
            if self._jobs:
                return True
        if not self._closed.is_set():
            if self.studio.assess():
                self._front.ask("learn")
            self._outdated("model")  # whose thresholds are others
        return False

    def _look(self) -> bool:
        """Look at some images with the trained model."""
        return self.studio.look(CHUNK)

    def _follow(self, training: Training, data: Path) -> None:
        """Follow a training to its end."""
        try:
            while training.running:
                self._take(training.progress())
                threading.Event().wait(0.3)
            self._take(training.progress())
            checkpoint = training.result()
            if checkpoint is not None:
                self.studio.adopt(checkpoint)
                self._outdated("trained")
                self._back.ask("look")
        except Exception as e:
            self._failed(str(e))
        finally:
            training.finish()
            shutil.rmtree(data, ignore_errors=True)
            with self._lock:
                self.training = None
            self.studio.version += 1

    def _outdated(self, *stems: str) -> None:
        """Note that files in `exports/` are no longer what they would be now."""
        self._changes.update(stems)
        for name, state in list(self.exported.items()):
            if name.partition(".")[0] in stems and state == "done":
                del self.exported[name]

    def _copy(self, folder: Path) -> None:
        """Copy the data set, so that what is labeled during a training is for the next one."""
        project = self.studio.project
        shutil.rmtree(folder, ignore_errors=True)
        for name in ("images", "labels"):
            (folder / name).mkdir(parents=True)
        with project.lock:
            for file in (*(project.folder / "labels").glob("*.txt"), project.folder / "train.txt", project.data):
                shutil.copy(file, folder / file.relative_to(project.folder))
            for image in project.images.values():
                if image.labeled:
                    source, copy = project.path(image), folder / "images" / image.file
                    try:
                        os.link(source, copy)  # takes no space
                    except OSError:
                        shutil.copy(source, copy)

    def _take(self, progress: Progress) -> None:
        """Show the progress of a training."""
        if progress != self.progress:
            self.progress = progress
            self.studio.version += 1

    def _failed(self, text: str) -> None:
        """Show an error."""
        self.messages.append(text)
        self.studio.version += 1
