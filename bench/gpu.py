"""Everything that needs a GPU, in one command and within 8 minutes: python3 -m bench.gpu (or make gpu).

Builds csrc/ with ninja and nvcc, runs the tests marked gpu, the benchmarks, and compute-sanitizer's memcheck and
racecheck where that is at hand; with the python that runs it, without installing anything. A part that fails does not
keep the others from running, but makes the exit status 1. The benchmarks' rows and a record of the run itself go to
bench/results/, or to the folder that $OUT names.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
TESTS = [f"tests/test_{name}.py" for name in ("gpu", "gpu_rules", "monitor")]
DEADLINE = 8 * 60 - 15  # seconds, for all parts


class Part(NamedTuple):
    name: str
    command: list[str]
    limit: int  # seconds
    environment: dict[str, str]


def parts(results: Path) -> list[Part]:
    """What is run, in order; python3 here is the one that runs this."""
    python = [sys.executable]
    small = [*python, "-m", "bench.gpu", "--small"]
    sanitizer = [
        *(
            "compute-sanitizer",
            "--error-exitcode",
            "1",
            "--report-api-errors",
            "no",
        ),  # Triton tries calls that may fail
        *("--print-limit", "20", "--tool"),
    ]
    workers = ["-n", "4"] if importlib.util.find_spec("xdist") else []
    exact = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # every tensor an allocation of its own, whose end is watched

    def benchmark(name: str, minutes: float) -> list[str]:
        json = str(results / f"cuda-{name}.json")
        return [*python, "-m", f"bench.{name}", "--device", "cuda", "--minutes", str(minutes), "--json", json]

    return [
        Part("build", [*python, "-m", "fastclip", "build"], 120, {}),
        Part("tests", [*python, "-m", "pytest", "-q", "-m", "gpu", *workers, *TESTS], 210, {}),
        Part("clip", benchmark("clip", 1.5), 150, {}),
        Part("step", benchmark("step", 0.6), 80, {}),
        Part("rules", benchmark("rules", 0.3), 60, {}),
        Part("monitor", benchmark("monitor", 0.2), 40, {}),
        Part("memcheck", [*sanitizer, "memcheck", *small], 80, exact),
        Part("racecheck", [*sanitizer, "racecheck", *small], 80, {}),
    ]


def run(part: Part, left: float) -> dict[str, Any]:
    """The part's outcome: ok, failed, or skipped with the reason."""
    print(f"\n== {part.name}: {' '.join(part.command)}", flush=True)
    start = time.perf_counter()
    if shutil.which(part.command[0]) is None:
        return {"part": part.name, "status": "skipped", "seconds": 0, "said": f"there is no {part.command[0]} here"}
    limit = min(part.limit, left)
    if limit < 5:
        return {"part": part.name, "status": "failed", "seconds": 0, "said": "no time was left"}
    environment = {**os.environ, **part.environment, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        part.command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=limit)
        status = "ok" if process.returncode == 0 else "failed"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # its children too, which hold the pipe open
        output, _ = process.communicate()
        status = "failed"
        output += f"\nstopped after {limit:.0f} s"
    if part.command[0] == "compute-sanitizer" and "not supported" in output:
        status = "skipped"  # by the machine: a virtual GPU without a debugger's interface
    print(output[-6000:] if status == "ok" else output[-20000:], flush=True)
    said = [line for line in output.splitlines() if re.search(r"passed|failed|ERROR SUMMARY|RACECHECK|stopped", line)]
    return {"part": part.name, "status": status, "seconds": time.perf_counter() - start, "said": (said or [""])[-1]}


def small() -> None:
    """A small case through every kernel of both backends, for a sanitizer to watch."""
    import torch

    import fastclip
    from fastclip.optim import SGD, AdamW

    for backend in ("triton", "cuda"):
        module = fastclip.backends.get(backend)
        with fastclip.use_backend(backend):
            for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
                parameters = []
                for size in (1, 5, 0, 1023, 4096, 70_001, 200_000):
                    parameters.append(torch.nn.Parameter(torch.zeros(size, dtype=dtype, device="cuda")))
                    parameters[-1].grad = torch.randn(size + 3).to(dtype).cuda()[size % 4 :][:size]
                for norm_type in (2.0, 1.0, float("inf"), 3.0):
                    fastclip.clip_norm_(parameters, 1.0, norm_type)
                fastclip.clip_tensor_norm_(parameters, 0.1)
                fastclip.clip_value_(parameters, 1e-3)
                fastclip.mask_small_(parameters, 1e-5)
                norm = fastclip.total_norm([p.grad for p in parameters]).item()
                assert 0 < norm < 10, norm
                for seed in (None, 0):
                    clipped = {"max_norm": fastclip.rules.TensorNorm(1e-3), "stochastic_rounding": seed}
                    AdamW(parameters, amsgrad=seed is None, **clipped).step()
                    SGD(parameters, lr=0.1, momentum=0.9 * (seed is None), **clipped).step()
                SGD(
                    parameters, lr=0.1, momentum=0.9, nesterov=True, max_norm=fastclip.rules.Mask(1e-3, freeze=True)
                ).step(zero_grad=True)
                parameters[-1].grad.fill_(float("nan"))
                (group,) = fastclip.gradients.pack.pack(parameters, gradients=False, write=True).groups
                _, counts = module.repair_(group, module.measure(group, 2.0), 2.0)
                assert counts.tolist() == [0] * 6 + [200_000], counts
    print("both backends ran")


def why_not() -> str | None:
    """Why nothing can be run here."""
    try:
        import torch
    except ImportError:
        reason = "there is no torch here"
    else:
        reason = None if torch.cuda.is_available() else "torch sees no CUDA here"
    if reason and Path("/dev/nvidia0").exists():
        sys.exit(f"there is a GPU, but {reason}: {sys.executable}")
    return reason


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="only a small case through every kernel, for a sanitizer")
    options = parser.parse_args()
    if reason := why_not():
        print(f"{reason}: nothing was run")
        return 0
    if options.small:
        small()
        return 0
    from . import method

    start = time.perf_counter()
    results = Path(os.environ.get("OUT") or ROOT / "bench" / "results")
    results.mkdir(parents=True, exist_ok=True)
    outcomes = [run(part, DEADLINE - (time.perf_counter() - start)) for part in parts(results)]
    method.write(results / "cuda-run.json", "gpu", "cuda", 0, [], outcomes)
    try:
        from . import goals, runs
    except ImportError as error:
        print(f"\nthe goals cannot be shown: {error}\n")
    else:
        print("\n" + goals.goals(runs.newest(results)) + "\n")
    for outcome in outcomes:
        print(f"{outcome['part']:10} {outcome['status']:8} {outcome['seconds']:5.0f} s  {outcome['said']}")
    return int(any(outcome["status"] == "failed" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
