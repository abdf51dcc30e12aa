import logging
import os
from pathlib import Path

import pytest
import torch
from ultralytics.utils.torch_utils import strip_optimizer

from yolo_fewshot.files import AtomicPath, staged


def test_writing_replaces_the_content(tmp_path):
    file = AtomicPath(tmp_path) / "last.pt"
    assert isinstance(file, AtomicPath)
    assert file.write_bytes(b"one") == 3 and file.read_bytes() == b"one"
    file.write_bytes(b"two")
    assert file.read_bytes() == b"two" and os.listdir(tmp_path) == ["last.pt"]


@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_write_keeps_the_old_content(tmp_path, monkeypatch, error):
    file = AtomicPath(tmp_path / "last.pt")
    file.write_bytes(b"good")

    def fail(*_):
        raise error

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(type(error)):
        file.write_bytes(b"half")
    assert file.read_bytes() == b"good" and os.listdir(tmp_path) == ["last.pt"]


def test_staged_files_replace_the_old_ones_when_all_is_done(tmp_path):
    a, b, c = (tmp_path / x for x in ("a.pt", "b.pt", "c.pt"))
    torch.save({"x": 1}, a)
    torch.save({"x": 2}, b)
    with staged(a, b, c) as (new_a, new_b, new_c):
        assert str(new_a) == str(a) and new_a.name == "a.pt"  # what messages say
        assert torch.load(new_a) == {"x": 1} and new_b.exists() and not new_c.exists()
        torch.save({"x": 10}, new_a)
        new_c.write_bytes(b"new")
        assert torch.load(a) == {"x": 1} and torch.load(new_a) == {"x": 10} and not c.exists()
    assert torch.load(a) == {"x": 10} and torch.load(b) == {"x": 2} and c.read_bytes() == b"new"
    assert sorted(os.listdir(tmp_path)) == ["a.pt", "b.pt", "c.pt"]


@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()])
def test_staged_files_that_fail_leave_the_old_ones(tmp_path, error):
    a, b = tmp_path / "a.pt", tmp_path / "b.pt"
    a.write_bytes(b"good")
    with pytest.raises(type(error)), staged(a, b) as (new_a, new_b):
        new_a.write_bytes(b"ha")
        new_b.write_bytes(b"half")
        raise error
    assert a.read_bytes() == b"good" and os.listdir(tmp_path) == ["a.pt"]


def test_the_first_staged_file_is_replaced_last(tmp_path, monkeypatch):
    """It is the one to resume from, so that what is left undone is done again."""
    files = [tmp_path / x for x in ("last.pt", "best.pt")]
    for f in files:
        f.write_bytes(b"old")
    replaced, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda x, y: (replaced.append(Path(y).name), replace(x, y)))
    with staged(*files):
        pass
    assert replaced == ["best.pt", "last.pt"]


def test_ultralytics_strips_a_staged_file_by_its_own_name(tmp_path, caplog):
    file = tmp_path / "a.pt"
    torch.save({"model": torch.nn.Linear(1, 1), "ema": None, "epoch": 7}, file)
    logging.getLogger("ultralytics").addHandler(caplog.handler)
    try:
        with staged(file) as (new,):
            strip_optimizer(new)
            assert torch.load(file, weights_only=False)["epoch"] == 7
    finally:
        logging.getLogger("ultralytics").removeHandler(caplog.handler)
    assert torch.load(file, weights_only=False)["epoch"] == -1 and os.listdir(tmp_path) == ["a.pt"]
    assert f"Optimizer stripped from {file}," in caplog.text
