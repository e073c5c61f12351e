"""Rules for some of the parameters."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..backends import upload
from ..gradients.pack import pack
from ..gradients.param_index import ParamIndex
from ..gradients.table import GradTable
from ..stats import Stats
from .base import Needs, Rule, StepContext
from .coefficients import checked
from .fixed import as_rule


class Only(Rule):
    """Another rule, for some of the parameters only; the others are left alone.

    The norm that `rule` sees is that of the chosen gradients alone. So a list of these gives each group of parameters a
    limit of its own, out of the same read and with the same one pass of writing::

        [Only(GlobalNorm(1.0), ["*.weight"]), Only(GlobalNorm(0.1), embedding.parameters())]

    Args:
        rule: a rule, a function of :class:`Stats`, or a number, which means ``GlobalNorm(number)``.
        which: names of parameters, as patterns of the shell (``"head.*"``; the Clipper must then have been given named
            parameters), or the parameters themselves; or a list of such.

    Raises:
        TypeError: `rule` or `which` is no such thing.
        ValueError: `which` is empty; from the Clipper, if a name matches no parameter, or `which` holds one that the
            Clipper has not.
    """

    _others = False  # whether `which` says whom to leave alone
    _argument = "which"

    def __init__(self, rule: Any, which: Any) -> None:
        self.rule = as_rule(rule)
        self.which = names_or_params(which, self._argument)
        if not self.which:
            raise ValueError(f"{self._argument} must not be empty, got {which!r}")

    @property
    def norm_type(self) -> float | None:  # type: ignore[override]
        return self.rule.norm_type

    @property
    def needs(self) -> Needs:  # type: ignore[override]
        # The norm of some of the gradients is put together from theirs.
        return self.rule.needs | Needs.TENSOR_NORMS if self.rule.needs & Needs.TOTAL_NORM else self.rule.needs

    @property
    def freezes(self) -> bool:  # type: ignore[override]
        return self.rule.freezes

    @property
    def per_tensor(self) -> bool:  # type: ignore[override]
        return self.rule.per_tensor

    @property
    def in_place(self) -> bool:  # type: ignore[override]
        return self.rule.in_place

    @property
    def needs_names(self) -> bool:  # type: ignore[override]
        return self.rule.needs_names or any(isinstance(item, str) for item in self.which)

    def check(self, parameters: list[Tensor], names: tuple[str, ...] | None) -> None:
        """ValueError unless everything in `which` is among the parameters of a Clipper."""
        self.rule.check(parameters, names)
        ids, all_names = set(map(id, parameters)), set(names or ())
        for item in self.which:
            if isinstance(item, Tensor):
                if id(item) not in ids:
                    raise ValueError(
                        f"{self._argument}: a tensor of shape {tuple(item.shape)} is no parameter of this Clipper"
                    )
            elif names is None:
                raise ValueError(f"{self._argument}: {item!r} is a name, so the Clipper needs model.named_parameters()")
            elif not (any(map(_matcher([item]), names)) if _is_pattern(item) else item in all_names):
                raise ValueError(
                    f"{self._argument}: no parameter is called {item!r}; the first ones are {', '.join(names[:5])}"
                )

    def _positions(self, params: ParamIndex) -> list[int]:
        """Of the chosen gradients among the T of a decision."""

        def make() -> list[int]:
            ids = {id(item) for item in self.which if isinstance(item, Tensor)}
            strings = [item for item in self.which if isinstance(item, str)]
            exact = {item for item in strings if not _is_pattern(item)}
            matches = _matcher(filter(_is_pattern, strings))

            def is_meant(i: int) -> bool:
                name = params.names[i] if params.names else ""
                return name in exact or bool(matches(name)) or any(id(p) in ids for p in params.owners[i])

            return [i for i in range(len(params.owners)) if is_meant(i) != self._others]

        return params.cached(self, make)

    def decide(self, stats: Stats, context: StepContext) -> Tensor:
        params = context.params()
        positions = self._positions(params)
        if not positions and not stats.is_over_ranks():  # where another stage may have some
            return torch.ones((), dtype=torch.float64, device=stats.device)
        index = params.cached_on(stats.device, self, lambda: upload(positions, torch.int64, stats.device))
        inner = context.only(index, params.only(self, positions))
        coef = checked(self.rule.decide(stats.only(index), inner), self.rule, len(positions), stats.device)
        all_ones = torch.ones(stats.count, dtype=torch.float64, device=stats.device)
        return all_ones.index_copy_(0, index, coef.expand(len(positions)))

    def apply_(self, table: GradTable, context: StepContext) -> Tensor:
        chosen = self._chosen(context.params())
        inner = StepContext(context.step, context.skip, context.inv_scale, lambda: chosen)
        return self.rule.apply_(pack(chosen.parameters, gradients=False, write=True), inner).to(table.device)

    def check_gradients(self, context: StepContext) -> None:
        chosen = self._chosen(context.params())
        self.rule.check_gradients(StepContext(context.step, context.skip, context.inv_scale, lambda: chosen))

    def _chosen(self, params: ParamIndex) -> ParamIndex:
        return params.only(self, self._positions(params))

    def check_capture(self) -> None:
        self.rule.check_capture()

    def init_state(self, device: torch.device, count: int) -> None:
        self.rule.init_state(device, count)

    def state_dict(self) -> dict[str, Any]:
        return self.rule.state_dict()

    def check_state_dict(self, state: dict[str, Any]) -> None:
        self.rule.check_state_dict(state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rule.load_state_dict(state)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.rule}, {self.shown()})"

    def shown(self) -> list[Any]:
        return [item if isinstance(item, str) else tuple(item.shape) for item in self.which]


class Except(Only):
    """Another rule, for all parameters but some, which are left alone and do not count in its norm.

    Args and Raises: as :class:`Only`; `which` are those left alone.
    """

    _others = True


def bare_rule(rule: Rule) -> Rule:
    """The rule itself, of one that is for some of the parameters."""
    while isinstance(rule, Only):
        rule = rule.rule
    return rule


def _is_pattern(name: str) -> bool:
    """Whether it may match another name than itself."""
    return any(c in name for c in "*?[")


def _matcher(patterns: Iterable[str]) -> Callable[[str], Any]:
    """Whether a name matches one of `patterns`, as ``fnmatch.fnmatchcase`` has it, in one search for all of them."""
    either = "|".join(map(fnmatch.translate, patterns))
    return re.compile(either).match if either else lambda name: False


def names_or_params(which: Any, argument: str) -> list[Any]:
    """Names and parameters as a list; TypeError if it is anything else."""
    items = [which] if isinstance(which, (str, Tensor)) else which
    if not isinstance(items, Iterable):
        raise TypeError(f"{argument} must be names or parameters, got {type(which).__name__} {which!r}")
    items = list(items)
    for item in items:
        if not isinstance(item, (str, Tensor)):
            raise TypeError(f"{argument} must hold names or parameters, got {type(item).__name__} {item!r}")
    return items
