"""Value: a limit of every element."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import nonnegative, number
from ..gradients.table import GradTable
from .base import InPlaceRule, Needs, StepContext


class Value(InPlaceRule):
    r"""Limit every element to [low, high].

    ``Value(limit)`` limits to [-limit, limit], ``torch.nn.utils.clip_grad_value_``; ``Value(low, high)`` to any
    interval. Complex elements are limited by magnitude, so only by a single limit. NaN stays NaN. No coefficient can do
    this, so the pipeline runs it as a pass of its own, between what comes before and after it in a list of rules.

    Args:
        limit: in the gradients' unit, >= 0; or, where `high` is given, the lower limit, any number <= `high`.
        high: the upper limit.

    Raises:
        ValueError, TypeError: a limit that is no such number.
    """

    needs = Needs(0)
    per_tensor = True

    def __init__(self, limit: float, high: float | None = None) -> None:
        if high is None:
            self.high = nonnegative(limit, "limit")
            self.low = -self.high
        else:
            self.low, self.high = number(limit, "limit"), number(high, "high")
            if not self.low <= self.high:
                raise ValueError(f"limit must be <= high, got {limit!r} and {high!r}")

    def check_gradients(self, context: StepContext) -> None:
        """TypeError where a gradient is complex and there are two limits."""
        if self.low != -self.high and any(p.is_complex() for p in context.params().parameters):
            raise TypeError(f"{self!r} has two limits, and a complex gradient can only be limited by magnitude")

    def apply_(self, table: GradTable, context: StepContext) -> Tensor:
        if context.skip is not None and bool(context.skip):  # the limits cannot wait on the device
            return torch.zeros((), dtype=torch.bool, device=table.device)
        return table.clamp_(self.low, self.high)

    def __repr__(self) -> str:
        return f"Value({self.high})" if self.low == -self.high else f"Value({self.low}, {self.high})"
