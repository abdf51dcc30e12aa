"""Checks of the files and folders among the arguments, before the work starts."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from ultralytics.utils import SETTINGS, YAML, checks
from ultralytics.utils.downloads import GITHUB_ASSETS_NAMES


def check_checkpoint(model: str | Path) -> None:
    """Check that a model exists, or is one that Ultralytics downloads.

    Args:
        model (str | Path): Value of `model=`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is a folder.
    """
    if Path(model).is_dir():
        raise ValueError(
            f"'model={model}' is a folder. It must be a *.pt checkpoint, e.g. yolo11n.pt; a model that is exported "
            "to a folder has to be enrolled into before its export."
        )
    elsewhere = "://" in str(model) or (Path(SETTINGS["weights_dir"]) / model).is_file()
    offered = str(model) in GITHUB_ASSETS_NAMES or (Path(model).name == str(model) and Path(model).stem[:4] == "yolo")
    if not (Path(model).is_file() or elsewhere or offered):
        raise FileNotFoundError(
            f"'model={model}' does not exist. Give the path of a *.pt checkpoint, or a name that Ultralytics "
            "downloads, e.g. yolo11n.pt."
        )


def check_yaml_file(key: str, value: str | Path) -> None:
    """Check that a file is a YAML by its name; a folder is not one.

    Args:
        key (str): Name of the argument.
        value (str | Path): Its value.

    Raises:
        ValueError: If it is not.
    """
    if Path(value).suffix.lower() not in {".yaml", ".yml"}:
        raise ValueError(f"'{key}={value}' is an invalid value. It must be a *.yaml file.")


def check_writable(key: str, path: str | Path, folder: bool = True) -> None:
    """Check that a file or folder can be written, in the first folder that exists of its path, by writing there.

    Args:
        key (str): Name of the argument.
        path (str | Path): Its value.
        folder (bool): Whether it is a folder.

    Raises:
        ValueError: If a part of the path is a file.
        PermissionError: If writing fails.
    """
    target = Path(path).absolute() if folder else Path(path).resolve()  # a link to a file stays one
    exists = next(x for x in (target if folder else target.parent, *target.parents) if x.exists())
    if not exists.is_dir():
        raise ValueError(f"'{key}={path}' is an invalid value. {exists} is a file and not a folder.")
    try:
        tempfile.TemporaryFile(dir=exists).close()
    except OSError as e:
        raise PermissionError(f"'{key}={path}' cannot be written: {e.strerror} in {exists}. Name another place.") from e


def new_folder(out: str | Path) -> Path:
    """Return the folder to write, which must be new or empty.

    Args:
        out (str | Path): Value of `out=`.

    Returns:
        (Path): Its absolute path.

    Raises:
        FileNotFoundError: If the folder above it does not exist.
        PermissionError: If writing there fails.
        ValueError: If it is a file, or a folder that is not empty.
    """
    path = Path(out).resolve()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"'out={out}' exists and is not empty. Name a new folder: nothing is overwritten.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"'out={out}' is in a folder that does not exist. Create {path.parent} first.")
    check_writable("out", out)
    return path


def check_project(args: dict[str, Any], task: str) -> None:
    """Check that a run can write its folder, if `project` names one.

    Args:
        args (dict[str, Any]): Arguments of the run.
        task (str): Task of the model.

    Raises:
        PermissionError: If it cannot.
        ValueError: If a part of the path is a file.
    """
    project = args.get("project")
    if project:
        check_writable("project", Path(SETTINGS["runs_dir"]) / task / str(project))  # an absolute path stays


def check_source(source: Any) -> None:
    """Check that the images to predict exist, if they are a file or a folder.

    Args:
        source (Any): Images, as in Ultralytics.

    Raises:
        FileNotFoundError: If they do not.
    """
    text = str(source) if isinstance(source, (str, Path)) else ""
    elsewhere = any(x in text for x in "*:") or text.isnumeric() or text.startswith("screen")  # glob, URL, camera
    if text and not elsewhere and not Path(text).exists():
        raise FileNotFoundError(f"'source={text}' does not exist. It is an image, a video, a folder, a list or a URL.")


def check_data(data: Any) -> None:
    """Check that a data.yaml can be validated on.

    Args:
        data (Any): Value of `data=`; what is no YAML file, such as a bare name, is left to Ultralytics.

    Raises:
        FileNotFoundError: If it does not exist.
        ValueError: If it is not a mapping, or has no splits.
    """
    if data is None or Path(str(data)).suffix.lower() not in {".yaml", ".yml"}:
        return
    content = YAML.load(checks.check_yaml(data))
    missing = [f"'{k}:'" for k in ("train", "val") if k not in content and (k != "val" or "validation" not in content)]
    if missing:
        raise ValueError(f"'data={data}' has no {' and no '.join(missing)}. Ultralytics needs both, also to validate.")
