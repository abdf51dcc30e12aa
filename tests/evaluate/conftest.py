"""Data sets for the benchmark."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from ultralytics.utils import YAML

from yolo_fewshot.data.demo import BASE, NOVEL


@pytest.fixture(scope="session")
def part_of_demo(demo: Path) -> Callable[..., dict[str, Any]]:
    """A function that copies the first images of each split of the demo into a folder, beside base.yaml and data.yaml.

    It returns the content of a data.yaml of the novel images. All labels have the numbers of all classes.
    """

    def copy(root: Path, **images: int) -> dict[str, Any]:
        for split, count in images.items():
            for kind, suffix in (("images", "jpg"), ("labels", "txt")):
                (root / kind / split).mkdir(parents=True)
                for i in range(count):
                    shutil.copy(demo / kind / split / f"{i:04}.{suffix}", root / kind / split)
        common = {"train": "images/train", "names": dict(enumerate([*BASE, *NOVEL]))}
        YAML.save(root / "base.yaml", {**common, "val": "images/val", "names": dict(enumerate(BASE))})
        YAML.save(root / "data.yaml", {**common, "val": ["images/val", "images/novel_query"]})
        return {**common, "train": "images/novel_support", "val": "images/novel_query"}

    return copy


@pytest.fixture
def hand_made(tmp_path: Path) -> Path:
    """A folder without base.yaml: two queries, two draws of one shot, and two images of the old class cat in old.yaml.

    All images are files of the same size.
    """
    root, rng = tmp_path / "data", np.random.default_rng(0)
    for split in ("query", "shots", "old"):
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
        for i in range(2):
            cv2.imwrite(str(root / f"images/{split}/{i}.bmp"), rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
            (root / f"labels/{split}/{i}.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    for name in ("data", "novel_1shot"):
        YAML.save(root / f"{name}.yaml", {"train": "images/shots", "val": "images/query", "names": {0: "dog"}})
    YAML.save(root / "old.yaml", {"train": "images/old", "val": "images/old", "names": {0: "cat"}})
    for seed in range(2):
        (root / f"novel_1shot_seed{seed}.txt").write_text(f"./images/shots/{seed}.bmp\n")
    return root
