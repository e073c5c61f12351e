"""Clippers for calls that a framework makes: it passes bare parameters and a limit, each time anew."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..arguments import checked_limit
from ..clipper import Clipper
from ..rules import GlobalNorm, Rule
from ..rules.base import norm_type_of
from ..rules.fixed import as_rule

Rules = Rule | float | Sequence[Any] | Callable[[Any], Any]


class ParameterSet:
    """A set of parameters that a framework clips together, with the Clipper that remembers what rules know of them.

    Attributes:
        clipper: holds the parameters from :meth:`Clippers.get` until its ``release_parameters()``.
        number: how many sets were there before it.
    """

    def __init__(self, clipper: Clipper, ids: list[int], asked: tuple[Any, ...], number: int) -> None:
        self.clipper, self.ids, self.asked, self.number = clipper, ids, asked, number
        self.names = clipper.names


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
        self, rule: Rules | None, names: Callable[[list[Tensor]], tuple[str, ...] | None] = lambda _: None
    ) -> None:
        self.rule, self._names = rule, names
        if rule is not None and not _is_function(rule):
            checked_rules(rule)
        self._sets = WeakTensorKeyDictionary()  # first parameter -> its ParameterSets; they hold no parameters
        self._made: list[weakref.ref[ParameterSet]] = []
        self._saved: dict[int, dict[str, Any]] = {}  # number of a set that is yet to come -> what it remembers

    def get(self, parameters: list[Tensor], max_norm: Any, norm_type: float) -> ParameterSet:
        """The set of these `parameters`, with rules for this limit. What they remember is carried over to the rules of
        another limit, if these are of the same kinds."""
        ids = list(map(id, parameters))
        sets: list[ParameterSet] = self._sets.setdefault(parameters[0], [])  # type: ignore[no-untyped-call]
        found = next((each for each in sets if each.ids == ids), None)
        asked = (max_norm, norm_type)
        if found is None:
            names, number = self._names(parameters), len(self._made)
            clipper = Clipper(list(zip(names, parameters)) if names else parameters, self._rules(max_norm, norm_type))
            if number in self._saved:
                clipper.load_state_dict(self._saved.pop(number))
            found = ParameterSet(clipper, ids, asked, number)
            self._made.append(weakref.ref(found))
            sets.append(found)
            return found
        clipper = found.clipper
        clipper.set_parameters(parameters, found.names)
        if (self.rule is None or _is_function(self.rule)) and not _same(asked, found.asked):
            rules = checked_rules(self._rules(max_norm, norm_type))
            if [type(rule) for rule in rules] == [type(rule) for rule in clipper.rules]:
                for rule, before in zip(rules, clipper.rules):
                    rule.load_state_dict(before.state_dict())
            clipper.rules, clipper.norm_type, found.asked = rules, norm_type_of(rules), asked
        return found

    def state_dict(self) -> dict[str, Any]:
        """What the rules of each set remember, in the order in which the sets came."""
        states = {str(number): state for number, state in self._saved.items()}
        for reference in self._made:
            if (found := reference()) is not None:
                states[str(found.number)] = found.clipper.state_dict()
        return states

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state; sets that are yet to come take theirs when they do.

        Raises:
            ValueError, KeyError: it was saved with another rule.
        """
        saved = {int(number): state for number, state in state_dict.items()}
        if not _is_function(self.rule):
            for state in saved.values():
                Clipper([], self._rules(1.0, 2.0)).load_state_dict(state)
        for reference in self._made:
            if (found := reference()) is not None and found.number in saved:
                found.clipper.load_state_dict(saved.pop(found.number))
        self._saved = saved

    def only_measures(self, max_norm: Any) -> bool:
        """Whether a call with this limit is one that only wants the norm, in which no rule takes the limit's place."""
        return self.rule is not None and isinstance(max_norm, (int, float)) and math.isinf(max_norm) and max_norm > 0

    def _rules(self, max_norm: Any, norm_type: float) -> Any:
        if self.rule is None:
            return GlobalNorm(checked_limit(max_norm, "max_norm"), norm_type)
        return self.rule(max_norm) if _is_function(self.rule) else copy.deepcopy(self.rule)


def checked_rules(rule: Any) -> list[Rule]:
    """`rule` as a Clipper takes it, as a list of rules."""
    rules = [as_rule(each) for each in rule] if isinstance(rule, (list, tuple)) else [as_rule(rule)]
    if not rules:
        raise ValueError(f"rule must not be an empty list, got {rule!r}")
    norm_type_of(rules)
    return rules


def _is_function(rule: Any) -> TypeGuard[Callable[[Any], Any]]:
    return callable(rule) and not isinstance(rule, (Rule, type))


def _same(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    """Whether limits are the same; a tensor, whose value may be on a device, only if it is the same tensor."""
    return all(
        a is b if isinstance(a, Tensor) or isinstance(b, Tensor) else type(a) is type(b) and a == b
        for a, b in zip(one, other)
    )
