"""Learn new classes from shots by one of the methods of a benchmark."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from ultralytics import YOLO
from ultralytics.data.utils import check_det_dataset
from ultralytics.utils import DEFAULT_CFG_DICT

from yolo_fewshot import args as table
from yolo_fewshot.data.support import images_of
from yolo_fewshot.evaluate.meter import Meter
from yolo_fewshot.evaluate.methods import ABLATIONS, ADAPTATIONS, ENROLLMENTS, GRAFTS, is_stock, sees_all
from yolo_fewshot.evaluate.plan import Plan
from yolo_fewshot.paths import cfg_dir
from yolo_fewshot.yolo import FewShotYOLO

STOCK: dict[str, Any] = {
    "optimizer": "AdamW", "lr0": 0.002, "nbs": 16, "warmup_epochs": 1, "warmup_bias_lr": 0.0, "val": False,
    "save": False, "single_cls": False,
}  # fmt: skip
MIN_STEPS, MIN_EPOCHS = 300, 60  # of the stock fine-tuning
# The recipe of the fine-tuning and of stage 3 is fixed, so that they stay comparable.
STAGE2_ONLY = {
    "epochs", "episodes", "lr0", "lrf", "nbs", "optimizer", "patience", "val", "warmup_bias_lr", "warmup_epochs",
}  # fmt: skip
VAL_KEYS = ("imgsz", "device", "workers", "max_det", "iou", "conf", "quantize", "nms", "agnostic_nms")


class Learned(NamedTuple):
    """What a method made.

    Attributes:
        file (Path): Checkpoint.
        meter (Meter): Seconds and memory of the training, or of the enrollment where there is both.
    """

    file: Path
    meter: Meter


def learn(plan: Plan, method: str, shots: int, seed: int, folder: Path) -> Learned:
    """Learn the novel classes from shots.

    Args:
        plan (Plan): Plan.
        method (str): Method.
        shots (int): Number of shots.
        seed (int): Seed of the draw and of the training.
        folder (Path): Folder of the run.

    Returns:
        (Learned): Checkpoint and costs; those of an ablation are those of the enrollment, as for the full model.
    """
    data = plan.shots[shots, seed]
    train = plan.balanced[shots, seed] if sees_all(method) else data
    if is_stock(method):
        return _fine_tune(plan, folder, train, int(method.partition("-")[2]), seed)
    if method in GRAFTS or method in ADAPTATIONS:
        extra: dict[str, dict[str, Any]] = {
            "replay": {"base_replay": str(plan.data.base_yaml)},
            "adapt_full": {"blend": 1.0},
        }
        own = {"graft": GRAFTS[method]} if method in GRAFTS else {"graft": "none", **extra.get(method, {})}
        keys = {**settings_for("graft" if method in GRAFTS else "stage3", plan.settings), **own}
        trainer, meter = _train(plan.model, folder, cfg=_recipe(3), data=str(train), seed=seed, **keys)
        return Learned(Path(trainer.best if method in GRAFTS else trainer.last), meter)
    start = (plan.stage1 if method == "no_episodes" else None) or plan.model
    start = _ablated(plan, method, seed) if method in ABLATIONS else start
    return _enroll(plan, folder, start, data, method if method in ENROLLMENTS else "auto")


def settings_for(what: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the further arguments that apply to one kind of run.

    Args:
        what (str): 'stock', 'stage2', 'stage3', 'graft', 'val' or 'predict', which has limits of its own.
        settings (dict[str, Any]): Further arguments of the benchmark.

    Returns:
        (dict[str, Any]): Arguments of the run.
    """
    if what in {"val", "predict"}:
        unused = {"workers", "max_det", "conf"} if what == "predict" else set()
        return {k: v for k, v in settings.items() if k in VAL_KEYS and k not in unused}
    stage3 = (*table.ADAPTING, *table.EVERY_STAGE, "grad_clip")
    known = {
        "stock": (),
        "stage2": [k for k in table.KEYS if k not in table.ADAPTING],
        "stage3": stage3,
        "graft": (*stage3, "background"),
    }[what]
    unused = {k for k in table.ALL_KEYS if k not in known} | ({"batch"} if what == "stage2" else STAGE2_ONLY)
    return {"plots": False, "verbose": False, **{k: v for k, v in settings.items() if k not in unused}}


def epochs_for(images: int, batch: int) -> int:
    """Return the epochs of the stock fine-tuning: enough for both `MIN_STEPS` and `MIN_EPOCHS`.

    Args:
        images (int): Number of training images.
        batch (int): Images per batch.

    Returns:
        (int): Epochs.
    """
    batches, per_step = -(-images // batch), max(round(STOCK["nbs"] / batch), 1)
    return max(MIN_EPOCHS, -(-MIN_STEPS * per_step // batches))


def _recipe(stage: int) -> str:
    """Return the recipe of a stage, that of the package even if the working directory has a file of that name."""
    return str(cfg_dir() / f"stage{stage}.yaml")


def _train(start: Path, folder: Path, **arguments: Any) -> tuple[Any, Meter]:
    """Train with Ultralytics, and return the trainer and the costs until the end of the last epoch."""
    with Meter() as meter:
        yolo = YOLO(start)
        yolo.add_callback("on_train_epoch_end", meter.mark)
        yolo.train(project=str(folder.parent), name=folder.name, exist_ok=True, **arguments)
    return yolo.trainer, meter


def _fine_tune(plan: Plan, folder: Path, data: Path, freeze: int, seed: int) -> Learned:
    """Fine-tune the stock detector on shots, as Ultralytics does."""
    start = plan.stock or (plan.out / "stock.pt" if plan.few_shot else plan.model)
    if not start.exists():
        FewShotYOLO(plan.model).fold().save(start)
    keys, images = settings_for("stock", plan.settings), images_of(check_det_dataset(data)["train"])
    epochs = epochs_for(len(images), keys.get("batch", DEFAULT_CFG_DICT["batch"]))
    keys |= {**STOCK, "data": str(data), "freeze": freeze, "seed": seed, "epochs": epochs}
    trainer, meter = _train(start, folder, **keys)
    return Learned(Path(trainer.last), meter)


def _ablated(plan: Plan, method: str, seed: int) -> Path:
    """Return the checkpoint of stage 2 with a change, and train it if it does not exist."""
    file = plan.out / "runs" / f"{method}_seed{seed}.pt"
    if not file.exists():  # it is written when its training has finished
        keys = {**settings_for("stage2", plan.settings), **ABLATIONS[method], "seed": seed}
        folder = file.with_suffix("")
        shutil.rmtree(folder, ignore_errors=True)
        assert plan.stage1 is not None  # checked with the methods
        trainer, _ = _train(plan.stage1, folder, cfg=_recipe(2), data=str(plan.data.base_yaml), **keys)
        shutil.copy2(Path(trainer.best), f"{file}.part")
        os.replace(f"{file}.part", file)
        if not plan.save:
            shutil.rmtree(folder, ignore_errors=True)
    return file


def _enroll(plan: Plan, folder: Path, start: Path, data: Path, method: str) -> Learned:
    """Enroll shots, and save the model."""
    yolo, keys = FewShotYOLO(start), settings_for("val", plan.settings)
    with Meter() as meter:
        own: dict[str, Any] = {k: keys.get(k) for k in ("imgsz", "device", "nms")}
        yolo.enroll(data, method=method, background=plan.settings.get("background"), **own)
    folder.mkdir(parents=True)
    yolo.save(folder / "enrolled.pt")
    return Learned(folder / "enrolled.pt", meter)
