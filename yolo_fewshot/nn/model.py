"""The few-shot detection model: a stock network with an upgraded head.

Checkpoints pickle `FewShotDetectionModel` by the path of this module. Never move this module, and never rename the
class or its attributes.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import nn
from ultralytics.nn.modules.head import Detect
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import LOGGER
from ultralytics.utils.loss import E2ELoss
from ultralytics.utils.torch_utils import initialize_weights

from yolo_fewshot.class_names import UNKNOWN, by_index, match_classes
from yolo_fewshot.nn.criterion import FewShotLoss
from yolo_fewshot.nn.head import Embedding, FewShotDetect

FEWSHOT = {"embed": 128, "proj": 128}  # defaults of the YAML's `fewshot` section


class FewShotDetectionModel(DetectionModel):
    """YOLO detection model with a few-shot head.

    It is built from any detection YAML. The section `fewshot: {embed: 128, proj: 128}` sets the size of the embedding
    and of the projection for the contrastive terms.

    Attributes:
        transferred (list[int]): Classes whose prototypes the last `load` copied.
        enrolled (dict[str, dict]): Record of every enrolled class, see `yolo_fewshot.enroll.enroll.Shots`.
        prior_strength (float | None): Prior strength for one shot under enrollment `auto`, chosen at the end of
            training.
        memory (list): Replay buffer of anchors of base images, filled at the end of training, see
            `yolo_fewshot.enroll.replay`.
        held_out (list[str]): Classes that `meta_val` kept out of training, which the model does not know.

    Examples:
        >>> model = FewShotDetectionModel("yolo11n-fewshot.yaml", nc=20)
        >>> model.load(YOLO("yolo11n.pt").model)  # backbone, neck, box branch and class stems
    """

    def __init__(self, cfg: str | dict = "fewshot.yaml", ch: int = 3, nc: int | None = None, verbose: bool = True):
        """Initialize the model.

        Args:
            cfg (str | dict): Model YAML or its content.
            ch (int): Channels of the images.
            nc (int, optional): Number of classes, overriding the YAML.
            verbose (bool): Whether to log the layers.

        Raises:
            TypeError: If the head is not `Detect`.
        """
        super().__init__(cfg, ch=ch, nc=nc, verbose=verbose)
        self.transferred: list[int] = []
        self.enrolled: dict[str, dict] = {}
        self.prior_strength: float | None = None
        self.memory: list = []
        self.held_out: list[str] = []
        self.yaml["fewshot"] = {**FEWSHOT, **(self.yaml.get("fewshot") or {})}
        self.model[-1] = FewShotDetect.upgrade(self.model[-1], **self.yaml["fewshot"])
        if verbose:
            size = self.yaml["fewshot"]
            LOGGER.info(f"Upgraded head: Detect -> FewShotDetect(embed={size['embed']}, proj={size['proj']})\n")

    def fold(self) -> DetectionModel:
        """Return a stock model with the same outputs, whose head is a stock `Detect`; this model stays as it is.

        Returns:
            (DetectionModel): The model, which loads where this package is not installed.
        """
        memo = {id(getattr(self, "criterion", None)): None}  # the copy needs no loss
        folded = deepcopy(self, memo)
        for name in ("criterion", "transferred", "prior_strength", "memory", "held_out"):
            folded.__dict__.pop(name, None)
        folded.__class__ = DetectionModel
        folded.model[-1] = folded.model[-1].fold()
        folded.yaml.pop("fewshot")
        return folded

    def fuse(self, verbose: bool = True, imgsz: int = 640) -> DetectionModel:
        """Return a folded copy with Conv and BatchNorm layers fused, as prediction, validation and export use it.

        Args:
            verbose (bool): Whether to log a summary.
            imgsz (int): Image size for the summary.

        Returns:
            (DetectionModel): The stock model; this one stays as it is.
        """
        return self.fold().fuse(verbose=verbose, imgsz=imgsz)

    def init_criterion(self) -> FewShotLoss | E2ELoss:
        """Create the loss, one for each branch of the head."""
        return E2ELoss(self, FewShotLoss) if len(self.model[-1].branches) > 1 else FewShotLoss(self)

    def load(self, weights: dict | nn.Module, verbose: bool = True) -> None:
        """Load the weights of a stock or few-shot model; prototypes follow their class by name.

        If the class names of either model are placeholders, prototypes follow their index, provided that the class
        counts are equal.

        Args:
            weights (dict | nn.Module): Model or checkpoint.
            verbose (bool): Whether to log what was transferred.
        """
        source = (weights.get("ema") or weights["model"]) if isinstance(weights, dict) else weights
        head, src_head = self.model[-1], getattr(source, "model", [None])[-1]
        if isinstance(src_head, Detect):
            self._adopt_stems(head, src_head)
        super().load(weights, verbose)
        self.transferred = []
        if isinstance(src_head, FewShotDetect) and src_head.embed == head.embed:
            self.transferred = self._copy_prototypes(source, src_head, verbose)

    @staticmethod
    def _adopt_stems(head: FewShotDetect, src_head: Detect) -> None:
        """Adopt the widths of the source's class stems, which depend on its class count, so that they transfer."""
        widths, src_widths = ([m[0].conv.in_channels for m in h.cv2 or h.one2one_cv2] for h in (head, src_head))
        if widths != src_widths:  # another model scale
            return
        for branch in head.branches:
            src_stems = getattr(src_head, f"{branch}cv3", None) or []
            for stem, src_stem in zip(getattr(head, f"{branch}cv3"), src_stems):
                if src_stem[-1].in_channels != stem[-1].in_channels:
                    for i in range(len(stem) - 1):
                        stem[i] = deepcopy(src_stem[i]).requires_grad_(True)
                    stem[-1] = Embedding(src_stem[-1].in_channels, head.embed)
        initialize_weights(head)

    def _copy_prototypes(self, source: Any, src_head: FewShotDetect, verbose: bool) -> list[int]:
        """Copy the prototypes of the classes that the source has too, and return these classes."""
        names, src_names = ({i: str(n).strip() for i, n in by_index(m.names).items()} for m in (self, source))
        if any(all(str(i) == n for i, n in x.items()) for x in (names, src_names)):
            index = {i: i for i in names} if len(names) == len(src_names) else {}
        else:
            found = match_classes(names, src_names)
            lower = match_classes(*({i: n.lower() for i, n in x.items()} for x in (names, src_names)))
            found = {i: lower[i] if j == UNKNOWN else j for i, j in found.items()}
            index = {i: j for i, j in found.items() if j >= 0}
        if not index and len(names) != len(src_names):
            return []
        dst, src = list(index), list(index.values())
        for prototypes, source_prototypes in zip(self.model[-1].branch_prototypes, src_head.branch_prototypes):
            # With equal class counts, `load` copied all rows by index: reset those of classes that the source lacks.
            fresh = torch.randn_like(prototypes.weight)
            rest = [i for i in range(len(prototypes.weight)) if i not in index]
            prototypes.weight.data[rest] = fresh[rest] / fresh[rest].norm(dim=1, keepdim=True)
            prototypes.frozen[rest], prototypes.gain[rest], prototypes.offset[rest] = 0, 1, 0
            for name in ("weight", "frozen", "gain", "offset"):
                getattr(prototypes, name).data[dst] = getattr(source_prototypes, name).data[src].to(prototypes.weight)
        if verbose:
            LOGGER.info(f"Transferred {len(index)}/{len(names)} prototypes by class name")
        return dst
