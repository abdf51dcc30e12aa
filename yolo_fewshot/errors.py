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


def no_head(model: Any, what: str) -> str:
    """Return the error message for a model without a few-shot head.

    Args:
        model (ultralytics.engine.model.Model): The model.
        what (str): Feature that needs the head.

    Returns:
        (str): The problem and its remedy.
    """
    name = model.model_name
    if isinstance(model.model, (str, Path)):
        return f"model='{name}' is an exported model, and {what} needs a few-shot checkpoint. Enroll, then export."
    if getattr(model.model, "enrolled", None) is not None:
        return f"model='{name}' is folded, and {what} needs the few-shot checkpoint that it was folded from."
    return (
        f"model='{name}' has no few-shot head, which {what} needs. Train or upgrade it with cfg=stage1.yaml first, "
        f"i.e. 'yolo train model={name} cfg=stage1.yaml data=base.yaml'."
    )
