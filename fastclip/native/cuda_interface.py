"""The C interface of the CUDA library: the structs and functions of csrc/cuda/interface.h, field by field.

``tests/test_csrc.py`` compares the two.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import POINTER, c_bool, c_char_p, c_double, c_int32, c_int64, c_uint32, c_void_p
from typing import Any

from .library import declared


class GradTable(ctypes.Structure):
    """Gradients of one dtype, and where to launch."""

    _fields_ = (
        ("packed_address", c_void_p),
        ("tile_offsets", c_void_p),
        ("tensors", c_uint32),
        ("tiles", c_uint32),
        ("dtype", c_int32),
        ("device", c_int32),
        ("stream", c_void_p),
    )


class MeasureOptions(ctypes.Structure):
    """What a measurement takes besides the gradients, and where it leaves its result."""

    _fields_ = (
        ("p", c_double),
        ("max_norm", c_double),
        ("before", c_void_p),
        ("earlier_power", c_void_p),
        ("earlier_absmax", c_void_p),
        ("workspace", c_void_p),
        ("result", c_void_p),
        ("norm32", c_void_p),
    )


class StepTable(ctypes.Structure):
    """What an optimizer steps, and where to launch."""

    _fields_ = (
        ("rows", c_void_p),
        ("tile_offsets", c_void_p),
        ("workspace", c_void_p),
        ("stream", c_void_p),
        ("tensors", c_uint32),
        ("tiles", c_uint32),
        ("dtype", c_int32),
        ("states", c_int32),
        ("device", c_int32),
    )


class StepDecision(ctypes.Structure):
    """What is decided about a step, besides the optimizer's own options."""

    _fields_ = (
        ("coef", c_void_p),
        ("frozen", c_void_p),
        ("lr_pointer", c_void_p),
        ("lr", c_double),
        ("seed", c_int64),
        ("coef_stride", c_uint32),
        ("frozen_stride", c_uint32),
        ("lr_itemsize", c_int32),
        ("maximize", c_bool),
        ("zero_grad", c_bool),
    )


class AdamWOptions(ctypes.Structure):
    """Those of torch.optim.AdamW."""

    _fields_ = (("beta1", c_double), ("beta2", c_double), ("eps", c_double), ("weight_decay", c_double))


class SgdOptions(ctypes.Structure):
    """Those of torch.optim.SGD."""

    _fields_ = (
        ("momentum", c_double),
        ("one_minus_dampening", c_double),
        ("weight_decay", c_double),
        ("nesterov", c_bool),
    )


STRUCTS = (GradTable, MeasureOptions, StepTable, StepDecision, AdamWOptions, SgdOptions)

# name -> its result and arguments; a string is null, or what went wrong
FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "fastclip_cuda_field": (c_char_p, (c_int32, POINTER(c_uint32), POINTER(c_uint32))),
    "fastclip_cuda_max_table": (c_int32, ()),
    "fastclip_cuda_max_step_table": (c_int32, ()),
    "fastclip_cuda_table_slots": (c_int32, (c_int64,)),
    "fastclip_cuda_probe": (c_char_p, (c_int32,)),
    "fastclip_cuda_workspace_bytes": (c_char_p, (c_int32, POINTER(c_int64))),
    "fastclip_cuda_step_bytes": (c_int64, (c_int64,)),
    "fastclip_cuda_pack": (c_int64, (c_void_p, c_void_p, c_int64, c_int32, c_void_p, c_void_p)),
    "fastclip_cuda_pack_step": (c_int64, (c_void_p, c_int64, c_int32, c_int32, c_void_p)),
    "fastclip_cuda_measure": (c_char_p, (POINTER(GradTable), POINTER(MeasureOptions))),
    "fastclip_cuda_apply": (c_char_p, (POINTER(GradTable), c_void_p, c_uint32)),
    "fastclip_cuda_clamp": (c_char_p, (POINTER(GradTable), c_double, c_double, c_void_p)),
    "fastclip_cuda_repair": (c_char_p, (POINTER(GradTable), c_void_p, c_void_p)),
    "fastclip_cuda_adamw": (c_char_p, (POINTER(StepTable), POINTER(StepDecision), POINTER(AdamWOptions))),
    "fastclip_cuda_sgd": (c_char_p, (POINTER(StepTable), POINTER(StepDecision), POINTER(SgdOptions))),
}


open_library = functools.partial(declared, functions=FUNCTIONS)
