"""Stage 3: which pictures a fine-tuning from enrolled prototypes sees, and where it ends."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset
from ultralytics.data.dataset import YOLODataset

from yolo_fewshot.features import View, extract
from yolo_fewshot.leave_out import ap50, detect
from yolo_fewshot.sampling import EpochSampler
from yolo_fewshot.support import Support
from yolo_fewshot.wording import few

STEPS, PASSES = 300, 60  # optimizer steps, and passes over the pictures of the shots, at least


def steps_for(shots: int, batch: int) -> int:
    """Return the number of optimizer steps.

    Args:
        shots (int): Pictures of the shots.
        batch (int): Pictures in a batch.

    Returns:
        (int): The steps, at least `STEPS`.
    """
    return max(STEPS, -(-PASSES * shots // batch))


def blend_for(labels: list[dict[str, Any]]) -> float:
    """Return the part of the trained weights to end with.

    Args:
        labels (list[dict]): Labels of the shots.

    Returns:
        (float): 0.5 if the classes have one object each (their median), 0.75 if they have more.
    """
    counts = np.unique(np.concatenate([np.zeros(0), *(x["cls"].flat for x in labels)]), return_counts=True)[1]
    return 0.75 if len(counts) and np.median(counts) > 1 else 0.5


@torch.no_grad()
def blend(model: nn.Module, start: dict[str, torch.Tensor], part: float) -> None:
    """Move the weights and statistics of a model towards those that its training started from.

    Between the two lies a model that has learned from a few pictures and forgotten less: Wortsman et al. 2022, "Robust
    fine-tuning of zero-shot models", arXiv:2109.01903.

    Args:
        model (nn.Module): Trained model, changed in place.
        start (dict[str, torch.Tensor]): State of the model before training.
        part (float): Part of the trained weights, 0 to 1.
    """
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            value.lerp_(start[name].to(value), 1 - part)


def ap50_on_shots(model: nn.Module, support: Support, imgsz: int) -> float:
    """Return how well a model finds the shots, from the anchors that enrolment looks at.

    Args:
        model (nn.Module): Few-shot model in eval mode that knows the classes of the shots.
        support (Support): The shots.
        imgsz (int): Picture size in pixels.

    Returns:
        (float): Mean AP50 of the classes of the shots, 0 to 1.
    """
    head, index = model.model[-1], {str(n): i for i, n in model.names.items()}
    features = extract(model, support, imgsz, views=[View()], desc="Checking shots")
    labels = torch.tensor([index[str(support.names[c])] for c in features.cls.tolist()])
    vectors, offsets = zip(*(head.get_class(i)[0] for i in range(head.nc)))
    rows, every = (torch.stack(vectors).cpu(), torch.stack(offsets).cpu()), torch.ones(len(features.files), dtype=bool)
    return ap50(detect(features, labels, every, rows, head.banks[0]))


def merged_names(known: dict[int, str], names: dict[int, str], labels: list[dict[str, Any]]) -> dict[int, str]:
    """Return the class names of a model with those appended that are new to it and have an object.

    Args:
        known (dict[int, str]): Class names of the model.
        names (dict[int, str]): Class names of the shots, by label index.
        labels (list[dict]): Labels of the shots, as in `YOLODataset.labels`.

    Returns:
        (dict[int, str]): Names by index, in the order in which enrolment appends them.
    """
    merged = {int(i): str(n) for i, n in known.items()}
    shown = sorted({int(c) for x in labels for c in x["cls"].flat})
    for name in dict.fromkeys(str(names[i]) for i in shown):
        if name not in merged.values():
            merged[len(merged)] = name
    return merged


def only_new(support: Support, known: dict[int, str]) -> Support:
    """Return a support set without the boxes of classes that the model knows, which are background to the new ones.

    Args:
        support (Support): Support set.
        known (dict[int, str]): Class names of the model.

    Returns:
        (Support): The same pictures.
    """
    new = np.array([i for i, n in support.names.items() if str(n) not in set(map(str, known.values()))])
    labels = []
    for x in support.labels:
        keep = np.isin(x["cls"][:, 0], new)
        labels.append({**x, "cls": x["cls"][keep], "bboxes": x["bboxes"][keep]})
    return support._replace(labels=labels)


def relabel(dataset: YOLODataset, names: dict[int, str], classes: dict[int, str]) -> None:
    """Give the labels of a data set the class indices of a model, by name.

    Args:
        dataset (YOLODataset): Data set, changed in place.
        names (dict[int, str]): Class names of its labels.
        classes (dict[int, str]): Class names of the model.

    Raises:
        ValueError: If a picture shows a class that is not among them.
    """
    index = {str(n): i for i, n in classes.items()}
    table = np.array([index.get(str(names[i]), -1) for i in range(len(names))], dtype=np.float32)
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
    """The pictures of the shots, then those of base classes.

    Attributes:
        parts (list[YOLODataset]): The shots, and the base pictures if there are any.
        labels (list[dict]): Labels of all.
    """

    def __init__(self, parts: list[YOLODataset]):
        """Initialize the data set.

        Args:
            parts (list[YOLODataset]): The shots, and the base pictures if there are any.
        """
        self.parts = parts
        self.labels = [x for d in parts for x in d.labels]
        self.collate_fn = parts[0].collate_fn

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self.labels)

    def __getitem__(self, i: int) -> dict[str, Any]:
        """Return an augmented picture with its labels."""
        for d in self.parts:
            if i < len(d):
                return d[i]
            i -= len(d)
        raise IndexError(i)

    def close_mosaic(self, hyp: Any) -> None:
        """Stop mixing pictures, as Ultralytics does for the last epochs.

        Args:
            hyp (Any): Arguments of the run.
        """
        for d in self.parts:
            d.close_mosaic(hyp)


class AdaptSampler(EpochSampler):
    """Draws batches of shots, or half shots and half base pictures; every picture comes before any comes again.

    Epoch e depends on (seed, e, rank) alone.
    """

    def __init__(self, shots: int, base: int, batch: int, batches: int, seed: int = 0, rank: int = 0):
        """Initialize the sampler.

        Args:
            shots (int): Pictures of the shots.
            base (int): Base pictures, which are numbered after those.
            batch (int): Pictures in a batch.
            batches (int): Batches in an epoch.
            seed (int): Seed of the run.
            rank (int): Rank of this process in multi-GPU training.
        """
        super().__init__(seed, rank)
        self.sizes, self.batch, self.batches = (shots, base), batch, batches

    def __len__(self) -> int:
        """Return the pictures of an epoch."""
        return self.batch * self.batches

    def draw(self, epoch: int) -> Iterator[int]:
        """Yield the pictures of one epoch.

        Args:
            epoch (int): Epoch, counted from 0.

        Yields:
            (int): Index of a picture.
        """
        rng = np.random.default_rng((self.seed, epoch, self.rank))
        shots, base = self.sizes
        replayed = self.batch // 2 if base else 0
        a = _cycle(rng, shots, (self.batch - replayed) * self.batches).reshape(self.batches, -1)
        b = _cycle(rng, base, replayed * self.batches).reshape(self.batches, -1) + shots
        yield from np.concatenate([a, b], 1).ravel().tolist()


def _cycle(rng: np.random.Generator, n: int, count: int) -> np.ndarray:
    """Return `count` indices of n things, in random rounds of all of them."""
    rounds = [rng.permutation(n) for _ in range(-(-count // n))] if count else []
    return np.concatenate(rounds)[:count] if count else np.zeros(0, int)
