"""Grafting: layers of their own for new classes, beside those of a detector that stays as it is.

After Retentive R-CNN (Fan et al. 2021, "Generalized Few-Shot Object Detection without Forgetting", CVPR), which keeps
the base detector and adds one for new classes. Here both share a head with more levels: its first levels are the old
ones, where the rows of the new classes are off, and the levels of the copy are the other way round. The result is a
stock `Detect` in a stock `DetectionModel`, with one NMS over all levels.

    backbone (shared) -> neck      -> levels P3 P4 P5     old classes
                      -> neck copy -> levels P3 P4 P5     new classes
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import nn
from ultralytics.nn.modules.block import SPPF
from ultralytics.nn.modules.head import Detect, v10Detect
from ultralytics.nn.tasks import BaseModel, DetectionModel
from ultralytics.utils.loss import E2ELoss

from yolo_fewshot.nn.criterion import FewShotLoss
from yolo_fewshot.nn.head import class_prior
from yolo_fewshot.nn.rows import OFF, StockRows

IMAGE = -1  # source of the first layer
LEVEL_LISTS = ("cv2", "cv3", "one2one_cv2", "one2one_cv3")  # lists of the head with an entry for each level


class Group(NamedTuple):
    """Levels of a head that detect the same classes.

    Attributes:
        levels (list[int]): Indices of the levels.
        classes (list[int]): Indices of the classes whose rows are on there.
    """

    levels: list[int]
    classes: list[int]


class Layer(NamedTuple):
    """Layer of a network.

    Attributes:
        module (nn.Module): The module.
        row (list): Repeats, name and arguments in the model YAML.
        sources (list[int]): Indices of the layers that it reads, `IMAGE` for the image.
    """

    module: nn.Module
    row: list[Any]
    sources: list[int]


class GraftModel(DetectionModel):
    """Copy of a part of a detector in training for new classes, with the detector that it will be grafted onto.

    Only its own classes are in its head. Its frozen layers are those that it will share.

    Attributes:
        graft (dict): `source`, the detector (DetectionModel); `layers`, the index there of each layer of the copy;
            `shared`, the layers of the copy, by their index, that are frozen; `levels`, the levels that the copy takes
            the place of, or None for a new graft.
        shots (dict[str, int]): Number of shots of each class.
    """

    graft: dict[str, Any]
    shots: dict[str, int]

    def init_criterion(self) -> FewShotLoss | E2ELoss:
        """Create the loss, one for each branch of the head."""
        return E2ELoss(self, FewShotLoss) if len(StockRows(self).branches) > 1 else FewShotLoss(self)


def check_graftable(model: Any) -> None:
    """Refuse a network that cannot be grafted onto.

    Args:
        model (nn.Module): Network.

    Raises:
        TypeError: If its head is not `Detect`, or its YAML does not describe its layers; the text says why.
    """
    head = model.model[-1]
    if type(head) not in {Detect, v10Detect}:
        raise TypeError(
            f"A {type(head).__name__} head cannot be grafted onto, only one that detects boxes (Detect). Enroll the "
            "classes instead, e.g. 'yolo predict model=... support=...'."
        )
    StockRows(model)  # checks the class branch
    rows = [*model.yaml.get("backbone", []), *model.yaml.get("head", [])]
    if len(rows) != len(model.model):
        raise TypeError(
            f"The model has {len(model.model)} layers, and its YAML describes {len(rows)}, so that it cannot be "
            "grafted onto. Use a checkpoint that Ultralytics has trained from a YAML."
        )


def level_groups(model: Any) -> list[Group]:
    """Return the groups of levels that detect the same classes, the original levels first.

    Args:
        model (DetectionModel): Detector with a stock head.

    Returns:
        (list[Group]): One group unless classes were grafted.
    """
    rows = StockRows(model)
    groups: list[Group] = []
    for level, conv in enumerate(rows.convs(rows.branches[0])):
        off = (conv.bias <= OFF / 2) & ~conv.weight.flatten(1).any(1)
        classes = (~off).nonzero()[:, 0].tolist()
        if groups and groups[-1].classes == classes and model.stride[level] > model.stride[groups[-1].levels[-1]]:
            groups[-1].levels.append(level)
        else:
            groups.append(Group([level], classes))
    return groups


def new_graft(source: Any, names: Iterable[str], part: str) -> GraftModel:
    """Return the copy to train for new classes: all layers of the original detector, with fresh rows.

    Class stems stay those of the detector, whereas ordinary fine-tuning on a few classes may start with new ones.

    Args:
        source (DetectionModel): Detector.
        names (Iterable[str]): Names of the n new classes.
        part (str): What the new classes get of their own: 'head'; 'neck', with the head and what follows SPPF in the
            backbone (C2PSA in YOLO11); or 'all' layers.

    Returns:
        (GraftModel): The copy; layers that it shares with the detector are in `graft["shared"]`.

    Raises:
        TypeError: If the detector cannot be grafted onto.
    """
    check_graftable(source)
    model, layers = _subnetwork(source, level_groups(source)[0].levels)
    backbone = sum(i < len(source.yaml["backbone"]) for i in layers)
    entry = int(isinstance(model.model[0], nn.Identity))  # of a detector that a whole network was grafted onto
    neck = max((k + 1 for k in range(backbone) if isinstance(model.model[k], SPPF)), default=backbone)
    shared = {"head": len(layers) - 1, "neck": neck, "all": entry}[part]
    _fresh_rows(model, list(names))
    return _as_graft(model, source, layers, list(range(shared)), None)


def old_graft(source: Any, group: Group) -> GraftModel:
    """Return the copy that was grafted before, to train it further.

    Args:
        source (DetectionModel): Detector with grafted classes.
        group (Group): The levels of these classes.

    Returns:
        (GraftModel): The copy, with its classes alone; it shares the layers that other levels use, too.
    """
    model, layers = _subnetwork(source, group.levels)
    others = set(_subnetwork(source, [i for i in range(source.model[-1].nl) if i not in group.levels])[1][:-1])
    rows = StockRows(model)
    for branch in rows.branches:
        for conv in rows.convs(branch):
            _set_rows(conv, conv.weight[group.classes], conv.bias[group.classes])
    _count_classes(model, [str(source.names[i]) for i in group.classes])
    return _as_graft(model, source, layers, [k for k, i in enumerate(layers) if i in others], group.levels)


def fuse_shared(model: GraftModel) -> None:
    """Give a copy the shared layers of its detector with BatchNorm merged into convolutions, which takes less time.

    They are frozen, so they compute the same but for rounding, and `unite` takes those of the detector. A resumed copy
    gets them in full precision again.

    Args:
        model (GraftModel): Copy to train, changed in place.
    """
    source, layers = model.graft["source"], model.graft["layers"]
    part = BaseModel()
    part.model = nn.Sequential(*(deepcopy(source.model[layers[k]]) for k in model.graft["shared"])).eval()
    part.fuse(verbose=False)
    for k, module in zip(model.graft["shared"], part.model):
        module.i, module.f = model.model[k].i, model.model[k].f
        model.model[k] = module.requires_grad_(True)  # frozen by the trainer, like any layer


def unite(trained: GraftModel) -> DetectionModel:
    """Return the detector with the trained copy grafted onto it; its own layers and rows stay the same, bit by bit.

    Args:
        trained (GraftModel): Trained copy.

    Returns:
        (DetectionModel): Detector of all classes, the new ones last.
    """
    copy = deepcopy(trained)
    copy.graft["source"].__dict__.pop("class_weights", None)  # which has no weight of the new classes
    return _appended(copy, **copy.graft) if copy.graft["levels"] is None else _replaced(copy, **copy.graft)


def drop_unused_levels(model: Any) -> None:
    """Remove the levels where no class is on, and the layers that only they read.

    Args:
        model (DetectionModel): Detector with a stock head, changed in place.
    """
    groups = level_groups(model)
    levels = [i for g in groups for i in g.levels if g.classes]
    if len(levels) == model.model[-1].nl or not levels:
        return
    smaller = _subnetwork(model, levels)[0]
    for name in ("model", "save", "yaml", "stride"):
        setattr(model, name, getattr(smaller, name))


def _as_graft(
    model: DetectionModel, source: Any, layers: list[int], shared: list[int], levels: list[int] | None
) -> GraftModel:
    """Turn a network into a copy to train."""
    model.__class__ = GraftModel
    model.graft = {"source": source, "layers": layers, "shared": shared, "levels": levels}
    for name in ("enrolled", "class_weights"):  # of the old classes; Ultralytics keeps the weights of cls_pw=
        model.__dict__.pop(name, None)
    return model.float().requires_grad_(True)


def _appended(copy: GraftModel, source: Any, layers: list[int], shared: list[int], levels: None) -> DetectionModel:
    """Graft a copy as new levels onto its detector."""
    old, new = _layers(source), _layers(copy)
    head, n = source.model[-1], len(copy.names)
    if not shared:  # the copy reads the image, which has no index of its own
        old = [Layer(nn.Identity(), [1, "nn.Identity", []], [IMAGE]), *_moved(old, lambda i: i + 1)]
    entry = int(not shared)
    place = {IMAGE: 0} | {k: layers[k] + entry for k in shared}  # of each layer of the copy
    own = [k for k in range(len(new) - 1) if k not in shared]
    place |= {k: len(old) - 1 + i for i, k in enumerate(own)}
    added = _moved([new[k] for k in own], place.__getitem__)
    inputs = [*old[-1].sources, *(place[k] for k in new[-1].sources)]
    for rows, before, after in ((StockRows(source), 0, n), (StockRows(copy), head.nc, 0)):
        for branch in rows.branches:
            for conv in rows.convs(branch):
                _pad_rows(conv, before, after)
    for name in LEVEL_LISTS:
        if getattr(head, name, None) is not None:
            getattr(head, name).extend(getattr(copy.model[-1], name))
    head.stride = torch.cat([head.stride, copy.model[-1].stride.to(head.stride)])
    _assemble(source, [*old[:-1], *added, Layer(head, old[-1].row, inputs)], len(source.yaml["backbone"]) + entry)
    _count_classes(source, [*map(str, source.names.values()), *map(str, copy.names.values())])
    return source


def _replaced(copy: GraftModel, source: Any, layers: list[int], shared: list[int], levels: list[int]) -> DetectionModel:
    """Put a copy that was trained further back into its detector."""
    head, own = source.model[-1], copy.model[-1]
    classes = [i for i, n in source.names.items() if str(n) in set(map(str, copy.names.values()))]
    for k, i in enumerate(layers[:-1]):
        if k not in shared:
            module = copy.model[k]
            module.i, module.f = source.model[i].i, source.model[i].f
            source.model[i] = module
    for name in LEVEL_LISTS:
        for k, level in enumerate(levels):
            if getattr(head, name, None) is None:
                continue
            stem = getattr(own, name)[k]
            if name.endswith("cv3"):
                conv = getattr(head, name)[level][-1]
                with torch.no_grad():
                    conv.weight[classes], conv.bias[classes] = stem[-1].weight, stem[-1].bias
                stem[-1] = conv
            getattr(head, name)[level] = stem
    return source


def _layers(model: Any) -> list[Layer]:
    """Return the layers of a network."""
    rows = [*model.yaml["backbone"], *model.yaml["head"]]
    read = [[m.f] if isinstance(m.f, int) else list(m.f) for m in model.model]
    sources = [[j if j >= 0 else i + j for j in f] for i, f in enumerate(read)]
    return [Layer(m, list(row[1:]), s) for m, row, s in zip(model.model, rows, sources)]


def _moved(layers: list[Layer], place: Callable[[int], int]) -> list[Layer]:
    """Return layers whose sources have other indices, those that `place` returns."""
    return [x._replace(sources=[place(i) for i in x.sources]) for x in layers]


def _assemble(model: Any, layers: list[Layer], backbone: int) -> None:
    """Make a network of layers, and write its YAML.

    Args:
        model (DetectionModel): Network, changed in place.
        layers (list[Layer]): Its layers, each after those that it reads.
        backbone (int): Number of the layers that belong to the backbone.
    """
    rows: list[list[Any]] = []
    saved: set[int] = set()
    for i, x in enumerate(layers):
        module: Any = x.module
        if isinstance(getattr(module, "f", IMAGE), int):
            f: Any = -1 if x.sources[0] == i - 1 else x.sources[0]
        else:
            f = x.sources
        module.i, module.f, module.np = i, f, sum(p.numel() for p in module.parameters())
        # Not getattr, which finds the method nn.Module.type in a layer that Ultralytics has not made.
        module.type = module.__dict__.get("type", f"{type(module).__module__}.{type(module).__name__}")
        saved |= {j for j in ([f] if isinstance(f, int) else f) if j >= 0}
        rows.append([f, *x.row])
    model.model, model.save = nn.Sequential(*(x.module for x in layers)), sorted(saved)
    model.yaml = {**model.yaml, "backbone": rows[:backbone], "head": rows[backbone:]}
    head = model.model[-1]
    head.nl, head.shape, model.stride = len(head.stride), None, head.stride


def _subnetwork(model: Any, levels: list[int]) -> tuple[DetectionModel, list[int]]:
    """Return a copy of a detector with some of its levels, and the index in the detector of each of its layers."""
    layers = _layers(model)
    needed, open_ = {len(layers) - 1}, [layers[-1].sources[i] for i in levels]
    while open_:
        i = open_.pop()
        if i != IMAGE and i not in needed:
            needed.add(i)
            open_ += layers[i].sources
    kept = sorted(needed)
    copy = deepcopy(model, {id(getattr(model, "criterion", None)): None})
    head = copy.model[-1]
    for name in LEVEL_LISTS:
        if getattr(head, name, None) is not None:
            setattr(head, name, nn.ModuleList(getattr(head, name)[i] for i in levels))
    head.stride = head.stride[levels]
    place = {IMAGE: IMAGE} | {i: k for k, i in enumerate(kept)}
    copied = [x for i, x in enumerate(_layers(copy)) if i in needed]
    copied[-1] = copied[-1]._replace(sources=[copied[-1].sources[i] for i in levels])
    _assemble(copy, _moved(copied, place.__getitem__), sum(i < len(model.yaml["backbone"]) for i in kept))
    return copy, kept


def _fresh_rows(model: Any, names: list[str]) -> None:
    """Replace the rows of all classes by those of new classes, at the start of training."""
    rows = StockRows(model)
    for branch in rows.branches:
        for conv, prior in zip(rows.convs(branch), class_prior(len(names), model.stride)):
            fresh = nn.Conv2d(conv.in_channels, len(names), 1)
            _set_rows(conv, fresh.weight, torch.full((len(names),), float(prior)))
    _count_classes(model, names)


def _pad_rows(conv: nn.Conv2d, before: int, after: int) -> None:
    """Add rows that are off before and after those of a layer."""
    w, b = conv.weight, conv.bias
    assert b is not None  # as `StockRows` has checked
    weight = torch.cat([w.new_zeros(before, *w.shape[1:]), w, w.new_zeros(after, *w.shape[1:])])
    _set_rows(conv, weight, torch.cat([b.new_full((before,), OFF), b, b.new_full((after,), OFF)]))


def _set_rows(conv: nn.Conv2d, weight: torch.Tensor, bias: torch.Tensor) -> None:
    """Set weight and bias of a layer, and its number of rows."""
    conv.weight, conv.bias = (nn.Parameter(x.detach().clone().to(conv.weight)) for x in (weight, bias))
    conv.out_channels = len(weight)


def _count_classes(model: Any, names: list[str]) -> None:
    """Set the classes of a network to those of its rows."""
    head = model.model[-1]
    head.nc, head.no = len(names), len(names) + head.reg_max * 4
    model.names, model.nc = dict(enumerate(names)), len(names)
    model.yaml["nc"] = len(names)
