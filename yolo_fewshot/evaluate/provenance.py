"""What a benchmark was run with, in benchmark.json: data, checkpoints, settings, versions and machine."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import ultralytics
from ultralytics.data.utils import check_det_dataset, img2label_paths
from ultralytics.utils import LOGGER
from ultralytics.utils.torch_utils import get_cpu_info

import yolo_fewshot
from yolo_fewshot.data.ignore import ignore_files, ignore_folder
from yolo_fewshot.data.support import images_of
from yolo_fewshot.errors import few
from yolo_fewshot.evaluate.plan import Data
from yolo_fewshot.evaluate.report import COLUMNS, FILES
from yolo_fewshot.files import AtomicPath, sha256

NO_EFFECT = {"plots", "verbose", "workers", "cache"}  # settings that may differ between the rows
VAL, BOTH = ("val",), ("train", "val")


def provenance(
    data: Data, sums: dict[str, str], files: dict[str, Path], settings: dict[str, Any], more: dict[str, Any]
) -> dict[str, Any]:
    """Return the content of benchmark.json.

    Args:
        data (Data): Data.
        sums (dict[str, str]): Result of `digests`.
        files (dict[str, Path]): Checkpoints by argument.
        settings (dict[str, Any]): Further arguments of training.
        more (dict[str, Any]): Further content.

    Returns:
        (dict[str, Any]): Content.
    """
    record = {
        "data": str(data.folder),
        "base_val": str(data.base_val) if data.base_val else None,
        "data_sha256": sums,
        "files": {k: str(files[k]) if k in files else None for k in FILES},
        "sha256": {k: sha256(files[k]) if k in files else None for k in FILES},
        "settings": dict(sorted(settings.items())),
        **more,
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "versions": {m.__name__: m.__version__ for m in (yolo_fewshot, ultralytics, torch)},
        "machine": {
            "platform": f"{platform.platform()}, Python {platform.python_version()}",
            "processor": get_cpu_info(),
            "cores": os.cpu_count(),
            "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        },
    }
    return json.loads(json.dumps(record, default=str))


def digests(
    data: Data, draws: Iterable[tuple[Path, Path | None]], base: bool, background: str | None = None
) -> dict[str, str]:
    """Return the SHA-256 of each part of the data: the draws, the measured val splits, base.yaml and the background.

    It covers the data.yaml, the list of shots, the names and sizes of the images, which are not read, and the content
    of their files of labels and ignore regions.

    Args:
        data (Data): Data.
        draws (Iterable[tuple[Path, Path | None]]): data.yaml, and list that replaces its train split, of each draw.
        base (bool): Whether a method learns from images of base classes.
        background (str, optional): Background images.

    Returns:
        (dict[str, str]): 64 hexadecimal digits by name.
    """
    parts: dict[str, tuple[Path, Path | None, tuple[str, ...]]] = {"data.yaml": (data.folder / "data.yaml", None, VAL)}
    if data.base_val:
        parts["base_val"] = data.base_val, None, VAL
    if base and data.base_yaml:
        parts["base.yaml"] = data.base_yaml, None, BOTH
    parts |= {(listed or file).stem: (file, listed, BOTH) for file, listed in draws}
    of_split = functools.cache(_of_split)  # draws share a val split
    sums: dict[str, str] = {}
    for part, (file, listed, splits) in parts.items():
        read = check_det_dataset(file)
        paths = [str(listed) if listed and x == "train" else read[x] for x in splits]
        content = [x.read_bytes() for x in (file, listed) if x]
        content += [of_split(tuple(x) if isinstance(x, list) else (x,), ignore_folder(read)) for x in paths]
        sums[part] = hashlib.sha256(repr(content).encode()).hexdigest()
    if background:
        sums["background"] = of_split((background,), "").hex()
    return sums


def _of_split(paths: tuple[str, ...], folder: str) -> bytes:
    """Return the digest of the images of a split with their labels and ignore regions."""
    images, total = images_of(list(paths)), hashlib.sha256()
    ignored = ignore_files(images, folder) if folder else [""] * len(images)
    for image, *texts in zip(images, img2label_paths(images), ignored):
        size = os.path.getsize(image) if os.path.isfile(image) else None
        read = [Path(x).read_bytes() if os.path.isfile(x) else None for x in texts]
        total.update(repr((os.path.basename(image), size, read)).encode())
    return total.digest()


def compare(out: Path, record: dict[str, Any]) -> None:
    """Refuse a folder that has results of other data, models or settings, or with other columns.

    What earlier runs of the folder had is added to the record: digests of other draws, other versions and machines, and
    `save`.

    Args:
        out (Path): Folder of the results.
        record (dict[str, Any]): Content of benchmark.json; changed in place.

    Raises:
        ValueError: If so.
    """
    file, rows = out / "benchmark.json", out / "rows.csv"
    if not file.is_file():
        return
    old = json.loads(file.read_text(encoding="utf-8"))
    changed = [k for k in ("data", "base_val") if old.get(k) != record[k]]
    changed += [k for k, x in record["sha256"].items() if old.get("sha256", {}).get(k) != x]
    if changed:
        raise ValueError(f"{out} has results of another {', '.join(changed)}. Set another out=, or restore them.")
    was, now = old.get("settings", {}), record["settings"]
    begun = rows.is_file() or any((out / "runs").glob("*.pt"))  # if not, an invalid setting may have ended the run
    changed = [k for k in sorted({*was, *now} - NO_EFFECT) if begun and was.get(k) != now.get(k)]
    if changed:
        texts = [f"{k}={was[k]}" if k in was else f"no {k}=" for k in changed]
        raise ValueError(f"{out} has results of other settings: {few(texts)}. Set another out=, or restore them.")
    before = old.get("data_sha256", {})  # earlier versions have none
    changed = [k for k, x in record["data_sha256"].items() if before.get(k, x) != x]
    if changed:
        raise ValueError(
            f"{out} has results of other images, labels or files of {few(changed)}. Set another out=, or restore them."
        )
    if rows.is_file() and rows.read_text(encoding="utf-8").partition("\n")[0].split(",") != list(COLUMNS):
        raise ValueError(f"{rows} has the columns of another version of yolo-fewshot. Set another out=.")
    record["data_sha256"] = before | record["data_sha256"]
    record["save"] = record["save"] or old.get("save", False)
    for part in ("versions", "machine") if begun else ():
        for k, value in record[part].items():
            earlier = str(old.get(part, {}).get(k, value)).split(" and ")
            if str(value) not in earlier:
                LOGGER.warning(f"{out} has results of {k} {few(earlier)}; what is missing is measured with {value}.")
                earlier.append(str(value))
            if len(earlier) > 1:
                record[part][k] = " and ".join(earlier)


def write(out: Path, record: dict[str, Any]) -> None:
    """Write benchmark.json.

    Args:
        out (Path): Folder of the results.
        record (dict[str, Any]): Content.
    """
    AtomicPath(out / "benchmark.json").write_bytes(json.dumps(record, indent=1, ensure_ascii=False).encode())
