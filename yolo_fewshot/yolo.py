"""The Python interface: a YOLO model that can learn classes from a few examples."""

from __future__ import annotations

from pathlib import Path

from ultralytics import YOLO
from ultralytics.data.utils import check_det_dataset
from ultralytics.utils import LOGGER

from yolo_fewshot import prototypes
from yolo_fewshot.model import FewShotDetectionModel


class FewShotYOLO(YOLO):
    """YOLO model with a few-shot head.

    Examples:
        >>> from yolo_fewshot import FewShotYOLO
        >>> model = FewShotYOLO("best.pt")
        >>> model.enroll("shots.yaml")
        {'scooter': 5}
        >>> model.predict("street.jpg")
    """

    def enroll(self, support: str | Path, imgsz: int | None = None, batch: int = 16) -> dict[str, int]:
        """Teach the model the classes shown in the train split of a data set, without training.

        Classes with a known name are enrolled anew, others are appended. The prototype of a class is the mean of the
        embeddings of its labelled objects (Snell et al. 2017); all other classes stay as they are.

        Args:
            support (str | Path): YOLO data.yaml.
            imgsz (int, optional): Picture size in pixels, that of training if not given.
            batch (int): Pictures per forward pass.

        Returns:
            (dict[str, int]): Number of shots per enrolled class.

        Raises:
            TypeError: If the model has no few-shot head.
            ValueError: If a new class has no usable box.
        """
        if not isinstance(self.model, FewShotDetectionModel):
            raise TypeError(
                f"model='{self.model_name}' has no few-shot head. Train or upgrade it first, i.e. "
                f"'yolo train model={self.model_name} cfg=stage1.yaml data=base.yaml'."
            )
        data = check_det_dataset(support)
        shots = prototypes.enroll(self.model, data, imgsz or self.overrides.get("imgsz", 640), batch)
        self.predictor = None  # it holds a copy of the model
        LOGGER.info(f"Enrolled {', '.join(f'{name} ({n} shots)' for name, n in shots.items())}")
        return shots
