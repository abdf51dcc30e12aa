"""Audit of a benchmark: new classes that the checkpoints were trained on."""

from __future__ import annotations

import re
from pathlib import Path

from ultralytics import YOLO
from ultralytics.utils import LOGGER, ROOT, YAML
from ultralytics.utils.downloads import GITHUB_ASSETS_NAMES

from yolo_fewshot.errors import few

LEAKAGE = "LEAKAGE: the starting checkpoint was trained on"
OTHERS = re.compile(r"-(cls|obb|oiv7|pose)|^(sam|mobile_sam|FastSAM|rtdetr|yoloe|yolo_nas)|world")  # not only COCO's


def leakage(files: list[Path], novel: tuple[str, ...]) -> list[str]:
    """Return the novel classes that checkpoints, or those that they were trained from, were trained on.

    Names are compared without regard to case, spaces and punctuation. A checkpoint that is gone is audited if it is one
    of Ultralytics' detectors, which are trained on COCO; any other is named in a warning.

    Args:
        files (list[Path]): Checkpoints.
        novel (tuple[str, ...]): Names of the novel classes.

    Returns:
        (list[str]): Those that are known.
    """
    known, seen, gone = set(), set(), []
    queue = [x.resolve() for x in files]
    while queue:
        file = queue.pop()
        if file in seen or file.suffix != ".pt":
            continue
        seen.add(file)
        if file.is_file():
            yolo = YOLO(file)
            known |= {_plain(n) for n in yolo.names.values()}
            training = (yolo.ckpt or {}).get("train_args") or {}
            queue += [Path(str(training.get(k))).resolve() for k in ("model", "pretrained")]
        elif file.name in GITHUB_ASSETS_NAMES and not OTHERS.search(file.name):
            known |= {_plain(n) for n in YAML.load(ROOT / "cfg/datasets/coco.yaml")["names"].values()}
        else:
            gone.append(file.name)
    if gone:
        LOGGER.warning(
            f"The leakage audit lacks {few(gone)}, which the checkpoints were trained from and does not exist."
        )
    names = [n for n in novel if _plain(n) in known]
    if names:
        LOGGER.warning(f"{LEAKAGE} {', '.join(names)}")
    return names


def _plain(name: str) -> str:
    """Return a class name without case, spaces and punctuation; other letters than Latin ones are kept."""
    return re.sub(r"[\W_]+", "", str(name)).casefold() or str(name)
