"""The images of stage 3: shots, beside them base images, all with the class indices of the model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import Dataset
from ultralytics.data.dataset import YOLODataset

from yolo_fewshot.class_names import check_unambiguous, match_classes
from yolo_fewshot.data.sampling import EpochSampler
from yolo_fewshot.errors import few


def merged_names(known: dict[int, str], names: dict[int, str], labels: list[dict[str, Any]]) -> dict[int, str]:
    """Return the class names of a model with those appended that are new to it and have an object.

    Args:
        known (dict[int, str]): Class names of the model.
        names (dict[int, str]): Class names of the shots, by label index.
        labels (list[dict]): Labels of the shots, as in `YOLODataset.labels`.

    Returns:
        (dict[int, str]): Names by index, in the order in which enrollment appends them.
    """
    merged = {int(i): str(n) for i, n in known.items()}
    shown = sorted({int(c) for x in labels for c in x["cls"].flat})
    for name in dict.fromkeys(str(names[i]) for i in shown):
        if name not in merged.values():
            merged[len(merged)] = name
    return merged


def relabel(dataset: YOLODataset, names: dict[int, str], classes: dict[int, str]) -> None:
    """Give the labels of a data set the class indices of a model, by name.

    Args:
        dataset (YOLODataset): Data set, changed in place.
        names (dict[int, str]): Class names of its labels.
        classes (dict[int, str]): Class names of the model.

    Raises:
        ValueError: If an image shows a class that is not among them, or whose name is ambiguous.
    """
    index = match_classes(names, classes)
    shown = {int(c) for x in dataset.labels for c in x["cls"].flat}
    check_unambiguous(names, index, sorted(shown), getattr(dataset, "img_path", ""))
    table = np.array([index[i] for i in range(len(names))], dtype=np.float32)
    for x in dataset.labels:
        cls = x["cls"].astype(int)
        unknown = {str(names[i]) for i in cls[table[cls] < 0].tolist()}
        if unknown:
            raise ValueError(
                f"{x['im_file']} shows {few(sorted(unknown))}, of which the model knows nothing and has no shots. Add "
                "shots, or leave these boxes out."
            )
        x["cls"] = table[cls]


class ShotsAndBase(Dataset):
    """The images of the shots, then those of base classes.

    Attributes:
        parts (list[YOLODataset]): The shots, and the base images if there are any.
        labels (list[dict]): Labels of all.
    """

    def __init__(self, parts: list[YOLODataset]):
        """Initialize the data set.

        Args:
            parts (list[YOLODataset]): The shots, and the base images if there are any.
        """
        self.parts = parts
        self.labels = [x for d in parts for x in d.labels]
        self.collate_fn = parts[0].collate_fn

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    def __getitem__(self, i: int) -> dict[str, Any]:
        """Return an augmented image with its labels."""
        for d in self.parts:
            if i < len(d):
                return d[i]
            i -= len(d)
        raise IndexError(i)

    def close_mosaic(self, hyp: Any) -> None:
        """Stop mixing images, as Ultralytics does for the last epochs.

        Args:
            hyp (Any): Arguments of the run.
        """
        for d in self.parts:
            d.close_mosaic(hyp)


class AdaptSampler(EpochSampler):
    """Draws batches of shots, or half shots and half base images; every image comes before any comes again.

    Epoch e depends on (seed, e) alone. Processes that train together share one order and take turns, so that their
    number changes neither the steps nor how often an image is seen.
    """

    def __init__(
        self, shots: int, base: int, batch: int, batches: int, seed: int = 0, rank: int = 0, processes: int = 1
    ):
        """Initialize the sampler.

        Args:
            shots (int): Images of the shots.
            base (int): Base images, which are numbered after those.
            batch (int): Images in a batch of this process.
            batches (int): Batches in an epoch.
            seed (int): Seed of the run.
            rank (int): Rank of this process in multi-GPU training.
            processes (int): Number of such processes.
        """
        super().__init__(seed, rank)
        self.sizes, self.batch, self.batches, self.processes = (shots, base), batch, batches, processes

    def __len__(self) -> int:
        """Return the images of an epoch."""
        return self.batch * self.batches

    def draw(self, epoch: int) -> Iterator[int]:
        """Yield the images of one epoch.

        Args:
            epoch (int): Epoch, counted from 0.

        Yields:
            (int): Index of an image.
        """
        rng = np.random.default_rng((self.seed, epoch, 0))
        shots, base = self.sizes
        replayed = self.batch // 2 if base else 0
        steps, own = self.batches, slice(self.rank, None, self.processes)
        a = _cycle(rng, shots, (self.batch - replayed) * self.processes * steps).reshape(steps, -1)[:, own]
        b = _cycle(rng, base, replayed * self.processes * steps).reshape(steps, -1)[:, own] + shots
        yield from np.concatenate([a, b], 1).ravel().tolist()


def _cycle(rng: np.random.Generator, n: int, count: int) -> np.ndarray:
    """Return `count` indices of n things, in random rounds of all of them."""
    rounds = [rng.permutation(n) for _ in range(-(-count // n))] if count else []
    return np.concatenate(rounds)[:count] if count else np.zeros(0, int)
