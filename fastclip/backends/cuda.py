"""The `cuda` backend: csrc/cuda/, for GPUs where Triton is not to be had.

The addresses of up to some 2,700 gradients, or of all that belongs to some 500 parameters, travel in the kernels'
parameters, so a call uploads nothing; those of more are kept on the device and uploaded when they change.
"""

from __future__ import annotations

import ctypes
import functools
import math
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..native import cuda_interface, libraries
from ..native.cpu_interface import DTYPES
from .base import AdamWOptions, GradGroup, Measurement, SGDOptions, StepDecision, StepTable
from .transfer import UploadCache, capturing, upload

name = "cuda"

DEVICE = "cuda"  # the emulation that the tests use runs on "cpu"


def why_not(device: torch.device) -> str | None:
    if device.type != DEVICE:
        return f"it runs on NVIDIA GPUs, not on {device.type}"
    if torch.version.hip:
        return "it runs on NVIDIA GPUs, and this torch is for AMD's"
    if libraries.cuda.load() is None:
        return libraries.cuda.failure()
    return _no_kernels(device.index or 0)


@functools.cache
def _no_kernels(index: int) -> str | None:
    """Why the kernels do not run on a GPU: compiled for another one, or for a newer driver."""
    try:
        _check("fastclip_cuda_probe", index)
    except RuntimeError as error:
        return f"its kernels do not run there ({error})"
    return None


def describe() -> str:
    if libraries.cuda.is_prebuilt():
        return f"prebuilt ({libraries.cuda.file})"
    return f"nvcc for sm_{', sm_'.join(libraries.architectures())}"


def measure(
    group: GradGroup, norm_type: float, max_norm: float | None = None, before: Tensor | None = None
) -> Measurement:
    return _measure(group, norm_type, max_norm, before, None)


def _measure(
    group: GradGroup, norm_type: float, max_norm: float | None, before: Tensor | None, repaired: Measurement | None
) -> Measurement:
    """measure(); of tensors that were finite in `repaired`, with the results that stand there."""
    count = len(group)
    _table(group)  # before the workspace: in a CUDA graph neither may be given the other's memory
    workspace = _workspace(group.device)
    result = torch.empty(2 * count + 4, dtype=torch.float64, device=group.device)
    limit = math.inf if max_norm is None else max_norm
    earlier = (None, None) if repaired is None else (repaired.power, repaired.absmax)
    pointers = map(_pointer, (before, *earlier, workspace, result))
    _call("measure", group, cuda_interface.MeasureOptions(norm_type, limit, *pointers))
    all_of_them = result[2 * count :]  # total [2], norm, coefficient
    coef = None if max_norm is None else all_of_them[3]
    return Measurement(result[:count], result[count : 2 * count], all_of_them[2], coef, all_of_them[:2])


def apply_(group: GradGroup, coef: Tensor) -> None:
    _call("apply", group, _pointer(coef), coef.dim())
    group.bump_version()


def clamp_(group: GradGroup, low: float, high: float) -> Tensor:
    clamped = torch.zeros((), dtype=torch.bool, device=group.device)
    _call("clamp", group, low, high, _pointer(clamped))
    group.bump_version()
    return clamped


def repair_(group: GradGroup, measured: Measurement, norm_type: float) -> tuple[Measurement, Tensor]:
    earlier = measured._replace(power=measured.power.contiguous(), absmax=measured.absmax.contiguous())
    counts = torch.zeros(len(group), dtype=torch.int64, device=group.device)
    _call("repair", group, _pointer(earlier.absmax), _pointer(counts))
    group.bump_version()
    return _measure(group, norm_type, None, None, earlier), counts


def adamw_(table: StepTable, decision: StepDecision, options: AdamWOptions) -> None:
    numbers = map(float, (options.beta1, options.beta2, options.eps, options.weight_decay))
    _step("adamw", table, decision, options, cuda_interface.AdamWOptions(*numbers))


def sgd_(table: StepTable, decision: StepDecision, options: SGDOptions) -> None:
    numbers = map(float, (options.momentum, options.one_minus_dampening, options.weight_decay))
    _step("sgd", table, decision, options, cuda_interface.SgdOptions(*numbers, bool(options.nesterov)))


def _step(
    verb: str,
    table: StepTable,
    decision: StepDecision,
    options: AdamWOptions | SGDOptions,
    numbers: cuda_interface.AdamWOptions | cuda_interface.SgdOptions,
) -> None:
    device, count = table.device, len(table)
    packed, tiles = _step_table(table)
    workspace = torch.empty(_step_bytes(count), dtype=torch.uint8, device=device)
    rate = _on_device(options.lr, device)
    rows, frozen = packed.data_ptr(), decision.frozen_mask
    arrays = cuda_interface.StepTable(
        rows=rows,
        tile_offsets=rows + 7 * 8 * count,
        workspace=_pointer(workspace),
        stream=_stream(device),
        tensors=count,
        tiles=tiles,
        dtype=DTYPES[table.dtype],
        states=table.states,
        device=device.index or 0,
    )
    decided = cuda_interface.StepDecision(
        coef=_pointer(decision.coef),
        frozen=_pointer(frozen),
        lr_pointer=_pointer(rate),
        lr=float(options.lr) if rate is None else 0.0,
        seed=-1 if decision.seed is None else decision.seed,
        coef_stride=decision.coef.dim(),
        frozen_stride=0 if frozen is None else frozen.dim(),
        lr_itemsize=0 if rate is None else rate.itemsize,
        maximize=bool(options.maximize),
        zero_grad=bool(decision.zero_grad),
    )
    _check(f"fastclip_cuda_{verb}", arrays, decided, numbers)
    table.bump_version(decision.zero_grad)


def _on_device(value: Any, device: torch.device) -> Tensor | None:
    """A tensor that the device can read, as float32 or float64; None for what is on the host."""
    if not isinstance(value, Tensor) or value.device.type == "cpu" != device.type:
        return None
    return value.to(device, value.dtype if value.dtype == torch.float32 else torch.float64)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _call(verb: str, group: GradGroup, *arguments: Any) -> None:
    """fastclip_cuda_<verb> on the group's table and the current stream of its device; RuntimeError if CUDA says no."""
    gradients = _table(group).gradients
    gradients.stream = _stream(group.device)
    _check(f"fastclip_cuda_{verb}", gradients, *arguments)


def _check(function: str, *arguments: Any) -> None:
    if error := getattr(libraries.cuda.get(), function)(*arguments):
        raise RuntimeError(f"{function}: {error.decode()}")


class _Table:
    """The packed table of a group, where the kernels will find it."""

    def __init__(self, group: GradGroup, packed: Tensor, tiles: int) -> None:
        self.packed = packed  # int64: packed addresses [T], then tile offsets int32 [T + 1]
        self.gradients = cuda_interface.GradTable(
            packed_address=packed.data_ptr(),
            tile_offsets=packed.data_ptr() + 8 * len(group),
            tensors=len(group),
            tiles=tiles,
            dtype=DTYPES[group.dtype],
            device=group.device.index or 0,
        )


_uploaded: UploadCache[Tensor] = UploadCache()
_groups: WeakKeyDictionary[GradGroup, _Table] = WeakKeyDictionary()  # of the verbs of one call


def _table(group: GradGroup) -> _Table:
    table = _groups.get(group)
    if table is None:
        library = libraries.cuda.get()
        addresses, sizes = group.addresses_and_sizes()
        count = len(group)
        packed = torch.zeros(count + count // 2 + 1, dtype=torch.int64, device="cpu")
        packed_address = packed.data_ptr()
        tiles = library.fastclip_cuda_pack(
            *(addresses.data_ptr(), sizes.data_ptr(), count, group.dtype.itemsize),
            *(packed_address, packed_address + 8 * count),
        )
        if tiles < 0:
            raise RuntimeError(f"the gradients on {group.device} are too large, or lie too high, for the cuda backend")
        if count > library.fastclip_cuda_max_table():
            key = (group.device, group.dtype, _stream(group.device))
            packed = _uploaded.get(group.device, key, packed, lambda: upload(packed, torch.int64, group.device))
        table = _groups[group] = _Table(group, packed, tiles)
    return table


_uploaded_steps: UploadCache[Tensor] = UploadCache()


def _step_table(table: StepTable) -> tuple[Tensor, int]:
    """Addresses and sizes int64 [7, T], then tile offsets int32 [T + 1], where the kernels will look; and the tiles."""
    library = libraries.cuda.get()
    addresses = table.addresses()
    rows, count = addresses.shape
    packed = torch.zeros(rows * count + count // 2 + 1, dtype=torch.int64, device="cpu")
    packed[: rows * count] = addresses.view(-1)
    tile_offsets = packed.data_ptr() + 8 * rows * count
    tiles = library.fastclip_cuda_pack_step(packed.data_ptr(), count, table.dtype.itemsize, table.states, tile_offsets)
    if tiles < 0:
        raise RuntimeError(f"the parameters on {table.device} are too large for the cuda backend")
    if count > library.fastclip_cuda_max_step_table():
        key = (table.device, table.dtype, _stream(table.device))
        packed = _uploaded_steps.get(table.device, key, packed, lambda: upload(packed, torch.int64, table.device))
    return packed, tiles


def _step_bytes(count: int) -> int:
    return int(libraries.cuda.get().fastclip_cuda_step_bytes(count))


_workspaces: dict[tuple[torch.device, int], Tensor] = {}


def _workspace(device: torch.device) -> Tensor:
    """What `measure` needs besides its result: for each stream its own, and for each CUDA graph."""
    key = (device, _stream(device))
    kept = None if capturing(device) else _workspaces.get(key)
    if kept is None:
        size = ctypes.c_int64()
        _check("fastclip_cuda_workspace_bytes", device.index or 0, ctypes.byref(size))
        kept = torch.zeros(size.value, dtype=torch.uint8, device=device)
        if not capturing(device):
            _workspaces[key] = kept
    return kept


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
