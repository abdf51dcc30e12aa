"""Features of a support set: what enrollment needs of its images, from one forward pass of each view."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from ultralytics.data.build import build_dataloader
from ultralytics.utils import TQDM, ops
from ultralytics.utils.checks import check_imgsz
from ultralytics.utils.tal import make_anchors

from yolo_fewshot.data.ignore import MaskedDataset
from yolo_fewshot.data.support import Support, SupportDataset
from yolo_fewshot.nn.assign import BoxAssignment
from yolo_fewshot.nn.ignore import outside, without_ignored
from yolo_fewshot.nn.predictions import branch_predictions
from yolo_fewshot.nn.prototypes import pool_objects

ROWS = 200_000  # anchors kept of a support set, about 100 MB with D = 128


class View(NamedTuple):
    """A way to look at an image.

    Attributes:
        scale (float): Factor of its size.
        flip (bool): Whether it is mirrored left to right.
        gain (float): Factor of its brightness.
    """

    scale: float = 1.0
    flip: bool = False
    gain: float = 1.0


class Anchors(NamedTuple):
    """Anchors of a support set in one branch: all that belong to an object, and of the others the hardest.

    Attributes:
        embeds (torch.Tensor): Embeddings, (M, D) float32.
        level (torch.Tensor): Index of the level, (M,) int64.
        boxes (torch.Tensor): Decoded boxes, x1, y1, x2, y2 in pixels of the view, (M, 4) float32.
        objects (torch.Tensor): Index of the object that the anchor belongs to, -1 for none, (M,) int64.
        weight (torch.Tensor): IoU-based weight of an anchor of an object; of others, their weight as a negative, (M,)
            float32.
        image (torch.Tensor): Index of the image, -1 for one that is not of the support set, (M,) int64.
        view (torch.Tensor): Index of the view, -1 likewise, (M,) int64.
    """

    embeds: torch.Tensor
    level: torch.Tensor
    boxes: torch.Tensor
    objects: torch.Tensor
    weight: torch.Tensor
    image: torch.Tensor
    view: torch.Tensor


class Features(NamedTuple):
    """Features of a support set.

    Attributes:
        cls (torch.Tensor): Label index of every object, (N,) int64.
        boxes (torch.Tensor): Its box in the first view, x1, y1, x2, y2 in pixels, (N, 4) float32.
        image (torch.Tensor): Index of its image, (N,) int64.
        files (list[str]): Image files.
        embeds (list[torch.Tensor]): Of each branch, mean embedding over the views, of unit length, (N, D) float32; rows
            of zeros for an object that no anchor belongs to.
        anchors (list[Anchors]): Of each branch.
        views (int): Number of views.
    """

    cls: torch.Tensor
    boxes: torch.Tensor
    image: torch.Tensor
    files: list[str]
    embeds: list[torch.Tensor]
    anchors: list[Anchors]
    views: int


def select(anchors: Anchors, mask: torch.Tensor) -> Anchors:
    """Return some of the anchors.

    Args:
        anchors (Anchors): Anchors, M of them.
        mask (torch.Tensor): Which ones, (M,) bool.

    Returns:
        (Anchors): The anchors.
    """
    return Anchors(*(x[mask] for x in anchors))


def support_views(args: dict[str, Any], crops: bool) -> list[View]:
    """Return the views of a support set: mild changes of size and light, mirrored only where training mirrored too.

    Args:
        args (dict[str, Any]): Training arguments of the model; a missing one counts as off.
        crops (bool): Whether the images are cropped objects, which are then shown smaller than the image.

    Returns:
        (list[View]): The views, the plain one first.
    """
    flip, light = bool(args.get("fliplr")), 0.2 if args.get("hsv_v") else 0.0
    if crops:
        return [View(0.35), View(0.5, flip, 1 + light), View(0.25, False, 1 - light)]
    return list(dict.fromkeys([View(), View(1.0, flip, 1 + light), View(0.8, False, 1 - light), View(1.25)]))


def show(batch: dict[str, Any], view: View, stride: int) -> dict[str, Any]:
    """Return a batch as one view shows it.

    Args:
        batch (dict[str, Any]): With `img` (B, C, H, W) float in 0..1 and `bboxes` (N, 4), x, y, w, h in 0..1.
        view (View): The view. A smaller image lies in the middle of a gray one of the old size, a greater one at the
            top left of a gray one whose size is a multiple of the stride.
        stride (int): Maximum stride of the model in pixels.

    Returns:
        (dict[str, Any]): The batch with other `img` and `bboxes`.
    """
    img, boxes = batch["img"], batch["bboxes"].clone()
    if view.flip:
        img, boxes[:, 0] = img.flip(3), 1 - boxes[:, 0]
    if view.scale != 1:
        height, width = img.shape[2:]
        h, w = round(height * view.scale), round(width * view.scale)
        if view.scale > 1:
            height, width = -(-h // stride) * stride, -(-w // stride) * stride
        top, left = ((height - h) // 2, (width - w) // 2) if view.scale < 1 else (0, 0)
        small = F.interpolate(img, (h, w), mode="bilinear", antialias=True)
        img = img.new_full((*img.shape[:2], height, width), 114 / 255)
        img[:, :, top : top + h, left : left + w] = small
        size, corner = boxes.new_tensor([w / width, h / height]), boxes.new_tensor([left / width, top / height])
        boxes = torch.cat([boxes[:, :2] * size + corner, boxes[:, 2:] * size], 1)
    return {**batch, "img": (img * view.gain).clamp(0, 1), "bboxes": boxes}


@torch.no_grad()
def extract(
    model: nn.Module,
    support: Support,
    imgsz: int,
    batch: int = 16,
    views: list[View] | None = None,
    rows: int = ROWS,
    desc: str = "Enrolling",
) -> Features:
    """Extract the features of a support set: one forward pass of each view of each image.

    An object's anchors are the ones that training would assign to it in the branch by the IoU of their boxes alone,
    since a class that is not enrolled yet has no score.

    Args:
        model (nn.Module): Few-shot model in eval mode.
        support (Support): The support set.
        imgsz (int): Image size in pixels.
        batch (int): Images per forward pass.
        views (list[View], optional): The views, those of `support_views` if not given.
        rows (int): Anchors to keep, roughly, which bounds the memory.
        desc (str): Text of the progress bar.

    Returns:
        (Features): The features, on the CPU.
    """
    device, stride = next(model.parameters()).device, int(model.stride.max())
    views = views or support_views(getattr(model, "args", None) or {}, support.crops)
    imgsz = check_imgsz(imgsz, stride=stride)
    trained = [i for i, n in model.names.items() if str(n) not in model.enrolled]
    keep = min(max(rows // (len(support.labels) * len(views)), 32), 512)
    assign = BoxAssignment.of_branches(model)
    cls, boxes, images = [], [], []
    branches = [([], []) for _ in model.model[-1].branches]  # of each one, embeddings of objects, and anchors
    n_images = n_objects = 0
    dataset = SupportDataset(support, imgsz)
    dataset = MaskedDataset.of(dataset, support.ignore) if support.ignore else dataset
    loader = build_dataloader(dataset, batch=batch, workers=0, shuffle=False, device=device)
    for item in TQDM(loader, desc=desc, total=len(loader)):
        item = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in item.items()}
        item["img"] = item["img"].float() / 255
        sums = [0.0] * len(branches)
        for v, view in enumerate(views):
            shown, ignored = without_ignored(show(item, view, stride))
            size = shown["bboxes"].new_tensor(shown["img"].shape[:1:-1])
            if v == 0:
                boxes.append(ops.xywh2xyxy(shown["bboxes"]) * size.repeat(2))
            for b, preds in enumerate(branch_predictions(model, shown["img"])):
                centers, strides = make_anchors(preds["feats"], model.stride, 0.5)
                free = outside(ignored, centers * strides, size, len(shown["img"]))
                assigned, image = assign[b](preds, shown), shown["batch_idx"].long()
                embeds, anchors = _features(preds, assigned, image, free, keep, trained)
                sums[b] = sums[b] + embeds
                anchors = anchors._replace(
                    objects=torch.where(anchors.objects < 0, -1, anchors.objects + n_objects),
                    image=anchors.image + n_images,
                    view=torch.full_like(anchors.image, v),
                )
                branches[b][1].append(Anchors(*(x.cpu() for x in anchors)))
        for (embeds, _), total in zip(branches, sums):
            embeds.append(F.normalize(total, dim=1))
        cls.append(shown["cls"].view(-1).long())
        images.append(shown["batch_idx"].long() + n_images)
        n_objects += len(cls[-1])
        n_images += len(item["img"])
    return Features(
        torch.cat(cls).cpu(),
        torch.cat(boxes).cpu(),
        torch.cat(images).cpu(),
        [x["im_file"] for x in support.labels],
        [torch.cat(embeds).cpu() for embeds, _ in branches],
        [Anchors(*map(torch.cat, zip(*anchors))) for _, anchors in branches],
        len(views),
    )


def _features(
    preds: dict[str, torch.Tensor],
    assigned: tuple,
    image: torch.Tensor,
    free: torch.Tensor,
    keep: int,
    trained: list[int],
) -> tuple[torch.Tensor, Anchors]:
    """Return the embeddings of the objects and the anchors to keep of one batch in one branch.

    Args:
        preds (dict[str, torch.Tensor]): Predictions of the branch, A anchors in each of B images.
        assigned (tuple): Their assignment, from `BoxAssignment`.
        image (torch.Tensor): Image of every object, (N,) int64, ascending.
        free (torch.Tensor): Which anchors are outside all boxes to ignore, (B, A) bool.
        keep (int): Anchors without an object to keep of each image.
        trained (list[int]): Classes that were not enrolled, so that what is kept does not depend on what was.

    Returns:
        embeds (torch.Tensor): Embeddings of the objects, (N, D) float32.
        anchors (Anchors): The anchors, with images and objects counted from 0, and `view` empty.
    """
    fg, gt_idx, weight, n_max, boxes = assigned
    embeds = preds["embeds"].transpose(1, 2).float()
    first = torch.searchsorted(image, image)  # objects of an image are neighbors
    place = torch.arange(len(image), device=image.device) - first
    objects = pool_objects(embeds, fg, gt_idx, weight, n_max)[0][image * n_max + place]
    start = torch.searchsorted(image, torch.arange(len(embeds), device=image.device))
    owner, weights = torch.full(embeds.shape[:2], -1, device=embeds.device), embeds.new_ones(embeds.shape[:2])
    owner[fg], weights[fg] = start[fg[0]] + gt_idx.long(), weight.float()
    # The hardest of the others are those that look like an object of this image, or like one of a trained class.
    alike = embeds.new_zeros(embeds.shape[:2])
    for b in image.unique().tolist():
        alike[b] = (F.normalize(embeds[b], dim=1) @ objects[image == b].t()).amax(1)
    scores = preds["scores"][:, trained].float().amax(1) if len(trained) else alike
    other = (owner < 0) & free
    rank = torch.maximum(*(_rank(x.masked_fill(~other, -torch.inf)) for x in (alike, scores)))
    chosen = ((owner >= 0) | other & (rank >= rank.shape[1] - keep / 2)).nonzero(as_tuple=True)
    level = torch.cat([torch.full((f.shape[2] * f.shape[3],), i) for i, f in enumerate(preds["feats"])])
    return objects, Anchors(
        embeds[chosen],
        level.to(chosen[1].device)[chosen[1]],
        boxes[chosen],
        owner[chosen],
        weights[chosen],
        chosen[0],
        chosen[0][:0],
    )


def _rank(values: torch.Tensor) -> torch.Tensor:
    """Return the rank of every value in its row, 0 for the smallest."""
    return values.argsort(dim=1, stable=True).argsort(dim=1)
