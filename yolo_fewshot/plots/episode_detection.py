"""Detection with the prototypes of an episode, as stage 2 trains it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from ultralytics.utils.nms import non_max_suppression
from ultralytics.utils.ops import xyxy2xywh

from yolo_fewshot.nn.assign import BoxAssignment
from yolo_fewshot.nn.predictions import branch_predictions
from yolo_fewshot.nn.prototypes import class_means, object_index, pool_objects


@torch.no_grad()
def detect_queries(model: nn.Module, batch: dict[str, Any], conf: float = 0.25, iou: float = 0.7) -> list[torch.Tensor]:
    """Detect objects in the query images of an episode, with the prototypes of its support objects as classifiers.

    Args:
        model (nn.Module): Few-shot model in eval mode, with the run's arguments attached as `args`.
        batch (dict): Preprocessed episode, with `support` (B,) bool.
        conf (float): Minimum confidence.
        iou (float): IoU above which NMS removes the weaker of two boxes of a class.

    Returns:
        (list[torch.Tensor]): Detections of each query image, (n, 6): corners in pixels, confidence, class.
    """
    layers: Any = model.model
    head = layers[-1]
    preds, prototypes = branch_predictions(model, batch["img"])[0], head.branch_prototypes[0]
    fg, gt_idx, weight, n_max, boxes = BoxAssignment(model)(preds, batch)
    embeds, support = preds["embeds"].transpose(1, 2).float(), batch["support"]
    objects, valid = pool_objects(embeds, fg, gt_idx, weight, n_max)
    cls = batch["cls"].long().view(-1)
    y = cls.new_full((len(objects),), -1)
    y[object_index(batch["batch_idx"], n_max)] = cls
    y = torch.where(valid & support.repeat_interleave(n_max), y, -1)
    means, counts = class_means(objects, y, head.nc)
    ways = counts.nonzero()[:, 0]
    sizes = [x.shape[2] * x.shape[3] for x in preds["feats"]]
    levels = (prototypes.logit_scale, prototypes.bias)
    scale, bias = (torch.cat([v.expand(n) for v, n in zip(x.float(), sizes)]) for x in levels)
    scores = (embeds[~support] @ means[ways].t() * scale[:, None] + bias[:, None]).sigmoid()
    detections = non_max_suppression(torch.cat([xyxy2xywh(boxes[~support]), scores], 2).transpose(1, 2), conf, iou)
    return [torch.cat([x[:, :5], ways[x[:, 5:6].long()].float()], 1) for x in detections]
