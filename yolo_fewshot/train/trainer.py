"""The trainer of stages 1 to 3."""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import Dataset
from ultralytics.cfg import cfg2dict, get_cfg
from ultralytics.data.build import InfiniteDataLoader, seed_worker
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.tasks import load_checkpoint
from ultralytics.utils import DEFAULT_CFG, DEFAULT_CFG_DICT, LOGGER, RANK, YAML, colorstr
from ultralytics.utils.checks import check_yaml
from ultralytics.utils.torch_utils import init_seeds, unwrap_model

from yolo_fewshot import args as table
from yolo_fewshot.compat import warn_untested
from yolo_fewshot.data.episodes import EpisodeSampler, EpisodicDataset
from yolo_fewshot.data.ignore import fully_labeled, has_ignored, masked
from yolo_fewshot.data.shots_and_base import ShotsAndBase, relabel
from yolo_fewshot.data.support import SupportDataset
from yolo_fewshot.enroll.calibrate import choose_prior_strength
from yolo_fewshot.enroll.enroll import Shots
from yolo_fewshot.enroll.features import View, extract
from yolo_fewshot.enroll.replay import base_support, fill_replay_buffer
from yolo_fewshot.files import AtomicPath, StagedPath, save_checkpoint, staged
from yolo_fewshot.nn.criterion import branch_losses, gain_of
from yolo_fewshot.nn.model import FewShotDetectionModel
from yolo_fewshot.nn.own_terms import load_terms
from yolo_fewshot.plots.embedding import plot_embedding
from yolo_fewshot.plots.episode import plot_episode
from yolo_fewshot.plots.episode_detection import detect_queries
from yolo_fewshot.plots.losses import plot_losses
from yolo_fewshot.plots.support import FILE, plot_support
from yolo_fewshot.train.adaptation import Adaptation
from yolo_fewshot.train.guard import nonfinite
from yolo_fewshot.train.guarded import GuardedTrainer
from yolo_fewshot.train.monitor import LossDoctor, report

MIXING = ("mosaic", "mixup", "cutmix", "copy_paste")  # augmentations that put other images into a image
VAL_EPISODES, EMBEDDED = 3, 200  # episodes, and images whose objects are embedded, plotted at the end


class AllEpochsDone(Exception):
    """Tells Ultralytics' training loop that there is no epoch left to train."""


class FewShotTrainer(GuardedTrainer, DetectionTrainer):
    """Trains a few-shot detector: stage 1 on ordinary batches, stage 2 on episodes, stage 3 on shots from enrollment.

    Attributes:
        episodic (bool): Whether this run is stage 2.
        adaptation (Adaptation, optional): What stage 3 does beside training.
        doctor (LossDoctor): Gradient of each term and its chance level.

    Examples:
        >>> from yolo_fewshot import FewShotTrainer
        >>> FewShotTrainer(cfg="stage2.yaml", overrides={"model": "fewshot.yaml", "data": "base.yaml"}).train()
    """

    def __init__(
        self,
        cfg: str | Path | dict | SimpleNamespace = DEFAULT_CFG,
        overrides: dict[str, Any] | None = None,
        _callbacks: dict | None = None,
    ):
        """Initialize the trainer.

        Args:
            cfg (str | Path | dict | SimpleNamespace): Configuration; a partial one, such as a recipe, is merged over
                Ultralytics' defaults.
            overrides (dict, optional): Values that take precedence.
            _callbacks (dict, optional): Callbacks, as in Ultralytics.

        Raises:
            TypeError: If a value has a wrong type.
            ValueError: If a value is out of its range.
        """
        warn_untested()
        recipe = YAML.load(check_yaml(cfg)) if isinstance(cfg, (str, Path)) else cfg2dict(cfg)
        overrides = dict(cfg2dict(overrides or {}))
        given = {**recipe, **overrides}
        # A merge by Ultralytics itself, so that it names misspelt keys and wrong types.
        merged = vars(get_cfg({**DEFAULT_CFG_DICT, "save_dir": ""}, given))
        table.refuse_support(merged)
        if not merged["resume"]:  # a resumed run takes everything from its checkpoint
            table.check(merged)
            merged.update(self._resolve(merged, given))
            load_terms(merged["terms"])
        self.adaptation: Adaptation | None = None
        super().__init__(merged, {k: merged[k] for k in overrides}, _callbacks)
        if self.resume:
            load_terms(self.args.terms)
        self.episodic = self.args.stage == 2
        self._columns: dict[str, float] = {}  # of the last epoch, by guard and doctor
        self.doctor = LossDoctor(0 if self.args.compile else self.args.doctor)  # measuring needs the graph twice
        self.last, self.best, self.wdir = AtomicPath(self.last), AtomicPath(self.best), AtomicPath(self.wdir)

    def check_resume(self, overrides: dict[str, Any]) -> None:
        """Read the arguments of a run to resume as Ultralytics does; a run whose folder was moved goes on where it is.

        Args:
            overrides (dict): Arguments that were given.
        """
        super().check_resume(overrides)
        if self.resume:
            weights, recorded = Path(self.args.resume).resolve().parent, getattr(self.args, "save_dir", None)
            if weights.name == "weights" and not (recorded and Path(recorded).exists()):
                self.args.save_dir = str(weights.parent)

    @staticmethod
    def _resolve(merged: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
        """Return what the stage decides: our keys' values, and how batches are made in stages 2 and 3."""
        values = table.resolve(merged)
        if values["stage"] != 2:
            works = {"stage", "grad_clip", *table.EVERY_STAGE, *(table.ADAPTING if values["stage"] == 3 else ())}
            idle = [k for k in table.used(merged) if k not in works]
            if idle:
                what = f"Stage {values['stage']} has no episodes"
                LOGGER.warning(f"{what}, so {', '.join(f'{k}=' for k in idle)} has no effect there.")
            if values["stage"] == 1:
                return values
            alone = {"single_cls": "keeps all classes of its model", "distill_model": "has a teacher of its own"}
            for k, why in alone.items():
                if merged[k]:
                    raise ValueError(f"'{k}={merged[k]}' does not work in stage 3, which {why}. Leave it out.")
            if merged["batch"] < 1:
                raise ValueError(f"'batch={merged['batch']}' is an invalid value. In stage 3 'batch' must be >= 1.")
            return {**values, "rect": False, "nbs": merged["batch"]}
        idle = [k for k in table.used(merged) if k in table.ADAPTING]
        if idle:
            LOGGER.warning(f"{', '.join(f'{k}=' for k in idle)} has no effect in stage 2. Use it with cfg=stage3.yaml.")
        size = table.episode_size(values)
        if given.get("batch") not in {None, DEFAULT_CFG_DICT["batch"], size}:
            LOGGER.warning(
                f"'batch={given['batch']}' is ignored in stage 2: a batch is an episode, n_way x (k_shot + n_query) = "
                f"{size} images."
            )
        mixing = [k for k in MIXING if merged[k]]
        if any(given.get(k) for k in mixing):
            LOGGER.warning(f"Stage 2 sets {', '.join(f'{k}=0' for k in mixing)}: support and query must not mix.")
        # One optimizer step per episode, with Ultralytics' weight decay for a batch of the nominal size.
        return {**values, **dict.fromkeys(MIXING, 0.0), "close_mosaic": 0, "rect": False, "batch": size, "nbs": size}

    def get_model(
        self, cfg: str | dict | None = None, weights: nn.Module | None = None, verbose: bool = True
    ) -> FewShotDetectionModel:
        """Return the few-shot model, built from any detection YAML, with the weights of a stock or few-shot model.

        Args:
            cfg (str | dict, optional): Model YAML or its content.
            weights (nn.Module, optional): Model to take weights from.
            verbose (bool): Whether to log the layers.

        Returns:
            (FewShotDetectionModel): The model. In stage 2 the prototypes that it took from the weights are kept as
                anchors of the triplet term.

        Raises:
            ValueError: If a weight is not finite, or stage 3 has no few-shot checkpoint to start from.
        """
        if self.adaptation:
            weights = self._enrolled(weights)
        model = FewShotDetectionModel(cfg, ch=self.data["channels"], nc=self.data["nc"], verbose=verbose and RANK == -1)
        model = self.set_model_names_for_load(model)
        if self.adaptation:
            model.names = self.data["names"]
        if weights:
            model.load(weights)
            if bad := nonfinite({k: v for k, v in model.state_dict().items() if v.is_floating_point()}):
                raise ValueError(
                    f"'model={self.args.model}' cannot be trained: {len(bad)} of its tensors have a NaN or Inf, "
                    f"such as {bad[0]}. Use another checkpoint."
                )
            if self.episodic and not self.resume:
                model.model[-1].freeze_prototypes(model.transferred)
            if self.adaptation:
                model.enrolled = {n: x for n, x in weights.enrolled.items() if n in model.names.values()}
                model.prior_strength, model.memory = weights.prior_strength, weights.memory
        return model

    def setup_model(self) -> dict[str, Any] | None:
        """Load or create the model as Ultralytics does; several processes get that of stage 3 from their launcher.

        Returns:
            (dict | None): Checkpoint to resume from.
        """
        if self.adaptation and isinstance(self.model, nn.Module):
            self._take_classes(self.model)
        return super().setup_model()

    def _take_classes(self, model: FewShotDetectionModel) -> None:
        """Make the classes of stage 3 those of the model that it starts from, and the new ones of the shots."""
        self.adaptation.take_classes(model)
        self.data = {**self.data, "names": self.adaptation.names, "nc": len(self.adaptation.names)}

    def _enrolled(self, weights: nn.Module | None) -> FewShotDetectionModel:
        """Return what stage 3 starts from: with the new classes of the shots enrolled, unless it is resumed."""
        if self.args.pretrained is False:
            raise ValueError("'pretrained=False' leaves stage 3 nothing to adapt. Leave it out.")
        if not isinstance(weights, FewShotDetectionModel):
            raise ValueError(
                f"'model={self.args.model}' cannot be adapted. Stage 3 starts from a few-shot checkpoint, i.e. the "
                "best.pt of stage 2."
            )
        self._take_classes(weights)
        if self.resume:
            return weights
        weights, shots = self.adaptation.enrolled(weights, self.device)
        if (
            shots and self.args.plots
        ):  # when training starts, since the launcher of several processes empties the folder
            self.add_callback("on_train_start", functools.partial(draw_shots, shots=shots, names=dict(weights.names)))
        return weights

    def get_dataset(self) -> dict[str, Any]:
        """Return what Ultralytics knows of the data, in stage 3 that of the shots.

        Returns:
            (dict): Paths, class names and so on.
        """
        data = super().get_dataset()
        if self.args.stage == 3:
            self.adaptation = Adaptation(self.args, data)
        return data

    def build_dataset(self, img_path: str, mode: str = "train", batch: int | None = None) -> Dataset:
        """Return Ultralytics' data set; in stage 3 with the model's class indices, and with base images to train on.

        Args:
            img_path (str): Path to the images.
            mode (str): 'train' or 'val'.
            batch (int, optional): Images in a batch.

        Returns:
            (Dataset): The data set.

        Raises:
            ValueError: If images of stage 3 show a class that neither the model nor the shots know.
        """
        if not self.adaptation:
            return masked(super().build_dataset(img_path, mode, batch), self.data, mode)
        shots, *base = self.adaptation.labeled
        own = self._build_part(shots, img_path, mode, batch)
        if mode != "train":
            return own
        return ShotsAndBase([own, *(self._build_part(x, x["train"], mode, batch) for x in base)])

    def _build_part(self, data: dict[str, Any], img_path: str, mode: str, batch: int | None) -> Dataset:
        """Return Ultralytics' data set, whose labels have the names of `data`, with the model's class indices."""
        merged, self.data = self.data, data
        try:
            dataset = masked(super().build_dataset(img_path, mode, batch), data, mode)
        finally:
            self.data = merged
        relabel(dataset, data["names"], merged["names"])
        dataset.data = merged
        return dataset

    def get_dataloader(self, dataset_path: str, batch_size: int = 16, rank: int = 0, mode: str = "train") -> Any:
        """Return Ultralytics' loader, in stage 2 the loader of episodes, in stage 3 that of shots and base images.

        Args:
            dataset_path (str): Path to the images.
            batch_size (int): Images per batch; episodes have their own size.
            rank (int): Rank of this process, -1 for a single one.
            mode (str): 'train' or 'val'.

        Returns:
            (InfiniteDataLoader): The loader; in stage 2 its length is `episodes`, in stage 3 `steps` / `epochs`.

        Raises:
            MemoryError: If Ultralytics asks for smaller batches of stage 2, as it does when memory runs out.
        """
        if mode == "train" and self.episodic and self.batch_size < table.episode_size(vars(self.args)):
            raise MemoryError(
                f"An episode of n_way={self.args.n_way} x (k_shot={self.args.k_shot} + n_query={self.args.n_query}) = "
                f"{table.episode_size(vars(self.args))} images of imgsz={self.args.imgsz} needs more memory than "
                f"{self.device} has. Set a smaller n_way, k_shot, n_query or imgsz."
            )
        loader = super().get_dataloader(dataset_path, batch_size, rank, mode)
        a = self.args
        if mode != "train" or a.stage == 1:
            return loader
        if self.episodic:
            dataset = EpisodicDataset(loader.dataset)
            sampler = EpisodeSampler(
                dataset.labels, self.data["names"], a.n_way, a.k_shot, a.n_query, a.episodes, a.seed, max(RANK, 0)
            )
            batch_size, batches = sampler.episode_size, a.episodes
        else:
            dataset = loader.dataset
            sampler = self.adaptation.sampler(dataset, batch_size, max(self.world_size, 1))
            batches = sampler.batches
        workers = min(os.cpu_count() // max(self.world_size, 1), a.workers, batches)
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
            # Starting it must not disturb the run's random state, and each process augments in its own way.
            generator=torch.Generator().manual_seed(a.seed + 1 + RANK),
            **({"pin_memory_device": pinned} if pinned else {}),
        )

    def _close_dataloader_mosaic(self) -> None:
        """Stop mixing images as Ultralytics does, which then asks the loader for this epoch anew."""
        super()._close_dataloader_mosaic()
        if self.adaptation:
            self.train_loader.sampler.restart(self.epoch)

    def listeners(self) -> dict[str, Callable[[FewShotTrainer], None]]:
        """Return what is called with the trainer at an event, by the name of the event and before other callbacks."""
        return {**super().listeners(), "on_train_batch_start": type(self).begin_batch}

    def begin_training(self) -> None:
        """Give the loss what it needs of the data, in every process."""
        super().begin_training()
        model = unwrap_model(self.model)
        for loss in branch_losses(model):
            loss.masked = has_ignored(self.train_loader.dataset)
        if self.adaptation:
            self.adaptation.retain(model, self.train_loader.dataset.labels)

    def begin_epoch(self) -> None:
        """Set the counters to zero and, in stages 2 and 3, the random state to that of the epoch."""
        super().begin_epoch()
        self.doctor.reset()
        for loss in branch_losses(unwrap_model(self.model)):
            if loss.clamped_dfl:
                loss.clamped_dfl.reset_counts()
        if self.args.stage != 1:  # an interrupted run and an uninterrupted one have the same state here
            init_seeds(self.args.seed + 1 + RANK + 1000 * self.epoch, deterministic=self.args.deterministic)

    def begin_batch(self) -> None:
        """Announce a batch to the doctor."""
        self.doctor.begin_batch(unwrap_model(self.model), self.scaler)

    def end_epoch(self) -> None:
        """Check what the last step left over, and make the columns of guard and doctor."""
        super().end_epoch()
        dfl = [x.clamped_dfl for x in branch_losses(unwrap_model(self.model)) if x.clamped_dfl]
        clamps = {
            f"train/{k}_clamped": sum(int(getattr(x, f"{k[:-1]}_clamped")) for x in dfl) for k in ("sides", "means")
        }
        self._columns = {**self.guard.columns(), **clamps, **self.doctor.columns()}
        if self.metrics is not None:  # which only the process has that writes them
            self.metrics = {**self.metrics, **self._columns}

    def end_training(self) -> None:
        """Say in words how the loss terms did."""
        text = report(self._results(), self.args)
        if text:
            LOGGER.info(f"{colorstr('Loss doctor:')} {text}")
        else:
            super().end_training()

    def validate(self) -> tuple[dict[str, float] | None, float | None]:
        """Validate as Ultralytics does.

        Returns:
            metrics (dict | None): Results, with the columns of guard and doctor, for results.csv and loggers.
            fitness (float | None): Fitness.
        """
        metrics, fitness = super().validate()
        return metrics and {**metrics, **self._columns}, fitness

    def preprocess_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Move a batch to the device as Ultralytics does, in stage 3 with what the teacher says of it.

        Args:
            batch (dict): Collated batch.

        Returns:
            (dict): Preprocessed batch.
        """
        self._batch = super().preprocess_batch(batch)
        if self.adaptation:
            self._batch = self.adaptation.taught(self._batch)
        return self._batch

    @property
    def loss_scale(self) -> int:
        """Factor of the loss itself in the sum that a step is taken on; an episode is the batch of one process."""
        return super().loss_scale * (max(self.world_size, 1) if self.episodic else 1)

    def resume_training(self, ckpt: dict[str, Any] | None) -> None:
        """Resume from a checkpoint, with the episodes of the next epoch; stage 3 keeps what it started from.

        Args:
            ckpt (dict, optional): Checkpoint.

        Raises:
            AllEpochsDone: If the run was stopped after its last epoch, when its last steps have been done here.
        """
        if self.adaptation:
            self.adaptation.begin(self.ema.ema, self.wdir)
        if self.resume and ckpt and ckpt["optimizer"] and ckpt["epoch"] + 1 == self.epochs:
            self.epoch, self.epoch_time, self.tloss = self.epochs - 1, 0.0, {}  # what loggers read
            self.lr = {f"lr/pg{i}": x["lr"] for i, x in enumerate(self.optimizer.param_groups)}
            self.final_eval()
            if RANK in {-1, 0}:
                if self.args.plots:
                    self.plot_metrics()
                self.run_callbacks("on_train_end")
            raise AllEpochsDone
        super().resume_training(ckpt)
        if not self.resume:
            return
        if self.args.stage != 1:
            self.train_loader.sampler.restart(self.start_epoch)
            self.train_loader.reset()  # whose processes may have asked for the first epoch already
        if RANK in {-1, 0} and self.csv.exists():  # an epoch that was cut off may have left a row, or a part of one
            lines = self.csv.read_text().splitlines(keepends=True)
            rows = [x for x in lines[1:] if x.endswith("\n") and float(x.partition(",")[0]) <= self.start_epoch]
            AtomicPath(self.csv).write_bytes("".join([*lines[:1], *rows]).encode())

    def train(self) -> None:
        """Train, or finish a run that was stopped after its last epoch."""
        with contextlib.suppress(AllEpochsDone):
            super().train()

    def plot_training_samples(self, batch: dict[str, Any], ni: int) -> None:
        """Plot a batch as Ultralytics does, and in stage 2 as an episode, too.

        Args:
            batch (dict): Preprocessed batch.
            ni (int): Number of the batch.
        """
        if self.episodic:
            self._plot_episode(batch, f"episode{ni}.jpg")
        super().plot_training_samples(batch, ni)  # last, for it turns the batch's tensors into arrays

    def _plot_episode(self, batch: dict[str, Any], name: str, found: list[torch.Tensor] | None = None) -> None:
        """Plot an episode, announce it, and hand it to the loggers."""
        file = self.save_dir / name
        LOGGER.info(f"Plotting episode to {file}... ")
        plot_episode(batch, self.data["names"], file, found)
        self.on_plot(file)

    def _plot_embedding(self, model: FewShotDetectionModel) -> None:
        """Plot what a model in eval mode makes of objects of the val split."""
        labels = [x for x in self.test_loader.dataset.labels if len(x["cls"])]
        labels = [labels[i] for i in np.linspace(0, len(labels) - 1, min(len(labels), EMBEDDED), dtype=int)]
        if not labels:
            return
        features = extract(
            model, base_support(model, labels), self.args.imgsz, views=[View()], desc="Embedding objects"
        )
        file, prototypes = self.save_dir / "embedding.png", model.model[-1].prototypes.weight.detach()[..., 0]
        LOGGER.info(f"Plotting embedding to {file}... ")
        known = features.embeds[0].any(1)
        shown = features.embeds[0][known], features.cls[known]
        plot_embedding(*shown, prototypes.float().cpu(), model.names, set(model.enrolled), file)
        self.on_plot(file)

    def _plot_val_episodes(self) -> None:
        """Plot episodes of the val split with what the best model finds in their query images."""
        a, val, names = self.args, self.test_loader.dataset, self.data["names"]
        shown = np.bincount([c for x in val.labels for c in np.unique(x["cls"]).astype(int)], minlength=len(names))
        n_way = min(a.n_way, int((shown > a.k_shot).sum()))
        if n_way < 2:
            LOGGER.info("No val_episode.jpg: the val split has too few classes with k_shot + 1 images.")
            return
        try:
            sampler = EpisodeSampler(val.labels, names, n_way, a.k_shot, a.n_query, VAL_EPISODES, a.seed)
        except ValueError:
            LOGGER.info("No val_episode.jpg: the images of the val split do not divide into support and query.")
            return
        model = load_checkpoint(self.best, self.device)[0]
        episodes = EpisodicDataset(SupportDataset(base_support(model, val.labels), a.imgsz))
        for i in range(VAL_EPISODES):
            batch = super().preprocess_batch(episodes.collate_fn([episodes[d] for d in sampler.episode(0, i)]))
            self._plot_episode(batch, f"val_episode{i}.jpg", detect_queries(model.eval(), batch))

    def plot_metrics(self) -> None:
        """Plot results.png as Ultralytics does, and losses.png."""
        super().plot_metrics()
        results = self.read_results_csv()
        if self.doctor.every and results:
            file = self.save_dir / "losses.png"
            terms = [k.removeprefix("share/") for k in results if k.startswith("share/")]
            plot_losses(results, file, {t: gain_of(t, self.args)[1] for t in terms})
            self.on_plot(file)

    def _results(self) -> list[dict[str, float]]:
        """Return the rows of results.csv."""
        columns = self.read_results_csv()
        return [dict(zip(columns, row)) for row in zip(*columns.values())]

    def final_eval(self) -> None:
        """Strip and validate the checkpoints, and choose how they enroll; until all is done they stay as they were.

        Stage 3 ends between its start and its last epoch, however its loop has ended.
        """
        files = self.last, self.best
        writes = RANK in {-1, 0}
        stage = staged(*files) if writes else contextlib.nullcontext([StagedPath(f) for f in files])
        try:
            with stage as (self.last, self.best):
                if writes and self.adaptation and self.last.exists():
                    self.adaptation.end(*map(os.fspath, (self.last, self.best)), self.device)
                _meet()  # the others validate what is staged, too
                super().final_eval()
                if writes:
                    self._prepare_enrollment()
        finally:
            self.last, self.best = files
        _meet()
        if self.episodic and self.args.plots and writes and self.best.exists():
            self._plot_val_episodes()

    def _prepare_enrollment(self) -> None:
        """Store what enrollment needs of the base data, for the best model, in both checkpoints."""
        files = [os.fspath(f) for f in (self.best, self.last) if f.exists()]
        if not files:  # stopped before an epoch was saved
            return
        ckpts = [torch.load(f, map_location="cpu", weights_only=False) for f in files]
        model = deepcopy(ckpts[0]["model"]).float().to(self.device)
        trained_on, about = self.train_loader.dataset, (self.args.imgsz, self.args.seed)
        if self.adaptation:  # what the base data told before holds, except for their embeddings
            for base in trained_on.parts[1:]:
                model.memory = fill_replay_buffer(model, fully_labeled(base), *about)
        else:
            labels = fully_labeled(trained_on.dataset if self.episodic else trained_on)
            model.memory = fill_replay_buffer(model, labels, *about)
            model.prior_strength = choose_prior_strength(model, labels, self.test_loader.dataset.labels, *about)
            better = "mean" if model.prior_strength == math.inf else "fit"
            LOGGER.info(f"Enrollment from one shot, on base classes: '{better}' is better")
        if self.args.plots:
            self._plot_embedding(model)
        for ckpt, file in zip(ckpts, files):
            ckpt["model"].prior_strength, ckpt["model"].memory = model.prior_strength, model.memory
            if self.adaptation:  # its weights are those of no epoch
                ckpt["train_metrics"] = {**(ckpt.get("train_metrics") or {}), **self.metrics}
            save_checkpoint(ckpt, file)


def draw_shots(trainer: FewShotTrainer, shots: Shots, names: dict[int, str]) -> None:
    """Plot the shots that stage 3 enrolled.

    Args:
        trainer (FewShotTrainer): The trainer, when training starts.
        shots (Shots): What was enrolled.
        names (dict[int, str]): Class names of the model.
    """
    file = trainer.save_dir / FILE
    if RANK in {-1, 0} and plot_support(shots, names, file):
        trainer.on_plot(file)


def _meet() -> None:
    """Wait until all processes of the training are here."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
