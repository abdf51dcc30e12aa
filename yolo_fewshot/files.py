"""Atomic file writes."""

from __future__ import annotations

import os
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
