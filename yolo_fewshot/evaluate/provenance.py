"""What a benchmark was run with, in benchmark.json: data, checkpoints, settings, versions and machine."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
import ultralytics
from ultralytics.utils.torch_utils import get_cpu_info

import yolo_fewshot
from yolo_fewshot.evaluate.report import COLUMNS, FILES
from yolo_fewshot.files import AtomicPath


def provenance(
    data: Path, base_val: Path | None, files: dict[str, Path], settings: dict[str, Any], more: dict[str, Any]
) -> dict[str, Any]:
    """Return the content of benchmark.json.

    Args:
        data (Path): Folder of the data.
        base_val (Path, optional): data.yaml of the base classes.
        files (dict[str, Path]): Checkpoints by argument.
        settings (dict[str, Any]): Further arguments of training.
        more (dict[str, Any]): Further content.

    Returns:
        (dict[str, Any]): Content.
    """
    record = {
        "data": str(data),
        "base_val": str(base_val) if base_val else None,
        "files": {k: str(files[k]) if k in files else None for k in FILES},
        "sha256": {k: hashlib.sha256(files[k].read_bytes()).hexdigest() if k in files else None for k in FILES},
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


def compare(out: Path, record: dict[str, Any]) -> None:
    """Refuse a folder that has results of other data, models or settings, or with other columns.

    Args:
        out (Path): Folder of the results.
        record (dict[str, Any]): Content of benchmark.json.

    Raises:
        ValueError: If so.
    """
    file, rows = out / "benchmark.json", out / "rows.csv"
    if not file.is_file():
        return
    old = json.loads(file.read_text(encoding="utf-8"))
    changed = [k for k in ("data", "base_val", "settings") if old.get(k) != record[k]]
    changed += [k for k, x in record["sha256"].items() if old.get("sha256", {}).get(k) != x]
    if changed:
        raise ValueError(f"{out} has results of another {', '.join(changed)}. Set another out=, or restore them.")
    if rows.is_file() and rows.read_text(encoding="utf-8").partition("\n")[0].split(",") != list(COLUMNS):
        raise ValueError(f"{rows} has the columns of another version of yolo-fewshot. Set another out=.")


def write(out: Path, record: dict[str, Any]) -> None:
    """Write benchmark.json.

    Args:
        out (Path): Folder of the results.
        record (dict[str, Any]): Content.
    """
    AtomicPath(out / "benchmark.json").write_bytes(json.dumps(record, indent=1, ensure_ascii=False).encode())
