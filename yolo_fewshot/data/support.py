"""Support sets: the labeled examples, or shots, that classes are enrolled from."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Collection, Iterable, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ultralytics.data import utils
from ultralytics.data.dataset import YOLODataset
from ultralytics.nn.autobackend import check_class_names
from ultralytics.utils import LOGGER, NUM_THREADS, TQDM, YAML, checks

from yolo_fewshot.class_names import repeated
from yolo_fewshot.data.ignore import ignore_files, ignore_folder
from yolo_fewshot.data.labels import read_labels
from yolo_fewshot.errors import few
from yolo_fewshot.files import among

MIN_SIDE = 0.99  # minimum side of a box in pixels: 1, minus the rounding of label files
LAYOUTS = (
    "A support set is a data.yaml, a .txt list of images with YOLO label files, a folder with one sub-folder of "
    "cropped images per class, e.g. 'shots/scooter/1.jpg', or an image with objects='scooter 10 20 200 300'."
)
OBJECTS = (
    "Objects are a class name and the corners x1 y1 x2 y2 in pixels, several of them separated by ';', e.g. "
    "objects='scooter 10 20 200 300; traffic cone 220 80 250 130'."
)


class Support(NamedTuple):
    """A support set.

    Attributes:
        names (dict[int, str]): Class names by label index; not all of them need to have a box.
        labels (list[dict]): Labels of every image, as in `YOLODataset.labels`; images without a box are background.
        crops (bool): Whether the images are crops, whose box is the whole image.
        source (Path): File or folder that was read.
        channels (int): Channels of the images.
        ignore (str): Folder of ignore regions, see `MaskedDataset`; empty for none.
    """

    names: dict[int, str]
    labels: list[dict[str, Any]]
    crops: bool
    source: Path
    channels: int = 3
    ignore: str = ""

    @property
    def class_names(self) -> set[str]:
        """Names of the classes that have a box."""
        return {str(self.names[int(c)]) for x in self.labels for c in x["cls"].flat}


class SupportDataset(YOLODataset):
    """Data set of the images of a support set, without scan or label cache.

    Examples:
        >>> dataset = SupportDataset(read_support("shots.yaml"), imgsz=640)
    """

    def __init__(self, support: Support, imgsz: int, hyp: Any = None):
        """Initialize the data set.

        Args:
            support (Support): Support set.
            imgsz (int): Image size in pixels.
            hyp (Any): Arguments of a training whose augmentation applies; without them there is none.
        """
        self.support = support
        data = {"names": support.names, "channels": support.channels}
        augment = {"augment": False} if hyp is None else {"augment": True, "hyp": hyp}
        super().__init__(img_path=str(support.source), imgsz=imgsz, data=data, prefix="support: ", **augment)

    def get_img_files(self, img_path: str | list[str]) -> list[str]:
        """Return the image files of the support set."""
        return [x["im_file"] for x in self.support.labels]

    def get_labels(self) -> list[dict[str, Any]]:
        """Return the labels of the support set."""
        return list(self.support.labels)


def read_support(
    support: str | Path,
    names: dict[int, str] | None = None,
    channels: int = 3,
    objects: str | None = None,
    kpt_shape: Sequence[int] | None = None,
) -> Support:
    """Read and check a support set.

    The class names of a list are those of `classes.txt` beside it, one per line, or else of a data.yaml beside it: that
    which has the list as a split, or the only one. Without either, its class indices are those of the model.

    Args:
        support (str | Path): A data.yaml, whose train split is used, or a folder with one; a .txt list of images with
            YOLO label files; a folder with one sub-folder of cropped images per class; or an image.
        names (dict[int, str], optional): Class names of the model.
        channels (int): Channels of the images if the support set does not set them.
        objects (str, optional): Objects in the image that `support` is: class name and corners x1, y1, x2, y2 in pixels
            of each, separated by ';'.
        kpt_shape (Sequence[int], optional): Keypoints per object and their dimensions if the support set does not set
            them; they are dropped.

    Returns:
        (Support): Images in the order of the list, or sorted by folder, without duplicates.

    Raises:
        FileNotFoundError: If the support set, or an image that it lists, does not exist.
        ValueError: If there are no images or no boxes, or an image, a label file or a box is unusable.
    """
    known = {int(i): str(n) for i, n in (names or {}).items()}
    source = _find(support)
    if objects is not None:
        return _read_objects(source, str(objects), channels)
    if source.is_dir():
        return _read_crops(source, channels)
    if _is_image(source.name):
        raise ValueError(f"support='{support}' is an image, and there is no objects=. {OBJECTS}")
    data, files = _listed(source)
    if not files:
        raise ValueError(f"{source} lists no images. List at least one labeled image per class.")
    label_files = utils.img2label_paths(files)
    keypoints, dimensions = data.get("kpt_shape") or kpt_shape or (0, 0)
    labels = _verify(files, label_files, len(data.get("names", ())) or sys.maxsize, (keypoints, dimensions))
    ids = sorted({int(c) for x in labels for c in x["cls"].flat})
    if not ids:
        raise ValueError(
            f"None of the {len(files)} images of {source} has a box. Label files are looked for as in training, e.g. "
            f"{label_files[0]} for {files[0]}."
        )
    new = [] if "names" in data else [i for i in ids if i not in known]
    if new:
        LOGGER.warning(
            f"{source} has class indices that the model does not have, named {few([f'class{i}' for i in new])}. To "
            "give names, write them into classes.txt beside the list, one a line, or enroll from a data.yaml."
        )
    names = data.get("names") or known | {i: f"class{i}" for i in new}
    _check_boxes(labels, label_files, names)
    labeled = [names[i] for i in ids]
    duplicates = sorted(repeated(labeled))
    if duplicates:
        raise ValueError(f"Several class indices of {source} have the name {few(duplicates)}. Names must be unique.")
    missing = [n for n in names.values() if n not in labeled and n not in known.values()]
    if missing and source.suffix.lower() != ".txt":
        LOGGER.warning(f"No box for {few(missing)} in {source.name}. To learn a class, label at least one object.")
    return Support(names, labels, False, source, data.get("channels") or channels, ignore_folder(data))


def read_background(source: str | Path, channels: int = 3, key: str = "background") -> Support:
    """Read images without an object of the classes to enroll; label files are not read.

    Args:
        source (str | Path): Folder, .txt list of images, or image.
        channels (int): Channels of the images.
        key (str): Name of the argument, for errors.

    Returns:
        (Support): The images, as a support set without boxes.

    Raises:
        FileNotFoundError: If the source, or an image that it lists, does not exist.
        ValueError: If there are no images, or one is corrupt.
    """
    files = _background_images(source, key)
    return Support({}, _verify(files, [""] * len(files), sys.maxsize, (0, 0)), False, Path(source), channels)


def without_shots(background: Support, labels: Iterable[dict[str, Any]]) -> Support:
    """Leave out the background images that show a shot, with a warning: all of them would be negatives.

    Args:
        background (Support): Background images.
        labels (Iterable[dict]): Labels of the images of the shots, as in `YOLODataset.labels`.

    Returns:
        (Support): The others.

    Raises:
        ValueError: If there are no others.
    """
    shots = among((x["im_file"] for x in background.labels), (x["im_file"] for x in labels if len(x["cls"])))
    if not shots:
        return background
    left = [x for x in background.labels if x["im_file"] not in set(shots)]
    if not left:
        raise ValueError(
            f"All images of background={background.source} show shots. Give images without the new classes, or leave "
            "background= out."
        )
    LOGGER.warning(f"{len(shots)} images of background={background.source} show shots, and are left out: {few(shots)}.")
    return background._replace(labels=left)


def _background_images(source: str | Path, key: str = "background") -> list[str]:
    """Return the images of an argument such as `background=`."""
    path = Path(os.path.abspath(source))
    if not path.exists():
        raise FileNotFoundError(f"{key}='{source}' does not exist. It is a folder or a .txt list of images.")
    files = list_images(path) if path.is_dir() or path.suffix.lower() == ".txt" or _is_image(path.name) else []
    if not files:
        raise ValueError(f"{key}='{source}' has no images. It is a folder or a .txt list of images.")
    return list(dict.fromkeys(files))


def background_fingerprint(source: str | Path) -> tuple[tuple[str, int, int], ...]:
    """Return a fingerprint of `background=`, as `fingerprint` does of a support set.

    Args:
        source (str | Path): As for `read_background`.

    Returns:
        (tuple[tuple[str, int, int], ...]): Path, size and time of last change in ns of every image.

    Raises:
        FileNotFoundError: If the source does not exist.
        ValueError: If it has no images.
    """
    return tuple(_stat(f) for f in _background_images(source))


def fingerprint(support: str | Path) -> tuple[tuple[str, int, int], ...]:
    """Return a fingerprint of a support set, which changes with its files, without reading images or labels.

    Args:
        support (str | Path): As for `read_support`.

    Returns:
        (tuple[tuple[str, int, int], ...]): Path, size and time of last change in ns of every relevant file: images,
            label files, files of ignore regions and class names; size and time are -1 for a missing file.

    Raises:
        FileNotFoundError: If the support set does not exist.
        ValueError: If it lists no images.
    """
    source = _find(support)
    if source.is_dir():
        files: list[str | Path] = [f for x in _crop_files(source).values() for f in x]
    elif _is_image(source.name):
        files = [source]
    else:
        data, images = _listed(source)
        ignore, is_list = ignore_folder(data), source.suffix.lower() == ".txt"
        names = [source.with_name("classes.txt"), *_yamls(source.parent)] if is_list else []
        ignored = filter(None, ignore_files(images, ignore)) if ignore else []
        files = [source, *names, *images, *utils.img2label_paths(images), *ignored]
    return tuple(_stat(str(f)) for f in files)


def _stat(file: str) -> tuple[str, int, int]:
    """Return path, size and time of last change of a file; -1 for a missing file."""
    try:
        stat = os.stat(file)
    except OSError:
        return file, -1, -1
    return file, stat.st_size, stat.st_mtime_ns


def incidental_classes(support: Support, names: Collection[str]) -> list[str]:
    """Return the classes that are labeled only in images that also show a class outside of `names`.

    Args:
        support (Support): Support set.
        names (Collection[str]): Names of the classes.

    Returns:
        (list[str]): Names, in the order of `names`.
    """
    incidental: set[str] = set()
    alone: set[str] = set()
    for x in support.labels:
        classes = {str(support.names[int(c)]) for c in x["cls"].flat}
        (alone if classes <= set(names) else incidental).update(classes)
    return [n for n in names if n in incidental - alone]


def _find(support: str | Path) -> Path:
    """Return the absolute path of a support set: a YAML file, a list, or a folder of crops."""
    path = Path(support)
    if not path.exists() and path.suffix.lower() in {".yaml", ".yml"}:
        path = Path(checks.check_file(support, download=False, hard=False) or path)  # a bare name like 'coco8.yaml'
    if not path.exists():
        raise FileNotFoundError(f"support='{support}' does not exist. {LAYOUTS}")
    path = Path(os.path.abspath(path))
    yamls = _yamls(path) if path.is_dir() else []
    yamls = [x for x in yamls if _names_and_splits(x)[1]] or yamls
    if len(yamls) == 1:
        return yamls[0]
    if yamls:
        try:
            return utils.find_dataset_yaml(path)
        except AssertionError as e:
            raise ValueError(f"{path} has several YAML files. Name the one to use, e.g. support='{yamls[0]}'.") from e
    if path.is_file() and path.suffix.lower() not in {".yaml", ".yml", ".txt"} and not _is_image(path.name):
        raise ValueError(f"support='{support}' is of an unknown type. {LAYOUTS}")
    return path


def _yamls(folder: Path) -> list[Path]:
    """Return the YAML files of a folder."""
    return sorted(x for x in folder.iterdir() if x.suffix.lower() in {".yaml", ".yml"})


def _names_and_splits(file: Path) -> tuple[Any, list[Path]]:
    """Return the class names of a data.yaml, unchecked, and the paths of its splits; none of another YAML file."""
    try:
        data = YAML.load(file)
        splits = [p for split in ("train", "val", "test") for p in _split(file, data, split)]
    except (AttributeError, TypeError, ValueError):
        return None, []
    named = splits and isinstance(data.get("names"), (list, dict))
    return (data["names"], splits) if named else (None, [])


def _load_data(file: Path) -> dict[str, Any]:
    """Load a data.yaml and check the keys that a support set needs, which do not include `val`."""
    data = YAML.load(file)
    for key, what in (("train", "the images to enroll from"), ("names", "the class names")):
        if not data.get(key) or not isinstance(data[key], utils.DATASET_KEY_TYPES[key]):
            raise ValueError(f"{file} has no valid '{key}:', {what}. {LAYOUTS}")
    return data | {"names": _class_names(file, data["names"])}


def _class_names(file: Path, names: list | dict) -> dict[int, str]:
    """Check class names, and return them by index; errors name the file."""
    try:
        return check_class_names(names)
    except (KeyError, TypeError, ValueError) as e:
        raise ValueError(f"The class names in {file} are invalid: {e.args[0]}") from e


def _data_beside(file: Path) -> dict[str, Any]:
    """Return the class names, or the content of a data.yaml, from the files beside a list."""
    classes = file.with_name("classes.txt")
    if classes.is_file():
        return {"names": _class_names(classes, _lines(classes))}
    found = {}
    for yaml in _yamls(file.parent):
        names, lists = _names_and_splits(yaml)
        if file.resolve() in lists:
            return YAML.load(yaml) | {"names": _class_names(yaml, names)}
        if names:
            found[yaml] = names
    if len(found) == 1:
        yaml, names = found.popitem()
        return YAML.load(yaml) | {"names": _class_names(yaml, names)}
    if found:
        LOGGER.warning(
            f"{few([x.name for x in found])} beside {file} are not used, since none has this list as a split. Class "
            "indices are those of the model; to give names, write them into classes.txt beside the list."
        )
    return {}


def _split(file: Path, data: dict[str, Any], split: str) -> list[Path]:
    """Resolve the paths of a split as Ultralytics does, but without a val split and without downloads."""
    root = Path(data.get("path") or file.parent)
    if not root.exists() and not root.is_absolute():
        root = utils.DATASETS_DIR / root
    paths = data.get(split) or []
    if isinstance(paths, str):
        outside = paths.startswith("../") and not (root / paths).exists()
        paths = [paths[3:] if outside else paths]
    return [(root / x).resolve() for x in paths]


def _train_paths(file: Path, data: dict[str, Any]) -> list[Path]:
    """Return the paths of the train split; a missing one is an error."""
    paths = _split(file, data, "train")
    if "download" in data and not all(p.exists() for p in paths):
        utils.check_det_dataset(file)  # downloads or draws the data set
    missing = [str(p) for p in paths if not p.exists()]
    if missing:
        raise FileNotFoundError(
            f"The train split of {file} does not exist: {few(missing)}. Correct 'train:' or 'path:'."
        )
    return paths


def _listed(source: Path) -> tuple[dict[str, Any], list[str]]:
    """Return the content of a data.yaml, or of the files beside a list, and the images without duplicates."""
    if source.suffix.lower() == ".txt":
        data, files = _data_beside(source), list_images(source)
    else:
        data = _load_data(source)
        files = [x for p in _train_paths(source, data) for x in list_images(p)]
    return data, list(dict.fromkeys(files))


def _lines(file: Path) -> list[str]:
    """Return the lines of a text file, without surrounding white space and empty last ones."""
    return [x.strip() for x in file.read_text(encoding="utf-8-sig", errors="replace").rstrip().splitlines()]


def _is_image(file: str) -> bool:
    """Return whether a file has the suffix of an image."""
    return file.rpartition(".")[-1].lower() in utils.IMG_FORMATS


def list_images(path: Path) -> list[str]:
    """Return the images in and below a folder, those of a list, or the image itself.

    Args:
        path (Path): Folder, .txt list or image.

    Returns:
        (list[str]): Image files.
    """
    if path.is_dir():  # glob, unlike pathlib, leaves hidden files out
        files = glob.glob(os.path.join(glob.escape(str(path)), "**", "*.*"), recursive=True)
        return sorted(x for x in files if _is_image(x))
    if _is_image(path.name):
        return [str(path)]
    files = []
    for x in filter(None, _lines(path)):
        here = os.path.join(path.parent, x)
        # Absolute, since the label file is found by '/images/', which 'images/1.jpg' does not contain.
        files.append(os.path.abspath(here if x.startswith("./") or os.path.exists(here) else x))
    return files


def images_of(paths: str | list[str]) -> list[str]:
    """Return the images of a split.

    Args:
        paths (str | list[str]): Folders, lists or images.

    Returns:
        (list[str]): Image files without repetition.
    """
    listed = paths if isinstance(paths, list) else [paths]
    return list(dict.fromkeys(x for p in listed for x in list_images(Path(p))))


def _verify(files: list[str], label_files: list[str], nc: int, kpt_shape: tuple[int, int]) -> list[dict[str, Any]]:
    """Read the labels of images; a missing or corrupt file is an error.

    Args:
        files (list[str]): Image files.
        label_files (list[str]): Their label files, empty for none; images without one are background.
        nc (int): Number of classes.
        kpt_shape (tuple[int, int]): Keypoints per object and their dimensions, which are dropped; zeros if none.
    """
    missing = [f for f in files if not os.path.isfile(f)]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(files)} images do not exist: {few(missing)}. Paths in a list are relative to "
            "its folder, or else to the working directory."
        )
    labels, corrupt, notes, unlabeled = [], [], [], []
    with ThreadPool(NUM_THREADS) as pool:
        results = pool.imap(lambda x: read_labels(*x, nc, kpt_shape), zip(files, label_files))
        results = TQDM(results, desc="support: Scanning images...", total=len(files))
        for file, label_file, x in zip(files, label_files, results):
            if x.error:
                corrupt.append(f"{label_file if x.found else file}: {x.error}")
                continue
            if x.note:
                notes.append(f"{file}: {x.note}")
            if label_file and not x.found:
                unlabeled.append((file, label_file))
            labels.append(_label(file, x.shape, x.boxes[:, :1], x.boxes[:, 1:]))
    if corrupt:
        text = f"{len(corrupt)} of {len(files)} images or their label files are corrupt"
        raise ValueError(f"{text}: {few(corrupt, '; ')}. Correct or remove them.")
    if notes:
        LOGGER.warning("\n".join(notes))
    if unlabeled:
        LOGGER.warning(_no_label_files(unlabeled, len(files)))
    return labels


def _no_label_files(unlabeled: list[tuple[str, str]], n: int) -> str:
    """Return the warning for images without a label file, with misplaced files that look like one.

    Args:
        unlabeled (list[tuple[str, str]]): Images without a label file, and the expected label files.
        n (int): Number of all images.
    """
    misplaced = []
    for image, label in unlabeled:
        beside = os.path.splitext(image)[0]
        candidates = (f"{stem}{suffix}" for stem in (label[:-4], beside) for suffix in (".txt", ".TXT"))
        misplaced += [f"{x} should be {label}" for x in candidates if os.path.isfile(x)][:1]
    text = (
        f"{len(unlabeled)} of {n} support images have no label file and count as background: "
        f"{few([image for image, _ in unlabeled])}."
    )
    if misplaced:
        return f"{text} Label files are in the wrong place: {few(misplaced, '; ')}."
    return f"{text} Label files are looked for as in training, e.g. {unlabeled[0][1]}; background has an empty one."


def _label(file: str, shape: tuple[int, int], cls: np.ndarray, bboxes: np.ndarray) -> dict[str, Any]:
    """Return the labels of an image, as in `YOLODataset.labels`."""
    boxes = {"cls": cls, "bboxes": bboxes, "segments": [], "keypoints": None, "normalized": True, "bbox_format": "xywh"}
    return {"im_file": file, "shape": shape, **boxes}


def _check_boxes(labels: list[dict[str, Any]], label_files: list[str], names: dict[int, str]) -> None:
    """Raise an error if a box covers less than a pixel of its image."""
    bad = []
    for x, file in zip(labels, label_files):
        center, side = x["bboxes"][:, :2], x["bboxes"][:, 2:]
        inside = (center + side / 2).clip(max=1) - (center - side / 2).clip(min=0)
        for c, (w, h) in zip(x["cls"].flat, (inside * x["shape"][::-1]).clip(min=0)):
            if min(w, h) < MIN_SIDE:
                bad.append(f"{file}: {names[int(c)]} ({w:.3g} x {h:.3g} pixels)")
    if bad:
        raise ValueError(
            f"{len(bad)} of the boxes cover less than a pixel of their image in width or height: {few(bad)}. "
            "Correct or remove them."
        )


def _crop_files(folder: Path) -> dict[str, list[str]]:
    """Return the images of every sub-folder of a folder of crops, by its name."""
    return {
        x.name: sorted(str(f) for f in x.iterdir() if _is_image(f.name) and not f.name.startswith("."))
        for x in sorted(folder.iterdir())
        if x.is_dir() and not x.name.startswith(".")
    }


def _read_crops(folder: Path, channels: int) -> Support:
    """Read a folder with one sub-folder of cropped images per class, named after it."""
    classes = _crop_files(folder)
    if not classes:
        raise ValueError(f"{folder} has neither a data.yaml nor sub-folders. {LAYOUTS}")
    if "images" in classes:  # not a class but the images of a data set
        raise ValueError(f"{folder} looks like a data set with labels, but has no data.yaml. {LAYOUTS}")
    empty = [name for name, files in classes.items() if not files]
    if empty:
        raise ValueError(f"No images in the sub-folders {few(empty)} of {folder}. {LAYOUTS}")
    files = [f for x in classes.values() for f in x]
    labeled = [x for x in utils.img2label_paths(files) if os.path.isfile(x)]
    if 2 * len(labeled) > len(files):  # not crops but the images of a data set, in sub-folders of splits
        raise ValueError(f"{folder} has images with label files, such as {labeled[0]}, but no data.yaml. {LAYOUTS}")
    ids = np.repeat(np.arange(len(classes), dtype=np.float32), [len(x) for x in classes.values()])
    labels = _verify(files, [""] * len(files), len(classes), (0, 0))
    whole = np.array([[0.5, 0.5, 1, 1]], dtype=np.float32)
    labels = [x | {"cls": i.reshape(1, 1), "bboxes": whole.copy()} for x, i in zip(labels, ids)]
    return Support(dict(enumerate(classes)), labels, True, folder, channels)


def _read_objects(image: Path, objects: str, channels: int) -> Support:
    """Read the objects of an image from a text of class names and corners."""
    if not _is_image(image.name):
        raise ValueError(f"objects='{objects}' needs an image, and support='{image}' is none. {OBJECTS}")
    (label,) = _verify([str(image)], [""], sys.maxsize, (0, 0))
    height, width = label["shape"]
    names, boxes = [], []
    for text in filter(None, map(str.strip, objects.split(";"))):
        words = text.replace(",", " ").split()
        try:
            x1, y1, x2, y2 = (float(x) for x in words[-4:])
        except ValueError:
            words = []
        if len(words) < 5:
            raise ValueError(f"'{text}' in objects= is not a class name and four numbers. {OBJECTS}")
        if x1 >= x2 or y1 >= y2:
            raise ValueError(
                f"The box of '{text}' in objects= has no area: x2 must be larger than x1, and y2 than y1. {OBJECTS}"
            )
        if not (-1 <= x1 < x2 <= width + 1 and -1 <= y1 < y2 <= height + 1):
            raise ValueError(
                f"The box of '{text}' in objects= is not within {image}, which is {width} x {height} pixels. {OBJECTS}"
            )
        names.append(" ".join(words[:-4]))
        boxes.append([(x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height])
    if not boxes:
        raise ValueError(f"objects='{objects}' is empty. {OBJECTS}")
    classes = list(dict.fromkeys(names))
    cls = np.array([[classes.index(n)] for n in names], dtype=np.float32)
    labels = [label | {"cls": cls, "bboxes": np.array(boxes, dtype=np.float32)}]
    _check_boxes(labels, [str(image)], dict(enumerate(classes)))
    return Support(dict(enumerate(classes)), labels, False, image, channels)
