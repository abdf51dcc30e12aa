"""The trainer of stages 1 and 2."""

from __future__ import annotations

import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from ultralytics.cfg import cfg2dict, get_cfg
from ultralytics.data.build import InfiniteDataLoader, seed_worker
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.tasks import load_checkpoint
from ultralytics.utils import DEFAULT_CFG, DEFAULT_CFG_DICT, LOGGER, RANK, YAML
from ultralytics.utils.checks import check_yaml
from ultralytics.utils.torch_utils import init_seeds

from yolo_fewshot import args as table
from yolo_fewshot import plugin
from yolo_fewshot.calibrate import choose_pull
from yolo_fewshot.episodes import EpisodeSampler, EpisodicDataset
from yolo_fewshot.files import AtomicPath, restored_on_failure, save_checkpoint
from yolo_fewshot.guard import Guard
from yolo_fewshot.memory import remember
from yolo_fewshot.model import FewShotDetectionModel

MIXING = ("mosaic", "mixup", "cutmix", "copy_paste")  # augmentations that put other pictures into a picture
STOCK_CLIP = 10.0  # Ultralytics' own, on the loss multiplied by the batch size


class FewShotTrainer(DetectionTrainer):
    """Trains a few-shot detector: stage 1 on ordinary batches, stage 2 on episodes.

    Attributes:
        episodic (bool): Whether this run is stage 2.
        guard (Guard): Gradient clip and skipped steps.

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
        super().__init__(merged, {k: merged[k] for k in overrides}, _callbacks)
        self.episodic = self.args.stage == 2
        self.guard = Guard()
        self.last, self.best, self.wdir = AtomicPath(self.last), AtomicPath(self.best), AtomicPath(self.wdir)

    @staticmethod
    def _resolve(merged: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
        """Return what the stage decides: our keys' values and, in stage 2, the batch and the mixing of pictures."""
        values = table.resolve(merged)
        if values["stage"] == 1:
            idle = [k for k in table.used(merged) if k not in {"stage", "grad_clip"}]
            if idle:
                LOGGER.warning(f"Stage 1 has no episodes, so {', '.join(f'{k}=' for k in idle)} has no effect there.")
            return values
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
        """
        model = FewShotDetectionModel(cfg, ch=self.data["channels"], nc=self.data["nc"], verbose=verbose and RANK == -1)
        model = self.set_model_names_for_load(model)
        if weights:
            model.load(weights)
            if self.episodic and not self.resume:
                model.model[-1].freeze_prototypes(model.transferred)
        return model

    def get_dataloader(self, dataset_path: str, batch_size: int = 16, rank: int = 0, mode: str = "train") -> Any:
        """Return Ultralytics' loader, or in stage 2 the loader of episodes.

        Args:
            dataset_path (str): Path to the pictures.
            batch_size (int): Pictures per batch; episodes have their own size.
            rank (int): Rank of this process, -1 for a single one.
            mode (str): 'train' or 'val'.

        Returns:
            (InfiniteDataLoader): The loader; in stage 2 its length is `episodes`.
        """
        loader = super().get_dataloader(dataset_path, batch_size, rank, mode)
        if mode != "train" or not self.episodic:
            return loader
        a = self.args
        dataset = EpisodicDataset(loader.dataset)
        sampler = EpisodeSampler(
            dataset.labels, self.data["names"], a.n_way, a.k_shot, a.n_query, a.episodes, a.seed, max(RANK, 0)
        )
        workers = min(os.cpu_count() // max(self.world_size, 1), a.workers, a.episodes)
        return InfiniteDataLoader(
            dataset,
            batch_size=sampler.episode_size,
            sampler=sampler,
            num_workers=workers,
            prefetch_factor=4 if workers else None,
            pin_memory=loader.pin_memory,
            collate_fn=dataset.collate_fn,
            worker_init_fn=seed_worker,
            generator=torch.Generator().manual_seed(a.seed),  # starting it must not disturb the run's random state
        )

    def run_callbacks(self, event: str) -> None:
        """Run the callbacks of an event; an epoch starts with fresh counters and, in stage 2, its own random state.

        Args:
            event (str): Name of the event.
        """
        if event == "on_train_epoch_start":
            self.guard.reset()
            self._finite_tloss = None
            if self.episodic:  # an interrupted run and an uninterrupted one have the same state here
                init_seeds(self.args.seed + 1 + RANK + 1000 * self.epoch, deterministic=self.args.deterministic)
        super().run_callbacks(event)

    def optimizer_step(self) -> None:
        """Clip the gradient, then take a step, or skip it if the loss or the gradient is not finite."""
        self.scaler.unscale_(self.optimizer)
        # Ultralytics multiplies the loss by the pictures of all processes and adds up `accumulate` batches. An episode
        # is the batch of one process.
        scale = self.batch_size * self.accumulate * (max(self.world_size, 1) if self.episodic else 1)
        clip = self.args.grad_clip or STOCK_CLIP / scale
        finite = self.guard.clip(self.model, clip, scale, self.loss)
        if finite:
            self.scaler.step(self.optimizer)
            self._finite_tloss = self.tloss
        else:  # neither the running means nor, after the last batch, the whole epoch may suffer
            self.tloss = self._finite_tloss or {k: torch.zeros_like(v) for k, v in self.tloss.items()}
            self.loss = torch.zeros_like(self.loss)
        self.scaler.update()  # after an overflow this halves the scale
        self.optimizer.zero_grad()
        if self.ema and finite:
            self.ema.update(self.model)

    def resume_training(self, ckpt: dict[str, Any] | None) -> None:
        """Resume from a checkpoint; the episodes go on with those of the next epoch.

        Args:
            ckpt (dict, optional): Checkpoint.
        """
        super().resume_training(ckpt)
        if self.episodic:
            self.train_loader.sampler.set_epoch(self.start_epoch)

    def save_metrics(self, metrics: dict[str, Any]) -> None:
        """Save the metrics of an epoch to results.csv, with the columns `train/grad_norm` and `train/skipped`.

        Args:
            metrics (dict): Metrics by column.
        """
        super().save_metrics({**metrics, **self.guard.columns()})

    def final_eval(self) -> None:
        """Strip and validate the checkpoints, and choose how they enroll; an interruption leaves them as they were."""
        with restored_on_failure(self.last, self.best):
            super().final_eval()
            if RANK in {-1, 0}:
                self._prepare_enrolment()

    def _prepare_enrolment(self) -> None:
        """Store what enrolment needs of the base data, for the best model, in both checkpoints."""
        files = [f for f in (self.best, self.last) if f.exists()]
        model = load_checkpoint(files[0])[0].to(self.device)
        labels = [loader.dataset.labels for loader in (self.train_loader, self.test_loader)]
        model.memory = remember(model, labels[0], self.args.imgsz, self.args.seed)
        pull = choose_pull(model, *labels, self.args.imgsz, self.args.seed)
        LOGGER.info(f"Enrolment from one shot, on base classes: '{'mean' if pull == math.inf else 'fit'}' is better")
        for file in files:
            ckpt = torch.load(file, map_location="cpu", weights_only=False)
            ckpt["model"].pull, ckpt["model"].memory = pull, model.memory
            save_checkpoint(ckpt, file)
