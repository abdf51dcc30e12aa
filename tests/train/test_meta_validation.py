"""Classes that are kept out of training: their choice, what the loss sees, their AP50, and the checkpoint it picks."""

import csv
import itertools
import random
import re
from copy import deepcopy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ultralytics import YOLO
from ultralytics.cfg import get_cfg
from ultralytics.data.build import build_yolo_dataset
from ultralytics.data.utils import check_det_dataset
from ultralytics.utils import nms

from yolo_fewshot import FewShotTrainer, FewShotYOLO
from yolo_fewshot import args as table
from yolo_fewshot.data.episodes import EpisodeSampler
from yolo_fewshot.data.ignore import fully_labeled, masked
from yolo_fewshot.enroll.enroll import enroll
from yolo_fewshot.enroll.replay import fill_replay_buffer
from yolo_fewshot.nn.criterion import FewShotLoss, branch_losses
from yolo_fewshot.nn.ignore import IGNORED
from yolo_fewshot.nn.model import FewShotDetectionModel
from yolo_fewshot.train import meta_validation
from yolo_fewshot.train.doctor import doctor
from yolo_fewshot.train.meta_validation import COLUMNS, MetaValidation, choose_classes, fitness_of
from yolo_fewshot.train.stage import Stage

QUICK = {
    "imgsz": 64, "workers": 0, "plots": False, "optimizer": "AdamW", "lr0": 0.001, "warmup_epochs": 0, "verbose": False,
    "seed": 1, "meta_val": 0.5, "doctor": 0,
}  # fmt: skip
FIRST = {"batch": 8, "nbs": 8, "mosaic": 0.0, "epochs": 2}
EPISODIC = {"n_way": 2, "k_shot": 1, "n_query": 1, "episodes": 3, "epochs": 2}
NAMES = ["blue", "green", "red", "black"]
EPOCHS = 16  # of stage 1, after which some AP is above 0
HELD_OUT = choose_classes(dict(enumerate(NAMES)), 0.5, 1)
BOX = "0.5 0.5 0.3 0.3"


# The choice


@pytest.mark.parametrize(
    ("n", "share", "expected"), [(4, 0.5, 2), (10, 0.2, 2), (60, 0.2, 12), (20, 0.01, 2), (7, 0.4, 3)]
)
def test_a_share_of_the_classes_is_chosen_whatever_their_order_and_indices(n, share, expected):
    names = [f"class {i}" for i in range(n)]
    shuffled = np.random.default_rng(0).permutation(names)
    chosen = choose_classes(dict(enumerate(names)), share, 3)
    assert len(set(chosen)) == expected and set(chosen) <= set(names)
    assert choose_classes({5 + i: x for i, x in enumerate(shuffled)}, share, 3) == chosen


def test_the_choice_depends_on_the_seed_and_a_new_class_changes_one_name_at_most():
    names = {i: f"class {i}" for i in range(30)}
    draws = {tuple(choose_classes(names, 0.2, seed)) for seed in range(10)}
    assert len(draws) == 10
    more = choose_classes({**names, 30: "another"}, 0.2, 0)
    assert len(set(more) ^ set(choose_classes(names, 0.2, 0))) <= 2


def test_a_name_of_two_classes_is_not_chosen():
    names = dict(enumerate(["a", "a", "b", "c", "d"]))
    assert all("a" not in choose_classes(names, 0.4, seed) for seed in range(20))


@pytest.mark.parametrize("names", [["a", "b", "c"], ["a"], ["a", "a", "a", "b", "c"][:4]])
def test_too_few_classes_are_an_error(names):
    with pytest.raises(ValueError, match=r"'meta_val=0\.2' keeps 2 classes out of .* Use data with more classes"):
        choose_classes(dict(enumerate(names)), 0.2, 0)


# What training sees


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, draw_tiny):
    """A folder with tiny models and a data set of 4 classes, 8 images of 64 px each."""
    return draw_tiny(tmp_path_factory.mktemp("meta"), 32)


def load(data, mode="train"):
    cfg = get_cfg(
        overrides={"imgsz": 64, "task": "detect", "mosaic": 0.0, "fliplr": 0.0, "scale": 0.0, "translate": 0.0}
    )
    return build_yolo_dataset(cfg, data[mode], 8, data, mode=mode)


def test_objects_of_hidden_classes_become_ignore_regions(tiny):
    data = check_det_dataset(str(tiny / "data.yaml"))
    plain, hidden = load(data), masked(load(data), data, "train", [1, 3])
    assert len(hidden.labels) == len(plain.labels) == 32
    for a, b, x, y in zip(plain.labels, hidden.labels, plain, hidden):
        gone = a["cls"].item() in {1, 3}
        assert len(b["cls"]) == len(b["bboxes"]) == (0 if gone else 1)
        assert y["cls"].tolist() == ([[IGNORED]] if gone else x["cls"].tolist())
        torch.testing.assert_close(x["bboxes"], y["bboxes"])
    assert masked(load(data, "val"), data, "val", [1, 3]).labels[1]["cls"].tolist() == [[1]]


def test_hidden_objects_and_ignore_regions_of_files_are_ignored_together(tmp_path, tiny):
    for kind in ("images", "labels", "ignore"):
        (tmp_path / kind / "train").mkdir(parents=True)
    (tmp_path / "images/train/0.png").write_bytes((tiny / "images/train/00.png").read_bytes())
    (tmp_path / "labels/train/0.txt").write_text(f"0 {BOX}\n1 0.2 0.2 0.1 0.1\n2 0.8 0.8 0.1 0.1\n")
    (tmp_path / "ignore/train/0.txt").write_text("0.25 0.75 0.125 0.125\n")
    lines = "train: images/train\nval: images/train\nnames: [a, b, c]\nfewshot: {ignore: ignore}\n"
    (tmp_path / "data.yaml").write_text(lines)
    data = check_det_dataset(str(tmp_path / "data.yaml"))
    dataset = masked(load(data), data, "train", [1])
    assert dataset.labels[0]["cls"].tolist() == [[0], [2]]
    (boxes,) = dataset.ignored.values()
    np.testing.assert_allclose(boxes, [[0.25, 0.75, 0.125, 0.125], [0.2, 0.2, 0.1, 0.1]])
    assert dataset[0]["cls"].tolist() == [[0], [2], [IGNORED], [IGNORED]]


def loss_of(stage, batch, held_out):
    """The scores, their gradient, the assignment and the class loss of a batch."""
    torch.manual_seed(0)
    model = FewShotDetectionModel("yolo11n-fewshot.yaml", nc=6, verbose=False).train()
    args = table.resolve({"stage": stage})
    model.args = SimpleNamespace(**{"box": 7.5, "cls": 0.5, "dfl": 0.15, "epochs": 2, **args})
    preds = model(batch["img"])
    preds["scores"].retain_grad()
    loss = FewShotLoss(model)
    loss.masked = True
    loss.trained = ~torch.isin(torch.arange(6), torch.tensor(held_out))
    this = loss.begin(preds, batch)
    terms = loss.terms(this)
    terms.sum().backward()
    return model, preds["scores"].detach().transpose(1, 2), preds["scores"].grad.transpose(1, 2), this, terms


@pytest.mark.parametrize("stage", [1, 2])
def test_no_kept_out_object_is_positive_or_background_and_no_gradient_reaches_its_row(batch, stage):
    held_out = [2, 5]  # class 5 has no object at all
    cls = batch["cls"].clone()
    cls[cls == 2] = IGNORED
    model, scores, grad, this, terms = loss_of(stage, {**batch, "cls": cls}, held_out)
    prototypes = model.model[-1].prototypes.weight.grad[..., 0]
    assert not prototypes[held_out].any() and prototypes[[0, 1, 3, 4]].any(1).all()
    assert not grad[..., held_out].any()
    # By hand: anchors whose center is in an ignored box.
    cells = [torch.arange(96 // stride) * stride + stride / 2 for stride in (8, 16, 32)]
    centers = torch.cat([torch.cartesian_prod(x, x).flip(1) for x in cells]) / 96
    inside = torch.zeros(grad.shape[:2], dtype=torch.bool)
    for i, box in zip(batch["batch_idx"][cls[:, 0] == IGNORED].long(), batch["bboxes"][cls[:, 0] == IGNORED]):
        inside[i] |= ((centers - box[:2]).abs() < box[2:] / 2).all(1)
    fg = this.assigned.fg_mask
    assert inside.any() and fg.any() and not grad[inside & ~fg].any()
    assert grad[~inside][:, [0, 1, 3, 4]].all()  # everything else is trained
    assert 2 not in this.assigned.labels[fg].tolist() and not this.assigned.scores[..., held_out].any()
    weight = (fg | ~inside)[..., None] * torch.tensor([1.0, 1, 0, 1, 1, 0])
    expected = F.binary_cross_entropy_with_logits(scores, this.assigned.scores, weight, reduction="sum")
    torch.testing.assert_close(terms[1], 0.5 * expected / max(this.assigned.scores.sum(), 1))


def test_kept_out_classes_are_never_drawn_and_not_named_as_scarce(tiny, caplog):
    labels = [{"cls": np.array([[i % 4]])} for i in range(32)]
    names = dict(enumerate(NAMES))
    sampler = EpisodeSampler(labels, names, 2, 1, 1, 20, held_out=[1, 2])
    assert {x.way for x in sampler.draw(0)} == {0, 3} and "green" not in caplog.text
    with pytest.raises(ValueError, match=r"has 2\. 2 classes are kept out by meta_val\. Set n_way=2"):
        EpisodeSampler(labels, names, 3, 1, 1, 20, held_out=[1, 2])


# The drawn images


def drawn(train, val, share=0.5, seed=1):
    """A measurement of classes 0 to 3 by lists of the classes in each image."""

    def labels(split, images):
        classes = [np.array(x, float).reshape(-1, 1) for x in images]
        files = [f"{split}{i}.png" for i in range(len(images))]
        return [{"im_file": f, "cls": x, "bboxes": np.full((len(x), 4), 0.5)} for f, x in zip(files, classes)]

    meta = MetaValidation({"names": dict(enumerate(NAMES)), "channels": 3}, share, seed)
    meta.draw(labels("train", train), labels("val", val))
    return meta


def test_shots_are_no_query_images_where_val_images_are_train_images():
    kept = [NAMES.index(n) for n in HELD_OUT]
    images = [
        {"im_file": f"{i}.png", "cls": np.array([[c]], float), "bboxes": np.full((1, 4), 0.5)}
        for i, c in enumerate(kept * 8)
    ]
    meta = MetaValidation({"names": dict(enumerate(NAMES)), "channels": 3}, 0.5, 1)
    meta.draw(images, images)
    shots = {x["im_file"] for k in (1, 5) for x in meta.shots[k].labels}
    assert len(shots) == 12 and {x["im_file"] for x in meta.queries} == {x["im_file"] for x in images} - shots
    with pytest.raises(ValueError, match=r"are also train images, and were drawn as shots\. Give other val images"):
        meta.draw(images[:12], images[:12])


def test_shots_are_other_images_for_each_number_with_labels_of_kept_out_classes_only():
    kept = [NAMES.index(n) for n in HELD_OUT]
    other = next(i for i in range(4) if i not in kept)
    meta = drawn([[c, other] for c in kept] * 6 + [kept] * 9 + [[other]] * 5, [kept])
    one, five = (meta.shots[k].labels for k in (1, 5))
    assert not {x["im_file"] for x in one} & {x["im_file"] for x in five}
    for k, labels in ((1, one), (5, five)):
        assert sorted(int(c) for x in labels for c in x["cls"].flat) == sorted(kept * k)  # no image shows both
    again = drawn([[c, other] for c in kept] * 6 + [kept] * 9 + [[other]] * 5, [kept])
    assert [x["im_file"] for x in again.shots[5].labels] == [x["im_file"] for x in five]


def test_as_many_val_images_without_kept_out_classes_are_searched_and_no_more_than_the_cap():
    kept = [NAMES.index(n) for n in HELD_OUT]
    other = next(i for i in range(4) if i not in kept)
    train = [kept] * 6
    meta = drawn(train, [[kept[0]], kept] + [[other]] * 10)
    assert [len(x["cls"]) for x in meta.queries] in ([1, 2, 0, 0], [2, 1, 0, 0])
    meta = drawn(train, [[kept[0], other]] * 500 + [[kept[1]]] + [[]] * 300)
    assert len(meta.queries) == 200 and sum(len(x["cls"]) > 0 for x in meta.queries) == 100
    assert {int(c) for x in meta.queries for c in x["cls"].flat} == set(kept)  # the rare one, too


def test_a_kept_out_class_with_too_few_images_is_an_error():
    a, b = (NAMES.index(n) for n in HELD_OUT)
    text = rf"few train and val images: {NAMES[b]} \(5 and 1\)\. It needs 6 .* another seed="
    with pytest.raises(ValueError, match=text):
        drawn([[a]] * 6 + [[b]] * 5, [[a, b]])
    with pytest.raises(ValueError, match=rf"{NAMES[a]} \(6 and 0\)\."):
        drawn([[a, b]] * 6, [[b]])


# Runs


def train(tiny, name, cfg="stage2.yaml", **overrides):
    model = {"model": str(tiny / "yolo11n-tiny.yaml"), "data": str(tiny / "data.yaml")}
    more = FIRST if cfg == "stage1.yaml" else EPISODIC
    settings = {**QUICK, **more, **model, **overrides, "project": str(tiny), "name": name, "exist_ok": True}
    trainer = FewShotTrainer(cfg=cfg, overrides=settings)
    trainer.train()
    return trainer


def rows(trainer):
    with open(trainer.csv) as f:
        return list(csv.DictReader(f))


def state(file):
    return torch.load(file, weights_only=False)["model"].state_dict()


def same(a, b):
    return all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def messages(monkeypatch):
    """What is logged, from INFO on, without colors."""
    found = []

    def note(text, *_):
        found.append(re.sub(r"\x1b\[[\d;]*m", "", str(text)))

    for level in ("info", "warning"):
        monkeypatch.setattr(meta_validation.LOGGER, level, note)
    return found


def script(monkeypatch, *values):
    """Let the measurements return given fitness values, one after the other."""
    left = list(values)

    def measure(self, *_):
        value = left.pop(0)
        return {c: value for c in COLUMNS.values()}

    monkeypatch.setattr(MetaValidation, "measure", measure)


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def stage1(tiny):
    """A model that detects the classes it was trained on; only its last epochs are measured, which saves time."""
    measure = Stage.measure

    def late(self, model):
        return measure(self, model) if self.trainer.epoch >= EPOCHS - 3 else dict.fromkeys(COLUMNS.values(), 0.0)

    with pytest.MonkeyPatch.context() as m:
        m.setattr(Stage, "measure", late)
        return train(tiny, "stage1", "stage1.yaml", epochs=EPOCHS, batch=4, nbs=4, lr0=0.004)


def test_stage_one_picks_the_epoch_that_enrolls_best(tiny, stage1):
    measured = [fitness_of({k: float(v) for k, v in r.items()}) for r in rows(stage1)]
    ckpt = torch.load(stage1.best, weights_only=False)
    assert [int(r["epoch"]) for r in rows(stage1)] == list(range(1, EPOCHS + 1))  # a start is measured in stage 2 only
    assert ckpt["train_metrics"]["fitness"] == pytest.approx(max(measured), rel=1e-4) and max(measured) > 0
    assert ckpt["model"].held_out == [n for n in NAMES if n in HELD_OUT]
    assert not hasattr(ckpt["model"].float().fold(), "held_out")


def test_rows_of_kept_out_classes_keep_their_directions(tiny):
    first = {}

    def note(trainer):
        first.update(deepcopy(trainer.model.state_dict()))

    model = YOLO(tiny / "yolo11n-tiny.yaml")
    model.add_callback("on_train_start", note)
    settings = {**QUICK, **FIRST, "lr0": 0.01, "data": str(tiny / "data.yaml"), "project": str(tiny), "name": "rows"}
    model.train(cfg="stage1.yaml", **{**settings, "epochs": 1})
    last, key = model.trainer.model.state_dict(), "model.23.prototypes.weight"
    cosine = F.cosine_similarity(first[key][..., 0], last[key][..., 0])
    moved = [n for n, c in zip(NAMES, cosine) if c < 1 - 1e-5]
    assert set(moved) == set(NAMES) - set(HELD_OUT)


def test_measuring_changes_neither_the_model_nor_a_random_state(tiny, stage1):
    model = torch.load(stage1.best, weights_only=False)["model"].float().eval()
    before, names, args = deepcopy(model.state_dict()), dict(model.names), deepcopy(model.args)
    meta, base, val = stage1.stage.meta, stage1.train_loader.dataset.labels, stage1.test_loader.dataset.labels
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    expected = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    found = meta.measure(model, base, val, 64)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected
    assert same(before, model.state_dict()) and model.names == names and model.args == args and not model.training
    assert found == meta.measure(model, base, val, 64) and list(found) == list(COLUMNS.values())


def test_the_ap_is_that_of_ultralytics_validation(tiny, stage1):
    """With every val image searched, the AP50 is that of `val` for the enrolled classes."""
    meta, val = deepcopy(stage1.stage.meta), stage1.test_loader.dataset.labels
    meta.queries = [meta._only_kept_out(x) for x in val]
    (tiny / "shots.txt").write_text("".join(f"{x['im_file']}\n" for x in meta.shots[5].labels))
    (tiny / "shots.yaml").write_text(f"path: {tiny}\ntrain: shots.txt\nval: images/val\nnames: {NAMES}\n")
    model = FewShotYOLO(stage1.best)
    model.enroll(str(tiny / "shots.yaml"), imgsz=64)
    result = model.val(data=str(tiny / "data.yaml"), imgsz=64, rect=False, workers=0, plots=False, project=str(tiny))
    expected = np.mean([result.box.all_ap[list(result.box.ap_class_index).index(c), 0] for c in meta.classes])
    measured = meta._ap50(model.model.float().fuse(verbose=False).eval(), 64)
    assert measured == pytest.approx(expected, abs=0.02) and measured > 0


def test_a_slow_machine_loses_no_detection(tiny, stage1, monkeypatch):
    """Ultralytics' NMS stops after some seconds for a batch; here every look at the clock is a minute later."""
    meta, val = deepcopy(stage1.stage.meta), stage1.test_loader.dataset.labels
    meta.queries = [meta._only_kept_out(x) for x in val]
    model = FewShotYOLO(stage1.best).model.float()
    enroll(model, meta.shots[5], 64)
    model = model.fuse(verbose=False).eval()
    expected = meta._ap50(model, 64)
    clock = itertools.count(0, 60)
    monkeypatch.setattr(nms, "time", SimpleNamespace(time=lambda: next(clock)))
    assert meta._ap50(model, 64) == expected > 0


def test_a_run_with_measurements_trains_as_one_without_them(tiny, stage1, monkeypatch):
    seen = []
    original = FewShotTrainer.preprocess_batch

    def spy(self, batch):
        seen.append((batch["im_file"], batch["img"].float().sum().item(), batch["cls"].tolist()))
        return original(self, batch)

    monkeypatch.setattr(FewShotTrainer, "preprocess_batch", spy)
    for cfg, model in (("stage1.yaml", tiny / "yolo11n-tiny.yaml"), ("stage2.yaml", stage1.best)):
        runs = []
        for scripted in (False, True):
            with monkeypatch.context() as m:
                if scripted:
                    script(m, *[0.5] * 4)
                trainer = train(tiny, f"equal{scripted}", cfg, model=str(model))
            runs.append((list(seen), state(trainer.last)))
            seen.clear()
        assert runs[0][0] == runs[1][0] and same(runs[0][1], runs[1][1])
        held_out = {NAMES.index(n) for n in HELD_OUT}
        labels = [c for _, _, cls in runs[0][0] for (c,) in cls]
        assert not held_out & set(labels)
        if cfg == "stage1.yaml":
            assert labels.count(IGNORED) == 32  # two epochs of sixteen objects
            plain = train(tiny, "plain", cfg, model=str(model), meta_val=None)
            assert [x[:2] for x in seen] == [x[:2] for x in runs[0][0]]  # the images are equal
            assert plain.stage.meta is None and "metrics/meta_AP50_1" not in rows(plain)[0]
        seen.clear()


def test_best_is_the_start_where_training_only_harms(tiny, stage1, messages):
    trainer = train(tiny, "harm", model=str(stage1.best), lr0=0.5, plots=True, doctor=2)
    assert {"results.png", "losses.png"} <= {f.name for f in trainer.save_dir.iterdir()}
    start, *epochs = rows(trainer)
    measured = [fitness_of({c: float(r[c]) for c in COLUMNS.values()}) for r in (start, *epochs)]
    assert start["epoch"] == "0" and [r["epoch"] for r in epochs] == ["1", "2"]
    assert measured[0] > 0 and max(measured[1:]) <= measured[0]
    assert {k for k, v in start.items() if v} == {"epoch", "time", *COLUMNS.values()}
    assert all(all(r.values()) for r in epochs)
    best = torch.load(trainer.best, weights_only=False)
    first = state(stage1.best)
    assert all(torch.equal(v, first[k]) for k, v in best["model"].state_dict().items() if not k.endswith("frozen"))
    assert not same(state(trainer.last), best["model"].state_dict())
    assert best["epoch"] == -1 and best["optimizer"] is None and best["model"].memory and best["model"].prior_strength
    assert best["train_metrics"]["fitness"] == pytest.approx(measured[0], rel=1e-4)
    assert set(best) == set(torch.load(trainer.last, weights_only=False))
    text = (
        "Meta-validation: Stage 2 gave no better enrollment of held-out classes than its start "
        f"({measured[0]:.2f}, best epoch {max(measured[1:]):.2f}); best.pt is the model that it started from."
    )
    assert messages.count(text) == 1
    assert len(YOLO(trainer.best).predict(str(tiny / "images/val/00.png"), imgsz=64, verbose=False)) == 1
    buffers = []
    for f in (trainer.best, trainer.last):  # each has anchors of its own weights
        model = torch.load(f, weights_only=False)["model"].float().eval()
        (expected,) = fill_replay_buffer(model, fully_labeled(trainer.stage.base_dataset), 64, trainer.args.seed)
        assert all(torch.equal(a, b) for a, b in zip(model.memory[0], expected))
        buffers.append(expected[0])
    assert not torch.equal(*buffers)


@pytest.mark.parametrize(
    ("values", "best"),
    [((0.4, 0.3, 0.2), 0), ((0.4, 0.4, 0.4), 0), ((0.4, 0.5, 0.3), 1), ((0.4, 0.3, 0.5), 2), ((0.0, 0.0, 0.0), 0)],
)
def test_best_is_the_first_epoch_of_the_largest_mean(tiny, stage1, monkeypatch, messages, values, best):
    script(monkeypatch, *values)
    saved = {0: state(stage1.best)}

    def save(self, original=FewShotTrainer.save_model):
        saved[self.epoch + 1] = {k: v.clone() for k, v in self.ema.ema.state_dict().items()}
        return original(self)

    monkeypatch.setattr(FewShotTrainer, "save_model", save)
    trainer = train(tiny, f"pick{best}", model=str(stage1.best))
    final = state(trainer.best)
    assert all(torch.equal(v.half(), saved[best][k].half()) for k, v in final.items() if not k.endswith("frozen"))
    assert torch.load(trainer.best, weights_only=False)["train_metrics"]["fitness"] == values[best]
    names = ", ".join(n for n in NAMES if n in HELD_OUT)
    (last,) = [x for x in messages if "were kept out of training" in x]
    assert names in last and (f"epochs={best}" in last if best else "leave out stage 2" in last)
    assert any("gave no better" in x for x in messages) == (best == 0)


def test_patience_counts_from_the_start(tiny, stage1, monkeypatch):
    script(monkeypatch, 0.4, 0.3, 0.2, 0.1, 0.1)
    trainer = train(tiny, "patience", model=str(stage1.best), epochs=4, patience=2)
    assert [r["epoch"] for r in rows(trainer)] == ["0", "1", "2"]


def test_a_resumed_run_keeps_the_choice_and_the_first_point(tiny, stage1, monkeypatch):
    settings = {"model": str(stage1.best), "epochs": 3, "lr0": 0.2}
    whole = train(tiny, "whole", **settings)

    class Stop(Exception):
        pass

    def interrupt(self, metrics, original=FewShotTrainer.save_metrics):
        if self.epoch == 1:
            raise Stop
        return original(self, metrics)

    with monkeypatch.context() as m, pytest.raises(Stop):
        m.setattr(FewShotTrainer, "save_metrics", interrupt)
        train(tiny, "cut", **settings)
    model = YOLO(tiny / "cut/weights/last.pt")
    model.train(resume=True)
    assert model.trainer.stage.meta.classes == whole.stage.meta.classes
    columns = ["epoch", *COLUMNS.values()]
    expected, found = ([[r[k] for k in columns] for r in rows(x)] for x in (whole, model.trainer))
    assert found == expected and [x[0] for x in found] == ["0", "1", "2", "3"]
    assert same(state(whole.best), state(tiny / "cut/weights/best.pt"))


def test_a_start_that_knows_the_kept_out_classes_is_named(tiny, stage1, messages, monkeypatch):
    script(monkeypatch, *[0.5] * 9)
    plain = train(tiny, "knows", "stage1.yaml", epochs=1, meta_val=None)
    names = ", ".join(n for n in NAMES if n in HELD_OUT)
    messages.clear()
    trainer = train(tiny, "told", model=str(plain.best), epochs=1)
    assert any(f"was trained on {names}, which meta_val=0.5 keeps out here" in x for x in messages)
    messages.clear()
    trainer = train(tiny, "honest", model=str(stage1.best), epochs=1)
    assert not any("was trained on" in x for x in messages)
    frozen = (
        trainer.model.model[-1].prototypes.frozen.any(1).tolist()
    )  # only learned prototypes anchor the triplet term
    assert frozen == [n not in HELD_OUT for n in NAMES]
    later = train(tiny, "later", model=str(stage1.best), epochs=1, meta_val=None, n_way=3)
    assert later.model.model[-1].prototypes.frozen.any(1).tolist() == frozen and later.model.held_out == []


def test_dual_heads_measure_their_kept_out_classes(tiny):
    trainer = train(tiny, "dual", "stage1.yaml", model=str(tiny / "yolo26n-tiny.yaml"), epochs=1)
    assert all(0 <= float(rows(trainer)[0][c]) <= 1 for c in COLUMNS.values())
    assert [x.trained.tolist() for x in branch_losses(trainer.model)] == [[n not in HELD_OUT for n in NAMES]] * 2


def test_a_student_is_measured_without_its_teacher(tiny, stage1):
    trainer = train(tiny, "student", model=str(stage1.best), distill_model=str(stage1.best), epochs=1)
    start, epoch = ([float(r[c]) for c in COLUMNS.values()] for r in rows(trainer))
    assert all(start) and type(torch.load(trainer.best, weights_only=False)["model"]) is FewShotDetectionModel
    assert trainer.best_fitness >= sum(start) / 2 and all(0 <= x <= 1 for x in epoch)


def test_the_doctor_rehearses_a_run_that_keeps_classes_out(tiny):
    found = doctor(str(tiny / "data.yaml"), str(tiny / "yolo11n-tiny.yaml"), **{**QUICK, **EPISODIC})
    assert not [x.text for x in found if x.level == "error"] and "s a step" in found[-1].text


# Bad input


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"meta_val": 0.6}, "'meta_val=0.6' is an invalid value. Valid 'meta_val' values are between 0 and 0.5"),
        ({"meta_val": -0.1}, "between 0 and 0.5"),
        ({"val": False}, "'val=False' does not work with meta_val=0.5"),
        ({"save": False}, "'save=False' does not work with meta_val=0.5"),
        ({"single_cls": True}, "keeps 2 classes out of training"),
        ({"n_way": 3}, "2 classes are kept out by meta_val. Set n_way=2"),
        ({"fraction": 0.5}, "too few train and val images"),
    ],
)
def test_bad_settings_are_errors_before_training(tiny, overrides, message, monkeypatch):
    monkeypatch.setattr(FewShotTrainer, "begin_training", lambda self: pytest.fail("training started"))
    with pytest.raises(ValueError, match=re.escape(message)):
        train(tiny, "bad", **overrides)


def test_a_share_of_zero_is_off(tiny):
    trainer = FewShotTrainer(
        "stage1.yaml",
        {**QUICK, "model": "fewshot.yaml", "data": str(tiny / "data.yaml"), "meta_val": 0.0, "project": str(tiny)},
    )
    assert trainer.stage.meta is None


def test_the_key_has_no_effect_in_stage_three(tiny, stage1, messages):
    for graft in ("none", "neck"):
        settings = {"data": str(tiny / "data.yaml"), "model": str(stage1.best), "graft": graft, "project": str(tiny)}
        trainer = FewShotTrainer("stage3.yaml", {**settings, "meta_val": 0.2, "imgsz": 64})
        assert trainer.stage.meta is None
        assert any(
            x.startswith("meta_val= has no effect in stage 3. Use it with cfg=stage1.yaml or cfg=stage2.yaml")
            for x in messages
        )
        messages.clear()
