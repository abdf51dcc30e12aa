"""Validation that keeps the boxes, labels and matches of every image, from which all figures are computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionValidator
from ultralytics.utils import ops
from ultralytics.utils.metrics import ap_per_class
from ultralytics.utils.torch_utils import select_device

from yolo_fewshot.evaluate.validator import MatchesByName


class Recorded(NamedTuple):
    """Labels and detections of an image; classes are indices of the measured names, or their number for all others.

    Attributes:
        file (str): Image file.
        shape (tuple[int, int]): Height and width in pixels.
        boxes (np.ndarray): Labeled boxes, x1, y1, x2, y2 in pixels, (n, 4) float32.
        classes (np.ndarray): Their classes, (n,) int64.
        found (np.ndarray): Detected boxes, x1, y1, x2, y2 in pixels, (m, 4) float32.
        found_classes (np.ndarray): Their classes, (m,) int64.
        scores (np.ndarray): Their scores, (m,) float32.
        hits (np.ndarray): Whether each is a true positive at each IoU threshold from 0.5 to 0.95, (m, 10) bool.
    """

    file: str
    shape: tuple[int, int]
    boxes: np.ndarray
    classes: np.ndarray
    found: np.ndarray
    found_classes: np.ndarray
    scores: np.ndarray
    hits: np.ndarray


class Recorder(MatchesByName, DetectionValidator):
    """Ultralytics' validator, with the classes of labels and model replaced by indices of the measured names.

    A labeled class that the model does not know has no detection, so that its AP is 0.

    Attributes:
        images (list[Recorded]): One for each image.
    """

    def __init__(self, measured: tuple[str, ...], **kwargs: Any):
        """Initialize the validator.

        Args:
            measured (tuple[str, ...]): Names of the measured classes.
            **kwargs (Any): Ultralytics' arguments.
        """
        super().__init__(**kwargs)
        self.measured = {n: i for i, n in enumerate(measured)}
        self.images: list[Recorded] = []

    def init_metrics(self, model: nn.Module) -> None:
        """Match the classes of labels and model to the measured ones before the first batch.

        Args:
            model (nn.Module): Model to validate.
        """
        DetectionValidator.init_metrics(self, model)
        self.is_coco = self.is_lvis = self.args.save_json = False  # set by the name of the folder
        names = self.data["names"]
        self.class_index = self._places(names)
        self._places_of_model = self._places(self.names)
        self.metrics.names = dict(enumerate((*self.measured, "others")))

    def _places(self, names: dict[int, str]) -> torch.Tensor:
        """Return the measured class of every class, (n,) int64."""
        listed = [self.measured.get(str(names[i]), len(self.measured)) for i in range(len(names))]
        return torch.tensor(listed, device=self.device)

    def _prepare_pred(self, pred: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the detections with measured classes."""
        return {**pred, "cls": self._places_of_model[pred["cls"].long()].to(pred["cls"])}

    def _process_batch(self, preds: dict[str, torch.Tensor], batch: dict[str, Any]) -> dict[str, np.ndarray]:
        """Match the detections of an image to its labels as Ultralytics does, and keep both."""
        result = super()._process_batch(preds, batch)
        boxes = ops.scale_boxes(batch["imgsz"], batch["bboxes"].clone(), batch["ori_shape"], batch["ratio_pad"])
        found = self.scale_preds(preds, batch)["bboxes"]
        boxes, classes, found, found_classes, scores = (
            x.float().cpu().numpy() for x in (boxes, batch["cls"], found, preds["cls"], preds["conf"])
        )
        of = classes.astype(int), found, found_classes.astype(int), scores
        self.images.append(Recorded(batch["im_file"], tuple(batch["ori_shape"]), boxes, *of, hits=result["tp"]))
        return result

    def print_results(self) -> None:
        """Print nothing, since the mean over all classes and others is no figure of the protocol."""


def record(
    yolo: YOLO, data: str | Path, measured: tuple[str, ...], folder: Path, **keys: Any
) -> tuple[list[Recorded], float]:
    """Validate a model, and return what it detects in each image.

    On a CUDA GPU there are batches of 32 images, elsewhere the images are taken one by one: Ultralytics' NMS has a time
    limit for a batch, after which it drops the detections of the remaining images.

    Args:
        yolo (YOLO): Model.
        data (str | Path): data.yaml, whose val split is used.
        measured (tuple[str, ...]): Names of the measured classes, without repetition.
        folder (Path): Folder that Ultralytics may write to.
        **keys (Any): Further arguments of validation.

    Returns:
        images (list[Recorded]): One for each image.
        ms (float): Milliseconds of inference per image, that of a batch divided by its images, without reading,
            preprocessing and NMS.
    """
    made: list[Recorder] = []

    def build(**kwargs: Any) -> Recorder:
        made.append(Recorder(measured, **kwargs))
        return made[0]

    batch = 32 if select_device(keys.get("device"), verbose=False).type == "cuda" else 1
    run = {"project": str(folder), "name": "val", "exist_ok": True, "single_cls": False, "batch": batch}
    yolo.val(validator=build, data=str(data), plots=False, verbose=False, **run, **keys)
    return made[0].images, float(made[0].speed["inference"])


def mean_ap(images: list[Recorded], classes: range) -> tuple[float, float]:
    """Return Ultralytics' AP50 and AP50-95, the means over the labeled ones of some classes.

    Args:
        images (list[Recorded]): Images.
        classes (range): Classes.

    Returns:
        ap50 (float): AP at IoU 0.5; NaN if none of the classes has a label.
        ap (float): Mean of the AP at IoU 0.5 to 0.95.
    """
    columns = [(x.hits, x.scores, x.found_classes, x.classes) for x in images]
    if not any(len(x.classes) for x in images):
        return float("nan"), float("nan")
    results = ap_per_class(*(np.concatenate(x) for x in zip(*columns)))
    ap = results[5][np.isin(results[6], classes)]
    return (float(ap[:, 0].mean()), float(ap.mean())) if len(ap) else (float("nan"), float("nan"))
