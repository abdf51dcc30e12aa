"""Class names: which class of a model a label index stands for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from yolo_fewshot.errors import few

UNKNOWN, AMBIGUOUS = -1, -2  # in the place of a class index


def repeated(names: Iterable[str]) -> list[str]:
    """Return the names that several classes have.

    Args:
        names (Iterable[str]): Class names.

    Returns:
        (list[str]): Each of them once, in the order of the names.
    """
    listed = [str(n) for n in names]
    return [n for n in dict.fromkeys(listed) if listed.count(n) > 1]


def match_classes(names: Mapping[int, str], classes: Mapping[int, str]) -> dict[int, int]:
    """Match label indices to the classes of a model by name.

    A name that several classes have is matched by index, where labels and model have it at the same indices.

    Args:
        names (Mapping[int, str]): Class names by label index.
        classes (Mapping[int, str]): Class names of the model.

    Returns:
        (dict[int, int]): Of every label index the class, `UNKNOWN`, or `AMBIGUOUS` if several might be meant.
    """
    own, known = _indices(names), _indices(classes)
    index: dict[int, int] = {}
    for name, rows in own.items():
        found = known.get(name, [])
        if not found:
            found = [UNKNOWN] * len(rows)
        elif rows != found and (len(rows), len(found)) != (1, 1):
            found = [AMBIGUOUS] * len(rows)
        index.update(zip(rows, found))
    return dict(sorted(index.items()))


def _indices(names: Mapping[int, str]) -> dict[str, list[int]]:
    """Return the indices of every name, in ascending order."""
    indices: dict[str, list[int]] = {}
    for i in sorted(names):
        indices.setdefault(str(names[i]), []).append(i)
    return indices


def check_unambiguous(names: Mapping[int, str], index: Mapping[int, int], shown: Iterable[int], source: object) -> None:
    """Raise an error if a label index that is in use has no class of its own.

    Args:
        names (Mapping[int, str]): Class names by label index.
        index (Mapping[int, int]): What `match_classes` returned.
        shown (Iterable[int]): Label indices that are in use.
        source (object): Where they are from, for the text.

    Raises:
        ValueError: If the name of one of them belongs to several classes.
    """
    unclear = list(dict.fromkeys(str(names[i]) for i in shown if index[i] == AMBIGUOUS))
    if unclear:
        raise ValueError(
            f"Labels of '{source}' cannot be matched by name: several classes of the data or of the model are called "
            f"{few(unclear)}, and not at the same indices. List all 'names:' in the order of the model, or train with "
            "different names."
        )
