"""Prediction results that draw enrolled classes with dashed boxes and list them in a legend."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import torch
from ultralytics.engine.results import Boxes, Results
from ultralytics.models.yolo.detect import DetectionPredictor
from ultralytics.utils.plotting import Annotator, colors

DASH, GAP = 5, 3  # lengths in line widths
ROWS = 10  # maximum number of classes in the legend
TEXT = 0.7  # height of the legend's text, relative to labels
SMALL = 9  # minimum height of the legend's text, pixels
PLATE, INK, FRAME = (255, 255, 255), (40, 40, 40), (150, 150, 150)  # colors of the legend, BGR


class FewShotResults(Results):
    """Results of a few-shot model: as Ultralytics', except for the plotted image.

    Attributes:
        enrolled (dict[str, int]): Number of shots of every enrolled class, by name.

    Examples:
        >>> result = FewShotYOLO("site-a.pt")("street.jpg")[0]
        >>> result.save("found.jpg")
    """

    def __init__(self, *args: Any, enrolled: dict[str, int] | None = None, **kwargs: Any):
        """Initialize the results.

        Args:
            *args (Any): Ultralytics' arguments.
            enrolled (dict[str, int], optional): Number of shots of every enrolled class, by name.
            **kwargs (Any): Ultralytics' arguments.
        """
        super().__init__(*args, **kwargs)
        self.enrolled = enrolled or {}

    @classmethod
    def of(cls, result: Results, enrolled: dict[str, int]) -> FewShotResults:
        """Convert Ultralytics' results to few-shot results.

        Args:
            result (Results): Results, changed in place.
            enrolled (dict[str, int]): Number of shots of every enrolled class, by name.

        Returns:
            (FewShotResults): The results.
        """
        result.__class__, result.enrolled = cls, enrolled
        return result

    def new(self) -> FewShotResults:
        """Return results of the same image and classes without detections; slices and copies start from it."""
        return self.of(super().new(), self.enrolled)

    def plot(self, *args: Any, **kwargs: Any) -> Any:
        """Draw the results as Ultralytics does, with dashed boxes and a legend for enrolled classes.

        The legend lists the enrolled classes in this image; `labels=False` leaves it out.

        Args:
            *args (Any): Ultralytics' arguments.
            **kwargs (Any): Ultralytics' arguments.

        Returns:
            (np.ndarray | PIL.Image.Image): The image, BGR, or RGB with `pil=True`.
        """
        bound = inspect.signature(super().plot).bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        classes = [] if self.boxes is None else self.boxes.cls.tolist()
        novel = [i for i, c in enumerate(classes) if str(self.names[int(c)]) in self.enrolled]
        if not (novel and given["boxes"]):
            return super().plot(*args, **kwargs)

        # A box of zero size draws its label alone, in the place that Ultralytics gives it.
        labels, data = self[:], torch.as_tensor(self.boxes.data).clone()
        data[novel, 2:4] = data[novel, :2]
        labels.boxes = Boxes(data, self.orig_shape)
        drawn = {**given, "show": False, "save": False}
        solid, image = (np.array(Results.plot(x, **drawn)) for x in (self, labels))
        if given["pil"]:
            solid, image = (np.ascontiguousarray(x[..., ::-1]) for x in (solid, image))

        annotate = functools.partial(Annotator, font=given["font"], pil=given["pil"], example=self.names)
        label = annotate(image, given["line_width"], given["font_size"])
        boxes = self.boxes.xyxy.tolist()
        for i in novel:
            for area in _dashed(boxes[i], label.lw):
                image[area] = solid[area]
        if given["labels"]:
            shown = {c: str(self.names[c]) for c in sorted({int(classes[i]) for i in novel})}
            by_class = given["color_mode"] == "class"
            rows = [(name, self.enrolled[name], colors(c, True) if by_class else INK) for c, name in shown.items()]
            _add_legend(image, rows, np.array(boxes), label, annotate)
        last = {k: given[k] for k in ("pil", "show", "save", "filename")}
        return Results.plot(self.new(), img=image, **last)


class KnowsEnrolled:
    """Mixin of Ultralytics' predictors, whose results know which classes were enrolled."""

    model: Any

    def construct_result(self, *args: Any) -> FewShotResults:
        """Return the results of one image.

        Args:
            *args (Any): Ultralytics' arguments.

        Returns:
            (FewShotResults): The results.
        """
        enrolled = getattr(self.model.model, "enrolled", {})  # the copy that predicts keeps it
        stock: Any = super()
        return FewShotResults.of(stock.construct_result(*args), {n: x["shots"] for n, x in enrolled.items()})


class FewShotPredictor(KnowsEnrolled, DetectionPredictor):
    """Ultralytics' predictor, whose results know which classes were enrolled.

    Examples:
        >>> FewShotYOLO("best.pt").predict("street.jpg", support="shots.yaml")
    """


@functools.cache
def predictor_like(stock: type) -> type:
    """Return the predictor of a task whose results know which classes were enrolled.

    Args:
        stock (type): Ultralytics' predictor of the task.

    Returns:
        (type): `FewShotPredictor` for detection, else a subclass of `stock`.
    """
    return FewShotPredictor if stock is DetectionPredictor else type(stock.__name__, (KnowsEnrolled, stock), {})


def _spans(start: int, end: int, lw: float) -> list[tuple[int, int]]:
    """Return start and end of each dash of a line; dashes lie at both ends, with at least one gap."""
    gaps = max(round(((end - start) / lw - DASH) / (DASH + GAP)), 1)
    unit = (end - start) / (gaps * (DASH + GAP) + DASH)
    begin = [start + unit * (DASH + GAP) * i for i in range(gaps + 1)]
    return [(math.ceil(x), math.floor(x + unit * DASH)) for x in begin]


def _dashed(box: list[float], lw: float) -> list[tuple[slice, slice]]:
    """Return the areas of an image in which the outline of a box is kept, so that it is dashed."""
    reach = int(lw) + 1  # cv2 draws a line around the edge, and PIL inside of it
    spans, bands = [], []  # along x and y
    for low, high in ((int(box[0]), int(box[2])), (int(box[1]), int(box[3]))):
        (_, first), *_, (last, _) = inner = _spans(low, high + 1, lw)
        spans.append([(low - reach, first), *inner[1:-1], (last, high + reach + 1)])
        bands.append([(low - reach, min(low + reach + 1, first)), (max(high - reach, last), high + reach + 1)])
    areas = [(y, x) for y in bands[1] for x in spans[0]] + [(y, x) for y in spans[1] for x in bands[0]]
    return [(slice(max(y1, 0), max(y2, 0)), slice(max(x1, 0), max(x2, 0))) for (y1, y2), (x1, x2) in areas]


def _text_size(annotator: Annotator, text: str) -> tuple[int, int]:
    """Return width and height of a text."""
    if annotator.pil:
        return annotator.font.getsize(text)
    width, height = cv2.getTextSize(text, 0, annotator.sf, annotator.tf)[0]
    return width, height


def _row(name: str, shots: int, width: int, annotator: Annotator) -> str | None:
    """Return the legend's text for a class, shortened to fit the width; None if nothing fits."""
    count = f"{shots} shot{'s' * (shots != 1)}"
    texts = [f"{name}: enrolled, {count}", f"{name}: {count}"]
    texts += [f"{name[:i]}..: {count}" for i in range(len(name) - 1, 0, -1)]
    return next((x for x in texts if _text_size(annotator, x)[0] <= width), None)


def _add_legend(
    image: np.ndarray,
    classes: list[tuple[str, int, tuple[int, int, int]]],
    boxes: np.ndarray,
    label: Annotator,
    annotate: Callable[..., Annotator],
) -> None:
    """Draw the legend into the corner of an image where it hides the least, if a readable one fits.

    Args:
        image (np.ndarray): Image (H, W, 3), BGR, changed in place.
        classes (list[tuple]): Name, number of shots and color of every class.
        boxes (np.ndarray): Corners of the boxes in the image (n, 4).
        label (Annotator): Annotator of the labels there.
        annotate (Callable): Returns an Annotator for an image, a line width and a font size.
    """
    tall, margin = _text_size(label, "Ag")[1], int(label.lw) + 2
    height, width = (x - 2 * margin for x in image.shape[:2])
    size = max(min(round(tall * TEXT), width // 20), SMALL)
    pad, pitch, key = size // 2, round(size * 1.6), 2 * size
    if height < 2 * pitch + pad or width < key + 3 * pad:
        return
    limit, scale = max(min(ROWS, (height // 2 - pad) // pitch), 1), size / tall
    plate = annotate(np.full((height, width, 3), PLATE, np.uint8), 1, label.font.size * scale if label.pil else None)
    if not plate.pil:
        plate.sf, plate.tf = label.sf * scale, max(round(label.tf * scale), 1)
    fitting = (_row(name, shots, width - 3 * pad - key, plate) for name, shots, _ in classes[:limit])
    rows = [x for x in fitting if x is not None]
    if len(rows) < len(classes[:limit]):
        return
    rows += [f"+ {len(classes) - limit} more"] * (len(classes) > limit)
    middle = [pad // 2 + pitch // 2 + pitch * i for i in range(len(rows))]
    for y, text in zip(middle, rows):
        plate.box_label([2 * pad + key, y + size // 2 + 2] * 2, text, PLATE, INK)
    h, w = len(rows) * pitch + pad, max(_text_size(plate, x)[0] for x in rows) + 3 * pad + key
    legend, half = np.array(plate.result()[:h, :w]), max(size // 8, 1)
    for y, (_, _, color) in zip(middle, classes[:limit]):
        for a, b in _spans(pad, pad + key, key / (2 * DASH + GAP)):
            cv2.rectangle(legend, (a, y - half - 1), (b, y + half + 1), FRAME, -1)
            cv2.rectangle(legend, (a + 1, y - half), (b - 1, y + half), color, -1)
    cv2.rectangle(legend, (0, 0), (w - 1, h - 1), FRAME, 1)

    low, high = boxes[:, :2] - [0, tall], boxes[:, 2:]  # with their labels
    corners = [(x, y) for y in (margin + height - h, margin) for x in (margin, margin + width - w)]
    hidden = [(np.minimum(high, np.add(c, (w, h))) - np.maximum(low, c)).clip(0).prod(1).sum() for c in corners]
    x, y = corners[int(np.argmin(hidden))]
    image[y : y + h, x : x + w] = legend
