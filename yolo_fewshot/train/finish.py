"""The end of a run: strip and validate the checkpoints, and store in them what enrollment needs."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.distill_model import DistillationModel
from ultralytics.utils import DEFAULT_CFG_DICT, DEFAULT_CFG_KEYS, LOGGER, RANK

from yolo_fewshot.files import save_checkpoint
from yolo_fewshot.nn.model import FewShotDetectionModel
from yolo_fewshot.train.run_plots import plot_object_embeddings

TRAINING_STATE = ("optimizer", "best_fitness", "stopper", "ema", "updates", "scaler")  # keys of a resumable checkpoint


def finish(trainer: DetectionTrainer) -> None:
    """Turn best.pt and last.pt into final checkpoints, as Ultralytics' `final_eval` does, and prepare enrollment.

    Both files stay unchanged until everything is computed; then best.pt is replaced, and last.pt after it. A run that
    is interrupted before can be resumed from last.pt, and repeats only its end.

    Args:
        trainer (DetectionTrainer): Few-shot trainer after its last epoch, in every process.
    """
    main = RANK in {-1, 0}
    last = best = None
    if main:
        last, best = (strip(f) if f.exists() else None for f in (trainer.last, trainer.best))
        if last and best:
            best["train_results"] = last.get("train_results")
        last, best = trainer.stage.final_checkpoints(last, best)
    model = _from_main_process(best["model"] if best else None)
    if model is not None:
        trainer.stage.before_final_validation(model)
        _validate(trainer, model)
    final = {f: ckpt for f, ckpt in ((trainer.best, best), (trainer.last, last)) if ckpt}
    if final:  # empty where the run stopped before an epoch was saved
        _prepare_enrollment(trainer, list(final.values()))
        for file, ckpt in final.items():
            save_checkpoint(ckpt, file)
            LOGGER.info(f"Optimizer stripped from {file}, {file.stat().st_size / 1e6:.1f}MB")
        trainer.stage.log_end()
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
    if main and trainer.args.plots:
        trainer.stage.plot_end()


def strip(file: Path) -> dict[str, Any]:
    """Return a checkpoint as `ultralytics.utils.torch_utils.strip_optimizer` writes it; the file is not changed.

    Args:
        file (Path): Checkpoint, resumable or stripped.

    Returns:
        (dict[str, Any]): Checkpoint without the state of training, with the moving average as model, in float16.
    """
    ckpt = torch.load(file, map_location="cpu", weights_only=False)
    model = ckpt.get("ema") or ckpt["model"]
    if isinstance(model, DistillationModel):
        model._remove_feature_hooks()
        model = model.student_model
    model.args, model.criterion = dict(model.args), None
    model.half().requires_grad_(False)
    args = {**DEFAULT_CFG_DICT, **ckpt.get("train_args", {})}
    train_args = {k: v for k, v in args.items() if k in DEFAULT_CFG_KEYS}
    cleared = {k: None for k in TRAINING_STATE if k in ckpt}
    return {**ckpt, **cleared, "epoch": -1, "model": model, "train_args": train_args}


def _validate(trainer: DetectionTrainer, model: nn.Module) -> None:
    """Validate the final weights, and log the results at the step after the last epoch."""
    LOGGER.info(f"\nValidating {trainer.best}...")
    trainer.validator.args.plots = trainer.args.plots
    trainer.validator.args.compile = False  # compiling takes longer than this validation
    trainer.metrics = trainer.validator(model=deepcopy(model).float().eval())
    trainer.metrics.pop("fitness", None)
    trainer.epoch += 1  # loggers must not overwrite the last epoch
    trainer.run_callbacks("on_fit_epoch_end")
    trainer.epoch -= 1


def _prepare_enrollment(trainer: DetectionTrainer, ckpts: list[dict[str, Any]]) -> None:
    """Measure what a few-shot model needs of the base data, and store it in its checkpoint; the first one is plotted.

    Checkpoints of other weights are measured each on its own, since the replay buffer has embeddings.
    """
    measured: list[tuple[FewShotDetectionModel, FewShotDetectionModel]] = []  # weights as stored, and measured
    for ckpt in ckpts:
        stored = ckpt["model"]
        if not isinstance(stored, FewShotDetectionModel):
            return
        model = next((m for s, m in measured if _equal_weights(s, stored)), None)
        if model is None:
            model = deepcopy(stored).float().to(trainer.device)
            trainer.stage.prepare_enrollment(model)
            if trainer.args.plots and not measured:
                plot_object_embeddings(trainer, model)
            measured.append((stored, model))
        stored.prior_strength, stored.memory = model.prior_strength, model.memory
        if trainer.stage.blends:
            ckpt["train_metrics"] = {**(ckpt.get("train_metrics") or {}), **trainer.metrics}


def _equal_weights(a: nn.Module, b: nn.Module) -> bool:
    """Return whether two models of the same layers have the same weights and buffers."""
    other = b.state_dict()
    return all(torch.equal(v, other[k]) for k, v in a.state_dict().items())


def _from_main_process(model: nn.Module | None) -> nn.Module | None:
    """Return the model of the main process in every process."""
    if dist.is_available() and dist.is_initialized():
        models = [model]
        dist.broadcast_object_list(models, 0)
        return models[0]
    return model
