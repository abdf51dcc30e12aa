"""The interface between the trainer and the stages; the base class itself is stage 1, ordinary training."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import Dataset
from ultralytics.data.build import InfiniteDataLoader, seed_worker
from ultralytics.data.dataset import YOLODataset
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import LOGGER, RANK

from yolo_fewshot import args as table
from yolo_fewshot.data.episodes import EpisodicDataset
from yolo_fewshot.data.ignore import fully_labeled, masked
from yolo_fewshot.data.sampling import EpochSampler
from yolo_fewshot.data.shots_and_base import ShotsAndBase
from yolo_fewshot.enroll.calibrate import choose_prior_strength
from yolo_fewshot.enroll.methods import few_shot_method
from yolo_fewshot.enroll.replay import fill_replay_buffer
from yolo_fewshot.errors import few
from yolo_fewshot.nn.criterion import branch_losses
from yolo_fewshot.nn.model import FewShotDetectionModel
from yolo_fewshot.train.guard import nonfinite
from yolo_fewshot.train.meta_validation import PREFIX, START, MetaValidation, fitness_of, student_of, trained_epochs


class Stage:
    """Stage 1. A subclass overrides the steps in which its stage differs; the trainer calls them in this order.

    Attributes:
        keys (frozenset[str]): Our configuration keys that have an effect.
        seeded_epochs (bool): Whether each epoch draws its images with a seed of its own, so that a resumed run has the
            batches of an uninterrupted one. In stage 2 their augmentation is the same, too; in stage 3 only without
            loader processes (`workers=0`), and without mosaic, which mixes in images that were loaded shortly before
            (with `cache=ram` any images, and the same ones again).
        blends (bool): Whether the final weights are interpolated, so that the checkpoints record the metrics of the
            final validation.
        trainer (DetectionTrainer): Trainer of the run.
        meta (MetaValidation | None): Classes that `meta_val` keeps out of training.
    """

    keys: frozenset[str] = frozenset(("stage", "grad_clip", "meta_val", *table.EVERY_STAGE))
    seeded_epochs = False
    blends = False
    meta: MetaValidation | None = None

    @classmethod
    def settings(cls, merged: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments that follow from the stage.

        Args:
            merged (dict[str, Any]): Arguments of the run, with a value for each of our keys.
            given (dict[str, Any]): Those of the recipe and the user.

        Returns:
            (dict[str, Any]): Values that replace those in `merged`.
        """
        return {}

    def __init__(self, trainer: DetectionTrainer, data: dict[str, Any]):
        """Initialize the stage.

        Args:
            trainer (DetectionTrainer): Trainer of the run, which has its arguments and no model yet.
            data (dict): Checked data.yaml of the run.
        """
        self.trainer = trainer
        self._ends_with_start = False
        self._labels: list[dict[str, Any]] = []  # of the training images, with the kept-out classes

    def begin_epoch(self) -> None:
        """Prepare an epoch."""

    def keep_out(self, data: dict[str, Any]) -> None:
        """Choose the classes that `meta_val` keeps out of training.

        Args:
            data (dict): Checked data.yaml of the run.

        Raises:
            ValueError: If there are too few classes, or the run does not validate or save every epoch.
        """
        a = self.trainer.args
        if "meta_val" not in self.keys or not a.meta_val:
            return
        for k in ("val", "save"):
            if not getattr(a, k):
                raise ValueError(
                    f"'{k}=False' does not work with meta_val={a.meta_val}, which picks best.pt after every epoch. "
                    f"Leave {k}= or meta_val= out."
                )
        self.meta = MetaValidation(data, a.meta_val, a.seed)

    def adopt(self, model: DetectionModel) -> None:
        """Accept a model that was built before, as in the processes of multi-GPU training.

        Args:
            model (DetectionModel): The model.
        """

    def build_model(self, cfg: str | dict[str, Any], weights: DetectionModel | None, verbose: bool) -> DetectionModel:
        """Return the model of the run, a few-shot model with the weights that training starts from.

        Args:
            cfg (str | dict): Model YAML or its content.
            weights (DetectionModel, optional): Model given to the run.
            verbose (bool): Whether to log the layers.

        Returns:
            (DetectionModel): The model.

        Raises:
            ValueError: If a weight is not finite, or the stage cannot start from these weights.
        """
        weights, data = self.initial_weights(weights), self.trainer.data
        model = FewShotDetectionModel(cfg, ch=data["channels"], nc=data["nc"], verbose=verbose)
        model = self.trainer.set_model_names_for_load(model)
        model.held_out = self.meta.names if self.meta else []
        if weights:
            model.load(weights)
            self.check_finite(model)
            self.on_loaded(model, weights)
            if self.meta and isinstance(weights, FewShotDetectionModel):
                self.meta.check_weights(weights, str(self.trainer.args.model))
        return model

    def check_finite(self, model: DetectionModel) -> None:
        """Refuse weights that are not finite.

        Args:
            model (DetectionModel): Model.

        Raises:
            ValueError: If one of its tensors has a NaN or Inf.
        """
        if bad := nonfinite({k: v for k, v in model.state_dict().items() if v.is_floating_point()}):
            raise ValueError(
                f"'model={self.trainer.args.model}' cannot be trained: {len(bad)} of its tensors have a NaN or Inf, "
                f"such as {bad[0]}. Use another checkpoint."
            )

    def initial_weights(self, weights: DetectionModel | None) -> DetectionModel | None:
        """Return the model whose weights training starts from, before the model of the run is built.

        Args:
            weights (DetectionModel, optional): Model given to the run.

        Returns:
            (DetectionModel | None): Model to load from.
        """
        return weights

    def on_loaded(self, model: FewShotDetectionModel, weights: DetectionModel) -> None:
        """Complete the model of the run after its weights were loaded.

        Args:
            model (FewShotDetectionModel): Model of the run.
            weights (DetectionModel): Model that it was loaded from.
        """

    def check_batch(self) -> None:
        """Check the batch size before a training loader is built."""

    def build_dataset(self, build: Callable[..., YOLODataset], img_path: str, mode: str, batch: int | None) -> Dataset:
        """Return a data set, with its ignore regions in training.

        Args:
            build (Callable): Ultralytics' `build_dataset` of this trainer.
            img_path (str): Path to the images.
            mode (str): 'train' or 'val'.
            batch (int, optional): Images per batch.

        Returns:
            (Dataset): The data set.
        """
        dataset = build(img_path, mode, batch)
        if mode == "train":
            self._labels = dataset.labels
        return masked(dataset, self.trainer.data, mode, self.meta.classes if self.meta else ())

    def train_loader(self, loader: InfiniteDataLoader, batch_size: int) -> InfiniteDataLoader:
        """Return the training loader.

        Args:
            loader (InfiniteDataLoader): Ultralytics' loader of the training images.
            batch_size (int): Images per batch of this process.

        Returns:
            (InfiniteDataLoader): The same loader, or one with another sampler.
        """
        return loader

    def begin_run(self) -> None:
        """Record the initial state, when the model is on its device and nothing is trained or resumed yet.

        Raises:
            ValueError: If a class that `meta_val` keeps out has too few images.
        """
        if self.meta:
            self.meta.draw(self._labels, self.trainer.test_loader.dataset.labels)

    def begin_training(self, model: FewShotDetectionModel) -> None:
        """Set up what the stage adds to the loss.

        Args:
            model (FewShotDetectionModel): Model in training, not wrapped for several GPUs.
        """
        if self.meta:
            trained = torch.ones(self.trainer.data["nc"], dtype=torch.bool, device=self.trainer.device)
            trained[list(self.meta.classes)] = False
            for loss in branch_losses(model):
                loss.trained = trained

    def measure(self, model: Any) -> dict[str, float]:
        """Measure the classes that `meta_val` keeps out; called only in the main process.

        Args:
            model (FewShotDetectionModel | DistillationModel): Model in eval mode, left unchanged.

        Returns:
            (dict[str, float]): Columns for results.csv.
        """
        assert self.meta is not None, "there is no meta_val"
        val = self.trainer.test_loader.dataset.labels
        return self.meta.measure(
            student_of(model), fully_labeled(self.base_dataset, warn=False), val, self.trainer.args.imgsz
        )

    def preprocess(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Add what the stage needs to a batch.

        Args:
            batch (dict): Preprocessed batch.

        Returns:
            (dict): Batch for the loss.
        """
        return batch

    def loss_scale(self, scale: int) -> int:
        """Return the factor by which Ultralytics multiplies the loss in a step.

        Args:
            scale (int): Images of all processes times accumulated batches.

        Returns:
            (int): The factor.
        """
        return scale

    def plot_batch(self, batch: dict[str, Any], ni: int) -> None:
        """Plot a training batch beside Ultralytics' own plot.

        Args:
            batch (dict): Preprocessed batch.
            ni (int): Number of the batch.
        """

    def final_checkpoints(
        self, last: dict[str, Any] | None, best: dict[str, Any] | None
    ) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """Return the checkpoints that the run ends with; called only in the main process.

        Args:
            last (dict | None): Stripped checkpoint of the last epoch, None if there is none.
            best (dict | None): Stripped checkpoint of the best epoch, None if there is none.

        Returns:
            last (dict | None): Content of last.pt.
            best (dict | None): Content of best.pt.
        """
        if best and best.pop(START, None):  # with the records of the run
            best = {**(last or {}), **best}
            epochs, self._ends_with_start = self._fitness(), True
            found = f", best epoch {max(epochs):.2f}" if epochs else ""
            LOGGER.info(
                f"{PREFIX} Stage 2 gave no better enrollment of held-out classes than its start "
                f"({best['train_metrics']['fitness']:.2f}{found}); best.pt is the model that it started from."
            )
        return last, best

    def before_final_validation(self, model: DetectionModel) -> None:
        """Prepare the validation of the final weights, in every process.

        Args:
            model (DetectionModel): Model with the final weights.
        """

    @property
    def base_dataset(self) -> YOLODataset:
        """Data set of the base images."""
        return self.trainer.train_loader.dataset

    def prepare_enrollment(self, model: FewShotDetectionModel) -> None:
        """Store what enrollment needs of the base data: the replay buffer and the prior strength of one shot.

        Args:
            model (FewShotDetectionModel): Model with the final weights, changed in place.
        """
        trainer, labels = self.trainer, fully_labeled(self.base_dataset)
        imgsz, seed = trainer.args.imgsz, trainer.args.seed
        model.memory = fill_replay_buffer(model, labels, imgsz, seed)
        model.prior_strength = choose_prior_strength(model, labels, trainer.test_loader.dataset.labels, imgsz, seed)
        LOGGER.info(f"Enrollment from one shot: '{few_shot_method(model)}' is better on base classes")

    def log_end(self) -> None:
        """Log which classes `meta_val` kept out; called only in the main process."""
        if not self.meta:
            return
        epochs = self._fitness()
        text = f"{PREFIX} {few(self.meta.names, n=20)} were kept out of training, and the model does not know them. "
        if epochs and not self._ends_with_start:
            best = epochs.index(max(epochs)) + 1
            text += f"The best epoch was {best} of {len(epochs)}. To use"
            text += f" all classes, train once more without meta_val and with epochs={best}, and take last.pt."
        else:
            text += "To use all classes, train stage 1 without meta_val, and leave out stage 2."
        LOGGER.info(text)

    def _fitness(self) -> list[float]:
        """Return the fitness of every epoch of a run with `meta_val`."""
        columns = trained_epochs(self.trainer.read_results_csv())
        return [fitness_of(dict(zip(columns, row))) for row in zip(*columns.values())]

    def plot_end(self) -> None:
        """Plot results of the final best.pt; called only in the main process and with `plots=True`."""

    def _resampled(
        self,
        loader: InfiniteDataLoader,
        dataset: YOLODataset | EpisodicDataset | ShotsAndBase,
        sampler: EpochSampler,
        batch_size: int,
    ) -> InfiniteDataLoader:
        """Return a loader like Ultralytics' with another sampler."""
        trainer = self.trainer
        processes, batches = max(trainer.world_size, 1), len(sampler) // batch_size
        workers = min(os.cpu_count() // processes, trainer.args.workers, batches)
        pinned = getattr(loader, "pin_memory_device", "")  # of an NPU or XPU
        return InfiniteDataLoader(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            num_workers=workers,
            prefetch_factor=4 if workers else None,
            pin_memory=loader.pin_memory,
            collate_fn=dataset.collate_fn,
            worker_init_fn=seed_worker,
            # Starting the loader must not change the random state of the run, and each process has its own seed.
            generator=torch.Generator().manual_seed(trainer.args.seed + 1 + RANK),
            **({"pin_memory_device": pinned} if pinned else {}),
        )
