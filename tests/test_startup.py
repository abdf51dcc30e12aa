"""Tests of the start-up file, by its path, as the interpreter runs it before any package."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import yolo_fewshot

FOLDER = Path(yolo_fewshot.__file__).parent / "startup"  # a wheel has these files at the root of site-packages
if not FOLDER.is_dir():
    FOLDER = Path(yolo_fewshot.__file__).parents[1]
FILE = FOLDER / "yolo_fewshot_startup.py"


@pytest.fixture
def startup() -> ModuleType:
    """A fresh copy of the module."""
    spec = importlib.util.spec_from_file_location("yolo_fewshot_startup", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "argv",
    [
        ["/venv/bin/python", "/venv/bin/yolo"],
        ["/venv/bin/python3.12", "/venv/bin/yolo", "train", "model=fewshot.yaml", "cfg=stage1.yaml"],
        ["python", "/venv/bin/ultralytics", "val"],
        ["python", "yolo", "predict"],
        [r"C:\venv\Scripts\python.exe", r"C:\venv\Scripts\yolo.exe", "train"],
        [r"C:\venv\Scripts\python.exe", r"C:\venv\Scripts\YOLO.EXE", "train"],
        [r"C:\venv\Scripts\python.exe", r"C:\venv\Scripts\ultralytics.exe"],
        ["python", "-m", "ultralytics.cfg.__init__", "train", "model=fewshot.yaml"],
        ["python", "-X", "utf8", "-m", "ultralytics"],
        ["python", "-m", "ultralytics.cfg"],
        ["python", "-u", "-W", "ignore", "/x/bin/yolo", "train"],
        ["python", "-Wignore", "-Xutf8", "-u", "/x/bin/yolo"],
        ["python", "-W", "yolo", "-I", "-m", "ultralytics.cfg.__init__"],
        ["python", "--check-hash-based-pycs", "always", "/x/bin/yolo"],
    ],
    ids=" ".join,
)
def test_runs_yolo(startup: ModuleType, argv: list[str]):
    assert startup.runs_yolo(argv) is True


@pytest.mark.parametrize(
    "argv",
    [
        [],
        [""],
        ["python"],
        ["yolo"],  # an interpreter of that name
        ["python", "-"],
        ["python", "-i"],
        ["python", "-u"],
        ["python", "-V"],
        ["python", "script.py", "yolo"],
        ["python", "script.py", "-m", "ultralytics"],
        ["python", "-u", "script.py", "/venv/bin/yolo"],
        ["python", "-", "yolo"],
        ["python", "-c", "import ultralytics"],
        ["python", "-c", "yolo"],
        ["python", "-c", "x = 1  # see docs/yolo", "train"],
        ["python", "-c", "pass", "yolo"],
        ["python", "-m", "pytest"],
        ["python", "-m", "pytest", "yolo"],
        ["python", "-m", "pip", "install", "ultralytics"],
        ["python", "-m", "ultralytics_platform"],
        ["python", "-m", "yolo_tools.train"],
        ["python", "-m", "tools.yolo"],
        ["python", "-X", "yolo", "script.py"],
        ["python", "-W", "ultralytics", "-m", "pytest"],
        ["python", "/home/yolo/train.py"],
        ["python", "/home/yolo/"],
        ["python", "yolo.py"],
        ["python", "yolo_tools.py"],
        ["python", "/venv/bin/yolo-export"],
        ["python", "ultralytics/cfg/__init__.py"],
        [r"C:\yolo\python.exe", r"C:\yolo\train.py"],
        ["python", "-m", "torch.distributed.run", "--nproc_per_node", "2", "/home/u/DDP/_temp_1.py"],
        ["python", "-u", "/home/u/.config/Ultralytics/DDP/_temp_1.py"],
        ["python", "-c", "from multiprocessing.spawn import spawn_main; spawn_main()", "--multiprocessing-fork"],
    ],
    ids=" ".join,
)
def test_does_not_run_yolo(startup: ModuleType, argv: list[str]):
    assert startup.runs_yolo(argv) is False


@pytest.fixture
def no_package(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Take our package away; returns the imports of it, each of which fails."""
    tried = []

    class Finder:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name == "yolo_fewshot":
                tried.append(name)
                raise RuntimeError("half-removed package")

    monkeypatch.delitem(sys.modules, "yolo_fewshot")
    monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
    return tried


def test_main_imports_nothing_for_other_programs(
    startup: ModuleType, no_package: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "pytest"])
    startup.main()
    assert no_package == []
    assert capsys.readouterr() == ("", "")


def test_a_failing_import_is_one_line_and_no_error(
    startup: ModuleType, no_package: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr(sys, "orig_argv", ["python", "/venv/bin/yolo", "train"])
    startup.main()
    out, err = capsys.readouterr()
    assert no_package == ["yolo_fewshot"]
    assert out == ""
    assert err == "WARNING: yolo-fewshot could not start and is off: RuntimeError: half-removed package\n"


@pytest.mark.parametrize("argv", [None, [None, None], 5])
def test_main_never_raises(
    startup: ModuleType, argv: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr(sys, "orig_argv", argv)
    startup.main()
    assert capsys.readouterr().err.count("\n") == 1
    monkeypatch.delattr(sys, "orig_argv")
    startup.main()
    assert "AttributeError" in capsys.readouterr().err


def test_running_twice_registers_once(tmp_path: Path):
    """As in a virtual environment, which processes its .pth files twice; the program is a script named yolo."""
    (tmp_path / "yolo").write_text(
        "import sys\n"
        f"sys.path[:0] = [{str(FOLDER)!r}, {str(Path(yolo_fewshot.__file__).parents[1])!r}]\n"
        f"line = open({str(FOLDER / 'yolo_fewshot.pth')!r}).read()\n"
        "exec(line)\n"
        "exec(line)\n"
        "from yolo_fewshot import plugin\n"
        "print(sum(type(f).__module__ == 'yolo_fewshot.plugin' for f in sys.meta_path), len(plugin._undo))\n"
        "print('torch' in sys.modules, 'ultralytics' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, str(tmp_path / "yolo")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["1 1", "False False"]
    assert done.stderr == ""


def test_the_start_up_files_name_the_same_function(startup: ModuleType):
    line = (FOLDER / "yolo_fewshot.pth").read_text().strip()
    assert line == "import yolo_fewshot_startup; yolo_fewshot_startup.main()"
    assert (FOLDER / "yolo_fewshot.start").read_text().strip() == "yolo_fewshot_startup:main"
    assert callable(startup.main)
