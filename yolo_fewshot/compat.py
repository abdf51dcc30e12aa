"""Newest Ultralytics version that the package was tested with, and a warning for newer ones."""

from __future__ import annotations

TESTED = "8.4.190"


def warn_untested() -> None:
    """Warn, once per process, if Ultralytics is newer than the newest tested version."""
    import ultralytics
    from ultralytics.utils import LOGGER

    number = [int("".join(filter(str.isdigit, x)) or 0) for x in ultralytics.__version__.split(".")[:3]]
    if number > [int(x) for x in TESTED.split(".")] and not getattr(warn_untested, "done", False):
        warn_untested.done = True
        LOGGER.warning(f"yolo-fewshot was tested up to ultralytics {TESTED}, this is {ultralytics.__version__}.")
