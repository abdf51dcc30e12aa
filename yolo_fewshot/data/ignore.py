"""Ignore regions: excluded from positives and negatives."""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import Any

import numpy as np
from ultralytics.data.dataset import YOLODataset
from ultralytics.utils import LOGGER

from yolo_fewshot.nn.ignore import IGNORED


class MaskedDataset(YOLODataset):
    """A `YOLODataset` that also loads ignore regions, and augments them with their image.

    Ignore regions are boxes, read from files of lines `x y w h`, normalized, in a folder beside `labels`, as written by
    `yolo-fewshot split`. The objects of given classes become ignore regions, too, and are no labels any more.

    Attributes:
        ignored (dict[str, np.ndarray]): Ignore regions by image file, (n, 4) float32; only images that have some.
        has_polygons (bool): Whether the labels are polygons.

    Examples:
        >>> dataset = MaskedDataset.of(dataset, "ignore")
    """

    @classmethod
    def of(cls, dataset: YOLODataset, folder: str = "", classes: Collection[int] = ()) -> MaskedDataset:
        """Add ignore regions to a data set, in place, since its mosaic refers to it.

        Args:
            dataset (YOLODataset): Data set.
            folder (str): Name of the folder of ignore regions, empty for none.
            classes (Collection[int]): Classes whose objects become ignore regions.

        Returns:
            (MaskedDataset): The data set.

        Raises:
            ValueError: If a file of ignore regions is malformed.
        """
        dataset.__class__ = cls
        files = [x["im_file"] for x in dataset.labels] if folder else []
        dataset.has_polygons = any(len(x["segments"]) for x in dataset.labels)
        dataset.ignored = {f: b for f, b in zip(files, map(read_boxes, ignore_files(files, folder))) if len(b)}
        if classes:
            dataset.labels = [dataset._hide(x, classes) for x in dataset.labels]
        return dataset

    def _hide(self, label: dict[str, Any], classes: Collection[int]) -> dict[str, Any]:
        """Return the labels of an image without the objects of some classes, whose boxes become ignore regions."""
        hidden = np.isin(label["cls"].reshape(-1), list(classes))
        if not hidden.any():
            return label
        file, boxes, keep = label["im_file"], label["bboxes"][hidden], (~hidden).nonzero()[0]
        self.ignored[file] = np.concatenate([self.ignored.get(file, boxes[:0]), boxes])
        segments = [label["segments"][i] for i in keep] if len(label["segments"]) else label["segments"]
        return {**label, "cls": label["cls"][keep], "bboxes": label["bboxes"][keep], "segments": segments}

    def update_labels_info(self, label: dict[str, Any]) -> dict[str, Any]:
        """Add the ignore regions to the labels, with the class `IGNORED`, then proceed as Ultralytics does.

        Args:
            label (dict): Labels of an image.

        Returns:
            (dict): Labels with instances.
        """
        boxes = self.ignored.get(label["im_file"])
        if boxes is not None:
            # Mosaic needs polygons of all objects or of none.
            if len(label["segments"]) or (self.has_polygons and not len(label["cls"])):
                label["segments"] = [*label["segments"], *_polygons(boxes)]
            label["cls"] = np.concatenate([label["cls"], np.full((len(boxes), 1), IGNORED, np.float32)])
            label["bboxes"] = np.concatenate([label["bboxes"], boxes])
        return super().update_labels_info(label)


def _polygons(boxes: np.ndarray) -> np.ndarray:
    """Return the corners of boxes x, y, w, h, clockwise, (n, 4, 2)."""
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]], boxes.dtype) / 2
    return boxes[:, None, :2] + corners * boxes[:, None, 2:]


def ignore_folder(data: dict[str, Any]) -> str:
    """Return the folder of ignore regions that a data.yaml names, such as `fewshot: {ignore: ignore}`.

    Args:
        data (dict): Content of the data.yaml.

    Returns:
        (str): Name of the folder, empty if there is none.
    """
    section = data.get("fewshot")
    return str(section.get("ignore") or "") if isinstance(section, dict) else ""


def masked(dataset: YOLODataset, data: dict[str, Any], mode: str, classes: Collection[int] = ()) -> YOLODataset:
    """Add the ignore regions to a training set, if its data.yaml names a folder of them or classes are ignored.

    Args:
        dataset (YOLODataset): Data set.
        data (dict): Content of its data.yaml.
        mode (str): 'train' or 'val'; in validation nothing is ignored.
        classes (Collection[int]): Classes whose objects are ignored.

    Returns:
        (YOLODataset): The data set.
    """
    folder = ignore_folder(data)
    return MaskedDataset.of(dataset, folder, classes) if (folder or classes) and mode == "train" else dataset


def has_ignored(dataset: Any) -> bool:
    """Return whether a data set, or one of its parts, has ignore regions.

    Args:
        dataset (Any): A data set, `EpisodicDataset` or `ShotsAndBase`.

    Returns:
        (bool): True if an image has an ignore region.
    """
    parts = getattr(dataset, "parts", None) or [getattr(dataset, "dataset", None)]
    return bool(getattr(dataset, "ignored", None)) or any(has_ignored(x) for x in parts if x is not None)


def fully_labeled(dataset: YOLODataset, warn: bool = True) -> list[dict[str, Any]]:
    """Return the labels of the images without ignore regions, or of all images if each has one.

    Args:
        dataset (YOLODataset): Data set.
        warn (bool): Whether to warn if each has one.

    Returns:
        (list[dict]): Labels.
    """
    ignored = getattr(dataset, "ignored", {})
    found = [x for x in dataset.labels if x["im_file"] not in ignored]
    if warn and not found and dataset.labels:
        LOGGER.warning(
            "Every image has ignore regions, so that unlabeled objects are background in the replay buffer. Add images "
            "without them."
        )
    return found or dataset.labels


def ignore_files(files: list[str], folder: str) -> list[str]:
    """Return the files of ignore regions of images, by the rule for label files; "" for images outside of 'images'."""
    images, there = f"{os.sep}images{os.sep}", f"{os.sep}{folder}{os.sep}"
    return [os.path.splitext(there.join(x.rsplit(images, 1)))[0] + ".txt" if images in x else "" for x in files]


def read_boxes(file: str) -> np.ndarray:
    """Read the boxes of a file, (n, 4) float32; none if the file does not exist."""
    if not os.path.isfile(file):
        return np.zeros((0, 4), np.float32)
    with open(file, encoding="utf-8") as f:
        rows = [x.split() for x in f if x.strip()]
    try:
        return np.array(rows, dtype=np.float32).reshape(len(rows), 4)
    except ValueError as e:
        raise ValueError(f"{file} must have lines of four numbers, x y w h of a box to ignore.") from e
