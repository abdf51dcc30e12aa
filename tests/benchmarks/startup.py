"""The time that the plugin adds to `import ultralytics`, `yolo version`, and a Python process without YOLO.

    python tests/benchmarks/startup.py

Runs with and without the plugin alternate, each in its own process. Prints medians, and quartiles of the difference.
The package must be installed, with its start-up files.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

REPEATS = 15
IMPORT = "import time; t = time.perf_counter(); import {}; print(time.perf_counter() - t)"
HOOK = (
    "import sys, time; sys.path.insert(0, {!r}); t = time.perf_counter(); import yolo_fewshot_startup; "
    "yolo_fewshot_startup.main(); print(time.perf_counter() - t)"
)


def printed(code: str, *options: str) -> float:
    """Run code in a Python process and return the number that it prints."""
    argv = [sys.executable, *options, "-c", code]
    return float(subprocess.run(argv, check=True, capture_output=True, text=True).stdout.split()[-1])


def version(**env: str) -> float:
    """Return the seconds that `yolo version` takes."""
    start = time.perf_counter()
    yolo = Path(sys.executable).with_name("yolo")
    subprocess.run([yolo, "version"], check=True, capture_output=True, env={**os.environ, **env})
    return time.perf_counter() - start


def compare(name: str, without: Callable[[], float], with_plugin: Callable[[], float]) -> None:
    """Print the times without and with the plugin, and their difference."""
    pairs = [(without(), with_plugin()) for _ in range(REPEATS)]
    a, b = (statistics.median(x) for x in zip(*pairs))
    low, middle, high = statistics.quantiles([y - x for x, y in pairs], n=4)
    print(f"{name}: {a:.3f} s without, {b:.3f} s with; adds {middle:.4f} s ({low:.4f} to {high:.4f}), {middle / a:.1%}")


def main() -> None:
    """Print the times."""
    compare(
        "import",
        lambda: printed(IMPORT.format("ultralytics")),
        lambda: printed(IMPORT.format("yolo_fewshot, ultralytics")),
    )
    compare("yolo version", lambda: version(YOLO_FEWSHOT_DISABLE="1"), version)
    hook = HOOK.format(str(Path(find_spec("yolo_fewshot_startup").origin).parent))
    times = [printed(hook, "-S") * 1e3 for _ in range(REPEATS)]  # -S: the start-up files have not been run yet
    low, middle, high = statistics.quantiles(times, n=4)
    print(f"another Python: adds {middle:.3f} ms ({low:.3f} to {high:.3f})")


if __name__ == "__main__":
    main()
