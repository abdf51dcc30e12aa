import logging
import re
import shutil
from copy import deepcopy
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from ultralytics import YOLO
from ultralytics.nn.tasks import load_checkpoint
from ultralytics.utils import LOGGER, YAML

from yolo_fewshot import FewShotTrainer, FewShotYOLO
from yolo_fewshot.args import ADAPTING, EVERY_STAGE, KEYS, check, resolve
from yolo_fewshot.data.demo import BASE, NOVEL
from yolo_fewshot.data.shots_and_base import ShotsAndBase
from yolo_fewshot.data.support import Support, read_support
from yolo_fewshot.nn.criterion import FewShotLoss, branch_losses
from yolo_fewshot.nn.ignore import IGNORED
from yolo_fewshot.paths import cfg_dir
from yolo_fewshot.train import adaptation as module
from yolo_fewshot.train.adaptation import blend_for, freeze_for, support_ap50
from yolo_fewshot.train.shots import steps_for

ROWS = ("weight", "gain", "offset")  # tensors of a bank with a row for each class
NEW = tuple(reversed(NOVEL))  # the order in which the shots of these tests number the novel classes
QUICK = {
    "graft": "none", "imgsz": 96, "workers": 0, "plots": False, "verbose": False, "batch": 4, "steps": 4, "epochs": 2,
    "mosaic": 0.0, "scale": 0.0, "translate": 0.0, "warmup_epochs": 0, "exist_ok": True,
}  # fmt: skip


# Settings


def test_stage_three_has_its_own_keys():
    for k, v in (("base_replay", "base.yaml"), ("teacher", 0.5), ("memory", 2.0), ("steps", 7)):
        assert k in ADAPTING
        values = resolve({k: v, "stage": 3})
        assert values["stage"] == 3 and values[k] == v
        assert all(values[x] is not None for x in EVERY_STAGE)
        assert not [x for x in KEYS if values[x] is not None and x not in {"stage", *ADAPTING, *EVERY_STAGE}]
        assert resolve({k: v, "stage": 2})["stage"] == 2
    assert resolve({"stage": 3})["steps"] == KEYS["steps"].default and resolve({"stage": 2})["steps"] is None
    assert not any(resolve({"stage": 2})[k] for k in ADAPTING)
    with pytest.raises(ValueError, match="'steps' must be finite and >= 1"):
        check({"steps": 0})


def test_the_recipe_of_stage_three_is_valid_and_does_not_validate():
    recipe = YAML.load(cfg_dir() / "stage3.yaml")
    assert recipe["stage"] == 3 and recipe["val"] is False and recipe["data"] == "fewshot-demo-novel.yaml"
    check(recipe)
    assert not [k for k in KEYS if recipe.get(k) is not None and k not in {"stage", *ADAPTING, *EVERY_STAGE}]
    assert recipe["graft"] == KEYS["graft"].default and not {"steps", "blend", "teacher", "memory"} & set(recipe)


@pytest.mark.parametrize(
    "shots, batch, steps", [(1, 16, 300), (80, 16, 300), (81, 16, 304), (230, 16, 863), (50, 4, 750)]
)
def test_steps_grow_with_the_shots(shots, batch, steps):
    assert steps_for(shots, batch) == steps


@pytest.mark.parametrize(
    ("labels", "part"),
    [
        (((3,), (4,)), 0.5),
        (((3, 4), ()), 0.5),
        (((3,), (4,), (4,)), 0.75),  # a median of 1.5
        (((3,), (4,), (5, 5)), 0.5),
        (((3, 4), (3, 4)), 0.75),
        ((), 0.5),
        (((), ()), 0.5),
    ],
)
def test_the_default_blend_is_larger_with_more_than_one_shot(labels, part):
    assert blend_for([{"cls": np.array(x, np.float32).reshape(-1, 1)} for x in labels]) == part


@pytest.mark.parametrize(
    ("labels", "frozen"), [(((0,), (1, 2)), 0), (((2, 1, 0, 0),), 0), (((0,), (2, 2)), 10), (((0, 1), ()), 10)]
)
def test_the_backbone_is_frozen_by_default_if_a_class_has_no_shots(labels, frozen):
    labels = [{"cls": np.array(x, np.float32).reshape(-1, 1)} for x in labels]
    shots = Support({0: "new", 1: 7, 2: "old", 3: "unseen"}, labels, False, Path("shots"), 3)
    assert freeze_for({0: "old", 1: "7", 2: "new"}, shots) == frozen


# Runs


def copy_part(files, root, split, number):
    """Copy images with their labels, and renumber the classes by `number`."""
    for file in files:
        label = Path(str(file).replace("/images/", "/labels/")).with_suffix(".txt")
        rows = [x.split(" ", 1) for x in label.read_text().splitlines()]
        rows = [f"{number((BASE + NOVEL)[int(c)])} {box}\n" for c, box in rows]
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True, exist_ok=True)
        shutil.copy(file, root / "images" / split)
        (root / "labels" / split / label.name).write_text("".join(rows))


@pytest.fixture(scope="module")
def site(demo, tmp_path_factory):
    """Shots and base images with other class indices than the model."""
    root = tmp_path_factory.mktemp("site")
    shots = [demo / x for x in (demo / "novel_5shot.txt").read_text().split()]
    copy_part(shots, root / "shots", "train", NEW.index)
    copy_part(sorted((demo / "images/novel_query").iterdir())[:4], root / "shots", "val", NEW.index)
    base = tuple(reversed(BASE))
    copy_part(sorted((demo / "images/train").iterdir())[:10], root / "base", "train", base.index)
    (root / "base/ignore/train").mkdir(parents=True)
    (root / "base/ignore/train/0000.txt").write_text("0.5 0.5 0.25 0.25\n")
    for name, classes, val in (("shots", NEW, "images/val"), ("base", base, "images/train")):
        data = {"path": str(root / name), "train": "images/train", "val": val, "names": list(classes)}
        YAML.save(root / f"{name}.yaml", {**data, "fewshot": {"novel": [], "ignore": "ignore"}})
    return root


def settings(site, start, **overrides):
    paths = {"model": str(start.best), "data": str(site / "shots.yaml"), "base_replay": str(site / "base.yaml")}
    return {**QUICK, **paths, "project": str(site), **overrides}


@pytest.fixture(scope="module")
def start(trained):
    """The trainer of stage 2."""
    return trained[1]


class Seen:
    """Records the batches of a run, the model before the first step, and the calls of enrollment."""

    def __init__(self, patch):
        self.batches, self.enrollments, self.model = [], [], None
        preprocess, enroll, callbacks = FewShotTrainer.preprocess_batch, module.enroll, FewShotTrainer.run_callbacks

        def preprocess_batch(trainer, batch):
            assert batch["img"].shape[0] == len(batch["im_file"])
            classes = [sorted(batch["cls"][batch["batch_idx"] == i, 0].tolist()) for i in range(len(batch["im_file"]))]
            self.batches.append((trainer.epoch, list(batch["im_file"]), classes))
            return preprocess(trainer, batch)

        def run_callbacks(trainer, event):
            if event == "on_train_start" and self.model is None:
                self.model = deepcopy(trainer.model)
            callbacks(trainer, event)

        patch.setattr(FewShotTrainer, "preprocess_batch", preprocess_batch)
        patch.setattr(FewShotTrainer, "run_callbacks", run_callbacks)
        patch.setattr(module, "enroll", lambda *a, **k: self.enrollments.append(a) or enroll(*a, **k))


@pytest.fixture
def seen(monkeypatch):
    return Seen(monkeypatch)


@pytest.fixture(scope="module")
def adapted(site, start):
    """The trainer of a full run, and the record of the run."""
    trainer = FewShotTrainer("stage3.yaml", settings(site, start, name="adapted"))
    with pytest.MonkeyPatch.context() as m:
        seen = Seen(m)
        trainer.train()
    return trainer, seen


def checkpoint(file):
    ckpt = torch.load(file, map_location="cpu", weights_only=False)
    return ckpt.get("ema") or ckpt["model"]


EXPECTED = dict(enumerate((*BASE, *NEW)))


def test_classes_of_the_shots_are_appended_and_old_ids_are_kept(adapted, start):
    assert checkpoint(start.best).names == dict(enumerate(BASE))
    trainer, seen = adapted
    for model in (seen.model, trainer.model, checkpoint(trainer.best), checkpoint(trainer.last)):
        assert model.names == EXPECTED and model.nc == model.model[-1].nc == model.yaml["nc"] == 32
        assert all(len(bank.weight) == 32 for bank in model.model[-1].branch_prototypes)


def test_a_run_begins_with_the_novel_classes_enrolled(adapted, start, site):
    model = FewShotYOLO(start.best)
    model.enroll(str(site / "shots.yaml"), imgsz=96)
    expected, first = model.model.float(), adapted[1].model
    assert expected.names == first.names and len(adapted[1].enrollments) == 1
    for bank, other in zip(first.model[-1].branch_prototypes, expected.model[-1].branch_prototypes):
        for name in ROWS:
            torch.testing.assert_close(getattr(bank, name).data, getattr(other, name).data, rtol=1e-5, atol=1e-6)
    rows = first.model[-1].prototypes
    assert not torch.equal(rows.gain[24:], torch.ones(8)) or not torch.equal(rows.offset[24:], torch.zeros(8))
    other = expected.state_dict()
    for k, v in first.state_dict().items():
        torch.testing.assert_close(v, other[k], rtol=1e-5, atol=1e-6, msg=k)
    assert first.enrolled.keys() == set(NOVEL)
    assert {k: v["shots"] for k, v in first.enrolled.items()} == {k: v["shots"] for k, v in expected.enrolled.items()}


def test_base_images_are_in_every_batch_and_classes_are_those_of_the_model(adapted, site):
    trainer, seen = adapted
    assert len(seen.batches) == 4 and [x[0] for x in seen.batches] == [0, 0, 1, 1]
    index = {n: i for i, n in EXPECTED.items()}
    ignored = 0
    for _, files, classes in seen.batches:
        assert ["/shots/" in x for x in files] == [True, True, False, False]
        assert ["/base/" in x for x in files] == [False, False, True, True]
        for file, found in zip(files, classes):
            names = NEW if "/shots/" in file else tuple(reversed(BASE))
            label = Path(file.replace("/images/", "/labels/")).with_suffix(".txt")
            expected = [index[names[int(x.split()[0])]] for x in label.read_text().splitlines()]
            assert sorted(expected) == [x for x in found if x != IGNORED]
            assert (IGNORED in found) == file.endswith("base/images/train/0000.jpg")
            ignored += found.count(IGNORED)
    assert all(x.masked for x in branch_losses(trainer.model)) and ignored <= 1
    assert type(trainer.train_loader.dataset) is ShotsAndBase
    moving = {int(k.split(".")[1]) for k, p in trainer.model.named_parameters() if p.requires_grad}
    assert min(moving) == trainer.args.freeze == 10


@pytest.fixture(scope="module")
def retained(site, start):
    """Runs on shots alone and their batches: without retention, with a teacher, with the replay buffer."""
    runs, batches, forward = {}, [], FewShotLoss.loss
    for name, gains in {"none": (0.0, 0.0), "teacher": (0.5, 0.0), "memory": (0.0, 0.5)}.items():
        keys = dict(zip(("teacher", "memory"), gains), name=f"retained_{name}", lr0=0.01, steps=8, blend=1.0)
        runs[name] = FewShotTrainer("stage3.yaml", settings(site, start, base_replay=None, **keys))
        with pytest.MonkeyPatch.context() as m:
            m.setattr(FewShotLoss, "loss", lambda *a: batches.append(a[2]) or forward(*a))
            runs[name].train()
    return runs, batches


def test_the_initial_model_is_the_teacher_of_unlabeled_classes(retained):
    runs, batches = retained
    initial, unlabeled = load_checkpoint(runs["teacher"].wdir / "enrolled.pt")[0].eval(), list(range(24))
    distilled = [x for x in batches if "teacher" in x]
    assert len(distilled) == 8
    for batch in distilled:
        with torch.no_grad():
            expected = initial(batch["img"])[1]["scores"][:, unlabeled].sigmoid().transpose(1, 2)
        (scores,) = batch["teacher"]
        torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)
    assert all(x.retention.unlabeled.tolist() == unlabeled for r in runs.values() for x in branch_losses(r.model))
    tea = [[r["train/tea_loss"] for r in v._results()] for v in runs.values()]
    assert not any(tea[0] + tea[2]) and all(tea[1])


def test_replay_keeps_the_scores_of_old_classes_at_the_anchors_of_the_buffer(retained):
    runs = retained[0]
    initial = load_checkpoint(runs["none"].wdir / "enrolled.pt")[0]
    embeds, level, _ = initial.memory[0]
    score = {}
    for k, model in {"before": initial, **{k: v.model for k, v in runs.items()}}.items():
        rows = [model.model[-1].prototypes.rows(i) for i in range(3)]
        z = torch.stack([rows[i][0] @ e.float() + rows[i][1] for e, i in zip(embeds, level.tolist())]).detach()
        score[k] = z[:, :24].sigmoid(), z[:, 24:].sigmoid()
    moved = {k: float((v[0] - score["before"][0]).abs().sum()) for k, v in score.items()}
    assert moved["memory"] < 0.7 * moved["none"]
    assert score["memory"][1].mean() < score["none"][1].mean()  # no object of a new class at those anchors
    mem = [[r["train/mem_loss"] for r in v._results()] for v in runs.values()]
    assert not any(mem[0] + mem[1]) and all(mem[2])


def test_labeled_classes_need_no_teacher(site, start):
    trainer = FewShotTrainer("stage3.yaml", settings(site, start, name="labeled"))
    trainer.train()
    shown = {int(c) for x in trainer.train_loader.dataset.labels for c in x["cls"].flat}
    unlabeled = [i for i in range(32) if i not in shown]
    for loss in branch_losses(trainer.model):
        assert (loss.retention is None) == (not unlabeled)
        assert not unlabeled or loss.retention.unlabeled.tolist() == unlabeled


def test_labels_of_validation_images_are_those_of_the_model(adapted, site):
    found = {Path(x["im_file"]).stem: x["cls"].flatten().tolist() for x in adapted[0].test_loader.dataset.labels}
    assert len(found) == 4
    for file in (site / "shots/labels/val").glob("*.txt"):
        ids = [24 + int(x.split()[0]) for x in file.read_text().splitlines()]
        assert found[file.stem] == ids


def test_enrolled_classes_prior_strength_and_replay_buffer_survive(adapted, start):
    before, (trainer, seen) = checkpoint(start.best), adapted
    assert before.prior_strength is not None and before.memory
    for model in (trainer.model, checkpoint(trainer.best), checkpoint(trainer.last)):
        assert model.prior_strength == before.prior_strength
        assert model.enrolled.keys() == set(NOVEL)
        assert {k: v["conf"] for k, v in model.enrolled.items()} == {
            k: v["conf"] for k, v in seen.model.enrolled.items()
        }
        assert len(model.memory) == len(before.memory) == len(model.model[-1].branch_prototypes)
        for embeds, level, cls in model.memory:
            assert len(embeds) == len(level) == len(cls) > 0 and torch.isfinite(embeds.float()).all()
            assert cls.min() == -1 and 0 <= cls.max() < 24  # classes of base images, and background


def test_a_run_trains_and_its_results_are_recorded(adapted):
    trainer, seen = adapted
    assert not (trainer.save_dir / "support_check.png").exists()  # plots=False
    rows = trainer._results()
    assert len(rows) == 2 and [x["train/steps"] for x in rows] == [2, 2]
    assert all(np.isfinite(x[k]) for x in rows for k in x if k.startswith("train/"))
    first, last = seen.model.model[-1].prototypes.weight, trainer.model.model[-1].prototypes.weight
    assert (first - last).abs().amax(1).flatten().gt(0).all()
    recorded = YAML.load(trainer.save_dir / "args.yaml")
    assert recorded["stage"] == 3 and recorded["nbs"] == recorded["batch"] == 4 and recorded["n_way"] is None


def test_ap50_on_the_support_set_is_that_of_ultralytics(enrolled, demo, tmp_path):
    """They differ by the detections at anchors that enrollment does not extract."""
    model = YOLO(enrolled)
    data = YAML.load(cfg_dir() / "fewshot-demo-novel.yaml") | {"path": str(demo), "val": "novel_5shot.txt"}
    YAML.save(tmp_path / "shots.yaml", {k: v for k, v in data.items() if k != "download"})
    stock = model.val(data=str(tmp_path / "shots.yaml"), imgsz=96, workers=0, plots=False, project=str(tmp_path))
    support = read_support("fewshot-demo-novel.yaml", model.names)
    ours = support_ap50(model.model.float().eval(), support, 96)
    assert ours == pytest.approx(stock.box.map50, abs=0.03) and 0.05 < ours < 1


def test_a_run_ends_with_the_enrolled_weights_if_ap50_on_the_support_set_drops(site, start, caplog):
    logging.getLogger("ultralytics").addHandler(caplog.handler)
    try:
        trainer = FewShotTrainer("stage3.yaml", settings(site, start, name="dropped", lr0=1.0, blend=1.0, freeze=0))
        trainer.train()
    finally:
        logging.getLogger("ultralytics").removeHandler(caplog.handler)
    assert "so the run ends with the enrolled weights, enrolled.pt" in caplog.text
    expected = checkpoint(site / "dropped/weights/enrolled.pt").float().state_dict()
    for file in (trainer.last, trainer.best):
        for k, v in checkpoint(file).float().state_dict().items():
            torch.testing.assert_close(v, expected[k], rtol=1e-3, atol=1e-3, msg=k)  # saved in float16


def test_the_adapted_model_validates_and_predicts_through_the_stock_class(adapted, site):
    trainer, _ = adapted
    model = YOLO(trainer.best)
    assert model.names == EXPECTED
    result = model.val(data=str(site / "shots.yaml"), imgsz=96, workers=0, plots=False, project=str(site))
    assert 0 <= result.box.map50 <= 1
    assert sorted(result.box.ap_class_index.tolist()) == sorted(
        {int(c) for x in trainer.test_loader.dataset.labels for c in x["cls"].flat}
    )
    (found,) = model.predict(str(site / "shots/images/train/0000.jpg"), imgsz=96, conf=0.001, verbose=False)
    assert found.names == EXPECTED and len(found.boxes) and found.boxes.cls.max() < 32


def test_a_resumed_run_has_the_same_batches_and_enrolls_only_once(adapted, site, start, seen, monkeypatch):
    class Stop(Exception):
        pass

    def interrupt(self, metrics):
        if self.epoch == 1:
            raise Stop
        return save_metrics(self, metrics)

    save_metrics = FewShotTrainer.save_metrics
    with monkeypatch.context() as m, pytest.raises(Stop):
        m.setattr(FewShotTrainer, "save_metrics", interrupt)
        FewShotTrainer("stage3.yaml", settings(site, start, name="cut")).train()
    assert seen.batches == adapted[1].batches and len(seen.enrollments) == 1
    last = site / "cut/weights/last.pt"
    saved, seen.model = checkpoint(last).float(), None
    seen.batches.clear()
    YOLO(last).train(resume=True)
    assert seen.batches == adapted[1].batches[2:] and len(seen.enrollments) == 1
    # It starts from the trained weights, not from enrolled ones.
    assert seen.model.names == EXPECTED and seen.model.enrolled.keys() == set(NOVEL)
    for bank, other in zip(seen.model.model[-1].branch_prototypes, saved.model[-1].branch_prototypes):
        torch.testing.assert_close(bank.weight.data, other.weight.data, rtol=1e-3, atol=1e-4)
    final = checkpoint(site / "cut/weights/best.pt")
    assert final.names == EXPECTED and final.enrolled.keys() == set(NOVEL) and final.memory
    assert final.prior_strength == checkpoint(start.best).prior_strength


def built(site, start, cfg="stage3.yaml", **overrides):
    """A trainer with its model, before training."""
    trainer = FewShotTrainer(cfg, settings(site, start, name="built", **overrides))
    trainer.setup_model()
    return trainer


def test_the_built_in_data_sets(site, start, seen, monkeypatch):
    """Shots with other class indices than the model, without base images."""
    trainer = built(site, start, data="fewshot-demo-novel.yaml", base_replay=None, batch=5, steps=5, plots=True)
    file = trainer.save_dir / "support_check.png"
    trainer.callbacks["on_train_start"][-1](trainer)  # a multi-GPU launcher empties the folder of the run before
    assert file.stat().st_size > 20_000 and list(trainer.plots) == [file]
    assert trainer.model.names == dict(enumerate((*BASE, *NOVEL))) and len(seen.enrollments) == 1
    trainer.model.args = trainer.args
    loader = trainer.get_dataloader(trainer.data["train"], 5, -1)
    assert len(loader) == 3 and len(loader.dataset) == 12  # 5 steps in 2 epochs
    trainer.args.steps = None
    logged = []
    monkeypatch.setattr(LOGGER, "info", logged.append)
    assert len(trainer.get_dataloader(trainer.data["train"], 5, -1)) == 150
    assert "300 steps on 12 support images and 0 other images" in logged[-1]
    assert sorted(set(loader.sampler)) == list(range(12))
    assert {int(c) for x in loader.dataset.labels for c in x["cls"].flat} == set(range(24, 32))


def test_classes_that_are_enrolled_already_are_not_enrolled_again(site, start, enrolled, seen):
    trainer = built(site, start, model=str(enrolled), data="fewshot-demo-novel.yaml", base_replay=None)
    before = checkpoint(enrolled)
    assert not seen.enrollments and trainer.model.names == before.names and trainer.model.enrolled == before.enrolled
    for bank, other in zip(trainer.model.model[-1].branch_prototypes, before.model[-1].branch_prototypes):
        assert all(torch.equal(getattr(bank, k), getattr(other, k).float()) for k in ROWS)


def test_a_name_in_another_case_leaves_the_old_class_unchanged(site, start, tmp_path):
    data = YAML.load(site / "shots.yaml")
    data["names"][0] = BASE[0].upper()
    YAML.save(tmp_path / "shots.yaml", data)
    trainer, before = built(site, start, data=str(tmp_path / "shots.yaml")), checkpoint(start.best).float()
    row = trainer.model.model[-1].prototypes.weight[0, :, 0].detach()
    assert torch.cosine_similarity(row, before.model[-1].prototypes.weight[0, :, 0], dim=0) > 0.999


def test_classes_are_matched_by_name_and_not_by_cls_remap(site, start):
    trainer, before = built(site, start, cls_remap=False), checkpoint(start.best).float()
    assert trainer.model.names == EXPECTED and trainer.model.enrolled.keys() == set(NOVEL)
    rows = trainer.model.model[-1].prototypes.weight[:24].detach()
    torch.testing.assert_close(rows, before.model[-1].prototypes.weight.detach(), rtol=1e-5, atol=1e-6)


def test_automatic_batch_size_is_an_error(site, start):
    with pytest.raises(ValueError, match=r"'batch=-1' is an invalid value\. In stage 3 'batch' must be >= 1"):
        FewShotTrainer("stage3.yaml", settings(site, start, name="auto", batch=-1))


# Errors


@pytest.mark.parametrize("kind", ["stock", "yaml", "stock yaml"])
def test_only_few_shot_checkpoints_can_be_adapted(site, start, tmp_path, kind):
    model = {"yaml": "yolo11n-fewshot.yaml", "stock yaml": "yolo11n.yaml"}.get(kind, str(tmp_path / "stock.pt"))
    if kind == "stock":
        YOLO("yolo11n.yaml").save(model)
    with pytest.raises(ValueError, match=r"cannot be adapted with graft=none, which starts from a few-shot checkp"):
        FewShotTrainer("stage3.yaml", settings(site, start, name=f"bad {kind}", model=model)).setup_model()
    assert not any((site / f"bad {kind}/weights").iterdir())


def test_a_class_without_shots_that_the_model_does_not_know_is_left_out(site, start, tmp_path):
    data = YAML.load(site / "shots.yaml")
    YAML.save(tmp_path / "shots.yaml", {**data, "names": [*data["names"], "unicorn"]})
    assert "unicorn" not in built(site, start, data=str(tmp_path / "shots.yaml")).model.names.values()


def test_base_images_of_an_unknown_class_are_an_error_that_names_them(site, start, tmp_path):
    shutil.copytree(site / "base", tmp_path / "base", ignore=shutil.ignore_patterns("*.cache"))
    data = YAML.load(site / "base.yaml")
    YAML.save(tmp_path / "base.yaml", {**data, "path": str(tmp_path / "base"), "names": [*data["names"], "unicorn"]})
    label = tmp_path / "base/labels/train/0003.txt"
    label.write_text(f"{label.read_text()}24 0.5 0.5 0.2 0.2\n")
    trainer = built(site, start, base_replay=str(tmp_path / "base.yaml"))
    data = trainer.data
    with pytest.raises(
        ValueError, match=r"base.images.train.0003\.jpg has labels of unicorn, which the model does not know"
    ):
        trainer.get_dataloader(data["train"], 4, -1)
    assert trainer.data is data


def test_base_images_that_do_not_exist_are_an_error_before_training(site, start, monkeypatch):
    monkeypatch.setattr(FewShotTrainer, "get_model", lambda *a, **k: pytest.fail("too late"))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        FewShotTrainer("stage3.yaml", settings(site, start, name="nowhere", base_replay="nowhere.yaml")).train()


def test_keys_of_episodes_have_no_effect_in_stage_three(site, start, caplog):
    logging.getLogger("ultralytics").addHandler(caplog.handler)
    try:
        FewShotTrainer("stage3.yaml", settings(site, start, name="idle", n_way=3, supcon=1.0, grad_clip=2.0))
        assert "n_way=, supcon= has no effect in stage 3. Use it with cfg=stage2.yaml." in caplog.text
        caplog.clear()
        FewShotTrainer("stage3.yaml", settings(site, start, name="idle", grad_clip=2.0))
        assert "has no effect" not in caplog.text
    finally:
        logging.getLogger("ultralytics").removeHandler(caplog.handler)


# Ends and starts of a run


@pytest.mark.parametrize(
    "early",
    [{"time": 1e-9}, {"val": True, "patience": 1, "epochs": 6}, {"stop": True, "epochs": 6}, {"val": True}],
    ids=["time", "patience", "stop", "val"],
)
def test_final_weights_are_interpolated_however_the_training_loop_ends(site, start, early, monkeypatch):
    """Both files have the mean of the initial and the last weights; no results on the val split choose an epoch."""
    monkeypatch.setattr(module, "MAX_DROP", 1.0)
    overrides = {k: v for k, v in early.items() if k != "stop"}
    trainer = FewShotTrainer("stage3.yaml", settings(site, start, name="early", blend=0.5, **overrides))
    if "stop" in early:
        trainer.add_callback("on_train_batch_end", lambda t: setattr(t, "stop", True))
    trainer.train()
    assert trainer.epoch + 1 < 6
    initial = checkpoint(trainer.wdir / "enrolled.pt").float().state_dict()
    ends = [checkpoint(f).float().state_dict() for f in (trainer.last, trainer.best)]
    for k, v in trainer.ema.ema.state_dict().items():
        if v.is_floating_point():
            expected = (v.float() + initial[k]) / 2
            for end in ends:
                torch.testing.assert_close(end[k], expected, rtol=2e-3, atol=2e-3, msg=k)
    metrics = torch.load(trainer.best, weights_only=False)["train_metrics"]
    assert metrics["metrics/mAP50(B)"] == pytest.approx(trainer.metrics["metrics/mAP50(B)"])


def test_a_run_without_a_checkpoint_ends_without_one(site, start):
    """As in Ultralytics, if the time is up before an epoch is saved."""
    trainer = FewShotTrainer("stage3.yaml", settings(site, start, name="none", save=False, time=1e-9, epochs=4))
    trainer.train()
    assert [x.name for x in trainer.wdir.iterdir()] == ["enrolled.pt"]


def crops(folder, demo, name, shot):
    """A folder of crops with a part of a demo image as a class."""
    (folder / name).mkdir(parents=True)
    image = cv2.imread(str(demo / "images/novel_query/0000.jpg"))
    cv2.imwrite(str(folder / name / "0.png"), image[8 : 40 + shot, 8 : 40 + shot])
    return str(folder)


def test_training_starts_from_what_the_model_holds_in_memory(site, start, demo, tmp_path):
    """A class was enrolled and another forgotten since the file was written; names, rows and records agree."""
    model = FewShotYOLO(start.best)
    model.enroll(crops(tmp_path / "a", demo, "gone", 0), imgsz=96)
    model.enroll(crops(tmp_path / "b", demo, "kept", 4), imgsz=96)
    model.forget("gone")
    rows = {str(n): model.model.model[-1].get_class(i)[0][0] for i, n in model.model.names.items()}
    run = settings(site, start, name="memory", base_replay=None, steps=1, epochs=1, blend=0.0)
    model.train(cfg="stage3.yaml", **run)
    begun, end = checkpoint(model.trainer.wdir / "enrolled.pt").float(), checkpoint(model.trainer.best)
    names = [*BASE, "kept", *NEW]
    assert [*begun.names.values()] == [*end.names.values()] == [*model.names.values()] == names
    assert set(begun.enrolled) == set(end.enrolled) == {"kept", *NEW}
    for i, name in enumerate(names[: len(BASE) + 1]):
        torch.testing.assert_close(begun.model[-1].get_class(i)[0][0], rows[name], rtol=1e-5, atol=1e-6)
    found = model.val(data=str(site / "shots.yaml"), imgsz=96, workers=0, plots=False, project=str(site))
    assert found.box.map50 > 0.05


def test_a_run_whose_folder_was_moved_resumes_in_the_new_folder(site, start, tmp_path, monkeypatch):
    trainer = FewShotTrainer("stage3.yaml", settings(site, start, name="stays", base_replay=None))
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(FewShotTrainer, "final_eval", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        trainer.train()
    shutil.move(trainer.save_dir, tmp_path / "moved")
    begun, last = (str(tmp_path / "moved/weights" / x) for x in ("enrolled.pt", "last.pt"))
    shutil.move(begun, tmp_path / "aside.pt")
    with pytest.raises(
        FileNotFoundError, match=r"moved.weights.enrolled\.pt.* is missing.*Put it back beside last\.pt"
    ):
        YOLO(last).train(resume=True)
    shutil.move(tmp_path / "aside.pt", begun)
    model = YOLO(last)
    model.train(resume=True)
    assert model.trainer.save_dir == tmp_path / "moved" and not trainer.save_dir.exists()
    assert torch.load(last, weights_only=False)["optimizer"] is None and (tmp_path / "moved/weights/best.pt").exists()


@pytest.mark.parametrize(
    ("key", "value"), [("single_cls", True), ("distill_model", "yolo11n.pt"), ("classes", [0]), ("fraction", 0.5)]
)
def test_arguments_that_do_not_work_in_stage_three_are_an_error_before_training(site, start, key, value):
    text = re.escape(f"'{key}={value}'")
    with pytest.raises(ValueError, match=f"{text} does not work in stage 3, which .* Leave it out"):
        FewShotTrainer("stage3.yaml", settings(site, start, name="refused", **{key: value}))
    assert not (site / "refused").exists()
