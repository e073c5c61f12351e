"""Step: the decision goes to the optimizer, which multiplies as it reads, so that the clip needs no pass of its own."""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import optimizer as torch_optimizer
from torch.utils.hooks import RemovableHandle

from ..distributed.unwrap import any_dtensor
from ..gradients.pack import same_items
from ..gradients.table import GradTable
from ..stats import Stats
from .amp import GradScalerState, given_by_scaler
from .decide import ClipDecision

# Their fused step divides the gradients by `grad_scale` and, where `found_inf` is 1, leaves everything as it was.
FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad)
FUSED_DEVICES = ("cpu", "cuda", "xpu")  # that of MPS takes no scale: Adam's passes over it, SGD's raises
FUSED_ON_DTENSORS = (torch.optim.Adam, torch.optim.AdamW)


class DecidedStep(NamedTuple):
    """What was decided of the gradients of a step that an optimizer is yet to take."""

    table: GradTable
    stats: Stats
    decision: ClipDecision
    complete: bool  # whether the optimizer's gradients are those of the table
    scaler_state: GradScalerState


class TakesDecision:
    """An optimizer that carries a decision out in its own pass over the gradients: those of :mod:`fastclip.optim`."""

    decision: ClipDecision | None = None  # what the next step() is to carry out; None: what the optimizer decides

    @property
    def steps_in_backward(self) -> bool:
        """Whether it steps as the gradients come, so that there are none left to be clipped."""
        return False

    @contextlib.contextmanager
    def step_with(self, decision: ClipDecision) -> Iterator[None]:
        """Let the steps within carry out `decision`: a context, since a wrapper may be what calls step()."""
        before, self.decision = self.decision, decision
        try:
            yield
        finally:
            self.decision = before


def unwrapped(optimizer: Any) -> list[Any]:
    """The optimizer, and what is inside of it one in the other, where it is a wrapper such as Accelerate's, Fabric's or
    Lightning's, or torchtitan's container of one. The last one is the optimizer that steps in the end."""
    chain = [optimizer]
    inner = _inner(optimizer)
    while inner is not None and all(inner is not one for one in chain) and _wraps(chain[-1], inner):
        chain.append(inner)
        inner = _inner(inner)
    return chain


def _inner(optimizer: Any) -> torch.optim.Optimizer | None:
    """The optimizer that another one has, if it has one."""
    inner = getattr(optimizer, "optimizer", None)
    several = getattr(optimizer, "optimizers", None)
    if inner is None and isinstance(several, (list, tuple)) and len(several) == 1:
        inner = several[0]
    return inner if isinstance(inner, torch.optim.Optimizer) else None


def _wraps(outer: Any, inner: torch.optim.Optimizer) -> bool:
    """Whether `outer` leaves all of its parameters to `inner`: those that it steps itself must be clipped before."""
    groups = getattr(outer, "param_groups", None)
    return (
        groups is None
        or groups is inner.param_groups
        or set(map(id, flat_params(outer))) <= set(map(id, flat_params(inner)))
    )


def check_optimizer(optimizer: Any) -> None:
    """TypeError unless `optimizer` (the innermost one) is one whose step needs no closure."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__} {optimizer!r}")
    if _wants_closure(type(optimizer).step):
        raise TypeError(
            f"optimizer must step without a closure; {type(optimizer).__name__} evaluates one several times a step, so "
            f"call clip_() inside the closure instead"
        )
    several = getattr(optimizer, "optimizers", ())
    parts = (optimizer, getattr(optimizer, "optimizer", None), *(several if isinstance(several, (list, tuple)) else ()))
    if any(isinstance(part, TakesDecision) and part.steps_in_backward for part in parts):
        raise ValueError(
            "optimizer steps inside backward (step_in_backward), where its gradients are clipped: give the rule to its "
            "max_norm, and call its step()"
        )
    if any(getattr(part, "clipper", None) is not None for part in parts):
        raise ValueError(
            "optimizer has a max_norm of its own, so its gradients would be clipped twice: call its step()"
        )


@functools.cache
def _wants_closure(step: Callable[..., Any]) -> bool:
    closure = inspect.signature(step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def _tied(optimizer: torch.optim.Optimizer, table: GradTable) -> bool:
    """Whether parameters share a gradient, which a step that multiplies as it reads would multiply several times."""
    return sum(p.grad is not None for group in optimizer.param_groups for p in group["params"]) > len(table)


def flat_params(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The parameters of all groups, as they are now."""
    groups = [group["params"] for group in optimizer.param_groups]
    return groups[0] if len(groups) == 1 else list(itertools.chain.from_iterable(groups))


def covers(optimizer: torch.optim.Optimizer, parameters: list[Tensor]) -> bool:
    """Whether the gradients of the optimizer's parameters are those of `parameters`, in any order."""
    theirs = flat_params(optimizer)
    if same_items(theirs, parameters):
        return True
    one, other = ({id(p): p for p in params} for params in (theirs, parameters))
    return all((one if key in one else other)[key].grad is None for key in one.keys() ^ other.keys())


def takes_decision(optimizer: torch.optim.Optimizer, table: GradTable, decision: ClipDecision) -> bool:
    """Whether the optimizer's own pass over its gradients, those of `table`, can carry `decision` out."""
    if _has_step_hooks(optimizer) or _inner(optimizer) is not None:  # which steps a part, see _wraps()
        return False
    return isinstance(optimizer, TakesDecision) or (
        _divides_by_scale(optimizer, table) and has_divisor(decision.common)
    )


def prepare(
    optimizer: torch.optim.Optimizer,
    table: GradTable,
    decision: ClipDecision,
    complete: bool,
    undo: contextlib.ExitStack,
) -> bool:
    """Make the next ``optimizer.step()`` step with the gradients of `table` as `decision` would leave them.

    What cannot be handed to the optimizer is done to the gradients in place. `complete`: the optimizer's parameters are
    those of the table. `undo` takes what must be undone after the step. Returns False if there must be no step: it is
    skipped, and the host knows.
    """
    hands_over = complete and takes_decision(optimizer, table, decision)
    if hands_over and isinstance(optimizer, TakesDecision):
        undo.enter_context(optimizer.step_with(decision))
        return True
    frozen = [(p, p.grad) for p in decision.frozen_params()]
    scale, found_inf = given_by_scaler(optimizer)
    if hands_over:
        on_host = all(group.device.type == "cpu" for group in table.groups)
        if on_host and decision.is_skipped():
            return False
        if decision.each is not None:
            table.apply_(decision.unless_skipped(decision.each))
        if type(optimizer) is torch.optim.SGD:
            _start_momentum(optimizer)
        divisor = divisor_of(decision.common).to(table.home)
        attributes: dict[str, Any] = {} if scale is None else {"grad_scale": None}
        attributes |= {} if found_inf is None else {"found_inf": None}
        if not on_host:
            skip = torch.zeros_like(divisor) if decision.skip is None else decision.skip.float()
            attributes = {"grad_scale": divisor, "found_inf": skip}
        elif divisor != 1:  # with a grad_scale torch writes the gradients back, whatever it is
            attributes["grad_scale"] = divisor
        if attributes.get("grad_scale") is not None:  # with which torch writes gradients, and tells nobody
            undo.callback(table.bump_versions)
    else:
        decision.apply_(table)
        if decision.is_skipped():
            return False
        # What a GradScaler asked for is in the gradients now.
        attributes = {} if scale is None else {"grad_scale": torch.ones_like(scale)}
        attributes |= {} if found_inf is None else {"found_inf": torch.zeros_like(found_inf)}
    undo.enter_context(_without_gradients(frozen))
    undo.enter_context(_attributes(optimizer, **attributes))
    return True


class StepHooks:
    """Calls ``begin(undo)`` whenever a step of `optimizer` begins, before all others look at the gradients.

    `begin` makes the step carry out a decision, and returns False if there must be none; ``undo``, which takes what
    must be undone, is closed as the step ends. A closure that the step evaluates may ask for it: :meth:`begin_now`.

    Attributes:
        began: whether a step has begun since this was made.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, begin: Callable[[contextlib.ExitStack], bool]) -> None:
        self._optimizer, self._begin = optimizer, begin
        self._undo = contextlib.ExitStack()
        self.began = self._within = False
        self._handles = [
            _register_first(optimizer, _Hook(optimizer, self._started)),
            optimizer.register_step_post_hook(_Hook(optimizer, self._ended)),
        ]
        # Gradients that others set to None as the step ends must stay None.
        _move_first(optimizer._optimizer_step_post_hooks, self._handles[1].id)

    def begin_now(self) -> None:
        """If a step is under way, in a closure of which this is called: begin as if it began now."""
        if self._within:
            self._started()

    def _started(self) -> None:
        self._undo.close()  # of a step that failed
        self.began = self._within = True
        try:
            steps = self._begin(self._undo)
        except BaseException:
            self._undo.close()
            raise
        if not steps:
            self._undo.enter_context(_without_gradients([(p, p.grad) for p in flat_params(self._optimizer)]))

    def _ended(self) -> None:
        self._within = False
        self._undo.close()

    def remove(self) -> None:
        """Leave the optimizer as it was; what a failed step has left is undone."""
        for handle in self._handles:
            handle.remove()
        self._undo.close()

    def __enter__(self) -> StepHooks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._undo.__exit__(kind, error, trace)
        self.remove()


def step_inside(outer: Any, inner: torch.optim.Optimizer, begin: Callable[[contextlib.ExitStack], bool]) -> None:
    """``outer.step()``, in which ``begin(undo)`` is called as a step of the optimizer `inner` begins.

    A wrapper may step later (it accumulates), not at all (its GradScaler found an inf) or with scaled gradients, so
    what is to be done waits until the innermost step is really taken. If that is not taken, nothing is done. A second
    step begins anew.

    Raises:
        RuntimeError: parameters changed without a step of `inner`, so with gradients that were not clipped.
    """
    params = list(flat_params(inner))
    versions = [p._version for p in params]
    with StepHooks(inner, begin) as hooks:
        outer.step()
    if not hooks.began and versions != [p._version for p in params]:
        raise RuntimeError(
            f"optimizer ({type(outer).__name__}) changed parameters without a step of the {type(inner).__name__} "
            f"inside, so their gradients were not clipped: clip with clip_() before its step() instead"
        )


def undo_after_step(optimizer: torch.optim.Optimizer, undo: contextlib.ExitStack, hooks: contextlib.ExitStack) -> None:
    """Close `undo` as a step of `optimizer` ends, before others look: gradients that they set to None must stay None.
    `hooks` takes what stops that."""
    handle = optimizer.register_step_post_hook(_Hook(optimizer, undo.close))
    _move_first(optimizer._optimizer_step_post_hooks, handle.id)
    hooks.callback(handle.remove)


def has_post_hooks(optimizer: torch.optim.Optimizer) -> bool:
    return bool(optimizer._optimizer_step_post_hooks or torch_optimizer._global_optimizer_post_hooks)


class _Hook:
    """A step hook of `optimizer` that calls `function`."""

    def __init__(self, optimizer: torch.optim.Optimizer, function: Callable[[], Any]) -> None:
        self._optimizer, self._function = optimizer, function

    def __call__(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if optimizer is self._optimizer:
            self._function()


def _register_first(optimizer: torch.optim.Optimizer, hook: _Hook) -> RemovableHandle:
    """Register a step pre-hook that runs before all others."""
    if registered := torch_optimizer._global_optimizer_pre_hooks:  # these come before the optimizer's own
        handle = torch_optimizer.register_optimizer_step_pre_hook(hook)
        _move_first(registered, handle.id)
    else:
        handle = optimizer.register_step_pre_hook(hook)
        _move_first(optimizer._optimizer_step_pre_hooks, handle.id)
    return handle


def _move_first(hooks: Any, key: int) -> None:
    hooks.move_to_end(key, last=False)


def _has_step_hooks(optimizer: torch.optim.Optimizer) -> bool:
    """Whether somebody looks at the gradients as the step begins or ends, and so must see them clipped."""
    hooks: list[dict[int, Any]] = [
        torch_optimizer._global_optimizer_pre_hooks,
        torch_optimizer._global_optimizer_post_hooks,
        optimizer._optimizer_step_pre_hooks,
        optimizer._optimizer_step_post_hooks,
    ]
    return any(type(hook) is not _Hook for registered in hooks for hook in registered.values())


def _divides_by_scale(optimizer: torch.optim.Optimizer, table: GradTable) -> bool:
    """Whether the optimizer's step is torch's fused one, which divides gradients by a float32 `grad_scale`."""
    return (
        type(optimizer) in FUSED
        and all(group.get("fused") for group in optimizer.param_groups)
        and all(group.device.type in FUSED_DEVICES for group in table.groups)
        and all(group.dtype != torch.float64 for group in table.groups)  # whose coefficient float32 would round
        and not _dampens(optimizer)
        and not _tied(optimizer, table)
        # torch has no sharding strategy for the others' fused steps
        and (type(optimizer) in FUSED_ON_DTENSORS or not any_dtensor(flat_params(optimizer)))
    )


def divisor_of(common: Tensor) -> Tensor:
    """The float32 that torch divides gradients by, from what they are to be multiplied by."""
    return common.reciprocal().float()


def has_divisor(common: Tensor) -> bool:
    """Whether there is such a float32: dividing by inf would make 0 of every gradient. Not asked of a GPU, which would
    be waited for."""
    return common.device.type != "cpu" or common.item() == 0 or not divisor_of(common).isinf()


def _start_momentum(optimizer: torch.optim.SGD) -> None:
    """Give parameters that have no momentum yet one of zeros, from which the first step is the same.

    The fused step itself would keep buffers that it has not filled, if the first one is skipped, and fails where some
    parameters have momentum and others, held until then, have none. With dampening the first step is not the same.
    """
    for group in optimizer.param_groups:
        if group["momentum"] != 0 and group["dampening"] == 0:
            for p in group["params"]:
                if p.grad is not None and optimizer.state[p].get("momentum_buffer") is None:
                    optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.preserve_format)


def _dampens(optimizer: torch.optim.Optimizer) -> bool:
    return type(optimizer) is torch.optim.SGD and any(group["dampening"] != 0 for group in optimizer.param_groups)


class _attributes:
    """Sets attributes of an object, and afterwards what was there before, unless that was taken away meanwhile."""

    def __init__(self, target: Any, **values: Any) -> None:
        self._target, self._values = target, values
        self._before = {name: target.__dict__[name] for name in values if name in target.__dict__}

    def __enter__(self) -> None:
        for name, value in self._values.items():
            setattr(self._target, name, value)

    def __exit__(self, *_: object) -> None:
        for name in self._values:
            if name in self._target.__dict__:
                delattr(self._target, name)
                if name in self._before:
                    setattr(self._target, name, self._before[name])


class _without_gradients:
    """Takes the gradients of parameters away, which makes an optimizer pass over them, and gives them back."""

    def __init__(self, kept: list[tuple[Tensor, Tensor | None]]) -> None:
        self._kept = kept

    def __enter__(self) -> None:
        for parameter, _ in self._kept:
            parameter.grad = None

    def __exit__(self, *_: object) -> None:
        for parameter, gradient in self._kept:
            parameter.grad = gradient
