"""The `cuda` backend: csrc/cuda.cu, for GPUs where Triton is not to be had.

The addresses of up to some 2,700 gradients travel in the kernels' parameters, so a call uploads nothing; those of more
are kept on the device and uploaded when they change.
"""

from __future__ import annotations

import ctypes
import functools
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import Measurement, Recent, capturing, native, upload

if TYPE_CHECKING:
    from ..table import Group

name = "cuda"

DEVICE = "cuda"  # the emulation that the tests use runs on "cpu"
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # as in cuda.cu


def why_not(device: torch.device) -> str | None:
    if device.type != DEVICE:
        return f"it runs on NVIDIA GPUs, not on {device.type}"
    if torch.version.hip:
        return "it runs on NVIDIA GPUs, and this torch is for AMD's"
    if native.cuda.load() is None:
        return native.cuda.failure()
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
    return f"nvcc for sm_{', sm_'.join(native.architectures())}"


def measure(group: Group, norm_type: float, max_norm: float | None = None, before: Tensor | None = None) -> Measurement:
    count = len(group)
    _table(group)  # before the workspace: in a CUDA graph neither may be given the other's memory
    workspace = _workspace(group.device)
    result = torch.empty(2 * count + 4, dtype=torch.float64, device=group.device)
    limit = math.inf if max_norm is None else max_norm
    pointers = (_pointer(before), _pointer(workspace), _pointer(result))
    _call("measure", group, _f64(norm_type), _f64(limit), *pointers)
    all_of_them = result[2 * count :]  # total [2], norm, coefficient
    coef = None if max_norm is None else all_of_them[3]
    return Measurement(result[:count], result[count : 2 * count], all_of_them[2], coef, all_of_them[:2])


def apply_(group: Group, coef: Tensor) -> None:
    _call("apply", group, _pointer(coef), coef.dim())
    group.bump_version()


def clamp_(group: Group, low: float, high: float) -> Tensor:
    clamped = torch.zeros((), dtype=torch.bool, device=group.device)
    _call("clamp", group, _f64(low), _f64(high), _pointer(clamped))
    group.bump_version()
    return clamped


_f64 = ctypes.c_double


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _call(verb: str, group: Group, *arguments: Any) -> None:
    """fastclip_cuda_<verb> on the group's table and the current stream of its device; RuntimeError if CUDA says no."""
    table = _table(group)
    _check(
        f"fastclip_cuda_{verb}",
        *(ctypes.c_void_p(table.place), ctypes.c_void_p(table.first), len(group), table.tiles, DTYPES[group.dtype]),
        *(*arguments, group.device.index or 0, ctypes.c_void_p(_stream(group.device))),
    )


def _check(function: str, *arguments: Any) -> None:
    call = getattr(native.cuda.load(), function)
    call.restype = ctypes.c_char_p
    if error := call(*arguments):
        raise RuntimeError(f"{function}: {error.decode()}")


class _Table:
    """The packed table of a group, where the kernels will find it."""

    def __init__(self, packed: Tensor, tiles: int, count: int) -> None:
        self.packed = packed  # int64: places [T], then first tiles int32 [T + 1]
        self.tiles = tiles
        self.place = packed.data_ptr()
        self.first = self.place + 8 * count


_uploaded: Recent[Tensor] = Recent()


def _table(group: Group) -> _Table:
    if group.uploaded is None:
        library = native.cuda.load()
        addresses, sizes = group.addresses_and_sizes()
        count = len(group)
        packed = torch.zeros(count + count // 2 + 1, dtype=torch.int64, device="cpu")
        place = packed.data_ptr()
        library.fastclip_cuda_pack.restype = ctypes.c_int64
        tiles = library.fastclip_cuda_pack(
            *(_pointer(addresses), _pointer(sizes), ctypes.c_int64(count), group.dtype.itemsize),
            *(ctypes.c_void_p(place), ctypes.c_void_p(place + 8 * count)),
        )
        if tiles < 0:
            raise RuntimeError(f"the gradients on {group.device} are too large, or lie too high, for the cuda backend")
        if count > library.fastclip_cuda_most_parameters():
            key = (group.device, group.dtype, _stream(group.device))
            packed = _uploaded.get(group.device, key, packed, lambda: upload(packed, torch.int64, group.device))
        group.uploaded = _Table(packed, tiles, count)
    return group.uploaded


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
