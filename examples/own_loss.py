"""Write a loss term of your own, train with it, and see it in the log.

    python examples/own_loss.py fewshot.yaml fewshot-demo.yaml
    cd examples && yolo train model=fewshot.yaml cfg=stage2.yaml terms=own_loss.SpreadLoss imgsz=128 epochs=2 \
        episodes=60 lr0=0.002 lrf=0.05

The term is a column of the progress bar, of results.csv and of losses.png, and the loss monitor measures its gradient,
as for every other term.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from ultralytics import YOLO

from yolo_fewshot import EpisodeTerm


class SpreadLoss(EpisodeTerm):
    """Moves prototypes apart: the mean squared cosine of every two classes of an episode."""

    name, gain = "spr_loss", 0.5

    def forward(self, episode: Any) -> torch.Tensor:
        """Return the term without its gain; prototypes are unit vectors, (ways, D)."""
        cosine = (episode.prototypes @ episode.prototypes.t()).triu(1)
        return cosine.square().sum() / max(len(cosine) * (len(cosine) - 1) / 2, 1)  # zero where there is one class


def main(model: str, data: str, **settings: Any) -> None:
    """Train stage 2 with the term.

    Args:
        model (str): Few-shot model YAML or checkpoint.
        data (str): data.yaml of the base classes.
        **settings (Any): Further arguments of training.
    """
    defaults = {"imgsz": 128, "epochs": 2, "episodes": 60, "lr0": 0.002, "lrf": 0.05}
    YOLO(model).train(cfg="stage2.yaml", data=data, terms="own_loss.SpreadLoss", **{**defaults, **settings})


if __name__ == "__main__":
    main(*sys.argv[1:])
