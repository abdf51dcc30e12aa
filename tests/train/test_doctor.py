import logging
import math
import re
import shutil
import statistics
import tempfile
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
import ultralytics.engine.trainer
from ultralytics.utils import LOGGER, callbacks

from yolo_fewshot import FewShotTrainer, cli
from yolo_fewshot.data.checks import Finding
from yolo_fewshot.train import doctor as module
from yolo_fewshot.train.doctor import MARKS, STEPS, Rehearsal, _duration, compare_terms, doctor, estimate

pytestmark = pytest.mark.slow

TERMS = ("box", "cls", "dfl", "epi", "sup", "cpe", "tri")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, draw_tiny):
    """A folder with tiny models and a data set of 4 classes, 8 images of 64 px each."""
    return draw_tiny(tmp_path_factory.mktemp("tiny"), 32)


def settings(tiny, **overrides):
    return {
        "data": str(tiny / "data.yaml"),
        "model": str(tiny / "yolo11n-tiny.yaml"),
        "n_way": 3,
        "imgsz": 64,
    } | overrides


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """The record of a doctor's run, with callbacks and loggers that note their calls."""
    seen = SimpleNamespace(called=[], trainers=[], batches=0, cwd=tmp_path_factory.mktemp("cwd"))
    seen.temp, seen.before = tmp_path_factory.mktemp("temp"), sorted(tiny.rglob("*"))

    def take_down(instance):
        seen.called.append(type(instance).__name__)

    add, loader = callbacks.add_integration_callbacks, FewShotTrainer.preprocess_batch

    def add_loggers(instance):
        add(instance)
        for event in callbacks.default_callbacks:
            instance.callbacks[event].append(take_down)

    def count(self, batch):
        seen.batches += 1
        seen.folder = sorted(x.name for x in self.save_dir.iterdir())
        return loader(self, batch)

    def look(trainer):
        seen.trainers.append(trainer)
        return compare_terms(trainer)

    with pytest.MonkeyPatch.context() as m:
        m.chdir(seen.cwd)
        m.setattr(tempfile, "tempdir", str(seen.temp))
        default = {k: [*v, take_down] for k, v in callbacks.default_callbacks.items()}
        m.setattr(callbacks.base, "default_callbacks", default)
        m.setattr(callbacks, "add_integration_callbacks", add_loggers)
        m.setattr(FewShotTrainer, "preprocess_batch", count)
        m.setattr(module, "compare_terms", look)
        seen.level = LOGGER.level
        seen.found = doctor(
            **settings(tiny, imgsz=160, n_way=4, n_query=3, episodes=9, epochs=7, triplet=2.0, triplet_margin=0.4),
            supcon=0.5, degrees=5.0, cos_lr=True, freeze=[0], seed=3, plots=True, save_period=1, doctor=0,
            project=str(tiny / "runs"), name="mine", exist_ok=True,
        )  # fmt: skip
        seen.level_after = LOGGER.level
        seen.rehearsed = list(seen.called)
        args = {"project": str(seen.temp), "name": "control", "episodes": 9}
        seen.control = FewShotTrainer("stage2.yaml", {**settings(tiny), **args})
        shutil.rmtree(seen.temp / "control")
    return seen


def terms_of(found):
    """Return value, chance level and share of every term, from the texts."""
    pattern = r"(\w+)_loss +(\S+), chance +(\S+), +(\d+)% of the gradient"
    matches = [m for f in found if (m := re.match(pattern, f.text))]
    return {m[1]: (float(m[2]), float(m[3]), int(m[4])) for m in matches}


def test_all_checks_are_reported(run):
    texts = [f.text for f in run.found]
    assert texts[:7] == [
        "train: 32 boxes in 32 images, 0 of these without any.",
        "val: 32 boxes in 32 images, 0 of these without any.",
        "train: all 4 classes have images.",
        "val: all 4 classes have images.",
        "No near-duplicates between train and val.",
        "Classes with enough labeled objects for K shots, of 4: 4 for K=1, 4 for K=3, 4 for K=5, 0 for K=10.",
        "Episodes of n_way=4 k_shot=1 n_query=3 can be drawn, from 4 of 4 classes.",
    ]
    assert {f.level for f in run.found[:7]} == {"ok"} and "error" not in {f.level for f in run.found}
    assert tuple(terms_of(run.found)) == TERMS and len(texts) == 7 + 7 + 1


def test_a_rehearsal_leaves_no_files(run, tiny):
    assert len(run.trainers) == 1 and type(run.trainers[0]) is Rehearsal
    assert run.temp in run.trainers[0].save_dir.parents and run.folder == ["args.yaml", "weights"]
    assert not list(run.temp.iterdir()) and not list(run.cwd.iterdir())
    assert {x.name for x in set(tiny.rglob("*")) - set(run.before)} <= {"train.cache", "val.cache"}


def test_a_rehearsal_runs_no_callbacks(run):
    assert run.rehearsed == []
    assert set(run.called) == {"FewShotTrainer"}  # an ordinary run calls them


def test_a_rehearsal_takes_a_few_steps(run):
    trainer = run.trainers[0]
    assert run.batches == len(trainer.seconds) == STEPS and len(trainer.monitor.norms) == 1
    assert all(s > 0 for s in trainer.seconds) and trainer.memory > 1e7


def test_settings_are_those_of_the_rehearsed_run(run):
    args = run.trainers[0].args
    given = {"imgsz": 160, "n_way": 4, "n_query": 3, "episodes": 9, "epochs": 7, "supcon": 0.5, "degrees": 5.0}
    given |= {"cos_lr": True, "freeze": [0], "seed": 3, "stage": 2, "batch": 16, "cpe": 0.0, "doctor": STEPS}
    assert {k: getattr(args, k) for k in given} == given and args.plots is False


def test_chance_levels_are_those_of_the_closed_forms(run):
    chance = {k: v[1] for k, v in terms_of(run.found).items()}
    assert chance["dfl"] == pytest.approx(0.15 * 4 * math.log(16), rel=1e-3)
    assert chance["tri"] == pytest.approx(2.0 * 0.4, rel=1e-3)
    # 16 objects and 4 prototypes, each with 19 others.
    assert chance["sup"] == pytest.approx(0.5 * math.log(19), rel=1e-3)


def test_an_untrained_model_is_about_at_chance(run):
    terms = terms_of(run.found)
    for name in ("box", "dfl"):
        assert terms[name][0] == pytest.approx(terms[name][1], rel=0.05), name
    for name in ("cls", "sup", "cpe"):
        assert terms[name][0] == pytest.approx(terms[name][1], rel=0.4), name
    assert 98 <= sum(share for *_, share in terms.values()) <= 102
    assert all(v[0] == pytest.approx(run.trainers[0].first[f"{k}_loss"], rel=1e-3) for k, v in terms.items())


def test_the_estimate(run):
    text, trainer = run.found[-1].text, run.trainers[0]
    step = statistics.median(trainer.seconds[2:])
    assert text.startswith(f"{step:.3g} s a step on cpu, {_duration(9 * step)} an epoch of 9 steps, ")
    assert f", {_duration(63 * step)} for epochs=7, without validation. " in text
    memory = re.search(r"Memory: (\S+) of (\S+) GiB in this process\.$", text)
    assert 0.05 < float(memory[1]) < float(memory[2])
    assert run.found[-1].level == "ok"


def test_the_level_of_the_logger_is_restored(run):
    assert run.level_after == run.level


def test_stage_one_needs_no_episodes(tiny, monkeypatch):
    trainers = []
    monkeypatch.setattr(module, "estimate", lambda t: trainers.append(t) or estimate(t))
    found = doctor(**settings(tiny, n_way=50), cfg="stage1.yaml", batch=4, epochs=2)
    assert trainers[0].args.stage == 1 and len(trainers[0].seconds) == STEPS
    assert tuple(terms_of(found)) == TERMS[:3] and len(found) == 6 + 3 + 1
    assert " an epoch of 8 steps, " in found[-1].text and " for epochs=2, " in found[-1].text


@pytest.mark.parametrize(("episodes", "epochs"), [(1, 2), (4, 3)])
def test_epochs_of_few_steps_end_the_rehearsal_too(tiny, monkeypatch, episodes, epochs):
    count, loader = [], FewShotTrainer.preprocess_batch
    monkeypatch.setattr(FewShotTrainer, "preprocess_batch", lambda *x: count.append(1) or loader(*x))
    monkeypatch.setattr(FewShotTrainer, "final_eval", lambda self: count.append("the run was trained to its end"))
    found = doctor(**settings(tiny), episodes=episodes, epochs=epochs)
    assert f" an epoch of {episodes} steps, " in found[-1].text
    assert 0 < len(count) <= STEPS and set(count) == {1}


def test_a_given_run_folder_stays_as_it_is(tiny, tmp_path):
    (tmp_path / "results.csv").write_text("epoch\n1\n")
    doctor(**settings(tiny), episodes=8, save_dir=str(tmp_path))
    assert [x.name for x in tmp_path.iterdir()] == ["results.csv"]


def test_a_compiled_model(tiny, monkeypatch):
    monkeypatch.setattr(ultralytics.engine.trainer, "attempt_compile", lambda model, **_: model)
    assert doctor(**settings(tiny), episodes=8, compile=True)[-1].text


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        ({"n_wya": 3}, SyntaxError, r"'\S*n_wya\S*' is not a valid YOLO argument. Similar arguments are i.e. \['n_way"),
        ({"imgzs": 64}, SyntaxError, r"'\S*imgzs\S*' is not a valid YOLO argument."),
        ({"n_way": "two"}, TypeError, "'n_way=two' is of invalid type str. 'n_way' must be an int"),
        ({"epochs": "ten"}, TypeError, "'epochs=ten' is of invalid type str."),
        ({"supcon": -1.0}, ValueError, "'supcon' must be finite and >= 0"),
        ({"momentum": 1.5}, ValueError, "'momentum=1.5' (is an )?invalid"),
        ({"nonfinite": "stop"}, ValueError, "Valid 'nonfinite' values are skip, raise"),
        ({"data": "none.yaml"}, FileNotFoundError, "none.yaml"),
        ({"cfg": "none.yaml"}, FileNotFoundError, "none.yaml"),
    ],
)
def test_bad_settings_are_errors_before_the_data_is_read(tiny, monkeypatch, overrides, error, message):
    monkeypatch.setattr(module, "read_split", lambda *_: pytest.fail("the data was read"))
    with pytest.raises(error, match=message):
        doctor(**settings(tiny, **overrides))


@pytest.mark.parametrize("name", ["none.yaml", "none.pt"])
def test_a_model_that_does_not_exist(tiny, name):
    with pytest.raises(FileNotFoundError, match="none"):
        doctor(**settings(tiny, model=str(tiny / name)), episodes=8)


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt(), ValueError("broken")])
def test_an_error_of_the_rehearsal_is_raised(tiny, tmp_path, monkeypatch, caplog, error):
    seen = []

    def train(self):
        seen.append((LOGGER.level, self.save_dir.is_dir()))
        raise error

    monkeypatch.setattr(Rehearsal, "train", train)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    caplog.set_level(15, logger=LOGGER.name)
    with pytest.raises(type(error)):
        doctor(**settings(tiny))
    assert seen == [(logging.WARNING, True)] and LOGGER.level == 15 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [MemoryError("An episode needs more memory."), FloatingPointError("Non-finite.")])
def test_a_failed_rehearsal_is_a_finding(tiny, monkeypatch, caplog, error):
    def train(self):
        raise error

    monkeypatch.setattr(Rehearsal, "train", train)
    monkeypatch.setattr(module, "compare_terms", lambda _: pytest.fail("there is nothing to compare"))
    caplog.set_level(15, logger=LOGGER.name)
    found = doctor(**settings(tiny))
    assert found[-1] == Finding("error", str(error)) and LOGGER.level == 15
    assert "First steps" in caplog.text and f"{MARKS['error']} {error}" in caplog.text


def test_errors_of_the_data_prevent_the_rehearsal(tiny, monkeypatch, caplog):
    monkeypatch.setattr(module, "Rehearsal", lambda *_: pytest.fail("a run was rehearsed"))
    caplog.set_level(logging.INFO, logger=LOGGER.name)
    found = doctor(**settings(tiny, n_way=5))
    assert found[-1].level == "error" and found[-1].text.startswith("'n_way=5' needs 5 classes with at least 2")
    assert "Correct the errors above to check the losses, time and memory." in caplog.text
    assert all(f"{MARKS[f.level]} {f.text}" in caplog.text for f in found)


@pytest.mark.parametrize("stage", [2, 3])
def test_duplicate_class_names_are_a_finding(tiny, tmp_path, monkeypatch, stage):
    monkeypatch.setattr(module, "check_shots", lambda *_: [Finding("error", "enough")])
    text = (tiny / "data.yaml").read_text().replace("[blue, green,", "[red, green,")
    (tmp_path / "data.yaml").write_text(f"path: {tiny}\n{text}")
    found = doctor(**settings(tiny, data=tmp_path / "data.yaml", cfg=f"stage{stage}.yaml"))
    warnings = [f.text for f in found if f.level == "warning"]
    assert len(warnings) == 1 and "red (ids 0, 2). They" in warnings[0]


def stub(values, chance, norms):
    names = [f"{t}_loss" for t in TERMS]
    monitor = SimpleNamespace(chance=[torch.tensor(chance)], norms=[torch.tensor(norms)])
    return SimpleNamespace(first=dict(zip(names, values)), monitor=monitor)


def test_terms_are_compared_with_their_chance_levels():
    inf, nan = float("inf"), float("nan")
    values = [4.0, 4.01, 0.5, nan, inf, -inf, 5.0]
    found = compare_terms(stub(values, [2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 0.0], [1.0, 5.0, 2.0, 0.0, 1.0, 1.0, 0.0]))
    assert [f.level for f in found] == ["ok", "warning", "ok", "error", "error", "error", "ok"]
    assert found[0].text == "box_loss          4, chance         2,  10% of the gradient"
    assert found[1].text.endswith(" 50% of the gradient: far above chance. It should fall in the first steps.")
    assert all(f.text.endswith(": not finite. The warning above names the cause.") for f in found[3:6])
    found = compare_terms(stub([1.0] * 7, [1.0] * 7, [0.0] * 7))  # as in a frozen model
    assert {f.level for f in found} == {"ok"} and all("  0% of" in f.text for f in found)


@pytest.mark.parametrize(("used", "level"), [(1, "ok"), (3.6, "ok"), (3.7, "warning")])
def test_time_and_memory_are_those_of_the_recipe(monkeypatch, used, level):
    monkeypatch.setattr(module.psutil, "virtual_memory", lambda: SimpleNamespace(total=4 * 2**30))
    trainer = SimpleNamespace(
        seconds=[90.0, 80.0, 1.0, 3.0, 2.0, 2.0, 50.0], train_loader=range(10), epochs=600, memory=int(used * 2**30),
        device=torch.device("cpu"),
    )  # fmt: skip
    assert estimate(trainer) == Finding(
        level,
        "2 s a step on cpu, 20 s an epoch of 10 steps, 3.3 h for epochs=600, without validation. "
        f"Memory: {used:g} of 4 GiB in this process.",
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.0512, "0.051 s"),
        (1, "1 s"),
        (89, "89 s"),
        (90, "1.5 min"),
        (594, "9.9 min"),
        (600, "10 min"),
        (754, "13 min"),
        (5399, "90 min"),
        (5400, "1.5 h"),
        (129599, "36 h"),
        (129600, "1.5 days"),
        (9 * 86400, "9 days"),
        (1234 * 86400, "1234 days"),
    ],
)
def test_durations(seconds, text):
    assert _duration(seconds) == text


def argv(tiny, **overrides):
    return ["doctor", *(f"{k}={v}" for k, v in settings(tiny, **overrides).items())]


def test_the_command_fails_without_usable_labels(tiny, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(module, "Rehearsal", lambda *_: pytest.fail("a run was rehearsed"))
    shutil.copytree(tiny / "images", tmp_path / "images")
    shutil.copytree(tiny / "labels/val", tmp_path / "labels/val")
    (tmp_path / "labels/train").mkdir()
    for i in range(32):
        (tmp_path / f"labels/train/{i:02}.txt").write_text("0 0.5 0.5 0.2 1.5")
    shutil.copy(tiny / "data.yaml", tmp_path)
    caplog.set_level(logging.INFO, logger=LOGGER.name)
    with pytest.raises(SystemExit) as e:
        cli.main(argv(tiny, data=tmp_path / "data.yaml"))
    assert e.value.code == "\n2 errors, 2 warnings"  # printed by the interpreter, with exit status 1
    assert "train: no labeled object in 32 images." in caplog.text
    assert "train: 32 images are left out by training: " in caplog.text and "out of bounds" in caplog.text


def test_the_command_succeeds_without_errors(tiny, caplog):
    caplog.set_level(logging.INFO, logger=LOGGER.name)
    cli.main(
        argv(tiny, episodes=8, epochs=3, lr0=0.001, box=7.0, degrees=10.0, cos_lr=True, device=("cpu", "cpu"))
    )  # the first of several
    assert re.search(r"\n0 errors, \d warnings", caplog.text)
    titles = ("Boxes", "Classes", "Train and val", "Shots", "Loss terms of the first batch", "Time and memory")
    assert all(x in caplog.text for x in titles) and " an epoch of 8 steps, " in caplog.text


def test_shots_of_stage_three_need_no_base_classes(trained, demo, caplog):
    caplog.set_level(logging.INFO, logger=LOGGER.name)
    found = doctor("fewshot-demo-novel.yaml", str(trained[1].best), "stage3.yaml", imgsz=96, workers=0)
    assert found and all(f.level == "ok" for f in found if "chance" not in f.text), found
    assert " an epoch of 30 steps, " in caplog.text and "epi_loss" not in caplog.text


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"n_wya": 3}, r"SyntaxError: '\S*n_wya\S*' is not a valid YOLO argument. Similar arguments are i.e. \['n_way"),
        ({"n_way": "two"}, "TypeError: 'n_way=two' is of invalid type str. 'n_way' must be an int"),
        ({"k_shot": 0}, "ValueError: 'k_shot=0' is an invalid value. 'k_shot' must be finite and >= 1."),
        ({"data": "none.yaml"}, "FileNotFoundError: "),
    ],
)
def test_the_command_explains_a_bad_setting(tiny, overrides, message):
    with pytest.raises(SystemExit) as e:
        cli.main(argv(tiny, **overrides))
    assert re.match(message, e.value.code)


def test_a_rehearsal_runs_no_teardown_callback(monkeypatch):
    rehearsal = Rehearsal.__new__(Rehearsal)
    rehearsal.callbacks = defaultdict(list, teardown=[lambda _: pytest.fail("a callback was run")])
    rehearsal.run_callbacks("teardown")
