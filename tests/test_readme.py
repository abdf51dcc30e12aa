"""Commands of the README and of the pages that users follow are run, in a folder like a user's; others are checked."""

import re
import runpy
import shlex
import shutil
import sys
from functools import partialmethod
from importlib import import_module
from pathlib import Path
from unittest import mock

import cv2
import numpy as np
import pytest
from ultralytics import YOLO, cfg
from ultralytics.cfg import get_cfg, merge_equals_args, parse_key_value_pair
from ultralytics.utils import DEFAULT_CFG_DICT, ROOT, YAML

from yolo_fewshot import FewShotTrainer, FewShotYOLO, args, cli
from yolo_fewshot.evaluate import learn
from yolo_fewshot.studio import app as studio_app

PROJECT = Path(__file__).resolve().parents[1]
PAGES = [PROJECT / "README.md", *sorted((PROJECT / "examples").glob("*.md"))]
# In this order, since some commands take what earlier ones write. Those of the other pages take hours.
FOLLOWED = [
    PROJECT / "README.md",
    *(PROJECT / "examples" / f"{page}.md" for page in ("add_a_class", "graft", "meta_train", "adapt", "ship")),
    *(PROJECT / "examples" / f"{page}.md" for page in ("not_found", "false_alarms", "studio", "measure", "stability")),
    PROJECT / "examples" / "extend.md",
]
LINKING = [*PAGES, PROJECT / "CONTRIBUTING.md", PROJECT / "CHANGELOG.md"]
QUICK = {"imgsz": 64, "epochs": 1, "workers": 0, "plots": False, "batch": 8}
EPISODES = {"episodes": 2, "n_way": 2}


def blocks(file, language):
    """The fenced blocks of a page."""
    return re.findall(rf"```{language}\n(.*?)```", file.read_text(), re.S)


def commands(file):
    """The shell commands of a page, comments left out; `a && b` are two."""
    lines = "\n".join(blocks(file, "bash")).replace("\\\n", " ").splitlines()
    parts = [x for line in lines for x in line.split("&&")]
    return [words for x in parts if (words := shlex.split(x, comments=True))]


def write_data(folder, names, images):
    """Write a data set in which image i of each split shows classes i and i + 7, and return its data.yaml."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True)
        for i in range(images):
            cv2.imwrite(str(folder / f"images/{split}/{i:04}.png"), rng.integers(0, 256, (48, 48, 3), np.uint8))
            rows = [[c % len(names), x, x, 0.4, 0.4] for c, x in ((i, 0.25), (i + 7, 0.75))]
            text = "".join(f"{c} {x} {y} {w} {h}\n" for c, x, y, w, h in rows)
            (folder / f"labels/{split}/{i:04}.txt").write_text(text)
    data = {"path": str(folder), "train": "images/train", "val": "images/val", "names": names}
    YAML.save(folder / "data.yaml", data)
    return data


@pytest.fixture
def folder(tmp_path, monkeypatch, trained):
    """A folder with the small files that the README names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(PROJECT / "examples"))
    shutil.copytree(PROJECT / "examples", "examples")
    shutil.copy("examples/own_loss.py", "my_losses.py")
    shutil.copy(trained[1].best, "best.pt")
    base = write_data(tmp_path / "base", ["star", "plus", "arrow", "ring"], 24)
    every = write_data(tmp_path / "every", ["star", "plus", "arrow", "scooter", "bus"], 40)
    YAML.save("base.yaml", base)
    YAML.save("data.yaml", every)
    YAML.save("all_5shot.yaml", every)
    for name in ("shots.yaml", "novel_5shot.yaml"):
        YAML.save(name, {**write_data(tmp_path / name[:-5], ["scooter", "bus"], 5)})
    cv2.imwrite("street.jpg", cv2.resize(cv2.imread("base/images/val/0000.png"), (160, 120)))
    for name in ("images", "photos", "street", "unlabeled"):
        shutil.copytree("base/images/val", name)
    for name in ("steel", "runways", "neu_det"):  # K-shot lists without base classes
        shots = write_data(tmp_path / name, ["crack", "hole"], 4)
        Path(name, "novel_1shot_seed0.txt").write_text("./images/train/0000.png\n")  # which shows both
        YAML.save(Path(name, "novel_1shot_seed0.yaml"), {**shots, "train": "novel_1shot_seed0.txt"})
    FewShotYOLO("best.pt").fold().save("stock.pt")
    stock = YOLO("yolo11n.yaml")  # stands for pretrained weights
    stock.model.names = {**stock.model.names, 0: "star", 1: "plus", 2: "arrow", 3: "ring"}
    stock.save("yolo11n.pt")
    return tmp_path


@pytest.fixture
def large_data(folder):
    """Data sets with the classes of VOC and COCO, which only the commands for splits need, in the same folder."""
    for name in ("VOC", "coco"):
        names = list(YAML.load(ROOT / f"cfg/datasets/{name}.yaml")["names"].values())
        data = write_data(folder / f"{name}-data", names, 20 * len(names) if name == "VOC" else 17 * len(names))
        YAML.save(f"{name}.yaml", data)
    for split in ("train", "val"):
        import_module("my_data").to_coco("coco.yaml", split, Path(f"instances_{split}2017.json"))
        shutil.copytree(folder / "coco-data" / "images" / split, f"{split}2017")


def run(words, folder):
    """Run a command, made short by further arguments."""
    quick = [f"{k}={v}" for k, v in QUICK.items()]
    if words[0] == "yolo":
        steps = ["steps=2"] if any("stage3" in x for x in words) else []
        more = {"train": [*quick, *steps], "val": quick[:1] + quick[2:], "export": quick[:1], "predict": quick[:1]}
        stage2 = any("stage2" in x for x in words)
        more = [*more[words[1]], *(f"{k}={v}" for k, v in EPISODES.items() if stage2), f"project={folder}/runs/detect"]
        with mock.patch.object(cfg, "ARGV", [*words, *more]):  # entrypoint(text) would split quoted words
            cfg.entrypoint("")
    elif words[0] == "yolo-fewshot":
        short = ["shots=1", "seeds=1", "methods=stock-0,auto,adapt", "imgsz=64", "workers=0", "steps=2"]
        if "model=yolo11n.pt" in words:
            short += ["methods=auto,graft-head", "base_val=base.yaml"]
        more = {
            "demo": quick[:1],
            "enroll": quick[:1],
            "benchmark": short,
            "label": [*quick[:1], "conf=0.0001"],  # the training before has two steps
            "doctor": [*quick, "episodes=2", "n_way=2"],
            "studio": ["imgsz=64"],
        }
        with mock.patch.object(studio_app, "serve", lambda *_: None):  # which would wait for a user
            cli.main([*words[1:], *more.get(words[1], [])])
    elif words[:2] == ["python", "examples/add_classes.py"]:
        runpy.run_path(words[1])["main"](*words[2:])
    elif words[0] == "python" and words[1] != "-m":
        assert (PROJECT / words[1]).is_file(), f"{words[1]} does not exist"
    else:
        assert words[0] in {"pip", "python", "pdoc"}, f"{shlex.join(words)} is not run"


def test_every_command_that_users_follow_runs(folder, large_data, monkeypatch):
    monkeypatch.setattr(learn, "MIN_STEPS", 1)
    monkeypatch.setattr(learn, "MIN_EPOCHS", 1)
    monkeypatch.setattr(sys, "argv", ["yolo"])
    listed = {tuple(words): page.name for page in FOLLOWED for words in commands(page)}  # each one once
    assert len(listed) > 30
    failed = []
    for words, page in listed.items():
        try:
            run(list(words), folder)
        except (Exception, SystemExit) as e:
            failed.append(f"{page}: {shlex.join(words)}: {type(e).__name__}: {e}")
    assert not failed, "\n".join(failed)
    made = {"my_split", "voc1", "coco", "split1", "steel1", "studio", "best.onnx", "site-a.onnx", "runs"}
    assert made <= {x.name for x in folder.iterdir()}


def test_the_python_code_that_users_follow_runs(folder, monkeypatch):
    init, keys = FewShotTrainer.__init__, {**QUICK, **EPISODES, "project": str(folder)}
    monkeypatch.setattr(
        FewShotTrainer,
        "__init__",
        lambda self, *args, overrides=None, **kwargs: init(self, *args, overrides={**overrides, **keys}, **kwargs),
    )
    monkeypatch.setattr(FewShotYOLO, "enroll", partialmethod(FewShotYOLO.enroll, imgsz=QUICK["imgsz"]))
    code = {text: page.name for page in FOLLOWED for text in blocks(page, "python")}
    assert len(code) > 3
    for text, page in code.items():
        exec(compile(text, page, "exec"), {})
    assert all((folder / x).exists() for x in ("mine.pt", "site-a.pt", "plain.pt"))


@pytest.mark.parametrize("page", [x for x in PAGES if x not in FOLLOWED], ids=lambda x: x.name)
def test_the_commands_of_the_pages_are_valid(page):
    for words in commands(page):
        if words[0] == "python":
            assert (PROJECT / words[1]).is_file(), shlex.join(words)
        elif words[0] == "yolo":
            pairs = dict(parse_key_value_pair(x) for x in merge_equals_args(words[2:]))
            recipe = PROJECT / "cfg" / pairs.pop("cfg", "stage1.yaml")
            assert recipe.is_file()
            args.check(vars(get_cfg({**DEFAULT_CFG_DICT, "save_dir": ""}, {**YAML.load(recipe), **pairs})))
        else:
            assert words[0] == "yolo-fewshot" and words[1] in cli.COMMANDS, shlex.join(words)
            command = cli.COMMANDS[words[1]]
            known = {*command.required, *command.optional}
            assert "KEY" in known or {x.split("=")[0] for x in words[2:]} <= known


def test_every_page_notebook_and_script_is_listed():
    """In the README pages and notebooks, in the index of the folder all."""
    here = PROJECT / "examples"
    for page, kinds in ((PROJECT / "README.md", ("md", "ipynb")), (here / "README.md", ("md", "ipynb", "py"))):
        there = {x for kind in kinds for x in here.glob(f"*.{kind}")} - {page}
        assert there <= {(page.parent / x.partition("#")[0]).resolve() for x in links(page)}


@pytest.mark.parametrize("page", LINKING, ids=lambda x: x.relative_to(PROJECT).as_posix())
def test_links_have_targets(page):
    anchors = {p: {anchor(x) for x in re.findall(r"(?m)^#+ (.*)$", p.read_text())} for p in LINKING}
    for target in links(page):
        if not target.startswith("http"):
            file, _, place = target.partition("#")
            found = (page.parent / file).resolve() if file else page
            assert found.exists(), target
            assert not place or place in anchors[found], target


def links(page):
    """The targets of the links and images of a page, without those of code."""
    return re.findall(r"\]\(([^)]+)\)", re.sub(r"(?s)```.*?```|`[^`]*`", "", page.read_text()))


def anchor(title):
    """The anchor that a heading gets."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
