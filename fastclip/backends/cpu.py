"""The `cpu` backend: csrc/cpu.cpp on all threads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from . import Measurement, native

if TYPE_CHECKING:
    from ..table import Group

name = "cpu"


def why_not(device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"it runs on CPU tensors, not on {device.type}"
    return None if native.load() is not None else native.failure()


def describe() -> str:
    return f"{native.load().isa()}, {torch.get_num_threads()} threads"


def measure(group: Group, norm_type: float, max_norm: float | None = None) -> Measurement:
    return Measurement(*native.load().measure(group.native, norm_type, max_norm))


def apply_(group: Group, coef: torch.Tensor) -> None:
    native.load().apply_(group.native, coef)


def clamp_(group: Group, low: float, high: float) -> torch.Tensor:
    return torch.tensor(native.load().clamp_(group.native, low, high), device="cpu")
