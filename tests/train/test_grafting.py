import shutil
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from ultralytics import YOLO
from ultralytics.nn.tasks import DetectionModel, SegmentationModel, load_checkpoint
from ultralytics.utils import LOGGER, YAML

from yolo_fewshot import FewShotTrainer, FewShotYOLO
from yolo_fewshot.data.shots_and_base import ShotsAndBase
from yolo_fewshot.nn.criterion import FewShotLoss
from yolo_fewshot.nn.graft import GraftModel, level_groups
from yolo_fewshot.nn.ignore import IGNORED

pytestmark = pytest.mark.oldest

NAMES = ["blue", "green", "red", "black"]  # of the data
OLD = ["cat", "blue", "green"]  # of the detector
QUICK = {
    "imgsz": 64, "workers": 0, "plots": False, "verbose": False, "batch": 4, "steps": 4, "epochs": 2, "mosaic": 0.0,
    "warmup_epochs": 0, "exist_ok": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory, draw_tiny):
    """Eight images with an object of one of four classes each; a stock detector that knows two of them."""
    folder = draw_tiny(tmp_path_factory.mktemp("grafting"), 8)
    yaml = YAML.load(folder / "yolo11n-tiny.yaml")
    yaml.pop("fewshot")
    YAML.save(folder / "stock11n.yaml", yaml)
    torch.manual_seed(0)
    save_detector(folder / "stock.pt", DetectionModel(str(folder / "stock11n.yaml"), nc=3, verbose=False).half())
    (folder / "plain").mkdir()
    for i in range(3):
        cv2.imwrite(str(folder / f"plain/{i}.png"), np.full((64, 64, 3), 90 + i, np.uint8))
    return folder


def save_detector(file: Path, model: DetectionModel) -> None:
    """Save a detector of the old classes, with statistics and rows that are not all alike."""
    generator = torch.Generator().manual_seed(0)
    for k, x in model.state_dict().items():
        if x.is_floating_point() and (k.endswith("running_mean") or ".cv3." in k):
            x += 0.1 * torch.randn(x.shape, generator=generator).to(x)
    model.names = dict(enumerate(OLD))
    yolo = YOLO("yolo11n.yaml")
    yolo.model, yolo.ckpt = model, {}
    yolo.save(file)


def settings(root, name, **more):
    given = {**QUICK, "model": str(root / "stock.pt"), "data": str(root / "data.yaml"), "project": str(root)}
    return {**given, "name": name, **more}


def graft(root, name, **more):
    trainer = FewShotTrainer("stage3.yaml", settings(root, name, **more))
    trainer.train()
    return trainer


def model_of(file) -> DetectionModel:
    """Network of a checkpoint, as the file holds it."""
    return torch.load(file, weights_only=False)["model"]


def batches_of(patch):
    """A list to which every batch adds its epoch, its images, and the sum of their pixels."""
    seen, preprocess = [], FewShotTrainer.preprocess_batch

    def spy(trainer, batch):
        seen.append((trainer.epoch, tuple(batch["im_file"]), batch["img"].double().sum().item()))
        return preprocess(trainer, batch)

    patch.setattr(FewShotTrainer, "preprocess_batch", spy)
    return seen


@pytest.fixture(scope="module")
def whole(root):
    """The trainer of a run, and its batches."""
    with pytest.MonkeyPatch.context() as m:
        batches = batches_of(m)
        return graft(root, "neck"), batches


@pytest.fixture(scope="module")
def run(whole):
    return whole[0]


def assert_old_layers_are_those_of(source, model, classes):
    """Every layer and every row of the source, at its place in the other network, exactly."""
    state = {k: v.float() for k, v in model.state_dict().items()}
    for k, v in source.state_dict().items():
        parts = k.split(".")
        if parts[1] == str(len(source.model) - 1):
            k = ".".join(["model", str(len(model.model) - 1), *parts[2:]])
        other = state[k]
        if k.endswith((".2.weight", ".2.bias")) and parts[2] == "cv3":
            assert torch.equal(v.float(), other[:classes]), k
        else:
            assert torch.equal(v.float(), other), k


# The result


def test_the_result_is_a_stock_detector_with_old_and_new_classes(root, run):
    model, source = model_of(run.best), model_of(root / "stock.pt")
    assert type(model) is DetectionModel and list(model.names.values()) == [*OLD, "red", "black"]
    assert [(g.levels, g.classes) for g in level_groups(model)] == [([0, 1, 2], [0, 1, 2]), ([3, 4, 5], [3, 4])]
    assert_old_layers_are_those_of(source, model, 3)
    record = {"method": "graft-neck", "conf": None, "replaced": None}
    assert model.enrolled == {"red": {"shots": 2, **record}, "black": {"shots": 2, **record}}
    assert {p.dtype for p in model.parameters()} == {torch.float16} and not any(
        p.requires_grad for p in model.parameters()
    )
    assert b"yolo_fewshot" not in run.best.read_bytes()


def test_training_is_in_the_memory_format_that_is_fast_and_the_file_in_the_usual_one(run):
    trained, saved = run.model.model[13].m[0].cv1.conv.weight, model_of(run.best).model[26].m[0].cv1.conv.weight
    assert trained.is_contiguous(memory_format=torch.channels_last) and not trained.is_contiguous()
    assert all(x.is_contiguous() for x in model_of(run.best).state_dict().values())
    assert saved.shape == trained.shape


def test_without_validation_both_files_have_the_last_weights(run):
    best, last = model_of(run.best).state_dict(), model_of(run.last).state_dict()
    assert best.keys() == last.keys() and all(torch.equal(best[k], last[k]) for k in best)


def test_the_new_layers_are_those_that_were_trained(run):
    model, copy = model_of(run.best).float(), run.ema.ema
    assert isinstance(copy, GraftModel) and list(copy.names.values()) == ["red", "black"]
    for k in range(10, 23):  # C2PSA and the neck
        for a, b in zip(copy.model[k].parameters(), model.model[k + 13].parameters()):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)  # half precision
    moved = [not torch.equal(a, b) for a, b in zip(copy.model[13].parameters(), model.model[13].parameters())]
    assert any(moved)


def test_the_shared_layers_compute_the_same_after_training_without_batchnorm(root, run):
    source, copy = model_of(root / "stock.pt").float().eval(), run.model.eval()
    ours = theirs = torch.rand(2, 3, 64, 64)
    for k in range(10):
        ours, theirs = copy.model[k](ours), source.model[k](theirs)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        assert not [m for m in copy.model[k].modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert [m for m in copy.model[13].modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert not any(p.requires_grad for k in range(10) for p in copy.model[k].parameters())


@pytest.mark.parametrize("part", ["head", "all"])
def test_the_other_parts(root, part):
    model = model_of(graft(root, part, graft=part).best)
    source = model_of(root / "stock.pt")
    assert len(model.model) == {"head": 24, "all": 24 + 1 + 23}[part] and list(model.names.values())[3:] == [
        "red",
        "black",
    ]
    if part == "head":
        assert_old_layers_are_those_of(source, model, 3)
    else:
        assert isinstance(model.model[0], torch.nn.Identity)
    assert model.enrolled["red"]["method"] == f"graft-{part}"


def test_old_detections_are_the_same(root, run):
    image = str(root / "images/val/00.png")
    before, after = (
        YOLO(f).predict(image, imgsz=64, conf=0.0, iou=1.0, max_det=10_000, verbose=False)[0].boxes.data
        for f in (root / "stock.pt", run.best)
    )
    old = after[(after[:, 5] < 3) & (after[:, 4] > 1e-9)]
    before = before[before[:, 4] > 1e-9]
    assert len(before) == len(old) > 50
    old, before = (x[np.lexsort(x.T.numpy())] for x in (old, before))
    torch.testing.assert_close(old, before, rtol=1e-4, atol=1e-4)


def test_weights_beyond_half_precision_stay_exact(root, tmp_path):
    model = model_of(root / "stock.pt").float()
    with torch.no_grad():
        for p in model.parameters():
            p += 1e-5 * torch.rand_like(p)
    yolo = YOLO("yolo11n.yaml")
    yolo.model, yolo.ckpt = model, {}
    torch.save({"model": model, "train_args": {}}, tmp_path / "exact.pt")
    grafted = model_of(graft(root, "exact", model=str(tmp_path / "exact.pt")).best)
    assert_old_layers_are_those_of(model, grafted, 3)
    assert {p.dtype for p in grafted.model[26].parameters()} == {torch.float16}  # what was trained


def test_a_few_shot_checkpoint_is_folded_first(root):
    yolo = FewShotYOLO(root / "yolo11n-tiny.yaml")
    yolo.model.names = {i: str(i) for i in range(80)}
    yolo.save(root / "fewshot.pt")
    model = model_of(graft(root, "folded", model=str(root / "fewshot.pt")).best)
    assert type(model) is DetectionModel and list(model.names.values())[80:] == NAMES
    torch.testing.assert_close(
        model.model[-1].cv3[0][-1].weight[:80].float(),
        yolo.model.fold().model[-1].cv3[0][-1].weight.float(),
        rtol=2e-3,
        atol=1e-4,
    )


def test_the_final_validation_counts_all_classes(root, run):
    labeled = {"blue", "green", "red", "black"}  # of the val split
    names = run.validator.metrics.names
    assert {names[int(c)] for c in run.validator.metrics.ap_class_index} == labeled
    assert run.validator.metrics.box.ap.shape == (4,)


def test_training_from_the_command_line_returns_a_model_of_all_classes(root):
    yolo = YOLO(root / "stock.pt")
    yolo.train(cfg="stage3.yaml", **{k: v for k, v in settings(root, "cli").items() if k != "model"})
    assert type(yolo) is FewShotYOLO and list(yolo.names.values()) == [*OLD, "red", "black"]
    with pytest.raises(ValueError, match="'blue' was not enrolled"):
        yolo.forget("blue")
    yolo.forget("red").forget("black")
    assert yolo.model.model[-1].nl == 3 and list(yolo.names.values()) == OLD


# Again


def test_a_second_graft_and_further_training_of_the_first(root, run):
    only_red = root / "red.yaml"
    data = {"path": str(root), "train": "images/train", "val": "images/val"}
    YAML.save(only_red, {**data, "names": NAMES})
    (root / "hats").mkdir()
    for kind, name in (("images", "02.png"), ("labels", "02.txt")):
        (root / f"hats/{kind}").mkdir()
        shutil.copy(root / kind / "train" / name, root / "hats" / kind / name)
    YAML.save(
        root / "hats.yaml",
        {"path": str(root / "hats"), "train": "images", "val": "images", "names": [*NAMES[:2], "hat", "black"]},
    )
    second = model_of(graft(root, "second", model=str(run.best), data=str(root / "hats.yaml"), graft="head").best)
    assert list(second.names.values()) == [*OLD, "red", "black", "hat"] and second.model[-1].nl == 9
    assert list(second.enrolled) == ["red", "black", "hat"] and second.enrolled["hat"]["shots"] == 1
    first = model_of(run.best)
    assert_old_layers_are_those_of(first, second, 5)

    file = root / "second/weights/best.pt"
    again = model_of(graft(root, "again", model=str(file), data=str(only_red)).best)
    assert again.names == second.names and [g.classes for g in level_groups(again)] == [[0, 1, 2], [3, 4], [5]]
    a, b = again.state_dict(), second.state_dict()
    changed = {
        k.split(".")[1] if k.split(".")[1] != "36" else ".".join(k.split(".")[2:4])
        for k in a
        if not torch.equal(a[k], b[k])
    }
    assert changed <= {*map(str, range(23, 36)), "cv2.3", "cv2.4", "cv2.5", "cv3.3", "cv3.4", "cv3.5"}
    assert {"23", "26", "cv2.3", "cv3.5"} <= changed


def test_further_training_needs_shots_of_all_classes_of_the_layers(root, run):
    (root / "reds").mkdir()
    for kind, name in (("images", "02.png"), ("labels", "02.txt")):
        (root / f"reds/{kind}").mkdir()
        shutil.copy(root / kind / "train" / name, root / "reds" / kind / name)
    YAML.save(root / "reds.yaml", {"path": str(root / "reds"), "train": "images", "val": "images", "names": NAMES})
    with pytest.raises(ValueError, match=r"The layers of red are those of black, too\. Add shots of black to"):
        built(root, model=str(run.best), data=str(root / "reds.yaml"))


@pytest.fixture(scope="module")
def crops(root):
    """A support set of one crop of a hat."""
    (root / "crops/hat").mkdir(parents=True)
    shutil.copy(root / "images/train/02.png", root / "crops/hat/0.png")
    return root / "crops"


def test_a_class_is_enrolled_into_a_grafted_model_and_forgotten(root, run, crops):
    yolo, before = FewShotYOLO(run.best), model_of(run.best).float()
    yolo.enroll(crops, imgsz=64)
    assert list(yolo.names.values()) == [*before.names.values(), "hat"] and yolo.model.model[-1].nl == 6
    assert_old_layers_are_those_of(before, yolo.model, 5)
    yolo.forget("hat")
    assert yolo.model.model[-1].nl == 6 and yolo.names == before.names
    state = before.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in yolo.model.state_dict().items())


def test_a_class_that_was_enrolled_since_stops_further_training_with_a_remedy(root, run, crops):
    yolo = FewShotYOLO(run.best)
    yolo.enroll(crops, imgsz=64)
    yolo.save(root / "hat.pt")
    text = "hat was enrolled after the layers of black, red were grafted, and has rows there. Forget it, train, and"
    with pytest.raises(ValueError, match=text):
        built(root, model=str(root / "hat.pt"))


# Data


def built(root, **more):
    """A trainer with its model, before training."""
    trainer = FewShotTrainer("stage3.yaml", settings(root, "built", **more))
    trainer.setup_model()
    trainer.model.args = trainer.args
    return trainer


def test_objects_of_known_classes_are_background(root, monkeypatch):
    logged = []
    monkeypatch.setattr(LOGGER, "info", lambda x: logged.append(str(x)))
    trainer = built(root)
    assert any("blue, green: classes of the model, whose objects" in x and "background" in x for x in logged)
    assert any("layers of their own for red, black; 10 of 24 layers are shared" in x for x in logged)
    dataset = trainer.get_dataloader(trainer.data["train"], 4, -1).dataset
    assert isinstance(dataset, ShotsAndBase) and len(dataset) == 8
    assert [x["cls"].ravel().tolist() for x in dataset.labels] == [[], [], [0], [1]] * 2
    assert [len(x["bboxes"]) for x in dataset.labels] == [0, 0, 1, 1] * 2
    batch = dataset.collate_fn([dataset[2], dataset[0]])
    assert batch["cls"].tolist() == [[0]] and trainer.data["names"] == {0: "red", 1: "black"}


def test_base_and_background_images_are_negatives(root):
    trainer = built(root, base_replay=str(root / "data.yaml"), background=str(root / "plain"), steps=6)
    loader = trainer.get_dataloader(trainer.data["train"], 4, -1)
    shots, base, plain = loader.dataset.parts
    assert [len(x) for x in (shots, base, plain)] == [8, 8, 3]
    assert [len(x["cls"]) for x in base.labels] == [0, 0, 1, 1] * 2 and not any(len(x["cls"]) for x in plain.labels)
    drawn = torch.tensor(list(loader.sampler)).view(-1, 4)
    assert (drawn[:, :2] < 8).all() and (drawn[:, 2:] >= 8).all()
    assert len(plain[0]["cls"]) == 0 and plain[0]["img"].shape == (3, 64, 64)


@pytest.mark.parametrize("keys", [["base_replay"], ["background"], ["base_replay", "background"]])
def test_a_batch_without_room_for_other_images_is_an_error(root, keys):
    places = {"base_replay": str(root / "data.yaml"), "background": str(root / "plain")}
    trainer, named = built(root, batch=1, **{k: places[k] for k in keys}), " and ".join(f"{k}=" for k in keys)
    with pytest.raises(ValueError, match=rf"'batch=1' has no room for .* {named}, .* Set batch=2 or .* {named} out"):
        trainer.get_dataloader(trainer.data["train"], 1, -1)
    trainer.batch_size, trainer.world_size = 5, 3
    with pytest.raises(ValueError, match=r"'batch=5' on 3 GPUs has no room .* Set batch=6 or more"):
        trainer.get_dataloader(trainer.data["train"], 1, -1)
    trainer.batch_size, trainer.world_size = 2, 0
    drawn = torch.tensor(list(trainer.get_dataloader(trainer.data["train"], 2, -1).sampler)).view(-1, 2)
    assert (drawn[:, 0] < 8).all() and (drawn[:, 1] >= 8).all()


def test_a_batch_needs_an_image_for_each_process(root, monkeypatch):
    trainer = built(root, batch=2)
    monkeypatch.setattr(trainer, "world_size", 8)
    with pytest.raises(ValueError, match=r"'batch=2' has fewer images than there are GPUs\. Set batch=8 or more"):
        trainer.get_dataloader(trainer.data["train"], 0, -1)


def test_a_batch_that_ultralytics_makes_smaller_is_a_step_and_a_resumed_run_goes_on(root, monkeypatch):
    trainer = built(root, batch=4, nbs=4)
    monkeypatch.setattr(trainer, "batch_size", 2)
    trainer.start_epoch = 1
    loader = trainer.get_dataloader(trainer.data["train"], 2, -1)
    assert trainer.args.nbs == 2 and loader.sampler.epoch == 1


def test_steps_of_an_epoch_stay_where_the_epochs_are_estimated(root, monkeypatch):
    """As with time=, which changes `args.epochs` in a run."""
    trainer = built(root, steps=6, epochs=2, time=1.0)
    loader = trainer.get_dataloader(trainer.data["train"], 4, -1)
    trainer.args.epochs = 13
    trainer.stage.begin_epoch()
    again = built(root, steps=trainer.args.steps, epochs=13, time=1.0)
    assert len(loader) == len(again.get_dataloader(again.data["train"], 4, -1)) == 3


def test_the_final_validation_is_on_the_split_that_was_asked_for(root, monkeypatch):
    trainer, asked = built(root), []
    trainer.args.split, trainer.data = "test", {**trainer.data, "test": "test images"}
    trainer.test_loader, trainer.validator = SimpleNamespace(batch_size=1), SimpleNamespace()
    monkeypatch.setattr(trainer, "get_dataloader", lambda path, *_: asked.append(path))
    trainer.stage.before_final_validation(SimpleNamespace(names={0: "a"}))
    assert asked == ["test images"]


def test_shots_alone_can_have_a_batch_of_one(root):
    trainer = built(root, batch=1)
    assert len(trainer.get_dataloader(trainer.data["train"], 1, -1)) == 2  # 4 steps in 2 epochs


def test_the_log_has_the_steps_that_are_taken(root, monkeypatch):
    trainer, logged = built(root, steps=7, epochs=3), []
    monkeypatch.setattr(LOGGER, "info", lambda x: logged.append(str(x)))
    loader = trainer.get_dataloader(trainer.data["train"], 4, -1)
    assert len(loader) == 3 and any(" 9 steps on 8 support images" in x for x in logged)


def test_labels_of_background_images_do_not_count(root):
    trainer = built(root, background=str(root / "images/val"))
    plain = trainer.get_dataloader(trainer.data["train"], 4, -1).dataset.parts[-1]
    assert len(plain) == 8 and not any(len(x["cls"]) for x in plain.labels)


def test_shots_are_no_background(root, tmp_path):
    shutil.copytree(root / "images/train", tmp_path / "photos")
    loader = built(root, background=str(tmp_path / "photos"))
    dataset = loader.get_dataloader(loader.data["train"], 4, -1).dataset
    files = [Path(x["im_file"]).name for x in dataset.parts[1].labels]
    assert files == ["00.png", "01.png", "04.png", "05.png"]  # of blue and green, which the detector knows


def test_a_run_with_background_images(root):
    trainer = graft(root, "background", background=str(root / "plain"))
    assert list(model_of(trainer.best).names.values())[3:] == ["red", "black"]


def test_ignore_regions_apply(root):
    (root / "ignore/train").mkdir(parents=True)
    (root / "ignore/train/02.txt").write_text("0.5 0.5 0.2 0.2\n")
    data = YAML.load(root / "data.yaml")
    YAML.save(root / "ignored.yaml", {**data, "fewshot": {"ignore": "ignore"}})
    trainer = built(root, data=str(root / "ignored.yaml"))
    dataset = trainer.get_dataloader(trainer.data["train"], 4, -1).dataset
    assert sorted(dataset[2]["cls"].ravel().tolist()) == sorted([IGNORED, 0])
    assert isinstance(trainer.model.init_criterion(), FewShotLoss)


def test_frozen_layers_of_the_users_own_are_frozen_as_well(root):
    trainer = built(root, freeze=13)
    assert trainer.args.freeze == list(range(13))
    assert built(root, freeze=[15]).args.freeze == [*range(10), 15]
    assert built(root, graft="head").args.freeze == list(range(23))


# Resuming


class Crash(Exception):
    """Stands for a machine that fails."""


def test_a_resumed_run_ends_like_an_uninterrupted_one(root, run, whole, monkeypatch):
    def crash(trainer):
        if trainer.epoch == 0:
            raise Crash

    trainer = FewShotTrainer("stage3.yaml", settings(root, "cut"))
    trainer.add_callback("on_fit_epoch_end", crash)
    with pytest.raises(Crash):
        trainer.train()
    moved = root / "moved"
    shutil.move(root / "cut", moved)
    batches = batches_of(monkeypatch)
    YOLO(moved / "weights/last.pt").train(resume=True)
    assert batches == whole[1][2:]  # without loader processes and mosaic
    cut, full = (model_of(x).state_dict() for x in (moved / "weights/best.pt", run.best))
    assert cut.keys() == full.keys()
    for k, v in full.items():  # the weights of an epoch are saved in half precision
        torch.testing.assert_close(cut[k].float(), v.float(), rtol=0.02, atol=0.02)
    assert model_of(moved / "weights/best.pt").enrolled == model_of(run.best).enrolled


# Errors


@pytest.mark.parametrize(
    ("more", "error", "text"),
    [
        ({"model": "stock11n.yaml"}, ValueError, "has no trained weights, and stage 3 adds classes to a trained"),
        ({"background": "nowhere"}, FileNotFoundError, "nowhere"),
        ({"base_replay": "nowhere.yaml"}, FileNotFoundError, "nowhere"),
        ({"graft": "tail"}, ValueError, "'graft=tail' is an invalid value. Valid 'graft' values are head, neck, all,"),
        ({"graft": "none"}, ValueError, "cannot be adapted with graft=none, which starts from a few-shot"),
        (
            {"graft": "none", "background": "plain"},
            ValueError,
            "works in grafting alone. Leave graft=none out to graft",
        ),
        ({"support": "shots.yaml"}, ValueError, "'support=shots.yaml' is not a training argument"),
        (
            {"stage": None, "background": "plain"},
            ValueError,
            "works in grafting alone. Add cfg=stage3.yaml to graft, or",
        ),
        ({"single_cls": True}, ValueError, "'single_cls=True' does not work in stage 3"),
        ({"quantize": 8}, ValueError, "'quantize=8' does not work in stage 3"),
    ],
)
def test_what_cannot_work_is_an_error_before_training(root, more, error, text):
    more = {k: str(root / v) if k == "model" else v for k, v in more.items()}
    with pytest.raises(error) as e:
        built(root, **more)
    assert text in str(e.value)


def test_data_without_a_new_class_is_an_error(root):
    knowing = DetectionModel(str(root / "stock11n.yaml"), nc=4, verbose=False)
    knowing.names = dict(enumerate(NAMES))
    torch.save({"model": knowing, "train_args": {}}, root / "knows.pt")
    with pytest.raises(ValueError, match=r"knows all classes of .*: black, blue, green, red. Give .* another name\.$"):
        built(root, model=str(root / "knows.pt"))
    knowing.enrolled = {"red": {"shots": 1, "method": "fit", "conf": None, "replaced": None}}
    torch.save({"model": knowing, "train_args": {}}, root / "knows.pt")
    with pytest.raises(ValueError, match=r"Start from the model before red was enrolled, or forget it first\.$"):
        built(root, model=str(root / "knows.pt"))


def test_a_grafting_that_was_not_finished_is_no_model_to_graft_onto(root, tmp_path):
    trainer = built(root)
    torch.save({"model": trainer.model, "train_args": {}}, tmp_path / "last.pt")
    with pytest.raises(
        ValueError, match=r"last\.pt' is of a grafting that was not finished. Finish .* resume=True, or"
    ):
        built(root, model=str(tmp_path / "last.pt"))


def test_images_of_other_channels_are_an_error(root):
    model = DetectionModel(str(root / "stock11n.yaml"), ch=1, nc=3, verbose=False)
    model.names = dict(enumerate(OLD))
    torch.save({"model": model, "train_args": {}}, root / "gray.pt")
    with pytest.raises(ValueError, match=r"data\.yaml have channels=3, and the model takes 1. Set 'channels: 1' there"):
        built(root, model=str(root / "gray.pt"))
    YAML.save(root / "gray.yaml", {**YAML.load(root / "data.yaml"), "path": str(root), "channels": 1})
    built(root, model=str(root / "gray.pt"), data=str(root / "gray.yaml"))
    with pytest.raises(ValueError, match=r"data\.yaml have channels=3, and the model takes 1"):
        more = {"base_replay": str(root / "data.yaml")}
        built(root, model=str(root / "gray.pt"), data=str(root / "gray.yaml"), **more)


@pytest.mark.parametrize("given, expected", [({}, True), ({"channels_last": False}, False)])
def test_the_memory_format_can_be_refused(root, given, expected):
    weight = built(root, **given).model.model[13].m[0].cv1.conv.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) == expected != weight.is_contiguous()


def test_an_end_that_was_interrupted_between_the_files_can_be_repeated(root):
    trainer = built(root, val=True)
    last = {"model": trainer.model}
    best = {"model": trainer.stage.final_checkpoints(None, {"model": deepcopy(trainer.model)})[1]["model"]}
    kept = best["model"]
    last, best = trainer.stage.final_checkpoints(last, best)
    assert best["model"] is kept and list(last["model"].names.values()) == [*OLD, "red", "black"]


def test_a_model_of_another_task_is_an_error(root):
    model = SegmentationModel("yolo11n-seg.yaml", nc=2, verbose=False)
    torch.save({"model": model, "train_args": {"task": "segment"}}, root / "seg.pt")
    with pytest.raises(TypeError, match="need a YOLO detection model"):
        YOLO(root / "seg.pt").train(cfg="stage3.yaml", data=str(root / "data.yaml"))


def test_weights_that_are_not_finite_are_an_error(root):
    model = deepcopy(load_checkpoint(root / "stock.pt")[0])
    model.model[3].conv.weight.data[0] = float("nan")
    torch.save({"model": model, "train_args": {}}, root / "nan.pt")
    with pytest.raises(ValueError, match="cannot be trained: 1 of its tensors have a NaN or Inf"):
        built(root, model=str(root / "nan.pt"))
