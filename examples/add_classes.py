"""Add new classes to a few-shot detector from a few labeled examples, and measure how well it detects them.

    python examples/add_classes.py best.pt shots.yaml

`shots.yaml` is a YOLO data.yaml: its train split holds the labeled examples, its val split images to measure on.
"""

from __future__ import annotations

import sys

from yolo_fewshot import FewShotYOLO


def main(weights: str, support: str) -> float:
    """Enroll the classes of `support` and validate on its val split.

    Args:
        weights (str): Few-shot checkpoint.
        support (str): YOLO data.yaml.

    Returns:
        (float): mAP50 over the classes that occur in the val split.
    """
    model = FewShotYOLO(weights)
    shots = model.enroll(support)
    metrics = model.val(data=support, plots=False)
    print(f"mAP50 {metrics.box.map50:.3f} with {sum(shots.values())} shots of {len(shots)} classes")
    return metrics.box.map50


if __name__ == "__main__":
    main(*sys.argv[1:])
