"""Boxes drawn over an image as SVG, and what a click on them means."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

from yolo_fewshot.studio.engine import Studio
from yolo_fewshot.studio.found import Found
from yolo_fewshot.studio.project import IOU_SAME, Box, LabeledImage, iou

PALETTE = ("#4f46e5", "#e11d48", "#059669", "#d97706", "#0284c7", "#c026d3", "#65a30d", "#ea580c", "#0d9488", "#7c3aed")
GRAY, RED, GREEN = "#94a3b8", "#dc2626", "#16a34a"
KNOWN = 0.25  # confidence from which the detector's own classes are drawn
TAG = 0.018  # height of a text, in longer sides of the image
BUTTON = 0.016  # radius of a button, in longer sides of the image


class Mark(NamedTuple):
    """A box to draw.

    Attributes:
        kind (str): 'label', 'suspect', 'found', 'known' or 'rejected'.
        text (str): What is written above it, as the user typed it.
        color (str): Color.
        xyxy (tuple[float, float, float, float]): Corners in 0..1.
        source (Box | Found): What it stands for.
    """

    kind: str
    text: str
    color: str
    xyxy: tuple[float, float, float, float]
    source: Box | Found


class Button(NamedTuple):
    """A place to click at.

    Attributes:
        action (str): 'yes', 'no', or 'remove'.
        x (float): Center in pixels of the image.
        y (float): Center in pixels of the image.
        radius (float): Radius in pixels of the image.
        mark (Mark): What it is about.
    """

    action: str
    x: float
    y: float
    radius: float
    mark: Mark


def color_of(name: str, names: Sequence[str]) -> str:
    """Return the color of a class.

    Args:
        name (str): Class name.
        names (Sequence[str]): Names of all classes.
    """
    return PALETTE[names.index(name) % len(PALETTE)] if name in names else GRAY


def marks_of(studio: Studio, key: str, trained: bool = False, known: bool = True, labels: bool = True) -> list[Mark]:
    """Return the boxes to draw over an image, those beneath first.

    Args:
        studio (Studio): The studio.
        key (str): Image.
        trained (bool): Whether to draw what the trained model finds.
        known (bool): Whether to draw the detector's own classes.
        labels (bool): Whether to draw labels and what was rejected, and not what is found there.
    """
    image, names, marks = studio.project.images[key], studio.project.names, []
    if known:
        own = [x for x in studio.known.get(key, []) if x.conf >= KNOWN and x.name not in names]
        own = [x for x in own if not any(iou(x.xyxy, b.xyxy) >= IOU_SAME for b in image.boxes)]
        marks += [Mark("known", f"{x.name} {x.conf:.0%}", GRAY, x.xyxy, x) for x in own]
    if labels:
        marks += [Mark("rejected", f"not {b.name}", GRAY, b.xyxy, b) for b in image.rejected]
    for x in studio.shown(key, trained, judged=not labels):
        if not x.known:
            marks.append(Mark("found", f"{x.name} {x.conf:.0%}", color_of(x.name, names), x.xyxy, x))
    if labels:
        for b in image.boxes:
            kind = "suspect" if b.id in studio.suspects else "label"
            marks.append(Mark(kind, b.name, color_of(b.name, names), b.xyxy, b))
    return marks


def buttons_of(marks: Iterable[Mark], image: LabeledImage) -> list[Button]:
    """Return the buttons of the boxes over an image.

    Args:
        marks (Iterable[Mark]): The boxes.
        image (LabeledImage): The image.
    """
    (w, h), buttons = image.size, []
    radius = BUTTON * max(w, h)
    for mark in marks:
        actions = {"found": ("no", "yes"), "label": ("remove",), "suspect": ("remove",), "rejected": ("remove",)}
        x, y = mark.xyxy[2] * w - radius, mark.xyxy[1] * h - 1.2 * radius
        y = y if y > radius else mark.xyxy[1] * h + 1.2 * radius
        for i, action in enumerate(actions.get(mark.kind, ())):
            buttons.append(Button(action, max(x - i * 2.3 * radius, radius), y, radius, mark))
    return buttons


def hit(x: float, y: float, buttons: Iterable[Button]) -> Button | None:
    """Return the button at a place, the one drawn last.

    Args:
        x (float): Place in pixels of the image.
        y (float): Place in pixels of the image.
        buttons (Iterable[Button]): The buttons.
    """
    at = [b for b in buttons if (b.x - x) ** 2 + (b.y - y) ** 2 <= (1.15 * b.radius) ** 2]
    return at[-1] if at else None


def svg_of(marks: Iterable[Mark], image: LabeledImage, buttons: Iterable[Button] = (), texts: bool = True) -> str:
    """Return boxes and buttons as SVG elements in pixels of the image; all texts are escaped.

    Args:
        marks (Iterable[Mark]): The boxes.
        image (LabeledImage): The image.
        buttons (Iterable[Button]): The buttons.
        texts (bool): Whether to write names.
    """
    (w, h), parts = image.size, []
    line, tag = max(w, h) * (0.0026 if texts else 0.012), TAG * max(w, h)
    for m in marks:
        x1, y1, x2, y2 = m.xyxy[0] * w, m.xyxy[1] * h, m.xyxy[2] * w, m.xyxy[3] * h
        color = RED if m.kind == "suspect" else m.color
        style = {
            "label": f'stroke-width="{line:.2f}" fill="{color}" fill-opacity="0.14"',
            "suspect": f'stroke-width="{2 * line:.2f}" fill="{color}" fill-opacity="0.1"',
            "found": f'stroke-width="{line:.2f}" fill="none" stroke-dasharray="{4 * line:.2f} {2.5 * line:.2f}"',
            "known": f'stroke-width="{0.6 * line:.2f}" fill="none" stroke-opacity="0.9"',
            "rejected": f'stroke-width="{0.6 * line:.2f}" fill="none" stroke-dasharray="{line:.2f} {2 * line:.2f}"',
        }[m.kind]
        parts.append(
            f'<rect class="{m.kind}" x="{x1:.1f}" y="{y1:.1f}" width="{x2 - x1:.1f}" height="{y2 - y1:.1f}" '
            f'rx="{line:.2f}" stroke="{color}" {style}/>'
        )
        if texts:
            quiet = m.kind in {"known", "rejected"}
            size = tag * (0.8 if quiet else 1)
            width, top = (len(m.text) * 0.58 + 0.7) * size, y1 - 1.35 * size
            top = top if top > 0 else y1
            back = f'fill="{"#0f172a" if quiet else color}" fill-opacity="{0.55 if quiet else 0.95}"'
            parts.append(
                f'<rect x="{x1:.1f}" y="{top:.1f}" width="{width:.1f}" height="{1.35 * size:.1f}" '
                f'rx="{0.25 * size:.1f}" {back}/>'
                f'<text x="{x1 + 0.35 * size:.1f}" y="{top + size:.1f}" font-size="{size:.1f}" fill="white" '
                f'font-family="system-ui, sans-serif">{escape(m.text)}</text>'
            )
    for b in buttons:
        color = {"yes": GREEN, "no": RED, "remove": "#475569"}[b.action]
        r = b.radius * 0.42
        lines = {
            "yes": f"M{b.x - r:.1f} {b.y:.1f} l{0.75 * r:.1f} {0.75 * r:.1f} l{1.25 * r:.1f} {-1.5 * r:.1f}",
        }.get(
            b.action, f"M{b.x - r:.1f} {b.y - r:.1f} l{2 * r:.1f} {2 * r:.1f} m0 {-2 * r:.1f} l{-2 * r:.1f} {2 * r:.1f}"
        )
        parts.append(
            f'<circle class="{b.action}" cx="{b.x:.1f}" cy="{b.y:.1f}" r="{b.radius:.1f}" fill="{color}" '
            f'stroke="white" stroke-width="{0.14 * b.radius:.2f}"/>'
            f'<path d="{lines}" stroke="white" stroke-width="{0.28 * b.radius:.2f}" fill="none" '
            'stroke-linecap="round" stroke-linejoin="round"/>'
        )
    return "".join(parts)
