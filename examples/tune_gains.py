"""Tune the gains of the loss terms with Ultralytics' own tuner.

    python examples/tune_gains.py best.pt base.yaml iterations=20

The tuner keeps the values with the best mAP on the *base* val split. It does not see the novel classes, whose query
images must not choose anything; to tune for new classes, hold out some base classes as `yolo-fewshot split` does.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ultralytics import YOLO
from ultralytics.utils import YAML

import yolo_fewshot  # noqa: F401  (registers the plugin, as `yolo` does by itself)

START = {"supcon": 1.2, "cpe": 0.6, "triplet": 0.3, "lr0": 0.002}  # the recipe has the three terms off
SPACE = {"supcon": (0.0, 2.0), "cpe": (0.0, 1.5), "triplet": (0.0, 1.0), "lr0": (0.0002, 0.005)}  # any key works


def main(model: str = "fewshot.yaml", data: str = "fewshot-demo.yaml", **settings: Any) -> dict[str, float]:
    """Tune stage 2.

    Args:
        model (str): Few-shot checkpoint after stage 1, or a model YAML.
        data (str): data.yaml of the base classes.
        **settings (Any): Further arguments of `model.tune`.

    Returns:
        (dict[str, float]): The best values.
    """
    keys = {"imgsz": 128, "epochs": 2, "episodes": 30, "iterations": 3, **START, "plots": False, "save": False}
    keys |= {"project": str(Path("tuned").resolve()), "name": "gains", "exist_ok": True, **settings}
    YOLO(model).tune(cfg="stage2.yaml", data=data, space=SPACE, **keys)
    best = YAML.load(Path(keys["project"]) / keys["name"] / "best_hyperparameters.yaml")
    print(best)
    return best


if __name__ == "__main__":
    named = dict(x.split("=", 1) for x in sys.argv[1:] if "=" in x)
    main(*(x for x in sys.argv[1:] if "=" not in x), **{k: int(v) if v.isdigit() else v for k, v in named.items()})
