"""What a rule costs: `Clipper.clip_()` with each, beside the plain global norm on the same gradients.

    python -m bench.rules                       # on the GPU if there is one
    python -m bench.rules --models 2000x256 --minutes 0.5

Every rule is at rest: the same gradients in every call, and limits that clip nothing, so that what is timed is the
rule's own work and not a second pass over the gradients. ("AGC" reads gradients and parameters once more: it has norms
of rows to compare. "Value" is a pass of its own.) "clip_norm_" is what GlobalNorm costs without the statistics of each
tensor.
"""

from __future__ import annotations

import argparse
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
from .models import find

RULES = fastclip.rules
BASELINE = "GlobalNorm"
GOALS = {"ZClip": 1.15, "AutoClip": 1.15}  # times GlobalNorm on GPT-2 124M, at most
MOST_LAUNCHES = 12  # more than GlobalNorm's
STATISTICS = 1.03  # GlobalNorm, times what clip_norm_ takes, at most


# Every rule of fastclip.rules, with limits that clip nothing.
AT_REST: dict[str, Callable[[list[Tensor]], Any]] = {
    "GlobalNorm": lambda _: RULES.GlobalNorm(1e9),
    "TensorNorm": lambda _: RULES.TensorNorm(1e9),
    "BlockRMS": lambda _: RULES.BlockRMS(1e9),
    "Mask": lambda _: RULES.Mask(0.0),
    "ZClip": lambda _: RULES.ZClip(warmup=1),
    "AutoClip": lambda _: RULES.AutoClip(),
    "AdaGC": lambda _: RULES.AdaGC(lambda_abs=1e9),
    "Only": lambda parameters: RULES.Only(1e9, parameters[::2]),
    "Except": lambda parameters: RULES.Except(1e9, parameters[::2]),
    "Value": lambda _: RULES.Value(1e9),
    "AGC": lambda _: RULES.AGC(1e9),
}


def rivals(parameters: list[Tensor]) -> dict[str, Callable[[], Any]]:
    def clip(rule: Any, **options: Any) -> Callable[[], Any]:
        return fastclip.Clipper(parameters, rule, **options).clip_

    return {
        **{name: clip(rule(parameters)) for name, rule in AT_REST.items()},
        "clip_norm_": lambda: fastclip.clip_norm_(parameters, 1e9),
        "GlobalNorm, skip": clip(1e9, nonfinite="skip"),
        "GlobalNorm, zero": clip(1e9, nonfinite="zero"),
        "Mask, ZClip, GlobalNorm": clip([RULES.Mask(0.0), RULES.ZClip(warmup=1), RULES.GlobalNorm(1e9)]),
    }


def measure(name: str, device: str, threads: int, seconds: float) -> list[dict[str, Any]]:
    start = time.perf_counter()
    model = find(name)
    common = {"model": name, "dtype": "fp32", "tensors": len(model.shapes), "elements": model.elements}
    if reason := method.does_not_fit(8 * model.elements, device) or (method.NO_TIME if seconds <= 0 else None):
        return [{**common, "provider": BASELINE, "status": "skipped", "reason": reason}]
    parameters = [torch.nn.Parameter(torch.ones(s, device=device)) for s in model.shapes]
    for p in parameters:
        p.grad = torch.randn(p.shape, device=device)
    calls = rivals(parameters)
    version = sum(p.grad._version for p in parameters)
    for call in calls.values():
        for _ in range(3):  # compile, allocate, and be past the warm-up
            call()
    assert sum(p.grad._version for p in parameters) == version, "something was clipped"
    left = seconds - (time.perf_counter() - start)
    fields = method.measure(calls, {}, device, threads, left, BASELINE, lambda _: None, lambda _: None)
    return [{**common, "provider": provider, "status": "ok", **fields[provider]} for provider in calls]


def cost(row: dict[str, Any]) -> float | None:
    """Times what GlobalNorm takes."""
    return 1 / row["vs_torch"]["median"] if row["status"] == "ok" else None


def goals(rows: list[dict[str, Any]]) -> str:
    """Which of the limits are kept."""
    found = {row["provider"]: row for row in rows if row["model"] == "gpt2-124m" and row["status"] == "ok"}
    lines = []
    for provider, most in GOALS.items():
        if provider in found:
            lines.append([f"{provider} on GPT-2 124M", f"{cost(found[provider]):.3f}×", f"<= {most}×"])
            if found[provider]["launches"]:
                more = found[provider]["launches"] - found[BASELINE]["launches"]
                lines.append([f"{provider}, launches", f"+{more}", f"<= +{MOST_LAUNCHES}"])
    if found:
        share = 1 / cost(found["clip_norm_"])
        lines.append(["statistics for each tensor", f"{share:.3f}×", f"<= {STATISTICS}×"])
    return tabulate(lines, ["limit", "measured", "goal"], disable_numparse=True)


def table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for r in rows:
        if r["status"] != "ok":
            lines.append([r["model"], r["provider"], f"{r['status']}: {r['reason']}"])
            continue
        w, v = r["wall_s"], r["vs_torch"]
        lines.append([
            r["model"], r["provider"], f"{w['median'] * 1e6:,.0f} ({w['p20'] * 1e6:,.0f} – {w['p80'] * 1e6:,.0f})",
            f"{1 / v['median']:.3f}× ({1 / v['p80']:.3f} – {1 / v['p20']:.3f})",
            r["ops"] if r["launches"] is None else r["launches"],
        ])  # fmt: skip
    headers = ["gradients", "rule", "wall µs (p20 – p80)", "times GlobalNorm", "ops or launches"]
    return tabulate(lines, headers, disable_numparse=True, colalign=("left", "left", "right", "right", "right"))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--models", default="gpt2-124m,2000x256", help="comma-separated; TxN is T tensors of N elements"
    )
    parser.add_argument("--minutes", type=float, default=1.0, help="for everything together (1)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the rows to this file too")
    options = parser.parse_args(argv)
    deadline = time.perf_counter() + 60 * options.minutes
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    models = options.models.split(",")
    results = method.Results(options.json, "rules", options.device, options.threads, argv)
    try:
        for i, model in enumerate(tqdm(models, leave=False)):
            left = (deadline - time.perf_counter()) / (len(models) - i)
            results.add(measure(model, options.device, options.threads, left))
    finally:
        print(table(results.rows) + "\n\n" + goals(results.rows))
        results.say()
    return 0


if __name__ == "__main__":
    sys.exit(main())
