"""What the page of the studio does, for Python: label, learn at once, look at what is found, tune, save."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from contextlib import closing
from copy import deepcopy
from pathlib import Path

from ultralytics.utils.checks import check_imgsz
from ultralytics.utils.torch_utils import select_device

from yolo_fewshot.enroll.features import support_views
from yolo_fewshot.enroll.methods import few_shot_method
from yolo_fewshot.errors import no_rows
from yolo_fewshot.nn.rows import class_rows, enrolled_classes
from yolo_fewshot.studio.found import CONF, Found, as_sure_as_of_shots, find, found_by, uncertainty
from yolo_fewshot.studio.learning import Figures, Learned, Lesson, cross_validate, gather, learn_classes
from yolo_fewshot.studio.project import IOU_SAME, Box, LabeledImage, Project, class_name, display_name, iou
from yolo_fewshot.studio.results import export_onnx, with_classes
from yolo_fewshot.studio.scenes import CHUNK, Scene, Scenes
from yolo_fewshot.studio.sources import files_of, frames_of, is_video
from yolo_fewshot.yolo import FewShotYOLO

IOU_SNAP = 0.6  # IoU from which a drawn box snaps to a proposal
SAVE_EVERY = 50  # images of a source after which the session is saved


class Studio:
    """A detector that learns from a project while it is labeled.

    The detector itself is never changed. Threads may label while another one learns.

    Attributes:
        project (Project): Images and labels.
        known (dict[str, list[Found]]): What the detector's own classes find, by image.
        found (dict[str, list[Found]]): What the learned classes find, by image; without thresholds.
        trained (dict[str, list[Found]]): What the trained model finds, by image; empty if none was trained.
        figures (dict[str, Figures]): Of the learned classes.
        suspects (set[int]): Numbers of the boxes that look more like another class.
        version (int): Increases with every change of what there is to see.

    Examples:
        >>> studio = Studio("yolo11n.pt", "scooters")
        >>> keys = studio.add_source("photos")
        >>> studio.refresh()
        >>> studio.label(keys[0], "scooter", (0.1, 0.2, 0.3, 0.4))
        >>> studio.learn()
        >>> studio.shown(keys[1])
        >>> studio.save("scooters.pt")
    """

    def __init__(
        self, model: str | Path, folder: str | Path, imgsz: int | None = None, device: str | int | None = None
    ):
        """Load a detector, and open a project.

        Args:
            model (str | Path): Checkpoint that `FewShotYOLO` can enroll into.
            folder (str | Path): Folder of the project, which is made if it does not exist.
            imgsz (int, optional): Image size in pixels, that of training if not given.
            device (str | int, optional): Device, as in Ultralytics.

        Raises:
            TypeError: If the model cannot enroll classes.
            ValueError: If the folder is not that of a project.
            FileNotFoundError: If the checkpoint, or an image of the project, does not exist.
        """
        self.yolo = FewShotYOLO(model)
        try:
            class_rows(self.yolo.model)
        except TypeError as e:
            raise TypeError(no_rows(self.yolo, "yolo-fewshot studio", str(e))) from e
        network = self.yolo.model
        if (network.yaml.get("channels") or 3) != 3:
            raise TypeError(f"model='{model}' takes images of {network.yaml['channels']} channels, and the studio 3.")
        self.device = select_device(device if device is not None else "", verbose=False)
        self.rows = class_rows(deepcopy(network).eval().float().to(self.device))
        self.imgsz = check_imgsz(imgsz or self.yolo.overrides.get("imgsz", 640), stride=int(network.stride.max()))
        train_args = (self.yolo.ckpt or {}).get("train_args") or {}
        self.views = support_views(train_args, False, self.rows.per_level)
        self.own = [str(n) for n in network.names.values() if str(n) not in self.rows.enrolled]
        self.project = Project(folder)
        self.project.about |= {"model": str(model), "imgsz": self.imgsz}
        self.project.save()
        self.known: dict[str, list[Found]] = {}
        self.found: dict[str, list[Found]] = {}
        self.trained: dict[str, list[Found]] = {}
        self.figures: dict[str, Figures] = {}
        self.suspects: set[int] = set()
        self.learned: Learned | None = None
        self.version = 0
        self._scenes = Scenes(self.rows, self.project, self.imgsz, self.views)
        self._fresh: dict[str, tuple[int, tuple[str, ...]]] = {}  # what `found` of an image follows from
        self._lesson = 0  # number of the last time of learning
        self._methods: dict[str, str] = {}
        self._defaults: dict[str, float] = {}  # thresholds of classes of too few shots for a suggested one
        self._trained_defaults: dict[str, float] = {}  # thresholds in the trained model
        self._network = threading.RLock()  # guards the network and what is kept of it

    def close(self) -> None:
        """Let another studio open the project."""
        self.project.close()

    # Images

    def add(self, data: bytes, name: str, save: bool = True) -> str:
        """Add an image, see `Project.add`."""
        key = self.project.add(data, name, save)
        self._changed()
        return key

    def add_source(self, source: str | Path, frames: int = 20, skipped: list[str] | None = None) -> list[str]:
        """Add an image, the images of a folder, or frames of a video.

        Args:
            source (str | Path): File or folder.
            frames (int): Number of frames of a video, evenly spread.
            skipped (list[str], optional): Takes the texts on files that cannot be read, which else raise an error.

        Returns:
            (list[str]): Keys of the images.

        Raises:
            FileNotFoundError: If the source does not exist.
            ValueError: If it has no images, or one is unusable.
        """
        keys: list[str] = []
        try:
            for file in files_of(source, but=self.project.folder):
                try:
                    video = is_video(file)
                    data = b"" if video else file.read_bytes()
                except OSError as e:
                    if skipped is None:
                        raise
                    skipped.append(f"{file.name} cannot be read: {e.strerror}.")
                    continue
                try:
                    if video:
                        keys += self.add_video(file, file.name, frames)
                    else:
                        keys.append(self.add(data, file.name, save=len(keys) % SAVE_EVERY == 0))
                except ValueError as e:
                    if skipped is None:
                        raise
                    skipped.append(str(e))
        finally:
            self.project.save()
        return list(dict.fromkeys(keys))

    def add_video(self, file: str | Path, name: str, frames: int = 20) -> list[str]:
        """Add frames of a video, evenly spread.

        Args:
            file (str | Path): The video.
            name (str): Its name, for display only.
            frames (int): Number of frames.

        Returns:
            (list[str]): Keys of the images.

        Raises:
            ValueError: If it cannot be read.
        """
        name = display_name(name)
        with closing(frames_of(file, name, frames)) as read:
            try:
                keys = [self.add(data, f"{name[:80]} frame {place}", save=False) for place, data in read]
            finally:
                self.project.save()
        return list(dict.fromkeys(keys))

    def remove(self, key: str) -> None:
        """Remove an image, see `Project.remove`."""
        self.project.remove(key)
        for kept in (self.known, self.found, self.trained, self._fresh):
            kept.pop(key, None)
        self._scenes.forget(key)
        self._changed()

    # Labels

    def label(self, key: str, name: str, xyxy: tuple[float, float, float, float], snap: bool = True) -> Box:
        """Label an object; the box snaps to what the detector proposes there.

        Args:
            key (str): Image.
            name (str): Class name.
            xyxy (tuple[float, float, float, float]): Two opposite corners in 0..1.
            snap (bool): Whether to snap.

        Returns:
            (Box): The box.

        Raises:
            ValueError: If the name is unusable, the box too small, or the same object has the same label.
        """
        x1, y1, x2, y2 = xyxy
        xyxy = min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)
        if snap:
            boxes = list(self.project.images[key].boxes)
            free = [x for x in self.proposals(key) if not any(iou(b.xyxy, x.xyxy) >= IOU_SAME for b in boxes)]
            near = max(free, key=lambda x: iou(x.xyxy, xyxy), default=None)
            if near is not None and iou(near.xyxy, xyxy) >= IOU_SNAP:
                xyxy = near.xyxy
        with self.project.lock:
            if any(iou(x.xyxy, xyxy) > 0.9 for x in self.project.images[key].boxes):
                raise ValueError("The object has a box already. Remove that one first.")
            box = self.project.label(key, name, xyxy)
        self._changed()
        return box

    def reject(self, key: str, found: Found) -> Box:
        """Say that a detection is wrong: it is not shown again, and a hard negative.

        Args:
            key (str): Image.
            found (Found): The detection.
        """
        box = self.project.reject(key, found.name, found.xyxy)
        self._changed()
        return box

    def unlabel(self, key: str, number: int) -> None:
        """Take a label back, see `Project.unlabel`."""
        self.project.unlabel(key, number)
        self._changed()

    def set_empty(self, key: str, empty: bool) -> None:
        """Say that an image shows none of the classes, see `Project.set_empty`."""
        self.project.set_empty(key, empty)
        self._changed()

    def forget(self, name: str) -> None:
        """Remove all labels of a class, see `Project.forget`."""
        self.project.forget(name)
        self._changed()

    def rename(self, old: str, new: str) -> None:
        """Rename a class, see `Project.rename`, in the trained model, too."""
        self.project.rename(old, new)
        if self.trained_file.exists():
            yolo, new = FewShotYOLO(self.trained_file), class_name(new)
            taken = {old: new} if old not in self.own else {}
            yolo.model.names = {i: taken.get(str(n), n) for i, n in yolo.model.names.items()}
            yolo.model.enrolled = {taken.get(n, n): x for n, x in enrolled_classes(yolo.model).items()}
            yolo.save(self.trained_file)
            self.trained = {}
        self._changed()

    def set_conf(self, name: str, conf: float | None) -> None:
        """Set the threshold of a class, see `Project.set_conf`."""
        self.project.set_conf(name, conf)
        self._changed()

    # What there is to see

    def threshold(self, name: str) -> float:
        """Return the threshold of a learned class: the user's, the suggested one, or with few shots a guess.

        Args:
            name (str): Class name.
        """
        figures = self.figures.get(name)
        suggested = None if figures is None else figures.suggested
        return self.project.conf.get(name, self._defaults.get(name, CONF) if suggested is None else suggested)

    def shown(self, key: str, trained: bool = False, judged: bool = False) -> list[Found]:
        """Return the detections of the learned classes in an image.

        Args:
            key (str): Image.
            trained (bool): Whether those of the trained model.
            judged (bool): Whether to include what the user has labeled or rejected.

        Returns:
            (list[Found]): Above the threshold of their class.
        """
        image = self.project.images[key]
        said = [] if judged else [*image.boxes, *image.rejected]
        found = (self.trained if trained else self.found).get(key, [])
        limits = {x.name: self.threshold(x.name) for x in found}
        if trained:  # whose confidences are others
            limits = {n: self._trained_defaults.get(n, CONF) for n in limits}
        return [
            x
            for x in found
            if x.conf >= limits[x.name] and not any(b.name == x.name and iou(b.xyxy, x.xyxy) >= IOU_SAME for b in said)
        ]

    def proposals(self, key: str) -> list[Found]:
        """Return all that the detector proposes in an image, of old and new classes."""
        return [*self.found.get(key, []), *self.known.get(key, [])]

    def proposal_at(self, key: str, name: str, x: float, y: float) -> Found | None:
        """Return the best proposal around a point: that of the class, or else of the smallest object.

        Args:
            key (str): Image.
            name (str): Class name.
            x (float): Place in 0..1.
            y (float): Place in 0..1.
        """
        boxes = [*self.project.images[key].boxes]
        around = [p for p in self.proposals(key) if p.xyxy[0] <= x <= p.xyxy[2] and p.xyxy[1] <= y <= p.xyxy[3]]
        around = [p for p in around if not any(iou(b.xyxy, p.xyxy) >= IOU_SAME for b in boxes)]
        own = [p for p in around if p.name == name]
        if own:
            return max(own, key=lambda p: p.conf)
        return min(around, key=lambda p: (p.xyxy[2] - p.xyxy[0]) * (p.xyxy[3] - p.xyxy[1]), default=None)

    def usefulness(self, key: str) -> float:
        """Return how much a look at an image would tell.

        Args:
            key (str): Image.

        Returns:
            (float): 3 for an image with a suspect shot; 1 to 2 for one without labels, by how uncertain its least
                certain detection is; 0 for one with labels.
        """
        image = self.project.images[key]
        if any(x.id in self.suspects for x in image.boxes):
            return 3.0
        if image.labeled:
            return 0.0
        judged = image.rejected
        open_ = [x for x in self.found.get(key, []) if not any(iou(j.xyxy, x.xyxy) >= IOU_SAME for j in judged)]
        return 1 + max((uncertainty(x.conf, self.threshold(x.name)) for x in open_), default=0.0)

    def order(self) -> list[str]:
        """Return the images, the most useful to look at first."""
        return sorted(list(self.project.images), key=self.usefulness, reverse=True)

    # Learning

    def refresh(self, n: int | None = None) -> bool:
        """Read images that were not read yet, and find the learned classes where they were not looked for yet.

        Args:
            n (int, optional): Number of images to stop at; all if not given.

        Returns:
            (bool): Whether there are more.
        """
        with self._network:
            if self._scenes.standardize() and self.learned is not None:
                self.learn()  # what was learned is in the units of the old statistics
            state = (self._lesson, self._scenes.statistics)
            todo = [k for k in list(self.project.images) if self._fresh.get(k) != state]
            for start in range(0, min(len(todo), n or len(todo)), CHUNK):
                keys = [k for k in todo[start : start + CHUNK][:n] if k in self.project.images]
                for key, scene in self._see(keys).items():
                    self.found[key] = find(scene, self.learned, self.rows)
                    self._fresh[key] = state
            if todo:
                self._changed()
            return n is not None and len(todo) > n

    def learn(self) -> None:
        """Enroll the labeled classes, and find them in all images whose features are kept; `refresh` finds the others.

        Raises:
            RuntimeError: If the network fails, e.g. for lack of memory.
        """
        with self._network:
            self._scenes.standardize()
            lesson = self._gather()
            if lesson is None:
                self.learned, self.figures, self.suspects = None, {}, set()
                for key in list(self.found):
                    self.found[key] = []
            else:
                self.learned = learn_classes(lesson, self.rows, self._methods, self.own)
            self._lesson += 1
            state = (self._lesson, self._scenes.statistics)
            for key, scene in self._scenes.current().items():
                self.found[key] = find(scene, self.learned, self.rows)
                self._fresh[key] = state
            self._defaults = as_sure_as_of_shots(self.found, list(self.project.images.values()))
        self._changed()

    def assess(self) -> bool:
        """Cross-validate over the shots, for the figures of every class and the method that suits it best.

        Returns:
            (bool): Whether methods have changed, so that learning again pays.
        """
        with self._network:
            lesson, space = self._gather(), self.rows.spaces()[0]
        if lesson is None:
            self.figures, self.suspects = {}, set()
            return False
        assessment = cross_validate(lesson, self.rows, space)
        self.figures, self.suspects = assessment.figures, assessment.suspects
        default = few_shot_method(self.rows.model)
        changed = any(self._methods.get(n, default) != m for n, m in assessment.methods.items())
        self._methods |= assessment.methods
        self._changed()
        return changed

    # Results

    def build(self) -> FewShotYOLO:
        """Return the detector with the learned classes, and their thresholds in its record.

        Returns:
            (FewShotYOLO): An independent model.

        Raises:
            ValueError: If nothing was learned.
        """
        with self._network:
            if self.learned is None or not self.learned.names:
                raise ValueError("Nothing was learned yet. Draw a box first.")
            conf = {n: self.threshold(n) for n in self.learned.names}
            return with_classes(self.yolo, self.rows, self.learned, conf)

    def save(self, file: str | Path, trained: bool = False) -> Path:
        """Save the detector with the learned classes, or the trained model, as a checkpoint.

        Args:
            file (str | Path): *.pt file.
            trained (bool): Whether to save the trained model.

        Returns:
            (Path): The file.

        Raises:
            ValueError: If there is nothing to save.
        """
        self._result(trained).save(file)
        return Path(file)

    def export(self, file: str | Path, trained: bool = False) -> Path:
        """Export the detector with the learned classes, or the trained model, to ONNX.

        Args:
            file (str | Path): *.onnx file.
            trained (bool): Whether to export the trained model.

        Returns:
            (Path): The file.

        Raises:
            ValueError: If there is nothing to export.
            ImportError: If the packages that export needs are not installed.
        """
        file = Path(file)
        export_onnx(self._result(trained), file, self.imgsz)
        return file

    def export_labels(self, file: str | Path) -> Path:
        """Write the labeled images as a YOLO data set in a zip, see `Project.archive`."""
        self.project.archive(Path(file))
        return Path(file)

    @property
    def trained_file(self) -> Path:
        """Checkpoint of the trained model, which exists after `adopt`."""
        return self.project.folder / "trained.pt"

    def adopt(self, checkpoint: str | Path) -> None:
        """Keep a trained model.

        Args:
            checkpoint (str | Path): Its checkpoint, which is moved.
        """
        os.replace(checkpoint, self.trained_file)
        self.trained = {}
        self._changed()

    def look(self, n: int | None = None) -> bool:
        """Find the classes with the trained model, if there is one, in the images it has not looked at.

        Args:
            n (int, optional): Number of images to stop at; all if not given.

        Returns:
            (bool): Whether there are more.
        """
        trained = self.trained  # `adopt` and `rename` replace it
        keys = [k for k in list(self.project.images) if k not in trained]
        if not keys or not self.trained_file.exists():
            return False
        yolo = FewShotYOLO(self.trained_file)
        new = set(map(str, yolo.names.values())) - set(self.own) | set(self.project.names)
        trained |= self._predict(yolo, keys[:n], new)
        self._trained_defaults = as_sure_as_of_shots(trained, list(self.project.images.values()))
        self._changed()
        return n is not None and len(keys) > n

    # Parts

    def _changed(self) -> None:
        """Note that there is something else to see."""
        self.version += 1

    def _result(self, trained: bool) -> FewShotYOLO:
        """Return the model to save."""
        if not trained:
            return self.build()
        if not self.trained_file.exists():
            raise ValueError("No model was trained yet.")
        return FewShotYOLO(self.trained_file)

    def _see(self, keys: Sequence[str]) -> dict[str, Scene]:
        """Return the scenes of images that are not removed, and note what the detector's own classes find there."""
        keys = [k for k in keys if k in self.project.images]
        try:
            scenes = self._scenes.see(keys)
        except (KeyError, FileNotFoundError):
            if all(k in self.project.images for k in keys):
                raise
            return self._see(keys)  # one was removed meanwhile
        unknown = [k for k in keys if k not in self.known]
        if unknown:
            self.known |= self._predict(self.yolo, unknown, set())
        return scenes

    def _predict(self, yolo: FewShotYOLO, keys: Sequence[str], new: set[str]) -> dict[str, list[Found]]:
        """Return what a model finds in images that are not removed; classes outside of `new` are its own."""
        found = {}
        for key in keys:
            image = self.project.images.get(key)
            try:
                if image is not None:
                    found[key] = found_by(yolo, self.project.path(image), self.imgsz, self.device, new)
            except FileNotFoundError:
                if key in self.project.images:
                    raise
        return found

    def _gather(self) -> Lesson | None:
        """Return what there is to learn from, or None without a box."""
        with self.project.lock:
            names, images = self.project.names, list(self.project.images.values())
            images = [LabeledImage(p.file, p.name, p.size, list(p.boxes), list(p.rejected), p.empty) for p in images]
        labeled = [p for p in images if p.boxes]
        if not labeled:
            return None
        try:
            shots = [self._scenes.shots_of(p) for p in labeled]
            return gather(images, names, shots, self._see([p.key for p in images if p.empty or p.rejected]))
        except (KeyError, FileNotFoundError):
            if all(p.key in self.project.images for p in images):
                raise
            return self._gather()  # one was removed meanwhile
