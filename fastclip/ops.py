"""The functional calls as opaque torch.library ops, so that torch.compile and make_fx keep them in one graph.

They take gradients rather than parameters (a graph knows no ``.grad``), at least one, and arguments already checked.
Only what is compiled, traced or otherwise watched comes through here: eager calls do not pay for the dispatcher.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .clipper import clip, clip_by_norm, refuse_nonfinite
from .rules import GlobalNorm, Mask, TensorNorm, Value
from .table import GradTable, pack

TAGS = (torch.Tag.cudagraph_unsafe,)  # the address table is uploaded from the host


@torch.library.custom_op("fastclip::clip_norm_", mutates_args={"grads"}, tags=TAGS)
def clip_norm_(grads: list[Tensor], max_norm: float, norm_type: float, error_if_nonfinite: bool) -> Tensor:
    check = refuse_nonfinite if error_if_nonfinite else None
    return clip(_table(grads), [GlobalNorm(max_norm, norm_type)], norm_type, check).total_norm


@torch.library.custom_op("fastclip::total_norm", mutates_args=(), tags=TAGS)
def total_norm(tensors: list[Tensor], norm_type: float, error_if_nonfinite: bool) -> Tensor:
    check = refuse_nonfinite if error_if_nonfinite else None
    table = pack(tensors, gradients=True, write=False, argument="tensors")
    return clip(table, [GlobalNorm(math.inf, norm_type)], norm_type, check).total_norm


@torch.library.custom_op("fastclip::clip_with_norm_", mutates_args={"grads"}, tags=TAGS)
def clip_with_norm_(grads: list[Tensor], max_norm: float, total_norm: Tensor) -> None:
    clip_by_norm(_table(grads), total_norm, max_norm)


@torch.library.custom_op("fastclip::clip_value_", mutates_args={"grads"}, tags=TAGS)
def clip_value_(grads: list[Tensor], clip_value: float) -> None:
    rule = Value(clip_value)
    _table(grads).clamp_(rule.low, rule.high)


@torch.library.custom_op("fastclip::clip_tensor_norm_", mutates_args={"grads"}, tags=TAGS)
def clip_tensor_norm_(grads: list[Tensor], max_norm: float, norm_type: float) -> Tensor:
    return clip(_table(grads), [TensorNorm(max_norm, norm_type)], norm_type).tensor_norms


@torch.library.custom_op("fastclip::mask_small_", mutates_args={"grads"}, tags=TAGS)
def mask_small_(grads: list[Tensor], threshold: float) -> Tensor:
    return clip(_table(grads), [Mask(threshold)], math.inf).coef == 0


@clip_norm_.register_fake
def _(grads: list[Tensor], max_norm: float, norm_type: float, error_if_nonfinite: bool) -> Tensor:
    return _fake_norms(grads, ())


@total_norm.register_fake
def _(tensors: list[Tensor], norm_type: float, error_if_nonfinite: bool) -> Tensor:
    return _fake_norms(tensors, ())


@clip_tensor_norm_.register_fake
def _(grads: list[Tensor], max_norm: float, norm_type: float) -> Tensor:
    return _fake_norms(grads, (len(grads),))


@mask_small_.register_fake
def _(grads: list[Tensor], threshold: float) -> Tensor:
    return grads[0].new_empty((len(grads),), dtype=torch.bool)


@clip_with_norm_.register_fake
def _(grads: list[Tensor], max_norm: float, total_norm: Tensor) -> None:
    return None


@clip_value_.register_fake
def _(grads: list[Tensor], clip_value: float) -> None:
    return None


def _table(grads: list[Tensor]) -> GradTable:
    return pack(grads, gradients=True, write=True, argument="grads")


def _fake_norms(tensors: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    wide = any(t.dtype in (torch.float64, torch.complex128) for t in tensors)
    return tensors[0].new_empty(shape, dtype=torch.float64 if wide else torch.float32)
