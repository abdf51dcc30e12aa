"""Write a loss term of your own, train with it, and see it in the log.

    python examples/own_loss.py fewshot.yaml fewshot-demo.yaml

The term is a column of the progress bar, of results.csv and of losses.png, and the loss doctor measures its gradient,
as for every other term.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from ultralytics import YOLO

from yolo_fewshot import FewShotLoss, FewShotTrainer


class SpreadLoss(FewShotLoss):
    """Adds a term that moves prototypes apart: the mean squared cosine of every two classes of an episode."""

    episode_names = (*FewShotLoss.episode_names, "spr_loss")
    gain = 0.5

    def episode_terms(self, preds: dict, batch: dict, pooled: Any) -> list[torch.Tensor]:
        """Return the terms of an episode with ours as the last; prototypes are unit vectors, (n_way, D)."""
        cosine = pooled.prototypes @ pooled.prototypes.t()
        others = cosine - torch.diag(cosine.diag())  # a mask would make the GPU wait
        spread = others.square().sum() / max(len(others) * (len(others) - 1), 1)  # zero where there is one class
        return [*super().episode_terms(preds, batch, pooled), self.gain * spread]


class SpreadTrainer(FewShotTrainer):
    """Trains with it."""

    loss_class = SpreadLoss


def main(model: str, data: str, **settings: Any) -> None:
    """Train stage 2 with the term.

    Args:
        model (str): Few-shot model YAML or checkpoint.
        data (str): data.yaml of the base classes.
        **settings (Any): Further arguments of training.
    """
    defaults = {"imgsz": 128, "epochs": 2, "episodes": 60, "lr0": 0.002, "lrf": 0.05}
    YOLO(model).train(trainer=SpreadTrainer, cfg="stage2.yaml", data=data, **{**defaults, **settings})


if __name__ == "__main__":
    main(*sys.argv[1:])
