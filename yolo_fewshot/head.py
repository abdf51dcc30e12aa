"""The few-shot detection head: class logits are products of an embedding with class prototypes.

Per level: stock class stem -> 1x1 conv to D -> BatchNorm -> e, and the logit of class c is s * <e, p_c / |p_c|> + b
with s and b of the level. BatchNorm instead of a normalised e keeps everything after the stem linear, so that it can be
folded into the one 1x1 conv that a stock `Detect` has there.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from ultralytics.nn.modules.conv import Conv
from ultralytics.nn.modules.head import Detect
from ultralytics.utils.torch_utils import initialize_weights


class Embedding(Conv):
    """Linear embedding of the class stem's features: 1x1 conv and BatchNorm, no activation.

    A subclass of Ultralytics' `Conv`, so that `model.fuse()` merges its BatchNorm.
    """

    def __init__(self, c1: int, embed: int):
        """Initialize the embedding.

        Args:
            c1 (int): Channels of the class stem.
            embed (int): Size D of the embedding.
        """
        super().__init__(c1, embed, 1, act=False)

    @property
    def in_channels(self) -> int:
        """Channels of the class stem, which Ultralytics asks the last layer of a class branch for."""
        return self.conv.in_channels


class Prototypes(nn.Module):
    """The class prototypes of one branch, with scale and bias of its levels.

    Attributes:
        weight (nn.Parameter): Prototypes, (nc, D, 1). The third axis keeps them out of the matrices that Ultralytics'
            MuSGD orthogonalises: rows are classes and must be free to be alike.
        logit_scale (nn.Parameter): s of every level, (nl,).
        bias (nn.Parameter): b of every level, (nl,).
        frozen (torch.Tensor): Prototypes at the start of stage 2, (nc, D) float buffer; rows of zeros are absent.
    """

    def __init__(self, nc: int, embed: int, nl: int):
        """Initialize random prototypes of unit length.

        Args:
            nc (int): Number of classes.
            embed (int): Size D of the embedding.
            nl (int): Number of levels.
        """
        super().__init__()
        self.weight = nn.Parameter(F.normalize(torch.randn(nc, embed, 1), dim=1))
        self.logit_scale = nn.Parameter(torch.ones(nl))
        self.bias = nn.Parameter(torch.zeros(nl))
        self.register_buffer("frozen", torch.zeros(nc, embed))

    def set_prior(self, stride: torch.Tensor) -> None:
        """Set the bias of every level to Ultralytics' prior: about 5 objects in a picture of 640 x 640.

        Args:
            stride (torch.Tensor): Strides of the levels in pixels, (nl,).
        """
        for i, s in enumerate(stride.tolist()):
            self.bias.data[i] = math.log(5 / len(self.weight) / (640 / s) ** 2)

    def forward(self, e: torch.Tensor, level: int) -> torch.Tensor:
        """Return the class logits of one level.

        Args:
            e (torch.Tensor): Embeddings, (B, D, H, W).
            level (int): Index of the level.

        Returns:
            (torch.Tensor): Logits, (B, nc, H, W), in the dtype of `e`.
        """
        weight = F.normalize(self.weight.float(), dim=1) * self.logit_scale[level]
        return F.conv2d(e, weight[..., None].to(e.dtype), self.bias[level].expand(len(weight)).to(e.dtype))


class FewShotDetect(Detect):
    """Ultralytics' `Detect` with an embedding and prototypes in place of the last class conv.

    Attributes:
        embed (int): Size D of the embedding.
        prototypes (Prototypes): Of the one-to-many branch, and `one2one_prototypes` of the one-to-one branch, if any.
        proj (nn.Module): Projection of embeddings for the contrastive terms, used in training only (FSCE, CVPR 2021).

    Examples:
        >>> from ultralytics.nn.tasks import DetectionModel
        >>> model = DetectionModel("yolo11n.yaml", nc=20)
        >>> head = FewShotDetect.upgrade(model.model[-1], embed=128, proj=128)
    """

    @classmethod
    def upgrade(cls, detect: Detect, embed: int = 128, proj: int = 128) -> FewShotDetect:
        """Turn a stock head into a few-shot head that keeps its box branch and class stems.

        Args:
            detect (Detect): Head of a built model (strides known); it is taken over and must not be used afterwards.
            embed (int): Size D of the embedding.
            proj (int): Size of the projection for the contrastive terms, 0 for none.

        Returns:
            (FewShotDetect): The head, with random prototypes at the focal prior.

        Raises:
            TypeError: If the head is another one than `Detect` itself, such as Segment's, or has been fused.
        """
        if type(detect) is not Detect or detect.cv2 is None:
            raise TypeError(
                f"A {type(detect).__name__} head{' that is fused' if type(detect) is Detect else ''} cannot become a "
                "few-shot head. Use an unfused YOLO detection model, i.e. model=yolo11n.pt."
            )
        head = cls.__new__(cls)
        head.__dict__ = detect.__dict__
        head.embed = embed
        head.type = f"{cls.__module__}.{cls.__name__}"
        for branch in head.branches:
            stems = getattr(head, f"{branch}cv3")
            for stem in stems:
                stem[-1] = Embedding(stem[-1].in_channels, embed)
            bank = Prototypes(head.nc, embed, head.nl)
            bank.set_prior(head.stride)
            setattr(head, f"{branch}prototypes", bank)
        layers = (nn.Linear(embed, embed), nn.ReLU(), nn.Linear(embed, proj)) if proj else ()
        head.proj = nn.Sequential(*layers)  # the identity if empty
        initialize_weights(head)
        head.np = sum(x.numel() for x in head.parameters())
        return head

    @property
    def branches(self) -> tuple[str, ...]:
        """Prefixes of the names of the head's branches: one-to-many, and one-to-one in dual heads."""
        return tuple(p for p in ("", "one2one_") if getattr(self, f"{p}cv3", None) is not None)

    @property
    def banks(self) -> tuple[Prototypes, ...]:
        """Prototypes of every branch."""
        return tuple(getattr(self, f"{p}prototypes") for p in self.branches)

    @property
    def one2many(self) -> dict[str, nn.Module]:
        """The parts of the one-to-many branch."""
        return {**super().one2many, "prototypes": self.prototypes}

    @property
    def one2one(self) -> dict[str, nn.Module]:
        """The parts of the one-to-one branch."""
        return {**super().one2one, "prototypes": self.one2one_prototypes}

    def forward_head(
        self, x: list[torch.Tensor], box_head: Any = None, cls_head: Any = None, prototypes: Prototypes | None = None
    ) -> dict[str, torch.Tensor]:
        """Return the predictions of one branch.

        Args:
            x (list[torch.Tensor]): Feature maps of the levels, (B, C, H, W) each.
            box_head (nn.ModuleList, optional): Box branch of every level; None once fusing has removed this branch.
            cls_head (nn.ModuleList, optional): Class stem and embedding of every level.
            prototypes (Prototypes, optional): Prototypes of this branch.

        Returns:
            (dict[str, torch.Tensor]): Ultralytics' `boxes` (B, 4 * reg_max, A), `scores` (B, nc, A) and `feats`; in
                training also `embeds` (B, D, A), `logit_scale` and `logit_bias` (nl,) and `frozen` (nc, D).
        """
        if box_head is None or cls_head is None:
            return {}
        embeds = [cls_head[i](x[i]) for i in range(self.nl)]
        scores = torch.cat([prototypes(e, i).flatten(2) for i, e in enumerate(embeds)], dim=-1)
        boxes = torch.cat([box_head[i](x[i]).flatten(2) for i in range(self.nl)], dim=-1)
        preds = {"boxes": boxes, "scores": scores, "feats": x}
        if self.training:
            preds["embeds"] = torch.cat([e.flatten(2) for e in embeds], dim=-1)
            preds["logit_scale"], preds["logit_bias"] = prototypes.logit_scale, prototypes.bias
            preds["frozen"] = prototypes.frozen
        return preds

    def bias_init(self) -> None:
        """Set the biases of box and class branches to Ultralytics' initial values; needs the strides."""
        for branch, bank in zip(self.branches, self.banks):
            for box in getattr(self, f"{branch}cv2"):
                box[-1].bias.data[:] = 2.0
            bank.set_prior(self.stride)

    def freeze_prototypes(self, classes: list[int]) -> None:
        """Keep the present prototypes of some classes, and of no others, as the anchors of the triplet term.

        Args:
            classes (list[int]): Class indices, those with a learned prototype.
        """
        for bank in self.banks:
            bank.frozen.zero_()
            bank.frozen[classes] = F.normalize(bank.weight.detach()[classes, :, 0], dim=1)

    def set_prototype(self, index: int, prototypes: list[torch.Tensor]) -> None:
        """Set the prototype of one class, or append it if `index` is the number of classes; other rows stay.

        Args:
            index (int): Class index, 0 to nc.
            prototypes (list[torch.Tensor]): Its prototype in every branch, (D,) each.

        Raises:
            IndexError: If `index` is greater than the number of classes.
        """
        if index > self.nc:
            raise IndexError(f"class index {index} would leave a gap after the {self.nc} classes of the head")
        for bank, prototype in zip(self.banks, prototypes):
            row = prototype.to(bank.weight).view(1, -1, 1)
            weight = torch.cat([bank.weight.data[:index], row, bank.weight.data[index + 1 :]])
            bank.weight = nn.Parameter(weight, requires_grad=bank.weight.requires_grad)
            if index == self.nc:
                bank.frozen = torch.cat([bank.frozen, torch.zeros_like(bank.frozen[:1])])
        self.nc = len(self.banks[0].weight)
        self.no = self.nc + self.reg_max * 4
