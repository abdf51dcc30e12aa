"""Base class of the deterministic epoch samplers of stages 2 and 3."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

from torch.utils.data import Sampler


class EpochSampler(Sampler):
    """Draw one epoch after the other; an epoch depends only on the seed, its number and the rank.

    Loader processes start the next epoch before the trainer announces it, so the sampler counts epochs itself.

    Attributes:
        seed (int): Seed of the run.
        rank (int): Rank of this process in multi-GPU training.
        epoch (int): Next epoch, counted from 0.
    """

    def __init__(self, seed: int = 0, rank: int = 0):
        """Initialize the sampler.

        Args:
            seed (int): Seed of the run.
            rank (int): Rank of this process in multi-GPU training.
        """
        self.seed, self.rank, self.epoch, self._running = seed, rank, 0, False

    @abstractmethod
    def __len__(self) -> int:
        """Return the images of an epoch."""

    @abstractmethod
    def draw(self, epoch: int) -> Iterator[Any]:
        """Yield the items of an epoch.

        Args:
            epoch (int): Epoch, counted from 0.

        Yields:
            (Any): An index of the data set.
        """

    def __iter__(self) -> Iterator[Any]:
        """Yield the items of the next epoch."""
        self._running, epoch = True, self.epoch
        self.epoch += 1
        yield from self.draw(epoch)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch to start from; this has no effect once an epoch has been drawn.

        Args:
            epoch (int): Epoch, counted from 0.
        """
        if not self._running:
            self.epoch = epoch

    def restart(self, epoch: int) -> None:
        """Draw this epoch next, after the loader has dropped its prefetched batches.

        Args:
            epoch (int): Epoch, counted from 0.
        """
        self.epoch = epoch
