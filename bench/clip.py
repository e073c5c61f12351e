"""Gradient clipping: fastclip beside torch.nn.utils and its peers, on the gradients of real models.

    python -m bench.clip                        # the cases that matter, on the GPU if there is one
    python -m bench.clip --quick                # under a minute
    python -m bench.clip --growth               # how cost grows with elements and with tensors
    python -m bench.clip --models gpt2-1.5b,3000x64 --dtypes bf16 --modes triggered

A row is one provider on one model, dtype and mode. Its result is checked against float64 before it is timed: a provider
whose gradients are wrong is reported as wrong, and a run that would not fit in memory as skipped. The modes, and the
passes over the gradients' memory that each needs:

    norm           the norm of all gradients, 1
    not triggered  clip by a norm below the limit, 1
    triggered      clip by a norm above the limit, 3 (read; read and write)
    per tensor     clip each gradient by its own norm, all above the limit, 3
    mask           zero small gradients, none of them small, 1
    value          limit each element, all of them within the limit, 1
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tabulate import tabulate
from tqdm import tqdm

import fastclip

from . import method
from .inputs import Inputs, check
from .method import DTYPES, Falling
from .models import MODELS, find
from .providers import BASELINE, CLIPS, Call, Clipper, Compiled, providers

PASSES = {"norm": 1, "not triggered": 1, "triggered": 3, "per tensor": 3, "mask": 1, "value": 1}
MOST_SETS = 64
MOVING_SETS = 20  # more than fastclip.backends.UploadCache keeps


# ---- measuring ----


class Case(NamedTuple):
    model: str
    dtype: str
    modes: tuple[str, ...]
    cold: bool = False  # where one set of gradients would fit in the cache: several, so that they come from memory
    providers: tuple[str, ...] | None = None  # None: all that run here
    moving: bool = False  # MOVING_SETS of them, so that no call finds the addresses that it may have kept


class Machine(NamedTuple):
    """What every row of a run has in common."""

    device: str
    threads: int
    copy: float | None  # bytes per second, on a GPU


def measure(case: Case, machine: Machine, seconds: float, rivals: list[Any] | None = None) -> list[dict[str, Any]]:
    """The rows of a case, in about so many seconds. `rivals`: instead of this file's providers."""
    start = time.perf_counter()
    model, dtype, device = find(case.model), DTYPES[case.dtype], machine.device
    size = model.elements * dtype.itemsize
    cache = method.cache_bytes(device)
    sets = min(MOST_SETS, max(1, math.ceil(2 * cache / size))) if case.cold else MOVING_SETS if case.moving else 1
    everyone = providers(device) if rivals is None else rivals
    rivals = [p for p in everyone if case.providers is None or p.name in case.providers]
    common = {
        "model": case.model, "dtype": case.dtype, "tensors": len(model.shapes), "elements": model.elements,
        "input_sets": sets, "in_cache": sets * size <= cache,
    }  # fmt: skip
    # the sets, the values to restore them from, and a copy of the largest gradient that a rival may make
    needed = (sets + 1) * size + dtype.itemsize * max(map(math.prod, model.shapes))
    reason = method.does_not_fit(needed, device) or (method.NO_TIME if seconds <= 0 else None)
    if reason:
        return [row(common, mode, p.name, "skipped", reason) for mode in case.modes for p in rivals]
    if any(isinstance(provider, Compiled) for provider in rivals):
        torch.compiler.reset()
    inputs = Inputs(model, dtype, device, sets)
    rows = []
    for i, mode in enumerate(case.modes):
        left = (seconds - (time.perf_counter() - start)) / (len(case.modes) - i)
        rows += measure_mode(mode, inputs, rivals, common, machine, left)
    return rows


def measure_mode(
    mode: str, inputs: Inputs, rivals: list[Any], common: dict[str, Any], machine: Machine, seconds: float
) -> list[dict[str, Any]]:
    """A mode's rows: every rival checked, then those that are right timed."""
    start = time.perf_counter()
    rows, bound = [], {}
    for provider in rivals:
        fastclip.use_backend(provider.backend)
        try:
            calls = [provider.bind(mode, parameters) for parameters in inputs.sets]
            if calls[0] is None:
                continue
            norm_error, first, reason = check(calls[0], provider.exact, mode, inputs, machine.device)
        except Exception as error:  # noqa: BLE001 - whatever a rival does, the others are measured
            rows.append(row(common, mode, provider.name, "failed", method.first_line(error)))
            continue
        status = "wrong" if reason else "ok"
        rows.append(row(common, mode, provider.name, status, reason, norm_error=norm_error, first_call_s=first))
        if status == "ok":
            bound[provider] = calls
    inputs.restore()
    seconds -= time.perf_counter() - start
    fields = time_all(mode, bound, inputs, common["in_cache"], machine, seconds)
    for r in rows:
        if r["status"] == "ok":
            r |= fields[r["provider"]]
            bandwidth = PASSES[mode] * inputs.flat.nbytes / (r["device_s"] or r["wall_s"])["median"]
            r["gb_per_s"] = bandwidth / 1e9
            if machine.copy:
                r["of_floor"] = bandwidth / machine.copy
    fastclip.use_backend("auto")
    return rows


def time_all(
    mode: str, bound: dict[Any, list[Call]], inputs: Inputs, in_cache: bool, machine: Machine, seconds: float
) -> dict[str, dict[str, Any]]:
    """What was measured of each provider, by its name. `bound`: its calls, one for each set of inputs."""
    providers = {provider.name: provider for provider in bound}
    falls = mode in ("triggered", "per tensor")
    limits = Falling(inputs.sets) if falls else itertools.repeat(inputs.limits(mode)[1])
    seen: list[tuple[float, Any]] = []  # on a GPU, limits and what was returned for them

    def in_turn(provider: Any, calls: list[Call]) -> Callable[[], Any]:
        one, turns = calls[0], itertools.cycle(calls)

        def remembering() -> None:
            limit = next(limits)
            seen.append((limit, next(turns)(limit)))

        if machine.device == "cuda" and mode == "triggered" and provider.exact:
            return remembering
        return (lambda: one(next(limits))) if len(calls) == 1 else (lambda: next(turns)(next(limits)))

    def before(name: str) -> None:
        if falls:
            limits.start(per_tensor=mode == "per tensor")
        if name in providers:
            fastclip.use_backend(providers[name].backend)

    def after(name: str) -> None:
        """Make sure that fastclip had something to clip in every call, else its row would claim too much."""
        exact = name in providers and providers[name].exact
        if falls and exact and machine.device == "cpu" and limits.writes() < limits.calls:
            raise AssertionError(f"{name}: {limits.calls - limits.writes()} of {limits.calls} calls clipped nothing")
        for limit, returned in seen:
            norm = getattr(returned, "total_norm", returned).item()
            if norm <= limit:
                raise AssertionError(f"{name}: a call clipped nothing, its norm is {norm} and its limit {limit}")
        seen.clear()

    floor: dict[str, Callable[[], Any]] = {}
    if machine.device == "cpu" and not in_cache and len(inputs.sets) == 1:
        words = inputs.flat.view(torch.float32)  # neither pass changes the values
        floor["floor"] = words.sum if PASSES[mode] == 1 else lambda: (words.sum(), words.mul_(1.0))
    calls = {provider.name: in_turn(provider, calls) for provider, calls in bound.items()}
    return method.measure(calls, floor, machine.device, machine.threads, seconds, BASELINE, before, after)


def row(
    common: dict[str, Any], mode: str, provider: str, status: str, reason: str | None = None, **known: Any
) -> dict[str, Any]:
    """A row with every field; what was not measured is None."""
    fields = dict.fromkeys((
        "wall_s", "host_s", "device_s", "vs_torch", "gb_per_s", "of_floor", "ops", "launches", "copies", "syncs",
        "extra_bytes", "norm_error", "first_call_s",
    ))  # fmt: skip
    return {**common, "mode": mode, "provider": provider, "status": status, "reason": reason, **fields, **known}


# ---- what to measure ----


def cases(options: argparse.Namespace) -> list[Case]:
    if options.growth:
        return growth(options.device, options.quick)
    if options.models:
        dtypes = options.dtypes or ["fp32"]
        modes, names = tuple(options.modes or PASSES), options.providers and tuple(options.providers)
        return [Case(m, d, modes, options.cold, names, options.moving) for m in options.models for d in dtypes]
    device = options.device
    everyone = [p.name for p in providers(device)]
    chosen = [n for n in everyone if options.providers is None or n in options.providers]
    # Compiling takes a minute for each model, the reference is as slow as it looks, and platform.py has the other.
    quick_ones = tuple(n for n in chosen if n not in ("torch.compile", "fastclip reference", "fastclip foreach"))
    compiled = (*quick_ones, "torch.compile")
    if options.all:
        names = [*MODELS, "1x16"]
        found = [Case(m, d, tuple(PASSES), False, tuple(chosen)) for m in names for d in DTYPES]
        return found + [Case(m, "fp32", tuple(PASSES), True, tuple(chosen)) for m in ("small-cnn", "2000x256")]
    if options.quick:
        modes = ("norm", *CLIPS)
        return [
            Case("small-cnn", "fp32", modes, False, quick_ones), Case("2000x256", "fp32", modes, False, quick_ones),
            Case("1x16", "fp32", modes, False, quick_ones),
        ]  # fmt: skip
    modes = ("norm", *CLIPS)
    if device == "cuda":
        return [
            Case("llama-3.2-1b", "bf16", modes, False, quick_ones),
            Case("gpt2-124m", "fp32", modes, False, quick_ones),
            Case("2000x256", "fp32", modes, False, quick_ones),
            Case("3000x64", "fp32", CLIPS, False, quick_ones, moving=True),  # more than a kernel's parameters hold
            Case("resnet50", "fp32", CLIPS, True, quick_ones),
            Case("misaligned", "bf16", CLIPS, False, quick_ones),
            Case("gpt2-124m", "bf16", ("per tensor", "mask", "value"), False, quick_ones),
            Case("resnet50", "fp32", CLIPS, False, tuple(n for n in compiled if n in (BASELINE, "torch.compile"))),
        ]
    lean = tuple(n for n in quick_ones if n != "torch loop")  # for the large: torch's two are as slow as each other
    return [
        Case("gpt2-124m", "fp32", CLIPS, False, lean),
        Case("gpt2-124m", "bf16", CLIPS, False, lean),
        Case("gpt2-124m", "fp16", CLIPS, False, lean),
        Case("resnet50", "fp32", tuple(PASSES), False, quick_ones),
        Case("vit-b16", "fp32", CLIPS, False, lean),
        Case("bert-base", "fp32", CLIPS, False, lean),
        Case("misaligned", "fp32", CLIPS, False, lean),
        Case("small-cnn", "fp32", CLIPS, False, compiled),
        Case("small-cnn", "fp32", CLIPS, True, quick_ones),
        Case("2000x256", "fp32", CLIPS, False, quick_ones),
        Case("2000x256", "fp32", CLIPS, True, quick_ones),
        Case("10000x16", "fp32", CLIPS, False, quick_ones),
        Case("1x16", "fp32", CLIPS, False, quick_ones),
        Case("llama-3.2-1b", "bf16", CLIPS, False, lean),
        Case("small-cnn", "fp32", ("norm", "per tensor", "mask", "value"), False, (*quick_ones, "fastclip reference")),
    ]


def growth(device: str, quick: bool) -> list[Case]:
    """One tensor of ever more elements, and ever more tensors of 16."""
    best = next(b for b in fastclip.backends.AUTO[device] if f"fastclip {b}" in [p.name for p in providers(device)])
    names = (f"fastclip {best}", Clipper.name, BASELINE)
    elements = [f"1x{2**k}" for k in ([0, 10, 14] if quick else [0, *range(10, 31, 2)])]
    tensors = [f"{t}x16" for t in ([1, 10, 100] if quick else [1, 3, 10, 30, 100, 300, 1000, 3000, 10000])]
    return [Case(model, "fp32", CLIPS, False, names) for model in [*tensors, *elements]]


def table(rows: list[dict[str, Any]]) -> str:
    def number(value: float | None, form: str, scale: float | None = None) -> str:
        return "" if value is None else format(value * scale if scale else value, form)

    def time_of(value: dict[str, float] | None) -> str:
        if value is None:
            return ""
        return f"{value['median'] * 1e6:,.1f} ({value['p20'] * 1e6:,.1f} – {value['p80'] * 1e6:,.1f})"

    lines = []
    for r in rows:
        gradients = f"{r['model']} {r['dtype']}" + (f" ×{r['input_sets']}" if r["input_sets"] > 1 else "")
        line = [gradients, r["mode"], r["provider"]]
        if r["status"] == "ok":
            ratio = r["vs_torch"] and f"{r['vs_torch']['median']:.1f}×"
            device = number(r["device_s"] and r["device_s"]["median"], ",.1f", 1e6)
            host = number(r["host_s"]["median"], ",.1f", 1e6) if device else ""
            line += [
                time_of(r["wall_s"]), host, device, ratio, number(r["gb_per_s"], ",.0f"), number(r["of_floor"], ".0%"),
                number(r["launches"] if device else r["ops"], ",d"), number(r["syncs"], "d"),
                number(r["extra_bytes"], ",.0f", 1 / 1024), number(r["norm_error"], ".0e"),
                number(r["first_call_s"], ",.1f", 1e3),
            ]  # fmt: skip
        else:
            line += [f"{r['status']}: {r['reason']}"]
        lines.append(line)
    launches = "launches" if any(r["launches"] is not None for r in rows) else "ops"
    headers = ["gradients", "mode", "provider", "wall µs (p20 – p80)", "host µs", "device µs", "vs torch", "GB/s",
               "of floor", launches, "syncs", "extra KiB", "norm error", "first call ms"]  # fmt: skip
    return tabulate(lines, headers, disable_numparse=True, colalign=("left",) * 4 + ("right",) * 10)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def names(allowed: Any) -> Callable[[str], list[str]]:
        def split(text: str) -> list[str]:
            wrong = [word for word in text.split(",") if word not in allowed]
            if wrong:
                raise argparse.ArgumentTypeError(f"{wrong[0]!r} is none of {', '.join(allowed)}")
            return text.split(",")

        return split

    def models(text: str) -> list[str]:
        for word in text.split(","):
            try:
                find(word)
            except ValueError as error:
                raise argparse.ArgumentTypeError(str(error)) from None
        return text.split(",")

    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--models", type=models, help="comma-separated; TxN is T tensors of N elements each")
    parser.add_argument("--dtypes", type=names(DTYPES), help="with --models; fp32 unless told")
    parser.add_argument("--modes", type=names(PASSES), help="with --models; all unless told")
    parser.add_argument("--providers", type=lambda text: text.split(","), help="all that run here unless told")
    parser.add_argument("--cold", action="store_true", help="with --models: enough sets of gradients to fill the cache")
    parser.add_argument(
        "--moving", action="store_true", help="with --models: gradients that lie elsewhere in every call"
    )
    parser.add_argument("--all", action="store_true", help="every model × dtype × mode × provider: hours")
    parser.add_argument("--growth", action="store_true", help="how cost grows with elements and with tensors")
    parser.add_argument("--quick", action="store_true", help="few cases, under a minute")
    parser.add_argument("--minutes", type=float, help="for everything together; 4, or 0.5 with --quick, unless told")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the rows to this file too")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    known = [p.name for p in providers(options.device)]
    if unknown := [name for name in options.providers or [] if name not in known]:
        parser.error(f"--providers: {unknown[0]!r} is none of those that run here: {', '.join(known)}")
    if options.minutes is None:
        options.minutes = 0.5 if options.quick else 240.0 if options.all else 4.0
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    deadline = time.perf_counter() + 60 * options.minutes
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    copy = method.copy_bandwidth() if options.device == "cuda" else None
    machine = Machine(options.device, options.threads, copy)
    wanted = cases(options)
    kind = "growth" if options.growth else "clip"
    results = method.Results(options.json, kind, options.device, options.threads, argv, copy_bytes_per_s=copy)
    try:
        for i, case in enumerate(bar := tqdm(wanted, leave=False)):
            bar.set_description(f"{case.model} {case.dtype}")
            results.add(measure(case, machine, (deadline - time.perf_counter()) / (len(wanted) - i)))
    finally:  # what was measured is worth showing, whatever stopped the rest
        print(
            f"fastclip {fastclip.__version__} against torch {torch.__version__} on {options.device}, "
            f"{options.threads} threads" + (f"; a copy moves {copy / 1e9:,.0f} GB/s" if copy else "") + "\n"
        )
        print(table(results.rows))
        results.say()
    return 0


if __name__ == "__main__":
    sys.exit(main())
