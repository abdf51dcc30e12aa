"""Files: atomic writes, and copies."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import nn


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
        target = Path(os.path.realpath(self))  # a link stays one
        if not target.parent.is_dir():
            raise FileNotFoundError(f"{self} cannot be written, since its folder does not exist.")
        part = Path(f"{target}.part")
        try:
            with open(part, "wb") as f:
                n = f.write(data)
                f.flush()
                os.fsync(f.fileno())
            with suppress(OSError):  # a new file, or a file system without permissions
                shutil.copymode(target, part)
            os.replace(part, target)
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


def restore_exact(rounded: nn.Module, exact: nn.Module) -> None:
    """Give the half-precision copy of a network its exact weights, in float32 where half precision has rounded.

    The weights of a half-precision checkpoint stay half, so that a file grows only by what was learned since.

    Args:
        rounded (nn.Module): The copy, changed in place.
        exact (nn.Module): The network.
    """
    state = exact.state_dict()
    lost = {k for k, v in rounded.state_dict().items() if not torch.equal(v.to(state[k]), state[k])}
    for name, module in rounded.named_modules():
        own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        if any(f"{name}.{k}".lstrip(".") in lost for k, _ in own):
            module.float()
    rounded.load_state_dict(state)


def sha256(file: Path) -> str:
    """Return the SHA-256 of a file.

    Args:
        file (Path): File.

    Returns:
        (str): 64 hexadecimal digits.
    """
    return hashlib.sha256(file.read_bytes()).hexdigest()


def among(files: Iterable[str], others: Iterable[str]) -> list[str]:
    """Return the files that are among others, as the same file or as a copy; those that do not exist are left out.

    Args:
        files (Iterable[str]): Files.
        others (Iterable[str]): Other files. Only files of a size that both have are read.

    Returns:
        (list[str]): The files.
    """
    places = {x: os.path.realpath(x) for x in files if os.path.isfile(x)}  # several may be links to the same file
    known = {os.path.realpath(x) for x in others if os.path.isfile(x)}
    size = {x: os.path.getsize(x) for x in {*places.values(), *known}}
    shared = {size[x] for x in known} & {size[x] for x in places.values() if x not in known}
    digest = {x: sha256(Path(x)) for x in size if size[x] in shared}
    copies = {digest.get(x) for x in known} - {None}
    return [file for file, place in places.items() if place in known or digest.get(place) in copies]
