"""The C interface of the CPU kernels: the structs and functions of csrc/cpu/launch.h, for ctypes."""

from __future__ import annotations

import ctypes
import functools
from ctypes import POINTER, c_bool, c_char_p, c_double, c_int32, c_int64, c_uint32, c_void_p
from typing import Any

import torch

from .library import declared

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # Dtype of csrc/elementwise.h


class Segment(ctypes.Structure):
    """One gradient."""

    _fields_ = (
        ("data", c_void_p),
        ("numel", c_int64),
        ("first_chunk", c_int64),
        ("work", c_int64),
        ("owner", c_void_p),
    )


class Table(ctypes.Structure):
    """Gradients of one dtype."""

    _fields_ = (
        ("segments", c_void_p),
        ("count", c_int64),
        ("chunks", c_int64),
        ("work", c_int64),
        ("dtype", c_int32),
        ("written", c_void_p),
    )


class Threads(ctypes.Structure):
    """Where the work is done."""

    _fields_ = (("count", c_int64), ("parallel_for", c_void_p))


class GlobalNorm(ctypes.Structure):
    """What one read tells of all gradients of one or more tables."""

    _fields_ = (("power", c_double), ("absmax", c_double), ("norm", c_double), ("coef", c_double))


class ClipOptions(ctypes.Structure):
    """What a clip is asked to do."""

    _fields_ = (("p", c_double), ("max_norm", c_double), ("write", c_bool), ("refuse_nonfinite", c_bool))


class StepSegment(ctypes.Structure):
    """What an optimizer keeps beside a gradient."""

    _fields_ = (("param", c_void_p), ("state", c_void_p * 3), ("step", c_void_p))


class StepDecision(ctypes.Structure):
    """What is decided about a step, besides the optimizer's own options."""

    _fields_ = (
        ("coef", c_void_p),
        ("coef_stride", c_int64),
        ("frozen", c_void_p),
        ("frozen_stride", c_int64),
        ("seed", c_uint32),
        ("stochastic", c_bool),
        ("maximize", c_bool),
        ("zero_grad", c_bool),
    )


class AdamWOptions(ctypes.Structure):
    """Those of torch.optim.AdamW."""

    _fields_ = tuple((name, c_double) for name in ("lr", "beta1", "beta2", "eps", "weight_decay"))


class SgdOptions(ctypes.Structure):
    """Those of torch.optim.SGD."""

    _fields_ = (
        ("lr", c_double),
        ("momentum", c_double),
        ("one_minus_dampening", c_double),
        ("weight_decay", c_double),
        ("nesterov", c_bool),
    )


STRUCTS = (Segment, Table, Threads, GlobalNorm, ClipOptions, StepSegment, StepDecision, AdamWOptions, SgdOptions)

_table, _threads = POINTER(Table), POINTER(Threads)

# name -> its result and arguments
FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "fastclip_cpu_isa": (c_char_p, ()),
    "fastclip_cpu_table": (None, (c_void_p, c_void_p, c_int64, c_int32, c_void_p, c_void_p, _table)),
    "fastclip_cpu_global_norm": (
        None,
        (_table, _threads, c_double, c_double, c_void_p, c_void_p, POINTER(GlobalNorm)),
    ),
    "fastclip_cpu_clip": (
        c_bool,
        (_table, c_int64, _threads, POINTER(ClipOptions), c_void_p, POINTER(GlobalNorm)),
    ),
    "fastclip_cpu_apply": (None, (_table, _threads, c_void_p, c_int64)),
    "fastclip_cpu_clamp": (c_bool, (_table, _threads, c_double, c_double)),
    "fastclip_cpu_adamw": (None, (_table, _threads, c_void_p, POINTER(StepDecision), POINTER(AdamWOptions))),
    "fastclip_cpu_sgd": (None, (_table, _threads, c_void_p, POINTER(StepDecision), POINTER(SgdOptions))),
}


open_library = functools.partial(declared, functions=FUNCTIONS)


def address_of(library: ctypes.CDLL, name: str) -> int:
    """Where the function `name` of a library is."""
    address = ctypes.cast(getattr(library, name), c_void_p).value
    assert address is not None
    return address
