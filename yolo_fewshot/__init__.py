"""Few-shot object detection by meta-learning, as a plugin of Ultralytics YOLO.

Importing this package registers the plugin with Ultralytics (see `yolo_fewshot.plugin`). The public names below are
loaded on first use, so that the import itself stays cheap.
"""

from __future__ import annotations

import importlib

from yolo_fewshot import plugin

__version__ = "0.1.0"

_PUBLIC = {
    "FewShotTrainer": "trainer",
    "FewShotValidator": "validator",
    "FewShotYOLO": "yolo",
    "FewShotDetectionModel": "model",
    "FewShotDetect": "head",
    "FewShotLoss": "criterion",
    "EpisodeSampler": "episodes",
    "EpisodicDataset": "episodes",
    "ClampedDFLoss": "losses",
    "SupConLoss": "losses",
    "CPELoss": "losses",
    "TripletLoss": "losses",
}

__all__ = ["__version__", *_PUBLIC]

plugin.register()


def __getattr__(name: str):
    """Load a public name from its module on first use."""
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"yolo_fewshot.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the public names, the not yet loaded ones too."""
    return sorted({*globals(), *_PUBLIC})
