"""Reading of YOLO label files, as Ultralytics reads them for training."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from ultralytics.data import utils


class ImageLabels(NamedTuple):
    """An image and its label file, as read by Ultralytics.

    Attributes:
        boxes (np.ndarray): Class, x, y, w, h of every object, normalized, (n, 5) float32; empty with an error.
        shape (tuple[int, int]): Height and width of the image in pixels; zeros with an error.
        found (bool): Whether the label file exists; without one the image is background.
        error (str): Why training leaves the image out; empty if it does not.
        note (str): What Ultralytics corrected; empty if nothing.
    """

    boxes: np.ndarray
    shape: tuple[int, int]
    found: bool
    error: str
    note: str


def read_labels(file: str, label_file: str, nc: int, kpt_shape: tuple[int, int] = (0, 0)) -> ImageLabels:
    """Read and check one image and its label file.

    Args:
        file (str): Image file.
        label_file (str): Its label file, empty for none.
        nc (int): Number of classes.
        kpt_shape (tuple[int, int]): Keypoints per object and their dimensions, which are dropped; zeros for none.

    Returns:
        (ImageLabels): Boxes and shape, or the error.
    """
    task = (file, label_file, "", False, nc, *kpt_shape, False)  # no prefix, boxes, all classes
    valid, boxes, shape, _, _, _, found, _, _, message = utils.verify_image_label(task)
    message = message.removeprefix(f"{file}: ").removeprefix("ignoring corrupt image/label: ")
    if "pi_heif" in message:  # the package that Ultralytics tries last
        message = "not an image that can be read (for HEIF images, install pi-heif)"
    if not valid:
        return ImageLabels(np.zeros((0, 5), np.float32), (0, 0), bool(found), message, "")
    return ImageLabels(boxes, shape, bool(found), "", message)
