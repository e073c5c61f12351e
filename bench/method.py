"""How everything here is measured, and what is written down: what clip.py and step.py share.

Rivals take turns in one process, block by block, so that whatever else the machine does falls on all of them; a ratio
is the median of the ratios of neighbouring blocks. Times are torch.utils.benchmark's and, on a GPU's own clock,
triton.testing.do_bench's; launches, operators and memory on the CPU are the profiler's.

On a CPU a call returns when it is done, so its host time is its wall time. On a GPU, wall time is that of calls in a
row up to the moment the device has done them, host time that until a call returns, and device time that between two
events around a call, with the L2 cache cleared before it.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import os
import platform
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
import timeit
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.benchmark import Timer, timer
from torch.utils.benchmark.utils.common import set_torch_threads

import fastclip

ROOT = Path(__file__).resolve().parent.parent
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LEAST_ROUNDS, MOST_ROUNDS = 5, 200
MOST_CALLS = 50  # in a row, for the short ones
SHRINK = 1e-5  # of the norm, from call to call
NO_TIME = "no time is left of --minutes"
MODULES = {"growth": "clip"}  # the module that measures a kind of results, where it is not called like the kind
RANGE = "one call"  # the profiler's name for it

Calls = dict[str, Callable[[], Any]]


class Falling:
    """Limits for calls in a row, each a little below the norm, so that every call has something to clip."""

    def __init__(self, parameters: list[list[Tensor]]) -> None:
        self.sets = parameters
        self.limit, self.calls, self.version = 0.0, 0, 0

    def start(self, per_tensor: bool = False) -> None:
        """Begin again from the smallest norm that gradients have now.

        What a call leaves depends on the dtype's rounding, and limits carried on from before would not be below it.
        """
        norms = []
        with fastclip.use_backend("auto"):
            for parameters in self.sets:
                stats = fastclip.Clipper(parameters, float("inf")).clip_()  # an infinite limit only measures
                norms.append(stats.tensor_norms.min() if per_tensor else stats.total_norm)
        self.limit = torch.stack(norms).min().item()
        self.calls, self.version = 0, self._version()

    def __next__(self) -> float:
        self.calls += 1
        # What a call leaves is 1e-6 below the limit, absolutely, which small norms must fall by more than.
        self.limit *= 1 - max(SHRINK, 3e-6 / self.limit)
        return self.limit

    def writes(self) -> int:
        """How often gradients were written since the start, by the version counter of each set's first."""
        return self._version() - self.version

    def _version(self) -> int:
        return sum(parameters[0].grad._version for parameters in self.sets)


def interleave(
    calls: Calls, device: str, seconds: float, threads: int,
    before: Callable[[str], None], after: Callable[[str], None],
) -> dict[str, list[float]]:  # fmt: skip
    """Wall times in seconds of each call, in blocks that take turns for about `seconds`, at least LEAST_ROUNDS each.

    `before` and `after` see a call's name and run around its blocks, untimed. A call so slow that its blocks would
    leave little time to the others stops after LEAST_ROUNDS.
    """
    start = time.perf_counter()
    clock = {} if device == "cuda" else {"timer": timeit.default_timer}  # torch's own waits for the GPU
    timers = {
        name: Timer("call()", globals={"call": call}, num_threads=threads, **clock) for name, call in calls.items()
    }

    def block(name: str, number: int) -> float:
        before(name)
        mean = timers[name].timeit(number).mean
        after(name)
        return mean

    once = {name: block(name, 1) for name in calls}
    number = {name: max(1, min(MOST_CALLS, int(1e-3 / t))) for name, t in once.items()}
    slow = {
        name for name, t in once.items() if (number[name] + 2) * t > seconds / LEAST_ROUNDS / 2
    }  # 2: timeit's warm-up
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(MOST_ROUNDS):
        for name in calls:
            if turn < LEAST_ROUNDS or name not in slow:
                times[name].append(block(name, number[name]))
        if turn >= LEAST_ROUNDS - 1 and (time.perf_counter() - start > seconds or len(slow) == len(calls)):
            break
    return times


def host_times(
    calls: Calls, threads: int, before: Callable[[str], None], after: Callable[[str], None], rounds: int = 10
) -> dict[str, list[float]]:
    """Seconds until each call returns, on a GPU with little else to do: the two calls of timeit's warm-up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            before(name)
            torch.cuda.synchronize()
            once = Timer("call()", globals={"call": call}, num_threads=threads, timer=timeit.default_timer)
            times[name].append(once.timeit(1).mean)
            after(name)
    return times


def device_times(
    calls: Calls, seconds: float, before: Callable[[str], None], after: Callable[[str], None], rounds: int = 3
) -> dict[str, list[float]]:
    """Seconds that a GPU takes for each call, by its own clock and with a cold L2 cache."""
    from triton.testing import do_bench

    times: dict[str, list[float]] = {name: [] for name in calls}
    milliseconds = max(10.0, 1e3 * seconds / rounds / max(1, len(calls)))
    for _ in range(rounds):
        for name, call in calls.items():
            before(name)
            measured = do_bench(call, warmup=milliseconds / 5, rep=milliseconds * 4 / 5, return_mode="all")
            times[name] += [t / 1e3 for t in measured]
            after(name)
    return times


def measure(
    calls: Calls, floor: Calls, device: str, threads: int, seconds: float, baseline: str,
    before: Callable[[str], None], after: Callable[[str], None], trace: bool = True,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """The fields of each call's row. `floor` takes its turns with them, and gives `of_floor`.

    Without `trace`, which takes seconds for a call of many operators, the profiler's fields are None.
    """
    on_gpu = device == "cuda"
    wall = interleave(calls | floor, device, seconds * (0.5 if on_gpu else 1), threads, before, after)
    host = host_times(calls, threads, before, after) if on_gpu else wall
    busy = device_times(calls, seconds * 0.3, before, after) if on_gpu else {name: [] for name in calls}
    fields = {}
    for name, call in calls.items():
        counts = dict.fromkeys(("ops", "launches", "copies", "syncs", "extra_bytes"))
        if trace:
            before(name)
            with set_torch_threads(threads):
                counts = traced(call, device)
            after(name)
        fields[name] = {
            "wall_s": spread(wall[name]), "host_s": spread(host[name]), "device_s": spread(busy[name]),
            "vs_torch": ratio(wall, name, baseline),
            "of_floor": ratio(wall, name, "floor")["median"] if floor else None,
            **counts,
        }  # fmt: skip
    return fields


def copy_bandwidth() -> float:
    """Bytes per second, read plus written, of a device-to-device copy of 1 GiB: what a kernel can hope for."""
    from triton.testing import do_bench

    source = torch.ones(1 << 28, device="cuda")
    target = torch.empty_like(source)
    milliseconds = do_bench(lambda: target.copy_(source), warmup=50, rep=200, return_mode="median")
    return 2 * source.nbytes / (milliseconds / 1e3)


def first_call(call: Callable[[], Any], device: str) -> tuple[Any, float]:
    """What a call returns, and the seconds it takes where nothing has been compiled, loaded or cached for it yet."""
    synchronize(device)
    start = timer()
    result = call()
    synchronize(device)
    return result, timer() - start


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def traced(call: Callable[[], Any], device: str) -> dict[str, int | None]:
    """What one call makes the machine do.

    ops: ATen operators dispatched. launches: kernels. copies: copies and fills by the driver. syncs: waits of the host
    for the device. The last three are None on a CPU. extra_bytes: the most memory that it holds at a time of what
    torch's allocators hand out, above what was held before (C++ keeps some bytes per tensor of its own, which they do
    not see).
    """
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    call()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        extra = torch.cuda.max_memory_allocated() - held
    with _no_stderr(), profile(activities=activities, profile_memory=device == "cpu") as profiler:
        with record_function(RANGE):
            call()
        synchronize(device)
    if device == "cpu":
        return {
            "ops": sum(event.name.startswith("aten::") for event in profiler.events()),
            "launches": None, "copies": None, "syncs": None, "extra_bytes": _peak(profiler),
        }  # fmt: skip
    on_host = [event for event in profiler.events() if event.device_type == DeviceType.CPU]
    on_device = [event.name for event in profiler.events() if event.device_type == DeviceType.CUDA]
    on_device = [name for name in on_device if not name.startswith((RANGE, "Optimizer."))]  # shadows of ranges
    whole = next(event.time_range for event in on_host if event.name == RANGE)
    copies = sum(name.startswith(("Memcpy", "Memset")) for name in on_device)
    waits = [event for event in on_host if event.name.endswith("Synchronize")]
    return {
        "ops": sum(event.name.startswith("aten::") for event in on_host),
        "launches": len(on_device) - copies,
        "copies": copies,
        "syncs": sum(whole.start <= event.time_range.start <= whole.end for event in waits),
        "extra_bytes": extra,
    }


@contextlib.contextmanager
def _no_stderr() -> Iterator[None]:
    """The profiler announces itself there from C++, across the progress bar."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _peak(profiler: profile) -> int:
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def free_bytes(device: str) -> int:
    if device == "cuda":
        cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] + cached
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def does_not_fit(needed: int, device: str) -> str | None:
    """Why a run that needs so many bytes is skipped, or None."""
    needed += 1 << 29  # for everything else
    free = free_bytes(device)
    return f"needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free" if needed > free else None


def cache_bytes(device: str) -> int:
    """Of the last cache before memory."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    try:
        return 1024 * int(Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip().rstrip("K"))
    except (OSError, ValueError):
        return 32 << 20


def spread(values: Iterable[float]) -> dict[str, float] | None:
    """Median, p20 and p80."""
    values = list(values)
    if not values:
        return None
    fifths = statistics.quantiles(values, n=5, method="inclusive") if len(values) > 1 else values * 4
    found = {"median": statistics.median(values), "p20": fifths[0], "p80": fifths[3]}
    return {name: float(f"{value:.4g}") for name, value in found.items()}


def ratio(times: dict[str, list[float]], name: str, baseline: str) -> dict[str, float] | None:
    """How many times faster `name` is than `baseline`, over neighbouring blocks."""
    return spread(b / t for b, t in zip(times[baseline], times[name])) if baseline in times else None


def first_line(error: Exception) -> str:
    """What went wrong, short enough for a table."""
    return f"{type(error).__name__}: {error}".partition("\n")[0]


class Results:
    """The rows of a run, in its file after every case, so that a run that is stopped leaves what it has measured.

    SIGTERM ends the program as an exception does.

    Args:
        path: of the file; None: there is none.
        kind, device, threads, arguments, more: as :func:`write` has them.
    """

    def __init__(
        self, path: Path | None, kind: str, device: str, threads: int, arguments: list[str] | None, **more: Any
    ) -> None:
        self.rows: list[dict[str, Any]] = []
        self._path, self._more = path, more
        self._run = kind, device, threads, sys.argv[1:] if arguments is None else arguments
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))

    def add(self, rows: list[dict[str, Any]]) -> None:
        self.rows += rows
        if self._path and self.rows:
            write(self._path, *self._run, self.rows, **self._more)

    def say(self) -> None:
        """Say at the end where they are."""
        if self._path and self.rows:
            print(f"\nwrote {self._path}")


def write(
    path: Path, kind: str, device: str, threads: int, arguments: list[str], rows: list[dict[str, Any]], **more: Any
) -> None:
    """One run, with everything that decides its numbers but nothing that says whose machine it is."""
    run = {
        "kind": kind,
        "device": device,
        "date": dt.datetime.now(dt.timezone.utc).strftime("%Y-%m-%d %H:%M"),
        "command": _command(MODULES.get(kind, kind), arguments),
        "commit": _commit(),
        "machine": _machine(device),
        "versions": {
            "fastclip": fastclip.__version__, "torch": torch.__version__, "triton": _triton(),
            "python": platform.python_version(),
        },
        "threads": threads,
        **more,
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    head = json.dumps(run, indent=1).removesuffix("\n}")
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)  # a row a line, so that a diff can be read
    part = path.with_suffix(".part")
    part.write_text(f'{head},\n "rows": [\n{lines}\n ]\n}}\n')
    part.replace(path)  # whole, whenever the run is stopped


def _command(module: str, arguments: list[str]) -> str:
    words = list(arguments)
    if "--json" in words:  # a path of no one else's concern
        at = words.index("--json")
        del words[at : at + 2]
    return f"python -m bench.{module} {shlex.join(words)}".strip()


def _machine(device: str) -> dict[str, Any]:
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        return {
            "name": properties.name,
            "driver": _said_by(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]),
            "capability": f"{properties.major}.{properties.minor}",
            "memory": properties.total_memory,
        }
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    backend = fastclip.backends.get("cpu")
    return {
        "name": name,
        "cores": os.cpu_count(),
        "capability": backend.why_not(torch.device("cpu")) or backend.describe().partition(",")[0],
    }


def _triton() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def _commit() -> str | None:
    """The commit, "-dirty" if the code is another; what benchmarks have written does not count."""
    git = ["git", "-C", str(ROOT)]
    commit = _said_by([*git, "describe", "--always"])
    changed = _said_by([*git, "status", "--porcelain", "--", "fastclip", "csrc", "bench/*.py"])
    return f"{commit}-dirty" if commit and changed else commit


def _said_by(command: list[str]) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    return subprocess.run(command, capture_output=True, text=True).stdout.partition("\n")[0] or None
