"""Meta-validation: base classes that are kept out of training, and enrolled after every epoch to measure the model."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import random
import time
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from ultralytics.data.build import build_dataloader
from ultralytics.engine.validator import BaseValidator
from ultralytics.nn.distill_model import DistillationModel
from ultralytics.utils import LOGGER, colorstr
from ultralytics.utils.metrics import box_iou
from ultralytics.utils.nms import non_max_suppression
from ultralytics.utils.ops import xywh2xyxy

from yolo_fewshot.class_names import repeated
from yolo_fewshot.data.ignore import ignore_folder
from yolo_fewshot.data.support import Support, SupportDataset
from yolo_fewshot.enroll.calibrate import choose_prior_strength
from yolo_fewshot.enroll.detection import IOU_NMS, IOU_TP, MAX_DET, Detections, ap50
from yolo_fewshot.enroll.enroll import enroll
from yolo_fewshot.enroll.replay import fill_replay_buffer
from yolo_fewshot.errors import few
from yolo_fewshot.files import AtomicPath
from yolo_fewshot.nn.model import FewShotDetectionModel

PREFIX = colorstr("Meta-validation:")
SHOTS = (1, 5)  # images per class that the kept-out classes are enrolled from
COLUMNS = {k: f"metrics/meta_AP50_{k}" for k in SHOTS}  # of results.csv
MIN_IMAGES = sum(SHOTS)  # of a class in the train split, so that the shots of each number are other images
MIN_CLASSES = 2  # to keep out, and to train
MAX_IMAGES = 200  # val images that are searched after an epoch, which bounds the time
START = "meta_start"  # key of a checkpoint of the model that stage 2 starts from
CONF = 0.001  # minimum confidence, as in Ultralytics' validation


def choose_classes(names: dict[int, str], share: float, seed: int) -> list[str]:
    """Choose the classes to keep out of training; the order of the names has no influence.

    Args:
        names (dict[int, str]): Class names.
        share (float): Share of the classes, 0 to 0.5; at least two are chosen.
        seed (int): Seed of the choice.

    Returns:
        (list[str]): Names, in alphabetical order.

    Raises:
        ValueError: If fewer than two classes would be left to train.
    """
    texts = [str(n) for n in names.values()]
    single = sorted(set(texts).difference(repeated(texts)))  # shots belong to a class by its name
    n = max(round(share * len(texts)), MIN_CLASSES)
    if len(single) < n or len(texts) - n < MIN_CLASSES:
        raise ValueError(
            f"'meta_val={share}' keeps {n} classes out of training, each with a name of its own, and needs at least "
            f"{MIN_CLASSES} others to train. The data has {len(texts)} classes with {len(single)} such names. Use data "
            "with more classes, or leave meta_val= out."
        )
    return sorted(sorted(single, key=lambda x: hashlib.sha256(f"{seed} {x}".encode()).digest())[:n])


class MetaValidation:
    """The kept-out classes of a run: their shots, the images that they are looked for in, and their AP50.

    Attributes:
        share (float): Share of the classes that is kept out.
        classes (dict[int, str]): Kept-out classes by index.
        start (dict[str, float]): Columns of the model that stage 2 starts from; empty in stage 1 and in a resumed run.
        shots (dict[int, Support]): Shots of the kept-out classes by their number; known after `draw`.
        queries (list[dict]): Labels of the images that the classes are looked for in; known after `draw`.
    """

    def __init__(self, data: dict[str, Any], share: float, seed: int):
        """Choose the classes.

        Args:
            data (dict): Checked data.yaml of the run.
            share (float): Share of the classes to keep out.
            seed (int): Seed of the choice and of the drawn images.

        Raises:
            ValueError: If the data has too few classes.
        """
        self.share, self.seed, self._data = share, seed, data
        chosen = choose_classes(data["names"], share, seed)
        self.classes = {i: str(n) for i, n in data["names"].items() if str(n) in chosen}
        self.start: dict[str, float] = {}
        self.shots: dict[int, Support] = {}
        self.queries: list[dict[str, Any]] = []

    @property
    def names(self) -> list[str]:
        """Names of the kept-out classes, in the order of the data."""
        return list(self.classes.values())

    def check_weights(self, weights: Any, source: str) -> None:
        """Warn if the model that training starts from was trained on a kept-out class.

        Args:
            weights (FewShotDetectionModel): The model.
            source (str): Its file.
        """
        held_out = getattr(weights, "held_out", [])
        known = [n for n in self.names if n in map(str, weights.names.values()) and n not in held_out]
        if known:
            LOGGER.warning(
                f"model={source} was trained on {few(known)}, which meta_val={self.share} keeps out here, so that the "
                "AP50 of its start is too good. Train stage 1 with the same meta_val and seed."
            )

    def draw(self, train: list[dict[str, Any]], val: list[dict[str, Any]]) -> None:
        """Draw the shots of the kept-out classes, and the val images that they are looked for in.

        Args:
            train (list[dict]): Labels of the training images with the kept-out classes, as in `YOLODataset.labels`.
            val (list[dict]): Labels of the val images.

        Raises:
            ValueError: If a kept-out class has too few images.
        """
        rng = np.random.default_rng(self.seed)
        pool, shown = (self._showing(x, rng) for x in (train, val))
        counts = {c: [sum(c in _classes(x) for x in images) for images in (pool, shown)] for c in self.classes}
        scarce = [f"{self.classes[c]} ({a} and {b})" for c, (a, b) in counts.items() if a < MIN_IMAGES or not b]
        if scarce:
            raise ValueError(
                f"'meta_val={self.share}' keeps out classes that have too few train and val images: "
                f"{few(scarce)}. It needs {MIN_IMAGES} train images and a val image of each. Label more, set another "
                "seed=, which chooses other classes, or leave meta_val= out."
            )
        names, channels = dict(self._data["names"]), self._data["channels"]
        used: set[str] = set()
        for k in SHOTS:
            labels = self._draw_shots(pool, k, used)
            used |= {x["im_file"] for x in labels}
            if not {c for x in shown if x["im_file"] not in used for c in _classes(x)} >= set(self.classes):
                raise ValueError(
                    f"The val images that show a class that 'meta_val={self.share}' keeps out are also train images, "
                    "and were drawn as shots. Give other val images, or leave meta_val= out."
                )
            self.shots[k] = Support(names, labels, False, Path("shots"), channels, ignore_folder(self._data))
        shown, val = ([x for x in images if x["im_file"] not in used] for images in (shown, val))
        found: list[dict[str, Any]] = []
        seen: set[int] = set()
        for x in shown:  # images that show another class first, so that every class is looked for
            new = bool(_classes(x) - seen)
            found.insert(0 if new else len(found), x)
            seen |= _classes(x)
        found = found[: MAX_IMAGES // 2]
        files = {x["im_file"] for x in shown}
        plain = [self._only_kept_out(val[i]) for i in rng.permutation(len(val)) if val[i]["im_file"] not in files]
        self.queries = [*found, *plain[: len(found)]]
        LOGGER.info(
            f"{PREFIX} {few(self.names, n=20)} are kept out of training, and their {sum(len(x['cls']) for x in pool)} "
            f"objects in {len(pool)} images are ignored. After every epoch they are enrolled from {SHOTS[0]} and "
            f"{SHOTS[1]} shots, and looked for in {len(self.queries)} val images. The mAP of the val split counts them "
            "as missed."
        )

    def measure(
        self, model: FewShotDetectionModel, base: list[dict[str, Any]], val: list[dict[str, Any]], imgsz: int
    ) -> dict[str, float]:
        """Enroll the kept-out classes on a copy of a model, and measure their AP50.

        The model is completed as at the end of a run, by its replay buffer and the prior strength of one shot.

        Args:
            model (FewShotDetectionModel): Model in eval mode; it and the random states stay as they are.
            base (list[dict]): Labels of the training images without the kept-out classes.
            val (list[dict]): Labels of the val images.
            imgsz (int): Image size in pixels.

        Returns:
            (dict[str, float]): AP50 in 0..1 by the columns of results.csv; 0 if the classes cannot be enrolled yet.
        """
        began, found, problem = time.time(), {}, ""
        with _unchanged_random_states(next(model.parameters()).device), _quiet():
            ready = deepcopy(model, {id(getattr(model, "criterion", None)): None}).float().eval()
            ready.args = dict(vars(ready.args)) if isinstance(ready.args, SimpleNamespace) else ready.args
            # An enrolled class is none of the trained ones, whose scores tell which background is hard.
            ready.enrolled = {n: {"shots": 0, "method": "", "conf": None, "replaced": None} for n in self.names}
            ready.memory = fill_replay_buffer(ready, base, imgsz, self.seed)
            ready.prior_strength = None
            for k, column in COLUMNS.items():
                try:
                    if ready.prior_strength is None:
                        ready.prior_strength = choose_prior_strength(ready, base, val, imgsz, self.seed)
                    enrolled = deepcopy(ready)
                    enroll(enrolled, self.shots[k], imgsz)
                    found[column] = self._ap50(enrolled.fuse(verbose=False).eval(), imgsz)
                except (ValueError, RuntimeError) as e:  # no anchor of an untrained model, or numbers beyond float32
                    if isinstance(e, torch.cuda.OutOfMemoryError):
                        raise
                    found[column], problem = 0.0, f" They cannot be enrolled: {e}"
        values = " and ".join(f"{v:.3f} from {k} shot{'s' * (k > 1)}" for k, v in zip(SHOTS, found.values()))
        LOGGER.info(f"{PREFIX} AP50 of the kept-out classes {values} ({time.time() - began:.1f} s).{problem}")
        return found

    def _showing(self, labels: list[dict[str, Any]], rng: np.random.Generator) -> list[dict[str, Any]]:
        """Return the images that show a kept-out class, in random order, with the labels of these classes only."""
        images = (self._only_kept_out(labels[i]) for i in rng.permutation(len(labels)))
        return [x for x in images if len(x["cls"])]

    def _only_kept_out(self, label: dict[str, Any]) -> dict[str, Any]:
        """Return the labels of an image, those of the kept-out classes only, without polygons."""
        keep = np.isin(label["cls"].reshape(-1), list(self.classes))
        return {**label, "cls": label["cls"][keep], "bboxes": label["bboxes"][keep], "segments": []}

    def _draw_shots(self, pool: list[dict[str, Any]], k: int, used: set[str]) -> list[dict[str, Any]]:
        """Return images of which k show each class, preferably those not used before that show no other class."""
        drawn: list[dict[str, Any]] = []
        for c in self.classes:
            have = sum(c in _classes(x) for x in drawn)
            files = {x["im_file"] for x in drawn}
            free = [x for x in pool if c in _classes(x) and x["im_file"] not in files]
            free.sort(key=lambda x: (x["im_file"] in used, len(_classes(x))))
            drawn += free[: max(k - have, 0)]
        return drawn

    @torch.no_grad()
    def _ap50(self, model: Any, imgsz: int) -> float:
        """Return the mean AP50 of the kept-out classes in the val images, with a model that has enrolled them."""
        device, matcher = next(model.parameters()).device, SimpleNamespace(iouv=torch.tensor([IOU_TP]))
        place = torch.full((max(self.classes) + 1,), -1)
        place[list(self.classes)] = torch.arange(len(self.classes))
        support = Support(dict(self._data["names"]), self.queries, False, Path("val"), self._data["channels"])
        loader = build_dataloader(SupportDataset(support, imgsz), batch=16, workers=0, shuffle=False, device=device)
        parts, n_gt = [], torch.zeros(len(self.classes), dtype=torch.long)
        for batch in loader:
            preds = model(batch["img"].to(device).float() / 255)
            end2end = getattr(model.model[-1], "end2end", False)
            size = torch.tensor(batch["img"].shape[:1:-1]).repeat(2)  # width, height, twice
            boxes, image, target = xywh2xyxy(batch["bboxes"]) * size, batch["batch_idx"], batch["cls"].view(-1)
            n_gt += torch.bincount(place[target.long()], minlength=len(n_gt))
            # After a time limit Ultralytics drops the detections of the remaining images.
            limits = {"conf_thres": CONF, "iou_thres": IOU_NMS, "max_det": MAX_DET, "max_time_img": math.inf}
            found = non_max_suppression(preds, **limits, classes=list(self.classes), multi_label=True, end2end=end2end)
            for i, x in enumerate(found):
                x = x.cpu()
                iou = box_iou(boxes[image == i], x[:, :4])
                tp = BaseValidator.match_predictions(matcher, x[:, 5], target[image == i], iou)[:, 0]
                parts.append((place[x[:, 5].long()], x[:, 4], tp))
        cls, conf, tp = map(torch.cat, zip(*parts))
        order = conf.argsort(descending=True, stable=True)
        return ap50(Detections(cls[order], conf[order], tp[order], n_gt))


def student_of(model: Any) -> Any:
    """Return the model that is trained, without the teacher of `distill_model`.

    Args:
        model (FewShotDetectionModel | DistillationModel): Moving average of a run.
    """
    return model.student_model if isinstance(model, DistillationModel) else model


def fitness_of(columns: dict[str, float]) -> float:
    """Return the fitness of an epoch, the mean AP50 over the numbers of shots.

    Args:
        columns (dict[str, float]): Result of `MetaValidation.measure`, or a row of results.csv that has it.
    """
    return sum(columns[c] for c in COLUMNS.values()) / len(COLUMNS)


def write_start(csv: Path, start: dict[str, float]) -> None:
    """Write the first measurement into results.csv, as epoch 0 before the first row, without values of other columns.

    Args:
        csv (Path): The file, with its first row.
        start (dict[str, float]): Result of `MetaValidation.measure` before training.
    """
    header, *rows = csv.read_text(encoding="utf-8").splitlines()
    cells = {"epoch": "0", "time": "0", **{k: f"{v:.6g}" for k, v in start.items()}}
    first = ",".join(cells.get(k, "") for k in header.split(","))
    AtomicPath(csv).write_bytes("".join(f"{x}\n" for x in (header, first, *rows)).encode())


def trained_epochs(results: dict[str, list[float]]) -> dict[str, list[float]]:
    """Return the columns of results.csv without epoch 0, which has a value in some columns only.

    Args:
        results (dict[str, list[float]]): Columns of results.csv.
    """
    rows = [i for i, epoch in enumerate(results.get("epoch", ())) if epoch > 0]
    return {k: [v[i] for i in rows] for k, v in results.items()}


def _classes(label: dict[str, Any]) -> set[int]:
    """Return the classes of an image."""
    return {int(c) for c in label["cls"].flat}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Log errors only, and no progress bars."""
    level = LOGGER.level
    LOGGER.setLevel(logging.ERROR)
    try:
        yield
    finally:
        LOGGER.setLevel(level)


@contextlib.contextmanager
def _unchanged_random_states(device: torch.device) -> Iterator[None]:
    """Restore the random states of the process and of a device on exit."""
    state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(state[0])
        np.random.set_state(state[1])
