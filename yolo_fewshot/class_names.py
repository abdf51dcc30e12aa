"""Match the class names of labels to those of a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ultralytics.utils import LOGGER

from yolo_fewshot.errors import few

UNKNOWN, AMBIGUOUS = -1, -2  # in place of a class index


def by_index(names: list[str] | Mapping[int, str]) -> dict[int, str]:
    """Return the class names of a model in the order of their indices.

    Args:
        names (list[str] | Mapping[int, str]): Names, a list if a user has assigned one; a data.yaml may have any order.

    Returns:
        (dict[int, str]): Names by index.
    """
    return dict(enumerate(names) if isinstance(names, list) else sorted(names.items()))


def repeated(names: Iterable[str]) -> list[str]:
    """Return the names that belong to several classes.

    Args:
        names (Iterable[str]): Class names.

    Returns:
        (list[str]): Each name once, in order.
    """
    listed = [str(n) for n in names]
    return [n for n in dict.fromkeys(listed) if listed.count(n) > 1]


def near_duplicates(names: Iterable[str], known: Iterable[str]) -> list[str]:
    """Return pairs of names that differ only by case, spaces, hyphens or underscores.

    Args:
        names (Iterable[str]): Class names.
        known (Iterable[str]): Class names to compare with, which may have some of the same.

    Returns:
        (list[str]): Texts such as "'Fire hydrant' and 'fire_hydrant'", each pair once.
    """
    plain: dict[str, list[str]] = {}
    for n in dict.fromkeys(map(str, known)):
        plain.setdefault(_plain(n), []).append(n)
    pairs: dict[frozenset[str], str] = {}
    for n in map(str, names):
        for x in plain.get(_plain(n), ()):
            if x != n:
                pairs.setdefault(frozenset((n, x)), f"{n!r} and {x!r}")
    return list(pairs.values())


def warn_near_duplicates(names: Iterable[str], known: Iterable[str]) -> None:
    """Warn of new classes whose names are those of others but for the spelling, see `near_duplicates`.

    Args:
        names (Iterable[str]): Names of new classes.
        known (Iterable[str]): Names of the model's classes.
    """
    names = list(map(str, names))
    if pairs := near_duplicates(names, [*map(str, known), *names]):
        LOGGER.warning(
            f"{few(pairs, '; ')} are different classes, although their names differ only in spelling. If they are "
            "one, give them the same name."
        )


def _plain(name: str) -> str:
    """Return a name in lower case without spaces, hyphens and underscores."""
    return "".join(name.casefold().replace("-", " ").replace("_", " ").split())


def match_classes(names: Mapping[int, str], classes: Mapping[int, str]) -> dict[int, int]:
    """Match label indices to the classes of a model by name.

    A repeated name is matched by index, provided that labels and model have it at the same indices.

    Args:
        names (Mapping[int, str]): Class names by label index.
        classes (Mapping[int, str]): Class names of the model.

    Returns:
        (dict[int, int]): Class of every label index, `UNKNOWN`, or `AMBIGUOUS` if there are several candidates.
    """
    labeled, known = _indices(names), _indices(classes)
    index: dict[int, int] = {}
    for name, rows in labeled.items():
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


def check_unambiguous(names: Mapping[int, str], index: Mapping[int, int], used: Iterable[int], source: object) -> None:
    """Raise an error if a label index in use is ambiguous.

    Args:
        names (Mapping[int, str]): Class names by label index.
        index (Mapping[int, int]): What `match_classes` returned.
        used (Iterable[int]): Label indices in use.
        source (object): Source of the labels, for the message.

    Raises:
        ValueError: If the name of one of them belongs to several classes.
    """
    unclear = list(dict.fromkeys(str(names[i]) for i in used if index[i] == AMBIGUOUS))
    if unclear:
        raise ValueError(
            f"Labels of '{source}' cannot be matched by name: several classes of the data or of the model are called "
            f"{few(unclear)}, and not at the same indices. List all 'names:' in the order of the model, or train with "
            "different names."
        )
