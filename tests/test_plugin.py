"""Tests of the hooks into Ultralytics, each on its own."""

from __future__ import annotations

import importlib
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import ultralytics
import ultralytics.data.utils as data_utils
from ultralytics import RTDETR, YOLO, YOLOE, YOLOWorld, cfg
from ultralytics.engine.model import Model
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.models.yolo.detect import DetectionPredictor, DetectionTrainer, DetectionValidator
from ultralytics.nn.modules.head import Detect
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import DEFAULT_CFG, DEFAULT_CFG_DICT, DEFAULT_CFG_PATH, ROOT, YAML, checks, torch_utils

import yolo_fewshot
from yolo_fewshot import args, plugin
from yolo_fewshot.compat import TESTED, warn_untested
from yolo_fewshot.evaluate.validator import FewShotValidator, MatchesByName
from yolo_fewshot.nn.head import FewShotDetect
from yolo_fewshot.nn.model import FewShotDetectionModel
from yolo_fewshot.paths import cfg_dir
from yolo_fewshot.plots.results import FewShotPredictor, KnowsEnrolled
from yolo_fewshot.plugin import warn_of_other_classes
from yolo_fewshot.train.guarded import GuardedTrainer
from yolo_fewshot.train.trainer import FewShotTrainer
from yolo_fewshot.yolo import FewShotYOLO

pytestmark = pytest.mark.oldest

STOCK_KEYS = set(YAML.load(DEFAULT_CFG_PATH))
TYPED = ("CFG_INT_KEYS", "CFG_FLOAT_KEYS", "CFG_BOOL_KEYS", "CFG_STR_KEYS")


def run_python(code: str, cwd: Path, **env: str) -> subprocess.CompletedProcess:
    """Run code in a fresh interpreter, which the start-up hook takes for an ordinary program."""
    root = Path(yolo_fewshot.__file__).parents[1]
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(root), **env},
        capture_output=True,
        text=True,
        timeout=300,
    )


def state() -> dict[str, object]:
    """What the plugin may change in Ultralytics."""
    return {
        "dict": dict(DEFAULT_CFG_DICT),
        "namespace": dict(vars(DEFAULT_CFG)),
        "types": {k: getattr(cfg, k) for k in TYPED},
        "check_file": {n: vars(m)["check_file"] for n, m in holders()},
        "smart_load": Model.__dict__["_smart_load"],
        "check_resume": BaseTrainer.__dict__["check_resume"],
        "defaults": {
            k: v for k, v in vars(torch_utils).items() if k == "DEFAULT_CFG_DICT" and v is not DEFAULT_CFG_DICT
        },
        "meta_path": list(sys.meta_path),
    }


def holders() -> list[tuple[str, ModuleType]]:
    """Every module of Ultralytics that has `check_file` among its names."""
    modules = [(n, m) for n, m in sys.modules.items() if n.partition(".")[0] == "ultralytics"]
    return [(n, m) for n, m in modules if "check_file" in vars(m)]


@pytest.fixture
def unregistered() -> Iterator[None]:
    """Take the plugin out for one test."""
    plugin.unregister()
    try:
        yield
    finally:
        plugin.unregister()
        plugin.register()


@pytest.fixture
def cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def log() -> Iterator[list[str]]:
    """What Ultralytics' logger gets."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("ultralytics")
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)


@pytest.fixture(scope="module")
def fewshot() -> YOLO:
    return YOLO("fewshot.yaml")


@pytest.fixture(scope="module")
def stock() -> YOLO:
    return YOLO("yolo11n.yaml")


@pytest.fixture
def no_setup(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainers that only remember what they were built with."""

    def init(self, cfg=DEFAULT_CFG, overrides=None, _callbacks=None):
        self.seen = (overrides, _callbacks)

    monkeypatch.setattr(DetectionTrainer, "__init__", init)
    monkeypatch.setattr(FewShotTrainer, "__init__", init)
    monkeypatch.setattr(GuardedTrainer, "__init__", init)


class Trained(Exception):
    """Ends a training before it starts."""


def trained_by(model: YOLO, trainer: type | None = None, **settings: Any) -> type:
    """The trainer class that `train` of a model ends up with."""
    with pytest.MonkeyPatch.context() as m:

        def train(self: Any) -> None:
            raise Trained(type(self))

        m.setattr(BaseTrainer, "train", train)
        m.setattr(FewShotTrainer, "train", train)
        m.setattr(BaseTrainer, "get_model", lambda self, **_: None)
        m.setattr(DetectionTrainer, "get_model", lambda self, **_: None)
        with pytest.raises(Trained) as e:
            model.train(trainer, data="absent.yaml", **settings)
    return e.value.args[0]


# Configuration keys


def test_keys_are_known_and_unset():
    assert set(DEFAULT_CFG_DICT) == STOCK_KEYS | set(args.ALL_KEYS)
    assert STOCK_KEYS.isdisjoint(args.ALL_KEYS)
    for k in args.ALL_KEYS:
        assert DEFAULT_CFG_DICT[k] is None
        assert vars(DEFAULT_CFG)[k] is None
    assert args.used(vars(cfg.get_cfg())) == []


@pytest.mark.parametrize(
    ("key", "value", "valid"),
    [
        ("n_way", "two", "must be an int"),
        ("episodes", 2.5, "must be an int"),
        ("supcon_tau", "warm", "types are int"),
        ("grad_clip", "yes", "types are int"),
        ("wide", 1, "must be a bool"),
        ("triplet_soft", "no", "must be a bool"),
        ("cpe_weight", 1, "must be a str"),
        ("dfl_clamp_mode", True, "must be a str"),
    ],
)
def test_wrong_types_fail_in_the_words_of_ultralytics(key: str, value: object, valid: str):
    with pytest.raises(TypeError, match=f"'{key}={value}' is of invalid type {type(value).__name__}.*{valid}"):
        cfg.get_cfg(overrides={key: value})


def test_every_key_has_a_type():
    kinds = dict(zip((int, float, bool, str), TYPED))
    for k, key in args.ALL_KEYS.items():
        assert [t for t in TYPED if k in getattr(cfg, t)] == [kinds[key.kind]], k


@pytest.mark.parametrize(("typo", "key"), [("n_wya", "n_way"), ("episode", "episodes"), ("tripet", "triplet")])
def test_misspelt_keys_get_a_suggestion(typo: str, key: str):
    with pytest.raises(SyntaxError, match=rf"'\S*{typo}\S*' is not a valid YOLO argument.*Similar arguments.*'{key}'"):
        cfg.get_cfg(overrides={typo: 5})


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("stage", 4, "Valid 'stage' values are between 1 and 3."),
        ("stage", 0, "Valid 'stage' values are between 1 and 3."),
        ("n_way", 0, "'n_way' must be finite and >= 1."),
        ("k_shot", -1, "'k_shot' must be finite and >= 1."),
        ("n_query", 0, "'n_query' must be finite and >= 1."),
        ("episodes", 0, "'episodes' must be finite and >= 1."),
        ("box", -7.5, "'box' must be >= 0."),
        ("cls", -0.1, "'cls' must be >= 0."),
        ("dfl", -1, "'dfl' must be >= 0."),
        ("supcon", -1.2, "'supcon' must be finite and >= 0."),
        ("cpe", -0.6, "'cpe' must be finite and >= 0."),
        ("triplet", float("nan"), "'triplet' must be finite and >= 0."),
        ("triplet_margin", float("inf"), "'triplet_margin' must be finite and >= 0."),
        ("supcon_tau", 0, "'supcon_tau' must be finite and > 0."),
        ("cpe_tau", 0.0, "'cpe_tau' must be finite and > 0."),
        ("cpe_iou", 1.5, "Valid 'cpe_iou' values are between 0 and 1."),
        ("cpe_iou", float("nan"), "Valid 'cpe_iou' values are between 0 and 1."),
        ("cpe_weight", "linaer", "Valid 'cpe_weight' values are none, linear, exp."),
        ("dfl_clamp_mode", "soft", "Valid 'dfl_clamp_mode' values are hard, rescale."),
        ("dfl_side_max", 0, "'dfl_side_max' must be finite and > 0."),
        ("dfl_mean_max", float("inf"), "'dfl_mean_max' must be finite and > 0."),
        ("grad_clip", 0, "'grad_clip' must be finite and > 0."),
    ],
)
def test_values_out_of_range_fail(key: str, value: object, text: str):
    with pytest.raises(ValueError) as e:
        args.check({**DEFAULT_CFG_DICT, key: value})
    assert str(e.value) == f"'{key}={value}' is an invalid value. {text}"


def test_values_at_the_ends_of_a_range_pass():
    args.check(dict(DEFAULT_CFG_DICT))
    args.check({k: key.default for k, key in args.KEYS.items()})
    low = {"stage": 1, "n_way": 1, "k_shot": 1, "n_query": 1, "episodes": 1, "cpe_iou": 0, "supcon": 0, "box": 0}
    args.check({**low, "triplet_margin": 0, "supcon_tau": 1e-9})
    args.check({"stage": 2, "cpe_iou": 1.0, "cpe_weight": "exp", "dfl_clamp_mode": "rescale"})


@pytest.mark.parametrize(
    ("given", "stage"),
    [
        ({}, 1), ({"stage": 1}, 1), ({"stage": 2}, 2), ({"stage": 2, "n_way": 4}, 2), ({"stage": 2, "supcon": 0.0}, 2),
        ({"nonfinite": "raise", "doctor": 5, "nonfinite_limit": 3}, 1), ({"grad_clip": 5.0}, 1),
        ({"stage": 3, "steps": 50}, 3), ({"stage": 3}, 3),
    ],
)  # fmt: skip
def test_the_stage_is_what_is_given(given: dict, stage: int):
    values = args.resolve({**DEFAULT_CFG_DICT, **given})
    assert list(values) == list(args.KEYS)
    everywhere = {"nonfinite", "nonfinite_limit", "doctor"}
    adapting = {"graft", "base_replay", "blend", "teacher", "memory", "steps"}
    used = everywhere | {1: set(), 2: set(args.KEYS) - adapting, 3: adapting}[stage]
    defaults = {k: key.default if k in used else None for k, key in args.KEYS.items()}
    assert values == {**defaults, **given, "stage": stage}


@pytest.mark.parametrize("key", sorted(set(args.KEYS) - {"stage", *args.GUARD, *args.EVERY_STAGE}))
def test_a_key_of_a_stage_without_a_stage_is_an_error_that_names_the_recipe(key: str, stock: YOLO, fewshot: YOLO):
    value = args.KEYS[key].default
    value = {"base_replay": "base.yaml", "blend": 0.5, "steps": 5, "terms": "own.Term", "meta_val": 0.2}.get(key, value)
    stages = ["3"] if key in args.ADAPTING else ["1", "2"] if key == "meta_val" else ["2"]
    recipes = " or ".join(f"cfg=stage{x}.yaml" for x in stages)
    text = f"'{key}={value}' belongs to stage {' or '.join(stages)}, and no stage is given. Add {recipes}, or leave"
    for model in (stock, fewshot):
        with pytest.raises(ValueError) as e:
            model.train(data="absent.yaml", **{key: value})
        assert text in str(e.value)


def test_stage_1_keeps_what_is_given():
    values = args.resolve({"stage": 1, "n_way": 5, "grad_clip": 1.0})
    safety = {"nonfinite": "skip", "nonfinite_limit": 10, "doctor": 50}
    given = {"stage": 1, "n_way": 5, "grad_clip": 1.0}
    assert {k: v for k, v in values.items() if v is not None} == {**given, **safety}


def test_episode_size():
    assert args.episode_size({"n_way": 5, "k_shot": 3, "n_query": 2}) == 25


# File names


@pytest.mark.parametrize("name", sorted(p.name for p in cfg_dir().glob("*.yaml")))
def test_names_of_our_files_resolve(name: str, cwd: Path):
    ours = cfg_dir() / name
    assert checks.check_file(name) == checks.check_yaml(name) == str(ours)
    assert checks.check_file(Path(name), hard=False) == str(ours)
    assert checks.check_file(f" {name} ", suffix=".yaml") == str(ours)
    assert checks.check_file(file=name) == str(ours)


def test_our_names_are_not_stock_names():
    names = {p.name for p in cfg_dir().glob("*.yaml")}
    assert {"fewshot.yaml", "stage1.yaml", "stage2.yaml", "fewshot-demo.yaml"} <= names
    assert names.isdisjoint(p.name for p in ROOT.rglob("*.yaml"))


def test_the_working_directory_wins(cwd: Path):
    (cwd / "stage2.yaml").write_text("stage: 2\n")
    assert checks.check_file("stage2.yaml") == "stage2.yaml"
    assert YAML.load(checks.check_yaml("stage2.yaml")) == {"stage": 2}
    assert checks.check_file("stage1.yaml") == str(cfg_dir() / "stage1.yaml")


def test_only_bare_names_resolve(cwd: Path):
    assert checks.check_file("sub/stage2.yaml", hard=False) == []
    assert checks.check_file("./stage2.yaml", hard=False) == []
    assert checks.check_file("stage2.txt", hard=False) == []


@pytest.mark.parametrize("name", ["yolo11n.yaml", "yolo11.yaml", "coco8.yaml", "default.yaml", "absent.yaml"])
def test_other_names_resolve_as_ever(name: str, cwd: Path):
    plain = checks.check_file.__wrapped__
    assert checks.check_file(name, hard=False) == plain(name, hard=False)
    if name in {"coco8.yaml", "default.yaml"}:
        assert Path(checks.check_file(name)).is_relative_to(ROOT)
    if name == "absent.yaml":
        with pytest.raises(FileNotFoundError, match=r"'absent.yaml' does not exist"):
            checks.check_file(name)


def test_copies_of_check_file_are_covered(cwd: Path):
    assert {"ultralytics.data.utils", "ultralytics.engine.trainer", "ultralytics.nn.tasks"} <= {n for n, _ in holders()}
    assert {id(vars(m)["check_file"]) for _, m in holders()} == {id(checks.check_file)}
    assert data_utils.check_file("stage1.yaml") == str(cfg_dir() / "stage1.yaml")


# Models


def test_scale_letters_choose_the_scale(cwd: Path):
    small, nano = (YOLO(f"yolo11{s}-fewshot.yaml").model for s in "sn")
    assert (small.yaml["scale"], nano.yaml["scale"]) == ("s", "n")
    assert (small.model[0].conv.out_channels, nano.model[0].conv.out_channels) == (32, 16)
    assert type(small) is type(nano) is FewShotDetectionModel


def test_fewshot_yaml_gives_our_classes(fewshot: YOLO):
    assert type(fewshot) is FewShotYOLO
    assert type(fewshot.model) is FewShotDetectionModel
    assert type(fewshot.model.model[-1]) is FewShotDetect
    assert fewshot._smart_load("model") is FewShotDetectionModel
    assert fewshot._smart_load("trainer") is FewShotTrainer
    assert fewshot._smart_load("validator") is FewShotValidator
    assert fewshot._smart_load("predictor") is FewShotPredictor


@pytest.mark.parametrize("mode", ["predict", "track", "val", "export"])
def test_stock_models_take_a_support_set(mode: str):
    model = YOLO("yolo11n-seg.yaml")
    with pytest.raises(FileNotFoundError, match=r"support='shots.yaml' does not exist"):
        getattr(model, mode)(support="shots.yaml")
    assert type(model) is FewShotYOLO


@pytest.mark.parametrize(
    ("kind", "name", "text"),
    [
        (YOLOE, "yoloe-11s-seg.yaml", "model='yoloe-11s-seg.yaml' is a YOLOE model for task 'segment'"),
        (YOLOWorld, "yolov8s-world.yaml", "model='yolov8s-world.yaml' is a YOLOWorld model for task 'detect'"),
        (RTDETR, "rtdetr-l.yaml", "model='rtdetr-l.yaml' is a RTDETR model for task 'detect'"),
        (YOLO, "yolo11n-cls.yaml", "A Classify head has no row for each class"),
    ],
)
def test_models_without_a_row_for_each_class_refuse_a_support_set_before_any_work(kind: type, name: str, text: str):
    model = kind(name)
    for mode in ("predict", "track", "val", "export"):
        with pytest.raises(TypeError, match=f"{text}. 'support=shots.yaml' needs a YOLO model for detection"):
            getattr(model, mode)(support="shots.yaml")


@pytest.mark.parametrize("name", ["yolo11n.yaml", "yolo11n-pose.yaml"])
def test_a_stock_model_with_enrolled_classes_predicts_and_validates_with_ours_and_trains_with_its_own(
    name: str, no_setup: None
):
    model = YOLO(name)
    stock = {key: model._smart_load(key) for key in ("model", "trainer", "validator", "predictor")}
    model.model.enrolled = {"scooter": {"shots": 3}}
    assert model._smart_load("model") is stock["model"] and trained_by(model) is stock["trainer"]
    for key, mixin in (("validator", MatchesByName), ("predictor", KnowsEnrolled)):
        assert issubclass(model._smart_load(key), (mixin, stock[key]))
        assert model._smart_load(key) is model._smart_load(key) and model._smart_load(key) is not stock[key]
    model.model.enrolled = {}
    assert {key: model._smart_load(key) for key in stock} == stock


def test_exported_models_are_told_to_enroll_first(tmp_path: Path):
    (tmp_path / "best.onnx").touch()
    with pytest.raises(TypeError, match=r"best.onnx' is an exported model.*Enroll, then export"):
        FewShotYOLO(tmp_path / "best.onnx", task="detect").predict("x.jpg", support="shots.yaml")


def test_background_images_are_for_grafting(fewshot: YOLO):
    for stage, text in ((1, "Add cfg=stage3.yaml to graft"), (None, "Add cfg=stage3.yaml to graft")):
        with pytest.raises(ValueError, match=f"'background=street' works in grafting alone. {text}, or leave it out"):
            fewshot.train(data="coco8.yaml", background="street", stage=stage)


@pytest.mark.parametrize("model", ["fewshot", "stock"])
@pytest.mark.parametrize("key", ["support", "enroll"])
def test_training_takes_no_support_set(model: str, key: str, request: pytest.FixtureRequest):
    value = {"support": "shots.yaml", "enroll": "fit"}[key]
    with pytest.raises(ValueError, match=f"'{key}={value}' is not a training argument"):
        request.getfixturevalue(model).train(data="coco8.yaml", **{key: value})


def validator(names: dict, data: dict, batch: int | None = None) -> SimpleNamespace:
    return SimpleNamespace(names=names, data={"names": data}, batch_i=batch)


def test_validating_an_exported_model_on_other_class_numbers_is_a_warning(caplog: pytest.LogCaptureFixture):
    model = {0: "person", 1: "gizmo"}
    for same in ({0: "person"}, {0: "Person", 1: "gizmo"}, {}):
        warn_of_other_classes(validator(model, same))
    warn_of_other_classes(validator(model, {0: "gizmo"}, batch=0))  # after the first batch
    assert "exported" not in caplog.text
    warn_of_other_classes(validator(model, {0: "person", 1: "widget"}))
    assert "Class 1 is 'gizmo' in the exported model and 'widget' in data=" in caplog.text


def test_only_exported_models_get_that_warning_and_once(stock: YOLO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "best.onnx").touch()
    exported = YOLO(tmp_path / "best.onnx", task="detect")
    monkeypatch.setattr(DetectionValidator, "__call__", lambda self, **_: None)
    for model in (exported, exported, stock):
        model.val(data="nowhere.yaml")
    assert exported.callbacks["on_val_batch_start"].count(warn_of_other_classes) == 1
    assert warn_of_other_classes not in stock.callbacks["on_val_batch_start"]


def test_stock_yaml_gives_stock_classes(stock: YOLO, no_setup: None):
    assert type(stock) is YOLO
    assert type(stock.model) is DetectionModel
    assert type(stock.model.model[-1]) is Detect
    assert stock._smart_load("model") is DetectionModel
    assert stock._smart_load("validator") is DetectionValidator
    assert stock._smart_load("predictor") is DetectionPredictor

    class Own(stock._smart_load("trainer")):  # as Ultralytics documents
        pass

    assert Own.__bases__ == (DetectionTrainer,)
    assert trained_by(stock, **dict.fromkeys(args.KEYS)) is DetectionTrainer
    assert trained_by(stock, Own) is Own


@pytest.mark.parametrize("given", [{"stage": 2}, {"stage": 1, "grad_clip": 5.0}, {"cfg": "stage2.yaml"}])
def test_a_stage_upgrades_a_stock_detector(stock: YOLO, given: dict, no_setup: None):
    assert trained_by(stock, **given) is FewShotTrainer


def test_a_guard_key_alone_puts_the_guard_into_the_trainer_of_the_task(stock: YOLO, no_setup: None, log: list[str]):
    class Own(DetectionTrainer):
        pass

    for key, value in {"grad_clip": 5.0, "nonfinite": "skip", "nonfinite_limit": 3}.items():
        for trainer, base in ((None, DetectionTrainer), (Own, Own)):
            cls = trained_by(stock, trainer, **{key: value})
            assert cls.__bases__ == (GuardedTrainer, base) and not issubclass(cls, FewShotTrainer)
    assert log == []
    assert trained_by(stock, doctor=5) is DetectionTrainer
    assert "doctor= has no effect on a model without a few-shot head" in log[0]
    with pytest.raises(ValueError, match=r"'grad_clip=-1.0' is an invalid value"):
        stock.train(data="absent.yaml", grad_clip=-1.0)


def test_a_resumed_run_keeps_the_trainer_that_it_began_with(stock: YOLO, tmp_path: Path, no_setup: None):
    ckpt = {"model": stock.model, "epoch": 1, "optimizer": {}}
    for name, given, base in (("plain", {}, None), ("guarded", {"grad_clip": 5.0}, GuardedTrainer)):
        file = tmp_path / f"{name}.pt"
        torch.save({**ckpt, "train_args": {**DEFAULT_CFG_DICT, "model": "x.pt", "task": "detect", **given}}, file)
        expected = (base, DetectionTrainer) if base else None
        for model, resume in ((YOLO(file), True), (stock, str(file))):
            cls = trained_by(model, resume=resume)
            assert cls is DetectionTrainer if expected is None else cls.__bases__ == expected


def test_a_trainer_that_would_ignore_keys_is_refused(stock: YOLO, no_setup: None):
    class Own(DetectionTrainer):
        pass

    class OwnFewShot(FewShotTrainer):
        pass

    with pytest.raises(
        TypeError, match=r"trainer=Own would ignore stage=, graft=\. Make it a subclass of .*FewShotTrainer"
    ):
        stock.train(trainer=Own, data="absent.yaml", stage=3, graft="neck")
    assert plugin.trainer_for(stock, OwnFewShot, {"stage": 3}) is OwnFewShot
    assert plugin.trainer_for(stock, Own, {"grad_clip": 5.0}).__bases__ == (GuardedTrainer, Own)
    assert plugin.trainer_for(stock, Own, {}) is Own


def test_a_trainer_of_ones_own_has_the_guard_with_a_few_shot_model_too(fewshot: YOLO):
    class Own(DetectionTrainer):
        pass

    assert plugin.trainer_for(fewshot, Own, {"grad_clip": 5.0}).__bases__ == (GuardedTrainer, Own)
    assert plugin.trainer_for(fewshot, Own, {}) is Own


def test_tuning_a_stage_without_its_recipe_starts_from_what_it_trains_with(stock: YOLO):
    given = {"data": "absent.yaml", "space": {"lr0": (0.001, 0.01)}}
    assert plugin.tune_settings(stock, {**given, "stage": 2})["dfl"] == 0.15
    assert plugin.tune_settings(stock, {**given, "stage": 2, "dfl": 0.3})["dfl"] == 0.3
    assert plugin.tune_settings(stock, {**given, "stage": 3})["val"] is False
    assert plugin.tune_settings(stock, given) == given


def test_a_key_without_a_default_needs_a_start_to_be_tuned(stock: YOLO):
    given = {"data": "absent.yaml", "stage": 3, "graft": "none", "space": {"blend": (0.5, 1.0)}}
    with pytest.raises(
        ValueError, match=r"^blend= has no default from which a search could start\. Give a start value"
    ):
        plugin.tune_settings(stock, given)
    assert plugin.tune_settings(stock, {**given, "blend": 0.75})["blend"] == 0.75


@pytest.mark.parametrize("state", [{"epoch": -1, "optimizer": {}}, {"epoch": 1, "optimizer": None}])
def test_a_finished_run_that_cannot_be_resumed_says_nothing_about_the_new_one(state: dict, stock: YOLO, tmp_path: Path):
    file = tmp_path / "best.pt"
    train_args = {**DEFAULT_CFG_DICT, "model": "x.pt", "task": "detect", "stage": 3, "grad_clip": 5.0}
    torch.save({"model": stock.model, **state, "train_args": train_args}, file)
    assert plugin.trainer_for(YOLO(file), None, {"resume": True}) is None
    assert plugin.trainer_for(YOLO(file), None, {"resume": True, "cfg": "stage2.yaml"}) is FewShotTrainer


@pytest.mark.parametrize(
    ("kind", "name", "task"),
    [
        (YOLO, "yolo11n-seg.yaml", "segment"),
        (YOLO, "yolo11n-pose.yaml", "pose"),
        (YOLO, "yolo11n-obb.yaml", "obb"),
        (RTDETR, "rtdetr-l.yaml", "detect"),
        (YOLOWorld, "yolov8s-world.yaml", "detect"),
    ],
)
def test_other_models_are_refused_with_our_keys_only(kind: type, name: str, task: str, monkeypatch: pytest.MonkeyPatch):
    model = kind(name)
    trainer = model.task_map[task]["trainer"]
    assert model._smart_load("trainer") is trainer
    with pytest.raises(TypeError) as e:
        model.train(data="absent.yaml", stage=1, n_way=5)
    text = str(e.value)
    assert f"model='{name}' is a {kind.__name__} model for task '{task}'" in text
    assert "settings stage=, n_way= need a YOLO detection model" in text
    assert "yolo train model=yolo11n.pt cfg=stage1.yaml" in text


def test_training_a_segmentation_model_with_a_recipe_is_refused_at_once(cwd: Path):
    model = YOLO("yolo11n-seg.yaml")
    with pytest.raises(TypeError, match=r"is a YOLO model for task 'segment'.* settings stage= need a YOLO detection"):
        model.train(data="absent.yaml", cfg="stage1.yaml")


def test_an_unsupported_mode_is_still_named(stock: YOLO, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(YOLO, "task_map", {})

    def val(model: YOLO) -> None:
        model._smart_load("validator")

    with pytest.raises(NotImplementedError, match=r"'YOLO' model does not support 'val' mode for 'detect' task"):
        val(stock)


def test_newer_ultralytics_warns_once(monkeypatch: pytest.MonkeyPatch, log: list[str]):
    monkeypatch.setattr(warn_untested, "done", False, raising=False)
    for version in (TESTED, "8.4.9", "8.3.999", f"{TESTED}.dev0"):
        monkeypatch.setattr(ultralytics, "__version__", version)
        warn_untested()
    assert log == []
    monkeypatch.setattr(ultralytics, "__version__", "8.10.0")
    warn_untested()
    warn_untested()
    assert len(log) == 1
    assert f"tested up to ultralytics {TESTED}, this is 8.10.0" in log[0]


# Registering


def test_registering_twice_changes_nothing():
    before = state()
    plugin.register()
    assert state() == before


def test_unregister_restores_ultralytics(cwd: Path, unregistered: None, monkeypatch: pytest.MonkeyPatch):
    before = state()
    assert set(DEFAULT_CFG_DICT) == STOCK_KEYS
    assert YAML.load(DEFAULT_CFG_PATH) == DEFAULT_CFG_DICT
    assert vars(DEFAULT_CFG) == DEFAULT_CFG_DICT
    assert not any(type(f).__module__.startswith("yolo_fewshot") for f in sys.meta_path)
    assert all(f.__module__ == "ultralytics.utils.checks" for f in before["check_file"].values())
    assert not any(hasattr(f, "__wrapped__") for f in (checks.check_file, Model._smart_load))
    assert not any(getattr(cfg, k) & set(args.ALL_KEYS) for k in TYPED)
    with pytest.raises(SyntaxError, match=r"'\S*n_way\S*' is not a valid YOLO argument"):
        cfg.get_cfg(overrides={"n_way": 5})
    assert checks.check_file("stage1.yaml", hard=False) == []

    plugin.register()
    after = state()
    for k in before:
        assert after[k] != before[k], k
    late = "ultralytics.data.converter"  # imported while registered
    monkeypatch.delitem(sys.modules, late, raising=False)
    assert importlib.import_module(late).check_file is checks.check_file
    plugin.unregister()
    assert importlib.import_module(late).check_file is checks.check_file
    now = state()
    now["check_file"].pop(late)
    before["check_file"].pop(late, None)
    assert now == before

    plugin.register()
    assert cfg.get_cfg(overrides={"n_way": 5}).n_way == 5
    assert checks.check_file("stage1.yaml") == str(cfg_dir() / "stage1.yaml")
    assert YOLO("fewshot.yaml")._smart_load("trainer") is FewShotTrainer


@pytest.mark.parametrize("value", ["1", "true", "True", "yes"])
def test_disabled_by_the_environment(value: str, unregistered: None, monkeypatch: pytest.MonkeyPatch):
    before = state()
    monkeypatch.setenv("YOLO_FEWSHOT_DISABLE", value)
    plugin.register()
    assert state() == before
    monkeypatch.setenv("YOLO_FEWSHOT_DISABLE", "0")
    plugin.register()
    assert set(args.ALL_KEYS) <= set(DEFAULT_CFG_DICT)


@pytest.mark.parametrize("name", list(plugin.SYMBOLS))
def test_one_missing_symbol_switches_the_plugin_off(
    name: str, unregistered: None, monkeypatch: pytest.MonkeyPatch, log: list[str]
):
    before = state()
    monkeypatch.setitem(plugin.SYMBOLS, name, (*plugin.SYMBOLS[name], "Model.gone"))
    importlib.import_module(name)
    plugin.register()
    assert state() == before
    assert len(log) == 1
    assert f"yolo-fewshot is off: this Ultralytics version has no '{name}.Model.gone'" in log[0]
    assert f"ultralytics=={TESTED}" in log[0]
    assert log[0].count("WARNING") <= 1  # Ultralytics puts the word in front


def test_a_change_that_fails_switches_the_plugin_off(
    unregistered: None, monkeypatch: pytest.MonkeyPatch, log: list[str]
):
    def fail(module: ModuleType) -> None:
        raise ImportError("cannot import name 'moved'")

    before = state()
    monkeypatch.setitem(plugin._CHANGES, "ultralytics.engine.model", fail)
    plugin.register()
    assert state() == before
    assert len(log) == 1
    assert "yolo-fewshot is off" in log[0]
    assert "cannot import name 'moved'" in log[0]


def test_self_check_covers_what_is_there():
    for name, symbols in plugin.SYMBOLS.items():
        module = importlib.import_module(name)
        assert all(hasattr(module, s.partition(".")[0]) for s in symbols)
    assert set(plugin._CHANGES) <= set(plugin.SYMBOLS)


# Fresh processes


@pytest.fixture(scope="module")
def checkpoint(fewshot: YOLO, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved few-shot model."""
    path = tmp_path_factory.mktemp("checkpoint") / "best.pt"
    fewshot.save(path)
    return path


@pytest.mark.slow
def test_a_checkpoint_registers_the_plugin_in_a_process_that_knows_only_ultralytics(checkpoint: Path):
    code = """
import sys
import ultralytics
from ultralytics import YOLO
from ultralytics.utils import DEFAULT_CFG_DICT

assert "yolo_fewshot" not in sys.modules
assert "stage" not in DEFAULT_CFG_DICT
model = YOLO("best.pt")
assert DEFAULT_CFG_DICT["stage"] is None
assert type(model.model).__name__ == "FewShotDetectionModel"
print(model._smart_load("trainer").__name__)

import yolo_fewshot
from yolo_fewshot import plugin

plugin.unregister()  # the order `import ultralytics`, then `import yolo_fewshot`, without a checkpoint
plugin.register()
print(type(YOLO("fewshot.yaml").model).__name__)
"""
    done = run_python(code, checkpoint.parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["FewShotTrainer", "FewShotDetectionModel"]


@pytest.mark.slow
def test_restricted_loading_and_the_order_plugin_first(checkpoint: Path):
    code = """
import sys
import yolo_fewshot
assert "ultralytics" not in sys.modules and "torch" not in sys.modules
import ultralytics
from ultralytics import YOLO
from ultralytics.nn.tasks import SAFE_LOAD
from ultralytics.utils import DEFAULT_CFG_DICT

assert SAFE_LOAD
assert DEFAULT_CFG_DICT["stage"] is None
model = YOLO("best.pt")
print(type(model.model).__name__, model._smart_load("trainer").__name__)
"""
    done = run_python(code, checkpoint.parent, ULTRALYTICS_SAFE_LOAD="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["FewShotDetectionModel", "FewShotTrainer"]


@pytest.mark.slow
def test_every_public_name_can_be_the_first_import(cwd: Path):
    code = """
import sys

import yolo_fewshot

for name in yolo_fewshot.__all__:
    yolo_fewshot.plugin.unregister()
    for module in [m for m in sys.modules if m.partition(".")[0] in {"ultralytics", "yolo_fewshot"}]:
        del sys.modules[module]
    import yolo_fewshot
    assert name in dir(yolo_fewshot)
    getattr(yolo_fewshot, name)
    print(name)
"""
    done = run_python(code, cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == yolo_fewshot.__all__


@pytest.mark.slow
def test_changed_shapes_of_what_is_hooked_are_no_obstacle(cwd: Path):
    """A method that moves to a base class, and a set of keys that becomes a list."""
    code = """
from ultralytics import cfg
from ultralytics.engine.model import Model

class Mixin:
    tune = Model.tune

del Model.tune
Model.__bases__ = (Mixin, *Model.__bases__)
cfg.CFG_INT_KEYS = list(cfg.CFG_INT_KEYS)
import yolo_fewshot
from yolo_fewshot import plugin

assert "tune" in vars(Model) and "steps" in cfg.CFG_INT_KEYS and isinstance(cfg.CFG_INT_KEYS, list)
plugin.unregister()
assert "tune" not in vars(Model) and Model.tune is Mixin.tune and "steps" not in cfg.CFG_INT_KEYS
"""
    done = run_python(code, cwd)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("error", ["KeyError('x')", "TypeError('x')", "RuntimeError('x')"])
def test_whatever_fails_in_a_hook_leaves_the_stock_command_working(error: str, cwd: Path):
    code = f"""
from yolo_fewshot import plugin

def fail(module):
    raise {error}

plugin._CHANGES["ultralytics.cfg"] = fail
from ultralytics.cfg import entrypoint
from ultralytics.utils import DEFAULT_CFG_DICT

entrypoint(debug="yolo version")
print("stage" in DEFAULT_CFG_DICT)
"""
    done = run_python(code, cwd)
    assert done.returncode == 0 and done.stdout.split()[-1] == "False", done.stderr
    assert "yolo-fewshot is off" in done.stdout + done.stderr


@pytest.mark.slow
def test_a_key_that_ultralytics_has_itself_switches_the_plugin_off_and_is_named(cwd: Path):
    """A stock user's `steps=` must not become few-shot training on the day when Ultralytics has such a key."""
    code = """
from ultralytics import utils

utils.DEFAULT_CFG_DICT["steps"] = utils.DEFAULT_CFG.steps = 7
import yolo_fewshot
from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionTrainer

assert utils.DEFAULT_CFG_DICT["steps"] == utils.DEFAULT_CFG.steps == 7 and "n_way" not in utils.DEFAULT_CFG_DICT
assert not hasattr(utils.DEFAULT_CFG, "n_way") and not hasattr(YOLO.train, "__wrapped__")
assert YOLO("yolo11n.yaml")._smart_load("trainer") is DetectionTrainer
"""
    done = run_python(code, cwd)
    assert done.returncode == 0, done.stderr
    assert "has steps= of its own" in done.stdout + done.stderr


@pytest.mark.slow
def test_a_few_shot_checkpoint_that_loads_the_plugin_takes_a_support_set(trained, demo: Path, cwd: Path):
    """`from ultralytics import YOLO` alone: this package is imported while the checkpoint is loaded."""
    code = f"""
from ultralytics import YOLO

model = YOLO({str(trained[1].best)!r})
found = model.predict({str(demo / "images/novel_query")!r}, support="fewshot-demo-novel.yaml", imgsz=96, verbose=False)
print(type(model).__name__, len(found[0].names), sum(len(r.boxes) for r in found) > 0)
"""
    done = run_python(code, cwd)
    assert done.stdout.split()[-3:] == ["FewShotYOLO", "32", "True"], done.stderr


@pytest.mark.slow
def test_a_missing_symbol_leaves_the_stock_command_working(cwd: Path):
    code = """
from yolo_fewshot import plugin

plugin.SYMBOLS["ultralytics.engine.model"] += ("Model.gone",)
from ultralytics.cfg import entrypoint

entrypoint(debug="yolo version")
from ultralytics import YOLO
from ultralytics.utils import DEFAULT_CFG_DICT

print(type(YOLO("yolo11n.yaml")._smart_load("trainer")).__name__, "stage" in DEFAULT_CFG_DICT)
entrypoint(debug="yolo train model=yolo11n.yaml stage=1")
"""
    done = run_python(code, cwd)
    text = done.stdout + done.stderr
    assert text.count("yolo-fewshot is off") == 1
    assert "has no 'ultralytics.engine.model.Model.gone'" in text
    assert ultralytics.__version__ in done.stdout.split()
    assert "type False" in done.stdout
    assert re.search(r"'\S*stage\S*' is not a valid YOLO argument", done.stderr)  # older Ultralytics colors the name
    assert done.returncode != 0
