"""The Python interface: a YOLO model that can learn classes from a few examples."""

from __future__ import annotations

import threading
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from ultralytics import YOLO
from ultralytics.utils import LOGGER
from ultralytics.utils.torch_utils import select_device

from yolo_fewshot import args as table
from yolo_fewshot.data.support import Support, fingerprint, read_support, shown_beside
from yolo_fewshot.enroll import enroll as enrollment
from yolo_fewshot.enroll.features import support_views
from yolo_fewshot.errors import few, no_head
from yolo_fewshot.files import save_checkpoint
from yolo_fewshot.nn.model import FewShotDetectionModel
from yolo_fewshot.plots.support import FILE, plot_support


class FewShotYOLO(YOLO):
    """YOLO model with a few-shot head; `YOLO(...)` of a few-shot checkpoint is one, too.

    `predict`, `track`, `val` and `export` take Ultralytics' arguments and two more: `support`, the support set to
    enroll first, and `enroll`, the method. Where Ultralytics writes a run folder, all but `export` draw the shots, too.

    Threads may share a model: what changes it, or copies it to predict, waits for the others to do so.

    Attributes:
        shots (Shots | None): What was enrolled last.

    Examples:
        >>> from yolo_fewshot import FewShotYOLO
        >>> model = FewShotYOLO("best.pt")
        >>> model.enroll("shots.yaml")
        {'scooter': 5}
        >>> model.predict("street.jpg")
        >>> model.save("site-a.pt")
        >>> model.export(format="onnx")
    """

    predictor: Any
    shots: enrollment.Shots | None = None
    _given: tuple[Any, ...] | None = None  # what the classes of `support=` were enrolled from
    _undrawn = False

    def enroll(
        self,
        support: str | Path,
        imgsz: int | None = None,
        batch: int = 16,
        method: str = "auto",
        device: str | None = None,
        plot: str | Path | None = None,
        nms: bool | None = None,
    ) -> dict[str, int]:
        """Teach the model the classes that a support set shows, without training; all other classes stay as they are.

        Classes with a known name are enrolled anew, others are appended. Known classes that the support set shows
        beside new ones only, and in no image without them, are not shots: they stay as they are, and their objects
        there are negatives. The same holds for classes of its training beside any that it was not trained on.

        Args:
            support (str | Path): YOLO data.yaml, whose train split counts; .txt list of images with YOLO label files;
                or folder with one sub-folder of cropped images per class.
            imgsz (int, optional): Image size in pixels, that of training if not given.
            batch (int): Images per forward pass.
            method (str): 'mean': the mean embedding of the shots (Snell et al. 2017). 'fit': a classifier fitted on all
                anchors of the support images, with an L2 prior around that mean. 'auto': 'fit', unless 'mean' is
                clearly better, see `yolo_fewshot.enroll.enroll.choose`.
            device (str, optional): Device, as in Ultralytics; that of the model if not given.
            plot (str | Path, optional): Image of the shots to write, i.e. 'support_check.png'; none if not given.
            nms (bool, optional): As in `predict`: where it is False, suggested thresholds and `auto` are for the
                NMS-free branch of dual heads. Both branches are enrolled anyway.

        Returns:
            (dict[str, int]): Number of shots per enrolled class.

        Raises:
            TypeError: If the model has no few-shot head.
            FileNotFoundError: If the support set, or a image that it lists, does not exist.
            ValueError: If the support set is unusable, or an argument is invalid; the text says what to change.
        """
        with self._lock:
            return self._enroll(support, imgsz, batch, method, device, plot, nms)

    def _enroll(
        self,
        support: str | Path,
        imgsz: int | None,
        batch: int,
        method: str,
        device: str | None,
        plot: str | Path | None,
        nms: bool | None,
    ) -> dict[str, int]:
        """Enroll the classes of a support set, see `enroll`."""
        model = self._few_shot_model("enroll")
        table.check({"enroll": method})  # before the support set is read
        channels = model.yaml.get("channels") or 3
        shots = read_support(str(support), model.names, channels)  # the command line turns digits into an int
        kept = self._kept(model, shots)
        views = support_views((self.ckpt or {}).get("train_args") or {}, shots.crops)
        home, training = next(model.parameters()).device, model.training
        model.eval().to(home if device in (None, "") else select_device(device, verbose=False))
        try:
            size = imgsz or self.overrides.get("imgsz", 640)
            result = enrollment.enroll(model, shots, size, batch, method, views, kept, nms)
        finally:
            model.train(training).to(home)
        self._changed()
        self.shots = result
        enrollment.log(result)
        if plot:
            plot_support(result, model.names, plot)
        return {name: record["shots"] for name, record in result.classes.items()}

    def forget(self, name: str) -> FewShotYOLO:
        """Undo the enrollment of a class: remove it, or give a trained class its own classifier back.

        Args:
            name (str): Class name.

        Returns:
            (FewShotYOLO): The model.

        Raises:
            TypeError: If the model has no few-shot head.
            ValueError: If the class was not enrolled.
        """
        with self._lock:
            enrollment.forget(self._few_shot_model("forget"), name)
            self._changed()
        return self

    def fold(self) -> FewShotYOLO:
        """Turn the model into a stock one with the same outputs, for good: a stock `Detect` in a `DetectionModel`.

        A folded model is an ordinary YOLO model, and loads where this package is not installed. Nothing can be enrolled
        any more, so keep the checkpoint. Every export is folded, without this.

        Returns:
            (FewShotYOLO): The model.

        Raises:
            TypeError: If the model has no few-shot head.
        """
        with self._lock:
            self.model = self._few_shot_model("fold").fold()
            self._changed()
        return self

    def save(self, filename: str | Path = "saved_model.pt") -> None:
        """Save the model as Ultralytics does; the file is replaced at once, and the head keeps its float32 weights.

        Args:
            filename (str | Path): File to write.
        """
        buffer = BytesIO()
        with self._lock:
            super().save(buffer)
            buffer.seek(0)
            ckpt = torch.load(buffer, map_location="cpu", weights_only=False)
            ckpt["model"].model[-1].float().load_state_dict(self.model.model[-1].state_dict())
        save_checkpoint(ckpt, filename)

    def predict(self, source: Any = None, stream: bool = False, predictor: Any = None, **kwargs: Any) -> Any:
        """Predict as Ultralytics does, after enrolling the classes of `support`.

        Args:
            source (Any): Images or videos.
            stream (bool): Whether to return a generator.
            predictor (Any): Predictor class.
            **kwargs (Any): Ultralytics' arguments, `support` and `enroll`.

        Returns:
            (list[Results] | Iterator[Results]): Results.
        """
        with self._lock:
            new, kwargs = kwargs.get("support"), self._enroll_from(kwargs)
            enrolled = getattr(self.model, "enrolled", None)
            if enrolled and not (self.predictor or new) and kwargs.get("verbose", True):
                LOGGER.info(enrollment.table_of(enrolled))
            results = super().predict(source, True, predictor, **kwargs)  # a generator: the predictor has a lock itself
            self.predictor.stream = stream
            if self._undrawn and self.predictor.args.save:
                self._draw(self.predictor.save_dir)
        return results if stream or results is None else list(results)

    def val(self, validator: Any = None, **kwargs: Any) -> Any:
        """Validate as Ultralytics does, after enrolling the classes of `support`, with base and novel AP.

        Args:
            validator (Any): Validator class.
            **kwargs (Any): Ultralytics' arguments, `support` and `enroll`.

        Returns:
            (FewShotMetrics): Results.
        """
        with self._lock:
            kwargs = self._enroll_from(kwargs)
            metrics = super().val(validator, **kwargs)
            if self._undrawn and {**self.overrides, **kwargs}.get("plots", True):
                self._draw(metrics.save_dir)
        return metrics

    def export(self, **kwargs: Any) -> str:
        """Export the folded model as Ultralytics does, after enrolling the classes of `support`.

        Args:
            **kwargs (Any): Ultralytics' arguments, `support` and `enroll`.

        Returns:
            (str): Path of the exported model.
        """
        with self._lock:
            kwargs = self._enroll_from(kwargs)
            model = self.model
            if isinstance(model, FewShotDetectionModel):
                self.model = model.fold()
            try:
                return super().export(**kwargs)
            finally:
                self.model = model

    @staticmethod
    def _kept(model: FewShotDetectionModel, shots: Support) -> list[str]:
        """Return the known classes that a support set merely shows beside others, and log what becomes of the known."""
        known = [str(n) for n in model.names.values()]
        trained, enrolled = ([n for n in known if (n in model.enrolled) is x] for x in (False, True))
        beside = shown_beside(shots, known)
        by_kind = {
            "trained": (trained, shown_beside(shots, trained)),
            "already enrolled": (enrolled, [n for n in enrolled if n in beside]),
        }
        for kind, (names, kept) in by_kind.items():
            if kept:
                LOGGER.info(
                    f"{few(kept)}: {kind} classes, which stay as they are, for only images of other classes show "
                    "them. To enroll one anew, add a image of it by itself."
                )
            again = [n for n in names if n in shots.shown and n not in kept]
            if again:
                say = LOGGER.warning if names is trained else LOGGER.info
                say(
                    f"{few(again)}: {kind} classes, which are enrolled anew from these shots. If the shots mean "
                    "something else, give the class another name."
                )
        return [n for _, kept in by_kind.values() for n in kept]

    def _enroll_from(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Enroll what `support` and `enroll` among some arguments ask for, and return the others.

        The same support set is not enrolled twice in a row, so that it may be given frame by frame; it is the same as
        long as none of its files has changed.
        """
        if kwargs.get("support") is None or not isinstance(self.model, FewShotDetectionModel):
            return {k: v for k, v in kwargs.items() if k != "enroll"}  # Ultralytics refuses `support` here
        kwargs = dict(kwargs)
        support, method = str(kwargs.pop("support")), kwargs.pop("enroll", None) or "auto"
        table.check({"enroll": method})  # before the support set is looked at
        imgsz = kwargs.get("imgsz")
        imgsz = max(imgsz) if isinstance(imgsz, (list, tuple)) else imgsz
        asked = {**self.overrides, **kwargs}
        nms = False if asked.get("end2end") else asked.get("nms")  # Ultralytics' old name of nms=False
        given = (id(self.model), fingerprint(support), method, imgsz, nms is False)
        if self.__dict__.get("_given") != given:
            self.enroll(support, imgsz=imgsz, method=method, device=kwargs.get("device"), nms=nms)
            self._given, self._undrawn = given, True
        return kwargs

    def _draw(self, folder: Path) -> None:
        """Draw the shots of `support` into a run folder, the first one after they were enrolled."""
        self._undrawn = False
        if self.shots:
            plot_support(self.shots, self.model.names, folder / FILE)

    def _changed(self) -> None:
        """Drop what belongs to the model as it was: the predictor, which holds a copy, and the last support set."""
        self.predictor = self._given = self.shots = None
        self._undrawn = False

    @property
    def _lock(self) -> threading.RLock:
        """Lock of this model, which its copies and pickles do not share."""
        return self.__dict__.setdefault("_own_lock", threading.RLock())

    def __getstate__(self) -> dict[str, Any]:
        """Return what is copied and pickled."""
        return {k: v for k, v in self.__dict__.items() if k != "_own_lock"}

    def _few_shot_model(self, what: str) -> FewShotDetectionModel:
        """Return the network, or raise a TypeError that says how to get one with a few-shot head."""
        if not isinstance(self.model, FewShotDetectionModel):
            raise TypeError(no_head(self, f"{what}()"))
        return self.model
