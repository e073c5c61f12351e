"""What Triton's launches cost the host, counted without a GPU: `python -m bench.launches`.

The kernels are compiled for a GPU and their arguments packed as ever; only the driver is one that does nothing. Of a
real call it lacks the driver's own launch (some 3 µs each, in C), and the questions whether a CUDA graph is captured.
"""

from __future__ import annotations

import os
import statistics
import time
from types import SimpleNamespace
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"  # before triton is imported

import torch
import triton
from triton.backends.compiler import GPUTarget

PROGRAMS = 528  # of an H100's 132 multiprocessors
COUNTS = (1, 148, 2_000)  # of tensors: 148 is GPT-2


class FakeDriver:
    """Stands for a GPU of NVIDIA's: `launches` has what would have been launched, where `records`."""

    def __init__(self, arch: int = 90) -> None:
        self.target = GPUTarget("cuda", arch, 32)
        self.device = self.stream = 0
        self.records = True
        self.launches: list[SimpleNamespace] = []
        self.utils = SimpleNamespace(
            # module, function, registers, spills, threads
            load_binary=lambda name, *rest: (object(), name, 64, 0, 1024),
            get_device_properties=lambda device: {"max_shared_mem": 232_448},
        )

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        def launcher(x: int, y: int, z: int, stream: int, function: str, packed: Any, told: Any, *rest: Any) -> None:
            enter, leave, *arguments = rest
            if enter is not None:
                enter(told)
            if self.records:
                named = dict(zip(source.fn.arg_names, arguments))
                self.launches.append(SimpleNamespace(
                    kernel=function, grid=(x, y, z), stream=stream, arguments=named, metadata=metadata
                ))  # fmt: skip
            if leave is not None:
                leave(told)

        return launcher

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return self.stream

    def get_current_target(self) -> GPUTarget:
        return self.target

    def assemble_tensormap_to_arg(self, *_: Any) -> None: ...


def activate(arch: int = 90) -> FakeDriver:
    """In this process launches go to a FakeDriver now, with the tensors of a CPU."""
    from fastclip.backends.triton import launch, table

    driver = FakeDriver(arch)
    triton.runtime.driver.set_active(driver)
    launch.target_of.cache_clear()
    launch._depends.cache_clear()
    table.most_programs = lambda device: PROGRAMS
    return driver


def host_times(count: int, rounds: int = 300) -> dict[str, float]:
    """Medians, in µs, of `measure`, `apply_` and a measurement of gradients that have moved."""
    import fastclip.backends.triton as backend
    from fastclip.gradients.pack import pack

    grads = [torch.ones(256) for _ in range(count)]
    coef = torch.ones((), dtype=torch.float64)
    spent: dict[str, list[float]] = {"measure": [], "apply_": [], "measure, moved": []}

    def timed(what: str, verb: Any, *arguments: Any) -> None:
        begin = time.perf_counter()
        verb(*arguments)
        spent[what].append((time.perf_counter() - begin) * 1e6)

    for i in range(rounds + 20):
        (group,) = pack(grads, gradients=True, write=True).groups
        timed("measure", backend.measure, group, 2.0, 1.0)
        timed("apply_", backend.apply_, group, coef)
        if i % 10 == 0:
            moved = [torch.ones(256) for _ in range(count)]  # while the others live: at other addresses
            (other,) = pack(moved, gradients=True, write=True).groups
            timed("measure, moved", backend.measure, other, 2.0, 1.0)
    return {what: statistics.median(times[len(times) // 10 :]) for what, times in spent.items()}


def main() -> None:
    activate().records = False
    print(f"triton {triton.__version__}, torch {torch.__version__}; medians in µs")
    for count in COUNTS:
        times = host_times(count)
        print(f"{count:6} tensors: " + ", ".join(f"{what} {µs:.1f}" for what, µs in times.items()))


if __name__ == "__main__":
    main()
