"""The `yolo-fewshot` command, for what `yolo` has no mode. Arguments are key=value, as in `yolo`."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ultralytics.cfg import merge_equals_args, parse_key_value_pair
from ultralytics.utils import LOGGER

from yolo_fewshot.inputs import check_checkpoint, check_writable


class Command(NamedTuple):
    """A subcommand.

    Attributes:
        run (Callable): Function that takes the arguments.
        help (str): Description in one line.
        required (dict[str, str]): Help of the required arguments.
        optional (dict[str, str]): Help of the optional arguments.
        example (str): Example of a call.
    """

    run: Callable[..., None]
    help: str
    required: dict[str, str]
    optional: dict[str, str]
    example: str


def enroll(model: str, support: str, save: str, enroll: str = "auto", **kwargs: Any) -> None:
    """Enroll the classes of a support set, save the model, and plot the shots beside it.

    Args:
        model (str): Checkpoint.
        support (str): Support set.
        save (str): Checkpoint to write.
        enroll (str): Method.
        **kwargs (Any): `imgsz`, `batch`, `device`, `nms`, `background` and `objects` of `FewShotYOLO.enroll`.

    Raises:
        FileNotFoundError: If the checkpoint does not exist.
        PermissionError: If `save` cannot be written.
        ValueError: If `save` is not a .pt file in a folder that exists.
    """
    from yolo_fewshot import FewShotYOLO
    from yolo_fewshot.plots.support import FILE, plot_support

    if Path(save).suffix != ".pt" or Path(save).is_dir() or not Path(save).resolve().parent.is_dir():
        raise ValueError(f"'save={save}' is an invalid value. It must be a *.pt file in a folder that exists.")
    check_writable("save", save, folder=False)
    check_checkpoint(model)
    yolo = FewShotYOLO(model)
    yolo.enroll(support, method=enroll, **kwargs)
    yolo.save(save)
    assert yolo.shots is not None  # enroll has set them
    plot_support(yolo.shots, yolo.names, Path(save).absolute().with_name(f"{Path(save).stem}_{FILE}"))
    LOGGER.info(f"Results saved to {Path(save).resolve()}")


def demo(**kwargs: Any) -> None:
    """Show a class being learned and found, on built-in data.

    Args:
        **kwargs (Any): Arguments of `yolo_fewshot.demo.demo`.
    """
    from yolo_fewshot.demo import demo

    demo(**kwargs)


def doctor(**kwargs: Any) -> None:
    """Check the data, and rehearse a training run.

    Args:
        **kwargs (Any): Arguments of `yolo_fewshot.train.doctor.doctor`.

    Raises:
        SystemExit: If training would fail.
    """
    from yolo_fewshot.train.doctor import doctor

    levels = [f.level for f in doctor(**kwargs)]
    summary = f"{levels.count('error')} errors, {levels.count('warning')} warnings"
    if "error" in levels:
        raise SystemExit(f"\n{summary}")
    LOGGER.info(f"\n{summary}")


def split(**kwargs: Any) -> None:
    """Make K-shot splits of a detection data set.

    Args:
        **kwargs (Any): Arguments of `yolo_fewshot.data.splits.split`.
    """
    from yolo_fewshot.data.splits import split

    split(**kwargs)


def benchmark(**kwargs: Any) -> None:
    """Measure methods with K shots of novel classes.

    Args:
        **kwargs (Any): Arguments of `yolo_fewshot.evaluate.benchmark.benchmark`.
    """
    from yolo_fewshot.evaluate.benchmark import benchmark

    benchmark(**kwargs)


def label(**kwargs: Any) -> None:
    """Label the unlabeled images in which a detector is most confident, as further shots.

    Args:
        **kwargs (Any): Arguments of `yolo_fewshot.pseudo_labels.pseudo_label`.
    """
    from yolo_fewshot.pseudo_labels import pseudo_label

    pseudo_label(**kwargs)


def studio(
    model: str, folder: str = "studio", source: str | None = None, host: str = "127.0.0.1", port: int = 0, **kwargs: Any
) -> None:
    """Open a page in the browser to label a few objects, and see the detector learn them at once.

    Args:
        model (str): Checkpoint.
        folder (str): Folder of the project, created or reopened.
        source (str, optional): Image, folder or video to add.
        host (str): Address to listen on.
        port (int): Port, 0 for a free one.
        **kwargs (Any): `imgsz` and `device`, as in Ultralytics; `open`, whether to open the browser; `frames`, the
            number of frames to take from a video.

    Raises:
        FileNotFoundError: If the checkpoint does not exist.
        ModuleNotFoundError: If the packages of the page are not installed.
        PermissionError: If the folder cannot be written.
        ValueError: If a number is invalid.
    """
    from yolo_fewshot.studio.engine import Studio
    from yolo_fewshot.studio.live import Live

    try:
        from yolo_fewshot.studio.app import serve
    except ModuleNotFoundError as e:
        raise ModuleNotFoundError(f"{e}. The studio needs 'pip install \"yolo-fewshot[studio]\"'.") from e
    show, frames = kwargs.pop("open", True), kwargs.pop("frames", 20)
    for key, value, low in (("port", port, 0), ("frames", frames, 1)):
        if type(value) is not int or value < low:
            raise ValueError(f"'{key}={value}' is an invalid value. It must be an int of at least {low}.")
    if type(show) is not bool:
        raise ValueError(f"'open={show}' is an invalid value. It must be True or False.")
    check_checkpoint(model)
    check_writable("folder", folder)
    opened = Studio(model, folder, **kwargs)
    live = None
    try:
        if source is not None:
            skipped: list[str] = []
            opened.add_source(source, frames, skipped)
            for text in skipped:
                LOGGER.warning(text)
        live = Live(opened)
        serve(live, host, port, show)
    finally:
        (live or opened).close()


TEXTS = {  # paths and names, which may look like a number
    "background", "base_val", "data", "folder", "host", "images", "model", "name", "out", "project", "published",
    "save", "source", "stage1", "stock", "support", "val_images",
}  # fmt: skip
COMMANDS = {
    "benchmark": Command(
        benchmark,
        "measure fine-tuning, enrollment, grafting, adaptation and ablations with K shots, over several draws",
        {
            "data": "folder that yolo-fewshot split wrote, or one with data.yaml and novel_{K}shot_seed{S}.yaml alone",
            "model": "checkpoint to start from, e.g. yolo11n.pt, or the best.pt of stage 2",
        },
        {
            "base_val": "data.yaml whose val split shows classes of model=, to measure what it forgets",
            "published": "CSV of others' results, method,shots,ap,params_m,source, for a plot of AP against parameters",
            "stock": "stock detector to fine-tune (model=, folded if it is few-shot)",
            "stage1": "few-shot checkpoint before stage 2, for the ablations",
            "shots": "numbers of shots (1,3,5,10)",
            "seeds": "number of draws (3)",
            "methods": "some of stock,mean,fit,auto,graft-head,graft-neck,graft-all; with base.yaml stock_all; "
            "with a few-shot model= also adapt,replay,adapt_full,adapt_all and, with stage1=, "
            "no_episodes,full,minus_supcon,minus_cpe,minus_triplet,minus_contrast,unturned,two_way; "
            "stock-0 is stock with freeze=0 only",
            "out": "folder to write or to continue (benchmark)",
            "save": "keep the training runs (False)",
            "KEY": "any other argument of yolo train, e.g. imgsz=160 fliplr=0 device=0",
        },
        "yolo-fewshot benchmark data=steel model=yolo11n.pt methods=stock,auto shots=1,5 base_val=coco.yaml out=steel1",
    ),
    "demo": Command(
        demo,
        "see a stock detector learn a class from a few shots, on built-in data; no arguments needed",
        {},
        {
            "model": "checkpoint (yolo11n.pt, or a small one trained here if it cannot be downloaded)",
            "shots": "labeled objects to learn from (5)",
            "imgsz": "image size (320, or 96 for the one trained here)",
            "device": "device, e.g. 0 or cpu",
            "project": "folder of the run folder, as in Ultralytics (runs/detect)",
            "name": "name of the run folder (demo)",
        },
        "yolo-fewshot demo",
    ),
    "doctor": Command(
        doctor,
        "check the data, the first losses, the time and the memory of a training run before it starts",
        {"data": "data.yaml", "model": "model to train, e.g. best.pt or fewshot.yaml"},
        {"cfg": "recipe (stage2.yaml)", "KEY": "any other argument of yolo train, e.g. imgsz=320 n_way=4"},
        "yolo-fewshot doctor model=best.pt cfg=stage2.yaml data=base.yaml",
    ),
    "enroll": Command(
        enroll,
        "teach a model new classes from a few labeled examples, and save it",
        {
            "model": "checkpoint, e.g. yolo11n.pt",
            "support": "support set: data.yaml, .txt list of images, folder of crops by class, or an image",
            "save": "checkpoint to write",
        },
        {
            "objects": "objects in the image, e.g. 'scooter 10 20 200 300', corners in pixels; separated by ';'",
            "background": "folder or .txt list of images that show none of the classes, against false alarms",
            "enroll": "auto (default), mean or fit",
            "imgsz": "image size (that of training)",
            "batch": "images per forward pass (16)",
            "device": "device, e.g. 0 or cpu",
            "nms": "False if YOLO26 will predict with nms=False, for the suggested thresholds",
        },
        "yolo-fewshot enroll model=yolo11n.pt support=shots.yaml background=street save=site-a.pt",
    ),
    "label": Command(
        label,
        "label the unlabeled images in which a detector is most confident, as further shots",
        {
            "model": "checkpoint that knows the classes, e.g. the best.pt of stage 3",
            "data": "data.yaml of the shots, whose classes are looked for",
            "source": "folder or .txt list of unlabeled images",
            "out": "folder to write",
        },
        {
            "conf": "minimum confidence of the best object of an image (0.5)",
            "top": "maximum number of images of a class (10)",
            "imgsz": "image size (that of training)",
            "device": "device, e.g. 0 or cpu",
        },
        "yolo-fewshot label model=runs/detect/scooter/weights/best.pt data=shots.yaml source=unlabeled out=more",
    ),
    "split": Command(
        split,
        "split a data set into base classes and K shots of novel ones, with links to its images",
        {
            "data": "data.yaml, or COCO json of the train images",
            "novel": "names of the novel classes, e.g. bird,bus, or a YAML with a list of them, e.g. voc-split1.yaml",
            "out": "folder to write",
        },
        {
            "shots": "numbers of labeled objects of each novel class (1,3,5,10)",
            "seeds": "number of draws (3)",
            "val": "COCO json of the val images, if data= is one",
            "images": "folder of its train images",
            "val_images": "folder of its val images (images=)",
        },
        "yolo-fewshot split data=VOC.yaml novel=voc-split1.yaml out=voc1",
    ),
    "studio": Command(
        studio,
        "label a few objects in the browser, see the detector learn them at once, and save it",
        {"model": "checkpoint, e.g. yolo11n.pt"},
        {
            "folder": "folder of the project, created or reopened (studio)",
            "source": "image, folder or video to add, e.g. photos",
            "frames": "number of frames to take from a video (20)",
            "imgsz": "image size (that of training)",
            "device": "device, e.g. 0 or cpu",
            "host": "address to listen on (127.0.0.1, for this machine alone)",
            "port": "port (a free one)",
            "open": "False to print the URL only",
        },
        "yolo-fewshot studio model=yolo11n.pt source=photos",
    ),
}


def usage(name: str | None = None) -> str:
    """Return the help of a subcommand, or of the whole command.

    Args:
        name (str, optional): Name of the subcommand; None for the whole command.

    Returns:
        (str): The text.
    """
    if name is None:
        rows = [f"  {k:<12}{c.help}" for k, c in COMMANDS.items()]
        lines = ["Usage: yolo-fewshot COMMAND key=value ...", "", "Commands:", *rows, ""]
        return "\n".join([*lines, "yolo-fewshot COMMAND --help lists the keys of a command."])
    c = COMMANDS[name]
    rows = [f"  {k + '=':<14}{text}" for k, text in c.required.items()]
    rows += [f"  [{k}=]{'':<{max(11 - len(k), 1)}}{text}" for k, text in c.optional.items()]
    return "\n".join([f"yolo-fewshot {name}: {c.help}", "", *rows, "", f"Example: {c.example}"])


def main(argv: list[str] | None = None) -> None:
    """Run the command.

    Args:
        argv (list[str], optional): Arguments; None for those of the process.

    Raises:
        SystemExit: For a command or argument that is unknown or missing, with a text that says so.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        name, rest = (argv[0], merge_equals_args(argv[1:])) if argv else ("help", [])
    except SyntaxError as e:
        raise SystemExit(f"{e}. Write key=value, in quotes if a value has brackets.") from e
    if name in {"help", "-h", "--help"}:
        print(usage(rest[0] if rest and rest[0] in COMMANDS else None))
        return
    if name not in COMMANDS:
        raise SystemExit(f"unknown command '{name}'.\n\n{usage()}")
    if {"help", "-h", "--help"} & set(rest):
        print(usage(name))
        return
    command, args = COMMANDS[name], {}
    for text in rest:
        key, _, value = text.partition("=")
        key = key.removeprefix("--").strip()
        if not value.strip():
            raise SystemExit(f"expected key=value, got '{text}'.\n\n{usage(name)}")
        valid = {**command.required, **command.optional}
        if key not in valid and "KEY" not in valid:
            similar = [f"{k}=" for k in difflib.get_close_matches(key, valid)]
            hint = f" Similar: {', '.join(similar)}." if similar else ""
            raise SystemExit(f"'{key}=' is not an argument of yolo-fewshot {name}.{hint}\n\n{usage(name)}")
        parsed = parse_key_value_pair(f"{key}={value}")[1]
        path = key in TEXTS or (name, key) == ("split", "val")
        args[key] = value.strip() if path and type(parsed) in {int, float} else parsed
    missing = [f"{k}=" for k in command.required if args.get(k) is None]
    if missing:
        raise SystemExit(f"{', '.join(missing)} must be given.\n\n{usage(name)}")
    try:
        command.run(**args)
    except (ModuleNotFoundError, OSError, RuntimeError, SyntaxError, TypeError, ValueError) as e:
        raise SystemExit(f"{type(e).__name__}: {e}") from e
