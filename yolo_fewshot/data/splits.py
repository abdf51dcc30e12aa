"""K-shot splits of a detection data set: base classes with all labels, novel classes with K labeled objects."""

from __future__ import annotations

import difflib
import json
import os
import shlex
import shutil
from collections import Counter, defaultdict
from itertools import islice, product
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ultralytics.data import utils
from ultralytics.utils import LOGGER, NUM_THREADS, TQDM, YAML, ops

import yolo_fewshot
from yolo_fewshot.class_names import repeated
from yolo_fewshot.data.ignore import ignore_files, ignore_folder, read_boxes
from yolo_fewshot.data.labels import read_labels
from yolo_fewshot.data.support import MIN_SIDE, list_images
from yolo_fewshot.errors import few
from yolo_fewshot.files import sha256
from yolo_fewshot.inputs import check_yaml_file, new_folder
from yolo_fewshot.paths import cfg_dir


class Image(NamedTuple):
    """Image of a data set.

    Attributes:
        file (str): Its path.
        name (str): Its file name in the new folders.
        shape (tuple[int, int]): Height and width in pixels.
        digest (str): SHA-256 of its content.
        rows (np.ndarray): Class, x, y, w, h, normalized, and 1 for a crowd or 2 for an ignore region, of every
            object, (n, 6) float64.
    """

    file: str
    name: str
    shape: tuple[int, int]
    digest: str
    rows: np.ndarray


REGION = 2  # in the last column of the rows of an image, for an ignore region
# Image, label file, number of classes, keypoint shape, and file of ignore regions, or the rows from a COCO json.
Task = tuple[Any, ...]
View = list[tuple[Image, np.ndarray]]  # images of a new folder, and a mask of the objects that are labeled there


def split(
    data: str | Path,
    novel: str | Path | list[str] | tuple[str, ...],
    out: str | Path,
    shots: str | int | list[int] | tuple[int, ...] = (1, 3, 5, 10),
    seeds: int = 3,
    val: str | Path | None = None,
    images: str | Path | None = None,
    val_images: str | Path | None = None,
) -> Path:
    """Split a detection data set into base classes and K shots of novel classes.

    All input is checked first, and the folder appears when it is complete. Images are linked, or copied if the system
    supports neither symbolic nor hard links.

    Args:
        data (str | Path): A YOLO data.yaml, or the COCO json of the train images.
        novel (str | Path | list[str] | tuple[str, ...]): Names of the novel classes, comma-separated in a str, or a
            YAML file with a list `novel`, e.g. 'voc-split1.yaml'.
        out (str | Path): New or empty folder to write.
        shots (str | int | list[int] | tuple[int, ...]): Numbers of labeled objects of each novel class.
        seeds (int): Number of draws.
        val (str | Path, optional): COCO json of the val images.
        images (str | Path, optional): Folder of the train images of a COCO json.
        val_images (str | Path, optional): Folder of its val images, `images` if not given.

    Returns:
        (Path): The folder.

    Raises:
        FileNotFoundError: If a file, a split or an image of a COCO json does not exist.
        PermissionError: If the folder cannot be written.
        ValueError: If an argument is invalid, or the data set has too few objects or images.

    Examples:
        >>> split("VOC.yaml", "voc-split1.yaml", "voc1")
    """
    counts, target, chosen = shot_counts(shots), new_folder(out), _novel_names(novel)
    if type(seeds) is not int or seeds < 1:
        raise ValueError(f"'seeds={seeds}' is an invalid value. It must be an int of at least 1, the number of draws.")
    if Path(data).suffix.lower() == ".json":
        old, tasks, channels = _read_coco(data, val, images, val_images or images)
    elif val or images or val_images:
        raise ValueError(f"val=, images= and val_images= are for a COCO json, which '{data}' is not. Leave them out.")
    else:
        if not Path(data).is_dir():  # else Ultralytics finds the YAML in it
            check_yaml_file("data", data)
        old, tasks, channels = _read_yolo(data)
    names = _order(old, chosen, data)
    n_base = len(names) - len(chosen)
    train, test = _read_images(tasks, np.array([names.index(n) for n in old]))
    candidates = _candidates(train, test, len(names))
    _check_shots(candidates[n_base:], chosen, counts)
    views = _views(train, test, n_base, data)
    drawn = {seed: _shot_views(views, train, candidates, names, n_base, counts, seed) for seed in range(seeds)}
    given = {"data": data, "novel": novel, "val": val, "images": images, "val_images": val_images}
    manifest = {
        "version": yolo_fewshot.__version__,
        "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in given.items()},
        "base": names[:n_base],
        "novel": chosen,
        "seeds": list(range(seeds)),
        "shots": counts,
        "counts": {k: _count(v, names) for k, v in views.items()},
        "drawn": drawn,
    }
    _save(target, views, _yamls(names, n_base, counts, seeds, channels), manifest)
    base, every, shots = (
        shlex.quote(f"{k}={target}/{x}.yaml")
        for k, x in (("data", "base"), ("data", "data"), ("support", f"novel_{counts[-1]}shot_seed0"))
    )
    LOGGER.info(
        f"{n_base} base classes in {len(views['base_train'])} train images, {len(chosen)} novel classes in {seeds} "
        f"draws of {', '.join(map(str, counts))} shots, {len(test)} val images. Results saved to {target}\n"
        f"Train:   yolo train model=fewshot.yaml cfg=stage1.yaml {base}\n"
        f"Measure: yolo val model=best.pt {every} {shots}"
    )
    return target


def shot_counts(shots: Any) -> list[int]:
    """Parse numbers of shots.

    Args:
        shots (Any): A list of numbers, or a comma-separated str.

    Returns:
        (list[int]): The numbers, sorted.

    Raises:
        ValueError: If a number is not an int of at least 1.
    """
    values = [str(x).strip() for x in (shots if isinstance(shots, (list, tuple)) else str(shots).split(","))]
    if not values or not all(x.isdecimal() and int(x) for x in values):
        raise ValueError(f"'shots={shots}' is an invalid value. It must be ints of at least 1, e.g. shots=1,3,5,10.")
    return sorted({int(x) for x in values})


def _novel_names(novel: Any) -> list[str]:
    """Return the names of the novel classes from a list, a comma-separated str, or a YAML file, also one of ours."""
    names = novel
    if isinstance(novel, (str, Path)) and Path(novel).suffix.lower() in {".yaml", ".yml"}:
        ours = cfg_dir() / "protocols"
        file = next((x for x in (Path(novel), ours / novel) if x.is_file()), None)
        if file is None:
            known = few(sorted(x.name for x in ours.glob("*.yaml")))
            raise FileNotFoundError(
                f"'novel={novel}' does not exist. Give class names, a YAML file, or one of {known}."
            )
        names = YAML.load(file).get("novel")
        if not isinstance(names, list):
            raise ValueError(f"'novel={novel}' has no list of novel classes. Write one, e.g. 'novel: [bird, bus]'.")
    elif not isinstance(novel, (list, tuple)):
        names = str(novel).strip().removeprefix("[").removesuffix("]").split(",")
    names = [x for x in (str(n).strip().strip("'\"") for n in names) if x]
    duplicates = sorted(repeated(names))
    if duplicates or not names:
        text = f"names {few(duplicates)} more than once" if duplicates else "names no class"
        raise ValueError(f"'novel={novel}' {text}. Name every novel class once, e.g. novel=bird,bus.")
    return names


def _read_yolo(data: str | Path) -> tuple[list[str], dict[str, list[Task]], int]:
    """Return the class names, the images with their label files, and the channels of a data.yaml."""
    try:
        info = utils.check_det_dataset(data)
    except SyntaxError as e:
        raise ValueError(f"{e} A split needs all of 'train:', 'val:' and 'names:'.") from e
    tasks = {}
    for key in ("train", "val"):
        paths = [Path(x) for x in (info[key] if isinstance(info[key], list) else [info[key]]) if x]
        if not paths:
            raise ValueError(f"'{key}:' of {data} is empty. A split needs labeled train and val images.")
        missing = [str(x) for x in paths if not x.exists()]
        if missing:
            raise FileNotFoundError(f"'{key}:' of {data} does not exist: {few(missing)}. Correct it, or 'path:'.")
        files = sorted({x for p in paths for x in list_images(p)})
        kpt_shape = info.get("kpt_shape") or (0, 0)
        regions = ignore_files(files, folder) if (folder := ignore_folder(info)) else [""] * len(files)
        items = zip(files, utils.img2label_paths(files), regions)
        tasks[key] = [(f, label, info["nc"], kpt_shape, region) for f, label, region in items]
    return [info["names"][i] for i in range(info["nc"])], tasks, info["channels"]


def _read_coco(data: Any, val: Any, images: Any, val_images: Any) -> tuple[list[str], dict[str, list[Task]], int]:
    """Return the class names, the images with their rows, and the channels of two COCO jsons."""
    if not (val and images):
        raise ValueError(
            "val= and images= must be given with a COCO json, e.g. data=instances_train.json images=train2017 "
            "val=instances_val.json val_images=val2017."
        )
    names: list[str] = []
    tasks = {}
    for key, file, folder in (("train", data, images), ("val", val, val_images)):
        try:
            categories, tasks[key] = _load_coco(Path(file), str(folder), names)
        except (AttributeError, KeyError, TypeError, ValueError) as e:
            raise ValueError(
                f"{file} is not a COCO json of boxes: {e!r}. It needs 'images' with id, file_name, width and height, "
                "'annotations' with image_id, category_id and bbox, and 'categories' with id and name."
            ) from e
        _check_unique(categories, file)
        names = names or categories
        unknown = sorted(set(categories) - set(names))
        if unknown:
            raise ValueError(f"{file} has categories that {data} does not have: {few(unknown)}. Correct their names.")
        missing = [x[0] for x in tasks[key] if not os.path.isfile(x[0])]
        if missing:
            raise FileNotFoundError(
                f"{len(missing)} of {len(tasks[key])} images of {file} do not exist: {few(missing)}. Correct "
                f"{'images' if key == 'train' else 'val_images'}=."
            )
    return names, tasks, 3


def _load_coco(file: Path, folder: str, names: list[str]) -> tuple[list[str], list[Task]]:
    """Return the class names and the images with their rows of a COCO json; `names` sets the class indices if given."""
    content, objects = json.loads(file.read_text(encoding="utf-8")), defaultdict(list)
    categories = {x["id"]: str(x["name"]) for x in sorted(content["categories"], key=lambda x: x["id"])}
    index = {n: i for i, n in enumerate(names or categories.values())}
    ids = {i: index.get(n, -1) for i, n in categories.items()}
    for x in content["annotations"]:
        left, top, w, h = x["bbox"]
        objects[x["image_id"]].append((ids[x["category_id"]], left, top, w, h, bool(x.get("iscrowd"))))
    tasks = []
    for x in sorted(content["images"], key=lambda x: x["file_name"]):
        rows = np.array(objects[x["id"]], float).reshape(-1, 6)
        rows[:, 1:5] = ops.xyxy2xywhn(ops.ltwh2xyxy(rows[:, 1:5]), x["width"], x["height"], clip=True)
        tasks.append((os.path.abspath(os.path.join(folder, x["file_name"])), "", 0, (0, 0), rows))
    return list(categories.values()), tasks


def _check_unique(names: list[str], data: Any) -> None:
    """Raise an error if several classes have the same name."""
    duplicates = repeated(names)
    if duplicates:
        raise ValueError(f"Several classes of {data} have the name {few(duplicates)}. Names must be unique.")


def _order(names: list[str], novel: list[str], data: Any) -> list[str]:
    """Return the class names, base classes first."""
    _check_unique(names, data)
    unknown = {n: difflib.get_close_matches(n, names) for n in novel if n not in names}
    if unknown:
        listed = few([f"{n} (similar: {', '.join(x)})" if x else n for n, x in unknown.items()])
        raise ValueError(f"'novel=' names classes that {data} does not have: {listed}. It has {few(names, n=20)}.")
    base = [n for n in names if n not in novel]
    if not base:
        raise ValueError(f"'novel=' names all classes of {data}. Leave base classes to learn from.")
    return [*base, *novel]


def _read_images(tasks: dict[str, list[Task]], ids: np.ndarray) -> list[list[Image]]:
    """Read the train and val images, and warn of those that training leaves out."""
    read, left_out = [], []
    with ThreadPool(NUM_THREADS) as pool:
        for key, items in tasks.items():
            looks = TQDM(pool.imap(_read_image, items), desc=f"{key}: Reading images...", total=len(items))
            images: list[Image] = []
            taken: set[str] = set()
            copies: Counter[str] = Counter()
            for (rows, shape, digest, reason), (file, *_) in zip(looks, items):
                if reason:
                    left_out.append(f"{file}: {reason}")
                    continue
                rows[:, 0] = ids[rows[:, 0].astype(int)]
                rows[rows[:, 5] == REGION, 0] = 0  # a base class, which is ignored like a crowd of it
                # Sorted, so that the split does not depend on the order of the labels.
                rows = np.unique(rows[(rows[:, 3:5] > 0).all(1)], axis=0)
                images.append(Image(file, unique_name(file, taken, copies), shape, digest, rows))
            if not images:
                raise ValueError(f"No usable image in {key}: {few(left_out, '; ') or 'it lists none'}.")
            read.append(images)
    if left_out:
        LOGGER.warning(f"{len(left_out)} images are left out, as in training: {few(left_out, '; ')}.")
    return read


def _read_image(task: Task) -> tuple[Any, Any, str, str]:
    """Return the rows, the shape and the SHA-256 of an image, or the reason why training leaves it out."""
    file, label_file, nc, kpt_shape, rows = task
    labels = read_labels(file, label_file, nc, kpt_shape)
    if labels.error:
        return None, None, "", labels.error
    if isinstance(rows, str):
        regions = read_boxes(rows).astype(float)
        rows = np.pad(labels.boxes.astype(float), ((0, 0), (0, 1)))
        rows = np.concatenate([rows, np.pad(regions, ((0, 0), (1, 1)), constant_values=(0, REGION))])
    return rows.round(6), labels.shape, sha256(Path(file)), ""


def unique_name(file: str, taken: set[str], copies: Counter[str]) -> str:
    """Return the name of an image, with a number if its stem, which names the label file, is taken.

    Args:
        file (str): Path of the image.
        taken (set[str]): Stems that are taken, casefolded; the new one is added.
        copies (Counter[str]): Number of names that were numbered, by stem; changed in place.

    Returns:
        (str): File name.
    """
    stem, suffix = os.path.splitext(os.path.basename(file).lstrip("."))  # hidden files are not listed
    name = stem
    while name.casefold() in taken:
        copies[stem] += 1
        name = f"{stem}_{copies[stem] + 1}"
    taken.add(name.casefold())
    return name + suffix


def _candidates(train: list[Image], val: list[Image], nc: int) -> list[dict[int, list[int]]]:
    """Return the train images with possible shots of each class, and the indices of these objects."""
    digests = {p.digest for p in val}
    copies = [p.file for p in train if p.digest in digests]
    if copies:
        LOGGER.warning(
            f"{len(copies)} train images are also val images, so that they give no shots and are left out of the base "
            f"images: {few(copies)}."
        )
    found: list[dict[int, list[int]]] = [defaultdict(list) for _ in range(nc)]
    for i, p in enumerate(train):
        if p.digest not in digests:
            digests.add(p.digest)  # duplicates of a train image give no shots
            center, side = p.rows[:, 1:3], p.rows[:, 3:5]
            inside = (center + side / 2).clip(max=1) - (center - side / 2).clip(min=0)
            usable = (inside * p.shape[::-1] >= MIN_SIDE).all(1) & (p.rows[:, 5] == 0)
            for j in np.flatnonzero(usable):
                found[int(p.rows[j, 0])][i].append(int(j))
    return found


def _check_shots(candidates: list[dict[int, list[int]]], novel: list[str], counts: list[int]) -> None:
    """Raise an error if a novel class has too few objects."""
    objects = {n: sum(map(len, x.values())) for n, x in zip(novel, candidates)}
    scarce = [f"{n} ({k})" for n, k in objects.items() if k < counts[-1]]
    if scarce:
        enough = ",".join(str(k) for k in counts if k <= min(objects.values()))
        raise ValueError(
            f"{len(scarce)} novel classes have fewer than {counts[-1]} objects in usable train images: {few(scarce)}"
            f". Label more, or {f'set shots={enough}' if enough else 'leave them out of novel='}."
        )


def _views(train: list[Image], val: list[Image], n_base: int, data: Any) -> dict[str, View]:
    """Return the images of the base and query folders."""
    views: dict[str, View] = {"base_train": [], "base_val": [], "query": [], "novel_query": []}
    measured = {p.digest for p in val}
    for p in train:
        base = (p.rows[:, 0] < n_base) & (p.rows[:, 5] == 0)
        if p.digest not in measured and (base.any() or (p.rows[:, 0] < n_base).all()):
            views["base_train"].append((p, base))
    for p in val:
        objects = p.rows[:, 5] == 0
        base, novel = objects & (p.rows[:, 0] < n_base), objects & (p.rows[:, 0] >= n_base)
        views["query"].append((p, objects))
        if base.any():
            views["base_val"].append((p, base))
        if novel.any():
            views["novel_query"].append((p, objects))
    for key, kind, part in (
        ("base_train", "base", "train"),
        ("base_val", "base", "val"),
        ("novel_query", "novel", "val"),
    ):
        if not any(labeled.any() for _, labeled in views[key]):
            raise ValueError(f"No {part} image of {data} shows a {kind} class. Label some, or choose other classes.")
    return views


def _shot_views(
    views: dict[str, View],
    train: list[Image],
    candidates: list[dict[int, list[int]]],
    names: list[str],
    n_base: int,
    counts: list[int],
    seed: int,
) -> dict[int, dict[str, dict[str, list[str]]]]:
    """Add the folders of shots of a seed, and return the files of each class by number of shots and kind of folder."""
    draws = [_draw(x, (seed, c), counts[-1]) for c, x in enumerate(candidates)]
    drawn: dict[int, dict[str, dict[str, list[str]]]] = {}
    for k in counts:
        drawn[k] = {"novel": {}, "all": {}}
        for files, suffix, first in zip(drawn[k].values(), ("", "_all"), (n_base, 0)):
            folder = f"shots/seed{seed}_{k}shot{suffix}"
            labeled: dict[int, np.ndarray] = {}
            for c in range(first, len(names)):
                files[names[c]] = [f"images/{folder}/{train[i].name}" for i, _ in draws[c][:k]]
                for i, j in draws[c][:k]:
                    labeled.setdefault(i, np.zeros(len(train[i].rows), bool))[j] = True
            views[folder] = [(train[i], x) for i, x in sorted(labeled.items())]
    return drawn


def _draw(candidates: dict[int, list[int]], seed: tuple[int, int], n: int) -> list[tuple[int, int]]:
    """Draw objects of a class as (image, object): one per image, then a second one per image, and so on."""
    rng = np.random.default_rng(seed)
    images = rng.permutation(np.array(list(candidates), int))[:n].tolist()
    queues = [(i, rng.permutation(candidates[i]).tolist()) for i in images]
    rounds = range(max((len(q) for _, q in queues), default=0))
    return list(islice(((i, q[r]) for r in rounds for i, q in queues if r < len(q)), n))


def _count(view: View, names: list[str]) -> dict[str, Any]:
    """Count the images, ignore regions, and objects of each class of a folder."""
    classes = np.concatenate([np.zeros(0), *(p.rows[labeled, 0] for p, labeled in view)]).astype(int)
    objects = dict(zip(names, np.bincount(classes, minlength=len(names)).tolist()))
    return {"images": len(view), "ignored": sum(int((~x).sum()) for _, x in view), "objects": objects}


def _yamls(names: list[str], n_base: int, counts: list[int], seeds: int, channels: int) -> dict[str, tuple[str, dict]]:
    """Return the comment and the content of each data.yaml, without `path`, so that its folder is the root."""
    rows = [
        ("base", "Base classes", "base_train", "base_val", n_base),
        ("data", "All classes, the novel ones labeled in val only", "base_train", "query", len(names)),
    ]
    for k, s in product(counts, range(seeds)):
        folder, what = f"shots/seed{s}_{k}shot", f"{k} labeled objects of each"
        rows.append((f"novel_{k}shot_seed{s}", f"{what} novel class", folder, "novel_query", len(names)))
        rows.append((f"all_{k}shot_seed{s}", f"{what} class", f"{folder}_all", "query", len(names)))
    files = {}
    for stem, comment, train, val, nc in rows:
        content = {"train": f"images/{train}", "val": f"images/{val}", "channels": channels}
        section = {"novel": names[n_base:nc], "ignore": "ignore"}
        files[f"{stem}.yaml"] = (comment, content | {"names": dict(enumerate(names[:nc])), "fewshot": section})
    return files


def _save(target: Path, views: dict[str, View], yamls: dict[str, tuple[str, dict]], manifest: dict[str, Any]) -> None:
    """Write all files into a temporary folder beside the target, and rename it when it is complete."""
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    files: dict[str, str] = {}
    placed: Counter[str] = Counter()
    try:
        for folder in views:
            for kind in ("images", "labels", "ignore"):
                (part / kind / folder).mkdir(parents=True)
        tasks = [(part, folder, *x) for folder, view in views.items() for x in view]
        with ThreadPool(NUM_THREADS) as pool:
            try:
                for x, how in TQDM(pool.imap(_save_image, tasks), desc="Writing...", total=len(tasks)):
                    files |= x
                    placed[how] += 1
            finally:
                pool.terminate()
                pool.join()  # after a failure others may still be writing
        for name, (comment, content) in yamls.items():
            YAML.save(part / name, content, f"# {comment}\n")
            files[name] = sha256(part / name)
        text = json.dumps(manifest | {"files": files}, indent=1, ensure_ascii=False)
        (part / "fewshot.json").write_text(text, encoding="utf-8")
        if target.exists():
            target.rmdir()
        part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    others = [f"{n} images are {how}" for how, n in placed.items() if how != "symbolic links"]
    if others:
        LOGGER.info(f"The system refused symbolic links, so {', '.join(others)}.")


def place(file: str, target: Path) -> str:
    """Link an image, or copy it if the system supports no links.

    Args:
        file (str): Absolute path of the image.
        target (Path): File to make.

    Returns:
        (str): How it was done: 'symbolic links', 'hard links' or 'copies'.
    """
    for link, how in ((os.symlink, "symbolic links"), (os.link, "hard links")):  # Windows may refuse symbolic links
        try:
            link(file, target)
        except (NotImplementedError, OSError):
            continue
        return how
    shutil.copyfile(file, target)
    return "copies"


def _save_image(task: tuple[Path, str, Image, np.ndarray]) -> tuple[dict[str, str], str]:
    """Write an image with its labels and ignore regions.

    Args:
        task (tuple[Path, str, Image, np.ndarray]): Root, folder, image, and mask of its labeled objects.

    Returns:
        files (dict[str, str]): SHA-256 of each file.
        how (str): How the image was placed, see `place`.
    """
    part, folder, p, labeled = task
    image, stem = f"images/{folder}/{p.name}", os.path.splitext(p.name)[0]
    how = place(os.path.realpath(p.file), part / image)
    boxes = [" ".join(f"{v:.6f}" for v in row[1:5]) for row in p.rows]
    files = {f"labels/{folder}/{stem}.txt": [f"{row[0]:.0f} {b}" for row, b, x in zip(p.rows, boxes, labeled) if x]}
    if not labeled.all():
        files[f"ignore/{folder}/{stem}.txt"] = [b for b, x in zip(boxes, labeled) if not x]
    for name, lines in files.items():
        (part / name).write_bytes("".join(f"{x}\n" for x in lines).encode())
    return {image: p.digest} | {name: sha256(part / name) for name in files}, how
