"""Terms of the episode loss: their input, their base class, and the four built-in terms."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from ultralytics.utils.metrics import bbox_iou

from yolo_fewshot.nn.losses import CPELoss, SupConLoss, TripletLoss
from yolo_fewshot.nn.passes import Assignment

CPE_ANCHORS = 512  # maximum number of foreground anchors in the CPE term; background anchors are a quarter of it


class Episode(NamedTuple):
    """Input of a term: an episode of B images, of which Q are query images, with A anchors each.

    Attributes:
        objects (torch.Tensor): Embeddings of the N objects that have an anchor, in the order of the images, of unit
            length, (N, D) float32.
        y (torch.Tensor): Classes of the objects, (N,) int64.
        prototypes (torch.Tensor): Prototypes of the w ways, from the support images, of unit length, (w, D) float32.
        ways (torch.Tensor): Classes of the prototypes, ascending, (w,) int64.
        anchors (tuple[torch.Tensor, torch.Tensor]): Image and index of the M anchors assigned to objects, (M,) int64.
        query (torch.Tensor): Indices of the query images, (Q,) int64.
        preds (dict[str, Any]): Raw predictions of the branch, see `FewShotDetect.forward_head`; `embeds` are
            the embeddings of all anchors, (B, D, A), in float16 under AMP.
        batch (dict[str, Any]): The images and labels, as Ultralytics collates them; `support` is (B,) bool, and `way`
            the class that each image was drawn for, (B,); `turned` (bool), whether the classes are not base classes.
        assignment (Assignment): Objects that the anchors are assigned to, and the predicted boxes.
        keep_mask (torch.Tensor | None): Anchors outside all ignore regions, (B, A) bool; None without ignore regions.
        project (nn.Module): The head's projection for contrastive terms, (..., D) to (..., proj).
        args (SimpleNamespace): Arguments of the run.
    """

    objects: torch.Tensor
    y: torch.Tensor
    prototypes: torch.Tensor
    ways: torch.Tensor
    anchors: tuple[torch.Tensor, torch.Tensor]
    query: torch.Tensor
    preds: dict[str, Any]
    batch: dict[str, Any]
    assignment: Assignment
    keep_mask: torch.Tensor | None
    project: nn.Module
    args: SimpleNamespace


class EpisodeTerm(nn.Module):
    """Base class of the terms of stage 2. To train with a custom term, subclass it and name the subclass in `terms=`.

    Terms are computed in float32 with autocast off, for episodes only; for other batches, as in validation, a term is
    zero. A term with a gain of 0 is not computed. A term has no parameters. Its buffers are not in checkpoints: they
    start anew where a run is resumed, and each GPU has its own.

    Attributes:
        name (str): Column of the term: at most 10 characters that end with `_loss`.
        gain (float | str): Factor of the term, or the configuration key that holds it, such as 'supcon'.

    Examples:
        >>> class SpreadLoss(EpisodeTerm):
        ...     name, gain = "spr_loss", 0.5
        ...
        ...     def forward(self, episode):
        ...         cosine = (episode.prototypes @ episode.prototypes.t()).triu(1)
        ...         return cosine.square().sum() / max(len(cosine), 1)

        yolo train model=best.pt cfg=stage2.yaml data=base.yaml terms=my_losses.SpreadLoss
    """

    name: str = ""
    gain: float | str = 1.0

    def forward(self, episode: Episode) -> torch.Tensor:
        """Return the term without its gain.

        Args:
            episode (Episode): The episode.

        Returns:
            (torch.Tensor): 0-dim; zero, and connected to the graph, where there is nothing to compare.
        """
        raise NotImplementedError(f"{type(self).__name__} has no forward")


class EpisodeBCE(EpisodeTerm):
    """BCE of the query images' logits under the episode's prototypes; objects of other classes are negatives."""

    name, gain = "epi_loss", "cls"

    def forward(self, episode: Episode) -> torch.Tensor:
        """Return the sum over anchors and ways, divided by the sum of the target scores."""
        preds, query, assigned = episode.preds, episode.query, episode.assignment
        sizes = [x.shape[2] * x.shape[3] for x in preds["feats"]]
        scale, bias = (
            torch.cat([v.float().expand(n) for v, n in zip(preds[k], sizes)])[None, :, None]
            for k in ("logit_scale", "logit_bias")
        )
        embeds = preds["embeds"].transpose(1, 2)[query].float()
        logits = embeds @ episode.prototypes.t() * scale + bias
        targets = assigned.scores[query][..., episode.ways].float()
        mask = episode.keep_mask
        if mask is not None:
            mask = (mask | assigned.fg_mask)[query].unsqueeze(-1).float()
        loss = F.binary_cross_entropy_with_logits(logits, targets, mask, reduction="sum")
        return loss / targets.sum().clamp(min=1)


class SupConTerm(EpisodeTerm):
    """SupCon over the objects of support and query images, with the prototypes as additional views."""

    name, gain = "sup_loss", "supcon"

    def __init__(self, args: SimpleNamespace):
        """Initialize the term.

        Args:
            args (SimpleNamespace): Arguments of the run.
        """
        super().__init__()
        self.loss = SupConLoss(args.supcon_tau)

    def forward(self, episode: Episode) -> torch.Tensor:
        """Return the mean over the rows that have a positive."""
        rows = episode.project(torch.cat([episode.objects, episode.prototypes]))
        return self.loss(rows, torch.cat([episode.y, episode.ways]))


class CPETerm(EpisodeTerm):
    """CPE over a class-balanced sample of the foreground anchors, with background anchors as additional negatives."""

    name, gain = "cpe_loss", "cpe"

    def __init__(self, args: SimpleNamespace):
        """Initialize the term.

        Args:
            args (SimpleNamespace): Arguments of the run.
        """
        super().__init__()
        self.loss = CPELoss(args.cpe_tau, args.cpe_iou, args.cpe_weight)

    def forward(self, episode: Episode) -> torch.Tensor:
        """Return the weighted sum over the anchors that pass the IoU gate, divided by the number of anchors."""
        fg, assigned = episode.anchors, episode.assignment
        embeds, y = episode.preds["embeds"].transpose(1, 2), assigned.labels[fg].long()
        with torch.no_grad():
            iou = bbox_iou(assigned.decoded[fg].float(), assigned.boxes[fg].float(), xywh=False).view(-1).clamp(0, 1)
            chosen = balanced_sample(y, CPE_ANCHORS)
            b, a = embeds.shape[:2]
            is_bg = embeds.new_ones(b * a, dtype=torch.bool)
            is_bg[fg[0] * a + fg[1]] = False
            if episode.keep_mask is not None:
                is_bg &= episode.keep_mask.view(-1)
            bg = torch.randint(b * a, (CPE_ANCHORS // 4,), device=embeds.device)
            # Drawn anchors that are not background are masked, not removed, since removing them waits for the device.
            mask = torch.cat([torch.ones_like(chosen, dtype=torch.bool), is_bg[bg]])
        rows = embeds[torch.cat([fg[0][chosen], bg // a]), torch.cat([fg[1][chosen], bg % a])]
        labels = torch.cat([y[chosen], y.new_full((len(bg),), -1)])
        ious = torch.cat([iou[chosen], iou.new_zeros(len(bg))])
        return self.loss(episode.project(rows.float()), labels, ious, mask)


class TripletTerm(EpisodeTerm):
    """Triplet loss of the objects with the frozen prototypes; batch-hard among the objects where they have none."""

    name, gain = "tri_loss", "triplet"

    def __init__(self, args: SimpleNamespace):
        """Initialize the term.

        Args:
            args (SimpleNamespace): Arguments of the run.
        """
        super().__init__()
        self.loss = TripletLoss(args.triplet_margin, soft=args.triplet_soft)
        self._has_frozen: bool | None = None

    def forward(self, episode: Episode) -> torch.Tensor:
        """Return the mean over the objects that have a positive and a negative."""
        frozen = episode.preds["frozen"]
        if self._has_frozen is None:  # reading it waits for the device, and it does not change during a run
            self._has_frozen = bool(frozen.any())
        anchored = self._has_frozen and not episode.batch.get("turned")
        return self.loss(episode.objects, episode.y, frozen.float() if anchored else None)


BUILT_IN: tuple[type[EpisodeTerm], ...] = (EpisodeBCE, SupConTerm, CPETerm, TripletTerm)
EPISODE_TERMS = tuple(term.name for term in BUILT_IN)


def balanced_sample(labels: torch.Tensor, n: int) -> torch.Tensor:
    """Draw at most `n` entries with class shares as equal as possible.

    Args:
        labels (torch.Tensor): Class of each entry, (M,).
        n (int): Maximum number of entries.

    Returns:
        (torch.Tensor): Indices, (min(M, n),) int64.
    """
    if len(labels) <= n:
        return torch.arange(len(labels), device=labels.device)
    order = torch.randperm(len(labels), device=labels.device)
    order = order[labels[order].argsort(stable=True)]  # by class, random within it
    y = labels[order]
    first = torch.searchsorted(y, y)  # first position of the class
    rank = torch.arange(len(y), device=y.device) - first
    return order[rank.argsort(stable=True)[:n]]
