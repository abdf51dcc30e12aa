"""Shared set-up: Ultralytics' settings, runs and data sets in a temporary folder, no network, two threads."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# Ultralytics reads these when it is first imported, and so do the processes that the tests start.
HOME = Path(tempfile.mkdtemp(prefix="yolo-fewshot-tests-"))
os.environ.update(YOLO_CONFIG_DIR=str(HOME), YOLO_OFFLINE="true", YOLO_AUTOINSTALL="false")
for name in ("YOLO_FEWSHOT_DISABLE", "ULTRALYTICS_SAFE_LOAD"):
    os.environ.pop(name, None)

# Ultralytics looks for Arial before it reads a data set, and downloads it where it finds none.
(HOME / "Ultralytics").mkdir()
FONT = Path(importlib.util.find_spec("matplotlib").origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
for name in ("Arial.ttf", "Arial.Unicode.ttf"):
    shutil.copy(FONT, HOME / "Ultralytics" / name)


@pytest.fixture(scope="session", autouse=True)
def ultralytics_home() -> Iterator[Path]:
    """Keep what Ultralytics writes in a temporary folder, for the processes that the tests start too."""
    import torch
    from ultralytics import settings

    torch.set_num_threads(2)
    settings.update({f"{k}_dir": str(HOME / k) for k in ("datasets", "weights", "runs")} | {"sync": False})
    assert json.loads((HOME / "Ultralytics" / "settings.json").read_text())["runs_dir"] == str(HOME / "runs")
    yield HOME
    shutil.rmtree(HOME, ignore_errors=True)
