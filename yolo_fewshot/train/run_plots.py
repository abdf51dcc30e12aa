"""Plots of a run beside Ultralytics' own: episodes, embeddings, loss terms and enrolled shots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.tasks import load_checkpoint
from ultralytics.utils import LOGGER, RANK

from yolo_fewshot.data.episodes import EpisodeSampler, EpisodicDataset
from yolo_fewshot.data.support import SupportDataset
from yolo_fewshot.enroll.enroll import Shots
from yolo_fewshot.enroll.features import View, extract
from yolo_fewshot.enroll.replay import base_support
from yolo_fewshot.nn.criterion import gain_of
from yolo_fewshot.nn.model import FewShotDetectionModel
from yolo_fewshot.nn.rows import class_rows
from yolo_fewshot.plots.embedding import plot_embedding
from yolo_fewshot.plots.episode import plot_episode
from yolo_fewshot.plots.episode_detection import detect_queries
from yolo_fewshot.plots.losses import plot_losses
from yolo_fewshot.plots.support import FILE, plot_support
from yolo_fewshot.train.meta_validation import trained_epochs

VAL_EPISODES = 3  # plotted at the end
EMBEDDED = 200  # val images whose objects are plotted by their embedding


def plot_training_episode(trainer: DetectionTrainer, batch: dict[str, Any], ni: int) -> None:
    """Plot an episode that is trained.

    Args:
        trainer (DetectionTrainer): Trainer of stage 2.
        batch (dict): Preprocessed episode.
        ni (int): Number of the batch.
    """
    _plot_episode(trainer, batch, trainer.save_dir / f"episode{ni}.jpg")


def plot_val_episodes(trainer: DetectionTrainer) -> None:
    """Plot episodes of the val split with the detections of best.pt in their query images.

    Args:
        trainer (DetectionTrainer): Trainer of stage 2 at its end.
    """
    a, val, names = trainer.args, trainer.test_loader.dataset, trainer.data["names"]
    images = np.bincount([c for x in val.labels for c in np.unique(x["cls"]).astype(int)], minlength=len(names))
    n_way = min(a.n_way, int((images > a.k_shot).sum()))
    if n_way < 2:
        LOGGER.info("No val_episode.jpg: the val split has too few classes with k_shot + 1 images.")
        return
    try:
        sampler = EpisodeSampler(val.labels, names, n_way, a.k_shot, a.n_query, VAL_EPISODES, a.seed)
    except ValueError:
        LOGGER.info("No val_episode.jpg: the images of the val split cannot be divided into support and query.")
        return
    model = load_checkpoint(trainer.best, trainer.device)[0].eval()
    episodes = EpisodicDataset(SupportDataset(base_support(model, val.labels), a.imgsz))
    for i in range(VAL_EPISODES):
        batch = episodes.collate_fn([episodes[draw] for draw in sampler.episode(0, i)])
        batch = DetectionTrainer.preprocess_batch(trainer, batch)
        _plot_episode(trainer, batch, trainer.save_dir / f"val_episode{i}.jpg", detect_queries(model, batch))


def plot_object_embeddings(trainer: DetectionTrainer, model: FewShotDetectionModel) -> None:
    """Plot the embeddings of objects of the val split, and the prototypes.

    Args:
        trainer (DetectionTrainer): Trainer at its end.
        model (FewShotDetectionModel): Model in eval mode.
    """
    labels = [x for x in trainer.test_loader.dataset.labels if len(x["cls"])]
    labels = [labels[i] for i in np.linspace(0, len(labels) - 1, min(len(labels), EMBEDDED), dtype=int)]
    if not labels:
        return
    support = base_support(model, labels)
    features = extract(class_rows(model), support, trainer.args.imgsz, views=[View()], desc="Embedding objects")
    file, prototypes = trainer.save_dir / "embedding.png", model.model[-1].prototypes.weight.detach()[..., 0]
    LOGGER.info(f"Plotting embedding to {file}... ")
    found = features.embeds[0].any(1)  # an object without an anchor has an embedding of zeros
    objects = features.embeds[0][found], features.cls[found]
    plot_embedding(*objects, prototypes.float().cpu(), model.names, set(model.enrolled), file)
    trainer.on_plot(file)


def plot_loss_terms(trainer: DetectionTrainer) -> None:
    """Plot value, chance level and gradient share of every loss term, if they were measured.

    Args:
        trainer (DetectionTrainer): Trainer at its end.
    """
    results = trained_epochs(trainer.read_results_csv())
    terms = [k.removeprefix("share/") for k in results if k.startswith("share/")]
    if terms:
        file = trainer.save_dir / "losses.png"
        plot_losses(results, file, {t: gain_of(t, trainer.args)[1] for t in terms})
        trainer.on_plot(file)


def plot_enrolled_shots(trainer: DetectionTrainer, shots: Shots, names: dict[int, str]) -> None:
    """Plot the shots that stage 3 enrolled.

    Args:
        trainer (DetectionTrainer): Trainer of stage 3 when training starts.
        shots (Shots): Enrolled shots.
        names (dict[int, str]): Class names of the model.
    """
    file = trainer.save_dir / FILE
    if RANK in {-1, 0} and plot_support(shots, names, file):
        trainer.on_plot(file)


def _plot_episode(
    trainer: DetectionTrainer, batch: dict[str, Any], file: Path, found: list[torch.Tensor] | None = None
) -> None:
    """Plot an episode, log it, and hand it to the loggers."""
    LOGGER.info(f"Plotting episode to {file}... ")
    plot_episode(batch, trainer.data["names"], file, found)
    trainer.on_plot(file)
