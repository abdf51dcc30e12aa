import logging
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from ultralytics import YOLO

from yolo_fewshot import FewShotYOLO, cli
from yolo_fewshot.data.checks import Finding
from yolo_fewshot.data.demo import BASE, draw_glyph
from yolo_fewshot.enroll import enroll as enrollment


@pytest.fixture(scope="module")
def crops(tmp_path_factory):
    """Three images each of two classes."""
    root, rng = tmp_path_factory.mktemp("crops"), np.random.default_rng(0)
    for name in ("hourglass", "umbrella"):
        (root / name).mkdir()
        for i in range(3):
            image = 220 - draw_glyph(name, 48, rng)[..., None] * np.array([180, 120, 60])
            assert cv2.imwrite(str(root / name / f"{i}.png"), image.astype(np.uint8))
    return root


@pytest.fixture
def nothing_loaded(monkeypatch):
    """Fail where a model is loaded."""
    monkeypatch.setattr(FewShotYOLO, "__init__", lambda *_: pytest.fail("a model was loaded"))


def text_of(*argv):
    """The text of the error of a call."""
    with pytest.raises(SystemExit) as e:
        cli.main(list(argv))
    assert isinstance(e.value.code, str)  # which the interpreter prints, with exit status 1
    return e.value.code


@pytest.mark.parametrize("argv", [[], ["help"], ["-h"], ["--help"]])
def test_the_help_lists_every_command(argv, capsys, nothing_loaded):
    cli.main(argv)
    printed = capsys.readouterr().out
    assert "Usage: yolo-fewshot COMMAND key=value" in printed
    for name, command in cli.COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(command.help)}$", printed, re.M)


@pytest.mark.parametrize("flag", ["help", "-h", "--help"])
@pytest.mark.parametrize("name", cli.COMMANDS)
def test_the_help_of_a_command_lists_every_key(name, flag, capsys, nothing_loaded):
    command = cli.COMMANDS[name]
    cli.main(["help", name] if flag == "help" else [name, "model=best.pt", flag])
    printed = capsys.readouterr().out
    for key, text in command.required.items():
        assert re.search(rf"^  {key}= +{re.escape(text)}$", printed, re.M)
    for key, text in command.optional.items():
        assert re.search(rf"^  \[{key}=\] +{re.escape(text)}$", printed, re.M)
    assert f"Example: {command.example}" in printed


def test_an_open_bracket_is_named():
    assert "Write key=value, in quotes if a value has brackets" in text_of("studio", "model=best.pt", "source=foto[1")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_example_is_a_valid_call(name, monkeypatch):
    seen, command = [], cli.COMMANDS[name]
    monkeypatch.setitem(cli.COMMANDS, name, command._replace(run=lambda **kwargs: seen.append(kwargs)))
    program, *argv = command.example.split()
    cli.main(argv)
    assert program == "yolo-fewshot" and argv[0] == name and set(command.required) <= set(seen[0])


def test_a_command_takes_all_keys_that_it_lists(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("a.pt").touch()
    seen = []
    monkeypatch.setattr(FewShotYOLO, "__init__", lambda self, model: seen.append(model))
    monkeypatch.setattr(FewShotYOLO, "enroll", lambda self, support, **kwargs: seen.append((support, kwargs)))
    monkeypatch.setattr(FewShotYOLO, "save", lambda self, file: seen.append(file))
    monkeypatch.setattr(FewShotYOLO, "names", {0: "bus"})
    monkeypatch.setattr(FewShotYOLO, "shots", "shots")
    monkeypatch.setattr("yolo_fewshot.plots.support.plot_support", lambda *args: seen.append(args))
    argv = [
        "model=a.pt",
        "--support=shots.yaml",
        "save",
        "=",
        "b.pt",
        "enroll=fit",
        "imgsz=96",
        "batch=4",
        "device=cpu",
    ]
    cli.main(["enroll", *argv])
    asked = "shots.yaml", {"method": "fit", "imgsz": 96, "batch": 4, "device": "cpu"}
    assert seen == ["a.pt", asked, "b.pt", ("shots", {0: "bus"}, Path("b_support_check.png").absolute())]


@pytest.fixture
def rehearsed(monkeypatch):
    """The arguments that the doctor gets, and the findings that it returns."""
    asked, found = [], []
    monkeypatch.setattr("yolo_fewshot.train.doctor.doctor", lambda **kwargs: asked.append(kwargs) or found)
    return asked, found


def test_the_doctor_takes_any_key(rehearsed, caplog):
    caplog.set_level(logging.INFO)
    cli.main(
        ["doctor", "--data=7.yaml", "model=best.pt", "imgsz", "=", "320", "lr0=1e-3", "cos_lr=True", "freeze=[0, 1]"]
    )
    keys = {"data": "7.yaml", "model": "best.pt", "imgsz": 320, "lr0": 0.001, "cos_lr": True, "freeze": [0, 1]}
    assert rehearsed[0] == [keys] and "\n0 errors, 0 warnings" in caplog.text


def test_the_doctor_fails_if_it_finds_an_error(rehearsed, caplog):
    caplog.set_level(logging.INFO)
    asked, found = rehearsed
    found += [Finding("ok", "fine"), Finding("warning", "hm"), Finding("warning", "hm")]
    cli.main(["doctor", "data=a.yaml", "model=best.pt"])
    assert "\n0 errors, 2 warnings" in caplog.text and len(asked) == 1
    found.append(Finding("error", "no"))
    assert text_of("doctor", "data=a.yaml", "model=best.pt") == "\n1 errors, 2 warnings"


def test_the_doctor_needs_data_and_a_model(rehearsed):
    assert text_of("doctor", "n_way=3").startswith("data=, model= must be given.")
    assert text_of("doctor", "data=a.yaml").startswith("model= must be given.")
    assert text_of("doctor", "data=a.yaml", "model=b.pt", "n_way").startswith("expected key=value, got 'n_way'.")
    assert rehearsed[0] == []


def test_the_split_takes_all_keys_that_it_lists(monkeypatch):
    asked = []
    monkeypatch.setattr("yolo_fewshot.data.splits.split", lambda **kwargs: asked.append(kwargs))
    cli.main(["split", "data=a.yaml", "novel=cat,hot dog", "out=7"])
    cli.main(["split", "data=2017.json", "novel", "=", "['a', 'b']", "out=7", "shots=1,3", "seeds=2", "val=8"])
    cli.main(["split", "data=a.json", "novel=[a, b]", "out=b", "shots=5", "val=c", "images=2017", "val_images=7"])
    assert asked == [
        {"data": "a.yaml", "novel": "cat,hot dog", "out": "7"},
        {"data": "2017.json", "novel": ["a", "b"], "out": "7", "shots": (1, 3), "seeds": 2, "val": "8"},
        {
            **{"data": "a.json", "novel": "[a, b]", "out": "b", "shots": 5},
            **{"val": "c", "images": "2017", "val_images": "7"},
        },
    ]
    known = {**cli.COMMANDS["split"].required, **cli.COMMANDS["split"].optional}
    assert known.keys() == set().union(*asked)


def test_the_split_end_to_end(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.chdir(tmp_path)
    for folder in ("train", "val"):
        for kind in ("images", "labels"):
            (tmp_path / kind / folder).mkdir(parents=True)
        for i in range(4):
            image = np.full((32, 32, 3), 10 * i + 100 * (folder == "val"), np.uint8)
            assert cv2.imwrite(f"images/{folder}/{i}.png", image)
            Path(f"labels/{folder}/{i}.txt").write_text(f"{i % 2} 0.5 0.5 0.5 0.5\n")
    Path("2024.yaml").write_text("train: images/train\nval: images/val\nnames: [bus, car]\n")
    cli.main(["split", "data=2024.yaml", "novel=bus", "out=7", "shots=1,2", "seeds=1"])
    assert f"Results saved to {tmp_path / '7'}" in caplog.text
    assert f"data={tmp_path / '7'}/data.yaml support={tmp_path / '7'}/novel_2shot_seed0.yaml" in caplog.text
    assert len(list(Path("7/images/shots/seed0_2shot").iterdir())) == 2
    text = text_of("split", "data=2024.yaml", "novel=bis", "out=8")
    assert text.startswith("ValueError: 'novel=' names classes that 2024.yaml does not have: bis (similar: bus)")
    assert text_of("split", "data=2024.yaml", "novel=bus", "out=7").startswith("ValueError: 'out=7' exists")
    assert text_of("split", "data=2024.yaml", "novel=bus", "out=8", "shots=0").startswith("ValueError: 'shots=0' is")
    assert text_of("split", "novel=bus").startswith("data=, out= must be given.")
    assert sorted(x.name for x in tmp_path.iterdir()) == ["2024.yaml", "7", "images", "labels"]


def test_the_help_is_a_table():
    assert re.search(r"^  doctor +check the data, .* before it starts$", cli.usage(), re.M)
    assert re.search(r"^  \[KEY=\] +any other argument of yolo train", cli.usage("doctor"), re.M)
    for name, command in cli.COMMANDS.items():
        texts = [*command.required.values(), *command.optional.values()]
        rows = [x for x in cli.usage(name).splitlines() if x.startswith("  ")]
        assert {row.index(text) for row, text in zip(rows, texts)} == {16} and len(rows) == len(texts)


def test_an_unknown_command(nothing_loaded):
    text = text_of("enrol", "model=best.pt")
    assert text.startswith("unknown command 'enrol'.") and cli.usage() in text


def test_an_unknown_key_gets_a_suggestion(nothing_loaded):
    text = text_of("enroll", "model=best.pt", "suport=shots.yaml", "save=b.pt")
    assert text.startswith("'suport=' is not an argument of yolo-fewshot enroll. Similar: support=.")
    assert cli.usage("enroll") in text
    text = text_of("enroll", "model=best.pt", "zzz=1")
    assert text.startswith("'zzz=' is not an argument of yolo-fewshot enroll.\n")


@pytest.mark.parametrize("argument", ["support", "support=", "support= "])
def test_a_missing_value(argument, nothing_loaded):
    text = text_of("enroll", "model=best.pt", argument, "save=b.pt")
    assert text.startswith(f"expected key=value, got '{argument}'.") and cli.usage("enroll") in text


def test_missing_keys_are_named(nothing_loaded):
    assert text_of("enroll").startswith("model=, support=, save= must be given.")
    assert text_of("enroll", "model=best.pt", "save=none").startswith("support=, save= must be given.")


@pytest.mark.parametrize("save", ["{}/b.onnx", "{}/b", "{}/missing/b.pt", "{}"])
def test_an_invalid_file_to_save_is_an_error_before_anything_is_loaded(save, nothing_loaded, tmp_path):
    save = save.format(tmp_path)
    text = text_of("enroll", "model=best.pt", "support=shots.yaml", f"save={save}")
    assert text == f"ValueError: 'save={save}' is an invalid value. It must be a *.pt file in a folder that exists."
    assert not list(tmp_path.iterdir())


def test_enrolling_end_to_end(trained, crops, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.chdir(tmp_path)
    cli.main(["enroll", f"model={trained[1].best}", f"support={crops}", "save=site.pt", "enroll=mean", "imgsz=64"])
    assert f"Results saved to {tmp_path / 'site.pt'}" in caplog.text and "Enrolled class" in caplog.text
    assert f"Plotting support set to {tmp_path / 'site_support_check.png'}... " in caplog.text
    assert cv2.imread("site_support_check.png").shape[0] > 250
    assert sorted(x.name for x in tmp_path.iterdir()) == ["site.pt", "site_support_check.png"]
    model = YOLO(tmp_path / "site.pt")
    assert list(model.names.values()) == [*BASE, "hourglass", "umbrella"]
    assert [(x["shots"], x["method"]) for x in model.model.enrolled.values()] == [(3, "mean")] * 2
    expected = FewShotYOLO(trained[1].best)
    expected.enroll(crops, imgsz=64, method="mean")
    a, b = model.model.state_dict(), expected.model.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_an_error_of_the_plot_loses_only_the_plot(trained, crops, tmp_path, monkeypatch, caplog):
    """Not even if the process ends there."""
    argv = ["enroll", f"model={trained[1].best}", f"support={crops}", f"save={tmp_path}/a.pt", "enroll=mean"]
    monkeypatch.setattr("yolo_fewshot.plots.support._table", lambda *_: 1 / 0)
    cli.main(argv)
    assert f"Plotting error for {tmp_path / 'a_support_check.png'}: division by zero" in caplog.text
    assert [x.name for x in tmp_path.iterdir()] == ["a.pt"]
    (tmp_path / "a.pt").unlink()
    monkeypatch.setattr("yolo_fewshot.plots.support.plot_support", lambda *_: sys.exit(9))
    with pytest.raises(SystemExit):
        cli.main(argv)
    assert list(YOLO(tmp_path / "a.pt").model.enrolled) == ["hourglass", "umbrella"]


def test_a_checkpoint_may_be_replaced_by_itself(trained, crops, tmp_path):
    FewShotYOLO(trained[1].best).save(tmp_path / "a.pt")
    cli.main(["enroll", f"model={tmp_path}/a.pt", f"support={crops}", f"save={tmp_path}/a.pt", "enroll=mean"])
    assert list(YOLO(tmp_path / "a.pt").model.enrolled) == ["hourglass", "umbrella"]


def test_an_error_leaves_an_existing_file_untouched(trained, crops, tmp_path, monkeypatch):
    (tmp_path / "site.pt").write_bytes(b"old")
    YOLO("yolo11n-cls.yaml").save(tmp_path / "stock.pt")
    argv = {"model": trained[1].best, "support": crops, "save": tmp_path / "site.pt"}
    for change, error in (
        ({"support": tmp_path / "none.yaml"}, "FileNotFoundError: support="),
        ({"model": tmp_path / "none.pt"}, "FileNotFoundError: "),
        (
            {"model": tmp_path / "stock.pt"},
            "TypeError: model='.*stock.pt': A Classify head has no row for each class. enroll",
        ),
        ({"enroll": "median"}, "ValueError: 'enroll=median' is an invalid value"),
        ({"imgsz": "big"}, "(Type|Value)Error: "),
    ):
        text = text_of("enroll", *(f"{k}={v}" for k, v in {**argv, **change}.items()))
        assert re.match(error, text), text
    monkeypatch.setattr(enrollment, "thresholds", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["enroll", *(f"{k}={v}" for k, v in argv.items())])
    assert (tmp_path / "site.pt").read_bytes() == b"old"
    assert sorted(x.name for x in tmp_path.iterdir()) == ["site.pt", "stock.pt"]


def test_a_folder_may_be_named_by_a_number(trained, crops, tmp_path, monkeypatch):
    shutil.copytree(crops, tmp_path / "2024")
    monkeypatch.chdir(tmp_path)
    cli.main(["enroll", f"model={trained[1].best}", "support=2024", "save=7.pt", "enroll=mean"])
    assert list(YOLO(tmp_path / "7.pt").model.enrolled) == ["hourglass", "umbrella"]


def test_the_installed_command(trained, crops, tmp_path):
    script = Path(sys.executable).with_name("yolo-fewshot")
    argv = [f"model={trained[1].best}", f"support={crops}", "save=site.pt", "enroll=fit", "device=cpu"]
    done = subprocess.run([script, "enroll", *argv], cwd=tmp_path, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert f"{'umbrella':>22}{3:>11}{'fit':>11}" in done.stdout
    assert list(YOLO(tmp_path / "site.pt").model.enrolled) == ["hourglass", "umbrella"]
    done = subprocess.run([script, "enroll", *argv, "emroll=fit"], cwd=tmp_path, capture_output=True, text=True)
    assert (
        done.returncode == 1
        and done.stderr.startswith("'emroll=' is not an argument")
        and "Traceback" not in done.stderr
    )


@pytest.fixture
def opened(monkeypatch, tmp_path):
    """What the command opens a studio with, in place of a studio and its page."""
    monkeypatch.chdir(tmp_path)
    Path("best.pt").touch()
    app, engine, live = (pytest.importorskip(f"yolo_fewshot.studio.{n}") for n in ("app", "engine", "live"))
    calls = []

    class Studio:
        def __init__(self, *args, **kwargs):
            calls.append((args, kwargs))

        def add_source(self, source, frames, skipped):
            calls.append((source, frames))
            skipped.append("notes.jpg is not an image.")

        def close(self):
            calls.append("closed")

    monkeypatch.setattr(engine, "Studio", Studio)
    monkeypatch.setattr(live, "Live", lambda studio: studio)
    monkeypatch.setattr(app, "serve", lambda _, *args: calls.append(args))
    return calls


def test_studio_opens_a_page(opened, caplog):
    cli.main(["studio", "model=best.pt"])
    assert opened == [(("best.pt", "studio"), {}), ("127.0.0.1", 0, True), "closed"]
    opened.clear()
    options = ["folder=3.10", "source=2024_05", "frames=3", "imgsz=320", "device=cpu", "port=8000", "open=False"]
    cli.main(["studio", "model=best.pt", *options])
    assert opened[0] == (("best.pt", "3.10"), {"imgsz": 320, "device": "cpu"}) and opened[1] == ("2024_05", 3)
    assert opened[2:] == [("127.0.0.1", 8000, False), "closed"] and "notes.jpg is not an image." in caplog.text
    assert "'open=no' is an invalid value. It must be True or False" in text_of("studio", "model=best.pt", "open=no")


def test_studio_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "nicegui", None)
    monkeypatch.delitem(sys.modules, "yolo_fewshot.studio.app", raising=False)
    assert 'pip install "yolo-fewshot[studio]"' in text_of("studio", "model=best.pt")


def test_studio_warns_of_other_addresses(monkeypatch, caplog, capsys):
    app = pytest.importorskip("yolo_fewshot.studio.app")
    paths, opened = [], []
    monkeypatch.setattr(app, "make_app", lambda _, *x: paths.append(x))
    monkeypatch.setattr(app.webbrowser, "open", opened.append)
    monkeypatch.setattr(app.uvicorn, "Config", lambda *_, **__: None)

    def run(sockets):
        sockets[0].close()
        raise KeyboardInterrupt  # as Ctrl+C does at the end

    monkeypatch.setattr(app.uvicorn, "Server", lambda _: SimpleNamespace(run=run))
    live = SimpleNamespace(studio=SimpleNamespace(project=SimpleNamespace(folder="project")))
    app.serve(live, show=False)
    assert "whoever can reach" not in caplog.text
    urls = [re.search(r"http://127\.0\.0\.1:\d+/([\w-]{30,})/", capsys.readouterr().out)[1]]
    app.serve(live, "0.0.0.0", show=False)
    assert "host=0.0.0.0: whoever can reach this address" in caplog.text
    urls.append(re.search(r"http://0\.0\.0\.0:\d+/([\w-]{30,})/", capsys.readouterr().out)[1])
    assert len(set(urls)) == 2 and not opened  # a token for each start
    app.serve(live)
    for thread in [x for x in threading.enumerate() if x.name == "studio browser"]:
        thread.join(60)
    token, once = paths[-1]  # other users can read with which URL the browser was started, and must not see the token
    assert re.fullmatch(rf"http://127\.0\.0\.1:\d+/{once}", opened[0]) and token != once and len(once) >= 30
    for host, port in (("127.0.0.1", 99999), ("203.0.113.1", 0), ("no such host", 0)):
        with pytest.raises(ValueError, match=f"host={host} port={port} cannot be used"):
            app.serve(live, host, port, False)
