"""Shared set-up: settings, runs and data sets of Ultralytics in a temporary folder, no network, few threads."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from filelock import FileLock

# Ultralytics reads these when it is first imported, and so do the processes that the tests start.
assert "ultralytics" not in sys.modules, "imported before its settings are moved, the user's own would be changed"
HOME = Path(tempfile.mkdtemp(prefix="yolo-fewshot-tests-"))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads must not occupy the cores
os.environ.update(YOLO_CONFIG_DIR=str(HOME), YOLO_OFFLINE="true", YOLO_AUTOINSTALL="false")
for name in ("YOLO_FEWSHOT_DISABLE", "ULTRALYTICS_SAFE_LOAD"):
    os.environ.pop(name, None)

# Ultralytics looks for Arial before it reads a data set, and downloads it if it is missing.
(HOME / "Ultralytics").mkdir()
FONT = Path(importlib.util.find_spec("matplotlib").origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
for name in ("Arial.ttf", "Arial.Unicode.ttf"):
    shutil.copy(FONT, HOME / "Ultralytics" / name)


SLOW_FIXTURES = {"trained", "enrolled", "stages", "wheel"}  # which train models or build the package

# Files that take longest, in this order, so that no test process waits for another at the end. The first one trains the
# models that others need, while another process runs the second and the third, which need none.
FIRST = [
    "train/test_adaptation.py", "train/test_processes.py", "train/test_trainer.py", "test_yolo.py", "test_readme.py",
    "test_examples.py", "test_install.py", "train/test_guarded.py", "evaluate/test_benchmark.py",
    "enroll/test_dual_head.py", "train/test_channels.py", "evaluate/test_benchmark_gpu.py", "train/test_resume.py",
    "test_deploy.py", "test_plugin.py", "train/test_learning.py", "studio/test_engine.py", "test_graft_deploy.py",
    "train/test_meta_validation.py", "train/test_grafting.py", "evaluate/test_from_stock.py", "nn/test_graft.py",
]  # fmt: skip


@pytest.hookimpl(tryfirst=True)  # before pytest selects by markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that need a slow fixture, and order the files."""
    places = {Path(__file__).parent / file: place for place, file in enumerate(FIRST)}
    items.sort(key=lambda item: places.get(item.path, len(FIRST)))
    for item in items:
        if SLOW_FIXTURES.intersection(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session", autouse=True)
def ultralytics_home() -> Iterator[Path]:
    """Make Ultralytics write to a temporary folder, also in processes that the tests start."""
    import torch
    from ultralytics import settings
    from ultralytics.data import utils
    from ultralytics.utils import torch_utils

    torch_utils.get_flops = lambda *_: 0.0  # a figure of the log that costs a tenth of a small training
    torch.set_num_threads(1)  # in each of the two test processes
    utils.DATASETS_DIR = HOME / "datasets"  # read from the settings at import
    settings.update({f"{k}_dir": str(HOME / k) for k in ("datasets", "weights", "runs")} | {"sync": False})
    assert json.loads((HOME / "Ultralytics" / "settings.json").read_text())["runs_dir"] == str(HOME / "runs")
    yield HOME
    shutil.rmtree(HOME, ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def young_heap(ultralytics_home: Path) -> None:
    """Let the garbage collector, which Ultralytics calls in every training, pass over what was imported before."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)  # copies of models and checkpoints allocate much and leave little


@pytest.fixture(scope="session")
def draw_tiny() -> Callable[[Path, int], Path]:
    """Return a function that draws a data set of 4 classes and 64 px, and writes tiny models, into a folder."""
    import cv2
    import numpy as np

    from yolo_fewshot.paths import cfg_dir

    def draw(root: Path, images: int) -> Path:
        rng = np.random.default_rng(0)
        for split in ("train", "val"):
            (root / "images" / split).mkdir(parents=True)
            (root / "labels" / split).mkdir(parents=True)
            for i in range(images):
                image = rng.integers(180, 220, (64, 64, 3), dtype=np.uint8)
                x, y, s = rng.integers((4, 4, 20), (28, 28, 32)).tolist()
                color = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0)][i % 4]
                cv2.rectangle(image, (x, y), (x + s, y + s), color, -1)
                cv2.imwrite(str(root / f"images/{split}/{i:02}.png"), image)
                box = [(x + s / 2) / 64, (y + s / 2) / 64, s / 64, s / 64]
                (root / f"labels/{split}/{i:02}.txt").write_text(" ".join(map(str, [i % 4, *box])))
        (root / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [blue, green, red, black]\n")
        for family in ("yolo11", "yolo26"):
            text = (cfg_dir() / f"{family}-fewshot.yaml").read_text()
            text = text.replace("n: [0.50, 0.25, 1024]", "n: [0.50, 0.125, 1024]")
            (root / f"{family}n-tiny.yaml").write_text(text)
        return root

    return draw


class Run(NamedTuple):
    """The files of a training that are read later."""

    best: Path
    csv: Path


def train_on_the_demo(root: Path) -> None:
    """Train stages 1 and 2, shortly."""
    from yolo_fewshot import FewShotTrainer
    from yolo_fewshot.paths import cfg_dir

    model = (cfg_dir() / "fewshot.yaml").read_text().replace("width_multiple: 0.25", "width_multiple: 0.125")
    (root / "small.yaml").write_text(model)
    common = {
        "imgsz": 96, "workers": 0, "plots": False, "optimizer": "AdamW", "lr0": 0.003, "warmup_epochs": 1, "val": False,
        "warmup_bias_lr": 0.0, "verbose": False, "project": str(root), "epochs": 5,
    }  # fmt: skip
    first = {"model": str(root / "small.yaml"), "name": "stage1", "batch": 16, "nbs": 16, "mosaic": 0.0}
    stage1 = FewShotTrainer("stage1.yaml", {**common, **first})
    stage1.train()
    second = {"model": str(stage1.best), "name": "stage2", "episodes": 40, "n_way": 8, "lrf": 0.3}
    terms = {"supcon": 1.2, "cpe": 0.6, "triplet": 0.3, "turned": 0.0}  # base rows need all of so few episodes
    FewShotTrainer("stage2.yaml", {**common, **second, **terms}).train()


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """Short runs of stages 1 and 2 on the demo data; the best.pt of stage 2 detects objects.

    One of the test processes trains, the others wait for it, and all read the same files.
    """
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "trained"
    with FileLock(f"{root}.lock"):
        if not (root / "done").exists():
            shutil.rmtree(root, ignore_errors=True)
            root.mkdir()
            train_on_the_demo(root)
            (root / "done").touch()
    return [Run(root / stage / "weights" / "best.pt", root / stage / "results.csv") for stage in ("stage1", "stage2")]


@pytest.fixture(scope="session")
def batch() -> dict[str, Any]:
    """An episode of 2 ways: classes 0 and 1 are drawn, and the images also show 2 and 3."""
    import torch

    g = torch.Generator().manual_seed(0)
    per_image = [[0, 2], [1], [0], [1, 3], [1, 2], [0, 3]]
    cls = torch.tensor([c for p in per_image for c in p]).float()[:, None]
    index = torch.tensor([i for i, p in enumerate(per_image) for _ in p]).float()
    place = torch.tensor([j for p in per_image for j, _ in enumerate(p)])
    center = torch.where(place[:, None] == 0, torch.tensor([[0.3, 0.3]]), torch.tensor([[0.7, 0.7]]))
    size = 0.3 + 0.1 * torch.rand(len(cls), 2, generator=g)
    return {
        "img": torch.rand(len(per_image), 3, 96, 96, generator=g),
        "cls": cls,
        "bboxes": torch.cat([center, size], 1),
        "batch_idx": index,
        "support": torch.tensor([True] * 2 + [False] * 4),
        "way": torch.tensor([0, 1, 0, 1, 1, 0]),
    }


@pytest.fixture(scope="session")
def demo() -> Path:
    """The folder of the demo data, drawn on first use."""
    from ultralytics.data.utils import check_det_dataset

    import yolo_fewshot  # noqa: F401  (resolves the bare name of the YAML)

    return Path(check_det_dataset("fewshot-demo-novel.yaml")["path"])


@pytest.fixture(scope="session")
def enrolled(trained: list[Run], demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of stage 2 with the novel classes of the demo data enrolled from five shots each."""
    from yolo_fewshot import FewShotYOLO

    model = FewShotYOLO(trained[1].best)
    model.enroll("fewshot-demo-novel.yaml")
    path = tmp_path_factory.mktemp("enrolled") / "site.pt"
    model.save(path)
    return path
