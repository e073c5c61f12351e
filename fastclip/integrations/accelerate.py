"""Hugging Face Accelerate: its ``clip_grad_norm_`` by fastclip, inside the optimizer's step where that can take it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor

from .. import functional
from ..clipper import Clipper
from ..gradients.pack import flatten_params
from ..gradients.table import GradTable
from ..monitor import GradMonitor
from ..pipeline.decide import ClipDecision
from ..pipeline.step import DecidedStep, StepHooks, check_optimizer, covers, prepare, takes_decision, unwrapped
from ..stats import Stats
from .clippers import Clippers, RuleSpec

CLIP_THEMSELVES = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA)

_attached: weakref.WeakSet[Attached] = weakref.WeakSet()


def attach(
    accelerator: Accelerator, rule: RuleSpec | None = None, monitor: GradMonitor | None = None, *, in_step: bool = True
) -> Attached:
    """Let ``accelerator.clip_grad_norm_`` clip by fastclip.

    Everything else stays the framework's: accumulation, unscaling, when it clips and what it logs. The norm returned is
    that before clipping, as without fastclip. For Hugging Face's Trainer see
    :func:`fastclip.integrations.transformers.attach`.

    Args:
        accelerator: whose method is replaced, on this instance; before or after ``prepare()``.
        rule: takes the place of the limit that is passed to ``clip_grad_norm_``: a rule, a number, a list of such, or a
            function from the passed `max_norm` to one of these. A call with ``inf`` only measures. The norm returned is
            of the rule's type.
        monitor: is given the statistics of each clip; of several sets of parameters, those of the first.
        in_step: leave the gradients as they are, and have the next step of their optimizer multiply by the coefficient
            as it reads them, where it can: torch's ``fused=True`` Adam, AdamW, SGD and Adagrad, and
            :mod:`fastclip.optim`. Between the clip and that step gradients are not clipped yet, and changing them
            (accumulating onto them, too) is an error. False: they are clipped at once, as with other optimizers, and
            where step hooks are registered.

    Where there is a `rule` or a `monitor`, ``accelerator.save_state`` saves what rules remember and how many steps have
    been taken, and ``load_state`` goes on from there. (Accelerate loads no state that was saved without.)

    Raises:
        TypeError, ValueError: an argument of another kind; an accelerator whose engine clips by itself (DeepSpeed,
            Megatron, XLA, FSDP1).

    Example:
        >>> fastclip.integrations.accelerate.attach(accelerator, rule=fastclip.rules.ZClip())
        >>> ...
        >>> norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)  # as before
    """
    if not isinstance(accelerator, Accelerator):
        raise TypeError(f"accelerator must be an accelerate.Accelerator, got {type(accelerator).__name__}")
    if monitor is not None and not isinstance(monitor, GradMonitor):
        raise TypeError(f"monitor must be a fastclip.monitor.GradMonitor, got {type(monitor).__name__} {monitor!r}")
    kind = accelerator.distributed_type
    if kind in CLIP_THEMSELVES or (kind == DistributedType.FSDP and not accelerator.is_fsdp2):
        name = "FSDP1" if kind == DistributedType.FSDP else kind.value
        raise ValueError(f"accelerator must leave clipping to Python; {name} clips by itself")
    for earlier in list(_attached):
        if earlier.accelerator is accelerator:
            earlier.detach()
    return Attached(accelerator, rule, monitor, in_step)


def attached_to(optimizer: Any) -> Attached | None:
    """What is attached to the accelerator that has prepared `optimizer`."""
    return next((one for one in _attached if any(each is optimizer for each in one.accelerator._optimizers)), None)


class Attached:
    """What :func:`attach` has put into an accelerator.

    Attributes:
        stats: :class:`fastclip.Stats` of the last clip; None before.
    """

    def __init__(
        self, accelerator: Accelerator, rule: RuleSpec | None, monitor: GradMonitor | None, in_step: bool
    ) -> None:
        self.monitor, self.in_step = monitor, in_step
        self.stats: Stats | None = None
        self.when_detached: Callable[[], Any] = lambda: None  # for who has replaced more than the method
        self._clippers = Clippers(rule, lambda parameters: _names(self.accelerator, parameters))
        self._steps: weakref.WeakValueDictionary[int, _NextStep] = weakref.WeakValueDictionary()  # by id of optimizer
        self.move_to(accelerator)

    def move_to(self, accelerator: Accelerator) -> None:
        """Attach to `accelerator`, and to no other any more; what rules remember comes along."""
        if hasattr(self, "accelerator"):
            self.detach()
        self.accelerator = accelerator
        accelerator.clip_grad_norm_ = self.clip_grad_norm_
        if self._clippers.rule is not None or self.monitor is not None:
            accelerator.register_for_checkpointing(self)
        _attached.add(self)

    def clip_grad_norm_(self, parameters: Any, max_norm: float, norm_type: float = 2) -> Tensor:
        """The accelerator's: the norm of the gradients of `parameters` before they are clipped."""
        accelerator = self.accelerator
        accelerator.unscale_gradients()
        items = flatten_params(parameters)
        if not items:
            return functional.clip_norm_(items, max_norm, norm_type)
        for waiting in list(self._steps.values()):
            waiting.settle_if_of(items)  # an earlier clip without a step
        if self._clippers.only_measures(max_norm):
            return functional.clip_norm_(items, max_norm, norm_type)
        parameter_set = self._clippers.find(items, max_norm, norm_type)
        clipper = parameter_set.lend(items, max_norm, norm_type)
        waits = False
        try:
            chain = self._optimizers_of(clipper) if accelerator.sync_gradients else None
            if chain is None:
                table = clipper.read()
                stats, decision = clipper.decide(table)
                decision.apply_(table)
            else:
                step = clipper.decide_step(chain, accelerator.scaler)
                table, stats = step.table, step.stats
                has_gradients = any(p.grad is not None for p in clipper.parameters)  # else there is nothing to wait for
                waits = self.in_step and has_gradients and takes_decision(chain[-1], table, step.decision)
                if waits:
                    self._next_step_of(chain[-1]).take_over(clipper, step)
                else:
                    step.decision.apply_(table)
        finally:
            if not waits:
                clipper.release_parameters()
        self.stats = stats
        if self.monitor is not None and self._clippers.is_first(parameter_set):
            self.monitor.update(stats, step=stats.step)
        return table.at_home(stats.total_norm)

    def _optimizers_of(self, clipper: Clipper) -> list[Any] | None:
        """The accelerator's optimizer of these gradients, and what it wraps."""
        for optimizer in self.accelerator._optimizers:
            chain = unwrapped(optimizer)
            if isinstance(chain[-1], torch.optim.Optimizer) and covers(chain[-1], clipper.parameters):
                check_optimizer(chain[-1])
                return chain
        return None

    def _next_step_of(self, optimizer: torch.optim.Optimizer) -> _NextStep:
        step = self._steps.get(id(optimizer))
        if step is None:
            step = self._steps[id(optimizer)] = _NextStep(optimizer)
        return step

    def state_dict(self) -> dict[str, Any]:
        """What the rules remember, for ``accelerator.save_state``."""
        return self._clippers.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self._clippers.load_state_dict(state_dict)

    def detach(self) -> None:
        """Give the accelerator its own method back; a clip that waits for a step is done now."""
        for waiting in list(self._steps.values()):
            waiting.settle()
            waiting.hooks.remove()
        self._steps.clear()
        self.when_detached()
        self.accelerator.__dict__.pop("clip_grad_norm_", None)
        objects = self.accelerator._custom_objects
        objects[:] = [each for each in objects if each is not self]
        _attached.discard(self)


class _NextStep:
    """A decision that waits for the next step of an optimizer, which is to carry it out. The optimizer's hooks hold it.

    The gradients are still what they were before the clip, so nobody may change them meanwhile. If they are set to
    None, the decision is forgotten.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._waiting: tuple[Clipper, ClipDecision, _Snapshot] | None = None
        self.hooks = StepHooks(optimizer, self._begin)

    def take_over(self, clipper: Clipper, step: DecidedStep) -> None:
        self._waiting = clipper, step.decision, _Snapshot(clipper, step.table)

    def settle_if_of(self, parameters: list[Tensor]) -> None:
        """:meth:`settle`, if what waits concerns any of these."""
        if self._waiting is not None:
            clipper, _, _ = self._waiting
            if not set(map(id, clipper.parameters)).isdisjoint(map(id, parameters)):
                self.settle()

    def settle(self) -> None:
        """Do now what waits, in place; nothing if the gradients are gone."""
        if self._waiting is None:
            return
        clipper, decision, snapshot = self._waiting
        self._waiting = None
        try:
            if snapshot.is_there(clipper):
                decision.apply_(snapshot.checked(clipper))
        finally:
            clipper.release_parameters()

    def _begin(self, undo: ExitStack) -> bool:
        if self._waiting is None:
            return True
        clipper, decision, snapshot = self._waiting
        self._waiting = None
        undo.callback(clipper.release_parameters)  # after the step, which looks for them
        table = snapshot.checked(clipper)
        return prepare(self._optimizer, table, decision, covers(self._optimizer, clipper.parameters), undo)


class _Snapshot:
    """Which gradients there were, to notice changes: their addresses and versions, and the smallest one itself. That is
    kept alive, so a later gradient cannot be taken for it."""

    def __init__(self, clipper: Clipper, table: GradTable) -> None:
        gradients = [p.grad for p in clipper.parameters]
        self._smallest = min((g for g in gradients if g is not None), key=Tensor.numel, default=None)
        self._position = next((i for i, g in enumerate(gradients) if g is self._smallest), 0)
        self._versions = _versions(gradients)
        self._addresses = [group.addresses_and_sizes() for group in table.groups]

    def is_there(self, clipper: Clipper) -> bool:
        """Whether the gradients were not replaced by others since."""
        return self._smallest is not None and clipper.parameters[self._position].grad is self._smallest

    def checked(self, clipper: Clipper) -> GradTable:
        """The table of the gradients; RuntimeError unless they are what they were."""
        table = clipper.pack()
        addresses = [group.addresses_and_sizes() for group in table.groups]
        same = len(addresses) == len(self._addresses) and all(map(torch.equal, addresses, self._addresses))
        if not same or not self.is_there(clipper) or self._versions != _versions([p.grad for p in clipper.parameters]):
            raise RuntimeError(
                "gradients were changed after accelerator.clip_grad_norm_, and before the optimizer's step that was to "
                "clip them: attach(..., in_step=False) clips them at once"
            )
        return table


def _versions(gradients: list[Tensor | None]) -> list[int | None]:
    return [None if g is None else g._version for g in gradients]


def _names(accelerator: Accelerator, parameters: list[Tensor]) -> tuple[str, ...] | None:
    """What the accelerator's models call `parameters`, if they know all of them."""
    names: dict[int, str] = {}
    for model in accelerator._models:
        for name, parameter in accelerator.unwrap_model(model, keep_torch_compile=False).named_parameters():
            names.setdefault(id(parameter), name)
    all_names = [names.get(id(parameter)) for parameter in parameters]
    are_known = None not in all_names and len(set(all_names)) == len(all_names)
    return tuple(map(str, all_names)) if are_known else None
