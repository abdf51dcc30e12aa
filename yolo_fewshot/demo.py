"""`yolo-fewshot demo`: a stock checkpoint learns a class from a few shots, and finds it in new images."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from ultralytics import YOLO
from ultralytics.cfg import get_cfg, get_save_dir
from ultralytics.utils import LOGGER, ROOT, SETTINGS, YAML, env_bool
from ultralytics.utils.downloads import GITHUB_ASSETS_NAMES, attempt_download_asset, is_url
from ultralytics.utils.metrics import box_iou
from ultralytics.utils.patches import imwrite
from ultralytics.utils.torch_utils import select_device

from yolo_fewshot.data.demo import BASE, SIZE, draw_scene
from yolo_fewshot.files import AtomicPath
from yolo_fewshot.inputs import check_writable
from yolo_fewshot.yolo import FewShotYOLO

CLASS = "hash"  # the new class, which neither COCO nor the base classes of the built-in data have
IMAGES, COLUMNS = 6, 3  # new images, and how many of them lie side by side in the plot
SCALE = 3  # of the drawn images, so that the labels of the results can be read
MAX_SHOTS = 100
IMGSZ, OWN_IMGSZ = 320, 96  # of a downloaded detector, and of the one trained here
OWN = "demo-detector.pt"
WIDTH, EPOCHS = 0.125, 20  # half the channels of YOLO11n; about 100 s on one CPU core
SERVER = "https://github.com/ultralytics/assets"


class Demo(NamedTuple):
    """What a demo has found.

    Attributes:
        folder (Path): Run folder.
        model (Path): Checkpoint that the class was enrolled into.
        found (int): Objects of the new class that were found.
        objects (int): All of them.
        false (int): False alarms of the new class.
    """

    folder: Path
    model: Path
    found: int
    objects: int
    false: int


def demo(
    model: str = "yolo11n.pt",
    shots: int = 5,
    imgsz: int | None = None,
    device: str | int | None = None,
    project: str | None = None,
    name: str = "demo",
) -> Demo:
    """Enroll a class of the built-in data from a few shots, find it in new images, and plot these.

    Where the weights cannot be downloaded, a small stock detector is trained on the base classes of the built-in data,
    once: the next demo in the same folder starts from it.

    Args:
        model (str): Checkpoint.
        shots (int): Labeled objects to learn from.
        imgsz (int, optional): Image size in pixels.
        device (str | int, optional): Device, as in Ultralytics.
        project (str, optional): Folder of the run folder, as in Ultralytics.
        name (str): Name of the run folder, which gets a number if it exists.

    Returns:
        (Demo): The result.

    Raises:
        FileNotFoundError: If the checkpoint does not exist.
        PermissionError: If the run folder cannot be written.
        ValueError: If an argument is invalid.
        TypeError: If the model cannot enroll classes.
    """
    if not (isinstance(shots, int) and 1 <= shots <= MAX_SHOTS):
        raise ValueError(f"'shots={shots}' is an invalid value. Valid 'shots' values are between 1 and {MAX_SHOTS}.")
    if not (imgsz is None or (isinstance(imgsz, int) and imgsz >= 32)):
        raise ValueError(f"'imgsz={imgsz}' is an invalid value. 'imgsz' must be an int >= 32.")
    select_device("" if device is None else device, verbose=False)  # before any work
    weights = find_weights(model)
    folder = get_save_dir(get_cfg(overrides={"task": "detect", "mode": "predict", "project": project, "name": name}))
    check_writable("project", folder.parent)
    folder.mkdir(parents=True)
    first = "" if weights else f"; put {model} into this folder first"
    if weights is None:
        weights, imgsz = own_detector(folder.parent / OWN, device), imgsz or OWN_IMGSZ
    imgsz = imgsz or IMGSZ

    write_scenes(folder / "shots", shots, seed=0, labels=True)
    truth = write_scenes(folder, IMAGES, seed=1)
    LOGGER.info(f"\nEnrolling the new class '{CLASS}' into {weights} from {shots} labeled images, without training...")
    yolo = FewShotYOLO(weights)
    yolo.enroll(folder / "shots", imgsz=imgsz, device=None if device is None else str(device))
    yolo.save(folder / "demo.pt")
    results = yolo.predict(folder / "images", imgsz=imgsz, device=device, verbose=False)
    _plot([x.plot() for x in results], folder / "demo.jpg")
    result = Demo(folder, Path(weights), *count(results, truth))
    _report(result, model, first)
    return result


def find_weights(model: str) -> Path | None:
    """Return a checkpoint, which is downloaded if it is one of Ultralytics'; None if that fails, without long retries.

    Args:
        model (str): Checkpoint.

    Returns:
        (Path | None): Its file.

    Raises:
        FileNotFoundError: If it does not exist, and Ultralytics does not offer it.
    """
    local = [x for x in (Path(model), Path(SETTINGS["weights_dir"]) / model) if x.is_file()]
    if local:
        return local[0]
    if model not in GITHUB_ASSETS_NAMES:
        raise FileNotFoundError(f"model='{model}' does not exist. Give the path of a *.pt checkpoint, or leave it out.")
    if not env_bool("YOLO_OFFLINE") and is_url(SERVER, check=True):
        with contextlib.suppress(ConnectionError):
            return Path(attempt_download_asset(model, retry=0))
    LOGGER.warning(
        f"{model} cannot be downloaded from {SERVER}, so the demo uses a small detector of its own. For the demo with "
        f"{model}, put the file into this folder."
    )
    return None


def own_detector(file: Path, device: str | int | None = None) -> Path:
    """Train a small stock detector on the base classes of the built-in data, unless its file exists.

    Args:
        file (Path): Checkpoint to write.
        device (str | int, optional): Device.

    Returns:
        (Path): The checkpoint.
    """
    if file.is_file():
        LOGGER.info(f"Using {file}, which an earlier demo trained. Remove it to train it again.")
        return file
    LOGGER.info(f"Training a YOLO11 detector on {len(BASE)} base classes, a minute or two on a CPU...")
    with tempfile.TemporaryDirectory() as tmp:
        network = YAML.load(ROOT / "cfg" / "models" / "11" / "yolo11.yaml")
        YAML.save(f"{tmp}/demo-yolo11n.yaml", {**network, "scales": {"n": [0.5, WIDTH, 1024]}})
        yolo = YOLO(f"{tmp}/demo-yolo11n.yaml")
        yolo.train(
            **{"data": "fewshot-demo.yaml", "imgsz": OWN_IMGSZ, "epochs": EPOCHS, "batch": 16, "nbs": 16},
            **{"optimizer": "AdamW", "lr0": 0.004, "warmup_epochs": 1, "warmup_bias_lr": 0.0, "mosaic": 0.0},
            **{"amp": False, "workers": 0, "val": False, "plots": False, "verbose": False, "device": device},
            **{"project": tmp, "name": "train"},
        )
        AtomicPath(file).write_bytes(Path(yolo.trainer.best).read_bytes())
    return file


def write_scenes(root: Path, n: int, seed: int, labels: bool = False) -> list[np.ndarray]:
    """Draw images that each show one object of the new class beside two of base classes.

    Args:
        root (Path): Folder to write `images` into and, with labels, `labels` and `data.yaml`.
        n (int): Number of images.
        seed (int): Seed.
        labels (bool): Whether to write labels of the new class, which make the folder a support set.

    Returns:
        (list[np.ndarray]): Box of the object of the new class in each image, x1, y1, x2, y2 in pixels.
    """
    rng, boxes = np.random.default_rng(seed), []
    (root / "images").mkdir(parents=True)
    if labels:
        (root / "labels").mkdir()
        YAML.save(root / "data.yaml", {"train": "images", "val": "images", "names": {0: CLASS}})
    for i in range(n):
        image, drawn = draw_scene([CLASS, *rng.choice(BASE, 2, replace=False)], rng)
        imwrite(str(root / "images" / f"{i:03}.jpg"), cv2.resize(image, None, fx=SCALE, fy=SCALE))
        x1, y1, x2, y2 = drawn[0] / SIZE
        if labels:
            xywh = (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1
            (root / "labels" / f"{i:03}.txt").write_text(f"0 {' '.join(f'{v:.6f}' for v in xywh)}\n")
        boxes.append(drawn[0] * SCALE)
    return boxes


def count(results: Sequence[Any], truth: Sequence[np.ndarray]) -> tuple[int, int, int]:
    """Count what was found of the new class.

    Args:
        results (Sequence[Results]): Results of each image.
        truth (Sequence[np.ndarray]): Box of its object, x1, y1, x2, y2 in pixels.

    Returns:
        found (int): Objects with a box of IoU > 0.5.
        objects (int): All objects.
        false (int): Other boxes of the class.
    """
    found = false = 0
    for x, box in zip(results, truth, strict=True):
        own = [x.names[int(c)] == CLASS for c in x.boxes.cls]
        boxes = x.boxes.xyxy.cpu()[torch.tensor(own, dtype=torch.bool)]
        hit = bool((box_iou(torch.tensor(box)[None].float(), boxes) > 0.5).any())
        found, false = found + hit, false + len(boxes) - hit
    return found, len(truth), false


def _plot(images: list[np.ndarray], file: Path) -> None:
    """Write images of one size side by side, in rows."""
    rows = [np.hstack(images[i : i + COLUMNS]) for i in range(0, len(images), COLUMNS)]
    imwrite(str(file), np.vstack(rows))


def _report(result: Demo, model: str, first: str) -> None:
    """Log what was found, and the commands for images of one's own."""
    folder, found = result.folder, f"{result.found} of {result.objects} objects found in new images"
    text = f"'{CLASS}': {found}, {result.false} false alarms. Dashed boxes in demo.jpg are of the new class."
    if not result.found:
        text = f"'{CLASS}' was not found: {found}, {result.false} false alarms. Try more shots, e.g. shots=10."
    (LOGGER.info if result.found else LOGGER.warning)(text)
    commands = {
        f"yolo-fewshot enroll model={model} support=shots save=mine.pt": f"a folder like {folder / 'shots'}{first}",
        "yolo predict model=mine.pt source=photos": "your images",
        "yolo export model=mine.pt format=onnx": "or any other format of Ultralytics",
        f"yolo-fewshot studio model={model} source=photos": "if nothing is labeled yet",
    }
    width = max(map(len, commands))
    LOGGER.info("\nThe same with your own images:")
    LOGGER.info("\n".join(f"  {k:<{width}}  # {v}" for k, v in commands.items()))
    LOGGER.info(f"\nResults saved to {folder}")
