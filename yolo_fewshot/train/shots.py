"""What the kinds of stage 3 share: their arguments, their data, and their batches of shots and other images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils.data import Dataset
from ultralytics.data.build import InfiniteDataLoader
from ultralytics.data.dataset import YOLODataset
from ultralytics.data.utils import check_det_dataset
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.utils import DEFAULT_CFG_DICT, LOGGER, RANK, colorstr

from yolo_fewshot import args as table
from yolo_fewshot.data.ignore import masked
from yolo_fewshot.data.shots_and_base import AdaptSampler, ShotsAndBase
from yolo_fewshot.train.stage import Stage

MIN_STEPS, MIN_PASSES = 300, 60  # optimizer steps, and passes over the support images
CONFLICTS = {
    "single_cls": "keeps all classes of its model",
    "distill_model": "has its own teacher",
    "classes": "learns the classes of its data.yaml",
    "fraction": "trains on all shots",
}


def steps_for(images: int, batch: int) -> int:
    """Return the default number of optimizer steps.

    Args:
        images (int): Support images.
        batch (int): Images in a batch.

    Returns:
        (int): At least `MIN_STEPS`, and at least `MIN_PASSES` over the images.
    """
    return max(MIN_STEPS, -(-MIN_PASSES * images // batch))


class ShotStage(Stage):
    """Stage 3: training on shots, and on base images if there are any.

    Attributes:
        datasets (list[dict]): Checked data.yaml of the shots and, with `base_replay`, of the base images.
    """

    keys = frozenset((*Stage.keys, *table.SHOT_KEYS)) - {"meta_val"}
    seeded_epochs = True

    @classmethod
    def settings(cls, merged: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
        """Return arguments for one optimizer step per batch.

        Raises:
            ValueError: If an argument does not work in stage 3.
        """
        for k, why in CONFLICTS.items():
            if merged[k] != DEFAULT_CFG_DICT[k]:
                raise ValueError(f"'{k}={merged[k]}' does not work in stage 3, which {why}. Leave it out.")
        if merged["batch"] < 1:
            raise ValueError(f"'batch={merged['batch']}' is an invalid value. In stage 3 'batch' must be >= 1.")
        fixed = {"rect": False, "nbs": merged["batch"], "cls_remap": True}  # classes are matched by name
        return {**fixed, **{k: given.get(k, v) for k, v in table.STAGE_DEFAULTS[3].items()}}

    def __init__(self, trainer: DetectionTrainer, data: dict[str, Any]):
        """Initialize the stage.

        Args:
            trainer (DetectionTrainer): Trainer of the run, which has its arguments and no model yet.
            data (dict): Checked data.yaml of the shots.

        Raises:
            FileNotFoundError: If the base images do not exist.
        """
        super().__init__(trainer, data)
        self.args = trainer.args
        self.datasets = [data, *([check_det_dataset(self.args.base_replay)] if self.args.base_replay else [])]

    def check_batch(self) -> None:
        """Refuse a batch without an image for each process, or without room for the other images.

        Raises:
            ValueError: If the batch of a process has no image, or one and there are base or background images.
        """
        keys = " and ".join(f"{k}=" for k in ("base_replay", "background") if vars(self.args).get(k))
        processes = max(self.trainer.world_size, 1)
        if self.trainer.batch_size < processes:
            raise ValueError(
                f"'batch={self.trainer.batch_size}' has fewer images than there are GPUs. Set batch={processes} or "
                "more."
            )
        if keys and self.trainer.batch_size < 2 * processes:
            gpus = f" on {processes} GPUs" if processes > 1 else ""
            raise ValueError(
                f"'batch={self.trainer.batch_size}'{gpus} has no room for the images of {keys}, which make half of "
                f"each batch. Set batch={2 * processes} or more, or leave {keys} out."
            )

    def build_dataset(self, build: Callable[..., YOLODataset], img_path: str, mode: str, batch: int | None) -> Dataset:
        """Return a data set with the class indices of the model, in training the shots and the other images.

        Raises:
            ValueError: If a label is of a class that neither the model nor the support set has.
        """
        shots, *base = self.datasets
        own = self._build_part(build, shots, img_path, mode, batch)
        if mode != "train":
            return own
        return ShotsAndBase([own, *(self._build_part(build, x, x["train"], mode, batch) for x in base)])

    def _build_part(
        self,
        build: Callable[..., YOLODataset],
        data: dict[str, Any],
        img_path: str,
        mode: str,
        batch: int | None,
    ) -> YOLODataset:
        """Return a data set that is labeled by `data`, with the class indices of the model."""
        trainer, merged = self.trainer, self.trainer.data
        trainer.data = data  # which Ultralytics' `build_dataset` reads
        try:
            dataset = masked(build(img_path, mode, batch), data, mode)
        finally:
            trainer.data = merged
        self._relabel(dataset, data["names"])
        dataset.data = merged
        return dataset

    def _relabel(self, dataset: YOLODataset, names: dict[int, str]) -> None:
        """Give a data set with these class names the class indices of the model."""
        raise NotImplementedError

    def train_loader(self, loader: InfiniteDataLoader, batch_size: int) -> InfiniteDataLoader:
        """Return a loader of shots and other images with `steps` / `epochs` batches, rounded up; log the settings."""
        a, dataset, processes = self.args, loader.dataset, max(self.trainer.world_size, 1)
        a.nbs = self.trainer.batch_size  # Ultralytics may have halved it for want of memory
        shots, others = len(dataset.parts[0]), sum(map(len, dataset.parts[1:]))
        steps = a.steps or steps_for(shots, batch_size * processes)
        batches, rank = -(-steps // a.epochs), max(RANK, 0)
        self._batches = batches
        self._log_settings(dataset, batches * a.epochs)
        sampler = AdaptSampler(shots, others, batch_size, batches, a.seed, rank, processes)
        sampler.restart(getattr(self.trainer, "start_epoch", 0))  # of a resumed run that makes its loader again
        return self._resampled(loader, dataset, sampler, batch_size)

    def begin_epoch(self) -> None:
        """Keep the batches of an epoch where Ultralytics estimates the number of epochs from `time=`."""
        if self.args.time:
            self.args.steps = self._batches * self.args.epochs  # from which a resumed run takes them

    def _log_settings(self, dataset: ShotsAndBase, steps: int, more: str = "") -> None:
        """Log what is trained on what."""
        shots, others = len(dataset.parts[0]), sum(map(len, dataset.parts[1:]))
        LOGGER.info(f"{colorstr('stage 3:')} {steps} steps on {shots} support images and {others} other images{more}")
