"""Where a launch goes, and launches that cost the host little.

Triton's own way, ``kernel[grid](...)``, looks at every argument and option anew to find the compiled kernel: 15 µs and
more. Kernels of a `Launcher` have arguments of the same types in every call, so that what was compiled for the first
serves the others.

What this file relies on of Triton's 3.6 to 3.9, beyond ``kernel[grid]`` and ``driver.active``, is all in `Compiled`:
what a `CompiledKernel` consists of and how its launcher is called, with numbers for addresses; and that the knobs for
profilers' hooks and for tools that change the code are where they are. tests/test_triton_launch.py fails where one of
them is gone; there, and on all but NVIDIA's GPUs, launches are Triton's own.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .tiles import INTERPRET, MISSING, NUM_WARPS

if MISSING is None:
    import triton
    from triton import knobs
    from triton.compiler import CompiledKernel

HERE = contextlib.nullcontext()
HOOKS = ("launch_enter_hook", "launch_exit_hook")


def on(device: torch.device) -> Any:
    """Launches inside this block go to `device`."""
    if device.type == "cpu" or device.index == _current_device():
        return HERE
    return torch.get_device_module(device.type).device(device)


def current_stream(device: torch.device) -> Any:
    """What launches on `device` go to now: two streams must not share a workspace."""
    if INTERPRET:
        return None
    if device.type == "xpu":  # Intel's driver tells that of the current device, whatever it is asked
        return torch.xpu.current_stream(device)
    index = _current_device() if device.index is None else device.index
    return triton.runtime.driver.active.get_current_stream(index)


def _current_device() -> Any:
    return None if INTERPRET else triton.runtime.driver.active.get_current_device()


def options_of(target: Any, registers: int | None = None, dependent: bool = False) -> dict[str, Any]:
    """Options of a launch on `target` (None: the interpreter): registers a thread at most, where that can be said, and
    whether it may begin, up to its `gdc_wait`, before the launch in front of it has ended."""
    options: dict[str, Any] = {"num_warps": NUM_WARPS}
    if target is not None and target.backend == "cuda":
        if registers is not None:
            options["maxnreg"] = registers
        if dependent:
            options["launch_pdl"] = True
    return options


def depends_on(target: Any) -> bool:
    """Whether launches on `target` can wait for parts of those in front ("programmatic dependent launch")."""
    return target is not None and target.backend == "cuda" and target.arch >= 90


@functools.cache
def _depends(device: Any) -> bool:
    return depends_on(target_of(device))


@functools.cache
def target_of(device: Any) -> Any:
    """What Triton compiles for on a device, by its index; called while it is the current one."""
    return None if INTERPRET else triton.runtime.driver.active.get_current_target()


def depends() -> bool:
    """`depends_on` the current device."""
    return _depends(_current_device())


class Launcher:
    """Launches of one kernel, which is not specialised by the values of its arguments.

    Arguments are of the same types in every call with the same constants.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._compiled: dict[Any, Compiled] = {}  # by device and constants

    def __call__(
        self,
        programs: int,
        arguments: tuple[Any, ...],
        constants: tuple[Any, ...],
        registers: int | None = None,
        dependent: bool = False,
    ) -> None:
        """``kernel[programs,](*arguments, *constants)`` on the current device and stream. What else there is, see
        `options_of`, follows from the constants."""
        device = _current_device()
        compiled = self._compiled.get((device, constants))
        tools = _tools()
        if compiled is not None and not tools:
            compiled.launch(programs, triton.runtime.driver.active.get_current_stream(device), arguments, constants)
            return
        target = target_of(device)
        made = self.kernel[(programs,)](*arguments, *constants, **options_of(target, registers, dependent))
        if not tools and compiled is None and target is not None and target.backend == "cuda":
            compiled = Compiled.of(made)
            if compiled is not None:
                self._compiled[device, constants] = compiled


def _tools() -> Any:
    """Whether a tool looks into the kernels, for which Triton compiles them anew."""
    return (
        getattr(knobs.compilation, "instrumentation_mode", None)
        or getattr(knobs.runtime, "debug", None)
        or getattr(knobs.runtime, "add_stages_inspection_hook", None)
    )


def _watched() -> bool:
    """Whether a profiler's hook looks on at launches: one that was added to Triton's, or set in their place."""
    hooks = [getattr(knobs.runtime, name, None) for name in HOOKS]
    return any(hook is not None and getattr(hook, "calls", True) for hook in hooks)


class Compiled(NamedTuple):
    """A kernel that was compiled and loaded, and what its launcher wants to know of it."""

    kernel: Any
    run: Any
    function: Any
    packed_metadata: Any

    @classmethod
    def of(cls, kernel: Any) -> Compiled | None:
        """None: this Triton's kernels are made otherwise."""
        found = [getattr(kernel, name, None) for name in ("run", "function", "packed_metadata")]
        known = isinstance(kernel, CompiledKernel) and None not in found
        return cls(kernel, *found) if known and all(hasattr(knobs.runtime, name) for name in HOOKS) else None

    def launch(self, programs: int, stream: int, arguments: tuple[Any, ...], constants: tuple[Any, ...]) -> None:
        numbers = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
        if _watched():
            self.kernel[programs, 1, 1](*numbers, *constants, stream=stream)
        else:
            told = (self.packed_metadata, None, None, None)
            self.run(programs, 1, 1, stream, self.function, *told, *numbers, *constants)
