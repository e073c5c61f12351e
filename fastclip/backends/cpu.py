"""The `cpu` backend: csrc/cpu/ on all threads."""

from __future__ import annotations

import os

import torch

from . import packers
from .base import AdamWOptions, GradGroup, Measurement, SGDOptions, StepDecision, StepTable
from .on_host import repaired_on_host

name = "cpu"


def why_not(device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"it runs on CPU tensors, not on {device.type}"
    return packers.get().why_not


def _kernels() -> packers.Kernels:
    kernels = packers.get().kernels
    assert kernels is not None
    return kernels


def describe() -> str:
    isa, asked = _kernels().isa(), os.environ.get("FASTCLIP_CPU_ISA")
    wanted = f" (FASTCLIP_CPU_ISA asks for {asked}, which this CPU lacks)" if asked and asked != isa else ""
    return f"{isa}{wanted}, {torch.get_num_threads()} threads, packer {packers.get().name}"


def measure(
    group: GradGroup, norm_type: float, max_norm: float | None = None, before: torch.Tensor | None = None
) -> Measurement:
    assert group.native is not None
    return Measurement(*_kernels().measure(group.native, norm_type, max_norm, before))


def apply_(group: GradGroup, coef: torch.Tensor) -> None:
    assert group.native is not None
    _kernels().apply_(group.native, coef)


def clamp_(group: GradGroup, low: float, high: float) -> torch.Tensor:
    assert group.native is not None
    return torch.tensor(_kernels().clamp_(group.native, low, high), device="cpu")


def repair_(group: GradGroup, measured: Measurement, norm_type: float) -> tuple[Measurement, torch.Tensor]:
    return repaired_on_host(group, measured, lambda: measure(group, norm_type))


def adamw_(table: StepTable, decision: StepDecision, options: AdamWOptions) -> None:
    _kernels().adamw_(
        *(table.native, decision.coef, decision.frozen_mask, float(options.lr), options.beta1, options.beta2),
        *(options.eps, options.weight_decay, options.maximize, decision.zero_grad, decision.seed),
    )
    table.bump_version(decision.zero_grad)


def sgd_(table: StepTable, decision: StepDecision, options: SGDOptions) -> None:
    _kernels().sgd_(
        *(table.native, decision.coef, decision.frozen_mask, float(options.lr), options.momentum),
        *(options.one_minus_dampening, options.weight_decay, options.nesterov, options.maximize),
        *(decision.zero_grad, decision.seed),
    )
    table.bump_version(decision.zero_grad)
