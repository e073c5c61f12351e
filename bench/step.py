"""The whole optimizer phase, clip and step: what one can choose today, beside what fastclip offers.

    python -m bench.step                        # on the GPU if there is one
    python -m bench.step --quick                # under a minute
    python -m bench.backward                    # after a real backward pass, which may measure the gradients

AdamW and SGD with momentum, each in torch's three implementations (a loop over parameters, foreach, fused), after
torch's clip and after fastclip's; `Clipper.step`, which feeds torch's fused one; and `fastclip.optim`. All of them must
lead to the same parameters in a few steps before any is timed. zero_grad is not part of it: setting gradients to None
costs the same everywhere, and the next call needs them.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

import fastclip

from . import method
from .method import DTYPES, Falling
from .models import find

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "AdamW": {"lr": 1e-4, "weight_decay": 0.01},
    "SGD": {"lr": 1e-4, "momentum": 0.9},
}
IMPLEMENTATIONS = {"loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
MODES = ("not triggered", "triggered")
BASELINE = "torch clip + fused"
LIMITS = (0.5, 0.1, 2.0)  # of the norm, step by step, to check with: Adam forgets a factor that stays the same
SLOW_AND_KNOWN = ("fastclip.clip_norm_ + loop", "fastclip.clip_norm_ + foreach")
STATES = 2  # of a parameter's size, that AdamW keeps
# Of all updates' norm. In large models torch's clip is off by as much: its sums are running sums in float32.
TOLERANCE = {torch.float32: 5e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}

Step = Callable[[float], None]


def rivals(optimizer: str, parameters: list[Tensor]) -> dict[str, Step]:
    """Each way to clip and step, as a function of the limit."""
    make, options = getattr(torch.optim, optimizer), OPTIMIZERS[optimizer]
    found: dict[str, Step] = {}
    clips = {"torch clip": torch.nn.utils.clip_grad_norm_, "fastclip.clip_norm_": fastclip.clip_norm_}
    for (first, clip), (second, how) in itertools.product(clips.items(), IMPLEMENTATIONS.items()):
        found[f"{first} + {second}"] = clip_and_step(clip, parameters, make(parameters, **options, **how))
    found["Clipper.step + fused"] = clipper_step(parameters, make(parameters, **options, fused=True))
    found["fastclip.optim"] = own_step(getattr(fastclip.optim, optimizer)(parameters, **options, max_norm=1.0))
    return found


def clip_and_step(clip: Callable[..., Any], parameters: list[Tensor], optimizer: torch.optim.Optimizer) -> Step:
    def step(limit: float) -> None:
        clip(parameters, limit)
        optimizer.step()

    return step


def clipper_step(parameters: list[Tensor], optimizer: torch.optim.Optimizer) -> Step:
    clipper = fastclip.Clipper(parameters, 1.0)
    rule = clipper.rules[0]

    def step(limit: float) -> None:
        rule.max_norm = limit
        clipper.step(optimizer)

    return step


def own_step(optimizer: Any) -> Step:
    rule = optimizer.clipper.rules[0]

    def step(limit: float) -> None:
        rule.max_norm = limit
        optimizer.step()

    return step


def after_steps(step: Step, parameters: list[Tensor], gradients: list[Tensor], norm: float) -> list[Tensor]:
    """The parameters, from zeros, after a few steps with these gradients and different limits."""
    with torch.no_grad():
        for p in parameters:
            p.zero_()
        for limit in LIMITS:
            for p, g in zip(parameters, gradients):
                p.grad.copy_(g)
            step(limit * norm)
        return [p.detach().clone() for p in parameters]


def measure(name: str, dtype: str, optimizer: str, device: str, threads: int, seconds: float) -> list[dict[str, Any]]:
    start = time.perf_counter()
    model = find(name)
    common = {"model": name, "dtype": dtype, "tensors": len(model.shapes), "elements": model.elements,
              "optimizer": optimizer}  # fmt: skip
    size = model.elements * DTYPES[dtype].itemsize
    # parameters, gradients, gradients as they were, parameters as they should become and as they do; and states
    reason = method.does_not_fit(size * (5 + STATES * 8), device) or (method.NO_TIME if seconds <= 0 else None)
    if reason:
        return [{**common, "mode": mode, "provider": BASELINE, "status": "skipped", "reason": reason} for mode in MODES]
    parameters = [torch.nn.Parameter(torch.zeros(s, dtype=DTYPES[dtype], device=device)) for s in model.shapes]
    gradients = [(torch.randn(s, device=device) * 1e-2).to(DTYPES[dtype]) for s in model.shapes]
    for p in parameters:
        p.grad = torch.zeros_like(p)
    norm = fastclip.total_norm(gradients).item()
    steps = rivals(optimizer, parameters)
    if device == "cuda" and len(model.shapes) > 1000:  # a loop launches thousands of kernels a step
        steps = {name: step for name, step in steps.items() if not name.endswith("+ loop")}
    if device == "cpu" and model.elements > 50_000_000:  # seconds a round, to learn what the smaller models have told
        steps = {name: step for name, step in steps.items() if name not in SLOW_AND_KNOWN}
    expected = after_steps(rivals(optimizer, parameters)["torch clip + loop"], parameters, gradients, norm)
    rows = []
    for provider, step in steps.items():
        reason, status = None, "ok"
        try:
            after = after_steps(step, parameters, gradients, norm)
        except Exception as error:  # noqa: BLE001 - whatever a rival does, the others are measured
            reason, status = method.first_line(error), "failed"
        else:
            off = fastclip.total_norm([a - e for a, e in zip(after, expected)]) / fastclip.total_norm(expected)
            if not off <= TOLERANCE[DTYPES[dtype]] and provider != "torch clip + loop":
                reason, status = f"its parameters are off by {off:.1e} after {len(LIMITS)} steps", "wrong"
            del after
        rows += [{**common, "mode": mode, "provider": provider, "status": status, "reason": reason} for mode in MODES]
    del expected
    good = {r["provider"]: steps[r["provider"]] for r in rows if r["status"] == "ok"}
    for i, mode in enumerate(MODES):
        with torch.no_grad():
            for p, g in zip(parameters, gradients):
                p.grad.copy_(g)
        limits = Falling([parameters]) if mode == "triggered" else itertools.repeat(2 * norm)
        calls = {provider: taking(step, limits) for provider, step in good.items()}

        def before(provider: str, limits: Any = limits) -> None:
            if isinstance(limits, Falling):
                limits.start()

        left = (seconds - (time.perf_counter() - start)) / (len(MODES) - i)
        trace = device == "cuda" or len(model.shapes) <= 200  # a loop over 2,000 tensors is 60,000 operators
        fields = method.measure(calls, {}, device, threads, left, BASELINE, before, lambda provider: None, trace)
        for r in rows:
            if r["mode"] == mode and r["status"] == "ok":
                r |= fields[r["provider"]]
    return rows


def taking(step: Step, limits: Any) -> Callable[[], None]:
    return lambda: step(next(limits))


def cases(device: str, quick: bool) -> list[tuple[str, str]]:
    if quick:
        return [("small-cnn", "fp32"), ("2000x256", "fp32")]
    if device == "cuda":
        return [("gpt2-124m", "fp32"), ("llama-3.2-1b", "bf16"), ("2000x256", "fp32")]
    return [("2000x256", "fp32"), ("resnet50", "fp32"), ("gpt2-124m", "fp32")]


def table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for r in rows:
        line = [f"{r['model']} {r['dtype']}", r["optimizer"], r["mode"], r["provider"]]
        if r["status"] == "ok":
            w, d, v = r["wall_s"], r["device_s"], r["vs_torch"]
            line += [
                f"{w['median'] * 1e6:,.0f} ({w['p20'] * 1e6:,.0f} – {w['p80'] * 1e6:,.0f})",
                f"{r['host_s']['median'] * 1e6:,.0f}" if d else "", f"{d['median'] * 1e6:,.0f}" if d else "",
                f"{v['median']:.2f}×" if v else "", r["launches"] if d else r["ops"],
                "" if r["extra_bytes"] is None else f"{r['extra_bytes'] / 1024:,.0f}",
            ]  # fmt: skip
        else:
            line += [f"{r['status']}: {r['reason']}"]
        lines.append(line)
    headers = ["parameters", "optimizer", "mode", "provider", "wall µs (p20 – p80)", "host µs", "device µs",
               "vs torch clip + fused", "launches or ops", "extra KiB"]  # fmt: skip
    return tabulate(lines, headers, disable_numparse=True, colalign=("left",) * 5 + ("right",) * 5)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--models", help="comma-separated, in fp32; TxN is T tensors of N elements each")
    parser.add_argument("--quick", action="store_true", help="few cases, under a minute")
    parser.add_argument("--minutes", type=float, help="for everything together; 2, or 0.5 with --quick, unless told")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the rows to this file too")
    options = parser.parse_args(argv)
    device, threads = options.device, options.threads
    deadline = time.perf_counter() + 60 * (options.minutes or (0.5 if options.quick else 2.0))
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    models = [(m, "fp32") for m in options.models.split(",")] if options.models else cases(device, options.quick)
    wanted = list(itertools.product(models, OPTIMIZERS))
    results = method.Results(options.json, "step", device, threads, argv)
    try:
        for i, ((model, dtype), optimizer) in enumerate(bar := tqdm(wanted, leave=False)):
            bar.set_description(f"{model} {optimizer}")
            left = (deadline - time.perf_counter()) / (len(wanted) - i)
            results.add(measure(model, dtype, optimizer, device, threads, left))
    finally:  # what was measured is worth showing, whatever stopped the rest
        print(table(results.rows))
        results.say()
    return 0


if __name__ == "__main__":
    sys.exit(main())
