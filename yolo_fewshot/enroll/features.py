"""Features of a support set: embeddings of its objects and anchors, from one forward pass per view."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from ultralytics.data.build import build_dataloader
from ultralytics.utils import TQDM, ops
from ultralytics.utils.checks import check_imgsz
from ultralytics.utils.tal import make_anchors

from yolo_fewshot.data.ignore import MaskedDataset
from yolo_fewshot.data.support import Support, SupportDataset
from yolo_fewshot.nn.ignore import outside_regions, without_ignored
from yolo_fewshot.nn.prototypes import object_index, pool_rows
from yolo_fewshot.nn.rows import ClassRows


class View(NamedTuple):
    """Test-time augmentation of a support image.

    Attributes:
        scale (float): Scale factor.
        flip (bool): Whether to flip left to right.
        gain (float): Brightness factor.
    """

    scale: float = 1.0
    flip: bool = False
    gain: float = 1.0


class Anchors(NamedTuple):
    """Anchors of a support set in one branch: those of objects, and the hardest of the background.

    Attributes:
        embeds (torch.Tensor): Embeddings, (M, D) float32.
        level (torch.Tensor): Index of the level, (M,) int64.
        boxes (torch.Tensor): Decoded boxes, x1, y1, x2, y2 in pixels of the view, (M, 4) float32.
        objects (torch.Tensor): Index of the object that the anchor belongs to, -1 for background, (M,) int64.
        weight (torch.Tensor): IoU-based weight of an anchor of an object, or weight of a negative, (M,) float32.
        image (torch.Tensor): Index of the image, -1 for anchors of the replay buffer, (M,) int64.
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
        boxes (torch.Tensor): Box of every object in the first view, x1, y1, x2, y2 in pixels, (N, 4) float32.
        image (torch.Tensor): Index of the image of every object, (N,) int64.
        files (list[str]): Image files.
        embeds (list[torch.Tensor]): Mean embedding of every object over the views, per branch, (N, D) float32 of unit
            length, or (N, nl * D) with a part for each level where levels have embeddings of their own; rows of zeros
            for objects without an anchor.
        anchors (list[Anchors]): Anchors, per branch.
        views (int): Number of views.
        n_background (int): Number of images without an object of any class that were added at the end of `files`.
    """

    cls: torch.Tensor
    boxes: torch.Tensor
    image: torch.Tensor
    files: list[str]
    embeds: list[torch.Tensor]
    anchors: list[Anchors]
    views: int
    n_background: int = 0


def select(anchors: Anchors, mask: torch.Tensor) -> Anchors:
    """Select anchors.

    Args:
        anchors (Anchors): M anchors.
        mask (torch.Tensor): Anchors to select, (M,) bool.

    Returns:
        (Anchors): The selected anchors.
    """
    return Anchors(*(x[mask] for x in anchors))


def support_views(args: dict[str, Any], crops: bool, per_level: bool = False) -> list[View]:
    """Return the views of a support set: changes of scale and brightness, flipped only if training flipped, too.

    Args:
        args (dict[str, Any]): Training arguments of the model; a missing argument counts as off.
        crops (bool): Whether the images are cropped objects, which are scaled down.
        per_level (bool): Whether every level has a row of its own, so that objects must be shown to several levels.

    Returns:
        (list[View]): The views, the one without flip and change of brightness first.
    """
    flip, light = bool(args.get("fliplr")), 0.2 if args.get("hsv_v") else 0.0
    if crops:
        return [View(0.35), View(0.5, flip, 1 + light), View(0.25, False, 1 - light)]
    views = [View(), View(1.0, flip, 1 + light), View(0.8, False, 1 - light), View(1.25)]
    views += [View(0.5), View(2.0)] if per_level else []  # levels are an octave apart
    return list(dict.fromkeys(views))


def make_view(batch: dict[str, Any], view: View, stride: int) -> dict[str, Any]:
    """Return a view of a batch.

    Args:
        batch (dict[str, Any]): With `img` (B, C, H, W) float in 0..1 and `bboxes` (N, 4), x, y, w, h in 0..1.
        view (View): The view. A smaller image is centered on a gray canvas of the old size; a larger one is at the top
            left of a gray canvas whose size is a multiple of the stride.
        stride (int): Maximum stride of the model in pixels.

    Returns:
        (dict[str, Any]): A batch with new `img` and `bboxes`.
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


def add_background(features: Features, background: Features) -> Features:
    """Add images without an object of any class to the features of a support set.

    Args:
        features (Features): Features of a support set.
        background (Features): Features of the other images.

    Returns:
        (Features): The features, with the images of the background last.
    """
    joined = []
    for own, other in zip(features.anchors, background.anchors):
        other = other._replace(image=other.image + len(features.files))
        joined.append(Anchors(*map(torch.cat, zip(own, other))))
    files = features.files + background.files
    return features._replace(files=files, anchors=joined, n_background=len(background.files))


def standardize(rows: ClassRows, support: Support, imgsz: int, batch: int, views: list[View]) -> None:
    """Learn the statistics of the features from the first view of the images of a support set.

    Args:
        rows (ClassRows): Class rows of a model in eval mode.
        support (Support): The support set.
        imgsz (int): Image size in pixels.
        batch (int): Images per forward pass.
        views (list[View]): Views of the images.
    """
    stride = int(rows.model.stride.max())
    items = _loader(rows, support, check_imgsz(imgsz, stride=stride), batch)  # loads nothing unless it is asked to
    rows.standardize(make_view(item, views[0], stride)["img"] for item in items)


@torch.no_grad()
def extract(
    rows: ClassRows,
    support: Support,
    imgsz: int,
    batch: int = 16,
    views: list[View] | None = None,
    max_values: int | None = None,
    desc: str = "Enrolling",
    like: list[torch.Tensor] | None = None,
) -> Features:
    """Extract the features of a support set, with one forward pass per view of an image.

    Anchors are assigned to objects as in training, but by IoU alone, since a class that is not enrolled has no score.

    Args:
        rows (ClassRows): Class rows of a model in eval mode.
        support (Support): The support set.
        imgsz (int): Image size in pixels.
        batch (int): Images per forward pass.
        views (list[View], optional): Views of the images, those of `support_views` if not given.
        max_values (int, optional): Approximate number of values in the embeddings of the anchors to keep, which bounds
            the memory; that of `rows` if not given.
        desc (str): Text of the progress bar.
        like (list[torch.Tensor], optional): Embeddings as `Features.embeds`; where not all background anchors are kept
            of an image without an object, the most similar ones to these are.

    Returns:
        (Features): The features, on the CPU.
    """
    model: Any = rows.model
    stride = int(model.stride.max())
    views = views or support_views(getattr(model, "args", None) or {}, support.crops)
    imgsz = check_imgsz(imgsz, stride=stride)
    trained = [i for i, n in model.names.items() if str(n) not in rows.enrolled]
    assign = rows.assignments
    max_values = rows.max_values if max_values is None else max_values
    cls, boxes, images = [], [], []
    embeds_of: list[list[torch.Tensor]] = [[] for _ in rows.branches]
    anchors_of: list[list[Anchors]] = [[] for _ in rows.branches]
    n_images = n_objects = 0
    for item in TQDM(_loader(rows, support, imgsz, batch), desc=desc, total=-(-len(support.labels) // batch)):
        sums: list[torch.Tensor] = []  # of the embeddings of the views, per branch
        for v, view in enumerate(views):
            viewed, ignored = without_ignored(make_view(item, view, stride))
            size = viewed["bboxes"].new_tensor(viewed["img"].shape[:1:-1])  # width, height
            if v == 0:
                boxes.append(ops.xywh2xyxy(viewed["bboxes"]) * size.repeat(2))
            for b, preds in enumerate(rows.predict(viewed["img"])):
                keep = max(max_values // (preds["embeds"].shape[1] * len(support.labels) * len(views)), 32)
                keep = min(keep, rows.anchors_per_view)  # background anchors of an image in a view
                centers, strides = make_anchors(preds["feats"], model.stride, 0.5)
                valid = outside_regions(ignored, centers * strides, size, len(viewed["img"]))
                assigned, image = assign[b](preds, viewed), viewed["batch_idx"].long()
                near = like[b].to(preds["embeds"].device) if like else None
                embeds, anchors = _features(preds, assigned, image, valid, keep, trained, rows.per_level, near)
                if v == 0:
                    sums.append(embeds)
                else:
                    sums[b] += embeds
                anchors = anchors._replace(
                    objects=torch.where(anchors.objects < 0, -1, anchors.objects + n_objects),
                    image=anchors.image + n_images,
                    view=torch.full_like(anchors.image, v),
                )
                anchors_of[b].append(Anchors(*(x.cpu() for x in anchors)))
        for all_embeds, total in zip(embeds_of, sums):
            all_embeds.append(F.normalize(total, dim=1))
        cls.append(viewed["cls"].view(-1).long())
        images.append(viewed["batch_idx"].long() + n_images)
        n_objects += len(cls[-1])
        n_images += len(item["img"])
    return Features(
        torch.cat(cls).cpu(),
        torch.cat(boxes).cpu(),
        torch.cat(images).cpu(),
        [x["im_file"] for x in support.labels],
        [torch.cat(x).cpu() for x in embeds_of],
        [Anchors(*map(torch.cat, zip(*x))) for x in anchors_of],
        len(views),
    )


def _loader(rows: ClassRows, support: Support, imgsz: int, batch: int) -> Iterator[dict[str, Any]]:
    """Yield the batches of a support set on the device of the model, with images in 0..1."""
    device = next(rows.model.parameters()).device
    dataset = SupportDataset(support, imgsz)
    dataset = MaskedDataset.of(dataset, support.ignore) if support.ignore else dataset
    for item in build_dataloader(dataset, batch=batch, workers=0, shuffle=False, device=device):
        item = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in item.items()}
        yield {**item, "img": item["img"].float() / 255}


def _features(
    preds: dict[str, torch.Tensor],
    assigned: tuple,
    image: torch.Tensor,
    valid: torch.Tensor,
    keep: int,
    trained: list[int],
    per_level: bool,
    like: torch.Tensor | None,
) -> tuple[torch.Tensor, Anchors]:
    """Return the embeddings of the objects and the anchors to keep of one batch in one branch.

    Args:
        preds (dict[str, torch.Tensor]): Predictions of the branch for A anchors in each of B images.
        assigned (tuple): Their assignment, from `BoxAssignment`.
        image (torch.Tensor): Image of every object, (N,) int64, ascending.
        valid (torch.Tensor): Whether the anchor is outside all ignore regions, (B, A) bool.
        keep (int): Background anchors to keep per image.
        trained (list[int]): Classes that are not enrolled, so that the selection does not depend on enrolled ones.
        per_level (bool): Whether embeddings of different levels do not compare, see `Features.embeds`.
        like (torch.Tensor, optional): Embeddings of objects of other images, as `Features.embeds`.

    Returns:
        embeds (torch.Tensor): Embeddings of the objects, as `Features.embeds`.
        anchors (Anchors): The anchors, with images and objects counted from 0, and `view` empty.
    """
    fg, gt_idx, weight, n_max, boxes = assigned
    embeds = preds["embeds"].transpose(1, 2).float()  # (B, A, D)
    sizes = [f.shape[2] * f.shape[3] for f in preds["feats"]]
    level = torch.cat([torch.full((n,), i, device=embeds.device) for i, n in enumerate(sizes)])
    part, parts = (level, len(preds["feats"])) if per_level else (torch.zeros_like(level), 1)
    index = object_index(image, n_max)
    owner_index = fg[0] * n_max + gt_idx.long()
    assigned_rows = embeds.new_zeros(len(fg[0]), parts, embeds.shape[2])
    assigned_rows[torch.arange(len(fg[0])), part[fg[1]]] = embeds[fg]
    objects = pool_rows(assigned_rows.flatten(1), owner_index, weight, len(embeds) * n_max)[0][index]
    number = torch.full((len(embeds) * n_max,), -1, device=embeds.device)  # of the object at an index
    number[index] = torch.arange(len(index), device=embeds.device)
    owner, weights = torch.full(embeds.shape[:2], -1, device=embeds.device), embeds.new_ones(embeds.shape[:2])  # (B, A)
    owner[fg], weights[fg] = number[owner_index], weight.float()
    # The hardest background anchors are those most similar to an object of the image (without one, to those of other
    # images) or with the largest score of a trained class: keep / 2 of either ranking, so at most keep of both.
    scores = preds["scores"][:, trained].float().amax(1) if len(trained) else None
    similarity = embeds.new_zeros(embeds.shape[:2]) if like is not None or scores is None else scores.clone()
    shown = set(image.tolist())
    for b in range(len(embeds)):
        near = objects[image == b] if b in shown else like
        for i, of_part in enumerate(() if near is None else near.chunk(parts, dim=1)):
            here = part == i
            similarity[b, here] = (F.normalize(embeds[b, here], dim=1) @ of_part.t()).amax(1)
    scores = similarity if scores is None else scores
    background = (owner < 0) & valid
    rank = torch.maximum(*(_rank(x.masked_fill(~background, -torch.inf)) for x in (similarity, scores)))
    chosen = ((owner >= 0) | background & (rank >= rank.shape[1] - keep / 2)).nonzero(as_tuple=True)
    return objects, Anchors(
        embeds[chosen],
        level[chosen[1]],
        boxes[chosen],
        owner[chosen],
        weights[chosen],
        chosen[0],
        chosen[0][:0],
    )


def _rank(values: torch.Tensor) -> torch.Tensor:
    """Return the rank of every value in its row, 0 for the smallest."""
    return values.argsort(dim=1, stable=True).argsort(dim=1)
