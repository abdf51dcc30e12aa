"""The few-shot detection head: class logits are dot products of an embedding with class prototypes.

Per level: stock class stem -> 1x1 conv to D -> BatchNorm -> e, and the logit of class c is s * <e, p_c / |p_c|> + b
with s and b of the level. BatchNorm instead of a normalized e keeps everything after the stem linear, so that it
can be folded into the single 1x1 conv of a stock `Detect`.

Checkpoints pickle `FewShotDetect`, `Embedding` and `Prototypes` by the path of this module. Never move this module, and
never rename these classes or their attributes.
"""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from ultralytics.nn.modules.conv import Conv
from ultralytics.nn.modules.head import Detect
from ultralytics.utils.torch_utils import fuse_conv_and_bn, initialize_weights

BOX_PRIOR = 2.0  # Ultralytics' initial bias of the box branch


def class_prior(nc: int, stride: torch.Tensor) -> torch.Tensor:
    """Compute Ultralytics' initial bias of a class logit: about 5 objects in an image of 640 x 640.

    Args:
        nc (int): Number of classes.
        stride (torch.Tensor): Strides of the levels in pixels, (nl,).

    Returns:
        (torch.Tensor): Bias of every level, (nl,) float32.
    """
    return torch.tensor([math.log(5 / nc / (640 / s) ** 2) for s in stride.tolist()])


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
        """Channels of the class stem; Ultralytics reads them from the last layer of a class branch."""
        return self.conv.in_channels


class Prototypes(nn.Module):
    """The class prototypes of one branch, with scale and bias of its levels.

    Attributes:
        weight (nn.Parameter): Prototypes, (nc, D, 1). The third axis keeps Ultralytics' MuSGD from orthogonalizing
            them as a matrix, since prototypes of similar classes must be able to be similar.
        logit_scale (nn.Parameter): s of every level, (nl,).
        bias (nn.Parameter): b of every level, (nl,).
        gain (torch.Tensor): Scale of each class, (nc,) float buffer; 1 except for classes enrolled by `fit`.
        offset (torch.Tensor): Bias of each class, (nc,) float buffer; 0 except for classes enrolled by `fit`.
        frozen (torch.Tensor): Prototypes at the start of stage 2, (nc, D) float buffer; a row of zeros is absent.
    """

    gain: torch.Tensor
    offset: torch.Tensor
    frozen: torch.Tensor

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
        self.register_buffer("gain", torch.ones(nc))
        self.register_buffer("offset", torch.zeros(nc))
        self.register_buffer("frozen", torch.zeros(nc, embed))

    def replace(self, index: int, prototype: torch.Tensor | None = None, gain: Any = 1.0, offset: Any = 0.0) -> None:
        """Replace the row of one class, append one if `index` is the number of classes, or remove it.

        Args:
            index (int): Class index, 0 to nc.
            prototype (torch.Tensor, optional): Its prototype of unit length, (1, D, 1); None removes the class.
            gain (float | torch.Tensor): Its scale.
            offset (float | torch.Tensor): Its bias.
        """
        frozen = self.frozen[index : index + 1] if index < len(self.frozen) else torch.zeros_like(self.frozen[:1])
        new: dict[str, torch.Tensor] = {}
        if prototype is not None:
            scalars = {"gain": torch.as_tensor([gain]), "offset": torch.as_tensor([offset])}
            new = {"weight": prototype, "frozen": frozen, **scalars}
        for name in ("weight", "gain", "offset", "frozen"):
            old = getattr(self, name).data
            row = new[name].to(old) if name in new else old[:0]
            rows = torch.cat([old[:index], row, old[index + 1 :]])
            setattr(self, name, nn.Parameter(rows, self.weight.requires_grad) if name == "weight" else rows)

    def set_prior(self, stride: torch.Tensor) -> None:
        """Set the bias of every level to Ultralytics' prior.

        Args:
            stride (torch.Tensor): Strides of the levels in pixels, (nl,).
        """
        self.bias.data.copy_(class_prior(len(self.weight), stride))

    def rows(self, level: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return weight and bias of the linear classifier of one level.

        Args:
            level (int): Index of the level.

        Returns:
            weight (torch.Tensor): s * gain * p / |p| of every class, (nc, D) float32.
            bias (torch.Tensor): b + offset of every class, (nc,) float32.
        """
        scale = self.logit_scale[level].float() * self.gain.float()
        return F.normalize(self.weight.float(), dim=1)[..., 0] * scale[:, None], self.bias[level] + self.offset.float()

    def zeros(self, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return vectors (n, D) and offsets (n,) of zeros on the CPU.

        Args:
            n (int): Number of classes.
        """
        return torch.zeros(n, self.weight.shape[1]), torch.zeros(n)

    def logits(
        self, embeds: torch.Tensor, level: torch.Tensor, vectors: torch.Tensor, offsets: torch.Tensor
    ) -> torch.Tensor:
        """Compute the logits of given classifiers at anchors, with the scales and biases of the levels.

        Args:
            embeds (torch.Tensor): Embeddings of the anchors, (M, D) float32 on the CPU.
            level (torch.Tensor): Levels of the anchors, (M,) int64.
            vectors (torch.Tensor): Vectors of the classes, (n, D) float32.
            offsets (torch.Tensor): Offsets of the classes, (n,) float32.

        Returns:
            (torch.Tensor): Logits, (M, n) float32.
        """
        scale, bias = (x.detach().float().cpu()[level, None] for x in (self.logit_scale, self.bias))
        return scale * (embeds @ vectors.t()) + bias + offsets

    def forward(self, e: torch.Tensor, level: int) -> torch.Tensor:
        """Return the class logits of one level.

        Args:
            e (torch.Tensor): Embeddings, (B, D, H, W).
            level (int): Index of the level.

        Returns:
            (torch.Tensor): Logits, (B, nc, H, W), in the dtype of `e`.
        """
        weight, bias = self.rows(level)
        return F.conv2d(e, weight[..., None, None].to(e.dtype), bias.to(e.dtype))


class FewShotDetect(Detect):
    """Ultralytics' `Detect` with an embedding and prototypes in place of the last class conv.

    Attributes:
        embed (int): Size D of the embedding.
        prototypes (Prototypes): Prototypes of the one-to-many branch; `one2one_prototypes` are those of the one-to-one
            branch, if any.
        proj (nn.Module): Projection of embeddings for the contrastive terms, used in training only (Sun et al. 2021).

    Examples:
        >>> from ultralytics.nn.tasks import DetectionModel
        >>> model = DetectionModel("yolo11n.yaml", nc=20)
        >>> head = FewShotDetect.upgrade(model.model[-1], embed=128, proj=128)
    """

    @classmethod
    def upgrade(cls, detect: Detect, embed: int = 128, proj: int = 128) -> FewShotDetect:
        """Turn a stock head into a few-shot head that keeps its box branch and class stems.

        Args:
            detect (Detect): Head of a built model (strides known); its parts are reused, so do not use it afterwards.
            embed (int): Size D of the embedding.
            proj (int): Size of the projection for the contrastive terms, 0 for none.

        Returns:
            (FewShotDetect): The head, with random prototypes at the focal prior.

        Raises:
            TypeError: If the head is not `Detect` itself, such as that of Segment, or is fused.
        """
        if type(detect) is not Detect or detect.cv2 is None:
            raise TypeError(
                f"A {type(detect).__name__} head{' that is fused' if type(detect) is Detect else ''} cannot become a "
                "few-shot head. Use an unfused YOLO detection model, e.g. model=yolo11n.pt."
            )
        head = cls.__new__(cls)
        head.__dict__ = detect.__dict__
        head.embed = embed
        head.type = f"{cls.__module__}.{cls.__name__}"
        for branch in head.branches:
            stems = getattr(head, f"{branch}cv3")
            for stem in stems:
                stem[-1] = Embedding(stem[-1].in_channels, embed)
            prototypes = Prototypes(head.nc, embed, head.nl)
            prototypes.set_prior(head.stride)
            setattr(head, f"{branch}prototypes", prototypes)
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
    def branch_prototypes(self) -> tuple[Prototypes, ...]:
        """Prototypes of every branch, in the order of `branches`."""
        return tuple(getattr(self, f"{p}prototypes") for p in self.branches)

    @property
    def one2many(self) -> dict[str, nn.Module]:
        """Modules of the one-to-many branch."""
        return {**super().one2many, "prototypes": self.prototypes}

    @property
    def one2one(self) -> dict[str, nn.Module]:
        """Modules of the one-to-one branch."""
        return {**super().one2one, "prototypes": self.one2one_prototypes}

    def forward_head(
        self, x: list[torch.Tensor], box_head: Any = None, cls_head: Any = None, prototypes: Prototypes | None = None
    ) -> dict[str, Any]:
        """Return the predictions of one branch.

        Args:
            x (list[torch.Tensor]): Feature maps of the levels, (B, C, H, W) each.
            box_head (nn.ModuleList, optional): Box branch of every level; None once fusing has removed this branch.
            cls_head (nn.ModuleList, optional): Class stem and embedding of every level.
            prototypes (Prototypes, optional): Prototypes of this branch.

        Returns:
            (dict[str, Any]): Ultralytics' `boxes` (B, 4 * reg_max, A), `scores` (B, nc, A) and `feats`; in
                training also `embeds` (B, D, A), and from the prototypes `weight` (nc, D), `gain` and `offset` (nc,),
                `logit_scale` and `logit_bias` (nl,), and `frozen` (nc, D).
        """
        if box_head is None or cls_head is None or prototypes is None:
            return {}
        embeds = [cls_head[i](x[i]) for i in range(self.nl)]
        scores = torch.cat([prototypes(e, i).flatten(2) for i, e in enumerate(embeds)], dim=-1)
        boxes = torch.cat([box_head[i](x[i]).flatten(2) for i in range(self.nl)], dim=-1)
        preds: dict[str, Any] = {"boxes": boxes, "scores": scores, "feats": x}
        if self.training:
            preds["embeds"] = torch.cat([e.flatten(2) for e in embeds], dim=-1)
            preds["logit_scale"], preds["logit_bias"] = prototypes.logit_scale, prototypes.bias
            preds["weight"], preds["gain"] = prototypes.weight[..., 0], prototypes.gain
            preds["offset"], preds["frozen"] = prototypes.offset, prototypes.frozen
        return preds

    def bias_init(self) -> None:
        """Set the biases of box and class branches to Ultralytics' initial values; the strides must be known."""
        for branch, prototypes in zip(self.branches, self.branch_prototypes):
            for box in getattr(self, f"{branch}cv2"):
                box[-1].bias.data[:] = BOX_PRIOR
            prototypes.set_prior(self.stride)

    def freeze_prototypes(self, classes: list[int]) -> None:
        """Freeze the current prototypes of some classes, and of no others, for the triplet term.

        Args:
            classes (list[int]): Class indices, those with a learned prototype.
        """
        for prototypes in self.branch_prototypes:
            prototypes.frozen.zero_()
            prototypes.frozen[classes] = F.normalize(prototypes.weight.detach()[classes, :, 0], dim=1)

    def get_class(self, index: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return the classifier of one class in every branch, as `set_class` takes it.

        Args:
            index (int): Class index.

        Returns:
            (list[tuple[torch.Tensor, torch.Tensor]]): Prototype times its scale, (D,), and bias, (), of each branch.
        """
        return [
            (F.normalize(p.weight.detach()[index, :, 0].float(), dim=0) * p.gain[index], p.offset[index].clone())
            for p in self.branch_prototypes
        ]

    def set_class(self, index: int, rows: list[tuple[torch.Tensor, torch.Tensor | float]]) -> None:
        """Set the classifier of one class, or append it if `index` is the number of classes.

        Args:
            index (int): Class index, 0 to nc.
            rows (list[tuple[torch.Tensor, torch.Tensor | float]]): For each branch, the prototype (D,), whose length is
                the scale, and the bias.

        Raises:
            IndexError: If `index` is larger than the number of classes.
        """
        if index > self.nc:
            raise IndexError(f"class index {index} would leave a gap after the {self.nc} classes of the head")
        for prototypes, (prototype, offset) in zip(self.branch_prototypes, rows):
            gain = prototype.float().norm().clamp(min=1e-12)
            prototypes.replace(index, (prototype / gain).view(1, -1, 1), gain, offset)
        self._count_classes()

    def remove_class(self, index: int) -> None:
        """Remove one class; the indices after it decrease by one.

        Args:
            index (int): Class index.
        """
        for prototypes in self.branch_prototypes:
            prototypes.replace(index)
        self._count_classes()

    def _count_classes(self) -> None:
        """Set the class count to the number of prototypes."""
        self.nc = len(self.branch_prototypes[0].weight)
        self.no = self.nc + self.reg_max * 4

    def fold(self) -> Detect:
        """Return a stock head with the same outputs: per level, embedding and classifier become one 1x1 conv.

        With e = W f + v (BatchNorm merged) and logits R e + b, the conv has the weight R W and the bias R v + b. Both
        are computed in float64 on the CPU, since Apple GPUs lack float64.

        Returns:
            (Detect): The head, which shares its other modules with this one.
        """
        head = Detect.__new__(Detect)
        head.__dict__ = {k: v for k, v in self.__dict__.items() if k != "embed"}
        head._modules = {k: v for k, v in self._modules.items() if "proto" not in k and k != "proj"}
        head.type = f"{Detect.__module__}.{Detect.__name__}"
        for branch, prototypes in zip(self.branches, self.branch_prototypes):
            convs = [_fold_level(stem[-1], *prototypes.rows(i)) for i, stem in enumerate(getattr(self, f"{branch}cv3"))]
            stems = (nn.Sequential(*stem[:-1], conv) for stem, conv in zip(getattr(self, f"{branch}cv3"), convs))
            setattr(head, f"{branch}cv3", nn.ModuleList(stems))
        head.np = sum(x.numel() for x in head.parameters())
        return head.train(self.training)


@torch.no_grad()
def _fold_level(embedding: Embedding, rows: torch.Tensor, bias: torch.Tensor) -> nn.Conv2d:
    """Return the 1x1 conv that equals an embedding followed by a classifier."""
    conv = embedding.conv
    if hasattr(embedding, "bn"):
        conv = fuse_conv_and_bn(deepcopy(conv), embedding.bn)  # which changes the conv in place
    weight, shift, rows, bias = (x.cpu().double() for x in (conv.weight[..., 0, 0], conv.bias, rows, bias))
    folded = nn.Conv2d(conv.in_channels, len(rows), 1, device=conv.weight.device, dtype=conv.weight.dtype)
    folded.load_state_dict({"weight": (rows @ weight)[..., None, None], "bias": rows @ shift + bias})
    return folded.train(embedding.training)
