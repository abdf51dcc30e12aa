"""What the page of the studio does, for Python: label, learn at once, look at what is found, tune, save.

Enrollment as in `yolo_fewshot.enroll.enroll`, but from features that are kept: the network sees an image once, and the
views of an image with labels once more after they have changed.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torchvision.ops import batched_nms, box_iou
from ultralytics.data.utils import IMG_FORMATS, VID_FORMATS
from ultralytics.utils.checks import check_imgsz
from ultralytics.utils.torch_utils import select_device

from yolo_fewshot.data.support import Support
from yolo_fewshot.enroll.agreement import agreement
from yolo_fewshot.enroll.cross_validation import choose_methods
from yolo_fewshot.enroll.detection import IOU_NMS, Detections
from yolo_fewshot.enroll.enroll import compact
from yolo_fewshot.enroll.features import (
    Anchors,
    Features,
    View,
    add_background,
    extract,
    select,
    standardize,
    support_views,
)
from yolo_fewshot.enroll.methods import classifiers
from yolo_fewshot.enroll.replay import add_replay
from yolo_fewshot.enroll.thresholds import thresholds
from yolo_fewshot.errors import no_rows
from yolo_fewshot.nn.rows import ClassRows, class_rows, enrolled_classes
from yolo_fewshot.studio.images import MAX_PIXELS
from yolo_fewshot.studio.project import Box, LabeledImage, Project, display_name, iou
from yolo_fewshot.yolo import FewShotYOLO

CONF = 0.25  # threshold of a class without a better one, as in Ultralytics
CONF_MIN = 0.02  # of what is kept, so that a threshold can be lowered
MAX_FOUND = 100  # in an image
IOU_SAME = 0.5  # IoU from which two boxes are the same object
REJECTED = 10.0  # weight of an anchor of what the user rejected; one of the background has 1
IOU_SNAP = 0.6  # IoU from which a drawn box snaps to a proposal
ANCHORS_PER_VIEW = 512  # background anchors to keep of a view of an image with labels
STATISTICS = 32  # maximum number of images that the features are standardized with
CHUNK = 8  # images read at once
MAX_KEPT = 2**30  # bytes of features kept; images beyond are read again
CONTAINERS = (  # place in a video file, and what is there: MP4, AVI, Matroska, ASF, MPEG, transport stream, GIF
    (4, b"ftyp"), (8, b"AVI "), (0, b"\x1aE\xdf\xa3"), (0, b"0&\xb2u"), (0, b"\0\0\1\xba"), (0, b"G"),
)  # fmt: skip
WHOLE = 10**12  # values: all anchors are kept


class Found(NamedTuple):
    """A detection.

    Attributes:
        name (str): Class name.
        conf (float): Confidence.
        xyxy (tuple[float, float, float, float]): Corners in 0..1.
        known (bool): Whether it is of the detector's own classes.
    """

    name: str
    conf: float
    xyxy: tuple[float, float, float, float]
    known: bool


class Scene(NamedTuple):
    """What the network has seen in an image.

    Attributes:
        features (Features): All anchors of its first view.
        boxes (torch.Tensor): Their boxes in the predicting branch, corners in 0..1 of the image, (A, 4) float32.
        rival (torch.Tensor): Largest score there of the detector's own classes, (A,) float32.
        statistics (tuple[str, ...]): Images that the features were standardized with.
    """

    features: Features
    boxes: torch.Tensor
    rival: torch.Tensor
    statistics: tuple[str, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(x.numel() * x.element_size() for a in self.features.anchors for x in a)


class Learned(NamedTuple):
    """Classifiers of the classes that were labeled.

    Attributes:
        names (list[str]): Class names.
        shots (list[int]): Number of shots of each that count.
        methods (list[str]): Method of each.
        weights (list[tuple[torch.Tensor, torch.Tensor]]): Vectors and offsets, per branch.
        lost (list[str]): Classes of which no shot counts, since all are too small for the image size.
    """

    names: list[str]
    shots: list[int]
    methods: list[str]
    weights: list[tuple[torch.Tensor, torch.Tensor]]
    lost: list[str]


class Figures(NamedTuple):
    """How well a class was learned, by cross-validation over its shots.

    Attributes:
        suggested (float | None): Suggested confidence threshold.
        likeness (float | None): Mean similarity of its shots to each other; None with one shot, or one class.
        conf (torch.Tensor): Confidence of every detection in images that it was not learned from, (M,).
        tp (torch.Tensor): Whether it is a true positive, (M,) bool.
        n_gt (int): Number of objects there.
    """

    suggested: float | None
    likeness: float | None
    conf: torch.Tensor
    tp: torch.Tensor
    n_gt: int

    def at(self, conf: float) -> tuple[float | None, float | None]:
        """Return the expected precision and recall at a threshold, None where they are not known.

        Args:
            conf (float): Threshold.
        """
        kept = self.conf >= conf
        hits, n = int((self.tp & kept).sum()), int(kept.sum())
        return (hits / n if n and self.n_gt else None), (hits / self.n_gt if self.n_gt else None)


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
        self._scenes: dict[str, Scene] = {}
        self._shots: dict[str, tuple[Any, Features]] = {}  # by image, with what they depend on
        self._fresh: dict[str, tuple[int, tuple[str, ...]]] = {}  # what `found` of an image follows from
        self._lesson = 0  # number of the last time of learning
        self._methods: dict[str, str] = {}
        self._defaults: dict[str, float] = {}  # thresholds of classes of too few shots for a suggested one
        self._trained_defaults: dict[str, float] = {}  # thresholds in the trained model
        self._network = threading.RLock()  # guards the network and what is kept of it
        self._statistics: tuple[str, ...] = ()

    def close(self) -> None:
        """Let another studio open the project."""
        self.project.close()

    # Images

    def add(self, data: bytes, name: str) -> str:
        """Add an image, see `Project.add`."""
        key = self.project.add(data, name)
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
        path, keys = Path(source), []
        if not path.exists():
            raise FileNotFoundError(f"source='{source}' does not exist. It is a folder, an image or a video.")
        files = sorted(x for x in path.rglob("*") if x.is_file()) if path.is_dir() else [path]
        files = [x for x in files if x.suffix[1:].lower() in IMG_FORMATS | VID_FORMATS and not x.name.startswith(".")]
        if not files:
            raise ValueError(f"source='{source}' has no images and no videos.")
        for file in files:
            try:
                if file.suffix[1:].lower() in VID_FORMATS:
                    keys += self.add_video(file, file.name, frames)
                else:
                    keys.append(self.add(file.read_bytes(), file.name))
            except ValueError as e:
                if skipped is None:
                    raise
                skipped.append(str(e))
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
        with open(file, "rb") as f:
            start = f.read(12)
        # No playlists, which may name other files and hosts.
        video = cv2.VideoCapture(str(file) if any(start[i:].startswith(x) for i, x in CONTAINERS) else "")
        keys = []
        try:
            large = video.get(cv2.CAP_PROP_FRAME_WIDTH) * video.get(cv2.CAP_PROP_FRAME_HEIGHT) > MAX_PIXELS
            total = 0 if large else int(video.get(cv2.CAP_PROP_FRAME_COUNT))
            places = np.unique(np.linspace(0, max(total - 1, 0), max(frames, 1)).astype(int))[: max(total, 0)]
            for place in places:
                video.set(cv2.CAP_PROP_POS_FRAMES, int(place))
                ok, image = video.read()
                if ok:
                    data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()
                    keys.append(self.add(data, f"{display_name(name)[:80]} frame {place}"))
        finally:
            video.release()
        if not keys:
            raise ValueError(f"{display_name(name)} is not a video that OpenCV can read. Save its frames as images.")
        return list(dict.fromkeys(keys))

    def remove(self, key: str) -> None:
        """Remove an image, see `Project.remove`."""
        self.project.remove(key)
        for kept in (self.known, self.found, self.trained, self._fresh, self._scenes, self._shots):
            kept.pop(key, None)
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
            near = max(self.proposals(key), key=lambda x: iou(x.xyxy, xyxy), default=None)
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
        return 1 + max((_uncertainty(x.conf, self.threshold(x.name)) for x in open_), default=0.0)

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
            if self._standardize() and self.learned is not None:
                self.learn()  # what was learned is in the units of the old statistics
            state = (self._lesson, self._statistics)
            todo = [k for k in list(self.project.images) if self._fresh.get(k) != state]
            for start in range(0, min(len(todo), n or len(todo)), CHUNK):
                keys = [k for k in todo[start : start + CHUNK][:n] if k in self.project.images]
                for key, scene in self._see(keys).items():
                    self.found[key] = self._detect(scene)
                    self._fresh[key] = state
            if todo:
                self._changed()
            return n is not None and len(todo) > n

    def learn(self) -> None:
        """Enroll the labeled classes, and find them in all images whose features are kept; `refresh` finds the others.

        Raises:
            RuntimeError: If the network fails, i.e. for lack of memory.
        """
        with self._network:
            self._standardize()
            gathered = self._gather()
            if gathered is None:
                self.learned, self.figures, self.suspects = None, {}, set()
                for key in self.found:
                    self.found[key] = []
            else:
                features, names, labels, _ = gathered
                self.learned = self._fit(features, names, labels)
            self._lesson += 1
            state = (self._lesson, self._statistics)
            for key, scene in list(self._scenes.items()):
                if scene.statistics == self._statistics:
                    self.found[key] = self._detect(scene)
                    self._fresh[key] = state
            self._defaults = self._as_sure_as_of_shots(self.found)
        self._changed()

    def assess(self) -> bool:
        """Cross-validate over the shots, for the figures of every class and the method that suits it best.

        Returns:
            (bool): Whether methods have changed, so that learning again pays.
        """
        with self._network:
            gathered = self._gather()
            spaces = self.rows.spaces()
        if gathered is None:
            return False
        features, names, labels, numbers = gathered
        counts = self._independent(features, labels, len(names))
        features = self._replayed(features, names)
        first = features._replace(embeds=features.embeds[:1], anchors=features.anchors[:1])
        methods, left_out = choose_methods(
            first, labels, counts, "auto", self._few_shot_method, spaces[0], nms=not self.rows.branches[0]
        )
        suggested, alike = thresholds(left_out), agreement(features, labels, len(names))
        self.figures = {
            n: Figures(suggested[c], _likeness(alike.sim_own, labels == c), *_of_class(left_out, c))
            for c, n in enumerate(names)
        }
        self.suspects = {numbers[i] for i in alike.suspect.nonzero()[:, 0].tolist()}
        changed = any(self._methods.get(n, self._few_shot_method) != m for n, m in zip(names, methods))
        self._methods |= dict(zip(names, methods))
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
            self.yolo.predictor = None  # which cannot be copied
            built = deepcopy(self.yolo)
            rows = class_rows(built.model)
            for name in ("mean", "std"):  # the statistics of the features, where the embedding depends on them
                if hasattr(self.rows, name):
                    setattr(rows, name, getattr(self.rows, name))
            model, learned = built.model, self.learned
            indices, enrolled = {str(n): i for i, n in model.names.items()}, dict(enrolled_classes(model))
            for c, name in enumerate(learned.names):
                index = indices.setdefault(name, len(indices))
                rows.set(index, [(vectors[c], offsets[c]) for vectors, offsets in learned.weights])
                model.names[index] = name
                record = {"shots": learned.shots[c], "method": learned.methods[c], "conf": self.threshold(name)}
                enrolled[name] = {**record, "replaced": enrolled.get(name, {}).get("replaced")}
            model.enrolled = enrolled
            model.nc = model.yaml["nc"] = rows.head.nc
        return built

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
        checkpoint = self.save(file.with_name(f".{file.stem}.pt"), trained)
        try:
            made = FewShotYOLO(checkpoint).export(format="onnx", imgsz=self.imgsz, verbose=False)
            os.replace(made, file)
        finally:
            checkpoint.unlink(missing_ok=True)
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

    def look(self) -> None:
        """Find the classes with the trained model, if there is one."""
        if not self.trained_file.exists():
            return
        yolo, keys = FewShotYOLO(self.trained_file), list(self.project.images)
        self.trained = dict(zip(keys, self._predict(yolo, keys, set(self.project.names))))
        self._trained_defaults = self._as_sure_as_of_shots(self.trained)
        self._changed()

    # Parts

    @property
    def _few_shot_method(self) -> str:
        """Method of classes of few shots."""
        return "mean" if getattr(self.rows.model, "prior_strength", None) == math.inf else "fit"

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

    def _standardize(self) -> bool:
        """Learn the statistics of the features from the first images, again when there are twice as many.

        Returns:
            (bool): Whether they have changed.
        """
        keys = list(self.project.images)
        if not (self.rows.per_level and keys):
            return False
        sample = tuple(keys[: min(2 ** int(math.log2(len(keys))), STATISTICS)])
        changed = sample != self._statistics
        if changed:
            standardize(self.rows, self._blank(sample), self.imgsz, CHUNK, [View()])
            self._statistics = sample
        return changed

    def _support(self, images: Iterable[tuple[LabeledImage, Sequence[Box]]]) -> Support:
        """Return images and boxes as a support set, with a class of its own for each box of an image."""
        labels: list[dict[str, Any]] = []
        for image, boxes in images:
            corners = np.array([x.xyxy for x in boxes], np.float32).reshape(-1, 4)
            center, side = (corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]
            labels.append(
                {
                    "im_file": str(self.project.path(image)),
                    "shape": image.size[::-1],
                    "cls": np.arange(len(boxes), dtype=np.float32)[:, None],
                    "bboxes": np.concatenate([center, side], 1),
                    "segments": [],
                    "keypoints": None,
                    "normalized": True,
                    "bbox_format": "xywh",
                }
            )
        names = {i: str(i) for i in range(max((len(x["cls"]) for x in labels), default=0))}
        return Support(names, labels, False, self.project.folder)

    def _blank(self, keys: Iterable[str]) -> Support:
        """Return images without boxes."""
        return self._support((self.project.images[k], ()) for k in keys)

    def _see(self, keys: Sequence[str]) -> dict[str, Scene]:
        """Return the scenes of images, reading those that are not kept, and what the detector's own classes find."""
        new = [k for k in keys if k not in self._scenes or self._scenes[k].statistics != self._statistics]
        scenes = {k: self._scenes[k] for k in keys if k not in new}
        if new:
            rows: Any = _Watched(self.rows, [i for i, n in self.rows.model.names.items() if str(n) in self.own])
            seen = extract(rows, self._blank(new), self.imgsz, CHUNK, [View()], WHOLE, desc="Reading images")
            rivals = torch.cat(rows.best)
            for i, key in enumerate(new):
                scenes[key] = scene = self._scene(seen, i, rivals[i], self.project.images[key])
                self._scenes.pop(key, None)
                if sum(x.size for x in self._scenes.values()) + scene.size <= MAX_KEPT:
                    self._scenes[key] = scene
        unknown = [k for k in keys if k not in self.known]
        if unknown:
            self.known |= dict(zip(unknown, self._predict(self.yolo, unknown, set())))
        return scenes

    def _scene(self, seen: Features, i: int, rival: torch.Tensor, image: LabeledImage) -> Scene:
        """Return the i-th image of some features as a scene."""
        anchors = [select(a, a.image == i) for a in seen.anchors]
        anchors = [a._replace(image=torch.zeros_like(a.image)) for a in anchors]
        one = seen._replace(files=seen.files[i : i + 1], anchors=anchors)
        return Scene(one, _in_image(anchors[0].boxes, image.size, self.imgsz), rival, self._statistics)

    def _predict(self, yolo: FewShotYOLO, keys: Sequence[str], new: set[str]) -> list[list[Found]]:
        """Return what a model finds in images; classes outside of `new` are its own."""
        found = []
        for key in keys:
            file = self.project.path(self.project.images[key])
            result = yolo.predict(
                str(file), imgsz=self.imgsz, conf=0.05, device=self.device, verbose=False, save=False, max_det=MAX_FOUND
            )[0]
            boxes = result.boxes if result.obb is None else result.obb
            corners = boxes.xyxy.cpu() / torch.tensor(result.orig_shape[::-1]).repeat(2)
            names = [str(result.names[int(c)]) for c in boxes.cls.tolist()]
            rows = zip(names, boxes.conf.tolist(), corners.clamp(0, 1).tolist())
            found.append([Found(n, c, tuple(b), n not in new) for n, c, b in rows])
        return found

    def _gather(self) -> tuple[Features, list[str], torch.Tensor, list[int]] | None:
        """Return the features of all that the user said, class names, class of every object, and numbers of the boxes.

        Returns:
            features (Features): Features, with negatives.
            names (list[str]): Names of the n classes with a box.
            labels (torch.Tensor): Class of every object, (N,) int64 in 0..n-1, or -1 if no anchor belongs to it.
            numbers (list[int]): Number of the box of every object.
        """
        with self.project.lock:
            names, images = self.project.names, list(self.project.images.values())
            images = [LabeledImage(p.file, p.name, p.size, list(p.boxes), list(p.rejected), p.empty) for p in images]
        labeled = [p for p in images if p.boxes]
        if not labeled:
            return None
        parts = [self._shots_of(p) for p in labeled]
        negatives = [p for p in images if p.rejected and not p.empty]
        scenes = self._see([p.key for p in images if p.empty or p.rejected])
        parts += [_only(scenes[p.key], _rejected(scenes[p.key], p)) for p in negatives]
        features = _join(parts)
        boxes = [x for p in labeled for x in p.boxes]
        features = features._replace(cls=torch.tensor([names.index(x.name) for x in boxes]))
        empty = [scenes[p.key].features for p in images if p.empty]
        if empty:
            features = add_background(features, _join(empty))
        names, labels = compact(features, dict(enumerate(names)))
        return features, names, labels, [x.id for x in boxes]

    def _shots_of(self, image: LabeledImage) -> Features:
        """Return the features of an image with labels."""
        depends = (tuple(x.xyxy for x in image.boxes), self._statistics)
        kept = self._shots.get(image.key)
        if kept is None or kept[0] != depends:
            width = max(1, self.rows.spaces()[0].zeros(1)[0].shape[-1])
            keep = ANCHORS_PER_VIEW * len(self.views) * width
            support = self._support([(image, image.boxes)])
            kept = depends, extract(self.rows, support, self.imgsz, 1, self.views, keep, desc="Enrolling")
            self._shots[image.key] = kept
        return kept[1]

    def _independent(self, features: Features, labels: torch.Tensor, n: int) -> torch.Tensor:
        """Return the number of shots of every class that count as independent, as `Examples.shots`."""
        shown = labels >= 0
        pairs = torch.stack([labels[shown], features.image[shown]])
        pairs = pairs.unique(dim=1) if self.rows.per_level else pairs
        return torch.bincount(pairs[0], minlength=n)

    def _replayed(self, features: Features, names: list[str]) -> Features:
        """Return features with the replay buffer of the model, without anchors of the classes that are learned."""
        indices = {str(n): i for i, n in self.rows.model.names.items()}
        return add_replay(features, self.rows, [indices[n] for n in names if n in indices])

    def _fit(self, features: Features, names: list[str], labels: torch.Tensor) -> Learned:
        """Learn the classes that the detector was not trained on."""
        counts = torch.bincount(labels[labels >= 0], minlength=len(names))
        methods = [self._methods.get(n, self._few_shot_method) for n in names]
        independent = self._independent(features, labels, len(names))
        features = self._replayed(features, names)
        weights = [classifiers(features, labels, methods, independent, i, s) for i, s in enumerate(self.rows.spaces())]
        new = [c for c, n in enumerate(names) if n not in self.own and counts[c]]
        return Learned(
            [names[c] for c in new],
            [int(counts[c]) for c in new],
            [methods[c] for c in new],
            [(vectors[new], offsets[new]) for vectors, offsets in weights],
            [n for c, n in enumerate(names) if n not in self.own and not counts[c]],
        )

    def _as_sure_as_of_shots(self, found: dict[str, list[Found]]) -> dict[str, float]:
        """Return half the median confidence of the shots of every class, at most Ultralytics' default threshold."""
        sure: dict[str, list[float]] = {}
        for key, image in list(self.project.images.items()):
            for box in list(image.boxes):
                same = [x for x in found.get(key, []) if x.name == box.name]
                same = [x for x in same if iou(x.xyxy, box.xyxy) >= IOU_SAME]
                sure.setdefault(box.name, []).append(max((x.conf for x in same), default=0.0))
        return {n: round(min(max(float(np.median(x)) / 2, 2 * CONF_MIN), CONF), 3) for n, x in sure.items()}

    def _detect(self, scene: Scene) -> list[Found]:
        """Find the learned classes in a scene."""
        learned = self.learned
        if learned is None or not learned.names:
            return []
        anchors, space = scene.features.anchors[0], self.rows.spaces()[0]
        scores, cls = space.logits(anchors.embeds, anchors.level, *learned.weights[0]).sigmoid().max(1)
        a = ((scores > CONF_MIN) & (scores >= scene.rival)).nonzero()[:, 0]  # as in Ultralytics, the best class alone
        conf, c, boxes = scores[a], cls[a], scene.boxes[a]
        if self.rows.branches[0]:  # the one-to-one branch has no double detections
            best = conf.argsort(descending=True)
        else:
            best = batched_nms(anchors.boxes[a], conf, c, IOU_NMS)
        best = best[:MAX_FOUND]
        rows = zip(c[best].tolist(), conf[best].tolist(), boxes[best].tolist())
        return [Found(learned.names[i], p, tuple(b), False) for i, p, b in rows]


class _Watched:
    """Class rows of which all anchors are kept, and that note the largest score of some classes at every anchor.

    Attributes:
        best (list[torch.Tensor]): Of every batch in the predicting branch, (B, A).
    """

    anchors_per_view = float("inf")

    def __init__(self, rows: ClassRows, classes: list[int]):
        """Initialize the rows."""
        self.best: list[torch.Tensor] = []
        self._rows, self._classes = rows, classes

    def __getattr__(self, name: str) -> Any:
        """Return what the rows have."""
        return getattr(self._rows, name)

    def predict(self, img: torch.Tensor) -> list[dict[str, Any]]:
        """Predict, see `ClassRows.predict`."""
        predictions = self._rows.predict(img)
        scores = predictions[0]["scores"][:, self._classes].float().sigmoid().cpu()
        self.best.append(scores.amax(1) if self._classes else torch.zeros(len(scores), scores.shape[2]))
        return predictions


def _uncertainty(conf: float, threshold: float) -> float:
    """Return 1 for a confidence at the threshold, down to 0 for one that leaves no doubt."""
    conf, threshold = (min(max(x, 1e-4), 1 - 1e-4) for x in (conf, threshold))
    odds = conf / (1 - conf) * (1 - threshold) / threshold
    return 1 - abs(odds - 1) / (odds + 1)


def _likeness(sim_own: torch.Tensor, of_class: torch.Tensor) -> float | None:
    """Return the mean similarity of the shots of a class to each other."""
    values = sim_own[of_class]
    return None if not len(values) or bool(values.isnan().all()) else float(values.nanmean())


def _of_class(detections: Detections, c: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Return confidences, hits and number of objects of one class."""
    own = detections.cls == c
    return detections.conf[own], detections.tp[own], int(detections.n_gt[c])


def _in_image(boxes: torch.Tensor, size: tuple[int, int], imgsz: int) -> torch.Tensor:
    """Return boxes in pixels of the square that the detector sees as corners in 0..1 of the image."""
    ratio = imgsz / max(size)
    w, h = (min(math.ceil(x * ratio), imgsz) for x in size)
    left, top = (round((imgsz - x) / 2 - 0.1) for x in (w, h))  # as in Ultralytics' LetterBox
    shift, scale = boxes.new_tensor([left, top]).repeat(2), boxes.new_tensor([w, h]).repeat(2)
    return ((boxes - shift) / scale).clamp(0, 1)


def _rejected(scene: Scene, image: LabeledImage) -> torch.Tensor:
    """Return the anchors of what the user rejected, except where there is a labeled object, (A,) bool per branch."""
    corners = torch.tensor([x.xyxy for x in image.rejected])
    chosen = (box_iou(scene.boxes, corners) >= IOU_SAME).any(1)
    if image.boxes:
        chosen &= ~(box_iou(scene.boxes, torch.tensor([x.xyxy for x in image.boxes])) >= IOU_SAME).any(1)
    return chosen


def _only(scene: Scene, chosen: torch.Tensor) -> Features:
    """Return some anchors of a scene as hard negatives, i.e. features of an image without objects."""
    anchors = [select(a, chosen) for a in scene.features.anchors]
    return scene.features._replace(anchors=[a._replace(weight=torch.full_like(a.weight, REJECTED)) for a in anchors])


def _join(parts: Sequence[Features]) -> Features:
    """Join the features of images."""
    anchors: list[list[Anchors]] = [[] for _ in parts[0].anchors]
    images: list[torch.Tensor] = []
    files: list[str] = []
    objects = 0
    for part in parts:
        for joined, a in zip(anchors, part.anchors):
            moved = torch.where(a.objects < 0, -1, a.objects + objects)
            joined.append(a._replace(objects=moved, image=a.image + len(files)))
        images.append(part.image + len(files))
        files += part.files
        objects += len(part.cls)
    return Features(
        torch.cat([x.cls for x in parts]),
        torch.cat([x.boxes for x in parts]),
        torch.cat(images),
        files,
        [torch.cat(x) for x in zip(*(p.embeds for p in parts))],
        [Anchors(*map(torch.cat, zip(*x))) for x in anchors],
        parts[0].views,
    )
