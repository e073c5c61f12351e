"""What rules are made of: coefficients, and the arguments they check."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import Tensor

from ..stats import is_zero

EPS = 1e-6  # torch's, in the denominator of the clip coefficient


def clip_coefficient(norm: Tensor, max_norm: float | Tensor) -> Tensor:
    """min(1, max_norm / (norm + 1e-6)) in float64; 1 for an infinite `max_norm`, -0.0 for an infinite norm.

    -0.0 multiplies where +0.0 writes zeros: torch scales by 0 there, which leaves NaN where inf was. Never negative: a
    negative number in a tensor, which nobody has looked at, counts as 0.
    """
    if not isinstance(max_norm, Tensor) and math.isinf(max_norm):
        return torch.ones_like(norm)
    coef = torch.where(norm == math.inf, -0.0, (max_norm / (norm + EPS)).clamp(0.0, 1.0))
    return torch.where(max_norm == math.inf, 1.0, coef) if isinstance(max_norm, Tensor) else coef


def within(norm: Tensor, limit: Tensor) -> Tensor:
    """1 / max(1, norm / limit): as :func:`clip_coefficient`, without its 1e-6."""
    return torch.where(norm <= limit, 1.0, torch.where(norm == math.inf, -0.0, limit / norm))


def combined(coef: Tensor | None, factor: Tensor) -> Tensor:
    """The coefficient that does what `coef` (None: 1) and then `factor` do: +0 writes zeros, all else multiplies."""
    if coef is None:
        return factor
    product = coef * factor
    vanished = product == 0
    zeroes = is_zero(factor) | (is_zero(coef) & vanished)  # where zeros were written, inf and NaN are NaN again
    return torch.where(zeroes, 0.0, torch.where(vanished, -0.0, product))


def checked(factor: Any, rule: Any, count: int) -> Tensor:
    """What `rule` returned, as float64; TypeError unless it is a tensor of shape [] or [count]."""
    if not isinstance(factor, Tensor) or factor.shape not in ((), (count,)):
        got = f"a tensor of shape {tuple(factor.shape)}" if isinstance(factor, Tensor) else repr(factor)
        raise TypeError(f"rule {rule!r} must return a tensor of shape [] or [{count}], got {got}")
    return factor.detach().double()


# ---- rules as objects ----


def norm_type_of(rules: list[Any]) -> float:
    """The one norm type that `rules` need; 2 if they need none. ValueError if they disagree: a read gives one norm."""
    types = {rule.norm_type for rule in rules if getattr(rule, "norm_type", None) is not None}
    if len(types) > 1:
        raise ValueError(f"rule: all rules of a list must use the same norm_type, got {sorted(types)} in {rules}")
    return types.pop() if types else 2.0


def state_of(rule: Any) -> dict[str, Any]:
    """The running statistics of a rule; empty if it has none."""
    return rule.state_dict() if hasattr(rule, "state_dict") else {}


def check_state(rule: Any, state: dict[str, Any]) -> None:
    """ValueError unless `state` is one that `rule` can load."""
    if hasattr(rule, "check_state_dict"):
        rule.check_state_dict(state)
    elif state and not hasattr(rule, "load_state_dict"):
        raise ValueError(f"state_dict has {', '.join(state)} for the rule {rule!r}, which has no state{whose(state)}")


STATES = {"ZClip": ("count", "mean", "var"), "AutoClip": ("count", "history"), "AdaGC": ("count", "gamma")}


def whose(state: dict[str, Any]) -> str:
    """For a complaint about `state`: which rule saved it, and what to do."""
    owner = next((rule for rule, names in STATES.items() if set(state) == set(names)), None)
    if owner is None:
        return ""
    return f". It was saved by {owner}: use that rule, or put {{}} in its place to begin anew"


# ---- arguments ----


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
