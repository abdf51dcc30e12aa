"""The trainer of stages 1 to 3."""

from __future__ import annotations

import contextlib
import math
import os
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
from ultralytics.utils.torch_utils import autocast, init_seeds, unwrap_model

from yolo_fewshot import args as table
from yolo_fewshot import plugin
from yolo_fewshot.adapt import Adaptation
from yolo_fewshot.adapt_data import ShotsAndBase, relabel
from yolo_fewshot.calibrate import choose_pull
from yolo_fewshot.criterion import FewShotLoss, branch_losses, gain_key
from yolo_fewshot.diagnosis import diagnose
from yolo_fewshot.episode_detect import detect_queries
from yolo_fewshot.episodes import EpisodeSampler, EpisodicDataset
from yolo_fewshot.features import View, extract
from yolo_fewshot.files import AtomicPath, save_checkpoint, staged
from yolo_fewshot.guard import Guard, nonfinite
from yolo_fewshot.loss_doctor import LossDoctor, report
from yolo_fewshot.masked import fully_labelled, has_ignored, masked
from yolo_fewshot.memory import remember
from yolo_fewshot.model import FewShotDetectionModel
from yolo_fewshot.plot_embedding import plot_embedding
from yolo_fewshot.plot_episode import plot_episode
from yolo_fewshot.plot_support import FILE, plot_support
from yolo_fewshot.plots import plot_losses
from yolo_fewshot.support import Support, SupportDataset

MIXING = ("mosaic", "mixup", "cutmix", "copy_paste")  # augmentations that put other pictures into a picture
VAL_EPISODES, EMBEDDED = 3, 200  # episodes, and pictures whose objects are embedded, plotted at the end
STOCK_CLIP = 10.0  # Ultralytics' own, on the loss multiplied by the batch size


class AllEpochsDone(Exception):
    """Tells Ultralytics' training loop that there is no epoch left to train."""


class FewShotTrainer(DetectionTrainer):
    """Trains a few-shot detector: stage 1 on ordinary batches, stage 2 on episodes, stage 3 on shots from enrolment.

    Attributes:
        episodic (bool): Whether this run is stage 2.
        adaptation (Adaptation, optional): What stage 3 does beside training.
        guard (Guard): Gradient clip and skipped steps.
        doctor (LossDoctor): Gradient of each term and its chance level.
        loss_class (type[FewShotLoss]): The loss; a subclass of the trainer may set one with terms of its own.

    Examples:
        >>> from yolo_fewshot import FewShotTrainer
        >>> FewShotTrainer(cfg="stage2.yaml", overrides={"model": "fewshot.yaml", "data": "base.yaml"}).train()
    """

    loss_class: type[FewShotLoss] = FewShotLoss

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
        plugin.warn_untested()
        recipe = YAML.load(check_yaml(cfg)) if isinstance(cfg, (str, Path)) else cfg2dict(cfg)
        overrides = dict(cfg2dict(overrides or {}))
        given = {**recipe, **overrides}
        # A merge by Ultralytics itself, so that it names misspelt keys and wrong types.
        merged = vars(get_cfg({**DEFAULT_CFG_DICT, "save_dir": ""}, given))
        table.refuse_support(merged)
        if not merged["resume"]:  # a resumed run takes everything from its checkpoint
            table.check(merged)
            merged.update(self._resolve(merged, given))
        self.adaptation: Adaptation | None = None
        super().__init__(merged, {k: merged[k] for k in overrides}, _callbacks)
        self.episodic = self.args.stage == 2
        self._batch: dict[str, Any] | None = None
        self._loaded: list[dict[str, Any]] = []  # batches of a step of several
        self._finite_tloss: dict[str, torch.Tensor] | None = None
        self._columns: dict[str, float] = {}  # of the last epoch, by guard and doctor
        self.doctor = LossDoctor(0 if self.args.compile else self.args.doctor)  # measuring needs the graph twice
        self.last, self.best, self.wdir = AtomicPath(self.last), AtomicPath(self.best), AtomicPath(self.wdir)

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
                f"{size} pictures."
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
            ValueError: If a weight is not finite, or stage 3 has nothing to start from.
        """
        if self.args.stage == 3 and not weights:
            raise ValueError("'pretrained=False' leaves stage 3 nothing to adapt. Leave it out.")
        if self.adaptation and not self.resume:
            weights = self._enrolled(weights)
        model = FewShotDetectionModel(cfg, ch=self.data["channels"], nc=self.data["nc"], verbose=verbose and RANK == -1)
        model = self.set_model_names_for_load(model)
        model.loss_class = self.loss_class
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
                model.enrolled, model.pull, model.memory = weights.enrolled, weights.pull, weights.memory
                self.adaptation.begin(model, self.wdir / "enrolled.pt", self.resume)
        return model

    def _enrolled(self, weights: nn.Module) -> nn.Module:
        """Return a model in which the new classes of the shots are enrolled, and plot those."""
        weights, shots = self.adaptation.enrolled(weights, self.device)
        file = self.save_dir / FILE
        if shots and self.args.plots and RANK in {-1, 0} and plot_support(shots, weights.names, file):
            self.on_plot(file)
        return weights

    def get_dataset(self) -> dict[str, Any]:
        """Return what Ultralytics knows of the data; in stage 3 with the classes of the model and of the shots.

        Returns:
            (dict): Paths, class names and so on.

        Raises:
            ValueError: If stage 3 is not to start from a few-shot checkpoint.
        """
        data = super().get_dataset()
        if self.args.stage != 3:
            return data
        self.adaptation = Adaptation(self.args, self.model, data)
        return {**data, "names": self.adaptation.names, "nc": len(self.adaptation.names)}

    def build_dataset(self, img_path: str, mode: str = "train", batch: int | None = None) -> Dataset:
        """Return Ultralytics' data set; in stage 3 with the model's class indices, and with base pictures to train on.

        Args:
            img_path (str): Path to the pictures.
            mode (str): 'train' or 'val'.
            batch (int, optional): Pictures in a batch.

        Returns:
            (Dataset): The data set.

        Raises:
            ValueError: If pictures of stage 3 show a class that neither the model nor the shots know.
        """
        if not self.adaptation:
            return masked(super().build_dataset(img_path, mode, batch), self.data, mode)
        shots, *base = self.adaptation.labelled
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
        """Return Ultralytics' loader, in stage 2 the loader of episodes, in stage 3 that of shots and base pictures.

        Args:
            dataset_path (str): Path to the pictures.
            batch_size (int): Pictures per batch; episodes have their own size.
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
                f"{table.episode_size(vars(self.args))} pictures of imgsz={self.args.imgsz} needs more memory than "
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
            sampler = self.adaptation.sampler(dataset, batch_size)
            batches = sampler.batches
        workers = min(os.cpu_count() // max(self.world_size, 1), a.workers, batches)
        return InfiniteDataLoader(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            num_workers=workers,
            prefetch_factor=4 if workers else None,
            pin_memory=loader.pin_memory,
            collate_fn=dataset.collate_fn,
            worker_init_fn=seed_worker,
            generator=torch.Generator().manual_seed(a.seed),  # starting it must not disturb the run's random state
        )

    def _close_dataloader_mosaic(self) -> None:
        """Stop mixing pictures as Ultralytics does, which then asks the loader for this epoch anew."""
        super()._close_dataloader_mosaic()
        if self.adaptation:
            self.train_loader.sampler.restart(self.epoch)

    def run_callbacks(self, event: str) -> None:
        """Run the callbacks of an event, after what guard and doctor have to do then; loggers get their columns, too.

        Args:
            event (str): Name of the event.
        """
        if event == "on_train_start":
            self.guard = Guard(unwrap_model(self.model))
            if self.ema:
                self.ema.ema.loss_class = self.loss_class
            for loss in branch_losses(unwrap_model(self.model)):
                loss.masked = has_ignored(self.train_loader.dataset)
            if self.adaptation:
                self.adaptation.retain(unwrap_model(self.model), self.train_loader.dataset.labels)
        elif event == "on_train_epoch_start":
            self._start_epoch()
        elif event == "on_train_batch_start":
            self.doctor.watch(unwrap_model(self.model), self.scaler)
        elif event == "on_train_epoch_end":
            self._end_epoch()
        elif event == "on_train_end" and (text := report(self._results(), self.args)):
            LOGGER.info(f"{colorstr('Loss doctor:')} {text}")
        if event != "on_fit_epoch_end":
            super().run_callbacks(event)
            return
        metrics, self.metrics = self.metrics, {**self.metrics, **self._columns}  # where loggers find their scalars
        super().run_callbacks(event)
        self.metrics = metrics

    def _start_epoch(self) -> None:
        """Set the counters to zero and, in stages 2 and 3, the random state to that of the epoch."""
        self.guard.reset()
        self.doctor.reset()
        for loss in branch_losses(unwrap_model(self.model)):
            if loss.clamped_dfl:
                loss.clamped_dfl.reset_counts()
        if self.args.stage != 1:  # an interrupted run and an uninterrupted one have the same state here
            init_seeds(self.args.seed + 1 + RANK + 1000 * self.epoch, deterministic=self.args.deterministic)

    def preprocess_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Move a batch to the device as Ultralytics does, and keep those of a step for its diagnosis.

        Args:
            batch (dict): Collated batch.

        Returns:
            (dict): Preprocessed batch.
        """
        if self.accumulate > 1:
            self._loaded.append(dict(batch))  # as loaded, for they stay on the CPU
        self._batch = super().preprocess_batch(batch)
        if self.adaptation:
            self._batch = self.adaptation.taught(self._batch)
        return self._batch

    def autocast(self) -> contextlib.AbstractContextManager:
        """Return the context in which this run computes a batch."""
        return autocast(torch.bfloat16 if self.args.amp == "bf16" else self.amp, device=self.device.type)

    def optimizer_step(self) -> None:
        """Clip the gradient, then take a step, or skip it if the loss or the gradient is not finite.

        Raises:
            FloatingPointError: If it is not finite and `nonfinite=raise`, or so many times in a row that training
                cannot go on.
        """
        self.scaler.unscale_(self.optimizer)
        # Ultralytics multiplies the loss by the pictures of all processes and adds up `accumulate` batches. An episode
        # is the batch of one process.
        scale = self.batch_size * self.accumulate * (max(self.world_size, 1) if self.episodic else 1)
        clip = self.args.grad_clip or STOCK_CLIP / scale
        if self.guard.clip(clip, scale, self.loss):
            self.scaler.step(self.optimizer)
            self._finite_tloss = self.tloss
            if self.ema:
                self.ema.update(self.model)
        else:
            self._skip_step()
        self.scaler.update()  # after an overflow this halves the scale
        self.optimizer.zero_grad()
        self._batch, self._loaded = None, []

    def _skip_step(self) -> None:
        """Say why a step is skipped, and undo what its batches did to the model and to the log."""
        float16 = self.amp and self.args.amp != "bf16"
        scaled = self.scaler.is_enabled() and bool(torch.isfinite(self.loss))  # which an overflow of the scale leaves
        about = self.data["names"], self.autocast, float16, scaled
        found = diagnose(unwrap_model(self.model), self._batch, *about)
        for batch in self._loaded[:-1]:  # it may be another batch of the step
            if not found.certain:
                found = diagnose(unwrap_model(self.model), super().preprocess_batch(batch), *about)
        if dist.is_available() and dist.is_initialized():  # the batch at fault may be that of another process
            of_all: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(of_all, found)
            found = max(of_all, key=lambda x: (x.certain, not x.overflow))
        restored = self.guard.undo(self.ema.ema, self.optimizer)
        self.guard.skip(found.overflow)
        # Neither the running means nor, after its last batch, the whole epoch may suffer.
        self.tloss = self._finite_tloss or {k: torch.zeros_like(v) for k, v in self.tloss.items()}
        self.loss = torch.zeros_like(self.loss)
        if found.overflow:
            LOGGER.info(
                f"AMP: {found.cause} ({self.scaler.get_scale():g}). Skipping this optimizer step. {found.advice}"
            )
            return
        text = f"Non-finite {found}"
        if restored:
            text += f" Weights of {', '.join(restored)} were taken from the moving average."
        if self.args.nonfinite == "raise":
            raise FloatingPointError(f"{text} Training stops because of nonfinite=raise.")
        limit, row = self.args.nonfinite_limit or table.KEYS["nonfinite_limit"].default, self.guard.in_a_row
        if row >= limit:
            raise FloatingPointError(
                f"{text} Training stops after {row} such steps in a row (nonfinite_limit={limit}); last.pt is that "
                "of the last epoch."
            )
        counts = f"{self.guard.skipped} in this epoch, {row} in a row"
        LOGGER.warning(f"{text} Skipping this optimizer step ({counts}).")

    def _end_epoch(self) -> None:
        """Look at the batches that the last step left over, and end stage 3 between its start and its end."""
        self._check_leftover()
        if self.adaptation and self.epoch + 1 >= self.epochs:
            self.adaptation.end(self.ema.ema)

    def _check_leftover(self) -> None:
        """Look at the batches that the last step left over, which are part of the next epoch's first step."""
        if self._batch is None:
            return
        bad = (~torch.isfinite(torch.stack([self.loss.detach(), *self.tloss.values()]))).any().int()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(bad, dist.ReduceOp.MAX)
        if bad:
            self._skip_step()
            self.optimizer.zero_grad()
            self._batch, self._loaded = None, []

    def resume_training(self, ckpt: dict[str, Any] | None) -> None:
        """Resume from a checkpoint; the episodes go on with those of the next epoch.

        Args:
            ckpt (dict, optional): Checkpoint.

        Raises:
            AllEpochsDone: If the run was stopped after its last epoch, when its last steps have been done here.
        """
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
            self.train_loader.sampler.set_epoch(self.start_epoch)
        if RANK in {-1, 0} and self.csv.exists():  # an epoch that was cut off may have left a row, or a part of one
            lines = self.csv.read_text().splitlines(keepends=True)
            rows = [x for x in lines[1:] if x.endswith("\n") and float(x.partition(",")[0]) <= self.start_epoch]
            AtomicPath(self.csv).write_bytes("".join([*lines[:1], *rows]).encode())

    def train(self) -> None:
        """Train, or finish a run that was stopped after its last epoch."""
        with contextlib.suppress(AllEpochsDone):
            super().train()

    def save_metrics(self, metrics: dict[str, Any]) -> None:
        """Save the metrics of an epoch to results.csv, with the columns of guard and doctor.

        Args:
            metrics (dict): Metrics by column.
        """
        dfl = [x.clamped_dfl for x in branch_losses(unwrap_model(self.model)) if x.clamped_dfl]
        clamps = {
            f"train/{k}_clamped": sum(int(getattr(x, f"{k[:-1]}_clamped")) for x in dfl) for k in ("sides", "means")
        }
        self._columns = {**self.guard.columns(), **clamps, **self.doctor.columns()}
        super().save_metrics({**metrics, **self._columns})

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
        features = extract(model, self._support_of(labels), self.args.imgsz, views=[View()], desc="Embedding objects")
        file, prototypes = self.save_dir / "embedding.png", model.model[-1].prototypes.weight.detach()[..., 0]
        LOGGER.info(f"Plotting embedding to {file}... ")
        known = features.embeds[0].any(1)
        shown = features.embeds[0][known], features.cls[known]
        plot_embedding(*shown, prototypes.float().cpu(), model.names, set(model.enrolled), file)
        self.on_plot(file)

    def _support_of(self, labels: list[dict[str, Any]]) -> Support:
        """Return pictures of the data set as a support set."""
        labels = [{**x, "segments": []} for x in labels]
        return Support(self.data["names"], labels, False, Path(str(self.data["val"])), self.data["channels"])

    def _plot_val_episodes(self) -> None:
        """Plot episodes of the val split with what the best model finds in their query pictures."""
        a, val, names = self.args, self.test_loader.dataset, self.data["names"]
        shown = np.bincount([c for x in val.labels for c in np.unique(x["cls"]).astype(int)], minlength=len(names))
        n_way = min(a.n_way, int((shown > a.k_shot).sum()))
        if n_way < 2:
            LOGGER.info("No val_episode.jpg: the val split has too few classes with k_shot + 1 pictures.")
            return
        try:
            sampler = EpisodeSampler(val.labels, names, n_way, a.k_shot, a.n_query, VAL_EPISODES, a.seed)
        except ValueError:
            LOGGER.info("No val_episode.jpg: the pictures of the val split do not divide into support and query.")
            return
        episodes = EpisodicDataset(SupportDataset(self._support_of(val.labels), a.imgsz))
        model = load_checkpoint(self.best, self.device)[0]
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
            plot_losses(results, file, {t: getattr(self.args, gain_key(t), None) for t in terms})
            self.on_plot(file)

    def _results(self) -> list[dict[str, float]]:
        """Return the rows of results.csv."""
        columns = self.read_results_csv()
        return [dict(zip(columns, row)) for row in zip(*columns.values())]

    def final_eval(self) -> None:
        """Strip and validate the checkpoints, and choose how they enroll; until all is done they stay as they were."""
        files = self.last, self.best
        try:
            with staged(*files) as (self.last, self.best):
                super().final_eval()
                if RANK in {-1, 0}:
                    self._prepare_enrolment()
        finally:
            self.last, self.best = files
        if self.episodic and self.args.plots and RANK in {-1, 0} and self.best.exists():
            self._plot_val_episodes()

    def _prepare_enrolment(self) -> None:
        """Store what enrolment needs of the base data, for the best model, in both checkpoints."""
        files = [os.fspath(f) for f in (self.best, self.last) if f.exists()]
        ckpts = [torch.load(f, map_location="cpu", weights_only=False) for f in files]
        model = deepcopy(ckpts[0]["model"]).float().to(self.device)
        trained_on, about = self.train_loader.dataset, (self.args.imgsz, self.args.seed)
        if self.adaptation:  # what the base data told before holds, except for their embeddings
            for base in trained_on.parts[1:]:
                model.memory = remember(model, fully_labelled(base), *about)
        else:
            labels = fully_labelled(trained_on.dataset if self.episodic else trained_on)
            model.memory = remember(model, labels, *about)
            model.pull = choose_pull(model, labels, self.test_loader.dataset.labels, *about)
            better = "mean" if model.pull == math.inf else "fit"
            LOGGER.info(f"Enrolment from one shot, on base classes: '{better}' is better")
        if self.args.plots:
            self._plot_embedding(model)
        for ckpt, file in zip(ckpts, files):
            ckpt["model"].pull, ckpt["model"].memory = model.pull, model.memory
            save_checkpoint(ckpt, file)
