"""Stage 3: a fine-tuning that starts from enrolled prototypes and is taught what it must not forget."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn
from ultralytics.data.utils import check_det_dataset
from ultralytics.nn.tasks import load_checkpoint
from ultralytics.utils import LOGGER, RANK, colorstr

from yolo_fewshot.class_names import match_classes
from yolo_fewshot.data.shots_and_base import AdaptSampler, ShotsAndBase, merged_names
from yolo_fewshot.data.support import Support, read_support
from yolo_fewshot.enroll.detection import ap50, detect
from yolo_fewshot.enroll.enroll import Shots, enroll, log_shots
from yolo_fewshot.enroll.features import View, extract, support_views
from yolo_fewshot.files import save_checkpoint
from yolo_fewshot.nn.criterion import branch_losses
from yolo_fewshot.nn.model import FewShotDetectionModel
from yolo_fewshot.train.retention import Teacher, retain, silent_classes

STEPS, PASSES = 300, 60  # optimizer steps, and passes over the images of the shots, at least
FROZEN = 10  # layers, which are the backbone
ENROLLED = "enrolled.pt"  # what training starts from, beside its checkpoints
SPOILT = 0.05  # AP50 on the shots that training may lose against the enrollment


def steps_for(shots: int, batch: int) -> int:
    """Return the number of optimizer steps.

    Args:
        shots (int): Images of the shots.
        batch (int): Images in a batch.

    Returns:
        (int): The steps, at least `STEPS`.
    """
    return max(STEPS, -(-PASSES * shots // batch))


def blend_for(labels: list[dict[str, Any]]) -> float:
    """Return the part of the trained weights to end with.

    Args:
        labels (list[dict]): Labels of the shots.

    Returns:
        (float): 0.5 if the classes have one object each (their median), 0.75 if they have more.
    """
    counts = np.unique(np.concatenate([np.zeros(0), *(x["cls"].flat for x in labels)]), return_counts=True)[1]
    return 0.75 if len(counts) and np.median(counts) > 1 else 0.5


def freeze_for(names: dict[int, str], support: Support) -> int:
    """Return the number of layers that stay as they are.

    Args:
        names (dict[int, str]): Classes of the model and of the shots.
        support (Support): The shots.

    Returns:
        (int): The backbone if there is a class to be kept without shots, else 0.
    """
    return FROZEN if set(names.values()) - support.class_names else 0


@torch.no_grad()
def blend(model: nn.Module, start: dict[str, torch.Tensor], part: float) -> None:
    """Move the weights and statistics of a model towards those that its training started from.

    Between the two lies a model that has learned from a few images and forgotten less: Wortsman et al. 2022, "Robust
    fine-tuning of zero-shot models", arXiv:2109.01903.

    Args:
        model (nn.Module): Trained model, changed in place.
        start (dict[str, torch.Tensor]): State of the model before training.
        part (float): Part of the trained weights, 0 to 1.
    """
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            value.lerp_(start[name].to(value), 1 - part)


def ap50_on_shots(model: nn.Module, support: Support, imgsz: int) -> float:
    """Return how well a model finds the shots, from the anchors that enrollment looks at.

    Args:
        model (nn.Module): Few-shot model in eval mode that knows the classes of the shots.
        support (Support): The shots.
        imgsz (int): Image size in pixels.

    Returns:
        (float): Mean AP50 of the classes of the shots, 0 to 1.
    """
    head, index = model.model[-1], match_classes(support.names, model.names)
    features = extract(model, support, imgsz, views=[View()], desc="Checking shots")
    labels = torch.tensor([index[c] for c in features.cls.tolist()])
    vectors, offsets = zip(*(head.get_class(i)[0] for i in range(head.nc)))
    rows, every = (torch.stack(vectors).cpu(), torch.stack(offsets).cpu()), torch.ones(len(features.files), dtype=bool)
    return ap50(detect(features, labels, every, rows, head.banks[0]))


class Adaptation:
    """Stage 3 of a run, in the order of its methods.

    Attributes:
        names (dict[int, str]): Classes of the model that it starts from, then those of the shots that are new; known
            after `take_classes`.
        labeled (list[dict]): What Ultralytics knows of the data of the shots and, if there are any, of base images.
    """

    def __init__(self, args: SimpleNamespace, data: dict[str, Any]):
        """Initialize the adaptation.

        Args:
            args (SimpleNamespace): Arguments of the run.
            data (dict): What Ultralytics knows of the data of the shots.
        """
        self.args = args
        self.labeled = [data, *([check_det_dataset(args.base_replay)] if args.base_replay else [])]
        self.names: dict[int, str] = {}
        self._start: dict[str, torch.Tensor] = {}
        self._blend = args.blend
        self._teacher: Teacher | None = None

    def take_classes(self, model: FewShotDetectionModel) -> None:
        """Read the shots, and append their new classes to those of the model that training starts from.

        Args:
            model (FewShotDetectionModel): The model; `freeze` follows from its classes if it is None.
        """
        self.support = read_support(self.args.data, model.names, model.yaml.get("channels") or 3)
        self.names = merged_names(model.names, self.support.names, self.support.labels)
        if self.args.freeze is None:
            self.args.freeze = freeze_for(self.names, self.support)

    def enrolled(
        self, weights: FewShotDetectionModel, device: torch.device
    ) -> tuple[FewShotDetectionModel, Shots | None]:
        """Return a copy of a model in which the new classes of the shots are enrolled.

        Args:
            weights (FewShotDetectionModel): The model.
            device (torch.device): Where to compute.

        Returns:
            (tuple[FewShotDetectionModel, Shots | None]): The copy, and what was enrolled; the model itself and None if
                no class is new.
        """
        if self.names == {int(i): str(n) for i, n in weights.names.items()}:
            return weights, None
        known, views = {str(n) for n in weights.names.values()}, support_views(vars(self.args), self.support.crops)
        weights = deepcopy(weights).float().eval().to(device)
        shots = enroll(weights, self.support, self.args.imgsz, views=views, keep=known, nms=self.args.nms)
        log_shots(shots)
        return weights.cpu(), shots

    def begin(self, model: FewShotDetectionModel, folder: Path) -> None:
        """Keep the state that training starts from, in a file so that a resumed run knows it, too.

        Args:
            model (FewShotDetectionModel): Model with the new classes enrolled, unless the run is resumed.
            folder (Path): Folder of the checkpoints, where `enrolled.pt` is written; a resumed run reads the one beside
                its checkpoint.

        Raises:
            FileNotFoundError: If a resumed run has no such file.
        """
        file = folder / ENROLLED
        if self.args.resume:
            file = Path(self.args.resume).parent / ENROLLED
            if not file.exists():
                raise FileNotFoundError(
                    f"{file} is missing, which stage 3 started from. Put it back beside {Path(self.args.resume).name}, "
                    "or start a new run."
                )
            model = load_checkpoint(file)[0]
        elif RANK in {-1, 0}:
            start = deepcopy(model, {id(getattr(model, "criterion", None)): None}).cpu()
            save_checkpoint({"model": start, "train_args": vars(self.args)}, file)
        self._start = {k: v.clone() for k, v in model.state_dict().items()}

    def sampler(self, dataset: ShotsAndBase, batch: int, processes: int = 1) -> AdaptSampler:
        """Return what draws the batches, and say how many and how far the weights will go.

        Args:
            dataset (ShotsAndBase): Images to train on.
            batch (int): Images in a batch of this process.
            processes (int): Processes that train together; a step sees a batch of each.

        Returns:
            (AdaptSampler): The sampler.
        """
        a, shots, base = self.args, len(dataset.parts[0]), sum(map(len, dataset.parts[1:]))
        steps = a.steps or steps_for(shots, batch * processes)
        if a.blend is None:
            self._blend = blend_for(dataset.parts[0].labels)
        images, where = f"{shots} images of shots and {base} of base classes", f"blend={self._blend:g}"
        what = f"{steps} steps on {images}, freeze={a.freeze}, {where}"
        LOGGER.info(f"{colorstr('adapt:')} {what}")
        return AdaptSampler(shots, base, batch, -(-steps // a.epochs), a.seed, max(RANK, 0), processes)

    def retain(self, model: FewShotDetectionModel, labels: list[dict[str, Any]]) -> None:
        """Let the model that training starts from teach the classes that no image labels.

        Args:
            model (FewShotDetectionModel): Model in training.
            labels (list[dict]): Labels of the images to train on, as in `YOLODataset.labels`.
        """
        start = deepcopy(model, {id(model.criterion): None})
        start.load_state_dict(self._start)
        silent = silent_classes(start.model[-1].nc, labels).to(next(model.parameters()).device)
        if not len(silent):
            return
        for loss, retained in zip(branch_losses(model), retain(start, silent)):
            loss.retention = retained
        if self.args.teacher:
            self._teacher = Teacher(start, silent)

    def taught(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return a batch with what the teacher sees in it, if there is one.

        Args:
            batch (dict): Preprocessed batch.

        Returns:
            (dict): The same, with `teacher`.
        """
        return {**batch, "teacher": self._teacher(batch["img"])} if self._teacher else batch

    def end(self, last: str, best: str, device: torch.device) -> None:
        """End between start and end of the training, or at its start if that finds the shots much better.

        Args:
            last (str): Checkpoint of the last epoch; replaced by the end.
            best (str): Checkpoint that becomes the same, since no result on other images chooses an epoch.
            device (torch.device): Where to compute.
        """
        ckpt = torch.load(last, map_location="cpu", weights_only=False)
        model = ckpt["ema"].float().eval().to(device)
        start = deepcopy(model)
        start.load_state_dict(self._start)
        blend(model, self._start, self._blend)
        before, after = (ap50_on_shots(m, self.support, self.args.imgsz) for m in (start, model))
        text = f"{self._blend:.0%} of the trained weights, the rest of {ENROLLED}. AP50 on the shots"
        LOGGER.info(f"{colorstr('adapt:')} {text} {before:.3f} before, {after:.3f} after")
        if after < before - SPOILT:
            model = start
            LOGGER.warning(
                f"Training finds the shots much less well than enrollment, so the result is {ENROLLED}. Look at the "
                "labels of the shots, or set a smaller lr0 or blend."
            )
        ckpt["ema"] = model.cpu().half()
        for file in (last, best):
            save_checkpoint(ckpt, file)
