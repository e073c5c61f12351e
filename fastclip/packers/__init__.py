"""Which packer runs: how gradients become tables, and the CPU kernels are called. The best that is there:

1. ``compiled``, where a build against this torch is in the cache: ``python -m fastclip build`` made it, or a first use;
2. ``abi3``, which comes with the wheel and needs torch 2.14;
3. ``compiled``, built now, where there is a C++ compiler;
4. ``python``, with the kernels that come with the wheel or are built now, else with plain torch instead of them.

``FASTCLIP_PACKER`` names the one to use. It is built if neither the cache nor the wheel has it; an error if that fails.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pathlib
import threading
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..native import cpu_interface, libraries
from .abi3 import Abi3Packer
from .base import FusedClip, FusedStats, Kernels, MeasureGradients, NativeGroup, NativeStepGroup, Packer
from .cpu_kernels import CpuKernels
from .python import PythonPacker

__all__ = [
    "Chosen",
    "FusedClip",
    "FusedStats",
    "Kernels",
    "MeasureGradients",
    "NativeGroup",
    "NativeStepGroup",
    "Packer",
    "get",
]

PACKERS = ("compiled", "abi3", "python")
PROCESS = os.getpid()  # that imported this; another one later is a fork of it
ABI3_NEEDS = "torch_tensor_from_pyobject"  # of torch's stable C interface, since 2.14


class Chosen(NamedTuple):
    """The packer that runs, and why there are no kernels, if there are none."""

    name: str
    packer: Packer
    kernels: Kernels | None
    why_not: str | None = None


chosen: Chosen | None = None  # by the first get()
_lock = threading.RLock()


def get() -> Chosen:
    """The packer of this process, chosen at the first call.

    Raises:
        ValueError: ``FASTCLIP_CPU_ISA`` or ``FASTCLIP_PACKER`` names what is not there.
        RuntimeError: the packer that ``FASTCLIP_PACKER`` asks for cannot run.
    """
    global chosen
    if chosen is None:
        with _lock:
            if chosen is None:
                chosen = _choose()
                if chosen.why_not is not None:
                    warnings.warn(
                        f"fastclip has no kernels for the CPU here and works by plain torch, at about torch's speed: "
                        f"{chosen.why_not} `python -m fastclip build` tries again and shows the whole story.",
                        RuntimeWarning,
                        stacklevel=5,
                    )
    return chosen


def named(name: str) -> Chosen:
    """The packer called `name`, whatever the choice. RuntimeError if it cannot run."""
    if name == "compiled":
        return _compiled(libraries.cpp.get())
    if name == "abi3":
        if torch_library() is None:
            raise RuntimeError(f"the packer abi3 needs torch 2.14, and this is {torch.__version__}")
        return _abi3(libraries.abi3.get(), libraries.kernels.get())
    return _python()


def _choose() -> Chosen:
    libraries.check_isa()
    if asked := os.environ.get("FASTCLIP_PACKER"):
        if asked not in PACKERS:
            raise ValueError(f"FASTCLIP_PACKER must be one of {', '.join(PACKERS)}, got {asked!r}")
        return named(asked)
    if (library := libraries.cpp.load_built()) is not None:
        return _compiled(library)
    if torch_library() is not None:
        module, kernels = libraries.abi3.load_prebuilt(), libraries.kernels.load_prebuilt()
        if module is not None and kernels is not None:
            with contextlib.suppress(AttributeError, RuntimeError):  # a later torch may lack what the module needs
                return _abi3(module, kernels)
    if (library := libraries.cpp.load(warn=False)) is not None:
        return _compiled(library)
    return _python()


def _compiled(library: Any) -> Chosen:
    _after_fork(library.work_alone)
    return Chosen("compiled", library, library)


def _abi3(module: Any, library: ctypes.CDLL) -> Chosen:
    torch_functions = torch_library()
    assert torch_functions is not None
    kernels = _cpu_kernels(library)
    packer = Abi3Packer(module, kernels, torch_functions)
    _after_fork(packer.work_alone)
    return Chosen("abi3", packer, kernels)


def _python() -> Chosen:
    library = libraries.kernels.load(warn=False)
    if library is not None:
        kernels = _cpu_kernels(library)
        return Chosen("python", PythonPacker(kernels), kernels)
    reason = libraries.cpp.failure() or libraries.kernels.failure()
    assert reason is not None
    return Chosen("python", PythonPacker(None), None, reason)


def _cpu_kernels(library: ctypes.CDLL) -> CpuKernels:
    found = _torch_library()
    kernels = CpuKernels(library, 0 if found is None else cpu_interface.address_of(found, "torch_parallel_for"))
    _after_fork(kernels.work_alone)
    return kernels


def _after_fork(work_alone: Callable[[], None]) -> None:
    if os.getpid() != PROCESS:
        work_alone()
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=work_alone)


def _torch_library() -> ctypes.CDLL | None:
    """torch's own library, which is loaded already; None if it is not where it usually is."""
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib", "torch_cpu.dll"):
        path = pathlib.Path(torch.__file__).parent / "lib" / name
        if path.is_file():
            library = ctypes.CDLL(str(path))
            return library if hasattr(library, "torch_parallel_for") else None
    return None


def torch_library() -> ctypes.CDLL | None:
    """The same, if it has what the packer ``abi3`` needs."""
    library = _torch_library()
    return library if library is not None and hasattr(library, ABI3_NEEDS) else None
