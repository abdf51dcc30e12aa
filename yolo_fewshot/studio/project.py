"""A project of the studio on disk: images, labels as a YOLO data set, and the session; saved after every action.

`session.json` says everything. `labels/`, `train.txt` and `data.yaml` follow from it and are an ordinary YOLO data set.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import zipfile
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from yolo_fewshot.errors import few
from yolo_fewshot.files import AtomicPath
from yolo_fewshot.studio.images import Checked, check_image

SESSION = "session.json"
VERSION = 1
FILE = re.compile(r"[0-9a-f]{64}\.(jpg|png|webp|bmp)")  # of an image, by its content
MAX_NAME = 60  # characters of a class name
MIN_SIDE = 2  # minimum side of a box in pixels
IOU_SAME = 0.5  # IoU from which two boxes are the same object


@dataclass(frozen=True)
class Box:
    """A labeled object, or one that the user rejected.

    Attributes:
        id (int): Number, unique in the project.
        name (str): Class name.
        xyxy (tuple[float, float, float, float]): Corners in 0..1.
    """

    id: int
    name: str
    xyxy: tuple[float, float, float, float]


@dataclass
class LabeledImage:
    """An image of a project.

    Attributes:
        file (str): File name in `images/`: SHA-256 of the content and suffix.
        name (str): Name that the user gave it, for display only.
        size (tuple[int, int]): Width and height in pixels.
        boxes (list[Box]): Labeled objects.
        rejected (list[Box]): What is not an object of the class.
        empty (bool): Whether the user said that it shows none of the classes.
    """

    file: str
    name: str
    size: tuple[int, int]
    boxes: list[Box] = field(default_factory=list)
    rejected: list[Box] = field(default_factory=list)
    empty: bool = False

    @property
    def key(self) -> str:
        """Content hash."""
        return self.file.partition(".")[0]

    @property
    def labeled(self) -> bool:
        """Whether the labels are complete, so that what has no box is background."""
        return bool(self.boxes) or self.empty


class Project:
    """A folder with images, labels and session. Threads may share it.

    Attributes:
        folder (Path): The folder.
        images (dict[str, LabeledImage]): Images by content hash, in the order in which they were added.
        conf (dict[str, float]): Confidence threshold of the classes for which the user has set one.
        unsaved (bool): Whether the last save failed, as on a full disk.
        about (dict[str, Any]): What the studio remembers, such as the model.

    Examples:
        >>> project = Project("scooters")
        >>> key = project.add(Path("street.jpg").read_bytes(), "street.jpg")
        >>> project.label(key, "scooter", (0.1, 0.2, 0.3, 0.4))
    """

    def __init__(self, folder: str | Path):
        """Open a project, or start one.

        Args:
            folder (str | Path): The folder.

        Raises:
            ValueError: If the folder holds something else, the session is unreadable, or another studio has it open.
            FileNotFoundError: If an image of the session is missing.
        """
        self.folder = Path(os.path.abspath(folder))
        self.images: dict[str, LabeledImage] = {}
        self.conf: dict[str, float] = {}
        self.about: dict[str, Any] = {}
        self.unsaved = False
        self.lock = threading.RLock()
        self._next = 1
        self._written: dict[Path, str] = {}
        session = self.folder / SESSION
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"folder='{folder}' is a file. Name a folder for the project.")
        if self.folder.is_dir() and not session.exists() and any(self._foreign()):
            raise ValueError(
                f"folder='{folder}' is not empty and holds no {SESSION} of the studio. Name a new folder for the "
                "project; source= adds the images of a folder to it."
            )
        for name in ("images", "labels", "thumbs"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self._claim = _claim(self.folder)
        try:
            if session.exists():
                self._load(session)
            self.save()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Save what a full disk has kept from being saved, and let another studio open the folder."""
        if self._claim is not None:
            if self.unsaved:
                with suppress(OSError):
                    self.save()
            self._claim.close()
            self._claim = None

    def add(self, data: bytes, name: str, save: bool = True) -> str:
        """Add an image; one of the same content is not added twice.

        Args:
            data (bytes): Content of its file.
            name (str): Name for display, which is never used as a path.
            save (bool): Whether to save the session, too, which takes longer the more images there are.

        Returns:
            (str): Its key.

        Raises:
            ValueError: If it is no image, broken, or too large.
        """
        return self.store(check_image(data, display_name(name)), name, save)

    def store(self, checked: Checked, name: str, save: bool = True) -> str:
        """Add an image that was checked, see `add`.

        Args:
            checked (Checked): The image.
            name (str): Name for display.
            save (bool): Whether to save the session, too.

        Returns:
            (str): Its key.
        """
        key = hashlib.sha256(checked.data).hexdigest()
        with self.lock:
            if key not in self.images:
                image = LabeledImage(f"{key}{checked.suffix}", display_name(name), checked.size)
                AtomicPath(self.path(image)).write_bytes(checked.data)
                AtomicPath(self.thumb(key)).write_bytes(checked.thumb)
                self.images[key] = image
                if save:
                    self.save()
        return key

    def remove(self, key: str) -> None:
        """Remove an image and its labels.

        Args:
            key (str): Its key.
        """
        with self.lock:
            image = self.images.pop(key)
            self.save()
            for file in (self.path(image), self.thumb(key), self._label_file(image)):
                self._unlink(file)

    def label(self, key: str, name: str, xyxy: tuple[float, float, float, float]) -> Box:
        """Label an object.

        Args:
            key (str): Image.
            name (str): Class name.
            xyxy (tuple[float, float, float, float]): Two opposite corners in 0..1.

        Returns:
            (Box): The box, within the image.

        Raises:
            ValueError: If the name is unusable, or the box covers too little of the image.
        """
        with self.lock:
            image = self.images[key]
            box = Box(self._next, class_name(name), self._corners(image, xyxy))
            self._next += 1
            image.boxes.append(box)
            image.rejected = [x for x in image.rejected if iou(x.xyxy, box.xyxy) < IOU_SAME]
            image.empty = False
            self.save()
        return box

    def unlabel(self, key: str, number: int) -> None:
        """Take a label, or a rejection, back.

        Args:
            key (str): Image.
            number (int): Number of the box.
        """
        with self.lock:
            image = self.images[key]
            image.boxes = [x for x in image.boxes if x.id != number]
            image.rejected = [x for x in image.rejected if x.id != number]
            self.save()

    def reject(self, key: str, name: str, xyxy: tuple[float, float, float, float]) -> Box:
        """Say that something is not an object of a class.

        Args:
            key (str): Image.
            name (str): Class name.
            xyxy (tuple[float, float, float, float]): Corners in 0..1.

        Returns:
            (Box): The rejected box.
        """
        with self.lock:
            image = self.images[key]
            box = Box(self._next, class_name(name), self._corners(image, xyxy))
            self._next += 1
            image.rejected.append(box)
            self.save()
        return box

    def set_empty(self, key: str, empty: bool) -> None:
        """Say whether an image shows none of the classes.

        Args:
            key (str): Image.
            empty (bool): Whether it does.

        Raises:
            ValueError: If it has labels.
        """
        with self.lock:
            if empty and self.images[key].boxes:
                raise ValueError("The image has labeled objects. Remove their boxes first.")
            self.images[key].empty = empty
            self.save()

    def rename(self, old: str, new: str) -> None:
        """Rename a class; if the new name is in use, the two become one.

        Args:
            old (str): Class name.
            new (str): New class name.

        Raises:
            ValueError: If the new name is unusable.
        """
        new = class_name(new)
        with self.lock:
            for image in self.images.values():
                for boxes in (image.boxes, image.rejected):
                    boxes[:] = [Box(x.id, new, x.xyxy) if x.name == old else x for x in boxes]
            if old in self.conf:
                self.conf.setdefault(new, self.conf.pop(old))
            self.save()

    def forget(self, name: str) -> None:
        """Remove all labels of a class.

        Args:
            name (str): Class name.
        """
        with self.lock:
            for image in self.images.values():
                image.boxes = [x for x in image.boxes if x.name != name]
                image.rejected = [x for x in image.rejected if x.name != name]
            self.conf.pop(name, None)
            self.save()

    def set_conf(self, name: str, conf: float | None) -> None:
        """Set the confidence threshold of a class.

        Args:
            name (str): Class name.
            conf (float, optional): Threshold in 0..1; None for the suggested one.
        """
        with self.lock:
            if conf is None:
                self.conf.pop(name, None)
            else:
                self.conf[name] = min(max(float(conf), 0.0), 1.0)
            self.save()

    @property
    def names(self) -> list[str]:
        """Names of the classes that have a box, in the order of their first boxes."""
        boxes = sorted((x for p in list(self.images.values()) for x in p.boxes), key=lambda x: x.id)
        return list(dict.fromkeys(x.name for x in boxes))

    def path(self, image: LabeledImage) -> Path:
        """Return the file of an image."""
        return self.folder / "images" / image.file

    def thumb(self, key: str) -> Path:
        """Return the file of the thumbnail of an image."""
        return self.folder / "thumbs" / f"{key}.jpg"

    @property
    def data(self) -> Path:
        """The data.yaml, which exists if there is a label."""
        return self.folder / "data.yaml"

    def save(self) -> None:
        """Write the session, then the labels; each file is replaced at once."""
        with self.lock:
            self.unsaved = True
            images = [asdict(p) for p in self.images.values()]
            session = {"version": VERSION, "next": self._next, "about": self.about, "conf": self.conf, "images": images}
            self._write(self.folder / SESSION, json.dumps(session, ensure_ascii=False, indent=1))
            names = self.names
            labeled = [p for p in self.images.values() if p.labeled]
            for p in labeled:
                self._write(self._label_file(p), "".join(_line(names.index(x.name), x.xyxy) for x in p.boxes))
            present = set(os.listdir(self.folder / "labels"))  # faster than to look for the file of every image
            for p in self.images.values():
                if not p.labeled and self._label_file(p).name in present:
                    self._unlink(self._label_file(p))
            files = [self.folder / "train.txt", self.data]
            if names:
                content = {"train": "train.txt", "val": "train.txt", "names": dict(enumerate(names))}
                self._write(files[0], "".join(f"./images/{p.file}\n" for p in labeled))
                self._write(files[1], yaml.safe_dump(content, allow_unicode=True, sort_keys=False))
            else:
                for file in files:
                    self._unlink(file)
            self.unsaved = False

    def archive(self, file: Path) -> None:
        """Write the data set as a zip: data.yaml, train.txt, and the labeled images with their labels.

        Args:
            file (Path): File to write.

        Raises:
            ValueError: If nothing is labeled.
        """
        file = Path(os.path.realpath(file))
        part = Path(f"{file}.part")
        with self.lock:
            if not self.names:
                raise ValueError("Nothing is labeled yet. Draw a box first.")
            labeled = [p for p in self.images.values() if p.labeled]
            files = [self.data, self.folder / "train.txt"]
            files += [x for p in labeled for x in (self.path(p), self._label_file(p))]
            try:
                with zipfile.ZipFile(part, "w") as z:
                    for x in files:
                        z.write(x, x.relative_to(self.folder).as_posix())
                os.replace(part, file)
            finally:
                part.unlink(missing_ok=True)

    def _write(self, file: Path, text: str) -> None:
        """Write a file atomically if its content has changed."""
        if self._written.get(file) != text:
            AtomicPath(file).write_bytes(text.encode())
            self._written[file] = text

    def _unlink(self, file: Path) -> None:
        """Remove a file, if there is one."""
        self._written.pop(file, None)
        file.unlink(missing_ok=True)

    def _label_file(self, image: LabeledImage) -> Path:
        """Return the label file of an image."""
        return self.folder / "labels" / f"{image.key}.txt"

    def _foreign(self) -> list[str]:
        """Return what is in the folder that a project without a session may not have."""
        return [x.name for x in self.folder.iterdir() if not x.name.startswith(".")]

    def _corners(self, image: LabeledImage, xyxy: tuple[float, ...]) -> tuple[float, float, float, float]:
        """Return the corners of a box within an image, upper left first."""
        x1, y1, x2, y2 = (round(min(max(float(v), 0.0), 1.0), 6) for v in xyxy)
        box = min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)
        w, h = (box[2] - box[0]) * image.size[0], (box[3] - box[1]) * image.size[1]
        if min(w, h) < MIN_SIDE:
            raise ValueError(f"The box covers {w:.0f} x {h:.0f} pixels of the image. Draw a larger one.")
        return box

    def _load(self, session: Path) -> None:
        """Read the session."""
        try:
            state = json.loads(session.read_text(encoding="utf-8"))
            if state["version"] != VERSION:
                raise ValueError(f"its version is {state['version']}, and this studio reads {VERSION}")
            for x in state["images"]:
                boxes, rejected = (
                    [Box(b["id"], str(b["name"]), tuple(b["xyxy"])) for b in x[k]] for k in ("boxes", "rejected")
                )
                image = LabeledImage(x["file"], str(x["name"]), tuple(x["size"]), boxes, rejected, bool(x["empty"]))
                if not FILE.fullmatch(image.file):
                    raise ValueError(f"'{image.file}' is not the name of an image of the studio")
                self.images[image.key] = image
            self.conf = {str(k): float(v) for k, v in state["conf"].items()}
            self.about, self._next = dict(state["about"]), int(state["next"])
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise ValueError(f"{session} cannot be read: {e}. Restore it, or name another folder.") from e
        missing = [p.file for p in self.images.values() if not self.path(p).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{len(missing)} images of {session} are missing in {self.folder / 'images'}: {few(missing)}. Restore "
                "them, or name another folder."
            )


def display_name(name: str) -> str:
    """Return the last part of a file name without control characters, for display.

    Args:
        name (str): Name from a user.

    Returns:
        (str): At most 100 characters.
    """
    last = str(name).replace("\\", "/").rpartition("/")[2]
    return "".join(c for c in last if c.isprintable())[:100] or "image"


def class_name(name: str) -> str:
    """Return a class name without surplus white space.

    Args:
        name (str): Name from a user.

    Returns:
        (str): The name.

    Raises:
        ValueError: If it is empty, too long or not printable.
    """
    text = " ".join(str(name).split())
    if not text or len(text) > MAX_NAME or not text.isprintable():
        raise ValueError(f"A class needs a name of 1 to {MAX_NAME} printable characters.")
    return text


def iou(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Return the IoU of two boxes x1, y1, x2, y2.

    Args:
        a (tuple[float, ...]): Box.
        b (tuple[float, ...]): Box.

    Returns:
        (float): In 0..1.
    """
    w, h = (max(min(a[i + 2], b[i + 2]) - max(a[i], b[i]), 0.0) for i in (0, 1))
    areas = [(x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)]
    return w * h / max(sum(areas) - w * h, 1e-12)


def _line(index: int, xyxy: tuple[float, float, float, float]) -> str:
    """Return a line of a label file."""
    x1, y1, x2, y2 = xyxy
    return f"{index} {(x1 + x2) / 2:.6f} {(y1 + y2) / 2:.6f} {x2 - x1:.6f} {y2 - y1:.6f}\n"


def _claim(folder: Path) -> Any:
    """Lock the folder for this process, and return what holds the lock."""
    file = open(folder / ".lock", "a+")  # noqa: SIM115  (stays open)
    try:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # Windows
            import msvcrt

            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
    except OSError as e:
        file.close()
        raise ValueError(f"{folder} is open in another studio. Close it there, or name another folder.") from e
    return file
