"""The `cuda` backend: csrc/cuda/, for GPUs where Triton is not to be had.

The addresses of up to some 2,700 gradients, or of all that belongs to some 500 parameters, travel in the kernels'
parameters, so a call uploads nothing; those of more are kept on the device and uploaded when they change. How gradients
are divided among the blocks goes by their sizes, and is uploaded by itself when these change.
"""

from __future__ import annotations

import ctypes
import functools
import math
from typing import Any, NamedTuple
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
    device = group.device
    table = _table(group)  # before the workspace: in a CUDA graph neither may be given the other's memory
    count = table.gradients.tensors
    stream = _stream(device)
    workspace = _workspace(device, stream)
    result = torch.empty(2 * count + 4, dtype=torch.float64, device=device)
    # In memory of its own: users keep it, and should not keep what was measured of each tensor with it.
    norm32 = None if group.dtype == torch.float64 else torch.empty((), dtype=torch.float32, device=device)
    options = cuda_interface.MeasureOptions(
        norm_type,
        math.inf if max_norm is None else max_norm,
        None if before is None else before.data_ptr(),
        None if repaired is None else repaired.power.data_ptr(),
        None if repaired is None else repaired.absmax.data_ptr(),
        workspace.data_ptr(),
        result.data_ptr(),
        None if norm32 is None else norm32.data_ptr(),
    )
    _launch("measure", table, stream, options)
    power, absmax, total, last = result.split_with_sizes((count, count, 2, 2))
    norm, fused = last.unbind()
    return Measurement(power, absmax, norm, None if max_norm is None else fused, total, norm32)


def apply_(group: GradGroup, coef: Tensor) -> None:
    _launch("apply", _table(group), _stream(group.device), coef.data_ptr(), coef.dim())
    group.bump_version()


def clamp_(group: GradGroup, low: float, high: float) -> Tensor:
    clamped = torch.zeros((), dtype=torch.bool, device=group.device)
    _launch("clamp", _table(group), _stream(group.device), low, high, clamped.data_ptr())
    group.bump_version()
    return clamped


def repair_(group: GradGroup, measured: Measurement, norm_type: float) -> tuple[Measurement, Tensor]:
    earlier = measured._replace(power=measured.power.contiguous(), absmax=measured.absmax.contiguous())
    counts = torch.zeros(len(group), dtype=torch.int64, device=group.device)
    _launch("repair", _table(group), _stream(group.device), earlier.absmax.data_ptr(), counts.data_ptr())
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


def _launch(verb: str, table: _Table, stream: int, *arguments: Any) -> None:
    """fastclip_cuda_<verb> on a table and a stream of its device; RuntimeError if CUDA says no."""
    table.gradients.stream = stream
    _check(f"fastclip_cuda_{verb}", table.gradients, *arguments)


def _check(function: str, *arguments: Any) -> None:
    if error := getattr(libraries.cuda.get(), function)(*arguments):
        raise RuntimeError(f"{function}: {error.decode()}")


class _Table(NamedTuple):
    """The packed table of a group, where the kernels will find it."""

    gradients: cuda_interface.GradTable
    memory: tuple[Tensor, ...]  # which it points to


_addresses: UploadCache[Tensor] = UploadCache()
_layouts: UploadCache[Tensor] = UploadCache()  # the tile offsets, which sizes and alignment decide
_groups: WeakKeyDictionary[GradGroup, _Table] = WeakKeyDictionary()  # of the verbs of one call


def _table(group: GradGroup) -> _Table:
    table = _groups.get(group)
    if table is None:
        table = _groups[group] = _packed(group)
    return table


def _packed(group: GradGroup) -> _Table:
    """The table, made anew in every call: finding out that one from before is still good would take as long. What is
    uploaded is looked up by its contents, all of them, so that no address on the device can be a stale one."""
    library, device, dtype = libraries.cuda.get(), group.device, group.dtype
    listed = group.addresses_and_sizes()
    count = len(group)
    slots = library.fastclip_cuda_table_slots(count) or count
    packed = torch.empty(3 * slots + 2, dtype=torch.int32, device="cpu")  # addresses int64, then tile offsets int32
    memory: tuple[Tensor, ...] = (packed,)
    address, packed_address = listed.data_ptr(), packed.data_ptr()
    tile_offsets = packed_address + 8 * slots
    tiles = library.fastclip_cuda_pack(
        address, address + 8 * count, count, dtype.itemsize, packed_address, tile_offsets
    )
    if tiles < 0:
        raise RuntimeError(f"the gradients on {device} are too large, or lie too high, for the cuda backend")
    if slots == count and count > library.fastclip_cuda_max_table():
        halves = packed[: 2 * count].view(torch.int64), packed[2 * count : 3 * count + 1]
        memory = tuple(_uploaded(cache, half, device) for cache, half in zip((_addresses, _layouts), halves))
        packed_address, tile_offsets = map(Tensor.data_ptr, memory)
    index = device.index or 0
    return _Table(cuda_interface.GradTable(packed_address, tile_offsets, count, tiles, DTYPES[dtype], index), memory)


def _uploaded(cache: UploadCache[Tensor], host: Tensor, device: torch.device) -> Tensor:
    """`host` on the device, from the cache if it is there for the current stream."""
    return cache.get(device, (device, _stream(device)), host, lambda: upload(host, host.dtype, device))


_steps: UploadCache[Tensor] = UploadCache()


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
        packed = _uploaded(_steps, packed, table.device)
    return packed, tiles


def _step_bytes(count: int) -> int:
    return int(libraries.cuda.get().fastclip_cuda_step_bytes(count))


_workspaces: dict[tuple[torch.device, int], Tensor] = {}


def _workspace(device: torch.device, stream: int) -> Tensor:
    """What `measure` needs besides its result: for each stream its own, and for each CUDA graph."""
    key = (device, stream)
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
