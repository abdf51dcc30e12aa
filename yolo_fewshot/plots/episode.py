"""Plot of an episode: support objects on the left, query images on the right, one row per class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from ultralytics.utils.ops import xywh2xyxy
from ultralytics.utils.plotting import Annotator, colors

from yolo_fewshot.files import AtomicPath

CELL = 320  # longer side of an image in the table, pixels
ROWS = 16  # maximum number of classes drawn
GAP, HEADER = 12, 28  # pixels between support and query images, and above them

Boxes = list[tuple[list[float], int, str]]  # corners in pixels of the image, class, text


def plot_episode(
    batch: dict[str, Any], names: dict[int, str], file: Path, detections: list[torch.Tensor] | None = None
) -> None:
    """Draw an episode as the model sees it.

    A support image shows the objects of the class that it was drawn for; a query image shows all labeled objects, or
    its detections.

    Args:
        batch (dict): Preprocessed episode with `img` (B, C, H, W) float in 0..1, `cls`, `bboxes` (x, y, w, h in 0..1),
            `batch_idx`, `support` (B,) bool and `way` (B,), the class that each image was drawn for.
        names (dict[int, str]): Class names.
        file (Path): Image to write.
        detections (list[torch.Tensor], optional): Detections of each query image, (n, 6): corners in pixels,
            confidence, class. They are drawn instead of the labels.
    """
    support, way = batch["support"].cpu(), batch["way"].cpu()
    queries = (~support).nonzero()[:, 0].tolist()
    rows = []
    for c in list(dict.fromkeys(way[support].tolist()))[:ROWS]:
        left = [_cell(batch, i, _labels(batch, names, i, c)) for i in (support & (way == c)).nonzero()[:, 0].tolist()]
        right = []
        for i in (~support & (way == c)).nonzero()[:, 0].tolist():
            found = None if detections is None else detections[queries.index(i)]
            right.append(_cell(batch, i, _labels(batch, names, i) if found is None else _detections(found, names)))
        rows.append((left, right))
    file = AtomicPath(file)
    table = _table(rows, "query" if detections is None else "detected in query")
    file.write_bytes(cv2.imencode(".jpg", table)[1].tobytes())


def _labels(batch: dict[str, Any], names: dict[int, str], image: int, only: int | None = None) -> Boxes:
    """Return the labeled objects of an image, or those of one class."""
    mask = batch["batch_idx"].cpu().view(-1) == image
    cls, size = batch["cls"].cpu().view(-1)[mask].int(), torch.tensor(batch["img"].shape[:1:-1]).repeat(2)
    corners = xywh2xyxy(batch["bboxes"].cpu()[mask].float()) * size
    objects = zip(corners.tolist(), cls.tolist())
    return [(box, c, names.get(c, "ignored")) for box, c in objects if only is None or c == only]


def _detections(detections: torch.Tensor, names: dict[int, str]) -> Boxes:
    """Return the detections of an image."""
    return [(x[:4], int(x[5]), f"{names[int(x[5])]} {x[4]:.2f}") for x in detections.cpu().float().tolist()]


def _cell(batch: dict[str, Any], image: int, boxes: Boxes) -> np.ndarray:
    """Return an image with its boxes, (h, w, 3) uint8, BGR."""
    img = batch["img"][image].cpu().float()
    c = len(img)
    img = img.expand(3, -1, -1) if c == 1 else F.pad(img, (0, 0, 0, 0, 0, max(3 - c, 0)))[:3]  # as in plot_images
    img = (img * 255).byte().permute(1, 2, 0).numpy()
    scale = CELL / max(img.shape[:2])
    img = cv2.resize(img[..., ::-1], None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    annotator = Annotator(np.ascontiguousarray(img), line_width=2)
    for corners, c, text in boxes:
        annotator.box_label([x * scale for x in corners], text, colors(c, True))
    return annotator.result()


def _table(rows: list[tuple[list[np.ndarray], list[np.ndarray]]], title: str) -> np.ndarray:
    """Return the rows of cells as one image; shorter rows end in white."""
    h, w = rows[0][0][0].shape[:2]
    n_support, n_query = (max(len(row[side]) for row in rows) for side in (0, 1))
    table = np.full((HEADER + len(rows) * h, (n_support + n_query) * w + GAP, 3), 255, np.uint8)
    middle = n_support * w + GAP
    for text, x in (("support", 0), (title, middle)):
        cv2.putText(table, text, (x + 6, HEADER - 9), cv2.FONT_HERSHEY_SIMPLEX, 0.6, (0, 0, 0), 1, cv2.LINE_AA)
    for r, (left, right) in enumerate(rows):
        for start, cells in ((0, left), (middle, right)):
            for i, cell in enumerate(cells):
                table[HEADER + r * h : HEADER + (r + 1) * h, start + i * w : start + (i + 1) * w] = cell
    return table
