"""The backends, and the choice between them. What a backend is stands in :mod:`fastclip.backends.base`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, cast

import torch

from . import choice, packers
from .base import Backend, FusedBackend, GradGroup, Measurement, NativeGroup, StepBackend
from .choice import BACKENDS, checked, current, use_backend
from .devices import place_of, wide_device, widened
from .transfer import UploadCache, added, capturing, loaded, upload

if TYPE_CHECKING:  # so that mypy holds the modules to the interface
    from . import cpu, cuda, foreach, reference, triton

    _backends: tuple[Backend, ...] = (foreach, reference)
    _step_backends: tuple[StepBackend, ...] = (cpu, cuda, triton)

__all__ = [
    "BACKENDS",
    "Backend",
    "GradGroup",
    "Measurement",
    "NativeGroup",
    "UploadCache",
    "added",
    "capturing",
    "choose",
    "choose_fused",
    "choose_step",
    "current",
    "get",
    "loaded",
    "place_of",
    "upload",
    "use_backend",
    "wide_device",
    "widened",
]

AUTO = {"cpu": ("cpu", "foreach"), "cuda": ("triton", "cuda", "foreach"), "xpu": ("triton", "foreach")}
ELSEWHERE = ("foreach",)


def get(name: str) -> Backend:
    """The backend called `name`: a module, loaded on first use."""
    return cast(Backend, importlib.import_module(f"{__name__}.{name}"))


def choose(device: torch.device) -> Backend:
    """The backend for gradients on `device` under the current choice; RuntimeError if the one asked for cannot run,
    ValueError if there is none of the name in ``FASTCLIP_BACKEND``."""
    choice = current()
    if choice != "auto":
        backend = get(checked(choice, "FASTCLIP_BACKEND"))
        if reason := backend.why_not(device):
            raise RuntimeError(f"backend {choice!r} was asked for but cannot run on {device}: {reason}")
        return backend
    for name in AUTO.get(device.type, ELSEWHERE):
        backend = get(name)
        if backend.why_not(device) is None:
            return backend
    raise AssertionError("the foreach backend runs everywhere")


def choose_step(device: torch.device) -> StepBackend | None:
    """:func:`choose`, where that backend takes optimizers' steps; else None."""
    backend = choose(device)
    return None if backend.name in ("foreach", "reference") else cast(StepBackend, backend)


def choose_fused() -> FusedBackend | None:
    """The backend that has the commonest call in one go, if the current choice allows it: it finds out by itself which
    gradients are on its device."""
    # current(), which here takes a twentieth of the shortest clip, only inside a `with` block.
    name = current() if choice._context.get() else choice._default
    chosen = packers.chosen or packers.get()
    return chosen.packer if name == "auto" or (name == "cpu" and chosen.kernels is not None) else None
