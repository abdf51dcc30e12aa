"""The cost of drawing episodes from small and large data sets.

    python tests/benchmarks/sampling.py

Prints the seconds to index the labels and to draw 500 episodes of 8 ways, and the memory that this adds.
"""

from __future__ import annotations

import resource
import time

import numpy as np

from yolo_fewshot.data.episodes import EpisodeSampler

OBJECTS, CLASSES, EPISODES = 3, 1200, 500


def held() -> float:
    """Return the peak memory of this process, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Print times and memory."""
    names = {i: str(i) for i in range(CLASSES)}
    for images in (10_000, 100_000, 1_000_000):
        cls = np.random.default_rng(0).integers(0, CLASSES, (images, OBJECTS, 1)).astype(np.float32)
        labels = [{"cls": x} for x in cls]
        before, start = held(), time.perf_counter()
        sampler = EpisodeSampler(labels, names, n_way=8, k_shot=1, n_query=1, episodes=EPISODES)
        indexed = time.perf_counter()
        assert len(list(sampler)) == EPISODES * sampler.episode_size
        drawn = time.perf_counter()
        print(
            f"{images:>9,} images, {CLASSES:,} classes: index {indexed - start:.3f} s, {EPISODES} episodes "
            f"{drawn - indexed:.3f} s, {held() - before:.0f} MiB"
        )


if __name__ == "__main__":
    main()
