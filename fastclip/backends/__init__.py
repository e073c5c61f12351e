"""The backends, and the choice between them.

A backend is a module with ``name``, ``why_not(device)`` (None if it can run there), ``describe()`` and verbs over
a :class:`~fastclip.table.Group`: ``measure(group, norm_type, max_norm, before)``, where `before` is the ``total`` of a
group measured before on the same device; ``apply_(group, coef)``; and ``clamp_(group, low, high)``, which returns, as a
[] bool on the group's device, whether it changed anything. Backends know no rule and never import each other.

``repair_(group, measured, norm_type)`` sets elements that are inf or NaN to 0, in the gradients that `measured` says
have some, and returns what ``measure`` would give now and, as int64 [T], how many there were. Where there are none it
costs no pass over the gradients, and the host of a GPU does not wait to know.

All but `reference` also have the optimizers' steps, over a :class:`~fastclip.table.StepTable`, in one pass:
``adamw_(table, coef, idle, group, zero_grad, seed)`` and ``sgd_(..., rest)``. `coef`, float64 [] or [T], multiplies
the gradients as they are read (+0 stands for gradients of zeros, whatever is in them); where `idle`, bool [] or [T] or
None, is true, parameter, states and step count stay as they are; both are on the table's device and never read by the
host. `group` is the optimizer's parameter group, of which "lr" may be a [] tensor; `zero_grad` sets the gradients to
zero afterwards, idle or not; `seed` (32 bits, or None) rounds bfloat16 by chance; `rest` is 1 - dampening, or 1 in
SGD's first step. Gradients and states are as in torch.optim.
"""

from __future__ import annotations

import contextlib
import importlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from .choice import BACKENDS, checked, current, use_backend

__all__ = ["BACKENDS", "current", "use_backend"]


class Measurement(NamedTuple):
    """What one read of a group's gradients gives, on the group's device, in float64."""

    power: Tensor  # [T] sum of |g|^p of each tensor
    absmax: Tensor  # [T] max |g| of each tensor, NaN if it holds one
    # Where the backend has them at no extra cost, of this group and those measured `before` it:
    norm: Tensor | None = None  # [] the p-norm
    coef: Tensor | None = None  # [] the clip coefficient of that norm, where `max_norm` was given
    total: Tensor | None = None  # [2] sum of the powers (p = 0: the number of tensors that are not all zero), max |g|


def capturing(device: torch.device) -> bool:
    """Whether what is launched on `device` now becomes part of a CUDA graph."""
    if device.type != "cuda":
        return False
    if device.index is None or device.index == torch.cuda.current_device():
        return torch.cuda.is_current_stream_capturing()
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def repaired_on_host(
    group: Any, measured: Measurement, measure: Callable[[], Measurement]
) -> tuple[Measurement, Tensor]:
    """``repair_`` where the host may know what was measured: on a CPU."""
    counts = torch.zeros(len(group), dtype=torch.int64, device=group.device)
    for i in (~measured.absmax.isfinite()).nonzero().flatten().tolist():
        with writing(group.tensors[i]):
            for piece in slices(group.tensors[i]):
                broken = ~piece.isfinite()
                counts[i] += broken.sum()
                piece.masked_fill_(broken, 0)
    return measure() if counts.any() else measured, counts


SLICE = 1 << 20  # elements that plain torch works on at a time, so that memory stays bounded


def slices(tensor: Tensor) -> Iterator[Tensor]:
    """Views of at most SLICE elements, which together are `tensor`."""
    if tensor.numel() > SLICE:
        widest = max(range(tensor.dim()), key=tensor.size)
        for half in tensor.chunk(2, widest):
            yield from slices(half)
    elif tensor.numel() > 0:
        yield tensor


@contextlib.contextmanager
def writing(tensor: Tensor) -> Iterator[None]:
    """Where autograd lets `tensor` be changed in place: one made in inference mode only there."""
    with torch.inference_mode() if tensor.is_inference() else torch.no_grad():
        yield


_captured: list[Tensor] = []  # what CUDA graphs copy from the host at every replay, for as long as the process lives


def upload(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`values` (a list or a tensor on the host) as a tensor on `device`, without waiting for the device."""
    host = torch.as_tensor(values, dtype=dtype, device="cpu")
    if device.type == "cpu":
        return host
    if isinstance(values, Tensor) and host.data_ptr() == values.data_ptr():
        host = host.clone()  # pinned already, it would be read after its owner has changed it
    host = host.pin_memory()
    if capturing(device):
        _captured.append(host)
    return host.to(device, non_blocking=True)


Made = TypeVar("Made")


class Recent(Generic[Made]):
    """What was made from the most recent tables, so that a call that finds the same addresses again uploads nothing.

    Entries are found by a key (device, dtype, stream) and by all of the table's contents, so none can be stale.
    """

    SIZE = 16

    def __init__(self) -> None:
        self.entries: list[tuple[Any, Tensor, Made]] = []  # most recently used first
        self._lock = threading.Lock()  # torch.equal lets other threads run in the middle of a search

    def get(self, device: torch.device, key: Any, host: Tensor, make: Callable[[], Made]) -> Made:
        """make(), or what it gave for the same key and contents before."""
        if capturing(device):
            return make()  # every copy must be in the graph, and memory that it captured must not serve others
        with self._lock:
            for i, entry in enumerate(self.entries):
                if entry[0] == key and torch.equal(entry[1], host):
                    self.entries.insert(0, self.entries.pop(i))
                    return entry[2]
            self.entries.insert(0, (key, host, make()))
            del self.entries[self.SIZE :]
            return self.entries[0][2]


AUTO = {"cpu": ("cpu", "reference"), "cuda": ("triton", "cuda", "reference"), "xpu": ("triton", "reference")}


def get(name: str) -> Any:
    """The backend module called `name`."""
    return importlib.import_module(f"{__name__}.{name}")


def choose(device: torch.device) -> Any:
    """The backend for gradients on `device` under the current choice; RuntimeError if the one asked for cannot run,
    ValueError if there is none of the name in ``FASTCLIP_BACKEND``."""
    choice = current()
    if choice != "auto":
        backend = get(checked(choice, "FASTCLIP_BACKEND"))
        if reason := backend.why_not(device):
            raise RuntimeError(f"backend {choice!r} was asked for but cannot run on {device}: {reason}")
        return backend
    for name in AUTO.get(device.type, ("reference",)):
        backend = get(name)
        if backend.why_not(device) is None:
            return backend
    raise AssertionError("the reference backend runs everywhere")
