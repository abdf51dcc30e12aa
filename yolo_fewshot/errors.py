"""Parts of messages that several modules share."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def few(items: list[str], sep: str = ", ", n: int = 5) -> str:
    """Join the first texts of a list, and add the number of the others.

    Args:
        items (list[str]): Texts.
        sep (str): Separator.
        n (int): Maximum number of texts to join.

    Returns:
        (str): The text.
    """
    return sep.join(items[:n]) + (f" and {len(items) - n} more" if len(items) > n else "")


def no_rows(model: Any, what: str, reason: str = "") -> str:
    """Return the error message for a model that cannot enroll classes.

    Args:
        model (ultralytics.engine.model.Model): The model.
        what (str): Feature that enrolls.
        reason (str): What is wrong with the head.

    Returns:
        (str): The problem and its remedy.
    """
    name = model.model_name
    if isinstance(model.model, (str, Path)):
        return (
            f"model='{name}' is an exported model or another file, and {what} needs a *.pt checkpoint. Enroll, then "
            "export."
        )
    reason = f": {reason}" if reason else f" is a {type(model).__name__} model for task '{model.task}'."
    return (
        f"model='{name}'{reason} {what} needs a YOLO model for detection, segmentation, pose or OBB, e.g. 'yolo "
        "predict model=yolo11n.pt support=shots.yaml source=street.jpg'."
    )
