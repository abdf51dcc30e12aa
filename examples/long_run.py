"""Continue a long run where it was stopped: start the same command again after a crash.

    python examples/long_run.py best.pt base.yaml 0,1,2,3

Every device draws its own episodes, so a step sees four of them here. A resumed run has the episodes that it would have
had without the interruption. Tested with two processes on a CPU; not yet run on several GPUs.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ultralytics import YOLO

import yolo_fewshot  # noqa: F401  (registers the plugin, as `yolo` does by itself)


def main(model: str, data: str, device: str = "cpu", project: str = "long", **settings: Any) -> Path:
    """Train stage 2, or continue it.

    Args:
        model (str): Few-shot checkpoint after stage 1, or a model YAML.
        data (str): data.yaml of the base classes.
        device (str): Devices, e.g. '0,1'.
        project (str): Folder of the run; a run that is in it is continued.
        **settings (Any): Further arguments of training.

    Returns:
        (Path): The best checkpoint.
    """
    run = Path(project).resolve() / "stage2"
    last, best = run / "weights" / "last.pt", run / "weights" / "best.pt"
    if best.exists() and not can_resume(last):
        print(f"Done: {best}")
    elif last.exists():
        YOLO(last).train(resume=True, device=device)
    else:
        keys = {"project": str(run.parent), "name": run.name, "exist_ok": True, "save_period": 10, **settings}
        YOLO(model).train(cfg="stage2.yaml", data=data, device=device, **keys)
    return best


def can_resume(last: Path) -> bool:
    """Return whether a checkpoint belongs to a run that has not finished."""
    return last.exists() and (YOLO(last).ckpt or {}).get("epoch", -1) >= 0


if __name__ == "__main__":
    main(*sys.argv[1:])
