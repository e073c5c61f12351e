"""The `foreach` backend: torch's own operations, for any device that no kernel runs on, at about torch's speed.

A norm is taken by rows of ROW elements, then by rows of these rows' norms, so that float32 keeps six digits of it
whatever the size. A tensor whose squares overflow or vanish in float32 is read once more, in float64. bfloat16 and
float16 are widened slice by slice, since torch would round their norms to 16 bits. GPUs accumulate in float64.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

from .. import packers
from ..devices import has_float64, wide_device
from ..modes import is_watched
from ..packers import MeasureGradients, NativeGroup
from ..packers.cpu_kernels import scalar
from ..packers.groups import Group
from ..packers.python import number
from .base import GradGroup, Measurement
from .on_host import flat, magnitudes, repaired_on_host, slices, writing
from .transfer import upload

name = "foreach"

ROW = 128  # elements; in vectors of 4 lanes float32 rounds each sum ROW / 4 times
SMALL = 1 << 14  # elements; smaller tensors are measured together
SLICE = 1 << 20  # elements that are widened at a time
GPUS = ("cuda", "xpu")
UNDERFLOW = 1e-31  # a power sum below this for each element may lack what float32 cannot hold


def why_not(device: torch.device) -> str | None:
    return None


def describe() -> str:
    return "torch's own operations"


def measure(
    group: GradGroup, norm_type: float, max_norm: float | None = None, before: Tensor | None = None
) -> Measurement:
    tensors, p = group.tensors, norm_type
    if group.device.type in GPUS and has_float64(group.device):
        return _measured_on_gpu(tensors, p)
    absmax = _gathered([_absmax(tensor) for tensor in tensors])
    if math.isinf(p):
        return Measurement(torch.zeros_like(absmax), absmax)
    if p not in (1, 2):
        return Measurement(_gathered([magnitudes(tensor, p)[0] for tensor in tensors]), absmax)
    power = _gathered(_norms(tensors, p)).pow(p)
    doubtful = ~power.isfinite() | ((power < UNDERFLOW * group.numels().to(power.device)) & (absmax != 0))
    for i in doubtful.nonzero().flatten().tolist():
        power[i] = magnitudes(tensors[i], p)[0]
    return Measurement(power, absmax)


def clip(groups: list[Group], p: float, max_norm: float, write: bool, refuse_nonfinite: bool) -> float | None:
    """The p-norm of all gradients of some groups, clipped to `max_norm` if they are to be written; None if refused.

    As ``fastclip_cpu_clip`` in csrc/cpu/launch.h. Each tensor's own norm and largest magnitude are not asked for, so
    one read is enough, and small tensors are read as one.
    """
    with torch.no_grad():
        norm = _norm_of_all([gradient for group in groups for gradient in group.gradients], p)
    if refuse_nonfinite and not math.isfinite(norm):
        return None
    if write and (coef := _coefficient(norm, max_norm)) != 1:
        for group in groups:
            _multiply(group.gradients, coef)
    return norm


measure_gradients: MeasureGradients | None = None  # see FusedClip


def clip_norm_fused(
    items: list[Any], of_parameters: bool, max_norm: Any, norm_type: Any, error_if_nonfinite: bool, per_tensor: bool, /
) -> Tensor | list[NativeGroup] | None:
    """As :class:`fastclip.packers.FusedClip`, where no packer has kernels for the CPU."""
    limit, p = (number(max_norm) if of_parameters else 0.0), number(norm_type)
    if not (limit >= 0 and p > 0) or is_watched():
        return None
    groups = packers.get().packer.pack(items, of_parameters)
    if not groups or per_tensor or any(group.device.type in GPUS for group in groups):
        return groups
    norm = clip(cast("list[Group]", groups), p, limit, of_parameters, bool(error_if_nonfinite))
    if norm is None:
        return groups
    wide = any(group.dtype == torch.float64 for group in groups) and has_float64(groups[0].device)
    returned = scalar(norm, torch.float64 if wide else torch.float32)
    return returned if groups[0].device.type == "cpu" else returned.to(groups[0].device)


def apply_(group: GradGroup, coef: Tensor) -> None:
    compute = torch.promote_types(group.dtype, torch.float32)
    by_coef: dict[str, tuple[float, list[Tensor]]] = {}
    for tensor, c in zip(group.tensors, coef.to(compute).expand(len(group)).tolist()):
        by_coef.setdefault(c.hex() if c == c else "nan", (c, []))[1].append(tensor)  # -0.0 is not 0.0
    for c, tensors in by_coef.values():
        if c != 1:
            _multiply(tensors, c)


def repair_(group: GradGroup, measured: Measurement, norm_type: float) -> tuple[Measurement, Tensor]:
    return repaired_on_host(group, measured, lambda: measure(group, norm_type))


def clamp_(group: GradGroup, low: float, high: float) -> Tensor:
    low, high = torch.tensor([low, high], dtype=torch.promote_types(group.dtype, torch.float32), device="cpu").tolist()
    changed = False
    for tensor in group.tensors:
        if tensor.numel() and _outside(tensor, low, high):
            changed = True
            with writing(tensor):
                tensor.clamp_(low, high)
    return torch.tensor(changed, device=group.device)


def _outside(tensor: Tensor, low: float, high: float) -> bool:
    """Whether any element is."""
    least, largest = (x.item() for x in torch.aminmax(tensor))
    if not math.isnan(least):
        return least < low or largest > high
    return any(bool(((piece < low) | (piece > high)).any()) for piece in slices(tensor))


def _multiply(tensors: list[Tensor], coef: float) -> None:
    """Multiply by a float32, or a float64 if they are: +0 writes zeros, whatever there was."""
    compute = torch.promote_types(tensors[0].dtype, torch.float32)
    factor = torch.tensor(coef, dtype=compute, device="cpu")  # on a GPU it would be rounded to the gradients' dtype
    for inference in (False, True):  # each where autograd lets it be changed
        alike = [tensor for tensor in tensors if tensor.is_inference() == inference]
        if not alike:
            continue
        with writing(alike[0]):
            if coef == 0 and math.copysign(1, coef) > 0:
                torch._foreach_zero_(alike)
            else:
                torch._foreach_mul_(alike, factor)


def _coefficient(norm: float, limit: float) -> float:
    """clip_coefficient in csrc/elementwise.h."""
    if math.isinf(limit):
        return 1.0
    if math.isinf(norm):
        return -0.0
    coef = limit / (norm + 1e-6)
    return 1.0 if coef >= 1 else coef


# ---- measuring ----


def _measured_on_gpu(tensors: list[Tensor], p: float) -> Measurement:
    """By one launch of torch's for each norm, without waiting for the device."""
    full = [i for i, tensor in enumerate(tensors) if tensor.numel()]  # torch knows no largest element of none
    if len(full) < len(tensors):
        nothing = torch.zeros(len(tensors), dtype=torch.float64, device=tensors[0].device)
        if not full:
            return Measurement(nothing, nothing)
        found, index = _measured_on_gpu([tensors[i] for i in full], p), upload(full, torch.int64, nothing.device)
        return Measurement(*(nothing.index_copy(0, index, x) for x in (found.power, found.absmax)))
    absmax = torch.stack(torch._foreach_norm(tensors, math.inf)).double()
    if math.isinf(p):
        return Measurement(torch.zeros_like(absmax), absmax)
    norms = torch.stack(torch._foreach_norm(tensors, p, dtype=torch.float64))
    return Measurement(norms.pow(p) if p else norms, absmax)


def _norm_of_all(tensors: list[Tensor], p: float) -> float:
    """The p-norm of all tensors, 0 < p <= inf, as one vector."""
    if p not in (1, 2, math.inf):
        return float(_gathered([magnitudes(tensor, p)[0] for tensor in tensors]).sum().pow(1 / p))
    by_kind: dict[Any, list[Tensor]] = {}
    pieces = []
    for tensor in tensors:
        if tensor.numel() > SMALL:
            pieces.append(tensor)
        else:
            by_kind.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    for small in by_kind.values():
        pieces += _concatenated(small)
    if math.isinf(p):
        numbers = _numbers([_absmax(piece) for piece in pieces])
        return max(numbers, key=lambda x: (math.isnan(x), x))
    numbers = _numbers(_norms(pieces, p))
    power = sum(x * x for x in numbers) if p == 2 else sum(numbers)
    exact = UNDERFLOW * sum(piece.numel() for piece in pieces) <= power < math.inf
    if exact or (power == 0 and not any(_numbers([_absmax(piece) for piece in pieces]))):
        return math.sqrt(power) if p == 2 else power
    return float(_gathered([magnitudes(piece, p)[0] for piece in pieces]).sum().pow(1 / p))


def _concatenated(small: list[Tensor]) -> list[Tensor]:
    """Tensors of one device and dtype as a few of at most some SLICE elements, which bounds the memory."""
    pieces: list[Tensor] = []
    batch: list[Tensor] = []
    held = 0
    for tensor in small:
        batch.append(tensor if tensor.dim() == 1 else flat(tensor))
        held += len(batch[-1])
        if held >= SLICE:
            pieces.append(torch.cat(batch))
            batch, held = [], 0
    if batch:
        pieces.append(batch[0] if len(batch) == 1 else torch.cat(batch))
    return pieces


def _numbers(tensors: list[Tensor]) -> list[float]:
    """Of one device and dtype, as most are, by one copy."""
    if len(tensors) == 1:
        return [tensors[0].item()]
    return _gathered(tensors).tolist()


def _norms(tensors: list[Tensor], p: float) -> list[Tensor]:
    """[] each, the 1- or 2-norms, float32 or float64."""
    buffers: dict[Any, Tensor] = {}
    return [_norm(tensor, p, buffers) for tensor in tensors]


def _norm(tensor: Tensor, p: float, buffers: dict[Any, Tensor]) -> Tensor:
    """`buffers`: kept from tensor to tensor, since fresh memory costs as much as what is done in it."""
    elements = flat(tensor)
    if p == 2 and tensor.itemsize > 2:
        return _by_rows(elements)
    wide = torch.promote_types(tensor.dtype, torch.float32)
    needed = min(SLICE, len(elements))
    buffer = buffers.get((tensor.device, wide))
    if buffer is None or len(buffer) < needed:
        buffer = buffers[tensor.device, wide] = torch.empty(needed, dtype=wide, device=tensor.device)
    parts = []
    for piece in torch.split(elements, SLICE) if len(elements) else ():
        held = buffer[: len(piece)].copy_(piece)
        parts.append(_by_rows(held) if p == 2 else held.abs_().sum())  # torch's sum goes pairwise
    if not parts:
        return torch.zeros((), dtype=wide, device=tensor.device)
    if len(parts) == 1:
        return parts[0]
    return _by_rows(torch.stack(parts)) if p == 2 else torch.stack(parts).sum()


def _by_rows(elements: Tensor) -> Tensor:
    """[] the 2-norm of [n]: of the rows' norms, of their rows' norms, and so on."""
    while len(elements) > ROW:
        rows, rest = divmod(len(elements), ROW)
        norms = torch.linalg.vector_norm(elements[: rows * ROW].view(rows, ROW), dim=1)
        if rest:
            norms = torch.cat([norms, torch.linalg.vector_norm(elements[rows * ROW :]).view(1)])
        elements = norms
    return torch.linalg.vector_norm(elements)


def _absmax(tensor: Tensor) -> Tensor:
    """[] max |x|, NaN if there is one."""
    if not tensor.numel():
        return tensor.new_zeros(())
    least, largest = torch.aminmax(tensor)
    return torch.maximum(least.abs(), largest.abs())


def _gathered(numbers: list[Tensor]) -> Tensor:
    """Numbers of several devices as float64, [T] where statistics are gathered: see :func:`wide_device`."""
    device = wide_device(numbers[0].device)
    if len({(x.device, x.dtype) for x in numbers}) == 1:
        return torch.stack(numbers).to(device).double()
    return torch.stack([x.to(device).double() for x in numbers])
