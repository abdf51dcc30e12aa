"""Built-in demo data set: glyphs drawn on plain images, in YOLO format, with base and novel classes.

The class of an object is the identity of its glyph alone. Color, size, rotation, perspective, stroke thickness and
background are drawn at random. No class is the mirror image of another, so `fliplr` may take any value.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

BASE = (
    "star", "plus", "arrow", "ring", "crescent", "heart", "gear", "square", "triangle", "semicircle", "lightning",
    "house", "drop", "pie", "spiral", "fish", "key", "tree", "crown", "letter_L", "letter_U", "letter_Z", "letter_H",
    "letter_E",
)  # fmt: skip
NOVEL = ("hourglass", "clover", "umbrella", "flag", "hash", "chevron", "letter_T", "letter_Y")

SIZE = 160  # image side, pixels
GAP = 5  # minimum distance between two boxes, pixels

Part = tuple[str, Sequence[Sequence[float]]]


def _arc(cx: float, cy: float, r: float, start: float = 0, stop: float = 360, end_r: float | None = None) -> list:
    """Sample an arc as (x, y) points, angles in degrees clockwise from the x axis; `end_r` makes it a spiral."""
    angles = np.radians(np.linspace(start, stop, 60))
    radii = np.linspace(r, r if end_r is None else end_r, 60)
    return np.stack((cx + radii * np.cos(angles), cy + radii * np.sin(angles)), 1).tolist()


def _wheel(radii: Sequence[float], repeat: int) -> list:
    """Make a closed polygon whose corner radii repeat around the center, starting at the top."""
    n = len(radii) * repeat
    polar = [(radii[i % len(radii)], 2 * math.pi * i / n - math.pi / 2) for i in range(n)]
    return [(0.5 + r * math.cos(a), 0.5 + r * math.sin(a)) for r, a in polar]


# Each glyph is drawn in the unit square, y down: "fill" and "cut" are closed polygons, "line" is an open stroke.
GLYPHS: dict[str, list[Part]] = {
    "star": [("fill", _wheel((0.5, 0.2), 5))],
    "plus": [("line", [(0.5, 0), (0.5, 1)]), ("line", [(0, 0.5), (1, 0.5)])],
    "arrow": [("line", [(0, 0.5), (0.6, 0.5)]), ("fill", [(0.55, 0.15), (1, 0.5), (0.55, 0.85)])],
    "ring": [("line", _arc(0.5, 0.5, 0.45))],
    "crescent": [("fill", _arc(0.5, 0.5, 0.5, 50, 310) + _arc(0.72, 0.5, 0.4, 288, 72))],
    "heart": [("fill", _arc(0.27, 0.3, 0.25, 145, 350) + _arc(0.73, 0.3, 0.25, 190, 395) + [(0.5, 0.95)])],
    "gear": [("fill", _wheel((0.5, 0.5, 0.34, 0.34), 8)), ("cut", _arc(0.5, 0.5, 0.17))],
    "square": [("fill", [(0.05, 0.05), (0.95, 0.05), (0.95, 0.95), (0.05, 0.95)])],
    "triangle": [("fill", [(0.5, 0.05), (1, 0.9), (0, 0.9)])],
    "semicircle": [("fill", _arc(0.5, 0.75, 0.5, 180, 360))],
    "lightning": [("fill", [(0.55, 0), (0.15, 0.58), (0.45, 0.55), (0.35, 1), (0.85, 0.38), (0.53, 0.42), (0.75, 0)])],
    "house": [
        ("fill", [(0.5, 0), (1, 0.45), (0.85, 0.45), (0.85, 1), (0.15, 1), (0.15, 0.45), (0, 0.45)]),
        ("cut", [(0.36, 1.1), (0.36, 0.6), (0.64, 0.6), (0.64, 1.1)]),
    ],
    "drop": [("fill", [(0.5, 0), *_arc(0.5, 0.67, 0.32, -25, 205)])],
    "pie": [("fill", [(0.5, 0.5), *_arc(0.5, 0.5, 0.5, 38, 322)])],
    "spiral": [("line", _arc(0.5, 0.5, 0.04, 0, 810, 0.5))],
    "fish": [
        ("fill", _arc(0.38, 0.87, 0.59, 227, 313) + _arc(0.38, 0.13, 0.59, 47, 133)),
        ("fill", [(0.7, 0.5), (1, 0.22), (1, 0.78)]),
    ],
    "key": [
        ("line", _arc(0.22, 0.5, 0.2)),
        ("line", [(0.42, 0.5), (1, 0.5), (1, 0.75)]),
        ("line", [(0.76, 0.5), (0.76, 0.72)]),
    ],
    "tree": [
        ("fill", [(0.5, 0), (0.76, 0.32), (0.24, 0.32)]),
        ("fill", [(0.5, 0.2), (0.86, 0.62), (0.14, 0.62)]),
        ("line", [(0.5, 0.6), (0.5, 1)]),
    ],
    "crown": [("fill", [(0, 0.2), (0.27, 0.5), (0.5, 0.1), (0.73, 0.5), (1, 0.2), (0.88, 0.85), (0.12, 0.85)])],
    "letter_L": [("line", [(0.15, 0), (0.15, 1), (0.8, 1)])],
    "letter_U": [("line", [(0.1, 0), (0.1, 0.6), *_arc(0.5, 0.6, 0.4, 180, 0), (0.9, 0)])],
    "letter_Z": [("line", [(0.1, 0), (0.9, 0), (0.1, 1), (0.9, 1)])],
    "letter_H": [("line", [(0.1, 0), (0.1, 1)]), ("line", [(0.9, 0), (0.9, 1)]), ("line", [(0.1, 0.5), (0.9, 0.5)])],
    "letter_E": [("line", [(0.85, 0), (0.15, 0), (0.15, 1), (0.85, 1)]), ("line", [(0.15, 0.5), (0.75, 0.5)])],
    "hourglass": [("fill", [(0.1, 0), (0.9, 0), (0.1, 1), (0.9, 1)])],
    "clover": [
        *(("fill", _arc(x, y, 0.2)) for x, y in ((0.5, 0.22), (0.24, 0.55), (0.76, 0.55))),
        ("line", [(0.5, 0.4), (0.5, 1)]),
    ],
    "umbrella": [
        ("fill", _arc(0.5, 0.5, 0.48, 180, 360)),
        ("line", [(0.5, 0.5), (0.5, 0.87), *_arc(0.62, 0.87, 0.12, 180, 0)]),
    ],
    "flag": [("line", [(0.15, 0), (0.15, 1)]), ("fill", [(0.15, 0.03), (0.9, 0.28), (0.15, 0.53)])],
    "hash": [
        *(("line", [(x, 0), (x, 1)]) for x in (0.28, 0.72)),
        *(("line", [(0, y), (1, y)]) for y in (0.28, 0.72)),
    ],
    "chevron": [("fill", [(0.1, 0), (0.5, 0), (0.9, 0.5), (0.5, 1), (0.1, 1), (0.5, 0.5)])],
    "letter_T": [("line", [(0, 0), (1, 0)]), ("line", [(0.5, 0), (0.5, 1)])],
    "letter_Y": [("line", [(0.05, 0), (0.5, 0.5), (0.95, 0)]), ("line", [(0.5, 0.5), (0.5, 1)])],
}  # fmt: skip


def _crop(ink: np.ndarray, minimum: float) -> np.ndarray:
    """Crop an ink map to the rows and columns with at least the given amount of ink."""
    x, y, w, h = cv2.boundingRect((ink >= minimum).astype(np.uint8))
    return ink[y : y + h, x : x + w]


def draw_glyph(name: str, long_side: int, rng: np.random.Generator, jitter: float = 1.0) -> np.ndarray:
    """Draw one glyph with random thickness, rotation, shear and perspective.

    Args:
        name (str): Class name.
        long_side (int): Longer side of the ink in pixels, met to within about two pixels.
        rng (np.random.Generator): Source of randomness.
        jitter (float): Strength of the distortions; 0 draws the glyph upright.

    Returns:
        (np.ndarray): Ink amounts, 0 to 1, cropped to the ink.
    """
    canvas, unit, shift = 240, 120, 60
    mask = np.zeros((canvas, canvas), np.uint8)
    thick = round(unit * (0.13 + 0.04 * jitter * rng.uniform(-1, 1)))
    for kind, points in GLYPHS[name]:
        xy = np.rint(np.asarray(points) * unit + shift).astype(np.int32)
        if kind != "line":
            cv2.fillPoly(mask, [xy], 255 if kind == "fill" else 0)
        if kind != "cut":
            cv2.polylines(mask, [xy], kind == "fill", 255, thick if kind == "line" else thick // 2)
    angle, shear = math.radians(15 * jitter * rng.uniform(-1, 1)), 0.12 * jitter * rng.uniform(-1, 1)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]) @ [[1, shear], [0, 1]]
    corners = unit * np.array([[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5]])
    moved = (corners + unit * 0.05 * jitter * rng.uniform(-1, 1, (4, 2))) @ turn.T
    center = canvas / 2
    warp = cv2.getPerspectiveTransform((corners + center).astype(np.float32), (moved + center).astype(np.float32))
    ink = _crop(cv2.warpPerspective(mask, warp, (canvas, canvas)) / np.float32(255), 0.5)
    scale = long_side / max(ink.shape)
    ink = cv2.resize(ink, (round(ink.shape[1] * scale), round(ink.shape[0] * scale)), interpolation=cv2.INTER_AREA)
    return _crop(ink, 0.35)


def _colors(rng: np.random.Generator, n: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Pick the two ends of a background gradient and `n` inks that stand out from it, all BGR."""
    dark = rng.random() < 0.5
    tint = rng.uniform(15, 85, 3) if dark else rng.uniform(170, 240, 3)
    ends = (tint + rng.uniform(-15, 15, (2, 3))).astype(np.float32)
    inks: list[np.ndarray] = []
    while len(inks) < n:
        ink = rng.uniform(0, 255, 3)
        if abs(ink.mean() - tint.mean()) > 80:
            inks.append(ink)
    return ends, inks


def draw_scene(names: Sequence[str], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw one image with the given objects, none of which overlap.

    Args:
        names (Sequence[str]): Class name of each object.
        rng (np.random.Generator): Source of randomness.

    Returns:
        (tuple[np.ndarray, np.ndarray]): Image (BGR, uint8) and boxes (N, 4) as x1, y1, x2, y2 in pixels.
    """
    boxes: list[tuple[int, int, int, int]] = []
    while len(boxes) < len(names):  # resample the sizes if the objects do not fit
        boxes, glyphs = [], [draw_glyph(n, int(rng.integers(36, 65)), rng) for n in names]
        for h, w in (g.shape for g in glyphs):
            for _ in range(50):
                x, y = rng.integers(2, (SIZE - 1 - w, SIZE - 1 - h)).tolist()
                if all(x > b[2] + GAP or b[0] > x + w + GAP or y > b[3] + GAP or b[1] > y + h + GAP for b in boxes):
                    boxes.append((x, y, x + w, y + h))
                    break
    ends, inks = _colors(rng, len(names))
    heading = rng.uniform(0, 2 * math.pi)
    grid = np.linspace(-0.5, 0.5, SIZE, dtype=np.float32)
    slope = np.clip(0.5 + grid[None] * math.cos(heading) + grid[:, None] * math.sin(heading), 0, 1)[..., None]
    image = ends[0] + (ends[1] - ends[0]) * slope
    for (x1, y1, x2, y2), glyph, ink in zip(boxes, glyphs, inks, strict=True):
        image[y1:y2, x1:x2] += glyph[..., None] * (ink - image[y1:y2, x1:x2])
    image += rng.standard_normal(image.shape, np.float32) * np.float32(rng.uniform(1, 5))
    return cv2.convertScaleAbs(np.maximum(image, 0)), np.array(boxes)


def _write_split(root: Path, split: str, first: int, counts: np.ndarray, classes: range, seed: Sequence[int]) -> None:
    """Write images and labels in which every class occurs equally often, `counts` objects per image."""
    rng = np.random.default_rng(seed)
    ids = rng.permutation(np.tile(classes, counts.sum() // len(classes)))
    images, labels = root / "images" / split, root / "labels" / split
    images.mkdir(parents=True, exist_ok=True)
    labels.mkdir(parents=True, exist_ok=True)
    for i, part in enumerate(np.split(ids, np.cumsum(counts)[:-1]), first):
        image, boxes = draw_scene([(BASE + NOVEL)[c] for c in part], rng)
        if not cv2.imwrite(str(images / f"{i:04d}.jpg"), image, [cv2.IMWRITE_JPEG_QUALITY, 92]):
            raise OSError(f"cannot write {images / f'{i:04d}.jpg'}")
        xywh = np.concatenate(((boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]), 1) / SIZE
        rows = (f"{c} " + " ".join(f"{v:.6f}" for v in row) for c, row in zip(part, xywh, strict=True))
        (labels / f"{i:04d}.txt").write_text("\n".join(rows) + "\n")


def build(root: str | Path, seed: int = 0) -> Path:
    """Write the whole data set; it appears under `root` only once it is complete.

    Args:
        root (str | Path): Folder to create; an empty one may exist.
        seed (int): Seed; the same seed gives the same files.

    Returns:
        (Path): Data set root.

    Raises:
        FileExistsError: If `root` exists and is not an empty folder.
    """
    root = Path(root).resolve()
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise FileExistsError(f"{root} exists and is not empty. Remove it to draw the demo data again.")
    root.parent.mkdir(parents=True, exist_ok=True)
    base, novel = range(len(BASE)), range(len(BASE), len(BASE) + len(NOVEL))
    with tempfile.TemporaryDirectory(dir=root.parent, prefix=f".{root.name}-") as tmp:
        new = Path(tmp) / root.name
        _write_split(new, "train", 0, np.resize([2, 4, 4, 4, 4], 600), base, (seed, 0))
        _write_split(new, "val", 0, np.resize([2, 4, 4, 4, 4], 120), base, (seed, 1))
        _write_split(new, "novel_query", 0, np.resize([2, 4, 4, 4, 4], 80), novel, (seed, 2))
        # Two halves of five objects per class each, so that the 5-shot list is part of the ten shots.
        for half in range(2):
            _write_split(new, "novel_support", 12 * half, np.resize([2, 4, 4], 12), novel, (seed, 3 + half))
        (new / "novel_5shot.txt").write_text("".join(f"./images/novel_support/{i:04d}.jpg\n" for i in range(12)))
        try:
            if root.exists():
                root.rmdir()  # Windows does not rename onto an existing folder
            os.rename(new, root)
        except OSError:
            if not (root / "novel_5shot.txt").is_file():  # else another process built it meanwhile
                raise
    return root
