"""Object embeddings and class prototypes, and the enrolment of classes from a few labelled examples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from ultralytics.data.build import build_dataloader
from ultralytics.data.dataset import YOLODataset

from yolo_fewshot.assign import BoxAssignment


def pool_objects(
    embeds: torch.Tensor, fg: tuple[torch.Tensor, torch.Tensor], gt_idx: torch.Tensor, weight: torch.Tensor, n_max: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pool the embeddings of the anchors assigned to each object.

    Args:
        embeds (torch.Tensor): Anchor embeddings, (B, A, D).
        fg (tuple[torch.Tensor, torch.Tensor]): Picture and anchor index of the M foreground anchors, (M,) each.
        gt_idx (torch.Tensor): Index of the object, within its picture, that each of them is assigned to, (M,).
        weight (torch.Tensor): Weight of each of them, (M,).
        n_max (int): Objects per picture, padding included.

    Returns:
        pooled (torch.Tensor): Weighted means of unit length, (B * n_max, D) float32; rows of zeros where an object has
            no anchor.
        valid (torch.Tensor): Which objects have one, (B * n_max,) bool.
    """
    index = fg[0] * n_max + gt_idx.long()  # an assignment without objects is float
    weight = weight.float().clamp(min=1e-3)  # untrained models fit their objects with weights of almost zero
    rows = embeds[fg].float() * weight[:, None]
    pooled = rows.new_zeros(len(embeds) * n_max, rows.shape[1]).index_add(0, index, rows)
    valid = torch.zeros(len(pooled), dtype=torch.bool, device=pooled.device).index_fill(0, index, True)
    return F.normalize(pooled, dim=1), valid


def class_means(objects: torch.Tensor, labels: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the prototypes: each class's mean object embedding, of unit length (Snell et al. 2017, eq. 1).

    Args:
        objects (torch.Tensor): Object embeddings of unit length, (N, D).
        labels (torch.Tensor): Their class, (N,) in 0..n-1, or negative for an object to leave out.
        n (int): Number of classes.

    Returns:
        prototypes (torch.Tensor): (n, D) float32; rows of zeros for classes without an object.
        counts (torch.Tensor): Objects of each class, (n,) float32.
    """
    one_hot = F.one_hot(labels.long().clamp(min=-1) + 1, n + 1)[:, 1:].to(objects)
    return F.normalize(one_hot.t() @ objects, dim=1), one_hot.sum(0)


@torch.no_grad()
def embed_objects(model: nn.Module, batch: dict[str, Any]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Embed the labelled objects of a batch with every branch of a few-shot model.

    An object's anchors are the ones that training would assign to it by the IoU of their boxes alone, since a class
    that is not enrolled yet has no score.

    Args:
        model (nn.Module): Few-shot model in eval mode.
        batch (dict[str, Any]): As collated by Ultralytics, with `img` (B, 3, H, W) float in 0..1.

    Returns:
        embeds (list[torch.Tensor]): Object embeddings of unit length of each branch, (N, D) float32, in the order of
            `batch["cls"]`.
        valid (torch.Tensor): Which objects have an embedding in every branch, (N,) bool.
    """
    head = model.model[-1]
    head.training = True  # the flag of the head alone: raw predictions with embeddings, while BatchNorm stays in eval
    try:
        preds = model.predict(batch["img"])
    finally:
        head.training = False
    branches = (preds["one2many"], preds["one2one"]) if "one2many" in preds else (preds,)
    assign, picture = BoxAssignment(model), batch["batch_idx"].long()
    first = torch.searchsorted(picture, picture)  # objects of a picture are neighbours
    place = torch.arange(len(picture), device=picture.device) - first
    embeds, valid = [], torch.ones(len(picture), dtype=torch.bool, device=picture.device)
    for branch in branches:
        if branch:  # fusing empties the branch that is not used
            fg, gt_idx, weight, n_max = assign(branch, batch)
            pooled, has_anchor = pool_objects(branch["embeds"].transpose(1, 2), fg, gt_idx, weight, n_max)
            embeds.append(pooled[picture * n_max + place])
            valid &= has_anchor[picture * n_max + place]
    return embeds, valid


@torch.no_grad()
def enroll(model: nn.Module, data: dict[str, Any], imgsz: int, batch: int = 16) -> dict[str, int]:
    """Set or append the prototypes of the classes that the train split of a data set shows; nothing else changes.

    Args:
        model (nn.Module): Few-shot model; changed in place.
        data (dict[str, Any]): Data set as returned by Ultralytics' `check_det_dataset`.
        imgsz (int): Picture size in pixels.
        batch (int): Pictures per forward pass.

    Returns:
        (dict[str, int]): Number of shots of each enrolled class, by name.

    Raises:
        ValueError: If a class that the model does not know has no labelled object, or no box yields an embedding.
    """
    device = next(model.parameters()).device
    dataset = YOLODataset(
        img_path=data["train"], imgsz=imgsz, augment=False, data=data, prefix="support: ", batch_size=batch
    )
    model.eval()
    found: list[list[torch.Tensor]] = []
    labels = []
    for item in build_dataloader(dataset, batch=batch, workers=0, shuffle=False, device=device):
        item = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in item.items()}
        item["img"] = item["img"].float() / 255
        if not len(item["cls"]):
            continue
        embeds, valid = embed_objects(model, item)
        found.append([e[valid] for e in embeds])
        labels.append(item["cls"].view(-1)[valid])
    known = {str(n): i for i, n in model.names.items()}
    y = torch.cat(labels) if labels else torch.empty(0)
    counts = torch.bincount(y.long(), minlength=len(data["names"])).tolist()
    missing = [n for i, n in data["names"].items() if not counts[i] and n not in known]
    if missing or not len(y):
        raise ValueError(
            f"No usable box for {', '.join(missing) or 'any class'} in {Path(str(data['train'])).name}. Label at least "
            "one object of every new class, with a box inside the picture, or leave the class out of 'names'."
        )
    shots = {}
    prototypes = [class_means(torch.cat(e), y, len(counts))[0] for e in zip(*found)]
    for i, name in data["names"].items():
        if counts[i]:
            index = known.setdefault(name, len(known))
            model.model[-1].set_prototype(index, [p[i] for p in prototypes])
            model.names[index] = name
            shots[name] = counts[i]
    model.nc = model.yaml["nc"] = model.model[-1].nc
    return shots
