"""Objects that an image shows but that are not labeled there: training neither learns nor punishes them."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from ultralytics.data.dataset import YOLODataset

from yolo_fewshot.nn.ignore import IGNORED


class MaskedDataset(YOLODataset):
    """A `YOLODataset` that also loads boxes to ignore, so that they are augmented with their image.

    They come from files of lines `x y w h`, normalized, in a folder beside `labels`, as `yolo-fewshot split` writes.

    Attributes:
        ignored (dict[str, np.ndarray]): Boxes to ignore by image file, (n, 4) float32; only images that have some.
        outlined (bool): Whether its labels are polygons.

    Examples:
        >>> dataset = MaskedDataset.of(dataset, "ignore")
    """

    @classmethod
    def of(cls, dataset: YOLODataset, folder: str) -> MaskedDataset:
        """Turn a data set into one with boxes to ignore, in place, since its mosaic refers to it.

        Args:
            dataset (YOLODataset): Data set.
            folder (str): Name of the folder of boxes to ignore.

        Returns:
            (MaskedDataset): The data set.

        Raises:
            ValueError: If a file of boxes to ignore is malformed.
        """
        dataset.__class__ = cls
        files = [x["im_file"] for x in dataset.labels]
        dataset.outlined = any(len(x["segments"]) for x in dataset.labels)
        dataset.ignored = {f: b for f, b in zip(files, map(_read_boxes, ignore_files(files, folder))) if len(b)}
        return dataset

    def update_labels_info(self, label: dict[str, Any]) -> dict[str, Any]:
        """Add the boxes to ignore, with the class `IGNORED`, then proceed as Ultralytics does.

        Args:
            label (dict): Labels of an image.

        Returns:
            (dict): Labels with instances.
        """
        boxes = self.ignored.get(label["im_file"])
        if boxes is not None:
            # Mixed images need a polygon of every object or of none.
            if len(label["segments"]) or (self.outlined and not len(label["cls"])):
                label["segments"] = [*label["segments"], *_polygons(boxes)]
            label["cls"] = np.concatenate([label["cls"], np.full((len(boxes), 1), IGNORED, np.float32)])
            label["bboxes"] = np.concatenate([label["bboxes"], boxes])
        return super().update_labels_info(label)


def _polygons(boxes: np.ndarray) -> np.ndarray:
    """Return the corners of boxes x, y, w, h, in turn around each, (n, 4, 2)."""
    turn = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]], boxes.dtype) / 2
    return boxes[:, None, :2] + turn * boxes[:, None, 2:]


def ignore_folder(data: dict[str, Any]) -> str:
    """Return the folder of boxes to ignore that a data.yaml names, such as `fewshot: {ignore: ignore}`.

    Args:
        data (dict): What the data.yaml says.

    Returns:
        (str): Its name, empty if there is none.
    """
    section = data.get("fewshot")
    return str(section.get("ignore") or "") if isinstance(section, dict) else ""


def masked(dataset: YOLODataset, data: dict[str, Any], mode: str) -> YOLODataset:
    """Return a data set to train on with its boxes to ignore, if its data.yaml names a folder of them.

    Args:
        dataset (YOLODataset): Data set.
        data (dict): What its data.yaml says.
        mode (str): 'train', or 'val', where nothing is ignored.

    Returns:
        (YOLODataset): The data set.
    """
    folder = ignore_folder(data)
    return MaskedDataset.of(dataset, folder) if folder and mode == "train" else dataset


def has_ignored(dataset: Any) -> bool:
    """Return whether a data set, or one that it is made of, has boxes to ignore.

    Args:
        dataset (Any): A data set, `EpisodicDataset` or `ShotsAndBase`.

    Returns:
        (bool): True if so.
    """
    parts = getattr(dataset, "parts", None) or [getattr(dataset, "dataset", None)]
    return bool(getattr(dataset, "ignored", None)) or any(has_ignored(x) for x in parts if x is not None)


def fully_labeled(dataset: YOLODataset) -> list[dict[str, Any]]:
    """Return the labels of the images without boxes to ignore, or of all images if each has some.

    Args:
        dataset (YOLODataset): Data set.

    Returns:
        (list[dict]): Labels.
    """
    ignored = getattr(dataset, "ignored", {})
    return [x for x in dataset.labels if x["im_file"] not in ignored] or dataset.labels


def ignore_files(files: list[str], folder: str) -> list[str]:
    """Return the files of boxes to ignore of some images, which lie as label files do; "" outside of 'images'."""
    images, there = f"{os.sep}images{os.sep}", f"{os.sep}{folder}{os.sep}"
    return [os.path.splitext(there.join(x.rsplit(images, 1)))[0] + ".txt" if images in x else "" for x in files]


def _read_boxes(file: str) -> np.ndarray:
    """Return the boxes of a file, (n, 4) float32, none if there is no such file."""
    if not os.path.isfile(file):
        return np.zeros((0, 4), np.float32)
    with open(file, encoding="utf-8") as f:
        rows = [x.split() for x in f if x.strip()]
    try:
        return np.array(rows, dtype=np.float32).reshape(len(rows), 4)
    except ValueError as e:
        raise ValueError(f"{file} must have lines of four numbers, x y w h of a box to ignore.") from e
