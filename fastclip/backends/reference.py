"""The `reference` backend: plain torch, slice by slice in float64. The oracle of the tests, and what runs where nothing
better does: strided views with gaps, sparse values, complex numbers, any device torch knows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .base import GradGroup, Measurement
from .devices import has_float64
from .on_host import magnitudes, repaired_on_host, slices, writing

name = "reference"


def why_not(device: torch.device) -> str | None:
    return None


def describe() -> str:
    return "plain torch"


def measure(
    group: GradGroup, norm_type: float, max_norm: float | None = None, before: Tensor | None = None
) -> Measurement:
    powers, maxima = zip(*(magnitudes(tensor, norm_type) for tensor in group.tensors))
    return Measurement(torch.stack(powers), torch.stack(maxima))


def apply_(group: GradGroup, coef: Tensor) -> None:
    coefs = coef.to(_compute_dtype(group.dtype).to_real()).expand(len(group)).tolist()
    for tensor, c in zip(group.tensors, coefs):
        if c == 1:
            continue
        with writing(tensor):
            if c == 0 and math.copysign(1, c) > 0:
                tensor.zero_()
                continue
            for piece in slices(tensor):
                piece.copy_(piece.to(_compute_dtype(piece.dtype)) * c)


def repair_(group: GradGroup, measured: Measurement, norm_type: float) -> tuple[Measurement, Tensor]:
    return repaired_on_host(group, measured, lambda: measure(group, norm_type))


def clamp_(group: GradGroup, low: float, high: float) -> Tensor:
    changed = False
    low, high = torch.tensor([low, high], dtype=_compute_dtype(group.dtype).to_real(), device="cpu").tolist()
    for tensor in group.tensors:
        with writing(tensor):
            for piece in slices(tensor):
                wide = _accurate(piece)
                if not ((wide.abs() > high) if piece.is_complex() else (wide < low) | (wide > high)).any():
                    continue
                changed = True
                if piece.is_complex():
                    piece.copy_(_shrunk(wide, high))
                else:
                    piece.clamp_(low, high)
    return torch.tensor(changed, device=group.device)


def _shrunk(z: Tensor, limit: float) -> Tensor:
    """z * limit / |z| where |z| > limit; an infinite part outweighs a finite one."""
    parts = torch.view_as_real(z)
    infinite = parts.isinf()
    parts = torch.where(infinite.any(-1, keepdim=True), infinite * parts.sign(), parts)
    finite = torch.view_as_complex(torch.where(parts.isnan() & infinite.any(-1, keepdim=True), 0.0, parts))
    return torch.where(z.abs() > limit, finite * (limit / finite.abs()), z)


def _accurate(piece: Tensor) -> Tensor:
    if not has_float64(piece.device):
        return piece.to(_compute_dtype(piece.dtype))
    return piece.to(torch.complex128 if piece.is_complex() else torch.float64)


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    if dtype.is_complex:
        return torch.promote_types(dtype, torch.complex64)
    return torch.promote_types(dtype, torch.float32)
