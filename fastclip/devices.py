"""What devices differ in: whether they have float64, and whether ``data_ptr()`` is an address.

Statistics and decisions are float64. Where a device (Apple's MPS, some of Intel's) has none, they are gathered, and
decided, on the host.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .torch_internals import no_modes, storage_key

ADDRESSED = ("cpu", "cuda", "xpu")  # elsewhere data_ptr() may be a handle, as that of MPS is


def place_of(tensor: Tensor) -> tuple[Any, int]:
    """Where a strided tensor begins: a space of memory, and the byte in it. Spaces of other kinds do not compare."""
    if tensor.device.type in ADDRESSED:
        return (tensor.device.type, tensor.device.index or 0), tensor.data_ptr()
    return (tensor.device.type, storage_key(tensor.untyped_storage())), int(tensor.storage_offset()) * tensor.itemsize


@functools.cache
def has_float64(device: torch.device) -> bool:
    """Whether `device` can hold and compute float64."""
    if device.type in ("cpu", "cuda", "meta"):
        return True
    if device.type == "xpu":
        return bool(torch.xpu.get_device_properties(device).has_fp64)
    if device.type == "mps":
        return False
    try:
        with no_modes():  # a fake device would know any dtype
            torch.ones((), dtype=torch.float64, device=device)
    except (TypeError, RuntimeError, NotImplementedError):
        return False
    return True


def wide_device(device: torch.device) -> torch.device:
    """`device`, or the CPU where that has no float64."""
    return device if has_float64(device) else torch.device("cpu")


def widened(tensor: Tensor, device: torch.device | None = None) -> Tensor:
    """`tensor` in float64, on `device` (or its own) or where that has none on the CPU."""
    device = wide_device(tensor.device if device is None else device)
    if has_float64(tensor.device):
        return tensor.to(device, torch.float64)
    return tensor.to(device).double()
