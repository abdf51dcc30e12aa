"""Object embeddings and class prototypes."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def pool_objects(
    embeds: torch.Tensor, fg: tuple[torch.Tensor, torch.Tensor], gt_idx: torch.Tensor, weight: torch.Tensor, n_max: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pool the embeddings of the anchors assigned to each object.

    Args:
        embeds (torch.Tensor): Anchor embeddings, (B, A, D).
        fg (tuple[torch.Tensor, torch.Tensor]): Image and anchor index of the M foreground anchors, (M,) each.
        gt_idx (torch.Tensor): Index within its image of the object that each anchor is assigned to, (M,).
        weight (torch.Tensor): Weight of each anchor, (M,).
        n_max (int): Objects per image, padding included.

    Returns:
        pooled (torch.Tensor): Weighted means of unit length, (B * n_max, D) float32; rows of zeros for objects
            without an anchor.
        valid (torch.Tensor): Objects that have an anchor, (B * n_max,) bool.
    """
    index = fg[0] * n_max + gt_idx.long()  # gt_idx is a float if there are no objects
    return pool_rows(embeds[fg].float(), index, weight, len(embeds) * n_max)


def pool_rows(
    rows: torch.Tensor, index: torch.Tensor, weight: torch.Tensor, n: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pool embeddings by their object.

    Args:
        rows (torch.Tensor): Embeddings, (M, D) float32.
        index (torch.Tensor): Object of each embedding, (M,) int64 in 0..n-1.
        weight (torch.Tensor): Weight of each embedding, (M,).
        n (int): Number of objects.

    Returns:
        pooled (torch.Tensor): Weighted means of unit length, (n, D) float32; rows of zeros for objects without one.
        valid (torch.Tensor): Objects that have an embedding, (n,) bool.
    """
    rows = rows * weight.float().clamp(min=1e-3)[:, None]  # weights of untrained models are close to zero
    pooled = rows.new_zeros(n, rows.shape[1]).index_add(0, index, rows)
    valid = torch.zeros(n, dtype=torch.bool, device=rows.device).index_fill(0, index, True)
    return F.normalize(pooled, dim=1), valid


def object_index(batch_idx: torch.Tensor, n_max: int) -> torch.Tensor:
    """Return the index of every labeled object among those that `pool_objects` returns.

    Args:
        batch_idx (torch.Tensor): Image of every object, ascending, (N,) or (N, 1).
        n_max (int): Objects per image, padding included.

    Returns:
        (torch.Tensor): n_max times its image plus its number within the image, (N,) int64.
    """
    image = batch_idx.view(-1).long()
    return image * n_max + torch.arange(len(image), device=image.device) - torch.searchsorted(image, image)


def class_means(objects: torch.Tensor, labels: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute prototypes: the mean object embedding of each class, of unit length (Snell et al. 2017, eq. 1).

    Args:
        objects (torch.Tensor): Object embeddings of unit length, (N, D).
        labels (torch.Tensor): Class of each object, (N,) in 0..n-1; negative to leave it out.
        n (int): Number of classes.

    Returns:
        prototypes (torch.Tensor): (n, D) float32; rows of zeros for classes without an object.
        counts (torch.Tensor): Objects of each class, (n,) float32.
    """
    one_hot = F.one_hot(labels.long().clamp(min=-1) + 1, n + 1)[:, 1:].to(objects)
    return F.normalize(one_hot.t() @ objects, dim=1), one_hot.sum(0)
