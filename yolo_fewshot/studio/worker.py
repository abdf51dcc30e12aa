"""Long work outside of the page: a thread that does what was asked for last."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

from ultralytics.utils import LOGGER


class Worker:
    """A thread with named tasks; asking for a task that waits already asks once.

    Attributes:
        busy (str): Name of the task that runs, empty if none does.

    Examples:
        >>> worker = Worker({"learn": studio.learn, "refresh": lambda: studio.refresh(8)}, print)
        >>> worker.ask("learn")
    """

    def __init__(self, tasks: Mapping[str, Callable[[], object]], failed: Callable[[str], None]):
        """Start the thread.

        Args:
            tasks (Mapping[str, Callable]): Tasks, the most urgent first; one that returns True has more to do, which
                waits for more urgent ones.
            failed (Callable[[str], None]): Takes the text of the error of a task.
        """
        self.busy = ""
        self._tasks, self._failed = dict(tasks), failed
        self._asked: set[str] = set()
        self._state = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, daemon=True, name="studio worker")
        self._thread.start()

    def ask(self, name: str) -> None:
        """Ask for a task.

        Args:
            name (str): Its name.
        """
        with self._state:
            self._asked.add(name)
            self._state.notify_all()

    @property
    def idle(self) -> bool:
        """Whether nothing runs or waits."""
        with self._state:
            return not self.busy and not self._asked

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until nothing runs or waits.

        Args:
            timeout (float, optional): Seconds.

        Returns:
            (bool): Whether that is so.
        """
        with self._state:
            return self._state.wait_for(lambda: self._closed or not (self.busy or self._asked), timeout)

    def close(self) -> None:
        """End the thread after the task that runs."""
        with self._state:
            self._closed = True
            self._state.notify_all()
        self._thread.join()

    def _run(self) -> None:
        """Run tasks until the worker is closed."""
        while True:
            with self._state:
                self.busy = ""
                self._state.notify_all()
                self._state.wait_for(lambda: self._closed or self._asked)
                if self._closed:
                    return
                self.busy = next(n for n in self._tasks if n in self._asked)
                self._asked.discard(self.busy)
            more: object = False
            try:
                more = self._tasks[self.busy]()
            except Exception as e:  # the page goes on, and says so
                LOGGER.warning(f"studio: {self.busy} failed with {type(e).__name__}: {e}")
                self._failed(str(e) or type(e).__name__)
            if more is True:
                with self._state:
                    self._asked.add(self.busy)
