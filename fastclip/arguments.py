"""Checks of arguments: each returns the value as it is used, or raises an error that names argument and value."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import Tensor


def number(value: Any, argument: str) -> float:
    """`value` as a float; an error that names `argument` unless it is a number (inf and NaN included)."""
    if isinstance(value, Tensor):
        value = one_number(value, argument).item()
    if isinstance(value, (str, bytes)) or is_bool(value) or not hasattr(value, "__float__"):
        raise TypeError(f"{argument} must be a number, got {type(value).__name__} {value!r}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{argument} must fit a float64, got {value!r}") from None
    except (TypeError, ValueError):  # an array of several numbers, say
        raise TypeError(f"{argument} must be a number, got {type(value).__name__} {value!r}") from None


def one_number(value: Tensor, argument: str) -> Tensor:
    """`value` as a tensor of shape [] without a graph; ValueError unless it is one real number. Reads no value."""
    if value.numel() != 1 or value.is_complex() or value.dtype == torch.bool or value.is_meta:
        got = f"a {value.dtype} tensor of shape {tuple(value.shape)}{' on the meta device' if value.is_meta else ''}"
        raise ValueError(f"{argument} must be one real number, got {got}")
    return value.detach().reshape(())


def checked_limit(value: Any, argument: str) -> float | Tensor:
    """:func:`nonnegative`; but a tensor on another device than the CPU stays there, unread, as a tensor of shape []."""
    if isinstance(value, Tensor) and value.device.type != "cpu":
        return one_number(value, argument)
    return nonnegative(value, argument)


def checked_norm(value: Any) -> Tensor:
    """A `total_norm` as a tensor of shape []; an error unless it is >= 0 or NaN. On a GPU it is not read."""
    if isinstance(value, Tensor):
        norm = one_number(value, "total_norm")
    else:
        norm = torch.full((), number(value, "total_norm"), dtype=torch.float64, device="cpu")
    if norm.device.type == "cpu" and norm.item() < 0:
        raise ValueError(f"total_norm must be >= 0, got {norm.item()}")
    return norm


def nonnegative(value: Any, argument: str) -> float:
    """:func:`number`, >= 0."""
    if isinstance(value, str) and argument == "norm_type" and value in ("inf", "infinity"):
        return math.inf
    found = number(value, argument)
    if not found >= 0:
        raise ValueError(f"{argument} must be >= 0, got {found if isinstance(value, Tensor) else value!r}")
    return found


def positive(value: Any, argument: str) -> float:
    found = number(value, argument)
    if not 0 < found < math.inf:
        raise ValueError(f"{argument} must be > 0 and finite, got {value!r}")
    return found


def fraction(value: Any, argument: str) -> float:
    found = number(value, argument)
    if not 0 <= found < 1:
        raise ValueError(f"{argument} must be in [0, 1), got {value!r}")
    return found


def at_least_one(value: Any, argument: str) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{argument} must be an int, got {type(value).__name__} {value!r}")
    if value < 1:
        raise ValueError(f"{argument} must be >= 1, got {value!r}")
    return int(value)


def is_bool(value: Any) -> bool:
    """Whether it is Python's or numpy's, which need not be installed."""
    kind = type(value)
    return kind is bool or (kind.__module__ == "numpy" and kind.__name__ in ("bool", "bool_"))
