"""A device that behaves as a GPU towards the CPU, for tests on machines that have none.

Its tensors hold their values on the CPU but say that they are on another device (`meta`, for which PyTorch has all it
needs). Between it and the CPU there are copies alone: an operation that mixes tensors of both is refused, as on a GPU.
What makes the CPU wait for such a device is counted, and dtypes that it does not have are refused.
"""

from __future__ import annotations

from collections import Counter
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")
SIZED = {"nonzero", "masked_select", "_unique", "_unique2", "unique_dim", "unique_consecutive", "bincount"}
READ = {"_local_scalar_dense", "is_nonzero", "equal", "allclose", "item"}


class OnDevice(torch.Tensor):
    """A tensor of the device."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> OnDevice:
        """Wrap a tensor of the CPU."""
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), held.stride(), held.storage_offset(), dtype=held.dtype, device=DEVICE
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Compute outside of a `Device`."""
        return _compute(func, args, kwargs or {}, Counter(), set())

    def __deepcopy__(self, memo: dict) -> OnDevice:
        """Return a copy, a parameter of one."""
        copied = OnDevice(self.held.clone())
        return memo.setdefault(
            id(self), nn.Parameter(copied, self.requires_grad) if isinstance(self, nn.Parameter) else copied
        )

    def __repr__(self) -> str:
        """Return the values."""
        return f"OnDevice({self.held!r})"


class _Literals(TorchFunctionMode):
    """Brings Python numbers to the device and back by way of the CPU, which PyTorch does otherwise for `meta`."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.tolist and isinstance(args[0], OnDevice):
            return args[0].cpu().tolist()
        if func in {torch.Tensor.__getitem__, torch.Tensor.__setitem__} and isinstance(args[0], OnDevice):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            index = tuple(torch.tensor(x).to(DEVICE) if isinstance(x, list) else x for x in index)
            return func(args[0], index, *args[2:])
        if func is torch.Tensor.new_tensor:
            kwargs = {"dtype": args[0].dtype, "device": args[0].device, **kwargs}
            func, args = torch.tensor, args[1:]
        if func in {torch.tensor, torch.as_tensor} and kwargs.get("device") is not None:
            return func(*args, **{**kwargs, "device": None}).to(kwargs["device"])
        return func(*args, **kwargs)


class Device(TorchDispatchMode):
    """Computes for tensors of the device.

    Attributes:
        waits (Counter): By operation, how often the CPU has waited for the device.
        refused (set[torch.dtype]): Dtypes that the device does not have.

    Examples:
        >>> with Device() as device:
        ...     loss(preds, batch)
        >>> device.waits.total()
    """

    def __init__(self, refused: set[torch.dtype] | None = None):
        """Initialize the counter."""
        super().__init__()
        self.waits, self.refused = Counter(), refused or set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Compute one operation."""
        return _compute(func, args, kwargs or {}, self.waits, self.refused)

    def __enter__(self) -> Device:
        """Start, with an autocast that knows the device."""
        autocast = torch.autocast

        class Autocast(autocast):
            def __init__(self, device_type: str, *args: Any, **kwargs: Any):
                super().__init__("cpu" if device_type == DEVICE.type else device_type, *args, **kwargs)

        self.patches = [mock.patch.object(torch, "autocast", Autocast), _Literals()]
        for x in self.patches:
            x.__enter__()
        return super().__enter__()

    def __exit__(self, *args: Any) -> None:
        """Stop."""
        super().__exit__(*args)
        for x in self.patches[::-1]:
            x.__exit__(*args)


def to_device(x: Any) -> Any:
    """Return a module, changed in place, or a nest of tensors, on the device."""
    if not isinstance(x, nn.Module):
        return tree_map(lambda t: t.to(DEVICE) if isinstance(t, torch.Tensor) else t, x)
    for part in x.modules():
        for name, p in part._parameters.items():
            if p is not None:
                part._parameters[name] = nn.Parameter(OnDevice(p.detach()), p.requires_grad)
        for name, b in part._buffers.items():
            if b is not None:
                part._buffers[name] = OnDevice(b)
        for name, t in vars(part).items():
            if isinstance(t, torch.Tensor):  # such as the strides of a head
                setattr(part, name, OnDevice(t))
    return x


def _compute(func: Any, args: tuple, kwargs: dict, waits: Counter, refused: set) -> Any:
    """Return what an operation does, on the device if a tensor of it takes part or is asked for."""
    name = func._schema.name.removeprefix("aten::")
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    away = [x for x in tensors if not isinstance(x, OnDevice)]
    to = None if kwargs.get("device") is None else torch.device(kwargs["device"])
    if len(away) == len(tensors) and to != DEVICE:
        return func(*args, **kwargs)
    home = name in READ or to not in {None, DEVICE} or (name == "copy_" and not isinstance(tensors[0], OnDevice))
    if name in {"_to_copy", "copy_"}:
        if home or (away and away[0].ndim):
            waits["copy to the CPU" if home else "copy to the device"] += 1
    elif name in {"index", "index_put", "index_put_"}:
        indices = [x for x in args[1] if x is not None]
        waits[name] += sum(not isinstance(x, OnDevice) or x.dtype in {torch.bool, torch.uint8} for x in indices)
    elif any(x.ndim for x in away):
        raise RuntimeError(f"{func} of tensors on two devices")
    elif name in SIZED | READ or (func == torch.ops.aten.repeat_interleave.Tensor and not kwargs.get("output_size")):
        waits[name] += 1
    held_args, held = tree_map(lambda x: x.held if isinstance(x, OnDevice) else x, (args, kwargs))
    out = func(*held_args, **({**held, "device": torch.device("cpu")} if "device" in held else held))
    if home:
        return args[0] if name == "copy_" else out
    if bad := {x.dtype for x in tree_leaves(out) if isinstance(x, torch.Tensor)} & refused:
        raise TypeError(f"{func}: the device has no {bad.pop()}")
    out = tree_map(lambda x: OnDevice(x) if isinstance(x, torch.Tensor) else x, out)
    return return_and_correct_aliasing(func, args, kwargs, out)
