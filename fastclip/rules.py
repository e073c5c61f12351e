"""Rules: from the statistics of the gradients to their coefficients.

A rule is a function of :class:`~fastclip.stats.Stats` that returns a float64 tensor of shape [] or [T] on the
statistics' device: what the gradients are multiplied by (1: left alone, neither read nor written; 0: set to zero). It
must not read values back to the host. Any callable will do; the classes here also say which norm they need.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .stats import Stats

Rule = Callable[[Stats], Tensor]
EPS = 1e-6  # torch's, in the denominator of the clip coefficient


class GlobalNorm:
    r"""Scale all gradients together so that their common norm is at most `max_norm`.

    .. math:: g \leftarrow g \cdot \min\left(1, \frac{max\_norm}{N + 10^{-6}}\right)

    with N the p-norm of all gradients as one vector; ``torch.nn.utils.clip_grad_norm_``'s formula. ``max_norm = inf``
    only measures.

    Args:
        max_norm: the limit, >= 0.
        norm_type: p: 2, 1, ``inf``, 0 (the number of tensors that are not all zero) or any other p > 0.

    Raises:
        ValueError, TypeError: a limit or a norm type that is no such number.
    """

    def __init__(self, max_norm: float, norm_type: float = 2.0) -> None:
        self.max_norm = nonnegative(max_norm, "max_norm")
        self.norm_type = nonnegative(norm_type, "norm_type")

    def __call__(self, stats: Stats) -> Tensor:
        return clip_coefficient(stats.norm, self.max_norm)

    def __repr__(self) -> str:
        return f"GlobalNorm({self.max_norm}, norm_type={self.norm_type})"


class TensorNorm:
    r"""Scale each gradient on its own so that its norm is at most `max_norm`.

    .. math:: g_t \leftarrow g_t \cdot \min\left(1, \frac{max\_norm}{n_t + 10^{-6}}\right)

    with n_t the p-norm of tensor t; DINO's ``clip_gradients``, and Keras' ``clipnorm`` but for the 1e-6.

    Args and Raises: as :class:`GlobalNorm`.
    """

    def __init__(self, max_norm: float, norm_type: float = 2.0) -> None:
        self.max_norm = nonnegative(max_norm, "max_norm")
        self.norm_type = nonnegative(norm_type, "norm_type")

    def __call__(self, stats: Stats) -> Tensor:
        return clip_coefficient(stats.norms, self.max_norm)

    def __repr__(self) -> str:
        return f"TensorNorm({self.max_norm}, norm_type={self.norm_type})"


class Mask:
    r"""Zero the gradients that are small throughout.

    .. math:: g_t \leftarrow 0 \text{ where } \max|g_t| < threshold

    A gradient that holds a NaN is left alone.

    Args:
        threshold: in the gradients' unit, >= 0.
        hold: in :meth:`Clipper.step`, also leave the masked parameters exactly as they are: no momentum, no weight
            decay, their optimizer state untouched. A gradient of zeros alone does not do that.

    Raises:
        ValueError, TypeError: a threshold that is no such number.
    """

    norm_type = None

    def __init__(self, threshold: float, hold: bool = False) -> None:
        self.threshold = nonnegative(threshold, "threshold")
        if not isinstance(hold, bool):
            raise TypeError(f"hold must be a bool, got {type(hold).__name__} {hold!r}")
        self.hold = hold

    def __call__(self, stats: Stats) -> Tensor:
        return torch.where(stats.absmax < self.threshold, 0.0, 1.0).double()

    def __repr__(self) -> str:
        return f"Mask({self.threshold}{', hold=True' if self.hold else ''})"


class Value:
    r"""Limit every element to [-limit, limit]; complex ones by magnitude. NaN stays NaN.

    ``torch.nn.utils.clip_grad_value_``. No coefficient can do this, so the pipeline runs it as a pass of its own,
    between what comes before and after it in a list of rules.

    Args:
        limit: in the gradients' unit, >= 0.

    Raises:
        ValueError, TypeError: a limit that is no such number.
    """

    norm_type = None

    def __init__(self, limit: float) -> None:
        self.high = nonnegative(limit, "limit")
        self.low = -self.high

    def __repr__(self) -> str:
        return f"Value({self.high})"


def clip_coefficient(norm: Tensor, max_norm: float) -> Tensor:
    """min(1, max_norm / (norm + 1e-6)) in float64; 1 for an infinite `max_norm`, -0.0 for an infinite norm.

    -0.0 multiplies where +0.0 writes zeros: torch scales by 0 there, which leaves NaN where inf was.
    """
    if math.isinf(max_norm):
        return torch.ones_like(norm)
    return torch.where(norm.isinf(), -0.0, (max_norm / (norm + EPS)).clamp(max=1.0))


def combined(coef: Tensor, factor: Tensor) -> Tensor:
    """The coefficient that does what `coef` and then `factor` do: +0 writes zeros, whatever else multiplies."""

    def zeroes(c: Tensor) -> Tensor:
        return (c == 0) & ~c.signbit()

    return torch.where(zeroes(factor) | (zeroes(coef) & ~factor.isnan()), 0.0, coef * factor)


def norm_type_of(rules: list[Any]) -> float:
    """The one norm type that `rules` need; 2 if they need none. ValueError if they disagree: a read gives one norm."""
    types = {rule.norm_type for rule in rules if getattr(rule, "norm_type", None) is not None}
    if len(types) > 1:
        raise ValueError(f"rule: all rules of a list must use the same norm_type, got {sorted(types)} in {rules}")
    return types.pop() if types else 2.0


def nonnegative(value: Any, argument: str) -> float:
    """`value` as a float; an error that names `argument` unless it is a number >= 0 (inf included)."""
    if isinstance(value, str) and argument == "norm_type" and value in ("inf", "infinity"):
        return math.inf
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"{argument} must be one number, got a tensor of shape {tuple(value.shape)}")
    if isinstance(value, (str, bytes, bool)) or not hasattr(value, "__float__"):
        raise TypeError(f"{argument} must be a number, got {type(value).__name__} {value!r}")
    try:
        number = float(value)
    except OverflowError:
        raise ValueError(f"{argument} must fit a float64, got {value!r}") from None
    if not number >= 0:
        raise ValueError(f"{argument} must be >= 0, got {value!r}")
    return number
