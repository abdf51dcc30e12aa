"""Python interface: a YOLO model that enrolls classes from a few examples."""

from __future__ import annotations

import os
import threading
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from ultralytics import YOLO
from ultralytics.utils import LOGGER
from ultralytics.utils.torch_utils import select_device

from yolo_fewshot import args as keys
from yolo_fewshot.class_names import warn_near_duplicates
from yolo_fewshot.data.support import (
    LAYOUTS,
    Support,
    background_fingerprint,
    fingerprint,
    incidental_classes,
    read_background,
    read_support,
    without_shots,
)
from yolo_fewshot.enroll import enroll as enrollment
from yolo_fewshot.enroll.features import support_views
from yolo_fewshot.errors import few, no_rows
from yolo_fewshot.files import restore_exact, save_checkpoint
from yolo_fewshot.inputs import check_data, check_project, check_source
from yolo_fewshot.nn.model import FewShotDetectionModel
from yolo_fewshot.nn.rows import class_rows, enrolled_classes
from yolo_fewshot.plots.support import FILE, plot_support


class FewShotYOLO(YOLO):
    """YOLO model that enrolls classes: any detection, segmentation, pose or OBB model, stock or few-shot.

    `YOLO(...)` of a few-shot checkpoint, or of one with enrolled classes, returns one, too.

    `predict`, `track`, `val` and `export` take Ultralytics' arguments and four more: `support`, a support set to enroll
    first, `enroll`, the method, and `background` and `objects`, as in `FewShotYOLO.enroll`. All but `export` also plot
    the shots if Ultralytics writes a run folder.

    Threads may share a model: a lock guards everything that changes it, or copies it to predict.

    Attributes:
        shots (Shots | None): Result of the last enrollment; None if the model has changed since.

    Examples:
        >>> from yolo_fewshot import FewShotYOLO
        >>> model = FewShotYOLO("yolo11n.pt")
        >>> model.enroll("shots.yaml")
        {'scooter': 5}
        >>> model.predict("street.jpg")
        >>> model.save("site-a.pt")  # a stock checkpoint of 81 classes
        >>> model.export(format="onnx")
    """

    model: Any
    predictor: Any
    shots: enrollment.Shots | None = None
    _last_source: tuple[Any, ...] | None = None  # model, support set and arguments of the last enrollment by `support`
    _plot_pending = False

    def __init__(self, *args: Any, **kwargs: Any):
        """Initialize the model.

        Args:
            *args (Any): Ultralytics' arguments.
            **kwargs (Any): Ultralytics' arguments.

        Raises:
            TypeError: If it is a model of another class, such as YOLOE, which Ultralytics would turn this one into.
        """
        super().__init__(*args, **kwargs)
        if not isinstance(self, FewShotYOLO):
            raise TypeError(no_rows(self, "FewShotYOLO"))

    @torch.inference_mode(False)  # a service or a callback may be in it, and a classifier is fitted
    def enroll(
        self,
        support: str | Path,
        imgsz: int | None = None,
        batch: int = 16,
        method: str = "auto",
        device: str | None = None,
        plot: str | Path | None = None,
        nms: bool | None = None,
        background: str | Path | None = None,
        objects: str | None = None,
    ) -> dict[str, int]:
        """Enroll the classes of a support set, without training; all other classes stay unchanged.

        Classes of a known name are enrolled again, others are appended. Some known classes are kept unchanged, and
        their objects are negatives: those whose images all show new classes, too, and trained classes whose images all
        show classes that the model was not trained on.

        Args:
            support (str | Path): YOLO data.yaml, whose train split is used; .txt list of images with YOLO label files;
                folder with one sub-folder of cropped images per class; or an image, see `objects`.
            imgsz (int, optional): Image size in pixels, that of training if not given.
            batch (int): Images per forward pass.
            method (str): 'mean': the mean embedding of the shots (Snell et al. 2017), in a stock head with a fitted
                scale and offset. 'fit': a classifier fitted on all anchors of the support images, with an L2 prior
                around that mean, in a stock head around zero. 'auto': 'fit' unless 'mean' is clearly better, see
                `yolo_fewshot.enroll.cross_validation.choose_methods`.
            device (str, optional): Device, as in Ultralytics. If not given, that which the model was moved to, else the
                current GPU, if there is one.
            plot (str | Path, optional): File of a plot of the shots, e.g. 'support_check.png'; no plot if not given.
            nms (bool, optional): As in `predict`. If it is False and the head is dual, thresholds and `auto` are for
                the NMS-free branch. Both branches are enrolled anyway.
            background (str | Path, optional): Folder or .txt list of images that show none of the classes, whose
                anchors are negatives. They need no labels, and lower the number of false alarms.
            objects (str, optional): Objects in the image that `support` is: class name and corners x1, y1, x2, y2 in
                pixels, several separated by ';', e.g. 'scooter 10 20 200 300'.

        Returns:
            (dict[str, int]): Number of shots per enrolled class.

        Raises:
            TypeError: If the model cannot enroll classes (`yolo_fewshot.nn.rows.class_rows`), or `support` is no path.
            FileNotFoundError: If the support set, or an image that it lists, does not exist.
            ValueError: If the support set is unusable, or an argument is invalid; the text says what to change.
        """
        with self._lock:
            model = self._network("enroll()")
            if not isinstance(support, (str, int, os.PathLike)):
                raise TypeError(f"support= must be a path, not a {type(support).__name__}. {LAYOUTS}")
            keys.check({"enroll": method})  # before the support set is read
            for k, v in (("imgsz", imgsz), ("batch", batch)):
                if isinstance(v, (int, float)) and v < 1:
                    raise ValueError(f"'{k}={v}' is an invalid value. '{k}' must be >= 1.")
            channels = model.yaml.get("channels") or 3
            # The command line turns a name of digits into an int.
            shots = read_support(str(support), model.names, channels, objects, model.yaml.get("kpt_shape"))
            others = None
            if background is not None:
                others = without_shots(read_background(str(background), channels), shots.labels)
            kept = self._classes_to_keep(model, shots)
            train_args = (self.ckpt or {}).get("train_args") or {}
            views = support_views(train_args, shots.crops, class_rows(model).per_level)
            home, training = next(model.parameters()).device, model.training
            default = device in (None, "")
            moved = default and home.type != "cpu"
            model.eval().to(home if moved else select_device("" if default else device, verbose=False))
            model.float()  # as Ultralytics does before it predicts with a model that was halved
            try:
                size = imgsz or self.overrides.get("imgsz", 640)
                result = enrollment.enroll(model, shots, size, batch, method, views, kept, nms, others)
            finally:
                model.train(training).to(home)
            self._changed()
            self.shots = result
            enrollment.log_shots(result)
            if plot:
                plot_support(result, model.names, plot)
            return {name: record["shots"] for name, record in result.classes.items()}

    @torch.inference_mode(False)
    def forget(self, name: str) -> FewShotYOLO:
        """Undo the enrollment of a class: remove a new class, or restore the trained classifier of a base class.

        Args:
            name (str): Class name.

        Returns:
            (FewShotYOLO): The model.

        Raises:
            TypeError: If the model cannot enroll classes, or `name` is no text.
            ValueError: If the class was not enrolled.
        """
        with self._lock:
            if not isinstance(name, str):
                raise TypeError(f"forget() takes the name of one class, not a {type(name).__name__}.")
            enrollment.forget(self._network("forget()"), name)
            self._changed()
        return self

    @torch.inference_mode(False)
    def fold(self) -> FewShotYOLO:
        """Turn the model into a stock one with the same outputs: a stock `Detect` in a `DetectionModel`.

        A folded model is an ordinary YOLO model, which loads without this package. Folding cannot be undone, and a
        folded model has no prototypes for stage 2 and `graft=none`, so keep the checkpoint. Exports are always folded.

        Returns:
            (FewShotYOLO): The model.

        Raises:
            TypeError: If the model has no few-shot head.
        """
        with self._lock:
            if not isinstance(self.model, FewShotDetectionModel):
                raise TypeError(f"model='{self.model_name}' has no few-shot head, so that there is nothing to fold.")
            self.model = self.model.fold()
            self._changed()
        return self

    def load(self, weights: Any = "yolo26n.pt") -> FewShotYOLO:
        """Load weights as Ultralytics does.

        Args:
            weights (str | Path | dict | nn.Module): File, checkpoint or network.

        Returns:
            (FewShotYOLO): The model.
        """
        with self._lock:
            super().load(weights)
            self._changed()
        return self

    def reset_weights(self) -> FewShotYOLO:
        """Reset the weights as Ultralytics does.

        Returns:
            (FewShotYOLO): The model.
        """
        with self._lock:
            super().reset_weights()
            self._changed()
        return self

    def train(self, trainer: Any = None, **kwargs: Any) -> Any:
        """Train as Ultralytics does; other threads need not wait for its end.

        Args:
            trainer (Any): Trainer class.
            **kwargs (Any): Ultralytics' arguments.

        Returns:
            (Any): Results.
        """
        try:
            return super().train(trainer, **kwargs)
        finally:
            with self._lock:
                self._changed()

    def save(self, filename: str | Path = "saved_model.pt") -> None:
        """Save the model as Ultralytics does, but atomically, and with the exact weights of the head.

        Args:
            filename (str | Path): File to write.
        """
        buffer = BytesIO()
        with self._lock:
            super().save(buffer)
            buffer.seek(0)
            ckpt = torch.load(buffer, map_location="cpu", weights_only=False)
            restore_exact(ckpt["model"].model[-1], self.model.model[-1])
        save_checkpoint(ckpt, filename)

    def predict(self, source: Any = None, stream: bool = False, predictor: Any = None, **kwargs: Any) -> Any:
        """Predict as Ultralytics does, after enrolling the classes of `support`.

        Args:
            source (Any): Images or videos.
            stream (bool): Whether to return a generator.
            predictor (Any): Predictor class.
            **kwargs (Any): Ultralytics' arguments, `support`, `enroll`, `background` and `objects`.

        Returns:
            (list[Results] | Iterator[Results]): Results.
        """
        with self._lock:
            support = kwargs.get("support")
            if support:
                self._network(f"'support={support}'")
                check_source(source)
                check_project(kwargs, self.task)
            kwargs = self._enroll_from(kwargs)
            enrolled = enrolled_classes(self.model)
            if enrolled and not (self.predictor or support) and kwargs.get("verbose", True):
                LOGGER.info(enrollment.table_of(enrolled))
            results = super().predict(source, True, predictor, **kwargs)  # a generator; the predictor has its own lock
            self.predictor.stream = stream
            args = self.predictor.args
            folder = args.save or args.save_txt or args.save_crop  # Ultralytics writes one
            if self._plot_pending and folder and {**self.overrides, **kwargs}.get("plots", True):
                self._plot(self.predictor.save_dir)
        return results if stream or results is None else list(results)

    def val(self, validator: Any = None, **kwargs: Any) -> Any:
        """Validate as Ultralytics does, after enrolling the classes of `support`, and measure base and novel AP.

        Args:
            validator (Any): Validator class.
            **kwargs (Any): Ultralytics' arguments, `support`, `enroll`, `background` and `objects`.

        Returns:
            (FewShotMetrics): Results.
        """
        with self._lock:
            if support := kwargs.get("support"):
                self._network(f"'support={support}'")
                check_data(kwargs.get("data"))
                check_project(kwargs, self.task)
            kwargs = self._enroll_from(kwargs)
            if self.overrides.get("single_cls") and len(getattr(self.model, "names", ())) > 1:
                kwargs.setdefault("single_cls", False)  # the training set it, when there was one class
            metrics = super().val(validator, **kwargs)
            if self._plot_pending and {**self.overrides, **kwargs}.get("plots", True):
                self._plot(metrics.save_dir)
        return metrics

    def export(self, **kwargs: Any) -> str:
        """Export the folded model as Ultralytics does, after enrolling the classes of `support`.

        Args:
            **kwargs (Any): Ultralytics' arguments, `support`, `enroll`, `background` and `objects`.

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
    def _classes_to_keep(model: Any, shots: Support) -> list[str]:
        """Return the known classes of a support set that are not enrolled, and log what happens to all known ones."""
        known = [str(n) for n in model.names.values()]
        warn_near_duplicates(sorted(shots.class_names - set(known)), known)
        records = enrolled_classes(model)
        trained, enrolled = ([n for n in known if (n in records) is x] for x in (False, True))
        incidental = incidental_classes(shots, known)
        groups = {
            "trained": (trained, incidental_classes(shots, trained)),
            "already enrolled": (enrolled, [n for n in enrolled if n in incidental]),
        }
        for group, (names, kept) in groups.items():
            if kept:
                LOGGER.info(
                    f"{few(kept)}: {group} classes, which are kept unchanged, since all their images show classes to "
                    "enroll, too. To enroll one again, add an image that shows it alone."
                )
            again = [n for n in names if n in shots.class_names and n not in kept]
            if again:
                log = LOGGER.warning if names is trained else LOGGER.info
                log(
                    f"{few(again)}: {group} classes, which are enrolled again from these shots. If the shots are of "
                    "another class, give it another name."
                )
        return [n for _, kept in groups.values() for n in kept]

    def _enroll_from(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Enroll `support` with the method `enroll`, and return the other arguments.

        An unchanged support set is not enrolled twice in a row, so `support` may be passed with every frame.
        """
        if kwargs.get("support") is None:
            keys.need_support(kwargs)
            return {k: v for k, v in kwargs.items() if k not in keys.ENROLL_KEYS}
        self._network(f"'support={kwargs['support']}'")
        kwargs = dict(kwargs)
        support, method = str(kwargs.pop("support")), kwargs.pop("enroll", None) or "auto"
        background, objects = kwargs.pop("background", None), kwargs.pop("objects", None)
        keys.check({"enroll": method})  # before the support set is read
        imgsz = kwargs.get("imgsz")
        imgsz = max(imgsz) if isinstance(imgsz, (list, tuple)) else imgsz
        merged = {**self.overrides, **kwargs}
        nms = False if merged.get("end2end") else merged.get("nms")  # end2end is Ultralytics' old name of nms=False
        others = None if background is None else background_fingerprint(str(background))
        source = (id(self.model), fingerprint(support), others, objects, method, imgsz, nms is False)
        if self._last_source != source:
            given = {"background": background, "objects": objects, "device": merged.get("device"), "nms": nms}
            batch = kwargs.get("batch")
            least = 2 if kwargs.get("mode") == "track" else 1  # track gives batch=1 itself, for its frames
            if type(batch) is int and batch >= least:
                given["batch"] = batch
            self.enroll(support, imgsz=imgsz, method=method, **given)
            self._last_source, self._plot_pending = source, True
        return kwargs

    def _plot(self, folder: Path) -> None:
        """Plot the shots of `support` into the first run folder after their enrollment."""
        self._plot_pending = False
        if self.shots:
            plot_support(self.shots, self.model.names, folder / FILE)

    def _changed(self) -> None:
        """Drop what depends on the old model: the predictor, which holds a copy, and the last enrollment."""
        self.predictor = self._last_source = self.shots = None
        self._plot_pending = False

    @property
    def _lock(self) -> threading.RLock:
        """Lock of this model, which is not part of copies and pickles."""
        return self.__dict__.setdefault("_own_lock", threading.RLock())

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for copies and pickles."""
        return {k: v for k, v in self.__dict__.items() if k != "_own_lock"}

    def _network(self, what: str) -> Any:
        """Return the network, or raise a TypeError if it cannot enroll classes."""
        try:
            class_rows(self.model)
        except TypeError as e:
            raise TypeError(no_rows(self, what, str(e))) from e
        return self.model
