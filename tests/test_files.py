import os
from pathlib import Path

import pytest

from yolo_fewshot.files import AtomicPath, among


def test_writing_replaces_the_content(tmp_path):
    file = AtomicPath(tmp_path) / "last.pt"
    assert isinstance(file, AtomicPath)
    assert file.write_bytes(b"one") == 3 and file.read_bytes() == b"one"
    file.write_bytes(b"two")
    assert file.read_bytes() == b"two" and os.listdir(tmp_path) == ["last.pt"]


def test_a_folder_that_is_missing_is_named_without_the_temporary_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing.x\.pt cannot be written, since its folder does not exist\.$"):
        AtomicPath(tmp_path / "missing/x.pt").write_bytes(b"")


def test_files_among_others_are_the_same_ones_and_copies_and_only_equal_sizes_are_read(tmp_path, monkeypatch):
    for name, content in {"a": b"one", "b": b"two", "copy": b"one", "long": b"three", "same": b"two"}.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "link").symlink_to(tmp_path / "long")
    files, opened, read = [str(tmp_path / x) for x in ("copy", "same", "link", "none")], [], Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: opened.append(self.name) or read(self))
    assert among(files, [str(tmp_path / x) for x in ("a", "long")]) == [files[0], files[2]]
    assert sorted(opened) == ["a", "copy", "same"]


def test_links_to_the_same_file_are_all_among_others(tmp_path):
    for name in "ab":
        (tmp_path / name).write_bytes(name.encode())
    files = [str(tmp_path / x) for x in ("a", "link", "b")]
    os.symlink(files[0], files[1])
    assert among(files, files[:1]) == files[:2] == among(files, files[1:2])


def test_a_link_stays_one_and_a_file_keeps_its_permissions(tmp_path):
    (tmp_path / "site").mkdir()
    file = tmp_path / "site/v1.pt"
    file.write_bytes(b"one")
    file.chmod(0o640)
    (tmp_path / "current.pt").symlink_to(file)
    AtomicPath(tmp_path / "current.pt").write_bytes(b"two")
    assert (tmp_path / "current.pt").is_symlink() and file.read_bytes() == b"two"
    assert file.stat().st_mode & 0o777 == 0o640 and os.listdir(tmp_path / "site") == ["v1.pt"]


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
