"""What to know before a long run: the data, the losses of the first batch, and what the recipe will cost."""

from __future__ import annotations

import logging
import math
import statistics
import tempfile
import time
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
    check_boxes,
    check_classes,
    check_duplicates,
    check_names,
    check_shots,
    read_split,
)
from yolo_fewshot.train.trainer import FewShotTrainer

STEPS = 8  # of the rehearsal; the time of the first two is not counted
MARKS = {"ok": "✅", "warning": "⚠️", "error": "❌"}
FAR = 2.0  # times its chance level, above which a term is worth a warning


class RehearsalOver(Exception):
    """Ends a rehearsal."""


class Rehearsal(FewShotTrainer):
    """A training run of a few steps that calls no logger and is thrown away.

    Attributes:
        first (dict[str, float]): Weighted terms of the first batch.
        seconds (list[float]): Duration of each step, the loading of its images included.
        memory (int): Most memory in use, in bytes: of the GPU, or else of this process.
    """

    def run_callbacks(self, event: str) -> None:
        """Do what the trainer does at an event, and take the measurements, but run nobody's callbacks.

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
            self._start = now  # validation is not counted
        elif event == "on_train_batch_end":
            if not self.seconds:
                self.first = {k: float(v) for k, v in self.loss_items.items()}
            self.seconds.append(now - self._start)
            self._start = now
            self.memory = max(self.memory, self._used())
            if len(self.seconds) == STEPS:
                raise RehearsalOver

    def final_eval(self) -> None:
        """End a rehearsal that has fewer steps than it could have.

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
    """Look at the data and rehearse a training run, and log what was found.

    Args:
        data (str): data.yaml.
        model (str): Model to train.
        cfg (str): Recipe.
        **overrides (Any): Any other argument of `yolo train`.

    Returns:
        (list[Finding]): What was found.

    Raises:
        SyntaxError: If an argument is misspelt.
        TypeError: If an argument has a wrong type.
        ValueError: If an argument is out of its range.
        FileNotFoundError: If the data or the model does not exist.
    """
    if overrides.get("resume"):
        raise ValueError("'resume=' is no setting of the doctor, which looks at a run before it starts.")
    settings = {**overrides, "data": str(data), "model": str(model)}
    given = vars(get_cfg({**DEFAULT_CFG_DICT, "save_dir": ""}, {**YAML.load(check_yaml(cfg)), **settings}))
    table.refuse_support(given)
    table.check(given)
    args = get_cfg(given, table.resolve(given))
    found: list[Finding] = []

    def say(title: str, findings: list[Finding]) -> None:
        LOGGER.info(f"\n{colorstr('bold', title)}")
        for level, text in findings:
            LOGGER.info(f"{MARKS[level]} {text}")
        found.extend(findings)

    described = check_det_dataset(args.data)
    splits = [read_split(described, name) for name in ("train", "val")]
    say("Boxes", [f for s in splits for f in check_boxes(s)])
    classes = check_names(described["names"])
    if args.stage != 3:  # which keeps what it has no shots of
        classes += [check_classes(s, described["names"]) for s in splits]
    if classes:
        say("Classes", classes)
    say("Train and val", [check_duplicates(*splits)])
    say("Shots", check_shots(splits[0], described["names"], args))
    if any(f.level == "error" for f in found):
        LOGGER.info("\nThe losses, the time and the memory are looked at when the errors above are gone.")
        return found
    with tempfile.TemporaryDirectory() as folder:
        quiet = {"project": folder, "name": "rehearsal", "save_dir": None, "plots": False, "val": False}
        one = parse_device(args.device).split(",")[0]  # one process, whatever the run has
        quiet |= {"doctor": STEPS, "device": one}
        level = LOGGER.level
        LOGGER.setLevel(logging.WARNING)
        try:
            trainer = Rehearsal(cfg, {**settings, **quiet})
            trainer.train()
        except RehearsalOver:
            pass
        except (MemoryError, FloatingPointError) as e:
            LOGGER.setLevel(level)
            say("First steps", [Finding("error", str(e))])
            return found
        finally:
            LOGGER.setLevel(level)
    say("Loss terms of the first batch", compare_terms(trainer))
    say("Time and memory", [estimate(trainer)])
    return found


def compare_terms(trainer: Rehearsal) -> list[Finding]:
    """Compare the terms of the first batch with their chance levels, see `FewShotLoss.chance`.

    Args:
        trainer (Rehearsal): A rehearsal that is over.

    Returns:
        (list[Finding]): One line for each term.
    """
    if not trainer.doctor.chance:
        return [Finding("ok", f"{k:<10}{v:9.4g}") for k, v in trainer.first.items()]
    chance, shares = trainer.doctor.chance[0].tolist(), trainer.doctor.norms[0]
    shares = (shares / shares.sum().clamp(min=1e-30)).tolist()
    found = []
    for (name, value), expected, share in zip(trainer.first.items(), chance, shares):
        text = f"{name:<10}{value:9.4g}, chance {expected:9.4g}, {share:4.0%} of the gradient"
        if not math.isfinite(value):
            found.append(Finding("error", f"{text}: not finite. The warning above names the cause."))
        elif expected > 0 and value > FAR * expected:
            found.append(Finding("warning", f"{text}: far above chance. The first steps will bring it down."))
        else:
            found.append(Finding("ok", text))
    return found


def estimate(trainer: Rehearsal) -> Finding:
    """Estimate what the recipe will take.

    Args:
        trainer (Rehearsal): A rehearsal that is over.

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
    """Return a duration in words."""
    for unit, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 1.5 * unit:
            return f"{seconds / unit:.2g} {name}" if seconds < 10 * unit else f"{seconds / unit:.0f} {name}"
    return f"{seconds:.2g} s"
