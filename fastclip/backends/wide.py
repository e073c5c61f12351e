"""Where float64 is to be had: statistics and decisions are float64, which some devices (Apple's MPS, some of Intel's) lack.
There they are gathered, and decided, on the host."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


@functools.cache
def has_float64(device: torch.device) -> bool:
    """Whether `device` can hold and compute float64."""
    if device.type in ("cpu", "cuda", "meta"):
        return True
    if device.type == "xpu":
        return bool(torch.xpu.get_device_properties(device).has_fp64)
    try:
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
