"""The operations of a rule's formula, for single numbers on the host and for tensors alike.

On a CPU one operation of torch on a single number takes as long as reading a gradient of a thousand elements, so there
formulas are evaluated with Python's floats; on a GPU, where nothing may wait for the device, with tensors. Both are
float64, and what Python does otherwise (it raises where IEEE 754 has inf or NaN) is done here. They give the same bits
but for two operations that torch rounds twice, to 1e-15: a root, and a Python number divided by a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Number = float | Tensor
Truth = bool | Tensor


def on_host(number: Tensor) -> Number:
    """A [] tensor as a float (or bool) if it is on a CPU; anything else as it is."""
    if number.dim() or not number.is_cpu:
        return number
    value: float = number.item()
    return value


def as_tensor(number: Number, device: torch.device) -> Tensor:
    """:func:`on_host` undone."""
    if isinstance(number, Tensor):
        return number
    return torch.full((), number, dtype=torch.float64, device=device)


def where(condition: Truth, chosen: Number, other: Number) -> Number:
    if isinstance(condition, Tensor):
        return torch.where(condition, chosen, other)
    return chosen if condition else other


def either(condition: Truth, chosen: Callable[[], Number], other: Callable[[], Number]) -> Number:
    """:func:`where` of what they return; on the host only the one that is chosen is called."""
    if isinstance(condition, Tensor):
        return where(condition, chosen(), other())
    return chosen() if condition else other()


def divided(number: Number, by: Number) -> Number:
    """number / by."""
    if isinstance(number, Tensor) or isinstance(by, Tensor) or by:
        return number / by
    if not number or number != number:
        return math.nan
    return math.copysign(math.inf, number) * math.copysign(1.0, by)


def root(number: Number) -> Number:
    if isinstance(number, Tensor):
        return number.sqrt()
    return math.nan if number < 0 else math.sqrt(number)


def clamped(number: Number, low: float = -math.inf, high: float = math.inf) -> Number:
    """`number`, but within [low, high]; NaN stays NaN."""
    if isinstance(number, Tensor):
        return number.clamp(low, high)
    return low if number < low else high if number > high else number


def floor(number: Number) -> Number:
    return number.floor() if isinstance(number, Tensor) else float(math.floor(number))


def ceil(number: Number) -> Number:
    return number.ceil() if isinstance(number, Tensor) else float(math.ceil(number))


def every(conditions: Tensor, beside: Number) -> Truth:
    """[] whether all are true; on the host where `beside` is."""
    truth = conditions.all()
    return truth if isinstance(beside, Tensor) else bool(truth.item())


def taken(values: Tensor, place: Number) -> Number:
    """values[place]; on the host where `place` is."""
    if isinstance(place, Tensor):
        return values.gather(0, place.long().unsqueeze(0)).squeeze(0)
    value: float = values[int(place)].item()
    return value


def put(values: Tensor, place: Number, value: Number) -> Tensor:
    """A copy of `values` with `value` at `place`."""
    if isinstance(place, Tensor):
        assert isinstance(value, Tensor)
        return values.scatter(0, place.long().unsqueeze(0), value.unsqueeze(0))
    copy = values.clone()
    copy[int(place)] = value
    return copy
