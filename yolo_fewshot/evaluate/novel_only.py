"""A view of a data set with its novel classes alone, for models that do not know its base classes."""

from __future__ import annotations

import hashlib
import os
import shutil
from itertools import repeat
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
from ultralytics.data.utils import check_det_dataset, img2label_paths
from ultralytics.utils import NUM_THREADS, YAML

from yolo_fewshot.data.ignore import ignore_files, ignore_folder
from yolo_fewshot.data.labels import read_labels
from yolo_fewshot.data.splits import place
from yolo_fewshot.data.support import images_of


def novel_only(data: dict[str, Any], train: list[str], novel: tuple[str, ...], root: Path, name: str) -> Path:
    """Write links to the images of a data set, with the labels of its novel classes, numbered from 0.

    Args:
        data (dict): Checked data.yaml, whose val split is kept.
        train (list[str]): Training images.
        novel (tuple[str, ...]): Names of the novel classes.
        root (Path): Folder to write to; several views share the images of a val split.
        name (str): Name of the view.

    Returns:
        (Path): Its data.yaml.
    """
    val = f"val_{hashlib.sha256(str(data['val']).encode()).hexdigest()[:8]}"
    _write_split(data, train, novel, root, name)
    _write_split(data, images_of(data["val"]), novel, root, val)
    content = {"path": str(root), "train": f"images/{name}", "val": f"images/{val}", "names": dict(enumerate(novel))}
    content |= {k: data[k] for k in ("channels",) if k in data}
    YAML.save(root / f"{name}.yaml", content | ({"fewshot": {"ignore": "ignore"}} if ignore_folder(data) else {}))
    return root / f"{name}.yaml"


def _write_split(data: dict[str, Any], images: list[str], novel: tuple[str, ...], root: Path, name: str) -> None:
    """Write the links, labels and ignore regions of some images; the links come last, and existing ones are kept."""
    done, part = root / "images" / name, root / "images" / f"{name}.part"
    if done.is_dir():
        return
    shutil.rmtree(part, ignore_errors=True)  # left by an interrupted run
    for x in (part, root / "labels" / name, root / "ignore" / name):
        x.mkdir(parents=True, exist_ok=True)
    number = {i: novel.index(n) for i, n in data["names"].items() if n in novel}
    folder = ignore_folder(data)
    ignored = ignore_files(images, folder) if folder else [""] * len(images)
    for i, (image, label, ignore) in enumerate(zip(images, img2label_paths(images), ignored)):
        stem = f"{i:06}_{Path(image).stem}"  # images of several folders may share a name
        place(os.path.realpath(image), part / f"{stem}{Path(image).suffix}")
        rows = read_labels(image, label, len(data["names"])).boxes
        lines = [f"{number[int(c)]} {' '.join(f'{v:.6f}' for v in box)}\n" for c, *box in rows if int(c) in number]
        (root / "labels" / name / f"{stem}.txt").write_text("".join(lines))
        if ignore and Path(ignore).is_file():
            shutil.copyfile(ignore, root / "ignore" / name / f"{stem}.txt")
    os.replace(part, done)


def labeled_names(file: Path) -> set[str]:
    """Return the names of the classes that the val split of a data.yaml labels.

    Args:
        file (Path): data.yaml.

    Returns:
        (set[str]): Names.
    """
    data = check_det_dataset(file)
    images = images_of(data["val"])
    with ThreadPool(NUM_THREADS) as pool:
        read = pool.starmap(read_labels, zip(images, img2label_paths(images), repeat(len(data["names"]))))
    found = np.unique(np.concatenate([np.zeros((0, 5)), *(x.boxes for x in read)])[:, 0]).astype(int)
    return {str(data["names"][i]) for i in found}
