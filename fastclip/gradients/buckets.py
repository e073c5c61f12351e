"""Buckets: gradients on their way through backward, handed over a few at a time as soon as they are complete.

A hook of each parameter tells when its gradient is complete (``register_post_accumulate_grad_hook``; FSDP2 calls it
once the gradient of this rank's part is reduced). What has come is handed over once it is worth a launch.
"""

from __future__ import annotations

import math
import operator
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ..distributed.unwrap import is_shard, local_of, spec_of
from .pack import same_items

IMPLEMENTATION = operator.attrgetter("_cdata")  # of a tensor, in C++, where autograd has its hooks

Ready = Callable[[list[Tensor]], None]
Again = Callable[[Tensor], None]


class Buckets:
    """Hands parameters over whose gradients are complete, in the order in which these come.

    Args:
        ready: called with the parameters of a bucket, each once, in one thread at a time. If it raises, those that it
            has left in the list wait on, before all others, and the error goes through backward or :meth:`flush`.
        bucket_bytes: of parameters, after which a bucket is full. Of a DTensor it is its share of the whole that
            counts, as if all ranks had equal parts, so that all ranks make the same buckets.
        again: called with a parameter that comes another time since :meth:`clear`, before it is taken in.

    Methods that are given as `ready` and `again` are held weakly, and the hooks hold this object weakly: whoever owns
    it may be dropped while its parameters live on, and nothing happens then. A copy has no hooks until :meth:`watch`.

    While :attr:`paused`, gradients that come are left where they are.

    On GPUs ``ready`` may launch on the current streams: they wait for those on which the gradients came, and for those
    of earlier buckets, and the gradients' memory is not reused before what has been launched is done.
    """

    def __init__(self, ready: Ready, bucket_bytes: int, again: Again | None = None) -> None:
        self.bucket_bytes = bucket_bytes
        self.paused = False
        self._ready, self._again = _weakly(ready), None if again is None else _weakly(again)
        self._lock = threading.RLock()  # autograd has a thread for each device
        self._waiting: dict[_Hook, Tensor] = {}
        self._bytes = 0
        self._round = 0  # counts clear()
        self._parameters: list[Tensor] = []
        self._frozen: list[Tensor] = []  # those that need no hook yet
        self._handles: dict[int, tuple[Tensor, RemovableHandle]] = {}
        self._hooked: list[Tensor] = []  # those of the handles
        self._implementations: list[int] = []  # theirs
        self._arrived_on: set[Any] = set()  # streams
        self._launched_on: dict[int, Any] = {}  # device -> stream

    def watch(self, parameters: list[Tensor]) -> None:
        """Hook these parameters, as far as they require a gradient, and no others any more."""
        if not self.changes(parameters):
            return
        self._parameters = list(parameters)
        wanted = {id(p): p for p in parameters if p.is_leaf}
        for key in self._handles.keys() - wanted.keys():
            self._handles.pop(key)[1].remove()
        for p, implementation in zip(self._hooked, self._implementations):
            if id(p) in self._handles and IMPLEMENTATION(p) != implementation:  # which knows of no hooks
                p._post_accumulate_grad_hooks = p._post_accumulate_grad_hooks
        for key, p in wanted.items():
            if key not in self._handles and p.requires_grad:
                hook = _Hook(weakref.ref(self), share_of(p))
                self._handles[key] = p, p.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
        self._frozen = [p for key, p in wanted.items() if key not in self._handles]
        self._hooked = [p for p, _ in self._handles.values()]
        self._implementations = list(map(IMPLEMENTATION, self._hooked))

    def changes(self, parameters: list[Tensor]) -> bool:
        """Whether :meth:`watch` has anything to do: they are others, some require a gradient now, or a tensor has been
        given another implementation (``torch.utils.swap_tensors``, with which modules may be converted)."""
        return (
            not same_items(parameters, self._parameters)
            or any(p.requires_grad for p in self._frozen)
            or list(map(IMPLEMENTATION, self._hooked)) != self._implementations
        )

    def flush(self) -> None:
        """Hand over what waits, full bucket or not. The current streams then wait for all that was launched."""
        with self._lock:
            self._hand_over()

    def clear(self) -> None:
        """Forget what waits, and which parameters have come."""
        with self._lock:
            self._waiting.clear()
            self._bytes = 0
            self._round += 1

    def remove(self) -> None:
        """Take all hooks away, and forget what waits."""
        for _, handle in self._handles.values():
            handle.remove()
        self._handles.clear()
        self._parameters, self._frozen, self._hooked, self._implementations = [], [], [], []
        self.clear()

    def __len__(self) -> int:
        """How many parameters wait."""
        return len(self._waiting)

    def __del__(self) -> None:
        for _, handle in self.__dict__.get("_handles", {}).values():
            handle.remove()

    def __reduce__(self) -> Any:
        again = None if self._again is None else self._again()
        return Buckets, (self._ready(), self.bucket_bytes, again)

    def _arrived(self, hook: _Hook, parameter: Tensor) -> None:
        if self.paused:
            return
        with self._lock:
            if hook.seen == self._round and self._again is not None and (again := self._again()) is not None:
                again(parameter)
            hook.seen = self._round
            if parameter.is_cuda:
                self._arrived_on.add(torch.cuda.current_stream(parameter.device))
            if hook not in self._waiting:
                self._waiting[hook] = parameter
                self._bytes += hook.size
            if self._bytes >= self.bucket_bytes:
                self._hand_over()

    def _hand_over(self) -> None:
        self._join_streams()
        ready = self._ready()
        if not self._waiting or ready is None:
            return
        hooks, parameters = list(self._waiting), list(self._waiting.values())
        batch = list(parameters)
        self._waiting.clear()
        self._bytes = 0
        try:
            ready(batch)
        except BaseException:
            left = set(map(id, batch))
            kept = {hook: p for hook, p in zip(hooks, parameters) if id(p) in left}
            self._waiting = {**kept, **self._waiting}
            self._bytes = sum(hook.size for hook in self._waiting)
            raise

    def _join_streams(self) -> None:
        """Let the current streams wait for those of the gradients that wait here, and of earlier buckets."""
        if not self._arrived_on and not self._launched_on:
            return
        current = {device: torch.cuda.current_stream(device) for device in self._launched_on}
        for stream in self._arrived_on:
            current.setdefault(stream.device_index, torch.cuda.current_stream(stream.device_index))
        earlier = {*self._arrived_on, *self._launched_on.values()}
        for stream in earlier:
            if stream != (now := current[stream.device_index]):
                now.wait_stream(stream)
        if any(stream != current[stream.device_index] for stream in earlier):
            for p in self._waiting.values():  # allocated for another stream, which knows nothing of ours
                if p.is_cuda and p.grad is not None:
                    local_of(p.grad).record_stream(current[p.device.index])
        self._launched_on = current
        self._arrived_on.clear()


class _Hook:
    """Tells the Buckets of a parameter's gradient."""

    __slots__ = ("_buckets", "seen", "size")

    def __init__(self, buckets: weakref.ref[Buckets], size: int) -> None:
        self._buckets, self.size = buckets, size
        self.seen = -1  # the round in which it was last called

    def __call__(self, parameter: Tensor) -> None:
        buckets = self._buckets()
        if buckets is not None:
            buckets._arrived(self, parameter)


def owners_of(parameter: Tensor) -> Iterator[Any]:
    """Those whose methods are called, by their Buckets, when the parameter's gradient has come."""
    for hook in (parameter._post_accumulate_grad_hooks or {}).values():
        if isinstance(hook, _Hook) and (buckets := hook._buckets()) is not None:
            owner = getattr(buckets._ready(), "__self__", None)
            if owner is not None:
                yield owner


def share_of(parameter: Tensor) -> int:
    """The bytes of a parameter; of a DTensor those of an equal part for each rank that it is sharded over."""
    spec = spec_of(parameter)
    size = parameter.numel() * parameter.itemsize
    if spec is None:
        return size
    return size // math.prod(spec.mesh.size(i) for i, placement in enumerate(spec.placements) if is_shard(placement))


def _weakly(function: Any) -> Callable[[], Any]:
    """() -> the function; None once the object is gone that it is a method of."""
    if isinstance(function, types.MethodType):
        return weakref.WeakMethod(function)
    return lambda: function
