"""The image of the embedding: objects with their prototypes, and which classes are alike."""

from __future__ import annotations

import io
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from ultralytics.utils import plt_settings
from ultralytics.utils.plotting import colors

from yolo_fewshot.files import AtomicPath

NAMED = 60  # classes whose names are written, at most


@plt_settings()
def plot_embedding(
    embeds: torch.Tensor,
    cls: torch.Tensor,
    prototypes: torch.Tensor,
    names: dict[int, str],
    novel: set[str],
    file: Path,
) -> None:
    """Draw a 2-D map of object embeddings with the prototypes as stars, and the cosines of the prototypes.

    The map is that of the two principal components, or of UMAP where umap-learn is installed, after subtracting the
    mean prototype, which all objects share. Classes with great cosines are those that will be confused.

    Args:
        embeds (torch.Tensor): Embeddings of objects, (N, D) float32.
        cls (torch.Tensor): Their classes, (N,) int64.
        prototypes (torch.Tensor): Prototypes of the classes, (nc, D) float32.
        names (dict[int, str]): Class names.
        novel (set[str]): Names of the novel classes.
        file (Path): Image to write.
    """
    import matplotlib.pyplot as plt  # as Ultralytics does, where it is needed

    units = F.normalize(prototypes, dim=1)
    center = units.mean(0)
    rows = F.normalize(torch.cat([F.normalize(embeds, dim=1), units]) - center, dim=1)
    places = flat(rows)
    dots, stars = places[: len(embeds)], places[len(embeds) :]
    side = min(max(6.0, 0.2 * len(names)), 20.0)
    fig, (left, right) = plt.subplots(1, 2, figsize=(2.2 * side, side), layout="constrained")
    for c, name in names.items():
        color, mine = [x / 255 for x in colors(c)], (cls == c).numpy()
        marker = "^" if name in novel else "o"
        left.scatter(*dots[mine].T, s=14, color=color, alpha=0.5, marker=marker, linewidths=0)
        edge = "red" if name in novel else "black"
        left.scatter(*stars[c], s=140, color=color, marker="*", edgecolors=edge, linewidths=0.8, zorder=3)
        if len(names) <= NAMED:
            left.annotate(name, stars[c], fontsize=7, xytext=(4, 4), textcoords="offset points", zorder=4)
    what = "; novel: triangles, stars with a red edge" if novel else ""
    left.set(xticks=[], yticks=[])
    left.set_title(f"objects (dots) and prototypes (stars){what}", fontsize=9)

    order = by_similarity(units @ units.T)
    shown = right.imshow((units @ units.T)[order][:, order].numpy(), vmin=-1, vmax=1, cmap="coolwarm")
    right.set_title("cosine of the prototypes", fontsize=9)
    if len(names) <= NAMED:
        ticks = range(len(order))
        labels = [names[c] for c in order]
        right.set_xticks(ticks, labels, rotation=90, fontsize=7)
        right.set_yticks(ticks, labels, fontsize=7)
        for axis in (right.get_xticklabels(), right.get_yticklabels()):
            for tick in axis:
                tick.set_color("red" if tick.get_text() in novel else "black")
    fig.colorbar(shown, ax=right, shrink=0.7)
    image = io.BytesIO()
    fig.savefig(image, dpi=120, format="png")
    plt.close(fig)
    AtomicPath(file).write_bytes(image.getvalue())


def flat(rows: torch.Tensor) -> np.ndarray:
    """Return a 2-D map of some rows, deterministic.

    Args:
        rows (torch.Tensor): (N, D) float32.

    Returns:
        (np.ndarray): (N, 2) float32.
    """
    if find_spec("umap"):
        import umap

        return umap.UMAP(n_neighbors=min(15, len(rows) - 1), metric="cosine", random_state=0).fit_transform(
            rows.numpy()
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _, _, axes = torch.pca_lowrank(rows, q=min(6, *rows.shape))
    places = (rows - rows.mean(0)) @ axes[:, :2]
    return F.pad(places, (0, 2 - places.shape[1])).numpy()


def by_similarity(cosine: torch.Tensor) -> list[int]:
    """Return an order in which neighbors are alike: from the least typical on, always the nearest that is left.

    Args:
        cosine (torch.Tensor): Cosine of every two classes, (n, n).

    Returns:
        (list[int]): The classes.
    """
    left = cosine.clone().fill_diagonal_(-torch.inf)
    order = [int(cosine.sum(1).argmin())]
    for _ in range(len(cosine) - 1):
        left[:, order[-1]] = -torch.inf
        order.append(int(left[order[-1]].argmax()))
    return order
