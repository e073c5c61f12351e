"""Everything that needs a GPU, part by part: python3 -m bench.gpu (or make gpu).

    python3 -m bench.gpu                        # build, tests, benchmarks, ranks: within 8 minutes
    python3 -m bench.gpu --only sanitize        # compute-sanitizer's memcheck and racecheck: within 8
    python3 -m bench.gpu --only clip,step
    python3 -m bench.gpu --plan                 # what would be run, and how long it should take; needs no GPU
    python3 -m bench.gpu --dry-run              # every part as far as it goes without a GPU, at toy sizes

With the python that runs it, without installing anything. Each part has a limit, and the limits of the parts that are
run together are within the deadline, so that one that hangs takes no time from the others. The benchmarks write their
rows after every case, so that a part that is stopped keeps what it has. A part that fails does not keep the others from
running, but makes the exit status 1. Rows and a record of the run itself go to bench/results/, or to the folder $OUT.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
TESTS = [f"tests/test_{name}.py" for name in ("gpu", "gpu_rules", "monitor")]
DEADLINE = 8 * 60 - 15  # seconds, for all parts together
GRACE = 5  # seconds that a part has to end once it is told to
SANITIZERS = ("memcheck", "racecheck")


class Part(NamedTuple):
    name: str
    command: list[str]
    seconds: int  # that it should take
    limit: int  # that it may take
    environment: dict[str, str] = {}  # noqa: RUF012 - nothing is ever put into it


def parts(results: Path, dry: bool = False) -> list[Part]:
    """All parts, in order; python3 here is the one that runs this. `dry`: without a GPU, at toy sizes."""
    python = [sys.executable]
    device = "cpu" if dry else "cuda"
    sanitizer = [
        *("compute-sanitizer", "--error-exitcode", "1", "--print-limit", "20"),
        *("--report-api-errors", "no", "--tool"),  # Triton tries calls that may fail
    ]
    workers = ["-n", "4"] if importlib.util.find_spec("xdist") and not dry else []
    exact = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # every tensor an allocation of its own, whose end is watched

    def benchmark(name: str, minutes: float, *toy: str) -> list[str]:
        json = str(results / f"{device}-{name}.json")
        options = toy if dry else ["--minutes", str(minutes)]
        return [*python, "-m", f"bench.{name}", "--device", device, *options, "--json", json]

    def own(option: str) -> list[str]:
        return [*python, "-m", "bench.gpu", option, *(["--dry-run"] if dry else [])]

    tests = ["-m", "gpu", *workers, *(["--collect-only"] if dry else [])]
    small = own("--small")
    listed = [
        Part("build", [*python, "-m", "fastclip", "build"], 60, 100),
        Part("tests", [*python, "-m", "pytest", "-q", *tests, *TESTS], 80, 120),
        Part("clip", benchmark("clip", 1.0, "--models", "3x1000", "--minutes", "0.05"), 65, 80),
        Part("step", benchmark("step", 0.5, "--models", "3x1000", "--minutes", "0.02"), 35, 50),
        Part("rules", benchmark("rules", 0.3, "--models", "3x1000", "--minutes", "0.02"), 25, 40),
        Part("monitor", benchmark("monitor", 0.15, "--minutes", "0.001"), 15, 25),
        Part("distributed", own("--ranks"), 20, 40),
    ]
    for tool in SANITIZERS[: 1 if dry else None]:
        command = small if dry else [*sanitizer, tool, *small]
        listed.append(Part(tool, command, 120, 220, exact if tool == "memcheck" and not dry else {}))
    return [part._replace(limit=4 * part.limit) for part in listed] if dry else listed  # on a slow machine


def chosen(listed: list[Part], names: str | None) -> list[Part]:
    """Those that `names` (comma-separated) has; by default all but the sanitizers, which are a run of their own."""
    if names is None:
        return [part for part in listed if part.name not in SANITIZERS]
    wanted = names.split(",")
    wanted = [each for name in wanted for each in (SANITIZERS if name == "sanitize" else [name])]
    known = [part.name for part in listed]
    if unknown := [name for name in wanted if name not in known]:
        raise ValueError(f"--only: {unknown[0]!r} is none of {', '.join(known)}, sanitize")
    return [part for part in listed if part.name in wanted]


def plan(listed: list[Part]) -> str:
    lines = [f"{part.name:12} {part.seconds:5} s, at most {part.limit:4} s  {_shown(part)}" for part in listed]
    total, most = sum(part.seconds for part in listed), sum(part.limit for part in listed)
    return "\n".join([*lines, f"{'together':12} {total:5} s, at most {most:4} s  of {DEADLINE} s"])


def _shown(part: Part) -> str:
    words = ["python3" if word == sys.executable else word for word in part.command]
    return " ".join([*(f"{name}={value}" for name, value in part.environment.items()), *words])


def run(part: Part, left: float) -> dict[str, Any]:
    """The part's outcome: ok, failed, or skipped with the reason."""
    print(f"\n== {part.name}: {_shown(part)}", flush=True)
    start = time.perf_counter()
    if shutil.which(part.command[0]) is None:
        return {"part": part.name, "status": "skipped", "seconds": 0, "said": f"there is no {part.command[0]} here"}
    limit = min(part.limit, left)
    if limit < 2 * GRACE:
        return {"part": part.name, "status": "failed", "seconds": 0, "said": "no time was left"}
    environment = {**os.environ, **part.environment, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        part.command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=limit - GRACE)
        status = "ok" if process.returncode == 0 else "failed"
    except subprocess.TimeoutExpired:
        output, status = _stopped(process), "failed"
        output += f"\nstopped after {time.perf_counter() - start:.0f} s"
    if part.command[0] == "compute-sanitizer" and "not supported" in output:
        status = "skipped"  # by the machine: a virtual GPU without a debugger's interface
    print(output[-6000:] if status == "ok" else output[-20000:], flush=True)
    said = [line for line in output.splitlines() if re.search(r"passed|failed|ERROR SUMMARY|RACECHECK|stopped", line)]
    return {"part": part.name, "status": status, "seconds": time.perf_counter() - start, "said": (said or [""])[-1]}


def _stopped(process: subprocess.Popen[str]) -> str:
    """End a part: with a word first, so that it can say what it has, then by force; its children too, which hold the
    pipe open."""
    os.killpg(process.pid, signal.SIGTERM)
    try:
        return process.communicate(timeout=GRACE)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.communicate()[0]


def small(dry: bool) -> None:
    """A small case through every kernel of both backends, for a sanitizer to watch."""
    import torch

    import fastclip
    from fastclip.optim import SGD, AdamW

    device = "cpu" if dry else "cuda"
    if dry:
        _without_gpu()
    for backend in ("triton", "cuda"):
        module = fastclip.backends.get(backend)
        with fastclip.use_backend(backend):
            for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
                parameters = []
                for size in (1, 5, 0, 1023, 4096, 70_001, 200_000)[: 4 if dry else None]:
                    parameters.append(torch.nn.Parameter(torch.zeros(size, dtype=dtype, device=device)))
                    parameters[-1].grad = torch.randn(size + 3).to(dtype).to(device)[size % 4 :][:size]
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
                assert counts.tolist() == [0] * (len(parameters) - 1) + [parameters[-1].numel()], counts
    if dry:
        _time_without_gpu()
    print("both backends ran")


def ranks(dry: bool) -> None:
    """One rank of NCCL with sharded parameters: the messages' device, streams and dtypes, which gloo does not show."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    import fastclip

    device, backend = ("cpu", "gloo") if dry else ("cuda", "nccl")
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        mesh = init_device_mesh(device, (1,), mesh_dim_names=("dp",))
        for make in (
            lambda ps: torch.optim.AdamW(ps, lr=0.1, fused=True),
            lambda ps: fastclip.optim.AdamW(ps, lr=0.1),
            lambda ps: torch.optim.SGD(ps, lr=0.1),
        ):
            torch.manual_seed(0)
            model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))
            before = [p.detach().double() for p in model.parameters()]
            fully_shard(model.to(device), mesh=mesh)
            clipper = fastclip.Clipper(model.named_parameters(), [fastclip.rules.ZClip(), 0.1], tensor_stats=True)
            clipper.warm_up()
            optimizer = make(model.parameters())
            for _ in range(3):
                model(torch.randn(8, 64, device=device)).square().mean().backward()
                gradients = [p.grad.full_tensor().double() for p in model.parameters()]
                exact = torch.stack([g.norm() for g in gradients]).norm().item()
                found = fastclip.total_norm([p.grad for p in model.parameters()]).item()
                stats = clipper.step(optimizer)
                assert abs(found / exact - 1) < 1e-6 and stats.total_norm.item() == found, (found, exact)
                optimizer.zero_grad()
            assert fastclip.clip_norm_(model.parameters(), 1.0) == 0  # without gradients
            after = [p.full_tensor().double().cpu() for p in model.parameters()]
            assert not any(map(torch.equal, before, after))
        dist.destroy_process_group()
    print(f"sharded parameters were clipped and stepped over {backend}")


def _without_gpu() -> None:
    """Triton's kernels interpreted and CUDA's emulated, as in the tests."""
    sys.path.insert(0, str(ROOT / "tests"))
    import emulation

    from fastclip.backends import cuda
    from fastclip.native import libraries

    cuda.DEVICE, libraries.cuda = "cpu", emulation.library


def _time_without_gpu() -> None:
    """What method.py does on a GPU only, over stand-ins that take no arguments but those of what they stand for."""
    import inspect
    from unittest import mock

    import torch
    import triton.testing

    from . import method

    signature, ones = inspect.signature(triton.testing.do_bench), torch.ones

    def do_bench(*arguments: Any, **options: Any) -> Any:
        bound = signature.bind(*arguments, **options)
        bound.apply_defaults()
        bound.arguments["fn"]()
        return [1.0, 2.0, 3.0] if bound.arguments["return_mode"] == "all" else 1.0

    with contextlib.ExitStack() as stack:
        for name in ("synchronize", "reset_peak_memory_stats", "memory_allocated", "max_memory_allocated"):
            value = 0 if "allocated" in name else None
            stack.enter_context(mock.patch.object(torch.cuda, name, autospec=True, return_value=value))
        stack.enter_context(mock.patch.object(triton.testing, "do_bench", do_bench))
        stack.enter_context(mock.patch.object(torch, "ones", lambda count, device: ones(min(count, 1024))))
        assert method.copy_bandwidth() > 0
        numbers = torch.ones(16, "cuda")
        calls = {"torch": lambda: numbers.mul_(1.0), "ours": numbers.sum}
        fields = method.measure(calls, {}, "cuda", 1, 0.01, "torch", lambda name: None, lambda name: None)
    for row in fields.values():
        assert row["device_s"]["median"] == 0.002 and row["host_s"] and row["launches"] is not None, row


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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="PARTS", help="comma-separated; sanitize is memcheck,racecheck")
    parser.add_argument("--plan", action="store_true", help="say what would be run, and how long it should take")
    parser.add_argument("--dry-run", action="store_true", help="without a GPU, at toy sizes; writes to $OUT or nowhere")
    parser.add_argument("--small", action="store_true", help="only a small case through every kernel, for a sanitizer")
    parser.add_argument("--ranks", action="store_true", help="only sharded parameters over NCCL, on one rank")
    options = parser.parse_args(argv)
    dry = options.dry_run
    try:
        chosen(parts(Path()), options.only)
    except ValueError as error:
        parser.error(str(error))
    if options.plan:
        print(plan(chosen(parts(Path("bench/results")), options.only)))
        return 0
    if not dry and (reason := why_not()):
        print(f"{reason}: nothing was run")
        return 0
    if options.small or options.ranks:
        (small if options.small else ranks)(dry)
        return 0
    if dry:
        os.environ["TRITON_INTERPRET"] = "1"
    with tempfile.TemporaryDirectory() as nowhere:
        results = Path(os.environ.get("OUT") or (nowhere if dry else ROOT / "bench" / "results"))
        results.mkdir(parents=True, exist_ok=True)
        names = options.only or (",".join(part.name for part in parts(results, dry)) if dry else None)
        return run_all(chosen(parts(results, dry), names), results)


def run_all(listed: list[Part], results: Path) -> int:
    """Run the parts, and show what became of each; 1 if any failed."""
    from . import method

    start = time.perf_counter()
    outcomes: list[dict[str, Any]] = []
    for part in listed:
        outcomes.append(run(part, DEADLINE - (time.perf_counter() - start)))
        method.write(results / "cuda-run.json", "gpu", _device(), 0, [], outcomes)
    try:
        from . import goals, runs
    except ImportError as error:
        print(f"\nthe goals cannot be shown: {error}\n")
    else:
        print("\n" + goals.goals(runs.newest(results)) + "\n")
    for outcome in outcomes:
        print(f"{outcome['part']:12} {outcome['status']:8} {outcome['seconds']:5.0f} s  {outcome['said']}")
    return int(any(outcome["status"] == "failed" for outcome in outcomes))


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    sys.exit(main())
