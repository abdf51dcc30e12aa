"""Plot of the embedding: objects and prototypes, and the similarity of the classes."""

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

NAMED = 100  # maximum number of classes with names in the plot


@plt_settings()
def plot_embedding(
    embeds: torch.Tensor,
    cls: torch.Tensor,
    prototypes: torch.Tensor,
    names: dict[int, str],
    novel: set[str],
    file: Path,
) -> None:
    """Plot a 2-D map of object embeddings with the prototypes as stars, and the cosine similarity of the prototypes.

    The map shows the two principal components, or UMAP where umap-learn is installed, after the mean prototype, a
    component that all objects share, is subtracted. Classes with a large cosine similarity are likely to be confused.

    Args:
        embeds (torch.Tensor): Embeddings of objects, (N, D) float32.
        cls (torch.Tensor): Classes of the objects, (N,) int64.
        prototypes (torch.Tensor): Prototypes of the classes, (nc, D) float32.
        names (dict[int, str]): Class names.
        novel (set[str]): Names of the novel classes.
        file (Path): Image to write.
    """
    import matplotlib.pyplot as plt  # as Ultralytics does, where it is needed

    units = F.normalize(prototypes, dim=1)
    center = units.mean(0)
    points = project(F.normalize(torch.cat([F.normalize(embeds, dim=1), units]) - center, dim=1))
    dots, stars = points[: len(embeds)], points[len(embeds) :]
    side = min(max(6.0, 0.2 * len(names)), 20.0)
    fig, (left, right) = plt.subplots(1, 2, figsize=(2.2 * side, side), layout="constrained")
    for c, name in names.items():
        color, members = [x / 255 for x in colors(c)], (cls == c).numpy()
        marker = "^" if name in novel else "o"
        left.scatter(*dots[members].T, s=14, color=color, alpha=0.5, marker=marker, linewidths=0)
        edge = "red" if name in novel else "black"
        left.scatter(*stars[c], s=140, color=color, marker="*", edgecolors=edge, linewidths=0.8, zorder=3)
        if len(names) <= NAMED:
            left.annotate(name, stars[c], fontsize=7, xytext=(4, 4), textcoords="offset points", zorder=4)
    legend = "; novel: triangles, stars with a red edge" if novel else ""
    left.set(xticks=[], yticks=[])
    left.set_title(f"objects (dots) and prototypes (stars){legend}", fontsize=9)

    order = by_similarity(units @ units.T)
    heatmap = right.imshow((units @ units.T)[order][:, order].numpy(), vmin=-1, vmax=1, cmap="coolwarm")
    right.set_title("cosine similarity of the prototypes", fontsize=9)
    if len(names) <= NAMED:
        ticks = range(len(order))
        labels = [names[c] for c in order]
        right.set_xticks(ticks, labels, rotation=90, fontsize=7)
        right.set_yticks(ticks, labels, fontsize=7)
        for axis in (right.get_xticklabels(), right.get_yticklabels()):
            for tick in axis:
                tick.set_color("red" if tick.get_text() in novel else "black")
    else:
        right.set(xticks=[], yticks=[])  # places in the order, which are no class numbers
    fig.colorbar(heatmap, ax=right, shrink=0.7)
    png = io.BytesIO()
    fig.savefig(png, dpi=120, format="png")
    plt.close(fig)
    AtomicPath(file).write_bytes(png.getvalue())


def project(vectors: torch.Tensor) -> np.ndarray:
    """Project vectors to 2-D, deterministically.

    Args:
        vectors (torch.Tensor): Vectors, (N, D) float32.

    Returns:
        (np.ndarray): Coordinates, (N, 2) float32.
    """
    if find_spec("umap"):
        import umap

        return umap.UMAP(n_neighbors=min(15, len(vectors) - 1), metric="cosine", random_state=0).fit_transform(
            vectors.numpy()
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _, _, axes = torch.pca_lowrank(vectors, q=min(6, *vectors.shape))
    points = (vectors - vectors.mean(0)) @ axes[:, :2]
    return F.pad(points, (0, 2 - points.shape[1])).numpy()


def by_similarity(cosine: torch.Tensor) -> list[int]:
    """Order classes greedily so that neighbors are similar, starting from the least typical class.

    Args:
        cosine (torch.Tensor): Cosine similarity of every pair of classes, (n, n).

    Returns:
        (list[int]): Class indices.
    """
    left = cosine.clone().fill_diagonal_(-torch.inf)
    order = [int(cosine.sum(1).argmin())]
    for _ in range(len(cosine) - 1):
        left[:, order[-1]] = -torch.inf
        order.append(int(left[order[-1]].argmax()))
    return order
