"""The backends, and the choice between them.

A backend is a module with ``name``, ``why_not(device)`` (None if it can run there), ``describe()`` and three verbs over
a :class:`~fastclip.table.Group`: ``measure``, ``apply_`` and ``clamp_`` (which returns, as a [] bool on the group's
device, whether it changed anything). Backends know no rule and never import each other.
"""

from __future__ import annotations

import importlib
import os
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Measurement(NamedTuple):
    """What one read of a group's gradients gives, on the group's device, in float64."""

    power: Tensor  # [T] sum of |g|^p of each tensor
    absmax: Tensor  # [T] max |g| of each tensor, NaN if it holds one
    norm: Tensor | None  # [] p-norm of the whole group, where the backend has it at no extra cost
    coef: Tensor | None  # [] clip coefficient of that norm, where `max_norm` was given


def upload(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`values` (a list or a tensor on the host) as a tensor on `device`, without waiting for the device."""
    host = torch.as_tensor(values, dtype=dtype, device="cpu")
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


BACKENDS = ("triton", "cpu", "reference")
AUTO = {"cpu": ("cpu", "reference"), "cuda": ("triton", "reference"), "xpu": ("triton", "reference")}

_choice = "auto"


def get(name: str) -> Any:
    """The backend module called `name`."""
    return importlib.import_module(f"{__name__}.{name}")


def choose(device: torch.device) -> Any:
    """The backend for gradients on `device` under the current choice; RuntimeError if the one asked for cannot run."""
    if _choice != "auto":
        backend = get(_choice)
        if reason := backend.why_not(device):
            raise RuntimeError(f"backend {_choice!r} was asked for but cannot run on {device}: {reason}")
        return backend
    for name in AUTO.get(device.type, ("reference",)):
        backend = get(name)
        if backend.why_not(device) is None:
            return backend
    raise AssertionError("the reference backend runs everywhere")


def current() -> str:
    """The current choice: "auto" or the name of a backend."""
    return _choice


class use_backend:
    """Choose the backend of all following calls; as a context manager, until the end of the block.

    The environment variable ``FASTCLIP_BACKEND`` sets the choice at import.

    Args:
        name: ``"triton"``, ``"cpu"``, ``"reference"``, or ``"auto"`` (the best that runs on each gradient's device).
            Gradients that no kernel handles (complex, sparse, views with gaps) go to ``reference`` all the same.

    Raises:
        ValueError: no backend has that name. One that cannot run raises RuntimeError, with the reason, when it is used.
    """

    def __init__(self, name: str) -> None:
        global _choice
        self._name = _check(name, "name")
        self._before, _choice = _choice, name
        self._entered = False

    def __enter__(self) -> None:
        global _choice
        if self._entered or _choice != self._name:  # not straight from the constructor
            self._before, _choice = _choice, self._name
        self._entered = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _choice
        _choice = self._before


def _check(name: str, argument: str) -> str:
    if name not in (*BACKENDS, "auto"):
        raise ValueError(f"{argument} must be one of {', '.join(BACKENDS)} or auto, got {name!r}")
    return name


_choice = _check(os.environ.get("FASTCLIP_BACKEND", "auto"), "FASTCLIP_BACKEND")
