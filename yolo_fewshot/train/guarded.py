"""The guard in any Ultralytics trainer: gradients are clipped, and a step that is not finite is skipped."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.utils import DEFAULT_CFG, LOGGER, colorstr
from ultralytics.utils.torch_utils import autocast, unwrap_model

from yolo_fewshot import args as table
from yolo_fewshot.train.diagnosis import Diagnosis, diagnose
from yolo_fewshot.train.guard import Guard

MEAN_LOSSES = ("ClassificationTrainer", "RTDETRTrainer")  # their loss is not multiplied by the images of the batch


class GuardedTrainer(BaseTrainer):
    """Mixin that puts the guard into the optimizer step of an Ultralytics trainer, and leaves all else as it is.

    Losses, files, and random state are those of the trainer beside it. `grad_clip`, `nonfinite`, and `nonfinite_limit`
    are read from its arguments; without `grad_clip` Ultralytics' own clip is in force.

    Attributes:
        guard (Guard | None): Gradient clip and skipped steps; None before training starts.

    Examples:
        >>> class GuardedPoseTrainer(GuardedTrainer, PoseTrainer): ...
        >>> GuardedPoseTrainer(overrides={"model": "yolo11n-pose.pt", "data": "pose.yaml", "grad_clip": 5.0}).train()
    """

    def __init__(self, cfg: Any = DEFAULT_CFG, overrides: dict[str, Any] | None = None, _callbacks: dict | None = None):
        """Initialize the trainer.

        Args:
            cfg (str | Path | dict | SimpleNamespace): Configuration, as in Ultralytics.
            overrides (dict, optional): Values that take precedence.
            _callbacks (dict, optional): Callbacks, as in Ultralytics.
        """
        super().__init__(cfg, overrides, _callbacks)
        self.guard: Guard | None = None
        self._batch: dict[str, Any] | None = None
        self._loaded: list[dict[str, Any]] = []  # batches of a step of several
        self._finite_tloss: dict[str, torch.Tensor] | None = None
        if not self.ddp:  # a launcher hands its callbacks to its processes, which listen for themselves
            for event, listener in self.listeners().items():
                self.callbacks.setdefault(event, []).insert(0, listener)

    def listeners(self) -> dict[str, Callable[[GuardedTrainer], None]]:
        """Return what is called with the trainer at an event, by the name of the event and before other callbacks."""
        cls = type(self)
        return {
            "on_train_start": cls.begin_training,
            "on_train_epoch_start": cls.begin_epoch,
            "on_train_epoch_end": cls.end_epoch,
            "on_train_end": cls.end_training,
        }

    def begin_training(self) -> None:
        """Set up the guard for the model that is trained."""
        self.guard = Guard(unwrap_model(self.model))

    def begin_epoch(self) -> None:
        """Set the counters of an epoch to zero."""
        self.guard.reset()

    def end_epoch(self) -> None:
        """Check the batches that the last step left over, which are part of the next epoch's first step."""
        if self._batch is None:
            return
        bad = (~torch.isfinite(torch.stack([self.loss.detach(), *self.tloss.values()]))).any().int()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(bad, dist.ReduceOp.MAX)
        if bad:
            self._skip_step()
            self.optimizer.zero_grad()
            self._batch, self._loaded = None, []

    def end_training(self) -> None:
        """Say what the guard did, unless the run was only finished here."""
        if self.guard:
            LOGGER.info(f"{colorstr('Guard:')} {self.guard.summary()}")

    def preprocess_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Preprocess a batch as Ultralytics does, and keep the batches of a step for its diagnosis.

        Args:
            batch (dict): Collated batch.

        Returns:
            (dict): Preprocessed batch.
        """
        if self.accumulate > 1:
            self._loaded.append(dict(batch))  # as loaded, for they stay on the CPU
        self._batch = super().preprocess_batch(batch)
        return self._batch

    def autocast(self) -> contextlib.AbstractContextManager:
        """Return the context in which this run computes a batch."""
        return autocast(torch.bfloat16 if self.args.amp == "bf16" else self.amp, device=self.device.type)

    @property
    def loss_scale(self) -> int:
        """Factor of the loss itself in the sum that a step is taken on.

        Ultralytics multiplies the loss by the images of all processes, or where it is a mean, as in classification, by
        the number of processes alone, and adds up `accumulate` batches.
        """
        mean = any(cls.__name__ in MEAN_LOSSES for cls in type(self).__mro__)
        return (max(self.world_size, 1) if mean else self.batch_size) * self.accumulate

    def optimizer_step(self) -> None:
        """Clip the gradient, then take a step, or skip it if the loss or the gradient is not finite.

        Raises:
            FloatingPointError: If it is not finite and `nonfinite=raise`, or so many times in a row that training
                cannot go on.
        """
        self.scaler.unscale_(self.optimizer)
        if self.guard.clip(self.args.grad_clip, self.loss_scale, self.loss):
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
        found = self._diagnose()
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

    def _diagnose(self) -> Diagnosis:
        """Find out which batch of the step is not finite, and why; processes that train together agree on it."""
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
        return found


def guarded(trainer: type[BaseTrainer]) -> type[BaseTrainer]:
    """Return an Ultralytics trainer with the guard in its optimizer step.

    Args:
        trainer (type[BaseTrainer]): Trainer of any task, or a user's own.

    Returns:
        (type[BaseTrainer]): A subclass of it, or the trainer itself if it has the guard already.
    """
    if issubclass(trainer, GuardedTrainer):
        return trainer
    return type(f"Guarded{trainer.__name__}", (GuardedTrainer, trainer), {"__doc__": trainer.__doc__})
