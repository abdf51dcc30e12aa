"""Diagnose a step that is not finite: run the batch again and name the first tensor with NaN or Inf."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import nn
from ultralytics.nn.distill_model import DistillationModel
from ultralytics.nn.tasks import BaseModel

from yolo_fewshot.args import STOCK_GAINS
from yolo_fewshot.errors import few
from yolo_fewshot.nn.criterion import RETENTION_TERMS, FewShotLoss, branch_losses, gain_of, part_gradients
from yolo_fewshot.nn.own_terms import load_terms
from yolo_fewshot.nn.passes import Pass
from yolo_fewshot.nn.terms import BUILT_IN
from yolo_fewshot.train.guard import nonfinite

# Keys of terms that are not computed with a gain of 0. All other terms are multiplied by it, and 0 times NaN is NaN.
SKIPPED = frozenset((*(t.gain for t in BUILT_IN), *RETENTION_TERMS.values())).difference(STOCK_GAINS)
FAR = 2.0  # a normalized box coordinate beyond this is a corrupt label, not one that an augmentation moved


class Diagnosis(NamedTuple):
    """Cause of a step that is not finite.

    Attributes:
        what (str): First parameter whose gradient is not finite, with its minimum, maximum and mean, or another tensor.
        where (str): Classes and image files of the batch.
        terms (list[str]): Names of the loss terms whose value or gradient is not finite.
        cause (str): Likely cause.
        advice (str): What to change, with the key.
        certain (bool): Whether running the batch again reproduced it.
        overflow (bool): Whether only the scale of AMP was too large, which AMP corrects by itself.
    """

    what: str
    where: str
    terms: list[str]
    cause: str
    advice: str
    certain: bool = True
    overflow: bool = False

    def __str__(self) -> str:
        """Return the diagnosis in a few sentences."""
        terms = f" Loss terms not finite: {', '.join(self.terms)}." if self.terms else ""
        return f"{self.what}.{terms} {self.where} Likely cause: {self.cause}. {self.advice}"


class _Rerun(NamedTuple):
    """Result of running a batch again: terms and first layer that are not finite, and whether all is finite."""

    terms: list[str]
    layer: str
    finite: bool


def diagnose(
    model: BaseModel | DistillationModel,
    batch: dict[str, Any],
    names: dict[int, str],
    autocast: Callable[[], contextlib.AbstractContextManager],
    float16: bool,
    scaled: bool,
) -> Diagnosis:
    """Find the cause of a loss or gradient that is not finite.

    The gradients of the model and the random state are kept; the statistics of BatchNorm change.

    Args:
        model (BaseModel | DistillationModel): Model in training, not wrapped, with the gradients of the step.
        batch (dict): The last batch of the step, preprocessed.
        names (dict[int, str]): Class names.
        autocast (Callable): Returns the context of the forward pass.
        float16 (bool): Whether that is mixed precision with float16.
        scaled (bool): Whether the loss was scaled for AMP, and finite.

    Returns:
        (Diagnosis): The diagnosis.
    """
    what, where = describe_gradients(model), describe_batch(batch, names)
    weights = nonfinite(dict(model.named_parameters()))
    files = _files(batch)
    images = [f for f, ok in zip(files, torch.isfinite(batch["img"]).flatten(1).all(1).tolist()) if not ok]
    labels = []
    if "bboxes" in batch:
        corrupt = ~(batch["bboxes"][:, :4].float().abs() <= FAR).all(1)  # also true for NaN; a fifth column is an angle
        labels = sorted({files[int(i)] for i in batch["batch_idx"][corrupt]})
    run = _rerun(model, batch, autocast)
    if run and run.finite and scaled:
        cause, advice = "the gradient times the scale of AMP overflows float16", "AMP halves the scale."
        return Diagnosis(what, where, [], cause, advice, certain=False, overflow=True)
    if weights:
        cause, advice = f"the weights of {few(weights)} are not finite", "If it happens again, set a smaller lr0."
    elif images:
        cause = f"pixels of {few(images)} are not finite"
        advice = "Repair or remove them, or check the augmentations."
    elif labels:
        cause = f"labels of {few(labels)} are not finite or lie far outside the image"
        advice = "Correct them; 'yolo-fewshot doctor' finds such labels."
    elif run is None:
        cause, advice = "unknown, since there is not enough memory to run the batch again", "Set a smaller lr0."
        return Diagnosis(what, where, [], cause, advice, certain=False)
    elif run.finite:
        cause, advice = "unknown, since the batch is finite when run again", "If it continues, set a smaller lr0."
        return Diagnosis(what, where, [], cause, advice, certain=False)
    elif float16 and (full := _rerun(model, batch, contextlib.nullcontext)) and full.finite:
        cause, advice = f"float16 cannot hold what {run.layer or 'the loss'} computes", "Set amp=bf16 or amp=False."
    elif run.layer:
        cause, advice = f"the output of {run.layer} is not finite", "Set a smaller lr0 or grad_clip."
    elif run.terms:
        cause = f"{few(run.terms)} {'is' if len(run.terms) == 1 else 'are'} not finite for finite predictions"
        advice = _advice_on(run.terms, model.args)
    else:
        cause, advice = "the gradient overflows on its way through the network", "Set a smaller lr0 or grad_clip."
    return Diagnosis(what, where, run.terms if run else [], cause, advice)


def _advice_on(terms: list[str], args: SimpleNamespace) -> str:
    """Return what to change where terms are not finite for finite predictions."""
    keys = {t: gain_of(t, args)[0] for t in terms}
    if SKIPPED.issuperset(keys.values()):
        return f"Set {', '.join(f'{k}=0' for k in dict.fromkeys(keys.values()))} to train without, or a smaller lr0."
    own = {t.name for t in load_terms(getattr(args, "terms", None))}.intersection(terms)
    check = f"Check the forward of {few(sorted(own))}, or set" if own else "Set"
    return f"{check} a smaller lr0 or grad_clip."


def describe_gradients(model: nn.Module) -> str:
    """Name the first parameter whose gradient has a NaN or Inf.

    Args:
        model (nn.Module): Model with gradients.

    Returns:
        (str): Name of the parameter, minimum, maximum and mean of its gradient; another text if all are finite.
    """
    grads = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    bad = nonfinite(grads)
    if not bad:
        return "loss, statistics or norm of the gradient"
    g = grads[bad[0]].float()
    return f"gradient in {bad[0]}: min={g.min():.4g}, max={g.max():.4g}, mean={g.mean():.4g}"


def describe_batch(batch: dict[str, Any], names: dict[int, str]) -> str:
    """Describe a batch: the drawn classes of an episode or the labeled classes, and the image files.

    Args:
        batch (dict): Collated batch of any task.
        names (dict[int, str]): Class names.

    Returns:
        (str): The text.
    """
    drawn = batch["way"] if "way" in batch else batch.get("cls", torch.zeros(0)).flatten()
    classes = [str(names.get(c, c)) for c in sorted({int(c) for c in drawn.tolist() if c >= 0})]
    kind = "Episode" if "way" in batch else "Batch"
    return f"{kind} of {', '.join(classes) or 'no class'}: {', '.join(_files(batch))}."


def _files(batch: dict[str, Any]) -> list[str]:
    """Return the image files of a batch, or positions in it where it has none, as in classification."""
    return list(batch.get("im_file") or (f"image {i}" for i in range(len(batch["img"]))))


def _rerun(
    model: BaseModel | DistillationModel,
    batch: dict[str, Any],
    autocast: Callable[[], contextlib.AbstractContextManager],
) -> _Rerun | None:
    """Run a batch again, keeping gradients and random state; None if there is not enough memory."""
    losses = [x for x in branch_losses(model) if isinstance(x, FewShotLoss)]  # a stock model has none
    terms: list[str] = []

    def observe(loss: FewShotLoss, this: Pass) -> None:
        outputs = [this.preds[k] for k in ("boxes", "scores", "embeds") if k in this.preds]
        for name, part in loss.parts(this).items():
            grads = [g for g in part_gradients(part, outputs) if g is not None]
            if nonfinite(dict(enumerate((part, *grads)))) and name not in terms:
                terms.append(name)

    devices = [batch["img"].device] if batch["img"].device.type == "cuda" else []
    with contextlib.ExitStack() as stack, torch.enable_grad(), torch.random.fork_rng(devices):
        for loss in losses:
            stack.enter_context(loss.without_side_effects())
            stack.callback(setattr, loss, "observers", loss.observers)
            loss.observers = [observe]
        layers = stack.enter_context(_nonfinite_layers(model))
        try:
            with autocast():
                total, items = model.loss(batch)
                total = total.sum()
            parameters = {k: p for k, p in model.named_parameters() if p.requires_grad}
            grads = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
        except RuntimeError as e:
            if "out of memory" not in str(e).lower():
                raise
            return None
    terms += [] if losses else nonfinite(items)
    bad = nonfinite({"loss": total, **{k: g for k, g in zip(parameters, grads) if g is not None}})
    return _Rerun(terms, layers[0] if layers else "", not bad and not terms)


@contextlib.contextmanager
def _nonfinite_layers(model: BaseModel | DistillationModel) -> Iterator[list[str]]:
    """Collect the names of the layers whose output is not finite while the context is open."""
    found: list[str] = []

    def watcher(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, _: Any, output: Any) -> None:
            if not all(torch.isfinite(t).all() for t in _tensors(output)):
                found.append(f"layer {name} ({type(layer).__name__})")

        return hook

    layers = getattr(model, "student_model", model).model  # in a distillation, the model that is trained
    handles = [m.register_forward_hook(watcher(f"model.{i}")) for i, m in enumerate(layers)]
    try:
        yield found
    finally:
        for h in handles:
            h.remove()


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    """Yield the floating-point tensors of a layer's output, which is a dict for the head."""
    if isinstance(output, torch.Tensor):
        yield from [output] if output.is_floating_point() else []
    elif isinstance(output, (dict, list, tuple)):
        for part in output.values() if isinstance(output, dict) else output:
            yield from _tensors(part)
