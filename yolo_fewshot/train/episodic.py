"""Stage 2: episodic training on the base classes."""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any

from ultralytics.data.build import InfiniteDataLoader
from ultralytics.data.dataset import YOLODataset
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import DEFAULT_CFG_DICT, LOGGER, RANK

from yolo_fewshot import args as table
from yolo_fewshot.data.episodes import EpisodeSampler, EpisodicDataset
from yolo_fewshot.files import save_checkpoint
from yolo_fewshot.nn.model import FewShotDetectionModel
from yolo_fewshot.train.meta_validation import START, fitness_of, student_of
from yolo_fewshot.train.run_plots import plot_training_episode, plot_val_episodes
from yolo_fewshot.train.stage import Stage

MIXING = ("mosaic", "mixup", "cutmix", "copy_paste")  # augmentations that put parts of other images into an image


class Episodes(Stage):
    """Stage 2: every batch is an episode of support and query images, and one optimizer step."""

    keys = frozenset(set(table.KEYS) - set(table.ADAPTING))
    seeded_epochs = True

    @classmethod
    def settings(cls, merged: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
        """Return the batch size of an episode, no augmentation that mixes images, and the gain of the clamped DFL."""
        size = table.episode_size(merged)
        if given.get("batch") not in {None, DEFAULT_CFG_DICT["batch"], size}:
            LOGGER.warning(
                f"'batch={given['batch']}' is ignored in stage 2: a batch is an episode, n_way x (k_shot + n_query) = "
                f"{size} images."
            )
        mixing = [k for k in MIXING if merged[k]]
        if any(given.get(k) for k in mixing):
            LOGGER.warning(f"Stage 2 sets {', '.join(f'{k}=0' for k in mixing)}: support and query must not mix.")
        # With nbs = batch there is one optimizer step per episode, with Ultralytics' weight decay.
        fixed = {**dict.fromkeys(MIXING, 0.0), "close_mosaic": 0, "rect": False, "batch": size, "nbs": size}
        return {**fixed, **{k: given.get(k, v) for k, v in table.STAGE_DEFAULTS[2].items()}}

    def on_loaded(self, model: FewShotDetectionModel, weights: DetectionModel) -> None:
        """Keep the loaded prototypes as anchors of the triplet term, unless the run is resumed."""
        if not self.trainer.resume:
            unlearned = {*model.held_out, *getattr(weights, "held_out", ())}
            learned = [c for c in model.transferred if str(model.names[c]) not in unlearned]
            model.model[-1].freeze_prototypes(learned)

    def check_batch(self) -> None:
        """Refuse the smaller batch that Ultralytics tries when memory runs out.

        Raises:
            MemoryError: If the batch size is smaller than an episode.
        """
        a, device = self.trainer.args, self.trainer.device
        size = table.episode_size(vars(a))
        if self.trainer.batch_size < size:
            raise MemoryError(
                f"An episode of n_way={a.n_way} x (k_shot={a.k_shot} + n_query={a.n_query}) = {size} images of "
                f"imgsz={a.imgsz} needs more memory than {device} has. Set a smaller n_way, k_shot, n_query or imgsz."
            )

    def train_loader(self, loader: InfiniteDataLoader, batch_size: int) -> InfiniteDataLoader:
        """Return a loader of `episodes` episodes.

        Raises:
            ValueError: If such episodes cannot be drawn from the training images.
        """
        a, dataset = self.trainer.args, EpisodicDataset(loader.dataset)
        names, rank = self.trainer.data["names"], max(RANK, 0)
        episodes, held_out = (a.n_way, a.k_shot, a.n_query, a.episodes), self.meta.classes if self.meta else ()
        sampler = EpisodeSampler(dataset.labels, names, *episodes, a.seed, rank, held_out, a.turned)
        return self._resampled(loader, dataset, sampler, sampler.episode_size)

    def begin_run(self) -> None:
        """Measure the model that training starts from with `meta_val`; it is best.pt until an epoch is better."""
        super().begin_run()
        trainer = self.trainer
        if not self.meta or trainer.resume or RANK not in {-1, 0}:
            return
        model = student_of(trainer.ema.ema)
        self.meta.start = self.measure(model)
        value = fitness_of(self.meta.start)
        # The next larger number, since Ultralytics saves an epoch as best.pt that equals the best one.
        trainer.best_fitness, trainer.stopper.best_fitness = math.nextafter(value, math.inf), value
        start = deepcopy(model, {id(getattr(model, "criterion", None)): None}).cpu()
        metrics = {**self.meta.start, "fitness": value}
        ckpt = {"model": start, "train_args": vars(trainer.args), "train_metrics": metrics, START: True}
        save_checkpoint(ckpt, trainer.best)

    def loss_scale(self, scale: int) -> int:
        """Return the factor times the number of processes, since each process has its own episode."""
        return scale * max(self.trainer.world_size, 1)

    def plot_batch(self, batch: dict[str, Any], ni: int) -> None:
        """Plot a training batch as an episode."""
        plot_training_episode(self.trainer, batch, ni)

    @property
    def base_dataset(self) -> YOLODataset:
        """Data set of the base images."""
        return self.trainer.train_loader.dataset.dataset

    def plot_end(self) -> None:
        """Plot episodes of the val split with the detections of best.pt."""
        if self.trainer.best.exists():
            plot_val_episodes(self.trainer)
