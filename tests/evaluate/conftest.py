"""Data sets for the benchmark."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
