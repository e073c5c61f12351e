"""What rules decide with: the coefficient of a norm and a limit, and what two coefficients in a row do."""

from __future__ import annotations

import math
import numbers
from typing import Any, overload

import torch
from torch import Tensor

from ..arguments import is_bool
from ..stats import is_zero
from .arithmetic import Number, as_tensor, clamped, divided, on_host, where

EPS = 1e-6  # torch's, in the denominator of the clip coefficient


@overload
def clip_coefficient(norm: Tensor, max_norm: Number) -> Tensor: ...
@overload
def clip_coefficient(norm: Number, max_norm: Number) -> Number: ...
def clip_coefficient(norm: Number, max_norm: Number) -> Number:
    """min(1, max_norm / (norm + 1e-6)) in float64; 1 for an infinite `max_norm`, -0.0 for an infinite norm.

    -0.0 multiplies where +0.0 writes zeros: torch scales by 0 there, which leaves NaN where inf was. Never negative: a
    negative number in a tensor, which nobody has looked at, counts as 0.
    """
    if not isinstance(max_norm, Tensor) and max_norm == math.inf:
        return torch.ones_like(norm) if isinstance(norm, Tensor) else 1.0
    coef = where(norm == math.inf, -0.0, clamped(divided(max_norm, norm + EPS), 0.0, 1.0))
    return where(max_norm == math.inf, 1.0, coef) if isinstance(max_norm, Tensor) else coef


def coefficient_for_all(norm: Tensor, max_norm: Number) -> Number:
    """:func:`clip_coefficient` of a [] norm; on the host if that is there."""
    return clip_coefficient(on_host(norm), on_host(max_norm) if isinstance(max_norm, Tensor) else max_norm)


def within(norm: Tensor, limit: Tensor) -> Tensor:
    """1 / max(1, norm / limit): as :func:`clip_coefficient`, without its 1e-6."""
    return torch.where(norm <= limit, 1.0, torch.where(norm == math.inf, -0.0, limit / norm))


def combined(coef: Tensor | None, factor: Tensor, left: bool = False) -> Tensor:
    """The coefficient that does what `coef` (None: 1) and then `factor` do: +0 writes zeros, all else multiplies.

    `left`: `factor` is known to be 1 throughout.
    """
    if coef is None:
        return factor
    if left:
        return coef if coef.dim() or not factor.dim() else coef.expand_as(factor)
    product = coef * factor
    vanished = product == 0
    zeroes = is_zero(factor) | (is_zero(coef) & vanished)  # where zeros were written, inf and NaN are NaN again
    return torch.where(zeroes, 0.0, torch.where(vanished, -0.0, product))


def checked(coef: Any, rule: Any, count: int, device: torch.device) -> Tensor:
    """What `rule` returned, as a float64 tensor on `device`; TypeError unless it is a number or a tensor of shape [] or
    [count]."""
    if isinstance(coef, numbers.Real) and not is_bool(coef):
        return as_tensor(float(coef), device)
    if not isinstance(coef, Tensor) or coef.shape not in ((), (count,)):
        got = f"a tensor of shape {tuple(coef.shape)}" if isinstance(coef, Tensor) else repr(coef)
        raise TypeError(f"rule {rule!r} must return a number or a tensor of shape [] or [{count}], got {got}")
    coef = coef.detach() if coef.requires_grad else coef
    return coef if coef.dtype is torch.float64 and coef.device == device else coef.double().to(device)
