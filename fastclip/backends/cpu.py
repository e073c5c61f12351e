"""The `cpu` backend: csrc/cpu.cpp on all threads."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch

from . import Measurement, native, repaired_on_host

if TYPE_CHECKING:
    from ..table import Group, StepTable

name = "cpu"


def why_not(device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"it runs on CPU tensors, not on {device.type}"
    return None if native.cpp.load() is not None else native.cpp.failure()


def describe() -> str:
    isa, asked = native.cpp.load().isa(), os.environ.get("FASTCLIP_CPU_ISA")
    wanted = f" (FASTCLIP_CPU_ISA asks for {asked}, which this CPU lacks)" if asked and asked != isa else ""
    return f"{isa}{wanted}, {torch.get_num_threads()} threads"


def measure(
    group: Group, norm_type: float, max_norm: float | None = None, before: torch.Tensor | None = None
) -> Measurement:
    return Measurement(*native.cpp.load().measure(group.native, norm_type, max_norm, before))


def apply_(group: Group, coef: torch.Tensor) -> None:
    native.cpp.load().apply_(group.native, coef)


def clamp_(group: Group, low: float, high: float) -> torch.Tensor:
    return torch.tensor(native.cpp.load().clamp_(group.native, low, high), device="cpu")


def repair_(group: Group, measured: Measurement, norm_type: float) -> tuple[Measurement, torch.Tensor]:
    return repaired_on_host(group, measured, lambda: measure(group, norm_type))


def adamw_(
    table: StepTable,
    coef: torch.Tensor,
    idle: torch.Tensor | None,
    group: dict[str, Any],
    zero_grad: bool,
    seed: int | None,
) -> None:
    native.cpp.load().adamw_(
        *(table.native, coef, idle, float(group["lr"]), *map(float, group["betas"]), group["eps"]),
        *(group["weight_decay"], group["maximize"], zero_grad, seed),
    )
    table.bump_version(zero_grad)


def sgd_(
    table: StepTable,
    coef: torch.Tensor,
    idle: torch.Tensor | None,
    group: dict[str, Any],
    zero_grad: bool,
    seed: int | None,
    rest: float,
) -> None:
    native.cpp.load().sgd_(
        *(table.native, coef, idle, float(group["lr"]), group["momentum"], rest, group["weight_decay"]),
        *(group["nesterov"], group["maximize"], zero_grad, seed),
    )
    table.bump_version(zero_grad)
