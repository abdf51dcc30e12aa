"""How messages name many things."""

from __future__ import annotations


def few(items: list[str], sep: str = ", ", n: int = 5) -> str:
    """Join the first few of some texts, and say how many more there are.

    Args:
        items (list[str]): Texts.
        sep (str): Separator.
        n (int): Greatest number to name.

    Returns:
        (str): The text.
    """
    return sep.join(items[:n]) + (f" and {len(items) - n} more" if len(items) > n else "")
