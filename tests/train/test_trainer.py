import csv
import logging
import shutil
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from ultralytics import YOLO
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import YAML

from yolo_fewshot import FewShotTrainer
from yolo_fewshot.args import ADAPTING, KEYS, resolve
from yolo_fewshot.data.episodes import EpisodeSampler
from yolo_fewshot.nn.model import FewShotDetectionModel
from yolo_fewshot.paths import cfg_dir
from yolo_fewshot.plugin import tune_settings
from yolo_fewshot.train import run_plots
from yolo_fewshot.train.diagnosis import Diagnosis, diagnose
from yolo_fewshot.train.monitor import COUNTS
from yolo_fewshot.train.stage import Stage

pytestmark = pytest.mark.slow

QUICK = {
    "imgsz": 64, "workers": 0, "plots": False, "optimizer": "AdamW", "lr0": 0.001, "warmup_epochs": 0, "verbose": False,
}  # fmt: skip
CONTRAST = {"supcon": 1.2, "cpe": 0.6, "triplet": 0.3}
EPISODIC = {**QUICK, **CONTRAST, "turned": 0.0, "n_way": 3, "k_shot": 1, "n_query": 1, "episodes": 4}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, draw_tiny):
    """A folder with tiny models and a data set of 4 classes, 8 images of 64 px each."""
    return draw_tiny(tmp_path_factory.mktemp("tiny"), 32)


def train(tiny, name, cfg="stage2.yaml", **overrides):
    overrides = {"model": str(tiny / "yolo11n-tiny.yaml"), "data": str(tiny / "data.yaml"), **overrides}
    trainer = FewShotTrainer(cfg=cfg, overrides={**overrides, "project": str(tiny), "name": name, "exist_ok": True})
    trainer.train()
    return trainer


def rows(trainer):
    with open(trainer.csv) as f:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(f)]


@pytest.fixture(scope="module")
def stage1(tiny):
    return train(tiny, "stage1", "stage1.yaml", **QUICK, epochs=2, batch=8, nbs=8)


@pytest.fixture(scope="module")
def stage2(tiny, stage1):
    return train(tiny, "stage2", **EPISODIC, epochs=3, model=str(stage1.best))


def test_stage_one_trains_with_stock_terms(stage1):
    assert type(torch.load(stage1.best, weights_only=False)["model"]) is FewShotDetectionModel
    assert [k for k in rows(stage1)[0] if k.startswith("train/")] == [
        "train/box_loss", "train/cls_loss", "train/dfl_loss", "train/grad_norm", "train/steps", "train/clipped",
        "train/skipped", "train/overflows", "train/sides_clamped", "train/means_clamped",
    ]  # fmt: skip
    assert len(rows(stage1)) == 2 and rows(stage1)[0]["train/grad_norm"] > 0


def test_stage_two_has_all_terms_as_columns_of_the_results(stage2):
    row = rows(stage2)[-1]
    for term in ("box", "cls", "dfl", "epi", "sup", "cpe", "tri"):
        assert np.isfinite(row[f"train/{term}_loss"]) and f"val/{term}_loss" in row
    assert row["train/sup_loss"] > 0 and row["train/epi_loss"] > 0 and row["train/skipped"] == 0
    assert len(stage2.train_loader) == 4


def test_a_run_of_turned_episodes_trains_the_embedding_alone(tiny, stage1):
    trainer = train(tiny, "turned", **{**EPISODIC, "epochs": 1, "turned": 1.0}, model=str(stage1.best))
    row = rows(trainer)[-1]
    assert row["train/cls_loss"] == 0 < min(row[f"train/{x}_loss"] for x in ("box", "dfl", "epi"))
    assert row["val/cls_loss"] > 0 and row["train/skipped"] == 0


def test_settings_are_recorded_in_args_yaml(stage2):
    recorded = YAML.load(stage2.save_dir / "args.yaml")
    assert recorded["stage"] == 2 and recorded["n_way"] == 3 and recorded["supcon"] == 1.2
    assert recorded["batch"] == recorded["nbs"] == 6 and recorded["mosaic"] == 0 and recorded["dfl"] == 0.15


def test_prototypes_are_frozen_at_the_start_of_stage_two(stage1, stage2):
    first = torch.load(stage1.best, weights_only=False)["model"].model[-1].prototypes
    last = torch.load(stage2.best, weights_only=False)["model"].model[-1].prototypes
    assert not first.frozen.any()
    expected = torch.nn.functional.normalize(first.weight.float()[..., 0], dim=1)
    torch.testing.assert_close(last.frozen.float(), expected, atol=2e-3, rtol=0)
    assert not torch.equal(last.weight, first.weight)


def test_trained_models_load_validate_and_predict_through_the_stock_class(tiny, stage2):
    model = YOLO(stage2.best)
    assert model.names == {0: "blue", 1: "green", 2: "red", 3: "black"}
    metrics = model.val(data=str(tiny / "data.yaml"), imgsz=64, workers=0, plots=False, project=str(tiny))
    assert 0 <= metrics.box.map50 <= 1
    assert len(model.predict(str(tiny / "images/val/00.png"), imgsz=64, verbose=False)) == 1


def test_an_interrupted_run_draws_the_same_episodes_as_an_uninterrupted_one(tiny, stage1, monkeypatch):
    seen = []
    original = FewShotTrainer.preprocess_batch

    def spy(self, batch):
        seen.append((self.epoch, batch["im_file"], batch["img"].float().sum().item()))
        return original(self, batch)

    monkeypatch.setattr(FewShotTrainer, "preprocess_batch", spy)
    settings = {**EPISODIC, "epochs": 3, "model": str(stage1.best)}
    train(tiny, "whole", **settings)
    whole, seen[:] = list(seen), []

    class Stop(Exception):
        pass

    def interrupt(self, metrics):
        if self.epoch == 1:
            raise Stop  # before the second epoch is saved
        return save_metrics(self, metrics)

    save_metrics = FewShotTrainer.save_metrics
    with monkeypatch.context() as m, pytest.raises(Stop):
        m.setattr(FewShotTrainer, "save_metrics", interrupt)
        train(tiny, "cut", **settings)
    seen.clear()
    last = tiny / "cut" / "weights" / "last.pt"
    YOLO(last).train(resume=True)
    assert [s[0] for s in seen] == [1] * 4 + [2] * 4
    assert seen == [s for s in whole if s[0] >= 1]


def test_a_full_disk_while_saving_leaves_the_last_checkpoint_readable(tiny, monkeypatch):
    import os

    fsync, calls = os.fsync, []

    def fail_later(fd):
        calls.append(fd)
        if len(calls) > 2:  # the first epoch writes last.pt and best.pt
            raise OSError(28, "No space left on device")
        return fsync(fd)

    monkeypatch.setattr(os, "fsync", fail_later)
    with pytest.raises(OSError, match="No space"):
        train(tiny, "full", **{**EPISODIC, "epochs": 2})
    ckpt = torch.load(tiny / "full/weights/last.pt", weights_only=False)
    assert ckpt["epoch"] == 0 and ckpt["optimizer"] is not None
    assert sorted(f.name for f in (tiny / "full/weights").iterdir()) == ["best.pt", "last.pt"]


def test_a_step_with_a_non_finite_loss_is_skipped_and_training_continues(tiny, monkeypatch):
    original = FewShotTrainer.preprocess_batch
    count = []
    handles = []

    def poison(self, batch):
        batch = original(self, batch)
        count.append(1)
        if len(count) in {1, 4}:  # the first batch of the run and the last one of an epoch
            handles.append(self.model.model[-1].prototypes.bias.register_hook(lambda g: g * float("nan")))
        elif handles:
            handles.pop().remove()
        return batch

    monkeypatch.setattr(FewShotTrainer, "preprocess_batch", poison)
    trainer = train(tiny, "nan", **{**EPISODIC, "epochs": 2})
    assert [r["train/skipped"] for r in rows(trainer)] == [2, 0]
    assert all(np.isfinite(v) for r in rows(trainer) for v in r.values())
    assert all(torch.isfinite(v).all() for v in trainer.model.state_dict().values() if v.is_floating_point())


def test_dual_heads_train_both_branches(tiny):
    trainer = train(tiny, "dual", **{**EPISODIC, "epochs": 1}, model=str(tiny / "yolo26n-tiny.yaml"))
    row = rows(trainer)[0]
    assert "train/l1_loss" in row and "train/dfl_loss" not in row and row["train/epi_loss"] > 0
    before = FewShotDetectionModel(str(tiny / "yolo26n-tiny.yaml"), nc=4, verbose=False).model[-1]
    after = trainer.model.model[-1]
    assert len(after.branch_prototypes) == len(before.branch_prototypes) == 2
    assert not torch.equal(*[bank.weight.cpu() for bank in after.branch_prototypes])


def test_a_stock_checkpoint_is_upgraded(tiny):
    stock = YOLO("yolo11n.yaml")
    stock.save(tiny / "stock.pt")
    model = YOLO(tiny / "stock.pt")
    settings = {**QUICK, "epochs": 1, "lr0": 1e-9, "batch": 8, "data": str(tiny / "data.yaml"), "project": str(tiny)}
    model.train(cfg="stage1.yaml", name="upgrade", **settings)
    trained = torch.load(tiny / "upgrade/weights/best.pt", weights_only=False)["model"]
    assert type(trained) is FewShotDetectionModel
    source = torch.load(tiny / "stock.pt", weights_only=False)["model"].state_dict()
    kept = [k for k in source if k.startswith("model.0.conv") or (".cv2." in k and k.endswith("conv.weight"))]
    ours = trained.state_dict()
    assert kept and all(torch.allclose(ours[k].float(), source[k].float(), atol=1e-3) for k in kept)


def test_a_stock_run_without_our_keys_is_stock(tiny):
    model = YOLO("yolo11n.yaml")
    from ultralytics.models.yolo.detect import DetectionTrainer

    trainer = model._smart_load("trainer")(
        overrides={**QUICK, "model": "yolo11n.yaml", "data": str(tiny / "data.yaml"), "project": str(tiny), "name": "s"}
    )
    assert type(trainer) is DetectionTrainer
    assert "n_way" not in YAML.load(trainer.save_dir / "args.yaml")


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        ({"n_wya": 3}, SyntaxError, "n_way"),
        ({"n_way": "two"}, TypeError, "'n_way' must be an int"),
        ({"wide": 3}, TypeError, "'wide' must be a bool"),
        ({"supcon": -1.0}, ValueError, "'supcon' must be finite and >= 0"),
        ({"box": -1.0}, ValueError, "'box' must be >= 0"),
        ({"k_shot": 0}, ValueError, "'k_shot' must be finite and >= 1"),
        ({"n_query": 0}, ValueError, "'n_query' must be finite and >= 1"),
        ({"supcon_tau": 0.0}, ValueError, "'supcon_tau' must be finite and > 0"),
        ({"cpe_iou": 1.5}, ValueError, "between 0 and 1"),
        ({"dfl_clamp_mode": "soft"}, ValueError, "hard, rescale"),
        ({"stage": 4}, ValueError, "between 1 and 3"),
    ],
)
def test_bad_settings_are_errors_before_a_run_folder_is_made(tiny, overrides, error, message):
    with pytest.raises(error, match=message):
        train(tiny, "bad", **{**EPISODIC, **overrides})
    assert not (tiny / "bad").exists()


def test_more_ways_than_classes_is_an_error_before_training(tiny):
    with pytest.raises(ValueError, match="'n_way=5' needs 5 classes"):
        train(tiny, "ways", **{**EPISODIC, "n_way": 5, "epochs": 1})


def test_an_empty_train_split_is_an_error_before_training(tiny, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "data.yaml").write_text(f"train: empty\nval: {tiny}/images/val\nnames: [a, b, c]\n")
    with pytest.raises(FileNotFoundError, match="Error loading data"):
        train(tiny, "empty", **{**EPISODIC, "data": str(tmp_path / "data.yaml")})


def test_a_corrupt_checkpoint_is_an_error_before_training(tiny):
    (tiny / "corrupt.pt").write_bytes(b"no checkpoint")
    with pytest.raises(TypeError, match="not a loadable checkpoint"):
        train(tiny, "corrupt", **{**EPISODIC, "model": str(tiny / "corrupt.pt")})


def test_mixing_augmentation_is_refused_in_stage_two(tiny):
    overrides = {**EPISODIC, "mosaic": 1.0, "mixup": 0.5, "batch": 32, "model": str(tiny / "yolo11n-tiny.yaml")}
    trainer = FewShotTrainer("stage2.yaml", {**overrides, "data": str(tiny / "data.yaml"), "project": str(tiny)})
    assert trainer.args.mosaic == trainer.args.mixup == 0 and trainer.args.batch == 6


def test_the_literal_seed_recipe_differs_in_its_episodes_and_its_contrastive_terms():
    ours, seed = YAML.load(cfg_dir() / "stage2.yaml"), YAML.load(cfg_dir() / "stage2-seed.yaml")
    assert {k for k in ours if ours[k] != seed.get(k)} == {"n_way", "wide", "turned", *CONTRAST}
    assert not any(ours[k] for k in CONTRAST) and seed["turned"] == 0
    assert seed["n_way"] == 2 and seed["wide"] is False
    recipe = {"dfl": 0.15, "grad_clip": 5.0, "lr0": 2e-5, "epochs": 150, "episodes": 500, "box": 7.5, "cls": 0.5,
              "supcon": 1.2, "cpe": 0.6, "triplet": 0.3, "dfl_side_max": 20.0, "dfl_mean_max": 15.0}  # fmt: skip
    assert {k: seed[k] for k in recipe} == recipe and seed["optimizer"] == "AdamW"


def test_the_recipe_carries_every_key_that_resuming_from_a_best_checkpoint_resets():
    assert set(KEYS) - set(ADAPTING) <= set(YAML.load(cfg_dir() / "stage2.yaml"))


def run_python(code, **env):
    import os

    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path.home(), env={**os.environ, **env}
    )
    assert out.returncode == 0, out.stderr
    return out.stdout


def test_the_trainer_works_in_other_processes_and_each_rank_draws_its_own_episodes(tiny, stage2):
    """As Ultralytics' multi-GPU launcher, pickle class and arguments, and rebuild the trainer in a new process."""
    cloudpickle = pytest.importorskip("cloudpickle")
    state = {"trainer": FewShotTrainer, "args": {**vars(stage2.args), "name": "ddp", "save_dir": str(tiny / "ddp")}}
    (tiny / "state.pkl").write_bytes(cloudpickle.dumps(state))
    code = f"""
import pickle
state = pickle.load(open({str(tiny / "state.pkl")!r}, "rb"))
from ultralytics.utils import DEFAULT_CFG_DICT
cfg = DEFAULT_CFG_DICT.copy()
cfg.update(save_dir="")
trainer = state["trainer"](cfg=cfg, overrides=state["args"])
trainer.setup_model()
loader = trainer.get_dataloader(trainer.data["train"], 6, rank=-1)
print("DRAWN", trainer.args.stage, trainer.args.batch, [d.image for d in loader.sampler])
"""
    drawn = [run_python(code, RANK=r, WORLD_SIZE="2").partition("DRAWN")[2].strip() for r in ("0", "1")]
    labels, names = stage2.train_loader.dataset.labels, stage2.data["names"]
    for rank in (0, 1):
        expected = [d.image for d in EpisodeSampler(labels, names, 3, 1, 1, 4, seed=0, rank=rank)]
        assert drawn[rank] == f"2 6 {expected}"
    assert drawn[0] != drawn[1]


def test_a_stock_training_is_the_same_with_and_without_the_plugin(tiny):
    code = f"""
import yolo_fewshot
from ultralytics import YOLO
YOLO({str(tiny / "stock11n.yaml")!r}).train(data={str(tiny / "data.yaml")!r}, epochs=2, imgsz=64, workers=0, batch=8,
    plots=False, project={str(tiny)!r}, name=NAME, exist_ok=True)
"""
    text = (tiny / "yolo11n-tiny.yaml").read_text()
    (tiny / "stock11n.yaml").write_text(text[: text.index("fewshot:")] + text[text.index("backbone:") :])
    for name, off in (("with", "0"), ("without", "1")):
        run_python(code.replace("NAME", repr(name)), YOLO_FEWSHOT_DISABLE=off)
    a, b = ((tiny / n / "results.csv").read_text().splitlines() for n in ("with", "without"))
    assert a[0] == b[0] and [r.split(",")[2:] for r in a] == [r.split(",")[2:] for r in b]
    a, b = (torch.load(tiny / n / "weights/last.pt", weights_only=False)["model"] for n in ("with", "without"))
    assert type(a) is type(b) is DetectionModel
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def test_bad_labels_are_reported_and_left_out_by_ultralytics(tiny, tmp_path, caplog):
    shutil.copytree(tiny / "images", tmp_path / "images")
    shutil.copytree(tiny / "labels", tmp_path / "labels", ignore=shutil.ignore_patterns("*.cache"))
    shutil.copy(tiny / "data.yaml", tmp_path)
    (tmp_path / "labels/train/00.txt").write_text("0 0.5 0.5 1.5 0.5")
    (tmp_path / "labels/train/01.txt").write_text("7 0.5 0.5 0.5 0.5")
    logging.getLogger("ultralytics").addHandler(caplog.handler)
    try:
        trainer = train(tiny, "labels", **{**EPISODIC, "epochs": 1, "data": str(tmp_path / "data.yaml")})
    finally:
        logging.getLogger("ultralytics").removeHandler(caplog.handler)
    assert "00.png: ignoring corrupt" in caplog.text and "01.png: ignoring corrupt" in caplog.text
    assert len(trainer.train_loader.dataset) == 30


def test_a_search_space_without_the_recipe_is_named(tiny, stage1, log):
    model, keys = YOLO(stage1.best), {"cfg": "stage2.yaml", "data": str(tiny / "data.yaml")}
    tune_settings(model, {**keys, "space": {"dfl": (0.05, 1.0)}})
    tune_settings(model, {**keys, "cfg": "stage1.yaml"})
    assert "space" not in log.text
    tune_settings(model, keys)
    assert "search space has dfl from 0.4, and stage 2 has dfl=0.15. Set space=" in log.text


def test_gains_can_be_tuned(tiny, stage1):
    model = YOLO(stage1.best)
    space = {"supcon": (0.1, 2.0), "n_way": (2, 4)}
    settings = {**EPISODIC, "cfg": "stage2.yaml", "epochs": 1, "data": str(tiny / "data.yaml"), "project": str(tiny)}
    del settings["n_way"]
    model.tune(space=space, iterations=1, val=True, save=False, name="tune", n_way=3, **settings)
    assert list((tiny / "tune").rglob("best_hyperparameters.yaml"))


# Steps that are not finite.


class Log(logging.Handler):
    """Collects the log messages of Ultralytics while it is open."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())

    @property
    def text(self):
        return "\n".join(self.lines)

    def __enter__(self):
        logging.getLogger("ultralytics").addHandler(self)
        return self

    def __exit__(self, *_):
        logging.getLogger("ultralytics").removeHandler(self)


@pytest.fixture
def log():
    with Log() as log:
        yield log


def spoil(monkeypatch, batches, bad):
    """Call `bad` with the trainer and those batches, counted from 1; return the numbers of all batches so far."""
    original, seen = FewShotTrainer.preprocess_batch, []

    def preprocess_batch(self, batch):
        batch = original(self, batch)
        seen.append(len(seen) + 1)
        if seen[-1] in batches:
            bad(self, batch)
        return batch

    monkeypatch.setattr(FewShotTrainer, "preprocess_batch", preprocess_batch)
    return seen


def spoil_image(trainer, batch):
    batch["img"][1] = float("nan")


def finite(model):
    return all(torch.isfinite(v).all() for v in model.state_dict().values() if v.is_floating_point())


def test_raise_stops_at_once_and_names_the_images_but_not_for_an_overflow_of_amp(tiny, monkeypatch, log):
    files, trainers = [], []

    def bad(trainer, batch):
        spoil_image(trainer, batch)
        files[:] = batch["im_file"]
        trainers.append(trainer)

    seen = spoil(monkeypatch, {1, 3}, bad)
    found = [Diagnosis("", "", [], "the scale is too large", "It is halved.", certain=False, overflow=True)]
    monkeypatch.setattr("yolo_fewshot.train.guarded.diagnose", lambda *a: found.pop() if found else diagnose(*a))
    with pytest.raises(FloatingPointError, match=r"Non-finite .*Training stops because of nonfinite=raise\.") as e:
        train(tiny, "raise", **{**EPISODIC, "epochs": 1, "nonfinite": "raise", "nonfinite_limit": 1})
    assert seen == [1, 2, 3]
    assert ", ".join(files) in str(e.value) and f"pixels of {files[1]} are not finite" in str(e.value)
    assert "AMP: the scale is too large" in log.text and "WARNING" not in log.text.split("AMP:")[1].split("\n")[0]
    guard = trainers[0].guard
    assert (guard.overflows, guard.skipped, guard.in_a_row, len(guard.norms)) == (1, 1, 1, 1)
    assert finite(trainers[0].model)


def test_only_a_finite_loss_can_be_an_overflow_of_amp(tiny, monkeypatch):
    """With a scaler, an overflow of the gradient differs from a NaN loss."""

    class Scaler(torch.amp.GradScaler):
        def __init__(self):
            super().__init__("cpu", init_scale=1.0, enabled=True)

    asked, trainers = [], []

    def bad_gradient(trainer, batch):
        trainers.append(trainer)
        trainer.scaler = Scaler()
        trainer.scaler.scale(torch.zeros(()))  # initializes its scale
        head = trainer.model.model[-1]
        hook = head.prototypes.bias.register_hook(lambda g: hook.remove() or g * float("inf"))

    spoil(monkeypatch, {2}, bad_gradient)
    monkeypatch.setattr("yolo_fewshot.train.guarded.diagnose", lambda *a: asked.append(a[-1]) or diagnose(*a))
    train(tiny, "overflow", **{**EPISODIC, "epochs": 1})
    assert asked == [True] and trainers[0].guard.overflows == 1 and trainers[0].guard.skipped == 0
    assert trainers[0].scaler.get_scale() == 0.5
    asked.clear()

    def bad_loss(trainer, batch):
        bad_gradient(trainer, batch)
        batch["img"][0] = float("nan")

    spoil(monkeypatch, {2}, bad_loss)
    train(tiny, "overflow", **{**EPISODIC, "epochs": 1})
    assert asked == [False] and trainers[1].guard.overflows == 0 and trainers[1].guard.skipped == 1


def test_too_many_bad_steps_in_a_row_stop_training_with_their_cause(tiny, monkeypatch, log):
    seen = spoil(monkeypatch, {2, 4, 5}, spoil_image)
    settings = {**EPISODIC, "episodes": 8, "epochs": 1, "nonfinite_limit": 2}
    with pytest.raises(FloatingPointError, match=r"pixels of .*2 such steps in a row.*nonfinite_limit=2"):
        train(tiny, "limit", **settings)
    assert seen == [1, 2, 3, 4, 5]  # the second batch was followed by a good one
    assert "Skipping this optimizer step (1 in this epoch, 1 in a row)." in log.text
    assert "Skipping this optimizer step (2 in this epoch, 1 in a row)." in log.text


def test_a_bad_image_leaves_no_trace_in_statistics_and_means(tiny, monkeypatch, log):
    """In the middle of the second epoch, and in its last batch, from which Ultralytics would go back to last.pt."""
    before, after = [], []

    def bad(trainer, batch):
        before.append([b.clone() for b in trainer.model.buffers() if b.is_floating_point()])
        spoil_image(trainer, batch)

    step = FewShotTrainer.optimizer_step

    def optimizer_step(self):
        step(self)
        if len(before) > len(after):
            after.append([b.clone() for b in self.model.buffers() if b.is_floating_point()])

    spoil(monkeypatch, {6, 8}, bad)
    monkeypatch.setattr(FewShotTrainer, "optimizer_step", optimizer_step)
    trainer = train(tiny, "image", **{**EPISODIC, "epochs": 2, "nonfinite_limit": 2, "doctor": 0})
    assert len(after) == 2 and all(torch.equal(x, y) for a, b in zip(before, after) for x, y in zip(a, b))
    assert finite(trainer.model) and finite(trainer.ema.ema)
    assert [r["train/skipped"] for r in rows(trainer)] == [0, 2] and "recovering" not in log.text
    assert all(np.isfinite(v) for r in rows(trainer) for v in r.values())
    assert all(rows(trainer)[1][f"train/{k}_loss"] > 0 for k in ("box", "cls", "dfl", "epi", "sup"))
    assert not any(k.startswith(("share/", "grad/", "chance/")) for k in rows(trainer)[0])  # doctor=0
    assert "Loss monitor:" not in log.text and not (trainer.save_dir / "losses.png").exists()


def test_a_non_finite_weight_is_restored_from_the_moving_average(tiny, log):
    overrides = {**EPISODIC, "epochs": 1, "model": str(tiny / "yolo11n-tiny.yaml"), "data": str(tiny / "data.yaml")}
    trainer = FewShotTrainer("stage2.yaml", {**overrides, "project": str(tiny), "name": "weight", "exist_ok": True})
    batches, averages = [], []

    def after_batch(trainer):
        batches.append(1)
        if len(batches) == 2:
            averages.append(trainer.ema.ema.model[0].conv.weight.clone())
            with torch.no_grad():
                trainer.model.model[0].conv.weight[1] = float("nan")
        elif len(batches) == 3:
            averages.append(trainer.model.model[0].conv.weight.clone())

    trainer.add_callback("on_train_batch_end", after_batch)
    trainer.train()
    assert torch.equal(*averages)
    assert "Likely cause: the weights of model.0.conv.weight are not finite." in log.text
    assert "Weights of model.0.conv.weight were taken from the moving average." in log.text
    assert finite(trainer.model) and rows(trainer)[0]["train/skipped"] == 1
    for path in (trainer.last, trainer.best):
        assert finite(torch.load(path, weights_only=False)["model"])
    state = trainer.optimizer.state
    assert (
        int(state[trainer.model.model[0].conv.weight]["step"]) == 1
    )  # of 4 steps, one was skipped, then a fresh start
    assert int(state[trainer.model.model[1].conv.weight]["step"]) == 3


@pytest.fixture(scope="module")
def accumulated(tiny):
    """Stage 1 with a step every 3 batches, 4 batches an epoch: the 8th ends the second epoch without a step."""
    with pytest.MonkeyPatch.context() as m, Log() as log:
        spoil(m, {8}, spoil_image)
        steps, step = [], FewShotTrainer.optimizer_step
        m.setattr(FewShotTrainer, "optimizer_step", lambda self: steps.append(1) or step(self))
        trainer = train(tiny, "accumulate", "stage1.yaml", **QUICK, epochs=3, batch=8, nbs=24, doctor=1)
    return trainer, log.text, len(steps)


def test_a_bad_batch_without_a_step_does_not_undo_its_epoch(accumulated):
    trainer, text, steps = accumulated
    assert steps == 4 and trainer.accumulate == 3
    assert "recovering" not in text and "Loss NaN/Inf" not in text
    assert [r["epoch"] for r in rows(trainer)] == [1, 2, 3]
    assert [r["train/skipped"] for r in rows(trainer)] == [0, 1, 0]  # the batches after the last step
    assert all(np.isfinite(v) for r in rows(trainer) for v in r.values())
    assert all(r["train/box_loss"] > 0 and r["share/box"] > 0 for r in rows(trainer))
    assert finite(trainer.model) and finite(trainer.ema.ema)


def paragraph(text):
    (line,) = [x for x in text.splitlines() if "Loss monitor:" in x]
    return line


def test_a_run_ends_with_a_summary_of_its_losses(accumulated):
    trainer, text, _ = accumulated
    last = rows(trainer)[-1]
    line = paragraph(text)
    for term in ("box", "cls", "dfl"):
        assert f"{term} {last[f'share/{term}']:.0%}" in line
    assert "1 skipped for a NaN or Inf" in line


def test_the_summary_counts_optimizer_steps(accumulated):
    _, text, steps = accumulated
    assert f"Of {steps + 1} steps" in paragraph(text)  # and the skipped one at the end of the epoch


def test_the_columns_of_guard_and_monitor(stage2):
    terms = ("box", "cls", "dfl", "epi", "sup", "cpe", "tri")
    for row in rows(stage2):
        assert sum(row[f"share/{t}"] for t in terms) == pytest.approx(1, abs=1e-3)
        assert all(row[f"{k}/{t}"] >= 0 for t in terms for k in ("share", "grad", "chance"))
        assert 0 < row["chance/dfl"] <= 0.15 * 4 * np.log(16) + 1e-3  # less if the targets sum to less than 1
        assert row["chance/tri"] == pytest.approx(0.3 * 0.3, rel=1e-3)
        assert 0 <= row["train/clipped"] <= 4 and row["train/grad_norm"] > 0
        assert row["train/skipped"] == row["train/overflows"] == 0


def test_clamps_are_counted_for_every_epoch(tiny, stage1):
    settings = {**EPISODIC, "epochs": 2, "model": str(stage1.best), "dfl_side_max": 0.01, "dfl_mean_max": 0.01}
    trainer = train(tiny, "clamps", **{**settings, "episodes": 2})
    for row in rows(trainer):
        assert row["train/means_clamped"] == 2  # one for each episode: validation is not counted
        assert row["train/sides_clamped"] >= 8
        assert row["train/dfl_loss"] == pytest.approx(0.15 * 0.01, abs=1e-5)


def test_losses_are_plotted_beside_results_png(stage2, monkeypatch):
    results, losses = stage2.save_dir / "results.png", stage2.save_dir / "losses.png"
    with monkeypatch.context() as m:
        m.setattr(stage2.monitor, "every", 0)
        m.setattr("ultralytics.engine.trainer.plot_results", lambda **_: results.touch())
        stage2.plot_metrics()
        assert results.exists() and not losses.exists()
    stage2.plot_metrics()
    assert losses.exists() and {results, losses} <= set(stage2.plots)


def test_a_checkpoint_that_is_not_finite_is_refused_before_training(tiny, stage1):
    ckpt = torch.load(stage1.best, weights_only=False)
    ckpt["model"].model[2].cv1.bn.running_var[3] = float("inf")
    ckpt["model"].model[-1].prototypes.weight.data[0] = float("nan")
    torch.save(ckpt, tiny / "broken.pt")
    with pytest.raises(ValueError, match=r"broken\.pt' cannot be trained: 2 .*model\.2\.cv1\.bn\.running_var"):
        train(tiny, "broken", **{**EPISODIC, "model": str(tiny / "broken.pt")})
    assert not (tiny / "broken/results.csv").exists()


def out_of_memory(*_):
    raise RuntimeError("CUDA out of memory.")


def test_an_episode_that_needs_too_much_memory_is_an_error_that_names_the_keys(tiny, monkeypatch):
    monkeypatch.setattr(FewShotDetectionModel, "loss", out_of_memory)
    with pytest.raises(
        MemoryError, match=r"n_way=3 x \(k_shot=1 \+ n_query=1\) = 6 images of imgsz=64 .*smaller n_way"
    ):
        train(tiny, "memory", **{**EPISODIC, "epochs": 1})


def test_the_loader_of_validation_may_have_smaller_batches(stage2, monkeypatch):
    monkeypatch.setattr(stage2, "batch_size", 5)
    assert stage2.get_dataloader(stage2.data["val"], 5, mode="val").batch_size == 5
    with pytest.raises(MemoryError):
        stage2.get_dataloader(stage2.data["train"], 5, mode="train")


def test_an_episode_may_have_fewer_images_than_there_are_processes(stage2):
    loader = stage2.get_dataloader(stage2.data["train"], 6 // 8, -1, "train")
    assert len(next(iter(loader))["im_file"]) == 6
    assert stage2.get_dataloader(stage2.data["val"], 6 // 8 * 2, -1, "val").batch_size == 1


def test_a_stage_without_its_recipe_has_its_own_gain_of_dfl_and_is_not_chosen_on_the_val_split(tiny, stage1):
    overrides = {**EPISODIC, "model": str(stage1.best), "data": str(tiny / "data.yaml"), "project": str(tiny)}
    for given, dfl in (({}, 0.15), ({"dfl": 1.5}, 1.5)):
        assert FewShotTrainer(overrides={**overrides, **given, "stage": 2, "name": "unused"}).args.dfl == dfl
    for given, val in (({}, False), ({"val": True}, True)):
        few = {k: v for k, v in overrides.items() if k not in {"n_way", "k_shot", "n_query", "episodes", "val"}}
        assert FewShotTrainer(overrides={**few, **given, "stage": 3, "name": "unused"}).args.val is val


def test_a_batch_of_more_images_in_a_resumed_run_is_an_episode_still(tiny, stage1, log):
    class Crash(Exception):
        pass

    def crash(trainer):
        raise Crash

    overrides = {**EPISODIC, "epochs": 2, "model": str(stage1.best), "data": str(tiny / "data.yaml")}
    trainer = FewShotTrainer("stage2.yaml", {**overrides, "project": str(tiny), "name": "cut", "exist_ok": True})
    trainer.add_callback("on_fit_epoch_end", crash)
    with pytest.raises(Crash):
        trainer.train()
    for batch in (2, 32):
        again = FewShotTrainer(overrides={"resume": str(trainer.last), "batch": batch})
        assert again.batch_size == again.args.batch == again.args.nbs == 6
        assert f"'batch={batch}' is ignored in stage 2" in log.text


def test_a_distilled_student_with_accumulated_batches_ends_its_epochs(tiny, stage1):
    more = {"model": str(stage1.best), "distill_model": str(stage1.best), "epochs": 2, "batch": 8, "nbs": 24}
    trainer = train(tiny, "distilled", "stage1.yaml", **{**QUICK, **more})
    assert trainer.accumulate == 3 and [r["epoch"] for r in rows(trainer)] == [1, 2]


SAFETY = {"nonfinite": "raise", "nonfinite_limit": 3, "doctor": 10}


@pytest.mark.parametrize("key", SAFETY)
def test_a_key_of_all_stages_alone_runs_stage_one(tiny, log, key):
    """A few-shot model without `stage` trains in stage 1."""
    trainer = FewShotTrainer(
        overrides={**QUICK, key: SAFETY[key], "model": "yolo11n.yaml", "data": str(tiny / "data.yaml"),
                   "project": str(tiny), "name": "safety"}
    )  # fmt: skip
    assert type(trainer) is FewShotTrainer and trainer.args.stage == 1 and type(trainer.stage) is Stage
    expected = {"nonfinite": "skip", "nonfinite_limit": 10, "doctor": 50, key: SAFETY[key]}
    assert {k: getattr(trainer.args, k) for k in SAFETY} == expected
    assert trainer.args.n_way is trainer.args.grad_clip is trainer.args.supcon is None
    assert trainer.monitor.every == expected["doctor"] and "has no effect" not in log.text


@pytest.mark.parametrize(
    ("cfg", "keys", "text"),
    [
        (1, {"n_way": 3, "grad_clip": 2.0}, "n_way= has no effect in stage 1. Use it with cfg=stage2.yaml."),
        (1, {"n_way": 3, "steps": 4}, "n_way=, steps= has no effect in stage 1. Use it with cfg=stage2.yaml or cfg=st"),
        (2, {"steps": 4, "supcon": 1.0}, "steps= has no effect in stage 2. Use it with cfg=stage3.yaml."),
        (2, {"blend": 0.5}, "blend= has no effect in stage 2. Use it with cfg=stage3.yaml graft=none."),
        (3, {"teacher": 0.5}, "teacher= has no effect in stage 3. Use it with cfg=stage3.yaml graft=none."),
    ],
)
def test_keys_of_other_stages_are_named_with_their_recipe(tiny, log, cfg, keys, text):
    overrides = {**QUICK, **keys, "model": str(tiny / "yolo11n-tiny.yaml"), "data": str(tiny / "data.yaml")}
    FewShotTrainer(f"stage{cfg}.yaml", {**overrides, "project": str(tiny), "name": "unused"})
    assert text in log.text


@pytest.mark.parametrize(
    ("cfg", "keys", "text"),
    [
        (
            2,
            {"rect": True, "nbs": 32, "close_mosaic": 5},
            "rect=True, nbs=32, close_mosaic=5 is ignored in stage 2, wh",
        ),
        (2, {"rect": False, "nbs": 64, "close_mosaic": 10}, ""),  # defaults
        (3, {"rect": True, "nbs": 16}, "rect=True is ignored in stage 3, which sets rect=False."),
        (1, {"rect": True, "nbs": 32}, ""),
    ],
)
def test_keys_that_a_stage_sets_otherwise_are_named(tiny, log, cfg, keys, text):
    overrides = {
        **QUICK,
        "batch": 16,
        **keys,
        "model": str(tiny / "yolo11n-tiny.yaml"),
        "data": str(tiny / "data.yaml"),
    }
    FewShotTrainer(f"stage{cfg}.yaml", {**overrides, "project": str(tiny), "name": "unused"})
    assert text in log.text and ("is ignored" in log.text) == bool(text)


def test_resolving_keys():
    defaults = {"nonfinite": "skip", "nonfinite_limit": 10, "doctor": 50}
    nothing = dict.fromkeys(KEYS)
    assert resolve({}) == {**nothing, **defaults, "stage": 1}
    assert resolve(SAFETY) == {**nothing, **SAFETY, "stage": 1}
    assert resolve({"doctor": 0}) == {**nothing, **defaults, "doctor": 0, "stage": 1}
    assert resolve({"stage": 1, "n_way": 3}) == {**nothing, **defaults, "n_way": 3, "stage": 1}
    assert resolve({"grad_clip": 5.0}) == {**nothing, **defaults, "grad_clip": 5.0, "stage": 1}
    everything = {k: None if k in ADAPTING else key.default for k, key in KEYS.items()}
    assert resolve({"stage": 2}) == {**everything, "stage": 2}
    assert resolve({**SAFETY, "n_way": 3, "stage": 2}) == {**everything, **SAFETY, "n_way": 3, "stage": 2}
    assert resolve({"steps": 9, "stage": 3}) == {
        **nothing,
        **defaults,
        "graft": "neck",
        "teacher": 0.5,
        "memory": 0.5,
        "steps": 9,
        "stage": 3,
    }


def test_episodes_are_plotted_at_the_start_and_at_the_end(tiny, stage1, caplog, monkeypatch):
    logging.getLogger("ultralytics").addHandler(caplog.handler)
    seen, plot = [], run_plots.plot_episode
    monkeypatch.setattr(run_plots, "plot_episode", lambda *a: seen.append(deepcopy(a)) or plot(*a))
    try:
        trainer = train(tiny, "plots", **{**EPISODIC, "plots": True}, epochs=1, model=str(stage1.best))
    finally:
        logging.getLogger("ultralytics").removeHandler(caplog.handler)
    files = [trainer.save_dir / f"{name}{i}.jpg" for name in ("episode", "val_episode") for i in range(3)]
    assert (trainer.save_dir / "embedding.png") in trainer.plots
    assert [x[2] for x in seen] == files and all(x.stat().st_size > 5000 and x in trainer.plots for x in files)
    assert all(f"Plotting episode to {x}... " in caplog.text for x in files)
    for i, (batch, names, _, found) in enumerate(seen):
        assert batch["img"].shape == (6, 3, 64, 64) and names == trainer.data["names"]
        folder = "train" if i < 3 else "val"
        assert all(f"images/{folder}/" in x for x in batch["im_file"])
        assert found is None if i < 3 else [x.shape[1] for x in found] == [6] * 3


def test_loggers_get_every_column(tiny, stage1):
    run = {**EPISODIC, "model": str(stage1.best), "data": str(tiny / "data.yaml"), "epochs": 2}
    trainer = FewShotTrainer("stage2.yaml", {**run, "project": str(tiny), "name": "logged"})
    logged = []
    trainer.add_callback("on_fit_epoch_end", lambda t: logged.append(dict(t.metrics)))  # as TensorBoard, W&B, MLflow
    trainer.train()
    for found, row in zip(logged, rows(trainer)):
        ours = [k for k in row if k.startswith(("grad/", "share/", "chance/")) or k.removeprefix("train/") in COUNTS]
        assert len(ours) == 3 * 7 + len(COUNTS) and {k: found[k] for k in ours} == {k: row[k] for k in ours}
        assert found["metrics/mAP50(B)"] == pytest.approx(row["metrics/mAP50(B)"], abs=1e-5)
    assert not any(k.startswith("grad/") for k in trainer.metrics)


def test_a_val_split_without_episodes_is_no_error(tiny, stage1, caplog):
    trainer = train(tiny, "few", **{**EPISODIC, "k_shot": 2}, epochs=1, model=str(stage1.best))
    trainer.args.k_shot = 99
    # Three images with two of three classes each: no choice of support images leaves a query image of every class.
    labels = [{"cls": np.array([[a], [b]], float)} for a, b in ((0, 1), (1, 2), (0, 2))]
    logging.getLogger("ultralytics").addHandler(caplog.handler)
    try:
        run_plots.plot_val_episodes(trainer)
        trainer.args.k_shot, trainer.test_loader.dataset.labels = 1, labels
        run_plots.plot_val_episodes(trainer)
    finally:
        logging.getLogger("ultralytics").removeHandler(caplog.handler)
    assert "the val split has too few classes with k_shot + 1 images" in caplog.text
    assert "the images of the val split cannot be divided into support and query" in caplog.text
    assert not list(trainer.save_dir.glob("*episode*"))


def test_cached_images_give_the_same_episodes(tiny, stage1):
    run = {**EPISODIC, "epochs": 1, "model": str(stage1.best), "val": False, "doctor": 0}
    trainers = [train(tiny, f"cache {i}", **{**run, **x}) for i, x in enumerate(({}, {"cache": "ram"}))]
    dataset = trainers[1].train_loader.dataset.dataset
    assert dataset.cache == "ram" and all(x is not None for x in dataset.ims)
    plain, cached = (rows(x)[0] for x in trainers)
    assert {k: v for k, v in plain.items() if k != "time"} == {k: v for k, v in cached.items() if k != "time"}


def test_a_compiled_model_is_not_measured(tiny):
    overrides = {**EPISODIC, "model": str(tiny / "yolo11n-tiny.yaml"), "data": str(tiny / "data.yaml"), "doctor": 5}
    for compiled in (False, True):
        trainer = FewShotTrainer("stage2.yaml", {**overrides, "project": str(tiny), "compile": compiled})
        assert trainer.monitor.every == (0 if compiled else 5)


PLAIN = """
nc: 4
fewshot: {embed: 16, proj: 16}
backbone: [[-1, 1, Conv, [8, 3, 2]], [-1, 1, Conv, [8, 3, 2]], [-1, 1, Conv, [8, 3, 2]], [-1, 1, Conv, [8, 3, 2]],
  [-1, 1, Conv, [8, 3, 2]]]
head: [[[2, 3, 4], 1, Detect, [nc]]]
"""


def test_a_compiled_model_trains_like_an_eager_one(tiny, monkeypatch):
    """Capture the graphs of torch.compile, but generate no code for them, which takes minutes.

    The layers before the head are few, as tracing those of a YOLO takes most of a minute.
    """
    (tiny / "plain.yaml").write_text(PLAIN)
    calls, compile = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda m, **kwargs: calls.append(m) or compile(m, backend="eager"))
    run = {**EPISODIC, "epochs": 1, "episodes": 2, "model": str(tiny / "plain.yaml"), "val": False, "doctor": 0}
    plain, compiled = (rows(train(tiny, f"compile {c}", **run, compile=c))[0] for c in (False, True))
    assert len(calls) == 1 and plain.keys() == compiled.keys()
    for k in plain:
        if k.startswith("train/"):
            assert float(compiled[k]) == pytest.approx(float(plain[k]), rel=1e-3), k


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"nonfinite": "ignore"}, "Valid 'nonfinite' values are skip, raise"),
        ({"nonfinite_limit": 0}, "'nonfinite_limit' must be finite and >= 1"),
        ({"doctor": -1}, "'doctor' must be finite and >= 0"),
    ],
)
def test_bad_safety_settings_are_errors(tiny, overrides, message):
    with pytest.raises(ValueError, match=message):
        train(tiny, "bad", **{**EPISODIC, **overrides})
