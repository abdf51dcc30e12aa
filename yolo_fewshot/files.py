"""Files that are never half-written."""

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
    """A path whose `write_bytes` replaces the file at once, so that a reader sees the old or the new content."""

    def write_bytes(self, data: bytes) -> int:
        """Write to a temporary file beside this one, then rename it.

        Args:
            data (bytes): New content.

        Returns:
            (int): Bytes written.

        Raises:
            OSError: If the disk is full, for instance; the file keeps its old content.
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
    """Save a checkpoint, replacing the file at once.

    Args:
        ckpt (dict): Checkpoint.
        file (str | Path): File to write.

    Raises:
        OSError: As `AtomicPath.write_bytes`.
    """
    buffer = BytesIO()
    torch.save(ckpt, buffer)
    AtomicPath(file).write_bytes(buffer.getvalue())


class StagedPath(type(Path())):
    """A path that goes by the name of a file, also in messages, while it reads and writes a copy, `<name>.new`."""

    def __fspath__(self) -> str:
        """Return the file that is read and written."""
        return f"{self}.new"


@contextlib.contextmanager
def staged(*files: Path) -> Iterator[list[StagedPath]]:
    """Build new versions of files aside, and replace the files when all is done, the last one first.

    A failure, an interruption or a kill leaves the files as they were.

    Args:
        *files (Path): The files; those that do not exist may be made.

    Yields:
        (list[StagedPath]): Paths to read and write instead, which begin as copies.
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
