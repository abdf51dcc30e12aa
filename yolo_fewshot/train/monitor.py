"""Gradient and chance level of each loss term during training, and a report on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from ultralytics.nn.distill_model import DistillationModel

from yolo_fewshot.nn.criterion import FewShotLoss, branch_losses, gain_of, part_gradients
from yolo_fewshot.nn.model import FewShotDetectionModel
from yolo_fewshot.nn.passes import Pass
from yolo_fewshot.train.guard import summarize

AT_CHANCE = 0.95  # a term at or above this fraction of its chance level has not been learned
DOMINANT = 0.5  # share of the gradient above which a term dominates
CLAMPED = 0.01  # fraction of the steps above which clamps of the mean DFL are reported
COUNTS = ("steps", "clipped", "skipped", "overflows", "sides_clamped", "means_clamped")  # columns train/...
UNTRAINED = "no better than those of an untrained model: {first}, or set a larger lr0"
OWN = "it has not been learned yet: set a larger lr0, or leave it out"  # for a term of the user's own
REMEDIES = {
    "box": f"boxes are {UNTRAINED}",
    "cls": f"class scores are {UNTRAINED}",
    "dfl": f"boxes are {UNTRAINED}",
    "l1": f"boxes are {UNTRAINED}",
    "epi": "prototypes do not separate the classes yet: train longer, or set a larger lr0",
    "sup": "embeddings of objects do not cluster by class: raise n_way or k_shot, or set supcon=0 to save its time",
    "cpe": "embeddings of anchors do not cluster by class: raise n_way, or set cpe=0 to save its time",
    "tea": "the old classes are forgotten in the images of the shots: set a smaller lr0 or blend",
    "mem": "the old classes are forgotten: set a smaller lr0 or blend",
    "tri": "objects are no closer to their own prototype than to others: train longer, or set triplet=0",
}


class LossMonitor:
    """Measures the gradient of each term at the neck's output and the term's chance level, once in `every` batches.

    The chance level is the value of the term for a head that has learned nothing, see `FewShotLoss.chance`. In models
    with two branches, gradients are measured in the one-to-many branch, since the other one sends none to the neck, and
    chance levels in the one-to-one branch, whose terms Ultralytics logs. A turned episode has no class loss, so the
    next one that is not turned is measured in its place.

    Attributes:
        every (int): Batches from one measurement to the next; the first batch of an epoch is measured. 0 for none.
        terms (list[str]): Names of the terms without `_loss`.
        norms (list[torch.Tensor]): Gradient norms of the terms, (T,) for each measurement of the epoch.
        chance (list[torch.Tensor]): Chance levels, (T,) for each, weighted by the gains as the terms are.
    """

    def __init__(self, every: int):
        """Initialize the monitor.

        Args:
            every (int): Batches from one measurement to the next.
        """
        self.every, self._scale = every, 1.0
        self.terms: list[str] = []
        self._hook: RemovableHandle | None = None
        self.reset()

    def reset(self) -> None:
        """Drop the measurements, as at the start of an epoch."""
        self.batches = 0
        self.norms: list[torch.Tensor] = []
        self.chance: list[torch.Tensor] = []

    def begin_batch(self, model: FewShotDetectionModel | DistillationModel, scaler: torch.amp.GradScaler) -> None:
        """Count a batch, and measure its terms if it is due.

        Args:
            model (FewShotDetectionModel | DistillationModel): Model in training, not wrapped for several GPUs.
            scaler (torch.amp.GradScaler): Scaler of the run, without which gradients vanish in float16.
        """
        if self.every and self.batches % self.every == 0:
            losses = branch_losses(model)
            student = model.student_model if isinstance(model, DistillationModel) else model
            self._hook = self._hook or student.model[-1].register_forward_pre_hook(_separate)
            self._scale = scaler.get_scale()
            for loss, observe in ((losses[0], self._measure_gradients), (losses[-1], self._measure_chance)):
                if observe not in loss.observers:  # left there if the last batch failed before its loss
                    loss.observers.append(observe)
        self.batches += 1

    def _measure_gradients(self, loss: FewShotLoss, this: Pass) -> None:
        """Measure the norm of the gradient of every term with respect to the feature maps of the neck."""
        self.terms = [k.removesuffix("_loss") for k in loss.loss_names]
        if _postponed(loss, this, self._measure_gradients):
            return
        if self._hook:
            self._hook.remove()
            self._hook = None
        norms = []
        for part in loss.parts(this).values():
            grads = part_gradients(part * self._scale, list(this.preds["feats"]))
            norm = torch.nn.utils.get_total_norm([g.float() / self._scale for g in grads if g is not None])
            norms.append(norm.float().to(part.device))
        self.norms.append(torch.stack(norms))

    def _measure_chance(self, loss: FewShotLoss, this: Pass) -> None:
        """Measure the chance level of every term."""
        if not _postponed(loss, this, self._measure_chance):
            self.chance.append(loss.chance(this))

    def columns(self) -> dict[str, float]:
        """Return the columns for results.csv: means over the finite measurements of the epoch.

        Returns:
            (dict[str, float]): `grad/<term>`, gradient norm of the weighted term; `share/<term>`, its fraction of the
                sum over all terms; `chance/<term>`, its chance level in the units of `train/<term>_loss`.
        """
        if not self.every:
            return {}
        norms, chance = (torch.stack(x).cpu().double() if x else torch.zeros(0, 0) for x in (self.norms, self.chance))
        ok = torch.isfinite(norms).all(1) & torch.isfinite(chance).all(1)
        n = len(self.terms)
        norms, chance = (x[ok].mean(0) if ok.any() else torch.zeros(n) for x in (norms, chance))
        share = norms / norms.sum().clamp(min=1e-30)
        tables = {"grad": norms, "share": share, "chance": chance}
        return {f"{k}/{t}": float(f"{v:.5g}") for k, row in tables.items() for t, v in zip(self.terms, row.tolist())}


def _postponed(loss: FewShotLoss, this: Pass, observe: Callable[[FewShotLoss, Pass], None]) -> bool:
    """Observe the next batch in place of a turned episode, unless all are turned, and return whether that is so."""
    later = bool(this.batch.get("turned")) and loss.hyp.turned < 1
    if later:
        loss.observers.append(observe)
    return later


def _separate(head: nn.Module, inputs: tuple[list[torch.Tensor], ...]) -> tuple[list[torch.Tensor], ...]:
    """Give every feature map its own graph node, since maps depend on one another, and a gradient even if frozen."""
    views = [x.view_as(x) for x in inputs[0]]
    return ([x if x.requires_grad else x.requires_grad_() for x in views], *inputs[1:])


def report(rows: list[dict[str, float]], args: Any) -> str:
    """Report on the loss terms: which dominate, which are at chance, and what was clamped and skipped.

    Args:
        rows (list[dict[str, float]]): Rows of results.csv, one for each epoch.
        args (Any): Arguments of the run.

    Returns:
        (str): One paragraph; "" if nothing was measured.
    """
    measured = [k.removeprefix("share/") for k in rows[-1] if k.startswith("share/")] if rows else []
    terms = [t for t in measured if gain_of(t, args)[1] != 0]  # the others were not computed
    if not terms:
        return ""
    last = rows[-1]
    shares = {t: last[f"share/{t}"] for t in terms}
    top = max(shares, key=lambda t: shares[t])
    ranked = ", ".join(f"{t} {v:.0%}" for t, v in sorted(shares.items(), key=lambda x: -x[1]))
    sentences = [f"Gradient at the neck by term: {ranked}."]
    if shares[top] > DOMINANT:
        key, gain = gain_of(top, args)
        sentences.append(f"{top} dominates; lower {f'{key}={gain}' if key else 'its gain'} if it should not.")
    idle = [t for t in terms if last[f"chance/{t}"] > 0 and last[f"train/{t}_loss"] >= AT_CHANCE * last[f"chance/{t}"]]
    for t in idle:
        value, chance = last[f"train/{t}_loss"], last[f"chance/{t}"]
        remedy = REMEDIES.get(t, OWN).format(first="train stage 1 first" if args.stage == 2 else "train longer")
        sentences.append(f"{t} is at chance ({value:.4g}, chance {chance:.4g}): {remedy}.")
    if not idle:
        sentences.append("No term is at chance.")
    count = {k: int(sum(r[f"train/{k}"] for r in rows)) for k in COUNTS}
    sentences.append(summarize(count))
    if count["skipped"]:
        sentences.append("The warnings in the log name the cause and what to change.")
    if count["means_clamped"] or count["sides_clamped"]:
        sentences.append(
            f"The DFL was clamped {count['means_clamped']} times in its mean and on {count['sides_clamped']} sides."
        )
    if count["means_clamped"] > count["steps"] * CLAMPED and args.dfl_clamp_mode == "hard":
        sentences.append("A hard clamp passes no gradient: set dfl_clamp_mode=rescale, or train stage 1 first.")
    return " ".join(sentences)
