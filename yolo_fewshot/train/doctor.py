"""`yolo-fewshot doctor`: check the data and rehearse a run before it starts; `monitor.py` measures a run itself."""

from __future__ import annotations

import logging
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from ultralytics.cfg import get_cfg
from ultralytics.data.utils import check_det_dataset
from ultralytics.utils import DEFAULT_CFG_DICT, LOGGER, YAML, colorstr
from ultralytics.utils.checks import check_yaml
from ultralytics.utils.torch_utils import parse_device

from yolo_fewshot import args as table
from yolo_fewshot.data.checks import (
    Finding,
    Split,
    check_boxes,
    check_classes,
    check_duplicates,
    check_names,
    check_shots,
    read_split,
)
from yolo_fewshot.errors import few
from yolo_fewshot.inputs import check_checkpoint, check_yaml_file
from yolo_fewshot.train.meta_validation import MIN_IMAGES, choose_classes
from yolo_fewshot.train.trainer import FewShotTrainer

STEPS = 8  # of the rehearsal; the first two do not count for the time
MARKS = {"ok": "✅", "warning": "⚠️", "error": "❌"}
FAR = 2.0  # multiple of its chance level above which a term gets a warning


class RehearsalOver(Exception):
    """Ends the training loop of a rehearsal."""


class Rehearsal(FewShotTrainer):
    """A training run of a few steps in a temporary folder, without the callbacks of loggers and users.

    Attributes:
        first (dict[str, float]): Weighted terms of the first batch that the monitor has measured.
        compared (bool): Whether there is one.
        seconds (list[float]): Duration of each step, including the loading of its images.
        memory (int): Peak memory in bytes, of the GPU or else of this process.
    """

    first: dict[str, float]
    compared = False
    seconds: list[float]
    memory: int

    def run_callbacks(self, event: str) -> None:
        """Run the trainer's own callback of an event, and measure time and memory.

        Args:
            event (str): Name of the event.

        Raises:
            RehearsalOver: After the last step.
        """
        if event in self.listeners():
            self.listeners()[event](self)
        now = time.perf_counter()
        if event == "on_train_start":
            self.seconds, self.memory = [], 0
        elif event == "on_train_epoch_start":
            self._start = now  # without validation
        elif event == "on_train_batch_end":
            if not self.seconds or (self.monitor.chance and not self.compared):  # a turned episode is not measured
                self.compared = bool(self.monitor.chance)
                self.first = {k: float(v) for k, v in self.loss_items.items()}
            self.seconds.append(now - self._start)
            self._start = now
            self.memory = max(self.memory, self._used())
            if len(self.seconds) == STEPS:
                raise RehearsalOver

    def final_eval(self) -> None:
        """End the rehearsal of a run that has fewer than `STEPS` steps.

        Raises:
            RehearsalOver: Always.
        """
        raise RehearsalOver

    def _used(self) -> int:
        """Return the memory in use, in bytes."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_reserved(self.device)
        return psutil.Process().memory_info().rss


def doctor(data: str, model: str, cfg: str = "stage2.yaml", **overrides: Any) -> list[Finding]:
    """Check the data, rehearse a training run, and log the findings.

    Args:
        data (str): data.yaml.
        model (str): Model to train.
        cfg (str): Recipe.
        **overrides (Any): Any other argument of `yolo train`.

    Returns:
        (list[Finding]): The findings.

    Raises:
        SyntaxError: If an argument is misspelled.
        TypeError: If an argument has a wrong type.
        ValueError: If an argument is out of its range.
        FileNotFoundError: If the data or the model does not exist.
    """
    if overrides.get("resume"):
        raise ValueError(
            "'resume=' is not an argument of the doctor, which checks a run before it starts. Leave it out."
        )
    check_yaml_file("cfg", cfg)
    if Path(model).suffix.lower() not in {".yaml", ".yml"}:
        check_checkpoint(model)
        if Path(model).suffix != ".pt":
            raise ValueError(
                f"'model={model}' is an invalid value. Training starts from a *.pt checkpoint or a *.yaml."
            )
    settings = {**overrides, "data": str(data), "model": str(model)}
    given = vars(get_cfg({**DEFAULT_CFG_DICT, "save_dir": ""}, {**YAML.load(check_yaml(cfg)), **settings}))
    table.refuse_support(given)
    table.check(given)
    args = get_cfg(given, table.resolve(given))
    found: list[Finding] = []

    def add(title: str, findings: list[Finding]) -> None:
        """Log findings and keep them."""
        LOGGER.info(f"\n{colorstr('bold', title)}")
        for level, text in findings:
            LOGGER.info(f"{MARKS[level]} {text}")
        found.extend(findings)

    if str(args.data).endswith(".ndjson"):
        raise ValueError(f"'data={args.data}' has to be a data.yaml here. 'yolo train' writes one beside the images.")
    described = check_det_dataset(args.data)
    splits = [read_split(described, name) for name in ("train", args.split)]
    add("Boxes", [f for s in splits for f in check_boxes(s)])
    classes = check_names(described["names"])
    if args.stage != 3:  # stage 3 keeps classes without shots
        classes += [check_classes(s, described["names"]) for s in splits]
    if classes:
        add("Classes", classes)
    add("Train and val", [check_duplicates(*splits)])
    held_out: list[int] = []
    if args.meta_val:
        chosen = choose_classes(described["names"], args.meta_val, args.seed)
        held_out = [i for i, n in described["names"].items() if str(n) in chosen]
        add("Classes of meta_val", [_check_held_out(splits, described["names"], held_out)])
    add("Shots", check_shots(splits[0], described["names"], args, held_out))
    if any(f.level == "error" for f in found):
        LOGGER.info("\nCorrect the errors above to check the losses, time and memory.")
        return found
    with tempfile.TemporaryDirectory() as folder:
        quiet: dict[str, Any] = {"project": folder, "name": "rehearsal", "save_dir": None, "plots": False, "val": False}
        one = parse_device(args.device).split(",")[0]  # one process, also for a run on several GPUs
        quiet |= {"doctor": STEPS, "device": one, "meta_val": None}  # which needs a validation after every epoch
        level = LOGGER.level
        LOGGER.setLevel(logging.WARNING)
        try:
            trainer = Rehearsal(cfg, {**settings, **quiet})
            trainer.train()
        except RehearsalOver:
            pass
        except (MemoryError, FloatingPointError) as e:
            LOGGER.setLevel(level)
            add("First steps", [Finding("error", str(e))])
            return found
        finally:
            LOGGER.setLevel(level)
    add("Loss terms of the first batch", compare_terms(trainer))
    add("Time and memory", [estimate(trainer)])
    return found


def _check_held_out(splits: list[Split], names: dict[int, str], held_out: list[int]) -> Finding:
    """Check whether the classes that `meta_val` keeps out have enough train and val images."""
    counts = {c: [sum((b[:, 0] == c).any() for b in s.boxes) for s in splits] for c in held_out}
    scarce = [f"{names[c]} ({a} and {b})" for c, (a, b) in counts.items() if a < MIN_IMAGES or not b]
    if scarce:
        text = f"Too few train and val images of {few(scarce)}: each class needs {MIN_IMAGES} and one. Label more, or "
        return Finding("error", f"{text}set another seed=, which chooses other classes.")
    return Finding("ok", f"{few([str(names[c]) for c in held_out])} are kept out of training, and have enough images.")


def compare_terms(trainer: Rehearsal) -> list[Finding]:
    """Compare the terms of the first batch with their chance levels, which `FewShotLoss.chance` defines.

    Args:
        trainer (Rehearsal): A finished rehearsal.

    Returns:
        (list[Finding]): One finding for each term.
    """
    if not trainer.monitor.chance:
        return [Finding("ok", f"{k:<10}{v:9.4g}") for k, v in trainer.first.items()]
    chance, norms = trainer.monitor.chance[0].tolist(), trainer.monitor.norms[0]
    shares = (norms / norms.sum().clamp(min=1e-30)).tolist()
    found = []
    for (name, value), expected, share in zip(trainer.first.items(), chance, shares):
        text = f"{name:<10}{value:9.4g}, chance {expected:9.4g}, {share:4.0%} of the gradient"
        if not math.isfinite(value):
            found.append(Finding("error", f"{text}: not finite. The warning above names the cause."))
        elif expected > 0 and value > FAR * expected:
            found.append(Finding("warning", f"{text}: far above chance. It should fall in the first steps."))
        else:
            found.append(Finding("ok", text))
    return found


def estimate(trainer: Rehearsal) -> Finding:
    """Estimate the time and memory of the whole run.

    Args:
        trainer (Rehearsal): A finished rehearsal.

    Returns:
        (Finding): Time and memory.
    """
    step, n = statistics.median(trainer.seconds[2:] or trainer.seconds[-1:]), len(trainer.train_loader)
    cuda = trainer.device.type == "cuda"
    total = torch.cuda.get_device_properties(trainer.device).total_memory if cuda else psutil.virtual_memory().total
    text = (
        f"{step:.3g} s a step on {trainer.device}, {_duration(step * n)} an epoch of {n} steps, "
        f"{_duration(step * n * trainer.epochs)} for epochs={trainer.epochs}, without validation. Memory: "
        f"{trainer.memory / 2**30:.3g} of {total / 2**30:.3g} GiB {'of the GPU' if cuda else 'in this process'}."
    )
    return Finding("warning" if trainer.memory > 0.9 * total else "ok", text)


def _duration(seconds: float) -> str:
    """Format a duration."""
    for unit, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 1.5 * unit:
            return f"{seconds / unit:.2g} {name}" if seconds < 10 * unit else f"{seconds / unit:.0f} {name}"
    return f"{seconds:.2g} s"
