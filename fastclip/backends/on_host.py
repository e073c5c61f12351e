"""Plain torch on the memory of a gradient, slice by slice: for what no kernel does."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

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


@contextlib.contextmanager
def writing(tensor: Tensor) -> Iterator[None]:
    """Where autograd lets `tensor` be changed in place: one made in inference mode only there."""
    with torch.inference_mode() if tensor.is_inference() else torch.no_grad():
        yield


def repaired_on_host(
    group: GradGroup, measured: Measurement, measure: Callable[[], Measurement]
) -> tuple[Measurement, Tensor]:
    """``repair_`` where the host may know what was measured: on a CPU."""
    counts = torch.zeros(len(group), dtype=torch.int64, device=group.device)
    for i in (~measured.absmax.isfinite()).nonzero().flatten().tolist():
        with writing(group.tensors[i]):
            for piece in slices(group.tensors[i]):
                broken = ~piece.isfinite()
                counts[i] += broken.sum()
                piece.masked_fill_(broken, 0)
    return measure() if counts.any() else measured, counts
