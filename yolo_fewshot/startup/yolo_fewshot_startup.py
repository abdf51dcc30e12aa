"""Register the plugin in Python processes that run the ``yolo`` command, and do nothing in all others.

This file is at the root of site-packages, beside ``yolo_fewshot.pth`` (and ``yolo_fewshot.start`` for Python 3.15 and
later, PEP 829). Every Python process imports it at its start, so it imports only ``sys`` unless ``yolo`` runs.
"""

import sys


def runs_yolo(argv: list[str]) -> bool:
    """Return whether a command line starts Ultralytics' console script or one of its modules.

    Args:
        argv (list[str]): The interpreter's own command line, as in ``sys.orig_argv``: interpreter, options, program.

    Returns:
        (bool): True for ``yolo ...``, ``ultralytics ...`` and ``python -m ultralytics.cfg.__init__ ...``.
    """
    for previous, arg in zip(argv, argv[1:]):
        if previous in {"-W", "-X", "--check-hash-based-pycs"} or (arg.startswith("-") and arg != "-"):
            continue
        if previous == "-c":  # the argument is code
            return False
        program = arg.split(".")[0] if previous == "-m" else arg.replace("\\", "/").rpartition("/")[2]
        return program.lower() in {"yolo", "ultralytics", "yolo.exe", "ultralytics.exe"}
    return False


def main() -> None:
    """Import ``yolo_fewshot`` if this process runs ``yolo``; never raise, since that would break Python's start."""
    try:
        if runs_yolo(sys.orig_argv):
            import yolo_fewshot  # noqa: F401  (importing registers the plugin)
    except Exception as e:
        print(f"WARNING: yolo-fewshot could not start and is off: {type(e).__name__}: {e}", file=sys.stderr)
