"""Atomic writes: a file has its old or its new content, never a part."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import torch


class AtomicPath(type(Path())):
    """A path whose `write_bytes` is atomic: a reader sees the old or the new content."""

    def write_bytes(self, data: bytes) -> int:
        """Write to a temporary file in the same folder, then rename it.

        Args:
            data (bytes): New content.

        Returns:
            (int): Number of bytes written.

        Raises:
            OSError: If writing fails, as on a full disk; the file keeps its old content.
        """
        part = Path(f"{self}.part")
        try:
            with open(part, "wb") as f:
                n = f.write(data)
                f.flush()
                os.fsync(f.fileno())
            os.replace(part, self)
        finally:
            part.unlink(missing_ok=True)
        return n


def save_checkpoint(ckpt: dict[str, Any], file: str | Path) -> None:
    """Save a checkpoint atomically.

    Args:
        ckpt (dict): Checkpoint.
        file (str | Path): File to write.

    Raises:
        OSError: If writing fails; the file keeps its old content.
    """
    buffer = BytesIO()
    torch.save(ckpt, buffer)
    AtomicPath(file).write_bytes(buffer.getvalue())


class StagedPath(type(Path())):
    """A path that has the name of a file, also in messages, but reads and writes a copy, `<name>.new`."""

    def __fspath__(self) -> str:
        """Return the path of the copy."""
        return f"{self}.new"


@contextlib.contextmanager
def staged(*files: Path) -> Iterator[list[StagedPath]]:
    """Write new versions of files to copies, and replace the files at the end, the last one first.

    After a failure, an interruption or a kill the files are unchanged.

    Args:
        *files (Path): The files; missing files may be created.

    Yields:
        (list[StagedPath]): Paths to read and write instead, copies of the files at first.
    """
    new = [StagedPath(f) for f in files]
    try:
        for f, n in zip(files, new):
            if f.exists():
                shutil.copy2(f, n)
        yield new
        for f, n in reversed(list(zip(files, new))):
            if n.exists():
                os.replace(n, f)
    finally:
        for n in new:
            n.unlink(missing_ok=True)
