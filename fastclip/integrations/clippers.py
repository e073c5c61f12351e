"""Clippers for calls that a framework makes: it passes bare parameters and a limit, each time anew."""

from __future__ import annotations

import copy
import math
import numbers
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor

from ..arguments import checked_limit, is_bool
from ..clipper import Clipper
from ..rules import GlobalNorm, Rule
from ..rules.base import norm_type_of
from ..rules.fixed import as_rule

RuleSpec = Rule | float | Sequence[Any] | Callable[[Any], Any]  # what users pass as `rule`


class ParameterSet:
    """Parameters that a framework clips together, with the Clipper that remembers what rules know of them.

    A framework may leave out those that have no gradient, so the set holds all that have come so far. It keeps none of
    them alive: the Clipper has them only between :meth:`lend` and its ``release_parameters()``.

    Attributes:
        clipper: the Clipper.
        lock: to be held meanwhile.
    """

    def __init__(self, clipper: Clipper, owner: Clippers, arguments: tuple[Any, ...]) -> None:
        self.clipper = clipper
        self.lock = threading.RLock()
        self._owner, self._names = owner, clipper.names
        self._arguments = arguments  # (max_norm, norm_type) that its rules were made for
        self._references: list[weakref.ref[Tensor]] = []
        self._passed: list[int] = []  # ids of the parameters of the last call
        self._remember(clipper.parameters, clipper.parameters)

    def is_alive(self) -> bool:
        return any(reference() is not None for reference in self._references)

    def is_as_before(self, parameters: list[Tensor]) -> bool:
        """Whether these are the parameters of the last call, and there are no others."""
        same_first = len(parameters) == len(self._references) and self._references[0]() is parameters[0]
        return same_first and self._passed == list(map(id, parameters))

    def is_of(self, parameters: list[Tensor]) -> bool:
        """Whether these are the set's, but for new ones and for those that have no gradient now."""
        present = {id(p): p for p in self._parameters() if p is not None}
        given = set(map(id, parameters))
        missing = [p for key, p in present.items() if key not in given]
        shared = len(present) - len(missing)
        return 2 * shared >= min(len(given), len(present)) and all(p.grad is None for p in missing)

    def lend(self, parameters: list[Tensor], max_norm: Any, norm_type: float) -> Clipper:
        """The Clipper with the set's parameters, `parameters` among them, and with rules for this limit. What they
        remember is carried over to the rules of another limit, if these are of the same kinds."""
        clipper, owner, arguments = self.clipper, self._owner, (max_norm, norm_type)
        if not self.is_as_before(parameters):
            earlier = self._parameters()
            present = [p for p in earlier if p is not None]
            ids = set(map(id, present))
            everything = [*present, *(p for p in parameters if id(p) not in ids)]
            if len(everything) == len(parameters):
                everything = parameters  # in the order in which they come
            clipper.parameters = [torch.empty(0) if p is None else p for p in earlier]  # so that memory can follow
            self._names = owner.names(everything)
            clipper.set_parameters(everything, self._names)
            self._remember(everything, parameters)
        else:
            clipper.set_parameters(parameters, self._names)
        if owner.depends_on_limit and not _same(arguments, self._arguments):
            rules = checked_rules(owner.rules(max_norm, norm_type, parameters))
            if [type(rule) for rule in rules] == [type(rule) for rule in clipper.rules]:
                for rule, before in zip(rules, clipper.rules):
                    rule.load_state_dict(before.state_dict())
            clipper.rules, clipper.norm_type, self._arguments = rules, norm_type_of(rules), arguments
        return clipper

    def _parameters(self) -> list[Tensor | None]:
        return [reference() for reference in self._references]

    def _remember(self, parameters: list[Tensor], passed: list[Tensor]) -> None:
        self._references, self._passed = list(map(weakref.ref, parameters)), list(map(id, passed))


class Clippers:
    """One Clipper for each set of parameters that comes along, each with a copy of the rule.

    Args:
        rule: what takes the place of the limit that the framework passes: a rule, a number, a list of such, or a
            function from the passed limit to one of these. None: the passed limit is that of ``GlobalNorm``.
        names: -> the names of parameters, or None.

    Raises:
        TypeError, ValueError: `rule` is of another kind.
    """

    def __init__(
        self, rule: RuleSpec | None, names: Callable[[list[Tensor]], tuple[str, ...] | None] | None = None
    ) -> None:
        self.rule = rule
        self.names = names or (lambda parameters: None)
        self.depends_on_limit = rule is None or _is_function(rule)
        if not self.depends_on_limit:
            for each in checked_rules(rule):
                if names is None and each.needs_names:
                    raise ValueError(f"rule: {each} goes by names of parameters, which are not known here")
        self._sets: list[ParameterSet] = []  # in the order in which they came
        self._saved: list[dict[str, Any]] = []  # what sets that are yet to come remember
        self._lock = threading.Lock()

    def find(self, parameters: list[Tensor], max_norm: Any, norm_type: float) -> ParameterSet:
        """The set of these `parameters`; a new one has rules for this limit."""
        with self._lock:
            for each in self._sets:
                if each.is_as_before(parameters):
                    return each
            self._sets = [each for each in self._sets if each.is_alive()]
            for each in self._sets:
                if each.is_of(parameters):
                    return each
            names = self.names(parameters)
            clipper = Clipper(
                list(zip(names, parameters)) if names else parameters, self.rules(max_norm, norm_type, parameters)
            )
            if self._saved:
                _load(clipper, self._saved.pop(0))
            self._sets.append(ParameterSet(clipper, self, (max_norm, norm_type)))
            return self._sets[-1]

    def is_first(self, parameter_set: ParameterSet) -> bool:
        """Whether it came before all others that there still are."""
        return next((each for each in self._sets if each.is_alive()), None) is parameter_set

    def state_dict(self) -> dict[str, Any]:
        """What the rules of each set remember, in the order in which the sets came."""
        states = [each.clipper.state_dict() for each in self._sets if each.is_alive()]
        return {"sets": states + self._saved}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state; sets that are yet to come take theirs when they do. Rules that remembered nothing
        may have become others.

        Raises:
            ValueError, KeyError: it was saved with another rule.
        """
        saved = list(state_dict["sets"])
        if not self.depends_on_limit:
            for state in saved:
                _load(Clipper([], self.rules(1.0, 2.0)), state)
        with self._lock:
            for each in filter(ParameterSet.is_alive, self._sets):
                if saved:
                    _load(each.clipper, saved.pop(0))
            self._saved = saved

    def only_measures(self, max_norm: Any) -> bool:
        """Whether a call with this limit is one that only wants the norm, in which no rule takes the limit's place."""
        return self.rule is not None and isinstance(max_norm, (int, float)) and math.isinf(max_norm) and max_norm > 0

    def rules(self, max_norm: Any, norm_type: float, parameters: Sequence[Tensor] = ()) -> Any:
        """The rules for a limit; numbers among them limit the norm that the framework asks for."""
        if self.rule is None:
            return GlobalNorm(checked_limit(max_norm, "max_norm"), norm_type)
        shared = {id(p): p for p in parameters}  # which a rule may name
        rule = self.rule(max_norm) if _is_function(self.rule) else copy.deepcopy(self.rule, shared)
        if isinstance(rule, (list, tuple)):
            return [_with_norm_type(each, norm_type) for each in rule]
        return _with_norm_type(rule, norm_type)


def checked_rules(rule: Any) -> list[Rule]:
    """`rule` as the list of rules that it means; TypeError or ValueError if it means none."""
    rules = [as_rule(each) for each in rule] if isinstance(rule, (list, tuple)) else [as_rule(rule)]
    if not rules:
        raise ValueError(f"rule must not be an empty list, got {rule!r}")
    norm_type_of(rules)
    return rules


def _with_norm_type(rule: Any, norm_type: float) -> Any:
    return GlobalNorm(rule, norm_type) if isinstance(rule, numbers.Real) and not is_bool(rule) else rule  # type: ignore[arg-type]


def _is_function(rule: Any) -> TypeGuard[Callable[[Any], Any]]:
    return callable(rule) and not isinstance(rule, (Rule, type))


def _load(clipper: Clipper, state: dict[str, Any]) -> None:
    if not any(state["rules"]):  # which nothing is lost of
        state = {**state, "rules": [{} for _ in clipper.rules]}
    clipper.load_state_dict(state)


def _same(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    """Whether limits are the same; a tensor, whose value may be on a device, only if it is the same tensor."""
    return all(
        a is b if isinstance(a, Tensor) or isinstance(b, Tensor) else type(a) is type(b) and a == b
        for a, b in zip(one, other)
    )
