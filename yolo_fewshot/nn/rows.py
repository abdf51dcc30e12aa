"""The class rows of a head, which enrollment reads and writes: one interface for few-shot and for stock heads.

A class is a row of each branch of the head. In a few-shot head it is a prototype, shared by all levels. In a stock head
it is a row of the last layer of the class branch, a 1x1 conv, at each level. Rows of other classes are never touched,
so their logits stay the same, bit by bit where the device sums the channels in the same order for any class count.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from copy import copy
from typing import Any, NamedTuple

import torch
from torch import nn
from ultralytics.nn.modules.head import Detect

from yolo_fewshot.class_names import by_index
from yolo_fewshot.nn.assign import BoxAssignment
from yolo_fewshot.nn.head import FewShotDetect, Prototypes, class_prior
from yolo_fewshot.nn.predictions import branch_predictions
from yolo_fewshot.nn.stem_features import draw_features

OFF = -30.0  # bias of a class at the levels of other classes, i.e. a score of 1e-13
OPEN_VOCABULARY = {"WorldDetect", "YOLOEDetect"}  # heads whose classes are embeddings of texts or prompts
STD_MIN = 1e-3  # minimum standard deviation of a feature
DRAWN = 2000  # anchors of each level that are drawn from the statistics of a stock head
DRAWN_MAX = 100.0  # maximum standardized feature of these; one that the support images hardly vary in would be huge


class LevelSpace(NamedTuple):
    """Embedding space of one branch of a stock head: a class has one vector and one offset at each level.

    The logit of a class at an anchor with embedding e and level l is <e, vector_l> + bias_l + offset_l.

    Attributes:
        bias (torch.Tensor): Prior logit of every level, (nl,) float32.
        embed (int): Size D of an embedding.
    """

    bias: torch.Tensor
    embed: int

    def zeros(self, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return vectors (n, nl, D) and offsets (n, nl) of zeros.

        Args:
            n (int): Number of classes.
        """
        return torch.zeros(n, len(self.bias), self.embed), torch.zeros(n, len(self.bias))

    def logits(
        self, embeds: torch.Tensor, level: torch.Tensor, vectors: torch.Tensor, offsets: torch.Tensor
    ) -> torch.Tensor:
        """Compute the logits of classes at anchors.

        Args:
            embeds (torch.Tensor): Embeddings of the anchors, (M, D) float32.
            level (torch.Tensor): Levels of the anchors, (M,) int64.
            vectors (torch.Tensor): Vectors of the classes, (n, nl, D) float32.
            offsets (torch.Tensor): Offsets of the classes, (n, nl) float32.

        Returns:
            (torch.Tensor): Logits, (M, n) float32.
        """
        logits = embeds.new_zeros(len(embeds), len(vectors))
        for i, bias in enumerate(self.bias):
            rows = (level == i).nonzero()[:, 0]
            logits[rows] = embeds[rows] @ vectors[:, i].t() + bias + offsets[:, i]
        return logits


Space = Prototypes | LevelSpace  # what enrollment methods learn in: vectors, offsets, and their logits at anchors


class ClassRows(ABC):
    """The class rows of a model's head.

    Attributes:
        model (nn.Module): The model.
        branches (tuple[str, ...]): Prefixes of the names of the head's branches: '' for one-to-many, 'one2one_'.
        max_values (int): Approximate number of values in the embeddings of the anchors to keep of a support set.
        anchors_per_view (float): Maximum number of background anchors to keep of a view of an image.
        per_level (bool): Whether every level has a row and an embedding space of its own.
        memory_weight (float): Weight of an anchor of `memory` in a fit; an anchor of the support images has 1.
    """

    branches: tuple[str, ...]
    max_values = 64_000_000  # about 250 MB
    anchors_per_view: float = float("inf")
    per_level = False
    memory_weight = 0.3

    def __init__(self, model: Any):
        """Initialize the rows.

        Args:
            model (nn.Module): The model, whose names are put into the order of the rows.
        """
        self.model = model
        self.model.names = by_index(self.model.names)

    @property
    def head(self) -> Any:
        """Head of the model."""
        return self.model.model[-1]

    @property
    def assignments(self) -> list[BoxAssignment]:
        """Assignment of anchors to objects in every branch, each with as many anchors per object as in training."""
        return BoxAssignment.of_branches(self.model, self.branches)

    @property
    def memory(self) -> list:
        """Replay buffer of base anchors, see `yolo_fewshot.enroll.replay`; empty if there is none."""
        return getattr(self.model, "memory", [])

    @property
    def enrolled(self) -> dict[str, dict[str, Any]]:
        """Record of every enrolled class by name; empty if no class was enrolled."""
        return enrolled_classes(self.model)

    @abstractmethod
    def standardize(self, images: Iterable[torch.Tensor]) -> None:
        """Learn the statistics of the features, if the embedding depends on them.

        Args:
            images (Iterable[torch.Tensor]): Batches of support images, (B, C, H, W) float in 0..1 each.
        """

    @abstractmethod
    def predict(self, img: torch.Tensor) -> list[dict[str, Any]]:
        """Return the raw predictions of every branch in eval mode, with the embeddings of the anchors.

        Args:
            img (torch.Tensor): Images, (B, C, H, W) float in 0..1.

        Returns:
            (list[dict[str, Any]]): Ultralytics' raw predictions and `embeds`, (B, D, A).
        """

    @abstractmethod
    def spaces(self) -> list[Space]:
        """Return the embedding space of every branch."""

    @abstractmethod
    def get(self, index: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return the row of one class in every branch, as `restore` takes it.

        Args:
            index (int): Class index.
        """

    @abstractmethod
    def restore(self, index: int, rows: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Write the row of one class back.

        Args:
            index (int): Class index.
            rows (list[tuple[torch.Tensor, torch.Tensor]]): What `get` returned.
        """

    @abstractmethod
    def set(self, index: int, weights: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Set the row of one class from a vector and an offset, or append it if `index` is the number of classes.

        Args:
            index (int): Class index, 0 to nc.
            weights (list[tuple[torch.Tensor, torch.Tensor]]): Vector and offset of every branch, in its space.
        """

    @abstractmethod
    def remove(self, index: int) -> None:
        """Remove one class; the indices after it decrease by one.

        Args:
            index (int): Class index.
        """


class FewShotRows(ClassRows):
    """Rows of a few-shot head: the prototypes of its branches."""

    max_values = 25_600_000  # about 100 MB
    anchors_per_view = 512

    def __init__(self, model: nn.Module):
        """Initialize the rows.

        Args:
            model (nn.Module): Few-shot model.
        """
        super().__init__(model)
        self.branches = self.head.branches

    def standardize(self, images: Iterable[torch.Tensor]) -> None:
        """Do nothing: the embedding is learned, see `ClassRows.standardize`."""

    def predict(self, img: torch.Tensor) -> list[dict[str, Any]]:
        """Return the raw predictions of every branch, see `ClassRows.predict`."""
        return branch_predictions(self.model, img)

    def spaces(self) -> list[Space]:
        """Return the prototypes of every branch."""
        return list(self.head.branch_prototypes)

    def get(self, index: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return the prototype of one class in every branch, see `ClassRows.get`."""
        return self.head.get_class(index)

    def restore(self, index: int, rows: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Write the prototype of one class back, see `ClassRows.restore`."""
        self.head.set_class(index, rows)

    def set(self, index: int, weights: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Set the prototype of one class, see `ClassRows.set`."""
        self.head.set_class(index, weights)

    def remove(self, index: int) -> None:
        """Remove one class, see `ClassRows.remove`."""
        self.head.remove_class(index)


class StockRows(ClassRows):
    """Rows of a stock head: those of the 1x1 conv that ends its class branch at each level.

    The embedding of an anchor is the input of that conv, standardized with the mean and the standard deviation that
    each of its channels has in the support images at that level, since the channels of a level differ in scale, and
    those of different levels are not aligned.
    """

    per_level = True
    memory_weight = 0.5

    def __init__(self, model: nn.Module):
        """Initialize the rows.

        Args:
            model (nn.Module): Stock model whose head is a `Detect` or a subclass with the same class branch.

        Raises:
            TypeError: If the head has another class branch; the text names the layer.
        """
        super().__init__(model)
        self.branches = tuple(p for p in ("", "one2one_") if getattr(self.head, f"{p}cv3", None) is not None)
        name = type(self.head).__name__
        if not self.branches:
            raise TypeError(
                f"The {name} head has no class branch 'cv3', i.e. it was fused. Use the unfused checkpoint."
            )
        for branch in self.branches:
            for i, stem in enumerate(getattr(self.head, f"{branch}cv3")):
                is_stem = isinstance(stem, nn.Sequential) and len(stem) > 0
                last = stem[-1] if is_stem else stem
                pointwise = is_stem and isinstance(last, nn.Conv2d) and last.kernel_size == (1, 1) and last.groups == 1
                if not pointwise or last.bias is None or last.out_channels != self.head.nc:
                    number = f".{len(stem) - 1}" if is_stem else ""
                    layer = f"model.{len(self.model.model) - 1}.{branch}cv3.{i}{number}"
                    raise TypeError(
                        f"Layer '{layer}' of the {name} head is {last}, and enrollment needs a class branch that ends "
                        f"with a 1x1 Conv2d of {self.head.nc} classes with a bias, as in a stock YOLO head."
                    )
        widths = {last.in_channels for branch in self.branches for last in self.convs(branch)}
        if len(widths) > 1:
            raise TypeError(
                f"The class branch 'cv3' of the {name} head has {sorted(widths)} channels, and enrollment needs as "
                "many at every level, as in a stock YOLO head."
            )
        self.mean: list[torch.Tensor] | None = None  # of the features, (nl, D) per branch
        self.std: list[torch.Tensor] = []

    @property
    def memory(self) -> list:
        """Anchors of the images that the model was trained on, drawn by `draw_features`; the same at every call."""
        if self.mean is None:
            return []
        generator, buffer = torch.Generator().manual_seed(0), []
        for branch, mean, std in zip(self.branches, self.mean, self.std):
            drawn = [draw_features(s[:-1], DRAWN, generator) for s in getattr(self.head, f"{branch}cv3")]
            features = [x for x in drawn if x is not None]
            levels = [i for i, x in enumerate(drawn) if x is not None]
            if not levels:
                return []
            embeds = torch.stack([(f - mean[i].float()) / std[i].float() for f, i in zip(features, levels)])
            level = torch.tensor(levels, dtype=torch.int16).repeat_interleave(DRAWN)
            embeds = embeds.flatten(0, 1).clamp(-DRAWN_MAX, DRAWN_MAX)
            buffer.append((embeds.half(), level, torch.full((len(level),), -1, dtype=torch.int16)))
        return buffer

    def convs(self, branch: str) -> list[Any]:
        """Return the last layer of the class branch of every level."""
        return [stem[-1] for stem in getattr(self.head, f"{branch}cv3")]

    def _raw(self, img: torch.Tensor) -> list[dict[str, Any]]:
        """Return the raw predictions of every branch, with the features before the last layer as `embeds`."""
        head, shallow, layers = copy(self.head), copy(self.model), list(self.model.model)
        head._modules = dict(head._modules)  # of this copy alone, so that other threads see no change
        width = self.convs(self.branches[0])[0].in_channels
        for branch in self.branches:
            stems = getattr(head, f"{branch}cv3")
            head._modules[f"{branch}cv3"] = nn.ModuleList(nn.Sequential(*s[:-1], _WithInput(s[-1])) for s in stems)
        head.nc += width
        shallow._modules = {**self.model._modules, "model": nn.Sequential(*layers[:-1], head)}
        preds = shallow.predict(img)[1]  # not as in training, which needs layers that fusing removes
        preds = [preds["one2many"], preds["one2one"]] if "one2many" in preds else [preds]
        found = [x for x in preds if "scores" in x]  # fusing leaves one branch of a dual head
        for x in found:
            x["embeds"], x["scores"] = x["scores"][:, :width], x["scores"][:, width:]
        return found

    @torch.no_grad()
    def standardize(self, images: Iterable[torch.Tensor]) -> None:
        """Learn mean and standard deviation of the features, see `ClassRows.standardize`."""
        sums: list[torch.Tensor] = []
        for img in images:
            for b, preds in enumerate(self._raw(img)):
                sizes = [f.shape[2] * f.shape[3] for f in preds["feats"]]
                for i, f in enumerate(preds["embeds"].cpu().double().split(sizes, dim=2)):
                    count = torch.full_like(f[0, :, 0], f.shape[0] * f.shape[2])
                    part = torch.stack([count, f.sum((0, 2)), f.square().sum((0, 2))])
                    k = b * len(sizes) + i
                    if k < len(sums):
                        sums[k] += part
                    else:
                        sums.append(part)
        count, first, second = torch.stack(sums).view(len(self.branches), -1, *sums[0].shape).unbind(2)
        mean = first / count
        std = (second / count - mean.square()).clamp(min=0).sqrt().clamp(min=STD_MIN)
        self.mean, self.std = list(mean), list(std)

    def predict(self, img: torch.Tensor) -> list[dict[str, Any]]:
        """Return the raw predictions of every branch, see `ClassRows.predict`; `standardize` must be called before."""
        assert self.mean is not None, "standardize() must be called first"
        predictions = self._raw(img)
        for preds, mean, std in zip(predictions, self.mean, self.std):
            level = torch.cat([torch.full((f.shape[2] * f.shape[3],), i) for i, f in enumerate(preds["feats"])])
            mean, std = (x.float()[level].t().to(preds["embeds"].device) for x in (mean, std))
            preds["embeds"] = (preds["embeds"].float() - mean) / std
        return predictions

    def spaces(self) -> list[Space]:
        """Return the space of every branch; the prior logits are those of a detector with one class."""
        return [LevelSpace(class_prior(1, self.head.stride), self.convs(b)[0].in_channels) for b in self.branches]

    def get(self, index: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return weight (nl, D) and bias (nl,) of one class in every branch, see `ClassRows.get`."""
        convs = [self.convs(b) for b in self.branches]
        return [
            (
                torch.stack([c.weight.detach()[index, :, 0, 0].clone() for c in x]),
                torch.stack([c.bias.detach()[index].clone() for c in x]),
            )
            for x in convs
        ]

    def restore(self, index: int, rows: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Write weight and bias of one class back, see `ClassRows.restore`; it is off at levels grafted since.

        Raises:
            ValueError: If the row is of a few-shot head, i.e. if the class was enrolled before the model was folded.
        """
        if any(weights.ndim == 1 for weights, _ in rows):
            raise ValueError(
                "The class was enrolled before the model was folded, and what it was trained with is in the few-shot "
                "checkpoint only. Forget it there, then fold."
            )
        for branch, (weights, biases) in zip(self.branches, rows):
            since = max(self.head.nl - len(weights), 0)
            weights = torch.cat([weights, weights.new_zeros(since, *weights.shape[1:])])
            self._replace(branch, index, weights, torch.cat([biases, biases.new_full((since,), OFF)]))
        self._count_classes()

    def set(self, index: int, weights: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Set the row of one class from vectors (nl, D) and offsets (nl,), see `ClassRows.set`."""
        assert self.mean is not None, "standardize() must be called first"
        rows = []
        for space, (vectors, offsets), mean, std in zip(self.spaces(), weights, self.mean, self.std):
            raw = vectors.double().cpu() / std  # e = (f - mean) / std
            rows.append((raw, space.bias.double() + offsets.double().cpu() - (raw * mean).sum(1)))
        self.restore(index, rows)

    def remove(self, index: int) -> None:
        """Remove one class, see `ClassRows.remove`."""
        for branch in self.branches:
            self._replace(branch, index)
        self._count_classes()

    @torch.no_grad()
    def _replace(
        self, branch: str, index: int, weights: torch.Tensor | None = None, biases: torch.Tensor | None = None
    ) -> None:
        """Replace the row of one class at every level, append it, or remove it if no weights are given."""
        for i, conv in enumerate(self.convs(branch)):
            for name, rows in (("weight", weights), ("bias", biases)):
                old = getattr(conv, name)
                row = old[:0] if rows is None else rows[i].to(old).view(1, *old.shape[1:])
                new = torch.cat([old[:index], row, old[index + 1 :]])
                setattr(conv, name, nn.Parameter(new, old.requires_grad))
            conv.out_channels = len(conv.weight)

    def _count_classes(self) -> None:
        """Set the class count to the number of rows."""
        self.head.nc = self.convs(self.branches[0])[0].out_channels
        self.head.no = self.head.nc + self.head.reg_max * 4


class _WithInput(nn.Module):
    """A layer that returns its input in front of its output."""

    def __init__(self, layer: nn.Module):
        """Initialize the layer."""
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return input and output, (B, c1 + c2, H, W)."""
        return torch.cat([x, self.layer(x)], 1)


def class_rows(model: nn.Module) -> ClassRows:
    """Return the class rows of a model.

    Args:
        model (nn.Module): Detection, segmentation, pose or OBB model, few-shot or stock.

    Returns:
        (ClassRows): The rows.

    Raises:
        TypeError: If the model has another head; the text says why.
    """
    layers: Any = getattr(model, "model", [None])
    head = layers[-1]
    if isinstance(head, FewShotDetect):
        return FewShotRows(model)
    kinds = {x.__name__ for x in type(head).__mro__}
    if not isinstance(head, Detect) or kinds & OPEN_VOCABULARY:
        raise TypeError(f"A {type(head).__name__} head has no row for each class.")
    return StockRows(model)


def enrolled_classes(model: Any) -> dict[str, dict[str, Any]]:
    """Return the record of every enrolled class of a model by name, see `yolo_fewshot.enroll.enroll.Shots`.

    Args:
        model (Any): Any network.

    Returns:
        (dict[str, dict]): The records; empty if no class was enrolled.
    """
    return getattr(model, "enrolled", None) or {}
