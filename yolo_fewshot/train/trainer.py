"""The trainer of all stages: Ultralytics' loop with our model, loss, guard and monitor; a `Stage` adds the rest."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch.utils.data import Dataset
from ultralytics.cfg import cfg2dict, get_cfg
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import DEFAULT_CFG, DEFAULT_CFG_DICT, LOGGER, RANK, YAML, colorstr
from ultralytics.utils.checks import check_yaml
from ultralytics.utils.torch_utils import init_seeds, unwrap_model

from yolo_fewshot import args as table
from yolo_fewshot.compat import warn_untested
from yolo_fewshot.data.ignore import has_ignored
from yolo_fewshot.files import AtomicPath
from yolo_fewshot.nn.criterion import branch_losses
from yolo_fewshot.nn.own_terms import load_terms
from yolo_fewshot.train.adaptation import Adaptation
from yolo_fewshot.train.episodic import Episodes
from yolo_fewshot.train.finish import finish
from yolo_fewshot.train.grafting import Grafting
from yolo_fewshot.train.guarded import GuardedTrainer
from yolo_fewshot.train.meta_validation import fitness_of, trained_epochs, write_start
from yolo_fewshot.train.monitor import LossMonitor, report
from yolo_fewshot.train.run_plots import plot_loss_terms
from yolo_fewshot.train.stage import Stage

FIXED = ("rect", "nbs", "close_mosaic", "cls_remap")  # keys that a stage may set without a word of its own


def stage_of(args: dict[str, Any]) -> type[Stage]:
    """Return the class of the stage of a run.

    Args:
        args (dict[str, Any]): Resolved configuration.
    """
    if args["stage"] == 3:
        return Grafting if table.grafts(args) else Adaptation
    return Episodes if args["stage"] == 2 else Stage


class AllEpochsDone(Exception):
    """Tells Ultralytics' training loop that there is no epoch left to train."""


class FewShotTrainer(GuardedTrainer, DetectionTrainer):
    """Trains a few-shot detector: stage 1 on ordinary batches, stage 2 on episodes; and any detector on shots, stage 3.

    Attributes:
        stage (Stage): Stage of this run, with the steps that differ between stages.
        monitor (LossMonitor): Gradient of each term and its chance level.

    Examples:
        >>> from yolo_fewshot import FewShotTrainer
        >>> FewShotTrainer(cfg="stage2.yaml", overrides={"model": "fewshot.yaml", "data": "base.yaml"}).train()
    """

    last: Path  # Ultralytics sets these
    best: Path
    wdir: Path
    best_fitness: float | None
    metrics: dict[str, float] | None

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
        recipe = {} if cfg is DEFAULT_CFG else recipe  # values that nobody gave
        overrides = dict(cfg2dict(overrides or {}))
        given = {**recipe, **overrides}
        # Ultralytics merges, so that its errors name misspelled keys and wrong types.
        merged = vars(get_cfg({**DEFAULT_CFG_DICT, "save_dir": ""}, given))
        if merged["stage"] == 3 and "graft" in overrides and overrides["graft"] is None and not merged["resume"]:
            merged["graft"] = "none"  # the command line parses graft=none as None
        table.refuse_support(merged)
        if not merged["resume"]:  # a resumed run takes everything from its checkpoint
            table.check(merged)
            merged.update(self._resolve(merged, given))
            load_terms(merged["terms"])
        super().__init__(merged, {k: merged[k] for k in overrides}, _callbacks)
        if self.resume:
            load_terms(self.args.terms)
        self._columns: dict[str, float] = {}  # of guard and monitor, for results.csv
        self.monitor = LossMonitor(0 if self.args.compile else self.args.doctor)  # measuring needs the graph twice
        self.last, self.best, self.wdir = AtomicPath(self.last), AtomicPath(self.best), AtomicPath(self.wdir)

    def check_resume(self, overrides: dict[str, Any]) -> None:
        """Read the arguments of a run to resume as Ultralytics does; a moved run writes to its new folder.

        Args:
            overrides (dict): Arguments that were given.
        """
        super().check_resume(overrides)
        if self.resume and overrides.get("batch"):  # which Ultralytics lets a resumed run change
            args = dict(vars(self.args))
            for k, v in stage_of(args).settings(args, {**args, "batch": overrides["batch"]}).items():
                setattr(self.args, k, v)
        if self.resume:
            # A finished checkpoint does not record its folder.
            weights, recorded = Path(self.args.resume).resolve().parent, getattr(self.args, "save_dir", None)
            if weights.name == "weights" and not (recorded and Path(recorded).exists()):
                self.args.save_dir = str(weights.parent)

    @staticmethod
    def _resolve(merged: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
        """Return the values of our keys, and the arguments that follow from the stage."""
        values = table.resolve(merged)
        stage = stage_of(values)
        if merged.get("quantize") == 8:
            raise ValueError(
                f"'quantize=8' does not work in stage {values['stage']}: what is trained is not the network that is "
                "saved in the end. Leave it out, and give it to export."
            )
        unused = [k for k in table.used(merged) if k not in stage.keys]
        if unused:
            keys, places = ", ".join(f"{k}=" for k in unused), sorted({table.place_of(k) for k in unused})
            LOGGER.warning(f"{keys} has no effect in stage {values['stage']}. Use it with {' or '.join(places)}.")
        settings = stage.settings({**merged, **values}, given)
        fixed = [k for k in FIXED if k in settings and given.get(k) not in {None, DEFAULT_CFG_DICT.get(k), settings[k]}]
        if fixed:
            keys, instead = (", ".join(f"{k}={x[k]}" for k in fixed) for x in (given, settings))
            LOGGER.warning(f"{keys} is ignored in stage {values['stage']}, which sets {instead}.")
        return {**values, **settings}

    def get_dataset(self) -> dict[str, Any]:
        """Return the checked data.yaml as Ultralytics does, and make the stage.

        Returns:
            (dict): Paths, class names and so on.

        Raises:
            ValueError: If `meta_val` does not fit the data or the other arguments.
        """
        data = super().get_dataset()
        self.stage = stage_of(dict(vars(self.args)))(self, data)
        self.stage.keep_out(data)
        return data

    def get_model(self, cfg: str | dict, weights: DetectionModel | None = None, verbose: bool = True) -> DetectionModel:
        """Return the model of the stage, i.e. a few-shot model with the weights of a stock or few-shot model.

        Args:
            cfg (str | dict): Model YAML or its content.
            weights (DetectionModel, optional): Model to take weights from.
            verbose (bool): Whether to log the layers.

        Returns:
            (DetectionModel): The model.

        Raises:
            ValueError: If a weight is not finite, or the stage cannot start from these weights.
        """
        return self.stage.build_model(cfg, weights, verbose and RANK == -1)

    def setup_model(self) -> dict[str, Any] | None:
        """Load or build the model as Ultralytics does; the processes of multi-GPU training get that of their launcher.

        Returns:
            (dict | None): Checkpoint to resume from.
        """
        if isinstance(self.model, DetectionModel):
            self.stage.adopt(self.model)
        return super().setup_model()

    def build_dataset(self, img_path: str, mode: str = "train", batch: int | None = None) -> Dataset:
        """Return the data set of the stage.

        Args:
            img_path (str): Path to the images.
            mode (str): 'train' or 'val'.
            batch (int, optional): Images in a batch.

        Returns:
            (Dataset): The data set.

        Raises:
            ValueError: If its labels do not fit the model.
        """
        return self.stage.build_dataset(super().build_dataset, img_path, mode, batch)

    def get_dataloader(self, dataset_path: str, batch_size: int = 16, rank: int = 0, mode: str = "train") -> Any:
        """Return Ultralytics' loader for validation, and that of the stage for training.

        Args:
            dataset_path (str): Path to the images.
            batch_size (int): Images per batch of this process.
            rank (int): Rank of this process, -1 for a single one.
            mode (str): 'train' or 'val'.

        Returns:
            (InfiniteDataLoader): The loader.

        Raises:
            MemoryError: If Ultralytics asks for smaller batches of stage 2, as it does when memory runs out.
        """
        batch_size = max(batch_size, 1)  # of a process; an episode may have fewer images than there are processes
        if mode != "train":
            return super().get_dataloader(dataset_path, batch_size, rank, mode)
        self.stage.check_batch()
        return self.stage.train_loader(super().get_dataloader(dataset_path, batch_size, rank, mode), batch_size)

    def _close_dataloader_mosaic(self) -> None:
        """Stop mosaic as Ultralytics does, which then asks the loader for this epoch again."""
        super()._close_dataloader_mosaic()
        # Older Ultralytics versions also call this before the first epoch.
        if self.stage.seeded_epochs and hasattr(self, "epoch"):
            self.train_loader.sampler.restart(self.epoch)

    def listeners(self) -> dict[str, Callable[[FewShotTrainer], None]]:
        """Return our callbacks by event; they run before all others."""
        return {**super().listeners(), "on_train_batch_start": type(self).begin_batch}

    def begin_training(self) -> None:
        """Set up guard and loss, in every process."""
        super().begin_training()
        model = unwrap_model(self.model)
        for loss in branch_losses(model):
            loss.masked = has_ignored(self.train_loader.dataset)
        self.stage.begin_training(model)

    def begin_epoch(self) -> None:
        """Set the counters to zero and, where the stage asks for it, seed the epoch."""
        super().begin_epoch()
        self.monitor.reset()
        for loss in branch_losses(unwrap_model(self.model)):
            if loss.clamped_dfl:
                loss.clamped_dfl.reset_counts()
        if self.stage.seeded_epochs:
            init_seeds(self.args.seed + 1 + RANK + 1000 * self.epoch, deterministic=self.args.deterministic)
        self.stage.begin_epoch()

    def begin_batch(self) -> None:
        """Count a batch, and measure its terms if it is due."""
        self.monitor.begin_batch(unwrap_model(self.model), self.scaler)

    def end_epoch(self) -> None:
        """Check the batches that no step has used yet, and compute the columns of guard and monitor."""
        super().end_epoch()
        dfl = [x.clamped_dfl for x in branch_losses(unwrap_model(self.model)) if x.clamped_dfl]
        clamps = {
            f"train/{k}_clamped": sum(int(getattr(x, f"{k[:-1]}_clamped")) for x in dfl) for k in ("sides", "means")
        }
        self._columns = {**self.guard.columns(), **clamps, **self.monitor.columns()}
        if self.metrics is not None:  # it is None outside of the main process
            self.metrics = {**self.metrics, **self._columns}

    def end_training(self) -> None:
        """Log a summary of the loss terms, or of the guard where they were not measured."""
        text = report(self._results(), self.args)
        if text:
            LOGGER.info(f"{colorstr('Loss monitor:')} {text}")
        else:
            super().end_training()

    def validate(self) -> tuple[dict[str, float] | None, float | None]:
        """Validate as Ultralytics does, and measure the classes that `meta_val` keeps out.

        Returns:
            metrics (dict | None): Results, with the columns of guard and monitor, for results.csv and loggers.
            fitness (float | None): Fitness; with `meta_val` the mean AP50 of the kept-out classes.
        """
        best = self.best_fitness
        metrics, fitness = super().validate()
        if metrics is None:  # outside of the main process
            return metrics, fitness
        metrics = {**metrics, **self._columns}
        if self.stage.meta:
            found = self.stage.measure(self.ema.ema)
            metrics, fitness = {**metrics, **found}, fitness_of(found)
            self.best_fitness = fitness if best is None or best < fitness else best
        return metrics, fitness

    def save_metrics(self, metrics: dict[str, float]) -> None:
        """Add a row to results.csv as Ultralytics does, and before the first one the measurement of the start.

        Args:
            metrics (dict): Values by column.
        """
        new = not self.csv.exists()
        super().save_metrics(metrics)
        if new and self.stage.meta and self.stage.meta.start:
            write_start(self.csv, self.stage.meta.start)

    def preprocess_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Move a batch to the device as Ultralytics does, and add what the stage needs.

        Args:
            batch (dict): Collated batch.

        Returns:
            (dict): Preprocessed batch.
        """
        self._batch = self.stage.preprocess(super().preprocess_batch(batch))
        return self._batch

    @property
    def loss_scale(self) -> int:
        """Factor by which the loss of an optimizer step is multiplied."""
        return self.stage.loss_scale(super().loss_scale)

    def resume_training(self, ckpt: dict[str, Any] | None) -> None:
        """Resume from a checkpoint, with the batches of the next epoch.

        Args:
            ckpt (dict, optional): Checkpoint.

        Raises:
            AllEpochsDone: After the end of a run that was interrupted after its last epoch.
        """
        self.stage.begin_run()
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
        if self.stage.seeded_epochs:
            self.train_loader.sampler.restart(self.start_epoch)
            self.train_loader.reset()  # its processes may have asked for the first epoch already
        if RANK in {-1, 0} and self.csv.exists():  # an interrupted epoch may have left a row, or a part of one
            lines = self.csv.read_text().splitlines(keepends=True)
            rows = [x for x in lines[1:] if x.endswith("\n") and float(x.partition(",")[0]) <= self.start_epoch]
            AtomicPath(self.csv).write_bytes("".join([*lines[:1], *rows]).encode())

    def train(self) -> None:
        """Train, or finish a run that was interrupted after its last epoch."""
        with contextlib.suppress(AllEpochsDone):
            super().train()

    def plot_training_samples(self, batch: dict[str, Any], ni: int) -> None:
        """Plot a batch as the stage does, and as Ultralytics does.

        Args:
            batch (dict): Preprocessed batch.
            ni (int): Number of the batch.
        """
        self.stage.plot_batch(batch, ni)
        super().plot_training_samples(batch, ni)  # last: it turns the tensors of the batch into arrays

    def plot_metrics(self) -> None:
        """Plot results.png as Ultralytics does, and losses.png."""
        super().plot_metrics()
        if self.monitor.every:
            plot_loss_terms(self)

    def final_eval(self) -> None:
        """Strip and validate the checkpoints, and prepare enrollment; they stay unchanged until all is done."""
        finish(self)

    def _results(self) -> list[dict[str, float]]:
        """Return the rows of results.csv for the trained epochs."""
        columns = trained_epochs(self.read_results_csv())
        return [dict(zip(columns, row)) for row in zip(*columns.values())]
