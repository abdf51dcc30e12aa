"""Episodes: the sampler of classes and images, and the data set that loads them."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset
from ultralytics.data.augment import Albumentations
from ultralytics.data.dataset import YOLODataset
from ultralytics.utils import LOGGER

from yolo_fewshot.data.sampling import EpochSampler

TRIES = 1000  # maximum number of draws for one episode
TURNS = 8  # ways to place a square: four rotations, mirrored or not


class Draw(NamedTuple):
    """One image of an episode.

    Attributes:
        image (int): Image index in the data set.
        way (int): Class that the image was drawn for.
        support (bool): Whether it is a support image, else a query image.
        seed (int): Seed of its augmentation.
        turn (int): How it is turned, 0..7, see `turn_image`; the same for all images of an episode.
    """

    image: int
    way: int
    support: bool
    seed: int
    turn: int = 0


class EpisodeSampler(EpochSampler):
    """Draw episodes of n_way classes with k_shot support and n_query query images each.

    Some episodes are turned: all their images are rotated by quarter turns, mirrored, or both, so that they show other
    classes than the base classes, seven times as many (Liu et al. 2020, "Task Augmentation by Rotating for
    Meta-Learning", arXiv:2003.00804). With `fliplr` or `flipud` the mirrored ones are none of their own: three times.

    Support and query images of an episode are disjoint. Episode t of epoch e depends only on (seed, e, t, rank), so
    runs are reproducible with any number of workers, and a resumed run continues with the same episodes.

    Examples:
        >>> sampler = EpisodeSampler(dataset.labels, dataset.data["names"], n_way=5, k_shot=1, n_query=1, episodes=100)
        >>> loader = DataLoader(EpisodicDataset(dataset), batch_size=sampler.episode_size, sampler=sampler)
    """

    def __init__(
        self,
        labels: list[dict[str, Any]],
        names: dict[int, str],
        n_way: int,
        k_shot: int,
        n_query: int,
        episodes: int,
        seed: int = 0,
        rank: int = 0,
        held_out: Collection[int] = (),
        turned: float = 0.0,
    ):
        """Initialize the sampler.

        Args:
            labels (list[dict]): Labels of every image, as in `YOLODataset.labels`; `cls` is (n, 1). An image that is
                listed again is not drawn, since it would be both support and query.
            names (dict[int, str]): Class names.
            n_way (int): Classes per episode.
            k_shot (int): Support images per class.
            n_query (int): Query images per class; they repeat where a class has too few images.
            episodes (int): Episodes per epoch.
            seed (int): Seed of the run.
            rank (int): Rank of this process in multi-GPU training; each rank draws its own episodes.
            held_out (Collection[int]): Classes that are kept out of training, and never drawn.
            turned (float): Share of the episodes that are turned, in 0..1.

        Raises:
            ValueError: If fewer than n_way classes have at least k_shot + 1 images, or a count is less than 1.
        """
        super().__init__(seed, rank)
        for k, v in (("n_way", n_way), ("k_shot", k_shot), ("n_query", n_query), ("episodes", episodes)):
            if v < 1:
                raise ValueError(f"'{k}={v}' is an invalid value. '{k}' must be >= 1.")
        self.n_way, self.k_shot, self.n_query, self.episodes = n_way, k_shot, n_query, episodes
        self.turned = turned

        # Images by class: those of class c are images[start[c] : start[c + 1]].
        sizes = np.fromiter((len(x["cls"]) for x in labels), dtype=np.int64, count=len(labels))
        cls = np.concatenate([x["cls"] for x in labels]).reshape(-1) if len(labels) else sizes
        seen: dict[Any, int] = {}
        new = np.array([seen.setdefault(x.get("im_file", i), i) == i for i, x in enumerate(labels)], bool)
        cls = cls[np.repeat(new, sizes)]
        cls = cls.astype(np.min_scalar_type(max(len(names), 1)))  # 16 bits are sorted ten times faster than 64
        order = cls.argsort(kind="stable")
        owner, images = cls[order], np.repeat(np.arange(len(labels)), sizes * new)[order]
        first = np.ones(len(order), bool)  # first object of its class in its image
        first[1:] = (owner[1:] != owner[:-1]) | (images[1:] != images[:-1])
        owner, self.images = owner[first], images[first]
        self.start = np.searchsorted(owner, np.arange(len(names) + 1))
        counts = np.diff(self.start)
        enough, trained = counts >= k_shot + 1, ~np.isin(np.arange(len(names)), list(held_out))
        self.classes = np.flatnonzero(enough & trained)
        left_out = [f"{names[c]} ({counts[c]})" for c in np.flatnonzero(~enough & trained).tolist()]
        need = f"{k_shot + 1} images (k_shot + 1)"
        if len(self.classes) < n_way:
            out = f" Left out, with their images: {', '.join(left_out)}." if left_out else ""
            out += f" {len(held_out)} classes are kept out by meta_val." if held_out else ""
            fewer = (
                f"Set n_way={len(self.classes)} or less, a smaller k_shot, or label" if len(self.classes) else "Label"
            )
            raise ValueError(
                f"'n_way={n_way}' needs {n_way} classes with at least {need} each, and the train split has "
                f"{len(self.classes)}.{out} {fewer} more images."
            )
        self.episode(0, 0)  # raises an error now rather than in training
        if left_out:
            LOGGER.warning(f"No episode is drawn for classes with fewer than {need}: {', '.join(left_out)}.")

    @property
    def episode_size(self) -> int:
        """Images of an episode."""
        return self.n_way * (self.k_shot + self.n_query)

    def __len__(self) -> int:
        """Return the images of an epoch."""
        return self.episodes * self.episode_size

    def draw(self, epoch: int) -> Iterator[Draw]:
        """Yield the images of one epoch, the support images of each episode before its query images.

        Args:
            epoch (int): Epoch, counted from 0.

        Yields:
            (Draw): An image of an episode.
        """
        for t in range(self.episodes):
            yield from self.episode(epoch, t)

    def episode(self, epoch: int, t: int) -> list[Draw]:
        """Draw one episode.

        Args:
            epoch (int): Epoch, counted from 0.
            t (int): Episode of the epoch, counted from 0.

        Returns:
            (list[Draw]): n_way * k_shot support images, then n_way * n_query query images, class by class.
        """
        rng = np.random.default_rng((self.seed, epoch, t, self.rank))
        for attempt in range(TRIES):
            ways = self.classes[rng.permutation(len(self.classes))[: self.n_way]].tolist()
            support: set[int] = set()
            query: set[int] = set()
            # Ways share a support image only after ten failed attempts.
            shots = [(c, i) for c in ways for i in self._draw(rng, c, self.k_shot, support, support, attempt >= 10)]
            queries = [(c, i) for c in ways for i in self._draw(rng, c, self.n_query, support, query, True)]
            if len(shots) == self.n_way * self.k_shot and len(queries) == self.n_way * self.n_query:
                break
        else:
            raise ValueError(
                f"In {TRIES} tries no {self.n_way} classes were found whose images can be divided into support and "
                "query, because the same images show all of them. Set a smaller n_way or k_shot, or label more images."
            )
        seeds = rng.integers(2**31, size=self.episode_size).tolist()
        flags = [True] * len(shots) + [False] * len(queries)
        turn = int(rng.integers(1, TURNS)) if rng.random() < self.turned else 0  # last: the draws above do not change
        return [Draw(i, c, s, seed, turn) for (c, i), s, seed in zip(shots + queries, flags, seeds)]

    def _draw(
        self, rng: np.random.Generator, c: int, n: int, support: set[int], into: set[int], relax: bool
    ) -> list[int]:
        """Draw n images of class c that are not in `support`, and add them to `into`; fewer if there are too few.

        With `relax`, ways may share support images, and query images repeat if there are too few.
        """
        taken = set() if relax and into is support else support
        lo, hi = self.start[c], self.start[c + 1]
        drawn: list[int] = []
        if hi - lo > 8 * (n + 1):  # rejection sampling, whose cost does not grow with the images
            for i in self.images[rng.integers(lo, hi, size=8 * (n + 1))].tolist():
                if len(drawn) < n and i not in taken and i not in drawn:
                    drawn.append(i)
        if len(drawn) < n:
            free = [i for i in self.images[lo:hi].tolist() if i not in taken]
            drawn = [free[j] for j in rng.permutation(len(free))[:n]]
        if relax and into is not support and drawn:
            drawn = [drawn[j % len(drawn)] for j in range(n)]
        into.update(drawn)
        return drawn


class EpisodicDataset(Dataset):
    """A `YOLODataset` whose items are the `Draw`s of an episode.

    The augmentation of an image is seeded by its `Draw`, so it depends neither on loader processes nor on images loaded
    before. The random state of the process does not change.

    Attributes:
        dataset (YOLODataset): The data set that loads and augments.
        labels (list[dict]): Its labels.
    """

    def __init__(self, dataset: YOLODataset):
        """Initialize the data set.

        Args:
            dataset (YOLODataset): Training data set, with mosaic and other mixing of images off.
        """
        self.dataset, self.labels = dataset, dataset.labels

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.dataset)

    def __getitem__(self, draw: Draw) -> dict[str, Any]:
        """Return one augmented image with its labels, its `way` (int), `support` (bool) and `turned` (bool)."""
        with _seeded(draw.seed, getattr(self.dataset, "transforms", None)):
            sample = turn_image(self.dataset[draw.image], draw.turn)
        return {**sample, "way": draw.way, "support": draw.support, "turned": draw.turn > 0}

    @staticmethod
    def collate_fn(samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate the images of an episode.

        Returns:
            (dict[str, Any]): Ultralytics' batch with `way` (B,) long, `support` (B,) bool, `query` (Q,) long, the
                indices of the query images, computed on the CPU to avoid a device sync, and `turned` (bool).
        """
        batch = YOLODataset.collate_fn(samples)
        support = torch.tensor(batch["support"])
        own = {"way": torch.tensor(batch["way"]), "support": support, "query": (~support).nonzero()[:, 0]}
        return {**batch, **own, "turned": all(batch["turned"])}


def turn_image(sample: dict[str, Any], turn: int) -> dict[str, Any]:
    """Turn a square image with its boxes.

    Args:
        sample (dict[str, Any]): `img` (C, S, S), and `bboxes` (n, 4), x, y, w, h, normalized.
        turn (int): Counterclockwise quarter turns, 0..3; plus 4 if the image is mirrored before.

    Returns:
        (dict[str, Any]): The sample with a turned `img` and its `bboxes`.
    """
    img, (x, y, w, h) = sample["img"], sample["bboxes"].unbind(-1)
    if turn >= TURNS // 2:
        img, x = img.flip(-1), 1 - x
    for _ in range(turn % 4):
        img, x, y, w, h = img.rot90(1, (-2, -1)), y, 1 - x, h, w
    return {**sample, "img": img.contiguous(), "bboxes": torch.stack([x, y, w, h], -1)}


@contextlib.contextmanager
def _seeded(seed: int, transforms: Any) -> Iterator[None]:
    """Seed the random generators of the transforms, and restore the random state of the process afterwards."""
    state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # of the CPU only
    for x in _own_random_state(transforms):
        x.set_random_seed(seed)
    try:
        yield
    finally:
        random.setstate(state[0])
        np.random.set_state(state[1])
        torch.set_rng_state(state[2])


def _own_random_state(transforms: Any) -> Iterator[Any]:
    """Yield the transforms with a random state of their own: those of albumentations 1.4.21 and newer.

    Ultralytics seeds them only when the seed of the process changes, not for every image.
    """
    if isinstance(transforms, Albumentations) and hasattr(transforms.transform, "set_random_seed"):
        yield transforms.transform
    for x in getattr(transforms, "transforms", None) or ():
        yield from _own_random_state(x)
