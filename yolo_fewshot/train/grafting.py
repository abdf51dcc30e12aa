"""Stage 3: new classes get layers of their own, which are trained on the shots; the model itself stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch.utils.data import Dataset
from ultralytics.data.dataset import YOLODataset
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import LOCAL_RANK, LOGGER, colorstr

from yolo_fewshot.class_names import warn_near_duplicates
from yolo_fewshot.data.shots_and_base import ShotsAndBase, relabel
from yolo_fewshot.data.support import Support, SupportDataset, read_background, read_support, without_shots
from yolo_fewshot.errors import few
from yolo_fewshot.files import restore_exact
from yolo_fewshot.nn.graft import GraftModel, check_graftable, fuse_shared, level_groups, new_graft, old_graft, unite
from yolo_fewshot.nn.model import FewShotDetectionModel
from yolo_fewshot.nn.rows import enrolled_classes
from yolo_fewshot.train.shots import ShotStage


class Grafting(ShotStage):
    """Training of a copy of some layers on the classes of the shots, which is grafted onto the model at the end.

    Classes that the model knows already are background in the shots' images, unless all classes of the shots were
    grafted before: then their copy is trained further.
    """

    def __init__(self, trainer: DetectionTrainer, data: dict[str, Any]):
        """Initialize the stage.

        Args:
            trainer (DetectionTrainer): Trainer of the run, which has its arguments and no model yet.
            data (dict): Checked data.yaml of the shots.

        Raises:
            FileNotFoundError: If the base images or the background images do not exist.
            ValueError: If a background image is corrupt.
        """
        super().__init__(trainer, data)
        background = self.args.background
        self.background = read_background(str(background), data["channels"]) if background else None

    def build_model(self, cfg: str | dict[str, Any], weights: DetectionModel | None, verbose: bool) -> GraftModel:
        """Return the copy to train, see `Stage.build_model`; a resumed run has it already.

        Raises:
            ValueError: If there are no trained weights, those of a grafting that was not finished, images of other
                channels, or no class to graft in the shots.
            TypeError: If the model cannot be grafted onto.
        """
        if weights is None:
            raise ValueError(
                f"'model={self.args.model}' has no trained weights, and stage 3 adds classes to a trained detector. "
                "Use a checkpoint, e.g. model=yolo11n.pt, and leave pretrained= out."
            )
        if isinstance(weights, GraftModel):
            if not self.trainer.resume:
                raise ValueError(
                    f"'model={self.args.model}' is of a grafting that was not finished. Finish it with resume=True, or "
                    "start from the model that it was started from."
                )
            model = weights
        else:
            few_shot = isinstance(weights, FewShotDetectionModel)
            source = weights.fold() if few_shot else deepcopy(weights)
            self.check_finite(source)
            model = self._copy(source.float(), few_shot)
        fuse_shared(model)
        self.adopt(model)
        if self.trainer.device.type == "cpu" and self.args.channels_last is not False:
            model = model.to(memory_format=torch.channels_last)  # a step takes a fifth less time
        return model

    def adopt(self, model: DetectionModel) -> None:
        """Take classes and frozen layers from the copy to train.

        Args:
            model (DetectionModel): The copy.
        """
        assert isinstance(model, GraftModel)
        names = {int(i): str(n) for i, n in model.names.items()}
        given = self.args.freeze or []
        frozen = {*(range(given) if isinstance(given, int) else given), *model.graft["shared"]}
        self.args.freeze = sorted(frozen - {len(model.model) - 1})
        self.trainer.data = {**self.trainer.data, "names": names, "nc": len(names)}

    def _copy(self, source: DetectionModel, few_shot: bool) -> GraftModel:
        """Return the copy to train for the classes of the shots."""
        check_graftable(source)
        self._check_channels(source.yaml.get("channels") or 3)
        support = read_support(self.args.data, source.names, source.yaml.get("channels") or 3)
        labeled = {str(support.names[int(c)]) for x in support.labels for c in x["cls"].flat}
        known = [str(n) for n in source.names.values()]
        new = [n for n in dict.fromkeys(map(str, support.names.values())) if n in labeled - set(known)]
        warn_near_duplicates(new, known)
        model = new_graft(source, new, self.args.graft) if new else self._again(source, labeled, few_shot)
        trained = [str(n) for n in model.names.values()]
        if background := sorted(labeled - set(trained)):
            LOGGER.info(
                f"{colorstr('stage 3:')} {few(background)}: classes of the model, whose objects in the images of the "
                f"shots are background for {few(trained)}."
            )
        LOGGER.info(
            f"{colorstr('stage 3:')} layers of their own for {few(trained)}; "
            f"{len(model.graft['shared'])} of {len(model.model)} layers are shared with the model"
        )
        model.shots = {n: _count(support, n) for n in trained}
        return model

    def _check_channels(self, channels: int) -> None:
        """Raise an error if images have other channels than the model."""
        for data, key in zip(self.datasets, ("data", "base_replay")):
            if data["channels"] != channels:
                raise ValueError(
                    f"The images of {vars(self.args)[key]} have channels={data['channels']}, and the model takes "
                    f"{channels}. Set 'channels: {channels}' there, which loads any image so, or graft onto a model of "
                    "such images."
                )

    def _again(self, source: DetectionModel, labeled: set[str], few_shot: bool) -> GraftModel:
        """Return the copy that was grafted before for these classes."""
        data, names = self.args.data, {int(i): str(n) for i, n in source.names.items()}
        methods = {n: str(x["method"]) for n, x in enrolled_classes(source).items()}
        enrolled = {n for n, method in methods.items() if not method.startswith("graft-")}
        owners = {g: {names[i] for i in group.classes} for g, group in enumerate(level_groups(source)) if g}
        found = [g for g, own in owners.items() if own & labeled]
        if not found:
            remedy = "Give the new class another name"
            if enrolled & labeled:
                remedy = (
                    f"Start from the model before {few(sorted(enrolled & labeled))} was enrolled, or forget it first"
                )
            remedy += ", or train the model itself with graft=none." if few_shot else "."
            raise ValueError(f"The model knows all classes of {data}: {few(sorted(labeled))}. {remedy}")
        shown, owned = few(sorted(labeled & set().union(*owners.values()))), set().union(*(owners[g] for g in found))
        if since := sorted(owned & enrolled):
            raise ValueError(
                f"{few(since)} was enrolled after the layers of {shown} were grafted, and has rows there. Forget it, "
                "train, and enroll it again."
            )
        if missing := sorted(owned - labeled):
            raise ValueError(
                f"The layers of {shown} are those of {few(missing)}, too. Add shots of {few(missing)} to "
                f"{data}, which they would forget."
            )
        if len(found) > 1:
            raise ValueError(
                f"{shown} have different layers of their own. Train them one after the other, with a data.yaml "
                "for each."
            )
        return old_graft(source, level_groups(source)[found[0]])

    def _relabel(self, dataset: YOLODataset, names: dict[int, str]) -> None:
        """Give a data set the class indices of the copy; objects of other classes are background."""
        relabel(dataset, names, self.trainer.data["names"], known=False)

    def build_dataset(self, build: Callable[..., YOLODataset], img_path: str, mode: str, batch: int | None) -> Dataset:
        """Return a data set with the class indices of the copy, in training with base and background images."""
        dataset = super().build_dataset(build, img_path, mode, batch)
        if mode != "train" or not self.background:
            return dataset
        assert isinstance(dataset, ShotsAndBase)
        background = without_shots(self.background, dataset.parts[0].labels)
        return ShotsAndBase([*dataset.parts, SupportDataset(background, self.args.imgsz, self.args)])

    def final_checkpoints(
        self, last: dict[str, Any] | None, best: dict[str, Any] | None
    ) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """Graft the copy onto the model, whose own layers and rows keep their exact values.

        Without validation during training, no epoch is better than the last.
        """
        if not self.args.val:
            best = last
        for ckpt in {id(x): x for x in (last, best) if x}.values():
            if not isinstance(ckpt["model"], GraftModel):  # grafted already, by a run that was interrupted here
                continue
            trained = ckpt["model"].float()
            exact = unite(trained).to(memory_format=torch.contiguous_format)
            old, new = enrolled_classes(exact), {"method": f"graft-{self.args.graft}", "conf": None, "replaced": None}
            exact.enrolled = old | {n: {**new, **old.get(n, {}), "shots": k} for n, k in trained.shots.items()}
            exact.args, exact.criterion = trained.args, None
            ckpt["model"] = deepcopy(exact).half().requires_grad_(False)
            restore_exact(ckpt["model"], exact)
        return last, best

    def before_final_validation(self, model: DetectionModel) -> None:
        """Load the val images with the labels of all classes, those of the model and the new ones."""
        trainer = self.trainer
        trainer.data = {**trainer.data, "names": model.names, "nc": len(model.names)}
        old = trainer.test_loader
        loader = trainer.get_dataloader(trainer.data[trainer.args.split], old.batch_size, LOCAL_RANK, "val")
        trainer.test_loader = trainer.validator.dataloader = loader

    def prepare_enrollment(self, model: DetectionModel) -> None:
        """Do nothing: classes are enrolled into a stock head from the shots alone."""


def _count(support: Support, name: str) -> int:
    """Return the number of objects of a class."""
    return sum(str(support.names[int(c)]) == name for x in support.labels for c in x["cls"].flat)
