"""Stage 3 with `graft=none`: fine-tuning from enrolled prototypes, with losses that keep the old classes."""

from __future__ import annotations

import functools
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from ultralytics.data.dataset import YOLODataset
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.tasks import DetectionModel, load_checkpoint
from ultralytics.utils import LOGGER, RANK, colorstr

from yolo_fewshot import args as table
from yolo_fewshot.class_names import by_index, match_classes, warn_near_duplicates
from yolo_fewshot.data.ignore import fully_labeled
from yolo_fewshot.data.shots_and_base import ShotsAndBase, merged_names, relabel
from yolo_fewshot.data.support import Support, read_support
from yolo_fewshot.enroll.detection import ap50, detect
from yolo_fewshot.enroll.enroll import enroll, log_shots
from yolo_fewshot.enroll.features import View, extract, support_views
from yolo_fewshot.enroll.replay import fill_replay_buffer
from yolo_fewshot.files import save_checkpoint
from yolo_fewshot.nn.criterion import branch_losses
from yolo_fewshot.nn.model import FewShotDetectionModel
from yolo_fewshot.nn.rows import class_rows
from yolo_fewshot.train.retention import Teacher, replay_targets, unlabeled_classes
from yolo_fewshot.train.run_plots import plot_enrolled_shots
from yolo_fewshot.train.shots import ShotStage

BACKBONE = 10  # layers
ENROLLED = "enrolled.pt"  # initial weights, saved beside last.pt
MAX_DROP = 0.05  # of AP50 on the support set; beyond it the run ends with the enrolled weights


def blend_for(labels: list[dict[str, Any]]) -> float:
    """Return the default interpolation weight of the fine-tuned weights.

    Args:
        labels (list[dict]): Labels of the support images.

    Returns:
        (float): 0.5 if the median class has one object, 0.75 if it has more.
    """
    counts = np.unique(np.concatenate([np.zeros(0), *(x["cls"].flat for x in labels)]), return_counts=True)[1]
    return 0.75 if len(counts) and np.median(counts) > 1 else 0.5


def freeze_for(names: dict[int, str], support: Support) -> int:
    """Return the default number of frozen layers.

    Args:
        names (dict[int, str]): Classes of the model and of the support set.
        support (Support): Support set.

    Returns:
        (int): The backbone if a class has no shots and must be kept, else 0.
    """
    return BACKBONE if set(names.values()) - support.class_names else 0


@torch.no_grad()
def blend(model: nn.Module, initial: dict[str, torch.Tensor], weight: float) -> None:
    """Interpolate between the initial and the fine-tuned weights (WiSE-FT).

    Wortsman et al. 2022, "Robust fine-tuning of zero-shot models", arXiv:2109.01903. BatchNorm statistics and
    prototypes are interpolated like weights.

    Args:
        model (nn.Module): Fine-tuned model, changed in place.
        initial (dict[str, torch.Tensor]): State of the model before training.
        weight (float): Interpolation weight of the fine-tuned weights, 0 to 1.
    """
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            value.lerp_(initial[name].to(value), 1 - weight)


def support_ap50(model: FewShotDetectionModel, support: Support, imgsz: int) -> float:
    """Return the AP50 of a model on the support set, at the anchors that enrollment extracts.

    Args:
        model (FewShotDetectionModel): Model in eval mode that has the classes of the support set.
        support (Support): Support set.
        imgsz (int): Image size in pixels.

    Returns:
        (float): Mean AP50 of the classes of the support set, 0 to 1.
    """
    head, index = model.model[-1], match_classes(support.names, model.names)
    features = extract(class_rows(model), support, imgsz, views=[View()], desc="Checking shots")
    labels = torch.tensor([index[c] for c in features.cls.tolist()])
    vectors, offsets = zip(*(head.get_class(i)[0] for i in range(head.nc)))
    rows, images = (
        (torch.stack(vectors).cpu(), torch.stack(offsets).cpu()),
        torch.ones(len(features.files), dtype=torch.bool),
    )
    return ap50(detect(features, labels, images, rows, head.branch_prototypes[0]))


class Adaptation(ShotStage):
    """Fine-tuning of a few-shot model on shots, and on base images if there are any, from enrolled prototypes.

    Attributes:
        support (Support): Support set; known after `adopt`, like `names`.
        names (dict[int, str]): Classes of the initial model, then the new ones of the support set.
    """

    support: Support
    keys = frozenset((*ShotStage.keys, *table.FINE_TUNING))
    blends = True

    def __init__(self, trainer: DetectionTrainer, data: dict[str, Any]):
        """Initialize the stage.

        Args:
            trainer (DetectionTrainer): Trainer of the run, which has its arguments and no model yet.
            data (dict): Checked data.yaml of the shots.

        Raises:
            FileNotFoundError: If the base images do not exist.
        """
        super().__init__(trainer, data)
        self.names: dict[int, str] = {}
        self._initial: dict[str, torch.Tensor] = {}
        self._blend = self.args.blend
        self._teacher: Teacher | None = None

    def adopt(self, model: FewShotDetectionModel) -> None:
        """Read the support set, and append its new classes to those of the model.

        Args:
            model (FewShotDetectionModel): Initial model; its classes set the default of `freeze`.
        """
        model.names = by_index(model.names)
        self.support = read_support(self.args.data, model.names, model.yaml.get("channels") or 3)
        warn_near_duplicates(sorted(self.support.class_names - set(model.names.values())), model.names.values())
        self.names = merged_names(model.names, self.support.names, self.support.labels)
        if self.args.freeze is None:
            self.args.freeze = freeze_for(self.names, self.support)
        self.trainer.data = {**self.trainer.data, "names": self.names, "nc": len(self.names)}

    def initial_weights(self, weights: DetectionModel | None) -> FewShotDetectionModel:
        """Return a copy of the given model with the new classes enrolled; a resumed run has them already.

        Raises:
            ValueError: If the run has no few-shot checkpoint to start from.
        """
        if self.args.pretrained is False:
            raise ValueError(
                "'pretrained=False' does not work in stage 3, which starts from trained weights. Leave it out."
            )
        if not isinstance(weights, FewShotDetectionModel):
            raise ValueError(
                f"'model={self.args.model}' cannot be adapted with graft=none, which starts from a few-shot "
                "checkpoint, e.g. the best.pt of stage 2. Leave graft= out: the new classes get layers of their own."
            )
        self.adopt(weights)
        known = {int(i): str(n) for i, n in weights.names.items()}
        if self.trainer.resume or self.names == known:
            return weights
        model, views = deepcopy(weights).float().eval(), support_views(vars(self.args), self.support.crops)
        model = model.to(self.trainer.device)
        shots = enroll(model, self.support, self.args.imgsz, views=views, keep=set(known.values()), nms=self.args.nms)
        log_shots(shots)
        if self.args.plots:  # once training starts, since a multi-GPU launcher empties the run folder before
            plot = functools.partial(plot_enrolled_shots, shots=shots, names=dict(model.names))
            self.trainer.add_callback("on_train_start", plot)
        return model.cpu()

    def on_loaded(self, model: FewShotDetectionModel, weights: DetectionModel) -> None:
        """Copy the enrollment record, the prior strength and the replay buffer of the initial model."""
        names = set(model.names.values())
        model.enrolled = {n: x for n, x in weights.enrolled.items() if n in names}
        model.prior_strength, model.memory = weights.prior_strength, weights.memory

    def _relabel(self, dataset: YOLODataset, names: dict[int, str]) -> None:
        """Give a data set the class indices of the model; every labeled class must be known."""
        relabel(dataset, names, self.trainer.data["names"])

    def _log_settings(self, dataset: ShotsAndBase, steps: int, more: str = "") -> None:
        """Log what is trained on what, and with which interpolation at the end."""
        if self.args.blend is None:
            self._blend = blend_for(dataset.parts[0].labels)
        super()._log_settings(dataset, steps, f", freeze={self.args.freeze}, blend={self._blend:g}")

    def begin_run(self) -> None:
        """Save the initial weights to enrolled.pt; a resumed run reads the file beside its checkpoint.

        Raises:
            FileNotFoundError: If a resumed run has no such file.
        """
        model, file = self.trainer.ema.ema, self.trainer.wdir / ENROLLED
        if self.args.resume:
            file = Path(self.args.resume).parent / ENROLLED
            if not file.exists():
                raise FileNotFoundError(
                    f"{file}, which stage 3 started from, is missing. Put it back beside "
                    f"{Path(self.args.resume).name}, or start a new run."
                )
            model = load_checkpoint(file)[0]
        elif RANK in {-1, 0}:
            initial = deepcopy(model, {id(getattr(model, "criterion", None)): None}).cpu()
            save_checkpoint({"model": initial, "train_args": vars(self.args)}, file)
        self._initial = {k: v.clone() for k, v in model.state_dict().items()}

    def begin_training(self, model: FewShotDetectionModel) -> None:
        """Set up distillation and replay for the classes without a label in the training images."""
        initial = deepcopy(model, {id(model.criterion): None})
        initial.load_state_dict(self._initial)
        labels = self.trainer.train_loader.dataset.labels
        unlabeled = unlabeled_classes(initial.model[-1].nc, labels).to(next(model.parameters()).device)
        if not len(unlabeled):
            return
        for loss, targets in zip(branch_losses(model), replay_targets(initial, unlabeled)):
            loss.retention = targets
        if self.args.teacher:
            self._teacher = Teacher(initial, unlabeled)

    def preprocess(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return a batch with the scores of the teacher as `teacher`, if there is a teacher."""
        return {**batch, "teacher": self._teacher(batch["img"])} if self._teacher else batch

    def final_checkpoints(
        self, last: dict[str, Any] | None, best: dict[str, Any] | None
    ) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """Interpolate the weights of the last epoch, or fall back to the initial ones if AP50 on the shots dropped.

        Both files get the same weights, since no validation chooses an epoch.
        """
        if last is None:
            return last, best
        model = last["model"].float().to(self.trainer.device)
        initial = deepcopy(model)
        initial.load_state_dict(self._initial)
        blend(model, self._initial, self._blend)
        before, after = (support_ap50(m, self.support, self.args.imgsz) for m in (initial, model))
        LOGGER.info(
            f"{colorstr('stage 3:')} Final weights: {self._blend:.0%} fine-tuned, {1 - self._blend:.0%} {ENROLLED}. "
            f"AP50 on the support set {before:.3f} before, {after:.3f} after"
        )
        if after < before - MAX_DROP:
            model = initial
            LOGGER.warning(
                f"AP50 on the support set dropped from {before:.3f} to {after:.3f}, so the run ends with the enrolled "
                f"weights, {ENROLLED}. Check the labels of the shots, or set a smaller lr0 or blend."
            )
        last["model"] = model.cpu().half()
        return last, last

    def prepare_enrollment(self, model: FewShotDetectionModel) -> None:
        """Refill the replay buffer from the base images, if there are any, since the embeddings have moved."""
        for base in self.trainer.train_loader.dataset.parts[1:]:
            model.memory = fill_replay_buffer(model, fully_labeled(base), self.args.imgsz, self.args.seed)
