"""Clipping across ranks: what a call costs the host, how many messages it sends, and whether the norm is right.

    python -m bench.distributed                 # everything; torch's first call on 5,000 DTensors takes minutes
    python -m bench.distributed --quick

The host's time is measured on one process of torch's fake process group of eight ranks, whose messages cost nothing:
all rivals are called in turn on the same DTensors of 2 x 16 local elements. Messages are counted on meshes of several
kinds. The norm is compared with float64 on real ranks (gloo, 2 and 4 processes), where messages cost what they do here.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import multiprocessing
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tabulate import tabulate
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from tqdm import tqdm

import fastclip

from . import method

TORCH = "torch"
LOCAL = (2, 16)
RANKS = 8
GOALS = {"first_s": 0.2, "per_tensor_s": 1e-6, "vs_torch": 15.0}
SLOW_FIRST = 2_000  # DTensors, above which torch's first call takes minutes


# ---- rivals: the frameworks' published algorithms, written anew ----


def per_mesh(parameters: list[Tensor], max_norm: float) -> Tensor:
    """torchtitan's: a norm for the DTensors of each mesh by torch, combined; then torch's scaling, mesh by mesh."""
    by_mesh: dict[Any, list[Tensor]] = defaultdict(list)
    for p in parameters:
        by_mesh[p.device_mesh].append(p)
    norms = [torch.nn.utils.get_total_norm([p.grad for p in group]).full_tensor() for group in by_mesh.values()]
    total = torch.linalg.vector_norm(torch.stack(norms))
    for group in by_mesh.values():
        torch.nn.utils.clip_grads_with_norm_(group, max_norm, total)
    return total


def per_sharding(parameters: list[Tensor], max_norm: float) -> Tensor:
    """Megatron's and NeMo's: squares of local parts, by mesh and placements, summed over each sharded dimension."""
    groups: dict[Any, list[Tensor]] = defaultdict(list)
    for p in parameters:
        groups[p.grad.device_mesh, p.grad.placements].append(p.grad.to_local())
    total = torch.zeros(())
    for (mesh, placements), grads in groups.items():
        square = torch.stack(torch._foreach_norm(grads)).square().sum()
        for i, placement in enumerate(placements):
            if placement.is_shard():
                dist.all_reduce(square, group=mesh.get_group(i))
        total = total + square
    norm = total.sqrt()
    coef = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_([p.grad.to_local() for p in parameters], coef)
    return norm


def rivals(parameters: list[Tensor]) -> dict[str, Callable[[], Any]]:
    return {
        "fastclip": lambda: fastclip.clip_norm_(parameters, 1e9),
        "fastclip.Clipper": fastclip.Clipper(parameters, 1e9).clip_,
        TORCH: lambda: torch.nn.utils.clip_grad_norm_(parameters, 1e9),
        "per mesh": lambda: per_mesh(parameters, 1e9),
        "per sharding": lambda: per_sharding(parameters, 1e9),
    }


# ---- the host's time, and messages ----


@contextlib.contextmanager
def fake_world(size: int = RANKS) -> Iterator[None]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def parameter(mesh: DeviceMesh, placements: list[Any], shape: tuple[int, ...] = LOCAL) -> Tensor:
    def part() -> DTensor:
        return DTensor.from_local(torch.randn(shape), mesh, placements, run_check=False)

    p = torch.nn.Parameter(part())
    p.grad = part()
    return p


def host_rows(count: int, seconds: float, with_torch: bool) -> list[dict[str, Any]]:
    common = {"case": "host", "model": f"{count} DTensors", "tensors": count, "dtype": "fp32"}
    rows = []
    with fake_world():
        mesh = init_device_mesh("cpu", (RANKS,), mesh_dim_names=("dp",))
        parameters = [parameter(mesh, [Shard(0)]) for _ in range(count)]
        calls = rivals(parameters)
        if not with_torch:
            for name in (TORCH, "per mesh"):
                reason = "its first call alone takes minutes: run without --quick"
                rows.append({**common, "provider": name, "status": "skipped", "reason": reason})
                del calls[name]
        firsts = {name: method.first_call(call, "cpu")[1] for name, call in calls.items()}
        times = method.interleave(calls, "cpu", seconds, 1, lambda _: None, lambda _: None)
        for name in calls:
            wall = method.spread(times[name])
            rows.append({
                **common, "provider": name, "status": "ok", "first_s": float(f"{firsts[name]:.3g}"), "wall_s": wall,
                "per_tensor_s": wall["median"] / count, "vs_torch": method.ratio(times, name, TORCH),
            })  # fmt: skip
    return rows


def meshes() -> dict[str, Callable[[], list[Tensor]]]:
    def one() -> list[Tensor]:
        mesh = init_device_mesh("cpu", (RANKS,), mesh_dim_names=("dp",))
        return [parameter(mesh, [Shard(0)]) for _ in range(20)]

    def two() -> list[Tensor]:
        mesh = init_device_mesh("cpu", (RANKS // 2, 2), mesh_dim_names=("dp", "tp"))
        both = [parameter(mesh, [Shard(0), Shard(1)]) for _ in range(10)]
        return both + [parameter(mesh, [Shard(0), Replicate()]) for _ in range(10)]

    def hybrid() -> list[Tensor]:
        mesh = init_device_mesh("cpu", (2, RANKS // 2), mesh_dim_names=("replicate", "shard"))
        return [parameter(mesh, [Replicate(), Shard(0)]) for _ in range(20)]

    def experts() -> list[Tensor]:
        expert = init_device_mesh("cpu", (2, RANKS // 2), mesh_dim_names=("edp", "ep"))
        return one() + [parameter(expert, [Shard(1), Shard(0)], (2, 4, 4)) for _ in range(5)]

    return {"1-D": one, "2-D": two, "HSDP": hybrid, "dense + experts": experts}


def message_rows() -> list[dict[str, Any]]:
    rows = []
    for mesh, make in meshes().items():
        with fake_world():
            parameters = make()
            for name, call in rivals(parameters).items():
                row = {"case": "messages", "model": mesh, "tensors": len(parameters), "provider": name, "dtype": "fp32"}
                try:
                    call()
                    with CommDebugMode() as comm:
                        call()
                    rows.append({**row, "status": "ok", "messages": comm.get_total_counts()})
                except Exception as error:  # noqa: BLE001 - some rivals cannot take every mesh, each in its own way
                    rows.append({**row, "status": "failed", "reason": method.first_line(error)})
    return rows


# ---- truth, on real ranks ----

SHAPES = ((512, 64), (64, 64), (64,), (7, 3), (1, 16), (1000, 8))


def truth_rows(size: int, seconds: float) -> list[dict[str, Any]]:
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        queue = context.Queue()
        processes = [
            context.Process(target=_truth, args=(rank, size, folder, seconds, queue), daemon=True)
            for rank in range(size)
        ]
        for process in processes:
            process.start()
        rows = queue.get(timeout=120 + 10 * seconds)
        for process in processes:
            process.join()
    return rows


def _truth(rank: int, size: int, folder: str, seconds: float, queue: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("dp",))
    torch.manual_seed(0)
    parameters, total = [], torch.zeros((), dtype=torch.float64)
    for i in range(60):
        shape = SHAPES[i % len(SHAPES)]
        gradient = torch.randn(shape, dtype=torch.float64).float()
        p = torch.nn.Parameter(distribute_tensor(torch.zeros(shape), mesh, [Shard(0)]))
        p.grad = distribute_tensor(gradient, mesh, [Shard(0)])
        parameters.append(p)
        total += gradient.double().square().sum()
    exact = total.sqrt().item()
    calls = rivals(parameters)
    norms = {name: call() for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    repeats = torch.zeros(1)
    start = time.perf_counter()
    while not repeats:  # the ranks must take the same turns
        for name, call in calls.items():
            begin = time.perf_counter()
            for _ in range(3):
                call()
            times[name].append((time.perf_counter() - begin) / 3)
        repeats[0] = time.perf_counter() - start > seconds
        dist.broadcast(repeats, 0)
    if rank == 0:
        rows = []
        for name, norm in norms.items():
            norm = norm.total_norm if isinstance(norm, fastclip.Stats) else norm
            norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
            rows.append({
                "case": "truth", "model": f"{size} ranks", "tensors": len(parameters), "dtype": "fp32",
                "provider": name, "status": "ok", "error": float(f"{abs(norm.item() / exact - 1):.2g}"),
                "wall_s": method.spread(times[name]), "vs_torch": method.ratio(times, name, TORCH),
            })  # fmt: skip
        queue.put(rows)
    dist.barrier()
    dist.destroy_process_group()


# ---- what is shown ----


def table(rows: list[dict[str, Any]]) -> str:
    parts = []
    lines = []
    for r in (r for r in rows if r["case"] == "host"):
        if r["status"] != "ok":
            lines.append([r["model"], r["provider"], r["status"]])
            continue
        faster = f"{r['vs_torch']['median']:.1f}×" if r["vs_torch"] else ""
        lines.append([
            r["model"], r["provider"], f"{1e3 * r['first_s']:,.0f}", f"{1e6 * r['wall_s']['median']:,.0f}",
            f"{1e9 * r['per_tensor_s']:,.0f}", faster,
        ])  # fmt: skip
    headers = ["8 ranks, fake group", "", "first call ms", "each further µs", "ns per DTensor", "vs torch"]
    parts.append(tabulate(lines, headers, disable_numparse=True, colalign=("left", "left", *["right"] * 4)))
    kinds = list(dict.fromkeys(r["model"] for r in rows if r["case"] == "messages"))
    by_name: dict[str, dict[str, str]] = defaultdict(dict)
    for r in (r for r in rows if r["case"] == "messages"):
        by_name[r["provider"]][r["model"]] = str(r["messages"]) if r["status"] == "ok" else "refused"
    lines = [[name, *(cells[kind] for kind in kinds)] for name, cells in by_name.items()]
    parts.append(tabulate(lines, ["messages per call", *kinds], disable_numparse=True))
    lines = [
        [r["model"], r["provider"], f"{r['error']:.0e}", f"{1e6 * r['wall_s']['median']:,.0f}",
         f"{r['vs_torch']['median']:.1f}×"]
        for r in rows if r["case"] == "truth"
    ]  # fmt: skip
    headers = ["gloo, 60 DTensors", "", "error of the norm", "µs", "vs torch"]
    parts.append(tabulate(lines, headers, disable_numparse=True, colalign=("left", "left", "right", "right", "right")))
    return "\n\n".join(parts)


def goals(rows: list[dict[str, Any]]) -> str:
    """Which of the limits are kept."""
    lines = []
    for r in rows:
        if r["case"] != "host" or r["provider"] != "fastclip":
            continue
        if r["tensors"] == 5000:
            lines.append(["first call on 5,000", f"{r['first_s']:.3f} s", f"<= {GOALS['first_s']} s"])
        goal = f"<= {1e9 * GOALS['per_tensor_s']:.0f} ns"
        lines.append([f"a DTensor, of {r['tensors']:,}", f"{1e9 * r['per_tensor_s']:.0f} ns", goal])
        if r["vs_torch"]:
            lines.append([f"vs torch, {r['tensors']:,}", f"{r['vs_torch']['median']:.1f}×", f">= {GOALS['vs_torch']}×"])
    for r in rows:
        if r["case"] == "messages" and r["provider"] == "fastclip":
            lines.append([f"messages, {r['model']}", str(r.get("messages", math.nan)), "<= 1"])
    return tabulate(lines, ["limit", "measured", "goal"], disable_numparse=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", default="1000,5000,20000", help="of DTensors, comma-separated")
    parser.add_argument("--quick", action="store_true", help="torch only on few DTensors, and little time for each")
    parser.add_argument("--json", type=Path, help="write the rows to this file too")
    options = parser.parse_args(argv)
    counts = [int(count) for count in options.counts.split(",")]
    seconds = 2.0 if options.quick else 15.0
    results = method.Results(options.json, "distributed", "cpu", 1, argv)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)  # its advice on rivals' messages
    try:
        for count in tqdm(counts, leave=False):
            with_torch = count <= SLOW_FIRST or (not options.quick and count <= 5000)
            results.add(host_rows(count, seconds, with_torch))
        results.add(message_rows())
        for size in (2, 4):
            results.add(truth_rows(size, seconds / 4))
    finally:
        print(table(results.rows) + "\n\n" + goals(results.rows))
        results.say()
    return 0


if __name__ == "__main__":
    sys.exit(main())
