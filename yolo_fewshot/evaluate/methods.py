"""The methods that a benchmark measures: their names, and what each of them needs."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from itertools import product
from typing import Any

from yolo_fewshot.enroll.methods import METHODS as METHODS_OF_ENROLLMENT
from yolo_fewshot.errors import few

# Stock fine-tuning freezes nothing, the backbone, or, on YOLO11, all but the last block of the neck and the head.
FREEZES = (0, 10, 22)
STOCKS = ("stock", "stock_all")  # fine-tuning on the shots of the novel classes, and on shots of all classes
ALL = "_all"  # suffix of the methods that see shots of all classes
ENROLLMENTS = (*METHODS_OF_ENROLLMENT, "auto")
GRAFTS = {"graft-head": "head", "graft-neck": "neck", "graft-all": "all"}  # stage 3
ABLATIONS: dict[str, dict[str, Any]] = {  # stage 2 again with the seed of the draw, unchanged or with one change
    "full": {},
    "minus_supcon": {"supcon": 0.0},
    "minus_cpe": {"cpe": 0.0},
    "minus_triplet": {"triplet": 0.0},
    "minus_contrast": {"supcon": 0.0, "cpe": 0.0, "triplet": 0.0},
    "unturned": {"turned": 0.0},
    "two_way": {"n_way": 2, "k_shot": 4, "n_query": 4, "wide": False},
}
# Stage 3 on the shots of the novel classes, with base images, without interpolation, and on shots of all classes.
ADAPTATIONS = ("adapt", "replay", "adapt_full", "adapt_all")
METHODS = (*STOCKS, *ENROLLMENTS, *GRAFTS, *ADAPTATIONS, "no_episodes", *ABLATIONS)
DEFAULT_METHODS = (*STOCKS, *ENROLLMENTS, *ADAPTATIONS)  # of a few-shot checkpoint, those that the data allow
STOCK_METHODS = ("stock", *ENROLLMENTS, *GRAFTS)  # of a stock checkpoint


def is_stock(method: str) -> bool:
    """Return whether a method is stock fine-tuning, such as `stock-10`.

    Args:
        method (str): Method.

    Returns:
        (bool): True if so.
    """
    return method.partition("-")[0] in STOCKS


def sees_all(method: str) -> bool:
    """Return whether a method learns from shots of all classes.

    Args:
        method (str): Method.

    Returns:
        (bool): True if so.
    """
    return method.partition("-")[0].endswith(ALL)


def needs_few_shot(method: str) -> bool:
    """Return whether a method starts from a few-shot checkpoint.

    Args:
        method (str): Method.

    Returns:
        (bool): True if so.
    """
    return method in ADAPTATIONS or method in ABLATIONS or method == "no_episodes"


def needs_base(method: str) -> bool:
    """Return whether a method learns from images of the base classes of the data.

    Args:
        method (str): Method.

    Returns:
        (bool): True if so.
    """
    return method in ABLATIONS or method == "replay" or sees_all(method)


def parse(methods: str | Iterable[str]) -> list[str]:
    """Return the names of the methods without repetition, and stock fine-tuning once for each `freeze`.

    Args:
        methods (str | Iterable[str]): Names, separated by commas in a text.

    Returns:
        (list[str]): Methods.

    Raises:
        ValueError: If there are none, or one is unknown.
    """
    listed = methods.split(",") if isinstance(methods, str) else methods
    chosen = list(dict.fromkeys(x for x in (str(x).strip() for x in listed) if x))
    valid = {*METHODS, *(f"{m}-{f}" for m, f in product(STOCKS, FREEZES))}
    unknown = {m: difflib.get_close_matches(m, METHODS) for m in chosen if m not in valid}
    if unknown or not chosen:
        named = [f"{m} (similar: {', '.join(x)})" if x else m for m, x in unknown.items()]
        raise ValueError(f"'methods=' names {few(named) or 'nothing'}. Valid methods are {', '.join(METHODS)}.")
    every = (x for m in chosen for x in ([f"{m}-{f}" for f in FREEZES] if m in STOCKS else [m]))
    return list(dict.fromkeys(every))


def default_methods(few_shot: bool, base: bool) -> list[str]:
    """Return the methods that are measured if none are named.

    Args:
        few_shot (bool): Whether the checkpoint is a few-shot one.
        base (bool): Whether the data have images of base classes that it knows.

    Returns:
        (list[str]): Methods.
    """
    return parse([m for m in (DEFAULT_METHODS if few_shot else STOCK_METHODS) if base or not needs_base(m)])


def check(methods: list[str], model: str, few_shot: bool, base: bool, stage1: bool) -> None:
    """Raise an error if a method lacks what it needs.

    Args:
        methods (list[str]): Methods.
        model (str): Name of the checkpoint.
        few_shot (bool): Whether it is a few-shot one.
        base (bool): Whether the data have images of base classes that it knows.
        stage1 (bool): Whether there is a checkpoint before stage 2.

    Raises:
        ValueError: If so.
    """
    need = [m for m in methods if needs_few_shot(m)]
    if need and not few_shot:
        raise ValueError(
            f"{', '.join(need)} of 'methods=' need a few-shot checkpoint, and model={model} is a stock one. Leave them "
            f"out (methods={','.join(STOCK_METHODS)}), or train model= with cfg=stage1.yaml, then cfg=stage2.yaml."
        )
    need = [m for m in methods if needs_base(m)]
    if need and not base:
        raise ValueError(
            f"{', '.join(need)} of 'methods=' need images of base classes: data= with a base.yaml whose classes model= "
            "knows. Leave them out, or set another data= or model=."
        )
    need = [m for m in methods if m == "no_episodes" or m in ABLATIONS]
    if need and not stage1:
        raise ValueError(f"stage1= must be given for {', '.join(need)}: the few-shot checkpoint before stage 2.")
