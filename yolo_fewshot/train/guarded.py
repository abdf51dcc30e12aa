"""The trainer mixin with the guard of `guard.py`: it clips gradients and skips non-finite steps in any task."""

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

MEAN_LOSSES = ("ClassificationTrainer", "RTDETRTrainer")  # trainers whose loss is not multiplied by batch size


class GuardedTrainer(BaseTrainer):
    """Mixin that puts the guard into the optimizer step of an Ultralytics trainer and changes nothing else.

    Losses, files and random state stay those of the other base class. The arguments are `grad_clip`, `nonfinite` and
    `nonfinite_limit`; without `grad_clip`, Ultralytics' limit of the gradient norm applies.

    Attributes:
        guard (Guard): Gradient clip and skipped steps; set when training starts.

    Examples:
        >>> class GuardedPoseTrainer(GuardedTrainer, PoseTrainer): ...
        >>> GuardedPoseTrainer(overrides={"model": "yolo11n-pose.pt", "data": "pose.yaml", "grad_clip": 5.0}).train()
    """

    guard: Guard
    loss: torch.Tensor  # Ultralytics sets the loss of a batch and its running means
    tloss: dict[str, torch.Tensor]

    def __init__(self, cfg: Any = DEFAULT_CFG, overrides: dict[str, Any] | None = None, _callbacks: dict | None = None):
        """Initialize the trainer.

        Args:
            cfg (str | Path | dict | SimpleNamespace): Configuration, as in Ultralytics.
            overrides (dict, optional): Values that take precedence.
            _callbacks (dict, optional): Callbacks, as in Ultralytics.
        """
        super().__init__(cfg, overrides, _callbacks)
        self._batch: dict[str, Any] = {}  # empty after a step
        self._loaded: list[dict[str, Any]] = []  # batches since the last step, if it accumulates several
        self._finite_tloss: dict[str, torch.Tensor] | None = None
        if not self.ddp:  # a multi-GPU launcher pickles its callbacks, and its processes add their own listeners
            for event, listener in self.listeners().items():
                self.callbacks.setdefault(event, []).insert(0, listener)

    def listeners(self) -> dict[str, Callable[[GuardedTrainer], None]]:
        """Return our callbacks by event; they run before all others."""
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
        """Check the batches that no step has used yet; they belong to the first step of the next epoch."""
        if not self._batch:
            return
        losses = [self.loss.detach(), *(x.reshape(()) for x in self.tloss.values())]  # (1,) of distillation
        bad = (~torch.isfinite(torch.stack(losses))).any().int()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(bad, dist.ReduceOp.MAX)
        if bad:
            self._skip_step()
            self.optimizer.zero_grad()
            self._batch, self._loaded = {}, []

    def end_training(self) -> None:
        """Log what the guard did; there is none if only the end of a run was repeated."""
        if hasattr(self, "guard"):
            LOGGER.info(f"{colorstr('Guard:')} {self.guard.summary()}")

    def preprocess_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Preprocess a batch as Ultralytics does, and keep the batches of a step for a diagnosis.

        Args:
            batch (dict): Collated batch.

        Returns:
            (dict): Preprocessed batch.
        """
        if getattr(self, "accumulate", 1) > 1:  # which is not set yet where Ultralytics calibrates for quantize=8
            self._loaded.append(dict(batch))  # before preprocessing, on the CPU
        self._batch = super().preprocess_batch(batch)
        return self._batch

    def autocast(self) -> contextlib.AbstractContextManager:
        """Return the autocast context of this run."""
        return autocast(torch.bfloat16 if self.args.amp == "bf16" else self.amp, device=self.device.type)

    @property
    def loss_scale(self) -> int:
        """Factor by which Ultralytics multiplies the loss in an optimizer step.

        It is the number of images in all processes, or the number of processes where the loss is a mean, as in
        classification; times the accumulated batches.
        """
        mean = any(cls.__name__ in MEAN_LOSSES for cls in type(self).__mro__)
        return (max(self.world_size, 1) if mean else self.batch_size) * self.accumulate

    def optimizer_step(self) -> None:
        """Clip the gradient and take a step, or skip the step if loss, gradient or statistics are not finite.

        Raises:
            FloatingPointError: If they are not finite and `nonfinite=raise`, or in `nonfinite_limit` steps in a row.
        """
        self.scaler.unscale_(self.optimizer)
        if self.guard.clip(getattr(self.args, "grad_clip", None), self.loss_scale, self.loss):
            self.scaler.step(self.optimizer)
            self._finite_tloss = self.tloss
            if self.ema:
                self.ema.update(self.model)
        else:
            self._skip_step()
        self.scaler.update()  # after an overflow this halves the scale
        self.optimizer.zero_grad()
        self._batch, self._loaded = {}, []

    def _skip_step(self) -> None:
        """Log why a step is skipped, and undo what its batches did to the model and the running means."""
        diagnosis = self._diagnose()
        restored = self.guard.undo(self.ema.ema, self.optimizer)
        self.guard.skip(diagnosis.overflow)
        # A NaN here would spoil the logged means and, in the last batch, make Ultralytics undo the epoch.
        self.tloss = self._finite_tloss or {k: torch.zeros_like(v) for k, v in self.tloss.items()}
        self.loss = torch.zeros_like(self.loss)
        if diagnosis.overflow:
            scale, advice = self.scaler.get_scale(), diagnosis.advice
            LOGGER.info(f"AMP: {diagnosis.cause} ({scale:g}). Skipping this optimizer step. {advice}")
            return
        text = f"Non-finite {diagnosis}"
        if restored:
            text += f" Weights of {', '.join(restored)} were taken from the moving average."
        if getattr(self.args, "nonfinite", None) == "raise":
            raise FloatingPointError(f"{text} Training stops because of nonfinite=raise.")
        limit = getattr(self.args, "nonfinite_limit", None) or table.KEYS["nonfinite_limit"].default
        row = self.guard.in_a_row
        if row >= limit:
            raise FloatingPointError(
                f"{text} Training stops after {row} such steps in a row (nonfinite_limit={limit}); last.pt has the "
                "last full epoch."
            )
        counts = f"{self.guard.skipped} in this epoch, {row} in a row"
        LOGGER.warning(f"{text} Skipping this optimizer step ({counts}).")

    def _diagnose(self) -> Diagnosis:
        """Return which batch of the step is not finite, and why, the same in all processes of multi-GPU training."""
        float16 = self.amp and self.args.amp != "bf16"
        scaled = self.scaler.is_enabled() and bool(torch.isfinite(self.loss))  # an overflow of AMP leaves it finite
        context = self.data["names"], self.autocast, float16, scaled
        diagnosis = diagnose(unwrap_model(self.model), self._batch, *context)
        for batch in self._loaded[:-1]:  # earlier batches of the step
            if not diagnosis.certain:
                diagnosis = diagnose(unwrap_model(self.model), super().preprocess_batch(batch), *context)
        if dist.is_available() and dist.is_initialized():  # the cause may be a batch of another process
            diagnoses: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(diagnoses, diagnosis)
            diagnosis = max(diagnoses, key=lambda x: (x.certain, not x.overflow))
        return diagnosis


def guarded(trainer: type[BaseTrainer]) -> type[BaseTrainer]:
    """Return an Ultralytics trainer with the guard in its optimizer step.

    Args:
        trainer (type[BaseTrainer]): Trainer of any task, or a user's own.

    Returns:
        (type[BaseTrainer]): A subclass with the guard, or the trainer itself if it has one.
    """
    if issubclass(trainer, GuardedTrainer):
        return trainer
    return type(f"Guarded{trainer.__name__}", (GuardedTrainer, trainer), {"__doc__": trainer.__doc__})
