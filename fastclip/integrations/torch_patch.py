"""fastclip in the place of ``torch.nn.utils.clip_grad_norm_`` and its kin, whoever calls them."""

from __future__ import annotations

import inspect
import os
import re
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

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
from .clippers import Clippers, RuleSpec
from .records import Records
from .torch_functions import OURS, torch_functions

REFUSALS = (TypeError, ValueError, RuntimeError, NotImplementedError)

_lock = threading.RLock()
_patches: list[
    patch_torch
] = []  # the last one is in force; below it are those that are there again when its block ends
_this_thread = threading.local()  # .in_torch: whether it is in torch's own code, which calls these functions too


class patch_torch:
    """Let ``torch.nn.utils.clip_grad_norm_``, ``clip_grad_norm``, ``clip_grad_value_``, ``get_total_norm`` and
    ``clip_grads_with_norm_`` be fastclip's, for everyone who calls them, whenever they were imported.

    A plain call lasts until :func:`unpatch_torch`; ``with patch_torch():`` ends with the block, and what was in force
    before is so again. A second plain call replaces the first. The patch is the whole process's.

    Args:
        rule: what takes the place of the limit that callers pass to ``clip_grad_norm_`` (and
            ``clip_grads_with_norm_``): a rule, a number, a list of such, or a function from the passed `max_norm` to
            one of these. Every set of parameters has a copy of its own. A call with ``inf`` as limit only measures, and
            no rule applies. ``clip_grad_value_`` keeps its limit. A number limits the norm of the type that the caller
            asks for; with rules of another type, that norm is what the call returns.
        fallback: what torch takes and fastclip refuses (a negative `max_norm`, one that is a string or a bool,
            overlapping gradients, ...) goes on to torch's own code, with one warning of each kind that has the reason.
            False: it raises. Gradients of several ranks raise anyway unless the numbers are what is refused.
        record: a file in which a :class:`fastclip.monitor.GradMonitor` keeps every clip; or such a monitor. Of further
            sets of parameters the files are called ``name-2.jsonl`` and so on.

    Raises:
        TypeError, ValueError: `rule` is of another kind, or goes by names of parameters, which no caller passes.
        OSError: there is no folder for `record`.

    With a rule, ``clip_grads_with_norm_`` decides from the norm it is given if the rule goes by that alone, and
    otherwise measures its parameters itself. Inside of torch.compile a plain patch stays in the graph, where only
    strings and bools go on to torch, and calls are not counted; with `rule` or `record` a call is a graph break.

    Example:
        >>> fastclip.patch_torch(rule=fastclip.rules.ZClip(), record="run.jsonl")
        >>> trainer.train()
    """

    def __init__(
        self,
        rule: RuleSpec | None = None,
        *,
        fallback: bool = True,
        record: str | os.PathLike[str] | GradMonitor | None = None,
    ) -> None:
        self._clippers, self._value_clippers = Clippers(rule), Clippers(lambda limit: Value(limit))
        self._fallback, self._records = fallback, Records(record)
        self._work = dict(OURS)  # what does each function's work
        self._is_plain = rule is None and record is None
        if not self._is_plain:
            self._work |= {"clip_grad_norm_": self._clip_norm_, "_clip_grads_with_norm_": self._clip_with_norm_}
        if record is not None:
            self._work["clip_grad_value_"] = self._clip_value_
        self._counts = _Counts()
        self._is_block = False
        with _lock:
            if _patches and not _patches[-1]._is_block:
                _drop(_patches[-1]._others())  # those that it has replaced
            _patches.append(self)
            _install()

    def __enter__(self) -> patch_torch:
        self._is_block = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with _lock:
            if self in _patches:  # else unpatch_torch() has been called meanwhile
                end = start = _patches.index(self)
                while end + 1 < len(_patches) and not _patches[end + 1]._is_block:
                    end += 1  # plain calls of the block
                _drop(_patches[start : end + 1])
                _install()
        self._records.close()

    def _others(self) -> list[patch_torch]:
        """The plain calls before this plain call, which nothing can bring back."""
        start = end = _patches.index(self)
        while start > 0 and not _patches[start - 1]._is_block:
            start -= 1
        return _patches[start:end]

    def call(self, name: str, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What torch's function `name`, whose implementation is `original`, does while the patch is in force."""
        ours = OURS[name]
        if is_dynamo_compiling():
            if not self._is_plain:
                from .. import graph_breaks

                return graph_breaks.call(patch_torch.call, self, name, original, args, kwargs)
            self._counts.compiled = True
            return (ours if _takes_numbers(name, args, kwargs) else original)(*args, **kwargs)
        if getattr(_this_thread, "in_torch", False):
            return original(*args, **kwargs)
        args, kwargs = _with_list(args, kwargs)
        try:
            done = self._work[name](*args, **kwargs)
        except REFUSALS:
            reason = _refusal(ours, args, kwargs) if self._fallback else None
            if reason is None:
                raise
        else:
            if name != "_get_total_norm":
                self._counts.add_clip(done, args, kwargs)
            return done
        self._counts.add_refusal(f"{name.lstrip('_')}: {reason}")
        _this_thread.in_torch = True
        try:
            return original(*args, **kwargs)
        finally:
            _this_thread.in_torch = False

    # ---- torch's functions, by a rule or for a record ----

    def _clip_norm_(
        self,
        parameters: functional.Parameters,
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
        foreach: bool | None = None,
    ) -> Tensor:
        items = flatten_params(parameters, stacklevel=6)
        if not items or self._clippers.only_measures(max_norm):
            return functional.clip_norm_(items, max_norm, norm_type, error_if_nonfinite)
        policy = "raise" if error_if_nonfinite else "propagate"
        norm = self._clip_(self._clippers, items, max_norm, norm_type, Clipper.clip_, policy).total_norm
        return norm.to(next((p.grad.device for p in items if p.grad is not None), norm.device))

    def _clip_with_norm_(
        self,
        parameters: functional.Parameters,
        max_norm: float,
        total_norm: Tensor,
        foreach: bool | None = None,
    ) -> None:
        items = flatten_params(parameters, stacklevel=6)
        if not items or self._clippers.only_measures(max_norm):
            functional.clip_with_norm_(items, max_norm, total_norm)
            return

        def clip_(clipper: Clipper) -> Stats:
            return clipper.clip_with_norm_(total_norm) if clipper.goes_by_total_norm else clipper.clip_()

        self._clip_(self._clippers, items, max_norm, 2.0, clip_)

    def _clip_value_(self, parameters: functional.Parameters, clip_value: float, foreach: bool | None = None) -> None:
        if items := flatten_params(parameters, stacklevel=6):
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
        parameter_set = clippers.find(items, limit, norm_type)
        with parameter_set.lock:  # what a rule remembers is for one thread at a time
            try:
                clipper = parameter_set.lend(items, limit, norm_type)
                clipper.nonfinite = policy
                stats = clip_(clipper)
            finally:
                parameter_set.clipper.release_parameters()
            if not self._is_block and len(_patches) > 1:
                with _lock:  # what this plain call has replaced may have the same file open
                    _drop(self._others() if self in _patches else [])
            self._records.update(parameter_set, stats)
        return stats

    # ---- the report ----

    def counts(self) -> dict[str, Any]:
        """How many calls there were so far: ``"fastclip"``: clips by backend; ``"torch"``: what was left to torch, by
        reason; ``"compiled"``: whether there were others in compiled code, which are not counted."""
        return self._counts.as_dict()

    def after_fork(self) -> None:
        """Begin anew in a child."""
        self._counts = _Counts()

    def close(self) -> None:
        """Close the records; the patch stays in force."""
        self._records.close()


def unpatch_torch() -> None:
    """Make torch's functions what they were; nothing, where they are. Records are closed."""
    with _lock:
        _drop(list(_patches))
        _install()


def _drop(patches: list[patch_torch]) -> None:
    for patch in patches:
        _patches.remove(patch)
        patch._records.close()


def _install() -> None:
    """Put the last patch in force, if there is one."""
    patch = _patches[-1] if _patches else None
    for name, function in torch_functions().items():
        original = function.original
        function.set_implementation(original if patch is None else _dispatcher(patch, name, original))


def _dispatcher(patch: patch_torch, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    def dispatch(*args: Any, **kwargs: Any) -> Any:
        return patch.call(name, original, args, kwargs)

    return dispatch


class _Counts:
    """How many calls of a patch were fastclip's, and how many were left to torch."""

    def __init__(self) -> None:
        self._clips: Counter[tuple[str, torch.device]] = Counter()  # by choice of backend and device
        self._refusals: Counter[str] = Counter()  # by kind of reason
        self._reasons: dict[str, str] = {}  # kind -> the first reason of it
        self._lock = threading.Lock()
        self.compiled = False

    def add_clip(self, norm: Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if norm is not None:
            device = norm.device
        else:
            items = flatten_params(_parameters_of(args, kwargs))
            if not items:
                return
            device = items[0].device
        with self._lock:
            self._clips[choice.current(), device] += 1

    def add_refusal(self, reason: str) -> None:
        """Take note of a call that is left to torch, and warn if it is the first of its kind."""
        kind = re.sub(r"-?\d[\w.+-]*", "#", reason.split(", got ")[0])
        with self._lock:
            first = self._refusals[kind] == 0
            self._refusals[kind] += 1
            self._reasons.setdefault(kind, reason)
        if first:
            warnings.warn(
                f"torch.nn.utils.{reason}; so fastclip leaves this call, and others of the kind, to torch's own code",
                RuntimeWarning,
                stacklevel=5,  # whoever calls torch's function
            )

    def as_dict(self) -> dict[str, Any]:
        with self._lock:
            clips, refusals = dict(self._clips), dict(self._refusals)
        by_backend: Counter[str] = Counter()
        for (name, device), count in clips.items():
            with backends.use_backend(name):
                by_backend[backends.choose(device).name] += count
        by_reason = {self._reasons[kind]: count for kind, count in refusals.items()}
        return {"fastclip": dict(by_backend), "torch": by_reason, "compiled": self.compiled}


def _parameters_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else kwargs.get("parameters", kwargs.get("tensors"))


def _with_list(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
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
