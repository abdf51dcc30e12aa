"""What a benchmark will measure: checks of its arguments, models and data, before anything is trained."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from ultralytics import YOLO
from ultralytics.cfg import get_cfg
from ultralytics.data.utils import check_det_dataset
from ultralytics.utils import DEFAULT_CFG_DICT, LOGGER, YAML
from ultralytics.utils.checks import check_file
from ultralytics.utils.downloads import GITHUB_ASSETS_NAMES, attempt_download_asset
from ultralytics.utils.torch_utils import parse_device

from yolo_fewshot import args as table
from yolo_fewshot.class_names import repeated
from yolo_fewshot.data.support import images_of, read_background
from yolo_fewshot.errors import few
from yolo_fewshot.evaluate.methods import ADAPTATIONS, GRAFTS
from yolo_fewshot.evaluate.novel_only import labeled_names, novel_only
from yolo_fewshot.files import among
from yolo_fewshot.nn.model import FewShotDetectionModel

OURS = {  # keys that the protocol sets; augment= would change stock heads alone
    "augment", "base_replay", "cfg", "classes", "distill_model", "enroll", "exist_ok", "fraction", "graft", "mode",
    "name", "objects", "pretrained", "project", "resume", "save_dir", "seed", "single_cls", "stage", "support", "task",
}  # fmt: skip

Draws = dict[tuple[int, int], Path]  # data.yaml of each number of shots and seed
Sources = dict[tuple[int, int], tuple[Path, Path | None]]  # the same with the list that replaces its train split


class Data(NamedTuple):
    """The classes of a benchmark, and where they are measured.

    Attributes:
        folder (Path): Folder of the data.
        novel (tuple[str, ...]): Names of the novel classes.
        base (tuple[str, ...]): Names of the base classes, which are measured; empty if there are no images of them.
        base_yaml (Path | None): base.yaml, if the model knows its classes.
        base_val (Path | None): data.yaml of the user's own whose val split shows base classes.
        narrowed (bool): Whether only the novel classes of the folder are used, as the model does not know the others.
    """

    folder: Path
    novel: tuple[str, ...]
    base: tuple[str, ...]
    base_yaml: Path | None
    base_val: Path | None
    narrowed: bool


class Plan(NamedTuple):
    """Plan of the measurements.

    Attributes:
        data (Data): Data.
        out (Path): Folder of the results.
        model (Path): Checkpoint to start from.
        few_shot (bool): Whether it is a few-shot one.
        stock (Path | None): Stock detector to fine-tune; None for `model`, folded.
        stage1 (Path | None): Few-shot checkpoint before stage 2.
        shots (Draws): data.yaml of each number of shots and seed.
        balanced (Draws): The same with as many shots of the base classes, if needed.
        methods (tuple[str, ...]): Methods, stock fine-tuning once for each `freeze`.
        settings (dict[str, Any]): Further arguments of training.
        save (bool): Whether to keep the training runs.
    """

    data: Data
    out: Path
    model: Path
    few_shot: bool
    stock: Path | None
    stage1: Path | None
    shots: Draws
    balanced: Draws
    methods: tuple[str, ...]
    settings: dict[str, Any]
    save: bool

    @property
    def tasks(self) -> list[tuple[str, int, int]]:
        """Method, number of shots and seed of each row, ordered by seed."""
        counts, seeds = ({x[i]: None for x in self.shots} for i in (0, 1))
        return [(m, k, s) for s, m, k in product(seeds, self.methods, counts)]

    def queries(self, shots: int, seed: int) -> Path:
        """Return the data.yaml whose val split has the novel queries.

        Args:
            shots (int): Number of shots.
            seed (int): Seed of the draw.

        Returns:
            (Path): The data.yaml.
        """
        whole = not (self.data.narrowed or (self.data.folder / "base.yaml").is_file())
        return self.data.folder / "data.yaml" if whole else self.shots[shots, seed]


# Checks


def find_checkpoint(key: str, file: str | Path) -> Path:
    """Return the absolute path of a checkpoint, which must exist or be one of Ultralytics' own.

    Args:
        key (str): Name of the argument.
        file (str | Path): Checkpoint.

    Returns:
        (Path): Its path.

    Raises:
        FileNotFoundError: If it does not exist.
        TypeError: If it is no checkpoint.
    """
    found = Path(attempt_download_asset(str(file)) if str(file) in GITHUB_ASSETS_NAMES else file)
    if not found.is_file():
        raise FileNotFoundError(f"{key}={file} does not exist.")
    if found.suffix != ".pt":
        raise TypeError(f"{key}={file} is not a *.pt checkpoint, from which training could start.")
    return found.resolve()


def check_settings(settings: dict[str, Any]) -> None:
    """Check the further arguments of training as Ultralytics does, and refuse those that the protocol sets.

    Args:
        settings (dict[str, Any]): Arguments.

    Raises:
        ValueError: If an argument is set by the protocol or has an invalid value, or there are no background images.
        SyntaxError: If an argument is misspelled.
        TypeError: If a value has a wrong type.
        FileNotFoundError: If the background images do not exist.
    """
    taken = sorted(OURS & settings.keys())
    if taken:
        raise ValueError(f"{', '.join(f'{k}=' for k in taken)} cannot be set, because the protocol sets it.")
    checked = vars(get_cfg({**DEFAULT_CFG_DICT, "save_dir": ""}, settings))  # half= becomes quantize= in settings
    table.check(checked)
    if checked["quantize"] not in {None, 16, 32}:
        raise ValueError(
            f"'quantize={settings['quantize']}' is an invalid value. It must be 16 or 32 here, the precision in which "
            "checkpoints are measured."
        )
    for k in ("batch", "imgsz"):
        v = settings.get(k, 1)
        if type(v) is not int or v < 1:  # no list, and no automatic batch size, which differs between methods
            raise ValueError(f"'{k}={v}' is an invalid value. It must be an int of at least 1 here.")
    if settings.get("background"):
        read_background(settings["background"])


def check_batch(methods: Iterable[str], settings: dict[str, Any]) -> None:
    """Refuse a batch without an image for each GPU, or without room for the other images that make half of it.

    Args:
        methods (Iterable[str]): Methods.
        settings (dict[str, Any]): Further arguments of training, which `check_settings` has checked.

    Raises:
        ValueError: If so.
    """
    gpus, batch = len(parse_device(settings.get("device")).split(",")), settings.get("batch", 16)
    adapted = [m for m in methods if m in GRAFTS or m in ADAPTATIONS]
    mixed = [m for m in adapted if m == "replay" or (m in GRAFTS and settings.get("background"))]
    if mixed and batch < 2 * gpus:
        raise ValueError(
            f"'batch={batch}' has no room for the base or background images of {', '.join(mixed)}, which make half of "
            f"each batch. Set batch={2 * gpus} or more."
        )
    if adapted and batch < gpus:
        raise ValueError(f"'batch={batch}' has fewer images than there are GPUs. Set batch={gpus} or more.")


def check_models(files: dict[str, Path]) -> tuple[bool, dict[int, str]]:
    """Check the kind of each checkpoint.

    Args:
        files (dict[str, Path]): Checkpoints by argument.

    Returns:
        few_shot (bool): Whether `model` is a few-shot checkpoint.
        names (dict[int, str]): Its classes.

    Raises:
        TypeError: If one is of the wrong kind.
    """
    few_shot, names = False, {}
    for key, file in files.items():
        yolo = YOLO(file)
        has_prototypes = isinstance(yolo.model, FewShotDetectionModel)
        if yolo.task != "detect":
            raise TypeError(f"{key}={file} is a model for task '{yolo.task}'. It must be a detector, e.g. yolo11n.pt.")
        if key == "stage1" and not has_prototypes:
            raise TypeError(
                f"model='{yolo.model_name}' has no few-shot head, which stage1= needs. Train or upgrade it with "
                "cfg=stage1.yaml first."
            )
        if key == "stock" and has_prototypes:
            raise TypeError(f"stock={file} must be a stock detector. Without stock= it is model=, folded if few-shot.")
        if key == "model":
            few_shot, names = has_prototypes, yolo.names
    return few_shot, names


def read_data(folder: Path, base_val: str | Path | None, known: dict[int, str]) -> Data:
    """Read the classes of the data, and divide them into novel and base ones.

    The novel classes are those of data.yaml that base.yaml does not have, or all without a base.yaml. If the model does
    not know the classes of base.yaml, only the novel ones are used.

    Args:
        folder (Path): Folder of the data.
        base_val (str | Path, optional): data.yaml whose val split shows classes of the model.
        known (dict[int, str]): Classes of the model.

    Returns:
        (Data): Classes.

    Raises:
        FileNotFoundError: If a file does not exist.
        ValueError: If the classes do not fit.
    """
    if not (folder / "data.yaml").is_file():
        raise FileNotFoundError(
            f"{folder / 'data.yaml'} does not exist. data= must be a folder of 'yolo-fewshot split', or one with a "
            "data.yaml and shots, in novel_5shot_seed0.yaml or in novel_5shot.yaml with novel_5shot_seed0.txt."
        )
    every = [str(n) for n in check_det_dataset(folder / "data.yaml")["names"].values()]
    base_yaml = folder / "base.yaml"
    old = [str(n) for n in check_det_dataset(base_yaml)["names"].values()] if base_yaml.is_file() else []
    novel = tuple(n for n in every if n not in old)
    if not novel or not set(old) <= set(every):
        raise ValueError(f"{folder / 'data.yaml'} must have the classes of base.yaml and novel ones.")
    twice = repeated(novel)
    if twice:  # shots are matched by name
        raise ValueError(f"Several novel classes of {folder / 'data.yaml'} have the name {few(twice)}. Rename them.")
    unknown = [n for n in old if n not in map(str, known.values())]
    if unknown:
        LOGGER.warning(
            f"model= does not know {few(unknown)} of {base_yaml}, so that only the novel classes of data= are used."
        )
    base = tuple(dict.fromkeys(old)) if not unknown else ()
    # One of Ultralytics' own, such as coco.yaml, needs no path.
    own = Path(check_file(str(base_val), hard=False) or base_val).resolve() if base_val is not None else None
    if own is not None:
        base = _base_of(own, novel, known)
    twice = repeated(n for n in known.values() if str(n) in base)
    if twice:
        raise ValueError(f"Several classes of model= have the name {few(twice)}, which cannot be measured apart.")
    return Data(folder, novel, base, base_yaml if old and not unknown else None, own, bool(unknown))


def _base_of(file: Path, novel: tuple[str, ...], known: dict[int, str]) -> tuple[str, ...]:
    """Return the base classes that a data.yaml of the user's own shows."""
    if not file.is_file():
        raise FileNotFoundError(f"base_val={file} does not exist. It is a data.yaml with images of the old classes.")
    names = [str(n) for n in check_det_dataset(file)["names"].values()]
    shown = labeled_names(file)
    clash = [n for n in novel if n in shown]
    if clash:
        raise ValueError(
            f"base_val={file} labels {few(clash)}, a novel class of data=. If it is another class, rename it in one of "
            "them; if not, take images of the old classes alone."
        )
    base = tuple(n for n in dict.fromkeys(names) if n in map(str, known.values()) and n not in novel)
    if not shown.intersection(base):
        raise ValueError(
            f"base_val={file} labels no class of model=: classes are matched by name, and it labels "
            f"{few(sorted(shown)) or 'nothing'}, while the model knows {few([str(n) for n in known.values()])}. Name "
            "them as the model does."
        )
    twice = [n for n in repeated(names) if n in base]
    if twice:
        raise ValueError(f"Several classes of base_val={file} have the name {few(twice)}. Rename them.")
    others = [n for n in names if n in shown and n not in base]
    if others:
        LOGGER.warning(f"model= does not know {few(others)} of base_val={file}, which are not measured.")
    return base


def find_shots(folder: Path, counts: list[int], seeds: int, kind: str) -> Sources:
    """Return the data.yaml of each number of shots and seed, and the list that replaces its train split, if any.

    Args:
        folder (Path): Folder of the data.
        counts (list[int]): Numbers of shots.
        seeds (int): Number of draws.
        kind (str): 'novel' or 'all'.

    Returns:
        (Sources): The data.yaml and the list.

    Raises:
        FileNotFoundError: If a draw is missing.
        ValueError: If the classes of a data.yaml are not those of the folder.
    """
    found: Sources = {}
    missing = []
    for k, s in product(counts, range(seeds)):
        of_seed, shared, images = (folder / f"{kind}_{k}shot{x}" for x in (f"_seed{s}.yaml", ".yaml", f"_seed{s}.txt"))
        if of_seed.is_file():
            found[k, s] = of_seed, None
        elif shared.is_file() and images.is_file():
            found[k, s] = shared, images
        else:
            missing.append(of_seed.name)
    if missing:
        there = {x.stem for x in folder.iterdir() if re.fullmatch(kind + r"_\d+shot_seed\d+\.(yaml|txt)", x.name)}
        listed = sorted(there, key=lambda x: [int(n) for n in re.findall(r"\d+", x)])
        has = f"It has {few(listed, n=20)}" if listed else "It has none"
        raise FileNotFoundError(f"{folder} has no {few(missing)}. {has}: set shots= and seeds= to match.")
    names = check_det_dataset(folder / "data.yaml")["names"]
    for file in dict.fromkeys(x for x, _ in found.values()):
        if check_det_dataset(file)["names"] != names:  # stock Ultralytics matches classes by their numbers
            raise ValueError(f"{file} must have the classes of data.yaml, in the same order.")
    return found


def check_queries(data: Data, shots: Sources, balanced: Sources) -> None:
    """Check that there are images to measure the novel classes on, and that none of the measured images is a shot.

    Args:
        data (Data): Data.
        shots (Sources): Result of `find_shots`.
        balanced (Sources): The same with as many shots of the base classes; empty if not needed.

    Raises:
        ValueError: If no image of a val split has a label of a novel class, or one is a shot or a copy of one.
    """
    for file in _query_files(data, shots):
        if not labeled_names(file).intersection(data.novel):
            raise ValueError(
                f"No image of the val split of {file} has a label of a novel class ({few(list(data.novel))}), so that "
                "there is nothing to measure. Label some, or correct 'val:'."
            )
    learned = [x for sources in (*shots.values(), *balanced.values()) for x in _train_images(*sources)]
    for file, shared in _measured_among(learned, data, shots).items():
        raise ValueError(
            f"{len(shared)} images of the val split of {file}, which are measured on, are also shots, or copies of "
            f"some: {few(shared)}. Take other images for the shots, or correct 'val:'."
        )


def check_background(data: Data, shots: Sources, background: str) -> None:
    """Refuse background images that are also measured on, since methods learn from them that they show no novel class.

    Args:
        data (Data): Data.
        shots (Sources): Result of `find_shots`.
        background (str): Folder, .txt list of images, or image, which `check_settings` has checked.

    Raises:
        ValueError: If there are such images.
    """
    for file, shared in _measured_among(images_of(background), data, shots).items():
        raise ValueError(
            f"background={background} has {len(shared)} images of the val split of {file}, which are measured on: "
            f"{few(shared)}. Take other images."
        )


def _measured_among(learned: list[str], data: Data, shots: Sources) -> dict[Path, list[str]]:
    """Return the measured images that are also learned from, by the data.yaml of their val split."""
    base = [data.base_val or data.folder / "data.yaml"] if data.base else []
    found = {x: among(images_of(check_det_dataset(x)["val"]), learned) for x in (*_query_files(data, shots), *base)}
    return {x: images for x, images in found.items() if images}


def _train_images(file: Path, listed: Path | None) -> list[str]:
    """Return the images of a data.yaml's train split, or those of the list that replaces it."""
    return images_of(str(listed) if listed else check_det_dataset(file)["train"])


def _query_files(data: Data, shots: Sources) -> list[Path]:
    """Return a data.yaml of each val split with novel queries."""
    yamls = dict.fromkeys(x for x, _ in shots.values()) if (data.folder / "base.yaml").is_file() else ()
    seen: dict[str, Path] = {str(check_det_dataset(x)["val"]): x for x in yamls or (data.folder / "data.yaml",)}
    return list(seen.values())


# Files of the run


def describe(data: Data, out: Path, file: Path, listed: Path | None) -> Path:
    """Return the data.yaml of a draw, written into the folder of the results where it differs from the given one.

    Args:
        data (Data): Data.
        out (Path): Folder of the results.
        file (Path): data.yaml.
        listed (Path, optional): List that replaces its train split.

    Returns:
        (Path): The data.yaml.
    """
    read = check_det_dataset(file)
    stem = (listed or file).stem
    if data.narrowed:
        return novel_only(read, _train_images(file, listed), data.novel, out / "data", stem)
    if listed is None:
        return file
    content = {k: v for k, v in YAML.load(file).items() if k not in {"download", "test", "minival", "nc"}}
    content |= {"path": str(read["path"]), "train": str(listed), "val": read["val"], "names": read["names"]}
    YAML.save(out / f"{stem}.yaml", content)
    return out / f"{stem}.yaml"
