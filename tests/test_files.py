import os

import pytest

from yolo_fewshot.files import AtomicPath


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
