"""AGC: a limit of each unit's gradient, relative to its weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..arguments import nonnegative
from ..distributed.declare import is_marked_sharded
from ..distributed.unwrap import has_whole_rows
from ..gradients.measure import measure
from ..gradients.pack import unit_tables
from ..gradients.table import GradTable
from .base import InPlaceRule, Needs, StepContext
from .coefficients import EPS
from .subset import Except, names_or_params


class AGC(InPlaceRule):
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

    needs = Needs(0)
    per_tensor = True

    def __init__(self, clip_factor: float = 0.01, eps: float = 1e-3, exclude: Any = ()) -> None:
        self.clip_factor = nonnegative(clip_factor, "clip_factor")
        self.eps = nonnegative(eps, "eps")
        left_alone = names_or_params(exclude, "exclude")
        self._but = _Excluding(AGC(clip_factor, eps), left_alone) if left_alone else None

    @property
    def needs_names(self) -> bool:  # type: ignore[override]
        return self._but is not None and self._but.needs_names

    def check(self, parameters: list[Tensor], names: tuple[str, ...] | None) -> None:
        if self._but:
            self._but.check(parameters, names)

    def check_gradients(self, context: StepContext) -> None:
        """NotImplementedError where a gradient is sparse, or its rows are not whole on this rank."""
        if self._but:
            self._but.check_gradients(context)
            return
        params = context.params()
        for i, p in enumerate(params.parameters):
            if p.grad is not None and p.grad.layout is not torch.strided:
                raise NotImplementedError("AGC does not support sparse gradients: it needs the norms of whole rows")
            if not has_whole_rows(p if p.grad is None else p.grad) or is_marked_sharded(p):
                name = params.names[i] if params.names else f"the parameter of shape {tuple(p.shape)}"
                raise NotImplementedError(
                    f"AGC needs the norms of whole rows, and those of {name} are split over ranks: leave it out by "
                    f"exclude=, or shard it along dimension 0 (of two or more)"
                )

    def apply_(self, table: GradTable, context: StepContext) -> Tensor:
        if self._but:
            return self._but.apply_(table, context)
        changed = torch.zeros((), dtype=torch.bool, device=table.device)
        for gradients, weights in unit_tables(table, context.params().parameters):
            coef = self.coefficients(measure(gradients, 2.0)[0].norms, measure(weights, 2.0)[0].norms)
            if context.skip is not None:
                coef = torch.where(context.skip.to(coef.device), 1.0, coef)
            gradients.apply_(coef)
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
