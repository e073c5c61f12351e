"""Clipper: a model's parameters, the rules that clip their gradients, and what is done about broken ones."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, compiler

from . import backends
from .arguments import checked_norm
from .backends import Measurement, NativeGroup, added, loaded
from .distributed.declare import MARKED
from .distributed.groups import checked_group
from .distributed.plan import warm_up
from .gradients.in_backward import BackwardSums
from .gradients.measure import read
from .gradients.pack import flatten_params, from_native, pack, same_items
from .gradients.param_index import ParamIndex, check_names, named
from .gradients.table import GradTable
from .pipeline.amp import GradScalerState, count_unscaling, flag
from .pipeline.decide import ClipDecision, decide
from .pipeline.step import (
    DecidedStep,
    TakesDecision,
    check_optimizer,
    covers,
    has_post_hooks,
    prepare,
    step_inside,
    undo_after_step,
    unwrapped,
)
from .rules.base import Needs, StepContext, norm_type_of
from .rules.fixed import as_rule
from .rules.subset import bare_rule
from .stats import Stats

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

NONFINITE = ("propagate", "skip", "zero", "raise")


class Clipper:
    """Clips the gradients of a set of parameters by a rule, in place or inside an optimizer's step.

    Args:
        parameters: as torch.optim takes them: an iterable of tensors, of parameter-group dicts, or of (name, tensor)
            pairs such as ``model.named_parameters()``; in an order, so no set.
        rule: one of ``fastclip.rules``, a function from :class:`Stats` to coefficients, a list of such (run in
            order, each seeing what those before it leave), or a number, which means ``GlobalNorm(number)``.
        nonfinite: what to do when a gradient holds an inf or a NaN: ``"propagate"`` it as torch does; ``"skip"`` (the
            gradients stay as they are, and :meth:`step` leaves the parameters as they are); ``"zero"`` the elements
            concerned before anything else, whether or not the step is skipped; or ``"raise"`` before anything is
            changed, which reads a flag back to the host at every call. Whatever it is, a norm that is not finite enters
            no rule's running statistics.
        process_group: of ranks that hold other parameters of the same model, as pipeline stages do; see
            :func:`fastclip.clip_norm_`. All of them must call whatever one of them calls.
        tensor_stats: with gradients that are sharded over ranks, also sum the statistics of each tensor over them
            (``stats.tensor_norms``, ``tensor_absmax``, ``nonfinite``), which a monitor shows, where no rule needs them.
            Without ranks they are always there.
        measure_in_backward: read each gradient while backward runs, as soon as it is there, so that :meth:`clip_` and
            :meth:`step` need not: on a CPU while it is still in the cache, on a GPU on a stream of its own. A gradient
            that is another one by then, or was written since, is read again, so the numbers are those of a read. That
            a gradient was written is seen as autograd sees it, by its version, which writes through ``.data``,
            ``.numpy()``, DLPack or a storage, by ``torch.distributed`` and by kernels of others do not change: where
            gradients are changed in one of these ways between backward and the clip, leave this out. (GradScaler's
            ``unscale_`` is seen; the unscaling in its ``step`` of a fused optimizer is not.) It has no use once
            ``torch.distributed`` is initialized: DDP changes gradients later, and writes of DTensors (FSDP2) do not
            all tell. Nor in a CUDA graph. With several backward passes a step, each reads the gradients.

    Attributes:
        steps: how often :meth:`clip_` and :meth:`step` have decided.
        skips: [] int64 on the gradients' device, how many of those changed nothing because of ``nonfinite="skip"``,
            `when` or a GradScaler. None before the first step that might.
        zeroed: [] int64 there, how many elements ``nonfinite="zero"`` has set to 0. None before the first step.

    Raises:
        TypeError, ValueError: an argument of another kind, named with its value; two different parameters of one name.

    Under make_fx and FakeTensorMode :meth:`clip_` and :meth:`step` raise NotImplementedError.

    Example:
        >>> clipper = fastclip.Clipper(model.named_parameters(), 1.0)
        >>> loss.backward()
        >>> stats = clipper.step(optimizer)  # or: stats = clipper.clip_(); optimizer.step()
    """

    def __init__(
        self,
        parameters: Iterable[Any] | Tensor,
        rule: Any,
        *,
        nonfinite: str = "propagate",
        process_group: ProcessGroup | DeviceMesh | None = None,
        tensor_stats: bool = False,
        measure_in_backward: bool = False,
    ) -> None:
        self.parameters, self.names = named(flatten_params(parameters, ordered=True))
        self.rules = [as_rule(r) for r in rule] if isinstance(rule, (list, tuple)) else [as_rule(rule)]
        if not self.rules:
            raise ValueError(f"rule must not be an empty list, got {rule!r}")
        self.norm_type = norm_type_of(self.rules)
        if nonfinite not in NONFINITE:
            raise ValueError(f"nonfinite must be one of {', '.join(NONFINITE)}, got {nonfinite!r}")
        self.nonfinite = nonfinite
        self.process_group = process_group if process_group is None else checked_group(process_group, "process_group")
        self.tensor_stats = tensor_stats
        self._read_first = nonfinite != "zero" and not any(r.in_place or r.needs & Needs.SIZES for r in self.rules)
        self._wrote = False  # whether the last clip_() may have written
        self.steps = 0
        self.skips: Tensor | None = None
        self.zeroed: Tensor | None = None
        self._params: ParamIndex | None = None
        if self.parameters:
            self._check_rules(self.parameters, self.names)
        self._sums = BackwardSums(self.norm_type) if measure_in_backward else None
        self._watch()

    def _watch(self) -> None:
        """Measure the gradients in backward, if they are to be: of the parameters that require one now."""
        if self._sums is not None:
            count_unscaling()
            self._sums.watch(self.parameters)

    def set_parameters(self, parameters: list[Tensor], names: tuple[str, ...] | None) -> None:
        """Go on with other parameters. What rules remember of a parameter stays with it; a new one starts anew.

        Raises:
            ValueError: a rule names a parameter that is not among them, or two have one name; nothing is changed then.
        """
        if names == self.names and same_items(parameters, self.parameters):
            return
        check_names(zip(names or (), parameters))
        self._check_rules(parameters, names)
        earlier = {id(p): i for i, p in enumerate(self.parameters)}
        came_from = [earlier.get(id(p), -1) for p in parameters]
        bare = map(bare_rule, self.rules)  # of which there may be one for several
        for rule in {id(rule): rule for rule in bare}.values():
            if earlier:
                rule.reorder(came_from)
        self.parameters, self.names, self._params = list(parameters), names, None
        self._watch()

    def release_parameters(self) -> None:
        """Hold no parameters until :meth:`set_parameters`, and keep what rules remember of each, by position."""
        self.parameters, self.names, self._params = [], None, None
        self._watch()

    def _check_rules(self, parameters: list[Tensor], names: tuple[str, ...] | None) -> None:
        """ValueError if a rule names a parameter that is not among these."""
        if self.process_group is None:  # else another stage may have it
            for rule in self.rules:
                rule.check(parameters, names)

    def init_state(self) -> None:
        """Make what the rules will remember, as a first step would."""
        for rule in self.rules:
            if self.parameters:
                rule.init_state(backends.wide_device(self.parameters[0].device), len(self.parameters))

    def clip_(self) -> Stats:
        """Clip the gradients in place; what they were before, and what was done, as :class:`Stats`.

        Raises:
            TypeError, ValueError, RuntimeError, NotImplementedError: a gradient that cannot be clipped, or is not
                finite where ``nonfinite="raise"``, before any is changed; or a rule that returns no coefficients,
                before anything that comes after the last `Value`.
        """
        if compiler.is_dynamo_compiling():
            from . import graph_breaks

            return graph_breaks.call(Clipper.clip_, self)
        self._watch()
        if isinstance(done := None if self._sums else self._clip_fused(), Stats):
            return done
        table = from_native(done) if done else self.read()
        stats, decision = self.decide(table)
        decision.apply_(table)
        self._wrote = not decision.leaves
        return stats

    def clip_with_norm_(self, total_norm: Tensor | float) -> Stats:
        """Clip the gradients in place as the rule has it for a norm that was measured elsewhere, over more parameters
        than these, say: :func:`fastclip.clip_with_norm_` by a rule. No gradient is read to decide.

        Args:
            total_norm: one number >= 0 or NaN, a tensor on any device or a float, of the rule's norm type.

        Raises:
            ValueError: the rule looks at more than the norm of all gradients; see :attr:`goes_by_total_norm`.

        Otherwise raises as :meth:`clip_`.
        """
        if not self.goes_by_total_norm:
            raise ValueError(f"rule must go by the total norm alone, which {self.rules} do not: use clip_()")
        norm = checked_norm(total_norm)
        # No reduce follows that would carry an error of this rank to the others.
        table = pack(self.parameters, gradients=False, write=True, process_group=self.process_group)
        stats, decision, _ = self._decide(table, None, None, False, None, norm)
        decision.apply_(table)
        return stats

    @property
    def goes_by_total_norm(self) -> bool:
        """Whether the rules decide from the norm of all gradients and nothing else."""
        alone = all(not rule.in_place and rule.needs == Needs.TOTAL_NORM for rule in self.rules)
        return alone and self.nonfinite != "zero"

    def pack(self) -> GradTable:
        """The table of the gradients that there are now."""
        return pack(self.parameters, gradients=False, write=True, process_group=self.process_group, reduces=True)

    def read(self) -> GradTable:
        """:meth:`pack`, of gradients about which :meth:`decide` decides next: perhaps they are read first, and packed
        only if something is to be done to them. Not if the last `clip_` may have written: the next probably will."""
        first = (
            self._read_first and not self._wrote and self._sums is None and self.process_group is None and not MARKED
        )
        table = read(self.parameters, self.norm_type) if first else None
        return self.pack() if table is None else table

    def warm_up(self) -> None:
        """Do what a first call would do besides: load the kernels, make what rules remember, and, with sharded
        parameters, the process groups and their first messages, which allocate memory of their own. All ranks must
        call it. Where no group has all ranks of the parameters' mesh, one is made, so that a call needs one message.
        """
        self.init_state()
        if self.parameters:
            backends.choose(self.parameters[0].device)
        warm_up(self.parameters, self.process_group)

    def _clip_fused(self) -> Stats | list[NativeGroup] | None:
        """The commonest case in one native call: one limit of the norm, gradients on the CPU.

        Returns the packed gradients where it is another case, or None where they want the general packer.
        """
        if len(self.rules) > 1 or self.nonfinite != "propagate" or self.process_group is not None or MARKED:
            return None
        limit = self.rules[0].static_limit(self.steps)
        fused = backends.choose_fused() if limit is not None else None
        if fused is None:
            return None
        done = fused.clip_norm_fused(self.parameters, True, limit, self.norm_type, False, True)
        if not isinstance(done, tuple):
            return done
        if self._sums is not None:
            self._sums.forget_waiting()
        power, absmax, norm, coef, wide = done
        parts = [Measurement(power, absmax)]
        stats = Stats(self.norm_type, torch.float64 if wide else torch.float32, power.device, parts, None, norm)
        stats.step = self.steps
        if self.names is not None:
            stats.names = self._param_index(len(power)).names
        self.steps += 1
        return stats.record(coef, limit)

    def step(
        self,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler | None = None,
        when: Tensor | bool | None = None,
        divide_by: Tensor | float = 1,
    ) -> Stats | None:
        r"""Clip and step: what ``clip_()`` and ``optimizer.step()`` do, to rounding, without the clip's own passes.

        The coefficient goes to the optimizer, which multiplies by it as it reads the gradients:

        - :mod:`fastclip.optim`'s take coefficients and skips into their single pass.
        - ``fused=True`` Adam, AdamW, SGD and Adagrad of torch.optim get it as their ``grad_scale``. (They write the
          clipped gradients back; gradients with a coefficient of their own are scaled in place before.)
        - For any other optimizer the gradients are clipped in place. So are they where step hooks are registered
          (``register_step_pre_hook`` and the like), which then see clipped gradients, and for float64 gradients of
          torch's fused optimizers, whose ``grad_scale`` is float32.

        Args:
            optimizer: holds the parameters of this Clipper. With other parameters besides, or without some of them,
                the gradients are clipped in place and the optimizer steps as it would. A wrapper that has the optimizer
                as its ``.optimizer`` (Accelerate's, Lightning's, Fabric's) is stepped as it is: gradients are clipped
                when, and only when, its ``step()`` reaches that of the innermost optimizer. A GradScaler of the
                wrapper's own is taken into account.
            scaler: a ``torch.amp.GradScaler`` whose ``scale(loss)`` was differentiated. The unscaling is part of the
                coefficient; ``scaler.unscale_(optimizer)`` may have been called before, ``scaler.update()`` comes
                after. A non-finite gradient skips the update, whatever `nonfinite` says.
            when: False skips the update: [] bool, on any device.
            divide_by: what the gradients are divided by before anything else, such as the number of backward passes
                or of tokens that were accumulated; > 0, or such a [] tensor on any device.

        Returns:
            :class:`Stats` of the gradients, unscaled and divided. None where the step of a wrapper does nothing, in the
            middle of an accumulation, say: then nothing is clipped or counted either.

        Raises:
            TypeError, ValueError: an argument of another kind, or an optimizer that wants a closure (LBFGS) or clips
                by itself.
            RuntimeError: a second step with `scaler` without its ``update()``; a wrapper that changed parameters
                without a step of the optimizer inside.

        Otherwise raises as :meth:`clip_`.

        A skip is decided on the device and read back to the host only for optimizers that are not fused (torch's SGD
        with dampening counts as such) and where the rules have a ``Value``. ``Mask(freeze=True)`` reads which are
        frozen, but not with :mod:`fastclip.optim`, where only SGD with dampening reads either.
        """
        if compiler.is_dynamo_compiling():
            from . import graph_breaks

            return graph_breaks.call(Clipper.step, self, optimizer, scaler, when, divide_by)
        optimizers = unwrapped(optimizer)
        inner = optimizers[-1]
        check_optimizer(inner)
        stats: Stats | None = None

        def begin(undo: ExitStack) -> bool:
            nonlocal stats
            if stats is not None and (isinstance(divide_by, Tensor) or divide_by != 1):
                raise RuntimeError("divide_by: the optimizer's wrapper took a second step, which would divide again")
            stats, steps = self.begin_step(optimizers, scaler, when, divide_by, undo)
            return steps

        if inner is not optimizer:
            step_inside(optimizer, inner, begin)
            return stats
        with ExitStack() as hooks, ExitStack() as undo:
            if begin(undo):
                if has_post_hooks(optimizer):
                    undo_after_step(optimizer, undo, hooks)
                optimizer.step()
        return stats

    def begin_step(
        self, optimizers: list[Any], scaler: Any, when: Any, divide_by: Any, undo: ExitStack
    ) -> tuple[Stats, bool]:
        """Decide, and make the next step of the innermost optimizer carry it out; False if there must be none, see
        :func:`prepare`."""
        step = self.decide_step(optimizers, scaler, when, divide_by)
        steps = prepare(optimizers[-1], step.table, step.decision, step.complete, undo)
        undo.push(step.scaler_state.done)
        return step.stats, steps

    def decide_step(self, optimizers: list[Any], scaler: Any, when: Any = None, divide_by: Any = 1) -> DecidedStep:
        """What the rules say of a step of the last of `optimizers`, which the others wrap; see :meth:`step`."""
        complete = covers(optimizers[-1], self.parameters)
        table = self.read() if isinstance(optimizers[-1], TakesDecision) else self.pack()
        scaler_state = GradScalerState.of(scaler, optimizers, table.device)
        inv_scale = scaler_state.inv_scale(divide_by)
        if inv_scale is not None and not complete:
            raise ValueError(
                "optimizer must hold exactly the parameters of this Clipper where a scaler or divide_by is given: "
                "the other gradients would be left unscaled"
            )
        skip = None if when is None else ~flag(when, table.device)
        found_inf = scaler_state.found_inf
        if found_inf is None and scaler_state.unscaled and table.shards is not None:  # no gradient here, but elsewhere
            found_inf = torch.zeros((), dtype=torch.bool, device=table.device)
        if found_inf is not None:
            skip = found_inf if skip is None else skip | found_inf
        scaled = scaler_state.active or scaler_state.by_wrapper
        stats, decision, found_inf = self._decide(table, inv_scale, skip, scaled, found_inf)
        scaler_state.record(stats, found_inf)
        return DecidedStep(table, stats, decision, complete, scaler_state)

    def decide(
        self, table: GradTable, inv_scale: Tensor | None = None, skip: Tensor | None = None, scaled: bool = False
    ) -> tuple[Stats, ClipDecision]:
        """What the rules say of the gradients of `table`; see :func:`fastclip.pipeline.decide.decide`. `scaled`: by a
        GradScaler."""
        stats, decision, _ = self._decide(table, inv_scale, skip, scaled, None)
        return stats, decision

    def _decide(
        self,
        table: GradTable,
        inv_scale: Tensor | None,
        skip: Tensor | None,
        scaled: bool,
        found_inf: Tensor | None,
        norm: Tensor | None = None,
    ) -> tuple[Stats, ClipDecision, Tensor | None]:
        """:meth:`decide`; and whether a GradScaler has found an inf, on any rank."""
        policy = "skip" if scaled else self.nonfinite
        check = self._refuse if policy == "raise" else None
        count = len(table)
        context = StepContext(self.steps, skip, inv_scale, lambda: self._param_index(count))  # which holds no gradient
        context.found_inf = found_inf
        self._watch()
        if self._sums is not None and norm is None:
            table.known = self._sums.of(table, context.params().owners)
        stats, decision = decide(
            *(table, self.rules, self.norm_type, context, check, policy, lambda: self._param_index(count).owners),
            *(self.tensor_stats, norm),
        )
        if self.names is not None:
            stats.names = context.params().names
        self.steps += 1
        if decision.skip is not None:
            self.skips = added(self.skips, decision.skip)
        if stats.zeroed is not None:
            self.zeroed = added(self.zeroed, stats.zeroed_count().round().long())
        return stats, decision, context.found_inf

    def state_dict(self) -> dict[str, Any]:
        """What this Clipper and its rules remember: counts as ints, and running statistics as tensors (copies)."""
        counts = {name: 0 if t is None else int(t) for name, t in (("skips", self.skips), ("zeroed", self.zeroed))}
        return {"steps": self.steps, **counts, "rules": [rule.state_dict() for rule in self.rules]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state, whatever device it was saved from.

        Raises:
            ValueError, KeyError: it was saved by a Clipper with other rules; nothing is changed then.
        """
        saved = state_dict["rules"]
        if len(saved) != len(self.rules):
            raise ValueError(f"state_dict has {len(saved)} rules, and this Clipper {len(self.rules)}: {self.rules}")
        steps, skips, zeroed = (int(state_dict[name]) for name in ("steps", "skips", "zeroed"))
        for rule, state in zip(self.rules, saved):
            rule.check_state_dict(state)
        for rule, state in zip(self.rules, saved):
            rule.load_state_dict(state)
        self.steps, self.skips, self.zeroed = steps, loaded(self.skips, skips), loaded(self.zeroed, zeroed)

    def _refuse(self, stats: Stats) -> None:
        """RuntimeError if a gradient is not finite; on all ranks, if one on any of them is not."""
        if not stats.any_nonfinite():
            return
        table = pack(self.parameters, gradients=False, write=False, process_group=self.process_group)
        names = self._param_index(len(table)).names or tuple(f"gradient {i}" for i in range(len(table)))
        found = table.nonfinite_text(names)
        raise RuntimeError(f"gradients hold elements that are not finite: {found}; nothing was changed")

    def _param_index(self, count: int) -> ParamIndex:
        """The parameters of the `count` distinct gradients there are now."""
        self._params = ParamIndex.now(self.parameters, self.names, count, self._params)
        return self._params

    def __repr__(self) -> str:
        return f"Clipper({len(self.parameters)} parameters, {self.rules})"
