"""Validation of few-shot models, whose classes need not be in the order of the data set's."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from ultralytics.models.yolo.detect import DetectionValidator


class FewShotValidator(DetectionValidator):
    """Ultralytics' validator with the labels matched to the model's classes by name.

    Enrolled classes are appended to the base classes, so that a data set of shots alone counts its classes differently.

    Examples:
        >>> FewShotYOLO("best.pt").val(data="shots.yaml")
    """

    def init_metrics(self, model: nn.Module) -> None:
        """Match the classes by name before the first batch.

        Args:
            model (nn.Module): Model to validate.

        Raises:
            ValueError: If the pictures show a class that the model does not know.
        """
        super().init_metrics(model)
        index = {str(n): i for i, n in self.names.items()}
        names = self.data["names"]
        self.class_index = torch.tensor([index.get(str(names[i]), -1) for i in range(len(names))])
        if self.args.single_cls:  # every label is 0, and so is every prediction
            self.class_index.zero_()
        shown = np.unique(np.concatenate([x["cls"].reshape(-1) for x in self.dataloader.dataset.labels])).astype(int)
        unknown = [names[i] for i in shown if self.class_index[i] < 0]
        if unknown:
            raise ValueError(
                f"The pictures of '{self.args.data}' show {', '.join(unknown)}, which the model does not know. Enroll "
                "these classes first, i.e. FewShotYOLO(...).enroll('shots.yaml'), or validate on other data."
            )

    def preprocess(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Preprocess as Ultralytics does, with the model's class indices in `cls`.

        Args:
            batch (dict): Batch.

        Returns:
            (dict): Batch.
        """
        batch = super().preprocess(batch)
        batch["cls"] = self.class_index.to(self.device)[batch["cls"].long()].to(batch["cls"])
        return batch
