"""The functional calls as opaque torch.library ops, so that torch.compile and make_fx keep them in one graph.

They take gradients rather than parameters (a graph knows no ``.grad``), at least one. Limits are tensors of shape [],
since a number would be compiled in: a graph would be made for every new value. They are checked here, where their
values are known. Only what is compiled, traced or otherwise watched comes through here: eager calls do not pay for the
dispatcher.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .arguments import checked_limit, checked_norm, nonnegative
from .gradients.pack import pack
from .gradients.table import GradTable
from .pipeline.decide import clip, clip_by_norm, refuse_nonfinite
from .rules import GlobalNorm, Mask, TensorNorm, Value

TAGS = (torch.Tag.cudagraph_unsafe,)  # the address table is uploaded from the host


@torch.library.custom_op("fastclip::clip_norm_", mutates_args={"grads"}, tags=TAGS)
def clip_norm_(grads: list[Tensor], max_norm: Tensor, norm_type: float, error_if_nonfinite: bool) -> Tensor:
    check = refuse_nonfinite if error_if_nonfinite else None
    table = _table(grads)
    return table.at_home(clip(table, [GlobalNorm(max_norm, norm_type)], norm_type, check).take_total_norm())


@torch.library.custom_op("fastclip::total_norm", mutates_args=(), tags=TAGS)
def total_norm(tensors: list[Tensor], norm_type: float, error_if_nonfinite: bool) -> Tensor:
    check = refuse_nonfinite if error_if_nonfinite else None
    rule = GlobalNorm(math.inf, norm_type)
    table = pack(tensors, gradients=True, write=False, argument="tensors")
    return table.at_home(clip(table, [rule], norm_type, check).take_total_norm())


@torch.library.custom_op("fastclip::clip_with_norm_", mutates_args={"grads"}, tags=TAGS)
def clip_with_norm_(grads: list[Tensor], max_norm: Tensor, total_norm: Tensor) -> None:
    limit, norm = checked_limit(max_norm, "max_norm"), checked_norm(total_norm)
    clip_by_norm(_table(grads), norm, limit)


@torch.library.custom_op("fastclip::clip_value_", mutates_args={"grads"}, tags=TAGS)
def clip_value_(grads: list[Tensor], clip_value: Tensor) -> None:
    rule = Value(nonnegative(clip_value, "clip_value"))
    _table(grads).clamp_(rule.low, rule.high)


@torch.library.custom_op("fastclip::clip_tensor_norm_", mutates_args={"grads"}, tags=TAGS)
def clip_tensor_norm_(grads: list[Tensor], max_norm: Tensor, norm_type: float) -> Tensor:
    rule = TensorNorm(nonnegative(max_norm, "max_norm"), norm_type)
    table = _distinct(grads)
    return table.at_home(clip(table, [rule], norm_type).tensor_norms)


@torch.library.custom_op("fastclip::mask_small_", mutates_args={"grads"}, tags=TAGS)
def mask_small_(grads: list[Tensor], threshold: Tensor) -> Tensor:
    table = _distinct(grads)
    return table.at_home(clip(table, [Mask(nonnegative(threshold, "threshold"))], math.inf).coef == 0)


@clip_norm_.register_fake
def _(grads: list[Tensor], max_norm: Tensor, norm_type: float, error_if_nonfinite: bool) -> Tensor:
    return _fake_norms(grads, ())


@total_norm.register_fake
def _(tensors: list[Tensor], norm_type: float, error_if_nonfinite: bool) -> Tensor:
    return _fake_norms(tensors, ())


@clip_tensor_norm_.register_fake
def _(grads: list[Tensor], max_norm: Tensor, norm_type: float) -> Tensor:
    return _fake_norms(grads, (len(grads),))


@mask_small_.register_fake
def _(grads: list[Tensor], threshold: Tensor) -> Tensor:
    return grads[0].new_empty((len(grads),), dtype=torch.bool)


@clip_with_norm_.register_fake
def _(grads: list[Tensor], max_norm: Tensor, total_norm: Tensor) -> None:
    return None


@clip_value_.register_fake
def _(grads: list[Tensor], clip_value: Tensor) -> None:
    return None


def _table(grads: list[Tensor]) -> GradTable:
    return pack(grads, gradients=True, write=True, argument="grads")


def _distinct(grads: list[Tensor]) -> GradTable:
    """The table of `grads`; RuntimeError where it has fewer, since the graph has been told of one result for each."""
    table = _table(grads)
    if len(table) != len(grads):
        raise RuntimeError(
            f"parameters: {len(grads)} gradients share memory and are {len(table)} in truth, which a compiled call "
            f"cannot know in advance. Make them one tensor (q.grad = p.grad), or call this outside of torch.compile; "
            f"nothing was changed"
        )
    return table


def _fake_norms(tensors: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    wide = any(t.dtype in (torch.float64, torch.complex128) for t in tensors)
    return tensors[0].new_empty(shape, dtype=torch.float64 if wide else torch.float32)
