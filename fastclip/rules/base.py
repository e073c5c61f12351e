"""What a rule is. Copy :class:`~fastclip.rules.TensorNorm` to begin one of your own; CONTRIBUTING.md has a template.

A rule maps the statistics of one read of the gradients to coefficients, on the device and without reading a value back
to the host. It never sees a gradient. One that does what no coefficient can is an :class:`InPlaceRule`.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Flag, auto
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    import torch

    from ..gradients.param_index import ParamIndex
    from ..gradients.table import GradTable
    from ..stats import Stats


class Needs(Flag):
    """What a rule looks at, and so what must be known, over all ranks, before it decides."""

    TOTAL_NORM = auto()  # stats.norm
    TENSOR_NORMS = auto()  # stats.norms, stats.power
    ABSMAX = auto()  # stats.absmax
    SIZES = auto()  # context.sizes()
    EVERYTHING = TOTAL_NORM | TENSOR_NORMS | ABSMAX | SIZES


class StepContext:
    """What is known of a step besides the statistics of its gradients.

    Attributes:
        step: how many steps the Clipper has taken before this one.
        skip: [] bool on the statistics' device, whether nothing will be done; None: it will.
        inv_scale: [] float64, what the gradients are multiplied by before any rule (unscaling, averaging); None: 1.
        found_inf: [] bool, whether a GradScaler has found an inf, on any rank; None: it has not looked.
        limit: [] or a number, the limit of the norm of all gradients, which a rule that has one sets when it decides.
    """

    def __init__(
        self,
        step: int = 0,
        skip: Tensor | None = None,
        inv_scale: Tensor | None = None,
        params: Callable[[], ParamIndex] | None = None,
        sizes: Callable[[], Tensor] | None = None,
    ) -> None:
        self.step, self.skip, self.inv_scale = step, skip, inv_scale
        self.limit: Tensor | float | None = None
        self.found_inf: Tensor | None = None
        self._params, self._sizes = params, sizes
        self._index: ParamIndex | None = None

    @property
    def knows_params(self) -> bool:
        """Whether :meth:`params` can tell: in a Clipper, but not in a function that was given only gradients."""
        return self._params is not None

    def params(self) -> ParamIndex:
        """The parameters that the gradients belong to. RuntimeError where only tensors are known."""
        if self._index is None:
            if self._params is None:
                raise RuntimeError("this rule needs to know the parameters: use it in a Clipper")
            self._index = self._params()
        return self._index

    def begin_rules(self, skip: Tensor | None, sizes: Callable[[], Tensor]) -> None:
        """Set what is known once the gradients have been read and the rules begin to decide."""
        self.skip, self._sizes = skip, sizes

    def sizes(self) -> Tensor:
        """[T] float64 on the statistics' device, how many elements each gradient has."""
        if self._sizes is None:
            raise RuntimeError("sizes() is known only while the rules decide")
        return self._sizes()

    def only(self, index: Tensor, params: ParamIndex) -> StepContext:
        """The context of the gradients at `index` ([K] int64), those of `params`, alone."""
        return StepContext(self.step, self.skip, self.inv_scale, lambda: params, lambda: self.sizes()[index])


class Rule:
    """From statistics to coefficients. Only :meth:`decide` must be written; everything else has a default.

    Attributes:
        norm_type: p of the p-norms that it needs; None: it needs none, or takes any.
        needs: which statistics it looks at, and whether at ``context.sizes()``.
        freezes: whether a coefficient of 0 also keeps the parameter as it is, in :meth:`fastclip.Clipper.step`.
        finite_zero: whether a coefficient for all gradients is +0 only where all are finite, so that multiplying by 0
            gives the zeros that +0 stands for.
        in_place: whether it is an :class:`InPlaceRule`, or stands for one.
        needs_names: whether it goes by the names of parameters, which the Clipper must then have been given.
        per_tensor: whether what it does to a gradient depends on nothing but that gradient, its parameter, and what the
            rule remembers of these: it may then be asked about a few of them at a time, as a step inside backward does.
    """

    norm_type: float | None = None
    needs: Needs = Needs.EVERYTHING
    freezes: bool = False
    finite_zero: bool = False
    in_place: bool = False
    needs_names: bool = False
    per_tensor: bool = False

    def decide(self, stats: Stats, context: StepContext) -> Tensor | float:
        """What the gradients are to be multiplied by.

        1 leaves a gradient alone (neither read nor written), +0 writes zeros without reading it, -0 multiplies by 0 (so
        that inf becomes NaN), anything else multiplies. Must not read a value back to the host, nor change later what
        it returned. What it remembers, it remembers in here.

        Returns:
            [] (for all) or [T] (for each), floating point, on ``stats.device``; or a number, for all.
        """
        raise NotImplementedError

    def apply_(self, table: GradTable, context: StepContext) -> Tensor:
        """An :class:`InPlaceRule`'s own pass."""
        raise NotImplementedError

    def static_limit(self, step: int) -> float | None:
        """The limit in step `step`, if the host knows it and the rule is ``GlobalNorm`` with that limit: a backend may
        then compute the coefficient as it measures. None for every other rule."""
        return None

    def check(self, parameters: list[Tensor], names: tuple[str, ...] | None) -> None:
        """ValueError if the rule names a parameter that is not among these."""

    def check_gradients(self, context: StepContext) -> None:
        """Raise, before anything is written, what the rule would complain about in its turn."""

    def check_capture(self) -> None:
        """RuntimeError if a CUDA graph would keep a value that the host computes anew in every step."""

    def init_state(self, device: torch.device, count: int) -> None:
        """Make what the rule will remember, as a first step would, for `count` parameters."""

    def reorder(self, came_from: list[int]) -> None:
        """Let what is remembered of a parameter follow it: the i-th one now was the came_from[i]-th; -1: it is new.

        Not asked of an ``Only``, but once of the rule inside, which several may share.
        """

    def state_dict(self) -> dict[str, Any]:
        """What the rule remembers, as tensors by name (copies); empty if nothing."""
        return {}

    def check_state_dict(self, state: dict[str, Any]) -> None:
        """ValueError unless ``load_state_dict`` could take `state`."""
        if state:
            raise ValueError(
                f"state_dict has {', '.join(state)} for the rule {self!r}, which has no state{saved_by(state)}"
            )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state; an empty one: begin anew."""
        self.check_state_dict(state)


class InPlaceRule(Rule):
    """A rule that does what no coefficient of a tensor can: :meth:`apply_` is a pass of its own over the gradients."""

    in_place = True

    def apply_(self, table: GradTable, context: StepContext) -> Tensor:
        """Change the gradients of `table`, unless ``context.skip``; [] bool on its device, whether any was changed."""
        raise NotImplementedError


class FunctionRule(Rule):
    """A function of :class:`~fastclip.Stats` that returns coefficients, as a rule."""

    def __init__(self, function: Callable[[Stats], Tensor | float]) -> None:
        self.function = function

    def decide(self, stats: Stats, context: StepContext) -> Tensor | float:
        return self.function(stats)

    def __repr__(self) -> str:
        return repr(self.function)


def norm_type_of(rules: list[Rule]) -> float:
    """The one norm type that `rules` need; 2 if they need none. ValueError if they disagree: a read gives one norm."""
    types = {rule.norm_type for rule in rules if rule.norm_type is not None}
    if len(types) > 1:
        raise ValueError(f"rule: all rules of a list must use the same norm_type, got {sorted(types)} in {rules}")
    return types.pop() if types else 2.0


STATES = {"ZClip": ("count", "mean", "var"), "AutoClip": ("count", "history"), "AdaGC": ("count", "gamma")}


def saved_by(state: dict[str, Any]) -> str:
    """For a complaint about `state`: which rule saved it, and what to do."""
    owner = next((rule for rule, names in STATES.items() if set(state) == set(names)), None)
    if owner is None:
        return ""
    return f". It was saved by {owner}: use that rule, or put {{}} in its place to begin anew"
