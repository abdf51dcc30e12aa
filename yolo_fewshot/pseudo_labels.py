"""Pseudo-labels: what a detector of the new classes finds in unlabeled images, as further shots.

Self-training: train on the shots, label other images with the result, train again on both. See Lee 2013, "Pseudo-Label"
(ICML workshop), and for detection Sohn et al. 2020, "A Simple Semi-Supervised Learning Framework for Object Detection"
(arXiv:2005.04757).
"""

from __future__ import annotations

import os
import shlex
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from torchvision.ops import nms
from ultralytics.data.utils import check_det_dataset
from ultralytics.engine.results import Boxes, Results
from ultralytics.utils import LOGGER, TQDM, YAML, checks
from ultralytics.utils.patches import imread

from yolo_fewshot.class_names import check_unambiguous, match_classes
from yolo_fewshot.data.splits import place, unique_name
from yolo_fewshot.data.support import images_of, read_background
from yolo_fewshot.errors import few
from yolo_fewshot.files import sha256
from yolo_fewshot.inputs import check_checkpoint, check_yaml_file, new_folder
from yolo_fewshot.yolo import FewShotYOLO

LOWER = 0.3  # minimum confidence of the further objects of a chosen image
IOU = 0.5  # of two boxes, also of different classes, of which only the more confident one stays


def pseudo_label(
    model: str | Path,
    data: str | Path,
    source: str | Path,
    out: str | Path,
    conf: float = 0.5,
    top: int = 10,
    imgsz: int | None = None,
    device: str | int | None = None,
) -> Path:
    """Label the unlabeled images in which a detector is most confident, as further shots.

    Of each class, the `top` images with the most confident object are taken. All input is checked first, and the folder
    appears when it is complete: `images` (links), `labels`, `check` (the images with their boxes drawn), and a
    `data.yaml` of the shots and these images. Copies of labeled images are left out.

    Args:
        model (str | Path): Checkpoint that knows the classes, such as the best.pt of stage 3.
        data (str | Path): data.yaml of the shots, whose class names are looked for.
        source (str | Path): Folder or .txt list of unlabeled images.
        out (str | Path): New or empty folder to write.
        conf (float): Minimum confidence of the most confident object of a chosen image.
        top (int): Maximum number of images of a class.
        imgsz (int, optional): Image size in pixels, that of training if not given.
        device (str | int, optional): Device, as in Ultralytics.

    Returns:
        (Path): The data.yaml.

    Raises:
        FileNotFoundError: If a file or folder does not exist.
        PermissionError: If the folder cannot be written.
        TypeError: If the model does not detect boxes.
        ValueError: If an argument is invalid, the model knows none of the classes, or it finds none of their objects.

    Examples:
        >>> pseudo_label("runs/detect/scooter/weights/best.pt", "shots.yaml", "unlabeled", "more")
    """
    if not (isinstance(conf, (int, float)) and 0 < conf < 1):
        raise ValueError(f"'conf={conf}' is an invalid value. It must be between 0 and 1, e.g. conf=0.5.")
    if type(top) is not int or top < 1:
        raise ValueError(f"'top={top}' is an invalid value. It must be an int of at least 1, the images of a class.")
    target = new_folder(out)
    check_checkpoint(model)
    check_yaml_file("data", data)
    try:
        info = check_det_dataset(data)
    except SyntaxError as e:
        raise ValueError(f"{e} It needs all of 'train:', 'val:' and 'names:'.") from e
    content = {k: v for k, v in YAML.load(checks.check_yaml(data)).items() if k not in {"path", "nc", "download"}}
    content |= {k: x for k in ("train", "val", "test") if (x := _paths(info.get(k)))} | {"names": info["names"]}
    files = [x["im_file"] for x in read_background(source, info["channels"], "source").labels]
    yolo = FewShotYOLO(model)
    if yolo.task != "detect":
        raise TypeError(f"model={model} is a model for task '{yolo.task}'. It must be a detector.")
    classes = _classes(yolo.names, info["names"], model, data)
    files = _new_images(files, info)
    settings: dict[str, Any] = {"conf": min(conf, LOWER), "classes": list(classes), "device": device, "verbose": False}
    settings |= {"imgsz": imgsz} if imgsz else {}
    found = {}
    for file in TQDM(files, desc="Looking for objects..."):  # not as a list, of which Ultralytics reads all at once
        boxes = yolo.predict(file, **settings)[0].boxes.cpu()
        found[file] = boxes[nms(boxes.xyxy, boxes.conf, IOU)]  # an object has one class
    chosen = _most_confident(found, classes, conf, top)
    if not chosen:
        raise ValueError(
            f"model={model} finds no object of {few(sorted({str(yolo.names[i]) for i in classes}))} above a confidence "
            f"of {conf:g} in {len(files)} images of source={source}. Lower conf=, or label more shots."
        )
    content["train"] = [*content["train"], str(target / "images")]
    counts = _save(target, {f: found[f] for f in chosen}, classes, yolo.names, content)
    labeled = ", ".join(f"{info['names'][c]} {n}" for c, n in sorted(counts.items()))
    LOGGER.info(
        f"{len(chosen)} of {len(files)} images labeled, objects: {labeled}. Results saved to {target}\n"
        f"Look at the boxes in {target / 'check'}, and remove the images of wrong ones from {target / 'images'}. Then "
        f"train again from the same model as before, with {shlex.quote(f'data={target}/data.yaml')}"
    )
    return target / "data.yaml"


def _classes(known: dict[int, str], names: dict[int, str], model: Any, data: Any) -> dict[int, int]:
    """Return the label index of each class of the model that the data.yaml names."""
    index = match_classes(names, known)
    check_unambiguous(names, index, names, data)
    classes = {c: i for i, c in index.items() if c >= 0}
    unknown = [str(names[i]) for i, c in index.items() if c < 0]
    if not classes:
        raise ValueError(
            f"model={model} knows no class of {data} ({few(unknown)}). Give the model that was trained on its shots, "
            "or that they were enrolled into."
        )
    if unknown:
        LOGGER.warning(f"model={model} does not know {few(unknown)} of {data}, which are not looked for.")
    return classes


def _new_images(files: list[str], info: dict[str, Any]) -> list[str]:
    """Return the images that are no copies of labeled ones, nor of each other."""
    splits = [x for k in ("train", "val", "test") for x in _paths(info.get(k)) if os.path.exists(x)]
    labeled = {sha256(Path(x)) for x in images_of(splits) if os.path.isfile(x)}
    digests = {x: sha256(Path(x)) for x in files}
    first = {digest: x for x, digest in reversed(digests.items())}
    kept = [x for x, digest in digests.items() if digest not in labeled and first[digest] == x]
    copies = [x for x, digest in digests.items() if digest in labeled]
    if copies:
        LOGGER.warning(f"{len(copies)} images are also those of the data.yaml, and left out: {few(copies)}.")
    if not kept:
        raise ValueError("All images of source= are also those of the data.yaml. Give others.")
    return kept


def _paths(split: Any) -> list[str]:
    """Return the files and folders of a split."""
    return [str(x) for x in (split if isinstance(split, list) else [split]) if x]


def _most_confident(found: dict[str, Boxes], classes: dict[int, int], conf: float, top: int) -> list[str]:
    """Return the images among the `top` most confident ones of a class."""
    chosen = set()
    for c in classes:
        best = {f: max(x.conf[x.cls == c].tolist(), default=0.0) for f, x in found.items()}
        chosen |= {f for f in sorted(best, key=lambda f: -best[f])[:top] if best[f] >= conf}
    return [f for f in found if f in chosen]


def _save(
    target: Path,
    found: dict[str, Boxes],
    classes: dict[int, int],
    names: dict[int, str],
    content: dict[str, Any],
) -> Counter[int]:
    """Write the folder, and return the number of objects by label index."""
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    counts: Counter[int] = Counter()
    taken: set[str] = set()
    copies: Counter[str] = Counter()
    try:
        for kind in ("images", "labels", "check"):
            (part / kind).mkdir(parents=True)
        for file, boxes in found.items():
            name = unique_name(file, taken, copies)
            stem = os.path.splitext(name)[0]
            place(os.path.realpath(file), part / "images" / name)
            labels = [classes[int(c)] for c in boxes.cls]
            rows = [f"{c} {' '.join(f'{v:.6f}' for v in b)}\n" for c, b in zip(labels, boxes.xywhn.tolist())]
            (part / "labels" / f"{stem}.txt").write_text("".join(rows))
            image = np.ascontiguousarray(imread(file)[..., :3])  # of multispectral ones the first three channels
            Results(image, file, names, boxes.data).save(str(part / "check" / f"{stem}.jpg"))
            counts.update(labels)
        YAML.save(part / "data.yaml", content, "# Shots, and images that a detector has labeled\n")
        if target.exists():
            target.rmdir()
        part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return counts
