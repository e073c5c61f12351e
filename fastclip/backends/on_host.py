"""Plain torch on the memory of a gradient, slice by slice: for what no kernel does."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..devices import has_float64, wide_device, widened
from .base import GradGroup, Measurement

SLICE = 1 << 20  # elements that plain torch works on at a time, so that memory stays bounded


def slices(tensor: Tensor) -> Iterator[Tensor]:
    """Views of at most SLICE elements, which together are `tensor`."""
    if tensor.numel() > SLICE:
        widest = max(range(tensor.dim()), key=tensor.size)
        for half in tensor.chunk(2, widest):
            yield from slices(half)
    elif tensor.numel() > 0:
        yield tensor


def flat(tensor: Tensor) -> Tensor:
    """The elements of a dense tensor as one dimension, in the order of its memory."""
    return tensor.view(-1) if tensor.is_contiguous() else tensor.as_strided((tensor.numel(),), (1,))


def magnitudes(tensor: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """sum |x|^p (0 for p = inf) and max |x|, [] float64; both NaN if an element is.

    Slice by slice in float64. A device that has none divides by the largest magnitude first, so that no power of a
    quotient overflows in float32, and the host multiplies by that magnitude's power.
    """
    device = wide_device(tensor.device)
    power = torch.zeros((), dtype=torch.float64, device=device)
    largest = torch.zeros((), dtype=torch.float64, device=device)
    for piece in slices(tensor):
        if has_float64(tensor.device):
            magnitude = piece.to(torch.complex128 if piece.is_complex() else torch.float64).abs()
            most, factor = magnitude.max(), None
        else:
            magnitude = piece.to(torch.promote_types(piece.dtype, torch.float32)).abs()
            most = magnitude.max().to(device).double()
            factor = most.clamp(min=2.0**-126) if 0 < most < math.inf else None  # whose reciprocal is no inf
            magnitude = magnitude if factor is None else magnitude / factor.item()
        largest = torch.maximum(largest, most)
        if p == 0:
            power += widened((magnitude != 0).sum(), device)
        elif not math.isinf(p):
            part = widened(magnitude.pow(p).sum(), device)
            power += part if factor is None else part * factor**p
    return power, largest


@contextlib.contextmanager
def writing(tensor: Tensor) -> Iterator[None]:
    """Where autograd lets `tensor` be changed in place: one made in inference mode only there."""
    with torch.inference_mode() if tensor.is_inference() else torch.no_grad():
        yield


def repaired_on_host(
    group: GradGroup, measured: Measurement, measure: Callable[[], Measurement]
) -> tuple[Measurement, Tensor]:
    """``repair_`` where the host may know what was measured: on a CPU."""
    counts = torch.zeros(len(group), dtype=torch.int64, device=measured.absmax.device)
    for i in (~measured.absmax.isfinite()).nonzero().flatten().tolist():
        with writing(group.tensors[i]):
            for piece in slices(group.tensors[i]):
                broken = ~piece.isfinite()
                counts[i] += broken.sum().to(counts.device)
                piece.masked_fill_(broken, 0)
    return measure() if counts.any() else measured, counts
