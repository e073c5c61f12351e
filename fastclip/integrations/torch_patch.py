"""fastclip in the place of ``torch.nn.utils.clip_grad_norm_`` and its kin, for all who hold them.

torch's functions are wrappers whose closure has the implementation in a cell named ``func``. What is put there is what
every holder calls, also one that imported the function by name before, and the functions stay the objects they are.
Where a torch has no such cell, the attributes of its modules are replaced, which reaches those who look them up later.
"""

from __future__ import annotations

import functools
import inspect
import os
import re
import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.nn.utils import clip_grad

from .. import backends, functional
from ..arguments import checked_limit, checked_norm, nonnegative
from ..backends import choice
from ..clipper import Clipper
from ..distributed.declare import MARKED
from ..distributed.unwrap import any_dtensor
from ..gradients.pack import flatten_params, pack
from ..monitor import GradMonitor
from ..rules import Value
from ..stats import Stats
from .clippers import Clippers, ParameterSet, Rules

# The name in torch.nn.utils.clip_grad -> ours. `clip_grad_norm`, the fifth, calls `clip_grad_norm_` by name.
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "clip_grad_norm_": functional.clip_norm_,
    "clip_grad_value_": functional.clip_value_,
    "_get_total_norm": functional.total_norm,
    "_clip_grads_with_norm_": functional.clip_with_norm_,
}
REFUSALS = (TypeError, ValueError, RuntimeError, NotImplementedError)

_lock = threading.RLock()
_active: patch_torch | None = None
_own = threading.local()  # .torch: whether this thread is in torch's own code, which calls these functions too


class patch_torch:
    """Let ``torch.nn.utils.clip_grad_norm_``, ``clip_grad_norm``, ``clip_grad_value_``, ``get_total_norm`` and
    ``clip_grads_with_norm_`` be fastclip's, for everyone who calls them, whenever they were imported.

    A plain call lasts until :func:`unpatch_torch`; ``with patch_torch():`` ends with the block, and what was there
    before is there again. A second call takes the place of the first. The patch is the whole process's.

    Args:
        rule: what takes the place of the limit that callers pass to ``clip_grad_norm_`` (and
            ``clip_grads_with_norm_``): a rule, a number, a list of such, or a function from the passed `max_norm` to
            one of these. Every set of parameters has a copy of its own. Where the limit passed is ``inf``, callers only
            measure, and the rule does not come in. ``clip_grad_value_`` keeps its limit.
        fallback: what torch takes and fastclip refuses (a negative `max_norm`, one that is a string or a bool,
            overlapping gradients, ...) goes on to torch's own code, with one warning of each kind that has the reason.
            False: it raises. Gradients of several ranks raise anyway unless the numbers are what is refused.
        record: a file in which a :class:`fastclip.monitor.GradMonitor` keeps every clip; or such a monitor. Of a
            second set of parameters the file is called ``name-2.jsonl``, and so on.

    Raises:
        TypeError, ValueError: `rule` is of another kind.
        OSError: there is no folder for `record`.

    With a rule, ``clip_grads_with_norm_`` decides from the norm it is given if the rule goes by that alone, and
    otherwise measures its parameters itself. Inside of torch.compile a plain patch stays in the graph, where only
    strings and bools go on to torch; with `rule` or `record` a call is a graph break.

    Example:
        >>> fastclip.patch_torch(rule=fastclip.rules.ZClip(), record="run.jsonl")
        >>> trainer.train()
    """

    def __init__(
        self,
        rule: Rules | None = None,
        *,
        fallback: bool = True,
        record: str | os.PathLike[str] | GradMonitor | None = None,
    ) -> None:
        global _active
        # None: our functions themselves, where there is nothing to remember
        self._clippers = Clippers(rule) if rule is not None or record is not None else None
        self._value_clippers = Clippers(lambda limit: Value(limit)) if record is not None else None
        self._fallback = fallback
        self._record = _Record(record)
        self._clips: Counter[tuple[str, torch.device]] = Counter()  # of fastclip, by choice of backend and device
        self._by_torch: Counter[str] = Counter()  # by kind of reason
        self._reasons: dict[str, str] = {}  # kind -> the first reason of it
        self._counting, self._working = threading.Lock(), threading.RLock()
        self._entered = False
        with _lock:
            self._before = _active
            if self._before is not None and not self._before._entered:
                self._before._before = None  # a plain call, which has no block to come back from
            _install(self)

    def __enter__(self) -> patch_torch:
        self._entered = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with _lock:
            if _active is not None:  # else unpatch_torch() has been called meanwhile
                _install(self._before)
        self._record.close()

    def call(self, name: str, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What torch's function `name`, whose implementation is `original`, does while the patch is there."""
        ours = FUNCTIONS[name]
        if is_dynamo_compiling():
            if self._clippers is not None:
                from .. import graph_breaks

                return graph_breaks.call(patch_torch.call, self, name, original, args, kwargs)
            return (ours if _takes_numbers(name, args, kwargs) else original)(*args, **kwargs)
        if getattr(_own, "torch", False):
            return original(*args, **kwargs)
        args, kwargs = _listed(args, kwargs)
        try:
            work = ours if self._clippers is None else getattr(self, name, ours)
            done = work(*args, **kwargs)
        except REFUSALS:
            reason = _refusal(ours, args, kwargs) if self._fallback else None
            if reason is None:
                raise
        else:
            if name != "_get_total_norm":
                self._count(done, args, kwargs)
            return done
        self._note(f"{name.lstrip('_')}: {reason}")
        _own.torch = True
        try:
            return original(*args, **kwargs)
        finally:
            _own.torch = False

    # ---- torch's functions, by a rule or for a record ----

    def clip_grad_norm_(
        self,
        parameters: functional.Parameters,
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
        foreach: bool | None = None,
    ) -> Tensor:
        clippers, items = self._clippers, flatten_params(parameters, stacklevel=6)
        assert clippers is not None
        if not items or clippers.only_measures(max_norm):
            return functional.clip_norm_(items, max_norm, norm_type, error_if_nonfinite)
        policy = "raise" if error_if_nonfinite else "propagate"
        return self._clip_(clippers, items, max_norm, norm_type, Clipper.clip_, policy).total_norm

    def _clip_grads_with_norm_(
        self,
        parameters: functional.Parameters,
        max_norm: float,
        total_norm: Tensor,
        foreach: bool | None = None,
    ) -> None:
        clippers, items = self._clippers, flatten_params(parameters)
        assert clippers is not None
        if not items or clippers.only_measures(max_norm):
            functional.clip_with_norm_(items, max_norm, total_norm)
            return

        def clip_(clipper: Clipper) -> Stats:
            return clipper.clip_with_norm_(total_norm) if clipper.goes_by_total_norm else clipper.clip_()

        self._clip_(clippers, items, max_norm, 2.0, clip_)

    def clip_grad_value_(
        self, parameters: functional.Parameters, clip_value: float, foreach: bool | None = None
    ) -> None:
        items = flatten_params(parameters)
        if not items or self._value_clippers is None:
            functional.clip_value_(items, clip_value)
        else:
            self._clip_(self._value_clippers, items, clip_value, 2.0, Clipper.clip_)

    def _clip_(
        self,
        clippers: Clippers,
        items: list[Tensor],
        limit: float,
        norm_type: float,
        clip_: Callable[[Clipper], Stats],
        policy: str = "propagate",
    ) -> Stats:
        with self._working:  # what a rule remembers is for one thread at a time
            found = clippers.get(items, limit, norm_type)
            try:
                found.clipper.nonfinite = policy
                stats = clip_(found.clipper)
            finally:
                found.clipper.release_parameters()
            self._record.update(found, stats)
        return stats

    # ---- the report ----

    def _count(self, norm: Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if norm is not None:
            device = norm.device
        else:
            items = flatten_params(_parameters_of(args, kwargs))
            if not items:
                return
            device = items[0].device
        with self._counting:
            self._clips[choice.current(), device] += 1

    def _note(self, reason: str) -> None:
        """Take note of a call that is left to torch, and warn if it is the first of its kind."""
        kind = re.sub(r"-?\d[\w.+-]*", "#", reason.split(", got ")[0])
        with self._counting:
            first = self._by_torch[kind] == 0
            self._by_torch[kind] += 1
            if first:
                self._reasons[kind] = reason
        if first:
            warnings.warn(
                f"torch.nn.utils.{reason}; so fastclip leaves this call, and others of the kind, to torch's own code",
                RuntimeWarning,
                stacklevel=5,  # whoever calls torch's function
            )

    def counts(self) -> dict[str, dict[str, int]]:
        """How many clips there were so far: ``"fastclip"``, by backend, and ``"torch"``, by the reason why fastclip
        left them to torch."""
        with self._counting:
            clips, by_torch = dict(self._clips), dict(self._by_torch)
        by_backend: Counter[str] = Counter()
        for (name, device), count in clips.items():
            with backends.use_backend(name):
                by_backend[backends.choose(device).name] += count
        return {"fastclip": dict(by_backend), "torch": {self._reasons[kind]: n for kind, n in by_torch.items()}}

    def reset_counts(self) -> None:
        """Begin to count anew, in a fork."""
        self._counting = threading.Lock()
        self._clips, self._by_torch = Counter(), Counter()


def unpatch_torch() -> None:
    """Make torch's functions what they were; nothing, where they are. Records are closed."""
    with _lock:
        patch = _active
        _install(None)
    while patch is not None:
        patch._record.close()
        patch = patch._before


def record_path(target: str | os.PathLike[str]) -> Path:
    """`target` as the path of a file that can be made; OSError if it cannot."""
    path = Path(target)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"record: there is no folder {str(path.parent)!r} to write {path.name!r} in")
    if path.is_dir():
        raise IsADirectoryError(f"record must be a file, {str(path)!r} is a folder")
    return path


class _Record:
    """The GradMonitors of a patch, one for each set of parameters."""

    def __init__(self, target: str | os.PathLike[str] | GradMonitor | None) -> None:
        self._given = target if isinstance(target, GradMonitor) else None
        self._path = None if target is None or isinstance(target, GradMonitor) else record_path(target)
        self._monitors: weakref.WeakKeyDictionary[ParameterSet, GradMonitor] = weakref.WeakKeyDictionary()
        self._count = 0

    def update(self, parameters: ParameterSet, stats: Stats) -> None:
        monitor = self._monitors.get(parameters)
        if monitor is None:
            monitor = self._made()
            if monitor is None:
                return
            self._monitors[parameters] = monitor
        monitor.update(stats)

    def _made(self) -> GradMonitor | None:
        if self._given is not None:
            given, self._given = self._given, None
            return given
        if self._path is None:
            return None
        self._count += 1
        suffix = f"-{self._count}" if self._count > 1 else ""
        path = self._path.with_name(f"{self._path.stem}{suffix}{self._path.suffix}")
        try:
            return GradMonitor(path)
        except (OSError, ValueError) as error:  # training goes on
            self._path = None
            warnings.warn(f"record: nothing is recorded here, {error}", RuntimeWarning, stacklevel=8)
            return None

    def close(self) -> None:
        """Close the files, but no monitor that was given."""
        if self._path is not None:
            for monitor in list(self._monitors.values()):
                monitor.close()
        self._monitors.clear()


class _Place:
    """Where the implementation of one of torch's functions is kept: the cell of its closure, or attributes."""

    def __init__(self, name: str) -> None:
        function = getattr(clip_grad, name)
        free = getattr(getattr(function, "__code__", None), "co_freevars", ())
        self._cell = function.__closure__[free.index("func")] if "func" in free else None
        self._function = function
        self._attributes = [
            (module, attribute)
            for module in (clip_grad, torch.nn.utils)
            for attribute, value in vars(module).items()
            if value is function
        ]
        self.original: Callable[..., Any] = function if self._cell is None else self._cell.cell_contents

    def put(self, implementation: Callable[..., Any]) -> None:
        if self._cell is not None:
            self._cell.cell_contents = implementation
            return
        if implementation is not self.original:
            implementation = functools.wraps(self._function)(torch.no_grad()(implementation))
        for module, attribute in self._attributes:
            setattr(module, attribute, implementation)


@functools.cache
def _places() -> dict[str, _Place]:
    return {name: _Place(name) for name in FUNCTIONS if hasattr(clip_grad, name)}


def _install(patch: patch_torch | None) -> None:
    global _active
    for name, place in _places().items():
        place.put(place.original if patch is None else _dispatcher(patch, name, place.original))
    _active = patch


def _dispatcher(patch: patch_torch, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    def dispatch(*args: Any, **kwargs: Any) -> Any:
        return patch.call(name, original, args, kwargs)

    return dispatch


def _parameters_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else kwargs.get("parameters", kwargs.get("tensors"))


def _listed(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments, with an iterator as a list: what fastclip has used up torch could not use any more."""
    parameters = _parameters_of(args, kwargs)
    if type(parameters) is list or not isinstance(parameters, Iterator):
        return args, kwargs
    items = list(parameters)
    if not items:  # an empty generator, which both warn of
        return args, kwargs
    if args:
        return (items, *args[1:]), kwargs
    return args, {name: items if value is parameters else value for name, value in kwargs.items()}


def _takes_numbers(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """For torch.compile: whether what should be a number is no string or bool, which only torch takes as one."""
    count = 2 if name == "clip_grad_norm_" else 1
    values = (*args[1 : 1 + count], *(kwargs.get(argument) for argument in ("max_norm", "norm_type", "clip_value")))
    return not any(isinstance(value, (str, bool)) for value in values)


CHECKS: dict[str, Callable[[Any, str], Any]] = {
    "max_norm": checked_limit,
    "norm_type": nonnegative,
    "clip_value": nonnegative,
    "total_norm": lambda value, _: checked_norm(value),
}


def _refusal(ours: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Why fastclip refuses these arguments. None if it does not: what was raised came from the work itself, which may
    have begun to write, or of which other ranks know."""
    try:
        arguments = inspect.signature(ours).bind(*args, **kwargs).arguments
        for name, check in CHECKS.items():
            if name in arguments:
                check(arguments[name], name)
        items = flatten_params(_parameters_of(args, kwargs))
        if not any_dtensor(items) and not MARKED:
            gradients = ours is functional.total_norm
            pack(items, gradients=gradients, write=not gradients, argument="tensors" if gradients else "parameters")
    except REFUSALS as refusal:
        return str(refusal)
    return None
