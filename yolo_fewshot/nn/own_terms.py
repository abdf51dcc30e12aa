"""Import, create and check the custom loss terms that the configuration key `terms` names."""

from __future__ import annotations

import importlib
import math
import os
import sys

from yolo_fewshot.args import STOCK_GAINS
from yolo_fewshot.nn.terms import BUILT_IN, EPISODE_TERMS, EpisodeTerm

TAKEN_NAMES = ("box_loss", "cls_loss", "dfl_loss", "l1_loss", *EPISODE_TERMS, "tea_loss", "mem_loss")
GAIN_KEYS = tuple(dict.fromkeys((*STOCK_GAINS, *(t.gain for t in BUILT_IN if isinstance(t.gain, str)))))
MAX_NAME_LENGTH = 10  # width of a column of the progress bar


def load_terms(paths: str | None) -> list[EpisodeTerm]:
    """Import and create the terms that `terms=` names.

    Args:
        paths (str | None): Dotted paths of subclasses of `EpisodeTerm`, separated by commas, such as
            'my_losses.SpreadLoss'. Modules in the working directory are found, too.

    Returns:
        (list[EpisodeTerm]): New terms, in the order of their paths.

    Raises:
        ValueError: If a term cannot be imported or created, or has an invalid name, gain or form.
    """
    terms: list[EpisodeTerm] = []
    for path in filter(None, (p.strip() for p in (paths or "").split(","))):
        try:
            term = _create(path)
            _check(term, (*TAKEN_NAMES, *(t.name for t in terms)))
        except ValueError as e:
            raise ValueError(f"'terms={path}' is an invalid value. {e}") from e
        terms.append(term)
    return terms


def _create(path: str) -> EpisodeTerm:
    """Import the class at a dotted path, and create it without arguments."""
    module, _, name = path.rpartition(".")
    if not module:
        raise ValueError("Valid 'terms' values are dotted paths of classes, e.g. 'terms=my_losses.SpreadLoss'.")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # the `yolo` command does not add it; worker processes inherit the path
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as e:
        if e.name and f"{module}.".startswith(f"{e.name}."):
            raise ValueError(f"There is no module '{module}' in {os.getcwd()} or on Python's path.") from e
        raise ValueError(f"'{module}' cannot be imported: {e}.") from e
    except Exception as e:
        raise ValueError(f"'{module}' cannot be imported: {type(e).__name__}: {e}.") from e
    if not hasattr(found, name):
        raise ValueError(f"Module '{module}' has no class '{name}'.")
    cls = getattr(found, name)
    if not (isinstance(cls, type) and issubclass(cls, EpisodeTerm)):
        raise ValueError(f"'{name}' must be a subclass of yolo_fewshot.EpisodeTerm.")
    try:
        return cls()
    except Exception as e:
        raise ValueError(f"'{name}()' fails: {type(e).__name__}: {e}. A term is created without arguments.") from e


def _check(term: EpisodeTerm, taken: tuple[str, ...]) -> None:
    """Raise ValueError unless a term is well-formed and has a name that is not taken."""
    name, gain = term.name, term.gain
    stem = name.removesuffix("_loss") if isinstance(name, str) else ""
    if not (stem.isidentifier() and stem != name and len(name) <= MAX_NAME_LENGTH):
        raise ValueError(
            f"name={name!r} must end with '_loss' and have at most {MAX_NAME_LENGTH} characters, e.g. 'spr_loss'."
        )
    if name in taken:
        raise ValueError(f"name='{name}' is taken by another term.")
    if isinstance(gain, str):
        if gain not in GAIN_KEYS:
            raise ValueError(f"gain='{gain}' must be a number or one of the keys {', '.join(GAIN_KEYS)}.")
    elif not isinstance(gain, (int, float)) or isinstance(gain, bool) or not 0 <= gain < math.inf:
        raise ValueError(f"gain={gain!r} must be a finite number >= 0 or one of the keys {', '.join(GAIN_KEYS)}.")
    if type(term).forward is EpisodeTerm.forward:
        raise ValueError(f"'{type(term).__name__}' needs a method forward(self, episode).")
    if parameters := [k for k, _ in term.named_parameters()]:
        raise ValueError(f"Parameters such as '{parameters[0]}' would not be trained. Make them buffers.")
