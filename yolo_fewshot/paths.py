"""Location of the files that ship with the package."""

from __future__ import annotations

from pathlib import Path


def cfg_dir() -> Path:
    """Return the folder of model configs and recipes: inside the package in a wheel, beside it in a checkout."""
    here = Path(__file__).resolve().parent
    return here / "cfg" if (here / "cfg").is_dir() else here.parent / "cfg"
