import csv
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from ultralytics import YOLO
from ultralytics.utils import YAML

from yolo_fewshot import FewShotYOLO, __version__, cli
from yolo_fewshot.data.demo import BASE, NOVEL
from yolo_fewshot.evaluate import benchmark as module
from yolo_fewshot.evaluate import learn as learning
from yolo_fewshot.evaluate.benchmark import benchmark
from yolo_fewshot.evaluate.leakage import leakage
from yolo_fewshot.evaluate.meter import Meter
from yolo_fewshot.evaluate.methods import FREEZES, METHODS
from yolo_fewshot.evaluate.report import BASELINE, COLUMNS, FIGURES, NUMBERS, START, read_rows

QUICK = {"imgsz": 96, "workers": 0, "shots": 1}
NAMES = [*BASE, *NOVEL]


@pytest.fixture(scope="module")
def data(part_of_demo, tmp_path_factory):
    """A hand-made folder of a few demo images: lists for 'one' shot, and a data.yaml of each seed for 'five'."""
    root = tmp_path_factory.mktemp("data")
    novel = part_of_demo(root, train=60, val=12, novel_query=12, novel_support=24)
    YAML.save(root / "novel_1shot.yaml", {**novel, "train": "images"})
    for seed in range(2):
        names = [f"./images/novel_support/{i:04}.jpg\n" for i in range(12 * seed, 12 * seed + 12)]
        (root / f"novel_1shot_seed{seed}.txt").write_text("".join(names))
        YAML.save(root / f"novel_5shot_seed{seed}.yaml", novel)
        YAML.save(root / f"all_1shot_seed{seed}.yaml", {**novel, "train": "images/train"})
    return root


@pytest.fixture
def asked(monkeypatch):
    """What the benchmark asks for, each answered by figures that depend on method, number of shots and seed."""
    calls = []

    def run_method(plan, method, shots, seed):
        calls.append((method, shots, seed))
        x = METHODS.index(method.partition("-")[0]) / 100 + shots / 50 + seed**2 / 200 + len(method) / 1000
        figures = [f for kind in FIGURES.values() for f in kind]
        return {f: x + i / 1000 for i, f in enumerate(figures)} | {"seconds": 1.5}

    monkeypatch.setattr(module, "_run_method", run_method)
    monkeypatch.setattr(module, "_run_start", lambda _: {"GFSOD_bAP50": 0.75, "GFSOD_bAP": 0.5})
    return calls


@pytest.fixture
def model(trained):
    return trained[1].best


def meter_of(seconds):
    """A meter that has measured."""
    meter = Meter()
    meter.seconds, meter.ram, meter.gpu = seconds, 9.0, float("nan")
    return meter


# End to end


def test_stock_enrollment_and_adaptation_end_to_end(data, model, tmp_path, monkeypatch):
    monkeypatch.setattr(learning, "MIN_STEPS", 1)
    monkeypatch.setattr(learning, "MIN_EPOCHS", 1)
    seen, train = [], YOLO.train
    monkeypatch.setattr(
        YOLO, "train", lambda self, *a, **kwargs: seen.append((type(self), kwargs)) or train(self, *a, **kwargs)
    )
    before = {x for x in data.rglob("*") if x.suffix != ".cache"}
    out = benchmark(data, model, methods="stock,mean,adapt", seeds=2, steps=2, lr0=1.0, out=tmp_path / "out", **QUICK)
    with open(out / "rows.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    methods = ["stock-0", "stock-10", "stock-22", "mean", "adapt"]
    assert [(x["method"], x["seed"]) for x in rows] == [(START, "0"), *((m, s) for s in "01" for m in methods)]
    start = rows.pop(0)
    assert 0.1 < float(start["GFSOD_bAP50"]) <= 1 and start["FSOD_nAP50"] == start["GFSOD_nAP50"] == ""
    for x in rows:
        assert tuple(x) == COLUMNS and x["stock"] == "folded" and x["stage1"] == "" and x["version"] == __version__
        assert len(x["model"]) == 12 and 0 < float(x["seconds"]) < float(x["wall"]) < 100
        assert 0 < float(x["ms"]) < 1000 and 50 < float(x["ram"]) < 1e5 and x["gpu"] == ""
        assert 0 <= float(x["GFSOD_alarms"]) < 1000
        for suffix in ("50", ""):
            b, n, hm = (float(x[f"GFSOD_{k}{suffix}"]) for k in ("bAP", "nAP", "HM"))
            assert hm == pytest.approx(2 * b * n / (b + n) if b and n else 0, abs=2e-6)
    enrolled = [x for x in rows if x["method"] == "mean"]
    assert all(float(x["FSOD_nAP50"]) > 0.02 and float(x["GFSOD_bAP50"]) > 0.1 for x in enrolled)
    stock = [kwargs for cls, kwargs in seen if cls is YOLO]
    assert [(x["freeze"], x["seed"]) for x in stock] == [(f, s) for s in range(2) for f in FREEZES]
    assert all(x["lr0"] == 0.002 and x["epochs"] == 1 and "steps" not in x for x in stock)
    adapt = [kwargs for cls, kwargs in seen if cls is FewShotYOLO]
    assert all(x["steps"] == 2 and "lr0" not in x and "base_replay" not in x for x in adapt) and len(adapt) == 2
    assert {x.name for x in out.iterdir()} == {
        *("rows.csv", "benchmark.json", "results.md", "results.png", "stock.pt"),
        *(f"novel_1shot_seed{s}.yaml" for s in range(2)),
    }
    assert {x for x in data.rglob("*") if x.suffix != ".cache"} == before
    # The figures are those of a model that is enrolled by hand.
    yolo = FewShotYOLO(model)
    yolo.enroll(out / "novel_1shot_seed1.yaml", imgsz=96, method="mean")
    groups = yolo.val(data=str(data / "data.yaml"), imgsz=96, workers=0, batch=1, plots=False).groups
    for name in ("base", "novel"):
        assert float(enrolled[1][f"GFSOD_{name[0]}AP50"]) == pytest.approx(groups[name]["mAP50"], abs=1e-5)
        assert float(enrolled[1][f"GFSOD_{name[0]}AP"]) == pytest.approx(groups[name]["mAP50-95"], abs=1e-5)


def test_ablations_end_to_end(data, model, trained, tmp_path, monkeypatch):
    seen, train = [], YOLO.train
    monkeypatch.setattr(YOLO, "train", lambda self, *a, **kw: seen.append(kw) or train(self, *a, **kw))
    keys = {**QUICK, "epochs": 1, "episodes": 2, "val": False, "save": True, "shots": (1, 5), "seeds": 1}
    out = benchmark(data, model, stage1=trained[0].best, methods=["minus_cpe"], out=tmp_path / "out", **keys)
    assert len(seen) == 1 and seen[0]["cpe"] == 0 and seen[0]["episodes"] == 2 and "n_way" not in seen[0]
    assert list(read_rows(out / "rows.csv")) == [(START, 0, 0), ("minus_cpe", 1, 0), ("minus_cpe", 5, 0)]
    kept = {START, "minus_cpe_seed0", "minus_cpe_seed0.pt", "minus_cpe_1shot_seed0", "minus_cpe_5shot_seed0"}
    assert {x.name for x in (out / "runs").iterdir()} == kept
    assert YOLO(out / "runs" / "minus_cpe_seed0.pt").ckpt["train_args"]["cpe"] == 0


def test_what_each_method_starts_from(data, model, trained, tmp_path, monkeypatch):
    enrolled, runs = [], []

    def enroll(plan, folder, start, shots, method):
        enrolled.append((start.name, method, shots.name))
        return learning.Learned(start, meter_of(1.0))

    def train(start, folder, **keys):
        folder.mkdir(parents=True)
        runs.append((start.name, Path(keys.pop("cfg")).name, Path(keys.pop("data")).name, keys))
        return SimpleNamespace(last=start, best=start), meter_of(1.0)

    monkeypatch.setattr(learning, "_enroll", enroll)
    monkeypatch.setattr(learning, "_train", train)
    monkeypatch.setattr(module, "measure", lambda *_: {"FSOD_nAP50": 0.25, "GFSOD_HM": 1 / 3})
    monkeypatch.setattr(module, "measure_start", lambda *_: {"GFSOD_bAP50": 0.5})
    keys = {**QUICK, "shots": (1, 5), "seeds": 1, "out": tmp_path / "out", "episodes": 9, "steps": 7, "supcon": 2.0}
    shutil.copy(trained[0].best, tmp_path / "stage1.pt")
    shutil.copy(model, tmp_path / "model.pt")
    methods = "replay,adapt_full,no_episodes,full,two_way,minus_contrast,fit"
    benchmark(data, tmp_path / "model.pt", stage1=tmp_path / "stage1.pt", methods=methods, **keys)
    first, second = "novel_1shot_seed0.yaml", "novel_5shot_seed0.yaml"
    assert [x[:3] for x in runs] == [
        *(("model.pt", "stage3.yaml", x) for _ in range(2) for x in (first, second)),
        *(("stage1.pt", "stage2.yaml", "base.yaml") for _ in range(3)),
    ]
    common = {"imgsz": 96, "workers": 0, "plots": False, "verbose": False, "seed": 0}
    assert runs[0][3] == runs[1][3] == {**common, "graft": "none", "steps": 7, "base_replay": str(data / "base.yaml")}
    assert runs[2][3] == runs[3][3] == {**common, "graft": "none", "steps": 7, "blend": 1.0}
    ways = {"n_way": 2, "k_shot": 4, "n_query": 4, "wide": False}
    assert runs[4][3] == {**common, "episodes": 9, "supcon": 2.0}
    assert runs[5][3] == {**common, "episodes": 9, "supcon": 2.0, **ways}
    assert runs[6][3] == {**common, "episodes": 9, "supcon": 0.0, "cpe": 0.0, "triplet": 0.0}
    expected = [
        ("stage1.pt", "auto"),
        ("full_seed0.pt", "auto"),
        ("two_way_seed0.pt", "auto"),
        ("minus_contrast_seed0.pt", "auto"),
    ]
    assert enrolled == [(*x, y) for x in [*expected, ("model.pt", "fit")] for y in (first, second)]
    row = read_rows(tmp_path / "out" / "rows.csv")["fit", 5, 0]
    assert {c: row[c] for c in NUMBERS if row[c] == row[c] and c != "wall"} == {
        **{"FSOD_nAP50": 0.25, "GFSOD_HM": 0.333333, "seconds": 1.0, "ram": 9.0}
    }
    assert not (tmp_path / "out" / "runs").exists()
    runs.clear()
    benchmark(data, tmp_path / "model.pt", methods="adapt_all", **{**keys, "shots": (1,), "out": tmp_path / "all"})
    assert runs == [("model.pt", "stage3.yaml", "all_1shot_seed0.yaml", {**common, "graft": "none", "steps": 7})]


def test_methods_of_all_classes_see_shots_of_them_and_are_measured_as_the_others(data, model, tmp_path, monkeypatch):
    trained, measured = [], []

    def fine_tune(plan, folder, shots, freeze, seed):
        trained.append((shots.name, freeze, seed))
        return learning.Learned(model, meter_of(1.0))

    def train(start, folder, **keys):
        trained.append((Path(keys["data"]).name, Path(keys["cfg"]).name, keys["seed"]))
        return SimpleNamespace(last=model), meter_of(1.0)

    monkeypatch.setattr(learning, "_fine_tune", fine_tune)
    monkeypatch.setattr(learning, "_train", train)
    monkeypatch.setattr(module, "measure", lambda plan, file, queries, folder: measured.append(queries.name) or {})
    monkeypatch.setattr(module, "measure_start", lambda *_: {})
    benchmark(data, model, methods="stock_all-0,stock_all-22,stock_all-0,adapt_all", seeds=2, out=tmp_path, **QUICK)
    assert trained == [(f"all_1shot_seed{s}.yaml", f, s) for s in range(2) for f in (0, 22, "stage3.yaml")]
    assert measured == [f"novel_1shot_seed{s}.yaml" for s in range(2) for _ in range(3)]
    with pytest.raises(
        FileNotFoundError, match=r"has no all_5shot_seed0\.yaml\. It has all_1shot_seed0, all_1shot_seed1:"
    ):
        benchmark(data, model, methods="adapt_all", seeds=1, out=tmp_path / "b", **{**QUICK, "shots": 5})


def test_the_image_size_is_that_of_the_model(data, model, tmp_path, asked):
    benchmark(data, model, methods="mean", shots=1, seeds=1, out=tmp_path)
    assert json.loads((tmp_path / "benchmark.json").read_text())["settings"] == {"imgsz": 96}


# Rows


def test_a_resumed_run_measures_what_is_missing(data, model, tmp_path, asked, monkeypatch):
    keys = {**QUICK, "methods": "mean,fit", "seeds": 2, "out": tmp_path}
    answer, calls = module._run_method, []

    def interrupted(plan, method, shots, seed):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(method)
        return answer(plan, method, shots, seed)

    monkeypatch.setattr(module, "_run_method", interrupted)
    with pytest.raises(KeyboardInterrupt):
        benchmark(data, model, **keys)
    assert asked == [("mean", 1, 0), ("fit", 1, 0)] and not (tmp_path / "results.md").exists()
    first = (tmp_path / "rows.csv").read_text()
    monkeypatch.setattr(module, "_run_method", answer)
    benchmark(data, model, **keys)
    assert asked[2:] == [("mean", 1, 1), ("fit", 1, 1)] and (tmp_path / "rows.csv").read_text().startswith(first)
    benchmark(data, model, **keys)
    assert len(asked) == 4
    benchmark(data, model, **{**keys, "methods": "mean,auto", "shots": "1,5"})  # more may be asked for
    assert sorted(asked[4:]) == sorted(
        [*(("auto", k, s) for k in (1, 5) for s in (0, 1)), ("mean", 5, 0), ("mean", 5, 1)]
    )


def test_other_models_or_settings_are_refused(data, model, trained, tmp_path, asked):
    keys = {**QUICK, "methods": "mean", "seeds": 1, "out": tmp_path}
    benchmark(data, model, **keys)
    record = (tmp_path / "benchmark.json").read_bytes()
    with pytest.raises(ValueError, match=rf"results of other settings: imgsz={QUICK['imgsz']}, no rect=\. Set another"):
        benchmark(data, model, **{**keys, "imgsz": 64, "rect": True})
    with pytest.raises(ValueError, match="results of another model"):
        benchmark(data, trained[0].best, **keys)
    assert len(asked) == 1 and (tmp_path / "benchmark.json").read_bytes() == record
    content = json.loads(record)
    assert (
        content["settings"] == {"imgsz": 96, "workers": 0}
        and content["methods"] == ["mean"]
        and content["shots"] == [1]
    )
    assert content["versions"]["yolo_fewshot"] == __version__ and content["machine"]["cores"] and "command" in content


def test_kept_runs_stay_in_a_run_that_goes_on(data, model, tmp_path, asked):
    keys = {**QUICK, "methods": "mean", "out": tmp_path}
    benchmark(data, model, **keys, seeds=1, save=True)
    kept = [tmp_path / "runs/mean_1shot_seed0/best.pt", tmp_path / "runs/full_seed0.pt"]
    for x in kept:
        x.parent.mkdir(parents=True, exist_ok=True)
        x.touch()
    benchmark(data, model, **keys, seeds=2)
    assert len(asked) == 2 and all(x.is_file() for x in kept)
    assert json.loads((tmp_path / "benchmark.json").read_bytes())["save"] is True


# Tables


def test_the_results(data, model, tmp_path, asked):
    benchmark(data, model, methods="stock,mean", seeds=2, out=tmp_path, **{**QUICK, "shots": "5,1"})
    text = (tmp_path / "results.md").read_text()
    titles = re.findall("^## .*$", text, re.M)
    assert titles == [
        "## FSOD: novel images alone, 8 novel classes, 2 seeds.",
        "## G-FSOD: base and novel images together, 8 novel classes, 2 seeds.",
    ]
    rows = [x.split(" | ")[:2] for x in text.splitlines() if re.match(r"\| \d", x)]
    assert rows == 2 * [[f"| {k}", m] for k in (1, 5) for m in (BASELINE, *(f"stock-{f}" for f in FREEZES), "mean")]
    assert f"yolo_fewshot {__version__}" in text and (tmp_path / "results.png").stat().st_size > 10000
    assert {(m, k) for m, k, _ in asked} == {(f"stock-{f}", k) for f in FREEZES for k in (1, 5)} | {
        ("mean", 1),
        ("mean", 5),
    }


def test_leakage_is_in_the_title(data, model, tmp_path, asked, caplog):
    pretrained = YOLO("yolo11n.yaml")
    pretrained.model.names = {0: "Flag", 1: "dog", 2: "hash"}
    pretrained.save(tmp_path / "pretrained.pt")
    stock = YOLO("yolo11n.yaml")
    stock.ckpt = {"train_args": {"model": str(tmp_path / "pretrained.pt"), "pretrained": True}}
    stock.save(tmp_path / "stock.pt")
    keys = {**QUICK, "methods": "mean", "seeds": 1}
    out = benchmark(data, model, stock=tmp_path / "stock.pt", out=tmp_path / "out", **keys)
    titles = re.findall("^## .*$", (out / "results.md").read_text(), re.M)
    assert all(x.endswith("1 seed. LEAKAGE: the starting checkpoint was trained on flag, hash") for x in titles)
    (tmp_path / "pretrained.pt").unlink()
    assert leakage([tmp_path / "stock.pt"], NOVEL) == [] and "audit lacks pretrained.pt" in caplog.text


# Length of the stock fine-tuning, and where further arguments go


@pytest.mark.parametrize(
    "images, batch, epochs", [(1, 16, 300), (12, 16, 300), (17, 16, 150), (100, 16, 60), (12, 8, 300), (3, 1, 1600)]
)
def test_the_stock_fine_tuning_takes_enough_steps(images, batch, epochs):
    assert learning.epochs_for(images, batch) == epochs


def test_further_arguments_reach_the_runs_that_accept_them():
    given = {
        **{"imgsz": 96, "fliplr": 0.0, "batch": 8, "steps": 2, "n_way": 4, "epochs": 1, "episodes": 3, "lr0": 0.1},
        **{"doctor": 0, "val": True, "iou": 0.6, "blend": 0.3, "grad_clip": 1.0, "background": "images"},
        **{"optimizer": "SGD", "nbs": 64, "warmup_epochs": 3},
    }
    kinds = ("stock", "stage2", "stage3", "graft")
    of = {what: learning.settings_for(what, given).keys() - {"plots", "verbose"} for what in kinds}
    common = {"imgsz", "fliplr", "iou"}
    assert of["stock"] == common | {"batch"}
    stage2 = {"n_way", "epochs", "episodes", "lr0", "doctor", "val", "grad_clip", "optimizer", "nbs", "warmup_epochs"}
    assert of["stage2"] == common | stage2
    assert of["stage3"] == common | {"batch", "steps", "doctor", "blend", "grad_clip"}
    assert of["graft"] == of["stage3"] | {"background"}
    assert learning.settings_for("val", given) == {"imgsz": 96, "iou": 0.6}


# Errors


@pytest.mark.parametrize(
    "change, error, text",
    [
        ({"model": "none.pt"}, FileNotFoundError, r"^model=none\.pt does not exist"),
        ({"stock": "none.pt"}, FileNotFoundError, r"^stock=none\.pt does not exist"),
        ({"stage1": "none.pt"}, FileNotFoundError, r"^stage1=none\.pt does not exist"),
        (
            {"methods": "mean,adpt"},
            ValueError,
            r"names adpt \(similar: adapt.*\)\. Valid methods are stock, stock_all, mean",
        ),
        ({"methods": "mean-0"}, ValueError, r"^'methods=' names mean-0 \(similar: mean"),
        ({"methods": "stock-x"}, ValueError, r"^'methods=' names stock-x \(similar: stock"),
        ({"methods": ","}, ValueError, r"^'methods=' names nothing"),
        ({"methods": "mean,two_way,no_episodes"}, ValueError, r"^stage1= must be given for two_way, no_episodes"),
        ({"shots": 0}, ValueError, r"^'shots=0' is an invalid value"),
        ({"seeds": 0}, ValueError, r"^'seeds=0' is an invalid value"),
        (
            {"seeds": 3},
            FileNotFoundError,
            r"no novel_1shot_seed2\.yaml\. It has novel_1shot_seed0, novel_1shot_seed1, n",
        ),
        ({"shots": (1, 7)}, FileNotFoundError, r"no novel_7shot_seed0\.yaml, novel_7shot_seed1\.yaml\. It has"),
        ({"imgzs": 96}, SyntaxError, "imgzs"),
        ({"imgsz": "big"}, ValueError, r"^'imgsz=big' is an invalid value"),
        ({"epochs": "many"}, TypeError, "epochs"),
        ({"steps": 0}, ValueError, "'steps=0' is an invalid value"),
        ({"batch": -1}, ValueError, "'batch=-1' is an invalid value"),
        ({"base_replay": "a.yaml", "seed": 1}, ValueError, r"^base_replay=, seed= cannot be set"),
        ({"data": "none"}, FileNotFoundError, r"data\.yaml does not exist"),
        ({"base_val": "none.yaml"}, FileNotFoundError, r"^base_val=.*none\.yaml does not exist"),
        ({"published": "none.csv"}, FileNotFoundError, r"^published=none\.csv does not exist"),
        ({"graft": "neck"}, ValueError, r"^graft= cannot be set"),
        ({"objects": "a 0 0 9 9"}, ValueError, r"^objects= cannot be set"),
        ({"background": "none"}, FileNotFoundError, r"^background='none' does not exist"),
    ],
)
def test_everything_is_checked_first(data, model, tmp_path, asked, change, error, text):
    keys = {"data": data, "model": model, "methods": "mean", "seeds": 2, "out": tmp_path / "out", **QUICK, **change}
    with pytest.raises(error, match=text):
        benchmark(**keys)
    assert asked == [] and not (tmp_path / "out").exists()


def test_models_of_the_wrong_kind(data, model, tmp_path, asked):
    YOLO("yolo11n.yaml").save(tmp_path / "plain.pt")
    keys = {**QUICK, "methods": "mean", "seeds": 2, "out": tmp_path / "out"}
    with pytest.raises(TypeError, match=r"plain\.pt' has no few-shot head"):
        benchmark(data, model, stage1=tmp_path / "plain.pt", **keys)
    with pytest.raises(TypeError, match="must be a stock detector"):
        benchmark(data, model, stock=model, **keys)
    assert asked == [] and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "names, file, text",
    [
        (BASE, "data.yaml", r"data\.yaml must have the classes of base\.yaml and novel ones"),
        ([*NAMES[:-1], NAMES[-2]], "data.yaml", rf"Several novel classes of .*data\.yaml have the name {NAMES[-2]}"),
        (["other", *NAMES[1:]], "data.yaml", r"data\.yaml must have the classes of base\.yaml and novel ones"),
        (NAMES[::-1], "novel_5shot_seed0.yaml", r"novel_5shot_seed0\.yaml must have the classes of data\.yaml, in the"),
    ],
)
def test_classes_that_do_not_fit(data, model, tmp_path, asked, names, file, text):
    for x in data.glob("*.*"):
        content = YAML.load(x) if x.suffix == ".yaml" else {}
        if content:
            YAML.save(
                tmp_path / x.name,
                {**content, "path": str(data), **({"names": dict(enumerate(names))} if x.name == file else {})},
            )
    with pytest.raises(ValueError, match=text):
        benchmark(tmp_path, model, methods="mean", seeds=2, out=tmp_path / "out", **{**QUICK, "shots": 5})
    assert asked == []


# The command


def test_the_command_takes_all_keys_that_it_lists(monkeypatch):
    seen = []
    monkeypatch.setattr(module, "benchmark", lambda **kwargs: seen.append(kwargs))
    argv = [
        "data=1",
        "model=2",
        "stock=3",
        "stage1=4",
        "base_val=6",
        "published=7",
        "out=5",
        "shots=1,3",
        "seeds=2",
        "methods=stock,mean",
        "save=True",
    ]
    cli.main(["benchmark", *argv, "imgsz=160", "fliplr=0", "device=0"])
    texts = {
        "data": "1",
        "model": "2",
        "stock": "3",
        "stage1": "4",
        "base_val": "6",
        "published": "7",
        "out": "5",
        "methods": "stock,mean",
    }
    assert seen == [{**texts, "shots": (1, 3), "seeds": 2, "save": True, "imgsz": 160, "fliplr": 0, "device": 0}]
    known = {**cli.COMMANDS["benchmark"].required, **cli.COMMANDS["benchmark"].optional}
    assert known.keys() - {"KEY"} == {*texts, "shots", "seeds", "save"}


def test_errors_of_the_command(data, model, tmp_path):
    with pytest.raises(SystemExit, match="ValueError: 'methods=' names men") as e:
        cli.main(["benchmark", f"data={data}", f"model={model}", "methods=men", f"out={tmp_path}"])
    assert isinstance(e.value.code, str)
