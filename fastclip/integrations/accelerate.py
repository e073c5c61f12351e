"""Hugging Face Accelerate: its ``clip_grad_norm_`` by fastclip, inside the optimizer's step where that can take it."""

from __future__ import annotations

import weakref
from contextlib import ExitStack
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor

from .. import functional
from ..clipper import Clipper
from ..gradients.pack import flatten_params
from ..monitor import GradMonitor
from ..pipeline.decide import ClipDecision
from ..pipeline.step import StepHooks, check_optimizer, covers, prepare, takes_decision, unwrapped
from ..stats import Stats
from .clippers import Clippers, Rules

CLIP_THEMSELVES = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA)

_attached: weakref.WeakSet[Attached] = weakref.WeakSet()


def attach(
    accelerator: Accelerator, rule: Rules | None = None, monitor: GradMonitor | None = None, *, in_step: bool = True
) -> Attached:
    """Let ``accelerator.clip_grad_norm_`` clip by fastclip.

    Everything else stays the framework's: accumulation, unscaling, when it clips and what it logs. The norm returned is
    that before clipping, as ever. For Hugging Face's Trainer see :func:`fastclip.integrations.transformers.attach`.

    Args:
        accelerator: whose method is replaced, on this instance; before or after ``prepare()``.
        rule: takes the place of the limit that is passed to ``clip_grad_norm_``: a rule, a number, a list of such, or a
            function from the passed `max_norm` to one of these. A call with ``inf`` only measures.
        monitor: is given the statistics of each clip; of several sets of parameters, those of the first.
        in_step: leave the gradients as they are, and have the next step of their optimizer multiply by the coefficient
            as it reads them, where it can: torch's ``fused=True`` Adam, AdamW, SGD and Adagrad, and
            :mod:`fastclip.optim`. Between the clip and that step gradients are not clipped yet, and changing them is an
            error. False: they are clipped at once, as with other optimizers, and where step hooks are registered.

    Where there is a `rule` or a `monitor`, ``accelerator.save_state`` saves what rules remember and how many steps have
    been taken, and ``load_state`` goes on from there.

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
        self, accelerator: Accelerator, rule: Rules | None, monitor: GradMonitor | None, in_step: bool
    ) -> None:
        self.monitor, self.in_step = monitor, in_step
        self.stats: Stats | None = None
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
        for waiting in list(self._steps.values()):  # of an earlier clip without a step
            waiting.settle()
        if self._clippers.only_measures(max_norm):
            return functional.clip_norm_(items, max_norm, norm_type)
        parameter_set = self._clippers.get(items, max_norm, norm_type)
        clipper = parameter_set.clipper
        chain = self._optimizers_of(clipper) if accelerator.sync_gradients else None
        waits = False
        if chain is None:
            stats = clipper.clip_()
        else:
            table, stats, decision, _, _ = clipper.decide_step(chain, accelerator.scaler)
            waits = self.in_step and takes_decision(chain[-1], table, decision)
            if waits:
                self._next_step_of(chain[-1]).take_over(clipper, decision)
            else:
                decision.apply_(table)
        if not waits:
            clipper.release_parameters()
        self.stats = stats
        if self.monitor is not None and parameter_set.number == 0:
            self.monitor.update(stats, step=stats.step)
        return stats.total_norm

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
        self.accelerator.__dict__.pop("clip_grad_norm_", None)
        objects = self.accelerator._custom_objects
        objects[:] = [each for each in objects if each is not self]
        _attached.discard(self)


class _NextStep:
    """A decision that waits for the next step of an optimizer, to be carried out by it. The optimizer holds this."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._waiting: tuple[Clipper, ClipDecision, list[tuple[Tensor, weakref.ref[Tensor], int]]] | None = None
        self.hooks = StepHooks(optimizer, self._begin)

    def take_over(self, clipper: Clipper, decision: ClipDecision) -> None:
        gradients = [(p, weakref.ref(p.grad), p.grad._version) for p in clipper.parameters if p.grad is not None]
        self._waiting = clipper, decision, gradients  # which may be zeroed before the step, and freed then

    def settle(self) -> None:
        """Do now what waits, in place, if the gradients are still those that it was decided for."""
        if self._waiting is not None:
            clipper, decision, gradients = self._waiting
            self._waiting = None
            if _unchanged(gradients):
                decision.apply_(clipper.pack())
            clipper.release_parameters()

    def _begin(self, undo: ExitStack) -> bool:
        if self._waiting is None:
            return True
        clipper, decision, gradients = self._waiting
        self._waiting = None
        if not _unchanged(gradients):
            raise RuntimeError(
                "gradients were changed between accelerator.clip_grad_norm_ and the optimizer's step, which was to "
                "clip them: attach(..., in_step=False) clips them at once"
            )
        steps = prepare(self._optimizer, clipper.pack(), decision, True, undo)
        clipper.release_parameters()
        return steps


def _unchanged(gradients: list[tuple[Tensor, weakref.ref[Tensor], int]]) -> bool:
    return all(
        p.grad is not None and p.grad is gradient() and p.grad._version == version for p, gradient, version in gradients
    )


def _names(accelerator: Accelerator, parameters: list[Tensor]) -> tuple[str, ...] | None:
    """What the accelerator's models call `parameters`, if they know all of them."""
    names: dict[int, str] = {}
    for model in accelerator._models:
        for name, parameter in accelerator.unwrap_model(model, keep_torch_compile=False).named_parameters():
            names.setdefault(id(parameter), name)
    found = [names.get(id(parameter)) for parameter in parameters]
    return None if None in found or len(set(found)) < len(found) else tuple(map(str, found))
