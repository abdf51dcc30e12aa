import os
from pathlib import Path

import pytest

from yolo_fewshot.files import AtomicPath, restored_on_failure


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


def test_files_rewritten_in_place_come_back_after_a_failure(tmp_path):
    a, b = tmp_path / "a.pt", tmp_path / "b.pt"
    a.write_bytes(b"good")
    with pytest.raises(KeyboardInterrupt), restored_on_failure(a, b):
        assert Path(f"{a}.bak").read_bytes() == b"good"  # readable even if the process is killed here
        a.write_bytes(b"ha")
        raise KeyboardInterrupt
    assert a.read_bytes() == b"good" and os.listdir(tmp_path) == ["a.pt"]


def test_success_keeps_the_new_content_and_no_copy(tmp_path):
    a = tmp_path / "a.pt"
    a.write_bytes(b"old")
    with restored_on_failure(a):
        a.write_bytes(b"new")
    assert a.read_bytes() == b"new" and os.listdir(tmp_path) == ["a.pt"]
