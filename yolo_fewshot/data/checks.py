"""Checks of a data set: boxes, class names, near-duplicates between splits, number of shots."""

from __future__ import annotations

from collections.abc import Collection
from itertools import repeat
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from ultralytics.data import utils
from ultralytics.utils import NUM_THREADS, TQDM
from ultralytics.utils.patches import imread

from yolo_fewshot.class_names import repeated
from yolo_fewshot.data.episodes import EpisodeSampler
from yolo_fewshot.data.labels import read_labels
from yolo_fewshot.data.support import MIN_SIDE, list_images
from yolo_fewshot.errors import few

OUTSIDE = 0.01  # tolerance of boxes outside the image, relative to its side, as in Ultralytics
SIDE = 32  # of the compared thumbnails, in pixels
LARGE = 512  # side in pixels from which an image is decoded at a quarter of its size
# Minimum correlation of the details of near-duplicates. On three data sets, copies at 70 % of the size, JPEG quality 50
# and other brightness had 0.85 to 0.99, other images at most 0.75.
DUPLICATE = 0.85
FLAT = 0.5  # minimum standard deviation of the details, in gray levels, of images that are compared
SHOTS = (1, 3, 5, 10)


class Finding(NamedTuple):
    """Result of a check.

    Attributes:
        level (str): 'ok', 'warning' or 'error'; with an error, training fails or is useless.
        text (str): The result, and what to change.
    """

    level: str
    text: str


class Split(NamedTuple):
    """Images of a split, as read for training.

    Attributes:
        name (str): 'train' or 'val'.
        files (list[str]): Image files that Ultralytics uses.
        boxes (list[np.ndarray]): Class, x, y, w, h of the objects of each, normalized, (n, 5) float32.
        shapes (list[tuple[int, int]]): Height and width of each in pixels.
        ignored (list[str]): Files that training leaves out, each with the reason.
        unlabeled (int): Images without an object.
        details (np.ndarray): Gray thumbnails minus their local mean, (N, SIDE * SIDE) float16.
    """

    name: str
    files: list[str]
    boxes: list[np.ndarray]
    shapes: list[tuple[int, int]]
    ignored: list[str]
    unlabeled: int
    details: np.ndarray


def read_split(data: dict[str, Any], name: str) -> Split:
    """Read a split.

    Args:
        data (dict): Result of `check_det_dataset`.
        name (str): 'train' or 'val'.

    Returns:
        (Split): Its images.
    """
    if not data.get(name):
        raise ValueError(f"'{name}:' of data= is empty. Name its images, or leave out what is not used.")
    paths = data[name] if isinstance(data[name], list) else [data[name]]
    files = list(dict.fromkeys(x for p in paths for x in list_images(Path(p))))
    kept: list[tuple] = []
    ignored: list[str] = []
    kpt_shape = data.get("kpt_shape") or (0, 0)
    tasks = zip(files, utils.img2label_paths(files), repeat(len(data["names"])), repeat(kpt_shape))
    with ThreadPool(NUM_THREADS) as pool:
        results = TQDM(pool.imap(_read, tasks), desc=f"{name}: Looking at images...", total=len(files))
        for file, (boxes, shape, reason, details) in zip(files, results):
            if reason:
                ignored.append(f"{file}: {reason}")
            else:
                kept.append((file, boxes, shape, details))
    names, boxes, shapes, details = zip(*kept) if kept else ((), (), (), ())
    stacked = np.stack(details) if kept else np.zeros((0, SIDE * SIDE), np.float16)
    return Split(name, list(names), list(boxes), list(shapes), ignored, sum(not len(b) for b in boxes), stacked)


def _read(
    task: tuple[str, str, int, tuple[int, int]],
) -> tuple[np.ndarray | None, tuple[int, int] | None, str, np.ndarray | None]:
    """Read one image: its boxes, shape, the reason why training leaves it out, if any, and its details."""
    labels = read_labels(*task)
    if labels.error:
        return None, None, labels.error, None
    image = imread(task[0], cv2.IMREAD_REDUCED_GRAYSCALE_4 if min(labels.shape) >= LARGE else cv2.IMREAD_GRAYSCALE)
    if image is None:
        return None, None, "cannot be read", None
    if image.ndim == 3:
        image = image.mean(2)
    gray = cv2.resize(image.astype(np.float32), (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    details = (gray - cv2.blur(gray, (3, 3))).astype(np.float16).ravel()  # without lighting and vignette
    return labels.boxes, labels.shape, "", details


def check_boxes(split: Split) -> list[Finding]:
    """Check for boxes that training drops or that are outside their image.

    Args:
        split (Split): A split.

    Returns:
        (list[Finding]): Results.
    """
    n = sum(map(len, split.boxes))
    if not n:
        text = f"{split.name}: no labeled object in {len(split.files) + len(split.ignored)} images."
        level, what = ("error", "") if split.name == "train" else ("warning", " No mAP can be measured.")
        text = f"{text}{what} Put label files into a folder 'labels' beside 'images'."
        return [Finding(level, text), *_ignored(split)]
    outside, empty = {}, {}
    for file, boxes, (h, w) in zip(split.files, split.boxes, split.shapes):
        low, high = boxes[:, 1:3] - boxes[:, 3:5] / 2, boxes[:, 1:3] + boxes[:, 3:5] / 2
        outside[file] = ((low < -OUTSIDE) | (high > 1 + OUTSIDE)).any(1).sum()
        empty[file] = (boxes[:, 3:5] * (w, h) < MIN_SIDE).any(1).sum()
    found = _ignored(split)
    for what, counts in (("reach outside the image", outside), ("are less than a pixel wide or high", empty)):
        files = [f for f, c in counts.items() if c]
        if files:
            text = f"{split.name}: {sum(counts.values())} boxes {what}, in {few(files)}. Correct or remove them."
            found.append(Finding("warning", text))
    if not found:
        text = f"{split.name}: {n} boxes in {len(split.files)} images, {split.unlabeled} of these without any."
        found.append(Finding("ok", text))
    return found


def _ignored(split: Split) -> list[Finding]:
    """Report the images that Ultralytics leaves out."""
    if not split.ignored:
        return []
    text = f"{split.name}: {len(split.ignored)} images are left out by training: {few(split.ignored, '; ')}."
    return [Finding("warning", text)]


def check_classes(split: Split, names: dict[int, str]) -> Finding:
    """Check for classes without an image.

    Args:
        split (Split): A split.
        names (dict[int, str]): Class names.

    Returns:
        (Finding): Result.
    """
    labeled = {int(c) for b in split.boxes for c in b[:, 0]}
    missing = [n for i, n in names.items() if i not in labeled]
    if not missing:
        return Finding("ok", f"{split.name}: all {len(names)} classes have images.")
    what = "which training cannot learn" if split.name == "train" else "whose AP is not measured"
    return Finding("warning", f"{split.name}: no image of {few(missing)}, {what}. Label some, or drop the classes.")


def check_names(names: dict[int, str]) -> list[Finding]:
    """Check for duplicate class names.

    Args:
        names (dict[int, str]): Class names.

    Returns:
        (list[Finding]): Results.
    """
    duplicates = [
        f"{n} (ids {', '.join(str(i) for i, x in names.items() if str(x) == n)})" for n in repeated(names.values())
    ]
    if not duplicates:
        return []
    text = (
        f"Several classes have the same name: {few(duplicates)}. They are trained as separate classes, but shots and "
        "other data are matched by name. Give each class a unique name in 'names:'."
    )
    return [Finding("warning", text)]


def check_duplicates(a: Split, b: Split) -> Finding:
    """Check for near-duplicates between two splits, which make results too good.

    Args:
        a (Split): A split.
        b (Split): Another split.

    Returns:
        (Finding): Result.
    """
    same = set(a.files).intersection(b.files)
    if same:
        text = f"{len(same)} of {len(b.files)} images of {b.name} are those of {a.name}"
        return Finding("warning", f"{text}, so that results on it say nothing about new images.")
    (x, flat_x), (y, flat_y) = map(_normalized, (a.details, b.details))
    pairs = []
    for start in range(0, len(y), 1024):
        similarity = y[start : start + 1024] @ x.T
        similarity[:, flat_x] = -1
        similarity[flat_y[start : start + 1024]] = -1
        nearest = similarity.argmax(1) if len(x) else []
        pairs += [(start + i, j) for i, j in enumerate(nearest) if similarity[i, j] >= DUPLICATE]
    if not pairs:
        return Finding("ok", f"No near-duplicates between {a.name} and {b.name}.")
    listed = few([f"{b.files[i]} and {a.files[j]}" for i, j in pairs], "; ", 3)
    return Finding(
        "warning",
        f"{len(pairs)} of {len(b.files)} images of {b.name} have a near-duplicate in {a.name}, so that results on it "
        f"are too good: {listed}. Split by scene, clip or day instead.",
    )


def _normalized(details: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows with mean 0 and length 1, float32, and which of them are flat."""
    x = details.astype(np.float32)
    x -= x.mean(1, keepdims=True)
    norm = np.linalg.norm(x, axis=1, keepdims=True)
    return x / np.maximum(norm, 1e-6), norm[:, 0] < FLAT * SIDE


def check_shots(split: Split, names: dict[int, str], args: Any, held_out: Collection[int] = ()) -> list[Finding]:
    """Check whether K-shot sets and episodes can be drawn.

    Args:
        split (Split): The train split.
        names (dict[int, str]): Class names.
        args (Any): Arguments with `stage`, `n_way`, `k_shot` and `n_query`.
        held_out (Collection[int]): Classes that `meta_val` keeps out of training.

    Returns:
        (list[Finding]): Results.
    """
    objects = np.bincount([int(c) for b in split.boxes for c in b[:, 0]], minlength=len(names))
    enough = ", ".join(f"{(objects >= k).sum()} for K={k}" for k in SHOTS)
    found = [Finding("ok", f"Classes with enough labeled objects for K shots, of {len(names)}: {enough}.")]
    if args.stage == 2:
        labels = [{"cls": b[:, :1]} for b in split.boxes]
        episode = f"n_way={args.n_way} k_shot={args.k_shot} n_query={args.n_query}"
        try:
            sampler = EpisodeSampler(labels, names, args.n_way, args.k_shot, args.n_query, 1, held_out=held_out)
        except ValueError as e:
            return [*found, Finding("error", str(e))]
        trained = len(names) - len(held_out)
        text = f"Episodes of {episode} can be drawn, from {len(sampler.classes)} of {trained} classes."
        found.append(Finding("ok" if len(sampler.classes) == trained else "warning", text))
    return found
