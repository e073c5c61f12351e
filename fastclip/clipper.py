"""Measure, decide, apply: the pipeline, and the object that keeps a model's parameters and rules together."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .backends import upload
from .rules import GlobalNorm, Rule, Value, clip_coefficient, combined, norm_type_of
from .stats import Stats, measure
from .table import GradTable, identity, listed, pack


class Clipper:
    """Clips the gradients of a set of parameters by a rule.

    Args:
        parameters: as torch.optim takes them: an iterable of tensors, of parameter-group dicts, or of (name, tensor)
            pairs such as ``model.named_parameters()``.
        rule: a :mod:`fastclip.rules` rule, a function from :class:`Stats` to coefficients, a list of such (run in
            order, each seeing what those before it leave), or a number, which means ``GlobalNorm(number)``.

    Raises:
        TypeError, ValueError: an argument of another kind, named with its value.

    Example:
        >>> clipper = fastclip.Clipper(model.named_parameters(), 1.0)
        >>> loss.backward()
        >>> stats = clipper.clip_()
        >>> optimizer.step()
    """

    def __init__(self, parameters: Iterable[Any] | Tensor, rule: Rule | list[Rule] | float) -> None:
        self.parameters, self.names = _named(listed(parameters))
        self.rules = [_rule(r) for r in rule] if isinstance(rule, (list, tuple)) else [_rule(rule)]
        if not self.rules:
            raise ValueError(f"rule must not be an empty list, got {rule!r}")
        self.norm_type = norm_type_of(self.rules)

    def clip_(self) -> Stats:
        """Clip the gradients in place; what they were before, and what was done, as :class:`Stats`.

        Raises:
            TypeError, ValueError, RuntimeError, NotImplementedError: a gradient that cannot be clipped, before any is
                changed; or a rule that returns no coefficients, before anything that comes after the last `Value`.
        """
        table = pack(self.parameters, gradients=False, write=True)
        stats = clip(table, self.rules, self.norm_type)
        if self.names is not None:
            stats.names = self._names_of(len(table))
        return stats

    def _names_of(self, count: int) -> tuple[str, ...]:
        assert self.names is not None
        if count == len(self.names):
            return self.names
        distinct: dict[Any, str] = {}
        for name, parameter in zip(self.names, self.parameters):
            if parameter.grad is not None:
                distinct.setdefault(identity(parameter.grad), name)
        return tuple(distinct.values())

    def __repr__(self) -> str:
        return f"Clipper({len(self.parameters)} parameters, {self.rules})"


def clip(table: GradTable, rules: list[Any], norm_type: float, check: Callable[[Stats], None] | None = None) -> Stats:
    """Run `rules` over the table's gradients: one read, one decision, at most one pass of writing per coefficient rule
    or run of them. `check` sees the statistics before anything is written and may raise."""
    fused = rules[0] if len(rules) == 1 and type(rules[0]) is GlobalNorm else None
    before, coef = measure(table, norm_type, fused.max_norm if fused else None)
    if check:
        check(before)
    if not len(table):
        return before.decided(torch.ones((), dtype=torch.float64, device=table.device))
    if coef is not None:
        apply_(table, coef)
        return before.decided(coef)

    stats: Stats | None = before
    overall: Tensor | None = None
    clamped: Tensor | None = None
    for rule in rules:
        if isinstance(rule, Value):
            if coef is not None:
                apply_(table, coef)
                coef = None
            changed = clamp_(table, rule.low, rule.high)
            clamped = changed if clamped is None else clamped | changed
            stats = None  # what the next rule needs must be read again
        else:
            if stats is None:
                stats, _ = measure(table, norm_type)
            factor = _coefficients(rule, stats)
            coef = factor if coef is None else combined(coef, factor)
            overall = factor if overall is None else combined(overall, factor)
            stats = stats.scaled(factor)
    if coef is not None:
        apply_(table, coef)
    if overall is None:
        overall = torch.ones((), dtype=torch.float64, device=table.device)
    return before.decided(overall, clamped)


def clip_by_norm(table: GradTable, norm: Tensor, max_norm: float) -> None:
    """Scale every gradient by the clip coefficient of a norm measured elsewhere."""
    if norm.device.type == "cpu":
        norm = upload(norm.detach(), torch.float64, table.device)
    apply_(table, clip_coefficient(norm.to(table.device, torch.float64), max_norm))


def refuse_nonfinite(stats: Stats) -> None:
    """A check for :func:`clip`: RuntimeError unless the norm is finite. Reads it back to the host."""
    if not stats.norm.isfinite():
        raise RuntimeError(
            f"the total norm of order {stats.norm_type} of the gradients is {stats.norm.item()}, so they cannot be "
            f"clipped by it; nothing was changed. Set error_if_nonfinite=False to scale by it anyway"
        )


def apply_(table: GradTable, coef: Tensor) -> None:
    """Multiply every gradient by its coefficient: float64, [] or [T], on the table's device."""
    for group in table.groups:
        mine = coef
        if len(table.groups) > 1 and coef.dim() == 1:
            mine = coef[upload(group.positions, torch.int64, coef.device)]
        group.backend.apply_(group, mine.to(group.device).contiguous())


def clamp_(table: GradTable, low: float, high: float) -> Tensor:
    """Limit every element to [low, high]; [] bool on the table's device, whether anything was changed."""
    changed = torch.zeros((), dtype=torch.bool, device=table.device)
    for group in table.groups:
        changed = changed | group.backend.clamp_(group, low, high).to(table.device)
    return changed


def _coefficients(rule: Rule, stats: Stats) -> Tensor:
    factor = rule(stats)
    if not isinstance(factor, Tensor) or factor.shape not in ((), (stats.count,)):
        got = f"a tensor of shape {tuple(factor.shape)}" if isinstance(factor, Tensor) else repr(factor)
        raise TypeError(f"rule {rule!r} must return a tensor of shape [] or [{stats.count}], got {got}")
    return factor.detach().to(stats.device, torch.float64)


def _rule(rule: Any) -> Any:
    if isinstance(rule, Value) or (callable(rule) and not isinstance(rule, type)):
        return rule
    if isinstance(rule, numbers.Real) and not isinstance(rule, bool):
        return GlobalNorm(float(rule))
    raise TypeError(f"rule must be a rule, a list of rules or a number, got {type(rule).__name__} {rule!r}")


def _named(items: list[Any]) -> tuple[list[Tensor], tuple[str, ...] | None]:
    pairs = [isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str) for item in items]
    if any(pairs) and not all(pairs):
        raise ValueError(f"parameters must be all named or all unnamed; parameters[{pairs.index(False)}] is not a pair")
    names = tuple(item[0] for item in items) if items and all(pairs) else None
    tensors = [item[1] for item in items] if names else items
    for i, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"parameters[{i}] must be a tensor, got {type(tensor).__name__} {tensor!r}")
    return tensors, names
