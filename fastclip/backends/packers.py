"""Which packer runs: how gradients become tables, and the CPU kernels are called. The best that is there:

1. ``compiled``, where a build against this torch is in the cache: ``python -m fastclip build`` made it, or a first use;
2. ``abi3``, which comes with the wheel and needs torch 2.14;
3. ``compiled``, built now, where there is a C++ compiler;
4. ``python``, with the kernels that come with the wheel or are built now, else with plain torch instead of them.

``FASTCLIP_PACKER`` asks for one by name, and where nothing prebuilt is there, for its build.
"""

from __future__ import annotations

import ctypes
import os
import pathlib
import threading
import warnings
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..modes import is_watched
from . import cpu_interface, native
from .base import FusedBackend, NativeGroup, NativeStepGroup
from .cpu_kernels import CpuKernels
from .python_packer import Group, PythonPacker, bump_versions, is_flattened

PACKERS = ("compiled", "abi3", "python")
PROCESS = os.getpid()  # that imported this; another one later is a fork of it
ABI3_NEEDS = "torch_tensor_from_pyobject"  # of torch's stable C interface, since 2.14


class Packer(FusedBackend, Protocol):
    """From lists of Python objects to tables. csrc/torch/bindings.cpp says what each function does."""

    def pack(self, items: list[Any], gradients_of: bool, /) -> list[NativeGroup] | None: ...
    def pack_step(
        self, params: list[Tensor], grads: list[Tensor], states: list[list[Tensor]], steps: list[Tensor], /
    ) -> NativeStepGroup | None: ...
    def bump_versions(self, tensors: list[Tensor], /) -> None: ...
    def same_items(self, a: list[Any], b: list[Any], /) -> bool: ...

    # None where it has none: fastclip.distributed.unwrap does the same in Python
    unwrap: Any


class Kernels(Protocol):
    """The CPU kernels, over the groups of the packer that they came with."""

    def measure(
        self, group: Any, p: float, max_norm: float | None, before: Tensor | None, /
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]: ...
    def apply_(self, group: Any, coef: Tensor, /) -> None: ...
    def clamp_(self, group: Any, low: float, high: float, /) -> bool: ...
    def adamw_(
        self, step: Any, coef: Tensor, frozen: Tensor | None, lr: float, beta1: float, beta2: float, eps: float,
        weight_decay: float, maximize: bool, zero_grad: bool, seed: int | None, /,
    ) -> None: ...  # fmt: skip
    def sgd_(
        self, step: Any, coef: Tensor, frozen: Tensor | None, lr: float, momentum: float, one_minus_dampening: float,
        weight_decay: float, nesterov: bool, maximize: bool, zero_grad: bool, seed: int | None, /,
    ) -> None: ...  # fmt: skip
    def isa(self) -> str: ...
    def work_alone(self) -> None: ...


class Chosen(NamedTuple):
    """The packer that runs, and why there are no kernels, if there are none."""

    name: str
    packer: Packer
    kernels: Kernels | None
    why_not: str | None = None


class Abi3Packer(PythonPacker):
    """csrc/abi3/, in C++ without torch's headers; what it leaves alone, the packer in Python does."""

    name = "abi3"
    kernels: CpuKernels

    def __init__(self, module: Any, kernels: CpuKernels, torch_library: ctypes.CDLL) -> None:
        super().__init__(kernels)
        names = {name: cpu_interface.address_of(torch_library, name) for name in module.TORCH_FUNCTIONS}
        for name in ("fastclip_cpu_clip", "fastclip_cpu_table"):
            names[name] = cpu_interface.address_of(kernels.library, name)
        objects = {
            "tensor": Tensor,
            "parameter": torch.nn.Parameter,
            "is_neg": Tensor.is_neg,
            "untyped_storage": Tensor.untyped_storage,
            "bump_versions": bump_versions,
            "is_watched": is_watched,
        }
        module.bind(names, objects)
        self._module = module
        _after_fork(module.work_alone)

    def pack(self, items: list[Any], gradients_of: bool, /) -> list[NativeGroup] | None:
        if gradients_of and is_flattened(items):
            return None
        packed = self._module.pack(items, gradients_of)
        if packed is None:
            return super().pack(items, gradients_of)
        gradients, storages, groups = packed
        if len(groups) == 1:
            ((addresses, numels, _),) = groups
            return [Group(gradients, storages, addresses, numels, [])]
        made: list[NativeGroup] = []
        for addresses, numels, in_group in groups:
            positions = memoryview(in_group).cast("q").tolist()
            own = [gradients[i] for i in positions], [storages[i] for i in positions]
            made.append(Group(*own, addresses, numels, positions))
        return made

    def clip_norm_fused(
        self, items: list[Any], of_parameters: bool, max_norm: Any, norm_type: Any, error_if_nonfinite: bool,
        per_tensor: bool, /,
    ) -> Any:  # fmt: skip
        if of_parameters and is_flattened(items):
            return None
        done = self._module.clip_norm_fused(items, of_parameters, max_norm, norm_type, error_if_nonfinite, per_tensor)
        if done is None and type(items) is list:
            return super().clip_norm_fused(items, of_parameters, max_norm, norm_type, error_if_nonfinite, per_tensor)
        return done


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
    return chosen


def _choose() -> Chosen:
    native.check_isa()
    asked = os.environ.get("FASTCLIP_PACKER")
    if asked and asked not in PACKERS:
        raise ValueError(f"FASTCLIP_PACKER must be one of {', '.join(PACKERS)}, got {asked!r}")
    if asked == "compiled":
        return _compiled(native.cpp.get())
    if asked == "abi3":
        return _abi3(native.abi3.get(), native.kernels.get())
    if asked == "python":
        return _python()
    if (library := native.cpp.load_built()) is not None:
        return _compiled(library)
    if torch_library() is not None:
        module, kernels = native.abi3.load_prebuilt(), native.kernels.load_prebuilt()
        if module is not None and kernels is not None:
            return _abi3(module, kernels)
    if (library := native.cpp.load(warn=False)) is not None:
        return _compiled(library)
    return _python()


def _compiled(library: Any) -> Chosen:
    _after_fork(library.work_alone)
    return Chosen("compiled", library, library)


def _abi3(module: Any, library: ctypes.CDLL) -> Chosen:
    torch_functions = torch_library()
    if torch_functions is None:
        raise RuntimeError(f"the packer abi3 needs torch 2.14, and this is {torch.__version__}")
    kernels = _cpu_kernels(library)
    return Chosen("abi3", Abi3Packer(module, kernels, torch_functions), kernels)


def _python() -> Chosen:
    library = native.kernels.load(warn=False)
    if library is not None:
        kernels = _cpu_kernels(library)
        return Chosen("python", PythonPacker(kernels), kernels)
    reason = native.cpp.failure() or native.kernels.failure()
    assert reason is not None
    warnings.warn(
        f"fastclip has no kernels for the CPU here and works by plain torch, at about torch's speed: {reason} "
        f"`python -m fastclip build` tries again and shows the whole story.",
        RuntimeWarning,
        stacklevel=6,
    )
    return Chosen("python", PythonPacker(None), None, reason)


def _cpu_kernels(library: ctypes.CDLL) -> CpuKernels:
    found = _torch_library()
    kernels = CpuKernels(library, 0 if found is None else cpu_interface.address_of(found, "torch_parallel_for"))
    _after_fork(kernels.work_alone)
    return kernels


def _after_fork(work_alone: Any) -> None:
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
