"""Few-shot object detection by meta-learning, as a plugin of Ultralytics YOLO.

Importing this package registers the plugin with Ultralytics (see `yolo_fewshot.plugin`). The public names are loaded
on first use, so that the import is fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from yolo_fewshot import plugin

if TYPE_CHECKING:  # for editors and type checkers, which do not see names loaded on first use
    from yolo_fewshot.data.episodes import EpisodeSampler, EpisodicDataset
    from yolo_fewshot.evaluate.validator import FewShotValidator
    from yolo_fewshot.nn.criterion import FewShotLoss
    from yolo_fewshot.nn.head import FewShotDetect
    from yolo_fewshot.nn.losses import ClampedDFLoss, CPELoss, SupConLoss, TripletLoss
    from yolo_fewshot.nn.model import FewShotDetectionModel
    from yolo_fewshot.nn.terms import EpisodeTerm
    from yolo_fewshot.train.trainer import FewShotTrainer
    from yolo_fewshot.yolo import FewShotYOLO

__version__ = "0.2.0"

_PUBLIC = {
    "FewShotTrainer": "train.trainer",
    "FewShotValidator": "evaluate.validator",
    "FewShotYOLO": "yolo",
    "FewShotDetectionModel": "nn.model",
    "FewShotDetect": "nn.head",
    "FewShotLoss": "nn.criterion",
    "EpisodeTerm": "nn.terms",
    "EpisodeSampler": "data.episodes",
    "EpisodicDataset": "data.episodes",
    "ClampedDFLoss": "nn.losses",
    "SupConLoss": "nn.losses",
    "CPELoss": "nn.losses",
    "TripletLoss": "nn.losses",
}

__all__ = [
    "CPELoss",
    "ClampedDFLoss",
    "EpisodeSampler",
    "EpisodeTerm",
    "EpisodicDataset",
    "FewShotDetect",
    "FewShotDetectionModel",
    "FewShotLoss",
    "FewShotTrainer",
    "FewShotValidator",
    "FewShotYOLO",
    "SupConLoss",
    "TripletLoss",
    "__version__",
]

plugin.register()


def __getattr__(name: str) -> object:
    """Load a public name from its module on first use."""
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"yolo_fewshot.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the public names, including those not loaded yet."""
    return sorted({*globals(), *_PUBLIC})
