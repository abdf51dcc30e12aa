"""Data of stage 3: shots and base images with the class indices of the model."""

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
    """Append the new classes of the shots that have an object to the classes of a model.

    Args:
        known (dict[int, str]): Class names of the model.
        names (dict[int, str]): Class names of the shots, by label index.
        labels (list[dict]): Labels of the shots, as in `YOLODataset.labels`.

    Returns:
        (dict[int, str]): Names by index, in the order in which enrollment appends them.
    """
    merged = {int(i): str(n) for i, n in known.items()}
    indices = sorted({int(c) for x in labels for c in x["cls"].flat})
    for name in dict.fromkeys(str(names[i]) for i in indices):
        if name not in merged.values():
            merged[len(merged)] = name
    return merged


def relabel(dataset: YOLODataset, names: dict[int, str], classes: dict[int, str], known: bool = True) -> None:
    """Map the class indices of a data set to those of a model, by name.

    Args:
        dataset (YOLODataset): Data set, changed in place.
        names (dict[int, str]): Class names of its labels.
        classes (dict[int, str]): Class names of the model.
        known (bool): Whether the model must know every labeled class; if not, objects of others become background.

    Raises:
        ValueError: If the name of a labeled class is unknown or ambiguous.
    """
    index = match_classes(names, classes)
    labeled = {int(c) for x in dataset.labels for c in x["cls"].flat}
    check_unambiguous(names, index, sorted(labeled), getattr(dataset, "img_path", ""))
    table = np.array([index[i] for i in range(len(names))], dtype=np.float32)
    for x in dataset.labels:
        cls = x["cls"].astype(int)
        if not known:
            keep = table[cls.ravel()] >= 0
            cls = cls[keep]
            x["bboxes"] = x["bboxes"][keep]
            if len(x["segments"]):
                x["segments"] = [s for s, kept in zip(x["segments"], keep) if kept]
            if x.get("keypoints") is not None:
                x["keypoints"] = x["keypoints"][keep]
        unknown = {str(names[i]) for i in cls[table[cls] < 0].tolist()}
        if unknown:
            raise ValueError(
                f"{x['im_file']} has labels of {few(sorted(unknown))}, which the model does not know and which have no "
                "shots. Add shots, or remove these labels."
            )
        x["cls"] = table[cls]


class ShotsAndBase(Dataset):
    """The images of the shots, followed by base images.

    Attributes:
        parts (list[YOLODataset]): The shots, and the base images if there are any.
        labels (list[dict]): Labels of all images.
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
    """Draw batches of shots, or of half shots and half base images; no image repeats before all have been drawn.

    Epoch e depends only on (seed, e). Processes split one common order, so their number changes neither the steps nor
    how often an image is drawn.
    """

    def __init__(
        self, shots: int, base: int, batch: int, batches: int, seed: int = 0, rank: int = 0, processes: int = 1
    ):
        """Initialize the sampler.

        Args:
            shots (int): Images of the shots.
            base (int): Base images, whose indices follow those of the shots.
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
        steps, ours = self.batches, slice(self.rank, None, self.processes)
        of_shots = _cycle(rng, shots, (self.batch - replayed) * self.processes * steps).reshape(steps, -1)[:, ours]
        of_base = _cycle(rng, base, replayed * self.processes * steps).reshape(steps, -1)[:, ours] + shots
        yield from np.concatenate([of_shots, of_base], 1).ravel().tolist()


def _cycle(rng: np.random.Generator, n: int, count: int) -> np.ndarray:
    """Return `count` indices in 0..n-1 from repeated random permutations."""
    rounds = [rng.permutation(n) for _ in range(-(-count // n))] if count else []
    return np.concatenate(rounds)[:count] if count else np.zeros(0, int)
