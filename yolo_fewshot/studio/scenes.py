"""What the network sees of a project: an image once, and the views of one with labels again after they have changed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from yolo_fewshot.data.support import Support
from yolo_fewshot.enroll.features import Features, View, extract, select, standardize
from yolo_fewshot.nn.rows import ClassRows
from yolo_fewshot.studio.project import Box, LabeledImage, Project

CHUNK = 8  # images read at once
STATISTICS = 32  # maximum number of images that the features are standardized with
ANCHORS_PER_VIEW = 512  # background anchors to keep of a view of an image with labels
MAX_KEPT = 2**30  # bytes of features kept; images beyond are read again
WHOLE = 10**12  # values: all anchors are kept


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


class Scenes:
    """The images of a project as the network has seen them, kept as far as the memory allows.

    One thread at a time may let the network see; others may forget images meanwhile.

    Attributes:
        kept (dict[str, Scene]): Scenes by image, also those of earlier statistics.
        statistics (tuple[str, ...]): Images that the features are standardized with.
    """

    def __init__(self, rows: ClassRows, project: Project, imgsz: int, views: list[View]):
        """Start with nothing seen.

        Args:
            rows (ClassRows): Class rows of the network, in eval mode.
            project (Project): Images and labels.
            imgsz (int): Image size in pixels.
            views (list[View]): Views of an image with labels.
        """
        self.kept: dict[str, Scene] = {}
        self.statistics: tuple[str, ...] = ()
        self._rows, self._project, self._imgsz, self._views = rows, project, imgsz, views
        self._shots: dict[str, tuple[Any, Features]] = {}  # by image, with what they depend on

    def standardize(self) -> bool:
        """Learn the statistics of the features from the first images, again when there are twice as many.

        Returns:
            (bool): Whether they have changed.
        """
        keys = list(self._project.images)
        if not (self._rows.per_level and keys):
            return False
        sample = tuple(keys[: min(2 ** int(math.log2(len(keys))), STATISTICS)])
        changed = sample != self.statistics
        if changed:
            standardize(self._rows, self._blank(sample), self._imgsz, CHUNK, [View()])
            self.statistics = sample
        return changed

    def see(self, keys: Sequence[str]) -> dict[str, Scene]:
        """Return the scenes of images, reading those that are not kept.

        Args:
            keys (Sequence[str]): Images.
        """
        new = [k for k in keys if k not in self.kept or self.kept[k].statistics != self.statistics]
        scenes = {k: self.kept[k] for k in keys if k not in new}
        if new:
            rows: Any = _Watched(self._rows)
            seen = extract(rows, self._blank(new), self._imgsz, CHUNK, [View()], WHOLE, desc="Reading images")
            rivals = torch.cat(rows.best)
            for i, key in enumerate(new):
                scenes[key] = scene = self._scene(seen, i, rivals[i], self._project.images[key])
                self.kept.pop(key, None)
                if sum(x.size for x in list(self.kept.values())) + scene.size <= MAX_KEPT:
                    self.kept[key] = scene
        return scenes

    def current(self) -> dict[str, Scene]:
        """Return the scenes that are kept and not outdated by other statistics."""
        return {k: x for k, x in list(self.kept.items()) if x.statistics == self.statistics}

    def shots_of(self, image: LabeledImage) -> Features:
        """Return the features of an image with labels, with a class of its own for each of its boxes.

        Args:
            image (LabeledImage): The image.
        """
        depends = (tuple(x.xyxy for x in image.boxes), self.statistics)
        kept = self._shots.get(image.key)
        if kept is None or kept[0] != depends:
            width = max(1, self._rows.spaces()[0].zeros(1)[0].shape[-1])
            keep = ANCHORS_PER_VIEW * len(self._views) * width
            support = self._support([(image, image.boxes)])
            kept = depends, extract(self._rows, support, self._imgsz, 1, self._views, keep, desc="Enrolling")
            self._shots[image.key] = kept
        return kept[1]

    def forget(self, key: str) -> None:
        """Keep nothing of an image.

        Args:
            key (str): The image.
        """
        self.kept.pop(key, None)
        self._shots.pop(key, None)

    def _scene(self, seen: Features, i: int, rival: torch.Tensor, image: LabeledImage) -> Scene:
        """Return the i-th image of some features as a scene."""
        anchors = [select(a, a.image == i) for a in seen.anchors]
        anchors = [a._replace(image=torch.zeros_like(a.image)) for a in anchors]
        one = seen._replace(files=seen.files[i : i + 1], anchors=anchors)
        return Scene(one, _in_image(anchors[0].boxes, image.size, self._imgsz), rival, self.statistics)

    def _blank(self, keys: Iterable[str]) -> Support:
        """Return images without boxes."""
        return self._support((self._project.images[k], ()) for k in keys)

    def _support(self, images: Iterable[tuple[LabeledImage, Sequence[Box]]]) -> Support:
        """Return images and boxes as a support set, with a class of its own for each box of an image."""
        labels: list[dict[str, Any]] = []
        for image, boxes in images:
            corners = np.array([x.xyxy for x in boxes], np.float32).reshape(-1, 4)
            center, side = (corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]
            labels.append(
                {
                    "im_file": str(self._project.path(image)),
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
        return Support(names, labels, False, self._project.folder)


class _Watched:
    """Class rows of which all anchors are kept, and that note the largest score of the detector's own classes.

    Attributes:
        best (list[torch.Tensor]): At every anchor of every batch in the predicting branch, (B, A).
    """

    anchors_per_view = float("inf")

    def __init__(self, rows: ClassRows):
        """Initialize the rows."""
        self.best: list[torch.Tensor] = []
        self._rows, self._own = rows, [i for i, n in rows.model.names.items() if str(n) not in rows.enrolled]

    def __getattr__(self, name: str) -> Any:
        """Return what the rows have."""
        return getattr(self._rows, name)

    def predict(self, img: torch.Tensor) -> list[dict[str, Any]]:
        """Predict, see `ClassRows.predict`."""
        predictions = self._rows.predict(img)
        scores = predictions[0]["scores"][:, self._own].float().sigmoid().cpu()
        self.best.append(scores.amax(1) if self._own else torch.zeros(len(scores), scores.shape[2]))
        return predictions


def _in_image(boxes: torch.Tensor, size: tuple[int, int], imgsz: int) -> torch.Tensor:
    """Return boxes in pixels of the square that the detector sees as corners in 0..1 of the image."""
    ratio = imgsz / max(size)
    w, h = (min(math.ceil(x * ratio), imgsz) for x in size)
    left, top = (round((imgsz - x) / 2 - 0.1) for x in (w, h))  # as in Ultralytics' LetterBox
    shift, scale = boxes.new_tensor([left, top]).repeat(2), boxes.new_tensor([w, h]).repeat(2)
    return ((boxes - shift) / scale).clamp(0, 1)
