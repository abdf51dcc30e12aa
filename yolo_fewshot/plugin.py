"""Hooks into Ultralytics: the only file that changes its behavior, and the list of symbols that the plugin uses.

A few small changes make the stock `yolo` command drive few-shot models: configuration keys and their types are added
(default None, so a stock run is unchanged, and its files do not have them), bare names like `fewshot.yaml` resolve to
the files of the plugin, models with a `fewshot` section, with enrolled classes or with `support=` get the classes of
this package, tuning starts from the defaults of the plugin, and the restricted loader accepts few-shot checkpoints.
Each change is made when Ultralytics imports the module concerned, so registering imports nothing.
"""

from __future__ import annotations

import functools
import importlib.abc
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from yolo_fewshot import args as table
from yolo_fewshot.compat import TESTED
from yolo_fewshot.errors import no_rows
from yolo_fewshot.paths import cfg_dir

# Symbols that the plugin uses of each Ultralytics module, checked on its import; a missing one switches the plugin off.
SYMBOLS: dict[str, tuple[str, ...]] = {
    "ultralytics.utils": ("DEFAULT_CFG_DICT", "DEFAULT_CFG", "LOGGER"),
    "ultralytics.utils.checks": ("check_file", "check_yaml"),
    "ultralytics.cfg": ("get_cfg", "CFG_INT_KEYS", "CFG_FLOAT_KEYS", "CFG_BOOL_KEYS", "CFG_STR_KEYS"),
    "ultralytics.utils.metrics": (
        "bbox_iou",
        "box_iou",
        "ap_per_class",
        "DetMetrics.process",
        "DetMetrics.results_dict",
    ),
    "ultralytics.utils.torch_utils": (
        "DEFAULT_CFG_DICT",
        "init_seeds",
        "initialize_weights",
        "autocast",
        "unwrap_model",
    ),
    "ultralytics.utils.tal": ("TaskAlignedAssigner.forward",),
    "ultralytics.utils.loss": (
        "v8DetectionLoss.get_assigned_targets_and_loss",
        "v8DetectionLoss.loss",
        "E2ELoss",
        "BboxLoss.forward",
    ),
    "ultralytics.nn.modules.conv": ("Conv",),
    "ultralytics.nn.modules.head": (
        "Detect.forward_head",
        "Detect.one2many",
        "Detect.one2one",
        "Detect.bias_init",
        "Detect.fuse",
        "v10Detect",
    ),
    "ultralytics.nn.tasks": ("DetectionModel.init_criterion", "DetectionModel.load", "yaml_model_load"),
    "ultralytics.engine.model": (
        "Model._smart_load",
        "Model.load",
        "Model.reset_weights",
        "Model.train",
        "Model.tune",
        "Model.predict",
        "Model.val",
        "Model.export",
        "Model.save",
    ),
    "ultralytics.models.yolo.model": ("YOLO.__init__", "YOLOWorld", "YOLOE"),
    "ultralytics.data.build": ("InfiniteDataLoader", "build_dataloader", "seed_worker"),
    "ultralytics.data.dataset": ("YOLODataset.collate_fn", "YOLODataset.get_labels", "YOLODataset.get_img_files"),
    "ultralytics.engine.trainer": (
        "BaseTrainer.check_resume",
        "BaseTrainer.optimizer_step",
        "BaseTrainer.resume_training",
        "BaseTrainer.save_metrics",
        "BaseTrainer.final_eval",
        "BaseTrainer.run_callbacks",
        "BaseTrainer.plot_metrics",
        "BaseTrainer.read_results_csv",
        "BaseTrainer._close_dataloader_mosaic",
        "BaseTrainer.on_plot",
    ),
    "ultralytics.data.utils": ("verify_image_label", "img2label_paths", "find_dataset_yaml", "check_det_dataset"),
    "ultralytics.models.yolo.detect.val": (
        "DetectionValidator.init_metrics",
        "DetectionValidator.preprocess",
        "DetectionValidator.get_dataloader",
        "DetectionValidator.finalize_metrics",
        "DetectionValidator.print_results",
        "DetectionValidator.coco_evaluate",
    ),
    "ultralytics.engine.results": ("Results.new", "Results.plot", "Boxes"),
    "ultralytics.utils.plotting": ("Annotator.box_label", "colors"),
    "ultralytics.models.yolo.detect.predict": ("DetectionPredictor.construct_result",),
    "ultralytics.models.yolo.detect.train": ("DetectionTrainer.get_model", "DetectionTrainer.get_dataloader"),
}

_undo: list[Callable[[], None]] = []  # called by unregister(), last change first


def register() -> None:
    """Hook into Ultralytics, once; `YOLO_FEWSHOT_DISABLE=1` switches it off.

    Modules that Ultralytics has not imported yet are changed when it imports them.
    """
    if _undo or os.environ.get("YOLO_FEWSHOT_DISABLE", "").lower() in {"1", "true", "yes"}:
        return
    finder = _PostImport()
    sys.meta_path.insert(0, finder)
    _undo.append(lambda: sys.meta_path.remove(finder))
    for name in SYMBOLS:
        module = sys.modules.get(name)
        if module is not None and not getattr(module.__spec__, "_initializing", False):
            _on_import(name, module)
        if finder not in sys.meta_path:  # the self-check has switched the plugin off
            return


def unregister() -> None:
    """Restore Ultralytics to its state before `register`."""
    while _undo:
        _undo.pop()()


class _PostImport(importlib.abc.MetaPathFinder):
    """Import hook that calls `_on_import` right after one of the modules in `SYMBOLS` has been imported."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        """Return the module's ordinary spec, whose loader calls `_on_import` after execution."""
        if fullname not in SYMBOLS:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                break
        else:
            return None
        loader: Any = spec.loader
        execute = loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            if self in sys.meta_path:  # not unregistered meanwhile
                _on_import(fullname, module)

        loader.exec_module = exec_module
        return spec


def _on_import(name: str, module: Any) -> None:
    """Check the symbols of one module, then make its change."""
    for symbol in SYMBOLS[name]:
        try:
            functools.reduce(getattr, symbol.split("."), module)
        except AttributeError:
            _switch_off(f"has no '{name}.{symbol}'")
            return
    try:
        _CHANGES.get(name, lambda _: None)(module)
    except Exception as e:  # an error raised here would break the stock command
        _switch_off(str(e) if isinstance(e, KeyTaken) else f"does not fit: {type(e).__name__}: {e}")


def _switch_off(reason: str) -> None:
    """Unregister, and log the reason."""
    import logging

    unregister()
    logging.getLogger("ultralytics").warning(
        f"yolo-fewshot is off: this Ultralytics version {reason}. "
        f"Install ultralytics=={TESTED} or a newer yolo-fewshot."
    )


class KeyTaken(Exception):
    """Raised if Ultralytics has a key of the same name as the plugin, with its own meaning."""


def _replace(owner: Any, name: str, value: Any) -> None:
    """Set an attribute, and note how to restore it: an inherited one is deleted again."""
    old = inspect.getattr_static(owner, name)
    own = name in vars(owner)
    setattr(owner, name, value)
    _undo.append(lambda: setattr(owner, name, old) if own else delattr(owner, name))


def _add_keys(utils: Any) -> None:
    """Add the plugin's keys, with the default None, to the shared configuration objects in place."""
    taken = [k for k in table.ALL_KEYS if k in utils.DEFAULT_CFG_DICT or hasattr(utils.DEFAULT_CFG, k)]
    if taken:
        raise KeyTaken(f"has {', '.join(f'{k}=' for k in taken)} of its own, which means something else here")
    for k in table.ALL_KEYS:
        utils.DEFAULT_CFG_DICT[k] = None
        setattr(utils.DEFAULT_CFG, k, None)
        _undo.append(functools.partial(utils.DEFAULT_CFG_DICT.pop, k, None))
        _undo.append(functools.partial(utils.DEFAULT_CFG.__dict__.pop, k, None))


def _add_types(cfg: Any) -> None:
    """Add the types of the plugin's keys for Ultralytics' checks and tuner."""
    for name, kind in (("INT", int), ("FLOAT", float), ("BOOL", bool), ("STR", str)):
        keys = getattr(cfg, f"CFG_{name}_KEYS")
        ours = {k for k, key in table.ALL_KEYS.items() if key.kind is kind}
        _replace(cfg, f"CFG_{name}_KEYS", type(keys)({*keys, *ours}))


def _omit_unset(trainer: Any) -> None:
    """Take keys that are not set out of the arguments of a training without a stage.

    They would be in its args.yaml and its checkpoints, and Ultralytics refuses unknown keys where the plugin is absent.
    """
    stock = trainer.BaseTrainer.check_resume

    @functools.wraps(stock)
    def check_resume(self: Any, *args: Any, **kwargs: Any) -> None:
        stock(self, *args, **kwargs)
        given = vars(self.args)
        if given.get("stage") is None:
            for k in table.ALL_KEYS.keys() & given.keys():
                if given[k] is None:
                    del given[k]

    _replace(trainer.BaseTrainer, "check_resume", check_resume)


def _omit_defaults(torch_utils: Any) -> None:
    """Keep `strip_optimizer` from adding our keys to the checkpoint of a finished training that did not have them."""
    defaults = {k: v for k, v in torch_utils.DEFAULT_CFG_DICT.items() if k not in table.ALL_KEYS}
    _replace(torch_utils, "DEFAULT_CFG_DICT", defaults)


def _resolve_names(checks: Any) -> None:
    """Resolve bare file names: the working directory first, then the plugin's files, then Ultralytics'."""
    stock = checks.check_file

    @functools.wraps(stock)
    def check_file(file: Any, *args: Any, **kwargs: Any) -> Any:
        name = str(file).strip()
        if name.endswith((".yaml", ".yml")) and name == os.path.basename(name) and not os.path.exists(name):
            ours = cfg_dir() / name
            file = str(ours) if ours.is_file() else file
        return stock(file, *args, **kwargs)

    _swap(stock, check_file)
    _undo.append(lambda: _swap(check_file, stock))


def _swap(old: Any, new: Any) -> None:
    """Replace a function of Ultralytics in all its modules that have imported it."""
    name = old.__name__
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("ultralytics") and vars(module).get(name) is old:
            setattr(module, name, new)


def _route_models(engine: Any) -> None:
    """Give few-shot models the classes of this package wherever Ultralytics asks for the class of a mode."""
    stock = engine.Model._smart_load

    @functools.wraps(stock)
    def _smart_load(self: Any, key: str) -> Any:
        try:
            cls = stock(self, key)
        except NotImplementedError as e:  # its text names the calling function, here this one
            mode = sys._getframe(1).f_code.co_name
            raise NotImplementedError(str(e).replace("'_smart_load'", f"'{mode}'")) from e
        return route(self, key, cls)

    stock_tune = engine.Model.tune

    @functools.wraps(stock_tune)
    def tune(self: Any, *args: Any, **kwargs: Any) -> Any:
        return stock_tune(self, *args, **tune_settings(self, kwargs))

    _replace(engine.Model, "_smart_load", _smart_load)
    _replace(engine.Model, "tune", tune)
    stock_train = engine.Model.train

    @functools.wraps(stock_train)
    def train(self: Any, trainer: Any = None, **kwargs: Any) -> Any:
        return stock_train(self, trainer_for(self, trainer, kwargs), **kwargs)

    _replace(engine.Model, "train", _adopting(train))
    _wrap_modes(engine.Model)
    _allow_loading()


def _adopt_models(yolo: Any) -> None:
    """Make `YOLO(...)` of a few-shot model a `FewShotYOLO`, as Ultralytics does with YOLOE models."""
    _replace(yolo.YOLO, "__init__", _adopting(yolo.YOLO.__init__))
    for kind in (yolo.YOLOWorld, yolo.YOLOE):
        _wrap_modes(kind)


def _wrap_modes(kind: type) -> None:
    """Wrap the modes that a class of Ultralytics defines, and that would ignore `support=`; `track` predicts."""
    for mode in ("predict", "val", "export"):
        if mode in vars(kind):
            _replace(kind, mode, _taking_support(vars(kind)[mode]))


def _adopting(stock: Callable) -> Callable:
    """Wrap a method after which a stock `YOLO` may hold a few-shot model, or one with enrolled classes."""

    @functools.wraps(stock)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = stock(self, *args, **kwargs)
        _adopt(self)
        return result

    return method


def _adopt(model: Any, support: bool = False) -> bool:
    """Turn a stock `YOLO` that needs the methods of a `FewShotYOLO` into one, and return whether it did.

    Args:
        model (ultralytics.engine.model.Model): The model.
        support (bool): Whether classes are to be enrolled now, which any network can try.
    """
    from ultralytics import YOLO

    ours = is_fewshot(model) or is_enrolled(model) or (support and not isinstance(model.model, (str, Path)))
    adopted = type(model) is YOLO and ours
    if adopted:
        from yolo_fewshot.yolo import FewShotYOLO

        model.__class__ = FewShotYOLO
    return adopted


def _taking_support(stock: Callable) -> Callable:
    """Wrap a mode of Ultralytics, which would ignore `support=`: `FewShotYOLO` takes it.

    A few-shot model is still a stock `YOLO` here if this package was imported by loading it.
    """

    @functools.wraps(stock)
    def mode(self: Any, *args: Any, **kwargs: Any) -> Any:
        support = kwargs.get("support")
        if _adopt(self, support is not None):
            return getattr(self, stock.__name__)(*args, **kwargs)
        if support is not None:
            raise TypeError(no_rows(self, f"'support={support}'"))
        table.need_support(kwargs)
        if training := table.used(kwargs):
            from ultralytics.utils import LOGGER

            LOGGER.warning(f"{', '.join(f'{k}=' for k in training)} has no effect in {stock.__name__}, only in train.")
        exported = isinstance(self.model, (str, Path))
        if stock.__name__ == "val" and exported and warn_of_other_classes not in self.callbacks["on_val_batch_start"]:
            self.add_callback("on_val_batch_start", warn_of_other_classes)
        return stock(self, *args, **kwargs)

    return mode


def warn_of_other_classes(validator: Any) -> None:
    """Warn before the first batch if an exported model has other classes than the data: Ultralytics matches numbers.

    Args:
        validator (ultralytics.engine.validator.BaseValidator): Validator of the run.
    """
    names, data = getattr(validator, "names", None), getattr(validator, "data", None)
    if validator.batch_i is not None or not (names and data and data.get("names")):
        return
    for i, name in data["names"].items():
        if str(names.get(i)).casefold() != str(name).casefold():
            from ultralytics.utils import LOGGER

            LOGGER.warning(
                f"Class {i} is '{names.get(i)}' in the exported model and '{name}' in data=. Classes of exported "
                "models are matched by number, so that the results are wrong. Validate the *.pt checkpoint, or number "
                "the classes alike."
            )
            return


def _allow_loading() -> None:
    """Let the restricted checkpoint loader (`ULTRALYTICS_SAFE_LOAD=1`) rebuild the plugin's model classes.

    It imports them, so it must not run right after a module that they import, such as `ultralytics.nn.tasks`.
    """
    import torch

    if hasattr(torch.serialization, "add_safe_globals"):
        from yolo_fewshot.nn.graft import GraftModel
        from yolo_fewshot.nn.head import Embedding, FewShotDetect, Prototypes
        from yolo_fewshot.nn.model import FewShotDetectionModel

        torch.serialization.add_safe_globals([FewShotDetectionModel, FewShotDetect, Embedding, GraftModel, Prototypes])


_CHANGES: dict[str, Callable[[Any], None]] = {
    "ultralytics.utils": _add_keys,
    "ultralytics.utils.checks": _resolve_names,
    "ultralytics.utils.torch_utils": _omit_defaults,
    "ultralytics.cfg": _add_types,
    "ultralytics.engine.model": _route_models,
    "ultralytics.engine.trainer": _omit_unset,
    "ultralytics.models.yolo.model": _adopt_models,
}


def is_fewshot(model: Any) -> bool:
    """Return whether an Ultralytics `Model` holds, or is about to build, a few-shot model.

    Args:
        model (ultralytics.engine.model.Model): Any of Ultralytics' model wrappers.

    Returns:
        (bool): True if the YAML of its network has a `fewshot` section.
    """
    yaml = getattr(model.model, "yaml", None)
    if yaml is None and model.cfg:  # Model._new builds the network from the YAML at `cfg`
        from ultralytics.nn.tasks import yaml_model_load

        yaml = yaml_model_load(model.cfg)
    return isinstance(yaml, dict) and "fewshot" in yaml


def is_enrolled(model: Any) -> bool:
    """Return whether an Ultralytics `Model` holds a stock network with enrolled classes.

    Args:
        model (ultralytics.engine.model.Model): Any of Ultralytics' model wrappers.

    Returns:
        (bool): True if classes were enrolled into it.
    """
    return bool(getattr(model.model, "enrolled", None))


def route(model: Any, key: str, stock: type) -> Any:
    """Return the class for one mode of a model: that of this package for few-shot models, else the stock one.

    A stock model with enrolled classes predicts and validates with classes of this package that know of them.

    Args:
        model (ultralytics.engine.model.Model): The model.
        key (str): 'model', 'trainer', 'validator' or 'predictor'.
        stock (type): Ultralytics' class.

    Returns:
        (type): The class.
    """
    if key == "validator" and (is_fewshot(model) or is_enrolled(model)):
        from yolo_fewshot.evaluate.validator import validator_like

        return validator_like(stock)
    if key == "predictor" and (is_fewshot(model) or is_enrolled(model)):
        from yolo_fewshot.plots.results import predictor_like

        return predictor_like(stock)
    if not is_fewshot(model):
        return stock
    if key == "model":
        from yolo_fewshot.nn.model import FewShotDetectionModel

        return FewShotDetectionModel
    if key == "trainer":
        from yolo_fewshot.train.trainer import FewShotTrainer

        return FewShotTrainer
    return stock


def trainer_for(model: Any, trainer: type | None, kwargs: dict[str, Any]) -> type | None:
    """Return the trainer of `model.train`: few-shot if a stage is set, stock with the guard if one of its keys is.

    Args:
        model (ultralytics.engine.model.Model): The model to train.
        trainer (type | None): The user's trainer.
        kwargs (dict[str, Any]): Arguments of `train`.

    Returns:
        (type | None): The trainer; `trainer` itself if none of the plugin's keys is set.

    Raises:
        TypeError: If the model cannot be upgraded to a few-shot model.
        ValueError: If a key of the plugin has an invalid value, or belongs to a stage that is not set.
    """
    settings = {**training_settings(model, kwargs), **kwargs}
    table.refuse_support(settings)
    keys = table.used(settings)
    if keys and trainer:
        check_own_trainer(trainer, keys)
        if is_fewshot(model):
            from yolo_fewshot.train.guarded import guarded

            return guarded(trainer)  # itself if it is a `FewShotTrainer`
    if not keys or is_fewshot(model):  # FewShotTrainer checks them itself
        return trainer
    table.check(settings)
    table.need_stage(settings)
    if settings.get("stage") is not None:
        check_upgradable(model, keys)
        from yolo_fewshot.train.trainer import FewShotTrainer

        return trainer or FewShotTrainer
    if not set(keys) & set(table.GUARD):
        from ultralytics.utils import LOGGER

        LOGGER.warning(f"{', '.join(f'{k}=' for k in keys)} has no effect on a model without a few-shot head.")
        return trainer
    from yolo_fewshot.train.guarded import guarded

    return guarded(trainer or model._smart_load("trainer"))


def check_own_trainer(trainer: type, keys: list[str]) -> None:
    """Refuse a trainer of the user's own that would ignore keys of the plugin.

    Args:
        trainer (type): The trainer.
        keys (list[str]): Keys that are set.

    Raises:
        TypeError: If it is no subclass of `FewShotTrainer`, and not only keys of the guard are set.
    """
    from yolo_fewshot.train.trainer import FewShotTrainer

    unknown = [k for k in keys if k not in table.GUARD]
    if unknown and not (isinstance(trainer, type) and issubclass(trainer, FewShotTrainer)):
        name = getattr(trainer, "__name__", trainer)
        raise TypeError(
            f"trainer={name} would ignore {', '.join(f'{k}=' for k in unknown)}. Make it a subclass of "
            "yolo_fewshot.FewShotTrainer, or leave it out."
        )


def training_settings(model: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that a training starts from: the run it resumes, its recipe, or the model's overrides.

    Args:
        model (ultralytics.engine.model.Model): The model to train.
        kwargs (dict[str, Any]): Arguments of `train`.

    Returns:
        (dict[str, Any]): The settings.
    """
    from ultralytics.utils import YAML, checks

    resume = kwargs.get("resume")
    ckpt = model.ckpt or {}
    if resume is True and (ckpt.get("epoch", -1) < 0 or ckpt.get("optimizer") is None):
        resume = False  # Ultralytics warns that this checkpoint cannot be resumed, and starts a new training
    if isinstance(resume, (str, Path)) and Path(resume).is_file():
        from ultralytics.nn.tasks import load_checkpoint

        return load_checkpoint(resume)[0].args
    if resume:
        return ckpt.get("train_args") or {}
    return YAML.load(checks.check_yaml(kwargs["cfg"])) if kwargs.get("cfg") else model.overrides


def tune_settings(model: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of `model.tune`, with the recipe at `cfg` and the defaults of the plugin's keys merged in.

    Ultralytics' tuner starts from the current value of every key that it tunes, which must not be None.

    Args:
        model (ultralytics.engine.model.Model): The model to tune.
        kwargs (dict[str, Any]): Arguments of `tune`.

    Returns:
        (dict[str, Any]): The arguments, unchanged for a stock model without a key of the plugin.
    """
    recipe: dict[str, Any] = {}
    if kwargs.get("cfg"):
        from ultralytics.utils import YAML, checks

        recipe = YAML.load(checks.check_yaml(kwargs["cfg"]))
    given = {**recipe, **kwargs}
    tuned = {k: table.KEYS[k].default for k in table.used(given.get("space") or {})}
    if not (is_fewshot(model) or tuned or table.used(given)):
        return kwargs
    empty = [k for k, v in tuned.items() if v is None and given.get(k) is None]
    if empty:
        raise ValueError(
            f"{', '.join(f'{k}=' for k in empty)} has no default from which a search could start. Give a start value, "
            f"e.g. {empty[0]}={table.KEYS[empty[0]].low or 1}."
        )
    given.pop("cfg", None)
    settings = {**table.resolve({**tuned, **given}), **given}
    settings = {**table.STAGE_DEFAULTS.get(settings["stage"], {}), **settings}  # the tuner gives all values
    if settings["stage"] == 2 and not given.get("space"):
        from ultralytics.utils import LOGGER

        LOGGER.warning(
            f"Ultralytics' search space has dfl from 0.4, and stage 2 has dfl={settings.get('dfl')}. Set space= to "
            "search around the recipe, e.g. space={'dfl': (0.05, 1.0), 'lr0': (0.0001, 0.005)}."
        )
    return settings


def check_upgradable(model: Any, keys: list[str]) -> None:
    """Refuse a few-shot recipe on a model whose head cannot become a few-shot head.

    Args:
        model (ultralytics.engine.model.Model): The model to train.
        keys (list[str]): The few-shot keys that were set.

    Raises:
        TypeError: If the model is not an ordinary YOLO detection model; the text says what to use instead.
    """
    from ultralytics.models.yolo.detect import DetectionTrainer

    if model._smart_load("trainer") is not DetectionTrainer:
        raise TypeError(
            f"model='{model.model_name}' is a {type(model).__name__} model for task '{model.task}', and the few-shot "
            f"settings {', '.join(f'{k}=' for k in keys)} need a YOLO detection model. Use a detection model, e.g. "
            "'yolo train model=yolo11n.pt cfg=stage1.yaml', or leave out these settings and the stage recipe. Classes "
            "can be enrolled into segmentation, pose and OBB models, e.g. by 'yolo predict ... support=shots.yaml'."
        )
