"""Plot of an enrollment: shots in one row per class with their similarity; suspect ones are framed."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from ultralytics.utils import LOGGER
from ultralytics.utils.patches import imread
from ultralytics.utils.plotting import Annotator, colors

from yolo_fewshot.enroll.enroll import Shot, Shots
from yolo_fewshot.errors import few
from yolo_fewshot.files import AtomicPath

FILE = "support_check.png"  # its name in a run folder
ROWS, COLUMNS = 32, 10  # maximum number of classes, and of shots of a class, drawn
CELL, LINE, GAP, FRAME = 120, 16, 12, 4  # side of a shot, height of a line, space between shots, and frame, pixels
LEFT, RIGHT, HEAD, WIDTH = 160, 70, 56, 600  # columns beside the shots, title above them, and minimum width, pixels
ROW = CELL + 2 * LINE + GAP
CONTEXT = 1.6  # side of the part of the image drawn, in longer sides of the box
RED, BLACK, GRAY, PAPER = (0, 0, 255), (0, 0, 0), (110, 110, 110), (230, 230, 230)
TITLE = (
    "Number: similarity to the other shots of the class, at most 1 ('-': no other shot, or no other class).\n"
    "Red frame: suspect, much lower than usual and higher for the class named below. Check the label."
)


class Text(NamedTuple):
    """A text to write.

    Attributes:
        x (int): Left end in pixels.
        y (int): Upper end in pixels.
        text (str): The text.
        color (tuple[int, int, int]): Color, BGR.
        width (int): Width in pixels at which lines are wrapped.
        lines (int): Maximum number of lines.
    """

    x: int
    y: int
    text: str
    color: tuple[int, int, int] = BLACK
    width: int = WIDTH
    lines: int = 2


def plot_support(shots: Shots, names: dict[int, str], file: str | Path) -> bool:
    """Draw the shots of enrolled classes, suspect ones first.

    An error is logged, not raised: an enrollment does not depend on its plot.

    Args:
        shots (Shots): Enrolled shots.
        names (dict[int, str]): Class names of the model.
        file (str | Path): Image to write.

    Returns:
        (bool): Whether it was written.
    """
    file = AtomicPath(file)
    LOGGER.info(f"Plotting support set to {file}... ")
    try:
        table = _table(shots, {str(n): colors(i, True) for i, n in names.items()})
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(cv2.imencode(".png", table)[1].tobytes())
    except Exception as e:
        LOGGER.warning(f"Plotting error for {file}: {e}")
        return False
    return True


def _table(shots: Shots, colors: dict[str, tuple[int, int, int]]) -> np.ndarray:
    """Return the rows of classes as one image, (h, w, 3) uint8, BGR."""
    rows = {n: sorted(row, key=lambda x: not x.suspect) for n, row in shots.objects.items()}
    order = sorted(rows, key=lambda n: not rows[n][0].suspect)
    drawn, rest = order[:ROWS], order[ROWS:]
    longest = max(len(rows[n]) for n in drawn)
    width = LEFT + min(longest, COLUMNS) * (CELL + GAP) + RIGHT * (longest > COLUMNS)
    height = HEAD + len(drawn) * ROW + (2 * LINE + GAP) * bool(rest)
    table = np.full((height, max(width, WIDTH), 3), 255, np.uint8)
    texts = [Text(GAP, GAP, TITLE, GRAY)]
    read = functools.lru_cache(4)(_read)  # an image may contain several shots
    for r, name in enumerate(drawn):
        y, about, more = HEAD + r * ROW, shots.classes[name], len(rows[name]) - COLUMNS
        table[y : y + CELL, GAP : GAP + FRAME] = colors[name]
        conf = "-" if about["conf"] is None else f"{about['conf']:g}"
        count = f"{about['shots']} shot{'s' * (about['shots'] > 1)}"
        label = f"{name}\n{count}, {about['method']}\nconf {conf}"
        texts.append(Text(2 * GAP, y, label, width=LEFT - 3 * GAP, lines=CELL // LINE))
        for i, shot in enumerate(rows[name][:COLUMNS]):
            texts.append(_draw(table, read(shot.file), shot, colors[name], LEFT + i * (CELL + GAP), y))
        if more > 0:
            texts.append(Text(LEFT + COLUMNS * (CELL + GAP), y + CELL // 2, f"+ {more} more", GRAY))
    if rest:
        texts.append(Text(GAP, height - 2 * LINE - GAP, f"Not drawn: {few(rest)}", GRAY))
    return _write(table, texts)


def _read(file: str) -> np.ndarray:
    """Read an image, (h, w, channels) uint8, BGR."""
    img = imread(file)
    if img is None:
        raise FileNotFoundError(f"{file} cannot be read")
    return img


def _draw(table: np.ndarray, img: np.ndarray, shot: Shot, color: tuple[int, int, int], x: int, y: int) -> Text:
    """Draw a shot with some context into the table, and return the text below it."""
    if shot.suspect:
        table[y - FRAME : y + CELL + 2 * LINE + FRAME, x - FRAME : x + CELL + FRAME] = RED
        table[y : y + CELL + 2 * LINE, x : x + CELL] = 255
    size = np.array(img.shape[1::-1])
    low, high = np.array(shot.box).reshape(2, 2) * size
    side = np.minimum(np.ceil(CONTEXT * (high - low).max()), size).astype(int)
    start = np.clip((low + high - side) / 2, 0, size - side).astype(int)
    scale = CELL / side.max()
    interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    (x1, y1), (x2, y2) = start, start + side
    w, h = np.maximum(np.round(side * scale), 1).astype(int).tolist()
    part = cv2.resize(img[y1:y2, x1:x2], (w, h), interpolation=interpolation)
    pen = Annotator(np.ascontiguousarray(part), line_width=2)
    corners = np.clip((np.array([low, high]) - start) * scale, 1, (w - 2, h - 2))
    pen.box_label(corners.ravel().tolist(), "", color)
    cell = table[y : y + CELL, x : x + CELL]
    cell[:] = PAPER
    cell[(CELL - h) // 2 : (CELL - h) // 2 + h, (CELL - w) // 2 : (CELL - w) // 2 + w] = pen.result()
    text = "-" if shot.sim_own is None else f"{shot.sim_own:.2f}"
    if shot.suspect:
        text += f", but {shot.sim_other:.2f} to\n{shot.nearest}"
    return Text(x + 2, y + CELL, text, RED if shot.suspect else BLACK, CELL - 2)


def _write(table: np.ndarray, texts: list[Text]) -> np.ndarray:
    """Return the image with the texts written into it."""
    # matplotlib ships this font, so nothing is downloaded; Ultralytics' font replaces it for names it cannot write.
    pen = Annotator(table, font="DejaVuSans.ttf", font_size=12, pil=True, example="".join(x.text for x in texts))
    for x in texts:
        lines = [part for line in x.text.split("\n") for part in _wrap(line, pen.font, x.width)]
        if len(lines) > x.lines:
            lines[x.lines - 1 :] = [lines[x.lines - 1][:-2] + "…"]
        for i, line in enumerate(lines):
            pen.text([x.x, x.y + i * LINE], line, x.color)
    return pen.result()


def _wrap(line: str, font: Any, width: int) -> list[str]:
    """Wrap a line at a width in pixels."""
    parts = [""]
    for char in line:
        if font.getsize(parts[-1] + char)[0] > width:
            parts.append("")
        parts[-1] += char
    return parts
