"""Rules that do what no coefficient of a tensor can: passes of their own over the gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..members import Members
from ..table import GradTable, Group, pack
from .chosen import Except, chosen
from .formula import EPS, nonnegative, number


class Value:
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

    norm_type = None
    in_place = True

    def __init__(self, limit: float, high: float | None = None) -> None:
        if high is None:
            self.high = nonnegative(limit, "limit")
            self.low = -self.high
        else:
            self.low, self.high = number(limit, "limit"), number(high, "high")
            if not self.low <= self.high:
                raise ValueError(f"limit must be <= high, got {limit!r} and {high!r}")

    def check_gradients(self, members: Members, step: int) -> None:
        """TypeError where a gradient is complex and there are two limits."""
        if self.low != -self.high and any(p.is_complex() for p in members.parameters):
            raise TypeError(f"{self!r} has two limits, and a complex gradient can only be limited by magnitude")

    def write_(self, table: GradTable, members: Members, skip: Tensor | None) -> Tensor:
        """Limit the gradients; [] bool, whether any was changed."""
        if skip is not None and bool(skip):  # the limits cannot wait on the device
            return torch.zeros((), dtype=torch.bool, device=table.device)
        return table.clamp_(self.low, self.high)

    def __repr__(self) -> str:
        return f"Value({self.high})" if self.low == -self.high else f"Value({self.low}, {self.high})"


class AGC:
    r"""Adaptive gradient clipping: limit the norm of each unit's gradient to a share of the norm of its weights.

    .. math:: g_u \leftarrow g_u \frac{M_u}{\max(\lVert g_u\rVert, 10^{-6})}
        \text{ where } \lVert g_u\rVert > M_u = \lambda \max(\lVert w_u\rVert, \epsilon)

    with u the rows of a tensor of two or more dimensions (its slices along dimension 0), and otherwise all of it. Brock
    et al. 2021, "High-Performance Large-Scale Image Recognition Without Normalization"; timm's ``adaptive_clip_grad``.
    A pass of its own, as `Value` is: it reads gradients and parameters once more and writes only the units it clips. A
    tensor whose rows are no pieces of memory (a transposed one) takes a view for each row, which is slow.

    Args:
        clip_factor: the share, >= 0; 0 sets all gradients to zero, inf leaves them.
        eps: the least norm of weights, >= 0, so that units of zeros can learn.
        exclude: parameters to leave alone, as :class:`Except` takes them: the paper leaves out the last layer.

    Raises:
        ValueError, TypeError: an argument of another kind, named with its value.
    """

    norm_type = None
    in_place = True

    def __init__(self, clip_factor: float = 0.01, eps: float = 1e-3, exclude: Any = ()) -> None:
        self.clip_factor = nonnegative(clip_factor, "clip_factor")
        self.eps = nonnegative(eps, "eps")
        left_alone = chosen(exclude, "exclude")
        self._but = _Excluding(AGC(clip_factor, eps), left_alone) if left_alone else None

    def check(self, parameters: list[Tensor], names: tuple[str, ...] | None) -> None:
        if self._but:
            self._but.check(parameters, names)

    def check_gradients(self, members: Members, step: int) -> None:
        """NotImplementedError where a gradient is sparse."""
        if self._but:
            self._but.check_gradients(members, step)
        elif any(p.grad is not None and p.grad.layout is not torch.strided for p in members.parameters):
            raise NotImplementedError("AGC does not support sparse gradients: it needs the norms of whole rows")

    def write_(self, table: GradTable, members: Members, skip: Tensor | None) -> Tensor:
        """Limit the units of the gradients; [] bool, whether any was changed."""
        if self._but:
            return self._but.write_(table, members, skip)
        parameters = members.parameters
        pairs: list[tuple[Group, Group]] = []
        for group in table.groups:
            pairs += _units(group, [parameters[p] for p in group.positions or range(len(group))])
        changed = torch.zeros((), dtype=torch.bool, device=table.device)
        for gradients, weights in pairs:
            power, weight_power = (g.backend.measure(g, 2.0).power for g in (gradients, weights))
            coef = self.coefficients(power.sqrt(), weight_power.sqrt())
            if skip is not None:
                coef = torch.where(skip.to(coef.device), 1.0, coef)
            gradients.backend.apply_(gradients, coef)
            changed = changed | (coef != 1).any().to(table.device)
        return changed

    def coefficients(self, norms: Tensor, weight_norms: Tensor) -> Tensor:
        """Of units, from the norms of their gradients and of their weights."""
        limit = self.clip_factor * weight_norms.clamp(min=self.eps)
        coef = torch.where(norms.isinf(), -0.0, limit / norms.clamp(min=EPS))
        return torch.where(norms > limit, coef, 1.0)

    def __repr__(self) -> str:
        but = f", exclude={self._but.shown()}" if self._but else ""
        return f"AGC({self.clip_factor}, eps={self.eps}{but})"


class _Excluding(Except):
    _argument = "exclude"


def _units(group: Group, parameters: list[Tensor]) -> list[tuple[Group, Group]]:
    """The rows of a group's gradients as groups, each with the rows of the same parameters.

    All in one where the memory of gradients and parameters can be cut that way; else tensor by tensor, as views.
    """
    weights = pack(parameters, gradients=True, write=False)
    if len(weights.groups) == 1 and len(weights) == len(group):
        rows, weight_rows = group.units(), weights.groups[0].units()
        if rows is not None and weight_rows is not None:
            return [(rows, weight_rows)]
    pairs = []
    for tensors in zip(group.tensors, parameters):
        views = [list(t.detach().unbind()) if t.dim() > 1 else [t.detach()] for t in tensors]
        if views[0]:
            packed = [pack(rows, gradients=True, write=False, argument="rows").groups[0] for rows in views]
            pairs.append((packed[0], packed[1]))
    return pairs
