"""For whoever works on fastclip: what its speed should reach, and whether the newest runs do."""

from __future__ import annotations

import math

from tabulate import tabulate

from .providers import BASELINE
from .runs import MODES, NAMES, Row, Run, label, pairs

# (model, dtype): ratios to torch to reach on a CPU, in the order of MODES
CPU_GOALS = {
    ("gpt2-124m", "fp32"): (3.0, 1.7),
    ("gpt2-124m", "bf16"): (3.5, 1.6),
    ("gpt2-124m", "fp16"): (8.0, 4.0),
    ("resnet50", "fp32"): (5.0, 2.4),
    ("small-cnn", "fp32"): (15.0, 7.0),
    ("2000x256", "fp32"): (60.0, 50.0),
    ("1x16", "fp32"): (8.0, 8.0),
}
# mode: share of a copy's bandwidth, and ratio to torch, to reach on a GPU with a model that fills it. (For the norm
# alone torch reads once, too.)
GPU_GOALS = {"norm": (0.9, 1.1), "not triggered": (0.9, 3.0), "triggered": (0.9, 1.2)}


def goals(runs: dict[tuple[str, str], Run]) -> str:
    """A table of the goals, reached or missed by these runs."""
    lines: list[tuple[str, str, float, float]] = []  # what, in which unit, measured, at least
    for first, modes in pairs(runs.get(("clip", "cpu"), {"rows": []})["rows"]):
        wanted = CPU_GOALS.get((first["model"], first["dtype"])) if first["input_sets"] == 1 else None
        for mode, goal in zip(MODES, wanted or ()):
            r = modes[mode]["fastclip cpu"]
            lines.append((f"{label(first)}, {mode}", "× torch", (r["vs_torch"] or {}).get("median", math.nan), goal))
    for r in runs.get(("growth", "cpu"), {"rows": []})["rows"]:
        if (r["model"], r["mode"], r["provider"]) == ("10000x16", "not triggered", "fastclip.Clipper"):
            rate = r["tensors"] / r["host_s"]["median"] / 1e6
            lines.append(("Clipper.clip_ on 10,000 × 16", "tensors per µs", rate, 1 / 0.040))
    for device in ("cpu", "cuda"):
        for r in runs.get(("rules", device), {"rows": []})["rows"]:
            if r["model"] == "gpt2-124m" and r["provider"] in ("ZClip", "AutoClip") and r["status"] == "ok":
                lines.append((f"{r['provider']} on {device}", "speed of GlobalNorm", r["vs_torch"]["median"], 1 / 1.15))
        for r in runs.get(("memory", device), {"rows": []})["rows"]:
            if "step_in_backward" in r["provider"] and r["status"] == "ok":
                what = f"step_in_backward, {NAMES.get(r['model'], r['model'])}, peak saved on {device}"
                lines.append((what, "of the gradients", r["saved_of_gradients"], 0.9))
        for r in runs.get(("monitor", device), {"rows": []})["rows"]:
            if r["provider"] == "GradMonitor(path)":
                lines.append((f"GradMonitor on {device}", "times 1 % of a step", 0.01 / r["of_step"]["median"], 1))
    for first, modes in pairs(runs.get(("clip", "cuda"), {"rows": []})["rows"]):
        for mode, rivals in modes.items():
            torch = rivals.get(BASELINE, {})
            for name in ("fastclip triton", "fastclip cuda"):
                r = rivals.get(name)
                if mode in GPU_GOALS and r and r["status"] == torch.get("status") == "ok":
                    lines += gpu_lines(f"{label(first)}, {mode}, {name}", r, torch, mode)
    rows = [
        [what, f"{got:.2f}", f"{goal:.4g}", unit, "reached" if got >= goal else "missed"]
        for what, unit, got, goal in lines
    ]
    return tabulate(rows, ["", "measured", "goal", "unit", ""], disable_numparse=True)


def gpu_lines(what: str, r: Row, torch: Row, mode: str) -> list[tuple[str, str, float, float]]:
    def faster(clock: str) -> float:
        return torch[clock]["median"] / r[clock]["median"]

    lines = [
        (what, "of 3 launches spared", 3 - r["launches"], 0),
        (what, "host syncs, times -1", -r["syncs"], 0),
        (what, "of 1 MiB spared", 1 - r["extra_bytes"] / 2**20, 0),
    ]
    if r["model"] == "2000x256":
        return [
            (what, "× less host time", faster("host_s"), 20),
            (what, "× less wall time", faster("wall_s"), 5),
            *lines,
        ]
    if r["elements"] > 100_000_000:
        bandwidth, times_torch = GPU_GOALS[mode]
        lines = [
            (what, "of a copy", r["of_floor"], bandwidth),
            (what, "× torch", faster("device_s"), times_torch),
            *lines,
        ]
    return lines
