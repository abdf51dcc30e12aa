"""Seconds and peak memory of a piece of work."""

from __future__ import annotations

import threading
import time
from typing import Any

import psutil
import torch

MIB = 2**20
INTERVAL = 0.05  # seconds between two samples of the memory of the process


class Meter:
    """Stopwatch that also samples memory, in a `with` block; `mark` takes the figures so far.

    Attributes:
        seconds (float): Seconds until the last mark.
        ram (float): Peak resident memory of this process in MiB. It includes the interpreter, the libraries, and what
            earlier work left behind, but not the processes that load images.
        gpu (float): Peak of the memory that tensors take on the GPU in MiB; NaN if nothing ran there.
    """

    def __enter__(self) -> Meter:
        """Start."""
        self._began, self._peak, self._stop = time.perf_counter(), 0, threading.Event()
        self.seconds, self.ram, self.gpu = 0.0, float("nan"), float("nan")
        self._held = 0
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self._held = torch.cuda.memory_allocated()
        self._sample()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        """Stop, and take the figures if nothing was marked."""
        self._stop.set()
        self._thread.join()
        if not self.seconds:
            self.mark()

    def mark(self, *_: Any) -> None:
        """Take the figures so far.

        Args:
            *_ (Any): Arguments of a callback, without use.
        """
        self._sample()
        self.seconds, self.ram = time.perf_counter() - self._began, self._peak / MIB
        used = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        self.gpu = used / MIB if used > self._held else float("nan")

    def _sample(self) -> None:
        """Sample the memory of the process."""
        self._peak = max(self._peak, psutil.Process().memory_info().rss)

    def _run(self) -> None:
        """Sample until the block ends."""
        while not self._stop.wait(INTERVAL):
            self._sample()
