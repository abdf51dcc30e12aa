"""Tests of real installations: a wheel built from the sdist, and an editable one, each in its own virtual environment.

The stock `yolo` script runs in them from another folder. Everything but this package comes from the environment of the
tests, whose site-packages folders are on the path of the new one, behind its own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pytest
import torch
import yaml

pytestmark = pytest.mark.slow

REPO = Path(__file__).resolve().parents[1]
START_UP = {"yolo_fewshot.pth", "yolo_fewshot.start", "yolo_fewshot_startup.py"}

# The script that pip writes for Ultralytics' entry point `yolo`.
SCRIPT = """#!{python}
import re
import sys
from ultralytics.cfg import entrypoint
if __name__ == '__main__':
    sys.argv[0] = re.sub(r'(-script\\.pyw|\\.exe)?$', '', sys.argv[0])
    sys.exit(entrypoint())
"""


class Install(NamedTuple):
    """A virtual environment with the package in it."""

    kind: str
    python: Path
    site: Path
    yolo: list[str]


def run(command: list[str | Path], cwd: Path, **env: str) -> subprocess.CompletedProcess:
    """Run a command that must not see the checkout by way of the environment."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    variables.update(OMP_NUM_THREADS="1", PIP_DISABLE_PIP_VERSION_CHECK="1", **env)
    return subprocess.run(
        [str(c) for c in command], cwd=cwd, env=variables, capture_output=True, text=True, timeout=400
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel as published: built from the sdist."""
    out = tmp_path_factory.mktemp("dist")
    done = run([sys.executable, "-m", "build", "--no-isolation", "--outdir", out, REPO], out)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list(out.glob("*.tar.gz"))) == 1
    (path,) = out.glob("*.whl")
    return path


def make_install(kind: str, root: Path, wheel: Path | None) -> Install:
    """Make a virtual environment and install the package with pip, offline."""
    venv.create(root, with_pip=False)
    python = root / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(run([python, "-c", code], root).stdout.strip())
    assert site.is_relative_to(root)
    outer = [p for p in sys.path if Path(p).name in {"site-packages", "dist-packages"}]
    (site / "zz_outer.pth").write_text("\n".join(outer))  # its own .pth files do not run
    # --ignore-installed: pip sees the package of the outer environment too
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps", "--ignore-installed"]
    what = [wheel] if wheel else ["--no-build-isolation", "--editable", REPO]
    done = run([*pip, *what], root)
    assert done.returncode == 0, done.stdout + done.stderr
    script = python.with_name("yolo")
    script.write_text(SCRIPT.format(python=python))
    script.chmod(0o755)
    return Install(kind, python, site, [str(python), str(script)] if os.name == "nt" else [str(script)])


@pytest.fixture(scope="module")
def wheel_install(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Install:
    return make_install("wheel", tmp_path_factory.mktemp("wheel") / "env", wheel)


@pytest.fixture(scope="module", params=["wheel", "editable"])
def install(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Install:
    if request.param == "wheel":
        return request.getfixturevalue("wheel_install")
    return make_install("editable", tmp_path_factory.mktemp("editable") / "env", None)


def test_wheel_has_configs_start_up_files_and_license_but_no_tests(wheel: Path):
    with zipfile.ZipFile(wheel) as z:
        names = z.namelist()
    assert len(names) == len(set(names))
    assert {n for n in names if "/" not in n} == START_UP
    assert {n for n in names if n.startswith("yolo_fewshot/cfg/")} == {
        f"yolo_fewshot/{p.relative_to(REPO).as_posix()}" for p in (REPO / "cfg").rglob("*.yaml")
    }
    modules = {p.relative_to(REPO).as_posix() for p in (REPO / "yolo_fewshot").glob("*.py")}
    assert modules <= set(names)
    assert [n for n in names if n.endswith("/licenses/LICENSE")]
    tops = {n.partition("/")[0] for n in names if "/" in n}
    assert tops == {"yolo_fewshot", next(t for t in tops if t.endswith(".dist-info"))}
    assert not [n for n in names if "startup/" in n or "test" in n]


def test_start_up_files_are_at_the_root_of_site_packages(install: Install, tmp_path: Path):
    for name in START_UP:
        assert (install.site / name).read_bytes() == (REPO / "yolo_fewshot" / "startup" / name).read_bytes()
    code = (
        "import yolo_fewshot_startup, yolo_fewshot; print(yolo_fewshot_startup.__file__, yolo_fewshot.__file__, "
        "yolo_fewshot.paths.cfg_dir(), sep='\\n')"
    )
    done = run([install.python, "-c", code], tmp_path)
    base, cfg = {
        "wheel": (install.site / "yolo_fewshot", install.site / "yolo_fewshot" / "cfg"),
        "editable": (REPO / "yolo_fewshot", REPO / "cfg"),
    }[install.kind]
    expected = [install.site / "yolo_fewshot_startup.py", base / "__init__.py", cfg]
    assert [Path(x).resolve() for x in done.stdout.splitlines()] == [x.resolve() for x in expected], done.stderr


def test_other_programs_import_nothing(install: Install, tmp_path: Path):
    code = (
        "import sys; print(*(x in sys.modules for x in ('yolo_fewshot_startup', 'yolo_fewshot', 'torch', 'logging')))"
    )
    (tmp_path / "yolo_tool.py").write_text(code)
    for command in (["-c", code], ["yolo_tool.py", "yolo"], ["-m", "yolo_tool", "train"]):
        done = run([install.python, *command], tmp_path)
        assert (done.stdout.split(), done.stderr) == (["True", "False", "False", "False"], "")


def test_processing_the_start_up_file_twice_is_harmless(install: Install, tmp_path: Path):
    (tmp_path / "yolo").write_text(
        f"import site, sys\nsite.addsitedir({str(install.site)!r}, set())\nfrom yolo_fewshot import plugin\n"
        "print('torch' in sys.modules, sum(type(f) is plugin._PostImport for f in sys.meta_path))\n"
    )
    done = run([install.python, "yolo"], tmp_path)
    assert (done.stdout.split(), done.stderr) == (["False", "1"], "")


@pytest.mark.parametrize("how", ["script", "module"])
def test_a_misspelled_key_gets_a_suggestion(install: Install, how: str, tmp_path: Path):
    start = install.yolo if how == "script" else [install.python, "-m", "ultralytics.cfg.__init__"]
    done = run([*start, "train", "model=fewshot.yaml", "cfg=stage2.yaml", "n_wya=3"], tmp_path)
    assert done.returncode != 0
    expected = r"SyntaxError: '\S*n_wya\S*' is not a valid YOLO argument. Similar arguments are i.e. \['n_way'"
    assert re.search(expected, done.stderr)  # older Ultralytics colors the name
    assert "'stage'" not in done.stderr


def test_disabled_by_the_environment(install: Install, tmp_path: Path):
    done = run([*install.yolo, "train", "model=yolo11n.yaml", "stage=1"], tmp_path, YOLO_FEWSHOT_DISABLE="1")
    assert done.returncode != 0
    assert re.search(r"SyntaxError: '\S*stage\S*' is not a valid YOLO argument.", done.stderr)


def make_data(root: Path) -> Path:
    """Draw a data set of eight images, two classes of squares, and return its YAML."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        (root / "images" / split).mkdir(parents=True)
        (root / "labels" / split).mkdir(parents=True)
        for i in range(4):
            image = rng.integers(0, 80, (64, 64, 3), dtype=np.uint8)
            x, y = rng.integers(0, 40, 2)
            image[y : y + 24, x : x + 24] = (255, 255, 255) if i % 2 else (0, 0, 255)
            assert cv2.imwrite(str(root / "images" / split / f"{i}.png"), image)
            box = f"{i % 2} {(x + 12) / 64} {(y + 12) / 64} {24 / 64} {24 / 64}\n"
            (root / "labels" / split / f"{i}.txt").write_text(box)
    data = {"path": str(root), "train": "images/train", "val": "images/val", "names": {0: "red", 1: "white"}}
    (root / "data.yaml").write_text(yaml.safe_dump(data))
    return root / "data.yaml"


def test_the_stock_command_trains_a_fewshot_model(wheel_install: Install, tmp_path: Path):
    network = yaml.safe_load((REPO / "cfg" / "fewshot.yaml").read_text())
    network.update(width_multiple=0.1, depth_multiple=0.1, fewshot={"embed": 16, "proj": 8})
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(network))
    done = run(
        [
            *wheel_install.yolo,
            *("train", "model=tiny.yaml", "cfg=stage1.yaml", f"data={make_data(tmp_path / 'data')}", "epochs=1"),
            *(
                "imgsz=64",
                "batch=4",
                "workers=0",
                "device=cpu",
                "amp=False",
                "plots=False",
                f"project={tmp_path}",
                "name=run",
            ),
        ],
        tmp_path,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    best = tmp_path / "run" / "weights" / "best.pt"
    recorded = yaml.safe_load((best.parents[1] / "args.yaml").read_text())
    assert (recorded["stage"], recorded["n_way"], recorded["epochs"]) == (1, None, 1)
    assert "train/grad_norm" in (best.parents[1] / "results.csv").read_text()
    saved = torch.load(best, weights_only=False)
    assert type(saved["model"]).__name__ == "FewShotDetectionModel"
    assert saved["model"].yaml["fewshot"] == {"embed": 16, "proj": 8}
    assert saved["model"].names == {0: "red", 1: "white"}
